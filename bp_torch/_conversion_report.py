"""What conversion did to a model, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import Module
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from . import conversion, fusion

__all__ = ["ConversionReport", "ConversionRow", "conversion_report"]

_CONTAINERS = (
    torch.nn.Sequential,
    torch.nn.ModuleList,
    torch.nn.ModuleDict,
    torch.nn.ParameterList,
    torch.nn.ParameterDict,
)


@dataclass(frozen=True)
class ConversionRow:
    """One module: its path, its class, ``replaced`` (its forward), ``fused`` or ``left``, and why or with what."""

    path: str
    module: str
    status: str
    why: str


@dataclass(frozen=True, repr=False)
class ConversionReport:
    """The rows of :func:`conversion_report`; prints as a table."""

    rows: tuple[ConversionRow, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ConversionRow]:
        return iter(self.rows)

    def __getitem__(self, path: str) -> ConversionRow:
        """The row of the module at ``path``."""
        for row in self.rows:
            if row.path == path:
                return row
        raise KeyError(path)

    def count(self, status: str) -> int:
        """How many modules were ``replaced``, ``fused`` or ``left``."""
        return sum(row.status == status for row in self.rows)

    def __str__(self) -> str:
        head = ("path", "module", "status", "why")
        table = [head, *((r.path or "(model)", r.module, r.status, r.why) for r in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        cells = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in table]
        lines = ["  ".join(row).rstrip() for row in cells]
        counts = ", ".join(f"{self.count(status)} {status}" for status in ("replaced", "fused", "left"))
        return "\n".join([*lines, counts])

    __repr__ = __str__


def conversion_report(model: Module) -> ConversionReport:
    """What :func:`convert` did to ``model``, module by module, read from the model as it is now.

    ``replaced``: it computes as its counterpart in bp_torch.nn does; ``fused``: with what comes before or after it;
    ``left``: as torch's. A row for each module that has a counterpart, is a subclass of one, or has parameters or no
    children. Containers have none. A module that is used at several places has a row for each.

    Raises:
        TypeError: ``model`` is not a Module.
    """
    conversion._check_module("conversion_report", model)
    fused, unfused = _fusions(model)
    rows = []
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _CONTAINERS) or "parametrizations" in path.split("."):
            continue
        name = type(module).__name__
        if path in fused:
            why = "; ".join(filter(None, (fused[path], unfused.get(path, ""))))
            rows.append(ConversionRow(path, name, "fused", why))
        elif fusion.FORWARD in vars(module):
            rows.append(ConversionRow(path, name, "replaced", unfused.get(path, "")))
        elif _base(module) or _is_ours(module) or module._parameters or not module._modules:
            rows.append(ConversionRow(path, name, "left", _why_left(module)))
    return ConversionReport(tuple(rows))


def _fusions(model: Module) -> tuple[dict[str, str], dict[str, str]]:
    """By path: what each module is fused with or into, and why a layer is not fused with what follows it."""
    fused: dict[str, str] = {}
    unfused: dict[str, str] = {}
    for path, parent in model.named_modules(remove_duplicate=False):
        placed = [(f"{path}.{name}" if path else name, child) for name, child in parent._modules.items() if child]
        paths, children = [where for where, _ in placed], [child for _, child in placed]
        forward = vars(parent).get("forward")
        runs = forward is not None and forward is vars(parent).get(fusion.FORWARD)
        for at, child in enumerate(children):
            if type(child) not in fusion.HEADS:
                continue
            if not fusion.is_sequential(parent) or (forward is not None and not runs):
                where = f"{repr(path) if path else 'the model'} ({type(parent).__name__})"
                unfused[paths[at]] = f"not fused: called by the code of {where}, only Sequential is fused"
                continue
            *parts, obstacle = fusion.following(children, at)
            end = at + 1 + sum(part is not None for part in parts)
            if obstacle is None and end < len(children) and parts[1] is None and (why := _unknown_part(children[end])):
                obstacle = children[end], why
            if obstacle is not None:
                blamed = "" if obstacle[0] is child else f"{paths[end]!r} ({type(obstacle[0]).__name__}) "
                unfused[paths[at]] = f"not fused: {blamed}{obstacle[1]}"
            named = ", ".join(f"{paths[i]!r} ({type(children[i]).__name__})" for i in range(at + 1, end))
            if named and runs:
                fused[paths[at]] = f"with {named}"
                fused |= {paths[i]: f"into {paths[at]!r} ({type(child).__name__})" for i in range(at + 1, end)}
            elif named:
                unfused[paths[at]] = f"could be fused with {named}"
    return fused, unfused


def _unknown_part(part: Module) -> str:
    """Why what might be an activation or a dropout cannot be computed with the layer before it."""
    if type(part) in fusion.PARTS or _is_ours(part) or isinstance(part, torch.nn.MultiheadAttention):
        return ""
    if any(cls in fusion.PARTS for cls in type(part).__mro__):
        return "is a subclass"
    return "is not in the activation table" if type(part).__module__ == "torch.nn.modules.activation" else ""


def _base(module: Module) -> type[Module] | None:
    """The class with a counterpart that the module is an instance of."""
    return next((cls for cls in type(module).__mro__ if cls in conversion.COUNTERPARTS), None)


def _is_ours(module: Module) -> bool:
    return type(module) in conversion._OURS.values()


def _why_left(module: Module) -> str:
    base = _base(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript"
    if _is_ours(module):
        return "is bp_torch's own"
    if base is None:
        return f"no Function for {type(module).__name__}"
    if type(module) is base:
        return "has a forward of its own" if "forward" in vars(module) else "not converted yet"
    if isinstance(module, LazyModuleMixin):
        return "lazy: convert after its first forward"
    if parametrize.is_parametrized(module):
        return "parametrized: only exact types are converted"
    return f"subclass of {base.__name__}: only exact types are converted"
