"""A run: its processes and its folder with options, weights and checkpoints. What lies where: docs/training.md.

Copy with it: models/backbones.py and what it needs.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from data_prep import DOMAINS, InputError
from data_prep.format import Split
from models.backbones import Backbone, Network, fill_weights, library_state, load_backbone

RUN_ROLES = ("unified", "expert", "sequential")  # of a run, for `analyze.py claims`
LOGS = ("log.jsonl", "probe.jsonl", "conflict.jsonl")  # of a run, one record a line, each with its step
STOPPED = 75  # exit code of a run that was stopped with a checkpoint (EX_TEMPFAIL: a scheduler may requeue it)
FREE_ON_RESUME = {"workers", "device", "cache", "compile", "grad_checkpointing", "shard_head", "log_every",
                  "save_every", "keep", "resume", "data", "out", "splits"}


# ---------------------------------------------------------------- processes


def pick_device(name: str) -> torch.device:
    """The device of --device: `auto` takes CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name}: want auto, cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu")
    device = torch.device(name)
    if (device.index or 0) >= max(torch.cuda.device_count(), 1):
        raise InputError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here, counted from 0")
    return device


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started for the run; alone it is rank 0 of 1."""

    rank: int = 0
    world: int = 1
    control: object = None  # gloo group, for what the CPUs tell each other while the GPUs work

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place; what lies in the memory of the CPUs is summed there."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor, group=self.control if tensor.device.type == "cpu" else None)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; every rank has to ask."""
        if self.world == 1:
            return flag
        told = torch.tensor(int(flag))
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, group=self.control)
        return bool(told)

    def wait(self) -> None:
        """Go on when every rank is here."""
        self.any(False)


def join_ranks(device_name: str) -> tuple[Ranks, torch.device]:
    """The ranks of torchrun's environment, a process group where there are several, and the device of this one."""
    world, device = int(os.environ.get("WORLD_SIZE", 1)), pick_device(device_name)
    if world == 1:
        return Ranks(), device
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise InputError(f"WORLD_SIZE is {world} and {missing[0]} is not set: start several processes by torchrun, or "
                         "unset WORLD_SIZE")
    if device.type == "cuda":
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ranks = Ranks(torch.distributed.get_rank(), world, torch.distributed.new_group(backend="gloo"))
    if ranks.rank:  # one voice
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return ranks, device


# ---------------------------------------------------------------- files


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name, sync it, rename it: the old one stays whole until the new one is."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors would keep its files from everybody else
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:  # torch and safetensors report a full disk in ways of their own, or not at all
        free = shutil.disk_usage(path.parent).free >> 20 if path.parent.is_dir() else 0
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error}; {free:,} MiB free there); what was saved before is "
                         "intact") from error


def make_folder(path: Path, option: str) -> None:
    """Make a folder for results, where it is not there; InputError names the option that asked for it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option}: {path} cannot be made a folder ({error.strerror}): choose another, or move "
                         "away what is there") from error


def write_json(path: Path, value: dict) -> None:
    """Write JSON for people: indented, atomic."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def read_json(path: Path) -> dict:
    """An object that write_json wrote; InputError where the file is damaged."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}): restore it, or run the stage that wrote it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: damaged (no JSON object): restore it, or run the stage that wrote it again")
    return value


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file of a run; InputError where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # safetensors raises a kind of its own
        raise InputError(f"{path}: damaged ({error}): restore it, or continue the run with --resume") from error


def append(path: Path, record: dict) -> None:
    """Add a line to a .jsonl file of the run; NaN has no place in JSON and becomes null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    try:
        with open(path, "a") as file:
            file.write(json.dumps(plain(record)) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}); the last checkpoint is intact: make room, then "
                         "continue with --resume") from error


def read_lines(path: Path) -> list[dict]:
    """The records of a .jsonl file of a run; none where it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass
class Facts:
    """What a run derived from its options and its data: beside the options in config.json."""

    role: str  # one of RUN_ROLES, for `analyze.py claims`
    steps: int
    counts: dict[str, int]  # domain -> images that the run draws
    recipe: dict[str, float]  # options that RECIPES filled
    git_commit: str | None
    argv: list[str]
    versions: dict[str, str]
    shards: dict[str, str]  # domain -> plan of its training split
    sources: dict[str, dict]  # domain -> where its images come from


def gather_facts(splits: list[Split], schedule: str, steps: int, counts: dict[str, int],
                 recipe: dict[str, float]) -> Facts:
    """The facts of a run that starts now: also versions and commit of the code, and which shards."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    packages = ("torch", "torchvision", "timm", "open_clip_torch", "numpy")
    return Facts("expert" if len(splits) == 1 else "sequential" if schedule == "sequential" else "unified", steps,
                 counts, recipe, commit or None, sys.argv[1:],
                 {"python": platform.python_version()} | {name: version(name) for name in packages},
                 {split.domain: split.index["provenance"]["plan"] for split in splits}, describe_sources(splits))


def describe_sources(splits: list[Split]) -> dict[str, dict]:
    """Where the images of each domain come from and how they became square: the shards may be gone one day."""
    return {split.domain: {"source": split.index["provenance"]["source"], "images": len(split),
                           "classes": len(split.classes), "size": split.size,
                           **{key: split.index.get(key) for key in ("fit", "quality")}} for split in splits}


def write_config(folder: Path, options: dict, facts: Facts) -> None:
    """Write config.json: the options as on the command line, and what the run derived."""
    write_json(folder / "config.json", {"options": options, "facts": asdict(facts)})


FACTS = {field.name for field in fields(Facts)}


def read_config(path: Path) -> tuple[dict, dict]:
    """Options, as on the command line, and facts of a config.json; also of the flat form of former versions."""
    config = read_json(path)
    if isinstance(config.get("options"), dict) and isinstance(config.get("facts"), dict):
        return config["options"], config["facts"]
    options = {key: ",".join(value) if isinstance(value, list) else value for key, value in config.items()
               if key not in FACTS}
    options["domains"] = options.pop("order", None) or options.get("domains")
    return options, {key: value for key, value in config.items() if key in FACTS}


def describe_config(path: Path) -> dict:
    """Options and facts of a config.json in one, with the domains in the house order and, as "order", in their own."""
    options, facts = read_config(path)
    order = options["domains"].split(",") if isinstance(options.get("domains"), str) else list(DOMAINS)
    return options | facts | {"order": order, "domains": [name for name in DOMAINS if name in order]}


def find_run(folder: Path, options: dict, splits: list[Split]) -> str:
    """What the output folder holds: "nothing", "unfinished" or "complete"; InputError where it may not be continued.

    Args:
        options: of this start, as in config.json.
    """
    if not (folder / "config.json").exists():
        return "nothing"
    if not options["resume"]:
        raise InputError(f"{folder} already holds a run: continue it with --resume, or choose another --out")
    old, facts = read_config(folder / "config.json")
    for key, value in options.items():
        if key not in FREE_ON_RESUME and old.get(key) != value:
            raise InputError(f"--resume {folder}: --{key.replace('_', '-')} was {old.get(key)!r} and is now {value!r}; "
                             "give what the run was started with (see its config.json)")
    for split in splits:
        if facts["shards"][split.domain] != split.index["provenance"]["plan"]:
            raise InputError(f"--resume {folder}: {split.folder} is not the split that the run was started with")
    return "complete" if (folder / "done.json").exists() else "unfinished"


# ---------------------------------------------------------------- weights


def save_weights(folder: Path, model: Backbone, head: torch.Tensor, classes: dict[str, list[str]]) -> None:
    """Write model.safetensors (the library's own keys) and head.safetensors (class names in its metadata)."""
    net = library_state(model.net)
    write_atomically(folder / "model.safetensors", lambda path: save_file(net, path))
    tensors = {"weight": head.detach().contiguous()}
    if model.project is not None:
        tensors["project"] = model.project.weight.detach().contiguous()
    metadata = {"classes": json.dumps(classes)}
    write_atomically(folder / "head.safetensors", lambda path: save_file(tensors, path, metadata=metadata))


@dataclass
class Run:
    """A finished run, as later stages read it."""

    folder: Path
    options: dict  # as on the command line
    config: dict  # options and facts, "domains" in the house order and "order" as a list
    head: torch.Tensor  # float32 [C, D]
    classes: dict[str, list[str]]  # per trained domain
    class_ranges: dict[str, tuple[int, int]]  # rows of the head


def load_run(folder: Path, allow_partial: bool = False) -> Run:
    """Read a run folder.

    Raises:
        InputError: no run there, or (unless allow_partial) one that has not finished.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no run: it has no config.json; train one with `python train.py --out {folder}`")
    whole = (folder / "done.json").is_file() or folder.resolve().parent.name == "checkpoints"  # of --keep
    if not whole and not allow_partial:
        raise InputError(f"{folder} has not finished (no done.json): continue it with --resume or pass --allow-partial")
    options, _ = read_config(folder / "config.json")
    config = describe_config(folder / "config.json")
    if missing := {"backbone", "model", "size", "image_size", "embed_dim", "seed", "domains", "data",
                   "counts", "steps", "shards", "versions", "git_commit"} - set(config):
        raise InputError(f"{folder}/config.json lacks {min(missing)!r}: restore it, or train the run again")
    if not (folder / "head.safetensors").is_file():
        raise InputError(f"{folder} holds no weights yet (no head.safetensors): continue it with `train.py --resume`")
    tensors, metadata = read_tensors(folder / "head.safetensors")
    head, classes = tensors["weight"], json.loads(metadata["classes"])
    ends = np.cumsum([len(names) for names in classes.values()])
    ranges = {d: (int(end) - len(classes[d]), int(end)) for d, end in zip(classes, ends, strict=True)}
    return Run(folder, options, config, head, classes, ranges)


def load_tuned(run: Run) -> Backbone:
    """The fine-tuned backbone of a run, in eval mode."""
    model, path = load_backbone(Network.of(run.config, weights="none")), run.folder / "model.safetensors"
    fill_weights(model.net, model.library, read_tensors(path)[0], path)
    if model.project is not None:
        model.project.weight.data.copy_(read_tensors(run.folder / "head.safetensors")[0]["project"])
    return model.eval()


def load_foundation(run: Run) -> Backbone:
    """The untouched backbone that a run started from (without the run's own linear layer), in eval mode."""
    return load_backbone(Network.of(run.config, embed_dim=0)).eval()


# ---------------------------------------------------------------- checkpoints


def kept_steps(run: Path) -> dict[int, Path]:
    """The checkpoints that --keep left in a run, by step."""
    found = ((folder.name.removeprefix("step-"), folder) for folder in (run / "checkpoints").glob("step-*"))
    return dict(sorted((int(step), folder) for step, folder in found if step.isdigit()))


def keep_checkpoint(run: Path, step: int, counts: dict[str, int], keep: int, export: Callable[[Path], None],
                    ranks: Ranks) -> None:
    """--keep: RUN/checkpoints/step-NNNNNNNN, a run folder of its own. What is too old goes when it is complete.

    The newest ones stay, and the best by the mean AUC of --eval-every, to which the link `best` leads.

    Args:
        counts: images of each domain that were drawn until then.
        export: writes the weights into a folder; every rank calls it.
    """
    folder = run / "checkpoints" / f"step-{step:08d}"
    scratch = folder.with_suffix(".tmp")
    if ranks.rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    try:
        export(scratch)
        if ranks.rank == 0:
            config = read_json(run / "config.json")
            config["facts"] |= {"steps": step, "counts": counts}
            write_json(scratch / "config.json", config)
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before it could write its state
            os.replace(scratch, folder)
            drop_checkpoints(run, keep)
    finally:
        if ranks.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
    ranks.wait()


def drop_checkpoints(run: Path, keep: int) -> None:
    """Leave the newest `keep` checkpoints of a run and the best one, and point `best` at that."""
    steps, link = kept_steps(run), run / "checkpoints" / "best"
    scores = {look["step"]: np.mean([*look["auc"].values()]) for look in read_lines(run / "probe.jsonl") if look["auc"]}
    best = max((step for step in steps if step in scores), key=scores.get, default=None)
    if best is not None:
        (fresh := link.with_suffix(".tmp")).unlink(missing_ok=True)
        fresh.symlink_to(steps[best].name)
        os.replace(fresh, link)
    for step in [step for step in list(steps)[:-keep] if step != best]:
        shutil.rmtree(steps[step])


def forget_after(folder: Path, step: int) -> None:
    """Cut what a run left about steps after `step`, where it goes on: they come again."""
    for log in (folder / name for name in LOGS if (folder / name).exists()):
        kept = []
        for line in log.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line that was cut
                kept += [line] if json.loads(line)["step"] <= step else []
        write_atomically(log, lambda path, kept=kept: path.write_text("".join(f"{line}\n" for line in kept)))
    for late in [place for number, place in kept_steps(folder).items() if number > step]:
        shutil.rmtree(late)


class StopRequest:
    """Set by SIGTERM, SIGINT or a file RUN/STOP: the run ends after the current step. A second signal exits at once."""

    def __init__(self, folder: Path, ranks: Ranks = Ranks()) -> None:
        self.file, self.reason = folder / "STOP" if ranks.rank == 0 else None, ""  # one looks and tells the others
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number: int, _frame) -> None:
        if self.reason:
            os._exit(128 + number)
        self.reason = signal.Signals(number).name

    def __bool__(self) -> bool:
        if not self.reason and self.file and self.file.exists():
            self.reason = "file STOP"
        return bool(self.reason)
