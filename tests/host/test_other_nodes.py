"""The cache works beside nodes that answer evaluations themselves, split guidance, or change weights and options while sampling."""

from __future__ import annotations

import comfy.hooks
import comfy.samplers
import node_helpers
import numpy as np
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from comfyui_duca.cache_core import Kind
from comfyui_duca.nodes.demo_flux import encode_prompt, load_demo_model
from comfyui_duca.nodes.host.network_options import variant_of
from comfyui_duca.nodes.pictures.report_text import report_data, report_text
from helpers.sampling import cached, kinds, last_report, psnr, sample

STEPS = 28
AUTO = {"mode": "auto", "speedup": 2.8}  # 10 of 28


@pytest.fixture(scope="module")
def model():
    return load_demo_model()


# -- answers of other nodes -----------------------------------------------------------------------------


def answering(model, kind, every: int = 5):
    """Returns a model with a node that repeats its last answer in every fifth call, as other caches do."""
    state = {"calls": 0, "last": None}

    def wrapper(executor, *args, **kwargs):
        state["calls"] += 1
        if state["last"] is not None and state["calls"] % every == 0:
            return state["last"]
        state["last"] = executor(*args, **kwargs)
        return state["last"]

    clone = model.clone()
    clone.add_wrapper_with_key(kind, "other cache", wrapper)
    return clone


@pytest.mark.parametrize("is_outside", [True, False], ids=["before the node", "after the node"])
@pytest.mark.parametrize("kind", [WrappersMP.APPLY_MODEL, WrappersMP.CALC_COND_BATCH, WrappersMP.PREDICT_NOISE])
def test_answers_of_another_node_are_recognised_and_replaced(model, kind, is_outside):
    """None of these answers counts as a skip of ours, and as many evaluations are full as the plan says."""
    patched = cached(answering(model, kind), **AUTO) if is_outside else answering(cached(model, **AUTO), kind)
    sample(patched, steps=STEPS)
    report = last_report(patched)
    answered = STEPS // 5
    seen = [e for e in report.evaluations if e.calls]
    assert len(seen) == STEPS - answered
    assert [e.letter for e in report.evaluations if not e.calls] == ["-"] * (len(report.evaluations) - len(seen))
    assert report.count(Kind.FULL) == report.plan.count("F") == 10
    assert any("another node supplied" in notice for notice in report.notices)
    assert report_data(report)["counts"]["a"] == sum(e.kind is Kind.SKIPPED for e in seen)
    unseen = len(report.evaluations) - len(seen)
    assert report_data(report)["counts"].get("-", 0) == unseen
    assert (f"{unseen} by another node" in report_text(report, verbose=True)) is (unseen > 0)


def test_a_pack_that_splits_guidance_skips_as_much(model):
    """The node sends positive and negative in separate passes, in either order."""

    def split(executor, base_model, conds, x, timestep, options):
        calls.append(1)
        order = (0, 1) if len(calls) % 2 else (1, 0)
        parts = {}
        for index in order:
            alone = [conds[i] if i == index else None for i in range(len(conds))]
            parts[index] = comfy.samplers.calc_cond_batch(base_model, alone, x, timestep, inner_options(options))[index]
        return [parts[0], parts[1]]

    def inner_options(options):
        """Returns the options without this wrapper itself."""
        copied = comfy.model_patcher.create_model_options_clone(options)
        copied["transformer_options"]["wrappers"][WrappersMP.CALC_COND_BATCH].pop("split")
        return copied

    calls: list[int] = []
    other = model.clone()
    other.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "split", split)
    patched = cached(other, **AUTO)
    result = sample(patched, steps=STEPS)
    report = last_report(patched)
    assert report.count(Kind.FULL) == 10 and report.compute_speedup > 2.6
    assert psnr(result, sample(cached(model, **AUTO), steps=STEPS)) > 60


@pytest.mark.parametrize("layers", [("1", ""), ("", "1"), ("1", "2")])
def test_guidance_by_skipped_layers_is_skipped_in_all_lists(model, layers):
    """Guidance's pass runs some blocks of a list, but a skip leaves the list out all the same, and costs as little as without guidance."""
    guided = SkipLayerGuidanceDiT.execute(model, 2.0, 0.0, 1.0, *layers).args[0]
    patched = cached(guided, **AUTO)
    sample(patched, steps=STEPS)
    report = last_report(patched)
    assert kinds(report) == report.plan and not report.notices
    assert all(e.macs < 0.02 * e.full_macs for e in report.evaluations if e.kind is Kind.SKIPPED)


def test_guidance_that_is_always_full_beside_skips_is_no_run_without_any(model):
    """An option that changes in every step makes every evaluation of guidance's own pass full. The sampler's own pass is skipped."""

    def guided(args):
        options = comfy.model_patcher.create_model_options_clone(args["model_options"])
        options["transformer_options"]["level"] = float(args["sigma"][0])
        (weak,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"] + 0.1 * (args["cond_denoised"] - weak)

    other = model.clone()
    other.set_model_sampler_post_cfg_function(guided)
    patched = cached(other, mode="auto", speedup=2.0)
    sample(patched, steps=12)
    report = last_report(patched)
    assert set(kinds(report)) == {"F"} and sum(evaluation.skipped for evaluation in report.evaluations) == report.plan.count("a")
    assert not any("nothing could be skipped" in notice for notice in report.notices)


def test_tiles_of_a_latent_are_computed_in_full(model):
    """They come as calls with one conditioning, each of another part of the picture. No part is answered with another's hidden state."""

    def tiled(apply_model, given):
        calls.append(1)
        shifted = torch.roll(given["input"], 16 * len(calls), -1)
        tiles = [apply_model(tile, given["timestep"], **given["c"]) for tile in shifted.chunk(3, -1)]
        return torch.roll(torch.cat(tiles, -1), -16 * len(calls), -1)

    calls: list[int] = []
    other = model.clone()
    other.set_model_unet_function_wrapper(tiled)
    expected = sample(other, steps=12)
    calls.clear()
    patched = cached(other, mode="auto", speedup=2.0)
    assert torch.equal(sample(patched, steps=12), expected)
    assert any("same conditioning occurs twice" in notice for notice in last_report(patched).notices)


# -- what changes while sampling ------------------------------------------------------------------------


def lora_with_keyframes(model, count: int):
    """Returns a prompt whose LoRA has another strength in each of `count` parts of the sampling."""
    key = "diffusion_model.single_blocks.0.linear2.weight"
    delta = torch.randn(model.model.state_dict()[key].shape, generator=torch.Generator().manual_seed(1)) * 0.05
    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=0.0)
    hook.weights, hook.need_weight_init = {key: (delta,)}, False
    keyframes = comfy.hooks.HookKeyframeGroup()
    for number in range(count):
        keyframes.add(comfy.hooks.HookKeyframe(strength=1.0 - 0.5 * number / count, start_percent=number / count))
    group = comfy.hooks.HookGroup()
    group.add(hook)
    group.set_keyframes_on_hooks(keyframes)
    return node_helpers.conditioning_set_values(encode_prompt("red apple"), {"hooks": group})


def test_weights_that_change_at_every_step_are_said(model):
    patched = cached(model, mode="auto", speedup=2.0)
    sample(patched, steps=12, positive=lora_with_keyframes(model, 40), cfg=1.0)
    report = last_report(patched)
    assert set(kinds(report)) == {"F"}
    assert any("weights change while sampling" in notice for notice in report.notices)
    assert any("nothing could be skipped" in notice for notice in report.notices)


def test_an_unknown_option_that_changes_at_every_step_is_said(model):
    """Its effect is not known, so evaluations that differ in it share nothing. The notice names the option."""

    def changing(executor, x, t, *args, **kwargs):
        options = next(a for a in (*args, *kwargs.values()) if isinstance(a, dict) and "uuids" in a)
        options["strength_of_something"] = float(t.flatten()[0])
        return executor(x, t, *args, **kwargs)

    other = model.clone()
    other.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", changing)
    patched = cached(other, mode="auto", speedup=2.0)
    result = sample(patched, steps=12)
    report = last_report(patched)
    assert torch.equal(result, sample(other, steps=12))
    assert any("strength_of_something" in notice for notice in report.notices)


# -- telling passes apart -------------------------------------------------------------------------------


def made_anew(strength):
    """Returns a patch as guidance makes one in every call: another function object that does the same."""

    def patch(args, extra):
        return args["img"] * strength

    return patch


@pytest.mark.parametrize(
    ("one", "other", "is_equal"),
    [
        ({}, {}, True),
        ({"sigmas": torch.ones(1), "uuids": [1]}, {"sigmas": torch.zeros(1), "uuids": [2]}, True),
        ({"stg_self_attn_blocks": {29}}, {"stg_self_attn_blocks": {28}}, False),
        ({"stg_self_attn_blocks": {29}}, {}, False),
        ({"a2v_cross_attn": False}, {"v2a_cross_attn": False}, False),
        ({"a2v_cross_attn": False}, {}, False),  # LTX-2 has it on by default
        ({"something new": 1}, {}, False),
        ({"something new": 1}, {"something new": 2}, False),
        ({"patches": {"attn1_patch": [made_anew(1.0)]}}, {"patches": {"attn1_patch": [made_anew(1.0)]}}, True),
        ({"patches": {"attn1_patch": [made_anew(1.0)]}}, {"patches": {"attn1_patch": [made_anew(2.0)]}}, False),
        ({"patches": {"attn1_patch": [made_anew(1.0)]}}, {}, False),
        ({"patches": {}, "patches_replace": {"dit": {}}}, {}, True),
        ({"patches_replace": {"dit": {("block", 3): made_anew}}}, {"patches_replace": {"dit": {("block", 4): made_anew}}}, False),
    ],
)  # fmt: skip
def test_options_that_change_the_network(one, other, is_equal):
    assert (variant_of(one) == variant_of(other)) is is_equal
    hash(variant_of(one))


def test_a_schedule_with_a_level_twice_is_no_other_nodes_work(model):
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 8)
    twice = torch.cat((sigmas[:4], sigmas[3:]))
    patched = cached(model, mode="auto", speedup=2.0)
    guider = comfy.samplers.CFGGuider(patched)
    guider.set_conds(encode_prompt("red apple"), encode_prompt(""))
    noise = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), twice, disable_pbar=True, seed=0)
    assert len(last_report(patched).evaluations) == 9 and not last_report(patched).notices


@pytest.mark.parametrize(
    "value", [np.float64(0.5), {"a": np.float64(0.5)}, np.ones(3), torch.eye(2).to_sparse(), torch.ones(2, device="meta")]
)
def test_any_kind_of_option_can_be_compared(value):
    assert variant_of({"o": value}) == variant_of({"o": value})
    assert variant_of({"o": value}) != variant_of({})
    assert variant_of({"o": np.float64(0.5)}) == variant_of({"o": 0.5}) != variant_of({"o": np.float64(0.6)})


def test_what_lies_where_another_object_was_is_not_that_object():
    """Freed memory is used again, so comparing addresses would make the plan depend on chance."""

    class Strength:
        pass

    for make in (Strength, lambda: torch.empty(4096), lambda: np.empty(4096)):
        assert len({variant_of({"o": make()}) for _ in range(50)}) == 50
    assert len({variant_of({"o": torch.tensor([0.0, 1.0])}) for _ in range(50)}) == 1  # tensors of few values are compared


def test_a_patch_that_counts_or_remembers_stays_the_same(model):
    """It is one function, and what it closes over does not change the network."""
    count, last = 0, {}

    def patch(args):
        nonlocal count
        count += 1
        last["img"] = args["img"]
        return args

    other = model.clone()
    other.set_model_patch(patch, "post_input")
    patched = cached(other, mode="auto", speedup=2.0)
    for _ in range(2):  # the first run looks for the place, with more calls
        count = 0
        sample(patched, steps=12)
        report = last_report(patched)
        assert kinds(report) == report.plan and not report.notices
    assert count == 12 + 1  # one for the proof
