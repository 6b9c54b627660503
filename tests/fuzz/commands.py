"""Attacks on commands: their words, their environment, and output that goes away."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TextIO, get_origin, get_type_hints

import pytest
import tiny_runs
from fuzz.arena import Arena, inside, without_figures
from fuzz.attack import SECONDS, SHOWN, Attack, attempt, forked, judged
from hypothesis import strategies as st

from fbopt import cli
from fbopt.train import launch, memory
from fbopt.train.analyze.options import Analysis
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import Options, flag, literals
from fbopt.train.config.parser import command_line
from fbopt.train.flow.options import FlowOptions
from fbopt.train.ladder import runner, summary
from fbopt.train.ladder.plan import Ladder
from fbopt.train.plot.options import Plot

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = [
    "0", "-1", "1", "2", "3", "0.5", "-0.5", "1e-300", "1e300", "1e400", "nan", "inf", "-inf",
    "1000000000", "99999999999999999999", "9" * 5000, "1_000", "0x10", "١٢", "1,5", "-0", "1e9",
]  # fmt: skip
WORDS = [
    "", " ", "x", "--", "-", "-x", "=", "True", "False", "None", "auto", "λ", "\ud800", "\udcff",
    "x" * 5000, "a\0b", "a\nb", "%s", "{}", "{0}", "*", "\x1b[31m", "'", '"', "$(false)",
]  # fmt: skip
PATHS = [
    "", ".", "..", "/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem", "/proc/self/environ",
    "/no/such/folder", "x" * 5000, "/".join(["x" * 200] * 30), "\udcff\udcfe", "λ", "a b", "~",
    "~nobody/x", "file", "folder", "pipe", "loop", "half", "finished", "half/options.json",
    "half/checkpoint-5.pt", "new/run", "-", "a\0b", "a\nb", "unreadable", "script.py",
]  # fmt: skip
DATA = ["", ":", "npz", "npz:", "mnist1d:x", "digits", "cifar10", "imagefolder:folder", "nothing"]
MODELS = ["cnn", "resnet20", "resnet18", "vgg11", "densenet121", "pyramidnet110", "nfnet-f0"]
NEEDED = {
    "padding max_up augment_policy": ["--augment", "random"],
    "replicas with_clean": ["--augment", "fixed"],
    "history iterations line_search": ["--optimizer", "lbfgs", "--lr=1"],
    "ghost_size norm": ["--model", "resnet18", "--norm", "ghost"],
    "rho sam_share scope": ["--perturbation", "sam"],
    "widening": ["--model", "pyramidnet110"],
    "image_size": ["--data", "imagefolder:pictures"],
    "every": ["--track", "sharpness,noise"],
    "milestones": ["--schedule", "step"],
    "norm_type": ["--max-norm", "1"],
    "norm_bias_target": ["--norm-bias", "1"],
}
NEEDS = {name: words for names, words in NEEDED.items() for name in names.split()}
# torch.compile takes minutes; processes would outlive the steps that a case has.
LEFT_OUT = ("compile",)
TIGHT = 8 * 10**9  # bytes of addresses that a command may take more than it begins with
SAID = 10**9  # bytes that fbopt is told are free: less, so that it is fbopt that refuses


def values_for(name: str, hint: Any) -> st.SearchStrategy[str]:
    """Words for an option: of its kind, of others, and right ones."""
    right = [str(v) for v in literals(hint)] or ["True", "False"]
    text = str(hint)
    numbers, paths = NUMBERS, PATHS if "Path" in text or name == "out" else []
    if name == "model":
        right = MODELS
    if name in ("data", "data_dir"):
        paths = [*DATA, *(f"npz:{p}" for p in PATHS), *(f"imagenet:{p}" for p in PATHS[:20])]
    fitting = numbers if "int" in text or "float" in text else paths or WORDS
    several = [right, right, fitting, fitting, fitting, numbers, WORDS]
    return st.one_of(*(st.sampled_from(found) for found in several))


def options_of(cls: type) -> st.SearchStrategy[list[str]]:
    """An option of a dataclass with a word, with none or with several, as one word or as two."""
    hints = get_type_hints(cls)
    one = []
    for field in fields(cls):
        name, values = field.name, values_for(field.name, hints[field.name])
        if name in LEFT_OUT:
            continue
        if field.default is MISSING:
            one.append(values.map(lambda value: [value]))
            continue
        many = get_origin(hints[name]) is tuple
        words = st.lists(values, max_size=3 if many else 1)
        one.append(st.tuples(st.just(flag(name)), words).map(lambda t: [t[0], *t[1]]))
        need = NEEDS.get(name, [])  # without which a value would be refused as without effect
        one.append(values.map(lambda v, name=name, need=need: [*need, f"{flag(name)}={v}"]))
        one.append(st.just([flag(f"no_{name}")]))
    return st.one_of(*one)


def lines_of(cls: type, *base: tuple[str, str]) -> st.SearchStrategy[list[str]]:
    """Command lines: most of the options that make a run small, before or behind hostile ones."""
    small = st.lists(st.sampled_from(base), min_size=len(base) - 1, unique=True)
    hostile = st.lists(options_of(cls), max_size=3)
    orders = st.tuples(small, hostile) | st.tuples(hostile, small)
    return orders.map(lambda parts: [word for part in parts for words in part for word in words])


SMALL = (
    ("--data", "npz:tiny.npz"), ("--recipe", "fb-penalty"), ("--width", "2"), ("--model", "cnn"),
    ("--samples", "40"), ("--steps", "3"), ("--out", "new"),
)  # fmt: skip
FEW = (
    ("--max-products", "3"), ("--eigenvalues", "1"), ("--samples", "2"), ("--directions", "2"),
    ("--points", "3"), ("--grid", "3"), ("--train-steps", "1"), ("--measures", "sharpness"),
    ("--probes", "2"), ("--steps", "3"), ("--batch-sizes", "2"),
)  # fmt: skip


def of_runs(words: st.SearchStrategy[list[str]]) -> st.SearchStrategy[list[str]]:
    """Words behind a run's folder."""
    return st.tuples(st.sampled_from(["half", "finished"]), words).map(lambda t: [t[0], *t[1]])


def command_lines() -> st.SearchStrategy[list[str]]:
    """Command lines of all programs."""
    anything = st.lists(st.sampled_from([*WORDS, *PATHS, "--full", "--help", "--optimizer"]))
    some = [st.tuples(st.just(name), anything.map(lambda w: w[:4])) for name in cli.COMMANDS]
    some = [drawn.map(lambda t: [t[0], *t[1]]) for drawn in some]
    programs = {
        "train": lines_of(Options, *SMALL),
        "ladder": st.one_of(lines_of(Ladder, *SMALL[:1]), lines_of(Options, *SMALL)),
        "analyze": of_runs(lines_of(Analysis, *FEW)),
        "plot": of_runs(lines_of(Plot, ("--y", "loss"), ("--x", "step"))),
        "flow": of_runs(lines_of(FlowOptions, ("--steps", "1"), ("--kind", "gradient"))),
    }
    whole = [words.map(lambda w, name=name: [name, *w]) for name, words in programs.items()]
    return st.one_of(whole[0], whole[0], *whole, st.one_of(*some), anything)


def furnish(arena: Arena, folder: Path) -> None:
    """A folder in which the hostile paths lead to what they name."""
    from PIL import Image

    shutil.copytree(arena.half, folder / "half", symlinks=True)
    shutil.copytree(arena.finished, folder / "finished", symlinks=True)
    shutil.copy(arena.data.removeprefix("npz:"), folder / "tiny.npz")
    (folder / "file").write_text("content")
    (folder / "folder" / "train" / "class").mkdir(parents=True)
    for part in ("train", "test"):
        (folder / "pictures" / part / "a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "pictures" / part / "a" / "0.png")
    (folder / "script.py").write_text("closure = 3\n")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "unreadable").write_text("")
    (folder / "unreadable").chmod(0)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """The files below a folder, but for locks, with sizes and times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name != ".lock":
            facts = path.lstat()
            found[str(path)] = (facts.st_size, 0 if path.is_dir() else facts.st_mtime_ns)
    return found


def confined(patch: pytest.MonkeyPatch) -> None:
    """Let this process have little memory, no network, no children and few steps."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + TIGHT, most))
    patch.setattr(memory, "available", lambda device: SAID)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        patch.setenv(name, "http://127.0.0.1:9")
    patch.setattr(launch.Launcher, "run", lambda self: 0)
    patch.setattr(runner.Runner, "run", lambda self: 0)
    patch.setattr(summary, "draw_all", lambda *a: [])
    tiny_runs.interrupt_after(patch, 2)


def lines(arena: Arena) -> Attack:
    """Command lines with hostile values, right ones among them, in any order."""

    def check(words: list[str]) -> None:
        place = arena.clean("words") / "a" / "b" / "c"  # for paths such as ../..
        place.mkdir(parents=True)
        furnish(arena, place)
        before = listing(arena.scratch / "words")

        def work() -> int:
            patch = pytest.MonkeyPatch()
            with inside(place), without_figures():
                confined(patch)
                return cli.main(words)

        status, text = forked(work)
        judged(status, text)
        if status == 2:
            after = listing(arena.scratch / "words")
            changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
            assert not changed, f"status 2, and {sorted(changed)[:3]} changed: {text[-SHOWN:]}"

    kept = ["ladder", "--first-seed=--"], ["analyze", "x" * 5000], ["train", "--data=npz:~nobody/x"]
    return Attack(command_lines(), check, kept)


VARIABLES = {  # names: values
    "FBOPT_BACKEND": ["reference", "kernels", "nonsense", " ", "λ"],
    "FBOPT_CUDA": ["0", "1", "nonsense", ""],
    "FBOPT_CACHE_DIR": [
        "", "/dev/null", "/no/such", "x" * 5000, "λ", "a\nb", "file", "loop", "\udcff",
    ],
    "FBOPT_BUILD_MINUTES FBOPT_WAIT_MINUTES": ["0", "-1", "nan", "inf", "x", ""],
    "FBOPT_WERROR": ["x", "1"],
    "FBOPT_PARENT": ["x", "-1", "", "99999999999999999999"],
    "MAX_JOBS": ["0", "x", "-1", "9" * 5000, ""],
    "CXX": ["nonsense", "'", "/dev/null", "false", "sleep", "\udcff", "λ"],
    "CXXFLAGS": ["'", "--nonsense"],
    "CUDA_HOME": ["nonsense", "\udcff"],
    "COLUMNS": ["0", "1", "-5", "x", "9" * 30, "3"],
    "LINES": ["0", "x"],
    "TERM": ["", "dumb", "nonsense"],
    "LANG LC_ALL": ["", "C", "POSIX", "nonsense", "de_DE.ISO-8859-1"],
    "PYTHONIOENCODING": ["ascii", "latin-1", "utf-16", "cp037", "ascii:strict", "utf-8:strict"],
    "PYTHONUTF8": ["0", "1"],
    "PYTHONWARNINGS": ["error", "nonsense"],
    "PYTHONOPTIMIZE": ["2"],
    "PYTHONDEVMODE": ["1"],
    "PYTHONDONTWRITEBYTECODE": ["1"],
    "TMPDIR": ["/no/such", "/dev/null", "", "x" * 5000, "file"],
    "HOME XDG_CACHE_HOME": [None, "", "nonsense", "/dev/null", "/no/such", "~"],
    "OMP_NUM_THREADS MKL_NUM_THREADS": ["abc", "0", "-1", "999999", "", "1,2,3"],
    "OMP_SCHEDULE": ["nonsense"],
    "TORCHELASTIC_RUN_ID": ["x", ""],
    "RANK WORLD_SIZE LOCAL_RANK": ["x", "-1", "0", "1", ""],
    "MASTER_ADDR MASTER_PORT": ["", "localhost", "x", "99999"],
    "PATH": [None, "", "nonsense"],
    "MPLBACKEND": ["nonsense", "agg", ""],
    "MPLCONFIGDIR": ["/dev/null", "file"],
    "CUDA_VISIBLE_DEVICES": ["x", "-1", ""],
    "GLIBC_TUNABLES": ["nonsense", "glibc.malloc.check=3"],
    "MALLOC_MMAP_MAX_": ["x"],
    "ATEN_CPU_CAPABILITY": ["default", "nonsense"],
    "TZ": ["nonsense", ""],
    "NO_COLOR": ["1"],
    "USER": [None, ""],
}  # fmt: skip
ENVIRONMENT = {name: values for names, values in VARIABLES.items() for name in names.split()}
PROGRAMS = [
    "train --data npz:tiny.npz --recipe fb --width 2 --steps 2 --processes 1 --out new",
    "train --data npz:tiny.npz --recipe fb --width 2 --steps 2 --processes 2 --out new",
    "train --data npz:λ.npz", "train --resume half", "fingerprint half finished",
    "analyze half --measures sharpness --max-products 3 --eigenvalues 1",
    "plot half finished --y loss --out new.png", "flow finished --steps 1",
    "recipes", "train --help", "doctor", "fingerprint half", "recipes --scale small",
    "ladder --data npz:tiny.npz --rows fb --seeds 1 --share 0.01 --width 2 --out new", "--help",
    "check script.py", "nonsense",
]  # fmt: skip


def environments(arena: Arena) -> Attack:
    """Variables of the environment with hostile values, or without one, for every program."""

    def check(case: tuple[str, dict[str, str | None]]) -> None:
        words, changes = case
        place = arena.clean("environment")
        place.mkdir()
        furnish(arena, place)
        plain = {"PYTHONPATH": str(ROOT), "FBOPT_BACKEND": "reference", "OMP_NUM_THREADS": "1"}
        values = {k: v for k, v in (os.environ | plain | changes).items() if v is not None}
        command = [sys.executable, "-m", "fbopt.cli", *words.split()]
        done = subprocess.run(
            command, cwd=place, env=values, capture_output=True, timeout=SECONDS,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        judged(done.returncode, (done.stdout + done.stderr).decode(errors="replace"))

    drawn = st.lists(st.sampled_from(sorted(ENVIRONMENT)), min_size=1, max_size=4, unique=True)
    changes = drawn.flatmap(
        lambda names: st.fixed_dictionaries({n: st.sampled_from(ENVIRONMENT[n]) for n in names})
    )
    kept = ("train --help", {"TORCHELASTIC_RUN_ID": "x", "RANK": "x"}), ("doctor", {"CXX": "'"})
    return Attack(st.tuples(st.sampled_from(PROGRAMS), changes), check, kept)


WAYS = ("fine", "closed", "full", "read only", "pipe", "ascii")


def arrange(number: int, way: str, after: int) -> None:
    """Let what is written to a descriptor of this process fail in a way; a pipe `after` bytes."""
    if way == "closed":
        os.close(number)
    elif way in ("full", "read only"):
        name, mode = ("/dev/full", os.O_WRONLY) if way == "full" else (os.devnull, os.O_RDONLY)
        os.dup2(os.open(name, mode), number)
    elif way == "pipe":
        reader, writer = os.pipe()
        if not os.fork():  # reads so much, then closes it
            os.close(writer)
            left = after
            while left > 0 and (found := os.read(reader, left)):
                left -= len(found)
            os._exit(0)
        os.close(reader)
        os.dup2(writer, number)
        os.close(writer)


def stream(number: int, way: str) -> TextIO | None:
    """What Python makes of a descriptor at its start."""
    if way == "closed":
        return None
    errors = "strict" if number == 1 else "backslashreplace"
    return open(
        number, "w", closefd=False, errors=errors, encoding=way if way == "ascii" else "utf-8"
    )


def outputs(arena: Arena) -> Attack:
    """Output that is closed, full, broken after some bytes, or cannot show what is printed."""
    programs = [
        "train --resume auto", "fingerprint half finished", "recipes", "train --help", "--help",
        "train --nonsense", "fingerprint nowhere", "check script.py",
        "analyze half --measures sharpness --max-products 3 --eigenvalues 1",
    ]  # fmt: skip

    def check(case: tuple[str, tuple[str, str, str], int]) -> None:
        program, ways, after = case
        place = arena.clean("output")
        place.mkdir()
        furnish(arena, place)
        folder = RunFolder(place / "half")

        def work() -> int:
            with inside(place), without_figures():
                for number, way in enumerate(ways):
                    arrange(number, way, after)
                sys.stdout, sys.stderr = (stream(number, ways[number]) for number in (1, 2))
                words = program.split()
                if words[0] == "train" and "auto" in words:
                    words[1:] = command_line(arena.options(folder.path, resume="auto"))
                status = cli.main(words)
                for kept in filter(None, (sys.stdout, sys.stderr)):  # as the interpreter does
                    kept.flush()
                return status

        status, text = forked(work)
        judged(status, text or "it had nowhere to say it")
        if "auto" in program:
            assert status in (0, 141)
            with without_figures():
                attempt(lambda: arena.go_on(folder))
            arena.check_outcome(folder)

    ways = st.tuples(st.sampled_from(WAYS[:4]), *[st.sampled_from(WAYS)] * 2)
    kept = [
        (words, ("fine", way, "fine"), 0) for words in ("recipes", "--help") for way in WAYS[2:]
    ]
    return Attack(st.tuples(st.sampled_from(programs), ways, st.integers(0, 600)), check, (*kept,))
