"""Measures ComfyUI's own EasyCache and LazyCache over their thresholds, beside auto and fewer steps with as many full evaluations.

The prompts and settings are those of bench/quality.py; each node works in its own default range (0.15 to 0.95 of the sampling). All
pictures are one batch, for which the node decides once. EasyCache adds what it kept to the network's input in place. As the demo model is
float32, this input is the very tensor from which the host then computes the denoised picture, and the picture is ruined; a 16-bit model
has a separate tensor there. So both nodes are given a copy. It changes nothing for LazyCache, which adds out of place.
`--quick` takes 4 prompts. Writes its table to docs/benchmarks.md.
"""

from __future__ import annotations

import sys
from functools import cache
from unittest.mock import patch

from common import machine, publish, start, table

start()
import numpy as np
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_easycache import EasyCacheHolder, EasyCacheNode, LazyCacheNode
from comfyui_duca.cache_core import Settings
from quality import GUIDANCE, PROMPTS, STEPS, Bench

THRESHOLDS = (0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.0, 1.5, 3.0)  # 0.2 is the nodes' default, 3 their highest
HEADER = ["node, threshold", "full", "compute ×", "PSNR dB", "median", "SSIM", "auto, PSNR dB", "SSIM", "fewer steps, PSNR dB", "SSIM"]


def on_a_copy(executor, latent, *args, **kwargs):
    """Gives the cache's own wrapper a copy of the network's input, so that what it adds in place does not reach the host's tensor."""
    return executor(latent.clone(), *args, **kwargs)


def sampled(bench: Bench, node: type, threshold: float, copies: bool = True) -> tuple[np.ndarray, int]:
    """Returns the pictures of a sampling with a node, and the number of evaluations that the network computed for them.

    Args:
        bench: The model, the prompts and the noise.
        node: EasyCacheNode or LazyCacheNode.
        threshold: The node's reuse threshold.
        copies: Whether the node is given a copy of the network's input.
    """
    model, rows = bench.model.clone(), 0
    if copies:  # before the node adds its wrapper: the first one added is the outermost
        model.add_wrapper(WrappersMP.DIFFUSION_MODEL, on_a_copy)
    model = node.execute(model, threshold, 0.15, 0.95, False).result[0]

    def counted(_module, args) -> None:
        nonlocal rows
        rows += args[0].shape[0]

    hook = model.model.diffusion_model.double_blocks[0].img_attn.qkv.register_forward_pre_hook(counted)
    try:
        pictures = bench.pictures(model, STEPS)
    finally:
        hook.remove()
    full, rest = divmod(rows, 2 * len(bench.prompts))
    assert not rest
    return pictures, full


def check(bench: Bench) -> None:
    """Checks bit for bit that the copy changes nothing else about the nodes.

    Where they skip nothing, pictures must be the uncached ones. Elsewhere they must be as if the nodes added out of place.
    """
    add = EasyCacheHolder.apply_cache_diff
    for node in (EasyCacheNode, LazyCacheNode):
        assert np.array_equal(sampled(bench, node, 0.0)[0], bench.reference)
        with patch.object(EasyCacheHolder, "apply_cache_diff", lambda self, x, *args, **kwargs: add(self, x.clone(), *args, **kwargs)):
            careful, full = sampled(bench, node, 0.2, copies=False)
        pictures, count = sampled(bench, node, 0.2)
        assert np.array_equal(pictures, careful) and count == full < STEPS


def rows(bench: Bench) -> list[list[str]]:
    """Returns the table's rows, one per node and threshold."""

    @cache
    def others(full: int) -> list[str]:
        """Returns mean PSNR and SSIM of auto, then those of fewer steps, with `full` full evaluations."""
        ours, fewer = bench.row("auto", Settings(speedup=STEPS / full)), bench.row("fewer steps", None, full)
        assert int(ours[1].split(" / ")[0]) == full
        return [ours[3], ours[5], fewer[3], fewer[5]]

    found = []
    for node in (EasyCacheNode, LazyCacheNode):
        for threshold in THRESHOLDS:
            pictures, full = sampled(bench, node, threshold)
            row = [f"{node.__name__.removesuffix('Node')}, {threshold:g}", str(full), f"{STEPS / full:.2f}", *bench.distances(pictures)]
            print(*row, flush=True)
            found.append(row + others(full))
    return found


def main() -> None:
    check(Bench(PROMPTS[:2]))
    bench = Bench(PROMPTS[:4] if "--quick" in sys.argv else PROMPTS)
    about = f"{len(bench.prompts)} prompts, {STEPS} euler steps, guidance {GUIDANCE}; {machine()}."
    publish("host_caches", f"{about}\n\n{table(HEADER, rows(bench))}")


if __name__ == "__main__":
    main()
