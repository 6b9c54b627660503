"""A data set as tensors that live on the training device: no loader, no copy per step.

Images stay uint8 and are normalised chunk by chunk, with published constants or the training set's
mean and standard deviation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fbopt.train.config.dataspec import DataError
from fbopt.train.data.rng import epoch_order, replacements
from fbopt.train.data.validation import hold_out

if TYPE_CHECKING:
    from fbopt.train.data.augment import Augmented


MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class Split:
    """Samples `x` (N, channels, *space), uint8, float32 or float64, and labels `y` (N,), int64.

    A uint8 `x` is read as (x − mean)/std, both float32 or float64 and broadcast against samples.
    With `crop`, of images its square of that side in the middle. `digest` is a SHA-256 of the
    samples in a mapped file, which need not be in memory: where they do not fit on the device, they
    stay on the CPU and only what is read is copied.
    """

    x: Tensor
    y: Tensor
    mean: Tensor | None = None
    std: Tensor | None = None
    crop: int | None = None
    digest: str | None = None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def device(self) -> torch.device:
        """Where samples are read to, and the labels live."""
        return self.y.device

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample as it is read."""
        return tuple(self.x.shape[1:]) if self.crop is None else (self.x.shape[1], *[self.crop] * 2)

    def stored(self, index: slice | Tensor) -> Tensor:
        """The samples at `index` as they are stored, uncropped, on the device."""
        if self.x.device == self.device:
            return self.x[index]
        found = self.x[index if isinstance(index, slice) else index.to(self.x.device)]
        return found.to(self.device)

    def batch(self, index: slice | Tensor, pass_number: int = 0) -> tuple[Tensor, Tensor]:
        """The samples and int64 labels at `index`: a slice, or int64 positions.

        They are the same in every pass; those of `Augmented` may not be.
        """
        x = self.stored(index)
        if self.crop is not None:
            top, left = ((side - self.crop) // 2 for side in x.shape[2:])
            x = x[:, :, top : top + self.crop, left : left + self.crop]
        return self.normalised(x), self.y[index]

    def normalised(self, x: Tensor) -> Tensor:
        """Samples like `self.x`, of any number, as the model reads them."""
        if self.mean is None:
            return x
        return x.to(self.mean.dtype).sub_(self.mean).div_(self.std)  # of uint8, so to() is a copy

    def to(
        self,
        device: torch.device | str,
        channels_last: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> Split:
        """The same samples on `device`, images with their channels last in memory or not.

        What is not of integers becomes `dtype`. A mapped file's samples stay in it where they
        would take more than half of the device's free memory.
        """
        stays = self.digest is not None and not _fits(self.x, torch.device(device))
        x = self.x if stays else _moved(self.x, device, dtype)
        moments = [m if m is None else _moved(m, device, dtype) for m in (self.mean, self.std)]
        if x.ndim == 4 and channels_last:  # about 15 % faster, also on CPUs
            last = {"memory_format": torch.channels_last}
            x = x.contiguous(**last)
            # As large as an image: loops over three numbers in turn are not vectorised.
            image = (1, *self.shape)
            moments = [m if m is None else m.expand(image).contiguous(**last) for m in moments]
        return replace(self, x=x, y=self.y.to(device), mean=moments[0], std=moments[1])


def _moved(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def _fits(x: Tensor, device: torch.device) -> bool:
    """Whether samples fit on a device beside what training needs; a CPU maps them."""
    return device.type != "cuda" or x.nbytes <= torch.cuda.mem_get_info(device)[0] // 2


@dataclass(frozen=True)
class Chunks:
    """A split, `size` samples at a time, the last chunk ragged; can be iterated again and again.

    Chunk i of a pass holds the samples from i·size on, in an order that `sampling` names: "fixed",
    the split's own; "shuffled", a new one every pass; "replacement", draws with replacement, as
    many as there are samples. It is a function of `seed` and the pass, whose number
    `current_pass()` returns.

    `order` lists the chunks in the order of visit, by default 0, 1, …; `before_chunk(i)` is called
    before chunk i is yielded. The chunks are dealt out in that order, `group` at a time: a rank
    takes every `world_size`-th group, beginning at its `rank`. `drop_last` leaves a ragged last
    chunk out.
    """

    split: Split | Augmented
    size: int
    order: Sequence[int] | None = None
    before_chunk: Callable[[int], None] | None = None
    sampling: str = "fixed"
    seed: int = 0
    current_pass: Callable[[], int] = lambda: 0
    rank: int = 0
    world_size: int = 1
    group: int = 1
    drop_last: bool = False

    def __len__(self) -> int:
        return len(self.split) // self.size if self.drop_last else -(-len(self.split) // self.size)

    @property
    def samples(self) -> int:
        """How many samples a pass visits."""
        return len(self) * self.size if self.drop_last else len(self.split)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in self.dealt():
            if self.before_chunk is not None:
                self.before_chunk(index)
            yield self[index]

    @property
    def groups(self) -> int:
        """How many groups there are to deal out."""
        return -(-len(self) // self.group)

    def dealt(self) -> Iterator[int]:
        """The chunks of this rank, in the order of visit."""
        order = range(len(self)) if self.order is None else self.order
        for first in range(self.rank * self.group, len(order), self.world_size * self.group):
            yield from order[first : first + self.group]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The samples and labels of chunk `index` in the current pass."""
        if not 0 <= index < len(self):
            raise IndexError(f"chunk {index} of {len(self)}")
        number = self.current_pass()
        positions = slice(index * self.size, (index + 1) * self.size)
        if self.sampling != "fixed":
            draw = epoch_order if self.sampling == "shuffled" else replacements
            positions = draw(len(self.split), self.seed, number, self.split.device)[positions]
        return self.split.batch(positions, number)


@dataclass(frozen=True)
class Data:
    """A training and a test split with labels 0 … classes − 1, and one to choose by if held out."""

    train: Split
    test: Split
    classes: int
    validation: Split | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample: (channels, length) or (channels, height, width)."""
        return self.test.shape

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that there are."""
        return (self.train, self.test, *([] if self.validation is None else [self.validation]))

    def to(
        self,
        device: torch.device | str,
        channels_last: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> Data:
        """All splits on `device`."""
        moved = [split.to(device, channels_last, dtype) for split in self.splits]
        return Data(*moved[:2], self.classes, *moved[2:])

    def sha256(self) -> str:
        """A digest of every sample and label, by which a resumed run recognises its data."""
        digest = hashlib.sha256()
        if self.train.digest is None:
            return sha256(*(t for split in self.splits for t in (split.x, split.y)))
        for split in self.splits:  # of the mapped samples, which are not all read for this
            digest.update(f"{split.digest} {sha256(split.y)} {split.crop}\n".encode())
        return digest.hexdigest()


def sha256(*tensors: Tensor) -> str:
    """The digest of tensors' dtypes, shapes and values, for any device and memory layout."""
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(str((plain.dtype, tuple(plain.shape))).encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def from_arrays(
    x_train,
    y_train,
    x_test,
    y_test,
    name: str,
    moments=None,
    samples: int | None = None,
    validation: float = 0.0,
) -> Data:
    """Check four arrays and make them a data set. Raises DataError, naming the array at fault.

    x is (N, length), (N, channels, length) or (N, channels, height, width): uint8 is normalised,
    anything else is converted to float32 and taken as it is. y is (N,) of integers from 0. The
    share `validation` of the training samples is held out; of the others the first `samples` are
    kept, by default all. `moments` are the channels' means and standard deviations as shares of
    255, by default those of the samples that are kept.
    """
    x_train, y_train = _check(x_train, y_train, f"{name}: x_train", f"{name}: y_train")
    x_test, y_test = _check(x_test, y_test, f"{name}: x_test", f"{name}: y_test")
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        raise DataError(
            f"{name}: x_test has samples of {x_test.dtype} {list(x_test.shape[1:])}, "
            f"x_train of {x_train.dtype} {list(x_train.shape[1:])}; they have to agree"
        )
    classes = int(y_train.max()) + 1
    if int(y_test.max()) >= classes:
        raise DataError(
            f"{name}: y_test has the label {int(y_test.max())}, but y_train only has "
            f"0 … {classes - 1}"
        )
    kept, held = hold_out(len(y_train), validation, samples, name)
    validating = [(x_train[held], y_train[held])] if len(held) else []
    if len(kept) < len(y_train):  # else not copied
        x_train, y_train = x_train[kept], y_train[kept]
    pairs = [(x_train, y_train), (x_test, y_test), *validating]
    mean = std = None
    if x_train.dtype == torch.uint8:
        mean, std = channel_moments(moments, x_train.ndim - 2, x_train)
    train, test, *held_out = (Split(x, y, mean, std) for x, y in pairs)
    return Data(train, test, classes, *held_out)


def _check(x, y, x_name: str, y_name: str) -> tuple[Tensor, Tensor]:
    x, y = np.asarray(x), np.asarray(y)
    if x.dtype.kind not in "fiub" or x.ndim not in (2, 3, 4) or x.size == 0:
        raise DataError(
            f"{x_name} is {x.dtype} {list(x.shape)}; it has to be real numbers "
            "(N, length), (N, channels, length) or (N, channels, height, width)"
        )
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise DataError(
            f"{y_name} is {y.dtype} {list(y.shape)}; it has to be {len(x)} integer "
            f"labels, [{len(x)}], one for each row of x"
        )
    if y.min() < 0:
        raise DataError(f"{y_name} has the label {y.min()}; labels count from 0")
    if y.max() >= MOST_CLASSES:
        raise DataError(
            f"{y_name} has the label {y.max()}; labels count from 0 to the number of classes less "
            f"one, and there can be {MOST_CLASSES:,} classes"
        )
    x = torch.from_numpy(np.ascontiguousarray(x if x.dtype == np.uint8 else x.astype(np.float32)))
    if not torch.isfinite(x).all():
        raise DataError(f"{x_name} has infinite or undefined values; remove or replace them")
    return (x[:, None] if x.ndim == 2 else x), torch.from_numpy(y.astype(np.int64))


def channel_moments(moments: Any, dimensions: int, x: Tensor | None = None) -> Tensor:
    """Means and deviations for bytes: float32 (2, channels, 1, …), with so many `dimensions` of 1.

    `moments` are shares of 255; None: those of `x`.
    """
    measured = _moments(x) if moments is None else np.multiply(moments, 255.0)
    return torch.as_tensor(measured).float().view(2, -1, *[1] * dimensions)


def _moments(x: Tensor) -> Tensor:
    """Means and standard deviations of the channels of a uint8 tensor: float64 (2, channels)."""
    others = [d for d in range(x.ndim) if d != 1]
    total = squares = torch.zeros(x.shape[1], dtype=torch.float64)
    for part in x.split(1024):  # a copy of the whole set in float64 would be eight times as large
        part = part.double()
        total, squares = total + part.sum(others), squares + part.square().sum(others)
    mean = total / (x.numel() / x.shape[1])
    std = (squares / (x.numel() / x.shape[1]) - mean.square()).clamp_min(0).sqrt()
    std[std == 0] = 1
    return torch.stack([mean, std])
