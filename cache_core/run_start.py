"""What is known when a sampling run begins."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn

from .discovery.places import Places
from .families import ModelFamily
from .planning.timeline import Timeline
from .store import Unrecorded


class RunStart(NamedTuple):
    """network: the diffusion model, of `family`. window: steps that may be skipped. device: where the model runs.

    is_euler: whether the sampler takes plain steps along the direction of one evaluation each. adds_noise: whether it adds noise that
    a forecast from older latents would leave in the picture; None where that is not known. unrecorded: see `store.Unrecorded`.
    places: what was found out about networks in this process so far; None starts anew.
    """

    network: nn.Module
    family: ModelFamily
    timeline: Timeline
    window: range
    device: torch.device
    is_euler: bool = False
    adds_noise: bool | None = False
    unrecorded: Unrecorded = nullcontext
    places: Places | None = None
