"""The private names of torch that the package uses: what each is for, what would replace it, and that it does that.

A torch that renames or changes one fails here first, with what to do.
"""

from __future__ import annotations

import ast
import contextvars
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.autograd import forward_ad

import bp_torch
from bp_torch import _torch

ONE_BACKEND = "asks torch, and computes nothing by the layers"


class Name(NamedTuple):
    purpose: str
    replacement: str
    """What to do when torch no longer has it."""
    holds: Callable[[], bool]


def inside(transform: Callable[..., Any], question: Callable[[], Any]) -> Any:
    """The answer inside a transform of torch.func."""
    answers = []

    def f(x: torch.Tensor) -> torch.Tensor:
        answers.append(question())
        return x.sum()

    transform(f)(torch.ones(3))
    return answers[0]


def in_forward_mode() -> bool:
    with forward_ad.dual_level():
        return _torch.forward_level() == 0


def traced() -> bool:
    answers = []

    def f(x: torch.Tensor) -> torch.Tensor:
        answers.append(_torch.is_tracing())
        return x + 1

    with warnings.catch_warnings(action="ignore"):
        torch.jit.trace(f, torch.ones(2), check_trace=False)
    return bool(answers[0])


def context_of_the_engine() -> bool:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("probe")
    variable.set(3)
    context, found = contextvars.copy_context(), []

    def engine() -> None:
        torch._C._stash_obj_in_tls("context", context)
        try:
            kept = _torch.autograd_context()
            found.append(kept is not None and kept.get(variable) == 3)
        finally:
            torch._C._remove_obj_from_tls("context")

    thread = threading.Thread(target=engine)
    thread.start()
    thread.join()
    return found == [True] and _torch.autograd_context() is None


def legacy_batched() -> bool:
    """autograd's own vmap, of ``is_grads_batched``."""
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            seen.append(_torch.is_legacy_batchedtensor(dy))
            return dy.clone()

    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(Probe.apply(x), x, torch.eye(2), is_grads_batched=True)
    return seen == [True] and not _torch.is_legacy_batchedtensor(x)


def dead_wrapper() -> bool:
    escaped: list[torch.Tensor] = []
    torch.func.grad(lambda x: (escaped.append(x), x.sum())[1])(torch.ones(2))
    return bool((_torch.unwrap_if_dead(escaped[0]) + 1 == 2).all())


def entry_point() -> bool:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            return 2 * dy

    x = torch.ones(2, requires_grad=True)
    _torch.entry_point(Twice)(x).sum().backward()
    return x.grad is not None and bool((x.grad == 2).all())


def constant() -> bool:
    calls: list[int] = []

    @_torch.constant_while_compiling
    def count() -> int:
        calls.append(1)
        return len(calls)

    compiled = torch.compile(lambda x: x + count(), fullgraph=True, backend="eager")
    return bool(compiled(torch.zeros(1)) == compiled(torch.zeros(1))) and len(calls) == 1


def skipped() -> bool:
    def f() -> bool:
        return torch.compiler.is_compiling()

    _torch.not_compiled(f)
    return not torch.compile(f, backend="eager")()


def hooks() -> bool:
    before = _torch.has_any_global_hook()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    during = bool(_torch.has_any_global_hook())
    handle.remove()
    return not before and during


def undefined() -> bool:
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.set_materialize_grads(False)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Any) -> Any:
            seen.append(dy)
            return dy

    _torch.undefined_gradient()(Probe.apply(torch.ones(2, requires_grad=True))).sum().backward()
    return seen == [None]


def refused_by_dynamo() -> bool:
    def f(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x

    try:
        torch.compile(f, fullgraph=True, backend="eager")(torch.ones(1))
    except _torch.compiler_error():
        return True
    return False


def softmax(f: Callable[..., torch.Tensor], backward: Callable[..., torch.Tensor]) -> bool:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y, dy = f(x, 1), torch.randn(3, 4, dtype=torch.float64)
    (dx,) = torch.autograd.grad(y, x, dy)
    return torch.equal(backward(dy, y.detach(), 1, x.dtype), dx)


def dispatched() -> bool:
    seen = []

    class Mode(_torch.DispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2)
    return seen == [torch.ops.aten.ones.default]


def asserted() -> bool:
    try:
        _torch.assert_later(torch.tensor(False), "no")
    except RuntimeError:
        return True
    return False


def trees() -> bool:
    leaves, spec = _torch.tree_flatten({"a": [1, (2, 3)]})
    again = _torch.tree_unflatten(leaves, spec)
    doubled = _torch.tree_map_only(int, lambda v: 2 * v, again)
    return leaves == [1, 2, 3] == _torch.tree_leaves(again) and doubled == {"a": [2, (4, 6)]}


ONES = torch.ones(2)
NAMES = {
    "BatchNormBase": Name(
        "what torch.nn's batch norms have in common, so that ours are instances of it",
        "name the four classes",
        lambda: (
            issubclass(torch.nn.BatchNorm2d, _torch.BatchNormBase)
            and issubclass(bp_torch.nn.BatchNorm1d, _torch.BatchNormBase)
        ),
    ),
    "DispatchMode": Name("to see which tensors live", "torch.autograd.graph.saved_tensors_hooks", dispatched),
    "are_transforms_active": Name(
        "whether torch.func is at work: then no faster way is taken",
        "torch._C._functorch.maybe_current_level() is not None",
        lambda: not _torch.are_transforms_active() and inside(torch.func.grad, _torch.are_transforms_active),
    ),
    "assert_later": Name(
        "an error that a graph can hold, and a GPU need not be waited for", "torch._check, which waits", asserted
    ),
    "autograd_context": Name(
        "the settings of whoever called backward, in a thread of the engine",
        "keep them on ctx alone",
        context_of_the_engine,
    ),
    "collectives": Name(
        "collectives in a compiled graph",
        "torch.distributed, once Dynamo traces all of it",
        lambda: callable(_torch.collectives().all_reduce) and callable(_torch.collectives().all_gather_tensor),
    ),
    "compiler_error": Name("to tell a graph break from a wrong answer", "catch RuntimeError", refused_by_dynamo),
    "constant_while_compiling": Name(
        "torch.compiler.assume_constant_result without importing Dynamo", "that function", constant
    ),
    "entry_point": Name(
        "to call a Function without binding its signature, 25 microseconds", "function.apply", entry_point
    ),
    "forward_level": Name(
        "whether tangents may be there: then no faster way is taken",
        "forward_ad.unpack_dual of each tensor",
        lambda: _torch.forward_level() == -1 and in_forward_mode(),
    ),
    "has_any_global_hook": Name(
        "a model that global hooks watch is not fused", "fuse, and document that hooks see fewer modules", hooks
    ),
    "is_autocast_enabled": Name(
        "one question for all devices",
        "torch.is_autocast_enabled(device) for each tensor's",
        lambda: not _torch.is_autocast_enabled() and under_autocast(),
    ),
    "is_legacy_batchedtensor": Name(
        "gradcheck's batched gradients, which look like ordinary tensors",
        "nothing, once is_grads_batched uses torch.func",
        legacy_batched,
    ),
    "is_tracing": Name("TorchScript's tracer, which takes operators alone", "torch.jit.is_tracing", traced),
    "log_softmax_backward": Name(
        "the binding that takes a microsecond less than torch.ops",
        "the formula",
        lambda: softmax(torch.log_softmax, _torch.log_softmax_backward),
    ),
    "losses": Name(
        "the bindings of losses that take a microsecond less than torch.ops",
        "torch.ops.aten",
        lambda: (
            bool(_torch.losses.mse_loss(ONES, 3 * ONES, 1) == 4)
            and bool(_torch.losses.huber_loss(ONES, ONES, 2, 1.0) == 0)
            and bool(_torch.losses.smooth_l1_loss(ONES, ONES, 2, 1.0) == 0)
        ),
    ),
    "not_compiled": Name("torch.compiler.disable without importing Dynamo", "that function", skipped),
    "softmax_backward": Name(
        "ATen's kernel, one pass for several", "the formula", lambda: softmax(torch.softmax, _torch.softmax_backward)
    ),
    "transforms": Name(
        "nested jvp and functionalize, which drop terms of a Function or refuse it",
        "the formula under any two transforms",
        lambda: (
            _torch.transforms() == (0, False)
            and inside(torch.func.functionalize, _torch.transforms) == (0, True)
            and inside(lambda f: lambda x: torch.func.jvp(f, (x,), (x,)), _torch.transforms) == (1, False)
        ),
    ),
    **dict.fromkeys(
        ("tree_flatten", "tree_leaves", "tree_map_only", "tree_unflatten"),
        Name("nested arguments", "optree, or torch.utils._cxx_pytree", trees),
    ),
    "undefined_gradient": Name(
        "to send a Function a gradient that is not there", "torch.autograd.grad of a part of the outputs", undefined
    ),
    "unsafe_view": Name(
        "a result of a Function that may be changed in place although it was reshaped",
        "clone",
        lambda: not _torch.unsafe_view(torch.ones(2, 2, requires_grad=True) + 1, (4,))._is_view(),
    ),
    "unwrap_if_dead": Name("a tensor that escaped from a transform that has ended", "nothing: refuse it", dead_wrapper),
}


def under_autocast() -> bool:
    with torch.autocast("cpu"):
        return bool(_torch.is_autocast_enabled())


def test_each_name_is_explained() -> None:
    assert set(NAMES) == set(_torch.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_name_does_what_it_is_for(name: str) -> None:
    purpose, replacement, holds = NAMES[name]
    assert holds(), f"torch {torch.__version__}: {name} ({purpose}) has changed; instead: {replacement}"


def private_names(file: Path) -> Iterator[str]:
    """Imports from torch and attributes of it that begin with one underscore."""
    private = re.compile(r"_[a-zA-Z]")
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (f"{node.module}: {part}" for part in parts if private.match(part))
        elif isinstance(node, ast.Attribute) and private.match(node.attr):
            text = ast.unparse(node)
            if text.split(".")[0] in ("torch", "forward_ad"):
                yield text


def test_no_other_file_uses_a_private_name_of_torch() -> None:
    root = Path(bp_torch.__file__).parent.parent
    files = [file for folder in ("bp_torch", "triton_kernels", "recipes") for file in (root / folder).rglob("*.py")]
    assert len(files) > 100
    found = {
        f"{file.relative_to(root)}: {name}"
        for file in files
        if file.name != "_torch.py"
        for name in private_names(file)
    }
    assert found == set()
    assert {"torch._C._functions", "torch._C"} <= set(private_names(root / "bp_torch" / "_torch.py"))
