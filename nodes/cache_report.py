"""Node Cache Report: shows what the cache did in a finished run, with the time of every evaluation."""

from __future__ import annotations

from textwrap import indent

import torch
from comfy_api.latest import io, ui

from . import host
from .pictures.report_plot import report_plot
from .pictures.report_text import report_data, report_text

_FOREIGN = (
    "This latent did not come from any of this model's last runs, or was changed since. The report below is on the model's latest run. "
    "To see the run that made a latent, connect the latent and the model of the same sampler."
)


class CacheReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DuCaCacheReport",
            display_name="Cache Report",
            category="model_patches/duca",
            description="Shows what the cache did in the run that made this latent: how many evaluations of each kind, time, memory, "
            "speed-up.",
            inputs=[
                io.Latent.Input("samples", tooltip="The sampler's latent. The report waits for it, and is on the run that made it."),
                io.Model.Input("model", tooltip="The model that the sampler used, from DuCa Cache."),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The report in words."),
                io.Image.Output(display_name="plot", tooltip="One bar per evaluation, as high as the time it took."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, samples: io.Latent.Type, model: io.Model.Type) -> io.NodeOutput:
        book = host.book_of(model)
        if book is None:
            return _only_text("This model has no cache: connect the output of DuCa Cache, with a mode other than off.")
        report = book.report_of(samples["samples"]) or book.last
        if report is None:
            return _only_text("This model has not been sampled yet.")
        text, plot = report_text(report), report_plot(report)
        if book.is_foreign(samples["samples"]):
            text = f"{_FOREIGN}\n\n{text}"
        shown = {**ui.PreviewImage(plot, cls=cls).as_dict(), "text": (text,), "duca_cache_report": (report_data(report),)}
        return io.NodeOutput(indent(text, "    "), plot, ui=shown)  # indented, as Preview as Text then keeps the lines


def _only_text(text: str) -> io.NodeOutput:
    return io.NodeOutput(text, torch.zeros(1, 64, 64, 3), ui=ui.PreviewText(text))
