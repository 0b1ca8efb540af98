"""Every family on its small test model: what it can do, how exactly, what it keeps and what each kind of evaluation costs.

Writes the tables of docs/families.md and, shorter, that of the README; then what one block of real width costs (real_width.py). Which
class a family was tried on depends on the host: run it on each, and what the others showed stays.
"""

from __future__ import annotations

import sys
from pathlib import Path

import real_width
from common import ROOT, machine, publish, published, start, table

start()
sys.path.append(str(ROOT / "tests" / "families"))
import comfyui_version
import torch
from comfyui_duca.cache_core import FAMILIES, find_family
from comfyui_duca.cache_core.engine.linear_sites import CalibratedLinears
from comfyui_duca.cache_core.families import ModelFamily
from test_every_family import STEPS, cached, full_rank, network, report_of, sample
from zoo import CASES, Case

HOST = f"ComfyUI {comfyui_version.__version__}"
OWN, STAND_IN = "own class", "(stand-in)"


def difference(a: torch.Tensor, b: torch.Tensor) -> str:
    """The largest one, as a share of the picture's range."""
    return "0" if torch.equal(a, b) else f"{float((a - b).abs().max() / (b.max() - b.min())):.0e}"


def shares(case: Case, model, plan: str, linears: CalibratedLinears | None = None) -> tuple[torch.Tensor, dict[str, float]]:
    """The latent, and each kind's multiply-adds as a share of a full evaluation's."""
    patched = cached(model, plan, linears=linears)
    latent = sample(case, patched)
    return latent, {e.kind.value: e.macs / e.full_macs for e in report_of(patched).evaluations}


def row(case: Case) -> list[str]:
    model = case.make()
    family = find_family(network(model))
    assert family is not None
    plain = sample(case, model)
    listened, _ = shares(case, model, "F" * STEPS)
    _, costs = shares(case, model, "FaFaFaFa")
    linears, calibrated = None, "-"
    if family.linears:
        linears = full_rank(family, network(model))
        calibrated = difference(shares(case, model, "FiiFiiFi", linears)[0], plain)
    conservative = f"{shares(case, model, 'FcFcFcFc')[1]['c']:.3f}" if family.is_conservative else "-"
    per_token = family.channels(network(model)) * 2
    return [
        family.name, ", ".join(modes(family)), tested_on(network(model)), difference(listened, plain), calibrated,
        f"{per_token}", f"{costs['a']:.3f}", conservative,
    ]  # fmt: skip


def tested_on(model: torch.nn.Module) -> str:
    """A class of ComfyUI's or of this pack's, or one written for the tests in the likeness of one that is not here."""
    name, home = type(model).__name__, type(model).__module__.split(".")[0]
    return name if home in ("comfy", "comfyui_duca") else f"{name} {STAND_IN}"


def proofs(rows: list[list[str]], path: Path) -> dict[str, dict[str, str]]:
    """For every family, on each host, what it was tried on: on this host by `rows`, on others as the document at `path` has it.

    Only what was bit-identical while the cache listened counts.
    """
    lines = published("proofs", path).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    found = {name: dict(zip(cells[0][1:], seen)) for name, *seen in cells[2:]}
    for family in FAMILIES:
        classes = {row[2] for row in rows if row[0] == family.name and row[3] == "0"}
        real = any(not name.endswith(STAND_IN) for name in classes)
        found.setdefault(family.name, {})[HOST] = OWN if real else "stand-in" if classes else "-"
    return found


def modes(family: ModelFamily) -> list[str]:
    return [
        name
        for name, has in (
            ("whole output", family.is_whole),
            ("forecast", not family.is_whole),
            ("calibrated forecast", bool(family.embed)),
            ("ICC", bool(family.linears)),
            ("DuCa", family.is_conservative),
        )
        if has
    ]


def write(path: Path = ROOT / "docs" / "families.md") -> None:
    rows = [row(case) for case in CASES]
    header = [
        "family", "modes", "tested on", "listening: difference", "ICC at full rank: difference", "bytes per token and anchor, 16 bit",
        "aggressive: share", "conservative: share",
    ]  # fmt: skip
    about = f"Small models with random weights, {STEPS} steps; {HOST}; {machine()}."
    seen = proofs(rows, path)
    hosts = list(dict.fromkeys(host for by_host in seen.values() for host in by_host))
    publish("proofs", table(["family", *hosts], [[name, *(on.get(host, "-") for host in hosts)] for name, on in seen.items()]), path)
    publish("families", f"{about}\n\n{table(header, rows)}", path)
    publish("families", overview({name for name, on in seen.items() if OWN in on.values()}), ROOT / "README.md")


def main() -> None:
    write()
    real_width.main()


def overview(on_real_classes: set[str]) -> str:
    """The README's table, of all families."""
    marks = ("forecast", "calibrated forecast", "ICC", "DuCa")
    rows = []
    for family in {family.name: family for family in FAMILIES}.values():  # two of one name differ only in what a host does
        has = modes(family)
        cells = ["yes" if mark in has else "-" for mark in marks]
        if family.is_whole:
            cells[0] = "output only"
        rows.append([family.name, *cells, "its own class" if family.name in on_real_classes else "a stand-in"])
    return table(["family", *marks, "tested on"], rows)


if __name__ == "__main__":
    main()
