"""The words of the API: what callers send and get, with the limits of each.

A limit that holds everywhere stands in a type; one that settings decide is checked by `forbidden` and told to the
OpenAPI document by `limits`. (The patterns end in (?!\\n)$ because a bare $ would let a final newline through in
Python.)
"""

from __future__ import annotations

import base64
import json
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from typing import Annotated, Any, Literal, TypeVar, cast

import asyncpg
import msgspec
from litestar.params import FromQuery, QueryParameter
from msgspec import UNSET, Meta, Struct, UnsetType

from farm.problems import FieldError, Invalid, shown
from farm.settings import WORD, Settings

JSON = "application/json"
NDJSON = "application/x-ndjson"
CSV = "text/csv"

# ---- Types and their limits --------------------------------------------------------------------------------

LABEL_PAIR = r"^[A-Za-z0-9_.-]{1,63}:[^\x00-\x1f\x7f-\x9f]{0,255}(?!\n)$"
PLAIN = r"^[^\x00-\x1f\x7f-\x9f]*(?!\n)$"
NO_NUL = r"^[^\x00]*$"
RULES = {
    WORD: "write 1 to 63 of A-Z a-z 0-9 _ . -",
    PLAIN: "no control characters here",
    NO_NUL: "no U+0000 here",
    LABEL_PAIR: "write key:value, with a key of 1 to 63 of A-Z a-z 0-9 _ . - and no control characters",
}

Fence = Annotated[int, Meta(ge=0, le=1 << 62)]
LabelKey = Annotated[str, Meta(pattern=WORD)]
LabelValue = Annotated[str, Meta(max_length=255, pattern=PLAIN)]
Labels = Annotated[dict[LabelKey, LabelValue], Meta(max_length=32, examples=[{"role": "admin"}])]
LabelPair = Annotated[str, Meta(pattern=LABEL_PAIR, examples=["role:admin"])]
Login = Annotated[str, Meta(min_length=1, max_length=254, pattern=PLAIN, examples=["bot-1"])]
Password = Annotated[str, Meta(min_length=1, max_length=1024, pattern=NO_NUL, examples=["correct horse"])]
Holder = Annotated[str, Meta(max_length=200, pattern=PLAIN, description="who asks, for people and bulk release")]
Note = Annotated[str, Meta(max_length=500, pattern=PLAIN, description="why, where, a link to the run; for people")]
Reason = Annotated[str, Meta(min_length=1, max_length=500, pattern=PLAIN, examples=["login page says: blocked"])]
Totp = Annotated[
    str,
    Meta(
        description="an otpauth://totp/ URI, or its secret in base32",
        examples=["JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP"],
        extra_json_schema={"writeOnly": True},
    ),
]
ProjectId = Annotated[uuid.UUID, Meta(examples=["11111111-1111-4111-8111-111111111111"])]
Ttl = Annotated[int, Meta(ge=1, description="seconds until the lock ends by itself")]
Wait = Annotated[int, Meta(ge=0, description="seconds to wait for a user that comes free")]
Env = Annotated[str, Meta(description="one of BOTFARM_ENVS", examples=["stage"])]
Domain = Annotated[str, Meta(description="one of BOTFARM_DOMAINS", examples=["regular"])]
UserState = Literal["free", "locked", "resting", "quarantined"]
Outcome = Literal["passed", "failed", "bad-login"]
Moment = Annotated[datetime, Meta(tz=True)]  # which its schema tells by "date-time"
T = TypeVar("T")


# ---- What an acquire asks for ------------------------------------------------------------------------------


class Wish(Struct, frozen=True):
    """One user by id, or any of a project that fits. Labels are JSON, null for none."""

    user_id: uuid.UUID | None = None
    project_id: uuid.UUID | None = None
    env: str | None = None
    domain: str | None = None
    labels: str | None = None

    def __str__(self) -> str:
        parts = ((name, getattr(self, name)) for name in self.__struct_fields__)
        return ", ".join(f"{name}={value}" for name, value in parts if value is not None)

    @classmethod
    def of_pool(cls, row: Any) -> Wish:
        return cls(None, row["project_id"], row["env"], row["domain"])

    def meets(self, other: Wish) -> bool:
        """Whether both may ask for users of one pool."""
        pairs = ((self.env, other.env), (self.domain, other.domain))
        return self.project_id == other.project_id and all(a is None or b is None or a == b for a, b in pairs)


Wishes = tuple[Wish, ...]


# ---- What callers send -------------------------------------------------------------------------------------


class Body(Struct, forbid_unknown_fields=True, frozen=True):
    """What a caller sends: unknown fields are refused, so a mistyped filter never widens a call."""


class UserFields(Body, frozen=True):
    login: Login
    project_id: ProjectId
    env: Env
    domain: Domain = "regular"
    labels: Labels = {}


class NewUser(UserFields, frozen=True, kw_only=True):
    password: Password
    totp: Totp | UnsetType | None = UNSET


class ImportedUser(UserFields, frozen=True):
    """A line of an import: a known user keeps its password when there is none, and its codes when there is no totp."""

    password: Password | None = None
    totp: Totp | UnsetType | None = UNSET


TELLING = ("id", "created_at", "state", "locktime", "lock", "quarantine", "available_at")


def only_tells(field: str) -> bool:
    """Whether an export may have a field that an import passes over."""
    return field in TELLING or field.startswith("has_")


class UserChanges(Body, frozen=True):
    login: Login | UnsetType = UNSET
    password: Password | UnsetType = UNSET
    domain: Domain | UnsetType = UNSET
    labels: Labels | UnsetType = UNSET
    totp: Totp | UnsetType | None = UNSET


class PasswordCheck(Body, frozen=True):
    password: Password


class QuarantineReason(Body, frozen=True):
    reason: Reason


class Filter(Body, frozen=True):
    project_id: ProjectId
    env: Env | None = None
    domain: Domain | None = None
    labels: Labels = {}

    def wish(self) -> Wish:
        labels = msgspec.json.encode(self.labels, order="sorted").decode() if self.labels else None
        return Wish(None, self.project_id, self.env, self.domain, labels)


class AcquireLock(Filter, frozen=True):
    ttl: Ttl = 300
    wait: Wait = 0
    holder: Holder = ""
    note: Note = ""
    prefer: Literal["any", "session"] = "any"


class AcquireUser(Body, frozen=True):
    ttl: Ttl = 300
    wait: Wait = 0
    holder: Holder = ""
    note: Note = ""


class SetPart(Filter, frozen=True):
    """Some users of a set, all under one filter."""

    count: Annotated[int, Meta(ge=1, le=100)] = 1


class AcquireSet(AcquireUser, frozen=True, kw_only=True):
    """Several users together, each of them asked for as one is."""

    users: Annotated[list[SetPart], Meta(min_length=1, max_length=100)]


class ExtendLock(Body, frozen=True):
    ttl: Ttl | None = None
    holder: Holder | UnsetType = UNSET
    note: Note | UnsetType = UNSET


@dataclass
class UserFilter:
    """Which users are listed: the query parameters; null for any."""

    project_id: FromQuery[uuid.UUID | None] = None
    env: FromQuery[str | None] = None
    domain: FromQuery[str | None] = None
    having: Annotated[UserState | None, QueryParameter(name="state")] = None  # Litestar keeps `state` for itself
    holder: Annotated[str | None, QueryParameter(max_length=200, pattern=PLAIN)] = None
    login: Annotated[str | None, QueryParameter(max_length=254, pattern=PLAIN)] = None
    label: FromQuery[list[LabelPair] | None] = None
    login_prefix: Annotated[str | None, QueryParameter(min_length=1, max_length=254, pattern=PLAIN)] = None

    def columns(self, page: Sequence[Any], projects: tuple[uuid.UUID, ...] | None) -> list[Any]:
        """As list_users.sql takes them, for one page, and a caller who is limited to projects (null: all)."""
        pairs = {cast("tuple[str, str]", tuple(label.split(":", 1))) for label in self.label or ()}
        labels = json.dumps(dict(pairs)) if pairs else None
        if len(dict(pairs)) < len(pairs):  # one key with two values, which nobody has
            labels = "[]"
        project_id = self.project_id
        if projects and len(projects) == 1:  # which an index leads to
            project_id, projects = projects[0], None
        prefix = None if self.login_prefix is None else re.sub(r"([\\%_])", r"\\\1", self.login_prefix) + "%"
        asked = [project_id, self.env, self.domain, self.having, self.holder, self.login, labels]
        return [*asked, *page, projects, prefix]


# ---- What callers get --------------------------------------------------------------------------------------


def as_json(text: str) -> Any:
    """A jsonb column, for a reply: as it is."""
    return msgspec.Raw(text.encode())


# These tell which columns of a row are the first fields of a struct, in their order.
USER_LOCK = itemgetter("holder", "note", "fence", "acquired_at", "expires_at")
USER = itemgetter(
    "id", "created_at", "login", "project_id", "env", "domain", "labels", "has_session", "has_totp", "state"
)
LOCKED_USER = itemgetter("user_id", "login", "project_id", "env", "domain")
LOCK = itemgetter("lock_id", "fence", "holder", "note", "ttl", "acquired_at", "expires_at")


class UserLock(Struct):
    """The current lock of a user as everybody may see it: never its id."""

    holder: str
    note: str
    fence: int
    acquired_at: Moment
    expires_at: Moment


class User(Struct):
    id: uuid.UUID
    created_at: Moment
    login: str
    project_id: uuid.UUID
    env: str
    domain: str
    labels: dict[str, str]
    has_session: bool
    has_totp: bool
    state: UserState
    locktime: Moment | None
    lock: UserLock | None
    quarantine: str | None
    available_at: Moment | UnsetType = UNSET  # the end of its rest, of one that rests

    @classmethod
    def of(cls, row: asyncpg.Record) -> User:
        """A row of get_user.sql or list_users.sql."""
        user = cls(*USER(row), locktime=None, lock=None, quarantine=row["quarantine"])
        user.labels = as_json(row["labels"])
        if user.state == "locked":
            user.locktime, user.lock = row["acquired_at"], UserLock(*USER_LOCK(row))
        elif user.state == "resting":
            user.available_at = row["ready_at"]
        return user


class UserPage(Struct):
    items: list[User]
    next: str | None


class Ended(Struct):
    fence: int
    holder: str
    note: str
    acquired_at: Moment
    ended_at: Moment | None
    ended_by: Literal["released", "expired", "forced"] | None
    outcome: Outcome | None


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
    failing: int
    waiting: int


class PoolList(Struct):
    items: list[Pool]


class GlancedPool(Pool):
    """`next_free_at` is null where some are free, and where none will come by itself."""

    longest_wait_since: Moment | None
    next_free_at: Moment | None


class GlancedLock(Struct):
    user_id: uuid.UUID
    login: str
    project_id: uuid.UUID
    env: str
    domain: str
    holder: str
    note: str
    acquired_at: Moment
    expires_at: Moment


class GlancedLocks(Struct):
    """How many there are, and those of them that end first."""

    total: int
    items: list[GlancedLock]


class GlancedEnd(Struct):
    """The login is null where the user is deleted."""

    user_id: uuid.UUID
    login: str | None
    holder: str
    acquired_at: Moment
    ended_at: Moment
    ended_by: Literal["released", "expired", "forced"]
    outcome: Outcome | None


class Overview(Struct):
    pools: list[GlancedPool]
    locks: GlancedLocks
    ended: list[GlancedEnd]


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
    note: str
    ttl: int
    acquired_at: Moment
    expires_at: Moment
    user: LockedUser

    @classmethod
    def of(cls, row: asyncpg.Record, password: str | UnsetType | None = UNSET) -> Lock:
        """A row of a statement of locks; the password as only the reply that grants it has it."""
        return cls(*LOCK(row), user=LockedUser(*LOCKED_USER(row), labels=as_json(row["labels"]), password=password))


class LockSet(Struct):
    """In the order in which the users were asked for."""

    locks: list[Lock]


class Health(Struct):
    status: str


class Code(Struct):
    code: str
    valid_until: Moment


class Valid(Struct):
    valid: bool


class Released(Struct):
    released: int


class Imported(Struct):
    created: int
    updated: int
    unchanged: int


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


# ---- Places in lists ---------------------------------------------------------------------------------------

FIRST_PLACE = (datetime(1, 1, 1, tzinfo=UTC), uuid.UUID(int=0))


def write_cursor(*place: Any) -> str:
    """Where a page ended. Nothing secret, and nothing that widens the filter, which is applied on each page."""
    return base64.urlsafe_b64encode(msgspec.json.encode(place)).decode().rstrip("=")


def read_cursor(text: str, kind: type[T]) -> T:
    try:
        padded = text + "=" * (-len(text) % 4)
        place = msgspec.json.decode(base64.b64decode(padded, altchars=b"-_", validate=True), type=kind)
        return cast("T", tuple(p.astimezone(UTC) if isinstance(p, datetime) else p for p in cast("tuple", place)))
    except (ValueError, OverflowError):
        message = f"{shown(text)} is not a cursor: pass `next` of the last page, or leave it out"
        raise Invalid.field("cursor", message) from None


# ---- Limits that settings decide ---------------------------------------------------------------------------


def limits(settings: Settings) -> dict[str, dict[str, Any]]:
    """What the OpenAPI document says of them: field -> members of its JSON schema."""
    return {
        "env": {"enum": list(settings.envs)},
        "domain": {"enum": list(settings.domains)},
        "ttl": {"maximum": settings.max_ttl},
        "wait": {"maximum": settings.max_wait},
    }


def forbidden(settings: Settings, body: Any) -> Iterator[FieldError]:
    """What they forbid in a body, or in a filter, that is otherwise well formed."""
    for field, allowed in (("env", settings.envs), ("domain", settings.domains)):
        value = getattr(body, field, None)
        if isinstance(value, str) and value not in allowed:
            yield FieldError(field, f"{shown(value)} is not one of {', '.join(allowed)}")
    for field, longest in (("ttl", settings.max_ttl), ("wait", settings.max_wait)):
        seconds = getattr(body, field, None)
        if isinstance(seconds, int) and seconds > longest:
            yield FieldError(field, f"{seconds} is over the longest {field} of {longest} seconds")
    parts: Sequence[SetPart] = getattr(body, "users", ())
    for number, part in enumerate(parts):
        for fault in forbidden(settings, part):
            yield FieldError(f"users[{number}].{fault.field}", fault.message)
    if (total := sum(part.count for part in parts)) > 100:
        yield FieldError("users", f"{total} users are asked for, but a set has 100 at the most")
