"""Handles ComfyUI's page as its user does, for the tests of this directory."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, ConsoleMessage, Locator, Page, expect

expect.set_options(timeout=20_000)  # as long as for actions: for slow machines
ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / ".dev" / "screenshots"
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
DEMO = json.loads((ROOT / "workflows" / "duca_demo_flux.json").read_text())

_READY = """() => window.app?.extensionManager && app.canvas && app.graph?.nodes.length && !document.querySelector('.p-blockui-mask')"""
_RECORD = """() => {
  window.seen = [];
  for (const type of ["execution_start", "progress", "execution_success", "execution_error", "execution_interrupted",
                      "duca_cache.run", "duca_cache.notice"])
    app.api.addEventListener(type, ({ detail }) => window.seen.push({ type, detail }));
}"""
_SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.RightSidePanel.IsOpen": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.ColorPalette": "dark",
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
# ComfyUI's page itself writes these to the console on a server without internet; newer pages also ask for what 0.3.75 does not have.
_NOISE = (
    "at onChange",
    "JobsApiError",
    "ComfyApp graph accessed before initialization",  # 1.49 at its start, of app.rootGraph, which the pack never reads
    "Attempted to cleanup event listeners for graph that was never set up",  # 1.32 where a subgraph is entered
)
_AROUND = 20  # pixels around what is shown
_seeds = itertools.count(1000)


@dataclass(frozen=True)
class Variant:
    """A kind of page.

    Args:
        version: "own", the one that the host requires, or "newest".
        renderer: "classic" draws nodes on a canvas, "vue" as HTML.
    """

    version: str = "own"
    renderer: str = "classic"

    def __str__(self) -> str:
        return f"{self.version}-{self.renderer}"


def on_pages(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("comfy", [Variant(*name.split("-")) for name in names], indirect=True, ids=str)


everywhere = on_pages("own-classic", "own-vue", "newest-classic", "newest-vue")
both_renderers = on_pages("own-classic", "own-vue")
classic = on_pages("own-classic", "newest-classic")


class ComfyPage:
    """One tab. `problems` has the console errors and exceptions so far, without the host's own noise."""

    def __init__(self, page: Page) -> None:
        self.page, self.problems = page, []
        page.set_default_timeout(20_000)
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.problems.append(f"exception: {error.stack or error.message}"))

    @classmethod
    def opened(cls, context: BrowserContext, variant: Variant) -> ComfyPage:
        """Opens the page as somebody sees it who has used ComfyUI before and left no workflow open."""
        context.request.post("/settings", data={**_SETTINGS, "Comfy.VueNodes.Enabled": variant.renderer == "vue"})
        page = context.new_page()
        page.goto("/system_stats")  # any page of this origin gives access to its storage
        page.evaluate("() => { localStorage.clear(); localStorage.vueNodesBannerDismissed = 'true'; }")
        comfy = cls(page)
        comfy.visit()
        return comfy

    def another_tab(self) -> ComfyPage:
        tab = ComfyPage(self.page.context.new_page())
        tab.problems = self.problems
        tab.visit()
        return tab

    def visit(self) -> None:
        self.page.goto("/", wait_until="commit")
        self.wait_until_ready()

    def reload(self) -> None:
        self.page.reload(wait_until="commit")
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        self.page.wait_for_function(_READY, timeout=90_000)
        self.page.evaluate(_RECORD)

    def _on_console(self, message: ConsoleMessage) -> None:
        where = message.location.get("url", "")
        is_ours = "duca" in f"{where} {message.text}".lower() and "api.comfy.org" not in where
        is_noise = message.text.startswith("Failed to load resource") or any(part in message.text for part in _NOISE)
        if message.type == "error" and (is_ours or not is_noise):
            self.problems.append(f"console: {message.text} ({where})")

    # --- workflows and widgets

    def load(self, workflow: dict[str, Any], name: str = "duca_demo_flux") -> None:
        self.page.evaluate("([workflow, name]) => app.loadGraphData(workflow, true, true, name)", [workflow, name])
        self.page.wait_for_function("count => app.graph.nodes.length === count", arg=len(workflow["nodes"]))

    def ids(self, node_type: str) -> list[str]:
        """Returns ids of nodes by type, in the graph on the screen. It may be a subgraph. So it is for every method that takes a type."""
        return self.page.evaluate(
            "type => app.canvas.graph.nodes.filter(node => node.type === type).map(node => String(node.id))", node_type
        )

    def widget(self, node_type: str, name: str) -> Any:
        return self.page.evaluate(f"([type, name]) => {_WIDGET}.value", [node_type, name])

    def set_widget(self, node_type: str, name: str, value: Any) -> None:
        """Sets a widget as the page's own editors do."""
        change = f"([type, name, value]) => {{ const w = {_WIDGET}; w.value = value; w.callback?.(value, app.canvas, {_NODE}); }}"
        self.page.evaluate(change, [node_type, name, value])
        self.page.evaluate("() => app.extensionManager.workflow.activeWorkflow?.changeTracker?.checkState()")

    def select(self, *node_types: str) -> None:
        self.page.evaluate(_SELECT, node_types)

    def command(self, name: str) -> None:
        """Carries out a command of a menu or a key, by the page's name for it."""
        self.page.evaluate("name => app.extensionManager.command.execute(name)", name)

    def node_size(self, node_type: str) -> list[float]:
        return self.page.evaluate(f"type => [...{_NODE}.size]", node_type)

    def drag_slider(self, node_type: str, name: str, start: float, end: float) -> None:
        """Drags a slider between two places, as shares of its length."""
        track = self.page.locator(f"[data-node-id='{self.ids(node_type)[0]}'] [aria-label={name}] [data-slot=slider-track]")
        if self.page.evaluate("() => LiteGraph.vueNodesMode"):
            box = track.bounding_box()
            left, width, y = box["x"], box["width"], box["y"] + box["height"] / 2
        else:
            left, width, y = self.page.evaluate(_SLIDER_PLACE, [node_type, name])
        mouse = self.page.mouse
        mouse.move(left + start * width, y)
        mouse.down()
        mouse.move(left + end * width, y, steps=5)
        mouse.up()

    def saved(self) -> dict[str, Any]:
        """Returns the graph as the page would save it."""
        return self.page.evaluate("() => app.graph.serialize()")

    # --- runs

    def queue(self, **sampler: Any) -> None:
        """Runs the workflow with another seed, so that the server has nothing of it in its cache."""
        self.new_seed()
        for name, value in sampler.items():
            self.set_widget("KSampler", name, value)
        self.run()

    def new_seed(self) -> None:
        """Sets another seed before the sampler goes into a subgraph: newer pages then have the seed outside."""
        self.set_widget("KSampler", "seed", next(_seeds))

    def run(self) -> None:
        self.page.evaluate("() => { window.seen.length = 0; }")
        self.page.get_by_test_id("queue-button").first.click()

    def wait_for(self, *types: str) -> None:
        """Waits until the page got one of these events since the last run was queued."""
        self.page.wait_for_function("types => window.seen.some(event => types.includes(event.type))", arg=list(types), timeout=120_000)

    def wait_for_end(self) -> None:
        self.wait_for("execution_success", "execution_error", "execution_interrupted")
        assert "execution_success" in [event["type"] for event in self.events()], self.events()

    def events(self) -> list[dict[str, Any]]:
        return self.page.evaluate("() => window.seen")

    # --- what is on the screen

    def complaints(self) -> list[str]:
        """Returns the texts of dialogs, toasts and error bars."""
        shown = self.page.locator(".p-dialog, .p-toast-message, [role=dialog], [data-testid=error-overlay]")
        return [text for text in shown.all_inner_texts() if text.strip()]

    def duca_strip(self, node_type: str = "DuCaCache") -> Locator:
        return self.page.locator(f".duca-strip[data-node-id='{self.ids(node_type)[0]}']")

    def wait_for_images(self, *node_types: str) -> None:
        """Waits until these nodes show the pictures of a run."""
        self.page.wait_for_function(_IMAGES_SHOWN, arg=node_types)

    def forgive(self, words: str) -> None:
        """Removes console errors with these words, which the test provoked."""
        self.problems[:] = [problem for problem in self.problems if words not in problem]

    def show(self, *node_types: str) -> tuple[float, float, float, float]:
        """Brings nodes of these types, or all nodes and groups, into view as large as possible.

        Returns:
            Their place on the screen with a margin: left, top, width and height.
        """
        return tuple(self.page.evaluate(_SHOW, [node_types, _AROUND]))

    def corner(self, node_type: str) -> tuple[float, float]:
        """Brings the node into view. Returns where its lower right corner is on the screen."""
        if not self.page.evaluate("() => LiteGraph.vueNodesMode"):
            left, top, width, height = self.show(node_type)
            return left + width - _AROUND, top + height - _AROUND
        self.show()  # not the node alone: its element may be taller than the graph knows
        node = self.page.locator(f"[data-node-id='{self.ids(node_type)[0]}']:not(.duca-strip)").first
        box = node.bounding_box()
        return box["x"] + box["width"], box["y"] + box["height"]

    def picture(self, name: str, place: tuple[float, float, float, float] | None = None) -> None:
        """Saves a picture as .dev/screenshots/NAME.png. `place` is left, top, width and height; without it, the whole page."""
        clip = dict(zip(("x", "y", "width", "height"), place)) if place else None
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", clip=clip)


_NODE = "app.canvas.graph.nodes.find(node => node.type === type)"
_WIDGET = f"{_NODE}.widgets.find(widget => widget.name === name)"
_SELECT = """types => {
  app.canvas.selectItems(app.canvas.graph.nodes.filter(node => types.includes(node.type)));
}"""
_IMAGES_SHOWN = """types => app.graph.nodes.filter(node => types.includes(node.type)).every(node => {
  const shown = LiteGraph.vueNodesMode ? document.querySelector(`[data-node-id="${node.id}"] img`) : node.imgs?.[0];
  return shown?.complete && shown.naturalWidth;
})"""
_SHOW = """async ([types, around]) => {
  const { canvas } = app, { graph } = canvas, chosen = graph.nodes.filter(node => !types.length || types.includes(node.type));
  const boxes = [...chosen.map(node => [node.pos[0], node.pos[1] - 30, node.size[0], node.size[1] + 30]),
                 ...(types.length ? [] : graph.groups).map(group => [...group.pos, ...group.size])];
  const least = index => Math.min(...boxes.map(box => box[index]));
  const most = index => Math.max(...boxes.map(box => box[index] + box[index + 2]));
  const [x, y, width, height] = [least(0), least(1), most(0) - least(0), most(1) - least(1)];
  const [left, top, wide, high] = [80, 90, innerWidth - 100, innerHeight - 110], scale = Math.min(wide / width, high / height, 2.5);
  Object.assign(canvas.ds, { scale });
  canvas.ds.offset[0] = (left + (wide - width * scale) / 2) / scale - x;
  canvas.ds.offset[1] = (top + (high - height * scale) / 2) / scale - y;
  canvas.setDirty(true, true);
  for (let frame = 0; frame < 10; frame++) await new Promise(requestAnimationFrame);
  return [(x + canvas.ds.offset[0]) * scale - around, (y + canvas.ds.offset[1]) * scale - around,
          width * scale + 2 * around, height * scale + 2 * around];
}"""
_SLIDER_PLACE = f"""([type, name]) => {{
  const node = {_NODE}, {{ ds }} = app.canvas, margin = 15;
  const [x, y] = ds.convertOffsetToCanvas([node.pos[0] + margin, node.pos[1] + {_WIDGET}.last_y + 10]);
  return [x, (node.size[0] - 2 * margin) * ds.scale, y];
}}"""
