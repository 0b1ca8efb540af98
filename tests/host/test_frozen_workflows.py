"""Saved workflows keep working: frozen copies of the shipped ones still fit the nodes, value by value.

tests/frozen/ holds them as they were shipped, with the API form in api/. They are never edited. If a shipped workflow changes, its new
state is frozen beside the old one, as NAME.2.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from devtools.driver.node_inputs import inputs_listed
from devtools.environment import host_setup
from devtools.generators import example_workflows

ROOT = Path(__file__).resolve().parents[2]
FROZEN = ROOT / "tests" / "frozen"
GRAPHS, PROMPTS = sorted(FROZEN.glob("*.json")), sorted(FROZEN.glob("api/*.json"))
_MODEL_FILES = (".safetensors", ".pt")
_NOTES = ("Note", "MarkdownNote")  # nodes of the page itself
_WIDGETS = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COMBO": object}


@dataclass(frozen=True)
class Input:
    """An input of a node type.

    Args:
        name: Its name.
        kind: Its type, COMBO for a list of options.
        options: Range, options and so on.
    """

    name: str
    kind: str
    options: Mapping[str, Any]
    is_required: bool

    @property
    def is_widget(self) -> bool:
        return self.kind in _WIDGETS and not self.options.get("forceInput")

    @property
    def followers(self) -> tuple[str, ...]:
        """Values that the page may save after this widget's, for a widget of its own."""
        if self.options.get("control_after_generate"):
            return ("fixed", "randomize", "increment", "decrement")
        return ("image",) if self.options.get("image_upload") else ()

    def problem(self, value: Any) -> str:
        """Returns what is wrong with this value, or an empty text."""
        if not isinstance(value, _WIDGETS[self.kind]) or isinstance(value, bool) != (self.kind == "BOOLEAN"):
            return f"{value!r} is not of type {self.kind}"
        allowed = self.options.get("options")
        is_model_file = str(value).endswith(_MODEL_FILES)  # files that this machine does not have
        if allowed is not None and value not in allowed and not is_model_file:
            return f"{value!r} is no choice any more"
        if self.kind in ("INT", "FLOAT") and not self.options.get("min", value) <= value <= self.options.get("max", value):
            return f"{value!r} is out of range"
        return ""


@dataclass(frozen=True)
class Node:
    """A node type: its inputs in order, and the types of its outputs."""

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]

    def input(self, name: str) -> Input | None:
        return next((given for given in self.inputs if given.name == name), None)

    @property
    def widgets(self) -> list[Input]:
        return [given for given in self.inputs if given.is_widget]


Definitions = Mapping[str, Node]


@pytest.fixture(scope="module")
def classes() -> dict[str, Any]:
    """Returns the classes of the host's own nodes and of the pack's, as this process has them."""
    return example_workflows.node_classes()


@pytest.fixture(scope="module")
def definitions(classes: dict[str, Any]) -> Definitions:
    return {key: read(node) for key, node in classes.items()}


def read(node: Any) -> Node:
    inputs = [
        Input(name, kind, options, group == "required")
        for group, specs in node.INPUT_TYPES().items()
        if group in ("required", "optional")
        for name, kind, options in inputs_listed(specs)
    ]
    return Node(tuple(inputs), tuple(str(kind) for kind in node.RETURN_TYPES))


def joins(output: str, accepted: str) -> bool:
    return "*" in (output, accepted) or output in accepted.split(",")


# --- the page's form


def graph_problems(workflow: dict[str, Any], definitions: Definitions) -> list[str]:
    """Returns everything in a saved workflow that the nodes would refuse or misunderstand."""
    by_id = {node["id"]: node for node in workflow["nodes"]}
    found = [text for link in workflow["links"] for text in _link_problems(link, by_id, definitions)]
    for node in workflow["nodes"]:
        if node["type"] in _NOTES:
            continue
        definition = definitions.get(node["type"])
        texts = ["there is no such node"] if definition is None else [*_name_problems(node, definition), *_value_problems(node, definition)]
        found += [f"{node['type']}: {text}" for text in texts]
    return found


def _name_problems(node: dict[str, Any], definition: Node) -> list[str]:
    saved = [given["name"] for given in node["inputs"] if given.get("widget")]
    current = [widget.name for widget in definition.widgets]
    found = [] if saved == current[: len(saved)] else [f"widgets were {saved}, now are {current}"]
    for given in node["inputs"]:
        known = definition.input(given["name"])
        if known is None or not joins(given["type"], known.kind):
            found.append(f"input {given['name']} of type {given['type']} is not there any more")
    named = {given["name"] for given in node["inputs"]}
    new = [given.name for given in definition.inputs if given.is_required and not given.is_widget and given.name not in named]
    return found + [f"new required input {name}" for name in new]


def _value_problems(node: dict[str, Any], definition: Node) -> list[str]:
    """Compares values with widgets by position. After some widgets the page saves a value of its own."""
    values, found = list(node.get("widgets_values") or ()), []
    for widget in definition.widgets:
        if not values:
            return found  # the widgets after these are newer than the workflow
        problem = widget.problem(values.pop(0))
        found += [f"{widget.name}: {problem}"] if problem else []
        if widget.followers and (not values or values.pop(0) not in widget.followers):
            found.append(f"{widget.name}: none of {widget.followers} follows")
    return found + ([f"values left over: {values}"] if values else [])


def _link_problems(link: list[Any], by_id: dict[int, dict[str, Any]], definitions: Definitions) -> list[str]:
    _, source, slot, target, target_slot, kind = link
    outputs = definitions[by_id[source]["type"]].outputs if by_id[source]["type"] in definitions else ()
    name = by_id[target]["inputs"][target_slot]["name"]
    accepting = definitions[by_id[target]["type"]].input(name) if by_id[target]["type"] in definitions else None
    if slot < len(outputs) and outputs[slot] == kind and accepting is not None and joins(kind, accepting.kind):
        return []
    return [f"{by_id[source]['type']} output {slot} does not go into {by_id[target]['type']}.{name} as {kind} any more"]


# --- the API's form


def prompt_problems(prompt: dict[str, Any], definitions: Definitions) -> list[str]:
    found = []
    for node in prompt.values():
        definition = definitions.get(node["class_type"])
        if definition is None:
            found.append(f"{node['class_type']}: there is no such node")
            continue
        missing = [given.name for given in definition.inputs if given.is_required and given.name not in node["inputs"]]
        texts = [f"new required input {name}" for name in missing]
        texts += [
            f"{name}: {text}"
            for name, value in node["inputs"].items()
            if (text := _input_problem(name, value, definition, prompt, definitions))
        ]
        found += [f"{node['class_type']}: {text}" for text in texts]
    return found


def _input_problem(name: str, value: Any, definition: Node, prompt: dict[str, Any], definitions: Definitions) -> str:
    known = definition.input(name)
    if known is None:
        return "is not there any more"
    if not isinstance(value, list):
        return known.problem(value) if known.is_widget else "is a link only"
    source, slot = value
    outputs = definitions[prompt[source]["class_type"]].outputs if prompt[source]["class_type"] in definitions else ()
    return "" if slot < len(outputs) and joins(outputs[slot], known.kind) else f"does not take output {slot} of node {source} any more"


# --- tests


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_a_frozen_workflow_still_fits(path: Path, definitions: Definitions):
    assert graph_problems(json.loads(path.read_text()), definitions) == []


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)
def test_a_frozen_prompt_still_fits(path: Path, definitions: Definitions):
    assert prompt_problems(json.loads(path.read_text()), definitions) == []


@pytest.mark.parametrize("folder", ["", "api"])
def test_every_shipped_workflow_is_frozen(folder: str):
    frozen = {path.name.split(".")[0] for path in (FROZEN / folder).glob("*.json")}
    assert {path.stem for path in (ROOT / "workflows" / folder).glob("*.json")} <= frozen, "copy the new one to tests/frozen/"


_FOLDERS = {
    "unet_name": "diffusion_models", "dit_name": "diffusion_models", "clip_name": "text_encoders", "vae_name": "vae",
    "ckpt_name": "checkpoints",
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(ROOT.glob("workflows/*.json")), ids=lambda path: path.stem)
def test_a_note_names_the_model_files(path: Path, definitions: Definitions):
    """The note has the files that the loaders ask for, in their folders, and no others."""
    workflow = json.loads(path.read_text())
    asked = set()
    for node in workflow["nodes"]:
        widgets = [] if node["type"] in _NOTES else definitions[node["type"]].widgets
        values = zip((widget.name.rstrip("1234") for widget in widgets), node.get("widgets_values") or ())
        asked |= {f"{_FOLDERS[name]}/{value}" for name, value in values if str(value).endswith(_MODEL_FILES)}
    notes = " ".join(node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in _NOTES)
    assert asked == set(re.findall(r"`(\w+/[\w.-]+\.(?:safetensors|pt))`", notes))


@pytest.mark.skipif(host_setup.given_comfyui() is not None, reason="drawn by the pinned ComfyUI; another's nodes may have other inputs")
@pytest.mark.parametrize("name", example_workflows.WORKFLOWS)
def test_the_example_workflows_are_as_drawn(name: str, classes: dict[str, Any]):
    shipped = (ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8")
    assert json.loads(shipped) == example_workflows.drawn(name, classes), "python3 -m devtools.generators.example_workflows"


Inputs = tuple[Input, ...]
_EXTRA = Input("extra", "INT", {"default": 0}, is_required=False)
# A change of DuCa Cache's inputs, and whether it is noticed in a saved graph and in a prompt.
CHANGES: dict[str, tuple[Callable[[Inputs], Inputs], bool, bool]] = {
    "one removed": (lambda inputs: tuple(given for given in inputs if given.name != "cycle_length"), True, True),
    "one renamed": (lambda inputs: edited(inputs, "cycle_length", name="cycle"), True, True),
    "a new one between": (lambda inputs: (*inputs[:4], _EXTRA, *inputs[4:]), True, False),
    "two exchanged": (lambda inputs: (*inputs[:4], inputs[5], inputs[4], *inputs[6:]), True, False),
    "another type": (lambda inputs: edited(inputs, "warmup", kind="STRING"), True, True),
    "a choice gone": (lambda inputs: edited(inputs, "predictor", options={"options": ["reuse"]}), True, True),
    "a range too small": (lambda inputs: edited(inputs, "speedup", options={"min": 1.0, "max": 1.9}), True, True),
    "the link of another type": (lambda inputs: edited(inputs, "model", kind="CLIP"), True, True),
    "a new required one at the end": (lambda inputs: (*inputs, replace(_EXTRA, is_required=True)), False, True),
    "a new required link": (lambda inputs: (*inputs, Input("other", "MODEL", {}, is_required=True)), True, True),
    "a new optional one at the end": (lambda inputs: (*inputs, _EXTRA), False, False),
    "a new optional link": (lambda inputs: (*inputs, Input("other", "MODEL", {}, is_required=False)), False, False),
}


def edited(inputs: Inputs, which: str, **changes: Any) -> Inputs:
    assert any(given.name == which for given in inputs)
    return tuple(replace(given, **changes) if given.name == which else given for given in inputs)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_breaks_old_workflows_is_seen(change: str, definitions: Definitions):
    how, breaks_graphs, breaks_prompts = CHANGES[change]
    before = definitions["DuCaCache"]
    changed = {**definitions, "DuCaCache": replace(before, inputs=how(before.inputs))}
    graph = json.loads((FROZEN / "duca_demo_flux.json").read_text())
    prompt = json.loads((FROZEN / "api" / "duca_demo_flux.json").read_text())
    assert bool(graph_problems(graph, changed)) == breaks_graphs
    assert bool(prompt_problems(prompt, changed)) == breaks_prompts


def test_a_node_or_an_output_that_is_gone_is_seen(definitions: Definitions):
    graph = json.loads((FROZEN / "duca_demo_flux.json").read_text())
    prompt = json.loads((FROZEN / "api" / "duca_demo_flux.json").read_text())
    gone = {key: node for key, node in definitions.items() if key != "DuCaCache"}
    without_output = {**definitions, "DuCaDemoFlux": replace(definitions["DuCaDemoFlux"], outputs=("MODEL",))}
    for changed in (gone, without_output):
        assert graph_problems(graph, changed) and prompt_problems(prompt, changed)
