"""Compile every launch of the kernels without a GPU: registers, spills, shared memory, overlap of loads and products.
Copy with it: kernels/.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch

from .margin_plan import LAUNCH

LIMITS = {80: (65536, 166912), 90: (65536, 232448)}  # registers and bytes of shared memory per multiprocessor
# N, K, C, D, dtypes of embeddings and weights, matmul precision: the whole launch table with a copy of W, one without
CASES = {f"{kind}, {rows} rows" + (", ieee" if precision == "highest" else ""):
         (4 * rows, 4, 8192, 768, torch.bfloat16 if kind == "bf16" else torch.float32, torch.float32, precision)
         for kind, rows in LAUNCH for precision in (("high",) if kind == "bf16" else ("high", "highest"))}
CASES["bf16, bf16 W"] = (512, 1, 8192, 768, torch.bfloat16, torch.bfloat16, "high")


def compile_kernels(arch: int, cases: dict[str, tuple] = CASES, gathers: tuple = (4,) * 4) -> list[dict]:
    """One row per kernel and launch, compiled by ptxas for an architecture.

    Args:
        cases: calls of the margin loss, as CASES.
        gathers: number of images in each bank of the gather; images of an empty bank are 1 x 1.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from . import gather_triton, margin_triton

    class Driver:
        """Names the GPU to compile for."""

        get_current_device = staticmethod(lambda: arch)  # key of the cache of compiled kernels
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))

    ptxas, launch, rows, current = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas", JITFunction.run, {}, {}

    def lower(kernel, *arguments, grid, warmup, **options):
        built = launch(kernel, *arguments, grid=grid, warmup=True, **options)
        if (kernel.__name__, built.hash) not in rows:
            with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
                file.write(built.asm["ptx"])
                file.flush()
                report = subprocess.run([ptxas, "-v", f"-arch=sm_{arch}{'a' if arch >= 90 else ''}", file.name,
                                       "-o", "/dev/null"], capture_output=True, text=True, check=True).stderr
            registers, spills = (int(re.search(p, report)[1]) for p in (r"Used (\d+) reg", r"(\d+) bytes spill"))
            warps, shared = built.metadata.num_warps, built.metadata.shared
            blocks = min(LIMITS[arch][0] // (-(-registers // 8) * 8 * 32 * warps), LIMITS[arch][1] // (shared + 1024))
            unit = next((name for name in ("wgmma", "mma.sync") if name in built.asm["ptx"]), "")
            rows[kernel.__name__, built.hash] = {
                "arch": f"sm_{arch}", "case": current["case"], "kernel": kernel.__name__, "hash": built.hash[:8],
                "warps": warps, "registers": registers, "spill_bytes": spills, "shared_bytes": shared,
                "blocks_per_SM": blocks, "tensor_cores": unit,
                # loads of the next step overlap with the products: asynchronous copies, one wgmma pending
                "overlap": built.asm["ttgir"].count("async_copy_global_to_local") >= 2 and (
                    unit != "wgmma" or "pendings = 1" in built.asm["ttgir"]),
                "store_bytes": max((int(v or 1) * int(bits) // 8 for v, bits in re.findall(
                    r"st\.global(?:\.v(\d))?\.b(\d+)", built.asm["ptx"])), default=0)}
        return built

    before, empty = torch.get_float32_matmul_precision(), torch.empty
    try:
        JITFunction.run, torch.empty = lower, lambda *size, **kind: empty(*size, **kind).zero_()  # no kernel runs
        triton.runtime.driver.set_active(Driver())
        for current["case"], (N, K, C, D, embeddings, weights, precision) in cases.items():
            torch.set_float32_matmul_precision(precision)
            x, w = torch.ones(N, D, dtype=embeddings).requires_grad_(), torch.ones(C, D, dtype=weights).requires_grad_()
            zero, one = torch.zeros(N, dtype=torch.long), torch.ones(N)
            ranges = [(k * C // K, (k + 1) * C // K) for k in range(K)]
            for extra in (False, True):
                loss, *_ = margin_triton.margin_loss(
                    x, w, zero, zero, ranges, None, [one] * 3, (extra,) * 3, one, one, None, num_domains=0,
                    BY_SAMPLE=extra, STRAIGHT=extra, SMOOTH=extra)
                loss.backward()
        banks = [torch.zeros(n, *((224, 224) if n else (1, 1)), 3, dtype=torch.uint8) for n in gathers]
        places = torch.zeros(2, dtype=torch.long)
        images = banks, places, places, 224, (0, 0, 0), (1, 1, 1)  # mean and std last
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for form in ("bilinear", "bicubic"):
                current["case"] = f"{form}, {dtype}".replace("torch.", "")
                gather_triton.gather(*images, torch.ones(2, 4), places, form, dtype)
        current["case"] = "whole images"
        gather_triton.gather(*images, None, None, "bilinear", dtype)
    finally:
        JITFunction.run, torch.empty = launch, empty
        torch.set_float32_matmul_precision(before)
    return list(rows.values())
