"""Writes locales/en/nodeDefs.json, from which translators start, using the definitions of the nodes.

python3 -m devtools.generators.locales
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from devtools.driver.inprocess import load_comfyui, load_pack
from devtools.environment.host_setup import ensure_host

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "locales" / "en" / "nodeDefs.json"


def nodes() -> dict[str, Any]:
    """Returns the pack's nodes by id, in the order of its list. ComfyUI must be loaded."""
    extension = asyncio.run(load_pack().comfy_entrypoint())
    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}


def definition_of(node: Any) -> dict[str, Any]:
    """Returns every text of a node that the page can show in another language, by the page's keys."""
    schema = node.GET_SCHEMA()
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {field.id: {"name": field.display_name or field.id, "tooltip": field.tooltip} for field in schema.inputs},
        "outputs": {str(i): {"name": field.display_name, "tooltip": field.tooltip} for i, field in enumerate(schema.outputs)},
    }


def as_text(definitions: dict[str, Any]) -> str:
    return json.dumps(definitions, indent=2, ensure_ascii=False) + "\n"


def write() -> None:
    load_comfyui()
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(as_text({name: definition_of(node) for name, node in nodes().items()}), encoding="utf-8")


def _main() -> int:
    host = ensure_host()
    code = "from devtools.generators.locales import write; write()"
    return subprocess.call([str(host.python), "-c", code], cwd=ROOT, env=os.environ | host.environment)


if __name__ == "__main__":
    sys.exit(_main())
