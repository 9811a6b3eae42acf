"""TinyFace and IJB, a tiny instance of each and its known answer; damaged files of every published layout of faces."""

import io
import pickle
import re
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
from data_prep import InputError
from data_prep.format import BadImage, Split, open_root
from data_prep.sources import faces, folders, insightface
from data_prep.verify import verify_split
from data_prep.write import fit_image
from protocols.search import score_gallery
from protocols.templates import score_templates
from tests.test_archives import pack
from tests.test_data_prep import PAIRS, encode, files_of, lfw_folder, picture, run_here
from tests.test_insightface import (
    BIN_IMAGES,
    SAME,
    classic,
    contents,
    crop,
    pack_label,
    python2,
    record,
    with_magic,
    write_rec,
)
from tests.test_pair_lists import CODES, PAIR_LISTS, write_images

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


# ---------------------------------------------------------------- bad input


def write_list(folder: Path, text: str = "k.jpg,l.jpg,1\nk.jpg,m.jpg,0\n") -> Path:
    (folder / "list.csv").write_text(text)
    return folder / "list.csv"


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
    "idx beyond": (rec_of(record(IMAGE), "0\t9999\n"), "lines, with offsets within train.rec (line 1: 9999)"),
    "idx of words": (rec_of(record(IMAGE), "0\t0\nkey\tword\n"), "train.idx: want `key<TAB>offset` lines"),
    "idx negative": (rec_of(record(IMAGE), "0\t-8\n"), "train.rec (line 1: -8)"),
    "incomplete": (rec_of(record(pack_label([1001.0, 1005.0])) + record(IMAGE)), "declares 1,000 images, but 1 exist"),
    "all damaged": (rec_of(record(b"short")), "damaged record"),
    "bin is a folder": (lambda folder: ["bin", "--src", folder], "want a verification file"),
    "bin is text": (bin_of(b"images"), "not a verification set"), "empty bin": (bin_of(b""), "not a verification set"),
    "cut bin": (bin_of(pickle.dumps((BIN_IMAGES, SAME))[:-500]), "not a verification set"),
    "bin of a number": (bin_of(pickle.dumps(5)), "want 2 P images and P booleans"),
    "odd bin": (bin_of(pickle.dumps((BIN_IMAGES[:3], SAME[:2]))), "want 2 P images and P booleans"),
    "bin of a dictionary": (bin_of(pickle.dumps({"bins": 1})), "opcode 0x7d"),
    "bin without pairs": (bin_of(pickle.dumps(([], []))), "contains no pairs"),
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
    "IJB pairs of two": (ijb_of("template_pair_label.txt", "1 2\n"), "want int in the columns (0, 1, 2)"),
    "IJB pairs of words": (ijb_of("template_pair_label.txt", "1 x 1\n"), "want int in the columns (0, 1, 2)"),
    "IJB pairs of nothing": (ijb_of("template_pair_label.txt", ""), "want int in the columns (0, 1, 2)"),
    "IJB missing image": (ijb_of("face_tid_mid.txt", "9.jpg 1 1\n"), "1 of 1 entries name images that the source"),
    "IJB climbing": (ijb_of("face_tid_mid.txt", "../meta/ijbc_face_tid_mid.txt 1 1\n"), "that the source lacks"),
    "IJB short line": (ijb_of("face_tid_mid.txt", "1.jpg 1\n"), "ijbc_face_tid_mid.txt: want int in the"),
    "IJB large number": (ijb_of("face_tid_mid.txt", f"1.jpg 1 {1 << 70}\n"), "tid_mid.txt: want int in the columns"),
    "IJB not finite": (ijb_of("name_5pts_score.txt", "1.jpg" + " nan" * 11), "5pts_score.txt: want float in the"),
    "IJB no landmarks": (ijb_of("name_5pts_score.txt", f"2.jpg {FIVE} 1\n"), "no landmarks for '1.jpg'"),
    "IJB gallery": (ijb_of("1N_gallery_G1.csv", "a,b\nx,1\n"), "ijbc_1N_gallery_G1.csv: want int in the"),
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
    with pytest.raises(InputError, match=f"^{source} is for test splits, not for training splits"):
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
