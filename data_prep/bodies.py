"""Sources of whole-body persons: Market-1501 and sets that use its names."""

import re
from collections import Counter
from pathlib import Path, PurePosixPath

from data_prep import InputError
from data_prep.archives import members
from data_prep.folders import image_suffixes
from data_prep.shards import Record, Source

MARKET_NAME = re.compile(r"(-1|\d+)_c(\d+)")


def market(src: Path, domain: str, train: bool) -> Source:
    """Market-1501: `bounding_box_train`, or `query` and `bounding_box_test`; files `0002_c1s1_000451_03.jpg`.

    Person -1 is junk and left out; person 0000 is a distractor: it stays in the gallery, as nobody's match. Cameras
    count from 0. Expected: 12,936 training images; 3,368 queries, 15,913 in the gallery, 3,819 junk.
    Source: the torchreid and fast-reid readers of Market-1501.
    """
    skipped, records, endings, files = Counter(), [], image_suffixes(), members(src)
    for name, role in (("bounding_box_train", None),) if train else (("query", 0), ("bounding_box_test", 1)):
        inside = [m for m in files if m.name.startswith(f"{name}/") and m.name.count("/") == 1]
        if not inside:
            raise InputError(f"--src {src}: no folder {name}; Market-1501 has bounding_box_train, bounding_box_test "
                             "and query")
        for member in inside:
            file = PurePosixPath(member.name)
            match = MARKET_NAME.match(file.name)
            if file.suffix.lower() not in endings:
                skipped["not an image by its name"] += 1
            elif not match:
                skipped["name is not Market-1501's"] += 1
            elif match[1] == "-1":
                skipped["junk (person -1)"] += 1
            elif int(match[1]) == 0 and role != 1:
                skipped["distractor (person 0) outside the gallery"] += 1
            else:
                distractor = int(match[1]) == 0
                records.append(Record(member.read, member.name, None if distractor else match[1],
                                      camera=int(match[2]) - 1, role=2 if distractor else role))
    return Source(records, None if train else {"name": "reid"}, skipped=skipped)
