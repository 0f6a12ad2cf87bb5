"""The exceptions of Tertulia, each with the HTTP status, type and code by which the official SDK knows it.

    TertuliaError                     500 server_error
    ├── BadRequest                    400 invalid_request_error; `param` names the culprit, `code` says what is wrong
    │   └── ContextLengthExceeded     400 context_length_exceeded
    ├── Unauthorized                  401; invalid_api_key where a key was sent
    ├── Forbidden                     403 insufficient_permissions
    ├── NotFound                      404
    │   └── ModelNotFound             404 model_not_found
    ├── MethodNotAllowed              405
    ├── Conflict                      409
    ├── TooLarge                      413
    ├── RateLimited                   429 rate_limit_exceeded, worth another try after `retry_after` seconds
    ├── QuotaExceeded                 429 insufficient_quota, not worth another try
    ├── Overloaded                    503 server_is_overloaded, worth another try
    ├── Unavailable                   503 database_unavailable: nothing can be changed or proved now, worth another try
    ├── DeadlineExceeded              504 the call took longer than its deadline
    ├── EngineFailed                  502 what should have answered broke (a crashed child, an upstream out of reach)
    │   ├── BadUpstreamAnswer         502 bad_upstream_answer: the upstream said something that is no answer
    │   └── UpstreamTimeout           504 upstream_timeout: the upstream did not say it in time; the message says which
    ├── UpstreamRefused               502, as a rule the upstream's own status: its error body, passed on
    └── SettingsError                 never sent: a configuration that cannot be used; the CLI prints it, exits with 2

The message of each is the sentence a caller reads; it holds no key, no prompt and no path of the server.
"""

from __future__ import annotations

import msgspec

encode = msgspec.json.Encoder().encode
LONGEST_MESSAGE, LONGEST_PARAM = 8192, 256  # characters; what a caller or an upstream said may be in them


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


class TertuliaError(Exception):
    """The server had an error while processing your request. Sorry about that!"""

    status = 500
    type = "server_error"
    code: str | None = None
    retry: bool | None = None  # what x-should-retry says; None leaves the choice to the client

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
        retry_after: float | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """`retry_after` is in seconds; `headers` are sent with the answer as they are."""
        self.message = _cut(message or (self.__doc__ or "").strip(), LONGEST_MESSAGE)
        super().__init__(self.message)
        self.param = None if param is None else _cut(param, LONGEST_PARAM)
        self.retry_after = retry_after
        self.headers = headers
        if code is not None:
            self.code = code
        if type is not None:
            self.type = type

    def body(self) -> bytes:
        """The JSON body, all four keys present as the SDK expects."""
        return encode({"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}})

    def event(self) -> bytes:
        """The same as a server-sent event, for a stream that has begun: the SDK raises APIError on it."""
        return b"data: " + self.body() + b"\n\n"


class BadRequest(TertuliaError):
    """The request could not be understood."""

    status, type, retry = 400, "invalid_request_error", False


class ContextLengthExceeded(BadRequest):
    """The prompt does not fit the model's context."""

    code = "context_length_exceeded"


class Unauthorized(TertuliaError):
    """You didn't provide an API key."""

    status, type, retry = 401, "invalid_request_error", False


class Forbidden(TertuliaError):
    """You have insufficient permissions for this operation."""

    status, type, retry = 403, "invalid_request_error", False
    code = "insufficient_permissions"


class NotFound(TertuliaError):
    """There is nothing of that name here."""

    status, type, retry = 404, "invalid_request_error", False


class ModelNotFound(NotFound):
    """The model does not exist or you do not have access to it."""

    code = "model_not_found"

    def __init__(self, model: str) -> None:
        super().__init__(f"The model `{model}` does not exist or you do not have access to it.")


class MethodNotAllowed(TertuliaError):
    """That method is not allowed here."""

    status, type, retry = 405, "invalid_request_error", False


class Conflict(TertuliaError):
    """The object's state forbids it."""

    status, type, retry = 409, "invalid_request_error", False


class TooLarge(TertuliaError):
    """The request body is too large."""

    status, type, retry = 413, "invalid_request_error", False


class RateLimited(TertuliaError):
    """Rate limit reached."""

    status, type, retry = 429, "requests", True
    code = "rate_limit_exceeded"


class QuotaExceeded(TertuliaError):
    """You exceeded your current quota, please check your plan and billing details."""

    status, type, retry = 429, "insufficient_quota", False
    code = "insufficient_quota"


class Overloaded(TertuliaError):
    """The model is temporarily overloaded. Please try again later."""

    status, type, retry = 503, "service_unavailable_error", True
    code = "server_is_overloaded"


class Unavailable(TertuliaError):
    """The server's database cannot be used at the moment. Please try again later."""

    status, type, retry = 503, "service_unavailable_error", True
    code = "database_unavailable"


class DeadlineExceeded(TertuliaError):
    """The request took longer than it may."""

    status = 504
    code = "deadline_exceeded"


class EngineFailed(TertuliaError):
    """The model stopped working while it answered. It is being restarted; please try again."""

    status, retry = 502, True
    code = "engine_failed"


class BadUpstreamAnswer(EngineFailed):
    """The upstream's answer was not understood."""

    code = "bad_upstream_answer"


class UpstreamTimeout(EngineFailed):
    """The upstream did not answer in time."""

    status = 504
    code = "upstream_timeout"


class UpstreamRefused(TertuliaError):
    """The upstream refused the request."""

    def __init__(
        self,
        status: int,
        answer: bytes | None = None,
        message: str | None = None,
        *,
        retry: bool | None = None,
        retry_after: float | None = None,
    ) -> None:
        """answer is the upstream's error body, passed on as it is; without one the message is said in our own shape.
        retry and retry_after (seconds) are what the upstream's headers say."""
        super().__init__(message, retry_after=retry_after)
        self.status, self._answer, self.retry = status, answer, retry

    def body(self) -> bytes:
        return super().body() if self._answer is None else self._answer


class SettingsError(TertuliaError):
    """The configuration cannot be used."""
