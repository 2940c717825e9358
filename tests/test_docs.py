"""The documentation keeps up with the code: methods, commands, options, names and links."""

import ast
import inspect
import re
import subprocess
import sys
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *(path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts),
]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def headings(page: Path) -> list[str]:
    return [title.replace("`", "") for title in HEADING.findall(prose(page))]


def section(page: Path, title: str) -> str:
    """The text from a heading to the next one of any level."""
    found = re.search(rf"^#+ +`?{re.escape(title)}`?$(.*?)(?=^#|\Z)", prose(page), re.M | re.S)
    return found.group(1) if found else ""


def python_blocks(page: Path) -> list[str]:
    return [code for language, code in FENCE.findall(page.read_text()) if language == "python"]


def command_line() -> object:
    import typer

    from forebear import cli

    return typer.main.get_command(cli.app)


def test_every_method_has_a_page_and_every_page_a_method() -> None:
    from forebear.methods import METHODS

    pages = {page.stem for page in (DOCS / "methods").glob("*.md")} - {"index"}
    assert pages == set(METHODS)


def test_every_method_page_begins_with_the_name_to_type() -> None:
    from forebear.methods import METHODS

    for name in METHODS:
        assert headings(DOCS / "methods" / f"{name}.md")[0] == name


@pytest.mark.parametrize("title", ["Formula", "Cost", "When to use it", "When not"])
def test_every_method_page_says(title: str) -> None:
    from forebear.methods import METHODS

    assert METHODS
    silent = [n for n in METHODS if not section(DOCS / "methods" / f"{n}.md", title).strip()]
    assert not silent


def test_every_option_of_a_method_is_named_on_its_page() -> None:
    from forebear.methods import METHODS, factory

    assert METHODS
    for name in METHODS:
        options = set(inspect.signature(factory(name)).parameters) - {"name"}
        text = section(DOCS / "methods" / f"{name}.md", "Options")
        assert set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE)) == options, name


def test_every_method_has_a_section_of_papers() -> None:
    from forebear.methods import METHODS

    assert METHODS
    assert not [name for name in METHODS if not section(DOCS / "papers.md", name).strip()]


@pytest.mark.parametrize("page", ["README.md", "docs/methods/index.md"])
def test_every_method_stands_in_the_tables(page: str) -> None:
    from forebear.methods import METHODS

    listed = set(re.findall(r"^\| \[`(\w+)`\]", (ROOT / page).read_text(), re.MULTILINE))
    assert listed == set(METHODS)


def test_every_command_has_a_heading_and_every_heading_a_command() -> None:
    titles = {title for title in headings(DOCS / "cli.md") if title.startswith("forebear ")}
    assert titles == {f"forebear {name}" for name in command_line().commands}


def test_every_option_is_named_in_the_section_of_its_command() -> None:
    missing = []
    for name, command in command_line().commands.items():
        text = section(DOCS / "cli.md", f"forebear {name}")
        for parameter in command.params:
            long = [option for option in parameter.opts if option.startswith("--")]
            if long and not any(f"`{option}" in text for option in long):
                missing.append(f"{name} {long[0]}")
    assert not [option for option in missing if not option.endswith("--help")]


@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=name_of)
def test_examples_are_valid_and_use_names_that_exist(page: Path) -> None:
    for code in python_blocks(page):
        for node in ast.walk(ast.parse(code, filename=name_of(page))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("forebear"):
                module = import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            if isinstance(node, ast.Attribute):
                first, *rest = ast.unparse(node).split(".")
                if first == "fb" and all(part.isidentifier() for part in rest):
                    reduce(getattr, rest, import_module("forebear"))  # fb.metrics.lds exists


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_examples_run_from_top_to_bottom(page: str, tmp_path: Path) -> None:
    code = "\n".join(python_blocks(ROOT / page))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert len(done.stdout.splitlines()) > 1


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in map(slug, headings(target))):
            broken.append(link)
    assert not broken


def slug(title: str) -> str:
    """The anchor that GitHub and MyST give to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_the_documentation_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "--keep-going", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "trees"), str(DOCS), str(tmp_path / "html")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html" / "index.html").is_file()
