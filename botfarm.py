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
    Coalescing   calls that arrive while a statement runs share the next one
    Users        create, list, change, verify, quarantine, history, pools
    Import       NDJSON and CSV, all or nothing; export
    Locks        acquire, extend, release
    Operations   health, the sweep, pruning
    App          the routes and their OpenAPI document
    Commands     python botfarm.py --help
"""

from __future__ import annotations

import argparse
import array
import asyncio
import base64
import binascii
import codecs
import contextlib
import csv
import hmac
import importlib.util
import io
import json
import logging
import os
import re
import secrets
import socket
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, NoReturn, TypeVar, cast, get_args, get_type_hints

import argon2
import asyncpg
import httpx
import msgspec
import uvicorn
import yoyo
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from litestar import Litestar, Request, Response, delete, get, patch, post, put
from litestar.datastructures import State
from litestar.exceptions import HTTPException, ValidationException
from litestar.openapi import OpenAPIConfig, ResponseSpec
from litestar.openapi.plugins import JsonRenderPlugin, SwaggerRenderPlugin
from litestar.params import Parameter
from litestar.response import Stream
from litestar.static_files import create_static_files_router
from msgspec import UNSET, Meta, Struct, UnsetType
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


Count = Annotated[int, Meta(ge=1)]
Names = Annotated[tuple[Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,63}(?!\n)$")], ...], Meta(min_length=1)]


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
    max_body: Annotated[int, Meta(ge=1024), "largest body of a request, in bytes"] = 1 << 20
    max_import: Annotated[int, Meta(ge=1024), "largest body of an import, in bytes"] = 1 << 30
    history_days: Annotated[int, Meta(ge=1, le=36500), "days for which ended locks are remembered"] = 30
    pool_size: Annotated[int, Meta(ge=1, le=1000), "database connections for all but locks, per worker"] = 8
    batch: Annotated[int, Meta(ge=1, le=1000), "most acquires or releases that share one statement"] = 100

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
        if faults:
            raise BadSettings("\n".join(["Bad settings:", *faults]))
        return cls(**values)


SECRET_SETTINGS = frozenset({"database_url", "keys"})
_SETTING_TYPES = get_type_hints(Settings, include_extras=True)


def _from_environment(environ: Mapping[str, str], variable: str, is_secret: bool) -> str | None:
    """The value of a variable, for a secret also from the file that VARIABLE_FILE names. Empty means unset."""
    if is_secret and (path := environ.get(f"{variable}_FILE")):
        if environ.get(variable):
            raise ValueError(f"set either {variable} or {variable}_FILE, not both")
        return Path(path).read_text(encoding="utf-8").strip()
    return environ.get(variable) or None


def _typed_setting(field: str, text: str) -> Any:
    if field == "keys":
        Keyring.parse(text)
    if field == "database_url" and not re.match(r"postgres(ql)?://", text):
        raise ValueError("must begin with postgresql://")
    if field in SECRET_SETTINGS:
        return Secret(text)
    kind = _SETTING_TYPES[field]
    if get_args(kind)[0] is Path:
        return Path(text)
    value: Any = tuple(part.strip() for part in text.split(",")) if field in ("envs", "domains") else text
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"{text!r} is not allowed: {error}") from None


# ------------------------------------------------------------------------------------------------------
# Words: the structs that callers send and get. Limits that settings decide are checked by `check_words`.
# The patterns end in (?!\n)$ because a bare $ would let a final newline through in Python.
# ------------------------------------------------------------------------------------------------------

LABEL_KEY = r"^[A-Za-z0-9_.-]{1,63}(?!\n)$"
PLAIN = r"^[^\x00-\x1f\x7f-\x9f]*(?!\n)$"
LabelKey = Annotated[str, Meta(pattern=LABEL_KEY)]
LabelValue = Annotated[str, Meta(max_length=255, pattern=PLAIN)]
Labels = Annotated[dict[LabelKey, LabelValue], Meta(max_length=32, examples=[{"role": "admin"}])]
Login = Annotated[str, Meta(min_length=1, max_length=254, pattern=PLAIN, examples=["bot-1"])]
Password = Annotated[str, Meta(min_length=1, max_length=1024, pattern=r"^[^\x00]*$", examples=["correct horse"])]
Holder = Annotated[str, Meta(max_length=200, pattern=PLAIN, description="who asks, for people and bulk release")]
Reason = Annotated[str, Meta(min_length=1, max_length=500, pattern=PLAIN, examples=["login page says: blocked"])]
ProjectId = Annotated[uuid.UUID, Meta(examples=["11111111-1111-4111-8111-111111111111"])]
Ttl = Annotated[int, Meta(ge=1, description="seconds until the lock ends by itself")]
Wait = Annotated[int, Meta(ge=0, description="seconds to wait for a user; only 0 so far")]
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
    password: str | None | UnsetType = UNSET


class Lock(Struct):
    """`password` stands only in the reply that grants a lock; null where only hashes are stored."""

    id: uuid.UUID
    fence: int
    holder: str
    ttl: int
    acquired_at: datetime
    expires_at: datetime
    user: LockedUser


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
    ttl = getattr(body, "ttl", None)
    if isinstance(ttl, int) and ttl > settings.max_ttl:
        faults.append(FieldError("ttl", f"{ttl} is over the longest ttl of {settings.max_ttl} seconds"))
    if getattr(body, "wait", 0) != 0:
        faults.append(FieldError("wait", f"{body.wait} is not allowed: only 0 (waiting is not built yet)"))
    return faults


def _shown(value: Any) -> str:
    """A value as an error message shows it, cut when long."""
    text = json.dumps(value, ensure_ascii=True, default=str)
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

    def response(self) -> Response[bytes]:
        if self.retry_after is not None:
            self.headers.setdefault("Retry-After", str(self.retry_after))
        content = {
            "type": f"urn:botfarm:{self.slug}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            **self.members,
        }
        return Response(
            content=msgspec.json.encode(content),
            status_code=self.status,
            media_type="application/problem+json",
            headers=self.headers,
        )


class MalformedBody(Problem):
    """The body is not JSON in UTF-8."""

    status, slug = 400, "malformed-body"


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


class DatabaseUnavailable(Problem):
    """The database does not answer; try again in a moment."""

    status, slug, retry_after = 503, "database-unavailable", 1


class ShuttingDown(Problem):
    """The service is shutting down; try again in a moment."""

    status, slug, retry_after = 503, "shutting-down", 1


class InternalError(Problem):
    """An unforeseen error; the service's log has it under this request id."""


def _path_of(message: str) -> tuple[str | None, str]:
    """Split a msgspec message into the field that it is about and what is wrong."""
    text, _, where = message.partition(" - at ")
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", text):
        return found[1], "unknown field"
    if found := re.fullmatch(r"Object missing required field `(.*)`", text):
        return found[1], "required, but missing"
    path = re.search(r"`\$\.?(.*)`", where)
    return (path[1] if path and path[1] else None), text


def field_errors(error: msgspec.ValidationError, raw: Any) -> list[FieldError]:
    """Tell a failed validation by field and, but for passwords, with the value that was sent."""
    field, message = _path_of(str(error))
    if field and field.startswith("labels") and isinstance(raw, Mapping):
        return _label_errors(raw.get("labels"), message)
    if field and field != "password" and isinstance(raw, Mapping) and field in raw and message != "unknown field":
        message = f"{_shown(raw[field])} is not allowed: {message}"
    return [FieldError(field, message)]


def _label_errors(labels: Any, message: str) -> list[FieldError]:
    if isinstance(labels, Mapping):
        for key, value in labels.items():
            if not re.match(LABEL_KEY, key):
                return [FieldError("labels", f"the key {_shown(key)} is not 1 to 63 of A-Z a-z 0-9 _ . -")]
            if not isinstance(value, str) or len(value) > 255 or not re.match(PLAIN, value):
                rule = "must be a text of up to 255 characters without control characters"
                return [FieldError(f"labels.{key}", f"{_shown(value)} {rule}")]
    return [FieldError("labels", message)]


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
)


async def _keep(connection: asyncpg.Connection) -> None:
    """No reset on the return of a connection: we keep no session state (87 -> 59 us a query)."""


async def open_pool(url: str, size: int, plans: str, timeout: float) -> asyncpg.Pool:
    """A pool whose statements are planned in the given way: force_generic_plan once, force_custom_plan each time.

    The statements of the hot path take arrays, which PostgreSQL would plan anew each time (database CPU
    60 -> 41 us a request); lists and filters want a plan that knows which filters are set.
    """
    generic = plans == "force_generic_plan"
    tuning = {"plan_cache_mode": plans, "jit": "off", "application_name": "botfarm"}
    if generic:  # a plan made while a table was small must not scan it when it has grown
        tuning |= {"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"}
    return await asyncpg.create_pool(
        url,
        min_size=1,
        max_size=size,
        command_timeout=timeout,
        timeout=5,
        server_settings=tuning,
        reset=_keep,
    )


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


class _Connection:
    """A blocking connection over asyncpg, with an event loop of its own."""

    def __init__(self, url: str) -> None:
        self.runner = asyncio.Runner()
        self.wire = self.runner.run(asyncpg.connect(url, timeout=10, statement_cache_size=0))

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
    driver = _Driver  # pyright: ignore[reportAssignmentType]

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


class SchemaError(Exception):
    """The database's schema does not fit this version of BotFarm."""


MIGRATIONS = yoyo.read_migrations(str(HERE / "migrations"))


def migrate(url: str, rollback: bool = False) -> list[str]:
    """Apply what is missing, or take the last migration back. Returns the names of those that ran, in order.

    SchemaError when the database has migrations that this version does not know: it was set up by a newer one.
    """
    for attempt in range(10):
        backend = MigrationBackend(url)
        try:
            with backend.exclusive():
                return _run_migrations(backend, rollback)
        except (asyncpg.UniqueViolationError, asyncpg.DuplicateTableError):
            time.sleep(0.05 * (attempt + 1))  # several first starts at once: the others wait for the first
        finally:
            backend.connection.close()
    raise SchemaError("Others keep setting up this database; try again when they are done.")


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


class KeyError_(Exception):
    """A sealing key is missing or wrong."""


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
        """From `id:key,...`, each key 32 bytes in standard base64. ValueError names the id, never the key."""
        keys: dict[str, bytes] = {}
        for number, part in enumerate(text.split(","), 1):
            found = KEY_PATTERN.fullmatch(part.strip())
            if not found:
                raise ValueError(f"key {number} is not id:key with a key of 32 bytes in base64; `keygen` makes one")
            if found[1] in keys:
                raise ValueError(f"the key id {found[1]!r} is there twice")
            keys[found[1]] = base64.b64decode(found[2], validate=True)
        return cls(keys)

    @property
    def ids(self) -> list[str]:
        return list(self._ciphers)

    def seal(self, owner: uuid.UUID, clear: str, key_id: str | None = None) -> str:
        key_id = key_id or self.first
        nonce = os.urandom(12)
        sealed = nonce + self._ciphers[key_id].encrypt(nonce, clear.encode(), owner.bytes)
        return f"{SEALED}{key_id}${base64.b64encode(sealed).decode()}"

    def open(self, owner: uuid.UUID, secret: str) -> str:
        """KeyError_ when the key is not there, or is another one, or the secret is another user's."""
        key_id, _, text = secret.removeprefix(SEALED).partition("$")
        sealed = base64.b64decode(text)
        try:
            return self._ciphers[key_id].decrypt(sealed[:12], sealed[12:], owner.bytes).decode()
        except KeyError:
            raise KeyError_(f"No key {key_id!r} in BOTFARM_KEYS, but a password is sealed with it.") from None
        except InvalidTag:
            raise KeyError_(f"The key {key_id!r} does not open a password that was sealed under that id.") from None


def generate_key() -> str:
    """A new sealing key as BOTFARM_KEYS takes it."""
    return f"k{secrets.token_hex(3)}:{base64.b64encode(secrets.token_bytes(32)).decode()}"


class Passwords:
    """How this deployment stores passwords."""

    def __init__(self, keyring: Keyring | None) -> None:
        self.keyring = keyring
        # OWASP's minimum (19 MiB, t=2, p=1; 15 ms). Two at a time, in threads, so that hashing never stalls an
        # acquire and never takes more than 38 MiB.
        self._hasher = argon2.PasswordHasher(time_cost=2, memory_cost=19456, parallelism=1)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="argon2")

    async def store(self, owner: uuid.UUID, clear: str) -> str:
        if self.keyring:
            return self.keyring.seal(owner, clear)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._hasher.hash, clear)

    async def verify(self, owner: uuid.UUID, secret: str, clear: str) -> bool:
        if secret.startswith(SEALED):
            return hmac.compare_digest(self._open(owner, secret).encode(), clear.encode())
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._matches, secret, clear)

    def reveal(self, owner: uuid.UUID, secret: str) -> str | None:
        """The clear password for the reply that grants a lock; None where only a hash is stored."""
        return self._open(owner, secret) if secret.startswith(SEALED) else None

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _open(self, owner: uuid.UUID, secret: str) -> str:
        if not self.keyring:
            raise KeyError_("Passwords are sealed, but BOTFARM_KEYS is not set.")
        return self.keyring.open(owner, secret)

    def _matches(self, secret: str, clear: str) -> bool:
        try:
            return self._hasher.verify(secret, clear)
        except argon2.exceptions.VerifyMismatchError:
            return False


PROOF_OWNER = uuid.UUID(int=0)
PROOF = "BotFarm"


async def check_keys(pool: asyncpg.Pool, keyring: Keyring | None) -> None:
    """Find a wrong or a missing key now and not at the first lock. KeyError_ says which and what to do."""
    for key_id in keyring.ids if keyring else ():
        proof = cast("Keyring", keyring).seal(PROOF_OWNER, PROOF, key_id)
        stored = await pool.fetchval(SQL["prove_key"], key_id, proof)
        try:
            cast("Keyring", keyring).open(PROOF_OWNER, stored)
        except KeyError_:
            raise KeyError_(
                f"BOTFARM_KEYS: the key {key_id!r} is not the one that this database was used with under that id. "
                "Set the right key, or give a new key another id."
            ) from None
    known = keyring.ids if keyring else []
    for key_id in [row["id"] for row in await pool.fetch(SQL["list_proofs"]) if row["id"] not in known]:
        if not await pool.fetchval(SQL["forget_proof"], key_id, f"{SEALED}{key_id}$"):
            raise KeyError_(
                f"BOTFARM_KEYS: the key {key_id!r} is missing, but passwords are sealed with it. Add it (after the "
                "first key), and run `python botfarm.py reseal` before you take it out."
            )


async def reseal(pool: asyncpg.Pool, keyring: Keyring, progress: Callable[[int], None]) -> int:
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
