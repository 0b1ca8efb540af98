"""Names what the pack leaves on the host's objects, and finds it again among the arguments of a wrapper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

KEY = "duca_cache"  # of wrappers, callbacks and the attachment on a model
RUN = f"{KEY}.run"  # where a run travels in transformer_options; dotted, as some models splat that dict as keyword arguments
SKIPS = f"{KEY}.skips"  # in the options of one model call: no block of it will run


def options_with(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The transformer options among a wrapper's arguments, wherever the host puts them; None where they have no such option."""
    return next((given for given in (*args, *kwargs.values()) if isinstance(given, dict) and given.get(name) is not None), None)
