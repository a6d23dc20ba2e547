"""The Triton GEMM with its epilogue: any shape, any strides, every epilogue, and who is chosen."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cases import torch_activation
from device import DEVICE
from exact import assert_as_good_as_torch, carried
from torch import Tensor

import bp_torch
from bp_torch import functional as bpF
from bp_torch import triton_kernels as kernels
from bp_torch.functions.epilogue import Epilogue
from bp_torch.triton_kernels.launch import first_block

ONE_BACKEND = "about the kernels alone"

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
gemm = kernels.dense


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def product(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    return gemm.forward(x, W, b, None, None, Epilogue())[0]


@every_dtype
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (1, 5, 300), (3, 70, 33), (65, 1, 31), (130, 66, 65), (64, 64, 64), (129, 3, 128)],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_shapes_around_the_tiles(dtype: torch.dtype, shape: tuple[int, int, int], bias: bool) -> None:
    M, N, K = shape

    def draw() -> tuple[Tensor, Tensor, Tensor | None]:
        return make(M, K, dtype=dtype), make(N, K, dtype=dtype), make(N, dtype=dtype) if bias else None

    def slack(*inputs: Tensor | None) -> list[Tensor]:
        """Another order of the sum has other partial sums, which may be large where torch's are small."""
        return [torch.finfo(torch.float32).eps * of_sum for of_sum in carried(torch.nn.functional.linear, inputs)]

    assert_as_good_as_torch(product, torch.nn.functional.linear, draw, slack=slack)


def test_tiles_are_visited_once_whatever_their_number() -> None:
    """More than one group of tiles down, a partial last group, and several tiles across."""
    block = first_block(gemm.family(torch.float32))
    block_m, block_n = block.rows, block.columns
    for tiles in (1, gemm.GROUP, gemm.GROUP + 1, 2 * gemm.GROUP + 3):
        x, W = make(tiles * block_m - 5, 2), make(2 * block_n + 1, 2)
        torch.testing.assert_close(product(x, W), x @ W.mT)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)], ids=str)
def test_empty(shape: tuple[int, int, int]) -> None:
    M, N, K = shape
    x, W, b = make(M, K), make(N, K), make(N)
    torch.testing.assert_close(product(x, W, b), torch.nn.functional.linear(x, W, b))


def test_any_strides() -> None:
    """Transposed, every other element of a buffer that is otherwise NaN, expanded, three dimensions."""
    x, W, b, r = make(5, 7), make(6, 7), make(6), make(5, 6)
    expected = gemm.forward(x, W, b, r, None, Epilogue("tanh"))[0]

    def sliced(t: Tensor) -> Tensor:
        buffer = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"), device=DEVICE)
        return buffer[..., 1::2].copy_(t)

    def transposed(t: Tensor) -> Tensor:
        return t.mT.contiguous().mT if t.dim() == 2 else t

    for lay in (sliced, transposed):
        found = gemm.forward(lay(x), lay(W), lay(b), lay(r), None, Epilogue("tanh"))[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    row = make(1, 7).expand(5, 7)
    torch.testing.assert_close(product(row, W[:1].expand(6, 7)), row @ W[:1].expand(6, 7).mT)
    x3, r3 = make(2, 7, 3).mT, make(3, 2, 6).transpose(0, 1)
    y = gemm.forward(x3, W, b, r3, None, Epilogue())[0]
    torch.testing.assert_close(y, torch.nn.functional.linear(x3, W, b) + r3)


def test_rows_and_columns_outside_are_not_touched() -> None:
    """NaN around the operands does not come in: what lies past M, N and K is masked, and y is written in full."""
    block = first_block(gemm.family(torch.float32))
    block_m, block_n, block_k = block.rows, block.columns, block.depth
    x = torch.full((block_m + 3, block_k + 3), float("nan"), device=DEVICE)
    W = torch.full((block_n + 3, block_k + 3), float("nan"), device=DEVICE)
    x[:-2, :-2], W[:-2, :-2] = 1.0, 2.0
    y = product(x[:-2, :-2], W[:-2, :-2])
    torch.testing.assert_close(y, torch.full_like(y, 2.0 * (block_k + 1)))


def test_nan_and_infinity_pass_as_in_torch() -> None:
    x, W = make(4, 5), make(3, 5)
    x[0, 1], x[1, 2], W[2, 0] = float("nan"), float("inf"), float("-inf")
    torch.testing.assert_close(product(x, W), x @ W.mT, equal_nan=True)


@every_dtype
@pytest.mark.parametrize("key", ["relu", "gelu", "leaky_relu"])
@pytest.mark.parametrize("p", [0.0, 0.5, 1e-4])
@pytest.mark.parametrize("with_residual", [False, True])
def test_epilogue(dtype: torch.dtype, key: str, p: float, with_residual: bool) -> None:
    """Every combination, with the mask that the elementwise kernels draw from the same seed."""
    parameters = (0.2,) if key == "leaky_relu" else ()
    e = Epilogue(key, parameters, p)
    seed = kernels.dropout.new_seed(torch.device(DEVICE)) if p else None
    mask = kernels.dropout.mask(seed, (9, 12), p) if p else None
    kept = e.keeps(mask, torch.empty(0) if with_residual else None)

    def parts(x: Tensor, W: Tensor, b: Tensor, r: Tensor | None) -> list[Tensor]:
        z = torch.nn.functional.linear(x, W, b)
        a = torch_activation(key)(z, *parameters)
        y = a if mask is None else a * mask / (1 - p)
        return [y if r is None else y + r, *{"y": [], "z": [z], "a": [a]}[kept]]

    def ours(x: Tensor, W: Tensor, b: Tensor, r: Tensor | None) -> list[Tensor]:
        y, s = gemm.forward(x, W, b, r, seed, e)
        assert (s is None) == (kept == "y")
        return [y] if s is None else [y, s]

    def draw() -> list[Tensor | None]:
        shapes = [(9, 17), (12, 17), (12,), (9, 12) if with_residual else None]
        return [None if shape is None else make(*shape, dtype=dtype) for shape in shapes]

    assert_as_good_as_torch(ours, parts, draw)


def test_a_wider_residual_widens_the_output() -> None:
    x, W, r = make(3, 4, dtype=torch.bfloat16), make(5, 4, dtype=torch.bfloat16), make(3, 5)
    y, s = gemm.forward(x, W, None, r, None, Epilogue("gelu"))
    assert s is not None
    assert (y.dtype, s.dtype) == (torch.float32, torch.bfloat16)


@every_dtype
def test_a_dense_layer_runs_in_one_launch_where_triton_is_chosen(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward by the GEMM alone; the gradients are those of the other way, and the mask is the same."""
    tensors = [make(6, 5, dtype=dtype), make(4, 5, dtype=dtype), make(4, dtype=dtype), make(6, 4, dtype=dtype)]
    forward, calls = gemm.forward, []

    def step(way: str, key: str) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        torch.manual_seed(3)
        with bp_torch.backend("triton"), gemm.using(way):
            y = bpF.dense(*leaves, activation=key, p=0.5)
            return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    keys = ["identity", "relu", "gelu", "tanh"]
    with monkeypatch.context() as guarded:
        guarded.setattr(gemm, "forward", lambda *args: calls.append(args[5].name) or forward(*args))
        guarded.setattr(kernels.elementwise, "run_forward", lambda *args, **options: pytest.fail("an elementwise pass"))
        found = [t for key in keys for t in step("triton", key)]
    assert calls == keys
    expected = [t for key in keys for t in step("cublas", key)]
    tolerance = 8 * torch.finfo(dtype).eps
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        if ours.shape == (6, 4):
            assert torch.equal(ours == 0, theirs == 0)


def test_everything_dropped() -> None:
    """p = 1 comes with a mask instead of a seed: the epilogue pass handles it after the product."""
    with bp_torch.backend("triton"), gemm.using("triton"):
        y = bpF.dense(make(3, 4), make(5, 4), activation="relu", p=1.0)
    torch.testing.assert_close(y, torch.zeros(3, 5, device=DEVICE))


def test_the_choice() -> None:
    assert gemm.choose() == "cublas"
    with gemm.using("triton"):
        assert gemm.choose() == "triton"
        with gemm.using("auto"):
            assert gemm.choose() == "cublas"
    with (
        pytest.raises(ValueError, match=r"using\(\): expected one of auto, cublas, triton, got 'fast'"),
        gemm.using("fast"),
    ):
        pass
    code = "from bp_torch.triton_kernels import dense; print(dense.choose())"
    for value, output in (("triton", "triton"), ("cublas", "cublas"), ("fast", "BP_TORCH_DENSE: expected one of")):
        environment = os.environ | {"BP_TORCH_DENSE": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert output in done.stdout + done.stderr


def test_tf32_only_where_torch_allows_it() -> None:
    matmul = torch.backends.cuda.matmul
    assert gemm.input_precision(torch.float32) == "ieee"
    try:
        torch.set_float32_matmul_precision("high")
        assert gemm.input_precision(torch.float32) == ("ieee" if torch.version.hip else "tf32")
        assert gemm.input_precision(torch.bfloat16) == "ieee"
        torch.set_float32_matmul_precision("highest")
        assert gemm.input_precision(torch.float32) == "ieee"
        matmul.allow_tf32 = True
        assert gemm.input_precision(torch.float32) == ("ieee" if torch.version.hip else "tf32")
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.allow_tf32 = False
