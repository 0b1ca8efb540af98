"""What holds for every model of the zoo, whether a file describes it or not. They are small and random, of the host's own classes."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import comfy.utils
import pytest
import torch
from checks import (
    assert_costs_are_what_torch_counts,
    assert_incremental_is_exact,
    assert_listening_changes_nothing,
    assert_skips_repeat,
    assert_the_family_is_known_once,
    sampled,
)
from comfyui_duca.cache_core import FAMILIES, Places, Settings, find_family
from comfyui_duca.cache_core.families import undescribed
from comfyui_duca.nodes import host
from comfyui_duca.nodes.host import starting
from helpers.predictors import Innovating
from runs import STEPS, cached, kinds, known_of, network, report_of, sample
from zoo import CASES, Case


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


@pytest.fixture(scope="module")
def model(case):
    return case.make()


@pytest.fixture(scope="module")
def plain(case, model) -> torch.Tensor:
    return sampled(case, model)


def state_of(model) -> tuple:
    """Returns what a run must leave as it is."""
    modules = list(network(model).modules())
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules]
    return [module.__dict__.get("forward") for module in modules], hooks, [id(weight) for weight in network(model).parameters()]


def test_the_family_is_known_once(case, model):
    assert_the_family_is_known_once(case, model)


def test_a_place_inside_is_found_and_proved(case, model):
    """The network was not seen before. The place is found in its first full evaluation; the report says so, and there is no notice."""
    place = known_of(case, model).place
    assert place is not None and not place.is_whole_output and place.text.startswith("found and proved: skips ")
    assert case.last(network(model)) is place.block(network(model), place.last), "the block that answers"
    patched = cached(model, "FaFaFaFa")
    sample(case, patched)
    report = report_of(patched)
    assert report.place == place.text and not report.notices
    assert all(e.macs < 0.8 * e.full_macs for e in report.evaluations if e.kind.value == "a")


def test_a_family_file_adds_nothing_to_what_is_skipped(case, model, monkeypatch):
    """With all files disabled the pictures are the same, and no more is kept or computed."""
    reports, results = [], []
    for described in (FAMILIES, ()):
        monkeypatch.setattr("comfyui_duca.cache_core.families.FAMILIES", described)
        monkeypatch.setattr(starting, "_places", Places())  # nothing is known from earlier tests
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
    assert_listening_changes_nothing(case, model, plain)


@pytest.mark.parametrize("plan", ["FaFaFaFa", "FFaaaaaa", "FaaaFaaa"])
def test_skipping_repeats_the_hidden_state(case, model, plain, plan):
    assert_skips_repeat(case, model, plain, plan)


def test_conds_in_calls_of_their_own_give_the_same(case, model, plain, monkeypatch):
    together = sample(case, cached(model, "FaFaFaFa"))
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_a, **_k: 0)
    try:
        alike = torch.allclose(sample(case, model), plain, atol=1e-3 * max(1.0, float(plain.std())), rtol=1e-3)
    except ValueError:  # the model takes its batch in halves
        alike = False
    if not alike:
        pytest.skip(f"the host itself cannot sample {case.name} so, or samples something else")
    patched = cached(model, "FaFaFaFa")
    apart = sample(case, patched)
    assert kinds(patched) == "FaFaFaFa" and all(evaluation.calls == 2 for evaluation in report_of(patched).evaluations)
    torch.testing.assert_close(apart, together, atol=1e-4 * max(1.0, float(together.std())), rtol=1e-4)


def test_incremental_evaluations_at_full_rank_are_the_uncached_ones(case, model, plain):
    known = known_of(case, model)
    if known.place.kept[0].rows is None:
        assert not known.layer_calls, "tokens have no axis of the batch"
        pytest.skip(f"{case.name} has no calibrated evaluation")
    assert assert_incremental_is_exact(case, model, plain)


def test_the_input_is_kept_for_calibrated_forecasts(case, model):
    """It has width d and as many tokens as the hidden state. What the embedding makes of it does not matter here."""
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
    assert_costs_are_what_torch_counts(case, model)


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
