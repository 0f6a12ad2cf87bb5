"""An engine that is another server: any base URL that speaks the OpenAI API, Azure OpenAI's among them.

It knows an upstream's address, key and models, and writes requests; what becomes of one is in attempts.py. Only what
must be is rewritten: the model name where the upstream calls the model something else, and `stream_options` where the
usage of a stream would not be known otherwise. Its key is sent to its own address alone; redirects are not followed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec

from .. import config
from ..core import Call, ModelCard
from ..errors import BadUpstreamAnswer, EngineFailed, SettingsError, TertuliaError, encode
from .answers import OURS, Headers, Listed, forms, parse_list, refusal, reported, without
from .attempts import Attempt, Stream, Whole
from .connection import Pool
from .proxy import proxy_for
from .timeouts import Timeouts

log = logging.getLogger("tertulia.engines.upstream")
JOIN_LIMIT = 16384  # bytes: a larger body is written by itself, not copied behind its head
DISCOVER_SECONDS = 300.0  # between two looks at an upstream's models
DISCOVER_AGAIN = 1.0  # after a look that failed; then twice as long each time
KEPT_SECRETS = 64  # forms of secrets, of today and before, that are looked for in errors
NAME_LIMIT = 256  # characters of a model's name
USAGE = b',"stream_options":{"include_usage":true}}'
_PATHS = {"chat": "/chat/completions", "completion": "/completions", "embedding": "/embeddings"}
_SECRET = re.compile("auth|cookie|key|secret|token")  # in the name of a header whose value is one
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_options = msgspec.json.Decoder(dict[str, Any] | None)


class _Model:
    """One model: the name it has there, its card, and by task a request up to the length of its body."""

    __slots__ = ("card", "heads", "theirs")

    def __init__(self, theirs: str, card: ModelCard, heads: Mapping[str, bytes]) -> None:
        self.theirs, self.card, self.heads = theirs, card, heads


class Upstream:
    """One upstream with its models: those that the settings name (named), those it lists (`discover`), and those that a
    route asks for (offer), which are listed by whoever asked. on_models_changed is called when models() has changed."""

    def __init__(
        self,
        name: str,
        settings: config.Upstream,
        key: str | None = None,
        environment: Mapping[str, str] = os.environ,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """environment is where the proxy is looked for; headers are those of the settings, where these refer to values.
        Raises SettingsError for an address that cannot be used."""
        self.name = name
        self.on_models_changed: Callable[[], None] | None = None
        self.on_key_refused: Callable[[], None] | None = None
        self._settings = settings
        self._headers = header_lines(name, settings, key, headers)
        self._secrets = _secrets(settings, key, headers)
        self._query = f"?api-version={quote(settings.api_version, safe='')}" if settings.api_version else ""
        self.pool = _pool(name, settings, environment)
        self.first: Timeouts[Attempt] = Timeouts(settings.first_byte_timeout, lambda attempt: attempt.no_beginning())
        self.stall: Timeouts[Attempt] = Timeouts(settings.stall_timeout, lambda attempt: attempt.stalled())
        self.total: Timeouts[Attempt] | None = None
        if settings.timeout is not None:
            self.total = Timeouts(settings.timeout, lambda attempt: attempt.too_long())
        self._ask_usage = settings.stream_usage
        self._heads = self._heads_at("")
        self._models = {ours: self._model(ours, theirs) for ours, theirs in settings.models.items()}
        self.named = frozenset(self._models)
        self._shown = tuple(self._models)
        self._offered: dict[str, _Model] = {}
        self._listed: list[Listed] = []
        self._discovery: asyncio.Task[None] | None = None

    # its models
    def models(self) -> Sequence[ModelCard]:
        return [self._models[ours].card for ours in self._shown]

    def offer(self, model: str) -> ModelCard:
        """One of its models, by the name that the settings give it or by its own. It is asked for by our name; one that
        has none is from now on answered as NAME/MODEL, though not listed."""
        if model in self.named:
            return self._models[model].card
        for ours in self.named:
            if self._models[ours].theirs == model:
                return self._models[ours].card
        ours = f"{self.name}/{model}"
        found = self._models.get(ours)
        if found is None:
            found = self._models[ours] = self._offered[ours] = self._model(ours, model)
        return found.card

    def theirs(self, model: str) -> str:
        """Its own name for a model that we call so."""
        found = self._models.get(model)
        return model if found is None else found.theirs

    def identity(self, model: str) -> object:
        """What, beside the request, says who answers for a model that we call so, and how."""
        where = self._settings
        return (
            self.name, self._models[model].theirs, where.base_url, where.kind, where.api_version, where.organization,
            where.project, sorted(where.headers.items()),
        )  # fmt: skip

    def _model(self, ours: str, theirs: str, length: int | None = None) -> _Model:
        card = ModelCard(
            id=ours,
            kind="embedding" if "embed" in theirs.lower() else "chat",  # its name is all we know of it
            source=f"upstream:{self.name}",
            owned_by=self.name,
            context_length=self._settings.context_length.get(ours) or length,
            capabilities=("continue_final_message",) if self._settings.continues else (),
        )
        place = _deployment(self._settings, theirs)
        return _Model(theirs, card, self._heads_at(place) if place else self._heads)

    def _heads_at(self, place: str) -> dict[str, bytes]:
        return {
            task: self.pool.head(b"POST", f"{place}{path}{self._query}".encode(), self._headers)
            for task, path in _PATHS.items()
        }

    def rekey(self, key: str | None, headers: Mapping[str, str]) -> bool:
        """Sends another key and other headers from the next request on; whether they are others. Those under way, and
        connections, are not disturbed. Raises SettingsError for what cannot be sent, and then nothing has changed."""
        lines = header_lines(self.name, self._settings, key, headers)
        if lines == self._headers:
            return False
        self._headers = lines
        self._secrets = (*_secrets(self._settings, key, headers), *self._secrets)[:KEPT_SECRETS]
        self._heads = self._heads_at("")
        for model in (*self._models.values(), *self._offered.values()):
            place = _deployment(self._settings, model.theirs)
            model.heads = self._heads_at(place) if place else self._heads
        return True

    async def ready(self, model: str) -> bool:
        return True  # an upstream is asked when it is needed

    # discovery
    def start(self) -> None:
        """Begins to look for its models, if it is to; needs the running loop."""
        if self._settings.discover and self._discovery is None:
            self._discovery = asyncio.get_running_loop().create_task(self._discover())

    async def _discover(self) -> None:
        failures = 0
        while True:
            try:
                self._take(await self.list_models())
                failures = 0
            except TertuliaError as error:  # what it offered last stays
                failures += 1
                again = logging.INFO if failures > 1 else logging.WARNING  # said once, not every few seconds
                log.log(again, "upstreams.%s: its models could not be listed: %s", self.name, error.message)
            wait = min(DISCOVER_SECONDS, DISCOVER_AGAIN * 2 ** (failures - 1)) if failures else DISCOVER_SECONDS
            await asyncio.sleep(wait * random.uniform(0.9, 1.1))

    async def list_models(self) -> list[Listed]:
        """What GET /models says. Raises TertuliaError."""
        path = f"{_root(self._settings)}/models{self._query}"
        status, body = await self.pool.fetch("GET", path, self._headers)
        if status != 200:
            raise self.refused(status, (), body)
        try:
            return parse_list(body).data
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise BadUpstreamAnswer("The upstream's list of models was not understood.") from None

    def _take(self, listed: list[Listed]) -> None:
        """Offers these; a name that the settings give to a model keeps its meaning."""
        if listed == self._listed:
            return
        self._listed = listed
        models = {ours: model for ours, model in self._models.items() if ours in self.named}
        for one in listed:
            ours = self._settings.prefix + one.id
            if not one.id or len(one.id) > NAME_LIMIT or _CONTROL.search(one.id) is not None:
                log.warning("upstreams.%s lists %s: this is no name for a model", self.name, ascii(one.id[:NAME_LIMIT]))
            elif ours not in models:
                models[ours] = self._model(ours, one.id, one.max_model_len or one.context_length)
        self._shown, self._models = tuple(models), self._offered | models
        if self.on_models_changed is not None:
            self.on_models_changed()

    # a call
    def answer(self, call: Call) -> Awaitable[None] | None:
        target = call.target
        assert target is not None
        model = self._models.get(target.model)
        if model is None:  # it was discovered, and is gone
            raise EngineFailed(f"The upstream does not offer `{target.model}` any more.")
        asked, body = call.shape, call.body
        hide = False
        if call.stream and self._ask_usage:
            options = asked.stream_options
            hide = options is None or not options.include_usage
        if hide or asked.model != model.theirs:
            body = rewritten(body, None if asked.model == model.theirs else model.theirs, hide)
        request, size = model.heads[call.task.name], len(body)
        if size > JOIN_LIMIT:
            request = b"%s%d\r\n\r\n" % (request, size)
        else:
            request, body = b"%s%d\r\n\r\n%s" % (request, size, body), b""
        if call.stream:
            return Stream(self, call, request, body, hide, asked.n or 1).start()
        return Whole(self, call, request, body).start()

    def refused(self, status: int, headers: Headers, body: bytes) -> TertuliaError:
        """What an answer with another status than 200 means, without our secrets in it."""
        if status in OURS and self.on_key_refused is not None:
            self.on_key_refused()
        return refusal(status, headers, without(body, self._secrets))

    def reported(self, error: Any) -> TertuliaError:
        """What the `error` inside an answer of status 200 means, without our secrets in it."""
        said = encode(error)
        clean = without(said, self._secrets)
        return reported(error if clean == said else msgspec.json.decode(clean))

    def inherit(self, other: Upstream) -> None:
        """Offers what the one it replaces had listed, until it has asked itself."""
        if self._settings.discover:
            self._take(other._listed)

    def retire(self) -> None:
        """No new calls come: it ends with the last that is under way."""
        self.on_models_changed = self.on_key_refused = None
        if self._discovery is not None:
            self._discovery.cancel()
        self.pool.retire()

    async def close(self) -> None:
        if self._discovery is not None:
            self._discovery.cancel()
        for timeouts in (self.first, self.stall, self.total):
            if timeouts is not None:
                timeouts.close()
        self.pool.close()


def rewritten(body: bytes, model: str | None, usage: bool) -> bytes:
    """The body with another model name (None: its own) and, if usage, asking for the usage of the stream. Whatever else
    is in it keeps its bytes. The body has been read as an object with fields before."""
    if model is None and b'"stream_options"' not in body:
        return body.rstrip()[:-1] + USAGE
    fields = _fields.decode(body)
    if model is not None:
        fields["model"] = msgspec.Raw(encode(model))
    if usage:
        options = _options.decode(fields.get("stream_options", b"null")) or {}
        fields["stream_options"] = msgspec.Raw(encode({**options, "include_usage": True}))
    return encode(fields)


def _pool(name: str, settings: config.Upstream, environment: Mapping[str, str]) -> Pool:
    where = f"upstreams.{name}"
    _refuse_more_than_an_address(settings.base_url, f"{where}.base_url")
    try:
        parts = urlsplit(settings.base_url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        return Pool(
            settings.base_url,
            connect_timeout=settings.connect_timeout,
            idle_limit=settings.connections,
            tls_ca=os.path.expanduser(settings.tls_ca) if settings.tls_ca else None,
            proxy=proxy_for(parts.scheme, host, port, environment) if host else None,
            who="upstream",
        )
    except (ValueError, UnicodeError):
        got = "" if "@" in settings.base_url else f", got {settings.base_url!r}"  # before it may be a password
        raise SettingsError(f"{where}.base_url: expected an http or https URL{got}") from None
    except OSError as error:
        raise SettingsError(f"{where}.tls_ca: {settings.tls_ca} cannot be used ({error.strerror})") from None


def _refuse_more_than_an_address(url: str, setting: str) -> None:
    """Raises SettingsError for what would not be sent, without repeating it: it may be a secret."""
    if "?" in url or "#" in url:
        raise SettingsError(f"{setting}: an address ends with its path; what follows a ? or # cannot be sent")
    host = (url.partition("://")[2] or url).partition("/")[0]
    if "@" in host:
        raise SettingsError(
            f"{setting}: a user name and password have no place there; `key` or `headers` can hold them"
        )


def _secrets(settings: config.Upstream, key: str | None, headers: Mapping[str, str] | None) -> tuple[bytes, ...]:
    """What of the lines that every request has nobody is to read in an error."""
    given = headers or {}
    hidden = [key or ""]
    for name, value in settings.headers.items():
        if given.get(name, value) != value or _SECRET.search(name.lower()) is not None:
            value = given.get(name, value)
            hidden += [value, value.rpartition(" ")[2]]  # `Bearer KEY`
    return forms(*hidden)


def header_lines(
    name: str, settings: config.Upstream, key: str | None, headers: Mapping[str, str] | None = None
) -> bytes:
    """The lines that every request has. Raises SettingsError, without the value, for one that no header can have."""
    lines = {"content-type": "application/json", "user-agent": "tertulia"}
    if key:
        lines["api-key" if settings.kind == "azure" else "authorization"] = (
            key if settings.kind == "azure" else f"Bearer {key}"
        )
    if settings.organization:
        lines["openai-organization"] = settings.organization
    if settings.project:
        lines["openai-project"] = settings.project
    for header, value in (settings.headers if headers is None else headers).items():
        lines[header.lower()] = value
    for header, value in lines.items():
        clean = header.replace("-", "").replace("_", "").isalnum() and header.isascii()
        if not clean or not all(" " <= letter <= "~" for letter in value):
            raise SettingsError(f"upstreams.{name}: the header {header!r}, or its value, cannot be sent")
        if header in ("host", "content-length", "transfer-encoding", "connection"):
            raise SettingsError(f"upstreams.{name}.headers: {header} is not for the settings to say")
    return "".join(f"{header}: {value}\r\n" for header, value in lines.items()).encode("ascii")


def _root(settings: config.Upstream) -> str:
    """What is between the base URL and the paths of the API: nothing, but for Azure OpenAI with an api_version."""
    path = urlsplit(settings.base_url).path.rstrip("/")
    classic = settings.kind == "azure" and settings.api_version and not path.endswith("/openai/v1")
    if not classic or "/openai/deployments/" in path:
        return ""
    return "" if path.endswith("/openai") else "/openai"


def _deployment(settings: config.Upstream, theirs: str) -> str:
    """Azure OpenAI's place of a model in the path; "" where models have none."""
    path = urlsplit(settings.base_url).path.rstrip("/")
    if settings.kind != "azure" or not settings.api_version or path.endswith("/openai/v1"):
        return ""
    return "" if "/openai/deployments/" in path else f"{_root(settings)}/deployments/{quote(theirs, safe='')}"
