"""What hosts called one checkpoint's weights: for sidecars from the time when a fingerprint counted vectors, by the host's names.

Since then hosts gave the norms of FLUX's blocks another name for their scale, and left out a norm that Lumina 2 has and never used.
What is here only makes candidates: a file is taken as one of them only if names and shapes give its very structure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_SCALE = re.compile(r"((?:^|\.)(?:query_norm|key_norm|norm|norms\.\d+)\.)(?:scale|weight)$")
_UNUSED = "norm_final.weight"  # where a host has it, its values are whatever lay in memory
_LIKE_UNUSED = "x_embedder.bias"  # of the same model and shape

Shape = tuple[int, ...]


def namings(shapes: Mapping[str, Shape]) -> Iterator[dict[str, tuple[str | None, Shape]]]:
    """Older name to the present one and its shape, for every way in which a host may have named a model's weights.

    shapes: by present name. A weight whose values say nothing has None for its present name.
    """
    own: dict[str, tuple[str | None, Shape]] = {name: (name, shape) for name, shape in shapes.items() if name != _UNUSED}
    unused = shapes.get(_UNUSED) or shapes.get(_LIKE_UNUSED)
    for scale in (None, "scale", "weight"):
        named = own if scale is None else {_SCALE.sub(rf"\g<1>{scale}", name): kept for name, kept in own.items()}
        yield named
        if unused is not None:
            yield {**named, _UNUSED: (None, unused)}
