"""Training on several processes: for the same global batch one process's metrics, one report and set of files."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
from test_resume import command, load, run

from bp_torch import cli
from bp_torch.recipes.callbacks import EpochSeeds

ONE_BACKEND = "what processes share depends on no backend"

PLAIN = ["--config", "techniques/no_batch_norm", "--model.network.dropout", "0", "--data.augment", "null"]
PLAIN += ["--trainer.max_epochs", "2", "--report", "true"]


def shared(processes: int, strategy: str = "ddp") -> list[str]:
    """256 rows of all together."""
    options = ["--trainer.devices", str(processes), "--trainer.strategy", strategy]
    return [*options, "--data.batch_size", str(256 // processes)]


def start(root: Path, *more: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "bp_torch.cli", *command(root, *PLAIN, *more)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        arguments, stdout=pipe, stderr=pipe, text=True, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def rows(root: Path) -> list[dict[str, float]]:
    with (root / "version_0" / "metrics.csv").open() as file:
        return [
            {name: float(value) for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)
        ]


def assert_near(root: Path, other: Path) -> None:
    """Metrics, weights and files of two runs, up to the order in which numbers were added."""
    found, expected = rows(root), rows(other)
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
    for name in ("best", "last"):
        torch.testing.assert_close(
            load(root, name)["state_dict"], load(other, name)["state_dict"], rtol=1e-4, atol=1e-5
        )
    files = [
        sorted(str(p.relative_to(r)) for p in r.rglob("*") if p.is_file() and "tfevents" not in p.name)
        for r in (root, other)
    ]
    assert files[0] == files[1]
    assert [path.name for path in root.glob("version_*")] == ["version_0"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    assert run(cli.main, command(root, *PLAIN)) == 0
    return root


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("together")
    process = start(root, *shared(2))
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert out.count("this run") == 1
    return root


def test_two_processes(alone: Path, together: Path) -> None:
    """The last batch of an epoch has 143 rows, which two cannot share evenly; nor can they the 270 of validation."""
    assert_near(together, alone)
    tables = [
        [line for line in (r / "version_0" / "report.md").read_text().splitlines() if "this run" in line]
        for r in (together, alone)
    ]
    assert tables[0] == tables[1]


def test_spawned_processes(alone: Path, tmp_path: Path) -> None:
    process = start(tmp_path, *shared(2, "ddp_spawn"))
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert "why it stopped  max_epochs = 2 reached" in out
    assert_near(tmp_path, alone)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_resume_on_another_number_of_processes(processes: int, alone: Path, together: Path, tmp_path: Path) -> None:
    expected, root = tmp_path / "expected", tmp_path / "root"
    shutil.copytree(alone, expected)
    shutil.copytree(together, root)
    longer = [*PLAIN, "--trainer.max_epochs", "3", "--ckpt_path", "last"]
    assert run(cli.main, command(expected, *longer)) == 0
    many = shared(processes, "ddp_fork") if processes > 1 else []
    assert run(cli.main, command(root, *longer, *many)) == 0
    assert_near(root, expected)


def test_a_signal_ends_all_processes(tmp_path: Path) -> None:
    process = start(tmp_path, *shared(2), "--trainer.max_epochs", "1000")
    last = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    while not last.exists() and process.poll() is None:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    ranks = [int(number) for number in children.read_text().split()] if children.exists() else []
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    (line,) = err.splitlines()
    assert line.startswith("bp-torch: interrupted by SIGTERM after epoch ")
    assert out.count("this run") == 1
    assert (tmp_path / "version_0" / "report.md").exists()
    assert not [
        rank for rank in ranks if Path(f"/proc/{rank}/cmdline").exists() and Path(f"/proc/{rank}/cmdline").read_text()
    ]


def test_masks_are_of_seed_epoch_and_rank() -> None:
    def drawn(rank: int, epoch: int) -> torch.Tensor:
        callback: Any = EpochSeeds()
        callback.seed = 3
        callback.on_train_epoch_start(SimpleNamespace(current_epoch=epoch, global_rank=rank), None)
        return torch.rand(4)

    seen = {(rank, epoch): drawn(rank, epoch) for rank in range(3) for epoch in range(3)}
    assert len({tuple(values.tolist()) for values in seen.values()}) == 9
    assert drawn(1, 2).equal(seen[1, 2])


def test_repeat_is_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["repeat", "--config", "digits"]) == 2
    assert "start it as one process" in capsys.readouterr().err
