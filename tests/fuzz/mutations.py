"""Damage to files, drawn by hypothesis: to their bytes, and to what JSON and checkpoints hold."""

from __future__ import annotations

import copy
import json
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

JUNK = [
    None, True, -1, 0, 3, 10**15, 10**400, -0.5, float("nan"), float("inf"), "", "x", "x" * 5000,
    "\x00", "\ud800", "../..", [], [1, 2], {}, {"a": 1}, [[[[]]]],
]  # fmt: skip
TENSORS = [
    torch.zeros(()), torch.zeros(0), torch.ones(3, 3), torch.full((2,), float("nan")),
    torch.zeros(5, dtype=torch.int8), torch.zeros(2, dtype=torch.complex64),
]  # fmt: skip


class Edit(NamedTuple):
    """Damage to the bytes of a file, at a place between its start (0) and its end (1)."""

    kind: str
    place: float
    extra: bytes

    def of(self, content: bytes) -> bytes:
        """The content with this damage."""
        at, extra = int(self.place * len(content)), self.extra
        behind = at + len(extra)
        flipped = bytes(b ^ (1 << len(extra) % 8) for b in content[at : at + 1])
        return {
            "flip": content[:at] + flipped + content[at + 1 :],
            "cut": content[:at],
            "start": content[at:],
            "insert": content[:at] + extra + content[at:],
            "overwrite": content[:at] + extra + content[behind:],
            "remove": content[:at] + content[behind:],
            "twice": content + content,
            "other": extra,
            "zeros": bytes(len(content)),
            "deep": b"[" * 100_000,
        }[self.kind]


KINDS = (
    "flip", "cut", "start", "insert", "overwrite", "remove", "twice", "other", "zeros", "deep",
)  # fmt: skip
EDITS = st.builds(
    Edit, st.sampled_from(KINDS), st.floats(0, 1, allow_nan=False), st.binary(max_size=40)
)


def bytes_of(content: bytes) -> st.SearchStrategy[bytes]:
    """The content with a few bytes changed, cut off, added or repeated; or something else."""
    return EDITS.map(lambda edit: edit.of(content))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values within nested dicts and lists, itself first."""
    found = [path]
    if isinstance(value, dict):
        for key in value:
            found += places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            found += places(value[index], (*path, index))
    return found


def values_of(value: Any, junk: list[Any] = JUNK) -> st.SearchStrategy[Any]:
    """The nested value with up to three of its parts replaced or removed."""

    def change(edits: list[tuple[tuple[Any, ...], Any, bool]]) -> Any:
        changed = copy.deepcopy(value)
        for path, new, remove in edits:
            if not path:
                changed = copy.deepcopy(new)
                continue
            try:
                parent = changed
                for key in path[:-1]:
                    parent = parent[key]
                if remove:
                    del parent[path[-1]]
                else:
                    parent[path[-1]] = copy.deepcopy(new)
            except (KeyError, IndexError, TypeError):
                continue  # an earlier edit took its place away
        return changed

    edit = st.tuples(st.sampled_from(places(value)), st.sampled_from(junk), st.booleans())
    return st.lists(edit, min_size=1, max_size=3).map(change)


def json_of(content: bytes) -> st.SearchStrategy[bytes]:
    """The JSON with other values, or with other bytes."""
    changed = values_of(json.loads(content)).map(lambda v: json.dumps(v).encode())
    return changed | bytes_of(content)


def lines_of(content: bytes) -> st.SearchStrategy[bytes]:
    """JSON lines of which one or more have other values, are repeated, or have other bytes."""
    records = [json.loads(line) for line in content.splitlines()]
    changed = values_of(records).map(
        lambda v: b"".join(
            json.dumps(r).encode() + b"\n" for r in (v if isinstance(v, list) else [v])
        )
    )
    return changed | bytes_of(content)
