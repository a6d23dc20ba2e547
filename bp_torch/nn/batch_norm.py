"""Batch normalization: torch.nn's classes, those with a residual, activation and dropout, and the synchronized one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import functional
from .._torch import BatchNormBase
from ..functional._common import activation_arguments, check_probability
from ._leaf import Leaf

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "DistributedBatchNorm",
    "SyncBatchNorm",
]


OfChannels = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
How = tuple[bool, Any, float]


def arguments(module: Any, input: Tensor) -> tuple[OfChannels, How]:
    """What a batch norm module, torch.nn's own with ``convert``, says to its functional form: running statistics, γ and
    β; whether the batch's own statistics count, how far it moves the running ones, and eps. Counts the batch.
    """
    module._check_input_dim(input)
    training = module.training or (module.running_mean is None and module.running_var is None)
    tracked = not module.training or module.track_running_stats
    mean, var = (module.running_mean, module.running_var) if tracked else (None, None)
    return (mean, var, module.weight, module.bias), (training, _momentum(module), module.eps)


def _momentum(module: Any) -> Any:
    """Counts the batch; how far it moves the running statistics: by 1/batches for a cumulative average."""
    if module.training and module.track_running_stats and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            return 1.0 / module.num_batches_tracked.double()
    return 0.0 if module.momentum is None else module.momentum


class _BatchNorm(BatchNormBase, Leaf):
    def forward(self, input: Tensor) -> Tensor:
        of_channels, how = arguments(self, input)
        return functional.batch_norm(input, *of_channels, *how)


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """y = γ x̂ + β over (N, C) or (N, C, L). Arguments, state_dict and repr of :class:`torch.nn.BatchNorm1d`."""


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """y = γ x̂ + β over (N, C, H, W). Arguments, state_dict and repr of :class:`torch.nn.BatchNorm2d`."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """y = γ x̂ + β over (N, C, D, H, W). Arguments, state_dict and repr of :class:`torch.nn.BatchNorm3d`."""


class _Act(_BatchNorm):
    """y = dropout(f(γ x̂ + β + residual)), in one Function.

    Args:
        activation: f, a key of the activation table; None is the identity.
        activation_parameters: f's parameters that differ from the default, such as ``{"negative_slope": 0.2}``.
        dropout: the probability p that dropout sets an element to zero in training.

    The other arguments are torch.nn's (``options``: its keywords, such as ``bias``), and so is the state_dict.
    ``residual`` has the input's shape.

    Raises:
        ValueError: an unknown activation or parameter, or p outside [0, 1].
    """

    activation: str | None = None
    activation_parameters: Mapping[str, float] = {}
    dropout: float = 0.0

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        activation_parameters: Mapping[str, float] | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        activation_arguments(type(self).__name__, activation, activation_parameters)
        check_probability(type(self).__name__, dropout, "dropout")
        options |= {"device": device, "dtype": dtype}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
        if activation is not None:  # else it has the attributes of its namesake and no others
            self.activation = activation
            self.activation_parameters = dict(activation_parameters or {})
        if dropout > 0:
            self.dropout = dropout

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        of_channels, how = arguments(self, input)
        return functional.batch_norm_act(input, *of_channels, residual, *how, **_fused(self), dropout_training=True)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        text += "" if self.activation is None else f", activation={self.activation!r}"
        text += f", dropout={self.dropout}" if self.dropout else ""
        return text + (f", activation_parameters={self.activation_parameters}" if self.activation_parameters else "")


def _fused(module: torch.nn.Module) -> dict[str, Any]:
    """What follows the normalization: nothing in torch's SyncBatchNorm, to which ``convert`` gives our forward."""
    if not isinstance(module, _Act):
        return {}
    p = module.dropout if module.training else 0.0
    return {"activation": module.activation, "activation_parameters": module.activation_parameters, "p": p}


class BatchNormAct1d(_Act, BatchNorm1d):
    __doc__ = _Act.__doc__


class BatchNormAct2d(_Act, BatchNorm2d):
    __doc__ = _Act.__doc__


class BatchNormAct3d(_Act, BatchNorm3d):
    __doc__ = _Act.__doc__


def _has_other_ranks(process_group: Any) -> bool:
    """Whether there are others whose rows count too."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(process_group) > 1


class DistributedBatchNorm(_Act):
    """y = dropout(f(γ x̂ + β + residual)), in training by the statistics of all ranks' rows.

    It also works on the CPU, with gloo. Arguments, state_dict and repr of :class:`torch.nn.SyncBatchNorm`;
    ``activation``, ``activation_parameters`` and ``dropout`` as :class:`BatchNormAct1d`. In evaluation, without a
    process group, and in a group of one it is an ordinary batch norm.
    Ranks may differ in their number of rows, and a rank may have none; every rank must take part in every forward and
    backward. The backward can be differentiated again.

    DistributedDataParallel takes it on the CPU, where it refuses :class:`SyncBatchNorm`, the same layer as a subclass
    of torch's.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        activation_parameters: Mapping[str, float] | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        options |= {"activation": activation, "activation_parameters": activation_parameters, "dropout": dropout}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.process_group = process_group

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if not (self.training and _has_other_ranks(self.process_group)):
            return _Act.forward(self, input, residual)
        of_channels, (_, momentum, eps) = arguments(self, input)
        return functional.sync_batch_norm(
            input, *of_channels, residual, momentum, eps, process_group=self.process_group, **_fused(self)
        )

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.size(1) == 0:
            raise ValueError(f"{type(self).__name__} number of input channels should be non-zero")

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """``module`` with each batch norm in it replaced by this class, on the same parameters and buffers.

        An activation and a dropout are kept. If ``module`` itself is a batch norm, a new one is returned.
        """
        output = module
        if isinstance(module, BatchNormBase):
            options: dict[str, Any] = {"process_group": process_group}
            if isinstance(module, _Act):
                for name in ("activation", "activation_parameters", "dropout"):
                    options[name] = getattr(module, name)
            output = cls(
                module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, **options
            )
            output.weight, output.bias = module.weight, module.bias
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                setattr(output, name, getattr(module, name))
            output.training = module.training
            if hasattr(module, "qconfig"):
                output.qconfig = module.qconfig
        for name, child in module.named_children():
            output.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return output


class SyncBatchNorm(DistributedBatchNorm, torch.nn.SyncBatchNorm):
    """:class:`DistributedBatchNorm` as a subclass of :class:`torch.nn.SyncBatchNorm`.

    DistributedDataParallel refuses every subclass of torch's on the CPU: give it :class:`DistributedBatchNorm` there.
    """
