"""Field types that several endpoints share, with the ranges of OpenAI's reference."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Model = Annotated[str, Meta(min_length=1, max_length=512)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Count = Annotated[int, Meta(ge=1, le=128)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Stop = str | Annotated[list[str], Meta(max_length=4)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]
Identifier = Annotated[str, Meta(max_length=1024)]


class Foreign(msgspec.Struct, kw_only=True):
    """What no caller may say: where an upstream is, and with which key it is asked. Some gateways act on these fields
    of a body, so they are refused and not passed on to what may be one."""

    api_base: None = None
    api_key: None = None
    api_version: None = None
    base_url: None = None
    custom_llm_provider: None = None
    extra_headers: None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
