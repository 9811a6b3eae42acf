"""Every metric against an independent implementation or a case computed by hand; evaluate.py as a script."""

import csv
import hashlib
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import click
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from sklearn.neighbors import NearestCentroid

import evaluate
import protocols.pairs
from data_prep import DOMAINS, InputError
from data_prep.format import Split, open_root
from models.runs import load_foundation, load_run, load_tuned
from protocols.bootstrap import Estimate, bootstrap_counts, intervals, retention, weighted_mean
from protocols.classify import class_means, nearest_mean, nearest_neighbours, score_classification
from protocols.embed import hash_weights
from protocols.pairs import d_prime, equal_error_rate, fold_accuracy, roc, tar_at_far
from protocols.results import Row, read_rows
from protocols.search import average_precision, score_gallery
from reports.rows import chance
from tests.conftest import script
from tests.test_train import spoil_jpeg


def run_here(*arguments) -> int:
    return evaluate.main.main([str(a) for a in arguments], standalone_mode=False)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# ---------------------------------------------------------------- verification


@pytest.mark.parametrize("seed", range(5))
def test_roc_and_auc_equal_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    same = rng.random(300) < 0.4
    scores = np.round(rng.normal(size=300) + same, 1)  # rounded: many ties
    weights = None if seed % 2 else rng.integers(0, 4, 300)
    far, tar = roc(scores, same, weights)
    assert np.trapezoid(tar, far) == pytest.approx(roc_auc_score(same, scores, sample_weight=weights), abs=1e-12)
    if weights is None:
        x, y, _ = roc_curve(same, scores, drop_intermediate=False)
        np.testing.assert_allclose(far, x, atol=1e-12)
        np.testing.assert_allclose(tar, y, atol=1e-12)


def test_weights_equal_repetition():
    rng = np.random.default_rng(0)
    same, scores, folds = rng.random(60) < 0.5, rng.normal(size=60).round(1), np.arange(60) % 5
    counts = rng.integers(0, 3, 60)
    again = np.repeat(np.arange(60), counts)
    for f in (lambda s, m, w: np.trapezoid(*roc(s, m, w)[::-1]), d_prime):
        assert f(scores, same, counts) == pytest.approx(f(scores[again], same[again], None))
    assert fold_accuracy(scores, same, folds, counts) == pytest.approx(
        fold_accuracy(scores[again], same[again], folds[again]))


def test_tar_at_far_by_hand():
    # sorted: g g i g i i g i, as thresholds fall: (FAR, TAR) = (0, 1/4) (0, 2/4) (1/4, 2/4) (1/4, 3/4) (2/4, 3/4) ...
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    same = np.array([1, 1, 0, 1, 0, 0, 1, 0], dtype=bool)
    far, tar = roc(scores, same)
    assert [tar_at_far(far, tar, f) for f in (0.0, 0.2, 0.25, 0.5, 0.74, 0.75, 1.0)] == [
        0.5, 0.5, 0.75, 0.75, 0.75, 1.0, 1.0]
    assert equal_error_rate(far, tar) == pytest.approx(0.25)  # at the fourth threshold FAR = FRR = 1/4


def test_equal_error_rate_against_a_fine_search():
    rng = np.random.default_rng(3)
    same = rng.random(4000) < 0.5
    scores = rng.normal(size=4000) + 1.5 * same
    far, tar = roc(scores, same)
    t = np.linspace(-3, 5, 20001)
    fa = 1 - np.searchsorted(np.sort(scores[~same]), t) / (~same).sum()
    fr = np.searchsorted(np.sort(scores[same]), t) / same.sum()
    assert equal_error_rate(far, tar) == pytest.approx((fa + fr)[np.abs(fa - fr).argmin()] / 2, abs=1e-3)


def test_d_prime_by_hand_and_its_relation_to_auc():
    # genuine 2, 4 (mean 3, variance 1); impostors 0, 2 (mean 1, variance 1): d' = 2
    assert d_prime(np.array([2.0, 4, 0, 2]), np.array([1, 1, 0, 0], dtype=bool)) == pytest.approx(2.0)
    rng = np.random.default_rng(0)
    same = np.arange(200_000) % 2 == 0
    scores = rng.normal(size=200_000) + same  # d' = 1 and equal variances: AUC = Phi(1/sqrt 2) = 0.7602
    assert d_prime(scores, same) == pytest.approx(1.0, abs=0.01)
    far, tar = roc(scores, same)
    assert np.trapezoid(tar, far) == pytest.approx(0.7602, abs=0.003)


def grid_accuracy(distance, same, folds):
    """Literal transcription of the LFW protocol as insightface has it: a grid of thresholds, first maximum."""
    thresholds = np.arange(0, 4, 0.001)
    accuracies = []
    for fold in np.unique(folds):
        best = np.argmax([((distance[folds != fold] < t) == same[folds != fold]).mean() for t in thresholds])
        accuracies.append(((distance[folds == fold] < thresholds[best]) == same[folds == fold]).mean())
    return np.mean(accuracies)


@pytest.mark.parametrize("seed", range(4))
def test_ten_fold_accuracy_agrees_with_the_grid_search(seed):
    rng = np.random.default_rng(seed)
    x, y = unit(rng.normal(size=(2000, 8))), rng.normal(size=(2000, 8))
    same = rng.random(2000) < 0.5
    y = unit(np.where(same[:, None], x + 0.25 * y, y))
    folds = np.arange(2000) // 200
    ours = fold_accuracy((x * y).sum(1), same, folds)
    assert ours == pytest.approx(grid_accuracy(((x - y) ** 2).sum(1), same, folds), abs=0.004)


def test_ten_fold_accuracy_by_hand():
    # fold 1 is perfect at thresholds in (0.3, 0.6), fold 0 in (0.4, 0.5): both choose 0.45, which serves the other
    scores = np.array([0.9, 0.5, 0.1, 0.4, 0.8, 0.6, 0.3, 0.2])
    same = np.array([1, 1, 0, 0, 1, 1, 0, 0], dtype=bool)
    folds = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    assert fold_accuracy(scores, same, folds) == 1.0
    same[3] = True  # fold 0 now chooses 0.25, which accepts 0.3 of fold 1; fold 1's 0.45 rejects 0.4 of fold 0
    assert fold_accuracy(scores, same, folds) == pytest.approx((3 / 4 + 3 / 4) / 2)


# ---------------------------------------------------------------- gallery


def test_chance_knows_the_camera_rule():
    # one probe; gallery: itself under its own camera (ignored), itself elsewhere, two others: 1 of 3
    split = FakeSplit([0, 0, 0, 1, 1], {"name": "reid"}, role=np.array([0, 1, 1, 1, 1]),
                      camera=np.array([0, 0, 1, 1, 1]))
    row = Row("", "tuned", "face_hq", "test")
    assert chance(split, row) == pytest.approx(1 / 3)
    split.protocol = {"name": "identification"}
    assert chance(split, row) == pytest.approx(2 / 4)
    assert chance(split, replace(row, chance=1 / 11)) == 1 / 11  # where it depends on the reference, the row tells it
    assert np.isnan(equal_error_rate(*roc(np.arange(3.0), np.zeros(3, bool))))


@pytest.mark.parametrize("hits, ap, trapezoid", [([1, 0, 1, 0, 0, 1], 0.722222, 0.677778), ([0, 1], 0.5, 0.25),
                                                 ([0, 0, 1, 1], 0.416667, 0.291667), ([1], 1, 1)])
def test_average_precision_by_hand(hits, ap, trapezoid):
    """The rectangle rule, e.g. (1/1 + 2/3 + 3/6) / 3; trapezoids: ((1 + 1) + (2/3 + 1/2) + (3/6 + 2/5)) / 2 / 3."""
    ranks = np.flatnonzero(hits) + 1
    several = [ranks, np.array([3]), ranks]  # each probe for itself
    assert average_precision(several, trapezoid=True)[[0, 2]] == pytest.approx(trapezoid, abs=1e-6)
    assert literal_compute_ap(np.array(hits)) == pytest.approx(trapezoid, abs=1e-6)
    expected = average_precision_score(hits, -np.arange(len(hits)))
    assert average_precision(several)[[0, 2]] == pytest.approx(ap, abs=1e-6)
    assert average_precision(several)[[0, 2]] == pytest.approx(expected)


def literal_compute_ap(matches):
    """Market-1501's compute_AP: the area under the precision-recall curve by trapezoids, one image after the other."""
    old_recall, old_precision, ap, found = 0.0, 1.0, 0.0, 0
    for place, match in enumerate(matches, 1):
        found += match
        recall, precision = found / matches.sum(), found / place
        ap += (recall - old_recall) * (old_precision + precision) / 2
        old_recall, old_precision = recall, precision
    return ap


def literal_reid(x, ids, cams, roles):
    """The Market-1501 evaluation as torchreid has it, one query after the other."""
    q, g = np.flatnonzero(roles == 0), np.flatnonzero(roles > 0)
    aps, trapezoids, firsts, inps = [], [], [], []
    for i in q:
        order = g[np.argsort(-(x[g] @ x[i]), kind="stable")]
        keep = [j for j in order if not (ids[j] == ids[i] and cams[j] == cams[i])]
        matches = np.array([ids[j] == ids[i] and ids[j] >= 0 for j in keep])
        if not matches.any():
            continue
        cumulative = matches.cumsum() * matches / (np.arange(len(matches)) + 1)
        aps.append(cumulative.sum() / matches.sum())
        trapezoids.append(literal_compute_ap(matches))
        firsts.append(matches.argmax())
        inps.append(matches.sum() / (np.flatnonzero(matches)[-1] + 1))
    firsts = np.array(firsts)
    cmc = {f"rank-{k}": (firsts < k).mean() for k in (1, 5, 10)}
    return {"mAP": np.mean(aps), "mAP trapezoid": np.mean(trapezoids), "mINP": np.mean(inps), **cmc}, len(firsts)


class FakeSplit:
    """What the scorers need of a split."""

    def __init__(self, labels, protocol, **columns):
        self.labels, self.protocol, self.columns, self.folder = np.array(labels), protocol, columns, "fake"
        self.domain, self.name = "body", "fake"
        self.classes = [str(i) for i in range(max(labels) + 1)]

    def optional(self, name):
        return self.columns.get(name, np.full(len(self.labels), -1))

    def column(self, name):
        return self.columns[name]


@pytest.mark.parametrize("seed", range(4))
def test_reidentification_equals_a_literal_transcription(seed):
    rng = np.random.default_rng(seed)
    n = 200
    ids, cams, roles = rng.integers(0, 15, n), rng.integers(0, 3, n), (rng.random(n) < 0.7).astype(int)
    roles[rng.random(n) < 0.1] = 2
    ids[roles == 2] = -1  # distractors: negatives of everybody, of each other too
    x = unit(rng.normal(size=(n, 6)) + 0.8 * rng.normal(size=(16, 6))[ids])
    split = FakeSplit(ids, {"name": "reid"}, role=roles, camera=cams)
    found, _ = score_gallery(x, split, 0, 0)
    expected, counted = literal_reid(x, ids, cams, roles)
    assert found["mAP"].count == counted and {k: f.value for k, f in found.items()} == pytest.approx(expected)


def test_reidentification_by_hand():
    # probe: person 0, camera 0. By similarity: own camera (ignored), distractor, person 0 camera 1, person 1
    x = unit(np.array([[1, 0], [1, 0.01], [1, 0.1], [1, 0.2], [0, 1.0]]))
    roles, cameras = np.array([0, 1, 2, 1, 1]), np.array([0, 0, 1, 1, 1])
    split = FakeSplit([0, 0, -1, 0, 1], {"name": "reid"}, role=roles, camera=cameras)
    found, _ = score_gallery(x, split, 0, 0)
    assert found["mAP"].count == 1 and found["rank-1"].value == 0 and found["rank-5"].value == 1
    assert found["mAP"].value == 0.5 and found["mINP"].value == 0.5
    split.protocol = {"name": "identification"}  # no camera rule: the first one is a hit
    assert score_gallery(x, split, 0, 0)[0]["rank-1"].value == 1


def test_ties_count_against_the_probe():
    x = np.ones((4, 3)) / np.sqrt(3)  # a collapsed space: everything is alike
    split = FakeSplit([0, 0, 1, 1], {"name": "identification"}, role=np.array([0, 1, 1, 1]))
    found = score_gallery(x, split, 0, 0)[0]
    assert found["rank-1"].value == 0 and found["rank-5"].value == 1


def test_unreadable_images_are_left_out():
    rng = np.random.default_rng(0)
    ids, roles = np.repeat(np.arange(10), 4), np.tile([0, 1, 1, 1], 10)
    x = unit(rng.normal(size=(40, 5)) + 2 * rng.normal(size=(10, 5))[ids])
    x[5], x[8] = np.nan, np.nan  # a gallery image and a probe
    keep = np.isfinite(x[:, 0])
    whole = score_gallery(x, FakeSplit(ids, {"name": "identification"}, role=roles), 0, 0)
    part = score_gallery(x[keep], FakeSplit(ids[keep], {"name": "identification"}, role=roles[keep]), 0, 0)
    one, other = whole[0]["rank-1"], part[0]["rank-1"]
    assert one.count == other.count == 9 and one.value == other.value


# ---------------------------------------------------------------- classification


def literal_knn(x, y, labels, k, T):
    answers = []
    for row in x:
        sims = y @ row
        votes = {}
        for i in np.argsort(-sims)[:k]:
            votes[labels[i]] = votes.get(labels[i], 0) + np.exp(sims[i] / T)
        answers.append(max(votes, key=votes.get))
    return np.array(answers)


def test_readouts_equal_literal_ones():
    rng = np.random.default_rng(1)
    centres, labels, truth = rng.normal(size=(6, 5)), rng.integers(0, 6, 150), rng.integers(0, 6, 80)
    y, x = unit(centres[labels] + rng.normal(size=(150, 5))), unit(centres[truth] + rng.normal(size=(80, 5)))
    votes = nearest_neighbours(x, y, labels, 6, False)
    np.testing.assert_array_equal(votes, literal_knn(x, y, labels, 20, 0.07))
    means = class_means(y, labels, 6)
    centroids = unit(NearestCentroid().fit(y, labels).centroids_)
    np.testing.assert_array_equal(nearest_mean(x, means), (x @ centroids.T).argmax(1))


def test_a_split_that_is_its_own_reference_is_scored_leave_one_out():
    rng = np.random.default_rng(2)
    labels = np.arange(40) % 4
    x = unit(rng.normal(size=(40, 6)) + 1.0 * rng.normal(size=(4, 6))[labels])
    mean, vote = [], []
    for i in range(40):
        rest = np.delete(np.arange(40), i)
        mean.append(nearest_mean(x[i : i + 1], class_means(x[rest], labels[rest], 4))[0])
        vote.append(literal_knn(x[i : i + 1], x[rest], labels[rest], 20, 0.07)[0])
    np.testing.assert_array_equal(nearest_mean(x, class_means(x, labels, 4), labels), mean)
    np.testing.assert_array_equal(nearest_neighbours(x, x, labels, 4, True), vote)


def test_a_subset_of_the_classes_is_scored_among_those(demo_root):
    split, reference = open_root(demo_root)["object"]["val"], open_root(demo_root)["object"]["train"]
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(len(reference.classes), 8))
    y, x = unit(centres[reference.labels]), unit(centres[split.labels] + 0.01)
    head = centres[::-1].copy()
    found = score_classification(x, split, (y, reference), head, split.classes[::-1], 20, 0)
    assert found["knn top-1"].count == len(split) and {k: f.value for k, f in found.items()} == {
        "nearest-mean top-1": 1, "knn top-1": 1, "head top-1": 1, "head top-5": 1}
    assert "head top-1" not in score_classification(x, split, (y, reference), head, ["a"], 0, 0)
    # a split of two classes whose means both point away: the classes that it lacks must not win with a cosine of 0
    rows = np.flatnonzero(split.labels < 2)
    part = SimpleNamespace(labels=split.labels[rows], classes=split.classes[:2], folder=split.folder, protocol={})
    found = score_classification(-x[rows], part, (y, reference), None, [], 0, 0)
    assert found["nearest-mean top-1"].value == 0  # each takes the other of the two, never a third
    means = class_means(y, reference.labels, len(reference.classes))
    means[2:] = 0
    assert set(nearest_mean(-x[rows], means)) <= {0, 1}


# ---------------------------------------------------------------- uncertainty, yardstick, retention


def test_bootstrap_resamples_identities_together():
    identities = np.repeat(np.arange(50), 4)
    values = np.random.default_rng(0).random(50)[identities]  # all of a person's images alike: 50 facts, not 200
    figure = intervals(lambda w: {"mean": weighted_mean(values, w)},
                       bootstrap_counts(identities, 800, 0))["mean"]
    error = values.std() / np.sqrt(50)
    assert figure.value == pytest.approx(values.mean())
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * error, rel=0.12)
    counts = next(bootstrap_counts(identities, 1, 0))
    assert all(len(set(counts[identities == i])) == 1 for i in range(50)) and counts.sum() == 200


def test_matched_pairs_are_what_they_say():
    labels = np.array([0, 0, 0, 1, 1, 2, -1, -1, 3])
    pairs = protocols.pairs.matched_pairs(labels, 500, 0)
    a, b = labels[pairs[:, 0]], labels[pairs[:, 1]]
    assert len(pairs) == 1000 and (a[:500] == b[:500]).all() and (a[500:] != b[500:]).all()
    assert (pairs[:, 0] != pairs[:, 1]).all() and a.min() >= 0 and set(a[:500]) == {0, 1}
    assert len(protocols.pairs.matched_pairs(np.array([0, 1, 2]), 10, 0)) == 0  # nobody twice: no genuine pair


def test_retention_is_corrected_for_chance():
    before, after = Estimate(0.6, np.array([0.5, 0.6, 0.7])), Estimate(0.4, np.array([0.3, 0.4, 0.5]))
    kept = retention(before, after, 0.2)
    assert kept.value == pytest.approx(0.5) and kept.draws == pytest.approx([1 / 3, 0.5, 0.6])
    assert retention(Estimate(0.22, np.array([0.18, 0.22, 0.26])), after, 0.2) is None  # no better than chance


# ---------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def evaluated(tiny_run):
    return script("evaluate.py", "--run", tiny_run, "--bootstrap", "20", "--workers", "0")


def test_evaluation_writes_what_the_design_lists(evaluated, tiny_run, demo_root):
    out = tiny_run / "eval"
    rows = json.loads((out / "results.json").read_text())
    with open(out / "results.csv") as file:
        table = list(csv.DictReader(file))
    fields = ["run", "weights", "domain", "split", "protocol", "metric", "value", "low", "high", "count", "identities",
              "chance", "kind", "readout", "measure", "rule", "images", "flip", "lacks", "ood", "unseen"]
    assert list(rows[0]) == list(table[0]) == fields and len(rows) == len(table)
    assert {(r["domain"], r["split"]) for r in rows if r["split"] != "everything"} == {
        ("object", "val"), ("object", "collage"), ("face_hq", "test"), ("face_lq", "test"), ("body", "test")}
    assert {r["domain"] for r in rows if r["split"] == "everything"} == {*DOMAINS, "all"}
    strings = {(r["domain"], r["split"], r["protocol"], r["metric"], r["weights"]) for r in rows}
    assert len(strings) == len(rows) and all(", flip" in r["protocol"] for r in rows)  # a string and metric: one number
    assert len({(row.weights, row.key) for row in read_rows(out)}) == len(rows)  # and so without the string
    assert {r["chance"] for r in rows if r["readout"] == "knn" and r["kind"] == "classification" and not r["unseen"]
            } == {1 / len(Split(demo_root / f"object/{name}").classes) for name in ("val", "collage")}
    assert {r["weights"] for r in rows} == {"foundation", "tuned"}
    assert all(r["low"] <= r["value"] <= r["high"] for r in rows if r["metric"] == "rank-1")
    for name in ("bars.png", "roc.png", "cmc.png"):
        assert (out / name).stat().st_size > 10_000
    report = (out / "report.md").read_text()
    assert "| object/collage (out of distribution) |" in report and "face_hq/test | auc | 50.0" in report
    assert "face_hq/test" in evaluated.stdout


def test_results_equal_the_metrics_on_the_stored_embeddings(evaluated, tiny_run, demo_root):
    rows = {(r["weights"], r["domain"], r["split"], r["metric"]): r["value"]
            for r in json.loads((tiny_run / "eval/results.json").read_text())}
    split = open_root(demo_root)["face_hq"]["test"]
    x = unit(np.load(tiny_run / "eval/embeddings/tuned-face_hq-test.npy"))
    pairs = split.column("pairs")
    auc = roc_auc_score(pairs[:, 2], (x[pairs[:, 0]] * x[pairs[:, 1]]).sum(1))
    assert rows["tuned", "face_hq", "test", "auc"] == pytest.approx(auc, abs=1e-6)
    body = open_root(demo_root)["body"]["test"]
    mine = {"weights": hash_weights(load_foundation(load_run(tiny_run))), "flip": True, "image_size": 32,
            "split": hashlib.sha256((body.folder / "index.json").read_bytes()).hexdigest()}
    path, = [note.with_suffix(".npy")  # runs beside it keep their foundations there, too
             for note in (tiny_run.parent / ".foundation").glob(f"foundation-body-test-{'[0-9a-f]' * 16}.json")
             if json.loads(note.read_text()) == mine]
    expected = literal_reid(unit(np.load(path)), body.labels, body.column("camera"), body.column("role"))[0]["mAP"]
    assert rows["foundation", "body", "test", "mAP"] == pytest.approx(expected, abs=1e-5)


def test_embeddings_are_the_backbone_of_both_images(evaluated, tiny_run, demo_root):
    import torch
    from torchvision.transforms.v2.functional import resize

    model, split = load_tuned(load_run(tiny_run)), open_root(demo_root)["body"]["test"]
    x = resize(split.image(3)[None].float(), [32, 32], interpolation=3, antialias=True).clamp(0, 255) / 255
    x = (x - torch.tensor(model.mean).view(3, 1, 1)) / torch.tensor(model.std).view(3, 1, 1)
    with torch.no_grad():
        expected = (model(x) + model(x.flip(3)))[0].numpy()
    stored = np.load(tiny_run / "eval/embeddings/tuned-body-test.npy")[3]
    np.testing.assert_allclose(stored, expected, rtol=1e-3, atol=1e-5)


def test_embeddings_are_computed_once(evaluated, tiny_run):
    path = tiny_run / "eval/embeddings/tuned-object-val.npy"
    before = path.stat().st_mtime_ns
    run_here("--run", tiny_run, "--bootstrap", 5, "--workers", 0, "--splits", "object/val", "--no-foundation")
    assert path.stat().st_mtime_ns == before
    run_here("--run", tiny_run, "--bootstrap", 5, "--workers", 0, "--splits", "object/val", "--no-flip")
    assert path.stat().st_mtime_ns > before
    run_here("--run", tiny_run, "--bootstrap", 20, "--workers", 0)  # as the other tests expect it


def test_an_untouched_backbone_without_a_run(demo_root, tmp_path):
    model = ["--backbone", "clip", "--size", "tiny", "--weights", "none", "--image-size", 32]
    code = run_here(*model, "--data", demo_root, "--out", tmp_path / "f", "--splits", "face_lq/test",
                    "--bootstrap", 5, "--workers", 0)
    rows = json.loads((tmp_path / "f/eval/results.json").read_text())
    assert code == 0 and {r["weights"] for r in rows} == {"foundation"}


def test_unreadable_test_images_are_counted(demo_root, tiny_run, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(demo_root / "face_hq/test", root / "face_hq/test")
    spoil_jpeg(root / "face_hq/test", 4)
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    run_here("--run", tmp_path / "run", "--data", root, "--bootstrap", 5, "--workers", 0, "--no-foundation")
    rows = json.loads((tmp_path / "run/eval/results.json").read_text())
    pairs = np.array(Split(root / "face_hq/test").column("pairs"))
    touched = (pairs[:, :2] == 4).any(1).sum()
    assert "1 unreadable images left out" in capsys.readouterr().out and touched > 0
    counts = {r["metric"]: r["count"] for r in rows}
    assert counts["auc"] == len(pairs) - touched and counts["pair auc"] == 10_000


@pytest.mark.parametrize("arguments, words", [
    (["--run", "{none}"], "is no run"), ([], "give --run RUN, or --model NAME"),
    (["--run", "{run}", "--splits", "object/test"], "has no split 'object/test'; it has object/collage"),
    (["--run", "{run}", "--splits", "object/train"], "is a training split"),
    (["--run", "{run}", "--data", "{none}"], "no shards"),
    (["--model", "resnet500"], "neither timm nor open_clip has"),
    (["--run", "{partial}"], "has not finished (no done.json)"),
    (["--run", "{run}", "--out", "x"], "--out describes an untouched backbone"),
])  # fmt: skip
def test_bad_input(arguments, words, tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "partial", ignore=shutil.ignore_patterns("eval"))
    (tmp_path / "partial" / "done.json").unlink()
    places = {"run": tiny_run, "none": tmp_path / "none", "partial": tmp_path / "partial"}
    with pytest.raises(click.ClickException) as error:
        run_here(*[a.format(**places) for a in arguments])
    assert words in error.value.format_message() and "\n" not in error.value.format_message()


def test_a_partial_run_needs_consent(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    (tmp_path / "run" / "done.json").unlink()
    run_here("--run", tmp_path / "run", "--allow-partial", "--splits", "body/test", "--bootstrap", 5, "--workers", 0)
    assert (tmp_path / "run/eval/report.md").exists()


def test_rows_of_another_version_are_refused(tmp_path):
    (tmp_path / "results.json").write_text('[{"metric": 1}]')
    with pytest.raises(InputError, match=r"run evaluate.py again"):
        read_rows(tmp_path)
