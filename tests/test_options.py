"""The options of a run: notations, --config and config.json, help, and that none is ignored."""

import ast
import importlib
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import analyze
import evaluate
import train
from data_prep import (
    DOMAIN_LIST,
    DOMAINS,
    MIX_RAMP,
    SEVERITY,
    InputError,
    MixRamp,
    as_texts,
    join_config,
    per_domain,
)
from data_prep.__main__ import cli
from models.backbones import Network
from models.head import LOSS_TYPE, LOSSES, RANGES, parse_losses, show_loss
from models.runs import load_run, load_tuned
from tests.conftest import ROOT, TINY, script
from tests.test_coupling import options_of
from tests.test_train import run_here

# ---------------------------------------------------------------- notations


@pytest.mark.parametrize("kind, text, value", [
    (DOMAIN_LIST, "body, object", ["body", "object"]),
    (SEVERITY, "1", (1, 0.3)), (SEVERITY, ".5@0", (0.5, 0)), (SEVERITY, "0.25@1e-3", (0.25, 0.001)),
    (MIX_RAMP, "object:1->.25", MixRamp("object", 1, 0.25, 0.3)),
    (MIX_RAMP, "face_lq:0->1e-05@1", MixRamp("face_lq", 0, 1e-5, 1)),
    (per_domain(0, 1), "0.5", dict.fromkeys(DOMAINS, 0.5)),
    (per_domain(0, 1), "body=1, object=0", {"body": 1, "object": 0}),
    (per_domain(0, 9, spread=False), "3", 3), (per_domain(0, 9, spread=False), "body=3", {"body": 3}),
])  # fmt: skip
def test_a_notation_is_its_value_and_back(kind, text, value):
    assert kind.convert(text, None, None) == value
    assert kind.convert(kind.show(value), None, None) == value


@given(st.data())
def test_every_loss_is_written_as_it_is_read(data):
    """To the last digit, also where a margin of 0 turns it into another loss by name."""
    name = data.draw(st.sampled_from(list(LOSSES)))
    known = {key: field for key, (field, _) in LOSSES[name].items()} | {"s": "scale", "e": "smoothing", "w": "weight"}
    given_ = {key: data.draw(st.floats(*RANGES[field])) for key, field in known.items() if data.draw(st.booleans())}
    if name == "adaface" and given_.get("m") == 0:
        given_["h"] = 0.0
    text = f"face_lq={name}:" + ",".join(f"{key}={abs(value)!r}" for key, value in given_.items())
    losses = parse_losses(text)
    assert parse_losses(f"face_lq={show_loss(losses['face_lq'])}") == losses
    assert LOSS_TYPE.parse(LOSS_TYPE.show(losses)) == losses
    for key, value in given_.items():
        assert getattr(losses["face_lq"], known[key]) == value


NOTATIONS = [
    [],
    ["--loss", "object=softmax:s=1e6,e=0.123456789,w=0.3;combined:m2=0.1,m3=0.30000000000000004"],
    ["--loss", "adaface:m=0.25,h=0.5;body=arcface:w=1e-3"],
    ["--domains", "body,face_lq,object", "--schedule", "sequential"],
    ["--mix", "0"], ["--mix", "object=1,face_hq=0.1,face_lq=0,body=1e12"],
    ["--mix-ramp", "object:1.0->0.25@0.3"], ["--mix-ramp", "face_hq:0->0.00001@1"],
    ["--degrade"], ["--degrade", "0.5"], ["--degrade", "0.00001@0"],
    ["--crop-scale", "0.123456789", "--erase", "object=0,face_hq=0,face_lq=0,body=0.5"],
    ["--sample-classes", "0.1"], ["--sample-classes", "object=0.1,face_hq=1,face_lq=1,body=1"],
    ["--epochs", "0.1", "--micro-batch", "3", "--ema", "0.9998", "--compile", "--shard-head", "--seed", str(2**62 - 1)],
]  # fmt: skip


@pytest.mark.parametrize("arguments", NOTATIONS, ids=[" ".join(a)[:40] or "none" for a in NOTATIONS])
def test_config_json_says_what_the_command_line_said(arguments, tmp_path):
    tiny = TINY if "--epochs" not in arguments else [word for word in TINY if word not in ("--images", "64")]

    def parse(*words: str) -> train.Options:
        context = train.main.make_context("train.py", [*words, "--out", "run"])
        return train.settle_options(context, dict(context.params))[0]

    options = parse(*tiny, *arguments)
    texts = as_texts(options)
    (tmp_path / "config.json").write_text(json.dumps({"options": texts, "facts": {}}))
    again = parse("--config", str(tmp_path / "config.json"))
    assert again == options and as_texts(again) == texts
    assert all(value is None or isinstance(value, str | int | float) for value in texts.values())


def test_degrade_takes_a_value_or_none(demo_root, tmp_path):
    """Severity 0.8 after half of the run, of a step's four batches alike; without a value 1@0.3."""
    assert options_of(demo_root, tmp_path / "run", "--degrade", "--cache", "none").degrade == (1.0, 0.3)
    options = options_of(demo_root, tmp_path / "run", "--degrade", "0.8@0.5", "--schedule", "A")
    stream = train.make_feed(train.set_up(options, {})).stream
    assert stream.severity.tolist() == pytest.approx([0] * 4 + [0.4] * 4 + [0.8] * 8)


def test_the_order_of_domains_is_that_of_a_sequential_run_alone(demo_root, tmp_path):
    options = options_of(demo_root, tmp_path / "run", "--domains", "body,object", "--schedule", "sequential")
    assert options.trained == ["object", "body"] and options.domains == ["body", "object"]
    job = train.set_up(options, {})
    assert job.plan[:, 0].tolist() == [[0, 16], [0, 16], [16, 0], [16, 0]]
    assert [split.domain for split in job.splits] == ["object", "body"]


@pytest.mark.parametrize("arguments, out", [
    ([], "clip-tiny-B-all-s0"), (["--domains", "body,object", "--seed", "3"], "clip-tiny-B-object+body-s3"),
    (["--schedule", "A"], "clip-tiny-A-all-s0"),
])  # fmt: skip
def test_the_run_folder_is_named_after_the_run(arguments, out):
    context = train.main.make_context("train.py", [*TINY, *arguments])
    assert train.settle_options(context, dict(context.params))[0].out == f"runs/{out}"


def test_prompts_without_objects_are_class_means(demo_root, tmp_path, capsys):
    options = options_of(demo_root, tmp_path / "run", "--domains", "body", "--head-init", "text")
    assert options.head_init == "means" and "start at class means" in capsys.readouterr().out


# ---------------------------------------------------------------- --config


@pytest.mark.parametrize("text, words", [
    ("{", "not a readable JSON file of options"), ("[]", "not a readable JSON file"), ('{"lr": 1}', "of this version"),
    ('{"options": 5}', "not a readable JSON file"), ('{"options": {"scale": "30"}}', "no option 'scale'"),
    ('{"options": {"micro_batch": [1, 2]}}', "micro_batch is [1, 2]: want text"),
    ('{"options": {"loss": {"body": "arcface"}}}', "want text as on the command line"),
    ('{"options": {"mix": [1]}}', "mix is [1]: want text"),
    ('{"options": {"domains": ["body"]}}', "domains is ['body']: want text"),
    ('{"options": {"weight_decay": NaN}}', "not a finite number"), ("[" * 100_000, "not a readable JSON file"),
    ('{"options": {"seed": 1e400}}', "'inf' is not a valid integer"), ('{"options": {"keep": 1.7}}', "not a valid int"),
])  # fmt: skip
def test_a_bad_config_is_one_line(text, words, demo_root, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(click.ClickException) as error:
        run_here(*TINY, "--config", tmp_path / "config.json", "--data", demo_root, "--out", tmp_path / "run")
    message = error.value.format_message()
    assert words in message and "\n" not in message and not (tmp_path / "run").exists()


def test_what_config_says_in_another_way_gives_way(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"options": {"backbone": "eva02", "images": 64, "epochs": None}}))
    context = train.main.make_context("train.py", ["--config", str(tmp_path / "config.json"), "--model", "test_vit",
                                                   "--epochs", "2", "--weights", "none"])
    options = train.settle_options(context, dict(context.params))[0]
    assert (options.model, options.backbone, options.epochs, options.images) == ("test_vit", None, 2.0, None)


# ---------------------------------------------------------------- runs of a former version


def flat_config(config: dict) -> dict:
    """config.json as it was when options and facts lay side by side and domains were lists."""
    options, facts = config["options"], config["facts"]
    gone = {"order": ["body", "face_lq", "face_hq", "object"], "scale": "object=30,face_hq=64,face_lq=64,body=64",
            "margin_additive": "object=0,face_hq=0.35,face_lq=0.35,body=0.35", "margin_angular": "0", "loss": None,
            "mix": None, "mix_temperature": 0.5, "degrade": False, "flip": "0.5", "color": "0", "clip": 1.0,
            "erase": "0", "min_lr": 0.01, "freeze_text_head": False, "config": None}
    return options | gone | facts | {"domains": list(DOMAINS), "schedule": "sequential"}


@pytest.fixture
def former_run(tiny_run, tmp_path) -> Path:
    run = tmp_path / "former"
    run.mkdir()
    for name in ("model.safetensors", "head.safetensors", "done.json"):
        (run / name).symlink_to(tiny_run / name)
    config = flat_config(json.loads((tiny_run / "config.json").read_text()))
    (run / "config.json").write_text(json.dumps(config, indent=2))
    return run


def test_a_run_of_a_former_version_is_read(former_run, tiny_run):
    run, same = load_run(former_run), load_run(tiny_run)
    assert run.config["domains"] == list(DOMAINS) and run.config["order"] == ["body", "face_lq", "face_hq", "object"]
    assert Network.of(run.config) == Network.of(same.config) == Network("clip", "tiny", weights="none", image_size=32)
    assert run.config["schedule"] == "sequential" and run.config["scale"].startswith("object=30")
    assert {key: run.config[key] for key in ("counts", "steps", "role", "shards")} == \
        {key: same.config[key] for key in ("counts", "steps", "role", "shards")}
    assert run.class_ranges == same.class_ranges and torch.equal(run.head, same.head)
    assert "counts" not in run.options and run.options["lr"] == 1e-3
    one, other = (load_tuned(r).state_dict() for r in (run, same))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_former_run_without_an_order(former_run):
    config = json.loads((former_run / "config.json").read_text()) | {"order": None, "domains": ["object", "body"]}
    (former_run / "config.json").write_text(json.dumps(config))
    found = join_config(former_run / "config.json")
    assert found["domains"] == found["order"] == ["object", "body"]


def test_a_run_of_a_former_version_is_not_continued_or_replayed_but_exported(former_run, demo_root, tmp_path):
    before = (former_run / "config.json").read_text()
    with pytest.raises(InputError, match=r"former: trained by an earlier version \(commit .*another --out"):
        run_here(*TINY, "--data", demo_root, "--out", former_run, "--resume")
    with pytest.raises(InputError, match=r"take the config.json of a run of this version"):
        run_here("--config", former_run / "config.json", "--out", tmp_path / "run")
    assert (former_run / "config.json").read_text() == before and not (tmp_path / "run").exists()
    run_here("export", "--run", former_run, "--to", "safetensors", "--out", tmp_path / "x.safetensors")
    ours, theirs = load_file(tmp_path / "x.safetensors"), load_file(former_run / "model.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    card = (tmp_path / "x.safetensors.md").read_text()
    assert "| lr | 0.001 |" in card and "| scale | object=30" in card and "| counts |" not in card


# ---------------------------------------------------------------- help, and what is read


def test_help_shows_few_options_in_groups():
    text = script("train.py", "--help").stdout
    sections = text.split("\n\n")
    groups = {block.split(":")[0]: [line.split()[0] for line in block.splitlines() if line.startswith("  --")]
              for block in sections if ":\n  --" in block}
    assert list(groups) == ["Other", "Data", "Model", "Schedule", "Loss", "Optimiser", "Machine", "Logging"]
    assert sum(map(len, groups.values())) - len(["--help"]) <= 52 and groups["Other"] == ["--config", "--help"]
    for field in fields(train.Options):
        assert f"--{field.name.replace('_', '-')}" in groups[field.metadata["group"].capitalize()]
        about = field.metadata["help"]
        assert len(about) > 10 and about.endswith(".") and "  " not in about, field.name


class Reader(ast.NodeVisitor):
    """What a file reads by name: attributes of `options`, keys of subscripts, strings in tuples and dictionaries, and
    the arguments that functions use. The declarations of options (calls of click.option) do not count."""

    def __init__(self) -> None:
        self.found: set[str] = set()  # anything that may be a read
        self.attributes: set[str] = set()  # `options.NAME` and `options["NAME"]`, `per_domain("NAME")`

    def visit_Call(self, node):
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("option", "argument"):
            return
        if isinstance(node.func, ast.Attribute) and node.func.attr == "per_domain":
            self.attributes |= {a.value for a in node.args if isinstance(a, ast.Constant)}
        self.generic_visit(node)

    def visit_Attribute(self, node):
        base = node.value
        if "options" in (getattr(base, "id", ""), getattr(base, "attr", "")) and isinstance(node.ctx, ast.Load):
            self.attributes.add(node.attr)
        self.generic_visit(node)

    def visit_Subscript(self, node):
        self.add(node.slice)
        if getattr(node.value, "id", "") == "options" and isinstance(node.slice, ast.Constant):
            self.attributes.add(node.slice.value)
        self.generic_visit(node)

    def visit_Tuple(self, node):
        for item in node.elts:
            self.add(item)
        self.generic_visit(node)

    visit_List = visit_Tuple

    def visit_Dict(self, node):
        for key in node.keys:
            self.add(key)
        self.generic_visit(node)

    def visit_FunctionDef(self, node):
        own = {a.arg for a in [*node.args.args, *node.args.kwonlyargs]}
        self.found |= {n.id for part in node.body for n in ast.walk(part)
                       if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and n.id in own}
        self.generic_visit(node)

    def add(self, node):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            self.found.add(node.value)


def read_by(*patterns: str) -> Reader:
    reader = Reader()
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            reader.visit(ast.parse(path.read_text()))
    return reader


def test_every_option_of_a_run_is_read():
    """An option that is parsed and ignored is a defect. Of the network's, `Network` takes those of its names."""
    names = {field.name for field in fields(train.Options)}
    network = {field.name for field in fields(Network)}
    assert network <= names
    assert names - network <= read_by("train.py", "models/runs.py").attributes


@pytest.mark.parametrize("module, patterns", [
    ("train", ["train.py", "tools/*.py", "models/*.py"]),
    ("evaluate", ["evaluate.py", "tools/*.py", "protocols/*.py", "reports/*.py"]),
    ("analyze", ["analyze.py", "tools/*.py", "protocols/*.py", "reports/*.py"]),
    ("data_prep.__main__", ["data_prep/**/*.py", "tools/*.py"]),
])  # fmt: skip
def test_every_option_has_help_and_is_read(module, patterns):
    main = importlib.import_module(module)
    main, reader = getattr(main, "main", None) or main.cli, read_by(*patterns)
    for name, command in [("", main), *getattr(main, "commands", {}).items()]:
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name}: {parameter.opts[0]} has no help"
            read = parameter.name in reader.found | reader.attributes or not parameter.expose_value
            assert read or parameter.name == "debug", f"{name}: {parameter.name} is never read"


# ---------------------------------------------------------------- a plain run is plain


LOADED = """
import sys, train
assert train.main.main(sys.argv[1:], standalone_mode=False) == 0
print([name for name in sys.modules if name.split(".")[0] in ("tools", "evaluate", "analyze", "protocols")])
"""


@pytest.mark.parametrize("more, expected", [
    ([], "[]"), (["--conflict-every", "1"], "['tools', 'tools.conflicts']"),
    (["--ema", "0.9", "--sample-classes", "object=0.5,body=0.5", "--eval-every", "1", "--loss", "adaface"], "[]"),
])  # fmt: skip
def test_a_plain_run_never_touches_a_tool(more, expected, demo_root, tmp_path):
    arguments = [*TINY, "--images", "16", "--domains", "object,body", "--data", demo_root, "--out", tmp_path / "run"]
    result = subprocess.run([sys.executable, "-c", LOADED, *map(str, arguments), *more], cwd=ROOT, text=True,
                            capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == expected


@pytest.mark.parametrize("program, arguments", [
    ("evaluate.py", ["--run", "x", "--workers", "1000000"]), ("evaluate.py", ["--run", "x", "--bootstrap", "10000000"]),
    ("evaluate.py", ["--run", "x", "--crowd", "10000000"]), ("analyze.py", ["--run", "x", "--workers", "1000000"]),
    ("evaluate.py", ["--model", "x", "--image-size", "65536"]),
    ("data_prep", ["folder", "--src", "x", "--out", "y/object/z", "--workers", "1000000"]),
])  # fmt: skip
def test_absurd_numbers_are_refused_before_anything_starts(program, arguments):
    commands = {"evaluate.py": evaluate.main, "analyze.py": analyze.main, "data_prep": cli}
    with pytest.raises(click.UsageError, match=rf"{arguments[-1]} is not in the range"):
        commands[program].main(arguments, standalone_mode=False)
