"""The pack works on a running ComfyUI server, over HTTP and WebSocket, as a user's page uses it."""

from __future__ import annotations

import copy
import io
import json
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from devtools.driver.client import ComfyClient, PromptError
from devtools.driver.node_inputs import inputs_listed

ROOT = Path(__file__).resolve().parents[2]
DEMO = json.loads((ROOT / "workflows" / "api" / "duca_demo_flux.json").read_text())


def node(prompt: dict, class_type: str) -> str:
    return next(key for key, value in prompt.items() if value["class_type"] == class_type)


def demo(steps=8, seed=1, **cache) -> dict:
    """Returns the shipped prompt with other cache settings."""
    prompt = copy.deepcopy(DEMO)
    prompt[node(prompt, "KSampler")]["inputs"].update(steps=steps, seed=seed)
    prompt[node(prompt, "DuCaCache")]["inputs"].update(cache)
    return prompt


def without_node(prompt: dict) -> dict:
    """Returns the graph as if DuCa Cache had never been there."""
    cache, report = node(prompt, "DuCaCache"), node(prompt, "DuCaCacheReport")
    source = prompt[cache]["inputs"]["model"]
    kept = {k: v for k, v in prompt.items() if k not in (cache, report) and not _uses(v, report)}
    for value in kept.values():
        for name, link in value["inputs"].items():
            if isinstance(link, list) and link[0] == cache:
                value["inputs"][name] = source
    return kept


def _uses(value: dict, key: str) -> bool:
    return any(isinstance(link, list) and link[0] == key for link in value["inputs"].values())


def picture(client: ComfyClient, prompt: dict) -> tuple[np.ndarray, dict]:
    """Returns the decoded image, and the outputs by class of node."""
    outputs = client.run(prompt).outputs
    decoded = node(prompt, "VAEDecode")
    shown = next(key for key, value in prompt.items() if _uses(value, decoded))
    image = Image.open(io.BytesIO(client.image(outputs[shown]["images"][0])))
    return np.asarray(image), {prompt[key]["class_type"]: value for key, value in outputs.items()}


def test_the_nodes_are_there_with_their_inputs_explained(client):
    nodes = client.get("/object_info")
    for name, title in (("DuCaCache", "DuCa Cache"), ("DuCaCacheReport", "Cache Report"), ("DuCaDemoFlux", "Demo FLUX (tiny)")):
        assert nodes[name]["display_name"] == title
        assert nodes[name]["description"]
        for kind in ("required", "optional"):
            for key, spec in nodes[name]["input"].get(kind, {}).items():
                assert len(spec) > 1 and spec[1].get("tooltip"), f"{name}.{key} has no tooltip"
        assert all(nodes[name]["output_tooltips"])


def test_saved_workflows_depend_on_this_order_of_inputs(client):
    """The order is frozen, as saved workflows store widget values by position."""
    assert list(client.get("/object_info/DuCaCache")["DuCaCache"]["input"]["required"]) == [
        "model", "mode", "speedup", "predictor", "cycle_length", "token_share", "warmup", "tail", "start_percent", "end_percent",
        "store_device", "store_dtype", "token_seed", "verbose",
    ]  # fmt: skip


def test_off_is_bit_identical_to_no_node_and_the_cache_is_faster(client):
    plain, _ = picture(client, without_node(demo(steps=20)))
    off, _ = picture(client, demo(steps=20, mode="off"))
    assert np.array_equal(plain, off)
    cached, outputs = picture(client, demo(steps=20, mode="auto", speedup=4.0))
    assert not np.array_equal(plain, cached)
    report = outputs["DuCaCacheReport"]["duca_cache_report"][0]
    assert report["counts"] == {"F": 5, "i": 0, "c": 0, "a": 15}
    assert report["complete"] and report["time_speedup"] > 1.2
    assert "20: 5 full" in outputs["DuCaCacheReport"]["text"][0]
    again, _ = picture(client, demo(steps=20, mode="off", tail=1))  # another input, so that the node runs again
    assert np.array_equal(plain, again)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"speedup": 0.5}, "smaller than min"),
        ({"token_share": 1.5}, "bigger than max"),
        ({"start_percent": 0.8, "end_percent": 0.4}, "start_percent (0.8) lies after end_percent (0.4)"),
        ({"start_percent": -0.5}, "0 to 1"),
        ({"start_percent": "0,5"}, "start_percent must be a number from 0 to 1, not '0,5'"),
        ({"speedup": float("nan")}, "speedup must be a number of at least 1, not nan"),
        ({"calibration": "mine"}, "calibration must be connected to the output of SVD Calibrator or Load Calibration"),
        ({"schedule": 3}, "schedule must be connected to the output of Cache Schedule"),
        ({"mode": "turbo"}, "'turbo'"),  # refused by the host where it knows a combo box's options, else by the pack
    ],
)
def test_wrong_settings_are_refused_before_sampling(client, wrong, message):
    with pytest.raises(PromptError) as refused:
        client.run(demo(**wrong))
    assert message in str(refused.value)
    assert "DuCaCache" in str(refused.value)


def test_the_demo_model_with_custom_sampling_nodes(client):
    """The pack's model is sampled with the host's SamplerCustomAdvanced, a guider and a scheduler."""
    prompt = {
        "1": {"class_type": "DuCaDemoFlux", "inputs": {"prompt": "tiger face", "negative": ""}},
        "2": {"class_type": "DuCaCache", "inputs": {**DEMO[node(DEMO, "DuCaCache")]["inputs"], "model": ["1", 0], "speedup": 3.0}},
        "3": {"class_type": "CFGGuider", "inputs": {"model": ["2", 0], "positive": ["1", 1], "negative": ["1", 2], "cfg": 2.5}},
        "4": {"class_type": "BasicScheduler", "inputs": {"model": ["2", 0], "scheduler": "beta", "steps": 9, "denoise": 1.0}},
        "5": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "dpmpp_2m"}},
        "6": {"class_type": "RandomNoise", "inputs": {"noise_seed": 3}},
        "7": {"class_type": "EmptyChromaRadianceLatentImage", "inputs": {"width": 48, "height": 48, "batch_size": 1}},
        "8": {"class_type": "SamplerCustomAdvanced", "inputs": {
            "noise": ["6", 0], "guider": ["3", 0], "sampler": ["5", 0], "sigmas": ["4", 0], "latent_image": ["7", 0]}},
        "9": {"class_type": "DuCaCacheReport", "inputs": {"samples": ["8", 0], "model": ["2", 0]}},
    }  # fmt: skip
    report = client.run(prompt).outputs["9"]["duca_cache_report"][0]
    assert report["complete"] and report["counts"]["F"] == 3 and len(report["evaluations"]) == 9


def test_the_pack_loads_cleanly_and_its_script_is_served(server, client):
    script = next(path for path in client.get("/extensions") if path.endswith("duca_notices.js"))
    with urllib.request.urlopen(server.url + script) as answer:
        assert b"duca_cache.notice" in answer.read()
    log = server.log.read_text(errors="replace")
    loaded = [line for line in log.splitlines() if line.rstrip().endswith("ComfyUI-DuCa") and "seconds" in line]
    assert loaded and "FAILED" not in loaded[0]
    assert "Error while calling comfy_entrypoint" not in log


def test_the_shipped_workflows_are_offered_as_templates(client):
    templates = client.get("/workflow_templates")
    assert sorted(templates["ComfyUI-DuCa"]) == sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))


@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("*.json")), ids=lambda p: p.stem)
def test_a_shipped_workflow_fits_the_servers_nodes(client, path):
    """Every node type exists, every link joins an output and an input of its type, and every widget value is valid."""
    workflow, nodes = json.loads(path.read_text()), client.get("/object_info")
    by_id = {n["id"]: n for n in workflow["nodes"]}
    for number, source, source_slot, target, target_slot, kind in workflow["links"]:
        output, socket = by_id[source]["outputs"][source_slot], by_id[target]["inputs"][target_slot]
        assert number in output["links"] and socket["link"] == number
        assert kind == output["type"] and socket["type"] in (kind, "*")
        assert nodes[by_id[source]["type"]]["output"][source_slot] == kind
    for n in workflow["nodes"]:
        if n["type"] in ("Note", "MarkdownNote"):
            continue
        spec = nodes[n["type"]]["input"]
        listed = inputs_listed({**spec.get("required", {}), **spec.get("optional", {})})
        check_widgets(n, [given for given in listed if given[1] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")])


def check_widgets(n: dict, widgets: list[tuple[str, str, dict]]) -> None:
    """Asserts that widget values are in the order of the inputs. A seed that the page randomises is followed by its control.

    The host's own nodes may end with widgets that are newer than the workflow. The page gives those their defaults.
    """
    values = list(n.get("widgets_values") or ())
    for name, kind, options in widgets:
        where = f"{n['type']}.{name}"
        if not values:
            assert not n["type"].startswith("DuCa") and "default" in options, where
            continue
        value, allowed = values.pop(0), options.get("options")
        if allowed is not None:
            is_file = str(value).endswith((".safetensors", ".sft", ".pt", ".png"))  # a file of the user's, which this machine does not have
            assert value in allowed or is_file, where
        elif kind in ("INT", "FLOAT"):
            assert options.get("min", value) <= value <= options.get("max", value), where
        if options.get("control_after_generate"):
            assert values.pop(0) in ("fixed", "randomize", "increment", "decrement"), where
        if options.get("image_upload"):
            assert values.pop(0) == "image", where
    assert not values, f"{n['type']} has widget values left over: {values}"
