"""Reads a checkpoint file of a DiT: .safetensors, or .pt as PyTorch writes it. Names and shapes come first, weights on request.

A .pt file is a pickle and could run a program, so it is read with `weights_only`: a file with anything else in it is refused.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from .detect import NotADiTError, Shapes, prefix_of

SUFFIXES = (".safetensors", ".sft", ".pt")


class WeightsFile(NamedTuple):
    """An opened file.

    Args:
        shapes: Shapes of the model's weights by name, without the prefix that names have in the file.
        read: Returns the weights by the same names.
    """

    shapes: Shapes
    read: Callable[[], dict[str, Tensor]]


def open_weights(path: Path) -> WeightsFile:
    """Opens a file.

    Raises:
        NotADiTError: For a file without the first weight of a DiT, or one that holds no weights by name.
        ValueError: For a file that cannot be read, with a message for the user.
    """
    return _open_pickle(path) if path.suffix.lower() == ".pt" else _open_safetensors(path)


def _open_safetensors(path: Path) -> WeightsFile:
    try:
        with safetensors.safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as reason:
        raise ValueError(f"{path.name} cannot be read: {reason}") from reason
    prefix = prefix_of(shapes)

    def read() -> dict[str, Tensor]:
        with safetensors.safe_open(path, "pt") as file:
            return {name.removeprefix(prefix): file.get_tensor(name) for name in shapes if name.startswith(prefix)}

    return WeightsFile(_own(shapes, prefix), read)


def _open_pickle(path: Path) -> WeightsFile:
    weights = dict(_tensors(_unpickled(path)))
    prefix = prefix_of(weights)
    own = _own(weights, prefix)
    return WeightsFile({name: tuple(tensor.shape) for name, tensor in own.items()}, lambda: own)


def _own(of_all: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in of_all.items() if name.startswith(prefix)}


def _unpickled(path: Path) -> Any:
    """Reads what `torch.save` wrote. Tensors stay in the file where the format allows that.

    The training script of the DiT authors also saves its command line, as a Namespace: that is allowed, as it has only names and values.
    """
    allowing = getattr(torch.serialization, "safe_globals", lambda _classes: nullcontext())  # torch 2.5 and newer
    try:
        with allowing([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as reason:
        if found := re.search(r"GLOBAL ([\w.]+)", str(reason)):
            text = f"{path.name} holds more than weights ({found[1]}) and could run a program, so it is refused; .safetensors files cannot"
            raise ValueError(text) from reason
        raise ValueError(f"{path.name} cannot be read: it is damaged, or no file of weights") from reason
    except (RuntimeError, OSError, EOFError, ValueError) as reason:
        raise ValueError(f"{path.name} cannot be read: it is damaged, or no file of weights") from reason


def _tensors(given: Any, before: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields all tensors of nested dicts with their dotted names: {"ema": {"pos_embed": …}} gives "ema.pos_embed"."""
    if not isinstance(given, Mapping):
        raise NotADiTError("it has no names")
    for key, value in given.items():
        if isinstance(value, Tensor):
            yield f"{before}{key}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{before}{key}.")
