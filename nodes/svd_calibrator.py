"""Node SVD Calibrator: learns from samplings of a checkpoint how to fill its skipped evaluations, and saves that in a sidecar."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from textwrap import indent
from types import MappingProxyType
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..cache_core.calibration.calibration import Calibration
from ..cache_core.calibration.low_rank import METHODS
from ..cache_core.checks import check_one_of
from ..cache_core.tuning import Wishes
from . import sidecars
from .host.ksampler import fitted
from .inputs import fields
from .page.notices import say, show
from .pictures.calibration_plot import calibration_plot
from .pictures.calibration_text import calibration_text
from .sidecars.calibrating import Sampling, calibrate
from .sidecars.calibrations import calibration_of

_WANTED = MappingProxyType({"forecast": ("forecast",), "ICC": ("icc",), "both": ("forecast", "icc")})


class SvdCalibrator(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DuCaSVDCalibrator",
            display_name="SVD Calibrator (learns this checkpoint)",
            category="model_patches/duca",
            description="Samples your prompts again and again and learns which steps of this checkpoint to skip and how to fill them, or, "
            "for mode icc, low-rank factors of its layers by SVD. Saves the calibration in models/duca_calibration, where DuCa Cache finds "
            "it automatically. Needed once per checkpoint; takes as long as many samplings.",
            inputs=_inputs(),
            outputs=[
                fields.Calibration.Output(display_name="calibration", tooltip="For DuCa Cache, which also finds it automatically."),
                io.String.Output(display_name="text", tooltip="What was learned, in words."),
                io.Image.Output(
                    display_name="plot",
                    tooltip="Expected error and sensitivity of every step; for ICC, the share of every layer that its factors keep.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: list, positive: list, negative: list, latent: list, **given: list) -> io.NodeOutput:
        options: dict[str, Any] = {name: values[0] for name, values in given.items()}
        check_one_of("what", options["what"], _WANTED)  # the host does not check the inputs of nodes that take lists
        check_one_of("icc_method", options["icc_method"], METHODS)
        wanted, node_id = _WANTED[options["what"]], cls.hidden.unique_id
        wishes = Wishes(method=options["icc_method"], rank=options["rank"])
        negatives = [negative[min(i, len(negative) - 1)] for i in range(len(positive))]
        sampling = Sampling(
            positive, negatives, fitted(model[0], latent[0])[:1], options["sampler_name"], options["scheduler"], options["steps"],
            options["cfg"], options["first_seed"],
        )  # fmt: skip
        own = calibration_of(model[0], None, lambda text: say(f"SVD Calibrator: {text}.", node_id))
        kept = own if own is not None and not options["recalibrate"] and _has(own[1], wanted, wishes) else None
        path, calibration = kept or _made(model[0], sampling, wanted, wishes, options["name"], node_id, own and own[1])
        show(f"{'saved as' if kept is None else 'uses the calibration'} {path.name}", node_id)  # replaces the name of the last stage
        text, plot = calibration_text(calibration, path, is_new=kept is None), calibration_plot(calibration)
        shown = {**ui.PreviewImage(plot, cls=cls).as_dict(), "text": (text,)}
        return io.NodeOutput(calibration, indent(text, "    "), plot, ui=shown)  # indented, as Preview as Text then keeps the lines


def _has(calibration: Calibration, wanted: Collection[str], wishes: Wishes) -> bool:
    """Returns whether the calibration already has everything that is wanted."""
    if "forecast" in wanted and calibration.forecast is None:
        return False
    about = calibration.about
    return "icc" not in wanted or (calibration.factors is not None and (about.method, about.rank) == (wishes.method, wishes.rank))


def _made(
    model: ModelPatcher,
    sampling: Sampling,
    wanted: Collection[str],
    wishes: Wishes,
    name: str,
    node_id: str | None,
    older: Calibration | None,
) -> tuple[Path, Calibration]:
    """Makes and saves a calibration. It takes over the parts that only `older`, of the same checkpoint, has.

    Returns:
        The path of the sidecar, and the calibration.
    """
    sidecars.make_folder()
    asked = replace(wishes, forecast="forecast" in wanted, method=wishes.method if "icc" in wanted else "")
    calibration = calibrate(model, sampling, asked, name, node_id)
    if older is not None:
        calibration = calibration.with_rest_of(older)
    return sidecars.save(calibration.to_sidecar()), calibration


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The model to calibrate, best without a LoRA: it would change what is learned."),
        io.Conditioning.Input("positive", tooltip="Your prompts as a list (Prompt List → CLIP Text Encode): eight or more."),
        io.Conditioning.Input("negative", tooltip="The negative prompt: one for all, or one for each positive."),
        io.Latent.Input("latent", tooltip="An empty latent of your usual size. Only the first of a batch is used."),
        *fields.sampler_fields(),
        io.Int.Input(
            "steps",
            default=28,
            min=4,
            max=200,
            tooltip="Your usual number of steps. Other numbers can use the calibration too, by interpolation.",
        ),
        fields.guidance_field(),
        io.Combo.Input(
            "what",
            options=list(_WANTED),
            default="forecast",
            tooltip="forecast: which steps to skip and how to fill them, for mode auto. ICC: low-rank factors of the linear layers, for "
            "mode icc. both: forecast and ICC.",
        ),
        *map(fields.advanced, _advanced_inputs()),
    ]


def _advanced_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "icc_method",
            options=list(METHODS),
            default="cd_svd",
            tooltip="ICC: how the SVD of a layer weighs its channels. svd: all alike. ca_svd: by their activations, as in the paper. "
            "cd_svd: by how these change from step to step.",
        ),
        io.Int.Input(
            "rank",
            default=64,
            min=1,
            max=1024,
            tooltip="ICC: rank of the low-rank factors. A higher one is closer and slower; use 128 for FLUX.",
        ),
        io.Int.Input(
            "first_seed", default=100, min=0, max=2**32 - 1, tooltip="Seed of the first prompt. Each further prompt gets the next seed."
        ),
        io.String.Input("name", default="", tooltip="Beginning of the file's name. If empty, the name of the model family."),
        io.Boolean.Input("recalibrate", default=False, tooltip="Calibrates again even if the checkpoint already has a calibration."),
    ]
