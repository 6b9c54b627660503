"""Data sets of image files in folders: one for each class, or as TinyImageNet comes.

Training images come in a fixed, shuffled order: in that of the folders a chunk would hold one class
alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fbopt.train.config.dataspec import DataError, require
from fbopt.train.config.reading import read_bytes
from fbopt.train.data.dataset import Data, Split, channel_moments
from fbopt.train.data.decode import mapped_pixels, pixels
from fbopt.train.data.validation import hold_out

Arrays = tuple[Any, Any, Any, Any]  # x_train, y_train, x_test, y_test
Listing = tuple[list[str], list[int]]  # files and their labels
# Means and deviations of the training images' channels, as shares of 255, as in the paper's code.
MOMENTS = {
    "tinyimagenet": ((0.47899, 0.44576, 0.39447), (0.27699, 0.26906, 0.28208)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
LARGER = 8 / 7  # of the side that ImageNet's images are kept with to the one of a crop: 256/224


def fixed_order(samples: int) -> np.ndarray:
    """A shuffled order that is always the same: NumPy promises that for this generator."""
    return np.random.RandomState(0).permutation(samples)


def imagefolder(path: Path, size: int) -> Arrays:
    """The images path/train/CLASS/IMAGE and path/test/CLASS/IMAGE, resized to `size` a side."""
    train, test = _class_folders(f"imagefolder:{path}", path, "test")
    return _arrays(train, test, size)


def tinyimagenet(path: Path, size: int) -> Arrays:
    """TinyImageNet as it is unpacked, 64 pixels a side unless resized; tested on its "val".

    That is path/train/CLASS/images/IMAGE, and path/val/images with the classes in
    path/val/val_annotations.txt.
    """
    spec = f"tinyimagenet:{path}"
    classes = _classes(spec, path / "train", "<class>/images/<image>")
    train = [
        (str(file), label)
        for label, name in enumerate(classes)
        for file in sorted((path / "train" / name / "images").glob("*"))
    ]
    listed = path / "val" / "val_annotations.txt"
    labels = {name: label for label, name in enumerate(classes)}
    try:
        rows = [line.split("\t")[:2] for line in read_bytes(listed).decode().splitlines()]
        test = [(str(path / "val" / "images" / file), labels[name]) for file, name in rows]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"--data {spec}: expected {listed}, with a file's name and its class, one of those in "
            f"{path / 'train'}, in every line: {error!r}"
        ) from error
    if not train or not test:
        raise DataError(f"--data {spec}: there are no images in {path}/train/<class>/images")
    return _arrays(_listing(train), _listing(test), size)


def imagenet(path: Path, size: int, samples: int | None, validation: float = 0.0) -> Data:
    """ImageNet, path/train/CLASS/IMAGE and path/val/CLASS/IMAGE, decoded once into mapped files.

    They keep the square in the middle of each image with its shorter side at 8/7·size: for crops of
    224 pixels 256, so 196,608 bytes an image, 252 GB for all of ImageNet's training images, and
    hours of decoding. What a random crop could have seen beside that square is lost. The first
    `samples` training images are kept, of those that are not held out for `validation`.
    """
    spec, side = f"imagenet:{path}", round(LARGER * size)
    (files, labels), test = _class_folders(spec, path, "val")
    order, parts = fixed_order(len(files)), hold_out(len(files), validation, samples, spec)
    train, *held = [
        ([files[i] for i in order[part]], [labels[i] for i in order[part]])
        for part in parts
        if len(part)
    ]
    moments = channel_moments(MOMENTS["imagenet"], 2)
    splits = []
    for listed, targets in (train, test, *held):
        x, digest = mapped_pixels(listed, side, f"--data {spec}")
        y = torch.as_tensor(targets)
        splits.append(Split(torch.from_numpy(x), y, *moments, crop=size, digest=digest))
    return Data(*splits[:2], max(labels) + 1, *splits[2:])


def _class_folders(spec: str, path: Path, test_part: str) -> tuple[Listing, Listing]:
    """The files of training and test images and their labels; both have to have all classes."""
    datasets = require(f"--data {spec}", "torchvision", "torchvision.datasets")
    folders = []
    for part in ("train", test_part):
        try:
            folders.append(datasets.ImageFolder(str(path / part)))
        except OSError as error:
            raise DataError(
                f"--data {spec}: expected images as {path / part}/<class>/<image>: {error}"
            ) from error
    train, test = folders
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(
            f"--data {spec}: train and {test_part} have different classes; only one of them has "
            f"{', '.join(odd)}"
        )
    return _listing(train.samples), _listing(test.samples)


def _classes(spec: str, folder: Path, layout: str) -> list[str]:
    try:
        found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    except OSError as error:
        raise DataError(f"--data {spec}: expected images as {folder}/{layout}: {error}") from error
    if not found:
        raise DataError(f"--data {spec}: expected images as {folder}/{layout}: it has no folders")
    return found


def _listing(samples: list[tuple[str, int]]) -> Listing:
    return [file for file, _ in samples], [label for _, label in samples]


def _arrays(train: Listing, test: Listing, size: int) -> Arrays:
    x_train, x_test = (pixels(files, size) for files, _ in (train, test))
    order = fixed_order(len(x_train))
    return x_train[order], np.asarray(train[1])[order], x_test, np.asarray(test[1])
