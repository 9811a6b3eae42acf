"""Sources of faces: test sets of pairs (LFW and similar ones), of templates (IJB-B, IJB-C) and TinyFace."""

import io
import posixpath
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

import click
import numpy as np
from PIL import Image

from data_prep import InputError
from data_prep.format import BadImage, Record, Skipped, Source
from data_prep.records import read_rows, reading
from data_prep.sources.archives import Member, absent
from data_prep.sources.folders import Only, scan
from data_prep.sources.lists import Files, check_found
from data_prep.write import as_rgb, open_image


def read_pairs(path: Path) -> list[tuple[tuple[str, int], tuple[str, int], int, int]]:
    """Parse pairs.txt: ((name, image), (name, image), same, fold) of every pair.

    Line 1 is `folds<TAB>n` (or `n`: one fold); then each fold has n lines `name i j` (same person) and n lines
    `name1 i name2 j` (different people). Kaggle's form is CSV with a header instead of line 1.
    """
    rows = read_rows(path, "--pairs")
    for _, row in rows:
        while row and not row[-1]:  # a line of Kaggle's form may end in commas
            row.pop()
    head = " ".join(rows[0][1]).split() if rows else []
    counts = [int(word) for word in head if re.fullmatch(r"[1-9]\d{0,8}", word)]
    official, header = 0 < len(head) == len(counts) < 3, len(head) > 2 and not counts
    if not (official or header):
        raise InputError(f"--pairs {path}, line 1: want `folds<TAB>pairs per half`, found {' '.join(head)[:60]!r}")
    pairs, fold = [], 0
    for where, words in rows[1:]:
        if not words:
            continue
        if len(words) not in (3, 4) or not all([*words, *(re.fullmatch(r"\d{1,9}", words[i]) for i in (1, -1))]):
            raise InputError(f"{where}: want `name i j` or `name1 i name2 j`, found {' '.join(words)[:60]!r}")
        same = int(len(words) == 3)
        fold += bool(pairs) and same > pairs[-1][2]  # in CSV a fold begins where genuine pairs begin again
        pairs.append(((words[0], int(words[1])), (words[0 if same else 2], int(words[-1])), same, fold))
    if header:
        return pairs
    folds, half = (1, *counts)[-2:]
    if len(pairs) != 2 * folds * half:
        raise InputError(f"--pairs {path}: line 1 announces {folds} folds of 2 x {half} pairs, there are {len(pairs)}")
    return [(left, right, same, place // (2 * half)) for place, (left, right, same, _) in enumerate(pairs)]


def verification(records: list[Record], pairs: list[tuple[int, int, int, int]], where: str, **more) -> Source:
    """The source that is scored by these pairs; InputError if there are none, or most are of images that it lacks."""
    if not pairs:
        raise InputError(f"{where}: contains no pairs")
    check_found(((records[a], records[b]) for a, b, *_ in pairs), where)
    return Source(records, {"name": "verification", "folds": len({fold for *_, fold in pairs})}, pairs, **more)


def ten_folds(pairs: int) -> list[int]:
    """The fold of each pair if a list has none: ten consecutive parts, as in scikit-learn's KFold without shuffling."""
    return np.repeat(np.arange(10), [len(part) for part in np.array_split(np.arange(pairs), 10)]).tolist()


def deal_folds(same: np.ndarray) -> np.ndarray:
    """Ten consecutive folds of pairs; every tenth pair instead, if a fold would lack genuine or impostor pairs."""
    folds = np.array(ten_folds(len(same)), dtype=np.int64)
    return folds if len(set(zip(folds.tolist(), same.tolist(), strict=True))) == 20 else np.arange(len(same)) % 10


@click.option("--pairs", cls=Only, only="test splits", type=click.Path(path_type=Path),
              help="pairs.txt of LFW or in its format.")
def lfw(src: Path, domain: str, train: bool, pairs: Path | None = None) -> Source:
    """Labeled Faces in the Wild: person folders `<Name>/<Name>_0001.jpg` and, for a test split, its `pairs.txt`.

    A test split is scored by verification on the pairs, by fold. Expected: 13,233 images of 5,749 people; 6,000 pairs
    in 10 folds. Source: Huang et al. 2007; facenet, `src/lfw.py`.
    """
    skipped = Skipped()
    if train:
        return Source((Record(file.read, file.name, name) for name, file in scan(src, skipped)), skipped=skipped)
    if pairs is None:
        raise InputError("lfw: a test split needs --pairs pairs.txt; without one, use the source `folder`")
    records, place = [], {}
    for name, member in scan(src, skipped):
        path = PurePosixPath(member.name)
        # only in a folder named after the person, at any depth; files aligned with MTCNN end in _0
        match = re.fullmatch(re.escape(path.parent.name) + r"_(\d+)(_0)?", path.stem)
        if match:
            name, key = path.parent.name, (path.parent.name, int(match[1]))
            if (other := place.setdefault(key, len(records))) != len(records):
                raise InputError(f"--src {src}: two images of {key[0]} {key[1]}, {records[other].name} and "
                                 f"{member.name}: give the folder of one version of the set")
        records.append(Record(member.read, member.name, name))
    listed = []
    for left, right, same, fold in read_pairs(pairs):
        for name, number in (left, right):
            if (name, number) not in place:
                place[name, number] = len(records)
                records.append(Record(absent, f"{name}/{name}_{number:04d}", name))
        listed.append((place[left], place[right], same, fold))
    return verification(records, listed, f"--pairs {pairs}", skipped=skipped)


# ---------------------------------------------------------------- lists of pairs


FLAGS = {"1": 1, "true": 1, "0": 0, "-1": 0, "false": 0}
# (left, right, same, fold or None, position in the list for messages)
Pair = tuple[str, str, int, int | None, str]


def list_pairs(path: Path) -> list[Pair]:
    """The pairs of a list in one of the usual formats, recognised by the first line.

    `left,right,same[,fold]`, with a header or not; `same left right` (the `*_ann.txt` of AgeDB-30, CALFW, CPLFW);
    `name same`, two lines per pair (the original lists of CALFW and CPLFW). Separators are commas, tabs or blanks.
    """
    rows, flags = read_rows(path, "--pairs"), FLAGS
    if rows and len(rows[0][1]) > 2 and not {rows[0][1][0].lower(), rows[0][1][2].lower()} & set(flags):
        del rows[0]  # the header
    first = rows[0][1] if rows else []
    if len(first) == 2:
        if len(rows) % 2:
            raise InputError(f"--pairs {path}: {len(rows)} lines of `name same`: want two per pair")
        rows = [(where, [*a[:-1], *b]) for (where, a), (_, b) in zip(rows[::2], rows[1::2], strict=True)]
        flags = {str(fold): 1 for fold in range(2, 11)} | FLAGS  # CALFW has the fold of a genuine pair instead of 1
    elif len(first) == 3 and first[0].lower() in flags and first[2].lower() not in flags:
        rows = [(where, [*row[1:], row[0]]) for where, row in rows]
    pairs = []
    for where, row in rows:
        left, right, same, fold = (*row, "0")[:4] if len(row) in (3, 4) else ("", "", "", "")
        if same.lower() not in flags or not re.fullmatch(r"\d{1,9}", fold):
            raise InputError(f"{where}: want `left,right,same[,fold]`, `same left right` or `name same`, found "
                             f"{' '.join(row)[:60]!r}")
        pairs.append((left, right, flags[same.lower()], int(fold) if len(row) == 4 else None, where))
    return pairs


def cfp_pairs(files: Files, kind: str) -> list[Pair]:
    """The pairs of Celebrities in Frontal-Profile: `Protocol/Split/FP/01/same.txt` has lines `i,j`.

    i and j number, from 1, the lines `1 ../Data/...` of `Protocol/Pair_list_F.txt` and, for j of FP, `Pair_list_P.txt`.
    """
    names = {}
    for side in "FP":
        list_file = f"Protocol/Pair_list_{side}.txt"
        rows = [line.split() for _, line in files.read_lines(list_file)] if list_file in files else []
        names[side] = {row[0]: posixpath.normpath(f"Protocol/{row[1]}") for row in rows if len(row) == 2}
    pairs = []
    for name in sorted(name for name in files if re.fullmatch(rf"Protocol/Split/{kind}/\d+/(same|diff)\.txt", name)):
        for where, line in files.read_lines(name):
            i, _, j = (word.strip() for word in line.partition(","))
            if i not in names["F"] or j not in names[kind[1]]:
                raise InputError(f"{where}: want `i,j` of the lists Protocol/Pair_list_*.txt, found {line[:60]!r}")
            same = int(name.endswith("same.txt"))
            pairs.append((names["F"][i], names[kind[1]][j], same, int(name.split("/")[3]), where))
    return pairs


def join(count: int, links: Iterable[tuple[int, int]]) -> list[int]:
    """For each of `count` items, the first one in its connected component of `links`."""
    from scipy.sparse import coo_array  # imported late: it takes a second
    from scipy.sparse.csgraph import connected_components

    a, b = np.array(list(links), dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(count, count))
    group = connected_components(graph, directed=False)[1]
    return np.unique(group, return_index=True)[1][group].tolist()


def name_people(names: list[str], pairs: list[tuple[int, int, int, int]]) -> list[str]:
    """The person on each image: from folder or file names if these agree with all pairs, otherwise as pairs link them.

    Tries folders from the outermost inwards, then file names as in AgeDB (`7_Name_35_f.jpg`) and LFW (`Name_0001.jpg`).
    """
    folders, stems = [name.split("/")[:-1] for name in names], [PurePosixPath(name).stem for name in names]
    depths = range(1, min(map(len, folders), default=0) + 1)
    guesses = [["/".join(parts[:depth]) for parts in folders] for depth in depths]
    for pattern in (r"\d+_(.+)_\d+_[mf]", r"(.+)_\d+"):
        guesses.append([match[1] if (match := re.fullmatch(pattern, stem)) else stem for stem in stems])
    for people in guesses:
        if all((people[a] == people[b]) == (same == 1) for a, b, same, _ in pairs):
            return people
    linked = join(len(names), ((a, b) for a, b, same, _ in pairs if same))
    if wrong := [(a, b) for a, b, same, _ in pairs if not same and linked[a] == linked[b]]:
        raise InputError(f"--pairs: {names[wrong[0][0]]!r} and {names[wrong[0][1]]!r} are one person by some lines and "
                         "different people by another: correct the list")
    return [names[i] for i in linked]


@click.option("--pairs", type=click.Path(path_type=Path), required=True, metavar="FILE|FP|FF",
              help="List of pairs; FP or FF: the lists of CFP.")
def pairs(src: Path, domain: str, train: bool, pairs: Path) -> Source:
    """Images with a list of pairs: AgeDB-30, CALFW, CPLFW, CFP-FP, CFP-FF, or your own `left,right,same[,fold]`.

    `--pairs` is the list, as CSV or in the formats of those sets, with names relative to --src; or FP or FF, if --src
    is CFP itself (`Data/Images/001/frontal/01.jpg`, `Protocol/Split/...`). Without folds, ten consecutive parts are the
    folds, or every tenth pair if a part would lack genuine or impostor pairs. Only listed images are written.
    Expected: AgeDB-30, CALFW, CPLFW 6,000 pairs, CFP-FP and CFP-FF 7,000 each.
    Source: Moschoglou et al. 2017; Zheng et al. 2017, 2018; Sengupta et al. 2016.
    """
    files = Files(src)
    if str(pairs) in ("FF", "FP") and any(name.startswith(f"Protocol/Split/{pairs}/") for name in files):
        listed = cfp_pairs(files, str(pairs))
    else:
        listed = list_pairs(pairs)
    folds = {fold for *_, fold, _ in listed}
    dealt = None in folds
    fold_numbers = {} if dealt else {fold: number for number, fold in enumerate(sorted(folds))}
    rows, place = [], {}
    for left, right, same, fold, where in listed:
        ends = [files.find(name, where) for name in (left, right)]
        rows.append((*(place.setdefault(end, len(place)) for end in ends), same, fold_numbers.get(fold, 0)))
    people = name_people([member.name for member in place], rows)
    records = [Record(member.read, member.name, person) for member, person in zip(place, people, strict=True)]
    return verification(records, rows, f"--pairs {pairs}", deal=deal_folds if dealt else None)


# ---------------------------------------------------------------- search among distractors


def tinyface(src: Path, domain: str, train: bool) -> Source:
    """TinyFace: `Training_Set/<id>/*.jpg`; `Testing_Set/{Probe,Gallery_Match,Gallery_Distractor}/*.jpg`.

    The person of a probe or match is the number before the first _ of its file name; distractors match nobody. A test
    split is scored as closed-set identification, with distractors in the gallery. Expected: 7,804 training images of
    2,570 people; 3,728 probes, 4,443 matches, 153,428 distractors.
    Source: Cheng et al. 2018; AdaFace, `validation_lq/tinyface_helper.py`.
    """
    kinds = "Probe", "Gallery_Match", "Gallery_Distractor"
    pattern = (r"Training_Set/(?P<person>[^/]+)/.+" if train else
               r"Testing_Set/(?P<kind>Gallery_Distractor/.+|(Probe|Gallery_Match)/(?P<person>\d+)_.*)")
    folders = "Training_Set/" if train else tuple(f"Testing_Set/{kind}/" for kind in kinds)
    files = Files(src)
    records = [Record(member.read, member.name, m["person"],
                      role=None if train else kinds.index(m["kind"].partition("/")[0]))
               for m, member in files.images(re.compile(pattern), "TinyFace", folders)]
    if not records or (not train and {record.role for record in records} < {0, 1}):
        raise InputError(f"--src {src}: no images of TinyFace in it; want Training_Set/<id>/ and Testing_Set/ with "
                         "Probe, Gallery_Match and Gallery_Distractor")
    return Source(records, None if train else {"name": "identification"}, skipped=files.skipped)


# ---------------------------------------------------------------- templates


# positions of eyes, tip of the nose and corners of the mouth in an aligned face of 112 x 112 pixels
LANDMARKS = np.array([38.2946 + 51.6963j, 73.5318 + 51.5014j, 56.0252 + 71.7366j, 41.5493 + 92.3655j,
                      70.7299 + 92.2041j])  # as x + i y


def align(read: Callable[[], bytes], points: tuple[float, ...]) -> bytes:
    """A face aligned to 112 x 112 pixels, black outside the picture.

    The similarity transform is the least-squares fit of w = s z + t over the points z, as complex numbers x + i y.
    `points`: x and y of five landmarks, in pixels (0: centre of the first pixel). Source: insightface, `face_align.py`.
    """
    image, _ = open_image(read())
    z = np.array(points[::2]) + 1j * np.array(points[1::2])
    centred = z - z.mean()
    spread = (abs(centred) ** 2).sum()
    s = (centred.conj() * LANDMARKS).sum() / spread if spread > 0 else 0.0
    if not (np.isfinite(s) and abs(s) > 1e-6):
        raise BadImage("landmarks that are no face")
    half = 0.5 + 0.5j  # Pillow's 0 is the corner of the first pixel
    back, shift = 1 / s, z.mean() - (LANDMARKS.mean() + half) / s + half
    turn = (back.real, -back.imag, shift.real, back.imag, back.real, shift.imag)
    out = io.BytesIO()
    as_rgb(image).transform((112, 112), Image.Transform.AFFINE, turn, Image.Resampling.BILINEAR).save(out, "BMP")
    return out.getvalue()


def read_columns(files: Files, name: str, kind: type, columns: tuple[int, ...], **layout) -> np.ndarray:
    """Columns of a list, [rows, columns]: of str, of finite float, or of int from 0 (-1 means no value) to 2³¹ - 1.

    `layout`: further arguments of `np.loadtxt`. An array, because IJB-C has 15 million pairs.
    """
    what = f"{files.src}/{name}: want {kind.__name__} in the columns {columns}"
    with reading(what), warnings.catch_warnings(action="ignore"):  # about blank lines
        data = io.BytesIO(files[name].read() or b"nothing")
        table = np.loadtxt(data, kind, comments=None, usecols=columns, ndmin=2, encoding="utf-8-sig", **layout)
        least = 0 if kind is int else -(1 << 31)
        if kind is not str and len(table) and not least <= table.min() <= table.max() < 1 << 31:
            raise ValueError("a number out of range")
        return table


def template_people(templates: set[int], genuine: list[list[int]], subjects: dict[int, int]) -> dict[int, str]:
    """The person of each template: its subject in the 1:N lists, that of a template it is paired with, or a new one."""
    ids = sorted(templates | {template for pair in genuine for template in pair})
    place = {template: i for i, template in enumerate(ids)}
    linked = join(len(ids), ((place[a], place[b]) for a, b in genuine))
    known = {linked[place[template]]: subject for template, subject in subjects.items() if template in place}
    named = (subjects.get(template, known.get(root)) for template, root in zip(ids, linked, strict=True))
    return {template: f"template-{ids[root]:06d}" if subject is None else f"{subject:06d}"
            for template, root, subject in zip(ids, linked, named, strict=True)}


def ijb(src: Path, domain: str, train: bool) -> Source:
    """IJB-B and IJB-C as packed by InsightFace: `loose_crop/<n>.jpg` or `aligned/<n>.jpg`, and `meta/ijbc_*.txt`.

    Loose crops are aligned by their five landmarks. Every image has a template, a media number and the detector's score
    (column `quality`). The lists `template_pairs`, `template_gallery` and `template_probes` hold the 1:1 protocol and,
    if `meta` has it, the 1:N protocol. Expected: IJB-B 227,630 images, 12,115 templates, 8,010,270 pairs; IJB-C 469,375
    images, 23,124 templates, 15,658,489 pairs, galleries of 1,772 and 1,759 templates, 19,593 probes.
    Source: insightface, `_evaluation_/ijb/ijb_evals.py`.
    """
    files = Files(src)
    matches = [re.fullmatch(r"(meta/\w+_)face_tid_mid\.txt", name) for name in files]
    stem = next((match[1] for match in matches if match), None)
    if stem is None or f"{stem}template_pair_label.txt" not in files:
        raise InputError(f"--src {src}: no meta/ijbc_face_tid_mid.txt and meta/ijbc_template_pair_label.txt (or ijbb): "
                         "prepare IJB-B and IJB-C separately, each from its own folder")
    listed, landmarks, faces = f"{stem}face_tid_mid.txt", f"{stem}name_5pts_score.txt", {}
    names, ids = read_columns(files, listed, str, (0,)), read_columns(files, listed, int, (1, 2))
    images = [(name, *numbers) for name, numbers in zip(names[:, 0].tolist(), ids.tolist(), strict=True)]
    if landmarks in files:
        scores = read_columns(files, landmarks, float, tuple(range(1, 12))).tolist()
        faces = dict(zip(read_columns(files, landmarks, str, (0,))[:, 0].tolist(), scores, strict=True))
    tops = {name.partition("/")[0] for name in files}
    crops = next((top for top in sorted(tops) if top.startswith("aligned")), "loose_crop")
    pairs = read_columns(files, f"{stem}template_pair_label.txt", int, (0, 1, 2))
    if not np.isin(pairs[:, 2], (0, 1)).all():
        raise InputError(f"{src}/{stem}template_pair_label.txt: want `template template same` lines, same 0 or 1")
    galleries, probes = (
        [dict(read_columns(files, name, int, (0, 1), delimiter=",", skiprows=1).tolist()) for name in sorted(files)
         if re.fullmatch(rf"{stem}1N_{kind}\.csv", name)] for kind in (r"gallery_[GS]\d", "probe_mixed"))
    subjects = {template: subject for table in galleries + probes for template, subject in table.items()}
    people = template_people({t for _, t, _ in images}, pairs[pairs[:, 2] == 1, :2].tolist(), subjects)

    def records() -> Iterator[Record]:
        for name, template, media in images:
            member = files.get(f"{crops}/{name}") or Member(f"{crops}/{name}", absent)
            read, score = member.read, None
            if read is not absent:
                *points, score = faces.get(name, (None,))
                if crops == "loose_crop" and not points:
                    raise InputError(f"{src}/{landmarks}: no landmarks for {name!r}, which aligning a loose crop needs")
                read = partial(align, read, tuple(points)) if crops == "loose_crop" else read
            yield Record(read, member.name, people[template], template=template, media=media, quality=score)

    check_found(zip(records()), f"{src}/{listed}")
    tables = {"template_pairs": pairs}
    if galleries and probes:
        tables["template_gallery"] = np.array([(t, g) for g, table in enumerate(galleries) for t in sorted(table)])
        tables["template_probes"] = np.array([[t] for table in probes for t in sorted(table)])
    protocol = {"name": "templates", "pairs": len(pairs), "galleries": len(galleries) if probes else 0}
    return Source(records(), protocol, tables=tables, listed=True)
