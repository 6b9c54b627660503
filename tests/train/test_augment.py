"""Crops and flips: their random draws, their effect on an image, and that nothing is stored."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch

from fbopt._random import mix
from fbopt.train import loop
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.resolve import resolve
from fbopt.train.data.augment import PADDING, Augmented, augmented, crop_and_flip
from fbopt.train.data.dataset import Chunks, Split, from_arrays
from fbopt.train.data.load import load
from fbopt.train.data.rng import REPLACEMENT, below, hashed
from fbopt.train.reporting.describe import describe
from fbopt.train.signals import Interrupted
from fbopt.train.trainer import Trainer

WORD = 2**64


def images(count: int = 37, channels: int = 3, height: int = 10, width: int = 12) -> Split:
    rng = np.random.default_rng(count)
    x = rng.integers(1, 256, (count, channels, height, width)).astype(np.uint8)
    y = np.arange(count) % 5
    return from_arrays(x, y, x[:5], y[:5], "test").train


# --- the draws ------------------------------------------------------------------------------------


def unsigned(bits: torch.Tensor) -> list[int]:
    return [word % WORD for word in bits.tolist()]


def splitmix64(state: int) -> int:
    z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB % WORD
    return z ^ z >> 31


def test_hash_is_splitmix64():
    """The first five numbers of the published generator from the seed 1234567."""
    assert unsigned(hashed(1234567, torch.arange(5))) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("key", [0, 1, mix(0, 1), 2**63 - 1])
def test_hash_against_plain_integers(key):
    first = torch.tensor(
        [0, 1, 5, 2**31, 2**40, 2**62] * 3 + [7]
    )  # an odd length, for the tails of vectorised loops
    second = torch.arange(len(first)) * 1009
    expected = []
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        state = key
        for counter in (a, b):
            state = splitmix64((state + (counter + 1) * 0x9E3779B97F4A7C15) % WORD)
        expected.append(state)
    assert unsigned(hashed(key, first, second)) == expected
    bits = hashed(key, first, second)
    for start in (0, 31):
        fields = [(word >> start & (2**31 - 1)) * 9 >> 31 for word in expected]
        assert below(9, bits, start).tolist() == fields


def chi_square(values: torch.Tensor, cells: int) -> float:
    """Deviations of the counts from equal ones, in standard deviations of the statistic."""
    counts = values.bincount(minlength=cells).double()
    assert len(counts) == cells
    expected = len(values) / cells
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - (cells - 1)) / (2 * (cells - 1)) ** 0.5


@pytest.mark.parametrize("seed", range(4))
def test_windows_are_uniform_and_independent(seed):
    """Joint distribution of row, column and flip, over samples and draws, and of neighbours."""
    view = augmented(images(3), resolve(Options(augment="random", seed=seed)))
    count = 20_000
    numbers, zeros = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    cells = 9 * 9 * 2
    found = []
    for draw, sample in ((zeros, numbers), (numbers, zeros + 1), (numbers % 40, numbers // 40)):
        row, column, flip = view._window(draw, sample)
        joint = (row * 9 + column) * 2 + flip
        found.append(chi_square(joint, cells))
        for left, right in ((joint[:-1], joint[1:]), (joint[:-40], joint[40:])):
            found.append(chi_square(left % 18 * 18 + right % 18, 18 * 18))
            found.append(chi_square(left // 18 * 9 + right // 18, 81))
    assert all(abs(z) < 5 for z in found), found


def test_draws_with_replacement():
    split = Split(torch.zeros(5000, 1, 4), torch.arange(5000))
    chunks = Chunks(split, 128, sampling="replacement", seed=3)
    drawn = torch.cat([y for _, y in chunks])
    assert len(drawn) == 5000 and drawn.min() >= 0 and drawn.max() < 5000
    assert drawn.unique().numel() == pytest.approx(5000 * (1 - np.exp(-1)), rel=0.03)
    assert abs(chi_square(drawn // 50, 100)) < 5
    place = torch.arange(5000)
    bits = hashed(mix(3, REPLACEMENT), torch.zeros_like(place), place)
    assert torch.equal(drawn, (bits & (2**31 - 1)) * 5000 >> 31)


# --- the images -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 8, 8), (3, 9, 14)])
def test_against_pillow(channels, height, width):
    """RandomCrop(padding=4) and RandomHorizontalFlip as torchvision does them, on PIL images."""
    image = pytest.importorskip("PIL.Image")
    operations = pytest.importorskip("PIL.ImageOps")
    split = images(60, channels, height, width)
    view = augmented(split, resolve(Options(augment="random", seed=1)))
    sample = torch.arange(60)
    rows, columns, flips = view._window(torch.full_like(sample, 7), sample)
    made = crop_and_flip(split.x, rows, columns, flips)
    assert made.dtype == torch.uint8 and made.shape == split.x.shape
    assert made.is_contiguous(memory_format=torch.channels_last)
    for i in range(60):
        pixels = split.x[i].permute(1, 2, 0).numpy()
        picture = image.fromarray(pixels if channels == 3 else pixels[:, :, 0])
        picture = operations.expand(picture, PADDING, fill=0)
        left, top = int(columns[i]), int(rows[i])
        picture = picture.crop((left, top, left + width, top + height))
        if flips[i]:
            picture = operations.mirror(picture)
        expected = torch.from_numpy(np.array(picture).reshape(height, width, channels))
        assert torch.equal(made[i], expected.permute(2, 0, 1)), i


def test_the_middle_is_the_image_itself():
    x = images().x
    four = torch.full((len(x),), PADDING)
    assert torch.equal(crop_and_flip(x, four, four, 0 * four), x)
    assert torch.equal(crop_and_flip(x, four, four, 0 * four + 1), x.flip(-1))
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(crop_and_flip(x.to(dtype), four, four, 0 * four), x.to(dtype))


def test_black_is_padded_before_normalising():
    split = images()
    view = augmented(split, resolve(Options(augment="random")))
    x, y = view.batch(slice(0, 37), pass_number=2)
    assert x.dtype == torch.float32 and torch.equal(y, split.y)
    sample = torch.arange(37)
    plain = crop_and_flip(split.x, *view._window(torch.full_like(sample, 2), sample))
    assert (plain == 0).any()  # the images themselves have no black pixel
    assert torch.equal(x, (plain.float() - split.mean) / split.std)


# --- the enlarged data set ------------------------------------------------------------------------


def enlarged(split: Split, replicas: int = 10, **changes) -> Augmented:
    return augmented(split, resolve(Options(augment="fixed", replicas=replicas, **changes)))


def whole(view, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return view.batch(slice(None), number)


def test_replicas_are_the_same_on_every_pass():
    split = images()
    view = enlarged(split)
    assert len(view) == 370
    x, y = whole(view)
    assert torch.equal(y, split.y.repeat(10))
    for number in (0, 1, 1000):
        for size in (1, 7, 37, 64, 370, 1000):
            chunks = Chunks(view, size, current_pass=lambda number=number: number)
            assert torch.equal(torch.cat([x for x, _ in chunks]), x)
    replicas = x.split(37)
    assert not any(torch.equal(a, b) for i, a in enumerate(replicas) for b in replicas[:i])


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_replicas_are_the_same_for_any_order_and_number_of_processes(world):
    view = enlarged(images())
    x, _ = whole(view)
    for sampling in ("fixed", "shuffled", "replacement"):
        chunks = Chunks(view, 16, sampling=sampling, seed=4, current_pass=lambda: 3)
        natural = list(chunks)
        found = {}
        for rank in range(world):
            order = [*range(rank, len(chunks), world)]
            random.Random(rank).shuffle(order)
            own = replace(chunks, split=enlarged(images()), order=order)  # another process's
            found |= dict(zip(order, own, strict=True))
        assert sorted(found) == [*range(len(chunks))]
        for i, (a, b) in enumerate(natural):
            assert torch.equal(found[i][0], a) and torch.equal(found[i][1], b)
        if sampling == "fixed":
            assert torch.equal(torch.cat([a for a, _ in natural]), x)


def test_a_shuffled_pass_has_every_sample_of_every_replica_once():
    view = enlarged(images())
    x, _ = whole(view)
    now = [0]
    chunks = Chunks(view, 64, sampling="shuffled", seed=1, current_pass=lambda: now[0])
    passes = []
    for now[0] in (0, 1, 0):
        passes.append(torch.cat([a for a, _ in chunks]))
        order = lambda t: sorted(row.tobytes() for row in t.contiguous().numpy())  # noqa: E731
        assert order(passes[-1]) == order(x)
    assert torch.equal(passes[0], passes[2]) and not torch.equal(passes[0], passes[1])


def storages(value, seen: dict) -> dict:
    """The bytes of every tensor that can be reached from an object."""
    if isinstance(value, torch.Tensor):
        seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif hasattr(value, "__dict__"):
        for inner in vars(value).values():
            storages(inner, seen)
    return seen


def test_nothing_is_stored():
    split = images()
    bytes_of = lambda view: sum(storages(view, {}).values())  # noqa: E731
    plain = bytes_of(split)
    for replicas in (1, 10, 4000):
        view = enlarged(split, replicas)
        chunks = Chunks(view, 50)
        chunks[0], chunks[len(chunks) - 1]
        assert bytes_of(view) == bytes_of(chunks) == plain
        assert len(view) == replicas * 37


def test_the_clean_replica_is_first():
    split = images()
    x, _ = whole(enlarged(split, 3, with_clean=True))
    assert torch.equal(x[:37], split.batch(slice(None))[0])
    assert torch.equal(x[37:], whole(enlarged(split, 3))[0][37:])
    assert not torch.equal(x[37:74], x[:37])


def test_another_seed_makes_another_data_set():
    split = images()
    assert not torch.equal(whole(enlarged(split))[0], whole(enlarged(split, seed=1))[0])


def test_sgd_visits_one_replica_per_epoch():
    split = images()
    sgd = resolve(Options(augment="fixed", replicas=3, recipe="sgd", with_clean=True))
    turns = augmented(split, sgd, one_replica_per_pass=True)
    replicas = whole(enlarged(split, 3, with_clean=True))[0].split(37)
    assert len(turns) == 37
    for epoch in range(7):
        assert torch.equal(whole(turns, epoch)[0], replicas[epoch % 3])


def test_random_draws_anew_every_pass():
    view = augmented(images(), resolve(Options(augment="random")))
    assert len(view) == 37
    passes = [whole(view, number)[0] for number in (0, 1, 2, 1)]
    assert torch.equal(passes[1], passes[3])
    assert not any(torch.equal(a, b) for i, a in enumerate(passes[:3]) for b in passes[:i])
    positions = torch.tensor([30, 2, 2, 8])
    assert torch.equal(view.batch(positions, 1)[0], passes[1][positions])


def test_chunks_are_counted():
    chunks = Chunks(images(), 10)
    assert [len(y) for _, y in chunks] == [10, 10, 10, 7] and len(chunks[3][1]) == 7
    for index in (-1, 4):
        with pytest.raises(IndexError, match=f"chunk {index} of 4"):
            chunks[index]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": "random"}, r"--augment random is for images.*\(1, 40\); leave it out"),
        ({"tta": "flip"}, "--tta flip is for images"),
    ],
)
def test_signals_are_refused(changes, message):
    signals = Split(torch.zeros(3, 1, 40), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(OptionsError, match=message):
        augmented(signals, resolve(Options(**changes)))
    assert augmented(signals, resolve(Options())) is signals


@pytest.mark.cuda
@pytest.mark.parametrize("sampling", ["fixed", "shuffled", "replacement"])
@pytest.mark.parametrize("augment", ["none", "random", "fixed"])
def test_a_gpu_makes_the_same_samples(augment, sampling):
    options = resolve(Options(augment=augment, replicas=3 if augment == "fixed" else None))
    found = []
    for device in ("cpu", "cuda"):
        chunks = Chunks(augmented(images().to(device), options), 16, sampling=sampling, seed=1)
        chunks[0]  # the order of the pass comes from the CPU
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            batches = list(chunks)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append([torch.cat([batch[i].cpu() for batch in batches]) for i in (0, 1)])
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return tiny_runs.data(tmp_path_factory.mktemp("data"), count=40, side=8)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(loop, "draw_curves", lambda folder, options: False)


RUNS = {
    "random": ("fb-penalty", {"augment": "random", "chunks": "shuffled"}),
    "fixed": ("fb", {"augment": "fixed", "replicas": 3, "with_clean": True, "decay": "weights"}),
    "replacement": ("fb", {"chunks": "replacement", "label_smoothing": 0.1}),
    "semi-stochastic": ("sgd", {"augment": "fixed", "replicas": 4, "tta": "flip"}),
    "random, sgd": ("sgd", {"augment": "random", "decay": "weights", "chunks": "replacement"}),
}


@pytest.mark.parametrize("case", RUNS)
def test_resumed_is_the_same_bit_for_bit(tiny, tmp_path, monkeypatch, capsys, case):
    """Interrupted (sgd in the middle of an epoch) and resumed: draws need no saved state."""
    recipe, changes = RUNS[case]
    passes = {"epochs": 6} if recipe == "sgd" else {"steps": 6}
    options = tiny_runs.with_noise(tiny, tmp_path / "whole", recipe, **passes, **changes)
    whole_run = loop.train(options)
    stop = 7 if recipe == "sgd" else 3
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        tiny_runs.interrupt_after(patch, stop)
        loop.train(replace(options, out=tmp_path / "part"))
    resumed = loop.train(Options(resume=tmp_path / "part"))
    assert f"resumed at step {stop}" in capsys.readouterr().out
    assert tiny_runs.digest(resumed.model) == tiny_runs.digest(whole_run.model)
    plain = {name: getattr(Options, name) for name in changes if name != "tta"}
    other = loop.train(replace(options, out=tmp_path / "other", **plain))
    assert tiny_runs.digest(other.model) != tiny_runs.digest(whole_run.model)


@pytest.mark.parametrize("augment", ["random", "fixed"])
@pytest.mark.parametrize("recipe", ["sgd", "fb"])
def test_augmented_runs_learn(tiny, tmp_path, recipe, augment):
    result = loop.train(tiny_runs.options(tiny, tmp_path / "run", recipe, augment=augment))
    records = result.folder.read_metrics()
    assert records[-1]["loss"] < records[0]["loss"]


@pytest.mark.parametrize("changes", [{"augment": "random"}, {"chunks": "shuffled"}, {}])
@pytest.mark.parametrize(("recipe", "steps"), [("fb", 1), ("sgd", 3)])
def test_draws_follow_the_passes_of_a_run(tiny, recipe, steps, changes):
    """New draws after every full-batch step, or after every epoch of 3 mini-batches."""
    options = tiny_runs.options(tiny, Path("never written"), recipe, **changes)
    trainer = Trainer(resolve(options), load(tiny), torch.device("cpu"))
    first = trainer.chunks[0][0].clone()
    for step in range(1, 2 * steps + 1):
        trainer.take_step()
        drawn_anew = step >= steps and (bool(changes) or recipe == "sgd")
        assert torch.equal(trainer.chunks[0][0], first) == (not drawn_anew), step


def test_the_sizes_of_a_run(tiny, tmp_path, capsys):
    options = tiny_runs.options(tiny, tmp_path / "run", "fb", steps=1, augment="fixed", replicas=3)
    loop.train(options)
    out = capsys.readouterr().out
    assert "120 samples in chunks of 32, 3 fixed crops and flips of each)" in out
    wanted = resolve(replace(options, recipe="sgd", steps=None, chunk_size=None, epochs=2))
    trainer = Trainer(wanted, load(tiny), torch.device("cpu"))
    assert len(trainer.chunks.split) == 40
    assert "3 fixed crops and flips of each, one an epoch" in describe(trainer)
