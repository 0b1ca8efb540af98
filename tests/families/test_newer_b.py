"""ERNIE-Image, Helios, HiDream-O1 and MiniMax H3 on stand-ins: what is no such model, and the traps of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sample
import pytest
import test_every_family as every
import torch
from comfyui_duca.cache_core import find_family
from comfyui_duca.cache_core.families.minimax_h3 import MINIMAX_H3
from comfyui_duca.cache_core.predictors import Taylor
from making import Case, text, tiny
from stand_in_newer_b import Ernie, Helios, config_of
from test_every_family import cached, kinds, network, report_of, sample
from torch import nn
from zoo_newer_b import CASES, helios, hidream_o1, ids, minimax_h3

PLAN = "FaFaFaFa"
BY_NAME = {case.name: case for case in CASES}
NAMES = ("ernie", "helios", "hidream_o1", "minimax_h3")


def assert_right(case: Case, model) -> None:
    """What test_every_family holds of the plain cases."""
    plain = sample(case, model)
    every.test_listening_changes_nothing(case, model, plain)
    every.test_skipping_repeats_the_hidden_state(case, model, plain, PLAN)
    every.test_bytes_are_predicted(case, model)
    family = find_family(network(model))
    if family.embed:
        every.test_the_input_is_kept_for_calibrated_forecasts(case, model)
    if family.linears:
        every.test_calibrated_evaluations_at_full_rank_are_the_uncached_ones(case, model, plain)


def lengths(case: Case, model) -> dict[str, int]:
    patched = cached(model, PLAN)
    sample(case, patched)
    return report_of(patched).shape.lengths


# -- what is no such model ----------------------------------------------------------------------------------


def other_name(model: Any, _block: nn.Module) -> None:
    model.__class__ = type("Other", (type(model),), {})


def other_forward(_model: Any, block: nn.Module) -> None:
    """As where a later host gives blocks one parameter more."""

    class Changed(type(block)):  # type: ignore[misc]
        def forward(self, *args: Any, something_new: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    block.__class__ = Changed


def another_layer(_model: Any, block: nn.Module) -> None:
    block.something_new = nn.Linear(2, 2)


def one_layer_less(_model: Any, block: nn.Module) -> None:
    name = next(name for name, layer in block.named_modules() if hasattr(layer, "in_features"))
    parent, _, last = name.rpartition(".")
    setattr(block.get_submodule(parent), last, nn.Identity())


def no_blocks(model: Any, block: nn.Module) -> None:
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ModuleList) and any(other is block for other in child):
                setattr(module, name, nn.ModuleList())


def no_head(model: Any, _block: nn.Module) -> None:
    for name in ("final_linear", "proj_out", "final_layer2", "final_layer"):
        if hasattr(model, name):
            delattr(model, name)


@pytest.mark.parametrize("change", [other_name, other_forward, another_layer, one_layer_less, no_blocks, no_head], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_look_exactly_as_read_is_no_known_model(name, change: Callable[[Any, nn.Module], None]):
    case = BY_NAME[name]
    inner = network(case.make())
    assert find_family(inner).name == name
    change(inner, inner.blocks[-1] if name == "minimax_h3" else case.last(inner))
    assert find_family(inner) is None


@pytest.mark.parametrize(
    "make", [lambda: tiny(config_of(Ernie, 16), text_in_dim=48), lambda: tiny(config_of(Helios, 16, 3), guidance_cross_attn=False)],
    ids=["ernie without a projection of text", "helios whose history looks at text"],
)  # fmt: skip
def test_kinds_that_the_family_does_not_describe_are_no_known_models(make):
    assert find_family(network(make())) is None


# -- Helios ---------------------------------------------------------------------------------------------------


def test_the_history_of_a_video_is_no_part_of_it():
    past = {"short": (2, 8, 6), "mid": (2, 8, 8), "long": (4, 8, 8)}  # 24, 4 and 1 tokens
    latents = {f"latents_history_{name}": normal(i, 1, 16, *shape) for i, (name, shape) in enumerate(past.items())}
    case = BY_NAME["helios"]._replace(cond=text(7, 24, **latents))
    model = helios()
    assert_right(case, model)
    assert lengths(case, model) == {"hist": 29, "img": 36, "txt": 7}
    assert not torch.equal(sample(case, model), sample(BY_NAME["helios"], model))


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- HiDream-O1 -----------------------------------------------------------------------------------------------


def test_patches_of_references_are_kept_with_the_image():
    case = BY_NAME["hidream_o1"]._replace(cond=ids(ref_patches=normal(3, 1, 5, 192)))
    model = hidream_o1()
    assert_right(case, model)
    assert lengths(case, model) in ({"txt": 1, "vis": 17, "past": 4}, {"txt": 1, "vis": 17, "past": 6})
    assert not torch.equal(sample(case, model), sample(BY_NAME["hidream_o1"], model))


def test_a_run_that_fills_the_hosts_cache_of_the_text_is_one_that_finds_it_filled():
    """Cold, the first evaluation has all tokens, later ones have not; what is kept is the same."""
    case, model = BY_NAME["hidream_o1"], hidream_o1()
    hot = sample(case, cached(model, PLAN))
    network(model).clear_kv_cache()
    patched = cached(model, PLAN)
    torch.testing.assert_close(sample(case, patched), hot, atol=1e-4, rtol=1e-4)
    assert kinds(patched) == PLAN and not report_of(patched).notices
    assert report_of(patched).shape.lengths["past"] == 0 and report_of(patched).peak_bytes == report_of(patched).predicted_bytes


def test_an_evaluation_in_which_the_host_fills_its_cache_is_not_skipped():
    """As after a third prompt has pushed one out: with blocks left out, keys and values of nothing would be kept."""
    case, model = BY_NAME["hidream_o1"], hidream_o1()
    expected = sample(case, cached(model, "FaFFFaFa"))
    patched, done = cached(model, PLAN), []

    def clear(*_args):
        done.append(1)
        if len(done) == 3:
            network(model).clear_kv_cache()

    result = sample(case, patched, callback=clear)
    assert kinds(patched) == "FaFFFaFa" and "the host fills its cache of the text" in report_of(patched).notices[0]
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert len(network(model)._kv_cache_entries) == 2 and len(report_of(patched).notices) == 1


# -- MiniMax H3 -----------------------------------------------------------------------------------------------


def test_video_and_sound_are_kept_together():
    """8·2·4·6 numbers of video and 8·2·5 of sound; a layer that dense attention does not call costs nothing."""
    case = BY_NAME["minimax_h3"]
    for model in (minimax_h3(), minimax_h3(gate_compress=True)):
        assert_right(case, model)
        assert lengths(case, model) == {"img": 58, "txt": 7, "video": 12, "audio": 10, "cond": 0, "levels": 2}
        every.test_multiply_adds_are_those_that_torch_counts(case, model)


def test_a_given_picture_is_counted_but_not_kept():
    case, model = BY_NAME["minimax_h3"]._replace(cond=text(7, 48, still=normal(3, 1, 8, 1, 4, 6))), minimax_h3()
    assert_right(case, model)
    assert lengths(case, model) == {"img": 58, "txt": 7, "video": 12, "audio": 10, "cond": 6, "levels": 3}
    every.test_multiply_adds_are_those_that_torch_counts(case, model)
    assert not torch.equal(sample(case, model), sample(BY_NAME["minimax_h3"], model))


def test_video_and_sound_are_forecast_each_from_its_own():
    """First-order Taylor by hand, of the list that the model returns; the answer is that list as the host packs it."""
    case, model = BY_NAME["minimax_h3"], minimax_h3()
    seen: list[tuple[float, torch.Tensor]] = []

    def hook(_module, args, result):
        parts = result if isinstance(result, list) else [result]
        seen.append((float(args[1][0]), torch.cat([part.flatten() for part in parts])))

    handle = network(model).register_forward_hook(hook)
    sample(case, cached(model, "FFaFFFFF", Taylor(1)))
    handle.remove()
    for cond in (0, 1):  # a call each
        (t0, x), (t1, y), (t, answer) = seen[cond], seen[2 + cond], seen[4 + cond]
        torch.testing.assert_close(answer, y + (y - x) * ((t - t1) / (t1 - t0)), atol=1e-4, rtol=1e-4)


def test_latents_that_are_not_two_are_not_skipped():
    """What a skip is asked first, for sound of no length."""
    inner = network(minimax_h3())
    call = MINIMAX_H3.stacks[0].named(([torch.zeros(1, 8, 2, 4, 6), torch.zeros(1, 8, 2, 0)],), {"control": None})
    assert MINIMAX_H3.stacks[0].why_not(call) == "latents that are not two"
    assert MINIMAX_H3.stacks[0].counts(call, {}) == {"video": 0, "audio": 0, "cond": 0, "levels": 0}
    assert find_family(inner) is MINIMAX_H3


# -- all ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ernie", "helios", "hidream_o1"])
def test_a_batch_of_two_is_each_of_them(name):
    """MiniMax H3 takes one row at a time."""
    case = BY_NAME[name]
    model, noise = case.make(), normal(5, 2, *case.latent)

    def sampled(noise: torch.Tensor) -> torch.Tensor:
        latent = torch.zeros_like(noise)
        patched = cached(model, PLAN)
        result = comfy.sample.sample(patched, noise, 8, 2.0, "euler", "simple", case.cond(1), case.cond(2), latent, disable_pbar=True)
        assert kinds(patched) == PLAN
        return result

    both = sampled(noise)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], sampled(noise[i : i + 1]), atol=1e-4 * float(both.std()) + 1e-4, rtol=1e-4)
