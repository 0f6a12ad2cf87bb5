"""What becomes of a call when its upstream fails: the table. Pure data: tests/faults/test_matrix.py holds a real server
to each cell of it, and docs/build.py makes docs/outcomes.md of it. It says what is promised, not what the code does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

TASKS = ("chat", "completions", "embeddings")
WHENS = ("before", "middle")
MODES = ("one", "fallback", "continue")
RETRIES = 1  # as the tests configure it: tries after the first


@dataclass(frozen=True)
class Fault:
    """before, middle: what the upstream does then. impossible: why it cannot come mid-stream."""

    before: str
    middle: str = ""
    impossible: str = ""


FAULTS = {
    "500": Fault("answers with status 500", "an error event with that error, which ends the stream"),
    "503": Fault("answers with status 503", "an error event with that error, which ends the stream"),
    "429": Fault("answers with status 429 and `retry-after`", "an error event with that error, which ends the stream"),
    "hang": Fault(
        "takes the request and says nothing", impossible="an upstream that hangs after some of its answer stalls"
    ),
    "cut": Fault("closes the connection after the head, or half of a body", "closes the connection"),
    "stall": Fault("the head, or half of a body, then silence", "silence, the connection open"),
    "garbage": Fault("status 200 and what is no JSON", "an event that is no JSON, then more of the stream"),
    "refused": Fault("nobody listens", impossible="a stream that flows has its connection"),
    "loris": Fault("its answer comes byte by byte", "the rest of the stream comes byte by byte"),
    "dns": Fault("its name does not resolve", impossible="a stream that flows has its connection"),
    "tls": Fault("its certificate is not trusted", "what comes is not what its key encrypted"),
}
NO_STREAM = "embeddings are never streamed"


@dataclass(frozen=True)
class Cell:
    """One combination. stream: whether the call asks for one."""

    fault: str
    when: str
    mode: str
    task: str
    stream: bool

    @property
    def name(self) -> str:
        return f"{self.fault}-{self.when}-{self.mode}-{self.task}-{'stream' if self.stream else 'whole'}"

    @property
    def impossible(self) -> str:
        """Why there is no such call, or nothing."""
        if self.when == "middle":
            return NO_STREAM if self.task == "embeddings" else FAULTS[self.fault].impossible
        return ""


@dataclass(frozen=True)
class Outcome:
    """What a caller, the ledger and the upstream see.

    ending: `answer` (whole and correct), `error` (an HTTP answer with a typed error), `event` (a typed error event ends
    the stream) or `continued` (one unbroken stream, of two targets). attempts: calls of a target, with the fallback's.
    ledger: the outcome in the one entry.
    """

    ending: str
    status: int
    type: str | None
    code: str | None
    attempts: int
    ledger: str


# What the caller is told of each fault, when there is nobody left to ask: status, type, code. An error that is the
# upstream's own is passed on as it is; mock_* are the codes of tests/mock_upstream.py.
FAILED = (502, "server_error", "engine_failed")
NO_ANSWER = (502, "server_error", "bad_upstream_answer")
TIMEOUT = (504, "server_error", "upstream_timeout")
TOLD = {
    "500": (500, "server_error", "mock_500"),
    "503": (503, "server_error", "mock_503"),
    "429": (429, "server_error", "mock_429"),
    **dict.fromkeys(("cut", "refused", "dns", "tls"), FAILED),
    **dict.fromkeys(("hang", "stall", "loris"), TIMEOUT),
    "garbage": NO_ANSWER,
}


def expected(cell: Cell) -> Outcome:
    """What is promised for a cell that is possible."""
    status, kind, code = TOLD[cell.fault]
    if cell.when == "before":
        if cell.mode == "one":
            return Outcome("error", status, kind, code, 1 + RETRIES, "failed")
        return Outcome("answer", 200, None, None, 2 + RETRIES, "finished")
    if cell.mode == "continue":
        return Outcome("continued", 200, None, None, 2, "finished")
    return Outcome("event", 200, kind, code, 1, "failed")


def cells() -> Iterator[Cell]:
    """Every combination, possible or not; a stream and a whole answer where a call may ask for either."""
    for fault in FAULTS:
        for when in WHENS:
            for mode in MODES:
                for task in TASKS:
                    yield Cell(fault, when, mode, task, when == "middle")
                    if when == "before" and task != "embeddings":
                        yield Cell(fault, when, mode, task, True)


# ---- docs/outcomes.md

PAGE = f"""\
# What becomes of a call when its upstream fails

Every cell is a test over real sockets (`tests/faults/test_matrix.py`), for chat, completions and embeddings, as a
stream and as a whole answer, with `retries = {RETRIES}`. In each of them the call ends within its deadline, is answered
once, has one line in the access log and one entry in the ledger, and the upstream is asked as often as the table says.

- *one target*: the model has one target and no fallback.
- *fallback*: another model is named in `fallback`. `x-tertulia-model` says who answered, `x-tertulia-fallback` whom the
  caller asked, `x-tertulia-attempts` how many tries that took.
- *continue*: the same, with `on_break = "continue"`.

An error that is the upstream's own is passed on as it is, with its status, type and code.
"""
BEFORE = """
## Before the first byte of the answer

Streams and whole answers alike. Nothing of the answer has left, so another try cannot be seen. A call that fails in the
end costs nothing: its entry in the ledger has no tokens.

"""
MIDDLE = """
## Mid-stream

Chat and completions; embeddings are never streamed. What the caller has cannot be taken back, so nothing is tried
again, unless the route continues streams. The entry in the ledger holds the tokens that came.

"""
FOOTNOTE = """
A *typed error event* is `data: {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}`, the last event of
the stream; the official client raises `APIError` on it.
"""
NAMES = {
    "hang": "hang", "cut": "cut", "stall": "stall", "garbage": "garbage", "refused": "connection refused",
    "loris": "slow loris", "dns": "DNS failure", "tls": "TLS failure",
}  # fmt: skip


def told(outcome: Outcome) -> str:
    """A cell of the table, in words."""
    tries = f"{outcome.attempts} attempts" if outcome.attempts > 1 else "1 attempt"
    if outcome.ending == "answer":
        return f"the fallback's answer; {tries}"
    if outcome.ending == "continued":
        return f"one unbroken stream, the rest from the fallback; {tries}"
    own = str(outcome.code).startswith("mock_")
    error = "the upstream's" if own else f"`{outcome.type}`, `{outcome.code}`"
    if outcome.ending == "error":
        return f"status {outcome.status}, {error}; {tries}"
    return f"a typed error event, {error}; {tries}"


def page() -> str:
    """docs/outcomes.md."""
    head = "| fault | the upstream | one target | fallback | continue |\n| --- | --- | --- | --- | --- |\n"
    before, middle, never = "", "", ""
    for name, fault in FAULTS.items():
        shown = NAMES.get(name, name)
        row = [told(expected(Cell(name, "before", mode, "chat", True))) for mode in MODES]
        before += f"| {shown} | {fault.before} | {' | '.join(row)} |\n"
        if fault.impossible:
            never += f"- {shown}, mid-stream: {fault.impossible}.\n"
            continue
        row = [told(expected(Cell(name, "middle", mode, "chat", True))) for mode in MODES]
        middle += f"| {shown} | {fault.middle} | {' | '.join(row)} |\n"
    never += f"- every fault mid-stream, embeddings: {NO_STREAM}.\n"
    return PAGE + BEFORE + head + before + MIDDLE + head + middle + "\nWhat cannot be:\n\n" + never + FOOTNOTE
