"""Objects: nearest class mean, k-NN, linear probe, trained class weights, CLIP's prompts.

Copy with it: protocols/bootstrap.py, protocols/embed.py, protocols/search.py, models/, kernels/, data_prep/.
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy.sparse
import torch

from data_prep import InputError
from data_prep.format import Split, fingerprint
from models.backbones import text_weights
from protocols.bootstrap import Estimate, Unscorable, bootstrap_counts, intervals, unit, weighted_mean
from protocols.embed import Embedder, keep
from protocols.search import take_rows


def class_means(x: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Sums of the unit embeddings of each class, [classes, D] (their directions are the class means)."""
    sums = np.zeros((classes, x.shape[1]), dtype=np.float64)
    for start in range(0, len(labels), 65536):  # a sparse product, which makes a float64 copy of its rows
        part = labels[start:start + 65536]
        members = scipy.sparse.csr_array((np.ones(len(part)), (part, np.arange(len(part)))), (classes, len(part)))
        sums += members @ x[start:start + 65536]
    return sums


def nearest_mean(x: np.ndarray, means: np.ndarray, label: np.ndarray | None = None) -> np.ndarray:
    """Class with the nearest mean direction, int [n]; -1 where no class has an image.

    `label` [n]: each row is among the sums of this class and is left out of them.
    """
    length = np.linalg.norm(means, axis=1)
    directions, answer = means / np.maximum(length, 1e-12)[:, None], np.empty(len(x), dtype=np.int64)
    for start in range(0, len(x), 1024):
        part = slice(start, start + 1024)
        scores = x[part] @ directions.T
        scores[:, length < 1e-9] = -np.inf  # a class without images must not win with its cosine of 0
        if label is not None:
            without = means[label[part]] - x[part]
            size = np.linalg.norm(without, axis=1)
            cosine = (x[part] * without).sum(1) / np.maximum(size, 1e-12)
            scores[np.arange(len(scores)), label[part]] = np.where(size < 1e-6, -np.inf, cosine)
        answer[part] = np.where(np.isfinite(scores).any(1), scores.argmax(1), -1)
    return answer


def nearest_rows(x: np.ndarray, y: np.ndarray, k: int = 1, itself: bool = False, device: torch.device | str = "cpu",
                 block: int = 1024, width: int = 1 << 16) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of y for each unit row of x, the nearest first: rows int64 and cosines float32, [n, k].

    Rows of NaN have no neighbours and are none. Missing neighbours are -1 at -inf.

    Args:
        itself: x is y; a row is not its own neighbour.
        block, width: rows of x and of y whose scores are held at once.
    """
    rows, cosines = np.full((len(x), k), -1), np.full((len(x), k), -np.inf, dtype=np.float32)
    good = np.flatnonzero(np.isfinite(x[:, 0]))
    for start in range(0, len(good), block):
        chunk = good[start : start + block]
        queries, index = torch.from_numpy(x[chunk]).to(device), torch.from_numpy(chunk).to(device)
        best = torch.full((len(chunk), k), -torch.inf, dtype=queries.dtype, device=device)
        place = torch.full((len(chunk), k), -1, device=device)
        for left in range(0, len(y), width):
            part = torch.from_numpy(y[left : left + width]).to(device)
            scores = queries @ part.T
            scores[:, ~part[:, 0].isfinite()] = -torch.inf
            if itself:
                inside = torch.nonzero((index >= left) & (index < left + len(part))).flatten()
                scores[inside, index[inside] - left] = -torch.inf
            top, at = scores.topk(min(k, len(part)), 1)
            best, order = torch.cat([best, top], 1).topk(k, 1)
            place = torch.cat([place, left + at], 1).gather(1, order)
        place[best == -torch.inf] = -1
        rows[chunk], cosines[chunk] = place.cpu().numpy(), best.cpu().numpy()
    return rows, cosines


def nearest_neighbours(x: np.ndarray, reference: np.ndarray, labels: np.ndarray, classes: int, same: bool, k: int = 20,
                       temperature: float = 0.07, device: torch.device | str = "cpu") -> np.ndarray:
    """Class by a vote of the k nearest of `reference`, weighted exp(cos / T) as in DINO's eval_knn, int [n]; -1: none.

    `same`: x is the reference itself; a sample does not vote for itself.
    """
    top, cosine = nearest_rows(x, reference, min(k, max(len(reference) - same, 0)), same, device)
    weight, votes = np.exp((cosine.astype(float) - 1) / temperature), np.empty(len(x), dtype=np.int64)
    for start in range(0, len(x), 1024):  # of thousands of classes each
        rows = slice(start, start + 1024)
        tally = np.zeros((len(top[rows]), classes))
        np.add.at(tally, (np.arange(len(tally))[:, None], labels[top[rows]]), weight[rows])
        votes[rows] = np.where((top[rows] >= 0).any(1), tally.argmax(1), -1)
    return votes


def fit_probe(y: np.ndarray, labels: np.ndarray, classes: int, device: torch.device,
              strengths: tuple[float, ...] = (1, 1e-1, 1e-2, 1e-3, 1e-4)) -> tuple[np.ndarray, np.ndarray, float]:
    """A linear probe: multinomial logistic regression by L-BFGS, without randomness.

    The regularisation is chosen on every fifth image of each class, from the strongest downwards while accuracy rises;
    the probe is then fitted to all images. With one image a class it is the strongest.

    Args:
        y: embeddings float32 [n, D]; centred and scaled here to a variance of 1 on average.
        labels: [n] of 0..classes - 1.
        strengths: candidates of l in mean cross-entropy + l/2 |W|² (scikit-learn's C is 1 / (l n)).

    Returns:
        Weights [classes, D] and bias [classes] for y as given, and the chosen l.
    """
    order = np.argsort(labels, kind="stable")
    held = np.zeros(len(y), dtype=bool)
    place = np.arange(len(y)) - np.searchsorted(labels[order], labels[order])
    held[order] = place % 5 == min(4, place.max())  # where no class has five images, the last of the largest
    mean = y.mean(0)
    scale = float(np.sqrt(max(np.einsum("nd,nd->", y, y) / len(y) - mean @ mean, 1e-12) / y.shape[1]))
    z, target = torch.from_numpy((y - mean) / scale).to(device), torch.from_numpy(labels.astype(np.int64)).to(device)

    def fit(rows: np.ndarray, strength: float, start: np.ndarray) -> np.ndarray:
        blocks = torch.from_numpy(rows).to(device).split(1 << 14)

        def loss_of(flat: np.ndarray) -> tuple[float, np.ndarray]:
            w = torch.from_numpy(flat.reshape(classes, -1)).float().to(device)
            loss, gradient = 0.0, torch.zeros_like(w)
            for block in blocks:
                x, right = z[block], target[block]
                logits = torch.addmm(w[:, -1], x, w[:, :-1].T)
                loss += float(torch.nn.functional.cross_entropy(logits, right, reduction="sum"))
                residual = logits.softmax(1)
                residual[torch.arange(len(x), device=device), right] -= 1
                gradient[:, :-1] += residual.T @ x
                gradient[:, -1] += residual.sum(0)
            gradient /= len(rows)
            gradient[:, :-1] += strength * w[:, :-1]
            loss = loss / len(rows) + strength / 2 * float((w[:, :-1] ** 2).sum())
            return loss, gradient.flatten().double().cpu().numpy()

        optimum = scipy.optimize.minimize(loss_of, start, jac=True, method="L-BFGS-B",
                                          options={"maxiter": 200, "gtol": 1e-6, "ftol": 1e-8})
        return optimum.x

    rest, test, best = np.flatnonzero(~held), torch.from_numpy(np.flatnonzero(held)).to(device), (-1.0, strengths[0])
    start = flat = np.zeros(classes * (y.shape[1] + 1))
    for strength in strengths if len(rest) else ():
        flat = fit(rest, strength, flat)
        w = torch.from_numpy(flat.reshape(classes, -1)).float().to(device)
        right = float(((z[test] @ w[:, :-1].T + w[:, -1]).argmax(1) == target[test]).float().mean())
        if right <= best[0]:
            break
        best, start = (right, strength), flat
    w = fit(np.arange(len(y)), best[1], start).reshape(classes, -1)
    weights = (w[:, :-1] / scale).astype(np.float32)
    return weights, (w[:, -1] - weights @ mean).astype(np.float32), best[1]


def read_prompts(names: str) -> dict[str, list[str]]:
    """The templates of --prompts by set: shipped ones by number, or a file of one template a line, {} for the name."""
    prompts = {}
    for name in filter(None, names.split(",")):
        path = Path(__file__).parent / "prompts" / f"{name}.txt" if name.isdigit() else Path(name)
        try:
            lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise InputError(f"--prompts {name}: {path} cannot be read ({error}); shipped are 1, 7 and 80") from error
        if bad := next((line for line in lines if line.count("{}") != 1), None) or (not lines and "an empty file"):
            raise InputError(f"--prompts {name}: {bad[:80]!r}: want one template a line, with {{}} for the class name")
        prompts[f"{path.stem} {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:8]}"] = lines
    return prompts


WORDNET = re.compile(r"n\d{8}(?!\d)")  # how ImageNet's class folders begin


def words_of(name: str, readable: str) -> set[str]:
    """Names of a class, without case and signs: its name, and its readable name, also up to the first comma."""
    return {re.sub(r"[\W_]+", " ", text.casefold()).strip() for text in (name, readable, readable.split(",")[0])}


@dataclass
class Readouts:
    """Readouts of classification beside means and neighbours, for all splits and both sets of weights of a run."""

    prompts: dict[str, list[str]]  # templates by set; for CLIP only
    probe: int  # most images of a reference that a linear probe is fitted to
    trained: list[str]  # classes of the run; others are also scored apart
    training: Split | None = None  # their images, if available

    def seen_classes(self, split: Split, reference: Split) -> tuple[set[str], str]:
        """The classes of a split that a run was trained on, and in words how they were compared.

        A class is seen if it has the WordNet id of a trained class or, if either lacks one, its name (in any spelling,
        also the readable one), or if the split or its reference shows an image of it that was trained on.
        """
        readable_names = dict(zip(self.training.classes, self.training.names, strict=True)) if self.training else {}
        trained = [(WORDNET.match(name), words_of(name, readable_names.get(name, name))) for name in self.trained]
        ids, words = {match[0] for match, _ in trained if match}, set().union(*(names for _, names in trained))
        plain = set().union(*(names for match, names in trained if not match))
        groups, seen, by_hash = split.protocol.get("groups") or {}, set(), set()
        hashed = self.training is not None and all(s.hashed for s in (self.training, split, reference))
        for one in (split, reference) if hashed else ():
            shared = np.isin(one.column("hash"), self.training.column("hash")) & (one.labels >= 0)
            by_hash |= {one.classes[label] for label in np.unique(one.labels[shared])}
        for name, readable in zip(split.classes, split.names, strict=True):
            for member in groups.get(name, [name]):
                known = words_of(member, readable if member == name else member)
                wordnet = WORDNET.match(member)
                if (wordnet and wordnet[0] in ids) or known & (plain if wordnet else words) or {name, member} & by_hash:
                    seen.add(name)
        wordnet = all(WORDNET.match(name) for name in [*self.trained, *split.classes])
        return seen, f"by {'WordNet id' if wordnet else 'name'}" + " and images" * hashed

    def fit_once(self, embed: Embedder, y: np.ndarray, labels: np.ndarray, classes: int
                 ) -> tuple[np.ndarray, np.ndarray, float]:
        """`fit_probe`, kept in the folder that runs share: the untouched backbone's serves them all."""
        def make() -> np.ndarray:
            w, b, strength = fit_probe(y, labels, classes, embed.device)
            return np.column_stack([w, b, np.full(classes, strength, dtype=np.float32)])

        if not embed.shared:
            return fit_probe(y, labels, classes, embed.device)
        digest = hashlib.sha256(np.ascontiguousarray(y).data)
        digest.update(repr((labels.tolist(), classes)).encode())
        kept = keep(embed.folder / f"{embed.name}-probe-{digest.hexdigest()[:16]}.npy", (classes, y.shape[1] + 2), make)
        return kept[:, :-2], kept[:, -2].copy(), float(kept[0, -1])

    def texts(self, embed: Embedder, names: list[str]) -> dict[str, np.ndarray]:
        """Unit text embeddings [C, D] of names by set of prompts; {} of a backbone without CLIP's text tower."""
        if embed.model.library != "open_clip" or embed.model.project is not None:
            return {}
        embedded = {}
        for prompts, templates in self.prompts.items():
            key = hashlib.sha256(json.dumps([embed.weights, templates, names]).encode()).hexdigest()[:16]
            embedded[prompts] = keep(embed.folder / f"{embed.name}-text-{key}.npy", (len(names), embed.model.dim),
                                     lambda templates=templates: text_weights(
                                      embed.model, names, embed.device, templates).cpu().numpy())
        return embedded

    def fit(self, embed: Embedder, y: np.ndarray, reference: Split, seed: int) -> dict[str, tuple]:
        """(Weights [C, D], bias [C], rule) by name for the classes of a reference with unit embeddings y."""
        linear, good = {}, np.flatnonzero(np.isfinite(y[:, 0]) & (reference.labels >= 0))
        if self.probe and len(np.unique(reference.labels[good])) > 1:
            rows = np.sort(np.random.default_rng(seed).permutation(good)[: self.probe])
            w, b, strength = self.fit_once(embed, y[rows], reference.labels[rows], len(reference.classes))
            b[reference.counts == 0] = -1e9  # a class without images is never predicted
            print(f"  {embed.name} {reference.domain}/{reference.name}: linear probe of {len(rows):,} images, l2 "
                  f"{strength:g}")
            used = f"{self.probe} drawn images, seed {seed}" if len(good) > self.probe else "all images"
            linear["probe"] = w, b, f"L-BFGS probe, l2 chosen on a fifth, of {used}, reference {fingerprint(reference)}"
        for name, w in self.texts(embed, reference.names).items():
            linear[f"zero-shot {name.split()[0]}"] = w, np.zeros(len(w)), f"zero-shot by prompts {name}"
        return linear


def true_in_real(split: Split) -> np.ndarray | None:
    """ReaL's labels: the right classes of each image, bool [M, C] (none: left out); None without such labels."""
    if not split.protocol.get("real"):
        return None
    number, right = {name: i for i, name in enumerate(split.classes)}, np.zeros((len(split), len(split.classes)), bool)
    for row in range(len(split)):
        right[row, [number[name] for name in split.fields(row).get("real", []) if name in number]] = True
    return right


def rank_classes(x: np.ndarray, truth: np.ndarray, w: np.ndarray, b: np.ndarray,
                 members: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The class that linear weights rank first, and how many they rank above the true one: int64 [M] each.

    Args:
        x, truth: embeddings [M, D] and true classes.
        w, b: weights [R, D] and biases [R].
        members: rows of w of each class, which counts by the best of them.
    """
    flat, starts = np.concatenate(members), np.cumsum([0, *map(len, members[:-1])])
    first, before = np.empty((2, len(x)), dtype=np.int64)
    for start in range(0, len(x), 1024):
        part = slice(start, start + 1024)
        scores = np.maximum.reduceat(x[part] @ w[flat].T + b[flat], starts, axis=1)
        right = scores[np.arange(len(scores)), truth[part], None]
        lower = np.arange(len(members)) < truth[part, None]
        first[part], before[part] = scores.argmax(1), ((scores > right) | ((scores == right) & lower)).sum(1)
    return first, before


def score_classification(x: np.ndarray, split: Split, reference: tuple[np.ndarray, Split], head: np.ndarray | None,
                         head_classes: list[str], draws: int, seed: int, groups: dict[str, list[str]] | None = None,
                         linear: dict[str, tuple[np.ndarray, np.ndarray]] | None = None,
                         only: list[str] | None = None, device: torch.device | str = "cpu") -> dict[str, Estimate]:
    """Top-1 of the nearest class mean and of 20 neighbours; top-1 and top-5 of class weights, trained or otherwise.

    Ties go to the first class, as in argmax; without a voting image the answer is a miss. If the split has ReaL's
    labels, each top-1 is joined by "... ReaL", where any of them is right.

    Args:
        x: unit embeddings of the split.
        reference: unit embeddings and split that class means and neighbours come from.
        head, head_classes: class weights [C, D] of the domain, or None, and their names; used if they cover the split's
            classes, among which the argmax runs.
        groups: classes of the split that comprise several of the reference (ObjectNet), any of which is right.
        linear: more class weights and biases by name, [C, D] and [C] for the classes of the reference.
        only: the classes to score, and to choose among (default: all of the split).
    """
    y, other = reference
    number, classes = {name: i for i, name in enumerate(other.classes)}, split.classes if only is None else only
    groups_of = [(groups or {}).get(name, [name]) for name in classes]
    if unknown := [name for group in groups_of for name in group if name not in number]:
        raise InputError(f"{split.folder}: class {unknown[0]!r} is not in its reference {other.folder}: prepare the "
                         "split with --reference SPLIT, a split of the same classes")
    members = [np.array([number[name] for name in group]) for group in groups_of]
    joined = np.full(len(other.classes) + 1, -1)  # index in `classes` of each class of the reference; the last: none
    for i, group in enumerate(members):
        joined[group] = i
    # the split may name classes of the reference that `classes` joins
    place = dict(zip(other.classes, joined.tolist(), strict=False)) | {name: i for i, name in enumerate(classes)}
    labels = np.append([place.get(name, -1) for name in split.classes], -1)[split.labels]
    rows, good = np.flatnonzero(np.isfinite(x[:, 0]) & (labels >= 0)), np.isfinite(y[:, 0]) & (other.labels >= 0)
    if not good.any():
        raise Unscorable(f"{other.folder}: no readable image with a class, and {split.folder} is scored by them: "
                         "prepare that reference again, or leave the split out with --splits")
    itself = split.folder.resolve() == other.folder.resolve()
    x, truth, real = take_rows(x, rows), labels[rows], true_in_real(split)  # without copies: a reference is large
    vote = np.flatnonzero(good & (joined[other.labels] >= 0))
    y, y_labels = take_rows(y, vote), other.labels[vote]
    means = class_means(y, y_labels, len(other.classes))  # 0 without votes: never predicted
    answers = {"nearest-mean": joined[nearest_mean(x, means, other.labels[rows] if itself else None)],
               "knn": joined[nearest_neighbours(x, y, y_labels, len(other.classes), itself, device=device)]}
    everywhere, chance, linear = np.ones(len(x), dtype=bool), 1 / len(classes), dict(linear or {})
    # by readout and measure: the images that count, which of them are right, chance
    scored = {(name, "top-1"): (everywhere, answer == truth, chance) for name, answer in answers.items()}
    if head is not None:
        place_in_head = {name: i for i, name in enumerate(head_classes)}
        at = np.array([place_in_head.get(name, -1) for name in other.classes])
        linear["head"] = (unit(head)[at], np.where(at < 0, -np.inf, 0))
    for name, (w, b) in linear.items():
        if np.isfinite(b[np.concatenate(members)]).all():
            answers[name], before = rank_classes(x, truth, w, b, members)
            scored[name, "top-1"] = everywhere, before < 1, chance
            scored[name, "top-5"] = everywhere, before < 5, min(5 / len(classes), 1)
    if real is not None:
        column = {name: i for i, name in enumerate(split.classes)}
        real = np.stack([real[rows][:, [column[name] for name in group if name in column]].any(1)
                         for group in groups_of], 1)
        counted, of_chance = real.any(1), float(real.sum(1)[real.any(1)].mean() / len(classes))
        for name, answer in answers.items():
            scored[name, "ReaL"] = counted, real[np.arange(len(x)), answer] & (answer >= 0), of_chance

    def statistic(weights: np.ndarray | None) -> dict[tuple[str, str], float]:
        return {key: weighted_mean(right[of].astype(float), None if weights is None else weights[of])
                for key, (of, right, _) in scored.items() if of.any()}

    figures = {}
    for key, figure in intervals(statistic, bootstrap_counts(truth, draws, seed), identities=truth).items():
        (readout, measure), (counted, _, chance) = key, scored[key]
        figures[f"{readout} {measure}"] = replace(figure, count=int(counted.sum()), chance=chance, readout=readout,
                                                  measure=measure)
    return figures
