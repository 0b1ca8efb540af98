"""What is written to a sidecar is read from it again, and every unfit file is refused by name."""

from __future__ import annotations

import io
import json
import pickle
import random
import runpy
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui_duca.cache_core.calibration.__main__ import main
from comfyui_duca.cache_core.calibration.sidecar import Sidecar, SidecarError, peek, read, write
from helpers.sidecars import ABOUT, D, K, N, P, R, same, sidecar
from safetensors.torch import load_file, save_file


def refused(path: Path, *sections: str) -> SidecarError:
    """Returns the error of reading an unfit file, which names it and says what to do."""
    with pytest.raises(SidecarError) as caught:
        read(path, sections or None)
    assert caught.value.path == str(path) and caught.value.reason and caught.value.remedy
    assert str(caught.value) == f"{path}: {caught.value.reason}; {caught.value.remedy}"
    return caught.value


def layout(path: Path) -> tuple[int, dict]:
    """Returns where tensor data begins, and the header."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return 8 + length, json.loads(data[8 : 8 + length])


def resaved(path: Path, change) -> Path:
    """Writes the file again with its metadata and tensors passed through `change`, but signs nothing anew. Returns its path."""
    metadata, tensors = layout(path)[1]["__metadata__"], load_file(path)
    change(metadata, tensors)
    save_file(tensors, path, metadata)
    return path


def test_what_is_written_is_read(file):
    back = read(file)
    assert same(back, sidecar())
    assert load_file(file).keys() == {f"{s}.{n}" for s, tensors in back.sections.items() for n in tensors} | {"fingerprint.values"}
    write(file, back)
    assert same(read(file), back)
    assert list(file.parent.iterdir()) == [file]


def test_tensors_that_share_memory_or_are_views_are_kept(tmp_path):
    s, shared = sidecar(), torch.randn(6, 6)
    icc = {"a.0.l.p.A": shared[:, :2], "a.0.l.p.B": shared.T[:2], "a.1.l.p.A": shared[:, :2], "a.1.l.p.B": shared[2:4]}
    fused = torch.randn(4, 2)
    icc |= {"b.0.l.q.A": fused[:2], "b.0.l.q.B": fused[2:], "energy": shared[0, ::2]}
    write(tmp_path / "f", Sidecar(s.about, s.fingerprint, {"icc": icc}))
    back = read(tmp_path / "f").sections["icc"]
    assert all(torch.equal(back[n], icc[n]) for n in icc)


def test_what_was_read_outlives_the_file(file):
    back, before = read(file), sidecar()
    with file.open("r+b") as opened:
        opened.write(b"\0" * file.stat().st_size)
    assert same(back, before)


@pytest.mark.parametrize("section, other", [("forecast", "icc"), ("icc", "forecast")])
def test_a_section_is_read_apart_from_the_other(file, section, other):
    start, header = layout(file)
    data = bytearray(file.read_bytes())
    for name, entry in header.items():
        if name.startswith(other):
            begin, end = (start + o for o in entry["data_offsets"])
            data[begin:end] = bytes(b ^ 255 for b in data[begin:end])
    file.write_bytes(data)
    assert same(read(file, [section]), sidecar(), [section]) and set(read(file, [section]).sections) == {section}
    assert read(file, ()).sections == {} and peek(file).about == ABOUT
    assert "damaged" in refused(file, other).reason and "damaged" in refused(file).reason


def test_a_section_that_is_not_there_or_not_known(file):
    s = sidecar()
    write(file, Sidecar(s.about, s.fingerprint, {"icc": s.sections["icc"]}))
    assert set(read(file).sections) == {"icc"}
    assert "no forecast section" in refused(file, "forecast").reason
    with pytest.raises(ValueError):
        read(file, ["weights"])


def test_peek_lists_without_tensors(file):
    contents = peek(file)
    assert contents.about == ABOUT and contents.fingerprint.matches(sidecar().fingerprint)
    assert {s: set(t) for s, t in contents.tensors.items()} == {s: set(t) for s, t in sidecar().sections.items()}
    assert contents.nbytes("icc") == sum(t.nbytes for t in sidecar().sections["icc"].values())
    assert contents.tensors["forecast"]["uz"].shape == (N, N, D, R) and contents.tensors["forecast"]["uz"].dtype == "F16"


def _places(file: Path) -> dict[str, list[tuple[int, int]]]:
    """Returns the bits to flip, as (byte, bit): all of the length and of the padding, and some in the header and in each tensor.

    In the header one bit in every five bytes is flipped, so that every name, number and hash in it has some.
    """
    rng, (start, header) = random.Random(0), layout(file)
    text = file.read_bytes()[8:start]
    padding = len(text) - len(text.rstrip())
    places = {
        "length": [(byte, bit) for byte in range(8) for bit in range(8)],
        "header": [(min(byte + rng.randrange(5), start - padding - 1), rng.randrange(8)) for byte in range(8, start - padding, 5)],
        "padding": [(byte, bit) for byte in range(start - padding, start) for bit in range(8)],
    }
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (start + o for o in entry["data_offsets"])
            within = {begin, end - 1, *(rng.randrange(begin, end) for _ in range(8))}
            places[name] = [(byte, rng.randrange(8)) for byte in sorted(within)]
    return places


def test_every_flipped_bit_is_refused(file):
    whole, places = file.read_bytes(), _places(file)
    assert places["padding"], "this file should have padding; change a name's length"
    for kind, flips in places.items():
        for byte, bit in flips:
            data = bytearray(whole)
            data[byte] ^= 1 << bit
            file.write_bytes(data)
            try:
                read(file)
            except SidecarError:
                continue
            pytest.fail(f"bit {bit} of byte {byte} ({kind}) went unnoticed")
    assert sum(map(len, places.values())) > 500


def test_garbled_stretches_are_refused(file):
    whole, rng = file.read_bytes(), random.Random(1)
    for _ in range(300):
        data, begin = bytearray(whole), rng.randrange(len(whole))
        stretch = slice(begin, begin + rng.choice((2, 16, 512)))
        data[stretch] = rng.choice((rng.randbytes(len(data[stretch])), bytes(len(data[stretch])), b""))
        if data != whole:
            file.write_bytes(data)
            refused(file)


def test_truncated_and_lengthened_files_are_refused(file):
    whole, (start, header) = file.read_bytes(), layout(file)
    ends = {start + o for name, entry in header.items() if name != "__metadata__" for o in entry["data_offsets"]} - {len(whole)}
    for size in sorted({*range(17), start - 1, start, start + 1, len(whole) - 1, *ends, *(e - 1 for e in ends), *(e + 1 for e in ends)}):
        file.write_bytes(whole[:size])
        refused(file)
        refused(file, "forecast")
        with pytest.raises(SidecarError):
            peek(file)
    for tail in (b"\0", b" ", b"\0" * 8, whole):
        file.write_bytes(whole + tail)
        refused(file)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file({"w": torch.ones(3)}, path)
    assert "no calibration sidecar" in refused(path).reason
    save_file({"w": torch.ones(3)}, path, {"format": "pt"})
    assert "no calibration sidecar" in refused(path).reason
    torch.save({"forecast.gram": torch.ones(3)}, path)
    assert "no safetensors file" in refused(path).reason
    for content in (b"", b"\0" * 64, b"{}", b"\x80\x04." * 30, json.dumps({"about": {}}).encode()):
        path.write_bytes(content)
        refused(path)
    assert "No such file" in refused(tmp_path / "missing").reason
    assert "cannot be read" in refused(tmp_path).reason


def test_a_newer_format_asks_for_an_update(file):
    resaved(file, lambda metadata, _: metadata.update(duca_format="2"))
    assert refused(file).remedy == "update the pack" and "format 2" in refused(file).reason
    resaved(file, lambda metadata, _: metadata.update(duca_format="one"))
    assert "damaged" in refused(file).reason


@pytest.mark.parametrize(
    "change",
    {
        "edited about": lambda m, t: m.update(about=m["about"].replace("euler", "heunn")),
        "other spelling": lambda m, t: m.update(about=m["about"].replace(",", ", ")),
        "metadata missing": lambda m, t: m.pop("fingerprint"),
        "metadata added": lambda m, t: m.update(more=""),
        "no digest": lambda m, t: m.pop("digest"),
        "tensor missing": lambda m, t: t.pop("icc.single.1.linear1.mlp.B"),
        "tensor added": lambda m, t: t.update({"icc.single.1.linear1.mlp.C": torch.ones(2)}),
        "tensor renamed": lambda m, t: t.update({"forecast.Gram": t.pop("forecast.gram")}),
        "other values": lambda m, t: t["forecast.basis"].add_(1),
        "other shape": lambda m, t: t.update({"forecast.basis": t["forecast.basis"].T.contiguous()}),
        "other dtype": lambda m, t: t.update({"forecast.uz": t["forecast.uz"].view(torch.bfloat16)}),
        "NaN": lambda m, t: t["forecast.gram"].fill_(float("nan")),
    }.items(),
    ids=lambda item: item[0],
)
def test_files_that_were_edited_are_refused(file, change):
    refused(resaved(file, change[1]))


def test_a_tensor_listed_twice_is_refused(file):
    """The two entries have one name and each has its own bytes. A plain JSON reader would take the last."""
    data, start = file.read_bytes(), layout(file)[0]
    total = len(data) - start
    twin = json.dumps({"dtype": "F64", "shape": [N], "data_offsets": [total, total + 8 * N]})
    text = data[8:start].rstrip()[:-1] + f',"forecast.sensitivity":{twin}}}'.encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[start:] + bytes(8 * N))
    refused(file)


def _forged(path: Path, change) -> None:
    """Writes a file whose digest is right and whose content breaks the rules: it was changed before it was signed."""
    from comfyui_duca.cache_core.calibration import sidecar_check

    metadata, tensors = layout(path)[1]["__metadata__"], load_file(path)
    about, sections, fingerprint = (json.loads(metadata[k]) for k in ("about", "sections", "fingerprint"))
    change(about, sections, fingerprint, tensors)
    for name, tensor in tensors.items():
        section, _, rest = name.partition(".")
        listed = sections.get(section, {}).get(rest) if isinstance(sections, dict) else None
        if isinstance(listed, dict) and isinstance(listed.get("shape"), list):
            listed |= {"shape": list(tensor.shape), "sha256": sidecar_check.describe(tensor).sha256}
    metadata |= {"about": json.dumps(about), "sections": json.dumps(sections), "fingerprint": json.dumps(fingerprint)}
    save_file(tensors, path, metadata | {"digest": sidecar_check._digest(metadata)})


@pytest.mark.parametrize(
    "change",
    {
        "steps": lambda a, s, f, t: a.update(steps=K + 1, sigmas=[1.0] * (K + 2)),
        "times": lambda a, s, f, t: a.update(times=[1.0] * (N + 1)),
        "noise levels": lambda a, s, f, t: a.update(sigmas=[1.0] * K),
        "gram": lambda a, s, f, t: t.update({"forecast.gram": torch.ones(N, N + 1, dtype=torch.float64)}),
        "uz": lambda a, s, f, t: t.update({"forecast.uz": torch.ones(N, N, D, R + 1).half()}),
        "dimensions": lambda a, s, f, t: t.update({"forecast.uu": torch.ones(N, N, D)}),
        "step_times": lambda a, s, f, t: t.update({"forecast.step_times": torch.ones(N, dtype=torch.float64)}),
        "a plan's length": lambda a, s, f, t: t.update({"forecast.plans": torch.ones(P, K + 1)}),
        "a plan without results": lambda a, s, f, t: t.update({"forecast.plans": torch.ones(P + 1, K)}),
        "results": lambda a, s, f, t: t.update({"forecast.results": torch.ones(P, 3, dtype=torch.float64)}),
        "no plans": lambda a, s, f, t: (s["forecast"].pop("plans"), t.pop("forecast.plans")),
        "energy": lambda a, s, f, t: t.update({"icc.energy": torch.ones(3)}),
        "energy's form": lambda a, s, f, t: t.update({"icc.energy": torch.ones(2, 1)}),
        "no energy": lambda a, s, f, t: (s["icc"].pop("energy"), t.pop("icc.energy")),
        "ranks": lambda a, s, f, t: t.update({"icc.single.1.linear1.mlp.B": torch.ones(2, 4).bfloat16()}),
        "fingerprint": lambda a, s, f, t: t.update({"fingerprint.values": torch.ones(3, 63)}),
        "fingerprint dtype": lambda a, s, f, t: f.update(dtype="load"),
        "fingerprint text": lambda a, s, f, t: f.update(structure=7),
        "a field missing": lambda a, s, f, t: a.pop("seeds"),
        "a field's type": lambda a, s, f, t: a.update(steps="4"),
        "a truth for a number": lambda a, s, f, t: a.update(steps=True),
        "NaN guidance": lambda a, s, f, t: a.update(guidance=float("nan")),
        "a huge number": lambda a, s, f, t: a.update(guidance=10**400),
        "no list": lambda a, s, f, t: a.update(seeds=3),
        "no sections": lambda a, s, f, t: s.clear(),
        "another section": lambda a, s, f, t: s.update(weights={}),
        "an entry's form": lambda a, s, f, t: s["icc"].update({"double.0.img_attn.qkv.q.A": []}),
        "a shape's form": lambda a, s, f, t: s["icc"]["double.0.img_attn.qkv.q.A"].update(shape="7"),
        "a dtype's form": lambda a, s, f, t: s["icc"]["double.0.img_attn.qkv.q.A"].update(dtype=["F16"]),
        "an unpaired factor": lambda a, s, f, t: (s["icc"].pop("single.1.linear1.mlp.B"), t.pop("icc.single.1.linear1.mlp.B")),
    }.items(),
    ids=lambda item: item[0],
)
def test_wrong_content_is_refused_however_well_signed(file, change):
    _forged(file, lambda *parts: None)
    assert same(read(file), sidecar()), "forging itself changes nothing"
    _forged(file, change[1])
    refused(file)


def test_the_error_can_be_sent_between_processes():
    error = SidecarError("a", "b", "c")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "a: b; c"


def test_command_line_shows_a_file_on_a_narrow_console(file, monkeypatch):
    """The console takes ASCII only. The module runs as with `python -m`."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "argv", ["calibration", "show", str(file)])
    monkeypatch.delitem(sys.modules, main.__module__)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(main.__module__, run_name="__main__")
    console.flush()
    shown = console.buffer.getvalue().decode("ascii")
    assert ended.value.code == 0
    for text in ("euler", "emoji \\u263a flux 48", "forecast: 8 tensors", "4 x 4 x 3 x 2", sidecar().fingerprint.short):
        assert text in shown


def cli(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def test_command_line_verifies(file, capsys):
    assert cli("verify", file) == 0 and "sound" in capsys.readouterr().out
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert cli("verify", file) == 1
    said = capsys.readouterr()
    assert not said.out and str(file) in said.err and "copy the file again" in said.err


@pytest.mark.parametrize("wrong", [(), ("melt", "f"), ("show",), ("shrink", "f", "g"), ("shrink", "f", "g", "--rank", "0")])
def test_a_wrong_command_line_is_2(wrong):
    with pytest.raises(SystemExit) as ended:
        cli(*wrong)
    assert ended.value.code == 2


def test_command_line_shrinks(file):
    out = file.with_name("small.safetensors")
    assert cli("shrink", file, out, "--rank", 4, "--drop", "forecast") == 0
    small, before = read(out), sidecar()
    assert small.about == replace(ABOUT, rank=4) and set(small.sections) == {"icc"}
    for name, tensor in before.sections["icc"].items():
        cut = tensor if name == "energy" else tensor[:, :4] if name.endswith("A") else tensor[:4]
        assert torch.equal(small.sections["icc"][name], cut)
    assert cli("shrink", file, file, "--drop", "icc") == 0
    assert set(read(file).sections) == {"forecast"} and read(file).about == replace(ABOUT, rank=0, method="")
    for wrong in (("--drop", "icc"), ("--drop", "forecast"), ("--rank", 2)):
        assert cli("shrink", file, out, *wrong) == 1
    assert set(read(out).sections) == {"icc"}
