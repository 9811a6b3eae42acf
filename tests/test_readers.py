"""Batches that loader processes read from shards, and the benchmark of readers."""

import json
from itertools import islice

import click
import numpy as np
import pytest
import torch

import tools.bench_data
from data_prep.format import Split
from data_prep.stream import Batches
from tests.conftest import script
from tests.test_data_prep import run_here
from tests.test_merge import made


def test_a_loader_process_delivers_the_same_batches(small_split):
    rows = np.array([3, 0, 7, 7, 5])
    batches = Batches(small_split, rows, 2)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1, collate_fn=lambda item: item)
    for b, (found, images) in enumerate(loader):
        good, own = batches[b]
        assert found.tolist() == good.tolist() and torch.equal(images, own) and images.is_shared()
        for row, image in zip(good.tolist(), own, strict=True):
            assert torch.equal(image, small_split.image(row))


@pytest.fixture
def small_split(tmp_path) -> Split:
    return made(tmp_path / "body/train", [(f"{i % 3}", None, 0) for i in range(8)])


def test_unreadable_images_are_left_out_of_a_batch(small_split):
    with open(small_split.folder / "shard-000001.tar", "r+b") as tar:
        tar.seek(int(small_split.offset[3]))
        tar.write(b"\0" * int(small_split.length[3]))
    good, images = Batches(small_split, np.array([2, 3, 4]), 3)[0]
    assert good.tolist() == [2, 4] and torch.equal(images[1], small_split.image(4)) and images.shape == (2, 3, 16, 16)


def test_every_contender_of_the_benchmark_sees_every_image(small_split):
    counts = {"ours, batches": [4], "ours, training": [tools.bench_data.BATCH], "webdataset, batches": [4]}
    for name, contender in tools.bench_data.READERS.items():
        expected = counts.get(name, [1] * 4)  # of a process that has every other image
        for part in range(2):
            assert list(islice(contender(small_split.folder, part, 2), len(expected))) == expected, name


def test_the_benchmark_measures_and_judges(tmp_path):
    result = script("-m", "data_prep", "bench", "--size", 32, "--images", 64, "--prepared", 32, "--rounds", 2,
                    "--seconds", 0.05, "--workers", 2, "--scratch", tmp_path, "--json", tmp_path / "bench.json")
    found = json.loads((tmp_path / "bench.json").read_text())["sizes"]["32"]
    assert [*found] == [*tools.bench_data.KINDS, "write", "goals"] and result.stdout.count(" bytes a pixel") == 2
    for kind in tools.bench_data.KINDS:
        assert set(found[kind]) == set(tools.bench_data.READERS)
        assert all(len(rates) == 8 for rates in found[kind].values())
    assert min(min(rates) for kind in found if kind != "goals" for rates in found[kind].values()) > 0
    goal = next(goal for goal in found["goals"] if goal["what"] == "reader / decode only")
    ratio = np.median(np.divide(found["read"]["ours, images"], found["read"]["decode only"]))
    assert goal["ratio"] == pytest.approx(ratio, abs=1e-3) and "reader / decode only: " in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]  # the shards are gone


@pytest.mark.parametrize("arguments, words", [(["--scratch", "{d}/none"], "'--scratch': Directory '{d}/none'"),
                                              (["--json", "{d}/none/x"], "no folder {d}/none"),
                                              (["--rounds", "0"], "--rounds"), (["--size", "5"], "--size")])
def test_bad_benchmarks(arguments, words, tmp_path):
    with pytest.raises(click.ClickException) as error:
        run_here("bench", *[a.format(d=tmp_path) for a in arguments])
    assert words.format(d=tmp_path) in error.value.format_message()
