"""The parts of dev.py: `environment` sets up a ComfyUI, `driver` runs it, and `generators` makes files with it."""
