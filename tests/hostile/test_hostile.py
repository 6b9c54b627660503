"""The hostile suites themselves: a hang, a growth or a wrong end is one, and links lose packets."""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path

import pytest

from tests.hostile import __main__ as program
from tests.hostile import hangs, link
from tests.hostile.growth import Sample, slope
from tests.hostile.long import GROWTH, _row
from tests.hostile.tables import Row, markdown
from tests.hostile.trials import TRIALS, Program, Trial

WAIT = "import time; print('I wait for rain', flush=True); time.sleep({}); exit('it rained')"


@pytest.mark.parametrize(
    ("seconds", "status", "end", "holds"),
    [(0, 1, "it rained", True), (0, 2, "it rained", False), (0, 1, "sun", False),
     (60, 1, "it rained", False)],
)  # fmt: skip
def test_a_trial_holds_only_as_it_has_to_be(tmp_path, monkeypatch, seconds, status, end, holds):
    monkeypatch.setattr(hangs, "LONGEST", 1.0 if seconds else 100.0)

    def start(folder: Path):
        yield (one := Program(folder, sys.executable, "-c", WAIT.format(seconds)))
        if seconds:
            one.wait_for_words("I wait")

    row = hangs.run(Trial("drought", "1 s", "I wait", end, status, start), tmp_path / "trial")
    assert row.holds == holds
    assert row.cells[2] == "I wait for rain"
    assert ("HANGS" in row.cells[4]) == (seconds > 0)


def test_causes_are_told_apart():
    assert len({one.cause for one in TRIALS}) == len(TRIALS) > 30


def samples(per_step: float) -> list[Sample]:
    """A hundred samples of ten steps of 2 s, which hold so many bytes more after each."""
    return [Sample(0.2 * i, i // 10, int(10**8 + per_step * i / 10), 5, 2, 7) for i in range(100)]


def test_growth_is_per_step():
    assert slope(samples(5000.0), "memory") == pytest.approx(5000, rel=0.01)
    assert slope(samples(5000.0), "handles") == 0
    case = GROWTH[2]
    assert _row(case, samples(0.0)).holds and not _row(case, samples(50_000.0)).holds
    leaky = [s._replace(handles=5 + s.step) for s in samples(0.0)]
    assert not _row(case, leaky).holds
    full = [s._replace(files=7 + s.step) for s in samples(0.0)]
    assert not _row(case, full).holds


def test_tables_go_to_their_places(tmp_path, monkeypatch):
    (page := tmp_path / "docs" / "robustness" / "page.md").parent.mkdir(parents=True)
    page.write_text("A\n<!-- python -m tests.hostile hangs -->\nold\n<!-- end -->\nZ\n")
    monkeypatch.setattr(program, "ROOT", tmp_path)
    for _ in range(2):
        program.keep("hangs", markdown(("a", "b"), [Row(("1", "x|y"), True)]))
    mark = "<!-- python -m tests.hostile hangs -->"
    table = "| a | b |\n| --- | --- |\n| 1 | x\\|y |\n"
    assert page.read_text() == f"A\n{mark}\n\n{table}\n<!-- end -->\nZ\n"


@pytest.mark.skipif(link.obstacle() is not None, reason=f"two hosts: {link.obstacle()}")
def test_a_link_carries_loses_and_is_cut():
    """Datagrams from one namespace to the other."""
    with link.Link(loss=0.5, seed=3) as cable:
        received, sent = [], threading.Event()
        with link._within(cable.spaces[1]):
            there = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        there.bind((link.ADDRESSES[1], 5005))
        there.settimeout(1.0)
        with link._within(cable.spaces[0]):
            here = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

        def receive() -> None:
            while not (sent.is_set() and not _next(there, received)):
                pass

        def _next(end: socket.socket, into: list[bytes]) -> bool:
            try:
                into.append(end.recv(100))
            except TimeoutError:
                return False
            return True

        reader = threading.Thread(target=receive)
        reader.start()
        for number in range(100):
            here.sendto(b"%d" % number, (link.ADDRESSES[1], 5005))
        sent.set()
        reader.join(60)
        assert 20 < len(received) < 80 and cable.dropped > 20
        before = len(received)
        cable.cut()
        here.sendto(b"lost", (link.ADDRESSES[1], 5005))
        assert not _next(there, received) and len(received) == before
        here.close()
        there.close()
