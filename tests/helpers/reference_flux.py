"""FLUX's forward written out densely from its weights, independent of the host's blocks and of the pack.

Every sublayer is computed for all tokens. `kept` holds sublayer results of an earlier evaluation; `fresh` says
which tokens take the newly computed MLP (all others keep the old one).
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class ReferenceFlux:
    def __init__(self, model) -> None:
        # older hosts call the weight of a norm its scale
        self.w = {re.sub(r"_norm\.scale$", "_norm.weight", name): tensor.double() for name, tensor in model.state_dict().items()}
        p = model.params
        self.depth, self.depth_single, self.heads, self.C = p.depth, p.depth_single_blocks, p.num_heads, p.hidden_size
        self.axes, self.theta, self.patch = p.axes_dim, p.theta, model.patch_size

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def embed_vector(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.out_layer", F.silu(self.linear(f"{name}.in_layer", x)))

    def rope(self, q: Tensor, positions: Tensor) -> Tensor:
        """q (B, heads, L, D); positions (L, axes). Rotates pairs of channels by position · theta^(-2i/dim)."""
        angles = []
        for axis, dim in enumerate(self.axes):
            rates = self.theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angles.append(positions[:, axis : axis + 1].double() * rates)
        angle = torch.cat(angles, 1)  # (L, D/2)
        pairs = q.unflatten(-1, (-1, 2))
        cos, sin = angle.cos(), angle.sin()
        rotated = torch.stack((pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 0] * sin + pairs[..., 1] * cos), -1)
        return rotated.flatten(-2)

    def attention(self, qkv: Tensor, norms: list[tuple[str, slice]], positions: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

        def normed(x: Tensor, which: str) -> Tensor:
            out = torch.empty_like(x)
            for name, part in norms:
                rms = (x[:, :, part].square().mean(-1, keepdim=True) + 1e-6).rsqrt()
                out[:, :, part] = x[:, :, part] * rms * self.w[f"{name}.{which}.weight"]
            return out

        q, k = self.rope(normed(q, "query_norm"), positions), self.rope(normed(k, "key_norm"), positions)
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def norm(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, (self.C,), eps=1e-6) * (1 + scale) + shift

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.2", F.gelu(self.linear(f"{name}.0", x), approximate="tanh"))

    def mods(self, name: str, vec: Tensor, count: int) -> tuple[Tensor, ...]:
        return self.linear(name, F.silu(vec))[:, None].chunk(count, -1)

    def __call__(self, x, t, context, y, kept: dict | None = None, fresh=None, guidance=None) -> tuple[Tensor, dict[str, Tensor]]:
        """Output (B, C, H, W) and this evaluation's sublayer results by name.

        kept: use these attention results instead of new ones. fresh(stream, block) -> bool mask (L,) of tokens whose MLP is new.
        """
        x, context, y, t = x.double(), context.double(), y.double(), t.double()
        _, _, height, width = x.shape
        h, w, p = height // self.patch, width // self.patch, self.patch
        img = x.unflatten(2, (h, p)).unflatten(4, (w, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        img, txt = self.linear("img_in", img), self.linear("txt_in", context)
        rates = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)

        def sinusoids(value: Tensor) -> Tensor:
            phase = (value.double() * 1000)[:, None] * rates
            return torch.cat((phase.cos(), phase.sin()), -1)

        vec = self.embed_vector("time_in", sinusoids(t)) + self.embed_vector("vector_in", y)
        if guidance is not None:
            vec = vec + self.embed_vector("guidance_in", sinusoids(guidance))
        n = txt.shape[1]
        grid = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).reshape(-1, 2)
        positions = torch.cat((torch.zeros(n, 3), torch.cat((torch.zeros(h * w, 1), grid), 1)))
        results: dict[str, Tensor] = {}

        def settle(name: str, value: Tensor, mask: Tensor | None) -> Tensor:
            """The new value, or the old one where the mask is False (None: nowhere)."""
            if kept is not None:
                value = kept[name] if mask is None else torch.where(mask[None, :, None], value, kept[name])
            results[name] = value
            return value

        for i in range(self.depth):
            at = f"double_blocks.{i}"
            m = {s: self.mods(f"{at}.{s}_mod.lin", vec, 6) for s in ("img", "txt")}
            qkv = {s: self.linear(f"{at}.{s}_attn.qkv", self.norm(v, m[s][0], m[s][1])) for s, v in (("img", img), ("txt", txt))}
            norms = [(f"{at}.txt_attn.norm", slice(0, n)), (f"{at}.img_attn.norm", slice(n, None))]
            joint = self.attention(torch.cat((qkv["txt"], qkv["img"]), 1), norms, positions)
            streams = {}
            for s, value, part in (("img", img, joint[:, n:]), ("txt", txt, joint[:, :n])):
                value = value + m[s][2] * settle(f"{at}.{s}.attn", self.linear(f"{at}.{s}_attn.proj", part), None)
                new = self.mlp(f"{at}.{s}_mlp", self.norm(value, m[s][3], m[s][4]))
                streams[s] = value + m[s][5] * settle(f"{at}.{s}.mlp", new, fresh(s, i) if fresh else None)
            img, txt = streams["img"], streams["txt"]
        z = torch.cat((txt, img), 1)
        for i in range(self.depth_single):
            at = f"single_blocks.{i}"
            shift, scale, gate = self.mods(f"{at}.modulation.lin", vec, 3)
            projected = self.linear(f"{at}.linear1", self.norm(z, shift, scale))
            attn = settle(
                f"{at}.txt+img.attn", self.attention(projected[..., : 3 * self.C], [(f"{at}.norm", slice(None))], positions), None
            )
            mlp = F.gelu(projected[..., 3 * self.C :], approximate="tanh")
            output = self.linear(f"{at}.linear2", torch.cat((attn, mlp), -1))
            z = z + gate * settle(f"{at}.txt+img.output", output, fresh("txt+img", i) if fresh else None)
        img = z[:, n:]
        shift, scale = self.mods("final_layer.adaLN_modulation.1", vec, 2)
        out = self.linear("final_layer.linear", self.norm(img, shift, scale))
        return out.unflatten(1, (h, w)).unflatten(3, (-1, p, p)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3), results
