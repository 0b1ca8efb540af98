"""Calibrations are made, found and used on a running ComfyUI, with the shipped workflow."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from comfyui_duca.cache_core.calibration.sidecar import peek
from comfyui_duca.nodes import sidecars
from helpers.calibrator_calls import PROMPTS, SHIPPED, made_file
from helpers.watching import watch
from PIL import Image

from devtools.driver.client import ComfyClient, PromptError
from devtools.driver.server import ComfyServer


@pytest.fixture(scope="module")
def served(base, tmp_path_factory) -> Iterator[tuple[ComfyClient, Path, ComfyServer]]:
    """Starts a server with a folder of its own for calibrations, configured as a user does it."""
    own = tmp_path_factory.mktemp("server")
    folder = own / "calibrations"
    (own / "paths.yaml").write_text(f"tests:\n  {sidecars.FOLDER}: {folder}\n", encoding="utf-8")
    with ComfyServer(
        sys.executable, os.environ["COMFYUI_PATH"], base, own / "server.log",
        arguments=("--extra-model-paths-config", str(own / "paths.yaml")),
    ) as running:  # fmt: skip
        yield ComfyClient(running.url), folder, running


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> bytes:
    """A calibration's file, with both sections."""
    return made_file(tmp_path_factory.mktemp("made"))


@pytest.fixture
def empty(served) -> Path:
    """Returns the server's folder for calibrations, emptied."""
    folder = served[1]
    for path in folder.glob("*"):
        path.unlink()
    return folder


def graph(cache: dict | None = None, **calibrate) -> dict:
    """Returns the shipped prompt, made short."""
    prompt = copy.deepcopy(SHIPPED)
    by_class = {value["class_type"]: value["inputs"] for value in prompt.values()}
    by_class["DuCaPromptList"]["prompts"] = "\n".join(PROMPTS)
    by_class["EmptyChromaRadianceLatentImage"].update(width=16, height=16)
    by_class["DuCaSVDCalibrator"].update({"steps": 6, "rank": 8, **calibrate})
    by_class["KSampler"].update(steps=6)
    by_class["DuCaCache"].update({"speedup": 2.0, **(cache or {})})
    return prompt


def key(class_type: str) -> str:
    return next(key for key, value in SHIPPED.items() if value["class_type"] == class_type)


def watched(client: ComfyClient, prompt: dict, interrupt_at: str | None = None) -> tuple[list[str], list[dict], float]:
    """Returns texts under the calibrator, all messages, and the seconds from the interrupt to the end."""
    return watch(client.url, prompt, key("DuCaSVDCalibrator"), interrupt_at)


def setting_of(outputs: dict) -> str:
    return outputs[key("DuCaCacheReport")]["duca_cache_report"][0]["setting"]


def test_the_shipped_graph_on_the_server(served, empty):
    client, _, server = served
    started = len(server.log_tail(10**6))
    texts, messages, _ = watched(client, graph())
    assert messages[-1]["type"] == "execution_success", messages[-1]
    for stage in ("recording", "measuring sensitivity", "trying out"):
        assert any(text.startswith(stage) for text in texts), stage
    progress = [m["data"] for m in messages if m["type"] == "progress" and m["data"]["node"] == key("DuCaSVDCalibrator")]
    assert progress and [m["value"] for m in progress] == sorted(m["value"] for m in progress)
    (path,) = empty.iterdir()
    assert texts[-1] == f"saved as {path.name}"
    (loader,) = client.get("/object_info/DuCaLoadCalibration").values()
    assert path.name in loader["input"]["required"]["calibration_name"][1]["options"]
    written = path.stat().st_mtime_ns

    again = client.run(graph())
    assert key("DuCaSVDCalibrator") not in again.seconds and path.stat().st_mtime_ns == written, "remembered by the host"
    shown = again.outputs[key("DuCaSVDCalibrator")]
    assert shown["text"][0].startswith("calibrated  flux") and str(path) in shown["text"][0]
    assert client.image(shown["images"][0])[:4] == b"\x89PNG"
    assert setting_of(again.outputs).startswith("auto 2x, calibrated")

    found = client.run(graph(first_seed=7))
    assert key("DuCaSVDCalibrator") in found.seconds and path.stat().st_mtime_ns == written
    assert found.outputs[key("DuCaSVDCalibrator")]["text"][0].startswith("calibration  flux")

    anew = client.run(graph(recalibrate=True, steps=4))
    assert path.stat().st_mtime_ns != written and list(empty.iterdir()) == [path] and peek(path).about.steps == 4
    assert anew.outputs[key("DuCaSVDCalibrator")]["text"][0].startswith("calibrated")

    both = client.run(graph(what="ICC", icc_method="svd", cache={"mode": "icc", "speedup": 1.2}))
    assert set(peek(path).tensors) == {"forecast", "icc"} and list(empty.iterdir()) == [path]
    assert "ICC svd rank 8" in setting_of(both.outputs)
    assert "Traceback" not in server.log_tail(10**6)[started:]


def without_calibrator(**cache) -> dict:
    """Returns the part of the shipped graph that draws, with DuCa Cache and no calibrator."""
    prompt = graph(cache=cache)
    prompt[key("DuCaCache")]["inputs"].pop("calibration")
    wanted = [key("DuCaCacheReport"), key("PreviewImage")]
    for node in wanted:  # the list grows
        wanted += [link[0] for link in prompt[node]["inputs"].values() if isinstance(link, list)]
    return {node: prompt[node] for node in wanted}


def test_an_interrupt_on_the_server(served, empty):
    client = served[0]

    def picture(tail: int) -> bytes:
        outputs = client.run(without_calibrator(mode="off", tail=tail)).outputs  # tail: only makes it run again
        with Image.open(BytesIO(client.image(outputs[key("PreviewImage")]["images"][0]))) as image:
            return image.tobytes()

    before = picture(0)
    prompt = graph(recalibrate=True)
    prompt[key("DuCaSVDCalibrator")]["inputs"]["model"] = prompt[key("DuCaCache")]["inputs"]["model"]  # the model that draws
    for stage in ("recording", "measuring", "trying out 3"):
        _, messages, seconds = watched(client, prompt, stage)
        assert messages[-1]["type"] == "execution_interrupted" and seconds < 5
        assert not list(empty.glob("*")) and not list(empty.glob(".*"))
    assert picture(1) == before


def test_duca_cache_finds_it_on_the_server(served, empty, made):
    client = served[0]
    assert setting_of(client.run(without_calibrator()).outputs) == "auto 2x"
    empty.mkdir(exist_ok=True)
    (empty / "made.safetensors").write_bytes(made)
    other = without_calibrator()
    other[key("KSampler")]["inputs"]["seed"] += 1  # another seed, so that it samples again
    assert setting_of(client.run(other).outputs).startswith("auto 2x, calibrated")


def test_the_same_graph_samples_anew_after_a_file_was_dropped_in(served, empty, made):
    client = served[0]
    empty.mkdir(exist_ok=True)
    prompt = without_calibrator(speedup=2.1)  # a speed that no other test uses, so that the server has no result in its cache

    def run() -> tuple[bool, str]:
        """Runs the prompt. Returns whether it sampled, and with which setting."""
        done = client.run(copy.deepcopy(prompt))
        return key("KSampler") in done.seconds, setting_of(done.outputs).partition(":")[0]  # after the colon: what the calibration did

    assert [run(), run()] == [(True, "auto 2.1x"), (False, "auto 2.1x")]
    (empty / "made.safetensors").write_bytes(made)
    assert [run(), run()] == [(True, "auto 2.1x, calibrated"), (False, "auto 2.1x, calibrated")]
    (empty / "made.safetensors").unlink()
    assert run() == (True, "auto 2.1x")


def test_errors_on_the_server_name_the_node_and_the_remedy(served, empty):
    client = served[0]
    prompt = graph()
    prompt[key("DuCaPromptList")]["inputs"]["prompts"] = " \n"
    for wrong, words in (
        (prompt, "write at least one prompt"),
        (graph(steps=2), "smaller than min"),
        (graph(what="all", recalibrate=True), "all"),
        (graph(icc_method="pca", recalibrate=True), "pca"),
        (graph(cache={"mode": "icc"}), "needs low-rank factors of this model: run SVD Calibrator"),
    ):
        with pytest.raises(PromptError) as refused:
            client.run(wrong)
        assert words in str(refused.value)
    for path in empty.glob("*"):
        path.unlink()
    empty.rmdir()
    empty.write_text("a file where the folder should be")
    try:
        with pytest.raises(PromptError, match=r"DuCaSVDCalibrator.*the folder cannot be made.*configure another"):
            client.run(graph(recalibrate=True, steps=4))
    finally:
        empty.unlink()
