"""Each registered way, held to its formula over the table of cases; and that each really ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES, Case, widest, within
from torch import Tensor

import bp_torch
from bp_torch.backends import current_backend
from bp_torch.functions import function as functions
from bp_torch.functions.aten import cross_entropy, loss
from bp_torch.functions.function import ATEN, BATCH_INVARIANT, TRITON, Function, Way

PARTS = "forward", "forward_and_save", "backward"
FUNCTIONS = {f.__name__: f for f in functions._FUNCTIONS if f.ways and f.__module__.startswith("bp_torch.")}
ELSEWHERE = {"SyncStatisticsFunction": "needs a group of processes: test_sync_batch_norm.py"}
KEPT = 16
"""Cases of a Function that the interpreter runs: kernels are slow there, and have tests of their own."""


@contextmanager
def with_ways(function: type[Function], change: Callable[[list[Way]], list[Way]]) -> Iterator[None]:
    """Inside the block the Function has other ways."""
    ways = function.ways
    try:
        function.ways = change(ways)
        function.classes.clear()
        function.entries.clear()
        yield
    finally:
        function.ways = ways
        function.classes.clear()
        function.entries.clear()


def recorded(ran: set[tuple[str, str]]) -> Callable[[list[Way]], list[Way]]:
    """The same ways, which note what they served."""

    def noting(way: Way, name: str) -> Callable[..., Any] | None:
        part = getattr(way, name)

        def run(*args: Any) -> Any:
            result = part(*args)
            if result is not NotImplemented:
                ran.add((way.kind, name))
            return result

        return None if part is None else run

    return lambda ways: [replace(way, **{name: noting(way, name) for name in PARTS}) for way in ways]


def step(case: Case, count: int | None = None) -> list[Tensor]:
    """The results and the gradients of one training step, of the first inputs or of all."""
    inputs = [t.to(widest()).requires_grad_(count is None or k < count) for k, t in enumerate(case.inputs())]
    output = case.ours(*inputs)
    ys = [output] if isinstance(output, Tensor) else [y for y in output if y.requires_grad]
    dys = [torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape) for y in ys]
    grads = torch.autograd.grad(ys, inputs[:count], dys, allow_unused=True)
    return [*(y.detach() for y in ys), *(g for g in grads if g is not None)]


def kinds() -> tuple[str, ...]:
    return (TRITON,) if current_backend() == "triton" else (ATEN, BATCH_INVARIANT)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ELSEWHERE])
def test_ways_give_what_the_formula_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, ran = FUNCTIONS[name], set[tuple[str, str]]()
    cases = [case for case in CASES if case.function == name]
    if current_backend() == "triton":
        cases = cases[:: max(1, len(cases) // KEPT)]
    modes: list[tuple[bool, bool]] = [(False, False)]
    if current_backend() != "triton":
        modes += [(True, False), (False, True)]
    for in_pieces, batch_invariant in modes:
        with monkeypatch.context() as patch, ExitStack() as stack:
            if in_pieces:  # what is done piece by piece above a size, at these small ones
                patch.setattr(loss, "CHUNK", 4)
                patch.setattr(cross_entropy, "CHUNK", 4)
                patch.setattr(cross_entropy, "SMALL", 0)
            stack.enter_context(bp_torch.batch_invariant() if batch_invariant else nullcontext())
            for case in cases:
                for count in (None, 1) if in_pieces else (None,):
                    with with_ways(function, recorded(ran)):
                        found = step(case, count)
                    with with_ways(function, lambda ways: []):
                        expected = step(case, count)
                    torch.testing.assert_close(
                        found, expected, msg=lambda text, case=case: f"{case}: {text}", **within(1e-11, 1e-11)
                    )
    registered = {
        (way.kind, part) for way in function.ways for part in PARTS if way.kind in kinds() and getattr(way, part)
    }
    assert ran >= registered, f"of {name} these never ran: {sorted(registered - ran)}"


def test_each_function_with_ways_is_held_to_them() -> None:
    tested = {case.function for case in CASES}
    assert set(FUNCTIONS) - tested == set(ELSEWHERE)
    assert {way.kind for f in FUNCTIONS.values() for way in f.ways} == {ATEN, BATCH_INVARIANT, TRITON}


def test_a_way_that_does_not_serve_leaves_it_to_the_next_and_last_to_the_formula() -> None:
    asked = []

    class Twice(Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            asked.append("formula")
            return 2 * x

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None: ...

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            asked.append("backward by formula")
            return 2 * dy

        @staticmethod
        def jvp_rule(ctx: Any, tx: Tensor) -> Tensor:
            return 2 * tx

    def declines(name: str) -> Callable[..., Any]:
        return lambda *args: asked.append(name) or NotImplemented

    x = torch.randn(3, requires_grad=True)
    with bp_torch.backend("torch"):
        Twice.faster(ATEN, forward=declines("aten"), backward=declines("backward by aten"))
        functions.call(Twice, x).sum().backward()
        assert asked == ["aten", "formula", "backward by aten", "backward by formula"]
        asked.clear()
        (dx,) = torch.autograd.grad(functions.call(Twice, x).sum(), x, create_graph=True)  # a graph of it: the formula
        torch.func.jvp(lambda x: functions.call(Twice, x), (x.detach(),), (x.detach(),))
        assert asked == ["aten", "formula", "backward by formula", "formula"]
        asked.clear()
        with bp_torch.batch_invariant():
            Twice.faster(BATCH_INVARIANT, forward=lambda x: asked.append("batch-invariant") or 2 * x)
            functions.call(Twice, x).sum().backward()
            assert asked == ["batch-invariant", "backward by aten", "backward by formula"]
            with pytest.raises(RuntimeError, match=r"batch_invariant\(\): expected ordinary tensors in eager mode"):
                torch.func.grad(lambda x: functions.call(Twice, x).sum())(x)
    functions._FUNCTIONS.remove(Twice)
