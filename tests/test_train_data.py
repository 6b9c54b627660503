"""The data sets and the networks of the training program."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from fbopt.train.data import Chunks, from_arrays
from fbopt.train.sources import DataError, load, parse


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


@pytest.mark.parametrize("spec", ["", "mnist", "npz", "npz:", "mnist1d:x", "imagefolder:"])
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
    assert data.train.y.tolist() == [0] * 5 + [1] * 5 and len(data.test) == 4
    x, _ = data.train.batch(slice(None))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)


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
