"""Loads ComfyUI into the tests' process. Its classes make the small models."""

from __future__ import annotations

import helpers.on_host  # noqa: F401 - before everything of the host
