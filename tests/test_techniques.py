"""Each shipped technique does what its formula says, and each of its files runs."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import FIT_ALONE

pytest.importorskip("lightning")

import bp_torch
from bp_torch import cli
from bp_torch.recipes import schedules
from bp_torch.recipes.callbacks import StopAfterReductions
from bp_torch.recipes.cli import run
from bp_torch.recipes.outcome import Outcome

ONE_BACKEND = "recipes; test_convergence.py trains on both"
pytestmark = pytest.mark.usefixtures("own_folder")

FOLDER = Path(bp_torch.recipes.__file__).parent / "configs" / "techniques"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))

QUICK = [
    *("fit", "--config", "digits"),
    *("--model.network.hidden_features", "[8,8]"),
    *("--data.batch_size", "128"),
    *("--trainer.max_epochs", "2"),
    *FIT_ALONE,
]


def fit(*arguments: str) -> Outcome:
    outcome = run([*QUICK, *arguments])
    assert outcome is not None
    return outcome


# The shipped files


def settings(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8"))


def factory(spec: dict[str, Any]) -> Any:
    """What jsonargparse makes of a schedule's setting: a partial of the class."""
    module, _, name = spec["class_path"].rpartition(".")
    given = getattr(importlib.import_module(module), name)
    arguments = {key: factory(v) if isinstance(v, dict) else v for key, v in spec.get("init_args", {}).items()}
    if "interval" in inspect.signature(given).parameters:
        arguments.setdefault("interval", "")
    return functools.partial(given, **arguments)


def optimizer_of(outcome: Outcome) -> torch.optim.Optimizer:
    return outcome.task.trainer.optimizers[0]


def group(outcome: Outcome) -> dict[str, Any]:
    return optimizer_of(outcome).param_groups[0]


EFFECTS: dict[str, Callable[[Outcome], bool]] = {
    "accumulate": lambda o: o.history[-1]["step"] == 2 * math.ceil(10 / 4),
    "adagrad": lambda o: type(optimizer_of(o)) is torch.optim.Adagrad,
    "adam": lambda o: type(optimizer_of(o)) is torch.optim.Adam and group(o)["weight_decay"] == 0,
    "adamw": lambda o: type(optimizer_of(o)) is torch.optim.AdamW and group(o)["weight_decay"] == 0.01,
    "augment_images": lambda o: type(o.data.augment).__name__ == "RandomAffine",  # type: ignore[attr-defined]
    "augment_signals": lambda o: type(o.data.augment).__name__ == "RandomSignal",  # type: ignore[attr-defined]
    "batch_norm": lambda o: any(isinstance(m, torch.nn.BatchNorm1d) for m in o.task.modules()),
    "class_weights": lambda o: o.task.weights is not None and len(o.task.weights) == 10,  # type: ignore[arg-type]
    "clip_norm": lambda o: o.task.trainer.gradient_clip_val == 1.0,
    "clip_value": lambda o: o.task.trainer.gradient_clip_algorithm == "value",
    "dropout": lambda o: {m.dropout for m in o.task.modules() if type(m).__name__ == "HiddenLayer"} == {0.5},
    "early_stopping": lambda o: o.task.trainer.early_stopping_callback.patience == 10,  # type: ignore[union-attr]
    "early_stopping_lower_rate": lambda o: any(isinstance(c, StopAfterReductions) for c in o.callbacks),
    "elastic_net": lambda o: o.history[1]["penalty"] > 0 and o.history[1]["l1_penalty"] > 0,
    "kfold": lambda o: len(o.data.splits["test"][0]) == math.ceil(1797 / 5),
    "l1": lambda o: 0 < o.history[1]["sparsity"] < 1 and o.history[1]["l1_penalty"] > 0,
    "l2": lambda o: o.history[1]["penalty"] > 0 and group(o)["weight_decay"] == 0,
    "label_smoothing": lambda o: o.task.label_smoothing == 0.1,  # type: ignore[attr-defined]
    "lr_finder": lambda o: o.task.lr == o.rates[0][1] != 0.003,
    "mixed_precision": lambda o: o.task.trainer.precision == "bf16-mixed",
    "no_batch_norm": lambda o: not any(isinstance(m, torch.nn.BatchNorm1d) for m in o.task.modules()),
    "nesterov": lambda o: group(o)["nesterov"] is True and group(o)["momentum"] == 0.9,
    "rmsprop": lambda o: type(optimizer_of(o)) is torch.optim.RMSprop,
    "sgd": lambda o: type(optimizer_of(o)) is torch.optim.SGD and group(o)["momentum"] == 0.9,
    "streaming": lambda o: 0 < o.data.splits["train"][0].largest <= 512,  # type: ignore[attr-defined]
    "weight_decay": lambda o: [g["weight_decay"] for g in optimizer_of(o).param_groups] == [0.05, 0.0],
}

WAVES = {"triangular": lambda c, t: 1.0, "triangular2": lambda c, t: 0.5 ** (c - 1), "exp_range": lambda c, t: 0.999**t}


def wave(mode: str) -> Callable[[int, int], float]:
    def factor(t: int, total: int) -> float:
        cycle = math.floor(1 + t / 190)
        height = max(0.0, 1 - abs(t / 95 - 2 * cycle + 1)) * WAVES[mode](cycle, t)
        return 0.1 + 0.9 * height  # low is 0.0003, the rate 0.003

    return factor


def half_cosine(t: float, total: float) -> float:
    return (1 + math.cos(math.pi * t / total)) / 2


def one_cycle(t: int, total: int) -> float:
    top, end = 0.3 * total - 1, total - 1
    if t <= top:
        return 1 / 25 + (1 - 1 / 25) * (1 - half_cosine(t, top))
    return 1 / 250000 + (1 - 1 / 250000) * half_cosine(t - top, end - top)


FACTORS: dict[str, Callable[[int, int], float]] = {
    "polynomial": lambda t, total: (1 - t / total) ** 2,
    "exponential": lambda t, total: 0.97**t,
    "step": lambda t, total: 0.1 ** (t // 30),
    "custom": lambda t, total: 1 / (1 + 0.05 * t),
    "cosine": half_cosine,
    "warmup": lambda t, total: 0.01 + 0.99 * t / 50 if t < 50 else half_cosine(t - 50, total - 50),
    "cyclic_triangular": wave("triangular"),
    "cyclic_triangular2": wave("triangular2"),
    "cyclic_exp_range": wave("exp_range"),
    "one_cycle": one_cycle,
    "cosine_restarts": lambda t, total: half_cosine(t % 30, 30),
}
"""Each schedule's formula: the learning rate at t of total, as a share of the optimizer's."""


def test_no_technique_is_forgotten() -> None:
    assert set(NAMES) == set(EFFECTS) | set(FACTORS) | {"plateau"}


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(FACTORS)))
def test_config_runs(name: str) -> None:
    outcome = fit("--config", f"techniques/{name}")
    assert len(outcome.history) == 2
    assert all(math.isfinite(row["val_loss"]) for row in outcome.history)
    if name != "plateau":
        assert EFFECTS[name](outcome)


@pytest.mark.parametrize("name", FACTORS)
def test_schedule_is_its_formula_at_every_step(name: str) -> None:
    """From the schedule alone for a long run; and as a run of two epochs recorded it."""
    model = settings(name)["model"]["init_args"]
    make = factory(model["schedule"])
    rates = schedules.curve(make, 0.003, 450, model["interval"])
    expected = [0.003 * FACTORS[name](t, 450) for t in range(450)]
    assert rates == pytest.approx(expected, rel=1e-5, abs=1e-12)

    outcome = fit("--config", f"techniques/{name}", "--data.batch_size", "32")
    steps = outcome.history[0]["step"]
    total = 2 * steps if model["interval"] == "step" else 2
    per = 1 if model["interval"] == "step" else steps
    assert [step for step, _ in outcome.rates] == list(range(2 * steps))
    expected = [0.003 * FACTORS[name](step // per, total) for step in range(2 * steps)]
    assert [rate for _, rate in outcome.rates] == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("name", FACTORS)
def test_schedule_survives_a_checkpoint(name: str, tmp_path: Path) -> None:
    model = settings(name)["model"]["init_args"]

    def start() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([torch.zeros((), requires_grad=True)], 0.003)
        return optimizer, schedules.build(factory(model["schedule"]), optimizer, 120, model["interval"])

    def go_on(optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return rates

    optimizer, schedule = start()
    go_on(optimizer, schedule, 60)
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, tmp_path / "kept")
    kept = torch.load(tmp_path / "kept", weights_only=True)
    other, resumed = start()
    other.load_state_dict(kept["optimizer"])
    resumed.load_state_dict(kept["schedule"])
    assert go_on(other, resumed, 60) == go_on(optimizer, schedule, 60)


@pytest.mark.parametrize("name", NAMES)
def test_header_says_what_it_needs(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text("utf-8").split("\n\n")[0].splitlines()
    assert all(line.startswith("#") and len(line) <= 120 for line in lines)
    assert lines[0].endswith(".")
    fields = dict(re.match(r"# (\w+) +(.*)", line).groups() for line in lines if re.match(r"# [A-Z]\w+ {2,}", line))
    assert fields["Topic"][0].isdigit()
    assert fields["Formula"]
    assert re.match(
        rf"bp-torch fit --config \w+( --config techniques/\w+)? --config techniques/{name}( |$)", fields["Command"]
    )


# Schedules of the user's own


FORMULAS = {
    "1 - epoch / total": lambda t: 1 - t / 10,
    "0.5 ** (epoch // 3)": lambda t: 0.5 ** (t // 3),
    "max(0.1, cos(pi * epoch / total / 2))": lambda t: max(0.1, math.cos(math.pi * t / 20)),
    "1 if epoch < 5 and not epoch == 3 else exp(-epoch)": lambda t: 1 if t < 5 and t != 3 else math.exp(-t),
    "math.exp2": lambda t: 2.0**t,
}


def half(t: int, total: int) -> float:
    return 0.5 if t > total / 2 else 1


@pytest.mark.parametrize("formula", [formula for formula in FORMULAS if "math." not in formula])
def test_formula(formula: str) -> None:
    make = functools.partial(schedules.Formula, formula=formula, total=0)
    assert schedules.curve(make, 2.0, 10) == pytest.approx([2 * FORMULAS[formula](t) for t in range(10)])


def test_formula_by_step_and_by_path() -> None:
    make = functools.partial(schedules.Formula, formula="1 / (1 + step)", total=0, interval="")
    assert schedules.curve(make, 1.0, 4, "step") == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    make = functools.partial(schedules.Formula, formula=f"{__name__}.half", total=0)
    assert schedules.curve(make, 1.0, 4) == [1, 1, 1, 0.5]


@pytest.mark.parametrize(
    ("formula", "why"),
    [
        ("__import__('os').system('true')", "may call only"),
        ("().__class__", "holds"),
        ("(lambda: 1)()", "may call only"),
        ("[1 for x in y]", "holds ListComp"),
        ("'a' * 9", "not a number"),
        ("open(1)", "uses 'open'"),
        ("exp", "uses 'exp'"),
        ("pi(1)", "uses 'pi'"),
        ("step", "uses 'step'"),
        ("max(1, *[2])", "holds"),
        ("1 +", "cannot be read"),
        ("9 ** 9 ** 9 ** 9", "fails at epoch = 0"),
        ("floor(9) ** floor(9) ** floor(9) ** floor(9)", "fails at"),
        ("1 / epoch", "fails at epoch = 0"),
        ("log(0)", "fails at"),
        ("1 - epoch", "gives -1.0 at epoch 2"),
        ("(0 - 1) ** 0.5", "gives"),
        ("no.such.module", "cannot be imported"),
        ("math.pi", "is not a function"),
        ("-" * 401 + "1", "more than 400"),
    ],
)
def test_formula_refuses(formula: str, why: str) -> None:
    with pytest.raises(ValueError, match="formula") as refused:
        schedules.curve(functools.partial(schedules.Formula, formula=formula, total=0), 1.0, 10)
    assert why in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config", "techniques/custom", "--model.schedule.formula", "1/epoch"], "model.init_args.schedule: formula"),
        (["--config", "techniques/warmup", "--model.schedule.steps", "99"], "model.init_args.schedule: steps must be"),
        (["--data.folds", "1"], "data.init_args.folds: folds must be 0"),
        (["--data.folds", "3", "--data.fold", "3"], "fold must be at least 0 and below folds = 3, got 3"),
        (["--model.class_weight", "[1,2]"], "model.init_args.class_weight: 2 weights for 10 classes"),
        (["--model.class_weight", "even"], "class_weight"),
        (["--config", "empty.yaml"], "--config: empty.yaml holds no settings"),
        (["--config", "techniques/l3"], "did you mean techniques/l"),
    ],
)
def test_bad_settings_get_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.yaml").write_text("# nothing\n")
    assert cli.main([*QUICK, *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert len(error) < 400


def test_the_summary_counts_parameters_and_no_operations(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = fit("--trainer.enable_model_summary", "true")
    shown = capsys.readouterr().out.split("Results")[0]
    rows = {line.split()[0]: line.split()[-1] for line in shown.splitlines() if line.strip()}
    assert rows["all"] == f"{outcome.parameters:,}"
    assert rows["network.output"] == "90"
    assert "FLOPs" not in shown
