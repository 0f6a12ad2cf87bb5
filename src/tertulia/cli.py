"""The command line: `tertulia serve`, and what else an owner does. Parses, calls, prints; knows nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from . import __version__
from .doctor import add_doctor
from .errors import SettingsError, TertuliaError
from .repl import add_chat

if TYPE_CHECKING:
    from .server import Server


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
        return 2 if isinstance(error, SettingsError) else 1
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
    add_chat(commands.add_parser("chat", help="talk to a model in the terminal"))
    pull_parser = commands.add_parser(
        "pull", help="fetch models", description="Fetches models: NAME from the catalogue, or hf:ORG/REPO/FILE.gguf."
    )
    pull_parser.add_argument(
        "names", nargs="*", metavar="NAME", help="what to fetch; the default models if none is given"
    )
    add_place(pull_parser)
    pull_parser.set_defaults(run=pull)
    models_parser = commands.add_parser(
        "models", help="list, verify and remove models", description="Lists the models that are known and installed."
    )
    models_parser.add_argument("--remove", action="append", default=[], metavar="NAME", help="delete a model's file")
    models_parser.add_argument(
        "--verify", action="append", default=[], metavar="NAME", help="hash a model's file again"
    )
    models_parser.add_argument("--json", action="store_true", help="print everything that is known, as JSON")
    add_place(models_parser)
    models_parser.set_defaults(run=models)
    import_parser = commands.add_parser(
        "import",
        help="turn another gateway's configuration into Tertulia's",
        description="Writes a Tertulia configuration made from another gateway's, and lists on standard error what "
        "could not be carried over. Keys are never copied.",
    )
    import_parser.add_argument("kind", choices=["litellm"], help="whose configuration it is: `litellm`")
    import_parser.add_argument("file", metavar="FILE", help="the configuration of a LiteLLM proxy, in YAML")
    import_parser.add_argument(
        "-o", "--output", metavar="FILE", help="write here, not to standard output; never over a file"
    )
    import_parser.set_defaults(run=import_settings)
    add_doctor(commands.add_parser("doctor", help="check machine, models, port and permissions"))
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
            convert: Callable[[str], Any] = _number if row.shape == "number" else str
            meta = "|".join(row.choices) or row.name.split("_")[-1].upper()
            parser.add_argument(row.flag, type=convert, metavar=meta, **kind)


def add_place(parser: argparse.ArgumentParser) -> None:
    """The two settings that say where things are, for commands that serve nothing."""
    parser.add_argument("--data", metavar="DIR", help="directory of everything that is kept")
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")


def _number(text: str) -> float | int:
    try:
        return int(text)
    except ValueError:
        return float(text)


_number.__name__ = "number"  # argparse names the type in its message


def settings_of(options: argparse.Namespace) -> Any:
    from .config import load, table

    return load({row.name: getattr(options, row.name, None) for row in table() if row.plain})


def log_to_stderr(level: str) -> None:
    """Sets logging up so that a line is written by a thread: a terminal or pipe that is slow keeps nobody waiting.

    What waits is written when the process ends; over 10,000 waiting lines are dropped.
    """
    import atexit
    import logging
    import logging.handlers
    import queue

    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()

    class Dropping(logging.handlers.QueueHandler):
        def enqueue(self, record: logging.LogRecord) -> None:
            if waiting.qsize() < 10_000:
                waiting.put(record)

    logging.basicConfig(level=level.upper(), format="%(levelname)s %(name)s: %(message)s", handlers=[Dropping(waiting)])
    if level != "error":
        logging.getLogger("tertulia.reload").setLevel(logging.INFO)  # whoever changes the file waits for that line
    listener = logging.handlers.QueueListener(waiting, logging.StreamHandler())
    listener.start()
    atexit.register(listener.stop)


def serve(options: argparse.Namespace) -> int:
    settings = settings_of(options)
    log_to_stderr(settings.log_level)
    from .server import run

    run(settings, announce, lambda: settings_of(options))
    return 0


def announce(server: Server) -> None:
    """Where the server is, what it serves, what is still loading, and the two lines a client needs.

    The key is printed at first start and to a terminal; elsewhere (a service's log) the file that holds it is named.
    """
    print(f"Tertulia {__version__} answers on {server.base_url}")
    for name, state in server.states().items():
        print(f"  {name:32} {state}" + (f" (tertulia pull {name})" if state == "missing" else ""))
    others = [card.id for card in server.names.listed() if card.id not in server.states()]
    if others:
        print(f"  also {', '.join(others)}")
    print(f"  data in {server.data}\n")
    if server.first_keys or sys.stdout.isatty():
        print(f"export OPENAI_BASE_URL={server.base_url}\nexport OPENAI_API_KEY={server.own_key()}\n", flush=True)
    else:
        print(f". {server.data / 'client.env'}    # sets OPENAI_BASE_URL and OPENAI_API_KEY\n", flush=True)


def pull(options: argparse.Namespace) -> int:
    from .engines.models import pull_all
    from .server import shelf_of, wanted

    settings = settings_of(options)
    shelf = shelf_of(settings)
    names = options.names or wanted(settings)
    for name, path in zip(names, pull_all(names, shelf), strict=True):
        print(f"{name}: {path}")
    return 0


def import_settings(options: argparse.Namespace) -> int:
    from .importers.litellm import convert

    try:
        with open(options.file, encoding="utf-8") as file:
            text, notes = convert(file.read(), options.file)
        if options.output is None:
            print(text, end="")
        else:
            with open(options.output, "x", encoding="utf-8") as file:
                file.write(text)
    except UnicodeDecodeError:
        raise SettingsError(f"{options.file}: this is no text") from None
    except OSError as error:
        raise SettingsError(f"{error.filename}: {error.strerror}") from None
    for note in notes:
        print(f"{options.file}: {note}", file=sys.stderr)
    return 0


def models(options: argparse.Namespace) -> int:
    from .server import shelf_of

    shelf = shelf_of(settings_of(options))
    if options.remove or options.verify:
        for name in options.remove:
            shelf.remove(name)
            print(f"{name}: removed")
        for name in options.verify:
            print(f"{name}: as it was fetched (SHA-256 {shelf.verify(name).sha256})")
        return 0
    installed = {card.id: card for card in shelf.installed()}
    cards = {**{id: known.card for id, known in shelf.catalog.items()}, **installed}
    if options.json:
        rows = [{**msgspec.to_builtins(card), "installed": id in installed} for id, card in cards.items()]
        print(msgspec.json.format(msgspec.json.encode(rows)).decode())
        return 0
    for id, card in cards.items():
        size = f"{(card.bytes or 0) / 1e6:.0f} MB"
        state = "installed" if id in installed else "not installed"
        length = card.context_length or "?"
        print(f"{id:32} {card.kind:10} {size:>8}  {length:>7} tokens  {card.licence or '?':12} {state}")
    for id in shelf.damaged():
        print(f"{id}: damaged; `tertulia pull {id}` fetches it again", file=sys.stderr)
    return 0
