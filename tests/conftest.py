"""Loads the real ComfyUI and this pack (as `comfyui_duca`) once for all tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from devtools.inprocess import load_comfyui, load_pack

load_comfyui()
load_pack()
