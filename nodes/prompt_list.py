"""Node Prompt List: makes a list of prompts from lines of text, for SVD Calibrator."""

from __future__ import annotations

from comfy_api.latest import io

_DEFAULT = "\n".join(
    (
        "a photo of a woman with a red umbrella in the rain",
        "a wooden house by a lake at sunset",
        "a bowl of fruit on a table, oil painting",
        "a city street at night with neon signs that say OPEN",
    )
)
_NONE = "write at least one prompt"


class PromptList(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DuCaPromptList",
            display_name="Prompt List",
            category="model_patches/duca",
            description="Makes a list of prompts, one per line. Through a CLIP Text Encode, it gives SVD Calibrator several prompts to "
            "learn from.",
            inputs=[
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default=_DEFAULT,
                    tooltip="One prompt per line; empty lines do not count. Write eight or more, different ones, like those that you will "
                    "use.",
                )
            ],
            outputs=[io.String.Output(display_name="prompts", is_output_list=True, tooltip="The prompts, one at a time.")],
        )

    @classmethod
    def validate_inputs(cls, prompts: str | None = None) -> bool | str:
        return True if prompts is None or _lines(prompts) else _NONE

    @classmethod
    def execute(cls, prompts: str) -> io.NodeOutput:
        lines = _lines(prompts)
        if not lines:  # the host does not check a text that comes over a link
            raise ValueError(_NONE)
        return io.NodeOutput(lines)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
