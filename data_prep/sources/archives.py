"""The files of a source by their relative names: in a folder, or in a zip or plain tar that is read in place.

Nothing is extracted, and no name from an archive becomes a path on disk: a member is a range of the archive's bytes. An
archive with a hostile or damaged structure is refused as a whole; a single oversized or damaged file is skipped.
"""

import os
import re
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from data_prep import InputError
from data_prep.format import BadImage, Skipped, as_text
from data_prep.records import reading

MAX_BYTES = 1 << 29  # of one file: more than any image or list needs, far less than a worker's memory
MAX_RATIO, RATIO_FROM = 200, 1 << 24  # larger zip members that compress better than this are bombs; images never do
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a source."""

    name: str  # relative to the source, parts separated by /
    read: Callable[[], bytes]  # returns its bytes, or raises BadImage; picklable: called in a worker process

    @property
    def path(self) -> str:
        """Path on disk of a file in a folder; its spelling may differ from `name`, see `as_text`."""
        return self.read.args[0]


def absent() -> bytes:
    """`Member.read` of a listed image that the source lacks."""
    raise BadImage("listed, but not in the source")


# what systems leave beside images, in addition to hidden files and folders (._*, .DS_Store, .ipynb_checkpoints)
LEFTOVERS = {"__MACOSX", "@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN"}


def members(src: Path, skipped: Skipped | None = None) -> Iterator[Member]:
    """Every file below src, sorted by name, except hidden files and LEFTOVERS, which `skipped` records.

    `src` is a folder, a zip or a plain tar; SET.zip/inner/folder is a folder inside. If an archive holds only one
    folder, with folders in it, as most do, names are relative to that folder. Memory holds the names of one folder at a
    time, but all names and offsets of an archive. InputError if there is no such source, or its archive is refused.
    """
    if src.is_dir():
        return walk(str(src), skipped=skipped)
    archive = next((path for path in (src, *src.parents) if path.is_file()), None)
    if archive is None:
        raise InputError(f"--src {src}: no such folder or archive")
    read, listed = list_archive(archive)
    place, numbers, width = {}, array("q"), 0
    for name, where in listed:
        width = len(where)
        if not is_leftover(name, skipped):
            place[name] = len(numbers)  # the last one counts: appending to an archive leaves older versions
            numbers.extend(where)
    inner, tops = src.relative_to(archive).as_posix(), {name.partition("/")[0] for name in place}
    prefix = f"{tops.pop()}/" if len(tops) == 1 and any(name.count("/") > 1 for name in place) else ""
    if inner != ".":
        prefix = next((start for start in (f"{inner}/", f"{prefix}{inner}/")
                       if any(name.startswith(start) for name in place)), None)
    if prefix is None:
        raise InputError(f"--src {src}: {archive} contains no folder {inner!r}")
    return (Member(name[len(prefix):], partial(read, str(archive), *numbers[place[name] : place[name] + width]))
            for name in sorted(place) if name.startswith(prefix))


def is_leftover(name: str, skipped: Skipped | None) -> bool:
    """Whether a file does not belong to the data set, by the names on its path; if so, records it in `skipped`."""
    leftover = any(part.startswith(".") or part in LEFTOVERS for part in name.split("/"))
    if leftover and skipped is not None and Path(name).name != ".lock":  # `lock_folder` makes it if --out lies in --src
        skipped.add(name, "hidden, or left by the system")
    return leftover


def walk(folder: str, prefix: str = "", skipped: Skipped | None = None, above: frozenset = frozenset()
         ) -> Iterator[Member]:
    """The files below a folder, sorted by name; enters linked folders, unless a link leads to one of its parents.

    `above`: the parent folders, as (device, inode).
    """
    status = os.stat(folder)
    with os.scandir(folder) as entries:
        # sort folders by the names of their files, which continue with /
        names = sorted(entry.name + "/" * entry.is_dir() for entry in entries)
    if (status.st_dev, status.st_ino) in above:
        if skipped is not None:
            skipped.add(prefix[:-1], "circular link")
        return
    for name in names:
        path = os.path.join(folder, name)
        if name.endswith("/"):
            yield from walk(path[:-1], prefix + name, skipped, above | {(status.st_dev, status.st_ino)})
        elif is_leftover(prefix + name, skipped):
            continue
        elif os.path.isfile(path):
            yield Member(as_text(prefix + name), partial(read_file, path))
        elif skipped is not None:
            skipped.add(prefix + name, "dead link" if os.path.islink(path) else "not a regular file")


# ---------------------------------------------------------------- reading, in worker processes


def read_file(path: str | Path) -> bytes:
    """The bytes of a file, which is closed again."""
    with open(path, "rb") as file:
        check_size(os.fstat(file.fileno()).st_size)
        return file.read()


def read_part(url: str, offset: int, size: int) -> bytes:
    """A piece of a tar, on disk or behind a URL."""
    check_size(size)
    # no BadImage, which would be skipped: the network or the disk has failed
    with reading(f"{url}: cannot be read", "; the same command later continues"):
        if "://" in url:
            import fsspec

            system, path = fsspec.core.url_to_fs(url)
            data = system.cat_file(path, start=offset, end=offset + size)
        else:
            with open(url, "rb") as file:
                file.seek(offset)
                data = file.read(size)
        if len(data) != size:
            raise OSError(f"{len(data)} of {size} bytes")
    return data


def inflate(path: Path | str, offset: int, packed: int, size: int, crc: int, method: int) -> bytes:
    """A zip member, located by its local header; never inflates to more bytes than the zip's directory declares."""
    check_size(max(packed, size))
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            head = file.read(30)
            file.seek(sum(struct.unpack("<HH", head[26:])), os.SEEK_CUR)  # skip the name and the extra field
            data = file.read(packed)
        if method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except (struct.error, zlib.error):
        head = b""
    if not head.startswith(b"PK\3\4") or len(data) != size or zlib.crc32(data) != crc:
        raise BadImage("damaged in its archive")
    return data


def check_size(length: int) -> None:
    """BadImage if a file is too large for every worker to hold one."""
    if length > MAX_BYTES:
        raise BadImage(f"larger than {MAX_BYTES >> 20} MiB")


# ---------------------------------------------------------------- listing


def list_archive(path: Path) -> tuple[Callable[..., bytes], Iterator[tuple[str, tuple[int, ...]]]]:
    """Of a zip or plain tar: a function read(path, *numbers) -> bytes; name and numbers of every regular file."""
    with open(path, "rb") as file:
        head = file.read(512)
    for magic, kind in COMPRESSED.items():
        if head.startswith(magic):
            raise InputError(f"--src {path}: compressed with {kind}: decompress it to a plain .tar first")
    return (inflate, list_zip(path)) if head[:4] in (b"PK\3\4", b"PK\5\6") else (read_part, list_tar(path))


def safe_name(where: str, raw: str, *refusals: tuple[bool, str]) -> str:
    """The normalised name of a member; InputError if that points out of the archive, or one of the refusals applies."""
    name = raw.replace("\\", "/")  # as some Windows tools write it
    parts = name.split("/")
    out = name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in parts or not name.strip("./")
    for applies, why in (*refusals, (out, "points out of the archive")):
        if applies:
            raise InputError(f"{where}: member {raw[:200]!r} {why}: refused; get a clean copy")
    return as_text("/".join(part for part in parts if part not in ("", ".")))


def list_zip(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The files of a zip, stored or deflated."""
    with reading(f"--src {path}: damaged zip", "; get a clean copy"), zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    end, total = 0, path.stat().st_size
    for info in sorted(infos, key=lambda info: info.header_offset):
        kind = info.external_attr >> 28  # the file type of a Unix mode; 0: not recorded
        # at least: names are encoded
        before, end = end, info.header_offset + 30 + len(info.orig_filename) + info.compress_size
        if info.filename.endswith("/"):
            continue
        name = safe_name(
            f"--src {path}", info.filename, (info.flag_bits & 1, "is encrypted"), (kind == 10, "is a link"),
            (kind not in (0, 4, 8), "is a device"),
            (info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
             f"is packed with method {info.compress_type} (stored and deflated are read)"),
            (info.file_size > max(RATIO_FROM, MAX_RATIO * info.compress_size),
             f"is a decompression bomb ({info.compress_size} bytes become {info.file_size})"),
            (not 0 <= info.header_offset <= total - info.compress_size, "reaches beyond the end"),
            (info.header_offset < before, "overlaps the previous one, as in a decompression bomb"))
        yield name, (info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type)


def list_tar(path: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """The files of a plain tar on disk."""
    with open(path, "rb") as file:
        yield from walk_tar(file, f"--src {path}")


class Headers:
    """A file through which tarfile lists a tar: refuses to read headers of absurd size into memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= 1 << 24:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.file.read(size)


def walk_tar(file: BinaryIO, where: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """The files of a plain tar in their order: (name, (offset, size)).

    `file` is seekable; the caller may read from it between two names. `where`: origin of the tar, for messages.
    InputError if it is not a tar, is damaged, or has a member that must not be read.
    """
    with reading(f"{where}: not a readable zip or plain tar", ": is the download complete?"):
        total, before = file.seek(0, os.SEEK_END), -1
        file.seek(0)
        with tarfile.open(fileobj=Headers(file), mode="r:") as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # tarfile would keep all of them, 1 kB each
                if info.offset <= before:
                    raise tarfile.ReadError("its members repeat without end")
                before = info.offset
                if not 0 <= info.size <= total - info.offset_data:
                    raise tarfile.ReadError(f"{info.name[:200]!r} is cut off")
                if not info.isdir():
                    name = safe_name(where, info.name, (info.issym() or info.islnk(), "is a link"),
                                     (not info.isreg(), "is a device"), (info.issparse(), "is a sparse file"))
                    yield name, (info.offset_data, info.size)
            # tarfile takes a damaged header for the end and ignores a tar appended with `cat`
            file.seek(archive.offset)
            rest = file.read(1 << 16)
            if len(rest) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it is cut off")
            if rest.strip(b"\0"):
                raise tarfile.ReadError(f"damaged header at byte {archive.offset}, or a second tar after it")
