"""The whole narrow MLP: against its layers, on shapes around the tiles, and when its kernels run."""

from __future__ import annotations

import pytest
import torch
from cases import torch_activation
from device import DEVICE
from exact import assert_as_good_as_torch as judge
from torch import Tensor

import bp_torch
from bp_torch import functional as bpF
from bp_torch import triton_kernels as kernels
from bp_torch.functions.activation import ACTIVATIONS

ONE_BACKEND = "about the kernels alone"

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def network(widths: tuple[int, ...], dtype: torch.dtype, bias: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    pairs = list(zip(widths[1:], widths[:-1], strict=True))
    Ws = [(torch.randn(pair, device=DEVICE) / pair[1] ** 0.5).to(dtype).requires_grad_() for pair in pairs]
    bs = [torch.randn(pair[0], device=DEVICE).to(dtype).requires_grad_() for pair in pairs] if bias else []
    return Ws, bs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_which_networks_fit(dtype: torch.dtype, backward: bool) -> None:
    """Inputs, hidden layers and outputs up to the same width, none of them empty, the hidden ones alike."""
    mlp = kernels.mlp
    w = mlp.WIDEST_FLOAT32 if dtype == torch.float32 else mlp.WIDEST_BACKWARD if backward else mlp.WIDEST

    def fits(*widths: int, rows: int = 3) -> bool:
        x, (Ws, _) = torch.zeros(rows, widths[0], device=DEVICE, dtype=dtype), network(widths, dtype)
        return mlp.fits(x, Ws, backward)

    assert fits(w, w, w)
    assert fits(1, w, w, 1)
    assert not any(fits(*widths) for widths in [(w + 1, w, w), (w, w + 1, w), (w, w, w + 1)])
    assert not any(fits(*widths) for widths in [(0, w, w), (w, 0, w), (w, w, 0), (w, w), (w, w, w - 1, w)])
    assert not fits(w, w, w, rows=0)


def by_layers(x: Tensor, Ws: list[Tensor], bs: list[Tensor], key: str) -> Tensor:
    for index, W in enumerate(Ws):
        x = torch.nn.functional.linear(x, W, bs[index] if bs else None)
        x = torch_activation(key)(x, *ACTIVATIONS[key].parameters.values()) if index < len(Ws) - 1 else x
    return x


def assert_as_good_as_torch(x: Tensor, Ws: list[Tensor], bs: list[Tensor], key: str, recompute: bool = False) -> int:
    """y and every gradient. Returns how often the network ran."""

    def run(f, dy: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
        given = [t.detach().requires_grad_() for t in leaves]
        y = f(given[0], given[1 : 1 + len(Ws)], given[1 + len(Ws) :], key)
        return [y, *torch.autograd.grad(y, given, dy)]

    dy = torch.cos(torch.arange(x[..., 0].numel() * len(Ws[-1]), device=DEVICE)).view(*x.shape[:-1], -1).to(x.dtype)

    @bp_torch.backend("triton")
    def ours(x, Ws, bs, key):
        return bpF.mlp(x, Ws, bs or None, activation=key, recompute=recompute)

    return judge(
        lambda dy, *given: run(ours, dy, given),
        lambda dy, *given: run(by_layers, dy, given),
        lambda: [t * (1 + 0.1 * torch.randn_like(t)) for t in (dy, x, *Ws, *bs)],
    )


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels' entry points, as they are called."""
    called: list[str] = []
    for name in ("forward", "backward"):
        f = getattr(kernels.mlp, name)
        monkeypatch.setattr(kernels.mlp, name, lambda *args, f=f, name=name: called.append(name) or f(*args))
    return called


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "widths"),
    [(1, (1, 1, 1)), (33, (5, 17, 17, 3)), (64, (16, 32, 32, 32, 16)), (7, (31, 9, 9, 9, 32)), (40, (3, 20, 2))],
    ids=str,
)
@pytest.mark.parametrize("recompute", [False, True])
def test_shapes_around_the_tiles(
    dtype: torch.dtype, rows: int, widths: tuple[int, ...], recompute: bool, launches: list[str]
) -> None:
    Ws, bs = network(widths, dtype)
    x = torch.randn(rows, widths[0], device=DEVICE).to(dtype).requires_grad_()
    runs = assert_as_good_as_torch(x, Ws, bs, "tanh", recompute)
    assert launches == ["forward", *["forward"] * recompute, "backward"] * runs


@pytest.mark.parametrize("key", ["relu", "gelu", "sigmoid", "leaky_relu", "identity", "softplus"])
@pytest.mark.parametrize("bias", [False, True])
def test_activations(key: str, bias: bool) -> None:
    Ws, bs = network((5, 9, 9, 3), torch.float32, bias)
    assert_as_good_as_torch(torch.randn(2, 6, 5, device=DEVICE, requires_grad=True), Ws, bs, key)


def test_several_blocks_of_rows_in_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sums of dW and db go on from block to block; the last program has fewer rows."""
    monkeypatch.setattr(kernels.mlp, "PROGRAMS", 2)
    Ws, bs = network((4, 6, 6, 3), torch.float32)
    assert_as_good_as_torch(torch.randn(32 * 4 + 5, 4, device=DEVICE, requires_grad=True), Ws, bs, "silu")


@pytest.mark.parametrize(
    ("widths", "dtype", "expected"),
    [
        ((4, 6, 6, 3), torch.float32, ["forward", "backward"]),
        ((4, 6, 7, 3), torch.float32, []),  # two hidden widths
        ((4, 3), torch.float32, []),  # no hidden layer
        ((4, 33, 3), torch.float32, []),  # too wide for float32
        ((4, 64, 3), torch.bfloat16, ["forward", *["backward"] * (torch.version.hip is None)]),
        ((4, 65, 3), torch.bfloat16, []),  # too wide
        ((129, 6, 3), torch.bfloat16, []),
    ],
    ids=str,
)
def test_which_networks_the_kernels_serve(
    widths: tuple[int, ...], dtype: torch.dtype, expected: list[str], launches: list[str]
) -> None:
    """The others run layer by layer, to the same result."""
    Ws, bs = network(widths, dtype)
    runs = assert_as_good_as_torch(torch.randn(5, widths[0], device=DEVICE).to(dtype).requires_grad_(), Ws, bs, "relu")
    assert launches == expected * runs


def test_infinity_does_not_meet_the_padding() -> None:
    """Inf in a row gives what torch gives, in a width that is padded, and other rows stay finite."""
    Ws, bs = network((3, 5, 5, 2), torch.float32)
    x = torch.randn(4, 3, device=DEVICE)
    x[1, 2] = float("inf")
    with bp_torch.backend("triton"), torch.no_grad():
        y = bpF.mlp(x, Ws, bs, activation="sigmoid")
    torch.testing.assert_close(y, by_layers(x, Ws, bs, "sigmoid"))


def test_recompute_keeps_the_inputs_alone() -> None:
    Ws, bs = network((3, 5, 5, 2), torch.float32)
    x = torch.randn(7, 3, device=DEVICE)
    shapes: list[tuple[int, ...]] = []
    with (
        bp_torch.backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t),
    ):
        bpF.mlp(x, Ws, bs, recompute=True)
        assert (7, 5) not in shapes
        bpF.mlp(x, Ws, bs)
        assert shapes.count((7, 5)) == 2


def test_saved_activations_that_were_moved() -> None:
    """Offloading puts each into memory of its own."""
    Ws, bs = network((3, 5, 5, 2), torch.float32)
    with bp_torch.backend("triton"):
        plain = torch.autograd.grad(bpF.mlp(torch.ones(7, 3, device=DEVICE), Ws, bs).sum(), Ws)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
            moved = torch.autograd.grad(bpF.mlp(torch.ones(7, 3, device=DEVICE), Ws, bs).sum(), Ws)
    torch.testing.assert_close(moved, plain, rtol=0, atol=0)


def test_frozen_layers() -> None:
    x = torch.randn(4, 3, device=DEVICE)
    for backend in ("torch", "triton"):
        for frozen in range(3):
            Ws, bs = network((3, 5, 5, 2), torch.float32)
            with bp_torch.backend(backend):
                full = torch.autograd.grad(bpF.mlp(x, Ws, bs, activation="tanh").sum(), [*Ws, *bs])
                for index in range(frozen + 1):
                    Ws[index].requires_grad_(False)
                    bs[index].requires_grad_(False)
                rest = [*Ws[frozen + 1 :], *bs[frozen + 1 :]]
                if rest:
                    found = torch.autograd.grad(bpF.mlp(x, Ws, bs, activation="tanh").sum(), rest)
                    torch.testing.assert_close(found, (*full[frozen + 1 : 3], *full[4 + frozen :]))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_stand_alone_in_batch_invariant_mode(backend: str, dtype: torch.dtype) -> None:
    Ws, bs = network((13, 21, 21, 3), dtype)
    x = torch.randn(40, 13, device=DEVICE).to(dtype)
    with bp_torch.backend(backend), bp_torch.batch_invariant(), torch.no_grad():
        whole = bpF.mlp(x, Ws, bs, activation="gelu")
        for j, k in ((0, 1), (7, 8), (39, 40), (3, 20), (0, 33)):
            torch.testing.assert_close(bpF.mlp(x[j:k], Ws, bs, activation="gelu"), whole[j:k], rtol=0, atol=0)


def test_refusals() -> None:
    x, W, b = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    with pytest.raises(ValueError, match="expected as many of both, got 1 and 2"):
        bpF.mlp(x, [W], [b, b])
    with pytest.raises(ValueError, match="got 0 and 0"):
        bpF.mlp(x, [])
    with pytest.raises(
        RuntimeError, match=r"'weights\[1\]': expected shape \(out_features, 4\) to match 'weights\[0\]'"
    ):
        bpF.mlp(x, [W, W])
    with pytest.raises(RuntimeError, match=r"'biases\[0\]': expected shape \(4,\), got \(3,\)"):
        bpF.mlp(x, [W], [torch.randn(3)])
    with pytest.raises(RuntimeError, match=r"'weights\[0\]': expected the dtype of 'input'"):
        bpF.mlp(x, [W.double()])
    with pytest.raises(ValueError, match="'activation': expected one of"):
        bpF.mlp(x, [W], activation="step")
