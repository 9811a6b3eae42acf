"""Whether the tasks, and the sources within them, are linearly separable, beside pixel statistics.

Copy with it: data_prep/, kernels/gather.py, kernels/gather_triton.py, models/, protocols/.
"""

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import combinations

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from data_prep import progress
from data_prep.format import Split
from protocols.bootstrap import Estimate, bootstrap_counts, intervals, minus, show, weighted_mean
from protocols.results import Separability, Sources, Space, UnseenSource
from protocols.search import name_identities
from protocols.tasks import Task


def pixel_statistics(split: Split, rows: np.ndarray) -> np.ndarray:
    """A dozen statistics of colour, contrast, gradients and border of each image, float64 [n, 12].

    They carry no content: what they separate is how the sets were made.
    """
    result = np.empty((len(rows), 12))
    for i, row in enumerate(rows):
        x = split.image(int(row)).double().numpy() / 255
        grey = x.mean(0)
        dx, dy = np.abs(np.diff(grey, axis=1)).mean(), np.abs(np.diff(grey, axis=0)).mean()
        border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
        fine = np.abs(4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]).mean()
        chroma = np.ptp(x, axis=0).mean()
        result[i] = [*x.mean((1, 2)), *x.std((1, 2)), dx, dy, fine, border.mean(), border.std(), chroma]
    return result


def crop_padding(image: torch.Tensor) -> torch.Tensor:
    """An image [3, H, W] of 0..255 without plain lines at its borders, such as padding; half of each side stays.

    A line is plain up to a standard deviation of 8, since padding is no longer exact after JPEG.
    """
    ends = []
    for axis in (1, 2):
        spread = image.float().std(3 - axis).amax(0)  # [lines]
        busy = torch.nonzero(spread > 8).flatten().tolist() or [0, len(spread) - 1]
        most, after = len(spread) // 4, len(spread) - 1 - busy[-1]
        # two lines more: JPEG blends padding and picture at the edge
        low = min(busy[0] + 2 * (busy[0] > 0), most)
        ends.append(slice(low, len(spread) - min(after + 2 * (after > 0), most)))
    return image[:, ends[0], ends[1]]


class Canon:
    """Rows of a split in the one format of the control: plain borders cropped, squashed, `side` pixels of detail.

    It is read like a split. Aspect ratio, padding, size and sharpness no longer tell domains apart (except for images
    that had less than `side` pixels of detail).
    """

    def __init__(self, split: Split, rows: np.ndarray, side: int, size: int = 128) -> None:
        self.split, self.rows, self.side, self.size = split, rows, side, size
        self.folder, self.domain, self.missing = split.folder, split.domain, split.missing[rows]
        chosen = hashlib.sha256(np.ascontiguousarray(rows, dtype=np.int64)).hexdigest()[:8]
        self.name = f"{split.name}-canon{side}-{chosen}"

    def __len__(self) -> int:
        return len(self.rows)

    def jpeg(self, row: int) -> tuple[str, bytes]:
        """Key and bytes of the split's image."""
        return self.split.jpeg(int(self.rows[row]))

    def image(self, row: int) -> torch.Tensor:
        """uint8 [3, size, size]; BadImage if the split's image is damaged."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2.functional import resize

        x = crop_padding(self.split.image(int(self.rows[row]))).float()
        small = resize(x, [self.side] * 2, antialias=True)
        return resize(small, [self.size] * 2, InterpolationMode.BICUBIC).clamp(0, 255).round().to(torch.uint8)


CLASSIFIERS = {"logistic": "logistic regression", "lda": "LDA", "svm": "linear SVM"}


def make_classifier(name: str):
    """A linear classifier on standardised features: "logistic" (multinomial), "lda" or "svm" (one against the rest)."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    # balanced: else a classifier would rarely predict a task with few images
    models = {"logistic": LogisticRegression(max_iter=500, class_weight="balanced"),
              "lda": LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
              "svm": LinearSVC(class_weight="balanced", dual=False)}
    return make_pipeline(StandardScaler(), models[name])


def classify(name: str, fit: list[np.ndarray], test: list[np.ndarray], unfinished: Counter | None = None
             ) -> list[np.ndarray]:
    """Whether a classifier fitted on `fit` ([n_d, D] per task) is right about the rows of `test`: bool [m_d] per task.

    A fit that did not converge is counted in `unfinished`, by the classifier's name.
    """
    of_fit, of_test = (np.repeat(np.arange(len(parts)), [len(part) for part in parts]) for parts in (fit, test))
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        model = make_classifier(name).fit(np.concatenate(fit).astype(np.float64), of_fit)
        right = model.predict(np.concatenate(test).astype(np.float64)) == of_test
    if unfinished is not None and any(issubclass(w.category, ConvergenceWarning) for w in raised):
        unfinished[name] += 1
    return np.split(right, np.cumsum([len(part) for part in test])[:-1])


def balanced_accuracy(right: list[np.ndarray], ids: list[np.ndarray], draws: int, seed: int) -> Estimate:
    """Mean over tasks of the share of right answers, bool [m_d] per task, resampled by identity.

    `ids`: [m_d] per task, from `name_identities`: a person in two tasks is drawn in both or in neither.
    """
    ends = np.cumsum([len(part) for part in right])[:-1]

    def statistic(weights: np.ndarray | None) -> dict[str, float]:
        parts = [None] * len(right) if weights is None else np.split(weights, ends)
        return {"value": float(np.mean([weighted_mean(hit, w) for hit, w in zip(right, parts, strict=True)]))}

    return intervals(statistic, bootstrap_counts(np.concatenate(ids), draws, seed))["value"]


def separability(fit: list[np.ndarray], test: list[np.ndarray], ids: list[np.ndarray], draws: int,
                 seed: int, unfinished: Counter | None = None) -> dict[str, Estimate]:
    """Balanced accuracy of telling the tasks apart, fitted on `fit` and on unseen identities; see `classify`.

    "logistic", "lda", "svm", and "a/b" for every pair of tasks by number (logistic). `ids`: see `balanced_accuracy`.
    """
    result = {name: balanced_accuracy(classify(name, fit, test, unfinished), ids, draws, seed) for name in CLASSIFIERS}
    for a, b in combinations(range(len(fit)), 2):
        right = classify("logistic", [fit[a], fit[b]], [test[a], test[b]])
        result[f"{a}/{b}"] = balanced_accuracy(right, [ids[a], ids[b]], draws, seed)
    return result


def sources_of(split: Split, rows: np.ndarray) -> np.ndarray:
    """The data set that each image comes from, [n] names, whichever command prepared it.

    Out of distribution it includes the split's name: one adapter may prepare photographs and sketches.
    """
    provenance = split.index["provenance"]
    several = len(provenance["data_set"]) > 1 or provenance["source"] == "merge"  # then each sample names its own
    names = [split.fields(int(row))["source"] for row in rows] if several else provenance["data_set"] * len(rows)
    mark = f" ({split.name})" if split.protocol and split.protocol.get("ood") else ""
    return np.array([name + mark for name in names])


def rows_by_source(split: Split, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Some rows of a split, by their source."""
    names = sources_of(split, rows)
    return {str(name): rows[names == name] for name in np.unique(names)}


Features = Callable[[Split, np.ndarray], np.ndarray]  # a split and rows of it -> [n, D]


def unseen_sources(features: dict[str, Features], fitted: dict[str, list[np.ndarray]],
                   tested: dict[str, list[np.ndarray]], ids: list[np.ndarray], tasks: list[Task],
                   fits: list[np.ndarray], others: dict, n: int, draws: int, seed: int) -> list[UnseenSource]:
    """`separability` where the images of one domain are of a source not fitted on, if it has two.

    Args:
        fitted, tested: by space, per task: features of the rows `fits` of the training split, and of the test rows.
        ids: per task, who is on the test rows.
        others: by domain, its test splits and the rows of them that may be used, at most `n` of a source.
    """
    rng, table = np.random.default_rng(seed), []
    people = [name_identities(task.train, rows) for task, rows in zip(tasks, fits, strict=True)]
    for d, task in enumerate(progress(tasks, desc="unseen sources", unit="task")):
        known, candidates = sources_of(task.train, fits[d]), {}
        parts = [(split, rng.permutation(rows)[:n]) for split, rows in others[task.domain]]
        for split, part in [*parts, (task.train, fits[d])]:
            for name, rows in rows_by_source(split, part).items():
                candidates.setdefault(name, (split, rows))
        for name, (split, rows) in candidates.items():
            left, who = known != name, name_identities(split, rows)
            seen = np.concatenate([part[left] if i == d else part for i, part in enumerate(people)])
            rows, who = rows[~np.isin(who, seen)], who[~np.isin(who, seen)]
            if len(candidates) < 2 or left.sum() < 2 or not len(rows):
                continue
            table.append(UnseenSource(task.domain, name, len(rows), len(np.unique(who)), {}))
            names = [who if i == d else part for i, part in enumerate(ids)]
            for space, of in features.items():
                parts = [part[left] if i == d else part for i, part in enumerate(fitted[space])]
                test = [of(split, rows) if i == d else part for i, part in enumerate(tested[space])]
                unfinished = Counter()
                right = classify("logistic", parts, test, unfinished)
                table[-1].spaces[space] = show(balanced_accuracy(right, names, draws, seed)) | {
                    "recall": float(right[d].mean()), "converged": not unfinished}
    return table


def hold_out(people: list[np.ndarray], rng: np.random.Generator) -> set[str]:
    """Half of the identities of each source, [images] per source; one in several is held out of all or of none."""
    known: dict[str, bool] = {}
    for names in sorted((np.unique(part) for part in people), key=len):
        undecided = rng.permutation([name for name in names if name not in known])
        wanted = len(names) // 2 - sum(known.get(name, False) for name in names)
        known |= {name: i < wanted for i, name in enumerate(undecided)}
    return {name for name, out in known.items() if out}


def tell_sources(features: dict[str, Features], tasks: list[Task], fits: list[np.ndarray], others: dict, n: int,
                 draws: int, seed: int) -> dict[str, Sources]:
    """`separability` of the sources WITHIN each domain: how much a space encodes of how images were made.

    If sources of one domain are separated as well as domains are, domains may have been separated by their sources.
    Classifiers are fitted on half of the identities and tested on the others. By domain; arguments: see
    `unseen_sources`.
    """
    rng, result = np.random.default_rng(seed), {}
    for task, rows in zip(tasks, fits, strict=True):
        sources: dict[str, list[tuple[Split, np.ndarray]]] = {}
        for split, known in [(task.train, rows), *others[task.domain]]:
            for name, part in rows_by_source(split, rng.permutation(known)[:n]).items():
                sources.setdefault(name, []).append((split, part))
        people = {name: np.concatenate([name_identities(split, part) for split, part in parts])
                  for name, parts in sources.items()}
        held_out = list(hold_out(list(people.values()), rng))
        halves = {name: held for name, who in people.items()
                  if (held := np.isin(who, held_out)).any() and not held.all()}
        if len(halves) < 2:
            few = sorted(set(sources) - set(halves))
            result[task.domain] = Sources(f"only one source: {', '.join(sources)}" if len(sources) < 2 else
                                          f"too few identities of {', '.join(few)} to fit on some and test others")
            continue
        ids, spaces = [people[name][held] for name, held in halves.items()], {}
        for space, of in progress(features.items(), desc=f"sources of {task.domain}", unit="space"):
            x = [np.concatenate([of(split, part) for split, part in sources[name]]) for name in halves]
            fit, test = ([part[held == side] for part, held in zip(x, halves.values(), strict=True)]
                         for side in (False, True))
            spaces[space] = {model: show(balanced_accuracy(classify(model, fit, test), ids, draws, seed))
                             for model in CLASSIFIERS}
        result[task.domain] = Sources(None, {name: len(people[name]) for name in halves},
                                      {name: len(np.unique(people[name])) for name in halves}, 1 / len(halves), spaces)
    return result


def measure_separability(features: dict[str, Features], tasks: list[Task], others: dict, draws: int, seed: int,
                         limit: int) -> Separability:
    """`separability` in every space, of equally many images of every task, at most `limit`; chance is 1 / tasks.

    `features`: by space: tuned, foundation, pixels, and the same with " canon"; `others`: see `unseen_sources`.
    """
    rng, names = np.random.default_rng(seed), [task.domain for task in tasks]
    n = min(limit, *(len(task.fit) for task in tasks), *(len(task.probe) for task in tasks))
    fits = [rng.permutation(task.fit)[:n] for task in tasks]
    probes = [rng.permutation(task.probe)[:n] for task in tasks]
    ids = [name_identities(task.split, rows) for task, rows in zip(tasks, probes, strict=True)]
    figures, fitted, tested, spaces = {}, {}, {}, {}
    for name, of in progress(features.items(), desc="separability", unit="space"):
        fitted[name] = [of(task.train, rows) for task, rows in zip(tasks, fits, strict=True)]
        tested[name] = [of(task.split, rows) for task, rows in zip(tasks, probes, strict=True)]
        unfinished = Counter()
        by_key = figures[name] = separability(fitted[name], tested[name], ids, draws, seed, unfinished)
        for model in unfinished:
            print(f"  separability: {CLASSIFIERS[model]} did not converge on {name}: an unfinished fit is scored")
        top = "tuned canon" if name.endswith("canon") else "tuned"
        spaces[name] = Space(
            **{model: show(by_key[model]) for model in CLASSIFIERS},
            pairwise={f"{names[a]}/{names[b]}": show(by_key[f"{a}/{b}"])
                      for a, b in combinations(range(len(names)), 2)},
            converged={model: not unfinished[model] for model in CLASSIFIERS},
            lead_of_tuned=show(minus(figures[top]["logistic"], by_key["logistic"])) if name != top else None)
    plain = {name: of for name, of in features.items() if not name.endswith("canon")}
    return Separability(n, 1 / len(tasks), spaces,
                        {name: len(np.unique(who)) for name, who in zip(names, ids, strict=True)},
                        unseen_sources(plain, fitted, tested, ids, tasks, fits, others, n, draws, seed),
                        tell_sources(plain, tasks, fits, others, n, draws, seed))
