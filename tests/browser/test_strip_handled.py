"""The strip stays right when its node is moved into a subgraph, folded, resized, collapsed, copied or undone."""

from __future__ import annotations

import pytest
from playwright.sync_api import Locator, expect

from .comfy_page import DEMO, ComfyPage, classic, everywhere

STEPS = 28  # of the demo workflow; without a sampler the strip assumes as many
_ENTER = "() => { const node = app.graph.nodes.find(node => node.subgraph); app.canvas.openSubgraph(node.subgraph, node); }"
_LEAVE = "() => app.canvas.setGraph(app.graph)"
_SPOIL = """type => void Object.defineProperty(app.graph.nodes.find(node => node.type === type), "comfyClass", {
  get() { if (new Error().stack.includes("duca_graph")) throw new Error("spoiled for the test"); return type; },
})"""
_ADD_BY_ITSELF = """type => {
  const node = LiteGraph.createNode(type);
  node.pos = [0, -900];
  app.graph.add(node);
  return String(node.id);
}"""
_ALONE = """type => {
  for (const node of [...app.graph.nodes]) if (![type, "KSampler"].includes(node.type)) app.graph.remove(node);
}"""
_VALUES = "id => Object.fromEntries(app.graph.getNodeById(id).widgets.map(widget => [widget.name, widget.value]))"
# In Vue nodes of 1.32, the room that a node gains stays empty below all widgets.
_GETS_ROOM = "root => Boolean(root.closest('.dom-widget')) || getComputedStyle(root.parentElement).display === 'flex'"
_SHOWS_WHOLE = """root => {
  const on = root.getBoundingClientRect(), text = root.querySelector(".duca-text").getBoundingClientRect();
  return on.height > 100 && text.bottom <= on.bottom + 1 && root.scrollHeight <= root.clientHeight + 1;
}"""


@pytest.fixture
def strip(comfy: ComfyPage) -> Locator:
    """Returns the strip of the demo workflow, which shows its plan."""
    comfy.load(DEMO)
    expect_plan(comfy.duca_strip())
    comfy.show("DuCaCache")
    return comfy.duca_strip()


def expect_plan(strip: Locator, steps: int = STEPS) -> None:
    expect(strip).to_have_attribute("data-state", "plan")
    expect(strip.locator(".duca-cell")).to_have_count(steps)


def height(strip: Locator) -> float:
    """Returns its height on the screen."""
    return strip.bounding_box()["height"]


def strip_of(comfy: ComfyPage, node: str) -> Locator:
    return comfy.page.locator(f".duca-strip[data-node-id='{node}']")


@everywhere
def test_in_a_subgraph_the_strip_plans_and_follows_a_run(comfy: ComfyPage, strip: Locator):
    comfy.new_seed()
    comfy.select("DuCaCache", "KSampler")
    comfy.command("Comfy.Graph.ConvertToSubgraph")
    comfy.page.evaluate(_ENTER)
    comfy.page.wait_for_function("() => app.canvas.graph.nodes.length === 2")
    strip = comfy.duca_strip()
    expect_plan(strip)
    comfy.show()
    comfy.set_widget("KSampler", "steps", 12)
    expect_plan(strip, 12)
    comfy.page.evaluate(_LEAVE)
    comfy.set_widget("EmptyChromaRadianceLatentImage", "width", 64)
    comfy.page.evaluate(_ENTER)
    comfy.set_widget("KSampler", "steps", STEPS)
    comfy.run()
    comfy.wait_for_end()
    expect(strip).to_have_attribute("data-state", "done")
    expect(strip.locator(".duca-cell[data-done='1']")).to_have_count(STEPS)
    assert strip.evaluate(_SHOWS_WHOLE)
    comfy.page.evaluate(_LEAVE)
    comfy.set_widget("EmptyChromaRadianceLatentImage", "width", 48)  # what lies outside the subgraph counts, too
    comfy.page.evaluate(_ENTER)
    expect_plan(strip)


@classic
def test_a_strip_that_fails_leaves_the_others_alone(comfy: ComfyPage, strip: Locator):
    comfy.page.evaluate(_SPOIL, "DuCaCache")
    other = strip_of(comfy, comfy.page.evaluate(_ADD_BY_ITSELF, "DuCaCacheSchedule"))
    expect_plan(other)
    comfy.set_widget("DuCaCacheSchedule", "kind", "custom text")
    comfy.set_widget("DuCaCacheSchedule", "text", "(Fa)*")
    expect(other.locator(".duca-cell[data-kind=F]")).to_have_count(STEPS // 2)
    expect(strip.locator(".duca-note")).to_contain_text("could not be read")
    assert len([problem for problem in comfy.problems if "spoiled" in problem]) == 1, "said once"
    comfy.forgive("spoiled for the test")


@everywhere
def test_the_properties_panel_leaves_the_strip_where_it_is(comfy: ComfyPage, strip: Locator):
    size, high = comfy.node_size("DuCaCache"), height(strip)
    toggle = comfy.page.locator("button[aria-label='Toggle properties panel']").first
    for _ in range(2):
        comfy.select("DuCaCache")
        if toggle.count():
            toggle.click()
            panel = comfy.page.get_by_test_id("properties-panel")
        else:  # up to 1.32 a panel of the canvas, in the node's menu
            comfy.page.evaluate("() => app.canvas.showShowNodePanel(app.canvas.graph.nodes.find(node => node.type === 'DuCaCache'))")
            panel = comfy.page.locator("#node-panel")
        expect(panel).to_contain_text("DuCa Cache")
        for chosen in ("KSampler", "DuCaCache"):
            comfy.select(chosen)
            comfy.page.wait_for_timeout(300)  # nothing should happen
        expect(panel.locator(".duca-strip")).to_have_count(0)
        expect(panel).not_to_contain_text("duca_strip")
        comfy.show("DuCaCache")
        expect(strip).to_be_visible()
        assert strip.evaluate(_SHOWS_WHOLE)
        assert comfy.node_size("DuCaCache") == pytest.approx(size, abs=2)
        comfy.drag_slider("DuCaCache", "speedup", 0.2, 0.6)
        expect_plan(strip)
        if toggle.count():
            comfy.page.locator("button[aria-label='Toggle properties panel']").first.click()
        else:
            panel.locator(".close").click()
        expect(panel).to_have_count(0)
        comfy.show("DuCaCache")
        assert height(strip) == pytest.approx(high, abs=2)


@classic
def test_hiding_the_advanced_settings_gives_their_room_back(comfy: ComfyPage, strip: Locator):
    toggle = "() => app.canvas.graph.nodes.find(node => node.type === 'DuCaCache').toggleAdvanced()"
    size, high = comfy.node_size("DuCaCache"), height(strip)
    for _ in range(2):
        comfy.page.evaluate(toggle)
        comfy.page.wait_for_timeout(300)
        assert comfy.node_size("DuCaCache")[1] > size[1] + 200
        assert height(strip) == pytest.approx(high, abs=2), "it neither shrinks nor grows"
        comfy.page.evaluate(toggle)
        comfy.page.wait_for_timeout(300)
        assert comfy.node_size("DuCaCache") == pytest.approx(size, abs=1)
        assert height(strip) == pytest.approx(high, abs=2)


@everywhere
def test_a_new_node_has_its_own_values_under_an_id_that_another_had(comfy: ComfyPage):
    specs = comfy.page.request.get("/object_info/DuCaCacheSchedule").json()["DuCaCacheSchedule"]["input"]
    default = {**specs["required"], **specs.get("optional", {})}["warmup"][1]["default"]
    comfy.page.evaluate("() => app.graph.clear()")
    cache = comfy.page.evaluate(_ADD_BY_ITSELF, "DuCaCache")
    assert comfy.page.evaluate(_VALUES, cache)["warmup"] == -1
    comfy.set_widget("DuCaCache", "speedup", 4)
    comfy.page.evaluate("() => app.graph.clear()")
    schedule = comfy.page.evaluate(_ADD_BY_ITSELF, "DuCaCacheSchedule")
    assert schedule == cache, "the test is about this"
    assert comfy.page.evaluate(_VALUES, schedule)["warmup"] == default
    assert comfy.page.evaluate(_VALUES, schedule)["speedup"] == 2


@everywhere
def test_the_strip_goes_with_a_resize_and_a_collapse(comfy: ComfyPage, strip: Locator):
    comfy.page.evaluate(_ALONE, "DuCaCache")  # it may lie below others
    right, bottom = comfy.corner("DuCaCache")
    high, wide = height(strip), strip.bounding_box()["width"]
    mouse = comfy.page.mouse
    mouse.move(right - 3, bottom - 3)
    mouse.down()
    mouse.move(right + 57, bottom + 77, steps=5)
    mouse.up()
    comfy.page.wait_for_timeout(300)
    larger = height(strip)
    assert larger == pytest.approx(high + (80 if strip.evaluate(_GETS_ROOM) else 0), abs=6)
    assert strip.bounding_box()["width"] == pytest.approx(wide + 60, abs=6)
    assert strip.evaluate(_SHOWS_WHOLE)
    expect_plan(strip)
    comfy.select("DuCaCache")
    comfy.command("Comfy.Canvas.ToggleSelectedNodes.Collapse")
    expect(strip).not_to_be_visible()
    comfy.command("Comfy.Canvas.ToggleSelectedNodes.Collapse")
    expect(strip).to_be_visible()
    comfy.page.wait_for_timeout(300)
    assert height(strip) == pytest.approx(larger, abs=2)
    assert strip.evaluate(_SHOWS_WHOLE)
    comfy.set_widget("DuCaCache", "speedup", 4)
    expect(strip.locator(".duca-cell[data-kind=F]")).to_have_count(STEPS // 4)


@everywhere
def test_the_strip_of_a_copy_is_its_own_and_goes_with_undo(comfy: ComfyPage, strip: Locator):
    [first] = comfy.ids("DuCaCache")
    comfy.page.locator("#graph-canvas").focus()
    comfy.select("DuCaCache")
    comfy.page.keyboard.press("Control+c")
    comfy.page.keyboard.press("Control+v")
    comfy.page.wait_for_function("() => app.graph.nodes.filter(node => node.type === 'DuCaCache').length === 2")
    [second] = set(comfy.ids("DuCaCache")) - {first}
    expect_plan(strip_of(comfy, second))
    expect(strip_of(comfy, second)).to_contain_text("no sampler found")
    expect_plan(strip_of(comfy, first))
    comfy.command("Comfy.Undo")
    comfy.page.wait_for_function("() => app.graph.nodes.filter(node => node.type === 'DuCaCache').length === 1")
    expect(comfy.page.locator(".duca-strip")).to_have_count(1)
    expect_plan(strip_of(comfy, first))
    comfy.set_widget("DuCaCache", "speedup", 4)
    expect(strip.locator(".duca-cell[data-kind=F]")).to_have_count(STEPS // 4)
    comfy.command("Comfy.Undo")
    expect(strip.locator(".duca-cell[data-kind=F]")).to_have_count(STEPS // 2)
    assert comfy.widget("DuCaCache", "speedup") == 2
