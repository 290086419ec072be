"""Passwords: sealed or hashed, never seen, and keys that are wrong or go."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import re
import sys
import threading
import uuid

import argon2
import asyncpg
import pytest
from conftest import KEY, acquire, client, command, execute, make_users, serving, settings, slug

import farm.embedded
import farm.passwords
import farm.settings

OTHER = "k2:" + base64.b64encode(b"2" * 32).decode()
CANARY = "canary-7f3a9"


async def everything(url):
    """All rows of all tables, as text."""
    tables = await execute(
        url, "select relname from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace"
    )
    rows = [await execute(url, f'select t::text from "{table["relname"]}" t') for table in tables]
    return "\n".join(row["t"] for table in rows for row in table)


async def test_a_password_is_seen_in_the_granting_reply_alone(empty_database, project, caplog):
    caplog.set_level(logging.DEBUG)
    replies = []
    with serving(settings(empty_database)) as alone:
        async with client(alone.url) as api:

            async def say(method, path, **options):
                answer = await api.request(method, path, **options)
                replies.append(f"{answer.headers}{answer.text}")
                return answer

            body = {"login": "ada", "password": CANARY, "project_id": project, "env": "prod"}
            user = (await say("POST", "/users", json=body)).json()
            path = f"/users/{user['id']}"
            await say("POST", "/users", json=body)
            await say("POST", "/users", json=body | {"env": "moon"})
            await say("POST", "/users", json=body | {"password": CANARY * 200})
            await say("POST", "/users", json=body | {"password": [CANARY]})
            await say(
                "POST", "/users", content=f'{{"password": "{CANARY}"', headers={"Content-Type": "application/json"}
            )
            lines = f'{{"login": "b", "password": "{CANARY}", "project_id": "{project}", "env": "moon"}}\n{CANARY}'
            await say("POST", "/users/import", content=lines, headers={"Content-Type": "application/x-ndjson"})
            bare = f"login-1,{CANARY},{project},prod\n"
            await say("POST", "/users/import", content=bare, headers={"Content-Type": "text/csv"})
            csv = f'login,password,project_id,env\nx,"{CANARY}\x00",{project},prod\ny,{CANARY}\n"{CANARY}"x,\n'
            await say("POST", "/users/import", content=csv, headers={"Content-Type": "text/csv"})
            await say("PATCH", path, json={"password": CANARY, "login": ""})
            await say("POST", f"{path}/verify", json={"password": CANARY})
            granted = await api.post("/locks", json={"project_id": project})
            assert granted.json()["user"]["password"] == CANARY
            lock = f"/locks/{granted.json()['id']}"
            for method, where in [("GET", lock), ("PATCH", lock), ("GET", "/users"), ("GET", path), ("GET", "/pools")]:
                await say(method, where)
            await say("GET", f"{path}/history")
            await say("GET", "/users/export")
            await say("DELETE", lock)
    assert not [reply for reply in replies if CANARY in reply]
    assert CANARY not in caplog.text
    stored = await everything(empty_database)
    assert "$aes-256-gcm$k1$" in stored
    assert CANARY not in stored


async def test_without_a_key_only_a_hash_is_stored(empty_database, project):
    with serving(settings(empty_database, keys=None)) as alone:
        async with client(alone.url) as api:
            (user,) = await make_users(api, project)
            secret = (await execute(empty_database, "select secret from users"))[0]["secret"]
            assert re.match(r"\$argon2id\$v=19\$m=19456,t=2,p=1\$", secret)
            assert (await acquire(api, project)).json()["user"]["password"] is None
            verify = f"/users/{user['id']}/verify"
            assert (await api.post(verify, json={"password": "pw-0"})).json() == {"valid": True}
            assert (await api.post(verify, json={"password": "pw-1"})).json() == {"valid": False}
            line = f'{{"login": "bot-0", "password": "pw-0", "project_id": "{project}", "env": "stage"}}'
            answer = await api.post("/users/import", content=line, headers={"Content-Type": "application/x-ndjson"})
            assert answer.json() == {"created": 0, "updated": 0, "unchanged": 1}


async def test_hashing_stalls_no_acquire(empty_database, project, monkeypatch):
    """It runs in threads of its own, two at a time, never in the one that serves."""
    threads, running, most = set(), 0, 0

    class Watched(argon2.PasswordHasher):
        def hash(self, *arguments, **options):
            nonlocal running, most
            running += 1
            most = max(most, running)
            threads.add(threading.current_thread().name)
            try:
                return super().hash(*arguments, **options)
            finally:
                running -= 1

    monkeypatch.setattr(farm.passwords, "HASHER", Watched(time_cost=2, memory_cost=19456, parallelism=1))
    with serving(settings(empty_database, keys=None)) as alone:
        async with client(alone.url) as api:
            await make_users(api, project, 2)
            creates = asyncio.gather(*(make_users(api, project, 1, login=f"x{n}") for n in range(20)))
            while not creates.done():
                answer = await acquire(api, project)
                assert (await api.delete(f"/locks/{answer.json()['id']}")).status_code == 204
            await creates
    assert threads == {"argon2_0", "argon2_1"}
    assert most == 2


def test_a_secret_moved_to_another_user_does_not_open():
    keyring = farm.passwords.Keyring(KEY)
    one, two = uuid.uuid4(), uuid.uuid4()
    secret = keyring.seal(one, CANARY)
    assert keyring.open(one, secret) == CANARY
    assert keyring.seal(one, CANARY) != secret
    with pytest.raises(farm.passwords.KeyFault):
        keyring.open(two, secret)
    with pytest.raises(farm.passwords.KeyFault):
        farm.passwords.Passwords(None).reveal(one, secret)


@pytest.mark.parametrize(
    "text", ["", "k1", "k1:short", "k1:" + "A" * 44, f"{KEY},{KEY}", f"{KEY},", "k 1:" + "A" * 43 + "="]
)
def test_a_malformed_key_is_refused_without_showing_it(text):
    with pytest.raises(ValueError, match=r"key") as refused:
        farm.passwords.Keyring(text)
    assert "AAAA" not in str(refused.value)


def test_a_wrong_or_missing_key_is_found_at_the_start(empty_database, project):
    with serving(settings(empty_database)):
        pass
    env = {"DATABASE_URL": empty_database}
    wrong = "k1:" + base64.b64encode(b"x" * 32).decode()
    refused = command("serve", "--port", "1", env=env | {"BOTFARM_KEYS": wrong})
    assert refused.returncode == 3
    assert "'k1' is not the one" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert wrong[3:] not in refused.stderr
    asyncio.run(fill(empty_database, project))
    for keys in ({}, {"BOTFARM_KEYS": OTHER}):
        refused = command("serve", "--port", "1", env=env | keys)
        assert refused.returncode == 3
        assert "'k1' is missing" in refused.stderr


async def fill(url, project, count=3):
    with serving(settings(url)) as alone:
        async with client(alone.url) as api:
            await make_users(api, project, count)


async def test_keys_are_rotated_while_locks_are_taken(empty_database, project):
    await fill(empty_database, project, 5)
    both = f"{OTHER},{KEY}"
    with serving(settings(empty_database, keys=farm.settings.Secret(both))) as alone:
        async with client(alone.url) as api:
            env = {"DATABASE_URL": empty_database, "BOTFARM_KEYS": both}
            job = asyncio.create_task(asyncio.to_thread(command, "reseal", env=env))
            seen = set()
            while not job.done() or len(seen) < 5:
                lock = (await acquire(api, project)).json()
                seen.add((lock["user"]["login"], lock["user"]["password"]))
                await api.delete(f"/locks/{lock['id']}")
            done = await job
            assert (done.returncode, done.stdout) == (0, "5 secrets are now sealed under the key 'k2'\n"), done.stderr
            assert seen == {(f"bot-{n}", f"pw-{n}") for n in range(5)}
    with serving(settings(empty_database, keys=farm.settings.Secret(OTHER))) as alone:
        async with client(alone.url) as api:
            assert (await acquire(api, project)).json()["user"]["password"].startswith("pw-")
    assert [row["id"] for row in await execute(empty_database, "select id from sealing_keys")] == ["k2"]


async def test_the_schema_refuses_a_clear_password(empty_database, project):
    await fill(empty_database, project)
    with pytest.raises(asyncpg.CheckViolationError):
        await execute(empty_database, "update users set secret = 'hunter2'")


def test_secrets_in_settings_never_print():
    configured = farm.settings.Settings.load({"DATABASE_URL": f"postgresql://u:{CANARY}@h/d", "BOTFARM_KEYS": KEY})
    assert CANARY not in repr(configured)
    assert "AAAA" not in repr(configured)
    assert configured.database_url
    assert CANARY not in f"{configured.database_url} {configured.database_url!r}"


async def test_a_password_that_does_not_open_locks_nobody(api, project, service, database):
    """A replica that lacks the key: the user goes back at once."""
    (user,) = await make_users(api, project, password=CANARY)
    other = farm.passwords.Keyring(OTHER).seal(uuid.UUID(user["id"]), CANARY)
    await execute(database, f"update users set secret = '{other}' where id = '{user['id']}'")
    for _ in range(2):
        assert slug(await acquire(api, project)) == "database-unavailable"
        assert slug(await api.post(f"/users/{user['id']}/verify", json={"password": "x"})) == "database-unavailable"
    assert (await api.get(f"/users/{user['id']}")).json()["state"] == "free"
    await api.delete(f"/users/{user['id']}")


@pytest.mark.skipif(sys.platform != "linux", reason="looks at what is written by /proc")
def test_a_key_that_was_made_survives_a_power_failure(tmp_path, monkeypatch):
    """The file is on the disk, and then its name in the folder."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    monkeypatch.setattr(farm.embedded, "settle_home", lambda home: home)
    keys = farm.passwords.load_keys(farm.settings.Settings(home=tmp_path))
    assert keys
    assert keys.reveal() == (tmp_path / "keys").read_text().strip()
    assert synced == [f"{tmp_path}/keys.new", f"{tmp_path}"]
