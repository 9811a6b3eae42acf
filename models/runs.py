"""A run: its processes (Ranks) and its folder, whose files docs/training.md lists."""

import contextlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep import (
    DOMAINS,
    FREE_ON_RESUME,
    InputError,
    hash_file,
    join_config,
    read_json,
    read_lines,
    read_parts,
    unit_number,
    weights_of,
    write_atomically,
    write_json,
)
from data_prep.format import MAX_SIZE, Split, fits
from models.backbones import BACKBONES, Backbone, Network, fill_weights, library_state, load_backbone
from models.weights import damaged, read_tensors, write_tensors

# one record per line: its step and other numbers, and these tables by domain, split or pair of domains
LOGS = {"log.jsonl": {}, "probe.jsonl": {"auc": float},
        "conflict.jsonl": {"norm": float | None, "cosine": float | None, "cosine_by_layer": list}}
STOPPED = 75  # exit code of a run that was stopped with a checkpoint (EX_TEMPFAIL: a scheduler may requeue it)


# ---------------------------------------------------------------- processes


def pick_device(name: str) -> torch.device:
    """The device of --device; `auto`: CUDA where available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name}: want auto, cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device; use --device cpu")
    device = torch.device(name)
    if (device.index or 0) >= max(torch.cuda.device_count(), 1):
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs, counted from 0")
    return device


@dataclass(frozen=True)
class Ranks:
    """This process among those of torchrun; without torchrun, rank 0 of 1."""

    rank: int = 0
    world: int = 1
    control: object = None  # gloo group, for communication between CPUs while the GPUs compute
    draws: object = None  # a second one, for the thread that draws classes one step ahead

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place, on its device."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor, group=self.control if tensor.device.type == "cpu" else None)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; collective."""
        return bool(self.sum(torch.tensor(int(flag))))

    def wait(self) -> None:
        """Barrier."""
        self.any(False)


def watch_parent(parent: int) -> None:
    """If torchrun is killed, send this rank SIGTERM, so that a run is saved first."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(120)  # in a collective that other ranks have left, the signal is never handled
    os._exit(128 + signal.SIGTERM)


def end_rank(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Report an uncaught error, a lost peer in one line, and exit at once: gloo's threads may block a normal exit."""
    if kind is RuntimeError and "peer" in str(error) and "--debug" not in sys.argv:
        print("error: another process of this job has ended (see its message, if any); saved files are intact: run "
              "the command again (train.py: with --resume)", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(1)


def join_ranks(device_name: str) -> tuple[Ranks, torch.device]:
    """Read torchrun's environment, start the process group (several ranks) and choose the device of this rank."""
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
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:  # torchrun listens there, unless it was killed before `watch_parent` saw it
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), 30).close()
        except OSError as error:
            raise InputError(f"torchrun, which started this process, has ended ({error.strerror or error}): start it "
                             "again") from error
    sys.excepthook = end_rank
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ranks = Ranks(torch.distributed.get_rank(), world, *(torch.distributed.new_group(backend="gloo") for _ in range(2)))
    if ranks.rank:  # only rank 0 prints
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return ranks, device


# ---------------------------------------------------------------- config.json


@dataclass
class Facts:
    """What follows from a run's options, data and machine; beside the options in config.json."""

    role: str  # one of RUN_ROLES, for `analyze.py claims`
    steps: int
    counts: dict[str, int]  # domain -> images drawn in the run
    recipe: dict[str, float]  # options that the backbone's recipe set
    git_commit: str | None
    argv: list[str]
    versions: dict[str, str]
    shards: dict[str, str]  # domain -> plan of its training split
    sources: dict[str, dict]  # see `describe_sources`
    weights_sha256: str | None  # of the file of --weights


def write_config(folder: Path, options: dict, splits: list[Split], steps: int, counts: dict[str, int],
                 recipe: dict[str, float]) -> None:
    """Write config.json: the options, as on the command line, and the `Facts`."""
    try:
        commit = subprocess.run(["git", "-C", Path(__file__).resolve().parent, "rev-parse", "HEAD"],
                                capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    sequential, weights = options["schedule"] == "sequential", options["weights"]
    packages = ("torch", "torchvision", "timm", "open_clip_torch", "numpy")
    facts = Facts("expert" if len(splits) == 1 else "sequential" if sequential else "unified", steps, counts, recipe,
                  commit or None, sys.argv[1:],
                  {"python": platform.python_version()} | {name: version(name) for name in packages},
                  {split.domain: split.index["provenance"]["plan"] for split in splits}, describe_sources(splits),
                  hash_file(Path(weights.rpartition(":")[0])) or hash_file(Path(weights)))  # FILE:NAME or FILE
    write_json(folder / "config.json", {"options": options, "facts": asdict(facts)})


def describe_sources(splits: list[Split]) -> dict[str, dict]:
    """Source and form of the images of each domain, kept because shards may be deleted."""
    return {split.domain: {"source": split.index["provenance"]["source"], "images": len(split),
                           "classes": len(split.classes), "size": split.size,
                           **{key: split.index.get(key) for key in ("fit", "quality")}} for split in splits}


# fields of config.json that later stages read, with their types as `fits` takes them
CONFIG = {
    "backbone": str, "model": str, "size": str, "weights": str, "image_size": int, "embed_dim": int, "seed": int,
    "domains": [str], "data": str, "schedule": str, "counts": {}, "steps": int, "shards": {}, "versions": {},
    "git_commit": str, "sources": {},
}
MAY_BE_NONE = {"backbone", "model", "image_size", "git_commit"}
NEWER = {"sources": {}, "degrade": None}  # fields that earlier versions did not write, with their values
SOURCE = {"source": str, "images": int, "size": int}  # of "sources", see `describe_sources`


def read_config(folder: Path) -> dict:
    """`join_config` of a run; InputError where a field that later stages read is missing or of another type."""
    path = folder / "config.json"
    config = NEWER | join_config(path)
    if missing := CONFIG.keys() - config.keys():
        raise InputError(f"{path} lacks {min(missing)!r}: restore it, or train the run again")
    wrong = [key for key, kind in CONFIG.items()
             if not fits(config[key], kind) and not (config[key] is None and key in MAY_BE_NONE)]
    if not wrong:
        order, domains = config["order"], config["domains"]
        valid = {
            "domains": sorted(set(order)) == sorted(order) and set(order) <= set(DOMAINS),
            "counts": fits(config["counts"], dict.fromkeys(domains, int)),
            "shards": fits(config["shards"], dict.fromkeys(domains, str)),
            "image_size": 16 <= (config["image_size"] or 16) <= MAX_SIZE,  # as the options, and allocated at once
            "embed_dim": config["embed_dim"] <= 1 << 16,
            "backbone": config["model"] or config["size"] in BACKBONES.get(config["backbone"], {}),
            "sources": all(fits(source, SOURCE) for source in config["sources"].values()),
            "degrade": not config["degrade"] or (  # False in earlier versions
                fits(config["degrade"], str) and unit_number(config["degrade"].partition("@")[0]) is not None),
        }
        wrong = [key for key, ok in valid.items() if not ok]
    if wrong:
        raise InputError(f"{path}: {wrong[0]} is {str(config[wrong[0]])[:60]!r}: restore it, or train the run again")
    return config


def find_run(folder: Path, options: dict, splits: list[Split]) -> str:
    """State of the run in the output folder: "nothing", "unfinished" or "complete".

    InputError if it cannot be continued with these splits and `options`, of this start, as in config.json.
    """
    if not (path := folder / "config.json").exists():
        return "nothing"
    if not options["resume"]:
        raise InputError(f"{folder} already holds a run: continue it with --resume, or choose another --out")
    if "options" not in (saved := read_json(path)):
        raise InputError(f"--resume {folder}: trained by an earlier version (commit {saved.get('git_commit')}): "
                         "continue it there, or start another --out; it can still be evaluated")
    config, old = read_config(folder), saved["options"]
    for key, value in options.items():
        moved = key == "weights" and weights_of(config) == weights_of({"weights": value})  # the file may have moved
        if key not in FREE_ON_RESUME and old.get(key) != value and not moved:
            raise InputError(f"--resume {folder}: --{key.replace('_', '-')} was {old.get(key)!r} and is now {value!r}; "
                             "give the options of its start (see its config.json)")
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
    """A run, as later stages read it."""

    folder: Path
    config: dict  # options and facts, see `read_config`
    head: torch.Tensor  # float32 [C, D]
    classes: dict[str, list[str]]  # per trained domain
    class_ranges: dict[str, tuple[int, int]]  # rows of the head
    project: torch.Tensor | None = None  # of --embed-dim

    @property
    def options(self) -> dict:
        return read_parts(self.folder / "config.json")[0]


def load_run(folder: Path, allow_partial: bool = False) -> Run:
    """Read a run folder; InputError if it is none or, unless `allow_partial`, unfinished."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no run: it has no config.json; train one with `python train.py --out {folder}`")
    whole = (folder / "done.json").is_file() or folder.resolve().parent.name == "checkpoints"  # of --keep
    if not whole and not allow_partial:
        raise InputError(f"{folder} has not finished (no done.json): continue it with --resume or pass --allow-partial")
    config = read_config(folder)
    if not (path := folder / "head.safetensors").is_file():
        raise InputError(f"{folder} holds no weights yet (no head.safetensors): continue it with `train.py --resume`")
    tensors, metadata = read_tensors(path)
    head, classes, domains = tensors.get("weight"), None, config["domains"]
    with contextlib.suppress(KeyError, ValueError, RecursionError):
        classes = json.loads(metadata["classes"])
    if not fits(classes, {name: [str] for name in domains}) or list(classes) != domains:
        raise damaged(path, "its class names are not one list per domain")
    ends = np.cumsum([len(names) for names in classes.values()])
    if head is None or not head.is_floating_point() or head.ndim != 2 or len(head) != ends[-1]:
        form = "none" if head is None else f"{head.dtype} {list(head.shape)}"
        raise damaged(path, f"its class weights are {form}, want float [{ends[-1]}, width], one row per class")
    ranges = {d: (int(end) - len(classes[d]), int(end)) for d, end in zip(classes, ends, strict=True)}
    return Run(folder, config, head.float(), classes, ranges, tensors.get("project"))


def load_tuned(run: Run) -> Backbone:
    """The fine-tuned backbone of a run, in eval mode."""
    model, path = load_backbone(Network.of(run.config, weights="none")), run.folder / "model.safetensors"
    fill_weights(model.net, model.library, read_tensors(path)[0], path)
    if run.head.shape[1] != model.dim:
        raise damaged(run.folder / "head.safetensors", f"class weights of width {run.head.shape[1]}, not {model.dim}")
    if model.project is not None:
        if run.project is None or run.project.shape != model.project.weight.shape:
            raise damaged(run.folder / "head.safetensors", "no linear layer of the width --embed-dim")
        model.project.weight.data.copy_(run.project)
    return model.eval()


def load_foundation(run: Run) -> Backbone:
    """The untouched backbone of a run, without the linear layer of --embed-dim, in eval mode."""
    path, expected = Path(str(run.config.get("weights"))), run.config.get("weights_sha256")
    if expected and hash_file(path) not in (None, expected):
        raise InputError(f"{path}: not the file that {run.folder} started from (its SHA-256 differs): restore it, or "
                         "leave out the untouched backbone with --no-foundation")
    return load_backbone(Network.of(run.config, embed_dim=0)).eval()


# ---------------------------------------------------------------- checkpoints


def alike(value: object, like: Any) -> bool:
    """Whether a value from a state file is as another: a tensor of its shape and dtype, or a dict or list of such."""
    if isinstance(like, torch.Tensor):  # neither sparse nor without data
        return isinstance(value, torch.Tensor) and (value.shape, value.dtype) == (like.shape, like.dtype) and \
            (value.layout, value.device.type) == (torch.strided, "cpu")
    if isinstance(like, dict):
        return value.keys() == like.keys() and all(alike(value[key], like[key]) for key in like)
    return len(value) == len(like) and all(map(alike, value, like))


def misfit(state: dict, job: Any) -> str:
    """Why a state file does not fit a run, or "". Unchecked, the optimiser would read past the end of a tensor."""
    whole = torch.Size([sum(job.head.class_counts), job.model.dim])
    blank = [torch.empty(shape, device="meta") for shape in [*(p.shape for p in job.parameters[:-1]), whole]]
    model, statistics = job.model.state_dict(), job.head.statistics
    moments = [{"step": torch.zeros(()), "exp_avg": one, "exp_avg_sq": one} for one in blank]

    def fits_tally(tally: dict) -> bool:  # as reports.training.Tally; earlier versions lack some
        numbers = [tally["skipped"], tally["bad"], tally["seconds"], tally.get("logged", 0),
                   tally.get("collapsed_at") or 0]
        return all(isinstance(number, int | float) and 0 <= number < 1 << 62 for number in numbers) \
            and all(isinstance(score, float) for score in tally.get("start", {}).values())

    checks = {
        "step": lambda step: type(step) is int and 0 <= step <= job.steps,
        "model": lambda saved: alike(saved, model) and all(value.isfinite().all() for value in saved.values()),
        "head": lambda saved: alike(saved, blank[-1]),
        "optimizer": lambda saved: all(i >= 0 and alike(one, moments[i]) for i, one in saved["state"].items()),
        "tally": fits_tally,
        "health": lambda saved: alike(saved, torch.zeros(2, dtype=torch.int64)) and
        0 <= saved[1] <= saved[0] <= state["step"],
        "ema": lambda saved: job.average is None or alike(saved, blank),
        "norms": lambda saved: statistics is None or alike(saved, statistics),
    }
    for key, fits_run in checks.items():
        with contextlib.suppress(Exception):  # of another type, or not there
            if fits_run(state[key]):
                continue
        return f"{key} is not what this run saves"
    return ""


def read_state(job: Any) -> dict:
    """The state of a run's last checkpoint, on the CPU; InputError if it is damaged."""
    path = job.folder / "last" / "state.pt"
    try:
        if job.ranks.rank == 0:
            with zipfile.ZipFile(path) as file:  # PyTorch ignores the checksums
                if bad := file.testzip():
                    raise ValueError(f"the checksum of {bad} differs")
        # with a sharded head every rank reads only its own rows
        state = torch.load(path, "cpu", weights_only=True, mmap=job.head.sharded)
        wrong = misfit(state, job)
    except Exception as error:  # of zip, pickle or torch
        wrong = str(error).splitlines()[0][:120] if isinstance(error, ValueError) else type(error).__name__
    if wrong:
        raise InputError(f"{path}: damaged ({wrong}): restore it, or start another --out")
    return state


def kept_steps(run: Path) -> dict[int, Path]:
    """Step -> folder of the checkpoints of --keep."""
    folders = ((folder.name.removeprefix("step-"), folder) for folder in (run / "checkpoints").glob("step-*")
             if folder.is_dir() and not folder.is_symlink())
    return dict(sorted((int(step), folder) for step, folder in folders if step.isdecimal()))


def keep_checkpoint(job: Any, step: int, export: Callable[[Any, Path], None]) -> None:
    """Write RUN/checkpoints/step-NNNNNNNN, itself a run folder, then remove old checkpoints (`drop_checkpoints`).

    `export` writes the weights of a run into a folder and is collective.
    """
    folder, first = job.folder / "checkpoints" / f"step-{step:08d}", job.ranks.rank == 0
    scratch = folder.with_suffix(".tmp")
    if first:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    try:
        export(job, scratch)
        if first:
            config = read_json(job.folder / "config.json")
            counts = dict(zip(job.options.trained, job.plan[:step].sum((0, 1)).tolist(), strict=True))
            config["facts"] |= {"steps": step, "counts": counts}
            write_json(scratch / "config.json", config)
            shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed before its state was written
            os.replace(scratch, folder)
            drop_checkpoints(job.folder, job.options.keep)
    finally:
        if first:
            shutil.rmtree(scratch, ignore_errors=True)
    job.ranks.wait()


def drop_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best by mean AUC of --eval-every; link `best` to that."""
    steps, link = kept_steps(run), run / "checkpoints" / "best"
    scores = {line["step"]: np.mean([*line["auc"].values()]) for line in read_lines(run / "probe.jsonl") if line["auc"]}
    best = max((step for step in steps if step in scores), key=scores.get, default=None)
    if best is not None:
        (new_link := link.with_suffix(".tmp")).unlink(missing_ok=True)
        new_link.symlink_to(steps[best].name)
        os.replace(new_link, link)
    for step in [step for step in list(steps)[:-keep] if step != best]:
        shutil.rmtree(steps[step])


def fits_log(record: object, tables: dict[str, type]) -> bool:
    """Whether a record is one that a run writes to a log with these tables; a damaged line may hold anything."""
    return isinstance(record, dict) and type(record.get("step")) is int and tables.keys() <= record.keys() and all(
        isinstance(value, int | float | None) if key not in tables else isinstance(value, dict) and all(
            re.split("[/~]", name)[0] in DOMAINS and isinstance(one, tables[key]) for name, one in value.items())
        for key, value in record.items())


def forget_after(folder: Path, step: int) -> None:
    """Remove log lines and checkpoints of steps after `step`, from which a run continues, and damaged lines."""
    for log, tables in ((folder / name, tables) for name, tables in LOGS.items() if (folder / name).exists()):
        lines = []
        for line in log.read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):  # a truncated line
                lines += [line] if fits_log(record := json.loads(line), tables) and record["step"] <= step else []
        write_atomically(log, lambda path, lines=lines: path.write_bytes(b"".join(line + b"\n" for line in lines)))
    for later in [kept for number, kept in kept_steps(folder).items() if number > step]:
        shutil.rmtree(later)


class StopRequest:
    """True after SIGTERM, SIGINT or a file RUN/STOP: the run ends after its step. A second signal exits at once."""

    def __init__(self, folder: Path, ranks: Ranks = Ranks()) -> None:
        self.file, self.reason = folder / "STOP" if ranks.rank == 0 else None, ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number: int, _frame) -> None:
        if self.reason:
            for process in multiprocessing.active_children():  # else they block on their queues
                process.kill()
            os._exit(128 + number)
        self.reason = signal.Signals(number).name

    def __bool__(self) -> bool:
        if not self.reason and self.file and self.file.exists():
            self.reason = "file STOP"
        return bool(self.reason)
