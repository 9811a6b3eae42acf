"""Archives as sources: the shards of their folder, read in place; bad ones are refused by name."""

import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from data_prep import InputError
from data_prep.format import Split
from data_prep.sources.archives import members
from data_prep.verify import verify_split
from tests.test_data_prep import PAIRS, class_folders, encode, files_of, lfw_folder, picture, run_here


def pack(folder: Path, path: Path, top: str = "") -> Path:
    """A folder's files as a zip or tar, by the ending of `path`, below the folder `top`."""
    files = {top + name: data for name, data in files_of(folder).items()}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("name, top, inner", [
    ("set.zip", "", ""), ("set.tar", "", ""), ("set.zip", "set-1.0/", ""), ("set.tar", "./set/", ""),
    ("set.tar", "a/b/", "/a/b"), ("set.zip", "a\\b\\", "/a/b"),
])  # fmt: skip
def test_an_archive_gives_the_same_shards_as_its_folder(name, top, inner, tmp_path):
    """Listed and read in place, by two workers; a lone top folder is entered, an inner one is reached by its path."""
    src = class_folders(tmp_path / "src")
    archive = pack(src, tmp_path / name, top)
    options = ["--size", 24, "--shard-size", 4, "--workers", 2, "--source-name", "set"]
    run_here("folder", "--src", src, "--out", tmp_path / "a/object/train", *options)
    before = files_of(tmp_path)
    run_here("folder", "--src", f"{archive}{inner}", "--out", tmp_path / "b/object/train", *options)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert {name for name in files_of(tmp_path) if not name.startswith("b/")} == set(before)  # nothing was extracted


def test_lfw_and_market_read_archives(tmp_path):
    (tmp_path / "pairs.txt").write_text(PAIRS)
    archive = pack(lfw_folder(tmp_path / "src"), tmp_path / "lfw.tar", "lfw/")
    run_here("lfw", "--src", archive, "--pairs", tmp_path / "pairs.txt", "--out", tmp_path / "d/face_hq/lfw")
    assert Split(tmp_path / "d/face_hq/lfw").column("pairs").tolist()[0] == [0, 2, 1, 0]
    with zipfile.ZipFile(tmp_path / "market.zip", "w") as file:
        for i, name in enumerate(("bounding_box_train/0002_c1s1_000451_03.jpg", "query/0003_c1s1_000001_00.jpg",
                                  "bounding_box_test/0003_c6s1_000009_00.jpg")):
            file.writestr(f"Market-1501/{name}", encode(picture(i, 16, 32)))
    run_here("market", "--src", tmp_path / "market.zip", "--out", tmp_path / "d/body/test", "--size", 32)
    split = Split(tmp_path / "d/body/test")
    assert split.classes == ["0003"] and split.column("camera").tolist() == [0, 5] and verify_split(split.folder) == []


def zip_of(path: Path, name: str = "c0/1.jpg", mode: int = stat.S_IFREG, data: bytes = b"x", **fields) -> None:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(info, data, zipfile.ZIP_DEFLATED)
    for key, value in fields.items():  # zipfile writes no encrypted members: set the bit in both headers
        content = bytearray(path.read_bytes())
        assert key == "flag"
        content[6] |= value
        content[content.index(b"PK\1\2") + 8] |= value
        path.write_bytes(content)


def overlapping_zip(path: Path) -> None:
    """Two entries of the directory that share one member, as in bombs of 42 kB."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("c0/1.jpg", b"x" * 1000)
        archive.writestr("c0/2.jpg", b"x" * 1000)
        archive.filelist[1].header_offset = 0


def endless_zip(path: Path) -> None:
    """A member of 2⁶³ bytes, as only the directory of the zip says."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("c0/1.jpg", b"x")
        archive.filelist[0].compress_size = archive.filelist[0].file_size = 1 << 63


def tar_of(path: Path, name: str = "c0/1.jpg", kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


def circular_tar(path: Path) -> None:
    """A negative size that leads back to the member's own header: endless for a trusting reader."""
    tar_of(path, size=-512)


def cut(path: Path, damage: int) -> None:
    """A tar of two files whose second header is zeroed in part (0) or that ends too early."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for i in range(2):
            info = tarfile.TarInfo(f"c{i}/1.jpg")
            info.size = 600
            archive.addfile(info, io.BytesIO(b"x" * 600))
    content = bytearray(path.read_bytes())
    if damage:
        content = content[:damage]
    else:
        content[1536 + 20] ^= 1
    path.write_bytes(content)


BAD_ARCHIVES = {
    "parent.zip": (lambda p: zip_of(p, "c0/../../evil.jpg"), "member 'c0/../../evil.jpg' points out of the archive"),
    "back.zip": (lambda p: zip_of(p, "..\\evil.jpg"), "points out of the archive"),
    "nameless.zip": (lambda p: zip_of(p, "", data=b"x"), "member '' points out of the archive"),
    "root.zip": (lambda p: zip_of(p, "/etc/evil.jpg"), "member '/etc/evil.jpg' points out"),
    "drive.zip": (lambda p: zip_of(p, "C:\\evil.jpg"), "points out of the archive"),
    "link.zip": (lambda p: zip_of(p, mode=stat.S_IFLNK), "member 'c0/1.jpg' is a link"),
    "device.zip": (lambda p: zip_of(p, mode=stat.S_IFCHR), "member 'c0/1.jpg' is a device"),
    "secret.zip": (lambda p: zip_of(p, flag=1), "member 'c0/1.jpg' is encrypted"),
    "bomb.zip": (lambda p: zip_of(p, data=bytes(1 << 25)), "is a decompression bomb"),
    "overlap.zip": (overlapping_zip, "member 'c0/2.jpg' overlaps"),
    "endless.zip": (endless_zip, "member 'c0/1.jpg' reaches beyond the end"),
    "cut.zip": (lambda p: (zip_of(p), os.truncate(p, 40)), "damaged zip"),
    "parent.tar": (lambda p: tar_of(p, "../evil.jpg"), "member '../evil.jpg' points out"),
    "root.tar": (lambda p: tar_of(p, "/evil.jpg"), "member '/evil.jpg' points out"),
    "link.tar": (lambda p: tar_of(p, kind=tarfile.SYMTYPE, link="/etc/passwd"), "member 'c0/1.jpg' is a link"),
    "hard.tar": (lambda p: tar_of(p, kind=tarfile.LNKTYPE, link="/etc/passwd"), "is a link"),
    "device.tar": (lambda p: tar_of(p, kind=tarfile.CHRTYPE), "is a device"),
    "fifo.tar": (lambda p: tar_of(p, kind=tarfile.FIFOTYPE), "is a device"),
    "name.tar": (lambda p: tar_of(p, kind=tarfile.GNUTYPE_LONGNAME, size=1 << 30), "a header of 1,073,741,824 bytes"),
    "beyond.tar": (lambda p: tar_of(p, size=1 << 40), "readable zip or plain tar"),
    "circle.tar": (circular_tar, "readable zip or plain tar"),
    "header.tar": (lambda p: cut(p, 0), "damaged header at byte 1536"),
    "half.tar": (lambda p: cut(p, 2100), "readable zip or plain tar"),
    "endless.tar": (lambda p: cut(p, 3072), "cut off"),
    "text.tar": (lambda p: p.write_text("no archive"), "not a readable zip or plain tar"),
    "empty.tar": (lambda p: p.write_bytes(b""), "not a readable zip or plain tar"),
    "packed.tar.gz": (lambda p: pack(p.parent, p), "compressed with gzip"),
}


@pytest.mark.parametrize("name", BAD_ARCHIVES)
def test_bad_archives_are_refused_by_name(name, tmp_path):
    write, words = BAD_ARCHIVES[name]
    write(tmp_path / name)
    with pytest.raises(InputError) as error:
        run_here("folder", "--src", tmp_path / name, "--out", tmp_path / "d/object/train", "--size", 24)
    assert words in error.value.message and "\n" not in error.value.message
    assert not list(tmp_path.rglob("evil*")) and not (tmp_path / "d").exists()


def test_an_inner_folder_that_is_not_there(tmp_path):
    archive = pack(class_folders(tmp_path / "src"), tmp_path / "set.zip")
    for inner in ("none", "../src", "c0/1.jpg"):
        with pytest.raises(InputError, match="contains no folder"):
            members(archive / inner)


def test_single_bombs_and_damaged_members_are_skipped_with_their_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.sources.archives.MAX_BYTES", 100_000)
    src = class_folders(tmp_path / "src", classes=2, images=2)
    (src / "c0/bomb.ppm").write_bytes(b"P6 99999 99999 255\n")
    (src / "c0/large.ppm").write_bytes(b"P6 9999 9999 255\n")
    (src / "c0/script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run showpage\n")
    (src / "c1/bytes.bmp").write_bytes(os.urandom(100_001))
    (src / "c1/crc.jpg").write_bytes(b"damage me")
    archive = pack(src, tmp_path / "set.zip")
    with zipfile.ZipFile(archive) as file:
        place = file.getinfo("c1/crc.jpg").header_offset + 30 + len("c1/crc.jpg")
    content = bytearray(archive.read_bytes())
    content[place + 3] ^= 255
    archive.write_bytes(content)
    run_here("folder", "--src", archive, "--out", tmp_path / "d/object/train", "--size", 24, "--workers", 1)
    assert Split(tmp_path / "d/object/train").index["skipped"] == {
        "larger than 0 MiB": 1, "more than 89 million pixels": 2, "unreadable image": 1, "damaged in its archive": 1}
