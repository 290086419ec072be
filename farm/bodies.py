"""Reading a body: what it says as a struct, or what is wrong with it, in words.

A secret that was sent is never a part of what is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from email.message import Message
from functools import lru_cache
from itertools import islice
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar

import msgspec

from farm.problems import FieldError, Invalid, MalformedBody, UnsupportedMediaType, shown
from farm.settings import WORD, Settings, in_words
from farm.words import PLAIN, RULES, SetPart, forbidden

T = TypeVar("T")

# What msgspec raises for what is no JSON, is no UTF-8, or is nested too deep.
UNREADABLE = (msgspec.DecodeError, UnicodeError, RecursionError)
SECRETS = ("password", "totp")
UTF8 = ("utf-8", "utf8", "us-ascii")  # as Content-Type names it
LONGEST_TYPE = 1000  # characters of a Content-Type: of 60,000 semicolons, Python's own reading takes two seconds


def told(text: str, place: str, value: Any, kind: Any) -> str:
    """What msgspec says of a value, in words, and with the value where that is no secret."""
    text = in_words(text, kind, RULES)
    return text if not place or place.endswith(SECRETS) else f"{shown(value)} is not allowed: {text}"


def _label_error(place: str, labels: dict[str, Any], message: str) -> FieldError:
    for key, value in labels.items():
        if not re.match(WORD, key):
            return FieldError(place, f"the key {shown(key)} is not 1 to 63 of A-Z a-z 0-9 _ . -")
        if not isinstance(value, str) or len(value) > 255 or not re.match(PLAIN, value):
            rule = "must be a text of up to 255 characters without control characters"
            return FieldError(f"{place}.{key}", f"{shown(value)} {rule}")
    return FieldError(place, message)


UNKNOWN, MISSING = "unknown field", "required, but missing"


def _fault(error: msgspec.ValidationError, name: str, value: Any, kind: Any) -> FieldError:
    """What is wrong with a field, or with a body, whose name is empty."""
    text = str(error).partition(" - at ")[0]
    if name == "labels" and isinstance(value, dict):
        return _label_error(name, value, text)
    return FieldError(name or None, told(text, name, value, kind))


fields_of = lru_cache(msgspec.structs.fields)  # a look takes fifty times as long as all else that is done for a part


def _faults(raw: Any, kind: type, settings: Settings, place: str = "") -> Iterator[FieldError]:
    """Every unknown field, and of each other field the first fault, be it by its type or by the settings."""
    if not isinstance(raw, dict):
        try:
            msgspec.convert(raw, kind)
        except msgspec.ValidationError as error:
            yield _fault(error, place, raw, kind)
        return
    fields = {field.name: field for field in fields_of(kind)}
    yield from (FieldError(name, UNKNOWN) for name in raw if name not in fields)
    good = SimpleNamespace()
    for name, field in fields.items():
        if name not in raw:
            yield from [FieldError(name, MISSING)] * field.required
            continue
        try:
            setattr(good, name, msgspec.convert(raw[name], field.type))
        except msgspec.ValidationError as error:
            inner = list(islice(_faults_in_set(raw[name], settings), 100)) if name == "users" else []
            yield from inner or [_fault(error, name, raw[name], field.type)]
    yield from forbidden(settings, good)


def _faults_in_set(parts: Any, settings: Settings) -> Iterator[FieldError]:
    """Of as many parts as a set may have: a body may hold 300,000, which would take minutes."""
    for number, part in enumerate(parts[:100] if isinstance(parts, list) else ()):
        place = f"users[{number}]"
        for fault in _faults(part, SetPart, settings, place):
            yield FieldError(f"{place}.{fault.field}" if isinstance(part, dict) else place, fault.message)


def field_errors(raw: Any, kind: type, settings: Settings) -> list[FieldError]:
    """What is wrong with a body, with the values that were sent (but for secrets)."""
    return list(islice(_faults(raw, kind, settings), 100))


def _number(text: str) -> float:
    """60.0 is 60: in JSON they are the same."""
    number = float(text)
    return int(number) if number.is_integer() else number


UNTYPED = msgspec.json.Decoder(float_hook=_number)


def _convert(raw: Any, kind: type[T], settings: Settings) -> T:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError:
        raise Invalid(field_errors(raw, kind, settings)) from None


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def check_json(body: bytes) -> None:
    """MalformedBody where this is no JSON. (msgspec would refuse half of a surrogate pair, too, and 1e999.)"""
    try:
        json.loads(body.decode(), parse_int=str, parse_float=str, parse_constant=_no_json)
    except (ValueError, RecursionError) as error:  # without its text, which shows a part of what was sent
        why = "nested too deep" if isinstance(error, RecursionError) else "not JSON in UTF-8"
        raise MalformedBody(f"The body can't be read: it is {why}.") from None


def decode_body(body: bytes, kind: type[T], settings: Settings) -> T:
    """A body as its struct. MalformedBody when it is no JSON, Invalid when a value breaks a rule."""
    try:
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.ValidationError:  # once more: for what was sent, and maybe it was just a 60.0
            return _convert(UNTYPED.decode(body), kind, settings)
    except msgspec.ValidationError as error:  # a number of over 4,300 digits
        raise Invalid.field(None, str(error).partition(" - at ")[0]) from None
    except UNREADABLE as error:
        why = str(error) or "nested too deep"
        raise MalformedBody(f"The body is not JSON in UTF-8 that can be read: {why}.") from None


def media_of(content_type: str) -> str:
    """The media type that a Content-Type names. UnsupportedMediaType where it declares another charset than UTF-8."""
    if len(content_type) > LONGEST_TYPE:
        raise UnsupportedMediaType(f"The Content-Type has over {LONGEST_TYPE} characters.")
    media, _, parameters = content_type.partition(";")
    header = Message()
    header["Content-Type"] = content_type
    for name, value in header.get_params([]) if parameters else ():
        charset = value if isinstance(value, str) else value[-1]  # a tuple: RFC 2231
        if name.lower() == "charset" and charset.lower() not in UTF8:
            raise UnsupportedMediaType(f"The charset is {shown(charset)}, but bodies are read in UTF-8: send it so.")
    return media.strip().lower()
