"""Options, caches and files that evaluate.py must refuse or repair; what a figure is taken on; what it leaves."""

import csv
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import models.runs
import protocols.classify
import train
from data_prep import InputError, join_config, lock_folder, say_once, write_csv
from data_prep.format import Record, Source, Split, open_root
from data_prep.write import write_split
from models.runs import Run, find_run, load_foundation, write_config
from protocols.bootstrap import normalise
from protocols.classify import Readouts, fit_probe
from protocols.pairs import FARS
from protocols.results import Row, Scored, start_of
from reports.rows import score, show_value, unseen_scope, unsupported_fars
from tests.conftest import script
from tests.test_evaluate import run_here

OPTIONS = ["--bootstrap", "3", "--workers", "0", "--device", "cpu"]
NO_READOUTS = Readouts({}, 0, [])


def known(arrays: dict[str, np.ndarray]):
    """What `score` needs of an embedder, with embeddings by "domain/split"."""

    class Known(SimpleNamespace):
        def raw(self, split):
            return arrays[f"{split.domain}/{split.name}"].copy()

        def __call__(self, split):
            return normalise(self.raw(split))

    return Known(name="tuned", device="cpu", model=SimpleNamespace(library="timm"))


def copy_of(split: Split, folder, rows: list[int], protocol: dict, tables: dict | None = None, **columns) -> Split:
    """A test split of some images of another; columns: one value a row."""
    records = [Record(partial(bytes, split.jpeg(row)[1]), f"{place} {row}", split.classes[split.labels[row]],
                      **{name: values[place] for name, values in columns.items()}) for place, row in enumerate(rows)]
    write_split(folder, Source(records, protocol, tables=tables or {}), source_name="folder", size=split.size,
                fit="crop", quality=95, train=False)
    return Split(folder)


# ---------------------------------------------------------------- what an evaluation leaves


def test_figures_of_an_earlier_evaluation_go(run):
    out = run / "eval"
    out.mkdir()
    older = ["roc.png", "cmc.png", "scores.png", "stages.png", "sheet-face_hq-test.png", "sheet-body-test.png"]
    for name in [*older, "watch.png", "mine.png"]:
        (out / name).write_text("older")
    run_here("--run", run, *OPTIONS, "--splits", "body/test", "--no-foundation", "--sheet")
    assert {path.name for path in out.glob("*.png")} == {"bars.png", "cmc.png", "sheet-body-test.png", "watch.png",
                                                         "mine.png"}
    assert (out / "cmc.png").stat().st_size > 5000 and (out / "sheet-body-test.png").stat().st_size > 5000


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("arguments, words", [
    (["--run", "{run}", "--weights", "pretrained"], "--weights describes an untouched backbone: leave it out with"),
    (["--run", "{run}", "--size", "large"], "--size describes an untouched backbone: leave it out with --run"),
    (["--backbone", "clip", "--no-foundation"], "--no-foundation describes how a run is scored: give --run RUN"),
    (["--backbone", "clip", "--allow-partial"], "--allow-partial describes how a run is scored: give --run RUN"),
    (["--run", "{run}", "--cache", "{file}"], "--cache {file}: cannot be written (File exists"),
    (["--run", "{run}", "--cache", "{file}/more"], "--cache {file}/more: cannot be written (Not a directory)"),
    (["--backbone", "clip", "--size", "tiny", "--weights", "none", "--data", "{data}", "--out", "{file}"],
     "--out {file}/eval: cannot be written (Not a directory)"),
])  # fmt: skip
def test_options_without_effect_and_files_for_folders(arguments, words, run, demo_root, tmp_path):
    (tmp_path / "file").write_text("mine")
    places = {"run": run, "file": tmp_path / "file", "data": demo_root}
    with pytest.raises(InputError) as error:
        run_here(*[word.format(**places) for word in arguments], *OPTIONS)
    assert words.format(**places) in error.value.message and (tmp_path / "file").read_text() == "mine"
    assert "\n" not in error.value.message


def test_weights_are_known_by_their_hash(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w.safetensors").write_bytes(b"the same")
    (tmp_path / "two/other.safetensors").write_bytes(b"others")
    configs = [{"weights": str(tmp_path / name)} for name in ("one/w.safetensors", "two/w.safetensors",
                                                              "two/other.safetensors")]

    def hash_told(weights: str) -> str | None:
        write_config(tmp_path, {"schedule": "A", "weights": weights}, [], 1, {}, {})
        return json.loads((tmp_path / "config.json").read_text())["facts"]["weights_sha256"]

    told = hash_told(configs[0]["weights"])
    moved = {"weights": "/gone.safetensors", "weights_sha256": told}
    assert start_of(configs[0]) == start_of(configs[1]) == start_of(moved) != start_of(configs[2])
    assert hash_told("pretrained") is None
    assert start_of({"weights": "pretrained", "weights_sha256": None})[-1] == "pretrained"
    a, b, c = (Scored(tmp_path, {"seed": i} | config, 0, {0: (SimpleNamespace(weights="tuned"), None)})
               for i, config in enumerate((configs[0], moved, configs[2])))
    assert a.recipe == b.recipe != c.recipe  # seeds of one recipe
    (tmp_path / "config.json").write_text(json.dumps({"options": configs[0], "facts": {"weights_sha256": told}}))
    monkeypatch.setattr(models.runs, "read_config", lambda folder: join_config(folder / "config.json"))  # not whole
    assert find_run(tmp_path, {"resume": True} | configs[1], []) == "unfinished"  # its file has moved
    with pytest.raises(InputError, match="--weights was"):
        find_run(tmp_path, {"resume": True} | configs[2], [])
    replaced = Run(tmp_path, {"weights": configs[2]["weights"], "weights_sha256": told}, None, {}, {})
    with pytest.raises(InputError, match=r"not the file that .* started from .its SHA-256 differs.*--no-foundation"):
        load_foundation(replaced)


def test_a_second_evaluation_of_a_run_is_refused_at_the_start(run):
    with lock_folder(run / "eval", "--run"):
        result = script("evaluate.py", "--run", run, *OPTIONS, check=2)
        again = script("evaluate.py", "leaks", "--run", run, *OPTIONS, check=2)
    for said in (result.stderr, again.stderr):
        assert said.count("\n") == 1 and "is writing to it: wait for it to end" in said
    assert not (run / "eval").exists()  # nothing was begun


def test_cells_that_a_spreadsheet_would_run_are_prefixed(tmp_path):
    row = {"name": "=HYPERLINK(1)", "other": "@x", "more": "-cmd", "number": -0.5, "text": "-1.5e-3", "plain": "a=b"}
    write_csv(tmp_path / "t.csv", [row])
    with open(tmp_path / "t.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"name": "'=HYPERLINK(1)", "other": "'@x", "more": "'-cmd",
                                               "number": "-0.5", "text": "-1.5e-3", "plain": "a=b"}]


# ---------------------------------------------------------------- damaged files


def test_the_probe_of_the_untouched_backbone_is_fitted_once_for_all_runs(run, tmp_path, monkeypatch, capsys):
    options, fitted, fit = ["--run", run, *OPTIONS, "--splits", "object/val", "--probe", "50"], [], fit_probe
    monkeypatch.setattr(protocols.classify, "fit_probe", lambda *a: fitted.append(a) or fit(*a))
    run_here(*options)
    rows = (run / "eval/results.json").read_bytes()
    assert b"probe top-1" in rows and len(fitted) == 2  # before and after
    for expected in (2, 1, 1):
        fitted.clear()
        run_here(*options, "--cache", tmp_path / "cache")
        assert len(fitted) == expected and (run / "eval/results.json").read_bytes() == rows
    path, = (tmp_path / "cache").glob("foundation-probe-*.npy")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    capsys.readouterr()
    run_here(*options, "--cache", tmp_path / "cache")
    assert f"{path}: damaged: computed again" in capsys.readouterr().out and path.read_bytes() == whole
    assert (run / "eval/results.json").read_bytes() == rows


def test_damaged_embeddings_are_computed_again(run, capsys):
    options = ["--run", run, *OPTIONS, "--splits", "face_hq/test"]
    run_here(*options)
    assert "computed again" not in capsys.readouterr().out
    path, = (run.parent / ".foundation").glob("foundation-face_hq-test-*.npy")
    whole, rows = path.read_bytes(), (run / "eval/results.json").read_bytes()
    x = np.load(path)
    holes = x.copy()
    holes[3, 1] = np.nan
    for spoil in (lambda: path.write_bytes(whole[: len(whole) // 2]), lambda: path.write_bytes(b""),
                  lambda: np.save(path, holes), lambda: np.save(path, x[:-1]), lambda: np.save(path, x[:, :-1]),
                  lambda: np.save(path, x.astype(str)), lambda: np.savez(path.open("wb"), x=x)):
        spoil()
        run_here(*options)
        said = [line for line in capsys.readouterr().out.splitlines() if "computed again" in line]
        assert said == [f"  {path}: damaged: embeddings computed again"]
        assert path.read_bytes() == whole and (run / "eval/results.json").read_bytes() == rows
    path.with_suffix(".json").write_text("{")  # whose embeddings they are is not known
    run_here(*options)
    assert json.loads(path.with_suffix(".json").read_text())["flip"] is True


# ---------------------------------------------------------------- what a figure is taken on


def one_camera(base: Split, folder, cameras: list[int]) -> Split:
    rows = np.concatenate([np.flatnonzero(base.labels == label)[:2] for label in range(len(cameras) // 2)]).tolist()
    return copy_of(base, folder, rows, {"name": "reid"}, role=[0, 1] * (len(rows) // 2), camera=cameras)


def test_a_split_of_one_camera_is_named_and_the_others_are_scored(demo_root, run, tmp_path, capsys):
    say_once.cache_clear()
    root, base = tmp_path / "data", Split(demo_root / "body/train")
    one_camera(base, root / "body/one", [0] * 8)
    one_camera(base, root / "body/two", [0, 0, 0, 0, 0, 1, 0, 1])
    shutil.copytree(demo_root / "face_hq/test", root / "face_hq/test")
    assert run_here("--run", run, "--data", root, *OPTIONS) == 0
    out = capsys.readouterr().out
    assert "body/one: NOT SCORED: " in out
    assert "none of 4 probes can be scored: every mate is of the probe's own camera (4)\n" in out
    assert "body/two, general: 2 of 4 probes are not scored: every mate is of the probe's own camera (2)\n" in out
    assert "everything: without body/one: no probe has a mate" in out
    rows = json.loads((run / "eval/results.json").read_text())
    assert {row["split"] for row in rows} == {"two", "test"}
    assert next(row["count"] for row in rows if row["metric"] == "rank-1") == 2
    with pytest.raises(InputError, match="every mate is of the probe's own camera"):
        run_here("--run", run, "--data", root, *OPTIONS, "--splits", "body/one")


def test_protocols_say_what_was_computed_and_few_classes_are_marked(run, demo_root):
    run_here("--run", run, *OPTIONS, "--splits", "object/val", "--no-foundation")
    rows = [Row(**row) for row in json.loads((run / "eval/results.json").read_text())]
    rule = {row.metric: row.protocol.split(", ")[1] for row in rows}
    assert rule["nearest-mean top-1"] == "nearest class mean" and rule["knn top-1"] == "20 neighbours at T 0.07"
    assert rule["head top-1"] == rule["head top-5"] == "trained class weights"
    assert rule["probe top-1"].startswith("L-BFGS probe")
    assert {row.identities for row in rows} == {4} and show_value(rows[0]).endswith("]†")
    assert not show_value(replace(rows[0], identities=20)).endswith("†")
    assert "†: of fewer than 20 identities" in (run / "eval/report.md").read_text()


def test_a_class_is_seen_by_its_wordnet_id_name_or_images(demo_root, tmp_path):
    def split_of(name: str, classes: list[str], first: int, reference: str | None = "train") -> Split:
        base = Split(demo_root / "object/train")
        records = [Record(partial(bytes, base.jpeg(first + i)[1]), f"{i}", name) for i, name in enumerate(classes)]
        protocol = reference and {"name": "classification", "reference": reference, "ood": False}
        write_split(tmp_path / "object" / name, Source(records, protocol, names={"n02084071": "dog, a pet"}),
                    source_name="folder", size=base.size, fit="crop", quality=95, train=False)
        return Split(tmp_path / "object" / name)

    training = split_of("train", ["Polar-bear", "n02084071", "n03126707", "thing"], 0, None)
    test = split_of("test", ["polar bear", "dog", "n02012849", "n03126707", "0001", "0002"], 10, "own")
    own = split_of("own", ["n02012849", "0001"], 2)  # images 2 and 3: those of n03126707 and thing
    readouts = Readouts({}, 0, training.classes, training)
    assert readouts.seen_classes(test, test) == ({"polar bear", "dog", "n03126707"}, "by name and images")
    assert readouts.seen_classes(test, own)[0] == {"polar bear", "dog", "n03126707", "n02012849", "0001"}
    assert Readouts({}, 0, training.classes).seen_classes(test, own) == ({"polar bear", "n03126707"}, "by name")
    _, rule = unseen_scope(test, test, readouts)
    assert rule.startswith(", open set of 3 classes not trained on by name and images ")


def test_a_wrong_reference_is_told_before_anything_is_embedded(demo_root, run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "embed_rows", lambda *_: pytest.fail("embeds"))
    base, root = Split(demo_root / "object/val"), tmp_path / "data"
    shutil.copytree(demo_root / "face_hq/test", root / "face_hq/test")
    copy_of(base, root / "object/val", list(range(len(base))), {"name": "classification", "reference": "photos"})
    with pytest.raises(InputError, match=r"its reference split 'photos' is missing.*--reference SPLIT"):
        run_here("--run", run, "--data", root, *OPTIONS)
    some = np.flatnonzero(base.labels > 0).tolist()
    copy_of(base, root / "object/photos", some, {"name": "classification", "reference": "photos"})
    with pytest.raises(InputError, match=f"class '{base.classes[0]}', 1 in all, is not in its reference"):
        run_here("--run", run, "--data", root, *OPTIONS)


# ---------------------------------------------------------------- FARs that the pairs do not support


@pytest.mark.parametrize("impostors, line", [
    (3000, "3,000 impostor pairs support no FAR of 1e-4, 1e-5, 1e-6: left out"),
    (1000, "1,000 impostor pairs support no FAR of 1e-4, 1e-5, 1e-6: left out"),
    (999_999, "999,999 impostor pairs support no FAR of 1e-6: left out"), (1_000_000, ""),
    (9, "9 impostor pairs support no FAR of 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6: left out"),
])  # fmt: skip
def test_unsupported_fars_are_told(impostors, line):
    assert unsupported_fars(impostors) == line


def test_unsupported_fars_are_told_once_a_split(demo_root, tmp_path, capsys):
    say_once.cache_clear()
    base, rng = Split(demo_root / "face_hq/test"), np.random.default_rng(0)
    rows = list(range(30))
    copy_of(base, tmp_path / "face_hq/sets", rows, {"name": "templates"}, template=rows, tables={
        "template_pairs": np.array([(a, b, base.labels[a] == base.labels[b]) for a in rows for b in range(a)])})
    root = open_root(tmp_path)
    root["face_hq"]["test"] = base
    splits = list(root["face_hq"].values())
    x = {f"face_hq/{split.name}": rng.normal(size=(len(split), 8)).astype(np.float32) for split in splits}
    for _ in ("foundation", "tuned"):
        figures, _ = score(known(x), splits, root, None, 2, 0, NO_READOUTS)
    said = [line.strip() for line in capsys.readouterr().out.splitlines() if "impostor" in line]
    listed = {"test": base.column("pairs"), "sets": splits[0].column("template_pairs")}
    assert len(said) == 2 and "sets" in said[0]
    for name, line in zip(("sets", "test"), said, strict=True):
        assert line.startswith(f"face_hq/{name}: {(listed[name][:, 2] == 0).sum():,} impostor pairs support no FAR")
        told = {metric for rule in figures[f"face_hq/{name}"].values() for metric in rule if metric.startswith("tar@")}
        lost = [float(far) for far in re.findall(r"1e-\d", line)]
        assert told == {f"tar@far={far:g}" for far in FARS if far not in lost}
