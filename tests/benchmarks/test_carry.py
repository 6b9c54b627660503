"""Runs in a folder of parts: what is carried, what is refused, what is taken over."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import tiny_runs
import torch

from benchmarks import carry
from fbopt.train.checkpoint import atomic, format
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import OptionsError

LIMIT = 50_000


def run(path: Path, steps: tuple[int, ...], finished: bool = False, lr: float = 0.1) -> Path:
    """A run with checkpoints of these steps, each of some 80,000 bytes."""
    path.mkdir(parents=True)
    options = {"lr": lr}
    atomic.replace_json(path / "options.json", options)
    for name in carry.RECORDS[1:]:
        atomic.replace_lines(path / name, [{"step": step} for step in steps])
    for step in steps:
        weights = torch.full((20_000,), float(step))
        content = format.seal(tiny_runs.checkpoint(step, options=options, x=weights))
        atomic.replace(path / f"checkpoint-{step}.pt", content)
    if finished:
        atomic.replace_json(path / "result.json", {"test_accuracy": 0.5})
    return path


def tree(*folders: Path) -> dict[str, bytes]:
    """All files below the folders, locks excepted."""
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in paths if path.name != ".lock"}


@pytest.fixture
def carried(tmp_path) -> Path:
    """What is carried of a finished, an unfinished and a run that has saved nothing."""
    run(tmp_path / "here/wide/done-s0", (5, 9), finished=True)
    run(tmp_path / "here/wide/half-s0", (3, 6))
    run(tmp_path / "here/wide/none-s0", ())
    packed = carry.pack(tmp_path / "here", tmp_path / "carry", LIMIT)
    assert packed.runs == 2 and packed.largest == LIMIT
    return tmp_path / "carry"


def test_parts_are_small_and_hold_what_is_needed(tmp_path, carried):
    parts = list(carried.glob("*.part"))
    assert len(parts) == 2 and all(part.stat().st_size <= LIMIT for part in parts)
    assert carry.unpack(carried, tmp_path / "there") == [
        tmp_path / "there/wide/done-s0", tmp_path / "there/wide/half-s0"
    ]  # fmt: skip
    here, there = (tree(tmp_path / name) for name in ("here", "there"))
    names = {name.replace("/there/", "/here/"): content for name, content in there.items()}
    assert all(here[name] == content for name, content in names.items())
    found = {Path(name).name for name in names if "/done-s0/" in name}
    assert found == {*carry.RECORDS, "result.json"}  # a finished run needs no checkpoint
    found = {Path(name).name for name in names if "/half-s0/" in name}
    assert found == {*carry.RECORDS, "checkpoint-6.pt"}
    assert RunFolder(tmp_path / "there/wide/half-s0").load()["step"] == 6


def test_the_newest_sound_checkpoint_is_carried(tmp_path, carried):
    newest = tmp_path / "here/wide/half-s0/checkpoint-6.pt"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    before = {part.name for part in carried.glob("*.part")}
    carry.pack(tmp_path / "here", carried, LIMIT)
    assert not before & {part.name for part in carried.glob("*.part")}  # the old ones are gone
    carry.unpack(carried, tmp_path / "there")
    assert RunFolder(tmp_path / "there/wide/half-s0").load()["step"] == 3


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:9] + bytes([content[9] ^ 1]) + content[10:])


def rename_a_run(path: Path) -> None:
    manifest = json.loads(path.read_text())
    manifest["files"][0]["path"] = "wide/other-s0/options.json"
    atomic.replace_json(path, manifest)


def leave_the_folder(path: Path) -> None:
    """A manifest that is consistent, and names a file elsewhere."""
    manifest = json.loads(path.read_text())
    manifest["files"][0]["path"] = "../../options.json"
    parts = b"".join((path.parent / part["name"]).read_bytes() for part in manifest["parts"])
    manifest["sha256"] = carry._whole_sha256(manifest["files"], parts)
    atomic.replace_json(path, manifest)


FAULTS = {
    "altered": (lambda part, manifest: flip(part), r"the part 000-\w+\.part is altered"),
    "cut": (lambda part, manifest: part.write_bytes(part.read_bytes()[:-1]), "is altered"),
    "missing": (lambda part, manifest: part.unlink(), r"the part 000-\w+\.part is missing"),
    "surplus": (
        lambda part, manifest: (part.parent / "002-0.part").write_bytes(b"x"),
        r"002-0\.part is not in manifest\.json; remove it",
    ),
    "no manifest": (lambda part, manifest: manifest.unlink(), r"manifest\.json is missing"),
    "no JSON": (lambda part, manifest: manifest.write_text("{"), r"manifest\.json is altered"),
    "no entry": (lambda part, manifest: manifest.write_text('{"format": 1}'), "is altered"),
    "format": (lambda part, manifest: manifest.write_text('{"format": 9}'), "format 9, and this"),
    "renamed": (lambda part, manifest: rename_a_run(manifest), "does not belong to the parts"),
    "elsewhere": (lambda part, manifest: leave_the_folder(manifest), r"\.\. is no|is no file of"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_before_anything_is_written(tmp_path, carried, fault):
    harm, message = FAULTS[fault]
    run(tmp_path / "there/wide/half-s0", (3,))
    harm(min(carried.glob("*.part")), carried / carry.MANIFEST)
    before = tree(tmp_path)
    with pytest.raises(carry.CarryError, match=message) as error:
        carry.unpack(carried, tmp_path / "there")
    assert tree(tmp_path) == before
    assert str(carried) in str(error.value) and "Nothing was changed" in str(error.value)


@pytest.mark.parametrize(
    ("steps", "finished", "taken"),
    [((3,), False, True), ((6,), False, False), ((3, 8), False, False), ((), True, False)],
)
def test_only_runs_that_are_further_are_taken_over(tmp_path, carried, steps, finished, taken):
    path = run(tmp_path / "there/wide/half-s0", steps, finished)
    before = tree(path)
    assert (path in carry.unpack(carried, tmp_path / "there")) == taken
    assert (tree(path) == before) != taken


def test_a_damaged_checkpoint_is_no_progress(tmp_path, carried):
    path = run(tmp_path / "there/wide/half-s0", (3, 8))
    flip(path / "checkpoint-8.pt")
    assert path in carry.unpack(carried, tmp_path / "there")


def test_a_run_of_other_options_is_refused(tmp_path, carried):
    run(tmp_path / "there/wide/half-s0", (3,), lr=0.2)
    before = tree(tmp_path)
    with pytest.raises(carry.CarryError, match=r"made with --lr 0\.2, the carried run with 0\.1"):
        carry.unpack(carried, tmp_path / "there")
    assert tree(tmp_path) == before


def test_a_run_that_is_being_trained_is_left_alone(tmp_path, carried):
    path = run(tmp_path / "there/wide/half-s0", (3,))
    before = tree(tmp_path)
    with contextlib.ExitStack() as lock:
        RunFolder(path).lock(lock)
        with pytest.raises(OptionsError, match="is in use"):
            carry.unpack(carried, tmp_path / "there")
    assert tree(tmp_path) == before


def test_nothing_carried_is_nothing_to_do(tmp_path):
    assert carry.unpack(tmp_path / "none", tmp_path / "there") == []
    assert str(carry.pack(tmp_path / "none", tmp_path / "carry")).startswith("0 runs, 0.0 MB in 0")
    assert carry.unpack(tmp_path / "carry", tmp_path / "there") == []
