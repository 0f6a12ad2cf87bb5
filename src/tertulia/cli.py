"""The command line: `tertulia serve`, and what else an owner does. Parses, calls, prints; knows nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from . import __version__
from .errors import TertuliaError


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one clear line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed, 2 asked wrongly, 130 interrupted."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.run is None:
        parser.print_help()
        return 2
    try:
        return int(options.run(options) or 0)
    except TertuliaError as error:
        print(f"tertulia: {error.message}", file=sys.stderr)
        return 2 if type(error).__name__ == "SettingsError" else 1
    except KeyboardInterrupt:
        return 130


def build_parser() -> Parser:
    parser = Parser(prog="tertulia", description="The ChatGPT API that you own.")
    parser.add_argument("--version", action="version", version=f"tertulia {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    serve_parser = commands.add_parser("serve", help="run the server", description="Runs the server until Ctrl-C.")
    add_settings(serve_parser)
    serve_parser.set_defaults(run=serve)
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for every plain setting, from the one table."""
    from .config import table

    for row in table():
        if not row.plain:
            continue
        kind: dict[str, Any] = {"dest": row.name, "default": None, "help": row.help.replace("%", "%%")}
        if row.shape == "yes/no":
            parser.add_argument(row.flag, action=argparse.BooleanOptionalAction, **kind)
        else:
            convert = {"number": _number, "text": str}[row.shape]
            parser.add_argument(row.flag, type=convert, metavar=row.name.split("_")[-1].upper(), **kind)


def _number(text: str) -> float | int:
    try:
        return int(text)
    except ValueError:
        return float(text)


_number.__name__ = "number"  # argparse names the type in its message


def settings_of(options: argparse.Namespace) -> Any:
    from .config import load, table

    return load({row.name: getattr(options, row.name, None) for row in table() if row.plain})


def serve(options: argparse.Namespace) -> int:
    import logging

    settings = settings_of(options)
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    from .server import Server, run

    def announce(server: Server) -> None:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        print(f"Tertulia {__version__} answers on http://{host}:{server.port}/v1", flush=True)

    run(settings, announce)
    return 0
