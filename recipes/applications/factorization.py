"""Matrix factorization by alternating least squares in numpy: what the recommender must stand beside.

scikit-learn has no factorization of a matrix with missing entries that has biases, so it is written out here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


class Factorization:
    """r̂(u, i) = μ + b_u + c_i + p_u · q_i, fitted to ratings by alternating ridge regressions.

        minimize Σ (r - r̂)² + λ_b (Σ_u b_u² + Σ_i c_i²) + λ (Σ_u ‖p_u‖² + Σ_i ‖q_i‖²)

    With the items fixed, each user's (b_u, p_u) is the solution of (AᵀA + Λ) w = Aᵀ t, where A has a row (1, q_i) and
    t an entry r - μ - c_i for each of the user's ratings; then the same with users and items exchanged. A user or item
    without ratings keeps zeros, so its prediction is what the others say.

    Args:
        users, items: how many there are.
        rank: the length of p and q; 0 leaves the biases alone.
        bias_penalty, penalty: λ_b and λ.
        sweeps: how often users and items are solved for.
        seed: of the first q, normal with deviation 0.1.

    Source: Y. Koren, R. Bell, C. Volinsky, Matrix Factorization Techniques for Recommender Systems, 2009.
    """

    def __init__(
        self, users: int, items: int, rank: int, bias_penalty: float, penalty: float, sweeps: int = 10, seed: int = 0
    ) -> None:
        self.rank, self.bias_penalty, self.penalty, self.sweeps, self.seed = rank, bias_penalty, penalty, sweeps, seed
        self.users, self.items = users, items

    def fit(self, user: Array, item: Array, rating: Array) -> Factorization:
        """Fit to ratings (N,) of users (N,) and items (N,), both integers from 0."""
        generator = np.random.default_rng(self.seed)
        self.mean = float(rating.mean())
        # A column for the bias, then the factors.
        self.user = np.zeros((self.users, 1 + self.rank))
        self.item = np.zeros((self.items, 1 + self.rank))
        self.item[:, 1:] = generator.normal(0, 0.1, (self.items, self.rank))
        self.item[np.bincount(item, minlength=self.items) == 0] = 0
        by_user, by_item = groups(user, self.users), groups(item, self.items)
        target = rating - self.mean
        for _ in range(self.sweeps):
            self._solve(self.user, self.item[item], target, by_user)
            self._solve(self.item, self.user[user], target, by_item)
        return self

    def _solve(self, solved: Array, other: Array, target: Array, rows: Sequence[Array]) -> None:
        penalty = np.diag([self.bias_penalty] + [self.penalty] * self.rank)
        t = target - other[:, 0]
        a = other.copy()
        a[:, 0] = 1
        for i, index in enumerate(rows):
            if len(index):
                one = a[index]
                solved[i] = np.linalg.solve(one.T @ one + penalty, one.T @ t[index])

    def predict(self, user: Array, item: Array) -> Array:
        """r̂ (N,) for users (N,) and items (N,)."""
        p, q = self.user[user], self.item[item]
        return self.mean + p[:, 0] + q[:, 0] + (p[:, 1:] * q[:, 1:]).sum(1)


def groups(index: Array, count: int) -> list[Array]:
    """For each number below count, the places where it stands in index."""
    order = np.argsort(index, kind="stable")
    return np.split(order, np.cumsum(np.bincount(index, minlength=count))[:-1])
