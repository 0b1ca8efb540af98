"""Talks with the page: answers its questions for plans and runs, and sends it notices and progress."""
