"""The kernels of a whole MLP, at the widths that its matrices are padded to."""

from __future__ import annotations

from typing import Any

from bp_torch.triton_kernels import mlp as kernels

from . import Target, target

__all__ = ["TARGETS"]


def mlp(kernel: Any, name: str, key: str, size: int, float32: bool = False, **constants: Any) -> Target:
    pointers = [n for n in kernel.arg_names if (n.isupper() and n not in constants and len(n) > 1) or n in "XSY"]
    types = {n: "*{dtype}" for n in pointers if n not in ("M", "I", "H", "O")} | {"PARTIAL": "*fp32"}
    types |= dict.fromkeys(("M", "I", "H", "O", "layers", "steps", "parameters"), "i32") | {"a": "fp32", "b": "fp32"}
    constants |= {"KEY": key, "PRECISION": "ieee", "BLOCK": kernels.ROWS}
    constants |= {"SIZE_I": size, "SIZE_H": size, "SIZE_O": size}
    backward = kernel is kernels._backward
    more: dict[str, Any] = {"dtypes": ("fp32",) if float32 else ("bf16", "fp16")}
    if backward and size > 32:
        more["chips"] = ("sm_80", "sm_90", "sm_100")
    return target(
        f"mlp.{name} {key} {size}",
        kernel,
        {n: t for n, t in types.items() if n in kernel.arg_names and n not in constants},
        constants,
        kernels._block(size, backward=backward, float32=float32).warps,
        wide=False,
        **more,
    )


TARGETS = [
    mlp(kernels._forward, "forward float32", "relu", 32, True, HAS_BIAS=True, STORE="a"),
    mlp(kernels._backward, "backward float32", "relu", 32, True, OUTPUT=True),
    *(mlp(kernels._forward, "forward", "relu", n, HAS_BIAS=True, STORE="a") for n in (32, 64)),
    mlp(kernels._forward, "forward", "gelu", 64, HAS_BIAS=True, STORE="z"),
    *(mlp(kernels._backward, "backward", "relu", n, OUTPUT=True) for n in (32, 64)),
    mlp(kernels._backward, "backward", "gelu", 64, OUTPUT=False),
]
