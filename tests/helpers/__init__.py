"""What several rooms of tests share. A module here imports ComfyUI only if it is for tests that have it."""
