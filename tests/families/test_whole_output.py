"""Models of which only the output is kept: what is forecast, what is never skipped, what the user is told."""

from __future__ import annotations

from typing import Any

import comfy.controlnet
import comfy.sample
import comfy.supported_models
import numpy as np
import pytest
import torch
from comfyui_duca.cache_core import CacheRun, ModelCall, Plan, Settings, Timeline, find_family
from comfyui_duca.cache_core.families.whole_output import whole_output
from comfyui_duca.cache_core.policies import AlwaysCompute, Given
from comfyui_duca.cache_core.predictors import Chebyshev, Reuse, Taylor
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.cache_core.tuning import Wishes
from comfyui_duca.nodes import host
from comfyui_duca.nodes.calibrating import Sampling, calibrate
from comfyui_duca.nodes.report_text import report_text
from making import text, tiny
from test_every_family import STEPS, cached, kinds, network, report_of, sample
from zoo_flux_like import loaded
from zoo_newer_b import CASES, hunyuan3d_2_1

CASE = CASES[0]
PLAN = "FaFaFaFa"
TOLD = "of this model only the whole output can be cached: skipped evaluations do not see the present latent"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return hunyuan3d_2_1()


def watched(model, patched, case=CASE) -> tuple[torch.Tensor, list[tuple[float, torch.Tensor]]]:
    """What is sampled, and of every evaluation the model's time and the output that it gave, cond and uncond together."""
    seen, top = [], model.get_model_object("model_sampling")
    noisiest = float(top.timestep(torch.as_tensor(top.sigma_max)))

    def hook(_module, args, result):
        seen.append((float(args[1][0]) / noisiest, result.clone()))

    handle = network(model).register_forward_hook(hook)
    try:
        return sample(case, patched), seen
    finally:
        handle.remove()


def test_a_line_through_the_last_two_outputs(model):
    """First-order Taylor by hand: y + (y - x)·(t - t_y)/(t_y - t_x)."""
    _, seen = watched(model, cached(model, "FFaaFFFa", Taylor(1)))
    for now, before, last in ((2, 0, 1), (3, 0, 1), (7, 5, 6)):
        (t, answer), (t0, x), (t1, y) = seen[now], seen[before], seen[last]
        torch.testing.assert_close(answer, y + (y - x) * ((t - t1) / (t1 - t0)), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(answer, y, atol=1e-2)


def test_a_ridge_fit_of_polynomials_to_all_outputs(model):
    """Chebyshev by hand: T_0 … T_3 written out, least squares with the ridge as rows of its own, half of a line added."""
    _, seen = watched(model, cached(model, "FFFFaFFF", Chebyshev(degree=3, ridge=0.1, taylor_share=0.5)))
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
    inner = network(model)
    handles = [
        module.register_forward_hook(lambda *_: calls.append(1)) for module in (inner.x_embedder, inner.blocks[0], inner.final_layer)
    ]
    patched = cached(model, PLAN)
    sample(CASE, patched)
    for handle in handles:
        handle.remove()
    assert len(calls) == 3 * PLAN.count("F")
    assert all((e.macs == 0) == (e.kind.value == "a") and e.full_macs > 0 for e in report_of(patched).evaluations)


def test_only_the_output_is_kept(model):
    """Two conds of 24 latents with 64 numbers in float32, at one time or, for a line, at two."""
    for predictor, anchors in ((Reuse(), 1), (Taylor(1), 2)):
        patched = cached(model, PLAN, predictor)
        sample(CASE, patched)
        assert report_of(patched).peak_bytes == report_of(patched).predicted_bytes == anchors * 2 * 24 * 64 * 4
    assert report_of(patched).shape.lengths == {"img": 24, "txt": 9, "time": 1}


def test_the_user_is_told_once_in_every_run_that_skips(model, caplog):
    patched = cached(model, "FaaaFaaa")
    for run in (1, 2):
        sample(CASE, patched)
        assert report_of(patched).notices == [TOLD] and f"note         {TOLD}" in report_text(report_of(patched))
        assert caplog.text.count(f"DuCa Cache: {TOLD}.") == run
    uncached = host.attach(model, Settings(chosen=Strategy(AlwaysCompute())))
    sample(CASE, uncached)
    assert not report_of(uncached).notices
    auto = host.attach(model, Settings(mode="auto", speedup=2.0))
    sample(CASE, auto)
    assert report_of(auto).notices == [TOLD] and 0 < kinds(auto).count("a") < STEPS


def test_a_second_evaluation_of_a_step_that_is_always_skipped_is_told_of_too(model):
    strategy = Strategy(AlwaysCompute(), Reuse(), first_only=True)
    patched = host.attach(model, Settings(chosen=strategy))
    latent = torch.zeros(1, *CASE.latent)
    noise = comfy.sample.prepare_noise(latent, 5)
    comfy.sample.sample(model=patched, noise=noise, steps=8, cfg=2.0, sampler_name="heun", scheduler="simple", positive=CASE.cond(1),
                        negative=CASE.cond(2), latent_image=latent, seed=5, disable_pbar=True)  # fmt: skip
    assert "a" in kinds(patched) and TOLD in report_of(patched).notices


# -- both conds in one call -----------------------------------------------------------------------------


def test_both_conds_come_in_one_call(model):
    patched = cached(model, PLAN)
    sample(CASE, patched)
    assert [e.calls for e in report_of(patched).evaluations] == [1] * STEPS


def one_cond(model) -> torch.Tensor:
    """At CFG 1 there is no uncond."""
    latent = torch.zeros(1, *CASE.latent)
    noise = comfy.sample.prepare_noise(latent, 5)
    return comfy.sample.sample(model, noise, STEPS, 1.0, "euler", "simple", CASE.cond(1), CASE.cond(2), latent, disable_pbar=True)


def test_one_cond_alone_is_as_without_the_cache(model):
    """Older hosts fail."""
    patched = cached(model, "F" * STEPS)
    try:
        expected = one_cond(model)
    except ValueError as error:
        assert "not enough values to unpack" in str(error)
        with pytest.raises(ValueError, match="not enough values to unpack"):
            one_cond(patched)
        assert not report_of(patched).is_complete
    else:
        assert torch.equal(one_cond(patched), expected) and kinds(patched) == "F" * STEPS
    assert "forward" not in network(model).__dict__


def test_a_cond_gets_its_own_output_wherever_in_the_batch_it_is(model):
    """The model swaps its halves inside; what is kept belongs to the conds as they come and go."""
    inner = network(model)
    run = CacheRun(Strategy(Given(Plan.parse("Fa"))), Timeline([1.0, 0.5, 0.0]), range(2), find_family(inner), CPU)
    x, context = torch.randn(2, 64, 24), torch.randn(2, 9, 24)
    outputs = []
    with torch.no_grad():
        for sigma, order in ((1.0, ("a", "b")), (0.5, ("b", "a"))):
            with run.evaluation(sigma):
                run.cond_batch()
                call = ModelCall(inner, order, "same")
                outputs.append(run.model_call(call, lambda t=sigma: inner(x, torch.full((2,), t), context=context, control=None)))
    assert [e.kind.value for e in run.report.evaluations] == ["F", "a"]
    assert torch.equal(outputs[1], outputs[0].flip(0)) and not torch.equal(*outputs[0])


def test_a_batch_of_two_is_each_of_them(model):
    latent = torch.zeros(2, *CASE.latent)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))

    def sampled(noise: torch.Tensor) -> torch.Tensor:
        return comfy.sample.sample(
            cached(model, PLAN), noise, 8, 2.0, "euler", "simple", CASE.cond(1), CASE.cond(2), torch.zeros_like(noise), disable_pbar=True
        )

    both = sampled(noise)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], sampled(noise[i : i + 1]), atol=1e-4, rtol=1e-4)


# -- ControlNet -------------------------------------------------------------------------------------------


class Control(comfy.controlnet.ControlBase):
    """Gives something in the first `calls` calls of a sampling, then nothing."""

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
    case = CASE._replace(cond=text(9, 24, control=control, control_apply_to_uncond=True))
    patched = cached(model, PLAN)
    result = sample(case, patched)
    assert kinds(patched) == expected and report_of(patched).notices[0] == TOLD
    assert (
        len(report_of(patched).notices) == 2 and "a ControlNet, which a skipped evaluation would not see" in report_of(patched).notices[1]
    )
    assert torch.equal(result, sample(CASE, model)) == (expected == "F" * 8)
    assert report_of(patched).peak_bytes == report_of(patched).predicted_bytes


# -- of any shape -------------------------------------------------------------------------------------------


class Pointwise(torch.nn.Module):
    """(B, 6, …) and a time -> (B, 4, …): input of more channels than the output has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))

    def forward(self, x, t, context=None, **_more):
        return torch.einsum("oc,bc...->bo...", self.weight, x) * t.view(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize("grid", [(7,), (3, 4), (2, 3, 4)], ids=lambda grid: f"{len(grid)} axes")
def test_the_output_may_have_any_grid_and_other_channels_than_the_input(grid):
    family = whole_output("pointwise", lambda _model: True, lambda _model: 4, lambda _model, lengths: 24.0 * lengths["img"], contexts={})
    model, x = Pointwise(), torch.randn(2, 6, *grid)
    run = CacheRun(Strategy(Given(Plan.parse("FFa")), Taylor(1)), Timeline([1.0, 0.8, 0.5, 0.0]), range(3), family, CPU)
    outputs = []
    with torch.no_grad():
        for sigma in (1.0, 0.8, 0.5):
            with run.evaluation(sigma):
                run.cond_batch()
                call = ModelCall(model, ("a", "b"), "same")
                outputs.append(run.model_call(call, lambda t=sigma: model(x, torch.full((2,), t), control=None)))
    assert outputs[2].shape == (2, 4, *grid)
    expected = outputs[1] + (outputs[1] - outputs[0]) * (0.3 / 0.2)
    torch.testing.assert_close(outputs[2], expected)
    report = run.close(is_complete=True)
    assert report.peak_bytes == report.predicted_bytes == 2 * 2 * 4 * int(np.prod(grid)) * 4
    assert [e.macs for e in report.evaluations] == [48.0 * int(np.prod(grid))] * 2 + [0.0]


def test_the_hosts_loader_makes_the_structure_described():
    made = tiny(
        comfy.supported_models.Hunyuan3Dv2_1, image_model="hunyuan3d2_1", in_channels=64, hidden_size=64, depth=3, num_heads=16,
        qkv_bias=False, guidance_cond_proj_dim=None,
    )  # fmt: skip
    assert find_family(network(loaded(made))).name == "hunyuan3d_2_1"
    assert type(network(loaded(made))).__name__ == "HunYuanDiTPlain"


def test_there_is_nothing_to_calibrate(model):
    """Neither form of it: asking for the other must not be what the user is told to do."""
    sampling = Sampling([CASE.cond(0)], [CASE.cond(1)], torch.zeros(1, *CASE.latent), "euler", "simple", STEPS, 2.0, 0)
    for wishes in (Wishes(), Wishes(forecast=False, method="svd")):
        with pytest.raises(ValueError, match="nothing to calibrate in hunyuan3d_2_1 models"):
            calibrate(model, sampling, wishes, "")
