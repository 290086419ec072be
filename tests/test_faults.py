"""Faults: clients, replicas, connections and the database fail under load, and no promise of the lock is broken.

What is checked is in grid.py: `Evidence.check`. Each test has a short form, and with `--long` a longer one.
"""

from __future__ import annotations

import asyncio
import glob
import itertools
import random
import signal
import time
import uuid
from collections import Counter
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from conftest import client, execute, fresh_database, long_chapter, slug
from grid import (
    LONGEST,
    UNSTEADY,
    Client,
    Grid,
    Line,
    Wire,
    answers,
    ask,
    burst,
    check_burst,
    conclude,
    drops_replies,
    eventually,
    moment,
    postgres,
    recovered,
    replicas,
)

import farm.database
import farm.migrations
import farm.words

long_chapter("crashes servers and services for a minute")


@pytest.fixture
def folder(tmp_path_factory) -> Path:
    """Where replicas write their output."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
async def mortal():
    """A PostgreSQL that the tests stop and start as they like."""
    async with postgres() as server:
        yield server


@pytest.fixture
def mortal_database(mortal):
    """A database there, like `empty_database`."""
    with fresh_database(mortal.dsn) as url:
        farm.migrations.migrate(url)
        yield url


def ports(running) -> list[int]:
    return [replica.port for replica in running]


async def spare_users(running) -> str:
    """A project of its own to see by whether replicas work."""
    spare = Grid(ports(running))
    await spare.create(10)
    return spare.project


# ---- Clients and replicas ----------------------------------------------------------------------------------


async def test_clients_that_stall_and_vanish_break_no_promise(empty_database, folder, long):
    """Where users are scarce a lock that ended is taken over at once, where they are not it lies about for a while."""
    seconds, size, ttls = (30, 20, (1, 2)) if long else (0, 12, (1,))
    habits = UNSTEADY if long else UNSTEADY | {"release": 10, "renew": 4, "stall": 8}
    async with replicas(empty_database, folder, {}, {}, {}) as running:
        scarce, plenty = (Grid(ports(running), habits=habits, ttls=ttls) for _ in range(2))
        patient = Grid(ports(running), habits=habits, ttls=ttls, wait=10 if long else 2)
        await scarce.create(size)
        await patient.create(size)
        await plenty.create(4 * size)
        async with scarce.clients(4 * size), patient.clients(4 * size), plenty.clients(2 * size):
            await asyncio.sleep(seconds)
            await eventually(lambda: seen_enough(scarce, patient, plenty), 30, "grants and denials")
            for grid in (scarce, patient, plenty):  # together, because each waits for what its clients do still
                grid.over.set()
        for grid in (scarce, patient, plenty):
            evidence = await conclude(grid, empty_database, faults=False)
            assert evidence.outcomes["acquire 201"] > 50
            assert min(evidence.outcomes[f"{kind} 404 lock-not-held"] for kind in ("extend", "release")) > 5
            assert Counter(record.ended_by for record in evidence.records.values())["expired"] > 5


async def seen_enough(*grids: Grid) -> bool:
    seen = [Counter((event.kind, event.status) for event in grid.events) for grid in grids]
    return all(min(c["acquire", 201] - 45, c["extend", 404], c["release", 404]) > 5 for c in seen)


async def test_killed_replicas_break_no_promise(empty_database, folder, long):
    async with replicas(empty_database, folder, {}, {}, {}) as running:
        grid = Grid(ports(running), ttls=(20,))
        await grid.create(60)
        async with grid.clients(60):
            for _ in range(12 if long else 3):
                await asyncio.sleep(random.uniform(0.2, 0.8 if long else 0.4))
                victim = random.choice(running)
                victim.kill()
                victim.start()
                await victim.ready()
        evidence = await conclude(grid, empty_database)
    assert evidence.outcomes["acquire 0"] > 10
    assert {record.ended_by for record in evidence.records.values()} == {"released"}


async def test_a_rolling_restart_loses_no_lock_and_gives_no_error_that_a_retry_does_not_cure(
    empty_database, folder, long
):
    async with replicas(empty_database, folder, {}, {}) as running:
        hasty, patient = Grid(ports(running), ttls=(60,), rate=200), Grid(ports(running), ttls=(60,), wait=20)
        await hasty.create(40)
        await patient.create(3)
        async with patient.clients(20), hasty.clients(30):
            for _ in range(5 if long else 1):
                for replica in running:
                    await asyncio.sleep(0.5)
                    assert await asyncio.to_thread(replica.stop, 10) == 0
                    replica.start()
                    await replica.ready()
        for grid in (hasty, patient):
            evidence = await conclude(grid, empty_database)
            assert {record.ended_by for record in evidence.records.values()} == {"released"}
            assert len(evidence.records) >= max(grid.offered, 10)


async def test_a_replica_that_stops_answers_every_waiter(empty_database, folder, long):
    async with replicas(empty_database, folder, {}) as (replica,):
        grid = Grid([replica.port])
        await grid.create(1)
        held = await ask(replica.port, "POST", "/locks", {"project_id": grid.project})
        wish = {"project_id": grid.project, "wait": 60}
        waiters = [asyncio.create_task(ask(replica.port, "POST", "/locks", wish)) for _ in range(200)]
        await eventually(lambda: waited_for(replica.port, grid.project, 200), 20, "calls that wait")
        began = time.monotonic()
        assert await asyncio.to_thread(replica.stop, 10) == 0
        assert time.monotonic() - began < 10
        replies = await asyncio.gather(*waiters)
        assert {(reply.status, reply.slug) for reply in replies} == {(503, "shutting-down")}
        assert all(reply.headers["retry-after"] for reply in replies)
        (lock,) = await execute(empty_database, "select lock_id from locks")
        assert str(lock["lock_id"]) == held.body["id"]


async def test_a_replica_whose_database_is_frozen_stops_within_ten_seconds(mortal, mortal_database, folder):
    async with replicas(mortal_database, folder, {}) as (replica,):
        grid = Grid([replica.port])
        await grid.create(1)
        async with mortal.frozen():
            wish = {"project_id": grid.project, "wait": 60}
            calls = [asyncio.create_task(ask(replica.port, "POST", "/locks", wish)) for _ in range(3)]
            await asyncio.sleep(0.2)
            assert await asyncio.to_thread(replica.stop, 10) == 0
        await asyncio.gather(*calls, return_exceptions=True)


async def waited_for(port: int, project: str, calls: int) -> bool:
    (pool,) = (await ask(port, "GET", f"/pools?project_id={project}")).body["items"]
    return pool["waiting"] == calls


async def test_a_connection_for_news_that_is_dead_but_open_delays_a_waiter_by_a_poll_only(empty_database, folder, long):
    """Half-open: its packets get nowhere, and nobody says so."""
    async with (
        Wire(empty_database, silent_after=0.5).open() as news,
        replicas(empty_database, folder, {}, {"BOTFARM_LISTEN_URL": news}) as running,
    ):
        first, deaf = ports(running)
        await asyncio.sleep(0.5)
        grid = Grid([first])
        await grid.create(1)
        for _ in range(3 if long else 1):
            held = await ask(first, "POST", "/locks", {"project_id": grid.project})
            waiter = asyncio.create_task(ask(deaf, "POST", "/locks", {"project_id": grid.project, "wait": 20}))
            await asyncio.sleep(0.7)
            released = time.monotonic()
            assert (await ask(first, "DELETE", f"/locks/{held.body['id']}")).status == 204
            granted = await waiter
            assert granted.status == 201
            assert time.monotonic() - released < 10
            await ask(deaf, "DELETE", f"/locks/{granted.body['id']}")


async def test_replies_that_are_lost_after_the_commit_lose_no_user_and_give_no_second_one(empty_database, folder, long):
    async with replicas(empty_database, folder, {}, {}, {}) as running, lossy(running, 0.3) as lossy_ports:
        grid = Grid(lossy_ports, ttls=(60,))
        await Grid(ports(running), grid.project).create(30)
        keys = [str(uuid.uuid4()) for _ in range(1500 if long else 120)]
        left = iter(keys)
        await asyncio.gather(*(lock_by_each(grid, left) for _ in range(15)))
        evidence = await conclude(Grid(ports(running), grid.project, events=grid.events), empty_database)
        bound = await execute(empty_database, "select key, lock_ids from idempotency_keys")
    assert evidence.outcomes["acquire 0"] > len(keys) / 2
    assert {record.holder: record.ended_by for record in evidence.records.values()} == dict.fromkeys(keys, "released")
    assert {str(row["key"]): [str(id) for id in row["lock_ids"]] for row in bound} == {
        record.holder: [record.lock_id] for record in evidence.records.values()
    }


@asynccontextmanager
async def lossy(running, share):
    """The ports of proxies before the replicas that lose a share of the replies."""
    one, two, three = (drops_replies(port, share) for port in ports(running))
    async with one as first, two as second, three as third:
        yield [first, second, third]


async def lock_by_each(grid: Grid, keys) -> None:
    """For each key: the same acquire at all replicas at once, each repeated until it is answered; one lock."""
    lines = [Line(port) for port in grid.ports]
    for key in keys:
        clients = [Client(grid, [line], itertools.count(), key) for line in lines]
        replies = await asyncio.gather(*(c.insist("acquire", "POST", "/locks", c.wish) for c in clients))
        assert {reply.status for reply in replies} == {201}
        assert all(reply.body == replies[0].body for reply in replies)
        await clients[0].use(replies[0].body, random.choice(["release", "renew"]))
    for line in lines:
        line.close()


# ---- The database ------------------------------------------------------------------------------------------


async def test_a_database_that_crashes_loses_no_acknowledged_lock(mortal, mortal_database, folder, long):
    async with replicas(mortal_database, folder, {}, {}) as running:
        grid, spare = Grid(ports(running), ttls=(20,)), await spare_users(running)
        await grid.create(40)
        async with grid.clients(60):
            for _ in range(5 if long else 2):
                await asyncio.sleep(random.uniform(0.3, 0.8 if long else 0.4))
                mortal.stop(signal.SIGQUIT)
                mortal.start()
                await mortal.ready()
                await recovered(ports(running), spare)
        evidence = await conclude(grid, mortal_database)
    assert evidence.outcomes["acquire 503 database-unavailable"] > 10
    assert {record.ended_by for record in evidence.records.values()} == {"released"}


async def test_a_frozen_database_goes_on_where_it_stood(mortal, mortal_database, folder, long):
    """The clients give up before the thaw and ask elsewhere, so that it finds their calls several times over."""
    async with replicas(mortal_database, folder, {}, {}) as running:
        gives_up, seconds = (1, 5) if long else (0.4, 1.2)
        grid, spare = Grid(ports(running), ttls=(20,), gives_up=gives_up), await spare_users(running)
        await grid.create(40)
        async with grid.clients(60):
            await asyncio.sleep(0.5)
            async with mortal.frozen():
                lists = [asyncio.create_task(burst(port, spare, 30)) for port in ports(running)]
                await asyncio.sleep(seconds)
            await recovered(ports(running), spare)
        for events in await asyncio.gather(*lists):
            check_burst(events)
        # What a caller gave up and was refused elsewhere the thaw may grant: to nobody, for its ttl.
        evidence = await conclude(grid, mortal_database, 22)
    assert evidence.outcomes["acquire 0"] > 10


async def test_a_database_that_stays_frozen_keeps_no_call_waiting(mortal, mortal_database, folder, long):
    async with replicas(mortal_database, folder, {}, {}, changes={} if long else HASTY) as running:
        await piles_up_nothing(running, mortal_database, mortal.frozen(), long)


async def test_statements_that_hang_keep_no_call_waiting(empty_database, folder, long):
    """Somebody holds the table of users, as a migration by hand may do: soon every connection is taken."""
    async with replicas(empty_database, folder, {}, {}, changes={} if long else HASTY) as running:
        await piles_up_nothing(running, empty_database, users_held(empty_database), long)


@asynccontextmanager
async def users_held(url):
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("begin; lock table users in access exclusive mode")
        yield
    finally:
        await connection.close()


# In the short form calls are given up sooner: after 2.2 seconds of the service's, and two for a slow machine.
HASTY = {"farm.database.Connections.STATEMENT": 0.8, "farm.database.Connections.PATIENCE": 0.4}


async def piles_up_nothing(running, url: str, fault, long: bool) -> None:
    """For longer than calls may wait there is no answer; they are told so in time, and then all is well again.

    There are more clients than two statements serve, and more calls of each kind than there are connections.
    """
    seconds, longest = (25, LONGEST) if long else (5, 4.5)
    grid, spare = Grid(ports(running), ttls=(60,), patience=seconds + 30, longest=longest), await spare_users(running)
    careless = Grid(ports(running), ttls=(60,), patience=seconds + 30, longest=longest, keyed=False)
    await grid.create(400)
    await careless.create(60)
    async with grid.clients(340), careless.clients(60):
        await asyncio.sleep(0.5)
        async with fault:
            calls = [asyncio.create_task(burst(port, spare, 40)) for port in ports(running)]
            await asyncio.sleep(seconds / 2)
            async with asyncio.timeout(5):
                assert [await answers(port, "/livez") for port in ports(running)] == [True, True]
            await asyncio.sleep(seconds / 2)
        await recovered(ports(running), spare)
    for events in await asyncio.gather(*calls):
        check_burst(events, longest)
    await conclude(grid, url)
    await conclude(careless, url)


async def test_connections_that_are_cut_lose_no_user(empty_database, folder, long):
    wire = Wire(empty_database)
    cut = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'botfarm' and datname = "
    async with wire.open() as url, replicas(url, folder, {}, {}) as running:
        grid, careless = Grid(ports(running)), Grid(ports(running), ttls=(60,), keyed=False)
        spare = await spare_users(running)
        for each in (grid, careless):
            await each.create(40)
        async with grid.clients(40), careless.clients(20):
            for _ in range(15 if long else 3):
                wire.share = 0.1  # what the database answers is lost: it did what it was asked
                await asyncio.sleep(0.3)
                wire.share = 0
                await execute(empty_database, cut + "current_database()")
                await recovered(ports(running), spare)
        evidence = await conclude(grid, empty_database)
        await conclude(careless, empty_database)
    assert wire.cuts > 5
    assert evidence.outcomes["acquire 503 database-unavailable"] > 5


async def test_an_import_whose_connection_ends_between_two_statements_is_told_so(empty_database, folder, project):
    """As a server that shuts down ends it: with a word that nothing has asked for. It was a 500."""
    last = b"SFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0"
    user = {"login": "u", "password": "pw", "project_id": project, "env": "stage"}
    wire = Wire(empty_database)
    async with wire.open() as url, replicas(url, folder, {}) as running:
        spare = await spare_users(running)
        wire.behind = b"SELECT 0\0", b"E" + (len(last) + 4).to_bytes(4) + last
        async with client(f"http://127.0.0.1:{running[0].port}") as api:
            answer = await api.post("/users/import", json=user, headers={"Content-Type": farm.words.NDJSON})
            assert slug(answer) == "database-unavailable"
        await recovered(ports(running), spare)
    assert "Traceback" not in (folder / "replica-0.log").read_text()


# ---- Clocks ------------------------------------------------------------------------------------------------

FAKETIME = next(iter(glob.glob("/usr/lib/*/faketime/libfaketime.so.1")), "")
HOUR = 3600


def an_hour_off(seconds: int) -> dict[str, str]:
    """The environment of a replica whose clock is off; timers go on as they are."""
    clock = {"FAKETIME": f"{seconds:+d}s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    return {"LD_PRELOAD": FAKETIME, "BOTFARM_HISTORY_DAYS": "1"} | clock


@pytest.fixture(scope="module")
def apart_database(server, template):
    with fresh_database(server, template) as url:
        yield url


@pytest.fixture(scope="module")
async def apart(apart_database, tmp_path_factory):
    """Three replicas whose clocks are an hour ahead, an hour behind, and right."""
    if not FAKETIME:
        pytest.skip("libfaketime is not installed (Debian: apt-get install libfaketime)")
    clocks = an_hour_off(HOUR), an_hour_off(-HOUR), {}
    async with replicas(apart_database, tmp_path_factory.mktemp("clocks"), *clocks) as running:
        yield ports(running)


async def test_clocks_of_replicas_decide_nothing(apart, apart_database, long):
    await a_lock_lasts_its_ttl(apart)
    grid = Grid(apart, habits=UNSTEADY, ttls=(1, 2) if long else (1,))
    await grid.create(20)
    async with grid.clients(40):
        await asyncio.sleep(15 if long else 1)
    evidence = await conclude(grid, apart_database, faults=False)
    made = [(uuid.UUID(record.lock_id).int >> 80) / 1000 - record.acquired_at for record in evidence.records.values()]
    assert {round(ahead / HOUR) for ahead in made} == {1, -1, 0}, "the clocks were not off"
    assert evidence.outcomes["release 404 lock-not-held"] > 2


async def a_lock_lasts_its_ttl(apart) -> None:
    """Each replica locks the one user, is repeated by the others, and they take it over at its end, not before."""
    project = str(uuid.uuid4())
    await Grid(apart, project).create(1)
    for owner, other, third in (apart, [apart[1], apart[0], apart[2]]):
        key, wish = str(uuid.uuid4()), {"project_id": project, "ttl": 2}
        lock = (await ask(owner, "POST", "/locks", wish, key)).body
        assert moment(lock["expires_at"]) - moment(lock["acquired_at"]) == 2
        assert abs(moment(lock["acquired_at"]) - time.time()) < 5
        assert [(await ask(port, "POST", "/locks", wish, key)).body for port in apart] == [lock] * 3
        taken = await eventually(partial(granted, (other, third), wish), 5, "the end of the lock")
        assert moment(taken["acquired_at"]) >= moment(lock["expires_at"])
        assert (await ask(third, "POST", "/locks", wish, key)).body["ended_at"] == lock["expires_at"]
        assert (await ask(owner, "DELETE", f"/locks/{taken['id']}")).status == 204


async def granted(ports: tuple[int, ...], wish: dict[str, Any]) -> dict[str, Any] | None:
    for port in ports:
        reply = await ask(port, "POST", "/locks", wish)
        if reply.status == 201:
            return reply.body
        assert reply.slug == "pool-exhausted"
    return None


AGE = """
with aged as (
    update history
    set lock_id = overlay(lock_id::text placing $3::text from 1 for 13)::uuid,
        acquired_at = acquired_at - $2::interval, ended_at = ended_at - $2::interval
    where lock_id = $1
    returning lock_id
)
update idempotency_keys
set lock_ids = (select array_agg(lock_id) from aged), bound_at = bound_at - $2::interval
where lock_ids = array[$1]
"""


async def test_history_and_keys_are_kept_for_their_days_of_the_database_whatever_the_clocks(
    apart, apart_database, long
):
    project = str(uuid.uuid4())
    await Grid(apart, project).create(1)
    young = [await ended_lock(apart_database, port, project, hours=23.5) for port in apart]
    old = [await ended_lock(apart_database, port, project, hours=25.5) for port in apart]
    if long:  # the replicas do it by themselves once a minute
        await eventually(lambda: forgotten(apart_database, project, young, old), 120, "old locks that are forgotten")
    else:
        await prune(apart_database)
    assert [(await ask(apart[2], "POST", "/locks", {"project_id": project}, key)).slug for key in young] == [
        "lock-ended"
    ] * 3
    assert await forgotten(apart_database, project, young, old)
    assert (await ask(apart[2], "POST", "/locks", {"project_id": project}, old[0])).status == 201


async def ended_lock(url: str, port: int, project: str, hours: float) -> str:
    """The key of a lock that a replica gave and got back so many hours ago by the database's clock."""
    key = str(uuid.uuid4())
    lock_id = (await ask(port, "POST", "/locks", {"project_id": project}, key)).body["id"]
    assert (await ask(port, "DELETE", f"/locks/{lock_id}")).status == 204
    milliseconds = (uuid.UUID(lock_id).int >> 80) - round(hours * HOUR * 1000)
    text = f"{milliseconds:012x}"
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(AGE, uuid.UUID(lock_id), timedelta(hours=hours), f"{text[:8]}-{text[8:]}")
    finally:
        await connection.close()
    return key


async def forgotten(url: str, project: str, young: list[str], old: list[str]) -> bool:
    """Whether of the ended locks and keys of a project only the young are left."""
    keys = ", ".join(f"'{key}'" for key in young + old)
    kept = await execute(url, f"select key from idempotency_keys where key in ({keys})")
    users = f"select id from users where project_id = '{project}'"
    (row,) = await execute(url, f"select count(*) as ended from history where user_id in ({users})")
    return {str(row["key"]) for row in kept} == set(young) and row["ended"] == len(young)


async def prune(url: str) -> None:
    """What the replicas run once a minute, now."""
    connection = await asyncpg.connect(url)
    try:
        for statement in ("prune_history", "prune_keys"):
            await connection.execute(farm.database.SQL[statement], 1, 1000)
    finally:
        await connection.close()
