"""`fbopt fingerprint RUN [RUN2]`: a run's SHA-256 at every kept step; where two runs first differ.

RUN is a run folder, finished or not. Exit status: 0 the same, 1 different, 2 an error.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fbopt.train.checkpoint import atomic
from fbopt.train.checkpoint.digest import GROUPS, SHORT, groups
from fbopt.train.checkpoint.format import CheckpointError
from fbopt.train.checkpoint.provenance import WHY, changed
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.diff import differences
from fbopt.train.config.options import OptionsError
from fbopt.train.config.paths import path_of

ABOUT = "A run's SHA-256 at every kept step; where two runs first differ."
SHOWN = 5  # tensors listed by name


class RunRecord(NamedTuple):
    """A run as its folder describes it: fingerprints by step, options, environments."""

    folder: RunFolder
    fingerprints: dict[int, dict[str, Any]]
    options: dict[str, Any]
    environments: list[dict[str, Any]]

    def environment(self, step: int) -> dict[str, Any]:
        """The environment in which `step` was taken."""
        begun = [record for record in self.environments if record["step"] < max(step, 1)]
        return {k: v for k, v in begun[-1].items() if k != "step"} if begun else {}

    def steps(self) -> str:
        """The steps with a fingerprint, in words."""
        steps = sorted(self.fingerprints)
        return ", ".join(map(str, steps[:4])) + (f", … {steps[-1]}" if len(steps) > 4 else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fbopt fingerprint …`; return 0 (the same), 1 (different) or 2 (an error)."""
    parser = argparse.ArgumentParser("fbopt fingerprint", description=ABOUT)
    parser.add_argument("run", type=path_of, help="folder of a run, finished or not")
    parser.add_argument("run2", type=path_of, nargs="?", help="another, to compare it with")
    parser.add_argument("--full", action="store_true", help="print all 64 digits")
    wanted = parser.parse_args(arguments)
    try:
        first = read(wanted.run)
        if wanted.run2 is None:
            print(table(first, 64 if wanted.full else SHORT))
            return 0
        status, text = compare(first, read(wanted.run2))
    except OptionsError as error:
        print(f"fbopt fingerprint: {error}", file=sys.stderr)
        return 2
    print(text)
    return status


def read(path: Path) -> RunRecord:
    """Read a run folder. Raises OptionsError where there is no run, or no fingerprint yet."""
    folder = RunFolder(path)
    if not path.is_dir():
        raise OptionsError(f"{path}: is no folder; give the folder of a run")
    options = folder.read_options()
    if options is None:
        raise OptionsError(
            f"{path}: is no run's folder, as it has no readable options.json; give one that "
            "`fbopt train` made"
        )
    records = atomic.read_lines(folder.fingerprints)
    fingerprints = {record["step"]: record for record in records if _is_whole(record)}
    if not fingerprints:
        raise OptionsError(
            f"{path}: no step is kept yet; wait for a checkpoint, or train with "
            "--fingerprint-every 1"
        )
    return RunRecord(folder, fingerprints, options, atomic.read_lines(folder.environment))


def _is_whole(record: dict[str, Any]) -> bool:
    """Whether a record has what is compared: digests of all groups and of their tensors."""
    tensors = record.get("tensors")
    return all(isinstance(record.get(group), str) for group in GROUPS) and (
        isinstance(tensors, dict)
        and all(isinstance(tensors.get(group), dict) for group in GROUPS)
        and all(isinstance(d, str) for group in GROUPS for d in tensors[group].values())
    )


def table(run: RunRecord, digits: int) -> str:
    """A line per kept step with the groups' digests."""
    saved = {step for step, _ in run.folder.checkpoints()}
    lines = [f"{'step':>8}  " + "  ".join(f"{group:{digits}}" for group in GROUPS)]
    for step, record in sorted(run.fingerprints.items()):
        digests = "  ".join(
            record[group][:digits] if record["tensors"][group] else f"{'none':{digits}}"
            for group in GROUPS
        )
        lines.append(f"{step:8}  {digests}{'  (checkpoint)' if step in saved else ''}")
    return "\n".join(lines)


def compare(first: RunRecord, second: RunRecord) -> tuple[int, str]:
    """The exit status and the text to print. Raises OptionsError without a step in common."""
    common = sorted(set(first.fingerprints) & set(second.fingerprints))
    names = f"{first.folder.path} and {second.folder.path}"
    if not common:
        raise OptionsError(
            f"{names} have no step in common: they keep {first.steps()}, and {second.steps()}; "
            "train with the same --fingerprint-every"
        )
    old, new = first.fingerprints, second.fingerprints
    same = [s for s in common if all(old[s][group] == new[s][group] for group in GROUPS)]
    if same == common:
        span = f"{common[0]} to {common[-1]}" if len(common) > 1 else str(common[0])
        return 0, f"{names} are the same at all {len(common)} steps that both keep ({span})"
    step = next(s for s in common if s not in same)
    before = max((s for s in same if s < step), default=None)
    since = "no earlier step is kept by both" if before is None else f"the same up to step {before}"
    lines = [
        f"{names} differ first at step {step} ({since})",
        *_different_tensors(old[step], new[step]),
        _largest_difference(first, second, [s for s in common if s >= step]),
        "likely causes:",
        *(f"  {cause}" for cause in causes(first, second, step)),
    ]
    return 1, "\n".join(lines)


def causes(first: RunRecord, second: RunRecord, step: int) -> list[str]:
    """The differences between two runs' options and environments, and why they matter."""
    pairs = differences(first.options, second.options)
    found = [f"{name} {old} and {new}" for name, old, new in pairs]
    facts = [run.environment(step) for run in (first, second)]
    found += [
        f"{name} {_short(old)} and {_short(new)}: {WHY.get(name, 'unknown')}"
        for name, old, new in changed(*facts)
    ]
    if not found:
        found.append("no option or recorded fact differs: another machine, or changed data or code")
        if "float32" in {fact.get("accumulation") for fact in facts}:
            found.append("float32 accumulation: sums over the chunks depend on their order")
    return found


def _different_tensors(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """The tensors that differ, in the order of the model; the first few by name."""
    old, new = _by_name(first["tensors"]), _by_name(second["tensors"])
    names = dict.fromkeys([*old, *new])
    different = [name for name in names if old.get(name) != new.get(name)]
    more = len(different) - SHOWN
    lines = [f"  {len(different)} of {len(names)} tensors, in the model's order:"]
    lines += [f"    {name}" for name in different[:SHOWN]]
    return lines + ([f"    and {more} more"] if more > 0 else [])


def _largest_difference(first: RunRecord, second: RunRecord, steps: list[int]) -> str:
    """The largest difference, at the earliest of `steps` that both have a checkpoint of."""
    for step in steps:
        with contextlib.suppress(CheckpointError):
            states = [run.folder.read_checkpoint(step) for run in (first, second)]
            return f"  largest difference at step {step}: {_largest(*map(groups, states))}"
    return (
        f"  largest difference unknown: no checkpoint of step {steps[0]} or later is in both; "
        "keep more with --save-every and --keep"
    )


def _largest(first: dict[str, dict], second: dict[str, dict]) -> str:
    """The largest absolute difference of two sets of tensors, in words."""
    best, others = (-1.0, ""), _by_name(second)
    for name, old in _by_name(first).items():
        new = others.get(name)
        if new is None or new.shape != old.shape:
            return f"{name} is not in both in the same shape"
        apart = old.ne(new) & ~(old.isnan() & new.isnan())
        if apart.any():
            gaps = (old.double() - new.double())[apart].abs().nan_to_num(nan=float("inf"))
            best = max(best, (float(gaps.max()), name))
    return f"{best[0]:.3g} in {best[1]}" if best[1] else "0, in bits that compare equal (-0, NaN)"


def _by_name(tensors: dict[str, dict]) -> dict[str, Any]:
    return {f"{group}: {name}": t for group in GROUPS for name, t in tensors[group].items()}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 30 else text[:12] + "…"
