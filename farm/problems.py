from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import asyncpg
import msgspec
from litestar import Response
from msgspec import Struct


def shown(value: Any) -> str:
    """A value as an error message shows it, cut when long."""
    try:
        text = json.dumps(value, ensure_ascii=True, default=str)
    except RecursionError:
        return "what is nested so deep"
    return text if len(text) <= 80 else text[:77] + '..."'


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


def no_user(id: uuid.UUID) -> UserNotFound:
    return UserNotFound(f"There is no user {id}.")


def login_taken(login: Any) -> LoginTaken:
    return LoginTaken(f"The login {shown(login)} exists already in that project and env: choose another one.")


def user_locked(id: uuid.UUID, row: asyncpg.Record) -> UserLocked:
    return UserLocked(
        f"The user {id} is held by {shown(row['holder'])} until {row['expires_at']:%Y-%m-%dT%H:%M:%S.%fZ}.",
        holder=row["holder"],
        expires_at=row["expires_at"],
    )


def no_lock(id: uuid.UUID) -> LockNotHeld:
    return LockNotHeld(f"No lock {id} is known.")
