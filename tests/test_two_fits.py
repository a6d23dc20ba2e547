"""One callback in two fits: the second is not told of the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
from lightning.pytorch import Trainer

from bp_torch.recipes import callbacks
from bp_torch.recipes.callbacks.run import PerFit
from bp_torch.recipes.data import Digits
from bp_torch.recipes.modules import Classifier

ONE_BACKEND = "callbacks, on no backend"

MAKERS: dict[str, Any] = {
    "LearningRateFinder": lambda: callbacks.LearningRateFinder(num_training_steps=30),
    "EarlyStopping": lambda: callbacks.EarlyStopping("val_loss", patience=0, min_delta=100.0),
    "StopAfterReductions": lambda: callbacks.StopAfterReductions(0),
    "Checkpoints": lambda: callbacks.Checkpoints(),
    "History": lambda: callbacks.History(),
    "EpochSeeds": lambda: callbacks.EpochSeeds(),
    "Report": lambda: callbacks.Report(),
    "SparsityReport": lambda: callbacks.SparsityReport(),
    "GradientFlow": lambda: callbacks.GradientFlow(),
    "BackpropView": lambda: callbacks.BackpropView(),
}


def test_each_callback_that_remembers_is_here() -> None:
    kinds = {kind.__name__ for kind in vars(callbacks).values() if isinstance(kind, type) and issubclass(kind, PerFit)}
    assert kinds == set(MAKERS)


def fit(callback: Any, scale: float, folder: Path) -> None:
    torch.manual_seed(int(scale))
    model = Classifier(torch.nn.Linear(64, 10), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.05 / scale))
    with torch.no_grad():
        model.network.weight.mul_(scale)  # type: ignore[operator, union-attr]
    quiet = {"enable_model_summary": False, "enable_progress_bar": False, "logger": False, "num_sanity_val_steps": 0}
    if not isinstance(callback, callbacks.Checkpoints):
        quiet["enable_checkpointing"] = False
    trainer = Trainer(accelerator="cpu", callbacks=[callback], default_root_dir=str(folder), max_epochs=2, **quiet)
    trainer.fit(model, Digits(seed=0))


def remembered(callback: Any) -> Any:
    """Its state, without times and folders."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.tolist()
        if isinstance(value, dict):
            return {name: plain(v) for name, v in value.items() if name not in ("seconds", "started")}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(callback.state_dict())


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.filterwarnings("ignore:GradientFlow")
def test_the_second_fit_is_as_a_first(name: str, tmp_path: Path) -> None:
    used, fresh = MAKERS[name](), MAKERS[name]()
    fit(used, 1.0, tmp_path / "first")
    fit(used, 30.0, tmp_path / "second")
    fit(fresh, 30.0, tmp_path / "alone")
    assert str(remembered(used)) == str(remembered(fresh))


def test_early_stopping_that_is_not_strict(tmp_path: Path) -> None:
    fit(callbacks.EarlyStopping("val_joy", strict=False), 1.0, tmp_path)
