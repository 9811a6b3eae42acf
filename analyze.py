"""What the embedding space of a run looks like, and whether the abstract's claims hold for a folder of runs.

    python analyze.py --run runs/NAME            # transfer of principal components, separability of the tasks
    python analyze.py claims runs                # one verdict per claim, from every analysed run below runs/

RUN/analysis/ then holds analysis.json, transfer.csv, report.md and the figures transfer.png and separability.png.
Principal components are fitted on training images whose identities are not among the tested ones.
"""

import json
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

import evaluate
import train
from data_prep import DOMAINS, InputError, run_command
from data_prep.shards import ROLES, Split, open_root

GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 99, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
LEVELS = (0.99, 0.95)  # k* is the number of components that keeps so much of what is above chance
RANDOM_SEEDS = 10
COLOURS = {"tuned": "#0072B2", "foundation": "#999999", "random": "#D55E00", "pixels": "#009E73"}  # Okabe-Ito

# ---------------------------------------------------------------- tasks


@dataclass
class Task:
    """What one domain contributes: rows to fit on, and a test on other identities.

    A projection is scored by the share of probes whose nearest gallery vector is `relevant`; for objects the gallery
    holds class means.
    """

    domain: str
    split: Split  # the test split
    train: Split
    fit: np.ndarray  # rows of the training split, identities disjoint from the tested ones
    probe: np.ndarray  # rows of the test split
    gallery: np.ndarray  # rows of the test split (people) or of the training split (objects)
    group: np.ndarray  # [gallery] the class mean that a gallery row belongs to (objects); all different for people
    target: np.ndarray  # [probe] label that a hit must have
    found: np.ndarray  # [groups] label of each gallery vector
    ignored: np.ndarray | None  # bool [probe, groups]: the probe itself, or its identity under the same camera

    def chance(self) -> float:
        """Expected share of hits of a random nearest vector."""
        allowed = np.ones((len(self.probe), len(self.found)), dtype=bool) if self.ignored is None else ~self.ignored
        return float((((self.target[:, None] == self.found) & allowed).sum(1) / allowed.sum(1)).mean())


def find_splits(splits: dict[str, Split]) -> tuple[Split, Split] | None:
    """Training split and first test split (in distribution) of a domain, or None where it lacks one."""
    tests = [s for s in splits.values() if s.protocol and not s.protocol.get("ood")]
    return (splits["train"], tests[0]) if "train" in splits and tests else None


def make_task(base: Split, test: Split, readable: tuple[np.ndarray, np.ndarray], limit: int, seed: int) -> Task | None:
    """The task of a domain, or None where too little is left to fit or to test.

    Classes that are in both splits (objects) are divided: every second one is fitted on, the others are tested.

    Args:
        base: the training split.
        test: the test split.
        readable: bool, rows of either split that may be used.
        limit: at most so many probes.
        seed: of their choice.
    """
    domain, rng = base.domain, np.random.default_rng((seed, DOMAINS.index(base.domain)))
    shared = sorted(set(test.classes) & set(base.classes))
    for_fit, for_test = set(shared[::2]), set(shared[1::2])
    tested = np.array([name not in for_fit for name in test.classes])
    fitted = np.array([name not in for_test for name in base.classes])
    fit = np.flatnonzero(fitted[base.labels] & readable[0])
    rows = np.flatnonzero(np.where(test.labels >= 0, tested[test.labels], True) & readable[1])

    if domain == "object":
        place = {name: i for i, name in enumerate(base.classes)}
        label = np.array([place.get(name, -1) for name in test.classes])[test.labels]
        probe = rng.permutation(rows[label[rows] >= 0])[:limit]
        found = np.unique(label[probe])
        gallery = np.flatnonzero(np.isin(base.labels, found) & readable[0])
        group = np.searchsorted(found, base.labels[gallery])
        if len(fit) < 2 or len(np.unique(group)) < 2 or len(np.unique(group)) < len(found):
            return None
        return Task(domain, test, base, fit, probe, gallery, group, label[probe], found, None)

    roles, cameras = test.optional("role"), test.optional("camera")
    gallery = rows[roles[rows] != ROLES.index("probe")]
    probe = rows[roles[rows] <= ROLES.index("probe")]  # without roles every image is a probe and in the gallery
    probe = rng.permutation(probe[test.labels[probe] >= 0])[:limit]
    labels = np.array(test.labels)
    same = labels[probe][:, None] == labels[gallery]
    ignored = probe[:, None] == gallery
    if test.protocol["name"] == "reid":
        ignored |= same & (cameras[probe][:, None] == cameras[gallery])
    mated = (same & ~ignored).any(1)
    probe, ignored = probe[mated], ignored[mated]
    if len(fit) < 2 or not len(probe):
        return None
    each = np.arange(len(gallery))
    return Task(domain, test, base, fit, probe, gallery, each, labels[probe], labels[gallery], ignored)


# ---------------------------------------------------------------- subspaces


def principal_components(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [D], components as columns [D, D] by falling variance, variances [D] of rows x [n, D] (float64)."""
    x = x.astype(np.float64)
    mean = x.mean(0)
    variances, vectors = np.linalg.eigh((x - mean).T @ (x - mean) / max(len(x) - 1, 1))
    return mean, vectors[:, ::-1], np.maximum(variances[::-1], 0)


def hits_by_k(probe: np.ndarray, gallery: np.ndarray, task: Task, grid: list[int]) -> np.ndarray:
    """For projected vectors, whether each probe's nearest gallery vector is right with the first k coordinates.

    Args:
        probe: [n, D] coordinates, largest component first.
        gallery: [m, D] likewise; averaged by group after normalisation.
        task: says which gallery vectors are right and which do not count.
        grid: numbers of coordinates.

    Returns:
        bool [len(grid), n].
    """
    wrong = task.target[:, None] != task.found
    hits = []
    for k in grid:
        q, g = unit(probe[:, :k]), unit(gallery[:, :k])
        if task.ignored is None:
            means = np.zeros((len(task.found), k), dtype=g.dtype)
            np.add.at(means, task.group, g)
            g = unit(means)
        scores = q @ g.T
        if task.ignored is not None:
            scores[task.ignored] = -np.inf
        nearest = scores.argmax(1)
        hits.append(~wrong[np.arange(len(q)), nearest])
    return np.array(hits)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows divided by their lengths."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def finite(value: float) -> float | None:
    """A number for JSON, which knows no NaN."""
    return float(value) if math.isfinite(value) else None


def kept(scores: np.ndarray, full: float, chance: float) -> np.ndarray:
    """(score - chance) / (full - chance); NaN where the full space is not above chance."""
    return (scores - chance) / (full - chance) if full > chance else np.full(np.shape(scores), np.nan)


def components_needed(share: np.ndarray, grid: list[int], level: float) -> int | None:
    """k*: the smallest k of the grid from which on every k keeps at least `level`; None: not even the largest."""
    enough = share >= level
    if not enough[-1]:
        return None
    short = np.flatnonzero(~enough)
    return grid[int(short[-1]) + 1] if len(short) else grid[0]


def transfer(embedded: dict[str, tuple[np.ndarray, np.ndarray]], tasks: list[Task], grid: list[int], headline: int,
             draws: int, seed: int) -> dict:
    """Components of every task, used by every task, beside random subspaces.

    Args:
        embedded: domain -> unit embeddings of its training and of its test split.
        tasks: the tasks.
        grid: numbers of components, the last one D.
        headline: the k whose figure gets an interval (in the grid).
        draws: bootstrap resamplings.
        seed: of the sub-sampling and the random subspaces.

    Returns:
        "rows": one per (fit task or "random", test task, k): score, kept (share of what is above chance at k = D);
        "pairs": one per (fit, test): k for each level, kept at the headline k with its interval, raw score;
        "rank_limited", "images_per_task", "spectrum", "overlap".
    """
    rng = np.random.default_rng(seed)
    n = min(len(task.fit) for task in tasks)
    D = grid[-1]
    chosen = {task.domain: rng.permutation(task.fit)[:n] for task in tasks}
    fits = {domain: principal_components(embedded[domain][0][rows]) for domain, rows in chosen.items()}
    turns = [np.linalg.qr(np.random.default_rng((seed, i)).standard_normal((D, D)))[0] for i in range(RANDOM_SEEDS)]
    rows, pairs = [], []
    bar = tqdm(total=len(tasks) * (len(tasks) + RANDOM_SEEDS), desc="transfer", unit="sweep", disable=None)
    for task in tasks:
        base, test = embedded[task.domain]
        probe = test[task.probe]
        gallery = (base if task.domain == "object" else test)[task.gallery]
        chance = task.chance()
        raw = float(hits_by_k(probe, gallery, task, [D])[0].mean())
        control = []
        for turn in turns:
            mean = fits[task.domain][0]
            scores = hits_by_k((probe - mean) @ turn, (gallery - mean) @ turn, task, grid).mean(1)
            control.append(kept(scores, scores[-1], chance))
            rows += [{"fit": f"random {len(control) - 1}", "test": task.domain, "k": k, "score": float(s),
                      "kept": finite(c)} for k, s, c in zip(grid, scores, control[-1], strict=True)]
            bar.update()
        at_headline = grid.index(headline)
        random_kept = finite(np.mean([c[at_headline] for c in control]))
        for other in tasks:
            mean, vectors, _ = fits[other.domain]
            hits = hits_by_k((probe - mean) @ vectors, (gallery - mean) @ vectors, task, grid)
            scores = hits.mean(1)
            share = kept(scores, scores[-1], chance)
            rows += [{"fit": other.domain, "test": task.domain, "k": k, "score": float(s), "kept": finite(c)}
                     for k, s, c in zip(grid, scores, share, strict=True)]

            def statistic(weights: np.ndarray | None, part=hits[at_headline], full=hits[-1], chance=chance) -> dict:
                a, b = (evaluate.weighted_mean(hit.astype(float), weights) for hit in (part, full))
                return {"kept": float(kept(np.array(a), b, chance))}

            found = evaluate.intervals(statistic, evaluate.bootstrap_counts(task.target, draws, seed))["kept"]
            pairs.append({"fit": other.domain, "test": task.domain, "chance": chance, "raw": raw,
                          "full": float(scores[-1]), "k": headline, "kept": finite(found.value),
                          "low": finite(found.low), "high": finite(found.high), "random": random_kept,
                          **{f"k{100 * level:g}": components_needed(share, grid, level) for level in LEVELS}})
            bar.update()
    bar.close()
    overlap = {a: {b: float(np.square(fits[a][1][:, :headline].T @ fits[b][1][:, :headline]).sum() / headline)
                   for b in fits} for a in fits}
    spectrum = {name: {"participation_ratio": float(v.sum() ** 2 / np.square(v).sum()),
                       "components_for_90": int(np.searchsorted(np.cumsum(v) / v.sum(), 0.9) + 1)}
                for name, (_, _, v) in fits.items()}
    return {"rows": rows, "pairs": pairs, "images_per_task": n, "rank_limited": n < 5 * D, "dim": D,
            "overlap": overlap, "overlap_chance": headline / D, "spectrum": spectrum}


# ---------------------------------------------------------------- separability


def pixel_statistics(split: Split, rows: np.ndarray) -> np.ndarray:
    """A dozen statistics of colour, contrast, gradients and border of each image, float64 [n, 12].

    They know nothing of what an image shows: what they separate is how the sets were made.
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


def separability(train_x: list[np.ndarray], test_x: list[np.ndarray], test_ids: list[np.ndarray], draws: int,
                 seed: int) -> dict[str, dict]:
    """Balanced accuracy of telling the tasks apart, by logistic regression and by LDA, on unseen identities.

    Args:
        train_x: per task [n_d, D], to fit on.
        test_x: per task [m_d, D], of other identities.
        test_ids: per task [m_d], identities for the bootstrap.
        draws, seed: of the bootstrap.

    Returns:
        {"logistic" and "lda": {"value", "low", "high"}}.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    y, truth = (np.repeat(np.arange(len(parts)), [len(p) for p in parts]) for parts in (train_x, test_x))
    ids = np.unique([f"{task} {i}" for task, part in enumerate(test_ids) for i in part], return_inverse=True)[1]
    x, test = np.concatenate(train_x).astype(np.float64), np.concatenate(test_x).astype(np.float64)
    result = {}
    for name, model in (("logistic", LogisticRegression(max_iter=500)),
                        ("lda", LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "did not converge": the accuracy says what was reached
            right = make_pipeline(StandardScaler(), model).fit(x, y).predict(test) == truth

        def statistic(weights: np.ndarray | None, right=right) -> dict[str, float]:
            per_task = [evaluate.weighted_mean(right[truth == k].astype(float), None if weights is None else
                                               weights[truth == k]) for k in range(len(test_x))]
            return {"value": float(np.mean(per_task))}

        found = evaluate.intervals(statistic, evaluate.bootstrap_counts(ids, draws, seed))["value"]
        result[name] = {"value": found.value, "low": found.low, "high": found.high}
    return result


def measure_separability(embedded: dict[str, dict], tasks: list[Task], draws: int, seed: int, limit: int) -> dict:
    """`separability` in every space and, as a control, on pixel statistics of the same images; chance is 1 / tasks."""
    rng = np.random.default_rng(seed)
    n = min(limit, *(len(task.fit) for task in tasks), *(len(task.probe) for task in tasks))
    fits = [rng.permutation(task.fit)[:n] for task in tasks]
    probes = [rng.permutation(task.probe)[:n] for task in tasks]
    ids = [task.split.labels[rows] for task, rows in zip(tasks, probes, strict=True)]
    spaces = {weights: ([splits[task.domain][0][rows] for task, rows in zip(tasks, fits, strict=True)],
                        [splits[task.domain][1][rows] for task, rows in zip(tasks, probes, strict=True)])
              for weights, splits in embedded.items()}
    spaces["pixels"] = tuple([pixel_statistics(split, part) for split, part in zip(splits, rows, strict=True)]
                             for splits, rows in (([t.train for t in tasks], fits), ([t.split for t in tasks], probes)))
    result = {name: separability(fit, probe, ids, draws, seed) for name, (fit, probe) in spaces.items()}
    return {"images_per_task": n, "chance": 1 / len(tasks), "spaces": result}


# ---------------------------------------------------------------- output


def percent(value: float | None) -> float:
    """100 times a fraction; NaN where it is not known."""
    return math.nan if value is None else 100 * value


def draw_transfer(path: Path, analysis: dict, domains: list[str], headline: int) -> None:
    """The grid of transfer curves: rows are the task whose components are used, columns the task that uses them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    K = len(domains)
    figure, axes = plt.subplots(K, K, figsize=(2.7 * K + 0.6, 2.3 * K + 0.6), sharex=True, sharey=True, squeeze=False)
    for i, fit in enumerate(domains):
        for j, test in enumerate(domains):
            ax = axes[i][j]
            for weights, result in analysis["transfer"].items():
                rows = [r for r in result["rows"] if r["test"] == test]
                curve = [(r["k"], percent(r["kept"])) for r in rows if r["fit"] == fit]
                ax.plot(*zip(*curve, strict=True), color=COLOURS[weights], label=f"{weights}: PCs", marker=".", ms=4)
                if weights == "tuned" or len(analysis["transfer"]) == 1:
                    ks = sorted({r["k"] for r in rows})
                    random = np.array([[percent(r["kept"]) for r in rows if r["k"] == k and "random" in r["fit"]]
                                       for k in ks])
                    ax.plot(ks, random.mean(1), color=COLOURS["random"], ls="--", label=f"{weights}: random subspaces")
                    ax.fill_between(ks, random.min(1), random.max(1), color=COLOURS["random"], alpha=0.2, lw=0)
            ax.axhline(99, color="k", lw=0.6, ls=":")
            ax.axvline(headline, color="k", lw=0.6, ls=":")
            ax.set(xscale="log", ylim=(-5, 115))
            if i == 0:
                ax.set_title(f"used by {test}", fontsize=9)
            if j == 0:
                ax.set_ylabel(f"PCs of {fit}\nkept, %", fontsize=9)
            if i == K - 1:
                ax.set_xlabel("components k", fontsize=9)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", bbox_to_anchor=(0.5, 0.91), ncols=3,
                  fontsize=9, frameon=False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw_separability(path: Path, result: dict) -> None:
    """Balanced accuracy of telling the tasks apart: each space beside the pixel statistics and chance."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(5, 3.2))
    for i, (name, by_model) in enumerate(result["spaces"].items()):
        for j, (model, v) in enumerate(by_model.items()):
            error = [[100 * max(v["value"] - v["low"], 0)], [100 * max(v["high"] - v["value"], 0)]]
            ax.bar(i + 0.38 * (j - 0.5), 100 * v["value"], 0.36, yerr=error, capsize=3, color=COLOURS[name],
                   hatch="//" if j else None, edgecolor="white", label=model if i == 0 else None)
    ax.axhline(100 * result["chance"], color="k", ls=":", lw=1, label="chance")
    names = ["pixel statistics" if name == "pixels" else name for name in result["spaces"]]
    ax.set_xticks(range(len(names)), names)
    ax.set(ylim=(0, 105), ylabel="balanced accuracy, %")
    ax.legend(ncols=3, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.14), frameon=False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def write_analysis(folder: Path, name: str, analysis: dict) -> str:
    """analysis.json, transfer.csv, report.md and the figures; returns the report."""
    domains, headline = analysis["domains"], analysis["transfer"]["tuned"]["pairs"][0]["k"]
    folder.mkdir(parents=True, exist_ok=True)
    train.write_json(folder / "analysis.json", analysis)

    evaluate.write_csv(folder / "transfer.csv", [{"weights": weights, **row}
                                                 for weights, result in analysis["transfer"].items()
                                                 for row in result["rows"]])
    lines = [f"# {name}", "", "## Transfer of principal components", "",
             f"Share of (score - chance) that the first {headline} components of one task keep for another, with its "
             "95 % interval; the score is rank-1 for people and the nearest class mean for objects, on identities that "
             "the components were not fitted on (nan: even all components are not above chance). All: every component; "
             "raw: without centring. k99 and k95: components "
             "from which on 99 % and 95 % are kept. Random: the same share for random subspaces.", ""]
    for weights, result in analysis["transfer"].items():
        note = f" **Rank-limited**: {result['images_per_task']} images a task are fewer than 5 x {result['dim']}." \
            if result["rank_limited"] else ""
        lines += [f"### {weights}", "",
                  f"{result['images_per_task']} images a task, {result['dim']} dimensions.{note}", "",
                  "| PCs of | used by | raw | all | kept at k | k99 | k95 | random at k |",
                  "| --- | --- | --- | --- | --- | --- | --- | --- |"]
        for p in result["pairs"]:
            lines.append(f"| {p['fit']} | {p['test']} | {100 * p['raw']:.1f} | {100 * p['full']:.1f} | "
                         f"{percent(p['kept']):.1f} [{percent(p['low']):.1f}, {percent(p['high']):.1f}] | "
                         f"{p['k99'] or '-'} | {p['k95'] or '-'} | {percent(p['random']):.1f} |")
        overlap = [f"{a} and {b} {result['overlap'][a][b]:.2f}"
                   for i, a in enumerate(domains) for b in domains[i + 1 :]]
        if overlap:
            lines += ["", f"Overlap of the first {headline} components, chance {result['overlap_chance']:.2f}: "
                      + "; ".join(overlap) + "."]
        lines.append("")
    if separable := analysis["separability"]:
        lines += ["## Linear separability of the tasks", "",
                  f"Balanced accuracy on unseen identities, {separable['images_per_task']} images a task, chance "
                  f"{100 * separable['chance']:.0f}. Pixel statistics know nothing of what an image shows: only what "
                  "is above them is more than the format of the sets.", "", "| space | logistic regression | LDA |",
                  "| --- | --- | --- |"]
        for space, by_model in separable["spaces"].items():
            cells = [f"{100 * v['value']:.1f} [{100 * v['low']:.1f}, {100 * v['high']:.1f}]" for v in by_model.values()]
            lines.append(f"| {space} | {cells[0]} | {cells[1]} |")
    report = "\n".join(lines) + "\n"
    train.write_atomically(folder / "report.md", lambda path: path.write_text(report))
    draw_transfer(folder / "transfer.png", analysis, domains, headline)
    if separable:
        draw_separability(folder / "separability.png", separable)
    return report


# ---------------------------------------------------------------- claims


@dataclass
class Claim:
    """One line of the claims table."""

    claim: str
    measured: str
    threshold: str
    verdict: str  # "holds", "holds, but ...", "fails" or "not measured (why)"


@dataclass
class Measured:
    """A run with what evaluate.py and analyze.py found."""

    name: str
    config: dict
    rows: list[evaluate.Row]
    analysis: dict | None

    @property
    def family(self) -> str:
        return self.config["backbone"] or self.config["model"]

    @property
    def start(self) -> tuple:
        """What two runs must share to be compared: the untouched backbone and its input."""
        return tuple(self.config[key] for key in ("backbone", "size", "model", "weights", "image_size", "embed_dim"))

    def headline(self, weights: str) -> dict[tuple[str, str], evaluate.Row]:
        """(domain, split) -> headline row, of the trained domains, in distribution."""
        return {key: pair[weights] for key, pair in evaluate.headlines(self.rows).items()
                if weights in pair and key[0] in self.config["domains"] and not pair[weights].out_of_distribution}


def read_runs(folder: Path) -> list[Measured]:
    """Every evaluated run below a folder."""
    runs = []
    for path in sorted(folder.glob("*/eval/results.json")):
        home = path.parent.parent
        if (home / "config.json").exists():
            analysis = home / "analysis" / "analysis.json"
            runs.append(Measured(home.name, train.read_json(home / "config.json"), evaluate.read_rows(path.parent),
                                 train.read_json(analysis) if analysis.exists() else None))
    if not runs:
        raise InputError(f"{folder}: no evaluated run in it; train runs below it and call evaluate.py on each")
    return runs


def join(verdicts: list[str]) -> str:
    """The weakest of several verdicts."""
    order = ["fails", "not measured", "holds, but", "holds"]
    return min(verdicts, key=lambda verdict: next(i for i, start in enumerate(order) if verdict.startswith(start)))


def claim_backbones(unified: list[Measured]) -> Claim:
    """Every task of a unified run is above the untouched backbone, with disjoint intervals, in all three families."""
    said, verdicts = [], []
    for family in train.BACKBONES:
        runs = [run for run in unified if run.family == family]
        for run in runs:
            before, after = run.headline("foundation"), run.headline("tuned")
            better = [after[key].low > before[key].high for key in after if key in before]
            said.append(f"{run.name}: {sum(better)} of {len(better)} tasks above the foundation")
            verdicts.append("not measured (no foundation scores)" if not better else
                            "holds" if all(better) else "fails")
        if not runs:
            verdicts.append(f"not measured (no run of {family})")
    return Claim("Works on CLIP, EVA-02 and DINOv3", "; ".join(said) or "-", "all tasks, disjoint 95 % intervals",
                 join(verdicts))


def matched(run: Measured, expert: Measured, domain: str) -> bool:
    """Whether both saw about as many images of the domain (within a quarter)."""
    return 0.75 <= expert.config["counts"][domain] / max(run.config["counts"][domain], 1) <= 1.25


def claim_experts(unified: list[Measured], experts: list[Measured], delta: float) -> Claim:
    """A unified run is not worse than the expert of each task by more than delta."""
    said, verdicts = [], []
    for run in unified:
        for key, row in run.headline("tuned").items():
            rivals = [e.headline("tuned")[key] for e in experts
                      if e.start == run.start and key in e.headline("tuned") and matched(run, e, key[0])]
            for rival in rivals:
                difference = row.value - rival.value
                error = math.hypot(row.value - row.low, rival.high - rival.value)
                said.append(f"{run.name} {key[0]} {100 * difference:+.1f}")
                verdicts.append("holds" if difference - error >= -delta else
                                "fails" if difference + error < -delta else
                                "not measured (intervals too wide to decide)")
    if not verdicts:
        verdicts = ["not measured (no expert run, --domains NAME, of the same backbone and number of images)"]
    return Claim("On par with domain experts on all tasks at once", "; ".join(said) or "-",
                 f"difference above -{100 * delta:g} points at 95 %", join(verdicts))


def claim_generalisation(unified: list[Measured], least: float) -> Claim:
    """Retention on out-of-distribution splits, where the untouched backbone is above chance."""
    said, verdicts = [], []
    for run in unified:
        for row in run.rows:
            if row.out_of_distribution and row.metric == f"retention of {evaluate.HEADLINE['classification']}":
                said.append(f"{run.name} {row.domain}/{row.split} {100 * row.value:.0f} % "
                            f"[{100 * row.low:.0f}, {100 * row.high:.0f}]")
                verdicts.append("holds" if row.low >= least else "fails" if row.high < least else
                                "not measured (intervals too wide to decide)")
    if not verdicts:
        verdicts = ["not measured (no out-of-distribution split on which the foundation beats chance)"]
    return Claim("Generalisation outside the training distribution is not substantially harmed", "; ".join(said) or "-",
                 f"retention at least {100 * least:g} %", join(verdicts))


def claim_forgetting(unified: list[Measured], sequential: list[Measured]) -> Claim:
    """A sequential run is below the unified one of the same backbone on a task that it learned before the last."""
    said, verdicts = [], []
    for run in unified:
        for other in (s for s in sequential if s.start == run.start and s.config["domains"] == run.config["domains"]):
            mine, theirs = run.headline("tuned"), other.headline("tuned")
            last = (other.config["order"] or other.config["domains"])[-1]
            early = [key for key in mine if key in theirs and key[0] != last]
            lost = [key for key in early if theirs[key].high < mine[key].low]
            said.append(f"{run.name} against {other.name}: " +
                        ", ".join(f"{d} {100 * (theirs[d, s].value - mine[d, s].value):+.1f}" for d, s in early))
            verdicts.append("holds" if lost else "fails")
    return Claim("Sequential fine-tuning forgets where the interleaved one does not", "; ".join(said) or "-",
                 "an earlier task lower, disjoint 95 % intervals",
                 join(verdicts or ["not measured (no run of --schedule sequential of the same backbone)"]))


def claim_separable(unified: list[Measured], least: float) -> Claim:
    """Logistic regression tells the tasks apart, better than pixel statistics do."""
    said, verdicts = [], []
    for run in unified:
        if run.analysis and run.analysis["separability"]:
            spaces = {name: v["logistic"] for name, v in run.analysis["separability"]["spaces"].items()}
            tuned, pixels = spaces["tuned"], spaces["pixels"]
            said.append(f"{run.name} {100 * tuned['value']:.1f} (foundation {100 * spaces['foundation']['value']:.1f}, "
                        f"pixel statistics {100 * pixels['value']:.1f})")
            verdicts.append("fails" if tuned["low"] < least else "holds" if tuned["low"] > pixels["high"] else
                            "holds, but no better than pixel statistics")
    return Claim("The tasks are linearly separable", "; ".join(said) or "-",
                 f"balanced accuracy above {100 * least:g} %",
                 join(verdicts or ["not measured (no analysed unified run; call analyze.py --run RUN)"]))


def claim_components(unified: list[Measured], least: float) -> Claim:
    """Fewer than 100 components of any task keep the other tasks' scores, and more of them than random ones do."""
    said, verdicts = [], []
    for run in unified:
        if not run.analysis:
            continue
        found = run.analysis["transfer"]["tuned"]
        pairs = [p for p in found["pairs"] if p["fit"] != p["test"]]
        if any(p["kept"] is None for p in pairs):
            verdicts.append("not measured (a task is not above chance in the full space)")
        elif pairs:
            worst = min(pairs, key=lambda p: p["kept"])
            said.append(f"{run.name}: {100 * worst['kept']:.1f} % [{100 * worst['low']:.1f}, "
                        f"{100 * worst['high']:.1f}] at k = {worst['k']} of {found['dim']}, worst pair {worst['fit']} "
                        f"for {worst['test']} (random {100 * worst['random']:.1f} %)"
                        + (", rank-limited" if found["rank_limited"] else ""))
            better = all(p["low"] > p["random"] for p in pairs)
            verdicts.append("not measured (a space of no more than k dimensions)" if worst["k"] >= found["dim"] else
                            "fails" if worst["kept"] < least else "holds" if better else
                            "holds, but no better than random subspaces")
    return Claim("Fewer than 100 principal components of any task serve all the others", "; ".join(said) or "-",
                 f"at least {100 * least:g} % of (score - chance) kept",
                 join(verdicts or ["not measured (no analysed unified run of two or more tasks)"]))


# ---------------------------------------------------------------- the job


def analyse(options: dict) -> int:
    """Analyse one run and write RUN/analysis."""
    run = train.load_run(Path(options["run"]), options["allow_partial"])
    data = options["data"] or run.config["data"]
    root = open_root(Path(data))
    pairs = {domain: find_splits(root.get(domain, {})) for domain in run.config["domains"]}
    pairs = {domain: pair for domain, pair in pairs.items() if pair}
    if not pairs:
        raise InputError(f"{data}: none of {', '.join(run.config['domains'])} has both a training and a test split: "
                         "nothing to analyse")
    embedded: dict[str, dict] = {}
    for weights, load in (("foundation", train.load_foundation), ("tuned", train.load_tuned)):
        embed = evaluate.make_embedder(lambda load=load: load(run), weights, run.folder / "eval", options)
        embedded[weights] = {domain: tuple(embed(split) for split in pair) for domain, pair in pairs.items()}
    tasks = []
    for domain, (base, test) in pairs.items():
        readable = tuple(np.isfinite(x[:, 0]) for x in embedded["tuned"][domain])
        if bad := sum(int((~good).sum()) for good in readable):
            print(f"  {domain}: {bad} unreadable images left out")
        if task := make_task(base, test, readable, options["limit"], options["seed"]):
            tasks.append(task)
        else:
            print(f"  {domain}: too few identities to fit on some and test others; left out")
    if not tasks:
        raise InputError(f"{data}: no domain has enough identities to fit on some and test others: nothing to analyse")
    result: dict = {"run": run.folder.name, "domains": [task.domain for task in tasks], "transfer": {},
                    "separability": None}
    for weights, spaces in embedded.items():
        D = next(iter(spaces.values()))[0].shape[1]
        headline = min(options["components"], D)
        grid = sorted({k for k in GRID if k < D} | {headline, D})
        result["transfer"][weights] = transfer(spaces, tasks, grid, headline, options["bootstrap"], options["seed"])
    if len(tasks) > 1:
        result["separability"] = measure_separability(embedded, tasks, options["bootstrap"], options["seed"],
                                                      options["limit"])
    folder = run.folder / "analysis"
    print(write_analysis(folder, run.folder.name, result))
    print(f"written: {folder}/report.md, analysis.json, transfer.csv and figures; "
          f"next: python analyze.py claims {run.folder.parent}")
    return 0


@click.group(invoke_without_command=True, context_settings={"show_default": True, "max_content_width": 120},
             help=__doc__.split("\n\n")[0])
@evaluate.model_options
@click.option("--components", type=click.IntRange(1), default=99, help="The k of the claim: fewer than 100.")
@click.option("--limit", type=click.IntRange(10), default=2000, help="At most so many probes per task.")
@click.option("--bootstrap", type=click.IntRange(2), default=500, help="Resamplings for the intervals.")
@click.pass_context
def main(context: click.Context, **options) -> int | None:
    if context.invoked_subcommand:
        return None
    if not options["run"]:
        raise InputError("what is to be analysed? give --run RUN, or `claims RUNS_FOLDER`")
    return analyse(options)


@main.command(help="Turn the runs of a folder into one verdict per claim of the paper's abstract.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--delta", type=click.FloatRange(0, 1), default=0.01, help="Margin of non-inferiority to experts.")
@click.option("--retention", type=click.FloatRange(0), default=0.95, help="Least retention out of distribution.")
@click.option("--separable", type=click.FloatRange(0, 1), default=0.95, help="Least balanced accuracy.")
@click.option("--keep", type=click.FloatRange(0, 1), default=0.95, help="Least share that the components keep.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an input error.")
def claims(folder: Path, delta: float, retention: float, separable: float, keep: float) -> int:
    runs = read_runs(folder)
    by_role = {role: [run for run in runs if run.config["role"] == role] for role in train.ROLES}
    unified = by_role["unified"]
    table = [
        claim_backbones(unified),
        claim_experts(unified, by_role["expert"], delta),
        Claim("More accurate than humans at multi-tasking", "-", "-", "not measured (no human figures on these sets)"),
        claim_generalisation(unified, retention),
        claim_forgetting(unified, by_role["sequential"]),
        claim_separable(unified, separable),
        claim_components(unified, keep),
    ]
    lines = ["| claim | measured | threshold | verdict |", "| --- | --- | --- | --- |"]
    lines += [f"| {c.claim} | {c.measured} | {c.threshold} | {c.verdict} |" for c in table]
    rows = [asdict(claim) for claim in table]
    train.write_atomically(folder / "claims.json", lambda path: path.write_text(json.dumps(rows, indent=1) + "\n"))
    train.write_atomically(folder / "claims.md", lambda path: path.write_text("\n".join(lines) + "\n"))
    evaluate.write_csv(folder / "claims.csv", rows)
    for claim in table:
        print(f"{claim.claim}\n    {claim.verdict}\n    measured: {claim.measured}; threshold: {claim.threshold}")
    print(f"written: {folder}/claims.md, claims.json, claims.csv")
    return 0


if __name__ == "__main__":
    run_command(main)
