"""The feature store counts its bytes, keeps each format's precision and shares nothing with live tensors."""

from __future__ import annotations

import pytest
import torch
from comfyui_duca.cache_core import StoreFormat
from comfyui_duca.cache_core.store import FeatureStore, StoreFullError

FORMATS = {"own": StoreFormat(), "bf16": StoreFormat(dtype=torch.bfloat16), "fp8": StoreFormat(dtype=torch.float8_e4m3fn)}
TOLERANCE = {"own": 0.0, "bf16": 2**-8, "fp8": 2**-4}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, shape[1])[None, :, None]


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_kept_comes_back(name):
    store, x = FeatureStore(FORMATS[name]), random(2, 9, 16)
    back = store.load(store.put(x), x)
    assert back.dtype is x.dtype
    largest = x.abs().amax(-1, keepdim=True)  # fp8 is scaled per token
    assert ((back - x).abs() <= TOLERANCE[name] * (x.abs() if name == "bf16" else largest)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_promised(name):
    store, x = FeatureStore(FORMATS[name]), random(2, 9, 16)
    store.put(x)
    assert store.bytes == 2 * 9 * FORMATS[name].bytes_per_token(16, x.dtype)
    store.clear()
    assert store.bytes == 0


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_are_overwritten_in_place(name):
    store, x, tokens = FeatureStore(FORMATS[name]), random(2, 9, 16), torch.tensor([7, 0, 4])
    feature, fresh = store.put(x), random(2, 3, 16) * 3
    before = store.load(feature, x).clone()
    store.write_tokens(feature, tokens, fresh)
    again = FeatureStore(FORMATS[name])
    written = again.load(again.put(fresh), x)
    after = store.load(feature, x)
    untouched = [i for i in range(9) if i not in tokens]
    assert torch.equal(after[:, tokens], written)
    assert torch.equal(store.load_tokens(feature, tokens, x), written)
    assert torch.equal(after[:, untouched], before[:, untouched])


def test_kept_features_do_not_alias_what_they_came_from():
    store, x = FeatureStore(), random(1, 4, 8)
    original, feature = x.clone(), store.put(x)
    x.add_(1)
    assert torch.equal(store.load(feature, x), original)


def test_dropped_memory_serves_the_next_feature():
    store, x = FeatureStore(), random(1, 4, 8)
    first = store.put(x)
    address = first.data.data_ptr()
    store.drop(first)
    assert store.put(x * 2).data.data_ptr() == address
    assert store.bytes == x.nbytes


def test_trim_frees_only_spare_memory():
    store, x = FeatureStore(), random(1, 4, 8)
    dropped, kept = store.put(x), store.put(x)
    store.drop(dropped)
    store.trim()
    assert store.bytes == x.nbytes
    assert torch.equal(store.load(kept, x), x)


def test_a_full_device_is_told_apart_from_other_failures(monkeypatch):
    store = FeatureStore()

    def no_room(*_args, **_kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "empty", no_room)
    with pytest.raises(StoreFullError):
        store.put(random(1, 4, 8))
