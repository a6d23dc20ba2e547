"""Burgers' equation: its solution, residual and optimizer, a short training, and in full what the header says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
from commands import fit, repeat

from bp_torch import nn
from bp_torch.recipes import ConfigError
from bp_torch.recipes.applications import physics
from bp_torch.recipes.applications.physics import LBFGS, Burgers, BurgersPoints, TorchMLP, exact_solution
from bp_torch.recipes.repeat import OURS

ONE_BACKEND = "recipes' data and tasks; their layers are tested on both elsewhere"

pytestmark = pytest.mark.usefixtures("own_folder")


def test_exact_solution_solves_the_equation() -> None:
    x = np.linspace(-1, 1, 41)
    assert exact_solution(np.zeros(41), x) == pytest.approx(-np.sin(np.pi * x), abs=1e-12)
    ends = exact_solution(np.array([0.3, 1.0]), np.array([-1.0, 1.0]))
    assert ends == pytest.approx(0, abs=1e-12)
    t, x = (v.ravel() for v in np.meshgrid(np.linspace(0.1, 1, 7), np.linspace(-0.95, 0.95, 39)))
    finer = exact_solution(t, x, nodes=200)
    assert exact_solution(t, x) == pytest.approx(finer, abs=1e-12)
    h, nu = 1e-4, physics.VISCOSITY

    def u(dt: float, dx: float) -> np.ndarray:
        return exact_solution(t + dt, x + dx, nodes=200)

    u_t = (u(h, 0) - u(-h, 0)) / (2 * h)
    u_x = (u(0, h) - u(0, -h)) / (2 * h)
    u_xx = (u(0, h) - 2 * u(0, 0) + u(0, -h)) / h**2
    # the terms are as large as 150 in the layer
    assert u_t + u(0, 0) * u_x - nu * u_xx == pytest.approx(0, abs=2e-2)


def test_exact_solution_has_the_published_slope() -> None:
    """Basdevant et al.: the largest slope at the origin is 152.00516, at π t = 1.6037."""
    h = 1e-6
    ahead = exact_solution(np.array([1.6037 / np.pi]), np.array([h]))
    assert -ahead[0] / h == pytest.approx(152.00516, rel=1e-6)


def test_finite_differences_converge() -> None:
    data = BurgersPoints(seed=0)
    data.setup("fit")
    exact = data.splits["test"][1].numpy()
    coarse, fine = (
        physics.errors(physics.finite_differences(cells, steps=2000), exact)["relative L2 error"]
        for cells in (128, 256)
    )
    assert fine < 5e-3 < 4 * fine < coarse


def test_residual_is_the_equation_and_has_torchs_gradient() -> None:
    """r against finite differences of u; ∂loss/∂W, a third derivative, against the same network of torch.nn."""
    torch.manual_seed(0)
    ours = Burgers(nn.MLP(2, [12, 12], 1, activation="tanh")).double()
    theirs = Burgers(TorchMLP(2, [12, 12], 1)).double()
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        p.data.copy_(q.data)
    points = physics.sobol(40, 0).double()
    h = 1e-4
    dt, dx = torch.tensor([h, 0.0]).double(), torch.tensor([0.0, h]).double()
    with torch.no_grad():
        u, before, after, left, right = (ours(points + d)[:, 0] for d in (0 * dt, -dt, dt, -dx, dx))
    expected = (after - before) / (2 * h) + u * (right - left) / (2 * h)
    expected -= physics.VISCOSITY * (right - 2 * u + left) / h**2
    assert ours.residual(points).allclose(expected, atol=1e-6)
    for model in (ours, theirs):
        model.loss_and_metrics([points])[0].backward()
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert q.grad.allclose(p.grad, rtol=1e-10, atol=1e-12)


def test_points_are_spread_and_focused() -> None:
    even, focused = physics.sobol(4096, 1), physics.sobol(4096, 1, 0.5)
    for points in (even, focused):
        t, x = points.T
        assert 0 <= t.min() < 0.01 < 0.99 < t.max() <= 1
        assert -1 <= x.min() < -0.99 < 0.99 < x.max() <= 1
        assert x.mean().abs() < 1e-3
    near = [(points[:, 1].abs() < 0.125).float().mean() for points in (even, focused)]
    assert near[0] == pytest.approx(1 / 8, abs=2e-3)
    assert near[1] == pytest.approx((1 / 8 + 1 / 2) / 2, abs=2e-3)  # |v³| < 1/8 where |v| < 1/2
    assert not torch.equal(even, physics.sobol(4096, 2))


def test_start_and_boundary_hold_whatever_the_network() -> None:
    task = Burgers(nn.MLP(2, [5], 1, activation="sin"))
    x = torch.linspace(-1, 1, 9)[:, None]
    start = task(torch.cat([torch.zeros_like(x), x], 1))
    assert start.allclose(-torch.sin(torch.pi * x), atol=1e-6)
    walls = task(torch.tensor([[0.3, -1.0], [0.9, 1.0]]))
    assert walls.abs().max() < 1e-6


def test_residual_without_gradients_around_it() -> None:
    task = Burgers(nn.MLP(2, [5], 1, activation="tanh"))
    points = physics.sobol(8, 0)
    outside = task.residual(points)
    with torch.inference_mode():
        assert task.eval().loss_and_metrics([points])[0] == outside.detach().square().mean()


def test_lbfgs_takes_groups() -> None:
    p, q = (torch.nn.Parameter(torch.full((2,), 3.0)) for _ in range(2))
    optimizer = LBFGS([{"params": [p]}, {"params": [q], "weight_decay": 0.0}], max_iter=20)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p - 1).square().sum() + 10 * (q + p).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert p.allclose(torch.ones(2), atol=1e-4)
    assert q.allclose(-torch.ones(2), atol=1e-4)
    with pytest.raises(ValueError, match="no options by group, got lr"):
        LBFGS([{"params": [p], "lr": 1.0}])


@pytest.mark.parametrize(("kind", "goes_on"), [(LBFGS, True), (torch.optim.LBFGS, False)])
def test_lbfgs_that_stands_still_starts_anew(kind: type[torch.optim.LBFGS], goes_on: bool) -> None:
    p = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = kind([p], max_iter=2, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2
        loss.backward()
        return loss

    optimizer.step(closure)
    state = optimizer.state[p]
    for name in ("old_dirs", "old_stps", "ro"):
        state[name].clear()
    state["d"], state["H_diag"] = torch.zeros(2), -1  # what rounding can leave: a direction that leads upwards
    before = float(closure().detach())
    for _ in range(20):
        optimizer.step(closure)
    assert (float(closure().detach()) < 0.5 * before) == goes_on


def test_physics_refusals() -> None:
    data = BurgersPoints(seed=0, points=8, val_points=8)
    data.setup("fit")
    for network, message in ((nn.MLP(3, [4], 1), "2 coordinates"), (nn.MLP(2, [4], 2), r"should give \(2, 1\)")):
        with pytest.raises(ConfigError, match=message):
            Burgers(network).check(data)
    with pytest.raises(ConfigError, match=r"model.init_args.viscosity: 0.1, but"):
        Burgers(nn.MLP(2, [4], 1, activation="tanh"), viscosity=0.1).check(data)
    for name, value in (("points", 1), ("given", 0), ("batch_size", 1), ("viscosity", 0.0), ("focus", 2.0)):
        with pytest.raises(ValueError, match=name):
            BurgersPoints(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="activation must be one of"):
        TorchMLP(2, [4], 1, "relu")


@pytest.mark.slow
def test_physics_learns() -> None:
    """At ten times the viscosity a small network is within 3 % after some 300 iterations."""
    outcome = fit(
        "physics",
        *("--model.viscosity", "0.05", "--data.viscosity", "0.05", "--data.points", "500", "--data.val_points", "200"),
        *("--model.network.hidden_features", "[16,16]", "--trainer.max_epochs", "8", "--data.given", "30"),
    )
    assert outcome.test["relative L2 error"] < 0.03
    assert outcome.history[-1]["train_loss"] < 0.1 * outcome.history[0]["train_loss"]
    assert outcome.baselines["finite differences, 256 cells"]["relative L2 error"] < 1e-3
    assert (outcome.run / "figures" / "solution.png").stat().st_size > 50_000


@pytest.mark.recipes
@pytest.mark.timeout(3600)
def test_physics_in_full() -> None:
    results = repeat("physics", "--seeds", "0,1,2,3,4")
    ours = results.pop(OURS)["relative L2 error"]
    assert ours["mean"] <= 1e-2
    assert max(ours["values"]) <= 2e-2
    told = next(scores for name, scores in results.items() if name.startswith("GaussianProcess"))
    assert told["relative L2 error"]["better"] == 5


@pytest.mark.recipes
@pytest.mark.timeout(3600)
def test_physics_with_torchs_layers_in_full() -> None:
    """The same network of torch.nn's layers, from the same weights, comes as far."""
    layers = f"{TorchMLP.__module__}.{TorchMLP.__name__}"
    shape = ["--model.network.in_features", "2", "--model.network.out_features", "1"]
    shape += ["--model.network.hidden_features", "[32,32,32,32]", "--model.network.activation", "tanh"]
    theirs = repeat("physics", "--seeds", "0", "--model.network", layers, *shape, "--baselines", "false")[OURS]
    assert theirs["relative L2 error"]["mean"] <= 2e-2
