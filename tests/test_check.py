"""bp_torch.check: it raises no false alarm and changes nothing; what it catches is in test_check_planted.py."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from defects import BiasOff, Linear, OverwritesSaved
from defects_in_use import Tied
from planted import t
from test_readme import assert_same_output, blocks_of
from torch import Tensor, nn
from torch.func import vmap
from torch_modules import MODULES

import bp_torch
from bp_torch.verification import CHECKS, Report
from bp_torch.verification.numeric import compare_gradients, difference
from bp_torch.verification.registry import describe, refusal
from bp_torch.verification.subject import Subject

ONE_BACKEND = "the subjects are torch's and this file's own, which know no backend"

PATIENT = {"time_limit": 250.0}
"""A machine that does much else must not decide a test."""

# What torch 2.13's own modules do wrong; docs/check.md says more of each.
TORCHS_OWN = {
    "Hardsigmoid": {"float64"},
    "RReLU": {"checkpoint"},
    "InstanceNorm2d": {"empty-batch"},
    "MultiheadAttention": {"vmap"},
    "GRU": {"per-sample-gradients", "compiled-transforms"},
    "LSTM": {"per-sample-gradients"},
    "RNNCell": {"compiled-transforms"},
}
# In one draw of sixty, where a variance is small: the rounding of the mean is none of the inputs', on which the bound
# rests. LayerNorm has the same error over the same numbers.
IN_SOME_DRAWS = {"GroupNorm": {"large-mean"}}
SMALL = ["Dropout", "BatchNorm2d", "Conv2d", "CrossEntropyLoss", "Embedding", "GELU", "Hardsigmoid", "LayerNorm"]
OTHERS = {name for name in MODULES if name not in SMALL}


def check_of_torch(name: str, **options: Any) -> None:
    make, inputs = MODULES[name]
    report = bp_torch.check(make(), *inputs(), **options, **PATIENT)
    failures = {r.name for r in report.failures} - IN_SOME_DRAWS.get(name, set())
    assert failures == TORCHS_OWN.get(name, set()), report
    assert not report.unfinished
    assert report.count("passed") > 16


@pytest.mark.parametrize("name", SMALL)
def test_no_false_alarm(name: str) -> None:
    check_of_torch(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OTHERS))
def test_no_false_alarm_in_torch_nn(name: str) -> None:
    """Without the four checks that take half of the time; bp-torch check runs those on this library's layers."""
    check_of_torch(name, skip=["compile", "gradgradcheck", "evaluation", "odd-sizes"])


def drawn(seed: int, *shape: int) -> Tensor:
    """The numbers by which a false alarm was found, with parameters drawn from the same seed."""
    torch.manual_seed(seed)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * seed))


def test_equal_rows_at_a_kink_are_no_fault_of_their_layout() -> None:
    """Batch norm makes rounding of equal rows, and relu's kink lies there."""

    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x * 2 if x.stride(0) else x.detach() * 2 + x, training=self.training)

    x = drawn(15, 6, 5)
    right = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))
    assert bp_torch.check(right, x, checks="zero-stride-inputs", **PATIENT)
    assert not bp_torch.check(Wrong(), x, checks="zero-stride-inputs", **PATIENT)


def test_large_inputs_of_saturated_attention_are_rounded_as_they_must_be() -> None:
    x = drawn(8, 2, 3, 4)
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    assert bp_torch.check(layer, x, checks="tails", **PATIENT)


def test_one_unlucky_rounding_at_a_large_mean_is_no_fault() -> None:
    x = drawn(8, 2, 6, 4)
    assert bp_torch.check(nn.GroupNorm(3, 6), x, checks="large-mean", **PATIENT)


def test_an_example_is_the_one_row_that_shows_the_fault() -> None:
    x = torch.tensor([[-1.0, -2.0], [-3.0, -1.0], [1.0, 2.0], [-1.0, 3.0]])  # relu hides it in the first two
    (failure,) = bp_torch.check(OverwritesSaved.apply, x, checks="overwriting", **PATIENT).failures
    assert next(iter(failure.example.values())).startswith("shape (1, 2), strides (2, 1), float32, values 1, 2")


def linear() -> tuple[Any, ...]:
    return t(4, 5), t(3, 5, seed=1), t(3, seed=2)


QUICK = {"checks": ["gradcheck", "float32", "retain-graph", "in-place"]}


class Empty(nn.Linear):
    def __len__(self) -> int:
        return 0


@pytest.mark.parametrize(
    "module", [Empty(3, 2), torch.compile(nn.Linear(3, 2), backend="eager")], ids=["empty", "compiled"]
)
def test_a_module_of_no_length_keeps_its_parameters(module: nn.Module) -> None:
    """Whether it is there is not whether it is true; a compiled one answers with an error."""
    assert len(Subject(module, (torch.randn(4, 3),)).parameter_names) == 2


def test_nothing_is_changed() -> None:
    module = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout())
    module(t(4, 5)).sum().backward()
    x = t(4, 5).requires_grad_()
    before = copy.deepcopy(module)
    grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()  # noqa: NPY002
    kept = x.detach().clone()
    with torch.no_grad():
        bp_torch.check(module, x, skip=["compile"], **PATIENT)
    assert difference(list(module.state_dict().values()), list(before.state_dict().values()), 0.0) is None
    assert difference([p.grad for p in module.parameters() if p.grad is not None], grads, 0.0) is None
    assert module.training
    assert torch.equal(x, kept)
    assert x.grad is None
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert numpy.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


def test_report_says_the_same_in_every_form(tmp_path: Path) -> None:
    report = bp_torch.check(BiasOff, *linear(), **QUICK)
    assert isinstance(report, Report)
    assert repr(report) == "<Report BiasOff: 3 passed, 1 failed>"
    assert [r.name for r in report.failures] == ["gradcheck"]
    text = str(report)
    assert text.splitlines()[0] == "check BiasOff"
    assert "failed: gradcheck" in text
    assert "shape (1, 5), strides (5, 1), float64, values" in text
    for name in ("report.md", "report.json"):
        report.save(tmp_path / name)
    assert "| gradcheck | **failed** |" in (tmp_path / "report.md").read_text("utf-8")
    loaded = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert not loaded["passed"]
    assert [r["state"] for r in loaded["results"]].count("failed") == 1
    with pytest.raises(ValueError, match="ends in"):
        report.save(tmp_path / "report.txt")
    with pytest.raises(KeyError):
        report["gradchek"]


def test_report_prints_with_and_without_rich(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = bp_torch.check(BiasOff, *linear(), **QUICK)
    pytest.importorskip("rich")
    report.show()
    assert "┃" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich", None)
    report.show()
    assert capsys.readouterr().out == f"{report}\n"


def test_assert_correct() -> None:
    assert bp_torch.assert_correct(Linear, *linear(), **QUICK)
    with pytest.raises(AssertionError, match=r"failed: gradcheck\n  wrong  the gradient of b\[1\] is 1\.9"):
        bp_torch.assert_correct(BiasOff, *linear(), **QUICK)


@pytest.mark.parametrize("options", [{"checks": ["gradchek"]}, {"skip": ["gradchek"]}])
def test_unknown_check_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no check 'gradchek'; there are gradcheck, gradgradcheck"):
        bp_torch.check(Linear, *linear(), **options)


def test_other_wrong_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of aot_eager, inductor"):
        bp_torch.check(Linear, *linear(), compile="eager")
    with pytest.raises(ValueError, match="'time_limit'"):
        bp_torch.check(Linear, *linear(), time_limit=0)
    with pytest.raises(TypeError, match="got int"):
        bp_torch.check(3, t(2, 2))
    with pytest.raises(TypeError, match="at least one tensor"):
        bp_torch.check(nn.ReLU(), 3.0)
    with pytest.raises(TypeError, match="an output that is a floating-point tensor"):
        bp_torch.check(torch.argmax, t(3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        bp_torch.check(nn.Linear(3, 2), t(4, 5))
    with pytest.raises(ValueError, match="lazy parameters"):
        bp_torch.check(nn.LazyLinear(3), t(4, 5))
    with pytest.raises(ValueError, match="the reference has the parameters"):
        bp_torch.check(nn.Linear(5, 3), t(4, 5), reference=nn.ReLU())


def test_checks_and_skip_choose() -> None:
    assert [r.name for r in bp_torch.check(Linear, *linear(), **QUICK).results] == QUICK["checks"]
    left = bp_torch.check(Linear, *linear(), checks=["gradcheck", "nan"], skip=["gradcheck"])
    assert [r.name for r in left.results] == ["nan"]


def test_out_of_time_is_no_pass() -> None:
    def slow(x: Tensor) -> Tensor:
        time.sleep(0.05)
        return x.sin()

    report = bp_torch.check(slow, t(4, 5), checks=["gradcheck"], time_limit=0.2)
    assert report["gradcheck"].state == "not finished"
    assert "out of time" in report["gradcheck"].detail
    assert not report.failures
    assert not report
    with pytest.raises(AssertionError, match="not finished: gradcheck"):
        bp_torch.assert_correct(slow, t(4, 5), checks=["gradcheck"], time_limit=0.2)


def test_each_result_is_told_as_it_comes() -> None:
    told: list[str] = []
    bp_torch.check(Linear, *linear(), on_result=lambda result: told.append(result.name), **QUICK)
    assert told == QUICK["checks"]


def test_inputs_that_require_gradients_are_the_differentiated_ones() -> None:
    def f(x: Tensor, target: Tensor) -> Tensor:
        return x * target.detach()  # no gradient for target

    assert not bp_torch.check(f, t(3), t(3, seed=1), checks=["gradcheck"])
    assert bp_torch.check(f, t(3).requires_grad_(), t(3, seed=1), checks=["gradcheck"])


def test_kinks_are_no_failures() -> None:
    """At 0 relu has no derivative; a wrong gradient beside it is still seen."""
    x = torch.tensor([[0.0, 1.0, -2.0, 0.001]])
    report = bp_torch.check(nn.ReLU(), x, checks=["gradcheck"])
    assert report, report
    assert "lie at kinks" in report["gradcheck"].detail
    assert not bp_torch.check(lambda x: x.detach().relu() + 0.5 * (x.relu() - x.relu().detach()), x)


def test_reference_decides() -> None:
    def nearly(x: Tensor) -> Tensor:
        return torch.tanh(x) + 1e-5

    def rough(x: Tensor) -> Tensor:
        return torch.tanh(x.bfloat16()).to(x.dtype) if x.dtype == torch.float32 else torch.tanh(x)

    checks = ["reference", "float32"]
    assert bp_torch.check(torch.tanh, t(4, 5), reference=torch.tanh, checks=checks)
    wrong = bp_torch.check(nearly, t(4, 5), reference=torch.tanh, checks=checks)
    assert [r.name for r in wrong.failures] == ["reference"]
    lossy = bp_torch.check(rough, t(4, 5), reference=torch.tanh, checks=checks)
    assert [r.name for r in lossy.failures] == ["float32"]
    assert "the reference by" in lossy["float32"].detail
    assert not bp_torch.check(rough, t(4, 5), checks=["float32"])  # found without a reference too
    module = bp_torch.check(bp_torch.nn.Linear(5, 3), t(4, 5), reference=nn.Linear(5, 3), checks=checks)
    assert module, module


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return dy * x.exp()


def test_refusals_are_limits_and_other_errors_failures() -> None:
    report = bp_torch.check(Once, t(4, 5), checks=["gradcheck", "gradgradcheck", "forward-mode"])
    assert [r.state for r in report.results] == ["passed", "not applicable", "not applicable"]
    assert "refused: RuntimeError: trying to differentiate twice" in report["gradgradcheck"].detail

    class Crashes(Once):
        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            return dy, dy  # one gradient too many

    report = bp_torch.check(Crashes, t(4, 5), checks=["gradcheck"])
    assert report["gradcheck"].detail.startswith("raises RuntimeError: function CrashesBackward returned")


@pytest.mark.parametrize(
    "error",
    [
        TypeError("unsupported operand type(s) for *: 'NoneType' and 'Tensor'"),
        NotImplementedError("double backward is not supported"),
        NotImplementedError("You must implement either the backward or vjp method for your custom autograd.Function"),
        NotImplementedError("""\"bincount_cpu\" not implemented for 'Float'"""),
        RuntimeError("this batch is not supported by vmap"),
        ValueError("trying to differentiate twice a function that was marked with @once_differentiable"),
        RuntimeError("cannot reshape tensor of 0 elements into shape [0, -1]"),
    ],
)
def test_only_torchs_own_words_are_a_refusal(error: Exception) -> None:
    assert refusal(error) is None


def test_torchs_own_words_are_a_refusal() -> None:
    """As this torch says them."""
    x = t(3, 2)
    gru = torch.compile(nn.GRU(2, 2), backend="eager", fullgraph=True)
    linear = nn.Linear(2, 2)
    norm = nn.BatchNorm1d(2)
    calls: list[Callable[[], Any]] = [
        lambda: vmap(Once.apply)(x),
        lambda: vmap(Scaled.apply)(x),
        lambda: torch.func.jvp(Scaled.apply, (x,), (x,)),
        lambda: torch.func.jvp(lambda w: nn.functional.embedding_bag(torch.zeros(1, 1).long(), w), (x,), (x,)),
        lambda: vmap(lambda t: t * t.sum().item())(x),
        lambda: vmap(lambda t: t if t.sum() > 0 else -t)(x),
        lambda: vmap(lambda t: t[t > 0])(x),
        lambda: vmap(lambda t: torch.zeros(2).lerp_(t, 0.5))(x),
        lambda: vmap(norm)(x[None]),
        lambda: vmap(nn.RReLU(), randomness="different")(x),
        lambda: torch.cdist(x.half(), x.half()),
        lambda: torch.linalg.inv(torch.eye(2).bfloat16()),
        lambda: torch.fft.fft(x.half()),
        lambda: norm(x[:1]),
        lambda: bp_torch.nn.BatchNorm1d(2)(x[:1]),
        lambda: nn.functional.binary_cross_entropy(2 + x.abs(), x),
        lambda: nn.LSTM(2, 2)(torch.zeros(0, 1, 2)),
        lambda: gru(x[None]),
        lambda: vmap(lambda t: linear(t).data_ptr())(x),
    ]
    for number, call in enumerate(calls):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            call()
        assert refusal(caught.value) is not None, (number, caught.value)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 3 * dy


def test_a_report_in_which_nothing_applied_is_not_true() -> None:
    report = bp_torch.check(nn.ReLU(), t(4, 5), checks=["state-dict", "seed"])
    assert [r.state for r in report.results] == ["not applicable"] * 2
    assert not report
    assert report.clean
    assert report.summary == "ReLU: 2 not applicable, so nothing was checked"
    assert not json.loads(report.to_json())["passed"]
    with pytest.raises(AssertionError, match="nothing was checked"):
        bp_torch.assert_correct(nn.ReLU(), t(4, 5), checks=["state-dict", "seed"])


def test_float32_alone_is_a_failure_of_float64() -> None:
    def only(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("expected float32")
        return x.sin()

    report = bp_torch.check(only, t(4, 5), checks=["gradcheck", "float64", "tails"])
    assert [r.state for r in report.results] == ["passed", "failed", "not applicable"]
    assert report["float64"].detail == "raises TypeError: expected float32"


def test_a_nan_in_the_gradient_is_no_kink() -> None:
    """One entry of many, where the function is smooth."""
    x = torch.linspace(0.3, 2, 90, dtype=torch.float64)
    g = x.exp()
    g[7] = torch.nan
    found = compare_gradients(lambda ts: [ts[0].exp()], [x], [g], [torch.ones(90, dtype=torch.float64)], [0])
    assert {w.index for w in found.wrong} == {(7,)}
    # √x at 0 has none: right of it the derivative grows without limit, left of it there is no value.
    x = torch.zeros(1, dtype=torch.float64)
    found = compare_gradients(lambda ts: [ts[0].sqrt()], [x], [torch.full_like(x, torch.inf)], [torch.ones(1)], [0])
    assert not found.wrong


def name_of(f: Any) -> str:
    return f.__name__


@pytest.mark.parametrize("f", [torch.sqrt, torch.special.xlog1py, torch.linalg.vector_norm, torch.sgn], ids=name_of)
def test_no_false_alarm_at_zero(f: Any) -> None:
    inputs = (t(4, 3).abs(), t(4, 3, seed=1).abs()) if f is torch.special.xlog1py else (t(4, 3).abs(),)
    report = bp_torch.check(f, *inputs, checks=["zeros"])
    assert report, report


@pytest.mark.parametrize("f", [torch.fft.fft, torch.fft.rfft, torch.abs, torch.angle, lambda z: z @ z.mH], ids=name_of)
def test_no_false_alarm_of_complex_functions(f: Any) -> None:
    z = t(4, 4, dtype=torch.float32 if f is torch.fft.rfft else torch.complex64)
    # MKL's transform of no rows is an error of its own.
    report = bp_torch.check(f, z, skip=["compiled-transforms", "empty-batch"], **PATIENT)
    assert report, report


def test_no_false_alarm_of_tied_weights() -> None:
    report = bp_torch.check(Tied(), t(4, 5), skip=["gradgradcheck", "odd-sizes"], **PATIENT)
    assert report, report


def test_the_reference_decides_for_other_batch_sizes() -> None:
    def a_quarter(x: Tensor) -> Tensor:
        return x.sum(0) / 4

    assert bp_torch.check(a_quarter, t(4, 5), reference=a_quarter, checks=["reference"])
    assert not bp_torch.check(a_quarter, t(4, 5), reference=lambda x: x.mean(0), checks=["reference"])


def test_large_tensors_are_searched_for_one_wrong_entry() -> None:
    class OneWrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 3 * x

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            dx = 3 * dy
            dx[17, 23] *= 1.5
            return dx

    report = bp_torch.check(OneWrong, t(40, 50), checks=["gradcheck"], **PATIENT)
    assert "the gradient of x[17, 23] is" in report["gradcheck"].detail


def test_numerical_derivatives_know_their_error() -> None:
    """Right to 1e-5 and wrong in the seventh digit is told from wrong, and from rounding."""
    x = torch.linspace(0.3, 2, 6, dtype=torch.float64)
    weights = [torch.ones(6, dtype=torch.float64)]

    def compare(factor: float) -> tuple[int, int]:
        found = compare_gradients(lambda ts: [ts[0].exp()], [x], [factor * x.exp()], weights, [0])
        return len(found.wrong), len(found.imprecise)

    assert compare(1.0) == (0, 0)
    assert compare(1 + 3e-8) == (0, 6)
    assert compare(1.01) == (6, 0)


def test_describe() -> None:
    shown = describe(torch.arange(20.0).reshape(4, 5).t())
    assert shown == "shape (5, 4), strides (1, 5), float32, values 0, 5, 10, 15, 1, 6, 11, 16, 2, 7, 12, 17, …"
    assert describe(torch.zeros(0, 3)) == "shape (0, 3), strides (3, 1), float32, values none"


PAGE = Path(__file__).parents[1] / "docs" / "check.md"


def test_documented_table_is_that_of_the_code() -> None:
    section = PAGE.read_text("utf-8").split("\n## The checks\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert rows == [f"| `{row.name}` | {row.what} | {row.means} |" for row in CHECKS.values()]


def test_documented_example_prints_what_is_stated(tmp_path: Path) -> None:
    (block,) = (block for block in blocks_of(PAGE) if block.output is not None)
    script = tmp_path / "example.py"
    script.write_text(block.code, encoding="utf-8")
    run = subprocess.run([sys.executable, "-W", "error", script], capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    assert_same_output(run.stdout, block.output or "")
