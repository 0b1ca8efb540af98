"""The increment-calibrated forecast: statistics, closed form, search and engine against direct computations in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from comfyui_duca.cache_core import CacheRun, Kind, ModelCall, Timeline, find_family
from comfyui_duca.cache_core.calibration.recording import Recording
from comfyui_duca.cache_core.calibration.search import PlanSearch
from comfyui_duca.cache_core.calibration.statistics import ForecastModel, Moments
from comfyui_duca.cache_core.families.flux import FLUX
from comfyui_duca.cache_core.policies import FixedInterval
from comfyui_duca.cache_core.predictors import Calibrated
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes import host
from comfyui_duca.nodes.demo_flux import encode_prompt, load_demo_model
from host import sample

N, TOKENS, D, C = 7, 50, 4, 9
TIMES = [1 - i / N for i in range(N)]


def trajectories(count=2, seed=0):
    """Smooth paths with noise: u (n, T, d) and z (n, T, C) that depends on u."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        u = torch.randn(N, TOKENS, D, generator=generator).cumsum(0)
        mixed = u @ torch.randn(D, C, generator=generator)
        result.append((u, mixed + 0.3 * torch.randn(N, TOKENS, C, generator=generator).cumsum(0)))
    return result


def model_of(data, rank=C) -> ForecastModel:
    moments = Moments()
    for u, z in data:
        moments.add(u, z)
    return moments.compress(TIMES, rank)


def direct_fit(data, anchors, i, ridge_w=1e-6, ridge_a=1e-3):
    """Least squares written out on the pooled tokens, in float64."""
    u = torch.cat([u for u, _ in data], 1).double().numpy()
    z = torch.cat([z for _, z in data], 1).double().numpy()
    count = u.shape[1]
    past = z[anchors].reshape(len(anchors), -1)
    gram = past @ past.T / count
    w = np.linalg.solve(gram + ridge_w * np.diag(np.diag(gram)), past @ z[i].ravel() / count)
    du, dz = u[i] - np.tensordot(w, u[anchors], 1), z[i] - np.tensordot(w, z[anchors], 1)
    s, g = du.T @ du / count, du.T @ dz / count
    a = np.linalg.solve(s + ridge_a * np.diag(s).mean() * np.eye(D), g)
    return w, a, ((dz - du @ a) ** 2).sum() / count


@pytest.mark.parametrize(("anchors", "i"), [([0], 1), ([0, 1], 3), ([1, 2, 4], 6)])
def test_weights_correction_and_error_are_those_of_direct_least_squares(anchors, i):
    data = trajectories()
    fit = model_of(data).fit([TIMES[a] for a in anchors], TIMES[i])
    w, a, error = direct_fit(data, anchors, i)
    assert np.allclose(fit.weights, w, rtol=1e-5, atol=1e-6)
    assert np.allclose(fit.correction.numpy(), a, rtol=1e-4, atol=1e-5)
    assert fit.error == pytest.approx(error, rel=1e-4)


def test_a_rotated_basis_changes_nothing_and_a_short_one_little():
    data = trajectories()
    whole, short = model_of(data), model_of(data, rank=5)
    assert whole.basis.shape == (C, C) and short.basis.shape == (C, 5)
    assert torch.allclose(short.basis.T @ short.basis, torch.eye(5), atol=1e-5)
    a, b = whole.fit(TIMES[:3], TIMES[4]), short.fit(TIMES[:3], TIMES[4])
    assert a.weights == pytest.approx(b.weights)
    assert a.error <= b.error + 1e-9
    assert torch.allclose(b.correction, a.correction @ whole.basis.T @ short.basis, atol=1e-4)


def test_between_recorded_times_statistics_are_those_of_interpolated_features():
    data = trajectories()
    middle = (TIMES[3] + TIMES[4]) / 2
    fit = model_of(data).fit([TIMES[1], TIMES[2]], middle)
    blended = [(torch.cat((u, (u[3:4] + u[4:5]) / 2)), torch.cat((z, (z[3:4] + z[4:5]) / 2))) for u, z in data]
    w, a, error = direct_fit(blended, [1, 2], N)
    assert np.allclose(fit.weights, w, rtol=1e-5, atol=1e-6)
    assert np.allclose(fit.correction.numpy(), a, rtol=1e-4, atol=1e-5)
    assert fit.error == pytest.approx(error, rel=1e-3)


def test_coverage_ends_one_gap_beyond_the_recorded_times():
    model = model_of(trajectories())
    assert model.covers(1.0) and model.covers(TIMES[-1]) and model.covers(TIMES[-1] - 0.14)
    assert not model.covers(TIMES[-1] - 0.15) and not model.covers(1.2)


def test_the_search_finds_what_trying_everything_finds():
    """Seven steps: all plans of three full evaluations are few enough to try. The search is greedy, so near is enough."""
    model = model_of(trajectories(3))
    search = PlanSearch(model, TIMES, range(N))
    best = min(search.cost({0, *rest}) for rest in itertools.combinations(range(1, N), 2))
    plan = search.plan(3)
    chosen = {i for i in range(N) if plan[i] is Kind.FULL}
    assert len(chosen) == 3 and 0 in chosen
    assert search.cost(chosen) <= best * 1.1


def test_the_search_leaves_steps_outside_the_window_full():
    plan = str(PlanSearch(model_of(trajectories()), TIMES, range(2, 5)).plan(2))
    assert plan[:2] == "FF" and plan[5:] == "FF"


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


def record(model, steps=6, prompts=("red apple", "castle")):
    moments, runs = Moments(), []
    recorded = model.clone()

    def open_run(_patcher, _sigmas):
        runs.append(Recording(find_family(model.model.diffusion_model), moments, kept_tokens=100))
        return runs[-1]

    host.listen(recorded, open_run, lambda run, result: run.close(result is not None))
    images = [sample(recorded, prompt=prompt, steps=steps) for prompt in prompts]
    return moments, runs, images


def test_recording_changes_nothing_and_keeps_what_the_model_saw(demo):
    moments, runs, images = record(demo)
    assert torch.equal(images[0], sample(demo, steps=6))
    assert moments.tokens == 2 * 2 * 100  # prompts, cond and uncond, tokens kept of each
    assert moments.uz.shape == (6, 6, 48, 256)
    assert len(runs[0].sigmas) == 6 and runs[0].sigmas[0] == 1.0


def test_a_cancelled_recording_adds_nothing(demo):
    moments, runs = Moments(), []
    recorded = demo.clone()
    host.listen(recorded, lambda *_: runs.append(Recording(FLUX, moments)) or runs[-1], lambda run, result: run.close(result is not None))

    def stop(step, *_):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(recorded, steps=6, callback=stop)
    assert moments.gram is None


@torch.inference_mode()
def test_a_skipped_evaluation_is_the_formula(demo):
    """hidden = h0 + Σ w z + (u - Σ w u) A, written out from tensors that hooks see."""
    moments, _, _ = record(demo)
    sigmas = [1.0, 0.9, 0.7, 0.5, 0.3, 0.1]
    model = moments.compress(sigmas, 256)
    predictor = Calibrated(model.fit, model.basis)
    network = demo.model.diffusion_model
    run = CacheRun(Strategy(FixedInterval(9, warmup=3), predictor), Timeline([*sigmas, 0.0]), range(6), FLUX, torch.device("cpu"))
    (context, extra), seen = encode_prompt("red apple")[0], []
    network.img_in.register_forward_hook(lambda _m, args, out: seen.append([args[0].clone(), out.clone()]))
    network.final_layer.register_forward_pre_hook(lambda _m, args: seen[-1].append(args[0].clone()))
    for sigma in sigmas[:4]:
        x = torch.randn(1, 3, 48, 48)
        with run.evaluation(sigma):
            t = torch.tensor([sigma])
            run.model_call(ModelCall(network, ("a",), 0), lambda x=x, t=t: network(x, t, context, extra["pooled_output"]))
    for hooks in (network.img_in._forward_hooks, network.final_layer._forward_pre_hooks):
        hooks.clear()
    assert [e.kind for e in run.report.evaluations] == [Kind.FULL] * 3 + [Kind.AGGRESSIVE]
    fit = model.fit(sigmas[:3], sigmas[3])
    z = [hidden - embedded for _, embedded, hidden in seen[:3]]
    u = [tokens for tokens, _, _ in seen]
    combined = sum(w * value for w, value in zip(fit.weights, z))
    innovation = u[3] - sum(w * value for w, value in zip(fit.weights, u[:3]))
    expected = seen[3][1] + combined + innovation @ (fit.correction @ model.basis.T)
    assert torch.allclose(seen[3][2], expected, atol=1e-3 * float(expected.abs().max()))


def test_bytes_of_a_calibrated_run_are_predicted(demo):
    from dataclasses import dataclass, field

    from comfyui_duca.cache_core import Settings

    moments, runs, _ = record(demo)
    model = moments.compress(runs[0].sigmas, 64)

    @dataclass(frozen=True)
    class Fixed(Settings):
        chosen: Strategy = field(default_factory=Strategy)

        def strategy(self, steps):
            return self.chosen

    strategy = Strategy(FixedInterval(2, warmup=1), Calibrated(model.fit, model.basis), name="calibrated")
    patched = host.attach(demo, Fixed(chosen=strategy))
    sample(patched, steps=6)
    report = host.book_of(patched).last
    assert report.predicted_bytes == report.peak_bytes == 2 * 3 * 144 * (256 + 48) * 4
    assert report.count(Kind.AGGRESSIVE) == 3
