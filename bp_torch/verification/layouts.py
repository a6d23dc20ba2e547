"""Checks of memory: strides of inputs and of upstream gradients, and offsets beyond 2³¹ elements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .context import Context
from .gradients import first_order, report
from .registry import Failed, NotApplicable, check
from .subject import Point, differentiable, is_float, upstream

LAYOUT = "a transposed, sliced or channels_last tensor, which other layers hand over all the time, gives wrong results"


def sliced(t: Tensor) -> Tensor:
    """The same values as every other element of a larger buffer that is otherwise NaN (of integers, 0)."""
    if t.dim() == 0 or t.numel() == 0:
        return t.clone()
    filling = float("nan") if is_float(t) else 0
    buffer = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), filling)
    return buffer[..., 1::2].copy_(t)


def transposed(t: Tensor) -> Tensor:
    """The same values, stored in the reverse order of dimensions."""
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced": sliced,
    "transposed": transposed,
    "channels_last": channels_last,
}


def _inputs(point: Point, layout: Callable[[Tensor], Tensor]) -> Point:
    """The point with its inputs, integer ones too, in another layout; parameters as they are."""
    laid = tuple(layout(t.detach()) if isinstance(t, Tensor) else t for t in point.inputs)
    return replace(point, inputs=laid)


def _plain(point: Point) -> Point:
    return _inputs(point, lambda t: t.contiguous().clone())


@check("strided-inputs", "transposed, sliced and channels_last inputs give what contiguous ones give", LAYOUT)
def strided_inputs(c: Context) -> str | None:
    expected = c.subject.run(_plain(c.given))
    for name, layout in LAYOUTS.items():
        if name == "channels_last" and not any(isinstance(t, Tensor) and t.dim() == 4 for t in c.given.inputs):
            continue
        point = _inputs(c.given, layout)
        if c.random:
            _gradcheck(c, _inputs(c.exact, layout), f"with {name} inputs the gradient of")
        else:
            c.compare(c.subject.run(point), expected, f"with {name} inputs", point)
    return "random numbers may follow the layout: gradients against numerical ones" if c.random else None


def _gradcheck(c: Context, point: Point, what: str) -> None:
    if c.differentiable:
        report(c, first_order(c, c.subject, point, entries=12), point, what, c.subject.names)


def _fails(c: Context, point: Point) -> bool:
    try:
        _gradcheck(c, point, "")
    except Failed:
        return True
    return False


@check(
    "zero-stride-inputs",
    "expanded inputs (strides of 0) give what their contiguous copies give",
    "a broadcast row, such as one set of features for a whole batch, gives wrong results",
)
def zero_stride_inputs(c: Context) -> str | None:
    c.need_inputs()
    if not any(is_float(t) and t.dim() for t in c.given.inputs):
        raise NotApplicable("no input has a dimension to expand")

    def rows(t: Tensor) -> Tensor:
        return t[:1].expand(t.shape) if is_float(t) and t.dim() else t

    def columns(t: Tensor) -> Tensor:
        return t[..., :1].expand(t.shape) if is_float(t) and t.dim() else t

    for name, layout in (("one row expanded", rows), ("one column expanded", columns)):
        point = _inputs(c.given, layout)
        if c.random:
            laid, what = _inputs(c.exact, layout), f"with {name} as input the gradient of"
            try:
                _gradcheck(c, laid, what)
            except Failed:
                if not _fails(c, _plain(laid)):  # equal rows may be a kink, as of relu after batch norm
                    raise
        else:
            c.compare(c.subject.run(point), c.subject.run(_plain(point)), f"with {name} as input", point)
    return "random numbers may follow the layout: gradients against numerical ones" if c.random else None


@check(
    "strided-gradients",
    "transposed, sliced and channels_last upstream gradients give what contiguous ones give",
    "a layer followed by a transpose, a slice or a convolution in channels_last gets wrong gradients",
    gradients=True,
)
def strided_gradients(c: Context) -> str | None:
    s = c.subject
    at, leaves = s.leaves(c.given)
    roots = differentiable(s(at))
    dys = upstream(roots)
    expected = s.pull(roots, leaves, dys, retain_graph=True)
    for name, layout in LAYOUTS.items():
        if name == "channels_last" and not any(dy.dim() == 4 for dy in dys):
            continue
        laid = [layout(dy) for dy in dys]
        got = s.pull(roots, leaves, laid, retain_graph=True)
        c.compare(([], got), ([], expected), f"with a {name} upstream gradient", c.given, upstream=laid[0])
    return None


@check(
    "zero-stride-gradients",
    "upstream gradients with strides of 0, which sum() and mean() send, give what contiguous ones give",
    "loss.sum().backward() and every mean give wrong gradients",
    gradients=True,
)
def zero_stride_gradients(c: Context) -> str | None:
    s = c.subject
    at, leaves = s.leaves(c.given)
    roots = differentiable(s(at))
    if not any(y.dim() for y in roots):
        raise NotApplicable("the output is a single number")
    dys = upstream(roots)
    for name, layout in {
        "an expanded number": lambda dy: dy.reshape(-1)[:1].reshape([1] * dy.dim()).expand(dy.shape),
        "an expanded row": lambda dy: dy[:1].expand(dy.shape) if dy.dim() else dy,
        "an expanded column": lambda dy: dy[..., :1].expand(dy.shape) if dy.dim() else dy,
    }.items():
        laid = [layout(dy) if dy.numel() else dy for dy in dys]
        expected = s.pull(roots, leaves, [dy.contiguous().clone() for dy in laid], retain_graph=True)
        got = s.pull(roots, leaves, laid, retain_graph=True)
        c.compare(([], got), ([], expected), f"with {name} as upstream gradient", c.given, upstream=laid[0])
    return None


@check(
    "large-offsets",
    "inputs and upstream gradients whose rows lie more than 2³¹ elements apart give what contiguous ones give",
    "large tensors are read and written at wrong places, without an error",
)
def large_offsets(c: Context) -> str | None:
    """The memory between the rows is reserved and never touched, so that on a CPU it costs nothing."""
    tensors = [t for t in c.given.inputs if is_float(t) and t.dim()]
    if not any(t.shape[0] > 1 for t in tensors):
        raise NotApplicable("no input has two rows to lay apart")
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if torch.are_deterministic_algorithms_enabled() and filled:
        raise NotApplicable("torch.use_deterministic_algorithms fills memory, which would take it all")
    s = c.subject
    laid: list[str] = []

    def apart(t: Tensor) -> Tensor:
        if t.dim() == 0 or t.shape[0] < 2 or not is_float(t) or t.numel() == 0:
            return t
        row = 2**31 // (t.shape[0] - 1) + 4096
        if t.is_cuda and torch.cuda.mem_get_info(t.device)[0] < 1.2 * row * t.shape[0] * t.element_size():
            raise NotApplicable("the device has no memory for 2³¹ elements")
        try:
            base = torch.empty(row * (t.shape[0] - 1) + t[0].numel(), dtype=t.dtype, device=t.device)
        except RuntimeError as error:
            raise NotApplicable("the system reserves no memory for 2³¹ elements") from error
        laid.append("")
        return base.as_strided(t.shape, (row, *t[0].contiguous().stride())).copy_(t)

    expected = s.run(_plain(c.given))
    for i, value in enumerate(() if c.random else c.given.inputs):
        if isinstance(value, Tensor):
            inputs = list(c.given.inputs)
            inputs[i] = apart(value.detach())
            point = replace(c.given, inputs=tuple(inputs))
            c.compare(s.run(point), expected, "with rows more than 2³¹ elements apart", point)
    if c.differentiable:
        at, leaves = s.leaves(c.given)
        roots = differentiable(s(at))
        dys = upstream(roots)
        wanted = s.pull(roots, leaves, dys, retain_graph=True)
        got = s.pull(roots, leaves, [apart(dy) for dy in dys])
        c.compare(([], got), ([], wanted), "with an upstream gradient of rows 2³¹ elements apart", c.given)
    if not laid:
        raise Failed("no tensor was laid apart")
    return None
