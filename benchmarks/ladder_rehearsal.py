"""Rehearse the ladder at scale on the CPU: stop, carry, resume on the same bits, and the table.

Two images per class, cut from a data set or made here, in ResNet-18 of width 2 and 4. The ladder is
climbed twice: at one go; and stopped by a budget, carried into an empty folder, and finished there.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import carry
from benchmarks.ladder_scales import STOPPED, Job, Scale, climb, write_results
from fbopt.train.checkpoint import fingerprint
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.dataspec import DataError
from fbopt.train.data.load import load

CLASSES, PER_CLASS, SIDE = 10, 2, 32
SCALES = (
    Scale("width-2", 2, 0.004, ("sgd-aug", "fb-clip-aug")),
    Scale("width-4", 4, 0.1, ("fb-penalty-aug",)),
)
WORDS = ("--device", "cpu", "--precision", "bf16", "--threads", "1", "--fingerprint-every", "10")
PART_BYTES = 100_000  # so that there are several
# Of the time that all takes at one go: the first falls into the last run, unless others use the
# machine meanwhile.
BUDGETS = (0.75, 0.5, 0.35, 0.6)
COMPARED = ("step", "gradient_evaluations", "loss", "test_accuracy", "test_loss")


def rehearse(data: str | None = None, scales: Sequence[Scale] = SCALES) -> int:
    """Rehearse with images of `data`, or made up; returns 0 if every fact holds, else 1.

    Raises DataError for data that cannot be cut.
    """
    facts: dict[str, bool] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-ladder-") as name:
        folder = Path(name)
        spec = f"imagefolder:{write_images(folder / 'images', data)}"
        begin = time.monotonic()
        print("\n# At one go")
        whole = _job(spec, folder / "whole", scales)
        facts["all runs finish at one go"] = climb(whole) == 0
        stopped = _stop(spec, folder, scales, time.monotonic() - begin)
        facts["the budget stops a run after a step, which is saved; exit status 130"] = (
            stopped is not None
        )
        if stopped is not None:
            facts |= _go_on(spec, folder, scales, whole, stopped)
    print("\n# What the rehearsal shows")
    for fact, holds in facts.items():
        print(f"{'ok    ' if holds else 'FAILED'}  {fact}")
    return int(not all(facts.values()))


def _job(spec: str, out: Path, scales: Sequence[Scale], seconds: float | None = None) -> Job:
    more = {} if seconds is None else {"deadline": time.monotonic() + seconds}
    command = "make gpu-ladder (the rehearsal goes on by itself)"
    options = {"seeds": 1, "words": WORDS, "scales": tuple(scales), "part_bytes": PART_BYTES}
    return Job(spec, out, out / "carry", command, **options, **more)


def _stop(spec: str, folder: Path, scales: Sequence[Scale], seconds: float) -> Job | None:
    """A job that its budget has stopped in the middle of a run; None if that never came about."""
    for attempt, share in enumerate(BUDGETS):
        print(f"\n# Stopped by a budget of {share:.0%} of that time", flush=True)
        for _ in range(3):  # until a run is stopped after its first step
            job = _job(spec, folder / f"first-{attempt}", scales, share * seconds)
            status = climb(job)
            if status == STOPPED and _saved(job):
                return job
            if status != STOPPED:
                break
    return None


def _saved(job: Job) -> dict[Path, int]:
    """The runs that are not finished and have a checkpoint, and its step."""
    folders = [RunFolder(options.out) for _, options in job.left()]
    return {f.path.relative_to(job.out): f.checkpoints()[0][0] for f in folders if f.checkpoints()}


def _go_on(
    spec: str, folder: Path, scales: Sequence[Scale], whole: Job, stopped: Job
) -> dict[str, bool]:
    """Carry what was stopped into an empty folder, finish it there, and compare."""
    print("\n# Carried into an empty folder", flush=True)
    saved = _saved(stopped)
    second = _job(spec, folder / "second", scales)
    shutil.copytree(stopped.carried, second.carried)
    parts = sorted(second.carried.glob("*.part"))
    size = max(part.stat().st_size for part in parts)
    facts = {
        f"carried in {len(parts)} parts, none above {PART_BYTES:,} bytes (15 MB at scale)": (
            len(parts) > 1 and size <= PART_BYTES
        ),
        "an altered part is refused before anything is written": _refuses(parts[0], second),
    }
    facts["the carried runs are finished there"] = climb(second) == 0
    for run, step in saved.items():
        log = second.out / run.parent / "logs" / f"{run.name}.log"
        text = log.read_text() if log.exists() else ""
        facts[f"{run} goes on from step {step}"] = f"resumed at step {step} of" in text
        status, words = fingerprint.compare(
            *(fingerprint.read(job.out / run) for job in (whole, second))
        )
        print(words.replace(f"{folder}/", ""))
        facts[f"{run} ends on the bits of the run at one go"] = status == 0
    facts["the table has the same results"] = _results(whole) == _results(second) != []
    write_results(second, folder / "results" / "gpu-ladder-rehearsal", {})
    print(f"\n{(folder / 'results' / 'gpu-ladder-rehearsal.md').read_text()}")
    return facts


def _refuses(part: Path, job: Job) -> bool:
    """Whether a job refuses a part with one other bit, and writes nothing then."""
    content = part.read_bytes()
    part.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    before = sorted(job.out.rglob("*"))
    try:
        carry.unpack(job.carried, job.out)
    except carry.CarryError as error:
        print(f"refused: {str(error).replace(str(job.carried), 'carry')}")
        return sorted(job.out.rglob("*")) == before
    finally:
        part.write_bytes(content)
    return False


def _results(job: Job) -> list[list[float]]:
    """What every run of the tables came to."""
    tables = [json.loads((plan.folder / "ladder.json").read_text()) for plan in job.plans.values()]
    runs = [run for table in tables for row in table["rows"] for run in row["runs"]]
    return [[run[key] for key in COMPARED] for run in runs]


def write_images(folder: Path, data: str | None) -> Path:
    """Write an image folder of two images per class, to train and to test on; returns it."""
    from PIL import Image

    for part, (images, labels) in _images(data).items():
        for label in range(CLASSES):
            (folder / part / str(label)).mkdir(parents=True)
            for index in np.flatnonzero(labels == label)[:PER_CLASS]:
                image = Image.fromarray(images[index].transpose(1, 2, 0))
                image.save(folder / part / str(label) / f"{index}.png")
    return folder


def _images(data: str | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The uint8 images (n, 3, height, width) and labels of a data set, or of noisy patterns."""
    if data is not None:
        found = load(data)
        splits = {part: getattr(found, part) for part in ("train", "test")}
        colour = found.shape[0] == 3 and all(s.x.element_size() == 1 for s in splits.values())
        if found.classes < CLASSES or not colour:
            raise DataError(
                f"--data {data}: --rehearse cuts coloured images of {CLASSES} classes; give such a "
                "data set, or leave it out"
            )
        return {part: (split.x.numpy(), split.y.numpy()) for part, split in splits.items()}
    rng = np.random.default_rng(0)
    patterns = rng.integers(64, 192, (CLASSES, 3, SIDE, SIDE))
    labels = np.repeat(np.arange(CLASSES), PER_CLASS)
    made = {}
    for part in ("train", "test"):
        noise = rng.integers(-64, 64, (len(labels), 3, SIDE, SIDE))
        made[part] = (patterns[labels] + noise).astype(np.uint8), labels
    return made
