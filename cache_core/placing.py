"""Knows where the hidden state lies in every network of one run: finds it once in a process, proves it once in every run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from .discovery.layers import linear_layers, token_layers
from .discovery.places import Known, Places
from .discovery.proof import Found, Prover, is_equal, is_finite, own_random_numbers
from .discovery.state import untouched
from .discovery.trees import Path
from .discovery.watch import Watched, lists_of, watching
from .engine import EngineCall, conservative
from .engine.inputs import ModelInput
from .families import ModelFamily
from .model_call import ModelCall
from .overrides import Override, around, forward_overrides, uncompiled
from .planning.kinds import Kind
from .refusals import ModelFailedError, UnsupportedCallError, failures_refused
from .store import FeatureStore, Unrecorded, memory_ends

_Key = tuple[nn.Module, Hashable]
_REPLAY_SLACK = 10.0  # a replay does the same arithmetic for fewer tokens at a time, in every block, so its rounding differs more


@dataclass
class Discovered:
    """A full evaluation in which a network was watched.

    Args:
        result: Its answer.
        macs: Its multiply-adds.
        known: What was found out. None where that does not hold for later calls, as another node answered, for example.
        hidden: What the place keeps, each (B, L, C).
        given: The model's input, where the run keeps it.
    """

    result: Tensor
    macs: float
    known: Known | None = None
    hidden: Sequence[Tensor] = ()
    given: ModelInput | None = None


class Placing:
    """Knows the places of one run.

    Args:
        family: What is known of the model besides.
        places: What was found out in this process so far.
        keeps_input: Whether the run keeps the model's input.
        unrecorded: See `store.Unrecorded`.
    """

    def __init__(self, family: ModelFamily, places: Places, keeps_input: bool, unrecorded: Unrecorded) -> None:
        self._family, self._places, self._keeps_input, self._unrecorded = family, places, keeps_input, unrecorded
        self._proved: dict[_Key, int] = {}  # evaluation of the last proof
        self._narrowed: dict[_Key, Known] = {}  # with fewer lists left out, or refused, for this run alone
        self._replayed: dict[_Key, bool] = {}
        self._sketches: dict[_Key, tuple[int, Mapping[Path, Tensor]]] = {}  # sketches of a proof, and its evaluation
        self._failed: dict[_Key, int] = {}  # first evaluation in which no place inside the network was found
        self._lock = threading.Lock()

    def known(self, call: ModelCall) -> Known | None:
        """Returns what was found out about calls like this one, None before anything was."""
        with self._lock:
            return self._narrowed.get(_key(call)) or self._places.of(*_key(call))

    def is_proved(self, call: ModelCall, known: Known, evaluation: int) -> bool:
        """Returns whether no proof is due in this evaluation.

        One is due in every run, and one more in the first run, as the first noise level may not show what the blocks do.
        """
        return _key(call) in self._proved and (known.is_confirmed or self._proved[_key(call)] == evaluation)

    def sketches(self, call: ModelCall, evaluation: int) -> Mapping[Path, Tensor]:
        """Returns the sketches (B, L, at most 8) of a proof in this evaluation or the one before, for the first skip, and forgets them.

        Empty if there was no proof, or an older one, which shows nothing, as another latent was embedded.
        """
        proved, sketches = self._sketches.pop(_key(call), (evaluation, {}))
        return sketches if evaluation - proved <= 1 else {}

    def refuse(self, call: ModelCall, reason: str) -> None:
        """Caches nothing of calls like this one, from here on in this run."""
        known = self.known(call)
        assert known is not None, "only what is known is carried out"
        self._narrowed[_key(call)] = replace(known, place=None, reason=reason)

    def clear(self) -> None:
        """Frees every tensor."""
        self._sketches.clear()

    def discover(self, call: ModelCall, compute: Callable[[], Tensor], evaluation: int) -> Discovered:
        """Computes the call in full while watching it, and finds its place.

        A place inside the network is looked for in two evaluations of a run before the whole output is used instead, as some hosts compute
        something else the first time.

        Raises:
            StoreFullError: Where memory ends meanwhile.
        """
        with memory_ends():  # all this is done for the cache: after a failure the host's evaluation is computed again without it
            return self._discovered(call, compute, evaluation)

    def _discovered(self, call: ModelCall, compute: Callable[[], Tensor], evaluation: int) -> Discovered:
        call.starting(Kind.FULL)
        layers = self._layers(call.model)
        given, sublayers = self._input(call.model), list[tuple[int, int]]()
        overrides = [*(given.overrides() if given is not None else ()), *self._noting_sublayers(call.model, sublayers)]
        with forward_overrides(overrides), watching(call.model, layers, self._unrecorded, self._places.bookkeeping) as watched:
            result = compute()
        discovered = Discovered(result, watched.macs)
        if watched.output is None:
            return discovered
        prover = Prover(call.model, _again(call, compute), result, len(call.conds), self._unrecorded, self._places.bookkeeping)
        found = prover.find(watched)
        with self._lock:
            is_inside = found.place is not None and not found.place.is_whole_output
            if not found.is_lasting or (not is_inside and self._failed.setdefault(_key(call), evaluation) == evaluation):
                return discovered
            discovered.known = self._described(call, watched, found, prover.rows)
            discovered.known.sublayers = tuple((tokens // prover.rows, channels) for tokens, channels in sublayers)
            self._places.remember(*_key(call), discovered.known)
            self._sketches[_key(call)] = evaluation, prover.sketches
            if given is None:  # otherwise `prove` must still show whether a skip leaves the embedded input as it is
                self._proved[_key(call)] = evaluation
        discovered.hidden = [tensor.clone() for tensor in found.hidden]
        discovered.given = given
        return discovered

    def prove(self, call: ModelCall, compute: Callable[[], Tensor], answer: Tensor, engine: EngineCall, evaluation: int) -> bool:
        """Returns whether the place still holds, after a full evaluation that kept copies of its hidden state. If not, it is forgotten.

        True also for an answer with NaN or infinite values, which proves nothing. Where a skip changes the embedded input, the place
        leaves out fewer lists of blocks from here on.

        Args:
            call: The call.
            compute: Runs it again on the same inputs.
            answer: Its answer in the full evaluation.
            engine: The full evaluation as the engine saw it.
            evaluation: Index of the evaluation.

        Raises:
            StoreFullError: Where memory ends meanwhile.
        """
        prover = Prover(call.model, _again(call, compute), answer, len(call.conds), self._unrecorded, self._places.bookkeeping)
        if not is_finite(answer):
            return True  # it proves nothing, and what was kept is dropped anyway
        given = self._input(call.model)
        with memory_ends(), forward_overrides(given.overrides() if given is not None else ()):
            holds = prover.holds(engine.place, engine.hidden)
        with self._lock:
            if not holds:
                self._places.forget(*_key(call))
                self._narrowed.pop(_key(call), None)
                return False
            engine.known.is_confirmed |= self._proved.get(_key(call), evaluation) != evaluation
            self._proved[_key(call)] = evaluation
            self._sketches[_key(call)] = evaluation, prover.sketches
        self._narrow(call, engine.known, engine.given, given)
        return True

    def prove_replays(self, call: ModelCall, compute: Callable[[], Tensor], answer: Tensor, full: EngineCall, store: FeatureStore) -> bool:
        """Returns whether conservative evaluations answer as full ones do. Is called after a full evaluation that kept sublayers.

        The same call is evaluated conservatively: as nothing has changed, its answer must be the same. This is tried once in a run, and
        leaves the kept features as they are. True also where the replay itself refuses the call, as it does so again when it is due.

        Args:
            call: The call.
            compute: Runs it again on the same inputs.
            answer: Its answer in the full evaluation.
            full: The full evaluation as the engine saw it.
            store: Holds the features.

        Raises:
            StoreFullError: Where memory ends meanwhile.
        """
        if _key(call) not in self._replayed and is_finite(answer):
            trial = replace(full, layers=None, given=None, rests=frozenset(), on_enter=lambda _call: None, is_trial=True)
            try:
                call.starting(Kind.CONSERVATIVE)
                alone = untouched(call.model, self._places.bookkeeping)
                with memory_ends(), own_random_numbers(), alone, uncompiled(), failures_refused(), conservative(trial, store):
                    again = compute()
                kept_in = store.format.dtype or full.dtype  # fewer digits allow no better answer
                same = is_equal(answer, again, full.dtype, _REPLAY_SLACK) or is_equal(answer, again, kept_in)
            except UnsupportedCallError as reason:  # the user is notified of a replay's own refusals when it is due
                call.abandoned()
                same = not isinstance(reason, ModelFailedError)
            with self._lock:
                self._replayed[_key(call)] = same
        return self.may_replay(call)

    def may_replay(self, call: ModelCall) -> bool:
        """Returns False where a trial has shown that conservative evaluations do not answer as full ones do."""
        return self._replayed.get(_key(call), True)

    def _narrow(self, call: ModelCall, known: Known, full: ModelInput | None, skipped: ModelInput | None) -> None:
        """Leaves fewer lists out where a skip changes the embedded input, as the blocks that it depends on must run."""
        if full is None or skipped is None or full.embedded is None or skipped.embedded is None or known.place is None:
            return
        if not is_equal(full.embedded, skipped.embedded, known.place.kept[0].dtype):
            with self._lock:
                fewer = known.place.since(self._family.stacks[0].path)
                self._narrowed[_key(call)] = replace(known, place=fewer, costs={Kind.FULL: known.macs})

    def _input(self, network: nn.Module) -> ModelInput | None:
        return ModelInput(self._family, network, self._unrecorded) if self._keeps_input else None

    # -- what is watched --------------------------------------------------------------------------------

    def _layers(self, network: nn.Module) -> dict[Any, nn.Module]:
        return {key: layer for path, blocks in lists_of(network).items() for key, layer in linear_layers(path, blocks)}

    def _noting_sublayers(self, network: nn.Module, kept: list[tuple[int, int]]) -> list[Override]:
        """Returns the overrides that note the number of tokens (of all rows) and channels of what conservative evaluations would keep."""
        if not self._family.is_conservative:
            return []
        overrides: list[Override] = []
        for stack, _, block in self._family.placed(network):
            for site in stack.sites_of(block):
                width = None if site.width is None else site.width(block)

                def note(tensor: Any, width: int | None = width) -> None:
                    if isinstance(tensor, Tensor):
                        kept.append((tensor[..., 0].numel(), tensor.shape[-1] if width is None else width))

                def note_first(args: tuple, _kwargs: dict, note: Callable[[Any], None] = note) -> None:
                    note(args[0] if args else None)

                module = attrgetter(site.module)(block)
                overrides.append((module, around(before=note_first) if site.source == "input" else around(after=note)))
        return overrides

    def _described(self, call: ModelCall, watched: Watched, found: Found, rows: int) -> Known:
        place = found.place
        known = Known(place, found.reason, len(call.conds), rows, watched.macs)
        known.costs[Kind.FULL] = watched.macs
        if place is None or place.is_whole_output:
            return known
        known.costs[Kind.SKIPPED] = found.skip_macs
        paths = {passed.path for passed in place.passed}
        inside = {key: specs for key, specs in watched.inputs.items() if key[0] in paths}
        known.layer_calls = {} if place.is_joint else token_layers(inside, rows, place.kept[0].rows)
        return known


def _key(call: ModelCall) -> _Key:
    return call.model, call.likeness


def _again(call: ModelCall, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Returns a function that runs the call once more, announced to the host as a skipped one."""

    def again() -> Tensor:
        call.starting(Kind.SKIPPED)
        try:
            return compute()
        except BaseException:
            call.abandoned()
            raise

    return again
