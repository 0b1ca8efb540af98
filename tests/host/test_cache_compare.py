"""Cache Compare shows right numbers and pictures."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import folder_paths
import matplotlib
import numpy as np
import pytest
import torch
from comfyui_duca.nodes import DucaExtension
from comfyui_duca.nodes.cache_compare import CacheCompare
from comfyui_duca.nodes.demo_flux import load_demo_model
from helpers.pictures import cells, distance, enlarged, found, noise
from helpers.sampling import cached, last_report, sample
from PIL import Image, ImageDraw

SMALL = {"steps": 8, "size": (16, 16)}


@pytest.fixture(autouse=True)
def as_the_host_works(tmp_path, monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model():
    return load_demo_model()


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """Returns a list that collects every text that is drawn."""
    texts, text = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, words, *a, **k: texts.append(words) or text(self, xy, words, *a, **k))
    return texts


def flat(*values: float) -> torch.Tensor:
    """Returns pictures of one grey each."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 16, 16, 3).clone()


def saved(ui: dict) -> list[np.ndarray]:
    """Returns the previews under a node, read from disk."""
    return [np.asarray(Image.open(Path(folder_paths.temp_directory) / one["subfolder"] / one["filename"])) for one in ui["images"]]


# -- Cache Compare: numbers ----------------------------------------------------------------------------


def test_each_picture_is_measured_against_the_reference():
    reference, others = noise(1), (noise(1) + torch.tensor([0.1, 0.2])[:, None, None, None] * noise(2, seed=1)).clamp(0, 1)
    rows = cells(CacheCompare.execute(reference, others, "auto 2x\n\n auto | 3x ").result[2])
    assert rows == [
        ["reference", "-", "-", "-", "-"],
        ["auto 2x", *distance(reference[0], others[0]), "-", "-"],
        ["auto \\| 3x", *distance(reference[0], others[1]), "-", "-"],
    ]
    assert rows[1][1] != rows[2][1]


def test_known_distances():
    rows = cells(CacheCompare.execute(flat(0.5), flat(0.5, 0.6, 0.51)).result[2])
    assert [row[:2] for row in rows[1:]] == [["cached 1", "identical"], ["cached 2", "20.0"], ["cached 3", "40.0"]]
    assert rows[1][2] == "1.000"


def test_a_batch_is_compared_picture_by_picture():
    """Settings come one after the other, each with all its pictures in the reference's order."""
    reference = noise(2)
    others = torch.cat([reference, reference + torch.tensor([0.0, 0.1])[:, None, None, None]])
    rows = cells(CacheCompare.execute(reference, others, "same\nhalf").result[2])
    within = others.clamp(0, 1)
    error = (within[2:] - reference).square().mean().double()  # of all pixels of both
    assert rows[1][1] == "identical" and rows[2][1] == f"{float(-10 * error.log10()):.1f}"
    swapped = cells(CacheCompare.execute(reference, reference.flip(0)).result[2])
    assert swapped[1][0] == "cached" and float(swapped[1][1]) < 10


@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_of_other_channels(channels):
    """Grey pictures are compared, and an alpha channel does not count."""
    pictures = noise(2)[..., :1].expand(-1, -1, -1, channels).clone()
    pictures[:, :, :, 3:] = noise(2, seed=5)[..., :1]
    plain = pictures[..., :1].expand(-1, -1, -1, 3)
    assert CacheCompare.execute(pictures[:1], pictures[1:]).result[2] == CacheCompare.execute(plain[:1], plain[1:]).result[2]


def test_pictures_beyond_what_can_be_shown_count_as_shown():
    broken, shown = noise(1), noise(1)
    broken[0, 0], broken[0, 1], broken[0, 2] = 7.0, -7.0, float("nan")
    shown[0, 0], shown[0, 1:3] = 1, 0
    grid, difference, table = CacheCompare.execute(noise(1), broken).result
    expected = CacheCompare.execute(noise(1), shown).result
    assert table == expected[2] and torch.equal(grid, expected[0]) and torch.equal(difference, expected[1])


def test_time_and_compute_come_from_the_models_last_run(model):
    patched = cached(model, speedup=3.0)
    sample(patched, **SMALL)
    report = last_report(patched)
    rows = cells(CacheCompare.execute(noise(1), noise(1, seed=1), "", patched).result[2])
    assert rows[0][3:] == ["1.00x", "1.00x"]
    assert rows[1][3:] == [f"{report.time_speedup:.2f}x", f"{report.compute_speedup:.2f}x"] and report.compute_speedup > 2
    for pictures, other in ((noise(2, seed=1), patched), (noise(1, seed=1), model), (noise(1, seed=1), cached(model))):
        rows = cells(CacheCompare.execute(noise(1), pictures, "", other).result[2])
        assert all(row[3:] == ["-", "-"] for row in rows), "whose run it was is unknown, or there was none"


@pytest.mark.parametrize(
    ("reference", "pictures", "labels", "words"),
    [
        (noise(1, 16, 20), noise(1, 20, 16), "", "reference is 20x16, cached is 16x20"),
        (noise(2), noise(3), "", "reference has 2 pictures and cached 3"),
        (noise(2), noise(1), "", "reference has 2 pictures and cached 1"),
        (noise(1), noise(2), "one", "1 labels for 2 settings"),
        (noise(2), noise(4), "1\n2\n3\n4", "4 labels for 2 settings"),
    ],
)
def test_what_does_not_fit_is_told_with_both_numbers(reference, pictures, labels, words):
    with pytest.raises(ValueError, match=words):
        CacheCompare.execute(reference, pictures, labels)


# -- Cache Compare: pictures ---------------------------------------------------------------------------


def test_small_pictures_are_enlarged_by_a_whole_factor(written):
    pictures = noise(6, 48, 48)
    grid = CacheCompare.execute(pictures[:1], pictures[1:], "\n".join("abcde")).result[0]
    assert grid.shape[0] == 1 and grid.shape[3] == 3
    assert all(found(grid, enlarged(picture, 5)) for picture in pictures)
    assert written[0] == "reference" and [text for text in written if text in "abcde"][:5] == list("abcde")
    assert sum("PSNR" in text and "SSIM" in text for text in written) == 5


def test_large_pictures_stay_as_they_are():
    pictures = noise(2, 250, 320)
    grid = CacheCompare.execute(pictures[:1], pictures[1:]).result[0]
    assert all(found(grid, picture) for picture in pictures)


def test_a_sheet_of_many_large_pictures_stays_bounded():
    pictures = torch.zeros(5, 8, 2400, 3)
    grid = CacheCompare.execute(pictures[:1], pictures[1:]).result[0]
    assert 5 * 1200 < grid.shape[2] < 9000


def test_a_batch_stands_together():
    pictures = noise(4, 40, 40)
    grid = CacheCompare.execute(pictures[:2], pictures[2:]).result[0]
    assert all(found(grid, enlarged(picture, 3)) for picture in pictures)


def test_labels_that_are_too_long_are_cut(written):
    CacheCompare.execute(noise(1), noise(1, seed=1), "x" * 200)
    cut = [text for text in written if text.startswith("xx")]
    assert cut and all(text.endswith("…") and 10 < len(text) < 60 for text in cut)


def colour(value: float) -> torch.Tensor:
    """Returns a colour of the map at 0..1, by matplotlib."""
    return torch.tensor(matplotlib.colormaps["inferno"](value)[:3])


def test_differences_are_in_one_scale_that_is_written_below(written):
    """Greys differ by 0, 0.02 and 0.1. With a scale up to 0.1 they are at its start, at a fifth of it and at its end."""
    difference = CacheCompare.execute(flat(0.5), flat(0.5, 0.52, 0.6)).result[1]
    factor = 15  # the smallest factor that makes 16 pixels wider than 230
    for value in (0.0, 0.2, 1.0):
        assert found(difference, enlarged(colour(value).expand(16, 16, 3), factor)), value
    assert {"0", "0.05", "≥ 0.1"} <= set(written) and "mean 0.0200" in written


def test_a_few_far_pixels_do_not_darken_the_map(written):
    reference, other = flat(0.2), flat(0.21)
    reference[0, 0, 0], other[0, 0, 0] = 0, 1
    CacheCompare.execute(reference, other)
    assert "≥ 0.02" in written or "≥ 0.01" in written


def test_equal_pictures_have_a_map_too(written):
    difference = CacheCompare.execute(noise(1), noise(1)).result[1]
    assert found(difference, enlarged(colour(0.0).expand(16, 16, 3), 15)) and "≥ 0.005" in written


def test_the_scale_rises_in_lightness():
    """So it reads the same for colour-blind eyes and in grey."""
    difference = CacheCompare.execute(flat(0.5), flat(0.6)).result[1][0]
    lightness = difference @ torch.tensor([0.2126, 0.7152, 0.0722])
    rising = [line for line in lightness if (line[20:200].diff() >= -1e-3).all() and line[20] < 0.1 and line[200] > 0.5]
    assert len(rising) >= 10, "the bar is some pixels high"


def test_grid_and_map_are_shown_under_the_node():
    given = CacheCompare.execute(noise(1), noise(1, seed=1))
    for shown, image in zip(saved(given.ui), given.result[:2], strict=True):
        assert np.array_equal(shown, (image[0] * 255).round().to(torch.uint8).numpy())
    assert given.ui["text"] == (given.result[2],)


def test_saved_workflows_depend_on_this_order():
    assert CacheCompare in asyncio.run(DucaExtension().get_node_list())
    info = CacheCompare.GET_NODE_INFO_V1()
    assert list(info["input"]["required"]) == ["reference", "cached"] and list(info["input"]["optional"]) == ["labels", "model"]
    assert info["output_name"] == ["grid", "difference", "table"] and info["output_node"]
    assert info["description"] and all(info["output_tooltips"])
    assert all(spec[1].get("tooltip") for spec in {**info["input"]["required"], **info["input"]["optional"]}.values())
