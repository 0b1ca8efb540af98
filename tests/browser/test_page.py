"""ComfyUI's page finds, loads, saves and runs the pack's nodes and workflows."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection

from playwright.sync_api import expect

from .comfy_page import DEMO, WORKFLOWS, ComfyPage, both_renderers, everywhere, on_pages


def our_nodes(comfy: ComfyPage) -> dict[str, str]:
    """Returns the display name of every node of the pack, by its type."""
    nodes = comfy.page.request.get("/object_info").json()
    return {key: node["display_name"] for key, node in nodes.items() if node["python_module"].endswith("ComfyUI-DuCa")}


@on_pages("own-classic", "newest-vue")
def test_every_node_is_found_by_its_name_and_added(comfy: ComfyPage):
    nodes = our_nodes(comfy)
    assert len(nodes) >= 6
    search = comfy.page.locator("input[role=combobox]")
    for node_type, name in nodes.items():
        comfy.page.evaluate("() => { app.graph.clear(); app.extensionManager.command.execute('Workspace.SearchBox.Toggle'); }")
        search.fill(name)
        comfy.page.get_by_role("option").filter(has_text=name).first.click()
        comfy.page.wait_for_function("type => app.graph.nodes.some(node => node.type === type)", arg=node_type)
        expect(search).to_have_count(0)  # the window fades out
        comfy.page.mouse.move(800, 500)
        comfy.page.wait_for_timeout(200)
        comfy.page.mouse.click(800, 500)  # until then, newer pages let the node follow the cursor
        comfy.page.wait_for_function("() => app.graph.nodes.every(node => !node.flags.ghost)")


@everywhere
def test_the_shipped_workflows_load_with_their_values(comfy: ComfyPage):
    our_types = our_nodes(comfy)
    for path in WORKFLOWS:
        workflow = json.loads(path.read_text())
        comfy.load(workflow, path.stem)
        assert_kept(comfy.saved(), workflow, our_types)
        unknown = (
            "() => app.graph.nodes.filter(node => node.has_errors || !LiteGraph.registered_node_types[node.type]).map(node => node.type)"
        )
        assert comfy.page.evaluate(unknown) == []
        assert comfy.complaints() == [], path.stem


@both_renderers
def test_a_reload_keeps_the_values(comfy: ComfyPage):
    comfy.load(DEMO)
    changed = {("DuCaCache", "speedup"): 3.4, ("DuCaCache", "mode"): "forecast", ("DuCaCache", "predictor"): "taylor2"}
    for (node_type, name), value in changed.items():
        comfy.set_widget(node_type, name, value)
    before = values(comfy.saved())
    drafts = "Object.values({...sessionStorage, ...localStorage})"  # the second in newer pages
    comfy.page.wait_for_function(f"text => {drafts}.some(kept => JSON.stringify(kept).includes(text))", arg="taylor2")
    comfy.reload()
    comfy.page.wait_for_function("count => app.graph.nodes.length === count", arg=len(DEMO["nodes"]))
    assert values(comfy.saved()) == before
    assert {key: comfy.widget(*key) for key in changed} == changed


@both_renderers
def test_a_node_is_copied_and_deleted_while_it_runs(comfy: ComfyPage):
    comfy.load(DEMO)
    comfy.queue(steps=400)  # not over before the second node is there
    comfy.wait_for("progress")
    [first] = comfy.ids("DuCaCache")
    comfy.page.locator("#graph-canvas").focus()
    comfy.page.evaluate("id => { app.canvas.deselectAll(); app.canvas.select(app.graph.getNodeById(id)); }", first)
    comfy.page.keyboard.press("Control+c")
    comfy.page.keyboard.press("Control+v")
    comfy.page.wait_for_function("() => app.graph.nodes.filter(node => node.type === 'DuCaCache').length === 2")
    comfy.page.evaluate("id => { app.canvas.deselectAll(); app.canvas.select(app.graph.getNodeById(id)); }", first)
    comfy.page.keyboard.press("Delete")
    comfy.page.wait_for_function("() => app.graph.nodes.filter(node => node.type === 'DuCaCache').length === 1")
    assert comfy.ids("DuCaCache") != [first]
    assert not {"execution_success", "execution_error"} & {event["type"] for event in comfy.events()}, "the run ended too early"
    comfy.wait_for_end()
    assert comfy.complaints() == []


def test_another_tab_hears_nothing_of_the_run(comfy: ComfyPage):
    comfy.load(DEMO)
    other = comfy.another_tab()
    other.load(copy.deepcopy(DEMO))
    comfy.queue(steps=8)
    comfy.wait_for_end()
    assert other.events() == []
    expect(comfy.duca_strip()).to_have_attribute("data-state", "done")
    expect(other.duca_strip()).to_have_attribute("data-state", "plan")


def assert_kept(saved: dict, workflow: dict, our_types: Collection[str]) -> None:
    """Asserts that our nodes' values are unchanged. A node of the host may have got further widgets after those of the workflow."""
    before, after = values(workflow), values(saved)
    assert after.keys() == before.keys()
    for node in workflow["nodes"]:
        kept, now = before[str(node["id"])], after[str(node["id"])]
        assert (now if node["type"] in our_types else now[: len(kept)]) == kept, node["type"]


def values(workflow: dict) -> dict[str, list]:
    """Returns widget values by node. A node without any has an empty list or none at all."""
    return {str(node["id"]): node.get("widgets_values") or [] for node in workflow["nodes"]}
