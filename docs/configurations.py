"""Writes the pages of techniques and applications from the headers of recipes/configs: python docs/configurations.py"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from bp_torch.recipes import schedules

DOCS = Path(__file__).resolve().parent
CONFIGS = DOCS.parent / "recipes" / "configs" / "techniques"
NOTICE = "<!-- Written by `python docs/configurations.py` from recipes/configs. Change those. -->"
EPOCHS, STEPS = 150, 2850  # of the digits recipe: 1,167 training rows in batches of 64
RUNS = {
    "l1": "share of zeros by layer, from the report of its command with seed 10",
    "lr_finder": "loss against learning rate, from the report of its command with seed 10",
}
"""Figures that the techniques' own runs gave, copied from their reports."""
KEYS = "Topic|Formula|Command|Note|Source"


@dataclass
class Technique:
    name: str
    title: str
    fields: dict[str, list[str]]
    """The lines under each key of the header."""
    settings: str

    @staticmethod
    def of(path: Path) -> Technique:
        text = path.read_text("utf-8")
        header, _, settings = text.partition("\n\n")
        first, *rest = [line.removeprefix("#").removeprefix(" ") for line in header.splitlines()]
        fields: dict[str, list[str]] = {}
        key = ""
        for line in rest:
            if match := re.match(rf"({KEYS})\s+(.*)", line):
                key = match[1]
                fields[key] = [match[2]]
            elif key and line.strip():
                fields[key].append(line.strip())
            elif line.strip():
                first += " " + line.strip()
        return Technique(path.stem, first, fields, settings)

    @property
    def heading(self) -> str:
        head = re.split(r"[:.]\s|[:.]$", self.title)[0]
        return head if len(head) <= 48 else self.name.replace("_", " ")

    @property
    def topic(self) -> str:
        return " ".join(self.fields["Topic"])

    def schedule(self) -> tuple[list[float], str] | None:
        """The learning rates of the digits recipe with this schedule, and their unit; None if it has none to draw."""
        model = ((yaml.safe_load(self.settings) or {}).get("model") or {}).get("init_args") or {}
        node = model.get("schedule")
        if not node or node["class_path"].endswith("ReduceLROnPlateau"):
            return None
        optimizer = (model.get("optimizer") or {}).get("init_args") or {}
        interval = model.get("interval", "epoch")
        length = EPOCHS if interval == "epoch" else STEPS
        return schedules.curve(resolve(node), optimizer.get("lr", 0.003), length, interval), interval

    def page(self) -> str:
        lines = [NOTICE, "", f"# {self.heading}", "", self.title, "", f"Topic: {self.topic}", ""]
        lines += ["## Formula", "", *(f"    {line}" for line in self.fields["Formula"]), ""]
        if self.schedule() is not None:
            lines += [f"![learning rate by step or epoch](../figures/techniques/{self.name}.png)", ""]
        if self.name in RUNS:
            lines += [f"![{RUNS[self.name]}](../figures/techniques/{self.name}.png)", ""]
        lines += ["## Command", "", *(f"    {line}" for line in self.fields["Command"]), ""]
        if "Note" in self.fields:
            lines += [" ".join(self.fields["Note"]), ""]
        lines += ["## Configuration", "", f"`recipes/configs/techniques/{self.name}.yaml`", ""]
        lines += ["```yaml", self.settings.strip(), "```", ""]
        if "Source" in self.fields:
            lines += ["Source: " + " ".join(self.fields["Source"]), ""]
        return "\n".join(lines)


def resolve(node: Any) -> Any:
    """What `class_path` and `init_args` name, as a callable of the optimizer."""
    if not isinstance(node, dict) or "class_path" not in node:
        return node
    module, _, name = node["class_path"].rpartition(".")
    arguments = {key: resolve(value) for key, value in (node.get("init_args") or {}).items()}
    return functools.partial(getattr(importlib.import_module(module), name), **arguments)


def draw(name: str, rates: list[float], interval: str) -> Figure:
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(len(rates)), rates)
    axes.set_title(f"{name}: learning rate of the digits recipe", fontsize=11)
    axes.set_xlabel(interval if interval == "epoch" else "optimizer step")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure


def techniques() -> list[Technique]:
    return sorted((Technique.of(path) for path in CONFIGS.glob("*.yaml")), key=lambda t: (t.topic[:3], t.name))


def index(found: list[Technique]) -> str:
    lines = [NOTICE, "", "# Techniques", ""]
    lines += ["Each is a small YAML file that stacks on any recipe; several stack on one another, the later wins:", ""]
    lines += ["    bp-torch fit --config digits --config techniques/l1 --config techniques/cosine", ""]
    lines += ["| topic of the course | technique | what it does |", "|---|---|---|"]
    for t in found:
        lines.append(f"| {t.topic} | [{t.name}]({t.name}.md) | {t.title.replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, ""])


def applications() -> str:
    """The header of every recipe, as it stands in its file."""
    lines = [NOTICE, "", "# Applications", ""]
    lines += [
        "Real data, each recipe beside scikit-learn's models on the same rows, in the same run. What follows is the"
    ]
    lines += ["header of each configuration under `recipes/configs`; `make test-recipes` holds them to it.", ""]
    for path in sorted(CONFIGS.parent.glob("*.yaml")):
        header = path.read_text("utf-8").partition("\n\n")[0]
        text = [line.removeprefix("#").removeprefix(" ") for line in header.splitlines()]
        lines += [f"## {path.stem}", "", "```text", *text, "```", ""]
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """The text of each page by its path under docs/."""
    found = techniques()
    listed = {"applications.md": applications(), "techniques/index.md": index(found)}
    return listed | {f"techniques/{t.name}.md": t.page() for t in found}


def main() -> None:
    (DOCS / "techniques").mkdir(exist_ok=True)
    for path, text in pages().items():
        (DOCS / path).write_text(text, "utf-8")
    folder = DOCS / "figures" / "techniques"
    folder.mkdir(parents=True, exist_ok=True)
    for t in techniques():
        if (schedule := t.schedule()) is not None:
            draw(t.name, *schedule).savefig(folder / f"{t.name}.png", dpi=90)


if __name__ == "__main__":
    sys.exit(main())
