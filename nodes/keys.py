"""Names under which the pack leaves something on the host's objects."""

from __future__ import annotations

KEY = "duca_cache"  # of wrappers, callbacks and the attachment on a model
RUN = f"{KEY}.run"  # where a run travels in transformer_options; dotted, as some models splat that dict as keyword arguments
SKIPS = f"{KEY}.skips"  # in the options of one model call: no block of it will run
