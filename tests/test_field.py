"""What people meet in the field: databases, processes, files and connections as they really are."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import socket
import threading
import time
import uuid
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import KEY, acquire, connect, make_users, raw, serving, settings, until

import farm.database
import farm.settings

# ---- The database as it is -----------------------------------------------------------------------------------

# ---- Processes -----------------------------------------------------------------------------------------------

# ---- Files ---------------------------------------------------------------------------------------------------

# ---- Connections ---------------------------------------------------------------------------------------------

JSON = b"Host: x\r\nContent-Type: application/json\r\n"


def half_closed(url, text):
    """A connection whose caller has sent all that it ever will."""
    connection = connect(url)
    connection.settimeout(10)
    connection.sendall(text)
    connection.shutdown(socket.SHUT_WR)
    return connection


def rest_of(connection):
    """All that comes until the other side closes."""
    with connection, connection.makefile("rb") as file:
        return file.read()


def replies_in(answer):
    """Status and body of each reply."""
    with io.BytesIO(answer) as stream:
        source: Any = SimpleNamespace(makefile=lambda _: stream)
        found = []
        while stream.tell() < len(answer):
            reply = http.client.HTTPResponse(source)
            reply.close = lambda: None  # the next one stands behind it
            reply.begin()
            found.append((reply.status, stream.read(reply.length)))
        return found


def acquiring(project, version="1.1", key=None, **values):
    body = json.dumps({"project_id": project} | values).encode()
    keyed = f"Idempotency-Key: {key}\r\n" if key else ""
    head = f"POST /locks HTTP/{version}\r\n{keyed}Content-Length: {len(body)}\r\n".encode()
    return head + JSON + b"\r\n" + body


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_caller_that_sends_no_more_is_answered(version, api, service, project):
    await make_users(api, project)
    page = f"GET /pools HTTP/{version}\r\nHost: x\r\n\r\n".encode()
    for text, statuses in ((acquiring(project, version), [201]), (page, [200]), (page * 3, [200] * 3)):
        statuses = statuses[:1] if version == "1.0" else statuses
        answer = await asyncio.to_thread(lambda text=text: rest_of(half_closed(service.url, text)))
        assert [status for status, _ in replies_in(answer)] == statuses
    assert answer.count(b"connection: close") == 1


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("seconds", [0, 0.2, 0.7])
async def test_a_caller_that_sends_no_more_and_waits_is_answered_in_its_turn(version, seconds, api, service, project):
    """Also where others stand behind it on its connection, and whatever was written to see if it is there."""
    (user,) = await make_users(api, project)
    lock = (await acquire(api, project)).json()
    behind = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" if version == "1.1" else b""
    connection = half_closed(service.url, acquiring(project, version, wait=20) + behind)
    await asyncio.to_thread(until, lambda: waiters(service, project), 5)
    await asyncio.sleep(seconds)
    await api.delete(f"/locks/{lock['id']}")
    (status, body), *others = replies_in(await asyncio.to_thread(rest_of, connection))
    assert (status, json.loads(body)["user"]["id"]) == (201, user["id"])
    assert others == ([(200, b'{"status":"ok"}')] if behind else [])
    assert (await api.get(f"/users/{user['id']}")).json()["state"] == "locked"


async def test_a_caller_that_sends_no_more_and_waits_in_vain_is_told_so(api, service, project):
    await make_users(api, project)
    await acquire(api, project)
    answer = await asyncio.to_thread(lambda: rest_of(half_closed(service.url, acquiring(project, wait=1))))
    ((status, body),) = replies_in(answer)
    assert (status, json.loads(body)["type"]) == (409, "urn:botfarm:pool-exhausted")


def waiters(service, project):
    return [ask for ask in service.farm.desk.queue if str(ask.wishes[0].project_id) == project]


@pytest.mark.parametrize("how", ["at once", "in two steps", "after a while"])
async def test_a_waiter_that_is_gone_is_given_nobody_however_it_went(how, api, service, project):
    (user,) = await make_users(api, project)
    lock = (await acquire(api, project)).json()
    with connect(service.url) as connection:
        connection.sendall(acquiring(project, wait=20))
        await asyncio.to_thread(until, lambda: waiters(service, project), 5)
        if how != "at once":
            connection.shutdown(socket.SHUT_WR)
            await asyncio.sleep(0.3 if how == "after a while" else 0)
    if how == "after a while":  # it was there, and is asked again only with the grant
        await api.delete(f"/locks/{lock['id']}")
    else:
        await asyncio.to_thread(until, lambda: not waiters(service, project), 1.5)
        await api.delete(f"/locks/{lock['id']}")
        fences = [item["fence"] for item in (await api.get(f"/users/{user['id']}/history")).json()["items"]]
        assert fences == [1]
    end = time.monotonic() + 1.5
    while (await api.get(f"/users/{user['id']}")).json()["state"] != "free" or waiters(service, project):
        assert time.monotonic() < end, "the user is lost"
        await asyncio.sleep(0.02)


async def test_a_caller_that_goes_before_its_reply_leaves_no_user_locked(api, service, project, monkeypatch):
    """Without a wait: its closing arrives while the statement runs. With a key the lock stays, for the repeat."""
    (user,) = await make_users(api, project)
    fetch, sent = service.farm.hot.fetch, threading.Event()

    async def slow(sql, *args, **options):
        if sql == farm.database.SQL["acquire_locks"]:
            sent.set()
            await asyncio.sleep(0.2)
        return await fetch(sql, *args, **options)

    monkeypatch.setattr(service.farm.hot, "fetch", slow)
    for key, ends in ((None, ["released"]), (uuid.uuid4(), [None, "released"])):
        sent.clear()
        with connect(service.url) as connection:
            connection.sendall(acquiring(project, key=key))
            assert await asyncio.to_thread(sent.wait, 5)
        end, history = time.monotonic() + 1.7, []
        while [item["ended_by"] for item in history] != ends:
            assert time.monotonic() < end, history
            await asyncio.sleep(0.02)
            history = (await api.get(f"/users/{user['id']}/history")).json()["items"]


BIG = b"Content-Length: 99999999\r\n"
NEXT = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /locks HTTP/1.1\r\n" + JSON + BIG, 413),
        (b"POST /users/import HTTP/1.1\r\nContent-Type: text/plain\r\nContent-Length: 9\r\n", 415),
        (b"POST /locks HTTP/1.1\r\nContent-Type: text/plain\r\nContent-Length: 9\r\n", 415),
        (b"POST /locks HTTP/1.1\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n", 415),
        (b"POST /nothing HTTP/1.1\r\n" + JSON + b"Content-Length: 9\r\n", 404),
        (b"POST /nothing HTTP/1.1\r\n" + JSON + b"Transfer-Encoding: chunked\r\n", 404),
        (b"PATCH /locks HTTP/1.1\r\n" + JSON + b"Content-Length: 9\r\n", 405),
        (b"POST /locks?a=b HTTP/1.1\r\n" + JSON + b"Content-Length: 9\r\n", 422),
        (b"HEAD /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n", 200),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n", 200),
    ],
    ids=lambda value: value.split()[0].decode() + str(value.split()[1]) if isinstance(value, bytes) else str(value),
)
@pytest.mark.parametrize("expects", [b"", b"Expect: 100-continue\r\n"], ids=["sends", "expects"])
async def test_a_reply_before_the_end_of_the_body_ends_the_connection(head, status, expects, service):
    """Whatever is sent next would be taken for that body. It is refused without "100 Continue", too."""
    begin = time.monotonic()
    answer = await asyncio.to_thread(raw, service.url, head + expects + b"\r\n", NEXT, pause=0.3)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"\r\nconnection: close\r\n" in answer
    assert time.monotonic() - begin < 5


async def test_with_authentication_it_does_too(empty_database):
    keys = farm.settings.Secret(KEY)
    with serving(settings(empty_database, auth="on", signing_keys=keys)) as guarded:
        head = b"POST /users/import HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n" + BIG + b"\r\n"
        answer = await asyncio.to_thread(raw, guarded.url, head)
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"\r\nconnection: close\r\n" in answer


@pytest.mark.parametrize("call", [b"/nothing", b"/locks", b"/users/import"])
async def test_a_caller_that_still_sends_when_it_is_refused_reads_why(call, service):
    """Its connection is not reset under it, though it sends much more than anybody has room for."""
    head = b"POST " + call + b" HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 33554432\r\n\r\n"

    def send():
        with connect(service.url) as connection:
            connection.settimeout(10)
            connection.sendall(head)
            for _ in range(32):
                connection.sendall(b" " * 1048576)
            return rest_of(connection)

    answer = await asyncio.to_thread(send)
    assert answer[9:12] in (b"404", b"415", b"413")
    assert b"\r\nconnection: close\r\n" in answer


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"Content-Length: 2\r\n\r\n{}", 422),
        (b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 422),
        (b"Content-Length: 1\r\n\r\n{", 400),
        (b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}", 422),
        (b"Expect: a miracle\r\nContent-Length: 2\r\n\r\n{}", 422),
    ],
)
@pytest.mark.parametrize("pause", [0, 0.1])
async def test_after_a_refused_body_the_connection_serves_on(body, status, pause, service):
    head, blank, sent = (b"POST /locks HTTP/1.1\r\n" + JSON + body).partition(b"\r\n\r\n")
    answer = await asyncio.to_thread(raw, service.url, head + blank, sent, NEXT, pause=pause)
    answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert [status for status, _ in replies_in(answer)] == [status, 200]


async def test_who_expects_to_be_asked_for_its_body_is_asked_and_only_over_http_1_1(service):
    head = b"POST /locks HTTP/1.1\r\n" + JSON + b"Connection: close\r\n"
    head += b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    with connect(service.url) as connection:
        connection.settimeout(10)
        connection.sendall(head)
        assert await asyncio.to_thread(connection.recv, 99) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"{}")
        assert (await asyncio.to_thread(rest_of, connection)).startswith(b"HTTP/1.1 422 ")
    answer = await asyncio.to_thread(raw, service.url, head.replace(b"HTTP/1.1", b"HTTP/1.0") + b"{}")
    assert answer.startswith(b"HTTP/1.1 422 ")


# ---- Small things --------------------------------------------------------------------------------------------
