"""Sources of faces: person folders with a list of pairs, as Labeled Faces in the Wild has them."""

import re
from pathlib import Path, PurePosixPath

import numpy as np

from data_prep import InputError
from data_prep.folders import scan
from data_prep.shards import Record, Source


def read_pairs(path: Path) -> list[tuple[tuple[str, int], tuple[str, int], int, int, int]]:
    """Parse pairs.txt: ((name, image), (name, image), same, fold, line number) of every pair.

    Line 1 is `folds<TAB>n` (or `n`: one fold); then every fold has n lines `name i j` (same person) and n lines
    `name1 i name2 j` (different people).
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InputError(f"--pairs {path}: cannot be read ({error.strerror})") from error
    head = lines[0].split() if lines else []
    if len(head) not in (1, 2) or not all(re.fullmatch(r"[1-9]\d*", word) for word in head):
        raise InputError(f"--pairs {path}, line 1: want `folds<TAB>pairs per half`, found {''.join(lines[:1])[:60]!r}")
    folds, half = (1, int(head[0])) if len(head) == 1 else map(int, head)
    rows = [(number, line) for number, line in enumerate(lines[1:], 2) if line.strip()]
    if len(rows) != 2 * folds * half:
        raise InputError(f"--pairs {path}: line 1 announces {folds} folds of 2 x {half} pairs, "
                         f"the file has {len(rows)}")
    pairs = []
    for place, (number, line) in enumerate(rows):
        words = line.split("\t") if "\t" in line else line.split()
        if not (len(words) in (3, 4) and words[1].isdigit() and words[-1].isdigit()):
            raise InputError(f"--pairs {path}, line {number}: want `name i j` or `name1 i name2 j`, "
                             f"found {line[:60]!r}")
        same = len(words) == 3
        left, right = (words[0], int(words[1])), (words[0] if same else words[2], int(words[-1]))
        pairs.append((left, right, int(same), place // (2 * half), number))
    return pairs


def ten_folds(pairs: int) -> list[int]:
    """The fold of each pair where a list gives none: ten consecutive parts, as scikit-learn's unshuffled KFold."""
    return np.repeat(np.arange(10), [len(part) for part in np.array_split(np.arange(pairs), 10)]).tolist()


def lfw(src: Path, domain: str, train: bool, pairs: Path | None = None) -> Source:
    """Person folders `<Name>/<Name>_0001.jpg`; a test split is verified on the pairs of an LFW-type pairs.txt."""
    images, skipped = scan(src)
    records = [Record(member.read, member.name, name) for name, member in images]
    if train:
        if pairs is not None:
            raise InputError("--pairs goes with a test split: add --part test or leave it out")
        return Source(records, skipped=skipped)
    if pairs is None:
        raise InputError("lfw: a test split needs --pairs pairs.txt; without one use the source `folder`, which is "
                         "scored as identification")
    place = {PurePosixPath(member.name).stem: i for i, (_, member) in enumerate(images)}
    listed = []
    for left, right, same, fold, line in read_pairs(pairs):
        stems = [f"{name}_{number:04d}" for name, number in (left, right)]
        for stem, (name, _) in zip(stems, (left, right), strict=True):
            if stem not in place or images[place[stem]][0] != name:
                raise InputError(f"--pairs {pairs}, line {line}: names {name}/{stem}, which is not below {src}: "
                                 "do the list and the folder belong together?")
        listed.append((place[stems[0]], place[stems[1]], same, fold))
    folds = max(fold for *_, fold in listed) + 1
    return Source(records, {"name": "verification", "folds": folds}, listed, skipped)
