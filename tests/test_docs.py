"""The README and the site are true: Python blocks run; commands, options, files and links exist."""

from __future__ import annotations

import contextlib
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fbopt import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in PAGES}
# Pages whose Python blocks need a library that is optional.
NEEDS = {"docs/guides/integrations.md": ["lightning", "accelerate", "transformers"]}
EVERYTHING = "\n".join(TEXTS.values())


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[page], re.S | re.M)


def code() -> set[str]:
    """Lines of code blocks, fenced or indented, and what stands between single backquotes."""
    text = re.sub(r" *\\\n *", " ", EVERYTHING)  # a backslash at the end joins two lines
    fenced = re.findall(r"^```(?:sh|console)\n(.*?)^```", text, re.S | re.M)
    lines = "\n".join(fenced).splitlines() + re.findall(r"^    (.*)", text, re.M)
    lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    return {line.partition("  #")[0].removeprefix("$ ").strip() for line in lines}


def commands() -> list[str]:
    """Every command line of fbopt, also through make and torchrun, from its subcommand on."""
    found = set()
    for line in code():
        if match := re.match(r"(?:.*(?:; do|&&) )?fbopt ([a-z]+(?: [^;…]*)?)", line):
            found.add(match[1])
        if match := re.search(r'make train ARGS="([^"]+)"', line):
            found.add(f"train {match[1]}")
        if match := re.search(r"-m fbopt\.train (--.*)", line):
            found.add(f"train {match[1]}")
    return sorted(command.strip() for command in found)


def help_of(capsys, *words: str) -> str:
    """What --help prints after these words, which have to be right."""
    capsys.readouterr()
    with contextlib.suppress(SystemExit) as done:
        done = cli.main([*words, "--help"])
    text = capsys.readouterr()
    assert not done and text.out, text.err
    return text.out


@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(page, "python")])
def test_python_blocks_run_one_after_the_other(page, monkeypatch, tmp_path):
    for library in NEEDS.get(page, []):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)  # for what trainers write
    torch.manual_seed(0)
    names: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)
    assert torch.isfinite(torch.as_tensor(names.get("loss", 0.0))).all()


def test_quick_start_trains():
    (block,) = blocks("README.md", "python")
    assert len(block.splitlines()) <= 15
    names: dict = {}
    torch.manual_seed(0)
    exec(compile(block.replace("range(20)", "range(1)"), "README.md", "exec"), names)
    first = names["loss"]
    for _ in range(50):
        last = names["optimizer"].step(names["closure"])
    assert last < first


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 140


def test_make_verbs_exist():
    verbs = {m for line in code() for m in re.findall(r"^make ([a-z-]+)", line)}
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"train", "test", "docs", "lint"} <= verbs <= known


@pytest.mark.parametrize("command", commands())
def test_commands_and_options_exist(command, capsys):
    name, *words = shlex.split(command.replace("RECIPE", "fb").replace(" CHANGE", ""))
    words = [word for word in words if word != "--help"]
    known = help_of(capsys, name, *words)
    known += help_of(capsys, "train") if name == "ladder" else ""
    for option in [word for word in words if word.startswith("--")]:
        assert re.search(rf"{option}(?![\w-])", known), f"fbopt {name} has no {option}"


def test_options_that_are_named_exist(capsys):
    commands = ("train", "ladder", "analyze", "plot", "flow")
    known = "".join(help_of(capsys, name) for name in commands)
    known += "--max-restarts --rdzv-conf"  # torchrun's
    named = {option for line in code() for option in re.findall(r"^--[a-z0-9-]+", line)}
    assert len(named) > 40
    assert not {option for option in named if not re.search(rf"{option}(?![\w-])", known)}


def test_modules_that_are_run_exist():
    pattern = r"python -m ((?:fbopt|benchmarks)[\w.]*)"
    modules = {module for line in code() for module in re.findall(pattern, line)}
    assert len(modules) > 3
    assert not {module for module in modules if find_spec(module) is None}


def test_files_that_are_linked_exist():
    missing = {
        f"{page}: {target}"
        for page, text in TEXTS.items()
        for target in re.findall(r"\]\(([^)#\s]+)", text)
        for path in [_linked(page, target)]
        if path and not path.exists()
    }
    assert not missing


def _linked(page: str, target: str) -> Path | None:
    """The file of this repository that a link means, None for other sites."""
    if own := re.match(r"https://github\.com/fbopt/fbopt/(?:blob|tree)/main/(.*)", target):
        return ROOT / own[1]
    return None if "://" in target else (ROOT / page).parent / target


def test_doctor_prints_the_findings_that_install_shows(capsys):
    from fbopt import doctor

    doctor.main()
    printed, (shown,) = capsys.readouterr().out, blocks("docs/install.md", "console")
    labels = re.findall(r"^  (\S+(?: \S+)*)  ", shown, re.M)
    assert len(labels) > 5
    assert not [label for label in labels if f"\n  {label} " not in printed]
