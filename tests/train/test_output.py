"""Training whose output goes away: saved, whatever becomes of stdout and stderr."""

from __future__ import annotations

import contextlib
import io
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from fbopt.train import output
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.output import GuardedStream, guarded, nobody_reads

ROOT = Path(__file__).resolve().parents[2]
WAYS = {  # the shell's words after the command, its status, whether it runs to its end
    "head": ("| head -n 1 >/dev/null; exit ${PIPESTATUS[0]}", 141, False),
    "head of both": ("2>&1 | head -n 1 >/dev/null; exit ${PIPESTATUS[0]}", 141, False),
    "closed": (">&-", 0, True),
    "both closed": (">&- 2>&-", 0, True),
    "all closed": ("<&- >&- 2>&-", 0, True),
    "full": (">/dev/full", 0, True),
    "both full": (">/dev/full 2>&1", 0, True),
}


@pytest.mark.parametrize("way", WAYS)
def test_training_is_saved_whatever_becomes_of_its_output(tiny, tmp_path, way):
    words, status, ends = WAYS[way]
    if "/dev/full" in words and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    steps = 4 if ends else 4000
    command = (
        f"{sys.executable} -m fbopt.train --data {tiny} --recipe fb-clip --width 4 --log-every 1 "
        f"--steps {steps} --processes 1 --out run"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FBOPT_BACKEND": "reference"}
    done = subprocess.run(
        ["bash", "-c", f"{command} {words}"], cwd=tmp_path, env=environment, capture_output=True
    )
    assert done.returncode == status, done.stderr
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
    folder = RunFolder(tmp_path / "run")
    assert folder.result.exists() == ends
    ((step, _), *_) = folder.checkpoints()
    assert step == steps if ends else 0 < step < steps


def test_a_terminal_without_unicode_shows_escapes():
    raw = io.BytesIO()
    stream = GuardedStream(io.TextIOWrapper(raw, encoding="ascii"))
    print("λ = 1 ± 0", file=stream, flush=True)
    assert raw.getvalue() == b"\\u03bb = 1 \\xb1 0\n" and stream.failure is None


def test_what_fails_is_left_alone(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    class Gone(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Full())
    with guarded() as output:
        print("lost")
        assert output.failure.errno == 28 and not nobody_reads() and not output.isatty()
    monkeypatch.setattr(sys, "stdout", Gone())
    with guarded():
        print("lost", flush=True)
        assert nobody_reads()
    assert not nobody_reads()
    monkeypatch.setattr(sys, "stdout", None)
    with guarded() as output:
        print("lost", flush=True)
        assert output.encoding == "utf-8"


def fill(descriptor: int) -> None:
    """Until there is no room for a while: the system carries on what is written to terminals."""
    room = select.poll()
    room.register(descriptor, select.POLLOUT)
    os.set_blocking(descriptor, False)
    while room.poll(300):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(descriptor, b"x" * 256)
    os.set_blocking(descriptor, True)


def empty(descriptor: int) -> bytes:
    """What there is to read, until nothing more comes for a while."""
    some, found = select.poll(), b""
    some.register(descriptor, select.POLLIN)
    while some.poll(300):
        found += os.read(descriptor, 65536)
    return found


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_full_stream_that_nobody_reads_is_not_waited_for(monkeypatch, kind):
    """The other stream is told, once; when somebody reads again, what is new is printed."""
    monkeypatch.setattr(output, "PATIENCE_SECONDS", 0.05)
    reader, writer = os.pipe() if kind == "pipe" else os.openpty()
    said = io.StringIO()
    with open(writer, "w") as full, open(reader, "rb", buffering=0):
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", said)
        with guarded() as guard:
            print("first", flush=True)
            assert b"first" in empty(reader)
            fill(writer)
            for _ in range(3):
                print("lost " * 100, flush=True)
            print("lost, too", file=sys.stderr)
            assert guard.failure is None and not nobody_reads()
            empty(reader)
            print("read", flush=True)
        found = empty(reader).split()
    assert b" ".join(found) == b"(what was printed while nobody read is lost) read"
    told = "fbopt: nobody has read stdout for 0 s; the work goes on, and what it prints is lost\n"
    assert said.getvalue() == told + "lost, too\n"
