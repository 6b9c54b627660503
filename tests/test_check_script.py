"""`fbopt check SCRIPT:NAME`: the verdict, the exit status, and errors of a line."""

from __future__ import annotations

import sys

import pytest
from test_cli import status

SCRIPT = """
import torch
import torch.nn.functional as F
from torch import nn

from fbopt import FullBatchClosure, FullBatchGD

model, other = nn.Linear(4, 2), nn.Linear(4, 2)
chunks = [(torch.randn(5, 4), torch.randint(0, 2, (5,))) for _ in range(4)]
optimizer = FullBatchGD(model.parameters(), lr=0.1)
closure = FullBatchClosure(model, F.cross_entropy, chunks, optimizer=optimizer)


def build():
    return FullBatchClosure(model, F.cross_entropy, chunks, weight=lambda chunk: len(chunk[0]) ** 2)


def wrong_optimizer():
    return torch.optim.SGD(other.parameters(), 0.1)


def fails():
    return 1 / 0


if __name__ == "__main__":
    raise RuntimeError("training began")
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "fit.py").write_text(SCRIPT)
    (tmp_path / "ends.py").write_text("raise SystemExit(0)")
    (tmp_path / "broken.py").write_text("import torch\n\ntorch.ones(2) @ torch.ones(3)\n")
    yield
    for name in ("fit", "ends", "broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("words", ["fit.py:closure", "fit.py", "fit:closure --optimizer optimizer"])
def test_all_right_is_a_line_and_zero(words, script, capsys):
    assert status("check", *words.split()) == 0
    out, err = capsys.readouterr()
    assert out.startswith("all right (3 of 4 chunks") and len(out.splitlines()) == 1 and not err


def test_mistakes_are_printed_and_one(script, capsys):
    assert status("check", "fit.py:build") == 1
    assert "which weight= does not count" in capsys.readouterr().out
    assert status("check", "fit.py:closure", "--optimizer", "wrong_optimizer") == 1
    assert "it holds none of the closure's" in capsys.readouterr().out


ERRORS = {
    "fit.py:closur": "fit has no closur; did you mean closure?",
    "fit.py:model": "closure must be a FullBatchClosure, got Linear",
    "fit.py:fails": "fails() fails (line 23 of fit.py): ZeroDivisionError: division by zero",
    "fit.py:closure --optimizer chunks": "optimizer must be a torch.optim.Optimizer",
    "no.py:closure": "there is no file no.py",
    "no:closure": "there is no module or file no",
    "ends.py": 'put what trains under `if __name__ == "__main__":`',
    "broken.py": "broken.py fails (line 3 of broken.py): RuntimeError: inconsistent tensor size",
}


@pytest.mark.parametrize("words", ERRORS)
def test_errors_are_a_line_and_two(words, script, capsys):
    assert status("check", *words.split()) == 2
    out, err = capsys.readouterr()
    assert ERRORS[words] in err and len(err.splitlines()) == 1 and not out


@pytest.mark.parametrize("words", ["", "fit.py:closure more", "fit.py --optimzer x"])
def test_usage(words, script, capsys):
    assert status("check", *words.split()) == 2
    assert "usage: fbopt check" in capsys.readouterr().err
