"""Attacks on runs: killed at any moment, their files damaged, and all of it in any order.

Whatever happens, a run that ends has the bits of the one that nobody disturbed; else an error says
what to do, and what it says works.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_runs
from fuzz.arena import STEPS, Arena, without_figures
from fuzz.attack import Attack, attempt, forked, judged
from fuzz.mutations import EDITS, Edit
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from fbopt.train.analyze.__main__ import main as analyze
from fbopt.train.checkpoint import fingerprint
from fbopt.train.checkpoint.run_dir import RunFolder

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")
MOST_EVENTS = 50  # a whole run has about as many
LATEST = 0.6  # seconds


class Kill(NamedTuple):
    """SIGKILL before a file operation of the run, counted from 0, or after some seconds.

    `torn` bytes of what the operation was to append are written.
    """

    event: int | None
    seconds: float = 0.0
    torn: int = 0


KILLS = st.builds(Kill, st.integers(0, MOST_EVENTS), torn=st.sampled_from([0, 0, 1, 7])) | (
    st.builds(Kill, st.none(), st.floats(0, LATEST))
)


def kill_at(kill: Kill, folder: Path) -> None:
    """Let this process be killed, once, as `kill` says."""
    seen, where = 0, str(folder)

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if name not in EVENTS or not str(arguments[0]).startswith(where):
            return
        number, seen = seen, seen + 1  # before the hook opens a file itself
        if number == kill.event:
            if name == "open" and arguments[2] & os.O_APPEND:
                descriptor = os.open(arguments[0], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                os.write(descriptor, b'{"step": 3, "pass": 3'[: kill.torn])
            os.kill(os.getpid(), signal.SIGKILL)

    if kill.event is None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, max(1e-3, kill.seconds))  # ends it as SIGKILL would
    else:
        sys.addaudithook(hook)


def killed(arena: Arena, folder: RunFolder, kill: Kill, **changes: Any) -> None:
    """Go on with a run in a process of its own until the kill, or its end if that is earlier."""

    def work() -> int:
        kill_at(kill, folder.path)
        return arena.go_on(folder, **changes)

    status, text = forked(work)
    assert status in (-signal.SIGKILL, -signal.SIGALRM) or judged(status, text)[0] == 0, text


def kills(arena: Arena) -> Attack:
    """Up to three kills of one run, which then ends."""

    def check(case: list[Kill]) -> None:
        folder = RunFolder(arena.clean("killed"))
        with without_figures():
            for kill in case:
                killed(arena, folder, kill)
            status, text = attempt(lambda: arena.go_on(folder))
        assert status == 0, text
        arena.check_outcome(folder)

    return Attack(st.lists(KILLS, min_size=1, max_size=3), check)


class Damage(NamedTuple):
    """What becomes of a file of a run, the one of this number in the order of names.

    It is edited, or replaced by nothing, a folder, a pipe, a link to itself or to a device.
    """

    file: int
    change: Edit | str

    def do(self, folder: Path) -> None:
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        if not files:
            return
        path = files[self.file % len(files)]
        if isinstance(self.change, Edit):
            if path.is_file():
                path.write_bytes(self.change.of(path.read_bytes()))
            return
        remove(path)
        instead = {"folder": path.mkdir, "pipe": partial(os.mkfifo, path)}
        links = {"loop": path, "device": Path("/dev/zero"), "dangling": folder / "nowhere"}
        if self.change in links:
            path.symlink_to(links[self.change])
        elif self.change != "nothing":
            instead[self.change]()


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


INSTEAD = ("nothing", "nothing", "folder", "pipe", "loop", "device", "dangling")
DAMAGES = st.builds(Damage, st.integers(0, 20), EDITS | st.sampled_from(INSTEAD))


def check_rescue(arena: Arena, folder: RunFolder) -> None:
    """End a run whatever became of its files: as it is, else by a start that replaces it, else once
    what is named as in the way is removed.
    """
    again = {"resume": None, "overwrite": True}
    with without_figures():
        status, text = attempt(lambda: arena.go_on(folder))
        if status:
            status, text = attempt(lambda: arena.go_on(folder, **again))
        if status:
            odd = [path for path in folder.path.iterdir() if not path.is_file()]
            assert any(path.name in text for path in odd), text
            for path in odd:
                remove(path)
            status, text = attempt(lambda: arena.go_on(folder, **again))
    assert status == 0, text
    arena.check_outcome(folder)


def corruptions(arena: Arena) -> Attack:
    """Damage to up to three files of a run, finished or not, that is then resumed and compared."""

    def check(case: tuple[bool, list[Damage]]) -> None:
        is_finished, damages = case
        folder = arena.copy(arena.finished if is_finished else arena.half)
        for damage in damages:
            damage.do(folder.path)
        look_at(arena, folder)
        check_rescue(arena, folder)

    drawn = st.tuples(st.booleans(), st.lists(DAMAGES, min_size=1, max_size=3))
    lines, lock = Damage(3, "pipe"), Damage(0, "dangling")
    both = Damage(2, "folder"), Damage(1, Edit("cut", 0.5, b""))  # the checkpoints
    return Attack(drawn, check, ((False, [lines]), (True, [lock]), (False, [*both])))


def look_at(arena: Arena, folder: RunFolder) -> None:
    """Compare and measure a run, which changes nothing of it."""
    path, sound = str(folder.path), str(arena.finished)
    attempt(lambda: fingerprint.main([path, sound]))
    measures = ["--measures", "gradient", "--train-steps", "1"]
    out = ["--out", str(arena.clean("analysis"))]
    attempt(lambda: analyze([path, *measures, *out]))


def machine(arena: Arena) -> type[RuleBasedStateMachine]:
    """Training, kills, interrupts, damage, comparisons and measurements in any order."""

    class Machine(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            self.folder, self.sound = RunFolder(arena.clean("machine")), True

        @rule(kill=KILLS)
        def kill(self, kill: Kill) -> None:
            self.train(lambda: kill_at(kill, self.folder.path))

        @rule(step=st.integers(1, STEPS))
        def interrupt(self, step: int) -> None:
            with pytest.MonkeyPatch.context() as patch:
                self.train(lambda: tiny_runs.interrupt_after(patch, step))

        @rule()
        def end(self) -> None:
            if self.train(lambda: None) == 0:
                arena.check_outcome(self.folder)

        @rule(damage=DAMAGES)
        def damage(self, damage: Damage) -> None:
            damage.do(self.folder.path)
            self.sound = False

        @rule()
        def look(self) -> None:
            look_at(arena, self.folder)

        def train(self, before: Callable[[], None]) -> int:
            """Go on with the run after `before`; only damage may be an error."""

            def work() -> int:
                before()
                return arena.go_on(self.folder)

            with without_figures():
                status, text = forked(work)
            if status not in (-signal.SIGKILL, -signal.SIGALRM):
                judged(status, text)
                assert not self.sound or status in (0, 130), text
            return status

        def teardown(self) -> None:
            check_rescue(arena, self.folder)

    return Machine


def sequences(arena: Arena) -> Attack:
    """Whole sequences of the machine; what is drawn is the seed of one."""

    def check(number: int) -> None:
        always = {"deadline": None, "suppress_health_check": list(HealthCheck)}
        one = settings(max_examples=1, stateful_step_count=8, database=None, **always)
        run_state_machine_as_test(seed(number)(machine(arena)), settings=one)

    return Attack(st.integers(0, 2**32), check)
