from __future__ import annotations

import base64
import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar, cast

import asyncpg
import msgspec
from litestar import Request
from msgspec import UNSET, Meta, Struct, UnsetType

from farm.problems import FieldError, Invalid, MalformedBody, shown
from farm.settings import WORD, Settings, in_words

T = TypeVar("T")
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
            faults.append(FieldError(field, f"{shown(value)} is not one of {', '.join(allowed)}"))
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


# What msgspec tells by a pattern, in words.
RULES = {
    PLAIN: "no control characters here",
    NO_NUL: "no U+0000 here",
    LABEL_PAIR: "write key:value, with a key of 1 to 63 of A-Z a-z 0-9 _ . - and no control characters",
}


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
    text = in_words(text, RULES)
    if place and not place.endswith("password"):
        text = f"{shown(value)} is not allowed: {text}"
    return FieldError(place or None, text)


def _value_at(raw: Any, place: str) -> Any:
    """What stands at a place such as users[0].env."""
    for part in re.findall(r"[^.\[\]]+", place):
        raw = raw[int(part) if isinstance(raw, Sequence) else part]
    return raw


def _label_error(place: str, labels: Mapping[str, Any], message: str) -> FieldError:
    for key, value in labels.items():
        if not re.match(WORD, key):
            return FieldError(place, f"the key {shown(key)} is not 1 to 63 of A-Z a-z 0-9 _ . -")
        if not isinstance(value, str) or len(value) > 255 or not re.match(PLAIN, value):
            rule = "must be a text of up to 255 characters without control characters"
            return FieldError(f"{place}.{key}", f"{shown(value)} {rule}")
    return FieldError(place, message)


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
CALLER = "botfarm-caller"  # in the state of a request: who calls, where authentication is on


def caller_of(request: Request) -> Caller:
    return request.scope["state"].get(CALLER, ANYBODY)


def with_implied(scopes: Iterable[str]) -> frozenset[str]:
    implied = {"admin": tuple(SCOPES), "users:write": ("users:read",)}
    return frozenset(each for scope in scopes for each in (scope, *implied.get(scope, ())))


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


JSON = "application/json"


NDJSON = "application/x-ndjson"


CSV = "text/csv"


PROMETHEUS = "text/plain; version=1.0.0"  # Litestar adds the charset


class NoQuery(Body):
    """A call without query parameters."""


class NoBody(Body):
    """A call without a body: what somebody meant as a filter there must not widen it."""


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


UserState = Literal["free", "locked", "resting", "quarantined"]


Label = Annotated[str, Meta(pattern=LABEL_PAIR, examples=["role:admin"])]


Limit = Annotated[int, Meta(ge=1, le=1000)]


CursorText = Annotated[str, Meta(max_length=200, description="`next` of the page before")]


FIRST_CURSOR = (datetime(1, 1, 1, tzinfo=UTC), uuid.UUID(int=0))


class UserFilter(Body):
    project_id: uuid.UUID | None = None
    env: Env | None = None
    domain: Domain | None = None
    state: UserState | None = None
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
        message = f"{shown(text)} is not a cursor: pass `next` of the last page, or leave it out"
        raise Invalid([FieldError("cursor", message)]) from None


def user_of(row: asyncpg.Record) -> User:
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


class ReleaseQuery(Body):
    cooldown: Cooldown = 0
    quarantine: Reason | None = None


class HolderQuery(Body):
    holder: Annotated[str, Meta(min_length=1, max_length=200, pattern=PLAIN)]
    project_id: uuid.UUID | None = None


def pool_of(row: asyncpg.Record) -> Wish:
    return Wish(None, row["project_id"], row["env"], row["domain"])


def lock_of(row: asyncpg.Record, password: str | UnsetType | None = UNSET) -> Lock:
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
