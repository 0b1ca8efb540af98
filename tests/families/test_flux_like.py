"""What is special in families of FLUX's blocks: conservative evaluations, modulation per token, reference latents, ControlNets, heads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, NamedTuple

import comfy.controlnet
import comfy.sample
import comfy.supported_models
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from comfy.ldm.flux.layers import SingleStreamBlock
from comfyui_duca.cache_core import find_family
from comfyui_duca.cache_core.engine import TokenChoice
from comfyui_duca.cache_core.engine.linear_sites import find_linears
from making import text
from test_every_family import STEPS, kinds, network, report_of
from watched import (
    Innovating,
    assert_calibrated_is_exact,
    assert_skips_repeat,
    assert_the_input_is_kept,
    cached,
    input_channels,
    kept_of,
    known_of,
)
from zoo_flux_like import chroma, chroma_radiance, flux2, hunyuan3d, hunyuan_video, loaded

SHARE = 0.3


def noise(*shape: int, seed: int = 3, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


class Control(comfy.controlnet.ControlBase):
    """A ControlNet whose residuals are constants, for every block and image token."""

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.residuals = {place: [noise(1, tokens, channels, seed=i, scale=0.3) for i in range(2)] for place in ("input", "output")}

    def get_control(self, *_args: Any) -> dict:
        return self.residuals

    def copy(self) -> Control:
        return self


class Variant(NamedTuple):
    """make: the model. latent: shape of one. tokens: of it. cond: conditioning from a seed.

    beside: tokens of references in the image's stream, which may be kept with it. cfg: 1.0 where the host cannot have both conds in one
    call. has_input: whether a calibrated forecast can be had.
    """

    make: Callable[[], Any]
    latent: tuple[int, ...]
    tokens: int
    cond: Callable[[int], list]
    beside: int = 0
    cfg: float = 2.0
    has_input: bool = True


def hunyuan_15() -> Any:
    return hunyuan_video(
        comfy.supported_models.HunyuanVideo15, in_channels=65, out_channels=32, patch_size=[1, 1, 1], vec_in_dim=None, byt5=True,
        use_cond_type_embedding=True, vision_in_dim=20, guidance_embed=False,
    )  # fmt: skip


def hunyuan_image() -> Any:
    return hunyuan_video(
        comfy.supported_models.HunyuanImage21, in_channels=64, out_channels=64, patch_size=[1, 1], axes_dim=[64, 64], vec_in_dim=None,
        meanflow=True,
    )  # fmt: skip


def given(tokens: int = 7, **more: Any) -> Callable[[int], list]:
    return text(tokens, 24, pooled_output=torch.ones(1, 768), **more)


def controlled(tokens: int, channels: int) -> Callable[[int], list]:
    return given(control=Control(tokens, channels), control_apply_to_uncond=True)


VIDEO, PICTURE, F2 = (16, 3, 8, 6), (16, 12, 16), (128, 4, 6)
MASK, CLIP = torch.tensor([[1, 1, 1, 1, 1, 0, 0]]), SimpleNamespace(last_hidden_state=noise(1, 4, 20))
REFERENCE, FRAME = {"ref_latent": noise(1, 16, 1, 8, 6)}, {"guiding_frame_index": 0}
BESIDE = {"conditioning_byt5small": noise(1, 3, 1472), "clip_vision_output": CLIP}
VARIANTS = {
    "flux2": Variant(flux2, F2, 24, given()),
    "flux2 references": Variant(flux2, F2, 24, given(reference_latents=[noise(1, 128, 2, 3), noise(1, 128, 3, 4)]), beside=18),
    "flux2 control": Variant(flux2, F2, 24, controlled(20, 32)),
    "chroma": Variant(chroma, PICTURE, 48, given()),
    "chroma control": Variant(chroma, PICTURE, 48, controlled(48, 48)),
    "radiance": Variant(chroma_radiance, (3, 24, 32), 48, given()),
    "video": Variant(hunyuan_video, VIDEO, 36, given(40)),
    "video control": Variant(hunyuan_video, VIDEO, 36, controlled(36, 128)),
    "video mask": Variant(hunyuan_video, VIDEO, 36, given(attention_mask=MASK), cfg=1.0),
    "video guiding frame": Variant(hunyuan_video, VIDEO, 36, given(**FRAME), cfg=1.0),
    "video reference": Variant(hunyuan_video, VIDEO, 36, given(**REFERENCE), beside=12, cfg=1.0, has_input=False),
    "video both": Variant(hunyuan_video, VIDEO, 36, given(**FRAME, **REFERENCE), beside=12, cfg=1.0, has_input=False),
    "video 1.5": Variant(hunyuan_15, (32, 2, 4, 6), 48, given(**BESIDE)),
    "image 2.1": Variant(hunyuan_image, (64, 6, 8), 48, given()),
    "3d": Variant(hunyuan3d, (64, 24), 24, given()),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request) -> Variant:
    return VARIANTS[request.param]


@pytest.fixture(scope="module")
def model(variant):
    return variant.make()


@pytest.fixture(scope="module")
def plain(variant, model) -> torch.Tensor:
    return sample(variant, model)


def sample(variant: Variant, model, **more: Any) -> torch.Tensor:
    latent = torch.zeros(1, *variant.latent)
    start, conds = comfy.sample.prepare_noise(latent, 5), (variant.cond(1), variant.cond(2))
    return comfy.sample.sample(model, start, STEPS, variant.cfg, "euler", "simple", *conds, latent, seed=5, disable_pbar=True, **more)


class Dense:
    """The same evaluations by hooks on the host's blocks, all of which run: what a sublayer says is exchanged for what was kept of it."""

    def __init__(self, net: Any, plan: str) -> None:
        self.plan, self.step, self.kept = plan, -1, {}
        self.choice = TokenChoice(SHARE, 0)
        self.handles = [net.double_blocks[0].register_forward_pre_hook(self.begin)]
        for i, block in enumerate(net.double_blocks):
            for name in ("img", "txt"):
                self.after(getattr(block, f"{name}_attn").proj, self.whole, (i, name))
                self.after(getattr(block, f"{name}_mlp"), self.refreshed, (i, name, "mlp"), name, i, len(net.double_blocks))
        for i, block in enumerate(net.single_blocks):
            self.handles.append(block.linear2.register_forward_pre_hook(self.half(i, block.hidden_size)))
            self.after(block.linear2, self.refreshed, (i, "output"), "txt+img", i, len(net.single_blocks))
        self.after(net.single_blocks[-1], self.hidden)

    def after(self, module: torch.nn.Module, tell: Callable, *about: Any) -> None:
        self.handles.append(module.register_forward_hook(lambda _module, _args, result: tell(result, *about)))

    def begin(self, *_args: Any) -> None:
        self.step += 1
        self.choice.begin(self.step)

    @property
    def kind(self) -> str:
        return self.plan[self.step]

    def whole(self, value: torch.Tensor, key: tuple) -> torch.Tensor:
        if self.kind == "F":
            self.kept[key] = value.clone()
        return self.kept[key].clone() if self.kind == "c" else value  # the host writes into what it is given

    def refreshed(self, value: torch.Tensor, key: tuple, stream: str, index: int, blocks: int) -> torch.Tensor:
        if self.kind == "c":
            tokens = self.choice.tokens(stream, index, blocks, value.shape[1], value.device)
            self.kept[key][:, tokens] = value[:, tokens]
        return self.whole(value, key)

    def half(self, index: int, width: int) -> Callable:
        def exchange(_module: Any, args: tuple) -> tuple:
            (x,) = args
            return (torch.cat((self.whole(x[..., :width], (index, "attn")), x[..., width:]), dim=-1),)

        return exchange

    def hidden(self, value: torch.Tensor) -> torch.Tensor:
        if self.kind != "a":
            self.kept["hidden"] = value.clone()
        return self.kept["hidden"].clone()


def test_conservative_evaluations_are_those_of_the_hosts_blocks(variant, model, plain):
    """Conservative ones from full ones and from one another; skips from either."""
    plan = "FcacccFc"
    patched = cached(model, plan, share=SHARE)
    result = sample(variant, patched)
    assert kinds(patched) == plan and not report_of(patched).notices
    dense = Dense(network(model), plan)
    try:
        expected = sample(variant, model)
    finally:
        for handle in dense.handles:
            handle.remove()
    assert dense.step == STEPS - 1, "both conds are to be in one call"
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-3)
    assert (expected - plain).abs().max() > 0.01


def test_skips_repeat_the_hidden_state(variant, model, plain):
    assert_skips_repeat(partial(sample, variant), model, network(model).single_blocks[-1], None, "FaFaaaFa", plain)


def test_no_more_is_kept_than_the_image(variant, model):
    patched = cached(model, "FaFaFaFa")
    sample(variant, patched)
    ((tokens, channels),) = kept_of(patched)
    assert variant.tokens <= tokens <= variant.tokens + variant.beside and channels == network(model).double_blocks[0].hidden_size


def test_calibrated_evaluations_at_full_rank_are_the_uncached_ones(variant, model, plain):
    """Of all layers of the blocks but their modulations, which see one vector a row."""
    answering = assert_calibrated_is_exact(partial(sample, variant), model, plain)
    layers = {name for name, layer in network(model).named_modules() if hasattr(layer, "in_features") and "mod" not in name}
    blocks = ("double_blocks.", "single_blocks.")
    assert {name for name in answering if name.startswith(blocks)} == {name for name in layers if name.startswith(blocks)}


def test_calibrated_forecasts_need_the_input_of_all_tokens(variant, model, plain):
    channels = network(model).double_blocks[0].hidden_size
    if variant.has_input:
        assert_the_input_is_kept(partial(sample, variant), model, channels)
        return
    patched = cached(model, "FaFaFaFa", Innovating((input_channels(model), channels), 0.01))
    result = sample(variant, patched)
    assert "without a calibration: tokens are added" in report_of(patched).notices[0] and kinds(patched) == "FaFaFaFa"
    assert torch.equal(result, sample(variant, cached(model, "FaFaFaFa")))


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
        sample(variant, model)
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
    sample(variant, patched)
    calls.update(nerf_blocks=0, double_blocks=0)
    sample(variant, patched)
    assert calls == {"nerf_blocks": STEPS + 1, "double_blocks": 3}
    for handle in handles:
        handle.remove()


def test_gated_layers_are_two_matrices():
    """FLUX.2's MLPs make gate and value in one layer; together the parts cover it once."""
    model = flux2()
    known = known_of(partial(sample, VARIANTS["flux2"]), model)
    sites = {site.name: site for site in find_linears(find_family(network(model)), known.linears, network(model))}
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
    plain = sample(VARIANTS["flux2"], model)
    patched = cached(model, "FcFcFcFc")
    assert torch.equal(sample(VARIANTS["flux2"], patched), plain)
    assert kinds(patched) == "F" * STEPS
    assert any("Ovis" in notice for notice in report_of(patched).notices)
