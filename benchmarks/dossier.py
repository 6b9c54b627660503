"""The results of the GPU check: one JSON file that stages update part by part, and its Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu import STAGES
from benchmarks.report import write_json
from benchmarks.tables import aligned, markdown

Part = dict[str, Any]
TITLES = {
    "build": "Build",
    "tests": "Tests marked cuda",
    "sanitize": "compute-sanitizer",
    "ops": "Kernels and the penalised chunk update",
    "finishing": "Finishing step",
    "graphs": "CUDA graphs",
    "step": "Whole steps",
}
NOTES = """\
Each row was compared with fbopt.reference before it was timed. Medians and quartiles over the
rounds; in each round every contender had its turn, in random order; ratios are of times measured in
the same round. GB/s are of float32 words counted by hand, read and written. Times of kernels and
finishing steps are the device's, between two events with the calls queued beforehand; "wall" is
from an idle device to an idle device, as are the times of graphs and whole steps."""


def merge(stem: Path, parts: Mapping[str, Part], command: str) -> Part:
    """Put stages into the results, beside those that are there; write both files."""
    path = Path(f"{stem}.json")
    content = json.loads(path.read_text()) if path.exists() else {"benchmark": "gpu_check"}
    stages = content.get("stages", {}) | parts
    content["command"] = command
    content["stages"] = {name: stages[name] for name in STAGES if name in stages}
    write_json(path, content)
    Path(f"{stem}.md").write_text(rendered(content))
    return content


def rendered(content: Part) -> str:
    """The Markdown."""
    stages = content["stages"]
    machine = next((p["machine"] for p in reversed(stages.values()) if "machine" in p), {})
    device = machine.get("device", machine.get("cpu", "unknown device"))
    rehearsal = "capability" not in machine
    title = f"# GPU check: {device}" + " (a rehearsal: no GPU, no figures)" * rehearsal
    blocks = [title, f"    {content['command']}"]
    blocks.append("\n".join(f"- {key}: {value}" for key, value in machine.items()))
    blocks += [NOTES, "## Summary", overview(stages)]
    if table := goals(stages):
        blocks.append(table)
    for name, part in stages.items():
        blocks += [f"## {TITLES[name]}", *section(part)]
    return "\n\n".join(blocks) + "\n"


def section(part: Part) -> list[str]:
    """One stage's part: how it ended, its facts and tables."""
    blocks = [f"{part['status']}{': ' * bool(part['why'])}{part['why']}", f"    {part['command']}"]
    facts = part.get("facts", {})
    lines = [f"- {what}: {value}" for what, value in facts.items() if "\n" not in value]
    blocks += ["\n".join(lines)] if lines else []
    blocks += [f"{what}:\n\n{_indented(value)}" for what, value in facts.items() if "\n" in value]
    blocks += [_indented(part["output"])] if "output" in part else []
    for table in part.get("tables", []):
        rounds = f"n = {table['rows'][0]['rounds']} rounds"
        blocks += [f"### {table['title']}", rounds, markdown(table["rows"], table["base"])]
    return blocks


def overview(stages: Mapping[str, Part]) -> str:
    """How each stage ended."""
    lines = [["stage", "", "seconds", "why"], ["---"] * 4]
    for name, part in stages.items():
        lines.append([name, part["status"], f"{part['seconds']:.0f}", part["why"][:200]])
    return aligned(lines)


def goals(stages: Mapping[str, Part], only_bound: bool = False) -> str:
    """All ratios, with what they should be; "" where there are none."""
    lines = [["stage", "of", "", "value", "goal", ""], ["---"] * 6]
    for name, part in stages.items():
        for goal in part.get("goals", []):
            if goal["goal"] or not only_bound:
                met = {True: "met", False: "MISSED", None: ""}[goal["met"]]
                value = f"{goal['value']:.3f}"
                lines.append([name, goal["about"], goal["claim"], value, goal["goal"] or "", met])
    return aligned(lines) if len(lines) > 2 else ""


def printed(content: Part, parts: Mapping[str, Part]) -> str:
    """The end of the output: the goals that have a bound, and how the stages just run ended."""
    table = goals({name: content["stages"][name] for name in parts}, only_bound=True)
    return "\n".join(["\n== goals", table or "none", "\n== stages", overview(parts)])


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
