"""Sources in InsightFace's formats, RecordIO training sets and pickled verification sets, read without MXNet."""

import io
import os
import pickle
import re
import struct
import warnings
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data_prep import InputError
from data_prep.format import BadImage, Record, Skipped, Source
from data_prep.records import reading
from data_prep.sources.archives import check_size, is_leftover, read_file
from data_prep.sources.faces import ten_folds, verification
from data_prep.sources.folders import labelled

# ---------------------------------------------------------------- RecordIO


MAGIC = struct.pack("<I", 0xCED7230A)
PART = struct.Struct("<4sI")  # magic, kind << 29 | length
HEADER = struct.Struct("<IfQQ")  # flag, label, two ids; flag > 0: that many float32 labels follow instead


def read_payload(file: int, offset: int) -> bytes:
    """One record of an open RecordIO file.

    Writers split a payload at every aligned magic number and drop it, so readers insert it between the parts (kinds: 0
    whole, 1 first, 2 middle, 3 last). Source: dmlc-core's recordio.h.
    """
    parts, total, kinds = [], 0, (0, 1)
    while True:
        block = os.pread(file, PART.size, offset)
        magic, word = PART.unpack(block) if len(block) == PART.size else (b"", 0)
        kind, length = word >> 29, word & (1 << 29) - 1
        if magic != MAGIC or kind not in kinds:
            raise BadImage("damaged record")
        total += len(MAGIC) + length
        check_size(total)
        parts.append(os.pread(file, length, offset + PART.size))
        if len(parts[-1]) != length:
            raise BadImage("damaged record")
        if kind in (0, 3):
            return MAGIC.join(parts)
        offset, kinds = offset + PART.size + length + -length % 4, (2, 3)


def split_payload(payload: bytes, length: int) -> tuple[tuple[float, ...], int]:
    """The labels (at most two) of a payload of `length` bytes, and the offset of its image."""
    if len(payload) < HEADER.size:
        raise BadImage("damaged record")
    count, label, *_ = HEADER.unpack_from(payload)
    start = HEADER.size + 4 * count
    seen = min(count, 2)
    if start > length or len(payload) < HEADER.size + 4 * seen:
        raise BadImage("damaged record")
    return (struct.unpack_from(f"<{seen}f", payload, HEADER.size) if count else (label,)), start


def peek(file: int, offset: int) -> tuple[tuple[float, ...], bool]:
    """The labels (at most two) of a record, and whether it holds an image, which is not read."""
    block = os.pread(file, PART.size + HEADER.size + 8, offset)
    magic, word = PART.unpack_from(block) if len(block) > PART.size else (b"", 0)
    if magic == MAGIC and word < 1 << 29:
        payload, length = block[PART.size : PART.size + word], word
    else:
        payload = read_payload(file, offset)
        length = len(payload)
    labels, start = split_payload(payload, length)
    return labels, length > start


def read_record(path: Path, offset: int) -> bytes:
    """The encoded image of one record."""
    with open(path, "rb") as file:
        payload = read_payload(file.fileno(), offset)
    return payload[split_payload(payload, len(payload))[1]:]


def read_offsets(rec: Path) -> Iterator[tuple[int, int]]:
    """(key, offset) of all records in the order of keys, from the .idx.

    Without an .idx, or if it gives several records the same key, keys number the records in file order.
    """
    idx = rec.with_suffix(".idx")
    if idx.exists() and idx.stat().st_size:
        what = f"{idx}: want `key<TAB>offset` lines, with offsets within {rec.name}"
        with reading(what, "; do the two files belong together?"), warnings.catch_warnings(action="ignore"):
            keys, starts = np.loadtxt(idx, dtype=np.int64, ndmin=2, comments=None).T
            if (outside := (starts < 0) | (starts >= rec.stat().st_size)).any():
                raise ValueError(f"line {outside.argmax() + 1}: {starts[outside][0]}")
        first = np.unique(starts, return_index=True)[1]  # each record once, in file order
        if repeats := len(np.unique(keys[first])) < len(first):  # im2rec from a list that numbers all images alike
            print(f"  note: {idx} gives several records the same key: they are numbered in the order of {rec.name}")
        for n, place in enumerate(first if repeats else first[np.argsort(keys[first])]):
            yield n if repeats else int(keys[place]), int(starts[place])
        return
    if idx.exists():
        print(f"  note: {idx} is empty: {rec.name} is read from end to end")
    key, offset = 0, 0
    with open(rec, "rb") as file:
        while len(block := os.pread(file.fileno(), PART.size, offset)) == PART.size:
            magic, word = PART.unpack(block)
            if magic != MAGIC:
                raise InputError(f"{rec}: no record at byte {offset}: damaged, or no RecordIO file")
            if word >> 29 < 2:  # whole or first part
                yield key, offset
                key += 1
            length = word & (1 << 29) - 1
            offset += PART.size + length + -length % 4


def recordio(src: Path, domain: str, train: bool) -> Source:
    """InsightFace RecordIO: `train.rec`, `train.idx` and `property` in a folder, or the .rec file itself.

    Every record with image bytes is an image of the person in its header. This covers the three layouts in use: a
    record 0 that declares (images + 1, images + 1 + people) and one record without image per person (MS1MV2, MS1MV3,
    Glint, CASIA); images only (WebFace, im2rec, shuffled); and RecBuilder's. Without the .idx, the whole file is read.
    A test split is scored as closed-set identification. Expected: CASIA 501,195 images of 10,572 people, MS1MV2
    5,822,653 of 85,742, WebFace4M 4,235,242 of 205,990, WebFace12M 12,720,066 of 617,970, WebFace42M 42,474,557 of
    2,059,906. Source: insightface, `arcface_torch/dataset.py`, `rec2shufrec.py`, `rec_builder.py`.
    """
    paths = [path for path in src.glob("*.rec") if not is_leftover(path.name, None)] if src.is_dir() else [src]
    rec = next((path for path in paths if path.name == "train.rec"), paths[0] if len(paths) == 1 else None)
    if rec is None or not rec.is_file():
        raise InputError(f"--src {src}: want a folder with train.rec (and train.idx, property), or one .rec file")
    keys, offsets, people, skipped, declared = array("q"), array("q"), array("q"), Skipped(), ()
    with open(rec, "rb") as file:
        for key, offset in read_offsets(rec):
            try:
                labels, image = peek(file.fileno(), offset)
            except BadImage as error:
                skipped.add(f"{rec.name}:{key}", str(error))
                continue
            if not image:
                declared = declared or (labels if key == 0 else (0, 0))
            elif not (labels[0].is_integer() and 0 <= labels[0] < 2**62):
                skipped.add(f"{rec.name}:{key}", "its label is not an integer")
            else:
                people.append(int(labels[0]))
                keys.append(key)
                offsets.append(offset)
    images = len(keys) + sum(skipped.values())
    if len(declared) == 2 and declared[1] > declared[0] > images + 1:
        raise InputError(f"{rec}: declares {declared[0] - 1:,.0f} images, but {images:,} exist: is it complete?")
    note = rec.with_name("property")
    classes = re.match(rb"(\d{1,9}),\d+,\d+", note.read_bytes()[:99]) if note.is_file() else None
    if classes and int(classes[1]) != len(set(people)):
        print(f"  note: {note} says {int(classes[1]):,} people, the records name {len(set(people)):,}")
    records = (Record(partial(read_record, rec, offset), f"{rec.name}:{key}", f"{person:07d}")
               for key, offset, person in zip(keys, offsets, people, strict=True))
    return labelled(records, domain, train, skipped, {})


# ---------------------------------------------------------------- verification sets


class Stand:
    """Stands in for a NumPy object of a verification set: keeps only the bytes that it is built from."""

    def __init__(self, *built_from) -> None:
        self.data = next((part for part in built_from if isinstance(part, bytes)), b"")

    def __setstate__(self, state) -> None:
        if isinstance(state, tuple) and state and isinstance(state[-1], (bytes, list)):
            self.data = state[-1]


class Opcodes(dict):
    """The permitted opcodes, and how many of them may still be read; a set of 7,000 pairs needs less than a tenth."""

    left = 5_000_000
    names = (
        "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 STRING "
        "BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
        "EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 PUT BINPUT LONG_BINPUT MEMOIZE GET "
        "BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD"
    )

    def __init__(self) -> None:
        super().__init__({code: pickle._Unpickler.dispatch[code]
                          for code in (getattr(pickle, name)[0] for name in self.names.split())})
        # read a bytearray as bytes: its own method allocates the declared size before reading
        self[pickle.BYTEARRAY8[0]] = pickle._Unpickler.load_binbytes8

    def __getitem__(self, code: int) -> Callable:
        self.left -= 1
        if self.left < 0 or code not in self:
            raise pickle.UnpicklingError(f"opcode {code:#x}" if self.left >= 0 else "too many parts")
        return super().__getitem__(code)


class Unpickler(pickle._Unpickler):
    """Reads only lists, tuples, bytes, strings, numbers and NumPy arrays of bytes.

    No library object is ever built: the few names in such files resolve to stand-ins, all others are refused. This
    restricts the unpickler in Python, because the one in C allocates any size that a small file declares. Without
    dictionaries and sets, nothing is hashed and no attribute is set.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self.dispatch = Opcodes()
        self.budget = len(data)

    def encode(self, text: str | bytes = b"", *_) -> bytes:
        """`_codecs.encode(text, "latin1")`, which is how Python 3 writes bytes for Python 2."""
        if isinstance(text, bytes):
            return text
        self.budget -= len(text)  # a short file must not multiply one text into many
        if not isinstance(text, str) or self.budget < 0:
            raise pickle.UnpicklingError("repeated text")
        return text.encode("latin1")

    def find_class(self, module: str | bytes, name: str | bytes) -> Callable:
        module, name = (word.decode("latin1") if isinstance(word, bytes) else word for word in (module, name))
        if module in ("_codecs", "builtins", "__builtin__") and name in ("encode", "bytes", "bytearray"):
            return self.encode
        if re.fullmatch(r"numpy(\._?core\.(multiarray|numeric))?", module) and name in (
            "_reconstruct", "_frombuffer", "scalar", "ndarray", "dtype"
        ):  # fmt: skip
            return Stand
        raise pickle.UnpicklingError(f"it refers to {f'{module}.{name}'!r}")


def bin(src: Path, domain: str, train: bool) -> Source:
    """InsightFace verification set: `lfw.bin`, `cfp_fp.bin`, `agedb_30.bin`, ...: pickled images and same/different.

    Pair p is images 2p and 2p + 1; ten consecutive parts are the folds. The file names no people: each genuine pair
    becomes a person, and so does each image of an impostor pair. Expected: lfw, calfw, cplfw, agedb_30 6,000 pairs,
    cfp_fp and cfp_ff 7,000. Source: insightface, `arcface_torch/eval/verification.py`.
    """
    if not src.is_file():
        raise InputError(f"--src {src}: want a verification file such as lfw.bin")
    with reading(f"--src {src}: not a verification set of images and booleans",
                 ": refused, and nothing in it was executed"):
        content = Unpickler(read_file(src)).load()
    images, same = content if isinstance(content, (tuple, list)) and len(content) == 2 else (None, None)
    images = images.data if isinstance(images, Stand) else images
    same = list(same.data) if isinstance(same, Stand) else same  # a NumPy array of booleans
    if not (isinstance(images, (list, tuple)) and isinstance(same, (list, tuple)) and len(images) == 2 * len(same)):
        raise InputError(f"--src {src}: want 2 P images and P booleans; is this a verification set?")
    records, pairs = [], []
    for p, (flag, fold) in enumerate(zip(same, ten_folds(len(same)), strict=True)):
        genuine = int(any(flag.data) if isinstance(flag, Stand) else bool(flag))
        for i in (2 * p, 2 * p + 1):
            image = images[i].data if isinstance(images[i], Stand) else images[i]
            person = f"{src.stem}-{p:05d}" + ("" if genuine else "ab"[i % 2])
            image = image if isinstance(image, bytes) else b""  # empty: skipped as unreadable when the shard is written
            records.append(Record(partial(bytes, image), f"{src.name}:{i}", person))
        pairs.append((2 * p, 2 * p + 1, genuine, fold))
    return verification(records, pairs, f"--src {src}")
