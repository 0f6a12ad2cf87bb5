"""From a request's bytes to a typed struct, and from what is wrong with them to the error OpenAI would send.

The structs carry the rules (types, ranges, lengths, choices) as annotations, msgspec applies them in one pass, and only
when one is broken does this module look at the value again to say it in OpenAI's words. It knows no endpoint.
"""

from __future__ import annotations

import re
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from ..errors import BadRequest

try:
    from ._outline import outline  # type: ignore[import-not-found, unused-ignore]  # of the compiled package
except ImportError:
    outline = None

T = TypeVar("T")
Path = list[str | int]

NOT_JSON = (
    "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP library "
    "correctly. The OpenAI API expects a JSON payload, but what was sent was not valid JSON.)"
)
SKIMMED = 8192  # bytes of a body from which on it is worth it
ANY = ""  # in a path: some entry of a mapping, whose key msgspec does not tell; no field has an empty name

_NOUNS = {
    "int": "an integer", "float": "a decimal", "str": "a string", "bool": "a boolean", "array": "an array",
    "object": "an object", "null": "null",
}  # fmt: skip
_BOUND = re.compile(r"Expected `(int|float)` (>=|<=|>|<) (\S+)")
_LENGTH = re.compile(r"Expected `(str|array|object)` of length (>=|<=) (\d+)")
_TYPE = re.compile(r"Expected `([^`]+)`, got `([^`]+)`")
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]+)`")
_MISSING = re.compile(r"Object missing required field `([^`]+)`")
_CHOICE = re.compile(r"Invalid enum value (.*)")
_PATTERN = re.compile(r"Expected `str` matching regex ")


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """The struct in body. Raises BadRequest that names the parameter, with OpenAI's text and code."""
    try:
        try:
            return decoder.decode(body)
        except msgspec.ValidationError as error:
            msgspec.json.decode(body)  # a broken rule is worth telling only if the rest is JSON too
            raise explain(str(error), body, decoder.type) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadRequest(NOT_JSON) from None


def skim(decoder: msgspec.json.Decoder[T], body: bytes) -> T | None:
    """The struct in body, except that texts of more than 2,048 bytes may be cut short; None if it is no shorter way,
    or decode() would refuse body. What is left out has been found valid, so that decode() would not refuse that."""
    short: bytes | None = None if outline is None else outline(body)
    try:
        return None if short is None else decoder.decode(short)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def explain(said: str, body: bytes, shape: Any) -> BadRequest:
    """The BadRequest for what msgspec said of body."""
    what, _, where = said.partition(" - at ")
    keyed = where.startswith("`key` in ")
    path = _path(where.strip().strip("`"))
    if keyed:
        return _wrong_key(what, body, path)
    if ANY in path:
        path = _found(path, body, shape)
    if missing := _MISSING.match(what):
        path.append(missing[1])
        return BadRequest(
            f"Missing required parameter: '{spell(path)}'.", param=spell(path), code="missing_required_parameter"
        )
    if unknown := _UNKNOWN.match(what):
        name = spell([*path, unknown[1][:64]])
        return BadRequest(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
    value = _value(body, path)
    param = spell(path) or None
    if bound := _BOUND.match(what):
        return out_of_bounds(bound[1], bound[2], bound[3], value, param)
    if length := _LENGTH.match(what):
        return _wrong_length(length[1], length[2], int(length[3]), value, param)
    if wrong := _TYPE.match(what):
        if wrong[1] == "null":  # a field that is known, and not to be given
            return BadRequest(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
        return _wrong_type(wrong[1], wrong[2], param)
    if _CHOICE.match(what):
        return not_a_choice(value, choices(shape, path), param)
    if _PATTERN.match(what) and (told := _described(shape, path)):  # a regular expression says little to a caller
        return BadRequest(f"Invalid '{param}': {told}.", param=param, code="invalid_value")
    return BadRequest(f"Invalid value for '{param}': {what}.", param=param, code="invalid_value")


def not_a_choice(value: Any, supported: list[str], param: str | None) -> BadRequest:
    """Invalid value: 'x'. Supported values are: ..."""
    names = [f"'{name}'" for name in supported]
    text = ", ".join(names[:-1]) + (", and " if len(names) > 2 else " and " if names[:-1] else "") + "".join(names[-1:])
    return BadRequest(
        f"Invalid value: '{_short(value)}'. Supported values are: {text}.", param=param, code="invalid_value"
    )


def out_of_bounds(kind: str, sign: str, bound: str, value: Any, param: str | None) -> BadRequest:
    """Invalid 'n': integer above maximum value. kind is int or float, sign one of >=, <=, > and <."""
    noun = "integer" if kind == "int" else "decimal"
    below = sign.startswith(">")
    limit = bound[:-2] if bound.endswith(".0") else bound
    return BadRequest(
        f"Invalid '{param}': {noun} {'below minimum' if below else 'above maximum'} value. "
        f"Expected a value {sign} {limit}, but got {_short(value)} instead.",
        param=param,
        code=f"{noun}_{'below_min' if below else 'above_max'}_value",
    )


def _wrong_length(kind: str, sign: str, limit: int, value: Any, param: str | None) -> BadRequest:
    below = sign == ">="
    size = len(value) if isinstance(value, (str, list, dict)) else "another"
    if kind == "str":
        if below:
            text, code = "empty string. Expected a non-empty string", "empty_string"
        else:
            text, code = f"string too long. Expected a string with maximum length {limit}", "string_above_max_length"
        return BadRequest(
            f"Invalid '{param}': {text}, but got a string with length {size} instead.", param=param, code=code
        )
    if kind == "array":
        bound = f"{'minimum' if below else 'maximum'} length {limit}"
        what = "empty array" if size == 0 else "array too short" if below else "array too long"
        got = "empty array" if size == 0 else f"array with length {size}"
        return BadRequest(
            f"Invalid '{param}': {what}. Expected an array with {bound}, but got an {got} instead.",
            param=param,
            code="empty_array" if size == 0 else "array_below_min_length" if below else "array_above_max_length",
        )
    return BadRequest(
        f"Invalid '{param}': {'too few' if below else 'too many'} properties. Expected an object with at "
        f"{'least' if below else 'most'} {limit} properties, but got an object with {size} properties instead.",
        param=param,
        code="object_below_min_properties" if below else "object_above_max_properties",
    )


def _wrong_type(expected: str, got: str, param: str | None) -> BadRequest:
    wanted = [_NOUNS.get(kind, kind) for kind in expected.split(" | ") if kind != "null"]
    text = wanted[0] if len(wanted) == 1 else "one of " + " or ".join(wanted)
    if param is None:
        return BadRequest(
            f"Invalid body: expected {text}, but got {_NOUNS.get(got, got)} instead.", code="invalid_type"
        )
    return BadRequest(
        f"Invalid type for '{param}': expected {text}, but got {_NOUNS.get(got, got)} instead.",
        param=param,
        code="invalid_type",
    )


def spell(path: Path) -> str:
    """messages[0].content"""
    text = ""
    for step in path:
        if isinstance(step, str):
            step = _short(step)  # a caller may have made it up
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _path(where: str) -> Path:
    # msgspec writes $.messages[0].content; [...] stands for some key of a mapping
    steps: Path = []
    for name, index in re.findall(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]", where.replace("key` in `", "").removeprefix("$")):
        if name:
            steps.append(name)
        else:
            steps.append(ANY if index == "..." else int(index))
    return steps


def _found(path: Path, body: bytes, shape: Any) -> Path:
    """path with the keys of the mapping's entries that break the rule, found by trying one after the other."""
    kinds, found = [shape], Path()
    for step in path:
        kinds = [inner for kind in kinds for inner in _inside(kind, step)]
        if step == ANY:
            entries = _value(body, found)
            wrong = [key for key, entry in (entries or {}).items() if not _fits(entry, kinds)]
            if not wrong:  # the key is given twice, and the other one is right
                return found
            step = wrong[0]
        found.append(step)
    return found


def _fits(value: Any, kinds: list[Any]) -> bool:
    for kind in kinds:
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError:
            continue
        return True
    return False


def _wrong_key(what: str, body: bytes, path: Path) -> BadRequest:
    """A key of the mapping at path is not what its rule says; the only such rule is its length."""
    param = spell(path)
    length = _LENGTH.match(what)
    if length is None or length[2] != "<=":
        return BadRequest(f"Invalid key in '{param}': {what}.", param=param, code="invalid_value")
    longest = max(map(len, _value(body, path) or [""]))
    return BadRequest(
        f"Invalid key in '{param}': string too long. Expected a string with maximum length {length[3]}, "
        f"but got a string with length {longest} instead.",
        param=param,
        code="string_above_max_length",
    )


def _value(body: bytes, path: Path) -> Any:
    try:
        value = msgspec.json.decode(body)
        for step in path:
            value = value[step]
    except (msgspec.DecodeError, LookupError, TypeError, RecursionError):
        return None
    return value


def choices(shape: Any, path: Path) -> list[str]:
    """The supported values of the field at path, read off the annotations of shape."""
    found = [shape]
    for step in path:
        found = [inner for kind in found for inner in _inside(kind, step)]
    return [str(value) for kind in found for value in _literals(kind)]


def _described(shape: Any, path: Path) -> str:
    """The description among the annotations of the field at path: what its pattern means."""
    found = [shape]
    for step in path:
        found = [inner for kind in found for inner in _inside(kind, step)]
    while found:
        kind = found.pop()
        for meta in getattr(kind, "__metadata__", ()):
            if meta.description:
                return str(meta.description)
        found += get_args(kind)[:1] if hasattr(kind, "__metadata__") else []
        if get_origin(kind) in (Union, types.UnionType):
            found += get_args(kind)
    return ""


def _parts(kind: Any) -> list[Any]:
    while hasattr(kind, "__metadata__"):
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, types.UnionType):
        return [part for arg in get_args(kind) for part in _parts(arg)]
    return [kind]


def _inside(kind: Any, step: str | int) -> list[Any]:
    inside = []
    for part in _parts(kind):
        if isinstance(step, int) and get_origin(part) is list:
            inside.append(get_args(part)[0])
        elif isinstance(step, str) and isinstance(part, type) and issubclass(part, msgspec.Struct):
            inside.append(get_type_hints(part, include_extras=True).get(step, Any))
        elif isinstance(step, str) and get_origin(part) is dict:
            inside.append(get_args(part)[1])
    return inside


def _literals(kind: Any) -> list[Any]:
    return [value for part in _parts(kind) if get_origin(part) is Literal for value in get_args(part)]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= 64 else text[:61] + "..."
