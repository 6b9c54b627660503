"""RandAugment and TrivialAugment of torchvision, each image with draws of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fbopt._random import mix
from fbopt.train.config.dataspec import require

NAMES = {"randaugment": "RandAugment", "trivialaugment": "TrivialAugmentWide"}


class Policy:
    """Changes uint8 images as a policy says, as a function of (key, draw, sample) alone.

    RandAugment (Cubuk et al. 2019, arXiv 1909.13719) is torchvision's with its defaults, two
    operations of magnitude 9; TrivialAugment (Müller & Hutter 2021, arXiv 2103.10158) its
    TrivialAugmentWide. They draw from torch's generator, which is seeded for each image and then
    put back. Images go one by one, on their device, and their numbers are read from it once.

    Args:
        name: "randaugment" or "trivialaugment".
        key: of the draws, from `mix`.
    """

    def __init__(self, name: str, key: int) -> None:
        option = f"--augment-policy {name}"
        transforms = require(option, "torchvision", "torchvision.transforms.v2")
        self.key, self._change = key, getattr(transforms, NAMES[name])()

    def __call__(self, x: Tensor, draw: Tensor, sample: Tensor) -> Tensor:
        """The changed images, as large as `x` (n, channels, height, width) and in its layout.

        Args:
            x: uint8, of 1 or 3 channels.
            draw: int64 (n,), the pass or replica of each.
            sample: int64 (n,), whose image it is.
        """
        found = torch.empty_like(x)
        numbers = torch.stack([draw, sample], 1).tolist()
        with _generator_put_back() as generator:
            for image, place, key in zip(x, found, numbers, strict=True):
                generator.manual_seed(mix(self.key, *key))
                place.copy_(self._change(image))
        return found


@contextmanager
def _generator_put_back() -> Iterator[torch.Generator]:
    generator = torch.default_generator
    state = generator.get_state()
    try:
        yield generator
    finally:
        generator.set_state(state)
