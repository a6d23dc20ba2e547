"""A physics-informed network for Burgers' equation: its loss is the equation itself, so it needs second derivatives.

    u_t + u u_x = ν u_xx,  0 ≤ t ≤ 1,  -1 ≤ x ≤ 1,    u(0, x) = -sin(πx),  u(t, ±1) = 0

The smooth start steepens into a thin layer at x = 0. The exact solution is known (E. Hopf 1950, J. D. Cole 1951), so
the error can be measured; the network never sees it. Source of the test case: C. Basdevant et al., Spectral and finite
difference solutions of the Burgers equation, 1986; as a network: M. Raissi et al., Physics-informed neural networks,
2019.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .. import ConfigError
from ..data import Batches, Data, check_batch_size, derive_seed
from ..modules import Batch, Metrics, Task, output_shape
from ..outcome import Outcome, Section

VISCOSITY = 0.01 / math.pi
TIMES, PLACES = 101, 257
"""The test grid: t = 0, 0.01, ..., 1 and x = -1, ..., 1 in steps of 1/128."""


def exact_solution(t: np.ndarray, x: np.ndarray, viscosity: float = VISCOSITY, nodes: int = 100) -> np.ndarray:
    """u(t, x) of float64 arrays (N,), by the Cole–Hopf transform; float64, (N,).

        u = - ∫ sin(πy) f(y) exp(-(x - y)² / 4νt) dy / ∫ f(y) exp(-(x - y)² / 4νt) dy,   f(y) = exp(-cos(πy) / 2πν)

    With y = x - z √(4νt) both integrals are of exp(-z²) times a smooth function: Gauss–Hermite quadrature.
    """
    z, weight = np.polynomial.hermite.hermgauss(nodes)
    y = x[:, None] - np.sqrt(4 * viscosity * t)[:, None] * z
    exponent = -np.cos(np.pi * y) / (2 * np.pi * viscosity)
    f = weight * np.exp(exponent - exponent.max(1, keepdims=True))  # the largest cancels: exp(50) need not be formed
    return -(np.sin(np.pi * y) * f).sum(1) / f.sum(1)


def finite_differences(cells: int, viscosity: float = VISCOSITY, steps: int = 4000) -> np.ndarray:
    """u on the test grid by the method of lines: (TIMES, PLACES), float64.

    Central differences of (u²/2)_x and ν u_xx on `cells` equal cells, the classical Runge–Kutta method in time, linear
    interpolation between the nodes. `steps` must be a multiple of TIMES - 1.
    """
    nodes = np.linspace(-1, 1, cells + 1)
    h, dt = 2 / cells, 1 / steps

    def slope(u: np.ndarray) -> np.ndarray:
        du = np.zeros_like(u)
        du[1:-1] = viscosity * (u[2:] - 2 * u[1:-1] + u[:-2]) / h**2 - (u[2:] ** 2 - u[:-2] ** 2) / (4 * h)
        return du

    u = -np.sin(np.pi * nodes)
    u[[0, -1]] = 0
    kept = [u]
    for step in range(1, steps + 1):
        a = slope(u)
        b = slope(u + dt / 2 * a)
        c = slope(u + dt / 2 * b)
        u = u + dt / 6 * (a + 2 * b + 2 * c + slope(u + dt * c))
        if step % (steps // (TIMES - 1)) == 0:
            kept.append(u)
    return np.stack([np.interp(np.linspace(-1, 1, PLACES), nodes, u) for u in kept])


def errors(u: np.ndarray | Tensor, exact: np.ndarray | Tensor) -> dict[str, float]:
    """‖u - exact‖₂ / ‖exact‖₂ over the test grid, and the largest |u - exact|."""
    u, exact = (np.asarray(v, dtype=np.float64).reshape(-1) for v in (u, exact))
    difference = u - exact
    norm = np.linalg.norm
    return {"relative L2 error": float(norm(difference) / norm(exact)), "largest error": float(abs(difference).max())}


class BurgersPoints(Data):
    """Points (t, x) where the equation is to hold, and a grid with the exact solution to measure the error on.

    Training and validation points are two scrambled Sobol sequences, drawn by the seed: (points, 2) and
    (val_points, 2). No solution is known there. The test split is the grid, (TIMES · PLACES, 2), with u (rows, 1).
    The equation is hardest to meet where u is steepest, which is at x = 0 by symmetry: there the points are denser.

    Args:
        points, val_points: how many of each; ≥ 2.
        batch_size: points in a step; None is all of them, which L-BFGS needs.
        viscosity: ν > 0.
        given: exact values that `GaussianProcessRegressor`, a baseline, is told; the network is told none.
        focus: share of the points, in [0, 1], whose x is the cube of a uniform number; the others' x is uniform.
        seed: None takes the number last given to `torch.manual_seed`.
    """

    def __init__(
        self,
        points: int = 2000,
        val_points: int = 2000,
        batch_size: int | None = None,
        viscosity: float = VISCOSITY,
        given: int = 300,
        focus: float = 0.5,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, count in (("points", points), ("val_points", val_points), ("given", given)):
            if count < 2:
                raise ValueError(f"{name} must be at least 2, got {count}")
        if batch_size is not None:
            check_batch_size(batch_size)
        if not 0 <= focus <= 1:
            raise ValueError(f"focus must be in [0, 1], got {focus}")
        check_viscosity(viscosity)
        self.points, self.val_points, self.viscosity = points, val_points, viscosity
        self.given, self.focus = given, focus
        self.batch_size = batch_size or points
        self.seed = torch.initial_seed() if seed is None else seed
        self.splits = {}

    def setup(self, stage: str) -> None:
        if self.splits:
            return
        for part, (name, count) in enumerate((("train", self.points), ("val", self.val_points))):
            self.splits[name] = (sobol(count, derive_seed(self.seed, part), self.focus),)
        t, x = (v.ravel() for v in np.meshgrid(np.linspace(0, 1, TIMES), np.linspace(-1, 1, PLACES), indexing="ij"))
        u = exact_solution(t, x, self.viscosity)[:, None]
        self.splits["test"] = (torch.tensor(np.stack([t, x], 1)), torch.tensor(u))
        # recorded in float64; networks are trained in the trainer's precision
        self.splits = {name: tuple(v.float() for v in tensors) for name, tensors in self.splits.items()}

    def in_order(self, split: str) -> Batches:
        return Batches(self.splits[split], 2000)

    def baselines(self) -> dict[str, dict[str, float]]:
        """A classical solver on two grids, and a regression that is told exact values, as many as `given`."""
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, WhiteKernel

        points, exact = (v.double().numpy() for v in self.splits["test"])
        results = {
            f"finite differences, {cells} cells": errors(finite_differences(cells, self.viscosity), exact)
            for cells in (64, 256)
        }
        seen = sobol(self.given, derive_seed(self.seed, 2), self.focus).double().numpy()
        kernel = 1.0 * RBF([0.3, 0.1], (1e-2, 10)) + WhiteKernel(1e-6, (1e-10, 1e-1))
        model = GaussianProcessRegressor(kernel, normalize_y=True).fit(
            seen, exact_solution(seen[:, 0], seen[:, 1], self.viscosity)
        )
        results[f"GaussianProcessRegressor, {self.given} exact values"] = errors(model.predict(points), exact)
        return results


class Burgers(Task):
    """The residual of Burgers' equation as the loss of a network N.

        u(t, x) = -sin(πx) + t (1 - x²) N(2t - 1, x)        so that start and boundary hold, whatever N is
        r = u_t + u u_x - ν u_xx                            loss = mean of r² over the points

    u_t, u_x and u_xx are `torch.autograd.grad` with `create_graph=True`, the second of them of the first; the step then
    differentiates once more by the parameters. Needs an activation with a second derivative: tanh, sin, gelu, not relu.

    Args:
        viscosity: ν > 0, that of the data.
        The others: as in `Task`; `LBFGS` of this module is the usual choice.
    """

    formats: ClassVar[dict[str, str]] = {"relative L2 error": ".2e", "largest error": ".2e", "loss": ".2e"}

    def __init__(self, *args: Any, viscosity: float = VISCOSITY, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_viscosity(viscosity)
        self.viscosity = viscosity

    def forward(self, points: Tensor) -> Tensor:
        """u at points (N, 2), columns t and x: (N, 1)."""
        t, x = points[:, :1], points[:, 1:]
        return -torch.sin(math.pi * x) + t * (1 - x * x) * self.network(torch.cat([2 * t - 1, x], 1))

    def residual(self, points: Tensor) -> Tensor:
        """r at points (N, 2): (N,), differentiable by the parameters."""
        with torch.inference_mode(False), torch.enable_grad():  # validation needs derivatives, too
            points = points.clone().requires_grad_()
            u = self(points)
            (du,) = torch.autograd.grad(u.sum(), points, create_graph=True)
            u_t, u_x = du.unbind(1)
            (du_x,) = torch.autograd.grad(u_x.sum(), points, create_graph=True)
            return u_t + u[:, 0] * u_x - self.viscosity * du_x[:, 1]

    def loss_and_metrics(self, batch: Batch) -> tuple[Tensor, Metrics]:
        loss = self.residual(batch[0]).square().mean()
        return loss if self.training else loss.detach(), {}

    def check(self, data: Data) -> None:
        got = output_shape(self, data.example(2)[0], "the data's points have 2 coordinates, t and x")
        if got != (2, 1):
            raise ConfigError(f"model.init_args.network: two points should give (2, 1), not {got}")
        if isinstance(data, BurgersPoints) and data.viscosity != self.viscosity:
            raise ConfigError(f"model.init_args.viscosity: {self.viscosity}, but the data's is {data.viscosity}")

    def test_metrics(self, outputs: Tensor, data: Data) -> dict[str, float]:
        return errors(outputs, data.splits["test"][1])

    def predictions(self, outputs: Tensor, data: Data) -> tuple[list[str], Iterable[Sequence[object]]]:
        points, exact = data.splits["test"]
        rows = torch.cat([points, exact, outputs.to(points)], 1).tolist()
        return ["row", "t", "x", "true", "predicted"], ([i, *row] for i, row in enumerate(rows))

    def report_sections(self, outcome: Outcome) -> list[Section]:
        exact = outcome.data.splits["test"][1].reshape(TIMES, PLACES).numpy()
        figure = solution(exact, outcome.outputs.double().reshape(TIMES, PLACES).numpy())
        points = len(outcome.data.splits["train"][0])
        told = [
            f"The network was told the equation at {points:,} points, with start and boundary built in; no value of u."
        ]
        return [Section("solution", "Solution, prediction and error", figure, told)]


class LBFGS(torch.optim.LBFGS):
    """torch's, for parameters that come in groups: it has one step length for all of them, so they become one group.

    A group's own options are refused, unless it is the weight decay of 0 that recipes give to biases.

    A step that could not move, because rounding left no direction of descent, drops its history: the next one starts
    along the gradient. torch's would stand still for good.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        max_iter: int = 50,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 50,
        line_search_fn: str | None = "strong_wolfe",
    ) -> None:
        flat: list[Tensor] = []
        for group in params:
            if not isinstance(group, dict):
                flat.append(group)
                continue
            options = {key for key, value in group.items() if key != "params" and (key, value) != ("weight_decay", 0.0)}
            if options:
                raise ValueError(f"LBFGS has no options by group, got {', '.join(sorted(options))}")
            flat += group["params"]
        super().__init__(flat, lr, max_iter, max_eval, tolerance_grad, tolerance_change, history_size, line_search_fn)

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        state = self.state[self._params[0]]
        before = state.get("func_evals", 0)
        loss = super().step(closure)
        if state["func_evals"] - before == 1:
            state.clear()
        return loss


class TorchMLP(torch.nn.Sequential):
    """`bp_torch.nn.MLP` of torch.nn's layers, with the same initial weights from the same seed: to compare with."""

    def __init__(
        self, in_features: int, hidden_features: list[int], out_features: int, activation: str = "tanh"
    ) -> None:
        activations: dict[str, type[torch.nn.Module]] = {
            "tanh": torch.nn.Tanh,
            "silu": torch.nn.SiLU,
            "gelu": torch.nn.GELU,
            "softplus": torch.nn.Softplus,
        }
        if activation not in activations:
            raise ValueError(f"activation must be one of {', '.join(activations)}, got {activation!r}")
        layers: list[torch.nn.Module] = []
        for before, width in zip([in_features, *hidden_features], hidden_features, strict=False):
            layers += [torch.nn.Linear(before, width), activations[activation]()]
        super().__init__(*layers, torch.nn.Linear([in_features, *hidden_features][-1], out_features))


def check_viscosity(viscosity: float) -> None:
    if not 0 < viscosity < math.inf:
        raise ValueError(f"viscosity must be positive and finite, got {viscosity}")


def sobol(count: int, seed: int, focus: float = 0.0) -> Tensor:
    """Points (t, x) in [0, 1] × [-1, 1], evenly spread, but for a share `focus` whose x is cubed: (count, 2)."""
    unit = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed % 2**31).draw(count)
    points = unit * torch.tensor([1.0, 2.0]) - torch.tensor([0.0, 1.0])
    points[: round(focus * count), 1] **= 3
    return points


def solution(exact: np.ndarray, predicted: np.ndarray) -> Figure:
    """Two fields over (t, x), their difference, and four moments of both."""
    figure = Figure(figsize=(13, 6.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1)
    above, below = parts
    panels: list[tuple[str, np.ndarray, dict[str, Any]]] = [
        ("exact solution u", exact, {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}),
        ("the network's u", predicted, {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}),
        ("|network - exact|", abs(predicted - exact), {"cmap": "magma", "vmin": 0}),
    ]
    extent = (0.0, 1.0, -1.0, 1.0)
    for axes, (title, field, style) in zip(above.subplots(1, 3, sharey=True), panels, strict=True):
        image = axes.imshow(field.T, origin="lower", extent=extent, aspect="auto", interpolation="nearest", **style)
        above.colorbar(image, ax=axes)
        _label(axes, title, "t", "x" if field is exact else "")
    x, moments = np.linspace(-1, 1, PLACES), (0.25, 0.5, 0.75, 1.0)
    for axes, t in zip(below.subplots(1, 4, sharey=True), moments, strict=True):
        row = round(t * (TIMES - 1))
        axes.plot(x, exact[row], color="black", label="exact")
        axes.plot(x, predicted[row], "--", color="tab:orange", label="network")
        axes.set_ylim(-1.1, 1.1)
        axes.grid(alpha=0.3)
        _label(axes, f"t = {t}", "x", "u" if t == moments[0] else "")
        if t == moments[0]:
            axes.legend(frameon=False, fontsize=9)
    return figure


def _label(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
