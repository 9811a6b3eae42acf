"""Rules of scoring beside the customary ones, each against a literal transcription or a case computed by hand."""

import errno
import html
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import protocols.embed
import protocols.pairs
import protocols.search
import protocols.templates
from data_prep import InputError, literal
from data_prep.__main__ import cli
from data_prep.format import Split
from protocols.bootstrap import normalise
from protocols.classify import Readouts
from protocols.embed import Embedder, map_copy
from protocols.humans import score_humans
from protocols.results import Row, Scored
from protocols.search import describe_variant, gallery_rule, score_gallery, search_shots, variants_of, visit_scores
from reports.rows import make_human_rows, score
from reports.tables import show_humans, to_html
from tests.test_definitions import classified
from tests.test_evaluate import FakeSplit, run_here, unit
from tests.test_humans import FACES, THINGS, Fake, rate, vectors
from tools.compare import compare_experts, compare_groups, draw_comparison, draw_experts, show_comparison, show_experts
from tools.leaks import score_without

# ---------------------------------------------------------------- CUHK03's single-gallery-shot


def literal_cuhk03(x, ids, cams, roles, rng, repeats):
    """eval_cuhk03 of torchreid, query by query: CMC over `repeats` draws of one image of each person, and mAP."""
    cmcs, aps = [], []
    for i in np.flatnonzero(roles == 0):
        gallery = np.flatnonzero(roles > 0)
        order = gallery[np.argsort(-(x[gallery] @ x[i]), kind="stable")]
        kept = order[~((ids[order] == ids[i]) & (cams[order] == cams[i]))]
        raw = ids[kept] == ids[i]
        if not raw.any():
            continue
        cmc = np.zeros(10)
        for _ in range(repeats):
            mask = np.zeros(len(kept), dtype=bool)
            for person in set(ids[kept]):
                mask[rng.choice(np.flatnonzero(ids[kept] == person))] = True
            place = np.flatnonzero(raw[mask])[0]
            cmc += np.arange(10) >= place
        cmcs.append(cmc / repeats)
        aps.append((raw.cumsum() / (np.arange(len(raw)) + 1) * raw).sum() / raw.sum())
    return np.mean(cmcs, axis=0), np.mean(aps), len(aps)


def made_reid(seed, people=12, each=8):
    rng = np.random.default_rng(seed)
    ids, n = np.repeat(np.arange(people), each), people * each
    roles = np.tile([0, 0] + [1] * (each - 2), people)
    x = unit(rng.normal(size=(n, 5)) + 0.9 * rng.normal(size=(people, 5))[ids])
    return x, ids, rng.integers(0, 3, n), roles


def expected_rank_1(x, ids, cams, roles):
    """What eval_cuhk03 tends to with more draws: by mate, the chance that nobody else's drawn image is as near."""
    rates = []
    for i in np.flatnonzero(roles == 0):
        g = np.flatnonzero((roles > 0) & ~((ids == ids[i]) & (cams == cams[i])))
        own = [x[j] @ x[i] for j in g if ids[j] == ids[i]]
        others = [x[g[ids[g] == person]] @ x[i] for person in set(ids[g]) - {ids[i]}]
        if own:
            rates.append(np.mean([np.prod([(scores < score).mean() for scores in others]) for score in own]))
    return np.mean(rates)


@pytest.mark.parametrize("seed", range(2))
def test_single_gallery_shot_approaches_a_literal_transcription(seed):
    """The draws are not the same ones: both are near the rates that they tend to; mAP has no draws and is equal."""
    x, ids, cams, roles = made_reid(seed)
    ids[:8] = 1  # one probe person without a gallery image of another camera
    cams[:16] = 0
    split = FakeSplit(ids, {"name": "reid", "draws": 4000}, role=roles, camera=cams)
    found, drawn = score_gallery(x, split, 3, 0, "general single-gallery-shot")
    cmc, mean, counted = literal_cuhk03(x, ids, cams, roles, np.random.default_rng(1), 200)
    assert list(found) == ["rank-1", "rank-5", "rank-10", "mAP"] and found["rank-1"].count == counted < 24
    assert found["mAP"].value == pytest.approx(mean)
    assert found["rank-1"].value == pytest.approx(expected_rank_1(x, ids, cams, roles), abs=0.01)
    assert [found[f"rank-{k}"].value for k in (1, 5, 10)] == pytest.approx(list(cmc[[0, 4, 9]]), abs=0.04)
    np.testing.assert_allclose(drawn["cmc"][:10], cmc, atol=0.04)
    assert 0.1 < cmc[0] < 0.9


def test_single_gallery_shot_equals_the_literal_rule_where_there_is_one_image_of_each():
    """Nothing to draw: the rank among all that the rule leaves, strangers included."""
    x, ids, cams, roles = made_reid(7, people=20, each=3)
    x, ids, roles = np.concatenate([x, unit(np.random.default_rng(8).normal(size=(9, 5)))]), np.append(ids, [-1] * 9), \
        np.append(roles, [2] * 9)
    cams = np.append(np.where(roles[:60] == 0, 0, 1), np.arange(9) % 2)
    split = FakeSplit(ids, {"name": "reid"}, role=roles, camera=cams)
    whole = score_gallery(x, split, 3, 0)[0]
    shots = score_gallery(x, split, 3, 0, "general single-gallery-shot")[0]
    for name in ("rank-1", "rank-5", "rank-10", "mAP"):
        assert (shots[name].value, *shots[name].draws) == pytest.approx((whole[name].value, *whole[name].draws))


def test_single_gallery_shot_by_hand():
    # probe at 0 degrees, camera 0. Its person: 10 degrees in camera 0 (ignored), 40 in camera 1 (the mate).
    # Another person: 20 and 60 degrees; a stranger at 50. Rank 1 where 60 is drawn, else 2
    degrees = np.deg2rad([0, 10, 40, 20, 60, 50])
    x = np.stack([np.cos(degrees), np.sin(degrees)], 1)
    labels = np.array([1, 1, 0, 0, -1])
    mates = lambda probe: (np.array([1]), np.array([0]))  # noqa: E731
    ranks = search_shots(x, np.array([0]), np.arange(1, 6), labels[[0, 1, 2, 3, 4]], mates, 2000, 0)
    assert ranks.shape == (2000, 1) and set(ranks[:, 0]) == {1, 2}
    assert (ranks == 1).mean() == pytest.approx(0.5, abs=0.04)
    none = search_shots(x, np.array([0]), np.arange(1, 6), labels, lambda p: (np.array([], int),) * 2, 2, 0)
    assert np.isinf(none).all()


def test_the_draws_of_a_probe_are_its_own(monkeypatch):
    """The same whatever else is searched, and however many scores are held at once."""
    x, ids, cams, roles = made_reid(3)
    split = FakeSplit(ids, {"name": "reid", "draws": 4}, role=roles, camera=cams)
    q, g = np.flatnonzero(roles == 0), np.flatnonzero(roles == 1)
    mates = gallery_rule(split, g, "general single-gallery-shot")
    whole = search_shots(x, q, g, ids[g], mates, 4, 5)
    product, held = np.matmul, []

    def noted(a, b, out):
        held.append(out.shape)
        return product(a, b, out=out)

    monkeypatch.setattr(np, "matmul", noted)
    monkeypatch.setattr(protocols.search, "visit_scores", partial(visit_scores, size=3 * len(g)))
    np.testing.assert_array_equal(search_shots(x, q, g, ids[g], mates, 4, 5), whole)
    np.testing.assert_array_equal(search_shots(x, q[5:9], g, ids[g], mates, 4, 5), whole[:, 5:9])
    assert (search_shots(x, q, g, ids[g], mates, 4, 6) != whole).any()
    assert len(held) == 8 + 2 + 8 and max(held) == (3, len(g))


def test_single_gallery_shot_is_chosen_when_a_split_is_prepared(tmp_path):
    rows, source = ["path,person,camera,role"], tmp_path / "src"
    source.mkdir()
    for i in range(24):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 8, 3), dtype=np.uint8)).save(source / f"{i}.png")
        rows.append(f"{i}.png,{i // 6},{i % 3},{'probe' if i % 6 == 0 else 'gallery'}")
    (source / "persons.csv").write_text("\n".join(rows) + "\n")
    arguments = ["persons", "--src", str(source), "--size", "16", "--workers", "1", "--single-gallery-shot", "--out"]
    cli.main([*arguments, str(tmp_path / "d/body/test")], standalone_mode=False)
    split = Split(tmp_path / "d/body/test")
    assert split.protocol == {"name": "reid", "variants": ["general", "general single-gallery-shot"], "draws": 10}
    assert [describe_variant(split, variant, 3) for variant in variants_of(split)] == [
        "general", "general single-gallery-shot in 10 draws a probe (mAP: all its images), seed 3"]
    x = unit(np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32))
    assert score_gallery(x, split, 2, 0, "general single-gallery-shot")[0]["rank-1"].count == 4
    with pytest.raises(InputError, match=r"^--single-gallery-shot is for test splits"):
        cli.main([*arguments, str(tmp_path / "d/body/train")], standalone_mode=False)
    split.protocol["variants"] = ["general", "general double-shot"]
    with pytest.raises(InputError, match="has no rule 'general double-shot'; it has general, ") as error:
        variants_of(split)
    assert "\n" not in error.value.message


# ---------------------------------------------------------------- people, over the splits of a domain


def test_people_over_all_splits_of_a_domain_by_hand(capsys):
    # test: model 3/4, ann 3.5/4, ben 2/4 (tests/test_humans.py). more: model 4/4, ann 2/4; ben saw it not, cat alone
    x = {"face_hq/test": vectors(0.9, 0.4, 0.5, 0.1), "face_hq/more": vectors(0.9, 0.8, 0.5, 0.1)}
    more = Fake("face_hq", [0, 0, 1, 1, 2, 3, 0, 2])
    more.name = "more"
    splits = {"face_hq/test": FACES, "face_hq/more": more, "object/test": THINGS}
    ratings = rate(FACES, "ann", 3, 1, 1, -3) + rate(FACES, "ben", -1, 0, 2, -2)
    ratings += [replace(r, split="face_hq/more")
                for r in rate(more, "ann", -1, 0, 2, -2) + rate(more, "cat", 3, 3, 1, 1)]
    found = score_humans(ratings, splits, x, 20, 0)
    assert list(found) == ["face_hq/test", "face_hq/more", "face_hq"]  # one domain: no "everything"
    assert {metric: figure.value for metric, figure in found["face_hq"].items()} == pytest.approx({
        "AUC of rater ann": (3.5 + 2) / 8, "AUC on human trials": (3 / 4 + 1) / 2,
        "human AUC (mean of raters)": (3.5 + 2) / 8, "model minus human AUC": 7 / 8 - 5.5 / 8,
        "share of raters beaten": 1})
    assert found["face_hq"]["AUC on human trials"].count == 8
    # with objects: everything is the mean over the two domains, of ann, who did them all
    ratings += rate(THINGS, "ann", 3, 3, -3, -3)
    found = score_humans(ratings, splits, x | {"object/test": vectors(0.9, 0.4, 0.5, 0.1)}, 20, 0)
    assert list(found) == ["face_hq/test", "face_hq/more", "object/test", "face_hq", "everything"]
    assert found["everything"]["AUC on human trials"].value == pytest.approx((7 / 8 + 3 / 4) / 2)
    for split in splits.values():
        split.index = {"provenance": {"source": f"{split.domain}-{split.name}", "plan": "0123456789"}}
    results = make_human_rows("r", ratings, splits, {"tuned": found}, True)
    rows = {(row.domain, row.split): row for row, _ in results if row.metric == "model minus human AUC"}
    assert list(rows) == [("face_hq", "test"), ("face_hq", "more"), ("object", "test"), ("face_hq", "all splits"),
                          ("all", "human trials")]
    protocol = rows["face_hq", "all splits"].protocol
    assert protocol.endswith("sets face_hq/more face_hq-more 01234567 + face_hq/test face_hq-test 01234567, flip")
    assert protocol.split(",")[1] not in rows["all", "human trials"].protocol  # other ratings: another fingerprint
    assert "| face_hq/all splits | 8 | 1 |" in "\n".join(show_humans([row for row, _ in results]))


# ---------------------------------------------------------------- leaks on the clean side of a gap


class Known:
    """An embedder of splits whose vectors are told."""

    device, name, model = torch.device("cpu"), "tuned", SimpleNamespace(library="timm")

    def __init__(self, **vectors) -> None:
        self.vectors = vectors

    def raw(self, split):
        return self.vectors[split.name].astype(np.float32)

    def __call__(self, split):
        return normalise(self.raw(split))


def objects(labels, name, **more):
    split = classified(labels, ["a", "b"], name, **more)
    split.index = {"provenance": {"source": name, "plan": "0123456789"}}
    split.missing, split.names = np.zeros(len(labels), dtype=bool), split.classes
    return split


@pytest.mark.parametrize("reference", ["train", "val"])
def test_gaps_leave_leaked_images_out_on_both_sides(reference):
    """Clean images are also their own reference: then what leaked does not vote for the rest of them either."""
    rng = np.random.default_rng(3)
    train, val, r = (objects(rng.integers(0, 2, 40), name, reference=reference, **more)
                     for name, more in (("train", {}), ("val", {}), ("r", {"ood": True})))
    x = {split.name: rng.normal(size=(2, 3))[split.labels] + rng.normal(size=(40, 3)) for split in (train, val, r)}
    root, run = {"object": {"train": train, "val": val, "r": r}}, SimpleNamespace(
        config={}, classes={}, folder=Path("runs/x"))
    without = {"object/val": [1, 2, 3, 5, 8, 13], "object/r": [0, 4]}

    def gaps(without):
        return [{row.metric: row for row in table if row.split == "r" and row.metric.startswith(("gap of ", "clean "))}
                for table in score_without(Known(**x), [val, r], root, run, 2, 0, True, without, "at 1 by x")]

    def top_1(split, rows, voters, itself):
        """Right by 20 neighbours among `voters` of the reference, by counting votes."""
        source = root["object"][reference]
        y, right = unit(x[source.name]).astype(np.float32), []
        for row in rows:
            some = [v for v in voters if not (itself and v == row)]
            cosines = y[some] @ unit(x[split.name]).astype(np.float32)[row]
            nearest = np.argsort(-cosines)[:20]
            votes = np.bincount(source.labels[np.array(some)[nearest]], np.exp((cosines[nearest] - 1) / 0.07), 2)
            right.append(votes.argmax() == split.labels[row])
        return np.mean(right)

    everything, kept = range(40), {name: np.setdiff1d(np.arange(40), rows) for name, rows in without.items()}
    for leaked, rows, shifted in ((without, kept["object/val"], kept["object/r"]),
                                  ({"object/val": without["object/val"]}, kept["object/val"], everything)):
        whole, rest = gaps(leaked)
        own = reference == "val"
        assert whole["gap of knn top-1"].value == pytest.approx(
            top_1(val, everything, everything, own) - top_1(r, everything, everything, False))
        assert rest["gap of knn top-1"].value == pytest.approx(
            top_1(val, rows, rows if own else everything, own) - top_1(r, shifted, everything, False))
        assert rest["gap of knn top-1"].protocol == (
            whole["gap of knn top-1"].protocol + f", without {40 - len(shifted)} leaked and 6 of the clean at 1 by x")
        assert whole["gap of knn top-1"].value != rest["gap of knn top-1"].value
        clean = rest["clean knn top-1"]
        assert clean.value == pytest.approx(top_1(val, rows, rows if own else everything, own)) and clean.count == 34
        assert clean.protocol == rest["gap of knn top-1"].protocol


def test_rows_that_leaks_do_not_touch_are_told_once():
    val, r = objects([0, 1] * 4, "val"), objects([0, 1] * 4, "r", ood=True)
    x = {name: np.random.default_rng(0).normal(size=(8, 3)) for name in ("train", "val", "r")}
    root, run = {"object": {"train": objects([0, 1] * 4, "train")}}, SimpleNamespace(
        config={}, classes={}, folder=Path("runs/x"))
    whole, rest = score_without(Known(**x), [val, r], root, run, 2, 0, True, {"object/val": [1]}, "at 1 by x")
    told = {(row.split, row.metric.startswith(("gap of ", "clean ")), row.protocol.partition(", without ")[2])
            for row in rest}
    assert told == {("val", False, "1 leaked at 1 by x"), ("r", True, "0 leaked and 1 of the clean at 1 by x")}
    assert {row.split for row in whole} == {"val", "r"} and not any("without" in row.protocol for row in whole)
    whole, _ = score_without(Known(**x), [val, r], root, run, 2, 0, True, {"object/r": [1]}, "at 1 by x")
    assert {row.split for row in whole} == {"r"}  # of val nothing changes


# ---------------------------------------------------------------- names in comparisons


NAME = "a|b `c` <i>d</i> &lt; e&f \\| *g* $x$ $y"


def cells_of(line):
    """Text and markup of the cells of a line of a Markdown table: what is escaped is text."""
    cells, text, markup, signs = [], "", "", iter(line.strip()[1:])
    for sign in signs:
        if sign == "\\":
            text += next(signs)
        elif sign == "|":
            cells.append((text.strip(), markup))
            text = markup = ""
        else:
            text, markup = text + sign, markup + sign * (sign in "`<>&*[]!")
    return cells


def scored(name, value):
    config = {"domains": ["object"], "counts": {"object": 10}, "name": name}
    row = Row(name, "tuned", "object", "val", "classification, <p> & q|r", "knn top-1", value, value, value, 5)
    return Scored(Path(name), config, 0, {row.key: (row, np.full(3, value))})


def test_names_of_runs_are_text_in_a_comparison(tmp_path):
    name = NAME.replace("/", "-")
    groups = [[scored(name, 0.5)], [scored("other", 0.75)]]
    table = compare_groups(groups, set())
    head, *lines = [cells_of(line) for line in show_comparison(table).splitlines() if line.startswith("|")]
    assert [len(line) for line in lines] == [len(head)] * 3
    assert lines[1][2] == (f"{name} (tuned)", "") and lines[1][7] == ("classification, <p> & q|r", "")
    experts = compare_experts(groups[1], groups[:1], set(), 0.01)
    head, _, line = [cells_of(line) for line in show_experts(experts, ["object"]).splitlines()
                     if line.startswith("|")]
    assert len(line) == len(head) and line[9] == (name, "") and line[10] == ("classification, <p> & q|r", "")
    for file, draw in (("a.png", lambda path: draw_comparison(path, table, [])),
                       ("b.png", lambda path: draw_experts(path, experts))):
        draw(tmp_path / file)  # $ is no formula
        assert (tmp_path / file).stat().st_size > 1000


def test_names_with_entities_are_text_in_the_page(tmp_path):
    told = literal(NAME)
    page = to_html([f"# {told}", "", "| h |", "| --- |", f"| {told} |"], tmp_path)
    for tag in ("title", "h1", "td"):
        found = re.search(f"<{tag}>(.*?)</{tag}>", page)[1]
        assert html.unescape(found) == NAME and not re.search(r"<|&(?!(amp|lt|gt|quot|#\d+);)", found)


# ---------------------------------------------------------------- large splits are mapped


class Stored(Embedder):
    """An embedder that has them all on disk."""

    def __init__(self, folder, **arrays):
        self.folder, self.device, self.name, self.model = folder, torch.device("cpu"), "tuned", Known.model
        self.shared = False
        for name, x in arrays.items():
            np.save(folder / f"{name}.npy", x)

    def prepare(self, split):
        return self.folder / f"{split.name}.npy"


class Sized(FakeSplit):
    missing = np.zeros(240, dtype=bool)

    def __len__(self):
        return len(self.labels)


def a_split_of_each_kind(rng):
    """Verification, re-identification, identification, templates and classification with a reference; embeddings."""
    columns = {"role": np.tile([0, 1, 1, 2], 60), "camera": np.arange(240) % 3, "template": np.arange(240) // 2,
               "media": np.arange(240), "quality": rng.random(240)}
    labels = np.where(columns["role"] == 2, -1, np.arange(240) // 8)
    left, right = rng.integers(0, 240, (2, 900))
    own = np.arange(0, 240, 8)
    same = (labels[left] == labels[right]) & (labels[left] >= 0)
    pairs = np.stack([np.append(left, own), np.append(right, own + 1), np.append(same, own >= 0),
                      np.arange(930) % 10], 1)
    templates = np.stack([np.arange(0, 120, 4), np.arange(0, 120, 4) % 8 // 4], 1)
    kinds = {"verification": ({"folds": 10}, {"pairs": pairs}), "identification": ({}, {"role": columns["role"]}),
             "reid": ({"variants": ["general", "general single-shot", "general single-gallery-shot"], "draws": 3},
                      {"role": columns["role"], "camera": columns["camera"]}),
             "templates": ({}, {"template": columns["template"], "media": columns["media"],
                                "quality": columns["quality"], "template_gallery": templates,
                                "template_probes": np.arange(1, 120, 2)[:, None]})}
    splits = []
    for name, (more, tables) in kinds.items():
        split = Sized(labels if name != "templates" else np.arange(240) // 8, {"name": name} | more, **tables)
        split.name, split.domain, split.folder = name, "face_hq", Path(name)
        split.index = {"columns": list(tables), "provenance": {"source": name, "plan": "0123456789"}}
        splits.append(split)
    objects_here = {name: objects(np.arange(240) % 2, name) for name in ("val", "train")}
    x = {split.name: rng.normal(size=(240, 16)).astype(np.float32) for split in [*splits, *objects_here.values()]}
    for array in x.values():
        array[[3, 77]] = np.nan
    return [*splits, objects_here["val"]], {"object": {"train": objects_here["train"]}}, x


def test_mapped_embeddings_have_the_same_figures_to_the_bit(tmp_path, monkeypatch):
    splits, root, x = a_split_of_each_kind(np.random.default_rng(0))
    embed, whole = Stored(tmp_path, **x), []
    readouts = Readouts({}, 100, {}, [])
    for large in (1 << 29, 0):
        monkeypatch.setattr(protocols.embed, "LARGE", large)
        held = embed.raw(splits[0])
        assert type(held) is np.ndarray and isinstance(held.base, np.memmap) == (large == 0)
        figures, _ = score(embed, splits, root, None, 5, 0, readouts, {"face_hq/reid": [10, 11]})
        whole.append({(name, rule, metric): (f.value, *f.draws) for name, found in figures.items()
                      for rule, by_metric in found.items() for metric, f in by_metric.items()})
    assert len(whole[0]) > 40 and {name.split("/")[1] for name, *_ in whole[0]} == {
        "verification", "identification", "reid", "templates", "val"}
    np.testing.assert_equal(whole[0], whole[1])  # NaN equals NaN
    held[:] = 0
    np.testing.assert_array_equal(np.load(tmp_path / "verification.npy"), x["verification"])  # a copy
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.npy" for name in x)


def anonymous():
    """MiB that this process holds of its own, what is mapped from files left out."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told by Linux's /proc")
def test_mapped_embeddings_take_no_memory(tmp_path, monkeypatch):
    roles = np.append([0] * 5 + [1] * 5, [2] * 49_990)
    split = FakeSplit(np.append([0, 1, 2, 3, 4] * 2, [-1] * 49_990), {"name": "identification"}, role=roles)
    split.name = "large"
    embed = Stored(tmp_path, large=np.random.default_rng(0).standard_normal((50_000, 512), dtype=np.float32))  # 98 MiB
    monkeypatch.setattr(protocols.embed, "LARGE", 1 << 20)
    before = anonymous()
    x = embed(split)
    assert anonymous() - before < 20
    found, _ = score_gallery(x, split, 2, 0)
    assert anonymous() - before < 40 and found["rank-1"].count == 5
    np.testing.assert_allclose(np.linalg.norm(x[::1000], axis=1), 1, atol=1e-5)


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(protocols.embed.tempfile, "TemporaryFile", lambda dir: Full())
    with pytest.raises(InputError, match=r"no room for 0.0 GiB of embeddings .*\(No space left on device\): free some"):
        map_copy(np.zeros((3, 2), np.float32), tmp_path)


def test_a_run_that_is_mapped_writes_the_same_rows(tiny_run, demo_root, tmp_path, monkeypatch):
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("eval", "analysis"))
    out, mapped, written = tmp_path / "run/eval", [], []
    copy = map_copy
    monkeypatch.setattr(protocols.embed, "map_copy", lambda x, folder: mapped.append(folder) or copy(x, folder))
    for large in (1 << 29, 0):
        monkeypatch.setattr(protocols.embed, "LARGE", large)
        run_here("--run", tmp_path / "run", "--bootstrap", 3, "--workers", 0, "--device", "cpu", "--crowd", 20,
                 "--sheet", "--splits", "body/test,face_hq/test,object/val", "--cache", tmp_path / "cache")
        with np.load(out / "draws.npz") as file:
            written.append(((out / "results.json").read_text(), file["draws"].tobytes(),
                            (out / "sheet-body-test.png").read_bytes()))
        assert {*mapped} == ({tmp_path / "cache", out / "embeddings"} if large == 0 else set())
    assert written[0] == written[1]
    assert {path.suffix for path in (out / "embeddings").iterdir()} == {".npy", ".json", ".lock"}
