"""What the page asks and is told: plans, running runs, notices and progress."""
