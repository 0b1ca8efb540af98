"""A sidecar is written whole or not at all: if a writer is killed, the disk is full, writing is forbidden, or two write at once."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from comfyui_duca.cache_core.calibration.sidecar import About, Sidecar, SidecarError, read, write
from helpers.forking import Forked
from helpers.sidecars import ROOT, same, sidecar

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the writers are forked")

# A process of its own, which forks: the tests' process has the host's threads. Versions differ in every tensor and in size.
_DRIVER = """
import os, random, shutil, signal, sys, time
sys.path.insert(0, ROOT)
import torch
from cache_core.calibration.fingerprint import Fingerprint
from cache_core.calibration.sidecar import About, Sidecar, SidecarError, peek, read, write
torch.set_num_threads(1)

def version(v):
    about = About("flux", f"v{v}", "euler", "simple", 4, 1.0, (1.0,) * 5, (1.0,) * 4, (8, 8), 1, (v,), 8, "svd", {}, "2026-01-02")
    icc = {f"s.{i}.l.p.{f}": torch.full(s, float(v)) for i in range(4) for f, s in (("A", (3000 + v, 8)), ("B", (8, 3000)))}
    icc["energy"] = torch.full((4,), float(v))
    return Sidecar(about, Fingerprint.of([("w", torch.full((8, 8), float(v)))]), {"icc": icc})

def whole():
    s = read(path)
    v = s.about.seeds[0]
    assert all((t == v).all() for t in s.sections["icc"].values()) and (s.fingerprint.values == v).all()
    assert s.sections["icc"]["s.0.l.p.A"].shape[0] == 3000 + v
    return v

def child(body):
    pid = os.fork()
    if pid:
        return pid
    try:
        body()
    except BaseException as error:
        print("child:", repr(error), flush=True)
        os._exit(1)
    os._exit(0)

def strays():
    return [n for n in os.listdir(os.path.dirname(path)) if n != os.path.basename(path)]
"""


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    process = Forked(f"ROOT = {str(ROOT)!r}" + _DRIVER)
    yield process
    process.close()


@pytest.fixture
def driven(forked, tmp_path) -> Callable[[str], str]:
    return lambda body: forked.run(body, path=str(tmp_path / "f.safetensors"))


@needs_fork
def test_a_writer_killed_at_any_moment_leaves_a_whole_file(driven):
    said = driven(
        """
def forever():
    v = 1
    while True:
        write(path, version(v))
        v = v % 7 + 1

def timed():
    begin = time.monotonic()
    write(path, version(0))
    return time.monotonic() - begin

took = min(timed() for _ in range(5))
rng, seen, left, rounds = random.Random(0), {whole()}, 0, 0
while rounds < 25 or ((len(seen) < 2 or left < 3) and rounds < 200):
    rounds += 1
    pid = child(forever)
    time.sleep(rng.uniform(0.0, (4 + rounds / 10) * took))  # longer and longer, as this machine may have become busy since
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    seen.add(whole())
    left += bool(strays())
    assert len(strays()) <= 1, strays()
    for name in strays():
        shutil.rmtree(os.path.join(os.path.dirname(path), name))
print(len(seen), left)
""",
    )
    seen, left = map(int, said.split())
    assert seen > 1, "some writes got through"
    assert left > 2, "some were killed half-way"


@needs_fork
@pytest.mark.parametrize("moment, survives", [("fsync", 1), ("replace", 1), ("rmdir", 2)])
def test_a_writer_killed_at_a_known_moment(driven, moment, survives):
    """fsync: all is written but not yet in place. replace: at the rename. rmdir: after it, as the writer's own folder is removed."""
    driven(
        f"""
write(path, version(1))
def body():
    os.{moment} = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
    write(path, version(2))
pid = child(body)
assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
assert whole() == {survives}
assert len(strays()) == 1, strays()
write(path, version(3))
assert whole() == 3
""",
    )


@needs_fork
def test_readers_see_one_version_while_two_write(driven):
    said = driven(
        """
write(path, version(0))
stop, end = path + "-stop", time.monotonic() + 30
def writer(first):
    def body():
        while not os.path.exists(stop) and time.monotonic() < end:
            write(path, version(first))
            write(path, version(first + 1))
    return child(body)
pids = [writer(1), writer(10)]
seen = []
while (len(seen) < 60 or len(set(seen)) < 4) and time.monotonic() < end:
    seen.append(whole())
    assert peek(path).about.family == "flux"
open(stop, "w").close()
for pid in pids:
    assert os.waitpid(pid, 0)[1] == 0
os.unlink(stop)
assert not strays()
print(len(seen), len(set(seen)))
""",
    )
    reads, versions = map(int, said.split())
    assert reads >= 60 and versions >= 4, said


def strays(path: Path) -> list[str]:
    return [p.name for p in path.parent.iterdir() if p != path]


def test_what_killed_writers_left_is_cleared_after_an_hour(file):
    old, fresh, foreign = (file.with_name(n) for n in (f".{file.name}.aa.part", f".{file.name}.bb.part", ".other.aa.part"))
    of_older_pack = file.with_name(f".{file.name}.cc.part")
    of_older_pack.write_bytes(b"half")
    for path in (old, fresh, foreign):
        path.mkdir()
        (path / "written").write_bytes(b"half")
    for path in (old, foreign, of_older_pack):
        os.utime(path, (time.time() - 3700,) * 2)
    write(file, sidecar(1))
    assert [path.exists() for path in (old, of_older_pack, fresh, foreign)] == [False, False, True, True]


def _raises(error: BaseException):
    def instead(*_args, **_kwargs):
        raise error

    return instead


@pytest.mark.parametrize(
    "where, error",
    [
        ("os.fsync", OSError(errno.ENOSPC, "No space left on device")),
        ("os.replace", OSError(errno.EIO, "Input/output error")),
        ("os.replace", PermissionError(errno.EACCES, "Permission denied")),
        ("pathlib.Path.mkdir", PermissionError(errno.EACCES, "Permission denied")),
        ("pathlib.Path.mkdir", OSError(errno.EROFS, "Read-only file system")),
    ],
)
def test_a_failure_keeps_the_old_file_and_leaves_nothing(file, monkeypatch, where, error):
    with monkeypatch.context() as patched:
        patched.setattr(where, _raises(error))
        patched.setattr("time.sleep", lambda _seconds: None)  # a rename that is refused is tried again after pauses
        with pytest.raises(SidecarError) as caught:
            write(file, sidecar(1))
    assert caught.value.path == str(file) and error.strerror in caught.value.reason and "allow writing" in caught.value.remedy
    assert same(read(file), sidecar()) and not strays(file)


def test_a_file_that_a_reader_has_open_is_replaced_a_moment_later(file, monkeypatch):
    """As on Windows, where the rename is refused at first."""
    failures, real = [PermissionError(errno.EACCES, "Access is denied")] * 2, os.replace

    def replace(*args):
        if failures:
            raise failures.pop()
        real(*args)

    monkeypatch.setattr(os, "replace", replace)
    write(file, sidecar(1))
    assert same(read(file), sidecar(1)) and not strays(file) and not failures


@pytest.mark.parametrize("where", ["os.fsync", "os.replace"])
def test_ctrl_c_keeps_the_old_file_and_leaves_nothing(file, monkeypatch, where):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(where, _raises(KeyboardInterrupt()))
        write(file, sidecar(1))
    assert same(read(file), sidecar()) and not strays(file)


@needs_fork
def test_a_disk_that_fills_up_while_writing(driven):
    """The system itself refuses a write half-way. Here it does so at a limit on the file's size."""
    driven(
        """
import resource
write(path, version(1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (0, 5000, 300000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write(path, version(2))
    except SidecarError as error:
        assert "make room" in error.remedy, error
    else:
        raise AssertionError("nothing was raised")
    assert whole() == 1 and not strays()
""",
    )


def test_folders_that_cannot_be_written_to(tmp_path, file):
    for path in (file / "f", tmp_path / "missing" / "f", tmp_path):
        with pytest.raises(SidecarError) as caught:
            write(path, sidecar())
        assert caught.value.path == str(path) and caught.value.remedy
    assert same(read(file), sidecar()) and not strays(file)


@needs_fork
def test_a_read_only_folder(driven):
    """Root may write everywhere, so the writer drops root's rights; and the folder is not inside one of root's own."""
    driven(
        """
import tempfile
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "f.safetensors")
    write(path, version(1))
    os.chmod(folder, 0o555)
    def body():
        if os.getuid() == 0:
            os.setuid(65534)
        for taken in (path, os.path.join(folder, "new")):
            try:
                write(taken, version(2))
            except SidecarError as error:
                assert "allow writing" in error.remedy and error.path == taken, error
            else:
                raise AssertionError("nothing was raised")
        assert whole() == 1
    pid = child(body)
    assert os.waitpid(pid, 0)[1] == 0
    os.chmod(folder, 0o755)
    assert os.listdir(folder) == ["f.safetensors"]
""",
    )


def test_a_file_that_may_not_be_read(file, monkeypatch):
    monkeypatch.setattr("pathlib.Path.open", _raises(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(SidecarError) as caught:
        read(file)
    assert "allow reading it" in caught.value.remedy and "Permission denied" in caught.value.reason


def test_others_may_read_what_is_written(file):
    usual = file.with_name("usual")
    usual.touch()
    assert file.stat().st_mode == usual.stat().st_mode


def test_a_link_stays_a_link(file):
    link = file.with_name("link")
    link.symlink_to(file)
    write(link, sidecar(1))
    assert link.is_symlink() and same(read(file), sidecar(1))


def _with(section: str, name: str, tensor: torch.Tensor | None) -> dict:
    sections = {s: dict(tensors) for s, tensors in sidecar().sections.items()}
    sections.setdefault(section, {}).update({} if tensor is None else {name: tensor})
    if tensor is None:
        sections[section].pop(name, None)
    return sections


@pytest.mark.parametrize(
    "sections",
    {
        "NaN": _with("forecast", "gram", torch.full((4, 4), float("nan"), dtype=torch.float64)),
        "shape": _with("forecast", "basis", torch.ones(10, 3)),
        "dtype": _with("forecast", "gram", torch.ones(4, 4)),
        "number": _with("forecast", "sensitivity", torch.ones((), dtype=torch.float64)),
        "energy missing": _with("icc", "energy", None),
        "energy of more parts": _with("icc", "energy", torch.ones(3)),
        "plans": _with("forecast", "plans", torch.ones(2, 5)),
        "results": _with("forecast", "results", torch.ones(3, 3, dtype=torch.float64)),
        "integers": _with("icc", "a.0.l.p.A", torch.ones(3, 3, dtype=torch.int32)),
        "missing": _with("forecast", "uz", None),
        "extra": _with("forecast", "more", torch.ones(3)),
        "unpaired": _with("icc", "a.0.l.p.A", torch.ones(3, 3)),
        "empty": _with("icc", "a.0.l.p.A", torch.ones(0, 3)),
        "name": _with("icc", "a/0.A", torch.ones(3, 3)),
        "unknown": _with("weights", "w", torch.ones(3)),
        "no icc": sidecar().sections | {"icc": {}},
        "none": {},
    }.items(),
    ids=lambda item: item[0],
)
def test_nothing_is_written_that_could_not_be_read(file, sections):
    with pytest.raises(SidecarError, match="not written"):
        write(file, Sidecar(sidecar().about, sidecar().fingerprint, sections[1]))
    assert same(read(file), sidecar())


@pytest.mark.parametrize(
    "wrong",
    [
        {"guidance": float("nan")},
        {"steps": 5},
        {"sigmas": (1.0,)},
        {"times": (1.0,)},
        {"seeds": 3},
        {"created": None},
        {"versions": {"a": 1}},
    ],
)
def test_nor_with_a_wrong_description(file, wrong):
    about = About(**{**vars(sidecar().about), **wrong})
    with pytest.raises(SidecarError, match="not written"):
        write(file, Sidecar(about, sidecar().fingerprint, sidecar().sections))
    assert same(read(file), sidecar())
