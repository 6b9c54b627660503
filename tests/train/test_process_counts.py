"""How many processes share a run, by its options, its chunks and the cores of the machine."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs

from fbopt.train import launch, processes
from fbopt.train.__main__ import main
from fbopt.train.config.diff import check_options, differences, given
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.resolve import resolve
from fbopt.train.loop import train
from fbopt.train.processes import settle

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="processes are started on Linux alone"
)


@pytest.fixture
def cores(monkeypatch):
    """A machine with four cores."""
    monkeypatch.setattr(processes, "usable_cores", lambda: 4)


def number(groups: int = 32, **changes) -> tuple[int, int | None]:
    """The processes and threads that a run gets."""
    found = settle(resolve(Options(device="cpu", **changes)), groups)
    return found.processes, found.threads


def test_the_small_network_gets_a_process_for_each_core(cores):
    assert number() == (4, 1)
    assert number(data="digits", recipe="fb-strong") == (4, 1)
    assert number(threads=2) == (2, 2)
    assert number(threads=3) == (1, 3)


@pytest.mark.parametrize(
    ("groups", "expected"), [(1, 1), (2, 1), (4, 2), (7, 3), (8, 4), (9, 3), (10, 4), (1000, 4)]
)
def test_no_more_than_shorten_a_step(cores, groups, expected):
    """Nine groups are three for each of three processes; a fourth would save nothing."""
    assert number(groups) == (expected, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "sgd"},
        {"switch_at": 2},
        {"accumulation": "float32"},
        {"model": "resnet20"},
        {"scale": "images", "model": "cnn"},
        {"data": "cifar10"},
    ],
)
def test_everything_else_runs_in_one(cores, changes):
    assert number(**changes)[0] == 1


@pytest.mark.parametrize(("groups", "expected"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 3), (9, 3)])
def test_a_group_of_many_chunks_is_work_for_a_process(cores, groups, expected):
    assert number(groups, recipe="fb-strong") == (expected, 1)


def test_a_number_is_taken_as_it_is(cores):
    assert number(processes=1) == (1, 1)
    assert number(groups=2, processes=9) == (9, 1)
    assert number(model="resnet20", processes=2) == (2, None)
    assert number(model="resnet20", processes=2, threads=3) == (2, 3)
    assert number(accumulation="float32", processes=3) == (3, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"processes": 0}, "--processes 0: has to be auto, or at least 1"),
        ({"processes": "both"}, "--processes both: has to be auto"),
        ({"processes": 2, "recipe": "sgd"}, "--processes 2: sgd's mini-batches are taken in one"),
        ({"processes": 2, "switch_at": 1}, "--switch-at's mini-batches are taken in one process"),
    ],
)
def test_numbers_that_cannot_be(changes, words):
    with pytest.raises(OptionsError, match=words):
        resolve(Options(**changes))


def test_where_processes_cannot_be_forked(cores, monkeypatch):
    monkeypatch.setattr(processes.sys, "platform", "darwin")
    assert number() == (1, 1)
    with pytest.raises(OptionsError, match=r"torchrun --nproc-per-node 2 -m fbopt\.train"):
        number(processes=2)


def test_where_processes_could_not_talk_to_each_other(cores, monkeypatch):
    def unreachable(address):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(processes.socket, "create_server", unreachable)
    assert number() == (1, 1)
    with pytest.raises(OptionsError, match=r"localhost, which does not answer \(Network is"):
        number(processes=2)


def test_where_signals_would_not_arrive(cores):
    found = []
    thread = threading.Thread(target=lambda: found.append(number()))
    thread.start()
    thread.join()
    assert found == [(1, 1)]


def test_a_call_from_python_starts_none(tmp_path):
    with pytest.raises(OptionsError, match=r"--processes 2: train\(\) trains in this process"):
        train(Options(processes=2, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_depend_on_it():
    made = resolve(Options(processes=2))
    check_options("the run", made.as_json(), resolve(Options(processes=7)))
    assert differences(made.as_json(), replace(made, processes=1).as_json()) == []
    assert given(Options(resume=Path("run")))["processes"] == "auto"
    assert given(Options(resume=Path("run"), processes=3))["processes"] == 3


def test_the_program_starts_as_many(cores, tmp_path, monkeypatch):
    started = []

    class Launcher:
        def __init__(self, begin, loaded) -> None:
            started.append((begin.options.processes, begin.options.threads, len(loaded.data.train)))

        def run(self) -> int:
            return 0

    monkeypatch.setattr(launch, "Launcher", Launcher)
    tiny = tiny_runs.data(tmp_path)
    assert main(["--data", tiny, "--chunk-size", "8", "--device", "cpu"]) == 0
    assert started == [(4, 1, 75)]  # ten chunks
