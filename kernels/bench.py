"""Benchmarks of the kernels: `python -m kernels.bench [margin|gather|compile|mass|check] [--csv FILE]`.

    margin    the multi-domain margin loss against what a user would write: forward, backward, both
    gather    the interleaved gather against indexing and normalising in PyTorch, and against plain copies
    compile   lower every Triton kernel for sm_80 and sm_90 (needs no GPU): registers, spills, shared memory
    mass      how many pairs hold the softmax mass of the non-targets: what a sparse backward pass could save
    check     on a GPU: the sizes that the goals name, with the verdict

A row has the median and the 20th and 80th percentile, the peak of memory beyond inputs and gradients, and the ceilings
measured in the same run: products (TFLOP/s) and copies (GB/s). Its floor is max(products at the one, least bytes at the
other).
"""

import csv
import ctypes
import math
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gather import gather_interleaved
from kernels.margin_loss import margin_loss, margin_loss_reference

LAYOUTS = ("one", "four", "shares")
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)

# ---------------------------------------------------------------- the harness


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def once(run: Callable, device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type == "cuda":
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after)
    tick = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - tick)


def measure(run: Callable, device: torch.device, seconds: float, prepare: Callable = lambda: None) -> dict:
    """median_ms, p20_ms, p80_ms of calls over `seconds`, after two that are not counted (they compile and allocate)."""
    found: list[float] = []
    for call in range(200):
        prepare()
        spent = once(run, device)
        if call >= 2:
            found.append(spent)
        if len(found) >= 3 and sum(found) > 1e3 * seconds:
            break
    return {f"{name}_ms": float(np.percentile(found, q)) for name, q in (("median", 50), ("p20", 20), ("p80", 80))}


def peak_memory(run: Callable, device: torch.device) -> float:
    """MiB that one call has in use at its peak beyond what is in use before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def status(field: str) -> float:
        return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed would hide what this one needs (glibc)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here (Linux)
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def ceilings(device: torch.device) -> dict:
    """Best TFLOP/s of a large product in the dtype of the benchmark, and GB/s (read + written) of a large copy."""
    side, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    a = torch.randn(side, side, device=device).to(dtype_of(device))
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = measure(lambda: a @ a, device, 0.5)["p20_ms"]
    copy = measure(lambda: target.copy_(source), device, 0.5)["p20_ms"]
    return {"ceiling_tflops": 2 * side**3 / product / 1e9, "ceiling_gbs": 2 * size / copy / 1e6}


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])


def provenance(device: torch.device) -> dict:
    """What every row says of where it comes from."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"date": date.today().isoformat(), "device": name, "torch": torch.__version__, "triton": triton,
            "commit": commit or "unknown"}


def write_csv(path: Path | None, rows: list[dict]) -> None:
    if path is None or not rows:
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)
    print(f"{path}: {len(rows)} rows")


# ---------------------------------------------------------------- margin loss


def layout(name: str, N: int, C: int) -> tuple[list[tuple[int, int]], Tensor]:
    """Class ranges and domains [N]: "one" domain, "four" equal ones, or realistic "shares" of the classes."""
    if name == "one":
        sizes = [C]
    elif name == "four":
        sizes = [C // 4] * 4
    else:  # object, face_hq, face_lq, body: a thousand object classes, thousands of people, the bulk in face_hq
        small = [max(min(1000, C // 10), 2), 0, max(C // 50, 2), max(C // 100, 2)]
        sizes = [s or C - sum(small) for s in small]
    ends = np.cumsum(sizes).tolist()
    ranges = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return ranges, torch.arange(N) % len(ranges)  # interleaved, as schedule B has it


def margin_logits(cos: Tensor, labels: Tensor, s: float, m: float) -> Tensor:
    """s cos(θ + m) at the label, as most public code has it."""
    own = torch.arange(len(cos), device=cos.device), labels
    t = cos[own].float().clamp(-1 + 1e-6, 1 - 1e-6)
    turned = t * math.cos(m) - (1 - t * t).sqrt() * math.sin(m)
    return s * cos.index_put(own, turned.to(cos.dtype))


def eager(x, w, labels, rows_of, ranges, domains, low, s=64.0, m=0.5):
    """What a user would write: a loop over the domains under autocast."""
    total = x.new_zeros((), dtype=torch.float32)
    for rows, (start, end) in zip(rows_of, ranges, strict=True):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
            cos = F.linear(F.normalize(x[rows]), F.normalize(w[start:end]))
            total = total + F.cross_entropy(margin_logits(cos, labels[rows], s, m).float(), labels[rows])
    return total / len(ranges)


def naive(x, w, labels, rows_of, ranges, domains, low, s=64.0, m=0.5):
    """Every sample with every class, those of other domains masked out."""
    bounds = torch.tensor(ranges, device=x.device)[domains]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
        cos = F.linear(F.normalize(x), F.normalize(w))
        logits = margin_logits(cos, labels + bounds[:, 0], s, m)
        column = torch.arange(len(w), device=x.device)
        other = (column < bounds[:, :1]) | (column >= bounds[:, 1:])
        return F.cross_entropy(logits.masked_fill(other, -math.inf).float(), labels + bounds[:, 0])


def fused_linear_cross_entropy():
    """A published fused loss as an outside mark (plain softmax, one domain, no margin); None where it is missing."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda x, w, labels, *_: loss(w.to(x.dtype), x, labels)


def implementations(device: torch.device, with_compile: bool) -> dict[str, tuple[Callable, float]]:
    """name -> (loss(x, w, labels, rows_of, ranges, domains, low), bytes of memory per logit that it holds)."""

    def ours(impl, x, w, labels, rows_of, ranges, domains, low):
        return margin_loss(x, w, labels, domains, ranges, scale=64.0, margin_angular=0.5, impl=impl).loss

    def unchunked(x, w, labels, rows_of, ranges, domains, low):
        return margin_loss_reference(x, w, labels, domains, ranges, scale=64.0, margin_angular=0.5).loss

    table = {"triton": (partial(ours, "triton"), 0.0)} if device.type == "cuda" else {}
    table |= {"torch, chunked": (partial(ours, "torch"), 0.0), "torch, unchunked": (unchunked, 24.0),
              "eager": (eager, 18.0), "naive": (naive, 24.0)}
    if with_compile:
        table |= {f"{name}, compiled": (torch.compile(f, dynamic=False), size) for name, f, size in
                  (("eager", eager, 18.0), ("naive", naive, 24.0))}
    if device.type == "cuda" and (outside := fused_linear_cross_entropy()):
        table["liger, no margin"] = (outside, 2.0)
    return table


def margin_rows(device, N, C, D, name, table, seconds, ceiling) -> Iterator[dict]:
    """One row per implementation and phase."""
    low = device.type == "cuda"
    ranges, domains = layout(name, N, C)
    domains = domains.to(device)
    sizes = torch.tensor([end - start for start, end in ranges], device=device)
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(N, D, generator=g, device=device).to(dtype_of(device)).requires_grad_()
    w = torch.randn(ranges[-1][1], D, generator=g, device=device).requires_grad_()
    labels = (torch.rand(N, generator=g, device=device) * sizes[domains]).long().clamp(max=sizes[domains] - 1)
    rows_of = [(domains == k).nonzero().flatten() for k in range(len(ranges))]
    pairs = sum(len(rows) * (end - start) for rows, (start, end) in zip(rows_of, ranges, strict=True))
    gradients = x.numel() * x.element_size() + w.numel() * 4
    for kind, (loss, per_logit) in table.items():
        logits = N * C if kind.startswith("naive") else pairs
        row = {"op": "margin", "impl": kind, "N": N, "C": C, "D": D, "layout": name}
        if kind.startswith("liger") and name != "one":
            continue
        if per_logit * logits + 2 * gradients > 0.9 * free_memory(device):
            yield row | {"phase": "both", "note": "does not fit"}
            continue
        held: list[Tensor] = []

        def forward(loss=loss, held=held):
            held[:] = [loss(x, w, labels, rows_of, ranges, domains, low)]

        def clear():
            x.grad = w.grad = None

        def both(forward=forward, held=held):
            forward()
            held.pop().backward()

        def ready(forward=forward):
            clear()
            forward()

        try:
            both()
            clear()
            extra = peak_memory(both, device) - gradients / 2**20
            for phase, run, prepare, products, moves in (
                ("forward", forward, clear, 1, 1), ("backward", lambda held=held: held.pop().backward(), ready, 3, 2),
                ("both", both, clear, 4, 3),
            ):
                found = measure(run, device, seconds, prepare)
                flops, least = 2 * pairs * D * products, w.numel() * 4 * moves + 3 * N * D * x.element_size()
                ms = found["median_ms"]
                yield row | found | ceiling | {
                    "phase": phase, "extra_MiB": max(extra, 0.0), "tflops": flops / ms / 1e9, "gbs": least / ms / 1e6,
                    "floor_ms": max(flops / ceiling["ceiling_tflops"] / 1e9, least / ceiling["ceiling_gbs"] / 1e6),
                }
        except torch.OutOfMemoryError:
            yield row | {"phase": "both", "note": "does not fit"}
        held.clear()
        clear()


def say(row: dict) -> None:
    """One line of the table on the screen."""
    shape = " ".join(f"{key}={row[key]}" for key in ("N", "C", "D", "B", "S", "layout", "form") if key in row)
    if "median_ms" not in row:
        print(f"{row['impl']:20} {shape:42} {row['note']}", flush=True)
        return
    print(f"{row['impl']:20} {shape:42} {row.get('phase', ''):9}{row['median_ms']:9.3f} ms "
          f"[{row['p20_ms']:.3f}, {row['p80_ms']:.3f}]  floor {row['floor_ms']:8.3f} ms  "
          + (f"{row['extra_MiB']:8.0f} MiB  {row['tflops']:7.3g} TFLOP/s" if "tflops" in row else
             f"{row['gbs']:7.3g} GB/s"), flush=True)


# ---------------------------------------------------------------- gather


def gather_rows(device, B, S, seconds, ceiling, with_compile) -> Iterator[dict]:
    """Copy-normalise and resample B images of four banks; banks and outputs change with every call (cold L2)."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    count = max(2 * B, math.ceil((2**28 if on_gpu else 2**26) / (3 * S * S)))  # images: more than any L2 cache holds
    g = torch.Generator().manual_seed(0)
    banks = [torch.randint(0, 256, (count // 4 + 1, S, S, 3), dtype=torch.uint8, device=device) for _ in range(4)]
    turns = []
    for _ in range(4):
        domain = torch.arange(B) % 4
        row = torch.randint(0, count // 4, (B,), generator=g)
        corner = torch.rand(B, 2, generator=g) * 0.3 * S
        boxes = torch.cat([corner, corner + (0.4 + 0.3 * torch.rand(B, 2, generator=g)) * S], 1)
        flip = torch.rand(B, generator=g) < 0.5
        turns.append([v.to(device) for v in (domain, row, boxes, flip)])
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))

    def ours(impl, domain, row, boxes, flip, resample):
        return gather_interleaved(banks, domain, row, size=S, mean=MEAN, std=STD, dtype=dtype, impl=impl, flip=flip,
                                  boxes=boxes if resample else None)

    def eager(domain, row, boxes, flip, resample):
        """index_select per domain, cast, scale, normalise, flip, put in place."""
        out = torch.empty(B, 3, S, S, dtype=dtype, device=device, memory_format=torch.channels_last)
        for k, bank in enumerate(banks):
            x = bank.index_select(0, row[k::4]).permute(0, 3, 1, 2).to(torch.float32)
            x = (x / 255 - mean) / std
            out[k::4] = torch.where(flip[k::4].view(-1, 1, 1, 1), x.flip(3), x).to(dtype)
        return out

    forms: list[tuple[str, str, Callable, bool]] = [("eager", "copy", eager, False)]
    if with_compile:
        forms.append(("eager, compiled", "copy", torch.compile(eager, dynamic=False), False))
    for impl in (("triton", "torch") if on_gpu else ("torch",)):
        forms += [(impl, form, partial(ours, impl), form == "resample") for form in ("copy", "resample")]
    least = B * S * S * 3 * (1 + torch.finfo(dtype).bits // 8)
    for impl, form, function, resample in forms:
        calls = len(turns)

        def all_turns(function=function, resample=resample):
            for turn in turns:
                function(*turn, resample)

        run = all_turns
        if on_gpu and impl != "torch":  # plain PyTorch checks indices on the host, which no graph can hold
            all_turns()
            wait(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                all_turns()
            run = graph.replay
        found = {key: value / calls for key, value in measure(run, device, seconds).items()}
        yield {"op": "gather", "impl": impl, "form": form, "B": B, "S": S} | found | ceiling | {
            "gbs": least / found["median_ms"] / 1e6, "floor_ms": least / ceiling["ceiling_gbs"] / 1e6}


# ---------------------------------------------------------------- ahead-of-time compilation


LIMITS = {80: (65536, 166912), 90: (65536, 232448)}  # registers and bytes of shared memory of a multiprocessor
CASES = {  # N, K, C, D, embeddings, weights, float32 products
    "bf16, 1 x 8192": (1024, 1, 8192, 768, torch.bfloat16, torch.float32, "highest"),
    "bf16, 4 x 2048": (512, 4, 8192, 768, torch.bfloat16, torch.float32, "highest"),
    "bf16, few rows": (64, 4, 8192, 768, torch.bfloat16, torch.bfloat16, "highest"),
    "tf32": (512, 1, 8192, 768, torch.float32, torch.float32, "high"),
    "fp32": (512, 4, 8192, 768, torch.float32, torch.float32, "highest"),
    "fp16, odd sizes": (101, 3, 999, 100, torch.float16, torch.float32, "highest"),
}


def compile_kernels(arch: int) -> list[dict]:
    """Lower every launch of forward and backward for an architecture, without a GPU, and ask ptxas what it needs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from kernels import gather_triton, margin_triton

    class Driver:
        """Says which GPU to compile for; nothing is ever launched."""

        get_current_device = staticmethod(lambda: arch)  # compiled kernels are kept by device
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))

    ptxas, launch, rows, now = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas", JITFunction.run, {}, {}

    def lower(kernel, *arguments, grid, warmup, **options):
        built = launch(kernel, *arguments, grid=grid, warmup=True, **options)
        if (kernel.__name__, built.hash) not in rows:
            with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
                file.write(built.asm["ptx"])
                file.flush()
                said = subprocess.run([ptxas, "-v", f"-arch=sm_{arch}{'a' if arch >= 90 else ''}", file.name,
                                       "-o", "/dev/null"], capture_output=True, text=True, check=True).stderr
            registers, spills = (int(re.search(p, said)[1]) for p in (r"Used (\d+) reg", r"(\d+) bytes spill"))
            warps, shared = built.metadata.num_warps, built.metadata.shared
            most = min(LIMITS[arch][0] // (-(-registers // 8) * 8 * 32 * warps), LIMITS[arch][1] // (shared + 1024))
            unit = next((name for name in ("wgmma", "mma.sync") if name in built.asm["ptx"]), "")
            rows[kernel.__name__, built.hash] = {
                "arch": f"sm_{arch}", "case": now["case"], "kernel": kernel.__name__, "warps": warps,
                "registers": registers, "spill_bytes": spills, "shared_bytes": shared, "blocks_per_SM": most,
                "tensor_cores": unit}
        return built

    before = torch.get_float32_matmul_precision()
    try:
        JITFunction.run = lower
        triton.runtime.driver.set_active(Driver())
        for now["case"], (N, K, C, D, embeddings, weights, precision) in CASES.items():
            torch.set_float32_matmul_precision(precision)
            x, w = torch.ones(N, D, dtype=embeddings).requires_grad_(), torch.ones(C, D, dtype=weights).requires_grad_()
            zero, one = torch.zeros(N, dtype=torch.long), torch.ones(N)
            ranges = [(k * C // K, (k + 1) * C // K) for k in range(K)]
            for extra in (False, True):
                loss, *_ = margin_triton.margin_loss(
                    x, w, zero, zero, ranges, None, [one] * 3, [torch.ones(K), torch.zeros(K), None],
                    num_domains=0, by_sample=extra, clamp=extra, straight=extra, smooth=extra)
                loss.backward()
        banks = [torch.zeros(2, 224, 224, 3, dtype=torch.uint8)] * 4
        two, flag = torch.zeros(2, dtype=torch.long), torch.zeros(1, dtype=torch.int32)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for form, boxes in (("copy", None), ("resample", torch.ones(2, 4))):
                now["case"] = f"{form}, {dtype}".replace("torch.", "")
                gather_triton.gather(banks, two, two, 224, MEAN, STD, boxes, None, dtype, True, flag)
                gather_triton.gather(banks, two, two, 224, MEAN, STD, boxes, two > 0, dtype, False, flag)
    finally:
        JITFunction.run = launch
        torch.set_float32_matmul_precision(before)
    return list(rows.values())


# ---------------------------------------------------------------- softmax mass


def live_pairs(logits: Tensor, dropped: float) -> Tensor:
    """Largest non-target logits [n] of every row of [n, C] (targets at -inf) that leave out at most `dropped` of the
    non-targets' softmax mass."""
    mass = logits.double().softmax(1).sort(1, descending=True).values.cumsum(1)
    return (mass < 1 - dropped).sum(1) + 1


def mass_rows(cases: dict[str, Tensor], D: int, tflops: float, gbs: float) -> Iterator[dict]:
    """Live pairs beside the number below which a list of pairs would beat the two dense products of the backward pass.

    Per sample the dense products cost 4 C D operations; a list costs per pair D·2 bytes of W read for dx and D·8 bytes
    of dW read and written.
    """
    for name, logits in cases.items():
        C = logits.shape[1]
        even = 4 * C / (tflops * 1e12) * (gbs * 1e9) / 10
        for dropped in (1e-1, 1e-2, 1e-3):
            live = live_pairs(logits, dropped).double()
            yield {"op": "mass", "case": name, "C": C, "drop_mass": dropped, "median": float(live.median()),
                   "mean": float(live.mean()), "p95": float(live.quantile(0.95)), "break_even": even,
                   "speed_of_products": even / float(live.mean())}


# ---------------------------------------------------------------- goals


def verdicts(device: torch.device, seconds: float) -> tuple[list[dict], list[tuple[str, str, bool]]]:
    """Rows and (goal, what was measured, met) for the sizes that the goals name."""
    ceiling, rows, goals = ceilings(device), [], []
    table = implementations(device, True)
    for N, C, D, name in ((1024, 100_000, 768, "one"), (1024, 100_000, 768, "four"), (1024, 100_000, 768, "shares"),
                          (256, 10_000, 384, "four"), (1024, 10_000, 768, "one"), (4096, 600_000, 768, "four")):
        for row in margin_rows(device, N, C, D, name, table, seconds, ceiling):
            rows.append(row)
            say(row)
    left, right = (torch.randn(n, 768, device=device).to(torch.bfloat16) for n in (1024, 100_000))
    product = measure(lambda: left @ right.T, device, seconds)["median_ms"]
    both = {(r["N"], r["C"], r["layout"], r["impl"]): r for r in rows if r["phase"] == "both"}
    ours = both[1024, 100_000, "one", "triton"]["median_ms"]
    goals.append(("one domain of 100k <= 1.5 x five products", f"{ours / product / 5:.2f} x", ours <= 7.5 * product))
    goals.append(("stretch: <= 1.5 x four products", f"{ours / product / 4:.2f} x", ours <= 6 * product))
    four = both[1024, 100_000, "four", "triton"]
    ratio = four["median_ms"] / four["floor_ms"]
    goals.append(("four domains of 25k <= 2 x the floor", f"{ratio:.2f} x", ratio <= 2))
    for (N, C, name, impl), row in both.items():
        mine = both[N, C, name, "triton"]
        if impl in ("triton", "liger, no margin") or impl.startswith("torch"):
            continue
        if "median_ms" not in row:
            goals.append((f"{impl}, N={N} C={C} {name}", "it does not fit, ours does", True))
            continue
        want = 3 if impl.startswith("naive") and name != "one" else 1
        ratio = row["median_ms"] / mine["median_ms"]
        goals.append((f">= {want} x as fast as {impl}, N={N} C={C} {name}", f"{ratio:.2f} x", ratio >= want))
        if impl == "eager":
            share = mine["extra_MiB"] / max(row["extra_MiB"], 1e-9)
            goals.append((f"extra memory <= 5 % of eager's, N={N} C={C} {name}", f"{share:.1%}", share <= 0.05))
    for row in margin_rows(device, 4096, 2_200_000, 1024, "one", {"triton": table["triton"]}, seconds, ceiling):
        rows.append(row)
        say(row)
    extra = rows[-1].get("extra_MiB", math.inf)
    goals.append(("N=4096 C=2.2M D=1024 within 1 GB beyond W and dW", f"{extra:.0f} MiB", extra <= 1000))
    for B in (256, 1024):
        found = list(gather_rows(device, B, 224, seconds, ceiling, True))
        rows += found
        for row in found:
            say(row)
        share = next(r["gbs"] / r["ceiling_gbs"] for r in found if r["impl"] == "triton" and r["form"] == "copy")
        goals.append((f"gather >= 85 % of the copy bandwidth, B={B} S=224", f"{share:.0%}", share >= 0.85))
    return rows, goals


# ---------------------------------------------------------------- command line


@click.group(context_settings={"show_default": True, "max_content_width": 120}, help=__doc__)
def cli() -> None:
    pass


def options(command):
    """What the timed commands share."""
    for option in (
        click.option("--csv", "path", type=click.Path(path_type=Path), help="File to write the table to."),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to run."),
        click.option("--seconds", type=click.FloatRange(0, min_open=True), default=0.5, help="Time for every row."),
        click.option("--compile/--no-compile", "with_compile", default=None,
                     help="Compare with torch.compile, too (default: on a GPU)."),
    ):
        command = option(command)
    return command


def pick(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: there is no CUDA device here; use --device cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


@cli.command(help="The margin loss against what a user would write.")
@options
@click.option("--samples", "samples", multiple=True, type=int, help="N (default: 256 1024 4096; on a CPU 256).")
@click.option("--classes", "classes", multiple=True, type=int,
              help="C (default: 1k 10k 100k 600k 2.2M; on a CPU 1k 10k 100k).")
@click.option("--width", "widths", multiple=True, type=int, help="D (default: 384 768 1024; on a CPU 384).")
@click.option("--layout", "layouts", multiple=True, type=click.Choice(LAYOUTS), default=LAYOUTS,
              help="One domain, four equal ones, realistic shares.")
def margin(path, device, seconds, with_compile, samples, classes, widths, layouts) -> None:
    device = pick(device)
    gpu = device.type == "cuda"
    source, ceiling, rows = provenance(device), ceilings(device), []
    print(f"{source}\nceilings: {ceiling['ceiling_tflops']:.3g} TFLOP/s, {ceiling['ceiling_gbs']:.0f} GB/s")
    table = implementations(device, gpu if with_compile is None else with_compile)
    for D in widths or ((384, 768, 1024) if gpu else (384,)):
        for C in classes or ((1000, 10_000, 100_000, 600_000, 2_200_000) if gpu else (1000, 10_000, 100_000)):
            for N in samples or ((256, 1024, 4096) if gpu else (256,)):
                for name in layouts:
                    for row in margin_rows(device, N, C, D, name, table, seconds, ceiling):
                        rows.append(source | row)
                        say(row)
    write_csv(path, rows)


@cli.command(help="The interleaved gather against PyTorch and the copy ceiling.")
@options
@click.option("--batch", "batches", multiple=True, type=int, help="B (default: 64 256 1024; on a CPU 64).")
@click.option("--size", "sizes", multiple=True, type=int, help="S in pixels (default: 112 224 448; on a CPU 112 224).")
def gather(path, device, seconds, with_compile, batches, sizes) -> None:
    device = pick(device)
    gpu = device.type == "cuda"
    source, ceiling, rows = provenance(device), ceilings(device), []
    print(f"{source}\nceilings: {ceiling['ceiling_tflops']:.3g} TFLOP/s, {ceiling['ceiling_gbs']:.0f} GB/s")
    for S in sizes or ((112, 224, 448) if gpu else (112, 224)):
        for B in batches or ((64, 256, 1024) if gpu else (64,)):
            for row in gather_rows(device, B, S, seconds, ceiling, gpu if with_compile is None else with_compile):
                rows.append(source | row)
                say(row)
    write_csv(path, rows)


@cli.command("compile", help="Lower every Triton kernel, forward and backward, without a GPU.")
@click.option("--arch", "archs", multiple=True, type=click.Choice(["80", "90"]), default=["80", "90"],
              help="Compute capability.")
@click.option("--csv", "path", type=click.Path(path_type=Path), help="File to write the table to.")
def compile_(archs, path) -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are imported
    rows = [row for arch in archs for row in compile_kernels(int(arch))]
    print(f"{'':6}{'kernel':18}{'case':20}warps  registers  spilled bytes  shared bytes  blocks/SM  tensor cores")
    for r in rows:
        print(f"{r['arch']:6}{r['kernel']:18}{r['case']:20}{r['warps']:5}{r['registers']:11}{r['spill_bytes']:15}"
              f"{r['shared_bytes']:14}{r['blocks_per_SM']:11}  {r['tensor_cores']}")
    write_csv(path, rows)


@cli.command(help="Pairs that hold the softmax mass of the non-targets: random ones, or a trained model's cosines.")
@click.option("--cosines", multiple=True, type=click.Path(path_type=Path, exists=True),
              help=".npy of non-target cosines [n, C] of a trained model, instead of random ones.")
@click.option("--scale", default=64.0, help="s of the logits.")
@click.option("--classes", default=93_000, help="C of the random ones.")
@click.option("--tflops", default=700.0, help="Products of the GPU to predict for.")
@click.option("--bandwidth", default=3350.0, help="GB/s of its memory.")
@click.option("--csv", "path", type=click.Path(path_type=Path), help="File to write the table to.")
def mass(cosines, scale, classes, tflops, bandwidth, path) -> None:
    g = torch.Generator().manual_seed(0)
    cases = {f.name: scale * torch.from_numpy(np.load(f, allow_pickle=False)).float() for f in cosines} or {
        f"random, spread {spread}": scale * spread * torch.randn(32, classes, generator=g)
        for spread in (0.036, 0.05, 0.07, 0.1)}
    rows = list(mass_rows(cases, 768, tflops, bandwidth))
    for r in rows:
        print(f"{r['case']:28} C={r['C']:<8} drop_mass {r['drop_mass']:<6} pairs: median {r['median']:9.0f}  mean "
              f"{r['mean']:9.0f}  p95 {r['p95']:9.0f}   list beats dense products below {r['break_even']:6.0f}: "
              f"{r['speed_of_products']:.2f} x")
    write_csv(path, rows)


@cli.command(help="The goals, on this GPU: measured, and whether they are met; exit code 1 if one is missed.")
@click.option("--csv", "path", type=click.Path(path_type=Path), help="File to write the table to.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=0.5, help="Time for every row.")
def check(path, seconds) -> None:
    device = pick("cuda")
    source = provenance(device)
    print(source)
    rows, goals = verdicts(device, seconds)
    write_csv(path, [source | row for row in rows])
    print("\n| goal | measured | |\n|---|---|---|")
    for goal, found, met in goals:
        print(f"| {goal} | {found} | {'met' if met else 'MISSED'} |")
    raise SystemExit(0 if all(met for *_, met in goals) else 1)


if __name__ == "__main__":
    cli()
