"""All that can be refused: a class for each outcome, told as application/problem+json (RFC 9457).

The class decides the status and the slug; its docstring is the default detail, and the text of the OpenAPI document. A
detail names the thing, its value and the way out. Problems are Litestar's HTTPExceptions, so a handler lists them
in `raises`. Most are raised. The refusals of an acquire are returned instead: raising costs 11 us, and those who
are refused in one moment share one.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import msgspec
from litestar import Response
from litestar.exceptions import HTTPException
from msgspec import Struct

PROBLEM_JSON = "application/problem+json"


class FieldError(Struct):
    field: str | None
    message: str


class LineError(Struct):
    line: int
    field: str | None
    message: str


class ProblemDetails(Struct):
    """RFC 9457; each type of problem has further members of its own."""

    type: str
    title: str
    status: int
    detail: str


def shown(value: Any) -> str:
    """A value as a detail shows it, cut when long."""
    try:
        text = json.dumps(value, ensure_ascii=True, default=str)
    except RecursionError:
        return "what is nested so deep"
    return text if len(text) <= 80 else text[:77] + '..."'


class Problem(HTTPException):
    """Something was refused."""

    status_code = 500
    slug: ClassVar[str] = "internal-error"
    retry_after: ClassVar[int | None] = None

    def __init__(self, detail: str = "", *, headers: Mapping[str, str] | None = None, **members: Any) -> None:
        told = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        super().__init__(detail=detail or (self.__doc__ or "").strip(), headers=told | dict(headers or {}))
        self.members = members

    @cached_property
    def body(self) -> bytes:
        """Written once, however many share the refusal."""
        title = self.slug.replace("-", " ").capitalize()
        told = {"type": f"urn:botfarm:{self.slug}", "title": title, "status": self.status_code, "detail": self.detail}
        return msgspec.json.encode(told | self.members)

    def response(self) -> Response[bytes]:
        return Response(self.body, status_code=self.status_code, media_type=PROBLEM_JSON, headers=self.headers)


# ---- The request itself ------------------------------------------------------------------------------------


class MalformedBody(Problem):
    """The body is not JSON in UTF-8."""

    status_code, slug = 400, "malformed-body"


class NotFound(Problem):
    """There is no such page."""

    status_code, slug = 404, "not-found"


class MethodNotAllowed(Problem):
    """The method is not allowed here."""

    status_code, slug = 405, "method-not-allowed"


class BodyTooLarge(Problem):
    """The body is too large."""

    status_code, slug = 413, "body-too-large"

    @classmethod
    def over(cls, limit: int, named: str) -> BodyTooLarge:
        """Without an end of the connection, which would reset it under a caller that still sends."""
        return cls(f"The body is over {named}, {limit} bytes.")


class UnsupportedMediaType(Problem):
    """The content type is not supported."""

    status_code, slug = 415, "unsupported-media-type"

    @classmethod
    def encoded(cls, encoding: str) -> UnsupportedMediaType:
        return cls(f"The content encoding {encoding!r} is not supported: send it as it is.")


class Invalid(Problem):
    """A value breaks a rule."""

    status_code, slug = 422, "invalid"

    def __init__(self, errors: Sequence[FieldError | LineError]) -> None:
        first = "; ".join(f"{e.field}: {e.message}" if e.field else e.message for e in errors[:3])
        super().__init__(first + ("; ..." if len(errors) > 3 else ""), errors=list(errors))

    @classmethod
    def field(cls, name: str | None, message: str) -> Invalid:
        return cls([FieldError(name, message)])


class HeadTooLarge(Problem):
    """The head of the request is over 64 KiB."""

    status_code, slug = 431, "head-too-large"


# ---- Who calls ---------------------------------------------------------------------------------------------


class Unauthenticated(Problem):
    """A token is needed: get one at POST /token, and send it as `Authorization: Bearer ...`."""

    status_code, slug = 401, "unauthenticated"

    def __init__(self, fault: str = "") -> None:
        """With what is wrong with the token that was sent (RFC 6750 section 3.1)."""
        wrong = f', error="invalid_token", error_description="{fault}"' if fault else ""
        super().__init__(fault, headers={"WWW-Authenticate": f'Bearer realm="botfarm"{wrong}'})


class Forbidden(Problem):
    """The token lacks the scope or the project."""

    status_code, slug = 403, "forbidden"

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


class TokenRefusal(Exception):
    """A token is refused, in the form of RFC 6749 section 5.2 and not in that of a problem."""

    ERRORS: ClassVar[tuple[str, ...]] = (
        "invalid_client", "invalid_request", "invalid_scope", "temporarily_unavailable", "unsupported_grant_type",
    )  # fmt: skip

    def __init__(self, error: str, description: str, status: int = 400, **headers: str) -> None:
        super().__init__(re.sub(r"[^\x20-\x21\x23-\x5b\x5d-\x7e]", "'", description))  # what section 5.2 allows
        self.error = error
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


# ---- Users -------------------------------------------------------------------------------------------------


class UserNotFound(Problem):
    """There is no such user."""

    status_code, slug = 404, "user-not-found"

    @classmethod
    def of(cls, id: uuid.UUID) -> UserNotFound:
        return cls(f"There is no user {id}.")


class LoginTaken(Problem):
    """The login exists already in that project and env."""

    status_code, slug = 409, "login-taken"

    @classmethod
    def of(cls, login: Any) -> LoginTaken:
        return cls(f"The login {shown(login)} exists already in that project and env: choose another one.")


class UserLocked(Problem):
    """The user is held by another."""

    status_code, slug = 409, "user-locked"

    @classmethod
    def of(cls, id: uuid.UUID, lock: Any) -> UserLocked:
        """`lock` is a row with `holder` and `expires_at`."""
        holder, end = lock["holder"], lock["expires_at"]
        detail = f"The user {id} is held by {shown(holder)} until {end:%Y-%m-%dT%H:%M:%S.%fZ}."
        return cls(detail, holder=holder, expires_at=end)


class UserUnavailable(Problem):
    """The user is resting or quarantined."""

    status_code, slug = 409, "user-unavailable"


# ---- Locks -------------------------------------------------------------------------------------------------


class LockNotHeld(Problem):
    """The lock is not held: its id is unknown, or the lock has ended."""

    status_code, slug = 404, "lock-not-held"

    @classmethod
    def of(cls, id: uuid.UUID, end: Any = None) -> LockNotHeld:
        """`end` is the row of its end, where that is known."""
        if end is None:
            return cls(f"No lock {id} is known.")
        detail = f"The lock {id} has ended ({end['ended_by']} at {end['ended_at']:%Y-%m-%dT%H:%M:%S.%fZ})."
        return cls(detail, ended_at=end["ended_at"], ended_by=end["ended_by"])


class NoMatchingUser(Problem):
    """No user at all matches the filter, so waiting would not help: create one, or ask for less."""

    status_code, slug = 404, "no-matching-user"


class PoolExhausted(Problem):
    """Users match, but none is free."""

    status_code, slug, retry_after = 409, "pool-exhausted", 1


class LockEnded(Problem):
    """The lock of this idempotency key has ended: use a new key for a new lock."""

    status_code, slug = 409, "lock-ended"


# ---- The service -------------------------------------------------------------------------------------------


class InternalError(Problem):
    """An unforeseen error; the service's log has it under this request id."""


class ShuttingDown(Problem):
    """This replica stops; another one, or this one in a moment, serves the call."""

    status_code, slug, retry_after = 503, "shutting-down", 1


class DatabaseUnavailable(Problem):
    """The database does not answer; try again in a moment."""

    status_code, slug, retry_after = 503, "database-unavailable", 1
