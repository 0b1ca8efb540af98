"""Networks that cannot be cached inside, as their heads read an early block too, or as they have no blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from stand_in_ernie_helios import ErnieImageModel, Ops, StandIn, angles, waves
from torch import Tensor, nn


class EarlyReader(nn.Module):
    """Maps (B, channels, …) and a time to (B, out, …). The head adds the first block's result to the last one's."""

    width = 8

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(channels, self.width, bias=False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(self.width, self.width), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(self.width, out, bias=False)

    def forward(self, x: Tensor, t: Tensor, control: Any = None) -> Tensor:
        tokens = self.first(x.flatten(2).transpose(1, 2)) * (1 + t[:, None, None])
        early = None
        for block in self.blocks:
            tokens = block(tokens)
            early = tokens if early is None else early
        return self.head(tokens + early).transpose(1, 2).unflatten(2, x.shape[2:])


class VideoAndSound(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.video, self.sound = EarlyReader(4, 4), EarlyReader(3, 3)

    def forward(self, latents: Sequence[Tensor], t: Tensor) -> list[Tensor]:
        return [self.video(latents[0], t), self.sound(latents[1], t)]


def packed(latents: Sequence[Tensor]) -> Tensor:
    """Packs latents into (B, 1, numbers), as the host does."""
    return torch.cat([latent.flatten(1) for latent in latents], dim=1).unsqueeze(1)


class Nothing(nn.Module):
    """Has one weight and no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.einsum("oc,bc...->bo...", self.weight, x) * t.view(-1, *[1] * (x.ndim - 1))


class EarlyErnieModel(ErnieImageModel):
    """ERNIE-Image with a head that also gets the first layer's tokens."""

    def __init__(self, hidden_size: int = 48, **more: Any) -> None:
        super().__init__(hidden_size=hidden_size, **more)
        self.early = Ops(more.get("operations"), more.get("dtype"), more.get("device")).Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, **_more: Any) -> Tensor:
        image = self.x_embedder(x)
        tokens = torch.cat((image, self.text_proj(context)), 1)
        phases = angles(torch.arange(tokens.shape[1])[None], self.head_size)
        c = self.time_embedding(waves(timesteps / 1000, self.hidden_size).to(x.dtype))
        temb = [part.unsqueeze(1) for part in self.adaLN_modulation(c).chunk(6, -1)]
        early = None
        for layer in self.layers:
            tokens = layer(tokens, phases, temb)
            early = tokens if early is None else early
        p, rows = self.patch_size, x.shape[2] // self.patch_size
        patches = self.final_linear(self.final_norm(tokens, c) + self.early(early))[:, : image.shape[1]]
        return patches.unflatten(1, (rows, -1)).unflatten(-1, (p, p, -1)).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


class EarlyErnie(StandIn):
    network = EarlyErnieModel
