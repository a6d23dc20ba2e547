"""What each kind of layer computes forward and backward, by formula, for `BackpropView` to hold to autograd.

A rule takes a recorded call of a module and gives its formulas, z, a and δ = ∂L/∂z, and the identities: each gradient
once by formula and once as autograd had it. Formulas are computed in float64 from the recorded numbers. L is the loss,
x a layer's input, y its output, m a dropout mask, and Σ a sum over all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bp_torch import functional, fusion, nn
from bp_torch.functions.activation import ACTIVATIONS, lookup
from bp_torch.nn.mlp import HiddenLayer

from .backprop_records import Call, Layer, generator_state, set_generator_state


def explain(call: Call) -> Layer | None:
    """The row of a call; None for containers and for layers that compute nothing."""
    cls = type(call.module)
    if vars(call.module).get("forward") is vars(call.module).get(fusion.FORWARD):  # none of its own
        for known, rule in RULES.items():
            if isinstance(call.module, known) and cls.forward is known.forward and call.dy is not None:
                layer = rule(call)
                if layer is not None:
                    return layer
    if call.children or call.output is None or isinstance(call.module, SILENT) or cls.__name__ == "Identity":
        return None
    return Layer(
        call.name, cls.__name__, ["y = forward(x)"], ["no formula here: autograd's numbers alone"],
        z=call.output, a=call.output, delta=call.dy,
        gradients={f"d{name}": gradient for name, gradient in call.gradients.items()},
    )  # fmt: skip


SILENT = (torch.nn.Identity, torch.nn.Flatten, torch.nn.Unflatten, torch.nn.Sequential, torch.nn.ModuleList)


def _numbers(call: Call, *names: str) -> tuple[Tensor, ...]:
    """Inputs in float64."""
    return tuple(call.inputs[name].double() for name in names)


def _replay(like: Tensor, state: Tensor, draw: Callable[[], Tensor]) -> Tensor:
    """What `draw` gives from a state of the generator: the factors m/(1 - p) of a dropout that drew from it."""
    now = generator_state(like)
    try:
        set_generator_state(like, state)
        with torch.no_grad():
            return draw().double()
    finally:
        set_generator_state(like, now)


def _f(layer: Layer, name: str | None, parameters: Mapping[str, float], z: Tensor) -> tuple[Tensor, Tensor]:
    """f(z) and f′(z), from the activation table."""
    if name is None or name == "identity":
        return z, torch.ones_like(z)
    values = tuple(map(float, {**ACTIVATIONS[name].parameters, **(parameters or {})}.values()))
    row = lookup(name, values)
    layer.activations.add((name, values))
    a = row.f(z, *values)
    return a, row.df(z if row.saves == "input" else a, *values)


def _gradients(call: Call, **symbols: str) -> dict[str, Tensor]:
    """What autograd had for the parameters, under these symbols."""
    return {symbol: call.gradients[name] for name, symbol in symbols.items() if name in call.gradients}


def _sum_rows(delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """dW = δᵀ x and db = Σ δ over all leading dimensions."""
    rows = delta.reshape(-1, delta.shape[-1])
    return rows.T @ x.reshape(-1, x.shape[-1]), rows.sum(0)


def _dense(call: Call) -> Layer | None:
    """torch.nn.Linear, bp_torch's Linear and Dense: y = m/(1 - p) ⊙ f(x Wᵀ + b) (+ residual)."""
    if "weight" not in call.parameters:  # a parametrization computes it
        return None
    module: Any = call.module
    name, p = getattr(module, "activation", None), getattr(module, "dropout", 0.0) if call.training else 0.0
    (x,), w, b = _numbers(call, "input"), call.parameters["weight"].double(), call.parameters.get("bias")
    assert call.output is not None
    assert call.dy is not None
    layer = Layer(call.name, type(module).__name__, ["z = x Wᵀ" + ("" if b is None else " + b")], [])
    layer.z = x @ w.T + (0 if b is None else b.double())
    a, slope = _f(layer, name, getattr(module, "activation_parameters", {}), layer.z)
    residual = call.inputs.get("residual")
    terms = ["∂L/∂y"]
    factor: Tensor | float = 1.0
    if p > 0:

        def draw() -> Tensor:
            ones = torch.ones_like(call.parameters["weight"][:, 0])
            blank = torch.zeros_like(call.parameters["weight"])
            return functional.dense(call.inputs["input"], blank, ones, p=p, training=True)

        factor = _replay(x, call.rng, draw)
        terms.append("m/(1 - p)")
    if name not in (None, "identity"):
        layer.forward.append(f"a = {name}(z)")
        terms.append(f"{name}′(z)")
    if p > 0 or residual is not None:
        last = "a" if name not in (None, "identity") else "z"
        layer.forward.append(f"y = {f'm ⊙ {last}/(1 - p)' if p > 0 else last}{'' if residual is None else ' + r'}")
    dy = call.dy.double()
    layer.a, layer.delta = call.output, dy * factor * slope
    layer.backward = [f"δ = {' ⊙ '.join(terms)}", "dW = δᵀ x", *([] if b is None else ["db = Σ δ"]), "dx = δ W"]
    y = a * factor + (0 if residual is None else residual.double())
    layer.check("y", y, call.output)
    dw, db = _sum_rows(layer.delta, x)
    product = layer.delta.abs().amax() * x.abs().amax() if x.numel() and layer.delta.numel() else x.new_zeros(())
    layer.check("dW = δᵀ x", dw, call.gradients.get("weight"), product)
    layer.check("db = Σ δ", db, call.gradients.get("bias"), layer.delta)
    layer.check("dx = δ W", layer.delta @ w, call.dx.get("input"))
    if residual is not None:
        layer.backward.append("dr = ∂L/∂y")
        layer.check("dr = ∂L/∂y", dy, call.dx.get("residual"))
    layer.gradients = _gradients(call, weight="dW", bias="db")
    return layer


def _activation(call: Call) -> Layer | None:
    """An activation module of torch.nn or bp_torch: y = f(x)."""
    module: Any = call.module
    known = next(cls for cls in type(module).__mro__ if cls in RULES)
    name, parameters = fusion.row_of(module, known)
    assert call.output is not None
    assert call.dy is not None
    layer = Layer(call.name, type(call.module).__name__, [f"a = {name}(z)"], [f"δ = ∂L/∂a ⊙ {name}′(z)"])
    (layer.z,) = _numbers(call, "input")
    a, slope = _f(layer, name, parameters or {}, layer.z)
    layer.a, layer.delta = call.output, call.dy.double() * slope
    layer.check("a", a, call.output)
    layer.check(layer.backward[0], layer.delta, call.dx.get("input"))
    return layer


def _batch_norm(call: Call) -> Layer | None:
    """Batch norm of torch.nn or bp_torch: y = m/(1 - p) ⊙ f(γ x̂ + β (+ residual)), x̂ = (x - μ)/√(σ² + ε)."""
    module: Any = call.module
    (x,) = _numbers(call, "input")
    assert call.output is not None
    assert call.dy is not None
    over = [d for d in range(x.ndim) if d != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    batch = call.training or "running_mean" not in call.buffers
    if batch:
        mean, variance = x.mean(over, keepdim=True), x.var(over, correction=0, keepdim=True)
    else:
        mean, variance = (call.buffers[name].double().reshape(shape) for name in ("running_mean", "running_var"))
    ones = torch.ones(x.shape[1], dtype=x.dtype)
    gamma, beta = call.parameters.get("weight", ones).double(), call.parameters.get("bias", ones * 0).double()
    inverse = (variance + module.eps).rsqrt()
    hat = (x - mean) * inverse
    residual = call.inputs.get("residual")
    layer = Layer(call.name, type(module).__name__, ["x̂ = (x - μ)/√(σ² + ε)"], [])
    layer.z = gamma.reshape(shape) * hat + beta.reshape(shape) + (0 if residual is None else residual.double())
    name = getattr(module, "activation", None)
    layer.forward += ["z = γ x̂ + β" + ("" if residual is None else " + r"), *([f"a = {name}(z)"] if name else [])]
    a, slope = _f(layer, name, getattr(module, "activation_parameters", {}), layer.z)
    p, last = getattr(module, "dropout", 0.0) if call.training else 0.0, "a" if name else "z"
    terms, factor = [f"∂L/∂{last}", *([f"{name}′(z)"] if name else [])], torch.ones_like(x)
    if p > 0:
        factor = _replay(x, call.rng, lambda: functional.dropout(torch.ones_like(call.inputs["input"]), p, True))
        layer.forward.append(f"y = m ⊙ {last}/(1 - p)")
        terms, last = ["∂L/∂y", "m/(1 - p)", *terms[1:]], "y"
    layer.a, layer.delta = call.output, call.dy.double() * factor * slope
    delta, scale = layer.delta, gamma.reshape(shape) * inverse
    dgamma, dbeta = (delta * hat).sum(over), delta.sum(over)
    if batch:
        formula = "dx = γ/√(σ² + ε) (δ - mean δ - x̂ mean(δ x̂))"
        dx = scale * (delta - delta.mean(over, keepdim=True) - hat * (delta * hat).mean(over, keepdim=True))
    else:
        formula, dx = "dx = γ/√(σ² + ε) δ", scale * delta
    layer.backward = [f"δ = {' ⊙ '.join(terms)}", "dγ = Σ δ ⊙ x̂", "dβ = Σ δ", formula]
    layer.check(last, a * factor, call.output)
    layer.check("dγ = Σ δ ⊙ x̂", dgamma, call.gradients.get("weight"), delta * hat)
    layer.check("dβ = Σ δ", dbeta, call.gradients.get("bias"), delta)
    layer.check(formula, dx, call.dx.get("input"), scale * delta)
    if residual is not None:
        layer.check("dr = δ", delta, call.dx.get("residual"))
    layer.gradients = _gradients(call, weight="dγ", bias="dβ")
    return layer


def _dropout(call: Call) -> Layer | None:
    """torch.nn.Dropout and bp_torch's: y = m ⊙ x/(1 - p) in training, x in evaluation."""
    module: Any = call.module
    (x,) = _numbers(call, "input")
    assert call.output is not None
    assert call.dy is not None
    layer = Layer(call.name, type(module).__name__, ["y = x, in evaluation"], ["dx = ∂L/∂y"])
    factor: Tensor | float = 1.0
    if call.training and module.p > 0:
        ours = isinstance(module, nn.Dropout) or fusion.FORWARD in vars(module)
        dropout = functional.dropout if ours else torch.nn.functional.dropout
        factor = _replay(x, call.rng, lambda: dropout(torch.ones_like(call.inputs["input"]), module.p, True))
        layer.forward, layer.backward = ["y = m ⊙ x/(1 - p)"], ["dx = ∂L/∂y ⊙ m/(1 - p)"]
    layer.z, layer.a, layer.delta = x, call.output, call.dy.double() * factor
    layer.check("y", x * factor, call.output)
    layer.check(layer.backward[0], layer.delta, call.dx.get("input"))
    return layer


def _residual_sum(call: Call, skip: str, branch: Call, last: Call, symbol: str) -> Layer | None:
    """y = f(x + m/(1 - p) ⊙ branch), whose branch is a child and whose dropout draws after the child `last`."""
    module: Any = call.module
    p = module.dropout if call.training else 0.0
    (x,) = _numbers(call, skip)
    assert call.output is not None
    assert call.dy is not None
    assert branch.output is not None
    out, factor, name = branch.output, torch.ones_like(x), module.activation
    if p > 0:
        draw = functional.residual
        factor = _replay(
            out, last.rng_after, lambda: draw(torch.ones_like(out), torch.zeros_like(out), p=p, training=True)
        )
    layer = Layer(call.name, type(module).__name__, [], [])
    layer.z = x + factor * out.double()
    a, slope = _f(layer, name, module.activation_parameters, layer.z)
    layer.a, layer.delta = call.output, call.dy.double() * slope
    mask = "m/(1 - p) ⊙ " if p > 0 else ""
    layer.forward = [f"z = x + {mask}{symbol}", *([f"a = {name}(z)"] if name else [])]
    layer.backward = [f"δ = ∂L/∂a ⊙ {name}′(z)" if name else "δ = ∂L/∂z"]
    layer.backward += [f"∂L/∂{symbol} = {mask}δ", "dx = δ + dx of the branch"]
    layer.check("a" if name else "z", a, call.output)
    layer.check(f"∂L/∂{symbol} = {mask}δ", layer.delta * factor, branch.dy)
    return layer


def _residual(call: Call) -> Layer | None:
    module: Any = call.module
    branch = call.child(module.branch)
    layer = _residual_sum(call, "input", branch, branch, "F(x)")
    through = next(iter(branch.dx.values()), None)
    if layer is not None and layer.delta is not None and through is not None:
        layer.check("dx = δ + dx of F", layer.delta + through.double(), call.dx.get("input"), through)
    return layer


def _hidden(call: Call) -> Layer | None:
    """What a hidden layer of `MLP` with batch norm does after its linear layer and its norm: a residual's sum."""
    module: Any = call.module
    norm = call.child(module.norm)
    if module.residual and module.dropout > 0:
        layer = _residual_sum(call, "input", norm, norm, "BN")
        through = call.child(module.linear).dx.get("input")
        if layer is not None and layer.delta is not None and through is not None:
            total = layer.delta + through.double()
            layer.check("dx = δ + dx of the branch", total, call.dx.get("input"), through)
        return layer
    return None


def _dropout_add(call: Call) -> Layer | None:
    """bp_torch's DropoutAdd: y = m/(1 - p) ⊙ x + r."""
    module: Any = call.module
    x, r = _numbers(call, "input", "residual")
    assert call.output is not None
    assert call.dy is not None
    factor, p, mask = torch.ones_like(x), module.p if call.training else 0.0, ""
    if p > 0:
        ones = torch.ones_like(call.inputs["input"])
        factor = _replay(x, call.rng, lambda: functional.dropout_add(ones, torch.zeros_like(ones), p, True))
        mask = "m/(1 - p) ⊙ "
    layer = Layer(call.name, type(module).__name__, [f"z = {mask}x + r"], [f"dx = {mask}∂L/∂z", "dr = ∂L/∂z"])
    layer.z, layer.a, layer.delta = x * factor + r, call.output, call.dy.double()
    layer.check("z", layer.z, call.output)
    layer.check(layer.backward[0], layer.delta * factor, call.dx.get("input"))
    layer.check(layer.backward[1], layer.delta, call.dx.get("residual"))
    return layer


def _cross_entropy(call: Call) -> Layer | None:
    """Softmax cross-entropy of classes, the mean over rows, with label smoothing."""
    module: Any = call.module
    z, y = call.inputs["input"], call.inputs["target"]
    plain = z.ndim == 2 and not y.is_floating_point() and module.weight is None and module.reduction == "mean"
    if not plain or bool((y == module.ignore_index).any()) or call.output is None or call.dy is None:
        return None
    z, (n, k) = z.double(), z.shape
    target = (1 - module.label_smoothing) * torch.nn.functional.one_hot(y, k) + module.label_smoothing / k
    layer = Layer(call.name, type(module).__name__, [], [])
    smoothed = "(1 - ε) onehot(class) + ε/K" if module.label_smoothing else "onehot(class)"
    layer.forward, layer.backward = ["L = -mean Σ q log softmax(z)", f"q = {smoothed}"], ["δ = (softmax(z) - q)/N"]
    layer.z, layer.a = z, z.softmax(1)
    layer.delta = call.dy.double() * (z.softmax(1) - target) / n
    layer.check("L", -(target * z.log_softmax(1)).sum(1).mean(), call.output)
    layer.check(layer.backward[0], layer.delta, call.dx.get("input"))
    return layer


def _squared_error(call: Call) -> Layer | None:
    """The mean squared error."""
    module: Any = call.module
    y, target = call.inputs["input"], call.inputs["target"]
    if module.reduction != "mean" or y.shape != target.shape or call.output is None or call.dy is None:
        return None
    layer = Layer(call.name, type(module).__name__, ["L = mean (ŷ - y)²"], ["δ = 2 (ŷ - y)/(number of targets)"])
    layer.z = layer.a = y.double()
    layer.delta = call.dy.double() * 2 * (y.double() - target.double()) / y.numel()
    layer.check("L", (y.double() - target.double()).square().mean(), call.output)
    layer.check(layer.backward[0], layer.delta, call.dx.get("input"))
    return layer


RULES: dict[Any, Callable[[Call], Layer | None]] = {
    torch.nn.Linear: _dense,
    nn.Linear: _dense,
    nn.Dense: _dense,
    **{getattr(torch.nn, f"BatchNorm{d}d"): _batch_norm for d in (1, 2, 3)},
    **{getattr(nn, f"BatchNorm{d}d"): _batch_norm for d in (1, 2, 3)},
    **{getattr(nn, f"BatchNormAct{d}d"): _batch_norm for d in (1, 2, 3)},
    torch.nn.Dropout: _dropout,
    nn.Dropout: _dropout,
    nn.DropoutAdd: _dropout_add,
    nn.Residual: _residual,
    HiddenLayer: _hidden,
    torch.nn.CrossEntropyLoss: _cross_entropy,
    nn.CrossEntropyLoss: _cross_entropy,
    torch.nn.MSELoss: _squared_error,
    nn.MSELoss: _squared_error,
    **dict.fromkeys(fusion.ACTIVATION_KEYS, _activation),
}
