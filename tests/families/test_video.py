"""What is particular to video and audio models: pictures, sound and control beside the text, modulation by frame, two experts."""

from __future__ import annotations

from operator import attrgetter

import comfy.ldm.wan.model_animate
import comfy.sample
import comfy.sd
import comfy.supported_models
import pytest
import torch
import zoo_video
from checks import assert_incremental_is_exact, assert_right, assert_skips_repeat, repeated
from comfyui_duca.cache_core import find_family
from comfyui_duca.cache_core.predictors import Reuse
from helpers.predictors import Innovating
from runs import cached, kinds, network, report_of, sample
from zoo_video import seeded, wan_case, wan_model
from zoo_video_variants import CLIP, VARIANTS, animate, vace


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_cached_as_their_family_is(name):
    case = VARIANTS[name]
    model = case.make()
    assert find_family(network(model)).name == case.name
    assert_right(case, model)


def test_calibrated_forecasts_do_not_know_added_tokens():
    """The predictor that needs no input takes over."""
    case = VARIANTS["Wan HuMo with a reference"]
    model = case.make()
    patched = cached(model, "FaFaFaFa", Innovating(torch.ones(64, 48)))
    assert torch.equal(sample(case, patched), sample(case, cached(model, "FaFaFaFa")))
    assert kinds(patched) == "FaFaFaFa" and report_of(patched).peak_bytes == report_of(patched).predicted_bytes
    (notice,) = report_of(patched).notices
    assert notice.startswith("the calibration is not used for skipped evaluations: tokens are added")


def calls_of(module: torch.nn.Module) -> list:
    calls = []
    module.register_forward_hook(lambda *_args: calls.append(1))
    return calls


def test_skipped_evaluations_leave_control_out():
    """In a second run, as the first looks for the place."""
    case, model = vace(1), zoo_video.wan_vace()
    sample(case, cached(model, "FaaFaaaa"))
    calls = [calls_of(block.ffn[0]) for block in network(model).vace_blocks]
    sample(case, cached(model, "FaaFaaaa"))
    assert [len(c) for c in calls] == [2, 2]


def test_two_control_videos():
    """It is skipped as with one. VACE blocks run for each video, so a skip cannot leave their list out, and their layers are the host's."""
    case, model = vace(2), zoo_video.wan_vace()
    plain = sample(case, model)
    assert not torch.allclose(plain, sample(vace(1), model), atol=1e-3)
    assert_skips_repeat(case, model, plain, "FaaFaaFa")
    assert not any(name.startswith("vace_blocks") for name in assert_incremental_is_exact(case, model, plain))


def test_control_behind_the_last_block_is_not_lost():
    """Control that is added after the last block is computed in skips too: VACE blocks are not left out then."""
    model = wan_model(comfy.supported_models.WAN21_Vace, "vace", num_layers=2, vace_layers=2, vace_in_dim=96)
    case = vace(1)
    assert_right(case, model)
    calls = calls_of(network(model).vace_blocks[-1].ffn[0])
    sample(case, cached(model, "FaaFaaaa"))
    assert len(calls) >= 8


def test_faces_of_animate(monkeypatch):
    """The small model lacks the encoder of faces. Here its result depends on the brightness."""
    model = animate()
    net = network(model)
    vectors = seeded(1, 512)
    monkeypatch.setattr(net.motion_encoder, "get_motion", lambda pixels: pixels.mean((1, 2, 3))[:, None] * vectors, raising=False)
    case = wan_case(
        "wan_animate",
        lambda: model,
        clip_vision_output=CLIP,
        face_video_pixels=seeded(1, 3, 8, 4, 4) + torch.linspace(-1, 1, 8)[:, None, None],
    )
    faces = calls_of(net.face_adapter.fuser_blocks[0].linear1_q)
    plain = sample(case, model)
    assert len(faces) == 8
    assert_incremental_is_exact(case, model, plain)
    expected = repeated(case, model, "FaaaFaaa")
    assert torch.equal(sample(case, cached(model, "FaaaFaaa")), expected)


def test_the_last_sound_of_s2v_is_heard_in_a_skip():
    """The sound is added after the last block."""
    case = VARIANTS["Wan S2V with sound and a reference"]
    model = case.make()
    sample(case, cached(model, "FaaFaaaa"))
    calls = calls_of(network(model).audio_injector.injector[1].q)
    sample(case, cached(model, "FaaFaaaa"))
    assert len(calls) >= 8


@pytest.mark.parametrize(
    "case",
    [*(case for case in zoo_video.CASES if case.name != "ace_step"), VARIANTS["Wan Fun, a reference before the video"]],
    ids=[*(case.name for case in zoo_video.CASES if case.name != "ace_step"), "a reference before the video"],
)
def test_the_input_is_kept_token_by_token(case):
    """With a matrix E as embedding, the hidden state minus E·x is kept. Minus E times the change of x, plus the new E·x, it is what it was.

    Nothing is kept of a reference before the video. Some hosts change a model in its first run, which is then looked at again.
    """
    model = case.make()
    sample(case, model)
    embed = attrgetter(find_family(network(model)).embed)(network(model))
    weight = next(weight for name, weight in embed.named_parameters() if name.endswith("weight"))
    innovating = cached(model, "FaaFaaFa", Innovating(-weight.detach().flatten(1).T))
    by_input = sample(case, innovating)
    assert kinds(innovating) == "FaaFaaFa" and not report_of(innovating).notices
    patched = cached(model, "FaaFaaFa", Reuse())
    torch.testing.assert_close(by_input, sample(case, patched), atol=1e-4, rtol=1e-3)
    assert kinds(patched) == "FaaFaaFa" and not report_of(patched).notices


@pytest.mark.parametrize("name", ["wan", "wan_i2v", "wan_vace"])
def test_a_checkpoint_is_recognised(name):
    """The host's loader reads the dimensions from the weights."""
    unet = {"dim": 128, "num_heads": 1, "freq_dim": 256, "text_dim": 4096, "num_layers": 2}
    if name == "wan_vace":
        made = wan_model(comfy.supported_models.WAN21_Vace, "vace", vace_layers=1, vace_in_dim=96, **unet)
    elif name == "wan_i2v":
        made = wan_model(comfy.supported_models.WAN21_I2V, "i2v", in_dim=36, **unet)
    else:
        made = wan_model(comfy.supported_models.WAN21_T2V, "t2v", **unet)
    loaded = comfy.sd.load_diffusion_model_state_dict(dict(network(made).state_dict()))
    assert find_family(network(loaded)).name == name
