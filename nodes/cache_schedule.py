"""Node Cache Schedule: lets the user say which steps DuCa Cache computes in full."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..cache_core.planning.policies import POLICIES
from ..cache_core.planning.schedule import Schedule
from .inputs import fields
from .inputs.settings import SEVERAL_EVALUATIONS, schedule_of


class CacheSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DuCaCacheSchedule",
            display_name="Cache Schedule",
            category="model_patches/duca",
            description="Says which steps DuCa Cache computes in full, for any number of steps. The strip below shows the plan for the "
            "sampler.",
            inputs=_inputs(),
            outputs=[fields.Schedule.Output(display_name="schedule", tooltip="For DuCa Cache's input of the same name.")],
        )

    @classmethod
    def validate_inputs(cls, **given: Any) -> bool | str:
        """Checks what the ranges of the inputs leave open. Inputs from other nodes are None here and are checked in `execute`."""
        if any(value is None for value in given.values()):
            return True
        try:
            schedule_of(**given)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        return io.NodeOutput(schedule_of(**given))


def _inputs() -> list[io.Input]:
    usual = Schedule()
    return [
        io.Combo.Input("kind", options=list(POLICIES), default=usual.policy, tooltip=_about_policies()),
        io.Float.Input(
            "speedup",
            default=usual.speedup,
            min=1.0,
            max=6.0,
            step=0.1,
            display_mode=io.NumberDisplay.slider,
            tooltip="How many times fewer full evaluations: at 2, half of them. Not used by custom text, nor by cycles with a "
            "cycle_length.",
        ),
        io.Int.Input(
            "cycle_length",
            default=0,
            min=0,
            max=100,
            tooltip="Kinds DuCa cycle and fixed interval: steps from one full evaluation to the next. 0 follows speedup.",
        ),
        io.String.Input(
            "text",
            default=usual.text,
            tooltip="For kind custom text. F full, c conservative, a skipped, i incremental; 3F is short for FFF, (Fca)* is repeated until "
            "the run is full, what follows comes at its end. Without * the whole text is repeated.",
        ),
        io.Combo.Input(
            "unit",
            options=list(Schedule.UNITS),
            default=usual.unit,
            tooltip="Unit of skip_from and skip_to: percent of the sampling, or steps.",
        ),
        io.Float.Input(
            "skip_from",
            default=0.0,
            min=0.0,
            max=1000.0,
            step=1.0,
            tooltip="Everything before this is full: percent of the sampling, or number of steps.",
        ),
        io.Float.Input(
            "skip_to",
            default=100.0,
            min=0.0,
            max=1000.0,
            step=1.0,
            tooltip="Everything from here on is full: percent of the sampling, or number of steps (0 is the end).",
        ),
        io.Int.Input("warmup", default=usual.warmup, min=0, max=100, tooltip="Full steps at the beginning."),
        io.Int.Input("tail", default=usual.tail, min=0, max=100, tooltip="Full steps at the end."),
        io.Combo.Input(
            "several_evaluations",
            options=list(SEVERAL_EVALUATIONS),
            default=SEVERAL_EVALUATIONS[0],
            tooltip="For samplers with several evaluations in a step, such as heun. as their step: all are of the step's kind. "
            "first only: the first is, the others are skipped.",
        ),
        fields.Calibration.Input(
            "calibration", optional=True, tooltip="For kind searched. Not connected, DuCa Cache looks for the checkpoint's own."
        ),
    ]


def _about_policies() -> str:
    """Returns the tooltip of `kind`: what each one does."""
    return ". ".join(f"{name}: {policy.about}" for name, policy in POLICIES.items()) + "."
