"""L1 by proximal steps, and how sparse it made each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .. import ConfigError, figures
from ..outcome import Outcome, Section
from .run import PerFit

KNOWN = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad)


def step_size(optimizer: Optimizer, group: dict[str, Any], p: Tensor) -> float | Tensor:
    """h, by element or one for all: how far a gradient that stays the same moves a parameter, w ← w - h g, each step.

        SGD        lr (1 - dampening) / (1 - momentum), with or without Nesterov
        Adam(W)    lr / (√v̂ + eps), v̂ the mean of g² without its bias (its largest so far with `amsgrad`)
        RMSprop    lr / (√v + eps) / (1 - momentum), v the mean of g² (less the square of the mean of g if `centered`)
        Adagrad    lr / (1 + (t - 1) lr_decay) / (√Σ g² + eps)

    Raises:
        TypeError: another optimizer.
    """
    state, rate = optimizer.state[p], float(group["lr"])
    match optimizer:
        case torch.optim.SGD():
            if group["momentum"] == 0:
                return rate
            return rate * (1 - group["dampening"]) / (1 - group["momentum"])
        case torch.optim.Adam():  # AdamW is one
            v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
            return rate / (v / (1 - group["betas"][1] ** float(state["step"]))).sqrt_().add_(group["eps"])
        case torch.optim.RMSprop():
            v = state["square_avg"]
            if group["centered"]:
                v = v - state["grad_avg"].square()
            return rate / (1 - group["momentum"]) / v.sqrt().add_(group["eps"])
        case torch.optim.Adagrad():
            rate /= 1 + (float(state["step"]) - 1) * group["lr_decay"]
            return rate / state["sum"].sqrt().add_(group["eps"])
    raise TypeError(f"expected one of {', '.join(kind.__name__ for kind in KNOWN)}, got {type(optimizer).__name__}")


def soft_threshold_(w: Tensor, threshold: float | Tensor) -> Tensor:
    """w ← sign(w) · max(|w| - threshold, 0), in place: what is smaller becomes exactly zero."""
    return w.copy_(w.sign() * (w.abs() - threshold).clamp_(min=0))


class ProximalL1(Callback):
    """Minimize loss + λ Σ |w| by proximal steps, so that weights become exactly zero.

    A gradient of λ |w| only makes weights small, because it jumps at zero. Here the optimizer's step takes the loss
    alone, and what follows each step takes λ Σ |w| exactly:

        w ← sign(w) · max(|w| - λ h, 0)

    h is the step size (`step_size`). With SGD it is the learning rate, and this is proximal gradient descent (ISTA).
    An adaptive optimizer moves each weight by a step of its own, h = lr / (√v̂ + eps) with Adam, and so its proximal
    step has that same h. That, and not the learning rate, is the proximal map in the metric that such an optimizer
    steps in, and with it the places where the updates end are those of loss + λ Σ |w| whatever the optimizer:

        |∂loss/∂w| ≤ λ where w = 0,    ∂loss/∂w = -λ sign(w) elsewhere

    With the learning rate alone, λ would weigh each weight by its own √v̂, and be another λ for each. Momentum is
    counted as the sum of its steps, h = lr / (1 - momentum): right at the end, not on the way there.

    Biases and norm parameters (those of one dimension) are exempt. `l1_penalty`, λ Σ |w| at the end of the epoch, is
    logged. It is in no loss.

    Args:
        weight: λ ≥ 0, per element, for a loss that is a mean over rows.

    Works with SGD, Adam, AdamW, RMSprop and Adagrad of torch.optim, in any Trainer, with automatic or manual
    optimization: it runs in a hook of the optimizer, so with gradient accumulation once for each step. Steps that a
    gradient scaler skips have none.

    Sources: Daubechies, Defrise, De Mol 2004, Comm. Pure Appl. Math. 57; Duchi, Hazan, Singer 2011, JMLR 12 (with
    adaptive steps); Yun, Lozano, Yang 2021, NeurIPS (proximal Adam).
    """

    def __init__(self, weight: float) -> None:
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight must be finite and ≥ 0, got {weight}")
        self.weight = weight
        self.hooks: list[RemovableHandle] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            if not isinstance(optimizer, KNOWN):
                raise ConfigError(
                    f"ProximalL1: the step size of {type(optimizer).__name__} is not known, but those of "
                    f"{', '.join(kind.__name__ for kind in KNOWN)}"
                )
        self.hooks = [optimizer.register_step_post_hook(self.shrink) for optimizer in trainer.optimizers]

    @torch.no_grad()
    def shrink(self, optimizer: Optimizer, *_: Any) -> None:
        """The proximal step. Parameters without a gradient were not stepped, and stay."""
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.ndim > 1 and p.grad is not None:
                    soft_threshold_(p, step_size(optimizer, group, p) * self.weight)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stepped = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
        sizes = [float(p.detach().abs().sum()) for p in stepped if p.ndim > 1]
        pl_module.log("l1_penalty", self.weight * sum(sizes), sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)


class SparsityReport(PerFit):
    """Log the share of exact zeros, of all weights as `sparsity` and by layer as `sparsity/<layer>`; report it.

    Weights are parameters of two or more dimensions. A figure over the epochs goes to `figures/sparsity.png` in the
    trainer's `default_root_dir` when training ends. A recipe's report has it too, and the best checkpoint's `table`.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = weights(pl_module)
        total = sum(w.numel() for w in layers.values())
        shares = {f"sparsity/{name}": float((w == 0).double().mean()) for name, w in layers.items()}
        shares["sparsity"] = sum(int((w == 0).sum()) for w in layers.values()) / max(total, 1)
        for name, share in shares.items():
            pl_module.log(name, share, sync_dist=True)
        self.rows.append({"epoch": trainer.current_epoch + 1} | shares)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rows and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = Path(trainer.default_root_dir) / "figures"
            folder.mkdir(parents=True, exist_ok=True)
            figures.sparsity(self.rows).savefig(folder / "sparsity.png", dpi=150)

    def report_sections(self, outcome: Outcome) -> list[Section]:
        text = [f"Of the tested weights, epoch {outcome.best_epoch}:", "", *table(outcome.task)]
        return [Section("sparsity", "Sparsity by layer", figures.sparsity(outcome.history, outcome.best_epoch), text)]

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [dict(row) for row in state_dict["rows"]]


def table(module: torch.nn.Module) -> list[str]:
    """Lines of Markdown: each layer's zeros, its outputs without any weight left (rows of the matrix) and the inputs
    that nothing in it reads (columns)."""
    lines = ["| layer | weights | zeros | outputs without weights | inputs not read |", "|---|---|---|---|---|"]
    total = zeros = 0
    for name, w in weights(module).items():
        zero = (w == 0).flatten(1)
        total, zeros = total + w.numel(), zeros + int(zero.sum())
        dead, unread = int(zero.all(1).sum()), int(zero.all(0).sum())
        share = f"{int(zero.sum()):,} ({float(zero.double().mean()):.1%})"
        lines.append(f"| {name} | {w.numel():,} | {share} | {dead} of {len(zero)} | {unread} of {zero.shape[1]} |")
    return [*lines, f"| all | {total:,} | {zeros:,} ({zeros / max(total, 1):.1%}) | | |"]


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters of two or more dimensions by the name of their layer."""
    named = [(name, p.detach()) for name, p in module.named_parameters() if p.ndim > 1]
    return {name.removesuffix(".weight").removeprefix("network.") or "network": p for name, p in named}
