"""Attacks on compiled code: libraries that others have planted, and ops that are called wrongly."""

from __future__ import annotations

import copy
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fuzz.arena import Arena
from fuzz.attack import Attack, attempt
from hypothesis import strategies as st
from op_cases import DTYPES, SHAPES, added, assert_same, cases, fences_hold
from op_cases import clone as fenced
from torch import Tensor

from fbopt._build import cache
from fbopt._ops import dispatch, reference

ROOT_USER, ANOTHER = 0, 54321  # who own files; the second is nobody here
STEM = "_C-planted"


class Owned(NamedTuple):
    """To whom a file belongs, with what mode, and whether a link leads to it."""

    user: int
    mode: int
    link: bool

    def is_private(self) -> bool:
        """Whether nobody but this user and root can write to it."""
        return self.user in (os.getuid(), ROOT_USER) and not self.mode & 0o022


MODES = (
    0o700,
    0o755,
    0o750,
    0o500,
    0o555,
    0o775,
    0o770,
    0o757,
    0o777,
    0o1777,
    0o2770,
    0o733,
    0o702,
)


def owned() -> st.SearchStrategy[Owned]:
    """Files of this user and, where root tests, of others, with groups that have other members."""
    is_root = os.getuid() == ROOT_USER
    modes = MODES if is_root else [mode & ~0o020 for mode in MODES]  # the group may be ours alone
    users = [ROOT_USER, ANOTHER] if is_root else [os.getuid()]
    return st.builds(Owned, st.sampled_from(users), st.sampled_from(modes), st.booleans())


def planted(arena: Arena) -> Attack:
    """A library in a cache whose folder, folder above and file have any owner and mode.

    It is taken if nobody else could have written to any of them, and if it is no link.
    """
    content = b"code"
    name = f"{STEM}.{hashlib.sha256(content).hexdigest()[:16]}.so"

    def check(case: tuple[Owned, Owned, Owned]) -> None:
        top = arena.clean("planted")
        folder = top / "above" / "cache"
        folder.mkdir(parents=True)
        (folder / name).write_bytes(content)
        for path, facts in zip((folder / name, folder, folder.parent), case, strict=True):
            if facts.link:
                path.rename(path.with_name("moved"))
                path.symlink_to("moved")
            if os.getuid() == ROOT_USER:
                os.chown(path, facts.user, ANOTHER)
            path.chmod(facts.mode)
        itself, around, above = case
        sticky = above.user != ANOTHER and bool(above.mode & 0o1000)
        private = itself.is_private() and around.is_private() and (above.is_private() or sticky)
        found: list[Path | None] = []
        _, said = attempt(lambda: found.append(cache.cached(folder, STEM)) or 0)
        assert (found[0] is not None) == (private and not itself.link), said

    return Attack(st.tuples(owned(), owned(), owned()), check)


REFUSALS = (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError, AttributeError)
ODD_VALUES = [
    None, 0, -1, 2**40, 1e300, float("nan"), float("inf"), "x", (), [], [None], True,
    torch.zeros(3), torch.zeros(()), torch.zeros(0), torch.ones(2, dtype=torch.int16),
    torch.ones(3, dtype=torch.complex64), torch.ones(3).to_sparse(),
    torch.ones(6)[::2], torch.ones(1).expand(4), torch.ones(2, requires_grad=True),
    torch.full((), float("nan"), dtype=torch.float64), torch.ones(4, dtype=torch.float64),
    torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(5, dtype=torch.bool),
]  # fmt: skip


class Spoiling(NamedTuple):
    """What becomes of one argument, or of one tensor in a list of them."""

    argument: int
    element: int
    way: str
    value: int

    def of(self, arguments: list[Any]) -> None:
        where, at = arguments, self.argument % len(arguments)
        if isinstance(where[at], list) and where[at] and self.element >= 0:
            where, at = where[at], self.element % len(where[at])
        old, others = where[at], tensors_in(arguments)
        if self.way == "other":
            where[at] = copy.deepcopy(ODD_VALUES[self.value % len(ODD_VALUES)])
        elif self.way == "alias" and isinstance(old, Tensor):
            where[at] = others[self.value % len(others)]
        elif self.way == "drop" and where is not arguments:
            del where[at]
        elif isinstance(old, Tensor) and old.layout == torch.strided:
            change = (
                lambda t: t.double(), lambda t: t.half(), lambda t: t.reshape(-1)[:-1],
                lambda t: t.unsqueeze(0), lambda t: t.flip(0) if t.dim() else t, lambda t: t.conj(),
                lambda t: t.detach().requires_grad_(t.is_floating_point()),
            lambda t: t.mT if t.dim() > 1 else t,
                lambda t: t.clone(), lambda t: torch.cat([t.reshape(-1)] * 2),
            )[self.value % 10]  # fmt: skip
            where[at] = change(old)


def tensors_in(arguments: list[Any]) -> list[Tensor]:
    every = [t for a in arguments for t in (a if isinstance(a, list) else [a])]
    return [t for t in every if isinstance(t, Tensor)]


WAYS = ("other", "alias", "drop", "change", "change")
SPOILINGS = st.builds(
    Spoiling, st.integers(0, 12), st.integers(-1, 4), st.sampled_from(WAYS), st.integers(0, 60)
)


class Call(NamedTuple):
    """An op with right arguments, the one of this number that op_cases has, then spoiled."""

    name: str
    dtype: torch.dtype
    shapes: list[tuple[int, ...]]
    number: int
    spoilings: list[Spoiling]


CALLS = st.builds(
    Call, st.sampled_from(dispatch.NAMES), st.sampled_from(DTYPES),
    st.lists(st.sampled_from(SHAPES[:6]), min_size=1, max_size=4), st.integers(0, 40),
    st.lists(SPOILINGS, min_size=1, max_size=2),
)  # fmt: skip


def calls(arena: Arena) -> Attack:
    """Ops with arguments of another kind, shape, dtype or layout, or that are one another.

    What is refused has changed nothing; what is not does as the reference does, if that takes it.
    """

    def check(call: Call) -> None:
        known = cases(call.name, call.shapes, call.dtype)
        made = fenced(list(known[call.number % len(known)]))
        arguments = [list(a) if isinstance(a, list) else a for a in made]
        with torch.no_grad():
            for spoiling in call.spoilings:
                spoiling.of(arguments)
        theirs, unchanged = copy.deepcopy(arguments), copy.deepcopy(arguments)
        before = elements(arguments)
        try:
            with torch.no_grad():
                result = getattr(dispatch, call.name)(*arguments)
        except REFUSALS:
            assert same(elements(arguments), before), "refused, and changed"
            return
        finally:
            assert fences_hold(made), "it wrote beside its tensors"
        try:
            with torch.no_grad():
                expected = getattr(reference, call.name)(*theirs)
        except REFUSALS:
            return  # of other shapes of a number, say, which torch does not broadcast
        if call.name == "accumulate_exact_penalty_":  # whose last bits may differ
            arguments, theirs = (added(unchanged, x, call.dtype) for x in (arguments, theirs))
        assert_same([result], [expected])
        assert_same(arguments, theirs)

    return Attack(CALLS, check)


def elements(value: Any) -> Any:
    """Copies of all tensors that have elements."""
    if isinstance(value, list):
        return [elements(v) for v in value]
    if not isinstance(value, Tensor):
        return None
    return value.detach().to_dense().clone() if value.is_sparse else value.detach().clone()


def same(first: Any, second: Any) -> bool:
    """Whether copies are equal, NaN to NaN."""
    if isinstance(first, list):
        return all(map(same, first, second))
    return first is None or bool(((first == second) | (first.isnan() & second.isnan())).all())
