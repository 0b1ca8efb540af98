"""Connects the nodes to the page: answers requests for plans and runs, and sends notices and progress."""
