"""The progress of a run: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from typing import Any, TextIO

import tqdm

LINE_SECONDS = 5.0


def bar(**options: Any) -> Any:
    """A tqdm bar as wide as the terminal."""
    # Without nrows tqdm shows nothing where a pseudo-terminal claims to have no rows.
    return tqdm.tqdm(ncols=shutil.get_terminal_size().columns, nrows=20, **options)


class Progress:
    """Shows how many of `passes` over `samples` training samples are done, beginning at `done`."""

    def __init__(self, passes: int, done: int, samples: int, stream: TextIO | None = None) -> None:
        self.passes, self.samples = passes, samples
        self.stream = sys.stdout if stream is None else stream
        self.recent = deque([(time.monotonic(), done)], maxlen=20)  # for the rate
        self.last_line = float("-inf")
        self.accuracy = ""  # of the last evaluation, in words
        style = {"bar_format": "{percentage:3.0f} % |{bar:8}|{desc}", "file": self.stream}
        self.bar = bar(total=passes, initial=done, **style) if self.stream.isatty() else None

    def advance(self, samples: int) -> None:
        """Move the bar within a pass, which may take minutes."""
        if self.bar is not None:
            self.bar.update(samples / self.samples)

    def report(self, record: dict[str, Any]) -> None:
        """Show a record of the metrics, taken after a whole pass."""
        for name in ("test", "validation"):  # the latter where there are both
            if (share := record.get(f"{name}_accuracy")) is not None:
                self.accuracy = f"{name} {share:.1%}"
        done = record["pass"]
        parts = self._parts(record)
        if self.bar is not None:
            self.bar.ncols = shutil.get_terminal_size().columns
            text = ""
            for part in parts:  # whole ones only, as many as the terminal is wide
                if len(text) + len(part) + 17 <= self.bar.ncols:
                    text += " " + part
            self.bar.set_description_str(text, refresh=False)
            self.bar.update(done - self.bar.n)
            return
        now = time.monotonic()
        if now - self.last_line >= LINE_SECONDS or done == self.passes:
            self.last_line = now
            parts.insert(0, f"{done:{len(str(self.passes))}}/{self.passes}")
            print(*parts, sep="  ", file=self.stream, flush=True)

    def _parts(self, record: dict[str, Any]) -> list[str]:
        """The record in words, the most important first."""
        self.recent.append((time.monotonic(), record["pass"]))
        (begin, first), (end, last) = self.recent[0], self.recent[-1]
        rate = (last - first) / max(end - begin, 1e-9)
        left = (self.passes - record["pass"]) / rate if rate else None
        clock, short = tqdm.tqdm.format_interval, tqdm.tqdm.format_sizeof
        parts = [
            f"{'?' if left is None else clock(left)} left",
            f"loss {record['loss']:.4f}",
            f"train {record['train_accuracy']:.1%}",
            f"|g| {record['gradient_norm']:.3g}",
            f"lr {record['lr']:.3g}",
            f"{short(rate * record['step'] / record['pass'])} steps/s",
            f"{short(rate * self.samples)} samples/s",
        ]
        if self.accuracy:
            parts.insert(3, self.accuracy)
        return parts

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self.bar is not None:
            self.bar.refresh()
            self.bar.close()
