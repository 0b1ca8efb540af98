"""Loads the tiny FLUX of the node Demo FLUX. Its weights ship with the pack, in demo/ beside nodes/."""
