"""What can be configured, by environment variables and by the flags that set them.

A secret is a value that is never shown; it can come from a file instead. All bad values are told at once.
"""

from __future__ import annotations

import base64
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

log = logging.getLogger("botfarm")


def jittered(seconds: float) -> float:
    return seconds * (0.75 + secrets.randbelow(500) / 1000)


# ---- Values ------------------------------------------------------------------------------------------------


class Secret:
    """A value that is never shown: not by print, repr, logging or a traceback."""

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(...)"


WORD = r"^[A-Za-z0-9_.-]{1,63}(?!\n)$"
ORIGIN = r"^(https?://[A-Za-z0-9.:\[\]-]+|\*)(?!\n)$"
RULES = {
    WORD: "write words of 1 to 63 of A-Z a-z 0-9 _ . -, separated by commas",
    ORIGIN: "write origins as https://example.org, separated by commas, or *",
}


def choices_of(kind: Any) -> Iterator[str]:
    """The values of a Literal, wherever in a type it stands."""
    for part in get_args(kind):
        yield from [part] if get_origin(kind) is Literal else choices_of(part)


def in_words(message: str, kind: Any, rules: Mapping[str, str]) -> str:
    """What msgspec says of a value that is not of this kind: with the choices, and without patterns."""
    if message.startswith("Invalid enum value"):
        return f"choose one of {', '.join(choices_of(kind))}"
    return next((rule for pattern, rule in rules.items() if repr(pattern) in message), message)


def read_text(path: Path) -> str:
    """What people wrote into a file, without what editors put around it. ValueError shows nothing of it."""
    try:
        text = path.expanduser().read_bytes().decode("utf-8-sig").strip()
    except OSError as fault:
        raise ValueError(f"it cannot be read ({fault.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None
    except RuntimeError:
        raise ValueError("it cannot be read (there is no such home folder)") from None
    if not text:
        raise ValueError("it is empty")
    return text


KEY_PATTERN = re.compile(r"([A-Za-z0-9_.-]{1,32}):([A-Za-z0-9+/]{43}=)")


def parse_keys(text: str) -> dict[str, bytes]:
    """Keys by id, from `id:key,...`, each 32 bytes in standard base64. ValueError names the id, never the key."""
    keys: dict[str, bytes] = {}
    for number, part in enumerate(text.split(","), 1):
        found = KEY_PATTERN.fullmatch(part.strip())
        if not found:
            raise ValueError(f"key {number} is not id:key with a key of 32 bytes in base64; `keygen` makes one")
        if found[1] in keys:
            raise ValueError(f"the key id {found[1]!r} is there twice")
        keys[found[1]] = base64.b64decode(found[2], validate=True)
    return keys


# ---- Settings ----------------------------------------------------------------------------------------------

Names = Annotated[tuple[Annotated[str, Meta(pattern=WORD)], ...], Meta(min_length=1)]
Origin = Annotated[str, Meta(pattern=ORIGIN)]


class BadSettings(Exception):
    """Every setting that has a bad value, one a line."""


class Settings(Struct, frozen=True, kw_only=True):
    """What can be configured. The variable of `max_ttl` is BOTFARM_MAX_TTL, its flag --max-ttl."""

    database_url: Annotated[Secret | None, "PostgreSQL 14 or newer; without it an embedded one is started"] = None
    home: Annotated[Path, "folder of the embedded database and of the generated key"] = Path(".botfarm")
    host: Annotated[str, "address to listen on"] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535), "port to listen on"] = 8000
    workers: Annotated[int, Meta(ge=1, le=256), "serving processes"] = 1
    keys: Annotated[Secret | None, "id:key,...: the first seals passwords, all unseal; none: hashes only"] = None
    envs: Annotated[Names, "allowed values of env, comma-separated"] = ("prod", "preprod", "stage")
    domains: Annotated[Names, "allowed values of domain, comma-separated"] = ("canary", "regular")
    max_ttl: Annotated[int, Meta(ge=1, le=86400 * 365), "longest ttl of a lock, in seconds"] = 86400
    max_wait: Annotated[int, Meta(ge=0, le=86400), "longest wait for a user, in seconds"] = 300
    max_body: Annotated[int, Meta(ge=1024), "largest body of a request, in bytes"] = 1 << 20
    max_import: Annotated[int, Meta(ge=1024), "largest body of an import, in bytes"] = 1 << 30
    bad_logins: Annotated[
        int, Meta(ge=0, le=1_000_000), "locks in bad-login after which a user is quarantined; 0: never"
    ] = 3
    history_days: Annotated[int, Meta(ge=1, le=36500), "days for which ended locks are remembered"] = 30
    pool_size: Annotated[int, Meta(ge=1, le=1000), "database connections for all but locks, per worker"] = 8
    batch: Annotated[int, Meta(ge=1, le=1000), "most acquires or releases that share one statement"] = 100
    pooler: Annotated[Literal["off", "on"], "on: DATABASE_URL is a PgBouncer in transaction mode"] = "off"
    cors_origins: Annotated[tuple[Origin, ...], "origins whose pages may call (`*`: all), comma-separated"] = ()
    listen_url: Annotated[Secret | None, "address to hear of other replicas' releases; DATABASE_URL if unset"] = None
    auth: Annotated[Literal["off", "on"], "on: calls need an OAuth2 token"] = "off"
    signing_keys: Annotated[Secret | None, "id:key,...: the first signs tokens, all verify; needed with auth"] = None
    log: Annotated[Literal["events", "quiet"], "events: a line for each; quiet: warnings and errors alone"] = "events"

    @classmethod
    def variables(cls) -> dict[str, str]:
        """Field -> name of its environment variable."""
        return {f: "DATABASE_URL" if f == "database_url" else f"BOTFARM_{f.upper()}" for f in cls.__struct_fields__}

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read the environment; BadSettings lists all values that are wrong."""
        values: dict[str, Any] = {}
        faults: dict[str, object] = {}
        for field, variable in cls.variables().items():
            path = environ.get(f"{variable}_FILE") if field in SECRET_SETTINGS else None
            try:
                if text := _text_of(environ, variable, path):
                    values[field] = _typed(field, text)
            except ValueError as fault:
                faults[f"{variable}_FILE" if path else variable] = f"{path}: {fault}" if path else fault
        needed = "BOTFARM_SIGNING_KEYS"
        if values.get("auth") == "on" and not {"signing_keys", needed, f"{needed}_FILE"} & (
            values.keys() | faults.keys()
        ):
            faults[needed] = "needed when BOTFARM_AUTH=on; `python botfarm.py keygen` prints a key"
        if faults:
            raise BadSettings("\n".join(["Bad settings:", *(f"{name}: {fault}" for name, fault in faults.items())]))
        return cls(**values)


LIST_SETTINGS = frozenset({"envs", "domains", "cors_origins"})
SECRET_SETTINGS = frozenset({"database_url", "keys", "listen_url", "signing_keys"})
SETTING_TYPES = get_type_hints(Settings, include_extras=True)


def _text_of(environ: Mapping[str, str], variable: str, path: str | None) -> str | None:
    """The value of a variable, for a secret also from the file that VARIABLE_FILE names. Empty means unset."""
    if path and environ.get(variable):
        raise ValueError(f"set either {variable} or {variable}_FILE, not both")
    return read_text(Path(path)) if path else environ.get(variable)


def _typed(field: str, text: str) -> Any:
    if re.search("[\ud800-\udfff]", text):  # how Python reads bytes that are none
        raise ValueError("it is not text in UTF-8")
    if field in ("keys", "signing_keys"):
        parse_keys(text)
    if field in ("database_url", "listen_url") and not re.match(r"postgres(ql)?://", text):
        raise ValueError("must begin with postgresql://")
    if field == "home":
        text = os.path.expanduser(text)
    if field == "host":
        text = text.strip("[]")
    kind = SETTING_TYPES[field]
    value: Any = [part.strip() for part in text.split(",")] if field in LIST_SETTINGS else text
    try:
        return msgspec.convert(value, kind, strict=False, dec_hook=lambda kind, text: kind(text))
    except msgspec.ValidationError as error:
        raise ValueError(f"{text!r} is not allowed: {in_words(str(error), kind, RULES)}") from None
