"""Let the torch.nn modules of an existing model compute with bp_torch, and back.

    convert(model)             in place: every module whose exact type has a counterpart here computes as that does
    revert(model)              undoes convert
    with reverted(model): …    undoes it for a while

A converted module is the same object of the same class: ``convert`` gives it a ``forward`` of its own, that of the
counterpart, as an attribute of the object. So everything that refers to a module or a parameter stays valid
(optimizers, hooks, shared modules, the user's own variables), whoever looks at ``type(module)`` finds torch's class
(quantization, captum, opacus, torch.fx), and state_dict has the same keys. A ``Sequential`` gets that of fusion.py,
which computes a layer with what follows it.

The same forward is kept under ``_bp_torch_forward``: both attributes follow the module through deepcopy and pickle, and
tell :func:`revert` whether somebody has wrapped the forward since.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.nn import Module

from . import fusion, nn
from .fusion import FORWARD

__all__ = ["convert", "revert", "reverted"]

M = TypeVar("M", bound=Module)

_OURS: dict[str, type[Module]] = {name: getattr(nn, name) for name in nn._OURS}

COUNTERPARTS: dict[type[Module], type[Module]] = {
    getattr(torch.nn, name): ours
    for name, ours in _OURS.items()
    if hasattr(torch.nn, name) and issubclass(ours, getattr(torch.nn, name))
}
"""torch.nn class → the class of the same name in bp_torch.nn, which subclasses it."""

_REPLICATE = "_replicate_for_data_parallel"


def convert(model: M, fuse: bool = True) -> M:
    """Let ``model`` compute with bp_torch, in place, and return it.

    Every module whose exact type is a torch.nn class with a counterpart in bp_torch.nn gets that one's ``forward``. Its
    class, attributes, parameters and hooks stay. Left are subclasses, parametrized modules, TorchScript modules, and
    modules whose ``forward`` was replaced on the object. A second call changes nothing.

    With ``fuse=True`` every :class:`torch.nn.Sequential`, and every subclass that inherits its forward, computes in one
    Function::

        Linear → activation → Dropout
        BatchNorm → activation → Dropout

    where the activation or the Dropout may lack. What follows a layer is read at each call, so that a part can be
    replaced, deleted, changed (``model[2].p = 0``), hooked or frozen as in a model of torch's. A part is called by
    itself where it is not of the exact type, has hooks or a forward of its own, or has a counterpart and was not
    converted; and so is all of the Sequential where global hooks are registered, and in ``torch.export`` and
    ``torch.fx``. Softplus, which autocast computes in float32 on accelerators, is not fused. In-place activations and
    dropouts are: the result is the same. Models whose ``forward`` is code have their modules converted, and nothing
    fused.

    Values, gradients and modes are as before; a dropout mask comes from the same generator but is not the same mask.

    ``torch.jit.script`` reads a forward's source, and needs :func:`revert` first, or ``with reverted(model):``. A
    shallow copy (``copy.copy``), which shares its parameters with the original, computes by the original's other
    attributes.

    Raises:
        TypeError: ``model`` is not a Module.
    """
    _check_module("convert", model)
    for module in model.modules():
        forward = forward_of(module, fuse)
        if forward is not None and "forward" not in vars(module) and FORWARD not in vars(module):
            _give(module, functools.partial(forward, module))
    return model


def revert(model: M) -> M:
    """Undo :func:`convert` in place, and return ``model``.

    Every module in it that convert changed computes as torch's again, also where somebody has wrapped its ``forward``
    since. All else stays as it is now. Modules that the user made of bp_torch's classes are left; a model that was
    never converted is returned as it is.

    Raises:
        TypeError: ``model`` is not a Module.
    """
    _check_module("revert", model)
    for module in model.modules():
        _take(module)
    return model


@contextmanager
def reverted(model: M) -> Iterator[M]:
    """Inside a ``with`` block ``model`` computes with torch.nn; afterwards what was converted is so again.

    For what reads the source or the operators of torch's own forward, such as ``torch.jit.script``.

    Raises:
        TypeError: ``model`` is not a Module.
    """
    _check_module("reverted", model)
    taken = [(module, forward, forward.func) for module in model.modules() if (forward := vars(module).get(FORWARD))]
    revert(model)
    try:
        yield model
    finally:
        for module, forward, function in taken:
            _point(forward, function, module)
            _give(module, forward)


def forward_of(module: Module, fuse: bool = True) -> Callable[..., Any] | None:
    """The forward that ``convert`` gives to such a module, or None."""
    ours: Any = COUNTERPARTS.get(type(module))
    if ours is not None:
        forward: Callable[..., Any] = ours.forward
        return forward
    return fusion.run if fuse and fusion.may_fuse(module) else None


def _check_module(function: str, model: Any) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"{function}(): 'model': expected a torch.nn.Module, got {type(model).__name__}")


def _give(module: Module, forward: functools.partial[Any]) -> None:
    """Set what :func:`_take` takes; a forward that somebody else set stays."""
    vars(module)[FORWARD] = forward
    vars(module).setdefault("forward", forward)
    vars(module).setdefault(_REPLICATE, functools.partial(_replicate, module))


def _take(module: Module) -> None:
    forward = vars(module).pop(FORWARD, None)
    if forward is None:
        return
    vars(module).pop(_REPLICATE, None)
    if vars(module).get("forward") is forward:
        del vars(module)["forward"]
    _point(forward, type(module).forward, module)  # whoever wrapped it calls torch's from now on


def _point(forward: functools.partial[Any], function: Callable[..., Any], module: Module) -> None:
    forward.__setstate__((function, (module,), {}, None))  # type: ignore[attr-defined]  # typeshed lacks it


def _replicate(module: Module) -> Module:
    """A replica for DataParallel, which copies attributes: its forward must be about the replica."""
    replica: Module = getattr(type(module), _REPLICATE)(module)
    attributes = vars(replica)
    own = attributes["forward"] is attributes[FORWARD]
    for name in (FORWARD, _REPLICATE):
        attributes[name] = functools.partial(attributes[name].func, replica)
    if own:
        attributes["forward"] = attributes[FORWARD]
    return replica
