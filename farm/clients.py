"""Who calls: the cause of what happens, and with BOTFARM_AUTH=on the clients, their tokens, scopes and projects.

A client is a program with a secret. For that it gets a signed token at POST /token, which it sends with each call. The
scopes of a call are those that both its token and its client have; a client may be limited to projects, and then it is
answered as if there were no others. Without authentication everybody may do everything.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import ipaddress
import itertools
import re
import secrets
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import parse_qsl, unquote_plus

import asyncpg
import jwt
import msgspec
from cachetools import TLRUCache
from msgspec import Struct

from farm.bodies import media_of
from farm.database import SQL, Coalescer, Connections
from farm.passwords import HASHER, Passwords, matches
from farm.problems import Forbidden, TokenRefusal, Unauthenticated, UnsupportedMediaType, shown
from farm.settings import Secret, log, parse_keys
from farm.telemetry import Cause
from farm.words import Token

# ---- Who calls, and what for -------------------------------------------------------------------------------

SCOPES = {
    "users:read": "read users, their history and pools",
    "users:write": "create, change, delete, import, verify and quarantine users, and read them",
    "locks": "acquire users, and extend and release locks of its own",
    "admin": "everything, also with locks of other clients",
}


def with_implied(scopes: Iterable[str]) -> frozenset[str]:
    implied = {"admin": tuple(SCOPES), "users:write": ("users:read",)}
    return frozenset(each for scope in scopes for each in (scope, *implied.get(scope, ())))


class Caller(Struct, frozen=True):
    """Who calls; by default everybody, as it is without authentication."""

    client: uuid.UUID | None = None
    scopes: frozenset[str] = frozenset(SCOPES)
    projects: tuple[uuid.UUID, ...] | None = None  # null: all

    @classmethod
    def of(cls, row: asyncpg.Record) -> Caller:
        """A client, with all of its scopes: a row of list_clients.sql."""
        projects = None if row["projects"] is None else tuple(row["projects"])
        return cls(row["client_id"], with_implied(row["scope"].split()), projects)

    @property
    def owner(self) -> uuid.UUID | None:
        """The client whose locks it may touch; null: anybody's."""
        return None if "admin" in self.scopes else self.client

    def check_project(self, project_id: uuid.UUID | None) -> None:
        """Forbidden where a client that is limited to projects names another one."""
        if self.projects is not None and project_id is not None and project_id not in self.projects:
            raise Forbidden.project(project_id)


ANYBODY = Caller()
REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:+/=@-]{1,128}")
# https://www.w3.org/TR/trace-context/#traceparent-header
TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_PREFIX = secrets.token_hex(6)
_NUMBERS = itertools.count(1)
CALLER, CAUSE = "botfarm-caller", "botfarm-cause"  # in the state of a request


def caller_of(scope: Any) -> Caller:
    return scope["state"].get(CALLER, ANYBODY)


def cause_of(scope: Any) -> Cause:
    """Where an event comes from: the request's own id and trace, where it brought some that are well formed."""
    state = scope["state"]
    if (cause := state.get(CAUSE)) is not None:
        return cause
    request_id = trace_id = None
    echo = []
    for name, value in scope["headers"]:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            request_id = value.decode()
            echo.append((name, value))
        elif name == b"traceparent" and (found := TRACEPARENT.fullmatch(value)):
            trace_id = found[1].decode()
            echo.append((name, value))
    request_id = request_id or f"{_PREFIX}-{next(_NUMBERS):x}"
    state[CAUSE] = cause = Cause(request_id, trace_id, caller_of(scope).client, echo or None)
    return cause


# ---- Clients and their tokens ------------------------------------------------------------------------------


class Claims(Struct):
    """What is read of a token whose signature is right."""

    sub: uuid.UUID
    scope: str
    exp: float


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
    OWN = "requests or failures of this client at this address"
    NEAR = "failures at this address, of any client"
    LONGEST = 2048  # characters of an Authorization header; our tokens have some 400

    def __init__(self, pool: Connections, keys: Secret) -> None:
        self._pool = pool
        self._keys = parse_keys(keys.reveal())
        self._clients: dict[uuid.UUID, Caller] = {}
        self._read_at = -self.STALE
        # Header -> its caller (None: the client is gone) and until when that holds: a check costs 63 us, a look-up 1.
        self._checked: TLRUCache[str, tuple[Caller | None, float]] = TLRUCache(
            self.MOST, ttu=lambda _, checked, __: checked[1], timer=time.monotonic
        )
        self.refresh = Coalescer(self._read, 10_000)
        self._secrets = Passwords(None)  # with threads and a crowd of their own: who asks for tokens delays no password
        self._nobody = HASHER.hash(secrets.token_urlsafe(32))  # what the secret of an unknown client is compared with

    async def admit(self, sent: str | None, scope: str) -> Caller:
        """Who sent this Authorization header. Unauthenticated, or Forbidden where the scope is lacking."""
        now = time.monotonic()
        caller, until = self._checked.get(sent or "", (None, 0))
        if not until or now >= self._read_at + self.STALE:
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
        caller = self._clients.get(claims.sub)
        if caller:
            scopes = caller.scopes & with_implied(claims.scope.split())
            caller = Caller(claims.sub, scopes, caller.projects)
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
            raise Unauthenticated("The token has expired: get a new one at POST /token") from None
        except jwt.ImmatureSignatureError:
            raise Unauthenticated("The token is not valid yet: the clocks of the replicas differ") from None
        except (jwt.InvalidTokenError, msgspec.ValidationError, KeyError):
            raise Unauthenticated("The token is not valid here") from None

    async def _read(self, asked: list[None]) -> list[None]:
        """Read the clients. Where one has changed, what was checked does not count any more."""
        began = time.monotonic()
        clients = {row["client_id"]: Caller.of(row) for row in await self._pool.fetch(SQL["list_clients"])}
        if clients != self._clients:
            self._checked.clear()
        self._clients, self._read_at = clients, began
        return asked

    async def authenticate(self, client_id: str, secret: str, address: str) -> asyncpg.Record:
        """The client with this secret. TokenRefusal for a wrong one, and for one who asks too often.

        Failures are counted after the check and before the answer, so those who guess at the same time learn no
        more than those who guess one after the other.
        """
        id = _uuid_or_none(client_id)
        network = _network(address)
        asking = [hashlib.sha256(who.encode()).digest() for who in (f"{id or client_id}\n{address}", network)]
        own, near = await self._count(asking, requests=1)
        self._limit(self.OWN, own, own["requests"] > self.REQUESTS or own["failures"] >= self.FAILURES)
        self._limit(self.NEAR, near, near["failures"] >= self.STRAY_FAILURES)
        row = await self._pool.fetchrow(SQL["get_client"], id)
        known = (row["secret_hash"], row["previous_hash"]) if row else (None, None)
        hashes = [stored or self._nobody for stored in known]  # as slow for an unknown client as for a known one
        valid = await self._secrets.in_thread(lambda: any(matches(each, secret) for each in hashes))
        own, near = await self._count(asking, failures=0 if valid else 1)
        self._limit(self.OWN, own, own["failures"] - (not valid) >= self.FAILURES)
        if row is None or not valid:
            log.warning("A token was refused to %s at %s", f"the client {id}" if row else "an unknown client", address)
            raise TokenRefusal("invalid_client", "Unknown client or wrong secret.", 401)
        return row

    async def _count(self, asking: list[bytes], requests: int = 0, failures: int = 0) -> list[asyncpg.Record]:
        rows = await self._pool.fetch(SQL["count_token_request"], sorted(asking), requests, failures)
        counted = {row["caller"]: row for row in rows}
        return [counted[who] for who in asking]

    def _limit(self, what: str, counted: asyncpg.Record, exceeded: bool) -> None:
        if exceeded:
            wait = counted["retry_after"]
            text = f"Too many {what}; try again in {wait} seconds."
            raise TokenRefusal("temporarily_unavailable", text, 429, retry_after=wait)

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
        self._secrets.close()


# ---- POST /token: the client credentials grant, RFC 6749 section 4.4 ---------------------------------------
# The password grant is left out on purpose, see RFC 9700 section 2.4.

FORM = "application/x-www-form-urlencoded"
LONGEST_FORM = 16 * 1024
MOST_PARAMETERS = 100


def read_form(content_type: str, body: bytes) -> dict[str, str]:
    """The parameters that have a value; those without count as left out, unknown ones are passed over."""
    try:
        if media_of(content_type) != FORM:
            raise TokenRefusal("invalid_request", f"The content type has to be {FORM}.")
    except UnsupportedMediaType as other:
        raise TokenRefusal("invalid_request", other.detail, other.status_code) from None
    try:
        pairs = parse_qsl(body.decode("ascii"), errors="strict", max_num_fields=MOST_PARAMETERS)
    except UnicodeError:
        raise TokenRefusal("invalid_request", f"The body is not {FORM} in UTF-8.") from None
    except ValueError:
        raise TokenRefusal("invalid_request", f"The form has over {MOST_PARAMETERS} parameters.") from None
    if len(dict(pairs)) < len(pairs):
        raise TokenRefusal("invalid_request", "A parameter is there twice.")
    return dict(pairs)


def _credentials(authorization: str | None, form: dict[str, str]) -> tuple[str, str]:
    """Id and secret of the client; RFC 6749 section 2.3.1 allows one way at a time."""
    if authorization is None:
        if "client_id" in form and "client_secret" in form:
            return form["client_id"], form["client_secret"]
        text = "Send the client's id and secret by HTTP Basic, or as client_id and client_secret."
        raise TokenRefusal("invalid_client", text, 401)
    kind, _, encoded = authorization.partition(" ")
    try:
        client_id, colon, secret = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
    except ValueError:
        kind = client_id = colon = secret = ""
    if kind.lower() != "basic" or not colon:
        text = "The Authorization header is not HTTP Basic with the client's id and secret."
        raise TokenRefusal("invalid_client", text, 401)
    client_id, secret = unquote_plus(client_id), unquote_plus(secret)
    if "client_secret" in form or form.get("client_id", client_id) != client_id:
        raise TokenRefusal("invalid_request", "The client is there twice: by HTTP Basic and in the form.")
    return client_id, secret


def _granted_scope(asked: str, scopes: Sequence[str]) -> str:
    """The scopes that were asked for, or all of the client."""
    if excess := sorted(set(asked.split()) - with_implied(scopes)):
        raise TokenRefusal("invalid_scope", f"{shown(excess[0])} is none of the client's scopes, {' '.join(scopes)}.")
    return " ".join(dict.fromkeys(asked.split())) or " ".join(scopes)


async def grant_token(gate: Gate, form: dict[str, str], authorization: str | None, address: str) -> Token:
    """A token for a client's secret. TokenRefusal says why there is none."""
    client_id, secret = _credentials(authorization, form)
    grant = form.get("grant_type")
    if grant is None:
        raise TokenRefusal("invalid_request", "grant_type is missing: it is client_credentials.")
    if grant != "client_credentials":
        raise TokenRefusal("unsupported_grant_type", f"{shown(grant)} is not the one grant here, client_credentials.")
    client = await gate.authenticate(client_id, secret, address)
    scope = _granted_scope(form.get("scope", ""), client["scopes"])
    return Token(gate.issue(client["id"], scope), "Bearer", gate.LIFE, scope)
