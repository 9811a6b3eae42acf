"""What a source is made of: its files by their relative names, in a folder or, read in place, in a zip or a plain tar.

Nothing is ever extracted and no name from an archive becomes a path on disk: a member is a range of the archive's
bytes. An archive hostile or damaged in structure is refused as a whole; one oversized or damaged file is skipped.
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

MAX_BYTES = 1 << 29  # of one file: above every image and list of the field, far below a worker's memory
MAX_RATIO, RATIO_FROM = 200, 1 << 24  # larger zip members that deflate better than this are bombs; images never do
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a source."""

    name: str  # relative to the source, with /
    read: Callable[[], bytes]  # its bytes; picklable: it runs in a worker process; BadImage where it cannot be used

    @property
    def path(self) -> str:
        """Where it lies, of a folder's file; its name may be spelled otherwise, see `as_text`."""
        return self.read.args[0]


def absent() -> bytes:
    """Stands for the bytes of an image that a list names."""
    raise BadImage("listed, but not in the source")


# what people's machines leave beside images, besides hidden files and folders (._*, .DS_Store, .ipynb_checkpoints)
LEFTOVERS = {"__MACOSX", "@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN"}


def members(src: Path, skipped: Skipped | None = None) -> Iterator[Member]:
    """Every file below src, sorted by name; not what machines leave beside images (hidden ones, LEFTOVERS).

    Of a folder only the names of one folder after the other are in memory, of an archive all names and offsets.
    InputError where there is no such source, or an archive that must not or cannot be read.

    Args:
        src: a folder, a zip or a plain tar; SET.zip/inner/folder is a folder inside. Where an archive wraps everything
            in one folder of folders, as most are packed, names count from below that folder.
        skipped: where leftovers, dead links and links in a circle are to be named.
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
            place[name] = len(numbers)  # an archive that was appended to holds older versions first
            numbers.extend(where)
    inner, tops = src.relative_to(archive).as_posix(), {name.partition("/")[0] for name in place}
    prefix = f"{tops.pop()}/" if len(tops) == 1 and any(name.count("/") > 1 for name in place) else ""
    if inner != ".":
        prefix = next((start for start in (f"{inner}/", f"{prefix}{inner}/")
                       if any(name.startswith(start) for name in place)), None)
    if prefix is None:
        raise InputError(f"--src {src}: {archive} has no folder {inner!r} inside")
    return (Member(name[len(prefix):], partial(read, str(archive), *numbers[place[name] : place[name] + width]))
            for name in sorted(place) if name.startswith(prefix))


def is_leftover(name: str, skipped: Skipped | None) -> bool:
    """Whether a file is none of the data set's, by the names on its path; it goes to `skipped`."""
    leftover = any(part.startswith(".") or part in LEFTOVERS for part in name.split("/"))
    if leftover and skipped is not None and Path(name).name != ".lock":  # of `lock_folder`, where --out lies in --src
        skipped.add(name, "hidden, or left by the system")
    return leftover


def walk(folder: str, prefix: str = "", skipped: Skipped | None = None, above: frozenset = frozenset()
         ) -> Iterator[Member]:
    """The files below a folder, sorted by name; linked folders are entered, but for those that they lie in.

    `above`: the folders on the way here, by device and inode.
    """
    try:
        here = os.stat(folder)
        with os.scandir(folder) as entries:
            # a folder sorts as its files' names do, which go on with /
            found = sorted(entry.name + "/" * entry.is_dir() for entry in entries)
    except OSError as error:
        raise InputError(f"--src {folder}: cannot be read ({error.strerror})") from error
    if (here.st_dev, here.st_ino) in above:
        if skipped is not None:
            skipped.add(prefix[:-1], "link in a circle")
        return
    for name in found:
        path = os.path.join(folder, name)
        if name.endswith("/"):
            yield from walk(path[:-1], prefix + name, skipped, above | {(here.st_dev, here.st_ino)})
        elif is_leftover(prefix + name, skipped):
            continue
        elif os.path.isfile(path):
            yield Member(as_text(prefix + name), partial(read_file, path))
        elif skipped is not None:
            skipped.add(prefix + name, "dead link" if os.path.islink(path) else "not a regular file")


def safe_name(where: str, raw: str) -> str:
    """A member's name with / between its parts; InputError where it points out of the archive or at nothing."""
    name = raw.replace("\\", "/")  # some Windows tools pack it so
    parts = name.split("/")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in parts or not name.strip("./"):
        raise InputError(f"{where}: member {raw[:200]!r} points out of the archive: refused; get a clean copy")
    return as_text("/".join(part for part in parts if part not in ("", ".")))


def one_line(error: Exception) -> str:
    """What a library says is wrong, short enough for a message."""
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---------------------------------------------------------------- reading, in worker processes


def read_file(path: str | Path) -> bytes:
    """A whole file; closed again, so that workers hold none."""
    with open(path, "rb") as file:
        check_size(os.fstat(file.fileno()).st_size)
        return file.read()


def read_part(url: str, offset: int, size: int) -> bytes:
    """A piece of a tar, on disk or behind a URL."""
    check_size(size)
    try:
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
    except Exception as error:  # every file system behind fsspec raises its own
        # not a damaged image that may be left out: the network or the disk is gone
        raise InputError(f"{url}: cannot be read ({one_line(error)}); the same command goes on later") from error
    return data


def inflate(path: Path | str, offset: int, packed: int, size: int, crc: int, method: int) -> bytes:
    """A zip member by its local header; never produces more bytes than the directory of the zip announced."""
    check_size(max(packed, size))
    with open(path, "rb") as file:
        file.seek(offset)
        head = file.read(30)
        if len(head) < 30 or not head.startswith(b"PK\3\4"):
            raise BadImage("damaged in its archive")
        file.seek(sum(struct.unpack("<HH", head[26:])), os.SEEK_CUR)  # over the name and the extra field
        data = file.read(packed)
    if method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        except zlib.error as error:
            raise BadImage("damaged in its archive") from error
    if len(data) != size or zlib.crc32(data) != crc:
        raise BadImage("damaged in its archive")
    return data


def check_size(length: int) -> None:
    """BadImage where a file is too large to be held in memory by every worker."""
    if length > MAX_BYTES:
        raise BadImage(f"larger than {MAX_BYTES >> 20} MiB")


# ---------------------------------------------------------------- listing


def list_archive(path: Path) -> tuple[Callable[..., bytes], Iterator[tuple[str, tuple[int, ...]]]]:
    """How a zip or a plain tar is read, told apart by content, and what it holds.

    Returns:
        A function read(path, *numbers), and the name and the numbers of every regular file.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise InputError(f"--src {path}: cannot be read ({error.strerror})") from error
    for magic, kind in COMPRESSED.items():
        if head.startswith(magic):
            raise InputError(f"--src {path}: compressed with {kind}, in which single images cannot be reached without "
                             "decompressing all before them: decompress it to a plain .tar first")
    return (inflate, list_zip(path)) if head[:4] in (b"PK\3\4", b"PK\5\6") else (read_part, list_tar(path))


def list_zip(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The files of a zip, stored or deflated."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except Exception as error:  # zipfile raises BadZipFile, ValueError, struct.error, UnicodeError, ... by damage
        raise InputError(f"--src {path}: damaged zip ({error}); get a clean copy") from error
    end, total = 0, path.stat().st_size
    for info in sorted(infos, key=lambda info: info.header_offset):
        kind = info.external_attr >> 28  # the file type of a Unix mode; 0 where the packer noted none
        why = None
        if info.flag_bits & 1:
            why = "is encrypted"
        elif kind not in (0, 4, 8):
            why = "is a link" if kind == 10 else "is a device"
        elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            why = f"is packed with method {info.compress_type} (stored and deflated are read)"
        elif info.file_size > max(RATIO_FROM, MAX_RATIO * info.compress_size):
            why = f"is a decompression bomb ({info.compress_size} bytes become {info.file_size})"
        elif not 0 <= info.header_offset <= total - info.compress_size:
            why = "reaches beyond the end"
        elif info.header_offset < end:
            why = "overlaps the one before it, as in a decompression bomb"
        if why:
            raise InputError(f"--src {path}: member {info.filename!r} {why}: refused")
        end = info.header_offset + 30 + len(info.orig_filename) + info.compress_size  # at least: names are encoded
        if not info.filename.endswith("/"):
            numbers = info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type
            yield safe_name(f"--src {path}", info.filename), numbers


def list_tar(path: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """The files of a plain tar on disk."""
    with open(path, "rb") as file:
        yield from walk_tar(file, f"--src {path}")


class Headers:
    """What tarfile reads of a tar that is only listed: its headers, which must not be larger than memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= 1 << 24:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.file.read(size)


def walk_tar(file: BinaryIO, where: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """The files of a plain tar, from front to back: name, and offset and size.

    InputError where it is none, a damaged one, or one with a member that must not be read. `file`: seekable; whoever
    takes the names may read from it in between; `where` it lies, for messages.
    """
    try:
        total, before = file.seek(0, os.SEEK_END), -1
        file.seek(0)
        with tarfile.open(fileobj=Headers(file), mode="r:") as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # tarfile would keep them all, a kilobyte each
                if info.offset <= before:
                    raise tarfile.ReadError("its members run in a circle")
                before = info.offset
                if not 0 <= info.size <= total - info.offset_data:
                    raise tarfile.ReadError(f"{info.name[:200]!r} is cut off")
                if why := refusal(info):
                    raise InputError(f"{where}: member {info.name[:200]!r} {why}: refused")
                if info.isreg():
                    yield safe_name(where, info.name), (info.offset_data, info.size)
            # tarfile takes a damaged header for the end, and what was appended with `cat` does not exist for it
            file.seek(archive.offset)
            rest = file.read(1 << 16)
            if len(rest) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it is cut off")
            if rest.strip(b"\0"):
                raise tarfile.ReadError(f"damaged header at byte {archive.offset}, or a second tar behind it")
    except InputError:
        raise
    except Exception as error:  # tarfile raises TarError, ValueError, IndexError, RecursionError, ... by damage
        raise InputError(f"{where}: neither a zip nor a plain tar that can be read ({one_line(error)}): is the "
                         "download complete?") from error


def refusal(info: tarfile.TarInfo) -> str | None:
    """Why a member of a tar must not be read; None where it may."""
    if info.issym() or info.islnk():
        return "is a link"
    if not (info.isdir() or info.isreg()):
        return "is a device"
    return "is a sparse file" if info.issparse() else None
