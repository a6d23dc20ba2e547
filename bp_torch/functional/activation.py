"""Functional forms of the activations, with torch.nn.functional's names and signatures, one for each row of the table.

``inplace=True`` is torch's own in-place operator, which overwrites its input and whose backward is torch's. So is
every activation of complex numbers, for which the table's derivatives do not hold, and of nested tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.overrides import has_torch_function_unary

from ..functions.activation import ACTIVATIONS, Activation, ActivationFunction
from ..functions.epilogue import Epilogue
from ..functions.function import call
from ._common import activation_arguments, check_parameters, check_tensor, hand_over, to_float32, write_out

_FORMS = [key for key, row in ACTIVATIONS.items() if row.module is not None]

if TYPE_CHECKING:  # the others are torch's own to a type checker: see __init__.py
    __all__ = ["activation", "sin"]

    def sin(input: Tensor) -> Tensor: ...

else:
    __all__ = ["activation", *_FORMS]


def activation(input: Tensor, activation: str, activation_parameters: Mapping[str, float] | None = None) -> Tensor:
    """y = f(x), with f a row of the activation table.

    Args:
        input: x, any shape, floating.
        activation: a key of the table.
        activation_parameters: f's parameters that differ from the default.

    Raises:
        ValueError: an unknown activation or parameter.
    """
    name, parameters = activation_arguments("activation", activation, activation_parameters)
    return _call(name, input, *parameters)


def _call(key: str, input: Tensor, *parameters: float) -> Tensor:
    row = ACTIVATIONS[key]
    if has_torch_function_unary(input):
        given = dict(zip(row.parameters, parameters, strict=True))
        return hand_over(activation, lambda *_: _by_torch(row, input, *parameters), input, key, given)
    check_tensor(key, input=input)
    if parameters:
        check_parameters(key, row, parameters)
    if input.is_complex() or input.is_nested:
        return _by_torch(row, input, *parameters)
    if row.float32:
        (input,) = to_float32(input, cpu=False)
    e = Epilogue(key, tuple(map(float, parameters)), fused=False) if parameters else ALONE[key]
    return call(ActivationFunction, input, e)


ALONE = {key: Epilogue(key, fused=False) for key, row in ACTIVATIONS.items() if not row.parameters}
"""Made once, since to make one takes a microsecond."""


def _by_torch(row: Activation, input: Tensor, *parameters: float) -> Tensor:
    return (row.operator or row.f)(input, *parameters)


def _in_place(key: str, input: Tensor, *parameters: float) -> Tensor:
    operator: Any = ACTIVATIONS[key].operator
    result: Tensor = operator(input, *parameters, inplace=True)
    return result


def _chosen(key: str, value: str) -> str:
    """The row for this value of the argument that chooses among rows."""
    choice = ACTIVATIONS[key].choice
    assert choice is not None
    name, rows = choice
    if not isinstance(value, str):
        raise TypeError(f"{key}(): {name!r}: expected a text, got {type(value).__name__}")
    if value not in rows:
        raise RuntimeError(f"{key}(): {name!r}: expected {' or '.join(map(repr, rows))}, got {value!r}")
    return rows[value]


def _define(key: str, row: Activation) -> None:
    """Write out a row's form, as dataclasses do: so its signature is a real one, and costs nothing at a call."""
    name, rows = row.choice or ("", {})
    given = "".join(f", {name}" for name in row.parameters)
    body = f"_call({f'_chosen({key!r}, {name})' if rows else repr(key)}, input{given})"
    if "inplace" in row.arguments:
        body = f"_in_place({key!r}, input{given}) if inplace else {body}"
    others = [f"With {name}={value!r}: {ACTIVATIONS[other].formula}." for value, other in rows.items() if other != key]
    doc = " ".join([f"y = {row.formula}.", *others])
    write_out(f'def {key}(input: Tensor{row.signature}) -> Tensor:\n    """{doc}"""\n    return {body}\n', globals())


for _key in _FORMS:
    _define(_key, ACTIVATIONS[_key])
