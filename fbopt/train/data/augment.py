"""Random crops and flips of images, made on the device when a chunk is built and never stored.

Each is a function of (seed, draw, sample) alone, where the draw is the number of the pass (a new
one every time) or of the replica (a fixed, enlarged data set: Geiping et al., arXiv 2109.14119,
section 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fbopt._random import mix
from fbopt.train.config.options import Options, OptionsError, flag
from fbopt.train.data.dataset import Split
from fbopt.train.data.rng import CROPS, below, hashed

PADDING = 4


def crop_and_flip(x: Tensor, rows: Tensor, columns: Tensor, flips: Tensor) -> Tensor:
    """Images as seen through a window of their own size, moved over a border of zeros.

    Image i becomes padded[rows[i] : rows[i] + height, columns[i] : columns[i] + width], mirrored
    from left to right where flips[i] is 1.

    Args:
        x: images (n, channels, height, width) of any dtype, with black at 0.
        rows: int64 (n,) from 0 to twice `PADDING`.
        columns: the same.
        flips: int64 (n,), 0 or 1.

    Returns:
        A tensor like `x`, its channels last in memory.
    """
    count, channels, height, width = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, *(PADDING,) * 4))
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
    """A split whose images are cropped and flipped as they are asked for.

    Without `replicas` every pass draws anew. With R replicas there are R·N samples, sample i of
    replica r at position r·N + i, the same in every pass; or, `in_turn`, N samples, those of
    replica p mod R in pass p. With `clean` replica 0 is the images as they are.
    """

    split: Split
    key: int
    replicas: int | None = None
    in_turn: bool = False
    clean: bool = False

    def __len__(self) -> int:
        return len(self.split) * (1 if self.replicas is None or self.in_turn else self.replicas)

    @property
    def device(self) -> torch.device:
        """Where the samples live."""
        return self.split.device

    def batch(self, index: slice | Tensor, number: int = 0) -> tuple[Tensor, Tensor]:
        """The float32 samples and int64 labels at `index` in pass `number`."""
        if isinstance(index, slice):
            index = torch.arange(*index.indices(len(self)), device=self.device)
        sample = index % len(self.split)
        if self.replicas is None:
            draw = torch.full_like(sample, number)
        elif self.in_turn:
            draw = torch.full_like(sample, number % self.replicas)
        else:
            draw = index // len(self.split)
        x = crop_and_flip(self.split.x[sample], *self._window(draw, sample))
        if not self.split.x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous()
        return self.split.normalised(x), self.split.y[sample]

    def _window(self, draw: Tensor, sample: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row and column, each 0 … 8, and whether to flip; (4, 4, 0) leaves an image as it is."""
        bits = hashed(self.key, draw, sample)
        places = 2 * PADDING + 1
        window = below(places, bits), below(places, bits, 31), (bits >> 62) & 1
        if not self.clean:
            return window
        same = draw == 0
        still = (PADDING, PADDING, 0)
        return tuple(torch.where(same, s, w) for s, w in zip(still, window, strict=True))


def augmented(split: Split, options: Options, in_turn: bool | None = None) -> Split | Augmented:
    """The training split that resolved options ask for; stores nothing beside `split`.

    `in_turn`: a pass visits one of the fixed replicas, not all of them; by default for sgd. Raises
    OptionsError for samples that are no images, for which `--tta flip` is none either.
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
        replicas=options.replicas,
        in_turn=options.stochastic if in_turn is None else in_turn,
        clean=options.with_clean,
    )


def sampling(options: Options) -> str:
    """How resolved options draw chunks and augment images, in words; "" for what is usual."""
    order = {"fixed": "in fixed order", "replacement": "drawn with replacement"}
    usual = "shuffled" if options.stochastic else "fixed"
    parts = [] if options.chunks == usual else [order.get(options.chunks, options.chunks)]
    if options.augment == "random":
        parts.append("new crops and flips in every pass")
    elif options.augment == "fixed":
        first = ", the first as it is" if options.with_clean else ""
        turns = ", one an epoch" if options.stochastic else ""
        parts.append(f"{options.replicas} fixed crops and flips of each{first}{turns}")
    return "".join(f", {part}" for part in parts)
