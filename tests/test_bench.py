"""The benchmarks run, and every Triton kernel lowers to machine code for the GPUs that it is meant for."""

import csv
import math
from importlib.util import find_spec

import pytest
import torch

from kernels.bench import LIMITS, live_pairs, measure, peak_memory
from tests.conftest import script


def table(path) -> list[dict]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
def test_kernels_compile_for_both_architectures(tmp_path):
    script("-m", "kernels.bench", "compile", "--csv", tmp_path / "out.csv")
    rows = table(tmp_path / "out.csv")
    for arch, limits in LIMITS.items():
        mine = [row for row in rows if row["arch"] == f"sm_{arch}"]
        assert {row["kernel"] for row in mine} == {
            "group_rows", "sample_norms", "class_norms", "cosine_tiles", "merge_strips", "losses", "gradient_tiles",
            "sample_products", "class_products", "project_samples", "copy_images", "resample_images"}
        for row in mine:
            assert int(row["shared_bytes"]) <= limits[1] and int(row["blocks_per_SM"]) >= 1, row
            assert int(row["spill_bytes"]) <= 64, row  # a handful of bytes costs nothing, an accumulator would
    units = {(row["arch"], row["case"], row["kernel"]): row["tensor_cores"] for row in rows}
    for kernel in ("cosine_tiles", "gradient_tiles", "sample_products", "class_products"):
        assert units["sm_90", "bf16, 1 x 8192", kernel] == "wgmma" and units["sm_90", "fp32", kernel] == ""
        assert units["sm_80", "bf16, 1 x 8192", kernel] == units["sm_80", "tf32", kernel] == "mma.sync"


def test_margin_and_gather_write_their_tables(tmp_path):
    script("-m", "kernels.bench", "margin", "--device", "cpu", "--samples", "16", "--classes", "100", "--width", "8",
           "--seconds", "0.01", "--csv", tmp_path / "margin.csv")
    rows = table(tmp_path / "margin.csv")
    assert {(r["impl"], r["layout"], r["phase"]) for r in rows} == {
        (impl, layout, phase) for impl in ("torch, chunked", "torch, unchunked", "eager", "naive")
        for layout in ("one", "four", "shares") for phase in ("forward", "backward", "both")}
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["floor_ms"]) > 0 and row["torch"] == torch.__version__
    script("-m", "kernels.bench", "gather", "--device", "cpu", "--batch", "4", "--size", "16", "--seconds", "0.01",
           "--csv", tmp_path / "gather.csv")
    assert {(r["impl"], r["form"]) for r in table(tmp_path / "gather.csv")} == {
        ("eager", "copy"), ("torch", "copy"), ("torch", "resample")}


def test_a_missing_gpu_is_one_line():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = script("-m", "kernels.bench", "check", check=2)
    assert "there is no CUDA device here" in result.stderr and "Traceback" not in result.stderr


def test_memory_and_time_are_those_of_the_call():
    device = torch.device("cpu")
    used = peak_memory(lambda: torch.ones(64 * 2**20 // 4).sum(), device)
    assert 60 <= used <= 80
    found = measure(lambda: torch.ones(10).sum(), device, 0.01)
    assert 0 < found["p20_ms"] <= found["median_ms"] <= found["p80_ms"] < 100


def test_live_pairs_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125], [1.0, 1e-9, 1e-9, 1e-9]]).log()
    logits = torch.cat([logits, torch.full((2, 1), -math.inf)], 1)  # the target
    assert live_pairs(logits, 0.3).tolist() == [2, 1]
    assert live_pairs(logits, 0.1).tolist() == [4, 1]
