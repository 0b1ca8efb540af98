"""The page's request for a plan is refused in words if it would take minutes or names files of the machine. Needs no server."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace

import folder_paths
import pytest
from comfyui_duca.cache_core.calibration.sidecar import write
from comfyui_duca.nodes import sidecars
from comfyui_duca.nodes.page import routes
from comfyui_duca.nodes.page.plan_preview import preview
from helpers.sidecars import sidecar


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setitem(folder_paths.folder_names_and_paths, sidecars.FOLDER, ([str(tmp_path)], {".safetensors"}))
    return tmp_path


def answer(body: bytes) -> tuple[int, dict]:
    """Returns the route's answer to a body that comes in an unknown number of pieces and states no length."""

    async def pieces():
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    said = asyncio.run(routes.plan(SimpleNamespace(content=SimpleNamespace(iter_any=pieces), content_length=None)))
    return said.status, json.loads(said.text)


def refused(folder: Path, name: str) -> str:
    status, said = answer(json.dumps({"cache": {"mode": "auto"}, "calibration": name}).encode())
    assert status == 400 and name in said["error"] and str(folder) not in said["error"]
    return said["error"]


def test_a_link_that_leads_nowhere(folder):
    (folder / "link.safetensors").symlink_to(folder / "nowhere.safetensors")
    assert "link to a file that is not there" in refused(folder, "link.safetensors")


def test_files_that_cannot_be_used(folder):
    (folder / "empty.safetensors").touch()
    (folder / "cut.safetensors").touch()
    write(folder / "cut.safetensors", sidecar())
    (folder / "cut.safetensors").write_bytes((folder / "cut.safetensors").read_bytes()[:-9])
    for name in ("empty.safetensors", "cut.safetensors"):
        assert "damaged" in refused(folder, name)


def test_an_error_of_our_own_tells_no_more_than_that(monkeypatch):
    def fails(_body):
        raise RuntimeError("in /home/somebody/secret.py")

    monkeypatch.setattr(routes, "preview", fails)
    status, said = answer(b"{}")
    assert status == 500 and "secret" not in json.dumps(said) and "log" in said["error"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 10_000, 400),
        (b"[" * 10_000 + b"]" * 10_000, 400),
        (b"\xff\xfe", 400),
        (b'{"cache": {"speedup": NaN}}', 400),
        (b'{"cache": {"speedup": 1e999}}', 400),
        (json.dumps({"schedule": {"kind": "custom text", "text": "(" * 5000 + "F" + ")" * 5000}}).encode(), 400),
        (json.dumps({"schedule": {"kind": "custom text", "text": "9999F " * 9000}}).encode(), 400),
        (b'{"x": "' + b"x" * 65_000 + b'"}', 200),
        (b'{"x": "' + b"x" * 66_000 + b'"}', 413),
    ],
    ids=["brackets", "nested", "no text", "NaN", "infinity", "brackets in a schedule", "a long schedule", "within", "too long"],
)
def test_what_a_body_may_be(body, status):
    began = time.perf_counter()
    got, said = answer(body)
    assert got == status and (got == 200 or said["error"]) and len(json.dumps(said)) < 5000
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("denoise", [1e-5, 5e-324, float("nan"), float("inf"), -0.5, "0,5", True, [1]], ids=str)
def test_a_denoise_that_no_sampler_takes(denoise):
    with pytest.raises(ValueError, match="denoise"):
        preview({"sampling": {"steps": 1000, "denoise": denoise}})


@pytest.mark.parametrize("denoise", [None, 0, 0.1, 0.5, 1, 1.5])
def test_a_denoise_that_one_may(denoise):
    assert preview({"sampling": {"steps": 1000, "denoise": denoise}})["steps"] == 1000
