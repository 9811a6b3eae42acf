"""The benchmarks run, and every Triton kernel lowers to machine code for the GPUs that it is meant for."""

import csv
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from kernels.bench import measure, peak_memory, planned
from kernels.lower import LIMITS
from tests.conftest import ROOT, script

PRODUCTS = ("cosine_tiles", "gradient_tiles", "sample_products", "class_products")


def table(path) -> list[dict]:
    return list(csv.DictReader(path.read_text().splitlines()))


def compiled(code: str) -> list[str]:
    """What `code` prints in a process that has not imported Triton for its interpreter, as that of `script` has."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                          env=environment).stdout.splitlines()


@pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
def test_every_launch_of_the_table_compiles_without_spills(tmp_path):
    """And loads run under the products: copies are asynchronous, one wgmma is left open while they are waited for.

    For sm_80, two launches stand for all, which `python -m kernels.bench compile` shows.
    """
    command = ["-m", "kernels.bench", "compile", "--arch", "90", "--csv", tmp_path / "out.csv"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    two = compiled("import json\nfrom kernels.lower import CASES, compile_kernels\n"
                   "cases = {name: CASES[name] for name in ('bf16, 128 rows', 'fp32, 64 rows')}\n"
                   "for row in compile_kernels(80, cases): print(json.dumps({k: str(v) for k, v in row.items()}))")
    rows = table(tmp_path / "out.csv") + [json.loads(line) for line in two]
    for arch, limits in LIMITS.items():
        mine = [row for row in rows if row["arch"] == f"sm_{arch}"]
        assert {row["kernel"] for row in mine} == {"group_rows", "sample_norms", "class_norms", "losses", *PRODUCTS,
                                                   "resample_images"}
        for row in mine:
            assert int(row["shared_bytes"]) <= limits[1] and int(row["blocks_per_SM"]) >= 1, row
            assert int(row["spill_bytes"]) <= (0 if row["kernel"] in PRODUCTS else 16), row
            assert row["overlap"] == "True" or row["kernel"] not in PRODUCTS, row
            assert row["store_bytes"] == "16" or row["kernel"] != "resample_images", row
    units = {(row["arch"], row["case"], row["kernel"]): row["tensor_cores"] for row in rows}
    for kernel in ("cosine_tiles", "gradient_tiles", "sample_products"):
        assert units["sm_90", "bf16, 512 rows", kernel] == units["sm_90", "bf16, 64 rows", kernel] == "wgmma"
        assert units["sm_80", "bf16, 128 rows", kernel] == units["sm_80", "fp32, 64 rows", kernel] == "mma.sync"
        assert units["sm_90", "fp32, 64 rows, ieee", kernel] == ""


@pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
def test_what_changes_from_step_to_step_makes_no_kernel_of_its_own():
    """Samples, class rows (Partial FC) and images in a bank, none included, may be 1, odd or divisible by 16."""
    code = """
import torch
from kernels.lower import compile_kernels
shapes = [(256, 4096), (259, 4099), (272, 4111)]
cases = {str(shape): (shape[0], 4, shape[1], 128, torch.bfloat16, torch.float32, "high") for shape in shapes}
print(*(len(compile_kernels(90, dict(list(cases.items())[:n]), (4, 4))) for n in (1, 3)))
print(*(compile_kernels(90, {}, banks)[0]["hash"] for banks in ((4, 4), (0, 16), (1, 17), (5, 0))))
"""
    said = compiled(code)
    one, three = said[0].split()
    assert one == three and len(set(said[1].split())) == 1


def test_memory_of_the_goals():
    """What `check` allows, in MiB: the copy of W leads, where it is made as a whole."""
    assert 170 < planned(1024, 100_000, 768, "one") < 205 and planned(256, 10_000, 384, "four") < 30
    assert planned(4096, 600_000, 768, "four") < 500 and planned(4096, 2_200_000, 1024, "one") < 500


def test_margin_and_gather_write_their_tables(tmp_path):
    script("-m", "kernels.bench", "margin", "--device", "cpu", "--samples", "16", "--classes", "100", "--width", "8",
           "--seconds", "0.01", "--csv", tmp_path / "margin.csv")
    rows = table(tmp_path / "margin.csv")
    assert {(r["impl"], r["layout"], r["phase"]) for r in rows} == {
        (impl, layout, phase) for impl in ("torch", "eager")
        for layout in ("one", "four", "shares") for phase in ("forward", "backward", "both")}
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["floor_ms"]) > 0 and row["torch"] == torch.__version__
    script("-m", "kernels.bench", "gather", "--device", "cpu", "--batch", "4", "--size", "16", "--seconds", "0.01",
           "--csv", tmp_path / "gather.csv")
    assert {(r["impl"], r["form"]) for r in table(tmp_path / "gather.csv")} == {
        ("eager", "copy"), ("torch", "bilinear"), ("torch", "bicubic")}


def test_a_missing_gpu_is_one_line():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = script("-m", "kernels.bench", "check", check=2)
    assert "no CUDA device is available" in result.stderr and "Traceback" not in result.stderr


def test_memory_and_time_are_those_of_the_call():
    device = torch.device("cpu")
    used = peak_memory(lambda: torch.ones(64 * 2**20 // 4).sum(), device)
    assert 60 <= used <= 80
    found = measure(lambda: torch.ones(10).sum(), device, 0.01)
    assert 0 < found["p20_ms"] <= found["median_ms"] <= found["p80_ms"] < 100
