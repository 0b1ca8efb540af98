"""Trains the demo model on the CPU: a small rectified-flow model of FLUX's architecture for 48×48 emoji.

  python3 dev.py host
  COMFYUI_PATH=.dev/comfyui .dev/venv/bin/python demo/train_emoji_flux.py --minutes 75 --out emoji_flux_48.safetensors

The pictures are Noto Emoji by Google (Apache-2.0) from the npm package emoji-datasource-google, which the script fetches
with npm. The model that comes with the pack was trained in two runs of 75 and 61 minutes on two cores (--resume).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from devtools.driver.inprocess import load_comfyui, load_pack

load_comfyui()
load_pack()
import comfy.ops
import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
from comfy.ldm.flux.model import Flux
from comfyui_duca.demo.emoji_text import WORD_DIM, encode
from PIL import Image

SIZE = 48
EMOJI_PACKAGE = "emoji-datasource-google@16.0.0"
CATEGORIES = {"Smileys & Emotion", "Animals & Nature", "Food & Drink", "Activities", "Travel & Places"}
CONFIG = {
    "in_channels": 3, "out_channels": 3, "vec_in_dim": WORD_DIM, "context_in_dim": WORD_DIM, "hidden_size": 256, "mlp_ratio": 4.0,
    "num_heads": 4, "depth": 3, "depth_single_blocks": 6, "axes_dim": [8, 28, 28], "theta": 10000, "patch_size": 4,
    "qkv_bias": True, "guidance_embed": False,
}  # fmt: skip


def fetch_emoji(folder: Path) -> Path:
    """Downloads the npm package, unpacks it into `folder` and returns its root.

    Raises:
        SystemExit: If npm is not installed.
    """
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("npm is needed to fetch the pictures: install Node.js, or pass --emoji with the unpacked package")
    subprocess.run([npm, "pack", EMOJI_PACKAGE, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def load_emoji(package: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns premultiplied RGBA pictures (N, 4, 48, 48) uint8, contexts (N, 12, 64) and pooled vectors (N, 64)."""
    pictures, contexts, pooled = [], [], []
    for entry in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
        path = package / "img" / "google" / "64" / entry["image"]
        if entry["category"] not in CATEGORIES or "clock" in entry["short_name"] or not entry["has_img_google"] or not path.exists():
            continue
        small = Image.open(path).convert("RGBA").convert("RGBa").resize((SIZE - 4, SIZE - 4), Image.Resampling.LANCZOS)
        pictures.append(np.pad(np.asarray(small, dtype="uint8"), ((2, 2), (2, 2), (0, 0))))
        context, vector = encode(entry["name"] or entry["short_name"])
        contexts.append(context)
        pooled.append(vector)
    stacked = [torch.from_numpy(np.stack(part)) for part in (pictures, contexts, pooled)]
    return stacked[0].permute(0, 3, 1, 2), stacked[1], stacked[2]


def make_model() -> Flux:
    """Returns the host's Flux in float32, initialised with gates and a head of zeros.

    Norms are given a copy of their input: the blocks add to it in place, and the backward pass needs it as it was.
    """
    model = Flux(**CONFIG, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    for name, parameter in model.named_parameters():
        if name.endswith("scale"):
            torch.nn.init.ones_(parameter)
        elif parameter.ndim != 2 or ".lin." in name or "adaLN" in name or name.startswith("final_layer.linear"):
            torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.xavier_uniform_(parameter)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_pre_hook(lambda _module, inputs: (inputs[0].clone(),))
    return model


def draw_batch(data, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns `size` pictures (size, 3, 48, 48) in -1..1, their contexts and their pooled vectors.

    Pictures are shifted by up to two pixels and put on pastel backgrounds, all at random; half of the batches are flipped. One prompt in
    ten is dropped.
    """
    pictures, contexts, pooled = data
    chosen = torch.randint(0, len(pictures), (size,))
    image = pictures[chosen].float() / 255
    if torch.rand(()) < 0.5:
        image = image.flip(3)
    image = torch.roll(image, tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3))
    background = 0.55 + 0.45 * torch.rand(size, 3, 1, 1)
    context, vector = contexts[chosen].clone(), pooled[chosen].clone()
    dropped = torch.rand(size) < 0.1
    context[dropped], vector[dropped] = 0, 0
    return (image[:, :3] + (1 - image[:, 3:]) * background) * 2 - 1, context, vector


def flow_loss(model: Flux, x0: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Returns the loss of rectified flow: from x = (1-σ)·x0 + σ·ε the model predicts ε - x0. σ is the sigmoid of a normal number."""
    sigma = torch.sigmoid(torch.randn(len(x0)))
    noise, s = torch.randn_like(x0), sigma[:, None, None, None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = model((1 - s) * x0 + s * noise, sigma, context, pooled)
    return F.mse_loss(velocity.float(), noise - x0)


def train(model: Flux, data, minutes: float, batch: int, peak_rate: float) -> dict[str, torch.Tensor]:
    """Trains for `minutes` of wall time and returns the exponential moving average of the weights.

    The optimizer is AdamW. Its rate rises to `peak_rate` in 200 steps and falls along a cosine to 2 % of it over the wall time.
    """
    average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.95), weight_decay=0.01)
    begin, step, losses = time.time(), 0, []
    while (done := (time.time() - begin) / (minutes * 60)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * min(1, (step + 1) / 200) * (0.5 * (1 + math.cos(math.pi * done)) * 0.98 + 0.02)
        loss = flow_loss(model, *draw_batch(data, batch))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        with torch.no_grad():
            now = model.state_dict()
            torch._foreach_lerp_([average[k] for k in average], [now[k] for k in average], 1 - min(0.999, (1 + step) / (10 + step)))
        if step % 50 == 0:
            print(f"{step} steps, {(time.time() - begin) / step:.2f} s each, loss {np.mean(losses[-200:]):.4f}", flush=True)
    print(f"{step} steps, last loss {losses[-1]:.4f}")
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("emoji_flux_48.safetensors"))
    parser.add_argument("--emoji", type=Path, help=f"unpacked {EMOJI_PACKAGE}; fetched with npm if not given")
    parser.add_argument("--resume", type=Path, help="a safetensors file to go on from")
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        data = load_emoji(options.emoji or fetch_emoji(Path(folder)))
    print(f"{len(data[0])} pictures")
    model = make_model()
    if options.resume:
        model.load_state_dict({name: tensor.float() for name, tensor in safetensors.torch.load_file(options.resume).items()})
    average = train(model, data, options.minutes, options.batch, options.rate)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in average.items()}
    safetensors.torch.save_file(weights, options.out, metadata={"flux_config": json.dumps(CONFIG)})
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
