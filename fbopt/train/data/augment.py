"""Random crops and flips of images, made on the device when a chunk is read and never stored, and
what policies change beside them.

Each is a function of (seed, draw, sample) alone, where the draw is the number of the pass (new
crops in every pass) or of the replica (a fixed, enlarged data set: Geiping et al., arXiv
2109.14119, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fbopt._random import mix
from fbopt.train.config.options import Options, OptionsError, flag
from fbopt.train.data.dataset import Split
from fbopt.train.data.policy import Policy
from fbopt.train.data.resized_crop import Windows, draw_windows, middle_windows, resized_crop
from fbopt.train.data.rng import CROPS, POLICY, below, hashed

PADDING = 4


def crop_and_flip(
    x: Tensor, rows: Tensor, columns: Tensor, flips: Tensor, padding: int = PADDING
) -> Tensor:
    """Crop images to their own size after padding them with zeros, and mirror some.

    Image i becomes padded[rows[i] : rows[i] + height, columns[i] : columns[i] + width], mirrored
    from left to right where flips[i] is 1.

    Args:
        x: images (n, channels, height, width) of any dtype, with black at 0.
        rows: int64 (n,) from 0 to twice `padding`.
        columns: the same.
        flips: int64 (n,), 0 or 1.
        padding: the width of the black border.

    Returns:
        A tensor like `x`, its channels last in memory.
    """
    count, channels, height, width = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, *(padding,) * 4))
    image = torch.arange(count, device=x.device)
    row = rows[:, None] + torch.arange(height, device=x.device)
    place = torch.arange(width, device=x.device)
    column = columns[:, None] + torch.where(flips[:, None] == 1, width - 1 - place, place)
    line = (image[:, None] * padded.shape[1] + row) * padded.shape[2]
    pixels = (line[:, :, None] + column[:, None, :]).flatten()
    # One index of whole pixels: three of them, for image, row and column, are slower on CPUs.
    seen = padded.reshape(-1, channels).index_select(0, pixels)
    return seen.view(count, height, width, channels).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Augmented:
    """A split whose images are cropped and flipped when they are read.

    Without `replicas` every pass draws anew. With R replicas there are R·N samples, sample i of
    replica r at position r·N + i, the same in every pass; or, with `one_replica_per_pass`, N
    samples, those of replica p mod R in pass p. With `clean` replica 0 is the original images.
    With V `views` every sample comes V times in a row, from draws V·p to V·p + V − 1 in pass p.
    A split that is read in part is cut by random resized crops, others after a border of `padding`.
    """

    split: Split
    key: int
    replicas: int | None = None
    one_replica_per_pass: bool = False
    clean: bool = False
    views: int = 1
    padding: int = PADDING
    policy: Policy | None = None

    def __len__(self) -> int:
        copies = 1 if self.replicas is None or self.one_replica_per_pass else self.replicas
        return len(self.split) * copies

    @property
    def device(self) -> torch.device:
        """Where the samples live."""
        return self.split.device

    def batch(self, index: slice | Tensor, pass_number: int = 0) -> tuple[Tensor, Tensor]:
        """The samples and int64 labels at `index` in a pass, the views of each in a row."""
        if isinstance(index, slice):
            index = torch.arange(*index.indices(len(self)), device=self.device)
        sample = index % len(self.split)
        if self.replicas is None:
            sample = sample.repeat_interleave(self.views)  # the same number for each: no host sync
            view = torch.arange(len(sample), device=self.device) % self.views
            draw = pass_number * self.views + view
        elif self.one_replica_per_pass:
            draw = torch.full_like(sample, pass_number % self.replicas)
        else:
            draw = index // len(self.split)
        x = self._cropped(self.split.stored(sample), draw, sample)
        if self.policy is not None:
            changed = self.policy(x, draw, sample)
            kept = draw == 0 if self.clean else torch.zeros_like(draw, dtype=torch.bool)
            x = torch.where(kept[:, None, None, None], x, changed)
        if not self.split.x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous()
        return self.split.normalised(x), self.split.y[sample]

    def _cropped(self, x: Tensor, draw: Tensor, sample: Tensor) -> Tensor:
        size, side = self.split.crop, x.shape[-1]
        if size is None:
            return crop_and_flip(x, *self._window(draw, sample), self.padding)
        windows = draw_windows(side, self.key, draw, sample)
        if self.clean:
            originals = middle_windows(side, size, draw)
            pairs = zip(originals, windows, strict=True)
            windows = Windows(*(torch.where(draw == 0, o, w) for o, w in pairs))
        return resized_crop(x, windows, size)

    def _window(self, draw: Tensor, sample: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row and column, each 0 … 2·padding, and whether to flip; the image itself is in the
        middle.
        """
        bits = hashed(self.key, draw, sample)
        places = 2 * self.padding + 1
        window = below(places, bits), below(places, bits, 31), (bits >> 62) & 1
        if not self.clean:
            return window
        original = (self.padding, self.padding, 0)
        return tuple(torch.where(draw == 0, o, w) for o, w in zip(original, window, strict=True))


def augmented(
    split: Split, options: Options, one_replica_per_pass: bool = False
) -> Split | Augmented:
    """The training split as resolved options augment it; nothing is stored beside `split`.

    Raises OptionsError for samples that are not images, which `--tta flip` cannot mirror either.
    """
    for name in ("augment", "tta"):
        if split.x.ndim != 4 and (value := getattr(options, name)) != "none":
            raise OptionsError(
                f"{flag(name)} {value} is for images, not for samples of shape "
                f"{tuple(split.x.shape[1:])}; leave it out, or choose a recipe without it"
            )
    if options.augment == "none":
        return split
    return Augmented(
        split,
        mix(options.seed, CROPS),
        options.replicas,
        one_replica_per_pass,
        options.with_clean,
        options.max_up,
        PADDING if options.padding is None else options.padding,
        _policy(split, options),
    )


def _policy(split: Split, options: Options) -> Policy | None:
    if options.augment_policy == "none":
        return None
    if split.x.dtype != torch.uint8 or split.shape[0] not in (1, 3):
        raise OptionsError(
            f"--augment-policy {options.augment_policy} is for images of bytes in 1 or 3 channels, "
            f"not for {split.x.dtype} {split.shape}; leave it out"
        )
    return Policy(options.augment_policy, mix(options.seed, POLICY))


def describe_sampling(options: Options) -> str:
    """Chunks and augmentation of resolved options in words; "" for the usual ones."""
    order = {"fixed": "in fixed order", "replacement": "drawn with replacement"}
    usual = "shuffled" if options.stochastic else "fixed"
    parts = [] if options.chunks == usual else [order.get(options.chunks, options.chunks)]
    parts += [] if options.augment_policy == "none" else [options.augment_policy]
    if options.augment == "random":
        parts.append("new crops and flips in every pass")
    elif options.augment == "fixed":
        first = ", the first as it is" if options.with_clean else ""
        turns = ", one an epoch" if options.stochastic else ""
        parts.append(f"{options.replicas} fixed crops and flips of each{first}{turns}")
    return "".join(f", {part}" for part in parts)
