"""Reads a request's JSON so that whatever a client sends is an object of ordinary values, or a 400; never an exception further in.

Python's reader takes more than JSON: NaN, integers of any length, keys given twice (the last counts), half surrogates that no encoder can
write, texts in UTF-16. Each has ended requests with a 500 somewhere behind a door, or was read differently by two readers.
"""

import json
import math
import re
from typing import Any

from credence.serve.errors import BadRequest

MAX_DEPTH = 64
"""Objects and lists inside one another; JSON schemas of tools are the deepest that requests have."""
_SHAPES = bytes(ord("0" if chr(byte) in "0123456789" else "e" if chr(byte) in "eE" else " ") for byte in range(256))
"""What a byte is to a number: a digit, the mark of an exponent, or nothing. Looking for these is ten times as fast as a pattern."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(raw: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        BadRequest: it is no JSON object, or holds what no field can mean.
    """
    # Numbers are looked at one by one only where one may be too large: calling back for each costs more than reading it.
    shapes = raw.translate(_SHAPES)
    large = b"0" * 19 in shapes or b"0e" in shapes
    numbers: dict[str, Any] = {"parse_int": _integer, "parse_float": _float} if large else {}
    try:
        body = json.loads(raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant, **numbers)
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError:
        raise BadRequest("the body is not UTF-8 text", param=None) from None
    except ValueError:
        raise BadRequest("the body is not valid JSON", param=None) from None
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object", param=None)
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _check_depth(body)
    if _SURROGATE.search(raw):
        _check_text(body)
    return body


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRequest(f"the body has the key {twice!r:.80} twice; give it once", param=None)
    return result


def _constant(name: str) -> Any:
    raise BadRequest(f"the body holds {name}, which is no JSON number", param=None)


def _integer(digits: str) -> int:
    # Python itself refuses to read more than some thousand digits, with an error of its own.
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise BadRequest(f"the body holds the integer {digits[:24]}..., which has more than 64 bits", param=None)
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise BadRequest(f"the body holds the number {digits[:24]}, which is too large", param=None)
    return value


def _check_depth(body: dict[str, Any]) -> None:
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            inner += value.values() if isinstance(value, dict) else value
        level = [value for value in inner if isinstance(value, dict | list)]
        if not level:
            return
    raise _too_deep()


def _check_text(body: dict[str, Any]) -> None:
    """Refuses half surrogates: a pair is one character by now."""
    try:
        json.dumps(body, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BadRequest(
            "the body holds half of a surrogate pair (\\ud800 to \\udfff), which is no character", param=None
        ) from None


def _too_deep() -> BadRequest:
    return BadRequest(f"the body has more than {MAX_DEPTH} objects and lists inside one another", param=None)
