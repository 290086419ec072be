"""Import files, cursors, headers, paths and query strings that nobody would write: answered, and nothing half done."""

from __future__ import annotations

import base64
import json
import uuid
from urllib.parse import quote

import httpx
import msgspec
import pytest
from conftest import examples, raw
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import farm.server
import farm.words

relaxed = settings(max_examples=examples(80), deadline=None, suppress_health_check=list(HealthCheck))
PROJECT = "44444444-4444-4444-8444-444444444444"
REFUSED = {400, 404, 405, 409, 413, 415, 422, 431}


@pytest.fixture(scope="module")
def http(service):
    with httpx.Client(base_url=service.url, timeout=30) as opened:
        yield opened
        assert opened.get("/readyz").status_code == 200


# -- imports ----------------------------------------------------------------------------------------------

odd = st.sampled_from(
    [
        b"\x00",
        b'"',
        b'""',
        b"'",
        b"\r",
        b"\n",
        b"\r\n",
        b",",
        b"\t",
        b"\xff",
        b"\xfe\xff",
        b"\xef\xbb\xbf",
        b"{",
        b"}",
        b"[",
        b"\xed\xa0\x80",
        b"\\u0000",
        b"\\ud800",
        b"\xe2\x80\xa8",
        b"null",
        b"1e999",
        b"NaN",
        b"=cmd()",
        b" " * 70_000,
        b"," * 5000,
        b"[" * 5000,
        b'{"a":' * 3000,
    ]
)
noise = st.one_of(odd, st.binary(max_size=20))
encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "latin-1", "cp1252", "utf-7"])
login_texts = st.text(max_size=12)


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file that is right but for some lines in other encodings, and some bytes that are put in anywhere."""
    media = draw(st.sampled_from([farm.words.CSV, farm.words.NDJSON, f"{farm.words.CSV}; charset=utf-16"]))
    logins = draw(st.lists(login_texts, max_size=6))
    if media == farm.words.NDJSON:
        user = {"password": "p", "project_id": PROJECT, "env": "stage"}
        lines = [json.dumps({"login": login, **user}, ensure_ascii=draw(st.booleans())) for login in logins]
    else:
        lines = ["login,password,project_id,env", *(f'"{login}",p,{PROJECT},stage' for login in logins)]
    body = b"\n".join(line.encode(draw(encodings), "replace") for line in lines)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(body)))
        body = body[:place] + draw(noise) + body[place:]
    return media, body


def stored(http: httpx.Client) -> int:
    return sum(pool["total"] for pool in http.get("/pools").json()["items"])


def many_columns(count: int) -> bytes:
    columns = [f"label.k{number}" for number in range(count)]
    line = ["many", "p", PROJECT, "stage", *("v" for _ in columns)]
    return "\n".join([",".join(["login,password,project_id,env", *columns]), ",".join(line)]).encode()


@relaxed
@given(files() | st.tuples(st.sampled_from([farm.words.CSV, farm.words.NDJSON]), st.binary(max_size=200)))
@example((farm.words.CSV, many_columns(32)))
@example((farm.words.CSV, many_columns(33)))
@example((farm.words.CSV, many_columns(5000)))
@example((farm.words.CSV, many_columns(20_000)))
@example((farm.words.CSV, b"login,password,project_id,env\n" + b"," * 60_000))
@example((farm.words.CSV, b"login,password,project_id,env\n" + b'"\n' * 100_001))
@example((farm.words.NDJSON, b"{}\n" * 50_000))
@example((farm.words.NDJSON, b"\x00" * 1_000_000))
@example((farm.words.NDJSON, b'{"labels":' + b"[" * 60_000))
@example((farm.words.NDJSON, b'{"login": "x", "login": "y", "labels": {"a": 1e999}, "env": 1' + b"0" * 5000 + b"}"))
def test_an_import_is_stored_whole_or_not_at_all(http, file):
    media, body = file
    before = stored(http)
    answer = http.post("/users/import", content=body, headers={"Content-Type": media})
    told = answer.json()
    if answer.status_code == 200:
        assert stored(http) == before + told["created"]
        return
    if "utf-16" in media:
        assert answer.status_code == 415
        return
    assert answer.status_code == 422, answer.text
    assert 1 <= len(told["errors"]) <= 100
    assert all(error["line"] >= 1 and error["message"] for error in told["errors"])
    assert len(answer.content) < 100_000
    assert stored(http) == before


# -- cursors ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(http):
    """A project of three users beside others, and the cursor after its first one."""
    project = str(uuid.uuid4())
    for owner in (project, str(uuid.uuid4())):
        for number in range(3):
            user = {"login": f"bot-{number}", "password": "pw-canary", "project_id": owner, "env": "stage"}
            assert http.post("/users", json=user).status_code == 201
    first = http.get("/users", params={"project_id": project, "limit": 1}).json()
    return project, first["next"]


def decoded(cursor: str) -> list[object]:
    return json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))


def test_a_cursor_holds_a_time_and_an_id_alone(http, page):
    project, cursor = page
    (user,) = http.get("/users", params={"project_id": project, "limit": 1}).json()["items"]
    created_at, id = decoded(cursor)
    assert id == user["id"]
    assert created_at.removesuffix("Z") == user["created_at"].removesuffix("Z")


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.uuids().map(str)
    | st.datetimes().map(str),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
made = junk.map(lambda value: base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("="))
times = st.sampled_from(
    [
        "0001-01-01T00:00:00Z",
        "9999-12-31T23:59:59.999999Z",
        "0001-01-01T00:00:00+14:00",
        "9999-12-31T23:59:59-12:00",
        "2026-01-01T00:00:00",
        "infinity",
        "-4713-01-01T00:00:00Z",
    ]
)
timed = st.tuples(times, st.uuids().map(str)).map(
    lambda place: base64.urlsafe_b64encode(msgspec.json.encode(place)).decode().rstrip("=")
)


@st.composite
def bent(draw: st.DrawFn) -> tuple[int, int, str]:
    """Where a true cursor is cut, how much of it goes, and what comes in."""
    return draw(st.integers(0, 90)), draw(st.integers(0, 90)), draw(st.text(max_size=10))


@relaxed
@given(st.text(max_size=250) | made | timed | bent())
def test_a_tampered_cursor_is_refused_or_reaches_nothing_outside_the_filter(http, page, cursor):
    project, true = page
    if isinstance(cursor, tuple):
        place, gone, new = cursor
        cursor = true[:place] + new + true[place + gone :]
    query = {"project_id": project, "limit": 1000, "cursor": cursor}
    answer = http.get("/users", params=query)
    assert answer.status_code in (200, 422), answer.text
    if answer.status_code == 200:
        assert {user["project_id"] for user in answer.json()["items"]} <= {project}
    id = http.get("/users", params={"project_id": project}).json()["items"][0]["id"]
    answer = http.get(f"/users/{id}/history", params={"cursor": cursor})
    assert answer.status_code in (200, 422), answer.text


# -- requests over a connection of their own ---------------------------------------------------------------

word = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30)
latin = st.text(st.characters(min_codepoint=160, max_codepoint=255), max_size=10)
wild = st.text(st.characters(min_codepoint=0, max_codepoint=255), max_size=30)
framing = st.tuples(
    st.sampled_from(["Content-Length", "Transfer-Encoding", "Connection", "Upgrade", "Expect"]),
    st.sampled_from(
        ["", "0", "-1", "+5", "5, 5", "0x5", "1e3", "9" * 30, "chunked", "chunked, gzip", "100-continue", "websocket"]
    ),
)
names = st.sampled_from(
    [
        "Content-Type",
        "Idempotency-Key",
        "Host",
        "Origin",
        "traceparent",
        "Authorization",
        "Cookie",
        "Range",
        "If-None-Match",
        "If-Modified-Since",
        "Accept",
        "Content-Encoding",
        "X-Forwarded-For",
        "X-Request-Id",
        "X-HTTP-Method-Override",
    ]
)
media = st.tuples(
    st.just("Content-Type"), st.sampled_from([farm.words.JSON, farm.words.NDJSON, farm.words.CSV, "x;charset=x"])
)
key = st.tuples(st.just("Idempotency-Key"), st.uuids().map(str))
fields = st.lists(
    st.one_of(st.tuples(names, word | latin), media, media, key, framing, st.tuples(word | wild, wild)), max_size=3
)
methods = st.sampled_from(
    ["GET", "GET", "HEAD", "POST", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "NONSENSE"]
)
known_paths = st.sampled_from(
    [
        "/",
        "/locks",
        "/locks/sets",
        "/users",
        "/users/import",
        "/users/export",
        "/pools",
        "/livez",
        "/readyz",
        "/metrics",
        "/docs",
        "/docs/openapi.json",
        "/docs/assets/../../botfarm.py",
        "/docs/assets/%2e%2e/%2e%2e/__init__.py",
        f"/users/{PROJECT}",
        f"/users/{PROJECT}/lock",
        f"/users/{PROJECT}/history",
        f"/locks/{PROJECT}",
        "/users/%00",
        "/users/%ff",
        "*",
        "http://x/users",
        "",
    ]
)
quoted = st.text(max_size=20).map(lambda text: quote(text, safe=""))
paths = st.one_of(
    known_paths, known_paths, known_paths, known_paths, quoted.map("/users/{}".format), quoted.map("/{}".format), wild
)
query_names = st.sampled_from(
    ["project_id", "env", "domain", "state", "holder", "login", "label", "limit", "cursor", "force"]
)
queries = st.lists(
    st.tuples(query_names | word, st.one_of(quoted, quoted, quoted, quoted, word, wild)), max_size=3
).map(lambda pairs: "&".join(f"{name}={value}" for name, value in pairs))
bodies = st.binary(max_size=60) | st.sampled_from(
    [b"", b"{}", b'{"ttl": 5}', b"0\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n", b"ffffffffffffffff\r\n"]
)


@pytest.fixture
def hasty(monkeypatch):
    """Requests that never come to their end are given up at once."""
    monkeypatch.setattr(farm.server.Protocol, "LATE", 0.2)


@settings(relaxed, max_examples=examples(400))
@given(methods, paths, queries, fields, bodies, st.booleans())
@example("POST", "/locks", "", [("Content-Length", "5"), ("Transfer-Encoding", "chunked")], b"0\r\n\r\n", False)
@example("POST", "/locks", "", [("Content-Length", "5"), ("Content-Length", "6")], b"{}   ", False)
@example(
    "POST", "/locks", "", [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Content-Length", "2")], b"{}", False
)
@example("POST", "/locks", "", [("Content-Encoding", "gzip"), ("Content-Length", "2")], b"\x1f\x8b", False)
@example("GET", "/users", "&".join(["label=a:b"] * 101), [], b"", False)
@example("GET", "/users", "login=%00", [], b"", False)
@example("GET", "/users", "limit=" + "9" * 5000, [], b"", False)
@example("DELETE", "/locks", "holder=%ed%a0%80", [], b"", False)
@example("PUT", f"/users/{PROJECT}/lock", "", [("Idempotency-Key", "\x85"), ("Content-Length", "0")], b"", False)
def test_no_request_breaks_the_service(service, hasty, method, path, query, headers, body, is_honest):
    target = f"{path}?{query}" if query else path
    lines = [
        f"{method} {target} HTTP/1.1",
        "Host: x",
        "Connection: close",
        *(f"{name}: {value}" for name, value in headers),
    ]
    lines += [f"Content-Length: {len(body)}"] if is_honest else []
    answer = raw(service.url, "\r\n".join([*lines, "", ""]).encode("latin-1") + body)
    statuses = {int(status) for status in [answer[9:12]] if status}
    assert statuses <= {100, 200, 201, 204, 206, 304} | REFUSED, answer[:2000]
    assert b"Traceback" not in answer
