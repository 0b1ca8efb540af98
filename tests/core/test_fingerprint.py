"""A checkpoint is recognised in every dtype, and no other one is taken for it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from comfyui_duca.cache_core.calibration.fingerprint import Fingerprint
from helpers.sidecars import weights
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
PRECISE = DTYPES[:3]


def cast(named: dict[str, Tensor], dtype: torch.dtype) -> Fingerprint:
    return Fingerprint.of((name, w.to(dtype) if w.is_floating_point() else w) for name, w in named.items())


@pytest.mark.parametrize("std", [0.005, 0.02, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_every_cast_is_recognised(seed, std):
    prints = [cast(weights(seed, std), dtype) for dtype in DTYPES]
    assert all(a.matches(b) for a, b in itertools.product(prints, prints))
    assert len({p.short for p in prints}) == 1 and len(prints[0].short) == 8
    assert [p.dtype for p in prints] == [str(dtype).removeprefix("torch.") for dtype in DTYPES]


@pytest.mark.parametrize("way", DTYPES, ids=str)
def test_a_cast_of_a_cast_is_recognised(way):
    """Also in a wider dtype, which no longer shows what the values went through: an fp8 file that is loaded as bf16."""
    by_way = {name: w.to(way) if w.is_floating_point() else w for name, w in weights().items()}
    originals = [cast(weights(), dtype) for dtype in DTYPES]
    for dtype in DTYPES:
        recast = cast(by_way, dtype)
        assert all(recast.matches(original) and recast.short == original.short for original in originals)


@pytest.mark.parametrize("pair", itertools.product(DTYPES, DTYPES), ids=str)
def test_another_checkpoint_is_not(pair):
    a, b = cast(weights(0), pair[0]), cast(weights(1), pair[1])
    assert not a.matches(b) and not b.matches(a) and a.short != b.short


@pytest.mark.parametrize("pair", itertools.product(PRECISE, PRECISE), ids=str)
@pytest.mark.parametrize("only", [1, 70])
def test_a_fine_tune_by_one_percent_is_not(pair, only):
    """Also if a single layer of many moved, as long as both are in full or half precision."""
    g, tuned = torch.Generator().manual_seed(5), weights()
    for name in sorted(n for n in tuned if n.endswith(".w"))[:only]:
        tuned[name] = tuned[name] + 0.01 * tuned[name].std() * torch.randn(tuned[name].shape, generator=g)
    a, b = cast(weights(), pair[0]), cast(tuned, pair[1])
    assert not a.matches(b) and not b.matches(a)


def test_another_shape_or_name_is_not():
    original = cast(weights(), torch.float32)
    for change in ({"blocks.3.w": weights()["blocks.3.w"].T}, {"blocks.70.w": torch.ones(8, 8)}):
        other = cast(weights() | change, torch.float32)
        assert not original.matches(other) and original.short != other.short
    assert not original.matches(cast(weights(count=69), torch.float32))


def test_order_and_what_formats_and_hosts_add_do_not_count():
    """fp8 files come with scales, loaders differ in the order of parameters, and hosts in the names of vectors."""
    original = cast(weights(), torch.float32)
    more = dict(reversed(weights().items())) | {
        "scale_weight": torch.ones(()),
        "bias": torch.ones(63),
        "norm.scale": torch.ones(100),
        "table": torch.ones(99, dtype=torch.int32),
    }
    assert original.matches(cast(more, torch.float32)) and original.short == cast(more, torch.float32).short


def test_a_row_that_is_not_there_says_nothing():
    """A row may belong to a weight that only another host has. If no row is there, nothing is recognised."""
    original, other = cast(weights(), torch.float32), cast(weights(1), torch.float32)
    for rows in (slice(5, 6), slice(1, None)):
        for fingerprint, matches in ((original, True), (other, False)):
            values = fingerprint.values.clone()
            values[rows] = torch.nan
            assert replace(fingerprint, values=values).matches(original) is original.matches(replace(fingerprint, values=values)) is matches
    assert not replace(original, values=torch.full_like(original.values, torch.nan)).matches(original)


def test_the_least_precise_dtype_counts():
    mixed = {name: w.to(torch.float8_e4m3fn if "7" in name else torch.bfloat16) for name, w in weights().items() if name.endswith(".w")}
    assert Fingerprint.of(mixed.items()).dtype == "float8_e4m3fn"
    assert Fingerprint.of(mixed.items()).matches(cast(weights(), torch.float32))


def test_a_sample_is_small_and_spread_and_copies_no_weight():
    big = {f"{i:03}": torch.arange(64 * 1024, dtype=torch.float32).view(64, 1024) + i for i in range(200)}
    print_ = Fingerprint.of(big.items())
    assert print_.values.shape == (64, 64) and print_.values.dtype is torch.float32
    first = print_.values[0]
    assert first[0] == 0 and first[-1] == 64 * 1024 - 1 and (first % 1024).unique().numel() > 60
    assert print_.values[0, 0] == 0 and print_.values[-1, 0] == 199
    transposed = Fingerprint.of([("w", big["000"].T)])
    assert torch.equal(transposed.values, Fingerprint.of([("w", big["000"].T.contiguous())]).values)


def test_weights_beyond_a_dtype_do_not_poison_it():
    big = {"w": torch.full((8, 8), 1e6)}
    assert cast(big, torch.float16).values.isfinite().all()


@pytest.mark.parametrize(
    "named",
    [[], [("w", torch.ones(7, 9))], [("w", torch.ones(99))], [("w", torch.ones(9, 99, dtype=torch.uint8))]],
    ids=["none", "small", "vector", "packed"],
)
def test_nothing_to_take_one_of(named):
    with pytest.raises(ValueError):
        Fingerprint.of(named)


@pytest.mark.parametrize(
    "wrong", [{"structure": "x"}, {"dtype": "int8"}, {"dtype": "load"}, {"values": torch.ones(65, 64)}, {"values": torch.ones(64)}]
)
def test_the_parts_are_checked(wrong):
    with pytest.raises(ValueError):
        Fingerprint(**{"structure": "0" * 64, "dtype": "float32", "values": torch.ones(1, 64)} | wrong)
