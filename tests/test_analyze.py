"""The script analyze.py, and the verdicts of the claims table. (Measures: test_subspaces.py, test_separability.py.)"""

import csv
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import click
import numpy as np
import pytest

import analyze
from data_prep import InputError
from protocols.claims import (
    Claim,
    claim_backbones,
    claim_components,
    claim_experts,
    claim_forgetting,
    claim_generalisation,
    claim_humans,
    claim_separable,
    make_table,
)
from protocols.results import (
    Analysed,
    Group,
    Measured,
    Pair,
    Row,
    Scored,
    Separability,
    Space,
    Transfer,
    group_runs,
)
from protocols.separability import pixel_statistics
from protocols.tasks import choose_pairs, make_task
from tests.conftest import script


def run_here(*arguments) -> int:
    return analyze.main.main([str(a) for a in arguments], standalone_mode=False)


# ---------------------------------------------------------------- the script


DOMAINS = ["object", "face_hq", "face_lq", "body"]
FIGURES = ["transfer", "deletion", "separability", "sharing", "spectrum", "map"]


def test_analysis_writes_what_the_design_lists(analysed, tiny_run):
    out = tiny_run / "analysis"
    result = json.loads((out / "analysis.json").read_text())
    for weights in ("tuned", "foundation"):
        pairs = result["transfer"][weights]["pairs"]
        assert {(p["fit"], p["test"]) for p in pairs} == {(a, b) for a in DOMAINS for b in DOMAINS}
        assert all(p["k"] == 16 for p in pairs)
        assert {(p["a"], p["b"]) for p in result["sharing"][weights]["pairs"]} == {(a, b) for a in DOMAINS
                                                                                   for b in DOMAINS}
    for table, controls in ((result["transfer"]["tuned"]["pairs"], ("random", "foundation")),
                            (result["explored"], ("pooled", "bottom", "own_mean", "deleted"))):
        assert all(set(pair[name]) >= {"value", "low", "high"} for pair in table for name in controls)
    assert list(result["separability"]["spaces"]) == ["tuned", "foundation", "pixels", "tuned canon",
                                                      "foundation canon", "pixels canon"]
    assert all(set(s["pairwise"]) == {f"{a}/{b}" for i, a in enumerate(DOMAINS) for b in DOMAINS[i + 1 :]}
               for s in result["separability"]["spaces"].values())
    assert set(result["cka"]) == set(DOMAINS) and all(-1 <= v <= 1.001 for v in result["cka"].values())
    for name in FIGURES:
        assert (out / f"{name}.png").stat().st_size > 20_000 and (out / f"{name}.pdf").read_bytes()[:5] == b"%PDF-"
    assert "| PCs of | used by |" in analysed and "Linear separability" in analysed


def test_tables_hold_every_number_of_the_curves(analysed, tiny_run):
    out = tiny_run / "analysis"
    with open(out / "transfer.csv") as file:
        rows = list(csv.DictReader(file))
    wanted = ("tuned", "components", "body", "object")
    of = [r for r in rows if (r["weights"], r["kind"], r["fit"], r["test"]) == wanted]
    assert [int(r["k"]) for r in of] == list(range(1, 64))  # every k of the 63 dimensions that vary (LayerNorm)
    assert {r["kind"] for r in rows} == {"components", "random", "foundation", "pooled", "bottom", "deleted",
                                         "own mean"}
    pair = next(p for p in json.loads((out / "analysis.json").read_text())["transfer"]["tuned"]["pairs"]
                if (p["fit"], p["test"]) == ("body", "object"))
    at_16 = float(of[15]["kept"]) if of[15]["kept"] else None
    assert at_16 == (None if pair["kept"] is None else pytest.approx(pair["kept"], abs=1e-5))
    with open(out / "dprime.csv") as file:
        assert sum(1 for _ in file) == 1 + 2 * 4 * 4 * 63
    with open(out / "map.csv") as file:
        assert {r["task"] for r in csv.DictReader(file)} == set(DOMAINS)


def test_fit_and_test_identities_are_disjoint(demo_root):
    from data_prep.format import open_root

    for base, test in choose_pairs(open_root(demo_root), DOMAINS, None, "DATA")[0].values():
        domain = base.domain
        task = make_task(base, test, (np.ones(len(base), bool), np.ones(len(test), bool)), 2000, 0)
        fitted = {task.train.classes[label] for label in task.train.labels[task.fit]}
        tested = {task.split.classes[label] for label in task.split.labels[task.probe]}
        assert fitted and tested and not fitted & tested
        assert 0 < task.chance() < 0.6
        if domain == "object":
            assert {task.train.classes[i] for i in task.train.labels[task.gallery]} == tested
    body = open_root(demo_root)["body"]["test"]
    camera, left_out = body.column("camera"), 0
    for probe, mates, ignored in zip(task.probe, task.mates, task.ignored, strict=True):
        rows, wrong = task.gallery[mates], task.gallery[ignored]
        assert len(mates) and (body.labels[rows] == body.labels[probe]).all() and (camera[rows] != camera[probe]).all()
        assert (body.labels[wrong] == body.labels[probe]).all() and (camera[wrong] == camera[probe]).all()
        left_out += len(wrong)
    assert left_out


def test_unreadable_images_and_lone_identities_leave_a_task(demo_root):
    from data_prep.format import open_root

    pairs = choose_pairs(open_root(demo_root), DOMAINS, None, "DATA")[0]
    base, test = pairs["object"]
    good = np.ones(len(base), bool), np.arange(len(test)) % 3 > 0
    task = make_task(base, test, good, 2000, 0)
    assert good[1][task.probe].all() and len(task.probe)
    with pytest.raises(InputError, match="only one identity can be tested"):
        make_task(base, test, (good[0], test.labels == test.labels[-1]), 2000, 0)  # one class
    base, test = pairs["face_hq"]
    first = np.unique(test.labels, return_index=True)[1]
    alone = np.isin(np.arange(len(test)), first)  # nobody has a second image
    why = make_task(base, test, (np.ones(len(base), bool), alone), 2000, 0)
    assert why == "no probe of test has a mate in its gallery that counts"


def test_pixel_statistics_see_format_and_not_content(demo_root):
    from data_prep.format import open_root

    split = open_root(demo_root)["body"]["train"]
    x = pixel_statistics(split, np.arange(5))
    image = split.image(2).double().numpy() / 255
    assert x.shape == (5, 12) and np.isfinite(x).all()
    np.testing.assert_allclose(x[2, :6], [*image.mean((1, 2)), *image.std((1, 2))])


# ---------------------------------------------------------------- claims


def measured(name, role="unified", backbone="clip", values=None, foundation=None, rows=(), analysis=None, spread=0.01,
             **config) -> Measured:
    """A run whose figures are given, {domain: value}; all runs were resampled alike, so equal values pair exactly."""
    domains = list(config.pop("domains", values or {}))
    config = {"backbone": backbone, "size": "large", "model": None, "weights": "pretrained", "image_size": None,
              "embed_dim": 0, "domains": domains, "order": None, "role": role, "schedule": "A", "seed": 0,
              "counts": dict.fromkeys(domains, config.pop("images", 1000)), "lr": name} | config
    noise = np.random.default_rng(0).normal(size=200)
    found = {}
    for weights, table in (("foundation", foundation), ("tuned", values)):
        if table:
            of = [Row(name, weights, d, "test", "", "rank-1", v, 0, 1, 100, kind="reid", measure="rank-1")
                  for d, v in table.items()] + [row for row in rows if row.weights == weights]
            found[weights] = Scored(Path(name), config, 0, {r.key: (r, r.value + spread * noise) for r in of})
    return Measured(name, config, found, analysis)


def alone(*runs: Measured) -> list[Group]:
    return [Group([run]) for run in runs]


TWO = {"values": {"object": 0.6, "body": 0.7}, "foundation": {"object": 0.4, "body": 0.3}}
GOOD = {"values": {"object": 0.6, "face_hq": 0.8, "face_lq": 0.7, "body": 0.7},
        "foundation": {"object": 0.4, "face_hq": 0.5, "face_lq": 0.4, "body": 0.3}}


def test_claim_backbones_needs_all_three():
    families = ["clip", "eva02", "dinov3"]
    one = claim_backbones(alone(measured("a", **GOOD)), families, 0.01)
    assert one.verdict == "not measured (no four-task run of eva02, dinov3)"
    assert "a body/test +40.0 [+40.0, +40.0]" in one.measured
    runs = [measured(b, backbone=b, **GOOD) for b in families]
    assert claim_backbones(alone(*runs), families, 0.01).verdict == "holds"
    runs[2] = measured("d", backbone="dinov3", values=GOOD["values"])
    assert claim_backbones(alone(*runs), families, 0.01).verdict.startswith("not measured (no foundation")
    runs[1] = measured("e", backbone="eva02", values=GOOD["values"] | {"body": 0.29}, foundation=GOOD["foundation"])
    assert claim_backbones(alone(*runs), families, 0.01).verdict == "fails"
    for value, verdict in ((0.395, "holds"), (0.38, "fails")):  # objects may lose a point, not two
        run = measured("o", values=GOOD["values"] | {"object": value}, foundation=GOOD["foundation"])
        assert claim_backbones(alone(run), ["clip"], 0.01).verdict == verdict


ALL = dict.fromkeys(DOMAINS, 0.7)


@pytest.mark.parametrize("expert, verdict", [(0.5, "holds"), (0.705, "holds"), (0.9, "fails")])
def test_claim_experts(expert, verdict):
    unified = alone(measured("a", values=ALL))

    def rivals(**change):
        return alone(*(measured(f"x{d}", "expert", values={d: expert if d == "body" else 0.7}, **change) for d in ALL))

    claim = claim_experts(unified, rivals(), 0.01)
    assert claim.verdict == verdict and f"{100 * (0.7 - expert):+.1f}" in claim.measured
    assert "matched in exposure" in claim.measured
    claim = claim_experts(unified, rivals(images=4000), 0.01)  # as many images as the unified run in all
    assert claim.verdict == verdict and "matched in images" in claim.measured
    for change in ({"backbone": "eva02"}, {"images": 2000}):
        assert claim_experts(unified, rivals(**change), 0.01).verdict.startswith("not measured (no expert run")
    some = claim_experts(unified, rivals()[:3], 0.01)  # one expert is missing: not all four at once
    assert some.verdict.startswith("not measured (no expert run, --domains body")
    two = claim_experts(alone(measured("a", **TWO)), rivals(), 0.01)
    assert two.verdict in ("fails", "not measured (a learned 2 of 4 tasks)")


def test_claim_experts_prefers_exposure_and_tells_the_other():
    unified = alone(measured("a", values=ALL))
    near = [measured(f"x{d}", "expert", values={d: 0.6}) for d in ALL]
    far = [measured(f"y{d}", "expert", values={d: 0.9}, images=4000) for d in ALL]  # four times the exposure
    claim = claim_experts(unified, alone(*near, *far), 0.01)
    assert claim.verdict == "holds" and claim.measured.count("for information") == 4 and "-20.0" in claim.measured


def test_wide_intervals_decide_nothing():
    unified, other = measured("a", values=ALL), [measured(f"x{d}", "expert", values={d: 0.7}) for d in ALL]
    for run in other:
        (row, draws), = run.scored["tuned"].rows.values()
        key = next(iter(run.scored["tuned"].rows))
        run.scored["tuned"].rows[key] = (row, draws + np.random.default_rng(1).normal(size=200) * 0.05)
    claim = claim_experts(alone(unified), alone(*other), 0.01)
    assert claim.verdict == "not measured (intervals too wide to decide)"
    other = [measured(f"x{d}", "expert", values={d: 0.7}) for d in ALL]
    assert claim_experts(alone(unified), alone(*other), 0.01).verdict == "holds"
    other[0].scored["tuned"].seed = 1  # resampled differently: they cannot be paired
    assert "no expert run, --domains object" in claim_experts(alone(unified), alone(*other), 0.01).verdict


def test_seeds_are_averaged_and_other_recipes_are_not():
    seeds = [measured(f"a{i}", values={"body": v}, foundation={"body": 0.5}, seed=i, lr="a")
             for i, v in enumerate((0.49, 0.55))]
    other = measured("b", values={"body": 0.9}, foundation={"body": 0.5}, schedule="B")
    groups = group_runs([*seeds, other])
    assert [len(group.runs) for group in groups] == [2, 1] and groups[0].name == "a0 and 1 more seed"
    lead = groups[0].leads(groups[0], "tuned", "foundation")["body", "test"]
    assert lead.value == pytest.approx(0.02) and lead.low == pytest.approx(0.02)


def humans(lead=0.1, tasks=DOMAINS, raters=2, **leads) -> list[Group]:
    """A run with human trials: model minus humans over all tasks, and on each (those of `leads` differ)."""
    def row(domain, readout, value, metric=None):
        return Row("a", "tuned", domain, "trials", "", metric or readout, value, 0, 1, 50, kind="human trials",
                   readout=readout)

    rows = [row(domain, "lead", value) for domain, value in
            {"all": lead, **dict.fromkeys(tasks, lead), **leads}.items() if value is not None]
    rows += [row("all", "rater", 0.8, f"rater {i}") for i in range(raters)] + [row("all", "beaten", 0.9)]
    return alone(measured("a", values=ALL, rows=rows))


def test_claim_humans():
    assert claim_humans(humans()).verdict == "holds"
    assert claim_humans(humans(-0.1)).verdict == "fails"
    assert claim_humans(humans(0.001)).verdict.startswith("not measured (intervals")
    none = "not measured (no human trials: evaluate.py --humans)"
    assert claim_humans(alone(measured("a", values=ALL))).verdict == none
    assert "a all/trials beaten 90.0" in claim_humans(humans()).measured


def test_claim_generalisation_uses_retention_out_of_distribution():
    def run(value, spread=0.01):
        kept = Row("a", "tuned", "object", "ood", "", "m", value, 0, 1, 50, kind="retention", readout="nearest-mean",
                   measure="top-1", ood=True)
        others = ({"split": "val", "ood": False}, {"readout": "knn"}, {"measure": "ReaL"}, {"unseen": True},
                  {"kind": "gap"})
        rows = [kept, *(replace(kept, metric=f"other {i}", value=0.1, **other) for i, other in enumerate(others))]
        return alone(measured("a", values=ALL, rows=rows, spread=spread))

    assert claim_generalisation(run(0.99), 0.95).verdict == "holds"
    assert claim_generalisation(run(0.80), 0.95).verdict == "fails"
    assert "too wide" in claim_generalisation(run(0.97, 0.1), 0.95).verdict
    assert claim_generalisation(alone(measured("a", values=ALL)), 0.95).verdict.startswith("not measured")


def test_claim_forgetting():
    unified = measured("u", **GOOD)
    untouched = GOOD["foundation"]

    def claim(sequential, run=unified):
        return claim_forgetting(alone(run), alone(*sequential), [], 0.01)

    def verdict(*arguments):
        return claim(*arguments).verdict

    forgets = measured("s", "sequential", values=GOOD["values"] | {"object": 0.3}, foundation=untouched)
    assert verdict([forgets]) == "holds"
    assert "sequential over the untouched -10.0" in claim([forgets]).measured
    last = GOOD["values"] | {"body": 0.1}
    first = measured("s", "sequential", values=last, foundation=untouched, order=["body", *DOMAINS[:3]])
    assert verdict([first]) == "holds"
    assert verdict([]).startswith("not measured (no run of --schedule sequential")
    # the interleaved run forgets, too
    fallen = measured("u", values=GOOD["values"] | {"object": 0.35}, foundation=untouched)
    assert verdict([forgets], fallen) == "fails"
    assert verdict([forgets], measured("u", values=GOOD["values"])) == "not measured (no foundation scores of u)"


def space_of(figure: dict, lead: dict | None = None, converged=True) -> Space:
    return Space(figure, figure, figure, {}, dict.fromkeys(("logistic", "lda", "svm"), converged), lead)


def separable(tuned, **leads):
    def figure(value):
        return {"value": value, "low": value - 0.005, "high": value + 0.005}

    spaces = {"tuned": space_of(figure(tuned))}
    for name, lead in leads.items():
        spaces[name.replace("_", " ")] = space_of(figure(tuned - lead), figure(lead))
        if name.endswith("canon"):
            spaces["tuned canon"] = space_of(figure(tuned))
    return Analysed([*DOMAINS], None, Separability(9, 0.25, spaces, dict.fromkeys(DOMAINS, 100), []))


ABOVE = {"pixels": 0.1, "foundation": 0.02, "pixels_canon": 0.3, "foundation_canon": 0.02}


@pytest.mark.parametrize("tuned, leads, verdict", [
    (0.99, ABOVE, "holds"), (0.7, ABOVE, "fails"), (0.952, ABOVE, "not measured (intervals too wide to decide)"),
    (0.99, ABOVE | {"pixels": 0}, "holds, but no better than pixel statistics"),
    (0.99, ABOVE | {"foundation": 0}, "holds, but no better than the untouched backbone"),
    (0.99, ABOVE | {"pixels_canon": 0}, "holds, but no better than pixel statistics in one format"),
    (0.99, {"pixels": 0.1, "foundation": 0.02},
     "not measured (no matched-format control; call analyze.py --run RUN --canon 32)"),
])  # fmt: skip
def test_claim_separable(tuned, leads, verdict):
    run = measured("a", values=ALL, analysis=separable(tuned, **leads))
    assert claim_separable(alone(run), 0.95).verdict == verdict


def test_claims_without_an_analysis():
    """The run that lacks it is named: another one stands below with a verdict of its own."""
    whole = replace(components(0.99), separability=separable(0.99, **ABOVE).separability)
    for analysis, words in ((None, "a: not analysed; call analyze.py --run RUN on it"),
                            (Analysed(["body"], Transfer([], [], 0, True, 0, 0), None),
                             "a: analysed on one task only")):
        groups = alone(measured("a", values=ALL, analysis=analysis), measured("b", values=ALL, analysis=whole))
        for claim in (claim_separable(groups, 0.95), claim_components(groups, 0.95)):
            assert claim.verdict == f"not measured ({words})" and "b" in claim.measured


def components(kept, random=0.2, foundation=0.2, dim=768, k=99, images=None, tasks=DOMAINS, **more):
    def figure(value):
        return {"value": value, "low": value - 0.02, "high": value + 0.02}

    own = dict.fromkeys(one.name for one in fields(Pair)) | {
        "k": k, "identities": 100, "kept": 0.0, "low": 0, "high": 1, "chance": 0.1, "full_low": 0.7,
        "over_random": figure(-1), "k95": figure(0), "k99": figure(0),  # not the claim
        "raw": 0.8, "full": 0.8, "full_high": 0.9, "random": figure(0)}
    across = own | {"kept": kept, "low": kept - 0.02, "high": kept + 0.02, "k95": figure(40.0), "k99": figure(70.0),
                    "over_random": figure(random), "over_foundation": figure(foundation)} | more
    pairs = [Pair(**(own if a == b else across) | {"fit": a, "test": b}) for a in tasks for b in tasks]
    return Analysed([*tasks], Transfer(pairs, [], images or 5 * dim, True, dim, dim), None)


@pytest.mark.parametrize("analysis, verdict", [
    (components(0.99), "holds"),
    (components(0.99, random=0.0), "holds, but no better than random subspaces"),
    (components(0.99, foundation=0.01), "holds, but no better than foundation PCs"),
    (components(0.99, random=0.0, foundation=0.0), "holds, but no better than random or foundation PCs"),
    (components(0.8), "fails"), (components(0.8, random=0.0), "fails"),
    (components(0.95), "not measured (intervals too wide to decide)"),
    (components(1.0, dim=64, k=16), "not measured (a space of 64 dimensions: 100 components are all of it)"),
    (components(0.99, k=200), "not measured (analysed at 100 components or more; call analyze.py --components 99)"),
])  # fmt: skip
def test_claim_components(analysis, verdict):
    run = measured("a", values=ALL, analysis=analysis)
    claim = claim_components(alone(run), 0.95)
    assert claim.verdict == verdict
    assert "object for body" in claim.measured and "few images" not in claim.measured
    analysis.transfer.pairs[1].kept = None
    if "100" not in verdict:
        claim = claim_components(alone(run), 0.95)
        assert claim.verdict.startswith("not measured (the full space is not above chance: object for face_hq")


def test_other_backbones_and_random_starts_are_listed_apart_and_never_counted():
    runs = [measured(b, backbone=b, **GOOD) for b in ("clip", "eva02")]
    runs.append(measured("lite", backbone=None, model="tf_efficientnet_lite0", **GOOD))
    runs.append(measured("scratch", backbone="dinov3", weights="none", **GOOD))
    table = make_table(runs, 0.01, 0.95, 0.95, 0.95)
    assert len(table) == 3 * 7
    assert table[0].verdict == "not measured (no four-task run of dinov3)" and table[0].backbones == "clip, eva02"
    first = {claim.backbones: claim for claim in table if claim.claim.startswith("Works on")}
    assert first["tf_efficientnet_lite0 (not one of the paper's)"].verdict == "holds"
    assert first["dinov3 from a random start (not one of the paper's)"].verdict == "holds"
    assert all("lite" not in claim.measured and "scratch" not in claim.measured for claim in table[:7])


def test_alternate_is_a_baseline_and_not_imic():
    runs = [measured("alternate", schedule="alternate", **GOOD)]
    first = make_table(runs, 0.01, 0.95, 0.95, 0.95)[0]
    assert first.verdict == "not measured (no four-task run of clip, eva02, dinov3)"


def test_claims_table_of_a_folder(analysed, tiny_run):
    result = script("analyze.py", "claims", tiny_run.parent)
    table = json.loads((tiny_run.parent / "claims.json").read_text())
    assert len(table) == 2 * 7 and set(table[0]) == set(Claim.__annotations__)  # a random start is not CLIP
    assert {row["backbones"] for row in table[7:]} == {"clip from a random start (not one of the paper's)"}
    assert all(row["verdict"].startswith(("holds", "fails", "not measured (")) for row in table)
    assert all(set(f) == {"what", "value", "low", "high", "verdict", "form", "note", "threshold",
                              "identities"}
               for row in table for f in row["findings"])
    assert "no four-task run of clip, eva02, dinov3" in result.stdout
    assert "not measured (no human trials" in result.stdout
    with open(tiny_run.parent / "claims.csv") as file:
        assert [row["verdict"] for row in csv.DictReader(file)] == [row["verdict"] for row in table]
    head = "| claim | backbones | decided by | threshold | verdict |"
    assert (tiny_run.parent / "claims.md").read_text().startswith(head)


def test_a_run_without_draws_is_left_out_and_named(analysed, tiny_run, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(tiny_run, tmp_path / name, ignore=shutil.ignore_patterns("embeddings", "last", "*.safetensors"))
    (tmp_path / "b/eval/draws.npz").unlink()
    (tmp_path / "a/analysis/analysis.json").write_text("{}")
    out = script("analyze.py", "claims", tmp_path).stdout
    assert "left out: " in out and "b/eval/draws.npz" in out
    assert "a/analysis/analysis.json (of another version or damaged: " in out


def test_a_run_that_cannot_be_written_to_is_refused_before_work(tiny_run, tmp_path, monkeypatch):
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("analysis", "eval", "last"))
    (tmp_path / "run/analysis").write_text("in the way")
    monkeypatch.setattr(analyze, "make_embedder", None)
    with pytest.raises(InputError, match=r"--run .*analysis: cannot be written"):
        run_here("--run", tmp_path / "run")


@pytest.mark.parametrize("arguments, words", [
    ([], "give --run RUN, or `claims RUNS_FOLDER`"), (["--run", "{none}"], "is no run"),
    (["claims", "{none}"], "no evaluated run"), (["--run", "{run}", "--data", "{object}"], "nothing to analyse"),
    (["--run", "{run}", "--components", "0"], "0 is not in the range"),
    (["--run", "{run}", "--delete", "5"], "want A:B"), (["--run", "{run}", "--delete", "5:2"], "want A:B"),
    (["--run", "{run}", "--delete", "0:200"], "has 64 dimensions"),
    (["--run", "{run}", "--delete", "60:70"], "has 64 dimensions"),
    (["--run", "{run}", "--delete", "0:64"], "some must be left"),
    (["--run", "{run}", "--splits", "body/none"], "has no split 'body/none'"),
    (["--run", "{run}", "--splits", "body/train"], "is a training split"),
    (["--run", "{run}", "--splits", "object/val,object/collage"], "two of object"),
    (["bench", "--probes", "11"], "one image alone"),
])  # fmt: skip
def test_bad_input(arguments, words, tiny_run, demo_root, tmp_path):
    shutil.copytree(demo_root / "object/val", tmp_path / "data/object/val")  # test images alone
    places = {"none": tmp_path / "none", "run": tiny_run, "object": tmp_path / "data"}
    with pytest.raises(click.ClickException) as error:
        run_here(*[a.format(**places) for a in arguments])
    assert words in error.value.format_message()
