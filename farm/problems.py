"""All that can be refused: a class for each outcome, told as application/problem+json (RFC 9457).

The first line of a class has its status and its slug; its docstring is the default detail, and the text of the OpenAPI
document. A detail names the thing, its value and the way out. Problems are Litestar's HTTPExceptions, so a handler
lists them in `raises`. Most are raised. The refusals of an acquire are returned instead: raising costs 11 us, and
those who are refused in one moment share one.
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

    slug: ClassVar[str] = "internal-error"
    retry_after: ClassVar[int | None] = None

    def __init_subclass__(cls, status: int, slug: str, retry_after: int | None = None) -> None:
        cls.status_code, cls.slug, cls.retry_after = status, slug, retry_after

    def __init__(self, detail: str = "", *, headers: Mapping[str, str] | None = None, **members: Any) -> None:
        told = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        super().__init__(detail=detail or self.__doc__ or "", headers=told | dict(headers or {}))
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


class MalformedBody(Problem, status=400, slug="malformed-body"):
    """The body is not JSON in UTF-8."""


class NotFound(Problem, status=404, slug="not-found"):
    """There is no such page."""

    @classmethod
    def at(cls, path: str) -> NotFound:
        return cls(f"There is nothing at {shown(path)}; see /docs.")


class MethodNotAllowed(Problem, status=405, slug="method-not-allowed"):
    """The method is not allowed here."""


class BodyTooLarge(Problem, status=413, slug="body-too-large"):
    """The body is too large."""

    @classmethod
    def over(cls, limit: int, named: str) -> BodyTooLarge:
        return cls(f"The body is over {named}, {limit} bytes.")


class UnsupportedMediaType(Problem, status=415, slug="unsupported-media-type"):
    """The content type is not supported."""

    @classmethod
    def encoded(cls, encoding: str) -> UnsupportedMediaType:
        return cls(f"The content encoding {encoding!r} is not supported: send it as it is.")


class Invalid(Problem, status=422, slug="invalid"):
    """A value breaks a rule."""

    def __init__(self, errors: Sequence[FieldError | LineError]) -> None:
        first = "; ".join(f"{e.field}: {e.message}" if e.field else e.message for e in errors[:3])
        super().__init__(first + ("; ..." if len(errors) > 3 else ""), errors=list(errors))

    @classmethod
    def field(cls, name: str | None, message: str) -> Invalid:
        return cls([FieldError(name, message)])


class HeadTooLarge(Problem, status=431, slug="head-too-large"):
    """The head of the request is over 64 KiB."""


# ---- Who calls ---------------------------------------------------------------------------------------------


class Unauthenticated(Problem, status=401, slug="unauthenticated"):
    """A token is needed: get one at POST /token, and send it as `Authorization: Bearer ...`."""

    def __init__(self, fault: str = "") -> None:
        """With what is wrong with the token that was sent (RFC 6750 section 3.1)."""
        wrong = f', error="invalid_token", error_description="{fault}"' if fault else ""
        super().__init__(fault, headers={"WWW-Authenticate": f'Bearer realm="botfarm"{wrong}'})


class Forbidden(Problem, status=403, slug="forbidden"):
    """The token lacks the scope or the project."""

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

    ERRORS = ("invalid_client", "invalid_request", "invalid_scope", "temporarily_unavailable", "unsupported_grant_type")

    def __init__(self, error: str, description: str, status: int = 400, retry_after: int | None = None) -> None:
        super().__init__(re.sub(r"[^\x20-\x21\x23-\x5b\x5d-\x7e]", "'", description))  # what section 5.2 allows
        self.error, self.status = error, status
        self.headers = {"WWW-Authenticate": 'Basic realm="botfarm"'} if status == 401 else {}
        if retry_after:
            self.headers["Retry-After"] = str(retry_after)


# ---- Users -------------------------------------------------------------------------------------------------


class UserNotFound(Problem, status=404, slug="user-not-found"):
    """There is no such user."""

    @classmethod
    def of(cls, id: uuid.UUID) -> UserNotFound:
        return cls(f"There is no user {id}.")


class LoginTaken(Problem, status=409, slug="login-taken"):
    """The login exists already in that project and env."""

    @classmethod
    def of(cls, login: Any) -> LoginTaken:
        return cls(f"The login {shown(login)} exists already in that project and env: choose another one.")


class UserLocked(Problem, status=409, slug="user-locked"):
    """The user is held by another, or others take it in this very moment (then with `Retry-After`)."""

    @classmethod
    def of(cls, id: uuid.UUID, lock: Any) -> UserLocked:
        """`lock` is a row with `holder` and `expires_at`."""
        holder, end = lock["holder"], lock["expires_at"]
        detail = f"The user {id} is held by {shown(holder)} until {end:%Y-%m-%dT%H:%M:%S.%fZ}."
        return cls(detail, holder=holder, expires_at=end)

    @classmethod
    def contended(cls, id: uuid.UUID) -> UserLocked:
        detail = f"Other calls take or change the user {id} in this moment; try again."
        return cls(detail, headers={"Retry-After": "1"}, holder=None, expires_at=None)


class UserUnavailable(Problem, status=409, slug="user-unavailable"):
    """The user is resting or quarantined."""


# ---- Locks -------------------------------------------------------------------------------------------------


class LockNotHeld(Problem, status=404, slug="lock-not-held"):
    """The lock is not held: its id is unknown, or the lock has ended."""

    @classmethod
    def of(cls, id: uuid.UUID, end: Any = None) -> LockNotHeld:
        """`end` is the row of its end, where that is known."""
        if end is None:
            return cls(f"No lock {id} is known.")
        detail = f"The lock {id} has ended ({end['ended_by']} at {end['ended_at']:%Y-%m-%dT%H:%M:%S.%fZ})."
        return cls(detail, ended_at=end["ended_at"], ended_by=end["ended_by"])


class NoSession(Problem, status=404, slug="no-session"):
    """The user has no session, or it has ended: log in, and keep one with PUT."""


class NoTotp(Problem, status=404, slug="no-totp"):
    """The user has no secret of one-time codes: set its `totp`."""


class CodeSpent(Problem, status=409, slug="code-spent"):
    """The codes of this user are given to others who ask; each is given out once. Try again for the next one."""


class NotSealed(Problem, status=409, slug="not-sealed"):
    """Hashes alone are stored here, and sessions and codes need keys: set BOTFARM_KEYS to what `keygen` prints."""


class NoMatchingUser(Problem, status=404, slug="no-matching-user"):
    """No user at all matches the filter, so waiting would not help: create one, or ask for less."""


class PoolExhausted(Problem, status=409, slug="pool-exhausted", retry_after=1):
    """Users match, but none is free."""


class LockEnded(Problem, status=409, slug="lock-ended"):
    """The lock of this idempotency key has ended: use a new key for a new lock."""


# ---- The service -------------------------------------------------------------------------------------------


class InternalError(Problem, status=500, slug="internal-error"):
    """An unforeseen error; the service's log has it under this request id."""


class ShuttingDown(Problem, status=503, slug="shutting-down", retry_after=1):
    """This replica stops; another one, or this one in a moment, serves the call."""


class DatabaseUnavailable(Problem, status=503, slug="database-unavailable", retry_after=1):
    """The database does not answer; try again in a moment."""


class Overloaded(Problem, status=503, slug="overloaded", retry_after=1):
    """So many calls wait here already that this one would take too long; try again in a moment."""
