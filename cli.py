"""The command line: `latentrt --help` lists the commands.

Each folder has its commands' arguments in `arguments.py` and their bodies in `commands.py`: generators of lines to
print, imported when they run, so that `latentrt --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import sys
from collections.abc import Sequence

from . import __version__
from .bench import arguments as bench
from .errors import LatentRTError
from .export import arguments as export
from .runtime import arguments as runtime

__all__ = ["main"]


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; no command's own code is imported for it."""
    parser = argparse.ArgumentParser(
        prog="latentrt", description="An inference runtime for Stable Diffusion XL."
    )
    parser.add_argument("--version", action="version", version=f"latentrt {__version__}")
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="log which back end is chosen, and what is exported and loaded",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for arguments in (runtime, export, bench):
        arguments.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, or 1 after an error, which is printed in one line, 2 for unusable arguments, 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a prompt may hold what the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    logging.basicConfig(format="latentrt: %(message)s")
    logging.getLogger("latentrt").setLevel(logging.INFO if args.verbose else logging.WARNING)
    # A first run exports for a minute; that is said without being asked for.
    logging.getLogger("latentrt.runtime.prepare").setLevel(logging.INFO)
    try:
        folder, name = args.run
        body = getattr(importlib.import_module(f".{folder}.commands", __package__), name)
        for line in body(args):
            print(line)  # noqa: T201 (unlike sys.stdout.write, it bears a stream that is closed)
    except LatentRTError as error:
        _complain(str(error))
        return 1
    except OSError as error:
        _complain(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
        return 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    return 0


def _complain(message: str) -> None:
    if sys.stderr is not None:  # some services have none
        sys.stderr.write(f"latentrt: {message}\n")


if __name__ == "__main__":
    sys.exit(main())
