"""Node Cache Compare: shows cached pictures beside the uncached one, with their distance from it."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from . import host
from .pictures.comparison import Row, in_lines, output, outputs, score

_PER_LINE = 4  # pictures in a line of the grid, beside the reference


class CacheCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DuCaCacheCompare",
            display_name="Cache Compare",
            category="model_patches/duca",
            description="Shows cached pictures beside the uncached one, with PSNR, SSIM and a map of the differences. "
            "All must have the same seed, prompt and steps.",
            inputs=[
                io.Image.Input("reference", tooltip="The uncached picture, or a batch of them."),
                io.Image.Input(
                    "cached",
                    tooltip="The cached pictures as one batch (Batch Images joins several). If reference is a batch: first all pictures of "
                    "the first setting, in the order of reference, then all of the next.",
                ),
                io.String.Input(
                    "labels",
                    optional=True,
                    multiline=True,
                    default="",
                    tooltip="Names of the settings, one per line. If empty, they are numbered.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="From DuCa Cache. With one setting, the table also has time and compute of this model's last run.",
                ),
            ],
            outputs=outputs(),
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, reference: io.Image.Type, cached: io.Image.Type, labels: str = "", model: io.Model.Type | None = None
    ) -> io.NodeOutput:
        _check_fit(reference, cached)
        settings = cached.split(reference.shape[0])
        names = _names(labels, len(settings))
        book = host.book_of(model) if model is not None else None
        report = book.last if book is not None and len(settings) == 1 else None
        if report is None:
            rows = [Row("reference", reference), *map(Row, names, settings)]
        else:
            rows = [Row("reference", reference, 1.0, 1.0), Row(names[0], cached, report.time_speedup, report.compute_speedup)]
        entries = score(rows[0], rows[1:])
        return output(cls, entries, in_lines(entries[1:], _PER_LINE))


def _check_fit(reference: torch.Tensor, cached: torch.Tensor) -> None:
    """Raises ValueError, with a message for the user, for pictures that cannot be compared."""
    if reference.shape[1:3] != cached.shape[1:3]:
        raise ValueError(f"the pictures differ in size: reference is {_size(reference)}, cached is {_size(cached)}")
    if cached.shape[0] % reference.shape[0]:
        raise ValueError(
            f"the counts do not fit: reference has {reference.shape[0]} pictures and cached {cached.shape[0]}; "
            "cached needs that many for every setting"
        )


def _size(pictures: torch.Tensor) -> str:
    return f"{pictures.shape[2]}x{pictures.shape[1]}"


def _names(labels: str, count: int) -> list[str]:
    """Returns a name for each of `count` settings. Raises ValueError where the number of labels is another."""
    names = [line.strip() for line in labels.splitlines() if line.strip()]
    if not names:
        return ["cached"] if count == 1 else [f"cached {number}" for number in range(1, count + 1)]
    if len(names) != count:
        raise ValueError(f"labels and pictures do not fit: {len(names)} labels for {count} settings; write one label per line, or none")
    return names
