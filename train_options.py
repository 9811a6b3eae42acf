"""The options of train.py: what can be said, what it means for each domain, and which contradictions are refused."""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import click

from backbones import BACKBONES, RECIPES, SIZES, resolve_backbone
from data_prep import DOMAINS, InputError, Number
from run_folder import NOT_OPTIONS
from train_ranks import pick_device

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
LOADERS = min(16, max(CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1, 1))  # default number of loader processes
MANY_CLASSES = 10_000  # from so many on a domain's classes are sampled where --sample-classes names no domain
LIMITS = {"scale": (1e-3, 1e6), "margin_additive": (0, 2), "margin_angular": (0, math.pi), "margin_adaptive": (0, 10),
          "label_smoothing": (0, 1), "domain_weight": (0, 1e6), "crop_scale": (0.01, 1), "flip": (0, 1),
          "color": (0, 1), "erase": (0, 1), "mix": (0, 1e12),
          "sample_classes": (1e-6, 1)}  # of options with a value per domain
# The losses that --loss knows by name, as their authors set them: parameter -> (option that it stands for, value).
# What is not named is 0; the scale stays as --scale has it unless s says otherwise.
LOSSES = {
    "softmax": {},  # normalised softmax: no margin
    "cosface": {"m": ("margin_additive", 0.35)},  # arXiv 1801.09414, section 4.1
    "arcface": {"m": ("margin_angular", 0.5)},  # arXiv 1801.07698, section 3.1
    "adaface": {"m": ("margin_additive", 0.4), "h": ("margin_adaptive", 0.333)},  # arXiv 2204.00964, section 4.1
}
MARGINS = ("margin_additive", "margin_angular", "margin_adaptive")


def per_domain(config: dict, key: str) -> list[float]:
    """An option given as one number or as `object=0,face_hq=0.35,...`, as one value per domain of the run."""
    option, text = f"--{key.replace('_', '-')}", str(config[key])
    if "=" not in text:
        text = ",".join(f"{name}={text}" for name in DOMAINS)
    try:
        values = {name.strip(): float(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise InputError(f"{option} {config[key]!r}: want a number or NAME=NUMBER,...") from error
    if unknown := set(values) - set(DOMAINS):
        raise InputError(f"{option}: no domain {sorted(unknown)[0]!r}; the domains are {', '.join(DOMAINS)}")
    if missing := [name for name in config["domains"] if name not in values]:
        raise InputError(f"{option} {config[key]!r}: no value for {missing[0]}")
    low, high = LIMITS[key]
    if wrong := [name for name in config["domains"] if not low <= values[name] <= high]:
        raise InputError(f"{option}: {wrong[0]} is {values[wrong[0]]:g}; want {low:g} to {high:g}")
    return [values[name] for name in config["domains"]]


def class_shares(config: dict, class_counts: list[int]) -> list[float]:
    """Share of each domain's class weights that a step draws (--sample-classes); one number: of domains with many."""
    named = "=" in str(config["sample_classes"])
    return [share if named or count >= MANY_CLASSES else 1.0
            for share, count in zip(per_domain(config, "sample_classes"), class_counts, strict=True)]


def name_losses(config: dict) -> None:
    """Turn --loss into the numbers that it stands for: they are what the run reads, keeps and replays.

    Grammar: one loss for every domain, or several separated by ";": [DOMAIN=]NAME[:PARAMETER=NUMBER,...].
    """
    values = {key: dict(zip(config["domains"], per_domain(config, key), strict=True)) for key in ("scale", *MARGINS)}
    said: dict[str, tuple[str, dict[str, float]]] = {}
    for part in config["loss"].split(";"):
        match = re.fullmatch(r"(?:(\w+)=)?(\w+)(?::(.*))?", part.strip())
        if not match or match[2] not in LOSSES:
            raise InputError(f"--loss {part.strip()!r}: want [DOMAIN=]NAME[:m=NUMBER,s=NUMBER], several separated by "
                             f"';'; the names are {', '.join(LOSSES)}")
        domain, name, known = match[1] or "", match[2], {"s": ("scale", 0.0)} | LOSSES[match[2]]
        if domain not in ("", *DOMAINS):
            raise InputError(f"--loss: no domain {domain!r}; the domains are {', '.join(DOMAINS)}")
        if domain in said:
            raise InputError(f"--loss {config['loss']!r}: {domain or 'every domain'} has two losses: give it one")
        numbers = dict.fromkeys(MARGINS, 0.0) | {option: value for option, value in LOSSES[name].values()}
        for item in filter(None, (match[3] or "").split(",")):
            key, _, text = (word.strip() for word in item.partition("="))
            if key not in known or not re.fullmatch(r"\d*\.?\d+(e-?\d+)?", text):
                raise InputError(f"--loss {part.strip()!r}: {item.strip()!r} is no parameter of {name}; want "
                                 f"{' or '.join(f'{key}=NUMBER' for key in known)}")
            option, (low, high) = known[key][0], LIMITS[known[key][0]]
            if not low <= float(text) <= high:
                raise InputError(f"--loss {part.strip()!r}: {key} is {text}; want {low:g} to {high:g}")
            numbers[option] = float(text)
        said[domain] = numbers
    for domain in config["domains"]:
        for option, value in said.get(domain, said.get("", {})).items():
            values[option][domain] = value
    config |= {key: ",".join(f"{d}={v!r}" for d, v in found.items()) for key, found in values.items()} | {"loss": None}


def describe_losses(config: dict) -> list[str]:
    """The loss of every domain in words, for the start of a run."""
    lines = []
    for s, add, angular, h in zip(*(per_domain(config, key) for key in ("scale", *MARGINS)), strict=True):
        parts = [f"AdaFace m={add:g} h={h:g}" if h else f"CosFace m={add:g}" if add else ""]
        parts += [f"ArcFace m={angular:g}" if angular else ""]
        lines.append(f"{' + '.join(filter(None, parts)) or 'normalised softmax'}, s={s:g}")
    return lines


def check_options(config: dict) -> None:
    """Refuse contradictions before any work; fills what follows from other options (domains, order, out)."""
    config["domains"] = sort_domains(config["domains"], "--domains") if config["domains"] else list(DOMAINS)
    if config["order"]:
        order = config["order"].split(",") if isinstance(config["order"], str) else config["order"]
        if sorted(order) != sorted(config["domains"]):
            raise InputError(f"--order {','.join(order)} must name each of {','.join(config['domains'])} once")
        config["order"] = order
    if config["weights"] not in ("pretrained", "none"):
        config["weights"] = str(Path(config["weights"]).resolve())  # a run is read from other folders too
    if config["images"] and config["epochs"]:
        raise InputError("--images and --epochs both say how long to train: give one of them")
    if config["model"] and config["backbone"]:
        raise InputError("--backbone and --model both name the network: give one of them")
    if not config["model"] and not config["backbone"]:
        raise InputError("which backbone? give --backbone clip|eva02|dinov3 or --model NAME (of timm or open_clip)")
    library = resolve_backbone(config)[0]
    if config["head_init"] == "text" and (library != "open_clip" or config["embed_dim"]):
        raise InputError("--head-init text needs CLIP's text tower and its own width: only CLIP models, no --embed-dim")
    if config["freeze_text_head"] and (config["head_init"] != "text" or "object" not in config["domains"]):
        raise InputError("--freeze-text-head freezes the object classes of --head-init text: give both, with object")
    if (config["mix"] and config["schedule"] != "B") or (config["mix_ramp"] and config["schedule"] != "B"):
        raise InputError("--mix and --mix-ramp set the shares of schedule B; the other schedules deal equally")
    if config["degrade"] and config["cache"] != "none":
        raise InputError("--degrade makes another image each time, --cache keeps the decoded ones: give one of them")
    if config["cache"] == "gpu" and pick_device(config["device"]).type != "cuda":
        raise InputError("--cache gpu needs a CUDA device: take --cache ram")
    if config["coupling"] == "pcgrad" and config["schedule"] != "A":
        raise InputError("--coupling pcgrad goes through the domains one by one: it needs --schedule A")
    if config["shard_head"] and config["negatives"] == "all":
        raise InputError("--shard-head deals out every domain's classes by themselves: not with --negatives all")
    if config["degrade"] and "face_lq" not in config["domains"]:
        raise InputError("--degrade acts on face_lq, which is not among --domains")
    # what the runs of a batch may share is no error where it has nothing to do
    if config["conflict_every"] and (len(config["domains"]) == 1 or config["schedule"] in ("alternate", "sequential")):
        print("  --conflict-every: every step has one domain here: nothing conflicts, so it is off")
        config["conflict_every"] = 0
    if config["head_init"] == "text" and "object" not in config["domains"]:
        print("  --head-init text: no object among the domains; the others start at class means")
        config["head_init"] = "means"
    if config["loss"]:
        name_losses(config)
    for name in LIMITS:
        if config[name] is not None:
            per_domain(config, name)
    check_margins(config)
    if not config["out"]:
        name = config["model"].replace("/", "_") if config["model"] else f"{config['backbone']}-{config['size']}"
        domains = "all" if len(config["domains"]) == len(DOMAINS) else "+".join(config["domains"])
        config["out"] = f"runs/{name}-{config['schedule']}-{domains}-s{config['seed']}"


def check_margins(config: dict) -> None:
    """Refuse margins that contradict each other."""
    margins = dict(zip(config["domains"], zip(*(per_domain(config, key) for key in MARGINS), strict=True), strict=True))
    for domain, (additive, _, h) in margins.items():
        if h and not additive:
            raise InputError(f"--margin-adaptive: {domain} has no additive margin that could adapt: give "
                             f"--margin-additive {domain}=0.4,... or say --loss {domain}=adaface")


def sort_domains(text: str | list[str], option: str) -> list[str]:
    """The named domains in the house order."""
    names = text.split(",") if isinstance(text, str) else text
    for name in names:
        if name not in DOMAINS:
            raise InputError(f"{option}: no domain {name!r}; the domains are {', '.join(DOMAINS)}")
    return [name for name in DOMAINS if name in names]


def refuse_options(context: click.Context) -> None:
    """Options given before a subcommand's name would be parsed and ignored."""
    for parameter in context.command.params:
        if context.get_parameter_source(parameter.name).name == "COMMANDLINE":
            raise InputError(f"{parameter.opts[0]} before {context.invoked_subcommand}: give options after the "
                             f"command's name (see `{context.invoked_subcommand} --help`)")


def settle_options(context: click.Context, config: dict) -> None:
    """Default < recipe < --config < command line; two options that say the same thing are refused."""
    said = {name: context.get_parameter_source(name).name for name in config}
    for name, rival in (("images", "epochs"), ("epochs", "images"), ("backbone", "model"), ("model", "backbone"),
                        ("domains", "order")):
        if said.get(name) == "COMMANDLINE" and said.get(rival) == "DEFAULT_MAP":  # what --config says in another way
            config[rival] = None
    refuse_two_voices(config, said)
    refuse_idle(config, said)
    fill_recipe(config, said)


def fill_recipe(config: dict, said: dict[str, str]) -> None:
    """Fill what nobody gave from RECIPES; what that was is kept under "recipe"."""
    recipe = {}
    if config["backbone"] and config["weights"] != "none":
        names = [config["backbone"], f"{config['backbone']}-{config['size']}", *(["lora"] if config["lora"] else [])]
        for name in names:
            recipe |= RECIPES.get(name, {})
    config["recipe"] = {key: value for key, value in recipe.items() if said[key] == "DEFAULT"}
    config |= config["recipe"]


def refuse_two_voices(config: dict, said: dict[str, str]) -> None:
    """--loss and the options that it stands for: only what a --config said before may be overruled."""
    for name in ("scale", *MARGINS):
        overruled = said[name] == "DEFAULT" or (said[name] == "DEFAULT_MAP" and said["loss"] == "COMMANDLINE")
        if config["loss"] and not overruled and (name != "scale" or re.search(r"\bs\s*=", config["loss"])):
            raise InputError(f"--loss and --{name.replace('_', '-')} both set {name.split('_')[0]}s: say it all in one "
                             "of them")


def refuse_idle(config: dict, said: dict[str, str]) -> None:
    """Options on the command line that would do nothing."""
    for name, idle, why in (
        ("order", config["schedule"] != "sequential", "orders the blocks of --schedule sequential"),
        ("degrade_severity", not config["degrade"], "goes with --degrade"),
        ("degrade_ramp", not config["degrade"], "goes with --degrade"),
        ("splits", not config["eval_every"], "chooses what --eval-every looks at"),
        ("size", bool(config["model"]) and not config["backbone"], "is a size of --backbone"),
        ("head_init_images", config["head_init"] == "random", "counts the images of class means"),
        ("mix_temperature", bool(config["mix"]), "makes the shares that --mix gives"),
    ):
        if idle and said[name] == "COMMANDLINE":
            raise InputError(f"--{name.replace('_', '-')} {why}: leave it out")


def read_config(context: click.Context, _parameter, path: str | None) -> str | None:
    """--config FILE: its options become the defaults, so that the command line still wins."""
    if path is None:
        return None
    try:
        values = json.loads(Path(path).read_bytes())
        if not isinstance(values, dict):
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--config {path}: not a readable JSON file of options; take a run's config.json") from error
    known = {parameter.name for parameter in context.command.params}
    if unknown := set(values) - known - NOT_OPTIONS:
        raise InputError(f"--config {path}: no option {sorted(unknown)[0]!r}")
    for key, value in values.items():
        if isinstance(value, list) and key in known and not all(isinstance(part, str) for part in value):
            raise InputError(f"--config {path}: {key} is {value}: want text as on the command line")
    joined = {key: ",".join(value) if isinstance(value, list) and key in known else value
              for key, value in values.items()}
    context.default_map = {key: joined[key] for key in known & set(joined) - {"out", "resume", "config"}}
    return path


PEOPLE = "object=0,face_hq={0},face_lq={0},body={0}".format
OPTIONS = [
    click.option("--config", is_eager=True, callback=read_config, metavar="FILE",
                 help="Replay a run's config.json; options given here win over it."),
    click.option("--backbone", type=click.Choice(list(BACKBONES)),
                 help="Foundation model family; where weights are loaded, its recipe fills what is not given."),
    click.option("--size", type=click.Choice(SIZES), default="large",
                 help="Size within the family."),
    click.option("--model", metavar="NAME",
                 help="Any timm or open_clip model instead of --backbone; open_clip: NAME or NAME/TAG."),
    click.option("--weights", default="pretrained", metavar="WHICH",
                 help="'pretrained' (downloads), 'none' (random start) or a safetensors/pt FILE; FILE:NAME takes one "
                      "of its sets of weights."),
    click.option("--image-size", type=click.IntRange(16, 4096),
                 help="Input side in pixels (default: 224, DINOv3 256, --model: its own)."),
    click.option("--embed-dim", type=click.IntRange(0, 65536), default=0,
                 help="Width of one linear layer after the backbone; 0: none."),
    click.option("--data", default="data", metavar="DIR", help="Data root: DIR/<domain>/train holds the shards."),
    click.option("--out", metavar="DIR",
                 help="Run folder (default: runs/{backbone}-{size}-{schedule}-{domains}-s{seed})."),
    click.option("--resume", is_flag=True,
                 help="Continue the run in --out; starts afresh where there is nothing to continue."),
    click.option("--schedule", type=click.Choice(["A", "B", "alternate", "sequential"]), default="B",
                 help="A: one domain a batch, a step after each round. B: every batch blended."),
    click.option("--domains", metavar="NAMES",
                 help="Comma-separated subset of object,face_hq,face_lq,body (default: all)."),
    click.option("--order", metavar="NAMES",
                 help="Order of the blocks of --schedule sequential (default: the order above)."),
    click.option("--batch", type=click.IntRange(1, 2**36), default=256, help="Images per optimiser step."),
    click.option("--micro-batch", type=click.IntRange(1),
                 help="At most so many images per forward pass (default: the batch)."),
    click.option("--images", type=click.IntRange(1, 2**60), help="Length of the run in images, all domains together."),
    click.option("--epochs", type=Number(0, min_open=True),
                 help="Length as passes over the largest domain (default: 10)."),
    click.option("--mix", metavar="SHARES", help="Shares of schedule B, e.g. object=1,face_hq=2,face_lq=1,body=1."),
    click.option("--mix-temperature", type=Number(0, 1), default=0.5,
                 help="Shares of schedule B ∝ (images)^T; 0: equal, 1: proportional."),
    click.option("--mix-ramp", metavar="RAMP",
                 help="Let a share move, e.g. 'object:1.0->0.25@0.3' over the first 0.3 of training."),
    click.option("--coupling", type=click.Choice(["domain", "sample", "pcgrad"]), default="domain",
                 help="What a step averages over first: each domain, or all samples; pcgrad: each domain, its gradient "
                      "freed of what points against another's (schedule A, a backward pass per domain)."),
    click.option("--conflict-every", type=click.IntRange(0), default=0,
                 help="Steps between looks at how the domains' gradients conflict (conflict.png); 0: never."),
    click.option("--domain-weight", default="1", metavar="NUMBERS",
                 help="Weight of a domain in the loss: one number or NAME=NUMBER,..."),
    click.option("--negatives", type=click.Choice(["own", "all"]), default="own",
                 help="Softmax over the domain's own classes or over every class."),
    click.option("--sample-classes", default="1", metavar="NUMBERS",
                 help="Partial FC: share of the class weights that a step draws, those of its samples among them; one "
                      f"number: of domains with {MANY_CLASSES:,} classes or more; 1: all."),
    click.option("--loss", metavar="LOSSES",
                 help="arcface, cosface, adaface or softmax, per domain: 'face_hq=arcface:m=0.5,s=64;body=cosface'."),
    click.option("--scale", default="object=30,face_hq=64,face_lq=64,body=64", metavar="NUMBERS",
                 help="Scale s of the logits, per domain."),
    click.option("--margin-additive", default=PEOPLE(0.35), metavar="NUMBERS",
                 help="CosFace margin m on the cosine, per domain."),
    click.option("--margin-angular", default="0", metavar="NUMBERS", help="ArcFace margin in radians, per domain."),
    click.option("--margin-adaptive", default="0", metavar="NUMBERS",
                 help="AdaFace: how much a longer embedding hardens its additive margin (its h), per domain; 0: not."),
    click.option("--margin-gradient", type=click.Choice(["exact", "straight-through"]), default="exact",
                 help="Gradient of the target's logit: exact, or 1 as arcface_torch trains."),
    click.option("--label-smoothing", default="0", metavar="NUMBERS", help="Label smoothing 0..1, per domain."),
    click.option("--margin-ramp", type=Number(0, 1), default=0.1,
                 help="Margins grow from 0 over this fraction of training; 0: off."),
    click.option("--degrade", is_flag=True,
                 help="Degrade face_lq/train online: for sets of sharp crops, not for natively low-quality ones."),
    click.option("--degrade-severity", type=Number(0, 1), default=1.0, help="Largest severity of --degrade."),
    click.option("--degrade-ramp", type=Number(0, 1), default=0.3,
                 help="Severity grows from 0 over this fraction of training; 0: off."),
    click.option("--crop-scale", default="object=0.35,face_hq=0.8,face_lq=0.8,body=0.8", metavar="NUMBERS",
                 help="Least area of the random crop, per domain; 1: none."),
    click.option("--flip", default="0.5", metavar="NUMBERS", help="Chance of a mirror image, per domain."),
    click.option("--color", default="0", metavar="NUMBERS",
                 help="Largest change of brightness, contrast and saturation, 0..1, per domain."),
    click.option("--erase", default="0", metavar="NUMBERS",
                 help="Chance of erasing a patch, per domain; re-identification takes body=0.5."),
    click.option("--head-init", type=click.Choice(["means", "text", "random"]), default="means",
                 help="Class weights start at class means, prompt embeddings (objects) or at random."),
    click.option("--head-init-images", type=click.IntRange(1), default=20,
                 help="At most so many images per class for the means."),
    click.option("--freeze-text-head", is_flag=True, help="Keep the object rows of --head-init text as they are."),
    click.option("--head-warmup", type=Number(0, 1), default=0.02,
                 help="Fraction of the steps that train the class weights alone, first."),
    click.option("--lr", type=Number(0), default=2e-5,
                 help="Peak learning rate of the top layer of the backbone."),
    click.option("--head-lr", type=Number(0, infinite=True), default=1e-3,
                 help="Peak learning rate of the class weights."),
    click.option("--layer-decay", type=Number(0, 1), default=0.8,
                 help="Factor on the learning rate per layer downwards; 1: none."),
    click.option("--freeze-blocks", type=click.IntRange(0), default=0,
                 help="Lowest blocks that stay as they are, with all below them."),
    click.option("--lora", type=click.IntRange(0, 4096), default=0, metavar="RANK",
                 help="Train low-rank updates of the attention's projections instead of the network; 0: off."),
    click.option("--drop-path", type=Number(0, 1, max_open=True), default=0.0,
                 help="Stochastic depth: chance of dropping the top block's branches, falling to 0 at the lowest."),
    click.option("--weight-decay", type=Number(0), default=0.05,
                 help="AdamW weight decay of the backbone's matrices."),
    click.option("--warmup", type=Number(0, 1), default=0.05,
                 help="Fraction of the steps over which the learning rate rises."),
    click.option("--min-lr", type=Number(0, 1), default=0.01,
                 help="Last learning rate as a fraction of the peak."),
    click.option("--clip", type=Number(0), default=1.0,
                 help="Gradient norm above which a step is scaled down; 0: never."),
    click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto",
                 help="bf16 autocast of the backbone; auto: where CUDA has it."),
    click.option("--seed", type=click.IntRange(0, 2**62 - 1), default=0,
                 help="Seed of the start, the data order and every draw."),
    click.option("--shuffle-window", type=click.IntRange(1), default=8,
                 help="Shards among which the order of an epoch is shuffled."),
    click.option("--workers", type=click.IntRange(0, 1024), default=LOADERS, help="Loader processes."),
    click.option("--device", default="auto", help="auto, cpu or cuda; under torchrun each process takes its own GPU."),
    click.option("--cache", type=click.Choice(["none", "ram", "gpu"]), default="none",
                 help="Decode every image once, at the start, and keep it there."),
    click.option("--compile", is_flag=True,
                 help="torch.compile the backbone: minutes at the start, then faster steps."),
    click.option("--grad-checkpointing", is_flag=True, help="Recompute activations in backward: less memory, slower."),
    click.option("--shard-head", is_flag=True,
                 help="torchrun: every process holds a slice of each domain's class weights."),
    click.option("--ema", type=Number(0, 1, max_open=True), default=0.0, metavar="DECAY",
                 help="Export the running average of the weights, e.g. 0.9998; 0: off."),
    click.option("--log-every", type=click.IntRange(1), default=10, help="Steps between lines of log.jsonl."),
    click.option("--eval-every", type=click.IntRange(0), default=0,
                 help="Steps between same/different AUCs of 2,000 fixed images per domain; 0: never."),
    click.option("--splits", metavar="NAMES",
                 help="Comma-separated domain/split for --eval-every (default: a domain's first test split and one of "
                      "objects out of distribution)."),
    click.option("--save-every", type=click.IntRange(1), default=500, help="Steps between checkpoints."),
    click.option("--keep", type=click.IntRange(0), default=0,
                 help="Checkpoints of the weights that stay in RUN/checkpoints, one per --eval-every (else "
                      "--save-every): the newest, and besides the best by --eval-every; 0: none."),
    click.option("--max-skipped", type=click.IntRange(0), default=10,
                 help="Non-finite steps in a row that stop the run."),
    click.option("--max-bad", type=Number(0, 1), default=0.001,
                 help="Share of damaged images above which the run stops."),
    click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an input error."),
]


def run_options(command: Callable) -> Callable:
    """Gives a command every option of a run, in this order."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command
