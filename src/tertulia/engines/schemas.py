"""JSON schemas become grammars that a local engine obeys exactly, or a 400 that says why not.

The engine compiles a schema with llguidance and, where it cannot, drops the constraint without a word. So everything
is settled here, before the engine hears of it: a schema is rewritten into the small dialect that llguidance enforces
exactly. Rewriting may only narrow: whatever satisfies the result satisfies the original. (An object that lists its
properties and says nothing of others is closed; a `oneOf` whose branches exclude each other becomes `anyOf`; formats
become patterns.) What cannot be rewritten so is refused with the place and the reason.

This file knows JSON Schema 2020-12 (and what drafts 4 to 7 and OpenAPI spell differently) and llguidance's Lark. It
knows nothing of tools, models or HTTP. `llguidance` must be the release that the engine has inside, see pyproject.
"""

from __future__ import annotations

import math
import re
import re._parser as parser  # type: ignore[import-untyped, unused-ignore]  # the only way to know how large a pattern is
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import msgspec

from ..errors import BadRequest

MAX_BYTES = 256 * 1024  # of a schema as compact JSON
MAX_DEPTH = 48  # of nesting in a schema
MAX_NODES = 20_000  # schemas within a schema, references followed once
MAX_ITEMS = 1000  # array bounds and enum values beyond it make the engine slow; no context holds so many
MAX_LENGTH = 16_384  # a larger maxLength is cut to this, a larger minLength refused
MAX_PATTERN = 5000  # characters of a pattern with its repetitions written out
SAFE_INTEGER = 2**53  # bounds beyond it are not exact in the engine

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")

Path = tuple[str, ...]
Node = Any  # a JSON schema: a dict, or a bool

_encode = msgspec.json.Encoder().encode


class Unenforceable(Exception):
    """A schema, or a place in it, that the engine cannot enforce exactly."""

    def __init__(self, path: Path | str, reason: str = "") -> None:
        place = f"In context={path}, " if isinstance(path, tuple) else path
        super().__init__(place + reason)


def schema_grammar(response_format: dict[str, Any], param: str = "response_format") -> str | None:
    """The grammar for a `response_format` as it is in the request, or None if it asks for text.

    Raises BadRequest with `param` when it is malformed or holds a schema that cannot be enforced.
    """
    rule = format_rule(response_format, param)
    return None if rule is None else f"%llguidance {{}}\nstart: {rule}\n"


def format_rule(response_format: dict[str, Any], param: str = "response_format") -> str | None:
    """As schema_grammar, but only the right-hand side of a Lark rule, for use inside a larger grammar."""
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return json_rule({"type": "object"})
    if kind != "json_schema":
        raise BadRequest(
            f"Invalid value: {kind!r}. Supported values are: 'json_object', 'json_schema', and 'text'.",
            param=f"{param}.type",
            code="invalid_value",
        )
    spec = response_format.get("json_schema")
    if not isinstance(spec, dict):
        raise missing(f"{param}.json_schema")
    name = spec.get("name")
    if name is None:
        raise missing(f"{param}.json_schema.name")
    check_name(name, f"{param}.json_schema.name")
    schema = spec.get("schema")
    if schema is None:
        schema = {}
    try:
        return enforced(schema, bool(spec.get("strict")))
    except Unenforceable as error:
        raise BadRequest(f"Invalid schema for response_format '{name}': {error}", param=param) from None


def function_rule(name: str, parameters: Any, strict: bool, param: str) -> str:
    """The right-hand side of a Lark rule for the arguments of a function; `param` is where its parameters are."""
    try:
        if not parameters:
            return json_rule({"type": "object", "additionalProperties": False})
        if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
            got = parameters.get("type") if isinstance(parameters, dict) else type(parameters).__name__
            raise Unenforceable((), f"schema must be a JSON Schema of 'type: \"object\"', got 'type: {got!r}'.")
        return enforced({"type": "object", **parameters}, strict)
    except Unenforceable as error:
        message = f"Invalid schema for function '{name}': {error}"
        raise BadRequest(message, param=param, code="invalid_function_parameters") from None


def missing(param: str) -> BadRequest:
    return BadRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


def check_name(name: Any, param: str) -> str:
    """A name of a function, tool or schema as OpenAI wants it; raises BadRequest."""
    if not isinstance(name, str):
        message = f"Invalid type for '{param}': expected a string, but got {type(name).__name__} instead."
        raise BadRequest(message, param=param, code="invalid_type")
    if not NAME.match(name):
        message = f"Invalid '{param}': string does not match pattern. Expected a string that matches the pattern "
        raise BadRequest(message + "'^[a-zA-Z0-9_-]{1,64}$'.", param=param, code="invalid_value")
    return name


def enforced(schema: Node, strict: bool = False) -> str:
    """The rule (`%json {...}`) that yields only what validates against the schema; raises Unenforceable."""
    try:
        raw = _encode(schema)
    except (TypeError, ValueError, RecursionError):
        raise Unenforceable((), "schema must be JSON.") from None
    if len(raw) > MAX_BYTES:
        raise Unenforceable((), f"the schema is larger than {MAX_BYTES} bytes.")
    rule, problem = (_small if len(raw) <= 8192 else _large)(raw, strict)
    if problem:
        raise Unenforceable(problem)
    return rule


def _outcome(raw: bytes, strict: bool) -> tuple[str, str]:
    """(rule, "") or ("", what is wrong)."""
    try:
        schema = msgspec.json.decode(raw)
        if strict:
            check_strict(schema)
        rule = json_rule(Rewrite(schema).result())
        problem = compile_problem(f"start: {rule}")
    except Unenforceable as error:
        return "", str(error)
    except (RecursionError, msgspec.DecodeError):
        return "", str(Unenforceable((), "the schema is nested too deeply."))
    return (rule, "") if problem is None else ("", str(Unenforceable((), f"the engine cannot enforce it: {problem}.")))


_small = lru_cache(maxsize=512)(_outcome)
_large = lru_cache(maxsize=16)(_outcome)


def json_rule(schema: dict[str, Any]) -> str:
    """`%json` with a schema of llguidance's dialect. Compact JSON: with free whitespace small models run away in it."""
    return "%json " + _encode({"x-guidance": {"whitespace_flexible": False}, **schema}).decode()


def compile_problem(lark: str) -> str | None:
    """What llguidance says against a grammar, None if nothing."""
    from llguidance import LLMatcher  # here, because few requests need it

    bad, messages = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_lark(lark))
    if not bad and not messages:
        return None
    first = str(messages[0]).split("\n")[0] if messages else "no reason given"
    return re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", first).rstrip(".")


# What keywords there are. Those that only describe are dropped; those of the vocabularies that are neither here nor
# handled below are refused; words that are in no vocabulary are ignored, as JSON Schema demands, unless strict.
DESCRIBING = frozenset((
    "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment",
    "$schema", "$id", "id", "$anchor", "$defs", "definitions", "contentMediaType", "contentEncoding", "contentSchema",
    "discriminator", "nullable", "xml", "externalDocs", "x-guidance", "minContains", "maxContains",
))  # fmt: skip
REFUSED = (
    "not", "if", "then", "else", "contains", "dependencies", "dependentRequired", "dependentSchemas", "$dynamicRef",
    "$recursiveRef", "unevaluatedItems",
)  # fmt: skip
OBJECT = ("properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties")
OBJECT_EXTRA = ("propertyNames", "unevaluatedProperties")
ARRAY = ("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems")
STRING = ("minLength", "maxLength", "pattern", "format")
NUMBER = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
COMBINING = ("$ref", "anyOf", "oneOf", "allOf")
KNOWN = frozenset((*OBJECT, *OBJECT_EXTRA, *ARRAY, *STRING, *NUMBER, *COMBINING, *REFUSED, "type", "enum", "const"))
TYPES = frozenset(("object", "array", "string", "number", "integer", "boolean", "null"))
FAMILIES = {"object": (*OBJECT, *OBJECT_EXTRA), "array": ARRAY, "string": STRING, "number": NUMBER}

_LONG, _SHORT = "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])", "(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
_MONTH_DAY = f"(?:{_LONG}|{_SHORT}|02-(?:0[1-9]|1[0-9]|2[0-8]))"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][48]|[13579][26]|[2468]0)00)"
_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_DATE = f"(?:{_YEAR}-{_MONTH_DAY}|{_LEAP_YEAR}-02-29)"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_N = "[0-9]{1,6}"
_DAYS = f"(?:{_N}Y(?:{_N}M(?:{_N}D)?)?|{_N}M(?:{_N}D)?|{_N}D)"
_HOURS = f"(?:{_N}H(?:{_N}M(?:{_N}S)?)?|{_N}M(?:{_N}S)?|{_N}S)"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_LABEL = "[a-zA-Z](?:[a-zA-Z0-9-]{0,30}[a-zA-Z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL}){{0,6}}"
_H = "[0-9a-fA-F]{1,4}"
_SHORT_IPV6 = (f"(?:{_H}:){{{n}}}(?::{_H}){{1,{7 - n}}}" for n in range(1, 7))
_IPV6 = "|".join((f"(?:{_H}:){{7}}{_H}", *_SHORT_IPV6, f"::{_H}", "::"))
_PATH = "[a-zA-Z0-9._~-]"
# Each is narrower than its RFC, so that every validator agrees with it.
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": f"P(?:{_DAYS}(?:T{_HOURS})?|T{_HOURS}|{_N}W)",
    "email": rf"[a-zA-Z0-9_+-]{{1,32}}(?:\.[a-zA-Z0-9_+-]{{1,32}}){{0,3}}@{_LABEL}(?:\.{_LABEL}){{1,4}}",
    "hostname": _HOST,
    "ipv4": rf"(?:{_BYTE}\.){{3}}{_BYTE}",
    "ipv6": _IPV6,
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[1-8][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    "uri": rf"https?://{_HOST}(?::[1-9][0-9]{{0,3}})?(?:/{_PATH}*)*(?:\?{_PATH}+=(?:{_PATH})*(?:&{_PATH}+={_PATH}*)*)?(?:#{_PATH}*)?",
}
# Formats that say how a value is shown or kept, not what it may be (OpenAPI, pydantic).
LOOSE_FORMATS = frozenset(("password", "binary", "float", "double", "path", "file-path", "directory-path", "textarea"))
INTEGER_FORMATS = {"int32": (-(2**31), 2**31 - 1), "int64": (-SAFE_INTEGER, SAFE_INTEGER)}


def kinds(node: Node) -> frozenset[str]:
    """The JSON types that can satisfy a node, judged by itself alone ("number" includes integers)."""
    if node is False:
        return frozenset()
    every = TYPES - {"integer"}
    if node is True:
        return every
    found = every
    if "type" in node:
        types = node["type"] if isinstance(node["type"], list) else [node["type"]]
        found = frozenset("number" if kind == "integer" else kind for kind in types)
    for values in _values(node):
        found &= frozenset(kind_of(value) for value in values)
    return found


def kind_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object" if isinstance(value, dict) else "number"


def _values(node: dict[str, Any]) -> Iterator[list[Any]]:
    if "const" in node:
        yield [node["const"]]
    if "enum" in node:
        yield node["enum"]


def same(a: Any, b: Any) -> bool:
    """Equality as JSON Schema has it: 1 equals 1.0, but not true."""
    if kind_of(a) != kind_of(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


class Rewrite:
    """One schema on its way into the enforceable dialect."""

    def __init__(self, root: Node) -> None:
        self.root = root
        self.nodes = 0
        self.names: dict[str, str] = {}  # reference -> name in $defs
        self.defs: dict[str, Node] = {}
        self.waiting: list[str] = []
        # A closed object inside a conjunction would forbid what its sibling demands; there, objects stay open.
        self.closing = not any(_conjoined(node) for node in _walk(root))

    def result(self) -> dict[str, Any]:
        """The rewritten schema, with every reference pointing into its own $defs."""
        top = self.node(self.root, (), 0)
        while self.waiting:
            ref = self.waiting.pop()
            self.defs[self.names[ref]] = self.node(self.resolve(ref, ()), (ref,), 0)
        if top is False or not ends(top, self.productive()):
            raise Unenforceable((), "nothing can satisfy it, or only an answer without end.")
        top = {} if top is True else top
        return {**top, "$defs": self.defs} if self.defs else top

    def productive(self) -> frozenset[str]:
        """The definitions that a finite value can satisfy."""
        good: frozenset[str] = frozenset()
        while True:
            more = frozenset(name for name, node in self.defs.items() if name in good or ends(node, good))
            if more == good:
                return good
            good = more

    def resolve(self, ref: Any, path: Path) -> Node:
        """What a local reference points at."""
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise Unenforceable(path, f"$ref {ref!r} does not point into this schema.")
        node = self.root
        for step in ref.split("/")[1:]:
            step = _unescape(step)
            if isinstance(node, dict) and step in node:
                node = node[step]
            elif isinstance(node, list) and step.isdigit() and int(step) < len(node):
                node = node[int(step)]
            else:
                raise Unenforceable(path, f"reference to component '{ref}' which was not found in the schema.")
        return node

    def node(self, node: Node, path: Path, depth: int) -> Node:
        """One schema rewritten; depth counts nesting, references begin anew."""
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise Unenforceable(path, "the schema is nested too deeply or has too many parts.")
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise Unenforceable(path, f"{node!r:.100} is not of type 'object', 'boolean'.")
        for word in REFUSED:
            if word in node:
                raise Unenforceable(path, f"'{word}' is not permitted: the engine cannot enforce it.")
        types = self.types(node, path)
        out: dict[str, Any] = {}
        if types is not None:
            out["type"] = types if len(types) > 1 else types[0]
        self.values(node, out, types, path)
        if types is None or {"number", "integer"} & set(types):
            numbers(node, out, path)
        if types is None or "string" in types:
            strings(node, out, path)
        if types is None or "array" in types:
            self.array(node, out, path, depth)
        if types is None or "object" in types:
            self.object(node, out, path, depth)
        self.combine(node, out, path, depth)
        return out

    def types(self, node: dict[str, Any], path: Path) -> list[str] | None:
        """The types a node allows; where it names none but speaks of one family only, that one."""
        if "type" in node:
            given = node["type"] if isinstance(node["type"], list) else [node["type"]]
            for kind in given:
                if kind not in TYPES:
                    raise Unenforceable(path, f"{kind!r} is not valid under any of the given schemas (type).")
            if not given:
                raise Unenforceable(path, "'type' must not be empty.")
            return sorted(set(given), key=given.index)
        if any(word in node for word in (*COMBINING, "enum", "const")):
            return None
        spoken = [kind for kind, words in FAMILIES.items() if any(word in node for word in words)]
        return spoken if len(spoken) == 1 else None

    def values(self, node: dict[str, Any], out: dict[str, Any], types: list[str] | None, path: Path) -> None:
        """enum and const, less the values of other types."""
        if "enum" in node:
            if not isinstance(node["enum"], list) or not node["enum"]:
                raise Unenforceable(path, "'enum' must be an array with at least one value.")
            if len(node["enum"]) > MAX_ITEMS:
                raise Unenforceable(path, f"'enum' has more than {MAX_ITEMS} values.")
        for values in _values(node):
            kept = [value for value in values if types is None or _fits(value, types)]
            if "enum" in out:
                kept = [value for value in out["enum"] if any(same(value, other) for other in kept)]
            if not kept:
                raise Unenforceable(path, "no value of 'enum' or 'const' is of the given type.")
            for value in kept:
                _check_value(value, path)
            out["enum"] = kept

    def array(self, node: dict[str, Any], out: dict[str, Any], path: Path, depth: int) -> None:
        items, prefix = node.get("items"), node.get("prefixItems")
        if isinstance(items, list):  # a tuple as drafts 4 to 2019-09 spell it
            prefix, items = items, node.get("additionalItems")
        if prefix is not None:
            if not isinstance(prefix, list):
                raise Unenforceable(path, "'prefixItems' must be an array.")
            out["prefixItems"] = [
                self.node(item, (*path, "prefixItems", str(at)), depth + 1) for at, item in enumerate(prefix)
            ]
        if items is not None:
            out["items"] = self.node(items, (*path, "items"), depth + 1)
        low, high = _count(node, "minItems", path), _count(node, "maxItems", path)
        if low is not None and low > MAX_ITEMS:
            raise Unenforceable(path, f"'minItems' is larger than {MAX_ITEMS}.")
        if low:
            out["minItems"] = low
        if high is not None:
            out["maxItems"] = min(high, MAX_ITEMS)
        if node.get("uniqueItems") and (high is None or high > 1):
            raise Unenforceable(path, "'uniqueItems' is not permitted: the engine cannot enforce it.")

    def object(self, node: dict[str, Any], out: dict[str, Any], path: Path, depth: int) -> None:
        properties, patterns = node.get("properties"), node.get("patternProperties")
        required = node.get("required")
        for word, value, kind in (("properties", properties, dict), ("patternProperties", patterns, dict)):
            if value is not None and not isinstance(value, kind):
                raise Unenforceable((*path, word), f"{value!r:.100} is not of type 'object'.")
        if required is not None:
            if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
                raise Unenforceable((*path, "required"), "it must be an array of strings.")
            out["required"] = list(dict.fromkeys(required))
        if properties is not None:
            out["properties"] = {
                name: self.node(each, (*path, "properties", name), depth + 1) for name, each in properties.items()
            }
        if patterns:
            for pattern in patterns:
                check_pattern(pattern, (*path, "patternProperties"))
            out["patternProperties"] = {
                name: self.node(each, (*path, "patternProperties", name), depth + 1) for name, each in patterns.items()
            }
        if self.closed(node):
            out["additionalProperties"] = False
        elif (rest := _rest(node)) is not None:
            out["additionalProperties"] = self.node(rest, (*path, "additionalProperties"), depth + 1)
        self.names_of(node, path)
        self.sizes(node, out, path)

    def closed(self, node: dict[str, Any]) -> bool:
        """Whether the rewritten object allows no properties but the listed."""
        rest = _rest(node)
        if rest is not None:
            return rest is False
        listed = node.get("properties")
        if not self.closing or (listed is None and not node.get("patternProperties")):
            return False
        return set(node.get("required") or ()) <= set(listed or ())

    def names_of(self, node: dict[str, Any], path: Path) -> None:
        """propertyNames and unevaluatedProperties, where they say nothing new."""
        names = node.get("propertyNames")
        if names is not None and names is not True and not _any_string(names):
            raise Unenforceable(path, "'propertyNames' is not permitted: the engine cannot enforce it.")
        beside = any(word in node for word in COMBINING)
        if beside and node.get("unevaluatedProperties", True) is not True:
            raise Unenforceable(path, "'unevaluatedProperties' is not permitted: the engine cannot enforce it.")

    def sizes(self, node: dict[str, Any], out: dict[str, Any], path: Path) -> None:
        """minProperties and maxProperties: free names may repeat and then count once, so only listed ones count."""
        low, high = _count(node, "minProperties", path) or 0, _count(node, "maxProperties", path)
        listed, required = out.get("properties") or {}, out.get("required") or []
        closed = out.get("additionalProperties") is False and not out.get("patternProperties")
        if high is not None and not (closed and len(listed) <= high):
            if len(required) < len(listed):
                raise Unenforceable(path, "'maxProperties' is not permitted with optional properties.")
            out["maxProperties"] = high
        optional = [name for name in listed if name not in required]
        if low <= len(required):
            return
        if low == len(listed):
            out["required"] = [*required, *optional]
        elif low == len(required) + 1 and optional and not any(word in node for word in COMBINING):
            out["anyOf"] = [{"type": "object", "properties": {name: True}, "required": [name]} for name in optional]
        else:
            raise Unenforceable(path, "'minProperties' is not permitted here: the engine cannot enforce it.")

    def combine(self, node: dict[str, Any], out: dict[str, Any], path: Path, depth: int) -> None:
        """$ref, anyOf, oneOf and allOf."""
        if "$ref" in node:
            ref = node["$ref"]
            self.resolve(ref, path)
            if ref not in self.names:
                self.names[ref] = f"d{len(self.names)}"
                self.waiting.append(ref)
            out["$ref"] = "#/$defs/" + self.names[ref]
        for word in ("anyOf", "oneOf", "allOf"):
            if word not in node:
                continue
            branches = node[word]
            if not isinstance(branches, list) or not branches:
                raise Unenforceable(path, f"'{word}' must be an array with at least one schema.")
            if word == "oneOf":
                branches = self.exclusive(node, branches, path)
            target = "anyOf" if word == "oneOf" else word
            made = [self.node(each, (*path, word, str(at)), depth + 1) for at, each in enumerate(branches)]
            if target in out:  # both anyOf and oneOf
                out["allOf"] = [*out.get("allOf", ()), {"anyOf": made}]
            elif target == "allOf" and len(made) == 1 and not out and isinstance(made[0], dict):
                out.update(made[0])
            else:
                out[target] = [*out.get(target, ()), *made]

    def exclusive(self, node: dict[str, Any], branches: list[Node], path: Path) -> list[Node]:
        """The branches of a oneOf, narrowed until what satisfies one cannot satisfy another."""
        tag = node.get("discriminator")
        tag = tag.get("propertyName") if isinstance(tag, dict) else None
        narrowed = [self.tagged(branch, tag) for branch in branches] if isinstance(tag, str) else branches
        for at, one in enumerate(narrowed):
            for beside, other in enumerate(branches):
                if at != beside and not self.apart(one, other, 0):
                    reason = "'oneOf' is not permitted where its alternatives may overlap; use 'anyOf'."
                    raise Unenforceable(path, reason)
        return narrowed

    def tagged(self, branch: Node, tag: str) -> Node:
        """A branch of a discriminated union, its tag made required."""
        target = self.follow(branch)
        if not isinstance(target, dict) or tag not in (target.get("properties") or {}):
            return branch
        required = target.get("required") or []
        return target if tag in required else {**target, "required": [*required, tag]}

    def follow(self, node: Node) -> Node:
        """A node behind bare references."""
        for _ in range(16):
            if not isinstance(node, dict) or "$ref" not in node:
                return node
            if any(word in KNOWN and word != "$ref" for word in node):
                return node
            node = self.resolve(node["$ref"], ())
        return node

    def apart(self, one: Node, other: Node, depth: int) -> bool:
        """Whether nothing that the rewritten `one` allows satisfies `other` as given."""
        one, other = self.follow(one), self.follow(other)
        if one is False or other is False:
            return True
        if one is True or other is True or depth > 8 or not isinstance(one, dict) or not isinstance(other, dict):
            return False
        for word in ("anyOf", "oneOf"):
            if isinstance(one.get(word), list) and all(self.apart(each, other, depth + 1) for each in one[word]):
                return True
            if isinstance(other.get(word), list) and all(self.apart(one, each, depth + 1) for each in other[word]):
                return True
        if not self.family(one) & self.family(other):
            return True
        for values in _values(one):
            for others in _values(other):
                if not any(same(value, each) for value in values for each in others):
                    return True
        return self.family(one) == {"object"} and self.objects_apart(one, other, depth)

    def family(self, node: dict[str, Any]) -> frozenset[str]:
        types = self.types(node, ())
        return kinds(node) if types is None else kinds({**node, "type": types})

    def objects_apart(self, one: dict[str, Any], other: dict[str, Any], depth: int) -> bool:
        mine, theirs = one.get("properties") or {}, other.get("properties") or {}
        must, demands = one.get("required") or [], other.get("required") or []
        if self.closed(one) and not one.get("patternProperties") and any(name not in mine for name in demands):
            return True
        shut = _rest(other) is False and not other.get("patternProperties")
        if shut and any(name not in theirs for name in must):
            return True
        both = [name for name in (*must, *demands) if name in mine and name in theirs]
        return any(self.apart(mine[name], theirs[name], depth + 1) for name in both)


def ends(node: Node, good: frozenset[str]) -> bool:
    """Whether a finite value can satisfy a rewritten node, if those of the definitions `good` can be satisfied."""
    if isinstance(node, bool):
        return node
    if "enum" in node:
        return True
    if "$ref" in node and node["$ref"].rpartition("/")[2] not in good:
        return False
    if "anyOf" in node and not any(ends(each, good) for each in node["anyOf"]):
        return False
    if not all(ends(each, good) for each in node.get("allOf", ())):
        return False
    types = node.get("type")
    if types is None or isinstance(types, list):
        return True
    if types == "array":
        first = [*node.get("prefixItems", ())][: node.get("minItems", 0)]
        more = node.get("minItems", 0) > len(node.get("prefixItems", ()))
        return all(ends(each, good) for each in first) and (not more or ends(node.get("items", True), good))
    listed = node.get("properties", {})
    rest = node.get("additionalProperties", True)
    return all(ends(listed.get(name, rest), good) for name in node.get("required", ()))


def numbers(node: dict[str, Any], out: dict[str, Any], path: Path) -> None:
    """Bounds and multipleOf of numbers."""
    bounds = {word: node[word] for word in NUMBER if word in node}
    for end in ("Minimum", "Maximum"):  # draft 4: a boolean beside the bound
        exclusive = bounds.get("exclusive" + end)
        if isinstance(exclusive, bool):
            del bounds["exclusive" + end]
            if exclusive and end.lower() in bounds:
                bounds["exclusive" + end] = bounds.pop(end.lower())
    if (edges := INTEGER_FORMATS.get(str(node.get("format")))) is not None:
        bounds["minimum"] = max(bounds.get("minimum", edges[0]), edges[0])
        bounds["maximum"] = min(bounds.get("maximum", edges[1]), edges[1])
    for word, value in bounds.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise Unenforceable(path, f"'{word}' must be a number.")
        if abs(value) > SAFE_INTEGER:
            raise Unenforceable(path, f"'{word}' is beyond {SAFE_INTEGER}.")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        out[word] = value
    step = out.get("multipleOf")
    if step is not None and (step <= 0 or (isinstance(step, float) and step * 1024 % 1)):
        # In binary floating point 0.29 is no multiple of 0.01: what we would allow, validators would refuse.
        raise Unenforceable(path, f"'multipleOf' {step} is not permitted: it is not exact in binary floating point.")


def strings(node: dict[str, Any], out: dict[str, Any], path: Path) -> None:
    """Lengths, pattern and format of strings."""
    low, high = _count(node, "minLength", path), _count(node, "maxLength", path)
    if low is not None and low > MAX_LENGTH:
        raise Unenforceable(path, f"'minLength' is larger than {MAX_LENGTH}.")
    if low:
        out["minLength"] = low
    if high is not None:
        out["maxLength"] = min(high, MAX_LENGTH)
    patterns = []
    if "pattern" in node:
        patterns.append(check_pattern(node["pattern"], path))
    name = node.get("format")
    if name is not None and name not in LOOSE_FORMATS and name not in INTEGER_FORMATS:
        if name not in FORMATS:
            raise Unenforceable(path, f"'{name}' is not a valid format.")
        patterns.append(f"^(?:{FORMATS[name]})$")
    if patterns:
        out["pattern"] = patterns[0]
    if len(patterns) > 1:
        out["allOf"] = [*out.get("allOf", ()), {"type": "string", "pattern": patterns[1]}]


def check_pattern(pattern: Any, path: Path) -> str:
    """A pattern that the engine's regular expressions and ECMA's read alike."""
    if not isinstance(pattern, str):
        raise Unenforceable(path, "'pattern' must be a string.")
    if re.search(r"\\[pPbBkuxcAzZQE]|\\[1-9]|\(\?|\[\^?\[|&&|~~|--", re.sub(r"\\\\", "", pattern).replace("(?:", "")):
        raise Unenforceable(path, f"the pattern {pattern!r:.200} is not permitted: the engine cannot enforce it.")
    try:
        size = _expanded(parser.parse(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise Unenforceable(path, f"{pattern!r:.200} is not a 'regex': {error}.") from None
    if size > MAX_PATTERN:  # the engine would give up in the middle of an answer, and go on without a word
        raise Unenforceable(path, f"the pattern {pattern!r:.200} repeats too much.")
    return pattern


def _expanded(tokens: Any) -> int:
    """How long a pattern is with its counted repetitions written out."""
    size = 0
    for operation, argument in tokens:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, inner = argument
            size += _expanded(inner) * max(1, low if high == parser.MAXREPEAT else high)
        elif name == "SUBPATTERN":
            size += _expanded(argument[-1])
        elif name == "BRANCH":
            size += sum(_expanded(inner) for inner in argument[1])
        else:
            size += 1
    return size


def check_strict(schema: Node) -> None:
    """What OpenAI demands of a schema with strict: true, in its words; raises Unenforceable."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind != "object":
        raise Unenforceable((), f"schema must be a JSON Schema of 'type: \"object\"', got 'type: \"{kind}\"'.")
    for path, node in _places(schema, ()):
        if not isinstance(node, dict):
            continue
        for word in node:
            if word not in KNOWN and word not in DESCRIBING:
                raise Unenforceable(path, f"'{word}' is not permitted.")
        if node.get("type") != "object" and "properties" not in node:
            continue
        if node.get("additionalProperties") is not False:
            raise Unenforceable(path, "'additionalProperties' is required to be supplied and to be false.")
        required = node.get("required")
        for name in node.get("properties") or ():
            if not isinstance(required, list) or name not in required:
                reason = "'required' is required to be supplied and to be an array including every key in properties."
                raise Unenforceable(path, f"{reason} Missing '{name}'.")


_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "additionalItems", "unevaluatedProperties", "propertyNames")


def _places(node: Node, path: Path) -> Iterator[tuple[Path, Node]]:
    """Every schema within a schema, with its place; references are not followed."""
    if len(path) > 4 * MAX_DEPTH:
        raise Unenforceable(path[:8], "the schema is nested too deeply.")
    yield path, node
    if not isinstance(node, dict):
        return
    for word in _MAPS:
        if isinstance(node.get(word), dict):
            for name, each in node[word].items():
                yield from _places(each, (*path, word, name))
    for word in (*_LISTS, *_SINGLE):
        value = node.get(word)
        if isinstance(value, list):
            for at, each in enumerate(value):
                yield from _places(each, (*path, word, str(at)))
        elif isinstance(value, dict):
            yield from _places(value, (*path, word))


def _walk(root: Node) -> Iterator[Node]:
    return (node for _, node in _places(root, ()))


def _conjoined(node: Node) -> bool:
    """Whether objects meet in a conjunction at this node."""
    if not isinstance(node, dict):
        return False
    branches = node.get("allOf")
    if isinstance(branches, list) and len(branches) > 1:
        return True
    parts = sum(word in node for word in COMBINING)
    return parts > 1 or (parts == 1 and any(word in node for word in (*OBJECT, *OBJECT_EXTRA)))


def _rest(node: dict[str, Any]) -> Node:
    """The schema of properties that are not listed, None if nothing is said."""
    if "additionalProperties" in node:
        return node["additionalProperties"]
    if any(word in node for word in COMBINING):
        return None
    return node.get("unevaluatedProperties")


def _any_string(node: Node) -> bool:
    return (
        isinstance(node, dict)
        and all(word == "type" or word in DESCRIBING for word in node)
        and (node.get("type", "string") == "string")
    )


def _fits(value: Any, types: list[str]) -> bool:
    kind = kind_of(value)
    return kind in types or (kind == "number" and "integer" in types and float(value).is_integer())


def _check_value(value: Any, path: Path) -> None:
    for inner in _scalars(value):
        if isinstance(inner, (int, float)) and not isinstance(inner, bool) and abs(inner) > SAFE_INTEGER:
            raise Unenforceable(path, f"the number {inner} is beyond {SAFE_INTEGER}.")


def _scalars(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _scalars(each)
    else:
        yield value


def _count(node: dict[str, Any], word: str, path: Path) -> int | None:
    value = node.get(word)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 0:
        raise Unenforceable(path, f"'{word}' must be a non-negative integer.")
    return int(value)


def _unescape(step: str) -> str:
    from urllib.parse import unquote

    return unquote(step).replace("~1", "/").replace("~0", "~")
