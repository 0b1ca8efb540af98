"""Shows the progress of a node that works in several stages: one bar for all of them, and the name of the stage under the node."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import comfy.model_management
import comfy.utils

from . import notices

_STEPS = 1000  # steps of the bar


class StagedProgress:
    """Shows one bar, in which each stage has the share that it is expected to have of the time.

    Args:
        expected: Time that each stage takes, in any unit, in the order of the stages.
        node_id: The node that the bar belongs to.
    """

    def __init__(self, expected: Mapping[Any, float], node_id: str | None) -> None:
        total = sum(expected.values())
        self._shares = {stage: time / total for stage, time in expected.items()}
        self._starts = {stage: sum(list(self._shares.values())[:i]) for i, stage in enumerate(expected)}
        self._bar = comfy.utils.ProgressBar(_STEPS, node_id)
        self._node_id, self._shown = node_id, ""

    def show(self, stage: Hashable, done: int, total: int, text: str) -> None:
        """Shows that `done` of `total` parts of a stage are done, and `text` under the node.

        Args:
            stage: One of the stages in `expected`.
            done, total: Number of parts that are done, and of all parts of the stage.
            text: What to show under the node.

        Raises:
            InterruptProcessingException: The host's own, after a cancel.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar.update_absolute(round(_STEPS * (self._starts[stage] + self._shares[stage] * done / max(total, 1))))
        if text != self._shown:
            self._shown = text
            notices.show(text, self._node_id)
