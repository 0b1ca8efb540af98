"""The cache works with all kinds of conditioning, samplers, numbers of steps, and ControlNets."""

from __future__ import annotations

import comfy.controlnet
import comfy.samplers
import node_helpers
import pytest
import torch
from comfyui_duca.cache_core import Kind, RunStart
from comfyui_duca.nodes.demo_flux import encode_prompt, load_demo_model
from helpers.sampling import cached, kinds, last_report, psnr, sample, split_calls

AUTO = {"mode": "auto", "speedup": 3.0}
PAPER = {"mode": "paper", "cycle_length": 5, "token_share": 0.2}


@pytest.fixture(scope="module")
def model():
    return load_demo_model()


@pytest.mark.parametrize("settings", [AUTO, PAPER], ids=["auto", "paper"])
@pytest.mark.parametrize("when", [lambda call: True, lambda call: call % 3 == 0], ids=["split", "alternating"])
def test_batched_and_split_conds_give_the_same(model, settings, when, monkeypatch):
    patched = cached(model, **settings)
    together = sample(patched)
    plan = kinds(last_report(patched))
    with monkeypatch.context() as patch:
        split_calls(patch, when)
        apart = sample(patched)
    report = last_report(patched)
    assert kinds(report) == plan
    assert max(e.calls for e in report.evaluations) == 2
    assert psnr(apart, together) > 60  # the same arithmetic with another batch size


def test_conds_of_unequal_length_go_in_calls_of_their_own(model):
    """Text encoders that do not pad give such conds."""
    positive = [[encode_prompt("red apple")[0][0][:, :5], encode_prompt("red apple")[0][1]]]
    patched = cached(model, **AUTO)
    result = sample(patched, positive=positive)
    assert all(e.calls == 2 for e in last_report(patched).evaluations)
    assert last_report(patched).count(Kind.SKIPPED) == 8
    assert psnr(result, sample(model, positive=positive)) > 22


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_with_and_without_guidance_it_resets_and_skips(model, cfg):
    patched = cached(model, **AUTO)
    first = sample(patched, cfg=cfg)
    assert last_report(patched).count(Kind.FULL) == 4
    assert torch.equal(sample(patched, cfg=cfg), first)


def two_prompts(**extra):
    (a, extra_a), (b, extra_b) = encode_prompt("red apple")[0], encode_prompt("castle")[0]
    return [[a, {**extra_a}], [b, {**extra_b, **extra}]]


def test_combined_conds_keep_features_apart(model, monkeypatch):
    """With two positives and a negative there are three slots. Each model call's forecast comes from its own history."""
    patched = cached(model, **AUTO)
    result = sample(patched, positive=two_prompts())
    assert last_report(patched).count(Kind.FULL) == 4
    expected = sample(model, positive=two_prompts())
    assert psnr(result, expected) > 22
    with monkeypatch.context() as patch:
        split_calls(patch)
        assert psnr(sample(patched, positive=two_prompts()), result) > 60


def test_a_cond_that_appears_late_is_computed_first(model):
    """Its first evaluation is at a step that the plan would skip."""
    late = node_helpers.conditioning_set_values(encode_prompt("castle"), {"start_percent": 0.5, "end_percent": 1.0})
    positive = encode_prompt("red apple") + late
    patched = cached(model, mode="forecast", cycle_length=20, warmup=2, predictor="reuse")
    sample(patched, positive=positive)
    done = kinds(last_report(patched))
    assert last_report(patched).plan == "FFaaaaaaaaaa"
    appeared = done.index("F", 2)
    assert done == "FF" + "a" * (appeared - 2) + "F" + "a" * (11 - appeared)
    assert psnr(sample(cached(model, speedup=1.0), positive=positive), sample(model, positive=positive)) == float("inf")


@pytest.mark.parametrize("settings", [AUTO, PAPER], ids=["auto", "paper"])
def test_an_area_cond_has_its_own_shape(model, settings):
    positive = two_prompts(area=(32, 32, 8, 8), strength=1.0)
    patched = cached(model, **settings)
    result = sample(patched, positive=positive)
    assert last_report(patched).count(Kind.FULL) < 12 and not last_report(patched).notices
    assert psnr(result, sample(model, positive=positive)) > 20


def test_scheduled_lora_hooks_start_the_cache_anew(model):
    """Features from one LoRA strength are not used at another."""
    import comfy.hooks

    key = "diffusion_model.single_blocks.0.linear2.weight"
    delta = torch.randn(model.model.state_dict()[key].shape, generator=torch.Generator().manual_seed(1)) * 0.05
    group = comfy.hooks.HookGroup()
    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=0.0)
    hook.weights = {key: (delta,)}
    hook.need_weight_init = False
    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
    keyframes.add(comfy.hooks.HookKeyframe(strength=0.2, start_percent=0.5))
    group.add(hook)
    group.set_keyframes_on_hooks(keyframes)
    positive = node_helpers.conditioning_set_values(encode_prompt("red apple"), {"hooks": group})
    patched = cached(model, mode="forecast", cycle_length=20, warmup=2, predictor="reuse")
    sample(patched, positive=positive)
    assert kinds(last_report(patched)).count("F") == 3  # two of the plan, and one after the strength changed


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("settings", [{**AUTO, "speedup": 6.0}, {"mode": "paper", "cycle_length": 5, "warmup": 0}], ids=["auto", "paper"])
def test_few_steps(model, settings, steps):
    patched = cached(model, **settings)
    result = sample(patched, steps=steps)
    assert torch.isfinite(result).all()
    assert kinds(last_report(patched))[0] == "F"
    if steps == 1 or (steps == 2 and settings["mode"] == "auto"):  # of two steps, both are computed
        assert torch.equal(result, sample(model, steps=steps))
    else:
        assert any("fewer steps" in notice for notice in last_report(patched).notices)


# steps 0 … 7 of this plan
PLAN = "FFaFaFaa"


@pytest.mark.parametrize(
    ("sampler", "steps_evaluated"),
    [
        ("euler", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("dpmpp_2m", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("heun", [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]),  # its second evaluation is at the next step's noise level
        ("dpm_2", [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7]),  # its second evaluation is between two noise levels
    ],
)
def test_kinds_by_sampler_against_hand_worked_steps(model, sampler, steps_evaluated, monkeypatch):
    from comfyui_duca.cache_core import Plan
    from comfyui_duca.cache_core.planning.policies import FrontLoaded

    monkeypatch.setattr(FrontLoaded, "plan", lambda self, steps, window: Plan.parse(PLAN))
    patched = cached(model, **AUTO)
    sample(patched, sampler=sampler, steps=8)
    report = last_report(patched)
    assert [e.step for e in report.evaluations] == steps_evaluated
    assert kinds(report) == "".join(PLAN[step] for step in steps_evaluated)
    assert not report.notices


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_every_sampler_is_served_or_told_why_not(model, sampler):
    """Results are finite, the first evaluation is full, and some are skipped; or else there is a notice."""
    patched = cached(model, **AUTO)
    result = sample(patched, sampler=sampler, steps=8)
    report = last_report(patched)
    assert torch.isfinite(result).all()
    assert kinds(report)[0] == "F"
    assert report.count(Kind.FULL) < len(report.evaluations) or report.notices


@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_every_scheduler(model, scheduler):
    patched = cached(model, **AUTO)
    result = sample(patched, scheduler=scheduler, steps=12)
    assert last_report(patched).count(Kind.FULL) < 12
    assert psnr(result, sample(model, scheduler=scheduler, steps=12)) > 15


def test_partial_denoise_and_split_samplers_follow_their_own_levels(model):
    """Half of the noise levels are sampled, in one run or in two of which one hands its latent to the other."""
    image = sample(model)
    patched = cached(model, **AUTO)
    result = sample(patched, latent=image, denoise=0.5, steps=12)
    assert len(last_report(patched).evaluations) == 12 and last_report(patched).count(Kind.FULL) == 4
    assert psnr(result, sample(model, latent=image, denoise=0.5, steps=12)) > 25
    sample(patched, steps=12, start_step=6, last_step=12, latent=image)
    assert len(last_report(patched).plan) == 6


def test_start_and_end_percent_are_parts_of_the_sampling(model):
    """Outside 0.25-0.75 of the host's own percentages, every evaluation is full."""
    patched = cached(model, mode="forecast", predictor="reuse", cycle_length=20, warmup=0, skip_from=0.25, skip_to=0.75)
    sample(patched)
    sampling = model.get_model_object("model_sampling")
    high, low = float(sampling.percent_to_sigma(0.25)), float(sampling.percent_to_sigma(0.75))
    for e in last_report(patched).evaluations:
        inside = low <= e.sigma <= high
        assert e.kind is Kind.SKIPPED if inside else e.kind is Kind.FULL


class FixedControl(comfy.controlnet.ControlBase):
    """A ControlNet with constant residuals, so what the host adds is known exactly."""

    def __init__(self, network, scale=0.3):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shape = (1, 100, network.hidden_size)  # shorter than the image's 144 tokens, which the host allows
        self.residuals = {
            "input": [torch.randn(shape, generator=generator) * scale for _ in network.double_blocks],
            "output": [torch.randn(shape, generator=generator) * scale for _ in network.single_blocks],
        }
        self.asked = 0

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        self.asked += 1
        return self.residuals

    def copy(self):
        return self

    def get_models(self):
        return []


def controlled(network, scale=0.3):
    control = FixedControl(network, scale)
    return node_helpers.conditioning_set_values(encode_prompt("red apple"), {"control": control, "control_apply_to_uncond": True}), control


@pytest.mark.parametrize("settings", [AUTO, PAPER], ids=["auto", "paper"])
def test_controlnet_is_in_effect_on_every_evaluation(model, settings):
    positive, control = controlled(model.model.diffusion_model)
    patched = cached(model, **settings)
    result = sample(patched, positive=positive, cfg=1.0)
    expected = sample(model, positive=positive, cfg=1.0)
    without = sample(cached(model, **settings), cfg=1.0)
    assert last_report(patched).count(Kind.FULL) < 12
    assert psnr(result, expected) > psnr(without, expected) + 3  # nearer to the controlled picture than to the one without
    assert torch.equal(sample(cached(model, speedup=1.0), positive=positive, cfg=1.0), expected)
    assert control.asked == 12 * 3


def test_controlnet_is_counted_once_on_a_skip(model):
    """Heun evaluates each noise level twice. A reused hidden state of the same input must repeat the output, residuals included."""
    from comfyui_duca.cache_core import CacheRun, ModelCall, Timeline
    from comfyui_duca.cache_core.families.flux import FLUX
    from comfyui_duca.cache_core.planning.policies import FixedInterval
    from comfyui_duca.cache_core.predictors import Reuse
    from comfyui_duca.cache_core.strategy import Strategy

    network = model.model.diffusion_model
    run = CacheRun(
        Strategy(FixedInterval(9, warmup=1), Reuse()),
        RunStart(torch.nn.Module(), FLUX, Timeline([1.0, 0.9999, 0.5, 0.0]), range(3)),
    )
    (context, extra), x = encode_prompt("red apple")[0], torch.randn(1, 3, 48, 48)
    residuals = FixedControl(network).residuals

    @torch.inference_mode()
    def evaluate(sigma):
        def compute():
            return network(x.clone(), torch.tensor([0.9]), context, extra["pooled_output"], control=residuals)

        with run.evaluation(sigma):
            return run.model_call(ModelCall(network, ("a",), 0), compute)

    full, skipped = evaluate(1.0), evaluate(0.9999)
    assert [e.kind for e in run.report.evaluations] == [Kind.FULL, Kind.SKIPPED]
    assert torch.equal(full, skipped)


def slg(model, start=0.0, end=1.0):
    """Skip-layer guidance evaluates the model once more in each step, with some layers left out."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    return SkipLayerGuidanceDiT.execute(model, 2.0, start, end, "1", "2").args[0]


def test_guidance_with_an_extra_pass_has_a_slot_of_its_own(model, monkeypatch):
    """The pass shares step and conditioning but not the network. It is skipped in the same evaluations, never mixed with the plain pass."""
    patched = cached(slg(model), **AUTO)
    result = sample(patched)
    report = last_report(patched)
    assert kinds(report).count("F") == 4 and not report.notices
    assert all(e.calls == 2 for e in report.evaluations)
    assert psnr(result, sample(slg(model))) > psnr(sample(model), sample(slg(model))) + 6
    assert torch.equal(sample(cached(slg(model), speedup=1.0)), sample(slg(model)))


def test_an_extra_pass_that_ends_is_freed(model):
    patched = cached(slg(model, end=0.5), mode="forecast", predictor="reuse", cycle_length=2, warmup=1)
    sample(patched)
    held = [e.cache_bytes for e in last_report(patched).evaluations]
    assert held[0] == 3 * 144 * 256 * 4 and held[-1] == 2 * 144 * 256 * 4


def test_an_extra_pass_with_a_new_identity_each_time_is_computed(model):
    """The old PerpNeg does this: it encodes its empty prompt anew in every call."""
    import uuid

    import comfy.samplers

    def extra_pass(args):
        cond = [{**c, "uuid": uuid.uuid4()} for c in args["cond"]]
        comfy.samplers.calc_cond_batch(args["model"], [cond], args["input"], args["sigma"], args["model_options"])
        return args["denoised"]

    other = model.clone()
    other.set_model_sampler_post_cfg_function(extra_pass)
    patched = cached(other, **AUTO)
    assert torch.equal(sample(patched), sample(cached(model, **AUTO)))
    report = last_report(patched)
    assert set(kinds(report)) == {"F"} and report.compute_speedup > 1.3
    assert report.evaluations[-1].cache_bytes <= 5 * 3 * 144 * 256 * 4  # memory does not grow with every evaluation


def test_reference_latents_take_part(model):
    """In FLUX Kontext, reference tokens follow the image's. The picture depends on them, with and without a cache."""
    reference = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(5))
    positive = node_helpers.conditioning_set_values(encode_prompt("red apple"), {"reference_latents": [reference]})
    for settings in (AUTO, PAPER):
        patched = cached(model, **settings)
        result = sample(patched, positive=positive)
        assert last_report(patched).count(Kind.FULL) < 12
        expected = sample(model, positive=positive)
        assert psnr(result, expected) > psnr(sample(model), expected)


def test_odd_sizes_and_batches(model):
    for size, batch in (((36, 60), 1), ((50, 42), 2), ((64, 64), 3)):
        patched = cached(model, **AUTO)
        result = sample(patched, size=size, batch=batch, steps=8)
        assert result.shape == (batch, 3, *size)
        assert psnr(result, sample(model, size=size, batch=batch, steps=8)) > 18
