

import glob
import io
import json
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from data_prep import InputError
from data_prep.format import Record, Skipped, Source
from data_prep.sources.archives import members
from data_prep.sources.folders import image_suffixes
from data_prep.sources.imagenet import imagenet_classes, split_of, tar_samples
from data_prep.sources.parquet import class_of, one_line

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
