"""Measures every model of the test zoo: where its hidden state is, how exactly it is put back, what is kept, what evaluations cost.

Writes the tables of docs/families.md and a shorter one into the README, then measures one block of real width (real_width.py). With which
class a model is tested depends on the host, so run it on each host: the results of the other hosts stay in the table.
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
from comfyui_duca.cache_core import find_family
from comfyui_duca.cache_core.discovery.places import Known
from comfyui_duca.cache_core.engine.linear_sites import Factors
from comfyui_duca.cache_core.families import FAMILIES, ModelFamily
from helpers.factors import exact_factors
from runs import STEPS, cached, known_of, network, report_of, sample, sites_of
from zoo import CASES, Case

HOST = f"ComfyUI {comfyui_version.__version__}"
STAND_IN = "(stand-in)"


def difference(a: torch.Tensor, b: torch.Tensor) -> str:
    """Returns the largest difference of two pictures as a share of the range of values of the second; "0" where they are equal."""
    return "0" if torch.equal(a, b) else f"{float((a - b).abs().max() / (b.max() - b.min())):.0e}"


def shares(case: Case, model, plan: str, factors: Factors | None = None) -> tuple[torch.Tensor, dict[str, float]]:
    """Returns the latent of a run and, for each kind of evaluation, its multiply-adds as a share of a full one's."""
    patched = cached(model, plan, factors=factors)
    latent = sample(case, patched)
    return latent, {e.kind.value: e.macs / e.full_macs for e in report_of(patched).evaluations}


def row(case: Case) -> list[str]:
    """Returns the cells of one model's row in the table of families."""
    model = case.make()
    family, known = find_family(network(model)), known_of(case, model)
    plain = sample(case, model)
    listened, _ = shares(case, model, "F" * STEPS)
    _, costs = shares(case, model, "FaFaFaFa")
    calibrated = "-"
    if known.layer_calls:
        calibrated = difference(shares(case, model, "FiiFiiFi", exact_factors(sites_of(model, known)))[0], plain)
    conservative = f"{shares(case, model, 'FcFcFcFc')[1]['c']:.3f}" if family.is_conservative else "-"
    return [
        case.name, ", ".join(modes(family, known)), tested_on(network(model)), found(known), difference(listened, plain), calibrated,
        kept(known), f"{costs['a']:.3f}", conservative,
    ]  # fmt: skip


def found(known: Known) -> str:
    """Returns in the words of the report where the hidden state is, or why no place was found."""
    return known.reason if known.place is None else known.place.text


def kept(known: Known) -> str:
    """Returns the bytes per token and anchor of every tensor that is kept, at 16 bit."""
    return " + ".join(f"{each.shape[-1] * 2}" for each in known.place.kept) if known.place is not None else "-"


def tested_on(model: torch.nn.Module) -> str:
    """Returns the name of a network's class, marked as a stand-in where the tests had to write it because this host does not have it."""
    name, home = type(model).__name__, type(model).__module__.split(".")[0]
    return name if home in ("comfy", "comfyui_duca") else f"{name} {STAND_IN}"


def proofs(rows: list[list[str]], path: Path) -> dict[str, dict[str, str]]:
    """Returns the place that was found for every model on each host, by model and host.

    A place counts only if full evaluations gave the same bits with the cache as without.

    Args:
        rows: What was found on this host.
        path: The document that holds what was found on other hosts.
    """
    lines = published("proofs", path).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    seen = {name: dict(zip(cells[0][1:], hosts)) for name, *hosts in cells[2:]}
    here: dict[str, list[str]] = {}
    for name, _modes, tested, where, listening, *_ in rows:
        if listening == "0":
            here.setdefault(name, []).append(f"{where} {STAND_IN}" if tested.endswith(STAND_IN) else where)
    for name in {**dict.fromkeys(here), **dict.fromkeys(seen)}:
        seen.setdefault(name, {})[HOST] = "; ".join(dict.fromkeys(here.get(name, ["-"])))
    return seen


def modes(family: ModelFamily, known: Known) -> list[str]:
    """Returns the ways of caching that a model can use."""
    place = known.place
    return [
        name
        for name, has in (
            ("whole output", place is not None and place.is_whole_output),
            ("forecast", place is not None and not place.is_whole_output),
            ("calibrated forecast", bool(family.embed)),
            ("ICC", bool(known.layer_calls)),
            ("DuCa", family.is_conservative),
        )
        if has
    ]


def write(path: Path = ROOT / "docs" / "families.md") -> None:
    """Writes the tables of the document at `path` and of the README."""
    rows = [row(case) for case in CASES]
    header = [
        "model", "modes", "tested on", "where", "listening: difference", "ICC at full rank: difference",
        "bytes per token and anchor, 16 bit", "skipped: share", "conservative: share",
    ]  # fmt: skip
    about = f"Small models with random weights, {STEPS} steps; {HOST}; {machine()}."
    seen = proofs(rows, path)
    hosts = list(dict.fromkeys(host for by_host in seen.values() for host in by_host))
    publish("proofs", table(["model", *hosts], [[name, *(on.get(host, "-") for host in hosts)] for name, on in seen.items()]), path)
    publish("families", f"{about}\n\n{table(header, rows)}", path)
    publish("families", overview(seen), ROOT / "README.md")


def main() -> None:
    write()
    real_width.main()


def overview(seen: dict[str, dict[str, str]]) -> str:
    """Returns the README's table: what was found for each model, what its family's file adds, and which class was tested."""
    described = {family.name: family for family in FAMILIES}
    rows = []
    for name, by_host in seen.items():
        family, wheres = described.get(name), [where for where in by_host.values() if where != "-"]
        proved = bool(wheres) and all(where.startswith("found and proved") for where in wheres)
        own = any(not where.endswith(STAND_IN) for where in wheres)
        has = (family is not None and bool(family.embed), family is not None and family.is_conservative)
        rows.append(
            [name, "yes" if proved else "output only", *("yes" if mode else "-" for mode in has), "its own class" if own else "a stand-in"]
        )
    return table(["model", "found and proved", "calibrated forecast's input", "DuCa", "tested on"], rows)


if __name__ == "__main__":
    main()
