"""What no claim rests on: d' along single components, how well the sources within a task are told apart, a map.

Copy with it: data_prep/, kernels/gather.py, kernels/gather_triton.py, models/, protocols/.
"""

import numpy as np

from data_prep import progress
from data_prep.format import Split, matched_pairs
from protocols.bootstrap import finite, show
from protocols.search import name_identities
from protocols.separability import CLASSIFIERS, Features, balanced_accuracy, predict, sources_of
from protocols.tasks import Task


def d_primes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(mean a - mean b) / √((var a + var b) / 2) of each column of [n, D] and [m, D]; NaN where nothing varies."""
    spread = np.sqrt((a.var(0) + b.var(0)) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 0, (a.mean(0) - b.mean(0)) / spread, np.nan)


def measure_components(embedded: dict, tasks: list[Task], bases: dict, limit: int, seed: int, pairs: int = 4000
                       ) -> list[dict]:
    """What each single component of each task, up to `limit`, says about the tasks and about identities.

    Returns:
        Rows fit, component (from 1), test, variance (share), task d' (probes of `test` against those of the others) and
        identity d' (products of coordinates, a component's part of the cosine, of pairs of one person and of two).
    """
    rows = []
    drawn = {task.domain: matched_pairs(task.target, pairs, seed) for task in tasks}
    for fit, (mean, basis, variances) in bases.items():
        z = {task.domain: (embedded[task.domain][1][task.probe] - mean) @ basis[:, :limit] for task in tasks}
        share = variances[:limit] / variances.sum()
        for test, own in z.items():
            rest = [other for name, other in z.items() if name != test]
            apart = d_primes(own, np.concatenate(rest)) if rest else np.full(len(share), np.nan)
            left, right = own[drawn[test][:, 0]], own[drawn[test][:, 1]]
            half = len(left) // 2
            known = d_primes(*np.split(left * right, [half])) if half else np.full(len(share), np.nan)
            rows += [{"fit": fit, "component": i + 1, "test": test, "variance": v, "task_dprime": finite(t),
                      "identity_dprime": finite(p)}
                     for i, (v, t, p) in enumerate(zip(share, apart, known, strict=True))]
    return rows


def draw_up_map(embedded: dict, tasks: list[Task], method: str, seed: int, most: int = 500) -> list[dict]:
    """Two coordinates for test images of every task: rows x, y, task, identity (a number, -1: not among the shown).

    Up to half of a task's points are kept for its eight identities with the most images: else none could be seen.

    Args:
        embedded: domain -> unit embeddings of its training and of its test split.
        tasks: the tasks.
        method: "pca" (of the points themselves) or "tsne" (of their first 50 components; distances between clusters
            mean nothing there).
        seed: of the choice and of t-SNE.
        most: points a task.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rng, points, rows = np.random.default_rng(seed), [], []
    for task in tasks:
        count = np.bincount(task.target)
        known = np.argsort(-count, kind="stable")[:8]
        shown = np.concatenate([np.flatnonzero(task.target == identity)[: most // 16] for identity in known])
        others = rng.permutation(np.setdiff1d(np.arange(len(task.target)), shown))[: most - len(shown)]
        chosen = np.concatenate([shown, others])
        points.append(embedded[task.domain][1][task.probe[chosen]])
        for i in chosen:
            place = np.flatnonzero(known == task.target[i])
            rows.append({"task": task.domain, "identity": int(place[0]) if len(place) else -1})
    x = np.concatenate(points).astype(np.float64)
    if method == "tsne" and len(x) >= 10:
        x = PCA(min(50, *x.shape), random_state=seed).fit_transform(x)
        x = TSNE(perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=seed).fit_transform(x)
    else:
        x = PCA(2, random_state=seed).fit_transform(x)
    return [{"x": float(a), "y": float(b), **row} for (a, b), row in zip(x, rows, strict=True)]


def gather_sources(task: Task, fits: np.ndarray, others: list[tuple[Split, np.ndarray]], n: int,
                   rng: np.random.Generator) -> dict[str, list[tuple[Split, np.ndarray, np.ndarray]]]:
    """Images of each source of a domain: splits, rows, and who is on them.

    Args:
        task: of the domain.
        fits: rows of its training split.
        others: its test splits and the rows of them that may be used.
        n: at most so many images of a source and split.
        rng: of their choice.
    """
    found: dict[str, list[tuple[Split, np.ndarray, np.ndarray]]] = {}
    for split, rows in [(task.train, fits), *others]:
        rows = rng.permutation(rows)[:n]
        names, who = sources_of(split, rows), name_identities(split, rows)
        for name in np.unique(names):
            found.setdefault(name, []).append((split, rows[names == name], who[names == name]))
    return found


def hold_out(people: list[np.ndarray], rng: np.random.Generator) -> set[str]:
    """Half of the identities of each source, [images] per source: who is in several is held out of all, or of none."""
    known: dict[str, bool] = {}
    for names in sorted((np.unique(part) for part in people), key=len):
        fresh = rng.permutation([name for name in names if name not in known])
        missing = len(names) // 2 - sum(known.get(name, False) for name in names)
        known |= {name: i < missing for i, name in enumerate(fresh)}
    return {name for name, out in known.items() if out}


def tell_sources(features: dict[str, Features], tasks: list[Task], fits: list[np.ndarray], others: dict, n: int,
                 draws: int, seed: int) -> dict[str, dict]:
    """`separability` of the sources WITHIN each domain: what a space knows of how the images were made.

    A linear classifier that tells sources of one domain as well as it tells domains may have told the domains by their
    sources. Classifiers are fitted on half of the identities, and tested on the others.

    Args:
        features, tasks, fits, others, n, draws, seed: see `unseen_sources`.

    Returns:
        By domain: "images" and "identities" by source, "chance", and "spaces" with a figure for each of CLASSIFIERS; or
        "why" it was not measured.
    """
    rng, result = np.random.default_rng(seed), {}
    for task, rows in zip(progress(tasks, desc="sources", unit="task"), fits, strict=True):
        found = gather_sources(task, rows, others[task.domain], n, rng)
        people = {name: np.concatenate([who for *_, who in parts]) for name, parts in found.items()}
        out = hold_out(list(people.values()), rng)
        halves = {name: np.isin(who, list(out)) for name, who in people.items()}
        usable = [name for name, held in halves.items() if held.any() and not held.all()]
        if len(usable) < 2:
            few = sorted(set(found) - set(usable))
            result[task.domain] = {"why": f"one source alone: {', '.join(found)}" if len(found) < 2 else
                                   f"too few identities of {', '.join(few)} to fit on some and test others"}
            continue
        ids, spaces = [people[name][halves[name]] for name in usable], {}
        for space, of in features.items():
            x = [np.concatenate([of(split, part) for split, part, _ in found[name]]) for name in usable]
            fit = [part[~halves[name]] for name, part in zip(usable, x, strict=True)]
            test = [part[halves[name]] for name, part in zip(usable, x, strict=True)]
            spaces[space] = {}
            for model in CLASSIFIERS:
                right = [answer == i for i, answer in enumerate(predict(model, fit, test))]
                spaces[space][model] = show(balanced_accuracy(right, ids, draws, seed))
        result[task.domain] = {"images": {name: len(people[name]) for name in usable},
                               "identities": {name: len(np.unique(people[name])) for name in usable},
                               "chance": 1 / len(usable), "spaces": spaces}
    return result
