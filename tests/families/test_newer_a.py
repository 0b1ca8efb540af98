"""Models of newer hosts, on stand-ins: what is particular to them, how strictly they are known, and old families called in newer ways."""

from __future__ import annotations

from functools import partial

import comfy.nested_tensor
import comfy.sample
import comfy.utils
import pytest
import stand_in_ace15
import stand_in_newer_a
import test_every_family as every
import torch
from comfyui_duca.cache_core import find_family
from comfyui_duca.cache_core.engine.linear_sites import find_linears
from making import Case, text
from stand_in_signatures import LuminaWithPictures, calls_ltxv_so, newer_ltxv, newer_lumina, newer_qwen_image
from test_every_family import cached, kinds, network, report_of, sample
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import CASES as EVERY
from zoo_image import lumina2, normal, z_image
from zoo_newer_a import CASES, cogvideox, kandinsky5, ltxav
from zoo_video import CASES as VIDEO
from zoo_video import ltxv

PLAN = "FaFaFaFa"
BY_NAME = {case.name: case for case in (*CASES, *VIDEO)}


def assert_right(case: Case, model) -> None:
    """What test_every_family holds of the plain cases."""
    plain = sample(case, model)
    assert torch.isfinite(plain).all() and plain.std() > 0.05
    every.test_the_family_is_known_once(case, model)
    every.test_listening_changes_nothing(case, model, plain)
    every.test_skipping_repeats_the_hidden_state(case, model, plain, PLAN)
    every.test_multiply_adds_are_those_that_torch_counts(case, model)
    every.test_bytes_are_predicted(case, model)
    if find_family(network(model)).linears:
        every.test_calibrated_evaluations_at_full_rank_are_the_uncached_ones(case, model, plain)


# -- how strictly they are known ----------------------------------------------------------------------


def other_signature(module: torch.nn.Module) -> None:
    """Makes it a module whose forward takes one argument more, as a later host's may."""
    original = type(module).forward

    def forward(self, *args, another=None, **kwargs):
        return original(self, *args, **kwargs)

    module.__class__ = type(type(module).__name__, (type(module),), {"forward": forward})


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_another_signature_of_a_block_is_another_family(name):
    case = BY_NAME[name]
    model = case.make()
    assert find_family(network(model)).name == name
    other_signature(case.last(network(model)))
    assert find_family(network(model)) is None


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("kandinsky5", "out_layer.modulation"),
        ("kandinsky5", "text_transformer_blocks"),
        ("cogvideox", "patch_embed.text_proj"),
        ("anima", "llm_adapter"),
        ("ace_step15", "detokenizer"),
        ("ace_step15", "decoder.condition_embedder"),
    ],
)
def test_a_model_that_lacks_a_part_is_no_model_of_the_family(name, path):
    model = network(BY_NAME[name].make())
    *parents, last = path.split(".")
    delattr(model.get_submodule(".".join(parents)), last)
    assert find_family(model) is None


def test_kandinsky_with_sparse_attention_is_not_taken_for_the_plain_one():
    """It orders tokens in another way between the first layer and the blocks."""

    class TransformerDecoderBlock(stand_in_newer_a.TransformerDecoderBlock):
        def forward(self, visual_embed, text_embed, time_embed, freqs, sparse_params=None, transformer_options={}):  # noqa: B006
            return super().forward(visual_embed, text_embed, time_embed, freqs, transformer_options)

    model = kandinsky5()
    for block in network(model).visual_transformer_blocks:
        block.__class__ = TransformerDecoderBlock
    assert find_family(network(model)) is None
    case = BY_NAME["kandinsky5"]
    assert torch.equal(sample(case, cached_or_not(model)), sample(case, model))


def cached_or_not(model):
    """As the node does with whatever it is given."""
    return every.host.attach(model, every.Settings(mode="forecast", speedup=2.0))


# -- particular to them -------------------------------------------------------------------------------


def cached_run(case: Case, model):
    patched = cached(model, PLAN)
    sample(case, patched)
    return patched


def test_skipped_evaluations_leave_out_the_text_blocks_of_kandinsky():
    case = BY_NAME["kandinsky5"]
    model, seen = case.make(), []
    for block in network(model).text_transformer_blocks:
        block.self_attention.register_forward_hook(lambda *_args: seen.append(1))
    full, skipped, *_ = report_of(cached_run(case, model)).evaluations
    assert len(seen) == 4 * 2
    assert skipped.macs < 0.2 * skipped.full_macs and full.macs == full.full_macs


@pytest.mark.parametrize("depth", [None, 2])
def test_cogvideox_fills_odd_frame_counts_up(depth):
    name = "cogvideox" if depth is None else "cogvideox_1_5"
    case = BY_NAME[name]._replace(latent=(4, 5, 4, 6))
    assert_right(case, case.make())


def test_only_cogvideox_1_5_has_calibrated_forecasts():
    """In 1.0's first layer frames are a batch."""
    plain, later = (find_family(network(cogvideox(depth))) for depth in (None, 2))
    assert not plain.embed and later.embed and later.input_channels(network(cogvideox(2))) == 2 * 4 * 4


def test_anima_at_16_bit_has_its_hidden_state_in_32():
    """That is what the host adds up in; layers inside the blocks still say what they say in 16 bit."""
    case = BY_NAME["anima"]
    model = case.make()
    network(model).half().dtype = torch.float16
    plain = sample(case, model)
    every.test_listening_changes_nothing(case, model, plain)
    every.test_skipping_repeats_the_hidden_state(case, model, plain, PLAN)
    every.test_bytes_are_predicted(case, model)
    report = report_of(cached_run(case, model))
    assert report.shape.dtype is torch.float32
    patched = cached(model, PLAN, every.Innovating(0.01 * torch.ones(17 * 4, 48)))
    sample(case, patched)
    assert kinds(patched) == PLAN and report.peak_bytes < report_of(patched).peak_bytes < report_of(patched).predicted_bytes  # 16 bit input
    linears = every.full_rank(find_family(network(model)), network(model))
    for plan, more in (("FiiFiiFi", {"linears": linears}), ("FcFcFcFc", {})):
        patched = cached(model, plan, **more)
        result = sample(case, patched)
        assert kinds(patched) == plan and not report_of(patched).notices and torch.isfinite(result).all()
    torch.testing.assert_close(sample(case, cached(model, "FiiFiiFi", linears=linears)), plain, atol=0.05, rtol=0.05)


def test_skipped_evaluations_leave_out_what_ace_step_makes_of_lyrics_and_timbre():
    case = BY_NAME["ace_step15"]
    model, seen = case.make(), []
    lyrics, timbre, hints = network(model).encoder.lyric_encoder, network(model).encoder.timbre_encoder, network(model).detokenizer
    for name, part in (("lyrics", lyrics), ("timbre", timbre), ("hints", hints)):
        part.layers[0].mlp.register_forward_hook(lambda *_args, name=name: seen.append(name))
    sample(case, cached(model, "FaaaFaaa"))
    assert {name: seen.count(name) for name in seen} == {"lyrics": 2, "timbre": 2, "hints": 8}


@pytest.mark.parametrize("frames", [98, 99])
def test_ace_step_makes_its_hints_of_the_reference_where_there_are_no_codes(frames):
    """Which is a part that is not counted. A last frame alone is filled up to a token."""
    of_codes = BY_NAME["ace_step15"]

    def cond(seed: int) -> list:
        return [[tokens, {**more, "codes": None, "reference": normal(9, 1, 8, 100)}] for tokens, more in of_codes.cond(seed)]

    case = of_codes._replace(latent=(8, frames), cond=cond)
    model = case.make()
    plain = sample(case, model)
    every.test_skipping_repeats_the_hidden_state(case, model, plain, PLAN)
    every.test_the_input_is_kept_for_calibrated_forecasts(case, model)
    every.test_calibrated_evaluations_at_full_rank_are_the_uncached_ones(case, model, plain)
    patched = cached_run(case, model)
    assert report_of(patched).shape.lengths == {"audio": 50 if frames == 99 else 49, "lyrics": 9, "timbre": 1, "txt": 5}


def test_ace_step_without_words_writes_into_what_it_was_told():
    """The host overwrites the packed conditioning in place."""

    class AceStepConditionGenerationModel(stand_in_ace15.AceStepConditionGenerationModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs, replace_with_null_embeds=True)

    case = BY_NAME["ace_step15"]
    model = case.make()
    network(model).__class__ = AceStepConditionGenerationModel
    plain = sample(case, model)
    every.test_skipping_repeats_the_hidden_state(case, model, plain, PLAN)


# -- LTX-2 --------------------------------------------------------------------------------------------

VIDEO_SHAPE, AUDIO_SHAPE = (1, 16, 2, 3, 4), (1, 2, 5, 8)


def sample_pair(model, *shapes: tuple[int, ...], steps: int = 8) -> list[torch.Tensor]:
    latents = [torch.zeros(shape) for shape in shapes]
    latent = comfy.nested_tensor.NestedTensor(latents) if len(latents) > 1 else latents[0]
    noise = comfy.sample.prepare_noise(latent, 5)
    conds = text(7, 24)(1), text(7, 24)(2)
    result = comfy.sample.sample(model, noise, steps, 2.0, "euler", "simple", *conds, latent, seed=5, disable_pbar=True)
    return list(result.unbind()) if len(latents) > 1 else [result]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.fixture(scope="module")
def pair_model():
    return ltxav()


def test_ltx_2_is_known_and_left_as_it_is_while_the_cache_listens(pair_model):
    assert [family.name for family in every.FAMILIES if family.matches(network(pair_model))] == ["ltxav"]
    plain = sample_pair(pair_model, VIDEO_SHAPE, AUDIO_SHAPE)
    assert [tuple(part.shape) for part in plain] == [VIDEO_SHAPE, AUDIO_SHAPE] and all(part.std() > 0.05 for part in plain)
    patched = cached(pair_model, "F" * 8)
    assert equal(sample_pair(patched, VIDEO_SHAPE, AUDIO_SHAPE), plain) and kinds(patched) == "F" * 8
    assert all("forward" not in module.__dict__ for module in network(pair_model).modules())


@pytest.mark.parametrize("plan", [PLAN, "FFaaaaaa"])
def test_ltx_2_gives_its_last_video_and_sound_again(pair_model, plan):
    patched = cached(pair_model, plan)
    result = sample_pair(patched, VIDEO_SHAPE, AUDIO_SHAPE)
    assert kinds(patched) == plan and [text for text in report_of(patched).notices if "whole output" not in text] == []
    kept: list[torch.Tensor] = []
    calls = []

    def hook(_module, _args, output):
        calls.append(1)
        if plan[len(calls) - 1] == "F":
            kept[:] = [part.clone() for part in output]
            return output
        return [part.clone() for part in kept]

    handle = network(pair_model).register_forward_hook(hook)
    try:
        assert equal(result, sample_pair(pair_model, VIDEO_SHAPE, AUDIO_SHAPE))
    finally:
        handle.remove()
    assert not equal(result, sample_pair(pair_model, VIDEO_SHAPE, AUDIO_SHAPE))


def test_what_ltx_2_costs_is_predicted(pair_model):
    patched = cached(pair_model, PLAN)
    sample_pair(patched, VIDEO_SHAPE, AUDIO_SHAPE)
    report = report_of(patched)
    numbers = 16 * 2 * 3 * 4 + 2 * 5 * 8
    assert report.peak_bytes == report.predicted_bytes == 2 * numbers * 4  # two conds
    assert {name: report.shape.lengths[name] for name in ("video", "audio", "txt")} == {"video": 24, "audio": 5, "txt": 7}
    patched = cached(pair_model, "FF")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sample_pair(patched, VIDEO_SHAPE, AUDIO_SHAPE, steps=2)
    counted = sum(evaluation.macs for evaluation in report_of(patched).evaluations)
    assert counted == pytest.approx(counter.get_total_flops() / 2, rel=0.03)


def test_ltx_2_with_conds_in_calls_of_their_own_is_the_same(pair_model, monkeypatch):
    together = sample_pair(cached(pair_model, PLAN), VIDEO_SHAPE, AUDIO_SHAPE)
    monkeypatch.setattr(every.comfy.model_management, "get_free_memory", lambda *_a, **_k: 0)
    patched = cached(pair_model, PLAN)
    for one, other in zip(sample_pair(patched, VIDEO_SHAPE, AUDIO_SHAPE), together):
        torch.testing.assert_close(one, other, atol=1e-4 * max(1.0, float(other.std())), rtol=1e-4)
    assert kinds(patched) == PLAN and all(evaluation.calls == 2 for evaluation in report_of(patched).evaluations)


def test_ltx_2_without_sound_is_computed_in_full(pair_model):
    patched = cached(pair_model, PLAN)
    result = sample_pair(patched, VIDEO_SHAPE)
    assert equal(result, sample_pair(pair_model, VIDEO_SHAPE)) and kinds(patched) == "F" * 8
    assert any("latents that are not two" in notice for notice in report_of(patched).notices)


@pytest.mark.parametrize("audio", [AUDIO_SHAPE, (1, 2, 5, 3)], ids=["rows of 16", "no even rows"])
def test_a_pair_goes_through_the_cache_as_the_host_packs_it(pair_model, audio):
    (stack,), pair = find_family(network(pair_model)).stacks, [normal(1, *VIDEO_SHAPE), normal(2, *audio)]
    (tokens,) = stack.inputs((pair, torch.ones(1), normal(3, 1, 7, 24)), {})
    assert tokens.ndim == 3 and torch.equal(stack.returned(pair)[0], tokens)
    assert torch.equal(stack.result([stack.grid(stack.flat(tokens), tokens)]), comfy.utils.pack_latents(pair)[0])


def test_a_controlnet_of_ltx_2_is_not_skipped_over(pair_model):
    (stack,), pair = find_family(network(pair_model)).stacks, [normal(1, *VIDEO_SHAPE), normal(2, *AUDIO_SHAPE)]
    assert not stack.why_not(stack.named((pair,), {"control": None}))
    assert "ControlNet" in stack.why_not(stack.named((pair,), {"control": {"output": []}}))


@pytest.mark.parametrize("part", ["block", "model", "a_patchifier"])
def test_ltx_2_of_another_form_is_not_known(part):
    model = network(ltxav())
    if part == "a_patchifier":
        del model.a_patchifier
    else:
        other_signature(model if part == "model" else model.transformer_blocks[1])
    assert find_family(model) is None


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
    gates = [site for site in find_linears(find_family(network(model)), network(model)) if site.layer.endswith("to_gate_logits")]
    assert len(gates) == 2 * 3 and {site.stream for site in gates} == {"img"}


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
    assert report_of(cached_run(case, model)).shape.lengths["img"] == (60 if with_reference else 48)
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


def test_pictures_behind_the_image_are_cached_with_it():
    """They enter the first layer one by one: all are counted, and what is filled up lies behind the last."""
    case, model = with_pictures(ref_frames=[normal(6, 1, 16, 6, 8), normal(7, 1, 16, 4, 4)])
    assert_right(case, model)
    lengths = report_of(cached_run(case, model)).shape.lengths
    assert lengths == {"txt": 32, "img": 48 + 12 + 4, "padding": 0}


def test_pictures_modulated_apart_from_the_image_are_computed_in_full():
    """Filled up one by one before the image: a forecast for the first tokens behind the text would be one of them."""
    case, model = with_pictures(ref_latents=[normal(6, 1, 16, 6, 8)])
    plain = sample(case, model)
    for plan in (PLAN, "FcFcFcFc"):
        patched = cached(model, plan)
        assert torch.equal(sample(case, patched), plain) and kinds(patched) == "F" * 8
        assert any("modulated apart from the image" in notice for notice in report_of(patched).notices)
    every.test_calibrated_evaluations_at_full_rank_are_the_uncached_ones(case, model, plain)
