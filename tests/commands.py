"""Options of `bp-torch` that tests share, and what runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]

FIT_ALONE = [*QUIET, *("--trainer.logger", "false"), *("--baselines", "false"), *("--report", "false")]
"""Nothing beside the fit: no display, no log, no baselines, no report."""


def fit(name: str, *options: str) -> Any:
    """The outcome of `bp-torch fit`."""
    from bp_torch.recipes import cli

    outcome = cli.run(["fit", "--config", name, *QUIET, *options])
    assert outcome is not None
    return outcome


def repeat(name: str, *options: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The results of `summary.json`: by model, by metric, its mean, deviation and values."""
    from bp_torch import cli

    assert cli.main(["repeat", "--config", name, *QUIET, *options]) == 0
    return json.loads((Path("runs") / name / "summary.json").read_text())["results"]


def check_report(outcome: Any, *names: str) -> None:
    """These figures stand in the report and are not empty."""
    report = (outcome.run / "report.md").read_text()
    for name in names:
        assert f"(figures/{name}.png)" in report
        assert (outcome.run / "figures" / f"{name}.png").stat().st_size > 5000
