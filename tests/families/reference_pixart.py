"""PixArt-alpha's forward written out densely from its weights, independent of the host's blocks and of the pack.

Every sublayer is computed for all tokens. `kept` holds sublayer results of an earlier evaluation; `fresh` says which tokens take the newly
computed cross-attention and MLP (all others keep the old one).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class ReferencePixArt:
    def __init__(self, model) -> None:
        self.w = {name: tensor.double() for name, tensor in model.state_dict().items()}
        self.heads, self.width, self.depth, self.channels = model.num_heads, model.hidden_size, len(model.blocks), model.in_channels

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def embed_number(self, name: str, value: Tensor) -> Tensor:
        phase = value.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
        waves = torch.cat((phase.cos(), phase.sin()), -1)
        return self.linear(f"{name}.mlp.2", F.silu(self.linear(f"{name}.mlp.0", waves)))

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x), approximate="tanh"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return (torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v).transpose(1, 2).flatten(2)

    def norm(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), eps=1e-6) * (1 + scale) + shift

    def positions(self, h: int, w: int) -> Tensor:
        """Of latents (2h, 2w) around 64 wide: no interpolation, cells from 0 to 32 whatever their number."""
        rates = 10000 ** (-torch.arange(self.width // 4, dtype=torch.float64) / (self.width // 4))
        rows, columns = torch.meshgrid(torch.arange(h) * 32 / h, torch.arange(w) * 32 / w, indexing="ij")
        waves = [f(axis.reshape(-1, 1).double() * rates) for axis in (columns, rows) for f in (torch.sin, torch.cos)]
        return torch.cat(waves, -1)

    def __call__(
        self, x: Tensor, t: Tensor, context: Tensor, kept: dict | None = None, fresh: Callable[[int], Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Output (B, C, H, W) and this evaluation's sublayer results by name.

        kept: use these self-attention results instead of new ones. fresh(block) -> bool mask (L,) of tokens whose other sublayers are new.
        """
        rows, _, height, width = x.shape
        h, w, c = height // 2, width // 2, self.width
        cells = x.double().unflatten(2, (h, 2)).unflatten(4, (w, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = cells @ self.w["x_embedder.proj.weight"].flatten(1).T + self.w["x_embedder.proj.bias"] + self.positions(h, w)
        sizes = [self.embed_number("csize_embedder", torch.full((rows,), side * 8.0)) for side in (height, width)]
        t = self.embed_number("t_embedder", t) + torch.cat(
            (*sizes, self.embed_number("ar_embedder", torch.full((rows,), height / width))), -1
        )
        time = self.linear("t_block.1", F.silu(t)).unflatten(-1, (6, c))
        y = self.mlp("y_embedder.y_proj", context.double())
        results: dict[str, Tensor] = {}

        def settle(name: str, value: Tensor, mask: Tensor | None) -> Tensor:
            """The new value, or the old one where the mask is False (None: nowhere)."""
            if kept is not None:
                value = kept[name] if mask is None else torch.where(mask[None, :, None], value, kept[name])
            results[name] = value
            return value

        for i in range(self.depth):
            at, mask = f"blocks.{i}", fresh(i) if fresh else None
            mods = (self.w[f"{at}.scale_shift_table"] + time)[:, :, None].unbind(1)
            q, k, v = self.linear(f"{at}.attn.qkv", self.norm(x, mods[0], mods[1])).chunk(3, -1)
            x = x + mods[2] * settle(f"{at}.img.self_attn", self.linear(f"{at}.attn.proj", self.attend(q, k, v)), None)
            k, v = self.linear(f"{at}.cross_attn.kv_linear", y).chunk(2, -1)
            seen = self.attend(self.linear(f"{at}.cross_attn.q_linear", x), k, v)
            x = x + settle(f"{at}.img.cross_attn", self.linear(f"{at}.cross_attn.proj", seen), mask)
            x = x + mods[5] * settle(f"{at}.img.mlp", self.mlp(f"{at}.mlp", self.norm(x, mods[3], mods[4])), mask)
        shift, scale = (self.w["final_layer.scale_shift_table"] + t[:, None])[:, :, None].unbind(1)
        out = self.linear("final_layer.linear", self.norm(x, shift, scale)).unflatten(1, (h, w)).unflatten(3, (2, 2, -1))
        return out.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)[:, : self.channels], results
