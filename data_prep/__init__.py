"""Data preparation: images in any published layout become uniform, verified shards (`python -m data_prep --help`)."""

import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator

import click
from tqdm import tqdm

DOMAINS = ("object", "face_hq", "face_lq", "body")  # these names, in this order, in every option, folder and legend
DOMAIN_COLOURS = {"object": "#0072B2", "face_hq": "#D55E00", "face_lq": "#E69F00", "body": "#009E73"}  # Okabe and Ito's


class InputError(click.ClickException):
    """Bad input. The message is one line: what is wrong, where, what to do."""

    exit_code = 2


class Number(click.FloatRange):
    """A number of an option within a range; NaN, which every range lets through, and infinity are refused."""

    def __init__(self, *limits, infinite: bool = False, **options) -> None:
        super().__init__(*limits, **options)
        self.infinite = infinite

    def convert(self, value, parameter, context) -> float:
        number = super().convert(value, parameter, context)
        if math.isnan(number) or (math.isinf(number) and not self.infinite):
            self.fail(f"{value} is not a finite number.", parameter, context)
        return number


LINE_EVERY = 30.0  # seconds between two lines of progress where there is no terminal


def progress(iterable: Iterable | None = None, disable: bool = False, **options) -> "tqdm | ProgressLines":
    """tqdm's bar (desc, total, unit, initial), or, where there is no terminal, a line every LINE_EVERY seconds."""
    if disable or sys.stderr.isatty():
        return tqdm(iterable, disable=disable, **options)
    return ProgressLines(iterable, **options)


class ProgressLines:
    """What a bar of tqdm does, in lines: for logs of schedulers, in which hours of silence look like a hang."""

    def __init__(self, iterable: Iterable | None = None, desc: str = "", total: int | None = None, unit: str = "it",
                 initial: int = 0) -> None:
        self.iterable, self.desc, self.unit, self.n, self.initial = iterable, desc, unit, initial, initial
        self.total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
        self.begin = self.last = time.monotonic()
        self.postfix = ""

    def update(self, n: int = 1) -> None:
        self.n += n
        if (now := time.monotonic()) - self.last >= LINE_EVERY:
            self.last = now
            print(tqdm.format_meter(self.n, self.total, now - self.begin, ncols=0, prefix=self.desc, unit=self.unit,
                                    initial=self.initial, postfix=self.postfix), file=sys.stderr, flush=True)

    def set_postfix(self, values: dict | None = None, **more) -> None:
        self.postfix = ", ".join(f"{key}={value}" for key, value in ((values or {}) | more).items())

    def close(self) -> None:
        pass

    def __iter__(self) -> Iterator:
        for item in self.iterable:
            yield item
            self.update()

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *_) -> None:
        pass


def literal(name: str) -> str:
    """A name that somebody chose, as Markdown that shows it as it is."""
    return re.sub(r"[\\|*!\[\]`<>&]", r"\\\g<0>", name)


def run_command(command: click.Command) -> None:
    """Run a click command as a script: bad input ends in one line on stderr and exit code 2 (`--debug`: a traceback).

    A command's return value, where it is an int, becomes the exit code.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # file names, and so classes, need not be text
    try:
        code = command.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        if "--debug" in sys.argv:
            raise
        print("error: " + " ".join(error.format_message().split()), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # of `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a disk that is full, read-only or gone
        if "--debug" in sys.argv:
            raise
        print(f"error: {error.filename or 'input or output'}: {error.strerror or error} (--debug shows where)",
              file=sys.stderr)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
