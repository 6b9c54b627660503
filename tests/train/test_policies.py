"""Random resized crops and policies: against torchvision, and that draws belong to an image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.resolve import resolve
from fbopt.train.data.augment import Augmented, augmented
from fbopt.train.data.dataset import Chunks, Split, from_arrays
from fbopt.train.data.policy import Policy
from fbopt.train.data.resized_crop import (
    TRIES,
    Windows,
    draw_windows,
    middle_windows,
    resized_crop,
)
from fbopt.train.data.rng import hashed
from fbopt.train.reporting.describe import describe_sampling

functional = pytest.importorskip("torchvision.transforms.v2.functional")


def images(count: int = 20, channels: int = 3, side: int = 16, crop: int | None = None) -> Split:
    rng = np.random.default_rng(count)
    x = rng.integers(1, 256, (count, channels, side, side)).astype(np.uint8)
    split = from_arrays(x, np.arange(count) % 5, x[:5], np.arange(5), "test").train
    return replace(split, crop=crop).to("cpu")


# --- random resized crops -------------------------------------------------------------------------


def test_windows_are_torchvisions():
    """The draws turned into windows one by one, as RandomResizedCrop.get_params does."""
    sample, draw, side = torch.arange(300), torch.full((300,), 4), 40
    windows = draw_windows(side, 9, draw, sample)
    uniform = lambda bits, start: ((int(bits) >> start) & (2**31 - 1)) / 2**31  # noqa: E731
    seen = 0
    for i in range(300):
        for attempt in range(TRIES):
            bits = hashed(9, draw[i], sample[i], torch.tensor(attempt))
            area = side**2 * (0.08 + 0.92 * uniform(bits, 0))
            ratio = np.exp(np.log(3 / 4) + uniform(bits, 31) * np.log(16 / 9))
            width, height = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if 0 < width <= side and 0 < height <= side:
                break
            seen += 1
        assert (int(windows.width[i]), int(windows.height[i])) == (width, height)
        bits = hashed(9, draw[i], sample[i], torch.tensor(TRIES))
        corner = [int(uniform(bits, k) * (side - s + 1)) for k, s in ((0, height), (31, width))]
        assert [int(windows.top[i]), int(windows.left[i])] == corner
        assert int(windows.flip[i]) == (int(bits) >> 62) & 1
    assert seen  # of large areas some did not fit
    assert 100 < int(windows.flip.sum()) < 200


@pytest.mark.parametrize("size", [14, 28])
def test_resized_crops_are_torchvisions(size):
    """Its bilinear interpolation of the same windows, without antialiasing, rounded."""
    x = images(40, side=32).x
    windows = draw_windows(32, 3, torch.zeros(40, dtype=torch.int64), torch.arange(40))
    made = resized_crop(x, windows, size)
    assert made.dtype == torch.uint8 and made.shape == (40, 3, size, size)
    assert made.is_contiguous(memory_format=torch.channels_last)
    for i, (top, left, height, width, flip) in enumerate(torch.stack(windows, 1).tolist()):
        expected = functional.resized_crop(
            x[i].float(), top, left, height, width, [size, size], antialias=False
        )
        expected = expected.flip(-1) if flip else expected
        assert (made[i].float() - expected).abs().max() <= 0.51


def test_the_middle_is_not_resized():
    x, four = images(side=16).x, torch.arange(20)
    assert torch.equal(resized_crop(x, middle_windows(16, 12, four), 12), x[:, :, 2:14, 2:14])
    windows = Windows(*middle_windows(16, 12, four)[:4], torch.ones_like(four))
    assert torch.equal(resized_crop(x, windows, 12), x[:, :, 2:14, 2:14].flip(-1))


def test_crops_belong_to_pass_and_sample():
    view = augmented(images(crop=14), resolve(Options(augment="random")))
    whole = [view.batch(slice(None), number)[0] for number in (0, 1, 0)]
    assert torch.equal(whole[0], whole[2]) and not torch.equal(whole[0], whole[1])
    positions = torch.tensor([7, 3, 3])
    assert torch.equal(view.batch(positions, 1)[0], whole[1][positions])
    fixed = augmented(images(crop=14), resolve(Options(augment="fixed", with_clean=True)))
    x = fixed.batch(slice(None))[0]
    assert torch.equal(x[:20], images(crop=14).batch(slice(None))[0])
    assert not torch.equal(x[20:40], x[:20])


# --- policies -------------------------------------------------------------------------------------

POLICIES = ("randaugment", "trivialaugment")


def view_of(policy: str, split: Split | None = None, **changes) -> Augmented:
    wanted = {"augment": "random", **changes}
    options = resolve(Options(augment_policy=policy, **wanted))
    return augmented(images() if split is None else split, options)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_has_draws_of_its_own(policy, channels):
    """The same in any chunk, order and process; new in every pass; torch's generator as it was."""
    view = view_of(policy, images(channels=channels))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    whole = [view.batch(slice(None), number)[0] for number in (0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    for rank in (0, 1):
        chunks = Chunks(view, 3, rank=rank, world_size=2, current_pass=lambda: 1)
        for index, (x, _) in zip(chunks.dealt(), chunks, strict=True):
            assert torch.equal(x, whole[1][3 * index : 3 * index + 3])
    positions = torch.tensor([11, 4])
    assert torch.equal(view.batch(positions, 0)[0], whole[0][positions])
    assert not torch.equal(*whole)
    plain = replace(view, policy=None).batch(slice(None), 0)[0]
    changed = [not torch.equal(a, b) for a, b in zip(whole[0], plain, strict=True)]
    assert sum(changed) > 10  # some draw the identity
    other = view_of(policy, images(channels=channels), seed=1)
    assert not torch.equal(other.batch(slice(None), 0)[0], whole[0])


@pytest.mark.parametrize("policy", POLICIES)
def test_images_are_changed_as_torchvision_does(policy):
    from torchvision.transforms import v2

    from fbopt._random import mix

    x, draw, sample = images().x, torch.full((20,), 2), torch.arange(20)
    made = Policy(policy, 17)(x, draw, sample)
    transform = {"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}[policy]()
    for i in range(20):
        torch.manual_seed(mix(17, 2, i))
        assert torch.equal(made[i], transform(x[i]))


def test_the_clean_replica_is_left_alone():
    view = view_of("trivialaugment", augment="fixed", replicas=2, with_clean=True)
    x = view.batch(slice(None))[0]
    assert torch.equal(x[:20], images().batch(slice(None))[0]) and not torch.equal(x[20:], x[:20])


def test_policies_after_resized_crops_and_in_views():
    view = view_of("randaugment", images(crop=14), max_up=2)
    x = view.batch(slice(None), 3)[0]
    assert x.shape == (40, 3, 14, 14) and x.dtype == torch.float32
    single = replace(view, views=1)
    assert torch.equal(x[1::2], single.batch(slice(None), 7)[0])


def test_policies_are_for_bytes():
    floats = Split(torch.zeros(3, 3, 8, 8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(OptionsError, match="--augment-policy randaugment is for images of bytes"):
        view_of("randaugment", floats)
    with pytest.raises(OptionsError, match=r"not for torch.uint8 \(2, 16, 16\)"):
        view_of("randaugment", images(channels=2))


def test_policies_are_described():
    options = resolve(Options(augment="random", augment_policy="randaugment"))
    assert "randaugment" in describe_sampling(options)


@pytest.mark.parametrize("padding", [0, 2, 8])
def test_the_border_of_a_crop(padding):
    """Crops come from the image with so many black pixels around it: 0 leaves the image."""
    view = view_of("none", padding=padding)
    rows, columns, _ = view._window(torch.zeros(20, dtype=torch.int64), torch.arange(20))
    assert max(rows.max(), columns.max()) <= 2 * padding
    assert padding == 0 or len(rows.unique()) > padding
    plain, x = images().batch(slice(None))[0], view.batch(slice(None))[0]
    same = [torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in zip(x, plain, strict=True)]
    assert all(same) == (padding == 0)
