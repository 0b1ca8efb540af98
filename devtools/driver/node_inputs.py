"""Reads the inputs of a node class in every form that the supported hosts write them in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def inputs_listed(specs: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields name, type and options of every input that the page shows. The type of a combo box is always COMBO.

    In newer hosts an option of a combo box may bring inputs of its own. Those of the default option follow it.

    Args:
        specs: One group of what `INPUT_TYPES` returns ("required" or "optional"), or of what the server says of the node.
    """
    for name, (kind, *more) in specs.items():
        options = dict(more[0]) if more else {}
        if options.get("hidden"):
            continue
        if kind == "COMFY_DYNAMICCOMBO_V3":
            choices = options["options"]
            yield name, "COMBO", {**options, "options": [choice["key"] for choice in choices]}
            for group in choices[0]["inputs"].values():
                yield from inputs_listed(group)
        elif isinstance(kind, list):
            yield name, "COMBO", {**options, "options": kind}
        else:
            yield name, str(getattr(kind, "value", kind)), options
