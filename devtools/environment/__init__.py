"""Sets up a ComfyUI to develop against. Needs the standard library only, as it runs before anything is installed."""
