"""README's Python blocks run, each in a Python of its own, and print what the text block after them says."""

from __future__ import annotations

import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md"]  # README.zh-CN.md has the same blocks: test_docs.py

# A python block, and the text block that follows it with nothing but blank lines between.
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```$(?:\s*^```text\n(?P<output>.*?)^```$)?", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.]*\w)")


class Block(NamedTuple):
    name: str
    code: str
    output: str | None


def blocks_of(path: Path) -> list[Block]:
    """The Python blocks of a document, named by file and line."""
    text = path.read_text(encoding="utf-8")
    return [
        Block(f"{path.name}:{text.count(chr(10), 0, match.start()) + 1}", match["code"], match["output"])
        for match in BLOCK.finditer(text)
    ]


def assert_same_output(printed: str, stated: str) -> None:
    """Word for word, but that decimals may differ by one in the last digit stated: processors round differently."""
    assert NUMBER.sub("#", printed.strip()) == NUMBER.sub("#", stated.strip()), f"{printed}\nis not\n{stated}"
    for got, want in zip(NUMBER.findall(printed), NUMBER.findall(stated), strict=True):
        exponent = Decimal(want).as_tuple().exponent
        assert isinstance(exponent, int)
        unit = Decimal(1).scaleb(exponent) if "." in want or "e" in want.lower() else Decimal(0)
        assert abs(Decimal(got) - Decimal(want)) <= unit, f"printed {got}, stated {want}, in\n{printed}"


BLOCKS = [block for path in DOCUMENTS for block in blocks_of(path)]


def test_readme_has_a_python_block_with_its_output() -> None:
    assert any(block.output for block in blocks_of(ROOT / "README.md"))


def run(block: Block, folder: Path) -> None:
    """Run a block in a Python of its own, with warnings as errors, and compare what it prints."""
    script = folder / "block.py"
    script.write_text(block.code, encoding="utf-8")
    # On the kernels' backend Triton's interpreter computes with numpy, which warns of infinities where a GPU does not.
    command = [sys.executable, "-W", "error", "-W", "ignore::RuntimeWarning:triton.runtime.interpreter", script]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, f"{block.name}\n{result.stdout}\n{result.stderr}"
    if block.output is not None:
        assert_same_output(result.stdout, block.output)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.name for block in BLOCKS])
def test_block(block: Block, tmp_path: Path) -> None:
    run(block, tmp_path)


@pytest.mark.parametrize(
    ("printed", "stated"),
    [
        ("loss 0.5", "loss 0.7"),
        ("loss 0.50", "accuracy 0.50"),
        ("3 layers", "4 layers"),
        ("1 2", "1"),
        ("-0.25", "0.25"),
    ],
)
def test_other_output_is_refused(printed: str, stated: str) -> None:
    with pytest.raises(AssertionError):
        assert_same_output(printed, stated)


@pytest.mark.parametrize(
    ("printed", "stated"), [("loss 0.5001\n", "loss 0.5002"), ("1.0e-07", "1.1e-07"), ("a 3", "a 3\n")]
)
def test_last_digit_may_differ(printed: str, stated: str) -> None:
    assert_same_output(printed, stated)
