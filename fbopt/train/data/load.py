"""Where data comes from: `load("mnist1d")`, another name, npz:PATH or imagefolder:PATH."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fbopt.train.data.dataset import Data

Arrays = tuple[Any, Any, Any, Any]  # x_train, y_train, x_test, y_test
NAMED = ("mnist1d", "digits", "cifar10", "cifar100")
KINDS = f"{', '.join(NAMED)}, npz:PATH or imagefolder:PATH"


class DataError(ValueError):
    """A data set that cannot be used; the message says which file or array and what to do."""


def parse(spec: str) -> tuple[str, Path | None]:
    """Split a `--data` value into its kind and path; raises DataError where it names nothing."""
    kind, colon, path = spec.partition(":")
    if kind in NAMED and not colon:
        return kind, None
    if kind in ("npz", "imagefolder"):
        if not path:
            raise DataError(f"--data {spec}: a path has to follow, as in {kind}:path/to/data")
        return kind, Path(path).expanduser()
    raise DataError(f"--data {spec}: unknown data set; choose {KINDS}")


def load(
    spec: str,
    image_size: int = 32,
    folder: Path | None = None,
    download: bool = False,
    samples: int | None = None,
) -> Data:
    """Load `spec` (one of `KINDS`) into CPU tensors.

    `image_size` is the side in pixels that imagefolder's images are resized to; cifar10 and
    cifar100 are read from `folder` (default: data), to where `download` brings them if they are not
    there. With `samples` only the first so many training samples are kept. Raises DataError for
    missing files, arrays that do not fit together, and labels out of range.
    """
    # Both bring torch: a typing error should not wait for it.
    from fbopt.train.data import images
    from fbopt.train.data.dataset import from_arrays

    kind, path = parse(spec)
    moments = None
    if kind == "npz":
        arrays = _npz(path)
    elif kind == "imagefolder":
        arrays = images.imagefolder(path, image_size)
    elif kind in images.MOMENTS:
        arrays = images.cifar(kind, Path("data") if folder is None else folder, download)
        moments = images.MOMENTS[kind]
    else:
        arrays = _mnist1d() if kind == "mnist1d" else _digits()
    return from_arrays(*arrays, spec, moments, samples)


def fixed_order(samples: int) -> np.ndarray:
    """A shuffled order that is always the same: NumPy promises that for this generator."""
    return np.random.RandomState(0).permutation(samples)


def need(package: str, spec: str) -> DataError:
    """The error of a data set that takes a package which is not installed."""
    return DataError(f"--data {spec} needs the package {package}: pip install {package}")


def _mnist1d() -> Arrays:
    """MNIST-1D's own 4,000 training and 1,000 test signals of 40 points, generated offline."""
    try:
        from mnist1d.data import make_dataset
    except ImportError as error:
        raise need("mnist1d", "mnist1d") from error
    # The generator seeds the global random states of Python and NumPy; they are not ours to change.
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        made = make_dataset()
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
    return made["x"], made["y"], made["x_test"], made["y_test"]


def _digits() -> Arrays:
    """scikit-learn's 1,797 digits of 8×8, 1,437 to train and 360 to test, by a fixed shuffle."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise need("scikit-learn", "digits") from error
    x, y = load_digits(return_X_y=True)
    order = fixed_order(len(y))
    x = x.reshape(-1, 1, 8, 8).astype(np.uint8)[order]
    y, cut = y[order], 1437
    return x[:cut], y[:cut], x[cut:], y[cut:]


def _npz(path: Path) -> Arrays:
    names = ("x_train", "y_train", "x_test", "y_test")
    if not path.is_file():
        raise DataError(f"--data npz:{path}: there is no such file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if missing := [name for name in names if name not in archive]:
                raise DataError(
                    f"--data npz:{path}: no array {', '.join(missing)}; save it with "
                    f"numpy.savez(path, {', '.join(f'{n}={n}' for n in names)})"
                )
            return tuple(archive[name] for name in names)
    except DataError:
        raise
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"--data npz:{path}: not an .npz file of plain arrays (pickled objects are "
            f"never read): {error}"
        ) from error
