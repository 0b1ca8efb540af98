"""Keeps what a calibration learned about a checkpoint (statistics, plans, low-rank factors), in memory and in a file, for later runs."""
