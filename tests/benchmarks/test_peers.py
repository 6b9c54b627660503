"""Peers compute what the reference does, wrong ones are caught, and idle workers are idle."""

from __future__ import annotations

import json
import sys
import threading
import types
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import Pipe

import pytest

from benchmarks import report, step
from benchmarks.cases import WrongResult
from benchmarks.peers import compare, pool, program, torch_calls, worker
from benchmarks.peers.workload import LeftOut, Result
from benchmarks.peers.workloads import CHUNKS, workload

NETWORKS = tuple(CHUNKS)
needs_jax = pytest.mark.skipif(find_spec("jax") is None, reason="JAX is not installed")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform != "linux", reason="workers take cores as in Linux"),
]


def results(module, network):
    """What every contender finds for a few samples in float64, and what is expected."""
    small = workload(network, 12, 4).double()
    found = {name: make().result() for name, make in module.contenders(small).items()}
    return found, compare.Expected(small)


@pytest.mark.parametrize("network", NETWORKS)
def test_torch_agrees(network):
    found, expected = results(torch_calls, network)
    assert {"bare passes", "plain torch", "as published", "fbopt"} <= found.keys()
    assert found.pop("bare passes") is None
    for name, given in found.items():
        expected.check(name, [given])


@needs_jax
@pytest.mark.parametrize("network", NETWORKS)
def test_jax_agrees(network):
    from benchmarks.peers import jax_calls

    found, expected = results(jax_calls, network)
    assert {"JAX jit(scan)", "JAX jit(vmap)"} <= found.keys()
    for name, given in found.items():
        expected.check(name, [given])


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_wrong_results_are_caught(what):
    found, expected = results(torch_calls, "mlp")
    right = found["fbopt"]
    expected.check("it", [right])
    off = {name: g * (1 + 1e-6 * (name == "0.weight")) for name, g in right.grads.items()}
    wrong = Result(right.loss, off) if what == "gradient" else replace(right, loss=right.loss + 1)
    with pytest.raises(WrongResult, match=what):
        expected.check("it", [right, wrong])


def test_the_penalty_shows():
    """Without a second pass the gradient is not within the tolerance."""
    found = compare.Expected(workload("cnn", 4, 4))
    _, grads = found.task.gradient(*found.task.chunks[0])
    names = found.workload.weights
    plain = {name: g.numpy() for name, g in zip(names, grads, strict=True)}
    with pytest.raises(WrongResult, match="gradient"):
        found.check("it", [Result(found.loss, plain)])


def test_peers_run_and_are_written(tmp_path, capsys):
    arguments = ["--peers", "--quick", "--threads", "1", "--workloads", "mlp"]
    path = step.main([*arguments, "--out", str(tmp_path)])
    content, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert path.stem.startswith("step-peers-") and path.stem.endswith("-quick")
    (table,) = content["tables"]
    names = [row["name"] for row in table["rows"]]
    assert names[:2] == ["bare passes (1 thread)", "plain torch (1 thread)"]
    has_jax = find_spec("jax") is not None
    assert ("JAX jit(vmap) (1 thread)" in names) == has_jax
    assert table["base"].startswith("JAX" if has_jax else "bare")
    assert all(row["rounds"] == 3 and row["median_s"] > 0 for row in table["rows"])
    assert ("JAX is left out" in printed) == (not has_jax)


def test_without_jax(monkeypatch, capsys):
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    assert "jax" not in program.kinds()
    assert "pip install" in capsys.readouterr().out


def test_errors_of_workers_arrive():
    with pool.pool([0], ["torch"]) as workers:
        (team,) = workers.teams.values()
        with pytest.raises(RuntimeError, match=r"torch with 1 threads failed:[\s\S]*KeyError"):
            team.ask("result", "nobody")
        workers.workers[0].process.kill()
        with pytest.raises(RuntimeError, match="has ended"):
            team.ask("clear")


def test_left_out_arrives():
    def refuse():
        raise LeftOut("no such argument")

    ours, theirs = Pipe()
    desk = types.SimpleNamespace(make=refuse)
    serving = threading.Thread(target=worker.serve, args=(desk, theirs))
    serving.start()
    ours.send(("make",))
    assert ours.recv() == ("left out", "no such argument")
    ours.close()
    serving.join()


def test_workers_that_stay_busy_are_named(monkeypatch):
    monkeypatch.setattr(pool, "PATIENCE_SECONDS", 0.1)
    clock = iter(range(1000))
    busy = types.SimpleNamespace(label="jax with 2 threads", cpu_seconds=lambda: next(clock))
    idle = types.SimpleNamespace(label="torch with 1 threads", cpu_seconds=lambda: 1.0)
    pool.Pool({("torch", 1): pool.Team([idle])}).settle()
    with pytest.raises(RuntimeError, match=r"jax with 2 threads: uses \d+% of a core"):
        pool.Pool({("torch", 1): pool.Team([idle, busy])}).settle()


def test_processor_time_of_workers_is_read():
    with pool.pool([0], ["torch"]) as workers:
        (worker,), (team,) = workers.workers, workers.teams.values()
        before = worker.cpu_seconds()
        team.ask("make", "plain torch", workload("mlp", 8, 4))
        assert worker.cpu_seconds() > before + 0.1  # it imports torch


@pytest.mark.parametrize(
    ("cpu", "features", "name"),
    [
        ("AMD EPYC", {"avx2"}, "AMD EPYC avx2"),
        ("AMD EPYC 7763 64-Core Processor", {"avx2", "avx512f"}, "AMD EPYC 7763 avx512"),
        ("Intel(R) Xeon(R) Processor", {"avx512f", "amx_bf16"}, "Intel Xeon avx512 amx"),
        ("Intel(R) Core(TM) i7 CPU @ 2.60GHz", set(), "Intel Core i7"),
    ],
)
def test_files_carry_the_instruction_set(cpu, features, name):
    assert report.hardware_name(cpu, features) == name
