"""What of the backbone is trained, augmentations, and the recipes."""

import json
from dataclasses import replace

import click
import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

import tools.bench_train
import train
from data_prep import InputError
from data_prep.format import open_root
from data_prep.stream import Look, Stream, erase_patches, make_images
from models.adapt import add_drop_path, add_low_rank
from models.backbones import BACKBONES, RECIPES, Backbone, Network, library_state, load_backbone
from models.head import Loss
from models.runs import load_foundation, load_run, load_tuned
from tests.conftest import TINY
from tests.test_interrupted_training import stop_at
from tests.test_train import assert_same_weights, run_here

# ---------------------------------------------------------------- what of the backbone is trained


FAMILIES = {
    "clip": Network(None, model="tiny-test-clip", weights="none", image_size=32),
    "eva02": Network("eva02", "tiny", weights="none", image_size=28),
    "dinov3": Network("dinov3", "tiny", weights="none", image_size=32),
    "convolutional": Network("clip", "tiny", weights="none", image_size=32),
}


@pytest.fixture(scope="module", autouse=True)
def small_clip(tmp_path_factory):
    """A transformer of open_clip's, which keeps query, key and value in one parameter of nn.MultiheadAttention."""
    path = tmp_path_factory.mktemp("configs") / "tiny-test-clip.json"
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 3}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    path.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)


def backbone(family: str, lora: int = 0, drop_path: float = 0.0) -> Backbone:
    model = load_backbone(FAMILIES[family])
    if drop_path:
        add_drop_path(model, drop_path)
    if lora:
        add_low_rank(model, lora)
    return model


def trained(model: Backbone) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family, matrices", [("clip", 3), ("eva02", 12), ("dinov3", 12)])
def test_lora_starts_at_the_foundation_and_is_merged_at_export(family, matrices):
    model, before = backbone(family, lora=4), load_backbone(FAMILIES[family])
    images = torch.randn(2, 3, *[model.image_size] * 2)
    assert torch.equal(model.eval()(images), before.eval()(images))
    factors = [p for p in model.parameters() if p.requires_grad]
    assert len(factors) == 2 * matrices and all(4 in p.shape for p in factors)
    model.train()(images).square().sum().backward()  # forward in training mode too
    assert all(p.grad is not None for p in factors)
    for p in factors:
        p.data.normal_(std=0.05)
    state = library_state(model.net)
    changed = [key for key, value in before.net.state_dict().items() if not torch.equal(value, state[key])]
    assert len(changed) == matrices
    down, up = (next(p for n, p in model.named_parameters() if n.endswith(part) and p.requires_grad)
                for part in ("down", "up"))
    torch.testing.assert_close(state[changed[0]], before.net.state_dict()[changed[0]] + 16 / 4**0.5 * up @ down)
    before.net.load_state_dict(state, strict=True)
    torch.testing.assert_close(model.eval()(images), before.eval()(images))
    assert set(model.layers()) == trained(model) and len(set(model.layers().values())) >= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_drop_path_acts_in_training_alone_and_grows_upwards(family):
    from timm.layers import DropPath

    model, plain = backbone(family, drop_path=0.4), load_backbone(FAMILIES[family])
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.4) and rates == sorted(rates)
    images = torch.randn(1, 3, *[model.image_size] * 2).expand(8, -1, -1, -1)
    for net in (model, plain):
        for name, p in net.named_parameters():  # layer scales start near 0 and would hide the branches
            if "gamma" in name:
                p.data.fill_(1.0)
    assert torch.equal(model.eval()(images), plain.eval()(images))
    assert model.state_dict().keys() == plain.state_dict().keys()
    x = model.train()(images)
    assert not torch.allclose(x[0], x[1:], rtol=1e-3)  # each sample by itself


@pytest.mark.parametrize("family, lora", [("clip", 0), ("clip", 2), ("eva02", 0), ("dinov3", 0)])
def test_attention_is_fused_and_patches_are_read_channels_last(family, lora):
    """torch's scaled_dot_product_attention, which picks the fast kernel of the device, in every family."""
    model = backbone(family, lora=lora).to(memory_format=torch.channels_last).train()
    images = torch.zeros(1, 3, *[model.image_size] * 2).contiguous(memory_format=torch.channels_last)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as seen:
        model(images)
    names = {event.key for event in seen.key_averages()}
    assert "aten::scaled_dot_product_attention" in names and "aten::softmax" not in names
    patches = next(p for p in model.parameters() if p.ndim == 4 and p.shape[1] == 3)
    assert patches.is_contiguous(memory_format=torch.channels_last)


def test_a_network_without_branches_to_drop_is_refused():
    model = load_backbone(Network(None, model="resnet18", weights="none", image_size=32))
    with pytest.raises(InputError, match=r"--drop-path 0.1: this network has no residual branches to drop: leave it"):
        add_drop_path(model, 0.1)


def test_drop_path_keeps_the_mean():
    model = backbone("clip", drop_path=0.5)
    ends = model.net.visual.transformer.resblocks[-1].train()
    x = ends.ls_2(torch.ones(4000, 3, 2))
    assert set(x.unique().tolist()) == {0.0, 2.0} and float(x.mean()) == pytest.approx(1, abs=0.1)
    assert torch.equal(x.amin((1, 2)), x.amax((1, 2)))  # whole samples, not tokens


def test_a_run_with_all_of_it_resumes_and_exports_plain_weights(demo_root, tmp_path):
    common = ["--model", "tiny-test-clip", "--weights", "none", "--image-size", 32, "--workers", 0, "--batch", 8,
              "--images", 64, "--lora", 2, "--drop-path", 0.3, "--ema", 0.9, "--lr", 1e-2,
              "--head-warmup", 0, "--domains", "object,body", "--data", demo_root, "--save-every", 4, "--device", "cpu"]
    run_here(*common, "--out", tmp_path / "whole")
    assert stop_at(tmp_path / "run", common, 4)["step"] == 4
    run_here(*common, "--out", tmp_path / "run", "--resume")
    assert_same_weights(tmp_path / "whole", tmp_path / "run")
    run = load_run(tmp_path / "run")
    before, after = load_foundation(run).net.state_dict(), load_tuned(run).net.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {f"visual.transformer.resblocks.{n}.attn.in_proj_weight" for n in (0, 1, 2)}


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_wise_ft_is_the_line_between_the_foundation_and_the_run(alpha, from_file, tmp_path):
    out = tmp_path / "model.safetensors"
    run_here("export", "--run", from_file, "--to", "safetensors", "--out", out, "--wise-ft", alpha)
    run, mixed = load_run(from_file), load_file(out)
    before, after = load_foundation(run).net.state_dict(), load_tuned(run).net.state_dict()
    for key in before:
        if before[key].is_floating_point():
            torch.testing.assert_close(mixed[key], (1 - alpha) * before[key] + alpha * after[key])
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert ("interpolated ones were not evaluated" in (tmp_path / "model.safetensors.md").read_text()) == (alpha < 1)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """Weights of CLIP in miniature: a foundation, of which a run can be fine-tuned."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(load_backbone(replace(FAMILIES["convolutional"], seed=5)).net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def from_file(weights_file, demo_root, tmp_path_factory):
    run = tmp_path_factory.mktemp("from-file") / "run"
    run_here(*TINY, "--weights", weights_file, "--data", demo_root, "--head-warmup", 0, "--out", run)
    return run


def test_there_is_nothing_to_mix_a_random_start_with(tiny_run, tmp_path):
    with pytest.raises(InputError, match="started from random weights: leave --wise-ft out"):
        run_here("export", "--run", tiny_run, "--to", "safetensors", "--wise-ft", 0.5, "--out",
                 tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


# ---------------------------------------------------------------- augmentations


def stream_of(root, domains=("object", "body"), **options) -> Stream:
    splits = [open_root(root)[domain]["train"] for domain in domains]
    plan = np.full((120, len(domains)), 8)  # several epochs
    return Stream(splits, plan, **{"seed": 3, "crop": [0.5] * len(domains)} | options)


def test_patches_are_drawn_per_domain_and_leave_the_other_draws_alone(demo_root):
    plain, stream = stream_of(demo_root), stream_of(demo_root, erase=[0.5, 0.0])
    chunks = [stream[c] for c in range(40)]
    domain, flip, erase = (torch.cat([getattr(c, name) for c in chunks]) for name in ("domain", "flip", "erase"))
    assert (erase[domain == 1] == 0).all() and float(flip.float().mean()) == pytest.approx(0.5, abs=0.06)
    x0, y0, x1, y1 = erase[domain == 0].unbind(1)
    drawn = x1 > x0
    assert float(drawn.float().mean()) == pytest.approx(0.5, abs=0.08)
    area = ((x1 - x0) * (y1 - y0))[drawn]
    assert area.min() > 0.02 - 1e-6 and 0.28 < area.max() < 0.33 + 1e-6
    assert min(x0.min(), y0.min()) >= 0 and max(x1.max(), y1.max()) <= 1 + 1e-6
    for one, other in zip(chunks, (plain[c] for c in range(40)), strict=True):
        assert torch.equal(one.boxes, other.boxes) and torch.equal(one.banks[1], other.banks[1])
        assert torch.equal(one.flip, other.flip) and other.erase is None


def test_augmentations_are_keyed_by_sample_and_epoch(demo_root):
    """Neither the number of ranks nor micro-batches nor the schedule changes what a sample gets in an epoch."""
    options = {"erase": [1.0, 1.0]}
    whole = stream_of(demo_root, **options)
    for c in (0, 7):
        parts = [stream_of(demo_root, rank=r, world=2, micro_batch=4, **options) for r in range(2)]
        for r, part in enumerate(parts):
            got = [part[c * part.per_batch + i] for i in range(part.per_batch)]
            for name in ("boxes", "erase", "flip", "label"):
                assert torch.equal(torch.cat([getattr(g, name) for g in got]), getattr(whole[c], name)[r::2])
    alone = stream_of(demo_root, domains=("body",), erase=[1.0])
    assert torch.equal(alone[0].erase, whole[0].erase[whole[0].domain == 1])
    order = whole.orders[1]
    epoch, row = order(np.arange(order.size + 8))
    assert epoch.tolist() == [0] * order.size + [1] * 8
    again = next(n for n in range(order.size, order.size + 8) if n // 8 < 120)
    before, after = int(np.flatnonzero(row == row[again])[0]), again  # the same image, an epoch later
    draws = [whole[n // 8].erase[whole[n // 8].domain == 1][n % 8] for n in (before, after)]
    assert not torch.equal(*draws)


def test_a_patch_is_erased_where_it_was_drawn():
    images = torch.arange(1.0, 17).view(1, 1, 4, 4).expand(2, 3, 4, 4)
    out = erase_patches(images, torch.tensor([[0.25, 0.5, 0.75, 1.0], [0, 0, 0, 0]]))
    expected = images.clone()
    expected[0, :, 2:, 1:3] = 0  # rows from half of the height on, the two columns in the middle
    assert torch.equal(out, expected)


def test_a_batch_is_augmented_after_the_gather_and_untouched_domains_keep_their_bits(demo_root):
    look = Look(32, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    plain, stream = stream_of(demo_root), stream_of(demo_root, erase=[0.0, 1.0])
    a, b = (make_images(s[0], look, torch.device("cpu")) for s in (plain, stream))
    chunk = stream[0]
    own = chunk.domain == 0
    assert torch.equal(a[own], b[own])
    assert torch.equal(b, erase_patches(a, chunk.erase)) and not torch.equal(a[~own], b[~own])


AUGMENTED = ["--crop-scale", "object=0.2,face_hq=1,face_lq=0.8,body=0.5",
             "--erase", "object=0,face_hq=0,face_lq=0,body=0.5"]


def test_a_cache_and_loader_processes_change_nothing(demo_root, tmp_path):
    common = [*TINY, *AUGMENTED, "--data", demo_root]
    run_here(*common, "--out", tmp_path / "run")
    run_here(*common, "--out", tmp_path / "cached", "--cache", "ram")
    run_here(*common, "--out", tmp_path / "workers", "--workers", 2)
    run_here(*TINY, "--data", demo_root, "--out", tmp_path / "plain")
    assert_same_weights(tmp_path / "run", tmp_path / "cached")
    assert_same_weights(tmp_path / "run", tmp_path / "workers")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "run", tmp_path / "plain")


# ---------------------------------------------------------------- recipes


def merged(monkeypatch, *arguments) -> tuple[dict, dict]:
    """The options that a command line ends in, and what of them is the recipe's."""
    found = []
    monkeypatch.setattr(train, "set_up", lambda options, recipe: found.extend((vars(options), recipe)))
    run_here(*arguments)
    return tuple(found)


def test_a_recipe_fills_only_what_nobody_gave(monkeypatch, tmp_path):
    options, recipe = merged(monkeypatch, "--backbone", "eva02")
    assert {key: options[key] for key in RECIPES["eva02"]} == RECIPES["eva02"] == recipe
    options, recipe = merged(monkeypatch, "--backbone", "eva02", "--lr", 2e-5, "--drop-path", 0)  # said, if the same
    assert options["lr"] == 2e-5 and options["drop_path"] == 0 and options["layer_decay"] == 0.85
    assert set(recipe) == {"layer_decay", "weight_decay", "warmup"}
    (tmp_path / "config.json").write_text(json.dumps({"options": {"backbone": "eva02", "layer_decay": 0.7,
                                                                  "lr": 3e-4}}))
    options, _ = merged(monkeypatch, "--config", tmp_path / "config.json", "--lr", 1e-4)
    assert (options["lr"], options["layer_decay"], options["drop_path"]) == (1e-4, 0.7, 0.15)  # line, file, recipe


@pytest.mark.parametrize("arguments, expected", [
    (["--backbone", "clip"], {"lr": 2e-5, "layer_decay": 0.8, "drop_path": 0.0}),
    (["--backbone", "dinov3"], {"lr": 1e-5, "layer_decay": 0.8, "drop_path": 0.1, "warmup": 0.05}),
    (["--backbone", "eva02", "--size", "base"], {"lr": 5e-5, "layer_decay": 0.8, "drop_path": 0.15, "warmup": 0.1}),
    (["--backbone", "eva02", "--lora", 16], {"lr": 1e-4, "layer_decay": 1.0, "drop_path": 0.0, "warmup": 0.1}),
    (["--backbone", "eva02", "--weights", "none"], {"lr": 2e-5, "layer_decay": 0.8, "drop_path": 0.0, "warmup": 0.05}),
    (["--model", "test_vit"], {"lr": 2e-5, "layer_decay": 0.8, "drop_path": 0.0, "warmup": 0.05}),
])  # fmt: skip
def test_what_each_backbone_gets(arguments, expected, monkeypatch):
    options, _ = merged(monkeypatch, *arguments)
    assert {key: options[key] for key in expected} == expected


def test_bench_times_the_step_of_training(monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr(tools.bench_train, "bench_run", lambda _, options, *more: found.append(options))
    run_here("bench", "--backbone", "eva02", "--lr", 1e-4)
    assert found[0].drop_path == 0.15 and found[0].lr == 1e-4
    texts = {"backbone": "eva02", "lr": 3e-4, "images": 64, "out": "run", "loss": "arcface"}
    (tmp_path / "config.json").write_text(json.dumps({"options": texts}))
    run_here("bench", "--config", tmp_path / "config.json", "--batch", 32)
    assert found[1].lr == 3e-4 and found[1].batch == 32 and found[1].loss["body"] == Loss(64.0, angular=0.5)
    with pytest.raises(click.ClickException, match="No such option"):
        run_here("bench", "--backbone", "eva02", "--images", "64")


def test_recipes_name_options_and_backbones():
    options = {parameter.name: parameter for parameter in train.main.params}
    for name, recipe in RECIPES.items():
        assert name == "lora" or name.partition("-")[0] in BACKBONES
        for key, value in recipe.items():
            assert options[key].type.convert(value, None, None) == value  # within the option's range


def test_the_recipe_is_printed_saved_and_replayed(from_file, weights_file, demo_root, tmp_path, capsys):
    common = ["--backbone", "clip", "--size", "tiny", "--weights", weights_file, "--image-size", 32, "--workers", 0,
              "--batch", 16, "--images", 32, "--device", "cpu", "--data", demo_root, "--weight-decay", 0.01]
    run_here(*common, "--out", tmp_path / "run")
    assert "recipe of clip: lr=2e-05, layer_decay=0.8, drop_path=0\n" in capsys.readouterr().out
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["options"]["lr"] == 2e-5 and config["options"]["weight_decay"] == 0.01
    assert config["facts"]["recipe"] == {"lr": 2e-5, "layer_decay": 0.8, "drop_path": 0.0}
    run_here("--config", tmp_path / "run/config.json", "--out", tmp_path / "again")
    assert "recipe of" not in capsys.readouterr().out  # everything was given
    assert_same_weights(tmp_path / "run", tmp_path / "again")
    run_here(*common, "--lr", 2e-5, "--out", tmp_path / "run", "--resume")  # what the recipe said, said: the same run
    assert "is complete" in capsys.readouterr().out
    assert load_run(from_file).options["lr"] == 1e-3  # the command line of that run


# ---------------------------------------------------------------- bad input


BAD = [
    (["--loss", "sphereface"], "no loss 'sphereface'; the losses are softmax, cosface, arcface, adaface, combined"),
    (["--loss", "face=arcface"], "no domain 'face'; the domains are object"),
    (["--loss", "arcface:h=1"], "'h=1' is not a parameter of arcface; want m=NUMBER, s=NUMBER, e=NUMBER, w=NUMBER"),
    (["--loss", "combined:m=1"], "'m=1' is not a parameter of combined; want m2=NUMBER, m3=NUMBER"),
    (["--loss", "arcface:m"], "'m' is not a parameter of arcface"),
    (["--loss", "cosface:m=x"], "'m=x' is not a parameter of cosface"),
    (["--loss", "cosface:m=nan"], "'m=nan' is not a parameter of cosface"),
    (["--loss", "cosface:m=5"], "m is 5; want 0 to 2"),
    (["--loss", "combined:m2=4"], "m2 is 4; want 0 to 3.14"),
    (["--loss", "softmax:s=0"], "s is 0; want 0.001 to 1e+06"),
    (["--loss", "softmax:e=2"], "e is 2; want 0 to 1"),
    (["--loss", "softmax:w=-1"], "'w=-1' is not a parameter of softmax"),
    (["--loss", "body=arcface;body=cosface"], "body has two losses"),
    (["--loss", "arcface;cosface"], "every domain has two losses"),
    (["--loss", "body=arcface;"], "no loss ''"),
    (["--loss", "adaface:m=0"], "adaface with m=0 has no margin to adapt"),
    (["--lora", "4"], "this network has no attention projections"),
    (["--crop-scale", "-1"], "'-1': -1; want 0.01 to 1"),
    (["--crop-scale", "object=0.1"], "--crop-scale: no value for face_hq"),
    (["--crop-scale", "object=0.1,object=1"], "names a domain twice"),
    (["--erase", "often"], "'often': want a number or NAME=NUMBER"),
    (["--erase", "body=0.5=1"], "want a number or NAME=NUMBER"),
    (["--erase", "cars=0.5"], "no domain 'cars'"),
    (["--erase", "object=0,face_hq=0,face_lq=0,body=2"], "body is 2; want 0 to 1"),
    (["--drop-path", "1"], "1.0 is not in the range"),
    (["--mix", "nan"], "'nan': nan; want 0 to 1e+12"),
    (["--mix", "2"], "--mix: one number is a temperature: want 0 to 1"),
    (["--mix", "object=1"], "--mix: no value for face_hq"),
    (["--degrade", "2"], "want SEVERITY[@FRACTION], both in 0..1"),
    (["--degrade", "1@"], "want SEVERITY[@FRACTION], both in 0..1"),
    (["--degrade", "nan"], "want SEVERITY[@FRACTION], both in 0..1"),
    (["--mix-ramp", "object:1->0.5@"], "want DOMAIN:FIRST->LAST[@FRACTION]"),
    (["--mix-ramp", "cars:1->0.5"], "no domain 'cars'"),
    (["--mix-ramp", "object:2->0.5"], "shares in 0..1"),
    (["--domains", "object,object"], "names a domain twice"),
    (["--domains", "body", "--mix-ramp", "object:1->0.5"], "--mix-ramp: object is not among --domains"),
    (["--model", "test_vit", "--size", "base"], "--backbone and --model both name the network"),
]


@pytest.mark.parametrize("arguments, words", BAD, ids=[words[:40] for _, words in BAD])
def test_bad_input_is_refused_in_one_line(arguments, words, demo_root, tmp_path):
    with pytest.raises(click.ClickException) as error:
        run_here(*TINY, *arguments, "--data", demo_root, "--out", tmp_path / "run")
    assert error.value.exit_code == 2
    assert words in error.value.format_message() and "\n" not in error.value.format_message()
    assert not (tmp_path / "run").exists()  # refused before any work
