"""A ladder of tiny rows: its plan, processes, interruption, table and figures."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fbopt.train import loop
from fbopt.train.checkpoint import atomic
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.parser import command_line, parse
from fbopt.train.config.recipes import NAMES
from fbopt.train.ladder import figures, paired, plan, runner, speed, summary
from fbopt.train.ladder.__main__ import main
from fbopt.train.ladder.plan import Ladder, make_plan
from fbopt.train.reporting import plots

SMALL = ["--width", "4", "--share", "0.02"]


def plan_of(tiny: str, out: Path, *arguments: str) -> plan.Plan:
    words = ["--data", tiny, "--out", str(out), *SMALL, *arguments]
    return make_plan(*parse("fbopt ladder", words, Ladder, Options))


ROWS = ("--rows", "sgd", "fb-penalty-aug", "--seeds", "2", "--lr", "0.2")


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory) -> Path:
    """The folder of a ladder with two rows and two seeds, whose runs were finished before."""
    out = tmp_path_factory.mktemp("ladder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_curves", lambda folder, options: False)
        patch.setattr(runner.Runner, "start", lambda *a: pytest.fail("trained again"))
        for options in plan_of(tiny, out, *ROWS).last_row_first:
            loop.train(options)
        assert main(["--data", tiny, "--out", str(out), *SMALL, *ROWS]) == 0
    return out


def test_what_a_ladder_writes(tiny, done):
    content = json.loads((done / "ladder.json").read_text())
    assert content["data"] == tiny and content["command"].startswith("fbopt ladder --data")
    for row, name in zip(content["rows"], ("sgd", "fb-penalty-aug"), strict=True):
        assert row["row"] == name and row["options"]["lr"] == 0.2 and row["seeds"] == 2
        found = [run["test_accuracy"] for run in row["runs"]]
        assert found == [
            RunFolder(done / f"{name}-s{seed}").read_result()["test_accuracy"] for seed in (0, 1)
        ]
        mean = sum(found) / 2
        deviation = (sum((x - mean) ** 2 for x in found)) ** 0.5
        assert row["test_accuracy"]["mean"] == pytest.approx(mean)
        assert row["test_accuracy"]["deviation"] == pytest.approx(deviation)
        assert row["runs"][0]["step"] == (4 * 1 if name == "sgd" else 20)
    table = (done / "ladder.md").read_text()
    assert "| `fb-penalty-aug` |" in table and "95.36 ± 0.07" in table and " ± " in table
    assert f"{100 * mean:.2f} ± {100 * deviation:.2f} | – | 2 |" in table
    for name in figures.FIGURES:
        assert (done / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_figures_name_the_data_and_the_panels(tiny, done, monkeypatch):
    pages, figure = [], plots.figure
    monkeypatch.setattr(plots, "figure", lambda *size: pages.append(figure(*size)) or pages[-1])
    assert main(["--data", tiny, "--out", str(done), *SMALL, *ROWS]) == 0
    assert len(pages) == len(figures.FIGURES)
    for page, panels in zip(pages, figures.FIGURES.values(), strict=True):
        assert page.get_suptitle() == f"{Path(tiny).stem}, mean of 2 seeds"
        assert [axes.get_title() for axes in page.axes] == [title for _, title, _ in panels]


def test_runs_are_commands_of_fbopt_train(tiny, tmp_path):
    """Every run is what `fbopt train` makes of the options of its row, its seed and all rows."""
    runs = plan_of(tiny, tmp_path, *ROWS, "--no-nesterov", "--chunks=shuffled").runs
    first, second = runs["fb-penalty-aug"]
    assert (first.recipe, first.steps, first.lr) == ("fb-penalty-aug", 20, 0.2)
    assert (first.seed, second.seed, second.nesterov) == (0, 1, False)
    for options in (first, second):
        assert parse("fbopt train", command_line(options), Options) == [options]


def test_other_options_than_those_of_a_finished_run_are_refused(tiny, done):
    with pytest.raises(OptionsError, match="was made with other options: --steps 20, now 40"):
        runner.run_all(plan_of(tiny, done, *ROWS, "--share", "0.04"))


def test_sums_are_for_the_rows_that_have_them(tiny, tmp_path):
    runs = plan_of(tiny, tmp_path, *ROWS, "--accumulation", "float32").runs
    assert [runs[row][0].accumulation for row in runs] == [None, "float32"]


def test_interrupted_and_resumed(tiny, tmp_path, monkeypatch, capsys):
    """SIGINT to the ladder alone: its runs save, it says how to go on, and goes on from there."""
    words = ["--data", tiny, "--out", "out", "--rows", "fb-clip", "--seeds", "2", "--width", "4"]
    words += ["--jobs", "2", "--share", "0.6", "--log-every", "1"]
    command = [sys.executable, "-m", "fbopt.train.ladder", *words]
    setting = {
        "cwd": tmp_path,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "env": os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
    }
    runs = [RunFolder(tmp_path / "out" / f"fb-clip-s{seed}") for seed in (0, 1)]
    with subprocess.Popen(command, **setting) as process:
        end = time.monotonic() + 60
        while not all(len(atomic.read_lines(run.metrics)) > 5 for run in runs):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"go on with\n  fbopt ladder {' '.join(words)}\n" in out
    saved = [run.checkpoints()[0][0] for run in runs]
    assert all(5 < step < 600 for step in saved)
    assert not any(run.result.exists() for run in runs)
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "2 runs, 0 of them finished" in out and "(2 of 2 runs)" in out
    for seed, step in enumerate(saved):
        log = (tmp_path / "out" / "logs" / f"fb-clip-s{seed}.log").read_text()
        assert f"resumed at step {step}" in log
        assert [r["pass"] for r in runs[seed].read_metrics()] == list(range(1, 601))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the runs go on")
def test_a_killed_ladder_takes_its_runs_along(tiny, tmp_path):
    """They save first; the same command goes on."""
    words = ["--data", tiny, "--out", "out", "--rows", "fb-clip", "--seeds", "1", "--width", "4"]
    command = [sys.executable, "-m", "fbopt.train.ladder", *words, "--share", "60", "--log-every=1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    run = RunFolder(tmp_path / "out" / "fb-clip-s0")
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **silent) as process:
        end = time.monotonic() + 60
        while len(atomic.read_lines(run.metrics)) < 5:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        process.kill()
    while not run.checkpoints():
        assert time.monotonic() < end
        time.sleep(0.02)
    log = (tmp_path / "out" / "logs" / "fb-clip-s0.log").read_text
    while "go on with" not in log():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert not run.result.exists()


def clock(monkeypatch, now) -> None:
    """Let the ladder read this clock."""
    monkeypatch.setattr(runner, "time", SimpleNamespace(sleep=time.sleep, monotonic=now))


def test_a_budget_stops_and_the_same_command_goes_on(tiny, tmp_path, monkeypatch, capsys):
    """The time is over as soon as both runs have taken some steps."""
    words = ["--data", tiny, "--out", str(tmp_path), "--rows", "fb-clip", "fb-long", "--seeds", "1"]
    words += ["--width", "4", "--jobs", "2", "--share", "0.3", "--log-every", "1", "--minutes", "9"]
    runs = [RunFolder(tmp_path / f"{row}-s0") for row in ("fb-clip", "fb-long")]
    with monkeypatch.context() as patch:
        clock(patch, lambda: math.inf if all(len(r.read_metrics()) > 25 for r in runs) else 0.0)
        assert main(words) == 130
    out = capsys.readouterr().out
    assert "the time is over\nstopping after the step of every run" in out
    assert out.endswith(f"go on with\n  fbopt ladder {' '.join(words)}\n")
    assert "| `fb-clip` | – (1 not finished) | – | 0 |" in out
    for row in ("fb-clip", "fb-long"):
        told = re.search(rf"{row}, seed 0: ([\d,]+) images/s with 1 gradient of each, 0:0", out)
        assert int(told[1].replace(",", "")) > 0
    saved = [run.checkpoints()[0][0] for run in runs]
    assert all(25 < step < 300 for step in saved)
    assert main(words) == 0
    assert "(2 of 2 runs)" in capsys.readouterr().out
    for step, run in zip(saved, runs, strict=True):
        log = (tmp_path / "logs" / f"{run.path.name}.log").read_text()
        assert f"resumed at step {step} of 300" in log
        assert [r["pass"] for r in run.read_metrics()] == list(range(1, 301))


def test_nothing_is_started_when_the_time_is_over(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner.Runner, "start", lambda *a: pytest.fail("a run was started"))
    words = ["--data", tiny, "--out", str(tmp_path / "out"), *SMALL, "--rows", "fb"]
    assert main([*words, "--minutes", "1e-9"]) == 130
    assert "| `fb` | – (3 not finished) | – | 0 |" in capsys.readouterr().out


def run_program(monkeypatch, program: str) -> None:
    """Let every run be this program, which is ready when it has printed a line."""
    words = f"import sys, time\nprint('ready', flush=True)\n{program}"
    start = subprocess.Popen
    monkeypatch.setattr(
        runner.subprocess, "Popen", lambda run, **more: start([run[0], "-c", words], **more)
    )


def test_runs_that_do_not_save_in_time_are_ended(tiny, tmp_path, monkeypatch):
    """The time is over once the run is ready, the grace once it had one signal."""
    wait = "    try: time.sleep(60)\n    except KeyboardInterrupt: print('signal', flush=True)"
    run_program(monkeypatch, f"for _ in range(2):\n{wait}")
    log = tmp_path / "logs" / "fb-s0.log"
    clock(monkeypatch, lambda: 100.0 * (log.read_text().count("\n") if log.exists() else 0))
    plan = plan_of(tiny, tmp_path, "--rows", "fb", "--seeds", "1")
    assert runner.run_all(replace(plan, deadline=50.0, grace=100.0)) == 130
    assert log.read_text() == "ready\nsignal\n"


def test_a_run_that_computes_nothing_is_ended(tiny, tmp_path, monkeypatch, capsys):
    """One that computes is left alone."""
    plan = plan_of(tiny, tmp_path, "--rows", "fb", "--seeds", "1", "--timeout", "0.02")
    with monkeypatch.context() as patch:
        run_program(patch, "time.sleep(60)")
        assert runner.run_all(plan) == 1
    said = capsys.readouterr().err
    name = r"fb, seed 0 \(process \d+\) has computed nothing for \d s"
    assert re.search(rf"{name}; it is waited for at most 0\.02 minutes\n", said)
    assert "fb, seed 0: ended, as it had computed nothing for 0.02 minutes; the same" in said
    run_program(monkeypatch, "end = time.monotonic() + 3\nwhile time.monotonic() < end: pass")
    assert runner.run_all(plan) == 1
    assert "ended, as it had computed nothing" not in capsys.readouterr().err


def test_a_second_signal_ends_runs_that_do_not_stop(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "KILL_SECONDS", 0.2)
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    run_program(monkeypatch, f"{ignore}; print('deaf', flush=True); time.sleep(60)")
    log, sent = tmp_path / "logs" / "fb-s0.log", []

    def now() -> float:
        if log.exists() and "deaf" in log.read_text() and len(sent) < 2:
            sent.append(True)
            signal.raise_signal(signal.SIGINT)
        return time.monotonic()

    clock(monkeypatch, now)
    plan = plan_of(tiny, tmp_path, "--rows", "fb", "--seeds", "1")
    assert runner.run_all(plan) == 130
    assert "ending what has not stopped, back at its last save" in capsys.readouterr().out


@pytest.mark.parametrize("by_signal", [True, False])
def test_a_last_run_that_is_finished_when_it_is_stopped(tiny, tmp_path, monkeypatch, by_signal):
    """Nothing is left then, but whoever sent a signal wants to know that it was heard."""
    folder = tmp_path / "fb-s0"
    folder.mkdir()
    result = f"open({str(folder / 'result.json')!r}, 'w').write('{{}}')"
    run_program(monkeypatch, f"try: time.sleep(60)\nexcept KeyboardInterrupt: {result}")
    monkeypatch.setattr(runner.Runner, "_report", lambda self, *a: setattr(self, "done", 1))
    log, sent = tmp_path / "logs" / "fb-s0.log", []

    def now() -> float:
        ready = log.exists() and "ready" in log.read_text()
        if by_signal and ready and not sent:
            sent.append(signal.raise_signal(signal.SIGINT))
        return 100.0 * ready * (not by_signal)

    clock(monkeypatch, now)
    plan = plan_of(tiny, tmp_path, "--rows", "fb", "--seeds", "1")
    assert runner.run_all(replace(plan, deadline=50.0)) == (130 if by_signal else 0)
    assert (folder / "result.json").exists()


def line(step: int, seconds: float, gradients: int = 2) -> dict:
    evaluations = gradients * step
    passes = {
        "pass": step, "gradient_evaluations": evaluations, "sample_passes": 75 * evaluations,
    }  # fmt: skip
    return {"step": step, "seconds": seconds, "loss": 1.0} | passes


def test_speed_is_that_since_the_last_start(tiny, tmp_path):
    """40 passes of 75 samples with two gradients in 20 s; before, on another machine, ten times
    slower; the first step since the start compiled.
    """
    options = Options(data=tiny, recipe="fb-penalty", steps=1000, out=tmp_path)
    before = [line(step, 5.0 * step) for step in range(1, 61)]
    after = [line(step, 400 + 0.5 * (step - 61)) for step in range(61, 102)]
    atomic.replace_lines(tmp_path / "metrics.jsonl", before)
    atomic.replace_lines(tmp_path / "environment.jsonl", [{"step": 0}])
    assert speed.measure(options).images_per_s == pytest.approx(2 * 75 / 5)
    assert speed.measure(options, since=60) is None
    atomic.replace_lines(tmp_path / "metrics.jsonl", before + after)
    atomic.replace_lines(tmp_path / "environment.jsonl", [{"step": 0}, {"step": 60}])
    found = speed.measure(options)
    assert (found.steps, found.images_per_s, found.gradients) == (40, 300.0, 2.0)
    assert found.seconds_left == (1000 - 101) * 0.5
    assert str(found) == "300 images/s with 2 gradients of each, 0:07:30 to its end"


def test_a_run_that_fails_does_not_stop_the_others(tiny, tmp_path, capsys):
    words = ["--data", tiny, "--out", str(tmp_path), *SMALL, "--rows", "fb", "fb-clip"]
    words += ["--seeds", "1", "--lr", "1e30", "--jobs", "2", "--warmup", "0"]
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert "fb, seed 0: failed: the loss became infinite or undefined" in err and "logs" in err
    assert re.search(r"\| `fb` \| – \(1 not finished\) \| – \| 0 \| – \|", out)
    assert json.loads((tmp_path / "ladder.json").read_text())["rows"][0]["test_accuracy"] is None


def test_a_run_interrupted_by_someone_else_is_told(tiny, tmp_path, monkeypatch, capsys):
    """Its last line says how to resume it alone, which is no reason."""
    program = "import signal, sys; print('go on with'); sys.exit(130)"
    start = subprocess.Popen
    monkeypatch.setattr(
        runner.subprocess, "Popen", lambda words, **more: start([words[0], "-c", program], **more)
    )
    words = ["--data", tiny, "--out", str(tmp_path), *SMALL, "--rows", "fb", "--seeds", "1"]
    assert main(words) == 1
    err = capsys.readouterr().err
    assert "fb, seed 0: interrupted; the same command goes on with it (see " in err


BAD = {
    "recipe": (["--recipe", "fb"], "--recipe is set by the ladder for every run"),
    "seed": (["--seed", "3"], "--seed is set by the ladder"),
    "seeds": (["--seeds", "0"], "--seeds 0: has to be at least 1"),
    "jobs": (["--jobs", "0"], "--jobs 0: has to be at least 1"),
    "minutes": (["--minutes", "0"], "--minutes 0.0: has to be above 0"),
    "share": (["--share", "0"], "--share 0.0: has to be above 0"),
    "twice": (["--rows", "fb", "fb"], "--rows: name at least one recipe, and each of them once"),
    "option": (["--lr", "-1"], "--lr -1.0: has to be above 0"),
    "data": (["--data", "npz:none.npz"], "--data npz:none.npz: there is no such file"),
    "never": (["--test", "never", "--validation", "0.2"], "--test never: the table is of the test"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_starts_nothing(tiny, tmp_path, capsys, monkeypatch, case):
    arguments, message = BAD[case]
    monkeypatch.setattr(runner.Runner, "start", lambda *a: pytest.fail("a run was started"))
    words = ["--data", tiny, "--out", str(tmp_path / "out"), *SMALL, *arguments]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_options_are_refused(tiny, capsys):
    for words in (["--learning-rate", "1"], ["--rows", "fb-best"]):
        with pytest.raises(SystemExit) as stop:
            main(["--data", tiny, *words])
        assert stop.value.code == 2


JOBS = [  # cores, free bytes, threads of the runs, device: how many at once
    (8, 64e9, 1, "cpu", 8),
    (8, 64e9, 3, "cpu", 2),
    (8, 64e9, None, "cpu", 1),
    (8, 3.2e9, 1, "cpu", 2),
    (2, 1e8, 1, "cpu", 1),
    (8, 64e9, 1, "cuda", 1),
]


@pytest.mark.parametrize(("cores", "memory", "threads", "device", "expected"), JOBS)
def test_as_many_at_once_as_the_machine_bears(
    monkeypatch, cores, memory, threads, device, expected
):
    monkeypatch.setattr("fbopt.train.ladder.plan.cores", lambda: cores)
    pages = {"SC_PHYS_PAGES": int(memory), "SC_PAGE_SIZE": 1}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    common = Options(data="cifar10", threads=threads, device=device)
    plan = make_plan(Ladder(data="cifar10", out=Path("nowhere")), common)
    assert plan.jobs == expected
    asked = make_plan(Ladder(data="cifar10", out=Path("nowhere"), jobs=4), common)
    assert asked.jobs == 4
    found = {o.threads for o in asked.last_row_first}
    assert found == {threads or max(1, cores // 4)}


def test_the_last_row_first(tiny, tmp_path):
    plan = plan_of(tiny, tmp_path, "--rows", "fb", "fb-clip", "fb-strong", "--seeds", "2")
    assert [o.recipe for o in plan.last_row_first] == ["fb-strong"] * 2 + ["fb-clip"] * 2 + [
        "fb"
    ] * 2
    assert [o.seed for o in plan.last_row_first] == [0, 1] * 3


def test_every_recipe_has_a_look_of_its_own():
    assert len({tuple(figures.LOOKS[name].values()) for name in NAMES}) == len(NAMES)


def test_lines_are_where_all_seeds_have_a_value():
    runs = [[{"pass": 1, "loss": 2.0}, {"pass": 2, "loss": 1.0}], [{"pass": 1, "loss": 4.0}]]
    assert plots.shared_points(runs, "loss", "pass") == {1: [2.0, 4.0]}


def test_words_of_the_table():
    one = {"mean": 0.5, "deviation": None, "n": 1}
    runs = [{"step": step, "gradient_evaluations": 18} for step in (9, 1200)]
    row = {
        "row": "fb", "seeds": 2, "published": None, "test_accuracy": one, "loss": one,
        "seconds": {"mean": 3725.0}, "runs": runs, "difference": None,
    }  # fmt: skip
    line = summary.table([row]).splitlines()[-1]
    assert line == "| `fb` | 50.00 | – | 2 | 0.5000 | 9 – 1,200 | 18 |  | 1:02:05 | – |"
    for run in runs:
        run["sample_passes"] = 1_234_567
    row["difference"] = {"mean": -0.0123, "low": -0.02, "high": 0.0005, "n": 2}
    line = summary.table([row]).splitlines()[-1]
    assert "| −1.23 (−2.00 to +0.05) | 2 |" in line and "| 18 | 1.23 | 1:02:05 |" in line
    row["difference"]["n"] = 3  # of sgd fewer or more seeds are finished
    assert "| −1.23 (−2.00 to +0.05), n = 3 | 2 |" in summary.table([row])
    row["difference"]["n"] = 2
    row["difference"] |= {"low": None, "high": None}
    assert "| −1.23 | 2 |" in summary.table([row])


def runs_of(**accuracies: float) -> list[dict[str, float]]:
    return [{"seed": int(seed[1:]), "test_accuracy": a} for seed, a in accuracies.items()]


def test_differences_are_paired_by_seed_with_students_interval():
    """Against scipy's own paired interval; seeds that only one of the rows has are left out."""
    stats = pytest.importorskip("scipy.stats")
    row, sgd = runs_of(s0=0.91, s1=0.93, s2=0.92, s7=0.1), runs_of(s2=0.90, s0=0.92, s1=0.91, s9=1)
    found = paired.difference(row, sgd, "test_accuracy")
    differences = [-0.01, 0.02, 0.02]
    assert list(found["pairs"]) == [0, 1, 2] and found["n"] == 3
    assert list(found["pairs"].values()) == pytest.approx(differences)
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected))
    assert found["mean"] == pytest.approx(0.01)


def test_differences_of_few_seeds():
    one = paired.difference(runs_of(s0=0.9), runs_of(s0=0.8), "test_accuracy")
    assert (one["mean"], one["low"], one["high"]) == (pytest.approx(0.1), None, None)
    assert paired.difference(runs_of(s0=0.9), runs_of(s1=0.8), "test_accuracy") is None


def test_every_row_has_the_sgd_of_its_table():
    expected = {"fb-strong": "sgd", "sgd": "sgd", "fb-aug": "sgd-aug", "fb-clip-x10": "sgd-x10"}
    assert {row: paired.baseline(row) for row in expected} == expected


def test_differences_to_sgd_are_in_table_file_and_figure(tiny, tmp_path, monkeypatch):
    pages, figure = [], plots.figure
    monkeypatch.setattr(plots, "figure", lambda *size: pages.append(figure(*size)) or pages[-1])
    monkeypatch.setattr(loop, "draw_curves", lambda folder, options: False)
    words = ["--rows", "sgd", "fb-clip", "fb-penalty", "--seeds", "2", "--validation", "0.2"]
    for options in plan_of(tiny, tmp_path, *words).last_row_first:
        loop.train(options)
    pages.clear()
    assert main(["--data", tiny, "--out", str(tmp_path), *SMALL, *words]) == 0
    rows = {row["row"]: row for row in json.loads((tmp_path / "ladder.json").read_text())["rows"]}
    assert rows["sgd"]["difference"] is None
    for name in ("fb-clip", "fb-penalty"):
        pairs = zip(rows[name]["runs"], rows["sgd"]["runs"], strict=True)
        differences = [a["test_accuracy"] - b["test_accuracy"] for a, b in pairs]
        assert rows[name]["difference"]["mean"] == pytest.approx(sum(differences) / 2)
    assert (tmp_path / "differences.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = pages[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["fb-clip", "fb-penalty"]
    zero = [line for line in axes.lines if list(line.get_xdata()) == [0, 0]]
    assert zero and axes.get_title() == "Test accuracy minus sgd's of the same seed"
    # The test set was looked at once, after the last step, so curves are of held-out samples.
    assert pages[1].axes[0].get_title() == "Validation accuracy (bands: all seeds)"
    assert pages[1].axes[0].lines


def test_passes_of_each_kind_of_row(tiny, tmp_path):
    """--epochs for the rows of sgd, --steps for the others, the share where none is given."""
    runs = plan_of(tiny, tmp_path, *ROWS, "--epochs", "7").runs
    assert (runs["sgd"][0].epochs, runs["fb-penalty-aug"][0].steps) == (7, 20)
    runs = plan_of(tiny, tmp_path, *ROWS, "--steps", "9").runs
    assert (runs["sgd"][0].epochs, runs["fb-penalty-aug"][0].steps) == (4, 9)
