"""Benchmarks run, write their JSON, and stop at wrong results. No test depends on a duration."""

from __future__ import annotations

import json
import types
import warnings
from dataclasses import replace

import pytest
import torch

from benchmarks import (
    accumulation,
    at_once,
    bandwidth,
    cases,
    kernels,
    ops,
    report,
    step,
    timing,
    train_step,
)
from benchmarks.adaptive import ADAPTIVE_UPDATES
from benchmarks.cases import Operands, WrongResult, require_close
from benchmarks.contenders import CHUNK_UPDATES, FINISHING_STEPS, FboptExactUpdate
from benchmarks.stacks import STACKED_UPDATES, Stacks, check_stacked
from benchmarks.task import Task
from benchmarks.timing import CPU, Contender, Plan, Table, Timing, measure
from fbopt._build.compiler import BuildError
from fbopt.train import build
from fbopt.train.data.load import load

FEW = [torch.Size(s) for s in ((3, 4), (), (5,), (2, 3, 3, 3), (40,))]
MACHINE = {"cpu", "cores", "threads", "openmp", "backend", "torch", "fbopt", "python", "system"}
ROW = {"name", "median_s", "quartiles_s", "fastest_s", "rounds", "ratio", "ratio_quartiles"}
UPDATES = [kind for kind in CHUNK_UPDATES if not kind.compiled]
STACKED = [kind for kind in STACKED_UPDATES if not kind.compiled]
STEPS = [kind for kind in FINISHING_STEPS if not kind.compiled]
CALLS = [kind for kind in step.CALLS["cuda"] if kind is not step.BarePasses]
GPU = torch.device("cuda")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def few(monkeypatch):
    """A handful of tensors in place of each size."""
    monkeypatch.setattr(ops, "shapes", lambda size: FEW)


def run(benchmark, tmp_path, capsys, *arguments: str) -> tuple[dict, str]:
    """Run a benchmark; return its JSON and what it printed."""
    path = benchmark.main([*arguments, "--quick", "--out", str(tmp_path)])
    assert path.parent == tmp_path
    assert path.stem.endswith("-quick")  # does not replace a result
    content, name = json.loads(path.read_text()), benchmark.__name__
    assert content["command"].startswith(f"python -m {name} ")
    assert content["machine"].keys() >= MACHINE
    for table in content["tables"]:
        assert any(row["name"] == table["base"] and row["ratio"] == 1 for row in table["rows"])
        for row in table["rows"]:
            assert row.keys() >= ROW
            assert row["rounds"] == 3
            assert 0 < row["quartiles_s"][0] <= row["median_s"] <= row["quartiles_s"][1]
    return content, capsys.readouterr().out


def test_ops_run_and_are_written(few, tmp_path, capsys):
    content, printed = run(ops, tmp_path, capsys, "--sizes", "tiny", "resnet18")
    assert len(content["tables"]) == 9
    for kind in (*UPDATES, *ADAPTIVE_UPDATES, *STACKED, *STEPS):
        assert f"| {kind.name} " in printed
    assert "torch.compile" not in printed


def test_step_runs_and_is_written(tmp_path, capsys):
    content, printed = run(step, tmp_path, capsys, "--sizes", "small-cnn", "--precision", "bf16")
    assert [len(table["rows"]) for table in content["tables"]] == [3, 3]
    assert "Closure call with penalty" in printed and "in one chunk of 128, bf16" in printed


def test_train_step_runs_and_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(train_step.CHECKED, "images", 10)
    arguments = ("--width", "2", "--images", "10", "--chunk", "8", "--workers", "1")
    arguments += ("--precision", "bf16", "--penalty")
    content, printed = run(train_step, tmp_path, capsys, *arguments)
    (table,) = content["tables"]
    ours = ["fbopt train", "its passes alone"]
    names = [row["name"].partition(",")[0] for row in table["rows"]]
    assert names == [*ours, "DataLoader with 1 workers", *ours]
    assert all(row["images"] == 10 and row["images_per_s"] > 0 for row in table["rows"])
    assert "with penalty, ResNet-18 of width 2, 10 images in chunks of 8" in printed
    assert "freed memory is" in printed


def test_chunks_at_once_run_and_are_written(tmp_path, capsys):
    pytest.importorskip("sklearn")
    arguments = ("--data", "digits", "--chunk", "400", "--counts", "2", "9")
    content, _ = run(at_once, tmp_path, capsys, *arguments)
    (table,) = content["tables"]
    assert table["title"] == "A penalised step of cnn on digits, 4 chunks of 400"
    assert [row["name"] for row in table["rows"]] == ["one by one", "2 at once"]


def test_a_wrong_step_of_chunks_at_once_is_caught(monkeypatch):
    pytest.importorskip("sklearn")
    build_closure = build.build_closure

    def without_penalty(options, *arguments, **context):
        return build_closure(replace(options, penalty=None), *arguments, **context)

    monkeypatch.setattr(build, "build_closure", without_penalty)
    chosen = replace(at_once.options_of("digits", 400), vectorize=2)
    with pytest.raises(WrongResult, match=r"2 at once: p\.grad is off"):
        at_once.contender(chosen, load("digits"))


def test_accumulation_runs_and_is_written(tmp_path, capsys):
    arguments = ("--models", "transformer", "--chunks", "3", "--cpu-time")
    content, printed = run(accumulation, tmp_path, capsys, *arguments)
    (table,) = content["tables"]
    peaks = [row["peak_mb"] for row in table["rows"]]
    parameters = float(table["title"].split()[1]) * 4  # megabytes
    assert "CPU time" in table["title"] and "bfloat16 parameters" in printed
    # All gradients once more only for torch.autograd.grad, whose sums are kept beside them.
    assert peaks[1] <= peaks[0] + parameters < peaks[2] + parameters / 2
    assert set(content["bfloat16"]) == {*accumulation.CONTENDERS, "the sum, rounded once"}


def test_a_wrong_accumulation_is_caught(monkeypatch):
    def wrong(work):
        call = accumulation.plain(work)
        work.chunks.pop()
        return call

    monkeypatch.setitem(accumulation.CONTENDERS, "wrong", wrong)
    with pytest.raises(WrongResult, match=r"wrong: p\.grad is off"):
        accumulation.contenders(accumulation.transformer(3, True))


JOB = train_step.Job(images=10, chunk=8, width=2, penalised=False, workers=0)


@pytest.mark.parametrize("what", ["gradient", "update"])
@pytest.mark.parametrize("kind", ["trainer_step", "data_loader_step"])
def test_wrong_whole_step_is_caught(kind, what, monkeypatch):
    make = getattr(train_step, kind)

    def wrong(job):
        step = make(job)
        params = list(step.model.parameters())

        @torch.no_grad()
        def spoiled():
            kept = [p.clone() for p in params]
            with torch.enable_grad():
                step.run()
            for p, old in zip(params, kept, strict=True):
                p.grad.mul_(1.05) if what == "gradient" else p.copy_(old)

        return replace(step, run=spoiled)

    monkeypatch.setattr(train_step, kind, wrong)
    monkeypatch.setitem(train_step.CHECKED, "images", 10)
    with pytest.raises(WrongResult, match=r"p\.grad is off" if what == "gradient" else "not move"):
        train_step.check(JOB)


@pytest.mark.parametrize("kind", [*UPDATES, *ADAPTIVE_UPDATES])
@pytest.mark.parametrize("what", ["sum", "parameter", "perturbation"])
def test_wrong_chunk_update_is_caught(kind, what):
    class Wrong(kind):
        def update(self, second_pass):
            super().update(lambda: self.spoil(second_pass))
            if what == "sum" and kind is FboptExactUpdate:
                self.gradients.store._sums[0][3].view(-1)[-1] += 2**57
            elif what == "sum":
                self.sums[3].view(-1)[-1] *= 1.01
            elif what == "parameter":
                self.params[1].data = torch.nextafter(self.params[1].data, torch.tensor(9.0))

        def spoil(self, second_pass):
            with torch.no_grad():
                self.params[0].view(-1)[0] += 0.01 * (what == "perturbation")
            second_pass()

    chunk = Operands.of(FEW, eta=0.01 if kind in ADAPTIVE_UPDATES else None)
    ops.check_update(kind(chunk), chunk)
    with pytest.raises(WrongResult, match=what):
        ops.check_update(Wrong(chunk), chunk)


@pytest.mark.parametrize("kind", STACKED)
@pytest.mark.parametrize("what", ["sum", "shift"])
def test_wrong_stacked_update_is_caught(kind, what):
    class Wrong(kind):
        def step(self):
            super().step()
            if what == "sum":
                self.sums[3].view(-1)[-1] *= 1.01
            else:
                self.points[0][2].view(-1)[0] += 0.01

    stacks = Stacks(FEW, 3, CPU)
    check_stacked(kind(stacks))
    with pytest.raises(WrongResult, match=what):
        check_stacked(Wrong(stacks))


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("what", ["update", "momentum"])
def test_wrong_finishing_step_is_caught(kind, what):
    class Wrong(kind):
        def step(self):
            super().step()
            wrong = self.params[3] if what == "update" else self.momentum()[3]
            with torch.no_grad():
                wrong.view(-1)[-1] += 0.01

    finish = Operands.of(FEW, penalised=False)
    ops.check_step(kind(finish), finish)
    # A wrong momentum shows in the second update.
    with pytest.raises(WrongResult, match=r"the (update|momentum)"):
        ops.check_step(Wrong(finish), finish)


@pytest.mark.parametrize("op", kernels.WORDS)
def test_wrong_kernel_is_caught(op, monkeypatch):
    right = getattr(kernels.dispatch, op)

    def wrong(*args, **rule):
        if op in ("squared_norm", "adaptive_norms"):
            return 1.001 * right(*args)
        found = right(*args, **rule)
        written = args[0][-1] if isinstance(args[0], list) else args[0]
        off = 0.01 if written.is_floating_point() else int(0.01 * kernels.EXACT_SCALE)
        written.view(-1)[-1] += off
        return found

    monkeypatch.setattr(kernels.dispatch, op, wrong)
    with pytest.raises(WrongResult, match=op):
        kernels.kernels(Operands.of(FEW))


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("penalised", [False, True])
def test_wrong_closure_call_is_caught(kind, penalised):
    class Wrong(kind):
        def __call__(self):
            super().__call__()
            self.params[0].grad.view(-1)[0] *= 1.001

    step.check("small-cnn", penalised, [kind], CPU)
    with pytest.raises(WrongResult, match="grad"):
        step.check("small-cnn", penalised, [Wrong], CPU)


def test_number_of_passes_is_checked():
    class Twice(step.BarePasses):
        def __call__(self):
            super().__call__()
            super().__call__()

    with pytest.raises(WrongResult, match="6 forward passes over 3 chunks"):
        step.check("small-cnn", False, [Twice], CPU)


def test_penalty_is_made_visible():
    """A gradient without its second pass is not within the tolerance of half precision."""
    task = Task(cases.model("small-cnn"), cases.data("small-cnn", 4, 4), True)
    shown = task.with_visible_penalty()
    require_close("it", "p.grad", shown.expected, shown.expected, 0)
    _, grads = task.gradient(*task.chunks[0])
    with pytest.raises(WrongResult, match=r"p\.grad is off"):
        require_close("it", "p.grad", grads, shown.expected, 0.2, norm=2)


def test_memory_limit_is_checked_and_may_be_absent(monkeypatch, few):
    idle = types.SimpleNamespace(triad=lambda *args: None)
    monkeypatch.setattr(bandwidth, "load", types.SimpleNamespace(load=lambda *args: idle))
    bandwidth.load.build = lambda *args: None
    with pytest.raises(WrongResult, match="triad"):
        bandwidth.limits(300, CPU)

    def refuse(*args):
        raise BuildError("no compiler", "install one")

    bandwidth.load.build = refuse
    with pytest.warns(RuntimeWarning, match="no memory limit: no compiler"):
        table = ops.part_table("Penalised chunk update", "tiny", Plan(1), compiled=False)
    assert table.limit is None


def test_nan_is_no_result():
    with pytest.raises(WrongResult, match="off by nan"):
        require_close("it", "x", [torch.tensor(float("nan"))], [torch.ones(())], 1e-3)


def test_every_contender_has_its_turn_in_every_round():
    log: list[str] = []
    contenders = [Contender(name, lambda name=name: log.append(name)) for name in "abc"]
    table = measure("t", contenders, Plan(4), prepare=lambda: log.append("-"))
    assert [len(row.seconds) for row in table.rows] == [4, 4, 4]
    assert log[::2] == ["-"] * (len(log) // 2)
    assert all(log.count(name) >= 4 for name in "abc")


def test_ratios_are_taken_round_by_round():
    ours = Timing(Contender("a", list, words=5 * 10**8), [1.0, 10.0, 2.0])
    other = Timing(Contender("b", list, words=10**9, is_limit=True), [2.0, 20.0, 4.2])
    table = Table("t", [ours, other])
    assert report.entries(other, ours, None)["ratio"] == 2
    assert ours.bandwidth == 1  # 5e8 words of 4 bytes in 2 s
    found = report.entries(ours, ours, table.limit)
    assert found["of_limit"] == pytest.approx(1.05)


def test_time_ends_the_rounds(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(timing.time, "monotonic", lambda: next(clock))
    for seconds, rounds in ((10, timing.MIN_ROUNDS + 10), (-1, timing.MIN_ROUNDS)):
        plan = Plan(50, seconds=seconds, whole=True)
        assert len(measure("t", [Contender("a", list)], plan).rows[0].seconds) == rounds


def test_a_gpu_is_timed_by_its_own_clock_too(monkeypatch):
    log = []
    event = types.SimpleNamespace(
        record=lambda: log.append("event"),
        synchronize=lambda: log.append("wait"),
        elapsed_time=lambda last: 6.0,
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("fill"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("idle"))
    run, prepare = (lambda what=what: log.append(what) for what in ("run", "prepare"))
    assert timing.device_time(run, prepare, 2, GPU) == 6e-3
    call = ["prepare", "fill", "event", "run", "event", "wait"]
    assert log == ["prepare", "idle", "run", *call, *call]
    (row,) = measure("t", [Contender("a", list)], Plan(3, GPU)).rows
    assert row.seconds == [6e-3] * 3 and len(row.wall) == 3
    text = report.markdown([report.entries(row, row, None)], "a")
    assert "| wall ms | its ratio |" in text.splitlines()[0]


@pytest.mark.slow
def test_compiled_contenders_agree():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chunk, finish = Operands.of(FEW), Operands.of(FEW, penalised=False)
        ops.check_update(CHUNK_UPDATES[-1](chunk), chunk)
        ops.check_step(FINISHING_STEPS[-1](finish), finish)
        check_stacked(STACKED_UPDATES[-1](Stacks(FEW, 3, CPU)))
