"""Races, provoked: many callers, few users, and a count of who got what."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import signal
import subprocess
import time
import uuid

import httpx
import pytest
from conftest import (
    KEY,
    acquire,
    client,
    execute,
    free_port,
    make_users,
    process,
    serving,
    settings,
    slug,
    wait_ready,
)

import farm.database


@pytest.fixture(scope="module")
def second(database):
    """A second replica on the same database."""
    with serving(settings(database)) as running:
        yield running


@pytest.fixture
async def replicas(service, second):
    async with client(service.url) as one, client(second.url) as two:
        yield [one, two]


async def test_two_tests_never_hold_the_same_user(replicas, project, long):
    """Every grant's interval, as the callers saw it, against every other of the same user."""
    await make_users(replicas[0], project, 7)
    held: dict[str, str] = {}
    doubles, grants, refused = [], 0, 0

    async def worker(number):
        nonlocal grants, refused
        while grants <= (300 if long else 100):
            api = random.choice(replicas)
            answer = await acquire(api, project)
            if answer.status_code == 409:
                assert slug(answer) == "pool-exhausted"
                refused += 1
                continue
            assert answer.status_code == 201
            lock = answer.json()
            if lock["user"]["id"] in held:
                doubles.append(lock)
            held[lock["user"]["id"]] = lock["id"]
            grants += 1
            await asyncio.sleep(random.random() / 500)
            del held[lock["user"]["id"]]
            assert (await api.delete(f"/locks/{lock['id']}")).status_code == 204

    await asyncio.gather(*(worker(number) for number in range(40 if long else 16)))
    assert doubles == []
    assert grants > 100
    assert refused > 0
    pool = (await replicas[0].get("/pools", params={"project_id": project})).json()["items"][0]
    assert pool["free"] == 7


async def test_fences_only_grow_and_the_history_has_no_overlap(replicas, project, database):
    await make_users(replicas[0], project, 3)
    fences: dict[str, list[int]] = {}

    async def worker():
        for _ in range(10):
            api = random.choice(replicas)
            answer = await acquire(api, project, ttl=1)
            if answer.status_code == 201:
                lock = answer.json()
                fences.setdefault(lock["user"]["id"], []).append(lock["fence"])
                if random.random() < 0.25:  # some outstay their ttl
                    await end_in(database, lock, 0)
                await api.delete(f"/locks/{lock['id']}")
            else:
                await asyncio.sleep(0.05)

    await asyncio.gather(*(worker() for _ in range(12)))
    for user, seen in fences.items():
        assert len(seen) == len(set(seen))
        items = (await replicas[0].get(f"/users/{user}/history", params={"limit": 1000})).json()["items"]
        assert [item["fence"] for item in items] == sorted(range(1, max(seen) + 1), reverse=True)
        for later, earlier in itertools.pairwise(items):
            assert earlier["ended_at"] <= later["acquired_at"]


async def end_in(database, lock, milliseconds):
    """Let a lock have so much time left."""
    end = f"clock_timestamp() + interval '{milliseconds} milliseconds'"
    await execute(database, f"update locks set expires_at = {end}, ready_at = {end} where lock_id = '{lock['id']}'")


async def test_one_user_for_many_callers_at_one_moment_goes_to_one(replicas, project, long):
    (user,) = await make_users(replicas[0], project)
    rounds, callers = (10, 40) if long else (20, 8)
    for _ in range(rounds):
        answers = await asyncio.gather(*(acquire(replicas[n % 2], project) for n in range(callers)))
        (granted,) = [answer.json() for answer in answers if answer.status_code == 201]
        assert {slug(answer) for answer in answers if answer.status_code != 201} == {"pool-exhausted"}
        assert (await replicas[0].delete(f"/locks/{granted['id']}")).status_code == 204
        answers = await asyncio.gather(*(replicas[n % 2].put(f"/users/{user['id']}/lock") for n in range(callers // 2)))
        (granted,) = [answer.json() for answer in answers if answer.status_code == 201]
        await replicas[1].delete(f"/locks/{granted['id']}")


async def test_overlapping_wishes_at_one_moment_share_nobody(replicas, project):
    await make_users(replicas[0], project, 10)
    await make_users(replicas[0], project, 1, login="admin", labels={"role": "admin"})
    wishes = [{}, {"env": "stage"}, {"domain": "regular"}, {"labels": {"role": "admin"}}]
    answers = await asyncio.gather(*(acquire(replicas[n % 2], project, **wishes[n % 4]) for n in range(44)))
    users = [answer.json()["user"]["login"] for answer in answers if answer.status_code == 201]
    assert len(users) == len(set(users)) == 11


async def test_a_request_that_lost_its_user_to_another_wish_leaves_its_key_unused(replicas, project):
    """Two wishes of one statement find the same user; the key of the one that goes without stays free."""
    api = replicas[0]
    await make_users(api, project)
    for _ in range(5):
        keys = [uuid.uuid4() for _ in range(12)]
        wishes = [{}, {"env": "stage"}, {"domain": "regular"}]
        answers = await asyncio.gather(*(acquire(api, project, key=k, **wishes[n % 3]) for n, k in enumerate(keys)))
        (winner,) = [answer.json() for answer in answers if answer.status_code == 201]
        for key, answer in zip(keys, answers, strict=True):
            if answer.status_code != 201:
                assert slug(answer) == "pool-exhausted"
                assert slug(await acquire(api, project, key=key)) == "pool-exhausted"
        await api.delete(f"/locks/{winner['id']}")


async def test_one_key_in_parallel_on_two_replicas_is_one_lock(replicas, project):
    await make_users(replicas[0], project, 20)
    keys = [uuid.uuid4() for _ in range(10)]
    calls = [acquire(replicas[n % 2], project, key=key) for n in range(6) for key in keys]
    answers = await asyncio.gather(*calls)
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 10
    pool = (await replicas[0].get("/pools", params={"project_id": project})).json()["items"][0]
    assert (pool["locked"], pool["free"]) == (10, 10)


async def test_a_take_over_and_a_heartbeat_at_the_moment_of_expiry_agree(replicas, project, database):
    """Beats and acquires every 2 ms around the end: as soon as one has taken over, no beat is accepted."""
    (user,) = await make_users(replicas[0], project)
    for _ in range(4):
        lock = (await acquire(replicas[0], project, ttl=1)).json()
        beats, takes = [], []
        await end_in(database, lock, 40)
        for number in range(40):
            beat = replicas[0].patch(f"/locks/{lock['id']}", json={"ttl": 1}) if number < 5 else None
            if beat:
                beats.append(asyncio.ensure_future(beat))
            takes.append(asyncio.ensure_future(acquire(replicas[1], project)))
            await asyncio.sleep(0.002)
        await asyncio.gather(*beats)
        taken = [answer.json() for answer in await asyncio.gather(*takes) if answer.status_code == 201]
        alive = (await replicas[0].patch(f"/locks/{lock['id']}")).status_code == 200
        assert len(taken) + alive <= 1
        await replicas[0].delete(f"/users/{user['id']}/lock")


async def test_a_delete_and_an_acquire_at_one_moment_agree(replicas, project):
    for _ in range(10):
        (user,) = await make_users(replicas[0], project)
        got, gone = await asyncio.gather(acquire(replicas[0], project), replicas[1].delete(f"/users/{user['id']}"))
        if gone.status_code == 204:
            assert got.status_code in (201, 404, 409)
            if got.status_code == 201:  # it was acquired and answered before the delete, or not at all
                assert slug(await replicas[0].get(f"/locks/{got.json()['id']}")) == "lock-not-held"
                pytest.fail("a locked user was deleted without force")
        else:
            assert got.status_code == 201
            await replicas[0].delete(f"/users/{user['id']}?force=true")


def test_what_was_acknowledged_survives_a_kill(empty_database, project):
    port = free_port()
    env = {"DATABASE_URL": empty_database, "BOTFARM_KEYS": KEY, "BOTFARM_PORT": str(port)}
    url = f"http://127.0.0.1:{port}"
    acknowledged = []
    with process(env=env) as running:
        wait_ready(url)
        with httpx.Client(base_url=url) as api:
            for number in range(30):
                user = {"login": f"u{number}", "password": "p", "project_id": project, "env": "prod"}
                assert api.post("/users", json=user).status_code == 201
            end = time.monotonic() + 0.3
            while time.monotonic() < end and len(acknowledged) < 25:
                acknowledged.append(api.post("/locks", json={"project_id": project}).json())
        running.send_signal(signal.SIGKILL)
        running.wait(10)
    with process(env=env):
        wait_ready(url)
        for lock in acknowledged:
            assert httpx.get(f"{url}/locks/{lock['id']}").status_code == 200
        assert httpx.delete(f"{url}/locks/{acknowledged[0]['id']}").status_code == 204


def test_a_clean_stop_is_quick_and_quiet(empty_database):
    port = free_port()
    env = {"DATABASE_URL": empty_database, "BOTFARM_PORT": str(port)}
    with process(env=env, cold=True) as running:
        wait_ready(f"http://127.0.0.1:{port}")
        running.terminate()
        try:
            output, _ = running.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            pytest.fail("the service did not stop")
    assert running.returncode == 0
    assert "Traceback" not in output
    assert f"BotFarm serves at http://127.0.0.1:{port}" in output


async def test_a_grant_whose_reply_was_lost_is_given_back(database, service, api, project):
    """The statement commits, but the service never hears of it: the sweep gives the lock back."""
    (user,) = await make_users(api, project)
    lock = (await acquire(api, project)).json()
    service.farm.locks.unanswered.add([uuid.UUID(lock["id"])])
    for _ in range(100):
        if (await api.get(f"/users/{user['id']}")).json()["state"] == "free":
            break
        await asyncio.sleep(0.05)
    rows = await execute(database, f"select ended_by from history where lock_id = '{lock['id']}'")
    assert [row["ended_by"] for row in rows] == ["released"]


@pytest.mark.parametrize("held", [0, 1, 900])
async def test_every_statement_of_locks_reads_by_its_own_index_whatever_the_statistics_say(empty_database, held):
    """A plan that reads an index from end to end is as fast at first, and falls over beside an old snapshot."""
    lock = "update locks set lock_id = gen_random_uuid(), acquired_at = now(), expires_at = now(), ttl = 1, holder = ''"
    with serving(settings(empty_database)) as alone:
        async with client(alone.url) as api:
            await make_users(api, str(uuid.uuid4()))
            await execute(
                empty_database,
                "insert into users (id, project_id, env, domain, login, secret) "
                "select gen_random_uuid(), gen_random_uuid(), "
                "'stage', 'regular', number::text, '$argon2id$' from generate_series(1, 1000) number",
                "insert into locks (user_id, pool_id) select id, 1 from users on conflict do nothing",
                lock,
                "update locks set lock_id = null",
                f"{lock} where user_id in (select user_id from locks limit {held})",
                "vacuum analyze",
            )
        readers: dict[str, set[str]] = {}
        async with (
            farm.database.open_pool(empty_database, 1, "force_generic_plan", 10) as pool,
            pool.acquire() as connection,
        ):
            for name, count in (
                ("release_locks", 6), ("extend_locks", 5), ("get_keyed_locks", 1), ("sweep_locks", 1),
                ("find_free", 7), ("find_with_sessions", 6), ("acquire_users", 10), ("acquire_locks", 16),
            ):  # fmt: skip
                await connection.execute(f"prepare {name} as {farm.database.SQL[name]}")
                explain = f"explain (format json) execute {name}({', '.join(['null'] * count)})"
                (plan,) = json.loads((await connection.fetch(explain))[0][0])
                scans = [node for node in nodes(plan["Plan"]) if "Scan" in node["Node Type"]]
                assert not [n for n in scans if n["Node Type"] == "Seq Scan"], name
                indexed = [n for n in scans if "Index Name" in n and n.get("Relation Name") != "pools"]
                whole = [node["Index Name"] for node in indexed if "Index Cond" not in node]
                assert not whole, f"{name} reads {whole} from end to end"
                readers[name] = {node["Index Name"] for node in indexed if node["Index Name"].startswith("locks")}
    # (The others may find held locks by either of their two indexes, which are as long.)
    for name in ("release_locks", "extend_locks", "get_keyed_locks"):
        assert readers[name] == {"locks_by_id"}, name


def nodes(plan):
    """A plan's node and all below it."""
    return [plan, *(node for child in plan.get("Plans", []) for node in nodes(child))]


async def test_a_queue_that_is_full_refuses_at_once_and_serves_those_who_stand_in_it(monkeypatch):
    monkeypatch.setattr(farm.database, "BACKLOG", 2)
    over = asyncio.Event()

    async def run(items):
        await over.wait()
        return items

    shared = farm.database.Coalescer(run, 10)
    first = shared(1)
    await asyncio.sleep(0)
    others = [shared(2), shared(3)]
    with pytest.raises(farm.database.Busy, match="2 calls wait"):
        shared(4)
    over.set()
    assert await asyncio.gather(first, *others) == [1, 2, 3]


async def test_one_too_many_for_a_connection_is_refused_at_once(monkeypatch, empty_database):
    monkeypatch.setattr(farm.database.Connections, "CROWD", 1)
    monkeypatch.setattr(farm.database.Connections, "PATIENCE", 0.5)
    async with farm.database.open_pool(empty_database, 1, "auto", 10) as pool, pool.acquire():
        waits = asyncio.create_task(pool.fetch("select 1"))
        await asyncio.sleep(0)
        with pytest.raises(farm.database.Busy, match="1 calls wait"):
            await pool.fetch("select 1")
        with pytest.raises(farm.database.Busy, match="no database connection: TimeoutError"):
            await waits
