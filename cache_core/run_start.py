"""Describes what is known when a sampling run begins."""

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
    """What is known of the model and the sampler when a run begins.

    Args:
        network: The network.
        family: Its family.
        timeline: The sampler's noise levels, with the model's times.
        window: The steps that may be skipped.
        device: Device that the model runs on.
        is_euler: Whether the sampler takes plain steps, each along the direction of one evaluation.
        adds_noise: Whether the sampler adds noise that a forecast from older latents would leave in the picture. None where that is
            not known.
        unrecorded: See `store.Unrecorded`.
        places: What was found out about networks in this process so far. None starts anew.
    """

    network: nn.Module
    family: ModelFamily
    timeline: Timeline
    window: range
    device: torch.device = torch.device("cpu")
    is_euler: bool = False
    adds_noise: bool | None = False
    unrecorded: Unrecorded = nullcontext
    places: Places | None = None
