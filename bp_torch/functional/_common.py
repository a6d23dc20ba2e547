"""What the functional forms share: argument checks and the dtypes that autocast gives."""

from __future__ import annotations

import functools
import inspect
import linecache
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .._torch import is_autocast_enabled
from ..functions.activation import ACTIVATIONS, Activation
from ..functions.epilogue import Epilogue

__all__ = [
    "USUAL",
    "activation_arguments",
    "check_bool",
    "check_number",
    "check_parameters",
    "check_probability",
    "check_same",
    "check_tensor",
    "epilogue_of",
    "hand_over",
    "lower_precision",
    "overridable",
    "to_float32",
    "warn",
    "without_generator",
    "write_out",
]


_DEFAULTS: dict[str | None, tuple[float, ...]] = {
    None: (),
    **{name: tuple(float(value) for value in row.parameters.values()) for name, row in ACTIVATIONS.items()},
}
_REQUIRED = ("input", "branch")


def write_out(source: str, namespace: dict[str, Any]) -> None:
    """Run this source in a module's namespace, with annotations as texts; tracebacks show it."""
    file = f"<written out by {namespace['__name__']}: {source.split('(')[0].strip()}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), namespace)


Form = TypeVar("Form", bound=Callable[..., Any])


def overridable(theirs: Callable[..., Any]) -> Callable[[Form], Form]:
    """A functional form whose calls are handed over where an argument that it annotates as a Tensor has a
    ``__torch_function__``, or a mode has: see :func:`hand_over`.

    The check is a function of the form's own signature, which is written out here: with ``*args, **kwargs`` a call of
    dense, whose options are keywords, takes a microsecond more.
    """

    def decorate(ours: Form) -> Form:
        signature = inspect.signature(ours)
        parameters = signature.parameters.values()
        bare = signature.replace(
            parameters=[p.replace(annotation=p.empty) for p in parameters], return_annotation=signature.empty
        )
        tensors = ", ".join(p.name for p in parameters if str(p.annotation).startswith("Tensor"))
        given = ", ".join(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name for p in parameters)
        source = f"""\
def {ours.__name__}_with(ours, theirs, hand_over, has_torch_function):
    def {ours.__name__}{bare}:
        if has_torch_function({tensors}):
            return hand_over(form, theirs, {given})
        return ours({given})
    form = {ours.__name__}
    return form
"""
        namespace: dict[str, Any] = {"__name__": ours.__module__}
        write_out(source, namespace)
        make = namespace[f"{ours.__name__}_with"]
        form: Any = functools.wraps(ours)(make(ours, theirs, hand_over, has_torch_function_variadic))
        return form

    return decorate


def hand_over(ours: Callable[..., Any], theirs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The call ``ours(*args, **kwargs)``, where an argument's type or a mode has a ``__torch_function__``.

    A subclass of Tensor with a rule of its own (nested tensors, per-sample gradients, quantized weights) knows torch's
    functions and none of ours: it gets ``theirs``, which is torch's, or made of such. All others (the proxies of
    torch.fx, a mode such as ``torch.set_default_device``, a subclass with Tensor's rule) get ``ours``.
    """
    given = [*args, *kwargs.values()]
    given = [t for value in given for t in (value if isinstance(value, (list, tuple)) else (value,))]
    if any(isinstance(t, Tensor) and _rule(type(t)) not in _TORCHS_RULES for t in given):
        return theirs(*args, **kwargs)
    return handle_torch_function(ours, given, *args, **kwargs)


def _rule(kind: type[Tensor]) -> Any:
    return getattr(kind.__torch_function__, "__func__", kind.__torch_function__)


_TORCHS_RULES = (_rule(Tensor), _rule(torch.nn.Parameter))  # Parameter's is none at all


def without_generator(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch's function, called as one of ours that takes a ``generator`` too: RuntimeError if there is one."""

    def called(*args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Any:
        if generator is not None:
            raise RuntimeError(
                f"{function.__name__}(): 'generator': expected None for a nested tensor or a subclass of Tensor, on "
                f"which torch's own operator draws, got {type(generator).__name__}"
            )
        return function(*args, **kwargs)

    return called


def warn(message: str, stacklevel: int) -> None:
    """``warnings.warn`` from the place of who called an :func:`overridable` form, which counts as one function; not
    while compiling, where it would break the graph and torch's own functions are silent as well.
    """
    if not torch.compiler.is_compiling():
        warnings.warn(message, stacklevel=stacklevel + 2)


def check_tensor(function: str, **tensors: Any) -> None:
    """TypeError unless each is a tensor; all but ``input`` and ``branch`` may be None."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name in _REQUIRED):
            raise TypeError(f"{function}(): argument '{name}': expected a Tensor, got {type(tensor).__name__}")


def check_same(function: str, **tensors: Tensor | None) -> None:
    """RuntimeError unless all that are given have the first one's dtype and device."""
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    first_name, first = given[0]
    for name, tensor in given[1:]:
        for what in ("dtype", "device"):
            expected, got = getattr(first, what), getattr(tensor, what)
            if expected != got:
                raise RuntimeError(
                    f"{function}(): '{name}': expected the {what} of '{first_name}', {expected}, got {got}"
                )


def check_number(function: str, name: str, value: Any) -> None:
    """Refuses what torch's operators do not take for a real number: TypeError, and RuntimeError for a complex one."""
    if isinstance(value, complex):
        raise RuntimeError(f"{function}(): {name!r}: expected a real number, got {value}")
    if not hasattr(value, "__float__") or (isinstance(value, Tensor) and value.dim() > 0):
        raise TypeError(f"{function}(): {name!r}: expected a number, got {type(value).__name__}")


def check_bool(function: str, name: str, value: Any) -> None:
    """TypeError unless it is a bool, numpy's included."""
    if value is not True and value is not False and not type(value).__name__.startswith("bool"):
        raise TypeError(f"{function}(): {name!r}: expected a bool, got {type(value).__name__}")


def check_probability(function: str, p: float, name: str = "p") -> None:
    """ValueError unless 0 ≤ p ≤ 1."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{function}(): '{name}': expected a probability between 0 and 1, got {p}")


def check_parameters(function: str, row: Activation, values: Sequence[Any]) -> None:
    """Refuses parameters that the row does not take, with torch's exceptions: the kernels do not look at them. Where
    torch has no answer to Inf and NaN, neither is one taken.
    """
    for index, value in enumerate(values):
        if not isinstance(value, (float, int)):
            check_number(function, list(row.parameters)[index], value)
        if row.operator is None and not -math.inf < value < math.inf:
            raise ValueError(f"{function}(): {list(row.parameters)[index]!r}: expected a finite number, got {value}")
    for parameter, expected, holds, error in row.requires:
        if not holds(*values):
            given = dict(zip(row.parameters, values, strict=True))
            raise error(f"{function}(): {parameter!r}: expected {expected.format(**given)}, got {given[parameter]}")


def activation_arguments(
    function: str, activation: str | None, parameters: Mapping[str, float] | None = None
) -> tuple[str, tuple[float, ...]]:
    """The table's key and all its parameters in order, from a name and the parameters that differ from the default."""
    if not parameters and (activation is None or type(activation) is str) and activation in _DEFAULTS:
        return "identity" if activation is None else activation, _DEFAULTS[activation]
    name = "identity" if activation is None else activation
    if not isinstance(name, str):
        raise TypeError(f"{function}(): 'activation': expected a name or None, got {type(name).__name__}")
    if name not in ACTIVATIONS:
        raise ValueError(f"{function}(): 'activation': expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    defaults = ACTIVATIONS[name].parameters
    if parameters is not None and not isinstance(parameters, Mapping):
        raise TypeError(
            f"{function}(): 'activation_parameters': expected a mapping of names to numbers, "
            f"got {type(parameters).__name__}"
        )
    given = dict(parameters or {})
    unknown = [key for key in given if key not in defaults]
    if unknown:
        allowed = ", ".join(defaults) or "none"
        raise ValueError(
            f"{function}(): 'activation_parameters': {name} takes {allowed}, got {', '.join(map(repr, unknown))}"
        )
    values = tuple(given.get(key, default) for key, default in defaults.items())
    if given:
        check_parameters(function, ACTIVATIONS[name], values)
    return name, tuple(map(float, values))


USUAL: dict[tuple[str | None, float, bool], Epilogue] = {}
"""By an activation with its defaults, p, and whether dropout acts: a look here takes less time than the checks."""


def epilogue_of(
    function: str, activation: str | None, parameters: Mapping[str, float] | None, p: float = 0.0, training: bool = True
) -> Epilogue:
    """What follows a layer, from a name, the parameters that differ from the default, and the dropout probability,
    which counts in ``training`` alone.

    Raises:
        TypeError: the activation is no name.
        ValueError: an unknown activation or parameter, or p outside [0, 1].
    """
    eager = not parameters and (activation is None or type(activation) is str) and not torch.compiler.is_compiling()
    if eager and (e := USUAL.get((activation, p, training))) is not None:
        return e
    name, values = activation_arguments(function, activation, parameters)
    check_probability(function, p)
    e = Epilogue(name, values, p if training else 0)
    if eager and type(p) in (float, int) and len(USUAL) < 1024:
        USUAL[activation, p, training] = e
    return e


def _autocast(tensor: Tensor | None) -> bool:
    """Whether autocast is on for this tensor and may cast it; float64 and integers are left alone, as torch does."""
    return (
        tensor is not None
        and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and torch.is_autocast_enabled(tensor.device.type)
    )


def lower_precision(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What autocast does before matrix products: cast to its dtype."""
    if not is_autocast_enabled():
        return tensors
    return tuple(
        t.to(torch.get_autocast_dtype(t.device.type)) if t is not None and _autocast(t) else t for t in tensors
    )


def to_float32(*tensors: Tensor | None, cpu: bool = True) -> tuple[Any, ...]:
    """What autocast does before operators that need range or precision: cast to float32.

    ``cpu=False`` for the operators that torch treats so on accelerators alone (softmax, log_softmax, softplus).
    """
    if not is_autocast_enabled():
        return tensors
    return tuple(
        t.float() if t is not None and _autocast(t) and (cpu or t.device.type != "cpu") else t for t in tensors
    )
