"""Runs ComfyUI, as a server or in this process, and talks to it as a client or through a browser."""
