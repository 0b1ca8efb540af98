"""Newer hosts record what a block allocates, and end the process if any of it outlives the block. The pack keeps within that.

The rules need no GPU: here the recorder is a dispatch mode that sees every allocation, and the host's module is a stand-in with its public
functions. Blocks of the demo model allocate new tensors for their results, so only allocations by this pack count.
"""

from __future__ import annotations

import gc
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfyui_duca.cache_core import Plan, Settings, StoreFormat
from comfyui_duca.cache_core.planning.policies import Given
from comfyui_duca.cache_core.refusals import UnsupportedCallError
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.cache_core.tuning import Wishes
from comfyui_duca.nodes import host
from comfyui_duca.nodes.demo_flux import encode_prompt, load_demo_model
from comfyui_duca.nodes.host import recording
from comfyui_duca.nodes.sidecars.calibrating import Sampling, calibrate
from helpers.factors import exact_factors
from helpers.predictors import Innovating
from helpers.sampling import cached, kinds, last_report, linear_sites_of, sample
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACK = Path(__file__).resolve().parents[2]
OURS = (str(PACK / "cache_core"), str(PACK / "nodes"))


class Recorder(TorchDispatchMode):
    """Watches allocations in the blocks of a network, and checks a block's at its end, as the host's recorder does.

    Attributes:
        kept: (where, shape) of each allocation by this pack in a recorded block, while not paused, that outlived the block.
        paused: Number of pauses.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.kept: list[tuple[str, tuple]] = []
        self.paused = 0
        self._is_paused = False
        self._open: list[tuple[StorageWeakRef, str, tuple]] | None = None
        self._network = network

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # copies to system memory are not recorded on a GPU
        is_to_system_memory = function is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") == torch.device("cpu")
        if self._open is not None and not self._is_paused and not is_to_system_memory:
            where = _ours()
            given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            for tensor in tree_leaves(result) if where else ():
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:  # a view allocates nothing
                    self._open.append((StorageWeakRef(tensor.untyped_storage()), where, tuple(tensor.shape)))
        return result

    @contextmanager
    def pause(self, sync: bool = False):
        """Pauses as the host does: with a flag, not a count."""
        if self._open is not None:
            self._is_paused = True
            self.paused += 1
        try:
            yield
        finally:
            self._is_paused = False

    @contextmanager
    def watching(self):
        blocks = [*self._network.double_blocks, *self._network.single_blocks]
        handles = [block.register_forward_pre_hook(lambda *_: self._begin()) for block in blocks]
        handles += [block.register_forward_hook(lambda *_: self._end(), always_call=True) for block in blocks]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self) -> None:
        self._open = []

    def _end(self) -> None:
        opened, self._open = self._open or [], None
        self.kept += [(where, shape) for reference, where, shape in opened if not reference.expired()]


def _ours() -> str:
    """Returns file and line of the innermost frame outside torch if it is this pack's code, else an empty text."""
    frame = sys._getframe(2)
    while frame is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    name = frame.f_code.co_filename if frame is not None else ""
    return f"{Path(name).name}:{frame.f_lineno}" if name.startswith(OURS) else ""


class StandIn:
    """Stands in for the host's module `comfy.model_prefetch`, as far as this pack uses it."""

    def __init__(self, recorder: Recorder) -> None:
        self.pause_malloc_graph = recorder.pause
        self.cleaned = 0

    def cleanup_prefetch_queues(self) -> None:
        self.cleaned += 1


@pytest.fixture(scope="module")
def model() -> ModelPatcher:
    return load_demo_model()


@pytest.fixture
def recorder(model, monkeypatch) -> Recorder:
    recorder = Recorder(model.model.diffusion_model)
    monkeypatch.setattr(recording, "prefetch", StandIn(recorder))
    return recorder


def strategies(network) -> dict[str, Settings]:
    factors = exact_factors(linear_sites_of(network))
    plans = {"forecast": "FFaaFaaa", "icc": "FiiFiiFi", "paper": "FcaFcacF"}
    found = {name: Strategy(Given(Plan.parse(plan)), factors=factors) for name, plan in plans.items()}
    found["auto"] = Settings(speedup=3.0)
    found["calibrated"] = Strategy(Given(Plan.parse("FFaaFaaa")), Innovating(torch.full((48, 256), 0.01)))
    found["fp8"] = Settings(speedup=3.0, storage=StoreFormat(dtype=torch.float8_e4m3fn))
    return found


@pytest.mark.parametrize("name", ["forecast", "icc", "paper", "auto", "calibrated", "fp8"])
def test_nothing_that_is_kept_is_allocated_in_a_recorded_block(model, recorder, name):
    settings = strategies(model.model.diffusion_model)[name]
    patched = host.attach(model, settings)
    with recorder.watching():
        watched = sample(patched, steps=8)
        assert not recorder.kept and recorder.paused
        assert torch.equal(sample(patched, steps=8, prompt="castle"), sample(host.attach(model, settings), steps=8, prompt="castle"))
    assert not recorder.kept
    assert torch.equal(watched, sample(patched, steps=8))
    assert len(set(kinds(last_report(patched)))) > 1


def test_the_recorder_sees_what_is_not_paused(model, recorder, monkeypatch):
    """Without the pauses it finds kept tensors: the test above can fail."""
    sample(cached(model, speedup=3.0), steps=8)  # finds the place
    monkeypatch.setattr(recording.prefetch, "pause_malloc_graph", None)
    with recorder.watching():
        sample(cached(model, speedup=3.0), steps=8)
    assert {where.split(":")[0] for where, _shape in recorder.kept} == {"call.py", "persistence.py", "place.py", "slot.py", "store.py"}


def test_calibrating_keeps_nothing_in_a_recorded_block(model, recorder):
    prompts = [encode_prompt(text) for text in ("red apple", "castle")]
    sampling = Sampling(prompts, [encode_prompt("")] * 2, torch.zeros(1, 3, 16, 16), "euler", "simple", 4, 2.5, 0)
    with recorder.watching():
        calibrate(model, sampling, Wishes(method="cd_svd", rank=4), "demo")
    # the sums of low_rank.py are in system memory on every device
    kept = [where for where, _shape in recorder.kept if not where.startswith("low_rank.py")]
    assert not kept and recorder.paused


def test_a_run_is_freed_by_who_opened_it_whatever_happens(model, recorder):
    """There is an exception in step 1, a cancel in a later step, then a second prompt."""
    from comfy.model_management import InterruptProcessingException

    before = {id(feature) for feature in features()}
    for error, call in ((RuntimeError("broken"), 1), (InterruptProcessingException(), 5)):
        patched = cached(failing(model, error, call), speedup=3.0)
        with recorder.watching(), pytest.raises(type(error)):
            sample(patched, steps=8)
        assert not last_report(patched).is_complete and not recorder.kept
        error.__traceback__ = None  # it would hold the frames of the run
        assert {id(feature) for feature in features()} <= before
    fresh = cached(model, speedup=3.0)
    with recorder.watching():
        assert torch.equal(sample(fresh, steps=8), sample(fresh, steps=8))
    assert {id(feature) for feature in features()} <= before


def failing(model, error: BaseException, call: int) -> ModelPatcher:
    """Returns a model that another node breaks in one of its calls."""
    calls = []

    def breaks(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return executor(*args, **kwargs)

    broken = model.clone()
    broken.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", breaks)
    return broken


def features() -> list:
    """Returns all features that are alive."""
    from comfyui_duca.cache_core.store import Feature

    gc.collect()
    return [found for found in gc.get_objects() if type(found) is Feature]


def test_pauses_inside_each_other_end_with_the_outer_one(model, recorder):
    """The host's own pause is a flag, which the end of an inner pause of ours would clear."""
    recorder._begin()
    with recording.unrecorded():
        with recording.unrecorded():
            assert recorder._is_paused
        assert recorder._is_paused
    assert not recorder._is_paused and recorder.paused == 1


def test_pauses_are_of_one_thread(recorder):
    recorder._begin()
    seen = []

    def other() -> None:
        with recording.unrecorded():
            seen.append(recorder.paused)

    with recording.unrecorded():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [2]


# -- weights that the host fetches ahead of their use ------------------------------------------------------


def test_weights_are_not_fetched_for_skipped_evaluations(model):
    """The host sets the option just before the network's own wrappers run."""
    seen = []

    def look(executor, *args, **kwargs):
        options = next(a for a in (*args, *kwargs.values()) if isinstance(a, dict) and "uuids" in a)
        seen.append(options["prefetch_dynamic_vbars"])
        return executor(*args, **kwargs)

    def offers(executor, x, t, *args, **kwargs):
        options = next(a for a in (*args, *kwargs.values()) if isinstance(a, dict) and "uuids" in a)
        options["prefetch_dynamic_vbars"] = True
        return executor(x, t, *args, **kwargs)

    other = model.clone()
    patched = cached(other, speedup=3.0)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", offers)
    with_option = unset(patched)
    with_option.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", look)
    sample(with_option, steps=8)
    plan = kinds(last_report(with_option))
    assert "a" in plan and sum(seen) == plan.count("F")  # the skips that find and prove the place do not fetch either
    seen.clear()
    sample(with_option, steps=8)
    assert plan[0] == "F" and seen == [True, False, *(kind != "a" for kind in plan[1:])]  # the second is the proof


def unset(patched: ModelPatcher) -> ModelPatcher:
    """Returns a model with the option set in our wrapper.

    Hosts set it if weights are dynamic, which they are not on a CPU. Here the wrapper before ours sets it.
    """

    def keeps(executor, *args, **kwargs):
        options = next(a for a in (*args, *kwargs.values()) if isinstance(a, dict) and "uuids" in a)
        options["prefetch_dynamic_vbars"] = True
        return recording.diffusion_model(executor, *args, **kwargs)

    clone = patched.clone()
    clone.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, host.KEY)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, host.KEY, keeps)
    return clone


@pytest.mark.parametrize("letter", ["a", "c"])
def test_a_call_given_up_half_way_is_cleaned_up_after(model, recorder, monkeypatch, letter):
    """A skip or a replay that meets arguments it does not know raises inside the host's forward, where weights are pinned."""
    from comfyui_duca.cache_core.engine import skip
    from comfyui_duca.cache_core.families.shared.base import Stack

    def refuses(*_args):
        raise UnsupportedCallError("test")

    settings = Strategy(Given(Plan.parse(f"F{letter * 3}F{letter * 2}F")))
    sample(host.attach(model, settings), steps=8)  # now the place is known
    recording.prefetch.cleaned = 0
    monkeypatch.setattr(*((skip, "_filled") if letter == "a" else (Stack, "checked")), refuses)
    patched = host.attach(model, settings)
    result = sample(patched, steps=8)
    tried = 5 if letter == "a" else 6  # replays are tried once in the first full evaluation
    assert recording.prefetch.cleaned == tried and kinds(last_report(patched)) == "F" * 8
    assert torch.equal(result, sample(model, steps=8))


def test_hosts_without_recording_are_served(monkeypatch):
    monkeypatch.setattr(recording, "prefetch", None)
    with recording.unrecorded():
        recording.abandoned()
