"""Puts a cache on a MODEL through ComfyUI's wrappers and takes it off after each run.

OUTER_SAMPLE makes and frees the run, PREDICT_NOISE opens an evaluation, CALC_COND_BATCH tells the sampler's own
pass over the conds from extra ones, APPLY_MODEL carries out a model call. Wrappers live on a clone of the model;
nothing on the model itself outlasts a call. What hosts differ in has a file each: `recording.py` (what is done around
blocks), `guests.py` (guiders of two models), `samplers.py` (what a sampler does), `network_options.py` (what tells passes apart).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..cache_core import CacheRun, Kind, ModelCall, Opening, Places, Settings, Timeline, find_family
from ..cache_core.discovery.trees import tensors
from ..cache_core.meter import Evaluation
from . import calibrations, guests, recording, samplers
from .guests import Guest
from .keys import KEY, RUN, options_with
from .live_runs import LiveRun, live_runs
from .network_options import variant_of
from .notices import say
from .report_text import report_text
from .run_book import RunBook

_FEW_STEPS = 8  # below this, and where fewer are computed than the number below, fewer steps were better in docs/benchmarks.md
_FEW_COMPUTED = 4
# Of every network that was sampled, for as long as it lives. What the host keeps on modules says where weights are and what was fetched:
# comfy/model_prefetch.py and comfy/ops.py of Comfy-Org/ComfyUI.
_places = Places(bookkeeping=("_v", "_prefetch", "_comfy_graph", "_pin", "weight_", "bias_", "comfy_"))
_OpenRun = Callable[[ModelPatcher, torch.Tensor, Any], Any]


class HostOptions(NamedTuple):
    """choose_device: leave it to free memory where features are kept. verbose: log every evaluation. node_id: who speaks.

    finds_calibration: look for the checkpoint's sidecar where the settings have none.
    """

    choose_device: bool = True
    verbose: bool = False
    node_id: str | None = None
    finds_calibration: bool = True


def attach(model: ModelPatcher, settings: Settings, options: HostOptions = HostOptions()) -> ModelPatcher:
    """A clone of `model` that samples with the cache; any cache of ours already on it is replaced.

    A UNet, or mode "off", comes back without one. Raises ValueError for a calibration of another checkpoint.
    """
    if not hasattr(getattr(model, "model", None), "diffusion_model"):  # some packs pass networks of their own as MODEL
        say(f"DuCa Cache serves models that ComfyUI samples; {type(model).__name__} is passed through unchanged.", options.node_id)
        return model
    clone = detach(model)
    if settings.mode == "off":
        return clone
    if is_unet(clone):
        say(unet(clone), options.node_id)
        return clone
    if settings.calibration is not None:
        calibrations.check(settings.calibration, clone)
    book, finder = RunBook(), calibrations.Finder(settings, options.finds_calibration, options.node_id)
    clone.set_attachments(KEY, book)

    live: dict[CacheRun, LiveRun] = {}

    def open_run(patcher: ModelPatcher, sigmas: torch.Tensor, sampler: Any) -> CacheRun | None:
        return _open_run(patcher, finder, options, sigmas, sampler, live)

    def open_as_guest(patcher: ModelPatcher, sigmas: torch.Tensor) -> CacheRun | None:
        run = open_run(patcher, sigmas, None)
        if run is not None and run.plan.skips:
            run.notify("this is the second model of a guider: with a sampler that adds noise (ancestral, SDE) take the cache off it")
        return run

    def finished(run: CacheRun, result: torch.Tensor | None, is_complete: bool = False) -> None:
        report = run.close(is_complete=is_complete or result is not None)
        book.add(report, result)
        if run in live:
            live_runs.end(live.pop(run), report)
        if options.verbose:
            logging.info("[DuCa] %s", report_text(report, verbose=True))

    listen(clone, open_run, finished)
    Guest(open_as_guest, lambda run, is_complete: finished(run, None, is_complete), _carried_out).add_to(clone)
    return clone


def listen(model: ModelPatcher, open_run: _OpenRun, finished: Callable[[Any, Any], None]) -> None:
    """Makes every sampling of `model` ask `open_run` for a run (or None) and hand it over to `finished` at the end.

    open_run: given the patcher, the noise levels and the host's sampler. A run has `evaluation`, `corrected`, `cond_batch` and
    `model_call` (see cache_core.CacheRun). `finished` gets the run and the latent, or None for it after a cancel or an error.
    """
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _sampling(open_run, finished))
    for kind, wrapper in _DURING_A_RUN.items():
        model.add_wrapper_with_key(kind, KEY, wrapper)


def detach(model: ModelPatcher) -> ModelPatcher:
    """A clone without a cache of ours."""
    clone = model.clone()
    if clone.get_attachment(KEY) is not None:
        logging.info("[DuCa] this model already had a DuCa Cache; the later node replaces it")
        clone.remove_attachments(KEY)
    for wrapper in (WrappersMP.OUTER_SAMPLE, *_DURING_A_RUN):
        clone.remove_wrappers_with_key(wrapper, KEY)
    for callback in guests.CALLBACKS:
        clone.remove_callbacks_with_key(callback, KEY)
    return clone


def book_of(model: ModelPatcher) -> RunBook | None:
    """The finished runs of a model's cache, or None if it has none."""
    return model.get_attachment(KEY)


def is_unet(model: ModelPatcher) -> bool:
    """Whether its blocks are of no use to the cache: they shrink and grow the picture, and later ones take from earlier ones."""
    return all(hasattr(model.model.diffusion_model, name) for name in ("input_blocks", "middle_block", "output_blocks"))


def unet(model: ModelPatcher) -> str:
    """Why a UNet is passed through, in words for the user."""
    name = type(model.model.diffusion_model).__name__
    return f"DuCa Cache is for diffusion transformers; {name} is a UNet and is passed through unchanged."


def _sampling(open_run: _OpenRun, finished: Callable[[Any, Any], None]) -> Callable[..., torch.Tensor]:
    """The OUTER_SAMPLE wrapper: one run per sampling, ended however the sampling ends."""

    def outer_sample(executor: Any, noise: Any, latent: Any, sampler: Any, sigmas: torch.Tensor, *args: Any, **kwargs: Any):
        guider = executor.class_obj
        run = open_run(guider.model_patcher, sigmas, sampler)
        shared_options = guider.model_options
        guider.model_options = comfy.model_patcher.create_model_options_clone(shared_options)
        guider.model_options.setdefault("transformer_options", {})[RUN] = run  # None too: it was asked for
        result = None
        try:
            result = executor(noise, latent, sampler, sigmas, *args, **kwargs)
            return result
        finally:
            guider.model_options = shared_options
            if run is not None:
                finished(run, result)

    return outer_sample


def opening(patcher: ModelPatcher, sigmas: torch.Tensor, sampler: Any, start: float = 0.0, end: float = 1.0) -> Opening:
    """What a run of the host's `sampler` (None: not known) begins with; start, end: the part of the sampling that may be skipped.

    Raises ValueError in words for the user.
    """
    if is_unet(patcher):
        raise ValueError(unet(patcher))
    sampling = patcher.get_model_object("model_sampling")
    timeline = Timeline(sigmas.tolist(), model_times(sampling, sigmas))
    window = timeline.window(float(sampling.percent_to_sigma(start)), float(sampling.percent_to_sigma(end)))
    adds_noise = samplers.adds_noise(sampling, sampler, sigmas) if sampler is not None else False
    return Opening(
        patcher.model.diffusion_model,
        find_family(patcher.model.diffusion_model),
        timeline,
        window,
        patcher.load_device,
        samplers.is_euler(sampler),
        adds_noise,
        recording.unrecorded,
        _places,
    )


def _open_run(
    patcher: ModelPatcher,
    finder: calibrations.Finder,
    options: HostOptions,
    sigmas: torch.Tensor,
    sampler: Any,
    live: dict[CacheRun, LiveRun],
) -> CacheRun | None:
    """A run for these noise levels, entered in `live` if a node asked for it; None (said to the user) where the cache must stand aside."""
    settings = finder.settings_for(patcher)
    try:
        begun = opening(patcher, sigmas, sampler, *settings.part)
    except ValueError as reason:
        say(f"DuCa Cache stands aside: {str(reason).removesuffix('.')}.", options.node_id)
        return None
    device = begun.device

    def choose_device(needed: int) -> torch.device | None:
        """System memory where the cache would take more than half of what is free on the device."""
        return None if needed * 2 <= free_memory(patcher, device) else torch.device("cpu")

    def told(evaluation: Evaluation) -> None:
        if run in live:
            live[run].evaluation(evaluation)

    strategy = settings.strategy(begun)
    run = CacheRun(
        strategy,
        begun.timeline,
        begun.window,
        begun.family,
        device,
        say=lambda text: say(f"DuCa Cache: {text}.", options.node_id),
        choose_device=choose_device if options.choose_device else None,
        told=told,
        is_euler=begun.is_euler,
        unrecorded=begun.unrecorded,
        places=begun.places,
    )
    if options.node_id is not None:
        live[run] = live_runs.begin(options.node_id, strategy.name, str(run.plan), patcher, begun, finder.found)
    if settings.chosen is None:
        _warn_of_few(run)
    return run


def _warn_of_few(run: CacheRun) -> None:
    steps, full = len(run.plan), run.plan.count(Kind.FULL)
    computed = steps - run.plan.count(Kind.AGGRESSIVE)
    if full < steps and (steps < _FEW_STEPS or computed < _FEW_COMPUTED):
        run.notify(f"{full} of {steps} steps are computed in full: fewer steps without a cache are likely to look better; compare")


def free_memory(patcher: ModelPatcher, device: torch.device) -> int:
    """Bytes that can be had on the device: where a patcher can answer, weights that it would give back are among them."""
    asked = getattr(patcher, "get_free_memory", comfy.model_management.get_free_memory)
    return int(asked(device))


def model_times(sampling: Any, sigmas: torch.Tensor) -> list[float]:
    """The model's time at each noise level, scaled so that the noisiest is 1."""
    levels = torch.cat((torch.as_tensor(sampling.sigma_max).reshape(1).to(sigmas), sigmas))
    times = sampling.timestep(levels).float().cpu()
    return (times[1:] / times[0]).tolist()


def _predict_noise(executor: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: dict = {}, seed: Any = None):  # noqa: B006
    run: CacheRun | None = model_options.get("transformer_options", {}).get(RUN)
    if run is None:
        return executor(x, timestep, model_options, seed)
    # One number read per evaluation, as the kind depends on it. On a GPU this waits for the previous evaluation.
    with run.evaluation(float(timestep.flatten()[0])):
        denoised = executor(x, timestep, model_options, seed)
    return run.corrected(x, denoised)


def _calc_cond_batch(executor: Any, model: Any, conds: Any, x_in: torch.Tensor, timestep: torch.Tensor, model_options: dict):
    run: CacheRun | None = model_options.get("transformer_options", {}).get(RUN)
    if run is not None:
        run.cond_batch()
    return executor(model, conds, x_in, timestep, model_options)


def _apply_model(executor: Any, x: torch.Tensor, t: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    options = options_with(RUN, args, kwargs)
    if options is None:
        return executor(x, t, *args, **kwargs)
    return _carried_out(options[RUN], options, executor, x, t, *args, **kwargs)


def _carried_out(run: Any, options: dict, executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    call = _describe(executor.class_obj, x, options, _shapes(args, kwargs))

    def compute() -> torch.Tensor:
        own = {name: _own(value) if name == "control" else value for name, value in kwargs.items()}
        return executor(x, *(arg if arg is options else _own(arg) for arg in args), **own)

    return run.model_call(call, compute)


def _own(given: Any) -> Any:
    """A ControlNet's residuals in lists of their own: some networks take them off the list, and a call may be made more than once. Hosts
    hand them over by position.
    """
    if not isinstance(given, dict):
        return given
    return {name: list(item) if isinstance(item, list) else item for name, item in given.items()}


def _describe(base_model: Any, x: torch.Tensor, options: dict, given: Hashable) -> ModelCall:
    """What the core needs to know of one APPLY_MODEL call."""
    network, patcher = getattr(base_model.diffusion_model, "_orig_mod", base_model.diffusion_model), base_model.current_patcher
    uuids = options.get("uuids") or ()
    conds = tuple(zip(options.get("cond_or_uncond", ()), uuids))
    bypass, rows = "", 0
    if not conds or x.shape[0] % len(conds):
        bypass, conds = "a call that does not say which conditioning it is for", ()
    elif options.get("context_window") is not None:
        bypass = "context windows"
    else:
        rows = x.shape[0] // len(conds)
    return ModelCall(
        network,
        conds,
        signature=(rows, x.shape[1:], x.dtype, x.device),
        variant=variant_of(options),
        given=given,
        bypass=bypass,
        weights=_hook_weights(patcher),
        is_copy=getattr(patcher, "is_multigpu_base_clone", False),
        starting=lambda kind: recording.note_skip(options, kind is Kind.AGGRESSIVE),
        abandoned=recording.abandoned,
    )


def _shapes(args: tuple, kwargs: dict[str, Any]) -> Hashable:
    """Of the conditioning. ControlNet's are left out: it comes and goes, and changes no number of tokens."""
    given = {name: value for name, value in kwargs.items() if name not in ("control", "transformer_options")}
    positional = [value for value in args if isinstance(value, torch.Tensor)]
    return tuple((path, tensor.shape) for path, tensor in tensors((positional, given)))


def _hook_weights(patcher: Any) -> tuple:
    """Which hook weights (scheduled LoRAs) are applied, and how strongly: features do not survive their change."""
    group = getattr(patcher, "current_hooks", None)
    return tuple((id(hook), float(getattr(hook, "strength", 1.0))) for hook in group.hooks) if group is not None else ()


_DURING_A_RUN = {
    WrappersMP.PREDICT_NOISE: _predict_noise,
    WrappersMP.CALC_COND_BATCH: _calc_cond_batch,
    WrappersMP.APPLY_MODEL: _apply_model,
    WrappersMP.DIFFUSION_MODEL: recording.diffusion_model,
}
