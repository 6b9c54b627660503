"""`fbopt plot`: what is drawn of several runs, its colours and thresholds, and clear errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fbopt import cli
from fbopt.train.checkpoint import atomic
from fbopt.train.config.options import Options
from fbopt.train.plot.draw import colors_of, draw
from fbopt.train.plot.options import Plot
from fbopt.train.plot.read import read
from fbopt.train.reporting import plots

pytest.importorskip("matplotlib")


def record(step: int, **entries: float | None) -> dict[str, float | None]:
    """A line of metrics.jsonl."""
    first = {"pass": step, "step": step, "loss": 2.0 / step, "seconds": 0.5}  # all within a moment
    return first | {"test_accuracy": 0.1 * step, "gradient_evaluations": 3 * step} | entries


def run(path: Path, lr: float, records: list[dict], **options) -> Path:
    """A run folder, without checkpoints and result: it is not finished."""
    path.mkdir(parents=True)
    made = Options(lr=lr, recipe="fb", **options).as_json()
    (path / "options.json").write_text(json.dumps(made))
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Two runs at one rate, the first with sharpness; one at another, whose loss diverges."""
    tracked = [record(s, sharpness=s, sharpness_threshold=10.0 ** (s + 1)) for s in (1, 2, 3)]
    bad = [record(1, sharpness=5.0), record(2, loss=float("nan")), record(3, loss=0.5)]
    return [
        run(tmp_path / "a", 0.1, tracked, seed=0, max_norm=0.25),
        run(tmp_path / "b", 0.1, [record(s) for s in (1, 2, 3)], seed=1),
        run(tmp_path / "c", 0.4, bad, seed=2),
    ]


def figure(paths: list[Path], **options):
    """The figure's axes of metrics, from the top."""
    wanted = Plot(tuple(paths), **options)
    page = draw(wanted, read(wanted))
    return page, [axes for axes in page.axes if axes.get_label() != "<colorbar>"]


def lines(axes, style: str = "-") -> list[tuple[list[float], list[float], str]]:
    found = [line for line in axes.lines if line.get_linestyle() == style]
    return [(list(n.get_xdata()), list(n.get_ydata()), n.get_color()) for n in found]


def status(*words) -> int:
    return cli.main(["plot", *map(str, words)])


def test_curves_colours_and_thresholds(runs, capsys):
    page, panels = figure(runs, x="step", y="loss,sharpness,test_accuracy", by="lr")
    loss, sharpness, accuracy = map(lines, panels)
    first, second = plots.shades(2)
    assert [color for *_, color in loss] == [first, first, second]
    assert loss[0][:2] == ([1, 2, 3], pytest.approx([2, 1, 2 / 3]))
    assert loss[2][:2] == ([1, 3], [2.0, 0.5])  # without the value that is not finite
    assert accuracy[1][1] == pytest.approx([10, 20, 30])  # per cent
    assert sharpness[0] == ([1, 2, 3], [1, 2, 3], first) and sharpness[1][0] == []
    assert lines(panels[1], "--") == [([1, 2, 3], [100, 1000, 10000], first)]
    assert 100 < panels[1].get_ylim()[1] < 200  # the lowest threshold is seen, the others cut off
    assert panels[0].get_ylabel() == "training loss"
    assert panels[2].get_xlabel() == "optimizer steps" and not panels[0].get_xlabel()
    (legend,) = page.legends
    assert legend.get_title().get_text() == "lr"
    assert [text.get_text() for text in legend.get_texts()] == ["0.1", "0.4"]
    said = capsys.readouterr().err
    assert f"{runs[1]} has no sharpness" in said and f"{runs[0]} has no" not in said
    assert f"{runs[2]}: 1 of 3 values of loss cannot be drawn" in said


@pytest.mark.parametrize(("x", "places"), [("seconds", [0.5] * 3), ("gradients", [3, 6, 9])])
def test_the_axis_below(runs, x, places):
    """Also where several lines are of one place."""
    _, (axes,) = figure(runs[:1], x=x)
    assert lines(axes)[0][0] == places


def test_ends_over_an_option(tmp_path, capsys):
    """The last values, each a marker, and the means of the runs of one number and colour."""
    paths = [
        run(tmp_path / f"{lr}-{width}-{seed}", lr, [record(1), record(2 + seed)], width=width)
        for lr in (0.4, 0.1) for width in (4, 8) for seed in (0, 2)
    ]  # fmt: skip
    _, (axes,) = figure(paths, x="lr", y="loss", by="width")
    ends = [line for line in lines(axes) if len(line[0]) == 2]
    assert [x for x, *_ in ends] == [[0.1, 0.4]] * 2
    for (_, values, color), shade in zip(ends, plots.shades(2), strict=True):
        assert values == pytest.approx([(2 / 2 + 2 / 4) / 2] * 2) and color == shade
    points = [(x, y) for x, y, _ in lines(axes) if len(x) == 1]
    assert sorted(points) == sorted([([lr], [loss]) for lr in (0.1, 0.4) for loss in (1, 0.5)] * 2)
    page, (axes,) = figure(paths, x="lr", y="loss", log="lr")
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "lr" and not page.legends
    assert len({color for *_, color in lines(axes)}) == 1
    assert not capsys.readouterr().err


def test_zero_on_a_logarithmic_axis_below(tmp_path):
    """A run without a penalty is at 0."""
    paths = [run(tmp_path / str(k), 0.1, [record(1)], penalty=k) for k in (None, 0.5, 2.0)]
    _, (axes,) = figure(paths, x="penalty", y="loss", log="penalty")
    assert axes.get_xscale() == "symlog" and lines(axes)[0][0] == [0, 0.5, 2]


def test_logarithmic_axes_hide_nothing_without_a_word(tmp_path, capsys):
    path = run(tmp_path / "a", 0.1, [record(1, sharpness=-1.0), record(2, sharpness=4.0)])
    _, panels = figure([path], x="step", y="loss,sharpness", log="sharpness,step")
    assert [axes.get_yscale() for axes in panels] == ["linear", "log"]
    assert panels[1].get_xscale() == "log"
    assert "1 values of sharpness are not above 0" in capsys.readouterr().err
    assert panels[1].get_ylim()[0] == pytest.approx(4 / 1.2)


def test_colours_of_values(tmp_path):
    assert list(colors_of([3, None, 1])) == [1, 3, None]
    assert colors_of([3, None, 1])[None] == plots.GREY
    assert colors_of(["fb", "sgd", "fb"]) == {"fb": plots.PALETTE[0], "sgd": plots.PALETTE[1]}
    assert set(colors_of([True, False]).values()) == set(plots.PALETTE[:2])  # they have no order
    many = [run(tmp_path / str(i), 0.1 * 2**i, [record(1), record(2)]) for i in range(12)]
    page, _ = figure(many, by="--lr")
    (bar,) = [axes for axes in page.axes if axes.get_label() == "<colorbar>"]
    assert bar.get_ylabel() == "lr" and not page.legends
    labels = [text.get_text() for text in bar.get_yticklabels()]
    assert labels == [f"{0.1 * 2**i:g}" for i in range(0, 12, 2)]
    page, _ = figure(many[:3])
    assert [text.get_text() for text in page.legends[0].get_texts()] == ["0", "1", "2"]


def test_files_are_png_or_pdf_as_wide_as_a_column(runs, tmp_path, capsys):
    for name, head in (("a.png", b"\x89PNG"), ("deeper/a.pdf", b"%PDF")):
        contents = []
        for _ in range(2):
            assert status(*runs, "--by", "seed", "--out", tmp_path / name) == 0
            contents.append((tmp_path / name).read_bytes())
        assert contents[0].startswith(head) and contents[0] == contents[1]
        assert f"written: {tmp_path / name}" in capsys.readouterr().out
    page, panels = figure(runs)
    assert page.get_size_inches()[0] == 3.25
    texts = [*panels[0].get_xticklabels(), panels[0].yaxis.label, *page.legends[0].get_texts()]
    assert min(text.get_fontsize() for text in texts) >= 7


def test_bad_input_is_named_and_nothing_written(runs, tmp_path, capsys):
    out = tmp_path / "out.png"
    empty = run(tmp_path / "empty", 0.1, [])
    cases = {
        (): "give the folders",
        (runs[0], runs[0]): "is given twice",
        (tmp_path / "none",): "no such folder",
        (tmp_path,): "no readable options.json",
        (empty,): "no run has metrics yet",
        (runs[0], "--y", ","): "--y is empty",
        (runs[0], runs[1], "--y", "sharpnes"): "did you mean sharpness?; there are loss, test_acc",
        (runs[0], "--by", "lrr"): "--by lrr: is no option",
        (runs[0], "--log", "lr"): "--log lr: is on no axis of this figure; choose of loss, pass",
        (runs[0], "--out", tmp_path / "a.jpg"): "has to end in .png or .pdf",
    }
    for words, error in cases.items():
        place = () if "--out" in words else ("--out", out)
        assert status(*words, *place) == 2
        assert error in capsys.readouterr().err
    assert not out.exists()
    assert status(empty, runs[0], "--out", out) == 0
    assert f"{empty} has no metrics yet; it is left out" in capsys.readouterr().err


def test_more_runs_than_colours(tmp_path, capsys):
    paths = [run(tmp_path / str(i), 0.1, [record(1)]) for i in range(11)]
    assert status(*paths, "--out", tmp_path / "a.png") == 2
    assert "11 values, and 10 colours" in capsys.readouterr().err


def test_what_cannot_be_written_or_drawn(runs, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert status(runs[0], "--out", tmp_path / "file" / "a.png") == 1
    assert "cannot be written" in capsys.readouterr().err

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "replace", full)
        assert status(runs[0], "--out", tmp_path / "a.png") == 1
    assert "No space left on device); free some space" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert status(runs[0], "--out", tmp_path / "a.png") == 1
    assert "fbopt plot: pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
