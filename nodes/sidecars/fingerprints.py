"""Takes the fingerprint of a loaded model, and keeps it for as long as the network lives."""

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
    """Of the checkpoint's own weights, whether a LoRA is on the model or any clone of it, applied or not.

    Clones share one network and one table of the weights that LoRAs replaced, and the host fills that table whenever it changes a
    weight. What leaves no original there cannot be undone and counts as the checkpoint's own: weights that another node changed by
    itself, modules that it replaced while the model is loaded, and LoRAs of a patcher that is no clone, once it is no more loaded.

    Weights are taken as the layers use them: scaled fp8 with its scale (and fp8's rounding allowed for), GGUF and the host's kinds
    of integers unpacked, which match the same file and not the one it was made from. What nothing here unpacks does not count.

    Kept per network, and taken anew when its base weights are others. Raises ValueError when there are no weights to take it of.
    """
    return all_fingerprints_of(model).fingerprint


def belongs(fingerprint: Fingerprint, model: ModelPatcher) -> bool:
    """Whether a sidecar's fingerprint is of the model's checkpoint, also one taken in the older way. Raises as `fingerprint_of` does."""
    return all_fingerprints_of(model).include(fingerprint)


def all_fingerprints_of(model: ModelPatcher) -> Fingerprints:
    """The model's fingerprint, and on request those that older sidecars have of it. Raises as `fingerprint_of` does."""
    with model.use_ejected():  # as the host does to get at names and weights
        weights = base_weights(model)
    network = unwrapped(model.model.diffusion_model)
    # bytes and not identities or versions: moving a model makes new tensors, and the host writes past the versions
    state = b"".join(weight.some_bytes() for weight in list(weights.values())[:: max(1, len(weights) // TENSORS)])
    if network not in _known or _known[network][0] != state:
        _known[network] = state, _fingerprint(weights), {}
    _, fingerprint, older = _known[network]
    return Fingerprints(weights, fingerprint, older)


class Fingerprints(NamedTuple):
    """A model's weights and their fingerprint. older: the fingerprints that older sidecars may hold of them, by structure."""

    weights: Mapping[str, BaseWeight]
    fingerprint: Fingerprint
    older: dict[str, Fingerprint | None]

    def taken_as(self, structure: str) -> Fingerprint | None:
        """The one to compare with a sidecar's fingerprint of this `structure`; None where that is of other weights."""
        if structure == self.fingerprint.structure:
            return self.fingerprint
        if structure not in self.older:
            self.older[structure] = _older_fingerprint(self.weights, structure)
        return self.older[structure]

    def include(self, fingerprint: Fingerprint) -> bool:
        """Whether a sidecar's fingerprint is of these weights."""
        mine = self.taken_as(fingerprint.structure)
        return mine is not None and fingerprint.matches(mine)


# of every network that was looked at: a few of its bytes, its fingerprint and the older ones
_known: WeakKeyDictionary[nn.Module, tuple[bytes, Fingerprint, dict[str, Fingerprint | None]]] = WeakKeyDictionary()


def _fingerprint(weights: Mapping[str, BaseWeight]) -> Fingerprint:
    return _taken({name: (name, shape) for name, shape in _shapes(weights).items()}, weights)


def _older_fingerprint(weights: Mapping[str, BaseWeight], structure: str) -> Fingerprint | None:
    """As an older sidecar took it, on the host whose names and shapes give `structure`; None where none do."""
    for names in namings(_shapes(weights)):
        if structure_of({name: shape for name, (_, shape) in names.items()}) == structure:
            return _taken(names, weights, with_vectors=True)
    return None


def _shapes(weights: Mapping[str, BaseWeight]) -> dict[str, Shape]:
    return {name: tuple(weight.tensor.shape) for name, weight in weights.items()}


def _taken(names: Mapping[str, tuple[str | None, Shape]], weights: Mapping[str, BaseWeight], with_vectors: bool = False) -> Fingerprint:
    """The fingerprint under other names. names: to each its name in `weights` (None: it is not there) and its shape.

    Makes only those weights dense that are sampled: of a large packed model that is seconds instead of minutes.
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
