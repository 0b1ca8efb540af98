"""The calibration of a checkpoint in memory, and its conversion to and from a sidecar."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..planning.kinds import Kind
from ..planning.plan import Plan
from .fingerprint import Fingerprint
from .sidecar import About, Sidecar
from .statistics import ForecastModel

ORIGINS = ("general", "even gaps")  # where searches for plans begin; see `use.origin_plan`
_SEARCHED_FROM = ("", *ORIGINS)  # origins of plans, in the order of their numbers in a sidecar's results
_KINDS = (Kind.SKIPPED, Kind.FULL, Kind.INCREMENTAL)  # kinds, in the order of their numbers in a sidecar's plans


@dataclass(frozen=True)
class TriedPlan:
    """The plan and the predictor that did best with one number of full evaluations.

    Args:
        plan: The plan, for the steps of the calibrated runs.
        share: Share 0..1 of calibrated weights in the predictor. None is the uncalibrated predictor.
        psnr: PSNR against the uncached latents, mean over the calibration prompts, in dB.
        uncalibrated: The same of the uncalibrated setting.
        searched_from: Where the search for the plan began, one of `ORIGINS`. "" is the front-loaded plan without a search.
    """

    plan: Plan
    share: float | None
    psnr: float
    uncalibrated: float
    searched_from: str = ""


@dataclass(frozen=True, eq=False)
class Forecast:
    """The forecast part of a calibration.

    Args:
        model: Statistics with sensitivities.
        step_times: The model's time at every step of the calibrated runs.
        tried: The plans and predictors that did best, by number of full evaluations, most first.
        plans: Results of `use.searched_plan` by its arguments, kept because the page asks for the same plans often.
        orders: Orders of steps from which `use.nested_plan` takes its plans, by its arguments without the budget.
    """

    model: ForecastModel
    step_times: tuple[float, ...]
    tried: tuple[TriedPlan, ...]
    plans: dict[tuple, Plan] = field(default_factory=dict, repr=False)
    orders: dict[tuple, list[int]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, eq=False)
class Factors:
    """Low-rank factors of the linear layers.

    Args:
        tensors: "<part key>.A" (out, rank) and "<part key>.B" (rank, in) of every part of a layer; see `engine.linear_sites`.
        energy: Share 0..1 of each part's square norm that its factors keep, by part key.
    """

    tensors: Mapping[str, Tensor]
    energy: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Calibration:
    """The calibration of a checkpoint. It has a forecast, factors or both.

    Args:
        about: How the calibration was made.
        fingerprint: Fingerprint of the checkpoint.
        forecast: Statistics and plans for forecasts.
        factors: Low-rank factors of the linear layers.
    """

    about: About
    fingerprint: Fingerprint
    forecast: Forecast | None = None
    factors: Factors | None = None

    def with_rest_of(self, older: Calibration) -> Calibration:
        """Returns this calibration with the part that it lacks taken from `older`, a calibration of the same checkpoint."""
        about = self.about
        if self.forecast is None and older.forecast is not None:
            about = replace(older.about, rank=about.rank, method=about.method, created=about.created)
        elif self.factors is None and older.factors is not None:
            about = replace(about, rank=older.about.rank, method=older.about.method)
        return Calibration(about, self.fingerprint, self.forecast or older.forecast, self.factors or older.factors)

    def to_sidecar(self) -> Sidecar:
        """Returns the contents of a sidecar file."""
        sections: dict[str, Mapping[str, Tensor]] = {}
        if self.forecast is not None:
            sections["forecast"] = _from_forecast(self.forecast)
        if self.factors is not None:
            energy = torch.tensor([self.factors.energy[part] for part in _parts(self.factors.tensors)])
            sections["icc"] = {**self.factors.tensors, "energy": energy}
        return Sidecar(self.about, self.fingerprint, sections)

    @classmethod
    def from_sidecar(cls, sidecar: Sidecar) -> Calibration:
        """Makes a calibration from the sections that the sidecar was read with.

        Raises:
            ValueError: For a plan with kinds or an origin that this version does not know, or one whose first step is not full.
        """
        forecast = _to_forecast(sidecar.about, sidecar.sections["forecast"]) if "forecast" in sidecar.sections else None
        factors = None
        if "icc" in sidecar.sections:
            tensors = {name: tensor for name, tensor in sidecar.sections["icc"].items() if name != "energy"}
            energy = dict(zip(_parts(tensors), sidecar.sections["icc"]["energy"].tolist()))
            factors = Factors(MappingProxyType(tensors), MappingProxyType(energy))
        return cls(sidecar.about, sidecar.fingerprint, forecast, factors)


def _parts(names: Iterable[str]) -> list[str]:
    """Returns the part keys of factors, sorted."""
    return sorted({name.rpartition(".")[0] for name in names})


def _from_forecast(forecast: Forecast) -> dict[str, Tensor]:
    """Returns the tensors of a sidecar's section `forecast`."""
    model, tried = forecast.model, forecast.tried
    sensitivity = model.sensitivity if model.sensitivity is not None else torch.ones(len(model.times), dtype=torch.float64)
    numbers = [[_KINDS.index(kind) for kind in each.plan.kinds] for each in tried]
    results = [[-1.0 if c.share is None else c.share, c.psnr, c.uncalibrated, float(_SEARCHED_FROM.index(c.searched_from))] for c in tried]
    return {
        "gram": model.gram,
        "uu": F.pad(model.uu, (0, 1, 0, 1)) if model.has_no_input else model.uu,  # a file cannot hold an input without channels
        "uz": F.pad(model.uz, (0, 0, 0, 1)) if model.has_no_input else model.uz,
        "basis": model.basis,
        "sensitivity": sensitivity,
        "step_times": torch.tensor(forecast.step_times, dtype=torch.float64),
        "plans": torch.tensor(numbers, dtype=torch.float32),
        "results": torch.tensor(results, dtype=torch.float64),
    }


def _to_forecast(about: About, tensors: Mapping[str, Tensor]) -> Forecast:
    """Makes a forecast from the tensors of a sidecar's section `forecast`."""
    uu, uz = tensors["uu"], tensors["uz"]
    if uu.shape[-1] == 1 and not uu.any():  # a channel of zeros stands for an input without channels, see `_from_forecast`
        uu, uz = uu[..., :0, :0], uz[..., :0, :]
    model = ForecastModel(about.times, tensors["gram"], uu, uz, tensors["basis"], tensors["sensitivity"])
    tried = []
    for numbers, (share, psnr, uncalibrated, origin) in zip(tensors["plans"].tolist(), tensors["results"].tolist()):
        if not all(number in range(len(_KINDS)) for number in numbers):
            raise ValueError("this calibration was made by a newer version: update ComfyUI-DuCa, or calibrate again")
        if origin not in range(len(_SEARCHED_FROM)):
            raise ValueError("this calibration was made by a newer version: update ComfyUI-DuCa, or calibrate again")
        plan = Plan(tuple(_KINDS[int(number)] for number in numbers))
        tried.append(TriedPlan(plan, None if share < 0 else share, psnr, uncalibrated, _SEARCHED_FROM[int(origin)]))
    return Forecast(model, tuple(tensors["step_times"].tolist()), tuple(tried))
