"""Checks that it works with torch's other tools: compile, vmap, evaluation mode, copies and files."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from .._torch import compiler_error, tree_leaves, tree_unflatten
from .context import Context
from .gradients import first_order, report
from .numeric import compare_gradients, difference
from .registry import Failed, NotApplicable, check, line, refusal
from .subject import Point, Subject, as_precise, as_real, differentiable, is_float, upstream


@check(
    "compile",
    "torch.compile(fullgraph=True) takes forward and backward whole, and gives the same",
    "the graph breaks here: the model runs in pieces, slower, or does not compile at all",
    gradients=True,
    shrinks=False,
)
def compile_whole(c: Context) -> str | None:
    s = c.subject
    module = copy.deepcopy(s.module)  # whose parameters, the tied ones too, are the given ones
    function = _flat(module if module is not None else s.function, s.in_place)
    torch.compiler.reset()
    at, leaves = s.leaves(c.given)
    inputs = tree_unflatten(list(at.inputs), s.spec)
    compiled = torch.compile(function, fullgraph=True, backend=c.compiler)
    try:
        s.sow()
        ys = compiled(*inputs)
    except compiler_error() as error:
        if refusal(error) is not None:
            raise NotApplicable(_cause(error)) from error
        raise Failed(f"graph break: {_cause(error)}", c.example(c.given)) from error
    finally:
        torch.compiler.reset()
    parameters = list(module.parameters()) if module is not None else []
    count = len(c.given.floats) - len(parameters)
    wanted = [t if k < count else parameters[k - count] for k, t in zip(s.wanted, leaves, strict=True)]
    got = [y.detach() for y in ys], [as_real(g) for g in s.pull(ys, wanted)]
    if c.random and difference(got[0], s.run(c.given)[0]) is not None:
        return _by_itself(c, compiled)
    c.compare(got, s.run(c.given), f"compiled with {c.compiler}", c.given)
    return f"backend {c.compiler}"


def _by_itself(c: Context, compiled: Any) -> str:
    """Compiled code may draw other random numbers: its gradients against its own numerical derivatives."""
    s = c.subject
    inputs = len(c.given.floats) - len(c.given.parameters)
    wanted = [k for k in s.wanted if k < inputs]

    def f(floats: list[Tensor]) -> list[Tensor]:
        s.sow()
        return list(compiled(*tree_unflatten(list(c.given.put(floats).inputs), s.spec)))

    at, leaves = s.leaves(c.given, wanted)
    with torch.enable_grad():
        ys = f(at.floats)
    weights = upstream(ys)
    live = [w for w, y in zip(weights, ys, strict=True) if y.requires_grad]
    found = compare_gradients(f, at.floats, s.pull(ys, leaves, live), weights, wanted, entries=8)
    report(c, found, c.given, f"compiled with {c.compiler} the gradient of", s.names)
    torch.compiler.reset()
    return f"backend {c.compiler}, which draws other random numbers: gradients against numerical ones"


@check(
    "compiled-transforms",
    "torch.func's grad, jvp and vmap(grad) inside torch.compile give what they give uncompiled, or are refused",
    "a compiled functional training step, saliency map or Jacobian gets gradients of zero, without an error",
    gradients=True,
    shrinks=False,
)
def compiled_transforms(c: Context) -> str | None:
    s = c.subject
    if c.random:
        raise NotApplicable("random numbers differ from one call after another")
    floats, first = c.given.floats, s.wanted[0]
    captured = [torch.nn.Parameter(t.clone(), requires_grad=k in s.wanted) for k, t in enumerate(floats)]

    def run(given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return s.outputs(c.given.put(given))

    def loss(*wanted: Tensor) -> Tensor:  # of the wanted tensors, all else constant
        given = [t.detach() for t in floats]
        for k, t in zip(s.wanted, wanted, strict=True):
            given[k] = t
        return sum_of(run(given))

    def loss_of_first(t: Tensor) -> Tensor:  # beside parameters that autograd tracks
        return sum_of(run([t if k == first else p for k, p in enumerate(captured)]))

    def sum_of(ys: Sequence[Tensor]) -> Tensor:
        return torch.stack([torch.sin(0.7 * y).sum() for y in ys if y.is_floating_point()]).sum()

    everything = tuple(range(len(s.wanted)))
    at = tuple(floats[k] for k in s.wanted)
    ways: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
        "grad": (grad(loss, everything), at),
        "grad beside captured parameters": (lambda t: (grad(loss_of_first)(t),), (floats[first],)),
        "jvp": (lambda *t: torch.func.jvp(loss, t, tuple(torch.cos(one) for one in t)), at),
        "vmap(grad)": (lambda t: (vmap(grad(loss_of_first))(torch.stack([t, t])),), (floats[first],)),
    }
    refused = []
    for name, (f, point) in ways.items():
        c.subject.clock.tick()
        torch.compiler.reset()
        try:
            s.sow()
            expected = f(*point)
            got = torch.compile(f, backend=c.compiler, fullgraph=True)(*point)
        except Exception as error:
            # That a compiler does not take what works without it is no wrong number.
            if refusal(error) is None and not isinstance(error, compiler_error()):
                raise Failed(f"{name} raises {line(error)}", c.example(c.given)) from error
            refused.append(name)
            continue
        finally:
            torch.compiler.reset()
        if (wrong := difference(list(got), list(expected))) is not None:
            raise Failed(
                f"{name} inside torch.compile is {wrong}; Dynamo may tell needs_input_grad False where a transform"
                " differentiates: compute each gradient where needs_input_grad or torch.compiler.is_compiling() says"
                " so, or keep the Function whole by torch.compiler.allow_in_graph",
                c.example(c.given),
            )
    if len(refused) == len(ways):
        raise NotApplicable("refused: torch.func inside torch.compile")
    return f"backend {c.compiler}" + (f"; refused: {', '.join(refused)}" if refused else "")


def _flat(function: Any, in_place: bool) -> Any:
    def flat(*inputs: Any) -> list[Tensor]:
        if in_place:
            inputs = tuple(t.clone() if isinstance(t, Tensor) else t for t in inputs)
        return [as_real(t) for t in tree_leaves(function(*inputs)) if isinstance(t, Tensor)]

    return flat


def _cause(error: Exception) -> str:
    """The line of Dynamo's message that says what it met, and where in the user's code."""
    rows = [row.strip() for row in str(error).splitlines() if row.strip()]
    for key in ("Explanation:", "Developer debug context:"):
        for row in rows:
            if row.startswith(key):
                return row.removeprefix(key).strip()[:200]
    return line(error)


@check(
    "vmap",
    "torch.func.vmap over inputs and parameters, together and each alone, whatever in_dims and out_dims, equals one"
    " call after another",
    "ensembles and batched transforms of models fail, or mix their members up",
    shrinks=False,
)
def vmapped(c: Context) -> str | None:
    s, floats = c.subject, c.exact.floats
    members = [[t * (1 + 0.05 * j) for t in floats] for j in range(3)]

    def f(*tensors: Tensor) -> tuple[Tensor, ...]:
        return s.call(c.exact.put(tensors))

    def compare(batched: Sequence[int], in_dim: int, out_dim: int) -> None:
        in_dims = [min(in_dim, t.dim()) if k in batched else None for k, t in enumerate(floats)]
        given = [
            t if d is None else torch.stack([member[k] for member in members], d)
            for k, (t, d) in enumerate(zip(floats, in_dims, strict=True))
        ]
        s.sow()
        got = vmap(f, tuple(in_dims), out_dim, randomness="different")(*given)
        if c.random:
            return
        chosen = [[m[k] if k in batched else t for k, t in enumerate(floats)] for m in members]
        one_by_one = [s(c.exact.put(tensors)) for tensors in chosen]
        expected = [torch.stack(ys, out_dim) for ys in zip(*one_by_one, strict=True)]
        names = ", ".join(s.names[k] for k in batched)
        what = f"under vmap over {names} (in_dims {in_dim}, out_dims {out_dim})"
        c.compare((list(got), []), (expected, []), what, c.exact, wanted=[])

    everything = range(len(floats))
    with torch.no_grad():
        for in_dim, out_dim in ((0, 0), (1, -1), (-1, 0)):
            compare(everything, in_dim, out_dim)
        for k in everything if len(floats) > 1 else ():
            for in_dim in (0, -1):
                compare([k], in_dim, 0)
    return "runs; random numbers differ from one call after another: not compared" if c.random else None


@check(
    "per-sample-gradients",
    "vmap(grad) over the rows gives each row's own gradients",
    "per-sample gradients (differential privacy, influence, Fisher information) are refused or wrong",
    gradients=True,
    shrinks=False,
)
def per_sample_gradients(c: Context) -> str | None:
    s, rows = c.subject, c.need_rows()
    if c.random:
        raise NotApplicable("random numbers differ from one call after another")
    floats = [i for i, t in enumerate(c.exact.inputs) if is_float(t)]
    dims: list[int | None] = [0 if i in rows.batched else None for i in floats] + [None] * len(c.exact.parameters)
    others = [i for i in rows.batched if not is_float(c.exact.inputs[i])]
    tables = [c.exact.inputs[i] for i in others]

    def loss(chosen: tuple[Tensor, ...], rest: tuple[Tensor, ...], extra: tuple[Tensor, ...]) -> Tensor:
        given = dict(zip(s.wanted, chosen, strict=True))
        left = iter(rest)
        all_floats = [given[k] if k in given else next(left) for k in range(len(dims))]
        at = c.exact.put([t.unsqueeze(0) if d == 0 else t for t, d in zip(all_floats, dims, strict=True)])
        inputs = list(at.inputs)
        for i, table in zip(others, extra, strict=True):
            inputs[i] = table.unsqueeze(0)
        ys = s.call(Point(tuple(inputs), at.parameters))
        return torch.stack([torch.sin(0.7 * y).sum() for y in ys if y.is_floating_point()]).sum()

    tensors = c.exact.floats
    chosen = tuple(tensors[k] for k in s.wanted)
    rest = tuple(t for k, t in enumerate(tensors) if k not in s.wanted)
    in_dims = (
        tuple(dims[k] for k in s.wanted),
        tuple(d for k, d in enumerate(dims) if k not in s.wanted),
        tuple(0 for _ in others),
    )

    def row(group: tuple[Tensor, ...], ds: tuple[int | None, ...], r: int) -> tuple[Tensor, ...]:
        return tuple(t[r] if d == 0 else t for t, d in zip(group, ds, strict=True))

    expected = []
    for r in range(rows.count):
        leaves = tuple(t.detach().clone().requires_grad_() for t in row(chosen, in_dims[0], r))
        value = loss(leaves, row(rest, in_dims[1], r), row(tuple(tables), in_dims[2], r))
        gs = torch.autograd.grad(value, leaves, allow_unused=True)
        expected.append([torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gs, strict=True)])
    got = vmap(grad(loss), in_dims)(chosen, rest, tuple(tables))
    stacked = [torch.stack(gs) for gs in zip(*expected, strict=True)]
    c.compare(([], list(got)), ([], stacked), "each row's own gradient by vmap(grad)", c.exact)
    return None


@check(
    "evaluation",
    "a module in evaluation mode, after some training: gradcheck, and nothing is changed by a call",
    "fine-tuning with frozen statistics, adversarial examples and saliency maps get gradients of another formula",
    shrinks=False,
)
def evaluation(c: Context) -> str | None:
    s = trained(c)
    s.module.eval()  # type: ignore[union-attr]
    before = {name: b.clone() for name, b in s.buffers.items()}
    state = dict(s.buffers)
    note = None
    with torch.no_grad():
        first, second = s(c.exact), s(c.exact)
    if (wrong := difference(first, second)) is not None:
        raise Failed(f"in evaluation mode a second call gives {wrong}", c.example(c.exact))
    module = copy.deepcopy(s.module)
    assert module is not None
    for name, b in module.named_buffers():
        b.copy_(state[name])
    for t in filter(is_float, (*module.parameters(), *module.buffers())):
        t.data = as_precise(t, torch.float64)
    with torch.no_grad():
        module(*tree_unflatten(list(c.exact.inputs), s.spec))
    for name, b in module.named_buffers():
        if difference([b.to(before[name])], [before[name]]) is not None:
            raise Failed(f"in evaluation mode a call changes the buffer {name}", c.example(c.exact))
    if c.differentiable and differentiable(s(s.leaves(c.exact)[0])):
        found = first_order(c, s, c.exact, entries=24)
        note = report(c, found, c.exact, "in evaluation mode the gradient of", s.names)
    return note


def trained(c: Context) -> Subject:
    """A copy of the module whose buffers were moved by three calls in training mode, as in training."""
    if c.subject.module is None:
        raise NotApplicable("a function has no modes and no state")
    s = copy.copy(c.subject)
    s.module = copy.deepcopy(c.subject.module)
    assert s.module is not None
    mode = s.module.training
    s.module.train()
    moving = copy.deepcopy(s.module)
    with torch.no_grad():
        for k in range(3):
            s.sow()
            point = c.given.map(lambda t, k=k: t * (1 + 0.3 * k) + 0.1 * k)  # type: ignore[misc]
            try:
                moving(*tree_unflatten(list(point.inputs), s.spec))
            except (RuntimeError, ValueError, AssertionError, IndexError):
                moving(*tree_unflatten(list(c.given.inputs), s.spec))  # the values moved out of the domain
    s.buffers = {name: b.detach().clone() for name, b in moving.named_buffers()}
    for name, b in s.module.named_buffers():
        b.copy_(s.buffers[name])
    s.module.train(mode)
    return s


@check(
    "copies",
    "copy.deepcopy and pickle give a module with the same results",
    "model averaging, spawned workers and saved models fail or differ",
)
def copies(c: Context) -> str | None:
    s = trained(c)
    expected = s.run(c.given)
    module: Any = s.module
    c.compare(_of(s, copy.deepcopy(module), c), expected, "after copy.deepcopy", c.given)
    try:
        data = pickle.dumps(module)
    except (pickle.PicklingError, AttributeError) as error:
        if "local" in str(error) or "__main__" in str(error):
            raise NotApplicable(f"deepcopy agrees; pickle needs a class of a module's own: {line(error)}") from error
        raise Failed(f"pickle: {line(error)}") from error
    c.compare(_of(s, pickle.loads(data), c), expected, "after pickle", c.given)
    return None


def _of(s: Subject, module: torch.nn.Module, c: Context) -> tuple[list[Tensor], list[Tensor]]:
    """Results with the parameters and buffers that the copy itself holds."""
    other = copy.copy(s)
    other.module, other.function = module, module
    other.buffers = dict(module.named_buffers())
    state = dict(module.named_parameters())
    count = len(c.given.floats) - len(c.given.parameters)
    inputs = c.given.floats[:count]
    point = c.given.put([*inputs, *(as_real(state[name].detach()) for name in s.parameter_names)])
    return other.run(point)


@check(
    "state-dict",
    "state_dict, saved and loaded into a module whose parameters and buffers were spoiled, brings the results back",
    "a saved model differs from the one that was trained",
)
def state_dict(c: Context) -> str | None:
    s = trained(c)
    module: Any = s.module
    if not [*module.parameters(), *module.buffers()]:
        raise NotApplicable("the module has no parameters and no buffers")
    expected = s.run(c.given)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for t in other.state_dict(keep_vars=True).values():
            if isinstance(t, Tensor):
                t.copy_(torch.full_like(t, 3))
        kept = {id(t) for t in other.state_dict(keep_vars=True).values()}
        lost = [name for name, p in other.named_parameters() if id(p) not in kept]
    if lost:
        raise Failed(f"state_dict leaves the parameter {lost[0]} out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.load_state_dict(torch.load(file, weights_only=True))
    c.compare(_of(s, other, c), expected, "after saving and loading state_dict", c.given)
    return None
