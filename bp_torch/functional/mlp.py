"""Functional form of the multilayer perceptron."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.overrides import has_torch_function

from ..functions.function import call
from ..functions.mlp import MLPFunction
from ._common import check_same, check_tensor, epilogue_of, hand_over, lower_precision
from .dense import dense

__all__ = ["mlp"]


def mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    activation: str | None = "relu",
    activation_parameters: Mapping[str, float] | None = None,
    recompute: bool = False,
) -> Tensor:
    """A multilayer perceptron in one Function: f(x W₁ᵀ + b₁) and so on; the last layer has no activation.

    Where the Triton kernels run and the hidden layers have one width, a single kernel computes forward, and one more
    backward, if no layer is wider than 64 (float32, and backward on ROCm: 32).

    Args:
        input: x, (..., in_features).
        weights: W of each layer, (out_features, in_features).
        biases: b of each layer, (out_features) or None; None for no biases at all.
        activation: f of the hidden layers, a key of the activation table; None is the identity.
        activation_parameters: f's parameters that differ from the default, such as ``{"negative_slope": 0.2}``.
        recompute: keep no activations for backward, and compute them again there.

    Raises:
        RuntimeError: shapes that do not fit, or different dtypes or devices.
        ValueError: an unknown activation or parameter, no weights, or another number of biases.
    """
    Ws = tuple(weights)
    bs: tuple[Tensor | None, ...] = (None,) * len(Ws) if biases is None else tuple(biases)
    if has_torch_function((input, *Ws, *bs)):
        return hand_over(
            mlp, _in_parts, input, Ws, bs, activation=activation, activation_parameters=activation_parameters,
            recompute=recompute,
        )  # fmt: skip
    if not Ws or len(bs) != len(Ws):
        raise ValueError(f"mlp(): 'weights', 'biases': expected as many of both, got {len(Ws)} and {len(bs)}")
    check_tensor("mlp", input=input)
    if input.is_nested:
        return _in_parts(input, Ws, bs, activation=activation, activation_parameters=activation_parameters)
    e = epilogue_of("mlp", activation, activation_parameters)
    layers: list[Tensor | None] = []
    (x,) = lower_precision(input)
    width, of = (x.shape[-1] if x.dim() else -1), "'input'"
    for index, pair in enumerate(zip(Ws, bs, strict=True)):
        names = f"weights[{index}]", f"biases[{index}]"
        check_tensor("mlp", **dict(zip(names, pair, strict=True)))
        W, b = lower_precision(*pair)
        check_same("mlp", **{"input": x, names[0]: W, names[1]: b})
        if W.dim() != 2 or W.shape[1] != width:
            raise RuntimeError(
                f"mlp(): '{names[0]}': expected shape (out_features, {width}) to match {of}, got {tuple(W.shape)}"
            )
        if b is not None and b.shape != W.shape[:1]:
            raise RuntimeError(f"mlp(): '{names[1]}': expected shape ({W.shape[0]},), got {tuple(b.shape)}")
        layers += [W, b]
        width, of = W.shape[0], f"'{names[0]}'"
    output: tuple[Tensor, ...] = call(MLPFunction, x, e, recompute, *layers)
    return output[0]


def _in_parts(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    activation: str | None,
    activation_parameters: Mapping[str, float] | None,
    recompute: bool = False,
) -> Tensor:
    """:func:`mlp` as a :func:`dense` for each layer; what each keeps is its own."""
    *hidden, (W, b) = zip(weights, biases, strict=True)
    x = input
    for V, c in hidden:
        x = dense(x, V, c, activation=activation, activation_parameters=activation_parameters)
    return dense(x, W, b)
