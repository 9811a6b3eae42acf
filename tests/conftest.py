"""Fixtures shared by the whole-script tests: a small demo corpus and one small finished run on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported: without a GPU they run through the interpreter
torch.set_num_threads(1)  # models of the tests are so small that a second thread costs more than it gives
ROOT = Path(__file__).resolve().parent.parent
# 4 steps of CLIP in miniature: enough for a whole run in seconds
TINY = ["--backbone", "clip", "--size", "tiny", "--weights", "none", "--image-size", "32", "--workers", "0",
        "--batch", "16", "--images", "64", "--lr", "1e-3", "--layer-decay", "1", "--device", "cpu"]


def script(*arguments, check: int | None = 0, **options) -> subprocess.CompletedProcess:
    """Run a script of the project as a user would; `check` is the exit code to expect (None: any)."""
    result = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, **options,
    )
    assert check is None or result.returncode == check, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory) -> Path:
    """A data root with every split of the demo corpus, a tenth of its usual size."""
    root = tmp_path_factory.mktemp("demo") / "data"
    script("-m", "data_prep", "demo", "--out", root, "--scale", "0.1", "--workers", "1")
    return root


@pytest.fixture(scope="session")
def tiny_run(demo_root, tmp_path_factory) -> Path:
    """A finished run of schedule B on all four domains of `demo_root` (its scores mean nothing)."""
    run = tmp_path_factory.mktemp("runs") / "clip-tiny-B"
    script("train.py", *TINY, "--schedule", "B", "--data", demo_root, "--out", run)
    return run
