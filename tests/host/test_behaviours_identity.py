"""The cache changes nothing that it should not change: pictures while it is off, later runs, the model itself."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfyui_duca.cache_core import Kind
from comfyui_duca.nodes import host
from comfyui_duca.nodes.demo_flux import encode_prompt, load_demo_model
from comfyui_duca.nodes.host import cached_model
from helpers.sampling import cached, kinds, last_report, psnr, sample

MODES = {
    "auto": {"mode": "auto", "speedup": 3.0},
    "paper": {"mode": "paper", "cycle_length": 5, "token_share": 0.2},
    "forecast": {"mode": "forecast", "predictor": "taylor2", "speedup": 2.5},
}


@pytest.fixture(scope="module")
def model():
    return load_demo_model()


@pytest.fixture(scope="module")
def uncached(model):
    return sample(model)


@pytest.mark.parametrize(
    "settings", [{"mode": "off"}, {"speedup": 1.0}, {"mode": "paper", "cycle_length": 1}, {"skip_from": 0.0, "skip_to": 0.0}]
)
def test_nothing_skipped_is_bit_identical(model, uncached, settings):
    """With mode off, and with the hooks in place while every evaluation is full."""
    assert torch.equal(sample(cached(model, **settings)), uncached)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_depends_on_nothing_before_it(model, uncached, mode):
    """After another prompt, another resolution and another batch size the picture is bit-identical, and evaluations were skipped."""
    patched = cached(model, **MODES[mode])
    first = sample(patched)
    assert not torch.equal(first, uncached)
    assert last_report(patched).count(Kind.FULL) < 12
    sample(patched, prompt="castle", steps=5)
    sample(patched, size=(32, 64), steps=4)
    sample(patched, batch=2, steps=4, cfg=1.0)
    assert torch.equal(sample(patched), first)
    assert torch.equal(sample(cached(model, **MODES[mode])), first)  # the node runs again
    assert torch.equal(sample(model), uncached)


class StopHereError(Exception):
    pass


def _cancel(step, *_):
    if step == 4:
        raise comfy.model_management.InterruptProcessingException


def _fail_in_a_block(monkeypatch, model, error: Exception | None = None, number: int = 0):
    """Counts the runs of the second single block, and raises `error` in the middle of run `number`."""
    block, calls = model.model.diffusion_model.single_blocks[1], []
    original = block.linear2.forward

    def failing(x):
        calls.append(1)
        if len(calls) == number:
            raise error
        return original(x)

    monkeypatch.setattr(block.linear2, "forward", failing)
    return calls


@pytest.mark.parametrize("mode", MODES)
def test_cancel_ends_the_run_and_frees_everything(model, mode):
    patched, calls = cached(model, **MODES[mode]), []
    expected = sample(patched)

    def callback(step, *rest):
        calls.append(step)
        _cancel(step, *rest)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(patched, callback=callback)
    assert calls == [0, 1, 2, 3, 4]  # no step ran again
    assert not last_report(patched).is_complete
    assert torch.equal(sample(patched), expected)


ERRORS = [StopHereError(), torch.OutOfMemoryError("the model's own"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("mode", MODES)
def test_an_error_inside_a_block_propagates(model, mode, error, monkeypatch):
    patched = cached(model, **MODES[mode])
    expected = sample(patched, steps=6)
    forwards = _forwards(model)
    with monkeypatch.context() as patch:
        calls = _fail_in_a_block(patch, model)
        assert torch.equal(sample(patched, steps=6), expected)
    last = len(calls)  # in a full evaluation; an earlier one may be a trial of the pack, whose error does not end a run
    with monkeypatch.context() as patch:
        calls = _fail_in_a_block(patch, model, error, last)
        with pytest.raises(type(error)):
            sample(patched, steps=6)
        assert len(calls) == last  # the pack does not retry after the host's error
    assert _forwards(model) == forwards
    assert torch.equal(sample(patched, steps=6), expected)


@pytest.mark.parametrize("how", ["finished", "cancelled"])
def test_no_tensor_outlives_a_run(model, how, monkeypatch):
    """When sampling ends, every run's store is empty and the objects that stay hold no tensors."""
    runs = []
    original = cached_model._Runs.open
    monkeypatch.setattr(cached_model._Runs, "open", lambda *args: runs.append(original(*args)) or runs[-1])
    patched = cached(model, **MODES["paper"])
    if how == "finished":
        sample(patched)
    else:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(patched, callback=_cancel)
    assert runs[0].report.peak_bytes > 0
    assert runs[0].store.bytes == 0
    assert not runs[0]._slots._slots
    assert not list(_tensors(host.book_of(patched)))
    assert not list(_tensors(patched.model_options))


def _tensors(thing, seen=None):
    """Yields every tensor that attributes, containers and closures of the pack's objects lead to."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors(value, seen)
    elif isinstance(thing, (list, tuple, set)):
        for value in thing:
            yield from _tensors(value, seen)
    elif type(thing).__module__.startswith("comfyui_duca"):
        yield from _tensors(vars(thing), seen)
    elif callable(thing) and getattr(thing, "__closure__", None):
        for cell in thing.__closure__:
            yield from _tensors(cell.cell_contents, seen)


def _forwards(model) -> dict[str, object]:
    """Returns the forwards that override a module's class, by name: there should be none."""
    return {name: module.__dict__["forward"] for name, module in model.model.named_modules() if "forward" in module.__dict__}


@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_left_as_it_was(mode):
    """State dict keys, weights, module types and forwards are unchanged while the node is there, after a run and after its removal."""
    fresh = load_demo_model()
    network = fresh.model.diffusion_model
    before = {key: (value.data_ptr(), value.clone()) for key, value in network.state_dict().items()}
    types = {name: type(module) for name, module in network.named_modules()}
    sample(cached(fresh, **MODES[mode]), steps=6)
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, (_, value) in before.items())
    assert {name: type(module) for name, module in network.named_modules()} == types
    assert not _forwards(fresh)
    assert not fresh.wrappers and not fresh.attachments and not fresh.object_patches


def test_kept_features_are_not_the_live_ones(model, monkeypatch):
    """Blocks that write into their input give the same as blocks that copy it first."""
    expected = [sample(cached(model, **settings), steps=8) for settings in MODES.values()]
    network = model.model.diffusion_model
    for block in [*network.double_blocks, *network.single_blocks]:
        original = block.forward

        def copying(*args, original=original, **kwargs):
            args = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
            return original(*args, **{k: v.clone() if k in ("img", "txt") else v for k, v in kwargs.items()})

        monkeypatch.setattr(block, "forward", copying)
    assert all(torch.equal(sample(cached(model, **s), steps=8), e) for s, e in zip(MODES.values(), expected))


def written_to(patched) -> set[str]:
    """Returns the names of what a sampling, or one of its model calls, was given and has other values of afterwards."""
    given = {"latent": 0.1 * torch.randn(1, 3, 48, 48), "noise": torch.randn(1, 3, 48, 48)}
    conds = [encode_prompt("castle"), encode_prompt("")]
    for cond, name in zip(conds, ("positive", "negative")):
        given |= {name: cond[0][0], f"{name} pooled": cond[0][1]["pooled_output"]}
    before, found = {name: value.clone() for name, value in given.items()}, set[str]()

    def changed(tensors: dict, clones: dict) -> set[str]:
        return {name for name, clone in clones.items() if not torch.equal(tensors[name], clone)}

    def compute(apply_model, call):
        tensors = {name: value for name, value in call["c"].items() if isinstance(value, torch.Tensor)}
        tensors |= {"input": call["input"], "timestep": call["timestep"]}
        clones = {name: value.clone() for name, value in tensors.items()}
        result = apply_model(call["input"], call["timestep"], **call["c"])
        found.update(changed(tensors, clones))
        return result

    patched = patched.clone()
    patched.set_model_unet_function_wrapper(compute)
    latent, noise = given["latent"], given["noise"]
    comfy.sample.sample(patched, noise, 6, 2.5, "euler", "simple", *conds, latent, seed=0, disable_pbar=True)
    return found | changed(given, before)


@pytest.mark.parametrize("mode", MODES)
def test_inputs_are_not_written_to(model, mode):
    assert not written_to(cached(model, **MODES[mode]))


def test_an_input_that_is_written_to_is_seen(model):
    """The test above can fail: here something other than the cache writes into what the network is given."""

    def writing(compute, x, timestep, context, *more, **options):
        result = compute(x, timestep, context, *more, **options)
        for tensor in (x, context):
            tensor.mul_(1.5)
        return result

    patched = cached(model, **MODES["auto"])
    patched.add_wrapper(WrappersMP.DIFFUSION_MODEL, writing)
    assert written_to(patched) >= {"input", "c_crossattn"}


def test_two_samplers_on_one_cached_model_do_not_mix(model):
    """Two clones of one cached model sample in turn, each with its own size, and every latent finds its own report."""
    patched = cached(model, **MODES["auto"])
    small, large = sample(patched.clone(), size=(32, 48), steps=5), sample(patched.clone(), steps=7)
    assert torch.equal(sample(patched, size=(32, 48), steps=5), small)
    book = host.book_of(patched)
    assert [len(book.report_of(latent).evaluations) for latent in (small, large)] == [5, 7]
    assert book.report_of(torch.zeros(1, 3, 48, 48)) is None


def test_two_models_do_not_mix(model):
    other = load_demo_model()
    a, b = cached(model, **MODES["auto"]), cached(other, **MODES["paper"])
    first = sample(a), sample(b)
    assert torch.equal(sample(a), first[0]) and torch.equal(sample(b), first[1])


def test_a_second_node_replaces_the_first(model):
    once = cached(model, **MODES["paper"])
    twice = cached(once, **MODES["auto"])
    assert torch.equal(sample(twice), sample(cached(model, **MODES["auto"])))
    assert all(len(w[host.KEY]) == 1 for w in twice.wrappers.values())
    assert torch.equal(sample(once, steps=6), sample(cached(model, **MODES["paper"]), steps=6))  # the first is as it was
    assert torch.equal(sample(cached(once, mode="off"), steps=6), sample(model, steps=6))


def test_other_peoples_hooks_are_called_every_evaluation(model):
    """Attention override, unet function wrapper, other wrappers and block patches are called, also in skipped evaluations."""
    count = dict.fromkeys(("unet", "diffusion", "predict", "attention", "block"), 0)

    def called(name, value):
        count[name] += 1
        return value

    other = model.clone()
    other.set_model_unet_function_wrapper(lambda apply, args: called("unet", apply(args["input"], args["timestep"], **args["c"])))
    other.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", lambda executor, *a, **k: called("diffusion", executor(*a, **k)))
    other.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "other", lambda executor, *a, **k: called("predict", executor(*a, **k)))
    other.set_model_patch_replace(lambda args, extra: called("block", extra["original_block"](args)), "dit", "double_block", 1)
    other.model_options["transformer_options"]["optimized_attention_override"] = lambda f, *a, **k: called("attention", f(*a, **k))
    patched = cached(other, **MODES["auto"])
    plain = sample(cached(model, **MODES["auto"]))
    assert torch.equal(sample(patched), plain)  # the first run looks for the place, with more calls
    count.update(dict.fromkeys(count, 0))
    assert torch.equal(sample(patched), plain)
    report = last_report(patched)
    blocks = len(model.model.diffusion_model.double_blocks) + len(model.model.diffusion_model.single_blocks)
    proof = 1  # one more skip in every run
    assert count == {
        "unet": 12, "diffusion": 12 + proof, "predict": 12, "block": 12 + proof, "attention": blocks * report.count(Kind.FULL)
    }  # fmt: skip


def test_a_patch_that_removes_the_last_block_leaves_the_one_before_to_answer(model):
    """No hidden state can be put into a last block that never runs."""
    other = model.clone()
    last = len(model.model.diffusion_model.single_blocks) - 1
    other.set_model_patch_replace(lambda args, extra: args, "dit", "single_block", last)
    patched = cached(other, **MODES["auto"])
    assert psnr(sample(patched, steps=6), sample(other, steps=6)) > 20
    report = last_report(patched)
    assert report.place == "found and proved: skips double_blocks, single_blocks" and report.shape.known.place.last == (
        "single_blocks",
        last - 1,
    )
    assert kinds(report) == report.plan and report.plan.count("a") > 1


def test_another_cache_beside_ours_is_survived(model):
    """EasyCache answers some evaluations before our blocks are reached. This is noticed, and its answers are not kept."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    idle = cached(EasyCacheNode.execute(model, 0.0, 0.1, 0.95, False).args[0], **MODES["auto"])
    assert torch.equal(sample(idle), sample(cached(model, **MODES["auto"])))
    busy = cached(EasyCacheNode.execute(model, 0.3, 0.1, 0.95, False).args[0], **MODES["auto"])
    assert torch.isfinite(sample(busy)).all()
    assert any("another node supplied" in notice for notice in last_report(busy).notices)


def test_lora_before_and_after_the_node_are_the_same(model):
    """The weight patches are in effect in computed evaluations, whichever node comes first."""
    key = "diffusion_model.single_blocks.0.linear2.weight"
    delta = torch.randn(model.model.state_dict()[key].shape, generator=torch.Generator().manual_seed(1)) * 0.02

    def with_lora(patcher):
        patcher = patcher.clone()
        assert patcher.add_patches({key: (delta,)}, 1.0) == [key]
        return patcher

    before, after = cached(with_lora(model), **MODES["auto"]), with_lora(cached(model, **MODES["auto"]))
    image = sample(before)
    assert torch.equal(image, sample(after))
    assert not torch.equal(image, sample(cached(model, **MODES["auto"])))
    assert psnr(image, sample(with_lora(model))) > 20


@pytest.mark.parametrize("mode", MODES)
def test_fp8_weights_stay_as_they_are(mode):
    """The host casts fp8 weights layer by layer. Without skips pictures are bit-identical, with skips near, and weights never change."""
    fp8 = load_demo_model(torch.float8_e4m3fn)
    weights = {key: value.clone() for key, value in fp8.model.state_dict().items()}
    plain = sample(fp8)
    assert torch.equal(sample(cached(fp8, speedup=1.0)), plain)
    patched = cached(fp8, **MODES[mode])
    assert psnr(sample(patched), plain) > 15
    assert last_report(patched).count(Kind.FULL) < 12
    after = fp8.model.state_dict()
    assert all(after[key].dtype is value.dtype and torch.equal(after[key].float(), value.float()) for key, value in weights.items())
    assert after["diffusion_model.single_blocks.0.linear1.weight"].dtype is torch.float8_e4m3fn
