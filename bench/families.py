"""Every family on its small test model: what it can do, how exactly, what it keeps and what each kind of evaluation costs.

Writes the table of docs/families.md and, shorter, that of the README; then what one block of real width costs (real_width.py).
"""

from __future__ import annotations

import sys

import real_width
from common import ROOT, machine, publish, start, table

start()
sys.path.append(str(ROOT / "tests" / "families"))
import torch
from comfyui_duca.cache_core import find_family
from comfyui_duca.cache_core.engine.linear_sites import CalibratedLinears
from test_every_family import STEPS, cached, full_rank, network, report_of, sample
from zoo import CASES, Case


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
        family.name, ", ".join(modes(family)), type(network(model)).__name__, difference(listened, plain), calibrated,
        f"{per_token}", f"{costs['a']:.3f}", conservative,
    ]  # fmt: skip


def modes(family) -> list[str]:
    return [
        name
        for name, has in (
            ("forecast", True),
            ("calibrated forecast", bool(family.embed)),
            ("ICC", bool(family.linears)),
            ("DuCa", family.is_conservative),
        )
        if has
    ]


def main() -> None:
    rows = [row(case) for case in CASES]
    header = [
        "family", "modes", "tested on", "listening: difference", "ICC at full rank: difference", "bytes per token and anchor, 16 bit",
        "aggressive: share", "conservative: share",
    ]  # fmt: skip
    about = f"Small random models of the host's classes, {STEPS} steps; {machine()}."
    publish("families", f"{about}\n\n{table(header, rows)}", ROOT / "docs" / "families.md")
    marks = ("forecast", "calibrated forecast", "ICC", "DuCa")
    short = list({r[0]: [r[0], *("yes" if mark in r[1].split(", ") else "-" for mark in marks)] for r in rows}.values())
    publish("families", table(["family", *marks], short), ROOT / "README.md")
    real_width.main()


if __name__ == "__main__":
    main()
