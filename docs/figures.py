"""Draws the figures of the layers' pages, from the layers themselves: python docs/figures.py [NAME ...]"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import bp_torch.functional as F
from bp_torch import nn
from bp_torch.functions.activation_table import ACTIVATIONS
from bp_torch.functions.loss import ERRORS

FOLDER = Path(__file__).parent / "figures"
FORWARD, BACKWARD, THIRD = "tab:blue", "tab:red", "tab:green"


def array(t: torch.Tensor) -> np.ndarray:
    return t.detach().numpy()


def page(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def plain(axes: Axes, title: str, xlabel: str = "", ylabel: str = "") -> Axes:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def flow(nodes: list[tuple[str, str]], forward: list[str], backward: list[str], title: str) -> Figure:
    """A chain of tensors: name and shape in boxes, forward operations above the arrows, backward ones below."""
    figure = page(2.35 * len(nodes), 2.5)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_title(title, fontsize=11)
    gap = 2.35
    for i, (name, shape) in enumerate(nodes):
        text = f"{name}\n{shape}"
        box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "black"}
        axes.text(gap * i, 0, text, ha="center", va="center", fontsize=11, bbox=box, zorder=3)
        if i + 1 < len(nodes):
            for y, start, end, colour, label, place in (
                (0.28, 0.5, gap - 0.5, FORWARD, forward[i], "bottom"),
                (-0.28, gap - 0.5, 0.5, BACKWARD, backward[i], "top"),
            ):
                arrow = {"arrowstyle": "->", "color": colour, "linewidth": 1.4}
                axes.annotate("", (gap * i + end, y), (gap * i + start, y), arrowprops=arrow)
                shift = 0.06 if place == "bottom" else -0.06
                axes.text(gap * i + gap / 2, y + shift, label, ha="center", va=place, color=colour, fontsize=9.5)
    axes.set_xlim(-0.7, gap * (len(nodes) - 1) + 0.7)
    axes.set_ylim(-1.05, 1.05)
    return figure


def dense() -> Figure:
    return flow(
        [("x", "(N, I)"), ("z", "(N, O)"), ("a", "(N, O)"), ("y", "(N, O)")],
        ["z = x Wᵀ + b", "a = f(z)", "y = m ⊙ a / (1 - p)"],
        ["dx = dz W\ndW = dzᵀ x\ndb = Σ dz", "dz = da ⊙ f′(z)", "da = m ⊙ dy / (1 - p)"],
        "The dense layer: forward above, backward below",
    )


def activation() -> Figure:
    """f, f′ and f″ of every row, from autograd through the Function."""
    columns = 5
    lines = -(-len(ACTIVATIONS) // columns)
    figure = page(3 * columns, 2.2 * lines)
    x = torch.linspace(-4, 4, 801, dtype=torch.float64, requires_grad=True)
    for i, name in enumerate(ACTIVATIONS):
        axes = plain(figure.add_subplot(lines, columns, i + 1), name)
        y = F.activation(x, name)
        (dy,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        d2y = torch.autograd.grad(dy.sum(), x)[0] if dy.requires_grad else torch.zeros_like(x)
        for values, colour, label in ((y, FORWARD, "f"), (dy, BACKWARD, "f′"), (d2y, THIRD, "f″")):
            axes.plot(array(x), array(values), color=colour, label=label, linewidth=1.4)
        axes.set_ylim(-2.2, 3.2)
        axes.grid(alpha=0.3)
        if i == 0:
            axes.legend(frameon=False, fontsize=9)
    return figure


def dropout() -> Figure:
    """The mean and the deviation of a sum of dropped-out numbers against p, measured and by formula."""
    torch.manual_seed(0)
    p = torch.linspace(0, 0.9, 19)
    x = torch.randn(64)
    sums = torch.stack([F.dropout(x.expand(20000, 64), float(q)).sum(1) for q in p])
    figure = page(8, 3.4)
    left = plain(figure.add_subplot(1, 2, 1), "Σ dropout(x): mean over 20,000 masks", "p", "")
    left.plot(array(p), array(sums.mean(1)), "o", color=FORWARD, markersize=4, label="measured")
    left.axhline(float(x.sum()), color="black", linewidth=1, label="Σ x")
    left.set_ylim(float(x.sum()) - 3, float(x.sum()) + 3)
    right = plain(figure.add_subplot(1, 2, 2), "its standard deviation", "p", "")
    right.plot(array(p), array(sums.std(1)), "o", color=FORWARD, markersize=4, label="measured")
    right.plot(
        array(p), array((p / (1 - p) * x.square().sum()).sqrt()), color="black", linewidth=1, label="√(p/(1-p) Σ x²)"
    )
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    return figure


def batch_norm() -> Figure:
    """What a large mean costs: the error of x̂ in float32, by this package and by the one-pass formula."""
    torch.manual_seed(0)
    means = torch.logspace(0, 5, 16, dtype=torch.float64)
    base = torch.randn(4096, 8, dtype=torch.float64)
    errors: dict[str, list[float]] = {"E[x²] - E[x]²": [], "torch.nn": [], "bp_torch": []}
    for mean in means:
        x = (base + mean).float()
        exact = (x.double() - x.double().mean(0)) / (x.double().var(0, correction=0) + 1e-5).sqrt()
        one_pass = (x - x.mean(0)) / ((x * x).mean(0) - x.mean(0) ** 2 + 1e-5).clamp(min=1e-12).sqrt()
        found = (
            one_pass,
            torch.nn.functional.batch_norm(x, None, None, training=True),
            F.batch_norm(x, None, None, training=True),
        )
        for name, y in zip(errors, found, strict=True):
            errors[name].append(float((y.double() - exact).abs().max()))
    figure = page(6.5, 3.8)
    axes = plain(figure.add_subplot(), "Largest error of x̂ in float32, deviation 1", "mean of x", "largest error")
    for (name, values), style in zip(errors.items(), ("s-", "^-", "o-"), strict=True):
        axes.loglog(array(means), values, style, markersize=4, label=name)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure


def residual() -> Figure:
    """The norm of the gradient that reaches each of 50 layers, with and without the way round."""
    figure = page(6.5, 3.8)
    axes = plain(
        figure.add_subplot(), "Gradient at each of 50 dense layers, tanh", "layer, from the input", "‖∂loss/∂W‖"
    )
    for name, connected in (("plain", False), ("residual", True)):
        torch.manual_seed(0)
        layers = [nn.Dense(64, 64, activation="tanh") for _ in range(50)]
        x = torch.randn(256, 64)
        for layer in layers:
            x = F.residual(layer(x), x) if connected else layer(x)
        x.square().mean().backward()
        norms = [float(layer.weight.grad.norm()) for layer in layers if layer.weight.grad is not None]
        axes.semilogy(range(1, 51), norms, label=name)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure


def softmax() -> Figure:
    x = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0], dtype=torch.float64)
    figure = page(8, 3.4)
    axes = plain(figure.add_subplot(1, 2, 1), "softmax(x / T), x = 2, 1, 0, -1, -2", "class", "probability")
    for i, temperature in enumerate((0.5, 1.0, 4.0)):
        y = F.softmax(x / temperature, -1)
        axes.bar((torch.arange(5) + 0.27 * (i - 1)).tolist(), y.tolist(), width=0.25, label=f"T = {temperature:g}")
    axes.legend(frameon=False)
    jacobian = torch.func.jacrev(lambda t: F.softmax(t, -1))(x)
    axes = figure.add_subplot(1, 2, 2)
    axes.set_title("Its Jacobian diag(y) - y yᵀ at T = 1", fontsize=11)
    image = axes.imshow(array(jacobian), cmap="RdBu_r", vmin=-0.25, vmax=0.25)
    for i in range(5):
        for j in range(5):
            axes.text(j, i, f"{jacobian[i, j]:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(5))
    axes.set_yticks(range(5))
    axes.set_xlabel("input")
    axes.set_ylabel("output")
    figure.colorbar(image, ax=axes, shrink=0.85)
    return figure


def cross_entropy() -> Figure:
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    figure = page(8.5, 3.6)
    left = plain(figure.add_subplot(1, 2, 1), "Loss", "logit of the true class minus the other", "nats")
    right = plain(
        figure.add_subplot(1, 2, 2), "Gradient by that logit: p - k", "logit of the true class minus the other"
    )
    for smoothing, colour in ((0.0, FORWARD), (0.1, BACKWARD), (0.3, THIRD)):
        logits = torch.stack([x, torch.zeros_like(x)], 1).requires_grad_()
        target = torch.zeros(len(x), dtype=torch.int64)
        loss = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
        (dx,) = torch.autograd.grad(loss.sum(), logits)
        left.plot(array(x), array(loss), color=colour, label=f"label smoothing {smoothing:g}")
        right.plot(array(x), array(dx[:, 0]), color=colour)
    left.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def losses() -> Figure:
    e = torch.linspace(-3, 3, 601, dtype=torch.float64, requires_grad=True)
    forms: dict[str, Callable[..., torch.Tensor]] = {
        "mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss, "huber": F.huber_loss
    }  # fmt: skip
    assert forms.keys() == ERRORS.keys()
    figure = page(8.5, 3.6)
    left = plain(figure.add_subplot(1, 2, 1), "ρ(e), e = x - t", "e")
    right = plain(figure.add_subplot(1, 2, 2), "ρ′(e)", "e")
    for name, form in forms.items():
        options = {"beta": 0.5} if name == "smooth_l1" else {}
        y = form(e, torch.zeros_like(e), reduction="none", **options)
        (de,) = torch.autograd.grad(y.sum(), e)
        label = name + (" (β = 0.5)" if options else " (δ = 1)" if name == "huber" else "")
        left.plot(array(e), array(y), label=label)
        right.plot(array(e), array(de))
    left.set_ylim(-0.1, 4)
    left.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def penalties() -> Figure:
    """What L1 and L2 do to the least-squares solution of one weight: it is cut off, or shrunk."""
    w0 = torch.linspace(-3, 3, 601)
    figure = page(8.5, 3.6)
    axes = plain(figure.add_subplot(1, 2, 1), "Penalty of one weight", "w", "R")
    w = torch.linspace(-2, 2, 401)[:, None]
    rows = (("L1, λ = 1", F.l1_penalty, (1.0,)), ("L2, λ = 1", F.l2_penalty, (1.0,)),
            ("elastic net, λ = 1, half L1", F.elastic_net_penalty, (1.0, 0.5)))  # fmt: skip
    for name, form, arguments in rows:
        axes.plot(array(w[:, 0]), array(torch.stack([form([v], *arguments) for v in w])), label=name)
    axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.3)
    axes = plain(figure.add_subplot(1, 2, 2), "argmin of ½ (w - w₀)² + R(w)", "w₀, the solution without a penalty", "w")
    axes.plot(array(w0), array(w0.sign() * (w0.abs() - 1).clamp(min=0)), label="L1: exact zeros")
    axes.plot(array(w0), array(w0 / 3), label="L2: smaller, never zero")
    axes.plot(array(w0), array(w0.sign() * (w0.abs() - 0.5).clamp(min=0) / 2), label="elastic net: both")
    axes.plot(array(w0), array(w0), color="black", linewidth=0.8, linestyle=":")
    axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.3)
    return figure


def mlp() -> Figure:
    return flow(
        [("x = a₀", "(N, I)"), ("a₁", "(N, H)"), ("a₂", "(N, H)"), ("y = z₃", "(N, O)")],
        ["f(a₀ W₁ᵀ + b₁)", "f(a₁ W₂ᵀ + b₂)", "a₂ W₃ᵀ + b₃"],
        ["dW₁ = dz₁ᵀ a₀\nda₀ = dz₁ W₁", "dW₂ = dz₂ᵀ a₁\nda₁ = dz₂ W₂", "dW₃ = dyᵀ a₂\nda₂ = dy W₃"],
        "An MLP: each dz = da ⊙ f′(z), then the three gradients of a dense layer",
    )


FIGURES: dict[str, Callable[[], Figure]] = {
    f.__name__: f
    for f in (dense, activation, dropout, batch_norm, residual, softmax, cross_entropy, losses, penalties, mlp)
}


def main(names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in names or FIGURES:
        FIGURES[name]().savefig(FOLDER / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
