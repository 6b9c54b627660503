"""Freed memory stays in the process of the training program."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
# Allocates blocks that glibc would map and unmap each time; prints the page faults.
PROGRAM = """
import resource, torch
from fbopt.train.malloc import keep_freed
print(keep_freed() if {keep} else None)
for turn in range(20):
    if turn == 10:  # by now the heap has grown as far as it has to
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(3 * 2**22)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(keep: bool, **environment: str) -> tuple[str, int]:
    known = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM.format(keep=keep)]
    done = subprocess.run(
        command, env=known | environment, check=True, capture_output=True, text=True
    )
    kept, pages = done.stdout.split()
    return kept, int(pages)


@glibc
def test_pages_are_not_mapped_again():
    (kept, pages), (_, usual) = run(True), run(False)
    assert kept == "True"
    assert usual >= 10 * 20  # 48 MB, also in pages of 2 MB
    assert pages < usual / 10


@glibc
@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_"])
def test_the_users_own_choice_stays(name):
    value = "glibc.malloc.trim_threshold=131072" if name == "GLIBC_TUNABLES" else "131072"
    kept, pages = run(True, **{name: value})
    assert kept == "False" and pages >= 10 * 20


def test_other_systems_are_left_alone(monkeypatch):
    from fbopt.train import malloc

    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: object())
    for name in (*malloc._SET_BY_USER, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    assert malloc.keep_freed() is False
