"""Tokens of reference pictures after the image's are in effect, but none of them is kept, as no answer needs them."""

from __future__ import annotations

import pytest
import torch
from checks import repeated
from helpers.predictors import Innovating
from making import Case
from runs import PLAN, cached, kinds, known_of, report_of, sample
from zoo import CASES
from zoo_image import normal


def edited(name: str, *reference: int) -> Case:
    case = next(case for case in CASES if case.name == name)
    return case._replace(
        cond=lambda seed: [[text, {**extra, "reference_latents": [normal(seed + 20, 1, *reference)]}] for text, extra in case.cond(seed)]
    )


# the number of image tokens: 6 x 6 of the demo, 6 x 8 of Qwen-Image
EDITS = ((edited("flux", 3, 16, 20), 36), (edited("qwen_image", 16, 1, 8, 12), 48))


@pytest.fixture(scope="module", params=EDITS, ids=lambda edit: edit[0].name)
def edit(request) -> tuple[Case, int]:
    return request.param


@pytest.fixture(scope="module")
def model(edit):
    return edit[0].make()


def test_references_are_seen_and_not_kept(edit, model):
    case, tokens = edit
    patched = cached(model, PLAN)
    result = sample(case, patched)
    report = report_of(patched)
    assert kinds(patched) == PLAN and not report.notices
    (kept,) = known_of(case, model).place.kept
    assert kept.tokens is not None and kept.tokens.stop - kept.tokens.start == tokens < kept.shape[1]
    assert report.peak_bytes == report.predicted_bytes == 2 * tokens * kept.shape[-1] * 4
    assert torch.equal(result, repeated(case, model, PLAN))
    plain = next(plain for plain in CASES if plain.name == case.name)
    assert not torch.allclose(result, sample(plain, cached(model, PLAN)), atol=1e-3), "a reference that says nothing tests nothing"


def test_the_input_of_what_is_kept_is_the_images(edit, model):
    """Calibrated forecasts keep the input of the image's tokens alone, which come first."""
    case, tokens = edit
    width = known_of(case, model).place.kept[0].shape[-1]
    first = cached(model, "FF", Innovating(torch.zeros(0)))
    sample(case, first, 2)
    channels = report_of(first).shape.input_channels
    if not channels:
        pytest.skip(f"no file says where the input of {case.name} enters")
    results = []
    for scale in (0.0, 0.01):
        patched = cached(model, PLAN, Innovating(scale * torch.ones(channels, width)))
        results.append(sample(case, patched))
        report = report_of(patched)
        assert kinds(patched) == PLAN and not report.notices
        assert report.peak_bytes == report.predicted_bytes == 2 * 2 * tokens * (width + channels) * 4
    assert not torch.equal(*results)
