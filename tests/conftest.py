"""Loads the real ComfyUI and this pack (as `comfyui_duca`) once for all tests."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from devtools.driver.inprocess import load_comfyui, load_pack

load_comfyui()
load_pack()

import comfyui_version
import hypothesis
import pytest
import torch
from comfyui_duca.nodes import sidecars
from comfyui_duca.nodes.demo_flux import load_demo_model
from comfyui_duca.nodes.sidecars import fingerprints
from host import linear_sites_of

from devtools.driver.client import ComfyClient
from devtools.driver.server import ComfyServer
from devtools.environment import host_setup

hypothesis.settings.register_profile("no deadline", deadline=None)  # a busy machine is no defect
hypothesis.settings.load_profile("no deadline")


@pytest.hookimpl(trylast=True)  # below everything else
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says at the end why tests were skipped, and on which host all this was."""
    for reason, count in Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])).most_common():
        terminalreporter.write_line(f"{count} {reason.replace('Skipped', 'skipped', 1)}")
    source = "the pinned source" if host_setup.given_comfyui() is None else "COMFYUI_PATH"
    terminalreporter.write_line(f"on ComfyUI {comfyui_version.__version__} ({source}), torch {torch.__version__}")


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A base directory for servers, with this pack in it and nothing else."""
    folder = tmp_path_factory.mktemp("host") / "base"
    host_setup.link_pack(folder)
    return folder


@pytest.fixture(scope="module")
def server(base):
    """A ComfyUI of its own for every test file that asks for it."""
    with ComfyServer(sys.executable, os.environ["COMFYUI_PATH"], base) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return ComfyClient(server.url)


@pytest.fixture(scope="module")
def network():
    """The demo model's transformer, a fresh one for every test file."""
    return load_demo_model().model.diffusion_model


@pytest.fixture(scope="module")
def sites(network):
    """Its linear layers, as a call of 192 image and 12 text tokens shows them."""
    return linear_sites_of(network, size=(48, 64))


@pytest.fixture(scope="module")
def of_demo():
    return sidecars.fingerprint_of(load_demo_model())


@pytest.fixture
def computed(monkeypatch) -> list:
    """Grows with every fingerprint that is computed and not remembered."""
    compute, calls = fingerprints._fingerprint, []
    monkeypatch.setattr(fingerprints, "_fingerprint", lambda weights: calls.append(1) or compute(weights))
    return calls
