"""A run that is killed, by a real SIGKILL, ends as one that was not: weights, optimizer, schedule, history, by bits."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
from bp_torch import cli
from bp_torch.recipes.modules import Classifier

ONE_BACKEND = "what a run keeps on disk depends on no backend"

EPOCHS = 4
SMALL = [
    "fit",
    *("--config", "digits"),
    *("--model.network.hidden_features", "[16,16]"),
    *("--data.batch_size", "256"),
    *("--trainer.max_epochs", str(EPOCHS)),
    *("--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false"),
    *("--baselines", "false"),
    *("--report", "false"),
]

# Children are forked from a server that has imported everything once.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["bp_torch.recipes.cli"])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_until(point: str, count: int, arguments: list[str]) -> None:
    """Run the command, and be killed when `point` is reached for the `count`-th time."""
    left = [count]

    def reached() -> bool:
        left[0] -= 1
        return left[0] == 0

    save, replace, step = torch.save, os.replace, Classifier.training_step

    def save_half(checkpoint: Any, file: Any) -> None:
        save(checkpoint, file)
        if reached():
            file.truncate(file.tell() // 2)
            file.flush()
            die()

    def replace_and_die(source: Any, target: Any) -> None:
        if Path(target).suffix != ".ckpt":
            return replace(source, target)
        if point == "before rename" and reached():
            die()
        replace(source, target)
        if point == "after rename" and reached():
            die()

    def step_and_die(self: Classifier, batch: Any, batch_idx: int) -> torch.Tensor:
        if reached():
            die()
        return step(self, batch, batch_idx)

    if point == "half written":
        torch.save = save_half
    elif point == "in an epoch":
        Classifier.training_step = step_and_die
    else:
        os.replace = replace_and_die
    cli.main(arguments)


def start(target: Any, *arguments: Any) -> Any:
    child = processes.Process(target=target, args=arguments)
    child.start()
    return child


def run(target: Any, *arguments: Any) -> int | None:
    child = start(target, *arguments)
    child.join()
    return child.exitcode


def command(root: Path, *more: str) -> list[str]:
    return [*SMALL, "--trainer.default_root_dir", str(root), *more]


def load(root: Path, name: str) -> dict[str, Any]:
    return torch.load(root / "version_0" / "checkpoints" / f"{name}.ckpt", weights_only=True)


def without_times(state: Any) -> Any:
    """A checkpoint's contents in comparable form: every tensor's bytes, every number, but for the seconds taken."""
    if isinstance(state, torch.Tensor):
        return str(state.dtype), tuple(state.shape), state.numpy().tobytes()
    if isinstance(state, dict):
        return {key: without_times(value) for key, value in state.items() if key != "seconds"}
    if isinstance(state, (list, tuple)):
        return [without_times(value) for value in state]
    return state


def assert_same(root: Path, other: Path) -> None:
    for name in ("best", "last"):
        one, two = load(root, name), load(other, name)
        one_loops, two_loops = one.pop("loops"), two.pop("loops")  # they count restarts as well
        assert without_times(one) == without_times(two)
        assert without_times(one_loops["fit_loop"]["epoch_progress"]["current"]) == without_times(
            two_loops["fit_loop"]["epoch_progress"]["current"]
        )
    table, other_table = ((path / "version_0" / "metrics.csv").read_text().splitlines() for path in (root, other))
    assert table[0].endswith(",seconds")
    assert [line.rpartition(",")[0] for line in table] == [line.rpartition(",")[0] for line in other_table]
    assert not list(root.glob("version_1"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("uninterrupted")
    assert run(cli.main, command(root)) == 0
    assert len((root / "version_0" / "metrics.csv").read_text().splitlines()) == 1 + EPOCHS
    return root


@pytest.mark.parametrize(
    ("point", "count"),
    [
        ("in an epoch", 2),  # before there is a checkpoint
        ("in an epoch", 13),  # the third epoch of five batches
        ("half written", 3),  # best.ckpt
        ("half written", 4),  # last.ckpt
        ("before rename", 4),
        ("after rename", 3),  # best.ckpt is of this epoch, last.ckpt of the one before
        ("after rename", 2),
    ],
)
def test_killed_at(point: str, count: int, uninterrupted: Path, tmp_path: Path) -> None:
    assert run(train_until, point, count, command(tmp_path)) == -signal.SIGKILL
    assert run(cli.main, command(tmp_path, "--ckpt_path", "last")) == 0
    assert_same(tmp_path, uninterrupted)


def test_killed_again_and_again_at_any_moment(uninterrupted: Path, tmp_path: Path) -> None:
    moments = random.Random(0)
    again: list[str] = []
    for _ in range(6):
        child = start(cli.main, command(tmp_path, *again))
        while not (tmp_path / "version_0").exists() and child.is_alive():
            time.sleep(0.01)
        child.join(moments.uniform(0.0, 1.5))
        child.kill()
        child.join()
        again = ["--ckpt_path", "last"]
    assert run(cli.main, command(tmp_path, *again, "--report", "true")) == 0
    assert_same(tmp_path, uninterrupted)
    assert f"| epochs run | {EPOCHS}, " in (tmp_path / "version_0" / "report.md").read_text()


SCHEDULES = {
    "plateau": ("torch.optim.lr_scheduler.ReduceLROnPlateau", {"patience": 0, "threshold": 10.0}, "epoch"),
    "exponential": ("torch.optim.lr_scheduler.ExponentialLR", {"gamma": 0.5}, "epoch"),
    "one-cycle": ("torch.optim.lr_scheduler.OneCycleLR", {"max_lr": 0.01, "total_steps": 20}, "step"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_goes_on(name: str, tmp_path: Path) -> None:
    class_path, init_args, interval = SCHEDULES[name]
    schedule = ["--model.schedule", class_path, "--model.interval", interval]
    schedule += [f"--model.schedule.{key}={value}" for key, value in init_args.items()]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(cli.main, command(whole, *schedule)) == 0
    assert run(train_until, "in an epoch", 13, command(killed, *schedule)) == -signal.SIGKILL
    assert run(cli.main, command(killed, *schedule, "--ckpt_path", "last")) == 0
    assert_same(killed, whole)
    rates = [row["lr"] for row in load(whole, "last")["callbacks"]["History"]["rows"]]
    assert len(set(rates)) > 2  # the schedule did change the rate


def test_finished_runs_do_not_train_on(uninterrupted: Path, tmp_path: Path) -> None:
    """Neither one that reached its last epoch nor one that stopped early."""
    finished, stopped = tmp_path / "finished", tmp_path / "stopped"
    shutil.copytree(uninterrupted, finished)
    assert run(cli.main, command(finished, "--ckpt_path", "last")) == 0
    assert_same(finished, uninterrupted)
    early = ("--early_stopping.patience", "1", "--early_stopping.min_delta", "100")
    assert run(cli.main, command(stopped, *early)) == 0
    weights = without_times(load(stopped, "last")["state_dict"])
    assert run(cli.main, command(stopped, *early, "--ckpt_path", "last", "--report", "true")) == 0
    assert without_times(load(stopped, "last")["state_dict"]) == weights
    report = (stopped / "version_0" / "report.md").read_text()
    assert "| epochs run | 2, tested after epoch 2 |" in report
    assert "| why it stopped | val_loss had not improved for 1 epochs |" in report


def test_a_second_run_gets_its_own_folder(uninterrupted: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    shutil.copytree(uninterrupted, root)
    before = {path: path.read_bytes() for path in (root / "version_0").rglob("*") if path.is_file()}
    assert run(cli.main, command(root, "--trainer.max_epochs", "1")) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (root / "version_1" / "checkpoints" / "last.ckpt").is_file()


LONGER = {
    "cosine": ["--model.schedule", "torch.optim.lr_scheduler.CosineAnnealingLR", "--model.schedule.T_max=0"],
    "one-cycle": [
        *("--model.schedule", "torch.optim.lr_scheduler.OneCycleLR", "--model.schedule.total_steps=0"),
        *("--model.schedule.max_lr=0", "--model.interval", "step"),
    ],
}


@pytest.mark.parametrize("name", LONGER)
def test_resumed_for_longer(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From there on the rates, and momenta, are those of a run that was planned as long."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run(cli.main, command(whole, *LONGER[name], "--trainer.max_epochs", "4")) == 0
    assert run(cli.main, command(resumed, *LONGER[name], "--trainer.max_epochs", "2")) == 0
    assert cli.main(command(resumed, *LONGER[name], "--trainer.max_epochs", "4", "--ckpt_path", "last")) == 0
    unit = "epochs" if name == "cosine" else "steps"
    assert f"{unit} long and is now" in capsys.readouterr().err
    one, two = load(whole, "last"), load(resumed, "last")
    rates = [[rate for step, rate in c["callbacks"]["History"]["rates"].tolist() if step >= 10] for c in (one, two)]
    assert rates[0] == rates[1]
    assert without_times(one["lr_schedulers"]) == without_times(two["lr_schedulers"])
    groups = [c["optimizer_states"][0]["param_groups"] for c in (one, two)]
    assert groups[0] == groups[1]


def test_resumed_for_less_than_was_done(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    shutil.copytree(uninterrupted, root)
    assert cli.main(command(root, "--trainer.max_epochs", "2", "--ckpt_path", "last")) == 2
    assert "trainer.max_epochs: 2 is below the 4 epochs that the run has done" in capsys.readouterr().err
    assert_same(root, uninterrupted)
