"""Input that means harm: whatever is sent, the service answers as its OpenAPI document says, and goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import resource
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncpg
import httpx
import pytest
from conftest import (
    KEY,
    ROOT,
    blocked,
    client,
    command,
    connect,
    execute,
    free_port,
    make_users,
    process,
    raw,
    serving,
    settings,
    slug,
    until,
    wait_ready,
)

import farm.calls
import farm.clients
import farm.codes
import farm.imports
import farm.problems
import farm.server
import farm.settings

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
EXAMPLE = "11111111-1111-4111-8111-111111111111"  # the project of tests/schemathesis.toml


MANY = "sends thousands of requests: with --long"


def schemathesis(folder: Path, url: str, examples: int, *options: str) -> int:
    """Run all checks over the whole document; the number of requests that were made."""
    config = ["--no-color", "--config-file", str(ROOT / "tests" / "schemathesis.toml")]
    run = ["run", f"{url}/docs/openapi.json", "--generation-database", "none", "--max-examples", str(examples)]
    done = subprocess.run(
        [str(SCHEMATHESIS), *config, *run, *options], capture_output=True, text=True, timeout=600, cwd=folder
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) generated, \1 passed", done.stdout)
    assert found, done.stdout[-2000:]
    return int(found[1])


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits half a minute for the next one-time code."""

    async def pause(seconds: float, stopping: asyncio.Event) -> None:
        raise farm.problems.CodeSpent(headers={"Retry-After": str(math.ceil(seconds))})

    monkeypatch.setattr(farm.codes, "_pause", pause)


@pytest.mark.usefixtures("hurried")
async def test_every_reply_is_as_the_openapi_document_says(empty_database, long, tmp_path, caplog):
    """schemathesis, with all its checks and thousands of random requests."""
    if not long:
        pytest.skip(MANY)
    with serving(settings(empty_database, max_wait=1)) as alone:
        async with client(alone.url) as api:
            await make_users(api, EXAMPLE, 50)
        assert schemathesis(tmp_path, alone.url, 160, "--seed", "2") > 2500
        assert httpx.get(f"{alone.url}/livez").status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.usefixtures("hurried")
async def test_so_it_is_with_authentication(empty_database, long, tmp_path, caplog):
    """And no call that wants a token does without one, which is one of the checks."""
    if not long:
        pytest.skip(MANY)
    signing = farm.settings.Secret(KEY.replace("k1", "s1"))
    with serving(settings(empty_database, max_wait=1, auth="on", signing_keys=signing)) as alone:
        made = command("client", "add", "hostile", "--scope", "admin", env={"DATABASE_URL": empty_database})
        who = json.loads(made.stdout)
        async with client(alone.url) as api:
            form = {"grant_type": "client_credentials"}
            answer = await api.post("/token", data=form, auth=(who["client_id"], who["client_secret"]))
            token = f"Authorization: Bearer {answer.json()['access_token']}"
            api.headers["Authorization"] = token.partition(": ")[2]
            await make_users(api, EXAMPLE, 50)
        assert schemathesis(tmp_path, alone.url, 60, "--seed", "3", "-H", token) > 800
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("path", ["/", "/livez", "/users", "/users/export", "/pools", "/docs", "/docs/openapi.json"])
async def test_head_is_get_without_the_body(api, path):
    whole, head = await api.get(path), await api.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert head.headers.get("content-length") == whole.headers.get("content-length")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/users", "GET, HEAD, OPTIONS, POST"),
        ("/users/", "GET, HEAD, OPTIONS, POST"),
        ("/users?limit=1&label=a:b", "GET, HEAD, OPTIONS, POST"),
        (f"/users/{EXAMPLE}", "DELETE, GET, HEAD, OPTIONS, PATCH"),
        (f"/users/{EXAMPLE}/lock", "DELETE, OPTIONS, PUT"),
        ("/", "GET, HEAD, OPTIONS"),
    ],
)
async def test_options_and_405_name_all_methods_of_a_path(api, path, allowed):
    asked = await api.options(path)
    assert (asked.status_code, asked.headers["allow"]) == (204, allowed)
    assert (await api.request("PROPFIND", path)).headers["allow"] == allowed


@pytest.mark.parametrize("path", ["//", "//users", "//livez/", "///"])
def test_a_path_that_begins_with_two_slashes_is_no_page(service, path):
    assert raw(service.url, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())[9:12] == b"404"


async def test_a_whole_number_may_be_written_with_a_point(api, project):
    await make_users(api, project)
    lock = await api.post("/locks", content=f'{{"project_id": "{project}", "ttl": 60.0}}')
    assert (lock.status_code, lock.json()["ttl"]) == (201, 60)
    refused = await api.patch(f"/locks/{lock.json()['id']}", content='{"ttl": 60.5}')
    assert refused.json()["detail"] == "ttl: 60.5 is not allowed: Expected `int | null`, got `float`"
    for number in ("1e308", "-1.0", "1e999", "NaN", '"60"', "true"):
        assert (await api.patch(f"/locks/{lock.json()['id']}", content=f'{{"ttl": {number}}}')).status_code in (
            400,
            422,
        )


JSON = b"POST /locks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture
def hasty(monkeypatch):
    """Senders that are late are so after a moment."""
    monkeypatch.setattr(farm.server.Protocol, "LATE", 0.25)


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [b"GET /livez HTTP/1.1\r\n"],
        [b"GET /livez HTTP/1.1\r\nHost: x\r\n"] + [b"X-Slow: 1\r\n"] * 100,
        [b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /li"],
        [JSON + b"Content-Length: 100\r\n\r\n"],
        [JSON + b"Content-Length: 100\r\n\r\n"] + [b" "] * 99,
        [JSON + b"Transfer-Encoding: chunked\r\n\r\n"] + [b"1\r\n \r\n"] * 100,
        [JSON.replace(b"application/json", b"text/csv").replace(b"/locks", b"/users/import")]
        + [b"Transfer-Encoding: chunked\r\n\r\n"] + [b"1\r\na\r\n"] * 100,
        [JSON.replace(b"POST", b"PATCH") + b"Content-Length: 100\r\n\r\n"] + [b" "] * 99,
    ],
    ids=["silence", "request line", "slow head", "second head", "no body", "slow body", "slow chunks", "import", "405"],
)  # fmt: skip
def test_half_a_request_is_given_up(service, hasty, parts):
    begin = time.monotonic()
    answer = raw(service.url, *parts, pause=0.05, seconds=20)
    assert time.monotonic() - begin < 4  # the slow ones would take five seconds
    assert answer[9:12] in (b"", b"200", b"405")


def test_a_head_has_its_time_and_not_twice_as_long(service, monkeypatch):
    monkeypatch.setattr(farm.server.Protocol, "LATE", 2)
    begin = time.monotonic()
    assert raw(service.url, b"GET /livez HTTP/1.1\r\nHost", seconds=20) == b""
    assert time.monotonic() - begin < 3.9


@pytest.mark.parametrize(
    ("head", "limit"),
    [
        (JSON, "BOTFARM_MAX_BODY, 1048576 bytes"),
        (
            JSON.replace(b"json", b"x-ndjson").replace(b"/locks", b"/users/import"),
            "BOTFARM_MAX_IMPORT, 1073741824 bytes",
        ),
    ],
)
def test_a_body_that_is_announced_as_too_long_is_refused_unseen(service, monkeypatch, head, limit):
    monkeypatch.setattr(service.server.config, "timeout_keep_alive", 0.2)
    answer = raw(service.url, head + b"Expect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n").decode()
    assert answer.startswith("HTTP/1.1 413")
    assert limit in answer


def test_a_body_that_does_not_end_before_the_service_is_told_so(empty_database):
    """Twice: the service waits for it, as for all that runs, though here for no eight seconds."""
    port = free_port()
    env = {"DATABASE_URL": empty_database, "BOTFARM_KEYS": KEY}
    with process("--port", str(port), env=env, changes={"farm.server.GRACE": 1}) as running:
        wait_ready(f"http://127.0.0.1:{port}")
        upload = JSON.replace(b"json", b"x-ndjson").replace(b"/locks", b"/users/import")
        parts = [JSON + b"Content-Length: 100\r\n\r\n{", upload + b"Content-Length: 100\r\n\r\n"]
        with ThreadPoolExecutor(2) as threads:
            answers = [threads.submit(raw, f"http://127.0.0.1:{port}", part, seconds=20) for part in parts]
            time.sleep(0.3)
            running.terminate()
            for answer in answers:
                assert answer.result().startswith(b"HTTP/1.1 503")
                assert b"urn:botfarm:shutting-down" in answer.result()
        assert running.wait(10) == 0


async def test_an_import_that_does_not_end_before_the_service_is_told_so(empty_database, project):
    url = f"http://127.0.0.1:{(port := free_port())}"
    env = {"DATABASE_URL": empty_database, "BOTFARM_KEYS": KEY}
    with process("--port", str(port), env=env, changes={"farm.server.GRACE": 1}) as running:
        wait_ready(url)
        connection = await asyncpg.connect(empty_database)
        async with client(url) as http, connection.transaction():
            await connection.execute("lock table users in exclusive mode")
            user = {"login": "ada", "password": "p", "project_id": project, "env": "stage"}
            headers = {"Content-Type": "application/x-ndjson"}
            answer = asyncio.create_task(http.post("/users/import", content=json.dumps(user), headers=headers))
            await blocked(empty_database)
            running.terminate()
            assert slug(await answer) == "shutting-down"
        await connection.close()
        assert await asyncio.to_thread(running.wait, 10) == 0
    assert await execute(empty_database, "select from users") == []


def test_a_body_that_takes_long_is_given_up(service, monkeypatch):
    monkeypatch.setattr(farm.calls.Call, "PAUSE", 0.4)
    answer = raw(service.url, JSON + b"Content-Length: 100\r\n\r\n", *[b" "] * 20, pause=0.1)
    assert answer[9:12] == b"400"
    assert b"did not come to its end within 0.4 seconds" in answer
    assert b"connection: close" in answer


async def test_an_import_that_drips_is_given_up(service, api, project, monkeypatch):
    monkeypatch.setattr(farm.calls.Call, "PAUSE", 0.4)
    head = b"POST /users/import HTTP/1.1\r\nContent-Type: application/x-ndjson\r\nContent-Length: 9999\r\n\r\n"
    line = f'{{"login": "a", "password": "p", "project_id": "{project}", "env": "stage"}}\n'.encode()
    answer = await asyncio.to_thread(raw, service.url, head, line, *[b"\n"] * 30, pause=0.1)
    assert b"nothing was stored" in answer
    assert (await api.get("/users", params={"project_id": project})).json()["items"] == []


@pytest.mark.parametrize(
    "parts",
    [
        [b"GET /" + b"x" * 65536] * 16,
        [b"GET /livez HTTP/1.1\r\nX: "] + [b"x" * 65536] * 16,
        [b"GET /livez HTTP/1.1\r\n"] + [b"X: y\r\n" * 8192] * 16,
        [JSON + b"Transfer-Encoding: chunked\r\n\r\n0\r\n"] + [b"X: y\r\n" * 8192] * 16,
        [JSON + b"Transfer-Encoding: chunked\r\n\r\n1;"] + [b"x" * 65536] * 16,
    ],
    ids=["url", "header", "headers", "trailers", "chunk extension"],
)
def test_a_head_without_end_is_refused(service, parts):
    assert raw(service.url, *parts, pause=0.01)[9:12] in (b"431", b"")  # b"": reset, because more was on its way


def test_a_long_head_is_fine_and_a_longer_one_is_told(service):
    long = [b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX: ", b"x" * 30_000, b"x" * 30_000, b"\r\n\r\n"]
    assert raw(service.url, *long, pause=0.05)[9:12] == b"200"
    answer = raw(service.url, *long[:3], b"x" * 10_000, pause=0.05)
    assert answer[9:12] == b"431"
    assert b"urn:botfarm:head-too-large" in answer


def test_a_large_body_in_large_pieces_is_read_whole(service):
    head = JSON + b"Content-Length: 1048576\r\nConnection: close\r\n\r\n"
    answer = raw(service.url, head, *[b" " * 262144] * 4)
    assert b"urn:botfarm:malformed-body" in answer


def test_a_reply_that_nobody_reads_is_given_up(service, hasty, caplog):
    page = b"GET /docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
    whole = len(raw(service.url, page.replace(b"Host: x", b"Connection: close")))
    known = set(service.server.server_state.connections)
    with connect(service.url) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(page * 20)
        until(lambda: service.server.server_state.connections - known, 5)
        until(lambda: not service.server.server_state.connections - known, 5)
        read = 0
        while part := connection.recv(1 << 20):
            read += len(part)
    assert read < 20 * whole
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


PAGE = b"GET /docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nConnection: close\r\n\r\n"


@contextlib.contextmanager
def narrow(service, size=16384):
    """A connection of which the system keeps but so many bytes on either side, and the service's end of it."""
    host, _, port = service.url.removeprefix("http://").partition(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        known = set(service.server.server_state.connections)
        connection.connect((host, int(port)))
        until(lambda: service.server.server_state.connections - known, 5)
        (other,) = service.server.server_state.connections - known
        with socket.socket(fileno=os.dup(other.transport.get_extra_info("socket").fileno())) as theirs:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        yield connection, other


def test_a_reply_that_is_read_slowly_goes_on(service, hasty):
    """At a pace that takes several times as long as nobody may read."""
    whole = len(raw(service.url, PAGE))
    read, begin = 0, time.monotonic()
    with narrow(service) as (connection, _):
        connection.sendall(PAGE)
        while part := connection.recv(32768):
            read += len(part)
            time.sleep(0.02)
    assert read == whole
    assert time.monotonic() - begin > 3 * farm.server.Protocol.LATE


async def test_the_end_of_a_reply_has_to_be_read_too(service, api, project, monkeypatch):
    """A part that is small enough to pause nobody, after a larger one that was read."""
    monkeypatch.setattr(farm.server.Protocol, "LATE", 1.5)  # what reads the larger one may pause on a busy machine
    user = {"password": "p", "project_id": project, "env": "stage"}
    lines = "\n".join(json.dumps(user | {"login": f"bot-{number}"}) for number in range(690))
    answer = await api.post("/users/import", content=lines, headers={"Content-Type": "application/x-ndjson"})
    assert answer.json()["created"] == 690
    with narrow(service, 4096) as (connection, other):
        connection.sendall(f"GET /users/export?project_id={project} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
        read = b""
        while read.count(b'"login"') < farm.imports.PAGE:
            part = connection.recv(2048)
            assert part
            read += part
        until(lambda: other.cycle.response_complete, 5)
        assert 0 < other.transport.get_write_buffer_size() < 65536
        until(lambda: other not in service.server.server_state.connections, 10)


def test_a_connection_is_not_kept_by_empty_lines(service, hasty):
    begin = time.monotonic()
    answer = raw(service.url, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n", pause=0.2, seconds=20)
    assert answer[9:12] == b"200"
    assert time.monotonic() - begin < 5


async def test_what_callers_send_fills_no_log(service, api, caplog):
    upgrade = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": ""}
    assert (await api.get("/livez", headers=upgrade)).status_code == 200
    await asyncio.to_thread(raw, service.url, b"nonsense\r\n\r\n")
    assert caplog.records == []


def test_what_is_no_http_is_a_problem_too(service):
    for nonsense in (b"\x16\x03\x01", b"GET\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n", b"GET http://[ HTTP/1.1\r\n\r\n"):
        answer = raw(service.url, nonsense)
        assert answer[9:12] == b"400"
        assert b"urn:botfarm:malformed-body" in answer


async def test_thousands_of_idle_and_slow_callers_stop_nobody(service, api, project):
    """2,000 connections that are silent, and 300 each that send half a head, half a body and half an import."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    await make_users(api, project)
    upload = JSON.replace(b"application/json", b"text/csv").replace(b"/locks", b"/users/import")
    begun = [b"GET /livez HTTP/1.1\r\n", JSON + b"Content-Length: 9\r\n\r\n{", upload + b"Content-Length: 9\r\n\r\na"]
    with contextlib.ExitStack() as stack:
        for part in [b""] * 2000 + begun * 300:
            stack.enter_context(connect(service.url)).sendall(part)
        for _ in range(20):
            begin = time.monotonic()
            lock = await api.post("/locks", json={"project_id": project})
            assert (await api.delete(f"/locks/{lock.json()['id']}")).status_code == 204
            assert time.monotonic() - begin < 10


# -- pages and other origins ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_pages_run_only_scripts_of_their_own_origin(api, path):
    page = await api.get(path)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    assert page.headers["referrer-policy"] == "no-referrer"
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|javascript:", page.text)
    assert "unsafe" not in policy or path == "/docs"
    for source in set(re.findall(r'(?:src|href)="([^"]*)"', page.text)) - {"data:,", "#users"}:
        assert source.startswith("/")
        assert (await api.get(source)).status_code == 200


async def test_no_reply_is_read_as_another_type_and_no_password_is_kept_by_a_cache(api, project):
    await make_users(api, project, 2)
    wish = {"project_id": project}
    alone, together = await api.post("/locks", json=wish), await api.post("/locks/sets", json={"users": [wish]})
    assert {r.headers["cache-control"] for r in (alone, together)} == {"no-store"}
    others = [await api.get(path) for path in ("/", "/docs", "/docs/start.js", "/livez", "/users", "/nowhere")]
    refused, none = await api.put("/users"), await api.delete(f"/locks/{alone.json()['id']}")
    for reply in [alone, together, *others, refused, none]:
        assert reply.headers["x-content-type-options"] == "nosniff"


FOREIGN = {"Origin": "https://grid.example", "Access-Control-Request-Method": "POST"}


async def test_pages_of_other_origins_may_call_only_where_that_is_set(api, empty_database):
    for answer in (await api.options("/locks", headers=FOREIGN), await api.get("/livez", headers=FOREIGN)):
        assert not [name for name in answer.headers if name.startswith("access-control")]
    with serving(settings(empty_database, cors_origins=("https://grid.example",))) as alone:
        async with client(alone.url) as opened:
            preflight = await opened.options("/locks", headers=FOREIGN)
            assert preflight.headers["access-control-allow-origin"] == "https://grid.example"
            assert "access-control-allow-credentials" not in preflight.headers
            asked = FOREIGN | {
                "Access-Control-Request-Method": "GET",
                "Access-Control-Request-Headers": "if-none-match",
            }
            assert (await opened.options("/overview", headers=asked)).status_code == 204
            tagged = await opened.get("/overview", headers=FOREIGN)
            assert {"ETag", "Location"} <= set(tagged.headers["access-control-expose-headers"].split(", "))
            for path in ("/livez", "/nowhere", "/users?x=1"):  # a page may read a refusal too
                answer = await opened.get(path, headers=FOREIGN)
                assert answer.headers["access-control-allow-origin"] == "https://grid.example"
            other = await opened.get("/livez", headers={"Origin": "https://other.example"})
            assert "access-control-allow-origin" not in other.headers


async def test_a_page_of_another_origin_changes_nothing_unasked(api, project):
    """What a browser sends without asking first: a GET, or a POST of a text, of a form, or of no type at all."""
    body = json.dumps({"login": "a", "password": "p", "project_id": project, "env": "stage"})
    for kind in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        answer = await api.post("/users", content=body, headers={"Origin": "https://evil.example"} | kind)
        assert answer.status_code == 415
    assert (await api.post("/users", content=body)).status_code == 201  # no browser


@pytest.mark.parametrize("origins", ["grid.example", "https://a,ftp://b", "https://a/path", "https://a b"])
def test_an_origin_that_is_none_is_refused_at_the_start(origins):
    with pytest.raises(farm.settings.BadSettings, match="BOTFARM_CORS_ORIGINS"):
        farm.settings.Settings.load({"BOTFARM_CORS_ORIGINS": origins})


# -- odd JSON -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "deep",
    ["[" * 100_000, '{"x":' * 100_000, '{"labels":' + "[" * 100_000, '{"x":' + "[" * 99_999 + "]" * 99_999 + "}"],
)
async def test_json_that_is_nested_deep_is_malformed(api, deep):
    refused = await api.post("/locks", content=deep)
    assert slug(refused) == "malformed-body"
    assert len(refused.content) < 1000


@pytest.mark.parametrize(
    ("ttl", "status"),
    [
        ("1" + "0" * 5000, 422),
        ("-1", 422),
        ("1e400", 422),
        ("NaN", 400),
        ("Infinity", 400),
        ('60, "ttl": 61', 201),
        ("0x10", 400),
    ],
)
async def test_odd_numbers_and_double_keys_are_answered(api, project, ttl, status):
    """Of a key that is there twice the last one counts, as nearly everywhere."""
    await make_users(api, project)
    answer = await api.post("/locks", content=f'{{"project_id": "{project}", "ttl": {ttl}}}')
    assert answer.status_code == status, answer.text
    if status == 201:
        assert answer.json()["ttl"] == 61


@pytest.mark.parametrize("part", ["{}", f'{{"project_id": "{EXAMPLE}"}}'])
async def test_a_set_of_150_times_as_many_parts_as_it_may_have_holds_up_nobody(api, part):
    """1 MiB of parts that are none would have taken minutes, in which nobody was answered."""
    begin = time.monotonic()
    answer = await api.post("/locks/sets", content=f'{{"users": [{", ".join([part] * 15_000)}]}}')
    assert slug(answer) == "invalid"
    assert len(answer.json()["errors"]) <= 100
    assert time.monotonic() - begin < 10


def test_the_limits_of_the_security_table_are_those_of_the_program():
    text = " ".join((ROOT / "docs/security.md").read_text().split())
    late, pause, pace = farm.server.Protocol.LATE, farm.calls.Call.PAUSE, farm.calls.Call.SLOWEST // 1024
    bodies = f"{pause} s for a body, {pace} KiB/s for one that takes longer"
    assert f"{late} s for a head, {bodies}, {late} s for a reply that is not read" in text
    lines, heads = farm.imports.LONGEST_LINE // 1024, farm.server.Protocol.HEAD // 1024
    assert f"import lines of {lines} KiB, heads of {heads} KiB (431 `{farm.problems.HeadTooLarge.slug}`)" in text
    assert f"its end after {farm.clients.Gate.LIFE // 60} minutes" in text
