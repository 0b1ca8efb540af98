"""What is special in families of FLUX's blocks: conservative evaluations, modulation per token, reference latents, ControlNets, heads."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from operator import attrgetter
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from checks import assert_calibrated_is_exact, assert_skips_repeat, assert_the_input_is_kept
from comfy.ldm.flux.layers import SingleStreamBlock
from comfyui_duca.cache_core import find_family
from dense_flux import assert_conservative_is_dense
from helpers.predictors import Innovating
from runs import STEPS, cached, cached_run, input_channels, kept_of, kinds, layers_of, network, report_of, sample
from zoo_flux_like import chroma_radiance, flux2, loaded
from zoo_flux_like_variants import VARIANTS, Variant, hunyuan_15, hunyuan_image


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request) -> Variant:
    return VARIANTS[request.param]


@pytest.fixture(scope="module")
def model(variant):
    return variant.case.make()


@pytest.fixture(scope="module")
def plain(variant, model) -> torch.Tensor:
    return sample(variant.case, model)


def test_conservative_evaluations_are_those_of_the_hosts_blocks(variant, model, plain):
    assert_conservative_is_dense(variant.case, model, plain, share=0.3)


def test_skips_repeat_the_hidden_state(variant, model, plain):
    assert_skips_repeat(variant.case, model, plain, "FaFaaaFa")


def test_no_more_is_kept_than_the_image(variant, model):
    ((tokens, channels),) = kept_of(cached_run(variant.case, model))
    assert variant.tokens <= tokens <= variant.tokens + variant.beside and channels == network(model).double_blocks[0].hidden_size


def test_calibrated_evaluations_at_full_rank_are_the_uncached_ones(variant, model, plain):
    """Of all layers of the blocks but their modulations, which see one vector a row."""
    answering = assert_calibrated_is_exact(variant.case, model, plain)
    layers = {name for name, layer in network(model).named_modules() if hasattr(layer, "in_features") and "mod" not in name}
    blocks = ("double_blocks.", "single_blocks.")
    assert {name for name in answering if name.startswith(blocks)} == {name for name in layers if name.startswith(blocks)}


def test_calibrated_forecasts_need_the_input_of_all_tokens(variant, model, plain):
    channels = network(model).double_blocks[0].hidden_size
    if variant.has_input:
        assert_the_input_is_kept(variant.case, model, channels)
        return
    patched = cached(model, "FaFaFaFa", Innovating(torch.full((input_channels(model), channels), 0.01)))
    result = sample(variant.case, patched)
    assert "is not used for skipped evaluations: tokens are added" in report_of(patched).notices[0] and kinds(patched) == "FaFaFaFa"
    assert torch.equal(result, sample(variant.case, cached(model, "FaFaFaFa")))


def test_kept_inputs_become_the_embedded_tokens(variant, model):
    """What the family calls the input, times the embedding's weights, is what enters the blocks: the same tokens in the same order."""
    if not variant.has_input:
        pytest.skip("it has no calibrated forecast")
    net, seen = network(model), {}
    family = find_family(net)
    embed = attrgetter(family.embed)(net)

    def embedded(_module, args):
        seen["tokens"] = family.tokens(embed, args[0]).clone()

    def entered(_module, _args, call):
        seen["img"] = call["img"].clone()

    handles = [embed.register_forward_pre_hook(embedded), net.double_blocks[0].register_forward_pre_hook(entered, with_kwargs=True)]
    try:
        sample(variant.case, model)
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(F.linear(seen["tokens"], embed.weight.flatten(1), embed.bias), seen["img"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("head", ["linear", "conv"])
def test_the_head_of_radiance_is_the_hosts_on_every_evaluation(head):
    """It sees the current pixels also on skips. That of a run's proof, whose place was found before, is one more."""
    model, variant = chroma_radiance(nerf_final_head_type=head), VARIANTS["radiance"]
    calls = {"nerf_blocks": 0, "double_blocks": 0}

    def counting(stack: str) -> Callable:
        def hook(*_args: Any) -> None:
            calls[stack] += 1

        return hook

    net = network(model)
    watched = {"nerf_blocks": net.nerf_blocks[0], "double_blocks": net.double_blocks[0].img_attn.qkv}
    handles = [module.register_forward_hook(counting(stack)) for stack, module in watched.items()]
    patched = cached(model, "FFaaFaaa")
    sample(variant.case, patched)
    calls.update(nerf_blocks=0, double_blocks=0)
    sample(variant.case, patched)
    assert calls == {"nerf_blocks": STEPS + 1, "double_blocks": 3}
    for handle in handles:
        handle.remove()


def test_gated_layers_are_two_matrices():
    """FLUX.2's MLPs make gate and value in one layer; together the parts cover it once."""
    model = flux2()
    sites = {site.name: site for site in layers_of(VARIANTS["flux2"].case, model)}
    parts = {
        name: [(part.name, part.rows) for part in sites[name].parts] for name in ("double_blocks.0.img_mlp.0", "single_blocks.1.linear1")
    }
    assert parts["double_blocks.0.img_mlp.0"] == [("gate", slice(0, 96)), ("value", slice(96, 192))]
    thirds = [("q", slice(0, 32)), ("k", slice(32, 64)), ("v", slice(64, 96))]
    assert parts["single_blocks.1.linear1"] == [*thirds, ("gate", slice(96, 192)), ("value", slice(192, 288))]
    assert [part.name for part in sites["double_blocks.0.txt_mlp.2"].parts] == ["all"]


@pytest.mark.parametrize("make", [hunyuan_15, hunyuan_image])
def test_kin_of_hunyuan_video_is_found_by_the_hosts_loader(make):
    """The structure that a checkpoint's own keys lead to is the one described."""
    model = loaded(make())
    assert find_family(network(model)).name == "hunyuan_video"


def ovis() -> Any:
    """Blocks with a gated MLP of their own kind; a host that does not know it computes as always and only bears the flag."""
    if "yak_mlp" in signature(SingleStreamBlock).parameters:
        return flux2(mlp_silu_act=False, yak_mlp=True)
    model = flux2()
    for block in network(model).single_blocks:
        block.yak_mlp = True
    return model


def test_gated_layers_of_newer_hosts_single_blocks_are_not_replayed():
    model = ovis()
    plain = sample(VARIANTS["flux2"].case, model)
    patched = cached(model, "FcFcFcFc")
    assert torch.equal(sample(VARIANTS["flux2"].case, patched), plain)
    assert kinds(patched) == "F" * STEPS
    assert any("Ovis" in notice for notice in report_of(patched).notices)
