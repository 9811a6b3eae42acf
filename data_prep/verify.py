"""Checking a split: read everything again and compare it with the index."""

import os
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from data_prep import InputError, hash_file, progress
from data_prep.format import OPTIONAL, ROLES, BadImage, Split, open_split
from data_prep.merge import check_parts, merged
from data_prep.records import one_line, reading
from data_prep.write import in_parallel


def verify_shard(folder: Path, number: int) -> list[str]:
    """Problems of one shard: hash, members, metadata, JPEGs."""
    split = open_split(folder)
    shard = split.index["shards"][number]
    path, problems = folder / shard["file"], []
    if hash_file(path) != shard["sha256"]:
        problems.append(f"{path}: sha256 differs from the index")
    rows = np.arange(*np.searchsorted(split.shard, (number, number + 1)))
    columns = {name: split.column(name) for name in OPTIONAL if name in split.index["columns"]}
    try:
        with tarfile.open(path, "r:") as tar:
            members = list(islice(tar, 2 * len(rows) + 1))  # a damaged tar may repeat members without end
            if len(members) != 2 * len(rows):
                return [*problems, f"{path}: its members do not match the {len(rows)} samples of the index"]
            for row, image, meta in zip(rows, members[::2], members[1::2], strict=True):
                key = image.name.removesuffix(".jpg")
                if image.name != f"{key}.jpg" or meta.name != f"{key}.json" or not key.isdigit():
                    problems.append(f"{path}: members {image.name!r}, {meta.name!r}: want <key>.jpg, <key>.json")
                    continue
                if (image.offset_data, image.size) != (split.offset[row], split.length[row]):
                    problems.append(f"{path}: {image.name} is not where the index says")
                    continue
                fields = split.fields(row)
                label = int(split.labels[row])
                expected = {"key": key, "domain": split.domain, "label": label,
                            "identity": split.classes[label] if label >= 0 else None}
                expected |= {name: column[row].item() for name, column in columns.items() if column[row] >= 0}
                if "role" not in fields:  # assigned after all images were written
                    expected.pop("role", None)
                problems += [f"{path}: {meta.name}: {name} is {fields.get(name)!r}, the index says {value!r}"
                             for name, value in expected.items() if fields.get(name) != value]
                try:
                    if not split.missing[row]:
                        split.image(row)
                except BadImage as error:
                    problems.append(f"{path}: {error}")
    except InputError as error:
        problems.append(error.message)
    except Exception as error:  # by damage: TarError, ValueError, IndexError, OverflowError, ...
        problems.append(f"{path}: not a readable tar ({one_line(error)})")
    return problems


def verify_protocol(split: Split) -> Iterator[str]:
    """Problems of the rows that a protocol names."""
    name = (split.protocol or {}).get("name")
    if name == "verification":
        pairs = split.column("pairs")
        if not len(pairs):
            yield f"{split.folder}: verification needs pairs"
        a, b = split.labels[pairs[:, :2]].T
        if wrong := ((a == b) != (pairs[:, 2] == 1)).sum():
            yield f"{split.folder}: {wrong} pairs contradict the labels"
    if name == "templates":
        yield from verify_templates(split)
    if name in ("reid", "identification"):
        for i in (0, 1):
            if not (split.optional("role") == i).any():
                yield f"{split.folder}: {name} needs samples of role {ROLES[i]}"


def verify_templates(split: Split) -> Iterator[str]:
    """Problems of the templates of a split and of the lists that name them.

    A listed template without images is not one: an evaluation counts it as a failure to enrol.
    """
    templates = split.optional("template")
    ids, first = np.unique(templates, return_index=True)
    if (split.labels != split.labels[first][np.searchsorted(ids, templates)]).any():
        yield f"{split.folder}: images of one template have several labels"
    for name in ("template_pairs", "template_gallery", "template_probes"):
        if name in split.index["columns"]:
            table = split.column(name)
            if not len(table):
                yield f"{split.folder}: {name} is empty"
            elif name == "template_pairs":
                table = table[np.isin(table[:, :2], ids).all(1)]
                a, b = split.labels[first[np.searchsorted(ids, table[:, :2])]].T
                if wrong := ((a == b) != (table[:, 2] == 1)).sum():
                    yield f"{split.folder}: {wrong} template pairs contradict the labels"
            elif not np.isin(table[:, 0], ids).any():
                yield f"{split.folder}: {name} names no template of the split"


def verify_split(folder: Path, workers: int = 1) -> list[str]:
    """Read all of a split again; returns its problems, one line each."""
    split = Split(folder)
    if "merged" in split.index:
        return verify_merged(split, workers)
    numbers = range(len(split.index["shards"]))
    problems = list(verify_protocol(split))
    counts = [shard["samples"] for shard in split.index["shards"]]
    if not np.array_equal(split.shard, np.repeat(numbers, counts)):
        problems.append(f"{folder}/index/shard.npy: rows are not in the order of the shard table")
    open_split.cache_clear()  # the folder may have changed since it was opened; workers inherit the cache
    results = in_parallel(verify_shard, ((folder, number) for number in numbers), min(workers, len(numbers)))
    for of_shard in progress(results, desc=f"verify {folder}", total=len(numbers), unit="shard"):
        problems += of_shard
    return problems


def verify_merged(split: Split, workers: int) -> list[str]:
    """Problems of a merged split: of its parts, or of its index."""
    folder = Path(os.path.abspath(split.folder))
    with reading(f"{folder}/index.json: lacks the parts that were merged", "; merge them again"):
        parts = [folder.parent / Path(part["split"]).name for part in split.index["merged"]]
        same_names = split.index["provenance"]["options"]["same_names"] == "True"
    splits = check_parts(folder, parts, same_names)  # first: a split may name itself, without end
    problems = [problem for part in parts for problem in verify_split(part, workers)]
    index, columns = merged(folder, splits, same_names)
    again = "does not follow from its parts: merge them again"
    problems += [f"{folder}/index.json: {key} {again}" for key in index if index[key] != split.index.get(key)]
    problems += [f"{folder}/index/{name}.npy: {again}" for name, values in columns.items()
                 if name not in split.index["columns"] or not np.array_equal(values, split.column(name))]
    return problems
