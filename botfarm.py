"""BotFarm: a pool of test users that end-to-end tests lock, use and give back.

A test user ("bot") is an account on the system under test. Two tests must never use one at the same time,
so a test acquires a lock on a free user that fits, works, and releases it. A lock ends by itself when its
ttl has passed, so a killed test frees its user.

    POST /locks          {"project_id": ..., "env": "stage"}   -> 201 with the lock and the password
    PATCH /locks/{id}    heartbeat: the lock now ends ttl seconds from now
    DELETE /locks/{id}   give the user back

Sections, in reading order:

    Settings     what can be configured, and how bad values are told
    Words        the structs that callers send and get
    Problems     everything that can be refused, as application/problem+json
    Database     the SQL files, the connection pools, migrations
    Passwords    sealed or hashed; opened only for the reply that grants a lock
    Clients      who may call, and whose a lock is, with BOTFARM_AUTH=on
    Coalescing   calls that arrive while a statement runs share the next one
    Log          one JSON line per event on standard error, written by a thread
    Events       what happens to users and locks: counted for GET /metrics, and logged, which is the audit trail
    Waiting      who gets whom when calls wait, alone or for a set
    Farm         what the handlers share
    Calls        how a handler declares its path, query, body and refusals
    Tokens       POST /token
    Users        create, list, change, verify, quarantine, history, pools
    Import       NDJSON and CSV, all or nothing; export
    Locks        acquire, extend, release
    Operations   health, the sweep, pruning
    App          the routes and their OpenAPI document
    Commands     python botfarm.py --help
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import base64
import contextlib
import copy
import csv
import fcntl
import gc
import hashlib
import hmac
import importlib.resources
import io
import ipaddress
import itertools
import json
import logging
import mmap
import os
import platform
import re
import resource
import secrets
import select
import signal
import socket
import sys
import tempfile
import termios
import threading
import time
import uuid
from array import array
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar, cast, get_args, get_origin, get_type_hints
from urllib.parse import parse_qsl, unquote_plus

import argon2
import asyncpg
import httpx
import jwt
import msgspec
import uvicorn
import yoyo
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from litestar import HttpMethod, Litestar, Request, Response, delete, patch, post, put, route
from litestar.config.cors import CORSConfig
from litestar.datastructures import State
from litestar.exceptions import ClientException, HTTPException
from litestar.response import Stream
from litestar.static_files import create_static_files_router
from msgspec import UNSET, Meta, Struct, UnsetType
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as MetricFamily
from rich.console import Console
from rich.progress import Progress, TextColumn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.supervisors import Multiprocess
from yoyo.backends.base import DatabaseBackend

import embedded

VERSION = "0.1.0"
HERE = Path(__file__).resolve().parent
log = logging.getLogger("botfarm")

# ------------------------------------------------------------------------------------------------------
# Settings: one typed struct from the environment. Flags of the command line are written into the
# environment first, so both ways in are one.
# ------------------------------------------------------------------------------------------------------


class Secret:
    """A value that is never shown: not by print, repr, logging or a traceback."""

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(...)"


class BadSettings(Exception):
    """Every setting that has a bad value, one a line."""


WORD = r"^[A-Za-z0-9_.-]{1,63}(?!\n)$"
ORIGIN = r"^(https?://[A-Za-z0-9.:\[\]-]+|\*)(?!\n)$"
Names = Annotated[tuple[Annotated[str, Meta(pattern=WORD)], ...], Meta(min_length=1)]
Origin = Annotated[str, Meta(pattern=ORIGIN)]


class Settings(Struct, frozen=True, kw_only=True):
    """What can be configured. The variable of `max_ttl` is BOTFARM_MAX_TTL, its flag --max-ttl."""

    database_url: Annotated[Secret | None, "PostgreSQL 14 or newer; without it an embedded one is started"] = None
    home: Annotated[Path, "folder of the embedded database and of the generated key"] = Path(".botfarm")
    host: Annotated[str, "address to listen on"] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535), "port to listen on"] = 8000
    workers: Annotated[int, Meta(ge=1, le=256), "serving processes"] = 1
    keys: Annotated[Secret | None, "id:key,...: the first seals passwords, all unseal; none: hashes only"] = None
    envs: Annotated[Names, "allowed values of env"] = ("prod", "preprod", "stage")
    domains: Annotated[Names, "allowed values of domain"] = ("canary", "regular")
    max_ttl: Annotated[int, Meta(ge=1, le=86400 * 365), "longest ttl of a lock, in seconds"] = 86400
    max_wait: Annotated[int, Meta(ge=0, le=86400), "longest wait for a user, in seconds"] = 300
    max_body: Annotated[int, Meta(ge=1024), "largest body of a request, in bytes"] = 1 << 20
    max_import: Annotated[int, Meta(ge=1024), "largest body of an import, in bytes"] = 1 << 30
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
        faults: list[str] = []
        for field, variable in cls.variables().items():
            try:
                text = _from_environment(environ, variable, field in SECRET_SETTINGS)
                if text is not None:
                    values[field] = _typed_setting(field, text)
            except (ValueError, OSError) as error:
                faults.append(f"{variable}: {error}")
        keys = ("BOTFARM_SIGNING_KEYS", "BOTFARM_SIGNING_KEYS_FILE")
        if values.get("auth") == "on" and not any(environ.get(name) for name in keys):
            faults.append(f"BOTFARM_SIGNING_KEYS: {NO_SIGNING_KEY}")
        if faults:
            raise BadSettings("\n".join(["Bad settings:", *faults]))
        return cls(**values)


LIST_SETTINGS = frozenset({"envs", "domains", "cors_origins"})
SECRET_SETTINGS = frozenset({"database_url", "keys", "listen_url", "signing_keys"})
NO_SIGNING_KEY = "needed when BOTFARM_AUTH=on; `python botfarm.py keygen` prints a key"
_SETTING_TYPES = get_type_hints(Settings, include_extras=True)


def _from_environment(environ: Mapping[str, str], variable: str, is_secret: bool) -> str | None:
    """The value of a variable, for a secret also from the file that VARIABLE_FILE names. Empty means unset."""
    if is_secret and (path := environ.get(f"{variable}_FILE")):
        if environ.get(variable):
            raise ValueError(f"set either {variable} or {variable}_FILE, not both")
        return Path(path).read_text(encoding="utf-8").strip()
    return environ.get(variable) or None


def _typed_setting(field: str, text: str) -> Any:
    if field in ("keys", "signing_keys"):
        parse_keys(text)
    if field in ("database_url", "listen_url") and not re.match(r"postgres(ql)?://", text):
        raise ValueError("must begin with postgresql://")
    if field in SECRET_SETTINGS:
        return Secret(text)
    kind = _SETTING_TYPES[field]
    if get_args(kind)[0] is Path:
        return Path(text)
    value: Any = tuple(part.strip() for part in text.split(",")) if field in LIST_SETTINGS else text
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        choices = get_args(get_args(kind)[0]) if get_origin(get_args(kind)[0]) is Literal else ()
        rule = f"choose one of {', '.join(choices)}" if choices else in_words(error)
        raise ValueError(f"{text!r} is not allowed: {rule}") from None


# ------------------------------------------------------------------------------------------------------
# Words: the structs that callers send and get. Limits that settings decide are checked by `check_words`.
# The patterns end in (?!\n)$ because a bare $ would let a final newline through in Python.
# ------------------------------------------------------------------------------------------------------

LABEL_PAIR = r"^[A-Za-z0-9_.-]{1,63}:[^\x00-\x1f\x7f-\x9f]{0,255}(?!\n)$"
PLAIN = r"^[^\x00-\x1f\x7f-\x9f]*(?!\n)$"
NO_NUL = r"^[^\x00]*$"
Fence = Annotated[int, Meta(ge=0, le=1 << 62)]
LabelKey = Annotated[str, Meta(pattern=WORD)]
LabelValue = Annotated[str, Meta(max_length=255, pattern=PLAIN)]
Labels = Annotated[dict[LabelKey, LabelValue], Meta(max_length=32, examples=[{"role": "admin"}])]
Login = Annotated[str, Meta(min_length=1, max_length=254, pattern=PLAIN, examples=["bot-1"])]
Password = Annotated[str, Meta(min_length=1, max_length=1024, pattern=NO_NUL, examples=["correct horse"])]
Holder = Annotated[str, Meta(max_length=200, pattern=PLAIN, description="who asks, for people and bulk release")]
Reason = Annotated[str, Meta(min_length=1, max_length=500, pattern=PLAIN, examples=["login page says: blocked"])]
ProjectId = Annotated[uuid.UUID, Meta(examples=["11111111-1111-4111-8111-111111111111"])]
Ttl = Annotated[int, Meta(ge=1, description="seconds until the lock ends by itself")]
Wait = Annotated[int, Meta(ge=0, description="seconds to wait for a user that comes free")]
Env = Annotated[str, Meta(description="one of BOTFARM_ENVS", examples=["stage"])]
Domain = Annotated[str, Meta(description="one of BOTFARM_DOMAINS", examples=["regular"])]
Cooldown = Annotated[int, Meta(ge=0, le=86400, description="seconds that the user rests")]


class Body(Struct, forbid_unknown_fields=True, omit_defaults=False):
    """What a caller sends: unknown fields are refused, so a mistyped filter never widens a call."""


class NewUser(Body):
    login: Login
    password: Password
    project_id: ProjectId
    env: Env
    domain: Domain = "regular"
    labels: Labels = {}


class ImportedUser(Body):
    """A line of an import: like a new user, but a known one keeps its password when there is none."""

    login: Login
    project_id: ProjectId
    env: Env
    password: Password | None = None
    domain: Domain = "regular"
    labels: Labels = {}


class UserChanges(Body):
    login: Login | UnsetType = UNSET
    password: Password | UnsetType = UNSET
    domain: Domain | UnsetType = UNSET
    labels: Labels | UnsetType = UNSET


class PasswordCheck(Body):
    password: Password


class QuarantineReason(Body):
    reason: Reason


class AcquireLock(Body):
    project_id: ProjectId
    env: Env | None = None
    domain: Domain | None = None
    labels: Labels = {}
    ttl: Ttl = 300
    wait: Wait = 0
    holder: Holder = ""


class AcquireUser(Body):
    ttl: Ttl = 300
    wait: Wait = 0
    holder: Holder = ""


class SetPart(Body):
    """Some users of a set, all under one filter."""

    project_id: ProjectId
    env: Env | None = None
    domain: Domain | None = None
    labels: Labels = {}
    count: Annotated[int, Meta(ge=1, le=100)] = 1


class AcquireSet(Body):
    users: Annotated[list[SetPart], Meta(min_length=1, max_length=100)]
    ttl: Ttl = 300
    wait: Wait = 0
    holder: Holder = ""


class ExtendLock(Body):
    ttl: Ttl | None = None


class UserLock(Struct):
    """The current lock of a user as everybody may see it: never its id."""

    holder: str
    fence: int
    acquired_at: datetime
    expires_at: datetime


class User(Struct):
    id: uuid.UUID
    created_at: datetime
    login: str
    project_id: uuid.UUID
    env: str
    domain: str
    labels: dict[str, str]
    state: Annotated[str, Meta(extra_json_schema={"enum": ["free", "locked", "resting", "quarantined"]})]
    locktime: datetime | None
    lock: UserLock | None
    quarantine: str | None


class UserPage(Struct):
    items: list[User]
    next: str | None


class Ended(Struct):
    fence: int
    holder: str
    acquired_at: datetime
    ended_at: datetime | None
    ended_by: Annotated[str | None, Meta(extra_json_schema={"enum": ["released", "expired", "forced", None]})]


class HistoryPage(Struct):
    items: list[Ended]
    next: str | None


class Pool(Struct):
    project_id: uuid.UUID
    env: str
    domain: str
    total: int
    free: int
    locked: int
    resting: int
    quarantined: int
    waiting: int


class PoolList(Struct):
    items: list[Pool]


class LockedUser(Struct, omit_defaults=True):
    id: uuid.UUID
    login: str
    project_id: uuid.UUID
    env: str
    domain: str
    labels: dict[str, str]
    password: str | UnsetType | None = UNSET


class Lock(Struct):
    """`password` stands only in the reply that grants a lock; null where only hashes are stored."""

    id: uuid.UUID
    fence: int
    holder: str
    ttl: int
    acquired_at: datetime
    expires_at: datetime
    user: LockedUser


class LockSet(Struct):
    """In the order in which the users were asked for."""

    locks: list[Lock]


class Health(Struct):
    status: str


class Valid(Struct):
    valid: bool


class Released(Struct):
    released: int


class Imported(Struct):
    created: int
    updated: int
    unchanged: int


def check_words(settings: Settings, body: Any) -> list[FieldError]:
    """What settings forbid in a body that is otherwise well formed."""
    faults = []
    for field, allowed in (("env", settings.envs), ("domain", settings.domains)):
        value = getattr(body, field, None)
        if isinstance(value, str) and value not in allowed:
            faults.append(FieldError(field, f"{_shown(value)} is not one of {', '.join(allowed)}"))
    for field, longest in (("ttl", settings.max_ttl), ("wait", settings.max_wait)):
        seconds = getattr(body, field, None)
        if isinstance(seconds, int) and seconds > longest:
            faults.append(FieldError(field, f"{seconds} is over the longest {field} of {longest} seconds"))
    if isinstance(body, AcquireSet):
        faults += _check_set(settings, body)
    return faults


def _check_set(settings: Settings, body: AcquireSet) -> list[FieldError]:
    parts = enumerate(body.users)
    faults = [FieldError(f"users[{i}].{f.field}", f.message) for i, part in parts for f in check_words(settings, part)]
    if (total := sum(part.count for part in body.users)) > 100:
        faults.append(FieldError("users", f"{total} users are asked for, but a set has 100 at the most"))
    return faults


def _shown(value: Any) -> str:
    """A value as an error message shows it, cut when long."""
    try:
        text = json.dumps(value, ensure_ascii=True, default=str)
    except RecursionError:
        return "what is nested so deep"
    return text if len(text) <= 80 else text[:77] + '..."'


# ------------------------------------------------------------------------------------------------------
# Problems: one class per outcome. The docstring is the default detail; expected ones are returned, not
# raised, on the hot path, because raising costs more than the rest of the reply.
# ------------------------------------------------------------------------------------------------------


class FieldError(Struct):
    field: str | None
    message: str


class LineError(Struct):
    line: int
    field: str | None
    message: str


class ProblemDetails(Struct):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str


class Problem(Exception):
    """Something was refused."""

    status: ClassVar[int] = 500
    slug: ClassVar[str] = "internal-error"
    retry_after: ClassVar[int | None] = None

    def __init__(self, detail: str | None = None, *, headers: Mapping[str, str] | None = None, **members: Any) -> None:
        super().__init__(detail or self.__doc__)
        self.detail = detail or (self.__doc__ or "").strip()
        self.members = members
        self.headers = dict(headers or {})

    @property
    def title(self) -> str:
        return self.slug.replace("-", " ").capitalize()

    def response(self) -> Refused:
        if self.retry_after is not None:
            self.headers.setdefault("Retry-After", str(self.retry_after))
        content = {
            "type": f"urn:botfarm:{self.slug}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            **self.members,
        }
        refused = Refused(
            content=msgspec.json.encode(content),
            status_code=self.status,
            media_type="application/problem+json",
            headers=self.headers,
        )
        refused.slug = self.slug
        return refused


class Refused(Response[bytes]):
    """The reply of a problem, which knows its slug, so that all refusals are counted in one place."""

    slug: str


class MalformedBody(Problem):
    """The body is not JSON in UTF-8."""

    status, slug = 400, "malformed-body"


class Unauthenticated(Problem):
    """A token is needed: get one at POST /token, and send it as `Authorization: Bearer ...`."""

    status, slug = 401, "unauthenticated"

    def __init__(self, fault: str | None = None) -> None:
        """With what is wrong with the token that was sent (RFC 6750 section 3.1)."""
        wrong = f', error="invalid_token", error_description="{fault}"' if fault else ""
        super().__init__(fault, headers={"WWW-Authenticate": f'Bearer realm="botfarm"{wrong}'})


class Forbidden(Problem):
    """The token lacks the scope or the project."""

    status, slug = 403, "forbidden"

    def __init__(self, detail: str, scope: str | None = None) -> None:
        needed = f', scope="{scope}"' if scope else ""
        challenge = f'Bearer realm="botfarm", error="insufficient_scope"{needed}'
        super().__init__(detail, headers={"WWW-Authenticate": challenge})

    @classmethod
    def scope(cls, scope: str) -> Forbidden:
        return cls(f"The token lacks the scope {scope!r}: ask for it at /token, as far as the client has it.", scope)

    @classmethod
    def project(cls, project_id: uuid.UUID, where: str = "") -> Forbidden:
        return cls(f"{where}The client is limited to projects, and {project_id} is none of them.")


class UserNotFound(Problem):
    """There is no such user."""

    status, slug = 404, "user-not-found"


class NotFound(Problem):
    """There is no such page."""

    status, slug = 404, "not-found"


class LockNotHeld(Problem):
    """The lock is not held: its id is unknown, or the lock has ended."""

    status, slug = 404, "lock-not-held"


class NoMatchingUser(Problem):
    """No user at all matches the filter, so waiting would not help: create one, or ask for less."""

    status, slug = 404, "no-matching-user"


class MethodNotAllowed(Problem):
    """The method is not allowed here."""

    status, slug = 405, "method-not-allowed"


class BodyTooLarge(Problem):
    """The body is too large."""

    status, slug = 413, "body-too-large"


class HeadTooLarge(Problem):
    """The head of the request is over 64 KiB."""

    status, slug = 431, "head-too-large"


class UnsupportedMediaType(Problem):
    """The content type is not supported."""

    status, slug = 415, "unsupported-media-type"


class LoginTaken(Problem):
    """The login exists already in that project and env."""

    status, slug = 409, "login-taken"


class UserLocked(Problem):
    """The user is held by another."""

    status, slug = 409, "user-locked"


class UserUnavailable(Problem):
    """The user is resting or quarantined."""

    status, slug = 409, "user-unavailable"


class PoolExhausted(Problem):
    """Users match, but none is free."""

    status, slug, retry_after = 409, "pool-exhausted", 1


class LockEnded(Problem):
    """The lock of this idempotency key has ended: use a new key for a new lock."""

    status, slug = 409, "lock-ended"


class Invalid(Problem):
    """A value breaks a rule."""

    status, slug = 422, "invalid"

    def __init__(self, errors: Sequence[FieldError | LineError]) -> None:
        first = "; ".join(f"{e.field}: {e.message}" if e.field else e.message for e in errors[:3])
        super().__init__(first + ("; ..." if len(errors) > 3 else ""), errors=list(errors))


class ShuttingDown(Problem):
    """This replica stops; another one, or this one in a moment, serves the call."""

    status, slug, retry_after = 503, "shutting-down", 1


class DatabaseUnavailable(Problem):
    """The database does not answer; try again in a moment."""

    status, slug, retry_after = 503, "database-unavailable", 1


class InternalError(Problem):
    """An unforeseen error; the service's log has it under this request id."""


# What msgspec tells by a pattern, in words.
RULES = {
    PLAIN: "no control characters here",
    NO_NUL: "no U+0000 here",
    WORD: "write words of 1 to 63 of A-Z a-z 0-9 _ . -, separated by commas",
    ORIGIN: "write origins as https://example.org, separated by commas, or *",
    LABEL_PAIR: "write key:value, with a key of 1 to 63 of A-Z a-z 0-9 _ . - and no control characters",
}


def in_words(message: Any) -> str:
    """What msgspec says, without patterns."""
    return next((rule for pattern, rule in RULES.items() if repr(pattern) in str(message)), str(message))


def field_errors(error: msgspec.ValidationError, raw: Any, kind: type, strict: bool = True) -> list[FieldError]:
    """Tell a failed validation by field and, but for passwords, with the value that was sent; never nothing.

    msgspec stops at the first fault, so what is told is taken out and the rest is looked at again, up to 20 times.
    """
    if not isinstance(raw, Mapping):
        return [_fault(error, raw)]
    fields = {field.name: field.required for field in msgspec.structs.fields(kind)}
    faults = [FieldError(name, "unknown field") for name in raw if name not in fields][:20]
    left = {name: value for name, value in raw.items() if name in fields}
    while len(faults) < 20:
        try:
            msgspec.convert(left, kind, strict=strict)
            break
        except msgspec.ValidationError as found:
            fault = _fault(found, raw)
        top = re.split(r"[.\[]", fault.field or "")[0]
        if top not in left:  # missing, maybe because it was told already
            break
        faults.append(fault)
        del left[top]
    faults += [
        FieldError(name, "required, but missing") for name, needed in fields.items() if needed and name not in raw
    ]
    return faults or [_fault(error, raw)]


def _fault(error: msgspec.ValidationError, raw: Any) -> FieldError:
    """The field that a failed validation is about, and what is wrong with it."""
    text, _, where = str(error).rpartition(" - at ") if " - at " in str(error) else (str(error), "", "")
    path = re.search(r"`\$\.?(.*)`", where)
    place = path[1].removesuffix("[...]") if path else ""
    if found := re.fullmatch(r"Object (contains unknown|missing required) field `(.*)`", text):
        message = "unknown field" if found[1] == "contains unknown" else "required, but missing"
        return FieldError(f"{place}.{found[2]}".removeprefix("."), message)
    try:
        value = _value_at(raw, place)
    except (LookupError, ValueError, TypeError):  # not a place, but a name that was sent and reads like one
        return FieldError(None, text)
    if place.endswith("labels") and isinstance(value, Mapping):
        return _label_error(place, value, text)
    text = in_words(text)
    if place and not place.endswith("password"):
        text = f"{_shown(value)} is not allowed: {text}"
    return FieldError(place or None, text)


def _value_at(raw: Any, place: str) -> Any:
    """What stands at a place such as users[0].env."""
    for part in re.findall(r"[^.\[\]]+", place):
        raw = raw[int(part) if isinstance(raw, Sequence) else part]
    return raw


def _label_error(place: str, labels: Mapping[str, Any], message: str) -> FieldError:
    for key, value in labels.items():
        if not re.match(WORD, key):
            return FieldError(place, f"the key {_shown(key)} is not 1 to 63 of A-Z a-z 0-9 _ . -")
        if not isinstance(value, str) or len(value) > 255 or not re.match(PLAIN, value):
            rule = "must be a text of up to 255 characters without control characters"
            return FieldError(f"{place}.{key}", f"{_shown(value)} {rule}")
    return FieldError(place, message)


# ------------------------------------------------------------------------------------------------------
# Database: hand-written statements in sql/, two connection pools, and migrations by yoyo over asyncpg.
# ------------------------------------------------------------------------------------------------------

SQL = {path.stem: path.read_text(encoding="utf-8") for path in sorted((HERE / "sql").glob("*.sql"))}

# What asyncpg raises when the database is away, restarting, too busy, or cut us off.
DATABASE_FAULTS = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.ObjectNotInPrerequisiteStateError,
    asyncpg.ReadOnlySQLTransactionError,
)


STATEMENT = 6  # seconds for a statement; with a connection to wait for and to give back, ten for a call


class Busy(asyncpg.InterfaceError):
    """Too many calls wait for the database, or none gets a connection: nothing was sent."""


async def _keep(connection: asyncpg.Connection) -> None:
    """No reset on the return of a connection: we keep no session state (87 -> 59 us a query)."""


class Connections:
    """A pool of connections whose callers are told within seconds when there is none for them."""

    PATIENCE = 3  # seconds to wait for a connection
    CROWD = 500  # so many may wait for one

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._waiting = 0

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[asyncpg.Connection]:
        if self._waiting >= self.CROWD:
            raise Busy(f"{self._waiting} calls wait for a database connection already")
        self._waiting += 1
        try:
            connection = await self._pool.acquire(timeout=self.PATIENCE)
        except DATABASE_FAULTS as fault:  # told apart, because nothing was sent
            raise Busy(f"there is no database connection: {type(fault).__name__}: {fault}") from fault
        finally:
            self._waiting -= 1
        try:
            yield cast("asyncpg.Connection", connection)
        finally:  # bounded, because it waits for a cancelled statement, which a frozen server never ends
            await self._pool.release(connection, timeout=1)

    def gauges(self) -> tuple[int, int, int, int]:
        """Connections that work, that are idle, that may be opened in all, and calls that wait for one."""
        size, idle = self._pool.get_size(), self._pool.get_idle_size()
        return size - idle, idle, self._pool.get_max_size(), self._waiting

    async def fetch(self, sql: str, *args: Any, timeout: float | None = None) -> list[asyncpg.Record]:  # noqa: ASYNC109
        async with self.acquire() as connection:
            return await connection.fetch(sql, *args, timeout=timeout)

    async def fetchrow(self, sql: str, *args: Any) -> asyncpg.Record | None:
        return next(iter(await self.fetch(sql, *args)), None)

    async def fetchval(self, sql: str, *args: Any) -> Any:
        row = await self.fetchrow(sql, *args)
        return row[0] if row else None

    async def execute(self, sql: str, *args: Any) -> str:
        async with self.acquire() as connection:
            return await connection.execute(sql, *args)


@asynccontextmanager
async def open_pool(url: str, size: int, plans: str, seconds: float, pooler: str = "off") -> AsyncIterator[Connections]:
    """Connections whose statements are planned in the given way: force_generic_plan once, force_custom_plan each time.

    The statements of the hot path take arrays, which PostgreSQL would plan anew each time (database CPU
    60 -> 41 us a request); lists and filters want a plan that knows which filters are set.
    """
    tuning = {"plan_cache_mode": plans, "jit": "off", "application_name": "botfarm"}
    if plans == "force_generic_plan":  # a plan made while a table was small must not scan it when it has grown
        tuning |= {"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"}
    options: dict[str, Any] = {"server_settings": tuning, "target_session_attrs": "read-write"}
    if pooler == "on":  # PgBouncer knows no prepared statements (before 1.21) and refuses unknown start-up parameters
        options = {"statement_cache_size": 0}
    pool = await asyncpg.create_pool(
        url, min_size=1, max_size=size, command_timeout=seconds, timeout=5, reset=_keep, **options
    )
    try:
        yield Connections(pool)
    finally:
        try:
            await asyncio.wait_for(pool.close(), 2)
        except TimeoutError:
            pool.terminate()


class _Cursor:
    """The little of a DB-API cursor that yoyo uses."""

    description = None

    def __init__(self, connection: _Connection) -> None:
        self.connection = connection
        self.rows: deque[tuple[Any, ...]] = deque()

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> None:
        self.rows = deque(tuple(row) for row in self.connection.run(sql, parameters))

    def fetchone(self) -> tuple[Any, ...] | None:
        return self.rows.popleft() if self.rows else None

    def fetchall(self) -> list[tuple[Any, ...]]:
        return list(self.rows)

    def close(self) -> None:
        self.rows.clear()


class SchemaError(Exception):
    """The database's schema does not fit this version of BotFarm, or its address leads nowhere."""


UNREADABLE_URL = "{} is not readable: write what is special in its password as %2F (/), %23 (#), %3F (?), %40 (@)."


class _Connection:
    """A blocking connection over asyncpg, with an event loop of its own."""

    def __init__(self, url: str) -> None:
        self.runner = asyncio.Runner()
        try:
            self.wire = self.runner.run(asyncpg.connect(url, timeout=10, statement_cache_size=0))
        except ValueError:  # its message shows a part of the URL, maybe of the password
            raise SchemaError(UNREADABLE_URL.format("DATABASE_URL")) from None

    def run(self, sql: str, parameters: Sequence[Any]) -> Sequence[Any]:
        if parameters:
            numbers = iter(range(1, len(parameters) + 1))
            sql = re.sub(r"%s", lambda _: f"${next(numbers)}", sql)
            return self.runner.run(self.wire.fetch(sql, *parameters))
        if sql.lstrip()[:6].lower() == "select":
            return self.runner.run(self.wire.fetch(sql))
        self.runner.run(self.wire.execute(sql))
        return ()

    def cursor(self) -> _Cursor:
        return _Cursor(self)

    def commit(self) -> None:
        """yoyo's transactions are told in SQL, see MigrationBackend."""

    rollback = commit

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.runner.run(self.wire.close(timeout=5))
        self.runner.close()


class _Driver:
    paramstyle = "format"
    DatabaseError = asyncpg.PostgresError


class MigrationBackend(DatabaseBackend):
    """yoyo over asyncpg, with all of a run in one transaction.

    yoyo's own lock is a row that a killed process leaves behind, and it marks a migration as applied in a
    second transaction. Here one transaction holds `lock table`, the migrations and their marks, so a run
    that is killed anywhere leaves nothing, and several that start at once go one after the other.
    """

    list_tables_sql = "SELECT table_name FROM information_schema.tables WHERE table_schema = current_schema()"
    driver = _Driver  # pyright: ignore

    def __init__(self, url: str) -> None:
        self._connection = _Connection(url)
        self.migration_table = "_yoyo_migration"
        self.has_transactional_ddl = True
        self.DatabaseError = asyncpg.PostgresError

    def __exit__(self, *exception: object) -> None:
        """Kept open for the next migration: see copy()."""

    def copy(self) -> MigrationBackend:
        return self

    def list_tables(self, **_: Any) -> list[str]:
        return [row[0] for row in self.execute(self.list_tables_sql).fetchall()]

    def commit(self) -> None:
        self.execute("commit")
        self._in_transaction = False

    def rollback(self) -> None:
        self.execute("rollback")
        self._in_transaction = False

    def ensure_internal_schema_updated(self) -> None:
        """Done once, at the start of `exclusive`."""

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """One transaction that no other run shares."""
        with self.transaction():
            self.execute("create table if not exists botfarm_migrating (only_one boolean primary key)")
            self.execute("lock table botfarm_migrating in exclusive mode")
            self.execute("set local lock_timeout = '2s'")  # what waits for a table holds up all who come after it
            if yoyo.internalmigrations.needs_upgrading(self):  # pyright: ignore[reportAttributeAccessIssue]
                yoyo.internalmigrations.upgrade(self)  # pyright: ignore[reportAttributeAccessIssue]
            yield

    def get_log_data(self, migration: Any = None, operation: str = "apply") -> dict[str, Any]:
        """As yoyo's, without its look-ups of the user and the host, which fail or wait in containers."""
        return {
            "id": str(uuid.uuid4()),
            "migration_id": migration.id if migration else None,
            "migration_hash": migration.hash if migration else None,
            "username": str(os.getuid()),
            "hostname": socket.gethostname(),
            "created_at_utc": datetime.now(UTC).replace(tzinfo=None),
            "operation": operation,
        }


MIGRATIONS = yoyo.read_migrations(str(HERE / "migrations"))
MIGRATING = 600  # seconds for which a migration tries to get the tables


def migrate(url: str, rollback: bool = False) -> list[str]:
    """Apply what is missing, or take the last migration back. Returns the names of those that ran, in order.

    SchemaError when the database has migrations that this version does not know: it was set up by a newer one.
    """
    end = time.monotonic() + MIGRATING
    for attempt in itertools.count(1):
        backend = MigrationBackend(url)
        try:
            with backend.exclusive():
                return _run_migrations(backend, rollback)
        except (asyncpg.UniqueViolationError, asyncpg.DuplicateTableError):
            pause = 0.05 * attempt  # several first starts at once: the others wait for the first
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
            log.warning("The migration waits for others that use the tables (a backup?), and lets calls through.")
            pause = 3
        finally:
            backend.connection.close()
        if time.monotonic() > end:
            break
        time.sleep(pause)
    raise SchemaError(f"Others have used this database's tables for {MIGRATING} seconds; migrate when they are done.")


def _run_migrations(backend: MigrationBackend, rollback: bool) -> list[str]:
    check_schema(row[0] for row in backend.execute("select migration_id from _yoyo_migration").fetchall())
    if not rollback:
        chosen = backend.to_apply(MIGRATIONS)
        backend.apply_migrations(chosen)
    else:
        chosen = backend.to_rollback(MIGRATIONS)[:1]
        backend.rollback_migrations(chosen)
    return [migration.id for migration in chosen]


def check_schema(applied: Iterable[str]) -> None:
    """SchemaError when the database knows migrations that we don't."""
    unknown = sorted(set(applied) - {migration.id for migration in MIGRATIONS})
    if unknown:
        raise SchemaError(
            f"The database has the migration {unknown[-1]!r}, which BotFarm {VERSION} does not know: it was set up "
            "by a newer version. Run that version, or take its migrations back with its `migrate --rollback`."
        )


# ------------------------------------------------------------------------------------------------------
# Passwords: stored sealed (AES-256-GCM, so that a lock can hand them out) when there is a key, else as
# an Argon2id hash. Either is one string that says what it is.
# ------------------------------------------------------------------------------------------------------

SEALED = "$aes-256-gcm$"
KEY_PATTERN = re.compile(r"([A-Za-z0-9_.-]{1,32}):([A-Za-z0-9+/]{43}=)")


class KeyFault(Exception):
    """A sealing key is missing or wrong."""


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


class Keyring:
    """The sealing keys: the first seals, all unseal.

    A sealed secret reads $aes-256-gcm$KEY-ID$base64(nonce + ciphertext + tag). The nonce is random (96 bits,
    NIST SP 800-38D), and the user's id is associated data, so a secret moved to another user does not open.
    """

    def __init__(self, keys: dict[str, bytes]) -> None:
        self.first = next(iter(keys))
        self._ciphers = {key_id: AESGCM(key) for key_id, key in keys.items()}

    @classmethod
    def parse(cls, text: str) -> Keyring:
        return cls(parse_keys(text))

    @property
    def ids(self) -> list[str]:
        return list(self._ciphers)

    def seal(self, owner: uuid.UUID, clear: str, key_id: str | None = None) -> str:
        key_id = key_id or self.first
        nonce = os.urandom(12)
        sealed = nonce + self._ciphers[key_id].encrypt(nonce, clear.encode(), owner.bytes)
        return f"{SEALED}{key_id}${base64.b64encode(sealed).decode()}"

    def open(self, owner: uuid.UUID, secret: str) -> str:
        """KeyFault when the key is not there, or is another one, or the secret is another user's."""
        key_id, _, text = secret.removeprefix(SEALED).partition("$")
        sealed = base64.b64decode(text)
        try:
            return self._ciphers[key_id].decrypt(sealed[:12], sealed[12:], owner.bytes).decode()
        except KeyError:
            raise KeyFault(f"No key {key_id!r} in BOTFARM_KEYS, but a password is sealed with it.") from None
        except InvalidTag:
            raise KeyFault(f"The key {key_id!r} does not open a password that was sealed under that id.") from None


def generate_key() -> str:
    """A new key as BOTFARM_KEYS and BOTFARM_SIGNING_KEYS take it."""
    return f"k{secrets.token_hex(3)}:{base64.b64encode(secrets.token_bytes(32)).decode()}"


# OWASP's minimum (19 MiB, t=2, p=1; 15 ms): always in a thread of a small pool, so that hashing never stalls an
# acquire and never takes more than 38 MiB.
HASHER = argon2.PasswordHasher(time_cost=2, memory_cost=19456, parallelism=1)


def matches(stored: str, clear: str) -> bool:
    """Whether an Argon2id hash is that of a text. Takes 15 ms."""
    try:
        return HASHER.verify(stored, clear)
    except argon2.exceptions.VerifyMismatchError:
        return False


class Passwords:
    """How this deployment stores passwords."""

    def __init__(self, keyring: Keyring | None) -> None:
        self.keyring = keyring
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="argon2")

    async def store(self, owner: uuid.UUID, clear: str) -> str:
        if self.keyring:
            return self.keyring.seal(owner, clear)
        return await asyncio.get_running_loop().run_in_executor(self._threads, HASHER.hash, clear)

    async def verify(self, owner: uuid.UUID, secret: str, clear: str) -> bool:
        if secret.startswith(SEALED):
            return hmac.compare_digest(self._open(owner, secret).encode(), clear.encode())
        return await asyncio.get_running_loop().run_in_executor(self._threads, matches, secret, clear)

    def reveal(self, owner: uuid.UUID, secret: str) -> str | None:
        """The clear password for the reply that grants a lock; None where only a hash is stored."""
        return self._open(owner, secret) if secret.startswith(SEALED) else None

    def reseal(self, old: uuid.UUID, new: uuid.UUID, secret: str) -> str:
        """The same password for another user. A hash holds for anybody."""
        if not secret.startswith(SEALED):
            return secret
        return cast("Keyring", self.keyring).seal(new, self._open(old, secret))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _open(self, owner: uuid.UUID, secret: str) -> str:
        if not self.keyring:
            raise KeyFault("Passwords are sealed, but BOTFARM_KEYS is not set.")
        return self.keyring.open(owner, secret)


PROOF_OWNER = uuid.UUID(int=0)
PROOF = "BotFarm"


async def check_keys(pool: Connections, keyring: Keyring | None) -> None:
    """Find a wrong or a missing key now and not at the first lock. KeyFault says which and what to do."""
    for key_id in keyring.ids if keyring else ():
        proof = cast("Keyring", keyring).seal(PROOF_OWNER, PROOF, key_id)
        stored = await pool.fetchval(SQL["prove_key"], key_id, proof)
        try:
            cast("Keyring", keyring).open(PROOF_OWNER, stored)
        except KeyFault:
            raise KeyFault(
                f"BOTFARM_KEYS: the key {key_id!r} is not the one that this database was used with under that id. "
                "Set the right key, or give a new key another id."
            ) from None
    known = keyring.ids if keyring else []
    for key_id in [row["id"] for row in await pool.fetch(SQL["list_proofs"]) if row["id"] not in known]:
        if not await pool.fetchval(SQL["forget_proof"], key_id, f"{SEALED}{key_id}$"):
            raise KeyFault(
                f"BOTFARM_KEYS: the key {key_id!r} is missing, but passwords are sealed with it. Add it (after the "
                "first key), and run `python botfarm.py reseal` before you take it out."
            )


async def reseal(pool: Connections, keyring: Keyring, progress: Callable[[int], None]) -> int:
    """Seal everything under the first key, 500 users at a time. Safe to stop and to start again at any time."""
    total, last = 0, uuid.UUID(int=0)
    prefix = f"{SEALED}{keyring.first}$"
    while rows := await pool.fetch(SQL["list_sealed"], last, SEALED, prefix, 500):
        ids = [row["id"] for row in rows]
        old = [row["secret"] for row in rows]
        new = [keyring.seal(row["id"], keyring.open(row["id"], row["secret"])) for row in rows]
        total += len(await pool.fetch(SQL["reseal_users"], ids, old, new))
        last = ids[-1]
        progress(total)
    return total


# ------------------------------------------------------------------------------------------------------
# Clients: who may call, and whose a lock is, when BOTFARM_AUTH is on.
# ------------------------------------------------------------------------------------------------------

SCOPES = {
    "users:read": "read users, their history and pools",
    "users:write": "create, change, delete, import, verify and quarantine users, and read them",
    "locks": "acquire users, and extend and release locks of its own",
    "admin": "everything, also with locks of other clients",
}


class Caller(Struct, frozen=True):
    """Who calls; by default everybody, as it is without authentication."""

    client: uuid.UUID | None = None
    scopes: frozenset[str] = frozenset(SCOPES)
    projects: tuple[uuid.UUID, ...] | None = None  # null: all

    @property
    def owner(self) -> uuid.UUID | None:
        """The client whose locks it may touch; null: anybody's."""
        return None if "admin" in self.scopes else self.client


ANYBODY = Caller()


class Client(Struct, frozen=True):
    """What a replica knows of a client: its scopes with those that they imply, and its projects (null: all)."""

    scopes: frozenset[str]
    projects: tuple[uuid.UUID, ...] | None


class Claims(Struct):
    """What is read of a token whose signature is right."""

    sub: uuid.UUID
    scope: str
    exp: float


class TokenRefusal(Exception):
    """A token is refused (RFC 6749 section 5.2)."""

    ERRORS: ClassVar[tuple[str, ...]] = (
        "invalid_client", "invalid_request", "invalid_scope", "temporarily_unavailable", "unsupported_grant_type",
    )  # fmt: skip

    def __init__(self, error: str, description: str, status: int = 400, **headers: str) -> None:
        super().__init__(re.sub(r"[^\x20-\x21\x23-\x5b\x5d-\x7e]", "'", description))  # what section 5.2 allows
        self.error = error
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def with_implied(scopes: Iterable[str]) -> frozenset[str]:
    implied = {"admin": tuple(SCOPES), "users:write": ("users:read",)}
    return frozenset(each for scope in scopes for each in (scope, *implied.get(scope, ())))


class Gate:
    """Checks tokens, and gives them to those who know a client's secret.

    Each replica has all clients in memory, and what it read last counts for STALE seconds: so the tokens of a
    removed client stop working within a minute, whether the database can be reached or not.
    """

    ISSUER = "botfarm"
    LIFE = 600  # seconds for which a token is valid
    LEEWAY = 5  # seconds by which the clocks of two replicas may differ
    REFRESH = 20  # seconds between two looks at the clients
    STALE = 50
    CHECKED = 30  # seconds for which the claims of a checked token are kept
    MOST = 10_000  # tokens whose claims are kept
    FAILURES, REQUESTS = 10, 120  # a minute, of one client from one address
    STRAY_FAILURES = 100  # a minute, from one address under whatever names
    LONGEST = 2048  # characters of an Authorization header; our tokens have some 400
    CROWD = 100  # secrets that may wait for their check

    def __init__(self, pool: Connections, keys: dict[str, bytes]) -> None:
        self._pool = pool
        self._keys = keys
        self._clients: dict[uuid.UUID, Client] = {}
        self._read_at = -self.STALE
        self._checked: dict[str, tuple[Caller | None, float]] = {}  # None: the client is gone
        self.refresh = Coalescer(self._read, 10_000)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="secrets")
        self._waiting = 0
        self._nobody = HASHER.hash(secrets.token_urlsafe(32))  # what the secret of an unknown client is compared with

    async def admit(self, sent: str | None, scope: str) -> Caller:
        """Who sent this Authorization header. Unauthenticated, or Forbidden where the scope is lacking."""
        now = time.monotonic()
        caller, until = self._checked.get(sent or "", (None, 0))
        if now >= until or now >= self._read_at + self.STALE:
            caller = await self._check(sent)
        if caller is None:
            raise Unauthenticated("The client of the token is gone")
        if scope not in caller.scopes:
            raise Forbidden.scope(scope)
        return caller

    def still(self, client: uuid.UUID | None) -> bool:
        """Whether a client that was admitted some time ago may still take locks."""
        known = self._clients.get(client) if client else None
        return known is not None and "locks" in known.scopes

    async def _check(self, sent: str | None) -> Caller | None:
        """Who sent a token that is not known or was checked long ago; None where its client is gone.

        One who is not known yet may have been added a moment ago: look, but once for each token.
        """
        kind, _, token = (sent or "").partition(" ")
        if sent is None or kind.lower() != "bearer":
            raise Unauthenticated
        if len(sent) > self.LONGEST or " " in token:  # else one token in many spellings would fill the memory
            raise Unauthenticated("The token is not valid here")
        claims = self._claims(token)
        if claims.sub not in self._clients or time.monotonic() >= self._read_at + self.STALE:
            await self.refresh(None)
        client = self._clients.get(claims.sub)
        scopes = with_implied(claims.scope.split())
        caller = Caller(claims.sub, scopes & client.scopes, client.projects) if client else None
        if len(self._checked) >= self.MOST:
            self._checked.clear()
        self._checked[sent] = caller, time.monotonic() + min(self.CHECKED, claims.exp - time.time())
        return caller

    def _claims(self, token: str) -> Claims:
        try:
            key = self._keys[jwt.get_unverified_header(token)["kid"]]
            claims = jwt.decode(
                token, key, algorithms=["HS256"], issuer=self.ISSUER, audience=self.ISSUER, leeway=self.LEEWAY,
                options={"require": ["iss", "aud", "sub", "exp", "iat", "jti"]},
            )  # fmt: skip
            return msgspec.convert(claims, Claims)
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("The token has expired") from None
        except (jwt.InvalidTokenError, msgspec.ValidationError, KeyError):
            raise Unauthenticated("The token is not valid here") from None

    async def _read(self, asked: list[None]) -> list[None]:
        """Read the clients. Where one has changed, what was checked does not count any more."""
        began = time.monotonic()
        rows = await self._pool.fetch(SQL["list_clients"])
        projects = {row["id"]: None if row["projects"] is None else tuple(row["projects"]) for row in rows}
        clients = {row["id"]: Client(with_implied(row["scopes"]), projects[row["id"]]) for row in rows}
        if clients != self._clients:
            self._checked.clear()
        self._clients, self._read_at = clients, began
        return asked

    async def keep_fresh(self) -> None:
        """Read the clients again and again (for ever)."""
        while True:
            pause = _jittered(self.REFRESH)
            try:
                await self.refresh(None)
            except (asyncpg.PostgresError, *DATABASE_FAULTS) as fault:
                log.warning("The clients cannot be read: %s: %s", type(fault).__name__, fault)
                pause = min(pause, 2)
            await asyncio.sleep(pause)

    async def authenticate(self, client_id: str, secret: str, address: str) -> asyncpg.Record:
        """The client with this secret. TokenRefusal for a wrong one, and for one who asks too often.

        Failures are counted after the check and before the answer, so those who guess at the same time learn no
        more than those who guess one after the other.
        """
        id = _uuid_or_none(client_id)
        network = _network(address)
        asking = [hashlib.sha256(who.encode()).digest() for who in (f"{id or client_id}\n{address}", network)]
        own, near = await self._count(asking, requests=1)
        self._limit(own, own["requests"] > self.REQUESTS or own["failures"] >= self.FAILURES)
        self._limit(near, near["failures"] >= self.STRAY_FAILURES)
        row = await self._pool.fetchrow(SQL["get_client"], id)
        known = (row["secret_hash"], row["previous_hash"]) if row else (None, None)
        valid = await self._verify([stored or self._nobody for stored in known], secret)
        own, near = await self._count(asking, failures=0 if valid else 1)
        self._limit(own, own["failures"] - (not valid) >= self.FAILURES)
        if row is None or not valid:
            log.warning("A token was refused to %s at %s", f"the client {id}" if row else "an unknown client", address)
            challenge = 'Basic realm="botfarm"'
            raise TokenRefusal("invalid_client", "Unknown client or wrong secret.", 401, WWW_Authenticate=challenge)
        return row

    async def _count(self, asking: list[bytes], requests: int = 0, failures: int = 0) -> list[asyncpg.Record]:
        rows = await self._pool.fetch(SQL["count_token_request"], sorted(asking), requests, failures)
        counted = {row["caller"]: row for row in rows}
        return [counted[who] for who in asking]

    def _limit(self, counted: asyncpg.Record, exceeded: bool) -> None:
        if exceeded:
            wait = counted["retry_after"]
            text = f"Too many requests or failures of this client at this address; try again in {wait} seconds."
            raise TokenRefusal("temporarily_unavailable", text, 429, Retry_After=str(wait))

    async def _verify(self, stored: list[str], secret: str) -> bool:
        """Whether the secret is that of one of the hashes: as slow for an unknown client as for a known one."""
        if self._waiting >= self.CROWD:
            raise TokenRefusal("temporarily_unavailable", "Too many ask for tokens; try again.", 503, Retry_After="1")
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, lambda: any(matches(each, secret) for each in stored))
        finally:
            self._waiting -= 1

    def issue(self, client_id: uuid.UUID, scope: str) -> str:
        """A signed token."""
        now = int(time.time())
        claims = {
            "iss": self.ISSUER,
            "aud": self.ISSUER,
            "sub": str(client_id),
            "iat": now,
            "exp": now + self.LIFE,
            "jti": uuid.uuid4().hex,
            "scope": scope,
        }
        first = next(iter(self._keys))
        return jwt.encode(claims, self._keys[first], "HS256", headers={"kid": first})

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _network(address: str) -> str:
    """An address, or where it is of IPv6 the network of 64 bits that one customer has."""
    with contextlib.suppress(ValueError):
        parsed = ipaddress.ip_address(address)
        if parsed.version == 6 and not parsed.ipv4_mapped:
            return str(ipaddress.ip_network((parsed, 64), strict=False))
    return address


def _uuid_or_none(text: str) -> uuid.UUID | None:
    with contextlib.suppress(msgspec.ValidationError):
        return msgspec.convert(text, uuid.UUID)
    return None


# ------------------------------------------------------------------------------------------------------
# Coalescing: while one statement runs, the calls that arrive meanwhile gather and share the next one.
# Nothing is delayed when nothing else waits; under load one commit serves many calls.
# ------------------------------------------------------------------------------------------------------

BACKLOG = 5000  # calls that may wait for a statement
UNBATCHED = 16  # statements at once where BOTFARM_BATCH is 1
T = TypeVar("T")
R = TypeVar("R")


class Coalescer(Generic[T, R]):
    """Calls `run` with the items that have gathered, at most `limit` at once; `run` answers in their order.

    One statement runs at a time (two gave nothing), but for a limit of one, which is there to compare with.
    """

    def __init__(
        self, run: Callable[[list[T]], Awaitable[Sequence[R]]], limit: int, tell: Callable[[int], None] = lambda _: None
    ) -> None:
        self._run = run
        self._limit = limit
        self._tell = tell  # hears the size of each batch
        self._lanes = UNBATCHED if limit == 1 else 1
        self._gathered: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, item: T) -> asyncio.Future[R]:
        """The result to come. Busy where too many wait already."""
        if len(self._gathered) >= BACKLOG:
            raise Busy(f"{len(self._gathered)} calls wait for the database already")
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._gathered.append((item, future))
        if len(self._tasks) < self._lanes:
            self._tasks.add(asyncio.create_task(self._drain()))
        return future

    async def _drain(self) -> None:
        try:
            while self._gathered:
                count = min(len(self._gathered), self._limit)
                self._tell(count)
                await self._serve([self._gathered.popleft() for _ in range(count)])
        finally:
            self._tasks.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    async def _serve(self, batch: list[tuple[T, asyncio.Future[R]]]) -> None:
        """One statement for all; where it fails for a reason that may be one call's alone, one for each."""
        try:
            for (_, future), result in zip(batch, await self._run([item for item, _ in batch]), strict=True):
                if not future.done():
                    future.set_result(result)
        except Exception as error:
            if len(batch) > 1 and not isinstance(error, DATABASE_FAULTS):
                for one in batch:
                    await self._serve([one])
            else:
                if isinstance(error, (TimeoutError, Busy)):  # those behind have waited as long
                    batch += self._gathered
                    self._gathered.clear()
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)


def new_id() -> uuid.UUID:
    """A UUID of version 7 (RFC 9562): a millisecond, then 74 random bits.

    The time keeps the indexes of what is written together together; it decides nothing.
    """
    bits = time.time_ns() // 1_000_000 << 80 | int.from_bytes(os.urandom(10), "big")
    return uuid.UUID(int=bits & ~(0xF << 76) & ~(0x3 << 62) | 0x7 << 76 | 0x2 << 62)


# ------------------------------------------------------------------------------------------------------
# Log: one JSON line per event on standard error, readable ones on a terminal. A thread writes them, so that
# nobody waits for a slow reader.
# ------------------------------------------------------------------------------------------------------


class Entry(Struct, omit_defaults=True):
    """A line of the log; what does not apply is left out. No member ever holds a password, a key, a token or a URL."""

    time: datetime
    level: str
    event: str
    request_id: str | None = None
    trace_id: str | None = None  # of the caller's traceparent
    client: uuid.UUID | None = None  # with BOTFARM_AUTH=on
    holder: str | None = None
    user_id: uuid.UUID | str | None = None
    lock: str | None = None  # the first 8 characters of its id
    fence: int | None = None
    ttl_seconds: int | None = None
    acquire_seconds: float | None = None
    wait_seconds: float | None = None
    held_seconds: float | None = None
    cooldown_seconds: int | None = None
    changed: list[str] | None = None
    reason: str | None = None
    valid: bool | None = None
    created: int | None = None
    updated: int | None = None
    unchanged: int | None = None
    count: int | None = None
    logger: str | None = None
    message: str | None = None
    traceback: str | None = None


class Journal:
    """Writes lines to standard error, in batches, from a thread of its own.

    Where the reader is slower than the events, up to LIMIT of them wait; then the newest are lost, and counted: in the
    log itself as soon as it moves again, and in botfarm_log_lines_lost_total. To stall the test grid instead would
    be worse: the database's history has each lock.
    """

    LIMIT = 50_000  # lines, of some 250 bytes
    PAUSE = 0.1  # seconds for which lines gather: each turn of the thread costs the loop one (0.02 s: 8 % of the rate)

    def __init__(self, file: int = 2) -> None:
        self.lost = 0
        self._file = file
        self._told = 0  # of those that were lost
        self._lines: deque[bytes] = deque()
        self._shown = shown if os.isatty(file) else msgspec.json.Encoder().encode
        self._written = threading.Event()
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock: int | None = None

    def write(self, entry: Entry) -> None:
        """Made a line at once: left to the thread, on another core, that took five times as long (1.5 us)."""
        if len(self._lines) >= self.LIMIT:
            self.lost += 1
            return
        self._lines.append(self._shown(entry))
        if not self._wake.is_set():
            self._begin()

    def _begin(self) -> None:
        self._written.clear()
        self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            self._thread.start()
            atexit.register(self.flush)

    def is_full(self) -> bool:
        """Whether whoever has much to tell should better wait."""
        return len(self._lines) > self.LIMIT // 2

    def share(self, folder: str) -> None:
        """Take turns with the other workers of this start: what two write to one pipe at once would mix."""
        self._lock = os.open(Path(folder) / "log", os.O_RDWR | os.O_CREAT, 0o600)

    def flush(self, seconds: float = 1) -> None:
        """Wait until all is written; a reader that takes nothing is not waited for any longer."""
        if self._thread is None:
            return
        self._hurry.set()
        self._begin()
        self._written.wait(seconds)
        self._hurry.clear()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._hurry.wait(self.PAUSE)
            self._wake.clear()
            self._drain()
            if not self._lines:
                self._written.set()

    def _drain(self) -> None:
        while self._lines:
            batch = [self._lines.popleft() for _ in range(min(len(self._lines), 1000))]
            lines, lost = len(batch), self.lost
            if lost > self._told:
                batch.append(self._shown(Entry(datetime.now(UTC), "error", "log-lost", count=lost - self._told)))
            try:
                self._put(b"\n".join([*batch, b""]))
                self._told = lost
            except OSError:  # the reader is gone
                self.lost += lines

    def _put(self, data: bytes) -> None:
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            left = memoryview(data)
            while left:
                try:
                    left = left[os.write(self._file, left) :]
                except BlockingIOError:  # somebody made standard error non-blocking
                    select.select([], [self._file], [], 1)
        finally:
            if self._lock is not None:
                fcntl.flock(self._lock, fcntl.LOCK_UN)


def shown(entry: Entry) -> bytes:
    """A line for people. What could move the cursor of their terminal is escaped."""
    members = ((name, getattr(entry, name)) for name in Entry.__struct_fields__[3:])
    told = "".join(f" {name}={_plain(value)}" for name, value in members if value is not None)
    return f"{entry.time:%H:%M:%S.%f} {entry.level:7} {entry.event}{told}".encode()


def _plain(value: Any) -> str:
    if not isinstance(value, str):
        return str(value)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    return text if text and " " not in text else f'"{text}"'


JOURNAL = Journal()


DETAIL = re.compile(r"\n[ |]*DETAIL:.*")  # of PostgreSQL's errors: shows rows, and so lock ids and sealed secrets


class LogHandler(logging.Handler):
    """Every other record of the service as a line of the log too. One of a request has its `cause`."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            cause: Cause = getattr(record, "cause", None) or NOWHERE
            entry = Entry(datetime.fromtimestamp(record.created, UTC), record.levelname.lower(), "message")
            entry.request_id, entry.trace_id, entry.client = cause.request_id, cause.trace_id, cause.client
            entry.logger, entry.message = record.name, DETAIL.sub("", record.getMessage())
            if record.exc_info:
                entry.traceback = DETAIL.sub("", logging.Formatter().formatException(record.exc_info))
            JOURNAL.write(entry)
        except Exception:
            self.handleError(record)


def tell(event: str, count: int) -> None:
    """What a command did."""
    JOURNAL.write(Entry(datetime.now(UTC), "info", event, count=count))


def log_as_lines(events: bool = True) -> None:
    """Let all records of the process go into the log."""
    logging.basicConfig(level=logging.INFO if events else logging.WARNING, handlers=[LogHandler()])
    for noisy in ("httpx", "yoyo", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("asyncpg").setLevel(logging.ERROR)  # warns of an outage with a traceback; we tell of it in a line


class Cause(Struct, frozen=True):
    """Which request made something happen; nothing where the service did it by itself."""

    request_id: str | None = None
    trace_id: str | None = None
    client: uuid.UUID | None = None
    echo: Mapping[str, str] | None = None  # headers that the caller sent and finds in the reply


NOWHERE = Cause()


# ------------------------------------------------------------------------------------------------------
# Events: what happens to users and locks is told here, once, by whoever did it: so that neither the metrics nor
# the log, which is the audit trail, forgets anything.
# ------------------------------------------------------------------------------------------------------


class Metric(Struct, frozen=True):
    """A counter; with bounds a histogram. It has a series for each of `values` where it has a label."""

    name: str
    help: str
    label: str = ""
    values: tuple[str, ...] = ("",)
    bounds: tuple[float, ...] = ()

    @property
    def width(self) -> int:
        """Cells of a series: the number, or one for each bucket, the last one endless, and then the sum."""
        return len(self.bounds) + 2 if self.bounds else 1

    def family(self, cells: Sequence[float]) -> MetricFamily:
        """As prometheus_client shows it."""
        labels = [self.label] if self.label else []
        if not self.bounds:
            counted = CounterMetricFamily(self.name, self.help, labels=labels)
            for value, cell in zip(self.values, cells, strict=True):
                counted.add_metric([value] if labels else [], cell)
            return counted
        observed = HistogramMetricFamily(self.name, self.help, labels=labels)
        for number, value in enumerate(self.values):
            *counts, total = cells[number * self.width : (number + 1) * self.width]
            edges = [*map(str, self.bounds), "+Inf"]
            buckets = list(zip(edges, itertools.accumulate(counts), strict=True))
            observed.add_metric([value] if labels else [], buckets, total)
        return observed


MOMENTS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
WAITS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
HOLDS = (1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 14400.0, 86400.0)
SIZES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
STATEMENTS = ("acquire_locks", "acquire_users", "release_locks", "extend_locks", "get_keyed_locks", "count_matching")
METRICS = (
    Metric("botfarm_acquires", "Locks that were granted."),
    Metric("botfarm_releases", "Locks that were given back."),
    Metric("botfarm_extensions", "Locks that were extended, by heartbeats."),
    Metric("botfarm_expirations", "Locks whose time ran out; counted when that is noticed, a second later at most."),
    Metric("botfarm_forced_releases", "Locks that were ended by force."),
    Metric("botfarm_password_reveals", "Passwords that left the service in the reply that grants a lock."),
    Metric(
        "botfarm_refusals", "Calls that were refused, by the slug of the problem or the error of a token.", "reason",
        (*sorted(kind.slug for kind in Problem.__subclasses__()), *TokenRefusal.ERRORS),
    ),
    Metric("botfarm_log_lines_lost", "Lines that were lost because nobody read the log."),
    Metric("botfarm_database_errors", "Calls and jobs that failed because the database did not answer."),
    Metric(
        "botfarm_acquire_duration_seconds", "From the call to the grant of a lock, for calls that did not wait.",
        bounds=MOMENTS,
    ),
    Metric(
        "botfarm_wait_duration_seconds", "How long calls waited for a user, by how that ended.", "outcome",
        ("granted", "refused", "gone"), WAITS,
    ),
    Metric("botfarm_lock_held_duration_seconds", "From the grant of a lock to its end.", bounds=HOLDS),
    Metric(
        "botfarm_batch_size", "Calls that shared a statement.", "statement", STATEMENTS, SIZES,
    ),
)  # fmt: skip


class Snapshot(Struct):
    """What a worker has at this moment: who waits for which pools, and its database connections by name."""

    waiting: list[tuple[list[Wish], int]] = []
    connections: dict[str, tuple[int, int, int, int]] = {}  # see Connections.gauges


SHARED = "BOTFARM_SHARED_FOLDER"  # no setting: `serve` makes the folder, and tells its workers so


class Tally:
    """The numbers of METRICS, of all workers of a start.

    They stand in flat cells: of this process, or, with a folder that the workers share, in a file that is mapped
    into its memory. A worker has a file of its own as long as it lives, and whoever is asked adds up those of all.
    That of a killed worker stays, and the one that takes its place goes on adding to it: so no sum ever shrinks,
    and nothing counts twice. (An increment takes 0.13 us and an observation 0.23; in prometheus_client's own
    multiprocess mode 0.84 and 1.76, and the files of dead workers gather. All that is counted: 1 to 2 % of the CPU of
    a cycle.)
    """

    def __init__(self, folder: str | None = None) -> None:
        self._places: dict[tuple[str, str], int] = {}
        self._series: dict[tuple[str, str], tuple[int, tuple[float, ...]]] = {}
        size = 0
        for metric in METRICS:
            for value in metric.values:
                self._places[metric.name, value] = size
                self._series[metric.name, value] = size, metric.bounds
                size += metric.width
        self._size = size
        self._folder = Path(folder) if folder else None
        self._own = Path()
        self._cells: Any = self._claim(self._folder) if self._folder else array("d", bytes(8 * size))

    def _claim(self, folder: Path) -> Any:
        """The cells of the first file that no living worker has."""
        for number in itertools.count():
            self._own = folder / f"{number}.cells"
            file = os.open(self._own, os.O_RDWR | os.O_CREAT, 0o600)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and so it stays until this process has ended
                held = os.fstat(file).st_size  # written, not truncated to: a hole in a full disk kills who counts in it
                os.pwrite(file, bytes(8 * self._size - held), held)
                return memoryview(mmap.mmap(file, 8 * self._size)).cast("d")
            os.close(file)
        raise AssertionError

    def count(self, name: str, value: str = "", by: int = 1) -> None:
        self._cells[self._places[name, value]] += by

    def observe(self, name: str, measured: float, value: str = "") -> None:
        place, bounds = self._series[name, value]
        cells = self._cells
        cells[place + bisect_left(bounds, measured)] += 1
        cells[place + len(bounds) + 1] += measured

    def families(self) -> Iterator[MetricFamily]:
        """The sums over all workers."""
        cells = [sum(column) for column in zip(*self._all(), strict=True)]
        for metric in METRICS:
            first = self._places[metric.name, metric.values[0]]
            yield metric.family(cells[first : first + len(metric.values) * metric.width])

    def _all(self) -> list[Sequence[float]]:
        if self._folder is None:
            return [self._cells]
        files = [file.read_bytes() for file in self._folder.glob("*.cells")]
        return [array("d", file) for file in files if len(file) == 8 * self._size]

    def publish(self, snapshot: Snapshot) -> None:
        """Tell the other workers what there is here at this moment."""
        if self._folder:
            new = self._own.with_suffix(".new")
            new.write_bytes(msgspec.json.encode(snapshot))
            new.replace(self._own.with_suffix(".json"))

    def others(self) -> list[Snapshot]:
        """What the other workers that live told last."""
        files = self._folder.glob("*.json") if self._folder else ()
        alive = [file for file in files if file.stem != self._own.stem and _is_locked(file.with_suffix(".cells"))]
        return [msgspec.json.decode(file.read_bytes(), type=Snapshot) for file in alive]


def _is_locked(path: Path) -> bool:
    """Whether a living process has this file."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


Row = asyncpg.Record | Mapping[str, Any]


class Events:
    """What happened, told by whoever did it. Rows are those of the statement that did it."""

    ENDS: ClassVar[dict[str, str]] = {
        "released": "botfarm_releases",
        "expired": "botfarm_expirations",
        "forced": "botfarm_forced_releases",
    }

    def __init__(self, tally: Tally, journal: Journal | None) -> None:
        self.tally = tally
        self.journal = journal  # none with BOTFARM_LOG=quiet

    def log(self, event: str, cause: Cause, **members: Any) -> None:
        if self.journal:
            now = datetime.now(UTC)
            self.journal.write(Entry(now, "info", event, cause.request_id, cause.trace_id, cause.client, **members))

    def _log_lock(
        self, event: str, cause: Cause, lock: Row, *, ttl: int | None = None, acquired: float | None = None,
        waited: float | None = None, held: float | None = None, cooldown: int | None = None,
    ) -> None:  # fmt: skip
        """Spelled out, because keywords that are handed on and on cost as much as the rest of it (1 us)."""
        if self.journal:
            self.journal.write(
                Entry(
                    datetime.now(UTC), "info", event, cause.request_id, cause.trace_id, cause.client, lock["holder"],
                    lock["user_id"], str(lock["lock_id"])[:8], lock["fence"], ttl, acquired, waited, held, cooldown,
                )
            )  # fmt: skip

    def batched(self, statement: str, size: int) -> None:
        """So many calls share a statement."""
        self.tally.observe("botfarm_batch_size", size, statement)

    def acquired(self, row: asyncpg.Record, cause: Cause, seconds: float, waited: bool) -> None:
        """A lock was granted. Where that ended one whose time had run out, this is told too."""
        if row["expired"]:
            self.ended("expired", msgspec.json.decode(row["expired"]))
        self.tally.count("botfarm_acquires")
        if waited:
            self.waited("granted", seconds)
            self._log_lock("lock-acquired", cause, row, ttl=row["ttl"], waited=seconds)
        else:
            self.tally.observe("botfarm_acquire_duration_seconds", seconds)
            self._log_lock("lock-acquired", cause, row, ttl=row["ttl"], acquired=seconds)

    def waited(self, outcome: str, seconds: float) -> None:
        """A call that waited ended: granted, refused, or its caller was gone."""
        self.tally.observe("botfarm_wait_duration_seconds", seconds, outcome)

    def revealed(self, row: asyncpg.Record, cause: Cause) -> None:
        """The password of a user goes out with the reply."""
        self.tally.count("botfarm_password_reveals")
        self._log_lock("password-revealed", cause, row)

    def extended(self, row: asyncpg.Record, cause: Cause) -> None:
        self.tally.count("botfarm_extensions")
        self._log_lock("lock-extended", cause, row, ttl=row["ttl"])

    def ended(self, how: str, lock: Row, cause: Cause = NOWHERE, cooldown: int | None = None) -> None:
        """A lock has ended: released, expired or forced."""
        held = lock["held_seconds"]
        self.tally.count(self.ENDS[how])
        self.tally.observe("botfarm_lock_held_duration_seconds", held)
        self._log_lock(f"lock-{how}", cause, lock, held=held, cooldown=cooldown or None)

    def user(self, event: str, user_id: uuid.UUID, cause: Cause, **members: Any) -> None:
        """A user was created, changed, deleted or freed, or its password was checked."""
        self.log(f"user-{event}", cause, user_id=user_id, **members)

    def quarantined(self, user_id: uuid.UUID, reason: str, cause: Cause) -> None:
        self.user("quarantined", user_id, cause, reason=reason)

    def imported(self, done: Imported, cause: Cause) -> None:
        """After the lines of the users that were created and changed."""
        self.log("users-imported", cause, created=done.created, updated=done.updated, unchanged=done.unchanged)

    def refused(self, reason: str) -> None:
        """A call was refused. Nothing changed, so this is only counted."""
        self.tally.count("botfarm_refusals", reason)

    def database_failed(self, told: str, fault: BaseException, cause: Cause = NOWHERE) -> None:
        self.tally.count("botfarm_database_errors")
        log.warning("%s: %s: %s", told, type(fault).__name__, fault, extra={"cause": cause})

    def count_losses(self) -> None:
        """Into the metrics with the lines that the log has lost since it was asked last."""
        if self.journal and (lost := self.journal.lost - self._lost):
            self._lost += lost
            self.tally.count("botfarm_log_lines_lost", by=lost)

    _lost = 0


# ------------------------------------------------------------------------------------------------------
# Waiting: calls that wait for a user, or for a set of them, take turns at the desk. It lists who is free,
# decides who gets whom, and takes those users in one statement; it works when something came free, and
# five times a second in case nobody told it.
# ------------------------------------------------------------------------------------------------------

POLL = 0.2  # seconds between two looks while somebody waits
EXCHANGE = 0.5  # seconds between two exchanges with the other replicas while somebody waits, else twice that
HEAD_START = 0.5  # seconds by which one who waits here may overtake one who waits at another replica
PATIENCE = 3.0  # seconds after which a waiting set goes before those who came later
LOOK = 500  # distinct wishes that one look serves
GROUPS = 200  # calls that one statement serves: it compares each with each
BREADTH = 200  # free users that one look lists for a wish; at least as many as a set may have


class Wish(Struct, frozen=True):
    """What an acquire asks for: one user by id, or any of a project that fits. Labels are JSON, null for none."""

    user_id: uuid.UUID | None = None
    project_id: uuid.UUID | None = None
    env: str | None = None
    domain: str | None = None
    labels: str | None = None

    def __str__(self) -> str:
        parts = ((name, getattr(self, name)) for name in self.__struct_fields__)
        return ", ".join(f"{name}={value}" for name, value in parts if value is not None)

    def fits(self, user: asyncpg.Record, labels: dict[str, str]) -> bool:
        if self.user_id:
            return self.user_id == user["id"]
        where = self.project_id == user["project_id"]
        where = where and self.env in (None, user["env"]) and self.domain in (None, user["domain"])
        return where and (self.labels is None or msgspec.json.decode(self.labels).items() <= labels.items())

    def meets(self, other: Wish) -> bool:
        """Whether both may ask for users of one pool."""
        pairs = ((self.env, other.env), (self.domain, other.domain))
        return self.project_id == other.project_id and all(a is None or b is None or a == b for a, b in pairs)


Wishes = tuple[Wish, ...]


class Ask(Struct, eq=False, kw_only=True):
    """One acquiring call: a user for each of its wishes, all or none. A set has more than one."""

    wishes: list[Wish]
    holder: str = ""
    ttl: int = 0
    wait: int = 0
    cause: Cause = NOWHERE
    key: uuid.UUID | None = None
    client: uuid.UUID | None = None  # whose the lock will be; null: authentication is off
    home: Wish | None = None  # the pool of the very user that is wished for, where that is known
    foreign: bool = False  # waits at another replica, and only holds its place here
    arrived: float = msgspec.field(default_factory=time.monotonic)
    lock_ids: list[uuid.UUID] = []
    answer: Any = None  # the future of its rows
    leaving: bool = False
    told: bool = False  # the other replicas know of it

    def pools(self) -> frozenset[Wish]:
        """Where it looks for users."""
        return frozenset(self.home or Wish(None, wish.project_id, wish.env, wish.domain) for wish in self.wishes)


class Told(Struct):
    """One who waits, as the replicas tell each other: for how many seconds, and for what."""

    age: float
    wishes: list[Wish]
    home: Wish | None = None


Place = tuple[Ask, int]  # a call, and which of its wishes


class Seats:
    """Which user is for whom, as far as it is decided."""

    def __init__(self, fitting: Mapping[Wish, Sequence[uuid.UUID]]) -> None:
        self.fitting = fitting
        self.taken: dict[uuid.UUID, Place] = {}
        self.full: set[uuid.UUID] = set()  # users from whom a search found no way to a free one: none will

    def find(self, place: Place, keeps: bool = True) -> bool:
        """A user for a place; those who have one keep one, but maybe another one (augmenting paths, Kuhn 1955)."""
        came: dict[uuid.UUID, uuid.UUID | None] = {}
        frontier: deque[tuple[uuid.UUID | None, Place]] = deque([(None, place)])
        while frontier:
            previous, (ask, number) = frontier.popleft()
            for user in self.fitting[ask.wishes[number]]:
                if user in came or user in self.full:
                    continue
                came[user] = previous
                if user not in self.taken:
                    self._move(user, came, place)
                    return True
                frontier.append((user, self.taken[user]))
        if keeps:
            self.full |= came.keys()
        return False

    def _move(self, user: uuid.UUID, came: dict[uuid.UUID, uuid.UUID | None], place: Place) -> None:
        while (previous := came[user]) is not None:
            self.taken[user] = self.taken[previous]
            user = previous
        self.taken[user] = place


def match(asks: Iterable[Ask], fitting: Mapping[Wish, Sequence[uuid.UUID]], now: float) -> dict[Ask, list[uuid.UUID]]:
    """Who gets whom: first come first served, all or none; nobody waits behind one whom nothing fits.

    A set that is not complete leaves its users to those behind it, until it has waited for PATIENCE; then they
    are kept for it, so that it does not starve behind single acquires.
    """
    seats = Seats(fitting)
    hopeless: set[Wish] = set()  # a wish that found nothing once finds nothing later on
    vain: set[Wishes] = set()  # and so it is with a set
    served: dict[Ask, list[Any]] = {}
    for ask in asks:
        kind = tuple(ask.wishes)
        keeps = len(kind) == 1 or now - ask.arrived >= PATIENCE
        if not keeps and kind in vain:
            continue
        before = {} if keeps else dict(seats.taken)
        complete = True
        for number, wish in enumerate(kind):
            if wish not in hopeless and seats.find((ask, number), keeps):
                continue
            complete = False
            if not keeps:
                break
            hopeless.add(wish)
        if complete:
            served[ask] = [None] * len(kind)
        elif not keeps:
            seats.taken = before
            vain.add(kind)
    for user, (ask, number) in seats.taken.items():
        if ask in served:
            served[ask][number] = user
    return {ask: users for ask, users in served.items() if not ask.foreign}


class Desk:
    """Those who wait at this replica, and what it knows of those who wait at others."""

    def __init__(self, farm: Farm) -> None:
        self.farm = farm
        self.replica = uuid.uuid4()
        self.queue: dict[Ask, None] = {}
        self.foreign: list[Ask] = []
        self._foreign_projects: set[uuid.UUID | None] = set()
        self._kinds: Counter[Wishes] = Counter()  # how many wait for the same
        self._pools: Counter[frozenset[Wish]] = Counter()  # and where, without those who have no time to wait
        self._projects: Counter[uuid.UUID | None] = Counter()
        self._taking: set[Ask] = set()
        self._woken = asyncio.Event()
        self._news: asyncio.Queue[str] = asyncio.Queue(1)
        self._others_wait_until = 0.0
        self._polls_at = self._exchanges_at = 0.0
        self._closed = False

    def crowded(self, ask: Ask) -> bool:
        """Whether somebody waits who may want the same users: then everybody takes turns."""
        if not self._projects and not self.foreign:
            return False
        waited_for = self._projects.keys() | self._foreign_projects
        projects = {pool.project_id for pool in ask.pools()}
        return None in waited_for or None in projects or bool(waited_for & projects)

    def waiting(self, pool: Wish) -> int:
        """How many calls wait here for users of this pool."""
        return sum(count for pools, count in self._pools.items() if any(pool.meets(other) for other in pools))

    def crowd(self) -> list[tuple[list[Wish], int]]:
        """Who waits here: pools, and how many calls wait for users of any of them."""
        return [(list(pools), count) for pools, count in self._pools.items()]

    def join(self, ask: Ask) -> None:
        """Take a place in the queue; `ask.answer` will be its rows, none for one that has no time to wait."""
        ask.answer = asyncio.get_running_loop().create_future()
        if self._closed:
            ask.answer.set_exception(ShuttingDown())
            return
        self.queue[ask] = None
        self._kinds[tuple(ask.wishes)] += 1
        self._projects.update(pool.project_id for pool in ask.pools())
        if ask.wait:
            self._pools[ask.pools()] += 1
        self._woken.set()
        if ask.wait and len(self.queue) == 1:
            self._tell("waiting")

    async def leave(self, ask: Ask) -> list[asyncpg.Record]:
        """Give up the place. A grant that is on its way counts."""
        if ask in self._taking:
            ask.leaving = True
            return await ask.answer
        self._forget(ask)
        return ask.answer.result() if ask.answer.done() else []

    def _forget(self, ask: Ask) -> None:
        if ask in self.queue:
            del self.queue[ask]
            if ask.told:  # they need not keep a place for it any more
                self._exchanges_at = 0
                self._woken.set()
            _take_out(self._kinds, tuple(ask.wishes))
            for pool in ask.pools():
                _take_out(self._projects, pool.project_id)
            if ask.wait:
                _take_out(self._pools, ask.pools())

    def abandon(self, ask: Ask) -> None:
        """Take out a call whose handler has failed."""
        ask.leaving = True
        if ask not in self._taking:
            self._forget(ask)

    def _answer(self, ask: Ask, rows: list[asyncpg.Record]) -> None:
        self._forget(ask)
        if not ask.answer.done():
            ask.answer.set_result(rows)

    def _refuse(self, ask: Ask, reason: Exception) -> None:
        self._forget(ask)
        if not ask.answer.done():
            ask.answer.set_exception(reason)

    def close(self) -> None:
        """Answer everybody: the service stops. Grants that are on their way are still told."""
        self._closed = True
        for ask in [ask for ask in self.queue if ask not in self._taking]:
            self._refuse(ask, ShuttingDown())

    def freed(self) -> None:
        """Users may have come free: look after those who wait here, and tell it to those who wait elsewhere."""
        if self.queue:
            self._woken.set()
        if self.foreign or time.monotonic() < self._others_wait_until:
            self._tell("freed")

    def _tell(self, what: str) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self._news.put_nowait(f"{what} {self.replica}")

    def hear(self, news: str) -> None:
        """What another replica told."""
        what, _, replica = news.partition(" ")
        if replica == str(self.replica):
            return
        if what == "waiting":
            now = time.monotonic()
            self._others_wait_until = now + 2
            self._exchanges_at = min(self._exchanges_at, now + EXCHANGE)
        self._woken.set()

    async def announce(self) -> None:
        """Send news, at most every 10 ms, in a statement of its own (for ever)."""
        while True:
            news = await self._news.get()
            with contextlib.suppress(asyncpg.PostgresError, *DATABASE_FAULTS):  # the others look by themselves
                await self.farm.pool.execute(SQL["notify"], news)
            await asyncio.sleep(0.01)

    async def run(self) -> None:
        """Look after the queue (for ever)."""
        while True:
            await self._rest()
            try:
                await self._look()
            except Exception as fault:
                if not isinstance(fault, DATABASE_FAULTS):
                    log.exception("The desk failed; it goes on")
                for ask in [ask for ask in self.queue if not ask.wait]:
                    self._refuse(ask, fault)
                await asyncio.sleep(POLL)

    async def _rest(self) -> None:
        due = min(self._polls_at, self._exchanges_at) if self.queue else self._exchanges_at
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(due - time.monotonic(), 0)):
                await self._woken.wait()
        self._woken.clear()

    async def _look(self) -> None:
        now = time.monotonic()
        if now >= self._exchanges_at:
            self._exchanges_at = now + _jittered(EXCHANGE)
            with contextlib.suppress(*DATABASE_FAULTS):  # what the others told last still counts
                await self._exchange(now)
                await self._find_deleted()
        if not self.queue:
            return
        newcomers = [ask for ask in self.queue if not ask.wait]
        if now >= self._polls_at:
            await self._find_repeats(list(self.queue))
        for _ in range(20):
            if not await self._serve():
                break
        if self.foreign and any(ask in self.queue for ask in newcomers):
            await self._exchange(time.monotonic())  # who waited elsewhere may have been served meanwhile
            await self._serve()
        for ask in newcomers:
            if ask in self.queue:
                self._answer(ask, [])
        if now >= self._polls_at:  # more seldom where a look takes long
            ended = time.monotonic()
            self._polls_at = ended + max(_jittered(POLL), 5 * (ended - now))

    async def _serve(self) -> bool:
        """Hand out what is free. False when there was nothing to hand out.

        The calls themselves are looked at only when somebody is free: thousands may wait for the same.
        """
        kinds, present = dict(self._kinds), list(self.queue)
        wishes = list(dict.fromkeys(wish for kind in kinds for wish in kind))
        elsewhere = sum(len(ask.wishes) for ask in self.foreign)
        demand = sum(len(kind) * count for kind, count in kinds.items()) + elsewhere
        # What sets and those who wait elsewhere keep must not hide the free users behind it.
        kept = elsewhere + sum(len(kind) * count for kind, count in kinds.items() if len(kind) > 1)
        fitting: dict[Wish, list[uuid.UUID]] = {wish: [] for wish in wishes}
        rows = []
        for first in range(0, len(wishes), LOOK):
            page = wishes[first : first + LOOK]
            for row in await self._find_free(page, min(demand, BREADTH + kept)):
                fitting[page[row["filter"] - 1]].append(row["id"])
                rows.append(row)
        if not rows:
            return False
        self._fit_foreign(fitting, rows)
        here = [ask for ask in present if ask in self.queue]
        chosen = match(sorted([*here, *self.foreign], key=lambda ask: ask.arrived), fitting, time.monotonic())
        groups = list(chosen.items())
        for first in range(0, len(groups), GROUPS):  # some may have left while others were served
            await self._take({ask: users for ask, users in groups[first : first + GROUPS] if ask in self.queue})
        return bool(chosen)

    async def _find_free(self, wishes: list[Wish], most: int) -> list[asyncpg.Record]:
        began = time.monotonic()
        rows = await self.farm.hot.fetch(SQL["find_free"], *_columns(wishes, Wish), self.farm.are_rare(wishes), most)
        self.farm.learn(wishes, time.monotonic() - began)
        return rows

    def _fit_foreign(self, fitting: dict[Wish, list[uuid.UUID]], rows: list[asyncpg.Record]) -> None:
        users = {row["id"]: (row, msgspec.json.decode(row["labels"])) for row in rows} if self.foreign else {}
        for wish in {wish for ask in self.foreign for wish in ask.wishes} - fitting.keys():
            fitting[wish] = [id for id, (row, labels) in users.items() if wish.fits(row, labels)]

    async def _take(self, chosen: dict[Ask, list[uuid.UUID]]) -> None:
        if not chosen:
            return
        for ask, users in chosen.items():
            ask.lock_ids = [new_id() for _ in users]
        self._taking = set(chosen)
        try:
            self.farm.events.batched("acquire_users", len(chosen))
            rows = {row["lock_id"]: row for row in await self.farm.hot.fetch(SQL["acquire_users"], *_groups(chosen))}
            self.farm.granted(rows.values(), {id: ask for ask in chosen for id in ask.lock_ids}, by_desk=True)
            for ask in chosen:
                if ask.lock_ids[0] in rows:
                    self._answer(ask, [rows[id] for id in ask.lock_ids])
            await self._find_repeats([ask for ask in chosen if ask in self.queue])
        except Busy:
            raise
        except DATABASE_FAULTS:
            lost = [ask for ask in chosen if ask.key is None and not ask.answer.done()]
            self.farm.lose([id for ask in lost for id in ask.lock_ids])
            raise
        finally:
            self._taking = set()
            self._dismiss(chosen)

    def _dismiss(self, chosen: Iterable[Ask]) -> None:
        """Those who wanted to go, or have to, and had to wait for the outcome."""
        for ask in [ask for ask in chosen if ask in self.queue]:
            if self._closed:
                self._refuse(ask, ShuttingDown())
            elif ask.leaving:
                self._answer(ask, [])

    async def _find_repeats(self, asks: list[Ask]) -> None:
        """Idempotency keys that another call has bound meanwhile: the handler finds their locks."""
        keyed = [ask for ask in asks if ask.key]
        if keyed:
            bound = await self.farm.find_keyed([cast("uuid.UUID", ask.key) for ask in keyed])
            for ask, rows in zip(keyed, bound, strict=True):
                if rows and ask in self.queue:
                    self._answer(ask, [])

    async def _find_deleted(self) -> None:
        """Users that somebody waits for and that are gone: the handler says so."""
        asked = [(ask, ask.wishes[0].user_id) for ask in self.queue if ask.wishes[0].user_id]
        if asked:
            rows = await self.farm.hot.fetch(SQL["list_existing"], list({user_id for _, user_id in asked}))
            existing = {row["id"] for row in rows}
            for ask in [ask for ask, user_id in asked if user_id not in existing]:
                self._answer(ask, [])

    async def _exchange(self, now: float) -> None:
        """Tell the other replicas who has waited here for long, and learn it of them."""
        queue = self._long_waiting(now)
        rows = await self.farm.hot.fetch(
            SQL["exchange_waiting"], self.replica, msgspec.json.encode(queue).decode() if queue else None
        )
        now = time.monotonic()
        self.foreign = [
            Ask(wishes=told.wishes, home=told.home, arrived=now - row["age"] - told.age + HEAD_START, foreign=True)
            for row in rows
            for told in msgspec.json.decode(row["queue"], type=list[Told])
        ]
        self._foreign_projects = {pool.project_id for ask in self.foreign for pool in ask.pools()}
        if any(ask.wait for ask in self.queue):
            self._tell("waiting")
        self._exchanges_at = now + _jittered(EXCHANGE if self.queue or rows else 2 * EXCHANGE)

    def _long_waiting(self, now: float) -> list[Told]:
        """The longest waiting for each distinct list of wishes, as the others need it."""
        heads: dict[tuple[Wish, ...], Ask] = {}
        wanted = min(len(self._kinds), 100)
        for ask in self.queue:
            if ask.wait and now - ask.arrived > HEAD_START / 2:
                heads.setdefault(tuple(ask.wishes), ask)
            if len(heads) == wanted:
                break
        for ask in heads.values():
            ask.told = True
        return [Told(now - ask.arrived, ask.wishes, ask.home) for ask in heads.values()]


def _take_out(counter: Counter[Any], item: Any) -> None:
    """One less of an item; the last one leaves no trace."""
    counter[item] -= 1
    if not counter[item]:
        del counter[item]


def _jittered(seconds: float) -> float:
    return seconds * (0.75 + secrets.randbelow(500) / 1000)


def _groups(chosen: dict[Ask, list[uuid.UUID]]) -> list[list[Any]]:
    """As acquire_users.sql takes them."""
    rows = [
        (number, user, lock_id, ask.holder, ask.ttl, ask.key, ask.client, wish.domain, wish.labels)
        for number, (ask, users) in enumerate(chosen.items())
        for user, lock_id, wish in zip(users, ask.lock_ids, ask.wishes, strict=True)
    ]
    return [list(column) for column in zip(*rows, strict=True)]


async def listen(farm: Farm, url: str) -> None:
    """Hear what other replicas tell (for ever). A connection that died without a word is noticed by its heartbeat."""
    while True:
        try:
            connection = await asyncpg.connect(url, timeout=5)
            try:
                await connection.add_listener("botfarm", lambda *news: farm.desk.hear(news[-1]))
                while True:
                    await asyncio.sleep(_jittered(5))
                    await connection.fetchval("select 1", timeout=3)
            finally:
                connection.terminate()
        except (asyncpg.PostgresError, *DATABASE_FAULTS) as fault:
            farm.events.database_failed("No news of other replicas, polls go on", fault)
        await asyncio.sleep(_jittered(5))


# ------------------------------------------------------------------------------------------------------
# Farm: what the handlers share, and the statements of locks that many calls share.
# ------------------------------------------------------------------------------------------------------


class Release(Struct):
    lock_id: uuid.UUID
    cooldown: int = 0
    quarantine: str | None = None
    client: uuid.UUID | None = None  # whose lock it has to be; null: anybody's
    cause: Cause = NOWHERE


class Renewal(Struct):
    lock_id: uuid.UUID
    ttl: int | None
    client: uuid.UUID | None = None  # whose lock it has to be; null: anybody's
    cause: Cause = NOWHERE


L = TypeVar("L", Release, Renewal)


class Refusal(Struct):
    """Why a wish gets no user, and how many are free all the same (their rows are locked in this moment)."""

    matching: int
    free: int
    response: Refused


# A release may commit a moment after a claim has passed its place; look back this far for such stragglers.
STRAGGLERS = timedelta(milliseconds=20)
COSTLY = 10_000  # users from which counts are worth keeping for a moment
SLOW_LOOK = 0.005  # seconds from which it is worth knowing how many have the labels
RARE = 1000  # users up to which a look begins with those who have the labels


class Farm:
    """What the handlers share: settings, the two pools, the passwords and the coalesced statements.

    Locks have connections of their own (`hot`), so that no import, list or export stands before them.
    """

    def __init__(
        self,
        settings: Settings,
        hot: Connections,
        pool: Connections,
        passwords: Passwords,
        events: Events,
        gate: Gate | None = None,
    ) -> None:
        self.settings = settings
        self.gate = gate
        self.hot = hot
        self.pool = pool
        self.passwords = passwords
        self.events = events
        self.acquire = Coalescer(self._acquire, settings.batch, partial(events.batched, "acquire_locks"))
        self.release = Coalescer(self._release, settings.batch, partial(events.batched, "release_locks"))
        self.extend = Coalescer(self._extend, settings.batch, partial(events.batched, "extend_locks"))
        self.keyed = Coalescer(self.find_keyed, settings.batch, partial(events.batched, "get_keyed_locks"))
        self.refusal = Coalescer(self._refusals, settings.batch, partial(events.batched, "count_matching"))
        self.desk = Desk(self)
        # What was refused last, and refusals whose counts took long to gather, with the time they last.
        self.exhausted: dict[Wishes, None] = {}
        self._costly: dict[Wishes, tuple[float, Refusal]] = {}
        self._rare: dict[Wish, tuple[bool, float]] = {}  # whether few users have the labels, and until when that lasts
        # Locks that may have been granted by a statement whose reply was lost, and until when the sweep tries to
        # give them back: the statement may still be running.
        self._unanswered: dict[uuid.UUID, float] = {}
        self._found_later: dict[uuid.UUID, float] = {}
        self._cursors: dict[Wish, dict[int, datetime]] = {}
        self.census = Census(pool, events)
        self.imports = asyncio.Semaphore(2)
        self.stopping = False
        self._spawned: set[asyncio.Task[None]] = set()

    async def claim(self, ask: Ask) -> list[asyncpg.Record] | None:
        """The rows of the users that it got, maybe none; None when it has to wait for the desk's answer."""
        ask.answer = None
        if len(ask.wishes) == 1:
            return await self.acquire(ask)
        self.desk.join(ask)
        return None

    async def give_back(self, rows: list[asyncpg.Record], cause: Cause) -> None:
        """Release what was granted to a caller that can't have it; where that fails, the sweep does it."""
        try:
            await asyncio.gather(*(self.release(Release(row["lock_id"], cause=cause)) for row in rows))
        except DATABASE_FAULTS:
            self.lose([row["lock_id"] for row in rows])

    def lose(self, lock_ids: Iterable[uuid.UUID]) -> None:
        """Remember locks that nobody was told of, for the sweep."""
        self._unanswered |= dict.fromkeys(lock_ids, time.monotonic() + 30)

    async def find_lost(self) -> None:
        """Give back the locks that nobody was told of."""
        now = time.monotonic()
        while lost := list(itertools.islice(self._unanswered, 500)):
            freed = await asyncio.gather(*(self.release(Release(lock_id)) for lock_id in lost))
            kept = {id: self._unanswered.pop(id) for id in lost}
            self._found_later |= {
                id: kept[id] for id, found in zip(lost, freed, strict=True) if not found and kept[id] > now
            }
        self._unanswered, self._found_later = self._found_later, {}

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something after the reply."""
        task = asyncio.create_task(work)
        self._spawned.add(task)
        task.add_done_callback(self._spawned.discard)

    async def settle(self) -> None:
        """Give back what is to be given back; two seconds at most."""
        with contextlib.suppress(*DATABASE_FAULTS):
            async with asyncio.timeout(2):
                await asyncio.gather(*self._spawned, self.find_lost())

    def stop(self) -> None:
        """The service ends: nobody is granted anything any more, and those who wait are told."""
        self.stopping = True
        self.desk.close()

    async def _acquire(self, asks: list[Ask]) -> list[list[asyncpg.Record] | None]:
        """The row of each that got a user, none for those that did not, None for those that wait at the desk.

        Everything up to the next batch happens at once, so that nobody who comes later is served before those
        who begin to wait now.
        """
        waiting = {ask for ask in asks if self.desk.crowded(ask)}
        granted = await self._claim_for([ask for ask in asks if ask not in waiting])
        waiting |= {ask for ask in asks if ask.wait and ask not in granted}
        for ask in sorted(waiting, key=lambda ask: ask.arrived):
            self.desk.join(ask)
        return [None if ask.answer else granted.get(ask, []) for ask in asks]

    async def _claim_for(self, asks: list[Ask]) -> dict[Ask, list[asyncpg.Record]]:
        """Rows of those that got a user. Where wishes overlap, one may find only users that another one took."""
        granted: dict[Ask, list[asyncpg.Record]] = {}
        while left := [ask for ask in asks if ask not in granted]:
            for ask in left:
                ask.lock_ids = [new_id()]
            try:
                rows = {row["lock_id"]: row for row in await self._claim(left)}
            except Exception:
                if not granted:
                    raise
                break  # those who got a user are told so; the others find out why they did not
            granted |= {ask: [rows[ask.lock_ids[0]]] for ask in left if ask.lock_ids[0] in rows}
            if not rows:
                break
        return granted

    async def _claim(self, asks: list[Ask]) -> list[asyncpg.Record]:
        wanted = Counter(ask.wishes[0] for ask in asks)
        wishes = {wish: ordinal for ordinal, wish in enumerate(wanted, 1)}
        try:
            rows = await self.hot.fetch(
                SQL["acquire_locks"],
                *_columns(wishes, Wish),
                list(wanted.values()),
                *self._cursor_columns(wishes),
                [wishes[ask.wishes[0]] for ask in asks],
                [ask.lock_ids[0] for ask in asks],
                [ask.holder for ask in asks],
                [ask.ttl for ask in asks],
                [ask.key for ask in asks],
                [ask.client for ask in asks],
            )
        except Busy:
            raise
        except DATABASE_FAULTS:
            self.lose([ask.lock_ids[0] for ask in asks if ask.key is None])
            raise
        asked = {ask.lock_ids[0]: ask for ask in asks}
        self.granted(rows, asked)
        self._advance(rows, asked)
        return rows

    def granted(self, rows: Iterable[asyncpg.Record], asks: Mapping[uuid.UUID, Ask], by_desk: bool = False) -> None:
        """Tell of the locks that a statement has granted."""
        now = time.monotonic()
        for row in rows:
            ask = asks[row["lock_id"]]
            seconds = int((now - ask.arrived) * 1e6) / 1e6  # cheaper than round()
            self.events.acquired(row, ask.cause, seconds, waited=by_desk and ask.wait > 0)

    def _cursor_columns(self, wishes: dict[Wish, int]) -> tuple[list[int], list[int], list[datetime]]:
        known = [(o, p, since) for wish, o in wishes.items() for p, since in self._cursors.get(wish, {}).items()]
        return [row[0] for row in known], [row[1] for row in known], [row[2] for row in known]

    def _advance(self, rows: list[asyncpg.Record], asks: Mapping[uuid.UUID, Ask]) -> None:
        """Begin the next search where this one ended: see acquire_locks.sql."""
        if len(self._cursors) > 10_000:
            self._cursors.clear()
        ends: dict[tuple[Wish, int], datetime] = {}
        for row in rows:
            place = asks[row["lock_id"]].wishes[0], row["pool_id"]
            ends[place] = max(row["since"], ends.get(place, row["since"]))
        for (wish, pool_id), end in ends.items():
            if wish.user_id is None:
                self._cursors.setdefault(wish, {})[pool_id] = end - STRAGGLERS

    async def _release(self, releases: list[Release]) -> list[bool]:
        """Whether each was held. A lock that is released twice at once is held for the first one only."""
        once: dict[tuple[uuid.UUID, uuid.UUID | None], Release] = {}
        for release in releases:
            once.setdefault((release.lock_id, release.client), release)
        rows = await self.hot.fetch(SQL["release_locks"], *_columns(_by_lock_id(once.values()), Release))
        freed = {id(once[row["lock_id"], row["client"]]) for row in rows}
        for row in rows:
            release = once[row["lock_id"], row["client"]]
            self.events.ended("released", row, release.cause, release.cooldown)
            if release.quarantine is not None:
                self.events.quarantined(row["user_id"], release.quarantine, release.cause)
        if freed:
            self.desk.freed()
        return [id(release) in freed for release in releases]

    async def _extend(self, renewals: list[Renewal]) -> list[asyncpg.Record | None]:
        """Rows of those that are held. Of several renewals of one lock at once, the last one counts."""
        last = {(renewal.lock_id, renewal.client): renewal for renewal in renewals}
        rows = await self.hot.fetch(SQL["extend_locks"], *_columns(_by_lock_id(last.values()), Renewal))
        extended = {row["lock_id"]: row for row in rows}
        for row in rows:
            renewal = last.get((row["lock_id"], row["client_id"])) or last[row["lock_id"], None]
            self.events.extended(row, renewal.cause)
        found = [extended.get(renewal.lock_id) for renewal in renewals]
        pairs = zip(renewals, found, strict=True)
        return [row if row and renewal.client in (None, row["client_id"]) else None for renewal, row in pairs]

    async def find_keyed(self, keys: list[uuid.UUID]) -> list[list[asyncpg.Record]]:
        """What each idempotency key has bound: nothing, or a row for each lock."""
        bound: dict[uuid.UUID, list[asyncpg.Record]] = {key: [] for key in keys}  # in the order they were asked for
        for row in await self.hot.fetch(SQL["get_keyed_locks"], list(bound)):
            bound[row["key"]].append(row)
        return [bound[key] for key in keys]

    async def _refusals(self, asked: list[Wishes]) -> list[Refusal]:
        """Why there is no user.

        Those who are refused in one moment share the counts and the reply (0.18 -> 1.2 of the cycle rate). Counts of
        many users are kept for four times as long as they took, so a hammered pool of a million is not counted for
        ever.
        """
        began = time.monotonic()
        kept = {wishes: self._costly[wishes] for wishes in asked if wishes in self._costly}
        refusals = {wishes: refusal for wishes, (until, refusal) in kept.items() if until > began}
        singles = [wishes[0] for wishes in dict.fromkeys(asked) if wishes not in refusals and len(wishes) == 1]
        if singles:
            rows = await self.pool.fetch(SQL["count_matching"], *_columns(singles, Wish))
            took = time.monotonic() - began
            for row in rows:
                wish = singles[row["filter"] - 1]
                refusals[(wish,)] = Refusal(row["matching"], row["free"], _refused(self, wish, row).response())
                self._remember((wish,), refusals[(wish,)], took)
        for wishes in dict.fromkeys(asked):
            if wishes not in refusals:
                refusals[wishes] = await self._set_refusal(wishes)
        return [refusals[wishes] for wishes in asked]

    def are_rare(self, wishes: Sequence[Wish]) -> list[bool]:
        """For each wish whether few users have its labels, as far as that is known."""
        return [self._rare.get(wish, (False, 0))[0] for wish in wishes]

    def learn(self, wishes: Iterable[Wish], seconds: float) -> None:
        """Count the users with the labels of wishes that took long to look after.

        Where few have them they are found by their labels from then on, and not among all that are free: a call
        that waited for a label of one in 100,000 users made all others of its project take 170 ms.
        """
        now = time.monotonic()
        if len(self._rare) > 10_000:
            self._rare.clear()
        for wish in wishes:
            is_rare, until = self._rare.get(wish, (False, 0))
            if wish.labels and now >= until and (is_rare or seconds > SLOW_LOOK):
                self._rare[wish] = is_rare, now + 60
                self.spawn(self._learn(wish))

    async def _learn(self, wish: Wish) -> None:
        with contextlib.suppress(*DATABASE_FAULTS):
            self._rare[wish] = (await self.refusal((wish,))).matching <= RARE, time.monotonic() + 60

    async def _set_refusal(self, wishes: Wishes) -> Refusal:
        began = time.monotonic()
        distinct = list(dict.fromkeys(wishes))
        fitting: dict[Wish, list[uuid.UUID]] = {wish: [] for wish in distinct}
        rare = self.are_rare(distinct)
        for row in await self.pool.fetch(SQL["find_matching"], *_columns(distinct, Wish), rare, len(wishes)):
            fitting[distinct[row["filter"] - 1]].append(row["id"])
        counts = await self.pool.fetchrow(SQL["count_set"], *_columns(distinct, Wish))
        enough = bool(match([Ask(wishes=list(wishes))], fitting, 0))
        refused = _set_refused(self, wishes, cast("asyncpg.Record", counts), enough)
        refusal = Refusal(cast("asyncpg.Record", counts)["matching"], 0, refused.response())
        self._remember(wishes, refusal, time.monotonic() - began)
        return refusal

    def _remember(self, wishes: Wishes, refusal: Refusal, took: float) -> None:
        if len(self.exhausted) + len(self._costly) > 10_000:
            self.exhausted.clear()
            self._costly.clear()
        self._costly.pop(wishes, None)
        self.exhausted.pop(wishes, None)
        if refusal.matching >= COSTLY:
            self._costly[wishes] = time.monotonic() + 4 * took, refusal
        elif not refusal.free and len(wishes) == 1:  # a set is asked for at the desk, which costs no count
            self.exhausted[wishes] = None


def _by_lock_id(items: Iterable[L]) -> list[L]:
    return sorted(items, key=lambda item: item.lock_id)


def _columns(items: Iterable[Struct], kind: type[Struct]) -> list[list[Any]]:
    """A list for each field of the items but their cause, as unnest() takes them."""
    kept = list(items)
    return [[getattr(item, name) for item in kept] for name in kind.__struct_fields__ if name != "cause"]


# ------------------------------------------------------------------------------------------------------
# Calls: how a handler declares its path, query, body and refusals once, for the parsing and for the
# OpenAPI document alike.
# ------------------------------------------------------------------------------------------------------

JSON = "application/json"
NDJSON = "application/x-ndjson"
CSV = "text/csv"
PROMETHEUS = "text/plain; version=1.0.0"  # Litestar adds the charset
PAUSE = 30  # seconds that a body may take, and an import pause
ROUTES: list[Any] = []
Verb = Callable[..., Callable[[Callable[..., Any]], Any]]


def get(path: str, **options: Any) -> Any:
    """GET, and with it HEAD: the same without the body."""
    return route(path, http_method=[HttpMethod.GET, HttpMethod.HEAD], **options)


class Call(Struct):
    """What a handler declares of itself."""

    tag: str
    scope: Literal["open", "users:read", "users:write", "locks", "admin"]  # what a token needs for it
    status: int
    body: type[Struct] | None = None
    body_optional: bool = False
    query: type[Struct] | None = None
    no_query: Struct | None = None  # what a call without a query string gets, where nothing is required
    answer: type[Struct] | None = None
    media: str = JSON
    keyed: bool = False
    upload: bool = False
    problems: tuple[type[Problem], ...] = ()


class NoQuery(Body):
    """A call without query parameters."""


class NoBody(Body):
    """A call without a body: what somebody meant as a filter there must not widen it."""


NO_BODY = Call("", "open", 204, body=NoBody, body_optional=True)


def call(verb: Verb, path: str, **declared: Any) -> Callable[[Callable[..., Awaitable[Response]]], None]:
    """Register a handler; it gets the farm and the request, and id, query and body where it declares them."""
    declaration = Call(**declared)
    if declaration.query and not any(field.required for field in msgspec.structs.fields(declaration.query)):
        declaration.no_query = declaration.query()

    def register(handler: Callable[..., Awaitable[Response]]) -> None:
        async def attempt(request: Request, read: dict[str, Any]) -> Response:
            try:
                farm: Farm = request.app.state.farm
                if not read:  # a body can be read only once
                    read["arguments"] = await _admitted(farm, request, path, declaration)
                return await handler(farm, request, **read["arguments"])
            except Problem as problem:
                return problem.response()
            except DATABASE_FAULTS as fault:
                told = "The database does not answer"
                request.app.state.farm.events.database_failed(told, fault, cause_of(request))
                return DatabaseUnavailable().response()
            except KeyFault as fault:
                log.error("%s", fault, extra={"cause": cause_of(request)})
                return DatabaseUnavailable("A password is sealed with a key that this replica lacks.").response()
            except asyncio.CancelledError:  # the server has waited for it as long as it may
                if not request.app.state.farm.stopping:
                    raise
                return ShuttingDown(headers={"Connection": "close"}).response()

        async def persist(request: Request) -> Response:
            read: dict[str, Any] = {}
            for _ in range(1 if declaration.upload else 5):
                with contextlib.suppress(asyncpg.DeadlockDetectedError):  # rolled back whole, so safe to repeat
                    return await attempt(request, read)
            return DatabaseUnavailable("Too many calls change the same users; try again.").response()

        async def endpoint(request: Request) -> Response:
            return _echoed(request, _counted(request, await persist(request)))

        endpoint.__doc__ = handler.__doc__
        limits = {"request_max_body_size": None} if declaration.upload else {}
        options = {"call": declaration, "name": handler.__name__}
        ROUTES.append(verb(path, status_code=200, opt=options, include_in_schema=False, **limits)(endpoint))

    return register


def _counted(request: Request, answer: Response) -> Response:
    if isinstance(answer, Refused):
        request.app.state.farm.events.refused(answer.slug)
    return answer


CALLER = "botfarm-caller"  # in the state of a request: who calls, where authentication is on


def caller_of(request: Request) -> Caller:
    return request.scope["state"].get(CALLER, ANYBODY)


async def _admitted(farm: Farm, request: Request, path: str, declared: Call) -> dict[str, Any]:
    """What the handler gets, read after a look at who calls."""
    if farm.gate is None or declared.scope == "open":
        return await _arguments(farm, request, declared)
    caller = await farm.gate.admit(header(request, b"authorization"), declared.scope)
    request.scope["state"][CALLER] = caller
    arguments = await _arguments(farm, request, declared)
    if caller.projects is not None:
        await _keep_inside(farm, caller, caller.projects, path, arguments)
    return arguments


async def _keep_inside(
    farm: Farm, caller: Caller, projects: Sequence[uuid.UUID], path: str, arguments: dict[str, Any]
) -> None:
    """A client that is limited to projects names no others, and users of others do not exist for it.

    A lock of its own is in them anyway; one of another client is only an admin's to touch.
    """
    for value in (arguments.get("query"), arguments.get("body")):
        for named in (value, *getattr(value, "users", ())):
            if (project_id := getattr(named, "project_id", None)) and project_id not in projects:
                raise Forbidden.project(project_id)
    id = arguments.get("id")
    is_user = path.startswith("/users/")
    if id is None or not (is_user or caller.owner is None):
        return
    if await farm.pool.fetchval(SQL["get_project"], *((id, None) if is_user else (None, id))) not in projects:
        raise _no_user(id) if is_user else _no_lock(id)


async def _arguments(farm: Farm, request: Request, declared: Call) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if text := request.path_params.get("id"):
        arguments["id"] = _path_id(text)
    if request.scope["query_string"]:
        arguments["query"] = _read_query(farm, request.scope["query_string"], declared.query or NoQuery)
    elif declared.query:
        arguments["query"] = declared.no_query or _read_query(farm, b"", declared.query)
    if declared.body:
        arguments["body"] = await _read_body(farm, request, declared)
    elif request.scope["method"] == "DELETE" and _has_body(request):
        await _read_body(farm, request, NO_BODY)
    return arguments


def _has_body(request: Request) -> bool:
    """Whether a body is announced."""
    headers = request.scope["headers"]
    return any(name in (b"content-length", b"transfer-encoding") and value != b"0" for name, value in headers)


def _path_id(text: str) -> uuid.UUID:
    try:
        return msgspec.convert(text, uuid.UUID)
    except msgspec.ValidationError:
        raise NotFound(f"{_shown(text)} in the path is not a UUID.") from None


def header(request: Request, name: bytes) -> str | None:
    """A header of the request. Looked up in the scope, because request.headers builds a mapping of them all first."""
    return next((value.decode("latin-1") for key, value in request.scope["headers"] if key == name), None)


async def _read_all(request: Request, limit: int, named: str = "BOTFARM_MAX_BODY") -> bytes:
    """The whole body. (request.body() took 8 of the 80 us that a call of a cycle costs.)"""
    _check_length(request, limit, named)
    event = await _body_part(request)
    if not event.get("more_body", False) and len(event["body"]) <= limit:
        return event["body"]
    try:
        async with asyncio.timeout(PAUSE):
            return await _read_rest(request, event, limit, named)
    except TimeoutError:
        close = {"Connection": "close"}
        raise MalformedBody(f"The body did not come to its end within {PAUSE} seconds.", headers=close) from None


def _check_length(request: Request, limit: int, named: str) -> None:
    """Refuse a body that is announced as too long before any of it is sent."""
    if int(header(request, b"content-length") or 0) > limit:
        raise _too_large(limit, named)


def _too_large(limit: int, named: str) -> BodyTooLarge:
    """Without an end of the connection, which would reset it under a caller that still sends, and lose the reply."""
    return BodyTooLarge(f"The body is over {named}, {limit} bytes.")


async def _read_rest(request: Request, event: dict[str, Any], limit: int, named: str) -> bytes:
    body = bytearray()
    while True:
        body += event["body"]
        if len(body) > limit:
            raise _too_large(limit, named)
        if not event.get("more_body", False):
            return bytes(body)
        event = await _body_part(request)


async def _body_part(request: Request) -> dict[str, Any]:
    event = cast("dict[str, Any]", await request.receive())
    if event["type"] == "http.disconnect":
        raise ClientException("the client went away before the end of the body")
    return event


async def _read_body(farm: Farm, request: Request, declared: Call) -> Struct:
    body = await _read_all(request, farm.settings.max_body)
    kind = cast("type[Struct]", declared.body)
    if not body and declared.body_optional:
        return kind()
    media = header(request, b"content-type")
    if media is None:  # as JSON, but not from a page in a browser, which could send that to any address unasked
        media = JSON if header(request, b"origin") is None else "none"
    if media != JSON and (media := media.partition(";")[0].strip().lower()) != JSON:
        raise UnsupportedMediaType(f"The content type is {media!r}, but this call takes {JSON} (curl: --json).")
    try:
        return decode_body(farm.settings, body, kind)
    except MalformedBody:
        if encoding := header(request, b"content-encoding"):
            raise _encoded(encoding) from None
        raise


def _encoded(encoding: str) -> UnsupportedMediaType:
    return UnsupportedMediaType(f"The content encoding {encoding!r} is not supported: send it as it is.")


# What msgspec raises for what is no JSON, is no UTF-8, or is nested too deep.
UNREADABLE = (msgspec.DecodeError, UnicodeError, RecursionError)


def decode_body(settings: Settings, body: bytes, kind: type[T]) -> T:
    """A body as its struct. MalformedBody when it is no JSON, Invalid when a value breaks a rule."""
    try:
        value = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError:
        value = _whole_numbers(_raw_json(body), kind)
    except UNREADABLE as error:
        raise _no_json(error) from None
    if faults := check_words(settings, value):
        raise Invalid(faults)
    return value


def _no_json(error: Exception) -> MalformedBody:
    return MalformedBody(f"The body is not JSON in UTF-8 that can be read: {str(error) or 'nested too deep'}.")


def _whole_numbers(raw: Any, kind: type[T]) -> T:
    """What was refused because a whole number is written as 60.0, which is the same in JSON."""

    def whole(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: whole(value) for key, value in node.items()}
        if isinstance(node, list):
            return [whole(item) for item in node]
        return int(node) if isinstance(node, float) and node.is_integer() else node

    try:
        raw = whole(raw)
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as left:
        raise Invalid(field_errors(left, raw, kind)) from None
    except RecursionError as left:
        raise _no_json(left) from None


def _raw_json(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except UNREADABLE as error:
        raise _no_json(error) from None


def _read_query(farm: Farm, query: bytes, kind: type[T]) -> T:
    values: dict[str, Any] = {}
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError as error:
        raise Invalid([FieldError(None, f"the query string is not readable: {error}")]) from None
    for name, value in pairs:
        if name == "label" and "label" in cast("Any", kind).__struct_fields__:
            values.setdefault("label", []).append(value)
        elif name in values:
            raise Invalid([FieldError(name, "is given twice")])
        else:
            values[name] = value
    try:
        parsed = msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise Invalid(field_errors(error, values, kind, strict=False)) from None
    nulls = [name for name in values if getattr(parsed, name) is None]  # "null" would drop a filter
    faults = [FieldError(name, f"{_shown(values[name])} is not allowed; leave it out") for name in nulls]
    if faults := faults + check_words(farm.settings, parsed):
        raise Invalid(faults)
    return parsed


CAUSE = "botfarm-cause"  # in the state of a request
REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:+/=@-]{1,128}")
# https://www.w3.org/TR/trace-context/#traceparent-header
TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_PREFIX = secrets.token_hex(6)
_NUMBERS = itertools.count(1)


def cause_of(request: Request) -> Cause:
    """Where an event comes from: the request's own id and trace, where it brought some that are well formed."""
    state = request.scope["state"]
    cause = state.get(CAUSE)
    if cause is None:
        request_id = trace_id = None
        echo: dict[str, str] = {}
        for name, value in request.scope["headers"]:
            if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
                request_id = echo["X-Request-Id"] = value.decode()
            elif name == b"traceparent" and (found := TRACEPARENT.fullmatch(value)):
                trace_id, echo["traceparent"] = found[1].decode(), value.decode()
        request_id = request_id or f"{_PREFIX}-{next(_NUMBERS):x}"
        state[CAUSE] = cause = Cause(request_id, trace_id, caller_of(request).client, echo or None)
    return cause


def _echoed(request: Request, answer: Response) -> Response:
    """With the id and the trace that the caller sent. Refusals are shared by many calls, so those are copied."""
    if echo := cause_of(request).echo:
        if isinstance(answer, Refused):
            answer = copy.copy(answer)
        answer.headers = {**answer.headers, **echo}
    return answer


def reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response[bytes]:
    return Response(
        content=msgspec.json.encode(value), status_code=status, media_type=JSON, headers=dict(headers or {})
    )


NO_STORE = {"Cache-Control": "no-store"}


def no_content() -> Response[None]:
    return Response(content=None, status_code=204)


# ------------------------------------------------------------------------------------------------------
# Tokens: the client credentials grant, RFC 6749 section 4.4. The password grant is left out on purpose, see
# RFC 9700 section 2.4. Its answers have the form of that RFC and not of the problems above.
# ------------------------------------------------------------------------------------------------------

FORM = "application/x-www-form-urlencoded"
LONGEST_FORM = 16 * 1024
NOT_STORED = NO_STORE | {"Pragma": "no-cache"}


class Token(Struct):
    """RFC 6749 section 5.1."""

    access_token: str
    token_type: str
    expires_in: int
    scope: str


class TokenError(Struct):
    """RFC 6749 section 5.2."""

    error: str
    error_description: str


@post("/token", status_code=200, include_in_schema=False)
async def issue_token(request: Request) -> Response:
    """Get a token.

    The client by HTTP Basic, or by `client_id` and `client_secret` in the form.
    """
    try:
        return await _issue(request, request.app.state.farm.gate)
    except TokenRefusal as refusal:
        refused = refusal
    except Problem as problem:
        refused = TokenRefusal("invalid_request", problem.detail)
    except DATABASE_FAULTS as fault:
        request.app.state.farm.events.database_failed("The database does not answer", fault, cause_of(request))
        text = "The database does not answer; try again in a moment."
        refused = TokenRefusal("temporarily_unavailable", text, 503, Retry_After="1")
    request.app.state.farm.events.refused(refused.error)
    return reply(TokenError(refused.error, str(refused)), refused.status, NOT_STORED | refused.headers)


async def _issue(request: Request, gate: Gate) -> Response:
    form = await _token_form(request)
    client_id, secret = _credentials(header(request, b"authorization"), form)
    grant = form.get("grant_type")
    if grant is None:
        raise TokenRefusal("invalid_request", "grant_type is missing: it is client_credentials.")
    if grant != "client_credentials":
        raise TokenRefusal("unsupported_grant_type", f"{_shown(grant)} is not the one grant here, client_credentials.")
    client = await gate.authenticate(client_id, secret, request.client.host if request.client else "")
    scope = _granted_scope(form.get("scope", ""), client["scopes"])
    return reply(Token(gate.issue(client["id"], scope), "Bearer", gate.LIFE, scope), 200, NOT_STORED)


async def _token_form(request: Request) -> dict[str, str]:
    """The parameters that have a value; those without count as left out, unknown ones are passed over."""
    if request.scope["query_string"]:
        raise TokenRefusal("invalid_request", "Parameters belong into the body, not into the query string.")
    if (header(request, b"content-type") or "").partition(";")[0].strip().lower() != FORM:
        raise TokenRefusal("invalid_request", f"The content type has to be {FORM}.")
    body = await _read_all(request, LONGEST_FORM, "what a form may have")
    try:
        pairs = parse_qsl(body.decode("ascii"), errors="strict", max_num_fields=100)
    except ValueError:
        raise TokenRefusal("invalid_request", f"The body is not {FORM} in UTF-8.") from None
    if len(dict(pairs)) < len(pairs):
        raise TokenRefusal("invalid_request", "A parameter is there twice.")
    return dict(pairs)


def _credentials(authorization: str | None, form: dict[str, str]) -> tuple[str, str]:
    """Id and secret of the client; RFC 6749 section 2.3.1 allows one way at a time."""
    if authorization is None:
        if "client_id" in form and "client_secret" in form:
            return form["client_id"], form["client_secret"]
        text = "Send the client's id and secret by HTTP Basic, or as client_id and client_secret."
        raise TokenRefusal("invalid_client", text, 401, WWW_Authenticate='Basic realm="botfarm"')
    kind, _, encoded = authorization.partition(" ")
    try:
        client_id, colon, secret = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
    except ValueError:
        kind = client_id = colon = secret = ""
    if kind.lower() != "basic" or not colon:
        text = "The Authorization header is not HTTP Basic with the client's id and secret."
        raise TokenRefusal("invalid_client", text, 401, WWW_Authenticate='Basic realm="botfarm"')
    client_id, secret = unquote_plus(client_id), unquote_plus(secret)
    if "client_secret" in form or form.get("client_id", client_id) != client_id:
        raise TokenRefusal("invalid_request", "The client is there twice: by HTTP Basic and in the form.")
    return client_id, secret


def _granted_scope(asked: str, scopes: Sequence[str]) -> str:
    """The scopes that were asked for, or all of the client."""
    if excess := sorted(set(asked.split()) - with_implied(scopes)):
        raise TokenRefusal("invalid_scope", f"{_shown(excess[0])} is none of the client's scopes, {' '.join(scopes)}.")
    return " ".join(dict.fromkeys(asked.split())) or " ".join(scopes)


# ------------------------------------------------------------------------------------------------------
# Users
# ------------------------------------------------------------------------------------------------------

State_ = Literal["free", "locked", "resting", "quarantined"]
Label = Annotated[str, Meta(pattern=LABEL_PAIR, examples=["role:admin"])]
Limit = Annotated[int, Meta(ge=1, le=1000)]
CursorText = Annotated[str, Meta(max_length=200, description="`next` of the page before")]
FIRST_CURSOR = (datetime(1, 1, 1, tzinfo=UTC), uuid.UUID(int=0))


class UserFilter(Body):
    project_id: uuid.UUID | None = None
    env: Env | None = None
    domain: Domain | None = None
    state: State_ | None = None
    holder: Holder | None = None
    login: Annotated[str, Meta(max_length=254, pattern=PLAIN)] | None = None
    label: list[Label] = []

    def columns(self, page: Sequence[Any], caller: Caller) -> list[Any]:
        """As list_users.sql takes them, for one page."""
        pairs = {cast("tuple[str, str]", tuple(label.split(":", 1))) for label in self.label}
        labels = json.dumps(dict(pairs)) if pairs else None
        if len(dict(pairs)) < len(pairs):  # one key with two values, which nobody has
            labels = "[]"
        project_id, projects = self.project_id, caller.projects
        if projects and len(projects) == 1:  # which an index leads to
            project_id, projects = projects[0], None
        return [project_id, self.env, self.domain, self.state, self.holder, self.login, labels, *page, projects]


class UserQuery(UserFilter):
    limit: Limit = 100
    cursor: CursorText | None = None


class HistoryQuery(Body):
    limit: Limit = 100
    cursor: CursorText | None = None


class DeleteQuery(Body):
    force: bool = False


class PoolQuery(Body):
    project_id: uuid.UUID | None = None


def write_cursor(*place: Any) -> str:
    """Where a page ended. Nothing secret, and nothing that widens the filter, which is applied on each page."""
    return base64.urlsafe_b64encode(msgspec.json.encode(place)).decode().rstrip("=")


def read_cursor(text: str, kind: type[T]) -> T:
    try:
        padded = text + "=" * (-len(text) % 4)
        place = msgspec.json.decode(base64.b64decode(padded, altchars=b"-_", validate=True), type=kind)
        return cast("T", tuple(p.astimezone(UTC) if isinstance(p, datetime) else p for p in cast("tuple", place)))
    except (ValueError, OverflowError):
        message = f"{_shown(text)} is not a cursor: pass `next` of the last page, or leave it out"
        raise Invalid([FieldError("cursor", message)]) from None


def _user(row: asyncpg.Record) -> User:
    locked = row["state"] == "locked"
    lock = UserLock(row["holder"], row["fence"], row["acquired_at"], row["expires_at"]) if locked else None
    return User(
        id=row["id"],
        created_at=row["created_at"],
        login=row["login"],
        project_id=row["project_id"],
        env=row["env"],
        domain=row["domain"],
        labels=cast("Any", msgspec.Raw(row["labels"].encode())),
        state=row["state"],
        locktime=row["acquired_at"] if locked else None,
        lock=lock,
        quarantine=row["quarantine"],
    )


def _no_user(id: uuid.UUID) -> UserNotFound:
    return UserNotFound(f"There is no user {id}.")


async def _get_user(farm: Farm, id: uuid.UUID) -> User:
    row = await farm.pool.fetchrow(SQL["get_user"], id)
    if row is None:
        raise _no_user(id)
    return _user(row)


def _login_taken(login: Any) -> LoginTaken:
    return LoginTaken(f"The login {_shown(login)} exists already in that project and env: choose another one.")


@call(post, "/users", tag="users", scope="users:write", status=201, body=NewUser, answer=User, problems=(LoginTaken,))
async def create_user(farm: Farm, request: Request, body: NewUser) -> Response:
    """Create a user.

    The login is unique within project and env. The password is stored sealed or hashed.
    """
    id = new_id()
    secret = await farm.passwords.store(id, body.password)
    labels = msgspec.json.encode(body.labels).decode()
    row = await farm.pool.fetchrow(
        SQL["create_user"], id, body.login, secret, body.project_id, body.env, body.domain, labels
    )
    if row is None:
        raise _login_taken(body.login)
    farm.events.user("created", id, cause_of(request))
    farm.desk.freed()
    return reply(await _get_user(farm, id), 201, {"Location": f"/users/{id}"})


@call(get, "/users", tag="users", scope="users:read", status=200, query=UserQuery, answer=UserPage)
async def list_users(farm: Farm, request: Request, query: UserQuery) -> Response:
    """List users, oldest first.

    Pass `next` as `cursor` for the next page. All filters must fit; `label=key:value` may be repeated.
    """
    after = read_cursor(query.cursor, tuple[datetime, uuid.UUID]) if query.cursor is not None else FIRST_CURSOR
    rows = await farm.pool.fetch(SQL["list_users"], *query.columns((*after, query.limit + 1), caller_of(request)))
    page = rows[: query.limit]
    more = write_cursor(page[-1]["created_at"], page[-1]["id"]) if len(rows) > query.limit else None
    return reply(UserPage([_user(row) for row in page], more))


@call(get, "/users/{id:str}", tag="users", scope="users:read", status=200, answer=User, problems=(UserNotFound,))
async def get_user(farm: Farm, request: Request, id: uuid.UUID) -> Response:
    """One user with its state."""
    return reply(await _get_user(farm, id))


@call(
    patch, "/users/{id:str}", tag="users", scope="users:write", status=200, body=UserChanges, answer=User,
    problems=(UserNotFound, LoginTaken),
)  # fmt: skip
async def update_user(farm: Farm, request: Request, id: uuid.UUID, body: UserChanges) -> Response:
    """Change a user.

    What is left out stays; labels are replaced whole; a current lock runs on.
    """
    values = [None if value is UNSET else value for value in (body.login, body.password, body.domain)]
    login, password, domain = values
    secret = await farm.passwords.store(id, password) if password is not None else None
    labels = None if body.labels is UNSET else msgspec.json.encode(body.labels).decode()
    try:
        changed = await farm.pool.fetchval(SQL["update_user"], id, login, secret, domain, labels)
    except asyncpg.UniqueViolationError:
        raise _login_taken(login) from None
    if changed:
        farm.events.user("changed", id, cause_of(request), changed=changed)
    farm.desk.freed()  # it may fit somebody now
    return reply(await _get_user(farm, id))


@call(
    delete, "/users/{id:str}", tag="users", scope="users:write", status=204, query=DeleteQuery,
    problems=(UserNotFound, UserLocked),
)  # fmt: skip
async def delete_user(farm: Farm, request: Request, id: uuid.UUID, query: DeleteQuery) -> Response:
    """Delete a user.

    One that is locked is deleted only with `force=true`; its lock then ends as `forced` (another client's: by an
    admin alone).
    """
    row = await farm.pool.fetchrow(SQL["delete_user"], id, query.force, caller_of(request).owner)
    if row is None:
        raise _no_user(id)
    if not row["deleted"] and query.force:
        raise Forbidden.scope("admin")  # the lock is another client's
    if not row["deleted"]:
        raise _user_locked(id, row)
    if row["lock_id"]:
        farm.events.ended("forced" if row["held"] else "expired", row, cause_of(request))
    farm.events.user("deleted", id, cause_of(request))
    return no_content()


def _user_locked(id: uuid.UUID, row: asyncpg.Record) -> UserLocked:
    return UserLocked(
        f"The user {id} is held by {_shown(row['holder'])} until {row['expires_at']:%Y-%m-%dT%H:%M:%S.%fZ}.",
        holder=row["holder"],
        expires_at=row["expires_at"],
    )


@call(
    post, "/users/{id:str}/verify", tag="users", scope="users:write", status=200, body=PasswordCheck, answer=Valid,
    problems=(UserNotFound,),
)  # fmt: skip
async def verify_password(farm: Farm, request: Request, id: uuid.UUID, body: PasswordCheck) -> Response:
    """Tell whether a password is the user's."""
    secret = await farm.pool.fetchval(SQL["get_secret"], id)
    if secret is None:
        raise _no_user(id)
    valid = await farm.passwords.verify(id, secret, body.password)
    farm.events.log("password-checked", cause_of(request), user_id=id, valid=valid)
    return reply(Valid(valid))


@call(
    post, "/users/{id:str}/quarantine", tag="users", scope="users:write", status=200, body=QuarantineReason,
    answer=User, problems=(UserNotFound,),
)  # fmt: skip
async def quarantine_user(farm: Farm, request: Request, id: uuid.UUID, body: QuarantineReason) -> Response:
    """Take a user out.

    A current lock runs on; after it the user is not handed out until it is put back.
    """
    if await farm.pool.fetchval(SQL["set_quarantine"], id, body.reason):
        farm.events.quarantined(id, body.reason, cause_of(request))
    return reply(await _get_user(farm, id))


@call(
    delete,
    "/users/{id:str}/quarantine",
    tag="users",
    scope="users:write",
    status=200,
    answer=User,
    problems=(UserNotFound,),
)
async def end_quarantine(farm: Farm, request: Request, id: uuid.UUID) -> Response:
    """Put a user back. Also when it is not quarantined."""
    if await farm.pool.fetchval(SQL["set_quarantine"], id, None):
        farm.events.user("freed", id, cause_of(request))
    farm.desk.freed()
    return reply(await _get_user(farm, id))


@call(
    get, "/users/{id:str}/history", tag="users", scope="users:read", status=200, query=HistoryQuery, answer=HistoryPage,
    problems=(UserNotFound,),
)  # fmt: skip
async def list_history(farm: Farm, request: Request, id: uuid.UUID, query: HistoryQuery) -> Response:
    """The locks of a user, newest first.

    A live one has neither `ended_at` nor `ended_by`.
    """
    await _get_user(farm, id)
    (before,) = read_cursor(query.cursor, tuple[Fence]) if query.cursor is not None else (1 << 62,)
    rows = await farm.pool.fetch(SQL["list_history"], id, before, query.limit + 1)
    page = [Ended(**row) for row in rows[: query.limit]]
    return reply(HistoryPage(page, write_cursor(page[-1].fence) if len(rows) > query.limit else None))


@call(get, "/pools", tag="users", scope="users:read", status=200, query=PoolQuery, answer=PoolList)
async def list_pools(farm: Farm, request: Request, query: PoolQuery) -> Response:
    """The pools and how many of their users are in which state."""
    rows = await farm.pool.fetch(SQL["list_pools"], query.project_id, caller_of(request).projects)
    return reply(PoolList([Pool(**row, waiting=farm.desk.waiting(_pool_of(row))) for row in rows]))


def _pool_of(row: asyncpg.Record) -> Wish:
    return Wish(None, row["project_id"], row["env"], row["domain"])


# ------------------------------------------------------------------------------------------------------
# Import and export. A file streams through a temporary table into one transaction, in chunks small enough
# that acquires and releases go on between them.
# ------------------------------------------------------------------------------------------------------

LONGEST_LINE = 64 * 1024
SLOWEST = 16 * 1024  # bytes a second that an import has to bring, after its first PAUSE
CHUNK = 500
FIELDS = ("login", "password", "project_id", "env", "domain")
Numbered = tuple[int, ImportedUser]


class Lines:
    """Splits a stream of bytes into numbered lines; `None` stands for a line that is too long."""

    def __init__(self) -> None:
        self.number = 0
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes | None]]:
        *whole, rest = (self._rest + chunk).split(b"\n")
        self._rest = rest[: LONGEST_LINE + 1]  # of a line that is too long, as much as tells so
        for line in whole:
            self.number += 1
            yield self.number, line if len(line) <= LONGEST_LINE else None

    def close(self) -> Iterator[tuple[int, bytes | None]]:
        if self._rest:
            yield from self.feed(b"\n")


class ImportFile:
    """Reads the lines of an import; what is wrong with them gathers in `errors`, the first 100."""

    def __init__(self, settings: Settings, projects: Sequence[uuid.UUID] | None = None) -> None:
        """`projects` are what the caller is limited to; None: all."""
        self.settings = settings
        self.projects = projects
        self.errors: list[LineError] = []

    def read(self, lines: Iterable[tuple[int, bytes | None]]) -> Iterator[Numbered]:
        for number, line in lines:
            if line is None:
                self.fail(number, None, f"the line is over {LONGEST_LINE} bytes")
            elif numbered := self.parse(number, line):
                yield numbered

    def parse(self, number: int, line: bytes) -> Numbered | None:
        """The user of a line and the line it began on."""
        raise NotImplementedError

    def close(self) -> None:
        """Called after the last line."""

    def fail(self, line: int, field: str | None, message: str) -> None:
        self.errors.append(LineError(line, field, message))
        if len(self.errors) > 200:
            self.errors = self.first_errors()

    def first_errors(self) -> list[LineError]:
        return sorted(self.errors, key=lambda error: error.line)[:100]

    def check(self, number: int, user: ImportedUser) -> Numbered | None:
        if self.projects is not None and user.project_id not in self.projects:
            raise Forbidden.project(user.project_id, f"Line {number}: ")
        faults = check_words(self.settings, user)
        for fault in faults:
            self.fail(number, fault.field, fault.message)
        return None if faults else (number, user)

    def fail_field(self, number: int, error: msgspec.ValidationError, raw: Any) -> None:
        """The first fault of a line, so that the first 100 tell of as many lines."""
        fault = field_errors(error, raw, ImportedUser)[0]
        self.fail(number, fault.field, fault.message)


class NdjsonFile(ImportFile):
    """A JSON object a line; blank lines are passed over."""

    _decoder = msgspec.json.Decoder(ImportedUser)

    def parse(self, number: int, line: bytes) -> Numbered | None:
        if not line.strip():
            return None
        try:
            return self.check(number, self._decoder.decode(line))
        except msgspec.ValidationError as error:
            with contextlib.suppress(*UNREADABLE):
                self.fail_field(number, error, msgspec.json.decode(line))
                return None
        except UNREADABLE:
            pass
        self.fail(number, None, "the line is not JSON in UTF-8")
        return None


class CsvFile(ImportFile):
    """RFC 4180 with a header line. Empty cells of password, domain and labels count as left out."""

    def __init__(self, settings: Settings, projects: Sequence[uuid.UUID] | None = None) -> None:
        super().__init__(settings, projects)
        self.header: list[str] | None = None
        self._parts: list[bytes] = []  # a record whose quotes are not closed yet, and the line it began on
        self._size = self._quotes = self._began = 0

    def parse(self, number: int, line: bytes) -> Numbered | None:
        self._parts.append(line)
        self._began = self._began or number
        self._size += len(line) + 1
        self._quotes += line.count(b'"')
        if self._quotes % 2 and self._size <= LONGEST_LINE:
            return None
        began, size, record = self._began, self._size, b"\n".join(self._parts)
        self._parts, self._size, self._quotes, self._began = [], 0, 0, 0
        if size > LONGEST_LINE + 1:
            self.fail(began, None, f"the record is over {LONGEST_LINE} bytes; is a quote not closed?")
            return None
        return self._parse_record(began, record)

    def close(self) -> None:
        if self._parts:
            self.fail(self._began, None, "a quote is not closed")
        elif self.header is None:
            self.fail(1, None, "the file is empty; a CSV file begins with a header line")

    def _parse_record(self, number: int, record: bytes) -> Numbered | None:
        try:
            text = record.decode("utf-8-sig" if self.header is None else "utf-8")
            records = list(csv.reader(io.StringIO(text, newline=""), strict=True))
            if len(records) > 1:
                raise csv.Error("a stray quote or carriage return")
            cells = records[0] if records else []
        except (UnicodeError, csv.Error) as error:
            self.fail(number, None, f"the line is not CSV in UTF-8: {error}")
            self.header = self.header if self.header is not None else []
            return None
        if self.header is None:
            self._read_header(cells)
            return None
        return self._read_cells(number, cells) if cells and self.header else None

    def _read_header(self, cells: list[str]) -> None:
        self.header = [cell.strip() for cell in cells]
        for column, name in enumerate(self.header, 1):  # by number: without a header, a name would be a password
            if name not in FIELDS and not (name.startswith("label.") and re.match(WORD, name[6:])):
                known = f"{', '.join(FIELDS)} or label.<key>"
                self.fail(1, None, f"column {column} is not one of {known}; is the header line missing?")
            elif name in self.header[: column - 1]:
                self.fail(1, name, f"the column {_shown(name)} is there twice")
        for name in ("login", "project_id", "env"):
            if name not in self.header:
                self.fail(1, name, f"the column {name} is missing")
        self.header = [] if self.errors else self.header

    def _read_cells(self, number: int, cells: list[str]) -> Numbered | None:
        header = cast("list[str]", self.header)
        if len(cells) != len(header):
            self.fail(number, None, f"the line has {len(cells)} columns, the header has {len(header)}")
            return None
        named = dict(zip(header, cells, strict=True))
        values: dict[str, Any] = {k: v for k, v in named.items() if k in FIELDS and (v or k in ("login", "env"))}
        values["labels"] = {k[6:]: v for k, v in named.items() if k.startswith("label.") and v}
        try:
            return self.check(number, msgspec.convert(values, ImportedUser))
        except msgspec.ValidationError as error:
            self.fail_field(number, error, values)
            return None


class Changed:
    """The users that an import creates and changes, to be told when it is committed: 17 bytes for each, so that a
    million need no more memory than a few chunks of lines."""

    KINDS = ("created", "updated")

    def __init__(self) -> None:
        self._ids = bytearray()
        self._kinds = bytearray()

    def add(self, rows: Iterable[asyncpg.Record]) -> None:
        for row in rows:
            self._ids += row["id"].bytes
            self._kinds.append(self.KINDS.index(row["kind"]))

    async def tell(self, events: Events, cause: Cause) -> None:
        """A line for each, no faster than the log is written; where its reader stands still, half a minute at most."""
        patience = time.monotonic() + 30
        for number, kind in enumerate(self._kinds):
            if number % CHUNK == 0:
                await asyncio.sleep(0)
                while events.journal and events.journal.is_full() and time.monotonic() < patience:
                    await asyncio.sleep(0.01)
            id = uuid.UUID(bytes=bytes(self._ids[16 * number : 16 * number + 16]))
            events.user("changed" if kind else "created", id, cause)


class Import:
    """One import: a temporary table in one transaction, filled chunk by chunk and applied at the end."""

    def __init__(self, farm: Farm, connection: asyncpg.Connection, file: ImportFile) -> None:
        self.farm = farm
        self.passwords = farm.passwords
        self.connection = connection
        self.file = file
        self.changed = Changed()

    async def stage(self, users: list[Numbered]) -> None:
        """Compare with the users that are known, seal the passwords that are new, and keep both for `apply`."""
        known = await self.connection.fetch(
            SQL["find_known_users"],
            [user.project_id for _, user in users],
            [user.env for _, user in users],
            [user.login for _, user in users],
        )
        by_ordinal = {row["ordinal"]: row for row in known}
        pairs = enumerate(users, 1)
        rows = [await self._row(line, user, by_ordinal.get(ordinal)) for ordinal, (line, user) in pairs]
        await self.connection.copy_records_to_table(
            "import_rows", schema_name="pg_temp", columns=IMPORT_COLUMNS, records=[row for row in rows if row]
        )

    async def _row(self, line: int, user: ImportedUser, known: asyncpg.Record | None) -> tuple[Any, ...] | None:
        if known is None and user.password is None:
            self.file.fail(line, "password", "a password is needed: this user is new")
            return None
        labels = msgspec.json.encode(user.labels).decode()
        id = known["id"] if known else new_id()
        secret = await self._secret(id, user, known)
        kind = "created"
        if known:
            same = known["domain"] == user.domain and msgspec.json.decode(known["labels"]) == user.labels
            kind = "unchanged" if same and secret in (None, known["secret"]) else "updated"
        return line, kind, id, user.project_id, user.env, user.domain, user.login, labels, secret

    async def _secret(self, id: uuid.UUID, user: ImportedUser, known: asyncpg.Record | None) -> str | None:
        """What to store: nothing new without a password, and what stands already where that is the same."""
        if user.password is None:
            return None
        if known and await self.passwords.verify(id, known["secret"], user.password):
            return known["secret"]
        return await self.passwords.store(id, user.password)

    async def apply(self) -> Imported:
        """All or nothing. Invalid when the file has errors, logins that stand in it twice among them."""
        connection = self.connection
        for row in await connection.fetch(SQL["import_duplicates"], timeout=600):
            message = f"{_shown(row['login'])} stands in the lines {row['first']} and {row['line']}"
            self.file.errors.append(LineError(row["line"], "login", message))
        if self.file.errors:
            raise Invalid(self.file.first_errors())
        if pools := await connection.fetch(SQL["import_pools"], timeout=600):
            await self.farm.hot.execute(SQL["make_pools"], *zip(*pools, strict=True))
        for attempt in range(10):
            try:
                async with connection.transaction():
                    await self._write()
                break
            except (asyncpg.UniqueViolationError, asyncpg.DeadlockDetectedError):
                if attempt == 9:
                    raise LoginTaken("Others keep changing the users of this file; send it again.") from None
        if self.farm.events.journal:
            async for row in connection.cursor(SQL["import_changed"], prefetch=CHUNK, timeout=600):
                self.changed.add([row])
        kinds = dict(await connection.fetch(SQL["import_kinds"], timeout=600))
        return Imported(*(kinds.get(kind, 0) for kind in Imported.__struct_fields__))

    async def _write(self) -> None:
        """Others may create, rename or delete users of the file until now: look once more, then write."""
        await self.connection.execute(SQL["import_lock"], timeout=600)
        await self._renew()
        await self._adopt()
        for statement in ("import_create", "import_unlock", "import_update", "import_move"):
            await self.connection.execute(SQL[statement], timeout=3600)

    async def _renew(self) -> None:
        """Users that were known when they were staged, and are gone: make them anew."""
        rows = await self.connection.fetch(SQL["import_lost"], timeout=600)
        for row in rows:
            if row["secret"] is None:
                self.file.fail(row["line"], "password", "a password is needed: this user was deleted meanwhile")
        if self.file.errors:
            raise Invalid(self.file.first_errors())
        ids = [new_id() for _ in rows]
        pairs = zip(ids, rows, strict=True)
        secrets = [self.passwords.reseal(row["id"], id, row["secret"]) for id, row in pairs]
        await self.connection.execute(SQL["import_renew"], [row["line"] for row in rows], ids, secrets)

    async def _adopt(self) -> None:
        """Users of the file that another call made since they were staged: seal for them, and update them."""
        rows = await self.connection.fetch(SQL["import_overtaken"], timeout=600)
        secrets = [self.passwords.reseal(row["staged_id"], row["id"], row["secret"]) for row in rows]
        await self.connection.execute(
            SQL["import_adopt"], [row["staged_id"] for row in rows], [row["id"] for row in rows], secrets
        )


IMPORT_COLUMNS = ("line", "kind", "id", "project_id", "env", "domain", "login", "labels", "secret")


@call(
    post, "/users/import", tag="users", scope="users:write", status=200, answer=Imported, upload=True,
    problems=(UnsupportedMediaType, BodyTooLarge, MalformedBody, LoginTaken),
)  # fmt: skip
async def import_users(farm: Farm, request: Request) -> Response:
    """Create or replace many users by project, env and login.

    NDJSON (`application/x-ndjson`) or CSV (`text/csv`, labels as `label.<key>` columns), all or nothing. A known
    user keeps its lock, and its password when its line has none.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media not in (NDJSON, CSV):
        raise UnsupportedMediaType(f"The content type is {media!r}, but an import is {NDJSON} or {CSV}.")
    if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
        raise _encoded(encoding)
    _check_length(request, farm.settings.max_import, "BOTFARM_MAX_IMPORT")
    file = (NdjsonFile if media == NDJSON else CsvFile)(farm.settings, caller_of(request).projects)
    async with _turn(farm.imports), farm.pool.acquire() as connection:
        async with connection.transaction():
            await connection.execute(SQL["import_stage"])
            job = Import(farm, cast("asyncpg.Connection", connection), file)
            async for users in _chunks(request, file, farm.settings.max_import):
                await job.stage(users)
            imported = await job.apply()
        if imported.created + imported.updated > 1000:
            with contextlib.suppress(asyncpg.PostgresError, *DATABASE_FAULTS):  # all is stored already
                await connection.execute(SQL["import_analyze"], timeout=600)
    farm.desk.freed()
    await job.changed.tell(farm.events, cause_of(request))
    farm.events.imported(imported, cause_of(request))
    return reply(imported)


@asynccontextmanager
async def _turn(imports: asyncio.Semaphore) -> AsyncIterator[None]:
    """Two imports at a time, so that they leave connections to others; a third waits its turn, but not for ever."""
    try:
        async with asyncio.timeout(30):
            await imports.acquire()
    except TimeoutError:
        raise DatabaseUnavailable("Two imports are running already; try again when one is done.") from None
    try:
        yield
    finally:
        imports.release()


async def _parts(request: Request) -> AsyncIterator[bytes]:
    """The body as it arrives. One that pauses or drips holds a transaction and a turn, and is given up."""
    stream, waited, size = request.stream(), 0.0, 0
    while True:
        begin = time.monotonic()
        try:
            async with asyncio.timeout(min(PAUSE, PAUSE + size / SLOWEST - waited)):
                part = await anext(stream, None)
        except TimeoutError:
            text = f"The import paused for {PAUSE} seconds, or brought under {SLOWEST} bytes a second"
            raise MalformedBody(f"{text}; nothing was stored.", headers={"Connection": "close"}) from None
        if part is None:
            return
        waited += time.monotonic() - begin
        size += len(part)
        yield part


async def _chunks(request: Request, file: ImportFile, limit: int) -> AsyncIterator[list[Numbered]]:
    """The users of a body, CHUNK at a time. After 100 errors the rest is read and dropped."""
    lines, size, users = Lines(), 0, []
    async for part in _parts(request):
        size += len(part)
        if size > limit:
            raise BodyTooLarge(f"The import is over BOTFARM_MAX_IMPORT, {limit} bytes: send it in parts.")
        if len(file.errors) >= 100:
            continue
        for user in file.read(lines.feed(part)):
            users.append(user)
            if len(users) == CHUNK:
                yield users
                users = []
    users += file.read(lines.close())
    file.close()
    if users:
        yield users


@call(get, "/users/export", tag="users", scope="users:read", status=200, query=UserFilter, answer=User, media=NDJSON)
async def export_users(farm: Farm, request: Request, query: UserFilter) -> Response:
    """All users that fit, one a line, without secrets."""
    caller = caller_of(request)
    rows = await farm.pool.fetch(SQL["list_users"], *query.columns((*FIRST_CURSOR, 500), caller))
    farm.events.log("users-exported", cause_of(request))
    return Stream(_exported(farm, query, caller, [] if request.method == HttpMethod.HEAD else rows), media_type=NDJSON)


async def _exported(farm: Farm, query: UserFilter, caller: Caller, rows: list[asyncpg.Record]) -> AsyncIterator[bytes]:
    while rows:
        yield b"".join(msgspec.json.encode(_user(row)) + b"\n" for row in rows)
        page = (rows[-1]["created_at"], rows[-1]["id"], 500)
        rows = await farm.pool.fetch(SQL["list_users"], *query.columns(page, caller))


# ------------------------------------------------------------------------------------------------------
# Locks
# ------------------------------------------------------------------------------------------------------


class ReleaseQuery(Body):
    cooldown: Cooldown = 0
    quarantine: Reason | None = None


class HolderQuery(Body):
    holder: Annotated[str, Meta(min_length=1, max_length=200, pattern=PLAIN)]
    project_id: uuid.UUID | None = None


def _lock(row: asyncpg.Record, password: str | UnsetType | None = UNSET) -> Lock:
    user = LockedUser(
        id=row["user_id"],
        login=row["login"],
        project_id=row["project_id"],
        env=row["env"],
        domain=row["domain"],
        labels=cast("Any", msgspec.Raw(row["labels"].encode())),
        password=password,
    )
    return Lock(row["lock_id"], row["fence"], row["holder"], row["ttl"], row["acquired_at"], row["expires_at"], user)


def _with_passwords(farm: Farm, rows: list[asyncpg.Record], cause: Cause) -> list[Lock]:
    """The locks as only the reply that grants them tells them. KeyFault where a password does not open."""
    passwords = [farm.passwords.reveal(row["user_id"], row["secret"]) for row in rows]
    for row, password in zip(rows, passwords, strict=True):
        if password is not None:
            farm.events.revealed(row, cause)
    return [_lock(row, password) for row, password in zip(rows, passwords, strict=True)]


def _granted(farm: Farm, rows: list[asyncpg.Record], cause: Cause) -> Response[bytes]:
    return reply(_with_passwords(farm, rows, cause)[0], 201, NO_STORE)


def _granted_set(farm: Farm, rows: list[asyncpg.Record], cause: Cause) -> Response[bytes]:
    return reply(LockSet(_with_passwords(farm, rows, cause)), 201, NO_STORE)


def _idempotency_key(request: Request, client: uuid.UUID | None) -> uuid.UUID | None:
    """The key as it is stored: that of a client is derived from both, so that two clients never share one."""
    text = header(request, b"idempotency-key")
    if text is None:
        return None
    if len([name for name, _ in request.scope["headers"] if name == b"idempotency-key"]) > 1:
        raise Invalid([FieldError("Idempotency-Key", "is given twice")])
    try:
        key = msgspec.convert(text, uuid.UUID)
    except msgspec.ValidationError:
        raise Invalid([FieldError("Idempotency-Key", f"{_shown(text)} is not a UUID")]) from None
    return uuid.uuid5(client, str(key)) if client else key


Grant = Callable[["Farm", list[asyncpg.Record], Cause], Response[bytes]]


async def _acquire(farm: Farm, request: Request, ask: Ask, grant: Grant) -> Response[bytes]:
    """Claim users; where there are none, find out why, and try again if some are free after all."""
    if farm.stopping:
        raise ShuttingDown
    ask.client = caller_of(request).client
    ask.cause = cause_of(request)
    ask.key = _idempotency_key(request, ask.client)
    wishes = tuple(ask.wishes)
    if wishes in farm.exhausted and not ask.wait and not (refusal := await farm.refusal(wishes)).free:
        return (ask.key and await _repeat(farm, request, ask, grant)) or refusal.response
    for attempt in itertools.count():
        rows = await farm.claim(ask)
        if rows is None:
            rows = await _in_turn(farm, request, ask)
            if rows and farm.gate and not farm.gate.still(ask.client):  # it was removed while it waited
                await farm.give_back(rows, ask.cause)
                raise Unauthenticated("The client of the token is gone")
        if rows and not ask.key and request.scope["state"].get(GONE):
            await farm.give_back(rows, ask.cause)
            return LockEnded("The caller went away before the reply.").response()
        if rows:
            return await _grant(farm, ask, rows, grant)
        if ask.key and (repeated := await _repeat(farm, request, ask, grant)):
            return repeated
        refusal = await farm.refusal(wishes)
        if not refusal.free or attempt == 4 or ask.wait:
            return refusal.response
        await asyncio.sleep(0.01 * attempt)  # free, but somebody has its row locked in this moment
    raise AssertionError


async def _in_turn(farm: Farm, request: Request, ask: Ask) -> list[asyncpg.Record]:
    """Wait for the answer of the desk. A caller that goes away loses its place.

    What is granted in that very moment is given back at once, unless a key lets a repeat find it. uvicorn tells
    of a closed connection only when asked: https://asgi.readthedocs.io/en/latest/specs/www.html#disconnect
    """
    gone = asyncio.ensure_future(request.receive())
    hopeless = asyncio.ensure_future(_is_hopeless(farm, ask)) if ask.wait else None
    first = asyncio.FIRST_COMPLETED
    try:
        if hopeless is None:
            await asyncio.wait((ask.answer, gone), return_when=first)
        else:
            end = ask.arrived + ask.wait
            left = max(end - time.monotonic(), 0)
            done, _ = await asyncio.wait((ask.answer, gone, hopeless), timeout=left, return_when=first)
            if done == {hopeless} and not hopeless.result():
                await asyncio.wait((ask.answer, gone), timeout=max(end - time.monotonic(), 0), return_when=first)
        rows = await farm.desk.leave(ask)
        for _ in range(2):  # let a closing that has arrived be noticed before the reply goes out
            await asyncio.sleep(0)
        if ask.wait and not rows:
            farm.events.waited("gone" if gone.done() else "refused", time.monotonic() - ask.arrived)
        if gone.done() and rows and not ask.key:
            await farm.give_back(rows, ask.cause)
            return []
        if rows and not ask.key:
            request.scope["state"][UNREAD] = _unread(farm, ask, rows)
        return rows
    finally:
        gone.cancel()
        if hopeless:
            hopeless.cancel()
        farm.desk.abandon(ask)


GONE = "botfarm-gone"  # in the state of a request: its caller has closed the connection
UNREAD = "botfarm-unread"  # and what to do when it turns out not to have read the reply


def _unread(farm: Farm, ask: Ask, rows: list[asyncpg.Record]) -> Callable[[], None]:
    """What to do when the caller turns out not to have read its grant, see Protocol."""
    end = time.monotonic() + 1

    def lost() -> None:
        if time.monotonic() < end:
            farm.spawn(farm.give_back(rows, ask.cause))

    return lost


async def _is_hopeless(farm: Farm, ask: Ask) -> bool:
    """Whether there are no such users at all, so that waiting would not help."""
    with contextlib.suppress(*DATABASE_FAULTS):  # then it waits, as long as it has time to
        return (await farm.refusal(tuple(ask.wishes))).response.status_code == 404
    return False


async def _grant(farm: Farm, ask: Ask, rows: list[asyncpg.Record], grant: Grant) -> Response[bytes]:
    try:
        return grant(farm, rows, ask.cause)
    except KeyFault:
        if ask.key is None:  # with a key, a repeat at another replica finds the lock
            await farm.give_back(rows, ask.cause)
        raise


async def _repeat(farm: Farm, request: Request, ask: Ask, grant: Grant) -> Response[bytes] | None:
    """The locks that the key has bound, or that one has ended; None for a key that is not bound."""
    rows = await farm.keyed(cast("uuid.UUID", ask.key))
    if not rows:
        return None
    if all(row["lock_id"] is not None for row in rows):
        return grant(farm, rows, ask.cause)
    ends = await farm.pool.fetch(SQL["get_lock_ends"], [row["bound_id"] for row in rows], ask.client)
    ended_at = min((row["ended_at"] for row in ends), default=None)
    key = _idempotency_key(request, None)
    detail = f"The lock of the idempotency key {key} has ended: use a new key for a new lock."
    return LockEnded(detail, ended_at=ended_at).response()


def _refused(farm: Farm, wish: Wish, counts: asyncpg.Record) -> Problem:
    if wish.user_id:
        return _user_refusal(wish, counts)
    if not counts["matching"]:
        return NoMatchingUser(f"No user at all matches {wish}: create one, or ask for less.")
    return _exhausted(str(wish), counts, farm.desk.waiting(wish))


def _set_refused(farm: Farm, wishes: Wishes, counts: asyncpg.Record, enough: bool) -> Problem:
    asked = "; ".join(f"{count} of {wish}" for wish, count in Counter(wishes).items())
    if not enough:
        return NoMatchingUser(f"There are not enough users for this set ({asked}): create some, or ask for less.")
    return _exhausted(f"this set ({asked})", counts, max(farm.desk.waiting(wish) for wish in wishes))


def _exhausted(asked: str, counts: asyncpg.Record, waiting: int) -> PoolExhausted:
    members = {name: counts[name] for name in ("matching", "locked", "resting", "quarantined", "next_free_at")}
    detail = (
        f"{counts['matching']} users match {asked}, but too few are free: {counts['locked']} locked, "
        f"{counts['resting']} resting, {counts['quarantined']} quarantined. Try again, wait, or add users."
    )
    return PoolExhausted(detail, **members, waiting=waiting)


def _user_refusal(wish: Wish, counts: asyncpg.Record) -> Problem:
    id, state = cast("uuid.UUID", wish.user_id), counts["state"]
    if state is None:
        return _no_user(id)
    if state == "quarantined":
        detail = f"The user {id} is quarantined: {counts['quarantine']}."
        return UserUnavailable(detail, state=state, reason=counts["quarantine"])
    if state == "resting":
        detail = f"The user {id} is resting until {counts['ready_at']:%Y-%m-%dT%H:%M:%S.%fZ}."
        return UserUnavailable(detail, state=state, available_at=counts["ready_at"])
    if state == "free":
        detail = f"Other calls want or change the user {id} in this moment; try again."
        return UserUnavailable(detail, headers={"Retry-After": "1"}, state=state, available_at=counts["ready_at"])
    return _user_locked(id, counts)


@call(
    post, "/locks", tag="locks", scope="locks", status=201, body=AcquireLock, answer=Lock, keyed=True,
    problems=(NoMatchingUser, PoolExhausted, LockEnded, ShuttingDown),
)  # fmt: skip
async def acquire_lock(farm: Farm, request: Request, body: AcquireLock) -> Response:
    """Acquire a lock on any free user that matches.

    The reply carries the user's password, and the lock's id, which is the proof of holding. With an
    `Idempotency-Key` a repeat answers with the same lock, so no user is lost to a lost reply.
    """
    ask = Ask(wishes=[_wish(body)], holder=body.holder, ttl=body.ttl, wait=body.wait)
    return await _acquire(farm, request, ask, _granted)


def _wish(body: AcquireLock | SetPart) -> Wish:
    labels = msgspec.json.encode(body.labels, order="sorted").decode() if body.labels else None
    return Wish(None, body.project_id, body.env, body.domain, labels)


@call(
    put, "/users/{id:str}/lock", tag="locks", scope="locks", status=201, body=AcquireUser, body_optional=True,
    answer=Lock, keyed=True, problems=(UserNotFound, UserLocked, UserUnavailable, LockEnded, ShuttingDown),
)  # fmt: skip
async def acquire_user(farm: Farm, request: Request, id: uuid.UUID, body: AcquireUser) -> Response:
    """Acquire a lock on this very user."""
    ask = Ask(wishes=[Wish(id)], holder=body.holder, ttl=body.ttl, wait=body.wait)
    if ask.wait:
        user = await _get_user(farm, id)
        ask.home = Wish(None, user.project_id, user.env, user.domain)
    return await _acquire(farm, request, ask, _granted)


@call(
    post, "/locks/sets", tag="locks", scope="locks", status=201, body=AcquireSet, answer=LockSet, keyed=True,
    problems=(NoMatchingUser, PoolExhausted, LockEnded, ShuttingDown),
)  # fmt: skip
async def acquire_set(farm: Farm, request: Request, body: AcquireSet) -> Response:
    """Acquire several users together, all or none.

    Filters may overlap: whoever fits only one of them is kept for that one. The locks come in the order asked.
    """
    wishes = [wish for part in body.users for wish in [_wish(part)] * part.count]
    return await _acquire(
        farm, request, Ask(wishes=wishes, holder=body.holder, ttl=body.ttl, wait=body.wait), _granted_set
    )


def _no_lock(id: uuid.UUID) -> LockNotHeld:
    return LockNotHeld(f"No lock {id} is known.")


async def _not_held(farm: Farm, id: uuid.UUID, owner: uuid.UUID | None) -> LockNotHeld:
    ends = await farm.pool.fetch(SQL["get_lock_ends"], [id], owner)
    if not ends:
        return _no_lock(id)
    end = ends[0]
    detail = f"The lock {id} has ended ({end['ended_by']} at {end['ended_at']:%Y-%m-%dT%H:%M:%S.%fZ})."
    return LockNotHeld(detail, ended_at=end["ended_at"], ended_by=end["ended_by"])


@call(get, "/locks/{id:str}", tag="locks", scope="locks", status=200, answer=Lock, problems=(LockNotHeld,))
async def get_lock(farm: Farm, request: Request, id: uuid.UUID) -> Response:
    """A lock that is held, without the password."""
    owner = caller_of(request).owner
    row = await farm.pool.fetchrow(SQL["get_lock"], id, owner)
    return reply(_lock(row)) if row else (await _not_held(farm, id, owner)).response()


@call(
    patch, "/locks/{id:str}", tag="locks", scope="locks", status=200, body=ExtendLock, body_optional=True, answer=Lock,
    problems=(LockNotHeld,),
)  # fmt: skip
async def extend_lock(farm: Farm, request: Request, id: uuid.UUID, body: ExtendLock) -> Response:
    """Heartbeat: the lock now ends `ttl` seconds from now.

    Without a ttl the last one is used again.
    """
    owner = caller_of(request).owner
    row = await farm.extend(Renewal(id, body.ttl, owner, cause_of(request)))
    return reply(_lock(row)) if row else (await _not_held(farm, id, owner)).response()


@call(delete, "/locks/{id:str}", tag="locks", scope="locks", status=204, query=ReleaseQuery, problems=(LockNotHeld,))
async def release_lock(farm: Farm, request: Request, id: uuid.UUID, query: ReleaseQuery) -> Response:
    """Give the user back.

    `cooldown` lets it rest first; `quarantine` takes it out, with the reason, when the test found it broken.
    """
    owner = caller_of(request).owner
    held = await farm.release(Release(id, query.cooldown, query.quarantine, owner, cause_of(request)))
    return no_content() if held else (await _not_held(farm, id, owner)).response()


@call(delete, "/locks", tag="locks", scope="locks", status=200, query=HolderQuery, answer=Released)
async def release_holder(farm: Farm, request: Request, query: HolderQuery) -> Response:
    """Give back everything that a holder holds: a CI job's last step."""
    caller = caller_of(request)
    rows = await farm.pool.fetch(SQL["release_holder"], query.holder, query.project_id, caller.owner, caller.projects)
    for row in rows:
        farm.events.ended("released", row, cause_of(request))
    farm.desk.freed()
    return reply(Released(len(rows)))


@call(delete, "/users/{id:str}/lock", tag="locks", scope="admin", status=204, problems=(UserNotFound,))
async def force_release(farm: Farm, request: Request, id: uuid.UUID) -> Response:
    """End the lock of a user by force, whoever holds it. Also when nobody does."""
    row = await farm.hot.fetchrow(SQL["force_release"], id)
    if row is None:
        raise _no_user(id)
    if row["lock_id"]:
        farm.events.ended("forced", row, cause_of(request))
    farm.desk.freed()
    return no_content()


# ------------------------------------------------------------------------------------------------------
# Operations: health, and the book-keeping that nothing depends on.
# ------------------------------------------------------------------------------------------------------


@call(get, "/livez", tag="service", scope="open", status=200, answer=Health)
async def livez(farm: Farm, request: Request) -> Response:
    """The process serves. Touches no database."""
    return Response(content=b'{"status":"ok"}', media_type=JSON)


@call(get, "/readyz", tag="service", scope="open", status=200, answer=Health, problems=(DatabaseUnavailable,))
async def readyz(farm: Farm, request: Request) -> Response:
    """The database answers, and its schema is there."""
    try:
        applied = {row["migration_id"] for row in await farm.pool.fetch(SQL["list_migrations"], timeout=3)}
    except asyncpg.UndefinedTableError:
        applied = set()
    missing = [migration.id for migration in MIGRATIONS if migration.id not in applied]
    if missing:
        raise DatabaseUnavailable(f"The migration {missing[0]!r} is missing: run `python botfarm.py migrate`.")
    return reply(Health("ok"))


class Census:
    """How many users of each pool are in which state: read when asked for, and kept for a second.

    Where counting takes long it is kept for four times as long, so that no scraper keeps the database busy.
    """

    def __init__(self, pool: Connections, events: Events) -> None:
        self._pool = pool
        self._events = events
        self._turn = asyncio.Lock()
        self._until = 0.0
        self._rows: list[asyncpg.Record] = []

    async def rows(self) -> list[asyncpg.Record]:
        """As list_pools.sql gives them; none where the database does not answer."""
        async with self._turn:
            began = time.monotonic()
            if began >= self._until:
                try:
                    self._rows = await self._pool.fetch(SQL["list_pools"], None, None, timeout=5)
                except (asyncpg.UndefinedTableError, *DATABASE_FAULTS) as fault:
                    self._rows = []
                    self._events.database_failed("No counts of users for a scrape", fault)
                ended = time.monotonic()
                self._until = ended + max(1, 4 * (ended - began))
            return self._rows


class Scrape:
    """What GET /metrics shows, as prometheus_client collects it."""

    def __init__(self, tally: Tally, pools: list[asyncpg.Record], workers: list[Snapshot]) -> None:
        self.tally = tally
        self.pools = pools
        self.workers = workers

    def collect(self) -> Iterator[MetricFamily]:
        yield from self.tally.families()
        yield self._users()
        yield self._waiting()
        yield from self._connections()
        build = GaugeMetricFamily("botfarm_build_info", "Versions.", labels=["version", "python_version"])
        build.add_metric([VERSION, platform.python_version()], 1)
        yield build

    def _users(self) -> MetricFamily:
        users = GaugeMetricFamily(
            "botfarm_users", "Users of a pool in a state.", labels=["project_id", "env", "domain", "state"]
        )
        for row in self.pools:
            for state in get_args(State_):
                users.add_metric([str(row["project_id"]), row["env"], row["domain"], state], row[state])
        return users

    def _waiting(self) -> MetricFamily:
        waiting = GaugeMetricFamily(
            "botfarm_waiting_calls", "Calls that wait for users of a pool; one that fits several counts in each.",
            labels=["project_id", "env", "domain"],
        )  # fmt: skip
        crowds: dict[uuid.UUID | None, list[tuple[list[Wish], int]]] = {}
        for wishes, count in (crowd for worker in self.workers for crowd in worker.waiting):
            for project_id in {wish.project_id for wish in wishes}:
                crowds.setdefault(project_id, []).append((wishes, count))
        for row in self.pools:
            pool = _pool_of(row)
            here = crowds.get(pool.project_id, ())
            count = sum(count for wishes, count in here if any(pool.meets(wish) for wish in wishes))
            waiting.add_metric([str(pool.project_id), row["env"], row["domain"]], count)
        return waiting

    def _connections(self) -> Iterator[MetricFamily]:
        found = GaugeMetricFamily("botfarm_database_connections", "Open connections.", labels=["pool", "state"])
        limit = GaugeMetricFamily("botfarm_database_connections_limit", "Most connections.", labels=["pool"])
        queue = GaugeMetricFamily(
            "botfarm_database_connection_waiting_calls", "Calls that wait for a connection.", labels=["pool"]
        )
        for pool in ("locks", "other"):
            every = [worker.connections[pool] for worker in self.workers]
            busy, idle, most, waiting = (sum(column) for column in zip(*every, strict=True))
            found.add_metric([pool, "busy"], busy)
            found.add_metric([pool, "idle"], idle)
            limit.add_metric([pool], most)
            queue.add_metric([pool], waiting)
        yield from (found, limit, queue)


@call(get, "/metrics", tag="service", scope="open", status=200, media=PROMETHEUS)
async def metrics(farm: Farm, request: Request) -> Response:
    """Numbers for Prometheus, over all workers of this start.

    Without the counts of users and of waiting calls where the database does not answer.
    """
    farm.events.count_losses()
    pools = await farm.census.rows()
    scrape = Scrape(farm.events.tally, pools, [snapshot(farm), *farm.events.tally.others()])
    # In a thread, because ten thousand pools take their time.
    text = await asyncio.to_thread(generate_latest, cast("CollectorRegistry", scrape))
    return Response(content=text, media_type=PROMETHEUS)


def snapshot(farm: Farm) -> Snapshot:
    """What this worker has at this moment."""
    return Snapshot(farm.desk.crowd(), {"locks": farm.hot.gauges(), "other": farm.pool.gauges()})


async def publish(farm: Farm) -> None:
    """Tell the other workers what there is here."""
    farm.events.count_losses()
    try:
        farm.events.tally.publish(snapshot(farm))
    except OSError as fault:
        log.warning("The other workers cannot be told what there is here: %s", fault)


async def sweep(farm: Farm) -> None:
    """Record expired locks, and give back those whose grant was never answered."""
    while True:
        due = await farm.hot.fetch(SQL["sweep_locks"], 500)
        expired = [row for row in due if row["is_over"]]
        for row in expired:
            farm.events.ended("expired", row)
        if expired:
            farm.desk.freed()
        if len(due) < 500:
            break
    await farm.find_lost()


async def prune(farm: Farm) -> None:
    """Forget what is older than BOTFARM_HISTORY_DAYS, 1,000 rows at a time with pauses."""
    for statement in ("prune_history", "prune_keys"):
        while await farm.pool.execute(SQL[statement], farm.settings.history_days, 1000) == "DELETE 1000":
            await asyncio.sleep(0.05)
    if farm.gate:
        await farm.pool.execute(SQL["prune_token_requests"])


async def repeat(task: Callable[[Farm], Awaitable[None]], farm: Farm, seconds: float) -> None:
    """Run a task for ever, at jittered intervals; what fails is tried again at the next one."""
    while True:
        await asyncio.sleep(seconds * (0.75 + secrets.randbelow(500) / 1000))
        try:
            await task(farm)
        except DATABASE_FAULTS as fault:
            farm.events.database_failed(f"{task.__name__} waits for the database", fault)
        except Exception:
            log.exception("%s failed; it goes on", task.__name__)


# ------------------------------------------------------------------------------------------------------
# App: the routes and their OpenAPI document, made from what the handlers declare.
# ------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>BotFarm</title>
<h1>BotFarm</h1><p>A pool of test users. <a href="/docs">API documentation</a></p></html>"""

DOCS = """<!doctype html><html lang="en"><meta charset="utf-8"><title>BotFarm API</title>
<link rel="stylesheet" href="/docs/assets/swagger-ui.css"><div id="ui"></div>
<script src="/docs/assets/swagger-ui-bundle.js"></script><script src="/docs/start.js"></script></html>"""

START = 'SwaggerUIBundle({url: "/docs/openapi.json", dom_id: "#ui", validatorUrl: null})'

# What the pages may load and where they may stand: their own files, and in no frame. Swagger UI styles by attributes.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


@route(sorted({path for made in ROUTES for path in made.paths}), http_method=HttpMethod.OPTIONS, status_code=204)
async def options(request: Request) -> Response[None]:
    """What can be called here. (Litestar's own answer knows one method of a path that has several handlers.)"""
    path = request.scope["path_template"].replace("{id}", "{id:str}")
    methods = request.app.route_handler_method_map[path]
    return Response(content=None, status_code=204, headers={"Allow": ", ".join(sorted(methods))})


@get("/", media_type="text/html", response_headers=PAGE_HEADERS, include_in_schema=False)
async def index() -> str:
    return PAGE


@get("/docs", media_type="text/html", response_headers=PAGE_HEADERS, include_in_schema=False)
async def docs() -> str:
    return DOCS


@get("/docs/start.js", media_type="text/javascript", include_in_schema=False)
async def docs_start() -> str:
    """A file of its own, because the pages' policy lets no script stand in them."""
    return START


@get("/docs/openapi.json", include_in_schema=False)
async def openapi_json(request: Request) -> Response:
    return reply(openapi_document(request.app.state.settings))


def openapi_document(settings: Settings) -> dict[str, Any]:
    """The OpenAPI 3.1 document of all calls."""
    calls = [(handler, handler.opt["call"]) for handler in ROUTES]
    structs = {kind for _, declared in calls for kind in (declared.body, declared.answer) if kind}
    _, schemas = msgspec.json.schema_components(
        [*sorted(structs, key=lambda kind: kind.__name__), ImportedUser, ProblemDetails, FieldError, LineError],
        ref_template="#/components/schemas/{name}",
    )
    paths: dict[str, Any] = {}
    secured = settings.auth == "on"
    for handler, declared in calls:
        for path in sorted(handler.paths):
            method = min(handler.http_methods).lower()  # HEAD comes along with GET
            paths.setdefault(path.replace(":str", ""), {})[method] = _operation(handler, declared, path, secured)
    document = {
        "openapi": "3.1.0",
        "info": {"title": "BotFarm", "version": VERSION, "description": "A pool of test users that tests lock."},
        "paths": paths,
        "components": {"schemas": {**schemas, "Problem": _problem_schema()}},
    }
    if secured:
        _secure(document)
    return cast("dict[str, Any]", _with_limits(document, settings))


def _secure(document: dict[str, Any]) -> None:
    """How to get a token, and that calls need one: the Authorize button of the API page works by it."""
    flow = {"tokenUrl": "/token", "scopes": SCOPES}
    document["components"]["securitySchemes"] = {"oauth2": {"type": "oauth2", "flows": {"clientCredentials": flow}}}
    _, schemas = msgspec.json.schema_components([Token, TokenError], ref_template="#/components/schemas/{name}")
    document["components"]["schemas"] |= schemas
    document["paths"]["/token"] = {"post": _token_operation()}


def _token_operation() -> dict[str, Any]:
    summary, _, text = cast("str", issue_token.fn.__doc__).strip().partition("\n")
    names = ("grant_type", "scope", "client_id", "client_secret")
    fields: dict[str, Any] = {name: {"type": "string"} for name in names}
    fields["grant_type"]["const"] = "client_credentials"
    form = {"type": "object", "required": ["grant_type"], "properties": fields}
    answers = [(200, Token, "Done"), (400, TokenError, "RFC 6749 section 5.2"), (401, TokenError, "`invalid_client`")]
    answers += [(429, TokenError, "too often"), (503, TokenError, "the database does not answer, or too many ask")]
    return {
        "operationId": "issue_token",
        "tags": ["service"],
        "summary": summary.rstrip("."),
        "description": " ".join(text.split()),
        "security": [],
        "requestBody": {"required": True, "content": {FORM: {"schema": form}}},
        "responses": {
            str(status): {
                "description": what,
                "content": {JSON: {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}},
            }
            for status, kind, what in answers
        },
    }


def _with_limits(node: Any, settings: Settings) -> Any:
    """Fill in the limits that settings decide."""
    if isinstance(node, list):
        return [_with_limits(item, settings) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _with_limits(value, settings) for key, value in node.items()}
    return node | _LIMITS.get(node.get("description", ""), lambda _: {})(settings)


_LIMITS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "one of BOTFARM_ENVS": lambda settings: {"enum": list(settings.envs)},
    "one of BOTFARM_DOMAINS": lambda settings: {"enum": list(settings.domains)},
    "seconds until the lock ends by itself": lambda settings: {"maximum": settings.max_ttl},
    "seconds to wait for a user that comes free": lambda settings: {"maximum": settings.max_wait},
}


def _problem_schema() -> dict[str, Any]:
    (_, schemas) = msgspec.json.schema_components([ProblemDetails], ref_template="#/components/schemas/{name}")
    return schemas["ProblemDetails"] | {"title": "Problem", "additionalProperties": True}


def _operation(handler: Any, declared: Call, path: str, secured: bool) -> dict[str, Any]:
    summary, _, text = (handler.fn.__doc__ or "").strip().partition("\n")
    operation: dict[str, Any] = {
        "operationId": handler.opt["name"],
        "tags": [declared.tag],
        "summary": summary.rstrip("."),
        "description": " ".join(text.split()) or summary,
        "parameters": [*_path_parameters(path), *_query_parameters(declared), *_header_parameters(declared)],
        "responses": _responses(handler, declared, path, secured),
    }
    if secured:
        operation["security"] = [] if declared.scope == "open" else [{"oauth2": [declared.scope]}]
    if declared.body:
        schema = {"$ref": f"#/components/schemas/{declared.body.__name__}"}
        operation["requestBody"] = {"required": not declared.body_optional, "content": {JSON: {"schema": schema}}}
    if declared.upload:
        lines = {"schema": {"type": "string", "description": "a line for each user: ImportedUser"}}
        operation["requestBody"] = {"required": True, "content": {NDJSON: lines, CSV: lines}}
    return operation


def _path_parameters(path: str) -> list[dict[str, Any]]:
    schema = {"type": "string", "format": "uuid"}
    return [{"name": "id", "in": "path", "required": True, "schema": schema}] if "{id" in path else []


def _query_parameters(declared: Call) -> list[dict[str, Any]]:
    if not declared.query:
        return []
    (_,), schemas = msgspec.json.schema_components([declared.query], ref_template="#/{name}")
    schema = schemas[declared.query.__name__]
    return [
        {"name": name, "in": "query", "required": name in schema.get("required", []), "schema": _not_null(field)}
        for name, field in schema["properties"].items()
    ]


def _not_null(field: dict[str, Any]) -> dict[str, Any]:
    """A query parameter is left out rather than null."""
    kinds = [kind for kind in field.get("anyOf", []) if kind != {"type": "null"}]
    if not kinds:
        return field
    return {k: v for k, v in field.items() if k not in ("anyOf", "default")} | kinds[0]


def _header_parameters(declared: Call) -> list[dict[str, Any]]:
    text = "A repeat with the same key answers with the same lock."
    schema = {"type": "string", "format": "uuid"}
    return (
        [{"name": "Idempotency-Key", "in": "header", "description": text, "schema": schema}] if declared.keyed else []
    )


def _responses(handler: Any, declared: Call, path: str, secured: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": "Done"}
    if declared.answer:
        schema = {"$ref": f"#/components/schemas/{declared.answer.__name__}"}
        answer["content"] = {declared.media: {"schema": schema if declared.media == JSON else {"type": "string"}}}
    elif declared.media != JSON:
        answer["content"] = {declared.media.partition(";")[0]: {"schema": {"type": "string"}}}
    problems: dict[str, list[type[Problem]]] = {}
    for problem in _problems(handler, declared, path, secured):
        problems.setdefault(str(problem.status), []).append(problem)
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    described = {
        status: {
            "description": " / ".join(f"`{p.slug}`: {(p.__doc__ or '').strip()}" for p in kinds),
            "content": content,
        }
        for status, kinds in sorted(problems.items())
    }
    return {str(declared.status): answer, **described}


def _problems(handler: Any, declared: Call, path: str, secured: bool) -> list[type[Problem]]:
    """What a call can refuse: what it declares, and what its form brings along."""
    problems = [*declared.problems, Invalid, HeadTooLarge, InternalError]
    problems += [DatabaseUnavailable] if declared.tag != "service" else []
    problems += [NotFound] if "{id" in path else []
    problems += [Unauthenticated, Forbidden] if secured and declared.scope != "open" else []
    if declared.body or "DELETE" in handler.http_methods:
        problems += [MalformedBody, UnsupportedMediaType, BodyTooLarge]
    return list(dict.fromkeys(problems))


def _http_problem(request: Request, error: HTTPException) -> Response:
    """What Litestar itself refuses, in our form."""
    return _echoed(request, _counted(request, _problem_of(request, error).response()))


def _problem_of(request: Request, error: HTTPException) -> Problem:
    path = request.url.path
    if error.status_code == 404:
        return NotFound(f"There is nothing at {_shown(path)}; see /docs.")
    if error.status_code == 405:
        allowed = ", ".join(sorted((error.headers or {})["allow"].split(", ")))
        detail = f"{request.method} is not allowed at {_shown(path)}; allowed: {allowed}."
        return MethodNotAllowed(detail, headers={"Allow": allowed})
    if error.status_code == 413:
        limit = request.app.state.settings.max_body
        return BodyTooLarge(f"The body is over BOTFARM_MAX_BODY, {limit} bytes.")
    return MalformedBody(f"The request is not readable: {error.detail}.")


def _unforeseen(request: Request, error: Exception) -> Response:
    """A 500: the log gets the traceback, the caller the id to find it by."""
    cause = cause_of(request)
    known = cast("str", cause.request_id)
    path = request.scope.get("path_template")  # not the path: a lock's id in it is the proof of holding
    log.error("request %s: %s %s failed", known, request.method, path, exc_info=error, extra={"cause": cause})
    detail = f"An unforeseen error; the service's log has it as request {known}."
    return _echoed(request, _counted(request, InternalError(detail, request_id=known).response()))


HEADERS = [("X-Content-Type-Options", "nosniff")]  # of every reply
CALLERS = logging.getLogger("botfarm.callers")  # what uvicorn says of callers; but for errors anybody could fill it
CALLERS.setLevel(logging.ERROR)


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP, which bounds what slow and endless senders hold, and tells of callers that did not read.

    uvicorn itself would keep for ever a connection that sends nothing or half a request, a reply that nobody reads,
    and headers and trailers of any size. What comes in one piece, as nearly every request does, starts no timer.
    """

    LATE = 40  # seconds for the head of a request; a body brings SLOW bytes in them, a reply is read
    SLOW = 40 * 1024
    HEAD = 64 * 1024  # bytes of a head, of trailers, or of what else is no body

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self.logger = CALLERS
        self._received = self._bodiless = 0
        self._running: RequestResponseCycle | None = None  # the call that is answered now, or was last
        self._unread: asyncio.TimerHandle | None = None
        self._late: asyncio.TimerHandle | None = None
        self._watched: Any = None
        self._watch()

    def data_received(self, data: bytes) -> None:
        self._bodiless += len(data)
        super().data_received(data)
        if self._is_partial():
            self._received += len(data)
            if self._bodiless > self.HEAD and not self.transport.is_closing():
                self._refuse(HeadTooLarge())
            elif self._watched is not self.scope:
                self._watch()
        else:
            self._bodiless = 0
            cycle = self.cycle
            if cycle and cycle.response_complete and not self.timeout_keep_alive_task:  # an empty line came after it
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )

    def on_body(self, body: bytes) -> None:
        self._bodiless = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._bodiless = 0
        super().on_message_complete()

    def _is_partial(self) -> bool:
        """Whether the end of a request is still to come."""
        return self.cycle is None or self.cycle.scope is not self.scope or self.cycle.more_body

    def _watch(self) -> None:
        """Look again when it is late: whether this very request is still there, and has brought enough."""
        if self._late:
            self._late.cancel()
        self._watched = self.scope
        self._late = self.loop.call_later(self.LATE, self._look, self.scope, self._received)

    def _look(self, scope: Any, received: int) -> None:
        self._late = self._watched = None
        if not self._is_partial() or self.transport.is_closing():
            return
        has_body = self.cycle is not None and self.cycle.scope is scope and not self.cycle.response_complete
        is_enough = self._received - received >= self.SLOW or self.flow.read_paused
        if self.scope is not scope or (has_body and is_enough):
            self._watch()
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reply()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch_reply()  # what is left of it has to be read too

    def _watch_reply(self) -> None:
        """Look again when it is late: whether somebody reads."""
        if self._unread:
            self._unread.cancel()
        self._unread = self.loop.call_later(self.LATE, self._look_at_reply, self._left())

    def _look_at_reply(self, before: int) -> None:
        left = self._left()
        if 0 < left < before:
            self._watch_reply()
        elif left:
            self.transport.abort()

    def _left(self) -> int:
        """Bytes that the caller has not taken yet, also of those that the system has, which may be megabytes."""
        queued = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return self.transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)

    def send_400_response(self, msg: str) -> None:
        self._refuse(MalformedBody("The request is not HTTP."))

    def _refuse(self, problem: Problem) -> None:
        """Answer without the application, and end the connection."""
        body = problem.response().content
        headers = {"content-type": "application/problem+json", "content-length": len(body), "connection": "close"}
        lines = [f"HTTP/1.1 {problem.status} ", *(f"{name}: {value}" for name, value in [*headers.items(), *HEADERS])]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()

    def on_headers_complete(self) -> None:
        if self.url.startswith(b"//"):  # else //users is read as the index page of a host named users
            self.url = b"/%252F" + self.url[2:]
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        """Who closed without reading the reply answers it with a reset; who has read it ends the connection."""
        for timer in (self._late, self._unread):
            if timer:
                timer.cancel()
        was_reset = exc is not None or self._is_reset()
        running = self._running
        if running:  # uvicorn tells the last call that it has read of it, and this may be one before that
            running.scope.setdefault("state", {})[GONE] = True
            running.disconnected = running.disconnected or not running.response_complete
            running.message_event.set()
        super().connection_lost(exc)
        if was_reset and running and (unread := running.scope.get("state", {}).get(UNREAD)):
            unread()

    def _is_reset(self) -> bool:
        """Also where the end of the connection was read before the reset: Linux tells by the state (7: TCP_CLOSE)."""
        connection = self.transport.get_extra_info("socket")
        if connection is None or not hasattr(socket, "TCP_INFO"):
            return False
        with contextlib.suppress(OSError):
            return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 7
        return False


def _on_stop(stop: Callable[[], None]) -> None:
    """Hear of SIGTERM and SIGINT as soon as the server does.

    uvicorn tells the application only when all calls are done, but those who wait have to be answered for that.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        servers = signal.getsignal(number)

        def heard(number: int, frame: Any, servers: Any = servers) -> None:
            loop.call_soon_threadsafe(stop)
            if callable(servers):
                servers(number, frame)

        signal.signal(number, heard)


@asynccontextmanager
async def _running(app: Litestar) -> AsyncIterator[None]:
    """Everything that lives as long as the service."""
    settings: Settings = app.state.settings
    async with contextlib.AsyncExitStack() as stack:
        database = stack.enter_context(prepared(settings))
        lanes = UNBATCHED if settings.batch == 1 else 4
        hot = await stack.enter_async_context(
            open_pool(database, lanes, "force_generic_plan", STATEMENT, settings.pooler)
        )
        pool = await stack.enter_async_context(
            open_pool(database, settings.pool_size, "force_custom_plan", STATEMENT, settings.pooler)
        )
        keyring = keyring_of(load_keys(settings))
        await check_keys(pool, keyring)
        passwords = Passwords(keyring)
        stack.callback(passwords.close)
        shared = os.environ.get(SHARED)
        if shared:
            JOURNAL.share(shared)
        stack.callback(JOURNAL.flush)  # after the last words of what is closed below
        events = Events(Tally(shared), JOURNAL if settings.log == "events" else None)
        gate = Gate(pool, parse_keys(signing_keys(settings))) if settings.auth == "on" else None
        app.state.farm = farm = Farm(settings, hot, pool, passwords, events, gate)
        jobs = [repeat(sweep, farm, 1), repeat(prune, farm, 60), repeat(publish, farm, 1)]
        jobs += [farm.desk.run(), farm.desk.announce()]
        if settings.listen_url or settings.pooler == "off":
            jobs.append(listen(farm, settings.listen_url.reveal() if settings.listen_url else database))
        if gate:
            stack.callback(gate.close)
            jobs.append(gate.keep_fresh())
        tasks = [asyncio.create_task(job) for job in jobs]
        _on_stop(farm.stop)
        # What is there now stays: without freeze the collector walks over all of it again and again, in pauses
        # of 40 ms (p99 of a cycle at 64 connections: 36 -> 10 ms).
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000, 10, 10)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await farm.settle()


def _cors(settings: Settings) -> CORSConfig | None:
    """Which pages of other origins may call: none, unless set."""
    if not settings.cors_origins:
        return None
    return CORSConfig(
        allow_origins=list(settings.cors_origins),
        allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "X-Request-Id", "traceparent"],
        expose_headers=["Location", "Retry-After", "WWW-Authenticate", "X-Request-Id", "traceparent"],
    )


def create_app(settings: Settings) -> Litestar:
    """The service as an ASGI application."""
    assets = str(importlib.resources.files("swagger_ui") / "static")
    return Litestar(
        route_handlers=[
            options,
            *ROUTES,
            index,
            docs,
            docs_start,
            openapi_json,
            *([issue_token] if settings.auth == "on" else []),
            create_static_files_router(path="/docs/assets", directories=[assets], include_in_schema=False),
        ],
        lifespan=[_running],
        state=State({"settings": settings}),
        exception_handlers={HTTPException: _http_problem, Exception: _unforeseen},
        openapi_config=None,
        logging_config=None,
        request_max_body_size=settings.max_body,
        cors_config=_cors(settings),
    )


def __getattr__(name: str) -> Litestar:
    """`uvicorn botfarm:app`: the application is made when it is asked for, not when the module is imported."""
    if name == "app":
        settings = Settings.load()
        if not logging.getLogger().handlers:
            log_as_lines(settings.log == "events")
        return create_app(settings)
    raise AttributeError(name)


# ------------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------------


def load_keys(settings: Settings) -> Secret | None:
    """The keys of the settings; with an embedded database else a key of its own, made at the first start."""
    if settings.keys or settings.database_url:
        return settings.keys
    file = embedded.settle_home(settings.home) / "keys"
    if not file.exists():
        file.with_suffix(".new").unlink(missing_ok=True)
        # The folder may belong to the user that PostgreSQL runs as: follow no link that stands there.
        handle = os.open(file.with_suffix(".new"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as new:
            new.write(generate_key() + "\n")
            new.flush()
            os.fsync(new.fileno())
        file.with_suffix(".new").rename(file)
    return Secret(file.read_text().strip())


def signing_keys(settings: Settings) -> str:
    if settings.signing_keys is None:
        raise BadSettings(f"BOTFARM_SIGNING_KEYS: {NO_SIGNING_KEY}")
    return settings.signing_keys.reveal()


def keyring_of(keys: Secret | None) -> Keyring | None:
    return Keyring.parse(keys.reveal()) if keys else None


@contextmanager
def prepared(settings: Settings) -> Iterator[str]:
    """The URL of a database whose schema is up to date: the given one, else an embedded one that we start."""
    if settings.database_url:
        url = settings.database_url.reveal()
        _patiently(url)
        yield url
        return
    server = embedded.start(settings.home)
    try:
        _patiently(server.dsn)
        yield server.dsn
    finally:
        server.stop()


def _patiently(url: str) -> None:
    """Migrate, in a thread because we may be in an event loop; a database that starts up gets 30 s."""
    end = time.monotonic() + 30
    while True:
        try:
            with ThreadPoolExecutor(1) as thread:
                thread.submit(migrate, url).result()
            return
        except (OSError, asyncpg.CannotConnectNowError) as fault:
            if time.monotonic() > end:
                raise SchemaError(f"The database cannot be reached: {type(fault).__name__}: {fault}") from None
            log.warning("Waiting for the database: %s", fault)
            time.sleep(1)


@contextmanager
def database(settings: Settings) -> Iterator[str]:
    """The database for a command: the given one, else the embedded one, started if it does not run."""
    if settings.database_url:
        yield settings.database_url.reveal()
    else:
        with embedded.database(settings.home) as url:
            yield url


def banner(settings: Settings) -> str:
    address = f"http://{settings.host}:{settings.port}"
    project = "11111111-1111-4111-8111-111111111111"
    token = ' -H "Authorization: Bearer $TOKEN"' if settings.auth == "on" else ""
    json_post = f"curl -X POST{token} -H 'Content-Type: {JSON}'"
    user = f'{{"login": "bot-1", "password": "secret", "project_id": "{project}", "env": "stage"}}'
    wish = f'{{"project_id": "{project}", "env": "stage", "holder": "me"}}'
    return f"""BotFarm serves at {address}  (API: {address}/docs)
create:  {json_post} {address}/users -d '{user}'
acquire: {json_post} {address}/locks -d '{wish}'
release: curl -X DELETE{token} '{address}/locks?holder=me'"""


class _Server(uvicorn.Server):
    """Tells where it serves once it does."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self.settings = settings

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(banner(self.settings), flush=True)


class _Workers(Multiprocess):
    """Several serving processes; they tell where they serve once one of them does."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config, [config.bind_socket()])
        self.settings = settings
        self.told = False

    def keep_subprocess_alive(self) -> None:
        super().keep_subprocess_alive()
        if not self.told and any(process.is_ready() for process in self.processes):
            self.told = True
            print(banner(self.settings), flush=True)


def _open_many_files() -> None:
    """Each connection is a file, and thousands may wait."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 1 << 20
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, 1 << 20), hard))


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT. The database and the keys are checked first, for a clear message."""
    options: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "access_log": False,  # halves the rate
        "log_config": None,
        "server_header": False,
        "headers": HEADERS,
        "proxy_headers": "FORWARDED_ALLOW_IPS" in os.environ,  # else a caller could choose its address at /token
        "lifespan": "on",
        "backlog": 4096,
        "timeout_graceful_shutdown": 8,
        "timeout_keep_alive": 75,  # longer than clients keep idle connections, or one is closed as they use it again
        "http": Protocol,
        "ws": "none",
    }
    if settings.log == "quiet":
        logging.getLogger().setLevel(logging.WARNING)
    _open_many_files()
    if settings.auth == "off" and not _is_loopback(settings.host):
        log.warning("Opened to %s without authentication: whoever reaches it gets passwords", settings.host)
    for stop in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when it is done: end well then
        signal.signal(stop, lambda *_: sys.exit(0))
    with prepared(settings) as url:
        keys = load_keys(settings)
        asyncio.run(_check_keys(url, settings.pooler, keyring_of(keys)))
        if settings.workers == 1:
            ready = msgspec.structs.replace(settings, database_url=Secret(url), keys=keys)
            server = _Server(uvicorn.Config(create_app(ready), **options), settings)
            server.run()
            return 0 if server.started else 3
        for variable, value in (("DATABASE_URL", url), ("BOTFARM_KEYS", keys.reveal() if keys else "")):
            os.environ.pop(f"{variable}_FILE", None)
            os.environ[variable] = value
        with tempfile.TemporaryDirectory(prefix="botfarm-") as folder:
            os.environ[SHARED] = folder
            JOURNAL.share(folder)
            workers = _Workers(uvicorn.Config("botfarm:app", workers=settings.workers, **options), settings)
            workers.run()
        failed = any(process.exitcode == STARTUP_FAILURE for process in workers.processes)
        return 0 if workers.told and not failed else 3


async def _check_keys(url: str, pooler: str, keyring: Keyring | None) -> None:
    async with open_pool(url, 1, "force_custom_plan", 60, pooler) as pool:
        await check_keys(pool, keyring)


def migrate_command(settings: Settings, rollback: bool, rest: int | None) -> int:
    with database(settings) as url:
        names = migrate(url, rollback)
        verb = "taken back" if rollback else "applied"
        print("\n".join(f"{verb}: {name}" for name in names) or "nothing to do")
        if rest is not None:
            users = asyncio.run(_rest(url, settings.pooler, rest))
            tell("users-rested", users)
            print(f"{users} users rest for {rest} seconds, and their fences have moved ahead")
    return 0


async def _rest(url: str, pooler: str, seconds: int) -> int:
    async with open_pool(url, 1, "force_custom_plan", 3600, pooler) as pool:
        return await pool.fetchval(SQL["rest_after_restore"], seconds)


def check_command(settings: Settings, url: str | None) -> int:
    """Exit status 0 when the service is ready, else 1: for container health checks."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)  # noqa: S104
    address = url or f"http://{host}:{settings.port}"
    try:
        answer = httpx.get(f"{address}/readyz", timeout=5)
    except httpx.HTTPError as error:
        print(f"{address} does not answer: {error}", file=sys.stderr)
        return 1
    print(answer.text)
    return 0 if answer.status_code == 200 else 1


def _token_headers(url: str) -> dict[str, str]:
    """A token of the client that BOTFARM_CLIENT_ID and BOTFARM_CLIENT_SECRET name, where they are set."""
    client = os.environ.get("BOTFARM_CLIENT_ID", ""), os.environ.get("BOTFARM_CLIENT_SECRET", "")
    if not all(client):
        return {}
    answer = httpx.post(f"{url}/token", data={"grant_type": "client_credentials"}, auth=client, timeout=60)
    if answer.status_code != 200:
        raise BadSettings(f"BOTFARM_CLIENT_ID: no token of {url}: {answer.status_code} {answer.text[:300]}")
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}


def import_command(url: str, name: str, media: str | None) -> int:
    """Send a file with a progress bar. Exit status 1 when it is refused, with the errors by line."""
    media = media or (CSV if name.endswith(".csv") else NDJSON)
    with contextlib.ExitStack() as stack:
        file = sys.stdin.buffer if name == "-" else stack.enter_context(open(name, "rb"))
        size = None if name == "-" else os.path.getsize(name)
        bar = stack.enter_context(Progress(console=Console(stderr=True)))
        task = bar.add_task("import", total=size)

        def parts() -> Iterator[bytes]:
            while part := file.read(1 << 16):
                bar.advance(task, len(part))
                yield part

        headers = {"Content-Type": media} | _token_headers(url)
        answer = httpx.post(f"{url}/users/import", content=parts(), headers=headers, timeout=3600)
    print(
        answer.text if answer.status_code == 200 else _told(answer),
        file=sys.stdout if answer.is_success else sys.stderr,
    )
    return 0 if answer.status_code == 200 else 1


def _told(answer: httpx.Response) -> str:
    """A refused import, an error a line."""
    try:
        problem = answer.json()
    except ValueError:
        return f"{answer.status_code}: {answer.text[:200]}"
    errors = [f"line {e.get('line')}: {e.get('field') or ''}: {e['message']}" for e in problem.get("errors", [])]
    return "\n".join([f"{problem['status']} {problem['detail']}", *errors])


def export_command(url: str) -> int:
    """All users as NDJSON to standard output."""
    with Progress(TextColumn("{task.completed} users"), console=Console(stderr=True)) as bar:
        task = bar.add_task("export", total=None)
        with httpx.stream("GET", f"{url}/users/export", headers=_token_headers(url), timeout=3600) as answer:
            if answer.status_code != 200:
                answer.read()
                print(_told(answer), file=sys.stderr)
                return 1
            for line in answer.iter_lines():
                print(line)
                bar.advance(task)
    return 0


def reseal_command(settings: Settings) -> int:
    keyring = keyring_of(load_keys(settings))
    if keyring is None:
        raise BadSettings("reseal needs BOTFARM_KEYS: the new key first, then the old ones.")

    async def run(url: str, bar: Progress) -> int:
        task = bar.add_task("reseal", total=None)
        async with open_pool(url, 1, "force_custom_plan", 600, settings.pooler) as pool:
            await check_keys(pool, keyring)
            return await reseal(pool, keyring, lambda done: bar.update(task, completed=done))

    with database(settings) as url, Progress(TextColumn("{task.completed}"), console=Console(stderr=True)) as bar:
        migrate(url)
        total = asyncio.run(run(url, bar))
    tell("passwords-resealed", total)
    print(f"{total} passwords are now sealed under the key {keyring.first!r}")
    return 0


def client_command(settings: Settings, arguments: argparse.Namespace) -> int:
    """Add, list, rotate or remove a client: a JSON line for each. Exit status 1 when it is refused."""
    secret = secrets.token_urlsafe(32)
    name = getattr(arguments, "name", None)
    match arguments.action:
        case "add":
            values: tuple[Any, ...] = (uuid.uuid4(), name, HASHER.hash(secret), arguments.scope, arguments.project)
        case "rotate":
            values = (name, HASHER.hash(secret), arguments.keep)
        case "remove":
            values = (name,)
        case _:
            values = ()
    with database(settings) as url:
        migrate(url)
        rows = asyncio.run(_clients(url, settings.pooler, arguments.action, values))
    for row in rows:
        print(_client_line(row, secret if arguments.action in ("add", "rotate") else None))
    if not rows and name:
        reason = "exists already: choose another name" if arguments.action == "add" else "does not exist"
        print(f"The client {name!r} {reason}.", file=sys.stderr)
        return 1
    return 0


async def _clients(url: str, pooler: str, action: str, values: Sequence[Any]) -> list[asyncpg.Record]:
    statements = {"add": "add_client", "list": "list_clients", "rotate": "rotate_client", "remove": "remove_client"}
    async with open_pool(url, 1, "force_custom_plan", 60, pooler) as pool:
        return await pool.fetch(SQL[statements[action]], *values)


def _client_line(row: asyncpg.Record, secret: str | None) -> str:
    """A client in JSON; its secret is shown this once."""
    line = {"client_id": row["id"], "client_secret": secret, "scope": " ".join(row["scopes"])}
    line |= {"projects": row["projects"], "name": None if secret else row["name"], "created_at": row.get("created_at")}
    line |= {"old_secret_valid_until": row.get("previous_until")}
    shown = {key: value for key, value in line.items() if value is not None or key == "projects"}
    return msgspec.json.encode(shown).decode()


def _scopes(text: str) -> list[str]:
    scopes = list(dict.fromkeys(text.split()))
    if unknown := [scope for scope in scopes if scope not in SCOPES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(SCOPES)}")
    if not scopes:
        raise argparse.ArgumentTypeError(f"name at least one of {', '.join(SCOPES)}")
    return scopes


def _client_name(text: str) -> str:
    if not re.fullmatch(r"[^\x00-\x1f\x7f-\x9f]{1,100}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 to 100 characters without control characters")
    return text


def _seconds(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,7}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return int(text)


def _add_client_commands(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    adding = actions.add_parser("add", help="add a client and print its secret, this once")
    adding.add_argument("--scope", type=_scopes, required=True, help=f"some of {' '.join(SCOPES)}")
    adding.add_argument("--project", type=uuid.UUID, action="append", metavar="UUID", help="limit it to projects")
    actions.add_parser("list", help="list the clients")
    rotating = actions.add_parser("rotate", help="give a client a new secret and print it, this once")
    rotating.add_argument(
        "--keep", type=_seconds, default=3600, metavar="SECONDS",
        help="for how long the old secret stays valid (default: %(default)s)",
    )  # fmt: skip
    removing = actions.add_parser("remove", help="remove a client; its tokens end within a minute")
    for action in (adding, rotating, removing):
        action.add_argument("name", metavar="NAME", type=_client_name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="botfarm.py", description="A pool of test users that tests lock.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    serving = commands.add_parser("serve", help="serve (the default)")
    migrating = commands.add_parser("migrate", help="bring the database's schema up to date")
    migrating.add_argument("--rollback", action="store_true", help="take the last migration back instead")
    migrating.add_argument(
        "--after-restore", metavar="SECONDS", type=int, nargs="?", const=-1,
        help="a backup was restored: let every user rest, because locks taken since are unknown (default: the longest "
        "ttl), and move the fences ahead",
    )  # fmt: skip
    checking = commands.add_parser("check", help="exit status 0 when the service is ready, else 1")
    importing = commands.add_parser("import", help="send a file of users to a service")
    importing.add_argument("file", metavar="FILE|-", help="NDJSON, or CSV when the name ends in .csv")
    importing.add_argument("--type", dest="media", choices=[NDJSON, CSV], help="what it is, for standard input")
    exporting = commands.add_parser("export", help="print all users of a service as NDJSON")
    commands.add_parser("keygen", help="print a new key for BOTFARM_KEYS or BOTFARM_SIGNING_KEYS")
    resealing = commands.add_parser("reseal", help="seal all passwords under the first of BOTFARM_KEYS")
    clients = commands.add_parser("client", help="add, list, rotate or remove the clients that may call")
    _add_client_commands(clients)
    commands.add_parser("openapi", help="print the OpenAPI document")
    checking.add_argument("--url", help="the service (default: BOTFARM_HOST and BOTFARM_PORT)")
    for sending in (importing, exporting):
        sending.add_argument("--url", default="http://127.0.0.1:8000", help="the service (default: %(default)s)")
    for command, fields in (
        (serving, None),
        (migrating, {"home", "max_ttl"}),
        (resealing, {"home"}),
        (checking, {"host", "port"}),
    ):
        _add_setting_flags(command, fields)
    return parser


def _add_setting_flags(parser: argparse.ArgumentParser, fields: set[str] | None) -> None:
    """A flag for each setting but the secrets, which everybody on the machine could read off the process list."""
    for field, variable in Settings.variables().items():
        if field not in SECRET_SETTINGS and (fields is None or field in fields):
            text = next(part for part in get_args(_SETTING_TYPES[field]) if isinstance(part, str)) if field not in (
                "envs", "domains") else f"allowed values of {field[:-1]}, comma-separated"  # fmt: skip
            parser.add_argument(f"--{field.replace('_', '-')}", dest=f"set_{variable}", help=f"{text} ({variable})")


def _rest_of(settings: Settings, seconds: int | None) -> int | None:
    """How long users rest after a restore; the longest ttl where no seconds were given."""
    if seconds is not None and not -1 <= seconds <= 86400 * 365:
        raise BadSettings(f"--after-restore: {seconds} is not 0 to {86400 * 365} seconds")
    return settings.max_ttl if seconds == -1 else seconds


def _run(arguments: argparse.Namespace) -> int:
    match arguments.command:
        case "keygen":
            print(generate_key())
            return 0
        case "import":
            return import_command(arguments.url, arguments.file, arguments.media)
        case "export":
            return export_command(arguments.url)
    settings = Settings.load()
    match arguments.command:
        case "migrate":
            return migrate_command(settings, arguments.rollback, _rest_of(settings, arguments.after_restore))
        case "check":
            return check_command(settings, arguments.url)
        case "reseal":
            return reseal_command(settings)
        case "client":
            return client_command(settings, arguments)
        case "openapi":
            print(json.dumps(openapi_document(settings), indent=2))
            return 0
    return serve(settings)


def main(argv: Sequence[str]) -> int:
    """Exit status 0: done; 1: refused; 2: bad flags or settings; 3: the service could not start."""
    log_as_lines()
    words = list(argv) if argv and (not argv[0].startswith("-") or argv[0] in ("-h", "--help")) else ["serve", *argv]
    arguments = _parser().parse_args(words)
    for name, value in vars(arguments).items():
        if name.startswith("set_") and value is not None:
            os.environ[name.removeprefix("set_")] = value
    try:
        return _run(arguments)
    except BadSettings as error:
        print(error, file=sys.stderr)
        return 2
    except (SchemaError, KeyFault, embedded.EmbeddedError, httpx.HTTPError, OSError) as error:
        print(error, file=sys.stderr)
        return 3 if arguments.command == "serve" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
