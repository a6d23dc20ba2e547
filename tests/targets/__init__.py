"""What is compiled ahead of time: every kernel with its main options, in ``TARGETS`` of one file a layer.

compile_targets.py compiles them for every chip; test_launches.py holds them to what the layers launch.
"""

from __future__ import annotations

from typing import Any

__all__ = ["Target", "target"]

Target = dict[str, Any]


def target(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], num_warps: int = 4, wide: bool = True,
    **more: Any,
) -> Target:  # fmt: skip
    """One kernel with one set of options.

    Args:
        types: of the arguments, by name; ``{dtype}`` stands for each of three.
        constants: the arguments that are compile-time constants; None for a pointer that is absent.
        num_warps: of 32 threads.
        wide: whether global memory has to be accessed 16 bytes at a time.
        more: ``dtypes`` to put for ``{dtype}``, ``chips`` that the kernel is used on, ``options`` of the compiler.
    """
    return {
        "name": name, "kernel": kernel, "types": types, "constants": constants, "num_warps": num_warps,
        "wide_accesses": wide, **more,
    }  # fmt: skip
