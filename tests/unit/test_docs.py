"""The documents say what the code does: commands, variables, errors, arguments, links."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import ssmgen
from ssmgen import errors
from ssmgen.cli import app
from ssmgen.settings import VARIABLES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
COMMANDS = typer.main.get_command(app).commands


def page(name: str) -> str:
    return (DOCS / name).read_text()


def prose(text: str) -> str:
    """A page without its fenced code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_command_has_help_and_stands_in_the_docs(name: str) -> None:
    command = COMMANDS[name]
    assert len(command.help or "") > 200
    assert f"`ssmgen {name}" in page("index.md")
    row = next(line for line in page("index.md").splitlines() if f"`ssmgen {name}" in line)
    for parameter in command.params:
        if parameter.name == "help":
            continue
        assert parameter.help, parameter.name
        names = parameter.opts if parameter.param_type_name == "option" else [parameter.metavar]
        assert any(n in row for n in names), parameter.name


def test_every_variable_stands_in_the_docs_and_no_other() -> None:
    text = page("environment.md")
    for name in VARIABLES:
        assert f"| `{name}` |" in text
    for path in PAGES:
        named = set(re.findall(r"\bSSMGEN_[A-Z_]*[A-Z]", path.read_text()))
        assert named <= set(VARIABLES), path.name


def test_every_public_name_has_a_docstring_and_stands_in_the_docs() -> None:
    for name in ssmgen.__all__:
        if name.startswith("__"):
            continue
        value = getattr(ssmgen, name)
        assert len(inspect.getdoc(value) or "") > 40, name
        assert f"`ssmgen.{name}" in page("index.md"), name


def test_every_error_stands_in_the_docs_with_the_built_in_it_is() -> None:
    text = page("semantics.md")
    for name in errors.__all__:
        error = getattr(errors, name)
        assert error.__doc__
        if error is errors.SsmgenError:
            assert "`ssmgen.errors.SsmgenError`" in text
        else:
            built_in = next(c for c in error.__mro__ if c.__module__ == "builtins")
            assert f"| `{name}` | {built_in.__name__} |" in text


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (ssmgen.selective_state_update, "semantics.md"),
        (ssmgen.gated_delta_rule_decode, "gated-delta-net.md"),
        (ssmgen.causal_conv1d_update, "conv1d.md"),
        (ssmgen.causal_conv1d_fn, "conv1d.md"),
    ],
)
def test_every_argument_of_the_op_stands_in_the_docs(op: Callable[..., object], name: str) -> None:
    text = page(name)
    for argument in inspect.signature(op).parameters:
        assert re.search(rf"\b{argument}\b", text), argument


def headings(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", prose(text), flags=re.M)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def links() -> Iterator[tuple[Path, str]]:
    for path in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text())):
            if not target.startswith("https://"):
                yield path, target


@pytest.mark.parametrize(("path", "target"), links(), ids=lambda value: Path(value).name)
def test_link_resolves(path: Path, target: str) -> None:
    file, _, anchor = target.partition("#")
    found = (path.parent / file).resolve() if file else path
    assert found.is_file()
    # The site is made of docs/ alone.
    assert path.parent != DOCS or DOCS in found.parents
    assert not anchor or anchor in headings(found.read_text())


def test_site_has_every_page() -> None:
    named = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    assert sorted(named) == sorted(path.name for path in DOCS.glob("*.md"))


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.S | re.M)


def test_readme_shows_the_example_that_runs() -> None:
    example = [line.strip() for line in (ROOT / "examples" / "decode.py").read_text().splitlines()]
    at = 0
    for block in blocks((ROOT / "README.md").read_text()):
        ast.parse(block)
        for line in filter(None, map(str.strip, block.splitlines())):
            assert line in example[at:], line
            at = example.index(line, at) + 1
    assert at


def test_readme_maps_every_module() -> None:
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("## Map")[2].partition("\n## ")[0]
    named = set(re.findall(r"^      (\w+(?:\.py|/)) ", section, flags=re.M))
    there = {p.name for p in (ROOT / "ssmgen").glob("[!_]*.py")}
    there |= {f"{p.parent.name}/" for p in (ROOT / "ssmgen").glob("*/__init__.py")}
    assert named == there


def test_readme_names_every_extra_and_what_it_brings() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    section = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    section = re.sub(r",\n +", ", ", section)
    brought = {
        name: re.findall(r'"([\w-]+)', packages)
        for name, packages in re.findall(r"^(\w+) = \[(.*)\]", section, flags=re.M)
    }
    readme = (ROOT / "README.md").read_text().partition("## Install")[2].partition("\n## ")[0]
    named = {
        name: packages.split(", ")
        for name, packages in re.findall(r"^\| `(\w+)` \| ([^|(]*\w)", readme, flags=re.M)
    }
    assert named == brought


RESULTS = {
    ("README.md", "measured"): (
        ["ssu-h200.json", "host-h200.json"],
        ["--heads", "128", "--dims", "64", "--states", "fp32,fp16,fp16+sr,int16"],
    ),
    ("docs/performance.md", "measured"): (["ssu-h200.json", "host-h200.json"], []),
    ("docs/performance.md", "tokens"): (["tokens-h200.json"], ["--tokens", "6"]),
    ("docs/performance.md", "gdn"): (["gdn-h200.json"], ["--heads", "32,8"]),
    ("docs/performance.md", "conv1d"): (["conv1d-h200.json"], ["--dims", "8192,2048"]),
    ("docs/performance.md", "chain"): (["chain-h200.json"], []),
    ("docs/performance.md", "odd"): (["odd-h200.json"], ["--heads", "48"]),
    ("docs/performance.md", "scaling"): (["scaling-h200.json"], []),
}


@pytest.mark.parametrize(("path", "block"), RESULTS)
def test_measured_tables_are_what_the_benchmark_prints_of_its_results(path, block) -> None:
    files, options = RESULTS[path, block]
    results = ROOT / "benchmarks" / "results"
    shown = [argument for file in files for argument in ("--table", str(results / file))]
    printed = CliRunner().invoke(app, ["bench", *shown, *options])
    assert printed.exit_code == 0
    text = (ROOT / path).read_text().partition(f"<!-- {block} -->\n")[2]
    assert text.partition(f"<!-- /{block} -->")[0] == printed.stdout


def test_every_picture_of_a_result_is_shown() -> None:
    text = page("performance.md")
    for path in (DOCS / "images").glob("*.png"):
        assert f"(images/{path.name})" in text, path.name


def test_targets_named_in_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.M))
    for path in PAGES:
        named = set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", path.read_text(), flags=re.M))
        assert named <= targets, path.name
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    assert "make golden" in contributing
