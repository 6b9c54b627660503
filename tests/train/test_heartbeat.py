"""A process that answers no more is named while the others wait, and when they give up."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fbopt import _distributed
from fbopt._distributed import Collectives, Meetings, PeerError
from fbopt.train import heartbeat
from fbopt.train.checkpoint import atomic
from fbopt.train.distributed import Unanswered, distributed_context
from fbopt.train.heartbeat import Heartbeat

ROOT = Path(__file__).resolve().parents[2]


class Store(dict):
    """What a heartbeat needs of torch's stores."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    return now


class Job:
    """Heartbeats of three processes without their threads, of which 0 and 2 are here."""

    def __init__(self, minutes: float = 30) -> None:
        self.store = Store()
        self.here = [Heartbeat(self.store, rank, 3, minutes) for rank in (0, 2)]
        self.counts = {1: 0, 2: 0}

    def beat(self, *ranks: int, met: int = 0) -> None:
        for rank in ranks:
            self.counts[rank] += 1
            self.store.set(f"{rank}", f"{self.counts[rank]} {met} {40 + rank} on host{rank}")
        for one in self.here:
            one._listen()
            one._tell_of_silent()
            one._tell_of_late()


def test_who_counts_no_more_is_silent_until_it_is_back(clock, capsys):
    job = Job()
    mine = job.here[0]
    job.beat(1, 2)
    clock[0] = 29
    job.beat(2)
    assert mine.silent == []
    clock[0] = 31
    job.beat(2)
    assert mine.silent == [1] and mine.name(1) == "process 1 (41 on host1)"
    said = capsys.readouterr().err
    assert said == (
        "fbopt train: process 1 (41 on host1) has not been heard of for 30 s; it is waited for at "
        "most 30 minutes\n"
    )
    assert mine.why(1800.0)[1] and not job.here[1].why(1800.0)[1]  # process 0 tells
    assert mine.why(1800.0)[0] == (
        "process 1 (41 on host1) did not answer for 30 minutes: look after it"
    )
    clock[0] = 40
    job.beat(1, 2)
    assert mine.silent == [] and mine.why(1800.0) is None
    assert capsys.readouterr().err == "fbopt train: process 1 (41 on host1) is back\n"


def test_where_process_0_is_silent_another_tells(clock, capsys):
    store = Store()
    one = Heartbeat(store, 1, 2, 0.5)
    store.set("0", "1 0 40 on lead")
    one._listen()
    clock[0] = 8  # a quarter of the limit
    one._tell_of_silent()  # a store in a stopped process does not answer
    assert "process 0 (40 on lead) has not been heard of for 8 s" in capsys.readouterr().err
    assert one.why(30.0) == (
        "process 0 (40 on lead) did not answer for 0.5 minutes: look after it", True
    )  # fmt: skip


def test_who_runs_but_does_not_come_is_named(clock, capsys, monkeypatch):
    """Process 1 beats on, but has come to two meetings, where the others wait in the third."""
    monkeypatch.setattr(heartbeat, "meetings", Meetings())
    heartbeat.meetings.count, heartbeat.meetings.since = 3, 0.0
    job = Job()
    for now in range(0, 200, 10):
        clock[0] = now
        job.beat(1, met=2)
        job.beat(2, met=3)
        assert job.here[0].behind == [1]
    said = "runs, but has not come to where the others wait since 180 s"
    assert capsys.readouterr().err == (
        f"fbopt train: process 1 (41 on host1) {said}; it is waited for at most 30 minutes\n"
    )
    assert job.here[0].why(5.0) is None  # a connection that was lost, not the end of the time
    assert "process 1 (41 on host1) did not come to where" in job.here[0].why(1799.0)[0]
    job.beat(1, met=3)
    assert job.here[0].behind == []


def test_collectives_are_counted(monkeypatch):
    monkeypatch.setattr(_distributed, "meetings", Meetings())
    one = Collectives()
    one.world_size = 2
    with one._sending("sum"):
        assert _distributed.meetings.count == 1 and _distributed.meetings.since is not None
    assert _distributed.meetings.since is None
    with (
        pytest.raises(PeerError, match="process 0 of 2 could not sum") as raised,
        one._sending("sum"),
    ):
        raise RuntimeError("timed out")
    assert _distributed.meetings.count == 2 and raised.value.seconds >= 0


def test_processes_that_never_meet_are_told(monkeypatch, capsys):
    """Of two processes only this one was started."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": port}
    values |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "test"}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    met = rf"process 0 of 2 has not met the others at localhost:{port} within [1-9]\d* s"
    with pytest.raises(Unanswered, match=met), distributed_context("cpu", 0.03):
        pass
    waits = f"process 0 of 2 waits for the others at localhost:{port}, at most 0.03 minutes"
    assert waits in capsys.readouterr().err


def test_a_stopped_process_is_named_and_the_run_ends(tiny, tmp_path):
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    common = os.environ | {
        "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "GLOO_SOCKET_IFNAME": "lo",
        "FBOPT_BACKEND": "reference", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    words = ["--data", tiny, "--recipe", "fb-clip", "--width", "4", "--steps", "100000"]
    words += ["--log-every", "1", "--chunk-size", "16", "--out", "run", "--timeout", "0.2"]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "fbopt.train", *words],
            cwd=tmp_path,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        end = time.monotonic() + 120
        while len(atomic.read_lines(tmp_path / "run" / "metrics.jsonl")) < 3:
            assert time.monotonic() < end and ranks[0].poll() is None
            time.sleep(0.05)
        ranks[1].send_signal(signal.SIGSTOP)
        _, said = ranks[0].communicate(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert ranks[0].returncode == 1
    name = f"process 1 ({ranks[1].pid} on {os.uname().nodename})"
    assert f"fbopt train: {name} has not been heard of for" in said
    assert f"fbopt train: {name} did not answer for 0.2 minutes: look after it" in said
    assert "Traceback" not in said
