"""The command line: `tertulia serve`, and what else an owner does. Parses, calls, prints; knows nothing else."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
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
    except BrokenPipeError:  # whoever read has had enough; Python must not complain about it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
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
    add_ledger(commands.add_parser("ledger", help="export and verify the ledger"))
    add_backups(commands)
    add_keys(commands.add_parser("keys", help="list, make, rotate and revoke keys; projects"))
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


def add_keys(parser: argparse.ArgumentParser) -> None:
    """The commands of `tertulia keys`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    projects = commands.add_parser("projects", help="list, make and archive projects")
    projects_commands = projects.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        within = projects_commands if name.startswith("projects ") else commands
        made = within.add_parser(name.split()[-1], help=help)
        made.set_defaults(run=lambda options: keys(name, options))
        return made

    all = [
        listed := command("list", "list the keys that are not revoked"),
        made := command("create", "make a key; it is shown this once"),
        shown := command("show", "show what is known of a key; not the key itself"),
        rotated := command("rotate", "make a key in another's place; both work for a while"),
        revoked := command("revoke", "refuse a key from now on"),
        command("projects list", "list the projects"),
        project := command("projects create", "make a project"),
        archived := command("projects archive", "refuse a project's keys from now on, for good"),
    ]
    listed.add_argument("--project", metavar="PROJECT", help="only those of this project, by id or name")
    listed.add_argument("--admin", action="store_true", help="only admin keys")
    made.add_argument("--project", metavar="PROJECT", help="its project, by id or name; the oldest if not given")
    made.add_argument("--admin", action="store_true", help="a key to administer with")
    made.add_argument("--owner", metavar="USER", help="whose key it is, by id or e-mail; an owner's if not given")
    made.add_argument("--name", metavar="NAME", default="Key", help="what to call it")
    made.add_argument("--scopes", metavar="SCOPES", help="what it may do, with commas between; everything if not given")
    made.add_argument("--expires-in", metavar="TIME", type=_duration, help="how long it lives: 90m, 12h, 30d, 8w")
    rotated.add_argument(
        "--grace", metavar="TIME", type=_duration, default=86400, help="how long the old one still works; 24h"
    )
    for parser in (shown, rotated, revoked):
        parser.add_argument("id", metavar="ID", help="the key's id, as `list` shows it")
    project.add_argument("name", metavar="NAME", help="what to call it")
    archived.add_argument("project", metavar="PROJECT", help="the project, by id or name")
    for parser in all:
        parser.add_argument("--json", action="store_true", help="print JSON")
        add_place(parser)
        parser.add_argument("--database", metavar="URL", help="URL of the database, as for `tertulia serve`")


def _duration(text: str) -> int:
    """Seconds, from 90, 90s, 15m, 12h, 30d or 8w."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    if not number.isdecimal() or len(number) > 9:
        raise ValueError
    return int(number) * unit


_duration.__name__ = "time"


def keys(command: str, options: argparse.Namespace) -> int:
    from .keys import run

    return run(command, options)


def add_place(parser: argparse.ArgumentParser) -> None:
    """The two settings that say where things are, for commands that serve nothing."""
    parser.add_argument("--data", metavar="DIR", help="directory of everything that is kept")
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")


def add_ledger(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    export = commands.add_parser(
        "export",
        help="write all entries as CSV or Parquet",
        description="Writes one row for each attempt, a server may be running. at is in unix seconds (UTC), cost in "
        "nano-dollars: a billionth of a dollar.",
    )
    export.add_argument(
        "-o", "--output", metavar="FILE", help="write here, never over a file; as Parquet if it ends so"
    )
    export.add_argument("--since", metavar="DAY", type=_moment, help="entries from this day on, as 2026-11-30, in UTC")
    export.add_argument("--until", metavar="DAY", type=_moment, help="entries before this day")
    export.add_argument("--project", metavar="PROJECT", help="entries of one project, by id or name")
    export.set_defaults(run=export_ledger)
    verify = commands.add_parser(
        "verify",
        help="check that journal, entries and sums agree",
        description="Reads the journal and adds up all entries again. Exits with 1 if anything is wrong.",
    )
    verify.set_defaults(run=verify_ledger)
    for parser in (export, verify):
        add_place(parser)
        parser.add_argument("--database", metavar="URL", help="URL of the database, as for `tertulia serve`")


def _moment(text: str) -> int:
    from .accounts.export import day_of

    return day_of(text)


_moment.__name__ = "day"


def add_backups(commands: Any) -> None:
    backup_parser = commands.add_parser(
        "backup",
        help="write all that is kept to one file",
        description="Writes projects, keys, limits, audit log and ledger to one file; a server may be running. "
        "Models and cached answers are not in it. Whoever has the file has what the data directory holds.",
    )
    backup_parser.add_argument("file", metavar="FILE", help="where to, as a tar.gz; never over a file")
    backup_parser.set_defaults(run=backup)
    restore_parser = commands.add_parser(
        "restore",
        help="put a backup into an empty data directory and database",
        description="Puts a backup into the data directory and the database, which no server may be using. That "
        "database may be of another kind than the one that was backed up.",
    )
    restore_parser.add_argument("file", metavar="FILE", help="what `tertulia backup` wrote")
    restore_parser.add_argument(
        "--force", action="store_true", help="replace what is there; its files are kept as NAME.before-TIME"
    )
    restore_parser.set_defaults(run=restore)
    for parser in (backup_parser, restore_parser):
        add_place(parser)
        parser.add_argument("--database", metavar="URL", help="URL of the database, as for `tertulia serve`")


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


def export_ledger(options: argparse.Namespace) -> int:
    from .accounts.export import Part, project_of, rows, write_csv, write_parquet
    from .store.database import open_database

    settings = settings_of(options)
    if options.since is not None and options.until is not None and options.since >= options.until:
        raise SettingsError("--since must be before --until: there is nothing between them")
    file = Path(options.output) if options.output else None
    database = open_database(settings.data_dir, settings.database)
    project = project_of(database, options.project) if options.project is not None else None
    found = rows(database, settings.data_dir, Part(options.since, options.until, project))
    count = write_parquet(found, file) if file and file.suffix == ".parquet" else write_csv(found, file)
    if file is not None:
        print(f"{file}: {count:,} entries")
    return 0


def verify_ledger(options: argparse.Namespace) -> int:
    from .accounts.export import verify
    from .store.database import open_database

    settings = settings_of(options)
    wrong = verify(open_database(settings.data_dir, settings.database), settings.data_dir, print)
    for line in wrong:
        print(f"wrong: {line}")
    print(f"{len(wrong)} things are wrong" if wrong else "all of it agrees")
    return 1 if wrong else 0


def backup(options: argparse.Namespace) -> int:
    from .store.backup import backup as write

    settings = settings_of(options)
    file = Path(options.file)
    with progress() as tell:
        told = write(settings.data_dir, settings.database, file, tell)
    rows = sum(table.rows for table in told.tables.values())
    print(f"{file}: {rows:,} rows and {len(told.members):,} files, {sized(file.stat().st_size)}")
    return 0


def sized(bytes: int) -> str:
    """The size of a file for people."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if bytes >= unit:
            return f"{bytes / unit:.1f} {name}"
    return f"{bytes} bytes"


def restore(options: argparse.Namespace) -> int:
    from .server import only_server
    from .store.backup import restore as read

    settings = settings_of(options)
    data = settings.data_dir
    made = [path for path in (data / "serve.lock", data, *data.parents) if not path.exists()]
    with only_server(data), progress() as tell:  # no server may begin in the middle
        try:
            told = read(Path(options.file), data, settings.database, options.force, tell)
        except BaseException:  # Ctrl-C too
            take_back(made)
            raise
    at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(told.made_at))
    print(f"{data} is as it was on {at}: {sum(table.rows for table in told.tables.values()):,} rows")
    return 0


def take_back(made: Sequence[Path]) -> None:
    """Removes a lock and the directories that were made for it, innermost first, unless something else is in them."""
    for path in made:
        with contextlib.suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Says on standard error how far it is, on one line of a terminal that is empty again in the end; else nothing."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return

    def tell(said: str) -> None:
        print(f"\r\033[K{said[:79]}", end="", file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        tell("")


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
