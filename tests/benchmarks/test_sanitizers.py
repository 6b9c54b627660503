"""How runs under the compilers' sanitizers are judged and counted; the runs are `make sanitize`."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from benchmarks import sanitizers
from benchmarks.sanitized import AGREED

CALLS, TESTS = f"522 {AGREED}\n", "\n71 passed, 3 skipped in 5.00s\n"
RACE = "WARNING: ThreadSanitizer: data race (pid=1)\n"
FOUND = {
    "overflow": "ERROR: AddressSanitizer: heap-buffer-overflow",
    "undefined": "planted.cpp:17:50: runtime error: signed integer overflow",
    "race": RACE,
}


def done(status: int, said: str) -> SimpleNamespace:
    return SimpleNamespace(returncode=status, stdout=said)


@pytest.fixture
def told(monkeypatch):
    """What the runs under a sanitizer answer, by a word of their command; no compiler is needed."""
    answers = {word: done(66, said) for word, said in FOUND.items()}
    answers |= {"pytest": done(0, TESTS), "benchmarks.sanitized": done(0, CALLS)}

    def run(command, variables=None):
        return next(answer for word, answer in answers.items() if word in command)

    monkeypatch.setattr(sanitizers, "environment", lambda sanitizer: {})
    monkeypatch.setattr(sanitizers, "build", lambda variables: None)
    monkeypatch.setattr(sanitizers, "run", run)
    return answers


def counts(path) -> list[tuple[int, int, int]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(set(line) == {"class", "trials", "survived", "failed"} for line in lines)
    return [(line["trials"], line["survived"], line["failed"]) for line in lines]


def test_what_is_found_is_counted(told, tmp_path):
    path = tmp_path / "counts.jsonl"
    assert sanitizers.main(["--counts", str(path)]) == 0
    assert counts(path) == 2 * [(522, 522, 0), (71, 71, 0)]
    told["pytest"] = done(66, TESTS + RACE)
    assert sanitizers.main(["thread", "--counts", str(path)]) == 1
    assert counts(path)[4:] == [(522, 522, 0), (72, 71, 1)]


@pytest.mark.parametrize("fault", FOUND)
@pytest.mark.parametrize("said", ["", "Segmentation fault", RACE + FOUND["overflow"]])
def test_a_sanitizer_that_misses_a_planted_fault_is_not_believed(fault, said, told, tmp_path):
    told[fault] = done(0, said)
    assert sanitizers.main(["--counts", str(tmp_path / "counts")]) == 1
    assert counts(tmp_path / "counts").count((1, 0, 1)) == 1


@pytest.mark.parametrize(
    "status, said, expected",
    [
        (0, CALLS, (522, 0)),
        (0, TESTS, (71, 0)),
        (1, "2 failed, 7 passed, 1 error in 3 s", (7, 3)),
        (66, CALLS + RACE + RACE, (522, 2)),
        (1, FOUND["overflow"], (0, 1)),
        (-11, "", (0, 1)),
        (-11, CALLS, (522, 1)),
        (0, "", (0, 1)),
    ],
)
def test_runs_are_judged(status, said, expected):
    found = sanitizers.judge("it", done(status, said))
    assert (found.survived, found.failed) == expected


def test_what_is_missing_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert sanitizers.main(["thread"]) == 1
    assert "apt install clang libomp-dev" in capsys.readouterr().err
    tool = tmp_path / "clang++"
    tool.write_text("#!/bin/sh\necho clang version 14\n")
    tool.chmod(0o755)
    assert sanitizers.main(["thread"]) == 1
    assert "comes without libclang_rt.tsan" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sanitizers.main(["memory"])
