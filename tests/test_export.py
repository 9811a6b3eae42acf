"""train.py export and evaluate.py embed: what leaves the project computes what the run computes."""

import importlib
import json
import re
import shutil
import sys
import unicodedata
from pathlib import Path

import click
import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import data_prep.__main__
import tools.export
import train
from data_prep import DOMAINS, InputError
from data_prep.format import Split
from models.runs import load_run, load_tuned
from protocols.embed import Embedder
from tests.conftest import TINY, script
from tools.own_pictures import find_pictures


def export(*arguments) -> int:
    return train.main.main(["export", *map(str, arguments)], standalone_mode=False)


def evaluate(*arguments) -> int:
    main = importlib.import_module("evaluate").main
    return main.main([*map(str, arguments), "--workers", "0"], standalone_mode=False)


def embed(*arguments) -> int:
    return evaluate("embed", *arguments)


NETWORKS = {
    "clip": None,  # the session's run
    "eva02": ["--backbone", "eva02", "--size", "tiny", "--image-size", "28"],
    "dinov3": ["--backbone", "dinov3", "--size", "tiny", "--image-size", "32"],
    "vit": ["--model", "test_vit", "--image-size", "32", "--embed-dim", "24"],
    "openclip": ["--model", "tiny-test-clip", "--image-size", "32"],
    "convolutional": ["--model", "test_convnext", "--image-size", "32"],
}


@pytest.fixture(scope="module")
def tiny_open_clip(tmp_path_factory) -> None:
    """A model that open_clip knows by name, like its own, but small."""
    path = tmp_path_factory.mktemp("configs") / "tiny-test-clip.json"
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    path.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)


@pytest.fixture(scope="module", params=list(NETWORKS))
def run_of_each(request, tiny_run, tiny_open_clip, demo_root, tmp_path_factory) -> Path:
    """A finished run of every family, and of timm models by name: one step of training each."""
    if request.param == "clip":
        return tiny_run
    run = tmp_path_factory.mktemp("families") / request.param
    options = ["--weights", "none", "--domains", "object,body", "--batch", "4", "--images", "4", "--workers", "0",
               "--head-init", "random", "--head-warmup", "0", "--lr", "1e-2", "--device", "cpu"]
    train.main.main([*NETWORKS[request.param], *options, "--data", str(demo_root), "--out", str(run)],
                    standalone_mode=False)
    return run


def pixels_of(run: Path, batch: int) -> torch.Tensor:
    side = load_run(run).config["image_size"]
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(7))


def own_embeddings(run: Path, pixels: torch.Tensor) -> torch.Tensor:
    model = load_tuned(load_run(run))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (model.mean, model.std))
    with torch.no_grad():
        return model((pixels - mean) / std)


def run_code_of(card: Path, pixels, monkeypatch):
    """What the code block of a model card computes, run beside the files that it names and without this project."""
    code = re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)[1]
    monkeypatch.chdir(card.parent)
    names = {"pixels": pixels}
    exec(code, names)
    return names["embeddings"]


def test_safetensors_load_strictly_as_the_card_says(run_of_each, tmp_path, monkeypatch, capsys):
    out = tmp_path / "model.safetensors"
    assert export("--run", run_of_each, "--to", "safetensors", "--out", out, "--tolerance", 0) == 0
    assert "unit embeddings from the run's: 0.0e+00" in capsys.readouterr().out
    pixels = pixels_of(run_of_each, 3)
    with torch.no_grad():
        theirs = run_code_of(tmp_path / "model.safetensors.md", pixels, monkeypatch)
    assert torch.equal(theirs, own_embeddings(run_of_each, pixels))
    extra = {"model.projection.safetensors"} if "vit" in run_of_each.name else set()
    assert {path.name for path in tmp_path.iterdir()} == {out.name, f"{out.name}.md"} | extra


@pytest.mark.parametrize("run_of_each, name, options", [
    ("eva02", "eva02_tiny_patch14_336.mim_in22k_ft_in1k", {"img_size": 28}),
    ("dinov3", "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", {"img_size": 32, "global_pool": "token"}),
    ("vit", "test_vit", {"img_size": 32}),
    ("convolutional", "test_convnext", {}),
], indirect=["run_of_each"])  # fmt: skip
def test_the_keys_are_timms_own(run_of_each, name, options, tmp_path):
    export("--run", run_of_each, "--to", "safetensors", "--out", tmp_path / "model.safetensors")
    net = timm.create_model(name, num_classes=0, **options)
    net.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)


def test_onnx_computes_the_same_for_any_batch(run_of_each, tmp_path, monkeypatch, capsys):
    import onnxruntime

    out = tmp_path / "model.onnx"
    assert export("--run", run_of_each, "--to", "onnx", "--out", out) == 0
    printed = float(re.search(r"run's: (\S+) \(tolerance 0.0001\)", capsys.readouterr().out)[1])
    assert 0 < printed < 1e-5
    for batch in (1, 5):
        pixels = pixels_of(run_of_each, batch)
        theirs = run_code_of(tmp_path / "model.onnx.md", pixels.numpy(), monkeypatch)
        ours = own_embeddings(run_of_each, pixels)
        assert theirs.shape == ours.shape
        torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-3, atol=1e-5)
    session = onnxruntime.InferenceSession(out)
    assert session.get_inputs()[0].shape[0] == "batch" and session.get_modelmeta().custom_metadata_map["interpolation"]


def test_a_form_that_computes_something_else_is_not_written(tiny_run, tmp_path, monkeypatch, capsys):
    def spoiled(model, path):
        code, same = tools.export.to_safetensors(model, path)
        return code, lambda pixels: same(pixels) + 0.01

    monkeypatch.setitem(tools.export.FORMATS, "safetensors", spoiled)
    out = tmp_path / "export" / "model.safetensors"
    assert export("--run", tiny_run, "--to", "safetensors", "--out", out) == 1
    assert "was not written: largest difference" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []


def test_the_difference_is_seen_at_every_batch_and_never_hidden_by_nan(tiny_run):
    model = load_tuned(load_run(tiny_run))
    whole = tools.export.FromPixels(model)
    assert tools.export.largest_difference(model, whole) == 0
    assert tools.export.largest_difference(model, lambda pixels: whole(pixels[:1]).expand(len(pixels), -1)) > 1e-3
    assert not tools.export.largest_difference(model, lambda pixels: whole(pixels) * float("nan")) <= 1e9


# ---------------------------------------------------------------- the card


def test_the_card_says_what_the_model_is_made_of(tiny_run, demo_root, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("eval", "analysis"))
    export("--run", run, "--to", "safetensors")
    card = (run / "export" / "run.safetensors.md").read_text()
    facts = json.loads((run / "config.json").read_text())["facts"]
    for domain in DOMAINS:
        split, drawn = Split(demo_root / domain / "train"), facts["counts"][domain]
        assert (f"| {domain} | demo | {len(split):,} | {len(split.classes)} | {drawn} | {drawn / len(split):.1f} | "
                f"{split.size} px, {split.index['fit']} |") in card
    assert "| lr | 0.001 |" in card and "| seed | 0 |" in card and "| schedule | B |" in card
    assert facts["versions"]["torch"] in card and facts["shards"]["body"][:12] in card
    assert "personal data" in card and "None: the run was not evaluated" in card
    assert str(demo_root) not in card and str(tmp_path) not in card  # a card is published

    hostile = tmp_path / "<img src=x onerror=alert(1)>"
    run.rename(hostile)
    config = json.loads(whole := (hostile / "config.json").read_text())
    config["facts"] |= {"git_commit": hostile.name, "versions": {"torch": hostile.name}}
    config["facts"]["sources"]["body"].pop("fit")
    config["facts"]["sources"]["object"]["fit"] = config["facts"]["shards"]["other"] = [hostile.name]
    (hostile / "config.json").write_text(json.dumps(config))
    export("--run", hostile, "--to", "safetensors", "--out", tmp_path / "`<img src=x>`.safetensors")
    card = (tmp_path / "`<img src=x>`.safetensors.md").read_text()
    assert card.startswith("# \\<img src=x onerror=alert(1)\\>\n")
    assert "- \\`\\<img src=x\\>\\`.safetensors: sha256" in card
    assert "<img" not in re.sub("```.*?```", "", card, flags=re.DOTALL).replace("\\<img", "")
    (hostile / "config.json").write_text(whole)
    hostile.rename(run)

    (run / "eval").mkdir()
    row = {"run": "run", "domain": "body", "split": "test", "protocol": "any words", "kind": "reid",
           "measure": "rank-1", "metric": "rank-1", "count": 1234}
    rows = [row | {"weights": "foundation", "value": 0.25, "low": 0.2, "high": 0.3},
            row | {"weights": "tuned", "value": 0.5, "low": 0.4, "high": 0.6, "protocol": "other words"},
            row | {"weights": "tuned", "value": 0.75, "low": 0.7, "high": 0.8, "rule": "another"}]
    (run / "eval" / "results.json").write_text(json.dumps(rows))
    export("--run", run, "--to", "safetensors", "--out", run / "export" / "again.safetensors")
    card = (run / "export" / "again.safetensors.md").read_text()
    assert "| body/test | rank-1 | 25.0 [20.0, 30.0] | 50.0 [40.0, 60.0] | 1,234 | any words |" in card
    assert "| body/test | rank-1 |  | 75.0 [70.0, 80.0] | 1,234 | any words |" in card


def test_a_card_of_objects_alone_says_nothing_of_people(demo_root, tmp_path):
    run = tmp_path / "run"
    options = [o for o in TINY if o not in ("--images", "64")]
    train.main.main([*options, "--images", "16", "--domains", "object", "--data", str(demo_root), "--out", str(run)],
                    standalone_mode=False)
    export("--run", run, "--to", "safetensors")
    card = (run / "export" / "run.safetensors.md").read_text()
    assert "biometric" not in card and "every training set also apply" in card


# ---------------------------------------------------------------- own pictures


def read_npz(path: Path) -> tuple[list[str], np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["files"].tolist(), arrays["embeddings"]


def test_embeddings_equal_those_of_evaluation(tiny_run, demo_root, tmp_path, capsys):
    """Pictures of any size and format, against the shards that data_prep makes of the same files."""
    fitting = Split(demo_root / "body" / "train")
    rng = np.random.default_rng(0)
    for name, size, ending in (("a", (50, 80), "png"), ("a", (90, 60), "jpg"), ("b", (fitting.size,) * 2, "jpg"),
                               ("b", (200, 31), "webp")):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (7, 5, 3), dtype=np.uint8)).resize(size)
        coarse.save(tmp_path / "photos" / name / f"{size[0]}.{ending}")
    data_prep.__main__.cli.main(["folder", "--src", str(tmp_path / "photos"), "--out", str(tmp_path / "data/body/own"),
                                 "--size", str(fitting.size), "--quality", str(fitting.index["quality"]),
                                 "--workers", "1"], standalone_mode=False)
    split = Split(tmp_path / "data" / "body" / "own")
    model = load_tuned(load_run(tiny_run))
    evaluation = Embedder(model, "tuned", tmp_path / "cache", torch.device("cpu"), 64, 0, flip=True)
    expected = evaluation(split)

    (tmp_path / "photos" / "b" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of a JPEG")
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    out = tmp_path / "embeddings.npz"
    assert embed(tmp_path / "photos", "--run", tiny_run, "--domain", "body", "--out", out) == 0
    said = capsys.readouterr()
    assert f"fitted as body: {fitting.size} px, pad" in said.out and "4 embeddings" in said.out
    assert said.err.count("skipped, not a readable image") == 1 and "broken.jpg" in said.err
    files, x = read_npz(out)
    assert [Path(name).name for name in files] == ["50.png", "90.jpg", "200.webp", f"{fitting.size}.jpg"]
    assert len(split) == 4 and np.abs(x - expected).max() < 1e-6
    assert np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-6)


def test_pictures_are_found_under_any_spelling_and_what_is_left_out_is_counted(tmp_path, capsys):
    name = unicodedata.normalize("NFD", "Zoë.png")  # as macOS stores it
    for other in (name, "._1.png", "notes.txt", "__MACOSX/2.png"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / other, "PNG")
    (tmp_path / "gone.png").symlink_to("/nowhere/gone.png")
    assert find_pictures((tmp_path, tmp_path / name)) == [tmp_path / name]
    link = tmp_path.parent / f"{tmp_path.name}-link" / "pictures"
    link.parent.mkdir()
    link.symlink_to(tmp_path)  # a folder that lies elsewhere
    assert find_pictures((link.parent,)) == [link / name]
    capsys.readouterr()
    find_pictures((tmp_path,))
    told = capsys.readouterr().out
    assert "2 files left out: hidden, or left by the system" in told and "1 files left out: dead link" in told
    assert "1 files left out: not an image by its name" in told


def test_embeddings_equal_the_cache_of_a_scored_split(tiny_run, demo_root, tmp_path):
    split = Split(demo_root / "face_hq" / "test")
    for row in range(len(split)):
        key, data = split.jpeg(row)
        (tmp_path / f"{key}.jpg").write_bytes(data)
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("eval", "analysis"))
    evaluate("--run", run, "--splits", "face_hq/test", "--no-foundation", "--bootstrap", "2")
    cached = np.load(run / "eval" / "embeddings" / "tuned-face_hq-test.npy")
    csv = tmp_path / "faces.csv"
    embed(*sorted(tmp_path.glob("*.jpg")), "--run", run, "--domain", "face_hq", "--out", csv)
    lines = [line.split(",") for line in csv.read_text().splitlines()]
    assert lines[0][:2] == ["file", "e0"] and len(lines) == 1 + len(split)
    x = np.array([[float(value) for value in line[1:]] for line in lines[1:]])
    assert np.abs(x - cached / np.linalg.norm(cached, axis=1, keepdims=True)).max() < 1e-6


def test_a_run_that_did_not_record_its_sources(tiny_run, demo_root, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("eval", "analysis"))
    config = json.loads((run / "config.json").read_text())
    del config["facts"]["sources"]
    (run / "config.json").write_text(json.dumps(config))
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    embed(tmp_path / "red.png", "--run", run, "--out", tmp_path / "x.npz")  # taken from the shards
    embed(tmp_path / "red.png", "--run", tiny_run, "--out", tmp_path / "y.npz")
    assert np.array_equal(read_npz(tmp_path / "x.npz")[1], read_npz(tmp_path / "y.npz")[1])
    export("--run", run, "--to", "safetensors")
    assert "| body | not recorded |" in (run / "export" / "run.safetensors.md").read_text()


# ---------------------------------------------------------------- bad input


@pytest.fixture
def place(tiny_run, demo_root, tmp_path) -> dict:
    """Names that the table of bad input speaks of."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("RGB", (40, 40)).save(tmp_path / "fine.png")
    (tmp_path / "there.onnx").write_text("something")
    for name in ("unfinished", "poor", "scored"):
        shutil.copytree(tiny_run, tmp_path / name, ignore=shutil.ignore_patterns("eval", "analysis"))
    (tmp_path / "unfinished" / "done.json").unlink()
    config = json.loads((tiny_run / "config.json").read_text())
    del config["facts"]["counts"]
    (tmp_path / "poor" / "config.json").write_text(json.dumps(config))
    (tmp_path / "scored" / "eval").mkdir()
    (tmp_path / "scored" / "eval" / "results.json").write_text('[{"domain": "body"}]')
    return {"tmp": tmp_path, "run": tiny_run}


BAD = [
    ("train export --to onnx", "Missing option '--run'"),
    ("train export --run {run}", "Missing option '--to'"),
    ("train export --run {run} --to tflite", "'tflite' is not one of 'safetensors', 'onnx'"),
    ("train export --run {tmp}/empty --to onnx", "is no run: it has no config.json"),
    ("train export --run {tmp}/unfinished --to onnx", "--allow-partial"),
    ("train export --run {tmp}/poor --to onnx", "config.json lacks 'counts'"),
    ("train export --run {tmp}/scored --to onnx", "results.json: cannot be read"),
    ("train export --run {run} --to onnx --out {tmp}/x.pt", "want a file that ends in .onnx"),
    ("train export --run {run} --to onnx --out {tmp}/there.onnx", "exists: remove it, or choose another --out"),
    ("train export --run {run} --to safetensors --out {tmp}/fine.png/x.safetensors", "fine.png'); choose a folder"),
    ("train --lr 1 export --run {run} --to onnx", "--lr before export: give options after the sub-command"),
    ("train exprot --run {run}", "No such command 'exprot'"),
    ("evaluate embed --run {run}", "Missing argument 'IMAGE...|FOLDER'"),
    ("evaluate embed {tmp}/fine.png", "whose embeddings? give --run RUN"),
    ("evaluate embed {tmp}/none.png --run {run}", "none.png: no such file or folder"),
    ("evaluate embed {tmp}/empty --run {run}", "empty: holds no images"),
    ("evaluate embed {tmp}/text.jpg --run {run} --out {tmp}/x.npz", "none of the 1 files can be read"),
    ("evaluate embed {tmp}/fine.png --run {tmp}/empty", "is no run"),
    ("evaluate embed {tmp}/fine.png --run {tmp}/unfinished", "has not finished"),
    ("evaluate embed {tmp}/fine.png --run {run} --out {tmp}/x.npy", "want a file that ends in .npz or .csv"),
    ("evaluate embed {tmp}/fine.png --run {run} --out {tmp}/no/x.npz", "no: no such folder; make it, or"),
    ("evaluate embed {tmp}/fine.png --run {run} --domain car", "'car' is not one of 'object'"),
    ("evaluate embed {tmp}/fine.png --run {run} --device tpu", "want auto, cpu, cuda"),
    ("evaluate --run {run} embed {tmp}/fine.png", "--run before embed"),
]


@pytest.mark.parametrize("words, expected", BAD, ids=[line for line, _ in BAD])
def test_bad_input_is_refused_in_one_line(words, expected, place):
    script_name, *arguments = words.format(**place).split()
    before = sorted(place["tmp"].rglob("*"))
    with pytest.raises(click.ClickException) as error:
        importlib.import_module(script_name).main.main(arguments, standalone_mode=False)
    message = error.value.format_message()
    assert error.value.exit_code == 2 and expected in message
    assert "\n" not in message or not isinstance(error.value, InputError)  # click's own are joined by run_command
    assert sorted(place["tmp"].rglob("*")) == before


@pytest.mark.parametrize("run_of_each", ["vit"], indirect=True)
def test_a_domain_that_the_run_was_not_trained_on(run_of_each, place):
    with pytest.raises(click.ClickException, match="--domain face_hq: the run was trained on object, body"):
        embed(place["tmp"] / "fine.png", "--run", run_of_each, "--domain", "face_hq")


def test_a_missing_package_is_named(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(click.ClickException, match="needs onnxruntime: pip install onnxscript onnxruntime"):
        export("--run", tiny_run, "--to", "onnx", "--out", tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_the_option_offers_every_form():
    form = next(parameter for parameter in train.main.commands["export"].params if parameter.name == "to")
    assert list(form.type.choices) == list(tools.export.FORMATS)


def test_from_a_shell(tiny_run, tmp_path):
    """Exit codes, and training as the command that needs no name."""
    out = tmp_path / "x.safetensors"
    assert "largest difference" in script("train.py", "export", "--run", tiny_run, "--to", "safetensors",
                                          "--out", out).stdout
    again = script("train.py", "export", "--run", tiny_run, "--to", "safetensors", "--out", out, check=2)
    assert again.stderr == f"error: {out} exists: remove it, or choose another --out\n"
    assert "which backbone?" in script("train.py", check=2).stderr
    assert "export" in script("train.py", "--help").stdout
