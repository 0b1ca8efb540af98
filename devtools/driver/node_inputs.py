"""Reads the inputs of a node class, in the forms that the hosts' versions write them in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def inputs_listed(specs: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, type and options of every input that the page shows. The type of a choice is always COMBO.

    specs: one group of what `INPUT_TYPES` returns ("required" or "optional"), or of what the server says of the node.

    Newer hosts have choices that bring inputs of their own: those of the default choice follow it.
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
