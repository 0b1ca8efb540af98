"""Full, conservative and skipped evaluations of FLUX agree with an independent dense reference."""

from __future__ import annotations

import pytest
import torch
from comfyui_duca.cache_core import CacheRun, Kind, ModelCall, RunStart, StoreFormat, Timeline, find_family
from comfyui_duca.cache_core.engine import TokenSelection
from comfyui_duca.cache_core.families.flux import FLUX
from comfyui_duca.cache_core.planning.policies import DucaCycle
from comfyui_duca.cache_core.predictors import Reuse
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes.demo_flux import encode_prompt
from helpers.reference_flux import ReferenceFlux


@pytest.fixture(scope="module")
def reference(network):
    return ReferenceFlux(network)


def inputs(seed: int, size=(48, 64)):
    (context, extra), (context2, extra2) = encode_prompt("red apple")[0], encode_prompt("tiger face")[0]
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))
    return x, torch.cat((context, context2)), torch.cat((extra["pooled_output"], extra2["pooled_output"]))


def make_run(between: str, share: float, steps=4, storage=StoreFormat(), seed=7) -> CacheRun:
    strategy = Strategy(DucaCycle(steps + 1, between, warmup=1), Reuse(), share, seed, storage)
    timeline = Timeline([1 - i / steps for i in range(steps + 1)])
    return CacheRun(strategy, RunStart(torch.nn.Module(), FLUX, timeline, range(steps)))


@torch.inference_mode()
def evaluate(run: CacheRun, network, sigma: float, x, context, y, conds=("a", "b"), **more):
    """Makes one evaluation with the batch rows of both conds in one call."""
    with run.evaluation(sigma):
        run.cond_batch()
        t = torch.full((x.shape[0],), sigma)
        call = ModelCall(network, conds, (x.shape, x.dtype))
        return run.model_call(call, lambda: network(x.clone(), t, context.clone(), y, **more))


def masks(share: float, network, length_img: int, length_txt: int, evaluation: int):
    """Returns, for the reference, the boolean masks of recomputed tokens from the same seeded selection."""
    selection = TokenSelection(share, 7)
    selection.begin(evaluation)
    lengths = {"img": length_img, "txt": length_txt, "txt+img": length_txt + length_img}
    blocks = {"img": len(network.double_blocks), "txt": len(network.double_blocks), "txt+img": len(network.single_blocks)}

    def fresh(stream: str, block: int) -> torch.Tensor:
        mask = torch.zeros(lengths[stream], dtype=torch.bool)
        tokens = selection.tokens(stream, block, blocks[stream], lengths[stream], torch.device("cpu"))
        if tokens is not None:
            mask[tokens] = True
        return mask

    return fresh


def slots_of(run: CacheRun) -> list:
    return list(run._slots._slots.values())


def assert_near(result: torch.Tensor, expected: torch.Tensor, tolerance=2e-5):
    scale = expected.abs().max()
    assert (result.double() - expected).abs().max() / scale < tolerance


def test_the_reference_is_the_host(network, reference):
    x, context, y = inputs(0)
    with torch.inference_mode():
        host_result = network(x, torch.tensor([0.9, 0.9]), context, y)
    assert_near(host_result, reference(x, torch.tensor([0.9, 0.9]), context, y)[0])


def test_full_evaluation_keeps_what_the_reference_computes(network, reference):
    run, (x, context, y) = make_run("c", 0.25), inputs(1)
    evaluate(run, network, 1.0, x, context, y)
    _, expected = reference(x, torch.tensor([1.0, 1.0]), context, y)
    slots = slots_of(run)
    kept = {
        f"{stack}.{block}.{site}": torch.cat([s.sublayers[stack, block, site].data for s in slots])
        for stack, block, site in slots[0].sublayers
    }
    assert set(kept) == set(expected)  # with the attention half of every fused single block
    for name, value in kept.items():
        assert_near(value, expected[name])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 1.0])
def test_conservative_evaluations_match_the_dense_reference(network, reference, share):
    """Two follow each other, as the second must use what the first wrote into the cache."""
    run = make_run("c", share)
    x, context, y = inputs(2)
    evaluate(run, network, 1.0, x, context, y)
    _, kept = reference(x, torch.tensor([1.0, 1.0]), context, y)
    for evaluation, sigma in ((1, 0.75), (2, 0.5)):
        x = inputs(2 + evaluation)[0]
        result = evaluate(run, network, sigma, x, context, y)
        fresh = masks(share, network, 12 * 16, 12, evaluation)
        expected, kept = reference(x, torch.full((2,), sigma), context, y, kept, fresh)
        assert_near(result, expected)
    assert [e.kind for e in run.report.evaluations] == [Kind.FULL, Kind.CONSERVATIVE, Kind.CONSERVATIVE]


def guided_network(demo):
    """Returns a small random network of FLUX.1-dev's form: with guidance embedding, and other depths and widths than the demo's."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux
    from comfy.model_detection import detect_unet_config

    detected = detect_unet_config(demo.state_dict(), "")  # every field that this host asks for
    sizes = {
        "in_channels": 3, "out_channels": 3, "hidden_size": 96, "num_heads": 2, "depth": 1, "depth_single_blocks": 1,
        "axes_dim": [8, 20, 20], "patch_size": 4, "guidance_embed": True,
    }  # fmt: skip
    network = Flux(**(detected | sizes), dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(11)
    for name, parameter in network.named_parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08 + (1.0 if "_norm." in name else 0.0))
    return network.eval()


def test_embedded_guidance_takes_part_in_every_kind(network):
    network = guided_network(network)
    reference, guidance = ReferenceFlux(network), torch.tensor([3.5, 3.5])
    run, (x, context, y) = make_run("c", 0.3), inputs(8)
    full = evaluate(run, network, 1.0, x, context, y, guidance=guidance)
    expected, kept = reference(x, torch.ones(2), context, y, guidance=guidance)
    assert_near(full, expected)
    assert (reference(x, torch.ones(2), context, y, guidance=guidance + 2)[0] - expected).abs().max() > 1e-3
    x = inputs(9)[0]
    result = evaluate(run, network, 0.75, x, context, y, guidance=guidance)
    assert_near(result, reference(x, torch.full((2,), 0.75), context, y, kept, masks(0.3, network, 192, 12, 1), guidance)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_single(network, dtype):
    """Evaluations of all three kinds in half precision stay near those in float32."""
    import copy

    half, (x, context, y) = copy.deepcopy(network).to(dtype), inputs(10)
    for between in ("c", "a"):
        results = []
        for net, kind in ((network, torch.float32), (half, dtype)):
            run = make_run(between, 0.3)
            for sigma in (1.0, 0.75):
                out = evaluate(run, net, sigma, x.to(kind), context.to(kind), y.to(kind))
            results.append(out.float())
        assert (results[1] - results[0]).abs().mean() < 0.03 * results[0].abs().mean()


def test_a_skipped_evaluation_runs_only_embedding_and_final_layer(network, reference):
    run, (x, context, y) = make_run("a", 0.1), inputs(3)
    evaluate(run, network, 1.0, x, context, y)
    hidden = torch.cat([slot.anchors[-1].hidden[0].data for slot in slots_of(run)])
    later = torch.lerp(x, inputs(4)[0], 0.3)  # of the same picture: a skip refuses others
    result = evaluate(run, network, 0.75, later, context, y)
    assert run.report.evaluations[-1].kind is Kind.SKIPPED
    with torch.inference_mode():
        vec = reference.embed_vector("vector_in", y.double())
        t = torch.full((2,), 0.75, dtype=torch.float64)
        rates = torch.exp(-torch.log(torch.tensor(10000.0, dtype=torch.float64)) * torch.arange(128, dtype=torch.float64) / 128)
        phase = (t * 1000)[:, None] * rates
        vec = vec + reference.embed_vector("time_in", torch.cat((phase.cos(), phase.sin()), -1))
        shift, scale = reference.mods("final_layer.adaLN_modulation.1", vec, 2)
        tokens = reference.linear("final_layer.linear", reference.norm(hidden.double(), shift, scale))
    expected = tokens.unflatten(1, (12, 16)).unflatten(3, (-1, 4, 4)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    assert_near(result, expected)


def test_share_one_token_counts(network):
    """By hand, 192 image and 12 text tokens at share 0.1 give 19, 1 and 20 tokens."""
    selection = TokenSelection(0.1, 0)
    selection.begin(0)
    counts = [len(selection.tokens(stream, 0, 2, n, torch.device("cpu"))) for stream, n in (("img", 192), ("txt", 12), ("txt+img", 204))]
    assert counts == [19, 1, 20]


def test_attention_mask_reaches_full_evaluations(network):
    """A masked text token changes the result exactly as without the cache."""
    x, context, y = inputs(5)
    mask = torch.zeros(1, 1, 12 + 192, 12 + 192)
    mask[..., 5:12] = -1e9
    with torch.inference_mode():
        expected = network(x, torch.ones(2), context, y, attention_mask=mask)
    assert torch.equal(evaluate(make_run("c", 0.1), network, 1.0, x, context, y, attention_mask=mask), expected)


def test_unknown_modulation_is_computed_in_full(network, monkeypatch):
    """A replay must not guess what arguments mean that it does not know."""
    run, (x, context, y) = make_run("c", 0.5), (tensor[:1] for tensor in inputs(6))
    evaluate(run, network, 1.0, x, context, y, conds=("a",))
    block_type = type(network.single_blocks[0])
    original = block_type.__call__
    monkeypatch.setattr(block_type, "__call__", lambda *args, **kwargs: original(*args, **kwargs, modulation_dims=[(0, 8, 0)]))
    with torch.inference_mode():
        expected = network(x, torch.tensor([0.75]), context, y)
    assert torch.equal(evaluate(run, network, 0.75, x, context, y, conds=("a",)), expected)
    assert run.report.evaluations[-1].kind is Kind.FULL
    assert "modulation_dims do not give" in run.report.notices[0]


def test_family_is_found_by_structure(network):
    assert find_family(network) is FLUX and not find_family(torch.nn.Linear(2, 2)).stacks
