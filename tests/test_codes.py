"""One-time codes: RFC 6238, each code given out once over all replicas, by the database's clock alone."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from urllib.parse import quote

import asyncpg
import httpx
import pytest
from conftest import (
    KEY,
    acquire,
    blocked,
    client,
    command,
    execute,
    free_port,
    make_users,
    pass_time,
    process,
    serving,
    settings,
    slug,
    wait_ready,
)

import farm.codes
import farm.settings
from farm.codes import Generator, read_totp

SECRET = "JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP"
SEED = b"12345678901234567890" * 4
SEEDS = {"SHA1": SEED[:20], "SHA256": SEED[:32], "SHA512": SEED[:64]}


async def give(api, lock):
    return await api.post(f"/locks/{lock['id']}/totp")


def step(answer):
    """Of an answer with a code: the end of its step, in seconds since 1970."""
    return int(datetime.fromisoformat(answer.json()["valid_until"]).timestamp())


def expected(answer, totp=SECRET):
    generator = read_totp(totp)
    return generator.code(step(answer) - generator.period)


@pytest.fixture
def short_steps(empty_database, monkeypatch):
    """Steps of a second, whose codes are given up to their end: else a test would wait for half a minute."""
    monkeypatch.setattr(farm.codes, "SPARE", 0)
    constraint = 'alter table user_codes drop constraint "a period is 15 to 120 seconds"'
    default = "create function one() returns trigger language plpgsql as 'begin new.period = 1; return new; end'"
    trigger = "create trigger one before insert on user_codes for each row execute function one()"
    asyncio.run(execute(empty_database, constraint, default, trigger))
    return empty_database


# The code itself


@pytest.mark.parametrize("algorithm", SEEDS)
@pytest.mark.parametrize(
    ("moment", "codes"),
    [
        (59, ("94287082", "46119246", "90693936")),
        (1111111109, ("07081804", "68084774", "25091201")),
        (1111111111, ("14050471", "67062674", "99943326")),
        (1234567890, ("89005924", "91819424", "93441116")),
        (2000000000, ("69279037", "90698825", "38618901")),
        (20000000000, ("65353130", "77737706", "47863826")),
    ],
)
def test_the_codes_are_those_of_rfc_6238_appendix_b(algorithm, moment, codes):
    told = dict(zip(SEEDS, codes, strict=True))[algorithm]
    secret = base64.b32encode(SEEDS[algorithm]).decode()
    generator = read_totp(f"otpauth://totp/RFC:6238?secret={secret}&algorithm={algorithm}&digits=8&period=30")
    began = moment // generator.period * generator.period
    assert generator.code(began) == told
    assert Generator(SEEDS[algorithm], algorithm, 6).code(began) == told[2:]


@pytest.mark.parametrize("period", [15, 30, 60, 120])
def test_a_period_is_a_step_of_its_length(period):
    """The counts 0 to 9 of RFC 4226 appendix D."""
    told = ["755224", "287082", "359152", "969429", "338314", "254676", "287922", "162583", "399871", "520489"]
    generator = read_totp(f"otpauth://totp/x?secret={base64.b32encode(SEEDS['SHA1']).decode()}&period={period}")
    assert [generator.code(count * period) for count in range(10)] == told


@pytest.mark.parametrize(
    "text",
    [
        SECRET.lower(),
        " ".join(SECRET[place : place + 4] for place in range(0, 32, 4)),
        f"{SECRET} \n",
        f"otpauth://totp/ACME:ada@example.org?secret={SECRET}&issuer=ACME",
        f"OTPAUTH://TOTP/ada?algorithm=sha1&digits=6&period=30&secret={SECRET.lower()}&image=x",
        f"otpauth://totp/?secret={quote(SECRET[:16] + ' ' + SECRET[16:])}",
    ],
)
def test_a_secret_may_be_written_in_these_ways(text):
    assert read_totp(text) == read_totp(SECRET)


@pytest.mark.parametrize("length", range(10, 16))
def test_base32_may_lack_its_padding(length):
    whole = base64.b32encode(SEED[:length]).decode()
    assert read_totp(whole) == read_totp(whole.rstrip("=")) == Generator(SEED[:length])


BAD = {
    "canary-1": "base32",
    "JBSWY3DPCANARY0": "base32",
    "JBSWY3DPCANARYAA=A": "base32",
    "JBSWY3DPCANARYA": "10 bytes",
    "JBSWY3DPCANARYÄÄ": "base32",
    "": "10 bytes",
    "otpauth://hotp/canary?secret=" + SECRET: "otpauth://totp/",
    "otpauth:canary": "otpauth://totp/",
    "otpauth://totp/canary": "10 bytes",
    f"otpauth://totp/canary?secret={SECRET}&secret=CANARY": "twice",
    f"otpauth://totp/canary?secret={SECRET}&algorithm=CANARY": "SHA1, SHA256, SHA512",
    f"otpauth://totp/canary?secret={SECRET}&digits=9": "6 to 8",
    f"otpauth://totp/canary?secret={SECRET}&digits=canary": "6 to 8",
    f"otpauth://totp/canary?secret={SECRET}&period=14": "15 to 120",
    f"otpauth://totp/canary?secret={SECRET}&period=121": "15 to 120",
    f"otpauth://totp/canary?secret={SECRET}&period=3e1": "15 to 120",
    f"otpauth://totp/canary?secret={SECRET}&digits=": "6 to 8",
    "otpauth://[canary/": "otpauth://totp/",
    "otpauth://[canary]/": "otpauth://totp/",
    "otpauth://canary\u2100/": "otpauth://totp/",
    "canary" * 400: "over 2000 characters",
}


@pytest.mark.parametrize(("text", "told"), BAD.items(), ids=range(len(BAD)))
async def test_what_is_none_is_refused_and_not_shown(api, project, text, told):
    (user,) = await make_users(api, project)
    body = {"login": "ada", "password": "p", "project_id": project, "env": "stage", "totp": text}
    for answer in (await api.post("/users", json=body), await api.patch(f"/users/{user['id']}", json={"totp": text})):
        assert slug(answer) == "invalid"
        (error,) = answer.json()["errors"]
        assert error["field"] == "totp"
        assert told in error["message"]
        assert "canary" not in answer.text.lower()
        assert SECRET not in answer.text
    listed = (await api.get("/users", params={"project_id": project})).json()["items"]
    assert [(user["login"], user["has_totp"]) for user in listed] == [("bot-0", False)]


@pytest.mark.parametrize("value", [7, [SECRET], {"secret": SECRET}])
async def test_a_secret_that_is_no_text_is_not_shown_either(api, project, value):
    (user,) = await make_users(api, project)
    answer = await api.patch(f"/users/{user['id']}", json={"totp": value})
    assert slug(answer) == "invalid"
    assert SECRET not in answer.text


# Who is given it


async def test_a_holder_is_given_the_present_code(api, project):
    (user,) = await make_users(api, project, totp=SECRET)
    assert user["has_totp"]
    assert SECRET not in json.dumps(user)
    lock = (await acquire(api, project)).json()
    answer = await give(api, lock)
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json() == {"code": expected(answer), "valid_until": answer.json()["valid_until"]}
    assert 5 - 1 < step(answer) - datetime.now(UTC).timestamp() <= 30


async def test_the_clock_of_the_service_counts_for_nothing(api, project, monkeypatch):
    await make_users(api, project, totp=f"otpauth://totp/x?secret={SECRET}&digits=8&period=60&algorithm=SHA512")
    lock = (await acquire(api, project)).json()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    answer = await give(api, lock)
    assert 5 - 1 < step(answer) - real() <= 65
    generator = read_totp(f"otpauth://totp/x?secret={SECRET}&digits=8&period=60&algorithm=SHA512")
    assert answer.json()["code"] == generator.code(step(answer) - 60)


async def test_who_comes_second_waits_for_the_next_and_who_can_have_none_is_told_when(short_steps, project):
    with serving(settings(short_steps)) as alone:
        async with client(alone.url) as api:
            await make_users(api, project, totp=SECRET)
            lock = (await acquire(api, project)).json()
            await asyncio.sleep(1.05 - time.time() % 1)  # the beginning of a step, as far as we know
            answers = await asyncio.gather(*(give(api, lock) for _ in range(3)))
            refused = [answer for answer in answers if answer.status_code != 200]
            first, second = sorted(step(answer) for answer in answers if answer.status_code == 200)
            assert second == first + 1
            assert [slug(answer) for answer in refused] == ["code-spent"]
            assert refused[0].status_code == 409
            assert refused[0].headers["retry-after"] == "1"


async def test_a_code_that_is_about_to_end_is_not_given_any_more(short_steps, project, monkeypatch):
    """With steps of four seconds, of which the last three are too late."""
    monkeypatch.setattr(farm.codes, "SPARE", 3)
    await execute(short_steps, "drop trigger one on user_codes", "select 1")
    with serving(settings(short_steps)) as alone:
        async with client(alone.url) as api:
            await make_users(api, project, totp=SECRET)
            lock = (await acquire(api, project)).json()
            await execute(short_steps, "update user_codes set period = 4")
            for _ in range(2):
                answer = await give(api, lock)
                assert step(answer) - time.time() > 2.9


async def test_codes_go_out_once_and_in_order_over_two_replicas(short_steps, project, long):
    """200 calls at a time; a call that begins after a code was told is given a later one."""
    with serving(settings(short_steps)) as one, serving(settings(short_steps)) as two:
        async with client(one.url) as first, client(two.url) as second:
            await make_users(first, project, totp=SECRET)
            lock = (await acquire(first, project)).json()
            secret, seen = read_totp(SECRET).secret, []

            async def ask(api):
                begun = time.monotonic()
                answer = await give(api, lock)
                busy = "database-unavailable"  # on a slow machine; so many calls want one row
                assert answer.status_code == 200 or slug(answer) in ("code-spent", busy)
                if answer.status_code == 200:
                    assert answer.json()["code"] == Generator(secret, period=1).code(step(answer) - 1)
                    seen.append((step(answer), begun, time.monotonic()))

            for _ in range(5 if long else 1):
                await asyncio.gather(*(ask(api) for _ in range(100) for api in (first, second)))
    steps = [given for given, *_ in seen]
    assert len(steps) >= 2
    assert len(steps) == len(set(steps))
    assert not [(a, b) for a, _, told in seen for b, begun, _ in seen if told < begun and b <= a]


async def test_two_that_ask_in_one_moment_are_not_given_one_code(short_steps, project):
    """Both have begun while somebody else has the row of the lock, and go on when it is free.

    Who comes second is given the next, or told that it is too late for that: it has waited for the row already.
    """
    with serving(settings(short_steps)) as one, serving(settings(short_steps)) as two:
        async with client(one.url) as first, client(two.url) as second:
            await make_users(first, project, totp=SECRET)
            lock = (await acquire(first, project)).json()
            connection = await asyncpg.connect(short_steps)
            try:
                async with connection.transaction():
                    await connection.execute("select from locks for update")
                    calls = [asyncio.create_task(give(api, lock)) for api in (first, second)]
                    await blocked(short_steps, 2)
            finally:
                await connection.close()
            answers = await asyncio.gather(*calls)
            given = [answer for answer in answers if answer.status_code == 200]
            assert given
            assert len({step(answer) for answer in given}) == len(given)
            assert {slug(answer) for answer in answers if answer not in given} <= {"code-spent"}


async def test_where_the_lock_ends_meanwhile_nobody_is_given_a_code(short_steps, project, monkeypatch):
    monkeypatch.setattr(farm.codes, "SPARE", 5)  # longer than a step, so that each call waits
    with serving(settings(short_steps)) as alone:
        async with client(alone.url) as api:
            await make_users(api, project, totp=SECRET)
            lock = (await acquire(api, project)).json()
            waiting = asyncio.create_task(give(api, lock))
            await asyncio.sleep(0.1)
            await api.delete(f"/locks/{lock['id']}")
            assert slug(await waiting) == "lock-not-held"
    assert (await execute(short_steps, "select spent_until from user_codes"))[0][0] == 0


async def test_a_lock_that_ends_while_its_call_has_its_turn_to_come_spends_nothing(api, project, database):
    await make_users(api, project, totp=SECRET)
    lock = (await acquire(api, project)).json()
    this = f"from user_codes where user_id = '{lock['user']['id']}'"
    connection = await asyncpg.connect(database)
    try:
        async with connection.transaction():
            await connection.execute(f"select {this} for update")
            late = asyncio.create_task(give(api, lock))
            await blocked(database)
            assert (await api.delete(f"/locks/{lock['id']}")).status_code == 204
    finally:
        await connection.close()
    answer = await late
    assert answer.status_code == 404, "it was given a code"
    assert slug(answer) == "lock-not-held"
    assert (await execute(database, f"select spent_until {this}"))[0][0] == 0


async def test_a_call_that_says_what_it_has_no_field_for_spends_nothing(api, project, database):
    await make_users(api, project, totp=SECRET)
    lock = (await acquire(api, project)).json()
    path = f"/locks/{lock['id']}/totp"
    for sent in ({"params": {"digits": 8}}, {"json": {"digits": 8}}):
        assert slug(await api.post(path, **sent)) == "invalid"
    assert slug(await api.post(path, content="x", headers={"Content-Type": "text/plain"})) == "unsupported-media-type"
    spent = f"select spent_until from user_codes where user_id = '{lock['user']['id']}'"
    assert (await execute(database, spent))[0][0] == 0
    assert (await api.post(path, json={})).status_code == 200


async def test_a_former_holder_spends_nothing_of_the_next_ones(api, project, database):
    await make_users(api, project, totp=SECRET)
    lock = (await acquire(api, project)).json()
    await pass_time(database, lock["user"]["id"])
    assert slug(await give(api, lock)) == "lock-not-held"
    assert slug(await give(api, {"id": uuid.uuid4()})) == "lock-not-held"
    spent = f"select spent_until from user_codes where user_id = '{lock['user']['id']}'"
    assert (await execute(database, spent))[0][0] == 0
    assert (await acquire(api, project)).status_code == 201
    assert slug(await give(api, lock)) == "lock-not-held"
    assert (await execute(database, spent))[0][0] == 0


def test_who_waits_is_told_when_the_service_ends(short_steps, project):
    """And is not waited for."""
    port = str(free_port())
    env = {"DATABASE_URL": short_steps, "BOTFARM_KEYS": KEY}
    with process("--port", port, env=env, changes={"farm.codes.SPARE": 5}) as running, ThreadPoolExecutor(1) as thread:
        url = f"http://127.0.0.1:{port}"
        wait_ready(url)
        user = {"login": "ada", "password": "p", "project_id": project, "env": "stage", "totp": SECRET}
        httpx.post(f"{url}/users", json=user)
        lock = httpx.post(f"{url}/locks", json={"project_id": project}).json()
        waiting = thread.submit(httpx.post, f"{url}/locks/{lock['id']}/totp", timeout=20)
        time.sleep(0.5)
        begun = time.monotonic()
        running.terminate()
        assert slug(waiting.result()) == "shutting-down"
        assert running.wait(10) == 0
        assert time.monotonic() - begun < 6


async def test_a_user_without_codes_has_none(api, project):
    await make_users(api, project)
    assert slug(await give(api, (await acquire(api, project)).json())) == "no-totp"


# How it comes and goes


async def test_it_comes_and_goes_by_patch(api, project, database):
    (user,) = await make_users(api, project)
    path = f"/users/{user['id']}"
    lock = (await acquire(api, project)).json()
    assert (await api.patch(path, json={"totp": SECRET})).json()["has_totp"]
    first = await give(api, lock)
    assert first.json()["code"] == expected(first)
    for change in ({}, {"labels": {"a": "b"}}, {"password": "new"}, {"domain": "canary"}):
        assert (await api.patch(path, json=change)).json()["has_totp"]
    other = base64.b32encode(SEED).decode()
    await api.patch(path, json={"totp": f"otpauth://totp/x?secret={other}&period=120"})
    rows = await execute(database, f"select * from user_codes where user_id = '{user['id']}'")
    assert rows[0]["spent_until"] == step(first), "the old secret may come back: what was spent stays so"
    assert farm.codes.opened(farm.passwords.Passwords(farm.passwords.Keyring(KEY)), rows[0]) == read_totp(
        f"otpauth://totp/x?secret={other}&period=120"
    )
    for _ in range(2):
        assert not (await api.patch(path, json={"totp": None})).json()["has_totp"]
    assert slug(await give(api, lock)) == "no-totp"
    (listed,) = (await api.get("/users", params={"project_id": project})).json()["items"]
    assert not listed["has_totp"]
    assert (await api.patch(path, json={"totp": SECRET})).json()["has_totp"]
    rows = await execute(database, f"select spent_until from user_codes where user_id = '{user['id']}'")
    assert rows[0]["spent_until"] == step(first), "what was spent stays so while there is no secret"
    (ada,) = await make_users(api, project, login="ada", totp=None)
    assert not ada["has_totp"]


async def test_it_goes_with_its_user(api, project, database):
    (user,) = await make_users(api, project, totp=SECRET)
    await api.delete(f"/users/{user['id']}")
    assert await execute(database, f"select from user_codes where user_id = '{user['id']}'") == []


async def test_moved_to_another_user_it_makes_no_code(api, project, database, caplog):
    users = [*(await make_users(api, project, totp=SECRET)), *(await make_users(api, project, login="b", totp=SECRET))]
    moved = "update user_codes set sealed = other.sealed from user_codes as other"
    await execute(
        database, f"{moved} where user_codes.user_id = '{users[1]['id']}' and other.user_id = '{users[0]['id']}'"
    )
    lock = (await api.put(f"/users/{users[1]['id']}/lock")).json()
    assert slug(await give(api, lock)) == "database-unavailable"
    assert "does not open a totp" in caplog.text
    await api.delete(f"/users/{users[1]['id']}?force=true")


async def test_without_keys_there_is_none(empty_database, project):
    with serving(settings(empty_database, keys=None)) as alone:
        async with client(alone.url) as api:
            (user,) = await make_users(api, project)
            body = {"login": "ada", "password": "p", "project_id": project, "env": "stage"}
            calls = [api.post("/users", json=body | {"totp": SECRET})]
            calls += [api.patch(f"/users/{user['id']}", json={"totp": totp}) for totp in (SECRET, None)]
            calls += [give(api, (await acquire(api, project)).json())]
            for answer in await asyncio.gather(*calls):
                assert slug(answer) == "not-sealed"
            assert (await api.post("/users", json=body)).status_code == 201


async def test_reseal_and_the_check_of_keys_know_of_it(empty_database, project):
    new = "k2:" + farm.passwords.generate_key().partition(":")[2]
    with serving(settings(empty_database)) as alone:
        async with client(alone.url) as api:
            await make_users(api, project, totp=SECRET)
    await execute(empty_database, "update users set secret = '$argon2id$'")  # only the codes are sealed
    env = {"DATABASE_URL": empty_database, "BOTFARM_KEYS": new}
    refused = command("serve", "--port", "1", env=env)
    assert refused.returncode == 3
    assert "'k1' is missing" in refused.stderr
    done = command("reseal", env=env | {"BOTFARM_KEYS": f"{new},{KEY}"})
    assert done.stdout == "1 secrets are now sealed under the key 'k2'\n", done.stderr
    with serving(settings(empty_database, keys=farm.settings.Secret(new))) as alone:
        async with client(alone.url) as api:
            answer = await give(api, (await acquire(api, project)).json())
            assert answer.json()["code"] == expected(answer)


# Imports


async def send(api, text, media="application/x-ndjson"):
    return await api.post("/users/import", content=text, headers={"Content-Type": media})


def line(project, **values):
    return json.dumps({"login": "bot-0", "project_id": project, "env": "stage"} | values)


async def test_an_import_brings_keeps_changes_and_takes_out(api, project):
    async def sent(**values):
        answer = (await send(api, line(project, **values))).json()
        (user,) = (await api.get("/users", params={"project_id": project})).json()["items"]
        return next(kind for kind, count in answer.items() if count), user["has_totp"]

    other = base64.b32encode(SEED).decode()
    assert await sent(password="p", totp=SECRET) == ("created", True)
    assert await sent() == ("unchanged", True)
    assert await sent(totp=f"otpauth://totp/x?secret={SECRET.lower()}") == ("unchanged", True)
    assert await sent(totp=f"otpauth://totp/x?secret={SECRET}&period=60") == ("updated", True)
    assert await sent(totp=other, labels={"a": "b"}) == ("updated", True)
    lock = (await acquire(api, project)).json()
    answer = await give(api, lock)
    assert answer.json()["code"] == expected(answer, other)
    assert await sent(totp=None, labels={"a": "b"}) == ("updated", False)
    assert await sent(totp=None, labels={"a": "b"}) == ("unchanged", False)


async def test_a_csv_has_a_column_for_it_whose_empty_cells_keep_what_is_there(api, project):
    await make_users(api, project, totp=SECRET)
    text = f"login,totp,project_id,env,password\nbot-0,,{project},stage,\nbot-1,{SECRET},{project},stage,p\n"
    text += f"bot-2,,{project},stage,p\n"
    assert (await send(api, text, "text/csv")).json() == {"created": 2, "updated": 0, "unchanged": 1}
    users = (await api.get("/users", params={"project_id": project})).json()["items"]
    assert [user["has_totp"] for user in users] == [True, True, False]


@pytest.mark.parametrize("canary", ["CANARY" + "A" * 20 + "1", "otpauth://[CANARY]/", ""])
async def test_an_import_with_one_bad_secret_stores_nothing_and_shows_nothing(api, project, canary):
    lines = [line(project, login=f"u{n}", password="p", totp=SECRET) for n in range(3)]
    answer = await send(api, "\n".join([*lines, line(project, login="bad", password="p", totp=canary)]))
    assert slug(answer) == "invalid"
    (error,) = answer.json()["errors"]
    assert (error["line"], error["field"]) == (4, "totp")
    assert "CANARY" not in answer.text
    assert (await api.get("/users", params={"project_id": project})).json()["items"] == []


async def test_what_is_exported_has_no_secret_and_keeps_the_codes_when_it_comes_back(api, project):
    await make_users(api, project, totp=SECRET)
    for media in ("application/x-ndjson", "text/csv"):
        exported = await api.get("/users/export", params={"project_id": project}, headers={"Accept": media})
        assert SECRET not in exported.text
        assert (await send(api, exported.text, media)).json() == {"created": 0, "updated": 0, "unchanged": 1}
        (user,) = (await api.get("/users", params={"project_id": project})).json()["items"]
        assert user["has_totp"]


async def test_an_import_without_keys_refuses_it(empty_database, project):
    with serving(settings(empty_database, keys=None)) as alone:
        async with client(alone.url) as api:
            for totp in (SECRET, "none", None):
                assert slug(await send(api, line(project, password="p", totp=totp))) == "not-sealed"
            csv = f"login,password,project_id,env,totp\nbot-0,p,{project},stage,\n"
            assert (await send(api, csv, "text/csv")).json()["created"] == 1
