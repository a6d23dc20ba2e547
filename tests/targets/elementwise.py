"""Every elementwise kernel with its main options, and every activation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bp_torch.triton_kernels import activation
from bp_torch.triton_kernels import elementwise as kernels

from . import Target, target

__all__ = ["TARGETS"]

NUMBERS = {"n": "i32", "a": "fp32", "b": "fp32", "scale": "fp32", "channels": "i32", "points": "i32"}
NOTHING: dict[str, Any] = {"THRESHOLD": 0, "BITS": 0}
DROP_16: dict[str, Any] = {"THRESHOLD": 2**15, "BITS": 16}
DROP_32: dict[str, Any] = {"THRESHOLD": 2**31, "BITS": 32}
FLAT: dict[str, Any] = {"LAST": False, "BLOCK": 1024, "WIDE": False}


def given(name: str, kernel: Any, types: dict[str, str], absent: tuple[str, ...], constants: dict[str, Any]) -> Target:
    """``absent``: the pointers that are None."""
    types = {name: kind for name, kind in types.items() if name not in absent}
    return target(f"elementwise.{name}", kernel, types, {**constants, **dict.fromkeys(absent)})


def tensors(*names: str) -> dict[str, str]:
    return {**dict.fromkeys(names, "*{dtype}"), "SEED": "*i64", **NUMBERS}


def forward(name: str, key: str, absent: tuple[str, ...] = (), **constants: Any) -> Target:
    types = {**tensors("X", "BIAS", "R", "Y", "S"), "columns": "i32"}
    options: dict[str, Any] = {"HAS_BIAS": "BIAS" not in absent, "HAS_R": "R" not in absent, "ACT_LAST": False}
    options |= {"KEY": key, "STORE_S": "S" not in absent, **FLAT, **constants}
    return given(f"forward {name}", kernels._forward, types, absent, options)


def backward(name: str, key: str, absent: tuple[str, ...] = (), **constants: Any) -> Target:
    options = {"KEY": key, "OUTPUT": key == "relu", "ACT_LAST": "DR" not in absent, **FLAT, **constants}
    return given(f"backward {name}", kernels._backward, tensors("DY", "S", "DX", "DR"), absent, options)


def bias(name: str, key: str, absent: tuple[str, ...] = (), **constants: Any) -> Target:
    types = {**tensors("DY", "S", "DZ"), "PARTIAL": "*fp32", "rows": "i32", "columns": "i32"}
    options = {"KEY": key, "OUTPUT": key == "relu", "BLOCK_ROWS": 16, "BLOCK_COLUMNS": 64, "STEPS": 16, "WIDE": False}
    return given(f"backward_bias {name}", kernels._backward_bias, types, absent, {**options, **constants})


def second(name: str, key: str, absent: tuple[str, ...] = (), **constants: Any) -> Target:
    options = {"KEY": key, "OUTPUT": False, **FLAT, **constants}
    types = tensors("G", "DY", "S", "DDY", "DS")
    return given(f"second {name}", kernels._second, types, absent, options)


def of_activations() -> Iterator[Target]:
    """Inside, every dtype is float32: one is enough to compile each activation."""
    for key in activation.KEYS:
        yield forward(key, key, ("BIAS", "R", "S", "SEED"), **NOTHING) | {"dtypes": ("bf16",)}
        yield second(key, key, ("SEED",), **NOTHING) | {"dtypes": ("bf16",)}


TARGETS = [
    forward("relu", "relu", ("BIAS", "R", "S", "SEED"), **NOTHING),
    forward("relu dropout", "relu", ("BIAS", "R", "S"), **DROP_16),
    forward("bias gelu dropout residual, keeping a", "gelu", **DROP_16),
    forward("residual relu, dropout of 32 bits", "relu", ("BIAS", "S"), ACT_LAST=True, **DROP_32),
    forward("relu dropout, channels last", "relu", ("BIAS", "R", "S"), **DROP_16, LAST=True),
    forward("relu dropout, over 2³¹ elements", "relu", ("BIAS", "R", "S"), **DROP_16, WIDE=True),
    backward("relu", "relu", ("DR", "SEED"), **NOTHING),
    backward("gelu dropout", "gelu", ("DR",), **DROP_16),
    backward("residual relu, dropout of 32 bits", "relu", **DROP_32),
    backward("relu dropout, channels last", "relu", ("DR",), **DROP_16, LAST=True),
    backward("relu dropout, over 2³¹ elements", "relu", ("DR",), **DROP_16, WIDE=True),
    bias("relu", "relu", ("SEED",), **NOTHING),
    bias("gelu dropout", "gelu", **DROP_16),
    bias("relu dropout, over 2³¹ elements", "relu", **DROP_16, WIDE=True),
    second("gelu dropout", "gelu", **DROP_16),
    *of_activations(),
]
