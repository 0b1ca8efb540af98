"""Conservative evaluations of FLUX's blocks, computed another way: all of the host's blocks run, and hooks exchange results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfyui_duca.cache_core.engine import TokenSelection
from making import Case
from runs import STEPS, cached, kinds, network, report_of, sample


class Dense:
    """Hooks on the host's blocks, all of which run, that replace a sublayer's result by what was kept of it."""

    def __init__(self, net: Any, plan: str, share: float) -> None:
        self.plan, self.step, self.kept = plan, -1, {}
        self.selection = TokenSelection(share, 0)
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
        self.selection.begin(self.step)

    @property
    def kind(self) -> str:
        return self.plan[self.step]

    def whole(self, value: torch.Tensor, key: tuple) -> torch.Tensor:
        if self.kind == "F":
            self.kept[key] = value.clone()
        return self.kept[key].clone() if self.kind == "c" else value  # the host writes into what it is given

    def refreshed(self, value: torch.Tensor, key: tuple, stream: str, index: int, blocks: int) -> torch.Tensor:
        if self.kind == "c":
            tokens = self.selection.tokens(stream, index, blocks, value.shape[1], value.device)
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


def assert_conservative_is_dense(case: Case, model: Any, plain: torch.Tensor, share: float, dense_type: type[Dense] = Dense) -> None:
    """Conservative evaluations after full ones and after one another, and skips after either, agree with those made by hooks."""
    plan = "FcacccFc"
    patched = cached(model, plan, share=share)
    result = sample(case, patched)
    assert kinds(patched) == plan and not report_of(patched).notices
    dense = dense_type(network(model), plan, share)
    try:
        expected = sample(case, model)
    finally:
        for handle in dense.handles:
            handle.remove()
    assert dense.step == STEPS - 1, "both conds are to be in one call"
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-3)
    assert (expected - plain).abs().max() > 0.01
