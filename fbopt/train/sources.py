"""Where data comes from: `load("mnist1d")`, digits, npz:PATH or imagefolder:PATH."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fbopt.train.data import Data

Arrays = tuple[Any, Any, Any, Any]  # x_train, y_train, x_test, y_test
KINDS = "mnist1d, digits, npz:PATH or imagefolder:PATH"


class DataError(ValueError):
    """A data set that cannot be used; the message says which file or array and what to do."""


def parse(spec: str) -> tuple[str, Path | None]:
    """Split a `--data` value into its kind and path; raises DataError where it names nothing."""
    kind, colon, path = spec.partition(":")
    if kind in ("mnist1d", "digits") and not colon:
        return kind, None
    if kind in ("npz", "imagefolder"):
        if not path:
            raise DataError(f"--data {spec}: a path has to follow, as in {kind}:path/to/data")
        return kind, Path(path).expanduser()
    raise DataError(f"--data {spec}: unknown data set; choose {KINDS}")


def load(spec: str, image_size: int = 32) -> Data:
    """Load `spec` (mnist1d, digits, npz:PATH, imagefolder:PATH) into CPU tensors.

    `image_size` is the side in pixels that imagefolder's images are resized to. Raises DataError
    for missing files, arrays that do not fit together, and labels out of range.
    """
    kind, path = parse(spec)
    if kind == "npz":
        arrays = _npz(path)
    elif kind == "imagefolder":
        arrays = _imagefolder(path, image_size)
    else:
        arrays = _mnist1d() if kind == "mnist1d" else _digits()
    from fbopt.train.data import from_arrays  # brings torch: a typing error should not wait for it

    return from_arrays(*arrays, spec)


def _need(package: str, spec: str) -> DataError:
    return DataError(f"--data {spec} needs the package {package}: pip install {package}")


def _mnist1d() -> Arrays:
    """MNIST-1D's own 4,000 training and 1,000 test signals of 40 points, generated offline."""
    try:
        from mnist1d.data import make_dataset
    except ImportError as error:
        raise _need("mnist1d", "mnist1d") from error
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
        raise _need("scikit-learn", "digits") from error
    x, y = load_digits(return_X_y=True)
    # NumPy promises that this generator's stream never changes.
    order = np.random.RandomState(0).permutation(len(y))
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


def _imagefolder(path: Path, size: int) -> Arrays:
    try:
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise _need("torchvision", f"imagefolder:{path}") from error
    folders = {}
    for part in ("train", "test"):
        try:
            folders[part] = ImageFolder(str(path / part))
        except FileNotFoundError as error:
            raise DataError(
                f"--data imagefolder:{path}: expected images as "
                f"{path / part}/<class>/<image>: {error}"
            ) from error
    train, test = folders["train"], folders["test"]
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(
            f"--data imagefolder:{path}: train and test have different classes; only "
            f"one of them has {', '.join(odd)}"
        )
    pixels = [_pixels(folder.samples, size) for folder in (train, test)]
    return pixels[0], train.targets, pixels[1], test.targets


def _pixels(samples: list[tuple[str, int]], size: int) -> np.ndarray:
    """Decode images to uint8 (n, 3, size, size); smaller and larger ones are resized."""
    from PIL import Image

    pixels = np.empty((len(samples), 3, size, size), dtype=np.uint8)
    for index, (file, _) in enumerate(samples):
        try:
            with Image.open(file) as image:
                image = image.convert("RGB")
        except OSError as error:
            raise DataError(f"{file}: not a readable image ({error}); remove it") from error
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        pixels[index] = np.asarray(image).transpose(2, 0, 1)
    return pixels
