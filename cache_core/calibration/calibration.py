"""A calibration in memory: what was learned about a checkpoint, ready for use, and its way to and from a sidecar."""

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

ORIGINS = ("general", "even gaps")  # of searches for plans
_SEARCHED_FROM = ("", *ORIGINS)  # by their number in a sidecar's results
_KINDS = (Kind.SKIPPED, Kind.FULL, Kind.INCREMENTAL)  # by their number in a sidecar's plans


@dataclass(frozen=True)
class TriedPlan:
    """What did best with one number of full evaluations.

    plan: over the steps of the calibrated schedule. share: of calibrated weights in its predictor; None is the uncalibrated one.
    psnr, uncalibrated: mean over the calibration prompts against the uncached latents, in dB, of this and of the uncalibrated setting.
    searched_from: where the search for the plan began, one of ORIGINS; "" for the plan that does best in general.
    """

    plan: Plan
    share: float | None
    psnr: float
    uncalibrated: float
    searched_from: str = ""


@dataclass(frozen=True, eq=False)
class Forecast:
    """model: statistics with sensitivities. step_times: the model's time at every step of the calibrated schedule.

    tried: by number of full evaluations, most first. plans, orders: what was searched for runs, by their times: a page asks often.
    """

    model: ForecastModel
    step_times: tuple[float, ...]
    tried: tuple[TriedPlan, ...]
    plans: dict[tuple, Plan] = field(default_factory=dict, repr=False)
    orders: dict[tuple, list[int]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, eq=False)
class Factors:
    """Low-rank factors of every linear layer (see engine.layers) and the share 0..1 of each part's square norm that they keep."""

    tensors: Mapping[str, Tensor]
    energy: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Calibration:
    """about: how it was made. fingerprint: of the checkpoint. It has a forecast, factors or both."""

    about: About
    fingerprint: Fingerprint
    forecast: Forecast | None = None
    factors: Factors | None = None

    def with_rest_of(self, older: Calibration) -> Calibration:
        """This one, with what only `older`, of the same checkpoint, has."""
        about = self.about
        if self.forecast is None and older.forecast is not None:
            about = replace(older.about, rank=about.rank, method=about.method, created=about.created)
        elif self.factors is None and older.factors is not None:
            about = replace(about, rank=older.about.rank, method=older.about.method)
        return Calibration(about, self.fingerprint, self.forecast or older.forecast, self.factors or older.factors)

    def to_sidecar(self) -> Sidecar:
        sections: dict[str, Mapping[str, Tensor]] = {}
        if self.forecast is not None:
            sections["forecast"] = _from_forecast(self.forecast)
        if self.factors is not None:
            energy = torch.tensor([self.factors.energy[part] for part in _parts(self.factors.tensors)])
            sections["icc"] = {**self.factors.tensors, "energy": energy}
        return Sidecar(self.about, self.fingerprint, sections)

    @classmethod
    def from_sidecar(cls, sidecar: Sidecar) -> Calibration:
        """Of the sections that the sidecar was read with. Raises ValueError for plans that are none."""
        forecast = _to_forecast(sidecar.about, sidecar.sections["forecast"]) if "forecast" in sidecar.sections else None
        factors = None
        if "icc" in sidecar.sections:
            tensors = {name: tensor for name, tensor in sidecar.sections["icc"].items() if name != "energy"}
            energy = dict(zip(_parts(tensors), sidecar.sections["icc"]["energy"].tolist()))
            factors = Factors(MappingProxyType(tensors), MappingProxyType(energy))
        return cls(sidecar.about, sidecar.fingerprint, forecast, factors)


def _parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in names})


def _from_forecast(forecast: Forecast) -> dict[str, Tensor]:
    model, tried = forecast.model, forecast.tried
    sensitivity = model.sensitivity if model.sensitivity is not None else torch.ones(len(model.times), dtype=torch.float64)
    numbers = [[_KINDS.index(kind) for kind in each.plan.kinds] for each in tried]
    results = [[-1.0 if c.share is None else c.share, c.psnr, c.uncalibrated, float(_SEARCHED_FROM.index(c.searched_from))] for c in tried]
    return {
        "gram": model.gram,
        "uu": F.pad(model.uu, (0, 1, 0, 1)) if model.has_no_input else model.uu,  # the file has no room for an input without channels
        "uz": F.pad(model.uz, (0, 0, 0, 1)) if model.has_no_input else model.uz,
        "basis": model.basis,
        "sensitivity": sensitivity,
        "step_times": torch.tensor(forecast.step_times, dtype=torch.float64),
        "plans": torch.tensor(numbers, dtype=torch.float32),
        "results": torch.tensor(results, dtype=torch.float64),
    }


def _to_forecast(about: About, tensors: Mapping[str, Tensor]) -> Forecast:
    uu, uz = tensors["uu"], tensors["uz"]
    if uu.shape[-1] == 1 and not uu.any():  # one channel of zeros stands for none: see `_from_forecast`
        uu, uz = uu[..., :0, :0], uz[..., :0, :]
    model = ForecastModel(about.times, tensors["gram"], uu, uz, tensors["basis"], tensors["sensitivity"])
    tried = []
    for numbers, (share, psnr, uncalibrated, origin) in zip(tensors["plans"].tolist(), tensors["results"].tolist()):
        if not all(number in range(len(_KINDS)) for number in numbers):
            raise ValueError("a plan of this calibration has kinds that this version does not know")
        if origin not in range(len(_SEARCHED_FROM)):
            raise ValueError("a plan of this calibration was found in a way that this version does not know")
        plan = Plan(tuple(_KINDS[int(number)] for number in numbers))
        tried.append(TriedPlan(plan, None if share < 0 else share, psnr, uncalibrated, _SEARCHED_FROM[int(origin)]))
    return Forecast(model, tuple(tensors["step_times"].tolist()), tuple(tried))
