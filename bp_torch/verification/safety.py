"""Checks of what must not change: saved tensors, inputs, bits, and what the seed decides."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from .._torch import DispatchMode, tree_leaves, tree_map_only
from ..backends import current_backend
from ..mode import PLAIN
from .context import Context
from .numeric import difference, same_bits
from .registry import Failed, NotApplicable, check, describe
from .subject import Point, differentiable, upstream


@check(
    "retain-graph",
    "a second and a third backward with retain_graph=True give the same gradients as the first",
    "losses that share a part of the graph, and autograd.grad followed by backward, train on wrong gradients",
    gradients=True,
)
def retain_graph(c: Context) -> str | None:
    s = c.subject
    at, leaves = s.leaves(c.given)
    roots = differentiable(s(at))
    dys = upstream(roots)
    first = [g.clone() for g in s.pull(roots, leaves, dys, retain_graph=True)]
    for number in ("second", "third"):
        again = s.pull(roots, leaves, [dy.clone() for dy in upstream(roots)], retain_graph=True)
        c.compare(([], again), ([], first), f"in a {number} backward", c.given)
    return None


@check(
    "two-calls",
    "a call before another one's backward, on other values or another number of rows, changes neither's gradients",
    "a layer used twice (shared weights, a siamese network, an evaluation before backward) trains on the other call's"
    " values",
    gradients=True,
)
def two_calls(c: Context) -> str | None:
    s = c.subject
    later = copy.copy(s)
    later.seed += 1  # other random numbers
    # Values in the domain of the given ones, and no multiple of them.
    others = {"other values": c.given.map(lambda t: 0.9 * t.flatten().flip(0).reshape(t.shape))}
    if c.rows.batched:
        index = torch.arange(c.rows.count + 1) % c.rows.count
        others["another number of rows"] = c.given.rows(c.rows.batched, index)
    for name, other in others.items():
        pair = (s, c.given), (later, other)
        alone = [subject.run(point)[1] for subject, point in pair]
        called = [(subject(at), leaves) for subject, (at, leaves) in [(one, one.leaves(point)) for one, point in pair]]
        for k in (1, 0):
            got = s.pull(*called[k])
            which = f"with a later call on {name}" if k == 0 else f"on {name}, after another call"
            c.compare(([], got), ([], alone[k]), which, pair[k][1])
    return None


@check(
    "overwriting",
    "backward leaves inputs, parameters, outputs, saved tensors and the upstream gradient as they were",
    "whoever else uses these tensors (a residual connection, another loss, a second backward) gets wrong numbers",
    gradients=True,
)
def overwriting(c: Context) -> str | None:
    s = c.subject
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.detach())
        return t

    at, leaves = s.leaves(c.given)
    before = [t.detach().clone() for t in at.floats]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ys = s(at)
    if not s.in_place:
        for name, t, old in zip(s.names, at.floats, before, strict=True):
            if not same_bits([t.detach()], [old]):
                raise Failed(f"forward overwrites {name}", {name: describe(old), "afterwards": describe(t)})
    roots = differentiable(ys)
    dys = upstream(roots)
    watched = [
        (f"the {name} given", t.detach(), t.detach().clone()) for name, t in zip(s.names, at.floats, strict=True)
    ]
    watched += [("an output", y.detach(), y.detach().clone()) for y in ys]
    watched += [("the upstream gradient", dy, dy.clone()) for dy in dys]
    watched += [("a saved tensor", t, t.clone()) for t in saved]
    s.pull(roots, leaves, dys, retain_graph=True)
    for name, now, old in watched:
        if not same_bits([now], [old]):
            raise Failed(f"backward overwrites {name}", {"before": describe(old), "afterwards": describe(now)})
    return None


@check(
    "in-place",
    "after an in-place change of an input, a parameter or an output, backward refuses or is still right",
    "an optimizer step or an in-place activation between forward and backward silently spoils gradients",
    gradients=True,
)
def in_place(c: Context) -> str | None:
    s = c.subject
    at, leaves = s.leaves(c.given)
    right = s.pull(s(at), leaves)
    refused = 0
    count = len(c.given.floats)
    for changed in range(count + 1):
        at, leaves = s.leaves(c.given)
        copies = [t * 1 for t in at.floats]
        ys = s(at.put(copies))
        roots = differentiable(ys)
        # The copies keep backward's start independent of the output that is overwritten.
        ends, dys = [y * 1 for y in roots], upstream(roots)
        target = copies[changed] if changed < count else roots[0]
        try:
            with torch.no_grad():
                target.add_(7.0)
            got = s.pull(ends, leaves, dys)
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            refused += 1
            continue
        name = s.names[changed] if changed < count else "the output"
        for k, g, expected in zip(s.wanted, got, right, strict=True):
            if (wrong := difference([g], [expected])) is not None:
                raise Failed(
                    f"after {name} was changed in place, backward does not refuse, and the gradient of {s.names[k]}"
                    f" is {wrong}",
                    c.example(c.given),
                )
    return f"refused after {refused} of {count + 1} changes, the gradient unchanged after the others"


@check(
    "determinism",
    "the same input and seed give the same bits, three times",
    "a run cannot be repeated, and a failure cannot be looked into",
    repeats=False,
)
def determinism(c: Context) -> str | None:
    s = c.subject
    ys, gs = s.run(c.given)
    for _ in range(3):
        again, gs_again = s.run(c.given)
        if not same_bits(again, ys):
            raise Failed(f"a second call gives {_unlike(again, ys)}", c.example(c.given))
        for k, a, b in zip(s.wanted, gs_again, gs, strict=True):
            if not same_bits([a], [b]):
                raise Failed(f"a second call's gradient of {s.names[k]} is {_unlike([a], [b])}", c.example(c.given))
    return None


def _unlike(got: list[Tensor], expected: list[Tensor]) -> str:
    return difference(got, expected, 0.0) or "another in its last digits"


@check(
    "seed",
    "torch.manual_seed alone decides all random numbers",
    "seeds do not reproduce a run, and resumed or checkpointed training draws other masks",
    repeats=False,
)
def seed(c: Context) -> str | None:
    s = c.subject
    if not c.random:
        raise NotApplicable("the results do not depend on random numbers")
    with torch.no_grad():
        results = []
        for _ in range(4):
            torch.manual_seed(s.seed)
            results.append(s.call(c.given))
    for other in results[1:]:
        if (wrong := difference(other, results[0])) is not None:
            raise Failed(f"after the same torch.manual_seed a second call gives {wrong}", c.example(c.given))
    return None


@check(
    "checkpoint",
    "torch.utils.checkpoint recomputes the same outputs, so that outputs and gradients belong together",
    "with activation checkpointing the gradients belong to another mask than the loss",
    gradients=True,
    repeats=False,
)
def checkpointed(c: Context) -> str | None:
    s = c.subject
    for reentrant in (False, True):
        at, leaves = s.leaves(c.given)
        calls: list[list[Tensor]] = []
        floats = at.floats

        def recorded(*tensors: Tensor, at: Point = at, calls: list[Any] = calls) -> tuple[Tensor, ...]:
            ys = s.call(at.put(tensors))
            calls.append([y.detach().clone() for y in ys])
            return ys

        # Only torch's own seed: Python's and numpy's generators are not restored when checkpoint recomputes.
        torch.manual_seed(s.seed)
        ys = checkpoint(recorded, *floats, use_reentrant=reentrant)
        got = [y.detach().clone() for y in ys]
        roots = differentiable(ys)
        dys = upstream(roots)
        # Reentrant checkpointing works with backward alone.
        ends = [leaf for leaf in leaves if leaf.requires_grad]
        torch.autograd.backward(roots, dys)
        gs = [torch.zeros_like(t) if t.grad is None else t.grad for t in ends]
        if len(calls) > 1 and (wrong := difference(calls[-1], calls[0])) is not None:
            raise Failed(f"recomputed in backward, the output is {wrong}", c.example(c.given))
        if c.deterministic:
            torch.manual_seed(s.seed)
            at, leaves = s.leaves(c.given)
            expected = s.call(at)
            if difference(list(expected), got) is None:
                c.compare(
                    (got, gs),
                    ([y.detach().clone() for y in expected], s.pull(expected, leaves)),
                    "checkpointed",
                    c.given,
                )
    return None


@check(
    "leaks",
    "a forward and backward leave no memory behind, checkpointed or not, before Python's collector runs",
    "memory grows with every step until the run is killed",
    gradients=True,
    shrinks=False,
)
def leaks(c: Context) -> str | None:
    if current_backend() == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        raise NotApplicable("Triton's interpreter leaves cycles of its own to Python's collector")
    s = c.subject

    def step(call: Callable[[Point], Any]) -> None:
        # Inputs are made anew, so that those that are kept count as well.
        at, leaves = s.leaves(replace(c.given, inputs=tree_map_only(Tensor, torch.clone, c.given.inputs)))
        roots = differentiable(call(at))
        torch.autograd.backward(roots, upstream(roots))
        for leaf in leaves:
            leaf.grad = None

    def recomputed(at: Point) -> Any:
        return checkpoint(lambda *floats: s.call(at.put(floats)), *at.floats, use_reentrant=False)

    count = 5
    for how, call in {"": s.call, "checkpointed, ": recomputed}.items():
        left = growth(lambda call=call: step(call), count)  # type: ignore[misc]
        if left > 0 and left == (last := growth(lambda call=call: step(call), 1)):  # type: ignore[misc]
            raise Failed(f"{how}{last} bytes of a call are kept until the next", c.example(c.given))
        if left > 0:
            hint = " (save_for_forward(output), or an output as an attribute of ctx, outlives the recomputation)"
            raise Failed(f"{how}each call leaves {left // count} bytes behind{hint if how else ''}", c.example(c.given))
    return None


class _Storages(DispatchMode):
    """What operators make while it is on. A profiler would see all that is allocated, and prints lines of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = operator(*args, **kwargs or {})
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if type(t) in PLAIN}
        for t in tree_leaves(output):
            if type(t) in PLAIN and (storage := t.untyped_storage())._cdata not in given:  # no view, not in place
                ref = StorageWeakRef(storage)  # whose address is not used again while it lasts
                self.made[ref.cdata] = ref, storage.nbytes()
        return output

    def left(self) -> int:
        return sum(size for ref, size in self.made.values() if not ref.expired())


def growth(step: Callable[[], None], count: int) -> int:
    """Bytes of tensors that ``count`` calls leave behind, without Python's collector."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        with _Storages():
            for _ in range(2):  # what is made once: caches, and what torch imports when first asked
                step()
        on_gpu = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
        with _Storages() as storages:
            for _ in range(count):
                step()
        on_gpu = (torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0) - on_gpu
        return max(storages.left(), on_gpu)
    finally:
        if enabled:
            gc.enable()
