"""How things are timed: providers in turns, in one process, with a cold L2 cache, as medians with quartiles."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Run = Callable[[], object]

LEAST = 7
"""Rounds that are timed however long they take, unless fewer were asked for."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call."""

    median: float
    low: float
    """The first quartile."""
    high: float
    """The third quartile."""
    samples: int


def in_turns(runs: dict[str, Run], device: str, repeats: int, seconds: float = math.inf) -> dict[str, Times]:
    """Time of each run; every round times each of them once, so that what disturbs one disturbs all.

    There are ``repeats`` rounds, or as many as start within ``seconds``, but at least LEAST. On CUDA they are timed by
    events, with L2 overwritten before each call; on the CPU by the wall clock, over as many calls as make half a
    millisecond.
    """
    calls = {name: 1 if device == "cuda" else _calls(run) for name, run in runs.items()}
    flush = _cache_flush(device)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for index in range(repeats):
        if index >= LEAST and time.perf_counter() - start > seconds:
            break
        for name, run in runs.items():
            flush()
            samples[name].append(_cuda_time(run) if device == "cuda" else _wall_time(run, calls[name]))
    return {name: summary(values) for name, values in samples.items()}


def in_graphs(runs: dict[str, Run], repeats: int, seconds: float = math.inf) -> dict[str, Times | None]:
    """The same for CUDA graphs of the runs, which leave out the launches; None for what cannot be captured."""
    graphs: dict[str, Run] = {}
    for name, run in runs.items():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError:  # such as what makes CUDA graphs itself
            torch.cuda.synchronize()
            continue
        graphs[name] = graph.replay
    found = in_turns(graphs, "cuda", repeats, seconds)
    return {name: found.get(name) for name in runs}


def wall_time(run: Run, calls: int = 20) -> float:
    """Milliseconds of one of several queued calls, launches and waiting included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls * 1e3


class Others:
    """How many CPUs other processes kept busy since this was made."""

    def __init__(self) -> None:
        self.start = self._now()

    def cpus(self) -> float | None:
        """None where the system does not tell."""
        if self.start is None or (now := self._now()) is None:
            return None
        wall, busy, own = (after - before for after, before in zip(now, self.start, strict=True))
        return max(0.0, busy - own) / wall if wall else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds: of the clock, of all processes on all CPUs, of this process and its children."""
        try:
            fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _, _, interrupts, soft, stolen = (int(field) for field in fields)
        busy = (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, sum(os.times()[:4])


def summary(samples: list[float]) -> Times:
    if len(samples) < 2:
        return Times(samples[0], samples[0], samples[0], len(samples))
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Times(median, low, high, len(samples))


def _calls(run: Run) -> int:
    run()
    return max(1, round(0.5 / max(min(_wall_time(run, 1) for _ in range(3)), 1e-3)))


def _wall_time(run: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls * 1e3


def _cuda_time(run: Run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _cache_flush(device: str) -> Run:
    """Overwrites twice what L2 holds. On the CPU nothing: there a layer's input usually is in the cache."""
    if device != "cuda":
        return lambda: None
    size = max(2 * torch.cuda.get_device_properties(0).L2_cache_size, 2**26)
    buffer = torch.empty(size, dtype=torch.int8, device="cuda")
    return buffer.zero_
