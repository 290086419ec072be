"""Waiting: who gets the user that comes free, sets of users, callers that go away, and several replicas."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import select
import socket
import statistics
import struct
import time
import uuid
from datetime import datetime
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
from conftest import acquire, blocked, client, execute, make_users, pass_time, serving, settings, slug, until
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import farm.database
import farm.locks
import farm.settings
import farm.telemetry
import farm.waiting
import farm.words


@pytest.fixture(scope="module")
def replica(database):
    """A second replica on the same database."""
    with serving(settings(database)) as running:
        yield running


@pytest.fixture
async def other(replica):
    async with client(replica.url) as opened:
        yield opened


@pytest.fixture
def brisk(monkeypatch):
    """Desks that look and tell each other five times as often: for tests of an order, not of the seconds."""
    for name in ("POLL", "EXCHANGE", "HEAD_START", "PATIENCE"):
        monkeypatch.setattr(farm.waiting, name, getattr(farm.waiting, name) / 5)


async def queued(service, count=1):
    """Until so many calls wait at a replica."""
    for _ in range(1000):
        if len([ask for ask in list(service.farm.desk.queue) if ask.wait]) >= count:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("nobody waits")


def waiting(api, project, **values):
    return asyncio.create_task(acquire(api, project, **({"wait": 20} | values)))


async def set_of(api, *parts, headers=None, **values):
    return await api.post("/locks/sets", json={"users": list(parts)} | values, headers=headers or {})


async def test_a_waiter_gets_the_user_that_is_released_and_its_ttl_begins_then(api, service, project):
    await make_users(api, project)
    held = (await acquire(api, project)).json()
    waiter = waiting(api, project, ttl=77, holder="second")
    await queued(service)
    await asyncio.sleep(0.3)
    assert (await api.delete(f"/locks/{held['id']}")).status_code == 204
    answer = await waiter
    assert answer.status_code == 201
    lock = answer.json()
    assert (lock["holder"], lock["ttl"], lock["fence"], lock["user"]["password"]) == ("second", 77, 2, "pw-0")
    taken, ends = (datetime.fromisoformat(lock[name]) for name in ("acquired_at", "expires_at"))
    assert (ends - taken).total_seconds() == 77
    history = (await api.get(f"/users/{lock['user']['id']}/history")).json()["items"]
    assert history[0]["acquired_at"] >= history[1]["ended_at"]


@pytest.mark.parametrize(
    "freeing", ["force", "holder", "expiry", "quarantine", "cooldown", "import", "create", "labels"]
)
async def test_a_waiter_wakes_because_of(freeing, api, service, database, project):
    (user,) = await make_users(api, project, labels={"role": "x"})
    path = f"/users/{user['id']}"
    held = (await acquire(api, project, ttl=60, holder="first")).json()
    if freeing == "quarantine":
        await api.delete(f"/locks/{held['id']}", params={"quarantine": "broken"})
    if freeing == "cooldown":
        await api.delete(f"/locks/{held['id']}", params={"cooldown": 60})
    waiter = waiting(api, project, labels={"role": "y"} if freeing == "labels" else {})
    if freeing != "labels":
        await queued(service)
    match freeing:
        case "force":
            await api.delete(f"{path}/lock")
        case "holder":
            await api.delete("/locks", params={"holder": "first"})
        case "quarantine":
            await api.delete(f"{path}/quarantine")
        case "expiry" | "cooldown":
            await pass_time(database, user["id"], 60)
        case "create":
            await make_users(api, project, login="another")
        case "import":
            line = {"login": "imported", "password": "p", "project_id": project, "env": "stage"}
            headers = {"Content-Type": "application/x-ndjson"}
            assert (await api.post("/users/import", content=json.dumps(line), headers=headers)).status_code == 200
        case "labels":
            assert slug(await waiter) == "no-matching-user"  # nobody has that label yet: waiting would not help
            await make_users(api, project, login="y", labels={"role": "y"})
            assert (await acquire(api, project, labels={"role": "y"})).status_code == 201
            waiter = waiting(api, project, labels={"role": "y"})
            await queued(service)
            await api.patch(path, json={"labels": {"role": "y"}})
            await api.delete(f"/locks/{held['id']}")
    assert (await waiter).status_code == 201


async def test_who_came_first_is_served_first(api, service, project):
    await make_users(api, project)
    lock = (await acquire(api, project)).json()
    order = []

    async def come(number):
        answer = await acquire(api, project, wait=20, holder=str(number))
        order.append(number)
        await api.delete(f"/locks/{answer.json()['id']}")

    comers = []
    for number in range(12):
        comers.append(asyncio.create_task(come(number)))
        await queued(service, number + 1)
    await api.delete(f"/locks/{lock['id']}")
    await asyncio.gather(*comers)
    assert order == list(range(12))


async def test_one_that_does_not_wait_never_overtakes_those_who_do(api, service, project, monkeypatch, long):
    """Two wait for one user by turns, so that somebody waits whenever it is released."""
    await make_users(api, project)
    held = (await acquire(api, project)).json()
    over, overtakes = asyncio.Event(), watched_overtakes(service.farm, monkeypatch)
    answers = []

    async def hasty():
        while not over.is_set():
            answers.append(await acquire(api, project, holder="hasty"))
            if answers[-1].status_code == 201:  # it came before those who wait now
                await api.delete(f"/locks/{answers[-1].json()['id']}")

    def refused():
        return [answer for answer in answers if answer.status_code == 409]

    waiter = waiting(api, project)
    await queued(service)
    crowd = [asyncio.create_task(hasty()) for _ in range(10)]
    rounds = itertools.count(1)
    while next(rounds) <= (40 if long else 12) or len(refused()) <= 40:
        successor = waiting(api, project)
        await queued(service, 2)
        assert (await api.delete(f"/locks/{held['id']}")).status_code == 204
        held, waiter = (await waiter).json(), successor
    over.set()
    await asyncio.gather(*crowd)
    assert overtakes == []
    assert len(refused()) > 40
    await api.delete(f"/locks/{held['id']}")
    assert (await waiter).status_code == 201


def watched_overtakes(farm, monkeypatch):
    """The calls without time to wait that were served, or began to be, before one that waited already."""
    overtakes = []
    claim, answer = farm.locks._acquire_locks, farm.desk._answer

    def watch(ask):
        if not ask.wait and any(other.wait and other.arrived < ask.arrived for other in farm.desk.queue):
            overtakes.append(ask)

    def watched_claim(asks):
        for ask in asks:
            watch(ask)
        return claim(asks)

    def watched_answer(ask, rows):
        if rows:
            watch(ask)
        answer(ask, rows)

    monkeypatch.setattr(farm.locks, "_acquire_locks", watched_claim)
    monkeypatch.setattr(farm.desk, "_answer", watched_answer)
    return overtakes


async def test_a_waiter_that_nothing_fits_never_blocks_those_behind_it(api, service, project):
    await make_users(api, project, 1, labels={"role": "admin"})
    await make_users(api, project, 1, login="plain")
    locks = [(await acquire(api, project)).json() for _ in range(2)]
    admin = waiting(api, project, labels={"role": "admin"})
    await queued(service, 1)
    anybody = waiting(api, project)
    await queued(service, 2)
    plain = next(lock for lock in locks if lock["user"]["login"] == "plain")
    await api.delete(f"/locks/{plain['id']}")
    assert (await anybody).json()["user"]["login"] == "plain"
    assert not admin.done()
    await api.delete(f"/locks/{(await anybody).json()['id']}")
    await api.delete(f"/locks/{next(lock for lock in locks if lock is not plain)['id']}")
    assert (await admin).json()["user"]["labels"] == {"role": "admin"}


async def test_one_waits_for_this_very_user(api, service, project):
    first, second = await make_users(api, project, 2)
    held = (await api.put(f"/users/{first['id']}/lock")).json()
    waiter = asyncio.create_task(api.put(f"/users/{first['id']}/lock", json={"wait": 20}))
    await queued(service)
    pools = (await api.get("/pools", params={"project_id": project})).json()["items"]
    assert [pool["waiting"] for pool in pools] == [1]
    assert (await acquire(api, project)).json()["user"]["id"] == second["id"]  # somebody else is none of its business
    await api.delete(f"/locks/{held['id']}")
    assert (await waiter).json()["user"]["id"] == first["id"]


async def test_who_waits_for_a_user_that_is_deleted_is_told_so(brisk, api, other, service, project):
    (user,) = await make_users(api, project)
    path = f"/users/{user['id']}"
    await api.put(f"{path}/lock")
    waiter = asyncio.create_task(api.put(f"{path}/lock", json={"wait": 20}))
    await queued(service)
    await asyncio.sleep(0.3)  # it was there when the wait began
    assert (await other.delete(path, params={"force": True})).status_code == 204
    assert slug(await asyncio.wait_for(waiter, 5)) == "user-not-found"


async def test_a_wait_that_has_run_out_is_refused_and_takes_nobody(api, service, project):
    await make_users(api, project)
    lock = (await acquire(api, project)).json()
    began = time.monotonic()
    waiters = [waiting(api, project, wait=1) for _ in range(3)]
    await queued(service, 3)
    refused = await acquire(api, project)
    assert refused.json()["waiting"] == 3
    answers = await asyncio.gather(*waiters)
    assert 0.9 < time.monotonic() - began < 5
    assert {slug(answer) for answer in answers} == {"pool-exhausted"}
    assert {answer.headers["retry-after"] for answer in answers} == {"1"}
    await api.delete(f"/locks/{lock['id']}")
    await asyncio.sleep(0.3)
    assert (await api.get(f"/users/{lock['user']['id']}")).json()["state"] == "free"


async def test_waiting_for_what_does_not_exist_is_refused_at_once(api, project):
    await make_users(api, project)
    began = time.monotonic()
    assert slug(await acquire(api, str(uuid.uuid4()), wait=20)) == "no-matching-user"
    assert slug(await acquire(api, project, wait=20, labels={"x": "y"})) == "no-matching-user"
    assert slug(await api.put(f"/users/{uuid.uuid4()}/lock", json={"wait": 20})) == "user-not-found"
    part = {"project_id": project}
    assert slug(await set_of(api, part | {"count": 2}, wait=20)) == "no-matching-user"
    assert time.monotonic() - began < 10


def raw_waiter(url, project, key=None, then=b""):
    """A connection on which a waiting acquire was sent, and then something else."""
    body = json.dumps({"project_id": project, "wait": 20})
    extra = f"Idempotency-Key: {key}\r\n" if key else ""
    connection = socket.create_connection((urlsplit(url).hostname, urlsplit(url).port))
    head = f"POST /locks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    connection.sendall(f"{head}{extra}\r\n{body}".encode() + then)
    return connection


@pytest.mark.parametrize("is_set", [False, True])
async def test_a_user_that_is_made_while_its_waiter_is_told_that_there_is_none_is_its_own(
    api, service, project, monkeypatch, is_set
):
    """The count that ends the wait is older than the user. Before, the call was refused at once, its wait unspent."""
    counting = service.farm.locks.refusal._run

    async def slowly(asked):
        refusals = await counting(asked)
        if refusals[0].problem.status_code == 404:
            await make_users(api, project, 2)
        return refusals

    monkeypatch.setattr(service.farm.locks.refusal, "_run", slowly)
    here = {"project_id": project, "count": 2}
    wanted = {"users": [here], "wait": 5} if is_set else {"project_id": project, "wait": 5}
    answer = await api.post("/locks/sets" if is_set else "/locks", json=wanted)
    assert answer.status_code == 201, answer.text


async def test_a_waiter_that_went_away_is_never_given_a_user(api, service, project):
    await make_users(api, project)
    lock = (await acquire(api, project)).json()
    connections = [raw_waiter(service.url, project, key) for key in (None, uuid.uuid4(), None)]
    connections.append(raw_waiter(service.url, project, then=b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"))
    await queued(service, 4)
    for connection in connections:
        connection.close()
    until(lambda: not service.farm.desk.queue, 5)
    await api.delete(f"/locks/{lock['id']}")
    await asyncio.sleep(0.4)
    user = (await api.get(f"/users/{lock['user']['id']}/history")).json()["items"]
    assert [item["fence"] for item in user] == [1]


async def test_a_user_granted_to_one_that_goes_away_in_that_moment_is_its_own_or_comes_back_at_once(
    api, service, project, long
):
    """It is the caller's if the reply was written before the service learned of the closing."""
    (user,) = await make_users(api, project)
    for round in range(60 if long else 20):
        lock = (await acquire(api, project, wait=5)).json()
        connection = raw_waiter(service.url, project)
        await queued(service)
        release = asyncio.create_task(api.delete(f"/locks/{lock['id']}"))
        await asyncio.sleep(round % 20 * 0.0003)
        connection.shutdown(socket.SHUT_WR)  # for the service it is closed, but here a reply can still be read
        answer = await asyncio.to_thread(rest_of, connection)
        await release
        if answer:
            granted = json.loads(answer.partition(b"\r\n\r\n")[2])
            assert (await api.delete(f"/locks/{granted['id']}")).status_code == 204
        end = time.monotonic() + 1.5
        while (await api.get(f"/users/{user['id']}")).json()["state"] != "free":
            assert time.monotonic() < end, f"round {round}: the user is lost"
            await asyncio.sleep(0.02)


def rest_of(connection):
    """All that comes until the other side closes."""
    with connection, connection.makefile("rb") as file:
        connection.settimeout(10)
        return file.read()


async def test_once_the_reply_is_written_no_end_of_the_connection_ends_the_lock(api, service, project):
    """A proxy may reset a connection whose reply it has handed on."""
    (user,) = await make_users(api, project)
    lock = (await acquire(api, project)).json()
    connection = raw_waiter(service.url, project)
    await queued(service)
    (waiting,) = (c for c in service.server.server_state.connections if c.client == connection.getsockname())
    await api.delete(f"/locks/{lock['id']}")
    assert select.select([connection], [], [], 5)[0]
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    until(lambda: waiting not in service.server.server_state.connections, 5)
    await asyncio.sleep(0.4)
    assert (await api.get(f"/users/{user['id']}")).json()["state"] == "locked"


async def test_a_key_finds_the_lock_that_was_granted_while_its_caller_went_away(api, service, project, long):
    await make_users(api, project)
    for round in range(20 if long else 10):
        lock = (await acquire(api, project, wait=5)).json()
        key = uuid.uuid4()
        connection = raw_waiter(service.url, project, key)
        await queued(service)
        release = asyncio.create_task(api.delete(f"/locks/{lock['id']}"))
        await asyncio.sleep(round % 10 * 0.0004)
        connection.close()
        await release
        again = await acquire(api, project, key=key, wait=5)
        assert again.status_code == 201
        assert (await api.delete(f"/locks/{again.json()['id']}")).status_code == 204


async def test_one_key_waits_in_two_replicas_and_gets_one_lock(api, other, service, replica, project):
    await make_users(api, project, 2)
    for _ in range(2):
        assert (await acquire(api, project, holder="first")).status_code == 201
    key = uuid.uuid4()
    waiters = [waiting(here, project, key=key) for here in (api, other, api)]
    await queued(service, 2)
    await queued(replica, 1)
    began = time.monotonic()
    await api.delete("/locks", params={"holder": "first", "project_id": project})  # both in one moment
    answers = [(await waiter).json() for waiter in waiters]
    assert len({answer["id"] for answer in answers}) == 1
    assert time.monotonic() - began < 10  # the others find the lock at the next poll and not when their wait is over
    (pool,) = (await api.get("/pools", params={"project_id": project})).json()["items"]
    assert (pool["locked"], pool["free"]) == (1, 1)


async def test_a_release_at_another_replica_wakes_a_waiter(api, other, service, project):
    await make_users(api, project)
    lock = (await acquire(other, project)).json()
    waiter = waiting(api, project)
    await queued(service)
    await other.delete(f"/locks/{lock['id']}")
    assert (await waiter).status_code == 201


async def test_no_waiter_starves_behind_another_replica_that_is_busier(api, other, project, long, request):
    """The bound of docs/waiting.md: nobody elsewhere who came three seconds later is served before it.

    The short form has brisk desks, and a bound of two seconds, or three turns where the machine is loaded.
    """
    seconds, bound, crowd = (8, 3, 40) if long else (4, 2, 20)
    if not long:
        request.getfixturevalue("brisk")
    await make_users(api, project, 2)
    served: list[tuple[float, float, str]] = []
    stop = time.monotonic() + seconds

    async def work(here, name):
        while time.monotonic() < stop:
            came = time.monotonic()
            answer = await acquire(here, project, wait=20, holder=name)
            served.append((came, time.monotonic(), name))
            await asyncio.sleep(0.05)
            await here.delete(f"/locks/{answer.json()['id']}")

    busy = [work(other, "busy") for _ in range(crowd)] + [hammer(other, project, stop)]
    await asyncio.gather(*busy, work(api, "lonely"), work(api, "lonely"))
    assert len([name for _, _, name in served if name == "lonely"]) >= 3
    bound = max(bound, 3 * statistics.median(at - came for came, at, name in served if name == "busy"))
    for came, at, name in served:
        overtakers = [1 for c, a, n in served if n != name and c > came + bound and a < at]
        assert not overtakers, f"{name} came at {came}, and {len(overtakers)} that came {bound} s later went before it"


async def hammer(here, project, stop):
    """One who does not wait, and asks again and again."""
    while time.monotonic() < stop:
        answer = await acquire(here, project)
        if answer.status_code == 201:
            await here.delete(f"/locks/{answer.json()['id']}")


async def test_a_set_is_granted_whole_in_the_order_asked(api, project):
    await make_users(api, project, 3, labels={"role": "buyer"})
    await make_users(api, project, 1, login="seller", labels={"role": "seller"})
    buyer, seller = ({"project_id": project, "labels": {"role": role}} for role in ("buyer", "seller"))
    answer = await set_of(api, buyer | {"count": 2}, seller, buyer, ttl=50, holder="trade")
    assert answer.status_code == 201
    locks = answer.json()["locks"]
    assert [lock["user"]["labels"]["role"] for lock in locks] == ["buyer", "buyer", "seller", "buyer"]
    assert len({lock["user"]["id"] for lock in locks}) == 4
    assert {(lock["ttl"], lock["holder"]) for lock in locks} == {(50, "trade")}
    assert locks[0]["user"]["password"].startswith("pw-")
    refused = await set_of(api, buyer | {"count": 2}, seller)
    assert slug(refused) == "pool-exhausted"
    assert (refused.json()["matching"], refused.json()["locked"]) == (4, 4)


async def test_a_set_that_is_not_complete_takes_nobody(api, project):
    await make_users(api, project, 3)
    await acquire(api, project)
    assert slug(await set_of(api, {"project_id": project, "count": 3})) == "pool-exhausted"
    assert (await set_of(api, {"project_id": project, "count": 2})).status_code == 201


async def test_the_only_admin_is_kept_for_who_needs_an_admin(api, project):
    await make_users(api, project, 1, login="admin", labels={"role": "admin"})
    await make_users(api, project, 1, login="plain")
    anybody, admin = {"project_id": project}, {"project_id": project, "labels": {"role": "admin"}}
    for parts in ([anybody, admin], [admin, anybody]):
        locks = (await set_of(api, *parts, holder="set")).json()["locks"]
        assert [lock["user"]["login"] for lock in locks] == [
            ("admin" if "labels" in part else "plain") for part in parts
        ]
        await api.delete("/locks", params={"holder": "set", "project_id": project})


async def test_a_set_that_can_never_be_complete_is_not_found(api, project):
    await make_users(api, project, 1, login="admin", labels={"role": "admin"})
    anybody, admin = {"project_id": project}, {"project_id": project, "labels": {"role": "admin"}}
    assert slug(await set_of(api, anybody | {"count": 2})) == "no-matching-user"
    assert slug(await set_of(api, anybody, admin)) == "no-matching-user"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"users": []}, "users"), ({"users": [{}]}, "users[0].project_id"), ({}, "users"),
        ({"users": [{"project_id": str(uuid.uuid4()), "count": 0}]}, "users[0].count"),
        ({"users": [{"project_id": str(uuid.uuid4()), "count": 60}] * 2}, "users"),
        ({"users": [{"project_id": str(uuid.uuid4()), "env": "x"}]}, "users[0].env"),
        ({"users": [{"project_id": str(uuid.uuid4()), "role": "x"}]}, "users[0].role"),
        ({"users": [{"project_id": str(uuid.uuid4())}], "ttl": 86401}, "ttl"),
    ],
)  # fmt: skip
async def test_a_bad_set_is_refused_by_field(api, body, field):
    answer = await api.post("/locks/sets", json=body)
    assert slug(answer) == "invalid"
    assert answer.json()["errors"][0]["field"] == field


async def test_a_repeated_set_gets_the_same_locks_until_one_has_ended(api, other, project):
    await make_users(api, project, 5)
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    asked = [set_of(here, {"project_id": project, "count": 3}, headers=headers) for here in (api, other) * 3]
    answers = [answer.json()["locks"] for answer in await asyncio.gather(*asked)]
    ids = [[lock["id"] for lock in locks] for locks in answers]
    assert ids == [ids[0]] * 6
    await api.delete(f"/locks/{ids[0][1]}")
    assert slug(await set_of(api, {"project_id": project, "count": 3}, headers=headers)) == "lock-ended"


async def test_a_waiting_set_leaves_users_to_singles_at_first(api, service, project):
    await make_users(api, project, 2)
    lock = (await acquire(api, project)).json()
    waiter = asyncio.create_task(set_of(api, {"project_id": project, "count": 2}, wait=20))
    await queued(service)
    single = await acquire(api, project)
    assert single.status_code == 201
    await asyncio.gather(*(api.delete(f"/locks/{held['id']}") for held in (lock, single.json())))
    assert (await waiter).status_code == 201


async def test_a_waiting_set_does_not_starve_behind_singles(brisk, api, service, project):
    """Its bound: once it has waited for PATIENCE, nobody who came later gets a user that it needs."""
    await make_users(api, project, 4)
    stop = time.monotonic() + 25
    done = asyncio.Event()

    async def single():
        while not done.is_set() and time.monotonic() < stop:
            answer = await acquire(api, project, wait=20)
            await asyncio.sleep(random.uniform(0.05, 0.3))
            await api.delete(f"/locks/{answer.json()['id']}")

    singles = [asyncio.create_task(single()) for _ in range(12)]
    await asyncio.sleep(0.3)
    began = time.monotonic()
    answer = await set_of(api, {"project_id": project, "count": 4}, wait=20)
    assert answer.status_code == 201
    assert time.monotonic() - began < farm.waiting.PATIENCE + 3
    await asyncio.gather(*(api.delete(f"/locks/{lock['id']}") for lock in answer.json()["locks"]))
    done.set()
    await asyncio.gather(*singles)


async def test_sets_and_singles_under_load_never_share_a_user(api, other, database, project, long):
    await make_users(api, project, 6, labels={"role": "admin"})
    for number in range(6):
        await make_users(api, project, login=f"plain-{number}")
    held: set[str] = set()
    stop = time.monotonic() + (3 if long else 1)

    async def work(here, *parts):
        while time.monotonic() < stop:
            answer = await set_of(here, *parts, wait=10)
            locks = answer.json()["locks"]
            users = {lock["user"]["id"] for lock in locks}
            assert len(users) == len(locks)
            assert not users & held
            held.update(users)
            await asyncio.sleep(0.005)
            held.difference_update(users)
            await asyncio.gather(*(here.delete(f"/locks/{lock['id']}") for lock in locks))

    anybody, admin = {"project_id": project}, {"project_id": project, "labels": {"role": "admin"}}
    await asyncio.gather(
        *(work(here, anybody | {"count": 3}, admin) for here in (api, other) for _ in range(4)),
        *(work(here, admin | {"count": 2}) for here in (api, other) for _ in range(4)),
        *(work(here, anybody) for here in (api, other) for _ in range(4)),
    )


users_of = st.lists(st.integers(0, 7), max_size=5, unique=True)


@hypothesis_settings(deadline=None)
@given(st.lists(st.tuples(st.lists(users_of, min_size=1, max_size=3), st.booleans()), max_size=6))
def test_match_serves_all_or_none_first_come_first_served(asked):
    """Compared with an oracle that tries everything."""
    now = time.monotonic()
    ids = [uuid.UUID(int=number) for number in range(8)]
    asks, fitting = [], {}
    for number, (needs, patient) in enumerate(asked):
        wishes = tuple(farm.words.Wish(env=f"{number}.{unit}") for unit in range(len(needs)))
        fitting |= {wish: [ids[user] for user in users] for wish, users in zip(wishes, needs, strict=True)}
        asks.append(farm.waiting.Ask(wishes=wishes, arrived=now - (0 if patient else 100)))
    served = farm.waiting.match(asks, fitting, now)
    for ask, users in served.items():
        assert all(user in fitting[wish] for wish, user in zip(ask.wishes, users, strict=True))
    assert len({user for users in served.values() for user in users}) == sum(map(len, served.values()))
    expected, kept = [], []
    for ask, (needs, patient) in zip(asks, asked, strict=True):
        if can_be_had([*kept, *needs]):
            kept += needs
            expected.append(ask)
        elif not patient and len(needs) > 1:
            for users in needs:  # what it has so far is kept for it
                kept += [users] if can_be_had([*kept, users]) else []
    assert list(served) == expected


def can_be_had(needs, taken=frozenset()):
    if not needs:
        return True
    return any(can_be_had(needs[1:], taken | {user}) for user in needs[0] if user not in taken)


async def test_the_waiters_wake_when_nobody_tells_them(database, project):
    """A connection for news that has died, or none: the poll stands behind it."""
    url = database.replace("?", "?") + ("&" if "?" in database else "?") + "application_name=direct"
    with serving(settings(database, listen_url=farm.settings.Secret("postgresql://127.0.0.1:9/none"))) as deaf:
        async with client(deaf.url) as api:
            (user,) = await make_users(api, project)
            await acquire(api, project)
            waiter = waiting(api, project)
            await queued(deaf)
            end = "update locks set lock_id = null, ready_at = clock_timestamp() where user_id = $1"
            await execute(url, end.replace("$1", f"'{user['id']}'"))
            assert (await asyncio.wait_for(waiter, 5)).status_code == 201


async def test_a_host_for_news_that_is_none_is_told(service, caplog):
    hearing = asyncio.create_task(farm.waiting.listen(service.farm.desk, "postgresql://u:hidden@a..b/d"))
    while not caplog.records and not hearing.done():
        await asyncio.sleep(0.01)
    hearing.cancel()
    (told,) = caplog.messages
    assert told.startswith("No news of other replicas, polls go on: Unicode")
    assert "hidden" not in told


async def test_waiting_goes_on_while_the_database_restarts(api, service, database, project):
    await make_users(api, project)
    lock = (await acquire(api, project)).json()
    waiter = waiting(api, project)
    await queued(service)
    name = urlsplit(database).path[1:]
    cut = "select pg_terminate_backend(pid) from pg_stat_activity where datname = '{}' and pid <> pg_backend_pid()"
    with contextlib.suppress(Exception):
        await execute(database, cut.format(name))
    for _ in range(50):
        with contextlib.suppress(httpx.HTTPError):
            if (await api.delete(f"/locks/{lock['id']}")).status_code in (204, 404):
                break
        await asyncio.sleep(0.1)
    assert (await waiter).status_code == 201


async def test_a_set_that_was_refused_is_granted_once_its_users_are_free(api, project):
    await make_users(api, project, 2)
    held = (await acquire(api, project)).json()
    both = {"project_id": project, "count": 2}
    assert slug(await set_of(api, both)) == "pool-exhausted"
    await api.delete(f"/locks/{held['id']}")
    assert (await set_of(api, both)).status_code == 201


async def test_a_set_that_waits_at_another_replica_keeps_no_more_users_than_it_needs(
    brisk, api, other, replica, project, monkeypatch
):
    monkeypatch.setattr(farm.waiting, "BREADTH", 1)
    await make_users(api, project, 1, login="admin", labels={"role": "admin"})
    assert (await acquire(api, project, labels={"role": "admin"})).status_code == 201
    await make_users(api, project, 6)
    parts = {"project_id": project, "labels": {"role": "admin"}}, {"project_id": project, "count": 5}
    patient = asyncio.create_task(set_of(other, *parts, wait=2))
    await queued(replica)
    await asyncio.sleep(farm.waiting.PATIENCE + 0.4)
    assert (await acquire(api, project, wait=1)).status_code == 201
    assert slug(await acquire(api, project)) == "pool-exhausted"  # the other five are kept for it
    assert slug(await patient) == "pool-exhausted"


async def test_what_replicas_tell_each_other_holds_up_no_call_for_long(api, database, project, monkeypatch):
    """A set is looked after behind it. On a silent database such a call had its answer after 14 s, not in 12."""
    monkeypatch.setattr(farm.waiting, "GOSSIP", 0.3)
    await make_users(api, project, 2)
    other = await asyncpg.connect(database)
    try:
        await other.execute("begin; lock table waiting in access exclusive mode")
        await blocked(database)
        began = time.monotonic()
        assert (await set_of(api, {"project_id": project, "count": 2})).status_code == 201
        assert time.monotonic() - began < 6
    finally:
        await other.close()


async def test_a_wait_that_runs_out_while_the_database_is_silent_asks_it_nothing_more(
    api, service, project, monkeypatch
):
    """It has met it already, in the statement that was to serve it; why there is no user would take as long again."""
    await make_users(api, project)
    held = (await acquire(api, project)).json()
    fetch, count, counted = service.farm.hot.fetch, service.farm.locks.refusal._run, []

    async def counting(asked):
        found = await count(asked)
        counted.extend(wish for wishes in asked for wish in wishes if wish.project_id == uuid.UUID(project))
        return found

    async def silent(sql, *args, **options):
        if sql != farm.database.SQL["acquire_users"]:
            return await fetch(sql, *args, **options)
        (ask,) = service.farm.desk._taking
        while not ask.leaving:
            await asyncio.sleep(0.01)
        raise TimeoutError

    monkeypatch.setattr(service.farm.locks.refusal, "_run", counting)
    waiter = waiting(api, project, wait=2)
    await queued(service)
    await asyncio.to_thread(until, lambda: counted, 5)  # whether any user matches, as its wait begins
    monkeypatch.setattr(service.farm.hot, "fetch", silent)
    await api.delete(f"/locks/{held['id']}")
    assert slug(await waiter) == "database-unavailable"
    assert len(counted) == 1


async def test_a_replica_that_has_stopped_keeps_no_place_for_who_waited_there(api, database, project):
    await make_users(api, project)
    held = (await acquire(api, project)).json()
    with serving(settings(database)) as leaving:
        async with client(leaving.url) as elsewhere:
            waiter = waiting(elsewhere, project, wait=20)
            await queued(leaving)
            await told(database, leaving, 1)
            (ask,) = leaving.farm.desk.queue
            ask.answer.get_loop().call_soon_threadsafe(leaving.farm.desk.close)
            assert slug(await waiter) == "shutting-down"
    await told(database, leaving, 0)
    await api.delete(f"/locks/{held['id']}")
    assert (await acquire(api, project)).status_code == 201


async def told(database, service, rows: int) -> None:
    """Wait until so many rows tell the others who waits at that replica."""
    end = time.monotonic() + 2  # rows of the dead are passed over after three
    query = f"select from waiting where replica = '{service.farm.desk.replica}'"
    while len(await execute(database, query)) != rows:
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


async def test_one_that_goes_away_while_the_database_is_slow_leaves_no_user_locked(api, database, project):
    (user,) = await make_users(api, project)
    blocker = await asyncpg.connect(database)
    try:
        async with blocker.transaction():
            await blocker.execute("lock table locks in exclusive mode")
            with pytest.raises(httpx.ReadTimeout):
                await api.post("/locks", json={"project_id": project, "wait": 10, "ttl": 60}, timeout=0.5)
        end = time.monotonic() + 3
        while (await api.get(f"/users/{user['id']}/history")).json()["items"] == []:
            assert time.monotonic() < end, "the call never reached the database"
            await asyncio.sleep(0.02)
        while (await api.get(f"/users/{user['id']}")).json()["state"] != "free":
            assert time.monotonic() < end, "the user is lost"
            await asyncio.sleep(0.02)
    finally:
        await blocker.close()


@pytest.mark.parametrize("count", [1, 2])
async def test_a_grant_whose_handler_is_cancelled_at_the_stop_is_given_back(count, api, database, project):
    """The server gives the handler up, by itself or at the desk, while its statement is still on the way."""
    await make_users(api, project, count)
    sent, over = asyncio.Event(), asyncio.Event()
    async with farm.database.open_pool(database, 4, "force_generic_plan", 10) as pool:
        own = farm.locks.Locks(settings(database), pool, pool, cast("Any", None), farm.telemetry.Events(None))
        fetch = pool.fetch

        async def slow(sql, *args, **options):
            if sql in (farm.database.SQL["acquire_locks"], farm.database.SQL["acquire_users"]):
                sent.set()
                await over.wait()
            return await fetch(sql, *args, **options)

        pool.fetch = slow
        desk = asyncio.create_task(own.desk.run())
        request = SimpleNamespace(receive=asyncio.Event().wait, scope={"state": {}})
        ask = farm.waiting.Ask(wishes=(farm.words.Wish(None, uuid.UUID(project)),) * count, ttl=60)
        call = asyncio.create_task(own.acquire(cast("Any", request), ask))
        await sent.wait()
        call.cancel()
        await asyncio.wait([call])
        asyncio.get_running_loop().call_later(0.2, over.set)
        await own.settle()
        desk.cancel()
    ended = f"select ended_by from history join users on users.id = user_id where project_id = '{project}'"
    assert [row["ended_by"] for row in await execute(database, ended)] == ["released"] * count


async def test_a_lock_that_nobody_was_told_of_is_looked_for_by_two_at_once():
    """One that is added meanwhile is kept, and neither stumbles over what the other has found."""
    unanswered, asked, over = farm.waiting.Unanswered(), [], asyncio.Event()
    first, second = uuid.uuid4(), uuid.uuid4()

    async def release(id):
        asked.append(id)
        await over.wait()
        return True

    unanswered.add([first])
    both = [asyncio.create_task(unanswered.give_back(release)) for _ in range(2)]
    while len(asked) < 2:
        await asyncio.sleep(0)
    unanswered.add([second])
    over.set()
    await asyncio.gather(*both)
    await unanswered.give_back(release)
    await unanswered.give_back(release)
    assert asked == [first, first, second]


async def test_a_lock_that_nobody_was_told_of_is_looked_for_after_an_outage_of_any_length(monkeypatch):
    """What was sent before it may arrive behind the first look after it. That look was the only one."""
    unanswered, granted, lock_id = farm.waiting.Unanswered(), [], uuid.uuid4()

    async def release(id):
        return id in granted

    unanswered.add([lock_id])
    outage = time.monotonic() + 3600
    monkeypatch.setattr(time, "monotonic", lambda: outage)
    assert await unanswered.give_back(release)
    granted.append(lock_id)
    assert not await unanswered.give_back(release)


async def test_a_lock_that_was_never_granted_is_looked_for_no_longer_than_it_may_come():
    unanswered, asked = farm.waiting.Unanswered(), []

    async def release(id):
        asked.append(id)
        return False

    unanswered.add([uuid.uuid4()])
    while await unanswered.give_back(release):
        pass
    assert len(asked) == farm.waiting.Unanswered.LOOKS


async def test_a_call_that_met_a_deadlock_is_repeated_with_the_body_it_had(api, service, project, monkeypatch):
    await make_users(api, project)
    held = (await acquire(api, project)).json()
    fetch, met = asyncpg.Connection.fetch, []

    async def deadlocked_once(connection, sql, *args, **options):
        if sql == farm.database.SQL["extend_locks"] and not met:
            met.append(sql)
            raise asyncpg.DeadlockDetectedError("deadlock detected")
        return await fetch(connection, sql, *args, **options)

    monkeypatch.setattr(asyncpg.Connection, "fetch", deadlocked_once)
    answer = await api.patch(f"/locks/{held['id']}", json={"ttl": 31}, timeout=5)
    assert (answer.status_code, answer.json()["ttl"], len(met)) == (200, 31, 1)


@pytest.mark.parametrize(("domain", "labels"), [(None, '{"role": "guest"}'), ("canary", None)])
async def test_a_user_that_is_changed_between_the_choice_and_the_grant_goes_to_nobody_whom_it_does_not_fit(
    brisk, api, service, project, monkeypatch, domain, labels
):
    (admin,) = await make_users(api, project, labels={"role": "admin"}, domain="regular")
    held = (await acquire(api, project)).json()
    waiter = waiting(api, project, labels={"role": "admin"}, domain="regular")
    await queued(service)
    await asyncio.to_thread(until, lambda: not service.farm.locks.refusal._tasks, 5)  # such are there
    fetch, changes = service.farm.hot.fetch, []

    async def changed_meanwhile(sql, *args):
        if sql == farm.database.SQL["acquire_users"] and not changes:
            change = admin["id"], None, None, domain, labels, False, None, None, None
            changes.append(await service.farm.pool.fetchval(farm.database.SQL["update_user"], *change))
        return await fetch(sql, *args)

    monkeypatch.setattr(service.farm.hot, "fetch", changed_meanwhile)
    await api.delete(f"/locks/{held['id']}")
    await asyncio.sleep(0.3)  # for some looks
    assert len(changes) == 1
    assert (await api.get(f"/users/{admin['id']}")).json()["state"] == "free"
    await api.patch(f"/users/{admin['id']}", json={"labels": {"role": "admin"}, "domain": "regular"})
    granted = (await waiter).json()["user"]
    assert (granted["labels"], granted["domain"]) == ({"role": "admin"}, "regular")


async def test_who_waits_for_a_label_that_few_have_is_found_by_it(api, service, project, monkeypatch):
    """Who and whether is learned after a slow look; here every look counts as one."""
    monkeypatch.setattr(farm.waiting, "SLOW", -1)
    (admin,) = await make_users(api, project, labels={"role": "admin"})
    (other,) = await make_users(api, project, login="plain")
    held = (await acquire(api, project, labels={"role": "admin"})).json()
    waiters = [waiting(api, project, labels={"role": "admin"})]
    await queued(service)
    wish = farm.words.Wish(None, uuid.UUID(project), None, None, '{"role":"admin"}')
    await asyncio.to_thread(until, lambda: service.farm.locks.rare.get(wish), 5)
    waiters.append(waiting(api, project, labels={"role": "admin"}))
    await queued(service, 2)
    await api.delete(f"/locks/{held['id']}")
    assert (await waiters[0]).json()["user"]["id"] == admin["id"]
    await api.patch(f"/users/{other['id']}", json={"labels": {"role": "admin"}})
    assert (await waiters[1]).json()["user"]["id"] == other["id"]
    parts = [{"project_id": project, "labels": {"role": "admin"}}, {"project_id": project}]
    assert (await set_of(api, *parts)).json()["matching"] == 2
    assert slug(await set_of(api, *parts[:1] * 3)) == "no-matching-user"


@pytest.mark.parametrize("few", [3, 4])
async def test_a_slow_look_for_a_label_counts_those_who_have_it(api, service, project, monkeypatch, few):
    """Here every look is one. A label that many have is not looked up."""
    monkeypatch.setattr(farm.waiting, "SLOW", -1)
    monkeypatch.setattr(farm.locks, "FEW", few)
    await make_users(api, project, 4, labels={"role": "buyer"})
    assert (await set_of(api, {"project_id": project, "labels": {"role": "buyer"}, "count": 2})).status_code == 201
    wish = farm.words.Wish(None, uuid.UUID(project), None, None, '{"role":"buyer"}')
    assert wish in service.farm.locks.rare
    await asyncio.to_thread(until, lambda: not service.farm.locks.refusal._tasks, 5)
    assert service.farm.locks.rare[wish] == (few == 4)


async def test_both_ways_to_look_for_labels_find_the_same(api, database, project):
    """Users in each state, of two domains, with and without the label."""
    users = []
    for domain, role, number in itertools.product(("regular", "canary"), ("admin", "buyer"), range(6)):
        labels = {"role": role, "n": "1"}
        users += await make_users(api, project, login=f"{domain}-{role}-{number}", domain=domain, labels=labels)
    states = itertools.cycle(["free", "locked", "expired", "resting", "quarantined", "quarantined while locked"])
    found = {}
    for user, state in zip(users, states, strict=False):
        path = f"/users/{user['id']}"
        lock = f"/locks/{(await api.put(f'{path}/lock')).json()['id']}"
        match state:
            case "free":
                await api.delete(lock)
            case "resting":
                await api.delete(lock, params={"cooldown": 60})
            case "quarantined":
                await api.delete(lock, params={"quarantine": "broken"})
            case "quarantined while locked":
                await api.post(f"{path}/quarantine", json={"reason": "broken"})
            case "expired":
                past = "acquired_at = now() - interval '1 hour', expires_at = now() - interval '1 minute'"
                await execute(database, f"update locks set {past}, ready_at = now() where user_id = '{user['id']}'")
    connection = await asyncpg.connect(database)
    try:
        for labels in ('{"role": "admin"}', '{"role": "admin", "n": "1"}', '{"role": "nobody"}'):
            for domain in (None, "canary"):
                for name in ("find_free", "find_matching"):
                    wish = [None], [project], [None], [domain], [labels]
                    ways = [await connection.fetch(farm.database.SQL[name], *wish, [way], 100) for way in (False, True)]
                    one, two = [{row["id"] for row in rows} for rows in ways]
                    assert one == two
                    found[name, labels, domain] = len(one)
    finally:
        await connection.close()
    both, canary = found["find_free", '{"role": "admin"}', None], found["find_free", '{"role": "admin"}', "canary"]
    assert (both, canary) == (4, 2)
    assert found["find_matching", '{"role": "admin"}', None] == 12


async def test_a_server_that_is_no_primary_any_more_is_left_for_the_new_one(server, empty_database, project):
    """A failover: for a moment the address leads to a server that only reads."""
    if os.environ.get("BOTFARM_TEST_POOLER"):
        pytest.skip("PgBouncer keeps its connections to the server, whoever asks")
    name = urlsplit(empty_database).path[1:]
    cut = f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'"
    with serving(settings(empty_database)) as alone:
        async with client(alone.url) as api:
            await make_users(api, project, 3)
            await execute(server, f"alter database {name} set default_transaction_read_only = on", cut)
            for _ in range(5):
                assert slug(await acquire(api, project)) == "database-unavailable"
            await execute(server, f"alter database {name} reset default_transaction_read_only")
            for _ in range(30):
                if (back := await acquire(api, project)).status_code == 201:
                    break
                assert slug(back) == "database-unavailable"
                await asyncio.sleep(0.1)
            assert back.status_code == 201


async def test_a_place_is_kept_no_longer_than_somebody_waits(api, other, service, replica, project, long):
    """Once a waiter at another replica is served, who comes next is not refused for its sake."""
    await make_users(api, project)
    for _ in range(4 if long else 2):
        held = (await acquire(api, project)).json()
        waiter = waiting(other, project)
        await queued(replica)
        await asyncio.to_thread(until, lambda: service.farm.desk.foreign, 5)  # until this replica knows of it
        await api.delete(f"/locks/{held['id']}")
        granted = await waiter
        assert granted.status_code == 201
        assert (await other.delete(f"/locks/{granted.json()['id']}")).status_code == 204
        again = await acquire(api, project)
        assert again.status_code == 201
        await api.delete(f"/locks/{again.json()['id']}")
