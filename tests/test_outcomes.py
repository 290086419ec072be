"""How it went, notes, and who has a lock now: outcomes, accounts that do not work, holds and hand-over."""

from __future__ import annotations

import asyncio
import uuid

import asyncpg
import pytest
from conftest import acquire, blocked, client, execute, make_users, pass_time, serving, settings, slug

import farm.database
import farm.locks


@pytest.fixture(scope="module")
def second(database):
    """A second replica on the same database."""
    with serving(settings(database)) as running:
        yield running


@pytest.fixture
async def replicas(service, second):
    async with client(service.url) as one, client(second.url) as two:
        yield [one, two]


async def went(api, user, outcome, **query):
    """A lock of this user that ended so."""
    lock = await api.put(f"/users/{user['id']}/lock")
    assert lock.status_code == 201, lock.text
    answer = await api.delete(f"/locks/{lock.json()['id']}", params={"outcome": outcome} | query)
    assert answer.status_code == 204, answer.text


async def state(api, user):
    told = (await api.get(f"/users/{user['id']}")).json()
    return told["state"], told["quarantine"]


async def failing(api, project):
    return [pool["failing"] for pool in (await api.get("/pools", params={"project_id": project})).json()["items"]]


REASON = "3 locks ended in bad-login, and none between them in passed"


async def test_the_history_tells_how_each_lock_went(api, project):
    (user,) = await make_users(api, project)
    for outcome in ("passed", "failed", "bad-login"):
        await went(api, user, outcome)
    untold = (await acquire(api, project)).json()
    await api.delete(f"/locks/{untold['id']}")
    await acquire(api, project)
    items = (await api.get(f"/users/{user['id']}/history")).json()["items"]
    assert [item["outcome"] for item in items] == [None, None, "bad-login", "failed", "passed"]


@pytest.mark.parametrize("query", ["outcome=broken", "outcome=", "outcome=null", "outcome=passed&outcome=failed"])
async def test_an_outcome_that_is_none_ends_nothing(api, project, query):
    await make_users(api, project)
    lock = (await acquire(api, project)).json()
    answer = await api.delete(f"/locks/{lock['id']}?{query}")
    assert slug(answer) == "invalid"
    assert answer.json()["errors"][0]["field"] == "outcome"
    assert (await api.get(f"/locks/{lock['id']}")).status_code == 200


async def test_only_the_release_of_one_lock_takes_an_outcome(api, project):
    (user,) = await make_users(api, project)
    for path in (f"/users/{user['id']}/lock", f"/users/{user['id']}"):
        assert slug(await api.delete(path, params={"outcome": "passed"})) == "invalid"
    assert slug(await api.delete("/locks", params={"holder": "x", "outcome": "passed"})) == "invalid"


async def test_a_user_whose_account_does_not_work_three_times_is_taken_out(api, project):
    (user,) = await make_users(api, project)
    for turn in range(3):
        assert await state(api, user) == ("free", None), turn
        await went(api, user, "bad-login")
    assert await state(api, user) == ("quarantined", REASON)
    assert slug(await acquire(api, project)) == "pool-exhausted"


async def test_what_failed_otherwise_breaks_no_row_and_what_passed_does(api, project):
    (user,) = await make_users(api, project)
    for outcome in ("bad-login", "bad-login", "passed", "bad-login", "failed", "bad-login"):
        await went(api, user, outcome)
    untold = (await acquire(api, project)).json()
    await api.delete(f"/locks/{untold['id']}")
    assert await state(api, user) == ("free", None)
    await went(api, user, "bad-login")
    assert await state(api, user) == ("quarantined", REASON)


async def test_the_end_of_a_quarantine_lets_the_count_begin_anew(api, project):
    (user,) = await make_users(api, project)
    for outcome in ("bad-login", "bad-login"):
        await went(api, user, outcome)
    await api.delete(f"/users/{user['id']}/quarantine")  # there is none, so none ends
    await went(api, user, "bad-login")
    await api.delete(f"/users/{user['id']}/quarantine")
    for outcome in ("bad-login", "bad-login"):
        await went(api, user, outcome)
    assert await state(api, user) == ("free", None)
    await went(api, user, "bad-login")
    assert await state(api, user) == ("quarantined", REASON)


async def test_a_reason_that_is_given_wins(api, project):
    (user,) = await make_users(api, project)
    for _ in range(2):
        await went(api, user, "bad-login")
    await went(api, user, "bad-login", quarantine="the password was changed")
    assert await state(api, user) == ("quarantined", "the password was changed")


async def test_a_quarantine_that_stands_keeps_its_reason(api, project):
    (user,) = await make_users(api, project)
    for _ in range(2):
        await went(api, user, "bad-login")
    lock = (await acquire(api, project)).json()
    await api.post(f"/users/{user['id']}/quarantine", json={"reason": "ada looks at it"})
    await api.delete(f"/locks/{lock['id']}", params={"outcome": "bad-login"})
    assert await state(api, user) == ("quarantined", "ada looks at it")


@pytest.mark.parametrize(("limit", "expected"), [(0, "free"), (1, "quarantined"), (5, "free")])
async def test_how_many_it_takes_is_a_setting(empty_database, project, limit, expected):
    with serving(settings(empty_database, bad_logins=limit)) as alone:
        async with client(alone.url) as api:
            (user,) = await make_users(api, project)
            for _ in range(4 if expected == "free" else 1):
                await went(api, user, "bad-login")
            assert (await state(api, user))[0] == expected


async def test_three_at_once_that_end_one_lock_count_once(replicas, project, database):
    """The lock is compared in the statement that counts, so the second one of three has nothing to count.

    All have begun before any is done: somebody has the row.
    """
    (user,) = await make_users(replicas[0], project)
    for turn in range(1, 4):
        lock = (await acquire(replicas[0], project)).json()
        path, query = f"/locks/{lock['id']}", {"outcome": "bad-login"}
        connection = await asyncpg.connect(database)
        try:
            async with connection.transaction():
                await connection.execute("select from locks where user_id = $1 for update", user["id"])
                calls = [asyncio.create_task(replicas[n % 2].delete(path, params=query)) for n in range(3)]
                await blocked(database, 2)  # one of each replica
        finally:
            await connection.close()
        answers = await asyncio.gather(*calls)
        assert sorted(answer.status_code for answer in answers) == [204, 404, 404]
        assert (await state(replicas[0], user))[0] == ("quarantined" if turn == 3 else "free")
    outcomes = [i["outcome"] for i in (await replicas[0].get(f"/users/{user['id']}/history")).json()["items"]]
    assert outcomes == ["bad-login"] * 3


@pytest.mark.parametrize(
    ("before", "reason", "expected"),
    [(None, "ada looks at it", ("quarantined", "ada looks at it")), ("broken", None, ("free", None))],
    ids=["taken out", "put back"],
)
async def test_a_bad_login_is_counted_with_what_a_person_does_in_the_same_moment(
    api, project, database, before, reason, expected
):
    """The third one, that has begun while the row is hers: her reason stays, and the end of a quarantine counts."""
    (user,) = await make_users(api, project)
    for _ in range(2):
        await went(api, user, "bad-login")
    lock = (await acquire(api, project)).json()
    if before:
        await api.post(f"/users/{user['id']}/quarantine", json={"reason": before})
    connection = await asyncpg.connect(database)
    try:
        async with connection.transaction():
            await connection.fetch(farm.database.SQL["set_quarantine"], uuid.UUID(user["id"]), reason)
            call = asyncio.create_task(api.delete(f"/locks/{lock['id']}", params={"outcome": "bad-login"}))
            await blocked(database)
    finally:
        await connection.close()
    assert (await call).status_code == 204
    assert await state(api, user) == expected
    if before:
        await went(api, user, "bad-login")
        assert await state(api, user) == expected
        await went(api, user, "bad-login")
        assert await state(api, user) == ("quarantined", REASON)


async def test_a_late_outcome_says_nothing_of_the_next_holder(api, project, database):
    (user,) = await make_users(api, project)
    late = (await acquire(api, project)).json()
    await pass_time(database, user["id"])
    assert slug(await api.delete(f"/locks/{late['id']}", params={"outcome": "bad-login"})) == "lock-not-held"
    next = (await acquire(api, project)).json()
    for _ in range(3):
        refused = await api.delete(f"/locks/{late['id']}", params={"outcome": "bad-login"})
        assert slug(refused) == "lock-not-held"
    await api.delete(f"/locks/{next['id']}", params={"outcome": "passed"})
    assert await state(api, user) == ("free", None)
    assert await failing(api, project) == [0]


async def test_pools_tell_how_many_fail(api, project):
    """By the last outcome that was told, quarantined or not."""
    one, two, three = await make_users(api, project, 3)
    for user, outcomes in ((one, ["bad-login"] * 3), (two, ["bad-login", "failed"]), (three, ["passed", "bad-login"])):
        for outcome in outcomes:
            await went(api, user, outcome)
    assert await failing(api, project) == [2]
    await api.delete(f"/users/{one['id']}/quarantine")
    untold = (await api.put(f"/users/{one['id']}/lock")).json()
    await api.delete(f"/locks/{untold['id']}")
    assert await failing(api, project) == [2]
    await went(api, one, "passed")
    assert await failing(api, project) == [1]


# Notes, holds and hand-over

LONGEST = "\N{BROKEN HEART}" * 500


async def test_a_note_is_shown_with_the_lock_wherever_its_holder_is(api, project):
    users = await make_users(api, project, 4)
    wishes = {"project_id": project, "holder": "ci", "note": "run 1"}
    one = (await api.post("/locks", json=wishes, headers={"Idempotency-Key": project})).json()
    other = next(user for user in users if user["id"] != one["user"]["id"])
    two = (await api.put(f"/users/{other['id']}/lock", json={"note": LONGEST})).json()
    both = (
        await api.post("/locks/sets", json={"users": [{"project_id": project, "count": 2}], "note": "run 3"})
    ).json()
    repeated = (await api.post("/locks", json=wishes, headers={"Idempotency-Key": project})).json()
    locks = [one, repeated, two, *both["locks"]]
    assert [lock["note"] for lock in locks] == ["run 1", "run 1", LONGEST, "run 3", "run 3"]
    for lock in locks:
        assert (await api.get(f"/locks/{lock['id']}")).json()["note"] == lock["note"]
        assert (await api.get(f"/users/{lock['user']['id']}")).json()["lock"]["note"] == lock["note"]
    listed = (await api.get("/users", params={"project_id": project})).json()["items"]
    assert sorted(user["lock"]["note"] for user in listed) == ["run 1", "run 3", "run 3", LONGEST]


async def test_who_waited_has_a_note_too_and_the_next_lock_has_none(api, project):
    await make_users(api, project)
    first = (await acquire(api, project, note="first")).json()
    waiting = asyncio.create_task(acquire(api, project, note="waited", wait=20))
    await asyncio.sleep(0.3)
    await api.delete(f"/locks/{first['id']}")
    second = (await waiting).json()
    assert second["note"] == "waited"
    await api.delete(f"/locks/{second['id']}")
    assert (await acquire(api, project)).json()["note"] == ""


@pytest.mark.parametrize("note", [None, "x" * 501, "a\nb", "a\x7f", 7])
async def test_a_note_that_is_none_is_refused(api, project, note):
    await make_users(api, project)
    lock = (await acquire(api, project, note="before")).json()
    for answer in (
        await acquire(api, project, note=note),
        await api.patch(f"/locks/{lock['id']}", json={"note": note}),
    ):
        assert slug(answer) == "invalid"
        assert answer.json()["errors"][0]["field"] == "note"
    assert (await api.get(f"/locks/{lock['id']}")).json()["note"] == "before"


async def test_a_failed_tests_account_is_kept_for_a_person(api, project):
    (user,) = await make_users(api, project)
    lock = (await acquire(api, project, holder="ci-4711", note="run 4711", ttl=60)).json()
    held = await api.patch(f"/locks/{lock['id']}", json={"ttl": 1800, "note": "basket is empty", "holder": "ada"})
    assert (held.json()["ttl"], held.json()["note"], held.json()["holder"]) == (1800, "basket is empty", "ada")
    assert held.json()["expires_at"] > lock["expires_at"]
    assert (await api.get("/users", params={"project_id": project, "holder": "ada"})).json()["items"]
    assert (await api.delete("/locks", params={"holder": "ci-4711", "project_id": project})).json() == {"released": 0}
    renewed = (await api.patch(f"/locks/{lock['id']}")).json()
    assert (renewed["ttl"], renewed["note"], renewed["holder"]) == (1800, "basket is empty", "ada")
    emptied = (await api.patch(f"/locks/{lock['id']}", json={"note": ""})).json()
    assert emptied["note"] == ""
    assert emptied["expires_at"] > renewed["expires_at"]
    await api.patch(f"/locks/{lock['id']}", json={"note": "done"})
    assert (await api.delete("/locks", params={"holder": "ada", "project_id": project})).json() == {"released": 1}
    (ended,) = (await api.get(f"/users/{user['id']}/history")).json()["items"]
    assert (ended["holder"], ended["note"], ended["ended_by"]) == ("ada", "done", "released")


async def test_each_way_a_lock_ends_keeps_its_note(api, project, database):
    users = await make_users(api, project, 6)
    locks = [(await api.put(f"/users/{u['id']}/lock", json={"note": u["login"]})).json() for u in users]
    await api.delete(f"/locks/{locks[0]['id']}")
    await api.delete(f"/users/{users[1]['id']}/lock")
    for user in users[2:5]:
        await pass_time(database, user["id"])
    await api.put(f"/users/{users[2]['id']}/lock")
    await acquire(api, project)  # takes over one whose time is up
    await execute(database, farm.database.SQL["sweep_locks"].replace("$1::int", "500"))
    await api.delete(f"/users/{users[5]['id']}", params={"force": True})
    rows = await execute(
        database, f"select note from history where user_id in ({', '.join(repr(u['id']) for u in users)}) order by note"
    )
    assert [row["note"] for row in rows] == [f"bot-{number}" for number in range(6)]


@pytest.mark.parametrize("clients", [(None, None), (None, "theirs")], ids=["one", "two"])
async def test_a_heartbeat_in_the_same_moment_takes_back_no_note(service, database, project, api, clients):
    """They come to one batch, whose statement changes a lock once."""
    await make_users(api, project)
    lock = uuid.UUID((await acquire(api, project)).json()["id"])
    theirs = uuid.uuid4()
    await execute(database, f"update locks set client_id = '{theirs}' where lock_id = '{lock}'")
    first, second = (theirs if name else None for name in clients)
    renewals = [
        farm.locks.Renewal(lock, 1800, first, "ada", "look here"),
        farm.locks.Renewal(lock, None, second),
        farm.locks.Renewal(lock, None, first, None, "and here"),
    ]
    async with farm.database.open_pool(database, 1, "force_generic_plan", 10) as pool:
        locks = farm.locks.Locks(service.farm.settings, pool, pool, service.farm.passwords, service.farm.events)
        assert all(await locks._extend(renewals))
    renewed = (await api.get(f"/locks/{lock}")).json()
    assert (renewed["ttl"], renewed["holder"], renewed["note"]) == (1800, "ada", "and here")


async def test_a_renewal_with_a_note_is_a_hot_update(empty_database, project):
    with serving(settings(empty_database)) as alone:
        async with client(alone.url) as api:
            await make_users(api, project)
            lock = (await acquire(api, project, ttl=100)).json()
            for number in range(20):
                await api.patch(f"/locks/{lock['id']}", json={"ttl": 200 + number, "note": f"at step {number}"})
    counts = "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relname = 'locks'"
    connection = await asyncpg.connect(empty_database)
    for _ in range(500):  # a connection that PgBouncer keeps tells of its last updates when it was idle for 10 s
        (row,) = await connection.fetch(counts)
        if row["n_tup_upd"] >= 21:
            break
        await asyncio.sleep(0.05)
    await connection.close()
    assert row["n_tup_hot_upd"] >= 20
