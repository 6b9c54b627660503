"""Attacks on what is read: records of runs, forged checkpoints, tables, npz files, images."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.arena import Arena, without_figures, without_steps
from fuzz.attack import Attack, attempt
from fuzz.mutations import JUNK, TENSORS, bytes_of, json_of, lines_of, values_of
from hypothesis import strategies as st

from fbopt.train.analyze.__main__ import main as analyze
from fbopt.train.checkpoint import fingerprint, format
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import Options
from fbopt.train.ladder import summary
from fbopt.train.ladder.plan import Ladder, make_plan
from fbopt.train.loop import train
from fbopt.train.outcome import status_of

OBJECTS = ("options.json", "result.json")
LINES = ("metrics.jsonl", "fingerprints.jsonl", "environment.jsonl")
File = tuple[str, str, bytes]  # the name of a run, of its file, and other content


def damaged(file: Path) -> st.SearchStrategy[File]:
    """A file of a run with other values or other bytes."""
    content = file.read_bytes()
    changed = json_of(content) if file.suffix == ".json" else lines_of(content)
    return st.tuples(st.just(file.parent.name), st.just(file.name), changed)


def files(arena: Arena, *names: str) -> st.SearchStrategy[File]:
    found = [run / name for run in (arena.finished, arena.half) for name in names]
    return st.one_of(*(damaged(file) for file in found if file.exists()))


def use(arena: Arena, folder: RunFolder) -> None:
    """Every command that reads a run."""

    def trained(options: Options) -> int:
        return status_of(lambda: bool(train(options)) - 1)

    with without_steps():
        attempt(lambda: trained(arena.options(folder.path, resume="auto")))
        attempt(lambda: trained(Options(resume=folder.path)))
        attempt(lambda: trained(arena.options(folder.path)))
        attempt(lambda: fingerprint.main([str(folder.path), str(arena.finished)]))
        attempt(lambda: fingerprint.main([str(folder.path)]))


def records(arena: Arena, names: tuple[str, ...]) -> Attack:
    """Objects or lines of JSON in a run, with other values or other bytes."""

    def check(case: File) -> None:
        run, name, content = case
        folder = arena.copy(arena.root / run)
        (folder.path / name).write_bytes(content)
        use(arena, folder)

    return Attack(files(arena, *names), check)


def forged(arena: Arena) -> Attack:
    """Checkpoints that are sealed with the right SHA-256, and hold something else."""
    states = {}
    for run in (arena.finished, arena.half):
        ((_, path), *_) = RunFolder(run).checkpoints()
        whole = format.unseal(path.read_bytes())
        states[run.name] = {k: v for k, v in whole.items() if k != "format"}
    junk = [*JUNK, *TENSORS]

    def check(case: tuple[str, Any]) -> None:
        run, state = case
        folder = arena.copy(arena.root / run)
        (newest, _), *_ = kept = folder.checkpoints()
        for _, path in kept:
            path.unlink()
        with contextlib.suppress(Exception):  # what torch cannot save cannot be forged
            content = format.seal(state if isinstance(state, dict) else {"step": state})
            folder.path_of(newest).write_bytes(content)
        use(arena, folder)
        with without_figures():
            attempt(lambda: arena.go_on(folder))  # with all its steps
        measures = [
            "--measures",
            "sharpness",
            "--max-products",
            "3",
            "--eigenvalues",
            "1",
            "--train-steps",
            "1",
        ]
        attempt(lambda: analyze([str(folder.path), *measures]))

    drawn = [st.tuples(st.just(run), values_of(state, junk)) for run, state in states.items()]
    return Attack(st.one_of(*drawn), check)


def tables(arena: Arena) -> Attack:
    """Files of a finished run, from which a ladder makes its table and its figures."""
    wanted = Ladder(arena.data, ("fb-penalty",), seeds=1, out=arena.scratch / "ladder")
    plan = make_plan(wanted, Options(data=arena.data))
    target = wanted.out / "fb-penalty-s0"

    def check(case: File) -> None:
        _, name, content = case
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(arena.finished, target)
        (target / name).write_bytes(content)
        attempt(lambda: status_of(lambda: bool(summary.write(plan)) - 1))
        (target / "curves.png").unlink()  # as after a kill between result and figure
        attempt(lambda: arena.go_on(RunFolder(target)))

    names = ("result.json", "metrics.jsonl", "environment.jsonl")
    content = (arena.finished / "metrics.jsonl").read_bytes()
    negative = content.replace(b'"mean_squared_chunk_norm": ', b'"mean_squared_chunk_norm": -')
    drawn = st.one_of(*(damaged(arena.finished / name) for name in names))
    kept = [("finished", "metrics.jsonl", content) for content in (negative, b"")]
    return Attack(drawn, check, (*kept,))


ARRAYS = {
    "x_train": np.zeros((12, 1, 8, 8), np.float32), "y_train": np.arange(12) % 3,
    "x_test": np.zeros((6, 1, 8, 8), np.float32), "y_test": np.arange(6) % 3,
}  # fmt: skip
ODD = [
    np.zeros(0), np.zeros((12, 0)), np.zeros((12, 8, 8)), np.float64(3), np.array(["a"] * 12),
    np.zeros((12, 2), np.complex64), np.full((12, 8), np.nan), np.full(12, 10**15),
    np.full(12, -1), np.zeros((3, 8, 8), np.uint8), np.array([None] * 3, dtype=object),
    np.full(12, 2**63, np.uint64), np.zeros((12, 1, 1, 1, 1)), np.arange(12) > 5,
    np.zeros(12, "datetime64[s]"), np.zeros(12, [("a", "i4")]), np.zeros((12, 64, 64), np.float16),
    np.full((12, 1, 8, 8), 1e300), np.full((12, 1, 8, 8), np.finfo(np.longdouble).max),
    np.zeros((12, 1, 1)), np.zeros((12, 1, 8, 8), ">f4"), np.full(12, 999_999), np.zeros((0, 8)),
    np.zeros((12, 1, 8, 8), np.uint8), np.zeros((6, 1, 8, 8), np.uint8), np.zeros(12, bool),
]  # fmt: skip
# Headers of arrays that a few bytes follow: they promise more than any machine holds, or nonsense.
HEADERS = [
    {"descr": "<f4", "fortran_order": False, "shape": shape}
    for shape in ((10**6, 10**6), (10**18,), (-1,), (2**62, 4), (12, 1, 8, 8), ())
] + [
    {"descr": descr, "fortran_order": True, "shape": (12,)}
    for descr in ("|O", "<U1000000000", "|V0", "<f1024", "nonsense", [("a", "<f4", (10**9,))])
]  # fmt: skip


def archive(arrays: dict[str, Any]) -> bytes:
    """An npz file of arrays, and of headers that promise some."""
    file = io.BytesIO()
    plain = {name: array for name, array in arrays.items() if not isinstance(array, dict)}
    np.savez(file, **plain)
    import zipfile

    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as content:
        for name, header in arrays.items():
            if isinstance(header, dict):
                words = repr(header).encode()
                start = b"\x93NUMPY\x01\x00" + len(words).to_bytes(2, "little")
                content.writestr(f"{name}.npy", start + words + bytes(4096))
    return file.getvalue()


def npz(arena: Arena) -> Attack:
    """npz files with odd arrays, forged headers, or other bytes."""
    odd = [*ODD, *HEADERS]
    sound = archive(ARRAYS)
    numbers = st.sampled_from(range(len(odd)))
    changes = st.dictionaries(st.sampled_from(sorted(ARRAYS)), numbers, min_size=1, max_size=4)

    def check(content: bytes) -> None:
        path = arena.scratch / "data.npz"
        path.write_bytes(content)
        options = Options(
            data=f"npz:{path}", recipe="fb", steps=1, out=arena.scratch / "of npz", width=2
        )
        with without_steps():
            attempt(lambda: status_of(lambda: bool(train(options)) - 1))

    made = changes.map(lambda c: archive(ARRAYS | {name: odd[i] for name, i in c.items()}))
    return Attack(made | bytes_of(sound), check)


def picture(kind: str, mode: str, size: tuple[int, int]) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A picture whose header promises side² pixels."""
    content = bytearray(picture("BMP", "RGB", (2, 2)))
    content[18:26] = side.to_bytes(4, "little") * 2
    return bytes(content)


PICTURES: list[Callable[[], bytes]] = [
    *(partial(picture, kind, mode, size) for kind, mode, size in (
        ("PNG", "RGB", (32, 32)), ("JPEG", "L", (9, 50)), ("PNG", "P", (4, 4)),
        ("PNG", "I;16", (5, 5)), ("GIF", "P", (3, 3)), ("TIFF", "F", (4, 4)),
        ("PNG", "RGBA", (1, 1)), ("BMP", "1", (7, 7)), ("JPEG", "CMYK", (6, 6)),
        ("WEBP", "RGB", (8, 8)), ("PPM", "L", (3, 9)), ("TIFF", "LAB", (4, 4)),
        ("PNG", "LA", (2000, 1)), ("GIF", "P", (1, 900)),
    )),
    *(partial(bomb, side) for side in (50_000, 10**6, 2**31 - 1)),
]  # fmt: skip
NAMES = ("0.png", "0.jpg", "0.gif", "0.tiff", "0.webp", "0.bmp", "0.ppm")


def images(arena: Arena) -> Attack:
    """Image files of many kinds, under names of other kinds, with other bytes, and huge ones."""
    folder = arena.clean("images")
    for part in ("train", "test"):
        for label in ("a", "b"):
            (folder / part / label).mkdir(parents=True)
            for index in range(2):
                content = picture("PNG", "RGB", (8, 8))
                (folder / part / label / f"{index}.png").write_bytes(content)

    def check(case: tuple[bytes, str]) -> None:
        content, name = case
        for old in (folder / "train" / "a").glob("0.*"):
            old.unlink()
        (folder / "train" / "a" / name).write_bytes(content)
        options = Options(
            data=f"imagefolder:{folder}", recipe="fb", steps=1, out=arena.scratch / "of images",
            width=2,
        )  # fmt: skip
        with without_steps():
            attempt(lambda: status_of(lambda: bool(train(options)) - 1))

    sound = [made() for made in PICTURES]
    changed = st.sampled_from(sound) | st.sampled_from(sound).flatmap(bytes_of)
    return Attack(st.tuples(changed, st.sampled_from(NAMES)), check)
