"""The map of rooms: which folder of fbopt imports which, from the import statements of every file.

    python tests/rooms.py     print it; exit with 1 where an arrow points back or files form circles

Imports inside functions count; those under ``if TYPE_CHECKING:`` do not.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# From the bottom up: a room may import its own floor and those below it.
FLOORS = (
    ("_build",),
    ("_ops", "reference", "_checks", "_random", "_eager", "_sharding", "_direction"),
    ("_distributed",),
    ("_engine", "accumulate", "penalty", "sharpness", "clip"),
    ("_diagnosis",),
    ("diagnosis",),
    ("closure",),
    ("_line_search",),
    ("optim", "lbfgs"),
    ("analysis", "integrations"),
    ("train.config",),
    ("train.data", "train.models"),
    ("train", "train.ensemble"),
    ("train.ladder", "train.analyze", "train.plot", "train.flow"),
    ("doctor", "check_script", "cli"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Return every module of fbopt by its dotted name; a folder's __init__ has the folder's."""
    found = {}
    for path in sorted((ROOT / "fbopt").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports() -> Graph:
    """Return which modules of fbopt every module imports; of a package its __init__."""
    known = modules()
    return {
        name: {target for target in _targets(path, known) if target != name}
        for name, path in known.items()
    }


def _targets(path: Path, known: dict[str, Path]) -> Iterator[str]:
    for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in known else node.module


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree, but not into ``if TYPE_CHECKING:``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _statements(child)


def room(module: str) -> str:
    """Return the room that a module is in; "" for fbopt itself, which has only lazy imports."""
    words = module.split(".")[1:]
    while words and ".".join(words) not in FLOOR_OF:
        words.pop()
    return ".".join(words)


def arrows_back(graph: Graph) -> list[str]:
    """Return the imports that go from a lower floor to a higher one."""
    return [
        f"{name} -> {target}"
        for name, targets in graph.items()
        for target in sorted(targets)
        if room(name) and FLOOR_OF.get(room(target), -1) > FLOOR_OF[room(name)]
    ]


def circles(graph: Graph) -> list[str]:
    """Return the sets of modules that import each other, directly or by way of others."""
    reached = {name: _reach(graph, name) for name in graph}
    found = {
        tuple(sorted({name} | {other for other in reached[name] if name in reached[other]}))
        for name in graph
        if name in reached[name]
    }
    return [" <-> ".join(circle) for circle in sorted(found)]


def _reach(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


def main() -> int:
    """Print each room with the rooms that it imports, then what is wrong; return the status."""
    graph, between = imports(), {}
    for name, targets in graph.items():
        between.setdefault(room(name), set()).update(room(target) for target in targets)
    for floor in FLOORS:
        for name in floor:
            below = sorted(between.get(name, set()) - {name, ""}, key=lambda r: FLOOR_OF[r])
            print(f"{name:15} imports  {', '.join(below) or '-'}")
    wrong = [f"arrow back: {arrow}" for arrow in arrows_back(graph)]
    wrong += [f"circle: {circle}" for circle in circles(graph)]
    print("\n".join(wrong) if wrong else "no arrow back, no circle")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
