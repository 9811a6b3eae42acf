"""Benchmarks of the kernels: `python -m kernels.bench [margin|gather|compile|check] [--csv FILE]`.
Copy with it: kernels/.

A row holds median, 20th and 80th percentile of the time, peak memory beyond inputs and gradients, and two ceilings
measured in the same run: TFLOP/s of a matrix product and GB/s of a copy. Its floor is the larger of two times: of the
operations at the first rate and of the fewest possible bytes at the second.
"""

import csv
import ctypes
import itertools
import math
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F

from .gather import gather_interleaved
from .lower import compile_kernels
from .margin_loss import margin_loss
from .margin_plan import make_plan

DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}  # of embeddings and pixels
LAYOUTS = ("one", "four", "shares")
CUT_CROSS_ENTROPY = "cut cross-entropy, no margin"
LOOK = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}

# ---------------------------------------------------------------- the harness


def measure(run: Callable, device: torch.device, seconds: float, prepare: Callable = lambda: None) -> dict:
    """median_ms, p20_ms, p80_ms of calls over `seconds`, after two warm-up calls."""
    times: list[float] = []
    for call in range(200):
        prepare()
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            tick = time.perf_counter()
            run()
            elapsed = 1e3 * (time.perf_counter() - tick)
        if call >= 2:
            times.append(elapsed)
        if len(times) >= 3 and sum(times) > 1e3 * seconds:
            break
    return {f"{name}_ms": float(np.percentile(times, q)) for name, q in (("median", 50), ("p20", 20), ("p80", 80))}


def peak_memory(run: Callable, device: torch.device) -> float:
    """Peak memory of one call in MiB, beyond that in use before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def status(field: str) -> float:
        return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

    ctypes.CDLL(None).malloc_trim(0)  # or memory freed by earlier calls would be reused without being counted (glibc)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (Linux)
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def ceilings(device: torch.device) -> dict:
    """TFLOP/s of a large matrix product in the dtype of the benchmark, and GB/s (read + written) of a large copy."""
    side, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    a = torch.randn(side, side, device=device).to(DTYPE[device.type])
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = measure(lambda: a @ a, device, 0.5)["p20_ms"]
    copy = measure(lambda: target.copy_(source), device, 0.5)["p20_ms"]
    return {"ceiling_tflops": 2 * side**3 / product / 1e9, "ceiling_gbs": 2 * size / copy / 1e6}


def print_row(row: dict) -> dict:
    shape = " ".join(f"{key}={row[key]}" for key in ("N", "C", "D", "B", "S", "layout", "form") if key in row)
    line = f"{row['impl']:28} {shape:42} "
    if "median_ms" in row:
        line += (f"{row.get('phase', ''):9}{row['median_ms']:9.3f} ms [{row['p20_ms']:.3f}, {row['p80_ms']:.3f}]  "
                 f"floor {row['floor_ms']:8.3f} ms  {row['gbs']:7.3g} GB/s")
        line += f"  {row['extra_MiB']:8.0f} MiB  {row['tflops']:7.3g} TFLOP/s" if "tflops" in row else ""
    print(line + row.get("note", ""), flush=True)
    return row


def write_csv(path: Path | None, rows: list[dict]) -> None:
    if path is not None and rows:
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            table.writeheader()
            table.writerows(rows)
        print(f"{path}: {len(rows)} rows")


# ---------------------------------------------------------------- margin loss


def layout(name: str, N: int, C: int) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """Class ranges and domains [N] of "one" domain, "four" equal ones, or four with realistic "shares" of classes."""
    # object: up to 1,000 classes; most of the others are face_hq
    small = [max(min(1000, C // 10), 2), max(C // 50, 2), max(C // 100, 2)]
    sizes = {"one": [C], "four": [C // 4] * 4, "shares": [small[0], C - sum(small), *small[1:]]}[name]
    ends = np.cumsum(sizes).tolist()
    ranges = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return ranges, torch.arange(N) % len(ranges)  # interleaved, as in schedule B


def eager(x, w, labels, rows_of, ranges, domains, s=64.0, m=0.5):
    """The straightforward form: a loop over domains, s cos(θ + m) at the label; on a GPU under autocast."""
    total = x.new_zeros((), dtype=torch.float32)
    for rows, (start, end) in zip(rows_of, ranges, strict=True):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            cos = F.linear(F.normalize(x[rows]), F.normalize(w[start:end]))
            target = torch.arange(len(cos), device=cos.device), labels[rows]
            t = cos[target].float().clamp(-1 + 1e-6, 1 - 1e-6)
            with_margin = t * math.cos(m) - (1 - t * t).sqrt() * math.sin(m)
            logits = s * cos.index_put(target, with_margin.to(cos.dtype))
            total = total + F.cross_entropy(logits.float(), labels[rows])
    return total / len(ranges)


def implementations(device: torch.device, with_compile: bool) -> dict[str, Callable]:
    """name -> loss(x, w, labels, rows_of, ranges, domains)."""

    def ours(impl, x, w, labels, rows_of, ranges, domains):
        return margin_loss(x, w, labels, domains, ranges, scale=64.0, margin_angular=0.5, impl=impl).loss

    on_gpu = device.type == "cuda"
    table = {"triton": partial(ours, "triton")} if on_gpu else {}
    table |= {"torch": partial(ours, "torch"), "eager": eager}
    if with_compile:
        table["eager, compiled"] = torch.compile(eager, dynamic=False)
    if on_gpu and find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy
        table[CUT_CROSS_ENTROPY] = lambda x, w, labels, *_: linear_cross_entropy(x, w.to(x.dtype), labels)
    return table


def margin_rows(device, N, C, D, name, table, seconds, ceiling) -> Iterator[dict]:
    """One row per implementation and phase."""
    ranges, domains = layout(name, N, C)
    domains, sizes = domains.to(device), torch.tensor([end - start for start, end in ranges], device=device)
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(N, D, generator=g, device=device).to(DTYPE[device.type]).requires_grad_()
    w = torch.randn(ranges[-1][1], D, generator=g, device=device).requires_grad_()
    labels = (torch.rand(N, generator=g, device=device) * sizes[domains]).long().clamp(max=sizes[domains] - 1)
    rows_of = [(domains == k).nonzero().flatten() for k in range(len(ranges))]
    pairs = sum(len(rows) * (end - start) for rows, (start, end) in zip(rows_of, ranges, strict=True))
    gradients = x.numel() * x.element_size() + w.numel() * 4
    for kind, loss in table.items():
        row, graph = {"op": "margin", "impl": kind, "N": N, "C": C, "D": D, "layout": name}, []
        if kind == CUT_CROSS_ENTROPY and name != "one":
            continue

        def forward(loss=loss, graph=graph):
            graph[:] = [loss(x, w, labels, rows_of, ranges, domains)]

        def backward(graph=graph):
            graph.pop().backward()

        def clear():
            x.grad = w.grad = None

        def both(forward=forward, backward=backward):
            forward()
            backward()

        def prepare_backward(forward=forward):
            clear()
            forward()

        try:
            both()
        except torch.OutOfMemoryError:
            yield row | {"phase": "both", "note": "does not fit"}
            continue
        clear()
        extra = peak_memory(both, device) - gradients / 2**20
        for phase, run, prepare, products, passes in (
                ("forward", forward, clear, 1, 1), ("backward", backward, prepare_backward, 3, 2),
                ("both", both, clear, 4, 3)):
            times = measure(run, device, seconds, prepare)
            flops, least = 2 * pairs * D * products, w.numel() * 4 * passes + 3 * N * D * x.element_size()
            yield row | times | ceiling | {
                "phase": phase, "extra_MiB": max(extra, 0.0), "tflops": flops / times["median_ms"] / 1e9,
                "gbs": least / times["median_ms"] / 1e6,
                "floor_ms": max(flops / ceiling["ceiling_tflops"] / 1e9, least / ceiling["ceiling_gbs"] / 1e6)}
        graph.clear()  # drops the graph of the last timed forward pass
        clear()


# ---------------------------------------------------------------- gather


def gather_rows(device, B, S, seconds, ceiling) -> Iterator[dict]:
    """Crop, resample and normalise B images of four banks larger than the L2 cache, in four batches."""
    on_gpu, dtype = device.type == "cuda", DTYPE[device.type]
    count = max(2 * B, math.ceil((2**28 if on_gpu else 2**26) / (3 * S * S)))  # images
    g = torch.Generator().manual_seed(0)
    banks = [torch.randint(0, 256, (count // 4 + 1, S, S, 3), dtype=torch.uint8, device=device) for _ in range(4)]
    batches = []
    for _ in range(4):
        corner = torch.rand(B, 2, generator=g) * 0.3 * S
        boxes = torch.cat([corner, corner + (0.4 + 0.3 * torch.rand(B, 2, generator=g)) * S], 1)
        row, flip = torch.randint(0, count // 4, (B,), generator=g), torch.rand(B, generator=g) < 0.5
        batches.append([v.to(device) for v in (torch.arange(B) % 4, row, boxes, flip)])
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in LOOK.values())

    def ours(impl, interpolation, domain, row, boxes, flip):
        return gather_interleaved(banks, domain, row, size=S, **LOOK, dtype=dtype, impl=impl, flip=flip, boxes=boxes,
                                  interpolation=interpolation)

    def plain(domain, row, boxes, flip):
        """Without resampling: index_select per domain, cast, normalise, flip, write."""
        out = torch.empty(B, 3, S, S, dtype=dtype, device=device, memory_format=torch.channels_last)
        for k, bank in enumerate(banks):
            x = (bank.index_select(0, row[k::4]).permute(0, 3, 1, 2).to(torch.float32) / 255 - mean) / std
            out[k::4] = torch.where(flip[k::4].view(-1, 1, 1, 1), x.flip(3), x).to(dtype)
        return out

    forms = [(impl, form, partial(ours, impl, form)) for impl in ("triton", "torch") if on_gpu or impl == "torch"
             for form in ("bilinear", "bicubic")]
    least = B * S * S * 3 * (1 + dtype.itemsize)
    for impl, form, function in [("eager", "copy", plain), *forms]:

        def all_batches(function=function):
            for batch in batches:
                function(*batch)

        run = all_batches
        if impl == "triton":  # no launch overhead; plain PyTorch synchronises, so it cannot be captured
            all_batches()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                all_batches()
            run = graph.replay
        times = {key: value / len(batches) for key, value in measure(run, device, seconds).items()}
        yield {"op": "gather", "impl": impl, "form": form, "B": B, "S": S} | times | ceiling | {
            "gbs": least / times["median_ms"] / 1e6, "floor_ms": least / ceiling["ceiling_gbs"] / 1e6}


# ---------------------------------------------------------------- goals


def planned(N: int, C: int, D: int, name: str) -> float:
    """Allowed MiB of a bf16 call beyond inputs and gradients: 1.1 times its plan, and the temporaries of dx."""
    plan = make_plan(N, D, tuple(layout(name, N, C)[0]), torch.bfloat16, torch.float32, "high", 132)
    return 1.1 * plan.workspace(C) / 2**20 + 4 * N * D * 4 / 2**20 + 2  # four tensors of the size of dx


def measure_goals(device: torch.device, seconds: float) -> tuple[list[dict], list[tuple[str, str, bool]]]:
    """Rows of the benchmark and (goal, measured value, met) for the sizes of the goals."""
    ceiling, rows, goals, table = ceilings(device), [], [], implementations(device, True)
    for N, C, D, name in ((1024, 100_000, 768, "one"), (1024, 100_000, 768, "four"), (1024, 100_000, 768, "shares"),
                          (256, 10_000, 384, "four"), (1024, 10_000, 768, "one"), (4096, 600_000, 768, "four")):
        rows += map(print_row, margin_rows(device, N, C, D, name, table, seconds, ceiling))
    left, right = (torch.randn(n, 768, device=device).to(torch.bfloat16) for n in (1024, 100_000))
    product = measure(lambda: left @ right.T, device, seconds)["median_ms"]
    both = {(r["N"], r["C"], r["layout"], r["impl"]): r for r in rows if r["phase"] == "both"}
    ours = both[1024, 100_000, "one", "triton"]["median_ms"]
    goals.append(("one domain of 100k <= 1.5 x five products", f"{ours / product / 5:.2f} x", ours <= 7.5 * product))
    ratio = both[1024, 100_000, "four", "triton"]["median_ms"] / both[1024, 100_000, "four", "triton"]["floor_ms"]
    goals.append(("four domains of 25k <= 2 x the floor", f"{ratio:.2f} x", ratio <= 2))
    for (N, C, name, impl), row in both.items():
        triton = both[N, C, name, "triton"]
        if impl in ("triton", "torch") or "median_ms" not in row:  # baselines that run out of memory
            continue
        ratio = row["median_ms"] / triton["median_ms"]
        goals.append((f"as fast as {impl}, N={N} C={C} {name}", f"{ratio:.2f} x", ratio >= 1))
        if impl == "eager":
            most, extra = planned(N, C, triton["D"], name), triton["extra_MiB"]
            goals.append((f"extra memory <= {most:.0f} MiB, N={N} C={C} {name}", f"{extra:.0f} MiB (eager: "
                          f"{row['extra_MiB']:.0f})", extra <= most))
    largest = margin_rows(device, 4096, 2_200_000, 1024, "one", {"triton": table["triton"]}, seconds, ceiling)
    rows += map(print_row, largest)
    extra = rows[-1].get("extra_MiB", math.inf)
    goals.append(("N=4096 C=2.2M D=1024 within 1 GB beyond W and dW", f"{extra:.0f} MiB", extra <= 1000))
    for B in (256, 1024):
        measured = list(map(print_row, gather_rows(device, B, 224, seconds, ceiling)))
        rows += measured
        for ms, form in ((row["median_ms"], row["form"]) for row in measured if row["impl"] == "triton"):
            most = B / 1024 * {"bilinear": 0.5, "bicubic": 1.0}[form]  # 4 and 16 byte loads per output value
            goals.append((f"gather, {form}, B={B} S=224 <= {most} ms", f"{ms:.3f} ms", ms <= most))
    return rows, goals


# ---------------------------------------------------------------- command line


@click.group(context_settings={"show_default": True, "max_content_width": 120}, help=__doc__.partition("\n")[0])
def cli() -> None:
    pass


PATH = click.option("--csv", "path", type=click.Path(path_type=Path), help="CSV file to write.")
SECONDS = click.option("--seconds", type=click.FloatRange(0, min_open=True), default=0.5, help="Per measurement.")
DEVICE = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="auto: GPU if any.")


def begin(device: str) -> tuple[torch.device, dict]:
    """The device, and the columns that identify it: date, device, versions, commit."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: no CUDA device is available; use --device cpu")
    place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if place.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    source = {"date": date.today().isoformat(), "device": name, "torch": torch.__version__, "commit": commit or "?",
              "triton": version("triton") if find_spec("triton") else "none"}
    print(source)
    return place, source


@cli.command(help="The margin loss against eager and compiled PyTorch: forward, backward, both.")
@PATH
@DEVICE
@SECONDS
@click.option("--compile/--no-compile", "with_compile", help="Also compare with torch.compile.")
@click.option("--samples", multiple=True, type=int, help="Samples N (default: 256 1024 4096; CPU: 256).")
@click.option("--classes", multiple=True, type=int, help="Classes C (default: 1k 10k 100k 600k 2.2M; CPU: to 100k).")
@click.option("--width", "widths", multiple=True, type=int, help="Width D (default: 384 768 1024; CPU: 384).")
@click.option("--layout", "layouts", multiple=True, type=click.Choice(LAYOUTS), default=LAYOUTS,
              help="One domain, four equal ones, or four of realistic shares.")
def margin(path, device, seconds, with_compile, samples, classes, widths, layouts) -> None:
    device, source = begin(device)
    gpu, ceiling = device.type == "cuda", ceilings(device)
    table = implementations(device, with_compile)
    cases = itertools.product(widths or ((384, 768, 1024) if gpu else (384,)),
                              classes or (1000, 10_000, 100_000, *((600_000, 2_200_000) if gpu else ())),
                              samples or ((256, 1024, 4096) if gpu else (256,)), layouts)
    write_csv(path, [source | print_row(row) for D, C, N, name in cases
                     for row in margin_rows(device, N, C, D, name, table, seconds, ceiling)])


@cli.command(help="The interleaved gather against PyTorch, and against copies without resampling.")
@PATH
@DEVICE
@SECONDS
@click.option("--batch", "batches", multiple=True, type=int, help="Images B (default: 64 256 1024; CPU: 64).")
@click.option("--size", "sizes", multiple=True, type=int, help="Pixels S (default: 112 224 448; CPU: 112 224).")
def gather(path, device, seconds, batches, sizes) -> None:
    device, source = begin(device)
    gpu, ceiling = device.type == "cuda", ceilings(device)
    cases = itertools.product(sizes or ((112, 224, 448) if gpu else (112, 224)),
                              batches or ((64, 256, 1024) if gpu else (64,)))
    write_csv(path, [source | print_row(row) for S, B in cases for row in gather_rows(device, B, S, seconds, ceiling)])


@cli.command("compile", help="Compile every launch of the Triton kernels, without a GPU: registers, spills, overlap.")
@PATH
@click.option("--arch", "archs", multiple=True, type=click.Choice(["80", "90"]), default=["80", "90"],
              help="Compute capability x 10.")
def compile_(path, archs) -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # read at the import of the kernels
    rows = [row for arch in archs for row in compile_kernels(int(arch))]
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in widths}, *rows]:
        print("  ".join(f"{row[key]!s:{width}}" for key, width in widths.items()))
    write_csv(path, rows)


@cli.command(help="Measure the goals on this GPU; exit code 1 if one is missed.")
@PATH
@SECONDS
def check(path, seconds) -> None:
    device, source = begin("cuda")
    rows, goals = measure_goals(device, seconds)
    write_csv(path, [source | row for row in rows])
    print("\n| goal | measured | |\n|---|---|---|")
    for goal, measured, met in goals:
        print(f"| {goal} | {measured} | {'met' if met else 'MISSED'} |")
    raise SystemExit(0 if all(met for *_, met in goals) else 1)


if __name__ == "__main__":
    cli()
