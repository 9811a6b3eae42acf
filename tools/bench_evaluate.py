"""Times of the large cases of evaluate.py beside plain implementations: `python evaluate.py bench --help`.

Every measurement runs in a process of its own, so that peak memory is its own; the implementations ("ways") of a case
alternate, so that other load slows them alike. If their results differ, the command ends with an error.
"""

import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from sklearn.metrics import auc, roc_curve

from data_prep import InputError, write_json
from protocols.bootstrap import normalise
from protocols.pairs import FARS, roc, tar_at_far
from protocols.search import score_gallery, search_gallery
from protocols.templates import Templates, score_template_pairs

D = 512  # width of the embeddings


def memory() -> tuple[float, float]:
    """Resident memory of this process and its peak, in MiB."""
    try:
        status = Path("/proc/self/status").read_text()
        return tuple(int(status.partition(f"{key}:")[2].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
    except (OSError, IndexError):  # not Linux: only the peak is known
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)
        return peak, peak


def make_embeddings(rng: np.random.Generator, identity: np.ndarray, spread: float) -> np.ndarray:
    """Unit vectors float32 [n, D] around a centre for each identity, in blocks; identity -1 has no centre."""
    centres = rng.standard_normal((max(identity.max() + 1, 1), D), dtype=np.float32)
    x = np.empty((len(identity), D), dtype=np.float32)
    for start in range(0, len(x), 1 << 14):
        who, part = identity[start : start + (1 << 14)], x[start : start + (1 << 14)]
        rng.standard_normal(out=part, dtype=np.float32)
        part *= spread
        part[who >= 0] += centres[who[who >= 0]]
    return normalise(x)


# ---------------------------------------------------------------- re-identification


def make_reid(scale: float) -> dict:
    """10,000 queries and a gallery of 20,000 images of 1,500 people under 6 cameras."""
    rng, queries, gallery = np.random.default_rng(0), int(10_000 * scale), int(20_000 * scale)
    labels = rng.integers(0, max(int(1500 * scale), 2), queries + gallery)
    columns = {"camera": rng.integers(0, 6, len(labels)), "role": (np.arange(len(labels)) >= queries).astype(int)}
    split = SimpleNamespace(labels=labels, protocol={"name": "reid"}, folder="bench", classes=[],
                            optional=lambda name: columns.get(name, np.full(len(labels), -1)))
    return {"x": make_embeddings(rng, labels, 3.0), "split": split, "cameras": columns["camera"], "queries": queries}


def reid_here(x: np.ndarray, split: SimpleNamespace, **_) -> dict[str, float]:
    figures, _ = score_gallery(x, split, 0, 0)
    return {name: figures[name].value for name in ("rank-1", "mAP", "mINP")}


def reid_plain(x: np.ndarray, split: SimpleNamespace, cameras: np.ndarray, queries: int,
               published: bool = False) -> dict[str, float]:
    """torchreid's definition in plain numpy: the whole matrix, sorted, then query by query.

    published: compute precisions by a list comprehension over the gallery, as its eval_market1501 does.
    """
    q_ids, g_ids, q_cams, g_cams = (a for c in (split.labels, cameras) for a in (c[:queries], c[queries:]))
    indices = np.argsort(1 - x[:queries] @ x[queries:].T, axis=1)
    matches = (g_ids[indices] == q_ids[:, None]).astype(np.int32)
    firsts, aps, inps = [], [], []
    for i in range(queries):
        order = indices[i]
        keep = ~((g_ids[order] == q_ids[i]) & (g_cams[order] == q_cams[i]))
        hits = matches[i][keep]
        if hits.any():
            if published:
                precision = np.asarray([count / (i + 1.0) for i, count in enumerate(hits.cumsum())])
            else:
                precision = hits.cumsum() / np.arange(1, len(hits) + 1)
            firsts.append(hits[0])
            aps.append((precision * hits).sum() / hits.sum())
            inps.append(hits.sum() / (np.flatnonzero(hits)[-1] + 1))
    return {"rank-1": float(np.mean(firsts)), "mAP": float(np.mean(aps)), "mINP": float(np.mean(inps))}


# ---------------------------------------------------------------- lists of pairs


def make_ijbc(scale: float) -> dict:
    """As many templates, people and pairs as in IJB-C's 1:1 list: 23,124, 3,531, 19,557 + 15,638,932."""
    rng, count = np.random.default_rng(0), max(int(23_124 * scale), 200)
    identity = rng.integers(0, max(int(3531 * scale), 20), count)
    total = int(15_638_932 * scale)
    left, right = rng.integers(0, count, (2, total), dtype=np.int32)
    order = np.argsort(identity, kind="stable")
    next_of = np.flatnonzero(identity[order][:-1] == identity[order][1:])
    genuine = np.stack([order[next_of], order[next_of + 1]], 1)
    pairs = np.empty((len(genuine) + total, 3), dtype=np.int32)
    pairs[:, :2] = np.concatenate([genuine, np.stack([left, right], 1)])
    pairs[:, 2] = identity[pairs[:, 0]] == identity[pairs[:, 1]]
    x, enrolled = make_embeddings(rng, identity, 3.0), np.ones(count, dtype=bool)
    return {"templates": Templates(np.arange(count), x, identity, enrolled),
            "pairs": pairs[pairs[:, 0] != pairs[:, 1]]}


def pairs_here(templates: Templates, pairs: np.ndarray) -> dict[str, float]:
    """With 20 resamplings, unlike `pairs_sklearn`."""
    figures = score_template_pairs(templates, pairs, 20, 0)[0]["nearest"]
    return {name: figure.value for name, figure in figures.items()}


def pairs_sklearn(templates: Templates, pairs: np.ndarray) -> dict[str, float]:
    """As insightface's ijb_evals.py: pairs by blocks, scikit-learn's curve, the nearest FAR."""
    x, blocks = templates.vectors, np.array_split(pairs, max(len(pairs) // 100_000, 1))
    scores = np.concatenate([np.einsum("nd,nd->n", x[block[:, 0]], x[block[:, 1]]) for block in blocks])
    far, tar, _ = roc_curve(pairs[:, 2], scores)
    impostors = int((pairs[:, 2] == 0).sum())
    return {f"tar@far={f:g}": float(tar[::-1][np.argmin(np.abs(far[::-1] - f))])
            for f in FARS if f * impostors >= 1}


def make_scores(scale: float) -> dict:
    """15.7 million scores, of which 1 in 800 is genuine."""
    rng, count = np.random.default_rng(0), int(15_658_489 * scale)
    same = rng.random(count) < 1 / 800
    return {"scores": rng.standard_normal(count, dtype=np.float32) + 3 * same.astype(np.float32), "same": same}


def curve_here(scores: np.ndarray, same: np.ndarray) -> dict[str, float]:
    far, tar = roc(scores, same)
    return {"auc": float(np.trapezoid(tar, far)), "tar@far=0.001": tar_at_far(far, tar, 1e-3)}


def curve_sklearn(scores: np.ndarray, same: np.ndarray) -> dict[str, float]:
    far, tar, _ = roc_curve(same, scores)
    return {"auc": float(auc(far, tar)), "tar@far=0.001": float(tar[far <= 1e-3].max())}


# ---------------------------------------------------------------- one to many


def make_search(probes: int, distractors: int, scale: float) -> dict:
    """One mate per probe, at low or high rank, and distractors."""
    rng, n, m = np.random.default_rng(0), int(probes * scale), int(distractors * scale)
    identity = np.concatenate([np.arange(n), np.arange(n), np.full(m, -1)])
    return {"x": make_embeddings(rng, identity, 2.5), "probes": n}


def search_here(x: np.ndarray, probes: int) -> dict[str, float]:
    ranks = search_gallery(x, np.arange(probes), np.arange(probes, len(x)),
                           lambda probe: (np.array([probe]), np.empty(0, int)))
    return {f"rank-{k}": float((ranks.first <= k).mean()) for k in (1, 5, 20)}


def search_plain(x: np.ndarray, probes: int) -> dict[str, float]:
    order = np.argsort(-(x[:probes] @ x[probes:].T), axis=1)
    first = (order == np.arange(probes)[:, None]).argmax(1) + 1
    return {f"rank-{k}": float((first <= k).mean()) for k in (1, 5, 20)}


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Case:
    """A problem size, and the implementations that can handle it, ours first."""

    title: str
    make: Callable[[float], dict]
    ways: dict[str, Callable[..., dict[str, float]]]


CASES = {
    "reid": Case("re-identification, 10,000 x 20,000", make_reid, {
        "here": reid_here, "numpy": reid_plain, "torchreid": partial(reid_plain, published=True)}),
    "pairs": Case("15.7 M listed pairs of templates", make_ijbc, {"here": pairs_here, "scikit-learn": pairs_sklearn}),
    "curve": Case("ROC of 15.7 M scores", make_scores, {"here": curve_here, "scikit-learn": curve_sklearn}),
    "search": Case("1:N, 2,000 x 100,000", partial(make_search, 2000, 98_000), {
        "here": search_here, "numpy": search_plain}),
    "million": Case("1:N, 20,000 x 1,000,000", partial(make_search, 20_000, 980_000), {"here": search_here}),
}


def measure(name: str, way: str, scale: float) -> dict:
    """Wall-clock and CPU seconds of one way of a case, and peak memory in MiB, in all and above the inputs."""
    inputs = CASES[name].make(scale)
    before, _ = memory()
    start, busy = time.perf_counter(), time.process_time()
    values = CASES[name].ways[way](**inputs)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    _, peak = memory()
    return {"seconds": seconds, "cpu_seconds": busy, "peak_MiB": peak, "above_inputs_MiB": peak - before,
            "values": values}


def bench(names: list[str], scale: float, rounds: int, path: Path | None) -> int:
    """Measure, print the table and write the JSON; InputError if two ways of a case disagree."""
    context, cases = multiprocessing.get_context("spawn"), {}
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count())
    print(f"{threads} threads, sizes x {scale:g}; wall-clock and CPU seconds (fairer on a busy machine), each\nalso in "
          "multiples of ours; peak memory, in all and above the inputs")
    for name in names:
        case, runs = CASES[name], {way: [] for way in CASES[name].ways}
        for _ in range(rounds if len(case.ways) > 1 else 1):
            for way, measured in runs.items():
                with ProcessPoolExecutor(1, context) as pool:
                    measured.append(pool.submit(measure, name, way, scale).result())
                print(f"  {name} {way}: {measured[-1]['seconds']:.2f} s", file=sys.stderr)
        ways = {way: {
            **{key: float(np.median([one[key] for one in measured])) for key in ("seconds", "cpu_seconds")},
            **{key: max(one[key] for one in measured) for key in ("peak_MiB", "above_inputs_MiB")},
            "values": measured[0]["values"]} for way, measured in runs.items()}
        for way, row in ways.items():
            for key, ours in ways["here"]["values"].items():
                if abs(row["values"][key] - ours) > 2e-3:
                    raise InputError(f"{name}: {key} is {ours:.6f} here and {row['values'][key]:.6f} by {way}")
            row["times_here"] = row["seconds"] / ways["here"]["seconds"]
            row["cpu_times_here"] = row["cpu_seconds"] / max(ways["here"]["cpu_seconds"], 1e-9)
            print(f"{case.title:36s} {way:13s} {row['seconds']:8.2f} s {row['times_here']:6.1f} x "
                  f"{row['cpu_seconds']:8.2f} s {row['cpu_times_here']:6.1f} x {row['peak_MiB']:8,.0f} MiB "
                  f"{row['above_inputs_MiB']:8,.0f} MiB")
        cases[name] = {"case": case.title, "ways": ways}
    if path:
        write_json(path, {"machine": platform.processor() or platform.machine(), "threads": threads,
                          "numpy": np.__version__, "scale": scale, "rounds": rounds, "cases": cases})
    return 0
