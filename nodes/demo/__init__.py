"""Loads the tiny FLUX of the node Demo FLUX; its weights ship with the pack, in demo/ beside nodes/."""
