"""dev.py says what to do if the set-up cannot work, and gives every ComfyUI an environment of its own."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from devtools.environment import host_setup

ROOT = Path(__file__).resolve().parents[2]


def dev(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "dev.py"), *arguments], capture_output=True, text=True, env=os.environ | environment)


def test_without_a_command_it_explains_itself():
    done = dev()
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("demo", "test", "bench", "lint", "host", "COMFYUI_PATH"))
    assert dev("dance").returncode == 2


def test_a_wrong_comfyui_path_is_named(tmp_path):
    done = dev("host", COMFYUI_PATH=str(tmp_path))
    assert done.returncode == 1
    assert str(tmp_path) in done.stderr and "not a ComfyUI folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_old_python_is_told_apart(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1, "final", 0))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "dev.py"), run_name="__main__")
    assert "needs Python 3.10 or newer" in str(stopped.value)


def test_a_failed_download_says_what_to_do(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'ERROR: no network' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(host_setup.SetupError) as failed:
        host_setup._fetch_comfyui(host_setup.Host(broken, tmp_path / "comfyui", tmp_path / "base"))
    assert "Check the network and try again" in str(failed.value) and "no network" in str(failed.value)
    assert not (tmp_path / "comfyui").exists()


def test_the_pack_is_linked_into_custom_nodes(tmp_path):
    for _ in range(2):  # the second call finds the link
        host_setup.link_pack(tmp_path)
        assert (tmp_path / "custom_nodes" / host_setup.PACK_NAME).resolve() == ROOT


def comfyui(folder: Path) -> Path:
    """Makes a folder that passes for ComfyUI's source."""
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    return folder


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Returns a function that gives the source for a value of COMFYUI_PATH, in a checkout that has the pinned one at `.dev`."""
    monkeypatch.setattr(host_setup, "DEV", tmp_path / ".dev")
    comfyui(tmp_path / ".dev" / "comfyui")

    def asked(value: Any) -> Path | None:
        monkeypatch.setenv("COMFYUI_PATH", str(value))
        return host_setup.given_comfyui()

    return asked


def test_the_pinned_source_named_explicitly_is_still_the_pinned_one(tmp_path, given):
    linked = tmp_path / "linked"
    linked.symlink_to(host_setup.DEV, target_is_directory=True)
    assert [given(value) for value in ("", host_setup.DEV / "comfyui", linked / "comfyui")] == [None] * 3
    assert host_setup.home_of(None) == host_setup.DEV


def test_every_other_source_has_one_home_of_its_own(tmp_path, given, monkeypatch):
    first, second = comfyui(tmp_path / "first"), comfyui(tmp_path / "zweite mit Größe")
    monkeypatch.chdir(tmp_path)
    assert given(first) == given("first") == given(tmp_path / "second" / ".." / "first") == first
    homes = [host_setup.home_of(given(path)) for path in (first, "first", second)]
    assert homes[0] == homes[1] != homes[2] and {home.parent for home in homes} == {host_setup.DEV / "hosts"}


def test_changing_between_hosts_installs_nothing_anew(tmp_path, given, monkeypatch):
    installed = []

    def make(python: Path) -> None:
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()

    monkeypatch.setattr(host_setup, "_make_environment", make)
    monkeypatch.setattr(host_setup, "_install", lambda host, *_, constrained: installed.append((host, constrained)))
    other, hosts = comfyui(tmp_path / "other"), []
    for value in ("", other) * 2:
        given(value)
        hosts.append(host_setup.ensure_host())
    assert hosts[:2] == hosts[2:] and installed == [(hosts[0], True), (hosts[1], False)]
    assert [host.comfyui for host in hosts[:2]] == [host_setup.DEV / "comfyui", other]
    for host in hosts:
        assert (host.base / "custom_nodes" / host_setup.PACK_NAME).resolve() == ROOT and host.base.parent in host.python.parents
    (other / "requirements.txt").write_text("something-newer")
    assert host_setup.ensure_host() == hosts[1] and len(installed) == 3


@pytest.mark.parametrize("fits", [True, False])
def test_torchaudio_goes_without_its_library_only_where_that_does_not_fit(tmp_path, fits):
    libraries = tmp_path / "torchaudio" / "lib"
    libraries.mkdir(parents=True)
    for name in ("__init__.py", "_torchaudio.abi3.so", "libtorchaudio.abi3.so"):
        (libraries / name).touch()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$2" = "import torchaudio" ] && exit {int(not fits)}\necho "{libraries.parent}"\n')
    python.chmod(0o755)
    host_setup._use_torchaudio_without_its_library(host_setup.Host(python, tmp_path, tmp_path))
    assert len(list(libraries.iterdir())) == (3 if fits else 1) and (libraries / "__init__.py").exists()
