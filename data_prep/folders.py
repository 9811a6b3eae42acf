"""Sources of class folders: one folder a class or person, images anywhere below it (ImageFolder layout)."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from PIL import Image

from data_prep import InputError
from data_prep.archives import Member, members
from data_prep.records import as_text
from data_prep.shards import READABLE, Record, Source


def image_suffixes() -> frozenset[str]:
    """Lower-case file endings of the formats that are read, with their dot."""
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in READABLE)


def scan(src: Path, skipped: Counter) -> Iterator[tuple[str, Member]]:
    """All images below src as (class folder, file), sorted; files left out are counted in `skipped` by reason."""
    endings = image_suffixes()
    for member in members(src):
        top, slash, _ = member.name.partition("/")
        if PurePosixPath(member.name).suffix.lower() not in endings:
            skipped["not an image by its name"] += 1
        elif not slash:
            skipped["not in a class folder"] += 1
        else:
            yield top, member


def search_roles(identities: list[str]) -> list[int]:
    """Roles of a closed-set search: a person's first image is the gallery, later ones probes, lone ones distractors."""
    count, seen, roles = Counter(identities), Counter(), []
    for identity in identities:
        roles.append(0 if seen[identity] else 1 if count[identity] > 1 else 2)
        seen[identity] += 1
    return roles


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
           ood: bool = False) -> Source:
    """Class folders of any image set.

    A test split is scored as classification (objects; class means and neighbours come from the split `reference` of
    the same domain; `ood` marks a split as out of distribution) or as closed-set identification (faces and bodies: the
    first image of a person is the gallery, the others are probes; people with a single image are distractors).
    """
    if (ood or reference) and (train or domain != "object"):
        raise InputError("--reference and --ood say how a test split of objects is scored: leave them out here")
    skipped = Counter()
    images = scan(src, skipped)
    if train or domain == "object":
        records = (Record(member.read, member.name, name) for name, member in images)
    else:
        images = list(images)
        roles = search_roles([name for name, _ in images])
        records = [Record(member.read, member.name, name, role=role)
                   for (name, member), role in zip(images, roles, strict=True)]
    protocol = None
    if not train:
        classification = {"name": "classification", "reference": reference or "train", "ood": ood}
        protocol = classification if domain == "object" else {"name": "identification"}
    return Source(records, protocol, skipped=skipped, names=read_names(names))
