"""Benchmarks of the kernels: `python -m kernels.bench [margin|gather|compile|check] [--csv FILE]`.

    margin    the multi-domain margin loss against what a user would write: forward, backward, both
    gather    the interleaved gather against indexing and normalising in PyTorch, and against plain copies
    compile   lower every launch of the Triton kernels for sm_80 and sm_90 (needs no GPU): registers, spills, overlap
    check     on a GPU: the sizes that the goals name, with the verdict

A row has the median and the 20th and 80th percentile, the peak of memory beyond inputs and gradients, and the ceilings
measured in the same run: products (TFLOP/s) and copies (GB/s). Its floor is max(products at the one, least bytes at the
other).
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

LAYOUTS = ("one", "four", "shares")
OUTSIDE = "cut cross-entropy, no margin"
LOOK = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}

# ---------------------------------------------------------------- the harness


def measure(run: Callable, device: torch.device, seconds: float, prepare: Callable = lambda: None) -> dict:
    """median_ms, p20_ms, p80_ms of calls over `seconds`, after two that are not counted (they compile and allocate)."""
    found: list[float] = []
    for call in range(200):
        prepare()
        if device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            run()
            after.record()
            torch.cuda.synchronize()
            spent = before.elapsed_time(after)
        else:
            tick = time.perf_counter()
            run()
            spent = 1e3 * (time.perf_counter() - tick)
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


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def ceilings(device: torch.device) -> dict:
    """Best TFLOP/s of a large product in the dtype of the benchmark, and GB/s (read + written) of a large copy."""
    side, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    a = torch.randn(side, side, device=device).to(dtype_of(device))
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = measure(lambda: a @ a, device, 0.5)["p20_ms"]
    copy = measure(lambda: target.copy_(source), device, 0.5)["p20_ms"]
    return {"ceiling_tflops": 2 * side**3 / product / 1e9, "ceiling_gbs": 2 * size / copy / 1e6}


def provenance(device: torch.device) -> dict:
    """What every row says of where it comes from."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    triton = __import__("triton").__version__ if find_spec("triton") else "none"
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"date": date.today().isoformat(), "device": name, "torch": torch.__version__, "triton": triton,
            "commit": commit or "unknown"}


def say(row: dict) -> dict:
    """Print one line of the table and return it."""
    shape = " ".join(f"{key}={row[key]}" for key in ("N", "C", "D", "B", "S", "layout", "form") if key in row)
    line = f"{row['impl']:28} {shape:42} "
    if "median_ms" in row:
        line += (f"{row.get('phase', ''):9}{row['median_ms']:9.3f} ms [{row['p20_ms']:.3f}, {row['p80_ms']:.3f}]  "
                 f"floor {row['floor_ms']:8.3f} ms  {row['gbs']:7.3g} GB/s")
        line += f"{row['extra_MiB']:8.0f} MiB  {row['tflops']:7.3g} TFLOP/s" if "tflops" in row else ""
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
    """Class ranges and domains [N]: "one" domain, "four" equal ones, or realistic "shares" of the classes."""
    # object, face_hq, face_lq, body: a thousand object classes, thousands of people, the bulk in face_hq
    small = [max(min(1000, C // 10), 2), max(C // 50, 2), max(C // 100, 2)]
    sizes = {"one": [C], "four": [C // 4] * 4, "shares": [small[0], C - sum(small), *small[1:]]}[name]
    ends = np.cumsum(sizes).tolist()
    ranges = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return ranges, torch.arange(N) % len(ranges)  # interleaved, as schedule B has it


def eager(x, w, labels, rows_of, ranges, domains, s=64.0, m=0.5):
    """What a user would write: a loop over the domains, s cos(θ + m) at the label, on a GPU under autocast."""
    total = x.new_zeros((), dtype=torch.float32)
    for rows, (start, end) in zip(rows_of, ranges, strict=True):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            cos = F.linear(F.normalize(x[rows]), F.normalize(w[start:end]))
            own = torch.arange(len(cos), device=cos.device), labels[rows]
            t = cos[own].float().clamp(-1 + 1e-6, 1 - 1e-6)
            turned = t * math.cos(m) - (1 - t * t).sqrt() * math.sin(m)
            logits = s * cos.index_put(own, turned.to(cos.dtype))
            total = total + F.cross_entropy(logits.float(), labels[rows])
    return total / len(ranges)


def implementations(device: torch.device, with_compile: bool) -> dict[str, tuple[Callable, float]]:
    """name -> (loss(x, w, labels, rows_of, ranges, domains), bytes of memory per logit that it holds)."""

    def ours(impl, x, w, labels, rows_of, ranges, domains):
        return margin_loss(x, w, labels, domains, ranges, scale=64.0, margin_angular=0.5, impl=impl).loss

    def outside(x, w, labels, *_):
        from cut_cross_entropy import linear_cross_entropy
        return linear_cross_entropy(x, w.to(x.dtype), labels)

    table = {"triton": (partial(ours, "triton"), 0.0)} if device.type == "cuda" else {}
    table |= {"torch": (partial(ours, "torch"), 0.0), "eager": (eager, 18.0)}
    if with_compile:
        table["eager, compiled"] = torch.compile(eager, dynamic=False), 18.0
    if device.type == "cuda" and find_spec("cut_cross_entropy"):  # without an N x C matrix either
        table[OUTSIDE] = outside, 0.0
    return table


def margin_rows(device, N, C, D, name, table, seconds, ceiling) -> Iterator[dict]:
    """One row per implementation and phase."""
    ranges, domains = layout(name, N, C)
    domains, sizes = domains.to(device), torch.tensor([end - start for start, end in ranges], device=device)
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(N, D, generator=g, device=device).to(dtype_of(device)).requires_grad_()
    w = torch.randn(ranges[-1][1], D, generator=g, device=device).requires_grad_()
    labels = (torch.rand(N, generator=g, device=device) * sizes[domains]).long().clamp(max=sizes[domains] - 1)
    rows_of = [(domains == k).nonzero().flatten() for k in range(len(ranges))]
    pairs = sum(len(rows) * (end - start) for rows, (start, end) in zip(rows_of, ranges, strict=True))
    gradients = x.numel() * x.element_size() + w.numel() * 4
    for kind, (loss, per_logit) in table.items():
        row = {"op": "margin", "impl": kind, "N": N, "C": C, "D": D, "layout": name}
        free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else 2**40
        if kind == OUTSIDE and name != "one":
            continue
        if per_logit * pairs + 2 * gradients > 0.9 * free:
            yield row | {"phase": "both", "note": "does not fit"}
            continue
        held: list[torch.Tensor] = []

        def forward(loss=loss, held=held):
            held[:] = [loss(x, w, labels, rows_of, ranges, domains)]

        def backward(held=held):
            held.pop().backward()

        def clear():
            x.grad = w.grad = None

        def run_in_turn(*steps):
            for step in steps:
                step()

        both, ready = partial(run_in_turn, forward, backward), partial(run_in_turn, clear, forward)
        both()
        clear()
        extra = peak_memory(both, device) - gradients / 2**20
        for phase, run, prepare, products, moves in (("forward", forward, clear, 1, 1),
                                                     ("backward", backward, ready, 3, 2), ("both", both, clear, 4, 3)):
            found = measure(run, device, seconds, prepare)
            flops, least = 2 * pairs * D * products, w.numel() * 4 * moves + 3 * N * D * x.element_size()
            ms = found["median_ms"]
            yield row | found | ceiling | {
                "phase": phase, "extra_MiB": max(extra, 0.0), "tflops": flops / ms / 1e9, "gbs": least / ms / 1e6,
                "floor_ms": max(flops / ceiling["ceiling_tflops"] / 1e9, least / ceiling["ceiling_gbs"] / 1e6)}
        held.clear()
        clear()


# ---------------------------------------------------------------- gather


def gather_rows(device, B, S, seconds, ceiling) -> Iterator[dict]:
    """Crop, resample and normalise B images of four banks; banks and outputs change with every call (cold L2)."""
    on_gpu, dtype = device.type == "cuda", dtype_of(device)
    count = max(2 * B, math.ceil((2**28 if on_gpu else 2**26) / (3 * S * S)))  # images: more than any L2 cache holds
    g = torch.Generator().manual_seed(0)
    banks = [torch.randint(0, 256, (count // 4 + 1, S, S, 3), dtype=torch.uint8, device=device) for _ in range(4)]
    turns = []
    for _ in range(4):
        corner = torch.rand(B, 2, generator=g) * 0.3 * S
        boxes = torch.cat([corner, corner + (0.4 + 0.3 * torch.rand(B, 2, generator=g)) * S], 1)
        row, flip = torch.randint(0, count // 4, (B,), generator=g), torch.rand(B, generator=g) < 0.5
        turns.append([v.to(device) for v in (torch.arange(B) % 4, row, boxes, flip)])
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in LOOK.values())

    def ours(impl, interpolation, domain, row, boxes, flip):
        return gather_interleaved(banks, domain, row, size=S, **LOOK, dtype=dtype, impl=impl, flip=flip, boxes=boxes,
                                  interpolation=interpolation)

    def plain(domain, row, boxes, flip):
        """No resampling: index_select per domain, cast, scale, normalise, flip, put in place."""
        out = torch.empty(B, 3, S, S, dtype=dtype, device=device, memory_format=torch.channels_last)
        for k, bank in enumerate(banks):
            x = (bank.index_select(0, row[k::4]).permute(0, 3, 1, 2).to(torch.float32) / 255 - mean) / std
            out[k::4] = torch.where(flip[k::4].view(-1, 1, 1, 1), x.flip(3), x).to(dtype)
        return out

    forms = [(impl, form, partial(ours, impl, form)) for impl in ("triton", "torch") if on_gpu or impl == "torch"
             for form in ("bilinear", "bicubic")]
    least = B * S * S * 3 * (1 + dtype.itemsize)
    for impl, form, function in [("eager", "copy", plain), *forms]:

        def all_turns(function=function):
            for turn in turns:
                function(*turn)

        run = all_turns
        if impl == "triton":  # without the time of launching; plain PyTorch looks at indices, which no graph can hold
            all_turns()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                all_turns()
            run = graph.replay
        found = {key: value / len(turns) for key, value in measure(run, device, seconds).items()}
        yield {"op": "gather", "impl": impl, "form": form, "B": B, "S": S} | found | ceiling | {
            "gbs": least / found["median_ms"] / 1e6, "floor_ms": least / ceiling["ceiling_gbs"] / 1e6}


# ---------------------------------------------------------------- goals


def planned(N: int, C: int, D: int, name: str) -> float:
    """MiB that the plan of a call in bf16 takes beyond inputs and gradients, a tenth and the embeddings' share more."""
    plan = make_plan(N, D, tuple(layout(name, N, C)[0]), torch.bfloat16, torch.float32, "high", 132)
    return 1.1 * plan.workspace(C) / 2**20 + 4 * N * D * 4 / 2**20 + 2  # dx is made from four tensors of its size


def verdicts(device: torch.device, seconds: float) -> tuple[list[dict], list[tuple[str, str, bool]]]:
    """Rows and (goal, what was measured, met) for the sizes that the goals name."""
    ceiling, rows, goals = ceilings(device), [], []
    table = implementations(device, True)
    for N, C, D, name in ((1024, 100_000, 768, "one"), (1024, 100_000, 768, "four"), (1024, 100_000, 768, "shares"),
                          (256, 10_000, 384, "four"), (1024, 10_000, 768, "one"), (4096, 600_000, 768, "four")):
        rows += map(say, margin_rows(device, N, C, D, name, table, seconds, ceiling))
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
        if impl in ("triton", "torch"):
            continue
        if "median_ms" not in row:
            goals.append((f"{impl}, N={N} C={C} {name}", "it does not fit, ours does", True))
            continue
        ratio = row["median_ms"] / mine["median_ms"]
        goals.append((f"as fast as {impl}, N={N} C={C} {name}", f"{ratio:.2f} x", ratio >= 1))
        if impl == "eager":
            most, extra = planned(N, C, mine["D"], name), mine["extra_MiB"]
            goals.append((f"extra memory <= {most:.0f} MiB, N={N} C={C} {name}", f"{extra:.0f} MiB (eager: "
                          f"{row['extra_MiB']:.0f})", extra <= most))
    rows += map(say, margin_rows(device, 4096, 2_200_000, 1024, "one", {"triton": table["triton"]}, seconds, ceiling))
    extra = rows[-1].get("extra_MiB", math.inf)
    goals.append(("N=4096 C=2.2M D=1024 within 1 GB beyond W and dW", f"{extra:.0f} MiB", extra <= 1000))
    for B in (256, 1024):
        found = list(map(say, gather_rows(device, B, 224, seconds, ceiling)))
        rows += found
        for row in (row for row in found if row["impl"] == "triton"):  # 4 loads of a byte for a number, cubic 16
            most = B / 1024 * (0.5 if row["form"] == "bilinear" else 1.0)
            goals.append((f"gather, {row['form']}, B={B} S=224 <= {most} ms", f"{row['median_ms']:.3f} ms",
                          row["median_ms"] <= most))
    return rows, goals


# ---------------------------------------------------------------- command line


@click.group(context_settings={"show_default": True, "max_content_width": 120}, help=__doc__)
def cli() -> None:
    pass


PATH = click.option("--csv", "path", type=click.Path(path_type=Path), help="File to write the table to.")
SECONDS = click.option("--seconds", type=click.FloatRange(0, min_open=True), default=0.5, help="Time for every row.")
DEVICE = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to run.")


def begin(device: str) -> tuple[torch.device, dict]:
    """The device, and what its rows say of where they come from."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: there is no CUDA device here; use --device cpu")
    place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    print(provenance(place))
    return place, provenance(place)


@cli.command(help="The margin loss against what a user would write.")
@PATH
@DEVICE
@SECONDS
@click.option("--compile/--no-compile", "with_compile", help="Compare with torch.compile, too.")
@click.option("--samples", multiple=True, type=int, help="N (default: 256 1024 4096; on a CPU 256).")
@click.option("--classes", multiple=True, type=int,
              help="C (default: 1k 10k 100k 600k 2.2M; on a CPU 1k 10k 100k).")
@click.option("--width", "widths", multiple=True, type=int, help="D (default: 384 768 1024; on a CPU 384).")
@click.option("--layout", "layouts", multiple=True, type=click.Choice(LAYOUTS), default=LAYOUTS,
              help="One domain, four equal ones, realistic shares.")
def margin(path, device, seconds, with_compile, samples, classes, widths, layouts) -> None:
    device, source = begin(device)
    gpu, ceiling = device.type == "cuda", ceilings(device)
    table = implementations(device, with_compile)
    cases = itertools.product(widths or ((384, 768, 1024) if gpu else (384,)),
                              classes or (1000, 10_000, 100_000, *((600_000, 2_200_000) if gpu else ())),
                              samples or ((256, 1024, 4096) if gpu else (256,)), layouts)
    write_csv(path, [source | say(row) for D, C, N, name in cases
                     for row in margin_rows(device, N, C, D, name, table, seconds, ceiling)])


@cli.command(help="The interleaved gather against PyTorch and the copy ceiling.")
@PATH
@DEVICE
@SECONDS
@click.option("--batch", "batches", multiple=True, type=int, help="B (default: 64 256 1024; on a CPU 64).")
@click.option("--size", "sizes", multiple=True, type=int, help="S in pixels (default: 112 224 448; on a CPU 112 224).")
def gather(path, device, seconds, batches, sizes) -> None:
    device, source = begin(device)
    gpu, ceiling = device.type == "cuda", ceilings(device)
    cases = itertools.product(sizes or ((112, 224, 448) if gpu else (112, 224)),
                              batches or ((64, 256, 1024) if gpu else (64,)))
    write_csv(path, [source | say(row) for S, B in cases for row in gather_rows(device, B, S, seconds, ceiling)])


@cli.command("compile", help="Lower every launch of the Triton kernels, without a GPU.")
@PATH
@click.option("--arch", "archs", multiple=True, type=click.Choice(["80", "90"]), default=["80", "90"],
              help="Compute capability.")
def compile_(path, archs) -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are imported
    rows = [row for arch in archs for row in compile_kernels(int(arch))]
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in widths}, *rows]:
        print("  ".join(f"{row[key]!s:{width}}" for key, width in widths.items()))
    write_csv(path, rows)


@cli.command(help="The goals, on this GPU: measured, and whether they are met; exit code 1 if one is missed.")
@PATH
@SECONDS
def check(path, seconds) -> None:
    device, source = begin("cuda")
    rows, goals = verdicts(device, seconds)
    write_csv(path, [source | row for row in rows])
    print("\n| goal | measured | |\n|---|---|---|")
    for goal, found, met in goals:
        print(f"| {goal} | {found} | {'met' if met else 'MISSED'} |")
    raise SystemExit(0 if all(met for *_, met in goals) else 1)


if __name__ == "__main__":
    cli()
