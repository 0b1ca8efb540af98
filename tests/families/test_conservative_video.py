"""Conservative evaluations of video families agree with the host's own blocks, which all run in full while results are exchanged."""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import pytest
import torch
import zoo_video
from comfyui_duca.cache_core import Plan, Settings
from comfyui_duca.cache_core.engine import TokenSelection
from comfyui_duca.cache_core.planning.policies import Given
from comfyui_duca.cache_core.predictors import Reuse
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes import host
from making import Case
from runs import STEPS, kinds, network, report_of, sample
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo_video import seeded, wan_case
from zoo_video_variants import VARIANTS, vace

PLAN = "FcacccFc"  # conservative ones after a full one, after one another and after a skip; and a skip after one
SHARES = (0.0, 0.37, 1.0)


class Structure(NamedTuple):
    """What is exchanged in a model's blocks.

    Args:
        blocks: Path of the list of blocks.
        kept: Modules of a block whose results stay as they were.
        renewed: From a module to the stream whose chosen tokens are new in its result.
        batch: Axis of the batch in these results.
    """

    blocks: str
    kept: tuple[str, ...]
    renewed: dict[str, str]
    batch: int = 0


WAN = Structure("blocks", ("self_attn",), {"cross_attn": "img", "ffn": "img"})
HUMO = WAN._replace(kept=("self_attn", "audio_cross_attn_wrapper.audio_cross_attn"))
LTXV = Structure("transformer_blocks", ("attn1",), {"attn2": "img", "ff": "img"})
MOCHI = Structure("blocks", ("attn",), {"mlp_x": "img", "mlp_y": "txt"})
COSMOS = Structure("blocks", ("blocks.0.block",), {"blocks.1.block": "img", "blocks.2.block": "img"}, 3)
PREDICT2 = Structure("blocks", ("self_attn",), {"cross_attn": "img", "mlp": "img"})

ZOO = {case.name: case for case in zoo_video.CASES}
MOTION = Case(  # 88 tokens, 9 vectors of modulation
    "wan_s2v",
    zoo_video.wan_s2v,
    (16, 3, 10, 8),
    wan_case("", zoo_video.wan_s2v, reference_motion=seeded(1, 16, 19, 10, 8)).cond,
    lambda m: m.blocks[-1],
)
CASES = {
    "wan": (ZOO["wan"], WAN),
    "wan, by frame": (VARIANTS["Wan 2.2 5B, modulation by frame"], WAN),
    "wan, reference": (VARIANTS["Wan Fun, a reference before the video"], WAN),
    "wan, I2V": (ZOO["wan_i2v"], WAN),
    "wan, I2V without picture": (VARIANTS["Wan I2V without a picture"], WAN),
    "wan, VACE": (ZOO["wan_vace"], WAN),
    "wan, VACE twice": (vace(2), WAN),
    "wan, Animate": (ZOO["wan_animate"], WAN),
    "wan, S2V": (VARIANTS["Wan S2V with sound and a reference"], WAN),
    "wan, S2V with motion": (MOTION, WAN),
    "wan, HuMo": (VARIANTS["Wan HuMo with a reference"], HUMO),
    "wan, HuMo without sound": (VARIANTS["Wan HuMo without sound"], WAN),
    "ltxv": (ZOO["ltxv"], LTXV),
    "ltxv, by token": (VARIANTS["LTXV, modulation by token"], LTXV),
    "mochi": (ZOO["mochi"], MOCHI),
    "cosmos": (ZOO["cosmos"], COSMOS),
    "predict2": (ZOO["cosmos_predict2"], PREDICT2),
    "predict2, by frame": (VARIANTS["Cosmos-Predict2, modulation by frame"], PREDICT2),
}


@pytest.fixture(scope="module", params=CASES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return CASES[name][0].make()


@pytest.fixture(scope="module")
def plain(name, model) -> torch.Tensor:
    return sample(CASES[name][0], model)


class Dense:
    """Hooks on the host's blocks that replace a sublayer's result by the kept one, except for chosen tokens."""

    def __init__(self, net: Any, structure: Structure, share: float) -> None:
        found = attrgetter(structure.blocks)(net)
        blocks = list(found.values() if isinstance(found, torch.nn.ModuleDict) else found)
        self.kept: dict[Any, list[torch.Tensor]] = {}
        self.step, self.batch, self.blocks = -1, structure.batch, len(blocks)
        self.selection = TokenSelection(share, 0)
        self.handles = [blocks[0].register_forward_pre_hook(self.begin)]
        for i, block in enumerate(blocks):
            modules = dict(block.named_modules())
            for path in structure.kept:
                self.after(modules[path], (i, path), None)
            for path, stream in structure.renewed.items():
                if path in modules:  # Mochi's last block has no MLP for text
                    self.after(modules[path], (i, path), stream)
        self.handles.append(blocks[-1].register_forward_hook(self.hidden))

    def after(self, module: torch.nn.Module, key: tuple, stream: str | None) -> None:
        self.handles.append(module.register_forward_hook(partial(self.exchange, key, stream)))

    def begin(self, *_args: Any) -> None:
        self.step += 1
        self.selection.begin(self.step)

    def exchange(self, key: tuple, stream: str | None, _module: Any, _args: tuple, result: Any) -> Any:
        values = result if isinstance(result, tuple) else (result,)
        if PLAN[self.step] == "F":
            self.kept[key] = [value.clone() for value in values]
        elif PLAN[self.step] == "c":
            if stream is not None:
                mask = self.mask(key[0], stream, values[0])
                self.kept[key] = [torch.where(mask, values[0], self.kept[key][0])]
            values = tuple(value.clone() for value in self.kept[key])  # the host writes into what it is given
        return values if isinstance(result, tuple) else values[0]

    def mask(self, block: int, stream: str, value: torch.Tensor) -> torch.Tensor:
        """Returns which tokens are new, in the shape of a sublayer's result."""
        shape = [1 if axis in (self.batch, value.ndim - 1) else size for axis, size in enumerate(value.shape)]
        mask = torch.zeros(shape, dtype=torch.bool)
        tokens = self.selection.tokens(stream, block, self.blocks, mask.numel(), value.device)
        if tokens is not None:
            mask.view(-1)[tokens] = True
        return mask

    def hidden(self, _module: Any, _args: tuple, result: Any) -> Any:
        """Repeats the last block's result in skips. Only its video is read after it."""
        values = result if isinstance(result, tuple) else (result,)
        if PLAN[self.step] != "a":
            self.kept["hidden"] = [value.clone() for value in values]
        again = tuple(value.clone() for value in self.kept["hidden"])
        return again if isinstance(result, tuple) else again[0]


def densely(case: Case, model, structure: Structure, share: float) -> torch.Tensor:
    dense = Dense(network(model), structure, share)
    try:
        result = sample(case, model)
    finally:
        for handle in dense.handles:
            handle.remove()
    assert dense.step == STEPS - 1, "both conds are to be in one call"
    return result


@pytest.fixture(scope="module")
def expected(name, model) -> dict[float, torch.Tensor]:
    """Returns the latents that the hooks give, by share."""
    case, structure = CASES[name]
    return {share: densely(case, model, structure, share) for share in SHARES}


def conservatively(model, plan: str, share: float):
    return host.attach(model, Strategy(Given(Plan.parse(plan)), Reuse(), token_share=share))


@pytest.mark.parametrize("share", SHARES)
def test_conservative_evaluations_are_those_of_the_hosts_blocks(name, model, plain, expected, share):
    """With no token chosen all of what is kept is used; with all of them, cross-attention and feed-forward are new."""
    patched = conservatively(model, PLAN, share)
    result = sample(CASES[name][0], patched)
    assert kinds(patched) == PLAN and not report_of(patched).notices
    assert report_of(patched).peak_bytes == report_of(patched).predicted_bytes
    torch.testing.assert_close(result, expected[share], atol=2e-5 * float(expected[share].abs().max()), rtol=0)
    assert (expected[share] - plain).abs().max() > 0.01 * plain.std(), "the same as without a cache"


def test_the_share_matters(expected):
    none, some, every = expected.values()
    assert min((none - some).abs().max(), (every - some).abs().max()) > 0.002 * some.std()


@pytest.mark.parametrize("share", SHARES)
def test_their_cost_is_what_torch_counts(name, model, share):
    """The cost is counted in the first one, by what runs, and used for the last."""
    patched, flops = conservatively(model, "FFccFFcc", share), []
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sample(CASES[name][0], patched, callback=lambda *_: flops.append(counter.get_total_flops()))
    assert 2 * report_of(patched).evaluations[-1].macs == pytest.approx(flops[-1] - flops[-2], rel=1e-6)


def test_modulated_cross_attention_of_newer_hosts_is_computed_in_full():
    """Older hosts have the flag and ignore it."""
    case = ZOO["ltxv"]
    is_newer = hasattr(network(case.make()).transformer_blocks[0], "cross_attention_adaln")
    model = zoo_video.ltxv(cross_attention_adaln=True) if is_newer else case.make()
    for block in network(model).transformer_blocks:
        block.cross_attention_adaln = True
    plain = sample(case, model)
    patched = conservatively(model, "FcccFccc", 0.37)
    assert torch.equal(sample(case, patched), plain)
    assert kinds(patched) == "F" * STEPS and "blocks with modulated cross-attention cannot be replayed" in report_of(patched).notices[0]


@pytest.mark.parametrize("family", ["wan", "mochi", "cosmos_predict2"])
def test_the_paper_mode_samples_with_them(family):
    case, model = ZOO[family], ZOO[family].make()
    patched = host.attach(model, Settings(mode="paper", speedup=1.5))
    result = sample(case, patched)
    assert torch.isfinite(result).all() and {"F", "c"} <= set(kinds(patched)) and not report_of(patched).notices
