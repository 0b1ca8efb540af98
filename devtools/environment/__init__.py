"""Sets up a ComfyUI to develop against. Standard library only, as it runs before anything is installed."""
