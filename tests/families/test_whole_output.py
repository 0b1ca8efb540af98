"""Networks in which no place is proved: what is forecast of their output, what is never skipped, and what the user reads."""

from __future__ import annotations

from typing import Any

import comfy.controlnet
import comfy.sample
import numpy as np
import pytest
import torch
from comfyui_duca.cache_core import CacheRun, ModelCall, Places, Plan, RunStart, Settings, Timeline, find_family
from comfyui_duca.cache_core.planning.policies import AlwaysCompute, Given
from comfyui_duca.cache_core.predictors import Chebyshev, Predictor, Reuse, Taylor
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes import host
from comfyui_duca.nodes.pictures.report_text import report_text
from making import Case, text, tiny
from runs import STEPS, cached, kinds, report_of, sample
from runs import network as network_of
from stand_in_early import EarlyErnie, EarlyReader, Nothing, VideoAndSound, packed
from stand_in_ernie_helios import config_of
from zoo_stand_ins import hunyuan3d_2_1

CASE = Case("early", lambda: tiny(config_of(EarlyErnie, 16)), (16, 12, 16), text(7, 24), lambda m: m)
PLAN = "FaFaFaFa"
WHY = "with its hidden state put back, it does not return the same output"
TOLD = f"only the final output of this model can be cached ({WHY}): skipped evaluations do not look at the current latent"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    """Returns a model that is known already: a place inside is looked for in two evaluations before the whole output is used."""
    made = CASE.make()
    sample(CASE, cached(made, "FF"), 2)
    return made


def watched(model, patched) -> list[tuple[float, torch.Tensor]]:
    """Returns a list of the model's time and output in every evaluation, cond and uncond together."""
    seen, top = [], model.get_model_object("model_sampling")
    noisiest = float(top.timestep(torch.as_tensor(top.sigma_max)))

    def hook(_module, args, result):
        seen.append((float(args[1][0]) / noisiest, result.clone()))

    handle = network_of(model).register_forward_hook(hook)
    try:
        sample(CASE, patched)
        return seen
    finally:
        handle.remove()


def test_a_head_that_reads_an_early_block_too_is_refused_inside():
    """It is computed in full at first, as some hosts compute something else in the first evaluation."""
    model = CASE.make()
    for expected in ("FFFaFaFa", PLAN):
        patched = cached(model, PLAN)
        sample(CASE, patched)
        assert kinds(patched) == expected
        assert report_of(patched).place == f"whole output ({WHY})" and report_of(patched).notices == [TOLD]


def test_a_line_through_the_last_two_outputs(model):
    """First-order Taylor by hand is y + (y - x)·(t - t_y)/(t_y - t_x)."""
    seen = watched(model, cached(model, "FFaaFFFa", Taylor(1)))
    for now, before, last in ((2, 0, 1), (3, 0, 1), (7, 5, 6)):
        (t, answer), (t0, x), (t1, y) = seen[now], seen[before], seen[last]
        torch.testing.assert_close(answer, y + (y - x) * ((t - t1) / (t1 - t0)), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(answer, y, atol=1e-2)


def test_a_ridge_fit_of_polynomials_to_all_outputs(model):
    """Chebyshev by hand: T_0 … T_3 are written out, the ridge is rows of the least squares, and half of a line is added."""
    seen = watched(model, cached(model, "FFFFaFFF", Chebyshev(degree=3, ridge=0.1, taylor_share=0.5)))
    times, outputs = [t for t, _ in seen[:4]], torch.stack([y for _, y in seen[:4]]).flatten(1).double().numpy()

    def row(t: float) -> list[float]:
        u = 2 * t - 1
        return [1.0, u, 2 * u * u - 1, 4 * u**3 - 3 * u]

    ridged = np.concatenate(([row(t) for t in times], np.sqrt(0.1) * np.eye(4)))
    fitted = np.linalg.lstsq(ridged, np.concatenate((outputs, np.zeros((4, outputs.shape[1])))), rcond=None)[0]
    t, answer = seen[4]
    line = outputs[3] + (outputs[3] - outputs[2]) * ((t - times[3]) / (times[3] - times[2]))
    expected = torch.as_tensor(0.5 * line + 0.5 * (np.array(row(t)) @ fitted)).reshape(answer.shape)
    torch.testing.assert_close(answer.double(), expected, atol=1e-4, rtol=1e-4)


def test_nothing_of_the_model_runs_in_a_skipped_evaluation(model):
    calls = []
    inner = network_of(model)
    handles = [
        module.register_forward_hook(lambda *_: calls.append(1)) for module in (inner.x_embedder, inner.layers[0], inner.final_linear)
    ]
    patched = cached(model, PLAN)
    sample(CASE, patched)
    for handle in handles:
        handle.remove()
    assert len(calls) == 3 * PLAN.count("F")
    assert all((e.macs == 0) == (e.kind.value == "a") and e.full_macs > 0 for e in report_of(patched).evaluations)


def test_only_the_output_is_kept(model):
    """That is two conds of 12 x 16 latents with 16 numbers in float32, at one time or, for a line, at two."""
    for predictor, anchors in ((Reuse(), 1), (Taylor(1), 2)):
        patched = cached(model, PLAN, predictor)
        sample(CASE, patched)
        assert report_of(patched).peak_bytes == report_of(patched).predicted_bytes == anchors * 2 * 12 * 16 * 16 * 4


def test_the_user_is_told_once_in_every_run_that_skips(model, caplog):
    patched = cached(model, "FaaaFaaa")
    for run in (1, 2):
        sample(CASE, patched)
        assert report_of(patched).notices == [TOLD] and f"note         {TOLD}" in report_text(report_of(patched))
        assert caplog.text.count(f"DuCa Cache: {TOLD}.") == run
    uncached = host.attach(model, Strategy(AlwaysCompute()))
    sample(CASE, uncached)
    assert not report_of(uncached).notices
    auto = host.attach(model, Settings(mode="auto", speedup=2.0))
    sample(CASE, auto)
    assert report_of(auto).notices == [TOLD] and 0 < kinds(auto).count("a") < STEPS


def test_a_second_evaluation_of_a_step_that_is_always_skipped_is_told_of_too(model):
    strategy = Strategy(AlwaysCompute(), Reuse(), first_only=True)
    patched = host.attach(model, strategy)
    latent = torch.zeros(1, *CASE.latent)
    noise = comfy.sample.prepare_noise(latent, 5)
    comfy.sample.sample(model=patched, noise=noise, steps=8, cfg=2.0, sampler_name="heun", scheduler="simple", positive=CASE.cond(1),
                        negative=CASE.cond(2), latent_image=latent, seed=5, disable_pbar=True)  # fmt: skip
    assert "a" in kinds(patched) and TOLD in report_of(patched).notices


def test_a_batch_of_two_is_each_of_them(model):
    latent = torch.zeros(2, *CASE.latent)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))

    def sampled(noise: torch.Tensor) -> torch.Tensor:
        for _ in range(2):  # then both sizes are known
            result = comfy.sample.sample(
                cached(model, PLAN), noise, 8, 2.0, "euler", "simple", CASE.cond(1), CASE.cond(2), torch.zeros_like(noise),
                disable_pbar=True,
            )  # fmt: skip
        return result

    both = sampled(noise)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], sampled(noise[i : i + 1]), atol=1e-4, rtol=1e-4)


# -- ControlNet -------------------------------------------------------------------------------------------


class Control(comfy.controlnet.ControlBase):
    """Returns residuals in the first `calls` calls of a sampling, then none."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def get_control(self, *_args: Any) -> dict | None:
        self.left -= 1
        return {"output": []} if self.left >= 0 else None

    def copy(self) -> Control:
        return self


@pytest.mark.parametrize("calls, expected", [(8, "FFFFFFFF"), (4, "FFFFFaFa")])
def test_where_a_controlnet_is_given_nothing_is_skipped(model, calls, expected):
    control = Control(calls)
    case = CASE._replace(cond=text(7, 24, control=control, control_apply_to_uncond=True))
    patched = cached(model, PLAN)
    result = sample(case, patched)
    assert kinds(patched) == expected and report_of(patched).notices[0] == TOLD
    assert (
        len(report_of(patched).notices) == 2 and "a ControlNet, which a skipped evaluation would not see" in report_of(patched).notices[1]
    )
    assert torch.equal(result, sample(CASE, model)) == (expected == "F" * 8)
    assert report_of(patched).peak_bytes == report_of(patched).predicted_bytes


# -- plain torch, of any shape -------------------------------------------------------------------------------


SIGMAS = (1.0, 0.8, 0.5)


def forecast(network, compute, places: Places, predictor: Predictor = Taylor(1), order=(("a", "b"),) * 3):
    """Makes two full evaluations and a skipped one. `compute` answers at a time; `order` has the conds of each."""
    run = CacheRun(
        Strategy(Given(Plan.parse("FFa")), predictor),
        RunStart(network, find_family(network), Timeline([*SIGMAS, 0.0]), range(3), places=places),
    )
    outputs = []
    with torch.no_grad():
        for sigma, conds in zip(SIGMAS, order):
            with run.evaluation(sigma):
                run.cond_batch()
                outputs.append(run.model_call(ModelCall(network, conds, "same"), lambda t=sigma: compute(t)))
    return outputs, run.close(is_complete=True)


@pytest.mark.parametrize("grid", [(7,), (3, 4), (2, 3, 4)], ids=lambda grid: f"{len(grid)} axes")
def test_the_output_may_have_any_grid_and_other_channels_than_the_input(grid):
    network, x, places = EarlyReader(6, 4), torch.randn(2, 6, *grid), Places()
    for _ in range(2):  # the place is known after the first run
        outputs, report = forecast(network, lambda t: network(x, torch.full((2,), t)), places)
    assert [e.kind.value for e in report.evaluations] == ["F", "F", "a"]
    assert report.place == f"whole output ({WHY})" and outputs[2].shape == (2, 4, *grid)
    torch.testing.assert_close(outputs[2], outputs[1] + (outputs[1] - outputs[0]) * (0.3 / 0.2))
    tokens = 2 * int(np.prod(grid))
    assert report.peak_bytes == report.predicted_bytes == 2 * tokens * 4 * 4
    width = EarlyReader.width
    assert [e.macs for e in report.evaluations] == [tokens * (6 * width + 3 * width * width + width * 4)] * 2 + [0.0]


def test_lists_of_latents_are_kept_whole():
    """The host packs video and sound into one tensor. Here (y, z) are forecast separately."""
    network, places = VideoAndSound(), Places()
    video, sound = torch.randn(2, 4, 2, 3), torch.randn(2, 3, 5)
    for _ in range(2):
        outputs, report = forecast(network, lambda t: packed(network([video, sound], torch.full((2,), t))), places)
    assert [e.kind.value for e in report.evaluations] == ["F", "F", "a"] and report.place.startswith("whole output")
    torch.testing.assert_close(outputs[2], outputs[1] + (outputs[1] - outputs[0]) * (0.3 / 0.2))
    assert outputs[2].shape == (2, 1, 4 * 6 + 3 * 5)
    assert report.peak_bytes == report.predicted_bytes == 2 * 2 * (4 * 6 + 3 * 5) * 4


def test_a_cond_gets_its_own_output_wherever_in_the_batch_it_is():
    network, x, places = EarlyReader(4, 4), torch.randn(2, 4, 7), Places()
    for order in ([("a", "b")] * 3, [("a", "b"), ("a", "b"), ("b", "a")]):
        outputs, report = forecast(network, lambda t: network(x, torch.full((2,), t)), places, Reuse(), order)
    assert report.evaluations[2].kind.value == "a"
    assert torch.equal(outputs[2], outputs[1].flip(0)) and not torch.equal(*outputs[2])


def test_a_model_that_swaps_its_halves_has_one_slot_for_both_conds():
    """A place is proved inside Hunyuan3D 2.1. Both conds are kept together in their order, and are of no use in the other order."""
    network = network_of(hunyuan3d_2_1())
    x, context, places = torch.randn(2, 64, 24), torch.randn(2, 9, 24), Places()
    for order, kind in ((("a", "b"), "a"), (("b", "a"), "F")):
        outputs, report = forecast(
            network, lambda t: network(x * t, torch.ones(2), context=context), places, Reuse(), [("a", "b"), ("a", "b"), order]
        )
        assert report.place == "found and proved: skips blocks" and report.evaluations[2].kind.value == kind
        assert not torch.equal(*outputs[2]) and report.notices == ["nothing could be skipped in this run"] * (kind == "F")
        plain = network(x * SIGMAS[2], torch.ones(2), context=context)
        assert torch.equal(outputs[2], plain) == (kind == "F")


def test_a_network_without_blocks_is_computed_in_full():
    network, x, places = Nothing(), torch.randn(2, 4, 7), Places()
    outputs, report = forecast(network, lambda t: network(x, torch.full((2,), t)), places)
    assert [e.kind.value for e in report.evaluations] == ["F"] * 3 and report.peak_bytes == 0
    assert torch.equal(outputs[2], network(x, torch.full((2,), 0.5)))
    reason = "it has no list of blocks that each run once, in order"
    assert report.place == f"not cached: {reason}"
    assert report.notices == [f"nothing of this model can be cached, as {reason}: computed in full, without the cache"]
