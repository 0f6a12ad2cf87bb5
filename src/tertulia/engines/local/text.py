"""Text completions (/v1/completions) by a local model: prompts in any of their four forms, echo and scoring, suffix,
best_of, legacy logprobs.

llama.cpp reports no probabilities of a prompt. To score one, the model is made to say it: a grammar that allows just
these token ids, one after another, while the probabilities reported are the model's own, before grammar and sampling.
A suffix goes to the model's own fill-in-the-middle tokens; an instruct model without them is asked, through its chat
template, to continue the prompt towards the suffix, and stops where the suffix would begin.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ...core import FINISHED, Call, ModelCard, Usage
from ...errors import BadRequest, ContextLengthExceeded
from .control import COUNTED, least_tokens
from .exchange import Body, Child, Events, Exchange, Request
from .request import check_bias, extras, sampling, seed, unsupported
from .room import need
from .shapes import ContentLogprob, LegacyLogprobs, Stamp, TextStream, encode, text_whole

DEFAULT_MAX_TOKENS = 16
START = "<|endoftext|>"  # OpenAI's default prompt: the start of a document
FINAL_FIELDS = ["index", "content", "stop", "stop_type", "tokens_evaluated", "tokens_predicted", "timings"]
Prompt = str | list[int]


class _Timings(msgspec.Struct):
    cache_n: int = 0


class _Progress(msgspec.Struct):
    total: int = 0


class _Event(msgspec.Struct):
    content: str = ""
    index: int = 0
    stop: bool = False
    stop_type: str = ""
    tokens_evaluated: int = 0
    tokens_predicted: int = 0
    completion_probabilities: list[ContentLogprob] | None = None
    timings: _Timings | None = None
    prompt_progress: _Progress | None = None


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Scored(msgspec.Struct):
    completion_probabilities: list[ContentLogprob] = []


class _Content(msgspec.Struct):
    content: str = ""
    prompt: str = ""


class _Props(msgspec.Struct):
    bos_token: str = ""


_event = msgspec.json.Decoder(_Event).decode
_tokens = msgspec.json.Decoder(_Tokens).decode
_scored = msgspec.json.Decoder(_Scored).decode
_content = msgspec.json.Decoder(_Content).decode
_props = msgspec.json.Decoder(_Props).decode


def too_long(prompt: int, context: int, completion: int = 0) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"This model's maximum context length is {context} tokens, however you requested {prompt + completion} tokens "
        f"({prompt} in your prompt; {completion} for the completion). Please reduce your prompt; or completion length.",
        param="prompt",
    )


def prompts_of(given: Any) -> list[Prompt]:
    """The prompts of a request, each a string or token ids; "" stands for the default prompt."""
    if given is None or isinstance(given, str):
        return [given or ""]
    if isinstance(given[0], int):
        return [given]
    return list(given)


class TextAnswer:
    """The answer to one call."""

    def __init__(self, call: Call, card: ModelCard, fingerprint: str) -> None:
        """Raises BadRequest for what no local model can do."""
        asked = call.asked
        raw: dict[str, Any] = msgspec.json.decode(call.body)
        self._call, self._asked, self._card = call, asked, card
        extra = extras(raw, asked.__struct_fields__)
        self._sampling = sampling(asked, extra, card)
        self._limit = DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
        self._wanted: int = asked.n or 1
        self._tries = max(self._wanted, asked.best_of or 1)
        if asked.suffix and asked.echo:
            raise unsupported("echo", "It cannot be combined with 'suffix'.")
        self._prompts = prompts_of(asked.prompt)
        stamp = Stamp.new("cmpl-", card.id, fingerprint)
        self._stamp = stamp
        self._stream = TextStream(call.reply, stamp, asked.stream_options) if call.stream else None
        self._choices = [_Choice(self, index) for index in range(len(self._prompts) * self._tries)]
        self._prompt_tokens = [0] * len(self._prompts)
        self._cached = 0
        self._path = b"/completion"
        call.reply.on_close(self._settle)

    def need(self, child: Child) -> int:
        """Tokens of the child's memory that the call will probably need."""
        return need(len(self._call.body), self._limit, len(self._choices), child.context_length)

    async def run(self, child: Child, fills_in: bool | None) -> None:
        """Answers. fills_in says whether the model has fill-in-the-middle tokens, if a suffix is given."""
        exchange = Exchange(self._call, child, "prompt", too_long)
        if self._asked.logit_bias:
            await check_bias(self._asked.logit_bias, child)
        if self._sampling["repeat_last_n"] < 0:
            self._sampling["repeat_last_n"] = child.context_length
        bodies: list[dict[str, Any]] = []
        for at, given in enumerate(self._prompts):
            prompt = await self._spelled(exchange, given)
            await self._check_length(exchange, at, prompt, child.context_length)
            if self._asked.suffix:
                bodies.append(await self._infill(exchange, prompt, bool(fills_in)))
            else:
                bodies.append({"prompt": prompt})
            if self._asked.echo:
                await self._echo(exchange, at, given, prompt)
        if self._asked.echo and self._asked.logprobs is not None and not await self._score(exchange, child):
            return
        if self._limit == 0:
            self._finish()
            return
        for choice in self._choices:
            choice.begin()
        requests = [request for at, body in enumerate(bodies) for request in self._requests(at, body, child.slots)]
        await Exchange(self._call, child, "prompt", too_long).run(requests, self._finish)

    async def _spelled(self, exchange: Exchange, prompt: Prompt) -> Prompt:
        if prompt:
            return prompt
        start = _tokens(await exchange.ask(b"/tokenize", encode({"content": START, "parse_special": True}))).tokens
        if len(start) == 1:
            return start
        status, body = await exchange.child.pool.fetch("GET", "/props", exchange.child.headers)
        return (_props(body).bos_token if status == 200 else "") or "\n"

    async def _check_length(self, exchange: Exchange, at: int, prompt: Prompt, context: int) -> None:
        """Refuses what cannot fit; counts tokens only where the number of bytes does not settle it."""
        need_count = self._asked.echo and self._asked.logprobs is not None
        if isinstance(prompt, str):
            least = least_tokens(prompt, exchange.child) if len(prompt) > COUNTED else 0
            if least > context:
                raise ContextLengthExceeded(
                    f"This model's maximum context length is {context} tokens, however you requested at least "
                    f"{least + self._limit} tokens (at least {least} in your prompt; {self._limit} for the "
                    "completion). Please reduce your prompt; or completion length.",
                    param="prompt",
                )
            most = len(prompt.encode()) + 2
            if need_count or self._limit == 0 or most + self._limit > context:
                question = {"content": prompt, "add_special": True, "parse_special": True}
                ids = _tokens(await exchange.ask(b"/tokenize", encode(question))).tokens
                self._prompt_tokens[at], most = len(ids), len(ids)
                self._choices[at * self._tries].prompt_ids = ids
        else:
            self._prompt_tokens[at] = most = len(prompt)
            self._choices[at * self._tries].prompt_ids = prompt
        if most + self._limit > context:
            raise too_long(most, context, self._limit)

    async def _echo(self, exchange: Exchange, at: int, given: Prompt, prompt: Prompt) -> None:
        text = given if isinstance(given, str) else ""
        if not isinstance(given, str):
            text = _content(await exchange.ask(b"/detokenize", encode({"tokens": given}))).content
        for choice in self._choices[at * self._tries : (at + 1) * self._tries]:
            choice.echo = text

    async def _score(self, exchange: Exchange, child: Child) -> bool:
        """Fills in the log probabilities of the prompts; False if the call ended meanwhile."""
        firsts = self._choices[:: self._tries]
        for first in firsts:
            token = _content(await exchange.ask(b"/detokenize", encode({"tokens": first.prompt_ids[:1]}))).content
            first.logprobs.add(token, None, None)
        requests = []
        for first in firsts:
            if len(first.prompt_ids) > 1:
                body = scoring(first.prompt_ids, self._asked.logprobs)
                requests.append(Request(b"/completion", encode(body), Body(first.scored)))
        if requests:
            await _Scoring(self._call, child, "prompt", too_long).run(requests, lambda: None)
        if self._call.reply.closed or any(len(c.prompt_ids) != len(c.logprobs.found.tokens) for c in firsts):
            if not self._call.reply.closed:
                raise _unscorable()
            return False
        for first in firsts:
            at = first.index
            for other in self._choices[at + 1 : at + self._tries]:
                other.logprobs = first.logprobs.copy()
        return True

    async def _infill(self, exchange: Exchange, prompt: Prompt, fills_in: bool) -> dict[str, Any]:
        suffix = self._asked.suffix
        if not isinstance(prompt, str):
            prompt = _content(await exchange.ask(b"/detokenize", encode({"tokens": prompt}))).content
        if fills_in:
            self._path = b"/infill"
            return {"input_prefix": prompt, "input_suffix": suffix, "input_extra": []}
        messages = [
            {"role": "system", "content": "You continue texts. Write only the words that lead to the given ending."},
            {"role": "user", "content": f"The text goes on with:\n{suffix}"},
        ]
        rendered = _content(await exchange.ask(b"/apply-template", encode({"messages": messages}))).prompt
        return {"prompt": rendered + prompt, "stop": [*self._sampling.get("stop", ()), _beginning(suffix)]}

    def _requests(self, at: int, body: dict[str, Any], slots: int) -> list[Request]:
        """The tries for one prompt, in groups that read the prompt once."""
        asked, requests = self._asked, []
        body = {
            **self._sampling, **body, "n_predict": self._limit, "stream": True, "return_progress": True,
            "response_fields": FINAL_FIELDS,
        }  # fmt: skip
        if asked.logprobs is not None or self._tries > self._wanted:
            body["n_probs"] = max(1, asked.logprobs or 0)
        for start in range(0, self._tries, slots):
            count = min(slots, self._tries - start)
            first = at * self._tries + start
            body["seed"] = seed(asked.seed, first)
            if count > 1:
                body["n_cmpl"] = count
            else:
                body.pop("n_cmpl", None)
            listener = _Listener(self, self._choices[first : first + count])
            requests.append(Request(self._path, encode(body), listener, count))
        return requests

    def see(self, choice: _Choice, event: _Event) -> None:
        if event.prompt_progress is not None:
            at = choice.index // self._tries
            self._prompt_tokens[at] = event.prompt_progress.total
            return
        if event.stop:
            at = choice.index // self._tries
            self._prompt_tokens[at] = event.tokens_evaluated
            if choice.index % self._tries == 0 and event.timings is not None:
                self._cached += event.timings.cache_n
            choice.tokens = event.tokens_predicted
            choice.finish(event)
            return
        choice.tokens += 1
        choice.text(event)

    def _usage(self) -> Usage:
        return Usage(sum(self._prompt_tokens), sum(choice.tokens for choice in self._choices), self._cached)

    def _settle(self, outcome: str) -> None:
        if outcome != FINISHED and self._call.reply.usage is None:
            self._call.reply.usage = self._usage()  # what was used until then

    def _finish(self) -> None:
        usage = self._usage()
        if self._stream is not None:
            if self._limit == 0:
                for choice in self._choices:
                    choice.begin()
                    self._stream.finish(choice.index, "length")
            self._stream.end(usage)
            return
        if self._limit == 0:
            for choice in self._choices:
                choice.begin()
        chosen: list[_Choice] = []
        for at in range(0, len(self._choices), self._tries):
            tries = self._choices[at : at + self._tries]
            if self._tries > self._wanted:
                tries.sort(key=lambda choice: choice.mean(), reverse=True)
            chosen += tries[: self._wanted]
        shapes = [choice.shape(index) for index, choice in enumerate(chosen)]
        text_whole(self._call.reply, self._stamp, shapes, usage)

    @property
    def stream(self) -> TextStream | None:
        return self._stream

    @property
    def top(self) -> int | None:
        found: int | None = self._asked.logprobs
        return found


class _Scoring(Exchange):
    """The requests that score prompts: the grammar breaks on a token that ends the text."""

    def refused(self, status: int, said: bytes) -> None:
        if b"empty grammar stack" in said:
            self.fail(_unscorable())
        else:
            super().refused(status, said)


def _unscorable() -> BadRequest:
    return BadRequest(
        "A prompt with an end-of-text token inside cannot be scored by this model.",
        param="prompt",
        code="unsupported_value",
    )


def scoring(ids: list[int], top: int) -> dict[str, Any]:
    """The request that makes a model say ids[1:] after ids[0], reporting its own probabilities of them."""
    return {
        "prompt": ids[:1],
        "grammar": "root ::= " + " ".join(f"<[{token}]>" for token in ids[1:]),
        "n_predict": len(ids) - 1,
        "n_probs": max(1, top),
        "temperature": 0,
        "stream": False,
        "cache_prompt": False,
        "response_fields": ["completion_probabilities"],
    }


def _beginning(suffix: str) -> str:
    """Where to stop: the first words of the suffix, long enough not to occur by chance."""
    line = suffix.strip().split("\n")[0]
    return line[:32] or suffix


class _Listener(Events):
    def __init__(self, answer: TextAnswer, choices: list[_Choice]) -> None:
        self._answer, self._choices = answer, choices

    def see(self, event: bytes) -> None:
        decoded = _event(event)
        self._answer.see(self._choices[decoded.index], decoded)

    def flush(self) -> None:
        if self._answer.stream is not None:
            self._answer.stream.flush()


class _Choice:
    """One choice, or one try of best_of."""

    def __init__(self, answer: TextAnswer, index: int) -> None:
        self.answer, self.index = answer, index
        self.echo = ""
        self.prompt_ids: list[int] = []
        self.tokens = 0
        self.logprobs = _Legacy(answer.top or 0)
        self._texts: list[str] = []
        self._reason = "length"
        self._sum, self._count = 0.0, 0

    def begin(self) -> None:
        """The echo, before anything is generated."""
        if not self.answer._asked.echo:
            prompt = self.answer._prompts[self.index // self.answer._tries]
            self.logprobs.offset = len(prompt) if isinstance(prompt, str) else 0
            return
        if self.answer.stream is not None:
            self.answer.stream.text(
                self.index, self.echo, self.logprobs.take() if self.answer.top is not None else None
            )
        else:
            self._texts.append(self.echo)

    def scored(self, body: bytes) -> None:
        for entry in _scored(body).completion_probabilities:
            self.logprobs.add(spelled(entry), entry.logprob, entry)

    def text(self, event: _Event) -> None:
        for entry in event.completion_probabilities or ():
            self._sum += entry.logprob
            self._count += 1
            if self.answer.top is not None:
                self.logprobs.add(spelled(entry), entry.logprob, entry)
        stream = self.answer.stream
        if stream is None:
            self._texts.append(event.content)
        elif event.content or event.completion_probabilities:
            stream.text(self.index, event.content, self.logprobs.take() if self.answer.top is not None else None)

    def finish(self, event: _Event) -> None:
        if event.content:
            self.text(event)
        self._reason = "length" if event.stop_type == "limit" else "stop"
        if self.answer.stream is not None:
            self.answer.stream.finish(self.index, self._reason)

    def mean(self) -> float:
        return self._sum / self._count if self._count else float("-inf")

    def shape(self, index: int) -> dict[str, Any]:
        return {
            "text": "".join(self._texts),
            "index": index,
            "logprobs": self.logprobs.take() if self.answer.top is not None else None,
            "finish_reason": self._reason,
        }


class _Legacy:
    """Collects legacy logprobs; take() hands over what has come since the last time."""

    def __init__(self, top: int) -> None:
        self._top = top
        self.offset = 0
        self.found = self._empty()

    def _empty(self) -> LegacyLogprobs:
        return LegacyLogprobs([], [], [] if self._top else None, [])

    def copy(self) -> _Legacy:
        other = _Legacy(self._top)
        other.offset = self.offset
        found = self.found
        top = None if found.top_logprobs is None else list(found.top_logprobs)
        other.found = LegacyLogprobs(list(found.tokens), list(found.token_logprobs), top, list(found.text_offset))
        return other

    def add(self, token: str, logprob: float | None, entry: ContentLogprob | None) -> None:
        found = self.found
        found.tokens.append(token)
        found.token_logprobs.append(logprob)
        found.text_offset.append(self.offset)
        if found.top_logprobs is not None:
            found.top_logprobs.append(None if entry is None else self._tops(token, entry))
        self.offset += len(token)

    def _tops(self, token: str, entry: ContentLogprob) -> dict[str, float]:
        tops = {spelled(top): top.logprob for top in entry.top_logprobs[: self._top]}
        tops.setdefault(token, entry.logprob)  # OpenAI includes the token chosen, so there may be one more
        return tops

    def take(self) -> LegacyLogprobs:
        found, self.found = self.found, self._empty()
        return found


def spelled(entry: Any) -> str:
    """A token's text; bytes that are not UTF-8 by themselves as OpenAI writes them: bytes:\\xe2\\x80."""
    if entry.bytes is None:
        return str(entry.token)
    try:
        return bytes(entry.bytes).decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.bytes)
