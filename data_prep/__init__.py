"""Data preparation: images in any published layout become uniform, verified shards (`python -m data_prep --help`)."""

import math
import sys

import click

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
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
