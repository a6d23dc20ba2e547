"""The documentation: its site builds without a network, its generated pages are up to date, its code runs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from test_readme import Block, blocks_of, run

ONE_BACKEND = "nothing here depends on the backend"

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


# The tutorial in Chinese has the blocks of the English one: see below. check.md's are held by test_check.py.
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if ".zh-" not in path.name and path.name != "check.md"]
BLOCKS = [block for path in PAGES for block in blocks_of(path)]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    pages = list((tmp_path / "site").rglob("index.html"))
    assert len(pages) >= len(list(DOCS.rglob("*.md")))
    fetched = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?://[^\"]+\.(?:js|css|png|woff2?)\"")
    for page in pages:  # nothing is fetched when it is read
        assert not fetched.search(page.read_text("utf-8")), page


def test_every_page_is_in_the_navigation() -> None:
    yaml = pytest.importorskip("yaml")

    def leaves(node: object) -> list[str]:
        if isinstance(node, str):
            return [node]
        nested = node.values() if isinstance(node, dict) else node
        assert not isinstance(nested, (int, float, type(None)))
        return [leaf for child in nested for leaf in leaves(child)]  # type: ignore[attr-defined]

    listed = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_pages_of_configurations_are_up_to_date() -> None:
    pytest.importorskip("lightning")
    pages = script("configurations").pages()
    for path, text in pages.items():
        assert (DOCS / path).read_text("utf-8") == text, f"{path}: run python docs/configurations.py"
    assert {f"techniques/{path.name}" for path in (DOCS / "techniques").glob("*.md")} | {"applications.md"} == set(
        pages
    )


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *DOCS.rglob("*.md")], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text("utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_figures_of_the_layers_can_be_drawn() -> None:
    pytest.importorskip("matplotlib")
    module = script("figures")
    names = {path.stem for path in (DOCS / "layers").glob("*.md")} - {"index"}
    assert set(module.FIGURES) == names
    for name in ("dense", "losses", "softmax"):
        assert module.FIGURES[name]().axes


@pytest.mark.parametrize("name", ["README", "docs/tutorial"])
def test_chinese_and_english_have_the_same_code(name: str) -> None:
    block = re.compile(r"^```(?:python|text)\n.*?^```$", re.DOTALL | re.MULTILINE)
    english, chinese = ((ROOT / f"{name}{language}.md").read_text("utf-8") for language in ("", ".zh-CN"))
    assert block.findall(english) == block.findall(chinese) != []


@pytest.mark.parametrize("block", BLOCKS, ids=[block.name for block in BLOCKS])
def test_block(block: Block, tmp_path: Path) -> None:
    run(block, tmp_path)
