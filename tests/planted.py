"""What check() must catch, and must not: each defect of the files defects*.py beside its corrected twin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from defects import (
    BiasOff,
    DeafDropout,
    DenseStrides,
    Dropout,
    EvaluationAsTraining,
    Float32Constant,
    Float32Inside,
    FreesItsMask,
    Int32Offsets,
    KeepsEachOutput,
    KeepsOutput,
    KeepsUnsaved,
    LastBlockDropped,
    Linear,
    Masked,
    NaNSwallowed,
    Overflows,
    OverwritesGradient,
    OverwritesSaved,
    ReLU,
    RightBatchNorm,
    RowScale,
    SavedIntermediate,
    SharesState,
    Softplus,
    Square,
    breaks_graph,
    one_pass,
    two_pass,
    whole,
)
from defects_in_data import (
    AsksForChannels,
    Bfloat16Inside,
    HalfOfSum,
    MeanTimesRows,
    Squeezes,
    TakesColumnsTogether,
    TakesStridesOver,
    TenthOff,
    ViewsGradient,
    exp_less_one,
)
from defects_in_use import (
    AnyOrder,
    Blend,
    Centre,
    CopyScales,
    FirstTangent,
    ForgetsState,
    Gate,
    GateFrozen,
    IgnoresInDims,
    Lookup,
    Magnitude,
    NeedsBoth,
    NoConjugate,
    NumpyDropout,
    OneBatchSize,
    OtherSign,
    Product,
    Quotient,
    Rotate,
    Rotation,
    RotationNoConjugate,
    RunningSum,
    Scale,
    Sine,
    SineAndCosine,
    SumsSamples,
    Times,
    TrustsNeeds,
    ZeroForNone,
    ZeroTimesInfinity,
    tanh_and_a_little,
)
from seeds import seeded
from torch import Tensor


def t(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(*shape, generator=seeded(seed), dtype=wide).to(dtype)


@dataclass(frozen=True)
class Planted:
    wrong: Any
    right: Any
    inputs: tuple[Any, ...]
    check: str
    """The check that must catch it."""
    says: str
    """A part of what it must say."""
    also: tuple[str, ...] = ()
    """Other checks that the same defect fails, rightly."""
    reference: Any = None
    """What is given as reference=."""
    shape: tuple[int, ...] | None = None
    """The shape of the first tensor in the smallest example."""


PLANTED: dict[str, Planted] = {
    "bias gradient off by 1 %": Planted(
        BiasOff, Linear, (t(4, 5), t(3, 5, seed=1), t(3, seed=2)), "gradcheck", "the gradient of b[",
        # Compiled inside a transform, a user's Function is differentiated through its forward: not off there.
        also=("zeros", "one-row", "batch-sizes", "compiled-transforms"), shape=(1, 5),
    ),
    "double backward through a saved intermediate": Planted(
        SavedIntermediate, Square, (t(4, 5),), "gradgradcheck", "the gradient's gradient by x[", shape=(1, 5),
    ),
    "gradient wrong for a zero-stride upstream": Planted(
        DenseStrides, ReLU, (t(4, 5),), "zero-stride-gradients", "upstream gradient: the gradient of x is",
        also=("strided-gradients", "large-offsets", "compile"),
    ),
    "evaluation-mode batch norm with training formulas": Planted(
        EvaluationAsTraining(5), RightBatchNorm(5), (t(6, 5),), "evaluation", "in evaluation mode the gradient of",
    ),
    "dropout whose mask changes on recompute": Planted(
        DeafDropout, Dropout, (t(8, 8),), "checkpoint", "recomputed in backward", also=("seed", "compile"),
    ),
    "backward overwrites its saved tensor": Planted(
        OverwritesSaved, ReLU, (t(4, 5),), "overwriting", "backward overwrites",
        also=("checkpoint", "retain-graph", "gradcheck", "gradgradcheck", "batched-gradients", "strided-gradients",
              "zero-stride-gradients", "undefined-gradients", "large-offsets", "compile"), shape=(1, 5),
    ),
    "backward overwrites the upstream gradient": Planted(
        OverwritesGradient, ReLU, (t(4, 5),), "overwriting", "overwrites the upstream gradient",
        also=("gradcheck", "gradgradcheck", "strided-gradients", "zero-stride-gradients", "large-offsets"),
        shape=(1, 5),
    ),
    "float32 arithmetic inside a float64 function": Planted(
        Float32Inside, Softplus, (t(4, 5),), "float64", "lower precision inside", also=("gradcheck",), shape=(1, 5),
    ),
    "float32 constant inside a float64 backward": Planted(
        Float32Constant, Softplus, (t(4, 5),), "float64", "a constant of lower precision", shape=(1, 5),
    ),
    "swallowed NaN": Planted(NaNSwallowed, ReLU, (t(4, 5),), "nan", "that depends on it is 0", shape=(1, 5)),
    "last partial block dropped": Planted(
        LastBlockDropped, RowScale, (t(4, 5), t(5, seed=1)), "odd-sizes", "with 17 rows", shape=(17, 5),
    ),
    "int32 overflow in offsets": Planted(
        Int32Offsets, RowScale, (t(4, 5), t(5, seed=1)), "large-offsets", "2³¹ elements apart: the output is",
        also=("compile",), shape=(2, 5),
    ),
    "graph break": Planted(breaks_graph, whole, (t(4, 5).abs(),), "compile", "graph break"),
    "overflow in the tails": Planted(Overflows, Softplus, (t(4, 5),), "tails", "at ±100 in float32"),
    "one-pass variance": Planted(one_pass, two_pass, (t(4, 5),), "large-mean", "at a mean of"),
    "input kept outside save_for_backward": Planted(
        KeepsUnsaved, lambda x: x**3, (t(4, 5),), "in-place", "does not refuse", also=("gradgradcheck",), shape=(1, 5),
    ),
    "weight gradient wrong when the input is frozen": Planted(
        GateFrozen, Gate, (t(4, 5), t(5, seed=1)), "frozen", "w alone needs a gradient", shape=(1, 5),
    ),
    "gradient left out under a compiled transform": Planted(
        TrustsNeeds, Scale, (t(4, 5), t(5, seed=1)), "compiled-transforms", "is_compiling()",
    ),
    "output kept for forward mode": Planted(
        KeepsOutput, ReLU, (t(4, 5),), "leaks", "checkpointed, each call leaves",
    ),
    "each output kept": Planted(KeepsEachOutput, ReLU, (t(4, 5),), "leaks", "each call leaves", also=("compile",)),
    "state shared by two calls": Planted(
        SharesState, Masked, (t(4, 5),), "two-calls", "with a later call on",  # other values, or another number of rows
        also=("leaks", "compile"), shape=(1, 5),
    ),
    "mask freed by the first backward": Planted(
        FreesItsMask, Masked, (t(4, 5),), "retain-graph", "raises TypeError: unsupported operand type(s)",
        also=("gradcheck", "batched-gradients", "undefined-gradients", "strided-gradients", "zero-stride-gradients",
              "large-offsets"),
    ),
    "one of two gradients missing": Planted(
        NeedsBoth, SineAndCosine, (t(4, 5),), "undefined-gradients", "raises TypeError: unsupported operand type(s)",
    ),
    "vmap rule that takes in_dim 0 for none": Planted(
        ZeroForNone, Times, (t(4, 5), t(4, 5, seed=1)), "vmap", "(in_dims 0, out_dims 0): the output is shape",
        also=("per-sample-gradients",),
    ),
    "vmap rule that ignores in_dims": Planted(
        IgnoresInDims, RunningSum, (t(4, 5),), "vmap", "(in_dims 1, out_dims -1): the output is shape",
    ),
    "complex gradient without the conjugate": Planted(
        NoConjugate, Rotate, (t(4, 3), t(3, dtype=torch.complex64)), "gradcheck", "the gradient of view_as_real(w)[",
        also=("zeros", "one-row", "batch-sizes"), shape=(1, 3),
    ),
    "complex parameter's gradient without the conjugate": Planted(
        RotationNoConjugate(), Rotation(), (t(4, 3),), "gradcheck", "the gradient of view_as_real(w)[",
        also=("zeros", "one-row", "batch-sizes", "evaluation"), shape=(1, 3),
    ),
    "NaN at zero": Planted(
        ZeroTimesInfinity, Magnitude, (t(4, 5),), "zeros", "where x is 0, the gradient of x[0, 0] is nan", shape=(1, 5),
    ),
    "wrong at one zero": Planted(
        Quotient, Product, (t(4, 5),), "zeros", "where x has a column of zeros, the gradient of x[0, 0] is",
        shape=(1, 5),
    ),
    "right for one batch size": Planted(
        OneBatchSize, Centre, (t(6, 5),), "batch-sizes", "for 2 rows the gradient of x[",
        also=("one-row", "compile"), shape=(2, 5),
    ),
    "parameter missing from state_dict": Planted(ForgetsState(), Lookup(), (t(4, 5),), "state-dict", "leaves"),
    "columns taken to lie side by side": Planted(
        TakesColumnsTogether, ReLU, (t(4, 5),), "strided-inputs", "with sliced inputs: the output is",
        also=("zero-stride-inputs", "vmap"),
    ),
    "strides of the input taken over": Planted(
        TakesStridesOver, ReLU, (t(4, 5),), "zero-stride-inputs", "raises RuntimeError: unsupported operation",
        also=("vmap", "per-sample-gradients"),
    ),
    "flat view of the upstream gradient": Planted(
        ViewsGradient, ReLU, (t(4, 5),), "strided-gradients", "raises RuntimeError: view size is not compatible",
        also=("zero-stride-gradients", "large-offsets"),
    ),
    "bfloat16 inside a float32 function": Planted(
        Bfloat16Inside, Linear, (t(4, 5), t(3, 5, seed=1), t(3, seed=2)), "float32", "float32: the output is off by",
        also=("tails",),
    ),
    "exp(x) - 1 of small x": Planted(
        exp_less_one, torch.expm1, (0.01 * t(4, 5),), "bfloat16", "bfloat16: the output is off by",
        also=("float32", "float16"),
    ),
    "overflow in float16": Planted(
        HalfOfSum, ReLU, (torch.linspace(-5e4, 5e4, 20).reshape(4, 5),), "float16", "float16: the output is off by inf",
    ),
    "10 % off under autocast": Planted(
        TenthOff, Linear, (t(4, 5), t(3, 5, seed=1), t(3, seed=2)), "autocast", "under autocast: the output is off by",
    ),
    "mean over no rows": Planted(
        MeanTimesRows, Linear, (t(4, 5), t(3, 5, seed=1), t(3, seed=2)), "empty-batch",
        "the gradient of b over no rows is not 0",
    ),
    "a single row squeezed": Planted(
        Squeezes, Linear, (t(4, 5), t(3, 5, seed=1), t(3, seed=2)), "one-row", "returned an invalid gradient",
        also=("odd-sizes", "per-sample-gradients"),
    ),
    "layout of several upstream gradients": Planted(
        AsksForChannels, ReLU, (t(4, 5),), "batched-gradients", "raises RuntimeError: NYI: querying is_contiguous",
    ),
    "gradient of the batch for each sample": Planted(
        SumsSamples, Scale, (t(4, 5), t(5, seed=1)), "per-sample-gradients", "each row's own gradient by vmap(grad)",
    ),
    "sign of forward mode": Planted(
        OtherSign, Sine, (t(4, 5),), "forward-mode", "the derivative along a tangent of x is", shape=(1, 5),
    ),
    "tangents that are not added": Planted(
        FirstTangent, Blend, (t(4, 5), t(4, 5, seed=1)), "forward-mode",
        "the derivative along tangents of x, w at once is",
    ),
    "sum in any order": Planted(
        AnyOrder, RowScale, (t(40, 5), t(5, seed=1)), "determinism",
        "a second call's gradient of w is another in its last digits", also=("compile",),
    ),
    "dropout by numpy's generator": Planted(
        NumpyDropout, Dropout, (t(8, 8),), "seed", "after the same torch.manual_seed a second call gives",
        also=("checkpoint", "compile"),
    ),
    "copies scaled again": Planted(
        CopyScales(), Lookup(), (t(4, 5),), "copies", "after copy.deepcopy: the output is",
        also=("compile", "state-dict"),
    ),
    "unlike the reference": Planted(
        tanh_and_a_little, Square, (t(4, 5),), "reference", "unlike the reference: the output is", reference=Square,
    ),
}  # fmt: skip
