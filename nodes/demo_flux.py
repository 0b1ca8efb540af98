"""Node Demo FLUX (tiny): gives a FLUX of 13 M parameters that ships with the pack, to try the cache on."""

from __future__ import annotations

from comfy_api.latest import io

from .demo.model import encode_prompt, load_demo_model


class DemoFlux(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DuCaDemoFlux",
            display_name="Demo FLUX (tiny)",
            category="model_patches/duca",
            description="A tiny FLUX that draws emoji of 48x48 pixels, to try DuCa Cache without a download. Use "
            "EmptyChromaRadianceLatentImage (48x48), cfg 2.5 and Load VAE with pixel_space.",
            inputs=[
                io.String.Input("prompt", default="red apple", tooltip="The name of an emoji, such as: tiger face, hamburger, castle."),
                io.String.Input("negative", default="", tooltip="What to move away from. Empty is the unconditional prompt."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The tiny FLUX model."),
                io.Conditioning.Output(display_name="positive", tooltip="The encoded prompt."),
                io.Conditioning.Output(display_name="negative", tooltip="The encoded negative prompt."),
            ],
        )

    @classmethod
    def execute(cls, prompt: str, negative: str) -> io.NodeOutput:
        return io.NodeOutput(load_demo_model(), encode_prompt(prompt), encode_prompt(negative))
