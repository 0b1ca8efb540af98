"""Node Cache Schedule: which evaluations are full, for DuCa Cache to follow in place of its own choice."""

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
            description="Says which evaluations DuCa Cache computes in full. For any step count; the strip below shows the sampler's.",
            inputs=_inputs(),
            outputs=[fields.Schedule.Output(display_name="schedule", tooltip="For DuCa Cache's input of the same name.")],
        )

    @classmethod
    def validate_inputs(cls, **given: Any) -> bool | str:
        """What the numbers' own ranges do not say; inputs from other nodes are None and are checked when they are known."""
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
            tooltip="How many times fewer full evaluations; cycles follow it while cycle_length is 0.",
        ),
        io.Int.Input(
            "cycle_length", default=0, min=0, max=100, tooltip="Steps from one full evaluation to the next. 0 follows the speedup slider."
        ),
        io.String.Input(
            "text",
            default=usual.text,
            tooltip="Kind custom text. F full, c conservative, a skipped, i incremental; 3F repeats, (Fca)* fills the run, "
            "what follows stands at its end. Without * the whole text is repeated.",
        ),
        io.Combo.Input("unit", options=list(Schedule.UNITS), default=usual.unit, tooltip="What skip_from and skip_to count in."),
        io.Float.Input(
            "skip_from",
            default=0.0,
            min=0.0,
            max=1000.0,
            step=1.0,
            tooltip="Nothing is skipped before this: percent of the sampling, or step.",
        ),
        io.Float.Input(
            "skip_to",
            default=100.0,
            min=0.0,
            max=1000.0,
            step=1.0,
            tooltip="Nothing is skipped from here on: percent of the sampling, or step (0 is the end).",
        ),
        io.Int.Input("warmup", default=usual.warmup, min=0, max=100, tooltip="Full steps at the beginning."),
        io.Int.Input("tail", default=usual.tail, min=0, max=100, tooltip="Full steps at the end."),
        io.Combo.Input(
            "several_evaluations",
            options=list(SEVERAL_EVALUATIONS),
            default=SEVERAL_EVALUATIONS[0],
            tooltip="Samplers like heun evaluate a noise level more than once. as their step: all of the step's kind. "
            "first only: the first is, the others are skipped.",
        ),
        fields.Calibration.Input(
            "calibration", optional=True, tooltip="For kind searched. Without it DuCa Cache looks for the checkpoint's own."
        ),
    ]


def _about_policies() -> str:
    """What each kind does, for its tooltip."""
    return ". ".join(f"{name}: {policy.about}" for name, policy in POLICIES.items()) + "."
