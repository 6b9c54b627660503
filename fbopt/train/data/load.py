"""Data sets by name: `load("mnist1d")`, digits, cifar10, cifar100, npz:PATH or imagefolder:PATH."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fbopt._build.cache import cache_folder, writable
from fbopt.train.config.dataspec import DataError, parse, require
from fbopt.train.data.dataset import Data, from_arrays

Arrays = tuple[Any, Any, Any, Any]  # x_train, y_train, x_test, y_test
NAMES = ("x_train", "y_train", "x_test", "y_test")
# Means and deviations of the training images' channels, as shares of 255, as in the paper's code.
MOMENTS = {
    "cifar10": ((0.49147, 0.48226, 0.44677), (0.24703, 0.24349, 0.26159)),
    "cifar100": ((0.50716, 0.48669, 0.44120), (0.26733, 0.25644, 0.27615)),
}
CACHE_FROM = 10_000  # images, whose decoding takes seconds


def load(
    spec: str,
    image_size: int = 32,
    folder: Path | None = None,
    download: bool = False,
    samples: int | None = None,
) -> Data:
    """Load the data set `spec`, a value of `--data`, into CPU tensors.

    `image_size` is the side in pixels that imagefolder's images are resized to; cifar10 and
    cifar100 are read from `folder` (default: data) and, with `download`, downloaded to it if they
    are not there. The first `samples` training samples are kept, by default all. Raises DataError
    for missing files, arrays that do not fit together, and labels out of range.
    """
    kind, path = parse(spec)
    if kind == "npz":
        arrays = _npz(path)
    elif kind == "imagefolder":
        arrays = _imagefolder(path, image_size)
    elif kind in MOMENTS:
        arrays = _cifar(kind, Path("data") if folder is None else folder, download)
    else:
        arrays = _mnist1d() if kind == "mnist1d" else _digits()
    return from_arrays(*arrays, spec, MOMENTS.get(kind), samples)


def fixed_order(samples: int) -> np.ndarray:
    """A shuffled order that is always the same: NumPy promises that for this generator."""
    return np.random.RandomState(0).permutation(samples)


def _mnist1d() -> Arrays:
    """MNIST-1D's own 4,000 training and 1,000 test signals of 40 points, generated offline."""
    make_dataset = require("--data mnist1d", "mnist1d", "mnist1d.data").make_dataset
    # The generator seeds the global generators of Python and NumPy, whose states must not change.
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        made = make_dataset()
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
    return made["x"], made["y"], made["x_test"], made["y_test"]


def _digits() -> Arrays:
    """scikit-learn's 1,797 digits of 8×8 in a fixed split: 1,437 to train on, 360 to test."""
    datasets = require("--data digits", "scikit-learn", "sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    order = fixed_order(len(y))
    x = x.reshape(-1, 1, 8, 8).astype(np.uint8)[order]
    y, cut = y[order], 1437
    return x[:cut], y[:cut], x[cut:], y[cut:]


def _npz(path: Path) -> Arrays:
    if not path.is_file():
        raise DataError(f"--data npz:{path}: there is no such file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in NAMES if name in archive}
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"--data npz:{path}: not an .npz file of plain arrays (pickled objects are "
            f"never read): {error}"
        ) from error
    if missing := [name for name in NAMES if name not in arrays]:
        raise DataError(
            f"--data npz:{path}: no array {', '.join(missing)}; save it with "
            f"numpy.savez(path, {', '.join(f'{n}={n}' for n in NAMES)})"
        )
    return tuple(arrays.values())


def _cifar(kind: str, folder: Path, download: bool) -> Arrays:
    """CIFAR-10 or CIFAR-100 as torchvision reads and checks it, from files below `folder`."""
    datasets = require(f"--data {kind}", "torchvision", "torchvision.datasets")
    source = getattr(datasets, kind.upper())
    folder = folder.expanduser()
    try:
        train, test = (source(folder, train, download=download) for train in (True, False))
    except (RuntimeError, OSError, EOFError) as error:
        reason = f"there is no intact {source.base_folder} in {folder}/; add --download"
        if download:
            reason = f"not downloaded to {folder}/: {error}; try again"
        raise DataError(
            f"--data {kind}: {reason}. Without a network: bring {source.url} (MD5 "
            f"{source.tgz_md5}) into that folder and give --download, which then only unpacks it; "
            "or say with --data-dir which folder has it"
        ) from error
    x_train, x_test = (part.data.transpose(0, 3, 1, 2) for part in (train, test))
    return x_train, train.targets, x_test, test.targets


def _imagefolder(path: Path, size: int) -> Arrays:
    """The images path/train/CLASS/IMAGE and path/test/CLASS/IMAGE, resized to `size` a side.

    The training images come in a fixed, shuffled order: in that of the folders a chunk would hold
    one class alone.
    """
    datasets = require(f"--data imagefolder:{path}", "torchvision", "torchvision.datasets")
    folders = []
    for part in ("train", "test"):
        try:
            folders.append(datasets.ImageFolder(str(path / part)))
        except FileNotFoundError as error:
            raise DataError(
                f"--data imagefolder:{path}: expected images as "
                f"{path / part}/<class>/<image>: {error}"
            ) from error
    train, test = folders
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(
            f"--data imagefolder:{path}: train and test have different classes; only "
            f"one of them has {', '.join(odd)}"
        )
    x_train, x_test = (_pixels([file for file, _ in f.samples], size) for f in folders)
    order = fixed_order(len(x_train))
    return x_train[order], np.asarray(train.targets)[order], x_test, test.targets


def _pixels(files: list[str], size: int) -> np.ndarray:
    """The images as uint8 (n, 3, size, size); many are decoded once and kept in fbopt's cache."""
    if len(files) < CACHE_FROM:
        return _decode(files, size)
    cached = writable(cache_folder()) / f"images-{_key(files, size)}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        return np.load(cached)
    pixels = _decode(files, size)
    partial = cached.with_name(f"{os.getpid()}-{cached.name}")
    try:
        np.save(partial, pixels)
        partial.replace(cached)
    except OSError:  # a full disk: the run needs no cache
        partial.unlink(missing_ok=True)
    return pixels


def _key(files: list[str], size: int) -> str:
    """A hash that changes with any file's name, length or time, the size, or the decoder."""
    import PIL

    digest = hashlib.sha256(f"{PIL.__version__} {size}\n".encode())
    for file in files:
        facts = os.stat(file)
        digest.update(f"{os.path.abspath(file)}\0{facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


def _decode(files: list[str], size: int) -> np.ndarray:
    """Decode images to uint8 (n, 3, size, size), resizing those of another size."""
    from PIL import Image
    from torchvision.datasets.folder import default_loader

    pixels = np.empty((len(files), 3, size, size), dtype=np.uint8)
    for index, file in enumerate(files):
        try:
            image = default_loader(file)
        except OSError as error:
            raise DataError(f"{file}: not a readable image ({error}); remove it") from error
        image = image.resize((size, size), Image.Resampling.BILINEAR)
        pixels[index] = np.asarray(image).transpose(2, 0, 1)
    return pixels
