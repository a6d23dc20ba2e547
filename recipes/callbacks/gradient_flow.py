"""How gradients flow: by layer and step, in memory, as a table and a figure; and a warning where they do not."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from .run import PerFit, replace_file

ABSENT = -1.0  # in a record: this layer got no gradient, or its update was not measured, in this step
MEASURES = ("norm", "zeros", "update")


def norm2(tensors: list[Tensor]) -> Tensor:
    """‖all elements‖₂, summed in float64: the squares of gradients of 1e-25 would be 0 in float32."""
    wide = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    return torch.stack([torch.linalg.vector_norm(t.to(wide)) for t in tensors]).norm()


def _together(tensors: list[Tensor]) -> list[Any]:
    """Small tensors as numbers, by one transfer for all."""
    return torch.stack([t.to(tensors[0].device) for t in tensors]).tolist() if tensors else []


class FlowRecorder:
    """The numbers of `GradientFlow` for any training loop: `before_step` and `after_step` around `optimizer.step()`.

    For each layer, a module that holds parameters itself, with g the gradient and w the values of its parameters:

        norm = ‖g‖₂    zeros = share of g's elements that are 0    update = ‖Δw‖₂/‖w‖₂, of the step

    At most `records` steps are kept: when they are full, every second one is dropped, and from then on every second
    step is skipped. So the records always cover the whole run evenly, in memory that does not grow.

    Args:
        module: whose layers to watch.
        records: how many steps are kept at most; an even number ≥ 2.
    """

    def __init__(self, module: torch.nn.Module, records: int = 512) -> None:
        if records < 2 or records % 2:
            raise ValueError(f"records must be an even number of at least 2, got {records}")
        self.layers = {
            name or "(model)": layer
            for name, layer in module.named_modules()
            if any(True for _ in layer.parameters(recurse=False))
        }
        self.records, self.stride = records, 1
        self.steps: list[int] = []
        self.values = np.empty((0, len(self.layers), 3), np.float32)
        self._before: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._measured: dict[str, tuple[float, float]] = {}

    @property
    def names(self) -> list[str]:
        return list(self.layers)

    def recorded(self, step: int) -> bool:
        """Whether this step is one of those that are kept."""
        return step % self.stride == 0

    @torch.no_grad()
    def before_step(self, step: int, update: bool = False) -> dict[str, tuple[float, float]]:
        """After backward: (norm, zeros) of each layer that has a gradient.

        The update is measured in steps that are kept, and with `update` in this one in any case: until `after_step`,
        that takes a copy of the parameters.
        """
        numbers: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            own = [p for p in layer.parameters(recurse=False) if p.grad is not None]
            if own:
                gradients = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in own]
                count = max(sum(p.numel() for p in own), 1)
                zeros = 1 - torch.stack([g.count_nonzero() for g in gradients]).sum() / count
                norm = norm2(gradients)
                numbers[name] = torch.stack([norm, zeros.to(norm)])
                if update or self.recorded(step):
                    self._before.setdefault(name, [(p, p.detach().clone()) for p in own])
        pairs = _together(list(numbers.values()))
        measured = {name: (norm, zeros) for name, (norm, zeros) in zip(numbers, pairs, strict=True)}
        self._measured |= measured
        return measured

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, tuple[float, float, float]]:
        """After the optimizer: (norm, zeros, update) of each layer that has a gradient; the step is kept if it is one
        to keep. An update that was not measured is -1."""
        ratios = {}
        for name, pairs in self._before.items():
            change, size = norm2([p.detach() - w for p, w in pairs]), norm2([w for _, w in pairs])
            ratios[name] = torch.where(size > 0, change / size, torch.where(change > 0, torch.inf, 0.0))
        updates = dict(zip(ratios, _together(list(ratios.values())), strict=True))
        measured = {name: (*numbers, updates.get(name, ABSENT)) for name, numbers in self._measured.items()}
        if measured and self.recorded(step):
            self._keep(step, measured)
        self._before.clear()
        self._measured.clear()
        return measured

    def _keep(self, step: int, measured: dict[str, tuple[float, float, float]]) -> None:
        row = [measured.get(name, (ABSENT, ABSENT, ABSENT)) for name in self.layers]
        used = len(self.steps)
        if used == len(self.values):  # grow by doubling, up to the bound
            grown = np.empty((min(max(64, 2 * used), self.records), len(self.layers), 3), np.float32)
            grown[:used] = self.values
            self.values = grown
        self.values[used] = row
        self.steps.append(step)
        if len(self.steps) == self.records:
            self.stride *= 2
            kept = [i for i, s in enumerate(self.steps) if s % self.stride == 0]
            self.values[: len(kept)] = self.values[kept]
            self.steps = [self.steps[i] for i in kept]

    def measure(self, name: str) -> np.ndarray:
        """`norm`, `zeros` or `update`: (steps, layers); NaN where there was none."""
        values = self.values[: len(self.steps), :, MEASURES.index(name)].astype(np.float64)
        return np.where(values == ABSENT, np.nan, values)

    def csv(self) -> str:
        """A line for each kept step and layer; empty where there was no gradient."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["step", "layer", *MEASURES])
        for step, row in zip(self.steps, self.values, strict=False):
            for name, numbers in zip(self.layers, row.tolist(), strict=True):
                if numbers[0] != ABSENT:
                    table.writerow([step, name, *("" if x == ABSENT else f"{x:.6g}" for x in numbers)])
        return text.getvalue()

    def state_dict(self) -> dict[str, Any]:
        values = torch.from_numpy(self.values[: len(self.steps)].copy())
        return {"stride": self.stride, "steps": list(self.steps), "values": values, "names": self.names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["names"] != self.names:
            return  # of another network: what it recorded says nothing about this one
        self.stride, self.steps = state["stride"], list(state["steps"])
        self.values = state["values"].numpy().copy()


class GradientFlow(PerFit):
    """Watch the gradients of any LightningModule by layer and step (`FlowRecorder` says what is measured).

    Writes `gradient_flow.csv` and `gradient_flow.png` at the end, logs `gradient_flow/norm/<layer>` and so on to the
    trainer's loggers (TensorBoard gets the figure too), and warns once for each layer, by name, when its gradient

    - vanishes: norm ≤ vanishing · (the largest norm among the layers in that step), `patience` steps in a row;
    - explodes: norm > exploding, `patience` steps in a row;
    - is NaN or infinite, at once; with a gradient scaler, which skips such steps, `patience` in a row.

    Vanishing is relative, so that a network which has learned all there is to learn is left in peace. Norms are taken
    after unscaling and before clipping.

    Args:
        vanishing: in [0, 1).
        exploding: > 0.
        patience: steps in a row that make a warning; ≥ 1.
        every_n_steps: measure every so many steps; between them nothing is computed.
        records: how many steps are kept at most.
        folder: where to write; None is the trainer's `default_root_dir`.

    `flow` is the `FlowRecorder`, `warned` the warnings by layer.
    """

    def __init__(
        self,
        vanishing: float = 1e-6,
        exploding: float = 1e3,
        patience: int = 5,
        every_n_steps: int = 1,
        records: int = 512,
        folder: str | Path | None = None,
    ) -> None:
        if not 0 <= vanishing < 1:
            raise ValueError(f"vanishing must be in [0, 1), got {vanishing}")
        if not exploding > 0:
            raise ValueError(f"exploding must be above 0, got {exploding}")
        for name, value in (("patience", patience), ("every_n_steps", every_n_steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        FlowRecorder(torch.nn.Identity(), records)  # for its refusal
        self.vanishing, self.exploding, self.patience = vanishing, exploding, patience
        self.every_n_steps, self.records, self.folder = every_n_steps, records, folder
        self.forget()

    def forget(self) -> None:
        self.warned: dict[str, list[str]] = {}
        self.step = 0
        self._stepped = False
        self._runs: dict[tuple[str, str], int] = {}
        self._state: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.flow = FlowRecorder(pl_module, self.records)
        if self._state is not None:
            self.flow.load_state_dict(self._state)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._stepped = True
        if self.step % self.every_n_steps == 0:
            number, log = self.step // self.every_n_steps, self._logs(trainer)
            self._judge(trainer, self.flow.before_step(number, update=log))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not self._stepped:
            return  # gradients are still accumulating
        if self.step % self.every_n_steps == 0:
            measured = self.flow.after_step(self.step // self.every_n_steps)
            if self._logs(trainer):
                numbers = {
                    f"gradient_flow/{name}/{layer}": value
                    for layer, values in measured.items()
                    for name, value in zip(MEASURES, values, strict=True)
                }
                for logger in trainer.loggers:
                    logger.log_metrics(numbers, step=self.step)
        self._stepped = False
        self.step += 1

    def _logs(self, trainer: Trainer) -> bool:
        every = max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]
        return bool(trainer.loggers) and self.step % every == 0

    def _judge(self, trainer: Trainer, measured: dict[str, tuple[float, float]]) -> None:
        finite = [norm for norm, _ in measured.values() if np.isfinite(norm)]
        largest = max(finite, default=0.0)
        scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
        for name, (norm, _) in measured.items():
            bad = not np.isfinite(norm)
            self._count(name, "not finite", bad, self.patience if scaler else 1, f"has become {norm} (NaN or infinite)")
            small = not bad and norm <= self.vanishing * largest
            self._count(name, "vanished", small, self.patience, f"vanishes: its norm is {norm:.2e}, "
                        f"the largest among the layers {largest:.2e}")  # fmt: skip
            large = not bad and norm > self.exploding
            self._count(name, "exploded", large, self.patience, f"explodes: its norm is {norm:.2e}")

    def _count(self, layer: str, what: str, now: bool, patience: int, says: str) -> None:
        run = self._runs[layer, what] = self._runs.get((layer, what), 0) + 1 if now else 0
        if now and run == patience and layer not in self.warned:
            self.warned[layer] = [what, says]
            rows = "" if patience == 1 else f", {patience} steps in a row"
            rank_zero_warn(
                f"GradientFlow: step {self.step}: the gradient of layer {layer!r} {says}{rows}", stacklevel=2
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or not hasattr(self, "flow") or not self.flow.steps:
            return
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(trainer.default_root_dir if self.folder is None else self.folder)
        replace_file(folder / "gradient_flow.csv", lambda file: file.write(self.flow.csv().encode()))
        figure = flow_figure(self.flow, self.every_n_steps)
        figure.savefig(folder / "gradient_flow.png", dpi=110)
        for logger in trainer.loggers:
            add = getattr(getattr(logger, "experiment", None), "add_figure", None)
            if add is not None:  # TensorBoard's
                add("gradient_flow", figure, global_step=self.step, close=False)

    def state_dict(self) -> dict[str, Any]:
        flow = self.flow.state_dict() if hasattr(self, "flow") else None
        return {"step": self.step, "warned": self.warned, "flow": flow}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.warned, self._state = state_dict["step"], dict(state_dict["warned"]), state_dict["flow"]


def positive_range(values: np.ndarray) -> tuple[float, float]:
    """The least and the largest finite value above 0; (0.1, 1) if there is none."""
    seen = values[np.isfinite(values) & (values > 0)]
    if not seen.size:
        return 0.1, 1.0
    low, high = float(seen.min()), float(seen.max())
    return low, high if high > low else 10 * low


def heat_map(axes: Any, steps: Any, values: np.ndarray, norm: Any) -> Any:
    """Layers (first at the bottom) × steps in colour; 0 and what is not finite in grey. Returns the image."""
    axes.set_facecolor("lightgrey")
    shown = np.where(np.isfinite(values) & (values > 0), values, np.nan).T
    image = axes.imshow(np.ma.masked_invalid(shown), aspect="auto", origin="lower", interpolation="nearest",
                        cmap="viridis", norm=norm)  # fmt: skip
    ticks = np.unique(np.linspace(0, len(steps) - 1, min(6, len(steps))).astype(int))
    axes.set_xticks(ticks, [str(steps[i]) for i in ticks])
    return image


def flow_figure(flow: FlowRecorder, every: int = 1) -> Figure:
    """The norm as a heat map layer × step and at the start, in the middle and at the end; norm and update as curves."""
    steps, norm, update = [every * s for s in flow.steps], flow.measure("norm"), flow.measure("update")
    names = flow.names
    figure = Figure(figsize=(13, 8), layout="constrained")
    (map_axes, depth), (curves, updates) = figure.subplots(2, 2)
    scale = LogNorm(*positive_range(norm))
    image = heat_map(map_axes, steps, norm, scale)
    every_name = max(1, len(names) // 20)
    map_axes.set_yticks(range(0, len(names), every_name), names[::every_name], fontsize=7)
    map_axes.set(title="Gradient norm by layer and step", xlabel="step", ylabel="layer, the first at the bottom")
    figure.colorbar(image, ax=map_axes, label="‖∂loss/∂parameters‖₂ (grey: 0 or not finite)")

    places = np.arange(1, len(names) + 1)
    for index, label in ((0, "first"), (len(steps) // 2, "middle"), (len(steps) - 1, "last")):
        depth.plot(places, np.where(norm[index] > 0, norm[index], np.nan), ".-", label=f"{label}: step {steps[index]}")
    depth.set(title="Gradient norm by depth", xlabel="layer, from input to output", ylabel="gradient norm")
    depth.legend(frameon=False, fontsize=8)

    colours = colormaps["viridis"](np.linspace(0, 0.95, len(names)))
    for place, (name, colour) in enumerate(zip(names, colours, strict=True)):
        for axes, values in ((curves, norm), (updates, update)):
            column = np.where(np.isfinite(values[:, place]) & (values[:, place] > 0), values[:, place], np.nan)
            axes.plot(steps, column, color=colour, linewidth=1, label=name)
    curves.set(title="Gradient norm", xlabel="step", ylabel="gradient norm")
    updates.set(title="Update ratio", xlabel="step", ylabel="‖Δw‖₂/‖w‖₂ of a step")
    for axes in (depth, curves, updates):
        if any(np.isfinite(line.get_ydata()).any() for line in axes.lines):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if len(names) <= 12:
        updates.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title="layer")
    else:
        mappable = ScalarMappable(Normalize(1, len(names)), colormaps["viridis"])
        figure.colorbar(mappable, ax=updates, label="layer, from input to output")
    return figure
