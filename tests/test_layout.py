"""The house: what lies where, and who may import whom. Imports are read from the source, wherever they stand."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPTS = ("train.py", "evaluate.py", "analyze.py")
LEVELS = ("kernels", "data_prep", "models", "protocols", "reports", "tools", "scripts")  # each imports those before it
TOP = {*SCRIPTS, "kernels", "data_prep", "models", "protocols", "reports", "tools", "scripts", "docs", "tests",
       "README.md", "LICENSE", "Makefile", "pyproject.toml", "requirements.txt", "requirements-dev.txt",
       "constraints.txt"}
CLOSURES = {"protocols/pairs.py": 4, "protocols/claims.py": 4, "kernels/margin_loss.py": 3, "train.py": 17,
            "evaluate.py": 25}
LENGTHS = {"train.py": 900, "evaluate.py": 450, "analyze.py": 400}


@cache
def tracked() -> list[str]:
    """Every file of the project, as git knows it (or, without git, as it lies there)."""
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode == 0 and found.stdout:
        return [name for name in found.stdout.splitlines() if (ROOT / name).exists()]
    return [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file() and ".venv" not in p.parts]


@cache
def modules() -> dict[str, str]:
    """Dotted name -> file, of all code but the tests."""
    files = [name for name in tracked() if name.endswith(".py") and not name.startswith("tests/")]
    return {re.sub(r"\.__init__$", "", name.removesuffix(".py").replace("/", ".")): name for name in files}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text())


@cache
def imports(name: str) -> dict[str, bool]:
    """File -> whether it is imported at the top, of all files of the project that a file imports anywhere."""
    package, found = name.split("/")[:-1], {}
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base for alias in node.names]
        else:
            continue
        for target in targets:
            if (file := modules().get(target)) and file != name:
                found[file] = found.get(file, False) or node in tree(name).body
    return found


def holds_code(name: str) -> bool:
    """Not merely a docstring, as the __init__.py of a package of ours."""
    return any(not isinstance(node, ast.Expr) for node in tree(name).body)


def closure(name: str) -> set[str]:
    """The files to copy with a file, itself included; a script's tools, which its sub-commands call, are left out."""
    found, todo = {name}, [name]
    while todo:
        for other in imports(todo.pop()):
            if other not in found and not other.startswith("tools/") and other != "kernels/bench.py":
                found.add(other)
                todo.append(other)
    return {file for file in found if holds_code(file)}


def level(name: str) -> int:
    return LEVELS.index(name.split("/")[0]) if "/" in name else len(LEVELS)


def test_the_top_level_holds_what_the_design_lists():
    assert {name.split("/")[0] for name in tracked() if not name.startswith(".")} == TOP


@pytest.mark.parametrize("name", sorted(modules().values()))
def test_imports_point_downwards(name):
    for other, at_top in imports(name).items():
        assert other not in SCRIPTS, f"{name} imports the script {other}"
        if other.startswith("tools/") or other == "kernels/bench.py":
            command = name in SCRIPTS or name == "data_prep/__main__.py" or name.startswith("tools/")
            assert command and not at_top, f"{name} imports {other}: only a sub-command may, when it is called"
        else:
            assert level(other) <= level(name), f"{name} imports {other}, which lies above it"


def test_no_circle():
    """None that Python would find, and none hidden by TYPE_CHECKING or by an import inside a function."""
    for name in modules().values():
        path, seen = [(name, iter(imports(name)))], {name}
        while path:
            following = next(path[-1][1], None)
            if following is None:
                path.pop()
                continue
            assert following != name, " -> ".join([step for step, _ in path] + [name])
            if following not in seen and not following.startswith("tools/"):
                seen.add(following)
                path.append((following, iter(imports(following))))
    assert not [name for name in modules().values() if "TYPE_CHECKING" in (ROOT / name).read_text()]


@pytest.mark.parametrize("name, most", CLOSURES.items())
def test_what_must_be_copied_with_a_file(name, most):
    assert len(closure(name)) <= most, sorted(closure(name))


@pytest.mark.parametrize("name", [name for name in sorted(modules().values())
                                  if name.startswith(("protocols/", "kernels/")) and "__init__" not in name])
def test_a_file_says_what_to_copy_with_it(name):
    """Below the first line of its docstring: files, or folders of which any are needed."""
    lines = [line for line in (ast.get_docstring(tree(name)) or "").splitlines() if line] + ["", ""]
    assert lines[1].startswith("Copy with it: "), f"{name}: {lines[1]}"
    text = lines[1].partition(";")[0] + (" " + lines[2] if not lines[1].endswith(".") else "")
    said = set(re.findall(r"[\w/]+(?:\.py|/)", text))
    for other in closure(name) - {name}:
        assert any(other == place or (place.endswith("/") and other.startswith(place)) for place in said), (name, other)


def test_claims_need_no_torch():
    code = "import sys, protocols.claims; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", sorted(modules().values()))
def test_nothing_is_longer_than_a_sitting(name):
    assert len((ROOT / name).read_text().splitlines()) <= LENGTHS.get(name, 500)


@pytest.mark.parametrize("name", SCRIPTS)
def test_functions_of_the_scripts_are_short(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef):
            command = any("click" in ast.dump(d) or "command" in ast.dump(d) for d in node.decorator_list)
            size, arguments = node.end_lineno - node.lineno + 1, node.args.args + node.args.kwonlyargs
            assert size <= 60 and (command or len(arguments) <= 8), (name, node.name, size, len(arguments))


def test_no_file_is_called_utils():
    assert not [name for name in tracked() if Path(name).stem in ("utils", "helpers", "common", "misc")]
