"""Source of Hugging Face parquet files: images and labels as columns."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

import click

from data_prep import InputError
from data_prep.format import BadImage, Record, Skipped, Source, as_text
from data_prep.records import reading
from data_prep.sources.archives import members, read_file
from data_prep.sources.folders import OOD, REFERENCE, labelled
from data_prep.sources.imagenet import imagenet_classes, imagenet_wnids

WNIDS = click.option("--wnids", is_flag=True,
                     help="Labels are ImageNet class numbers 0..999: convert them to wnids.")
RUN = 128  # rows that stay together in a training split: reading a single row costs reading its row group


def class_of(label: object, wnids: bool, where: str) -> str | None:
    """The identity of a label: words unchanged, numbers zero-padded, so that they sort; None: no label."""
    if isinstance(label, str) and label.strip():
        return label.strip()
    if isinstance(label, float) and label.is_integer():  # as in a table with missing labels
        label = int(label)
    if not isinstance(label, int) or label < 0:
        return None
    if not wnids:
        return f"{label:07d}"
    if label >= len(imagenet_wnids()):
        raise InputError(f"{where}: label {label}: want an ImageNet class number 0..999 with --wnids")
    return imagenet_wnids()[label]


@lru_cache(maxsize=1)
def row_group(path: str, column: str, group: int):
    """The images of one row group of a parquet file, an Arrow column; a worker caches only the last one."""
    from pyarrow.parquet import ParquetFile

    # without Arrow's threads: its pools do not survive the fork into a worker
    with ParquetFile(path, pre_buffer=False) as file:
        return file.read_row_group(group, columns=[column], use_threads=False).column(0)


def parquet_image(path: str, column: str, group: int, row: int, src: str) -> bytes:
    """The encoded image in one row, or in the file that the row names, relative to the parquet file or to src."""
    try:
        image = row_group(path, column, group)[row].as_py()
    except Exception as error:  # as in parquet_labels
        raise BadImage("unreadable parquet rows") from error
    if not isinstance(image, dict):
        image = {"path" if isinstance(image, str) else "bytes": image}
    if image.get("bytes"):
        return image["bytes"]
    if not (name := image.get("path")):
        raise BadImage("no image in its row")
    if name.startswith("/") or ".." in name.split("/"):
        raise BadImage("its row names a file outside the source")
    folders = (os.path.dirname(path), src)
    file = next((file for folder in folders if os.path.isfile(file := os.path.join(folder, name))), None)
    if file is None:
        raise BadImage("its row names a missing file")
    return read_file(file)


@click.option("--files", metavar="PATTERN",
              help="File names to read (default: *train*; for a test split *val*, else *test*).")
@click.option("--image-column", metavar="NAME", default="image", help="Column of the images.")
@click.option("--label-column", metavar="NAME", default="label", help="Column of the labels.")
@WNIDS
@OOD
@REFERENCE
def parquet(src: Path, domain: str, train: bool, files: str | None, image_column: str, label_column: str, wnids: bool,
            reference: str | None, ood: bool) -> Source:
    """Hugging Face parquet: files like `data/train-00000-of-00294.parquet` with images and labels as columns.

    --src is their folder or one file. An image is a struct with `bytes` or `path`, or one of the two; a label is a
    number (negative: none) or a word. Names of numbered classes are read from the schema's metadata of the `datasets`
    library. A training split is shuffled by runs of 128 rows, because row groups are read as a whole. Expected:
    imagenet-1k (--wnids) 1,281,167 and 50,000 images.
    """
    names, skipped, blocks = {}, Skipped(), []
    if src.is_file() and src.suffix == ".parquet":
        src, chosen = src.parent, {src.name: str(src)}
    elif src.is_dir():
        chosen = choose_files(src, [files] if files else ["*train*"] if train else ["*val*", "*test*"], skipped)
    else:
        raise InputError(f"--src {src}: want a .parquet file or a folder of them (archives are not read)")

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

    source = labelled(records(), domain, train, skipped, imagenet_classes() if wnids else names, reference, ood)
    return replace(source, blocks=blocks)


def choose_files(src: Path, patterns: list[str], skipped: Skipped) -> dict[str, str]:
    """The parquet files below src that match the first pattern with a match: name -> path."""
    listed = {file.name: file.path for file in members(src, skipped) if file.name.endswith(".parquet")}
    for pattern in patterns:
        if chosen := {name: path for name, path in listed.items() if PurePosixPath(name).match(pattern)}:
            return chosen
    existing = ", ".join(list(listed)[:3]) + ", ..." * (len(listed) > 3) or "none at all"
    raise InputError(f"--src {src}: no parquet file like {' or '.join(patterns)}; there are {existing}; "
                     "--files PATTERN selects")


def parquet_labels(path: Path, image: str, label: str, names: dict[str, str]) -> Iterator[list]:
    """Yield the labels of every row group; adds the names of numbered classes to `names`."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    with reading(f"{path}: not a readable parquet file"), ParquetFile(path, pre_buffer=False) as file:
        schema = file.schema_arrow
        types = {field.name: field.type for field in schema}
        for option, column in (("image", image), ("label", label)):
            if column not in types:
                raise InputError(f"{path}: no column {column!r}; it has {', '.join(types)[:200]}; "
                                 f"--{option}-column selects another")
        kind = types[image]
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_string(kind)
                or (pa.types.is_struct(kind) and {"bytes", "path"} & {field.name for field in kind})):
            raise InputError(f"{path}: column {image!r} is {str(kind)[:60]}; want bytes or a struct with bytes or path")
        names |= class_names(schema.metadata, label)
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=[label], use_threads=False).column(0).to_pylist()


def class_names(metadata: dict[bytes, bytes] | None, column: str) -> dict[str, str]:
    """Identity -> name of the numbered classes of a column, from the metadata of the `datasets` library, if any."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
        return {class_of(i, False, ""): as_text(str(name)) for i, name in enumerate(names)}
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
