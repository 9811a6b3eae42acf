"""Times of a training step and of its parts, on real data: `python train.py bench --help`.

The steps are those of the script, which is passed as the module `train`.
"""

import contextlib
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from tqdm import tqdm

from data_prep import write_json
from models.backbones import Network


def bench_steps(train: ModuleType, job, rounds: int, count: int) -> dict[str, list[float]]:
    """Seconds per step: with real data, with one batch on the device, of the bare backbone; and per line of the log.

    The bare step is forward, sum of the embeddings, backward and optimiser on the same images. The kinds alternate:
    `rounds` rounds of `count` steps each. The first steps of a round, whose batches the loader has prefetched, are not
    counted. On a GPU, the steps of a round are timed together, because they overlap as in training.
    """
    feed, forward, cuda = train.make_feed(job), train.make_forward(job).train(), job.device.type == "cuda"
    feed.start(0)
    fixed = [tuple(v.clone() for v in batch) for batch in feed.next_step()]
    drawn_rows, totals = job.head.step_rows, []

    def real_step(step: int) -> None:
        totals.append(train.take_step(job, forward, feed.next_step(), step, feed.passes))

    def fixed_step(step: int) -> None:
        job.head.step_rows = drawn_rows
        totals.append(train.take_step(job, forward, iter(fixed), step, feed.passes))

    def bare_step(_: int) -> None:
        for number, (images, *_) in enumerate(fixed, 1):  # one sum over the ranks per step, as in training
            with contextlib.nullcontext() if number == feed.passes or job.ranks.world == 1 else forward.no_sync():
                forward(images).float().sum().backward()
        job.optimizer.step()
        job.optimizer.zero_grad(set_to_none=True)

    first_step = round(job.options.head_warmup * job.steps) + job.steps // 2  # after the warm-up of the head
    numbers = itertools.count()

    def timed(run: Callable[[int], None], steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            run(min(first_step + next(numbers) % 8, job.steps - 1))
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    def log_line(_: int) -> None:
        train.write_line(job, totals, first_step + 1, train.rates_of(job, first_step), 0)

    prefetched, together = 4 * max(job.options.workers, 1) // feed.passes + 1, count if cuda else 1
    kinds = {"real": real_step, "fixed": fixed_step, "bare": bare_step, "log": log_line}
    measured: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in tqdm(range(rounds + 1), desc="rounds (the first warms up)", disable=None):
        for kind, run in kinds.items():
            timed(run, prefetched if kind == "real" else 1)
            seconds = [timed(run, together) for _ in range(count // together)]
            measured[kind] += seconds if number else []
        totals.clear()
    return measured


def bench_run(train: ModuleType, options, rounds: int, count: int, path: Path | None) -> int:
    """`train.py bench`: print the result and write it as JSON; returns the exit code."""
    from torch.utils.flop_counter import FlopCounterMode

    from kernels.bench import ceilings, peak_memory

    with tempfile.TemporaryDirectory() as folder:
        prefetched = 4 * max(options.workers, 1) + 2
        options.out, options.images = folder + "/run", options.batch * 4 * (rounds + 1) * (count + prefetched)
        job, times = train.set_up(options, {}), {}
        memory = peak_memory(lambda: times.update(bench_steps(train, job, rounds, count)), job.device)
        size = min(options.micro_batch or options.batch, job.plan[0][0].sum())
        if options.grad_checkpointing:
            job.model.net.set_grad_checkpointing(False)  # recomputed operations do not count
        with FlopCounterMode(display=False) as counter:
            job.model(torch.zeros(1, 3, *[job.model.image_size] * 2, device=job.device)).sum().backward()
        flops = counter.get_total_flops() * options.batch
        rate_of = ceilings(job.device)["ceiling_tflops"] * job.ranks.world
    medians = {kind: float(np.median(seconds)) for kind, seconds in times.items()}
    real, fixed, bare, log = (medians[kind] for kind in ("real", "fixed", "bare", "log"))
    device = torch.cuda.get_device_name() if job.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    result = {
        "device": device, "torch": torch.__version__, "backbone": Network.of(options).name,
        "schedule": options.schedule, "batch": options.batch, "micro_batch": int(size), "cache": options.cache,
        "image_size": job.model.image_size, "embeddings": "bfloat16" if job.bf16 else "float32",
        "workers": options.workers, "compile": options.compile,
        "images_per_second": {kind: options.batch / medians[kind] for kind in ("real", "fixed", "bare")},
        "step_ms": {kind: {"median": 1e3 * medians[kind], "p20": 1e3 * float(np.percentile(times[kind], 20)),
                           "p80": 1e3 * float(np.percentile(times[kind], 80))} for kind in ("real", "fixed", "bare")},
        "share_of_time": {"input": max(1 - fixed / real, 0.0), "loss": max(1 - bare / fixed, 0.0),
                          "logging": log / options.log_every / real},
        "real_to_bare": real / bare, "memory_MiB": memory, "gflop_per_image": flops / options.batch / 1e9,
        "matrix_tflops": rate_of, "MFU": flops / real / 1e12 / rate_of,
    }
    print(json.dumps(result, indent=2))
    if path and job.ranks.rank == 0:
        write_json(path, result)
    return 0
