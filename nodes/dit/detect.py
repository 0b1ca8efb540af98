"""Finds out from the names and shapes of a checkpoint's weights whether it is a DiT, and of which size. It reads no weights.

No shape depends on the number of heads. It is known for the published widths; for others, heads of 64 channels are assumed. SiT, which
predicts a velocity, has the same weights and cannot be distinguished.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .network import DiTShape

Shapes = Mapping[str, tuple[int, ...]]

_SIZES = {384: ("S", 12, 6), 768: ("B", 12, 12), 1024: ("L", 24, 16), 1152: ("XL", 28, 16)}  # width -> name, depth, heads
_LATENT_CHANNELS = 4
_ANCHOR = "x_embedder.proj.weight"
_BLOCK_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
_OTHER_LAYERS = ("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear", "final_layer.adaLN_modulation.1")
_TABLE, _PLACES = "y_embedder.embedding_table.weight", "pos_embed"


class NotADiTError(ValueError):
    """Says why a file is no DiT. The message continues "NAME is not a class-conditional DiT: "."""


def prefix_of(names: Mapping[str, object]) -> str:
    """Returns the prefix of the names of the model's weights. Of several models in a file, the averaged one ("ema") is taken.

    Raises:
        NotADiTError: If no weight has the name of a DiT's first one.
    """
    found = [name.removesuffix(_ANCHOR) for name in names if name == _ANCHOR or name.endswith(f".{_ANCHOR}")]
    if not found:
        raise NotADiTError(f"it has no {_ANCHOR}")
    return min(found, key=lambda prefix: ("ema" not in prefix, len(prefix), prefix))


def shape_of(shapes: Shapes) -> DiTShape:
    """Returns the shape of a DiT from the shapes of its weights, whose names have no prefix. Raises NotADiTError."""
    _check_names(shapes)
    (width, channels, patch, _), (_, waves) = shapes[_ANCHOR], shapes["t_embedder.mlp.0.weight"]
    if channels != _LATENT_CHANNELS:
        raise NotADiTError(f"its latents have {channels} channels, those of the Stable Diffusion VAE have {_LATENT_CHANNELS}")
    _, _, heads = _SIZES.get(width, ("", 0, width // 64))
    found = DiTShape(
        width=width,
        depth=_depth(shapes),
        heads=heads,
        mlp_width=shapes["blocks.0.mlp.fc1.weight"][0],
        patch=patch,
        in_channels=channels,
        out_channels=shapes["final_layer.linear.weight"][0] // patch**2,
        grid=_grid(shapes),
        classes=shapes[_TABLE][0] - 1,
        waves=waves,
    )
    if heads == 0 or width % heads or width % 4:
        raise NotADiTError(f"its tokens have {width} channels, which is no size of a DiT")
    _check_shapes(shapes, found)
    return found


def name_of(shape: DiTShape) -> str:
    """Returns a name such as "DiT-XL/2, 256x256, 1000 classes"."""
    size, depth, _ = _SIZES.get(shape.width, ("", 0, 0))
    which = f"DiT-{size}/{shape.patch}" if depth == shape.depth else f"DiT of {shape.depth} blocks, {shape.width} wide, /{shape.patch}"
    pixels = shape.grid * shape.patch * 8
    return f"{which}, {pixels}x{pixels}, {shape.classes} classes" if shape.grid else f"{which}, {shape.classes} classes"


def _depth(shapes: Shapes) -> int:
    numbers = {int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))}
    return len(numbers)


def _grid(shapes: Shapes) -> int:
    """Returns the side of the square table of positions. 0 where there is none, or none that is square; it is computed then."""
    count = shapes.get(_PLACES, (1, 0, 0))[1]
    side = round(count**0.5)
    return side if side * side == count else 0


def _check_names(shapes: Shapes) -> None:
    layers = [f"blocks.{i}.{layer}" for i in range(max(1, _depth(shapes))) for layer in _BLOCK_LAYERS]
    needed = {f"{layer}.{kind}" for layer in (*layers, *_OTHER_LAYERS) for kind in ("weight", "bias")} | {_TABLE}
    if missing := needed - set(shapes):
        raise NotADiTError(f"it has no {_few(missing)}")
    if unknown := set(shapes) - needed - {_PLACES}:
        raise NotADiTError(f"it also has {_few(unknown)}")
    axes = {name: 4 if name == _ANCHOR else 3 if name == _PLACES else 1 if name.endswith(".bias") else 2 for name in shapes}
    if odd := {name for name in shapes if len(shapes[name]) != axes[name] or 0 in shapes[name]}:
        raise NotADiTError(f"of another shape than a DiT's: {_few(odd)}")


def _few(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _check_shapes(shapes: Shapes, found: DiTShape) -> None:
    """Compares the shape of every weight with that of a DiT of this shape. Raises NotADiTError."""
    expected = _expected(found)
    for name, shape in shapes.items():
        if name != _PLACES and tuple(shape) != expected[name]:
            raise NotADiTError(f"{name} is {'x'.join(map(str, shape))} and not {'x'.join(map(str, expected[name]))}")
    places = shapes.get(_PLACES, (1, 0, found.width))
    if (places[0], places[2]) != (1, found.width):
        raise NotADiTError(f"{_PLACES} is {'x'.join(map(str, places))}")
    if found.out_channels not in (found.in_channels, 2 * found.in_channels):
        raise NotADiTError(f"it predicts {found.out_channels} channels for {found.in_channels}")


def _expected(found: DiTShape) -> dict[str, tuple[int, ...]]:
    width, inner = found.width, found.mlp_width
    layers: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (width, found.in_channels, found.patch, found.patch),
        "t_embedder.mlp.0": (width, found.waves),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (found.patch**2 * found.out_channels, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    sizes = ((3 * width, width), (width, width), (inner, width), (width, inner), (6 * width, width))
    layers |= {f"blocks.{i}.{layer}": size for i in range(found.depth) for layer, size in zip(_BLOCK_LAYERS, sizes)}
    named = {f"{layer}.{kind}": size if kind == "weight" else size[:1] for layer, size in layers.items() for kind in ("weight", "bias")}
    return {**named, _TABLE: (found.classes + 1, width)}
