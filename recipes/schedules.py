"""Learning-rate schedules beyond torch.optim.lr_scheduler's, and how any of them learns how long the run is."""

from __future__ import annotations

import ast
import functools
import importlib
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau, SequentialLR

LENGTHS = ("T_max", "total", "total_iters", "total_steps")
"""The arguments of schedules that say how long the run is."""


def build(make: LRSchedulerCallable, optimizer: Optimizer, length: int, interval: str = "epoch") -> Any:
    """The schedule that a configuration describes, with what only the run knows filled in.

    A 0 would mean nothing in these settings, so there it stands for what is not known when the file is written:

        T_max, total, total_iters, total_steps    `length`, the epochs or optimizer steps of the whole run
        max_lr                                    the optimizer's own learning rate

    A schedule that has an argument `interval` is told whether it counts epochs or steps.

    Args:
        make: called with the optimizer. Only a `functools.partial`, which is what a configuration gives, is filled in.
        length: of the run, in the unit that `interval` says.
    """
    given = make.keywords if isinstance(make, functools.partial) else {}
    filled: dict[str, Any] = {name: length for name in LENGTHS if is_zero(given.get(name))}
    if is_zero(given.get("max_lr")):
        filled["max_lr"] = [group["lr"] for group in optimizer.param_groups]
    if given.get("interval") == "":
        filled["interval"] = interval
    return make(optimizer, **filled)


def takes_length(make: LRSchedulerCallable) -> bool:
    """Whether `build` fills in the run's length."""
    given = make.keywords if isinstance(make, functools.partial) else {}
    return any(is_zero(given.get(name)) for name in LENGTHS)


class Settings(Optimizer):
    """The settings of an optimizer's groups without its parameters: schedules can be stepped on it, nothing is trained.

    Args:
        optimizer: whose settings are copied.
        rate: in place of its own.
    """

    def __init__(self, optimizer: Optimizer, rate: float | None = None) -> None:
        own = {} if rate is None else {"lr": rate}
        groups = [{**group, **own, "params": [torch.zeros(())]} for group in optimizer.param_groups]
        super().__init__(groups, optimizer.defaults)

    def step(self, closure: Any = None) -> Any:
        pass


def move_to(schedule: Any, fresh: Any, count: int) -> None:
    """Let `schedule`, and its optimizer, be where `fresh` is after `count` epochs or steps.

    `fresh` is at its start, on `Settings` of the same optimizer. What it changes in the groups, rates and, with some
    schedules, momenta, is copied; all else of the optimizer stays.
    """
    groups = fresh.optimizer.param_groups
    before = [dict(group) for group in groups]
    changed = {"lr", "initial_lr"}
    for _ in range(count):
        fresh.optimizer.step()
        fresh.step()
        for group, old in zip(groups, before, strict=True):
            changed |= {name for name, value in group.items() if name != "params" and old.get(name) != value}
    schedule.load_state_dict(fresh.state_dict())
    for group, new in zip(schedule.optimizer.param_groups, groups, strict=True):
        group.update({name: new[name] for name in changed if name in new})


def is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def curve(make: LRSchedulerCallable, rate: float, length: int, interval: str = "epoch") -> list[float]:
    """The learning rates of a run of `length` epochs or steps, from the schedule alone, without training."""
    optimizer = torch.optim.SGD([torch.zeros((), requires_grad=True)], rate)
    schedule = build(make, optimizer, length, interval)
    rates = []
    for _ in range(length):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return rates


class WarmUp(SequentialLR):
    """A linear rise to the optimizer's rate, then another schedule.

        t < steps     lr = lr₀ · (s + (1 - s) · t / steps)
        t ≥ steps     lr as `after` has it at t - steps; lr₀ without one

    Args:
        optimizer: its rate is lr₀.
        steps: how long it rises, in epochs or steps as `interval` says; ≥ 1 and below `total`.
        start: s, the share of lr₀ that it starts with; in (0, 1].
        after: called with the optimizer; it is told a length of `total - steps`.
        total: the length of the run; 0 takes it from the run (`build`).
        interval: "epoch" or "step"; "" takes it from the run (`build`).

    Source: Goyal et al. 2017, arXiv:1706.02677.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        steps: int,
        start: float = 0.01,
        after: LRSchedulerCallable | None = None,
        total: int = 0,
        interval: Literal["", "epoch", "step"] = "",
    ) -> None:
        if not 1 <= steps < total:
            raise ValueError(f"steps must be at least 1 and below the {total} of the whole run, got {steps}")
        if not 0 < start <= 1:
            raise ValueError(f"start must be in (0, 1], got {start}")
        rise = LinearLR(optimizer, start_factor=start, total_iters=steps)
        for group in optimizer.param_groups:  # the next schedule starts from the full rate, as this one did
            group["lr"] = group["initial_lr"]
        then = (
            LambdaLR(optimizer, lambda t: 1.0)
            if after is None
            else build(after, optimizer, total - steps, interval or "epoch")
        )
        if isinstance(then, ReduceLROnPlateau):
            raise ValueError("after cannot be ReduceLROnPlateau: torch's SequentialLR does not tell it the metric")
        super().__init__(optimizer, [rise, then], [steps])


class Formula(LambdaLR):
    """A schedule of the user's own: lr = lr₀ · formula.

    The formula is text such as ``"(1 - epoch / total) ** 2"``, or the dotted path of a function of (t, total) such as
    ``my_package.schedules.half``. In text there are numbers, + - * / // % **, comparisons, `and`, `or`, `not`,
    ``a if condition else b``, the functions and constants of `NAMES`, and

        epoch, step   the count t from 0, under the name that the run's `interval` gives it
        total         the epochs or steps of the whole run

    It is parsed, never executed: no attributes, no other calls, and numbers are floats.

    Args:
        optimizer: its rate is lr₀.
        formula: as above.
        total: the length of the run; 0 takes it from the run (`build`).
        interval: "epoch" or "step"; "" takes it from the run (`build`).

    Raises:
        ValueError: text that is not such a formula, or a factor that is negative or not finite anywhere in the run.
    """

    def __init__(
        self, optimizer: Optimizer, formula: str, total: int = 0, interval: Literal["", "epoch", "step"] = ""
    ) -> None:
        count = interval or "epoch"
        factor = dotted(formula) or parse(formula, (count, "total"))

        def scale(t: int) -> float:
            value = factor(t, total) if callable(factor) else evaluate(factor, {count: float(t), "total": float(total)})
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"formula {formula!r} gives {value!r} at {count} {t}; a factor must be finite and ≥ 0")
            return float(value)

        for t in range(total):
            scale(t)
        # torch asks for one factor beyond the last step, which no step uses.
        super().__init__(optimizer, lambda t: scale(min(t, max(total - 1, 0))) if total else scale(t))


NAMES: Mapping[str, Any] = {
    **{name: getattr(math, name) for name in ("ceil", "cos", "exp", "floor", "log", "log2", "log10", "sin", "sqrt")},
    **{name: getattr(math, name) for name in ("tan", "tanh", "pi", "e")},
    "abs": abs,
    "min": min,
    "max": max,
}
"""What a formula may name, beside its variables."""

OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def dotted(formula: str) -> Callable[[int, int], float] | None:
    """The function that a dotted path names; None for any other text."""
    if not all(part.isidentifier() for part in formula.split(".")) or "." not in formula:
        return None
    module, _, name = formula.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"formula {formula!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"formula {formula!r} is not a function")
    return function


def parse(formula: str, variables: tuple[str, ...]) -> ast.expr:
    """The tree of a formula, if all that it holds is allowed."""
    try:
        tree = ast.parse(formula.strip(), mode="eval").body
        if len(formula) > 400:
            raise SyntaxError("more than 400 characters")
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"formula {formula!r} cannot be read: {error}") from error
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            function = callable(NAMES.get(node.id))
            known = node.id in variables or node.id in NAMES
            if not known or function != (id(node) in called):
                names = ", ".join([*variables, *sorted(NAMES)])
                raise ValueError(f"formula {formula!r} uses {node.id!r} where it cannot; there are {names}")
        elif isinstance(node, ast.Constant):
            if not isinstance(node.value, (int, float)):
                raise ValueError(f"formula {formula!r} holds {node.value!r}, which is not a number")
        elif isinstance(node, ast.Call):
            if node.keywords or not isinstance(node.func, ast.Name):
                raise ValueError(f"formula {formula!r} may call only {', '.join(sorted(NAMES))}, without keywords")
        elif not isinstance(node, ALLOWED):
            raise ValueError(f"formula {formula!r} holds {type(node).__name__}, which is not arithmetic")
    return tree


ALLOWED = (ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.And, ast.Or, ast.IfExp, ast.Load, *OPERATORS)


def evaluate(node: ast.expr, variables: Mapping[str, float]) -> Any:
    """The value of a tree that `parse` allowed. Every number is a float, so that no power takes forever."""

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant():
                return float(node.value)  # type: ignore[arg-type]
            case ast.Name():
                return variables[node.id] if node.id in variables else NAMES[node.id]
            case ast.BinOp():
                return OPERATORS[type(node.op)](float(value(node.left)), float(value(node.right)))
            case ast.UnaryOp():
                return OPERATORS[type(node.op)](value(node.operand))
            case ast.Call():
                return float(value(node.func)(*map(value, node.args)))
            case ast.IfExp():
                return value(node.body) if value(node.test) else value(node.orelse)
            case ast.BoolOp():
                every = isinstance(node.op, ast.And)
                return (all if every else any)(value(part) for part in node.values)
            case ast.Compare():
                terms = [value(term) for term in (node.left, *node.comparators)]
                pairs = zip(node.ops, terms, terms[1:], strict=False)
                return all(OPERATORS[type(op)](a, b) for op, a, b in pairs)
        raise TypeError(f"{type(node).__name__} was not allowed by parse")

    try:
        return value(node)
    except (ArithmeticError, ValueError, TypeError) as error:
        given = ", ".join(f"{name} = {number:g}" for name, number in variables.items())
        raise ValueError(f"formula {ast.unparse(node)!r} fails at {given}: {error}") from error
