"""Loads ComfyUI and the pack (as `comfyui_duca`) when it is imported, once for all tests of the process."""

from __future__ import annotations

from devtools.driver.inprocess import load_comfyui, load_pack

load_comfyui()
load_pack()
