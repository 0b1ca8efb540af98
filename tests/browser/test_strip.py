"""The strip under DuCa Cache and Cache Schedule shows the plan, errors and a run."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import Locator, expect

from .comfy_page import DEMO, WORKFLOWS, ComfyPage, everywhere, on_pages

STEPS = 28  # of the demo workflow
LONG = 400  # lasts longer than a reload
_KINDS = "root => [...root.querySelectorAll('.duca-cell')].map(cell => cell.dataset.kind).join('')"
_ADD_SCHEDULE = """() => {
  const cache = app.graph.nodes.find(node => node.type === "DuCaCache"), schedule = LiteGraph.createNode("DuCaCacheSchedule");
  schedule.pos = [cache.pos[0], cache.pos[1] - 480];
  app.graph.add(schedule);
  schedule.connect(0, cache, cache.inputs.findIndex(input => input.name === "schedule"));
}"""


def kinds(strip: Locator) -> str:
    """Returns the letters of all cells."""
    return strip.evaluate(_KINDS)


def planned(comfy: ComfyPage) -> Locator:
    """Returns the strip of the demo workflow, which shows its plan."""
    comfy.load(DEMO)
    strip = comfy.duca_strip()
    expect(strip).to_have_attribute("data-state", "plan")
    expect(strip.locator(".duca-cell")).to_have_count(STEPS)
    return strip


@on_pages("own-classic", "own-vue", "newest-vue")
def test_slider_and_presets_change_the_plan(comfy: ComfyPage):
    strip = planned(comfy)
    full = strip.locator(".duca-cell[data-kind=F]")
    expect(full).to_have_count(STEPS // 2)
    comfy.drag_slider("DuCaCache", "speedup", 0.2, 0.6)
    assert 3.5 < comfy.widget("DuCaCache", "speedup") < 4.5
    expect(full).to_have_count(STEPS // 4)
    fast = strip.locator(".duca-preset", has_text="Fast")
    expect(fast).to_have_attribute("aria-pressed", "false")
    fast.click()
    expect(fast).to_have_attribute("aria-pressed", "true")
    expect(full).to_have_count(STEPS * 10 // 28)
    assert comfy.widget("DuCaCache", "speedup") == float(fast.get_attribute("data-speedup"))
    expect(strip.locator(".duca-text")).to_contain_text("10 full, 18 skipped")


@on_pages("own-classic", "newest-vue")
def test_one_of_two_samplers_shows_the_steps_that_it_runs(comfy: ComfyPage):
    """Wan 2.2's experts share 20 steps, ten each."""
    path = next(path for path in WORKFLOWS if path.stem == "duca_wan22_t2v")
    comfy.load(json.loads(path.read_text()), path.stem)
    comfy.show("DuCaCache")
    experts = comfy.ids("DuCaCache")
    assert len(experts) == 2
    for node in experts:
        expect(comfy.page.locator(f".duca-strip[data-node-id='{node}'] .duca-cell")).to_have_count(10)


@on_pages("own-classic", "newest-vue")
def test_a_wrong_schedule_says_what_is_wrong(comfy: ComfyPage):
    strip = planned(comfy)
    comfy.page.evaluate(_ADD_SCHEDULE)
    below = comfy.duca_strip("DuCaCacheSchedule")
    comfy.set_widget("DuCaCacheSchedule", "kind", "custom text")
    comfy.set_widget("DuCaCacheSchedule", "text", "3F (Faaa)* F")
    for one in (strip, below):
        expect(one).to_have_attribute("data-state", "plan")
        expect(one.locator(".duca-cell")).to_have_count(STEPS)
        comfy.page.wait_for_function(f"root => ({_KINDS})(root) === '{'FFF' + 'Faaa' * 6 + 'F'}'", arg=one.element_handle())
    comfy.set_widget("DuCaCacheSchedule", "text", "3F (Fxa)*")
    for one in (strip, below):
        expect(one).to_have_attribute("data-state", "error")
        expect(one.locator(".duca-text")).to_contain_text("x")
    comfy.set_widget("DuCaCacheSchedule", "text", "(Fa)*")
    expect(strip).to_have_attribute("data-state", "plan")
    comfy.forgive("400 (Bad Request)")  # the answer to a wrong text, which browsers log


@everywhere
def test_a_run_fills_the_cells(comfy: ComfyPage, request: pytest.FixtureRequest):
    strip = planned(comfy)
    plan = kinds(strip)
    comfy.queue()
    expect(strip).to_have_attribute("data-state", "running", timeout=60_000)
    expect(strip.locator(".duca-cell[data-done='1']").nth(3)).to_be_attached()
    comfy.wait_for_end()
    expect(strip).to_have_attribute("data-state", "done")
    expect(strip.locator(".duca-cell[data-done='1']")).to_have_count(STEPS)
    assert kinds(strip) == plan
    expect(strip.locator(".duca-text")).to_contain_text(re.compile(r"\d× as fast"))
    comfy.page.wait_for_function("() => app.graph.nodes.find(node => node.type === 'PreviewAny').widgets[0].value.includes('evaluations')")
    values = {node["type"]: node.get("widgets_values") for node in comfy.saved()["nodes"]}
    assert values["DuCaCache"] == next(node["widgets_values"] for node in DEMO["nodes"] if node["type"] == "DuCaCache")
    assert comfy.complaints() == []
    name = request.node.callspec.id
    comfy.wait_for_images("PreviewImage", "DuCaCacheReport")
    comfy.picture(f"strip_{name}", comfy.show("DuCaCache"))
    comfy.show()
    comfy.picture(f"demo_workflow_{name}")


@on_pages("own-classic")
def test_a_reload_finds_the_run_that_goes_on_until_it_is_stopped(comfy: ComfyPage):
    strip = planned(comfy)
    comfy.queue(steps=LONG)
    expect(strip).to_have_attribute("data-state", "running")
    comfy.reload()
    expect(strip).to_have_attribute("data-state", "running")
    done = strip.locator(".duca-cell[data-done='1']")
    expect(done.nth(done.count() + 10)).to_be_attached()
    comfy.page.evaluate("() => app.extensionManager.command.execute('Comfy.Interrupt')")
    expect(strip).to_have_attribute("data-state", "done")
    expect(strip.locator(".duca-text")).to_contain_text("Stopped after")
