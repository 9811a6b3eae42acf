"""Lists of pairs of faces: LFW's pairs.txt as people have it, lists of many styles, CFP."""

from pathlib import Path

import numpy as np
import pytest

from data_prep import InputError
from data_prep.format import Split
from data_prep.sources import faces
from data_prep.sources.faces import lfw, read_pairs
from data_prep.verify import verify_split
from tests.test_archives import pack
from tests.test_data_prep import PAIRS, encode, lfw_folder, picture, run_here
from tests.test_insightface import crop

# ---------------------------------------------------------------- LFW


def test_lfw_pairs_become_rows(tmp_path):
    (tmp_path / "pairs.txt").write_text(PAIRS)
    out = tmp_path / "d/face_hq/lfw"
    run_here("lfw", "--src", lfw_folder(tmp_path / "src"), "--pairs", tmp_path / "pairs.txt", "--out", out)
    split = Split(out)
    assert split.size == 36 and split.protocol == {"name": "verification", "folds": 2, "pairs": 4, "pairs_lost": 0}
    # source order: P_0 1..3 are rows 0..2, P_1 are 3..5, ...
    assert split.column("pairs").tolist() == [[0, 2, 1, 0], [0, 4, 0, 0], [7, 6, 1, 1], [9, 8, 0, 1]]
    assert verify_split(out) == []


def test_pairs_of_a_damaged_image_are_left_out_and_counted(tmp_path, capsys):
    (tmp_path / "pairs.txt").write_text(PAIRS)
    (lfw_folder(tmp_path / "src") / "P_0" / "P_0_0001.jpg").write_bytes(b"damaged")
    run_here("lfw", "--src", tmp_path / "src", "--pairs", tmp_path / "pairs.txt", "--out", tmp_path / "d/face_hq/lfw")
    split = Split(tmp_path / "d/face_hq/lfw")
    assert split.column("pairs").tolist() == [[6, 5, 1, 1], [8, 7, 0, 1]] and split.protocol["pairs_lost"] == 2
    assert "2 pairs left out" in capsys.readouterr().out


@pytest.mark.parametrize("text, words", [
    (PAIRS.replace("P_0", "P_7").replace("P_3", "P_7"), ": 3 of 4 entries"),
    (PAIRS.replace("P_", "Q_"), "such as 'Q_0/Q_0_0001'"),
    ("", "line 1: want"), ("pairs\n" + PAIRS, "line 1: want"), ("10\t300\n", "announces 10 folds"),
    (PAIRS.replace("P_2\t2\t1", "P_2\t2"), "line 4: want `name i j`"),
    ("name,imagenum1,imagenum2,\nP_0,1,3,\nP_0,1,,2\n", "line 3: want `name i j`"),
])  # fmt: skip
def test_bad_pairs_files(text, words, tmp_path):
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(InputError) as error:
        lfw(lfw_folder(tmp_path / "src"), "face_hq", False, tmp_path / "pairs.txt")
    assert words in error.value.message


CSV = "name,imagenum1,imagenum2,\nP_0,1,3,\nP_0,1,P_1,2\nP_2,2,1,\nP_3,1,P_2,3\n"


@pytest.mark.parametrize("text", [PAIRS, "\ufeff" + PAIRS.replace("\n", "\r\n"), PAIRS.replace("\t", "  "),
                                  PAIRS.replace("\n", "\t\n"), PAIRS.replace("P_", " P_").replace("\t", " \t"), CSV])
@pytest.mark.parametrize("layout", ["plain", "nested", "mtcnn", "missing", "old"])
def test_lfw_as_people_have_it(text, layout, tmp_path, capsys):
    """Official, Kaggle's double folder and CSV, MTCNN's names, one face that a detector missed, an older copy below."""
    (tmp_path / "pairs.txt").write_text(text, encoding="utf-8", newline="")
    src = lfw_folder(tmp_path / "src" / ("lfw/lfw" if layout == "nested" else ""))
    lost = [src / "P_1/P_1_0002.jpg"] if layout == "missing" else []
    for path in sorted(src.rglob("*.jpg")):
        if layout == "old":
            (path.parent / "old").mkdir(exist_ok=True)
            (path.parent / "old" / path.name).write_bytes(encode(picture(999, 36, 36)))
        elif layout == "mtcnn":
            path.rename(path.with_name(f"{path.stem}_0.jpg"))
        elif path in lost:
            path.unlink()
    run_here("lfw", "--src", tmp_path / "src", "--pairs", tmp_path / "pairs.txt", "--out", tmp_path / "d/face_hq/lfw")
    split, found = Split(tmp_path / "d/face_hq/lfw"), []
    of = {encode(picture(10 * p + i, 36, 36)): f"P_{p} {i}" for p in range(4) for i in range(1, 4)}
    for left, right, same, fold in split.column("pairs").tolist():
        found.append((of[split.jpeg(left)[1]], of[split.jpeg(right)[1]], same, fold))
    pairs = [("P_0 1", "P_0 3", 1, 0), ("P_0 1", "P_1 2", 0, 0), ("P_2 2", "P_2 1", 1, 1), ("P_3 1", "P_2 3", 0, 1)]
    assert found == [pair for pair in pairs if not lost or "P_1 2" not in pair]
    assert split.protocol["pairs_lost"] == len(lost) and verify_split(split.folder) == []
    assert ("1: listed, but not in the source" in capsys.readouterr().out) == bool(lost)


def test_two_versions_of_lfw_are_not_mixed(tmp_path):
    (tmp_path / "pairs.txt").write_text(PAIRS)
    for name in ("lfw", "lfw-deepfunneled"):
        lfw_folder(tmp_path / "src" / name)
    with pytest.raises(InputError, match=r"two images of P_0 1, lfw.* and lfw.*: give the folder of one version"):
        run_here("lfw", "--src", tmp_path / "src", "--pairs", tmp_path / "pairs.txt", "--out", tmp_path / "d/face_hq/x")


def test_pairs_file_of_one_fold(tmp_path):
    for text in ("1\nP_0 1 2\nP_0 1 P_1 1\n", "1 1\nP 0\t1\t2\nP 0\t1\tP 1\t1\n"):
        (tmp_path / "pairs.txt").write_text(text)
        a, b = ("P_0", "P_1") if "_" in text else ("P 0", "P 1")
        assert [p[:4] for p in read_pairs(tmp_path / "pairs.txt")] == [((a, 1), (a, 2), 1, 0), ((a, 1), (b, 1), 0, 0)]


# ---------------------------------------------------------------- other lists


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
