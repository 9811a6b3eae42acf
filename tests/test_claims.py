"""`analyze.py claims`: no confident verdict on thin evidence, none lost to a damaged run. (More: test_analyze.py.)"""

import csv
import json
import re
import shutil
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import analyze
from data_prep import InputError, hash_file, join_config
from data_prep.format import open_root
from models.backbones import BACKBONES
from protocols.claims import (
    FAILS,
    HOLDS,
    PAPER,
    WIDE,
    Claim,
    claim_backbones,
    claim_components,
    claim_forgetting,
    claim_humans,
    claim_separable,
    make_table,
)
from protocols.results import (
    Analysed,
    Group,
    Measured,
    Row,
    Sources,
    UnseenSource,
    read_analysis,
    read_lost,
    read_rows,
    read_runs,
    read_scored,
)
from protocols.subspaces import transfer, unit
from protocols.tasks import Task
from reports.analysis import write_table
from reports.plots import draw_figures
from reports.rows import make_report
from reports.tables import show_humans
from tests.test_analyze import (
    ABOVE,
    ALL,
    DOMAINS,
    GOOD,
    TWO,
    alone,
    components,
    humans,
    measured,
    separable,
    space_of,
)
from tools.compare import compare_experts, compare_groups

UNTOUCHED = GOOD["foundation"]


def table_of(*runs: Measured) -> dict[str, Claim]:
    """The seven claims about the paper's backbones, by their first word."""
    return {claim.claim.split()[0]: claim for claim in make_table(list(runs), 0.01, 0.95, 0.95, 0.95)[:7]}


def whole_analysis(kept: float, **more) -> Analysed:
    return replace(components(kept, **more), separability=separable(0.99, **ABOVE).separability)


def components_of(*analyses: Analysed) -> Claim:
    """The claim about components, from seeds of one recipe."""
    runs = [measured(f"a{i}", values=ALL, analysis=a, seed=i, lr="a") for i, a in enumerate(analyses)]
    return claim_components([Group(runs)], 0.95)


def separable_of(analysis: Analysed) -> Claim:
    return claim_separable(alone(measured("a", values=ALL, analysis=analysis)), 0.95)


# ---------------------------------------------------------------- how much was measured


@pytest.mark.parametrize("kept, verdict", [(0.99, HOLDS), (0.5, FAILS)])
def test_components_need_all_twelve_pairs(kept, verdict):
    assert components_of(components(kept)).verdict == verdict
    two = components_of(components(kept, tasks=["object", "body"]))
    assert two.verdict == "not measured (only tasks object, body)"
    assert (two.value, two.threshold) == (None, None) and "object for body" in two.measured
    eleven = components(kept)
    eleven.transfer.pairs.pop(1)
    assert components_of(eleven).verdict == "not measured (only 11 of 12 pairs of tasks)"


@pytest.mark.parametrize("accuracy", [0.99, 0.5])
def test_separability_needs_all_four_tasks(accuracy):
    two = separable_of(replace(separable(accuracy, **ABOVE), domains=["object", "body"]))
    assert two.verdict == "not measured (only tasks object, body)" and two.value is None


def test_a_family_counts_with_all_four_tasks_alone():
    for body in (0.7, 0.1):
        two = measured("a", values=TWO["values"] | {"body": body}, foundation=TWO["foundation"])
        claim = claim_backbones(alone(two), ["clip"], 0.01)
        assert claim.verdict == "not measured (only tasks object, body)" and "for information" in claim.measured


def test_backbones_are_those_that_were_measured():
    table = table_of(measured("a", analysis=components(0.99), **GOOD), measured("b", backbone="eva02", **TWO))
    assert table["Fewer"].verdict == HOLDS and table["Fewer"].backbones == "clip"
    assert table["More"].backbones == "none of clip, eva02, dinov3"


def test_runs_of_four_tasks_decide_and_others_are_told():
    whole = measured("a", analysis=whole_analysis(0.99), **GOOD)
    thin = measured("two", analysis=components(0.5, tasks=["object", "body"]), **TWO)
    alone_, both = table_of(whole), table_of(whole, thin)
    for name in ("Works", "Fewer", "The", "Sequential"):
        assert both[name].verdict == alone_[name].verdict
        assert "two" not in alone_[name].measured
    assert "two: object for body" in both["Fewer"].measured and "for information" in both["Fewer"].measured
    assert not any("for information, for information" in claim.measured for claim in both.values())
    assert (both["Fewer"].value, both["Fewer"].low) == (0.99, 0.97)
    assert {c.verdict for c in table_of(thin).values()} == {"not measured (only tasks object, body)"}


# ---------------------------------------------------------------- forgetting


def forgetting(sequential, unified=None, experts=(), lost=None, **more) -> Claim:
    run = measured("s", "sequential", values=GOOD["values"] | sequential, foundation=more.pop("foundation", UNTOUCHED),
                   **more)
    run.lost = lost or {}
    return claim_forgetting(alone(unified or measured("u", **GOOD)), alone(run), alone(*experts), 0.01)


NOTHING = "not measured (the sequential run forgot nothing)"


def test_a_sequential_run_that_forgot_nothing_decides_nothing():
    # below IMIC by 5 points, above the untouched backbone by 15: trained less, not forgotten
    assert forgetting({"object": 0.55}).verdict == NOTHING
    assert forgetting({}).verdict == NOTHING  # as good as IMIC: no "fails" either
    assert forgetting({"body": 0.1}).verdict == NOTHING  # the last task cannot be forgotten
    fallen = measured("u", values=GOOD["values"] | {"object": 0.2}, foundation=UNTOUCHED)
    assert forgetting({}, fallen).verdict == NOTHING
    assert forgetting({"object": 0.3}).verdict == HOLDS


def test_what_shows_that_something_was_forgotten():
    assert forgetting({"object": 0.55}, lost={"object/test": 0.02}).verdict == HOLDS
    assert forgetting({"object": 0.55}, lost={"object/valid": 0.02}).verdict == HOLDS  # --eval-every looked elsewhere
    assert forgetting({"object": 0.55}, lost={"object/test": 0.005}).verdict == NOTHING
    assert forgetting({"object": 0.55}, lost={"body/test": 0.3}).verdict == NOTHING
    expert = [measured("x", "expert", values={"object": 0.6})]
    claim = forgetting({"object": 0.55}, experts=expert)
    assert claim.verdict == HOLDS and "sequential below x" in claim.measured
    assert (claim.value, claim.threshold) == (pytest.approx(0.05), 0)
    other = [measured("x", "expert", values={"object": 0.6}, images=4000)]  # four times the exposure: no match
    assert forgetting({"object": 0.55}, experts=other).verdict == NOTHING
    assert forgetting({}, foundation=None).verdict.startswith("not measured (the sequential run has neither")
    # it fell, and IMIC is no better there
    assert forgetting({}, lost={"object/test": 0.1}).verdict == FAILS


def test_what_does_as_well_as_imic_is_named():
    """Sequential lost objects (.3 of .4); `alternate` and replay end there, too, at IMIC's .6, or below it at .5."""
    def verdict(alternate, replay, **more):
        runs = [measured("u", **GOOD, **more), measured("s", "sequential", **(GOOD | {"values": GOOD["values"] | {
            "object": 0.3}}))]
        for name, role, value, told in (("alt", "unified", alternate, {"schedule": "alternate"}),
                                        ("rep", "sequential", replay, {"replay": 0.1})):
            runs.append(measured(name, role, **(GOOD | {"values": GOOD["values"] | {"object": value}}), **told))
        return table_of(*runs)["Sequential"]

    assert verdict(0.5, 0.5).verdict == HOLDS
    assert verdict(0.6, 0.5).verdict == "holds, but alt does as well"
    assert verdict(0.6, 0.61).verdict == "holds, but alt and rep do as well"
    claim = verdict(0.5, 0.6)
    assert claim.verdict == "holds, but rep does as well" and "u over alt object/test +10.0" in claim.measured
    assert verdict(0.5, 0.5, retain="features=1.0").verdict == "not measured (no IMIC run)"


def test_forgetting_is_corrected_for_the_number_of_tasks():
    def run(tail):  # a lead of 5 points that `tail` of the resamplings turn round
        unified, draws = measured("u", **GOOD), np.full(200, 0.6)
        draws[: int(200 * tail)] = 0.54
        key = next(key for key in unified.scored["tuned"].rows if key[0] == "object")
        unified.scored["tuned"].rows[key] = (unified.scored["tuned"].rows[key][0], draws)
        return forgetting({"object": 0.55}, unified, lost={"object/test": 0.1}, spread=0).verdict

    assert run(0.0) == HOLDS
    assert run(0.02) == WIDE  # below 2.5 %, not below a third of it


def test_stages_are_read_from_the_looks_of_a_run(tmp_path, capsys):
    config = {"order": None, "domains": ["object", "body"], "steps": 4}
    looks = [{"step": step, "auc": {"object/val": a, "body/test": b}}
             for step, a, b in ((0, 0.6, 0.5), (2, 0.9, 0.5), (4, 0.7, 0.8))]
    (tmp_path / "probe.jsonl").write_text("\n".join(map(json.dumps, looks)))
    assert read_lost(tmp_path, config) == {"object/val": pytest.approx(0.2), "body/test": 0}
    assert read_lost(tmp_path, config | {"steps": 6}) == {}  # its end was not looked at
    (tmp_path / "probe.jsonl").write_text("{\n{}")
    assert read_lost(tmp_path, config) == {} and "probe.jsonl (damaged" in capsys.readouterr().out


# ---------------------------------------------------------------- components


def test_the_families_of_the_paper_are_the_backbones_that_can_be_trained():
    assert tuple(BACKBONES) == PAPER


def test_noise_never_fails():
    """Two tasks of pure noise, four times: no share of it counts, though some intervals lie below the threshold."""
    n, D, shares = 40, 112, []
    each, mates = np.arange(n), [np.array([row ^ 1]) for row in range(n)]
    for seed in (3, 5, 7, 8):
        rng, tasks, embedded = np.random.default_rng(seed), [], {}
        for name in ("object*", "body*"):  # scored as people are
            embedded[name] = tuple(unit(rng.standard_normal((m, D))).astype(np.float32) for m in (300, n))
            tasks.append(Task(name, None, None, np.arange(300), each, each, each, each // 2, mates,
                              list(each[:, None])))
        shares += transfer(embedded, tasks, 16, 100, seed)[0].pairs
    assert len(shares) == 16 and not any(pair.above_chance for pair in shares)
    assert any(p.kept is not None and p.high < 0.95 for p in shares)  # what would have been a failure


def test_the_interval_of_the_full_score_decides_where_there_is_one():
    assert components_of(components(0.5, full_low=0.12)).verdict == FAILS
    for more in ({"full_low": 0.1}, {"low": None}):
        claim = components_of(components(0.5, **more))
        assert claim.verdict.startswith("not measured (the full space is not above chance: object for face_hq")


@pytest.mark.parametrize("kept, verdict", [(0.99, HOLDS), (0.5, FAILS)])
def test_few_images(kept, verdict):
    for images in (99, 100):  # k + 1 images span k dimensions
        claim = components_of(components(kept, images=images))
        assert claim.verdict == f"not measured (rank-limited: {images} images of each task for 768 dimensions)"
    some, many = components_of(components(kept, images=101)), components_of(components(kept, images=5 * 768))
    assert some.verdict == many.verdict == verdict
    assert "; few images for 768 dimensions" in some.measured and "few images" not in many.measured


def test_fewer_components_than_99_can_only_hold():
    assert components_of(components(0.5, k=64)).verdict.startswith("not measured (k = 64 is too few")
    holds = components_of(components(0.99, k=64))
    assert holds.verdict == HOLDS
    assert "k95 40 [40, 40], k99 70 [70, 70]" in holds.measured


def test_seeds_analysed_at_different_k_are_not_averaged():
    claim = components_of(components(0.99, k=64), components(0.2, k=99))
    assert claim.verdict.startswith("not measured (seeds of a0 and 1 more seed analysed at k = 64 and 99")
    assert components_of(components(0.99), components(0.98)).verdict == HOLDS


# ---------------------------------------------------------------- humans, separability


def test_humans_need_four_tasks_and_two_raters():
    for lead in (0.1, -0.1):
        assert claim_humans(humans(lead, tasks=DOMAINS[1:])).verdict == \
            "not measured (people on face_hq, face_lq, body; none on object)"
        assert claim_humans(humans(lead, raters=1)).verdict == \
            "not measured (1 rater of all tasks; 2 are needed)"
    claim = claim_humans(humans(raters=3, body=-0.2))
    assert claim.verdict == "holds, but below people on body" and "3 raters, below people on body" in claim.measured


def test_forced_choices_of_objects_are_told_and_decide_nothing_alone():
    def claim(lead, group=None):
        """Of a run with forced choices, and the human trials of `group`."""
        choice = Row("a", "tuned", "object", "edges", "", "nearest-mean minus human accuracy", lead, 0, 1, 110,
                     kind="human choices", readout="nearest-mean", measure="lead", rule="11 of 16 categories")
        others = [replace(choice, rule="11 of 16 categories, condition c05", value=lead - 0.5),
                  replace(choice, metric="knn minus human accuracy", readout="knn", value=lead - 0.5)]
        rows = [row for row, _ in group[0].runs[0].scored["tuned"].rows.values()] if group else []
        return claim_humans(alone(measured("a", values=ALL, rows=[*rows, choice, *others])))

    for lead in (0.2, -0.2):
        alone_ = claim(lead)
        assert alone_.verdict == "not measured (people on object; none on face_hq, face_lq, body)"
        assert alone_.value is None and "knn" not in alone_.measured  # of the conditions together, by the headline
        assert f"a object/edges/nearest-mean minus human accuracy {100 * lead:+.1f}" in alone_.measured
    assert claim(0.2, humans()).verdict == "holds"
    assert claim(-0.2, humans()).verdict == "holds, but below people on object"
    three = claim(0.2, humans(tasks=DOMAINS[1:]))
    assert three.verdict == "not measured (object by forced choice alone, which is not part of the mean over tasks)"


def test_beyond_format_needs_one_format_and_unseen_sources():
    def run(canon=0.99, **recalls):
        analysis = separable(0.99, **ABOVE)
        figure = {"value": canon, "low": canon - 0.005, "high": canon + 0.005}
        analysis.separability.spaces["tuned canon"] = space_of(figure)
        analysis.separability.unseen_sources = [
            UnseenSource("body", name, 100, 100, {"tuned": {"value": r, "low": r - 0.01, "high": r + 0.01}})
            for name, r in recalls.items()]
        return separable_of(analysis)

    assert run().verdict == run(a=0.98).verdict == HOLDS
    assert run(0.9).verdict == "holds, but not in one format"
    assert run(a=0.98, b=0.4).verdict == "holds, but not on unseen sources"
    assert "unseen source body/b 40.0" in run(b=0.4).measured


def test_few_identities_and_unfinished_fits_are_marked(tmp_path):
    few = whole_analysis(0.99, identities=12)
    few.separability.identities["body"] = 9
    few.separability.spaces["pixels"].converged["logistic"] = False
    table = table_of(measured("a", analysis=few, **GOOD))
    assert "object for body, k = 99 of 768 99.0 [97.0, 101.0]† (k95" in table["Fewer"].measured
    assert "balanced accuracy 99.0 [98.5, 99.5]†" in table["The"].decided_by
    assert "lead over pixel statistics +10.0 [+9.5, +10.5]† (the fit did not converge)" in table["The"].measured
    many = table_of(measured("a", analysis=components(0.99), **GOOD))
    assert not any("†" in claim.measured for claim in many.values())
    write_table(tmp_path, list(table.values()))
    assert "†: of fewer than 20 identities" in (tmp_path / "claims.md").read_text()
    write_table(tmp_path, list(many.values()))
    assert "†" not in (tmp_path / "claims.md").read_text()


def test_marks_of_the_evaluation_reach_the_claims():
    run = measured("a", **GOOD)
    for scored in run.scored.values():
        scored.rows = {key: (replace(row, identities=11 if row.domain == "body" else 84), draws)
                       for key, (row, draws) in scored.rows.items()}
    told = claim_backbones(alone(run), ["clip"], 0.01).measured.split("; ")
    assert [("†" in part) for part in told] == [False, False, False, True] and "a body/test +40.0" in told[3]


def test_names_are_no_markup(tmp_path):
    name = '<img src="x" onerror="alert(1)">'
    write_table(tmp_path, list(table_of(measured(name, analysis=components(0.99), **GOOD),
                                        measured(name + "2", **GOOD)).values()))
    text = (tmp_path / "claims.md").read_text()
    assert not re.search(r"(?<!\\)<", text) and r"\<img src" in text


# ---------------------------------------------------------------- seeds, numbers, damaged runs


def test_a_single_seed_is_told_in_words_and_not_in_the_verdict():
    runs = [measured(f"{b}{seed}", backbone=b, lr=b, seed=seed, **GOOD)
            for b in ("clip", "eva02", "dinov3") for seed in (0, 1)]
    two, one = table_of(*runs)["Works"], table_of(*runs[:5])["Works"]
    assert (two.verdict, two.reported, two.seeds) == (HOLDS, HOLDS, 2)
    assert (one.verdict, one.reported, one.seeds) == (HOLDS, "holds (1 seed)", 1)
    assert table_of(*runs[:1])["Works"].reported == "not measured (no four-task run of eva02, dinov3)"
    assert replace(one, verdict=FAILS).reported == "fails (1 seed)"
    runs[-1].config["seed"] = 0  # the same run twice is one seed
    assert table_of(*runs)["Works"].seeds == 1


def test_the_deciding_number_stands_beside_the_verdict():
    runs = [measured(b, backbone=b, **GOOD) for b in ("clip", "eva02")]
    runs.append(measured("d", backbone="dinov3", values=GOOD["values"] | {"body": 0.2}, foundation=UNTOUCHED))
    claim = table_of(*runs)["Works"]
    assert claim.verdict == FAILS and claim.threshold == 0
    assert (claim.value, claim.low, claim.high) == pytest.approx((-0.1, -0.1, -0.1))


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def change_config(change):
    def of(run: Path) -> None:
        config = join_config(run / "config.json")
        change(config)
        write_json(run / "config.json", config)
    return of


def other_weights(name: str):
    def of(run: Path) -> None:
        """Whatever their times: what a result is of is known by the hash of the weights."""
        (run / "model.safetensors").write_bytes(b"others")
        if name != "eval":  # evaluated again, not analysed again
            with np.load(run / "eval/draws.npz") as file:
                np.savez(run / "eval/draws.npz", **dict(file) | {"weights": hash_file(run / "model.safetensors")})
    return of


def change_analysis(change):
    def of(run: Path) -> None:
        path = run / "analysis/analysis.json"
        analysis = json.loads(path.read_text())
        change(analysis)
        write_json(path, analysis)
    return of


def test_no_sentence_is_read_back(analysed, tiny_run, demo_root, tmp_path):
    """With nonsense for every protocol, and one nonsense for all: the same verdicts, numbers and figures."""
    splits = [split for by_name in open_root(demo_root).values() for split in by_name.values() if split.protocol]
    told = []
    for place in ("said", "nonsense"):
        for name in ("a", "b"):
            home = tmp_path / place / name
            shutil.copytree(tiny_run, home, ignore=shutil.ignore_patterns("embeddings", "last", "model*", "*.p*"))
            rows = json.loads((home / "eval/results.json").read_text())
            with np.load(home / "eval/draws.npz") as file:
                draws = file["draws"]
            rows += [asdict(Row(name, "tuned", domain, "trials", f"human trials, {readout}", readout, 0.6, 0.5, 0.7, 50,
                                kind="human trials", readout=readout, measure="auc"))
                     for domain in ("all", *DOMAINS) for readout in ("model", "people", "lead", "beaten", "rater")]
            draws = np.concatenate([draws, 0.6 + 0.01 * np.random.default_rng(0).normal(size=(25, draws.shape[1]))])
            rows = [row | {"protocol": "x"} for row in rows] if place == "nonsense" else rows
            (home / "eval/results.json").write_text(json.dumps(rows))
            np.savez(home / "eval/draws.npz", draws=draws, seed=0)
        table = [asdict(claim) for claim in make_table(read_runs(tmp_path / place), 0.01, 0.95, 0.95, 0.95)]
        a, b = (read_scored(tmp_path / place / name, "tuned") for name in ("a", "b"))
        expert = replace(b, config=b.config | {"domains": ["body"]})
        compared = [*compare_groups([[a], [b]], set()), *compare_experts([a], [[expert]], set(), 0.01)]
        rows = read_rows(tmp_path / place / "a/eval")
        page = [re.sub(r"[^|]* [|]$", "", line) for line in make_report(rows, splits, True, show_humans(rows))]
        drawn = draw_figures(tmp_path, rows, {"tuned": {}}, splits, [])
        told.append((table, [row | {"protocol": ""} for row in compared], page, (tmp_path / drawn[0][1]).read_bytes()))
    assert told[0] == told[1] and len(told[0][1]) > 40 and any(row["value"] for row in told[0][0])
    assert any("all/trials beaten 60.0" in claim["measured"] for claim in told[0][0])
    rows = json.loads((tmp_path / "said/a/eval/results.json").read_text())
    del rows[3]["kind"]
    (tmp_path / "said/a/eval/results.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"rows without `kind`.*evaluate again with `evaluate.py --run .*/said/a`"):
        read_rows(tmp_path / "said/a/eval")


def test_separability_is_written_and_read_back_whole(tmp_path):
    """And what is not of its type is named: the field, with its place and value."""
    analysis = whole_analysis(0.99)
    figure = {"value": 0.75, "low": 0.5, "high": 1.0}
    analysis.separability.spaces["tuned"].pairwise["object/body"] = figure
    analysis.separability.unseen_sources.append(
        UnseenSource("body", "x", 7, 5, {"tuned": figure | {"recall": 0.25, "converged": False}}))
    analysis.separability.sources |= {"object": Sources("only one source: x"), "body": Sources(
        None, {"x": 7, "y": 8}, {"x": 5, "y": 6}, 0.5, {"tuned": {"lda": figure}})}
    path = tmp_path / "a/analysis/analysis.json"
    path.parent.mkdir(parents=True)
    written = asdict(analysis) | {"transfer": {"tuned": asdict(analysis.transfer)}}
    write_json(path, written)
    assert read_analysis(path) == analysis
    for change, words in (
        (lambda s: s["spaces"]["tuned"]["pairwise"]["object/body"].update(low="x"),
         r"spaces tuned: pairwise object/body: low is 'x'"),
        (lambda s: s["unseen_sources"][0].update(images=True), "unseen_sources 0: images is 'True'"),
        (lambda s: s["sources"]["body"].update(images=[]), r"sources body: images is '\[\]'"),
        (lambda s: s["spaces"]["pixels"].update(converged={"logistic": 1}), "converged logistic is '1'"),
        (lambda s: s["spaces"].pop("tuned"), "the tuned space, is missing"),
    ):
        damaged = deepcopy(written)
        change(damaged["separability"])
        write_json(path, damaged)
        with pytest.raises(InputError, match=f"of another version or damaged: .*{words}; run analyze.py on .*/a again"):
            read_analysis(path)


@pytest.mark.parametrize("damage, words", [
    (lambda run: (run / "done.json").unlink(), "b (not finished)"),
    (change_config(lambda c: c.pop("role")), "b (config.json lacks 'role')"),
    (change_config(lambda c: c.update(role="x")), "b (config.json: role is 'x': restore it"),
    (change_config(lambda c: c.update(counts=[])), "b/config.json: domains and counts"),
    (change_config(lambda c: c.update(counts={"body": 3})), "b (config.json: counts is {'body': 3}: restore it"),
    (change_config(lambda c: c.update(backbone=None, model=None)), "b (config.json: backbone is None"),
    (lambda run: (run / "config.json").write_text("["), "damaged"),
    (change_config(lambda c: c.update(seed=[1])), "b (config.json: seed is '1': restore it"),
    (change_config(lambda c: c.update(order=5)), "b/config.json: domains and counts"),
    (change_analysis(lambda a: a["transfer"]["tuned"].pop("limit")), "analysis.json (of another version"),
    (change_analysis(lambda a: a["transfer"]["tuned"]["pairs"][1]["k99"].update(above="x")), "analysis.json (of anoth"),
    (change_analysis(lambda a: a["separability"]["spaces"]["tuned"].pop("converged")), "analysis.json (of another v"),
    (change_analysis(lambda a: a["separability"].update(identities=5)), "analysis.json (of another version"),
    (lambda run: write_json(run / "eval/results.json", []), "results.json is empty"),
    (lambda run: write_json(run / "eval/results.json", {"a": 1}), "results.json: cannot be read"),
    (lambda run: write_json(run / "eval/results.json", [dict.fromkeys(
        ("run", "weights", "domain", "split", "protocol", "metric", "value", "low", "high", "count"), 1)]),
     "results.json: cannot be read (row 0: run is"),
    (lambda run: (run / "eval/draws.npz").write_bytes(b""), "draws.npz"),
    (other_weights("eval"), "b/eval is of other weights than model.safetensors: run evaluate.py on"),
    (other_weights("analysis"), "analysis.json (of other weights than model.safetensors: run analyze.py on"),
    (change_analysis(lambda a: a["transfer"]["tuned"]["pairs"][3].pop("kept")), "analysis.json (of another version"),
    (change_analysis(lambda a: a["transfer"].update(tuned=[])), "analysis.json (of another version"),
    (change_analysis(lambda a: a["transfer"].update(tuned=None)), "analysis.json (of another version"),
    (change_analysis(lambda a: a["separability"]["spaces"].pop("tuned")), "analysis.json (of another version"),
    (change_analysis(lambda a: a.pop("domains")), "analysis.json (of another version"),
])  # fmt: skip
def test_a_damaged_run_is_named_and_left_out(damage, words, analysed, tiny_run, tmp_path, capsys):
    for name in ("a", "b"):
        shutil.copytree(tiny_run, tmp_path / name,
                        ignore=shutil.ignore_patterns("embeddings", "last", "*.safetensors", "*.png", "*.pdf"))
    damage(tmp_path / "b")
    analyze.main.main(["claims", str(tmp_path)], standalone_mode=False)
    out = capsys.readouterr().out
    left = [line for line in out.splitlines() if line.startswith("left out: ")]
    assert len(left) == 1 and str(tmp_path / "b") in left[0] and words in left[0]
    with open(tmp_path / "claims.csv") as file:
        rows = list(csv.DictReader(file))
    assert {"value", "low", "high", "threshold", "rule", "measured", "seeds"} < set(rows[0]) and len(rows) == 14
    assert any("a " in row["measured"] for row in rows)
