"""Carries out one sampling run: decides the kind of each evaluation once, answers its model calls, frees everything at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .accounts import Accounts
from .corrector import Corrector
from .discovery.places import Known, Places
from .discovery.proof import own_random_numbers
from .engine import (
    EngineCall,
    Slot,
    SlotTable,
    TokenSelection,
    conservative,
    incremental,
    listening,
    resting,
    skipping,
)
from .engine.bound_layers import BoundLayers
from .engine.inputs import ModelInput
from .job import Job, possible_kind
from .meter import Evaluation, RunReport, Stopwatch, unsaid
from .model_call import ModelCall
from .networks import Networks, check
from .placing import Discovered, Placing
from .planning.kinds import Kind
from .refusals import UnknownInputError, UnsteadyError, UnsupportedCallError, failures_refused
from .run_start import RunStart
from .store import FeatureStore, StoreFullError
from .strategy import Strategy


class CacheRun:
    """The state of one sampling run. Make one when sampling starts and `close` it when sampling ends, however it ends.

    Model calls of one evaluation may come in several threads at once, each with a network of its own.

    Args:
        strategy: When to compute, and with what skipped evaluations are filled.
        start: What is known of the model and the sampler.
        say: Is called with every notice to the user, once.
        choose_device: Is called with the bytes of the features and returns the device to keep them on, None for the model's. Left out,
            `strategy.storage` decides.
        on_evaluation: Is called with every evaluation when it is over. Its time is known only at the end of the run.

    Raises:
        ValueError: For a plan that the model or the strategy cannot carry out, with a remedy.
    """

    def __init__(
        self,
        strategy: Strategy,
        start: RunStart,
        say: Callable[[str], None] = lambda _text: None,
        choose_device: Callable[[int], torch.device | None] | None = None,
        on_evaluation: Callable[[Evaluation], None] = lambda _evaluation: None,
    ) -> None:
        timeline, family, unrecorded = start.timeline, start.family, start.unrecorded
        self.plan = strategy.policy.plan(timeline.steps, start.window)
        check(strategy, self.plan, family)
        self.report = RunReport(strategy.name, str(self.plan), family.name)
        self.store = FeatureStore(strategy.storage, unrecorded)
        self.family = family
        self._strategy, self._timeline = strategy, timeline
        self._selection = TokenSelection(strategy.token_share, strategy.seed)
        self._stopwatch = Stopwatch(start.device)
        self._say, self._on_evaluation = say, on_evaluation
        self._corrector = Corrector(timeline, self.plan) if strategy.corrects and start.is_euler else None
        self._slots = SlotTable(self.store, strategy.predictor.history)
        self._networks = Networks(strategy, self.plan, family)
        places = Places() if start.places is None else start.places
        self._placing = Placing(family, places, strategy.predictor.uses_input, unrecorded)
        self._layers = BoundLayers(family, strategy.factors, unrecorded)
        self._accounts = Accounts(self.plan, self.report, self.store, choose_device)
        self._marks: list[tuple[Any, Any]] = []
        self._evaluation = Evaluation(-1, 0, 0.0, Kind.FULL)
        self._sigma, self._time = float("inf"), 1.0
        self._kind = Kind.FULL
        self._is_disabled = self._lacks_input = False
        self._is_explained = False  # whether the user was notified why calls are computed in full
        self._weights: dict[Hashable, Hashable] = {}  # of the last call with a cond, by cond
        self._is_owed = False  # whether another node answered a full evaluation, so that the next one is full
        self._lock = threading.RLock()  # for what calls in several threads share; not held while the model runs
        for text in strategy.notices:
            self.notify(text)

    @contextmanager
    def evaluation(self, sigma: float) -> Iterator[None]:
        """Begins and ends one evaluation of the sampler, at noise level `sigma`."""
        before, step = self._evaluation.step, self._timeline.step_of(sigma)
        self._look_back()
        self._kind = self.plan[step]
        if self._strategy.first_only and self.report.evaluations and before == step:
            self._kind = Kind.SKIPPED
        if self._is_owed or any(self.plan[missed] is Kind.FULL for missed in range(before + 1, step)):
            self._kind = Kind.FULL
        if sigma > self._sigma * (1 + 1e-6):
            self.notify(
                "the noise level rose between two evaluations: the second is computed in full, and the cache starts again from there"
            )
            self._slots.clear()
            self._kind = Kind.FULL
        self._sigma, self._time = sigma, self._timeline.time_of(sigma)
        self._evaluation = Evaluation(len(self.report.evaluations), step, sigma, planned=self.plan[step])
        self.report.evaluations.append(self._evaluation)
        self._slots.begin(self._evaluation.index)
        self._selection.begin(self._evaluation.index)
        start = self._stopwatch.mark()
        try:
            yield
        finally:
            self._marks.append((start, self._stopwatch.mark()))
            self._is_owed = self._kind is Kind.FULL and self._evaluation.kind is not Kind.FULL
            self._evaluation.cache_bytes = self.store.bytes
            self._on_evaluation(self._evaluation)

    def corrected(self, latent: Tensor, denoised: Tensor) -> Tensor:
        """Returns what the sampler gets for an evaluation of `latent`: `denoised` (after guidance), corrected where `Corrector` says so."""
        return denoised if self._corrector is None else self._corrector.answer(self._evaluation, latent, denoised)

    def cond_batch(self) -> None:
        """Begins a pass over the conds. The first one of an evaluation is the sampler's own, others are guidance (SLG, PAG …)."""
        self._slots.next_pass()

    def model_call(self, call: ModelCall, compute: Callable[[], Tensor]) -> Tensor:
        """Returns the answer to one model call. `compute` runs the host's model; it may be called more than once, or not at all."""
        if not self._may_cache(call):
            return self._past_the_cache(call, compute)
        try:
            watched = None if self._placing.known(call) is not None else self._placing.discover(call, compute, self._evaluation.index)
            job = self._decided(call, compute, watched)
            return self._past_the_cache(call, compute, watched) if job is None else self._answer(job)
        except StoreFullError:
            call.abandoned()
            self._disable()
            self.notify("no memory is left for the cache: the rest of this run is computed in full")
            return self._past_the_cache(call, compute)

    def _disable(self) -> None:
        with self._lock:
            self._is_disabled = self._is_explained = True
            self._slots.clear()
            self._layers.clear()

    def close(self, is_complete: bool = False) -> RunReport:
        """Frees every tensor, whatever state the run is in, and returns the finished report.

        `is_complete` is False after a cancel or an error. Times in the report are then 0, and it gets no more notices.
        """
        self.report.peak_bytes = self.store.peak_bytes
        self.report.is_complete = is_complete
        if is_complete:
            self._look_back()
            for text in unsaid(self.report, self._timeline, self._is_explained):
                self.notify(text)
        self._slots.clear()
        self._placing.clear()
        if self._corrector is not None:
            self.report.corrected = self._corrector.corrected
            self._corrector.clear()
        self._layers.clear()
        if is_complete:  # after an error the device may not answer, and the error matters more than times
            for evaluation, (start, end) in zip(self.report.evaluations, self._marks):
                evaluation.ms = self._stopwatch.milliseconds(start, end)
        self._marks.clear()
        return self.report

    def notify(self, text: str) -> None:
        """Notifies the user, once per run for each text."""
        with self._lock:
            if text in self.report.notices:
                return
            self.report.notices.append(text)
        self._say(text)

    def _look_back(self) -> None:
        """Checks what the evaluation before kept. This is done only now, as reading the values at once would make a GPU wait."""
        kept, answered = self._slots.checked()
        if not kept:
            self.notify("a full evaluation returned NaN or infinite values: they are not kept, and the next evaluation is computed in full")
            if self._corrector is not None:
                self._corrector.clear()
        if not answered:
            self.notify("some forecast values were too large for float16: the values of the last full evaluation were used in their place")
        if not self._slots.is_steady():
            self._disable()
            self.notify(
                "two full evaluations of this run have nothing in common, so nothing can be reused: "
                "the rest of this run is computed in full"
            )
        if self._lacks_input:
            self._lacks_input = False
            self._slots.without_inputs(self._strategy.predictor.history)

    # -- one call ---------------------------------------------------------------------------------------

    def _may_cache(self, call: ModelCall) -> bool:
        """Returns whether a call may use the cache. If not, the user is notified why."""
        with self._lock:
            bypass = "" if self._is_disabled else self._networks.unfit(call) or call.bypass
            if bypass:
                self._bypass(bypass)
            return not (self._is_disabled or bypass)

    def _decided(self, call: ModelCall, compute: Callable[[], Tensor], watched: Discovered | None) -> Job | None:
        """Decides what to do for a call. None where it must go past the cache, of which the user is notified."""
        known = self._placing.known(call)
        slots = None if known is None else self._slots_for(call, known)
        if known is None or slots is None:
            return None
        kind = possible_kind(self._kind, slots) if watched is None else Kind.FULL
        if kind is Kind.CONSERVATIVE and not self._placing.may_replay(call):
            kind = Kind.FULL
        return Job(kind, call, compute, known, slots, watched)

    def _slots_for(self, call: ModelCall, known: Known) -> list[Slot] | None:
        """Returns the slots of a call's conds, one for all where they cannot be told apart. None, with a notice, where there are none."""
        with self._lock:
            if known.place is None:
                self.report.place = f"not cached: {known.reason}"
                self._bypass(f"nothing of this model can be cached, as {known.reason}")
                return None
            self._describe(known)
            conds = [tuple(call.conds)] if known.place.is_joint else call.conds
            slots = self._slots.slots_of(conds, call.variant, (call.signature, call.weights, known.features))
            if slots is None:
                self._bypass("the same conditioning occurs twice in one evaluation")
            elif not all(slot.anchors for slot in slots) and self._kind is not Kind.FULL:
                self._explain(call)
            self._weights.update(dict.fromkeys(call.conds, call.weights))
        return slots

    def _bypass(self, reason: str) -> None:
        self._is_explained = True
        self.notify(f"{reason}: computed in full, without the cache")

    def _describe(self, known: Known) -> None:
        """Enters the place of the hidden state in the report, and notifies the user where it is only the whole output."""
        assert known.place is not None
        self.report.place = known.place.text
        if known.place.is_whole_output and (self.plan.has(Kind.SKIPPED) or self._strategy.first_only):
            self.notify(
                f"only the final output of this model can be cached ({known.place.reason}): "
                "skipped evaluations do not look at the current latent"
            )

    def _explain(self, call: ModelCall) -> None:
        """Notifies the user why nothing is kept yet, where an option or the weights changed since the evaluation before."""
        for cond in call.conds:
            if self._weights.get(cond, call.weights) != call.weights:
                self.notify("the weights change while sampling (hooks): after every change an evaluation is computed in full")
            others = self._slots.others_of(cond, call.variant)
            changed = sorted({name for other in others for name, _value in call.variant ^ other})
            if changed:
                self.notify(f"the option {', '.join(changed)} of the network changes while sampling: computed in full after every change")

    def _answer(self, job: Job) -> Tensor:
        """Runs the call as decided and judges its answer; if it fails, runs it in full, then past the cache. So the loop always ends."""
        while True:
            strategy = self._strategy  # read once, as another thread may replace it
            try:
                engine, result = self._run(job, strategy)
            except UnknownInputError as reason:
                job.call.abandoned()
                self._fill_without_input(job.slots, str(reason))
            except UnsupportedCallError as reason:
                self._refuse(job.call, reason)
                if job.kind is Kind.FULL:
                    return self._past_the_cache(job.call, job.compute)
            else:
                if self._judged(job, engine, result):
                    with self._lock:
                        self._accounts.add(self._evaluation, engine, strategy, job.kind)
                    return result
            job = job.in_full

    def _run(self, job: Job, strategy: Strategy) -> tuple[EngineCall, Tensor]:
        """Runs a call and returns it with its answer. Raises UnsupportedCallError where the host's model does not run that way."""
        engine = self._engine_call(job, strategy)
        if job.watched is not None and not engine.keeps_sublayers and engine.layers is None:
            return engine, self._kept(engine, job.watched)
        job.call.starting(job.kind)
        again = nullcontext() if job.watched is None else own_random_numbers()  # the watched evaluation has drawn them already
        mended = failures_refused() if job.kind is Kind.SKIPPED else nullcontext()
        with mended, again, self._accounts.counting(engine, strategy, job.kind), self._engine_for(job.kind, engine, strategy):
            return engine, job.compute()

    def _judged(self, job: Job, engine: EngineCall, result: Tensor) -> bool:
        """Returns whether to use an answer. Makes the proofs that are due, and drops what a full evaluation kept where they fail."""
        call, compute, is_full, keeps = job.call, job.compute, job.kind is Kind.FULL, True
        if not engine.is_touched:
            self.notify("another node supplied the model's output in some evaluations; the cache could not use those")
        elif not engine.is_finished:
            self.notify("another node replaced the model's first or last block: computed in full, nothing cached")
            keeps = False
        elif is_full and engine.keeps_hidden and not self._placing.prove(call, compute, result, engine, self._evaluation.index):
            self.notify("the model behaves differently from when the cache examined it: it is examined again")
            keeps = False
        elif is_full and engine.keeps_sublayers and not self._placing.prove_replays(call, compute, result, engine, self.store):
            self._is_explained = True
            self.notify("this model's blocks do not compute what the cache expects: conservative evaluations are computed in full")
        if is_full and not keeps:
            for slot in engine.slots:  # what is kept does not belong together
                slot.reset(slot.signature)
        return is_full or keeps

    def _kept(self, engine: EngineCall, watched: Discovered) -> Tensor:
        """Keeps the hidden state of the watched evaluation and returns its answer."""
        engine.given, engine.hidden, engine.is_touched = watched.given, watched.hidden, True
        self._entered(engine)
        engine.keep(watched.hidden)
        return watched.result

    def _refuse(self, call: ModelCall, reason: UnsupportedCallError) -> None:
        """Notifies the user that a use of the model is not known. Calls whose tokens change their order are not cached any more."""
        call.abandoned()
        if isinstance(reason, UnsteadyError):
            self._placing.refuse(call, str(reason))
        self._is_explained = True
        self.notify(f"the model was called in a way that the cache cannot handle ({reason}): computed in full")

    def _fill_without_input(self, slots: Sequence[Slot], reason: str) -> None:
        """Forecasts without the model's input from here on.

        What was kept lacks the embedded input. These slots are emptied now, all others before the next evaluation.
        """
        with self._lock:
            self.notify(f"the calibration is not used for skipped evaluations: {reason}")
            if self._strategy.predictor.uses_input:
                self._strategy = replace(self._strategy, predictor=self._strategy.predictor.without_input)
            self._lacks_input = True
            for slot in slots:
                slot.reset(slot.signature)
                slot.history = self._strategy.predictor.history
                slot.predicted_bytes = 0
            self.report.predicted_bytes = self._slots.predicted_bytes

    def _past_the_cache(self, call: ModelCall, compute: Callable[[], Tensor], watched: Discovered | None = None) -> Tensor:
        """Computes a call without the cache, or takes its answer from `watched` where it was computed already."""
        call.starting(Kind.FULL)
        if not self._networks.is_known(call.model):
            return compute()
        result, macs = (watched.result, watched.macs) if watched is not None else self._accounts.past_the_cache(call, compute)
        if macs:
            with self._lock:
                self._evaluation.add_call(Kind.FULL, macs, macs)
        else:
            self.notify("another node supplied the model's output in some evaluations; the cache could not use those")
        return result

    def _engine_for(self, kind: Kind, engine: EngineCall, strategy: Strategy) -> AbstractContextManager[None]:
        if kind is Kind.SKIPPED:
            return skipping(engine, strategy.predictor, self.store)
        if kind is Kind.CONSERVATIVE:
            return conservative(engine, self.store)
        return incremental(engine, self.store) if kind is Kind.INCREMENTAL else listening(engine)

    def _engine_call(self, job: Job, strategy: Strategy) -> EngineCall:
        """Describes a call to the engine. A full one keeps what the plan needs from this step on, as samplers may come back to it."""
        kind, call, known = job.kind, job.call, job.known
        step, is_full = self._evaluation.step, kind is Kind.FULL
        engine = EngineCall(call.model, known, self.family, job.slots, self._time, self._selection)
        engine.on_enter = self._entered
        engine.unrecorded = self.store.unrecorded
        engine.keeps_sublayers = is_full and self.plan.has(Kind.CONSERVATIVE, step)
        index = self._evaluation.index
        engine.keeps_hidden = is_full and not engine.place.is_whole_output and not self._placing.is_proved(call, known, index)
        engine.sketches = self._placing.sketches(call, index) if kind is Kind.SKIPPED else {}
        if strategy.predictor.uses_input:
            engine.given = ModelInput(self.family, call.model, self.store.unrecorded)
        if kind is Kind.INCREMENTAL or (is_full and self.plan.has(Kind.INCREMENTAL, step)):
            with self._lock:
                engine.layers = self._layers.of(call.model, known)
        if is_full and self._kind is kind and engine.keeps_sublayers and engine.layers is None and self._follows_a_skip(step):
            engine.rests = resting(engine)
        return engine

    def _follows_a_skip(self, step: int) -> bool:
        """Returns whether the step before is not full. Nothing rests in full steps in a row, as warm-ups and tails must be exact."""
        return step > 0 and self.plan[step - 1] is not Kind.FULL

    def _entered(self, engine: EngineCall) -> None:
        """Moves the factors to a call's device when it reaches its first block, and predicts the bytes of slots that are new."""
        new = [slot for slot in engine.slots if not slot.predicted_bytes]
        if engine.layers is None and not new:  # before the lock, which torch.compile cannot trace
            return
        with self._lock:
            self._layers.put_in_place(engine)
            if new:
                self._accounts.predict(engine, new, self._slots, self._strategy, self._evaluation.step)
