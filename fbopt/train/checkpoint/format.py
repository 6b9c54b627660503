"""The checkpoint file: a torch.save archive that ends in the SHA-256 of everything before.

The digest is the archive's zip comment, `fbopt sha256 ` and 64 digits: torch.load reads the file as
it is, and a truncated or altered file is recognised before anything in it is unpickled.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from fbopt.train.checkpoint.schema import fault_of_checkpoint
from fbopt.train.config.reading import read_bytes

FORMAT = 3  # increased when the content changes so that other versions cannot read it
_TAG = b"fbopt sha256 "
_DIGITS = 64
_END = b"PK\x05\x06"  # the zip record whose last two bytes are the length of the comment
_END_SIZE = 22


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why."""


def seal(state: dict[str, Any]) -> bytes:
    """The bytes of a checkpoint file for `state`, which may hold tensors and plain types."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    archive = buffer.getvalue()
    if archive[-_END_SIZE:][:4] != _END or archive[-2:] != b"\0\0":
        raise RuntimeError(f"torch {torch.__version__} writes archives that cannot be sealed")
    body = archive[:-2] + (len(_TAG) + _DIGITS).to_bytes(2, "little") + _TAG
    return body + hashlib.sha256(body).hexdigest().encode()


def unseal(content: bytes) -> dict[str, Any]:
    """The state that `seal` was given, on the CPU. Raises CheckpointError for any other content."""
    body, digest = content[:-_DIGITS], content[-_DIGITS:]
    if not body.endswith(_TAG):
        raise CheckpointError("it is cut short, altered, or no checkpoint of this version of fbopt")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise CheckpointError("its content does not have the SHA-256 that it was written with")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        text = str(error).partition("\n")[0]
        raise CheckpointError(f"torch {torch.__version__} cannot read it ({text})") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"it has format {found}, and this version of fbopt reads {FORMAT}")
    return state


def read(path: Path) -> dict[str, Any]:
    """The state of a run in the file at `path`. Raises CheckpointError."""
    try:
        state = unseal(read_bytes(path))
    except OSError as error:
        raise CheckpointError(f"it cannot be read ({error.strerror or error})") from error
    if wrong := fault_of_checkpoint(state):
        raise CheckpointError(f"its SHA-256 is right, but {wrong}")
    return state
