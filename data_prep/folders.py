"""Sources of class folders: one folder a class or person, images anywhere below it (ImageFolder layout)."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from data_prep import InputError
from data_prep.archives import Member, is_leftover, members
from data_prep.records import Skipped, as_text, draw, rank_in_group
from data_prep.shards import READABLE, Record, Source


def image_suffixes() -> frozenset[str]:
    """Lower-case file endings of the formats that are read, with their dot."""
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in READABLE)


def unwrap(src: Path) -> Path:
    """The folder of class folders: src, or what lies in it alone, folder in folder, as many sets are packed."""
    while src.is_dir():
        inside = [path for path in src.iterdir() if not is_leftover(path.name, None)]
        folders = [path for path in inside if path.is_dir()]
        if len(folders) != 1 or any(path.suffix.lower() in image_suffixes() for path in inside if path.is_file()):
            break
        if not any(path.is_dir() and not is_leftover(path.name, None) for path in folders[0].iterdir()):
            break
        src = folders[0]
        print(f"  class folders are those of {src}")
    return src


def scan(src: Path, skipped: Skipped) -> Iterator[tuple[str, Member]]:
    """All images below src as (class folder, file), sorted; files left out go to `skipped`."""
    endings, files, start = image_suffixes(), members(unwrap(src), skipped), 0
    if not src.is_dir():  # an archive may wrap more than `members` unwraps
        files = list(files)
        names = [member.name for member in files if PurePosixPath(member.name).suffix.lower() in endings]
        while len({name[start:].partition("/")[0] for name in names}) == 1 and any(
                name.count("/", start) > 1 for name in names):
            start = names[0].index("/", start) + 1
    for member in files:
        top, slash, _ = member.name[start:].partition("/")
        if PurePosixPath(member.name).suffix.lower() not in endings:
            skipped.add(member.name, "not an image by its name")
        elif not slash:
            skipped.add(member.name, "not in a class folder")
        else:
            yield top, member


def strangers(names: list[str], share: float, seed: int) -> np.ndarray:
    """Which identities are not enrolled, bool [C]: so many of all, each by its name and the seed alone."""
    return np.array([draw(seed, f"open set\0{name}") < share for name in names], dtype=bool)


def deal_roles(labels: np.ndarray, names: list[str], open_set: float = 0.0, seed: int = 0) -> np.ndarray:
    """Roles of a search: an identity's first image is the gallery, later ones probes, a lone one a distractor.

    All images of the strangers are probes.

    Args:
        labels: of the images that could be read, in source order, int64 [M].
        names: of the identities.
        open_set: share of strangers among them.
        seed: of their choice.
    """
    several = np.bincount(labels, minlength=len(names)) > 1
    roles = np.where(rank_in_group(labels) > 0, 0, np.where(several[labels], 1, 2))
    return np.where(strangers(names, open_set, seed)[labels], 0, roles)


def read_names(path: Path | None) -> dict[str, str]:
    """`folder<TAB>name` lines: the names that people and prompts use for class folders."""
    if path is None:
        return {}
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"--names {path}: cannot be read ({error})") from error
    names = {}
    for number, line in enumerate(lines, 1):
        folder, tab, name = line.partition("\t")
        if line.strip() and not tab:
            raise InputError(f"--names {path}, line {number}: want folder<TAB>name, found {line[:60]!r}")
        if tab:
            names[as_text(folder.strip())] = name.strip()
    return names


def folder(src: Path, domain: str, train: bool, names: Path | None = None, reference: str | None = None,
           ood: bool = False, open_set: float | None = None, seed: int = 0) -> Source:
    """Class folders of any image set.

    A test split is scored as classification (objects; class means and neighbours come from the split `reference` of
    the same domain; `ood` marks a split as out of distribution) or as identification (faces and bodies: of the images
    that can be read, a person's first is the gallery, the others are probes; people with a single one are distractors;
    with `open_set`, that share of the people has no image in the gallery, and all of theirs are probes).
    """
    if (ood or reference) and (train or domain != "object"):
        raise InputError("--reference and --ood say how a test split of objects is scored: leave them out here")
    if open_set and (train or domain == "object"):
        raise InputError("--open-set says which people of a test split are not enrolled: leave it out here")
    skipped = Skipped()
    records = (Record(member.read, member.name, name) for name, member in scan(src, skipped))
    if train or domain == "object":
        protocol = None if train else {"name": "classification", "reference": reference or "train", "ood": ood}
        return Source(records, protocol, skipped=skipped, names=read_names(names))
    protocol = {"name": "identification"} | ({"open_set": open_set, "seed": seed} if open_set else {})
    return Source(records, protocol, skipped=skipped, names=read_names(names),
                  deal=partial(deal_roles, open_set=open_set or 0.0, seed=seed))
