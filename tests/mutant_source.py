"""Mutants of a Python file: copies with one small fault each.

The faults are mutmut's (operators swapped, numbers plus one, arguments dropped or None, ...), in
decorated functions too, which mutmut by itself leaves alone, and four more: a decorator or the
statement of a call dropped, a condition negated, a value returned replaced by None. Texts with
blanks are left alone: they are messages, and their wording is no behaviour.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libcst as cst
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("optim", "closure", "accumulate", "clip", "penalty", "sharpness", "lbfgs")
UNTOUCHED = {"len", "isinstance"}  # calls whose arguments are seldom wrong
WHOLE = (cst.FunctionDef, cst.ClassDef)
HEADED = (cst.If, cst.For, cst.While, cst.With)


@dataclass(frozen=True)
class Mutant:
    """A file with one fault.

    Attributes:
        module: the file, relative to the root.
        lines: first and last line of the faulty statement in the original; of a signature those of
            the whole function.
        code: the whole file.
        diff: what was changed, in the format of ``diff -U 1`` without its head.
    """

    module: str
    lines: tuple[int, int]
    code: str
    diff: str


def mutants(root: Path, module: str) -> Iterator[Mutant]:
    """Make every mutant of a file, in the order of its lines."""
    original = (root / module).read_text()
    wrapper = MetadataWrapper(cst.parse_module(original))
    visitor = _Visitor()
    wrapper.visit(visitor)
    seen = {original}
    for old, new, lines in visitor.found:
        code = wrapper.module.deep_replace(old, new).code
        if code not in seen and _compiles(code):
            seen.add(code)
            yield Mutant(module, lines, code, _diff(original, code))


def _compiles(code: str) -> bool:
    try:
        compile(code, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _diff(old: str, new: str) -> str:
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), n=1, lineterm="")
    return "\n".join([*lines][2:])


class _Visitor(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider, ParentNodeProvider)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[cst.CSTNode, Any, tuple[int, int]]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Annotation | cst.Decorator | cst.Import | cst.ImportFrom):
            return False
        if isinstance(node, cst.Call) and getattr(node.func, "value", None) in UNTOUCHED:
            return False
        if isinstance(node, cst.SimpleStatementLine) and _is_text(node.body[0]):
            return False
        if isinstance(node, cst.SimpleString) and " " in node.value:
            return False
        for new in _faults(node):
            self.found.append((node, new, self._lines(node)))
        return True

    def _lines(self, node: cst.CSTNode) -> tuple[int, int]:
        while not isinstance(node, (cst.SimpleStatementLine, *HEADED, *WHOLE)):
            if isinstance(node, cst.Module):
                return 0, 0
            node = self.get_metadata(ParentNodeProvider, node)
        place = self.get_metadata(PositionProvider, node)
        first, last = place.start.line, place.end.line
        if isinstance(node, HEADED):
            last = max(first, self.get_metadata(PositionProvider, node.body).start.line - 1)
        return first, last


def _is_text(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.Expr) and isinstance(node.value, cst.BaseString)


def _faults(node: cst.CSTNode) -> Iterable[Any]:
    """What may stand in the place of a node."""
    for kind, operator in mutation_operators:
        if isinstance(node, kind):
            # Of strings the first alone: to change their case is the same fault again.
            changed = list(operator(node))
            yield from changed[:1] if isinstance(node, cst.BaseString) else changed
    if isinstance(node, cst.FunctionDef):
        for i in range(len(node.decorators)):
            rest = [*node.decorators[:i], *node.decorators[i + 1 :]]
            yield node.with_changes(decorators=rest)
    elif isinstance(node, cst.If | cst.IfExp):
        yield node.with_changes(test=_negated(node.test))
    elif isinstance(node, cst.Expr) and isinstance(node.value, cst.Call):
        yield cst.Pass()
    elif isinstance(node, cst.Return) and node.value and getattr(node.value, "value", "") != "None":
        yield node.with_changes(value=cst.Name("None"))


def _negated(test: cst.BaseExpression) -> cst.BaseExpression:
    inner = test.with_changes(
        lpar=[*test.lpar, cst.LeftParen()], rpar=[*test.rpar, cst.RightParen()]
    )
    return cst.UnaryOperation(cst.Not(), inner)
