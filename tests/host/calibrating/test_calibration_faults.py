"""Damaged files, disks that refuse and bad input, for the calibration nodes and DuCa Cache."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comfyui_duca.cache_core.calibration.sidecar import SidecarError, peek
from comfyui_duca.nodes.demo_flux import encode_prompt
from comfyui_duca.nodes.sidecars import calibrations, fingerprints
from helpers.calibrator_calls import PROMPTS, SMALL, cache, calibrator, setting, without_finding
from helpers.other_networks import unet
from helpers.sampling import last_report, sample
from safetensors import safe_open
from safetensors.torch import load_file, save_file

# -- faults --------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(section: str) -> Callable[[Path], None]:
    """One bit within a tensor of that section, which only reading it tells."""

    def flip(path: Path) -> None:
        with safe_open(path, "pt") as file:
            name = next(key for key in sorted(file.keys()) if key.startswith(section))
            needle = bytes(file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes())[:64]
        content = bytearray(path.read_bytes())
        content[content.rindex(needle) + 5] ^= 1
        path.write_bytes(content)

    return flip


def newer(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata | {"duca_format": "2"})


def flipped_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"euler")] ^= 1
    path.write_bytes(content)


FAULTS = {
    "truncated": (truncated, "damaged"),
    "a bit of the header": (flipped_header, "damaged"),
    "a bit of the fingerprint": (flipped("fingerprint"), "damaged"),
    "a bit of the forecast": (flipped("forecast"), "forecast.basis is damaged"),
    "newer": (newer, "update the pack"),
}


@pytest.mark.parametrize(("spoil", "words"), FAULTS.values(), ids=FAULTS)
def test_a_file_that_cannot_be_used_is_told_once_and_ends_nothing(kept, model, said, spoil, words):
    spoil(kept)
    cached = cache(model)
    latents = [sample(cached, **SMALL) for _ in range(2)]
    assert last_report(cached).setting == "auto 2x"
    assert torch.equal(latents[0], without_finding(model)) and torch.equal(*latents)
    assert len(said) == 1 and words in said[0] and "made.safetensors cannot be used" in said[0] and said[0].endswith(".")
    assert str(kept.parent) not in said[0], "the name is enough"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "Permission denied")])
def test_a_file_that_cannot_be_read_is_told_once_and_ends_nothing(kept, model, said, monkeypatch, error):
    real = Path.open

    def failing(path: Path, *args, **kwargs):
        if path.name == kept.name:
            raise error
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", failing)
    cached = cache(model)
    latents = [sample(cached, **SMALL) for _ in range(2)]
    assert torch.equal(latents[0], without_finding(model)) and torch.equal(*latents)
    assert len(said) == 1 and error.strerror in said[0]


def test_a_model_without_weights_to_know_it_by(kept, model, said, monkeypatch):
    """Packed by something unknown, for example."""
    monkeypatch.setattr(fingerprints, "base_weights", lambda model: {})
    assert setting(model) == "auto 2x"
    assert len(said) == 1 and "no weights" in said[0]


def test_mode_icc_says_why_when_its_file_is_damaged(kept, model, said):
    flipped("icc")(kept)
    assert setting(model).startswith("auto 2x, calibrated") and not said
    with pytest.raises(ValueError, match="needs low-rank factors"):
        setting(model, mode="icc")
    assert len(said) == 1 and "damaged" in said[0]


@pytest.mark.parametrize(("spoil", "words"), FAULTS.values(), ids=FAULTS)
def test_a_damaged_file_does_not_keep_from_calibrating(kept, model, said, at_once, spoil, words):
    spoil(kept)
    os.utime(kept, (1e9, 1e9))
    given = calibrator(model, what="ICC")
    assert given.result[1].split()[0] == "calibrated" and len(said) == 1 and words in said[0]
    assert calibrations.calibration_of(model, "icc", lambda text: None)[0] != kept and at_once


@pytest.mark.parametrize(
    ("where", "error", "words"),
    [
        ("os.fsync", OSError(errno.ENOSPC, "No space left on device"), "make room"),
        ("pathlib.Path.replace", PermissionError(errno.EACCES, "Permission denied"), "allow writing"),
    ],
)
def test_saving_that_fails_tells_why_and_keeps_the_old_file(folder, model, monkeypatch, at_once, where, error, words):
    calibrator(model)
    (path,) = folder.iterdir()
    before = path.read_bytes()

    def failing(*_args, **_kwargs):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(where, failing)
        with pytest.raises(SidecarError, match=f"not written: {error.strerror}.*{words}"):
            calibrator(model, recalibrate=True)
    assert path.read_bytes() == before and list(folder.iterdir()) == [path]


def test_a_folder_that_cannot_be_made(folder, model, at_once):
    folder.write_text("a file where the folder should be")
    with pytest.raises(SidecarError, match=r"calibrations: the folder cannot be made.*configure another"):
        calibrator(model)
    assert folder.is_file() and not at_once, "told before the work"


def test_a_folder_that_cannot_be_written_to(kept, model, monkeypatch, at_once):
    """Asked for by mode, as whoever runs the tests may be allowed everything."""
    access, before = os.access, kept.read_bytes()
    monkeypatch.setattr(os, "access", lambda path, *mode: Path(path) != kept.parent and access(path, *mode))
    with pytest.raises(SidecarError, match=r"calibrations: the folder cannot be written to.*configure another"):
        calibrator(model, recalibrate=True)
    assert not at_once and list(kept.parent.iterdir()) == [kept] and kept.read_bytes() == before
    assert calibrator(model).result[1].split()[0] == "calibration", "what is there is used still"


# -- bad input -----------------------------------------------------------------------------------------


def nothing_in(folder: Path) -> bool:
    """The folder itself is made before calibrating."""
    return not folder.exists() or not list(folder.iterdir())


def test_a_model_that_cannot_be_calibrated(folder):
    with pytest.raises(ValueError, match="UNetModel is a UNet"):
        calibrator(unet())
    assert nothing_in(folder)


@pytest.mark.parametrize(
    ("prompts", "negatives", "paired"),
    [(3, 1, [0, 0, 0]), (3, 2, [0, 1, 1]), (2, 2, [0, 1]), (1, 3, [0])],
)
def test_negatives_as_the_host_pairs_lists(folder, model, at_once, prompts, negatives, paired):
    """The last one is repeated, and what is too many is left."""
    texts = [f"negative {i}" for i in range(negatives)]
    calibrator(model, prompts=["p"] * prompts, negatives=texts)
    sampling, _ = at_once[0]
    assert len(sampling.positives) == prompts
    assert all(torch.equal(a[0][0], encode_prompt(texts[i])[0][0]) for a, i in zip(sampling.negatives, paired, strict=True))


def test_latents_of_other_channels(folder, model, few_layers):
    """An empty one is given the model's, as the host does; a picture of another model's is none of this one's."""
    calibration = calibrator(model, what="ICC", icc_method="svd", steps=4, prompts=PROMPTS[:1], latent=torch.zeros(2, 4, 16, 16)).result[0]
    assert calibration.about.token_grid == (16, 16)
    before = list(folder.iterdir())
    with pytest.raises((RuntimeError, ValueError)):
        calibrator(model, latent=torch.ones(1, 4, 16, 16), recalibrate=True)
    assert list(folder.iterdir()) == before


@pytest.mark.parametrize("what", ["forecast", "both"])
def test_steps_of_which_none_can_be_skipped(folder, model, what):
    """By link, past the widget's limit."""
    with pytest.raises(ValueError, match=r"too few to skip any: calibrate with more|two evaluations of one run"):
        calibrator(model, steps=1, what=what)
    assert nothing_in(folder)


@pytest.mark.parametrize("wrong", [{"what": "all"}, {"icc_method": "pca"}])
def test_choices_that_there_are_not(folder, model, evaluations, wrong):
    """The host does not check them."""
    with pytest.raises(ValueError, match="unknown"):
        calibrator(model, **wrong)
    assert not evaluations and not folder.exists()


@pytest.mark.parametrize("name", ["../../outside", "C:\\con", "/etc/passwd", "a/b/c.safetensors", "\0", "x" * 400, "日本"])
def test_names_stay_in_the_folder(folder, model, at_once, name):
    calibrator(model, name=name)
    (path,) = folder.iterdir()
    assert path.parent == folder and peek(path).about.model_name == name
    assert calibrator(model).result[1].split()[0] == "calibration" and len(at_once) == 1


def test_a_sampler_that_goes_back(folder, model):
    with pytest.raises(ValueError, match="goes back to higher noise levels"):
        calibrator(model, sampler_name="heunpp2", prompts=PROMPTS[:1])
    assert nothing_in(folder)
