"""`fbopt fingerprint RUN [RUN2]`: a run's SHA-256 at every kept step; where two runs first differ.

RUN is a run folder, finished or not. Exit status: 0 the same, 1 different, 2 an error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fbopt.train.checkpoint import atomic
from fbopt.train.checkpoint.digest import GROUPS, SHORT, groups
from fbopt.train.checkpoint.provenance import WHY, changed
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.diff import differences
from fbopt.train.config.options import OptionsError

SHOWN = 5  # tensors named one by one


class Kept(NamedTuple):
    """What a run folder says about a run: fingerprints by step, options, surroundings."""

    folder: RunFolder
    records: dict[int, dict[str, Any]]
    options: dict[str, Any]
    environments: list[dict[str, Any]]

    def environment(self, step: int) -> dict[str, Any]:
        """The facts that held when `step` was taken."""
        held = [record for record in self.environments if record["step"] < max(step, 1)]
        return {k: v for k, v in held[-1].items() if k != "step"} if held else {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fbopt fingerprint …`; returns 0 (the same), 1 (different) or 2 (an error)."""
    parser = argparse.ArgumentParser("fbopt fingerprint", description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run, finished or not")
    parser.add_argument("run2", type=Path, nargs="?", help="another, to compare it with")
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


def read(path: Path) -> Kept:
    """Read a run folder. Raises OptionsError for a folder that is no run's, or has no step yet."""
    folder = RunFolder(path)
    if not path.is_dir():
        raise OptionsError(f"{path}: is no folder; give the folder of a run")
    options = folder.read_options()
    if options is None:
        raise OptionsError(
            f"{path}: is no run's folder, as it has no readable options.json; give one that "
            "`fbopt train` made"
        )
    records = {record["step"]: record for record in atomic.read_lines(folder.fingerprints)}
    if not records:
        raise OptionsError(
            f"{path}: no step is kept yet; wait for a checkpoint, or train with "
            "--fingerprint-every 1"
        )
    return Kept(folder, records, options, atomic.read_lines(folder.environment))


def table(run: Kept, digits: int) -> str:
    """A line per kept step with the groups' digests."""
    saved = {step for step, _ in run.folder.checkpoints()}
    lines = [f"{'step':>8}  " + "  ".join(f"{group:{digits}}" for group in GROUPS)]
    for step, record in sorted(run.records.items()):
        digests = "  ".join(
            record[group][:digits] if record["tensors"][group] else f"{'none':{digits}}"
            for group in GROUPS
        )
        lines.append(f"{step:8}  {digests}{'  (checkpoint)' if step in saved else ''}")
    return "\n".join(lines)


def compare(first: Kept, second: Kept) -> tuple[int, str]:
    """The exit status and what there is to say. Raises OptionsError without a step in common."""
    common = sorted(set(first.records) & set(second.records))
    names = f"{first.folder.path} and {second.folder.path}"
    if not common:
        raise OptionsError(
            f"{names} have no step in common: they keep {_steps(first)}, and {_steps(second)}; "
            "train with the same --fingerprint-every"
        )
    same = [s for s in common if _digests(first.records[s]) == _digests(second.records[s])]
    if len(same) == len(common):
        return 0, f"{names} are the same at all {len(common)} steps that both keep" + (
            f" ({common[0]} to {common[-1]})" if len(common) > 1 else f" ({common[0]})"
        )
    step = next(s for s in common if s not in same)
    before = max((s for s in same if s < step), default=None)
    since = "no earlier step is kept by both" if before is None else f"the same up to step {before}"
    lines = [f"{names} differ first at step {step} ({since})"]
    lines += _tensors(first.records[step], second.records[step])
    lines.append(_largest(first, second, [s for s in common if s >= step]))
    lines += ["likely causes:", *(f"  {cause}" for cause in causes(first, second, step))]
    return 1, "\n".join(lines)


def causes(first: Kept, second: Kept, step: int) -> list[str]:
    """What differs between two runs' options and surroundings, and why that matters."""
    pairs = differences(first.options, second.options)
    found = [f"{name} {old} and {new}" for name, old, new in pairs]
    facts = [run.environment(step) for run in (first, second)]
    found += [
        f"{name} {_short(old)} and {_short(new)}: {WHY.get(name, 'unknown')}"
        for name, old, new in changed(*facts)
    ]
    kinds = {fact.get("accumulation") for fact in facts}
    if not found:
        found.append("no option or recorded fact differs: another machine, or changed data or code")
        if "float32" in kinds:
            found.append("float32 accumulation: sums over the chunks depend on their order")
    return found


def _digests(record: dict[str, Any]) -> list[str]:
    return [record[group] for group in GROUPS]


def _tensors(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Which tensors differ, in the order of the model; the first few by name."""
    different, total = [], 0
    for group in GROUPS:
        old, new = first["tensors"][group], second["tensors"][group]
        names = dict.fromkeys([*old, *new])
        total += len(names)
        different += [f"{group}: {name}" for name in names if old.get(name) != new.get(name)]
    more = len(different) - SHOWN
    lines = [f"  {len(different)} of {total} tensors, in the model's order:"]
    lines += [f"    {name}" for name in different[:SHOWN]]
    return lines + ([f"    and {more} more"] if more > 0 else [])


def _largest(first: Kept, second: Kept, steps: list[int]) -> str:
    """The largest difference, at the earliest of `steps` that both have a checkpoint of."""
    for step in steps:
        states = [run.folder.read_checkpoint(step) for run in (first, second)]
        if None not in states:
            return f"  largest difference at step {step}: {largest(*map(groups, states))}"
    return (
        f"  largest difference unknown: no checkpoint of step {steps[0]} or later is in both; "
        "keep more with --save-every and --keep"
    )


def largest(first: dict[str, dict], second: dict[str, dict]) -> str:
    """The largest absolute difference of two sets of tensors, in words."""
    best = (-1.0, "")
    for group in GROUPS:
        for name, old in first[group].items():
            new = second[group].get(name)
            if new is None or new.shape != old.shape:
                return f"{group}: {name} is not in both in the same shape"
            apart = old.ne(new) & ~(old.isnan() & new.isnan())
            if apart.any():
                gaps = (old.double() - new.double())[apart].abs().nan_to_num(nan=float("inf"))
                best = max(best, (float(gaps.max()), f"{group}: {name}"))
    return f"{best[0]:.3g} in {best[1]}" if best[1] else "0, in bits that compare equal (-0, NaN)"


def _steps(run: Kept) -> str:
    steps = sorted(run.records)
    return ", ".join(map(str, steps[:4])) + (f", … {steps[-1]}" if len(steps) > 4 else "")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 30 else text[:12] + "…"
