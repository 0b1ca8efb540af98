"""Makes the pictures and texts that nodes give out: comparisons, plots and reports."""
