"""Random resized crops: a window of random area and aspect ratio, resized to a square.

area/side² uniform in [0.08, 1], log(width/height) uniform in [log 3/4, log 4/3]: ten tries for a
window within the image (Szegedy et al. 2015, arXiv 1409.4842, section 6; drawn as in torchvision).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fbopt.train.data.rng import below, hashed

SCALE, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
_WHOLE = 2**31  # below(2**31, bits): all of the 31 bits


class Windows(NamedTuple):
    """Parts of n images, int64 (n,) each: upper left corner and size in pixels, 1 to mirror."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor


def draw_windows(side: int, key: int, draw: Tensor, sample: Tensor) -> Windows:
    """The windows of square images: a function of (key, draw, sample), the same on any device."""
    tries = torch.arange(TRIES, device=draw.device)
    bits = hashed(key, draw[:, None], sample[:, None], tries)
    share, position = (below(_WHOLE, bits, start).double() / _WHOLE for start in (0, 31))
    area = side**2 * (SCALE[0] + share * (SCALE[1] - SCALE[0]))
    low, high = (math.log(ratio) for ratio in RATIO)
    ratio = (low + position * (high - low)).exp()
    width, height = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (width > 0) & (width <= side) & (height > 0) & (height <= side)
    first = fits.long().argmax(1, keepdim=True)
    width, height = (  # the whole image, should none fit
        torch.where(fits.any(1), size.gather(1, first)[:, 0], side) for size in (width, height)
    )
    bits = hashed(key, draw, sample, torch.full_like(draw, TRIES))
    top, left = below(side - height + 1, bits), below(side - width + 1, bits, 31)
    return Windows(top, left, height, width, (bits >> 62) & 1)


def middle_windows(side: int, crop: int, like: Tensor) -> Windows:
    """The square of `crop` pixels in the middle of each image, as many as `like` has elements."""
    corner = torch.full_like(like, (side - crop) // 2)
    size = torch.full_like(like, crop)
    return Windows(corner, corner, size, size, torch.zeros_like(like))


def resized_crop(x: Tensor, windows: Windows, size: int) -> Tensor:
    """Cut the windows out of images, resize them to `size` a side, and mirror some.

    Bilinear and without antialiasing: a window is at most 8/7 as large as the result.

    Args:
        x: uint8 images (n, channels, height, width).
        windows: the parts.
        size: in pixels.

    Returns:
        uint8 (n, channels, size, size), channels last in memory, rounded to the nearest.
    """
    count, channels, height, width = x.shape
    rows = _places(windows.top, windows.height, size)
    place = torch.arange(size, device=x.device)
    mirrored = torch.where(windows.flip[:, None] == 1, size - 1 - place, place)
    columns = [c.gather(1, mirrored) for c in _places(windows.left, windows.width, size)]
    first = torch.arange(count, device=x.device)[:, None] * height
    pixels = x.permute(0, 2, 3, 1).reshape(-1, channels)

    def seen(row: Tensor, column: Tensor) -> Tensor:
        # One index of whole pixels, as in crop_and_flip.
        index = ((first + row) * width)[:, :, None] + column[:, None, :]
        return pixels.index_select(0, index.flatten()).view(count, size, size, channels).float()

    across, down = columns[2].float()[:, None, :, None], rows[2].float()[:, :, None, None]
    upper, lower = (seen(row, columns[0]).lerp_(seen(row, columns[1]), across) for row in rows[:2])
    return upper.lerp_(lower, down).round_().to(torch.uint8).permute(0, 3, 1, 2)


def _places(start: Tensor, length: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where pixels of the result lie: two pixels beside each other, and the second one's weight.

    Pixel i is at start + (i + 1/2)·length/size − 1/2, and never outside the window.
    """
    pixel = torch.arange(size, device=start.device) + 0.5
    place = (pixel * (length[:, None] / size) - 0.5).clamp_min(0)
    low = torch.minimum(place.floor().long(), length[:, None] - 1)
    high = torch.minimum(low + 1, length[:, None] - 1)
    return start[:, None] + low, start[:, None] + high, place - low
