"""Write an autograd function, let bp_torch.check find what is wrong with it, mend it, and train with it.

python examples/own_function.py
"""

import torch

import bp_torch


class Squareplus(torch.autograd.Function):
    """f(x) = (x + √(x² + 4)) / 2, a smooth ReLU: Barron 2021, arXiv:2112.11687. f′(x) = f(x) / √(x² + 4)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return (x + torch.sqrt(x * x + 4)) / 2

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        (x,) = inputs
        ctx.save_for_backward(x, output)

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> torch.Tensor:
        x, y = ctx.saved_tensors
        return dy * y / torch.sqrt(x * x + 4)


class Hasty(Squareplus):
    """The same, but forward keeps the slope. To autograd that is a constant, so f″ is lost without an error."""

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        (x,) = inputs
        ctx.save_for_backward(output / torch.sqrt(x * x + 4))

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> torch.Tensor:
        (slope,) = ctx.saved_tensors
        return dy * slope


def main() -> None:
    torch.manual_seed(0)
    checks = ["gradcheck", "gradgradcheck", "strided-gradients", "nan", "vmap"]
    report = bp_torch.check(Hasty, torch.randn(4, 3), checks=checks)
    print(report.explanation(), "\n")
    assert [result.name for result in report.failures] == ["gradgradcheck"]

    report = bp_torch.check(Squareplus, torch.randn(4, 3), checks=checks)
    print(report.explanation(), "\n")
    assert report

    # d²y/dx² = -y, y(0) = 0, y'(0) = 1: the loss needs f″, and its gradient f‴.
    hidden, output = bp_torch.nn.Linear(1, 32), bp_torch.nn.Linear(32, 1)
    parameters = [*hidden.parameters(), *output.parameters()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=150, line_search_fn="strong_wolfe")
    x = torch.linspace(0, 3, 64)[:, None].requires_grad_()

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        y = output(Squareplus.apply(hidden(x)))
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        value = (curvature + y).square().mean() + y[0].square().sum() + (slope[0] - 1).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    error = (output(Squareplus.apply(hidden(x))) - torch.sin(x)).abs().max().item()
    print(f"y'' = -y: at most {error:.1e} from sin x on [0, 3]")
    assert error < 0.05


if __name__ == "__main__":
    main()
