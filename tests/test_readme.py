"""The README does what it says: every Python snippet runs, every command exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_python_snippets_run_one_after_the_other():
    snippets = blocks("python")
    assert len(snippets) >= 6
    torch.manual_seed(0)
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert torch.isfinite(names["loss"])
    assert torch.isfinite(names["optimizer"].last_grad_norm)


def test_quick_start_trains():
    names: dict = {}
    torch.manual_seed(0)
    exec(compile(blocks("python")[0].replace("range(20)", "range(1)"), "README.md", "exec"), names)
    first = names["loss"]
    for _ in range(50):
        last = names["optimizer"].step(names["closure"])
    assert last < first


@pytest.mark.parametrize("verb", re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M))
def test_make_verbs_exist(verb):
    assert re.search(rf"^{verb}:", (ROOT / "Makefile").read_text(), re.M)


def commands():
    text = "\n".join(blocks("sh") + blocks("console")) + "\n".join(re.findall(r"`([^`]+)`", README))
    lines = re.findall(r"^(?:\$ )?(?:.*&& )?(fbopt (?:train|ladder)[^\n`#]*)", text, re.M)
    lines += [f"fbopt train {a}" for a in re.findall(r'make train ARGS="([^"]+)"', README)]
    return sorted({line.strip() for line in lines})


@pytest.mark.parametrize("command", commands())
def test_options_in_commands_are_known(command):
    from fbopt.train.config.options import Options
    from fbopt.train.config.parser import parse
    from fbopt.train.ladder.plan import Ladder, make_plan

    name, *words = shlex.split(command.replace("PATH", "somewhere"))[1:]
    if name == "ladder":
        make_plan(*parse("fbopt ladder", words, Ladder, Options))
    else:
        parse("fbopt train", words, Options)


def test_doctor_says_what_the_readme_shows(capsys):
    from fbopt import doctor

    doctor.main()
    labels = [
        [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
        for text in (capsys.readouterr().out, blocks("console")[0])
    ]
    assert labels[0][: len(labels[1])] == labels[1]
