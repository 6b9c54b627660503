"""Tools that do not end are stopped, with all that they have started."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fbopt._build import compiler
from fbopt._build.compiler import BuildError


def test_a_compiler_that_never_ends_is_stopped_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setenv("FBOPT_BUILD_MINUTES", "0.02")
    program = f"sleep 600 & echo $! > {tmp_path}/child; wait"
    begin = time.monotonic()
    with pytest.raises(BuildError, match=r"not ended after 0.02 minutes; .*FBOPT_BUILD_MINUTES"):
        compiler.run(["sh", "-c", program])
    assert time.monotonic() - begin < 60
    child = int((tmp_path / "child").read_text())
    for _ in range(200):
        if not _lives(child):
            return
        time.sleep(0.02)
    pytest.fail("its child lives on")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False


@pytest.mark.parametrize("words", ["0", "-1", "soon", "nan"])
def test_limits_are_minutes(words, monkeypatch):
    monkeypatch.setenv("FBOPT_WAIT_MINUTES", words)
    with pytest.raises(BuildError, match=r"WAIT_MINUTES is .*; set .* to a number of minutes"):
        compiler.limit("FBOPT_WAIT_MINUTES")


def test_limits_have_defaults(monkeypatch):
    monkeypatch.delenv("FBOPT_WAIT_MINUTES", raising=False)
    assert compiler.limit("FBOPT_WAIT_MINUTES") == compiler.LIMITS["FBOPT_WAIT_MINUTES"]
    monkeypatch.setenv("FBOPT_WAIT_MINUTES", " 2.5 ")
    assert compiler.limit("FBOPT_WAIT_MINUTES") == 2.5
