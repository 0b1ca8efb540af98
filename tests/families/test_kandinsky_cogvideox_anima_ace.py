"""What is particular to Kandinsky 5, CogVideoX, Anima and ACE-Step 1.5, on stand-ins, and that other blocks of that name are found too."""

from __future__ import annotations

import pytest
import stand_in_ace15
import torch
from checks import assert_listening_changes_nothing, assert_right, assert_skips_repeat
from comfyui_duca.cache_core import find_family
from helpers.factors import exact_factors
from helpers.predictors import Innovating
from making import other_signature
from runs import PLAN, cached, cached_run, kept_tokens, kinds, layers_of, network, report_of, sample
from zoo_image import normal
from zoo_stand_ins import CASES

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("name", ["kandinsky5", "cogvideox", "cogvideox_1_5", "anima", "ace_step15"])
def test_blocks_that_take_other_arguments_are_found_by_watching_them(name):
    """The blocks keep the model's name, but have no conservative evaluations."""
    case = BY_NAME[name]
    model = case.make()
    for block in case.last(network(model)), next(iter(case.last(network(model)).children())):
        other_signature(block)
    known = find_family(network(model))
    assert known.name == name.removesuffix("_1_5") and not known.is_conservative
    assert_right(case, model)


def test_skipped_evaluations_leave_out_the_text_blocks_of_kandinsky():
    case = BY_NAME["kandinsky5"]
    model, seen = case.make(), []
    cached_run(case, model)  # finds the place
    for block in network(model).text_transformer_blocks:
        block.self_attention.register_forward_hook(lambda *_args: seen.append(1))
    full, skipped, *_ = cached_run(case, model).evaluations
    assert len(seen) == 4 * 2
    assert skipped.macs < 0.2 * skipped.full_macs and full.macs == full.full_macs


@pytest.mark.parametrize("name", ["cogvideox", "cogvideox_1_5"])
def test_cogvideox_fills_odd_frame_counts_up(name):
    case = BY_NAME[name]._replace(latent=(4, 5, 4, 6))
    assert_right(case, case.make())


def test_anima_at_16_bit_has_its_hidden_state_in_32():
    """The host adds in float32, while layers inside the blocks compute in 16 bits."""
    case = BY_NAME["anima"]
    model = case.make()
    network(model).half().dtype = torch.float16
    plain = sample(case, model)
    assert_listening_changes_nothing(case, model, plain)
    assert_skips_repeat(case, model, plain)
    report = cached_run(case, model)
    assert [kept.dtype for kept in report.shape.known.place.kept] == [torch.float32]
    patched = cached(model, PLAN, Innovating(0.01 * torch.ones(17 * 4, 48)))
    sample(case, patched)
    # the input has 16 bits
    assert kinds(patched) == PLAN and report.peak_bytes < report_of(patched).peak_bytes < report_of(patched).predicted_bytes
    factors = exact_factors(layers_of(case, model))
    for plan, more in (("FiiFiiFi", {"factors": factors}), ("FcFcFcFc", {})):
        patched = cached(model, plan, **more)
        result = sample(case, patched)
        assert kinds(patched) == plan and not report_of(patched).notices and torch.isfinite(result).all()
    torch.testing.assert_close(sample(case, cached(model, "FiiFiiFi", factors=factors)), plain, atol=0.05, rtol=0.05)


def test_skipped_evaluations_leave_out_what_ace_step_makes_of_lyrics_and_timbre():
    """So are its hints, which enter beside the latent. The lyrics' layer is too small here to be looked at."""
    case = BY_NAME["ace_step15"]
    model, seen = case.make(), []
    cached_run(case, model)
    lyrics, timbre, hints = network(model).encoder.lyric_encoder, network(model).encoder.timbre_encoder, network(model).detokenizer
    for name, part in (("lyrics", lyrics), ("timbre", timbre), ("hints", hints)):
        part.layers[0].mlp.register_forward_hook(lambda *_args, name=name: seen.append(name))
    cached_run(case, model, "FaaaFaaa")
    assert {name: seen.count(name) for name in seen if name != "lyrics"} == {"timbre": 2, "hints": 2}


@pytest.mark.parametrize("frames", [98, 99])
def test_ace_step_makes_its_hints_of_the_reference_where_there_are_no_codes(frames):
    """A last frame that is alone is padded to a token."""
    of_codes = BY_NAME["ace_step15"]

    def cond(seed: int) -> list:
        return [[tokens, {**more, "codes": None, "reference": normal(9, 1, 8, 100)}] for tokens, more in of_codes.cond(seed)]

    case = of_codes._replace(latent=(8, frames), cond=cond)
    model = case.make()
    assert_right(case, model)
    assert kept_tokens(cached_run(case, model)) == [50 if frames == 99 else 49]


def test_ace_step_without_words_writes_into_what_it_was_told():
    """The host overwrites the packed conditioning in place."""

    class AceStepConditionGenerationModel(stand_in_ace15.AceStepConditionGenerationModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs, replace_with_null_embeds=True)

    case = BY_NAME["ace_step15"]
    model = case.make()
    network(model).__class__ = AceStepConditionGenerationModel
    assert_skips_repeat(case, model, sample(case, model))
