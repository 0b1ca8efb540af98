"""Models of newer hosts, on stand-ins: what is particular to them, how strictly they are known, and old families called in newer ways."""

from __future__ import annotations

from functools import partial

import comfy.model_management
import pytest
import stand_in_ace15
import torch
from comfyui_duca.cache_core import find_family
from holding import (
    PLAN,
    Innovating,
    assert_listening_changes_nothing,
    assert_right,
    assert_skips_repeat,
    cached,
    cached_run,
    full_rank,
    kept_tokens,
    linear_sites,
)
from making import Case, text
from stand_in_signatures import LuminaWithPictures, calls_ltxv_so, newer_ltxv, newer_lumina, newer_qwen_image
from test_every_family import kinds, network, report_of, sample
from zoo import CASES as EVERY
from zoo_image import lumina2, normal, z_image
from zoo_newer_a import CASES, PAIR
from zoo_video import CASES as VIDEO
from zoo_video import ltxv

BY_NAME = {case.name: case for case in (*CASES, *VIDEO)}


# -- what a later host may change ---------------------------------------------------------------------


def other_signature(module: torch.nn.Module) -> None:
    """Makes it a module whose forward takes one argument more, as a later host's may."""
    original = type(module).forward

    def forward(self, *args, another=None, **kwargs):
        return original(self, *args, **kwargs)

    module.__class__ = type(type(module).__name__, (type(module),), {"forward": forward})


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_blocks_that_take_other_arguments_are_found_by_watching_them(name):
    """They keep the model's name. A conservative evaluation of them is not known."""
    case = BY_NAME[name]
    model = case.make()
    for block in case.last(network(model)), next(iter(case.last(network(model)).children())):
        other_signature(block)
    known = find_family(network(model))
    assert known.name == name.removesuffix("_1_5") and not known.is_conservative
    assert_right(case, model)


# -- particular to them -------------------------------------------------------------------------------


def test_skipped_evaluations_leave_out_the_text_blocks_of_kandinsky():
    case = BY_NAME["kandinsky5"]
    model, seen = case.make(), []
    cached_run(case, model)  # in which the place is looked for
    for block in network(model).text_transformer_blocks:
        block.self_attention.register_forward_hook(lambda *_args: seen.append(1))
    full, skipped, *_ = cached_run(case, model).evaluations
    assert len(seen) == 4 * 2
    assert skipped.macs < 0.2 * skipped.full_macs and full.macs == full.full_macs


@pytest.mark.parametrize("name", ["cogvideox", "cogvideox_1_5"])
def test_cogvideox_fills_odd_frame_counts_up(name):
    case = BY_NAME[name]._replace(latent=(4, 5, 4, 6))
    assert_right(case, case.make())


def test_anima_at_16_bit_has_its_hidden_state_in_32():
    """That is what the host adds up in; layers inside the blocks still say what they say in 16 bit."""
    case = BY_NAME["anima"]
    model = case.make()
    network(model).half().dtype = torch.float16
    plain = sample(case, model)
    assert_listening_changes_nothing(case, model, plain)
    assert_skips_repeat(case, model, plain)
    report = cached_run(case, model)
    assert [kept.dtype for kept in report.shape.known.place.kept] == [torch.float32]
    patched = cached(model, PLAN, Innovating(0.01 * torch.ones(17 * 4, 48)))
    sample(case, patched)
    assert kinds(patched) == PLAN and report.peak_bytes < report_of(patched).peak_bytes < report_of(patched).predicted_bytes  # 16 bit input
    factors = full_rank(case, model)
    for plan, more in (("FiiFiiFi", {"factors": factors}), ("FcFcFcFc", {})):
        patched = cached(model, plan, **more)
        result = sample(case, patched)
        assert kinds(patched) == plan and not report_of(patched).notices and torch.isfinite(result).all()
    torch.testing.assert_close(sample(case, cached(model, "FiiFiiFi", factors=factors)), plain, atol=0.05, rtol=0.05)


def test_skipped_evaluations_leave_out_what_ace_step_makes_of_lyrics_and_timbre():
    """And of its hints, which enter where the latent does. The layer for lyrics is too little here to be looked at."""
    case = BY_NAME["ace_step15"]
    model, seen = case.make(), []
    cached_run(case, model)
    lyrics, timbre, hints = network(model).encoder.lyric_encoder, network(model).encoder.timbre_encoder, network(model).detokenizer
    for name, part in (("lyrics", lyrics), ("timbre", timbre), ("hints", hints)):
        part.layers[0].mlp.register_forward_hook(lambda *_args, name=name: seen.append(name))
    cached_run(case, model, "FaaaFaaa")
    assert {name: seen.count(name) for name in seen if name != "lyrics"} == {"timbre": 2, "hints": 2}


@pytest.mark.parametrize("frames", [98, 99])
def test_ace_step_makes_its_hints_of_the_reference_where_there_are_no_codes(frames):
    """A last frame alone is filled up to a token."""
    of_codes = BY_NAME["ace_step15"]

    def cond(seed: int) -> list:
        return [[tokens, {**more, "codes": None, "reference": normal(9, 1, 8, 100)}] for tokens, more in of_codes.cond(seed)]

    case = of_codes._replace(latent=(8, frames), cond=cond)
    model = case.make()
    assert_right(case, model)
    assert kept_tokens(cached_run(case, model)) == [50 if frames == 99 else 49]


def test_ace_step_without_words_writes_into_what_it_was_told():
    """The host overwrites the packed conditioning in place."""

    class AceStepConditionGenerationModel(stand_in_ace15.AceStepConditionGenerationModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs, replace_with_null_embeds=True)

    case = BY_NAME["ace_step15"]
    model = case.make()
    network(model).__class__ = AceStepConditionGenerationModel
    assert_skips_repeat(case, model, sample(case, model))


# -- LTX-2 --------------------------------------------------------------------------------------------

LTX_2 = PAIR._replace(last=lambda m: m.transformer_blocks[-1])


@pytest.fixture(scope="module")
def pair_model():
    return PAIR.make()


def test_video_and_sound_of_ltx_2_are_kept_side_by_side(pair_model):
    """24 tokens of video, 32 wide, and 5 of sound, 16 wide, for two conds and one anchor."""
    assert find_family(network(pair_model)).name == "ltxav"
    assert_right(LTX_2, pair_model)
    report = cached_run(LTX_2, pair_model)
    assert kept_tokens(report) == [24, 5] and report.peak_bytes == 2 * (24 * 32 + 5 * 16) * 4
    assert all("forward" not in module.__dict__ for module in network(pair_model).modules())


def test_ltx_2_with_conds_in_calls_of_their_own_is_the_same(pair_model, monkeypatch):
    together = sample(LTX_2, cached(pair_model, PLAN))
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_a, **_k: 0)
    patched = cached(pair_model, PLAN)
    torch.testing.assert_close(sample(LTX_2, patched), together, atol=1e-4 * max(1.0, float(together.std())), rtol=1e-4)
    assert kinds(patched) == PLAN and all(evaluation.calls == 2 for evaluation in report_of(patched).evaluations)


def test_ltx_2_without_sound_is_cached_too(pair_model):
    silent = LTX_2._replace(latent=LTX_2.latent[0])
    assert_skips_repeat(silent, pair_model, sample(silent, pair_model))


@pytest.mark.parametrize("part", ["block", "model"])
def test_ltx_2_of_another_form_is_found_by_watching_it(part):
    model = PAIR.make()
    for module in [network(model)] if part == "model" else network(model).transformer_blocks:
        other_signature(module)
    assert_right(LTX_2, model)


# -- families of this host, called as newer ones call them --------------------------------------------


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
    gates = [site for site in linear_sites(case, model) if site.layer.endswith("to_gate_logits")]
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
    case = next(case for case in EVERY if case.name == "qwen_image")
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
    assert any("modulated apart from the image" in notice for notice in report_of(patched).notices)
