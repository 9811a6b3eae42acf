"""The records of a source: read once, in little memory, restricted; and tasks taken one after the other."""

import math
import tracemalloc
from collections import Counter
from functools import partial

import numpy as np

from data_prep.format import Record, Source
from data_prep.records import Records, restrict
from data_prep.verify import verify_split
from data_prep.write import in_parallel, write_split
from tests.test_data_prep import encode, files_of, picture


def blank(number: int) -> bytes:
    return BLANK


BLANK = encode(picture(0, 8, 8))


def test_records_come_from_a_generator_and_are_read_once(tmp_path):
    passes = []

    def generate():
        passes.append(1)
        yield from (Record(partial(blank, i), f"image {i}", f"p{i % 7}", camera=i % 3) for i in range(100))

    index = write_split(tmp_path / "d/body/train", Source(generate()), source_name="made", size=8, fit="pad",
                        quality=95, train=True, shard_size=16)
    listed = write_split(tmp_path / "e/body/train", Source(list(generate())), source_name="made", size=8, fit="pad",
                         quality=95, train=True, shard_size=16)
    assert index == listed and len(passes) == 2 and verify_split(tmp_path / "d/body/train") == []
    assert files_of(tmp_path / "d") == files_of(tmp_path / "e")


def test_records_take_little_memory(tmp_path):
    """At most 60 bytes an image besides the identities: forty million images need not be objects."""
    def generate(n: int):
        for i in range(n):
            yield Record(partial(blank, i), f"a set/with a long name/image-{i}.jpg", f"{i % 50}")

    n = 30_000
    tracemalloc.start()
    records = Records(generate(n), tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60 * n + 200_000 and records[n - 1].name.endswith("image-29999.jpg") and len(records) == n
    assert not list(tmp_path.iterdir())  # the file has no name


def test_restricting_a_source_moves_pairs_and_blocks(tmp_path):
    records = Records((Record(partial(bytes, 1), f"{i}", f"p{i % 3}", role=i % 2) for i in range(10)), tmp_path)
    source = Source(records, {"name": "verification"}, [(0, 9, 1, 0), (4, 5, 0, 0), (9, 8, 0, 1)], Counter(old=2),
                    blocks=[0, 3, 4, 8])
    keep = np.array([1, 1, 0, 0, 1, 0, 1, 1, 0, 1], dtype=bool)
    part = restrict(restrict(source, keep, "one"), np.array([0, 1, 1, 1, 1, 1], dtype=bool), "two")
    assert [record.name for record in part.records] == ["1", "4", "6", "7", "9"]
    assert part.pairs == [[-1, 4, 1, 0], [1, -1, 0, 0], [4, -1, 0, 1]]
    assert part.blocks == [0, 1, 4] and part.skipped == {"old": 2, "one": 4, "two": 1}
    assert part.records.labels()[1].tolist() == [1, 1, 0, 1, 0] and part.records.role.tolist() == [1, 0, 0, 1, 1]
    assert source.records[9].read() == b"\0" and len(source.records) == 10  # the whole is still there


def test_tasks_are_taken_as_workers_come_free():
    taken = []

    def tasks():
        for i in range(200):
            taken.append(i)
            yield (float(i),)

    for workers in (1, 2):
        taken.clear()
        results = in_parallel(math.sqrt, tasks(), workers)
        assert next(results) == 0 and len(taken) <= 2 * workers + 1
        assert [round(x * x) for x in results] == list(range(1, 200))
