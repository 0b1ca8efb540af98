"""Classes that only newer hosts have, as they are there: what is special in each. Stand-ins are tested in test_newer_a.py and _b.py."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import comfy.sample
import comfy.supported_models
import pytest
import test_every_family as every
import torch
from comfy.patcher_extension import WrappersMP
from comfyui_duca.cache_core import find_family
from comfyui_duca.cache_core.engine.linear_sites import find_linears
from making import Case, text
from test_every_family import STEPS, cached, kinds, network, report_of, sample
from zoo_image import normal
from zoo_newest import CASES, hidream_o1, ids, ltxav, minimax_h3, stable_audio3

PLAN = "FaFaFaFa"


def case_of(config: str, name: str) -> Case:
    if not hasattr(comfy.supported_models, config):
        pytest.skip(f"this host has no {config}")
    return next(case for case in CASES if case.name == name)


def assert_right(case: Case, model: Any) -> None:
    """What test_every_family holds of the plain cases."""
    plain = sample(case, model)
    assert torch.isfinite(plain).all() and plain.std() > 0.05
    every.test_the_family_is_known_once(case, model)
    every.test_listening_changes_nothing(case, model, plain)
    every.test_skipping_repeats_the_hidden_state(case, model, plain, PLAN)
    every.test_bytes_are_predicted(case, model)
    every.test_multiply_adds_are_those_that_torch_counts(case, model)


def lengths(case: Case, model: Any) -> dict[str, int]:
    patched = cached(model, PLAN)
    sample(case, patched)
    return report_of(patched).shape.lengths


# -- MiniMax H3 -----------------------------------------------------------------------------------------------


def test_h3_keeps_video_and_sound_together():
    """24·2·4·6 numbers of video and 32·2·5 of sound, 8 to a row."""
    case = case_of("MiniMaxH3", "minimax_h3")
    found = lengths(case, case.make())
    assert found == {"img": (24 * 2 * 4 * 6 + 32 * 2 * 5) // 8, "txt": 7, "video": 12, "audio": 10, "cond": 0, "levels": 2}


def test_h3_with_a_table_of_noise_levels():
    """As the checkpoints are that ship a curve and no network for it."""
    case = case_of("MiniMaxH3", "minimax_h3")
    assert_right(case, minimax_h3(adaln_curve_grid=9))


def test_h3_with_a_given_picture_and_a_given_sound():
    case, given = case_of("MiniMaxH3", "minimax_h3"), {"resolved_frame_index": 0}
    frames = [given | {"latent": normal(3, 1, 24, 1, 4, 6)}, given | {"audio_latent": normal(4, 1, 32, 2, 2)}]
    more = case._replace(cond=text(7, 24, minimax_keyframes=frames))
    model = case.make()
    assert_right(more, model)
    assert lengths(more, model)["cond"] == 6 + 4
    assert not torch.equal(sample(more, model), sample(case, model))


# -- LTX-2 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, {"cross_attention_adaln": True}, {"apply_gated_attention": True}], ids=["2", "2.3", "gated"])
def test_kinds_of_ltx_2(sizes):
    case = case_of("LTXAV", "ltxav")
    model = ltxav(**sizes)
    plain = sample(case, model)
    every.test_listening_changes_nothing(case, model, plain)
    every.test_skipping_repeats_the_hidden_state(case, model, plain, PLAN)


def test_ltx_2_without_sound_is_computed_in_full():
    case = case_of("LTXAV", "ltxav")
    silent, model = case._replace(latent=case.latent[0]), case.make()
    patched = cached(model, PLAN)
    assert torch.equal(sample(silent, patched), sample(silent, model)) and kinds(patched) == "F" * STEPS
    assert any("latents that are not two" in notice for notice in report_of(patched).notices)


# -- HiDream-O1 -----------------------------------------------------------------------------------------------


def test_hidream_o1_with_a_reference_is_computed_in_full_and_says_so():
    """The host makes the reference anew for every evaluation, finds nothing of it in its own cache and fills that again."""
    case = case_of("HiDreamO1", "hidream_o1")._replace(cond=ids(reference_latents=[normal(3, 1, 96, 128, 3).sigmoid()]))
    model = hidream_o1()
    patched = cached(model, PLAN)
    assert torch.equal(sample(case, patched), sample(case, model)) and kinds(patched) == "F" * STEPS
    assert any("the host fills its cache of the text" in notice for notice in report_of(patched).notices)


# -- Stable Audio 3 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_differential", [True, False])
def test_projections_of_stable_audio_3(is_differential):
    """Two attentions, one subtracted from the other, make five and three matrices of what were three and two."""
    case_of("StableAudio3", "stable_audio")
    model = stable_audio3(differential=is_differential)
    sites = {site.layer: site for site in find_linears(find_family(network(model)), network(model))}
    names = {layer: [part.name for part in sites[layer].parts] for layer in ("self_attn.to_qkv", "cross_attn.to_q", "cross_attn.to_kv")}
    assert list(names.values()) == (
        [["q", "k", "v", "q2", "k2"], ["q", "q2"], ["k", "k2", "v"]] if is_differential else [["q", "k", "v"], ["all"], ["k", "v"]]
    )
    width = 128
    for site in sites.values():
        if len(site.parts) > 1 and "ff" not in site.layer:
            assert [(part.rows.stop - part.rows.start) for part in site.parts] == [width] * len(site.parts)


def test_stable_audio_3_without_a_second_attention():
    case, model = case_of("StableAudio3", "stable_audio"), stable_audio3(differential=False)
    assert_right(case, model)
    every.test_calibrated_evaluations_at_full_rank_are_the_uncached_ones(case, model, sample(case, model))


def test_a_mean_over_frames_is_computed_in_full():
    """What the host adds of it to an attention is of all frames, not of chosen ones."""
    case, model = case_of("StableAudio3", "stable_audio"), stable_audio3(feat_scale=True)
    patched = cached(model, "FcFcFcFc")
    assert torch.equal(sample(case, patched), sample(case, model)) and kinds(patched) == "F" * STEPS
    assert any("means over frames" in notice for notice in report_of(patched).notices)


# -- LTX-2: passes that differ by flags alone -----------------------------------------------------------------


def guided(model: Any) -> Any:
    """Both of the host's guidance nodes: a pass with a block's self-attention passing through, one with sound and video apart."""
    nodes = import_module("comfy_extras.nodes_lt")
    model = nodes.LTXVSpatioTemporalGuidance.execute(model, 1.0, "1", 0.0, 1.0).args[0]
    return nodes.LTXVModalityGuidance.execute(model, 3.0, 0.0, 1.0).args[0]


def repeating(model: Any, plan: str) -> Any:
    """The same without the pack: what each pass of each cond gave last, by the flags it was called with."""
    kept: dict[tuple, Any] = {}

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = next(a for a in (*args, *kwargs.values()) if isinstance(a, dict) and "uuids" in a)
        step = int((options["sample_sigmas"] == options["sigmas"][0]).nonzero()[0])
        flags = options.get("stg_self_attn_blocks"), options.get("a2v_cross_attn")
        key = (*options["uuids"], *flags)
        if plan[step] == "F":
            kept[key] = executor(*args, **kwargs)
        return [part.clone() for part in kept[key]]

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    return clone


def test_passes_of_two_guidance_nodes_keep_features_of_their_own():
    case = case_of("LTXAV", "ltxav")
    model = guided(case.make())
    plain = sample(case, model)
    assert not torch.equal(plain, sample(case, case.make()))
    patched = cached(model, PLAN)
    result = sample(case, patched)
    assert kinds(patched) == PLAN and {evaluation.calls for evaluation in report_of(patched).evaluations} == {3}
    assert torch.equal(result, sample(case, repeating(model, PLAN)))
    assert not torch.equal(result, plain)
