"""Where the time of a training step goes, measured on real data: `python train.py bench --help`.

What is timed are the steps of training themselves, with the options of training: `train` is the script as a module.
"""

import contextlib
import functools
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
from reports.training import TrainingLog


def bench_steps(train: ModuleType, job, rounds: int, count: int) -> dict[str, list[float]]:
    """Seconds of a step: with real data, with one batch that lies on the device, and of the bare backbone.

    The bare step is forward, the sum of the embeddings, backward and the optimiser on the same images. The three take
    turns, `rounds` times `count` steps each; a turn's first steps, which live on what the loader has in store, are not
    counted. On a GPU a turn's steps are timed together, because they overlap there as in training.
    """
    feed = train.make_feed(job)
    feed.start(0)
    passes = feed.passes
    log = TrainingLog(job.folder, {s.domain: len(s) for s in job.splits}, job.plan, job.ranks, job.tally)
    forward, step, found = train.make_forward(job), itertools.count(), {"real": [], "fixed": [], "bare": [], "log": []}
    forward.train()

    fixed = [tuple(v.clone() for v in batch) for batch in feed.next_step()]
    drawn_once = job.head.step_rows
    late = round(job.options.head_warmup * job.steps) + job.steps // 2  # past the warm-up of the head

    def bare() -> None:
        for number, (images, *_) in enumerate(fixed, 1):  # the ranks add up once a step, as in training
            with contextlib.nullcontext() if number == passes or job.ranks.world == 1 else forward.no_sync():
                forward(images).float().sum().backward()
        job.optimizer.step()
        job.optimizer.zero_grad(set_to_none=True)

    def real(now: int) -> None:
        window.append(train.take_step(job, forward, feed.next_step(), now, passes))

    def again(now: int) -> None:
        job.head.step_rows = drawn_once
        window.append(train.take_step(job, forward, iter(fixed), now, passes))

    def timed(run: Callable, times: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(times):
            run()
        if job.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    def next_step(kind: str) -> None:
        now = min(late + next(step) % 8, job.steps - 1)
        {"real": real, "bare": lambda _: bare(), "fixed": again}[kind](now)

    store = 4 * max(job.options.workers, 1) // passes + 1
    window: list[dict] = []
    for _ in tqdm(range(rounds + 1), desc="rounds (the first warms up)", disable=None):
        for kind, skip in (("real", store), ("fixed", 1), ("bare", 1)):
            run = functools.partial(next_step, kind)
            timed(run, skip)
            together = count if job.device.type == "cuda" else 1
            found[kind].append([timed(run, together) for _ in range(count // together)])
        found["log"].append([timed(lambda: log.write(window, late + 1, train.rates_of(job, late), job.health, 0))])
        window.clear()
    return {kind: [seconds for turn in turns[1:] for seconds in turn] for kind, turns in found.items()}


def bench_run(train: ModuleType, options, rounds: int, count: int, path: Path | None) -> int:
    """`train.py bench`: print, and write as JSON, where the time of a step goes."""
    from torch.utils.flop_counter import FlopCounterMode

    from kernels.bench import ceilings, peak_memory

    with tempfile.TemporaryDirectory() as folder:
        store = 4 * max(options.workers, 1) + 2
        options.out, options.images = folder + "/run", options.batch * 4 * (rounds + 1) * (count + store)
        job, found = train.set_up(options, {}), {}
        memory = peak_memory(lambda: found.update(bench_steps(train, job, rounds, count)), job.device)
        size = min(options.micro_batch or options.batch, job.plan[0][0].sum())
        if options.grad_checkpointing:
            job.model.net.set_grad_checkpointing(False)  # what is computed twice counts once
        with FlopCounterMode(display=False) as counter:
            job.model(torch.zeros(1, 3, *[job.model.image_size] * 2, device=job.device)).sum().backward()
        flops = counter.get_total_flops() * options.batch
        rate_of = ceilings(job.device)["ceiling_tflops"] * job.ranks.world
    middle = {kind: float(np.median(seconds)) for kind, seconds in found.items()}
    real, fixed, bare, log = (middle[kind] for kind in ("real", "fixed", "bare", "log"))
    device = torch.cuda.get_device_name() if job.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    result = {
        "device": device,
        "torch": torch.__version__, "backbone": Network.of(options).name,
        "schedule": options.schedule, "batch": options.batch, "micro_batch": int(size), "cache": options.cache,
        "image_size": job.model.image_size, "workers": options.workers, "compile": options.compile,
        "images_per_second": {kind: options.batch / middle[kind] for kind in ("real", "fixed", "bare")},
        "step_ms": {kind: {"median": 1e3 * middle[kind], "p20": 1e3 * float(np.percentile(found[kind], 20)),
                           "p80": 1e3 * float(np.percentile(found[kind], 80))} for kind in ("real", "fixed", "bare")},
        "share_of_time": {"input": max(1 - fixed / real, 0.0), "loss": max(1 - bare / fixed, 0.0),
                          "logging": log / options.log_every / real},
        "real_to_bare": real / bare, "memory_MiB": memory, "gflop_per_image": flops / options.batch / 1e9,
        "matrix_tflops": rate_of, "MFU": flops / real / 1e12 / rate_of,
    }
    print(json.dumps(result, indent=2))
    if path and job.ranks.rank == 0:
        write_json(path, result)
    return 0
