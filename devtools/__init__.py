"""What dev.py is made of. `host_setup` and `server` use the standard library only."""
