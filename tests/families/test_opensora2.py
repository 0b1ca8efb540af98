"""Open-Sora 2's blocks in both forms, with q, k and v in one layer or apart: conservative evaluations, layers, and what is not replayed."""

from __future__ import annotations

import pytest
import torch
from checks import assert_right
from comfyui_duca.cache_core import find_family
from comfyui_duca.cache_core.families.opensora2 import OPENSORA2
from dense_flux import Dense, assert_conservative_is_dense
from making import Case
from runs import cached, kinds, layers_of, network, report_of, sample
from stand_in_mmdit import DoubleStreamBlockProcessor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo_opensora import CASES, opensora2


@pytest.fixture(scope="module", params=[False, True], ids=["apart", "fused"])
def fused(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def model(fused):
    return opensora2(fused)


@pytest.fixture(scope="module")
def case(fused) -> Case:
    return CASES[1]._replace(make=lambda: opensora2(fused))


class KeepingAll(Dense):
    """Keeps all of a sublayer, as no token is chosen."""

    def refreshed(self, value, key, *_about):
        return self.whole(value, key)


@pytest.mark.parametrize("share", [0.0, 0.37, 1.0])
def test_conservative_evaluations_are_those_of_the_models_blocks(case, model, share):
    """The reference has hooks on blocks that all run: attention is kept and some tokens' MLP is new. Skips follow conservative ones."""
    assert_conservative_is_dense(case, model, sample(case, model), share, Dense if share else KeepingAll)


def test_what_a_conservative_evaluation_costs_is_what_torch_counts(case, model):
    patched, flops = cached(model, "FFccFFcc"), [0]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sample(case, patched, callback=lambda *_: flops.append(counter.get_total_flops()))
    assert kinds(patched) == "FFccFFcc"
    for step, evaluation in enumerate(report_of(patched).evaluations[1:], start=1):  # the first is computed more than once
        assert evaluation.macs == pytest.approx((flops[step + 1] - flops[step]) / 2, rel=1e-6)


def test_every_matrix_of_a_block_is_a_part(model, fused):
    """The MLP's input is a separate part of the layer that it shares, and each layer is covered once."""
    sites = {site.name: site for site in layers_of(CASES[1], model)}
    parts = {name: [part.name for part in site.parts] for name, site in sites.items() if name.startswith("single_blocks.0.")}
    own = {"linear1": ["q", "k", "v", "mlp"]} if fused else {"q_proj": ["all"], "k_proj": ["all"], "v_mlp": ["v", "mlp"]}
    assert parts == {f"single_blocks.0.{layer}": names for layer, names in {**own, "linear2": ["all"]}.items()}
    assert all(sum(site.outputs(part) for part in site.parts) == site.out_features for site in sites.values())


class DistributedProcessor(DoubleStreamBlockProcessor):
    pass


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net.double_blocks[1], "processor", DistributedProcessor()),
        lambda net: setattr(net.single_blocks[0], "processor", net.double_blocks[0].processor),
        lambda net: delattr(net.single_blocks[1], "v_mlp"),
        lambda net: delattr(net, "cond_in"),
        lambda net: setattr(net, "double_blocks", torch.nn.ModuleList()),
    ],
    ids=["another processor", "the other list's", "no projection", "no given picture", "no blocks"],
)
def test_another_structure_has_no_conservative_evaluation(change):
    net = network(opensora2())
    assert find_family(net) is OPENSORA2
    change(net)
    assert not find_family(net).is_conservative and find_family(net).name == "mmditmodel"


def test_blocks_with_another_processor_are_found_by_watching_them():
    model = opensora2()
    for block in network(model).double_blocks:
        block.processor.__class__ = DistributedProcessor
    assert_right(CASES[1], model)
