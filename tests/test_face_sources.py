"""Archives and the published layouts of face sets: a tiny instance of each, its known answer, and damaged ones."""

import codecs
import io
import os
import pickle
import re
import signal
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
from data_prep import InputError
from data_prep.format import BadImage, Split, open_root
from data_prep.sources import faces, folders, insightface
from data_prep.sources.archives import members
from data_prep.verify import verify_split
from data_prep.write import fit_image
from protocols.pairs import score_verification
from protocols.search import score_gallery
from protocols.templates import score_templates
from tests.test_data_prep import PAIRS, class_folders, encode, files_of, lfw_folder, picture, run_here

# ---------------------------------------------------------------- archives


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


# ---------------------------------------------------------------- RecordIO


def crop(seed: int, side: int = 32, **options) -> bytes:
    """A square JPEG, which a split of the same size takes over byte for byte."""
    return encode(picture(seed, side, side), **options)


def contents(split: Split) -> list[tuple[str | None, bytes]]:
    """(identity, JPEG) of every sample, sorted: training splits are written in random order."""
    return sorted((split.classes[label] if label >= 0 else None, split.jpeg(row)[1])
                  for row, label in enumerate(split.labels))


def record(payload: bytes) -> bytes:
    """A record as dmlc-core writes it: split at every aligned magic number, which is left out."""
    magic, parts, start = insightface.MAGIC, [], 0
    for i in range(0, len(payload) - 3, 4):
        if payload[i : i + 4] == magic:
            parts.append(payload[start:i])
            start = i + 4
    parts.append(payload[start:])
    kinds = [0] if len(parts) == 1 else [1] + [2] * (len(parts) - 2) + [3]
    return b"".join(magic + struct.pack("<I", kind << 29 | len(part)) + part + bytes(-len(part) % 4)
                    for kind, part in zip(kinds, parts, strict=True))


def pack_label(label: float | list[float], image: bytes = b"", number: int = 0) -> bytes:
    if isinstance(label, list):
        return struct.pack(f"<IfQQ{len(label)}f", len(label), 0, number, 0, *label) + image
    return struct.pack("<IfQQ", 0, label, number, 0) + image


def write_rec(folder: Path, payloads: dict[int, bytes], order: list[int] | None = None, idx: bool = True) -> Path:
    folder.mkdir(parents=True)
    data, lines = b"", []
    for key in order or list(payloads):
        lines.append(f"{key}\t{len(data)}\n")
        data += record(payloads[key])
    (folder / "train.rec").write_bytes(data)
    if idx:
        (folder / "train.idx").write_text("".join(lines))
    return folder


PEOPLE = [0, 0, 1, 1, 1, 12]  # labels of six images


def classic(images: list[bytes]) -> dict[int, bytes]:
    """Record 0 announces, images are 1..6, the three people's records 7..9 name their ranges."""
    payloads = {0: pack_label([7.0, 10.0])}
    payloads |= {i: pack_label([float(p), 0.0], image, i) for i, (p, image) in
                 enumerate(zip(PEOPLE, images, strict=True), 1)}
    return payloads | {7: pack_label([1.0, 3.0]), 8: pack_label([3.0, 6.0]), 9: pack_label([6.0, 7.0])}


def plain(images: list[bytes]) -> dict[int, bytes]:
    return {i: pack_label(float(p), image, i) for i, (p, image) in enumerate(zip(PEOPLE, images, strict=True))}


def with_magic(seed: int) -> bytes:
    """A JPEG with the magic number in its comment, twice, aligned as it lies in a record."""
    for pad in range(4):
        data = crop(seed, comment=b"x" * pad + insightface.MAGIC + b"1234" + insightface.MAGIC)
        if (insightface.HEADER.size + data.index(insightface.MAGIC)) % 4 == 0:
            return data


@pytest.mark.parametrize("layout, order, idx", [
    (classic, None, True), (classic, [9, 3, 1, 0, 2, 8, 7, 6, 5, 4], True), (classic, None, False),
    (plain, None, True), (plain, [5, 4, 3, 2, 1, 0], True), (plain, None, False),
])  # fmt: skip
def test_recordio_layouts(layout, order, idx, tmp_path, capsys):
    """Announced, plain and shuffled layouts, records in parts, PNG; with and without the .idx."""
    images = [crop(0), with_magic(1), crop(2, 32), crop(3), crop(4), encode(picture(5, 32, 32), "PNG")]
    src = write_rec(tmp_path / "src", layout(images), order, idx)
    if layout is classic:
        assert (src / "train.rec").read_bytes().count(insightface.MAGIC) == 12  # one record of ten is in three parts
    (src / "property").write_text("3,32,32\n6\nshuffled\n")
    (src / "train.meta").write_bytes(pickle.dumps([{"image_index": 0}]))
    run_here("recordio", "--src", src, "--out", tmp_path / "d/face_hq/train", "--workers", 2, "--shard-size", 2)
    split = Split(tmp_path / "d/face_hq/train")
    assert split.size == 32 and split.classes == ["0000000", "0000001", "0000012"]
    found = contents(split)
    assert [int(person) for person, _ in found] == PEOPLE and len({data for _, data in found} & set(images[:5])) == 5
    assert ("0000000", images[1]) in found and verify_split(split.folder) == []
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize("keys, note", [([1] * 6, "records the same key"), ([], "is empty"),
                                        ([0, 1, 2, 2, 4, 5], "records the same key"), ([5, 4, 3, 2, 1, 0], None)])
def test_every_record_of_an_index_is_an_image(keys, note, tmp_path, capsys):
    """Keys that repeat (of a list whose first column is the same for all), an index without lines, each line twice."""
    images = [crop(i) for i in range(6)]
    src = write_rec(tmp_path / "src", plain(images))
    offsets = [line.split("\t")[1] for line in (src / "train.idx").read_text().splitlines()]
    lines = [f"{key}\t{offset}\n" for key, offset in zip(keys, offsets, strict=False)]
    (src / "train.idx").write_text("".join(lines + lines))
    (src / "train.rec").rename(src / "faces.rec")
    (src / "train.idx").rename(src / "faces.idx")
    (src / "._faces.rec").write_bytes(b"left by macOS")
    run_here("recordio", "--src", src, "--out", tmp_path / "d/face_hq/train")
    assert contents(Split(tmp_path / "d/face_hq/train")) == sorted(
        (f"{person:07d}", image) for person, image in zip(PEOPLE, images, strict=True))
    told = capsys.readouterr().out
    assert note in told if note else "note:" not in told


def test_recordio_as_a_search(tmp_path, capsys):
    src = write_rec(tmp_path / "src", plain([crop(i) for i in range(6)]))
    (src / "property").write_text("4,32,32")
    run_here("recordio", "--src", src / "train.rec", "--out", tmp_path / "d/face_lq/search")
    split = Split(tmp_path / "d/face_lq/search")
    assert split.protocol == {"name": "identification"} and split.column("role").tolist() == [1, 0, 1, 0, 0, 2]
    assert [split.jpeg(row)[1] for row in range(6)] == [crop(i) for i in range(6)]
    assert "property says 4 people, the records name 3" in capsys.readouterr().out


def test_random_payloads_survive_the_container(tmp_path):
    rng = np.random.default_rng(0)
    for case in range(300):
        words = rng.choice([insightface.MAGIC, b"abcd", b"\n#\xd7\xce"], rng.integers(0, 8))
        payload = b"z" * int(rng.integers(4)) * int(rng.integers(2)) + b"".join(bytes(w) for w in words)
        (tmp_path / "x").write_bytes(b"1234" + record(payload))
        with open(tmp_path / "x", "rb") as file:
            assert insightface.read_payload(file.fileno(), 4) == payload, case


def test_damaged_records_are_skipped_and_counted(tmp_path):
    payloads = plain([crop(i) for i in range(6)])
    payloads |= {6: b"short", 7: pack_label(float("nan"), crop(7)), 8: pack_label(-1.0, crop(8)),
                 9: struct.pack("<IfQQ", 1 << 30, 0, 0, 0), 10: pack_label(1.0, b"no image")}
    src = write_rec(tmp_path / "src", payloads)
    with open(src / "train.idx", "a") as idx:
        idx.write("11\t4\n")  # no record begins there
    run_here("recordio", "--src", src, "--out", tmp_path / "d/face_hq/train", "--size", 32)
    split = Split(tmp_path / "d/face_hq/train")
    assert len(split) == 6 and split.index["skipped"] == {"damaged record": 3, "its label is not an integer": 2,
                                                          "unreadable image": 1}


# ---------------------------------------------------------------- verification sets


def python2(images: list[bytes], same: list[bool], protocol: int) -> bytes:
    """(images, same) as Python 2 pickles them: strings of bytes, and I01 for True in protocol 0."""
    if protocol == 0:
        quoted = ("S'" + "".join(f"\\x{byte:02x}" for byte in image) + "'\n" for image in images)
        return (f"((lp0\n{'a'.join(quoted)}a(lp1\n" + "".join(f"I{flag:02d}\na" for flag in same) + "t.").encode()
    strings = (b"T" + struct.pack("<i", len(image)) + image + b"q\x05" for image in images)
    flags = b"".join(b"\x88" if flag else b"\x89" for flag in same)
    return b"\x80\x02]q\x00(" + b"".join(strings) + b"e]q\x02(" + flags + b"e\x86q\x03."


SAME = [True, False] * 6
BIN_IMAGES = [crop(i) for i in range(24)]
ARRAYS = [np.frombuffer(image, dtype=np.uint8) for image in BIN_IMAGES]
OWNED = [array.copy() for array in ARRAYS]  # protocol 5 writes arrays that may be written to as bytearrays
BINS = {f"bytes, protocol {n}": pickle.dumps((BIN_IMAGES, SAME), n) for n in (0, 1, 2, 3, 4, 5)}
BINS |= {f"arrays, protocol {n}": pickle.dumps((ARRAYS, [np.bool_(flag) for flag in SAME]), n) for n in range(6)}
BINS |= {f"owned arrays, protocol {n}": pickle.dumps([OWNED, np.array(SAME)], n) for n in (2, 5)}
BINS |= {f"bytearrays, protocol {n}": pickle.dumps((tuple(map(bytearray, BIN_IMAGES)), SAME), n) for n in (2, 4, 5)}
BINS |= {f"python 2, protocol {n}": python2(BIN_IMAGES, SAME, n) for n in (0, 2)}
BINS |= {"old numpy": pickle.dumps((ARRAYS, SAME), 2).replace(b"numpy._core", b"numpy.core"),
         "array of arrays": pickle.dumps((np.array(BIN_IMAGES, dtype=object), SAME), 4)}


@pytest.mark.parametrize("kind", BINS)
def test_bin_files_of_every_pickle_protocol(kind, tmp_path):
    (tmp_path / "lfw.bin").write_bytes(BINS[kind])
    run_here("bin", "--src", tmp_path / "lfw.bin", "--out", tmp_path / "d/face_hq/lfw", "--workers", 1)
    split = Split(tmp_path / "d/face_hq/lfw")
    assert split.protocol == {"name": "verification", "folds": 10, "pairs": 12, "pairs_lost": 0}
    assert [split.jpeg(row)[1] for row in range(24)] == BIN_IMAGES
    # folds as KFold(10): the first 12 % 10 folds have a pair more
    assert split.column("pairs").tolist() == [[2 * p, 2 * p + 1, int(SAME[p]), max(p // 2, p - 2) if p < 4 else p - 2]
                                              for p in range(12)]
    assert verify_split(split.folder) == []
    # genuine pairs at cosine 1 but for the last, alone in its fold, at -1; impostors at 0
    embeddings = np.array([v for p, same in enumerate(SAME) for v in ((1, 0), (1, 0) if same else (0, 1))], dtype=float)
    embeddings[21] = -1, 0
    figures = next(iter(score_verification(embeddings, split, 2, 0)[0].values()))
    assert figures["auc"].value == pytest.approx(5 / 6) and figures["accuracy"].value == pytest.approx(9 / 10)


class Bomb:
    """An object whose unpickling runs a command."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_pickle_bomb_does_not_run(tmp_path):
    """Commands, imports, attributes, allocations and repetitions: none is carried out, each is named in one line."""
    flag = tmp_path / "evil"
    bombs = {
        "posix.system": Bomb(os.system, f"touch {flag}"), "builtins.exec": Bomb(exec, f"open({str(flag)!r}, 'w')"),
        "builtins.eval": Bomb(eval, f"open({str(flag)!r}, 'w')"), "builtins.getattr": Bomb(getattr, "x", "join"),
        "io.open": Bomb(open, str(flag), "w"), "_codecs.lookup": Bomb(codecs.lookup, "evil"),
        "'numpy.load'": b"cnumpy\nload\n.", "os.mkdir": b"cos\nmkdir\n(V" + str(flag).encode() + b"\ntR.",
        "numpy.core.multiarray.fromfile": b"cnumpy.core.multiarray\nfromfile\n.",
        "opcode 0x7d": b"\x80\x02}.",  # a dictionary
        "": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",  # a bytearray of a terabyte
        "repeated text": b"\x80\x02c_codecs\nencode\nq\x00X\xe8\x03\x00\x00" + b"x" * 1000
                             + b"X\x06\x00\x00\x00latin1\x86q\x010" + b"h\x00h\x01R" * 1000 + b".",
        "too many parts": b"]" * 5_000_001,
    }  # fmt: skip
    for words, bomb in bombs.items():
        (tmp_path / "bomb.bin").write_bytes(bomb if isinstance(bomb, bytes) else pickle.dumps(([bomb], [True]), 4))
        with pytest.raises(InputError) as error:
            insightface.bin(tmp_path / "bomb.bin", "face_hq", False)
        assert words in error.value.message, (words, error.value.message)
        assert "nothing in it was executed" in error.value.message and "\n" not in error.value.message
        assert not flag.exists()


def test_what_is_in_a_bin_without_being_an_image(tmp_path):
    """An entry that is no image costs its pair; one that is another thing altogether too."""
    images = [*BIN_IMAGES[:20], b"no image", BIN_IMAGES[21], ["what", 5], BIN_IMAGES[23]]
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((images, SAME)))
    run_here("bin", "--src", tmp_path / "lfw.bin", "--out", tmp_path / "d/face_hq/lfw", "--size", 32)
    split = Split(tmp_path / "d/face_hq/lfw")
    assert split.protocol["pairs_lost"] == 2 and split.index["skipped"] == {"unreadable image": 2}


# ---------------------------------------------------------------- lists of pairs


def write_images(folder: Path, names: list[str]) -> Path:
    """One image a name; its picture is that of its place in the list."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(crop(i))
    return folder


def listed(split: Split) -> list[tuple[bytes, bytes, int, int]]:
    """The pairs of a split with the JPEGs in place of the rows."""
    return [(split.jpeg(a)[1], split.jpeg(b)[1], same, fold) for a, b, same, fold in split.column("pairs").tolist()]


FLAT = ["Ann_A_0001.jpg", "Ann_A_0002.jpg", "Bob_0001.jpg", "Bob_0002.jpg"]
AGEDB = ["0_AnnA_35_f.jpg", "1_AnnA_61_f.jpg", "2_Bob_20_m.jpg", "3_Bob_55_m.jpg"]
DEEP = ["Data/Images/001/frontal/01.jpg", "Data/Images/001/profile/01.jpg", "Data/Images/002/frontal/01.jpg",
        "Data/Images/002/profile/01.jpg"]
CODES = ["k.jpg", "l.jpg", "m.jpg", "n.jpg"]
# style: (images, list, people); the pairs are always 0-1 same, 2-3 same, 0-2 different, 1-3 different
PAIR_LISTS = {
    "csv with header and folds": (DEEP, "left,right,same,fold\n{0},{1},1,1\n{2},{3},1,2\n{0},{2},0,1\n{1},{3},0,2\n",
                                  ["Data/Images/001", "Data/Images/002"]),
    "csv, quoted, no header": (FLAT, '"{0}","{1}",1\n{2},{3},1\n./{0},{2},0\n{1},{3},0\n', ["Ann_A", "Bob"]),
    "words": (AGEDB, "{0}\t{1}\tTrue\n{2}\t{3}\ttrue\n{0}\t{2}\tFalse\n{1}\t{3}\tfalse\n", ["AnnA", "Bob"]),
    "same left right": (AGEDB, "1 {0} {1}\n1 {2} {3}\n0 {0} {2}\n0 {1} {3}\n", ["AnnA", "Bob"]),
    "two lines a pair": (FLAT, "{0} 1\n{1} 1\n{2} 10\n{3} 10\n{0} 0\n{2} 0\n{1} 0\n{3} 0\n", ["Ann_A", "Bob"]),
    "names that tell nothing": (CODES, "{0} {1} 1\n{2} {3} 1\n{0} {2} 0\n{1} {3} 0\n", ["k.jpg", "m.jpg"]),
    "byte order mark, CRLF": (CODES, "\ufeff{0},{1},1\r\n{2},{3},1\r\n\r\n{0},{2},0\r\n{1},{3},0\r\n",
                              ["k.jpg", "m.jpg"]),
}  # fmt: skip


@pytest.mark.parametrize("style", PAIR_LISTS)
def test_pair_lists(style, tmp_path):
    names, text, people = PAIR_LISTS[style]
    src = write_images(tmp_path / "src", [*names, "not/listed/1.jpg"])
    (tmp_path / "list.csv").write_bytes(text.format(*names).encode())
    archive = pack(src, tmp_path / "src.zip")
    for where, out in ((src, "folder"), (archive, "zip")):
        run_here("pairs", "--src", where, "--pairs", tmp_path / "list.csv", "--out", tmp_path / "d/face_hq" / out)
    split = Split(tmp_path / "d/face_hq/folder")
    folds = [0, 1, 0, 1] if "folds" in style else [0, 1, 2, 3]
    places = [(0, 1, 1), (2, 3, 1), (0, 2, 0), (1, 3, 0)]
    assert listed(split) == [(crop(a), crop(b), same, fold) for (a, b, same), fold in zip(places, folds, strict=True)]
    assert split.protocol == {"name": "verification", "folds": max(folds) + 1, "pairs": 4, "pairs_lost": 0}
    assert split.classes == people and len(split) == 4 and verify_split(split.folder) == []
    assert listed(Split(tmp_path / "d/face_hq/zip")) == listed(split)


def test_pairs_without_folds_are_dealt_so_that_each_fold_holds_both_kinds(tmp_path):
    """Ten consecutive parts (InsightFace's order), but for lists with all genuine pairs first (CALFW's order)."""
    src = write_images(tmp_path / "src", CODES)
    for order, folds in (("10" * 20, [p // 4 for p in range(40)]), ("1" * 20 + "0" * 20, [p % 10 for p in range(40)])):
        (tmp_path / "list.csv").write_text("".join(f"k.jpg,{'ml'[int(same)]}.jpg,{same}\n" for same in order))
        source = faces.pairs(src, "face_hq", False, tmp_path / "list.csv")
        assert source.deal(np.array([same for _, _, same, _ in source.pairs])).tolist() == folds


@pytest.mark.parametrize("kind, right", [("FP", "profile"), ("FF", "frontal")])
def test_cfp_is_read_by_its_own_protocol(kind, right, tmp_path):
    """Two folds; the lists count from 1 and name images relative to themselves."""
    names = [f"Data/Images/{person:03d}/{pose}/{i:02d}.jpg"
             for person in (1, 2) for pose in ("frontal", "profile") for i in (1, 2)]
    src = write_images(tmp_path / "src", names)
    for side, pose in (("F", "frontal"), ("P", "profile")):
        lines = [f"{n} ../{name}\n" for n, name in enumerate((n for n in names if pose in n), 1)]
        (src / "Protocol").mkdir(exist_ok=True)
        (src / f"Protocol/Pair_list_{side}.txt").write_text("".join(lines))
    for fold in (1, 2):
        folder = src / f"Protocol/Split/{kind}/{fold:02d}"
        folder.mkdir(parents=True)
        (folder / "same.txt").write_text(f"{2 * fold - 1},{2 * fold}\n")
        (folder / "diff.txt").write_text(f"{fold},{fold + 2}\n")
    run_here("pairs", "--src", src, "--pairs", kind, "--out", tmp_path / "d/face_hq/cfp")
    split = Split(tmp_path / "d/face_hq/cfp")
    frontal, other = ([i for i, name in enumerate(names) if pose in name] for pose in ("frontal", right))
    assert listed(split) == [(crop(frontal[0]), crop(other[2]), 0, 0), (crop(frontal[0]), crop(other[1]), 1, 0),
                             (crop(frontal[1]), crop(other[3]), 0, 1), (crop(frontal[2]), crop(other[3]), 1, 1)]


# ---------------------------------------------------------------- TinyFace


@pytest.mark.parametrize("packed", [False, True])
def test_tinyface(packed, tmp_path):
    """Distractors have underscores in their names too and are nobody; a probe may have two mates."""
    src = write_images(tmp_path / "src", [f"tinyface/{name}" for name in (
        "Training_Set/7/7_1.jpg", "Training_Set/7/7_2.jpg", "Training_Set/12/12_1.jpg", "Training_Set/12/Thumbs.db",
        "Testing_Set/Probe/31_1.jpg", "Testing_Set/Probe/45_2.jpg", "Testing_Set/Probe/what.jpg",
        "Testing_Set/Gallery_Match/31_7.jpg", "Testing_Set/Gallery_Match/31_8.jpg",
        "Testing_Set/Gallery_Match/45_1.jpg", "Testing_Set/Gallery_Distractor/31_9.jpg",
        "Testing_Set/Gallery_Distractor/x.jpg", "Testing_Set/probe_img_ID_pairs.mat")])
    where = pack(src, tmp_path / "tinyface.zip") if packed else src / "tinyface"
    for part in ("train", "test"):
        run_here("tinyface", "--src", where, "--out", tmp_path / "d/face_lq" / part)
    train, test = Split(tmp_path / "d/face_lq/train"), Split(tmp_path / "d/face_lq/test")
    assert contents(train) == sorted([("12", crop(2)), ("7", crop(0)), ("7", crop(1))])
    assert train.index["skipped"] == {"not an image by its name": 1}
    # in the order of names: distractors, matches, probes
    assert [test.jpeg(row)[1] for row in range(7)] == [crop(i) for i in (10, 11, 7, 8, 9, 4, 5)]
    assert test.labels.tolist() == [-1, -1, 0, 0, 1, 0, 1] and test.classes == ["31", "45"]
    assert test.column("role").tolist() == [2, 2, 1, 1, 1, 0, 0] and test.protocol == {"name": "identification"}
    assert test.index["skipped"] == {"name is not TinyFace's": 1} and verify_split(test.folder) == []
    # probe 31 finds its mate in row 3 first; between probe 45 and its mate lies a distractor
    embeddings = np.array([[0, 1, 0.1], [0, 0, 1], [0, 0, 1], [1, 0, 0], [0, 1, 0.2], [1, 0, 0], [0, 1, 0]])
    figures, _ = score_gallery(embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), test, 2, 0)
    assert (figures["rank-1"].value, figures["rank-5"].value, figures["rank-1"].count) == (0.5, 1.0, 2)


# ---------------------------------------------------------------- templates


def write_ijb(folder: Path, crops: str = "loose_crop", search: bool = True) -> Path:
    """Seven crops of 64 pixels in four templates of two people, 3-4 of them in one video; landmarks as below."""
    (folder / crops).mkdir(parents=True)
    (folder / "meta").mkdir()
    for i in range(1, 8):
        (folder / f"{crops}/{i}.jpg").write_bytes(encode(picture(i, 64, 64), quality=100, subsampling=0))
    pairs = ((1, 11), (1, 12), (20, 13), (20, 13), (20, 14), (300, 15), (4000, 16))
    files = {"face_tid_mid.txt": "".join(f"{i}.jpg {t} {m}\n" for i, (t, m) in enumerate(pairs, 1)),
             "template_pair_label.txt": "1 20 1\n1 4000 0\n300 20 0\n300 4000 1\n1 5555 0\n",
             "name_5pts_score.txt": "".join(f"{i}.jpg {FIVE} 0.{i}5\n" for i in range(1, 8))}
    if search:
        files |= {"1N_gallery_G1.csv": "TEMPLATE_ID,SUBJECT_ID,FILENAME\n1,77,img/1.jpg\n1,77,img/2.jpg\n",
                  "1N_gallery_G2.csv": "TEMPLATE_ID,SUBJECT_ID\n300,8\n",
                  "1N_probe_mixed.csv": "TEMPLATE_ID,SUBJECT_ID\n4000,8\n20,77\n20,77\n"}
    for name, text in files.items():
        (folder / f"meta/ijbc_{name}").write_text(text)
    return folder


# the aligned positions at half their size, plus (5, 3): alignment must enlarge twice and shift
FIVE = " ".join(f"{x:.4f} {y:.4f}" for x, y in ((z.real / 2 + 5, z.imag / 2 + 3) for z in faces.LANDMARKS))


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_ijb(packed, search, tmp_path):
    src = write_ijb(tmp_path / "src", search=search)
    where = pack(src, tmp_path / "ijb.tar", "IJB_release/IJBC/") / "IJB_release/IJBC" if packed else src
    run_here("ijb", "--src", where, "--out", tmp_path / "d/face_lq/ijbc")
    split = Split(tmp_path / "d/face_lq/ijbc")
    assert split.size == 112 and verify_split(split.folder) == []
    assert split.protocol == {"name": "templates", "pairs": 5, "galleries": 2 if search else 0}
    assert split.column("template").tolist() == [1, 1, 20, 20, 20, 300, 4000]
    assert split.column("media").tolist() == [11, 12, 13, 13, 14, 15, 16]
    assert split.column("quality").tolist() == [0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75]
    assert split.column("template_pairs").tolist() == [[1, 20, 1], [1, 4000, 0], [300, 20, 0], [300, 4000, 1],
                                                       [1, 5555, 0]]
    if search:
        assert split.classes == ["000008", "000077"] and split.labels.tolist() == [1] * 5 + [0] * 2
        assert split.column("template_gallery").tolist() == [[1, 0], [300, 1]]
        assert split.column("template_probes").tolist() == [[20], [4000]]
    else:
        assert split.classes == ["template-000001", "template-000300"] and split.labels.tolist() == [0] * 5 + [1] * 2
    # the aligned face is the loose crop from (5, 3) on at twice the size: every second pixel is one of the crop's
    image = split.image(0).permute(1, 2, 0).numpy().astype(int)
    want = np.asarray(picture(1, 64, 64).crop((5, 3, 61, 59))).astype(int)
    assert np.abs(image[::2, ::2] - want).mean() < 1.5


def test_ijb_of_aligned_images(tmp_path):
    """Images that are aligned already are taken as they are, with or without a list of landmarks."""
    src = write_ijb(tmp_path / "src", "aligned_112")
    (src / "meta/ijbc_name_5pts_score.txt").unlink()
    run_here("ijb", "--src", src, "--out", tmp_path / "d/face_hq/ijbc")
    split = Split(tmp_path / "d/face_hq/ijbc")
    assert split.size == 64 and split.jpeg(2)[1] == (src / "aligned_112/3.jpg").read_bytes()
    assert "quality" not in split.index["columns"] and verify_split(split.folder) == []


def test_alignment_turns_and_refuses():
    """A face that lies on its side comes upright; five equal points are no face."""
    upright = picture(3, 112, 112)
    turned = upright.transpose(Image.Transpose.ROTATE_90)  # x, y -> y, 111 - x
    points = [c for z in faces.LANDMARKS for c in (z.imag, 111 - z.real)]
    aligned = np.asarray(Image.open(io.BytesIO(faces.align(lambda: encode(turned, "PNG"), tuple(points))))).astype(int)
    assert np.abs(aligned - np.asarray(upright).astype(int)).max() <= 2
    with pytest.raises(BadImage, match="no face"):
        faces.align(lambda: encode(upright, "PNG"), (5.0,) * 10)


def test_verify_reads_the_lists_of_templates(tmp_path):
    run_here("ijb", "--src", write_ijb(tmp_path / "src"), "--out", tmp_path / "d/face_lq/ijbc")
    index = tmp_path / "d/face_lq/ijbc/index"
    for name, array, words in (("template_pairs", np.array([[1, 4000, 1]]), "1 template pairs contradict the labels"),
                               ("template_pairs", np.zeros((2, 2), int), r"want int64 \[rows, 3\]"),
                               ("template_gallery", np.array([[5, 0]]), "names no template"),
                               ("template", np.arange(7) // 3, "one template have several labels"),
                               ("quality", np.full(7, 0.5), "quality is 0.15")):
        before = (index / f"{name}.npy").read_bytes()
        np.save(index / f"{name}.npy", array)
        try:
            problems = verify_split(index.parent)
        except InputError as error:
            problems = [error.message]
        assert any(re.search(words, problem) for problem in problems), words
        (index / f"{name}.npy").write_bytes(before)
    assert verify_split(index.parent) == []


def test_evaluate_scores_templates(tmp_path):
    """Template 20 finds 1 in the first gallery, 4000 does not find 300 in the second; the 1:1 list is too short."""
    run_here("ijb", "--src", write_ijb(tmp_path / "src"), "--out", tmp_path / "d/face_lq/ijbc")
    split, = evaluate.choose_splits(open_root(tmp_path / "d"), None, "d")
    x = np.array([[1, 0], [1, 0.1], [1, 0.2], [1, 0], [0.9, 0], [0, 1], [1, 0.3]], dtype=np.float32)
    found, _ = score_templates(x, split, 2, 0)
    values = {rule: {name: figure.value for name, figure in figures.items()} for rule, figures in found.items()}
    assert len(values) == 2 and {rule.split(",")[0] for rule in values} == {"1:N in 2 galleries"}
    assert all(found == {"rank-1": 1.0, "rank-5": 1.0, "rank-10": 1.0} for found in values.values())


@pytest.mark.parametrize("source", ["ijb", "tinyface"])
def test_degraded_splits_keep_what_their_protocol_names(source, tmp_path):
    """Lists of templates, roles and distractors: the same embeddings have the same figures before and after."""
    names = ["Probe/31_1.jpg", "Probe/45_2.jpg", "Gallery_Match/31_7.jpg", "Gallery_Match/45_1.jpg",
             "Gallery_Distractor/x.jpg"]
    src = (write_ijb(tmp_path / "src") if source == "ijb" else
           write_images(tmp_path / "src", [f"Testing_Set/{name}" for name in names]))
    run_here(source, "--src", src, "--out", tmp_path / "d/face_hq/test", "--workers", 1)
    run_here("degrade", "--src", tmp_path / "d/face_hq/test", "--out", tmp_path / "d/face_lq/test", "--workers", 1)
    sharp, soft = (Split(tmp_path / f"d/{domain}/test") for domain in ("face_hq", "face_lq"))
    assert verify_split(soft.folder) == [] and soft.protocol == sharp.protocol and soft.classes == sharp.classes
    columns = set(sharp.index["columns"])
    assert columns == set(soft.index["columns"]) and {"ijb": "template_gallery", "tinyface": "role"}[source] in columns
    for name in columns - {"hash", "offset", "length"}:
        assert np.array_equal(soft.column(name), sharp.column(name)), name
    x = np.random.default_rng(0).normal(size=(len(soft), 8)).astype(np.float32)
    score = score_templates if source == "ijb" else score_gallery
    assert repr(score(x, soft, 2, 0)) == repr(score(x, sharp, 2, 0))


def write_list(folder: Path, text: str = "k.jpg,l.jpg,1\nk.jpg,m.jpg,0\n") -> Path:
    (folder / "list.csv").write_text(text)
    return folder / "list.csv"


# ---------------------------------------------------------------- bad input


def rec_of(data: bytes, idx: str | None = None):
    def write(folder: Path) -> list:
        (folder / "train.rec").write_bytes(data)
        if idx is not None:
            (folder / "train.idx").write_text(idx)
        return ["recordio", "--src", folder]
    return write


def bin_of(data: bytes):
    def write(folder: Path) -> list:
        (folder / "x.bin").write_bytes(data)
        return ["bin", "--src", folder / "x.bin"]
    return write


def pairs_of(text: str, *images: str):
    def write(folder: Path) -> list:
        write_images(folder / "src", images or CODES)
        return ["pairs", "--src", folder / "src", "--pairs", write_list(folder, text)]
    return write


def ijb_of(name: str, text: str | None):
    def write(folder: Path) -> list:
        src = write_ijb(folder / "src")
        (src / f"meta/ijbc_{name}").write_text(text) if text is not None else (src / f"meta/ijbc_{name}").unlink()
        return ["ijb", "--src", src]
    return write


IMAGE = pack_label(1.0, b"image")
BAD = {
    "no rec": (lambda folder: ["recordio", "--src", folder], "want a folder with train.rec"),
    "no records": (rec_of(b"no records"), "no record at byte 0"),
    "empty rec": (rec_of(b""), "the source holds no images"),
    "idx beyond": (rec_of(record(IMAGE), "0\t9999\n"), "train.idx, line 1: want `key<TAB>offset`"),
    "idx of words": (rec_of(record(IMAGE), "0\t0\nkey\tword\n"), "train.idx, line 2"),
    "idx negative": (rec_of(record(IMAGE), "0\t-8\n"), "train.idx, line 1"),
    "incomplete": (rec_of(record(pack_label([1001.0, 1005.0])) + record(IMAGE)), "declares 1,000 images, but 1 exist"),
    "all damaged": (rec_of(record(b"short")), "damaged record"),
    "bin is a folder": (lambda folder: ["bin", "--src", folder], "want a verification file"),
    "bin is text": (bin_of(b"images"), "not a verification set"), "empty bin": (bin_of(b""), "not a verification set"),
    "cut bin": (bin_of(pickle.dumps((BIN_IMAGES, SAME))[:-500]), "not a verification set"),
    "bin of a number": (bin_of(pickle.dumps(5)), "want 2 P images and P booleans"),
    "odd bin": (bin_of(pickle.dumps((BIN_IMAGES[:3], SAME[:2]))), "want 2 P images and P booleans"),
    "bin of a dictionary": (bin_of(pickle.dumps({"bins": 1})), "opcode 0x7d"),
    "bin without pairs": (bin_of(pickle.dumps(([], []))), "the source holds no images"),
    "empty list": (pairs_of(""), "contains no pairs"),
    "header alone": (pairs_of("left,right,same\n"), "contains no pairs"),
    "not below": (pairs_of("k.jpg,z.jpg,1\n"), "list.csv: 1 of 1 entries name images that the source"),
    "climbing": (pairs_of("k.jpg,../../list.csv,1\n"), "line 1: names '../../list.csv', which is not in"),
    "absolute": (pairs_of("k.jpg,/etc/passwd,1\n"), "line 1: names '/etc/passwd', which is not in"),
    "four words": (pairs_of("k.jpg,l.jpg,1\na,b,c,d\n"), "line 2: want `left,right,same[,fold]`"),
    "a word more": (pairs_of("k.jpg l.jpg 1\nk.jpg m.jpg 0 x\n"), "line 2: want"),
    "three lines": (pairs_of("k.jpg 1\nl.jpg 1\nm.jpg 0\n"), "3 lines of `name same`"),
    "contradiction": (pairs_of("k.jpg,l.jpg,1\nl.jpg,m.jpg,1\nk.jpg,m.jpg,0\n"), "one person by some lines"),
    "binary list": (pairs_of("\0\0,\0,1\n"), "images that the source lacks"),
    "not UTF-8": (lambda folder: ["lfw", "--src", write_images(folder, ["a/a_0001.jpg"]), "--pairs",
                                  folder / "a/a_0001.jpg"], "a_0001.jpg: cannot be read"),
    "no list": (lambda folder: ["pairs", "--src", folder, "--pairs", folder / "none.csv"], "none.csv: cannot be read"),
    "no TinyFace": (lambda folder: ["tinyface", "--src", write_images(folder, CODES)], "no images of TinyFace"),
    "no IJB": (lambda folder: ["ijb", "--src", folder], "no meta/ijbc_face_tid_mid.txt"),
    "IJB without pairs": (ijb_of("template_pair_label.txt", None), "no meta/ijbc_face_tid_mid.txt and"),
    "IJB pairs of two": (ijb_of("template_pair_label.txt", "1 2\n"), "want `template template same` lines"),
    "IJB pairs of words": (ijb_of("template_pair_label.txt", "1 x 1\n"), "want `template template same` lines"),
    "IJB pairs of nothing": (ijb_of("template_pair_label.txt", ""), "want `template template same` lines"),
    "IJB missing image": (ijb_of("face_tid_mid.txt", "9.jpg 1 1\n"), "1 of 1 images are not in loose_crop"),
    "IJB climbing": (ijb_of("face_tid_mid.txt", "../meta/ijbc_face_tid_mid.txt 1 1\n"), "not in loose_crop"),
    "IJB short line": (ijb_of("face_tid_mid.txt", "1.jpg 1\n"), "ijbc_face_tid_mid.txt, line 1: want str whole whole"),
    "IJB large number": (ijb_of("face_tid_mid.txt", f"1.jpg 1 {1 << 70}\n"), "line 1: want str whole whole"),
    "IJB not finite": (ijb_of("name_5pts_score.txt", "1.jpg" + " nan" * 11), "line 1: want str number"),
    "IJB no landmarks": (ijb_of("name_5pts_score.txt", f"2.jpg {FIVE} 1\n"), "no landmarks for '1.jpg'"),
    "IJB gallery": (ijb_of("1N_gallery_G1.csv", "a,b\nx,1\n"), "ijbc_1N_gallery_G1.csv, line 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case, tmp_path):
    write, words = BAD[case]
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError) as error:
        run_here(*write(tmp_path / "in"), "--out", tmp_path / "d/face_hq/test", "--workers", 1)
    assert words in error.value.message and "\n" not in error.value.message
    assert not (tmp_path / "d/face_hq/test/index.json").exists()


@pytest.mark.parametrize("source", ["bin", "pairs", "ijb"])
def test_test_sets_are_not_trained_on(source, tmp_path):
    more = ["--pairs", "x"] if source == "pairs" else []
    with pytest.raises(InputError, match=r"(is a|makes a|are) test split"):
        run_here(source, "--src", tmp_path, "--out", tmp_path / "d/face_hq/train", *more)


# ---------------------------------------------------------------- fuzzing


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four random edits: bits, bytes, numbers at their limits, pieces cut, doubled, moved."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        i, n = int(rng.integers(len(data) + 1)), int(rng.integers(1, 17))
        kind = rng.integers(7)
        if kind == 0 and i < len(data):
            data[i] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[i : i + n] = rng.bytes(n)
        elif kind == 2:
            data[i : i + 4] = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"9999", b"-1,,"][rng.integers(5)]
        elif kind == 3:
            del data[i : i + n]
        elif kind == 4:
            data[i:i] = data[i : i + n * 8]
        elif kind == 5:
            data[i:i] = b"\0" * n
        elif rng.random() < 0.3:
            del data[i:]
    return bytes(data)


def fuzz_cases(folder: Path) -> dict:
    """name -> (files to mutate, the source's function and its arguments)."""
    small = write_images(folder / "small", ["c0/1.jpg", "c0/2.jpg", "c1/1.jpg"])
    rec = write_rec(folder / "rec", classic([crop(0, 16), with_magic(1), crop(2, 16), crop(3, 16), crop(4, 16), b"x"]))
    cases = {"rec": ([rec / "train.rec"], insightface.recordio, rec),
             "idx": ([rec / "train.idx", rec / "train.rec"], insightface.recordio, rec)}
    tiny = [crop(i, 8) for i in range(4)]
    for name, data in {"bytes": pickle.dumps((tiny, SAME[:2]), 2), "frames": pickle.dumps((tiny, SAME[:2]), 4),
                       "python 2": python2(tiny, SAME[:2], 0), "arrays": pickle.dumps(
                           ([np.frombuffer(image, np.uint8).copy() for image in tiny], np.array(SAME[:2])), 5)}.items():
        (folder / f"{name}.bin").write_bytes(data)
        cases[f"bin of {name}"] = [folder / f"{name}.bin"], insightface.bin, folder / f"{name}.bin"
    cases["zip"] = [pack(small, folder / "a.zip", "top/")], folders.folder, folder / "a.zip"
    for name, form in (("pax", tarfile.PAX_FORMAT), ("gnu", tarfile.GNU_FORMAT)):
        with tarfile.open(folder / f"{name}.tar", "w", format=form) as tar:
            for path in sorted(small.rglob("*.jpg")):
                tar.add(path, f"c/{'long' * 40}/{path.name}")
        cases[name] = [folder / f"{name}.tar"], folders.folder, folder / f"{name}.tar"
    flat = write_images(folder / "flat", CODES)
    for name, (_, text, _) in PAIR_LISTS.items():
        path = folder / f"{name}.txt"
        path.write_bytes(text.format(*CODES).encode())
        cases[f"list: {name}"] = [path], faces.pairs, flat, path
    (folder / "pairs.txt").write_text(PAIRS)
    cases["pairs.txt"] = [folder / "pairs.txt"], faces.lfw, lfw_folder(folder / "lfw"), folder / "pairs.txt"
    ijb = write_ijb(folder / "ijb")
    cases["ijb"] = sorted((ijb / "meta").iterdir()), faces.ijb, ijb
    return cases


@pytest.mark.filterwarnings("ignore:invalid .*escape sequence")  # of the strings in damaged pickles of Python 2
def test_mutated_files_end_in_one_line(tmp_path):
    """300 mutations of each kind of file: an InputError or a damaged image, nothing else, nothing written."""
    def too_long(*_):
        raise TimeoutError("a mutated file is read without end")

    before = signal.signal(signal.SIGALRM, too_long)
    refused = read = 0
    for name, (paths, source, *arguments) in fuzz_cases(tmp_path).items():
        rng, originals = np.random.default_rng(list(name.encode())), [path.read_bytes() for path in paths]
        files = set(files_of(tmp_path))
        for case in range(300):
            n = int(rng.integers(len(paths)))
            paths[n].write_bytes(mutate(originals[n], rng))
            signal.alarm(20)
            try:
                found = source(arguments[0], "face_hq", source is insightface.recordio, *arguments[1:])
                for one in found.records:
                    try:
                        fit_image(one.read(), 8, "squash", 50)
                        read += 1
                    except (BadImage, OSError):
                        continue
            except InputError as error:
                assert "\n" not in error.message, (name, case)
                refused += 1
            finally:
                signal.alarm(0)
            paths[n].write_bytes(originals[n])
        assert set(files_of(tmp_path)) == files, name
    signal.signal(signal.SIGALRM, before)
    assert refused > 500 and read > 500
