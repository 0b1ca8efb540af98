"""Tests of the pack in ComfyUI's own page, in a real browser. The folder is a package, so that its fixtures end with its last test."""
