"""What holds for every model of the zoo, described by a file or not: small random ones of the host's own classes."""

from __future__ import annotations

from itertools import pairwise

import comfy.sample
import comfy.samplers
import comfy.utils
import pytest
import torch
from comfy.nested_tensor import NestedTensor
from comfyui_duca.cache_core import FAMILIES, Places, Plan, Settings, find_family
from comfyui_duca.cache_core.discovery.places import Known
from comfyui_duca.cache_core.engine.linear_sites import Factors, LinearSite, find_linears
from comfyui_duca.cache_core.families import undescribed
from comfyui_duca.cache_core.policies import AlwaysCompute, Given
from comfyui_duca.cache_core.predictors import Predictor, Reuse
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes import host
from comfyui_duca.nodes.host import run_start
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import CASES, Case

STEPS = 8  # with fewer the user is told something, which a test would have to know


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


@pytest.fixture(scope="module")
def model(case):
    return case.make()


def network(model) -> torch.nn.Module:
    return model.model.diffusion_model


def sample(case: Case, model, steps: int = STEPS, **more) -> torch.Tensor:
    """A latent, or several packed one behind the other."""
    parts = isinstance(case.latent[0], tuple)
    latent = NestedTensor([torch.zeros(1, *shape) for shape in case.latent]) if parts else torch.zeros(1, *case.latent)
    noise = comfy.sample.prepare_noise(latent, 5)
    result = comfy.sample.sample(
        model, noise, steps, 2.0, "euler", "simple", case.cond(1), case.cond(2), latent, seed=5, disable_pbar=True, **more
    )
    return comfy.utils.pack_latents(result.unbind())[0] if parts else result


@pytest.fixture(scope="module")
def plain(case, model) -> torch.Tensor:
    result = sample(case, model)
    assert torch.isfinite(result).all() and result.std() > 0.05, "a model that says nothing tests nothing"
    return result


def cached(model, plan: str, predictor: Predictor = Reuse(), factors: Factors | None = None):
    return host.attach(model, Settings(chosen=Strategy(Given(Plan.parse(plan)), predictor, factors=factors)))


def report_of(patched):
    return host.book_of(patched).last


def kinds(patched) -> str:
    return "".join(evaluation.kind.value for evaluation in report_of(patched).evaluations)


def state_of(model) -> tuple:
    """What a run must leave as it is."""
    modules = list(network(model).modules())
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules]
    return [module.__dict__.get("forward") for module in modules], hooks, [id(weight) for weight in network(model).parameters()]


def known_of(case: Case, model) -> Known:
    """What is found out about its calls, cond and uncond as the host puts them."""
    patched = cached(model, "FF")
    sample(case, patched, 2)
    return report_of(patched).shape.known


def test_the_family_is_known_once(case, model):
    """By a file or by the name of its class."""
    names = [family.name for family in FAMILIES if family.matches(network(model))]
    assert names in ([], [case.name])
    family = find_family(network(model))
    assert family.name == (names[0] if names else undescribed(network(model)).name)
    assert all(stack.blocks(network(model)) for stack in family.stacks)


def test_a_place_inside_is_found_and_proved(case, model):
    """Of a network that was not seen before, in its first full evaluation; then the report says so, and nothing is said to the user."""
    place = known_of(case, model).place
    assert place is not None and not place.is_whole and place.text.startswith("found and proved: skips ")
    assert case.last(network(model)) is place.block(network(model), place.last), "the block that answers"
    patched = cached(model, "FaFaFaFa")
    sample(case, patched)
    report = report_of(patched)
    assert report.place == place.text and not report.notices
    assert all(e.macs < 0.8 * e.full_macs for e in report.evaluations if e.kind.value == "a")


def test_a_family_file_adds_nothing_to_what_is_skipped(case, model, monkeypatch):
    """With all of them disabled the pictures are the same, no more is kept and no more computed."""
    reports, results = [], []
    for described in (FAMILIES, ()):
        monkeypatch.setattr("comfyui_duca.cache_core.families.FAMILIES", described)
        monkeypatch.setattr(run_start, "_places", Places())  # nothing is known from before
        patched = cached(model, "FaFaFaFa")
        results.append(sample(case, patched))
        reports.append(report_of(patched))
    (with_file, without), names = reports, [report.family for report in reports]
    assert names[0] in (case.name, names[1]) and names[1] == undescribed(network(model)).name
    assert torch.equal(*results)
    assert without.place == with_file.place and without.peak_bytes <= with_file.peak_bytes
    for ours, bare in zip(with_file.evaluations, without.evaluations, strict=True):
        assert bare.macs / bare.full_macs <= ours.macs / ours.full_macs


def test_listening_changes_nothing(case, model, plain):
    patched = host.attach(model, Settings(chosen=Strategy(AlwaysCompute())))
    assert torch.equal(sample(case, patched), plain)
    assert kinds(patched) == "F" * STEPS and not report_of(patched).notices


def cloned(hidden):
    """With tokens one behind the other, as they are kept. Some blocks return several streams."""
    if isinstance(hidden, (list, tuple)):
        return type(hidden)(part.clone() if isinstance(part, torch.Tensor) else part for part in hidden)
    return hidden.clone(memory_format=torch.contiguous_format) if hidden.ndim == 3 else hidden.clone()


def repeated(case: Case, model, plan: str) -> torch.Tensor:
    """The same by a hook on the last block: it gives out its last full hidden state again, while all blocks run."""
    kept, calls = {}, []

    def hook(_module, _args, result):
        step, cond = divmod(len(calls), case.calls)
        calls.append(1)
        hidden = result if case.hidden is None else result[case.hidden]
        if plan[step] == "F":
            kept[cond] = cloned(hidden)
            return result
        again = cloned(kept[cond])  # text beside the image in one stream does not matter: only the image is read behind the last block
        return again if case.hidden is None else tuple(again if i == case.hidden else value for i, value in enumerate(result))

    handle = case.last(network(model)).register_forward_hook(hook)
    try:
        return sample(case, model)
    finally:
        handle.remove()


@pytest.mark.parametrize("plan", ["FaFaFaFa", "FFaaaaaa", "FaaaFaaa"])
def test_skipping_repeats_the_hidden_state(case, model, plain, plan):
    patched = cached(model, plan)
    result = sample(case, patched)
    assert kinds(patched) == plan and not report_of(patched).notices
    assert torch.equal(result, repeated(case, model, plan)) and not torch.equal(result, plain)


def test_conds_in_calls_of_their_own_give_the_same(case, model, plain, monkeypatch):
    together = sample(case, cached(model, "FaFaFaFa"))
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_a, **_k: 0)
    try:
        alike = torch.allclose(sample(case, model), plain, atol=1e-3 * max(1.0, float(plain.std())), rtol=1e-3)
    except ValueError:  # it takes its batch in halves
        alike = False
    if not alike:
        pytest.skip(f"the host itself cannot sample {case.name} so, or samples something else")
    patched = cached(model, "FaFaFaFa")
    apart = sample(case, patched)
    assert kinds(patched) == "FaFaFaFa" and all(evaluation.calls == 2 for evaluation in report_of(patched).evaluations)
    torch.testing.assert_close(apart, together, atol=1e-4 * max(1.0, float(together.std())), rtol=1e-4)


def sites_of(model, known: Known) -> list[LinearSite]:
    return find_linears(find_family(network(model)), known.linears, network(model))


def full_rank(model, known: Known) -> Factors:
    """Factors that lose nothing: each matrix itself, and the identity."""
    factors = {}
    for site in sites_of(model, known):
        weight = site.module.weight.detach()
        for part in site.parts:
            own = weight[part.rows or slice(None)]
            factors |= {f"{site.key(part)}.A": own.clone(), f"{site.key(part)}.B": torch.eye(own.shape[1])}
    return factors


def test_calibrated_evaluations_at_full_rank_are_the_uncached_ones(case, model, plain):
    known = known_of(case, model)
    if known.place.kept[0].rows is None:
        assert not known.linears, "tokens have no axis of the batch"
        pytest.skip(f"{case.name} has no calibrated evaluation")
    assert known.linears
    patched = cached(model, "FiiFiiFi", factors=full_rank(model, known))
    result = sample(case, patched)
    assert kinds(patched) == "FiiFiiFi" and not report_of(patched).notices
    torch.testing.assert_close(result, plain, atol=2e-4, rtol=2e-3)


class Innovating(Predictor):
    """Keeps the input beside every hidden state, as a calibrated forecast does: reuse, and what the input moved by."""

    history = 2
    uses_input = True

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix

    def weights(self, anchors, time):
        return Reuse().weights(anchors, time)

    def correction(self, anchors, time):
        return self.matrix

    @property
    def without_input(self):
        return Reuse()


def test_the_input_is_kept_for_calibrated_forecasts(case, model):
    """Of width d and as many tokens as the hidden state; how the embedding sees it is no business of ours."""
    if not find_family(network(model)).embed:
        pytest.skip(f"{case.name} has no calibrated forecast")
    patched = cached(model, "F" * STEPS, Innovating(torch.zeros(0)))
    sample(case, patched)
    d, c = report_of(patched).shape.input_channels, report_of(patched).shape.known.place.kept[0].shape[-1]
    assert d > 0
    nothing, something = (Innovating(scale * torch.ones(d, c)) for scale in (0.0, 0.01))
    results = []
    for predictor in (nothing, something):
        patched = cached(model, "FaFaFaFa", predictor)
        results.append(sample(case, patched))
        assert kinds(patched) == "FaFaFaFa" and not report_of(patched).notices
        assert report_of(patched).peak_bytes == report_of(patched).predicted_bytes
    assert not torch.equal(*results)


def test_bytes_are_predicted(case, model):
    patched = cached(model, "FaFaFaFa")
    sample(case, patched)
    report = report_of(patched)
    assert report.peak_bytes == report.predicted_bytes > 0


def test_multiply_adds_are_those_that_torch_counts(case, model):
    """What was counted once, in attention's fused form too, against a count of every later evaluation in its plain form.

    Within 3 %: hosts keep something of the text in a run's first call, which makes the others cheaper. In a run after the first: in that,
    what was found is proved in a later evaluation too.
    """
    sample(case, cached(model, "FFF"), 3)
    patched, totals = cached(model, "FFaFaF"), []
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not know the CPU's fused attention
        sample(case, patched, 6, callback=lambda *_args: totals.append(counter.get_total_flops() / 2))
    assert kinds(patched) == "FFaFaF"
    counted = [after - before for before, after in pairwise(totals)]  # the first evaluation has its proof beside it
    fewer = 0.001 * counted[0] if case.name == "minimax_h3" else 0.0  # at the first noise level video and sound have the same time
    assert [evaluation.macs for evaluation in report_of(patched).evaluations[1:]] == pytest.approx(counted, rel=0.03, abs=fewer)
    assert all(evaluation.full_macs == pytest.approx(counted[0], rel=0.03) for evaluation in report_of(patched).evaluations)


@pytest.mark.parametrize("moment", ["finished", "cancelled", "inside a block"])
def test_a_run_leaves_the_model_as_it_was(case, model, plain, moment):
    before, patched, calls = state_of(model), cached(model, "FaFaFaFa"), []

    def stop(*_args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    if moment == "finished":
        sample(case, patched)
    else:
        inner = next(module for module in case.last(network(model)).modules() if hasattr(module, "in_features"))
        hook = inner.register_forward_pre_hook(stop) if moment == "inside a block" else None
        with pytest.raises(KeyboardInterrupt):
            sample(case, patched, callback=stop if hook is None else None)
        if hook is not None:
            hook.remove()
    assert state_of(model) == before and torch.equal(sample(case, model), plain)


def test_a_mode_that_the_family_has_not_is_refused_before_sampling(case, model):
    family = find_family(network(model))
    if family.is_conservative:
        pytest.skip("it has them all")
    with pytest.raises(ValueError, match="conservative"):
        sample(case, host.attach(model, Settings(mode="paper", speedup=2.0)))
