"""Carry runs to another machine: a folder of small parts and a manifest with their SHA-256.

The parts, one after the other, are the files of manifest.json, one after the other. Of a finished
run these are its records and its result, of an unfinished one its records and newest checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fbopt.train.checkpoint import atomic
from fbopt.train.checkpoint.format import CheckpointError
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.diff import differences

PART_BYTES = 15_000_000
MANIFEST = "manifest.json"
FORMAT = 1
RECORDS = ("options.json", "metrics.jsonl", "environment.jsonl", "fingerprints.jsonl")
_FILE = re.compile(r"checkpoint-(\d+)\.pt|result\.json|" + "|".join(map(re.escape, RECORDS)))


class CarryError(ValueError):
    """A folder that cannot be taken over; the message names the file and says what to do."""


class Packed(NamedTuple):
    """What was written: runs, parts, and the bytes of all parts and of the largest."""

    runs: int
    parts: int
    total: int
    largest: int

    def __str__(self) -> str:
        """In words."""
        size = f"{self.total / 1e6:.1f} MB in {self.parts} part{'s' * (self.parts != 1)} of at most"
        return f"{self.runs} run{'s' * (self.runs != 1)}, {size} {self.largest / 1e6:.2f} MB"


def pack(runs: Path, carried: Path, limit: int = PART_BYTES) -> Packed:
    """Write all runs below the folder `runs` to the folder `carried`, in parts of `limit` bytes.

    A run that has neither a result nor a sound checkpoint is left out. Parts that were there go
    once the new manifest is written. Raises OSError where the folder cannot be written.
    """
    found = {path.parent for path in runs.rglob("options.json")}
    chosen = [list(_files(RunFolder(path))) for path in sorted(found)]
    paths = [path for files in chosen for path in files]
    contents = [path.read_bytes() for path in paths]
    names = [path.relative_to(runs).as_posix() for path in paths]
    files = [{"path": n, "bytes": len(c)} for n, c in zip(names, contents, strict=True)]
    whole = b"".join(contents)
    cut = [whole[start : start + limit] for start in range(0, len(whole), limit)]
    parts = {f"{i:03}-{_sha256(part)[:16]}.part": part for i, part in enumerate(cut)}
    manifest = {
        "format": FORMAT,
        "sha256": _whole_sha256(files, whole),
        "parts": [{"name": n, "bytes": len(p), "sha256": _sha256(p)} for n, p in parts.items()],
        "files": files,
    }
    carried.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        atomic.replace(carried / name, part)
    atomic.replace_json(carried / MANIFEST, manifest)
    for path in carried.glob("*.part"):
        if path.name not in parts:
            path.unlink()
    sizes = [len(part) for part in cut]
    return Packed(sum(map(bool, chosen)), len(cut), sum(sizes), max(sizes, default=0))


def _files(folder: RunFolder) -> Iterator[Path]:
    """What the ladder needs of a run; the file that makes it count comes last."""
    last = folder.result if folder.result.exists() else _newest(folder)
    if last is not None:
        yield from (path for path in map(folder.path.joinpath, RECORDS) if path.exists())
        yield last


def _newest(folder: RunFolder) -> Path | None:
    """The newest sound checkpoint."""
    for step, path in folder.checkpoints():
        try:
            folder.read_checkpoint(step)
        except CheckpointError:
            continue
        return path
    return None


def unpack(carried: Path, runs: Path) -> list[Path]:
    """Take over the runs in `carried` that are further than those below `runs`; returns these.

    Raises CarryError for a missing, altered or surplus part and for a run of other options than
    the one that is there, and OptionsError where a run is being trained: all before it writes
    anything (but the lock of a run).
    """
    files = read(carried)
    found: dict[Path, dict[str, bytes]] = {}
    for path, content in files.items():
        found.setdefault(runs / path.parent, {})[path.name] = content
    for path, contents in found.items():
        _check_same(carried, RunFolder(path), contents)
    taken = [path for path, contents in found.items() if _is_further(RunFolder(path), contents)]
    with ExitStack() as locks:
        for path in taken:
            path.mkdir(parents=True, exist_ok=True)
            RunFolder(path).lock(locks)
        for path in taken:
            for name, content in found[path].items():
                atomic.replace(path / name, content)
    return taken


def read(carried: Path) -> dict[PurePosixPath, bytes]:
    """The files in a folder that `pack` wrote; none where there is no folder. Raises CarryError."""
    there = {p.name for p in carried.iterdir() if p.name[0] != "."} if carried.is_dir() else set()
    if not there:
        return {}
    if MANIFEST not in there:
        raise _error(carried, f"{MANIFEST} is missing beside {min(there)}", "bring it, too")
    try:
        manifest = json.loads((carried / MANIFEST).read_text(encoding="utf-8"))
        if (found := manifest["format"]) != FORMAT:
            raise _error(carried, f"format {found}, and this version reads {FORMAT}", "use its own")
        parts = {part["name"]: part["sha256"] for part in manifest["parts"]}
        listed = [(PurePosixPath(f["path"]), int(f["bytes"])) for f in manifest["files"]]
        digest = manifest["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CarryError):
            raise
        raise _error(carried, f"{MANIFEST} is altered ({error!r})", "bring it again") from error
    whole = _join(carried, parts, there - {MANIFEST})
    if _whole_sha256(manifest["files"], whole) != digest:
        raise _error(carried, f"{MANIFEST} does not belong to the parts", "bring all of it again")
    files, start = {}, 0
    for path, size in listed:
        if path.is_absolute() or ".." in path.parts or not _FILE.fullmatch(path.name):
            raise _error(carried, f"{path} is no file of a run", "bring all of it again")
        files[path] = whole[start : start + size]
        start += size
    return files


def _join(carried: Path, parts: Mapping[str, str], there: set[str]) -> bytes:
    """All parts, one after the other."""
    if missing := [name for name in parts if name not in there]:
        raise _error(carried, f"the part {missing[0]} is missing", "bring it, too")
    if surplus := sorted(there - set(parts)):
        raise _error(carried, f"{surplus[0]} is not in {MANIFEST}", "remove it")
    contents = [(carried / name).read_bytes() for name in parts]
    for content, (name, digest) in zip(contents, parts.items(), strict=True):
        if _sha256(content) != digest:
            raise _error(carried, f"the part {name} is altered", "bring it again")
    return b"".join(contents)


def _check_same(carried: Path, folder: RunFolder, contents: Mapping[str, bytes]) -> None:
    """Refuse a run that was made with other options than the one in `folder`."""
    made = folder.read_options()
    if made is None:
        return
    if found := differences(made, json.loads(contents["options.json"])):
        name, here, there = found[0]
        raise _error(
            carried, f"{folder.path} was made with {name} {here}, the carried run with {there}",
            "give another --out, or another --carry",
        )  # fmt: skip


def _is_further(folder: RunFolder, contents: Mapping[str, bytes]) -> bool:
    """Whether a carried run is finished and the one in `folder` is not, or has more steps."""
    if folder.result.exists():
        return False
    here = _newest(folder)
    return "result.json" in contents or max(map(_step, contents)) > (
        _step(here.name) if here else 0
    )


def _step(name: str) -> int:
    """The step of a checkpoint's file; -1 of others."""
    match = _FILE.fullmatch(name)
    return int(match[1]) if match and match[1] else -1


def _error(carried: Path, what: str, cure: str) -> CarryError:
    return CarryError(
        f"{carried}: {what}; {cure}, or remove the folder to go on with the runs that are here. "
        "Nothing was changed"
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _whole_sha256(files: list[dict[str, Any]], whole: bytes) -> str:
    """Of the list of files and of all parts together."""
    return _sha256(json.dumps(files).encode() + whole)
