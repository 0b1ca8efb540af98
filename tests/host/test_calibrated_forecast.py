"""The increment-calibrated forecast agrees with direct computations in float64: statistics, closed form, search and engine."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from comfyui_duca.cache_core import CacheRun, Kind, ModelCall, Plan, RunStart, Timeline
from comfyui_duca.cache_core.calibration.statistics import ForecastModel, Moments
from comfyui_duca.cache_core.families.flux import FLUX
from comfyui_duca.cache_core.planning.policies import AlwaysCompute, FixedInterval
from comfyui_duca.cache_core.planning.search import PlanSearch
from comfyui_duca.cache_core.predictors import AUTO, Calibrated
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.cache_core.tuning.tape import TapedRun
from comfyui_duca.nodes import host
from comfyui_duca.nodes.demo_flux import encode_prompt, load_demo_model
from helpers.sampling import last_report, sample

N, TOKENS, D, C = 7, 50, 4, 9
TIMES = [1 - i / N for i in range(N)]


def trajectories(count=2, seed=0):
    """Returns smooth paths with noise: u (n, T, d), and z (n, T, C) that depends on u."""
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


def direct_fit(data, anchors, i, ridge_w=1e-3, ridge_a=1e-3):
    """Solves the least squares on the pooled tokens directly, in float64."""
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


SENSITIVITY = [0.5 + 0.3 * step for step in range(N)]


def search_of(data, window=range(N), made_up=0.5) -> PlanSearch:
    model = model_of(data)
    return PlanSearch(model.products(TIMES), SENSITIVITY, AUTO.weights, TIMES, window, AUTO.history, made_up)


@pytest.mark.parametrize("made_up", [0.0, 0.4])
def test_the_cost_of_a_plan_adds_errors_up_with_their_signs(made_up):
    """The reference uses the hidden states themselves. Full steps are 0, 1, 4 and 5, so only the first gap has two of them after it."""
    data = trajectories(3)
    z = torch.cat([z for _, z in data], 1).double().numpy()
    moved = np.zeros_like(z[0])
    for step, anchors in ((2, [0, 1]), (3, [0, 1]), (6, [0, 1, 4, 5])):
        forecast = np.tensordot(AUTO.weights([TIMES[a] for a in anchors], TIMES[step]), z[anchors], 1)
        if step < 4:
            line = z[1] + (step - 1) / 3 * (z[4] - z[1])
            forecast = (1 - made_up) * forecast + made_up * line
        moved += SENSITIVITY[step] ** 0.5 * (z[step] - forecast)
    assert search_of(data, made_up=made_up).cost({0, 1, 4, 5}) == pytest.approx((moved**2).sum() / moved.shape[0], rel=1e-5)


def test_the_last_gap_is_not_corrected():
    """With one full evaluation after it, no step is left to correct."""
    data = trajectories(3)
    plain, corrected = search_of(data, made_up=0.0), search_of(data, made_up=1.0)
    assert plain.cost({0, 1, 4}) == pytest.approx(corrected.cost({0, 1, 4}))
    assert plain.cost({0, 1, 4, 5}) != pytest.approx(corrected.cost({0, 1, 4, 5}), rel=0.01)


def test_noise_levels_of_one_time_are_searched_as_well():
    """Models with discrete timesteps have one time for several small noise levels, between which there is no line."""
    model = model_of(trajectories())
    times = [*TIMES[:4], TIMES[4], TIMES[4], TIMES[4]]
    search = PlanSearch(model.products(times), SENSITIVITY, AUTO.weights, times, range(N), AUTO.history, 0.5)
    assert all(np.isfinite(search.cost({0, 1, *rest})) for rest in ((4, 6), (4, 5, 6), (3, 5)))


def test_the_search_finds_what_trying_everything_finds():
    """With seven steps, all plans with four full evaluations can be tried. The search is greedy, so a near-best plan is enough."""
    for seed in range(5):
        search = search_of(trajectories(3, seed))
        costs = sorted(search.cost({0, *rest}) for rest in itertools.combinations(range(1, N), 3))
        found = search.plan(Plan.with_full({0, 2, 4, 6}, N))
        assert found.count(Kind.FULL) == 4 and found[0] is Kind.FULL
        assert search.cost(found.steps_of(Kind.FULL)) <= min(search.cost({0, 2, 4, 6}), costs[4])


def test_the_search_leaves_steps_outside_the_window_full():
    search = search_of(trajectories(), range(2, 5))
    plan = search.plan(Plan.with_full({0, 1, 2, 5, 6}, N))
    assert {0, 1, 5, 6} <= plan.steps_of(Kind.FULL) and plan.count(Kind.FULL) == 5
    assert set(search.order(plan)[:4]) == {0, 1, 5, 6}


def test_an_order_grows_and_shrinks_from_the_best_plan():
    """The step that is dropped, or added, is the best choice at that point."""
    search = search_of(trajectories(3))
    start = Plan.with_full({0, 2, 4}, N)
    order, middle = search.order(start), search.plan(start).steps_of(Kind.FULL)
    assert sorted(order) == list(range(N)) and set(order[:3]) == middle
    assert search.cost(order[:2]) == min(search.cost(middle - {step}) for step in middle - {0})
    assert search.cost(order[:4]) == min(search.cost(middle | {step}) for step in set(range(N)) - middle)


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


def record(model, steps=6, prompts=("red apple", "castle")):
    """Returns the tapes of uncached runs and their pictures."""
    runs = []
    recorded = model.clone()

    def open_run(patcher, sigmas, sampler):
        timeline = Timeline(sigmas.tolist(), host.model_times(patcher.get_model_object("model_sampling"), sigmas))
        start = RunStart(patcher.model.diffusion_model, FLUX, timeline, range(timeline.steps), patcher.load_device)
        # the input is kept only for predictors that use it
        runs.append(TapedRun(Strategy(AlwaysCompute(), Calibrated(model_of(trajectories()))), start))
        return runs[-1]

    host.listen(recorded, open_run, lambda run, result: run.close(result is not None))
    images = [sample(recorded, prompt=prompt, steps=steps) for prompt in prompts]
    return [run.tape for run in runs], images


def demo_model(model, directions=256, **more) -> ForecastModel:
    tapes, _ = record(model, **more)
    moments = Moments()
    for tape in tapes:
        for u, z in tape.trajectories():
            moments.add(u, z)
    return moments.compress(tapes[0].times, directions)


def test_recording_changes_nothing_and_keeps_what_the_model_saw(demo):
    """The reference is what hooks see: the tokens that enter the embedding, and the last block's output minus the embedding's."""
    network, seen = demo.model.diffusion_model, []
    hooks = [
        network.img_in.register_forward_hook(lambda _m, args, out: seen.append([args[0].clone(), out.clone()])),
        network.final_layer.register_forward_pre_hook(lambda _m, args: seen[-1].append(args[0].clone())),
    ]
    plain = sample(demo, steps=6)
    for hook in hooks:
        hook.remove()
    tapes, images = record(demo)
    assert torch.equal(images[0], plain) and not torch.equal(images[1], plain)
    assert len(tapes[0].times) == 6 and tapes[0].times[0] == 1.0 and tapes[0].times == tapes[1].times
    found = tapes[0].trajectories()
    assert len(found) == 2  # cond and uncond, which the host puts into one call
    for row, (u, z) in enumerate(found):
        assert torch.equal(u, torch.stack([tokens[row] for tokens, _, _ in seen]))
        assert torch.equal(z, torch.stack([(hidden - embedded)[row] for _, embedded, hidden in seen]))
    assert u.shape == (6, 144, 48) and z.shape == (6, 144, 256)


@torch.inference_mode()
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_a_skipped_evaluation_is_the_formula(demo, share):
    """hidden = h0 + Σ w z + (u - Σ w u) A, written out from tensors that hooks see. w is mixed from both sources."""
    model = demo_model(demo)
    sigmas = [1.0, 0.9, 0.7, 0.5, 0.3, 0.1]
    predictor = Calibrated(model, share)
    network = demo.model.diffusion_model
    run = CacheRun(
        Strategy(FixedInterval(9, warmup=4), predictor),
        RunStart(torch.nn.Module(), FLUX, Timeline([*sigmas, 0.0]), range(6)),
    )
    (context, extra), seen, firsts = encode_prompt("red apple")[0], [], []
    network.img_in.register_forward_hook(lambda _m, args, out: seen.append([args[0].clone(), out.clone()]))
    network.final_layer.register_forward_pre_hook(lambda _m, args: seen[-1].append(args[0].clone()))
    picture = torch.randn(1, 3, 48, 48)
    for sigma in sigmas[:5]:
        x = 0.6 * picture + 0.8 * torch.randn(1, 3, 48, 48)  # pictures that have nothing in common from step to step are not cached
        with run.evaluation(sigma):
            t = torch.tensor([sigma])
            run.model_call(ModelCall(network, ("a",), 0), lambda x=x, t=t: network(x, t, context, extra["pooled_output"]))
        firsts.append(seen[0])  # the first full evaluation is followed by skips that prove the place
        seen.clear()
    for hooks in (network.img_in._forward_hooks, network.final_layer._forward_pre_hooks):
        hooks.clear()
    assert [e.kind for e in run.report.evaluations] == [Kind.FULL] * 4 + [Kind.SKIPPED]
    seen = firsts
    own, prior = [0.0, *model.least_squares(sigmas[1:4], sigmas[4])], AUTO.weights(sigmas[:4], sigmas[4])
    weights = [share * a + (1 - share) * b for a, b in zip(own, prior)]
    z = [hidden - embedded for _, embedded, hidden in seen[:4]]
    u = [tokens for tokens, _, _ in seen]
    combined = sum(w * value for w, value in zip(weights, z))
    innovation = u[4] - sum(w * value for w, value in zip(weights, u[:4]))
    correction = innovation @ (model.fit(sigmas[:4], sigmas[4], weights).correction @ model.basis.T)
    expected = seen[4][1] + combined + correction
    assert correction.abs().max() > 0.1 * combined.abs().max()  # the correction is not small
    assert torch.allclose(seen[4][2], expected, atol=1e-3 * float(expected.abs().max()))


def test_bytes_of_a_calibrated_run_are_predicted(demo):
    strategy = Strategy(FixedInterval(2, warmup=1), Calibrated(demo_model(demo, 64)), name="calibrated")
    patched = host.attach(demo, strategy)
    sample(patched, steps=6)
    report = last_report(patched)
    assert report.predicted_bytes == report.peak_bytes == 2 * 3 * 144 * (256 + 48) * 4
    assert report.count(Kind.SKIPPED) == 3


def test_no_more_is_kept_than_the_weights_reach_back_to(demo):
    """There are nine full evaluations, and the prior uses five of them."""
    patched = host.attach(demo, Strategy(FixedInterval(3, warmup=8), Calibrated(demo_model(demo, 64))))
    sample(patched, steps=10)
    report = last_report(patched)
    assert report.predicted_bytes == report.peak_bytes == 2 * 5 * 144 * (256 + 48) * 4
