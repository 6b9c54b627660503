"""TinyImageNet and ImageNet from folders: layouts, mapped files, crops, whole runs."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch

from fbopt.train import loop
from fbopt.train.config.dataspec import DataError
from fbopt.train.config.options import Options
from fbopt.train.data import dataset, decode
from fbopt.train.data.dataset import Chunks
from fbopt.train.data.folders import fixed_order
from fbopt.train.data.load import MOMENTS, load
from fbopt.train.loop import train
from fbopt.train.signals import Interrupted

Image = pytest.importorskip("PIL.Image")
transforms = pytest.importorskip("torchvision.transforms")
CLASSES = ("n01", "n02", "n03")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of each test's own for images alone, as compiled kernels are to be found."""
    monkeypatch.setattr(loop, "draw_curves", lambda folder, options: False)
    monkeypatch.setattr(decode, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def write(path: Path, seed: int, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 6, 3)).astype(np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, quality=95)


@pytest.fixture
def tiny_imagenet(tmp_path) -> Path:
    root, lines = tmp_path / "tiny", []
    for label, name in enumerate(CLASSES):
        for k in range(6):
            file = root / "train" / name / "images" / f"{name}_{k}.JPEG"
            write(file, 10 * label + k, (64, 64))
        for k in range(2):
            file = root / "val" / "images" / f"val_{3 * k + label}.JPEG"
            write(file, 100 + 10 * label + k, (64, 64))
            lines.append(f"{file.name}\t{name}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


@pytest.fixture
def imagenet(tmp_path) -> Path:
    root = tmp_path / "imagenet"
    for part, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(CLASSES):
            for k in range(count):
                size = ((50, 40), (40, 61), (44, 44))[k % 3]
                write(root / part / name / f"{k}.JPEG", 7 * label + k + len(part), size)
    return root


def test_tinyimagenet(tiny_imagenet):
    data = load(f"tinyimagenet:{tiny_imagenet}")
    assert data.train.x.shape == (18, 3, 64, 64) and data.classes == 3 and len(data.test) == 6
    order = fixed_order(18)
    assert data.train.y.tolist() == [int(i) // 6 for i in order]
    file = tiny_imagenet / "train" / CLASSES[order[0] // 6] / "images"
    with Image.open(sorted(file.iterdir())[order[0] % 6]) as image:
        assert np.array_equal(data.train.x[0], np.asarray(image).transpose(2, 0, 1))
    assert data.test.y.tolist() == [0, 0, 1, 1, 2, 2]
    with Image.open(tiny_imagenet / "val" / "images" / "val_3.JPEG") as image:
        assert np.array_equal(data.test.x[1], np.asarray(image).transpose(2, 0, 1))
    mean, _ = MOMENTS["tinyimagenet"]
    torch.testing.assert_close(data.train.mean.flatten() / 255, torch.tensor(mean))
    some = load(f"tinyimagenet:{tiny_imagenet}", samples=5)
    assert torch.equal(some.train.y, data.train.y[:5])


def test_tinyimagenet_errors(tiny_imagenet):
    spec = f"tinyimagenet:{tiny_imagenet}"
    listed = tiny_imagenet / "val" / "val_annotations.txt"
    listed.write_text(listed.read_text() + "val_9.JPEG\tn99\t0\n")
    with pytest.raises(DataError, match=r"val_annotations.txt, with a file's name and its.*n99"):
        load(spec)
    listed.unlink()
    with pytest.raises(DataError, match=r"expected .*val_annotations.txt"):
        load(spec)
    with pytest.raises(DataError, match=r"expected images as .*train/<class>/images"):
        load(f"tinyimagenet:{tiny_imagenet / 'val' / 'images'}")


def square(path: Path, side: int) -> np.ndarray:
    with Image.open(path) as image:
        made = transforms.CenterCrop(side)(transforms.Resize(side)(image.convert("RGB")))
        return np.asarray(made).transpose(2, 0, 1)


def test_imagenet_is_mapped(imagenet, cache, monkeypatch):
    """Resized and cut as torchvision does, in a file that is made once."""
    data = load(f"imagenet:{imagenet}", image_size=28)
    assert data.train.x.shape == (24, 3, 32, 32) and data.shape == (3, 28, 28)
    assert len(data.test) == 9 and data.classes == 3
    files = [imagenet / "train" / name / f"{k}.JPEG" for name in CLASSES for k in range(8)]
    for position, index in enumerate(fixed_order(24)):
        assert np.array_equal(data.train.x[position], square(files[index], 32))
        assert data.train.y[position] == index // 8
    kept = sorted(cache.glob("mapped-*.npy"))
    others = sorted(file.suffix for file in cache.iterdir() if file.suffix != ".npy")
    assert len(kept) == 2 and others == [".lock"] * 2 + [".sha256"] * 2
    assert sum(file.stat().st_size - 128 for file in kept) == (24 + 9) * 32 * 32 * 3
    contents = (hashlib.sha256(image.permute(1, 2, 0).numpy().tobytes()).digest()
                for image in data.train.x)  # fmt: skip
    assert data.train.digest == hashlib.sha256(b"".join(contents)).hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(decode, "read_image", lambda *a: pytest.fail("decoded again"))
        again = load(f"imagenet:{imagenet}", image_size=28)
    assert again.sha256() == data.sha256() and torch.equal(again.train.x, data.train.x)
    some = load(f"imagenet:{imagenet}", image_size=28, samples=5)
    assert torch.equal(some.train.x, data.train.x[:5]) and some.classes == 3
    assert some.sha256() != data.sha256()
    for damage in (b"", kept[0].read_bytes()[:-7], b"text"):
        kept[0].write_bytes(damage)
        assert load(f"imagenet:{imagenet}", image_size=28).sha256() == data.sha256()
    write(files[0], 99, (40, 40))
    assert load(f"imagenet:{imagenet}", image_size=28).sha256() != data.sha256()


def test_imagenet_is_tested_on_the_middle(imagenet):
    """Resize and centre crop, the standard evaluation; normalised by ImageNet's moments."""
    data = load(f"imagenet:{imagenet}", image_size=28).to("cpu")
    x, y = data.test.batch(slice(None))
    assert x.shape == (9, 3, 28, 28) and y.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    mean, deviation = (torch.tensor(m).view(3, 1, 1) for m in MOMENTS["imagenet"])
    usual = transforms.Compose(
        [transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor()]
    )
    for position, (name, k) in enumerate((name, k) for name in CLASSES for k in range(3)):
        with Image.open(imagenet / "val" / name / f"{k}.JPEG") as image:
            expected = (usual(image.convert("RGB")) - mean) / deviation
        torch.testing.assert_close(x[position], expected, rtol=1e-5, atol=1e-5)


def test_imagenet_errors(imagenet, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"expected images as .*none/train/<class>/<image>"):
        load(f"imagenet:{tmp_path / 'none'}")
    with pytest.raises(DataError, match=r"--samples 25: .*there are only 24 training samples"):
        load(f"imagenet:{imagenet}", samples=25)
    (imagenet / "val" / "n02" / "0.JPEG").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"n02/0\.JPEG: not a readable image"):
        load(f"imagenet:{imagenet}", image_size=28)
    (imagenet / "val" / "n02" / "0.JPEG").unlink()
    write(imagenet / "train" / "n01" / "0.JPEG", 98, (44, 44))

    def full(*arguments, **more):
        raise OSError("no space left on device")

    monkeypatch.setattr(np.lib.format, "open_memmap", full)
    with pytest.raises(DataError, match=r"its 24 images take 0\.0 GB in .*FBOPT_CACHE_DIR"):
        load(f"imagenet:{imagenet}", image_size=28)


@pytest.mark.parametrize("augment", ["none", "random", "fixed"])
def test_imagenet_resumes_on_the_same_bits(imagenet, tmp_path, monkeypatch, augment):
    options = Options(
        data=f"imagenet:{imagenet}", image_size=28, recipe="fb-penalty", model="resnet18", width=2,
        steps=3, chunk_size=10, augment=augment, replicas=2 if augment == "fixed" else None,
        threads=1, out=tmp_path / "whole",
    )  # fmt: skip
    whole = train(options)
    assert whole.model.stem.kernel_size == (7, 7)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        tiny_runs.interrupt_after(patch, 2)
        train(replace(options, out=tmp_path / "part"))
    resumed = train(Options(resume=tmp_path / "part"))
    assert tiny_runs.digest(resumed.model) == tiny_runs.digest(whole.model)


def test_what_does_not_fit_is_read_chunk_by_chunk(imagenet, monkeypatch):
    """On a device of another type the samples stay in the file, and the labels go there."""
    monkeypatch.setattr(dataset, "_fits", lambda x, device: device.type == "cpu")
    data = load(f"imagenet:{imagenet}", image_size=28)
    moved = data.train.to("meta")
    assert moved.x.device.type == "cpu" and moved.device.type == "meta"
    assert moved.x.untyped_storage().data_ptr() == data.train.x.untyped_storage().data_ptr()
    assert moved.stored(slice(0, 4)).device.type == "meta"
    small = replace(data.train, digest=None).to("meta")
    assert small.x.device.type == "meta"


@pytest.mark.cuda
@pytest.mark.parametrize("augment", ["none", "random"])
def test_streamed_to_a_gpu(imagenet, monkeypatch, augment):
    from fbopt.train.config.resolve import resolve
    from fbopt.train.data.augment import augmented

    data = load(f"imagenet:{imagenet}", image_size=28)
    options = resolve(Options(data=f"imagenet:{imagenet}", augment=augment))
    held = augmented(data.to("cuda").train, options)
    monkeypatch.setattr(dataset, "_fits", lambda x, device: False)
    streamed = augmented(data.to("cuda").train, options)
    for sampling in ("fixed", "shuffled"):
        pairs = zip(*(Chunks(s, 7, sampling=sampling) for s in (held, streamed)), strict=True)
        for (x, y), (other, labels) in pairs:
            assert other.is_cuda and torch.equal(x, other) and torch.equal(y, labels)


def test_tinyimagenet_trains(tiny_imagenet, tmp_path, capsys):
    options = Options(
        data=f"tinyimagenet:{tiny_imagenet}", recipe="fb-aug", model="resnet18", width=2, steps=2,
        chunk_size=9, threads=1, out=tmp_path / "run",
    )  # fmt: skip
    records = train(options).folder.read_metrics()
    assert records[-1]["step"] == 2 and np.isfinite(records[-1]["loss"])
