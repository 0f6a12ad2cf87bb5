"""Chat completions by a local model: OpenAI's request to llama.cpp's, and its stream back to OpenAI's chunks.

The child is always asked for a stream; an answer that is not one is folded from it. Choices are asked for together, in
groups no larger than the child's slots, so that a prompt is read once a group. Tools of models whose template knows
none, and every call that must be made, go through toolcalls: a system text, a grammar, and a reader of what comes.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ...core import FINISHED, Call, ModelCard, Usage
from ...errors import BadRequest, ContextLengthExceeded
from ..toolcalls import CallReader, Choice, Plan, call_id, flatten, plan
from .control import COUNTED, Defuser, least_tokens_of_messages, refuse_in_schemas
from .exchange import Body, Child, Events, Exchange, Request
from .messages import has_custom_calls, joined, native, refuse_parts
from .request import Extras, check_bias, extras, refuse_unknown_fields, sampling, seed, unsupported, unsupported_value
from .room import need
from .shapes import ChatStream, ChatWhole, ContentLogprob, Stamp, encode

TEMPLATE_TOKENS = 64  # more than any chat template adds to a conversation
MESSAGE_TOKENS = 16  # more than it adds to a message
CONTINUES = "continue_final_message"  # vLLM's and llama.cpp's: the last message is the beginning of the answer
ACCEPTED = frozenset(("prompt_cache_options", CONTINUES))  # and hints of OpenAI's that change no answer


class _FunctionDelta(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _CallDelta(msgspec.Struct):
    index: int = 0
    function: _FunctionDelta | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_CallDelta] | None = None


class _Logprobs(msgspec.Struct):
    content: list[ContentLogprob] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta
    index: int = 0
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None


class _Progress(msgspec.Struct):
    total: int


class _Event(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None
    prompt_progress: _Progress | None = None


class _Counted(msgspec.Struct):
    input_tokens: int


_event = msgspec.json.Decoder(_Event).decode


class _Message(msgspec.Struct):
    content: str | None = None


class _Spoken(msgspec.Struct):
    message: _Message


class _Decision(msgspec.Struct):
    choices: list[_Spoken]


_decision = msgspec.json.Decoder(_Decision).decode
_counted = msgspec.json.Decoder(_Counted).decode


def too_long(prompt: int | str, context: int) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"This model's maximum context length is {context} tokens. However, your messages resulted in {prompt} tokens. "
        "Please reduce the length of the messages.",
        param="messages",
    )


def too_much(prompt: int, completion: int, context: int) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"This model's maximum context length is {context} tokens. However, you requested {prompt + completion} tokens "
        f"({prompt} in the messages, {completion} in the completion). Please reduce the length of the messages or "
        "completion.",
        param="messages",
    )


def _check_prediction(given: dict[str, Any] | None) -> None:
    """A prediction changes no answer, but one that OpenAI would refuse is refused."""
    if given is None:
        return
    for name in ("type", "content"):
        if given.get(name) is None:
            param = f"prediction.{name}"
            raise BadRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if given["type"] != "content":
        message = f"Invalid value: {given['type']!r}. Supported values are: 'content'."
        raise BadRequest(message, param="prediction.type", code="invalid_value")
    content = given["content"]
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise BadRequest(
            "Invalid type for 'prediction.content': expected a string or an array of text parts.",
            param="prediction.content",
            code="invalid_type",
        )


def refuse(asked: Any, raw: dict[str, Any]) -> Extras:
    """The extra parameters. Raises BadRequest for the first parameter that a local text model cannot honour.

    Hints are accepted: `prediction` (no token of it is ever counted as accepted), cache keys, identifiers, `metadata`,
    and every service tier (the answer says "default", as OpenAI's does when it has no other).
    """
    if raw.get("moderation") is not None:
        raise unsupported("moderation")
    for name in ("audio", "web_search_options"):
        if getattr(asked, name) is not None:
            raise unsupported(name)
    if asked.modalities is not None and "audio" in asked.modalities:
        raise unsupported_value("modalities", "audio", "'text'")
    if asked.reasoning_effort not in (None, "none"):
        raise unsupported("reasoning_effort")
    if asked.verbosity not in (None, "medium"):
        raise unsupported_value("verbosity", asked.verbosity, "'medium'")
    if asked.store:
        raise unsupported("store", "Chat completions are not stored.")
    if raw.get(CONTINUES) and asked.messages[-1].role != "assistant":
        raise BadRequest(
            f"'{CONTINUES}' needs a last message with role 'assistant'.", param=CONTINUES, code="invalid_value"
        )
    if asked.stop and asked.response_format is not None and asked.response_format.type != "text":
        raise unsupported("stop", "A stop sequence would cut the JSON that 'response_format' promises.")
    _check_prediction(asked.prediction)
    refuse_parts(asked.messages)
    refuse_unknown_fields(raw)
    known = ACCEPTED.union(asked.__struct_fields__, ("moderation",))
    if raw.get(CONTINUES) and not raw.get("add_generation_prompt"):
        known |= {"add_generation_prompt"}  # false, as vLLM wants it said
    return extras(raw, known)


class ChatAnswer:
    """The answer to one call."""

    def __init__(self, call: Call, card: ModelCard, fingerprint: str) -> None:
        """Raises BadRequest for what no local model can do."""
        asked = call.asked
        self._call, self._asked, self._card, self._fingerprint = call, asked, card, fingerprint
        self._raw: dict[str, Any] = msgspec.json.decode(call.body)
        self._sampling = sampling(asked, refuse(asked, self._raw), card)
        self._plan = plan(
            self._raw.get("tools") or None, self._raw.get("tool_choice"), asked.parallel_tool_calls,
            self._raw.get("functions"), self._raw.get("function_call"), self._raw.get("response_format"),
        )  # fmt: skip
        self._readers: list[CallReader] | None = None  # of the choices, where calls come as text
        self._kinds: dict[tuple[int, int], str] = {}  # of the calls begun, by choice and number
        self.writer: ChatStream | ChatWhole
        self._count: int = asked.n or 1
        self._limit: int | None = asked.max_completion_tokens or asked.max_tokens
        self._prompt_tokens = self._completion_tokens = self._cached = self._reasoning = 0
        self._tokens = 0  # events with text so far: what to account for if the answer is cut short
        call.reply.on_close(self._settle)

    def need(self, child: Child) -> int:
        """Tokens of the child's memory that the call will probably need."""
        return need(len(self._call.body), self._limit, self._count, child.context_length)

    async def run(self, child: Child) -> None:
        least = least_tokens_of_messages(self._asked.messages, child) if len(self._call.body) > COUNTED else 0
        if least > child.context_length:
            raise too_long(f"at least {least}", child.context_length)
        self._defuse(child)
        plan = self._plan
        question = None if self._goes_natively(child) else plan.choice(self._raw["messages"])
        if question is not None:
            answer = await self._decide(child, question)
            if answer is None:
                return
            plan = plan.chosen(answer)
        body = self._body(child, plan)
        self.writer = self._writer(plan)
        self._readers = [plan.reader() for _ in range(self._count)] if plan.calls and "tools" not in body else None
        exchange = Exchange(self._call, child, "messages", too_long)
        if self._asked.logit_bias:
            await check_bias(self._asked.logit_bias, child)
        if self._limit is not None:
            await self._check_length(exchange, body)
            body["max_tokens"] = self._limit
        elif "max_tokens" in self._card.sampling:
            body["max_tokens"] = int(self._card.sampling["max_tokens"])  # a small model may else go round for ever
        requests = []
        for first in range(0, self._count, child.slots):
            body["n"] = count = min(child.slots, self._count - first)
            body["seed"] = seed(self._asked.seed, first)
            requests.append(Request(b"/v1/chat/completions", encode(body), _Listener(self, first), count))
        await exchange.run(requests, self._finish)

    def _defuse(self, child: Child) -> None:
        """From here on no text of the caller's can be read as a control token of the model."""
        refuse_in_schemas(child.control_tokens, self._raw)
        defuser = Defuser(child.control_tokens)
        for name in ("messages", "tools", "functions"):
            if self._raw.get(name):
                self._raw[name] = defuser.all(self._raw[name])
        if defuser.found:
            self._call.reply.header("x-tertulia-defused", str(defuser.found))
            self._plan = self._plan.told(defuser.all)  # the texts of the tools once more

    def _goes_natively(self, child: Child) -> bool:
        """Whether the template itself can say all that is asked about tools. What must be a call never does: only a
        grammar of ours makes sure of it."""
        plan = self._plan
        return (
            child.template_knows_tools and plan.calls and plan.text and plan.answer is None
            and all(tool.kind == "function" for tool in plan.tools)
            and not has_custom_calls(self._raw["messages"])
        )  # fmt: skip

    async def _decide(self, child: Child, question: Choice) -> str | None:
        """Lets the model choose between its tools and text; None if the call ended meanwhile. The tokens of this are
        not counted in the answer's usage."""
        said: list[str] = []
        body = {
            "messages": question.messages, "grammar": question.grammar, "max_tokens": question.max_tokens,
            "temperature": 0, "stream": False,
        }  # fmt: skip
        listener = Body(lambda answer: said.append(_decision(answer).choices[0].message.content or ""))
        exchange = Exchange(self._call, child, "messages", too_long)
        await exchange.run([Request(b"/v1/chat/completions", encode(body), listener)], lambda: None)
        return said[0] if said else None

    def _body(self, child: Child, plan: Plan) -> dict[str, Any]:
        """The child's request, but for what differs from group to group."""
        asked, messages = self._asked, self._raw["messages"]
        body: dict[str, Any] = {
            **self._sampling, "stream": True, "stream_options": {"include_usage": True}, "return_progress": True,
        }  # fmt: skip
        if body["repeat_last_n"] < 0:
            body["repeat_last_n"] = child.context_length
        if self._goes_natively(child):
            names = {tool.name for tool in plan.tools}
            tools = self._raw.get("tools") or [{"type": "function", "function": f} for f in self._raw["functions"]]
            body["tools"] = [tool for tool in tools if tool["function"]["name"] in names]
            body["parallel_tool_calls"] = asked.parallel_tool_calls is not False
            body["messages"] = joined(native(messages))
        elif child.template_knows_tools and not plan.calls and not has_custom_calls(messages):
            body["messages"] = joined(native(messages))
        else:
            body["messages"] = joined(flatten(messages, plan))
        if self._raw.get(CONTINUES):
            body |= {CONTINUES: True, "add_generation_prompt": False}
        if plan.grammar is not None and "tools" not in body:
            body["grammar"] = plan.grammar
        if plan.calls and not plan.text:
            body.pop("stop", None)  # a call is no text: cut by a stop sequence it would not be valid
        if asked.logprobs:
            body["logprobs"], body["top_logprobs"] = True, max(1, asked.top_logprobs or 0)
        return body

    def _writer(self, plan: Plan) -> ChatStream | ChatWhole:
        stamp = Stamp.new("chatcmpl-", self._card.id, self._fingerprint)
        reply, options = self._call.reply, self._asked.stream_options
        if not self._call.stream:
            return ChatWhole(reply, stamp, self._count, legacy=plan.legacy)
        return ChatStream(reply, stamp, options, self._count, tooled=plan.calls, legacy=plan.legacy)

    async def _check_length(self, exchange: Exchange, body: dict[str, Any]) -> None:
        """Refuses what cannot fit; asks the child for a count only where the number of bytes does not settle it."""
        assert self._limit is not None
        context = exchange.child.context_length
        messages = body["messages"]
        most = len(encode(messages)) + len(encode(body.get("tools"))) + MESSAGE_TOKENS * len(messages) + TEMPLATE_TOKENS
        if most + self._limit <= context:
            return
        question = {name: body[name] for name in ("messages", "tools", "tool_choice") if name in body}
        count = _counted(await exchange.ask(b"/v1/chat/completions/input_tokens", encode(question))).input_tokens
        if count >= context:
            raise too_long(count, context)
        if count + self._limit > context:
            raise too_much(count, self._limit, context)

    def see(self, first: int, event: bytes) -> None:
        """One event of the group of choices that begins with `first`."""
        decoded = _event(event)
        if decoded.prompt_progress is not None:
            self._prompt_tokens = decoded.prompt_progress.total
            return
        for choice in decoded.choices:
            index, delta = first + choice.index, choice.delta
            if delta.content:
                self._tokens += 1
                logprobs = self._logprobs(choice) if choice.logprobs is not None else None
                if self._readers is None:
                    self.writer.text(index, delta.content, logprobs)
                else:
                    self._tell(index, self._readers[index].feed(delta.content), logprobs)
            elif choice.finish_reason is not None:
                self._end(index, choice.finish_reason)
            elif delta.reasoning_content or delta.tool_calls:
                self._tokens += 1
                self._other(index, delta)
        if decoded.usage is not None:
            self._count_up(first, decoded.usage)

    def _logprobs(self, choice: _Choice) -> list[ContentLogprob]:
        assert choice.logprobs is not None
        found = choice.logprobs.content or []
        most = self._asked.top_logprobs or 0
        for entry in found:
            del entry.top_logprobs[most:]
        return found

    def _tell(self, index: int, events: list[Any], logprobs: list[ContentLogprob] | None = None) -> None:
        """What a reader made of the text: the writer hears of text, calls and fragments of arguments."""
        for event in events:
            if event[0] == "text":
                self.writer.text(index, event[1], logprobs)
            elif event[0] == "call":
                _, number, id, kind, name = event
                self._kinds[index, number] = kind
                self.writer.call(index, number, id, name, kind == "custom")
            else:
                _, number, fragment = event
                self.writer.arguments(index, number, fragment, self._kinds[index, number] == "custom")

    def _end(self, index: int, reason: str) -> None:
        if self._readers is not None:
            events, reason = self._readers[index].finish(reason)
            self._tell(index, events)
        elif reason == "tool_calls" and self._plan.legacy:
            reason = "function_call"
        self.writer.finish(index, reason)

    def _other(self, index: int, delta: _Delta) -> None:
        """What a template with tools, or a model that reasons, says beside text."""
        if delta.reasoning_content:
            self._reasoning += 1
            self.writer.reasoning(index, delta.reasoning_content)
        for call in delta.tool_calls or ():
            function = call.function or _FunctionDelta()
            if (index, call.index) not in self._kinds:
                self._kinds[index, call.index] = "function"
                self.writer.call(index, call.index, call_id(), function.name or "")
            if function.arguments:
                self.writer.arguments(index, call.index, function.arguments)

    def _count_up(self, first: int, usage: _Usage) -> None:
        self._prompt_tokens = usage.prompt_tokens  # the same for every choice, and counted once
        if first == 0 and usage.prompt_tokens_details is not None:
            self._cached = usage.prompt_tokens_details.cached_tokens
        self._completion_tokens += usage.completion_tokens

    def _finish(self) -> None:
        self.writer.end(Usage(self._prompt_tokens, self._completion_tokens, self._cached, self._reasoning))

    def _settle(self, outcome: str) -> None:
        if outcome != FINISHED and self._call.reply.usage is None:
            # what was used until then
            self._call.reply.usage = Usage(self._prompt_tokens, self._tokens, self._cached, self._reasoning)


class _Listener(Events):
    """Hears one group of choices; first is the index of the first of them."""

    def __init__(self, answer: ChatAnswer, first: int) -> None:
        self._answer, self._first = answer, first

    def see(self, event: bytes) -> None:
        self._answer.see(self._first, event)

    def flush(self) -> None:
        self._answer.writer.flush()
