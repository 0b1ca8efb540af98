"""Makes the pictures and texts that nodes put out: comparisons, plots and reports."""
