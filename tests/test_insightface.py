"""InsightFace's RecordIO and verification sets: every layout and pickle, damaged records, pickles that are bombs."""

import codecs
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from data_prep import InputError
from data_prep.format import Split
from data_prep.sources import insightface
from data_prep.verify import verify_split
from protocols.pairs import score_verification
from tests.test_data_prep import encode, picture, run_here

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
