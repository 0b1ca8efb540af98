"""Runs ComfyUI: as a server, as its client, in this process, and what a browser needs to show its page."""
