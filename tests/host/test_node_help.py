"""Help pages and translations agree with the nodes, are complete, and are files that the host takes."""

from __future__ import annotations

import json
import re
import struct
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import folder_paths
import pytest
import torch
from app.custom_node_manager import CustomNodeManager
from comfy_api.latest import io
from comfyui_duca.cache_core import FAMILIES, Kind, RunStart, Timeline
from comfyui_duca.cache_core.planning.text import parse
from torch import nn

from devtools.driver.inprocess import ROOT
from devtools.generators.locales import as_text, definition_of, nodes

DOCS = ROOT / "web" / "docs"
LOCALES = ROOT / "locales"
NODES = nodes()
LANGUAGES = ("en", "zh")
PAGES = [(name, language) for name in NODES for language in LANGUAGES]
HEADINGS = {"en": ("When to use it", "Inputs", "Outputs", "Example"), "zh": ("何时使用", "输入", "输出", "示例")}
WORDS = {"empty": "", "空": "", "on": "True", "开": "True", "off": "False", "关": "False"}  # how pages write defaults
LARGEST_PICTURE = 150_000
SAME_IN_CHINESE = {"VAE", "CFG", "Latent"}


def path_of(node: str, language: str) -> Path:
    """Returns where the page looks first for a language, and where it looks for all other languages."""
    return DOCS / f"{node}.md" if language == "en" else DOCS / node / f"{language}.md"


class Entry(NamedTuple):
    """An entry of a list on a help page.

    Args:
        label: What stands before the name; only in languages other than English.
        name: Of the input or output.
        default: As it is written, "" for none.
        text: What follows.
    """

    label: str
    name: str
    default: str
    text: str


_ENTRY = re.compile(
    r"""-[ ](?:(?P<label>[^`]+)[ ])? `(?P<name>\w+)`
        (?:[ ]?[(（](?:default|默认)[ ](?P<default>.+?)[)）] (?=[:：]))?
        [:：]\s* (?P<text>.*)""",
    re.VERBOSE | re.DOTALL,
)


class HelpPage:
    def __init__(self, node: str, language: str) -> None:
        self.text = path_of(node, language).read_text(encoding="utf-8")
        parts = re.split(r"^## (.+)$", self.text, flags=re.M)
        self.intro, self.sections = parts[0], dict(zip(parts[1::2], parts[2::2]))

    def entries(self, heading: str) -> list[Entry]:
        """Returns the entries of a section's list, each with the options below it."""
        points = re.findall(r"^- .*(?:\n  .*)*", self.sections[heading].split("\n\nHow to read")[0].split("\n\n如何阅读")[0], flags=re.M)
        return [self._entry(point) for point in points]

    @staticmethod
    def _entry(point: str) -> Entry:
        found = _ENTRY.fullmatch(point)
        assert found, f"a point begins with a name in backticks: {point}"
        return Entry(found["label"] or "", found["name"], (found["default"] or "").strip("`"), found["text"])


@pytest.fixture(params=PAGES, ids="-".join)
def page(request) -> tuple[type[io.ComfyNode], HelpPage, str]:
    name, language = request.param
    return NODES[name], HelpPage(name, language), language


# -- help pages ----------------------------------------------------------------------------------------


def test_there_is_a_page_for_every_node_and_no_other():
    assert set(DOCS.rglob("*.md")) == {path_of(*page) for page in PAGES}


def test_a_page_has_its_parts(page):
    node, text, language = page
    expected = display_name(node, language)
    assert text.intro.splitlines()[0] == f"# {expected}"
    assert "![" in text.intro, "a picture stands at the top"
    assert [heading for heading in text.sections if heading in HEADINGS[language]] == list(HEADINGS[language])
    assert all(len(text.sections[heading].strip()) > 20 for heading in HEADINGS[language])


def test_lists_name_every_input_and_output_and_no_others(page):
    node, text, language = page
    _, inputs, outputs, _ = HEADINGS[language]
    schema = node.GET_SCHEMA()
    assert [entry.name for entry in text.entries(inputs)] == [field.id for field in schema.inputs]
    assert [entry.name for entry in text.entries(outputs)] == [field.display_name for field in schema.outputs]
    assert all(entry.text for entry in text.entries(inputs) + text.entries(outputs))
    assert not any(entry.default for entry in text.entries(outputs))


def test_quoted_defaults_are_the_nodes_own(page):
    node, text, language = page
    for entry, field in zip(text.entries(HEADINGS[language][1]), node.GET_SCHEMA().inputs):
        default = getattr(field, "default", None)
        assert is_quoted(entry.default, default), f"{entry.name}: {entry.default!r} is written, {default!r} is meant"


def test_other_languages_show_the_labels_of_the_page(page):
    node, text, language = page
    translated = translations(language)[node.GET_SCHEMA().node_id]
    for heading, kind in zip(HEADINGS[language][1:3], ("inputs", "outputs")):
        labels = [value["name"] for value in translated[kind].values()]
        if language == "en":
            labels = [""] * len(labels)  # the default text shows the name alone
        assert [entry.label for entry in text.entries(heading)] == labels


def test_names_in_the_text_are_inputs_of_some_node(page):
    """Words in backticks are inputs and outputs of this pack, files of the pack, and what a user types into a text input."""
    _, text, _ = page
    known = {name for node in NODES.values() for kind in ("inputs", "outputs") for name in names(definition_of(node), kind)}
    for quoted in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text.text):
        is_written = quoted.startswith("studio portrait") or re.fullmatch(r"[Fica0-9()* ]+", quoted)
        assert quoted in known or is_written or quoted == "models/duca_calibration" or (ROOT / quoted).is_file(), quoted


def test_options_in_bold_exist(page):
    """Bold words in the text of a combo box are its options. If they have lines of their own, all options are there."""
    node, text, language = page
    for entry, field in zip(text.entries(HEADINGS[language][1]), node.GET_SCHEMA().inputs):
        if isinstance(field, io.Combo.Input):
            bold = re.findall(r"\*\*([^*]+)\*\*", entry.text)
            assert set(bold) <= set(field.options), entry.name
            if "\n  - " in entry.text:
                assert sorted(bold) == sorted(field.options), entry.name


def test_pictures_exist_and_are_small(page):
    _, text, _ = page
    shown = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", text.text)
    assert shown and text.text.count("![") == len(shown), "every picture says in words what it shows"
    for _, target in shown:
        # For every language, the page puts the docs folder's address before it.
        assert re.fullmatch(r"pictures/\w+\.png", target)
        picture = (DOCS / target).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) < LARGEST_PICTURE, target
        width, height = struct.unpack(">II", picture[16:24])
        assert 100 <= width <= 2000 and 100 <= height <= 2000, target


def test_no_picture_is_left_over():
    used = {target for name, language in PAGES for target in re.findall(r"\]\((pictures/[^)]+)\)", HelpPage(name, language).text)}
    assert {f"pictures/{path.name}" for path in (DOCS / "pictures").iterdir()} == used


def test_links_lead_somewhere(page):
    """The page opens links as they are written, so relative ones would lead nowhere."""
    _, text, _ = page
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", text.text):
        assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", target), target
    assert "<" not in text.text, "raw HTML"


def test_templates_in_the_text_exist(page):
    _, text, _ = page
    for name in re.findall(r"\*(duca_\w+)\*", text.text):
        assert (ROOT / "workflows" / f"{name}.json").is_file(), name


@pytest.mark.parametrize("language", LANGUAGES)
def test_written_schedules_are_read_so(language):
    text = HelpPage("DuCaCacheSchedule", language).text
    shown = re.findall(r"^\| `([^`]+)` \| ([Fica]+) \|$", text, flags=re.M)
    assert len(shown) >= 4
    for written, plan in shown:
        assert "".join(kind.value for kind in parse(written).fit(12)) == plan


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_schedule_pages_example_is_right(language):
    schedule = NODES["DuCaCacheSchedule"]
    defaults = {field.id: field.default for field in schedule.GET_SCHEMA().inputs if hasattr(field, "default")}
    given = defaults | {"kind": "fixed interval", "cycle_length": 3, "warmup": 3, "tail": 4}
    built = schedule.execute(**given).result[0]
    start = RunStart(nn.Module(), FAMILIES[0], Timeline([1 - step / 20 for step in range(21)]), range(20), torch.device("cpu"))
    policy, _ = built.policy_for(start, {Kind.FULL: 1.0}, None)
    plan = str(policy.plan(20, range(20)))
    example = HelpPage("DuCaCacheSchedule", language).sections[HEADINGS[language][-1]]
    assert f"`{plan}`" in example and str(plan.count("F")) in example and str(plan.count("a")) in example


def is_quoted(written: str, default: Any) -> bool:
    """Returns whether the text that a page has for a default is that default."""
    if default is None:
        return written == ""
    if isinstance(default, str) and "\n" in default:
        return written.split()[0] == str(len(default.splitlines()))  # "4 prompts"
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        return re.fullmatch(r"-?[\d.]+", written) is not None and float(written) == default
    return written != "" and WORDS.get(written, written) == str(default)


def display_name(node: type[io.ComfyNode], language: str) -> str:
    return translations(language)[node.GET_SCHEMA().node_id]["display_name"]


# -- translations --------------------------------------------------------------------------------------


def translations(language: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def names(definition: dict[str, Any], kind: str) -> list[str]:
    return [value["name"] for value in definition[kind].values()]


def flat(texts: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in texts.items():
        found |= flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return found


def test_english_is_what_the_nodes_say():
    current = as_text({name: definition_of(node) for name, node in NODES.items()})
    written = (LOCALES / "en" / "nodeDefs.json").read_text(encoding="utf-8")
    assert written == current, "write it anew with: python3 -m devtools.generators.locales (and look at the Chinese for what changed)"


def test_english_is_what_the_host_tells_the_page():
    for name, node in NODES.items():
        info, said = node.GET_NODE_INFO_V1(), translations("en")[name]
        fields = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        assert (said["display_name"], said["description"]) == (info["display_name"], info["description"])
        assert {field: text["tooltip"] for field, text in said["inputs"].items()} == {f: spec[1]["tooltip"] for f, spec in fields.items()}
        assert names(said, "outputs") == list(info["output_name"])
        assert [text["tooltip"] for text in said["outputs"].values()] == list(info["output_tooltips"])


def test_chinese_is_complete():
    english, chinese = flat(translations("en")), flat(translations("zh"))
    assert list(chinese) == list(english)
    for key, text in chinese.items():
        assert isinstance(text, str) and text.strip() == text and text, key
        assert text in SAME_IN_CHINESE or any(is_chinese(letter) for letter in text), f"{key} is not translated"


def test_chinese_quotes_the_numbers_and_options_of_the_english():
    """Numbers, and words that a user types or selects, are the same in both."""
    english, chinese = flat(translations("en")), flat(translations("zh"))
    for node in NODES.values():
        schema = node.GET_SCHEMA()
        for field in schema.inputs:
            key = f"{schema.node_id}.inputs.{field.id}.tooltip"
            numbers = [set(re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w|[.]\d)", text[key], re.ASCII)) for text in (english, chinese)]
            assert numbers[0] == numbers[1], key
            if isinstance(field, io.Combo.Input) and len(field.options) < 8:
                said = [{option for option in field.options if f"{option}:" in english[key]},
                        {option for option in field.options if f"{option}：" in chinese[key]}]  # fmt: skip
                assert said[0] == said[1], key


def test_labels_of_one_node_differ():
    for language in LANGUAGES:
        for name, texts in translations(language).items():
            labels = names(texts, "inputs")
            assert len(set(labels)) == len(labels), f"{language} {name}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_means_something_else_to_the_page(language):
    """The page's translator reads these characters as places to fill, links to other texts, or alternatives."""
    for key, text in flat(translations(language)).items():
        assert not set(text) & set("{}@|"), key


def test_the_host_takes_the_files(tmp_path, monkeypatch):
    packs = tmp_path / "custom_nodes"
    packs.mkdir()
    (packs / "ComfyUI-DuCa").symlink_to(ROOT, target_is_directory=True)
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda kind: [str(packs)])
    loaded = CustomNodeManager.build_translations.__wrapped__(CustomNodeManager())
    assert loaded == {language: {"nodeDefs": translations(language)} for language in LANGUAGES}


def is_chinese(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith("CJK UNIFIED")
