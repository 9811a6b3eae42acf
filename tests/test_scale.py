"""Embedding in parts, by several processes and after a kill; readouts; the benchmark of large searches."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import evaluate
import train
from data_prep import InputError
from data_prep.shards import Split, open_root
from tests.conftest import ROOT, script
from tests.test_evaluate import run_here

OPTIONS = ["--bootstrap", "5", "--workers", "0", "--device", "cpu"]


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the tiny run, not yet evaluated."""
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("eval", "analysis"))
    return tmp_path / "run"


# ---------------------------------------------------------------- embeddings in parts


@pytest.fixture
def embedder(tiny_run, tmp_path, monkeypatch):
    """Embedders of the tuned backbone in parts of 16 images, each into a folder of its own name."""
    monkeypatch.setattr(evaluate, "PART", 16)
    model = train.load_tuned(train.load_run(tiny_run))
    return lambda name, **more: evaluate.Embedder(model, "tuned", tmp_path / name, torch.device("cpu"), 8, 0, True,
                                                  **more)


def test_parts_make_the_same_array_whoever_computes_them(embedder, demo_root, monkeypatch):
    split = open_root(demo_root)["object"]["val"]
    one = embedder("one")
    whole = one.raw(split)
    two, files = embedder("two"), []
    parts = one.folder / "parts"
    parts.mkdir()
    for rank in (1, 0):  # two ranks in turn
        two.ranks = evaluate.Ranks(rank, 2)
        two.embed_parts(split, parts)
        files.append(len(list(parts.iterdir())))
    assert files == [4, 8] and 112 < len(split) < 128  # half of the parts each
    two.join_parts(split, parts, one.folder / "joined")
    np.testing.assert_array_equal(np.load(one.folder / "joined"), whole)
    everything = np.arange(len(split))
    _, x = next(train.embed_rows(two.model, split, everything, two.device, len(split), 0, True))  # in one batch
    np.testing.assert_allclose(whole, x.numpy(), rtol=1e-4, atol=1e-6)


def test_an_interrupted_embedding_goes_on(embedder, demo_root, monkeypatch):
    split = open_root(demo_root)["object"]["val"]
    whole = embedder("one").raw(split)
    real, seen = train.embed_rows, []

    def counting(model, split, rows, *rest):
        for good, x in real(model, split, rows, *rest):
            if len(seen) == 5 and stop:  # the sixth batch of 8: the third part is half done
                raise KeyboardInterrupt
            seen.append(len(good))
            yield good, x

    stop = True
    monkeypatch.setattr(train, "embed_rows", counting)
    with pytest.raises(KeyboardInterrupt):
        embedder("two").raw(split)
    assert sum(seen) == 40
    stop, first = False, len(seen)
    again = embedder("two")
    np.testing.assert_array_equal(again.raw(split), whole)
    assert sum(seen[first:]) == len(split) - 32  # two parts of 16 were kept
    assert sorted(p.suffix for p in again.folder.iterdir()) == [".json", ".lock", ".npy"]  # no part is left


def test_what_is_no_number_names_the_sample(embedder, demo_root, monkeypatch):
    split, embed, real = open_root(demo_root)["face_hq"]["test"], embedder("one"), train.embed_rows

    def broken(*arguments):
        for good, x in real(*arguments):
            x[good == 19] = torch.nan
            yield good, x

    monkeypatch.setattr(train, "embed_rows", broken)
    with pytest.raises(InputError, match=f"no finite numbers of sample {split.jpeg(19)[0]}"):
        embed.raw(split)


def test_two_processes_embed_as_one(run, tmp_path):
    shutil.copytree(run, tmp_path / "two")
    options = ["--run", run, *OPTIONS, "--batch", 8, "--splits", "object/val,face_hq/test"]
    script("evaluate.py", *options)
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]  # --: it would take --run
    result = script(*two, "evaluate.py", *options[:1], tmp_path / "two", *options[2:])
    names = sorted(path.name for path in (run / "eval/embeddings").glob("*.npy"))
    assert len(names) == 6 and names == sorted(p.name for p in (tmp_path / "two/eval/embeddings").glob("*.npy"))
    for name in names:
        one, two = (np.load(folder / "eval/embeddings" / name) for folder in (run, tmp_path / "two"))
        np.testing.assert_array_equal(one, two)
    one, two = (json.loads((folder / "eval/results.json").read_text()) for folder in (run, tmp_path / "two"))
    assert [row["value"] for row in one] == [row["value"] for row in two]
    assert result.stdout.count("written: ") == 1  # the first process alone scores


def test_a_killed_evaluation_keeps_its_parts(run, demo_root, monkeypatch):
    """kill -9 once a part is there; what follows embeds fewer images and ends with the same array."""
    arguments = ["--run", str(run), *OPTIONS, "--batch", "4", "--splits", "object/val", "--no-foundation"]
    code = "import evaluate, sys; evaluate.PART = 4; evaluate.main.main(sys.argv[1:], standalone_mode=False)"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 60
        while not list((run / "eval/embeddings").glob(".tuned-object-train.*.parts/*.npy")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept, whole = len(list((run / "eval/embeddings").glob(".tuned-*.parts/*.npy"))), Split(demo_root / "object/train")
    embedded, real = [], train.embed_rows
    monkeypatch.setattr(evaluate, "PART", 4)
    monkeypatch.setattr(train, "embed_rows", lambda *a: (embedded.append(len(a[2])), real(*a))[1])
    run_here(*arguments)
    resumed = np.load(run / "eval/embeddings/tuned-object-train.npy")
    shutil.rmtree(run / "eval")
    run_here(*arguments)
    np.testing.assert_array_equal(resumed, np.load(run / "eval/embeddings/tuned-object-train.npy"))
    after_kill, _, uninterrupted, _ = embedded  # train, its reference's embedding, comes first; then val
    assert kept >= 1 and uninterrupted == len(whole) and after_kill == len(whole) - 4 * kept


def test_runs_share_the_embeddings_of_their_foundation(run, tmp_path, monkeypatch):
    embedded, real = [], train.embed_rows
    monkeypatch.setattr(train, "embed_rows", lambda *a: (embedded.append(a[1].name), real(*a))[1])
    shutil.copytree(run, tmp_path / "other")
    for folder in (run, tmp_path / "other"):
        run_here("--run", folder, *OPTIONS, "--splits", "face_hq/test", "--cache", tmp_path / "shared")
    assert len(embedded) == 3  # the foundation once, each tuned backbone
    assert [p.name.rsplit("-", 1)[0] for p in (tmp_path / "shared").glob("*.npy")] == ["foundation-face_hq-test"]
    run_here("--run", run, *OPTIONS, "--splits", "face_hq/test", "--cache", tmp_path / "shared", "--no-flip")
    assert len(embedded) == 5 and len(list((tmp_path / "shared").glob("*.npy"))) == 2  # kept side by side
