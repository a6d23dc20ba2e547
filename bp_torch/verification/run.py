"""check() and assert_correct(): every check in turn, each on its own clock."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._torch import tree_leaves
from . import batches, gradients, layouts, precision, rounding, safety, tools  # noqa: F401  (they fill CHECKS)
from .context import Context
from .registry import CHECKS, Check, Failed, NotApplicable, describe, line, refusal
from .report import FAILED, NOT_APPLICABLE, NOT_FINISHED, PASSED, Report, Result
from .subject import Clock, OutOfTime, Subject, same_random_state

__all__ = ["assert_correct", "check"]

COMPILERS = ("aot_eager", "inductor")


def check(
    fn_or_module: Any,
    *inputs: Any,
    checks: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    reference: Callable[..., Any] | None = None,
    seed: int = 0,
    time_limit: float = 30.0,
    backend: str | None = None,
    compile: str = "aot_eager",
    on_result: Callable[[Result], None] | None = None,
) -> Report:
    """Run every check of docs/check.md on a function or module, and report what holds.

    >>> report = bp_torch.check(MyFunction, torch.randn(4, 8), torch.randn(16, 8))  # doctest: +SKIP
    >>> assert report, report  # doctest: +SKIP

    Args:
        fn_or_module: a subclass of torch.autograd.Function (its ``apply`` is called), any callable of tensors, or a
            module. A module is copied, and checked in the mode it is in; nothing that was passed in is changed,
            gradients and the random state included.
        inputs: what it is called with: tensors of a few rows each, with values as in use; other values and containers
            of tensors are passed on. The inputs that require a gradient are differentiated, or all floating-point ones
            if none does. Derivatives are checked on float64 copies, layouts, batches and safety in the given dtype.
        checks: the names of the checks to run; None is all.
        skip: the names of checks to leave out.
        reference: a callable or module with the same arguments (and parameters) whose results are right. Then values
            are compared with it, and errors in low precision with its errors. Without it a low precision is compared
            with float64, under a bound from how much one rounding of each input changes float64's result.
        seed: of torch's, Python's and numpy's random numbers before each call, so that two calls can be compared.
        time_limit: seconds for each check. It is looked at between evaluations; a check that ran out of time is "not
            finished", which is not a pass.
        backend: the implementation of this package's own layers meanwhile, as in :func:`bp_torch.backend`.
        compile: the backend of torch.compile: ``"aot_eager"``, or ``"inductor"``, which takes longer.
        on_result: called with each result as it comes.

    A check is "not applicable" where it says nothing (with the reason), and where torch refuses with one of its own
    messages that say so, such as a missing forward-mode rule: that is a limit, stated aloud. A wrong number, any other
    error, and a graph break are failures. A report in which no check passed is not true.

    Raises:
        ValueError: an unknown name among ``checks`` and ``skip``, or another option out of range.
        TypeError: something that is not callable, or no floating-point tensor.
        Exception: whatever the call itself raises on the inputs given.
    """
    chosen = _chosen(checks, skip)
    if compile not in COMPILERS:
        raise ValueError(f"check: 'compile': expected one of {', '.join(COMPILERS)}, got {compile!r}")
    if not time_limit > 0:
        raise ValueError(f"check: 'time_limit': expected a positive number of seconds, got {time_limit!r}")
    devices = sorted({t.device.index for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.is_cuda})
    with (
        backends.backend(backend) if backend is not None else contextlib.nullcontext(),
        same_random_state(devices),
        torch.enable_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # a subject is called thousands of times
        subject = Subject(fn_or_module, inputs, seed=seed, clock=Clock(float("inf")))
        subject.sow()
        if not any(t.is_floating_point() for t in subject(subject.point.map(torch.clone))):
            raise TypeError("check: expected an output that is a floating-point tensor")
        other = subject.like(reference) if reference is not None else None
        context = Context(subject, other, compile)
        subject.clock.limit = time_limit
        results = []
        for row in chosen:
            subject.clock.start()
            result = _run(row, context)
            results.append(result)
            if on_result is not None:
                on_result(result)
    named = dict(zip(subject.names, subject.point.floats, strict=True))
    return Report(
        subject=subject.name,
        inputs={name: describe(t) for name, t in named.items()},
        results=tuple(results),
        environment={
            "torch": torch.__version__,
            "device": str(subject.point.floats[0].device),
            "backend": backend or backends.current_backend(),
            "seed": str(seed),
        },
    )


def assert_correct(fn_or_module: Any, *inputs: Any, **options: Any) -> Report:
    """:func:`check`, for test-suites: raises AssertionError, with what failed as its message, unless all is well.

    >>> def test_my_function():
    ...     bp_torch.assert_correct(MyFunction, torch.randn(4, 8), torch.randn(16, 8))
    """
    __tracebackhide__ = True  # pytest shows the caller's line
    report = check(fn_or_module, *inputs, **options)
    if not report:
        raise AssertionError("\n" + report.explanation())
    return report


def _chosen(checks: Iterable[str] | None, skip: Iterable[str]) -> list[Check]:
    names = list(CHECKS) if checks is None else [checks] if isinstance(checks, str) else list(checks)
    left_out = [skip] if isinstance(skip, str) else list(skip)
    if unknown := [name for name in [*names, *left_out] if name not in CHECKS]:
        raise ValueError(f"check: there is no check {unknown[0]!r}; there are {', '.join(CHECKS)}")
    return [row for name, row in CHECKS.items() if name in names and name not in left_out]


def _run(row: Check, context: Context) -> Result:
    clock = context.subject.clock
    state, detail, error = _state(row, context)
    example: dict[str, str] = {}
    if state == FAILED:
        example = error.example if isinstance(error, Failed) else {}
        if row.shrinks:
            state, detail, example = _smaller(row, context, detail, example)
    means = row.means if state == FAILED else ""
    return Result(row.name, state, detail, means, example, round(clock.spent, 3))


def _state(row: Check, context: Context) -> tuple[str, str, Exception | None]:
    try:
        if row.gradients and not context.differentiable:
            raise NotApplicable("no output depends differentiably on an input or parameter")
        if row.repeats and not context.deterministic:
            raise NotApplicable("two calls with the same input and seed differ: see determinism")
        return PASSED, row.run(context) or "", None
    except Failed as failed:
        return FAILED, failed.what, failed
    except NotApplicable as reason:
        return NOT_APPLICABLE, str(reason), None
    except OutOfTime:
        return NOT_FINISHED, f"out of time after {context.subject.clock.spent:.1f} s", None
    except Exception as error:
        if (told := refusal(error)) is not None:
            return NOT_APPLICABLE, told, None
        return FAILED, f"raises {line(error)}", error


def _smaller(row: Check, context: Context, detail: str, example: dict[str, str]) -> tuple[str, str, dict[str, str]]:
    """The failure on fewer rows, if it is there too and time is left. Not every row shows every fault."""
    count = context.rows.count if context.rows.batched else 0
    for rows in (*([i] for i in range(min(count, 4))), [0, 1]):
        if len(rows) >= count:
            break
        try:
            row.run(context.with_rows(rows))
        except Failed as failed:
            return FAILED, failed.what, failed.example
        except (Exception, OutOfTime):
            continue  # another error, or no time: the first failure stands
    return FAILED, detail, example
