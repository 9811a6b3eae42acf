"""Sources of class folders: one folder per class or person, with images at any depth (ImageFolder layout)."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

import click
import numpy as np

from data_prep import InputError, Number
from data_prep.format import Record, Skipped, Source, image_suffixes
from data_prep.records import Records, draw, rank_in_group, read_map
from data_prep.sources.archives import Member, is_leftover, members


class Only(click.Option):
    """An option for some splits only: `only` is "training splits", "test splits of people" or the like."""

    def __init__(self, *names, only: str, **settings) -> None:
        super().__init__(*names, **settings)
        self.only = only


def check_scope(source: str, only: str, domain: str, train: bool, options: dict) -> None:
    """InputError if the source, or a given option of it, is not for splits of this part and domain; see `Only`."""
    scopes = {option.opts[0]: option.only for option in click.get_current_context().command.params
              if isinstance(option, Only) and options[option.name]}
    split = f"{'training' if train else 'test'} splits of {'objects' if domain == 'object' else 'people'}"
    for name, scope in ({source: only} | scopes).items():
        if not set(scope.split()) <= set(split.split()):
            raise InputError(f"{name} is for {scope}, not for {split}: leave it out, or choose another --out or --part")


REFERENCE = click.option("--reference", cls=Only, only="test splits of objects", metavar="SPLIT",
                         help="Objects: split whose class means and nearest neighbours classify a test split "
                              "(default: train).")
OOD = click.option("--ood", cls=Only, only="test splits of objects", is_flag=True,
                   help="Objects: mark a test split as out of distribution, so that its retention is scored.")
OPEN_SET = click.option("--open-set", cls=Only, only="test splits of people", metavar="SHARE",
                        type=Number(0, 1, min_open=True, max_open=True),
                        help="People: share of a test split's identities, chosen by name and --seed, without gallery "
                             "images; their images are probes without a mate, as TPIR@FPIR needs.")


def is_image(member: Member, skipped: Skipped) -> bool:
    """Whether a file is an image by its extension; if not, records it in `skipped`."""
    image = PurePosixPath(member.name).suffix.lower() in image_suffixes()
    if not image:
        skipped.add(member.name, "not an image by its name")
    return image


def unwrap(src: Path) -> Path:
    """The folder of the class folders: src, or the innermost of nested single folders, as many sets have them."""
    while src.is_dir():
        inside = [path for path in src.iterdir() if not is_leftover(path.name, None)]
        folders = [path for path in inside if path.is_dir()]
        if len(folders) != 1 or any(path.suffix.lower() in image_suffixes() for path in inside if path.is_file()):
            break
        if not any(path.is_dir() and not is_leftover(path.name, None) for path in folders[0].iterdir()):
            break
        src = folders[0]
    return src


def scan(src: Path, skipped: Skipped) -> Iterator[tuple[str, Member]]:
    """All images below src as (class folder, file), sorted; records other files in `skipped`."""
    if (inner := unwrap(src)) != src:
        print(f"  using the class folders in {inner}")
    images, start = (member for member in members(inner, skipped) if is_image(member, skipped)), 0
    if not src.is_dir():  # `members` unwraps only one level of an archive
        images = list(images)
        while len({member.name[start:].partition("/")[0] for member in images}) == 1 and any(
                member.name.count("/", start) > 1 for member in images):
            start = images[0].name.index("/", start) + 1
    for member in images:
        top, slash, _ = member.name[start:].partition("/")
        if slash:
            yield top, member
        else:
            skipped.add(member.name, "not in a class folder")


SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


def check_classes(records: Records, src: Path) -> None:
    """InputError if the class folders look like parts of a data set (train, val), or like several data sets.

    They look like data sets if, in a sample, nearly all images lie in subfolders, every class has several of these, and
    there are few classes, or fewer than subfolders per class (people may have one folder per video).
    """
    names, first = records.identities, records[0]
    where = f"{unwrap(src)}{f'/{first.name}'.partition(f'/{first.identity}/')[0]}"
    parts = sorted(name for name in names if name.lower() in SPLIT_NAMES)
    if len(parts) > 1 or len(parts) == len(names) == 1:  # a single `train` among others may be a class
        raise InputError(f"--src {src}: its classes would be {', '.join(parts)}, which are parts of a data set: "
                         f"prepare each with its own --out, first --src {where}/{parts[0]}")
    inner = defaultdict(Counter)  # class -> folder below it -> images
    for i in np.unique(np.linspace(0, len(records) - 1, min(len(records), 4096), dtype=int)):
        record = records[i]
        inner[record.identity][f"/{record.name}".partition(f"/{record.identity}/")[2].rpartition("/")[0]] += 1
    several = all(5 * images.pop("", 0) <= images.total() and len(images) > 1 for images in inner.values())
    count = sum(map(len, inner.values()))
    if len(inner) < 2 or not several:
        return
    text = f"{len(inner):,} folders, {', '.join(list(inner)[:3])}{', ...' * (len(inner) > 3)}, hold {count:,} folders"
    if len(inner) > 10 and count < len(inner) ** 2:
        print(f"  note: {text} of images: they are taken as {len(inner):,} classes")
        return
    raise InputError(f"--src {src}: {text} of images, like several data sets: prepare each with its own --out, "
                     f"first --src {where}/{first.identity} (`merge` merges them); if these {len(inner):,} are the "
                     "classes, name them in --list FILE")


def strangers(names: list[str], share: float, seed: int) -> np.ndarray:
    """Which identities are not enrolled, bool [C]: about this share, each by its name and the seed alone."""
    return np.array([draw(seed, f"open set\0{name}") < share for name in names], dtype=bool)


def deal_roles(labels: np.ndarray, names: list[str], open_set: float = 0.0, seed: int = 0) -> np.ndarray:
    """Roles for identification: an identity's first image is gallery, later ones are probes, a single one a distractor.

    `labels`: of the readable images in source order, int64 [M]; `names`: of the identities; `open_set`: share of them,
    drawn with `seed`, that is not enrolled: all of their images are probes.
    """
    several = np.bincount(labels, minlength=len(names)) > 1
    roles = np.where(rank_in_group(labels) > 0, 0, np.where(several[labels], 1, 2))
    return np.where(strangers(names, open_set, seed)[labels], 0, roles)


def labelled(records: Iterable[Record], domain: str, train: bool, skipped: Skipped, names: dict[str, str],
             reference: str | None = None, ood: bool = False, **protocol) -> Source:
    """A source of labelled images: for training, or scored as classification (objects) or identification (people).

    `records` may be an iterator that fills `skipped` and `names`.
    """
    if train:
        return Source(records, skipped=skipped, names=names)
    if domain == "object":
        classification = {"name": "classification", "reference": reference or "train", "ood": ood, **protocol}
        return Source(records, classification, skipped=skipped, names=names)
    return Source(records, {"name": "identification"}, skipped=skipped, names=names, deal=deal_roles)


@click.option("--names", type=click.Path(path_type=Path), help="File of folder<TAB>name lines: names for prompts.")
@REFERENCE
@OOD
@OPEN_SET
def folder(src: Path, domain: str, train: bool, names: Path | None = None, reference: str | None = None,
           ood: bool = False, open_set: float | None = None, seed: int = 0) -> Source:
    """Class folders: `<class or person>/**/image`.

    A test split of objects is scored as classification, by class means and neighbours from the split `--reference` of
    its domain; `--ood` marks it as out of distribution. One of faces or bodies is scored as identification: a person's
    first readable image is the gallery, the others are probes; people with one image are distractors; `--open-set`:
    a share of the people is not enrolled, and all of their images are probes.
    """
    skipped = Skipped()
    records = (Record(member.read, member.name, name) for name, member in scan(src, skipped))
    source = labelled(records, domain, train, skipped, read_map(names, "--names") if names else {}, reference, ood)
    if open_set:
        source = replace(source, protocol=source.protocol | {"open_set": open_set, "seed": seed},
                         deal=partial(deal_roles, open_set=open_set, seed=seed))
    return source
