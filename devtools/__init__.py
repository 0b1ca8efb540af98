"""What dev.py is made of: `environment` sets up a ComfyUI, `driver` runs it, `generators` make files with it."""
