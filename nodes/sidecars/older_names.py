"""Lists the names that versions of the host gave to a checkpoint's weights. Fingerprints of older sidecars depend on these names.

Those fingerprints counted vectors too. Since then hosts renamed the scale of the norms in FLUX's blocks, and left out a norm of Lumina 2
that was never used. The names listed here are candidates: they are used if they, with the shapes, give exactly the structure of the
sidecar.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_SCALE = re.compile(r"((?:^|\.)(?:query_norm|key_norm|norm|norms\.\d+)\.)(?:scale|weight)$")
_UNUSED = "norm_final.weight"  # in hosts that have it, it is never initialised
_LIKE_UNUSED = "x_embedder.bias"  # a weight of the same model that has the same shape

Shape = tuple[int, ...]


def namings(shapes: Mapping[str, Shape]) -> Iterator[dict[str, tuple[str | None, Shape]]]:
    """Yields every way in which a host may have named a model's weights.

    Args:
        shapes: Shapes by present name.

    Yields:
        For every older name, the present name and the shape. The present name is None for a weight whose values mean nothing.
    """
    own: dict[str, tuple[str | None, Shape]] = {name: (name, shape) for name, shape in shapes.items() if name != _UNUSED}
    unused = shapes.get(_UNUSED) or shapes.get(_LIKE_UNUSED)
    for scale in (None, "scale", "weight"):
        named = own if scale is None else {_SCALE.sub(rf"\g<1>{scale}", name): kept for name, kept in own.items()}
        yield named
        if unused is not None:
            yield {**named, _UNUSED: (None, unused)}
