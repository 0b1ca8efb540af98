"""Decides which networks a run serves. Most runs call one; guidance may bring a second model, and several devices have a copy each."""

from __future__ import annotations

from torch import nn

from .families import ModelFamily
from .model_call import ModelCall
from .planning.kinds import Kind
from .planning.plan import Plan
from .strategy import Strategy


class Networks:
    """Knows the networks of one run. The first one that is called is the run's own."""

    def __init__(self, strategy: Strategy, plan: Plan, family: ModelFamily) -> None:
        self._family = family
        self._is_calibrated = strategy.predictor.uses_input or plan.has(Kind.INCREMENTAL)
        self._unfit: dict[nn.Module, str] = {}

    def unfit(self, call: ModelCall) -> str:
        """Returns why calls of a call's network must go past the cache, in words for the user; "" if they need not."""
        if call.model not in self._unfit:
            self._unfit[call.model] = self._reason(call)
        return self._unfit[call.model]

    def is_known(self, network: nn.Module) -> bool:
        """Returns whether the family describes this network."""
        return self._family.matches(network)

    def _reason(self, call: ModelCall) -> str:
        name = type(call.model).__name__
        if not self.is_known(call.model):
            return f"a second model takes part ({name}), of another kind than the first ({self._family.name})"
        if self._unfit and self._is_calibrated and not call.is_copy:
            return f"a second model takes part ({name}), but the calibration was made for the first"
        return ""


def check(strategy: Strategy, plan: Plan, family: ModelFamily) -> None:
    """Checks that this family and this strategy can carry out a plan.

    Raises:
        ValueError: Where they cannot; the text names a remedy.
    """
    if plan.has(Kind.CONSERVATIVE) and not family.is_conservative:
        raise ValueError(f"{family.name} models have no conservative evaluation: choose mode auto or forecast")
    if plan.has(Kind.INCREMENTAL) and strategy.factors is None:
        raise ValueError(
            f"the strategy {strategy.name!r} has no calibration factors: calibrate this model with low-rank factors first, "
            "or choose a plan without incremental evaluations"
        )
