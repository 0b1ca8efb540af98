"""Loads ComfyUI into the tests' process, and its demo model."""

from __future__ import annotations

import helpers.on_host  # noqa: F401 - before everything of the host
import pytest
from comfyui_duca.nodes import sidecars
from comfyui_duca.nodes.demo_flux import load_demo_model
from comfyui_duca.nodes.sidecars import fingerprints
from helpers.sampling import linear_sites_of


@pytest.fixture(scope="module")
def network():
    """Returns the demo model's transformer, a new one for every test file."""
    return load_demo_model().model.diffusion_model


@pytest.fixture(scope="module")
def sites(network):
    """Returns its linear layers, as a call with 192 image and 12 text tokens shows them."""
    return linear_sites_of(network, size=(48, 64))


@pytest.fixture(scope="module")
def of_demo():
    return sidecars.fingerprint_of(load_demo_model())


@pytest.fixture
def computed(monkeypatch) -> list:
    """Returns a list that grows with every fingerprint that is computed and not remembered."""
    compute, calls = fingerprints._fingerprint, []
    monkeypatch.setattr(fingerprints, "_fingerprint", lambda weights: calls.append(1) or compute(weights))
    return calls
