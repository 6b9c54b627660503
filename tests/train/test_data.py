"""The data sets of the training program."""

from __future__ import annotations

import hashlib
import pickle
import random
import sys
import tarfile

import numpy as np
import pytest
import torch

from fbopt.train.config.dataspec import DataError, parse
from fbopt.train.config.options import Options
from fbopt.train.data.dataset import Chunks, from_arrays
from fbopt.train.data.load import fixed_order, load
from fbopt.train.loop import train


def arrays(n: int = 30, shape: tuple[int, ...] = (1, 8, 8), dtype=np.uint8) -> dict:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 255, (n, *shape)).astype(dtype),
        "y_train": np.arange(n) % 3,
        "x_test": rng.integers(0, 255, (6, *shape)).astype(dtype),
        "y_test": np.arange(6) % 3,
    }


def test_mnist1d_is_generated_offline_and_leaves_the_random_states_alone(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("went to the network"))
    random.seed(1), np.random.seed(2)
    expected = random.random(), np.random.rand()
    random.seed(1), np.random.seed(2)
    data = load("mnist1d")
    assert (random.random(), np.random.rand()) == expected
    assert data.train.x.shape == (4000, 1, 40) and data.test.x.shape == (1000, 1, 40)
    assert data.train.x.dtype == torch.float32 and data.classes == 10
    assert data.train.y.bincount().min() > 350


def test_digits_has_a_fixed_split():
    data = load("digits")
    assert data.train.x.shape == (1437, 1, 8, 8) and len(data.test) == 360
    assert data.sha256() == load("digits").sha256()
    x, _ = data.train.batch(slice(None))
    assert abs(x.mean()) < 1e-5 and abs(x.std() - 1) < 1e-3


def test_npz_round_trip(tmp_path):
    values = arrays()
    np.savez(tmp_path / "d.npz", **values)
    data = load(f"npz:{tmp_path / 'd.npz'}")
    assert torch.equal(data.train.x, torch.from_numpy(values["x_train"]))
    assert data.train.y.dtype == torch.int64 and data.classes == 3


def test_pickled_objects_are_never_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    values = arrays() | {"y_train": np.array([Bomb()] * 30, dtype=object)}
    np.savez(tmp_path / "d.npz", **values)
    with pytest.raises(DataError, match="never read"):
        load(f"npz:{tmp_path / 'd.npz'}")
    with open(tmp_path / "e.npz", "wb") as file:
        np.array([Bomb()], dtype=object).dump(file)
    with pytest.raises(DataError, match="never read"):
        load(f"npz:{tmp_path / 'e.npz'}")


BAD_ARRAYS = {
    "missing array": ({"x_test": None}, "no array x_test"),
    "lengths differ": ({"y_train": np.zeros(7, int)}, "y_train is int64 .7.; .*30 integer labels"),
    "labels in a column": ({"y_train": np.zeros((30, 1), int)}, "y_train"),
    "float labels": ({"y_train": np.zeros(30)}, "y_train is float64"),
    "negative label": ({"y_train": np.arange(30) - 1}, "label -1; labels count from 0"),
    "unknown test label": ({"y_test": np.array([0, 1, 2, 3, 1, 1])}, "label 3.*0 … 2"),
    "test shape": ({"x_test": np.zeros((6, 1, 9, 9), np.uint8)}, "have to agree"),
    "test dtype": ({"x_test": np.zeros((6, 1, 8, 8))}, "have to agree"),
    "empty": ({"x_train": np.zeros((0, 4)), "y_train": np.zeros(0, int)}, "x_train"),
    "one number each": ({"x_train": np.zeros(30)}, "x_train is float64 .30."),
    "text": ({"x_train": np.array(["a"] * 30)}, "real numbers"),
    "complex": ({"x_train": np.zeros((30, 4), complex)}, "real numbers"),
    "not finite": ({"x_train": np.full((30, 1, 8, 8), np.nan)}, "infinite or undefined"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays(tmp_path, case):
    changes, message = BAD_ARRAYS[case]
    values = {k: v for k, v in (arrays() | changes).items() if v is not None}
    np.savez(tmp_path / "d.npz", **values)
    with pytest.raises(DataError, match=message):
        load(f"npz:{tmp_path / 'd.npz'}")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut short", b"\x93NUMPY"])
def test_files_that_are_no_archives(tmp_path, content):
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"not an \.npz file"):
        load(f"npz:{tmp_path / 'd.npz'}")


@pytest.mark.parametrize(
    "spec", ["", "mnist", "npz", "npz:", "mnist1d:x", "imagefolder:", "cifar", "cifar10:x"]
)
def test_unknown_data(spec):
    with pytest.raises(DataError, match="--data"):
        parse(spec)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load(f"npz:{tmp_path / 'none.npz'}")


@pytest.fixture
def images(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 255, (20, 24, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{index}.png")
    return tmp_path


def test_imagefolder(images):
    data = load(f"imagefolder:{images}", image_size=16)
    assert data.train.x.shape == (10, 3, 16, 16) and data.train.x.dtype == torch.uint8
    assert sorted(data.train.y) == [0] * 5 + [1] * 5 and len(data.test) == 4
    x, _ = data.train.batch(slice(None))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)


def test_imagefolder_is_shuffled_once(images):
    """Folders list one class after the other; chunks mix them, in the same way in every run."""
    from PIL import Image

    data = load(f"imagefolder:{images}", image_size=20)
    y = data.train.y
    assert (y.diff() < 0).any() and data.test.y.tolist() == [0, 0, 1, 1]
    assert data.sha256() == load(f"imagefolder:{images}", image_size=20).sha256()
    files = [images / "train" / name / f"{i}.png" for name in ("cat", "dog") for i in range(5)]
    order = np.random.RandomState(0).permutation(10)
    for position, index in enumerate(order):
        with Image.open(files[index]) as image:
            expected = np.asarray(image.resize((20, 20), Image.Resampling.BILINEAR))
        assert np.array_equal(data.train.x[position], expected.transpose(2, 0, 1))
        assert y[position] == index // 5


def test_a_part_of_the_training_samples(tmp_path):
    """The first samples, normalised by their own moments, with all classes and the test set."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (12, 1, 4, 4)).astype(np.uint8)
    y = np.array([0, 1] * 5 + [2, 2])
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    spec = f"npz:{tmp_path / 'd.npz'}"
    data = load(spec, samples=6)
    assert torch.equal(data.train.x, torch.from_numpy(x[:6])) and len(data.test) == 12
    assert data.train.y.tolist() == [0, 1] * 3 and data.classes == 3
    assert data.train.mean.item() == pytest.approx(x[:6].mean(), rel=1e-6)
    assert load(spec, samples=12).sha256() == load(spec).sha256() != data.sha256()
    with pytest.raises(DataError, match=r"--samples 13: .*only 12 training samples; give"):
        load(spec, samples=13)


def test_imagefolder_errors(images):
    with pytest.raises(DataError, match=r"train.*<class>/<image>"):
        load(f"imagefolder:{images / 'none'}")
    (images / "test" / "dog").rename(images / "test" / "cow")
    with pytest.raises(DataError, match=r"different classes.*cow, dog"):
        load(f"imagefolder:{images}")
    (images / "test" / "cow").rename(images / "test" / "dog")
    (images / "test" / "dog" / "0.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"dog/0\.png: not a readable image"):
        load(f"imagefolder:{images}")


def test_decoded_images_are_kept(images, tmp_path, monkeypatch):
    """Many images are decoded once, and again after a change of a file or a damaged cache."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("FBOPT_CACHE_DIR", str(cache))
    spec = f"imagefolder:{images}"
    expected = load(spec, 16).sha256()
    assert not cache.exists()
    monkeypatch.setattr("fbopt.train.data.decode.CACHE_FROM", 4)
    assert load(spec, 16).sha256() == expected
    kept = sorted(cache.glob("images-*.npy"))
    assert len(kept) == 2 and len([*cache.iterdir()]) == 2
    with monkeypatch.context() as patch:
        patch.setattr("fbopt.train.data.decode._decode", lambda *a: pytest.fail("decoded again"))
        assert load(spec, 16).sha256() == expected
    for damage in (b"", kept[0].read_bytes()[:-7], b"text"):
        kept[0].write_bytes(damage)
        assert load(spec, 16).sha256() == expected
    assert load(spec, 8).train.x.shape[-1] == 8
    file = images / "train" / "cat" / "0.png"
    file.write_bytes((images / "train" / "dog" / "0.png").read_bytes())
    data = load(spec, 16)
    first = [fixed_order(10).tolist().index(i) for i in (0, 5)]  # of the cats, and of the dogs
    assert data.sha256() != expected and torch.equal(*data.train.x[first])


def write_cifar(folder, kind: str) -> dict:
    """A tiny data set in the files of CIFAR-10 or CIFAR-100, and what torchvision has to expect."""
    rng = np.random.default_rng(0)
    ten = kind == "cifar10"
    label = "labels" if ten else "fine_labels"
    parts = {"data_batch_1": 40, "data_batch_2": 20, "test_batch": 30}
    if not ten:
        parts = {"train": 60, "test": 30}
    folder = folder / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir(parents=True)
    names = "label_names" if ten else "fine_label_names"
    files = {"batches.meta" if ten else "meta": {names: [f"class {i}" for i in range(10)]}}
    for name, count in parts.items():
        labels = np.arange(count) % 10
        x = np.clip(rng.normal(25 * labels[:, None], 9, (count, 3072)), 0, 255).astype(np.uint8)
        files[name] = {"data": x, label: labels.tolist()}
    sums = {}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    meta = next(iter(files))
    return {
        "files": files,
        "train_list": [[n, sums[n]] for n in parts if "test" not in n],
        "test_list": [[n, sums[n]] for n in parts if "test" in n],
        "meta": {"filename": meta, "key": names, "md5": sums[meta]},
    }


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    def make(kind: str):
        facts = write_cifar(tmp_path, kind)
        for name in ("train_list", "test_list", "meta"):
            monkeypatch.setattr(getattr(datasets, kind.upper()), name, facts[name])
        return facts["files"]

    return make


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_files(tmp_path, cifar, kind):
    files = cifar(kind)
    data = load(kind, folder=tmp_path)
    rows = [c["data"] for n, c in files.items() if "data" in c and "test" not in n]
    x = torch.from_numpy(np.concatenate(rows)).reshape(60, 3, 32, 32)
    assert torch.equal(data.train.x, x) and data.train.x.dtype == torch.uint8
    assert len(data.test) == 30 and data.classes == 10 and data.shape == (3, 32, 32)
    assert data.train.y.tolist() == [i % 10 for i in range(60)]
    mean, deviation = {
        "cifar10": ((0.49147, 0.48226, 0.44677), (0.24703, 0.24349, 0.26159)),
        "cifar100": ((0.50716, 0.48669, 0.44120), (0.26733, 0.25644, 0.27615)),
    }[kind]
    found, _ = data.test.batch(slice(None))
    expected = data.test.x.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)
    expected /= torch.tensor(deviation).double().view(3, 1, 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("augment", ["none", "random", "fixed"])
def test_cifar_files_train(tmp_path, cifar, monkeypatch, capsys, augment):
    """The whole path: torchvision, uint8, augmentation, the paper's ResNet at reduced width."""
    cifar("cifar10")
    monkeypatch.setattr("fbopt.train.loop.draw_curves", lambda folder, options: False)
    options = Options(
        data="cifar10",
        data_dir=tmp_path,
        recipe="fb",
        width=2,
        steps=6,
        chunk_size=32,
        augment=augment,
        threads=1,
        out=tmp_path / "run",
    )
    records = train(options).folder.read_metrics()
    assert records[-1]["loss"] < records[0]["loss"] and records[-1]["step"] == 6
    assert f"({600 if augment == 'fixed' else 60} samples in chunks" in capsys.readouterr().out


CURE = r".*[wW]ithout a network: bring http\S+cifar-10-python.tar.gz .MD5 .*--download, which then"


def test_cifar_that_is_not_there(tmp_path, cifar, monkeypatch):
    """Missing, damaged or offline: the error says what to do; an archive there is unpacked."""
    datasets = pytest.importorskip("torchvision.datasets")
    folder = tmp_path / "d"
    with pytest.raises(DataError, match=f"no intact cifar-10-batches-py in .*; add --down{CURE}"):
        load("cifar10", folder=folder)
    monkeypatch.setattr("socket.socket.connect", offline)
    monkeypatch.setattr("socket.getaddrinfo", offline)
    with pytest.raises(DataError, match=f"not downloaded to .*is unreachable.*; try again{CURE}"):
        load("cifar10", folder=folder, download=True)
    cifar("cifar10")
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    content = (folder / "cifar-10-python.tar.gz").read_bytes()
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    whole = load("cifar10", folder=folder, download=True)
    assert whole.sha256() == load("cifar10", folder=tmp_path).sha256()
    batch = folder / "cifar-10-batches-py" / "data_batch_1"
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(DataError, match="no intact cifar-10-batches-py"):
        load("cifar10", folder=folder)


def test_cifar_needs_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(DataError, match="--data cifar10 needs the package torchvision: pip"):
        load("cifar10")


def offline(*arguments, **more):
    raise OSError("the network is unreachable")


def test_chunks_are_a_fixed_order_and_can_be_read_again():
    data = from_arrays(**arrays(), name="test")
    chunks = Chunks(data.train, 8)
    assert [len(y) for _, y in chunks] == [8, 8, 8, 6] and len(chunks) == 4
    assert torch.equal(torch.cat([y for _, y in chunks]), data.train.y)
    assert torch.equal(torch.cat([x for x, _ in chunks]), data.train.batch(slice(None))[0])


def test_constant_channel_is_not_divided_by_zero():
    values = arrays() | {"x_train": np.full((30, 1, 8, 8), 7, np.uint8)}
    x, _ = from_arrays(**values, name="test").train.batch(slice(None))
    assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4, 9])
def test_chunks_are_dealt_out_in_whole_groups(group, world_size):
    x = np.zeros((20, 3))
    data = from_arrays(x, np.arange(20) % 2, x, np.arange(20) % 2, "these")
    order = [6, 0, 5, 1, 4, 2, 3]  # 20 samples are seven chunks of three
    shares = [
        Chunks(data.train, 3, order, rank=rank, world_size=world_size, group=group)
        for rank in range(world_size)
    ]
    groups = [order[i : i + group] for i in range(0, len(order), group)]
    for rank, share in enumerate(shares):
        assert share.groups == len(groups)
        assert list(share.dealt()) == [i for g in groups[rank::world_size] for i in g]
        assert len(list(share)) == len(list(share.dealt()))
