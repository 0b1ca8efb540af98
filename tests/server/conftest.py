"""Starts a ComfyUI server for every test file that asks for one, in another process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import helpers.on_host  # noqa: F401 - answers are compared with what the nodes say in this process
import pytest

from devtools.driver.client import ComfyClient
from devtools.driver.server import ComfyServer
from devtools.environment import host_setup


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """Returns a base directory for servers, which has this pack and nothing else."""
    folder = tmp_path_factory.mktemp("host") / "base"
    host_setup.link_pack(folder)
    return folder


@pytest.fixture(scope="module")
def server(base):
    with ComfyServer(sys.executable, os.environ["COMFYUI_PATH"], base) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return ComfyClient(server.url)
