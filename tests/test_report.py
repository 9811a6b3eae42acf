"""The report of a run: published figures beside its own, stages, score distributions, and names that stay text."""

import base64
import csv
import html
import json
import re
import shutil

import numpy as np
import pytest

import train
from data_prep import InputError, literal, read_lines
from data_prep.format import Split
from protocols.humans import RATING_COLUMNS
from protocols.pairs import SCORE_BINS, score_verification
from protocols.results import Row, read_stages
from reports.tables import beside, datasets_of, draw_stages, read_published, show_published, show_stages, to_html
from tests.conftest import TINY, script
from tests.test_data_prep import run_here as data_prep_here
from tests.test_evaluate import run_here
from tests.test_evaluate_inputs import OPTIONS
from tests.test_humans import vectors
from tests.test_trials import score
from train import Options, plan_batches

# ---------------------------------------------------------------- published figures


def test_published_figures_have_sources_and_known_metrics():
    rows = read_published()
    humans, experts = ([row for row in rows if row.kind == kind] for kind in ("human", "expert"))
    assert len(humans) >= 5 and len(experts) > 100 and all(row.source and row.who for row in rows)
    assert not any(row.same_protocol for row in humans)  # people were never asked in the way a model is
    assert len({(r.kind, r.dataset, r.domain, r.metric, r.who, r.protocol) for r in rows}) == len(rows)
    # the units: percent in the file, as printed there
    (lfw,) = [row for row in humans if row.dataset == "lfw"]
    assert lfw.value == pytest.approx(0.9753) and min(row.value for row in rows) > 0.3


def test_published_figures_stand_beside_the_data_set_that_they_are_of(tmp_path):
    rows = read_published()
    names = ["face_hq/LFW", "face_lq/lfw", "body/market-1501", "object/val", "face_lq/tinyface"]
    assert datasets_of(names, (), rows) == {"face_hq/LFW": "lfw", "body/market-1501": "market1501",
                                            "face_lq/tinyface": "tinyface"}  # a degraded LFW is not LFW
    given = datasets_of(names, ("object/val=ImageNet", "face_hq/LFW="), rows)
    assert given["object/val"] == "imagenet" and "face_hq/LFW" not in given
    for word, said in (("object/val=cifar", "nothing is published of 'cifar'"), ("object/x=lfw", "want SPLIT=DATASET"),
                       ("object/val", "want SPLIT=DATASET")):
        with pytest.raises(InputError, match=said):
            datasets_of(names, (word,), rows)

    def row(domain, split, rule, flip, weights="tuned"):
        return Row("r", weights, domain, split, "", "rank-1", 0.5, 0.4, 0.6, 9, rule=rule, flip=flip)

    mine = [row("body", "market-1501", "general", False, "foundation"), row("body", "market-1501", "general", False),
            row("face_lq", "tinyface", "whole gallery", True)]
    found = beside(mine, datasets_of(names, (), rows), rows)
    same = {(one.who, name, one.metric): one.comparable(r) for one, name, r in found}
    assert same["ViT-B baseline", "body/market-1501", "rank-1"] and not same["OSNet x1.0", "body/market-1501", "rank-1"]
    assert same["ViT-B AdaFace WebFace4M", "face_lq/tinyface", "rank-1"]
    assert not any(same[key] for key in same if key[2] == "accuracy")
    text = "\n".join(show_published(found))
    assert "| face_hq/LFW | accuracy | not computed | 97.53 | people, averaged | no |" in text
    assert "| body/market-1501 | rank-1 | 50.0 (tuned) | 94.60 | ViT-B baseline | yes |" in text
    flipped = [row("body", "market-1501", "general", True)]
    found = beside(flipped, {"body/market-1501": "market1501"}, rows)
    assert found and not any(one.comparable(r) for one, _, r in found)
    assert show_published([]) == []
    (tmp_path / "humans.csv").write_text("dataset,domain,metric,protocol,value,who,source,same_protocol,requires\n"
                                         "lfw,face_hq,accuracy,x,97.5,people,,no,\n")
    with pytest.raises(InputError, match=r"humans.csv, line 2: not a published figure"):
        read_published(tmp_path)


# ---------------------------------------------------------------- stages


def test_stages_of_a_sequential_run_by_hand(tmp_path):
    # 10 steps, three domains: the stages end after steps 4, 7 and 10 (floor(3 s / 10) grows at s = 4 and 7)
    config = {"order": ["body", "object", "face_hq"], "domains": ["object", "face_hq", "body"], "steps": 10}
    options = Options(schedule="sequential", domains=config["order"], batch=8, images=80)
    plan = plan_batches(options, [range(100)] * 3)[:, 0]
    assert [config["domains"][k] for k in plan.argmax(1)] == ["body"] * 4 + ["object"] * 3 + ["face_hq"] * 3
    assert read_stages(tmp_path, config) is None
    assert "--eval-every 3" in "\n".join(show_stages(None, config))
    looks = [{"step": step, "auc": {"body/test": 0.5 + auc, "object/val": 0.6}}
             for step, auc in ((0, 0), (2, 0.1), (4, 0.4), (6, 0.3), (8, 0.2), (10, 0.1))]
    (tmp_path / "probe.jsonl").write_text("\n".join(map(json.dumps, looks)))
    stages = read_stages(tmp_path, config)
    assert stages.names == ["start", "body", "object", "face_hq"] and stages.steps == [0, 4, 6, 10]
    assert stages.ends == [0, 4, 7, 10] and stages.tasks == ["body/test", "object/val"]
    assert np.array(stages.scores)[:, 0] == pytest.approx([0.5, 0.9, 0.8, 0.6])
    text = "\n".join(show_stages(stages, config))
    assert "| object | 6 of 7 | 80.0 | 60.0 |" in text and "| lost |  | 30.0 | 0.0 |" in text
    draw_stages(tmp_path / "stages.png", stages)
    assert (tmp_path / "stages.png").stat().st_size > 5000


def test_stages_of_a_damaged_log(tmp_path):
    looks = [{"step": 1, "auc": {"face_hq/test": 0.5}}, {"step": "x", "auc": {}}, {"step": 2},
             {"step": 3, "auc": [1]},
             {"step": 4, "auc": {"face_hq/test": None}}]
    (tmp_path / "probe.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks))
    stages = read_stages(tmp_path, {"order": ["face_hq", "body"], "domains": [], "steps": 4})
    assert stages.steps == [1, 4] and stages.scores[0] == [0.5] and np.isnan(stages.scores[1]).all()
    (tmp_path / "probe.jsonl").write_text(f"{json.dumps(looks[0])}\n3\n{json.dumps(looks[4])}\n")
    with pytest.raises(InputError, match=r"probe.jsonl, line 2: damaged .*: remove the line"):
        read_stages(tmp_path, {"order": ["face_hq", "body"], "domains": [], "steps": 4})


# ---------------------------------------------------------------- the page


def test_the_report_of_a_sequential_run_holds_everything(demo_root, tmp_path):
    run = tmp_path / "seq"
    script("train.py", *TINY, "--schedule", "sequential", "--eval-every", "1", "--data", demo_root, "--out", run)
    score("--run", run, "--bootstrap", 5, "--workers", 0, "--no-foundation", "--crowd", 0,
          "--published", "body/test=market1501")
    text, page = ((run / "eval" / name).read_text() for name in ("report.md", "report.html"))
    looks = read_lines(run / "probe.jsonl")
    end = looks[-1]["auc"]["face_hq/test"]
    assert [look["step"] for look in looks] == [0, 1, 2, 3, 4] and text.count("\n| body | 4 |") == 1
    assert re.search(rf"\| body \| 4 \| [\d.]+ \| {100 * end:.1f} \|", text)
    pictures = re.findall(r"!\[[^\]]*\]\((\S+)\)", text)
    assert pictures == ["bars.png", "roc.png", "cmc.png", "scores.png", "stages.png"]
    # self-contained, and the same content: every picture inside, every cell of every table
    inside = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(data) for data in inside] == [(run / "eval" / name).read_bytes() for name in pictures]
    assert page.count("<img") == len(pictures) and not re.search(r"(src|href)=\"(?!data:)", page)
    cells = sum(line.count("|") - 1 for line in text.splitlines() if line.startswith("|") and "| --- |" not in line)
    assert page.count("<td>") + page.count("<th>") == cells
    assert "<td>TransReID README</td>" in page and page.count("<h2>") == text.count("\n## ")


def test_the_page_of_a_report_escapes_what_it_is_told(tmp_path):
    page = to_html(["# <b>", "", "a **b** `c` <script> & ![x](../y.png)", "", "| h |", "| --- |", "| <i> |"],
                   tmp_path)
    assert "<script>" not in page and "<i>" not in page and "<title>&lt;b&gt;</title>" in page
    assert "<b>b</b> <code>c</code>" in page and "<img" not in page


def test_score_distributions_count_every_pair():
    class Pairs:
        labels, folder, protocol = np.array([0, 0, 1, 1]), "fake", {"folds": 2}

        def column(self, name):
            return np.array([[0, 1, 1, 0], [2, 3, 1, 1], [0, 2, 0, 0], [1, 3, 0, 1]])

    x = vectors(0.5, -0.3)
    _, curve = score_verification(x, Pairs(), 2, 0)
    assert curve["same"].sum() == 2 and curve["different"].sum() == 2
    middle = (SCORE_BINS[1:] + SCORE_BINS[:-1]) / 2
    assert sorted(middle[curve["same"] > 0].round(2)) == [-0.3, 0.5]


# ---------------------------------------------------------------- names


ODD = "![a](roc.png) <b>`x`</b> **c** | d\\ \\| [e](http://f)"


def test_names_in_reports_are_text(tmp_path):
    (tmp_path / "roc.png").write_bytes(b"a picture")
    lines = [f"# {literal(ODD)}", "", "| rater | value |", "| --- | --- |", f"| {literal(ODD)} | 1 |", "",
             f"AUC of rater {literal(ODD)}", "", "**bold** `code`", "![own](roc.png)"]
    page = to_html(lines, tmp_path)
    shown = html.escape(ODD, quote=False)
    assert re.findall(r"<title>(.*?)</title>", page) == [html.escape(ODD)]
    for tag, text in (("h1", shown), ("td", shown), ("p", f"AUC of rater {shown}")):
        found = re.search(f"<{tag}>(.*?)</{tag}>", page)[1]
        assert "<" not in found and html.escape(html.unescape(found), quote=False) == text
    assert page.count("<td>") == 2 and page.count("<img") == 1 and "<b>bold</b> <code>code</code>" in page


def test_names_of_raters_are_text_in_the_report(run, demo_root, tmp_path, capsys):
    split = Split(demo_root / "body/test")
    rows = [np.flatnonzero(split.labels == label)[:2] for label in range(2)]
    pairs = [(rows[0][0], rows[0][1]), (rows[0][0], rows[1][0])]

    def ratings(rater: str):
        with open(tmp_path / "ratings.csv", "w", newline="") as file:
            csv.writer(file).writerows([RATING_COLUMNS, *(
                ["body/test", split.jpeg(int(a))[0], split.jpeg(int(b))[0], rater, 1] for a, b in pairs)])
        run_here("--run", run, *OPTIONS, "--splits", "body/test", "--no-foundation", "--crowd", 0, "--humans",
                 tmp_path / "ratings.csv")

    for rater in ("anna\nben", "anna\x1b[2J", "anna\u2028ben", "anna\x7fben"):
        with pytest.raises(InputError, match="want a name without line breaks and control characters") as error:
            ratings(rater)
        assert error.value.message.isprintable()
    ratings(ODD)
    page, text = ((run / "eval" / name).read_text() for name in ("report.html", "report.md"))
    (line,) = [line for line in text.splitlines() if "AUC of rater" in line]
    assert f"AUC of rater {literal(ODD)} |" in line
    (cell,) = re.findall(r"<td>(AUC of rater .*?)</td>", page)
    assert "<" not in cell and html.unescape(cell) == f"AUC of rater {ODD}"
    ratings("Zoë O'Neill-Ø")
    assert "AUC of rater Zoë O'Neill-Ø |" in (run / "eval/report.md").read_text()


def test_dollar_signs_in_names_are_no_mathematics(demo_root, tmp_path):
    """In every figure with names of classes and splits; what stands between them cannot be parsed."""
    odd, data, run = "$\\x$", tmp_path / "data", tmp_path / "run"
    for domain, name in (("object", "train"), ("object", "val"), ("face_hq", "test")):
        folder = shutil.copytree(demo_root / domain / name, data / domain / (name if name == "train" else odd))
        index = json.loads((folder / "index.json").read_text())
        index |= {"split": folder.name, "names": [odd] * len(index["names"])}
        (folder / "index.json").write_text(json.dumps(index))
        data_prep_here("stats", folder)
    train.main.main([*map(str, (*TINY, "--data", data, "--out", run, "--domains", "object", "--schedule", "sequential",
                                "--eval-every", 2))], standalone_mode=False)
    run_here("--run", run, *OPTIONS)
    run_here("compare", run, "--out", tmp_path / "compared")
    drawn = {"samples.png", "curves.png", "eval/bars.png", "eval/scores.png", "eval/roc.png", "eval/stages.png"}
    assert all((run / name).exists() for name in drawn) and (tmp_path / "compared/comparison.png").exists()
