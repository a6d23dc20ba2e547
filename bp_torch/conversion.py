"""Change the torch.nn modules of an existing model into bp_torch.nn's, and back.

    convert(model)    in place: every module whose exact type has a counterpart here becomes that counterpart
    revert(model)     undoes convert

No module is replaced by another object: ``convert`` only changes the class of the object (``module.__class__``), and
gives a fused layer its options as attributes. So everything that refers to a module or a parameter stays valid
(optimizers, hooks, shared modules, the user's own variables), and state_dict has the same keys in the same order.

Each changed module carries what :func:`revert` must know, in two plain attributes that follow it through deepcopy,
pickle and moves: ``_bp_torch_from``, its class before; and, on a fused layer, ``_bp_torch_absorbed``, the modules that
it took over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.nn import Module

from . import nn
from .functions.activation import ACTIVATIONS

__all__ = ["convert", "revert"]

M = TypeVar("M", bound=Module)
Children = list[tuple[str, Module]]

_OURS: dict[str, type[Module]] = {name: getattr(nn, name) for name in nn._OURS}

COUNTERPARTS: dict[type[Module], type[Module]] = {
    getattr(torch.nn, name): ours
    for name, ours in _OURS.items()
    if hasattr(torch.nn, name) and issubclass(ours, getattr(torch.nn, name))
}
"""torch.nn class → the class of the same name in bp_torch.nn, which subclasses it."""

_FUSED: dict[type[Module], type[Module]] = {
    _OURS[head]: _OURS[fused]
    for head, fused in [("Linear", "Dense"), *((f"BatchNorm{d}d", f"BatchNormAct{d}d") for d in (1, 2, 3))]
    if fused in _OURS
}
_ACTIVATION_KEYS: dict[type[Module], str] = {
    _OURS[name]: key
    for name in nn._activation.__all__
    if (key := {"LeakyReLU": "leaky_relu"}.get(name, name.lower())) in ACTIVATIONS
}

_FROM, _ABSORBED = "_bp_torch_from", "_bp_torch_absorbed"
_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def convert(model: M, fuse: bool = True) -> M:
    """Change ``model`` in place to compute with bp_torch, and return it.

    Every module whose exact type is a torch.nn class with a counterpart in bp_torch.nn becomes that counterpart. Left
    are subclasses, parametrized modules, TorchScript modules, and modules whose ``forward`` was replaced on the object.
    Pruned modules keep their class, so they are converted. A second call changes nothing.

    With ``fuse=True``, in every exact :class:`torch.nn.Sequential`::

        Linear → activation → Dropout       becomes    Dense → Identity → Identity
        BatchNorm → activation → Dropout    becomes    BatchNormAct → Identity → Identity

    where the activation or the Dropout may lack.

    The fused layer stands at the Linear's or batch norm's place and computes all of it; the absorbed modules, still
    the same objects at the same places, compute nothing until :func:`revert`. Outputs, gradients, ``train()`` and
    ``eval()`` of the whole are as before; a dropout mask comes from the same generator but is not the same mask. What
    changes is what is seen between the parts: ``model[0]`` alone now gives the activation's output;
    ``isinstance(m, Dropout)`` no longer finds an absorbed Dropout, whose probability is now ``model[0].dropout`` and
    whose mode is that of ``model[0]`` (its own still behind a batch norm, which may be frozen by ``eval()``); and who
    replaces or wraps the fused layer as if it were a Linear or batch norm (``model[0] = other``,
    ``SyncBatchNorm.convert_sync_batchnorm``, LoRA) loses or misplaces what it absorbed: do that before convert, or use
    ``fuse=False``.

    Not fused: a part that is used elsewhere in ``model`` too, or is a subclass; one with forward or backward hooks,
    which would see something else (the first part may have forward pre-hooks); a Dropout whose training flag differs
    from the first part's; an activation that is not in the table; and Softplus, which autocast computes in float32 on
    accelerators. In-place activations and dropouts are fused: the result is the same. Models whose ``forward`` is code
    have their modules replaced, and nothing fused.

    Where an activation here keeps its output for backward and torch's keeps its input (leaky_relu, relu6, hardtanh,
    ...), code that changes that output in place (``y = act(x); y += x``) is refused by autograd, in backward, with a
    RuntimeError.

    Raises:
        TypeError: ``model`` is not a Module.
    """
    _check_module("convert", model)
    if fuse:
        uses = _uses(model)
        for module in model.modules():
            for head, following in _heads(module):
                absorbed, _ = _absorbable(head, following, uses)
                if absorbed and not _absorbed(head):
                    _fuse(head, tuple(child for _, child in absorbed))
    for module in model.modules():
        ours = COUNTERPARTS.get(type(module))
        if ours is not None and "forward" not in vars(module):
            _become(module, ours)
    return model


def revert(model: M) -> M:
    """Undo :func:`convert` in place, and return ``model``.

    Every module that convert changed gets its original class back, and absorbed modules compute again, with the
    probability that the fused layer has now. Weights, buffers, hooks, flags, dtypes and devices stay as they are now.
    bp_torch modules that the user made are left. A model that was never converted is returned as it is.

    Raises:
        TypeError: ``model`` is not a Module.
        RuntimeError: what convert did cannot be undone, and nothing was changed: a fused layer without what it absorbed
            or the reverse (revert the whole model, before parts are taken out), a module whose class was changed
            since (remove its parametrization first), or a fused layer whose activation was changed since.
    """
    _check_module("revert", model)
    converted = [(path, module) for path, module in model.named_modules() if _FROM in vars(module)]
    inside = {id(module) for _, module in converted}
    absorbed = {id(part) for _, module in converted for part in _absorbed(module)}
    for path, module in converted:
        problem = _irreversible(module, inside, absorbed)
        if problem:
            raise RuntimeError(f"revert(): {_shown(path)}: {problem}")
    for _, module in converted:
        for part in _absorbed(module):
            if _kind(_origin(part)) == "dropout":
                part.p = module.dropout
                vars(module).pop("dropout", None)
        if _absorbed(module):
            for name in _fused_attributes(type(module), _absorbed(module)):
                vars(module).pop(name, None)
        original = _origin(module)
        vars(module).pop(_ABSORBED, None)
        del vars(module)[_FROM]
        module.__class__ = original
    return model


def _check_module(function: str, model: Any) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"{function}(): 'model': expected a torch.nn.Module, got {type(model).__name__}")


def _become(module: Module, cls: type[Module]) -> None:
    vars(module).setdefault(_FROM, type(module))
    module.__class__ = cls


def _fuse(head: Module, parts: tuple[Module, ...]) -> None:
    fused = _fused_class(head)
    assert fused is not None
    vars(head).update(_fused_attributes(fused, parts))
    vars(head)[_ABSORBED] = parts
    _become(head, fused)
    for part in parts:
        _become(part, torch.nn.Identity)


def _fused_attributes(fused: type[Module], parts: Sequence[Module]) -> dict[str, Any]:
    """What the constructor of ``fused`` sets for these parts, beyond what the class that it extends sets."""
    options: dict[str, Any] = {}
    for part in parts:
        if _kind(_origin(part)) == "dropout":
            options["dropout"] = part.p
        else:
            name, options["activation_parameters"] = _activation(part)
            options["activation"] = name
    extended = next(head for head, cls in _FUSED.items() if cls is fused)
    sizes = (1, 1) if extended is nn.Linear else (1,)
    plain = vars(extended(*sizes, device="meta"))
    return {name: value for name, value in vars(fused(*sizes, device="meta", **options)).items() if name not in plain}


def _origin(module: Module) -> type[Module]:
    """The class that the module had before convert."""
    return vars(module).get(_FROM, type(module))


def _absorbed(module: Module) -> tuple[Module, ...]:
    return vars(module).get(_ABSORBED, ())


def _fused_class(module: Module) -> type[Module] | None:
    """What the module becomes, or became, when it is fused with what follows."""
    return type(module) if _absorbed(module) else _FUSED.get(COUNTERPARTS.get(type(module), type(module)))


def _kind(cls: type[Module]) -> str:
    """``activation`` or ``dropout`` if a module of exactly this class can be absorbed."""
    ours = COUNTERPARTS.get(cls, cls)
    return "activation" if ours in _ACTIVATION_KEYS else "dropout" if ours is nn.Dropout else ""


def _activation(module: Module) -> tuple[str, dict[str, float]]:
    """An activation module's key in the table, and its parameters that differ from the default."""
    cls = _origin(module)
    key = _ACTIVATION_KEYS[COUNTERPARTS.get(cls, cls)]
    if key == "gelu" and module.approximate == "tanh":
        key = "gelu_tanh"
    defaults = ACTIVATIONS[key].parameters
    return key, {name: getattr(module, name) for name in defaults if getattr(module, name) != defaults[name]}


def _uses(model: Module) -> Counter[int]:
    """How often each module is a child, by id."""
    return Counter(id(child) for parent in model.modules() for child in parent._modules.values())


def _heads(parent: Module) -> Iterator[tuple[Module, Children]]:
    """The children of a Sequential that a fusion may start at, or did, each with the children that follow."""
    if type(parent) is torch.nn.Sequential and "forward" not in vars(parent):
        children = [(name, child) for name, child in parent._modules.items() if child is not None]
        for at, (_, child) in enumerate(children):
            if _fused_class(child) is not None:
                yield child, children[at + 1 :]


def _absorbable(head: Module, following: Children, uses: Counter[int]) -> tuple[Children, str]:
    """What ``head`` can take over of the modules that follow it, and what keeps the next candidate out."""
    stages = ["activation", "dropout"]
    for part in _absorbed(head):
        stages = stages[stages.index(_kind(_origin(part))) + 1 :]
        following = following[1:]
    taken: Children = []
    why = ""
    for name, part in following:
        kind = _kind(type(part))
        if kind in stages:
            stages = stages[stages.index(kind) + 1 :]
            why = _part_obstacle(head, part, kind, uses)
        elif stages and not kind:
            why = _unknown_part(part)
        else:
            break
        if why:
            why = f"{name!r} ({type(part).__name__}) {why}"
            break
        if not kind:
            break
        taken.append((name, part))
    if (taken or why) and not _absorbed(head) and (obstacle := _head_obstacle(head, uses)):
        return [], obstacle
    return taken, why


def _head_obstacle(head: Module, uses: Counter[int]) -> str:
    if uses[id(head)] > 1:
        return "is used elsewhere too"
    if "forward" in vars(head):
        return "has a forward of its own"
    if any(getattr(head, hooks) for hooks in _HOOKS):
        return "has hooks"
    taken = [name for name in ("activation", "activation_parameters", "dropout") if hasattr(head, name)]
    return f"has an attribute {taken[0]!r} of its own" if taken else ""


def _part_obstacle(head: Module, part: Module, kind: str, uses: Counter[int]) -> str:
    if uses[id(part)] > 1:
        return "is used elsewhere too"
    if "forward" in vars(part):
        return "has a forward of its own"
    if part._forward_pre_hooks or any(getattr(part, hooks) for hooks in _HOOKS):
        return "has hooks"
    if kind == "dropout":
        if part.training != head.training:
            return f"has training={part.training}, the layer before it training={head.training}"
        return "" if isinstance(part.p, (int, float)) and 0 <= part.p <= 1 else f"has p={part.p}"
    key, parameters = _activation(part)
    if key == "softplus":
        return "is computed in float32 by autocast, the fused layer would not be"
    return "" if all(isinstance(p, (int, float)) for p in parameters.values()) else "has a parameter that is no number"


def _unknown_part(part: Module) -> str:
    if type(part) in _OURS.values() or type(part) is torch.nn.MultiheadAttention:
        return ""
    if any(_kind(cls) for cls in type(part).__mro__):
        return "is a subclass"
    return "is not in the activation table" if type(part).__module__ == "torch.nn.modules.activation" else ""


def _irreversible(module: Module, inside: set[int], absorbed: set[int]) -> str:
    now = type(module)
    if now not in {*COUNTERPARTS.values(), *_FUSED.values(), torch.nn.Identity}:
        return f"expected a class that convert made, got {now.__name__}; undo what was done to it since"
    if now is torch.nn.Identity and id(module) not in absorbed:
        return f"was a {_origin(module).__name__}, and the fused layer that absorbed it is not in the model"
    parts = _absorbed(module)
    missing = [_origin(part).__name__ for part in parts if id(part) not in inside]
    if missing:
        return f"is a fused layer, and what it absorbed ({', '.join(missing)}) is not in the model"
    has_dropout = any(_kind(_origin(part)) == "dropout" for part in parts)
    for name, value in _fused_attributes(now, parts).items() if parts else ():
        if vars(module).get(name) != value and not (name == "dropout" and has_dropout):
            return f"{name!r} was changed since convert, from {value!r} to {vars(module).get(name)!r}"
    return ""


def _shown(path: str) -> str:
    return repr(path) if path else "the model"
