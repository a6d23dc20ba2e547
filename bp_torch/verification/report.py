"""What check() returns: a report that is true or false, and prints as a table, Markdown or JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["FAILED", "NOT_APPLICABLE", "NOT_FINISHED", "PASSED", "Report", "Result", "cell"]

PASSED, FAILED, NOT_APPLICABLE, NOT_FINISHED = "passed", "failed", "not applicable", "not finished"
STATES = (PASSED, FAILED, NOT_APPLICABLE, NOT_FINISHED)
_COLOURS = {PASSED: "green", FAILED: "bold red", NOT_APPLICABLE: "dim", NOT_FINISHED: "yellow"}


@dataclass(frozen=True)
class Result:
    """One check's outcome."""

    name: str
    state: str
    """``"passed"``, ``"failed"``, ``"not applicable"`` or ``"not finished"`` (out of time)."""
    detail: str = ""
    """What is wrong; or why it does not apply or did not finish; or a note; in one line."""
    means: str = ""
    """Of a failure: what it means for training, in one line."""
    example: dict[str, str] = field(default_factory=dict)
    """Of a failure: the smallest inputs found that show it, by name: shape, strides, dtype, values."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """The outcome of every check of one subject. It is true if one passed, none failed and none ran out of time."""

    subject: str
    inputs: dict[str, str]
    results: tuple[Result, ...]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> tuple[Result, ...]:
        return tuple(r for r in self.results if r.state == FAILED)

    @property
    def unfinished(self) -> tuple[Result, ...]:
        return tuple(r for r in self.results if r.state == NOT_FINISHED)

    @property
    def clean(self) -> bool:
        """Whether nothing failed or ran out of time, be it that nothing applied."""
        return not self.failures and not self.unfinished

    def __bool__(self) -> bool:
        return self.clean and self.count(PASSED) > 0

    def __getitem__(self, name: str) -> Result:
        """The result of a check by its name."""
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(name)

    def count(self, state: str) -> int:
        return sum(r.state == state for r in self.results)

    @property
    def summary(self) -> str:
        counts = [f"{self.count(state)} {state}" for state in STATES if self.count(state)]
        nothing = self.count(NOT_APPLICABLE) == len(self.results)
        return f"{self.subject}: {', '.join(counts)}{', so nothing was checked' if nothing and counts else ''}"

    def __repr__(self) -> str:
        return f"<Report {self.summary}>"

    def __str__(self) -> str:
        width = max((len(r.name) for r in self.results), default=0)
        state_width = max((len(r.state) for r in self.results), default=0)
        rows = [f"{r.name:<{width}}  {r.state:<{state_width}}  {r.detail}".rstrip() for r in self.results]
        return "\n".join([f"check {self.subject}", *rows, *self._explained(), self.summary])

    def explanation(self) -> str:
        """The failures alone, as text."""
        return "\n".join([*self._explained(), self.summary])

    def _explained(self) -> list[str]:
        lines = []
        for r in self.failures + self.unfinished:
            lines += [f"{r.state}: {r.name}", *_wrapped("wrong", r.detail)] if r.state == FAILED else []
            if r.state == NOT_FINISHED:
                lines += [f"{r.state}: {r.name}", *_wrapped("why", r.detail)]
            if r.means:
                lines += _wrapped("means", r.means)
            for name, text in r.example.items():
                lines += _wrapped("at", f"{name}: {text}")
        return lines

    def __rich__(self) -> Any:
        """A table for rich.print()."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"check {self.subject}", title_justify="left", title_style="bold")
        table.add_column("check", no_wrap=True)
        table.add_column("state", no_wrap=True)
        table.add_column("what was found")
        for r in self.results:
            table.add_row(r.name, Text(r.state, style=_COLOURS[r.state]), Text(r.detail))
        return Group(table, *(Text(row) for row in [*self._explained(), self.summary]))

    def show(self) -> None:
        """Print: by rich if it is installed, else as aligned text."""
        try:
            import rich
        except ImportError:
            print(self)
        else:
            rich.print(self)

    def to_markdown(self) -> str:
        lines = [f"## {self.subject}", ""]
        lines += [f"- {name}: {text}" for name, text in self.inputs.items()]
        lines += ["", "| check | state | what was found |", "|---|---|---|"]
        for r in self.results:
            state = f"**{r.state}**" if r.state in (FAILED, NOT_FINISHED) else r.state
            lines.append(f"| {r.name} | {state} | {cell(r.detail)} |")
        for r in self.failures:
            lines += ["", f"### {r.name}", "", r.detail, "", f"What it means: {r.means}.", ""]
            lines += [f"- {name}: {text}" for name, text in r.example.items()]
        lines += ["", self.summary + ".", ""]
        lines += [", ".join(f"{key} {value}" for key, value in self.environment.items()), ""]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {"passed": bool(self), **asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def save(self, path: str | Path) -> None:
        """Write the report: Markdown to a path that ends in .md, JSON to one that ends in .json.

        Raises:
            ValueError: another ending.
        """
        path = Path(path)
        if path.suffix not in (".md", ".json"):
            raise ValueError(f"save(): 'path': expected a name that ends in .md or .json, got {path.name!r}")
        path.write_text(self.to_markdown() if path.suffix == ".md" else self.to_json(), encoding="utf-8")


def _wrapped(label: str, text: str) -> Sequence[str]:
    return textwrap.wrap(text, 110, initial_indent=f"  {label:<5}  ", subsequent_indent=" " * 9) or [f"  {label}"]


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
