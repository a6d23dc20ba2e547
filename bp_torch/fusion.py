"""Sequential's forward, with what follows a layer computed in the layer's own Function.

    Linear → activation → Dropout       in one Function, as :func:`functional.dense`
    BatchNorm → activation → Dropout    in one Function, as :func:`functional.batch_norm_act`

where the activation or the Dropout may lack. Which modules follow a layer is read at each call: no module knows of the
others, so that each can be replaced, changed, hooked, frozen or taken out like any module of torch.nn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from . import functional, nn
from ._torch import has_any_global_hook
from .functions.activation import ACTIVATIONS
from .nn.batch_norm import arguments

__all__ = ["ACTIVATION_KEYS", "FORWARD", "HEADS", "PARTS", "following", "is_sequential", "may_fuse", "row_of", "run"]

FORWARD = "_bp_torch_forward"
"""The attribute under which ``convert`` keeps the forward that it gave to a module."""


def _with_torchs(names: Sequence[str]) -> dict[type[Module], str]:
    """The classes of these names, here and in torch.nn."""
    return {getattr(place, name): name for name in names for place in (torch.nn, nn) if hasattr(place, name)}


ACTIVATION_KEYS: dict[type[Module], str] = {
    cls: key for key, row in ACTIVATIONS.items() if row.module is not None for cls in _with_torchs([row.module])
}
"""Activation module, torch.nn's and ours → its key in the activation table."""

_DROPOUTS = frozenset(_with_torchs(["Dropout"]))
PARTS = frozenset(ACTIVATION_KEYS) | _DROPOUTS
"""What can be computed with the layer before it."""

_TORCHS = frozenset(cls for cls in vars(torch.nn).values() if isinstance(cls, type))
_NOT_FUSED = dict.fromkeys(
    (cls for cls, key in ACTIVATION_KEYS.items() if ACTIVATIONS[key].float32),
    "is computed in float32 by autocast, the fused layer would not be",
)


def following(children: Sequence[Module], at: int) -> tuple[Module | None, Module | None, tuple[Module, str] | None]:
    """The activation and the Dropout that are computed with the layer at ``at``, and what keeps the next one out."""
    activation = dropout = None
    why = ""
    for part in children[at + 1 : at + 3]:
        kind = type(part)
        if kind in _DROPOUTS:
            why = _obstacle(part)
            dropout = None if why else part
            break
        if activation is not None or kind not in ACTIVATION_KEYS:
            break
        why = _obstacle(part) or _NOT_FUSED.get(kind, "")
        if why:
            break
        activation = part
    if (activation is not None or dropout is not None) and (obstacle := _obstacle(children[at])):
        return None, None, (children[at], obstacle)
    return activation, dropout, (part, why) if why else None


def _obstacle(module: Module) -> str:
    """Why a module must be called by itself, or nothing."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    attributes = module.__dict__
    given, forward = attributes.get(FORWARD), attributes.get("forward")
    if given is None and type(module) in _TORCHS:
        return "is not converted"
    # Dynamo compares functions, and no partial objects.
    if (forward is not None) if given is None else (getattr(forward, "func", None) is not given.func):
        return "has a forward of its own"
    return "is compiled by itself" if module._compiled_call_impl is not None else ""


def is_sequential(module: Module) -> bool:
    """Whether it runs its children one after the other, as :class:`torch.nn.Sequential` does."""
    cls, plain = type(module), torch.nn.Sequential  # type: Any, Any
    return isinstance(module, plain) and cls.forward is plain.forward and cls.__iter__ is plain.__iter__


def may_fuse(module: Module) -> bool:
    """Whether it is sequential, and has a layer with something behind it that can be computed with it."""
    kinds = [type(child) for child in module._modules.values()]
    return is_sequential(module) and any(a in HEADS and b in PARTS for a, b in itertools.pairwise(kinds))


def run(sequential: torch.nn.Sequential, input: Any) -> Any:
    """What :class:`torch.nn.Sequential` computes."""
    children = tuple(sequential._modules.values())
    # An exported graph says which module an operator came from; what is no tensor is torch.fx's, or the children's own.
    if not isinstance(input, Tensor) or has_any_global_hook() or torch.compiler.is_exporting():
        for child in children:
            input = child(input)
        return input
    at = 0
    while at < len(children):
        child = children[at]
        at += 1
        head = HEADS.get(type(child))
        activation = dropout = None
        if head is not None:
            activation, dropout, _ = following(children, at - 1)
        if head is None or (activation is None and dropout is None):
            input = child(input)
            continue
        key, parameters = (None, None) if activation is None else row_of(activation, type(activation))
        p = dropout.p if dropout is not None and dropout.training else 0.0
        input = head(child, input, key, parameters, p)
        at += (activation is not None) + (dropout is not None)
    return input


def row_of(module: Any, kind: type[Module]) -> tuple[str, dict[str, float] | None]:
    """An activation module's key in the table, where its class or a parent is ``kind``; and its parameters."""
    key = ACTIVATION_KEYS[kind]
    if (choice := ACTIVATIONS[key].choice) is not None:
        name, rows = choice
        key = rows[getattr(module, name)]
    names = ACTIVATIONS[key].parameters
    return key, {name: getattr(module, name) for name in names} if names else None


def _dense(module: Any, input: Tensor, key: str | None, parameters: dict[str, float] | None, p: float) -> Tensor:
    return functional.dense(input, module.weight, module.bias, activation=key, activation_parameters=parameters, p=p)


def _batch_norm(module: Any, input: Tensor, key: str | None, parameters: dict[str, float] | None, p: float) -> Tensor:
    of_channels, how = arguments(module, input)
    return functional.batch_norm_act(
        input, *of_channels, None, *how, activation=key, activation_parameters=parameters, p=p, dropout_training=True
    )


HEADS: dict[type[Module], Callable[..., Tensor]] = {
    **dict.fromkeys(_with_torchs(["Linear"]), _dense),
    **dict.fromkeys(_with_torchs([f"BatchNorm{d}d" for d in (1, 2, 3)]), _batch_norm),
}
"""Layer, torch.nn's and ours → the layer with what follows it."""
