"""Every way to import from torch.nn works with bp_torch.nn, and gives the same module objects."""

from __future__ import annotations

import importlib
import subprocess
import sys

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
