"""DuCa Cache works on small checkpoints in files, read by the host's own loader, which finds family and dimensions itself."""

from __future__ import annotations

from typing import NamedTuple

import comfy.sd
import comfy.supported_models as models
import pytest
import torch
from checks import assert_the_family_is_known_once
from comfy.model_patcher import ModelPatcher
from comfyui_duca.cache_core.planning.policies import AlwaysCompute
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes import host
from making import Case, text, tiny
from runs import cached, kinds, network, report_of, sample
from safetensors.torch import save_file
from zoo_flux_like import hunyuan3d, hunyuan_video
from zoo_image import normal, with_more
from zoo_video import WAN_LATENT, wan_model

PLAN = "FaFa"


def wan() -> ModelPatcher:
    return wan_model(models.WAN21_T2V, "t2v", dim=128, num_heads=1, freq_dim=256, ffn_dim=256, text_dim=4096, num_layers=2)


def sd3() -> ModelPatcher:
    """Has as many heads and blocks as its width has 64s, which is all that the loader looks at."""
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 128}}
    model = tiny(
        models.SD3, input_size=None, in_channels=16, out_channels=16, depth=2, adm_in_channels=32, num_patches=256, pos_embed_max_size=16,
        qk_norm="rms", context_embedder_config=embedder, pos_embed_scaling_factor=None,
    )  # fmt: skip
    network(model).pos_embed.copy_(normal(3, 1, 256, 128))  # no parameter but a buffer
    return model


def ltxv() -> ModelPatcher:
    return tiny(models.LTXV, image_model="ltxv", cross_attention_dim=128, attention_head_dim=4, num_attention_heads=32, num_layers=2)


def pixart_sigma() -> ModelPatcher:
    return tiny(
        models.PixArtSigma, image_model="pixart_sigma", num_heads=16, patch_size=2, hidden_size=1152, in_channels=4, depth=1,
        model_max_length=8, micro_condition=False,
    )  # fmt: skip


CASES = (
    Case("wan", wan, WAN_LATENT, text(7, 4096), lambda m: m.blocks[-1]),
    Case("sd3", sd3, (16, 24, 32), with_more(text(7, 24), pooled_output=(1, 32)), lambda m: m.joint_blocks[-1]),
    Case("hunyuan_video", hunyuan_video, (16, 3, 8, 6), text(7, 24, pooled_output=torch.ones(1, 768)), lambda m: m.single_blocks[-1]),
    Case("ltxv", ltxv, (128, 2, 4, 3), text(7, 4096, attention_mask=(torch.arange(7) < 5).int()[None]), lambda m: m.transformer_blocks[-1]),
    Case("hunyuan3d", hunyuan3d, (64, 24), text(9, 24), lambda m: m.single_blocks[-1]),
    Case("pixart", pixart_sigma, (4, 2, 64), text(7, 4096), lambda m: m.blocks[-1]),  # with shorter sides the host divides by zero
)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


class Pair(NamedTuple):
    """The same weights in a model as it was made, and in one that was read from a file."""

    made: ModelPatcher
    loaded: ModelPatcher


@pytest.fixture(scope="module")
def pair(case: Case, tmp_path_factory) -> Pair:
    made = case.make()
    path = tmp_path_factory.mktemp("diffusion_models") / f"{case.name}.safetensors"
    save_file({name: value.contiguous() for name, value in network(made).state_dict().items()}, path)
    loaded = comfy.sd.load_diffusion_model(str(path))
    path.unlink()
    return Pair(made, loaded)


def test_every_weight_is_that_of_the_file(pair):
    """Weights that a checkpoint lacks would be uninitialised memory, and those that the model lacks would be left over."""
    weights, written = network(pair.loaded).state_dict(), network(pair.made).state_dict()
    assert weights.keys() == written.keys()
    assert all(torch.equal(weights[name], value) for name, value in written.items())


def test_a_cache_on_it(case, pair):
    """The family is known, listening changes no bit, and skips give what they give on the model as it was made."""
    assert_the_family_is_known_once(case, pair.loaded)
    plain = sample(case, pair.loaded, len(PLAN))
    assert torch.isfinite(plain).all() and plain.std() > 0.05
    listening = host.attach(pair.loaded, Strategy(AlwaysCompute()))
    assert torch.equal(sample(case, listening, len(PLAN)), plain) and kinds(listening) == "F" * len(PLAN)
    skipping = cached(pair.loaded, PLAN)
    result = sample(case, skipping, len(PLAN))
    assert kinds(skipping) == PLAN and report_of(skipping).compute_speedup > 1.2
    assert not torch.equal(result, plain) and torch.equal(result, sample(case, cached(pair.made, PLAN), len(PLAN)))
