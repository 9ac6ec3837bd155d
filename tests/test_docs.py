"""The documentation is true: links lead somewhere, code runs, commands parse, tables name what there is."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
VERIFIERS = (ROOT / "docs/verifiers.md").read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced code blocks of some languages."""
    return [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if language in languages]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        goal = page if not path else (page.parent / path).resolve()
        assert goal.exists(), f"{page.name} links to {target}"
        assert goal.is_relative_to(ROOT), f"{page.name} links out of the repository: {target}"
        if anchor:
            assert anchor in anchors(goal), f"{page.name} links to {target}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in re.findall(r"\]\(([^)\s]+)\)", README) if not target.startswith("https://")}
    assert {page for page in PAGES if page.name != "README.md" or page.parent != ROOT} <= linked


def test_files_that_pages_name_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:tests|examples|benchmarks|docs)/[\w./-]+\.\w+)`", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_figures_on_the_page_of_verifiers_are_those_measured() -> None:
    page = runpy.run_path(str(ROOT / "docs/make_verifier_figures.py"))["page"]
    assert page(VERIFIERS) == VERIFIERS, "run `python docs/make_verifier_figures.py`"


def test_command_line_reference_is_up_to_date() -> None:
    reference = runpy.run_path(str(ROOT / "docs/make_cli_reference.py"))["reference"]
    assert (ROOT / "docs/cli.md").read_text(encoding="utf-8") == reference(), "run `python docs/make_cli_reference.py`"


# Code ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pipeline that the README speaks of."""
    from tiny_sd import tiny_stable_diffusion

    folder = tmp_path_factory.mktemp("readme")
    tiny_stable_diffusion(folder / "path/to/pipeline")
    return folder


@pytest.mark.parametrize("number", range(len(blocks(README, "python"))))
def test_python_of_the_readme_runs(number: int, folder: Path) -> None:
    code = blocks(README, "python")[number]
    # A process of its own, because a block may register names.
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    if "print(result)" in code:
        assert done.stdout.strip() in README, "the output that the README shows is not what is printed"


def test_the_first_python_example_is_short() -> None:
    assert len([line for line in blocks(README, "python")[0].splitlines() if line.strip()]) <= 8


def commands() -> Iterator[str]:
    """Every command of every page: lines of sh blocks, and lines after "$ " of console blocks."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in blocks(text, "sh"):
            yield from (line for line in block.splitlines() if line)
        for block in blocks(text, "console"):
            yield from (line[2:] for line in block.splitlines() if line.startswith("$ "))


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_shell_commands_parse(line: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    if program == "tsdiff":
        from tsdiff.cli.app import State, cli

        context = click.Context(cli, info_name="tsdiff", obj=State())
        name, command, rest = cli.resolve_command(context, arguments)
        assert command is not None
        command.make_context(name, rest, parent=context)  # raises for an unknown option or a value that does not fit
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif program == "pip":
        if "-c" in arguments:
            assert (ROOT / arguments[arguments.index("-c") + 1]).exists()
        for pinned in (argument for argument in arguments if "==" in argument):
            assert pinned in (ROOT / "constraints.txt").read_text(encoding="utf-8").split(), f"{pinned} is not what constraints.txt says"
    else:
        assert program == "python", f"nothing checks {program!r}"
        assert (ROOT / arguments[0]).exists()


def test_shown_plan_is_what_is_printed(folder: Path) -> None:
    (block,) = [block for block in blocks(README, "console") if block.startswith("$ tsdiff plan")]
    first, _, shown = block.partition("\n")
    done = subprocess.run([sys.executable, "-c", "from tsdiff.cli import main; main()", *shlex.split(first)[2:]], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout == shown


def test_shown_search_is_what_is_printed(folder: Path) -> None:
    """Scores of a network differ in the last digits from machine to machine, so of those lines only the names are compared."""
    (block,) = [block for block in blocks(README, "console") if block.startswith("$ tsdiff search")]
    first, _, shown = block.partition("\n")
    done = subprocess.run(
        [sys.executable, "-c", "from tsdiff.cli import main; main()", *shlex.split(first)[2:]],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240,
    )  # fmt: skip

    def facts(text: str) -> set[str]:
        measured = ("score ", "- ", "shapes-oracle ", "seconds ")
        return {line.split("  ")[0] if line.startswith(measured) else line for line in text.splitlines()}

    assert facts(shown) <= facts(done.stdout)
    assert len(facts(shown)) == len(shown.splitlines())


# Tables --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["policies", "verifiers", "solvers"])
def test_the_readme_names_everything_there_is(kind: str) -> None:
    if kind == "solvers":
        from tsdiff.cli.catalogue import solvers

        names = set(solvers())
    else:
        with (ROOT / "pyproject.toml").open("rb") as file:
            names = set(tomllib.load(file)["project"]["entry-points"][f"tsdiff.{kind}"])
    first_cells = " ".join(line.split("|")[1] for line in README.splitlines() if line.startswith("| "))
    assert names <= set(re.findall(r"`([^`]+)`", first_cells))
    if kind == "verifiers":
        assert names <= set(re.findall(r"`([^`\n]+)`", VERIFIERS))
