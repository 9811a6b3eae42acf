"""A run: its processes and its folder with options, weights and checkpoints. What lies where: docs/training.md.

Copy with it: models/backbones.py and what it needs.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from data_prep import (
    DOMAINS,
    FREE_ON_RESUME,
    InputError,
    hash_file,
    join_config,
    read_json,
    read_lines,
    read_parts,
    weights_of,
    write_atomically,
    write_json,
)
from data_prep.format import Split, fits
from models.backbones import Backbone, Network, fill_weights, library_state, load_backbone

LOGS = ("log.jsonl", "probe.jsonl", "conflict.jsonl")  # of a run, one record a line, each with its step
STOPPED = 75  # exit code of a run that was stopped with a checkpoint (EX_TEMPFAIL: a scheduler may requeue it)


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
    draws: object = None  # another, for the thread that draws classes a step ahead

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


def watch_parent(parent: int, patience: float = 120.0) -> None:
    """End a rank whose torchrun was killed, which can no longer end it: by SIGTERM, so that a run saves first."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(patience)  # in a collective that others have left, nobody would come to handle the signal
    os._exit(128 + signal.SIGTERM)


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
    threading.Thread(target=watch_parent, args=(os.getppid(),), daemon=True).start()
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ranks = Ranks(torch.distributed.get_rank(), world, *(torch.distributed.new_group(backend="gloo") for _ in range(2)))
    if ranks.rank:  # one voice
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return ranks, device


# ---------------------------------------------------------------- files


def digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of tensors on the CPU, with their names, types and shapes, and of the metadata beside them."""
    about = {key: [str(value.dtype), list(value.shape)] for key, value in sorted(tensors.items())}
    whole = hashlib.sha256(json.dumps([about, metadata], sort_keys=True).encode())
    for key in about:
        whole.update(tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    """Write a safetensors file with the digest of its contents in its metadata: `read_tensors` compares it."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    metadata = metadata | {"sha256": digest(tensors, metadata)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file of a run; InputError where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except Exception as error:  # safetensors raises a kind of its own
        raise damaged(path, str(error)) from error
    if (expected := metadata.pop("sha256", None)) and digest(tensors, metadata) != expected:
        raise damaged(path, "its contents are not what was written: their SHA-256 differs")
    if wrong := [key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise damaged(path, f"{wrong[0]} holds numbers that are not finite")
    return tensors, metadata


def damaged(path: Path, what: str) -> InputError:
    """The error about a file of a run that a stage cannot use."""
    return InputError(f"{path}: damaged ({what}): restore it, or continue the run with --resume")


# ---------------------------------------------------------------- config.json


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
    weights_sha256: str | None  # of the file of weights that it started from


def gather_facts(splits: list[Split], schedule: str, steps: int, counts: dict[str, int], recipe: dict[str, float],
                 weights: str) -> Facts:
    """The facts of a run that starts now, with versions and commit of the code, shards, and the hash of the weights."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    packages = ("torch", "torchvision", "timm", "open_clip_torch", "numpy")
    return Facts("expert" if len(splits) == 1 else "sequential" if schedule == "sequential" else "unified", steps,
                 counts, recipe, commit or None, sys.argv[1:],
                 {"python": platform.python_version()} | {name: version(name) for name in packages},
                 {split.domain: split.index["provenance"]["plan"] for split in splits}, describe_sources(splits),
                 hash_file(Path(weights.rpartition(":")[0])) or hash_file(Path(weights)))


def describe_sources(splits: list[Split]) -> dict[str, dict]:
    """Where the images of each domain come from and how they became square: the shards may be gone one day."""
    return {split.domain: {"source": split.index["provenance"]["source"], "images": len(split),
                           "classes": len(split.classes), "size": split.size,
                           **{key: split.index.get(key) for key in ("fit", "quality")}} for split in splits}


def write_config(folder: Path, options: dict, facts: Facts) -> None:
    """Write config.json: the options as on the command line, and what the run derived."""
    write_json(folder / "config.json", {"options": options, "facts": asdict(facts)})


# what stages read of a config.json: a type, several of which one has to fit, or a list of such things
CONFIG = {
    "backbone": (str, None), "model": (str, None), "size": str, "weights": str, "image_size": (int, None),
    "embed_dim": int, "seed": int, "domains": [str], "data": str, "schedule": str, "counts": {}, "steps": int,
    "shards": {}, "versions": {}, "git_commit": (str, None),
}


def read_config(folder: Path) -> dict:
    """`join_config` of a run; InputError where what stages read of it is missing or of another kind."""
    path = folder / "config.json"
    config = join_config(path)
    if missing := CONFIG.keys() - config.keys():
        raise InputError(f"{path} lacks {min(missing)!r}: restore it, or train the run again")
    for key, kinds in CONFIG.items():
        value = config[key]
        if not any(value is None if kind is None else fits(value, kind)
                   for kind in (kinds if isinstance(kinds, tuple) else (kinds,))):
            raise InputError(f"{path}: {key} is {str(value)[:60]!r}: restore it, or train the run again")
    if sorted(set(config["order"])) != sorted(config["order"]) or not set(config["order"]) <= set(DOMAINS):
        raise InputError(f"{path}: domains is {str(config['order'])[:60]}: restore it, or train the run again")
    if not all(fits(config["counts"].get(name), int) and isinstance(config["shards"].get(name), str)
               for name in config["domains"]):
        raise InputError(f"{path}: counts and shards do not name every domain: restore it, or train the run again")
    return config


def find_run(folder: Path, options: dict, splits: list[Split]) -> str:
    """What the output folder holds: "nothing", "unfinished" or "complete"; InputError where it may not be continued.

    Args:
        options: of this start, as in config.json.
    """
    if not (folder / "config.json").exists():
        return "nothing"
    if not options["resume"]:
        raise InputError(f"{folder} already holds a run: continue it with --resume, or choose another --out")
    if "options" not in (config := read_json(folder / "config.json")):
        raise InputError(f"--resume {folder}: it was trained by a former version (commit {config.get('git_commit')}): "
                         "continue it there, or start anew in another --out; it can be evaluated as it is")
    config = read_config(folder)
    old = read_parts(folder / "config.json")[0]
    for key, value in options.items():
        moved = key == "weights" and weights_of(config) == weights_of({"weights": value})  # the file may lie elsewhere
        if key not in FREE_ON_RESUME and old.get(key) != value and not moved:
            raise InputError(f"--resume {folder}: --{key.replace('_', '-')} was {old.get(key)!r} and is now {value!r}; "
                             "give what the run was started with (see its config.json)")
    for split in splits:
        if config["shards"].get(split.domain) != split.index["provenance"]["plan"]:
            raise InputError(f"--resume {folder}: {split.folder} is not the split that the run was started with")
    return "complete" if (folder / "done.json").exists() else "unfinished"


# ---------------------------------------------------------------- weights


def save_weights(folder: Path, model: Backbone, head: torch.Tensor, classes: dict[str, list[str]]) -> None:
    """Write model.safetensors (the library's own keys) and head.safetensors (class names in its metadata)."""
    write_tensors(folder / "model.safetensors", library_state(model.net))
    tensors = {"weight": head} | ({} if model.project is None else {"project": model.project.weight})
    write_tensors(folder / "head.safetensors", tensors, classes=json.dumps(classes))


@dataclass
class Run:
    """A finished run, as later stages read it."""

    folder: Path
    config: dict  # options and facts, see `read_config`
    head: torch.Tensor  # float32 [C, D]
    classes: dict[str, list[str]]  # per trained domain
    class_ranges: dict[str, tuple[int, int]]  # rows of the head

    @property
    def options(self) -> dict:
        """The options of the run, as on the command line."""
        return read_parts(self.folder / "config.json")[0]


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
    config = read_config(folder)
    if not (path := folder / "head.safetensors").is_file():
        raise InputError(f"{folder} holds no weights yet (no head.safetensors): continue it with `train.py --resume`")
    tensors, metadata = read_tensors(path)
    head = tensors.get("weight")
    try:
        classes = json.loads(metadata["classes"])
    except (KeyError, ValueError, RecursionError) as error:
        raise damaged(path, "no class names") from error
    if not isinstance(classes, dict) or list(classes) != config["domains"] or not all(
            fits(names, [str]) for names in classes.values()):
        raise damaged(path, "its class names are no list for each domain")
    ends = np.cumsum([len(names) for names in classes.values()])
    if head is None or not head.is_floating_point() or head.ndim != 2 or len(head) != ends[-1]:
        form = "none" if head is None else f"{head.dtype} {list(head.shape)}"
        raise damaged(path, f"its class weights are {form}, want float [{ends[-1]}, width], one row a class")
    ranges = {d: (int(end) - len(classes[d]), int(end)) for d, end in zip(classes, ends, strict=True)}
    return Run(folder, config, head.float(), classes, ranges)


def load_tuned(run: Run) -> Backbone:
    """The fine-tuned backbone of a run, in eval mode."""
    model, path = load_backbone(Network.of(run.config, weights="none")), run.folder / "model.safetensors"
    fill_weights(model.net, model.library, read_tensors(path)[0], path)
    if run.head.shape[1] != model.dim:
        raise damaged(run.folder / "head.safetensors", f"class weights of width {run.head.shape[1]}, not {model.dim}")
    if model.project is not None:
        project = read_tensors(run.folder / "head.safetensors")[0].get("project")
        if project is None or project.shape != model.project.weight.shape:
            raise damaged(run.folder / "head.safetensors", "no linear layer of the width --embed-dim")
        model.project.weight.data.copy_(project)
    return model.eval()


def load_foundation(run: Run) -> Backbone:
    """The untouched backbone that a run started from (without the run's own linear layer), in eval mode."""
    path, told = Path(str(run.config.get("weights"))), run.config.get("weights_sha256")
    if told and hash_file(path) not in (None, told):
        raise InputError(f"{path}: not the file that {run.folder} started from (its SHA-256 differs): restore that, or "
                         "leave the untouched backbone out with --no-foundation")
    return load_backbone(Network.of(run.config, embed_dim=0)).eval()


# ---------------------------------------------------------------- checkpoints


def misfit(state: object, steps: int, model: dict[str, torch.Tensor], shapes: list[torch.Size], averaged: bool,
           statistics: torch.Tensor | None) -> str:
    """What in a state file does not fit the run, "" where all does: an optimiser would read beyond a short moment.

    `shapes`: of the trained parameters, the whole class weights last; `averaged`: the run keeps running averages.
    """
    keys = ("step", "model", "head", "optimizer", "tally", "health", "ema", "norms")
    if not isinstance(state, dict) or (missing := [key for key in keys if key not in state]):
        return f"lacks {missing[0]}" if isinstance(state, dict) else "no dictionary"

    def tensor(value: object, shape: torch.Size, kind: torch.dtype = torch.float32) -> bool:
        return isinstance(value, torch.Tensor) and value.shape == shape and value.dtype == kind

    def tensors(values: object, like: dict[str, torch.Tensor]) -> bool:
        return isinstance(values, dict) and values.keys() == like.keys() and all(
            tensor(values[key], value.shape, value.dtype) for key, value in like.items())

    moments = state["optimizer"].get("state") if isinstance(state["optimizer"], dict) else None
    sound = {
        "step": type(state["step"]) is int and 0 <= state["step"] <= steps,
        "model": tensors(state["model"], model),
        "head": tensor(state["head"], shapes[-1]),
        "optimizer": isinstance(moments, dict) and all(
            i in range(len(shapes)) and isinstance(own, dict) and own.keys() == {"step", "exp_avg", "exp_avg_sq"}
            and tensor(own["step"], torch.Size()) and tensor(own["exp_avg"], shapes[i])
            and tensor(own["exp_avg_sq"], shapes[i]) for i, own in moments.items()),
        "tally": isinstance(state["tally"], dict) and state["tally"].keys() >= {"skipped", "bad", "seconds"}
        and all(isinstance(state["tally"][key], int | float) for key in ("skipped", "bad", "seconds")),
        "health": tensor(state["health"], torch.Size([2]), torch.int64),
        "ema": not averaged or (isinstance(state["ema"], list) and len(state["ema"]) == len(shapes)
                                   and all(map(tensor, state["ema"], shapes))),
        "norms": statistics is None or tensor(state["norms"], statistics.shape, torch.float64),
    }
    return next((f"{key} is not what this run saves" for key, good in sound.items() if not good), "")


def read_state(path: Path, checksum: bool, mapped: bool, check: Callable[[object], str]) -> dict:
    """The state of a checkpoint; InputError where it is damaged.

    `checksum`: compare those of the archive, past which PyTorch reads; `mapped`: leave tensors in the file until they
    are read; `check` says what in it does not fit the run.
    """
    try:
        if checksum:
            with zipfile.ZipFile(path) as file:
                if bad := file.testzip():
                    raise ValueError(f"the checksum of {bad} differs")
        state = torch.load(path, "cpu", weights_only=True, mmap=mapped)
        wrong = check(state)
    except Exception as error:  # a damaged zip, a foreign pickle
        wrong = str(error).splitlines()[0][:120] if isinstance(error, ValueError) else type(error).__name__
    if wrong:
        raise InputError(f"{path}: damaged ({wrong}): restore it, or start anew in another --out")
    return state


def kept_steps(run: Path) -> dict[int, Path]:
    """The checkpoints that --keep left in a run, by step."""
    found = ((folder.name.removeprefix("step-"), folder) for folder in (run / "checkpoints").glob("step-*")
             if folder.is_dir() and not folder.is_symlink())
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
        for line in log.read_bytes().splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # a line that was cut
                kept += [line] if json.loads(line)["step"] <= step else []
        write_atomically(log, lambda path, kept=kept: path.write_bytes(b"".join(line + b"\n" for line in kept)))
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
            for process in multiprocessing.active_children():  # nobody would read what they send
                process.kill()
            os._exit(128 + number)
        self.reason = signal.Signals(number).name

    def __bool__(self) -> bool:
        if not self.reason and self.file and self.file.exists():
            self.reason = "file STOP"
        return bool(self.reason)
