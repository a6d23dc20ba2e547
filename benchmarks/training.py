"""A model's training by torch and by bp_torch, and whether both compute the same."""

from __future__ import annotations

import copy
import inspect
import math
import statistics
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

import bp_torch

from . import memory
from .models import Model
from .providers import Candidate, Run, compiled, inexact, moved

BATCHES = 3
"""Batches that must show a fault."""
DRAWS = 16
"""Losses with dropout that are drawn of both, to compare their means."""

WITH_DROPOUT = ("batch_norm_act", "dense", "dropout", "dropout_add", "residual")
"""The functions whose masks are checked: what a converted model drops out by."""


class Training:
    """One model's weights and batch on the device. Each provider trains a copy."""

    kind = "model"

    def __init__(self, model: Model, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model, self.device, self.dtype = model, device, dtype
        self.lower = model.autocast and dtype != torch.float32
        self.initial = model.build(model.p).to(device)
        self.without_dropout = model.build(0.0).to(device)
        self.without_dropout.load_state_dict(self.initial.state_dict())
        if model.channels_last:
            # torch's stub of Module.to knows no memory format.
            for module in (self.initial, self.without_dropout):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.batch = self.drawn(0)

    def drawn(self, seed: int) -> tuple[Tensor, ...]:
        """A batch on the device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            batch = tuple(moved(t, self.device, torch.float32) for t in self.model.batch())
        if self.model.channels_last:
            return batch[0].to(memory_format=torch.channels_last), *batch[1:]
        return batch

    @property
    def title(self) -> str:
        return self.model.title

    @property
    def precision(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"autocast {name}" if self.lower else "float32"

    def floors(self) -> dict[str, dict[str, int]]:
        return {}

    def ceilings(self) -> dict[str, Run]:
        return {}

    def prepared(self, name: str, module: Module) -> tuple[Module, Callable[..., Tensor]]:
        """A provider's copy of ``module``, and its loss as a function of the batch."""
        net = copy.deepcopy(module)
        functional: ModuleType = F
        if name == "bp_torch":
            net, functional = bp_torch.convert(net), bp_torch.functional

        def loss(*batch: Tensor) -> Tensor:
            if not self.lower:
                return self.model.loss(net, functional, *batch)
            with torch.autocast(self.device, self.dtype):
                return self.model.loss(net, functional, *batch)

        return net, loss if name in ("bp_torch", "torch") else compiled(loss, name)

    def candidate(self, name: str) -> Candidate:
        net, loss = self.prepared(name, self.initial)
        parameters = list(net.parameters())
        optimizer = self.model.optimizer(parameters)

        def forward() -> Tensor:
            return loss(*self.batch)

        def step() -> None:
            optimizer.zero_grad()
            forward().backward()
            optimizer.step()

        outside = [*parameters, *net.buffers(), *self.batch]

        def facts() -> dict[str, float]:
            if not self.model.hidden or name not in ("bp_torch", "torch"):
                return {}
            saved = memory.saved_bytes(lambda: net(self.batch[0]), outside)
            return {"saved_per_hidden": saved / self.model.hidden}

        return Candidate(
            {"forward": forward, "both": lambda: torch.autograd.grad(forward(), parameters), "step": step},
            partial(self.fault, name, net, loss),
            lambda: memory.saved_bytes(forward, outside),
            facts,
        )

    def fault(self, name: str, net: Module, loss: Callable[..., Tensor], times: float = 2) -> str:
        """What is wrong with the provider's training, or "".

        Without dropout, the loss, all gradients and the buffers (running statistics) after one step forward and
        backward: error against float64 at most ``times`` that of torch. The error of the loss, one number, and of small
        gradients is a matter of luck, so torch's is taken as no smaller than in all its gradients together, relatively.
        A fault is what each of several batches shows: where a rounding has moved a single number over relu's kink, the
        gradient differs by more than roundings, with one batch in some; a wrong formula is wrong with all.

        With dropout: the mean loss, and what :func:`dropout_fault` finds.
        """
        for seed in range(BATCHES):
            problem = self.inexact(name, times, self.drawn(seed))
            if not problem:
                break
        if problem:
            return problem
        if self.model.p == 0 or name == "torch":
            return ""
        with torch.no_grad():
            _, reference = self.prepared("torch", self.initial)
            losses = [[f(*self.batch).item() for _ in range(DRAWS)] for f in (loss, reference)]
        difference = statistics.mean(losses[0]) - statistics.mean(losses[1])
        spread = math.sqrt(sum(statistics.variance(values) for values in losses) / DRAWS)
        if not abs(difference) <= 6 * spread:
            return f"the mean loss with dropout is off by {difference:.3g}, allowed 6 x {spread:.3g}"
        return dropout_fault(self.model.p, lambda: loss(*self.batch)) if name == "bp_torch" else ""

    def inexact(self, name: str, times: float, batch: tuple[Tensor, ...]) -> str:
        """What is less exact than allowed, without dropout; or ""."""
        exact = self.results("torch", torch.float64, batch)
        theirs, found = self.results("torch", None, batch), self.results(name, None, batch)
        gradients = [what for what in exact if what.startswith("the gradient")]
        size = math.hypot(*(exact[what].norm().item() for what in gradients))
        relative = math.hypot(*((theirs[what].double() - exact[what]).norm().item() for what in gradients)) / size
        for what, right in exact.items():
            norm = right.norm().item()
            scale = size if what in gradients else norm
            if problem := inexact(what, found[what], theirs[what], right, times, scale, relative * norm):
                return problem
        return ""

    def results(self, name: str, dtype: torch.dtype | None, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Loss, gradients and buffers without dropout; with ``dtype``, all in that dtype and without autocast."""
        if dtype is None:
            net, loss = self.prepared(name, self.without_dropout)
            y = loss(*batch)
        else:
            net = copy.deepcopy(self.without_dropout).to(dtype)
            y = self.model.loss(net, F, *(moved(t, self.device, dtype) for t in batch))
        names, parameters = zip(*net.named_parameters(), strict=True)
        grads = torch.autograd.grad(y, parameters)
        found = {"the loss": y} | {f"the gradient of {n}": g for n, g in zip(names, grads, strict=True)}
        found |= {f"the buffer {n}": b for n, b in net.named_buffers() if b.is_floating_point()}
        return {what: t.detach().clone() for what, t in found.items()}


def dropout_fault(p: float, run: Callable[[], object]) -> str:
    """What is wrong with the masks of a converted model, whose dropout should have probability p, in one run; or "".

    Each function that drops out also computes its result without dropout; the share of the nonzero elements that
    dropout kept must be 1 - p within six standard deviations, and what was kept must be 1 / (1 - p) times as large.
    """
    faults: list[str] = []
    checked: list[str] = []

    def watched(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        signature = inspect.signature(function)

        def call(*args: Any, **kwargs: Any) -> Tensor:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            drops = given.arguments.get("dropout_training")
            if not (given.arguments["training"] if drops is None else drops) or given.arguments["p"] == 0:
                return function(*args, **kwargs)
            without = given.arguments | {"p": 0.0}
            for statistic in ("running_mean", "running_var"):  # moved once, by the call that counts
                if without.get(statistic) is not None:
                    without[statistic] = without[statistic].clone()
            base, y = function(**without), function(*args, **kwargs)
            checked.append(name)
            there = base != 0
            kept = y != 0
            share = kept[there].double().mean().item()
            spread = math.sqrt(p * (1 - p) / max(1, int(there.sum())))
            if not abs(share - (1 - p)) <= 6 * spread:
                faults.append(f"dropout in {name} kept {share:.4f}, expected {1 - p:.4f}, allowed 6 x {spread:.3g}")
            error = (y[kept].double() * (1 - p) - base[kept].double()).norm().item()
            # A rounding of y, and one of the scale, which some implementations quantize to 16 bits.
            allowed = 2 * torch.finfo(y.dtype).eps * base.double().norm().item()
            if not error <= allowed:
                faults.append(f"dropout in {name}: what was kept is off by {error:.3g}, allowed {allowed:.3g}")
            return y

        return call

    originals = {name: getattr(bp_torch.functional, name) for name in WITH_DROPOUT}
    try:
        for name, function in originals.items():
            setattr(bp_torch.functional, name, watched(name, function))
        with torch.no_grad():
            run()
    finally:
        for name, function in originals.items():
            setattr(bp_torch.functional, name, function)
    return faults[0] if faults else "" if checked else "nothing in the converted model drops out"
