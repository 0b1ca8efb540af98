"""Where the hidden state is: found once in the process, proved once in every run and signature, and what happens where it stops holding."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from comfyui_duca.cache_core import CacheRun, Kind, ModelCall, Places, Plan, RunStart, StoreFormat, Timeline, find_family
from comfyui_duca.cache_core.discovery.proof import Prover
from comfyui_duca.cache_core.planning.policies import Given
from comfyui_duca.cache_core.predictors import Reuse
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes.demo_flux import encode_prompt, load_demo_model
from helpers.factors import exact_factors
from helpers.predictors import Innovating
from helpers.sampling import cached, kinds, last_report, linear_sites_of, sample, split_calls

CPU = torch.device("cpu")
STRATEGIES = {"auto": "FaFaFaFa", "paper": "FcacFcaF", "icc": "FiiFiiFF", "corrected": "FaFaFaFa"}


@pytest.fixture
def network():
    return load_demo_model().model.diffusion_model


@pytest.fixture
def counts(network) -> dict[str, int]:
    """How often the network was called, and how often its last block really ran."""
    found = dict.fromkeys(("network", "last"), 0)

    def count(name):
        return lambda *_: found.update({name: found[name] + 1})

    network.register_forward_hook(count("network"))
    network.single_blocks[5].norm.register_forward_hook(count("last"))  # of its attention: not reached by one that hands on or is replayed
    return found


def strategy_of(network, name: str) -> Strategy:
    factors = exact_factors(linear_sites_of(network)) if name == "icc" else None
    predictor = Innovating(torch.zeros(48, 256), history=1) if name == "corrected" else Reuse()
    return Strategy(Given(Plan.parse(STRATEGIES[name])), predictor, token_share=0.2, factors=factors)


class Driver:
    """Evaluations of one run of the demo network, the cond's number being its signature."""

    def __init__(self, network, strategy: Strategy, places: Places | None = None) -> None:
        steps = len(strategy.policy.given)
        self.network, self.levels = network, [1 - i / steps for i in range(steps)]
        self.run = CacheRun(strategy, RunStart(network, find_family(network), Timeline([*self.levels, 0.0]), range(steps), places=places))

    def given(self, step: int, cond: int = 0) -> tuple:
        """A picture that changes from step to step, as in a sampling; not another one."""
        (context, extra), generator = encode_prompt("red apple")[0], torch.Generator().manual_seed(cond)
        first, second = torch.randn(2, 1, 3, 24, 24 + 8 * cond, generator=generator)
        x = torch.lerp(first, second, step / 20)
        return x, torch.tensor([self.levels[step]]), context + 0, extra["pooled_output"]

    @torch.inference_mode()
    def evaluate(self, step: int, conds=(0,)) -> list[torch.Tensor]:
        with self.run.evaluation(self.levels[step]):
            self.run.cond_batch()
            return [
                self.run.model_call(ModelCall(self.network, (cond,), cond), lambda cond=cond: self.network(*self.given(step, cond)))
                for cond in conds
            ]

    def all(self, conds=(0,)) -> str:
        for step in range(len(self.levels)):
            self.evaluate(step, conds)
        return "".join(evaluation.letter for evaluation in self.run.close(is_complete=True).evaluations)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_known_place_costs_one_skip_in_every_run_and_signature(network, counts, name):
    """And finding it costs no full evaluation more, where a run keeps nothing of sublayers and layers."""
    strategy, places = strategy_of(network, name), Places()
    for number in range(3):
        counts.update(dict.fromkeys(counts, 0))
        assert Driver(network, strategy, places).all(conds=(0, 1)) == STRATEGIES[name]
        run = 2 * sum(STRATEGIES[name].count(letter) for letter in "Fi")  # a calibrated evaluation runs what is between the layers
        assert counts["last"] == run + (2 if number == 0 and name in ("paper", "icc") else 0)
        proofs = 2 if name == "paper" else 1  # there of conservative evaluations as well
        assert number == 0 or counts["network"] == 2 * (len(STRATEGIES[name]) + proofs)


def reading_an_early_block(network):
    """A node that lets the head see what an early single block gave as well: a skip would leave the head without it."""
    seen = []
    network.single_blocks[0].mlp_act.register_forward_hook(lambda _module, _args, result: seen.append(result[:, 12:, :256].clone()))
    network.final_layer.register_forward_pre_hook(lambda _module, args: (args[0] + seen.pop() if seen else args[0], *args[1:]))


def test_a_place_that_stops_holding_between_two_runs_is_noticed_at_once(network):
    strategy, places = strategy_of(network, "auto"), Places()
    first = Driver(network, strategy, places)
    first.evaluate(0)
    assert first.run.report.place == "found and proved: skips double_blocks, single_blocks"
    reading_an_early_block(network)
    later = Driver(network, strategy, places)
    (result,) = later.evaluate(0)
    with torch.inference_mode():
        assert torch.equal(result, network(*later.given(0)))
    assert any("it is examined again" in notice for notice in later.run.report.notices)
    assert not any(slot.anchors for slot in later.run._slots._slots.values())
    (result,) = later.evaluate(1)  # of a kind that there is nothing to go by for
    with torch.inference_mode():
        assert torch.equal(result, network(*later.given(1)))
    assert later.run.report.evaluations[1].kind is Kind.FULL
    assert later.run.report.place == "found and proved: skips double_blocks"  # what the head does without


def test_what_was_found_goes_with_its_network():
    network, places = load_demo_model().model.diffusion_model, Places()
    Driver(network, Strategy(Given(Plan.parse("Fa"))), places).all()
    known, gone = places.latest(network), weakref.ref(network)
    assert known is not None and len(places._known) == 1
    del network
    gc.collect()
    assert gone() is None and len(places._known) == 0
    assert known.place is not None and known.layer_calls  # they hold no modules


@pytest.mark.parametrize("name", STRATEGIES)
def test_random_numbers_are_those_of_an_uncached_run(network, name):
    """A network that draws some: in the first evaluation of the process, in that of a later run, and in the next one."""
    network.final_layer.register_forward_hook(lambda _module, _args, result: result + 0 * torch.randn(()))
    strategy, places = strategy_of(network, name), Places()
    for _ in range(2):
        driver = Driver(network, strategy, places)
        for step in range(2):
            torch.manual_seed(step)
            driver.evaluate(step)
            left = torch.get_rng_state()
            torch.manual_seed(step)
            with torch.inference_mode():
                network(*driver.given(step))
            assert torch.equal(left, torch.get_rng_state())
        driver.run.close()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("is_as_described", [True, False])
def test_replays_are_proved_whatever_sublayers_are_kept_in(network, dtype, is_as_described):
    """Another node may have replaced a block: what a replay makes of its parts is no longer what it gives."""
    own = network.double_blocks[1].forward
    if not is_as_described:
        network.double_blocks[1].forward = lambda *args, **kwargs: tuple(1.5 * stream for stream in own(*args, **kwargs))
    driver = Driver(network, replace(strategy_of(network, "paper"), storage=StoreFormat(dtype=dtype)))
    assert driver.all() == (STRATEGIES["paper"] if is_as_described else STRATEGIES["paper"].replace("c", "F"))
    assert any("do not compute what the cache expects" in notice for notice in driver.run.report.notices) is not is_as_described


def test_an_ancestral_sampler_gives_the_same_picture():
    """It computes everything, and draws its noise from the process's own generator."""
    model = load_demo_model()
    patched = cached(model, speedup=2.0)
    assert torch.equal(sample(patched, sampler="euler_ancestral", steps=6), sample(model, sampler="euler_ancestral", steps=6))
    assert kinds(last_report(patched)) == "F" * 6


@pytest.mark.parametrize("what", ["finding", "proving", "copying"])
@pytest.mark.parametrize("name", ["auto", "paper"])
def test_where_memory_ends_the_run_goes_on_past_the_cache(network, monkeypatch, what, name):
    strategy, places = strategy_of(network, name), Places()
    if what != "finding":
        Driver(network, strategy, places).evaluate(0)

    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("full")

    if what == "copying":
        monkeypatch.setattr(torch.Tensor, "clone", full)
    else:
        monkeypatch.setattr(Prover, "skipped", full)
    driver = Driver(network, strategy, places)
    results = [driver.evaluate(step)[0] for step in range(3)]
    monkeypatch.undo()
    report = driver.run.close(is_complete=False)
    assert "".join(evaluation.letter for evaluation in report.evaluations) == "FFF"
    assert any("no memory is left for the cache" in notice for notice in report.notices)
    with torch.inference_mode():
        for step, result in enumerate(results):
            assert torch.equal(result, network(*driver.given(step)))


def test_memory_that_ends_in_the_hosts_own_evaluation_is_the_hosts_to_hear_of(network, monkeypatch):
    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(network.single_blocks[2], "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        Driver(network, strategy_of(network, "auto")).evaluate(0)


def test_other_numbers_of_text_tokens_are_other_calls(monkeypatch):
    """Prompts of unequal length: in one run, and in the next one on the same network."""
    model = load_demo_model()
    context, extra = encode_prompt("castle")[0]
    longer = [[context.repeat(1, 2, 1)[:, :20], extra]]
    patched = cached(model, speedup=2.0)
    for more in ({}, {"negative": longer}, {"positive": longer}, {"positive": longer, "negative": longer}):
        sample(patched, steps=8, **more)
        report = last_report(patched)
        assert kinds(report) == report.plan and not report.notices
        assert report.predicted_bytes == report.peak_bytes
    plain = sample(patched, steps=8, positive=longer)
    split_calls(monkeypatch)
    assert torch.allclose(plain, sample(patched, steps=8, positive=longer), atol=1e-4)
