"""Image files as uint8 arrays, decoded once and kept in fbopt's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fbopt._build import trust
from fbopt._build.cache import cache_folder, lock, writable
from fbopt.train.config.cores import usable_cores
from fbopt.train.config.dataspec import DataError, require
from fbopt.train.config.reading import open_regular, reading

CACHE_FROM = 10_000  # images, whose decoding takes seconds
BLOCK = 16  # images that a thread decodes in a row
NOTE_SECONDS = 5.0  # after which those who wait are told how far it is


def pixels(files: Sequence[str], size: int) -> np.ndarray:
    """The images as uint8 (n, 3, size, size) in memory; many are kept in the cache."""
    if len(files) < CACHE_FROM:
        return _decode(files, size)
    cached = writable(cache_folder()) / f"images-{_key(files, f'{size}')}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError), trust.open_file(cached) as file:
        return np.load(file)
    made = _decode(files, size)
    partial = cached.with_name(f"{os.getpid()}-{cached.name}")
    try:
        np.save(partial, made)
        partial.replace(cached)
    except OSError:  # a full disk: the run needs no cache
        partial.unlink(missing_ok=True)
    return made


def mapped_pixels(files: Sequence[str], side: int, name: str) -> tuple[np.ndarray, str]:
    """The images as uint8 (n, 3, side, side) in a mapped file, and a SHA-256 of them all.

    The shorter side of each is resized to `side`, and the square in its middle kept: n·side²·3
    bytes on disk, channels last. Of a file of the cache only what is read comes into memory.

    Args:
        files: of the images, in their order.
        side: in pixels.
        name: of the data set, for errors. Raises DataError where the file cannot be written.
    """
    cached = writable(cache_folder()) / f"mapped-{_key(files, f'{side} square')}.npy"
    digest, shape = cached.with_suffix(".sha256"), (len(files), side, side, 3)
    with lock(cached.with_suffix(".lock"), f"decoding {name}") as note:
        with contextlib.suppress(OSError, ValueError, EOFError):
            return _open(cached, shape), digest.read_text()
        partial = cached.with_suffix(".partial")  # one of a killed process is written over
        if len(files) >= CACHE_FROM:
            print(f"decoding {len(files):,} images of {name}, once, to {cached}", flush=True)
        try:
            digest.write_text(_decode_to(partial, files, shape, note))
            partial.replace(cached)
        except OSError as error:
            raise DataError(
                f"{name}: its {len(files):,} images take {np.prod(shape) / 1e9:.1f} GB in "
                f"{cached.parent}, which cannot be written ({error}); make room, or say with "
                "FBOPT_CACHE_DIR where there is some"
            ) from error
        finally:
            partial.unlink(missing_ok=True)
        return _open(cached, shape), digest.read_text()


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    trust.open_file(path).close()
    # Copy on write: torch warns of arrays that cannot be written to.
    array = np.load(path, mmap_mode="c")
    if array.shape != shape or array.dtype != np.uint8:
        raise ValueError(f"{path} holds something else")
    return array.transpose(0, 3, 1, 2)


def _decode_to(
    path: Path, files: Sequence[str], shape: tuple[int, ...], note: Callable[[str], None]
) -> str:
    """Write the images to a file, and `note` how many are; return the SHA-256 of all of theirs."""
    transforms = require("--data imagenet:PATH", "torchvision", "torchvision.transforms")
    square = transforms.Compose([transforms.Resize(shape[1]), transforms.CenterCrop(shape[1])])
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)

    def decode(first: int) -> bytes:
        digests = b""
        for index in range(first, min(first + BLOCK, len(files))):
            array[index] = read_image(files[index], square)
            digests += hashlib.sha256(array[index].tobytes()).digest()
        return digests

    total, told = hashlib.sha256(), time.monotonic()
    with ThreadPoolExecutor(usable_cores()) as pool:  # decoders let go of Python's lock
        firsts = range(0, len(files), BLOCK)
        for first, digests in zip(firsts, pool.map(decode, firsts), strict=True):
            total.update(digests)
            if time.monotonic() - told > NOTE_SECONDS:
                told = time.monotonic()
                note(f", at image {first + BLOCK:,} of {len(files):,}")
    array.flush()
    return total.hexdigest()


def _key(files: Sequence[str], size: str) -> str:
    """A hash that changes with any file's name, length or time, the size, or the decoder."""
    import PIL

    digest = hashlib.sha256(f"{PIL.__version__} {size}\n".encode())
    for file in files:
        facts = os.stat(file)
        digest.update(f"{os.path.abspath(file)}\0{facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


def _decode(files: Sequence[str], size: int) -> np.ndarray:
    """Decode images to uint8 (n, 3, size, size), resizing those of another size."""
    from PIL import Image

    found = _room_for((len(files), 3, size, size))
    for index, file in enumerate(files):
        image = read_image(file, lambda i: i.resize((size, size), Image.Resampling.BILINEAR))
        found[index] = image.transpose(2, 0, 1)
    return found


def _room_for(shape: tuple[int, ...]) -> np.ndarray:
    """An array of bytes, refused where it is larger than the memory of this machine."""
    needed = math.prod(shape)
    if needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise DataError(
            f"{shape[0]:,} images of {shape[-1]:,} pixels a side take {needed / 1e9:,.1f} GB, more "
            "than this machine has; give a smaller --image-size"
        )
    return np.empty(shape, dtype=np.uint8)


def read_image(file: str, change: Callable[[Any], Any]) -> np.ndarray:
    """An image file in RGB, changed by `change`, as uint8 (height, width, 3)."""
    from PIL import Image

    where = f"{file}: not a readable image"
    with reading(where, DataError, "remove it, or put a sound one in its place"):
        content = open_regular(file)
        with content, Image.open(content) as image:
            return np.asarray(change(image.convert("RGB")))
