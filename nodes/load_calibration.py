"""Node Load Calibration: loads a sidecar that the user chooses, where DuCa Cache should not choose one automatically."""

from __future__ import annotations

from textwrap import indent

from comfy_api.latest import io

from . import sidecars
from .inputs import fields
from .pictures.calibration_plot import calibration_plot
from .pictures.calibration_text import calibration_text
from .sidecars import calibrations


class LoadCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DuCaLoadCalibration",
            display_name="Load Calibration",
            category="model_patches/duca",
            description="Loads a calibration from models/duca_calibration. Seldom needed: DuCa Cache finds its checkpoint's calibration "
            "automatically.",
            inputs=[io.Combo.Input("calibration_name", options=sidecars.names(), tooltip="A file in models/duca_calibration.")],
            outputs=[
                fields.Calibration.Output(
                    display_name="calibration", tooltip="For DuCa Cache, which refuses the calibration of another checkpoint."
                ),
                io.String.Output(display_name="text", tooltip="What the file says: model, prompts, sampler, and the PSNR to expect."),
                io.Image.Output(
                    display_name="plot",
                    tooltip="Expected error and sensitivity of every step; for ICC, the share of every layer that its factors keep.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, calibration_name: str) -> tuple:
        """Makes the host load the file again when it changed."""
        return sidecars.state_of(sidecars.path_of(calibration_name))

    @classmethod
    def execute(cls, calibration_name: str) -> io.NodeOutput:
        path = sidecars.path_of(calibration_name)
        calibration = calibrations.load(path)
        text = calibration_text(calibration, path, is_new=False)
        return io.NodeOutput(calibration, indent(text, "    "), calibration_plot(calibration))
