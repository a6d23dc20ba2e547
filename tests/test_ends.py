"""How a run ends early: weights that become NaN, a signal, a full disk. Nothing good is overwritten."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
from test_resume import SMALL, assert_same, command, load, run, uninterrupted  # noqa: F401  a fixture

from bp_torch import cli
from bp_torch.recipes.data import Digits
from bp_torch.recipes.modules import Classifier

ONE_BACKEND = "how a run ends depends on no backend"


def fit(root: Path, *more: str) -> int:
    return cli.main(command(root, *more))


def spoil_in_epoch(monkeypatch: pytest.MonkeyPatch, number: int, value: float, what: str = "weight") -> None:
    """From the first step of that epoch on, counted from 0, one number of the network is `value`."""
    step = Classifier.training_step

    def spoiled(self: Classifier, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.current_epoch == number:
            network: Any = self.network
            with torch.no_grad():
                target = network.output.weight if what == "weight" else network.hidden1.norm.running_mean
                target.view(-1)[0] = value
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", spoiled)


def is_finite(checkpoint: dict[str, Any]) -> bool:
    return all(bool(t.isfinite().all()) for t in checkpoint["state_dict"].values())


@pytest.mark.parametrize("monitor", ["null", "val_loss"])
@pytest.mark.parametrize(("value", "what"), [(float("nan"), "weight"), (float("inf"), "buffer")])
def test_weights_that_are_not_finite_are_not_saved(
    monitor: str,
    value: float,
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil_in_epoch(monkeypatch, 2, value, what)
    assert fit(tmp_path, "--checkpoints.monitor", monitor, "--report", "true") == 1
    for name in ("best", "last"):
        assert is_finite(load(tmp_path, name))
    assert load(tmp_path, "last")["epoch"] == 1
    told = capsys.readouterr()
    assert "this run" in told.out
    (line,) = told.err.splitlines()
    assert line.startswith("bp-torch: error: epoch 3 left network.")
    assert "NaN or infinite, and was not saved; tested after epoch" in line
    assert line.endswith("go on with --ckpt_path last")
    report = (tmp_path / "version_0" / "report.md").read_text()
    assert "| why it stopped | epoch 3 left network." in report
    monkeypatch.undo()
    assert fit(tmp_path, "--checkpoints.monitor", monitor, "--ckpt_path", "last") == 0
    assert load(tmp_path, "last")["epoch"] == 3


def test_nan_in_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = Digits.load

    def load_nan(self: Digits) -> Any:
        x, y = loaded(self)
        x = x.copy()
        x[:, 0, 3, 3] = float("nan")
        return x, y

    monkeypatch.setattr(Digits, "load", load_nan)
    assert fit(tmp_path) == 1
    assert not list(tmp_path.rglob("*.ckpt"))
    (line,) = capsys.readouterr().err.splitlines()
    assert "epoch 1 left network." in line
    assert line.endswith("no epoch was saved")


def test_an_infinite_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path, "--model.optimizer.lr", ".inf") == 1
    assert not list(tmp_path.rglob("*.ckpt"))
    assert "no epoch was saved" in capsys.readouterr().err


def test_a_metric_that_is_not_finite_ends_a_run_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Classifier.loss_and_metrics

    def measured(self: Classifier, batch: Any) -> Any:
        loss, metrics = whole(self, batch)
        return (loss if self.training or self.current_epoch < 2 else loss * float("nan")), metrics

    monkeypatch.setattr(Classifier, "loss_and_metrics", measured)
    assert fit(tmp_path, "--checkpoints.monitor", "val_loss") == 1
    assert "val_loss = nan is not finite" in capsys.readouterr().err
    assert is_finite(load(tmp_path, "best"))
    assert load(tmp_path, "best")["epoch"] == 1


def send_in_step(number: int, count: int, arguments: list[str], standard_error: Path) -> None:
    """Run the command, and get a signal in its `count`-th training step."""
    left, step = [count], Classifier.training_step

    def sent(self: Classifier, batch: Any, batch_idx: int) -> torch.Tensor:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        return step(self, batch, batch_idx)

    Classifier.training_step = sent  # type: ignore[method-assign]
    with standard_error.open("w") as file:
        os.dup2(file.fileno(), 2)
        raise SystemExit(cli.main(arguments))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(number: signal.Signals, uninterrupted: Path, tmp_path: Path) -> None:  # noqa: F811
    """The third epoch of five batches is lost, and no more; the run goes on to the same bits."""
    told = tmp_path / "told"
    assert run(send_in_step, number, 13, command(tmp_path, "--report", "true"), told) == 128 + number
    assert told.read_text().splitlines()[-1:] == [
        f"bp-torch: interrupted by {number.name} after epoch 2; tested after epoch 2; go on with --ckpt_path last"
    ]
    assert f"interrupted by {number.name} after epoch 2 |" in (tmp_path / "version_0" / "report.md").read_text()
    assert run(cli.main, command(tmp_path, "--ckpt_path", "last")) == 0
    assert_same(tmp_path, uninterrupted)


def test_a_signal_in_the_first_epoch(tmp_path: Path) -> None:
    told = tmp_path / "told"
    assert run(send_in_step, signal.SIGTERM, 2, command(tmp_path), told) == 143
    assert told.read_text().splitlines()[-1:] == ["bp-torch: interrupted by SIGTERM; no epoch was saved"]


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert fit(tmp_path, "--trainer.max_epochs", "1") == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("full_from", [2, 3, 4])
def test_a_full_disk(
    full_from: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two checkpoints an epoch. What was saved is tested and told, though the report cannot be written."""
    save, saved = torch.save, [0]

    def save_until(checkpoint: Any, file: Any) -> None:
        saved[0] += 1
        save(checkpoint, file)
        if saved[0] >= full_from:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", save_until)
    if full_from == 4:
        monkeypatch.setattr("bp_torch.recipes.report.write", lambda outcome: save_until({}, tmp_path / "none"))
    assert fit(tmp_path, "--report", "true", "--checkpoints.monitor", "null") == 1
    assert not list(tmp_path.rglob("*.tmp"))
    told = capsys.readouterr()
    assert "this run" in told.out
    (line,) = told.err.splitlines()
    name = "best" if full_from == 3 else "last"
    assert f"trainer.default_root_dir: No space left on device: {tmp_path}/version_0/checkpoints/{name}.ckpt" in line
    assert ("the report could not be written" in line) == (full_from == 4)
    assert (tmp_path / "version_0" / "report.md").exists() == (full_from != 4)


def test_repeat_tells_which_run_ended_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil_in_epoch(monkeypatch, 2, float("nan"))
    options = [*SMALL[1:], "--trainer.default_root_dir", str(tmp_path)]
    assert cli.main(["repeat", *options, "--seeds", "0,1"]) == 1
    told = capsys.readouterr()
    assert "seed 0, seed 1" in told.out
    (line,) = told.err.splitlines()
    assert line.count("epoch 3 left network.") == 2
