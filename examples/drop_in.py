"""Convert a torch.nn model in place, train both side by side, and take the conversion back.

python examples/drop_in.py
"""

import copy

import torch

import bp_torch


def train(model: torch.nn.Module, steps: int = 50) -> list[float]:
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        x = torch.randn(64, 16)
        target = (x[:, 0] * x[:, 1] > 0).long()
        loss = torch.nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(
        nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2)
    )
    ours = bp_torch.convert(copy.deepcopy(model))
    print(bp_torch.conversion_report(ours))

    theirs_losses, our_losses = train(model), train(ours)
    apart = max(abs(a - b) for a, b in zip(theirs_losses, our_losses, strict=True))
    print(f"loss {our_losses[0]:.3f} -> {our_losses[-1]:.3f}; torch.nn and bp_torch at most {apart:.1e} apart")
    assert apart < 1e-3

    bp_torch.revert(ours)
    model.load_state_dict(ours.state_dict())  # the same keys, before and after
    assert bp_torch.conversion_report(ours).count("left") == len(ours)


if __name__ == "__main__":
    main()
