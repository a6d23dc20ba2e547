"""What only a GPU can show. ``pytest -m gpu`` runs this, and the contracts of test_contracts.py on the GPU."""

from __future__ import annotations

import fcntl
import functools
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import torch_activation
from exact import assert_as_good_as_torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bp_torch import functional as bpF
from bp_torch import nn
from bp_torch import triton_kernels as kernels
from bp_torch.functions.epilogue import Epilogue

ONE_BACKEND = "chooses the kernels, on a GPU"

pytestmark = pytest.mark.gpu
GIB = 2**30


@pytest.fixture(autouse=True)
def _alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """One huge test at a time, whichever of pytest-xdist's processes runs it, and its memory is free for the next."""
    if request.node.get_closest_marker("huge") is None:
        yield
        return
    with open(Path(tempfile.gettempdir()) / "bp_torch-huge.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield
        gc.collect()
        torch.cuda.empty_cache()


def needs_memory(gib: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


def ends(t: Tensor, middle: int = 0, width: int = 64) -> Tensor:
    """Pieces at the start, around ``middle`` (if given) and at the end of the first dimension."""
    return torch.cat([t[:width], *([t[middle - width : middle + width]] if middle else []), t[-width:]])


@pytest.mark.huge
def test_elementwise_over_2_to_the_31_elements() -> None:
    """4.3 GiB a tensor. An offset of 32 bits would end, or wrap, at 2³¹."""
    needs_memory(24)
    x = torch.ones(2**31 + 4104, dtype=torch.bfloat16, device="cuda")
    x[0] = x[2**31 - 1] = x[2**31 + 3] = x[-1] = -2
    x.requires_grad_()
    y = bpF.gelu(x)
    torch.testing.assert_close(ends(y, 2**31), F.gelu(ends(x, 2**31)))
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, 2))
    small = ends(x.detach(), 2**31).requires_grad_()
    (expected,) = torch.autograd.grad(F.gelu(small), small, torch.full_like(small, 2))
    torch.testing.assert_close(ends(dx, 2**31), expected)


@pytest.mark.huge
def test_dropout_over_2_to_the_31_elements() -> None:
    """Forward, backward and the mask that is written out agree, and both ends differ."""
    needs_memory(24)
    n = 2**31 + 4104
    x = torch.ones(n, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    state = torch.cuda.get_rng_state()
    y = bpF.dropout(x, 0.5)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.cuda.set_rng_state(state)
    mask = kernels.dropout.mask(kernels.dropout.new_seed(x.device), (n,), 0.5)
    for t in (y, dx):
        torch.testing.assert_close(ends(t, 2**31, 2048), 2 * ends(mask, 2**31, 2048).to(t.dtype))
    assert not torch.equal(mask[:2048], mask[-2048:])
    assert not torch.equal(mask[:2048], mask[2**31 : 2**31 + 2048])
    assert abs(mask[-(2**20) :].float().mean().item() - 0.5) < 0.005


@pytest.mark.huge
def test_bias_gradient_over_2_to_the_31_elements() -> None:
    needs_memory(20)
    rows, columns = 2**21 + 5, 1024
    dy = torch.ones(rows, columns, dtype=torch.bfloat16, device="cuda")
    s = torch.ones_like(dy)
    s[-3:] = -1
    dz, db = kernels.elementwise.backward_bias(dy, s, None, Epilogue("relu"))
    torch.testing.assert_close(ends(dz), (ends(s) > 0).to(dz.dtype))
    torch.testing.assert_close(db, torch.full_like(db, rows - 3), rtol=0, atol=0)  # below 2²⁴: exact


@pytest.mark.huge
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "cross_entropy"])
def test_rows_over_2_to_the_31_elements(name: str) -> None:
    needs_memory(24)
    rows, columns = 2**17 + 3, 2**14 + 8
    x = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda").requires_grad_()
    target = torch.arange(rows, device="cuda") % columns

    def f(module: object, x: Tensor, target: Tensor) -> Tensor:
        if name == "cross_entropy":
            return getattr(module, name)(x, target, reduction="none")
        return getattr(module, name)(x, 1)

    y = f(bpF, x, target)
    # The sum over a row is about 0, so that the gradient of log_softmax does not hang on the rounding of its output.
    dy = (torch.arange(y.shape[-1], device="cuda") % 5 - 2).to(y.dtype).expand(y.shape)
    (dx,) = torch.autograd.grad(y, x, dy)
    middle = 2**31 // columns
    small = ends(x.detach(), middle).float().requires_grad_()
    expected = f(F, small, ends(target, middle))
    (expected_dx,) = torch.autograd.grad(expected, small, ends(dy, middle).float())
    torch.testing.assert_close(ends(y, middle).float(), expected, rtol=2e-2, atol=0)  # bfloat16: 2⁻⁸
    # Rounding y to bfloat16 costs exp(y) of log-softmax 2 %, and carries this into a sum of softmax's.
    rest = {"softmax": 1e-3 * expected, "log_softmax": 0.1 * expected.exp()}.get(name, torch.zeros(()).to(expected))
    assert ((ends(dx, middle).float() - expected_dx).abs() <= 2e-2 * expected_dx.abs() + rest).all()


@pytest.mark.huge
def test_batch_norm_over_2_to_the_31_elements() -> None:
    needs_memory(24)
    rows, columns = 2**21 + 5, 1024
    x = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
    x += torch.arange(columns, device="cuda") % 7
    layer = nn.BatchNorm1d(columns, momentum=1.0).cuda()
    y = layer(x)
    mean = sum(part.double().sum(0) for part in x.split(2**18)) / rows
    var = sum((part.double() - mean).square().sum(0) for part in x.split(2**18)) / rows
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var.double(), var * rows / (rows - 1), rtol=1e-4, atol=1e-5)
    expected = (ends(x).double() - mean) / (var + layer.eps).sqrt()
    torch.testing.assert_close(ends(y).double(), expected, rtol=1e-2, atol=1e-5)


def test_more_columns_than_a_second_grid_dimension_holds() -> None:
    columns = 64 * 65_536 + 17
    dy = torch.ones(3, columns, dtype=torch.bfloat16, device="cuda")
    dz, db = kernels.elementwise.backward_bias(dy, None, None, Epilogue())
    torch.testing.assert_close(dz, dy)
    torch.testing.assert_close(db, torch.full_like(db, 3))


def test_a_replayed_graph_draws_fresh_masks() -> None:
    x = torch.ones(512, 512, device="cuda", requires_grad=True)

    def step() -> tuple[Tensor, Tensor]:
        y = bpF.dropout(x, 0.5)
        return y, torch.autograd.grad(y, x, torch.ones_like(y))[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compile before the capture
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = step()
    seen = []
    for _ in range(3):
        graph.replay()
        torch.testing.assert_close(y, dx, rtol=0, atol=0)  # backward draws the mask of its forward
        assert abs((y != 0).float().mean().item() - 0.5) < 0.01
        seen.append(y.detach().clone())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        nn.Dense(203, 317, activation="gelu", dropout=0.3),
        nn.BatchNormAct1d(317, activation="relu"),
        nn.Linear(317, 11),
    ).cuda()


def step(layers: torch.nn.Module, x: Tensor, target: Tensor) -> list[Tensor]:
    """The loss and every gradient."""
    loss = bpF.cross_entropy(layers(x), target, label_smoothing=0.1)
    return [loss.detach(), *torch.autograd.grad(loss, list(layers.parameters()))]


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(1031, 203, device="cuda", generator=generator)
    return x, torch.randint(0, 11, (1031,), device="cuda", generator=generator)


def test_a_whole_step_in_a_graph() -> None:
    layers, (x, target) = model(), data()
    layers[0] = nn.Dense(203, 317, activation="gelu").cuda()
    expected = step(layers, x, target)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(layers, x, target)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(layers, x, target)
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_same_bits_a_hundred_times() -> None:
    layers, (x, target) = model(), data()

    def run() -> list[Tensor]:
        torch.manual_seed(5)
        return step(layers, x, target)

    expected = run()
    for _ in range(100):
        torch.testing.assert_close(run(), expected, rtol=0, atol=0)


def test_two_streams_do_not_disturb_each_other() -> None:
    layers, (x, target) = model(), data()
    batches = [(x, target), (x.flip(0) * 2, target.flip(0))]
    layers.eval()  # running statistics are shared, and so is the generator of masks
    expected = [step(layers, *batch) for batch in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, batch in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(layers, *batch))
        torch.cuda.synchronize()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # cuBLAS picks per stream


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_gpu_than_the_current_one() -> None:
    assert torch.cuda.current_device() == 0
    x = torch.randn(300, 70, device="cuda:1", requires_grad=True)
    layer = nn.Dense(70, 90, activation="relu", dropout=0.5).to("cuda:1")
    y = bpF.batch_norm(layer(x), None, None, training=True)
    loss = bpF.cross_entropy(y, torch.zeros(300, dtype=torch.long, device="cuda:1"))
    grads = torch.autograd.grad(loss, (x, *layer.parameters()))
    assert all(g.device == x.device and g.isfinite().all() for g in grads)
    assert torch.cuda.current_device() == 0


def test_nothing_waits_for_the_gpu() -> None:
    """A step of training queues its kernels and reads nothing back."""
    layers, (x, target) = model(), data()
    step(layers, x, target)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layers, x, target)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("key", ["relu", "gelu", "tanh"])
def test_gradient_penalty(key: str) -> None:
    """The second-order kernels, against float64 and torch."""

    def penalty(f: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
        x, W, b = (t.detach().requires_grad_() for t in given)
        (dx,) = torch.autograd.grad(f(x, W, b).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), (x, W, b)))

    assert_as_good_as_torch(
        lambda *given: penalty(lambda x, W, b: bpF.dense(x, W, b, activation=key), *given),
        lambda *given: penalty(lambda x, W, b: torch_activation(key)(F.linear(x, W, b)), *given),
        lambda: [torch.randn(s, device="cuda") for s in ((129, 65), (130, 65), (130,))],
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_torchs_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(64, 32, device="cuda")
    W, b = torch.randn(48, 32, device="cuda"), torch.randn(48, device="cuda")
    target = torch.zeros(64, dtype=torch.long, device="cuda")
    calls: list[Callable[..., Tensor]] = [
        lambda f, x, W, b: f.linear(x, W, b),
        lambda f, x, W, b: f.gelu(f.linear(x, W, b)),
        lambda f, x, W, b: f.softmax(f.linear(x, W, b), 1),
        lambda f, x, W, b: f.log_softmax(f.linear(x, W, b), 1),
        lambda f, x, W, b: f.softplus(f.linear(x, W, b)),
        lambda f, x, W, b: f.cross_entropy(f.linear(x, W, b), target),
        lambda f, x, W, b: f.mse_loss(f.linear(x, W, b), f.linear(x, W)),
        lambda f, x, W, b: f.batch_norm(f.linear(x, W, b), None, None, training=True),
    ]
    with torch.autocast("cuda", dtype=dtype):
        for call in calls:
            assert_as_good_as_torch(functools.partial(call, bpF), functools.partial(call, F), lambda: (x, W, b))


@pytest.mark.parametrize("way", ["cublas", "triton"])
def test_float32_products_honour_the_precision_that_was_set(way: str) -> None:
    if torch.cuda.get_device_capability() < (8, 0) or torch.version.hip:
        pytest.skip("this GPU has no TF32")
    x, W, b = (torch.randn(s, device="cuda") for s in ((512, 1024), (512, 1024), (512,)))
    exact = F.gelu(F.linear(x.double(), W.double(), b.double()))
    before = torch.get_float32_matmul_precision()
    errors = {}
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            with kernels.dense.using(way):
                y = bpF.dense(x, W, b, activation="gelu")
            errors[precision] = ((y.double() - exact).norm() / exact.norm()).item()
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 5e-6  # float32 has 24 bits
    assert 1e-5 < errors["high"] < 1e-3  # TF32 has 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1031, 517, 259), (4096, 1024, 1024), (1, 7, 3)], ids=str)
def test_both_ways_of_a_dense_layer_agree(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Triton's product with an epilogue, and cuBLAS's with a pass after it: the same mask and values."""
    M, N, K = shape
    generator = torch.Generator("cuda").manual_seed(2)
    torch.manual_seed(4)
    mask = kernels.random.mask(kernels.random.new_seed(torch.device("cuda")), (M, N), 0.25)

    def draw() -> list[Tensor]:
        x, W, b, dy = (torch.randn(s, device="cuda", generator=generator) for s in ((M, K), (N, K), (N,), (M, N)))
        return [t.to(dtype) for t in (x, W / K**0.5, b, dy)]

    def run(f: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
        *inputs, dy = (t.detach().requires_grad_() for t in given)
        y = f(*inputs)
        return [y, *torch.autograd.grad(y, inputs, dy)]

    def ours(*inputs: Tensor) -> Tensor:
        torch.manual_seed(4)
        return bpF.dense(*inputs, activation="tanh", p=0.25)

    def theirs(*inputs: Tensor) -> Tensor:
        return torch.tanh(F.linear(*inputs)) * mask / 0.75

    for way in ("triton", "cublas"):
        with kernels.dense.using(way):
            assert_as_good_as_torch(functools.partial(run, ours), functools.partial(run, theirs), draw)


def test_checkpointing_draws_the_same_mask_again() -> None:
    layer = nn.Dense(256, 512, activation="tanh", dropout=0.5).cuda()
    x = torch.randn(128, 256, device="cuda")

    def gradients(recompute: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(9)
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        return torch.autograd.grad(y.square().sum(), list(layer.parameters()))

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0, atol=0)


def test_transposed_and_zero_stride_gradients_of_a_dense_layer() -> None:
    """One came out wrong, the other read out of bounds, in a peer."""
    x, W = (torch.randn(s, device="cuda") for s in ((70, 33), (129, 33)))
    for dy in (torch.randn(129, 70, device="cuda").mT, torch.ones((), device="cuda").expand(70, 129)):
        grads = []
        for module, dtype in ((bpF, torch.float32), (F, torch.float64)):
            inputs = [t.to(dtype, copy=True).requires_grad_() for t in (x, W)]
            y = module.relu(module.linear(*inputs))
            grads.append([g.double() for g in torch.autograd.grad(y, inputs, dy.to(dtype))])
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_a_first_call_times_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Autotuning nobody asked for took a peer's users 20 minutes."""
    monkeypatch.setenv("BP_TORCH_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels.launch.tuning, "milliseconds", lambda run: pytest.fail("something was timed"))
    bpF.gelu(torch.randn(1000, device="cuda"))
    assert not list(tmp_path.iterdir())


def test_autotuning_keeps_what_it_measured(tmp_path: Path) -> None:
    code = (
        "import torch, bp_torch.functional as F; from bp_torch.triton_kernels import tuning\n"
        "x = torch.randn(2**20, device='cuda'); y = F.gelu(x)\n"
        "torch.testing.assert_close(y, torch.nn.functional.gelu(x)); print(len(tuning.read(tuning.cache_file())))"
    )
    environment = os.environ | {"BP_TORCH_AUTOTUNE": "1", "BP_TORCH_CACHE": str(tmp_path)}
    for _ in range(2):  # the second process reads what the first one wrote
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "1"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(program):
        pytest.skip("compute-sanitizer is not installed")
    done = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, str(Path(__file__).parent / "sanitize.py")],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
