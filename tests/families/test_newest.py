"""Classes that only newer hosts have, as they are there: what is special in each. Stand-ins are tested in files named by them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import comfy.supported_models
import pytest
import torch
from checks import assert_right, assert_skips_repeat
from comfy.patcher_extension import WrappersMP
from comfyui_duca.cache_core import find_family
from making import Case, text
from runs import PLAN, STEPS, cached, cached_run, kept_tokens, kinds, layers_of, network, report_of, sample
from zoo_image import normal
from zoo_newest import CASES, hidream_o1, ids, ltxav, minimax_h3, stable_audio3


def case_of(config: str, name: str) -> Case:
    if not hasattr(comfy.supported_models, config):
        pytest.skip(f"this host has no {config}")
    return next(case for case in CASES if case.name == name)


# -- MiniMax H3 -----------------------------------------------------------------------------------------------


def last_of_h3(model: Any) -> Any:
    return model.blocks[-1]


def test_h3_keeps_video_and_sound_together():
    """12 tokens of video and 10 of sound, behind 7 of text: a sequence without rows, of which no part is left out."""
    case = case_of("MiniMaxH3", "minimax_h3")
    model = case.make()
    assert find_family(network(model)).name == "minimax_h3"
    assert_right(case, model, last_of_h3, calibrates=False)
    assert kept_tokens(cached_run(case, model)) == [29]


def test_h3_with_a_table_of_noise_levels():
    """As the checkpoints are that ship a curve and no network for it."""
    case = case_of("MiniMaxH3", "minimax_h3")
    assert_right(case, minimax_h3(adaln_curve_grid=9), last_of_h3, calibrates=False)


def test_h3_with_a_given_picture_and_a_given_sound():
    case, given = case_of("MiniMaxH3", "minimax_h3"), {"resolved_frame_index": 0}
    frames = [given | {"latent": normal(3, 1, 24, 1, 4, 6)}, given | {"audio_latent": normal(4, 1, 32, 2, 2)}]
    more = case._replace(cond=text(7, 24, minimax_keyframes=frames))
    model = case.make()
    assert_right(more, model, last_of_h3, calibrates=False)
    assert not torch.equal(sample(more, model), sample(case, model))


# -- LTX-2 ----------------------------------------------------------------------------------------------------


def last_of_ltx(model: Any) -> Any:
    return model.transformer_blocks[-1]


@pytest.mark.parametrize("sizes", [{}, {"cross_attention_adaln": True}, {"apply_gated_attention": True}], ids=["2", "2.3", "gated"])
def test_kinds_of_ltx_2(sizes):
    """24 tokens of video and 5 of sound."""
    case = case_of("LTXAV", "ltxav")
    model = ltxav(**sizes)
    assert find_family(network(model)).name == "ltxav"
    assert_right(case, model, last_of_ltx)
    assert kept_tokens(cached_run(case, model)) == [24, 5]


def test_ltx_2_without_sound_is_cached_too():
    case = case_of("LTXAV", "ltxav")
    silent, model = case._replace(latent=case.latent[0]), case.make()
    assert_skips_repeat(silent, model, sample(silent, model), last=last_of_ltx)


# -- HiDream-O1 -----------------------------------------------------------------------------------------------


def test_hidream_o1_with_a_reference_is_computed_in_full():
    """The host fills its own cache of the text anew in every evaluation: it is seen to remember, and left alone."""
    case = case_of("HiDreamO1", "hidream_o1")._replace(cond=ids(reference_latents=[normal(3, 1, 96, 128, 3).sigmoid()]))
    model = hidream_o1()
    plain, patched = sample(case, model), cached(model, PLAN)
    assert torch.equal(sample(case, patched), plain) and kinds(patched) == "F" * len(PLAN)
    assert "it keeps state between calls (_kv_cache_entries" in report_of(patched).place and report_of(patched).notices


# -- Stable Audio 3 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_differential", [True, False])
def test_projections_of_stable_audio_3(is_differential):
    """Two attentions, one subtracted from the other, make five and three matrices of what were three and two."""
    case = case_of("StableAudio3", "stable_audio")
    sites = {site.layer: site for site in layers_of(case, stable_audio3(differential=is_differential))}
    names = {layer: [part.name for part in sites[layer].parts] for layer in ("self_attn.to_qkv", "cross_attn.to_q", "cross_attn.to_kv")}
    assert list(names.values()) == (
        [["q", "k", "v", "q2", "k2"], ["q", "q2"], ["k", "k2", "v"]] if is_differential else [["q", "k", "v"], ["all"], ["k", "v"]]
    )
    width = 128
    for site in sites.values():
        if len(site.parts) > 1 and "ff" not in site.layer:
            assert [(part.rows.stop - part.rows.start) for part in site.parts] == [width] * len(site.parts)


def test_stable_audio_3_without_a_second_attention():
    case = case_of("StableAudio3", "stable_audio")
    assert_right(case, stable_audio3(differential=False))


def test_a_mean_over_frames_is_computed_in_full():
    """What the host adds of it to an attention is of all frames, not of chosen ones."""
    case, model = case_of("StableAudio3", "stable_audio"), stable_audio3(feat_scale=True)
    patched = cached(model, "FcFcFcFc")
    assert torch.equal(sample(case, patched), sample(case, model)) and kinds(patched) == "F" * STEPS
    assert any("convolve over them or average them" in notice for notice in report_of(patched).notices)


# -- LTX-2: passes that differ by flags alone -----------------------------------------------------------------


def guided(model: Any) -> Any:
    """Both of the host's guidance nodes: a pass with a block's self-attention passing through, one with sound and video apart."""
    nodes = import_module("comfy_extras.nodes_lt")
    model = nodes.LTXVSpatioTemporalGuidance.execute(model, 1.0, "1", 0.0, 1.0).args[0]
    return nodes.LTXVModalityGuidance.execute(model, 3.0, 0.0, 1.0).args[0]


def repeated_by_pass(case: Case, model: Any, plan: str) -> torch.Tensor:
    """The same without the pack: what the last block gave last in each pass of each cond, by the flags it was called with."""
    kept: dict[tuple, Any] = {}
    now: dict[str, Any] = {}

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = next(a for a in (*args, *kwargs.values()) if isinstance(a, dict) and "uuids" in a)
        step = int((options["sample_sigmas"] == options["sigmas"][0]).nonzero()[0])
        now["full"] = plan[step] == "F"
        now["key"] = (*options["uuids"], options.get("stg_self_attn_blocks"), options.get("a2v_cross_attn"))
        return executor(*args, **kwargs)

    def hook(_module: Any, _args: tuple, result: Any) -> Any:
        if now["full"]:
            kept[now["key"]] = [part.clone() for part in result]
        return tuple(part.clone() for part in kept[now["key"]])

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    handle = last_of_ltx(network(clone)).register_forward_hook(hook)
    try:
        return sample(case, clone)
    finally:
        handle.remove()


def test_passes_of_two_guidance_nodes_keep_features_of_their_own():
    case = case_of("LTXAV", "ltxav")
    model = guided(case.make())
    plain = sample(case, model)
    assert not torch.equal(plain, sample(case, case.make()))
    patched = cached(model, PLAN)
    result = sample(case, patched)
    assert kinds(patched) == PLAN and {evaluation.calls for evaluation in report_of(patched).evaluations} == {3}
    assert torch.equal(result, repeated_by_pass(case, model, PLAN))
    assert not torch.equal(result, plain)
