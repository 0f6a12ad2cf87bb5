"""Who may use a child's memory: the calls of one child share one pool of tokens, and all fail when it overflows.

So a call enters with what it will probably need and waits, first come first served, while that is not free. It is an
estimate (an answer without a limit may become longer): what still overflows is a typed error that is worth another try.
"""

from __future__ import annotations

import asyncio
from collections import deque

from ...core import Reply

UNLIMITED_ANSWER = 1024  # tokens expected of an answer that no limit was given for
BYTES_A_TOKEN = 3  # of a prompt, rather few


def need(prompt_bytes: int, limit: int | None, choices: int, context: int) -> int:
    """Tokens that a call will probably hold: its prompt once, and its choices."""
    prompt = prompt_bytes // BYTES_A_TOKEN + 1
    return prompt + choices * min(UNLIMITED_ANSWER if limit is None else limit, max(1, context - prompt))


class Room:
    """The memory of one child, in tokens."""

    def __init__(self, tokens: int) -> None:
        self._all = self._free = tokens
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, tokens: int, reply: Reply) -> int:
        """Waits for room and returns the tokens to give back with leave(); 0 if the reply closed meanwhile."""
        tokens = max(1, min(tokens, self._all))
        if self._waiting or tokens > self._free:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((tokens, turn))

            def give_up(outcome: str) -> None:
                turn.cancel()

            reply.on_close(give_up)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self.leave(tokens)  # it was our turn just as we were cancelled
                else:
                    self._let_in()
                if reply.closed:
                    return 0
                raise
            if reply.closed:
                self.leave(tokens)
                return 0
            return tokens
        self._free -= tokens
        return tokens

    def leave(self, tokens: int) -> None:
        self._free += tokens
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting:
            tokens, turn = self._waiting[0]
            if turn.done():
                self._waiting.popleft()
            elif tokens <= self._free:
                self._waiting.popleft()
                self._free -= tokens
                turn.set_result(None)
            else:
                return
