"""What analyze.py may conclude: like compared with like, identities counted once, and nothing left out in silence."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import analyze
import protocols.subspaces
from data_prep import InputError
from data_prep.format import open_root, open_split
from protocols.bootstrap import bootstrap_counts
from protocols.search import name_identities
from protocols.separability import balanced_accuracy, unseen_sources
from protocols.subspaces import GRID, hits_by_k, hits_one_by_one, principal_components, unit
from protocols.tasks import Degraded, Task, choose_pairs, drop_tested, make_task, read_embeddings
from reports.analysis import mistrust
from tests.test_analyze import run_here
from tests.test_subspaces import SHARED, D, measure_curve, orthogonal, pairs_of, planted, task_of, transfer

# ---------------------------------------------------------------- transfer


def test_components_that_are_a_random_basis_lead_random_ones_by_nothing(monkeypatch):
    """The means of the tasks are far apart, so that centring matters: it must be the same for both."""
    (basis,) = orthogonal(D, SHARED)
    embedded, tasks = planted([basis, basis], inside=0.3, offsets=[np.zeros(D), 6 * basis[0]])
    monkeypatch.setattr(protocols.subspaces, "RANDOM_SEEDS", 1)
    turn = np.linalg.qr(np.random.default_rng((0, 0)).standard_normal((D, D)))[0]  # the first of seed 0
    monkeypatch.setattr(protocols.subspaces, "principal_components", lambda x, device="cpu": (
        x.mean(0, dtype=np.float64), turn, np.ones(D)))
    pairs = pairs_of(transfer(embedded, tasks, 4, 20, 0))
    for pair in pairs.values():
        assert pair["over_random"] == {"value": 0, "low": 0, "high": 0}
    across = pairs["object", "face_hq"]
    assert abs(across["kept"] - across["own_mean"]["value"]) > 0.03  # what another mean alone changes


def test_components_and_random_subspaces_are_read_at_the_same_ks():
    (basis,) = orthogonal(D, SHARED)
    embedded, tasks = planted([basis] * 2, inside=1.0)
    result = transfer(embedded, tasks, 18, 10, 0, controls=False)
    grid = sorted({k for k in GRID if k < D} | {18, D})
    curves = {(c.fit, c.test): dict(zip(c.ks, c.kept, strict=True)) for c in result["curves"] if c.kind == "components"}
    for pair in result["pairs"]:
        for level in (99, 95):
            of = curves[pair["fit"], pair["test"]]
            by_hand = min(k for k in grid if all(of[other] >= level / 100 for other in grid if other >= k))
            assert pair[f"k{level}_grid"] == by_hand and pair[f"k{level}_random"] in grid
    assert any(pair["k99"]["value"] not in grid for pair in result["pairs"])


def test_the_fast_sweep_equals_the_slow_one_at_768_dimensions():
    """Centred vectors with a large common part, as embeddings have; people with one mate, and with many."""
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(8), [2, 2, 3, 3, 4, 6, 8, 12])
    spectrum = 1 / np.sqrt(1 + np.arange(768))
    x = rng.normal(size=(8, 768))[ids] * spectrum + rng.normal(size=(len(ids), 768)) * spectrum + 2 * spectrum
    x = unit(x).astype(np.float32)
    task, every = task_of("face_hq", ids), list(range(1, 769))
    mean, basis, _ = principal_components(x)
    z = ((x - mean) @ basis).astype(np.float32)
    slow = hits_one_by_one(z, z, task, every)
    np.testing.assert_array_equal(hits_by_k(z, z, task, every), slow)
    np.testing.assert_array_equal(hits_by_k(z, z, task, every, size=3 * len(ids)), slow)
    counts = np.array(list(bootstrap_counts(ids, 20, 0)), dtype=np.float32)
    curve = measure_curve(task, (x, x), mean, basis, every, counts)
    np.testing.assert_allclose(curve.score, slow.mean(1), atol=1e-6)
    by_hand = (slow.astype(float) @ counts.T.astype(float) / counts.sum(1)).T
    chance = task.chance()
    np.testing.assert_allclose(curve.draws, (by_hand - chance) / (by_hand[:, -1:] - chance), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_transfer_on_a_gpu_equals_that_on_a_cpu():
    (basis,) = orthogonal(D, SHARED)
    embedded, tasks = planted([basis] * 2, inside=1.0)
    cpu, gpu = (pairs_of(transfer(embedded, tasks, SHARED, 20, 0, foundation=embedded, device=device))
                for device in ("cpu", "cuda"))
    for key, pair in cpu.items():
        assert gpu[key]["kept"] == pytest.approx(pair["kept"], abs=0.01)
        assert gpu[key]["random"]["value"] == pytest.approx(pair["random"]["value"], abs=0.01)


# ---------------------------------------------------------------- identities


def faces(domain: str, people: list[str], shots: int = 3, name: str = "train"):
    """A split in which person P has the class P-of-the-domain, as sources name them, and is known as P."""
    labels = np.repeat(np.arange(len(people)), shots)
    return SimpleNamespace(
        domain=domain, name=name, folder=f"{domain}/{name}", labels=labels,
        classes=[f"{person} in {domain}" for person in people],
        protocol=None if name == "train" else {"name": "verification"},
        index={"provenance": {"source": domain, "data_set": [domain]}},
        fields=lambda row: {"person": people[labels[row]]},
        optional=lambda column: np.full(len(labels), -1))


def people_task(domain: str, fitted: list[str], tested: list[str]) -> Task:
    base, test = faces(domain, fitted), faces(domain, tested, name="test")
    good = np.ones(len(base.labels), bool), np.ones(len(test.labels), bool)
    return make_task(base, test, good, 100, 0)


def test_nobody_is_fitted_on_who_is_tested_in_any_domain():
    hq, lq = people_task("face_hq", ["a", "b", "c"], ["x", "y"]), people_task("face_lq", ["x", "d", "b"], ["a", "z"])
    drop_tested([hq, lq], 100, 0)
    fitted = [sorted({task.train.fields(row)["person"] for row in task.fit}) for task in (hq, lq)]
    assert fitted == [["b", "c"], ["b", "d"]] and len(hq.fit) == len(lq.fit) == 6
    again = people_task("face_hq", ["a", "b", "c"], ["x", "y"])
    drop_tested([again], 4, 0)
    assert len(again.fit) == 4  # no more are looked up than are used


def test_a_source_is_told_apart_on_people_who_were_not_fitted_on():
    """Test images of a source, and of a further test split, without those of people in any task's training rows."""
    tasks = [people_task("face_hq", ["a", "b", "c", "d"], ["x", "y"]), people_task("face_lq", ["e", "f"], ["z", "w"])]
    further = faces("face_hq", ["a", "e", "new"], name="more")
    further.protocol["ood"] = True  # a source of its own
    others = {"face_hq": [(tasks[0].split, tasks[0].probe), (further, np.arange(9))], "face_lq": []}
    fits = [task.fit for task in tasks]

    def features(split, rows):
        return np.random.default_rng(0).normal(size=(len(rows), 2)) + 9 * (split.domain == "face_lq")

    fitted = {"tuned": [features(task.train, rows) for task, rows in zip(tasks, fits, strict=True)]}
    tested = {"tuned": [features(task.split, task.probe) for task in tasks]}
    ids = [name_identities(task.split, task.probe) for task in tasks]
    rows = unseen_sources({"tuned": features}, fitted, tested, ids, tasks, fits, others, 100, 10, 0)
    assert [(r.source, r.images, r.identities) for r in rows] == [("face_hq (more)", 3, 1)]


def test_a_person_in_two_tasks_is_drawn_in_both():
    """All who are right are so in both tasks: drawn apart, the errors of the two would half cancel."""
    who = np.repeat([f"person {i}" for i in range(30)], 4)
    right = np.repeat(np.arange(30) < 15, 4)
    joint = balanced_accuracy([right, right], [who, who], 400, 0)
    apart = balanced_accuracy([right, right], [who, np.char.add("other ", who)], 400, 0)
    assert joint.value == apart.value == 0.5
    # the standard error is √(0.25 / 30) = 0.091 of 30 people, and 0.065 if they were 60
    assert joint.draws.std() == pytest.approx(0.091, abs=0.012) and apart.draws.std() == pytest.approx(0.065, abs=0.012)


@pytest.mark.parametrize("rest", [200, 8])
def test_a_source_that_is_statistically_the_same_is_found_however_few_images_remain(rest):
    """Two tasks that overlap; of one, a source is left out that hardly differs from the `rest` that stays."""
    rng = np.random.default_rng(1)

    def split(name, domain, sources):
        return SimpleNamespace(name=name, domain=domain, folder=f"{domain}/{name}", labels=np.arange(len(sources)),
                               classes=[f"{name} {i}" for i in range(len(sources))], protocol=None,
                               index={"provenance": {"source": "merge", "data_set": ["a", "b"]}},
                               fields=lambda row: {"source": sources[row]})

    two, one = split("two", "face_hq", ["a"] * (400 - rest) + ["b"] * rest), split("one", "body", ["c"] * 400)
    test = split("test", "face_hq", ["a"] * 400)
    far, x = split("far", "body", ["c"] * 400), {}
    for s in (two, one, test, far):
        x[s.folder] = rng.normal(size=(400, 3)) + 0.7 * (s.domain == "body")
    tasks = [SimpleNamespace(domain="face_hq", train=two), SimpleNamespace(domain="body", train=one)]
    fits = [np.arange(400)] * 2
    others = {"face_hq": [(test, np.arange(400))], "body": [(far, np.arange(400))]}
    fitted = {"tuned": [x[two.folder], x[one.folder]]}
    tested = {"tuned": [x[test.folder], x[far.folder]]}
    ids = [np.array(["hq " + name for name in test.classes]), np.array(["body " + name for name in far.classes])]
    spaces = {"tuned": lambda split, rows: x[split.folder][rows]}
    rows = unseen_sources(spaces, fitted, tested, ids, tasks, fits, others, 400, 20, 0)
    found = next(r for r in rows if r.source == "a").spaces["tuned"]
    assert 0.55 < found["recall"] < 0.9 and 0.6 < found["value"] < 0.85
    assert found["low"] < found["value"] < found["high"]


def test_one_identity_is_no_test():
    with pytest.raises(InputError, match="only one identity can be tested"):
        people_task("face_hq", ["a", "b"], ["x"])
    assert mistrust(19) == "19 identities: interval unreliable" and not mistrust(20)


# ---------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def degraded_run(demo_root, tiny_run, tmp_path_factory):
    """An analysis of a run that degraded its faces, on data without test images of bodies, chosen by --splits, where
    the untouched backbone could not read three images: analysis.json, report.md and what was printed."""
    folder = tmp_path_factory.mktemp("degraded")
    run, data = folder / "run", folder / "data"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("eval", "analysis", "last"))
    config = json.loads((run / "config.json").read_text())
    config["options"]["degrade"] = "0.8@0.3"
    (run / "config.json").write_text(json.dumps(config))
    shutil.copytree(demo_root, data, ignore=lambda path, names: ["test"] if path.endswith("body") else [])
    whole, embedded = read_embeddings, {}

    def damaged(embedder, split):
        x = whole(embedder, split)[:]
        embedded[embedder.name, split.domain, split.name] = x
        if embedder.name == "foundation" and split.domain == "face_hq":
            x[:3] = np.nan
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyze, "read_embeddings", damaged)
        run_here("--run", run, "--data", data, "--splits", "object/collage", "--bootstrap", "5", "--components", "16",
                 "--workers", "0", "--canon", "0", "--map", "pca", "--delete", "54:64", "--device", "cpu")
    result = json.loads((run / "analysis/analysis.json").read_text())
    return result, (run / "analysis/report.md").read_text(), embedded


def test_what_is_left_out_is_told_and_the_test_split_can_be_chosen(degraded_run):
    result, report, _ = degraded_run
    assert result["domains"] == ["object", "face_hq", "face_lq"]
    assert result["splits"]["object"] == ["train", "collage"] and result["splits"]["face_hq"] == ["train", "test"]
    assert "no test split in distribution" in result["left_out"]["body"] and "| body | - | - | left out: " in report
    assert "| object | train | collage | " in report and "identities: interval unreliable" in report
    # the last LayerNorm of a random start, without a bias, leaves 63 of 64 dimensions to vary
    assert result["transfer"]["tuned"]["limit"] == result["explored"][0]["deleted"]["to"] == 63


def test_a_domain_left_out_is_printed(demo_root, tmp_path, capsys):
    root = open_root(demo_root)
    del root["body"]["test"], root["face_hq"]["train"]
    pairs, left_out = choose_pairs(root, list(root), None, "DATA")
    assert list(pairs) == ["object", "face_lq"] and pairs["object"][1].name == "val"
    assert left_out == {"face_hq": "no training split", "body": "no test split in distribution"}
    assert "object: tested on val, not on collage (--splits chooses)" in capsys.readouterr().out
    with pytest.raises(InputError, match="the run has no object"):
        choose_pairs(root, ["face_lq"], "object/val", "DATA")


def fake_split(name: str, protocol: dict | None = None, domain: str = "object", classes: str = "ab"):
    return SimpleNamespace(domain=domain, name=name, folder=f"{domain}/{name}", protocol=protocol,
                           classes=list(classes), labels=np.arange(len(classes)))


def test_the_split_of_the_trained_classes_is_tested_and_never_one_that_was_trained_on(capsys):
    def classification(reference, **more):
        return {"name": "classification", "reference": reference, **more}

    splits = [fake_split("aa-merged"), fake_split("animals", classification("wild")), fake_split("train"),
              fake_split("art", classification("train", ood=True)), fake_split("val", classification("train"))]
    root = {"object": {split.name: split for split in splits},
            "face_hq": {name: fake_split(name, None, "face_hq") for name in ("casia", "train")}}
    pairs, left_out = choose_pairs(root, ["object", "face_hq"], None, "DATA")
    assert {domain: test.name for domain, (_, test) in pairs.items()} == {"object": "val"}
    assert left_out == {"face_hq": "no test split in distribution"}  # casia was trained on: it is no test
    assert capsys.readouterr().out == "  object: tested on val, not on animals, art (--splits chooses)\n"
    assert choose_pairs(root, ["object"], "object/animals", "DATA")[0]["object"][1].name == "animals"
    with pytest.raises(InputError, match="aa-merged is a training split"):
        choose_pairs(root, ["object"], "object/aa-merged", "DATA")
    base, good = fake_split("train"), (np.ones(2, bool), np.ones(2, bool))
    assert make_task(base, fake_split("animals", {}, classes="xy"), good, 9, 0).startswith("no class of animals is in")
    assert make_task(base, fake_split("animals", {}, classes="ax"), good, 9, 0).startswith("one class of animals is in")


def test_rows_that_one_backbone_could_not_read_are_left_out(degraded_run):
    result, _, embedded = degraded_run
    assert np.isnan(embedded["foundation", "face_hq", "train"][0, 0])
    for weights in ("tuned", "foundation"):
        for pair in result["transfer"][weights]["pairs"]:
            assert np.isfinite(pair["full"])
    assert result["separability"]["spaces"]["foundation"]["logistic"]["value"] > 0
    assert analyze.find_readable([np.array([[1.0], [np.nan]]), np.array([[1.0], [1.0]])]).tolist() == [True, False]


def test_a_run_that_degraded_its_faces_is_fitted_on_degraded_ones(degraded_run, demo_root):
    result, report, embedded = degraded_run
    assert result["degraded"] == {"face_lq": 0.8} and "degraded as in training (severity up to 0.8)" in report
    assert ("tuned", "face_lq", "train-degraded80-0") in embedded and ("tuned", "face_lq", "train") not in embedded
    assert ("tuned", "face_hq", "train") in embedded
    plain = open_split(demo_root / "face_lq/train")
    split = Degraded(plain.folder, 0.8, 0)
    maker, arguments = split.__reduce__()  # as a loader process gets it
    assert torch.equal(maker(*arguments).image(5), split.image(5)) and not torch.equal(split.image(5), plain.image(5))
    assert torch.equal(Degraded(plain.folder, 0.0, 0).image(5), plain.image(5))


def test_analysis_is_one_process(monkeypatch, tiny_run):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process, not under torchrun"):
        run_here("--run", tiny_run)
