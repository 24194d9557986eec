"""The documentation: its Python runs, its commands and names exist, its figures are those that were measured.

The Python of a page runs from the top to the bottom as one program, after that of the comment `<!-- setup ... -->`; a
block behind `<!-- not run: REASON -->` is only parsed. Either way every name of shrank in it must exist.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer

import shrank
from shrank.cli.app import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
_BLOCK = re.compile(r"(?ms)^(?P<skipped><!-- not run: [^\n]+ -->\n+)?^(?P<indent> *)```python\n(?P<code>.*?)^ *```$")
_SETUP = re.compile(r"(?ms)^<!-- setup\n(.*?)^-->$")


def blocks_of(page: Path) -> list[tuple[str, bool, int]]:
    """Every block of Python: the code, whether it runs, and the line it begins at."""
    text = page.read_text()
    found = [
        (match["code"], match["skipped"] is None, text.count("\n", 0, match.start("code")))
        for match in _BLOCK.finditer(text)
    ]
    assert len(found) == text.count("```python"), f"{page.name} has a block of Python that this test does not see"
    return found


WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text()]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for match in _SETUP.finditer(page.read_text()):
        exec(compile(match[1], f"{page.name}, setup", "exec"), vars(module))
    for code, runs, line in blocks_of(page):
        if runs:
            exec(compile("\n" * line + code, str(page), "exec"), vars(module))


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_names_of_shrank_exist(page: Path) -> None:
    for code, _, line in blocks_of(page):
        for node in ast.walk(ast.parse(code)):
            place = f"{page.name}:{line + getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "shrank":
                module = importlib.import_module(node.module)
                assert not [x.name for x in node.names if not hasattr(module, x.name)], place
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "shrank":
                assert hasattr(shrank, node.attr), f"{place}: shrank.{node.attr}"


def commands_of(page: Path) -> list[list[str]]:
    """Every command line of shrank in a block of shell."""
    blocks = re.findall(r"(?ms)^```bash\n(.*?)^```$", page.read_text())
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "shrank"]


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=name_of)
def test_commands_exist(page: Path) -> None:
    group = typer.main.get_command(app)
    for name, *words in commands_of(page):
        assert name in group.commands, f"{page.name}: shrank {name}"
        options = {option for parameter in group.commands[name].params for option in parameter.opts}
        unknown = [word for word in words if word.startswith("--") and word not in options]
        assert not unknown, f"{page.name}: shrank {name} {' '.join(unknown)}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_files_and_programs_exist(page: Path) -> None:
    text = page.read_text()
    paths = re.findall(r"`((?:benchmarks|csrc|docs|examples|shrank|tests)/[\w./-]+)(?: [^`]*)?`", text)
    named = [ROOT / path for path in paths if "NAME" not in path]
    missing = [name_of(path) for path in named if not path.exists() and not path.with_suffix(".py").exists()]
    programs = re.findall(r"python -m ((?:benchmarks|tests)[\w.]*\w)", text)
    missing += [program for program in programs if importlib.util.find_spec(program) is None]
    assert not missing, f"{page.name} names what is not there: {', '.join(missing)}"


def test_tables_are_what_was_measured() -> None:
    subprocess.run([sys.executable, DOCS / "generate.py", "--check"], check=True)


def test_every_public_name_is_in_the_reference() -> None:
    listed = re.findall(r"^::: shrank\.(\S+)", "\n".join(p.read_text() for p in (DOCS / "api").glob("*.md")), re.M)
    assert sorted(listed) == sorted(set(shrank.__all__) - {"__version__"})


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    assert not [page for page in DOCS.rglob("*.md") if page.relative_to(DOCS).as_posix() not in menu]


def test_the_front_door_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links and not [link for link in links if "://" not in link and not (ROOT / link).exists()]
