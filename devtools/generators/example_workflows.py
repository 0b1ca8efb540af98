"""Writes the example workflows of full-size models, workflows/duca_MODEL.json. One function for each says which nodes are joined how.

A note on the canvas lists the files that the loaders ask for. Names of files and settings are those of ComfyUI's own templates
(comfyui-workflow-templates 0.7.25; for Z-Image, Comfy-Org's model card). FLUX.1-dev's and the demo's workflows are drawn by hand.

  python3 -m devtools.generators.example_workflows    after `python3 dev.py host`
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from devtools.generators.workflow_sheet import Node, Sheet

ROOT = Path(__file__).resolve().parents[2]
_T5 = "t5xxl_fp8_e4m3fn_scaled.safetensors"
_CACHE = "Move **speedup** in *DuCa Cache*, queue, and read *Cache Report*. Keep *DuCa Cache* last before the sampler."
_NOT_LIGHTNING = "Not with the Lightning LoRAs: 4 or 8 steps leave nothing to skip. "
_UNMEASURED = "Nobody has measured yet how far this model can go: compare with mode `off`, or let *Cache Sweep* do it."


def z_image(s: Sheet) -> str:
    model = unet(s, "z_image_bf16.safetensors")
    clip = text_encoder(s, "lumina2", "qwen_3_4b.safetensors")
    vae = vae_file(s, "ae.safetensors")
    latent = s.add("EmptySD3LatentImage", width=1024, height=1024)
    positive, negative = prompts(s, clip, "A lighthouse keeper repairing a lamp by candlelight, oil painting", "blurry, low quality")
    model = s.add("ModelSamplingAuraFlow", model=model, shift=3.0)
    image(s, vae, ksampler(s, cache(s, model), positive, negative, latent, 30, 4.0, "res_multistep"))
    return (
        "Z-Image with DuCa Cache.\nThis is the base model: 30 to 50 steps, cfg 4, speedup 2. Z-Image Turbo's 8 or 9 steps leave a cache "
        "too little to skip. "
    )


def qwen_image(s: Sheet) -> str:
    model = unet(s, "qwen_image_fp8_e4m3fn.safetensors")
    clip = text_encoder(s, "qwen_image", "qwen_2.5_vl_7b_fp8_scaled.safetensors")
    vae = vae_file(s, "qwen_image_vae.safetensors")
    latent = s.add("EmptySD3LatentImage", width=1328, height=1328)
    positive, negative = prompts(s, clip, 'A bakery window at dawn, a chalkboard beside the door says "FRESH BREAD 7 AM"', "")
    model = s.add("ModelSamplingAuraFlow", model=model, shift=3.1)
    image(s, vae, ksampler(s, cache(s, model), positive, negative, latent, 30, 2.5))
    return f"Qwen-Image with DuCa Cache.\n20 to 40 steps, cfg 2.5, speedup 2. {_NOT_LIGHTNING}"


def qwen_image_edit(s: Sheet) -> str:
    model = unet(s, "qwen_image_edit_2509_fp8_e4m3fn.safetensors")
    clip = text_encoder(s, "qwen_image", "qwen_2.5_vl_7b_fp8_scaled.safetensors")
    vae = vae_file(s, "qwen_image_vae.safetensors")
    picture = s.add("LoadImage", image="example.png")
    s.column(420, 340, "What to change")
    scaled = s.add("FluxKontextImageScale", image=picture)
    latent = s.add("VAEEncode", pixels=scaled, vae=vae)
    encode, given = "TextEncodeQwenImageEditPlus", {"clip": clip, "vae": vae, "image1": scaled}
    positive = s.add(encode, title="Prompt", prompt="Change the background to a snowy mountain at sunset", **given)
    negative = s.add(encode, title="Negative prompt", prompt="", **given)
    model = s.add("CFGNorm", model=s.add("ModelSamplingAuraFlow", model=model, shift=3.0))
    image(s, vae, ksampler(s, cache(s, model), positive, negative, latent, 30, 2.5))
    about = "Qwen-Image-Edit (2509) with DuCa Cache.\n20 to 50 steps, cfg 2.5, speedup 2; choose your picture in *Load Image*."
    return f"{about} {_NOT_LIGHTNING}"


def wan22_t2v(s: Sheet) -> str:
    high, low, clip, vae = wan_files(s, "t2v")
    latent = s.add("EmptyHunyuanLatentVideo", width=640, height=640, length=81)
    positive, negative = prompts(s, clip, "A red fox trots through fresh snow, the camera follows it low above the ground", _WAN_NEGATIVE)
    two_experts(s, high, low, vae, positive, negative, latent)
    return f"Wan 2.2 14B, text to video, with DuCa Cache.\n{_TWO_EXPERTS}"


def wan22_i2v(s: Sheet) -> str:
    high, low, clip, vae = wan_files(s, "i2v")
    picture = s.add("LoadImage", image="example.png")
    positive, negative = prompts(s, clip, "The camera moves slowly closer, leaves drift by in the wind", _WAN_NEGATIVE)
    start = s.add("WanImageToVideo", positive=positive, negative=negative, vae=vae, start_image=picture, width=640, height=640, length=81)
    two_experts(s, high, low, vae, start, start, start)
    return f"Wan 2.2 14B, image to video, with DuCa Cache.\n{_TWO_EXPERTS}Choose the first picture in *Load Image*. "


def flux_kontext(s: Sheet) -> str:
    model = unet(s, "flux1-dev-kontext_fp8_scaled.safetensors")
    clip = text_encoder(s, "flux", "clip_l.safetensors", _T5)
    vae = vae_file(s, "ae.safetensors")
    picture = s.add("LoadImage", image="example.png")
    s.column(420, 340, "What to change")
    latent = s.add("VAEEncode", pixels=s.add("FluxKontextImageScale", image=picture), vae=vae)
    prompt = s.add("CLIPTextEncode", title="Prompt", clip=clip, text="Make it a pencil drawing, keep the composition")
    reference = s.add("ReferenceLatent", conditioning=prompt, latent=latent)
    positive = s.add("FluxGuidance", conditioning=reference, guidance=2.5)
    negative = s.add("ConditioningZeroOut", conditioning=prompt)
    image(s, vae, ksampler(s, cache(s, model), positive, negative, latent, 28, 1.0))
    return "FLUX.1 Kontext [dev] with DuCa Cache.\n20 to 28 steps, cfg 1, speedup 2; choose your picture in *Load Image*. "


def chroma(s: Sheet) -> str:
    model = unet(s, "Chroma1-HD-fp8_scaled_rev2.safetensors")
    clip = text_encoder(s, "chroma", _T5)
    vae = vae_file(s, "ae.safetensors")
    latent = s.add("EmptySD3LatentImage", width=1024, height=1024)
    s.column(420, 340, "Prompt and noise shift")
    clip = s.add("T5TokenizerOptions", clip=clip)
    positive = s.add("CLIPTextEncode", title="Prompt", clip=clip, text="Close-up photograph of a kingfisher on a mossy branch, soft light")
    negative = s.add("CLIPTextEncode", title="Negative prompt", clip=clip, text="low quality, unfinished, flawed, blurred")
    model = s.add("ModelSamplingAuraFlow", model=model, shift=1.0)
    image(s, vae, ksampler(s, cache(s, model), positive, negative, latent, 26, 3.5, scheduler="beta"))
    return "Chroma1-HD with DuCa Cache.\n26 to 40 steps, cfg 3.5, speedup 2. "


def sd35_large(s: Sheet) -> str:
    checkpoint = files(s, "CheckpointLoaderSimple", ckpt_name=s.file("checkpoints", "sd3.5_large_fp8_scaled.safetensors"))
    latent = s.add("EmptySD3LatentImage", width=1024, height=1024)
    positive, negative = prompts(s, checkpoint, "A glass bottle with a galaxy inside on a kitchen table, mountains outside", "")
    image(s, checkpoint, ksampler(s, cache(s, checkpoint), positive, negative, latent, 28, 4.0, scheduler="sgm_uniform"))
    return "Stable Diffusion 3.5 large with DuCa Cache.\n20 to 40 steps, cfg 4, speedup 2. The file has its text encoders in it. "


def hunyuan_video(s: Sheet) -> str:
    model = unet(s, "hunyuan_video_t2v_720p_bf16.safetensors")
    clip = text_encoder(s, "hunyuan_video", "clip_l.safetensors", "llava_llama3_fp8_scaled.safetensors")
    vae = vae_file(s, "hunyuan_video_vae_bf16.safetensors")
    latent = s.add("EmptyHunyuanLatentVideo", width=848, height=480, length=73)
    s.column(420, 340, "Prompt and noise shift")
    prompt = s.add("CLIPTextEncode", title="Prompt", clip=clip, text="A paper boat drifts down a rainy street, reflections of neon signs")
    positive = s.add("FluxGuidance", conditioning=prompt, guidance=6.0)
    negative = s.add("ConditioningZeroOut", conditioning=prompt)
    model = s.add("ModelSamplingSD3", model=model, shift=7.0)
    latent = ksampler(s, cache(s, model), positive, negative, latent, 30, 1.0)
    video(s, s.add("VAEDecodeTiled", samples=latent, vae=vae, tile_size=256, overlap=64), 24.0)
    s.report(("", latent, latent.given["model"]))
    return "HunyuanVideo with DuCa Cache.\n20 to 50 steps, cfg 1, speedup 2. "


def ltx_video(s: Sheet) -> str:
    checkpoint = files(s, "CheckpointLoaderSimple", ckpt_name=s.file("checkpoints", "ltx-video-2b-v0.9.safetensors"))
    clip = text_encoder(s, "ltxv", "t5xxl_fp16.safetensors")
    latent = s.add("EmptyLTXVLatentVideo", width=768, height=512, length=97)
    text = (
        "A woman with short grey hair walks along a stone pier in the morning. She wears a yellow raincoat and carries a basket of fish. "
        "The camera moves backwards in front of her at walking pace. Gulls circle above the boats behind her, the light is soft and cold."
    )
    positive, negative = prompts(s, clip, text, "low quality, worst quality, deformed, distorted, motion smear, motion artifacts")
    both = s.add("LTXVConditioning", positive=positive, negative=negative, frame_rate=25.0)
    model = cache(s, checkpoint)
    s.column(1200, 300, "Sampling", span=1180)
    sampler = s.add("KSamplerSelect", sampler_name="euler")
    sigmas = s.add("LTXVScheduler", steps=30, latent=latent)
    given: dict[str, Any] = {"positive": both, "negative": both, "sampler": sampler, "sigmas": sigmas, "latent_image": latent}
    latent = s.add("SamplerCustom", model=model, noise_seed=1, cfg=3.0, **given)
    video(s, s.add("VAEDecode", samples=latent, vae=checkpoint), 24.0)
    s.report(("", latent, model))
    return "LTX-Video 2B with DuCa Cache.\n30 to 40 steps, cfg 3, speedup 2. This model wants long prompts. "


def hidream(s: Sheet) -> str:
    model = unet(s, "hidream_i1_full_fp8.safetensors")
    names = ("clip_l_hidream.safetensors", "clip_g_hidream.safetensors", _T5, "llama_3.1_8b_instruct_fp8_scaled.safetensors")
    clip = s.add("QuadrupleCLIPLoader", **{f"clip_name{i}": s.file("text_encoders", name) for i, name in enumerate(names, 1)})
    vae = vae_file(s, "ae.safetensors")
    latent = s.add("EmptySD3LatentImage", width=1024, height=1024)
    positive, negative = prompts(s, clip, "A lone red tree on a foggy plain at night, wide shot, instant film", "bad ugly jpeg artifacts")
    model = s.add("ModelSamplingSD3", model=model, shift=3.0)
    image(s, vae, ksampler(s, cache(s, model), positive, negative, latent, 50, 5.0, "uni_pc"))
    return "HiDream-I1 full with DuCa Cache.\n50 steps, cfg 5, speedup 2. "


WORKFLOWS: Mapping[str, Callable[[Sheet], str]] = {
    f"duca_{draw.__name__}": draw
    for draw in (
        z_image, qwen_image, qwen_image_edit, wan22_t2v, wan22_i2v, flux_kontext, chroma, sd35_large, hunyuan_video, ltx_video, hidream,
    )
}  # fmt: skip

# --- what several have in common

_WAN_NEGATIVE = "overexposed, static, blurred details, subtitles, worst quality, jpeg artifacts, deformed, cluttered background"
_TWO_EXPERTS = (
    "Two models: the first makes steps 1 to 10 of 20, the second the rest. Each has a *DuCa Cache* and a report of its own, and each "
    "begins with a full step. 20 to 40 steps, cfg 3.5, speedup 2; change the middle in both samplers. Not with the 4-step LoRAs: they "
    "leave nothing to skip. "
)


def files(s: Sheet, loader: str, **given: Any) -> Node:
    """Starts the first column with a loader."""
    s.column(20, 340, "Model files and size")
    return s.add(loader, **given)


def unet(s: Sheet, name: str) -> Node:
    return files(s, "UNETLoader", unet_name=s.file("diffusion_models", name))


def text_encoder(s: Sheet, kind: str, *names: str) -> Node:
    """Adds a loader of one text encoder file or two."""
    if len(names) == 1:
        return s.add("CLIPLoader", clip_name=s.file("text_encoders", names[0]), type=kind)
    first, second = (s.file("text_encoders", name) for name in names)
    return s.add("DualCLIPLoader", clip_name1=first, clip_name2=second, type=kind)


def vae_file(s: Sheet, name: str) -> Node:
    return s.add("VAELoader", vae_name=s.file("vae", name))


def wan_files(s: Sheet, task: str) -> tuple[Node, Node, Node, Node]:
    """Adds loaders of both experts, the text encoder and the VAE."""
    high = unet(s, f"wan2.2_{task}_high_noise_14B_fp8_scaled.safetensors")
    low = s.add("UNETLoader", unet_name=s.file("diffusion_models", f"wan2.2_{task}_low_noise_14B_fp8_scaled.safetensors"))
    clip = text_encoder(s, "wan", "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    return high, low, clip, vae_file(s, "wan_2.1_vae.safetensors")


def prompts(s: Sheet, clip: Node, positive: str, negative: str) -> tuple[Node, Node]:
    s.column(420, 340, "Prompt and noise shift")
    return (
        s.add("CLIPTextEncode", title="Prompt", clip=clip, text=positive),
        s.add("CLIPTextEncode", title="Negative prompt", clip=clip, text=negative),
    )


def cache(s: Sheet, model: Node) -> Node:
    s.column(820, 320, "Cache", color="#8A8")
    return s.add("DuCaCache", model=model)


def ksampler(
    s: Sheet, model: Node, positive: Node, negative: Node, latent: Node, steps: int, cfg: float, sampler: str = "euler",
    scheduler: str = "simple",
) -> Node:  # fmt: skip
    s.column(1200, 300, "Sampling", span=1180)
    given: dict[str, Any] = {
        "positive": positive,
        "negative": negative,
        "latent_image": latent,
        "sampler_name": sampler,
        "scheduler": scheduler,
    }
    return s.add("KSampler", model=model, seed=1, steps=steps, cfg=cfg, **given)


def two_experts(s: Sheet, high: Node, low: Node, vae: Node, positive: Node, negative: Node, latent: Node) -> None:
    """Adds a cache and a sampler for each half. The samplers change over in the middle."""
    models = [s.add("ModelSamplingSD3", model=model, shift=8.0) for model in (high, low)]
    s.column(820, 320, "Cache, one for each model", color="#8A8")
    first, second = (
        s.add("DuCaCache", title=f"DuCa Cache: {name}", model=model) for name, model in zip(("high noise", "low noise"), models)
    )
    s.column(1200, 300, "Sampling", span=1180)
    common: dict[str, Any] = {
        "positive": positive,
        "negative": negative,
        "steps": 20,
        "cfg": 3.5,
        "sampler_name": "euler",
        "scheduler": "simple",
    }
    noisy = s.add(
        "KSamplerAdvanced", model=first, latent_image=latent, title="First half", noise_seed=1, end_at_step=10, add_noise="enable",
        return_with_leftover_noise="enable", **common,
    )  # fmt: skip
    done = s.add(
        "KSamplerAdvanced", model=second, latent_image=noisy, title="Second half", start_at_step=10, end_at_step=10000,
        add_noise="disable", return_with_leftover_noise="disable", **common,
    )  # fmt: skip
    video(s, s.add("VAEDecode", samples=done, vae=vae), 16.0)
    s.report(("high noise", noisy, first), ("low noise", done, second))


def image(s: Sheet, vae: Node, latent: Node) -> None:
    decoded = s.add("VAEDecode", samples=latent, vae=vae)
    s.column(1540, 800)
    s.add("SaveImage", images=decoded, filename_prefix=s.name)
    s.report(("", latent, latent.given["model"]))


def video(s: Sheet, frames: Node, fps: float) -> None:
    made = s.add("CreateVideo", images=frames, fps=fps)
    s.column(1540, 800)
    s.add("SaveVideo", video=made, filename_prefix=f"video/{s.name}")


# --- writing


def node_classes() -> dict[str, Any]:
    """Returns every node class of this process's ComfyUI, which must be loaded, and of the pack."""
    host, pack = import_module("nodes"), import_module("comfyui_duca.nodes")
    asyncio.run(host.init_builtin_extra_nodes())
    ours = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    return {**host.NODE_CLASS_MAPPINGS, **{node.GET_SCHEMA().node_id: node for node in ours}}


def drawn(name: str, classes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the workflow of this name."""
    sheet = Sheet(name, classes)
    about = WORKFLOWS[name](sheet)
    return sheet.graph(f"{about}{_UNMEASURED}\n\n{_CACHE}")


def main() -> int:
    if not os.environ.get("COMFYUI_PATH"):  # starts again in the environment that has ComfyUI
        from devtools.environment.host_setup import ensure_host

        host = ensure_host()
        command = [str(host.python), "-m", "devtools.generators.example_workflows"]
        return subprocess.call(command, cwd=ROOT, env=os.environ | host.environment)
    from devtools.driver.inprocess import load_comfyui, load_pack

    load_comfyui()
    load_pack()
    classes = node_classes()
    for name in WORKFLOWS:
        path = ROOT / "workflows" / f"{name}.json"
        path.write_text(json.dumps(drawn(name, classes), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
