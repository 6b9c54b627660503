"""Output that may go away: no run ends unsaved because nobody can read what it prints.

A stream that cannot be written to any more, for a full disk or a closed descriptor, is left alone,
and the run goes on. Where a pipe was closed, as by `| head`, the run is saved and stops; other
commands stop at once. Where a pipe or a terminal is full and nobody reads on, what is printed is
dropped until somebody does.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from fbopt.train.config.options import OptionsError
from fbopt.train.config.parser import fail
from fbopt.train.config.reading import reason

PATIENCE_SECONDS = 60.0  # for which a reader is waited for, once
# Characters of at most four bytes that fit where there is room at all; of a pipe in one piece.
PIPE_PIECE, OTHER_PIECE = 1024, 64
CLOSED_PIPE = 141  # 128 + SIGPIPE, as a shell reports a program that the signal ended


class GuardedStream(io.TextIOBase):
    """A text stream whose writes do not fail; `failure` is the first error of those of `stream`.

    Nor do they wait: see the head of this file. `name` is the stream's, and `other` is told that
    nobody reads this one. With `raising` a pipe that was closed is an error, BrokenPipeError.
    """

    def __init__(self, stream: TextIO | None, name: str = "stdout", raising: bool = False) -> None:
        super().__init__()
        self.raising = raising
        self._stream = stream  # None where Python found its descriptor closed
        self.failure: Exception | None = None if stream else ValueError("closed")
        self.name = name
        self.other: GuardedStream | None = None
        self._descriptor, self._piece = _one_that_fills(stream)
        self._dropping = False
        self._pending = ""  # the begin of a line, which is written at once: others may print, too

    def write(self, text: str) -> int:
        """Write what the stream can show, with escapes for what it cannot."""
        try:
            if self.failure is None:
                self._write(text)
        except UnicodeEncodeError:
            name = self._stream.encoding or "ascii"
            self.write(text.encode(name, "backslashreplace").decode(name))
        except (OSError, ValueError) as error:
            self._fail(error)
        return len(text)

    def _write(self, text: str) -> None:
        if self._descriptor is None:
            self._stream.write(text)
            return
        text.encode(self.encoding)  # raises before a part of it is written
        self._pending += text
        if "\n" in text or len(self._pending) > self._piece:
            self._hand_on()

    def _hand_on(self) -> None:
        text, self._pending = self._pending, ""
        for start in range(0, len(text), self._piece):
            if not self._has_room():
                return
            self._stream.write(text[start : start + self._piece])
            self._stream.flush()

    def _has_room(self) -> bool:
        """Wait for a reader, if it is the first time; whether what is written will not wait."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        if poll.poll(0 if self._dropping else 1000 * PATIENCE_SECONDS):
            if self._dropping:
                self._dropping = False
                self._stream.write("(what was printed while nobody read is lost)\n")
                self._stream.flush()
            return True
        if not self._dropping:
            self._dropping = True
            if self.other is not None:
                what = f"nobody has read {self.name} for {PATIENCE_SECONDS:.0f} s"
                self.other.write(f"fbopt: {what}; the work goes on, and what it prints is lost\n")
        return False

    def flush(self) -> None:
        """Hand on what was written."""
        try:
            if self.failure is None and self._descriptor is None:
                self._stream.flush()
            elif self.failure is None:
                self._hand_on()
        except (OSError, ValueError) as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failure = error
        if self.raising and self.pipe_is_closed:
            raise error

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self.failure is None and self._stream.isatty()

    def fileno(self) -> int:
        """The descriptor below."""
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        """The stream's own."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def pipe_is_closed(self) -> bool:
        """Whether nobody reads it any more."""
        return isinstance(self.failure, BrokenPipeError)


def nobody_reads() -> bool:
    """Whether the pipe that this process prints to was closed."""
    return isinstance(sys.stdout, GuardedStream) and sys.stdout.pipe_is_closed


def until_closed(work: Callable[[], int], needed: bool = False) -> int:
    """Return the exit status of `work`, or 141 as soon as stdout turns out to be a closed pipe.

    Where the output is `needed`, as all that there is, its loss for another reason is an error (1).
    """
    stop = None
    with guarded(raising=True) as output:
        try:
            try:
                status = work()
            except SystemExit as error:  # of the help, and of options that cannot be parsed
                stop, status = error, error.code
            except OptionsError as error:  # of the environment
                status = fail(f"fbopt: {error}", 2)
            output.flush()
        except BrokenPipeError:
            return CLOSED_PIPE
        if output.pipe_is_closed:
            return CLOSED_PIPE
        if needed and not status and output.failure is not None:
            return fail(f"fbopt: stdout cannot be written to: {reason(output.failure)}", 1)
        if stop is not None:
            raise stop
        return status


@contextlib.contextmanager
def guarded(raising: bool = False) -> Iterator[GuardedStream]:
    """Guard stdout and stderr; yields the former. What fails is left alone afterwards, too.

    Those that are guarded already are `raising` or not within.
    """
    _open_descriptors()
    before = sys.stdout, sys.stderr
    guards = [
        stream if isinstance(stream, GuardedStream) else GuardedStream(stream, name)
        for stream, name in zip(before, ("stdout", "stderr"), strict=True)
    ]
    guards[0].other, guards[1].other = guards[1], guards[0]
    were = [guard.raising for guard in guards]
    for guard in guards:
        guard.raising = raising
    sys.stdout, sys.stderr = guards
    try:
        yield guards[0]
    finally:
        sys.stdout, sys.stderr = before
        for guard, was in zip(guards, were, strict=True):
            guard.raising = False
            guard.flush()
            guard.raising = was
            if guard.failure is not None:  # the interpreter flushes once more at its end
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), guard.fileno())


def _one_that_fills(stream: TextIO | None) -> tuple[int | None, int]:
    """The descriptor of a stream whose reader may not read on, and how much is written at once;
    None for files and the like.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        mode = os.fstat(stream.fileno()).st_mode
        if stat.S_ISFIFO(mode):
            return stream.fileno(), PIPE_PIECE
        if stat.S_ISSOCK(mode) or stream.isatty():
            return stream.fileno(), OTHER_PIECE
    return None, 0


def _open_descriptors() -> None:
    """Open those of stdin, stdout and stderr that are closed: the next file would get their number,
    and what C++ prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
