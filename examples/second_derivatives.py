"""Three uses of a second derivative through fused layers: a gradient penalty, a force field, a Laplacian.

python examples/second_derivatives.py
"""

import torch

from bp_torch import nn


def gradient_penalty(critic: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """mean (‖∂critic/∂x‖ - 1)², as in Wasserstein GANs (Gulrajani et al. 2017, arXiv:1704.00028)."""
    x = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (dx.norm(dim=1) - 1).square().mean()


def forces(energy: torch.nn.Module, positions: torch.Tensor) -> torch.Tensor:
    """-∂energy/∂positions, differentiable by the weights."""
    positions = positions.detach().requires_grad_()
    (slope,) = torch.autograd.grad(energy(positions).sum(), positions, create_graph=True)
    return -slope


def laplacian(u: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Σ ∂²u/∂x_i² at each row, by torch.func."""
    hessian = torch.func.vmap(torch.func.hessian(lambda row: u(row[None]).squeeze()))
    return hessian(x).diagonal(dim1=-2, dim2=-1).sum(-1)


def main() -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Dense(4, 32, activation="leaky_relu", dropout=0.1), nn.Linear(32, 1))
    penalty = gradient_penalty(critic, torch.randn(64, 4))
    penalty.backward()
    print(f"gradient penalty {penalty.item():.4f}, its gradient {critic[0].weight.grad.norm().item():.4f}")

    energy = nn.MLP(3, [32, 32], 1, activation="silu")
    positions = torch.randn(128, 3)
    optimizer = torch.optim.Adam(energy.parameters(), lr=1e-2)
    for step in range(201):  # the forces of a spring: -positions
        loss = (forces(energy, positions) + positions).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"force field, step {step}: loss {loss.item():.4f}")

    u = nn.MLP(2, [16], 1, activation="sin")
    x = torch.randn(5, 2)
    W, w = u.hidden1.weight, u.output.weight  # u = w sin(W x + b) + c, so Δu = -Σ_h w_h ‖W_h‖² sin(W x + b)_h
    exact = -(torch.sin(x @ W.T + u.hidden1.bias) * W.square().sum(1)) @ w[0]
    print(f"Laplacian, largest error {(laplacian(u, x) - exact).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
