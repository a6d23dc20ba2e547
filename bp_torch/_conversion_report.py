"""What conversion did to a model, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import Module
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from . import conversion as c

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
    """One module: its path, its class before and now, ``replaced``, ``fused`` or ``left``, and why or with what."""

    path: str
    original: str
    now: str
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
        head = ("module", "was", "is", "status", "why")
        table = [head, *((r.path or "(model)", r.original, r.now, r.status, r.why) for r in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        cells = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in table]
        lines = ["  ".join(row).rstrip() for row in cells]
        counts = ", ".join(f"{self.count(status)} {status}" for status in ("replaced", "fused", "left"))
        return "\n".join([*lines, counts])

    __repr__ = __str__


def conversion_report(model: Module) -> ConversionReport:
    """What :func:`convert` did to ``model``, module by module, read from the model as it is now.

    A row for each module that has a counterpart, is a subclass of one, or has parameters or no children. Containers
    have none. A module that is used at several places has a row for each.

    Raises:
        TypeError: ``model`` is not a Module.
    """
    c._check_module("conversion_report", model)
    paths = {id(module): path for path, module in model.named_modules()}
    into = {id(part): head for head in model.modules() for part in c._absorbed(head)}
    unfused = _why_not_fused(model, paths)
    rows = []
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _CONTAINERS) or "parametrizations" in path.split("."):
            continue
        now = type(module).__name__
        if c._FROM in vars(module):
            status, why = "replaced", unfused.get(id(module), "")
            if id(module) in into:
                status, why = "fused", f"into {_named(paths, into[id(module)])}"
            elif c._absorbed(module):
                parts = ", ".join(_named(paths, part) for part in c._absorbed(module))
                status, why = "fused", f"with {parts}" + (f"; {why}" if why else "")
            rows.append(ConversionRow(path, c._origin(module).__name__, now, status, why))
        elif _base(module) or type(module) in c._OURS.values() or module._parameters or not module._modules:
            rows.append(ConversionRow(path, now, now, "left", _why_left(module)))
    return ConversionReport(tuple(rows))


def _why_not_fused(model: Module, paths: dict[int, str]) -> dict[int, str]:
    """Why each Linear and batch norm is not fused with what follows, by id; nothing where nothing follows."""
    uses, why = c._uses(model), {}
    for parent in model.modules():
        in_sequential = [head for head, _ in c._heads(parent)]
        for child in parent._modules.values():
            if child is not None and c._fused_class(child) is not None and child not in in_sequential:
                why[id(child)] = f"not fused: called by the code of {_named(paths, parent)}, only Sequential is fused"
    for parent in model.modules():
        for head, following in c._heads(parent):
            taken, obstacle = c._absorbable(head, following, uses)
            if obstacle:
                why[id(head)] = f"not fused: {obstacle}"
            elif taken:
                names = ", ".join(f"{name!r} ({type(part).__name__})" for name, part in taken)
                why[id(head)] = ("after revert, " if c._absorbed(head) else "") + f"could be fused with {names}"
    return why


def _base(module: Module) -> type[Module] | None:
    """The class with a counterpart that the module is an instance of."""
    return next((cls for cls in type(module).__mro__ if cls in c.COUNTERPARTS), None)


def _why_left(module: Module) -> str:
    base = _base(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript"
    if type(module) in c._OURS.values():
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


def _named(paths: dict[int, str], module: Module) -> str:
    path = paths.get(id(module))
    return f"{'what is no longer in the model' if path is None else c._shown(path)} ({c._origin(module).__name__})"
