"""What is let through to be timed, and how time and bytes are measured."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import time

import pytest
import torch

import bp_torch
import bp_torch.functional as bpF
from benchmarks import layers, memory, models, providers, timing, training
from benchmarks.layers import Layer
from benchmarks.models import Model
from benchmarks.providers import Setup
from benchmarks.training import Training

ONE_BACKEND = "timing is tested here, whatever is timed; the kernels have tests of their own"

TINY = list(layers.tiny())
MODELS = {model.name: model for model in models.tiny()}


def faulty(layer: Layer, **changes: object) -> str:
    setup = Setup.of(layer, "cpu", torch.float32)
    return providers.fault(setup, dataclasses.replace(layer, **changes).ours)  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", TINY, ids=lambda layer: layer.title)
def test_the_gate_passes_what_is_right(layer: Layer) -> None:
    assert faulty(layer) == ""


def test_the_gate_sees_wrong_gradients_and_wrong_dropout() -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * 0.5

    dropout = layers.dropout(64, 64)
    assert "the gradient of input 0" in faulty(dropout, ours=lambda x, p: bpF.dropout(Halved.apply(x), p))
    assert "moment 1" in faulty(dropout, ours=lambda x, p: bpF.dropout(x.abs(), p) if p else x * 1)
    assert "moment 2" in faulty(dropout, ours=lambda x, p: bpF.dropout(x, 0.3 * p))
    assert "is torch.float64" in faulty(dropout, ours=lambda x, p: bpF.dropout(x, p).double())


def test_the_gate_sees_wrong_masks_in_models(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Training(MODELS["mlp"], "cpu", torch.float32)
    _, loss = case.prepared("bp_torch", case.initial)
    assert training.dropout_fault(0.5, lambda: loss(*case.batch)) == ""
    assert "dropout in dense kept" in training.dropout_fault(0.25, lambda: loss(*case.batch))

    def wrong(input: torch.Tensor, p: float, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return torch.nn.functional.dropout(input, 0.8 * p, training)

    def unscaled(input: torch.Tensor, p: float, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return torch.nn.functional.dropout(input, p, training) * (1 - p)

    x = torch.randn(64, 64)
    for function, message in ((wrong, "expected 0.5"), (unscaled, "is off by")):
        monkeypatch.setattr(bpF, "dropout", function)
        assert message in training.dropout_fault(0.5, lambda: bp_torch.nn.Dropout(0.5)(x))
        assert bpF.dropout is function
    assert "nothing" in training.dropout_fault(0.5, lambda: bp_torch.nn.ReLU()(x))


def test_the_gate_sees_a_converted_model_with_another_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = bp_torch.convert

    def wrong(model: torch.nn.Module) -> torch.nn.Module:
        for module in convert(model).modules():
            if isinstance(module, torch.nn.Dropout):
                module.p *= 0.9
        return model

    monkeypatch.setattr(bp_torch, "convert", wrong)
    case = Training(MODELS["mlp"], "cpu", torch.float32)
    assert "dropout in dense" in case.candidate("bp_torch").fault(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_models_have_the_same_weights_and_steps(dtype: torch.dtype) -> None:
    model = dataclasses.replace(MODELS["mlp_batch_norm"], p=0.0)
    case = Training(model, "cpu", dtype)
    assert case.precision == ("autocast bfloat16" if dtype == torch.bfloat16 else "float32")
    nets = [case.prepared(name, case.initial) for name in ("torch", "bp_torch")]
    losses = [loss(*case.batch) for _, loss in nets]
    assert losses[0].dtype == losses[1].dtype
    torch.testing.assert_close(*losses, rtol=0.05 if dtype == torch.bfloat16 else 1e-5, atol=0)
    for a, b in zip(nets[0][0].parameters(), nets[1][0].parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.float32
    assert bp_torch.conversion_report(nets[1][0]).count("fused") > 0
    candidate = case.candidate("bp_torch")
    assert candidate.fault(2) == ""
    candidate.runs["step"]()


def test_saved_bytes_are_those_beyond_inputs_and_outputs() -> None:
    setup = Setup.of(layers.dropout(64, 64), "cpu", torch.float32)
    x = setup.inputs[0]
    assert providers.saved_bytes(setup, lambda x, p: x * x) == 0
    assert providers.saved_bytes(setup, lambda x, p: (x + 1).sin()) == x.numel() * 4


def test_saved_bytes_per_hidden_element() -> None:
    model: Model = dataclasses.replace(MODELS["mlp"], p=0.0)
    case = Training(model, "cpu", torch.float32)
    facts = {name: case.candidate(name).facts()["saved_per_hidden"] for name in ("torch", "bp_torch")}
    assert facts == {"torch": 4.0, "bp_torch": 4.0}  # relu's output, which the next layer needs anyway
    assert Training(MODELS["resnet18"], "cpu", torch.float32).candidate("torch").facts() == {}


def test_peak_bytes() -> None:
    x = torch.zeros(1000, 1000)

    def run() -> torch.Tensor:
        y = x + 1
        z = y + 1
        del y
        return z + 1

    assert 8_000_000 <= memory.peak_bytes(run, "cpu") < 8_100_000


def test_quartiles() -> None:
    times = timing.summary([float(n) for n in range(9)])
    assert (times.median, times.low, times.high, times.samples) == (4.0, 2.0, 6.0, 9)
    assert timing.summary([2.0]) == timing.Times(2.0, 2.0, 2.0, 1)


def test_providers_take_turns() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    found = timing.in_turns(runs, "cpu", 3)
    assert set(found) == {"a", "b"}
    changes = sum(first != second for first, second in itertools.pairwise(order))
    assert changes == 7  # once to find the number of calls of each, then a, b, a, b, a, b


def test_a_limit_in_seconds_leaves_the_least_number_of_rounds() -> None:
    found = timing.in_turns({"a": lambda: time.sleep(0.002)}, "cpu", 1000, seconds=0.0)
    assert found["a"].samples == timing.LEAST


def test_others_are_noticed() -> None:
    others = timing.Others()
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
        found = others.cpus()
    finally:
        other.kill()
        other.wait()
    if found is None:
        pytest.skip("this system has no /proc/stat")
    assert 0.02 < found <= 2 * (os.cpu_count() or 1)
