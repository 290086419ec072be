"""Locks: the life of one, and what ends it."""

from __future__ import annotations

import asyncio
import uuid
from datetime import datetime
from types import SimpleNamespace

import pytest
from conftest import acquire, client, command, execute, make_users, pass_time, serving, settings, slug

import botfarm
import farm.database
import farm.locks


def seconds(lock):
    times = [datetime.fromisoformat(lock[name]) for name in ("acquired_at", "expires_at")]
    return (times[1] - times[0]).total_seconds()


async def test_a_lock_is_answered_whole_with_the_password(api, project):
    (user,) = await make_users(api, project, labels={"role": "admin"})
    answer = await acquire(api, project, env="stage", labels={"role": "admin"}, ttl=60, holder="ci 7")
    lock = answer.json()
    assert answer.status_code == 201
    assert lock == {
        "id": lock["id"], "fence": 1, "holder": "ci 7", "note": "", "ttl": 60, "acquired_at": lock["acquired_at"],
        "expires_at": lock["expires_at"],
        "user": {
            "id": user["id"], "login": "bot-0", "password": "pw-0", "project_id": project, "env": "stage",
            "domain": "regular", "labels": {"role": "admin"},
        },
    }  # fmt: skip
    assert seconds(lock) == 60
    del lock["user"]["password"]
    assert (await api.get(f"/locks/{lock['id']}")).json() == lock
    shown = (await api.get(f"/users/{user['id']}")).json()
    assert (shown["state"], shown["locktime"]) == ("locked", lock["acquired_at"])
    assert shown["lock"] == {name: lock[name] for name in ("holder", "note", "fence", "acquired_at", "expires_at")}


async def test_refusals_say_why(api, project):
    assert slug(await acquire(api, project)) == "no-matching-user"
    await make_users(api, project, 2)
    assert slug(await acquire(api, project, labels={"role": "admin"})) == "no-matching-user"
    first = (await acquire(api, project, ttl=100)).json()
    await acquire(api, project, ttl=200)
    refused = await acquire(api, project)
    assert slug(refused) == "pool-exhausted"
    assert int(refused.headers["retry-after"]) >= 1
    expected = {"matching": 2, "locked": 2, "resting": 0, "quarantined": 0, "waiting": 0}
    assert {name: refused.json()[name] for name in expected} == expected
    assert refused.json()["next_free_at"] == first["expires_at"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"ttl": 0}, "ttl"), ({"ttl": 86401}, "ttl"), ({"ttl": "5"}, "ttl"), ({"ttl": 1.5}, "ttl"),
        ({"wait": 301}, "wait"), ({"wait": -1}, "wait"), ({"holder": "x" * 201}, "holder"),
        ({"holder": "a\tb"}, "holder"), ({"env": "x"}, "env"),
        ({"project_id": None}, "project_id"), ({"labels": {"x": None}}, "labels.x"), ({"user": 1}, "user"),
    ],
)  # fmt: skip
async def test_a_bad_wish_is_refused_by_field(api, project, body, field):
    answer = await acquire(api, **({"project": project} | body))
    assert slug(answer) == "invalid"
    assert answer.json()["errors"][0]["field"] == field


async def test_the_body_of_a_lock_on_one_user_is_optional(api, project):
    (user,) = await make_users(api, project)
    path = f"/users/{user['id']}/lock"
    lock = (await api.put(path)).json()
    assert (lock["ttl"], lock["user"]["password"]) == (300, "pw-0")
    refused = await api.put(path, json={"holder": "you"})
    assert slug(refused) == "user-locked"
    assert (refused.json()["holder"], refused.json()["expires_at"]) == ("", lock["expires_at"])


async def test_the_default_ttl_is_no_way_around_the_longest_one(empty_database, project):
    with serving(settings(empty_database, max_ttl=10)) as short:
        async with client(short.url) as api:
            (user,) = await make_users(api, project)
            own = f"/users/{user['id']}/lock"
            for answer in (await api.put(own), await api.put(own, json={}), await acquire(api, project)):
                assert answer.json()["errors"] == [
                    {"field": "ttl", "message": "300 is over the longest ttl of 10 seconds"}
                ]
            assert (await api.put(own, json={"ttl": 10})).status_code == 201


async def test_a_heartbeat_moves_the_end(api, project):
    await make_users(api, project)
    lock = (await acquire(api, project, ttl=100)).json()
    longer = (await api.patch(f"/locks/{lock['id']}", json={"ttl": 500})).json()
    assert (longer["ttl"], "password" in longer["user"]) == (500, False)
    assert 500 <= seconds(longer) < 510
    assert (await api.patch(f"/locks/{lock['id']}")).json()["ttl"] == 500
    assert slug(await api.patch(f"/locks/{lock['id']}", json={"ttl": 0})) == "invalid"
    assert slug(await api.patch(f"/locks/{uuid.uuid4()}")) == "lock-not-held"
    assert slug(await api.patch("/locks/none")) == "not-found"


async def test_a_lock_that_was_shortened_ends_at_its_new_time(api, project):
    await make_users(api, project)
    lock = (await acquire(api, project, ttl=300)).json()
    await api.patch(f"/locks/{lock['id']}", json={"ttl": 1})
    await asyncio.sleep(1.05)
    assert (await acquire(api, project)).json()["fence"] == 2


async def test_a_renewed_lock_outlives_its_first_end(api, project, database):
    (user,) = await make_users(api, project)
    lock = (await acquire(api, project, ttl=1)).json()
    await api.patch(f"/locks/{lock['id']}", json={"ttl": 100})
    await pass_time(database, user["id"], 2)
    while (await timed(database, user))["ready_at"] != (await timed(database, user))["expires_at"]:
        await asyncio.sleep(0.02)  # until the sweep has come by
    assert slug(await acquire(api, project)) == "pool-exhausted"
    assert (await api.get(f"/locks/{lock['id']}")).status_code == 200


async def test_a_release_ends_a_lock_once(api, project):
    (user,) = await make_users(api, project)
    lock = (await acquire(api, project)).json()
    answers = await asyncio.gather(*(api.delete(f"/locks/{lock['id']}") for _ in range(10)))
    assert sorted(answer.status_code for answer in answers) == [204] + [404] * 9
    late = await api.delete(f"/locks/{lock['id']}")
    assert slug(late) == "lock-not-held"
    assert late.json()["ended_by"] == "released"
    (entry,) = (await api.get(f"/users/{user['id']}/history")).json()["items"]
    assert entry["ended_at"] == late.json()["ended_at"]


async def timed(database, user):
    """The times of a user's lock."""
    (row,) = await execute(database, f"select ready_at, expires_at from locks where user_id = '{user['id']}'")
    return row


async def test_a_late_release_never_frees_the_next_holder(api, project):
    await make_users(api, project)
    first = (await acquire(api, project, ttl=1)).json()
    await asyncio.sleep(1.05)
    second = (await acquire(api, project)).json()
    late = await api.delete(f"/locks/{first['id']}")
    assert slug(late) == "lock-not-held"
    assert (late.json()["ended_by"], late.json()["ended_at"]) == ("expired", first["expires_at"])
    assert slug(await api.patch(f"/locks/{first['id']}")) == "lock-not-held"
    assert (await api.get(f"/locks/{second['id']}")).json()["fence"] == first["fence"] + 1


async def test_a_cooldown_lets_the_user_rest(api, project, database):
    (user,) = await make_users(api, project)
    lock = (await acquire(api, project)).json()
    await api.delete(f"/locks/{lock['id']}?cooldown=600")
    assert (await api.get(f"/users/{user['id']}")).json()["state"] == "resting"
    unavailable = await api.put(f"/users/{user['id']}/lock")
    assert slug(unavailable) == "user-unavailable"
    refused = await acquire(api, project)
    assert (slug(refused), refused.json()["resting"]) == ("pool-exhausted", 1)
    assert refused.json()["next_free_at"] == unavailable.json()["available_at"]
    await pass_time(database, user["id"], 599)
    assert slug(await acquire(api, project)) == "pool-exhausted"
    await pass_time(database, user["id"], 1)
    assert (await acquire(api, project)).status_code == 201
    assert slug(await api.delete(f"/locks/{lock['id']}?cooldown=86401")) == "invalid"


async def test_a_test_takes_a_broken_user_out_with_its_release(api, project):
    (user,) = await make_users(api, project)
    lock = (await acquire(api, project)).json()
    await api.delete(f"/locks/{lock['id']}", params={"quarantine": "no inbox"})
    shown = (await api.get(f"/users/{user['id']}")).json()
    assert (shown["state"], shown["quarantine"]) == ("quarantined", "no inbox")


async def test_a_holder_gives_everything_back_at_once(api, project):
    await make_users(api, project, 4)
    holder = f"job-{project}"
    locks = [(await acquire(api, project, holder=holder)).json() for _ in range(2)]
    other = (await acquire(api, project, holder="someone else")).json()
    elsewhere = {"holder": holder, "project_id": str(uuid.uuid4())}
    assert (await api.delete("/locks", params=elsewhere)).json() == {"released": 0}
    assert (await api.delete("/locks", params={"holder": holder})).json() == {"released": 2}
    assert slug(await api.get(f"/locks/{locks[0]['id']}")) == "lock-not-held"
    assert (await api.get(f"/locks/{other['id']}")).status_code == 200
    assert slug(await api.delete("/locks")) == "invalid"
    assert slug(await api.delete("/locks?holder=")) == "invalid"


async def test_force_ends_any_lock_and_says_so(api, project):
    (user,) = await make_users(api, project)
    lock = (await acquire(api, project)).json()
    for _ in range(2):
        assert (await api.delete(f"/users/{user['id']}/lock")).status_code == 204
    late = await api.delete(f"/locks/{lock['id']}")
    assert late.json()["ended_by"] == "forced"
    assert (await acquire(api, project)).json()["fence"] == 2


async def test_use_spreads_over_the_pool(api, project):
    await make_users(api, project, 5)
    used = []
    for _ in range(10):
        lock = (await acquire(api, project)).json()
        used.append(lock["user"]["login"])
        await api.delete(f"/locks/{lock['id']}")
    assert {used.count(login) for login in used} == {2}


async def test_a_free_user_behind_the_place_of_the_last_search_is_found(api, project, database):
    """One that a long import committed late, say: the search begins where the last one ended, and wraps."""
    users = await make_users(api, project, 3)
    lock = (await acquire(api, project)).json()
    late = [f"'{user['id']}'" for user in users if user["id"] != lock["user"]["id"]]
    await execute(
        database, f"update locks set ready_at = now() - interval '1 hour' where user_id in ({','.join(late)})"
    )
    assert [(await acquire(api, project)).status_code for _ in range(3)] == [201, 201, 409]


async def test_any_env_and_domain_of_a_project_can_be_asked_for(api, project):
    await make_users(api, project, 1, env="prod")
    await make_users(api, project, 1, domain="canary")
    got = [(await acquire(api, project)).json()["user"] for _ in range(2)]
    assert {(user["env"], user["domain"]) for user in got} == {("prod", "regular"), ("stage", "canary")}
    assert slug(await acquire(api, project)) == "pool-exhausted"


async def test_a_repeat_with_its_key_finds_the_same_lock(api, project):
    await make_users(api, project, 3)
    key = uuid.uuid4()
    first = await acquire(api, project, key=key)
    again = await acquire(api, project, key=key, ttl=7)
    assert (again.status_code, again.json()) == (201, first.json())
    await acquire(api, project)
    await acquire(api, project)
    assert slug(await acquire(api, project, key=uuid.uuid4())) == "pool-exhausted"
    assert (await acquire(api, project, key=key)).json() == first.json()  # also from a pool that is known to be empty
    await api.delete(f"/locks/{first.json()['id']}")
    ended = await acquire(api, project, key=key)
    assert slug(ended) == "lock-ended"
    assert ended.json()["ended_at"]
    twice = [("Idempotency-Key", str(uuid.uuid4())) for _ in range(2)]
    for bad in ({"Idempotency-Key": "7"}, twice):
        assert slug(await api.post("/locks", json={"project_id": project}, headers=bad)) == "invalid"


async def test_a_refused_request_leaves_its_key_unused(api, project):
    key = uuid.uuid4()
    assert slug(await acquire(api, project, key=key)) == "no-matching-user"
    (user,) = await make_users(api, project)
    assert (await acquire(api, project, key=key)).status_code == 201
    again = await api.put(f"/users/{user['id']}/lock", headers={"Idempotency-Key": str(key)})
    assert again.status_code == 201


async def test_an_expired_lock_returns_to_the_pool_without_the_sweep(database, project, monkeypatch):
    async def nothing(locks):
        """The sweep, taken out."""

    monkeypatch.setattr(farm.locks.Locks, "sweep", nothing)
    with serving(settings(database)) as alone:
        async with client(alone.url) as api:
            (user,) = await make_users(api, project)
            first = (await acquire(api, project, ttl=1, key=(key := uuid.uuid4()))).json()
            assert slug(await acquire(api, project)) == "pool-exhausted"
            await asyncio.sleep(1.05)
            assert (await api.get(f"/users/{user['id']}")).json()["state"] == "free"
            assert slug(await api.get(f"/locks/{first['id']}")) == "lock-not-held"
            assert slug(await api.delete(f"/locks/{first['id']}")) == "lock-not-held"
            assert slug(await acquire(api, project, key=key)) == "lock-ended"
            (entry,) = (await api.get(f"/users/{user['id']}/history")).json()["items"]
            assert (entry["ended_by"], entry["ended_at"]) == ("expired", first["expires_at"])
            second = (await acquire(api, project)).json()
            entries = (await api.get(f"/users/{user['id']}/history")).json()["items"]
            assert [entry["ended_by"] for entry in entries] == [None, "expired"]
            assert second["fence"] == 2
            await pass_time(database, user["id"])
            assert slug(await api.patch(f"/locks/{second['id']}")) == "lock-not-held"
            third = (await api.put(f"/users/{user['id']}/lock", json={"ttl": 1})).json()
            assert third["fence"] == 3
            await api.patch(f"/locks/{third['id']}", json={"ttl": 100})
            await pass_time(database, user["id"], 2)
            assert slug(await acquire(api, project)) == "pool-exhausted"  # renewed, and not swept since
            assert slug(await api.put(f"/users/{user['id']}/lock")) == "user-locked"


async def test_the_sweep_records_expired_locks(api, project, service, database):
    (user,) = await make_users(api, project)
    lock = (await acquire(api, project, ttl=1)).json()
    await pass_time(database, user["id"])
    for _ in range(100):
        rows = await service_fetch(service, f"select ended_by from history where lock_id = '{lock['id']}'")
        if rows:
            break
        await asyncio.sleep(0.05)
    assert [row["ended_by"] for row in rows] == ["expired"]


async def service_fetch(service, sql):
    return await execute(service.app.state.settings.database_url.reveal(), sql)


async def test_old_history_and_keys_are_forgotten_in_the_end(empty_database, project):
    with serving(settings(empty_database)) as alone:
        async with client(alone.url) as api:
            await make_users(api, project, 2)
            kept = (await acquire(api, project, key=uuid.uuid4())).json()
            lock = (await acquire(api, project, key=uuid.uuid4())).json()
            await api.delete(f"/locks/{lock['id']}")
            old = "00000000-0000-7000-8000-000000000001"
            await execute(
                empty_database,
                f"update history set lock_id = '{old}', acquired_at = now() - interval '40 days', "
                "ended_at = now() - interval '31 days'",
                f"update idempotency_keys set bound_at = now() - interval '40 days', lock_ids = "
                f"case when lock_ids = array['{kept['id']}'::uuid] then lock_ids else array['{old}'::uuid] end",
            )
            async with farm.database.open_pool(empty_database, 1, "auto", 10) as pool:
                await botfarm.prune(SimpleNamespace(pool=pool, settings=alone.farm.settings, gate=None))
            assert await execute(empty_database, "select from history") == []
            keys = await execute(empty_database, "select lock_ids from idempotency_keys")
            assert [str(key["lock_ids"][0]) for key in keys] == [kept["id"]]


async def test_after_a_restore_every_user_rests_and_the_fences_are_ahead(empty_database, project):
    """Who took a lock after the backup was made is unknown to it, so nobody is handed out until that lock has ended."""
    with serving(settings(empty_database)) as alone:
        async with client(alone.url) as api:
            users = await make_users(api, project, 3)
            held = (await acquire(api, project, ttl=6)).json()
            expired = (await acquire(api, project, ttl=1)).json()
            await pass_time(empty_database, expired["user"]["id"])
            restored = command("migrate", "--after-restore", "3", env={"DATABASE_URL": empty_database})
            told = "3 users rest for at least 3 seconds, and their fences have moved ahead"
            assert restored.stdout.splitlines()[-1] == told
            refused = await acquire(api, project)
            assert slug(refused) == "pool-exhausted"
            assert refused.json()["resting"] == 3
            for lock in (held, expired):
                assert slug(await api.patch(f"/locks/{lock['id']}")) == "lock-not-held"
            again = [(await acquire(api, project, wait=10)).json() for _ in users]
            assert min(lock["acquired_at"] for lock in again) >= refused.json()["next_free_at"]
            assert min(lock["fence"] for lock in again) > 1_700_000_000_000
            assert [lock["acquired_at"] for lock in again if lock["user"] == held["user"]] > [held["expires_at"]]
            items = (await api.get(f"/users/{held['user']['id']}/history")).json()["items"]
            assert [item["ended_by"] for item in items] == [None, "forced"]


def test_a_restore_rests_for_the_longest_ttl_unless_told(empty_database):
    env = {"DATABASE_URL": empty_database, "BOTFARM_MAX_TTL": "777"}
    assert "0 users rest for at least 777 seconds" in command("migrate", "--after-restore", env=env).stdout
    both = command("migrate", "--rollback", "--after-restore", env=env)
    assert (both.returncode, command("migrate", env=env).stdout) == (2, "nothing to do\n")
    refused = command("migrate", "--after-restore", "-5", env=env)
    assert (refused.returncode, "'-5'" in refused.stderr) == (2, True)


@pytest.mark.parametrize("way", ["release", "holder", "force", "delete"])
async def test_a_lock_ends_also_when_the_clock_of_the_database_went_back(way, api, database, project):
    """A failover to a server whose clock is behind: the lock seems to begin in the future."""
    (user,) = await make_users(api, project)
    holder = f"holder-{project}"
    lock = (await acquire(api, project, holder=holder)).json()
    ahead = "acquired_at = acquired_at + interval '1 minute', expires_at = expires_at + interval '1 minute'"
    await execute(database, f"update locks set {ahead} where lock_id = '{lock['id']}'", "select")
    ended = await api.delete({
        "release": f"/locks/{lock['id']}",
        "holder": f"/locks?holder={holder}",
        "force": f"/users/{user['id']}/lock",
        "delete": f"/users/{user['id']}?force=true",
    }[way])  # fmt: skip
    assert ended.status_code in (200, 204)
    (row,) = await execute(database, f"select acquired_at, ended_at from history where lock_id = '{lock['id']}'")
    assert row["acquired_at"] == row["ended_at"]


async def test_a_renewed_lock_expires_also_when_the_clock_of_the_database_went_back(api, database, project):
    """Before, it seemed to end before it began, which the history refuses: nobody got the user any more."""
    (user,) = await make_users(api, project)
    lock = (await acquire(api, project)).json()
    ahead = "acquired_at = acquired_at + interval '1 minute', expires_at = expires_at + interval '1 minute'"
    await execute(database, f"update locks set {ahead} where lock_id = '{lock['id']}'", "select")
    assert (await api.patch(f"/locks/{lock['id']}", json={"ttl": 1})).status_code == 200
    await pass_time(database, user["id"])
    assert (await acquire(api, project)).status_code == 201
    (row,) = await execute(database, f"select ended_by from history where lock_id = '{lock['id']}'")
    assert row["ended_by"] == "expired"
