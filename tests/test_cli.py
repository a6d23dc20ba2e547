"""bp-torch on the command line: what it answers, and that a bad configuration gets one clear line."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("lightning")
import bp_torch
from bp_torch import cli
from bp_torch.recipes.modules import Classifier

ONE_BACKEND = "what the command line answers depends on no backend"
pytestmark = pytest.mark.usefixtures("own_folder")

QUICK = [
    *("--config", "digits"),
    *("--model.network.hidden_features", "[16,16]"),
    *("--trainer.max_epochs", "2"),
    *("--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false"),
    *("--baselines", "false"),
    *("--report", "false"),
]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("fit", "validate", "test", "predict", "--config FILE"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"bp-torch {bp_torch.__version__}\n"


def test_help_and_version_import_no_lightning() -> None:
    code = "import sys; from bp_torch import cli; cli.main(['--help']); cli.main(['--version']); "
    code += "sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_without_the_recipes_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("bp_torch.recipes")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(bp_torch, "recipes")
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert cli.main(["fit", "--config", "digits"]) == 2
    assert capsys.readouterr().err == (
        "bp-torch: error: fit needs jsonargparse, which is not installed: pip install 'bp-torch[recipes]'\n"
    )


NETWORK = "model.init_args.network.init_args"

BAD = {
    "unknown command": (["fitt"], "'fitt' is not a command"),
    "no config": (["fit"], "fit.data, fit.model"),
    "unknown activation": (["--model.network.activation", "rely"], f"{NETWORK}.activation: "),
    "negative width": (["--model.network.hidden_features", "[16,-5]"], f"{NETWORK}.hidden_features: "),
    "dropout of 1.5": (["--model.network.dropout", "1.5"], f"{NETWORK}.dropout: "),
    "batch of none": (["--data.batch_size", "0"], "data.init_args.batch_size: "),
    "bad label smoothing": (["--model.label_smoothing", "2"], "model.init_args.label_smoothing: "),
    "bad learning rate": (["--model.optimizer.lr", "-1"], "model.init_args.optimizer: "),
    "not a number": (["--trainer.max_epochs", "three"], '"trainer.max_epochs"'),
    "not a number, deep": (["--data.augment.degrees", "steep"], '"degrees"'),
    "unknown option": (["--data.batch_sise", "3"], "'batch_sise'"),
    "unknown argument": (["--nonsense", "3"], "--nonsense"),
    "unknown accelerator": (["--trainer.accelerator", "abacus"], "trainer.accelerator: "),
    "unknown model": (["--model", "Nope"], '"model"'),
    "missing config": (["--config", "absent.yaml"], "--config: there is no file 'absent.yaml'"),
    "broken config": (["--config", "broken.yaml"], "parsing config"),
    "unknown key": (["--config", "unknown.yaml"], "'modle"),
    "missing checkpoint": (["--ckpt_path", "absent.ckpt"], "ckpt_path: there is no file 'absent.ckpt'"),
    "no run to resume": (["--ckpt_path", "last"], "ckpt_path: 'last' means the newest run"),
    "not a checkpoint": (["--ckpt_path", "broken.yaml"], "ckpt_path: broken.yaml cannot be read"),
    "another file of torch's": (["--ckpt_path", "tensor.ckpt"], "ckpt_path: tensor.ckpt is not a checkpoint"),
    "other features": (["--model.network.in_features", "63"], "model.init_args.network: the data's rows have 64"),
    "other classes": (["--model.network.out_features", "7"], "model.init_args.network: two rows of data of 10"),
    "unknown metric": (["--early_stopping.monitor", "joy"], "early_stopping.monitor: "),
    "unknown metric to rank by": (["--checkpoints.monitor", "joy"], "checkpoints.monitor: "),
    "beginning of an option": (
        ["--trainer.max_epoch", "2"],
        "--trainer.max_epoch 2; did you mean --trainer.max_epochs?",
    ),
    "misspelled, of a class": (["--model.optimizer.ler", "1"], "did you mean lr?"),
    "misspelled, in a file": (["--config", "misspelled.yaml"], "'trainer.max_epoch'; did you mean trainer.max_epochs?"),
    "a number for a group": (
        ["--config", "three.yaml"],
        "--config: three.yaml: trainer must hold settings by name, got 3",
    ),
    "a number, options after it": (
        ["--config", "three.yaml", "--trainer.max_epochs", "1"],
        "--config: three.yaml: trainer",
    ),
    "a list for a group": (["--config", "list.yaml"], "--config: list.yaml: checkpoints must hold settings by name"),
    "a config of text": (["--config", "text.yaml"], "--config: text.yaml must hold settings by name, got str"),
    "a config that is not text": (["--config", "binary.yaml"], "--config: binary.yaml is not UTF-8 text"),
    "a config that contains itself": (
        ["--config", "alias.yaml"],
        "--config: alias.yaml holds a part that contains itself",
    ),
    "negative seed": (["--seed_everything", "-1"], "seed_everything: expected a number from 0 to 2³² - 1, got -1"),
    "batch of 10³⁰": (["--data.batch_size", "1" + 30 * "0"], "data.init_args.batch_size: "),
    "many threads": (["--threads", "100000"], "threads: at most "),
    "no epochs": (["--trainer.max_epochs", "0"], "trainer.max_epochs: 0 trains nothing"),
    "no steps": (["--trainer.max_steps", "0"], "trainer.max_steps: 0 trains nothing"),
    "no batches": (["--trainer.limit_train_batches", "0"], "trainer.limit_train_batches: 0 trains nothing"),
    "few rows to test": (
        ["--data.test_fraction", "0.0001"],
        "data.init_args.val_fraction, test_fraction: 0.0001 of 1797",
    ),
    "more folds than rows": (["--data.folds", "400"], "data.init_args.folds: "),
    "more memory than there is": (
        ["--model.network.hidden_features", "[1000000000000]"],
        "model.init_args.network: it needs 256",
    ),
    "batch norm of all processes": (
        ["--trainer.sync_batchnorm", "true", "--trainer.devices", "2", "--trainer.strategy", "ddp"],
        "trainer.sync_batchnorm: ",
    ),
    "no such device": (["--trainer.accelerator", "gpu"], "trainer.accelerator: "),
    "neither min nor max": (["--checkpoints.mode", "up"], "checkpoints.mode: "),
    "no length known": (
        ["--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:00:03"],
        "model.init_args.schedule: ",
    ),
    "an end before the run's": (
        [
            "--model.schedule",
            "torch.optim.lr_scheduler.OneCycleLR",
            "--model.schedule.total_steps=1",
            "--model.schedule.max_lr=1",
        ],
        "model.init_args.schedule: Tried to step 2 times",
    ),
}
CONFIGS = {
    "broken.yaml": b"model: [1\n x: {",
    "unknown.yaml": b"modle:\n  x: 1\n",
    "three.yaml": b"trainer: 3\n",
    "list.yaml": b"checkpoints: [1]\n",
    "text.yaml": b"digits\n",
    "binary.yaml": b"\xff\xfe\x00",
    "alias.yaml": b"a: &a [*a]\n",
    "misspelled.yaml": b"trainer:\n  max_epoch: 3\n",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configuration_gets_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in CONFIGS.items():
        Path(name).write_bytes(content)
    torch.save(torch.ones(2), "tensor.ckpt")
    given, expected = BAD[case]
    arguments = given if case in ("unknown command", "no config") else ["fit", *QUICK, *given]
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("bp-torch: error: ")
    assert expected in told
    assert len(told) < 400
    if "metric" not in case and "joy" not in given:
        assert not Path("runs").exists() or not list(Path("runs/digits").iterdir())  # no empty folder of a run


def test_run_without_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/digits/version_0").mkdir(parents=True)
    assert cli.main(["test", *QUICK]) == 2
    assert "ckpt_path: the run runs/digits/version_0 has no best.ckpt" in capsys.readouterr().err


def test_the_console_command_has_no_traceback() -> None:
    command = [sys.executable, "-m", "bp_torch.cli", "fit", "--config", "absent"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("bp-torch: error: --config: there is no file 'absent', and the shipped ones are ")
    assert "digits" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""


@pytest.mark.parametrize("name", ["digits", "digits.yaml", "configs/digits.yaml", "recipes/configs/digits.yaml"])
def test_shipped_configs_go_by_name(name: str) -> None:
    from bp_torch.recipes.settings import find_config

    assert Path(find_config(name)) == Path(bp_torch.recipes.__file__).parent / "configs" / "digits.yaml"
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("")
    assert find_config(name) == name  # the user's own file comes first


def test_configs_stack(capsys: pytest.CaptureFixture[str]) -> None:
    Path("small.yaml").write_text("model:\n  init_args:\n    network:\n      init_args:\n        dropout: 0.45\n")
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", "-c", "digits", "-c", "small.yaml", "--print_config"])
    assert ended.value.code == 0
    network = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["network"]["init_args"]
    assert network["dropout"] == 0.45
    assert network["norm"] == "batch"


def test_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    """fit, then the others on what it left; and the checkpoint rebuilds the model without the configuration."""
    assert cli.main(["fit", *QUICK]) == 0
    assert "this run" in capsys.readouterr().out
    run = Path("runs/digits/version_0")
    assert {path.name for path in run.iterdir()} == {"checkpoints", "config.yaml", "metrics.csv", "tensorboard"}
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    config = (run / "config.yaml").read_text()
    assert config.startswith("# bp-torch fit --config digits")
    assert yaml.safe_load(config)["model"]["init_args"]["network"]["init_args"]["hidden_features"] == [16, 16]

    assert cli.main(["test", *QUICK]) == 0
    assert "test_accuracy" in capsys.readouterr().out
    assert cli.main(["validate", *QUICK, "--ckpt_path", "last"]) == 0
    assert "val_accuracy" in capsys.readouterr().out
    assert cli.main(["predict", *QUICK, "--ckpt_path", str(run / "checkpoints" / "best.ckpt")]) == 0
    rows = list(csv.DictReader((run / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 360
    assert sum(float(rows[0][f"p({digit})"]) for digit in range(10)) == pytest.approx(1, abs=1e-5)
    assert not Path("runs/digits/version_1").exists()

    model = Classifier.load_from_checkpoint(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert isinstance(model.network, bp_torch.nn.MLP)

    other = ["--model.network.hidden_features", "[8]"]
    assert cli.main(["test", *QUICK, *other]) == 0
    assert "hidden_features: [16, 16] from the checkpoint, in place of [8]" in capsys.readouterr().err
    assert cli.main(["fit", *QUICK, "--ckpt_path", "last", "--seed_everything", "7"]) == 2
    assert "add --seed_everything 0" in capsys.readouterr().err


def test_validation_every_second_epoch() -> None:
    """Epochs without one have no validation numbers, are never the best, and end no run; resuming keeps all that."""
    every = ["--trainer.check_val_every_n_epoch", "2", "--checkpoints.monitor", "val_loss", "--report", "true"]
    every += ["--early_stopping.patience", "1"]
    assert cli.main(["fit", *QUICK, *every, "--trainer.max_epochs", "3"]) == 0
    assert cli.main(["fit", *QUICK, *every, "--trainer.max_epochs", "5", "--ckpt_path", "last"]) == 0
    run = Path("runs/digits/version_0")
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["val_loss"]) for row in rows] == [False, True, False, True, False]
    assert all(row["train_loss"] for row in rows)
    losses = {epoch: float(rows[epoch - 1]["val_loss"]) for epoch in (2, 4)}
    assert (
        f"epochs run | 5, tested after epoch {min(losses, key=losses.__getitem__)} |" in (run / "report.md").read_text()
    )
    assert (run / "figures" / "curves.png").stat().st_size > 5000


def test_without_a_metric_to_rank_by_the_last_epoch_is_tested() -> None:
    assert cli.main(["fit", *QUICK, "--trainer.max_epochs", "3", "--checkpoints.monitor", "null"]) == 0
    best, last = (
        torch.load(f"runs/digits/version_0/checkpoints/{name}.ckpt", weights_only=True) for name in ("best", "last")
    )
    assert best["epoch"] == last["epoch"] == 2
    assert all(torch.equal(best["state_dict"][name], value) for name, value in last["state_dict"].items())
    assert best["callbacks"]["Checkpoints"]["best_epoch"] == 3


def test_fast_dev_run_leaves_nothing_behind() -> None:
    assert cli.main(["fit", *QUICK, "--trainer.fast_dev_run", "true"]) == 0
    assert not [path for path in Path("runs").rglob("*") if path.is_file()]


def test_rich_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", *QUICK, "--trainer.enable_progress_bar", "true"]) == 0
    assert "Epoch 1/1" in capsys.readouterr().out


def test_fewer_steps_than_an_epoch() -> None:
    """The steps that there are count as the epoch; without a validation, there is no validation loss to rank by."""
    few = ["--trainer.max_steps", "5", "--report", "true"]
    assert cli.main(["fit", *QUICK, *few]) == 0
    run = Path("runs/digits/version_0")
    assert "| epochs run | 1, tested after epoch 1 |" in (run / "report.md").read_text()
    assert (run / "figures" / "curves.png").stat().st_size > 5000
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5


def test_fewer_steps_than_an_epoch_to_rank_by_validation(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", *QUICK, "--trainer.max_steps", "5", "--checkpoints.monitor", "val_loss"]) == 2
    told = capsys.readouterr().err
    assert told == "bp-torch: error: checkpoints.monitor: val_loss was never measured; max_steps = 5 reached\n"


LENGTHS = {
    "steps, cosine": ["--trainer.max_steps", "30"],
    "steps, StepLR": ["--trainer.max_steps", "30", "--config", "techniques/step"],
    "steps, no schedule": ["--trainer.max_steps", "30", "--model.schedule", "null"],
    "time, plateau": ["--trainer.max_time", "00:00:00:01", "--config", "techniques/plateau"],
}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_length_without_epochs(name: str) -> None:
    assert cli.main(["fit", *QUICK, *LENGTHS[name], "--trainer.max_epochs", "-1"]) == 0


@pytest.mark.parametrize("name", ["plateau", "early_stopping_lower_rate", "early_stopping"])
def test_schedules_by_a_metric_with_validation_every_second_epoch(name: str) -> None:
    every = ["--config", f"techniques/{name}", "--trainer.check_val_every_n_epoch", "2", "--trainer.max_epochs", "4"]
    assert cli.main(["fit", *QUICK, *every]) == 0


def test_the_plateau_counts_validations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule that watches val_loss is told of each validation once, never of an old one."""
    told: list[float] = []
    step = torch.optim.lr_scheduler.ReduceLROnPlateau.step

    def listen(self: Any, metrics: float, *args: Any) -> None:
        told.append(float(metrics))
        step(self, metrics, *args)

    monkeypatch.setattr(torch.optim.lr_scheduler.ReduceLROnPlateau, "step", listen)
    every = ["--config", "techniques/plateau", "--trainer.check_val_every_n_epoch", "2", "--trainer.max_epochs", "5"]
    assert cli.main(["fit", *QUICK, *every]) == 0
    with Path("runs/digits/version_0/metrics.csv").open() as file:
        losses = [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]
    assert told == pytest.approx(losses)
    assert len(told) == 2


def test_a_terminal_that_is_not_unicode() -> None:
    command = [sys.executable, "-m", "bp_torch.cli", "fit", *QUICK, "--trainer.enable_progress_bar", "true"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, "--trainer.max_epochs", "1"], capture_output=True, env=environment)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"this run" in ended.stdout
