"""Fixtures shared by the whole-script tests: a small demo corpus, one small finished run on it and a longer one."""

import fcntl
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
import torch

from data_prep import InputError
from data_prep.__main__ import cli
from data_prep.sources.parquet import row_group

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported: without a GPU they run through the interpreter
torch.set_num_threads(1)  # models of the tests are so small that a second thread costs more than it gives
ROOT = Path(__file__).resolve().parent.parent
# 4 steps of CLIP in miniature: enough for a whole run in seconds
TINY = ["--backbone", "clip", "--size", "tiny", "--weights", "none", "--image-size", "32", "--workers", "0",
        "--batch", "16", "--images", "64", "--lr", "1e-3", "--layer-decay", "1", "--device", "cpu"]
LONG = [*TINY, "--images", "960", "--save-every", "5", "--log-every", "5", "--domains", "object,body"]


@functools.cache
def server() -> subprocess.Popen:
    """The process whose forks run the scripts of this test process; it ends with the pipe to it."""
    libraries = ["torch", "torchvision.io", "timm", "open_clip", "scipy.stats", "sklearn.svm", "matplotlib.pyplot"]
    return subprocess.Popen([sys.executable, ROOT / "tests/server.py", *libraries], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, bufsize=1, env=os.environ | {"OMP_NUM_THREADS": "1"})


def script(*arguments, check: int | None = 0, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a script of the project as a user would; `check` is the exit code to expect (None: any)."""
    arguments = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        output = [Path(folder, name) for name in ("stdout", "stderr")]
        for file in output:
            file.touch()
        request = {"arguments": arguments, "cwd": str(cwd), "environment": os.environ | {"OMP_NUM_THREADS": "1"},
                   "stdout": str(output[0]), "stderr": str(output[1])}
        print(json.dumps(request), file=server().stdin)
        limit = threading.Timer(300, os.kill, [int(server().stdout.readline()), signal.SIGKILL])
        limit.start()
        code = int(server().stdout.readline())
        limit.cancel()
        result = subprocess.CompletedProcess(arguments, code, *(file.read_text() for file in output))
    assert check is None or code == check, f"exit {code}\n{result.stdout}\n{result.stderr}"
    return result


def assert_gone(pids: list[int]) -> None:
    """None of the processes is left; a minute is for slow machines, 2 seconds are usual."""
    def state(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "gone"

    deadline = time.monotonic() + 60
    while left := [pid for pid in pids if state(pid) not in ("gone", "Z")]:
        assert time.monotonic() < deadline, f"alive: {left}"
        time.sleep(0.1)


# ---------------------------------------------------------------- accidents


SPLICES = [b"../../../evil.jpg", b"/etc/passwd", b"\0", b"\xff\xfe", b'"', b",", b"\n", b" ", b"9" * 400, b"-1", b"\r",
           b"\xe2\x80\xa8", b"_" * 50, b"A" * 3000, b"\n" * 20]


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """The data after one to three accidents: a byte changed, a piece cut, doubled, swapped or spliced in."""
    for _ in range(rng.integers(1, 4)):
        i, j = sorted(rng.integers(0, len(data) + 1, 2).tolist())
        kind = rng.integers(5)
        if kind == 0 and i < len(data):
            data = data[:i] + bytes([rng.integers(256)]) + data[i + 1 :]
        elif kind == 1:
            data = data[:i] + data[j:]
        elif kind == 2:
            data = data[:j] + data[i:j] + data[j:]
        elif kind == 3:
            data = data[:i] + SPLICES[rng.integers(len(SPLICES))] + data[i:]
        else:
            data = data[i:] + data[:i]
    return data


def prepare_mutated(source: str, src: Path, name: str, cases: int, split: str) -> int:
    """Prepare `src` with its file `name` mutated, so many times; returns how often that was refused.

    Asserts that every refusal is one line of bad input and that nothing is written but DATA/<split>. `src` must lie
    two folders below one that is otherwise empty.

    Args:
        split: "domain/split" to write.
    """
    whole, rng, root, refused = (src / name).read_bytes(), np.random.default_rng(0), src.parent.parent, 0
    for case in range(cases):
        (src / name).write_bytes(mutated(whole, rng))
        row_group.cache_clear()
        before = {path: path.read_bytes() for path in src.parent.rglob("*") if path.is_file()}
        try:
            cli.main([source, "--src", str(src), "--out", str(root / "out" / str(case) / split), "--size", "8",
                      "--workers", "1"], standalone_mode=False)
        except click.ClickException as error:
            assert isinstance(error, InputError) and 0 < len(error.message) < 700 and "\n" not in error.message
            refused += 1
        assert {path: path.read_bytes() for path in src.parent.rglob("*") if path.is_file()} == before
    assert {path.name for path in root.iterdir()} <= {src.parent.name, "out"}
    return refused


def built_once(tmp_path_factory, name: str, build: Callable[[Path], None]) -> Path:
    """A folder that the first test process to need it builds for all; who changes it copies it."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with open(f"{place}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.fstat(lock.fileno()).st_size:
            build(place)
            lock.write("built")
    return place


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory) -> Path:
    """A data root with every split of the demo corpus, a tenth of its usual size."""
    return built_once(tmp_path_factory, "demo-data", lambda place: script(
        "-m", "data_prep", "demo", "--out", place, "--scale", "0.1", "--workers", "1"))


@pytest.fixture(scope="session")
def built_run(demo_root, tmp_path_factory) -> Path:
    return built_once(tmp_path_factory, "built-run", lambda place: script(
        "train.py", *TINY, "--schedule", "B", "--data", demo_root, "--out", place))


@pytest.fixture(scope="session")
def tiny_run(built_run, tmp_path_factory) -> Path:
    """A finished run of schedule B on all four domains of `demo_root` (its scores mean nothing)."""
    return shutil.copytree(built_run, tmp_path_factory.mktemp("runs") / "clip-tiny-B")


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the tiny run, not yet evaluated."""
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("eval", "analysis"))
    return tmp_path / "run"


@pytest.fixture(scope="session")
def analysed(tiny_run, built_run, tmp_path_factory) -> str:
    """What analyze.py printed about `tiny_run`, which evaluate.py has scored before."""
    def build(place: Path) -> None:
        run = shutil.copytree(built_run, place / tiny_run.name)
        script("evaluate.py", "--run", run, "--bootstrap", "20", "--workers", "0")
        said = script("analyze.py", "--run", run, "--bootstrap", "20", "--components", "16", "--workers", "0").stdout
        (place / "said.txt").write_text(said)

    place = built_once(tmp_path_factory, "analysed", build)
    shutil.copytree(place, tiny_run.parent, dirs_exist_ok=True)
    return (tiny_run.parent / "said.txt").read_text()


@pytest.fixture(scope="module")
def uninterrupted(demo_root, tmp_path_factory) -> Path:
    """LONG from start to end."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    script("train.py", *LONG, "--data", demo_root, "--out", run)
    return run
