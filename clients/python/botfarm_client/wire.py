"""One request to BotFarm, and what its reply means. Imported by the first request, as what it needs takes its time."""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.parse
import urllib.request
from typing import Any

from botfarm_client.errors import (
    BotfarmError,
    LockLost,
    Misconfigured,
    NoMatch,
    NoneFree,
    NotAllowed,
    Refused,
    Unreachable,
)

CONNECT = 10.0  # seconds to be connected in, however long the reply may take
EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
JWT = "urn:ietf:params:oauth:token-type:jwt"
MEANING = {
    "lock-not-held": LockLost,
    "lock-ended": LockLost,
    "no-matching-user": NoMatch,
    "user-not-found": NoMatch,
    "pool-exhausted": NoneFree,
    "user-locked": NoneFree,
    "user-unavailable": NoneFree,
    "unauthenticated": NotAllowed,
    "forbidden": NotAllowed,
}
__tracebackhide__ = True  # by pytest: with -l it would show what is secret here
HOW_TO_BE_KNOWN = "set BOTFARM_CLIENT_ID and BOTFARM_CLIENT_SECRET, or BOTFARM_ID_TOKEN"


class _Unseen(str):
    """In the variables of the library below us, which pytest shows."""

    def __repr__(self) -> str:
        return "…"


class _Patient:
    """Connected soon, or not at all; then as patient as the call is."""

    def connect(self: Any) -> None:
        patience, self.timeout = self.timeout, min(self.timeout, CONNECT)
        super().connect()  # type: ignore[misc]
        self.timeout = patience
        self.sock.settimeout(patience)


class _Http(_Patient, http.client.HTTPConnection):
    pass


class _Https(_Patient, http.client.HTTPSConnection):
    pass


class _ByHttp(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Http, req)


class _ByHttps(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Https, req)


class _AsItComes(urllib.request.HTTPErrorProcessor):
    """No reply is an exception, and none sends us elsewhere: urllib would take our token along."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


class Wire:
    """The way to one service, by the proxies of the environment. Each request has a connection of its own."""

    def __init__(self, url: str, credentials: dict[str, str]) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            bare = not (parts.query or parts.fragment or "@" in parts.netloc)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and bare
        except ValueError:
            usable = False
        if not usable:
            told = re.sub("^(https?://)?.*@", r"\1…@", url)  # no password
            raise Misconfigured(f"{told!r} is no URL of BotFarm: it has to be http://HOST:PORT or https://HOST")
        self._url = url
        self._form = _form_of(credentials)
        self._token: tuple[str, float] | None = None  # and the time from which on it is not used any more
        self._opener = urllib.request.build_opener(_ByHttp, _ByHttps, _AsItComes)

    @property
    def authenticated(self) -> bool:
        return self._token is not None

    def call(self, method: str, path: str, body: Any = None, key: str | None = None, timeout: float = CONNECT) -> Any:
        """The JSON of the reply. No secret is sent to a service that does not ask for a token."""
        if self._token and time.monotonic() >= self._token[1]:
            self._fetch_token(timeout)
        try:
            return self._send(method, path, body, key, timeout)
        except NotAllowed as refused:
            if not refused.unknown or not self._form:
                raise
        self._fetch_token(timeout)
        return self._send(method, path, body, key, timeout)

    def _send(self, method: str, path: str, body: Any, key: str | None, timeout: float) -> Any:
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if key:
            headers["Idempotency-Key"] = key
        if self._token:
            headers["Authorization"] = _Unseen(f"Bearer {self._token[0]}")
        data = None if body is None else json.dumps(body).encode()
        url = self._url + urllib.parse.quote(path, "/?&=%+", errors="surrogateescape")  # an id may be any text
        status, told, text = self._open(urllib.request.Request(url, data, headers, method=method), timeout)
        if status in (201, 200, 204):
            return self._json(text) if text else None
        raise self._error(status, told, text)

    def _open(self, request: urllib.request.Request, timeout: float) -> tuple[int, Any, bytes]:
        try:
            with self._opener.open(request, timeout=timeout) as reply:
                return reply.status, reply.headers, reply.read()
        except (OSError, http.client.HTTPException) as fault:
            reason = str(getattr(fault, "reason", None) or fault) or type(fault).__name__
            raise Unreachable(f"BotFarm at {self._url} can't be reached: {reason}") from None  # it sent what is secret
        except ValueError as fault:  # told by its name alone, as a proxy's password may be in it
            text = f"{self._url}, or the proxy before it, is no address that can be called: {type(fault).__name__}"
            raise Misconfigured(text) from None

    def _json(self, text: bytes) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            raise Unreachable(f"what answers at {self._url} is not BotFarm: its reply is no JSON") from None

    def _error(self, status: int, headers: Any, text: bytes) -> BotfarmError:
        """What a reply means that is no success; one that BotFarm has not written means nothing but bad luck."""
        if 300 <= status < 400:
            return Misconfigured(f"{self._url} sends callers on to {headers.get('Location')}: use that URL")
        try:
            problem = json.loads(text)
            slug = problem["type"].rpartition("urn:botfarm:")[2]
        except (ValueError, KeyError, TypeError, AttributeError):
            return self._away(f"{self._url} answered {status}, and not as BotFarm does", headers)
        if status >= 500 or status == 429:
            return self._away(f"BotFarm at {self._url} answered {status}: {problem.get('detail')}", headers)
        error: BotfarmError = MEANING.get(slug, Refused)(_sentence(problem))
        error.slug = slug
        if isinstance(error, NotAllowed) and status == 401:
            error.unknown = True
            error.args = (f"{error} ({HOW_TO_BE_KNOWN})",) if not self._form else error.args
        if isinstance(error, LockLost):
            error.ended_by = problem.get("ended_by")
        return error

    def _away(self, text: str, headers: Any) -> Unreachable:
        error = Unreachable(text)
        after = headers.get("Retry-After") or ""
        error.retry_after = float(after) if after.isdigit() else None
        return error

    def _fetch_token(self, timeout: float = CONNECT) -> None:
        """Get a new token. It is renewed before its end, by a tenth of its time."""
        data, sent = urllib.parse.urlencode(self._form).encode(), time.monotonic()
        request = urllib.request.Request(f"{self._url}/token", data)
        status, headers, text = self._open(request, min(timeout, CONNECT))
        if status >= 500 or status == 429:
            raise self._away(f"{self._url}/token answered {status}", headers)
        answer = self._json(text)
        if status != 200:
            told = f"{answer.get('error')}: {answer.get('error_description')}" if "error" in answer else f"a {status}"
            raise NotAllowed(f"BotFarm at {self._url} gives no token: {told}")
        self._token = answer["access_token"], sent + 0.9 * answer["expires_in"]


def _sentence(problem: dict[str, Any]) -> str:
    detail = str(problem.get("detail"))
    faults = [f"{fault.get('field')}: {fault.get('message')}" for fault in problem.get("errors") or []]
    return "; ".join([detail, *(fault for fault in faults if fault not in detail)])


def _form_of(given: dict[str, str]) -> dict[str, str]:
    """What is sent for a token; nothing where there is nothing to send. A secret counts before an id token."""
    if given.get("client_secret"):
        if not given.get("client_id"):
            raise Misconfigured("there is a client secret without a client: set BOTFARM_CLIENT_ID, too")
        kept = {name: given[name] for name in ("client_id", "client_secret")}
        return {"grant_type": "client_credentials", **kept}
    if given.get("id_token"):
        return {"grant_type": EXCHANGE, "subject_token": given["id_token"], "subject_token_type": JWT}
    return {}
