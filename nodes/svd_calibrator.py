"""Node SVD Calibrator: learns from a few samplings how a checkpoint can be skipped, and keeps that beside it."""

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
            display_name="SVD Calibrator",
            category="model_patches/duca",
            description="Once per checkpoint: samples a few prompts, learns how to fill skipped evaluations, tries that out, and saves it "
            "in models/duca_calibration. From then on DuCa Cache finds it by itself. Takes minutes.",
            inputs=_inputs(),
            outputs=[
                fields.Calibration.Output(display_name="calibration", tooltip="For DuCa Cache. It would also find it by itself."),
                io.String.Output(display_name="text", tooltip="What was learned, in words."),
                io.Image.Output(display_name="plot", tooltip="Expected error and sensitivity per step, energy kept per layer."),
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
        show(f"{'saved as' if kept is None else 'uses the calibration'} {path.name}", node_id)  # in place of the last stage
        text, plot = calibration_text(calibration, path, is_new=kept is None), calibration_plot(calibration)
        shown = {**ui.PreviewImage(plot, cls=cls).as_dict(), "text": (text,)}
        return io.NodeOutput(calibration, indent(text, "    "), plot, ui=shown)  # indented, Preview as Text keeps the lines


def _has(calibration: Calibration, wanted: Collection[str], wishes: Wishes) -> bool:
    """Whether all that is wanted was learned already."""
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
    """A new calibration, saved, with what only `older`, of the same checkpoint, has."""
    sidecars.make_folder()
    asked = replace(wishes, forecast="forecast" in wanted, method=wishes.method if "icc" in wanted else "")
    calibration = calibrate(model, sampling, asked, name, node_id)
    if older is not None:
        calibration = calibration.with_rest_of(older)
    return sidecars.save(calibration.to_sidecar()), calibration


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The model to calibrate, as loaded. A LoRA on it is learned from as well; better without."),
        io.Conditioning.Input("positive", tooltip="One prompt, or several as a list (Prompt List → CLIP Text Encode). Eight or more."),
        io.Conditioning.Input("negative", tooltip="The negative prompt, one for all or as many as positive ones."),
        io.Latent.Input("latent", tooltip="An empty latent of the size you work at. Only the first of a batch is used."),
        *fields.sampler_fields(),
        io.Int.Input("steps", default=28, min=4, max=200, tooltip="The number of steps you work with; others are interpolated."),
        fields.guidance_field(),
        io.Combo.Input(
            "what",
            options=list(_WANTED),
            default="forecast",
            tooltip="forecast: for DuCa Cache in mode auto. ICC: low-rank factors of all layers for mode icc. both: either.",
        ),
        *map(fields.advanced, _advanced_inputs()),
    ]


def _advanced_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "icc_method",
            options=list(METHODS),
            default="cd_svd",
            tooltip="How layers are made low-rank. svd: as they are. ca_svd: by activations (the paper's). cd_svd: by their changes.",
        ),
        io.Int.Input("rank", default=64, min=1, max=1024, tooltip="Rank of the factors. More is closer and slower; FLUX takes 128."),
        io.Int.Input("first_seed", default=100, min=0, max=2**32 - 1, tooltip="Seed of the first prompt; each further one gets the next."),
        io.String.Input("name", default="", tooltip="Name of the file; empty takes the model family's."),
        io.Boolean.Input("recalibrate", default=False, tooltip="Calibrate anew even where a matching calibration is found."),
    ]
