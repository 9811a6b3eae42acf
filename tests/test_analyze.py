"""The analysis on embeddings with planted structure, where the right answer is known; the script; the claims."""

import json
import shutil
from types import SimpleNamespace

import click
import numpy as np
import pytest
from sklearn.decomposition import PCA

import analyze
import evaluate
from analyze import Claim, Measured, Task
from tests.conftest import script


def run_here(*arguments) -> int:
    return analyze.main.main([str(a) for a in arguments], standalone_mode=False)


def planted(bases: list[np.ndarray], people: int = 60, shots: int = 6, noise: float = 0.02, seed: int = 0,
            offsets: list[np.ndarray] | None = None) -> tuple[dict, list[Task]]:
    """One task per basis [k, D]: identities live in its span, shots differ by noise; fit and test people differ."""
    rng = np.random.default_rng(seed)
    embedded, tasks = {}, []
    for name, basis, offset in zip(("object", "face_hq", "face_lq", "body"), bases, offsets or [0.0] * 4, strict=False):
        def draw(basis=basis, offset=offset):
            x = np.repeat(rng.normal(size=(people, len(basis))) @ basis, shots, axis=0) + offset
            x = x + noise * rng.normal(size=x.shape)
            return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

        ids, n = np.repeat(np.arange(people), shots), people * shots
        split = SimpleNamespace(labels=ids)
        # every task is scored as people are: the nearest other image
        tasks.append(Task(name + "*", split, split, np.arange(n), np.arange(n), np.arange(n), np.arange(n), ids, ids,
                          np.eye(n, dtype=bool)))
        embedded[name + "*"] = (draw(), draw())
    return embedded, tasks


def orthogonal(D: int, *sizes: int, seed: int = 0) -> list[np.ndarray]:
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0]
    return [q[a : a + k] for a, k in zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True)]


GRID = [1, 2, 4, 8, 16, 20, 24, 32, 48, 64]


def pairs_of(result: dict) -> dict:
    return {(p["fit"].strip("*"), p["test"].strip("*")): p for p in result["pairs"]}


def test_tasks_in_one_shared_subspace_serve_each_other():
    (shared,) = orthogonal(64, 20)
    embedded, tasks = planted([shared] * 3, noise=0.6)
    result = analyze.transfer(embedded, tasks, GRID, 20, 50, 0)
    for pair in pairs_of(result).values():
        assert pair["raw"] > 0.5 and pair["kept"] > 0.97 and pair["k95"] <= 20
        assert pair["random"] < pair["low"]  # a random subspace of 20 of 64 dimensions keeps less
    assert result["overlap"]["object*"]["face_hq*"] > 0.7 > 2 * result["overlap_chance"]


def test_tasks_in_orthogonal_subspaces_do_not():
    a, b = orthogonal(64, 20, 20)
    embedded, tasks = planted([a, b])
    pairs = pairs_of(analyze.transfer(embedded, tasks, GRID, 20, 50, 0))
    for own, other in (("object", "face_hq"), ("face_hq", "object")):
        assert pairs[own, own]["kept"] > 0.97 and pairs[own, own]["k95"] <= 20
        assert pairs[own, other]["kept"] < 0.6 and pairs[own, other]["k95"] > 20
        assert pairs[own, other]["random"] > pairs[own, other]["kept"]  # worse than random: exactly the wrong subspace


def test_a_task_apart_by_its_mean_alone_is_separable_and_shares_components():
    (shared,) = orthogonal(64, 20)
    shift = np.random.default_rng(5).normal(size=64)
    embedded, tasks = planted([shared, shared], offsets=[np.zeros(64), 2.0 * shift / np.linalg.norm(shift)])
    ids = [np.repeat(np.arange(60), 6)] * 2
    fit, test = ([embedded[t.domain][i] for t in tasks] for i in (0, 1))
    apart = analyze.separability(fit, test, ids, 50, 0)
    together = analyze.separability([fit[0], fit[0][::-1]], [test[0], test[0][::-1]], ids, 50, 0)
    assert min(v["value"] for v in apart.values()) > 0.97
    assert all(v["low"] < 0.56 and 0.4 < v["value"] < 0.62 for v in together.values())  # one set twice: chance
    pairs = pairs_of(analyze.transfer(embedded, tasks, GRID, 20, 50, 0))
    assert pairs["object", "face_hq"]["kept"] > 0.95


def test_rank_limit_is_marked():
    (shared,) = orthogonal(64, 20)
    few = analyze.transfer(*planted([shared], people=30, shots=6), GRID, 20, 0, 0)
    many = analyze.transfer(*planted([shared], people=60, shots=6), GRID, 20, 0, 0)
    assert few["images_per_task"] == 180 and few["rank_limited"] and not many["rank_limited"]


def test_components_equal_scikit_learn():
    x = np.random.default_rng(0).normal(size=(200, 12)) @ np.diag(np.arange(1, 13))
    mean, vectors, variances = analyze.principal_components(x)
    pca = PCA().fit(x)
    np.testing.assert_allclose(mean, x.mean(0))
    np.testing.assert_allclose(variances, pca.explained_variance_, rtol=1e-9)
    np.testing.assert_allclose(np.abs((vectors * pca.components_.T).sum(0)), 1, rtol=1e-6)


def test_hits_equal_a_literal_loop():
    embedded, (task,) = planted([np.eye(10)], people=12, shots=4, noise=1.2)
    x = embedded[task.domain][1].astype(np.float64)
    mean, vectors, _ = analyze.principal_components(embedded[task.domain][0])
    hits = analyze.hits_by_k((x - mean) @ vectors, (x - mean) @ vectors, task, [3, 10])
    for row, k in zip(hits, (3, 10), strict=True):
        z = [vectors[:, :k].T @ (v - mean) for v in x]
        for i in range(len(x)):
            others = [j for j in range(len(x)) if j != i]
            best = max(others, key=lambda j: z[i] @ z[j] / np.linalg.norm(z[i]) / np.linalg.norm(z[j]))
            assert row[i] == (task.target[best] == task.target[i])


def test_components_needed_by_hand():
    grid = [1, 2, 4, 8]
    assert analyze.components_needed(np.array([0.5, 0.99, 0.98, 1.0]), grid, 0.99) == 8  # 4 falls below again
    assert analyze.components_needed(np.array([0.5, 0.99, 1.0, 1.0]), grid, 0.99) == 2
    assert analyze.components_needed(np.array([1.0, 1.0, 1.0, 1.0]), grid, 0.99) == 1
    assert analyze.components_needed(np.array([1.0, 1.0, 1.0, np.nan]), grid, 0.99) is None
    assert analyze.kept(np.array([0.4, 0.2]), 0.6, 0.2).tolist() == pytest.approx([0.5, 0.0])


# ---------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def analysed(tiny_run):
    script("evaluate.py", "--run", tiny_run, "--bootstrap", "20", "--workers", "0")
    return script("analyze.py", "--run", tiny_run, "--bootstrap", "20", "--components", "16", "--workers", "0")


def test_analysis_writes_what_the_design_lists(analysed, tiny_run):
    out = tiny_run / "analysis"
    result = json.loads((out / "analysis.json").read_text())
    domains = ["object", "face_hq", "face_lq", "body"]
    for weights in ("tuned", "foundation"):
        pairs = result["transfer"][weights]["pairs"]
        assert {(p["fit"], p["test"]) for p in pairs} == {(a, b) for a in domains for b in domains}
        assert all(p["k"] == 16 for p in pairs)
        rows = result["transfer"][weights]["rows"]
        assert len({r["fit"] for r in rows}) == 4 + 10 and max(r["k"] for r in rows) == 64
    assert set(result["separability"]["spaces"]) == {"foundation", "tuned", "pixels"}
    assert (out / "transfer.png").stat().st_size > 20_000 and (out / "separability.png").stat().st_size > 5_000
    assert "| PCs of | used by |" in analysed.stdout and (out / "transfer.csv").read_text().count("\n") > 500


def test_fit_and_test_identities_are_disjoint(demo_root):
    from data_prep.shards import open_root

    for domain, splits in open_root(demo_root).items():
        base, test = analyze.find_splits(splits)
        task = analyze.make_task(base, test, (np.ones(len(base), bool), np.ones(len(test), bool)), 2000, 0)
        fitted = {task.train.classes[label] for label in task.train.labels[task.fit]}
        tested = {task.split.classes[label] for label in task.split.labels[task.probe]}
        assert fitted and tested and not fitted & tested
        assert 0 < task.chance() < 0.6
        if domain == "object":
            assert {task.train.classes[i] for i in task.train.labels[task.gallery]} == tested
    body = open_root(demo_root)["body"]["test"]
    camera, ignored = body.column("camera"), task.ignored
    for i, j in zip(*np.nonzero(ignored), strict=True):
        a, b = task.probe[i], task.gallery[j]
        assert body.labels[a] == body.labels[b] and camera[a] == camera[b]


def test_unreadable_images_and_lone_identities_leave_a_task(demo_root):
    from data_prep.shards import open_root

    base, test = analyze.find_splits(open_root(demo_root)["object"])
    good = np.ones(len(base), bool), np.arange(len(test)) % 3 > 0
    task = analyze.make_task(base, test, good, 2000, 0)
    assert good[1][task.probe].all() and len(task.probe)
    assert analyze.make_task(base, test, (good[0], test.labels == test.labels[-1]), 2000, 0) is None  # one class
    base, test = analyze.find_splits(open_root(demo_root)["face_hq"])
    first = np.unique(test.labels, return_index=True)[1]
    alone = np.isin(np.arange(len(test)), first)  # nobody has a second image
    assert analyze.make_task(base, test, (np.ones(len(base), bool), alone), 2000, 0) is None


def test_class_means_of_single_images_in_any_order():
    """One training image a class, not in the order of the classes: each must still stand for its own class."""
    x = np.eye(4)
    task = Task("object", None, None, np.arange(4), np.arange(4), np.arange(4), np.array([2, 0, 3, 1]), np.arange(4),
                np.arange(4), None)
    assert analyze.hits_by_k(x, x[[2, 0, 3, 1]], task, [4]).all()


def test_pixel_statistics_see_format_and_not_content(demo_root):
    from data_prep.shards import open_root

    split = open_root(demo_root)["body"]["train"]
    x = analyze.pixel_statistics(split, np.arange(5))
    image = split.image(2).double().numpy() / 255
    assert x.shape == (5, 12) and np.isfinite(x).all()
    np.testing.assert_allclose(x[2, :6], [*image.mean((1, 2)), *image.std((1, 2))])


# ---------------------------------------------------------------- claims


def measured(name, role="unified", backbone="clip", values=None, foundation=None, domains=("object", "body"), **more):
    rows = [evaluate.Row(name, weights, d, "test", "reid", "rank-1", v, v - 0.01, v + 0.01, 100)
            for weights, table in (("foundation", foundation or {}), ("tuned", values or {})) for d, v in table.items()]
    config = {"backbone": backbone, "size": "large", "model": None, "weights": "pretrained", "image_size": None,
              "embed_dim": 0, "domains": list(domains), "order": None, "role": role,
              "counts": dict.fromkeys(domains, more.get("images", 1000))}
    return Measured(name, config, rows + more.get("rows", []), more.get("analysis"))


GOOD = {"values": {"object": 0.6, "body": 0.7}, "foundation": {"object": 0.4, "body": 0.3}}


def test_claim_backbones_needs_all_three():
    one = analyze.claim_backbones([measured("a", **GOOD)])
    assert one.verdict == "not measured (no run of eva02)" and "2 of 2" in one.measured
    runs = [measured(b, backbone=b, **GOOD) for b in ("clip", "eva02", "dinov3")]
    assert analyze.claim_backbones(runs).verdict == "holds"
    runs[2] = measured("d", backbone="dinov3", values=GOOD["values"])
    assert analyze.claim_backbones(runs).verdict == "not measured (no foundation scores)"
    runs[1] = measured("e", backbone="eva02", values={"object": 0.41, "body": 0.7}, foundation=GOOD["foundation"])
    assert analyze.claim_backbones(runs).verdict == "fails"


@pytest.mark.parametrize("expert, verdict", [(0.5, "holds"), (0.9, "fails"),
                                             (0.71, "not measured (intervals too wide to decide)")])
def test_claim_experts(expert, verdict):
    rival = measured("x", "expert", values={"body": expert}, domains=["body"])
    claim = analyze.claim_experts([measured("a", **GOOD)], [rival], 0.01)
    assert claim.verdict == verdict and f"{100 * (0.7 - expert):+.1f}" in claim.measured
    for change in ({"backbone": "eva02"}, {"images": 4000}):
        other = measured("x", "expert", values={"body": expert}, domains=["body"], **change)
        claim = analyze.claim_experts([measured("a", **GOOD)], [other], 0.01)
        assert claim.verdict.startswith("not measured (no expert")


def test_claim_generalisation_uses_retention_out_of_distribution():
    def rows(value, spread=0.01):
        return [evaluate.Row("a", "tuned", "object", "ood", "classification, out of distribution",
                             "retention of nearest-mean top-1", value, value - spread, value + spread, 50),
                evaluate.Row("a", "tuned", "object", "val", "classification", "retention of nearest-mean top-1", 0.1, 0,
                             1, 50)]

    assert analyze.claim_generalisation([measured("a", rows=rows(0.97))], 0.95).verdict == "holds"
    assert analyze.claim_generalisation([measured("a", rows=rows(0.80))], 0.95).verdict == "fails"
    assert "too wide" in analyze.claim_generalisation([measured("a", rows=rows(0.97, 0.1))], 0.95).verdict
    assert analyze.claim_generalisation([measured("a")], 0.95).verdict.startswith("not measured")


def test_claim_forgetting():
    unified = measured("u", **GOOD)
    forgets = measured("s", "sequential", values={"object": 0.3, "body": 0.7})
    keeps = measured("s", "sequential", values={"object": 0.6, "body": 0.1})  # only the last task is lower
    assert analyze.claim_forgetting([unified], [forgets]).verdict == "holds"
    assert analyze.claim_forgetting([unified], [keeps]).verdict == "fails"
    assert analyze.claim_forgetting([unified], []).verdict.startswith("not measured")


@pytest.mark.parametrize("tuned, pixels, verdict", [
    (0.99, 0.90, "holds"), (0.99, 0.99, "holds, but no better than pixel statistics"), (0.7, 0.5, "fails"),
])  # fmt: skip
def test_claim_separable(tuned, pixels, verdict):
    spaces = {name: {"logistic": {"value": v, "low": v - 0.005, "high": v + 0.005}}
              for name, v in (("tuned", tuned), ("foundation", 0.98), ("pixels", pixels))}
    run = measured("a", analysis={"separability": {"spaces": spaces}})
    assert analyze.claim_separable([run], 0.95).verdict == verdict


@pytest.mark.parametrize("kept, random, dim, verdict", [
    (0.99, 0.6, 768, "holds"), (0.99, 0.98, 768, "holds, but no better than random subspaces"),
    (0.8, 0.2, 768, "fails"), (1.0, 1.0, 64, "not measured (a space of no more than k dimensions)"),
])  # fmt: skip
def test_claim_components(kept, random, dim, verdict):
    own = {"fit": "body", "test": "body", "k": 99, "kept": 0.0, "low": 0, "high": 1, "random": 0}  # not the claim
    across = own | {"fit": "object", "k": min(99, dim), "kept": kept, "low": kept - 0.02, "random": random}
    pairs = [across, own]
    run = measured("a", analysis={"transfer": {"tuned": {"pairs": pairs, "dim": dim, "rank_limited": True}}})
    assert analyze.claim_components([run], 0.95).verdict == verdict
    across["kept"] = None
    assert analyze.claim_components([run], 0.95).verdict.startswith("not measured (a task is not above chance")


def test_claims_table_of_a_folder(analysed, tiny_run):
    result = script("analyze.py", "claims", tiny_run.parent)
    table = json.loads((tiny_run.parent / "claims.json").read_text())
    assert len(table) == 7 and set(table[0]) == set(Claim.__annotations__)
    assert all(row["verdict"].startswith(("holds", "fails", "not measured (")) for row in table)
    assert "not measured (no human figures" in result.stdout and (tiny_run.parent / "claims.csv").exists()
    assert (tiny_run.parent / "claims.md").read_text().startswith("| claim | measured | threshold | verdict |")


@pytest.mark.parametrize("arguments, words", [
    ([], "give --run RUN, or `claims RUNS_FOLDER`"), (["--run", "{none}"], "is no run"),
    (["claims", "{none}"], "no evaluated run"), (["--run", "{run}", "--data", "{object}"], "nothing to analyse"),
    (["--run", "{run}", "--components", "0"], "0 is not in the range"),
])  # fmt: skip
def test_bad_input(arguments, words, tiny_run, demo_root, tmp_path):
    shutil.copytree(demo_root / "object/val", tmp_path / "data/object/val")  # test images alone
    places = {"none": tmp_path / "none", "run": tiny_run, "object": tmp_path / "data"}
    with pytest.raises(click.ClickException) as error:
        run_here(*[a.format(**places) for a in arguments])
    assert words in error.value.format_message()
