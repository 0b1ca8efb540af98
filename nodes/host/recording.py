"""Adapts to what newer hosts do around a model's blocks on CUDA: they record allocations and fetch weights ahead.

A recorded block must free what it allocates, or the process is aborted, past any `except`. So what the cache keeps is allocated while
recording is paused. Source: comfy/model_prefetch.py of Comfy-Org/ComfyUI (`pause_malloc_graph`, `cleanup_prefetch_queues`). Hosts
without these functions get contexts that do nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from .keys import SKIPS, options_with

try:
    import comfy.model_prefetch as prefetch
except ImportError:  # hosts that neither record nor fetch ahead
    prefetch = None

_PREFETCHES = "prefetch_dynamic_vbars"  # the option by which the host fetches the weights of a call's blocks ahead
_here = threading.local()


def unrecorded() -> AbstractContextManager[None]:
    """Pauses recording, so that tensors allocated inside may outlive the block.

    Such contexts may be nested, but not inside a pause of the host's own, which would end with the first of them.
    """
    pause = getattr(prefetch, "pause_malloc_graph", None)
    return nullcontext() if pause is None else _paused(pause)  # torch.compile can trace a nullcontext


@contextmanager
def _paused(pause: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    depth = getattr(_here, "depth", 0)
    _here.depth = depth + 1
    try:
        with nullcontext() if depth else pause():
            yield
    finally:
        _here.depth = depth


def note_skip(options: dict[str, Any], skips: bool) -> None:
    """Notes in the options of a call whether it will run no block, for `diffusion_model`."""
    options[SKIPS] = skips


def diffusion_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Is the DIFFUSION_MODEL wrapper. It keeps the host from fetching weights of blocks that will not run.

    The host sets its option just before this.
    """
    options = options_with(SKIPS, args, kwargs)
    if options is not None and options[SKIPS] and _PREFETCHES in options:
        options[_PREFETCHES] = False
    return executor(*args, **kwargs)


def abandoned() -> None:
    """Makes the host unpin the weights that it fetched and drop its recording, after a model call that ended half-way."""
    clean_up = getattr(prefetch, "cleanup_prefetch_queues", None)
    if clean_up is not None:
        clean_up()
