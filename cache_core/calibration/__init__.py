"""WHAT a checkpoint's own behaviour adds: statistics, low-rank factors, search, and the file that keeps them."""
