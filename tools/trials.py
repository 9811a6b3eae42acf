"""Same/different trials for people: balanced pairs of test images, an offline page to rate them on, ratings.

Ratings are a CSV with the columns of RATING_COLUMNS, -3 (sure: different) to +3 (sure: same); they may come from any
other software that shows the pairs of trials.csv.
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

QUESTION = {"object": "The same kind of thing?", "face_hq": "The same person?", "face_lq": "The same person?",
            "body": "The same person?"}
PAGE = Path(__file__).with_name("trials.html")


# ---------------------------------------------------------------- drawing


def draw_pairs(labels: np.ndarray, camera: np.ndarray, template: np.ndarray, count: int,
               seed: int | tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of one identity and as many of two, identities in turn, no image twice where there are enough.

    Both kinds are drawn across cameras (and templates) wherever the split has them: if only the pairs of one person
    could share a camera, the background would answer.

    Args:
        labels: [M]; -1 is never drawn.
        camera, template: [M], -1 where there is none.
        count: pairs wanted, half of each kind.
        seed: of every draw.

    Returns:
        Rows int64 [n, 2] and whether they are of one identity, bool [n]; n <= count, balanced.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.flatnonzero(labels >= 0))
    order = order[np.argsort(labels[order], kind="stable")]
    rows_of = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if len(order) else []
    used, drawn = np.zeros(len(labels), dtype=int), set()

    def find(a_rows: np.ndarray, b_rows: np.ndarray, most: float) -> tuple[int, int] | None:
        """The least used new pair of two lists of rows whose images were shown at most so often, together."""
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
        turns, pairs = rng.random(len(rows_of)), []  # an identity waits by the number of its pairs; ties at random
        for most in (0, math.inf):  # images that were not shown yet, as long as there are any
            waiting = np.where([same and len(rows) < 2 for rows in rows_of], np.inf, turns)
            while len(pairs) < count // 2 and np.isfinite(waiting).any():
                i, *others = np.argsort(waiting)
                others = [i] if same else [j for j in others[:64] if np.isfinite(waiting[j])]
                found = None
                for j in others:
                    if found := find(rows_of[i], rows_of[j], most):
                        break
                if not found:
                    waiting[i] = np.inf
                    continue
                for k in {i, j}:
                    waiting[k], turns[k] = waiting[k] + 1, turns[k] + 1
                used[list(found)] += 1
                drawn.add((min(found), max(found)))
                pairs.append(found if rng.random() < 0.5 else found[::-1])
        return pairs

    genuine, impostor = draw(True), draw(False)
    half = min(len(genuine), len(impostor))
    return (np.array(genuine[:half] + impostor[:half], dtype=np.int64).reshape(-1, 2), np.arange(2 * half) < half)


def readable(split: Split, row: int) -> bool:
    """Whether the JPEG of a row can be shown."""
    try:
        split.image(row)
        return True
    except BadImage:
        return False


def draw_trials(split: Split, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`draw_pairs` of a split's images that can be read; InputError where they give no pair of each kind."""
    labels = np.array(split.labels)
    while True:
        name = int.from_bytes(hashlib.sha256(f"{split.domain}/{split.name}".encode()).digest()[:4])
        pairs, same = draw_pairs(labels, split.optional("camera"), split.optional("template"), count, (seed, name))
        bad = [row for row in np.unique(pairs) if not readable(split, int(row))]
        if not bad:
            break
        labels[bad] = -1  # a damaged image: drawn anew without it
    if not len(pairs):
        raise InputError(f"{split.folder}: no pairs of one identity and of two to show: it needs two identities, "
                         "one of them with two images (of two cameras, where it has cameras)")
    return pairs, same


def find_test_splits(places: list[Path]) -> list[Split]:
    """The splits named, or of a data root the first in-distribution test split of each domain."""
    found = []
    for place in places:
        if (place / "index.json").exists():
            found.append(Split(place))
            if found[-1].protocol is None:
                raise InputError(f"{place}: a training split; models have seen it: name a test split")
            continue
        for splits in open_root(place).values():
            found += ordered_tests(splits.values())[:1]
    if not found:
        raise InputError(f"{places[0]}: no test split: prepare one, `python -m data_prep SOURCE ... --part test`")
    names = [f"{split.domain}/{split.name}" for split in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--src: {twice[0]} is named twice: take one of them")
    return found


def write_trials(splits: list[Split], out: Path, count: int, seed: int) -> dict[str, int]:
    """Write out/index.html and out/trials.csv; returns the number of trials by split.

    The page holds the pictures, and no label: nobody who rates is told what is right.
    """
    trials, images, counts = [], {}, {}
    for split in splits:
        name = f"{split.domain}/{split.name}"
        pairs, _ = draw_trials(split, count, seed)
        counts[name] = len(pairs)
        for pair in pairs:
            keys = []
            for row in pair:
                key, data = split.jpeg(int(row))
                images[f"{name}/{key}"] = base64.b64encode(data).decode()
                keys.append(key)
            trials.append({"split": name, "left_key": keys[0], "right_key": keys[1],
                           "question": QUESTION[split.domain]})
    # half of a list is of one identity: in the order in which it was drawn it would be its own answer
    trials = [trials[i] for i in np.random.default_rng(seed).permutation(len(trials))]
    listed = [{column: trial[column] for column in RATING_COLUMNS[:3]} for trial in trials]
    name = hashlib.sha256(json.dumps([list(row.values()) for row in listed]).encode()).hexdigest()[:12]
    data = {"id": name, "trials": trials, "images": images}
    page = PAGE.read_text().replace("{{DATA}}", json.dumps(data).replace("<", "\\u003c"))
    make_folder(out, "--out")
    write_csv(out / "trials.csv", listed)
    write_atomically(out / "index.html", lambda temporary: temporary.write_text(page))
    return counts
