"""Same/different trials for people: balanced pairs of test images, and an offline page for rating them.

Ratings are a CSV with the columns RATING_COLUMNS, from -3 (surely different) to +3 (surely the same); other software
that shows the pairs of trials.csv may also produce them.
"""

import base64
import hashlib
import json
import math
from pathlib import Path

import numpy as np

from data_prep import InputError, make_folder, write_atomically, write_csv
from data_prep.format import BadImage, Split, open_root, ordered_tests
from protocols.humans import RATING_COLUMNS

PAGE = Path(__file__).with_name("trials.html")


def draw_pairs(labels: np.ndarray, camera: np.ndarray, template: np.ndarray, count: int,
               seed: int | tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Genuine and impostor pairs in equal numbers, cycling through identities; no image twice if there are enough.

    Both kinds are drawn across cameras (and templates) where the split has them: otherwise, the background of a pair
    from one camera could reveal the answer.

    Args:
        labels: [M]; images of label -1 are never drawn.
        camera, template: [M], -1 where there is none.
        count: number of pairs, half of each kind.
        seed: of the random draws.

    Returns:
        Rows int64 [n, 2] and whether they are genuine, bool [n]; n <= count, balanced.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.flatnonzero(labels >= 0))
    order = order[np.argsort(labels[order], kind="stable")]
    rows_of = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if len(order) else []
    used, drawn = np.zeros(len(labels), dtype=int), set()

    def find(a_rows: np.ndarray, b_rows: np.ndarray, most: float) -> tuple[int, int] | None:
        """The least used new pair from two lists of rows, with at most `most` earlier uses of its images together."""
        best, cost = None, most + 1
        for a in a_rows[np.argsort(used[a_rows], kind="stable")][:32]:
            b = b_rows[(b_rows != a) & ((camera[b_rows] != camera[a]) | (camera[a] < 0))
                       & ((template[b_rows] != template[a]) | (template[a] < 0))]
            for other in b[np.argsort(used[b], kind="stable")][:32]:
                if used[a] + used[other] < cost and (min(a, other), max(a, other)) not in drawn:
                    best, cost = (int(a), int(other)), used[a] + used[other]
            if not cost:
                break
        return best

    def draw(same: bool) -> list[tuple[int, int]]:
        turns, pairs = rng.random(len(rows_of)), []  # number of pairs of each identity; ties are broken at random
        for most in (0, math.inf):  # unused images first
            waiting = np.where([same and len(rows) < 2 for rows in rows_of], np.inf, turns)
            while len(pairs) < count // 2 and np.isfinite(waiting).any():
                i, *others = np.argsort(waiting)
                others = [i] if same else [j for j in others[:64] if np.isfinite(waiting[j])]
                pair = None
                for j in others:
                    if pair := find(rows_of[i], rows_of[j], most):
                        break
                if not pair:
                    waiting[i] = np.inf
                    continue
                for k in {i, j}:
                    waiting[k], turns[k] = waiting[k] + 1, turns[k] + 1
                used[list(pair)] += 1
                drawn.add((min(pair), max(pair)))
                pairs.append(pair if rng.random() < 0.5 else pair[::-1])
        return pairs

    genuine, impostor = draw(True), draw(False)
    half = min(len(genuine), len(impostor))
    return (np.array(genuine[:half] + impostor[:half], dtype=np.int64).reshape(-1, 2), np.arange(2 * half) < half)


def readable(split: Split, row: int) -> bool:
    """Whether the image of a row can be decoded."""
    try:
        split.image(row)
        return True
    except BadImage:
        return False


def draw_trials(split: Split, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`draw_pairs` from the readable images of a split; InputError if they give no pair of each kind."""
    labels = np.array(split.labels)
    name = int.from_bytes(hashlib.sha256(f"{split.domain}/{split.name}".encode()).digest()[:4])
    while True:
        pairs, same = draw_pairs(labels, split.optional("camera"), split.optional("template"), count, (seed, name))
        bad = [row for row in np.unique(pairs) if not readable(split, int(row))]
        if not bad:
            break
        labels[bad] = -1  # draw again without damaged images
    if not len(pairs):
        raise InputError(f"{split.folder}: no genuine and impostor pairs: it needs two identities, "
                         "one of them with two images (from two cameras, if it has cameras)")
    return pairs, same


def find_test_splits(places: list[Path]) -> list[Split]:
    """The given splits, and the first in-distribution test split of each domain of the given data roots."""
    chosen = []
    for place in places:
        if (place / "index.json").exists():
            chosen.append(Split(place))
            if chosen[-1].protocol is None:
                raise InputError(f"{place}: a training split, which models have seen: give a test split")
            continue
        for splits in open_root(place).values():
            chosen += ordered_tests(splits.values())[:1]
    if not chosen:
        raise InputError(f"{places[0]}: no test split: prepare one, `python -m data_prep SOURCE ... --part test`")
    names = [f"{split.domain}/{split.name}" for split in chosen]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--src: {repeated[0]} is named twice: give it once")
    return chosen


def write_trials(splits: list[Split], out: Path, count: int, seed: int) -> dict[str, int]:
    """Write out/index.html and out/trials.csv; returns the number of trials by split.

    The page holds the pictures but no labels, so that raters cannot find the answers in it.
    """
    trials, images, counts = [], {}, {}
    for split in splits:
        name = f"{split.domain}/{split.name}"
        pairs, _ = draw_trials(split, count, seed)
        counts[name] = len(pairs)
        images |= {f"{name}/{key}": base64.b64encode(data).decode() for key, data in map(split.jpeg, pairs.flat)}
        question = "The same kind of thing?" if split.domain == "object" else "The same person?"
        trials += [(name, split.jpeg(left)[0], split.jpeg(right)[0], question) for left, right in pairs]
    # shuffled, because draw_pairs lists all genuine pairs first, which would reveal the answers
    trials = [trials[i] for i in np.random.default_rng(seed).permutation(len(trials))]
    name = hashlib.sha256(json.dumps([trial[:3] for trial in trials]).encode()).hexdigest()[:12]
    columns = RATING_COLUMNS[:3]
    data = {"id": name, "trials": [dict(zip((*columns, "question"), trial, strict=True)) for trial in trials],
            "images": images}
    page = PAGE.read_text().replace("{{DATA}}", json.dumps(data).replace("<", "\\u003c"))
    make_folder(out, "--out")
    write_csv(out / "trials.csv", [dict(zip(columns, trial, strict=False)) for trial in trials])
    write_atomically(out / "index.html", lambda temporary: temporary.write_text(page))
    return counts
