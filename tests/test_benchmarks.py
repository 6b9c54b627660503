"""The benchmarks run, write what they promise, and stop at wrong results. No test reads a clock."""

from __future__ import annotations

import json
import types
import warnings

import pytest
import torch

from benchmarks import calls, finishing, memory, ops, report, rivals, single, step
from benchmarks.cases import Chunk, Finish, WrongResult, require_close, shapes
from benchmarks.harness import Contender, Timing, Timings, measure
from fbopt._toolchain import BuildError

FEW = [torch.Size(s) for s in ((3, 4), (), (5,), (2, 3, 3, 3), (40,))]
MACHINE = {"cpu", "cores", "threads", "openmp", "backend", "torch", "fbopt", "python", "system"}
ROW = {"name", "median_s", "quartiles_s", "fastest_s", "rounds", "ratio", "ratio_quartiles"}
EAGER_UPDATES = [kind for kind in rivals.CHUNK_UPDATES if kind is not rivals.Compiled]
EAGER_STEPS = [kind for kind in finishing.FINISHING_STEPS if kind is not finishing.Compiled]


def named(kind: type) -> str:
    return kind.__name__


@pytest.fixture
def few(monkeypatch):
    """A handful of tensors in place of each size."""
    monkeypatch.setattr(ops, "shapes", lambda size: FEW)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(benchmark, tmp_path, capsys, *arguments: str) -> tuple[dict, str]:
    path = benchmark.main([*arguments, "--quick", "--out", str(tmp_path)])
    assert path.parent == tmp_path
    return json.loads(path.read_text()), capsys.readouterr().out


def check_json(content: dict, name: str) -> None:
    assert content["benchmark"] == name
    assert content["command"].startswith(f"python -m benchmarks.{name} ")
    assert content["machine"].keys() >= MACHINE
    for table in content["tables"]:
        assert any(row["name"] == table["base"] and row["ratio"] == 1 for row in table["rows"])
        for row in table["rows"]:
            assert row.keys() >= ROW
            assert row["rounds"] == 3
            assert 0 < row["quartiles_s"][0] <= row["median_s"] <= row["quartiles_s"][1]
    for goal in content["goals"]:
        assert goal["value"] > 0
        assert (goal["goal"] is None) == (goal["met"] is None)


def test_ops_run_and_are_written(few, tmp_path, capsys):
    content, printed = run(ops, tmp_path, capsys, "--sizes", "tiny", "resnet18")
    check_json(content, "ops")
    assert len(content["tables"]) == 6
    for kind in (*EAGER_UPDATES, *EAGER_STEPS):
        assert f"| {kind.name} " in printed
    assert "torch.compile" not in printed
    goals = [goal["goal"] for goal in content["goals"] if "SGD(f" in goal["claim"]]
    assert goals == [None, None, "≥ 1.6", "≥ 1"]


def test_step_runs_and_is_written(tmp_path, capsys):
    content, printed = run(step, tmp_path, capsys, "--sizes", "small-cnn")
    check_json(content, "step")
    assert [len(t["rows"]) for t in content["tables"]] == [3, 3]
    assert "Closure call with penalty" in printed
    assert [g["goal"] for g in content["goals"]] == ["≤ 1.06", None] * 2


def test_file_is_named_after_the_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_cpu", lambda: "Some(R) CPU @ 2.0GHz")
    made = report.Report("ops", ["--quick"])
    assert made.write(tmp_path).name == "ops-some-r-cpu-2-0ghz.json"


def test_sizes():
    assert len(shapes("resnet18")) == 62
    assert len(shapes("tiny")) == 1000
    assert sum(s.numel() for s in shapes("small-cnn")) < 10_000


@pytest.mark.parametrize("kind", EAGER_UPDATES, ids=named)
@pytest.mark.parametrize("what", ["sum", "parameter", "shift"])
def test_wrong_chunk_update_is_caught(kind, what):
    class Wrong(kind):
        def update(self, second_pass):
            super().update(lambda: self.spoil_shift(second_pass))
            if what == "sum":
                self.sums[3].view(-1)[-1] *= 1.01
            elif what == "parameter":
                self.params[1].data = torch.nextafter(self.params[1].data, torch.tensor(9.0))

        def spoil_shift(self, second_pass):
            with torch.no_grad():
                self.params[0].view(-1)[0] += 0.01 * (what == "shift")
            second_pass()

    chunk = Chunk.of(FEW)
    ops.check_chunk(kind(chunk), chunk)
    with pytest.raises(WrongResult, match=what):
        ops.check_chunk(Wrong(chunk), chunk)


@pytest.mark.parametrize("kind", EAGER_STEPS, ids=named)
@pytest.mark.parametrize("what", ["update", "momentum"])
def test_wrong_finishing_step_is_caught(kind, what):
    class Wrong(kind):
        def step(self):
            super().step()
            wrong = self.params[3] if what == "update" else self.momentum()[3]
            with torch.no_grad():
                wrong.view(-1)[-1] += 0.01

    finish = Finish.of(FEW)
    ops.check_finish(kind(finish), finish)
    # A wrong momentum shows in the second update.
    with pytest.raises(WrongResult, match=r"the (update|momentum)"):
        ops.check_finish(Wrong(finish), finish)


@pytest.mark.parametrize("op", single.WORDS)
def test_wrong_kernel_is_caught(op, monkeypatch):
    right = getattr(single._ops, op)

    def wrong(*args, **rule):
        if op == "squared_norm":
            return 1.001 * right(*args)
        found = right(*args, **rule)
        written = args[0][-1] if isinstance(args[0], list) else args[0]
        written.view(-1)[-1] += 0.01
        return found

    monkeypatch.setattr(single._ops, op, wrong)
    with pytest.raises(WrongResult, match=op):
        single.single_ops(Chunk.of(FEW))


@pytest.mark.parametrize("kind", [calls.Ours, calls.Plain], ids=named)
@pytest.mark.parametrize("penalised", [False, True])
def test_wrong_closure_call_is_caught(kind, penalised, monkeypatch):
    class Wrong(kind):
        def __call__(self):
            super().__call__()
            self.params[0].grad.view(-1)[0] *= 1.001

    monkeypatch.setattr(calls, "CALLS", (Wrong,))
    with pytest.raises(WrongResult, match="grad"):
        calls.check("small-cnn", 5, 2, penalised)


def test_number_of_passes_is_checked(monkeypatch):
    class Twice(calls.Bare):
        def __call__(self):
            super().__call__()
            super().__call__()

    monkeypatch.setattr(calls, "CALLS", (Twice,))
    with pytest.raises(WrongResult, match="6 forward passes over 3 chunks"):
        calls.check("small-cnn", 5, 2, False)


def test_wrong_triad_is_caught(monkeypatch):
    monkeypatch.setattr(memory._build, "build", lambda *args: None)
    idle = types.SimpleNamespace(triad=lambda *args: None)
    monkeypatch.setattr(memory._build, "load", lambda *args: idle)
    with pytest.raises(WrongResult, match="triad"):
        memory.triads(300)


def test_no_compiler_no_limit(monkeypatch, few):
    def refuse(*args):
        raise BuildError("no compiler", "install one")

    monkeypatch.setattr(memory._build, "build", refuse)
    with pytest.warns(RuntimeWarning, match="no memory limit: no compiler"):
        timings = ops.chunk_table("tiny", rounds=1, compiled=False)
    assert ops.limit_of(timings) is None


def test_nan_is_no_result():
    with pytest.raises(WrongResult, match="off by nan"):
        require_close("it", "x", [torch.tensor(float("nan"))], [torch.ones(()).double()], 1e-3)


def test_every_contender_has_its_turn_in_every_round():
    log: list[str] = []
    contenders = [Contender(name, lambda name=name: log.append(name)) for name in "abc"]
    timings = measure("t", contenders, rounds=4, prepare=lambda: log.append("-"))
    assert [len(row.seconds) for row in timings.rows] == [4, 4, 4]
    assert log[::2] == ["-"] * (len(log) // 2)
    assert all(log.count(name) >= 4 for name in "abc")


def test_ratios_are_taken_round_by_round():
    rows = [Timing("a", [1.0, 10.0, 2.0], 5 * 10**8), Timing("b", [2.0, 20.0, 4.2])]
    timings = Timings("t", rows)
    assert timings.ratio("b", "a") == 2
    assert timings.ratio("a", "a") == 1
    assert timings["a"].rate == 1  # 5e8 words of 4 bytes in 2 s
    assert timings["b"].rate is None
    assert timings.fastest(["b", "a"]) == "a"
    assert timings.fastest(["c"]) is None


@pytest.mark.slow
def test_compiled_contenders_agree():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chunk, finish = Chunk.of(FEW), Finish.of(FEW)
        ops.check_chunk(rivals.Compiled(chunk), chunk)
        ops.check_finish(finishing.Compiled(finish), finish)
