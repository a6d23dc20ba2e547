"""The formulas that users read, in the rows of activations, are those that are computed: read and evaluated here."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator

import pytest
import torch

from bp_torch.functions.activation import ACTIVATIONS
from bp_torch.functions.activation_table import Activation

ONE_BACKEND = "the rows alone; the kernels are held to them elsewhere"

FUNCTIONS = {name: getattr(math, name) for name in ("tanh", "sin", "cos", "exp", "log", "sqrt")} | {
    "abs": abs, "min": min, "max": max, "sign": lambda x: (x > 0) - (x < 0),
    "softplus": lambda x: math.log1p(math.exp(x)),
    "σ": lambda x: 1 / (1 + math.exp(-x)), "Φ": lambda x: math.erfc(-x / math.sqrt(2)) / 2,
    "φ": lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi),
}  # fmt: skip
CONSTANTS = {"e": math.e, "π": math.pi}
SELU = {"α": 1.6732632423543772848170429916717, "λ": 1.0507009873554804934193349852946}
SPELLED = {"√": "sqrt", "≤": "<=", "≥": ">=", "≠": "!=", "′": "_prime"}
RAISED = str.maketrans("⁻²³ˣʸ", "-23xy")


def read(text: str) -> str:
    """A formula as Python: |x| is abs(x), x² is x**2, a space between two values multiplies."""
    text = re.sub(r"\|([^|]*)\|", r"abs(\1)", text)
    text = re.sub(r"[⁻²³ˣʸ]+", lambda raised: f"**({raised[0].translate(RAISED)})", text)
    for sign, word in SPELLED.items():
        text = text.replace(sign, word)
    tokens = re.findall(r"[\d.]+|\w+|\*\*|[<>!]=|\S", text)
    words = {"if", "else"}
    python = tokens[:1]
    for before, after in itertools.pairwise(tokens):
        ends = before == ")" or (re.match(r"[\w.]", before) and before not in words | FUNCTIONS.keys())
        starts = after == "(" or (re.match(r"[\w.]", after) and after not in words)
        python += ["*", after] if ends and starts else [after]
    return " ".join(python)


def defined(text: str) -> dict[str, str]:
    """``"x t, t = tanh(x)"`` as {"": "x * t", "t": "tanh(x)"}."""
    first, *others = re.split(r", (?=\w+′? = )", text)
    return {"": read(first)} | {read(name): read(of) for name, of in (other.split(" = ") for other in others)}


def evaluate(text: str, known: dict[str, object], other: str = "") -> float:
    """The value of a formula; ``other`` is one that may define names of it."""
    names = defined(other) | defined(text)
    found = dict(known)
    for name in sorted(set(names) - {""}):  # u before u_prime
        found[name] = eval(names[name], {}, found)
    return float(eval(names[""], {}, found))


def rows() -> Iterator[tuple[str, Activation]]:
    for key, row in ACTIVATIONS.items():
        yield key, row
        if row.fused is not None:
            yield f"{key} of the output", row.fused


ROWS = dict(rows())


@pytest.mark.parametrize("scale", [1.0, 1.5], ids=["", "other parameters"])
@pytest.mark.parametrize("name", ROWS)
def test_what_is_told_is_what_is_computed(name: str, scale: float) -> None:
    row, whole = ROWS[name], ACTIVATIONS[name.removesuffix(" of the output")]
    parameters = [scale * value for value in whole.parameters.values()]
    known: dict[str, object] = FUNCTIONS | CONSTANTS
    # Symbols stand for the parameters in their order.
    told = re.findall(r"[^\W\d]+", " ".join(defined(row.formula).values()))
    own = defined(row.formula).keys() | {"x", "y", "if", "else"} | known.keys()
    symbols = [symbol for symbol in dict.fromkeys(told) if symbol not in own]
    known |= dict(zip(symbols, parameters, strict=True)) if parameters else {s: SELU[s] for s in symbols}
    kinks = whole.kinks(*parameters) if whole.kinks else ()
    x = torch.cat([torch.linspace(-9, 33, 127, dtype=torch.float64), torch.tensor(kinks, dtype=torch.float64)])
    y = row.f(x, *parameters)
    df = row.df(x if row.saves == "input" else y, *parameters)
    for number, value, slope in zip(x.tolist(), y.tolist(), df.tolist(), strict=True):
        at = known | {"x": number, "y": value}
        assert evaluate(row.formula, at) == pytest.approx(value, rel=1e-12, abs=1e-12), number
        assert evaluate(row.derivative, at, row.formula) == pytest.approx(slope, rel=1e-12, abs=1e-12), number


def test_the_notation() -> None:
    assert evaluate("x/2 (1 + tanh(u)), u = √(2/π) x³", FUNCTIONS | CONSTANTS | {"x": 1.0}) == pytest.approx(
        0.5 * (1 + math.tanh(math.sqrt(2 / math.pi)))
    )
    assert read("α (e⁻ˣ - 1) if |x| ≥ λ else 2 a x") == "α * ( e ** ( - x ) - 1 ) if abs ( x ) >= λ else 2 * a * x"
