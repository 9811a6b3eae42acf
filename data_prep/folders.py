"""Sources of class folders: one folder a class or person, images anywhere below it (ImageFolder layout)."""

from collections import Counter
from functools import partial
from pathlib import Path

from PIL import Image

from data_prep import InputError
from data_prep.shards import Record, Source


def image_suffixes() -> frozenset[str]:
    """Lower-case file endings that Pillow can read, with their dot."""
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def scan(src: Path) -> tuple[list[tuple[str, Path]], Counter]:
    """All images below src as (class folder, path), sorted, and the files left out by reason."""
    if not src.is_dir():
        raise InputError(f"--src {src}: no such folder")
    images, skipped, endings = [], Counter(), image_suffixes()
    for path in sorted(p for p in src.rglob("*") if p.is_file()):
        place = path.relative_to(src)
        if path.suffix.lower() not in endings:
            skipped["not an image by its name"] += 1
        elif len(place.parts) == 1:
            skipped["not in a class folder"] += 1
        else:
            images.append((place.parts[0], path))
    return images, skipped


def read_names(path: Path | None) -> dict[str, str]:
    """`folder<TAB>name` lines: the names that people and prompts use for class folders."""
    if path is None:
        return {}
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InputError(f"--names {path}: cannot be read ({error.strerror})") from error
    names = {}
    for number, line in enumerate(lines, 1):
        folder, tab, name = line.partition("\t")
        if line.strip() and not tab:
            raise InputError(f"--names {path}, line {number}: want folder<TAB>name, found {line[:60]!r}")
        if tab:
            names[folder] = name.strip()
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
    images, skipped = scan(src)
    count, seen = Counter(name for name, _ in images), Counter()
    records = []
    for name, path in images:
        role = None
        if not train and domain != "object":
            role = 0 if seen[name] else 1 if count[name] > 1 else 2
        seen[name] += 1
        records.append(Record(partial(Path.read_bytes, path), str(path.relative_to(src)), name, role=role))
    protocol = None
    if not train:
        classification = {"name": "classification", "reference": reference or "train", "ood": ood}
        protocol = classification if domain == "object" else {"name": "identification"}
    return Source(records, protocol, skipped=skipped, names=read_names(names))
