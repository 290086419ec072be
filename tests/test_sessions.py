"""Sessions: what a test needs to be logged in already, for whoever holds the user, and for nobody else."""

from __future__ import annotations

import asyncio
import gzip
import json
import secrets
import uuid
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial

import asyncpg
import pytest
from conftest import (
    KEY,
    acquire,
    blocked,
    client,
    command,
    execute,
    make_users,
    pass_time,
    serving,
    settings,
    slug,
)

import botfarm
import farm.passwords
import farm.settings
from farm.database import SQL

STATE = b'{ "cookies": [\t{"name": "sid", "value": "\\u0000\\ud83d"} ], "n": 1e999, "n": [] }\n'
AS_JSON = {"Content-Type": "application/json"}


async def keep(api, lock, content=b'{"sid": 1}', **query):
    return await api.put(f"/locks/{lock['id']}/session", content=content, headers=AS_JSON, params=query)


async def kept(api, lock):
    return await api.get(f"/locks/{lock['id']}/session")


async def has_session(api, lock):
    return (await api.get(f"/users/{lock['user']['id']}")).json()["has_session"]


@pytest.fixture
async def lock(api, project):
    """A lock on the only user."""
    await make_users(api, project)
    return (await acquire(api, project)).json()


async def next_lock(api, project, lock):
    assert (await api.delete(f"/locks/{lock['id']}")).status_code == 204
    return (await acquire(api, project)).json()


async def test_the_next_holder_gets_a_session_byte_for_byte(api, project, lock):
    assert not await has_session(api, lock)
    begun = datetime.now(UTC).replace(microsecond=0)
    answer = await keep(api, lock, STATE, ttl=3600)
    assert (answer.status_code, answer.content) == (204, b"")
    assert await has_session(api, lock)
    answer = await kept(api, await next_lock(api, project, lock))
    assert (answer.status_code, answer.content) == (200, STATE)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    stored, end = (parsedate_to_datetime(answer.headers[name]) for name in ("last-modified", "expires"))
    assert begun <= stored <= begun + timedelta(seconds=10)
    assert timedelta(seconds=3599) <= end - stored <= timedelta(seconds=3601)


async def test_its_etag_is_that_of_its_content(api, lock):
    tags = []
    for content in (b"1", b"2", b"1"):
        await keep(api, lock, content)
        tags.append((await kept(api, lock)).headers["etag"])
    assert tags[0] == tags[2] != tags[1]
    assert (await api.head(f"/locks/{lock['id']}/session")).headers["etag"] == tags[2]


@pytest.mark.parametrize(("query", "seconds"), [({}, 86400), ({"ttl": 1}, 1), ({"ttl": 2592000}, 2592000)])
async def test_it_is_kept_for_a_day_or_as_long_as_is_said(api, lock, database, query, seconds):
    await keep(api, lock, **query)
    kept_for = "select round(extract(epoch from ends_at - stored_at))::int, ends_at = session_until from user_sessions"
    rows = await execute(database, f"{kept_for} join locks using (user_id) where user_id = '{lock['user']['id']}'")
    assert [tuple(row) for row in rows] == [(seconds, True)]


async def test_it_can_be_forgotten(api, lock, database):
    for _ in range(2):
        assert (await api.delete(f"/locks/{lock['id']}/session")).status_code == 204
        assert slug(await kept(api, lock)) == "no-session"
        await keep(api, lock)
    await api.delete(f"/locks/{lock['id']}/session")
    assert not await has_session(api, lock)
    assert await execute(database, f"select from user_sessions where user_id = '{lock['user']['id']}'") == []


@pytest.mark.parametrize(
    "content",
    [b"null", b"[]", b'""', b"0", b'"' + b"x" * (botfarm.LONGEST_SESSION - 2) + b'"', b"[" * 500 + b"]" * 500],
    ids=lambda content: content[:5].decode(),
)
async def test_any_json_is_one(api, lock, content):
    assert (await keep(api, lock, content)).status_code == 204
    assert (await kept(api, lock)).content == content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"sid": canary}',
        b"NaN",
        b"-Infinity",
        b'"\xff"',
        b"\xef\xbb\xbf1",
        b"1 canary",
        b'"\n"',
        b"[" * 99999,
    ],
    ids=lambda content: repr(content[:5]),
)
async def test_what_is_no_json_is_refused_and_not_shown(api, lock, content):
    await keep(api, lock, b"1")
    answer = await keep(api, lock, content)
    assert slug(answer) == "malformed-body"
    assert "canary" not in answer.text
    assert (await kept(api, lock)).content == b"1"


async def test_one_that_is_too_large_is_refused(api, lock):
    answer = await keep(api, lock, b'"' + b"x" * (botfarm.LONGEST_SESSION - 1) + b'"')
    assert slug(answer) == "body-too-large"
    assert "262144 bytes" in answer.json()["detail"]
    assert slug(await kept(api, lock)) == "no-session"


@pytest.mark.parametrize("ttl", ["0", "2592001", "-1", "1.5", "null", ""])
async def test_a_ttl_that_is_none_stores_nothing(api, lock, ttl):
    answer = await keep(api, lock, ttl=ttl)
    assert slug(answer) == "invalid"
    assert answer.json()["errors"][0]["field"] == "ttl"
    assert slug(await kept(api, lock)) == "no-session"


async def test_what_is_not_sent_as_json_is_refused(api, lock):
    path = f"/locks/{lock['id']}/session"
    assert slug(await api.put(path, content=b"{}", headers={"Content-Type": "text/plain"})) == "unsupported-media-type"
    for content in (b"{}", gzip.compress(b"{}")):
        answer = await api.put(path, content=content, headers=AS_JSON | {"Content-Encoding": "gzip"})
        assert slug(answer) == "unsupported-media-type"
    assert slug(await api.put(path, json={}, params={"tll": 5})) == "invalid"
    assert slug(await kept(api, lock)) == "no-session"


async def test_only_a_live_lock_gets_to_it(api, project, lock, database):
    await keep(api, lock)
    await pass_time(database, lock["user"]["id"])
    later = (await acquire(api, project)).json()
    await api.delete(f"/locks/{later['id']}")
    for ended in (lock, later, {"id": str(uuid.uuid4())}):
        for answer in (await keep(api, ended, b"2"), await kept(api, ended), await forget(api, ended)):
            assert slug(answer) == "lock-not-held"
    assert (await keep(api, lock, b"2")).json()["ended_by"] == "expired"
    assert (await kept(api, (await acquire(api, project)).json())).content == b'{"sid": 1}'


async def forget(api, lock):
    return await api.delete(f"/locks/{lock['id']}/session")


@pytest.mark.parametrize(
    "ended",
    [
        "lock_id = gen_random_uuid(), fence = fence + 1",
        "expires_at = clock_timestamp(), ready_at = clock_timestamp()",
    ],
    ids=["taken", "expired"],
)
async def test_a_former_holder_never_overwrites_what_the_next_one_finds(api, project, lock, database, ended):
    """Its statement waits for the row while the lock ends, and compares it once more."""
    this = lock["user"]["id"]
    await keep(api, lock, b'"first"')
    for late in (partial(keep, content=b'"late"'), forget):
        connection = await asyncpg.connect(database)
        try:
            async with connection.transaction():
                await connection.execute(f"update locks set {ended} where user_id = $1", this)
                call = asyncio.create_task(late(api, lock))
                await blocked(database)
        finally:
            await connection.close()
        answer = await call
        assert answer.status_code == 404, "it was done for the next holder's user"
        assert slug(answer) == "lock-not-held"
        await api.delete(f"/users/{this}/lock")
        lock = (await acquire(api, project)).json()
        assert (await kept(api, lock)).content == b'"first"'


async def test_what_the_next_holder_has_found_is_not_replaced_by_a_write_that_had_begun_before(
    api, project, lock, database
):
    """Such a write holds the lock's row, so the user is not handed on until it is done."""
    await keep(api, lock, b'"first"')
    connection = await asyncpg.connect(database)
    try:
        async with connection.transaction():
            await connection.execute("select from user_sessions where user_id = $1 for update", lock["user"]["id"])
            begun = asyncio.create_task(keep(api, lock, b'"begun"'))
            await blocked(database)
            released = asyncio.create_task(api.delete(f"/locks/{lock['id']}"))
            granted = asyncio.create_task(acquire(api, project, wait=20))
            await asyncio.wait([granted], timeout=1)
            found = (await kept(api, granted.result().json())).content if granted.done() else b'"begun"'
    finally:
        await connection.close()
    assert [(await call).status_code for call in (begun, released, granted)] == [204, 204, 201]
    assert (await kept(api, granted.result().json())).content == found


# How it ends


async def test_it_ends_with_its_ttl_by_the_databases_clock(api, lock, database):
    await keep(api, lock, ttl=1)
    passed = "update locks set session_until = session_until - interval '1 second'"
    await execute(database, f"{passed} where user_id = '{lock['user']['id']}'")
    assert slug(await kept(api, lock)) == "no-session"
    assert not await has_session(api, lock)


@pytest.mark.parametrize("change", [{"password": "pw-0"}, {"login": "bot-new"}])
async def test_it_ends_with_a_new_password_or_login(api, lock, change):
    await keep(api, lock)
    await api.patch(f"/users/{lock['user']['id']}", json={"labels": {"a": "b"}, "login": "bot-0", "domain": "canary"})
    assert await has_session(api, lock)
    answer = await api.patch(f"/users/{lock['user']['id']}", json=change)
    assert not answer.json()["has_session"]
    assert slug(await kept(api, lock)) == "no-session"
    assert (await api.get(f"/locks/{lock['id']}")).json()["user"]["domain"] == "canary"


@pytest.mark.parametrize(("line", "expected"), [({"password": "pw-0"}, True), ({"password": "new"}, False)])
@pytest.mark.parametrize("domain", ["regular", "canary"])
async def test_it_ends_with_a_new_password_of_an_import(api, project, lock, line, expected, domain):
    await keep(api, lock)
    line = {"login": "bot-0", "project_id": project, "env": "stage", "labels": {"a": "b"}, "domain": domain} | line
    answer = await api.post("/users/import", content=json.dumps(line), headers={"Content-Type": "application/x-ndjson"})
    assert answer.json()["updated"] == 1
    assert await has_session(api, lock) == expected
    assert (await api.get(f"/locks/{lock['id']}")).json()["user"]["domain"] == domain


async def test_it_ends_when_a_quarantine_begins(api, project, lock):
    path = f"/users/{lock['user']['id']}/quarantine"
    await keep(api, lock)
    assert not (await api.post(path, json={"reason": "blocked"})).json()["has_session"]
    await keep(api, lock, b"2")  # by the lock, which runs on
    await api.post(path, json={"reason": "still blocked"})
    await api.delete(path)
    assert (await kept(api, lock)).content == b"2"


@pytest.mark.parametrize(
    ("query", "expected"),
    [({"quarantine": "blocked"}, False), ({"outcome": "bad-login"}, False), ({"outcome": "failed"}, True), ({}, True)],
)
async def test_it_ends_when_a_test_takes_the_user_out(empty_database, project, query, expected):
    with serving(settings(empty_database, bad_logins=1)) as alone:
        async with client(alone.url) as api:
            await make_users(api, project)
            lock = (await acquire(api, project)).json()
            await keep(api, lock)
            assert (await api.delete(f"/locks/{lock['id']}", params=query)).status_code == 204
            assert await has_session(api, lock) == expected


async def test_what_has_ended_is_forgotten_and_what_has_not_is_kept(api, project, database):
    """That of a user who is gone at once."""
    users = await make_users(api, project, 3)
    locks = [(await api.put(f"/users/{user['id']}/lock")).json() for user in users]
    for lock in locks:
        await keep(api, lock)
    await api.delete(f"/users/{users[0]['id']}?force=true")
    assert await stored(database, users) == {users[1]["id"], users[2]["id"]}
    over = f"where user_id = '{users[1]['id']}'"
    await execute(database, f"update user_sessions set ends_at = now() {over}", "select 1")
    await execute(database, f"update locks set session_until = now() {over}", "select 1")
    await execute(database, PRUNE)
    assert await stored(database, users) == {users[2]["id"]}
    assert (await execute(database, f"select session_until from locks {over}"))[0][0] is None
    assert (await kept(api, locks[2])).status_code == 200


PRUNE = SQL["prune_sessions"].replace("$1::int", "100")


async def stored(database, users):
    rows = await execute(database, "select user_id::text from user_sessions")
    return {row["user_id"] for row in rows} & {user["id"] for user in users}


async def test_one_that_is_stored_anew_as_it_is_forgotten_stays(api, project, lock, database):
    await keep(api, lock)
    this = f"where user_id = '{lock['user']['id']}'"
    await execute(database, f"update user_sessions set ends_at = now() {this}", "select 1")
    connection = await asyncpg.connect(database)
    try:
        async with connection.transaction():
            await connection.execute(f"update user_sessions set ends_at = now() + interval '1 hour' {this}")
            pruning = asyncio.create_task(execute(database, PRUNE))
            await blocked(database)
        await pruning
    finally:
        await connection.close()
    assert (await kept(api, lock)).status_code == 200


async def test_who_stores_and_who_forgets_take_the_rows_in_one_order(api, lock, database):
    """First that of the lock, then that of the session: else each could wait for the other."""
    await keep(api, lock)
    this = f"where user_id = '{lock['user']['id']}'"
    await execute(database, f"update user_sessions set ends_at = now() {this}", "select 1")
    await execute(database, f"update locks set session_until = now() {this}", "select 1")
    connection = await asyncpg.connect(database)
    try:
        async with connection.transaction():
            await connection.execute(f"update locks set session_until = now() + interval '1 hour' {this}")
            pruning = asyncio.create_task(execute(database, PRUNE))
            await blocked(database)
            await connection.execute(f"update user_sessions set ends_at = now() + interval '1 hour' {this}")
        await pruning
    finally:
        await connection.close()
    assert (await kept(api, lock)).status_code == 200


async def test_neither_import_nor_export_carries_it(api, project, lock):
    canary = secrets.token_hex(12)
    await keep(api, lock, f'"{canary}"'.encode())
    exported = await api.get("/users/export", params={"project_id": project})
    assert json.loads(exported.text)["has_session"] is True
    assert canary not in exported.text
    line = json.dumps({"login": "bot-0", "project_id": project, "env": "stage", "session": canary})
    refused = await api.post("/users/import", content=line, headers={"Content-Type": "application/x-ndjson"})
    assert slug(refused) == "invalid"


# How it is sealed


async def test_moved_to_another_user_or_to_another_kind_it_does_not_open(api, project, database, caplog):
    users = await make_users(api, project, 2)
    one, two = [(await api.put(f"/users/{user['id']}/lock")).json() for user in users]
    await keep(api, one, b'"canary"')
    await keep(api, two)
    moved = "update user_sessions set sealed = other.sealed from user_sessions as other"
    await execute(
        database, f"{moved} where user_sessions.user_id = '{users[1]['id']}' and other.user_id = '{users[0]['id']}'"
    )
    refused = await kept(api, two)
    assert slug(refused) == "database-unavailable"
    as_password = "update users set secret = '$aes-256-gcm$k1$' || translate(encode(sealed, 'base64'), E'\\n', '')"
    await execute(database, f"{as_password} from user_sessions where user_id = users.id and id = '{users[0]['id']}'")
    await api.delete(f"/locks/{one['id']}")
    assert slug(await api.put(f"/users/{users[0]['id']}/lock")) == "database-unavailable"
    assert "does not open a session" in caplog.text
    assert "canary" not in refused.text + caplog.text
    for user in users:
        await api.delete(f"/users/{user['id']}?force=true")


def test_each_kind_has_its_own_seal():
    keyring, owner = farm.passwords.Keyring(KEY), uuid.uuid4()
    sealed = {kind: keyring.seal_as(kind, owner, b"x") for kind in ("password", "session", "totp")}
    for kind, text in sealed.items():
        for other in sealed:
            if other == kind:
                assert keyring.open_as(kind, owner, "k1", text) == b"x"
            else:
                with pytest.raises(farm.passwords.KeyFault, match=f"a {other}"):
                    keyring.open_as(other, owner, "k1", text)


async def test_without_keys_there_are_none(empty_database, project):
    with serving(settings(empty_database, keys=None)) as alone:
        async with client(alone.url) as api:
            await make_users(api, project)
            lock = (await acquire(api, project)).json()
            for answer in (await keep(api, lock), await kept(api, lock), await forget(api, lock)):
                assert slug(answer) == "not-sealed"
                assert answer.status_code == 409
                assert "BOTFARM_KEYS" in answer.json()["detail"]
            assert not await has_session(api, lock)


async def test_reseal_and_the_check_of_keys_know_of_them(empty_database, project):
    new = "k2:" + farm.passwords.generate_key().partition(":")[2]
    with serving(settings(empty_database)) as alone:
        async with client(alone.url) as api:
            await make_users(api, project, 60)
            for _ in range(60):  # more than are sealed anew at once
                lock = (await acquire(api, project)).json()
                await keep(api, lock, json.dumps(lock["user"]["login"]).encode())
    await execute(empty_database, "update users set secret = '$argon2id$'")  # only sessions are sealed
    env = {"DATABASE_URL": empty_database, "BOTFARM_KEYS": new}
    refused = command("serve", "--port", "1", env=env)
    assert refused.returncode == 3
    assert "'k1' is missing" in refused.stderr
    done = command("reseal", env=env | {"BOTFARM_KEYS": f"{new},{KEY}"})
    assert done.stdout == "60 secrets are now sealed under the key 'k2'\n", done.stderr
    with serving(settings(empty_database, keys=farm.settings.Secret(new))) as alone:
        async with client(alone.url) as api:
            users = (await api.get("/users", params={"limit": 100})).json()["items"]
            rows = await execute(empty_database, "select lock_id, user_id from locks")
            logins = {user["id"]: user["login"] for user in users}
            for row in rows:
                assert (await kept(api, {"id": row["lock_id"]})).json() == logins[str(row["user_id"])]


# To prefer one


async def test_who_prefers_a_session_gets_a_user_that_has_one(api, project, database):
    """While there is one that is free and fits; then any."""
    users = await make_users(api, project, 6)
    for user in users[2:5]:
        lock = (await api.put(f"/users/{user['id']}/lock")).json()
        await keep(api, lock)
        await api.delete(f"/locks/{lock['id']}")
    await execute(database, f"update locks set session_until = now() where user_id = '{users[4]['id']}'")
    await api.patch(f"/users/{users[3]['id']}", json={"labels": {"role": "admin"}})
    logins = []
    for wish in ({"labels": {"role": "admin"}, "env": "stage"}, {}, {}, {"prefer": "any"}):
        lock = (await acquire(api, project, **({"prefer": "session", "note": "n"} | wish))).json()
        logins.append(lock["user"]["login"])
    assert logins[:2] == ["bot-3", "bot-2"]
    assert set(logins[2:]) < {"bot-0", "bot-1", "bot-4", "bot-5"}


async def test_a_user_whose_lock_ran_out_is_free_for_those_too(api, project, database):
    users = await make_users(api, project, 3)
    lock = (await api.put(f"/users/{users[1]['id']}/lock")).json()
    await keep(api, lock)
    await pass_time(database, users[1]["id"])
    assert (await acquire(api, project, prefer="session")).json()["user"]["id"] == users[1]["id"]


async def test_a_preference_is_no_condition_and_has_two_words(api, project):
    assert slug(await acquire(api, project, prefer="session")) == "no-matching-user"
    await make_users(api, project)
    for prefer in ("Session", None, "", True):
        assert slug(await acquire(api, project, prefer=prefer)) == "invalid"
    key = uuid.uuid4()
    locks = [(await acquire(api, project, prefer="session", key=key)).json() for _ in range(2)]
    assert locks[0] == locks[1]
    assert slug(await acquire(api, project, prefer="session")) == "pool-exhausted"
    assert slug(await api.put(f"/users/{locks[0]['user']['id']}/lock", json={"prefer": "session"})) == "invalid"


async def test_who_waits_gets_whoever_comes_free_with_a_session_or_without(api, project):
    users = await make_users(api, project, 2)
    one, two = [(await api.put(f"/users/{user['id']}/lock")).json() for user in users]
    await keep(api, one)
    waiting = asyncio.create_task(acquire(api, project, prefer="session", wait=20))
    await asyncio.sleep(0.3)
    await api.delete(f"/locks/{two['id']}")
    assert (await waiting).json()["user"]["login"] == "bot-1"


async def test_a_repeat_with_a_key_finds_the_lock_that_preferred_a_session(api, project):
    for user in await make_users(api, project, 3):
        lock = (await api.put(f"/users/{user['id']}/lock")).json()
        await keep(api, lock)
        await api.delete(f"/locks/{lock['id']}")
    key = uuid.uuid4()
    answers = await asyncio.gather(*(acquire(api, project, prefer="session", key=key) for _ in range(5)))
    assert len({answer.json()["id"] for answer in answers}) == 1


async def test_many_who_prefer_one_share_all_that_there_are(api, project, service, database):
    """At two replicas, 20 users with a session and 20 without: nobody takes one without before all others are gone."""
    users = await make_users(api, project, 40)
    kept = [user["id"] for user in users[10:30]]
    ids = ", ".join(f"'{id}'" for id in kept)
    await execute(database, f"update locks set session_until = now() + interval '1 hour' where user_id in ({ids})")
    with serving(settings(database)) as second:
        async with client(second.url) as other:
            calls = [acquire((api, other)[n % 2], project, prefer="session") for n in range(20)]
            answers = await asyncio.gather(*calls)
            assert {answer.json()["user"]["id"] for answer in answers} == set(kept)
            answers = await asyncio.gather(
                *(acquire((api, other)[n % 2], project, prefer="session") for n in range(21))
            )
            assert sorted(answer.status_code for answer in answers) == [201] * 20 + [409]


async def test_nobody_who_prefers_one_goes_before_those_who_wait(api, project, lock, database):
    """Also not in the moment in which a user is free and the desk has not looked yet."""
    await keep(api, lock)
    waiting = asyncio.create_task(acquire(api, project, wait=20, holder="first"))
    await asyncio.sleep(0.3)
    freed = f"update locks set lock_id = null, ready_at = now() where lock_id = '{lock['id']}'"
    connection = await asyncpg.connect(database)
    await connection.execute(freed)
    later = await acquire(api, project, holder="second", prefer="session")
    await connection.close()
    assert slug(later) == "pool-exhausted"
    assert (await waiting).json()["holder"] == "first"
