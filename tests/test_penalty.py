"""L1, L2 and elastic net against the sums they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from cases import widest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import ElasticNet
from torch import Tensor
from torch.func import functional_call, grad, vmap

import bp_torch.functional as bpF
from bp_torch import nn

FUNCTION = "PenaltyFunction"
FORMS: dict[str, tuple[Callable[[Iterable[Tensor]], Tensor], float, float]] = {
    "l1": (lambda ws: bpF.l1_penalty(ws, 0.3), 0.3, 0.0),
    "l2": (lambda ws: bpF.l2_penalty(ws, 0.7), 0.0, 0.7),
    "elastic net": (lambda ws: bpF.elastic_net_penalty(ws, 0.4, 0.25), 0.1, 0.3),
    "L1Penalty": (nn.L1Penalty(0.3), 0.3, 0.0),
    "L2Penalty": (nn.L2Penalty(0.7), 0.0, 0.7),
    "ElasticNetPenalty": (nn.ElasticNetPenalty(0.4, 0.25), 0.1, 0.3),
}
every_form = pytest.mark.parametrize(("form", "l1", "l2"), FORMS.values(), ids=FORMS)


def by_torch(parameters: Iterable[Tensor], l1: float, l2: float) -> Tensor:
    return sum(l1 * w.abs().sum() + l2 * (w * w).sum() for w in parameters)


@settings(max_examples=25)
@given(
    name=st.sampled_from(sorted(FORMS)),
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5),
    transposed=st.booleans(),
)
def test_values_and_gradients(name: str, shapes: list[list[int]], transposed: bool) -> None:
    form, l1, l2 = FORMS[name]
    ws = [torch.randn(shape, dtype=widest()) for shape in shapes]
    ws = [(w.mT if transposed and w.dim() > 1 else w).requires_grad_() for w in ws]
    ours, theirs = form(ws), by_torch(ws, l1, l2)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(3 * ours, ws), torch.autograd.grad(3 * theirs, ws))


@every_form
def test_gradient_is_lambda_sign_and_two_lambda_w(form, l1: float, l2: float) -> None:
    w = torch.tensor([-2.0, 0.0, 0.5], requires_grad=True)
    form([w]).backward()
    torch.testing.assert_close(w.grad, l1 * torch.tensor([-1.0, 0.0, 1.0]) + 2 * l2 * w.detach())


@pytest.mark.parametrize("l2", [0.0, 0.5])
def test_infinite_weights(l2: float) -> None:
    """Without an L2 part nothing is multiplied by them; with one, the slope grows as they do."""
    w = torch.tensor([float("inf"), -float("inf"), 2.0], requires_grad=True)
    R = bpF.l1_penalty([w], 0.3) if l2 == 0 else bpF.l2_penalty([w], l2)
    R.backward()
    assert R.isinf()
    expected = torch.tensor([0.3, -0.3, 0.3]) if l2 == 0 else 2 * l2 * w.detach()
    torch.testing.assert_close(w.grad, expected)


def test_elastic_net_is_scikit_learns_but_for_its_half() -> None:
    """At scikit-learn's solution, gradient of (1/2n)‖y - Xw‖² + penalty vanishes where w ≠ 0."""
    X, noise = torch.randn(40, 3, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.1 * noise
    alpha, ratio = 0.1, 0.6
    fitted = ElasticNet(alpha=alpha, l1_ratio=ratio, fit_intercept=False, tol=1e-12).fit(X.numpy(), y.numpy())
    w = torch.tensor(fitted.coef_, requires_grad=True)
    assert (w != 0).all()
    penalty = bpF.l1_penalty([w], alpha * ratio) + bpF.l2_penalty([w], alpha * (1 - ratio) / 2)
    (((y - X @ w) ** 2).mean() / 2 + penalty).backward()
    torch.testing.assert_close(w.grad, torch.zeros_like(w), atol=1e-8, rtol=0)


@every_form
def test_parameters_in_any_container(form, l1: float, l2: float) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    expected = by_torch(model.parameters(), l1, l2)
    for given_parameters in (model.parameters(), list(model.parameters()), tuple(model.parameters())):
        torch.testing.assert_close(form(given_parameters), expected)
    w = torch.randn(3, 2)
    torch.testing.assert_close(form(w), by_torch([w], l1, l2))
    for nothing in ([], iter(())):
        zero = form(nothing)
        assert zero.shape == ()
        assert zero.item() == 0


@every_form
def test_a_tensor_that_comes_twice_counts_once(form, l1: float, l2: float) -> None:
    w = torch.randn(3, requires_grad=True)
    value = form([w, w])
    torch.testing.assert_close(value, by_torch([w], l1, l2))
    value.backward()
    torch.testing.assert_close(w.grad, l1 * w.detach().sign() + 2 * l2 * w.detach())


@pytest.mark.contract("frozen", function=FUNCTION)
@every_form
def test_frozen_parameters_count_and_get_no_gradient(form, l1: float, l2: float) -> None:
    frozen, free = torch.randn(4), torch.randn(3, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        value = form([frozen, free])
    torch.testing.assert_close(value, by_torch([frozen, free], l1, l2))
    value.backward()
    assert frozen.grad is None
    assert free.grad is not None
    assert [t.shape for t in saved] == [free.shape]
    assert not form([frozen]).requires_grad


@pytest.mark.contract("dtypes", function=FUNCTION)
@every_form
def test_mixed_dtypes(form, l1: float, l2: float) -> None:
    ws = [torch.randn(5).to(d).requires_grad_() for d in (torch.float32, torch.bfloat16, torch.float64, torch.float16)]
    value = form(ws)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, by_torch([w.double() for w in ws], l1, l2), rtol=1e-6, atol=0)
    value.backward()
    assert [w.grad.dtype for w in ws] == [w.dtype for w in ws]


@pytest.mark.contract("dtypes", function=FUNCTION)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_form
def test_many_small_terms_are_summed_in_float32(
    form, l1: float, l2: float, dtype: torch.dtype, on_backend: str
) -> None:
    """Added up in 16 bits, term by term or tensor by tensor, these would stand still far below their sum."""
    count = 300 if on_backend == "triton" else 2000  # a program each; in bfloat16 256 tensors are enough
    ws = [torch.full((64,), 2**-6, dtype=dtype) for _ in range(count)]
    exact = by_torch([w.double() for w in ws], l1, l2)
    value = form(ws)
    assert value.dtype == dtype
    torch.testing.assert_close(value.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.contract("torch.func", function=FUNCTION)
@every_form
def test_transforms(form, l1: float, l2: float) -> None:
    ensemble = [torch.randn(5, 3, 2, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)]
    values = vmap(lambda a, b: form([a, b]))(*ensemble)
    torch.testing.assert_close(values, torch.stack([by_torch(ws, l1, l2) for ws in zip(*ensemble, strict=True)]))
    model = torch.nn.Linear(3, 2)
    parameters = dict(model.named_parameters())
    x = torch.randn(3)

    def loss(p: dict[str, Tensor], penalty) -> Tensor:
        return functional_call(model, p, (x,)).sum() + penalty(p.values())

    torch.testing.assert_close(
        grad(lambda p: loss(p, form))(parameters), grad(lambda p: loss(p, lambda ws: by_torch(ws, l1, l2)))(parameters)
    )


@pytest.mark.contract("compile", function=FUNCTION)
@every_form
def test_compiled_over_a_models_parameters(form, l1: float, l2: float) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    torch.compile(lambda: form(model.parameters()), fullgraph=True, backend="aot_eager")().backward()
    for w in model.parameters():
        torch.testing.assert_close(w.grad, l1 * w.detach().sign() + 2 * l2 * w.detach())


@pytest.mark.contract("modules", function=FUNCTION)
def test_repr() -> None:
    assert repr(nn.L1Penalty(0.1)) == "L1Penalty(weight=0.1)"
    assert repr(nn.L2Penalty(0.1)) == "L2Penalty(weight=0.1)"
    assert repr(nn.ElasticNetPenalty(0.1)) == "ElasticNetPenalty(weight=0.1, l1_ratio=0.5)"


@pytest.mark.parametrize("build", [nn.L1Penalty, nn.L2Penalty, nn.ElasticNetPenalty])
def test_modules_refuse_a_bad_weight_at_once(build: Callable) -> None:
    for weight in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"{build.__name__}.*'weight'"):
            build(weight)
    for weight in ("0.1", torch.tensor(0.1)):
        with pytest.raises(TypeError, match="'weight': expected a number"):
            build(weight)


def test_errors_name_the_argument() -> None:
    w = torch.randn(3)
    with pytest.raises(TypeError, match="'parameters': expected Tensors, got str at 1"):
        bpF.l1_penalty([w, "w"], 0.1)
    with pytest.raises(RuntimeError, match=r"'parameters': expected floating dtypes, got torch.int64"):
        bpF.l2_penalty([w, w.long()], 0.1)
    with pytest.raises(RuntimeError, match="one device, got cpu and meta"):
        bpF.l1_penalty([w, w.to("meta")], 0.1)
    for ratio in (-0.1, 1.1):
        with pytest.raises(ValueError, match="'l1_ratio'"):
            bpF.elastic_net_penalty([w], 0.1, ratio)
        with pytest.raises(ValueError, match="'l1_ratio'"):
            nn.ElasticNetPenalty(0.1, ratio)
    with pytest.raises(ValueError, match="'weight': expected a number ≥ 0, got -1"):
        bpF.l1_penalty([w], -1)
