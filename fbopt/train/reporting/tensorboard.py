"""The rows of metrics.jsonl as TensorBoard scalars, in event files in the run folder.

All rows are written anew when a run begins or is resumed: events that a killed process had not
written are there then, and those that it wrote after its last checkpoint are gone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import OptionsError

PLACE = ("pass", "step", "seconds")  # where a row is, not what it measures


def check_installed() -> None:
    """Raise OptionsError where TensorBoard cannot be imported."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise OptionsError(
            f"--log tensorboard needs TensorBoard ({error}): pip install tensorboard, or leave it "
            "out; metrics.jsonl and curves.png are written in any case"
        ) from error


class TensorBoard:
    """Writes every row's numbers at its step, beginning with the rows that the folder holds."""

    def __init__(self, folder: RunFolder) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, rows = folder, folder.read_metrics()
        self.start = time.time() - (rows[-1]["seconds"] if rows else 0)
        with folder.writing(folder.path):
            for path in folder.event_files():
                path.unlink()
            # A TensorBoard that is open drops what it has read of the removed files.
            self.writer = SummaryWriter(str(folder.path), purge_step=0)
        for row in rows:
            self(row)

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Write one row."""
        with self.folder.writing(self.folder.path):
            for name, value in row.items():
                if name not in PLACE:
                    self.writer.add_scalar(name, value, row["step"], self.start + row["seconds"])

    def close(self) -> None:
        """Write what is still in memory."""
        with self.folder.writing(self.folder.path):
            self.writer.close()
