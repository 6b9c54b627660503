"""The rooms' promises: no arrow back, no circle between files, and what may be imported cheaply."""

from __future__ import annotations

import subprocess
import sys

import pytest
import rooms


def test_no_import_goes_back():
    assert rooms.arrows_back(rooms.imports()) == []


def test_no_files_import_each_other():
    assert rooms.circles(rooms.imports()) == []


def test_faults_are_found():
    graph = {name: set() for name in ("fbopt.clip", "fbopt.optim", "fbopt.train.loop")}
    graph["fbopt.optim"], graph["fbopt.clip"] = {"fbopt.clip"}, {"fbopt.optim"}
    assert rooms.arrows_back(graph) == ["fbopt.clip -> fbopt.optim"]
    assert rooms.circles(graph) == ["fbopt.clip <-> fbopt.optim"]


def test_every_module_has_a_room():
    assert [name for name in rooms.modules() if name != "fbopt" and not rooms.room(name)] == []


@pytest.mark.parametrize("name", ["fbopt", "fbopt.cli", "fbopt.doctor", "fbopt.train.config"])
def test_imported_without_torch(name):
    program = f"import {name}, pkgutil, importlib, sys\n"
    if name.endswith("config"):
        program += f"for m in pkgutil.iter_modules({name}.__path__):\n"
        program += f"    importlib.import_module('{name}.' + m.name)\n"
    program += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
