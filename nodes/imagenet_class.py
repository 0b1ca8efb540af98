"""Node ImageNet Class: gives a class-conditional DiT the class to draw, in place of a prompt."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from .dit.model import CLASS_LABEL, NO_CLASS

_NONE = 1000  # ImageNet's classes are 0 to 999
_SHOWN = (
    (207, "golden retriever"), (360, "otter"), (387, "red panda"), (974, "geyser"),
    (88, "macaw"), (979, "valley"), (417, "balloon"), (279, "Arctic fox"),
)  # fmt: skip


class ImageNetClass(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        shown = ", ".join(f"{number} {name}" for number, name in _SHOWN)
        return io.Schema(
            node_id="DuCaImageNetClass",
            display_name="ImageNet Class",
            category="model_patches/duca",
            description="Chooses the class that a class-conditional DiT draws, in place of a prompt. Also gives the null class, for "
            "guidance.",
            inputs=[
                io.Int.Input(
                    "class_number",
                    default=_SHOWN[0][0],
                    min=0,
                    max=_NONE,
                    tooltip=f"One of ImageNet's classes, 0 to 999; {_NONE} is no class at all. For example: {shown}.",
                )
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The class, for the sampler."),
                io.Conditioning.Output(display_name="negative", tooltip="The null class, for the sampler. At cfg 1 it is not used."),
            ],
        )

    @classmethod
    def execute(cls, class_number: int) -> io.NodeOutput:
        if not 0 <= class_number <= _NONE:  # the host does not check a number that comes over a link
            raise ValueError(f"class_number is {class_number}, but ImageNet's classes are 0 to 999, and {_NONE} is none")
        return io.NodeOutput(class_conditioning(class_number), class_conditioning(NO_CLASS))


def class_conditioning(label: int) -> list[list[Any]]:
    """Returns the host's conditioning for a class. It has no text, so that nodes that change text fail and do not draw another class."""
    return [[None, {CLASS_LABEL: torch.tensor([label])}]]
