"""Sources of objects: ImageNet, the test sets that share its classes, Hugging Face parquet, WebDataset tars.

An ImageNet class is its wnid, whatever a set calls it, so a test set of some of the classes is scored among those. Its
number, where a set uses numbers, is the rank of the wnid among the sorted thousand.
"""

import glob
import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache, lru_cache, partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from data_prep import InputError
from data_prep.archives import members
from data_prep.archives import read_range as read_file
from data_prep.folders import deal_roles, image_suffixes
from data_prep.lists import below, images_of, match_images, place_of, read_json, read_lines, read_table
from data_prep.records import Skipped, as_text
from data_prep.shards import BadImage, Record, Source, as_rgb, open_image

LARGEST_LABELS = 2**24  # bytes of a list of labels; ReaL's has 630,000


@cache
def imagenet_classes() -> dict[str, str]:
    """The thousand classes of ImageNet-1k in their order: wnid -> name for people and prompts (open_clip's choice)."""
    from open_clip import IMAGENET_CLASSNAMES  # here, because both packages take seconds to import
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo("imagenet-1k").label_names(), IMAGENET_CLASSNAMES, strict=True))


@cache
def imagenet_wnids() -> list[str]:
    """The wnids of the classes 0..999."""
    return list(imagenet_classes())


def split_of(records: Iterable[Record], domain: str, train: bool, skipped: Skipped, names: dict[str, str],
             reference: str | None = None, ood: bool = False, **protocol) -> Source:
    """Labelled images as a split: for training, or scored as classification (objects) or identification (people).

    `records` may be an iterator that fills `skipped` and `names` as it goes.
    """
    if (ood or reference) and (train or domain != "object"):
        raise InputError("--reference and --ood say how a test split of objects is scored: leave them out here")
    if train:
        return Source(records, None, skipped=skipped, names=names)
    if domain == "object":
        classification = {"name": "classification", "reference": reference or "train", "ood": ood, **protocol}
        return Source(records, classification, skipped=skipped, names=names)
    return Source(records, {"name": "identification"}, skipped=skipped, names=names, deal=deal_roles)


# ---------------------------------------------------------------- ImageNet and its test sets


def need_objects(domain: str, train: bool = False) -> None:
    """InputError where a set of objects is to be written as people, or a test set as a training split."""
    if domain != "object":
        raise InputError(f"these are objects, not {domain}: write them to DATA/object/<split>")
    if train:
        raise InputError("this is a test set, not to be trained on: write it to another <split>, or add --part test")


KAGGLE_LISTS = ("LOC_val_solution.csv", "LOC_synset_mapping.txt")


def read_real(path: Path) -> list[list[str]]:
    """ReaL's labels: the wnids that are right for the validation images 1..50000, of some none.

    Source: Beyer et al. 2020, real.json: a list of lists of class numbers.
    """
    try:
        if path.stat().st_size > LARGEST_LABELS:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        table = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--real {path}: not ReaL's real.json ({error})") from error
    wnids = imagenet_wnids()
    if not isinstance(table, list) or not table:
        raise InputError(f"--real {path}: want a list with the class numbers of each validation image")
    for i, row in enumerate(table):
        if not isinstance(row, list) or not all(type(k) is int and 0 <= k < len(wnids) for k in row):
            raise InputError(f"--real {path}: entry {i}: want a list of class numbers 0..999, found {str(row)[:60]}")
    return [[wnids[k] for k in row] for row in table]


def with_real(read: Callable[[], bytes], wnids: list[str]) -> tuple[bytes, dict]:
    """An image and, for its JSON, the classes that ReaL finds in it."""
    return read(), {"real": wnids}


def imagenet(src: Path, domain: str, train: bool, reference: str | None = None, real: Path | None = None) -> Source:
    """ImageNet-1k: `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`, or Kaggle's `ILSVRC/Data/CLS-LOC/{train,val}`.

    Kaggle's `val` is flat; its classes stand in `LOC_val_solution.csv` beside `ILSVRC`. 1,281,167 training and 50,000
    validation images of 1,000 classes; any subset of them is taken as it is. --real adds the labels of ReaL, of which
    an image may have several, or none. Source: the image-net.org and Kaggle layouts.
    """
    need_objects(domain)
    if real and train:
        raise InputError("--real: these are labels of the validation images: leave it out of a training split")
    part = "train" if train else "val"
    top, folder = place_of(src, "ImageNet has train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, or ILSVRC/Data/CLS-LOC",
                           f"ILSVRC/Data/CLS-LOC/{part}", part)
    lists = {file.name[len(top):]: file for file in members(src) if file.name in (f"{top}{n}" for n in KAGGLE_LISTS)}
    solution, mapping = (name if name in lists else None for name in KAGGLE_LISTS)
    wnids, names, skipped = {}, {}, Skipped()
    columns = ("ImageId", "PredictionString")
    for where, row in read_table(src, lists, solution, columns) if solution and not train else ():
        wnids[row["ImageId"]] = row["PredictionString"].partition(" ")[0]
        if not re.fullmatch(r"n\d{8}", wnids[row["ImageId"]]):
            raise InputError(f"{where}: want a wnid like n01440764 first, found {row['PredictionString'][:40]!r}")
    for _, line in read_lines(src, lists, mapping) if mapping else ():
        wnid, _, names[wnid] = line.partition(" ")
    pattern = re.compile(rf"{folder}/(?:(?P<wnid>n\d{{8}})/)?(?P<image>[^/]+)\.\w+")
    extra, labels = {}, read_real(real) if real else []
    if real:
        extra = {"real": hashlib.sha256(json.dumps(labels).encode()).hexdigest()[:16]}

    def records() -> Iterator[Record]:
        files = ((file.name[len(top):], file) for file in members(src, skipped) if file.name.startswith(top))
        for m, member in match_images(files, pattern, "ImageNet", skipped, (f"{folder}/",)):
            wnid, read = m["wnid"] or wnids.get(m["image"]), member.read
            if not wnid and solution:
                raise InputError(f"{src}/{member.name}: neither in a wnid folder nor in {solution}")
            if not wnid:
                raise InputError(f"--src {src}: images of {part} are not in wnid folders; put {KAGGLE_LISTS[0]} beside "
                                 f"{folder.partition('/')[0]}, which says their classes")
            if real:
                number = re.fullmatch(r"ILSVRC2012_val_(\d{8})", m["image"])
                if not number or not 1 <= int(number[1]) <= len(labels):
                    raise InputError(f"--real {real}: {member.name}: not named like ILSVRC2012_val_00000001, up to the "
                                     f"{len(labels):,} images of the list")
                read = partial(with_real, read, labels[int(number[1]) - 1])
            yield Record(read, member.name, wnid)

    return split_of(records(), domain, train, skipped, names | imagenet_classes(), reference, **extra)


def known(wnid: str, src: Path) -> str:
    """The wnid, if it is one of the thousand."""
    if wnid not in imagenet_classes():
        raise InputError(f"--src {src}: {wnid} is not one of the 1,000 classes of ImageNet-1k")
    return wnid


def wnid_folders(src: Path, domain: str, train: bool, reference: str | None, kind: str, classes: int) -> Source:
    """A test set in wnid folders, `<wnid>/<image>`, of at most so many classes."""
    need_objects(domain, train)
    files = {file.name: file for file in members(src)}
    found, skipped = images_of(files, re.compile(r"(?:.*/)?(n\d{8})/[^/]+"), kind)
    records = [Record(member.read, member.name, known(m[1], src)) for m, member in found]
    if (n := len({record.identity for record in records})) > classes:
        raise InputError(f"--src {src}: {n:,} classes, but {kind} has {classes:,}")
    return split_of(records, domain, train, skipped, imagenet_classes(), reference, ood=True)


def imagenet_a(src: Path, domain: str, train: bool, reference: str | None = None) -> Source:
    """ImageNet-A (natural adversarial examples): `imagenet-a/<wnid>/*.jpg`.

    7,500 images of 200 classes; out of distribution. Source: Hendrycks et al., CVPR 2021.
    """
    return wnid_folders(src, domain, train, reference, "ImageNet-A", 200)


def imagenet_r(src: Path, domain: str, train: bool, reference: str | None = None) -> Source:
    """ImageNet-R (renditions): `imagenet-r/<wnid>/*`.

    30,000 images of 200 classes; out of distribution. Source: Hendrycks et al., ICCV 2021.
    """
    return wnid_folders(src, domain, train, reference, "ImageNet-R", 200)


def imagenet_sketch(src: Path, domain: str, train: bool, reference: str | None = None) -> Source:
    """ImageNet-Sketch: `sketch/<wnid>/*`.

    About 50,000 images (50,889) of 1,000 classes; out of distribution. Source: Wang et al., NeurIPS 2019.
    """
    return wnid_folders(src, domain, train, reference, "ImageNet-Sketch", 1000)


def imagenet_v2(src: Path, domain: str, train: bool, reference: str | None = None) -> Source:
    """ImageNet-V2: `imagenetv2-matched-frequency-format-val/<0..999>/*.jpeg`, or another of its variants.

    10,000 images, 10 of each class; out of distribution. The folder's name is the number of the class (sorted as words,
    as ImageFolder does, 10 would become class 2 and 100 class 3). Source: Recht et al., ICML 2019, and issues 4, 6 and
    10 of its repository.
    """
    need_objects(domain, train)
    files, wnids = {file.name: file for file in members(src)}, imagenet_wnids()
    found, skipped = images_of(files, re.compile(r"(?:.*/)?(\d{1,3})/[^/]+"), "ImageNet-V2")
    records = [Record(member.read, member.name, wnids[int(m[1])]) for m, member in found]
    for wnid, n in Counter(record.identity for record in records).items():
        if n != 10:
            raise InputError(f"--src {src}: {n} images in folder {wnids.index(wnid)}, ImageNet-V2 has 10 in each: give "
                             "the folder of one variant, whole")
    return split_of(records, domain, train, skipped, imagenet_classes(), reference, ood=True)


def inside_border(read: Callable[[], bytes], border: int) -> bytes:
    """An image without its outermost pixels, as PNG."""
    image, _ = open_image(read())
    if min(image.size) <= 2 * border:
        raise BadImage("nothing inside its border")
    out = io.BytesIO()
    image = as_rgb(image).crop((border, border, image.width - border, image.height - border))
    image.save(out, "PNG", compress_level=0)  # decoded again at once
    return out.getvalue()


def objectnet(src: Path, domain: str, train: bool, reference: str | None = None) -> Source:
    """ObjectNet: `images/<folder>/*.png` and, in `mappings`, the four files that lead from its folders to ImageNet.

    The 113 of its 313 classes that ImageNet has, 18,574 of 50,000 images; out of distribution; its licence forbids
    training on it. The red border of 2 pixels is cut off. A class may stand for several of ImageNet's: it is named by
    the first, and "groups" in the protocol lists them all (the best of them counts). Source: Barbu et al., NeurIPS
    2019; the reader of wise-ft.
    """
    need_objects(domain, train)
    files = below(src, "ObjectNet has images/<folder>/*.png and mappings/*.json", "mappings")
    folder_label = read_json(src, files, "mappings/folder_to_objectnet_label.json")
    label_names = read_json(src, files, "mappings/objectnet_to_imagenet_1k.json")
    number_line = read_json(src, files, "mappings/pytorch_to_imagenet_2012_id.json")
    lines = [line for _, line in read_lines(src, files, "mappings/imagenet_to_label_2012_v2")]
    wnids = imagenet_wnids()
    try:
        wnid_of = {lines[line]: wnids[int(number)] for number, line in number_line.items()}
        groups = {folder: sorted(wnid_of[name] for name in label_names[label].split("; "))
                  for folder, label in folder_label.items() if label in label_names}
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{src}/mappings: the four files do not fit together ({error}): restore them from the data "
                         "set") from error
    found, skipped = images_of(files, re.compile(r"images/([^/]+)/[^/]+"), "ObjectNet", ("images/",))
    for m, member in found:
        if m[1] not in groups:
            skipped.add(member.name, "class that ImageNet lacks")
    records = [Record(partial(inside_border, member.read, 2), member.name, groups[m[1]][0])
               for m, member in found if m[1] in groups]
    names = {group[0]: folder_label[folder] for folder, group in groups.items()}
    several = {group[0]: group for group in groups.values() if len(group) > 1}
    return split_of(records, domain, train, skipped, names, reference, ood=True, groups=several)


def class_of(label: object, wnids: bool, where: str) -> str | None:
    """The identity that a label field means: words as they are, numbers padded so that they sort; None: no label."""
    if isinstance(label, str) and label.strip():
        return label.strip()
    if isinstance(label, float) and label.is_integer():  # of a table whose labels have gaps
        label = int(label)
    if not isinstance(label, int) or label < 0:
        return None
    if not wnids:
        return f"{label:07d}"
    if label >= len(imagenet_wnids()):
        raise InputError(f"{where}: label {label}, but --wnids wants 0..999, the numbers of ImageNet's classes")
    return imagenet_wnids()[label]


# ---------------------------------------------------------------- Hugging Face parquet

RUN = 128  # rows that stay together in a training split: read singly, each would cost the reading of its row group


def one_line(error: Exception) -> str:
    """What a library says is wrong, short enough for a message."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@lru_cache(maxsize=1)
def row_group(path: str, column: str, group: int):
    """The images of one row group of a parquet file, an Arrow column: all that a worker holds of the file."""
    from pyarrow.parquet import ParquetFile

    # no threads of Arrow's own: its pools do not survive the fork into a worker
    with ParquetFile(path, pre_buffer=False) as file:
        return file.read_row_group(group, columns=[column], use_threads=False).column(0)


def parquet_image(path: str, column: str, group: int, row: int, src: str) -> bytes:
    """The encoded image of one row, or of the file that it names, beside the parquet file or below src."""
    try:
        image = row_group(path, column, group)[row].as_py()
    except Exception as error:  # as in parquet_labels
        raise BadImage("unreadable parquet rows") from error
    data, name = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    name = data if isinstance(data, str) else name
    if data and data is not name:
        return data
    if not name:
        raise BadImage("no image in its row")
    if name.startswith("/") or ".." in name.split("/"):
        raise BadImage("its row names a file outside the source")
    folders = (os.path.dirname(path), src)
    there = next((file for folder in folders if os.path.isfile(file := os.path.join(folder, name))), None)
    if there is None:
        raise BadImage("its row names a file that is not there")
    return read_file(there)


def parquet(src: Path, domain: str, train: bool, files: str | None = None, image_column: str = "image",
            label_column: str = "label", wnids: bool = False, reference: str | None = None,
            ood: bool = False) -> Source:
    """Hugging Face parquet: files like `data/train-00000-of-00294.parquet` with images and labels as columns.

    --src is their folder, or one file. An image is a struct with `bytes` or `path`, or one of the two; a label is a
    number (below 0: none) or a word. The names of numbered classes come from the schema's metadata, where the
    `datasets` library puts them. Row groups are read one at a time, and a training split is shuffled by runs of 128
    rows. imagenet-1k: 1,281,167 and 50,000 images (--wnids).
    """
    if src.is_file() and src.suffix == ".parquet":
        src, chosen = src.parent, {src.name: str(src)}
    elif src.is_dir():
        chosen = choose_files(src, [files] if files else ["*train*"] if train else ["*val*", "*test*"])
    else:
        raise InputError(f"--src {src}: want a .parquet file or the folder that holds them (they are not read in "
                         "archives)")
    names, skipped, blocks = {}, Skipped(), []

    def records() -> Iterator[Record]:
        count = 0
        for name, path in chosen.items():
            for group, values in enumerate(parquet_labels(Path(path), image_column, label_column, names)):
                first = count
                for row, label in enumerate(values):
                    where = f"{name}, row group {group}, row {row}"
                    identity = class_of(label, wnids, f"{src}/{where}")
                    if identity is None:
                        skipped.add(where, "no label")
                    else:
                        read = partial(parquet_image, path, image_column, group, row, str(src))
                        yield Record(read, where, identity)
                        count += 1
                blocks.extend(range(first, count, RUN))

    source = split_of(records(), domain, train, skipped, imagenet_classes() if wnids else names, reference, ood)
    return replace(source, blocks=blocks)


def choose_files(src: Path, patterns: list[str]) -> dict[str, str]:
    """The parquet files below src whose names fit the first pattern that any fits: name -> path."""
    listed = {file.name: file.path for file in members(src) if file.name.endswith(".parquet")}
    for pattern in patterns:
        if chosen := {name: path for name, path in listed.items() if fnmatch(PurePosixPath(name).name, pattern)}:
            return chosen
    first = ", ".join(list(listed)[:3]) + ", ..." * (len(listed) > 3)
    there = f"there are {first}" if listed else "there are none at all"
    raise InputError(f"--src {src}: no parquet file like {' or '.join(patterns)}; {there}; --files PATTERN chooses")


def parquet_labels(path: Path, image: str, label: str, names: dict[str, str]) -> Iterator[list]:
    """For every row group the labels; names of numbered classes go to `names`."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path, pre_buffer=False) as file:
            schema = file.schema_arrow
            types = {field.name: field.type for field in schema}
            for option, column in (("image", image), ("label", label)):
                if column not in types:
                    raise InputError(f"{path}: no column {column!r}; it has {', '.join(types)[:200]}; "
                                     f"--{option}-column names another")
            kind = types[image]
            if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_string(kind)
                    or (pa.types.is_struct(kind) and {"bytes", "path"} & {field.name for field in kind})):
                raise InputError(f"{path}: column {image!r} is {str(kind)[:60]}; want bytes, or a struct with bytes or "
                                 "path")
            names |= class_names(schema.metadata, label)
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=[label], use_threads=False).column(0).to_pylist()
    except InputError:
        raise
    except Exception as error:  # Arrow raises its own errors and Python's alike
        raise InputError(f"{path}: not a readable parquet file ({one_line(error)})") from error


def class_names(metadata: dict[bytes, bytes] | None, column: str) -> dict[str, str]:
    """Identity -> name of the numbered classes of a column, from the metadata of the `datasets` library, if any."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
        return {class_of(i, False, ""): as_text(str(name)) for i, name in enumerate(names)}
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}


# ---------------------------------------------------------------- WebDataset tars

MOST_TARS = 100_000
LARGEST_IMAGE, LARGEST_FIELD = 2**28, 2**20  # bytes


def expand(pattern: str) -> list[str]:
    """Replace braces: a-{00..02}.tar is a-00.tar, a-01.tar, a-02.tar; {x,y}.tar is x.tar, y.tar."""
    brace = re.search(r"\{(\d{1,9})\.\.(\d{1,9})\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not brace:
        return [pattern]
    if brace[3] is not None:
        values = iter(brace[3].split(","))
    elif int(brace[1]) <= int(brace[2]):
        values = (f"{i:0{len(brace[1])}d}" for i in range(int(brace[1]), int(brace[2]) + 1))
    else:
        raise InputError(f"--src {pattern[:80]}: {brace[0]} counts backwards")
    found: list[str] = []
    for value in values:
        found += expand(pattern[: brace.start()] + value + pattern[brace.end() :])
        if len(found) > MOST_TARS:
            raise InputError(f"--src {pattern[:80]}: more than {MOST_TARS:,} files")
    return found


def open_tar(url: str) -> BinaryIO:
    """A tar on disk or behind a URL, seekable."""
    import fsspec

    try:
        # fsspec would take brackets and stars in the path of a file for a pattern
        file = fsspec.open(url, "rb").open() if "://" in url else open(url, "rb")  # noqa: SIM115
        if not file.seekable():
            raise OSError("it cannot be read in parts: download it first")
        return file
    except Exception as error:  # every file system behind fsspec raises its own
        raise InputError(f"{url}: cannot be opened ({one_line(error)})") from error


def read_at(file: BinaryIO, where: str, offset: int, size: int) -> bytes:
    """A piece of an open file; fewer bytes where it ends."""
    try:
        file.seek(offset)
        return file.read(size)
    except Exception as error:  # as above
        raise InputError(f"{where}: cannot be read ({one_line(error)})") from error


def list_tars(src: str) -> list[str]:
    """The tars that --src means: those of a folder, or of a path or URL with braces, * and ?."""
    if "://" in src:
        found = expand(src)
    elif Path(src).is_dir():
        found = [file.path for file in members(Path(src)) if file.name.endswith(".tar")]
    else:  # what is there under its very name is no pattern, whatever signs it holds
        top = next(path for path in (Path(src), *Path(src).parents) if path.exists())
        found = [str(top / name) for pattern in expand(str(Path(src).relative_to(top)))
                 for name in (sorted(glob.glob(pattern, root_dir=top)) if glob.has_magic(pattern) else [pattern])]
    if not found:
        raise InputError(f"--src {src}: no tar there; give a folder, a tar, a pattern like 'a-{{000..146}}.tar' or "
                         "a URL")
    return found


def tar_files(file: BinaryIO, where: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every file of a plain tar, from front to back.

    Headers are walked here, because tarfile ends quietly at a damaged one and follows whatever sizes it is told.

    Raises:
        InputError: no plain tar, damaged, or a member that is a link or a device, or whose name leaves the archive.
    """
    offset, end, long_name = 0, file.seek(0, io.SEEK_END), None
    while offset < end:
        block = read_at(file, where, offset, tarfile.BLOCKSIZE)
        if not block.strip(b"\0"):
            return  # the end mark
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except tarfile.TruncatedHeaderError as error:
            raise InputError(f"{where}: is cut off at byte {end}: download the tar again") from error
        except (tarfile.HeaderError, ValueError) as error:
            raise InputError(f"{where}: not a plain tar, or damaged, at byte {offset} (unpack compressed ones "
                             "first)") from error
        start, name = offset + tarfile.BLOCKSIZE, long_name or info.name
        offset = start + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if info.size < 0 or start + info.size > end:
            raise InputError(f"{where}: {name[:80]!r} is cut off: download the tar again")
        if info.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME) and info.size <= LARGEST_FIELD:
            data = read_at(file, where, start, info.size)
            path = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", data) if info.type == tarfile.XHDTYPE else None
            text = path[1] if path else data.rstrip(b"\0") if info.type == tarfile.GNUTYPE_LONGNAME else b""
            long_name = text.decode("utf-8", "replace") or long_name
            continue
        long_name = None if info.type != tarfile.XGLTYPE else long_name
        if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            if name.startswith("/") or ".." in name.split("/"):
                raise InputError(f"{where}: member {name[:80]!r} leaves the archive: refused")
            yield name.removeprefix("./"), start, info.size
        elif info.type not in (tarfile.DIRTYPE, tarfile.XGLTYPE):
            raise InputError(f"{where}: member {name[:80]!r} is a link, a device or of another kind that no data set "
                             "needs: refused")


def read_range(url: str, offset: int, size: int) -> bytes:
    """A piece of a file on disk or behind a URL."""
    import fsspec

    try:
        if "://" in url:
            system, path = fsspec.core.url_to_fs(url)
            data = system.cat_file(path, start=offset, end=offset + size)
        else:
            with open(url, "rb") as file:
                data = read_at(file, url, offset, size)
        if len(data) != size:
            raise OSError(f"{len(data)} of {size} bytes")
    except Exception as error:  # as in open_tar
        # not a damaged image that may be left out: the network or the disk is gone
        raise InputError(f"{url}: cannot be read ({one_line(error)}); the same command goes on later") from error
    return data


def webdataset(src: str, domain: str, train: bool, label_key: str = "label", wnids: bool = False,
               reference: str | None = None, ood: bool = False) -> Source:
    """WebDataset tars: `<key>.jpg` (or .png, .webp, ...) with `<key>.cls`, or with `<key>.json` that holds the label.

    --src is a folder of tars, one tar, a pattern like `train-{000..146}.tar` or `train-*.tar`, or a URL that fsspec
    opens (read twice: once for the labels, then image by image). A label is a number (below 0: none) or a word. Source:
    the format of the webdataset library.
    """
    urls, skipped, endings = list_tars(src), Skipped(), image_suffixes()

    def records() -> Iterator[Record]:
        for url in urls:
            with open_tar(url) as file:
                for key, fields in tar_samples(tar_files(file, url), endings, skipped):
                    image = next((field for field in fields if f".{field}" in endings), None)
                    if image is None:
                        skipped.add(f"{url}: {key}", "sample without an image")
                        continue
                    label = field_label(file, url, fields, label_key)
                    if (identity := class_of(label, wnids, f"{url}: {key}")) is None:
                        skipped.add(f"{url}: {key}", "no label")
                    elif fields[image][1] > LARGEST_IMAGE:
                        skipped.add(f"{url}: {key}", f"larger than {LARGEST_IMAGE >> 20} MiB")
                    else:
                        yield Record(partial(read_range, url, *fields[image]), f"{url}: {key}", identity)

    names = imagenet_classes() if wnids else {}
    return split_of(records(), domain, train, skipped, names, reference, ood)


def tar_samples(files: Iterable[tuple[str, int, int]], endings: frozenset[str], skipped: Skipped
                ) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Key and fields (ending -> offset, size) of every sample: neighbours in the tar whose names agree to a dot.

    By the format that is the first dot of the name, so that `7.seg.png` is a field of `7.jpg`. But names with dots of
    their own, such as `img.v1.7.jpg` and `img.v1.7.cls`, are samples, too, and where a field comes again the next
    sample of the same key begins.
    """
    def visible() -> Iterator[tuple[PurePosixPath, tuple[int, int]]]:
        for name, *place in files:
            if (path := PurePosixPath(name)).name.startswith("."):  # such as the ._7.jpg that macOS puts beside 7.jpg
                skipped.add(name, "hidden file")
            else:
                yield path, tuple(place)

    def has_image(again: list[dict]) -> bool:
        return any(f".{ending}" in endings for fields in again for ending in fields)

    for (folder, _), parts in groupby(visible(), lambda part: (part[0].parent, part[0].name.partition(".")[0])):
        samples: dict[str, list[dict]] = {}  # by the name to its last dot
        for path, place in parts:
            again, ending = samples.setdefault(path.stem, [{}]), path.suffix[1:].lower()
            if ending in again[-1]:
                again.append({})
            again[-1][ending] = place
        for stem, again in samples.items():
            part_of = any(has_image(samples.get(stem[:n], [])) for n, sign in enumerate(stem) if sign == ".")
            for fields in again:
                if not part_of or (has_image([fields]) and {"cls", "json"} & fields.keys()):
                    yield str(folder / stem), fields


def field_label(file: BinaryIO, where: str, fields: dict[str, tuple[int, int]], key: str) -> object:
    """The label of a sample, from its .cls or its .json; None where it has none that can be read."""
    for field in ("cls", "json"):
        if field not in fields or fields[field][1] > LARGEST_FIELD:
            continue
        data = read_at(file, where, *fields[field])
        try:
            text = data.decode().strip()
            if field == "cls":
                return int(text) if re.fullmatch(r"-?\d{1,9}", text) else text
            return json.loads(text)[key]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
    return None
