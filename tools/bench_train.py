"""Where the time of a training step goes, measured on real data: `python train.py bench --help`.

What is timed are the steps of training themselves, with the options of training.
"""

import contextlib
import functools
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from models.runs import write_json
from reports.training import log_window
from train import Job, loss_options, make_forward, set_up, take_step
from train_input import load_steps, make_stream, receive


def bench_steps(job: Job, rounds: int, count: int) -> dict[str, list[float]]:
    """Seconds of a step: with real data, with one batch that lies on the device, and of the bare backbone.

    The bare step is forward, the sum of the embeddings, backward and the optimiser on the same images. The three take
    turns, `rounds` times `count` steps each; a turn's first steps, which live on what the loader has in store, are not
    counted. On a GPU a turn's steps are timed together, because they overlap there as in training.
    """
    stream = make_stream(job)
    passes = stream.per_batch * job.plan.shape[1]
    chunks = load_steps(job, stream, 0)
    options = loss_options(job.config, [len(split.classes) for split in job.splits], job.device, job.ranks)
    forward, step, found = make_forward(job), itertools.count(), {"real": [], "fixed": [], "bare": [], "log": []}
    forward.train()
    batches, drawn_once = receive(job, chunks, 0, options, passes)
    fixed = [tuple(v.clone() for v in batch) for batch in batches]
    late = round(job.config["head_warmup"] * job.steps) + job.steps // 2  # past the warm-up of the head

    def bare() -> None:
        for number, (images, *_) in enumerate(fixed, 1):  # the ranks add up once a step, as in training
            with contextlib.nullcontext() if number == passes or job.ranks.world == 1 else forward.no_sync():
                forward(images).float().sum().backward()
        job.optimizer.step()
        job.optimizer.zero_grad(set_to_none=True)

    def train_on(batches: Iterable[tuple], now: int, options: dict) -> None:
        window.append(take_step(job, forward, batches, now, options, passes))

    def real(now: int) -> None:
        batches, drawn_now = receive(job, chunks, now, options, passes)
        train_on(batches, now, drawn_now)

    def timed(run: Callable, times: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(times):
            run()
        if job.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    def next_step(kind: str) -> None:
        now = min(late + next(step) % 8, job.steps - 1)
        {"real": real, "bare": lambda _: bare(), "fixed": lambda now: train_on(iter(fixed), now, drawn_once)}[kind](now)

    store = 4 * max(job.config["workers"], 1) // passes + 1
    window: list[dict] = []
    for _ in tqdm(range(rounds + 1), desc="rounds (the first warms up)", disable=None):
        for kind, skip in (("real", store), ("fixed", 1), ("bare", 1)):
            run = functools.partial(next_step, kind)
            timed(run, skip)
            together = count if job.device.type == "cuda" else 1
            found[kind].append([timed(run, together) for _ in range(count // together)])
        found["log"].append([timed(lambda: log_window(job, None, window, late + 1))])
        window.clear()
    return {kind: [seconds for turn in turns[1:] for seconds in turn] for kind, turns in found.items()}


def bench_run(config: dict, rounds: int, count: int, path: Path | None) -> int:
    """`train.py bench`: print, and write as JSON, where the time of a step goes."""
    from torch.utils.flop_counter import FlopCounterMode

    from kernels.bench import ceilings, peak_memory

    with tempfile.TemporaryDirectory() as folder:
        config |= {"out": folder + "/run", "resume": False, "epochs": None}
        store = 4 * max(config["workers"], 1) + 2
        config["images"] = config["batch"] * 4 * (rounds + 1) * (count + store)
        job, found = set_up(config), {}
        memory = peak_memory(lambda: found.update(bench_steps(job, rounds, count)), job.device)
        size = min(config["micro_batch"] or config["batch"], job.plan[0][0].sum())
        if config["grad_checkpointing"]:
            job.model.net.set_grad_checkpointing(False)  # what is computed twice counts once
        with FlopCounterMode(display=False) as counter:
            job.model(torch.zeros(1, 3, *[job.model.image_size] * 2, device=job.device)).sum().backward()
        flops = counter.get_total_flops() * config["batch"]
        rate_of = ceilings(job.device)["ceiling_tflops"] * job.ranks.world
    middle = {kind: float(np.median(seconds)) for kind, seconds in found.items()}
    real, fixed, bare, log = (middle[kind] for kind in ("real", "fixed", "bare", "log"))
    device = torch.cuda.get_device_name() if job.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    result = {
        "device": device,
        "torch": torch.__version__, "backbone": config["model"] or f"{config['backbone']}-{config['size']}",
        "schedule": config["schedule"], "batch": config["batch"], "micro_batch": int(size), "cache": config["cache"],
        "image_size": job.model.image_size, "workers": config["workers"], "compile": config["compile"],
        "images_per_second": {kind: config["batch"] / middle[kind] for kind in ("real", "fixed", "bare")},
        "step_ms": {kind: {"median": 1e3 * middle[kind], "p20": 1e3 * float(np.percentile(found[kind], 20)),
                           "p80": 1e3 * float(np.percentile(found[kind], 80))} for kind in ("real", "fixed", "bare")},
        "share_of_time": {"input": max(1 - fixed / real, 0.0), "loss": max(1 - bare / fixed, 0.0),
                          "logging": log / config["log_every"] / real},
        "real_to_bare": real / bare, "memory_MiB": memory, "gflop_per_image": flops / config["batch"] / 1e9,
        "matrix_tflops": rate_of, "MFU": flops / real / 1e12 / rate_of,
    }
    print(json.dumps(result, indent=2))
    if path and job.ranks.rank == 0:
        write_json(path, result)
    return 0
