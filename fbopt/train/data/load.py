"""Data sets by name: `load("mnist1d")`, digits, cifar10, cifar100, or a kind and a path."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np

from fbopt.train.config.dataspec import DataError, default_size, parse, require
from fbopt.train.config.options import Options
from fbopt.train.config.reading import open_regular, reading
from fbopt.train.data import folders
from fbopt.train.data.dataset import Data, from_arrays
from fbopt.train.data.folders import Arrays, fixed_order

NAMES = ("x_train", "y_train", "x_test", "y_test")
# Means and deviations of the training images' channels, as shares of 255, as in the paper's code.
MOMENTS = folders.MOMENTS | {
    "cifar10": ((0.49147, 0.48226, 0.44677), (0.24703, 0.24349, 0.26159)),
    "cifar100": ((0.50716, 0.48669, 0.44120), (0.26733, 0.25644, 0.27615)),
}


def load(
    spec: str,
    image_size: int | None = None,
    folder: Path | None = None,
    download: bool = False,
    samples: int | None = None,
    validation: float = 0.0,
) -> Data:
    """Load the data set `spec`, a value of `--data`, into CPU tensors.

    `image_size` is the side in pixels that the images of folders are resized to, by default
    `default_size`'s; cifar10 and cifar100 are read from `folder` (default: data) and, with
    `download`, downloaded to it if they are not there. The share `validation` of the training
    samples is held out; of the others the first `samples` are kept, by default all. Raises
    DataError for missing files, arrays that do not fit together, and labels out of range.
    """
    kind, path = parse(spec)
    if kind == "npz":
        arrays = _npz(path)
    elif path is not None:
        size = image_size or default_size(spec)
        if kind == "imagenet":
            return folders.imagenet(path, size, samples, validation)
        arrays = getattr(folders, kind)(path, size)
    elif kind in MOMENTS:
        arrays = _cifar(kind, Path("data") if folder is None else folder, download)
    else:
        arrays = _mnist1d() if kind == "mnist1d" else _digits()
    return from_arrays(*arrays, spec, MOMENTS.get(kind), samples, validation)


def load_for(options: Options) -> Data:
    """Load the data set of a run, as :func:`load` does."""
    return load(
        options.data,
        options.image_size,
        options.data_dir,
        options.download,
        options.samples,
        options.validation,
    )


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
    where = f"--data npz:{path}"
    cure = "save it with numpy.savez (pickled objects are never read)"
    if not path.exists():
        raise DataError(f"{where}: there is no such file")
    with reading(f"{where}: not an .npz file of plain arrays", DataError, cure):
        file = open_regular(path)
        with file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in NAMES if name in archive}
    if missing := [name for name in NAMES if name not in arrays]:
        raise DataError(
            f"{where}: no array {', '.join(missing)}; save it with "
            f"numpy.savez(path, {', '.join(f'{n}={n}' for n in NAMES)})"
        )
    return tuple(arrays.values())


def _cifar(kind: str, folder: Path, download: bool) -> Arrays:
    """CIFAR-10 or CIFAR-100 as torchvision reads and checks it, from files below `folder`."""
    datasets = require(f"--data {kind}", "torchvision", "torchvision.datasets")
    source = getattr(datasets, kind.upper())
    folder = Path(os.path.expanduser(folder))
    lists = (*source.train_list, *source.test_list, (source.meta["filename"], ""))
    read = [folder / source.base_folder / name for name, _ in lists]
    for path in (folder / source.filename, *read):
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise DataError(f"--data {kind}: {path} is no regular file; remove it")
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
