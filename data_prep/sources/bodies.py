"""Sources of bodies: Market-1501 and sets with its file names, MSMT17, sets with changes of clothes, CSV.

All test splits are scored by re-identification ("reid"): probes are searched in gallery and distractors, and gallery
images of the probe's person and camera are ignored. A set's other published ways of scoring are "variants" of its
protocol, of which the first is over the whole gallery and which need the columns camera and clothes:

    general         the rule itself (Market-1501)
    cross-clothes   also ignored: same person, same clothes
    same-clothes    also ignored: same person, other clothes
    ... single-shot the gallery is one random image per person, averaged over `draws` (mAP means little there)
    ... single-gallery-shot  the same, drawn for every probe separately after ignored images are removed (CUHK03)
"""

import re
from collections.abc import Callable, Iterable
from itertools import compress
from pathlib import Path

import click

from data_prep import InputError
from data_prep.format import ROLES, Record, Skipped, Source
from data_prep.records import read_table
from data_prep.sources.folders import OPEN_SET, Only, strangers
from data_prep.sources.lists import Files, below, check_found

VAL = click.option("--val", cls=Only, only="test splits", is_flag=True,
                   help="Use the validation images for the test split.")
SINGLE_GALLERY_SHOT = click.option(
    "--single-gallery-shot", cls=Only, only="test splits", is_flag=True, default=None,
    help="Also score a test split by CUHK03's rule: one random gallery image per person, drawn for every probe, ten "
         "times.")
MARKET_NAME = re.compile(r"[^/]+/(-1|\d+)_c(\d{1,9})[^/]*")


@SINGLE_GALLERY_SHOT
def market(src: Path, domain: str, train: bool, single_gallery_shot: bool | None = None) -> Source:
    """Market-1501: `bounding_box_train`, or `query` and `bounding_box_test`; files `0002_c1s1_000451_03.jpg`.

    Person -1 is junk and left out; images of person 0000 are distractors, gallery images without a match. Cameras
    count from 0. Expected: 12,936 training images; 3,368 queries, 15,913 in the gallery, 3,819 junk. DukeMTMC-reID,
    which its authors have withdrawn, has the same layout: 16,522, 2,228 and 17,661, no junk.
    Source: the readers of torchreid and fast-reid.
    """
    folders = ("bounding_box_train",) if train else ("query", "bounding_box_test")
    files = below(src, "Market-1501 has bounding_box_train, bounding_box_test and query", folders[0])
    records = []
    for role, folder in enumerate(folders):
        for m, member in files.images(MARKET_NAME, "Market-1501", f"{folder}/"):
            distractor = m[1].strip("0") == ""
            if m[1] == "-1":
                files.skipped.add(member.name, "junk (person -1)")
            elif distractor and role != 1:
                files.skipped.add(member.name, "distractor (person 0) outside the gallery")
            else:
                records.append(Record(member.read, member.name, None if distractor else m[1], camera=int(m[2]) - 1,
                                      role=None if train else 2 if distractor else role))
    return reid(files, records, train, single_gallery_shot)


def reid(files: Files, records: list[Record], train: bool, single_gallery_shot: bool | None, listed: bool = False,
         **protocol) -> Source:
    """The source of these records; InputError if a test split lacks probes or a gallery.

    `listed`: a list names the images, so that other files are not skipped ones.
    """
    check_found(zip(records), f"--src {files.src}")
    for role in (0, 1) if not train else ():
        if not any(record.role == role for record in records):
            raise InputError(f"--src {files.src}: no {ROLES[role]} images for the test split")
    protocol = {"name": "reid", **protocol}
    if single_gallery_shot:
        first, *others = protocol.get("variants", ["general"])
        protocol = {"draws": 10} | protocol | {"variants": [first, *others, f"{first} single-gallery-shot"]}
    skipped = Skipped() if listed else files.skipped
    return Source(records, None if train else protocol, skipped=skipped, listed=listed)


def number(values: Iterable) -> Callable[[object], int]:
    """Numbers for cameras or clothes with names: a function from a value to its place among the sorted ones."""
    return {value: i for i, value in enumerate(sorted(set(values)))}.__getitem__


MSMT17_LINE = re.compile(r"(?P<path>(?:.*/)?\d+_\d+_(?P<camera>\d{1,4})_[^/]*) (?P<person>\d{1,9})")


@SINGLE_GALLERY_SHOT
@click.option("--with-val", cls=Only, only="training splits", is_flag=True,
              help="Add the images of list_val.txt to a training split.")
def msmt17(src: Path, domain: str, train: bool, with_val: bool, single_gallery_shot: bool | None) -> Source:
    """MSMT17: `train`, `test` (V2: `mask_train_v2`, `mask_test_v2`) and `list_{train,val,query,gallery}.txt`.

    A line is `0000/0000_000_01_0303morning_0015_0.jpg 0`: path and person; the camera is the third number of the name.
    Both parts number their people from 0, so the part belongs to the identity. Expected: 30,248 training images of
    1,041 people (32,621 with `list_val.txt`, which published results leave out); 11,659 queries, 82,161 gallery images
    of 3,060 others. Source: the readers of torchreid and fast-reid.
    """
    part = "train" if train else "test"
    lists = [("train", None), ("val", None)][: 1 + with_val] if train else [("query", 0), ("gallery", 1)]
    files = below(src, "MSMT17 has train, test (V2: mask_train_v2, mask_test_v2) and "
                       "list_{train,val,query,gallery}.txt", f"list_{lists[0][0]}.txt")
    folder = next((f for f in (f"mask_{part}_v2", part) if any(name.startswith(f"{f}/") for name in files)), part)
    records = []
    for list_name, role in lists:
        for where, line in files.read_lines(f"list_{list_name}.txt"):
            m = MSMT17_LINE.fullmatch(line)
            if not m:
                raise InputError(f"{where}: want `0000/0000_000_01_0303morning_0015_0.jpg 0`, found {line[:60]!r}")
            image = files.find(f"{folder}/{m['path']}", where)
            records.append(Record(image.read, image.name, f"{part}-{int(m['person']):04d}",
                                  camera=int(m["camera"]) - 1, role=role))
    return reid(files, records, train, single_gallery_shot, listed=True)


@SINGLE_GALLERY_SHOT
@VAL
@click.option("--variant", type=click.Choice(["cross-clothes", "same-clothes"]), default="cross-clothes",
              help="Probes of a test split: camera C (cross-clothes) or B (same-clothes).")
def prcc(src: Path, domain: str, train: bool, variant: str, val: bool, single_gallery_shot: bool | None) -> Source:
    """PRCC: `rgb/{train,val}/<person>/{A,B,C}_*.jpg` and `rgb/test/{A,B,C}/<person>/*.jpg`; A, B, C are the cameras.

    A is the gallery; probes are C (cross-clothes) or B (same-clothes: A and B show the same outfit), each in a separate
    split. The whole gallery is searched (multi-shot, as in published comparisons); the set's original protocol is
    single-shot. Expected: 17,896 training and 5,002 validation images (--val) of the same 150 people; A 3,384, B 3,543,
    C 3,873 images of 71 others. Source: the reader of Simple-CCReID.
    """
    part = "train" if train else "val" if val else "test"
    files = below(src, "PRCC has rgb/{train,val}/<person>/A_*.jpg and rgb/test/{A,B,C}/<person>/*.jpg", f"rgb/{part}")
    pattern = (r"rgb/test/(?P<camera>[ABC])/(?P<person>\d+)/[^/]*" if part == "test" else
               rf"rgb/{part}/(?P<person>\d+)/(?P<camera>[ABC])_[^/]*")
    found = files.images(re.compile(pattern), "PRCC", f"rgb/{part}/")
    clothes = number((m["person"], m["camera"] == "C") for m, _ in found)
    probe = {"cross-clothes": "C", "same-clothes": "B"}[variant]
    records = [Record(member.read, member.name, m["person"], camera="ABC".index(m["camera"]),
                      clothes=clothes((m["person"], m["camera"] == "C")),
                      role=None if train else 1 if m["camera"] == "A" else 0)
               for m, member in found if train or m["camera"] in ("A", probe)]
    return reid(files, records, train, single_gallery_shot, variants=[variant, f"{variant} single-shot"], draws=10)


LTCC_NAME = re.compile(r"(?P<part>train|query|test)/(?P<person>\d+)_(?P<outfit>\d+)_c(?P<camera>\d{1,4})[^/]*")


@SINGLE_GALLERY_SHOT
def ltcc(src: Path, domain: str, train: bool, single_gallery_shot: bool | None = None) -> Source:
    """LTCC: `train`, `query`, `test` with `<person>_<outfit>_c<camera>_*.png`.

    The same images are scored as general and cloth-changing. Expected: 9,576 training images of 77 people; 493 queries,
    7,050 gallery images of 75 others. Source: the reader and the metric of Simple-CCReID.
    """
    parts = ("train",) if train else ("query", "test")
    files = below(src, "LTCC has train, query and test with <person>_<outfit>_c<camera>_*.png", parts[0])
    found = files.images(LTCC_NAME, "LTCC", tuple(f"{part}/" for part in parts))
    clothes = number((m["person"], m["outfit"]) for m, _ in found)
    records = [Record(member.read, member.name, m["person"], camera=int(m["camera"]) - 1,
                      clothes=clothes((m["person"], m["outfit"])), role=None if train else parts.index(m["part"]))
               for m, member in found]
    variants = ["general", "cross-clothes", "same-clothes"]
    return reid(files, records, train, single_gallery_shot, variants=variants)


DEEPCHANGE_LINE = re.compile(r"(?P<name>P(?P<person>\d{1,9})_C\d+_(?P<outfit>[^_.,/]+)[^,/]*),"
                             r"(?P<tracklet>\d{1,9})(,.*)?")


@SINGLE_GALLERY_SHOT
@VAL
def deepchange(src: Path, domain: str, train: bool, val: bool, single_gallery_shot: bool | None) -> Source:
    """DeepChange: `train-set`, `{test,val}-set-{query,gallery}`, each with its list `<folder>-bbox.txt`.

    A line is `P<person>_C<camera>_<outfit>_*.jpg,<tracklet>`. The column camera holds the TRACKLET: in this set, a
    match from the probe's camera counts unless it is from the same tracklet. Expected: 75,083 training images of 450
    people; 17,527 queries and 62,956 gallery images of 521 others; with --val 4,976 and 17,865 of 150 more. Source: the
    reader of Simple-CCReID.
    """
    part = "val" if val else "test"
    folders = ("train-set",) if train else (f"{part}-set-query", f"{part}-set-gallery")
    files = below(src, "DeepChange has train-set, {test,val}-set-query, {test,val}-set-gallery, each with "
                       "<folder>-bbox.txt", f"{folders[0]}-bbox.txt")
    found = []
    for role, folder in enumerate(folders):
        for where, line in files.read_lines(f"{folder}-bbox.txt"):
            m = DEEPCHANGE_LINE.fullmatch(line)
            if not m:
                raise InputError(f"{where}: want `P1_C1_1_000001.jpg,1`, found {line[:60]!r}")
            found.append((m, f"{int(m['person']):04d}", role, files.find(f"{folder}/{m['name']}", where)))
    clothes = number((person, m["outfit"]) for m, person, _, _ in found)
    records = [Record(image.read, image.name, person, camera=int(m["tracklet"]), clothes=clothes((person, m["outfit"])),
                      role=None if train else role) for m, person, role, image in found]
    return reid(files, records, train, single_gallery_shot, listed=True)


@SINGLE_GALLERY_SHOT
@click.option("--table", metavar="NAME", default="persons.csv", help="Name of the CSV inside the source.")
@OPEN_SET
def persons(src: Path, domain: str, train: bool, table: str, open_set: float | None, seed: int,
            single_gallery_shot: bool | None) -> Source:
    """Any set of bodies: a CSV `path,person,camera[,clothes][,role]` in the source, and the images that it names.

    `role` is train (the default), probe, gallery or distractor (no person needed, matches nobody). Cameras and clothes
    may be any words. A test split is scored like Market-1501; with `--open-set`, all images of a share of its people
    are probes, and TPIR is scored, too.
    """
    files = below(src, "want a CSV path,person,camera[,clothes][,role]; --table gives its name", table)
    rows, lines = [], {}
    for where, row in read_table(files[table].read, f"{src}/{table}", ("path", "person", "camera")):
        path, role = row["path"].replace("\\", "/").removeprefix("./"), row.get("role", "") or "train"
        if (first := lines.setdefault(path, where)) != where:
            raise InputError(f"{where}: {path[:80]!r} is listed twice, first in {first}")
        if role not in ("train", *ROLES):
            raise InputError(f"{where}: role {role[:40]!r}, want train, {', '.join(ROLES)}")
        if not row["camera"] or (not row["person"] and role != "distractor"):
            raise InputError(f"{where}: no {'person' if row['camera'] else 'camera'}")
        rows.append((files.find(path, where), role, row))
    camera = number(row["camera"] for _, _, row in rows)
    clothes = number((row["person"], row.get("clothes", "")) for _, _, row in rows)
    people = sorted({row["person"] for _, role, row in rows if role in ("probe", "gallery")})
    unknown = set(compress(people, strangers(people, open_set or 0.0, seed)))
    records = [Record(image.read, image.name, None if role == "distractor" else row["person"],
                      camera=camera(row["camera"]),
                      clothes=clothes((row["person"], row["clothes"])) if row.get("clothes") else None,
                      role=None if train else 0 if row["person"] in unknown else ROLES.index(role))
               for image, role, row in rows if (role == "train") == train]
    protocol = {"open_set": open_set, "seed": seed} if open_set else {}
    return reid(files, records, train, single_gallery_shot, listed=True, **protocol)
