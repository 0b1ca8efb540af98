"""ComfyUI-DuCa: dual feature caching for diffusion transformers. ComfyUI loads this file.

It imports the nodes only where ComfyUI is installed, so tools and tests can import the folder without it.
"""

from importlib.util import find_spec

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY"]

if find_spec("comfy_api") is not None:
    from .nodes import comfy_entrypoint

    __all__ += ["comfy_entrypoint"]
