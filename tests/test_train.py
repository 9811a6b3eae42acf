"""train.py as its users run it: on small shards, and misused. (Killed and resumed: test_interrupted_training.py.)"""

import json
import pickle
import shutil
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data_prep.loaders
import models.backbones
import models.head
import reports.training
import train
from data_prep import DOMAINS, InputError, read_lines
from data_prep.format import open_root
from data_prep.stream import Stream
from models import backbones
from models.adapt import uses_bf16
from models.backbones import Network, load_backbone
from models.head import starting_weights
from models.runs import load_foundation, load_run, load_tuned
from tests.conftest import TINY, script

TINY_CLIP = Network("clip", "tiny", weights="none", image_size=32)


def run_here(*arguments) -> int:
    """One run in this process: quicker than a new one, where signals do not matter."""
    return train.main.main([str(a) for a in arguments], standalone_mode=False)


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors") | load_file(run / "head.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    x, y = weights_of(a), weights_of(b)
    assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


# ---------------------------------------------------------------- a run


@pytest.mark.parametrize("schedule", ["A", "B", "alternate", "sequential"])
def test_every_schedule_learns(schedule, demo_root, tmp_path):
    code = run_here(*TINY, "--schedule", schedule, "--data", demo_root, "--out", tmp_path / "run", "--images", 1600,
                    "--domains", "object,body", "--log-every", 1, "--margin-ramp", 0, "--head-warmup", 0)
    log = log_of(tmp_path / "run")
    assert code == 0 and len(log) == 100
    for domain in ("object", "body"):
        losses = [record[f"loss/{domain}"] for record in log if f"loss/{domain}" in record]
        assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3, losses
    shown = [f"loss/{d}" in log[0] for d in ("object", "body")]
    assert shown == ([True, True] if schedule in "AB" else [True, False])


def test_a_run_folder_holds_what_the_design_lists(tiny_run, demo_root):
    names = {path.name for path in tiny_run.iterdir()}
    assert names >= {"config.json", "log.jsonl", "tensorboard", "model.safetensors", "head.safetensors", "last",
                     "done.json", "samples.png"}
    assert list((tiny_run / "tensorboard").glob("events*"))
    config = json.loads((tiny_run / "config.json").read_text())
    options, facts = config["options"], config["facts"]
    assert facts["role"] == "unified" and facts["steps"] == 4 and sum(facts["counts"].values()) == 64
    assert set(facts["versions"]) >= {"torch", "timm"} and set(options) == set(vars(train.Options()))
    run = load_run(tiny_run)
    assert run.config["domains"] == list(DOMAINS) and run.options == options
    classes = {d: splits["train"].classes for d, splits in open_root(demo_root).items()}
    assert run.classes == classes and len(run.head) == sum(len(names) for names in classes.values())
    assert run.class_ranges["object"] == (0, len(classes["object"]))


def test_weights_load_strictly_into_the_libraries(tiny_run, demo_root, tmp_path):
    import open_clip
    import timm

    clip = models.backbones.build_network("open_clip", "tiny", 32)[0]
    assert isinstance(clip, open_clip.CLIP)
    clip.load_state_dict(load_file(tiny_run / "model.safetensors"), strict=True)
    model = load_tuned(load_run(tiny_run))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), clip.eval().encode_image(images))

    options = ["--model", "test_vit", "--weights", "none", "--image-size", 32, "--embed-dim", 24, "--workers", 0]
    run_here(*options, "--data", demo_root, "--domains", "object,body", "--batch", 8, "--images", 8,
             "--out", tmp_path / "vit")
    vit = timm.create_model("test_vit", num_classes=0, img_size=32)
    vit.load_state_dict(load_file(tmp_path / "vit" / "model.safetensors"), strict=True)
    tuned = load_tuned(load_run(tmp_path / "vit"))
    project = load_file(tmp_path / "vit" / "head.safetensors")["project"]
    torch.testing.assert_close(tuned(images), vit.eval()(images) @ project.T)
    assert tuned.dim == 24


def test_the_foundation_is_the_same_start(tiny_run):
    run = load_run(tiny_run)
    first, again = load_foundation(run), load_foundation(run)
    tuned = load_tuned(run)
    pairs = zip(first.net.state_dict().values(), again.net.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    moved = [k for k, v in first.net.state_dict().items() if not torch.equal(v, tuned.net.state_dict()[k])]
    assert moved and all(key.startswith("visual.") for key in moved)  # the text tower stays as it was


def test_config_replays_a_run(tiny_run, tmp_path):
    script("train.py", "--config", tiny_run / "config.json", "--out", tmp_path / "again", "--workers", "2")
    assert_same_weights(tiny_run, tmp_path / "again")  # with two workers as without
    script("train.py", "--config", tiny_run / "config.json", "--out", tmp_path / "other", "--seed", "1")
    assert json.loads((tmp_path / "other/config.json").read_text())["options"]["seed"] == 1
    assert not torch.equal(weights_of(tmp_path / "other")["weight"], weights_of(tiny_run)["weight"])


def test_the_command_line_wins_over_a_config(tiny_run, demo_root, tmp_path):
    options = ["--domains", "object,body", "--epochs", "0.1", "--model", "test_convnext", "--head-init", "random"]
    run_here("--config", tiny_run / "config.json", *options, "--out", tmp_path / "run")
    config = load_run(tmp_path / "run").config
    assert config["images"] is None and config["backbone"] is None and config["domains"] == ["object", "body"]
    assert config["batch"] == 16 and config["steps"] == round(0.1 * 400 / config["counts"]["object"] *
                                                              sum(config["counts"].values()) / 16)


def test_head_warmup_trains_the_head_alone(demo_root, tmp_path):
    run_here(*TINY, "--data", demo_root, "--out", tmp_path / "run", "--head-warmup", 1)
    run = load_run(tmp_path / "run")
    before, after = load_foundation(run).net.state_dict(), load_tuned(run).net.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    splits = [open_root(demo_root)[domain]["train"] for domain in DOMAINS]
    start = starting_weights(load_foundation(run), splits, "means", seed=0, batch=64, workers=0)
    assert not torch.allclose(run.head, start, atol=1e-4)


def test_head_starts_at_class_means_and_prompts(demo_root, monkeypatch):
    import open_clip

    monkeypatch.setattr(models.head, "MEAN_IMAGES", 2)
    model, split = load_backbone(TINY_CLIP).eval(), open_root(demo_root)["object"]["train"]

    def start(how: str, seed: int = 0) -> torch.Tensor:
        return starting_weights(model, [split], how, seed=seed, batch=8, workers=0)

    rows = np.flatnonzero(split.labels == 1)[:2]
    x = torch.cat([x for _, x in backbones.embed_rows(model, split, rows, torch.device("cpu"), 8)])
    mean = torch.nn.functional.normalize(torch.nn.functional.normalize(x, dim=1).sum(0), dim=0)
    torch.testing.assert_close(start("means")[1], mean, rtol=1e-4, atol=1e-5)
    text = model.net.encode_text(open_clip.get_tokenizer("ViT-B-32")([f"a photo of a {split.classes[1]}."]))
    unit = torch.nn.functional.normalize(text, dim=1)[0].detach()
    torch.testing.assert_close(start("text")[1], unit, rtol=1e-4, atol=1e-5)
    assert torch.equal(start("text-frozen"), start("text"))
    random = start("random")
    torch.testing.assert_close(random.norm(dim=1), torch.ones(len(split.classes)))
    assert torch.equal(random, start("random")) and not torch.equal(random, start("random", seed=1))


def test_frozen_text_head_stays(demo_root, tmp_path):
    options = ["--head-init", "text-frozen", "--head-lr", "0.1"]
    run_here(*TINY, *options, "--data", demo_root, "--out", tmp_path / "run")
    run = load_run(tmp_path / "run")
    names = run.classes["object"]
    start = backbones.text_weights(load_foundation(run), names, torch.device("cpu"))
    torch.testing.assert_close(run.head[: len(names)], start)
    assert run.head[len(names) :].norm(dim=1).sub(1).abs().max() > 1e-3


def test_collapse_is_named(demo_root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reports.training, "MAX_SKIPPED", 100)
    # from a random start a rate of 1 drives every embedding to the same direction
    run_here(*TINY, "--data", demo_root, "--out", tmp_path / "run", "--lr", "1", "--images", "320", "--log-every", "1",
             "--head-init", "random")
    assert "COLLAPSED" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/done.json").read_text())["collapsed_at"]


def test_every_step_not_finite_stops_the_run(demo_root, tmp_path):
    with pytest.raises(InputError, match=r"1[1-9] steps in a row were not finite"):
        run_here(*TINY, "--data", demo_root, "--out", tmp_path / "run", "--head-lr", "inf", "--images", "320")
    with pytest.raises(InputError, match=r"1[1-9] steps in a row were not finite"):  # weights without an AUC
        run_here(*TINY, "--data", demo_root, "--out", tmp_path / "looks", "--lr", "1e38", "--images", "320",
                 "--eval-every", "5")
    assert read_lines(tmp_path / "looks/probe.jsonl")[-1]["auc"] == {}


def test_degradation_grows_with_its_ramp(demo_root):
    split = open_root(demo_root)["face_lq"]["train"]
    plan = np.full((20, 1), 16)

    def difference(batch, **severity):
        options = {"seed": 0, "crop": [1.0]}
        sharp, soft = Stream([split], plan, **options)[batch], Stream([split], plan, **options, **severity)[batch]
        assert torch.equal(sharp.flip, soft.flip) and torch.equal(sharp.label, soft.label)
        return (sharp.banks[0].float() - soft.banks[0].float()).abs().mean()

    growing = np.linspace(0, 1, 20)
    assert difference(0, severity=growing) == 0 < difference(5, severity=growing) < difference(19, severity=growing)


def test_weights_are_as_readable_as_other_files(tiny_run):
    modes = {path.name: path.stat().st_mode for path in tiny_run.iterdir() if path.is_file()}
    assert modes["model.safetensors"] == modes["head.safetensors"] == modes["config.json"]


@pytest.mark.parametrize("family", ["eva02", "dinov3"])
def test_the_other_families_take_a_step(family, demo_root, tmp_path):
    side = {"eva02": 28, "dinov3": 32}[family]  # two by two patches
    model = ["--backbone", family, "--size", "tiny", "--weights", "none", "--image-size", side]
    run_here(*model, "--data", demo_root, "--domains", "face_hq,body", "--out", tmp_path / "run", "--batch", 4,
             "--images", 4, "--workers", 0, "--head-init", "random", "--head-warmup", 0)
    run = load_run(tmp_path / "run")
    before, after = (load(run).net.state_dict() for load in (load_foundation, load_tuned))
    assert run.head.shape[1] == 192 and sum(not torch.equal(before[key], after[key]) for key in before) > 50


def test_bf16_is_taken_where_it_is_not_emulated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not uses_bf16("auto", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert uses_bf16("auto", torch.device("cuda")) and not uses_bf16("fp32", torch.device("cuda"))


def test_a_last_batch_of_one_image(demo_root, monkeypatch):
    monkeypatch.setattr(models.head, "MEAN_IMAGES", 3)
    split = open_root(demo_root)["object"]["train"]
    assert 3 * len(split.classes) % 11 == 1
    head = starting_weights(load_backbone(TINY_CLIP), [split], "means", seed=0, batch=11, workers=0)
    assert head.shape == (len(split.classes), 64)


# ---------------------------------------------------------------- loader processes


def test_loader_processes_can_be_spawned(demo_root):
    """On macOS, Windows and Python 3.14 the stream travels to the workers as a pickle."""
    split = open_root(demo_root)["body"]["train"]
    stream = Stream([split], np.full((3, 1), 5), seed=0, crop=[0.5])
    again, chunk = pickle.loads(pickle.dumps(stream))[2], stream[2]
    assert torch.equal(again.banks[0], chunk.banks[0]) and torch.equal(again.boxes, chunk.boxes)


class Unreadable(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> torch.Tensor:
        if i:
            raise InputError("data/body/train: no readable image")
        return torch.zeros(1)


def test_bad_input_in_a_loader_process_stays_one_line():
    items = data_prep.loaders.load(Unreadable(), 0, 1, False)
    assert len(next(items)) == 1
    with pytest.raises(InputError) as error:
        next(items)
    assert error.value.message == "data/body/train: no readable image"
    for text, words in (("DataLoader worker (pid 3) exited unexpectedly with exit code 24. Details", "ulimit -n"),
                        ("unable to allocate shared memory(shm) for file </torch_3>: No space left", "--shm-size"),
                        ("Pin memory thread exited unexpectedly", "a loader process died")):
        assert words in data_prep.loaders.loader_error(RuntimeError(text)).message
    defect = RuntimeError("size mismatch")
    assert data_prep.loaders.loader_error(defect) is defect


# ---------------------------------------------------------------- bad input


def test_no_data_and_no_network_is_one_line(tmp_path):
    result = script("train.py", "--backbone", "clip", "--schedule", "B", "--data", tmp_path / "none", check=2)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and "python -m data_prep demo" in lines[0] and "python -m data_prep SOURCE" in lines[0]


BAD = [
    (["--backbone", "resnet"], "'resnet' is not one of 'clip', 'eva02', 'dinov3'"),
    (["--model", "vit_smal_patch16_224"], "similar names: vit_small_patch"),
    ([], "which backbone"),
    (["--backbone", "clip", "--schedule", "C"], "'C' is not one of 'A', 'B'"),
    (["--backbone", "clip", "--domains", "object,cars"], "no domain 'cars'"),
    (["--backbone", "clip", "--size", "tiny"], "clip tiny has no weights to download"),
    (["--backbone", "clip", "--size", "tiny", "--weights", "no/such.pt"], "no/such.pt; give 'pretrained'"),
    ([*TINY, "--batch", "30", "--schedule", "A"], "--batch 30 cannot be divided among 4 domains"),
    ([*TINY, "--batch", "10", "--mix", "object=97,face_hq=1,face_lq=1,body=1"],
     "face_hq 0.10 images: raise --batch to 100"),
    ([*TINY, "--mix-ramp", "object=1"], "want DOMAIN:FIRST->LAST"),
    ([*TINY, "--schedule", "A", "--mix", "1"], "sets the shares of schedule B"),
    ([*TINY, "--mix-ramp", "object:1->0.5@0"], "FRACTION of training above 0"),
    ([*TINY, "--mix-ramp", "object:1.2.3->0.5"], "want DOMAIN:FIRST->LAST"),
    ([*TINY, "--mix-ramp", "object:1->0.5", "--mix", "object=1,face_hq=0,face_lq=0,body=0"],
     "another domain with a share"),
    ([*TINY, "--mix", "object=0,face_hq=0,face_lq=0,body=0"], "at least one share"),
    ([*TINY, "--model", "test_vit"], "--backbone and --model both name the network"),
    ([*TINY, "--head-init", "text", "--embed-dim", "24"], "no --embed-dim"),
    ([*TINY, "--device", "mps"], "want auto, cpu, cuda"),
    (["--model", "ViT-B-32"], "--model NAME/TAG"),
    (["--backbone", "clip", "--size", "tiny", "--weights", "none", "--image-size", "16"], "16 does not fit tiny"),
    ([*TINY, "--epochs", "2"], "--images and --epochs both"),
    ([*TINY, "--domains", "object", "--degrade"], "--degrade acts on face_lq"),
    (["--model", "test_vit", "--head-init", "text"], "needs CLIP's text tower"),
    ([*TINY, "--head-init", "text-frozen", "--domains", "body"], "freezes the object classes, but object is not among"),
    ([*TINY, "--scale", "30"], "No such option"),
    ([*TINY, "--device", "cuda"], "no CUDA device"),
    ([*TINY, "--config", "no.json"], "--config no.json"),
    ([*TINY, "--no-such-option"], "No such option"),
    ([*TINY, "--batch", "1000000000"], "1,000,000,000 images at a time take"),
    ([*TINY, "--workers", "1000000"], "is not in the range 0<=x<=1024"),
    ([*TINY, "--images", "9223372036854775808"], "is not in the range"),
    ([*TINY, "--images", "1000000000000"], "a run of 62,500,000,000 steps: at most 10,000,000"),
    ([*TINY, "--splits", "object/val"], "--splits chooses the splits of --eval-every"),
    ([*TINY, "--splits", "object/train", "--eval-every", "1"], "object/train is a training split"),
]


@pytest.mark.parametrize("arguments, words", BAD, ids=[words[:30] for _, words in BAD])
def test_bad_input_is_refused_in_one_line(arguments, words, demo_root, tmp_path):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(click.ClickException) as error:
        run_here(*arguments, "--data", demo_root, "--out", tmp_path / "run")
    assert words in error.value.format_message() and "\n" not in error.value.format_message()
    assert not (tmp_path / "run").exists()  # refused before any work


@pytest.mark.parametrize("name", ["config.json", "head.safetensors", "model.safetensors", "last/state.pt"])
def test_a_damaged_run_folder_is_named_in_one_line(name, tiny_run, demo_root, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("eval", "analysis"))
    (tmp_path / "run" / name).write_text("x")
    with pytest.raises(InputError) as error:
        if name == "last/state.pt":
            (tmp_path / "run/done.json").unlink()
            run_here(*TINY, "--data", demo_root, "--out", tmp_path / "run", "--resume")
        load_tuned(load_run(tmp_path / "run"))
    assert name in error.value.message and "restore it" in error.value.message and "\n" not in error.value.message


def test_an_existing_run_is_not_overwritten(tiny_run, demo_root):
    with pytest.raises(InputError, match="already holds a run: continue it with --resume"):
        run_here(*TINY, "--data", demo_root, "--out", tiny_run)
    with pytest.raises(InputError, match=r"--lr was 0.001 and is now 0.5"):
        run_here(*TINY, "--data", demo_root, "--out", tiny_run, "--resume", "--lr", "0.5")


def test_a_run_is_not_resumed_on_other_shards(tiny_run, demo_root, tmp_path):
    for domain in DOMAINS:
        shutil.copytree(demo_root / domain / "train", tmp_path / "data" / domain / "train")
    path = tmp_path / "data/body/train/index.json"
    index = json.loads(path.read_text())
    index["provenance"]["plan"] = "another"
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match="body/train is not the split that the run was started with"):
        run_here(*TINY, "--data", tmp_path / "data", "--out", tiny_run, "--resume")


@pytest.fixture
def damaged_root(demo_root, tmp_path) -> Path:
    root = tmp_path / "data"
    for domain in ("object", "body"):
        shutil.copytree(demo_root / domain / "train", root / domain / "train")
    return root


def spoil_jpeg(split: Path, row: int) -> None:
    """Overwrite the entropy-coded data of one JPEG in place: the tar stays well-formed."""
    offset, length = (int(np.load(split / "index" / f"{name}.npy")[row]) for name in ("offset", "length"))
    with open(split / "shard-000000.tar", "r+b") as tar:
        tar.seek(offset)
        tar.write(b"\0" * length)


def test_a_corrupt_jpeg_is_replaced_counted_and_named(damaged_root, tmp_path, capsys, monkeypatch):
    spoil_jpeg(damaged_root / "object" / "train", 3)
    options = [*TINY, "--data", damaged_root, "--domains", "object", "--epochs", "1", "--head-init", "random"]
    options = [o for i, o in enumerate(options) if o != "--images" and options[i - 1] != "--images"]
    monkeypatch.setattr(reports.training, "MAX_DAMAGED", 0.05)
    run_here(*options, "--out", tmp_path / "run")
    monkeypatch.undo()
    assert json.loads((tmp_path / "run/done.json").read_text())["bad"] == 1
    assert "damaged image replaced: object/train" in capsys.readouterr().err
    for row in range(12):
        spoil_jpeg(damaged_root / "object" / "train", row)
    with pytest.raises(InputError, match=r"\d+ damaged images among .* are more than 0.1%: check the shards"):
        run_here(*options, "--out", tmp_path / "run2")


@pytest.mark.parametrize("damage, words", [
    ("empty root", "python -m data_prep"), ("no body", "body/train: no shards"), ("truncated", "shard-000000.tar"),
    ("missing column", "label"), ("other index", "index.json"),
])  # fmt: skip
def test_damaged_shards_are_refused_in_one_line(damage, words, damaged_root, tmp_path):
    folder = damaged_root / "body" / "train"
    if damage == "empty root":
        shutil.rmtree(damaged_root)
        damaged_root.mkdir()
    elif damage == "no body":
        shutil.rmtree(folder.parent)
    elif damage == "truncated":
        with open(folder / "shard-000000.tar", "r+b") as tar:
            tar.truncate(5000)
    elif damage == "missing column":
        (folder / "index" / "label.npy").unlink()
    else:
        (folder / "index.json").write_text(json.dumps({"format": "something else"}))
    with pytest.raises(InputError) as error:
        run_here(*TINY, "--data", damaged_root, "--domains", "object,body", "--out", tmp_path / "run")
    assert words in error.value.message and "\n" not in error.value.message
