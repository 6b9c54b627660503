"""Peers compute what the reference does, wrong ones are caught, and idle workers are idle."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from importlib.util import find_spec

import pytest

from benchmarks import report, step
from benchmarks.cases import WrongResult
from benchmarks.peers import compare, growth, pool, program, torch_calls
from benchmarks.peers.workload import Result
from benchmarks.peers.workloads import SETTINGS, workload
from benchmarks.timing import Contender, Plan, Timing

NETWORKS = tuple(SETTINGS)
needs_jax = pytest.mark.skipif(find_spec("jax") is None, reason="JAX is not installed")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform != "linux", reason="workers take cores as in Linux"),
]


def results(module, network, wanted=lambda name: "compile" not in name):
    """What every contender finds for a few samples in float64, and what is expected."""
    small = replace(workload(network, 12, 4).double(), together=2)
    calls = {name: make for name, make in module.contenders(small).items() if wanted(name)}
    return {name: make().result() for name, make in calls.items()}, compare.Expected(small)


@pytest.mark.parametrize("network", NETWORKS)
def test_torch_agrees(network):
    found, expected = results(torch_calls, network)
    plain = {"plain torch", "as published", "vmap, 2 at once"}
    assert plain | {"fbopt", "fbopt, 2 at once"} < set(found)
    assert found.pop("bare passes") is None
    for name, given in found.items():
        expected.check(name, [given])


@pytest.mark.slow
@pytest.mark.parametrize("network", ["mlp", "pinn"])
def test_compiled_agrees(network):
    found, expected = results(torch_calls, network, lambda name: "compile" in name)
    assert len(found) == 4
    for name, given in found.items():
        expected.check(name, [given])


@needs_jax
@pytest.mark.parametrize(
    "network", ["cnn", "mlp", "pinn", pytest.param("resnet18", marks=pytest.mark.slow)]
)
def test_jax_agrees(network):
    from benchmarks.peers import jax_calls

    found, expected = results(jax_calls, network)
    assert list(found) == ["JAX jit, a loop", "JAX jit(scan)", "JAX jit(vmap)"]
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


def test_growth_is_written_with_its_figure(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    work = growth.of_size(chunks=2, samples=2, width=2)
    axes = [growth.Axis(label, "2 chunks") for label in ("chunks", "samples", "parameters")]
    few = [growth.Point(axis, 2, work) for axis in axes]
    processes = growth.Axis("processes", "2 chunks")
    monkeypatch.setattr(program, "points", lambda quick: [*few, growth.Point(processes, 0, work)])
    monkeypatch.setattr(program, "kinds", lambda: ["torch"])
    arguments = ["--peers", "--growth", "--quick", "--threads", "1", "--out", str(tmp_path)]
    path = step.main(arguments)
    assert path.stem.startswith("step-growth-") and path.with_suffix(".png").stat().st_size > 10_000
    content = json.loads(path.read_text())
    lines = {"plain torch", "fbopt, chunk by chunk", "fbopt, all chunks at once"}
    assert content["growth"]["chunks"].keys() == lines
    assert content["growth"]["processes"].keys() == lines - {"plain torch"}
    assert all(list(curve) == ["1"] for curve in content["growth"]["processes"].values())
    assert 0 <= content["others"] <= 1
    assert "other programs used" in capsys.readouterr().out


def test_points_cover_their_axes():
    found = {}
    for point in growth.points(quick=False):
        found.setdefault(point.axis.label, []).append(point)
    assert list(found) == ["chunks", "samples in a chunk", "parameters", "processes"]
    assert [p.workload.count for p in found["chunks"]] == list(growth.COUNTS)
    assert [p.workload.chunk for p in found["samples in a chunk"]] == list(growth.SIZES)
    parameters = [p.value for p in found["parameters"]]
    assert parameters == sorted(set(parameters)) and parameters[-1] > 500_000


def test_of_two_contenders_in_one_line_the_faster_is_drawn():
    axis = growth.Axis("chunks", "")
    named = {"JAX jit(scan) (1 thread)": 2.0, "JAX jit(vmap) (2 threads)": 1.0}
    axis.add([Timing(Contender(name, list), [s]) for name, s in named.items()], 8)
    assert list(axis.curves.values()) == [{8: 1.0}]
    assert not axis.draws("as published") and not axis.draws("fbopt, 2 processes")
    processes = growth.Axis("processes", "")
    assert processes.place("fbopt, 2 processes, all at once (1 thread each)", 0)[1] == 2
    assert not processes.draws("fbopt")


def test_without_jax(monkeypatch, capsys):
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    assert program.kinds() == ["torch"]
    assert "pip install" in capsys.readouterr().out


def test_two_processes_agree():
    work = replace(workload("mlp", 24, 4), together=2)
    with pool.pool([0, 0], [], [2]) as workers:
        found = compare.entrants(workers, work, program.wanted(True))
        timings = compare.compare(workers, work, Plan(3), program.wanted(True))
    assert [e.name for e in found] == ["fbopt, 2 processes", "fbopt, 2 processes, 2 at once"]
    assert [len(t.seconds) for t in timings] == [3, 3]


def test_one_of_two_processes_may_fail(monkeypatch):
    monkeypatch.setattr(pool, "PATIENCE_SECONDS", 1)
    with pool.pool([0, 0], [], [2]) as workers:
        (team,) = workers.teams
        team.workers[1].process.kill()
        with pytest.raises(RuntimeError, match="has ended"):
            team.ask("make", "fbopt, 2 processes", workload("mlp", 8, 4))


def test_the_best_setting_counts():
    times = {"a (1 thread)": [2.0], "a (2 threads)": [1.0], "b (1 thread)": [3.0]}
    timings = [Timing(Contender(name, list), seconds) for name, seconds in times.items()]
    assert [t.contender.name for t in compare.best(timings)] == ["a (2 threads)", "b (1 thread)"]


def test_workers_tell_of_errors_and_their_time_is_read():
    with pool.pool([0], ["torch"]) as workers:
        (worker,), (team,) = workers.workers, workers.teams
        before = worker.cpu_seconds()
        with pytest.raises(RuntimeError, match=r"torch on one core failed:[\s\S]*KeyError"):
            team.ask("result", "nobody")
        assert worker.cpu_seconds() > before + 0.1  # it has imported torch
        worker.process.kill()
        with pytest.raises(RuntimeError, match="has ended"):
            team.ask("clear")


def test_workers_that_stay_busy_are_named(monkeypatch):
    monkeypatch.setattr(pool, "PATIENCE_SECONDS", 0.1)
    clock = iter(range(1000))
    busy = types.SimpleNamespace(label="jax on 2 cores", cpu_seconds=lambda: next(clock))
    idle = types.SimpleNamespace(label="torch on one core", cpu_seconds=lambda: 1.0)
    pool.Pool([pool.Team([idle], "")]).settle()
    with pytest.raises(RuntimeError, match=r"jax on 2 cores: uses \d+% of a core"):
        pool.Pool([pool.Team([idle], ""), pool.Team([busy], "")]).settle()


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
