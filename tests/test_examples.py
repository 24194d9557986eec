"""The examples run as their docstrings say, print what they promise, and use what users may use."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "examples").glob("*.py"))
EXAMPLES = {
    "post_training": ([], ("cosine mean", "merged back")),
    "conv": (["--model", "tiny", "--keep", "0.9", "--tones", "32", "--rounds", "1"], ("mean cents", "keep 0.9")),
    "speech_transformer": (["--quick"], ("parameters", "dense", "LED")),
}


def output_of(name: str, arguments: list[str], folder: Path) -> tuple[str, str]:
    """Standard output and standard error of an example."""
    command = [sys.executable, ROOT / "examples" / f"{name}.py", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    arguments, words = EXAMPLES[name]
    printed, _ = output_of(name, arguments, tmp_path)
    for word in words:
        assert word in printed, printed


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[str, str, Path]:
    """What the demo prints at its default keep, on both channels, and its folder."""
    folder = tmp_path_factory.mktemp("demo")
    return *output_of("demo", ["--out", "out"], folder), folder / "out"


def test_the_demo_shows_what_data_are_worth(demo) -> None:
    printed, _, _ = demo
    assert "cosine to dense   tokens/s   speed   bytes on disk" in printed
    rows = {line[:10].strip(): line[10:].split() for line in printed.splitlines()}
    cosine, size = (
        {name: float(rows[name][i].replace(",", "")) for name in ("dense", "plain SVD", "shrank")} for i in (0, 3)
    )
    assert cosine["dense"] == 1 and cosine["plain SVD"] < 0.6 and cosine["shrank"] > 0.92, printed
    assert size["shrank"] < 0.85 * size["dense"] and abs(size["shrank"] / size["plain SVD"] - 1) < 0.01, printed


def test_the_demo_prints_a_page_and_no_warning(demo) -> None:
    printed, complaints, _ = demo
    assert complaints == "" and "\r" not in printed and len(printed.splitlines()) < 20, printed + complaints


def test_the_demo_leaves_the_report_that_it_names(demo) -> None:
    printed, _, folder = demo
    (page,) = re.findall(r"\S+\.html", printed)
    assert Path(page) == folder / "report.html" and "encoder.layer.0" in Path(page).read_text()


def test_every_example_is_tested() -> None:
    runnable = {path.stem for path in SOURCES if "__main__" in path.read_text()}
    assert runnable == {*EXAMPLES, "demo"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_examples_use_the_public_api_alone(path: Path) -> None:
    used = imports(path)
    assert {name for name in used if name.split(".")[0] in ("shrank", "tests", "benchmarks")} <= {
        "shrank",
        "shrank.lr_module",
        "shrank.lr_module.LED",
        "shrank.lr_module.CED",
    }
    private = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr)
    }
    assert not private


def test_nobody_imports_an_example() -> None:
    for path in (path for folder in ("shrank", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        assert not [name for name in imports(path) if name.split(".")[0] == "examples"], path


def imports(path: Path) -> set[str]:
    """The full names of what a file imports, `package.name` for `from package import name`, and of their modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found
