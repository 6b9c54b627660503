"""The benchmarks run, write what they promise, and stop at wrong results. No test reads a clock."""

from __future__ import annotations

import json
import types
import warnings

import pytest
import torch

from benchmarks import (
    calls,
    clocks,
    devices,
    epoch,
    finishing,
    harness,
    memory,
    networks,
    ops,
    report,
    rivals,
    single,
    step,
    tables,
    whole_steps,
)
from benchmarks.calls import Task
from benchmarks.cases import Chunk, Finish, WrongResult, require_close, shapes
from benchmarks.harness import Contender, Plan, Timing, Timings, in_turn, measure
from fbopt._build.compiler import BuildError

FEW = [torch.Size(s) for s in ((3, 4), (), (5,), (2, 3, 3, 3), (40,))]
MACHINE = {"cpu", "cores", "threads", "openmp", "backend", "torch", "fbopt", "python", "system"}
ROW = {"name", "median_s", "quartiles_s", "fastest_s", "rounds", "ratio", "ratio_quartiles"}
EAGER_UPDATES = [kind for kind in rivals.CHUNK_UPDATES if kind is not rivals.Compiled]
CALLS = [calls.Ours, calls.Plain, calls.PlainUnsynced, calls.Published]
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


EPOCH = ("--width", "2", "--images", "20", "--chunk", "8", "--workers", "1")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_epoch_runs_and_is_written(tmp_path, capsys, precision):
    arguments = (*EPOCH, "--precision", precision, "--penalty")
    content, printed = run(epoch, tmp_path, capsys, *arguments)
    check_json(content, "epoch")
    (table,) = content["tables"]
    names = [row["name"].partition(",")[0] for row in table["rows"]]
    ours = ["fbopt train", "its passes alone"]
    expected = [*ours, "DataLoader with 1 workers", *(ours if precision == "bf16" else [])]
    assert names == expected
    assert all(row["images"] == 20 and row["images_per_s"] > 0 for row in table["rows"])
    goals = [goal["goal"] for goal in content["goals"]]
    assert goals == (["≥ 2", "≥ 0.97", "≥ 0.97"] if precision == "bf16" else [None, "≥ 0.97"])
    assert "with penalty, ResNet-18 of width 2, 20 images in chunks of 8" in printed
    assert "gradient off from float64's" in printed


def test_epoch_compiled():
    """The usual way is never compiled; what is, stands beside the same without."""
    job = whole_steps.Job(images=20, chunk=8, width=2, penalised=False, workers=0, compiled=True)
    steps = epoch.contenders(job, "fp32")
    assert [step.name.endswith("compiled") for step in steps] == [True, True, False, False, False]
    made = [step.model._compiled_call_impl is not None for step in steps]
    assert made == [True, True, False, False, False]


@pytest.mark.parametrize("what", ["gradient", "update"])
@pytest.mark.parametrize("kind", [whole_steps.Trained, whole_steps.Loaded], ids=named)
def test_wrong_whole_step_is_caught(kind, what, tmp_path, monkeypatch):
    call = kind.__call__

    def wrong(self):
        kept = [p.detach().clone() for p in self.model.parameters()]
        call(self)
        with torch.no_grad():
            for p, old in zip(self.model.parameters(), kept, strict=True):
                if what == "gradient":
                    p.grad *= 1.05
                else:
                    p.copy_(old)

    monkeypatch.setattr(kind, "__call__", wrong)
    job = whole_steps.Job(images=20, chunk=8, width=2, penalised=False)
    with pytest.raises(WrongResult, match="p.grad is off" if what == "gradient" else "not move"):
        epoch.check(job, "fp32", report.Report("epoch", []))


def test_file_is_named_after_the_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "cpu_name", lambda: "Some(R) CPU @ 2.0GHz")
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
            if what == "sum" and kind is rivals.OursExact:
                self.gradients.store._sums[0][3].view(-1)[-1] += 2**57
            elif what == "sum":
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
        wrong_by = 0.01 if written.is_floating_point() else int(0.01 * single.EXACT_SCALE)
        written.view(-1)[-1] += wrong_by
        return found

    monkeypatch.setattr(single._ops, op, wrong)
    with pytest.raises(WrongResult, match=op):
        single.single_ops(Chunk.of(FEW))


@pytest.mark.parametrize("kind", CALLS, ids=named)
@pytest.mark.parametrize("penalised", [False, True])
def test_wrong_closure_call_is_caught(kind, penalised):
    class Wrong(kind):
        def __call__(self):
            super().__call__()
            self.params[0].grad.view(-1)[0] *= 1.001

    if kind is not calls.Published or penalised:
        networks.check("small-cnn", 5, 2, penalised, kinds=[kind])
    with pytest.raises(WrongResult, match="grad"):
        networks.check("small-cnn", 5, 2, penalised, kinds=[Wrong])


@pytest.mark.parametrize("kind", CALLS, ids=named)
def test_parameters_stay_where_they_are(kind):
    """A closure's shift and graphs are made for one place in memory."""
    task = Task(networks.model("small-cnn"), networks.chunks("small-cnn", 5, 2), True)
    before = [p.data_ptr() for p in task.params]
    kind(task)()
    assert [p.data_ptr() for p in task.params] == before


@pytest.mark.parametrize("kind", [calls.Bare, calls.BareGraphed], ids=named)
def test_number_of_passes_is_checked(kind):
    class Twice(kind):
        def __call__(self):
            super().__call__()
            super().__call__()

    networks.check("small-cnn", 5, 2, True, kinds=[kind])
    with pytest.raises(WrongResult, match="6 forward passes over 3 chunks"):
        networks.check("small-cnn", 5, 2, False, kinds=[Twice])


def test_graphed_passes_see_each_chunk(monkeypatch):
    """A graph works on copies of what it was captured with."""
    task = Task(networks.model("small-cnn"), networks.chunks("small-cnn", 6, 2), False)
    call, seen = calls.BareGraphed(task), []
    task.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    call()
    assert len(call.graphs) == 1
    assert all(torch.equal(s, x) for s, (x, _) in zip(seen, task.chunks, strict=True))


def test_penalty_is_made_visible():
    task = Task(networks.model("small-cnn"), networks.chunks("small-cnn", 4, 4), True)
    shown = calls.visible(task)
    (x, y), shares = task.chunks[0], []
    _, grads = task.gradient(x, y)
    for each in (task, shown):
        shares.append(networks.distance(calls.expected(each), grads))
    assert shares[1] > 0.4 > shares[0]
    networks.require_near("it", calls.expected(shown), calls.expected(shown), 0)
    with pytest.raises(WrongResult, match=r"p\.grad is off"):
        networks.require_near("it", grads, calls.expected(shown), 0.15)


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
        timings = ops.chunk_table("tiny", Plan(1))
    assert ops.limit_of(timings) is None


def test_nan_is_no_result():
    with pytest.raises(WrongResult, match="off by nan"):
        require_close("it", "x", [torch.tensor(float("nan"))], [torch.ones(()).double()], 1e-3)


def test_every_contender_has_its_turn_in_every_round():
    log: list[str] = []
    contenders = [Contender(name, lambda name=name: log.append(name)) for name in "abc"]
    timings = measure("t", contenders, Plan(4), prepare=lambda: log.append("-"))
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


def test_time_ends_the_rounds(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(harness.time, "monotonic", lambda: next(clock))
    timings = measure("t", [Contender("a", lambda: None)], Plan(50, seconds=10, whole=True))
    assert len(timings["a"].seconds) == harness.LEAST_ROUNDS + 10
    timings = measure("t", [Contender("a", lambda: None)], Plan(50, seconds=-1, whole=True))
    assert len(timings["a"].seconds) == harness.LEAST_ROUNDS


class Ticks:
    """A clock that shows how often it was looked at."""

    def __init__(self, tick):
        self.tick, self.turns = tick, 0

    def turn(self, run, prepare, calls):
        run()
        self.turns += 1
        return self.tick * self.turns


def test_two_clocks(monkeypatch):
    monkeypatch.setattr(Plan, "clocks", property(lambda self: [Ticks(1.0), Ticks(0.5)]))
    contenders = [Contender("a", lambda: None, per=10), Contender("b", lambda: None, words=10**9)]
    timings = measure("t", contenders, Plan(3, whole=True), seed=1)
    assert all(len(row.wall) == len(row.seconds) == 3 for row in timings.rows)
    assert timings["a"].wall == [x / 2 for x in timings["a"].seconds]
    assert timings.ratio("b", "a", wall=True) == timings.ratio("b", "a")
    rows = [tables.entries(row, timings["a"], None) for row in timings.rows]
    head = tables.markdown(rows, "a").splitlines()[0]
    assert [cell.strip() for cell in head.split("|")[-5:-1]] == [
        "its quartiles",
        "wall ms",
        "its ratio",
        "GB/s",
    ]


def test_device_clock_fills_the_queue_first(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, last):
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("fill"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("idle"))
    clock = clocks.Events(torch.device("cuda"))
    run, prepare = (lambda what=what: log.append(what) for what in ("run", "prepare"))
    assert clock.turn(run, prepare, 2) == 6e-3
    call = ["prepare", "fill", "event", "run", "event", "wait"]
    assert log == ["prepare", "idle", "run", *call, *call]
    log.clear()
    assert clock.turn(run, None, 3) == 2e-3
    assert log == ["idle", "run", "fill", "event", *["run"] * 3, "event", "wait"]


@pytest.mark.parametrize(
    "nbytes,most,sets", [(1, 64, 1), (10**6, 64, 41), (10**7, 64, 5), (10**9, 8, 2)]
)
def test_sets_pass_the_cache(nbytes, most, sets, monkeypatch):
    monkeypatch.setattr(devices, "cache_bytes", lambda device: 10**7)
    assert devices.sets_beyond_cache(torch.device("cuda"), nbytes, most) == sets
    assert devices.sets_beyond_cache(devices.CPU, nbytes, most) == 1


def test_sets_are_used_in_turn():
    log = []
    runs = [lambda i=i: log.append(i) for i in range(3)]
    run = in_turn(runs)
    for _ in range(6):
        run()
    assert sorted(log[:3]) == sorted(log[3:]) == [0, 1, 2]
    assert in_turn(runs[:1]) is runs[0]


def test_copies_are_checked(monkeypatch):
    contender = memory.copy(11, devices.CPU)
    assert contender.words == 10
    assert memory.is_limit(contender.name)
    monkeypatch.setattr(memory, "_copy", lambda source, to: None)
    with pytest.raises(WrongResult, match="copy"):
        memory.copy(10, devices.CPU)


def test_each_kernel_has_its_limit():
    rows = [Timing("op", [2.0], 4, "copy, 4 words"), Timing("copy, 4 words", [1.0], 4)]
    collected = report.Report("ops", [])
    collected.table(Timings("t", [*rows, Timing("largest", [1.0], 16)]), Timing("x", [1.0], 16))
    assert [row["of_limit"] for row in collected.tables[0]["rows"]] == [0.5, 0.25, 1]


@pytest.mark.parametrize("precision", devices.PRECISIONS.values(), ids=lambda p: p.name)
def test_precision_is_put_back(precision):
    switches = torch.backends.cudnn, torch.backends.cuda.matmul

    def state():
        return [s.allow_tf32 for s in switches], torch.backends.cudnn.benchmark

    before = state()
    with pytest.raises(KeyError), precision.active():
        assert state() == ([precision.tf32] * 2, True)
        raise KeyError
    assert state() == before


def test_nvidia_smi_is_read(monkeypatch):
    line = "580.1, 345 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 700.00 W, 31, Default"
    asked = []

    def run(command, **options):
        asked.append(command)
        return types.SimpleNamespace(returncode=0, stdout=line + "\n")

    monkeypatch.setattr(devices.subprocess, "run", run)
    found = devices.smi("1-2")
    assert found["driver_version"] == "580.1" and found["clocks.sm"] == "345 MHz"
    assert asked[0][0] == "nvidia-smi" and asked[0][-2:] == ["-i", "GPU-1-2"]
    assert all(word.startswith(("--query-gpu=", "--format=")) for word in asked[0][1:3])
    line = "no such query"
    assert devices.smi(None) == {}
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "/no/such/folder")
    assert devices.smi(None) == {}


@pytest.mark.slow
def test_compiled_contenders_agree():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chunk, finish = Chunk.of(FEW), Finish.of(FEW)
        ops.check_chunk(rivals.Compiled(chunk), chunk)
        ops.check_finish(finishing.Compiled(finish), finish)
