"""Helpers that several rooms of tests use. A module here imports ComfyUI only if it is for rooms that have it."""
