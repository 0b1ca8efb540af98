"""What is particular to image families: what is beside text and image in their streams, padded sizes, a ControlNet's residuals."""

from __future__ import annotations

import comfy.sample
import pytest
import torch
from checks import assert_incremental_is_exact, assert_skips_repeat, assert_the_input_is_kept
from comfyui_duca.cache_core import find_family
from making import Case, text
from runs import PLAN, cached, cached_run, kept_of, kinds, network, report_of, sample
from zoo_image import CASES, controlled, hidream, hydit, normal, omnigen, sd3, with_more, z_image

BY_NAME = {case.name: case for case in CASES}


def assert_right(case: Case, model, channels: int) -> None:
    """Checks a model whose hidden state has `channels`."""
    plain = sample(case, model)
    assert find_family(network(model)).name == case.name
    assert_skips_repeat(case, model, plain)
    assert_the_input_is_kept(case, model, channels)
    assert assert_incremental_is_exact(case, model, plain)


@pytest.mark.parametrize("name", ["lumina", "sd3", "hidream", "aura", "omnigen", "hydit"])
def test_odd_sizes_are_filled_up_to_patches(name):
    """PixArt is left out, as the host itself fails there."""
    case = BY_NAME[name]._replace(latent=(BY_NAME[name].latent[0], 11, 13))
    model = case.make()
    (kept,) = kept_of(cached_run(case, model))
    assert kept[0] == 6 * 7
    assert_right(case, model, kept[1])


def test_tokens_that_z_image_adds_are_not_taken_for_image():
    case = Case("lumina", z_image, (16, 12, 16), text(7, 24), lambda m: m.layers[-1])
    model = case.make()
    report = cached_run(case, model)
    assert kept_of(report) == [(48, 256)]  # beside 32 tokens of text and 16 that pad the picture
    assert report.peak_bytes == 2 * 48 * 256 * 4  # two conds, nothing but the picture


def test_texts_of_unequal_length_come_in_calls_of_their_own():
    model = z_image()
    case = Case("lumina", z_image, (16, 12, 16), lambda seed: text(7 if seed == 1 else 40, 24)(seed), lambda m: m.layers[-1])
    patched = cached(model, PLAN)
    result = sample(case, patched)
    assert kinds(patched) == PLAN and report_of(patched).evaluations[0].calls == 2
    assert report_of(patched).peak_bytes == report_of(patched).predicted_bytes
    alone = [sample(case._replace(cond=lambda seed, tokens=tokens: text(tokens, 24)(seed)), cached(model, PLAN)) for tokens in (7, 40)]
    assert torch.isfinite(result).all() and not any(torch.equal(result, other) for other in alone)


def test_a_node_that_keeps_the_refined_text_changes_nothing(monkeypatch):
    """How many of the joint tokens are text cannot be seen, and need not be."""
    case, model = BY_NAME["lumina"], z_image()
    plain = sample(case, model)
    inner, kept = network(model), {}
    monkeypatch.setattr(inner, "context_refiner", KeepsText(inner.context_refiner, kept))
    assert torch.equal(sample(case, model), plain)
    assert_skips_repeat(case, model, plain)


class KeepsText(torch.nn.ModuleList):
    """Yields one module that answers for all blocks. They are still found by their numbers."""

    def __init__(self, blocks, kept: dict) -> None:
        super().__init__(blocks)
        self.kept = kept

    def __iter__(self):
        def answer(tokens, *args, **more):
            key = tokens.shape, float(tokens.sum())
            if key not in self.kept:
                self.kept[key] = self[0](tokens, *args, **more)
            return self.kept[key]

        yield answer


def test_omnigen_takes_reference_pictures_for_no_part_of_the_image():
    cond = text(7, 24, attention_mask=torch.ones(1, 7, dtype=torch.long), reference_latents=[normal(3, 1, 16, 8, 6)])
    case = Case("omnigen", omnigen, (16, 12, 16), cond, lambda m: m.layers[-1])
    model = case.make()
    (kept,) = kept_of(cached_run(case, model))
    assert kept[0] == 48  # beside 7 tokens of text and 12 of the reference
    assert_right(case, model, kept[1])
    assert not torch.equal(sample(case, cached(model, PLAN)), sample(BY_NAME["omnigen"], cached(model, PLAN)))


def test_hidream_edits_a_picture_beside_the_image():
    cond = with_more(
        text(5, 24), pooled_output=(1, 32), conditioning_llama3=(1, 3, 5, 20), concat_latent_image=(1, 16, 12, 16)
    )  # fmt: skip
    case = Case("hidream", hidream, (16, 12, 16), cond, lambda m: m.single_stream_blocks[-1])
    model = case.make()
    (kept,) = kept_of(cached_run(case, model))
    assert kept[0] == 88  # rows of the image, the picture's at their right: all but the last 8
    assert_right(case, model, kept[1])


@pytest.mark.parametrize("name, make, width, count", [("sd3", sd3, 128, 3), ("hydit", hydit, 48, 2)])
def test_residuals_of_a_controlnet_take_effect_once(name, make, width, count):
    """SD3 adds them after every block, the last one included; HunyuanDiT in the long skips."""
    case, model = BY_NAME[name], make()
    tokens = case.latent[1] * case.latent[2] // 4
    guided = controlled(model, [normal(i, 1, tokens, width) for i in range(count)])
    assert_skips_repeat(case, guided, sample(case, guided))
    assert not torch.equal(sample(case, cached(guided, PLAN)), sample(case, cached(model, PLAN)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_batch_of_pictures_is_each_of_them(case):
    """Two pictures in a batch are those that each gives alone."""
    model = case.make()
    noise = normal(5, 2, *case.latent)
    both = sample_noise(case, cached(model, PLAN), noise)
    for i in range(2):
        alone = sample_noise(case, cached(model, PLAN), noise[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-4 * max(1.0, float(alone.std())), rtol=1e-4)


def sample_noise(case: Case, model, noise: torch.Tensor) -> torch.Tensor:
    latent = torch.zeros_like(noise)
    return comfy.sample.sample(model, noise, 8, 2.0, "euler", "simple", case.cond(1), case.cond(2), latent, seed=5, disable_pbar=True)
