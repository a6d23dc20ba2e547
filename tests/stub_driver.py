"""A Triton driver without a GPU: the real JIT specializes and compiles every launch for sm_90, and launches nothing.

It shows what neither the interpreter nor ahead-of-time compilation can: what is wrong with the arguments of a launch,
such as a size of 1, which the JIT makes a constant, or a global constant that it finds changed. Outputs stay as they
were allocated, so that exceptions and compilations alone mean anything.

:func:`install` comes before the first kernel, in a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

LAUNCHED: dict[str, int] = {}
"""Launches by kernel."""
COMPILED: dict[str, int] = {}
"""Compilations by kernel."""


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, 32, 0, 0, 1024  # handle, registers, spills, and the most threads


class _Driver:
    """What Triton asks of a driver, for one H100 that is not there."""

    utils = _Utils()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        name = f"{src.fn.fn.__module__}.{src.fn.fn.__name__}"

        def launch(*args: Any) -> None:
            LAUNCHED[name] = LAUNCHED.get(name, 0) + 1

        return launch


def _up_to(stage: str) -> None:
    """Compile no further than to this stage ("ttir", "ttgir", ...); "cubin" is all of it."""
    add_stages = CUDABackend.add_stages

    def fewer(self: CUDABackend, stages: dict[str, Any], options: Any, language: Any) -> None:
        add_stages(self, stages, options, language)
        names = list(stages)
        for name in names[names.index(stage) + 1 :]:
            del stages[name]
        if stage != "cubin":
            # What the last stages would have found out of a kernel.
            found = {"shared": 0, "tmem_size": 0, "name": "kernel", "global_scratch_size": 0, "profile_scratch_size": 0}
            found |= {"global_scratch_align": 1, "profile_scratch_align": 1}
            stages["cubin"] = lambda src, metadata: metadata.update({**found, **metadata}) or b""

    CUDABackend.add_stages = fewer


def install(stage: str, cache: str) -> None:
    """From now on the kernels take CPU tensors as they would take those of a GPU. ``cache``: a folder for Triton."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter would run the kernels"
    os.environ["TRITON_CACHE_DIR"] = cache
    triton.runtime.driver.set_active(_Driver())
    _up_to(stage)
    compile_one = JITFunction._do_compile

    def counted(self: JITFunction, *args: Any, **options: Any) -> Any:
        name = f"{self.fn.__module__}.{self.fn.__name__}"
        COMPILED[name] = COMPILED.get(name, 0) + 1
        return compile_one(self, *args, **options)

    JITFunction._do_compile = counted
    kernels().INTERPRETED = True  # what lets CPU tensors through
    _draw_masks()
    if stage == "cubin":
        _try_every_block()


def kernels() -> Any:
    return importlib.import_module("bp_torch.triton_kernels")


def _draw_masks() -> None:
    """A mask that is written out by no kernel has values all the same."""
    dropout = kernels().dropout
    launch = dropout.mask

    def mask(seed: torch.Tensor, shape: tuple[int, ...], p: float) -> torch.Tensor:
        launch(seed, shape, p)
        return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32) >= p

    dropout.mask = mask


def _try_every_block() -> None:
    """Launch each block that autotuning would time, where this chip has the room for it."""
    tuning = kernels().launch.tuning

    def best(key: str, blocks: Sequence[Any], device: torch.device, launch: Callable[[Any], object]) -> Any:
        for block in blocks[1:]:
            with contextlib.suppress(OutOfResources):
                launch(block)
        return blocks[0]

    tuning.ENABLED, tuning.best = True, best


@contextlib.contextmanager
def wide() -> Iterator[None]:
    """Every tensor counts as one of more than 2³¹ elements."""
    users = [module for module in vars(kernels()).values() if hasattr(module, "is_wide")]
    before = kernels().launch.is_wide
    try:
        for module in users:
            module.is_wide = lambda *tensors: True
        yield
    finally:
        for module in users:
            module.is_wide = before
