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
from PIL import Image
from safetensors.torch import save_file

import evaluate
import models.backbones
import models.runs
import protocols.embed
import tools.bench_evaluate
from data_prep import InputError
from data_prep.format import Split, open_root
from data_prep.verify import verify_split
from models.runs import load_run, load_tuned, read_tensors
from protocols.classify import fit_probe, read_prompts, score_classification
from protocols.embed import Embedder
from protocols.pairs import grid_accuracy, score_verification
from protocols.search import search_gallery
from tests.conftest import ROOT, script
from tests.test_evaluate import FakeSplit, run_here, unit

OPTIONS = ["--bootstrap", "5", "--workers", "0", "--device", "cpu"]


# ---------------------------------------------------------------- embeddings in parts


@pytest.fixture
def embedder(tiny_run, tmp_path, monkeypatch):
    """Embedders of the tuned backbone in parts of 16 images, each into a folder of its own name."""
    monkeypatch.setattr(protocols.embed, "PART", 16)
    model = load_tuned(load_run(tiny_run))
    return lambda name, **more: Embedder(model, "tuned", tmp_path / name, torch.device("cpu"), 8, 0, True,
                                         **more)


def test_parts_make_the_same_array_whoever_computes_them(embedder, demo_root, monkeypatch):
    split = open_root(demo_root)["object"]["val"]
    one = embedder("one")
    whole = one.raw(split)
    two, files = embedder("two"), []
    parts = one.folder / "parts"
    parts.mkdir()
    for rank in (1, 0):  # two ranks in turn
        two.ranks = models.runs.Ranks(rank, 2)
        two.embed_parts(split, parts)
        files.append(len(list(parts.iterdir())))
    assert files == [4, 8] and 112 < len(split) < 128  # half of the parts each
    two.join_parts(split, parts, one.folder / "joined")
    np.testing.assert_array_equal(np.load(one.folder / "joined"), whole)
    everything = np.arange(len(split))
    _, x = next(models.backbones.embed_rows(two.model, split, everything, two.device, len(split), 0, True))
    np.testing.assert_allclose(whole, x.numpy(), rtol=1e-4, atol=1e-6)


def test_an_interrupted_embedding_goes_on(embedder, demo_root, monkeypatch):
    split = open_root(demo_root)["object"]["val"]
    whole = embedder("one").raw(split)
    real, seen = models.backbones.embed_rows, []

    def counting(model, split, rows, *rest):
        for good, x in real(model, split, rows, *rest):
            if len(seen) == 5 and stop:  # the sixth batch of 8: the third part is half done
                raise KeyboardInterrupt
            seen.append(len(good))
            yield good, x

    stop = True
    monkeypatch.setattr(protocols.embed, "embed_rows", counting)
    with pytest.raises(KeyboardInterrupt):
        embedder("two").raw(split)
    assert sum(seen) == 40
    stop, first = False, len(seen)
    again = embedder("two")
    np.testing.assert_array_equal(again.raw(split), whole)
    assert sum(seen[first:]) == len(split) - 32  # two parts of 16 were kept
    assert sorted(p.suffix for p in again.folder.iterdir()) == [".json", ".lock", ".npy"]  # no part is left


def test_what_is_no_number_names_the_sample(embedder, demo_root, monkeypatch):
    split, embed, real = open_root(demo_root)["face_hq"]["test"], embedder("one"), models.backbones.embed_rows

    def broken(*arguments):
        for good, x in real(*arguments):
            x[good == 19] = torch.nan
            yield good, x

    monkeypatch.setattr(protocols.embed, "embed_rows", broken)
    with pytest.raises(InputError, match=f"no finite embedding of sample {split.jpeg(19)[0]}"):
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
    code = ("import evaluate, protocols.embed, sys; protocols.embed.PART = 4; "
            "evaluate.main.main(sys.argv[1:], standalone_mode=False)")
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
    embedded, real = [], models.backbones.embed_rows
    monkeypatch.setattr(protocols.embed, "PART", 4)
    monkeypatch.setattr(protocols.embed, "embed_rows", lambda *a: (embedded.append(len(a[2])), real(*a))[1])
    run_here(*arguments)
    resumed = np.load(run / "eval/embeddings/tuned-object-train.npy")
    shutil.rmtree(run / "eval")
    run_here(*arguments)
    np.testing.assert_array_equal(resumed, np.load(run / "eval/embeddings/tuned-object-train.npy"))
    after_kill, _, uninterrupted, _ = embedded  # train, its reference's embedding, comes first; then val
    assert kept >= 1 and uninterrupted == len(whole) and after_kill == len(whole) - 4 * kept


def test_what_a_kill_left_goes_with_the_next_evaluation(embedder, demo_root):
    split, embed = open_root(demo_root)["object"]["val"], embedder("one")
    path = embed.prepare(split)
    kept = path.parent / ".tuned-object-val.x.parts"  # not of this name: nobody's parts, or another split's
    for folder in [path.parent / f".tuned-object-val.{key * 16}.parts" for key in "0f"] + [kept]:
        folder.mkdir()
        (folder / "0-16.npy").write_bytes(b"")
    again = embedder("one")
    assert again.prepare(split) == path and [p.name for p in path.parent.glob("*.parts")] == [kept.name]


def test_runs_side_by_side_share_their_foundation_without_being_told(run, tmp_path, monkeypatch, capsys):
    embedded, real = [], models.backbones.embed_rows
    monkeypatch.setattr(protocols.embed, "embed_rows", lambda *a: (embedded.append(a[1].name), real(*a))[1])
    shutil.copytree(run, tmp_path / "other")
    for folder in (run, tmp_path / "other"):
        run_here("--run", folder, *OPTIONS, "--splits", "face_hq/test")
    assert len(embedded) == 3 and len(list((tmp_path / ".foundation").glob("*.npy"))) == 1
    assert f"for all runs that share it: {tmp_path}/.foundation" in capsys.readouterr().out
    kept = run / "checkpoints/step-00000001"
    assert protocols.embed.shared_folder(kept / "eval", None) == tmp_path / ".foundation"
    (tmp_path / "sealed").write_text("in the way")
    assert protocols.embed.shared_folder(tmp_path / "sealed/run/eval", None) is None  # then: with the run


def test_runs_share_the_embeddings_of_their_foundation(run, tmp_path, monkeypatch):
    embedded, real = [], models.backbones.embed_rows
    monkeypatch.setattr(protocols.embed, "embed_rows", lambda *a: (embedded.append(a[1].name), real(*a))[1])
    shutil.copytree(run, tmp_path / "other")
    for folder in (run, tmp_path / "other"):
        run_here("--run", folder, *OPTIONS, "--splits", "face_hq/test", "--cache", tmp_path / "shared")
    assert len(embedded) == 3  # the foundation once, each tuned backbone
    assert [p.name.rsplit("-", 1)[0] for p in (tmp_path / "shared").glob("*.npy")] == ["foundation-face_hq-test"]
    run_here("--run", run, *OPTIONS, "--splits", "face_hq/test", "--cache", tmp_path / "shared", "--no-flip")
    assert len(embedded) == 5 and len(list((tmp_path / "shared").glob("*.npy"))) == 2  # kept side by side


# ---------------------------------------------------------------- verification by a grid of thresholds


def literal_roc(distance, same, folds):
    """calculate_roc of insightface's verification.py: accuracies of the folds at the grid's best on the others."""
    thresholds, found = np.arange(0, 4, 0.01), []
    for fold in np.unique(folds):
        accuracies = [np.mean((distance[folds != fold] < t) == same[folds != fold]) for t in thresholds]
        found.append(np.mean((distance[folds == fold] < thresholds[np.argmax(accuracies)]) == same[folds == fold]))
    return np.mean(found), np.std(found)


@pytest.mark.parametrize("seed", range(3))
def test_grid_thresholds_equal_a_literal_transcription(seed):
    rng = np.random.default_rng(seed)
    same, folds = rng.random(600) < 0.5, np.arange(600) // 60
    scores = np.clip(rng.normal(size=600) * 0.2 + 0.3 * same, -1, 1).round(2 if seed else 8)  # rounded: on the grid
    found = grid_accuracy(scores, same, folds)
    assert (found["accuracy"], found["accuracy sd"]) == pytest.approx(literal_roc(2 - 2 * scores, same, folds))
    counts = rng.integers(0, 3, 600)
    again = np.repeat(np.arange(600), counts)
    assert grid_accuracy(scores, same, folds, counts) == pytest.approx(
        grid_accuracy(scores[again], same[again], folds[again]))


def test_both_kinds_of_thresholds_have_rows_of_their_own():
    rng = np.random.default_rng(0)
    pairs = np.column_stack([rng.integers(0, 40, (500, 2)), np.zeros(500, int), np.arange(500) // 50])
    labels = np.arange(40) // 2
    pairs[:, 2] = labels[pairs[:, 0]] == labels[pairs[:, 1]]
    split = FakeSplit(labels, {"name": "verification", "folds": 10}, pairs=pairs)
    x = unit(rng.normal(size=(20, 4))[labels] + rng.normal(size=(40, 4)))
    found, _ = score_verification(x, split, 5, 0)
    exact, grid = found
    assert "exact" in exact and "0 to 4 by 0.01" in grid and set(found[grid]) == {"accuracy", "accuracy sd"}
    assert found[grid]["accuracy"].value == pytest.approx(found[exact]["accuracy"].value, abs=0.02)
    # 460 or so impostors: FAR 0.01 has one to spare, 0.001 has not and is absent
    assert "tar@far=0.01" in found[exact] and "tar@far=0.001" not in found[exact]


# ---------------------------------------------------------------- readouts of classification


def test_the_probe_equals_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 300)
    y = unit(rng.normal(size=(4, 6))[labels] + rng.normal(size=(300, 6)) + 3).astype(np.float32)
    device = torch.device("cpu")
    w, b, strength = fit_probe(y, labels, 4, device)
    z = (y - y.mean(0)) / np.sqrt(y.var(0).mean())
    theirs = LogisticRegression(C=1 / (strength * 300), tol=1e-8, max_iter=5000).fit(z, labels)
    centred = y @ w.T + b
    expected = z @ theirs.coef_.T + theirs.intercept_  # their intercepts are free up to a constant
    np.testing.assert_allclose(centred - centred.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True),
                               atol=0.02)
    again = fit_probe(y, labels, 4, device)
    assert (again[0] == w).all() and (again[1] == b).all()
    # the choice: on every fifth image of a class, from the strongest on, as long as it gets better
    held = np.zeros(300, dtype=bool)
    for k in range(4):
        held[np.flatnonzero(labels == k)[4::5]] = True
    z = (y - y.mean(0)) / np.sqrt(y.var(0).mean())
    rate = [LogisticRegression(C=1 / (l * (~held).sum()), max_iter=5000).fit(z[~held], labels[~held]).score(
        z[held], labels[held]) for l in (1, 1e-1, 1e-2, 1e-3, 1e-4)]
    best = next((i for i in range(4) if rate[i + 1] <= rate[i]), 4)
    assert strength == (1, 1e-1, 1e-2, 1e-3, 1e-4)[best]


def test_the_shipped_prompts_are_those_of_clip():
    import open_clip

    found = read_prompts("1,7,80")
    assert [len(lines) for lines in found.values()] == [1, 7, 80]
    assert next(iter(found.values())) == ["a photo of a {}."]
    for lines, theirs in zip(list(found.values())[1:], (open_clip.SIMPLE_IMAGENET_TEMPLATES,
                                                        open_clip.OPENAI_IMAGENET_TEMPLATES), strict=True):
        assert sorted(lines) == sorted(template("{}") for template in theirs)


@pytest.mark.parametrize("text, words", [
    (None, "shipped are 1, 7 and 80"), ("a photo of it.\n", "with {} for the class"), ("\n", "an empty file"),
    ("{} or {}\n", "with {} for the class"),
])
def test_bad_prompts(text, words, tmp_path):
    path = tmp_path / "prompts.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_prompts(str(path))


def test_zero_shot_equals_a_literal_mean_over_prompts(tiny_run):
    import open_clip

    run = load_run(tiny_run)
    model, names, templates = load_tuned(run), ["red_cup", "dog"], ["a photo of a {}.", "art of the {}."]
    found = models.backbones.text_weights(model, names, torch.device("cpu"), templates)
    tokenize = open_clip.get_tokenizer("ViT-B-32")
    for name, row in zip(("red cup", "dog"), found, strict=True):
        with torch.no_grad():
            x = model.net.encode_text(tokenize([text.format(name) for text in templates]))
        x = (x / x.norm(dim=1, keepdim=True)).mean(0)
        torch.testing.assert_close(row, x / x.norm(), rtol=1e-4, atol=1e-6)


def test_readouts_of_a_run_and_of_classes_that_it_never_saw(run, demo_root, monkeypatch):
    """Two of the object classes are taken from what the run says it was trained on; its training split is not there."""
    monkeypatch.setattr(evaluate, "training_split", lambda *_: None)
    head, metadata = read_tensors(run / "head.safetensors")
    classes = json.loads(metadata["classes"])
    unseen = classes["object"][1:3]
    classes["object"] = [name if name not in unseen else f"other {name}" for name in classes["object"]]
    save_file(head, run / "head.safetensors", metadata={"classes": json.dumps(classes)})
    run_here("--run", run, *OPTIONS, "--splits", "object/val", "--crowd", 0, "--bootstrap", 30)
    rows = {(r["weights"], r["metric"]): r for r in json.loads((run / "eval/results.json").read_text())}
    stems = ["nearest-mean", "knn", "probe", "zero-shot 1", "zero-shot 7", "zero-shot 80"]
    for weights in ("foundation", "tuned"):
        for stem in stems:
            assert rows[weights, f"unseen-class {stem} top-1"]["value"] >= rows[weights, f"{stem} top-1"]["value"] - 0.5
            assert "open set of 2 classes not trained on" in rows[weights, f"unseen-class {stem} top-1"]["protocol"]
    # the class means of the two alone, literally
    val, base = (Split(demo_root / "object" / name) for name in ("val", "train"))
    x, y = (unit(np.load(run / f"eval/embeddings/tuned-object-{s.name}.npy")) for s in (val, base))
    k = [base.classes.index(name) for name in unseen]
    means = unit(np.stack([y[base.labels == i].mean(0) for i in k]))
    rows_of = np.flatnonzero(np.isin(val.labels, [val.classes.index(name) for name in unseen]))
    right = [val.classes[val.labels[r]] == unseen[int((means @ x[r]).argmax())] for r in rows_of]
    row = rows["tuned", "unseen-class nearest-mean top-1"]
    assert row["value"] == pytest.approx(np.mean(right)) and row["count"] == len(rows_of)
    before = rows["foundation", "unseen-class probe top-1"]
    kept = rows.get(("tuned", "retention of unseen-class probe top-1"))
    after = rows["tuned", "unseen-class probe top-1"]["value"]
    assert (kept is not None) == (before["low"] > 0.5)  # of two classes by chance: a half
    assert kept is None or kept["value"] == pytest.approx((after - 0.5) / (before["value"] - 0.5))
    assert ("tuned", "head top-1") not in rows  # its classes do not cover the split's


def test_real_labels_by_hand(tmp_path):
    """Four images, two classes; ReaL: the second may be either, the third is none, the fourth the first class alone."""
    from data_prep.__main__ import cli
    from data_prep.sources.imagenet import imagenet_wnids

    a, b = imagenet_wnids()[:2]
    colours = {1: (a, 250), 2: (a, 240), 3: (b, 10), 4: (b, 0)}
    for number, (wnid, grey) in colours.items():
        for part in ("train", "val"):
            path = tmp_path / "src" / part / wnid / f"ILSVRC2012_val_{number:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (16, 16), grey).save(path)
    (tmp_path / "real.json").write_text(json.dumps([[0], [0, 1], [], [0, 2]]))
    common = ["--src", str(tmp_path / "src"), "--size", "16", "--workers", "1"]

    def prepare(name, *more):
        cli.main(["imagenet", *common, "--out", str(tmp_path / "d/object" / name), *more], standalone_mode=False)
        return Split(tmp_path / "d/object" / name)

    base, val = prepare("train"), prepare("val", "--real", str(tmp_path / "real.json"))
    assert verify_split(val.folder) == [] and val.fields(1)["real"] == [a, b]
    means = np.eye(2)
    y, x = means[base.labels], unit(np.array([[1, 0], [0, 1.0], [1, 0], [0, 1]]))  # answers: a b a b
    found = score_classification(x, val, (y, base), None, [], 5, 0)
    assert found["nearest-mean top-1"].value == 0.5  # the first and the fourth
    real = found["nearest-mean ReaL"]
    assert real.value == pytest.approx(2 / 3) and real.count == 3  # 1 and 2 right, 3 not counted, 4 wrong
    assert real.chance == pytest.approx((1 + 2 + 1) / 3 / 2)
    for text, words in (("{}", "want a list"), ("[[0], [1000]]", "entry 1: want a list of class numbers"),
                        ("[[true]]", "entry 0"), ("[" * 100_000, "not ReaL's"), ("[[0]]", "want a name like")):
        (tmp_path / "real.json").write_text(text)
        with pytest.raises(InputError, match=words):
            prepare("other", "--real", str(tmp_path / "real.json"))
    with pytest.raises(InputError, match="--real is for test splits"):
        prepare("train", "--real", str(tmp_path / "real.json"))


# ---------------------------------------------------------------- the benchmark


def test_the_benchmark_compares_ways_that_agree(tmp_path):

    for name, case in tools.bench_evaluate.CASES.items():
        inputs = case.make(0.01)
        ours, *others = (way(**inputs) for way in case.ways.values())
        assert all(0 < value <= 1 for value in ours.values()), name
        for values in others:
            # of listed pairs one of 874 genuine ones may change sides: their products are rounded differently
            assert values == pytest.approx(ours, abs=2e-3 if name == "pairs" else 1e-6), name
    result = script("evaluate.py", "bench", "--cases", "search", "--scale", "0.05", "--rounds", "1", "--json",
                    tmp_path / "bench.json")
    found = json.loads((tmp_path / "bench.json").read_text())["cases"]["search"]["ways"]
    assert list(found) == ["here", "numpy"] and result.stdout.count(" MiB") == 4
    assert all(way["seconds"] > 0 and way["peak_MiB"] > 100 for way in found.values())
    with pytest.raises(InputError, match="there are reid, pairs, curve, search, million"):
        run_here("bench", "--cases", "all")


def test_a_search_holds_a_block_at_a_time(monkeypatch):
    """Whatever the gallery: at most `size` scores, in one piece."""
    rng, made, real = np.random.default_rng(0), [], np.empty
    x = rng.integers(-9, 10, size=(3000, 8)).astype(np.float32)  # products without any rounding
    monkeypatch.setattr(np, "empty", lambda shape, *a, **k: (made.append(np.prod(shape)), real(shape, *a, **k))[1])
    probes, gallery = np.arange(2500), np.arange(2000, 3000)
    found = [search_gallery(x, probes, gallery, lambda p: (np.array([p % 1000]), []), size)
             for size in (10_000, 5_000_000)]  # ten rows at a time; two blocks of 1024 rows, turn and turn about
    assert made == [10_000, 2 * 1024 * 1000]
    assert (found[0].first == found[1].first).all() and len(set(found[0].first)) > 500
