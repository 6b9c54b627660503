"""`fbopt train` in several processes: the run of one process, and failures of one of them.

Most runs are made by three processes that are started once and get torchrun's environment for each
run; a few more are torchrun's own, restarts included.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import faulty_train
import numpy as np
import pytest
import tiny_runs
import torch

from fbopt.train import __main__ as program
from fbopt.train import loop
from fbopt.train.checkpoint import atomic
from fbopt.train.checkpoint.digest import fingerprint
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.loop import train
from fbopt.train.torchrun import rank_and_world_size
from fbopt.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

WORLD = 3
COUNT, CHUNK, STEPS = 75, 16, 10  # five chunks, the last ragged
# How gradients are summed, and whether that depends on how chunks are distributed.
ACCUMULATIONS = {"float32": True, "exact": False}


def options(tiny: str, out: Path | str, **changes: Any) -> Options:
    """With penalty, clipping, BatchNorm and dropout."""
    common = {"chunk_size": CHUNK, "steps": STEPS, "log_every": 1, "eval_every": 5}
    return tiny_runs.with_noise(tiny, Path(out), **(common | changes))


# --- the processes --------------------------------------------------------------------------------


@contextlib.contextmanager
def as_torchrun(rank: int, world: int, port: int):
    """torchrun's environment for one run."""
    with pytest.MonkeyPatch.context() as patch:
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        values |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "test"}
        for name, value in values.items():
            patch.setenv(name, str(value))
        yield patch


def attempt(wanted: Options) -> dict[str, Any]:
    """Train; return the error or result, and which chunks this process visited."""
    visited: list[tuple[int, int]] = []

    def note(trainer: Trainer, chunk: int = 0) -> None:
        visited.append((trainer.step, chunk))
        faulty_train.seed_or_fail(trainer, chunk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "seed_chunk", note)
        try:
            result = train(wanted)
        except Exception as error:
            return {"error": (type(error).__name__, str(error)), "visited": visited}
    return {
        "error": None,
        "visited": visited,
        "summary": {k: v for k, v in result.summary.items() if k != "seconds"},
        "model": result.model.state_dict(),
    }


def command(wanted: Options) -> tuple[int, str]:
    """The exit status of `fbopt train` in this process, and its stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = program.run(wanted)
    return status, said.getvalue()


def scenario(case: str, rank: int, tiny: str, other: str, patch: pytest.MonkeyPatch) -> Any:
    """Run a case in one process, whose working folder is its own."""
    kind, _, name = case.partition(" ")
    if kind == "train":
        return attempt(options(tiny, case, accumulation=name))
    if kind == "stop":  # only rank 1 gets a signal
        with pytest.MonkeyPatch.context() as stopping:
            if rank == 1:
                tiny_runs.interrupt_after(stopping, 4, signal.SIGTERM)
            return attempt(options(tiny, "stopped"))
    if kind == "resume":
        return attempt(Options(resume=Path("stopped"), threads=1))
    if kind == "fail":
        patch.setenv("FAULT", "1 3 raise")
        patch.setenv("MARKER", str(Path.cwd() / "fault"))
        return attempt(options(tiny, "failed"))
    if kind == "diverge":
        return command(options(tiny, "diverged", lr=1e30, max_norm=float("inf"), penalty=0.0))
    if kind == "data":  # rank 1's differ in one sample
        shutil.copy((other if rank == 1 else tiny).removeprefix("npz:"), "own.npz")
        return attempt(options("npz:own.npz", "data"))
    if kind == "apart":  # rank 1 is told something else
        return attempt(options(tiny, "apart", lr=0.3 if rank == 1 else 0.2))
    if kind == "version":  # rank 1 has another torch
        if rank == 1:
            facts = loop.environment
            patch.setattr(loop, "environment", lambda *given: facts(*given) | {"torch": "1.0"})
        return attempt(options(tiny, "version"))
    if kind == "drift":  # a bit of rank 2's memory flips
        if rank == 2:
            flip_after(patch, 4)
        return attempt(options(tiny, "drift", fingerprint_every=3))
    if kind == "sgd":
        return command(tiny_runs.options(tiny, Path("sgd"), "sgd"))
    return command(Options(data=tiny, **({"lr": -1.0} if kind == "option" else {"processes": 3})))


def flip_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """Change the last bit of a parameter in the given step."""
    take_step = Trainer.take_step

    def flipping(trainer: Trainer) -> None:
        take_step(trainer)
        if trainer.step == step:
            trainer.model.state_dict()["linear.bias"].view(torch.int32)[0] ^= 1

    patch.setattr(Trainer, "take_step", flipping)


# Cases and numbers of processes, in this order: the stopped run is resumed.
CASES = [
    *((f"train {name}", world) for name in ACCUMULATIONS for world in (1, 2, 3)),
    ("stop", 3),
    ("resume", 2),
    ("fail", 3),
    ("diverge", 2),
    ("data", 3),
    ("apart", 3),
    ("version", 2),
    ("drift", 3),
    ("sgd", 2),
    ("option", 3),
    ("number", 2),
]


def work(rank: int, ports: list[int], tiny: str, other: str, folder: Path) -> None:
    torch.set_num_threads(1)
    loop.draw_curves = lambda folder, options: False
    found = {}
    try:
        for (case, world), port in zip(CASES, ports, strict=True):
            home = folder / (f"lead-{world}" if "train" in case else "lead")
            home = home if rank == 0 else folder / f"rank{rank}"
            home.mkdir(exist_ok=True)
            os.chdir(home)
            if rank < world:
                with as_torchrun(rank, world, port) as patch:
                    found[case, world] = scenario(case, rank, tiny, other, patch)
        torch.save(found, folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # process groups with a failed rank still exist


# --- their results --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return tiny_runs.data(tmp_path_factory.mktemp("data"), COUNT, side=8)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("localhost", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def found(tiny, home) -> list[dict]:
    """The result of each rank in each case."""
    arrays = dict(np.load(tiny.removeprefix("npz:")))
    arrays["x_train"][3, 0, 0, 0] += 1
    np.savez(home / "other.npz", **arrays)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fbopt.train.loop", "torchvision.models.resnet"])
    arguments = (free_ports(len(CASES)), tiny, f"npz:{home / 'other.npz'}", home)
    processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(150)
        process.kill()  # a rank that hangs
        process.join()
    reports = "\n".join(file.read_text() for file in sorted(home.glob("*.txt")))
    codes = [process.exitcode for process in processes]
    assert codes == [0] * WORLD, f"{codes}\n{reports}"
    return [torch.load(home / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def of(found: list[dict], case: str, world: int) -> list[dict]:
    return [one[case, world] for one in found[:world]]


def assert_close(mine: list[dict], theirs: list[dict]) -> None:
    assert len(mine) == len(theirs) > 0
    for one, other in list(zip(mine, theirs, strict=True))[:6]:  # rounding errors grow
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("world", [2, 3])
def test_processes_make_the_run_of_one(found, home, world, accumulation):
    case = f"train {accumulation}"
    results, (one,) = of(found, case, world), of(found, case, 1)
    assert all(r["error"] is None for r in results)
    assert len({tiny_runs.digest(r["model"]) for r in results}) == 1
    assert all(r["summary"] == results[0]["summary"] for r in results)
    runs = [RunFolder(home / f"lead-{size}" / case) for size in (world, 1)]
    assert_close(*map(tiny_runs.metrics, runs))
    if not ACCUMULATIONS[accumulation]:
        assert fingerprint(runs[0].load()) == fingerprint(runs[1].load())
    # Each chunk is visited once per step, by the right rank.
    for rank, result in enumerate(results):
        assert result["visited"] == [s for s in one["visited"] if s[1] % world == rank]


def test_only_rank_0_writes_and_says_how_many_there_are(found, home):
    assert all(not any((home / f"rank{rank}").glob("**/*.json*")) for rank in range(1, WORLD))
    for world in (1, 2, 3):
        folder = RunFolder(home / f"lead-{world}" / "train float32")
        (facts,) = atomic.read_lines(folder.environment)
        assert facts["processes"] == world
        assert len(atomic.read_lines(folder.fingerprints)) == STEPS + 1


def test_a_signal_to_one_stops_all_after_the_same_step(found, home):
    for result in of(found, "stop", 3):
        assert result["error"][0] == "Interrupted" and "saved at step 4 of 10" in result["error"][1]
        assert max(step for step, _ in result["visited"]) == 3


def test_another_number_of_processes_goes_on(found, home):
    results = of(found, "resume", 2)
    assert all(r["error"] is None for r in results)
    assert min(step for r in results for step, _ in r["visited"]) == 4
    stopped, whole = RunFolder(home / "lead/stopped"), RunFolder(home / "lead-3/train exact")
    facts = atomic.read_lines(stopped.environment)
    assert [(f["step"], f["processes"]) for f in facts] == [(0, 3), (4, 2)]
    assert tiny_runs.metrics(stopped) == tiny_runs.metrics(whole)
    assert atomic.read_lines(stopped.fingerprints) == atomic.read_lines(whole.fingerprints)


def test_a_chunk_that_fails_stops_all(found):
    results = of(found, "fail", 3)
    assert results[1]["error"] == ("ZeroDivisionError", "a fault of the test")
    for rank in (0, 2):
        kind, text = results[rank]["error"]
        assert kind == "PeerError"
        assert text == "process 1 failed: ZeroDivisionError: a fault of the test"


@pytest.mark.parametrize(
    ("case", "world", "status", "words"),
    [
        ("diverge", 2, 1, "the loss became infinite or undefined at step 2"),
        ("sgd", 2, 2, "--recipe sgd runs in one process, not in 2"),
        ("option", 3, 2, "--lr -1.0: has to be above 0"),
        ("number", 2, 2, "--processes 3: torchrun has started 2; leave it out"),
    ],
)
def test_an_error_of_all_is_one_message(found, home, case, world, status, words):
    results = of(found, case, world)
    assert [s for s, _ in results] == [status] * world
    assert results[0][1].startswith(f"fbopt train: {words}") and results[0][1].count("\n") == 1
    assert all(text == "" for _, text in results[1:])
    assert not (home / "lead/sgd").exists()


def test_other_data_are_refused(found, home):
    results = of(found, "data", 3)
    assert results[1]["error"][0] == "DataError"
    assert "process 1 has other samples or labels than process 0" in results[1]["error"][1]
    assert {results[rank]["error"][0] for rank in (0, 2)} == {"PeerError"}
    assert not (home / "lead/data").exists()


@pytest.mark.parametrize(
    ("case", "world", "words"),
    [
        ("apart", 3, "the processes differ: lr is 0.2 on process 0 and 0.3 on process 1"),
        ("version", 2, "the processes differ: torch is 2"),
    ],
)
def test_processes_that_would_compute_something_else_are_refused(found, home, case, world, words):
    results = of(found, case, world)
    assert {r["error"][0] for r in results} == {"OptionsError"}
    assert all(r["error"][1].startswith(words) and not r["visited"] for r in results)
    assert not (home / "lead" / case).exists()


def test_a_parameter_that_is_not_the_others_ends_the_run(found, home):
    """It is seen with the next fingerprint, after step 6, and told with rank, step and tensor."""
    results = of(found, "drift", 3)
    words = "at step 6 the parameter linear.bias of process 2 is not that of process 0"
    assert {r["error"][0] for r in results} == {"ProcessesDiffer"}
    assert all(r["error"][1].startswith(words) for r in results)
    folder = RunFolder(home / "lead/drift")
    assert [line["step"] for line in atomic.read_lines(folder.fingerprints)] == [0, 3]


# --- the lock -------------------------------------------------------------------------------------


def hold(path: Path, ready: Any) -> None:
    with contextlib.ExitStack() as lock:
        path.mkdir(exist_ok=True)
        RunFolder(path).lock(lock)
        ready.set()
        time.sleep(60)


def test_a_folder_is_for_one_process_until_it_is_gone(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "draw_curves", lambda folder, options: False)
    wanted = tiny_runs.options(tiny, tmp_path / "run", steps=2)
    train(wanted)
    result = RunFolder(wanted.out).result
    before = result.read_bytes()
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    other = context.Process(target=hold, args=(wanted.out, ready))
    other.start()
    assert ready.wait(60)
    for change in ({"resume": "auto"}, {"overwrite": True}, {"out": None, "resume": wanted.out}):
        again = wanted if "out" not in change else Options()
        with pytest.raises(OptionsError, match=rf"{wanted.out} is in use: another process"):
            train(Options(**{**vars(again), **change}))
    assert result.read_bytes() == before
    other.kill()  # the system drops the lock, the file stays
    other.join()
    assert (wanted.out / ".lock").exists()
    train(Options(**{**vars(wanted), "resume": "auto"}))
    train(Options(**{**vars(wanted), "overwrite": True}))


def test_a_new_folder_that_another_has_begun_meanwhile(tiny, tmp_path, monkeypatch):
    wanted = tiny_runs.options(tiny, tmp_path / "run", steps=2)
    with contextlib.ExitStack() as lock:
        build = loop.build_trainer

        def slow(*arguments: Any) -> Any:  # the other is faster
            wanted.out.mkdir()
            RunFolder(wanted.out).lock(lock)
            return build(*arguments)

        monkeypatch.setattr(loop, "build_trainer", slow)
        with pytest.raises(OptionsError, match="is in use"):
            train(wanted)
        assert [p.name for p in wanted.out.iterdir()] == [".lock"]


# --- torchrun -------------------------------------------------------------------------------------


class Job:
    """A torchrun with its output; `--standalone` picks a free port."""

    def __init__(self, wanted: Options, processes: int, *more: str, **env: str) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(processes), *more, faulty_train.__file__]
        launcher += tiny_runs.command_line(wanted)
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
        clean |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            launcher,
            env=clean | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self) -> tuple[int, str, str]:
        """The exit status, stdout, and stderr without torchrun's own messages."""
        try:
            out, err = self.process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            raise AssertionError(f"torchrun hangs\n{out}\n{err}") from None
        own = re.sub(r"^[WE]\d{4} .*?(?=^\S*fbopt|\Z)", "", err, flags=re.M | re.S)
        return self.process.returncode, out, own


@pytest.fixture(scope="module")
def jobs(tiny, tmp_path_factory) -> dict[str, Any]:
    """All of torchrun's jobs, at the same time."""
    home = tmp_path_factory.mktemp("jobs")
    marker = {"MARKER": str(home / "fault-")}
    saved = {"save_every": 2, "resume": "auto"}
    killed = options(tiny, home / "killed", **saved)
    raised = options(tiny, home / "raised")
    stopped = options(tiny, home / "stopped")
    running = {
        "killed": Job(killed, 2, "--max-restarts", "1", FAULT="0 7 kill", **marker),
        "raised": Job(raised, 2, FAULT="1 2 raise", **marker),
        "stopped": Job(stopped, 2, FAULT="1 3 wait", **marker),
    }
    wait = Path(marker["MARKER"] + "1-3-wait")
    end = time.monotonic() + 120
    while not wait.exists() and time.monotonic() < end:
        time.sleep(0.05)
    running["stopped"].process.send_signal(signal.SIGINT)
    return {"home": home} | {name: job.finish() for name, job in running.items()}


def test_a_restart_ends_on_the_same_bits(jobs, found, home):
    status, out, err = jobs["killed"]
    assert status == 0, err
    assert out.count("resumed at step") == out.count("resumed at step 6 of 10") == 1
    folder, whole = RunFolder(jobs["home"] / "killed"), RunFolder(home / "lead-2/train exact")
    assert atomic.read_lines(folder.fingerprints) == atomic.read_lines(whole.fingerprints)
    assert tiny_runs.metrics(folder) == tiny_runs.metrics(whole)


def test_an_error_is_shown_once(jobs):
    status, out, err = jobs["raised"]
    assert status == 1
    assert err.count("ZeroDivisionError: a fault of the test") == 1
    assert "PeerError" not in err and out.count("run folder") == 1


def test_an_interrupted_job_is_saved_once(jobs):
    status, out, err = jobs["stopped"]
    assert status != 0
    assert out.count("saved at step 4 of 10") == 1 and out.count("stopping after this step") == 1
    folder = RunFolder(jobs["home"] / "stopped")
    assert [step for step, _ in folder.checkpoints()] == [4]
    assert "PeerError" not in err


def test_a_ladder_is_for_one_process(monkeypatch, capsys):
    from fbopt.train.ladder.__main__ import main

    said = []
    for rank in (0, 1):
        with as_torchrun(rank, 2, 1):
            assert rank_and_world_size() == (rank, 2)
            assert main(["--data", "mnist1d"]) == 2
        said.append(capsys.readouterr().err)
    assert "without torchrun" in said[0] and said[1] == ""


def test_help_is_printed_once(capsys):
    for rank in (0, 1):
        with as_torchrun(rank, 2, 1), pytest.raises(SystemExit) as stop:
            program.main(["--help"])
        assert stop.value.code == 0
        assert ("usage" in capsys.readouterr().out) == (rank == 0)
