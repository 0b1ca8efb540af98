"""ComfyUI-DuCa: dual feature caching for diffusion transformers. ComfyUI loads this file.

The nodes are imported only where ComfyUI is, so that tools and tests can import the folder without it.
"""

from importlib.util import find_spec

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY"]

if find_spec("comfy_api") is not None:
    from .nodes import comfy_entrypoint

    __all__ += ["comfy_entrypoint"]
