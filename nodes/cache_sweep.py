"""Node Cache Sweep: one prompt sampled without a cache and at several speed-ups, to find one's own limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..cache_core import Settings
from . import calibrations, host, notices, sidecars
from .cache_compare import comparison_outputs
from .comparison import Row, output, score
from .latents import decoded, fitted

_MODES = ("auto", "paper", "forecast")
_FASTEST, _MOST = 6, 12  # a speed-up, and how many of them
_PER_LINE = 6  # of the grid, beside the reference
_WARM_UP_STEPS = 2  # some schedulers cannot make fewer
_BAR = 1000  # steps of the progress bar
_DECODING = 0.05  # share of the bar

Tell = Callable[[int, int], None]  # how many steps are done, of how many


@dataclass(frozen=True)
class Run:
    """One sampling. speedup: of its cache; None samples without one."""

    label: str
    steps: int
    speedup: float | None = None


@dataclass(frozen=True)
class Sampled:
    """latent: what the sampler ended in, a tensor or several as one. seconds: it took.

    compute: so many times less than in full, as counted; None: no cache.
    """

    latent: Any
    seconds: float
    compute: float | None


class CacheSweep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DuCaCacheSweep",
            display_name="Cache Sweep",
            category="model_patches/duca",
            description="Samples without a cache, then at each speed-up, and shows the pictures beside each other with their distance, "
            "time and compute: find the speed-up that you still like. Takes as long as all of them.",
            inputs=_inputs(),
            outputs=[
                *comparison_outputs(),
                io.Image.Output(display_name="images", tooltip="The pictures themselves, without a cache first, in the table's order."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, speedups: str | None = None) -> bool | str:
        """None stands for what another node will give."""
        try:
            return speedups is None or bool(parse_speedups(speedups))
        except ValueError as wrong:
            return str(wrong)

    @classmethod
    def fingerprint_inputs(cls, mode: str | None = None, **inputs: Any) -> tuple:
        """What looks for a calibration samples anew when there is another file."""
        return sidecars.state() if mode in (None, *calibrations.SEARCHING_MODES) else ()

    @classmethod
    def execute(
        cls, model: io.Model.Type, vae: io.Vae.Type, mode: str, speedups: str, fewer_steps: bool, steps: int, **given: Any
    ) -> io.NodeOutput:
        if mode not in _MODES:  # by link, where nobody has checked
            raise ValueError(f"unknown mode {mode!r}: use one of {', '.join(_MODES)}")
        reference = Run(f"no cache, {steps} steps", steps)
        cached = [Run(f"{mode} {speed:g}x", steps, speed) for speed in parse_speedups(speedups)]
        fewer = [_in_fewer_steps(run) for run in cached] if fewer_steps else []
        order = [reference, *(run for pair in zip(cached, fewer) for run in pair)] if fewer else [reference, *cached]
        rows = _draw(model, vae, mode, list(dict.fromkeys(order)), given, cls.hidden.unique_id)
        entries = dict(zip(rows, score(rows[reference], [row for run, row in rows.items() if run != reference])))
        parts = [slice(at, at + _PER_LINE) for at in range(0, len(cached), _PER_LINE)]
        lines = [[entries[run] for run in runs[part]] for part in parts for runs in (cached, fewer) if runs]
        return output(cls, [entries[run] for run in order], lines, torch.cat([rows[run].pictures for run in order]))


def parse_speedups(text: str) -> list[float]:
    """The numbers of a list such as "1.5, 2, 2.8", without 1, which is no cache and sampled anyway, and each once.

    Raises ValueError, in words for the user, that names the piece that is wrong.
    """
    pieces = [piece.strip() for piece in text.replace("\n", ",").split(",") if piece.strip()]
    if len(pieces) > _MOST:
        raise ValueError(f"speedups has {len(pieces)} numbers; at most {_MOST} are sampled at once")
    speeds = [_speedup(piece) for piece in pieces]
    wanted = list(dict.fromkeys(speed for speed in speeds if speed > 1))
    if not wanted:
        raise ValueError(f"speedups ({text.strip()!r}) needs at least one number above 1, such as: 1.5, 2, 2.8")
    return wanted


def _speedup(piece: str) -> float:
    try:
        value = float(piece)
    except ValueError:
        raise ValueError(f"speedups: {piece!r} is not a number; write for example: 1.5, 2, 2.8") from None
    if not 1 <= value <= _FASTEST:
        raise ValueError(f"speedups: {piece!r} is not between 1 and {_FASTEST}")
    return value


def _in_fewer_steps(run: Run) -> Run:
    """What takes as long without a cache."""
    steps = max(1, round(run.steps / (run.speedup or 1)))
    return Run(f"no cache, {steps} steps", steps)


# -- sampling ------------------------------------------------------------------------------------------


def _draw(model: ModelPatcher, vae: Any, mode: str, runs: Sequence[Run], given: dict[str, Any], node_id: str | None) -> dict[Run, Row]:
    """What each run gave, against the first one. given: the other inputs of the node.

    Raises ValueError for a model that cannot be cached, and the host's own exception after a cancel.
    """
    plain = host.detach(model)
    if host.is_unet(plain):
        name = type(plain.model.diffusion_model).__name__
        raise ValueError(f"Cache Sweep is for diffusion transformers; {name} is a UNet")
    # What only the first sampling does (loading the model, knowing it by its weights) would else make the uncached run look slow.
    warm_up = Run("warming up", _WARM_UP_STEPS, 1.0)
    progress = _Progress([warm_up, *runs], node_id)
    _sample(plain, mode, warm_up, given, progress.of(warm_up))
    sampled = {run: _sample(plain, mode, run, given, progress.of(run)) for run in runs}
    rows = {}  # decoded after all are sampled: on a small GPU the VAE drives the model out, and loading it again would be timed
    for done, (run, own) in enumerate(sampled.items()):
        progress.decoding(done, len(runs))
        rows[run] = _row(run, own, runs[0], sampled[runs[0]], decoded(vae, own.latent))
    progress.decoding(len(runs), len(runs))
    return rows


def _row(run: Run, own: Sampled, reference: Run, whole: Sampled, pictures: torch.Tensor) -> Row:
    compute = own.compute if run.speedup is not None else reference.steps / run.steps
    stood_aside = run.speedup is not None and own.compute is None
    return Row(f"{run.label} (stood aside)" if stood_aside else run.label, pictures, whole.seconds / own.seconds, compute)


def _sample(plain: ModelPatcher, mode: str, run: Run, given: dict[str, Any], tell: Tell) -> Sampled:
    model, latent = plain, given["latent_image"]
    if run.speedup is not None:
        model = host.attach(plain, Settings(mode=mode, speedup=run.speedup))
    tell(0, run.steps)
    start = fitted(model, latent)
    noise = comfy.sample.prepare_noise(start, given["noise_seed"], latent.get("batch_index"))
    begun = time.perf_counter()
    result = comfy.sample.sample(
        model, noise, run.steps, given["cfg"], given["sampler_name"], given["scheduler"], given["positive"], given["negative"], start,
        denoise=given["denoise"], noise_mask=latent.get("noise_mask"), disable_pbar=True, seed=given["noise_seed"],
        callback=lambda step, x0, x, total: tell(step + 1, total),
    ).to("cpu")  # which waits for the device  # fmt: skip
    seconds = time.perf_counter() - begun
    book = host.book_of(model)
    return Sampled(result, seconds, book.last.compute_speedup if book is not None and book.last is not None else None)


class _Progress:
    """One bar over all samplings, with the name of the one at work under the node. Raises the host's own exception after a cancel."""

    def __init__(self, runs: Sequence[Run], node_id: str | None) -> None:
        costs = [run.steps / (run.speedup or 1) for run in runs]
        self._ends = {run: (1 - _DECODING) * sum(costs[: i + 1]) / sum(costs) for i, run in enumerate(runs)}
        self._runs, self._node_id, self._shown = list(runs), node_id, ""
        self._bar = comfy.utils.ProgressBar(_BAR, node_id)

    def of(self, run: Run) -> Tell:
        """What is told of the steps of one sampling."""
        place = self._runs.index(run)
        start = self._ends[self._runs[place - 1]] if place else 0.0
        name = f"{run.label} ({place} of {len(self._runs) - 1})" if place else run.label

        def tell(done: int, steps: int) -> None:
            self._show(start + (self._ends[run] - start) * done / max(steps, 1), f"{name}: step {done} of {steps}")

        return tell

    def decoding(self, done: int, total: int) -> None:
        self._show(1 - _DECODING * (1 - done / total), f"decoding {done} of {total}")

    def _show(self, share: float, text: str) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar.update_absolute(round(_BAR * share))
        if text != self._shown:
            self._shown = text
            notices.show(text, self._node_id)


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The model to try. A DuCa Cache already on it is replaced."),
        io.Conditioning.Input("positive", tooltip="The prompt."),
        io.Conditioning.Input("negative", tooltip="The negative prompt."),
        io.Latent.Input("latent_image", tooltip="An empty latent of the size you work at, or a picture's."),
        io.Vae.Input("vae", tooltip="Decodes what was sampled."),
        io.Int.Input(
            "noise_seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=False,  # a seed of this name would else be randomised, and everything sampled again
            tooltip="The same for all runs, so that only the cache makes a difference. Stays as it is until you change it.",
        ),
        io.Int.Input("steps", default=28, min=2, max=200, tooltip="The number of steps you work with."),
        io.Float.Input("cfg", default=2.5, min=0.0, max=100.0, step=0.1, tooltip="The guidance you work with."),
        io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="euler", tooltip="The sampler you work with."),
        io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="simple", tooltip="The scheduler you work with."),
        io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip="Below 1 keeps some of the latent's picture."),
        io.Combo.Input("mode", options=list(_MODES), default="auto", tooltip="The mode of DuCa Cache that is tried."),
        io.String.Input(
            "speedups",
            default="1.5, 2, 2.8, 3.5, 5",
            tooltip=f"The speed-ups to try, 1 to {_FASTEST}, at most {_MOST}. Without a cache, which is 1, is always sampled.",
        ),
        io.Boolean.Input(
            "fewer_steps",
            default=True,
            tooltip="Also sample without a cache in so few steps that it is as fast: the honest comparison for each speed-up.",
        ),
    ]
