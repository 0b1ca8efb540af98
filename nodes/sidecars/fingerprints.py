"""Takes the fingerprint of a loaded model and remembers it as long as the network lives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...cache_core.blocks import unwrapped
from ...cache_core.calibration.fingerprint import TENSORS, Fingerprint, structure_of
from .base_weights import BaseWeight, base_weights
from .older_names import Shape, namings


def fingerprint_of(model: ModelPatcher) -> Fingerprint:
    """Returns the fingerprint of the checkpoint's own weights, whatever LoRAs are on the model or on clones of it.

    Clones share one network and one table of the weights that LoRAs replaced, and the host fills that table whenever it changes a
    weight. A change without an entry there cannot be undone and counts as the checkpoint's own: weights that another node changed
    without the host, modules that it replaced while the model is loaded, and LoRAs of a patcher that is no clone and not loaded any more.

    Weights are taken as the layers use them. Scaled fp8 has its scale, and `Fingerprint.matches` allows for its rounding. GGUF and the
    host's integer formats are unpacked; a sidecar made with such a file fits this file only, not the one that it was quantised from.
    Formats that cannot be unpacked do not count.

    It is remembered per network and taken again when the base weights have changed.

    Raises:
        ValueError: If the model has no weights to take it of.
    """
    return all_fingerprints_of(model).fingerprint


def belongs(fingerprint: Fingerprint, model: ModelPatcher) -> bool:
    """Returns whether a sidecar's fingerprint, also of an older form, is of the model's checkpoint. Raises as `fingerprint_of` does."""
    return all_fingerprints_of(model).include(fingerprint)


def all_fingerprints_of(model: ModelPatcher) -> Fingerprints:
    """Returns the model's fingerprint and, on request, those that older sidecars have of it. Raises as `fingerprint_of` does."""
    with model.use_ejected():  # as the host does to get at names and weights
        weights = base_weights(model)
    network = unwrapped(model.model.diffusion_model)
    # bytes, as moving a model makes new tensors, and the host changes weights without a new version number
    state = b"".join(weight.some_bytes() for weight in list(weights.values())[:: max(1, len(weights) // TENSORS)])
    if network not in _known or _known[network][0] != state:
        _known[network] = state, _fingerprint(weights), {}
    _, fingerprint, older = _known[network]
    return Fingerprints(weights, fingerprint, older)


class Fingerprints(NamedTuple):
    """A model's weights and their fingerprints.

    Args:
        weights: Base weights by name.
        fingerprint: Their fingerprint.
        older: The fingerprints that older sidecars may hold of them, by structure. Filled in when asked for.
    """

    weights: Mapping[str, BaseWeight]
    fingerprint: Fingerprint
    older: dict[str, Fingerprint | None]

    def taken_as(self, structure: str) -> Fingerprint | None:
        """Returns the fingerprint to compare with a sidecar's of this `structure`. None where that is of other weights."""
        if structure == self.fingerprint.structure:
            return self.fingerprint
        if structure not in self.older:
            self.older[structure] = _older_fingerprint(self.weights, structure)
        return self.older[structure]

    def include(self, fingerprint: Fingerprint) -> bool:
        """Returns whether a sidecar's fingerprint is of these weights."""
        mine = self.taken_as(fingerprint.structure)
        return mine is not None and fingerprint.matches(mine)


# for every network: a few bytes of its weights, its fingerprint and the older ones
_known: WeakKeyDictionary[nn.Module, tuple[bytes, Fingerprint, dict[str, Fingerprint | None]]] = WeakKeyDictionary()


def _fingerprint(weights: Mapping[str, BaseWeight]) -> Fingerprint:
    return _taken({name: (name, shape) for name, shape in _shapes(weights).items()}, weights)


def _older_fingerprint(weights: Mapping[str, BaseWeight], structure: str) -> Fingerprint | None:
    """Returns the fingerprint as an older sidecar took it, with the names and shapes that give `structure`. None where none do."""
    for names in namings(_shapes(weights)):
        if structure_of({name: shape for name, (_, shape) in names.items()}) == structure:
            return _taken(names, weights, with_vectors=True)
    return None


def _shapes(weights: Mapping[str, BaseWeight]) -> dict[str, Shape]:
    return {name: tuple(weight.tensor.shape) for name, weight in weights.items()}


def _taken(names: Mapping[str, tuple[str | None, Shape]], weights: Mapping[str, BaseWeight], with_vectors: bool = False) -> Fingerprint:
    """Takes the fingerprint of weights under other names.

    Only weights that are sampled are made dense: of a large packed model that takes seconds instead of minutes.

    Args:
        names: For every other name, the name in `weights` (None if it is not there) and the shape.
        weights: Base weights by name.
        with_vectors: Whether vectors count, as in older sidecars.
    """
    order = list(names)
    marks = {name: torch.tensor(float(i), device="cpu").expand(shape) for i, (name, (_, shape)) in enumerate(names.items())}
    sampled = [order[int(mark)] for mark in Fingerprint.of(marks.items(), with_vectors).values[:, 0]]
    dense = {name: weights[now].dense for name in sampled if (now := names[name][0]) is not None}
    taken = Fingerprint.of(((name, dense[name]() if name in dense else mark) for name, mark in marks.items()), with_vectors)
    taken.values[[name not in dense for name in sampled]] = torch.nan
    coarsest = max(
        (weight.dtype for weight in weights.values() if with_vectors or len(weight.tensor.shape) > 1),
        key=lambda dtype: torch.finfo(dtype).eps,
    )
    return replace(taken, dtype=str(coarsest).removeprefix("torch."))
