"""Shows, verifies and shrinks calibration sidecars.

From the pack's folder:

python -m cache_core.calibration show FILE              lists the contents, without reading the tensors of the sections
python -m cache_core.calibration verify FILE            reads and checks every byte
python -m cache_core.calibration shrink FILE OUT [--drop icc|forecast] [--rank R]    writes a smaller copy
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TextIO

from torch import Tensor

from .sidecar import About, Sidecar, SidecarError, peek, read, write
from .sidecar_check import ENERGY, SECTIONS

_MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Words of the command line. None takes those of the process.

    Returns:
        The exit code: 0 if the command succeeded, 1 if a file cannot be used or written.

    Raises:
        SystemExit: With code 2 if the command line is wrong.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "shrink" and options.drop is None and options.rank is None:
        parser.error("shrink needs --drop, --rank or both")
    try:
        if options.command == "show":
            _show(options.file)
        elif options.command == "verify":
            _verify(options.file)
        else:
            _shrink(options.file, options.out, options.drop, options.rank)
    except SidecarError as error:
        _say(str(error), sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m cache_core.calibration", description="calibration sidecars")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("show", help="what a sidecar holds").add_argument("file")
    commands.add_parser("verify", help="read and check every byte").add_argument("file")
    shrink = commands.add_parser("shrink", help="write a smaller copy")
    shrink.add_argument("file")
    shrink.add_argument("out")
    shrink.add_argument("--drop", choices=SECTIONS, help="leave this section out")
    shrink.add_argument("--rank", type=_positive, metavar="R", help="keep the R most important directions of every icc layer")
    return parser


def _positive(text: str) -> int:
    """Parses a rank."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("a rank is at least 1")
    return value


def _show(path: str) -> None:
    """Prints the description of a sidecar and the list of its tensors."""
    contents = peek(path)
    fingerprint = contents.fingerprint
    for field in fields(About):
        value = getattr(contents.about, field.name)
        text = " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else _text(value)
        _say(f"{field.name:<13} {text}")
    _say(f"{'fingerprint':<13} {fingerprint.short}, {len(fingerprint.values)} tensors sampled, loaded as {fingerprint.dtype}")
    for section, tensors in contents.tensors.items():
        _say(f"\n{section}: {len(tensors)} tensors, {contents.nbytes(section) / _MIB:.3f} MiB")
        for name, info in sorted(tensors.items()):
            _say(f"  {name:<48} {info.dtype:<5} {_text(info.shape, ' x '):<24} {info.nbytes / _MIB:10.3f} MiB")


def _verify(path: str) -> None:
    """Reads and checks a sidecar and prints its size."""
    sidecar = read(path)
    tensors = [t for section in sidecar.sections.values() for t in section.values()]
    _say(f"{path}: sound; {', '.join(sidecar.sections)}; {len(tensors)} tensors, {sum(t.nbytes for t in tensors) / _MIB:.3f} MiB")


def _shrink(path: str, out: str, drop: str | None, rank: int | None) -> None:
    """Writes a copy without the section `drop` and with factors of at most `rank`."""
    held = peek(path).tensors
    kept = [section for section in held if section != drop]
    if not kept or (drop is not None and drop not in held):
        raise SidecarError(path, f"its sections are {', '.join(held)}, so dropping {drop} leaves none, or all", "drop another section")
    if rank is not None and "icc" not in kept:
        raise SidecarError(path, "there is no icc section to cut to a rank", "leave out --rank")
    before = read(path, kept)
    sections, about = dict(before.sections), before.about
    if rank is not None:
        sections["icc"] = {name: _cut(name, tensor, rank) for name, tensor in sections["icc"].items()}
        about = replace(about, rank=min(about.rank, rank))
    if drop == "icc":
        about = replace(about, rank=0, method="")
    write(out, Sidecar(about, before.fingerprint, sections))
    _say(f"{out}: written; {sum(t.nbytes for s in sections.values() for t in s.values()) / _MIB:.3f} MiB")


def _cut(name: str, tensor: Tensor, rank: int) -> Tensor:
    """Cuts a tensor of the section "icc" to the first `rank` directions, which are the most important ones."""
    if name == ENERGY:  # unchanged and now an upper bound, as the energy of the cut factors is not known without the weights
        return tensor
    return tensor[:, :rank] if name.endswith(".A") else tensor[:rank]


def _text(value: object, between: str = ", ") -> str:
    """Returns a value as text, with the items of a tuple joined."""
    return between.join(str(v) for v in value) if isinstance(value, tuple) else str(value)


def _say(line: str, stream: TextIO | None = None) -> None:
    """Writes a line to `stream`, by default the standard output."""
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"  # characters of a model's name that the console cannot show are escaped
    stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")


if __name__ == "__main__":
    sys.exit(main())
