"""Turns the inputs of DuCa Cache and Cache Schedule into `Settings` and `Schedule` of cache_core."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch

from ...cache_core import Settings, StoreFormat
from ...cache_core.checks import check_number, check_one_of
from ...cache_core.planning.schedule import Schedule

STORE_DTYPES = MappingProxyType({"model dtype": None, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn})
STORE_DEVICES = ("auto", "GPU", "CPU")
SEVERAL_EVALUATIONS = ("as their step", "first only")


def settings_of(
    warmup: int,
    start_percent: float,
    end_percent: float,
    store_device: str,
    store_dtype: str,
    token_seed: int,
    **given: Any,
) -> Settings:
    """Returns the settings for the inputs of DuCa Cache.

    Args:
        **given: Inputs that `Settings` has by the same names.

    Raises:
        ValueError: For a value that is not allowed, with a message for the user.
    """
    check_number("warmup", warmup)
    check_one_of("store_device", store_device, STORE_DEVICES)
    check_one_of("store_dtype", store_dtype, STORE_DTYPES)
    return Settings(
        warmup=None if warmup < 0 else warmup,
        skip_from=start_percent,
        skip_to=end_percent,
        seed=token_seed,
        storage=StoreFormat(torch.device("cpu") if store_device == "CPU" else None, STORE_DTYPES[store_dtype]),
        **given,
    )


def schedule_of(kind: str, several_evaluations: str, **given: Any) -> Schedule:
    """Returns the schedule for the inputs of Cache Schedule.

    Args:
        **given: Inputs that `Schedule` has by the same names.

    Raises:
        ValueError: For a value that is not allowed, with a message for the user. For the text it is a ScheduleTextError.
    """
    check_one_of("several_evaluations", several_evaluations, SEVERAL_EVALUATIONS)
    return Schedule(kind, first_only=several_evaluations == "first only", **given)
