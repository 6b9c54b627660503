"""The names of data sets: the values of --data, split into a kind and a path."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType

from fbopt.train.config.paths import path_of

NAMED = ("mnist1d", "digits", "cifar10", "cifar100")
FOLDERS = ("imagefolder", "tinyimagenet", "imagenet")
KINDS = f"{', '.join(NAMED)}, npz:PATH, {':PATH, '.join(FOLDERS[:-1])}:PATH or {FOLDERS[-1]}:PATH"


class DataError(ValueError):
    """A data set that cannot be used; the message says which file or array and what to do."""


def require(option: str, package: str, module: str) -> ModuleType:
    """Import what an option's value needs; raises DataError where the package is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{option} needs the package {package}: pip install {package}") from error


def parse(spec: str) -> tuple[str, Path | None]:
    """Split a `--data` value into its kind and path; raises DataError if it names no data set."""
    kind, colon, path = spec.partition(":")
    if kind in NAMED and not colon:
        return kind, None
    if kind in ("npz", *FOLDERS):
        if not path:
            raise DataError(f"--data {spec}: a path has to follow, as in {kind}:path/to/data")
        try:
            return kind, path_of(path)
        except argparse.ArgumentTypeError as error:
            raise DataError(f"--data {kind}: {error}") from error
    raise DataError(f"--data {spec}: unknown data set; choose {KINDS}")


def scale_of(spec: str) -> str:
    """The scale of the recipes for a data set, unless --scale says otherwise."""
    return "images" if parse(spec)[0] in (*FOLDERS, "cifar10", "cifar100") else "small"


def default_size(spec: str) -> int:
    """The side in pixels of the images of a folder, unless --image-size says otherwise."""
    return {"tinyimagenet": 64, "imagenet": 224}.get(parse(spec)[0], 32)
