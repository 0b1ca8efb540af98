"""Starts one browser, and one server for each version of ComfyUI's page, for the whole directory; and a new page for every test.

A test takes the fixture `comfy` and says with `everywhere` or `on_page` (comfy_page.py) in which pages it runs.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, sync_playwright

from devtools.driver import browser
from devtools.driver.server import ComfyServer
from devtools.environment import host_setup

from .comfy_page import WORKFLOWS, ComfyPage, Variant

DEV = host_setup.DEV
_FILE = re.compile(r"`(\w+/[\w.-]+\.(?:safetensors|pt))`")  # how the notes of the shipped workflows name the files that they need
_OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"  # requests of the page to the internet fail at once


def unavailable(reason: str) -> None:
    """Skips the test; on a CI machine, where nobody reads of skips, fails it."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    path = browser.chromium()
    if path is None:
        unavailable("no Chromium here (on Debian: apt-get install chromium)")
    arguments = ["--disable-gpu", _OFFLINE]
    if getattr(os, "geteuid", lambda: 1)() == 0:
        arguments.append("--no-sandbox")  # Chromium refuses to be root with it
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=arguments)
        yield launched
        launched.close()


@pytest.fixture(scope="package")
def contexts(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], BrowserContext]]:
    """Returns a function that gives, for a version of the page, a browser profile on a server that starts with its first use.

    The profile's cache makes later pages quick.
    """
    with ExitStack() as stack:
        made: dict[str, BrowserContext] = {}

        def context(version: str) -> BrowserContext:
            if version not in made:
                server = stack.enter_context(_server(version, tmp_path_factory.mktemp(version)))
                made[version] = chromium.new_context(base_url=server.url, viewport={"width": 1600, "height": 1000}, color_scheme="dark")
                stack.callback(made[version].close)
            return made[version]

        yield context


def _server(version: str, folder: Path) -> ComfyServer:
    base = folder / "base"
    host_setup.link_pack(base)
    for name in {name for path in WORKFLOWS for name in _FILE.findall(path.read_text())}:
        _put(base / "models" / name)  # empty: without the file, the page would say that a model is missing
    _put(base / "input" / "example.png", (Path(os.environ["COMFYUI_PATH"]) / "input" / "example.png").read_bytes())
    arguments: tuple[str, ...] = ()
    if version == "newest":
        try:
            arguments = ("--front-end-root", str(browser.newest_page(sys.executable, DEV / "newest-page")))
        except OSError as problem:
            unavailable(str(problem))
    return ComfyServer(sys.executable, os.environ["COMFYUI_PATH"], base, arguments=arguments)


def _put(file: Path, content: bytes = b"") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


@pytest.fixture
def comfy(request: pytest.FixtureRequest, contexts: Callable[[str], BrowserContext]) -> Iterator[ComfyPage]:
    """Opens the page with ComfyUI's first workflow. Saves a picture of how the test left it; console errors fail the test."""
    variant: Variant = getattr(request, "param", Variant())
    context = contexts(variant.version)
    page = ComfyPage.opened(context, variant)
    yield page
    page.picture(re.sub(r"[^\w.-]+", "_", request.node.name).strip("_"))
    for opened in context.pages:
        opened.close()
    assert not page.problems, "\n".join(page.problems)
