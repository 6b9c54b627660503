"""`fbopt train --processes`: the run of one process from several, their signals and their ends.

All jobs are started at the same time, forked from one process that has imported torch already.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faulty_train
import pytest
import tiny_runs

from fbopt._build import load
from fbopt.train import launch, loop
from fbopt.train.__main__ import main
from fbopt.train.checkpoint import atomic
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import Options
from fbopt.train.loop import train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform != "linux", reason="processes are started on Linux alone"),
]

OTHER_RULE = {"optimizer": "muon", "lr": 0.02, "clip_history": 2, "agc": 0.05}
LONG = 120.0  # seconds after which something hangs


def options(tiny: str, out: Path, **changes: Any) -> Options:
    """Ten steps on five chunks, the last ragged, with penalty, clipping, BatchNorm and dropout."""
    common = {"chunk_size": 16, "steps": 10, "log_every": 1, "eval_every": 5, "processes": 2}
    return tiny_runs.with_noise(tiny, out, **(common | changes))


class Job:
    """`fbopt train` in a session of its own, with its output in files."""

    def __init__(self, wanted: Options, fault: str = "", read_lines: int | None = None) -> None:
        self.out = wanted.out
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fbopt.train.launch", "torchvision.models.resnet"])
        words = tiny_runs.command_line(wanted)
        self.process = context.Process(target=work, args=(words, self.out, fault, read_lines))
        self.process.start()

    def file(self, suffix: str) -> Path:
        return self.out.with_name(f"{self.out.name}.{suffix}")

    def wait_for(self, marker: str) -> None:
        wait_until(self.file(marker).exists, self.process.is_alive)

    def finish(self) -> tuple[int | None, str, str]:
        """The exit status, stdout and stderr."""
        self.process.join(LONG)
        return self.process.exitcode, self.file("out").read_text(), self.file("err").read_text()


def work(words: list[str], out: Path, fault: str, read_lines: int | None) -> None:
    """Run the program in a process of its own, whose stdout closes after so many lines."""
    os.setsid()
    os.environ |= {"FAULT": fault, "MARKER": f"{out}."}
    faulty_train.install()
    with open(f"{out}.out", "w") as stdout, open(f"{out}.err", "w") as stderr:
        os.dup2(stderr.fileno(), 2)
        if read_lines is None:
            os.dup2(stdout.fileno(), 1)
        else:
            receive, send = os.pipe()
            os.dup2(send, 1)
            os.close(send)
            if os.fork() == 0:
                os.close(1)
                with open(receive) as pipe:
                    stdout.writelines(pipe.readline() for _ in range(read_lines))
                    stdout.flush()
                os._exit(0)
            os.close(receive)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    sys.exit(main(words))


def wait_until(done: Callable[[], bool], can_be: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not done():
        assert can_be() and time.monotonic() < end
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return tiny_runs.data(tmp_path_factory.mktemp("data"), 75, side=8)


@pytest.fixture(scope="module")
def jobs(tiny, tmp_path_factory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("jobs")
    load.backend()  # compiles what is not yet, and says so, here

    def job(name: str, fault: str = "", read_lines: int | None = None, **changes: Any) -> Job:
        return Job(options(tiny, home / name, **changes), fault, read_lines)

    lost = {"lr": 1e30, "max_norm": float("inf"), "penalty": 0.0}
    running = {
        "whole": job("whole"),
        "stopped": job("stopped", "1 3 wait"),
        "twice": job("twice", "0 3 wait-two", save_every=2),
        "orphaned": job("orphaned", "0 3 wait"),
        "one raises": job("one raises", "1 2 raise"),
        "all raise": job("all raise", "0 2 raise,1 2 raise"),
        "killed": job("killed", "1 3 kill", save_every=2),
        "first killed": job("first killed", "0 3 kill"),
        "diverged": job("diverged", **lost),
        "closed": job("closed", read_lines=3),
    }
    found: dict[str, Any] = {"home": home}
    running["orphaned"].wait_for("0-3-wait")
    launcher = running["orphaned"].process
    found["orphans"] = children(launcher.pid)
    launcher.kill()
    running["stopped"].wait_for("1-3-wait")
    os.killpg(running["stopped"].process.pid, signal.SIGINT)  # as a terminal does
    for marker in ("0-3-wait-two", "0-3-wait-two.noticed"):
        running["twice"].wait_for(marker)
        os.kill(running["twice"].process.pid, signal.SIGTERM)
    running["at once"] = job("at once", vectorize=2)
    running["other rule"] = job("other rule", **OTHER_RULE)
    return found | {name: one.finish() for name, one in running.items()}


# --- the run --------------------------------------------------------------------------------------


def same_run(one: RunFolder, other: RunFolder) -> bool:
    records = [atomic.read_lines(folder.fingerprints) for folder in (one, other)]
    assert len(records[0]) == 11
    return records[0] == records[1] and tiny_runs.metrics(one) == tiny_runs.metrics(other)


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory) -> RunFolder:
    """The same run in one process."""
    return trained_alone(tiny, tmp_path_factory.mktemp("alone") / "run")


def trained_alone(tiny: str, out: Path, **changes: Any) -> RunFolder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_curves", lambda folder, options: False)
        return train(options(tiny, out, processes="auto", **changes)).folder


def test_two_processes_make_the_run_of_one(jobs, alone):
    status, out, err = jobs["whole"]
    assert (status, err) == (0, "")
    assert out.count("full-batch steps, cpu, 2 processes\n") == out.count("run folder:") == 1
    folder = RunFolder(jobs["home"] / "whole")
    assert same_run(folder, alone)
    assert {p.name for p in folder.path.iterdir()} == {p.name for p in alone.path.iterdir()}
    made, one = folder.read_options(), alone.read_options()
    assert {name for name in made if made[name] != one[name]} == {"processes", "out"}
    assert (made["processes"], one["processes"]) == (2, 1)
    (facts,) = atomic.read_lines(folder.environment)
    assert (facts["processes"], facts["threads"]) == (2, 1)


def test_two_processes_share_whole_groups_of_chunks(tiny, jobs, alone, tmp_path):
    """The first has chunks 0, 1 and 4, the ragged one; masks are drawn for a group."""
    status, out, err = jobs["at once"]
    assert (status, err) == (0, "") and " in chunks of 16, 2 at once): " in out
    folder = RunFolder(jobs["home"] / "at once")
    assert same_run(folder, trained_alone(tiny, tmp_path / "run", vectorize=2))
    assert not same_run(folder, alone)


def test_two_processes_follow_another_rule_as_one(tiny, jobs, tmp_path):
    status, _, err = jobs["other rule"]
    assert (status, err) == (0, "")
    one = trained_alone(tiny, tmp_path / "run", **OTHER_RULE)
    assert same_run(RunFolder(jobs["home"] / "other rule"), one)


def test_one_signal_to_all_of_them_is_one_request(jobs):
    status, out, err = jobs["stopped"]
    assert (status, err) == (130, "")
    assert out.count("stopping after this step") == out.count("saved at step 4 of 10") == 1
    assert f"go on with\n  fbopt train --resume {jobs['home']}/stopped\n" in out


def test_one_process_goes_on(jobs, alone, monkeypatch, capsys):
    monkeypatch.setattr(loop, "draw_curves", lambda folder, options: False)
    folder = RunFolder(jobs["home"] / "stopped")
    assert main(["--resume", str(folder.path)]) == 0  # of this model auto starts no others
    assert "note:" not in capsys.readouterr().out
    facts = atomic.read_lines(folder.environment)
    assert [(f["step"], f["processes"]) for f in facts] == [(0, 2), (4, 1)]
    assert same_run(folder, alone)


def test_a_second_signal_stops_at_once(jobs):
    status, out, err = jobs["twice"]
    assert (status, err) == (130, "")
    assert "stopped at once, back at the last save; go on with\n" in out
    assert RunFolder(jobs["home"] / "twice").checkpoints()[0][0] == 2


def test_the_processes_end_with_the_one_that_started_them(jobs):
    assert jobs["orphaned"][0] == -signal.SIGKILL
    assert len(jobs["orphans"]) == 2
    wait_until(lambda: not any(map(is_running, jobs["orphans"])), lambda: True)


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one raises", "all raise"])
def test_an_error_is_shown_once(jobs, name):
    status, _, err = jobs[name]
    assert status == 1
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.endswith("\nZeroDivisionError: a fault of the test\n")
    assert err.count("Traceback") == err.count("ZeroDivisionError: ") == 1


def test_a_process_that_is_killed_is_named(jobs):
    command = f"fbopt train --resume {jobs['home']}/killed"
    why = "ended by SIGKILL (the system does that where memory runs out); "
    status, _, err = jobs["killed"]
    assert (status, err) == (1, f"fbopt train: process 1 of 2 was {why}go on with\n  {command}\n")
    status, _, err = jobs["first killed"]
    assert (status, err) == (1, f"fbopt train: process 0 of 2 was {why}start again\n")


def test_an_error_of_all_is_one_message(jobs):
    status, _, err = jobs["diverged"]
    assert status == 1
    assert err.startswith("fbopt train: the loss became infinite or undefined at step 2: ")
    assert err.count("\n") == 1


def test_a_closed_stdout_ends_the_run(jobs):
    status, out, err = jobs["closed"]
    assert (status, err) == (141, "")
    assert out.count("\n") == 3
    assert not RunFolder(jobs["home"] / "closed").result.exists()


def test_a_stop_before_there_is_a_process(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch.Launcher, "_launch", lambda _: signal.raise_signal(signal.SIGINT))
    handler = signal.getsignal(signal.SIGINT)
    assert launch.start(options(tiny, tmp_path / "run")) == 130
    assert capsys.readouterr().err == "stopped at once\n"
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["--processes", "many"], 2),
        (["--processes", "2", "--no-such-option"], 2),
        (["--processes", "2", "--data", "npz:nowhere.npz"], 2),
        (["--processes", "2", "--data", "digits", "--samples", "100000"], 2),
        (["--processes", "2", "--resume", "nowhere"], 2),
        (["--processes", "2", "--recipe", "sgd"], 2),
        (["--processes", "2", "--device", "cuda:7"], 2),
    ],
)
def test_what_is_wrong_starts_no_process(words, status, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "Launcher", lambda *a: pytest.fail("started"))
    try:
        assert main(words) == status
    except SystemExit as stop:
        assert stop.code == status
    assert not any(tmp_path.iterdir())
