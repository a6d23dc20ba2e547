"""Every way to import from torch.nn works with bp_torch.nn, and gives the same module objects."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch

import bp_torch

ONE_BACKEND = "about imports"

LINES = [
    "import bp_torch.nn.functional as F; assert F is bp_torch.functional",
    "from bp_torch.nn import functional, init, modules, parameter, utils; assert utils is torch.nn.utils",
    "from bp_torch.nn.functional import pad, relu; assert relu is bp_torch.functional.relu",
    "from bp_torch.nn.init import xavier_uniform_; assert xavier_uniform_ is torch.nn.init.xavier_uniform_",
    "from bp_torch.nn.utils import clip_grad_norm_; assert clip_grad_norm_ is torch.nn.utils.clip_grad_norm_",
    "from bp_torch.nn.parameter import Parameter; assert Parameter is torch.nn.Parameter",
    "from bp_torch.nn.modules import Conv2d; assert Conv2d is torch.nn.Conv2d",
    # Not loaded by ``import torch``: a second copy would have classes of its own.
    "import bp_torch.nn.utils.prune as p, torch.nn.utils.prune as q; assert p is q",
    "from bp_torch.nn.utils.rnn import PackedSequence; assert PackedSequence is torch.nn.utils.rnn.PackedSequence",
    "import bp_torch.nn.dense, bp_torch.nn; assert bp_torch.nn.dense.Linear is bp_torch.nn.Linear",
]


@pytest.mark.parametrize("line", LINES)
def test_import(line: str) -> None:
    exec(line, {"bp_torch": bp_torch, "torch": torch})


def test_imports_in_a_new_process() -> None:
    """Whatever else this process has imported, and in torch nothing is renamed."""
    program = ["import torch, bp_torch", *LINES, "assert torch.nn.utils.prune.__spec__.name == 'torch.nn.utils.prune'"]
    subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(program)], check=True)


@pytest.mark.parametrize("name", ["nothing", "utils.nothing", "functional.nothing"])
def test_a_name_that_torch_does_not_have(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="nothing"):
        importlib.import_module(f"bp_torch.nn.{name}")


FOLDERS = {"bp_torch": "bp_torch", "triton_kernels": "bp_torch.triton_kernels", "recipes": "bp_torch.recipes"}
"""Folder → the package that it is installed as."""
ROOT = Path(__file__).parent.parent


class Source:
    """A module, and what it uses of this package, wherever it says so, but for what a type checker alone reads."""

    def __init__(self, folder: str, path: Path) -> None:
        parts = (FOLDERS[folder], *path.relative_to(ROOT / folder).with_suffix("").parts)
        self.folder = folder
        self.name = ".".join(parts).removesuffix(".__init__")
        self.package = ".".join(parts[:-1])
        nodes = list(statements(ast.parse(path.read_text(encoding="utf-8"))))
        pairs = [pair for node in nodes for pair in self.imported(node)]
        self.imports = {there for _, there in pairs}
        self.names = self.imports | {name for node in nodes for name in reached(node, dict(pairs))}
        """These, and what is reached through them."""

    def imported(self, node: ast.AST) -> Iterator[tuple[str, str]]:
        """(the name here, the name there) of each name that an import statement brings."""
        if isinstance(node, ast.Import):
            names = [(a.asname or a.name, a.name) for a in node.names]
            names += [(a.name.split(".")[0],) * 2 for a in node.names if not a.asname]
        elif isinstance(node, ast.ImportFrom):
            base = self.package.rsplit(".", node.level - 1)[0] if node.level else ""
            names = [(a.asname or a.name, ".".join(filter(None, (base, node.module, a.name)))) for a in node.names]
        else:
            return
        yield from ((here, there) for here, there in names if there.split(".")[0] == "bp_torch")


def reached(node: ast.AST, imports: dict[str, str]) -> Iterator[str]:
    """The attribute of something imported that a node is, if it is one."""
    rest: list[str] = []
    while isinstance(node, ast.Attribute):
        rest, node = [node.attr, *rest], node.value
    if rest and isinstance(node, ast.Name) and node.id in imports:
        yield ".".join((imports[node.id], *rest))


def statements(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield child
            yield from statements(child)


@pytest.fixture(scope="module")
def package() -> list[Source]:
    return [Source(folder, path) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_imports_go_round_in_no_circle(package: list[Source]) -> None:
    """Those inside functions count too."""
    modules = {source.name for source in package}
    graph = {s.name: {n if n in modules else n.rpartition(".")[0] for n in s.imports} for s in package}
    assert {"bp_torch.functions.function", "bp_torch.functional.dense"} <= graph["bp_torch.functional.mlp"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(" imports ".join(reversed(circle.args[1])))


def test_what_is_private_to_a_folder_stays_in_it(package: list[Source]) -> None:
    def is_of(folder: str, name: str) -> bool:
        return folder == max(
            (f for f, top in FOLDERS.items() if f"{name}.".startswith(f"{top}.")), key=FOLDERS.__getitem__
        )

    used = {(s.name, name) for s in package for name in s.names if not is_of(s.folder, name)}
    assert ("bp_torch.recipes.callbacks.convert", "bp_torch.conversion_report") in used
    assert not [(by, name) for by, name in used if any(p[0] == "_" and p[:2] != "__" for p in name.split("."))]
