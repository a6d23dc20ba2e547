"""What a computation keeps for backward, and what it allocates at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(run: Callable[[], Tensor], outside: Iterable[Tensor]) -> int:
    """Bytes that ``run`` keeps for backward, beyond its result and the storages of ``outside``: inputs and parameters,
    which somebody else keeps anyway."""
    storages: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used again

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    for t in (*outside, y):
        storages.pop(t.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most that ``run`` has allocated at one time, beyond what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    results = profile.kineto_results
    assert results is not None
    allocated = peak = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak
