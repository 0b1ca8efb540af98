"""Finds where a network's hidden state can be put back, by watching one full evaluation, and proves that place by skipping."""
