"""Families of older hosts as newer ones call them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from checks import assert_right
from making import Case, text
from runs import cached, cached_run, kept_tokens, kinds, layers_of, network, report_of, sample
from stand_in_signatures import LuminaWithPictures, calls_ltxv_so, newer_ltxv, newer_lumina, newer_qwen_image
from zoo import CASES
from zoo_image import lumina2, normal, z_image
from zoo_video import ltxv

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize(
    "newer", [newer_ltxv, partial(newer_ltxv, is_modulated=True), partial(newer_ltxv, is_image=True)], ids=["plain", "modulated", "image"]
)
def test_ltx_video_as_newer_hosts_call_it(newer):
    if calls_ltxv_so():
        pytest.skip("this host calls them so itself: the test below, and test_every_family.py")
    case = BY_NAME["ltxv"]
    if getattr(newer, "keywords", {}).get("is_image"):
        case = case._replace(latent=(128, 1, 4, 6), cond=text(7, 48))
    model = case.make()
    newer(network(model))
    assert_right(case, model)
    gates = [site for site in layers_of(case, model) if site.layer.endswith("to_gate_logits")]
    assert len(gates) == 2 * 3 and {site.tokens for site in gates} == {(24,)}


def test_ltx_video_with_modulated_text_has_no_conservative_evaluations():
    case = BY_NAME["ltxv"]
    if calls_ltxv_so():
        model = ltxv(cross_attention_adaln=True)
        assert_right(case, model)
    else:
        model = case.make()
        newer_ltxv(network(model), is_modulated=True)
    patched = cached(model, "FcFcFcFc")
    assert torch.equal(sample(case, patched), sample(case, model)) and kinds(patched) == "F" * 8
    assert any("modulated" in notice for notice in report_of(patched).notices)


@pytest.mark.parametrize("with_reference", [False, True])
def test_qwen_image_as_newer_hosts_call_it(with_reference):
    """With a reference modulated as clean, which comes with twice as many vectors as pictures."""
    case = BY_NAME["qwen_image"]
    if with_reference:
        case = case._replace(cond=text(7, 24, reference_latents=[normal(6, 1, 16, 1, 6, 8)]))
    model = case.make()
    newer_qwen_image(network(model))
    assert_right(case, model)
    [tokens] = kept_tokens(cached_run(case, model))
    assert 48 <= tokens < 60 if with_reference else tokens == 48, "12 of a reference are not all needed"
    patched = cached(model, "FcFcFcFc")
    result = sample(case, patched)
    assert kinds(patched) == ("FFFFFFFF" if with_reference else "FcFcFcFc")
    assert torch.equal(result, sample(case, model)) == with_reference


@pytest.mark.parametrize("make", [lumina2, z_image])
def test_lumina_as_newer_hosts_call_it(make):
    case = Case("lumina", make, (16, 12, 16), text(7, 24), lambda m: m.layers[-1])
    model = make()
    newer_lumina(network(model))
    assert_right(case, model)


def with_pictures(**pictures: list[torch.Tensor]) -> tuple[Case, object]:
    case = Case("lumina", z_image, (16, 12, 16), text(7, 24, **pictures), lambda m: m.layers[-1])
    model = z_image()
    model.model.__class__ = LuminaWithPictures
    newer_lumina(network(model))
    return case, model


def test_pictures_behind_the_image_are_not_needed():
    """48 tokens are kept. 32 of text before them, and 12 and 4 of pictures behind them, are not read from the last block."""
    case, model = with_pictures(ref_frames=[normal(6, 1, 16, 6, 8), normal(7, 1, 16, 4, 4)])
    plain = assert_right(case, model)
    assert kept_tokens(cached_run(case, model)) == [48]
    assert not torch.equal(plain, sample(case._replace(cond=text(7, 24)), model)), "the pictures say nothing"


def test_pictures_modulated_apart_from_the_image_have_no_conservative_evaluation():
    """Filled up one by one before the image: 32 tokens of text and 32 of the picture."""
    case, model = with_pictures(ref_latents=[normal(6, 1, 16, 6, 8)])
    plain = assert_right(case, model)
    patched = cached(model, "FcFcFcFc")
    assert torch.equal(sample(case, patched), plain) and kinds(patched) == "F" * 8
    assert any("reference pictures have a modulation of their own" in notice for notice in report_of(patched).notices)
