"""backend() and batch_invariant() hold for a thread or a task, and in backward as they held in forward."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bp_torch
import bp_torch.functional as bpF
from bp_torch import backends
from bp_torch.functions.function import Function, call

ONE_BACKEND = "about the choice of the backend itself"


def seen() -> tuple[str, bool]:
    return backends.current_backend(), backends.is_batch_invariant()


DEFAULT = seen()


def in_thread(function: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize(
    ("first", "second", "inside"),
    [
        (bp_torch.batch_invariant, bp_torch.batch_invariant, (DEFAULT[0], True)),
        (lambda: bp_torch.backend("torch"), lambda: bp_torch.backend("triton"), ("triton", False)),
    ],
    ids=["batch_invariant", "backend"],
)
def test_blocks_of_two_threads_that_overlap(first: Any, second: Any, inside: tuple[str, bool]) -> None:
    entered, both, left = (threading.Event() for _ in range(3))
    found = []

    def one() -> None:
        with first():
            entered.set()
            both.wait(10)
        left.set()

    def other() -> None:
        entered.wait(10)
        with second():
            both.set()
            left.wait(10)
            found.append(seen())
        found.append(seen())

    threads = [threading.Thread(target=target) for target in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [inside, DEFAULT]
    assert seen() == DEFAULT


def test_tasks_and_threads() -> None:
    """A task and asyncio.to_thread begin with what holds where they are started; another thread with the default."""

    @bp_torch.backend("triton")
    async def within() -> tuple[str, bool]:
        await asyncio.sleep(0)
        return seen()

    async def block() -> tuple[str, bool]:
        with bp_torch.batch_invariant():
            await asyncio.sleep(0)
            return await asyncio.to_thread(seen)

    async def main() -> list[Any]:
        return [*await asyncio.gather(within(), block(), within()), seen()]

    name = DEFAULT[0]
    assert asyncio.run(main()) == [("triton", False), (name, True), ("triton", False), DEFAULT]
    with bp_torch.backend("torch"):
        assert in_thread(seen) == DEFAULT


def test_blocks_and_decorators() -> None:
    invariant, torchs = bp_torch.batch_invariant(), bp_torch.backend("torch")
    with invariant, torchs, invariant:
        with pytest.raises(KeyError), bp_torch.backend("triton"):
            raise KeyError
        assert seen() == ("torch", True)
    assert seen() == DEFAULT

    @invariant
    @torchs
    def function(depth: int) -> list[tuple[str, bool]]:
        """Its docstring."""
        return [seen(), *(function(depth - 1) if depth else [])]

    assert function(2) == [("torch", True)] * 3
    assert (function.__name__, function.__doc__) == ("function", "Its docstring.")
    assert seen() == DEFAULT
    with pytest.raises(TypeError, match="expected a function to decorate, got a generator"):

        @bp_torch.batch_invariant()
        def generator() -> Any:
            yield


class Probe(Function):
    """y = x, and what backward saw."""

    found: list[tuple[str, bool]] = []  # noqa: RUF012

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        Probe.found.append(seen())
        return call(Probe, dy)

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor) -> Tensor:
        return tx.clone()


class FastProbe(Probe):
    @staticmethod
    def forward_and_save(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor) -> Tensor:
        return tx.clone()


@pytest.mark.parametrize("function", [Probe, FastProbe])
def test_backward_knows_what_forward_had(function: type[Function], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, requires_grad=True)
    for block, expected in (
        (bp_torch.backend("triton"), ("triton", False)),
        (bp_torch.batch_invariant(), (DEFAULT[0], True)),
    ):
        with block:
            y = call(function, x)
        monkeypatch.setattr(Probe, "found", [])
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        torch.autograd.grad(dx.sum(), x)  # dx is a Probe of y too
        with block:
            y = call(function, x)
        in_thread(y.sum().backward)
        assert Probe.found == [expected] * 4
    monkeypatch.setattr(Probe, "found", [])
    call(function, x).sum().backward()
    assert Probe.found == [DEFAULT]
    assert seen() == DEFAULT


def test_a_thread_of_the_autograd_engine_has_the_context_that_called_it() -> None:
    """As on a GPU, where a checkpoint recomputes in such a thread: with another backend it would draw another mask."""
    with bp_torch.backend("torch"):
        context = contextvars.copy_context()

    def engine() -> tuple[str, bool]:
        torch._C._stash_obj_in_tls("context", context)
        try:
            return seen()
        finally:
            torch._C._remove_obj_from_tls("context")

    assert in_thread(engine) == ("torch", False)


@pytest.mark.filterwarnings("ignore")
def test_compiled() -> None:
    layer = bp_torch.nn.Dense(4, 4, activation="gelu")
    x = torch.randn(3, 4)
    expected = layer(x)

    def forward(x: Tensor) -> Tensor:
        with bp_torch.backend("torch"):
            return layer(x)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.compile(forward, fullgraph=True, backend="aot_eager")(x), expected)
    decorated = bp_torch.backend("torch")(layer)
    torch.testing.assert_close(torch.compile(decorated, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(compiled(x), expected)
    with bp_torch.backend("torch"):
        torch.testing.assert_close(compiled(x), expected)
    with bp_torch.batch_invariant():
        torch.testing.assert_close(in_thread(lambda: compiled(x)), expected)  # elsewhere it is off
        with pytest.raises(RuntimeError, match=r"batch_invariant\(\): expected"):
            compiled(x)
    with pytest.raises(RuntimeError, match=r"batch_invariant\(\): expected"):
        torch.compile(bp_torch.batch_invariant()(layer), backend="aot_eager")(x)
    assert seen() == DEFAULT
    torch.testing.assert_close(compiled(x), expected)


def test_rows_are_the_same_while_another_thread_leaves() -> None:
    x, W = torch.randn(37, 65), torch.randn(33, 65)
    with bp_torch.batch_invariant():
        assert in_thread(lambda: bpF.linear(x, W).shape) == (37, 33)
        with bp_torch.batch_invariant():
            pass
        assert torch.equal(bpF.linear(x, W)[:1], bpF.linear(x[:1], W))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "layer",
    [
        bp_torch.nn.Dropout(0.5), bp_torch.nn.AlphaDropout(0.5), bp_torch.nn.Dense(4, 4, dropout=0.5),
        bp_torch.nn.Residual(torch.nn.Identity(), dropout=0.5), bp_torch.nn.BatchNormAct1d(4, dropout=0.5),
        bp_torch.nn.MLP(4, [8], 4, dropout=0.5), bp_torch.nn.CrossEntropyLoss(),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_layers_that_draw_or_choose_compile_whole_once_a_setting_was_used(layer: torch.nn.Module) -> None:
    with bp_torch.backend("torch"):
        pass
    x = torch.randn(6, 4, requires_grad=True)
    inputs = (x, torch.tensor([0, 1, 2, 3, 0, 1])) if isinstance(layer, torch.nn.CrossEntropyLoss) else (x,)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs).sum().backward()
    assert x.grad is not None
