"""Sources of objects: ImageNet and the test sets that share its classes.

Wnids name the classes of all sets, so that a test set is scored among the classes that it has. A class number is the
place of the wnid among the sorted thousand.
"""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import click

from data_prep import InputError
from data_prep.format import BadImage, Record, Skipped, Source
from data_prep.records import read_table, reading
from data_prep.sources.archives import members, read_file
from data_prep.sources.folders import REFERENCE, Only, labelled
from data_prep.sources.lists import Files, below, match_images, place_of
from data_prep.write import as_rgb, open_image


@cache
def imagenet_classes() -> dict[str, str]:
    """The classes of ImageNet-1k in order: wnid -> readable name, also for prompts (as in open_clip)."""
    from open_clip import IMAGENET_CLASSNAMES  # imported late: both packages take seconds
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo("imagenet-1k").label_names(), IMAGENET_CLASSNAMES, strict=True))


@cache
def imagenet_wnids() -> list[str]:
    """The wnids of the classes 0..999."""
    return list(imagenet_classes())


# ---------------------------------------------------------------- ImageNet and its test sets


SOLUTION = "LOC_val_solution.csv"  # Kaggle's classes of the validation images


def read_real(path: Path) -> list[list[str]]:
    """ReaL's labels: the correct wnids of the validation images 1..50000; some have none.

    Source: Beyer et al. 2020, real.json: a list of lists of class numbers.
    """
    with reading(f"--real {path}: not ReaL's real.json"):
        table = json.loads(read_file(path))
    wnids = imagenet_wnids()
    if not isinstance(table, list) or not table:
        raise InputError(f"--real {path}: want a list with the class numbers of each validation image")
    for i, row in enumerate(table):
        if not isinstance(row, list) or not all(type(k) is int and 0 <= k < len(wnids) for k in row):
            raise InputError(f"--real {path}: entry {i}: want a list of class numbers 0..999, found {str(row)[:60]}")
    return [[wnids[k] for k in row] for row in table]


def with_fields(read: Callable[[], bytes], fields: dict) -> tuple[bytes, dict]:
    """An image and further fields for its JSON."""
    return read(), fields


@REFERENCE
@click.option("--real", cls=Only, only="test splits", type=click.Path(path_type=Path), metavar="FILE",
              help="real.json: adds the labels of ReaL to a validation split.")
def imagenet(src: Path, domain: str, train: bool, reference: str | None = None, real: Path | None = None) -> Source:
    """ImageNet-1k: `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`, or Kaggle's `ILSVRC/Data/CLS-LOC/{train,val}`.

    Kaggle's `val` is flat; `LOC_val_solution.csv` beside `ILSVRC` has its classes. Expected: 1,281,167 training and
    50,000 validation images of 1,000 classes; subsets are accepted. --real adds the labels of ReaL, of which an image
    may have several or none. Source: the image-net.org and Kaggle layouts.
    """
    part = "train" if train else "val"
    top, folder = place_of(src, "ImageNet has train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, or ILSVRC/Data/CLS-LOC",
                           f"ILSVRC/Data/CLS-LOC/{part}", part)
    wnids, skipped, columns = {}, Skipped(), ("ImageId", "PredictionString")
    solution = None if train else next((file for file in members(src) if file.name == f"{top}{SOLUTION}"), None)
    for where, row in read_table(solution.read, f"{src}/{SOLUTION}", columns) if solution else ():
        wnids[row["ImageId"]] = row["PredictionString"].partition(" ")[0]
        if not re.fullmatch(r"n\d{8}", wnids[row["ImageId"]]):
            raise InputError(f"{where}: want a wnid like n01440764 first, found {row['PredictionString'][:40]!r}")
    pattern = re.compile(rf"{folder}/(?:(?P<wnid>n\d{{8}})/)?(?P<image>[^/]+)\.\w+")
    labels = read_real(real) if real else []
    extra = {"real": hashlib.sha256(json.dumps(labels).encode()).hexdigest()[:16]} if real else {}

    def records() -> Iterator[Record]:
        files = ((file.name[len(top):], file) for file in members(src, skipped) if file.name.startswith(top))
        for m, member in match_images(files, pattern, "ImageNet", skipped, f"{folder}/"):
            wnid, read = m["wnid"] or wnids.get(m["image"]), member.read
            if not wnid:
                raise InputError(f"{src}/{member.name}: neither in a wnid folder nor in {top}{SOLUTION}")
            if real:
                number = re.fullmatch(r"ILSVRC2012_val_(\d{8})", m["image"])
                if not number or not 1 <= int(number[1]) <= len(labels):
                    raise InputError(f"--real {real}: {member.name}: want a name like ILSVRC2012_val_00000001, up to "
                                     f"{len(labels):,}, the images of the list")
                read = partial(with_fields, read, {"real": labels[int(number[1]) - 1]})
            yield Record(read, member.name, wnid)

    return labelled(records(), domain, train, skipped, imagenet_classes(), reference, **extra)


def wnid_folders(kind: str, classes: int, about: str) -> Callable[..., Source]:
    """The source, described by `about`, of a test set in wnid folders, `<wnid>/<image>`, with at most `classes`."""

    @REFERENCE
    def read(src: Path, domain: str, train: bool, reference: str | None = None) -> Source:
        files = Files(src)
        records = [Record(member.read, member.name, m[1])
                   for m, member in files.images(re.compile(r"(?:.*/)?(n\d{8})/[^/]+"), kind)]
        wnids = {record.identity for record in records}
        if unknown := sorted(wnids - set(imagenet_wnids())):
            raise InputError(f"--src {src}: {unknown[0]} is not one of the 1,000 classes of ImageNet-1k")
        if len(wnids) > classes:
            raise InputError(f"--src {src}: {len(wnids):,} classes, but {kind} has {classes:,}")
        return labelled(records, domain, train, files.skipped, imagenet_classes(), reference, ood=True)

    read.__name__, read.__doc__ = kind.lower().replace("-", "_"), about
    return read


imagenet_a = wnid_folders("ImageNet-A", 200, """ImageNet-A (natural adversarial examples): `imagenet-a/<wnid>/*.jpg`.

    Scored as out of distribution. Expected: 7,500 images of 200 classes. Source: Hendrycks et al., CVPR 2021.
    """)
imagenet_r = wnid_folders("ImageNet-R", 200, """ImageNet-R (renditions): `imagenet-r/<wnid>/*`.

    Scored as out of distribution. Expected: 30,000 images of 200 classes. Source: Hendrycks et al., ICCV 2021.
    """)
imagenet_sketch = wnid_folders("ImageNet-Sketch", 1000, """ImageNet-Sketch: `sketch/<wnid>/*`.

    Scored as out of distribution. Expected: 50,889 images of 1,000 classes. Source: Wang et al., NeurIPS 2019.
    """)


@REFERENCE
def imagenet_v2(src: Path, domain: str, train: bool, reference: str | None = None) -> Source:
    """ImageNet-V2: `imagenetv2-matched-frequency-format-val/<0..999>/*.jpeg`, or another of its variants.

    Scored as out of distribution. Expected: 10,000 images, 10 per class. Folder names are class numbers (ImageFolder
    would sort them as words: 10 would become class 2 and 100 class 3). Source: Recht et al., ICML 2019, and issues 4, 6
    and 10 of its repository.
    """
    wnids = imagenet_wnids()
    files = Files(src)
    records = [Record(member.read, member.name, wnids[int(m[1])])
               for m, member in files.images(re.compile(r"(?:.*/)?(\d{1,3})/[^/]+"), "ImageNet-V2")]
    for wnid, n in Counter(record.identity for record in records).items():
        if n != 10:
            raise InputError(f"--src {src}: {n} images in folder {wnids.index(wnid)}, ImageNet-V2 has 10 in each: give "
                             "the whole folder of one variant")
    return labelled(records, domain, train, files.skipped, imagenet_classes(), reference, ood=True)


def inside_border(read: Callable[[], bytes], border: int) -> bytes:
    """An image without its outermost pixels, as PNG."""
    image, _ = open_image(read())
    if min(image.size) <= 2 * border:
        raise BadImage("too small for its border")
    out = io.BytesIO()
    image = as_rgb(image).crop((border, border, image.width - border, image.height - border))
    image.save(out, "PNG", compress_level=0)  # decoded again at once
    return out.getvalue()


@REFERENCE
def objectnet(src: Path, domain: str, train: bool, reference: str | None = None) -> Source:
    """ObjectNet: `images/<folder>/*.png` and, in `mappings`, the four files that map its folders to ImageNet classes.

    Scored as out of distribution; the licence forbids training on it. The red border of 2 pixels is removed. A class
    may correspond to several of ImageNet: it has the name of the first, and "groups" in the protocol lists all (the
    best one counts). Expected: the 113 of 313 classes that ImageNet has, 18,574 of 50,000 images. Source: Barbu et al.,
    NeurIPS 2019; the reader of wise-ft.
    """
    files = below(src, "ObjectNet has images/<folder>/*.png and mappings/*.json", "mappings")
    folder_label = files.read_json("mappings/folder_to_objectnet_label.json")
    label_names = files.read_json("mappings/objectnet_to_imagenet_1k.json")
    number_line = files.read_json("mappings/pytorch_to_imagenet_2012_id.json")
    lines = [line for _, line in files.read_lines("mappings/imagenet_to_label_2012_v2")]
    wnids = imagenet_wnids()
    with reading(f"{src}/mappings: the four files do not match each other", ": restore them from the data set"):
        wnid_of = {lines[line]: wnids[int(number)] for number, line in number_line.items()}
        groups = {folder: sorted(wnid_of[name] for name in label_names[label].split("; "))
                  for folder, label in folder_label.items() if label in label_names}
    records = []
    for m, member in files.images(re.compile(r"images/([^/]+)/[^/]+"), "ObjectNet", "images/"):
        if m[1] in groups:
            records.append(Record(partial(inside_border, member.read, 2), member.name, groups[m[1]][0]))
        else:
            files.skipped.add(member.name, "class that ImageNet lacks")
    names = {group[0]: folder_label[folder] for folder, group in groups.items()}
    several = {group[0]: group for group in groups.values() if len(group) > 1}
    return labelled(records, domain, train, files.skipped, names, reference, ood=True, groups=several)
