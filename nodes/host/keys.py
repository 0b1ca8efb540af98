"""Names what the pack puts on the host's objects, and finds it among the arguments of a wrapper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

KEY = "duca_cache"  # of wrappers, callbacks and the attachment on a model
RUN = f"{KEY}.run"  # of the run in transformer_options; with a dot, as some models pass that dict on as keyword arguments
SKIPS = f"{KEY}.skips"  # in the options of one model call: no block of it will run


def options_with(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the transformer options among a wrapper's arguments, None where they have no option of this name.

    Hosts pass them by name or by position.
    """
    return next((given for given in (*args, *kwargs.values()) if isinstance(given, dict) and given.get(name) is not None), None)
