"""Penalties, called with parameters: ``loss + penalty(model.parameters())``."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .. import functional
from ..functional._common import check_probability
from ..functional.penalty import check_weight
from ._leaf import Leaf

__all__ = ["ElasticNetPenalty", "L1Penalty", "L2Penalty"]


class L1Penalty(Leaf):
    """R = weight · Σ |w|. Arguments and errors as :func:`bp_torch.functional.l1_penalty`."""

    def __init__(self, weight: float) -> None:
        check_weight("L1Penalty", weight)
        super().__init__()
        self.weight = weight

    def forward(self, parameters: Iterable[Tensor]) -> Tensor:
        return functional.l1_penalty(parameters, self.weight)

    def extra_repr(self) -> str:
        return f"weight={self.weight}"


class L2Penalty(Leaf):
    """R = weight · Σ w², without a ½. Arguments and errors as :func:`bp_torch.functional.l2_penalty`."""

    def __init__(self, weight: float) -> None:
        check_weight("L2Penalty", weight)
        super().__init__()
        self.weight = weight

    def forward(self, parameters: Iterable[Tensor]) -> Tensor:
        return functional.l2_penalty(parameters, self.weight)

    def extra_repr(self) -> str:
        return f"weight={self.weight}"


class ElasticNetPenalty(Leaf):
    """R = weight · (l1_ratio · Σ |w| + (1 - l1_ratio) · Σ w²).

    Arguments and errors as :func:`bp_torch.functional.elastic_net_penalty`.
    """

    def __init__(self, weight: float, l1_ratio: float = 0.5) -> None:
        check_weight("ElasticNetPenalty", weight)
        check_probability("ElasticNetPenalty", l1_ratio, "l1_ratio")
        super().__init__()
        self.weight = weight
        self.l1_ratio = l1_ratio

    def forward(self, parameters: Iterable[Tensor]) -> Tensor:
        return functional.elastic_net_penalty(parameters, self.weight, self.l1_ratio)

    def extra_repr(self) -> str:
        return f"weight={self.weight}, l1_ratio={self.l1_ratio}"
