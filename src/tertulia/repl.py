"""`tertulia chat`: a conversation at the terminal. It speaks the public API over HTTP and nothing else, so what it can
do any client can do; it knows nothing of engines, accounts or the database.

A key goes only to the address it was given with: the flags, the environment's OPENAI_BASE_URL and OPENAI_API_KEY, or
the data directory's client.env are each a pair and are not mixed. Where none of them leads to a server, one is started
in this process.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import SettingsError, TertuliaError

if TYPE_CHECKING:
    import http.client

    from .inprocess import Background

TIMEOUT = 600.0  # seconds without a byte before an answer is given up; a model may have to load first
PROBE_TIMEOUT = 2.0  # seconds a server in client.env has to say that it is alive
BODY_LIMIT = 1 << 20  # bytes of an error's body that are read
HISTORY_LENGTH = 1000  # lines
DIM, RED, CYAN = "2", "31", "1;36"
# A model's words must not steer the terminal: control characters other than line feed and tab are not printed.
CONTROL = dict.fromkeys(code for code in (*range(32), *range(127, 160)) if code not in (9, 10))
COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)
COMMANDS = {
    "help": ("", "this list"),
    "new": ("", "start a new conversation; the system message stays"),
    "system": ("[TEXT]", "show or set the system message; `off` removes it"),
    "model": ("[NAME]", "show or choose the model"),
    "models": ("", "list the server's models"),
    "temperature": ("[X]", "show or set the temperature; `off` leaves it to the model"),
    "undo": ("", "take back the last message and its answer"),
    "retry": ("", "ask for another answer to the last message"),
    "save": ("FILE", "write the conversation to a file"),
    "load": ("FILE", "go on with a conversation from a file"),
    "tokens": ("", "tokens and time of the last answer"),
    "exit": ("", "leave, as Ctrl-D does"),
}
NOTES = {"length": "cut at the token limit", "content_filter": "withheld by a content filter"}


class Refused(TertuliaError):
    """The server could not be reached, or it refused; the message is one line, its own where it gave one."""


# The API --------------------------------------------------------------------------------------------------------------


class Api:
    """An OpenAI-compatible server. One connection a request, so that closing it ends just that answer."""

    def __init__(self, base_url: str, key: str | None = None) -> None:
        """Raises SettingsError for an address that is not http(s)://HOST[:PORT][/PATH]."""
        from urllib.parse import urlsplit

        try:
            parts = urlsplit(base_url)
            self._host, self._port = parts.hostname, parts.port
        except ValueError:
            parts, self._host = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not self._host:
            raise SettingsError(f"{base_url!r} is not an address such as http://127.0.0.1:8000/v1")
        self.base_url = base_url.rstrip("/")
        self._secure = parts.scheme == "https"
        self._path = parts.path.rstrip("/")
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "tertulia-chat"}
        if key:
            if not key.isascii() or not key.isprintable():
                raise SettingsError("The API key has characters that an HTTP header cannot carry.")
            self._headers["Authorization"] = f"Bearer {key}"

    def connection(self, timeout: float) -> http.client.HTTPConnection:
        import http.client

        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        assert self._host is not None
        return kind(self._host, self._port, timeout=timeout)

    def get(self, path: str, timeout: float = 30.0) -> tuple[int, bytes]:
        """Status and body of GET base_url + path. Raises Refused if there is no answer."""
        import http.client

        connection = self.connection(timeout)
        try:
            connection.request("GET", self._path + path, headers=self._headers)
            response = connection.getresponse()
            return response.status, response.read(BODY_LIMIT)
        except (OSError, http.client.HTTPException) as error:
            raise Refused(f"{self.base_url} does not answer: {reason(error)}") from None
        finally:
            connection.close()

    def models(self) -> list[str]:
        """Names of the server's models. Raises Refused."""
        status, body = self.get("/models")
        if status != 200:
            raise Refused(sentence(status, body))
        try:
            return sorted(str(model["id"]) for model in json.loads(body)["data"])
        except (ValueError, KeyError, TypeError):
            raise Refused(f"{self.base_url}/models does not answer with a list of models") from None

    def stream(self, body: Mapping[str, Any]) -> Stream:
        """The answer to a chat completion, on its way; nothing is sent before it is iterated."""
        headers = {**self._headers, "Content-Type": "application/json", "Accept": "text/event-stream"}
        return Stream(self, self._path + "/chat/completions", headers, json.dumps(body).encode())


class Stream:
    """One answer on its way. Iterate over its pieces: ("content" or "reasoning", text). Afterwards model, finish, usage
    (as the server said them) and stopped tell how it went. Iterating raises Refused when the server refuses or the
    answer breaks off.
    """

    def __init__(self, api: Api, path: str, headers: dict[str, str], body: bytes) -> None:
        self._api = api
        self._request = path, headers, body
        self._socket: socket.socket | None = None
        self.model = ""
        self.finish: str | None = None
        self.usage: dict[str, Any] | None = None
        self.stopped = self._done = False

    def stop(self) -> None:
        """Ends the answer by closing its connection; made to be called by a signal handler. Raises KeyboardInterrupt
        if there is no connection yet.
        """
        if self._socket is None:
            raise KeyboardInterrupt
        self.stopped = True
        with contextlib.suppress(OSError):  # the server may have closed it a moment ago
            self._socket.shutdown(socket.SHUT_RDWR)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        import http.client

        connection = self._api.connection(TIMEOUT)
        response = None
        try:
            connection.connect()
            self._socket = connection.sock
            path, headers, body = self._request
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            if response.status != 200:
                raise Refused(sentence(response.status, response.read(BODY_LIMIT)))
            yield from self._pieces(response)
        except (OSError, http.client.HTTPException) as error:
            if not self.stopped:
                what = "broke off" if response is not None else "does not answer"
                raise Refused(f"{self._api.base_url} {what}: {reason(error)}") from None
        finally:
            if response is not None:
                response.close()
            connection.close()

    def _pieces(self, lines: Iterable[bytes]) -> Iterator[tuple[str, str]]:
        for data in events(lines):
            if self.stopped:
                return
            if data == "[DONE]":
                self._done = True
                return
            yield from self._read(data)
        if not (self.stopped or self._done or self.finish):
            raise Refused("The answer broke off before its end.")

    def _read(self, data: str) -> Iterator[tuple[str, str]]:
        try:
            chunk = json.loads(data)
            if chunk.get("error"):
                raise Refused(sentence(0, data.encode()))
            self.model = chunk.get("model") or self.model
            self.usage = chunk.get("usage") or self.usage
            for choice in chunk.get("choices") or ():
                delta = choice.get("delta") or {}
                if delta.get("reasoning_content"):
                    yield "reasoning", str(delta["reasoning_content"])
                for text in (delta.get("content"), delta.get("refusal")):
                    if text:
                        yield "content", str(text)
                self.finish = choice.get("finish_reason") or self.finish
        except (ValueError, AttributeError, TypeError):
            raise Refused("The server sent something that is no piece of a chat completion.") from None


def events(lines: Iterable[bytes]) -> Iterator[str]:
    """The data of each server-sent event, its lines joined by line feeds; comments and other fields are skipped, and so
    is an event that its empty line does not end (HTML standard, 9.2.6).
    """
    data: list[bytes] = []
    for raw in lines:
        line = raw.rstrip(b"\r\n")
        if line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
        elif line == b"data":
            data.append(b"")
        elif not line and data:
            yield b"\n".join(data).decode("utf-8", "replace")
            data.clear()


def sentence(status: int, body: bytes) -> str:
    """What an error's body says, on one line; OpenAI's error object, or the first words of whatever else it is."""
    try:
        error = json.loads(body)
        error = error.get("error", error)
        message = error if isinstance(error, str) else error["message"]
        return one_line(str(message))
    except (ValueError, KeyError, TypeError, AttributeError):
        return one_line(f"HTTP {status}: {body[:200].decode('utf-8', 'replace')}")


def reason(error: Exception) -> str:
    """Why a connection failed, in words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return one_line(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def one_line(text: str) -> str:
    return " ".join(text.translate(CONTROL).split())


# The conversation -----------------------------------------------------------------------------------------------------


@dataclass
class Conversation:
    """What was said, and how to ask. A turn is {"role", "content"}, with "stopped": true if the answer was cut off."""

    model: str
    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)

    def messages(self) -> list[dict[str, Any]]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + [{"role": turn["role"], "content": turn["content"]} for turn in self.turns]

    def body(self, text: str) -> dict[str, Any]:
        """A chat completion request for the conversation so far and one more message."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*self.messages(), {"role": "user", "content": text}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for name in ("temperature", "max_tokens"):
            if getattr(self, name) is not None:
                body[name] = getattr(self, name)
        return body

    def take_back(self) -> str | None:
        """Removes the last message of the user's and what follows it; returns its text, None if there is none."""
        for at in range(len(self.turns) - 1, -1, -1):
            if self.turns[at]["role"] == "user":
                text = str(self.turns[at]["content"])
                del self.turns[at:]
                return text
        return None

    def save(self, path: Path) -> None:
        """Writes it as JSON, readable by its owner only. Raises OSError."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        text = json.dumps({"model": self.model, "messages": head + self.turns}, indent=2, ensure_ascii=False)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            with open(partial, "w", encoding="utf-8", errors="replace", opener=private) as file:
                file.write(text + "\n")
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def load(self, path: Path) -> None:
        """Takes over what save wrote, or a plain list of messages. Raises OSError, or ValueError in words."""
        found = json.loads(path.read_text(encoding="utf-8"))
        messages = found.get("messages") if isinstance(found, dict) else found
        if not isinstance(messages, list):
            raise ValueError("there is no list of messages in it")
        for message in messages:
            fine = isinstance(message, dict) and message.get("role") in ("system", "developer", "user", "assistant")
            if not fine or not isinstance(message.get("content"), str):
                raise ValueError("a message needs a role (system, user or assistant) and a text")
        self.system = next((m["content"] for m in messages if m["role"] in ("system", "developer")), None)
        self.turns = [message for message in messages if message["role"] in ("user", "assistant")]
        if isinstance(found, dict) and isinstance(found.get("model"), str):
            self.model = found["model"]


def private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


# At the terminal ------------------------------------------------------------------------------------------------------


class Screen:
    """Where things are shown: plain text, and colours where standard output is a terminal and NO_COLOR is not set."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.terminal = sys.stdout.isatty()
        self._colours = self.terminal and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"
        self._open = False  # whether the cursor stands within a line

    def paint(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colours and text else text

    def prompt(self, text: str) -> str:
        """Painted for readline, which must not count the colours' characters."""
        return f"\x01\x1b[{CYAN}m\x02{text}\x01\x1b[0m\x02" if self._colours else text

    def piece(self, text: str, colour: str = "") -> None:
        text = text.translate(CONTROL) if self.terminal else text
        if text:
            self._open = not text.endswith("\n")
            sys.stdout.write(self.paint(text, colour) if colour else text)
            sys.stdout.flush()

    def end(self) -> None:
        """Ends the line if one is open."""
        if self._open:
            self.piece("\n")

    def note(self, text: str) -> None:
        self.end()
        print(self.paint(text.translate(CONTROL), DIM), flush=True)

    def error(self, text: str) -> None:
        self.end()
        print(self.paint(one_line(text), RED), flush=True)


@contextlib.contextmanager
def interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """While it is open, Ctrl-C calls stop instead of ending the program."""
    previous = signal.signal(signal.SIGINT, lambda number, frame: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class Chat:
    """The dialogue with who sits at the terminal: a line is a message, or a /command."""

    def __init__(self, api: Api, conversation: Conversation, screen: Screen) -> None:
        self.api = api
        self.conversation = conversation
        self.screen = screen
        self._unanswered: str | None = None  # the last message, if it failed: what /retry sends
        self._last: tuple[Stream, float, float] | None = None  # with seconds to its first piece and to its end

    def ask(self, text: str) -> bool:
        """Sends a message and shows its answer. False, and the conversation as it was, if there was none."""
        stream = self.api.stream(self.conversation.body(text))
        said: list[str] = []
        began = time.monotonic()
        self._unanswered = text
        try:
            with interrupt(stream.stop):
                first = self._show(stream, said)
        except TertuliaError as error:
            self.screen.error(error.message)
            return False
        except KeyboardInterrupt:  # before there was a connection
            self.screen.note("[stopped]")
            return False
        self.screen.end()
        self._last = stream, (first or time.monotonic()) - began, time.monotonic() - began
        if stream.stopped:
            self.screen.note("[stopped]")
            if not said:
                return False
        elif stream.finish in NOTES:
            self.screen.note(f"[{NOTES[stream.finish]}]")
        self._unanswered = None
        answer: dict[str, Any] = {"role": "assistant", "content": "".join(said)}
        if stream.stopped:
            answer["stopped"] = True
        self.conversation.turns += [{"role": "user", "content": text}, answer]
        return True

    def _show(self, stream: Stream, said: list[str]) -> float | None:
        """Prints pieces as they come and gathers the answer's; the time of the first."""
        first, kind = None, "content"
        for now, text in stream:
            first = first or time.monotonic()
            if now != kind:
                self.screen.end()
                kind = now
            self.screen.piece(text, DIM if now == "reasoning" else "")
            if now == "content":
                said.append(text)
        return first

    def line(self, line: str) -> bool:
        """Does what a line says; False to leave."""
        match = COMMAND.fullmatch(line.strip())
        if match is None:
            if line.strip():
                self.ask(line)
            return True
        name, argument = match[1], (match[2] or "").strip()
        if name in ("exit", "quit", "bye"):
            return False
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
            self.screen.error(f"There is no command /{name}; " + (f"did you mean /{near[0]}?" if near else "see /help"))
            return True
        try:
            getattr(self, f"_{name}")(argument)
        except TertuliaError as error:
            self.screen.error(error.message)
        return True

    def _help(self, argument: str) -> None:
        for name, (hint, what) in COMMANDS.items():
            self.screen.note(f"/{name} {hint}".ljust(20) + what)
        self.screen.note('A line that ends in \\ goes on in the next; """ begins and ends a text of several lines.')
        self.screen.note("Ctrl-C stops an answer, Ctrl-D leaves.")

    def _new(self, argument: str) -> None:
        self.conversation.turns.clear()
        self._unanswered = None
        self.screen.note("A new conversation.")

    def _system(self, argument: str) -> None:
        if argument:
            self.conversation.system = None if argument == "off" else argument
        self.screen.note(f"System: {self.conversation.system or 'none'}")

    def _model(self, argument: str) -> None:
        self.conversation.model = argument or self.conversation.model
        self.screen.note(f"Model: {self.conversation.model}")

    def _models(self, argument: str) -> None:
        for name in self.api.models():
            self.screen.note(name)

    def _temperature(self, argument: str) -> None:
        if argument:
            try:
                self.conversation.temperature = None if argument == "off" else float(argument)
            except ValueError:
                raise Refused(f"{argument} is not a number") from None
        value = self.conversation.temperature
        self.screen.note(f"Temperature: {'left to the model' if value is None else value}")

    def _undo(self, argument: str) -> None:
        text = self.conversation.take_back()
        self.screen.note("There is nothing to take back." if text is None else f"Taken back: {one_line(text)[:60]}")

    def _retry(self, argument: str) -> None:
        if self._unanswered is not None:
            self.ask(self._unanswered)
            return
        before = self.conversation.turns.copy()
        text = self.conversation.take_back()
        if text is None:
            self.screen.note("There is nothing to ask again.")
        elif not self.ask(text):
            self.conversation.turns = before
            self._unanswered = None

    def _save(self, argument: str) -> None:
        path = self._path(argument, "save")
        try:
            self.conversation.save(path)
        except OSError as error:
            raise Refused(f"{path} cannot be written: {error.strerror}") from None
        self.screen.note(f"Saved to {path}")

    def _load(self, argument: str) -> None:
        path = self._path(argument, "load")
        try:
            self.conversation.load(path)
        except OSError as error:
            raise Refused(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise Refused(f"{path} is not a conversation: {error}") from None
        self._unanswered = None
        self.screen.note(f"{len(self.conversation.turns)} messages, model {self.conversation.model}")

    def _path(self, argument: str, command: str) -> Path:
        if not argument:
            raise Refused(f"Say which file: /{command} FILE")
        return Path(argument).expanduser()

    def _tokens(self, argument: str) -> None:
        if self._last is None:
            self.screen.note("There was no answer yet.")
            return
        stream, first, whole = self._last
        parts = [stream.model]
        if stream.usage is not None:
            count = stream.usage.get("completion_tokens") or 0
            parts += [f"{stream.usage.get('prompt_tokens')} prompt tokens", f"{count} answer tokens"]
            if whole > first:
                parts.append(f"{count / (whole - first):.1f} tokens/s")
        else:
            parts.append(
                "tokens not counted: the answer was stopped" if stream.stopped else "the server counted no tokens"
            )
        self.screen.note(" · ".join([*parts, f"first after {first:.2f} s", f"whole after {whole:.2f} s"]))


def read_message(read: Callable[[str], str], prompt: str) -> str:
    '''One message from the terminal: a line; lines joined where they end in a backslash; or all between """ and """.'''
    line = read(prompt)
    if line.lstrip().startswith('"""'):
        text = line.lstrip()[3:]
        while not text.rstrip().endswith('"""'):
            text += "\n" + read("... ")
        return text.rstrip()[:-3].strip("\n")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + read("... ")
    return line


def converse(chat: Chat, history: Path | None) -> int:
    """Reads and answers until Ctrl-D or /exit."""
    screen = chat.screen
    screen.note(f"{chat.conversation.model} at {chat.api.base_url} · /help for commands, Ctrl-D to leave")
    with remembered(history):
        while True:
            try:
                if not chat.line(read_message(input, screen.prompt("> "))):
                    return 0
            except KeyboardInterrupt:
                screen.note("\n(Ctrl-D or /exit leaves)")
            except EOFError:
                screen.piece("\n")
                return 0
            except UnicodeDecodeError:
                screen.error("That was not UTF-8 text.")


@contextlib.contextmanager
def remembered(history: Path | None) -> Iterator[None]:
    """Line editing, with the lines of earlier sessions; none of it where Python has no readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    readline.set_completer_delims("")
    readline.set_completer(_complete)
    readline.parse_and_bind("tab: complete")
    readline.set_history_length(HISTORY_LENGTH)
    if history is not None:
        try:
            os.close(os.open(history, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o600))  # readline might make it public
            readline.read_history_file(history)
        except OSError:
            history = None  # a conversation does not fail for want of a history
    try:
        yield
    finally:
        if history is not None:
            with contextlib.suppress(OSError):
                readline.write_history_file(history)
                history.chmod(0o600)


def _complete(text: str, state: int) -> str | None:
    found = [f"/{name} " for name in COMMANDS if text.startswith("/") and f"/{name}".startswith(text)]
    return found[state] if state < len(found) else None


# The command ----------------------------------------------------------------------------------------------------------


def add_chat(parser: argparse.ArgumentParser) -> None:
    """The flags of `tertulia chat`."""
    add = parser.add_argument
    add("-m", "--message", metavar="TEXT", help="ask this, print the answer and leave; more text may come by a pipe")
    add("--model", default="gpt-4o-mini", metavar="NAME", help="model to ask (default: %(default)s)")
    add("--system", metavar="TEXT", help="system message")
    add("--temperature", type=float, metavar="X", help="sampling temperature; the model's own if not given")
    add("--max-tokens", type=int, metavar="N", dest="answer_tokens", help="most tokens of an answer")
    # The destinations must not be names of settings: these say where to ask, not how to serve.
    add("--base-url", metavar="URL", dest="ask_url", help="server to ask; OPENAI_BASE_URL, or the one of the data "
        "directory, or one started here if not given")  # fmt: skip
    add("--api-key", metavar="KEY", dest="ask_key", help="its key (others on this machine can see flags: better "
        "OPENAI_API_KEY together with OPENAI_BASE_URL)")  # fmt: skip
    add("--data", metavar="DIR", help="data directory: where the own server, its key and the history are")
    add("--config", metavar="FILE", help="TOML file with settings, for a server started here")
    parser.set_defaults(run=chat)


def chat(options: argparse.Namespace) -> int:
    """Runs `tertulia chat`; returns the exit code: 0, 1 if a single message got no answer, 130 if it was stopped."""
    from .config import load

    settings = load({"data": options.data, "config": options.config})
    conversation = Conversation(options.model, options.system, options.temperature, options.answer_tokens)
    message = single_message(options.message)
    with contextlib.ExitStack() as stack:
        base_url, key = find_server(options, os.environ, settings.data_dir, stack, message is None)
        api = Api(base_url, key)
        if message is not None:
            return once(api, conversation, message)
        data = settings.data_dir
        history = data / "chat_history" if data.is_dir() and sys.stdout.isatty() else None
        return converse(Chat(api, conversation, Screen(os.environ)), history)


def single_message(message: str | None) -> str | None:
    """The message of the flag and of standard input if that is not a terminal; None to talk. Raises SettingsError."""
    parts = [message] if message is not None else []
    if sys.stdin is not None and not sys.stdin.isatty():
        try:
            parts.append(sys.stdin.buffer.read().decode())
        except UnicodeDecodeError:
            raise SettingsError("What came on standard input is not UTF-8 text.") from None
    if not parts:
        return None
    text = "\n\n".join(part for part in (part.strip() for part in parts) if part)
    if not text:
        raise SettingsError("There is nothing to ask: the message is empty.")
    return text


def once(api: Api, conversation: Conversation, message: str) -> int:
    """One answer on standard output, all else on standard error; the exit code."""
    stream = api.stream(conversation.body(message))
    screen = Screen(os.environ)
    try:
        with interrupt(stream.stop):
            for kind, text in stream:
                if kind == "content":
                    screen.piece(text)
        screen.end()
    except BrokenPipeError:  # whoever read has had enough; Python must not complain about it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Refused:
        with contextlib.suppress(BrokenPipeError):
            screen.end()
        raise
    if stream.stopped:
        return 130
    if stream.finish in NOTES:
        print(f"tertulia: {NOTES[stream.finish]}", file=sys.stderr)
    return 0


def find_server(
    options: argparse.Namespace, environment: Mapping[str, str], data: Path, stack: contextlib.ExitStack, talk: bool
) -> tuple[str, str | None]:
    """Base URL and key of the server to ask; one is started, and closed by the stack, if none is there."""
    from .accounts import client_env

    kept = client_env.read(data)
    own = kept.get("OPENAI_BASE_URL"), kept.get("OPENAI_API_KEY")
    key: str | None
    if options.ask_url:
        for url, key in ((environment.get("OPENAI_BASE_URL"), environment.get("OPENAI_API_KEY")), own):
            if url and url.rstrip("/") == options.ask_url.rstrip("/"):
                return options.ask_url, options.ask_key or key
        return options.ask_url, options.ask_key
    if environment.get("OPENAI_BASE_URL"):
        return environment["OPENAI_BASE_URL"], options.ask_key or environment.get("OPENAI_API_KEY")
    url, key = own
    if url and alive(url, options.ask_key or key):
        return url, options.ask_key or key
    server = started(options, data, talk)
    stack.callback(server.close)
    return server.base_url, options.ask_key or server.api_key


def started(options: argparse.Namespace, data: Path, talk: bool) -> Background:
    """A server in this process. On loopback whatever the settings say: it is for this conversation only. Models are
    loaded while who talks types; for a single message only the one that is asked.
    """
    from .inprocess import start

    screen = Screen(os.environ)
    line = f"No server answers for {data}: starting one for this conversation."
    print(screen.paint(line, DIM) if sys.stderr.isatty() else line, file=sys.stderr, flush=True)
    return start(data=str(data), config=options.config, host="127.0.0.1", preload=None if talk else False)


def alive(base_url: str, key: str | None = None) -> bool:
    """Whether a Tertulia answers there, and knows the key if there is one; the first is asked without the key."""
    try:
        status, body = Api(base_url.rstrip("/").removesuffix("/v1")).get("/healthz", PROBE_TIMEOUT)
        if status != 200 or b'"ok"' not in body:
            return False
        return key is None or Api(base_url, key).get("/models", PROBE_TIMEOUT)[0] == 200
    except TertuliaError:
        return False
