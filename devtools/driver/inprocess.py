"""Loads ComfyUI and this pack into the running process, for tests and benchmarks.

ComfyUI's root is put first on the path and the pack's root is removed from it, as both have a module called `nodes`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
PACK = "comfyui_duca"


def load_comfyui() -> None:
    """Imports ComfyUI on the CPU, from the folder that COMFYUI_PATH names.

    Raises:
        RuntimeError: COMFYUI_PATH is not set.
    """
    comfyui = os.environ.get("COMFYUI_PATH")
    if not comfyui:
        raise RuntimeError("COMFYUI_PATH is not set: run this through dev.py")
    sys.path[:] = [comfyui, *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    arguments, sys.argv = sys.argv, [sys.argv[0], "--cpu", "--use-pytorch-cross-attention"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
        import comfy.model_management
        import utils.json_util  # noqa: F401 - before the host's nodes.py puts another module of that name on the path
    finally:
        sys.argv = arguments


def load_pack() -> ModuleType:
    """Returns this pack as the package `comfyui_duca`, with or without ComfyUI loaded.

    If the pack was loaded before ComfyUI, its `__init__.py` runs again, so that the package has its nodes too.
    """
    module = sys.modules.get(PACK)
    if module is None:
        spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACK] = module
    elif hasattr(module, "comfy_entrypoint") or importlib.util.find_spec("comfy_api") is None:
        return module
    assert module.__spec__ is not None and module.__spec__.loader is not None
    module.__spec__.loader.exec_module(module)
    return module
