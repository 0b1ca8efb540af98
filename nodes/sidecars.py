"""Where calibration sidecars are on the host, and which of them belongs to a loaded model.

A sidecar lies in models/duca_calibration, or beside its checkpoint as <any name>.duca.safetensors. It belongs to every load of
the checkpoint it was made on, whatever the dtype, the host and whatever LoRA is on it, so what is compared is the base weights.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import comfy.model_management
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..cache_core import find_family
from ..cache_core.calibration.fingerprint import TENSORS, VALUES, Fingerprint, structure_of
from ..cache_core.calibration.sidecar import About, Contents, Sidecar, SidecarError, peek, write
from .older_names import Shape, namings

FOLDER = "duca_calibration"
ENDING = ".duca.safetensors"
_SUFFIX = ".safetensors"
_BESIDE = ("diffusion_models", "checkpoints")  # where checkpoints are; "unet" is the host's older name of the first
_WEIGHTS = re.compile(r"\.(safetensors|sft|gguf|ckpt|pt|pth|bin)$", re.IGNORECASE)
_COMPILED = "_orig_mod."  # torch.compile's addition to names; it may have come before or after a LoRA was put on
_LONGEST = 120  # bytes of a name: with what is added, the writer's temporary file too, it stays below the 255 of most disks

Refused = Callable[[Path, str], None]  # is told of a file that cannot be used, and why and what to do


class Found(NamedTuple):
    path: Path
    about: About


def register() -> None:
    """Makes the folder known to the host, after those the user configured; creates nothing. May be called again."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    # extra_model_paths.yaml leaves no extensions, which to the host means every file
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {*extensions, _SUFFIX})


register()


def names() -> list[str]:
    """The files in the folders for sidecars, as a combo shows them. Not looked into, so not all need be sidecars."""
    return [name for name in _listed(FOLDER) if name.lower().endswith(_SUFFIX)]


def path_of(name: str) -> Path:
    """The file of one of `names`. Raises FileNotFoundError when it is gone; no name leads out of the folders."""
    return Path(folder_paths.get_full_path_or_raise(FOLDER, name))


def default_path(model_name: str, fingerprint: Fingerprint) -> Path:
    """Where the sidecar of a model goes: in the first folder, named after the model and its weights.

    Of `model_name` only the last part counts, without a checkpoint's ending. Everything but letters, digits, - and _ is
    replaced, dots too: so the name stays in the folder, and none is one that Windows reserves ("nul.x").
    """
    name = _WEIGHTS.sub("", re.split(r"[/\\]", model_name)[-1])
    safe = re.sub(r"[^\w-]+", "_", name).strip("_-").encode()[:_LONGEST].decode(errors="ignore")
    return Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{safe or 'model'}-{fingerprint.short}{ENDING}"


def state() -> tuple:
    """Changes when a file in the folders for sidecars comes, goes or is written anew."""
    found = []
    for path in _candidates():
        with suppress(OSError):
            stat = path.stat()
            found.append((str(path), stat.st_mtime_ns, stat.st_size))
    return tuple(sorted(found))


def make_folder() -> None:
    """Makes the folder that `save` writes to. Raises SidecarError where it cannot be made or written to: better before minutes of work."""
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SidecarError(folder, f"the folder cannot be made: {error.strerror or error}", "allow it, or configure another") from error
    if not os.access(folder, os.W_OK):
        raise SidecarError(folder, "the folder cannot be written to", "allow writing to it, or configure another")


def save(sidecar: Sidecar) -> Path:
    """Writes to the model's `default_path`, replacing what is there, and returns it. Raises SidecarError when it cannot."""
    make_folder()
    path = default_path(sidecar.about.model_name, sidecar.fingerprint)
    write(path, sidecar)
    return path


def find(model: ModelPatcher, refused: Refused = lambda path, reason: None) -> Found | None:
    """The most recently created sidecar of the model's checkpoint, or None; of two equally old the later written, then by path.

    `refused` is told of every file that should be a sidecar and cannot be read, at each call; none of them ends the search.
    Without a sidecar of the model's family the weights are not looked at, so this costs next to nothing.
    Raises ValueError as `fingerprint_of` does.
    """
    family = find_family(model.model.diffusion_model)
    seen = [(path, mtime, said) for path, mtime, said in _known.files(_candidates(), refused) if said.about.family == family.name]
    if not seen:
        return None
    looked = _look(model)
    for path, _, said in sorted(seen, key=lambda at: (at[2].about.created, at[1], str(at[0])), reverse=True):
        if _is_of(said.fingerprint, looked):
            return Found(path, said.about)
    return None


def fingerprint_of(model: ModelPatcher) -> Fingerprint:
    """Of the checkpoint's own weights, whether a LoRA is on the model or any clone of it, applied or not.

    Clones share one network and one table of the weights that LoRAs replaced, and the host fills that table whenever it changes a
    weight. What leaves no original there cannot be undone and counts as the checkpoint's own: weights that another node changed by
    itself, modules that it replaced while the model is loaded, and LoRAs of a patcher that is no clone, once it is no more loaded.

    Weights are taken as the layers use them: scaled fp8 with its scale (and fp8's rounding allowed for), GGUF and the host's kinds
    of integers unpacked, which match the same file and not the one it was made from. What nothing here unpacks does not count.

    Kept per network, and taken anew when its base weights are others. Raises ValueError when there are no weights to take it of.
    """
    return _look(model).fingerprint


def belongs(fingerprint: Fingerprint, model: ModelPatcher) -> bool:
    """Whether a sidecar's fingerprint is of the model's checkpoint, also one taken in the older way. Raises as `fingerprint_of` does."""
    return _is_of(fingerprint, _look(model))


def _is_of(fingerprint: Fingerprint, looked: _Looked) -> bool:
    mine = looked.taken_as(fingerprint.structure)
    return mine is not None and fingerprint.matches(mine)


def _look(model: ModelPatcher) -> _Looked:
    network = model.model.diffusion_model
    with model.use_ejected():  # as the host does to get at names and weights
        weights = _base_weights(model)
    return _known.look(getattr(network, "_orig_mod", network), weights)


@dataclass(frozen=True, eq=False)
class _Weight:
    """A base weight, and the module it belongs to as `attribute`."""

    module: Any
    attribute: str
    tensor: Tensor

    @property
    def is_gguf(self) -> bool:
        """Whether it is ComfyUI-GGUF's: often packed bytes, which say they have the dense weight's shape."""
        return hasattr(self.tensor, "tensor_shape") and hasattr(self.module, "get_weight")

    @property
    def dtype(self) -> torch.dtype:
        """The one it is kept in, which tells how far it was rounded; of packed integers, that in which they are unpacked."""
        for tensor in (self._kept(), self.tensor):  # a quantised weight calls itself by the dtype it is computed in
            if tensor.is_floating_point():
                return tensor.dtype
        return torch.float32

    def dense(self) -> Tensor:
        if not self.is_gguf:
            convert = getattr(self.module, f"convert_{self.attribute}", None)  # the host's, for scaled and quantised weights
            return self.tensor if convert is None else convert(self.tensor)
        packed: Any = self.tensor
        patches, packed.patches = getattr(packed, "patches", []), []  # LoRAs, which it would add to what it unpacks
        try:
            return self.module.get_weight(packed, torch.float32)
        finally:
            packed.patches = patches

    def _kept(self) -> Tensor:
        kept = self.tensor.detach()
        while hasattr(kept, "__tensor_flatten__"):  # a wrapper around other tensors has no memory of its own
            kept = getattr(kept, kept.__tensor_flatten__()[0][0])
        return kept.as_subclass(Tensor)

    def some_bytes(self) -> bytes:
        """A few from the middle, as they lie in memory."""
        flat = self._kept().reshape(-1)
        return flat[flat.numel() // 2 :][:16].view(torch.uint8).cpu().numpy().tobytes()


def _base_weights(model: ModelPatcher) -> dict[str, _Weight]:
    """All that count for a fingerprint, by the model's own names."""
    # clones share their backups; a patcher of its own on the same network has others, and is found here while it is loaded
    patchers = [*(m.model for m in comfy.model_management.current_loaded_models if model.is_clone(m.model)), model]
    originals: dict[str, Tensor] = {}
    # a LoRA by hook comes on top of what was loaded, so what it replaced is the base only where nothing else was replaced
    for table in (*(p.hook_backup for p in patchers), *(p.backup for p in patchers)):
        originals.update((key.replace(_COMPILED, ""), kept[0]) for key, kept in table.items())
    weights = {}
    for place, module in model.model.diffusion_model.named_modules(remove_duplicate=False):
        for attribute, current in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{place}.{attribute}".removeprefix(".").replace(_COMPILED, "")
            weight = _Weight(module, attribute, originals.get(f"diffusion_model.{name}", current))
            if (weight.is_gguf or weight.tensor.is_floating_point()) and math.prod(weight.tensor.shape) >= VALUES:
                weights[name] = weight
    return dict(sorted(weights.items()))


def _fingerprint(weights: Mapping[str, _Weight]) -> Fingerprint:
    return _taken({name: (name, shape) for name, shape in _shapes(weights).items()}, weights)


def _older_fingerprint(weights: Mapping[str, _Weight], structure: str) -> Fingerprint | None:
    """As an older sidecar took it, on the host whose names and shapes give `structure`; None where none do."""
    for names in namings(_shapes(weights)):
        if structure_of({name: shape for name, (_, shape) in names.items()}) == structure:
            return _taken(names, weights, with_vectors=True)
    return None


def _shapes(weights: Mapping[str, _Weight]) -> dict[str, Shape]:
    return {name: tuple(weight.tensor.shape) for name, weight in weights.items()}


def _taken(names: Mapping[str, tuple[str | None, Shape]], weights: Mapping[str, _Weight], with_vectors: bool = False) -> Fingerprint:
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


class _Looked(NamedTuple):
    """A model's weights, their fingerprint, and those that older sidecars may hold of them, by structure."""

    weights: Mapping[str, _Weight]
    fingerprint: Fingerprint
    older: dict[str, Fingerprint | None]

    def taken_as(self, structure: str) -> Fingerprint | None:
        """As the sidecar took it whose fingerprint has this `structure`; None where that is of other weights."""
        if structure == self.fingerprint.structure:
            return self.fingerprint
        if structure not in self.older:
            self.older[structure] = _older_fingerprint(self.weights, structure)
        return self.older[structure]


class _Known:
    """What was read before: a network's fingerprints and what a file says of itself. Keeps no network alive."""

    def __init__(self) -> None:
        self._fingerprints: WeakKeyDictionary[nn.Module, tuple[bytes, Fingerprint, dict]] = WeakKeyDictionary()
        self._files: dict[tuple[Path, int, int], Contents] = {}

    def look(self, network: nn.Module, weights: Mapping[str, _Weight]) -> _Looked:
        # bytes and not identities or versions: moving a model makes new tensors, and the host writes past the versions
        state = b"".join(weight.some_bytes() for weight in list(weights.values())[:: max(1, len(weights) // TENSORS)])
        known = self._fingerprints.get(network)
        if known is None or known[0] != state:
            known = self._fingerprints[network] = state, _fingerprint(weights), {}
        return _Looked(weights, *known[1:])

    def files(self, paths: Iterable[Path], refused: Refused) -> list[tuple[Path, int, Contents]]:
        """Path, time of change and contents of all that can be read. Keeps no others: a right that was missing leaves no trace."""
        before, self._files = self._files, {}
        for path in paths:
            try:
                stat = path.stat()
                key = (path, stat.st_mtime_ns, stat.st_size)
                self._files[key] = before[key] if key in before else peek(path)
            except SidecarError as error:
                refused(path, f"{error.reason}; {error.remedy}")
            except OSError:  # it was there when the folder was listed
                continue
        return [(path, mtime, said) for (path, mtime, _), said in self._files.items()]


_known = _Known()


def _candidates() -> list[Path]:
    """Every file that should be a sidecar, once."""
    named = [(FOLDER, name) for name in names()]
    named += [(folder, name) for folder in _BESIDE for name in _listed(folder) if name.lower().endswith(ENDING)]
    paths = (folder_paths.get_full_path(folder, name) for folder, name in named)
    return list(dict.fromkeys(Path(path) for path in paths if path is not None))


def _listed(folder: str) -> list[str]:
    """Names of the files in a folder of the host and below. Never raises: a combo that does takes all nodes off the page."""
    if folder != FOLDER:  # these can be large, and the host keeps their lists until a folder changes
        with suppress(OSError):  # which it raises once a folder it has seen is gone
            return folder_paths.get_filename_list(folder)
    with suppress(OSError):
        return folder_paths.get_filename_list_(folder)[0]
    return []
