"""Merging training splits of a domain: one label space and an index over their shards.

A merged split holds no images: its shard table names the shards of its neighbours, `../<split>/shard-000000.tar`, so
that the data root can be moved as a whole, but its parts cannot be renamed. The field "merged" lists the parts.
"""

import hashlib
import json
import os
import shutil
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_prep import InputError, lock_folder, progress, write_json
from data_prep.format import FORMAT, VERSION, Split

NUMBERED = ("camera", "clothes", "template", "media")  # columns whose numbers are only valid within their split


def person_of(split: Split) -> list[str | None]:
    """For every class, the identity across domains that its source proves, or None."""
    labels, first = np.unique(split.labels, return_index=True)
    people: list[str | None] = [None] * len(split.classes)
    rows = [(label, row) for label, row in zip(labels.tolist(), first.tolist(), strict=True) if label >= 0]
    for label, row in progress(rows, desc=f"people of {split.name}", unit="class"):
        person = split.fields(row).get("person")
        people[label] = person if isinstance(person, str) else None
    return people


def join_classes(splits: list[Split], same_names: bool) -> tuple[list[str], list[str], list[np.ndarray]]:
    """One label space over the classes of several splits.

    Two classes become one if their sources prove the same person or, with `same_names`, if their names are equal. A
    class keeps its name if it is unique; otherwise the name of its split precedes it.

    Returns:
        Class names, sorted; names for prompts; and for every split the new label of each of its classes, int64 [C].
    """
    groups: dict[tuple, list[tuple[int, int]]] = defaultdict(list)  # key of a joint class -> its (split, label)
    for s, split in enumerate(splits):
        for label, (name, person) in enumerate(zip(split.classes, person_of(split), strict=True)):
            key = ("person", person) if person else ("name", name) if same_names else (s, label)
            groups[key].append((s, label))

    def own_name(key: tuple, members: list[tuple[int, int]]) -> str:
        names = {splits[s].classes[label] for s, label in members}
        return names.pop() if len(names) == 1 else key[1]

    names = {key: own_name(key, members) for key, members in groups.items()}
    several = {name for name, n in Counter(names.values()).items() if n > 1}
    names = {key: f"{splits[groups[key][0][0]].name}/{name}" if name in several else name
             for key, name in names.items()}
    order = sorted(groups, key=names.__getitem__)
    classes = [names[key] for key in order]
    if repeated := [a for a, b in pairwise(classes) if a == b]:
        raise InputError(f"two classes would be called {repeated[0]!r}: rename a split or a class")
    prompts, labels = [], [np.zeros(len(split.classes), dtype=np.int64) for split in splits]
    for new, key in enumerate(order):
        s, label = groups[key][0]
        # keep a readable name; if there is only the class name, use the new one
        prompts.append(splits[s].names[label] if splits[s].names[label] != splits[s].classes[label] else classes[new])
        for s, label in groups[key]:
            labels[s][label] = new
    return classes, prompts, labels


def check_parts(folder: Path, parts: list[Path], same_names: bool) -> list[Split]:
    """The opened splits to merge; InputError if they cannot be merged."""
    parts = [Path(os.path.abspath(part)) for part in parts]
    if len(set(parts)) < 2 or len(set(parts)) < len(parts):
        raise InputError("want at least two different splits")
    splits = [Split(part) for part in parts]
    for part, split in zip(parts, splits, strict=True):
        where = f"{split.domain}/{split.name}"
        if part.parent != folder.parent or part == folder or split.name != part.name:
            raise InputError(f"{part}: --out {folder} and its parts must lie side by side in folders of their names")
        if "merged" in split.index:
            raise InputError(f"{where} is merged itself: name its parts, "
                             + ", ".join(entry["split"] for entry in split.index["merged"]))
        if split.protocol is not None:
            raise InputError(f"{where} is a test split, scored by its own protocol: only training splits are merged")
        if split.domain != splits[0].domain:
            raise InputError(f"{where} and {splits[0].domain}/{splits[0].name} are of two domains")
        if split.size != splits[0].size:
            raise InputError(f"{where} has {split.size} pixels, {splits[0].name} {splits[0].size}: prepare them alike")
    if same_names and splits[0].domain != "object":
        raise InputError("--same-names is for objects: equal names of people from two sources prove nothing")
    return splits


def merged(folder: Path, splits: list[Split], same_names: bool) -> tuple[dict, dict[str, np.ndarray]]:
    """Index and columns of the merged split, determined by its parts."""
    classes, names, labels = join_classes(splits, same_names)
    columns: dict[str, np.ndarray] = {}
    shards = np.array([len(split.index["shards"]) for split in splits])
    columns["shard"] = np.concatenate([split.shard + first for split, first in
                                       zip(splits, np.cumsum(shards) - shards, strict=True)])
    columns["offset"] = np.concatenate([split.offset for split in splits])
    columns["length"] = np.concatenate([split.length for split in splits])
    columns["label"] = np.concatenate([np.append(new, -1)[split.labels]  # label -1 takes the last entry and stays -1
                                       for split, new in zip(splits, labels, strict=True)])
    for name in sorted(set().union(*(split.index["columns"] for split in splits)) - set(columns)):
        if name == "hash" and not all(split.hashed for split in splits):
            continue
        values, first = [], 0
        for split in splits:
            column = np.asarray(split.optional(name))
            values.append(np.where(column >= 0, column + first, column) if name in NUMBERED else column)
            first = max(first, int(values[-1].max(initial=-1)) + 1) if name in NUMBERED else 0
        columns[name] = np.concatenate(values)

    def agreed(key: str):
        values = {json.dumps(split.index[key]) for split in splits}
        return splits[0].index[key] if len(values) == 1 else "mixed"

    data_sets = [name for split in splits for name in split.index["provenance"]["data_set"]]
    parts = [{"split": split.name, "samples": len(split), "shards": len(split.index["shards"]),
              "plan": split.index["provenance"]["plan"]} for split in splits]
    plan = hashlib.sha256(json.dumps([FORMAT, VERSION, parts, same_names]).encode()).hexdigest()
    index = {
        "format": FORMAT, "domain": splits[0].domain, "split": folder.name, "size": splits[0].size,
        "fit": agreed("fit"), "quality": agreed("quality"), "samples": sum(len(split) for split in splits),
        "classes": classes, "names": names,
        "shards": [shard | {"file": f"../{split.name}/{shard['file']}"} for split in splits
                   for shard in split.index["shards"]],
        "columns": sorted(columns), "protocol": None, "skipped": {}, "merged": parts,
        "provenance": {"source": "merge", "data_set": list(dict.fromkeys(data_sets)),
                       "options": {"same_names": str(same_names)}, "version": VERSION, "seed": None, "order": "parts",
                       "plan": plan},
    }
    return index, columns


def merge_splits(folder: Path, parts: list[Path], same_names: bool) -> list[Split]:
    """Write a merged split of the split folders beside it, replacing an older merged one; returns the parts.

    `same_names`: of objects, merges classes with equal names. InputError if the parts cannot be merged, or the folder
    holds something else.
    """
    folder = Path(os.path.abspath(folder))  # links stay: the domain may be a link to another disk
    splits = check_parts(folder, parts, same_names)
    # an older merged split, maybe an unfinished one, has an index but no shards
    older = (folder / "index").is_dir() and not any(folder.glob("*.tar")) and not (folder / ".parts").exists()
    if folder.exists() and any(folder.iterdir()) and not older:
        raise InputError(f"{folder} already holds something else: remove it or choose another --out")
    index, columns = merged(folder, splits, same_names)
    with lock_folder(folder, "--out"):
        (folder / "index.json").unlink(missing_ok=True)  # first: without it the folder is no split
        shutil.rmtree(folder / "index", ignore_errors=True)
        (folder / "index").mkdir(parents=True)
        for name, values in columns.items():
            np.save(folder / "index" / f"{name}.npy", values)
        write_json(folder / "index.json", index, 1)
    return splits
