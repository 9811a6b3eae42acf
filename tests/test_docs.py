"""README.md and docs/: every command parses, every option and link exists, and docs/options.md is what is generated."""

import functools
import re
import shlex
from pathlib import Path

import click
import pytest

from tests.conftest import ROOT
from tools.options import PAGE, PROGRAMS, load_command, make_page, options_of

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOREIGN = {"--index-url", "--extra-index-url", "--nproc-per-node", "--array"}  # of pip, torchrun and sbatch


@functools.cache
def command_of(program: str) -> click.Group:
    return load_command(program)


def commands(page: Path) -> list[str]:
    """The shell lines of the blocks of a page, continued lines joined."""
    text = re.sub(r"```(python|diff)\n.*?```", "", page.read_text(), flags=re.DOTALL).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [line for line in lines if re.match(r"([A-Z]+=\S+ )*((python|torchrun|make|sbatch) |scripts/\w)", line)]


COMMANDS = [pytest.param(line, id=f"{page.name}: {line[:60]}") for page in PAGES for line in commands(page)]


def parse(program: str, words: list[str]) -> None:
    """Parse the arguments of a program as click does; nothing is run."""
    command = command_of(program)
    if "--config" in words:  # reads a file that a run writes
        del words[(i := words.index("--config")) : i + 2]
    if words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    command.make_context(program, words)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_parses(line):
    words = shlex.split(line, comments=True)
    settings = [words.pop(0) for _ in range(len(words)) if re.match(r"[A-Z]+=", words[0])]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert words[1] in targets
    elif words[0] == "sbatch" or words[0].startswith("scripts/"):
        script = next(ROOT / word for word in words if word.startswith("scripts/"))
        assert script.stat().st_mode & 0o111 or words[0] == "sbatch"
        text = (ROOT / "scripts/grid.sh").read_text() + script.read_text()
        assert all(f"{setting.partition('=')[0]}:=" in text for setting in settings)
    elif words[:2] == ["python", "-c"]:
        compile(words[2], line, "exec")
    elif words[1] == "-m":
        parse(f"python -m {words[2]}", words[3:])
    else:
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        if f"python {words[at]}" in PROGRAMS:
            assert (ROOT / words[at]).exists()
            parse(f"python {words[at]}", words[at + 1 :])
        else:  # a file that docs/extending.md makes
            assert words[at] in (ROOT / "docs/extending.md").read_text()


def test_every_option_that_is_mentioned_exists():
    known = FOREIGN
    for program in PROGRAMS:
        if (group := command_of(program)) is None:
            source = (ROOT / PROGRAMS[program].partition(":")[0].replace(".", "/")).with_suffix(".py").read_text()
            known |= {name for text in re.findall(r'"(--[\w/-]+)"', source) for name in text.split("/")}
            continue
        for command in (group, *group.commands.values()):
            known |= {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    known |= {"--help"}
    for page in PAGES:
        mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+[a-z]", page.read_text()))
        assert not mentioned - known, page.name


def test_options_page_is_up_to_date():
    assert PAGE.read_text() == make_page(), "run `python -m tools.options`"


def test_an_option_is_described_by_default_and_help():
    @click.command()
    @click.option("--size", type=click.IntRange(1), default=3, help="Pixels.")
    @click.option("--flip/--no-flip", default=True, help="Mirror.")
    @click.option("--kind", type=click.Choice(["a", "b"]), help="Which.")
    @click.option("--workers", type=int, default=5, help="Processes.")
    @click.option("--debug", is_flag=True)
    def command() -> None:
        pass

    assert options_of(command) == {"`--size` N": ("", "3", "Pixels."), "`--flip, --no-flip`": ("", "--flip", "Mirror."),
                                   "`--kind` a, b": ("", "", "Which."), "`--workers` N": ("", "by CPUs", "Processes.")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        if "://" in file:
            continue
        place = page.parent / file if file else page
        assert place.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)", place.read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], target


def test_every_page_and_picture_is_reached_from_the_readme():
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        seen.add(page)
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            place = (page.parent / target).resolve()
            if place.exists() and place not in seen:
                seen.add(place)
                todo += [place] * (place.suffix == ".md")
    assert not {path.resolve() for path in (ROOT / "docs").iterdir()} - seen


def test_lengths():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
    assert len((ROOT / "docs/glossary.md").read_text().splitlines()) <= 40
