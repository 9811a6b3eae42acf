"""Data preparation: images in any published layout become uniform, verified shards (`python -m data_prep --help`)."""

import csv
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import click
from tqdm import tqdm

DOMAINS = ("object", "face_hq", "face_lq", "body")  # these names, in this order, in every option, folder and legend
DOMAIN_COLOURS = {"object": "#0072B2", "face_hq": "#D55E00", "face_lq": "#E69F00", "body": "#009E73"}  # Okabe and Ito's


class InputError(click.ClickException):
    """Bad input. The message is one line: what is wrong, where, what to do."""

    exit_code = 2


class Number(click.FloatRange):
    """An option's number within a range; refuses NaN, which passes click's range check, and infinity."""

    def __init__(self, *limits, infinite: bool = False, **options) -> None:
        super().__init__(*limits, **options)
        self.infinite = infinite

    def convert(self, value, parameter, context) -> float:
        number = super().convert(value, parameter, context)
        if math.isnan(number) or (math.isinf(number) and not self.infinite):
            self.fail(f"{value} is not a finite number.", parameter, context)
        return number


LINE_EVERY = 30.0  # seconds between two lines of progress without a terminal


def progress(iterable: Iterable | None = None, disable: bool = False, **options) -> tqdm:
    """tqdm's bar (desc, total, unit, initial) on a terminal, otherwise a line every LINE_EVERY seconds."""
    if disable or sys.stderr.isatty():
        return tqdm(iterable, disable=disable, **options)
    return ProgressLines(iterable, **options)


class ProgressLines(tqdm):
    """A progress bar as lines of text: in the log of a scheduler, hours of silence look like a hang."""

    monitor_interval = 0  # no thread of tqdm's, which only redraws bars

    def __init__(self, iterable: Iterable | None = None, desc: str = "", unit: str = "it", initial: int = 0,
                 **options) -> None:
        super().__init__(iterable, initial=initial, disable=True, **options)  # tqdm itself prints nothing
        self.desc, self.unit, self.initial, self.postfix = desc, unit, initial, ""
        self.begin = self.last = time.monotonic()

    def update(self, n: int = 1) -> None:
        self.n += n
        if (now := time.monotonic()) - self.last >= LINE_EVERY:
            self.last = now
            print(tqdm.format_meter(self.n, self.total, now - self.begin, ncols=0, prefix=self.desc, unit=self.unit,
                                    initial=self.initial, postfix=self.postfix), file=sys.stderr, flush=True)

    def __iter__(self) -> Iterator:
        for item in self.iterable:
            yield item
            self.update()


@cache
def say_once(line: str) -> None:
    """Print a line unless it was printed before."""
    tqdm.write(line)


def literal(name: str) -> str:
    """A user's name escaped, so that Markdown shows it unchanged."""
    return re.sub(r"[\\|*!\[\]`<>&]", r"\\\g<0>", name)


def run_command(command: click.Command) -> None:
    """Run a click command as a script: bad input ends in one line on stderr and exit code 2 (`--debug`: a traceback).

    An int that the command returns is the exit code.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # file names, and so class names, may not be UTF-8
    try:
        code = command.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (click.ClickException, OSError) as error:
        if "--debug" in sys.argv:
            raise
        if isinstance(error, OSError):  # a disk that is full, read-only or gone
            text = f"{error.filename or 'input or output'}: {error.strerror or error} (--debug shows where)"
        else:
            text = " ".join(error.format_message().split())
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------- options: value types, dataclasses of options


class Parsed(click.ParamType):
    """The type of an option whose text is parsed into a value once, from the command line or from a config.json.

    `parse`: text -> value; its ValueError says which text is valid. `show`: value -> text; parse(show(value)) == value.
    """

    def __init__(self, name: str, parse: Callable[[str], Any], show: Callable[[Any], str] = str) -> None:
        self.name, self.parse, self.show = name, parse, show

    def convert(self, value, parameter, context):
        try:
            return self.parse(str(value))
        except ValueError as error:
            self.fail(f"{value!r}: {error}", parameter, context)


def check_domain(name: str) -> str:
    """The name itself; ValueError if it is not a domain's."""
    if name not in DOMAINS:
        raise ValueError(f"no domain {name!r}; the domains are {', '.join(DOMAINS)}")
    return name


def parse_domains(text: str) -> list[str]:
    """`object,body` -> the names in the given order."""
    names = [check_domain(name.strip()) for name in text.split(",")]
    if len(set(names)) < len(names):
        raise ValueError("names a domain twice")
    return names


def per_domain(low: float, high: float, spread: bool = True) -> Parsed:
    """Option type: a number for all domains, or NAME=NUMBER,...; the value is {domain: number in low..high}.

    `spread=False`: a number alone stays one, as it does not mean one per domain.
    """

    def parse(text: str) -> dict[str, float] | float:
        pairs = [part.partition("=") for part in text.split(",")] if "=" in text else [(d, "", text) for d in DOMAINS]
        names = parse_domains(",".join(name for name, *_ in pairs))
        try:
            values = dict(zip(names, (float(number) for *_, number in pairs), strict=True))
        except ValueError as error:
            raise ValueError("want a number or NAME=NUMBER,...") from error
        for name, value in values.items():
            if not low <= value <= high:
                raise ValueError(f"{name + ' is ' if '=' in text else ''}{value:g}; want {low:g} to {high:g}")
        return values if spread or "=" in text else values["object"]

    def show(values: dict[str, float] | float) -> str:
        return ",".join(f"{d}={x!r}" for d, x in values.items()) if isinstance(values, dict) else repr(values)

    return Parsed("numbers", parse, show)


def unit_number(text: str) -> float | None:
    """The text as a number in 0..1; None if it is not one."""
    try:
        return float(text) if 0 <= float(text) <= 1 else None
    except ValueError:
        return None


def parse_ramp(text: str) -> tuple[float, float]:
    """`SEVERITY[@FRACTION]`: the largest severity, and the fraction of training over which it grows from 0."""
    numbers = [unit_number(part) for part in (text if "@" in text else f"{text}@0.3").split("@")]
    if None in numbers or len(numbers) != 2:
        raise ValueError("want SEVERITY[@FRACTION], both in 0..1")
    return tuple(numbers)


class MixRamp(NamedTuple):
    """A share of schedule B that changes linearly over the first `fraction` of training."""

    domain: str
    first: float
    last: float
    fraction: float


def parse_mix_ramp(text: str) -> MixRamp:
    """`DOMAIN:FIRST->LAST[@FRACTION]`."""
    match = re.fullmatch(r"(\w+):(.*)->(.*)@(.*)", text if "@" in text else f"{text}@0.3")
    values = [unit_number(number) for number in (match[2], match[3], match[4])] if match else [None]
    if None in values or not values[2]:
        raise ValueError("want DOMAIN:FIRST->LAST[@FRACTION], shares in 0..1, FRACTION of training above 0 and up to 1")
    return MixRamp(check_domain(match[1]), *values)


DOMAIN_LIST = Parsed("names", parse_domains, ",".join)
SEVERITY = Parsed("severity", parse_ramp, lambda value: f"{value[0]!r}@{value[1]!r}")
MIX_RAMP = Parsed("ramp", parse_mix_ramp, lambda ramp: f"{ramp[0]}:{ramp[1]!r}->{ramp[2]!r}@{ramp[3]!r}")


class Option(click.Option):
    """An option with the heading that the help lists it under."""

    def __init__(self, *arguments, group: str = "other", **settings) -> None:
        super().__init__(*arguments, **settings)
        self.group = group


class GroupedHelp(click.Group):
    """A command whose help lists options under the headings of their groups."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list] = {}
        for parameter in self.get_params(context):
            if record := parameter.get_help_record(context):
                groups.setdefault(getattr(parameter, "group", "other"), []).append(record)
        for name, records in groups.items():
            with formatter.section(name.capitalize()):
                formatter.write_dl(records)
        self.format_commands(context, formatter)


def option(group: str, default: Any, kind: click.ParamType | type, text: str, **settings) -> Any:
    """A field of a dataclass of options; its default value is the parsed `default`.

    `group`: heading in the help. `default`: as typed on the command line. `kind`: click type; bool: a flag. `text`: of
    the help, with the unit. `settings`: further arguments of click.Option.
    """
    parsed = kind.convert(default, None, None) if isinstance(kind, Parsed) and default is not None else default
    settings = {"is_flag": True} | settings if kind is bool else {"type": kind} | settings
    return dataclasses.field(default_factory=lambda: parsed, metadata={
        "cls": Option, "group": group, "default": default, "help": text, **settings})


def add_options(options: type, leave_out: tuple[str, ...] = ()) -> Callable:
    """Decorator: give a command one option for each field of a dataclass of options."""

    def decorate(command: Callable) -> Callable:
        for field in reversed([field for field in dataclasses.fields(options) if field.name not in leave_out]):
            name = field.name.replace("_", "-")
            name += f"/--no-{name}" if field.metadata["default"] is True else ""
            command = click.option(f"--{name}", **field.metadata)(command)
        return command

    return decorate


def as_texts(options: Any) -> dict[str, Any]:
    """The values of a dataclass of options for JSON; those of a `Parsed` type as text, as on the command line."""
    values = {}
    for field in dataclasses.fields(options):
        value, kind = getattr(options, field.name), field.metadata.get("type")
        values[field.name] = kind.show(value) if isinstance(kind, Parsed) and value is not None else value
    return values


def refuse_options(context: click.Context) -> None:
    """Refuse options before a sub-command's name, which click would parse and ignore."""
    for parameter in context.command.params:
        if context.get_parameter_source(parameter.name).name == "COMMANDLINE":
            raise InputError(f"{parameter.opts[0]} before {context.invoked_subcommand}: give options after the "
                             f"sub-command (see `{context.invoked_subcommand} --help`)")


def replay_config(context: click.Context, _parameter, path: str | None) -> None:
    """Callback of --config FILE: options of a run's config.json, as text, become defaults; the command line wins."""
    if path is None:
        return
    try:
        values = json.loads(Path(path).read_text())["options"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"--config {path}: not a readable JSON file of options; take the config.json of a run of this "
                         "version") from error
    known, context.default_map = {parameter.name for parameter in context.find_root().command.params}, {}
    for key, value in values:
        if key not in known:
            raise InputError(f"--config {path}: no option {key!r}")
        if isinstance(value, list | dict):
            raise InputError(f"--config {path}: {key} is {value}: want text as on the command line")
        if key not in ("out", "resume"):
            context.default_map[key] = value if value is None else str(value)


@contextmanager
def lock_folder(folder: Path, option: str) -> Iterator[None]:
    """Lock a folder for writing by this process alone; the folder is created if missing and removed if it stays empty.

    The lock is POSIX's (`lockf`, not `flock`) on the file `.lock`: it is released when this process ends in any way, is
    not inherited by forked children, and holds across nodes on network file systems. On a file system without locks,
    nothing is locked. InputError, which names the option, if another process holds the lock.
    """
    created = [parent for parent in (folder, *folder.parents) if not os.path.exists(parent)]
    path = folder / ".lock"
    with writing(folder, ANOTHER, option):
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.pread(file, 300, 0).decode() or "another process"
                raise InputError(f"{option} {folder}: {holder} is writing to it: wait for it to end, or choose "
                                 f"another {option}") from None
        with writing(folder, ANOTHER, option):
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        # the previous holder may have deleted the file: a lock on a deleted file protects nothing
        if not path.exists() or not os.path.samestat(os.fstat(file), path.stat()):
            raise InputError(f"{option} {folder}: the process that wrote to it has just ended: run the command again")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(file)
        for parent in created:
            with suppress(OSError):  # not empty
                parent.rmdir()


# ---------------------------------------------------------------- files

ANOTHER = "choose another, or remove what is in the way"


@contextmanager
def writing(path: Path, then: str = "the last checkpoint is intact: make room, then continue with --resume",
            option: str = "", errors: type[Exception] | tuple[type[Exception], ...] = OSError) -> Iterator[None]:
    """Turn write errors inside the block into an InputError; `then`: advice, `option`: that named the path."""
    try:
        yield
    except InputError:  # not about this file: a loader process died meanwhile
        raise
    except errors as error:
        folder = next((folder for folder in (path, path.parent) if os.path.isdir(folder)), None)
        free = f"; {shutil.disk_usage(folder).free >> 20:,} MiB free there" if folder else ""
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{option} {path}: cannot be written ({reason}{free}): {then}".strip()) from error


@contextmanager
def replacing(path: Path, writer: str = "") -> Iterator[Path]:
    """Yield a temporary path; after the block, sync the file written there and rename it to `path`.

    `path` holds the old file or the whole new one, never a part. `writer` makes the names of concurrent writers differ.
    """
    temporary = path.with_name(f"{path.name}{writer}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary path and rename the result to `path`; InputError if that fails."""
    # torch and safetensors raise errors of their own on a full disk
    with writing(path, "what was saved before is intact", errors=Exception), replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes its files unreadable to others


def make_folder(path: Path, option: str) -> None:
    """Create a folder for results if missing; InputError, with the name of the option, if that fails."""
    with writing(path, ANOTHER, option):
        path.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, value: dict, indent: int = 2) -> None:
    """Write indented JSON, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=indent) + "\n"))


def read_json(path: Path) -> dict:
    """The object in a file of `write_json`; InputError if the file is damaged."""
    try:
        return {**json.loads(path.read_bytes())}
    except (OSError, ValueError, TypeError, RecursionError) as error:  # TypeError: JSON, but no object
        raise InputError(f"{path}: damaged ({error}): restore it, or run the stage that wrote it again") from error


FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet takes text that begins so for a formula


def write_csv(path: Path, table: list[dict], columns: tuple[str, ...] = ()) -> None:
    """Write rows with equal keys as CSV with a header, atomically; `columns` is needed if there may be no rows.

    An apostrophe precedes text that a spreadsheet would take for a formula; numbers, also negative ones, get none.
    """

    def plain(value: Any) -> Any:
        formula = isinstance(value, str) and value[:1] in FORMULA
        return f"'{value}" if formula and not re.fullmatch(r"[-+][\d.]+(e[-+]?\d+)?", value) else value

    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, columns or list(table[0]))
    writer.writeheader()
    writer.writerows({key: plain(value) for key, value in row.items()} for row in table)
    write_atomically(path, lambda temporary: temporary.write_bytes(out.getvalue().encode(errors="backslashreplace")))


def append(path: Path, record: dict) -> None:
    """Append a line to a .jsonl file of a run; NaN, which JSON lacks, becomes null."""
    record = json.loads(json.dumps(record), parse_constant=lambda _: None)
    with writing(path), open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def read_lines(path: Path) -> list[dict]:
    """The records of a .jsonl file of a run: [] without the file; a last line cut off by a kill is ignored."""
    lines, records = path.read_bytes().splitlines() if path.exists() else [], []
    for number, line in enumerate(lines, 1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            if number < len(lines):
                raise InputError(f"{path}, line {number}: damaged ({error}): remove the line") from error
    return records


def hash_file(path: Path) -> str | None:
    """SHA-256 of a file; None if it does not exist."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- config.json of a run

FREE_ON_RESUME = {"workers", "micro_batch", "device", "cache", "compile", "grad_checkpointing", "shard_head",
                  "log_every", "save_every", "keep", "resume", "data", "out", "splits"}

# what a run derives from its options; former versions kept both in one object of config.json
FACTS = {"role", "steps", "counts", "recipe", "git_commit", "argv", "versions", "shards", "sources", "weights_sha256"}


def read_parts(path: Path) -> tuple[dict, dict]:
    """Options, as typed, and facts of a config.json; also reads the flat form of former versions."""
    config = read_json(path)
    if isinstance(config.get("options"), dict) and isinstance(config.get("facts"), dict):
        return config["options"], config["facts"]
    options = {key: ",".join(map(str, value)) if isinstance(value, list) else value for key, value in config.items()
               if key not in FACTS}
    options["domains"] = options.pop("order", None) or options.get("domains")
    return options, {key: value for key, value in config.items() if key in FACTS}


def join_config(path: Path) -> dict:
    """Options and facts of a config.json merged; "domains" in the order of DOMAINS, "order" as given."""
    options, facts = read_parts(path)
    order = options.get("domains") or list(DOMAINS)
    order = order.split(",") if isinstance(order, str) else order
    known = isinstance(order, list) and set(map(str, order)) <= set(DOMAINS)
    return options | facts | {"order": order, "domains": [d for d in DOMAINS if d in order] if known else order}


def weights_of(config: dict) -> str | None:
    """What identifies the initial weights of a run: the SHA-256 of their file, wherever it lies, or their name."""
    name = config.get("weights")
    return config.get("weights_sha256") or (hash_file(Path(name)) if isinstance(name, str) else None) or name
