"""Times of the transfer of components on this machine, on random embeddings (`analyze.py bench`)."""

import time
from collections.abc import Callable

import numpy as np
import torch

from data_prep import DOMAINS, InputError
from models.runs import pick_device
from protocols.explore import FURTHER, explore_transfer, hits_without_each, measure_further
from protocols.subspaces import GRID, Trial, hits_by_k, hits_one_by_one, transfer, unit
from protocols.tasks import Task


def time_transfer(probes: int, dim: int, shots: int, bootstrap: int, grid: bool, slow: bool, device: str,
                  seed: int) -> None:
    """Print the times of the parts of a transfer and of the whole; the arguments are the options of the command."""
    rng, place = np.random.default_rng(seed), pick_device(device)
    ids = np.arange(probes) // shots
    people, rows, embedded, tasks = ids.max() + 1, np.arange(probes), {}, []
    mates = [np.setdiff1d(np.arange(i * shots, min((i + 1) * shots, probes)), [row]) for row, i in enumerate(ids)]
    if probes % shots == 1:
        raise InputError(f"--probes {probes} --shots {shots}: the last identity would have one image alone")
    for domain in DOMAINS:
        scale = 1 / np.sqrt(1 + np.arange(dim))  # a falling spectrum
        parts = [unit((rng.standard_normal((people, dim))[ids] + rng.standard_normal((probes, dim))) * scale)
                 for _ in range(2)]
        # objects are scored like people, too: a gallery of single images is the slowest case
        tasks.append(Task(f"{domain}*", None, None, rows, rows, rows, rows, ids, mates, list(rows[:, None])))
        embedded[f"{domain}*"] = tuple(part.astype(np.float32) for part in parts)
    task = tasks[0]
    vectors = embedded[task.domain][1]

    def clock(title: str, work: Callable[[], object]) -> None:
        start, busy = time.perf_counter(), time.process_time()
        work()
        print(f"{title}: {time.perf_counter() - start:.1f} s, {time.process_time() - busy:.1f} s of CPU", flush=True)

    print(f"{probes:,} probes x {probes:,} vectors, {dim} dimensions, on {place}, {torch.get_num_threads()} threads")
    every, controls = list(range(1, dim + 1)), sorted({k for k in GRID if k < dim} | {dim})
    clock("one sweep at every k", lambda: hits_by_k(vectors, vectors, task, every, place))
    clock(f"one at the {len(controls)} k of a control", lambda: hits_by_k(vectors, vectors, task, controls, place))
    if slow:
        clock(f"the plain definition at k = {dim}", lambda: hits_one_by_one(vectors, vectors, task, [dim]))
    mean, basis, few = np.zeros(dim), np.eye(dim), sorted({k for k in (*FURTHER, 99) if k < dim})
    clock(f"{min(100, dim)} components left out, one at a time",
          lambda: hits_without_each(vectors, vectors, task, min(100, dim), place))
    trial = Trial.of(task, embedded[task.domain], bootstrap, seed, place)
    clock("other metrics of a pair of tasks", lambda: measure_further(
        trial, mean, basis, [*few, dim], bootstrap, seed))
    clock("the same in a random subspace", lambda: measure_further(trial, mean, basis, few, 0, seed))
    if grid:
        results: list = []
        clock("4 x 4 tasks, random and untouched subspaces", lambda: results.extend(transfer(
            embedded, tasks, min(99, dim), bootstrap, seed, embedded, place)))
        clock("further controls and metrics", lambda: explore_transfer(
            embedded, tasks, *results, bootstrap, seed, (0, 1), 100, place))
