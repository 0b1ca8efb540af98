"""Keeps out of the way of what newer hosts do around a model's blocks on CUDA: recording allocations, and fetching weights ahead.

A recorded block must free what it allocates, or the process ends, past any `except`. So whatever the cache keeps is allocated while
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
    """What is allocated inside may outlive the block. Such contexts may lie inside each other, but not inside a pause of the host's own,
    which would end with the first of them."""
    pause = getattr(prefetch, "pause_malloc_graph", None)
    return nullcontext() if pause is None else _paused(pause)  # torch.compile traces through the first


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
    """Whether the call with these options will run no block; see `diffusion_model`."""
    options[SKIPS] = skips


def diffusion_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """The DIFFUSION_MODEL wrapper: weights of blocks that will not run are not fetched. The host sets its option just before this."""
    options = options_with(SKIPS, args, kwargs)
    if options is not None and options[SKIPS] and _PREFETCHES in options:
        options[_PREFETCHES] = False
    return executor(*args, **kwargs)


def abandoned() -> None:
    """After a model call that ended half-way: the host unpins the weights it had fetched for it, and forgets the recording."""
    clean_up = getattr(prefetch, "cleanup_prefetch_queues", None)
    if clean_up is not None:
        clean_up()
