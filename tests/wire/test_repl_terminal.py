"""`tertulia chat` at a pseudo-terminal and in a pipe, against a real server."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import stat
import struct
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Served, serve

COMMAND = [sys.executable, "-m", "tertulia", "chat"]
WORDS = " ".join(f"word{number}" for number in range(400))
CONFIG = f"""
[presets.slow]
model = "mock"
parameters = {{ mock = {{ text = "{WORDS}", delay = 0.05 }} }}
[presets.silent]
model = "mock"
parameters = {{ mock = {{ text = "too late", first_delay = 60 }} }}
[presets.broken]
model = "mock"
[presets.broken.parameters.mock]
text = "half of an answer"
cut = 2
error = {{ status = 500, message = "The engine\\nfell over." }}
[presets.failing]
model = "mock"
parameters = {{ mock = {{ error = {{ status = 503, message = "Too busy just now." }} }} }}
[presets.cursing]
model = "mock"
parameters = {{ mock = {{ text = "before \\u001b]0;owned\\u0007\\u001b[2J after", chunk = 100 }} }}
"""
MODELS = ["--chat-model", "mock", "--embedding-model", "mock-embedding"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = serve(tmp_path_factory.mktemp("repl"), CONFIG, *MODELS)
    yield served
    served.stop()


def environment(served: Served | None, **more: str) -> dict[str, str]:
    given = {} if served is None else {"OPENAI_BASE_URL": served.base_url, "OPENAI_API_KEY": served.api_key}
    return {**os.environ, "TERM": "dumb", **given, **more}


class Terminal:
    """The program at a pseudo-terminal, its own controlling one, so that Ctrl-C arrives as a signal."""

    def __init__(self, *arguments: str, environment: dict[str, str]) -> None:
        self.screen, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 500, 0, 0))  # wide: no line is folded
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdin=terminal, stdout=terminal, stderr=terminal, env=environment,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(terminal)
        self.seen = self.passed = ""

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def expect(self, text: str, seconds: float = 20.0) -> str:
        """Waits for a text; returns what came up to its end, and forgets it."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            self._read(deadline, text)
        upto, _, self.seen = self.seen.partition(text)
        self.passed = upto + text
        return upto + text

    def _read(self, deadline: float, wanted: str) -> None:
        ready = select.select([self.screen], [], [], max(0.0, deadline - time.monotonic()))[0]
        try:
            data = os.read(self.screen, 65536) if ready else b""
        except OSError:  # the program has left
            data = b""
        assert data, f"{wanted!r} did not come; on the screen: {self.seen!r}"
        self.seen += data.decode()

    def ask(self, line: str, until: str) -> str:
        """At the prompt (what is typed earlier is echoed twice) types a line, steps over its echo, waits for a text."""
        deadline = time.monotonic() + 20
        while not (self.passed + self.seen).endswith(("> ", "... ")):
            self._read(deadline, "a prompt")
        self.type(line + "\n")
        self.expect(line)
        return self.expect(until)

    def leave(self) -> int:
        """Ctrl-D until it works: one that comes before the prompt is lost when readline takes the terminal over."""
        deadline = time.monotonic() + 20
        while self.process.poll() is None and time.monotonic() < deadline:
            self.type("\x04")
            try:
                self.process.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
        return self.process.wait(0)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.screen)


@pytest.fixture
def terminal(served: Served, tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal("--model", "mock", "--data", str(tmp_path), environment=environment(served))
    terminal.expect("> ")
    yield terminal
    terminal.close()


def outcomes(served: Served, outcome: str) -> int:
    with urllib.request.urlopen(served.root + "/metrics") as answer:
        found = re.findall(rf'tertulia_calls_total{{.*outcome="{outcome}".*}} (\d+)', answer.read().decode())
    return sum(map(int, found))


def saved(terminal: Terminal, path: Path) -> dict[str, Any]:
    terminal.ask(f"/save {path}", "Saved to")
    terminal.expect("> ")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_it_keeps_the_conversation(terminal: Terminal, tmp_path: Path) -> None:
    terminal.ask("/system Be brief.", "System: Be brief.")
    terminal.ask("hello there", "hello there")
    alone = terminal.ask("/tokens", "answer tokens")
    terminal.ask("and again", "and again")
    later = terminal.ask("/tokens", "answer tokens")
    alone_tokens, later_tokens = (int(re.findall(r"(\d+) prompt tokens", text)[0]) for text in (alone, later))
    assert later_tokens == alone_tokens + 4  # the server was sent the first exchange again: two words and two words
    assert saved(terminal, tmp_path / "talk.json")["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "hello there"},
        {"role": "user", "content": "and again"},
        {"role": "assistant", "content": "and again"},
    ]
    assert terminal.leave() == 0


def test_control_c_stops_the_answer_and_not_the_program(terminal: Terminal, served: Served, tmp_path: Path) -> None:
    before = outcomes(served, "client_left")
    terminal.ask("/model slow", "Model: slow")
    terminal.ask("talk to me", "word3 ")
    terminal.type("\x03")
    pressed = time.monotonic()
    terminal.expect("[stopped]")
    while outcomes(served, "client_left") == before:
        assert time.monotonic() < pressed + 2, "the server did not notice that nobody listens"
        time.sleep(0.02)
    assert terminal.process.poll() is None
    terminal.expect("> ")
    user, answer = saved(terminal, tmp_path / "talk.json")["messages"]
    assert user == {"role": "user", "content": "talk to me"}
    assert answer["stopped"] is True
    assert WORDS.startswith(answer["content"]) and "word3" in answer["content"] and len(answer["content"]) < len(WORDS)
    terminal.ask("/model mock", "Model: mock")
    terminal.ask("still with me?", "still with me?")
    assert len(saved(terminal, tmp_path / "talk.json")["messages"]) == 4
    assert terminal.leave() == 0


def test_control_c_before_the_first_word(terminal: Terminal, tmp_path: Path) -> None:
    terminal.ask("/model silent", "Model: silent")
    terminal.expect("> ")
    terminal.type("anybody?\n")
    terminal.expect("anybody?")
    time.sleep(0.5)
    terminal.type("\x03")
    terminal.expect("[stopped]", 5)
    assert saved(terminal, tmp_path / "talk.json")["messages"] == []
    terminal.ask("/model mock", "Model: mock")
    terminal.ask("/retry", "anybody?")  # the message was not lost
    assert terminal.leave() == 0


def test_control_c_at_the_prompt_says_how_to_leave(terminal: Terminal) -> None:
    terminal.type("half a tho")
    terminal.expect("half a tho")
    time.sleep(0.2)  # a signal in the instant before readline waits for a key is seen by CPython with the next key only
    terminal.type("\x03")
    terminal.expect("Ctrl-D or /exit leaves")
    terminal.expect("> ")
    terminal.ask("whole", "whole")
    assert terminal.ask("/exit", "\n")
    assert terminal.process.wait(20) == 0


def test_an_error_is_one_line_and_harms_nothing(terminal: Terminal, tmp_path: Path) -> None:
    terminal.ask("first", "first")
    terminal.ask("/model failing", "Model: failing")
    assert terminal.ask("second", "Too busy just now.\r\n").count("\n") == 2  # the echo's, and its own
    terminal.ask("/model broken", "Model: broken")
    terminal.ask("third", "half of")
    terminal.expect("\r\nThe engine fell over.\r\n")
    terminal.ask("/model no-such-model", "Model: no-such-model")
    before = saved(terminal, tmp_path / "talk.json")["messages"]
    assert [turn["content"] for turn in before] == ["first", "first"]
    terminal.ask("/model mock", "Model: mock")
    terminal.ask("/retry", "third")
    assert len(saved(terminal, tmp_path / "talk.json")["messages"]) == 4
    assert terminal.leave() == 0


def test_the_commands(terminal: Terminal, tmp_path: Path) -> None:
    terminal.ask("/models", "mock-embedding")
    terminal.ask("/temprature 1", "did you mean /temperature?")
    terminal.ask("/temperature 0.5", "Temperature: 0.5")
    terminal.ask("/temperature warm", "warm is not a number")
    terminal.ask("/temperature 9", "Temperature: 9")
    terminal.ask("too hot", "temperature")  # the server's sentence names the parameter
    terminal.ask("/temperature off", "left to the model")
    terminal.ask("one", "one")
    terminal.ask("two", "two")
    terminal.ask("/undo", "Taken back: two")
    terminal.ask("/retry", "one")
    path = tmp_path / "talk.json"
    assert [turn["content"] for turn in saved(terminal, path)["messages"]] == ["one", "one"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    terminal.ask("/new", "A new conversation.")
    terminal.ask("/undo", "nothing to take back")
    terminal.ask(f"/load {path}", "2 messages, model mock")
    terminal.ask("/load", "Say which file")
    terminal.ask("/load /no/such/file", "No such file")
    terminal.ask("/help", "Ctrl-C stops an answer")
    terminal.ask("/usr/bin is what?", "/usr/bin is what?")  # a path is no command
    assert terminal.leave() == 0


def test_messages_of_several_lines(terminal: Terminal, tmp_path: Path) -> None:
    terminal.type("one\\\n")
    terminal.expect("... ")
    terminal.ask("two", "two")
    terminal.expect("> ")
    terminal.type('"""three\n')
    terminal.expect("... ")
    terminal.type("\n")
    terminal.expect("... ")
    terminal.ask('four"""', "four")
    users = [turn["content"] for turn in saved(terminal, tmp_path / "talk.json")["messages"][::2]]
    assert users == ["one\ntwo", "three\n\nfour"]


def test_words_of_a_model_do_not_steer_the_terminal(terminal: Terminal) -> None:
    terminal.ask("/model cursing", "Model: cursing")
    shown = terminal.ask("go", "after")
    assert "\x1b" not in shown and "\x07" not in shown


@pytest.mark.parametrize(("more", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours_where_they_are_wanted(served: Served, tmp_path: Path, more: dict[str, str], coloured: bool) -> None:
    terminal = Terminal("--data", str(tmp_path), environment=environment(served, **{"TERM": "xterm", **more}))
    try:
        assert ("\x1b[2m" in terminal.expect("leave")) is coloured
    finally:
        terminal.close()


def test_lines_are_remembered_and_nobody_else_reads_them(served: Served, tmp_path: Path) -> None:
    for asked in ("something private", None):
        terminal = Terminal("--model", "mock", "--data", str(tmp_path), environment=environment(served))
        terminal.expect("> ")
        if asked:
            terminal.ask(asked, asked)
        else:
            terminal.type("\x1b[A\n")  # arrow up, then send
            terminal.expect("something private")
            terminal.expect("something private")
        assert terminal.leave() == 0
        terminal.close()
    assert stat.S_IMODE((tmp_path / "chat_history").stat().st_mode) == 0o600


# In a pipe ------------------------------------------------------------------------------------------------------------


def run(*arguments: str, input: str | None = None, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    stdin = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, env=environment, **stdin)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    ("flags", "input", "answer"),
    [
        ([], "hi from a pipe\n", "hi from a pipe\n"),
        (["-m", "hi"], None, "hi\n"),
        (["-m", "read this:"], "the text\n", "read this:\n\nthe text\n"),
    ],
)
def test_a_single_message(served: Served, flags: list[str], input: str | None, answer: str) -> None:
    done = run("--model", "mock", *flags, input=input, environment=environment(served))
    assert (done.returncode, done.stdout, done.stderr) == (0, answer, "")


def test_a_single_message_that_fails(served: Served) -> None:
    done = run("--model", "failing", "-m", "hi", environment=environment(served))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "tertulia: Too busy just now.\n")
    wrong = run("-m", "hi", environment=environment(served, OPENAI_API_KEY="sk-wrong-key-for-this-one"))
    assert wrong.returncode == 1 and "Incorrect API key" in wrong.stderr and wrong.stderr.count("\n") == 1
    nobody = run("-m", "hi", "--base-url", "http://127.0.0.1:9", environment=environment(None))
    assert (
        nobody.returncode == 1 and nobody.stderr == "tertulia: http://127.0.0.1:9 does not answer: Connection refused\n"
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-m", " "], "nothing to ask"),
        (["-m", "hi", "--base-url", "ftp://x"], "is not an address"),
        (["-m", "hi", "--api-key", "two\nlines"], "cannot carry"),
        (["--temperature", "warm"], "invalid float"),
    ],
)
def test_what_cannot_be_meant_ends_with_2(served: Served, flags: list[str], words: str) -> None:
    done = run(*flags, environment=environment(served))
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1 and not done.stdout
    assert "two" not in done.stderr  # a key is not shown


def test_the_answer_that_was_cut_says_so(served: Served) -> None:
    done = run("--model", "mock", "--max-tokens", "2", "-m", "one two three", environment=environment(served))
    assert done.stdout.split() == ["one", "two"] and "token limit" in done.stderr


def test_it_starts_a_server_of_its_own(tmp_path: Path) -> None:
    own = environment(None, TERTULIA_CHAT_MODEL="mock", TERTULIA_EMBEDDING_MODEL="mock-embedding")
    done = run("--model", "mock", "-m", "hi", "--data", str(tmp_path / "new"), environment=own)
    assert (done.returncode, done.stdout) == (0, "hi\n"), done.stderr
    assert done.stderr.startswith("No server answers")


def test_control_c_also_with_a_server_of_its_own(tmp_path: Path) -> None:
    """The server's thread must neither take the signal nor end of it."""
    (tmp_path / "tertulia.toml").write_text(CONFIG)
    own = environment(None, TERTULIA_CHAT_MODEL="mock", TERTULIA_EMBEDDING_MODEL="mock-embedding")
    config = ["--config", str(tmp_path / "tertulia.toml"), "--data", str(tmp_path / "data")]
    terminal = Terminal("--model", "slow", *config, environment=own)
    try:
        terminal.expect("> ")
        terminal.ask("talk", "word3 ")
        terminal.type("\x03")
        terminal.expect("[stopped]", 5)
        terminal.ask("/model mock", "Model: mock")
        terminal.ask("here?", "here?")
        assert terminal.leave() == 0
    finally:
        terminal.close()


def test_it_finds_the_running_server_by_the_data_directory(served: Served) -> None:
    (served.data / "client.env").write_text(
        f"export OPENAI_BASE_URL={served.base_url}\nexport OPENAI_API_KEY={served.api_key}\n"
    )
    done = run("--model", "mock", "-m", "hi", "--data", str(served.data), environment=environment(None))
    assert (done.returncode, done.stdout, done.stderr) == (0, "hi\n", "")
