"""Draws a workflow in the form that ComfyUI's page saves: nodes in columns, joined by matching types of outputs and inputs.

The order of inputs, defaults and outputs come from the node classes themselves.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

from devtools.driver.node_inputs import inputs_listed

_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
_TOP, _GAP = 290, 50  # top of the columns; space between nodes, with a title
_BLUE, _GREEN = "#3f789e", "#8A8"
_OURS = {"color": "#223", "bgcolor": "#335"}
_BELOW = ("DuCaCacheReport", "PreviewAny")
_HEIGHTS = {
    "CLIPTextEncode": 150, "TextEncodeQwenImageEditPlus": 190, "DuCaCache": 300, "LoadImage": 330, "SaveImage": 550, "SaveVideo": 550,
    "DuCaCacheReport": 330, "PreviewAny": 330,
}  # fmt: skip


class Input(NamedTuple):
    name: str
    kind: str
    options: Mapping[str, Any]
    is_required: bool

    @property
    def is_widget(self) -> bool:
        return self.kind in _WIDGETS and not self.options.get("forceInput")

    @property
    def default(self) -> Any:
        allowed = self.options.get("options")
        return self.options.get("default", allowed[0] if allowed else "")


class NodeClass(NamedTuple):
    """A node class. Sockets come before widgets, as the page has them."""

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, str], ...]  # name, type

    @classmethod
    def read(cls, name: str, node: Any) -> NodeClass:
        groups = node.INPUT_TYPES()
        inputs = [
            Input(key, kind, options, group == "required")
            for group in ("required", "optional")
            for key, kind, options in inputs_listed(groups.get(group, {}))
        ]
        inputs.sort(key=lambda given: given.is_widget)
        types = [str(getattr(kind, "value", kind)) for kind in node.RETURN_TYPES]
        return cls(name, tuple(inputs), tuple(zip(getattr(node, "RETURN_NAMES", None) or types, types)))


class Node:
    """One node on the canvas.

    Args:
        number: Its id.
        kind: Its class.
        place: Left, top and width.
        given: By input: a widget's value, or the node whose output goes into the input.
        title: Shown in place of the class's name, unless empty.
    """

    def __init__(self, number: int, kind: NodeClass, place: tuple[int, int, int], given: Mapping[str, Any], title: str) -> None:
        self.id, self.kind, self.place, self.given, self.title = number, kind, place, given, title
        unknown = set(given) - {known.name for known in kind.inputs}
        assert not unknown, f"{kind.name} has no {unknown}"
        sockets = max(sum(not known.is_widget for known in kind.inputs), len(kind.outputs))
        self.height = _HEIGHTS.get(kind.name, 20 * sockets + 26 * len(self.values()) + 20)

    def slot(self, target: Input) -> int:
        """Returns the number of the output with the name of `target`, or else of the first one with its type."""
        matching = [i for i, (_, kind) in enumerate(self.kind.outputs) if kind == target.kind or target.kind == "*"]
        named = [i for i in matching if self.kind.outputs[i][0] == target.name]
        return (named or matching)[0]

    def values(self) -> list[Any]:
        values = []
        for widget in (known for known in self.kind.inputs if known.is_widget):
            values.append(self.given.get(widget.name, widget.default))
            values += ["fixed"] if widget.options.get("control_after_generate") else []
            values += ["image"] if widget.options.get("image_upload") else []
        return values


class Sheet:
    """A workflow that is being drawn: columns from left to right, nodes from top to bottom."""

    def __init__(self, name: str, classes: Mapping[str, Any]) -> None:
        """Starts an empty one. `name` is that of its file, `classes` are ComfyUI's node classes by name."""
        self.name = name
        self.files: list[str] = []
        self._classes, self._nodes, self._groups = classes, list[Node](), list[tuple[str, int, int, str]]()
        self._x = self._y = self._width = self._bottom = 0

    def column(self, x: int, width: int, title: str = "", span: int = 0, color: str = _BLUE) -> None:
        """Starts a column in which the next nodes stand, in a group if there is a title.

        Args:
            x: Left edge.
            width: Of the nodes.
            title: Of the group.
            span: The group's width if it holds more columns than this one.
            color: Of the group.
        """
        self._x, self._y, self._width = x, _TOP, width
        if title:
            self._groups.append((title, x - 20, span or width + 40, color))

    def add(self, kind: str, /, title: str = "", **given: Any) -> Node:
        """Adds a node. `given` has nodes for sockets and values for widgets; other widgets keep their default."""
        known = NodeClass.read(kind, self._classes[kind])
        node = Node(len(self._nodes) + 2, known, (self._x, self._y, self._width), given, title)
        self._nodes.append(node)
        self._y += node.height + _GAP
        self._bottom = max(self._bottom, self._y)
        return node

    def file(self, folder: str, name: str) -> str:
        """Notes a model file for the list on the canvas and returns its name."""
        if f"{folder}/{name}" not in self.files:
            self.files.append(f"{folder}/{name}")
        return name

    def report(self, *runs: tuple[str, Node, Node]) -> None:
        """Adds nodes below the columns that show what each of these runs did (its name, its latent, its model)."""
        top = self._bottom + 120
        self._groups.append(("What the cache did", 800, 1560, _GREEN))
        for name, samples, model in runs:
            self._x, self._y, self._width = 820, top, 720
            title = f"Cache Report: {name}" if name else ""
            made = self.add("DuCaCacheReport", title=title, samples=samples, model=model)
            self._x, self._y, self._width = 1600, top, 740
            self.add("PreviewAny", title=f"Report in words{': ' if name else ''}{name}", source=made)
            top += 330 + _GAP

    def graph(self, about: str) -> dict[str, Any]:
        """Returns the whole workflow in the page's form. `about` is what the note says above and below the list of files."""
        links: list[list[Any]] = []
        for node in self._nodes:
            for slot, given in enumerate(node.kind.inputs):
                source = node.given.get(given.name)
                if isinstance(source, Node):
                    out = source.slot(given)
                    links.append([len(links) + 1, source.id, out, node.id, slot, source.kind.outputs[out][1]])
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-duca/{self.name}")),
            "revision": 0,
            "last_node_id": len(self._nodes) + 1,
            "last_link_id": len(links),
            "nodes": [self._note(about), *(_saved(node, i + 1, links) for i, node in enumerate(self._nodes))],
            "links": links,
            "groups": self._boxes(),
            "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [120, 190]}},
            "version": 0.4,
        }

    def _note(self, about: str) -> dict[str, Any]:
        head, tail = about.split("\n", 1)
        files = "\n".join(f"- `{file}`" for file in self.files)
        text = f"**{head}** Put these files in ComfyUI's `models` folder:\n\n{files}\n\n{tail}"
        height = 110 + 20 * len(self.files) + 18 * (len(tail) // 100)
        return {
            "id": 1, "type": "MarkdownNote", "pos": [20, 200 - height], "size": [740, height], "flags": {}, "order": 0, "mode": 0,
            "inputs": [], "outputs": [], "title": "Model files", "properties": {}, "widgets_values": [text], "color": "#432",
            "bgcolor": "#653",
        }  # fmt: skip

    def _boxes(self) -> list[dict[str, Any]]:
        ends = [node.place[1] + node.height for node in self._nodes]
        above = max(end for end, node in zip(ends, self._nodes) if node.kind.name not in _BELOW)
        boxes = []
        for i, (title, x, width, color) in enumerate(self._groups, 1):
            top, end = (above + 50, max(ends)) if title == "What the cache did" else (_TOP - 70, above)
            bounding = [x, top, width, end + 20 - top]
            boxes.append({"id": i, "title": title, "bounding": bounding, "color": color, "font_size": 24, "flags": {}})
        return boxes


def _saved(node: Node, order: int, links: list[list[Any]]) -> dict[str, Any]:
    into = {link[4]: link[0] for link in links if link[3] == node.id}
    inputs = []
    for slot, given in enumerate(node.kind.inputs):
        shape = {} if given.is_required else {"shape": 7}
        widget = {"widget": {"name": given.name}} if given.is_widget else {}
        inputs.append({"name": given.name, **shape, "type": given.kind, **widget, "link": into.get(slot)})
    outputs = [
        {"name": name, "type": kind, "links": [link[0] for link in links if link[1:3] == [node.id, slot]]}
        for slot, (name, kind) in enumerate(node.kind.outputs)
    ]
    x, y, width = node.place
    values = node.values()
    return {
        "id": node.id, "type": node.kind.name, "pos": [x, y], "size": [width, node.height], "flags": {}, "order": order, "mode": 0,
        "inputs": inputs, "outputs": outputs, **({"title": node.title} if node.title else {}),
        "properties": {"Node name for S&R": node.kind.name}, **({"widgets_values": values} if values else {}),
        **(_OURS if node.kind.name.startswith("DuCa") else {}),
    }  # fmt: skip
