"""Lists the names that hosts have given to one checkpoint's weights. The fingerprints of older sidecars depend on these names.

Those fingerprints counted vectors too. Since then hosts renamed the scale of the norms in FLUX's blocks, and left out a norm of Lumina 2
that was never used. What is listed here are only candidates: names are taken if they, with the shapes, give exactly the structure that
the sidecar has.
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
