"""Every kernel of batch norm, of both kinds of matrices, with its main options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bp_torch.triton_kernels import batch_norm as kernels

from . import Target, target

__all__ = ["TARGETS"]

TYPES = {
    **dict.fromkeys(("X", "R", "Y", "S", "DY", "DX", "DR"), "*{dtype}"),
    **dict.fromkeys(("GAMMA", "BETA", "MEAN", "REST", "VAR", "PARTIAL", "COEFFICIENTS"), "*fp32"),
    **dict.fromkeys(("DGAMMA", "DBETA", "DMEAN", "DVAR"), "*fp32"),
    **dict.fromkeys(("eps", "n", "a", "b"), "fp32"),
    **dict.fromkeys(("rows", "columns", "channels", "across", "groups", "steps", "tiles", "splits"), "i32"),
}


def blocks_of(planes: bool, wide: bool = False) -> dict[str, Any]:
    columns = (kernels.BY_PLANES if planes else kernels.BY_ROWS).columns
    return {"PLANES": planes, "BLOCK_ROWS": kernels.TILE // columns, "BLOCK_COLUMNS": columns, "WIDE": wide}


KINDS = {"rows": blocks_of(False), "planes": blocks_of(True), "planes, over 2³¹ elements": blocks_of(True, True)}
SPLITS = {"BLOCK_SPLITS": kernels.SPLITS_AT_ONCE, "BLOCK_COLUMNS": kernels.CHANNELS_AT_ONCE}


def given(name: str, kernel: Any, absent: str = "", wide: bool = True, **constants: Any) -> Target:
    """``absent``: the pointers that are None."""
    constants |= dict.fromkeys(absent.split())
    types = {name: TYPES[name] for name in kernel.arg_names if name not in constants}
    return target(f"batch_norm.{name}", kernel, types, constants, wide=wide)


def of_matrices(kind: str, blocks: dict[str, Any]) -> Iterator[Target]:
    relu = {"KEY": "relu", "OUTPUT": True, **blocks}
    gelu = {"KEY": "gelu", "OUTPUT": False, **blocks}
    identity = {"KEY": "identity", "OUTPUT": False, **blocks}
    yield given(f"statistics, {kind}", kernels._statistics, **blocks)
    yield given(f"apply relu, {kind}", kernels._apply, "R", KEY="relu", **blocks)
    yield given(f"apply gelu residual, {kind}", kernels._apply, KEY="gelu", **blocks)
    yield given(f"forward_whole relu residual, {kind}", kernels._forward_whole, KEY="relu", **blocks)
    yield given(f"reduce relu, {kind}", kernels._reduce, "R S DX DR", **relu)
    yield given(f"reduce relu residual, {kind}", kernels._reduce, "R DX", **relu)
    yield given(f"reduce gelu residual, statistics given, {kind}", kernels._reduce, "S", **gelu)
    yield given(f"backward_apply relu, {kind}", kernels._backward_apply, "R S DR", **relu)
    yield given(f"backward_apply identity, {kind}", kernels._backward_apply, "BETA R S DR", **identity)
    yield given(f"backward_apply gelu residual, {kind}", kernels._backward_apply, "S", **gelu)
    yield given(f"backward_whole relu, {kind}", kernels._backward_whole, "R S DR DMEAN DVAR", **relu)
    yield given(f"backward_whole gelu residual, {kind}", kernels._backward_whole, "S", **gelu)


TARGETS = [
    *(made for kind, blocks in KINDS.items() for made in of_matrices(kind, blocks)),
    given("merge", kernels._merge, "REST", wide=False, **SPLITS),
    given("merge, exact mean", kernels._merge, wide=False, **SPLITS),
    given("finish", kernels._finish, "DMEAN DVAR", wide=False, GIVEN=False, **SPLITS),
    given("finish, statistics given", kernels._finish, "COEFFICIENTS", wide=False, GIVEN=True, **SPLITS),
]
