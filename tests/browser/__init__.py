"""The pack in ComfyUI's own page, in a real browser. A package, so that its fixtures end with its last test."""
