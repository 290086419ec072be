"""What people meet in the field: databases as they really are."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

import asyncpg
import psycopg
import pytest
import ready
from conftest import (
    KEY,
    ROOT,
    acquire,
    blocked,
    client,
    command,
    environment,
    execute,
    free_port,
    fresh_database,
    make_users,
    process,
    serving,
    settings,
    slug,
    wait_ready,
)
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from grid import Grid, Wire, answers, ask, eventually, postgres, replicas

import farm.database
import farm.migrations
import farm.settings
from farm.addresses import EMPTY, SchemaError, read_address, run_apart
from farm.database import SQL


@pytest.fixture(autouse=True)
def no_pooler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at here is the database itself."""
    monkeypatch.delenv("BOTFARM_TEST_POOLER", raising=False)


def as_role(url: str, role: str, **more: str) -> str:
    """The database by another login."""
    _, real = farm.migrations.look(url)
    query = {"host": real["host"], "port": real["port"], "user": role} | more
    return f"postgresql:///{real['dbname']}?{urlencode(query, quote_via=quote)}"


@pytest.fixture
async def role(server: str) -> AsyncIterator[str]:
    """A login that may do nothing yet. (The fixture of its database comes later in a test, so that goes first.)"""
    name = f"bf_{uuid.uuid4().hex[:12]}"
    await execute(server, f"create role {name} login")
    yield name
    await execute(server, f"drop role {name}")


def refused(url: str, *words: str, **env: str) -> str:
    """What a start says that is refused: one line to three, status 3; and `migrate` the same with 1."""
    told = set()
    for status, command_words in ((3, ("serve", "--port", str(free_port()))), (1, ("migrate",))):
        run = command(*command_words, env={"DATABASE_URL": url} | env)
        assert run.returncode == status, run.stderr
        assert "Traceback" not in run.stderr
        assert 1 <= run.stderr.count("\n") <= 3, run.stderr
        told.add("".join(line for line in run.stderr.splitlines(True) if "fsync off" not in line))  # that of the tests
    assert len(told) == 1, told
    (text,) = told
    for word in words:
        assert word in text, text
    return text


@pytest.mark.parametrize(
    "statement",
    [
        "create table users (id int)",
        "create view users as select 1 as id",
        "create materialized view locks as select 1 as id",
        "create sequence history",
        "create type pools as enum ('a')",
        "create domain waiting as text",
        "create index users_by_age on other (id)",
        "create table _yoyo_migration (id int)",
        "create table _yoyo_version (id int)",
        "create table _yoyo_log (id int)",
        "create type botfarm_migrating as enum ('a')",
    ],
)
async def test_what_is_in_the_way_of_a_migration_is_told_at_once_with_the_way_out(bare_database, statement):
    await execute(bare_database, "create table other (id int)", statement)
    name = "users_by_age" if "index" in statement else statement.split()[statement.startswith("create mat") + 2]
    with pytest.raises(SchemaError) as told:
        farm.migrations.migrate(bare_database)
    assert name in str(told.value) or name.startswith("_yoyo")
    assert str(told.value).endswith(EMPTY)
    await execute(bare_database, "create schema own")
    path = f"{bare_database}{'&' if '?' in bare_database else '?'}options=-c%20search_path%3Down"
    assert farm.migrations.migrate(path) == farm.migrations.MIGRATIONS
    (row,) = await execute(bare_database, "select count(*) from pg_tables where schemaname = 'own'")
    assert row["count"] > 10


async def test_migrations_of_another_program_are_not_taken_for_a_newer_version(bare_database):
    await execute(
        bare_database,
        "create table _yoyo_migration (migration_hash text, migration_id text, applied_at_utc timestamp)",
        "insert into _yoyo_migration values ('x', '20200101_theirs', now())",
    )
    refused(bare_database, "Another program keeps its migrations", "20200101_theirs", "a schema of its own")


@pytest.mark.parametrize("lost", ["table users cascade", "table waiting", "view free_users", "table pools"])
async def test_a_schema_that_has_lost_a_part_is_refused_at_the_start(empty_database, lost):
    await execute(empty_database, f"drop {lost}")
    refused(empty_database, f"The database lacks the table {lost.split()[1]}.")


async def test_a_schema_that_has_lost_a_column_is_refused_at_the_start(empty_database):
    await execute(empty_database, "alter table clients drop column scopes")
    refused(empty_database, "The database lacks the column scopes of clients.")


async def test_what_a_start_looks_for_is_what_the_migrations_make(empty_database):
    columns = await execute(
        empty_database,
        "select relname::text as name, array_agg(attname::text) as columns from pg_class "
        "join pg_attribute on attrelid = pg_class.oid where relnamespace = current_schema()::regnamespace "
        "and relkind = 'r' and attnum > 0 and not attisdropped group by relname",
    )
    made = {row["name"]: set(row["columns"]) for row in columns if not re.search("yoyo|migrating", row["name"])}
    looked_for = re.findall(r"\('(\w+)','\{(.*?)\}'", re.sub(r"\s", "", farm.database.SQL["list_lacks"]))
    assert {name: set(listed.split(",")) for name, listed in looked_for if name in made} == made


async def test_a_parallel_start_is_waited_for_aloud_and_a_start_that_waits_ends_when_it_is_told_to(bare_database):
    await asyncio.to_thread(farm.migrations.migrate, bare_database)
    await asyncio.to_thread(farm.migrations.migrate, bare_database, rollback=True)
    other = await asyncpg.connect(bare_database)
    try:
        await other.execute("begin; lock table botfarm_migrating in exclusive mode")
        with process(env={"DATABASE_URL": bare_database, "BOTFARM_PORT": str(free_port())}) as waiting:
            await eventually(lambda: says(waiting, "The migration waits for others"), 20, "a word of waiting")
            began = time.monotonic()
            waiting.terminate()
            await asyncio.to_thread(waiting.wait, 10)
            assert time.monotonic() - began < 10
            assert "Traceback" not in ready.read(waiting.stdout)
        port = free_port()
        with process(env={"DATABASE_URL": bare_database, "BOTFARM_PORT": str(port)}) as waiting:
            await eventually(lambda: says(waiting, "The migration waits for others"), 20, "a word of waiting")
            await other.execute("rollback")
            await asyncio.to_thread(wait_ready, f"http://127.0.0.1:{port}")
    finally:
        await other.close()


async def says(running: Any, text: str) -> bool:
    return text in ready.read(running.stdout)


async def test_a_start_that_waits_for_a_database_ends_when_it_is_told_to_and_says_it_once():
    """Nothing is ever answered there."""
    with silent() as (listener, url), process(env={"DATABASE_URL": url, "BOTFARM_PORT": "1"}) as waiting:
        (await asyncio.to_thread(listener.accept))[0].close()
        waiting.terminate()
        await asyncio.to_thread(waiting.wait, 10)
        assert "hidden" not in ready.read(waiting.stdout)


@contextmanager
def silent() -> Iterator[tuple[socket.socket, str]]:
    """A server that answers nothing, and its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener, f"postgresql://u:hidden@127.0.0.1:{listener.getsockname()[1]}/d?connect_timeout=60"


def test_a_wait_for_the_database_ends_at_a_signal_also_where_asyncio_does_not():
    """As after an exception within asyncio itself, where its loop span in one of 100 starts that were told to end."""
    over = threading.Event()

    async def stubborn() -> None:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        while not over.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    def end(*_: object) -> None:
        threading.Timer(5, over.set).start()
        sys.exit()

    before = signal.signal(signal.SIGUSR1, end)
    try:
        with pytest.raises(SystemExit):
            run_apart(stubborn())
        assert not over.is_set()
    finally:
        signal.signal(signal.SIGUSR1, before)
        over.set()


def test_a_refusal_is_written_in_one_piece():
    """Unbuffered, as in many containers, print() writes a text and its end apart; a log line fell between them."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        env = environment({"DATABASE_URL": "postgresql://h/d?hostaddr=::1", "PYTHONUNBUFFERED": "1"})
        subprocess.run([sys.executable, "botfarm.py", "migrate"], env=env, cwd=ROOT, stderr=theirs, check=False)
        told = ours.recv(10_000).decode()
    assert "hostaddr can't be honoured" in told
    assert told.endswith("\n")


@contextmanager
def by_uvicorn(url: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """`uvicorn botfarm:app`, where nothing of ours looks first."""
    words = [sys.executable, "-m", "uvicorn", "botfarm:app", "--port", str(free_port())]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, env=environment({"DATABASE_URL": url} | env), cwd=ROOT, **pipes) as running:
        try:
            yield running
        finally:
            running.kill()


def test_a_start_by_uvicorn_that_fails_says_why_without_a_traceback(server):
    with by_uvicorn(urlunsplit(urlsplit(server)._replace(path="/no_such_database"))) as failing:
        told, _ = failing.communicate(timeout=30)
        assert failing.returncode == 3
    assert 'database \\"no_such_database\\" does not exist. Create it' in told
    assert "Traceback" not in told


def test_a_key_that_does_not_fit_is_told_without_a_traceback_by_uvicorn_too(empty_database):
    with serving(settings(empty_database)):
        pass
    with by_uvicorn(empty_database, BOTFARM_KEYS="k1:" + "B" * 43 + "=") as failing:
        told, _ = failing.communicate(timeout=30)
        assert failing.returncode == 3
    assert "the key 'k1' is not the one that this database was used with under that id" in told
    assert "Traceback" not in told


def test_bad_settings_are_told_without_a_traceback_by_uvicorn_too():
    with by_uvicorn("mysql://x") as failing:
        told, _ = failing.communicate(timeout=30)
    assert told == "Bad settings:\nDATABASE_URL: must begin with postgresql://\n"


def test_a_start_by_uvicorn_ends_when_it_is_told_to_however_long_it_may_wait_for_an_answer():
    with silent() as (listener, url), by_uvicorn(url) as waiting:
        listener.accept()[0].close()
        with listener.accept()[0]:  # without TLS, as `prefer` has it
            waiting.terminate()
            told, _ = waiting.communicate(timeout=10)
    assert "Traceback" not in told


async def test_a_start_by_uvicorn_that_waits_ends_when_it_is_told_to(bare_database):
    await asyncio.to_thread(farm.migrations.migrate, bare_database)
    await asyncio.to_thread(farm.migrations.migrate, bare_database, rollback=True)
    other = await asyncpg.connect(bare_database)
    try:
        await other.execute("begin; lock table botfarm_migrating in exclusive mode")
        with by_uvicorn(bare_database) as waiting:
            assert waiting.stdout
            lines = iter(waiting.stdout.readline, "")
            await asyncio.to_thread(lambda: next(line for line in lines if "The migration waits" in line))
            waiting.terminate()
            await asyncio.to_thread(waiting.wait, 10)
            assert "Traceback" not in waiting.stdout.read()
    finally:
        await other.close()


# A server that takes no writes any more, and keeps its connections.


async def test_after_a_demotion_behind_open_connections_the_new_primary_is_found(empty_database, tmp_path):
    name = urlsplit(empty_database).path
    async with postgres() as old:
        before = urlunsplit(urlsplit(old.dsn)._replace(path=name))
        await execute(old.dsn, f"create database {name[1:]}")
        wire = Wire(before)
        changes = {"farm.waiting.BEAT": 1}
        async with wire.open() as url, replicas(url, tmp_path, {}, changes=changes) as (replica,):
            grid = Grid([replica.port])
            await grid.create(3)
            held = await ask(replica.port, "POST", "/locks", {"project_id": grid.project})
            assert held.status == 201
            await execute(old.dsn, "alter system set default_transaction_read_only = on", "select pg_reload_conf()")
            await eventually(lambda: unavailable(replica.port, "/readyz"), 3, "a /readyz that is 503")
            await eventually(lambda: unavailable(replica.port, "/users"), 3, "reads that are not stale")
            assert (await ask(replica.port, "POST", "/locks", {"project_id": grid.project})).status == 503
            wire.url = empty_database
            turned = time.monotonic()
            await eventually(lambda: answers(replica.port, "/readyz"), 5, "a /readyz that is 200")
            await Grid([replica.port], grid.project).create(1)
            assert (await ask(replica.port, "POST", "/locks", {"project_id": grid.project})).status == 201
            assert len((await ask(replica.port, "GET", "/users")).body["items"]) == 1
            assert time.monotonic() - turned < 5
            await eventually(lambda: listens(empty_database), 10, "news from the new primary")
            theirs = f"select from pg_stat_activity where datname = '{name[1:]}' and pid <> pg_backend_pid()"
            await eventually(lambda: is_empty(before, theirs), 10, "an end of the old connections")


async def unavailable(port: int, path: str) -> bool:
    reply = await ask(port, "GET", path)
    return (reply.status, reply.slug) == (503, "database-unavailable") and "retry-after" in reply.headers


async def listens(url: str) -> bool:
    sql = "select from pg_stat_activity where datname = current_database() and query ilike '%pg_is_in_recovery%' "
    return bool(await execute(url, sql + "and application_name = '' and pid <> pg_backend_pid()"))


async def is_empty(url: str, sql: str) -> bool:
    return not await execute(url, sql)


async def test_behind_a_pooler_a_database_that_is_read_only_is_told_by_readyz(empty_database):
    """There the connection is one to the pooler, and stays."""
    name = urlsplit(empty_database).path[1:]
    configured = farm.settings.Settings(database_url=farm.settings.Secret(empty_database), pooler="on")
    with serving(configured) as running:
        await execute(empty_database, f"alter database {name} set default_transaction_read_only = on")
        await execute(empty_database, CUT)
        async with client(running.url) as api:
            await eventually(lambda: takes_no_writes(api), 5, "a /readyz that says so")
            assert slug(await api.post("/locks", json={"project_id": str(uuid.uuid4())})) == "database-unavailable"
            await execute(empty_database, "set default_transaction_read_only = off", f"alter database {name} reset all")
            await execute(empty_database, CUT)
            await eventually(lambda: works(api), 5, "a /readyz that is 200")
    await execute(empty_database, f"alter database {name} set default_transaction_read_only = on")
    run = command("migrate", env={"DATABASE_URL": empty_database})
    assert run.returncode == 1
    assert "takes no writes. Name the primary." in run.stderr


async def test_behind_a_pooler_no_statement_of_a_call_asks_for_types(empty_database):
    """asyncpg puts jit off for that, and behind a pooler at another connection of the server: it took seconds."""
    asked: list[str] = []
    async with farm.database.open_pool(empty_database, 1, "force_generic_plan", 6, "on") as pool, pool.acquire() as one:
        one.add_query_logger(lambda record: asked.append(record.query))
        for name, sql in SQL.items():
            if not name.startswith("import_"):  # these read tables of their own transaction
                await one.prepare(sql)
    assert not [sql for sql in asked if "jit" in sql or "typeinfo" in sql]


CUT = (
    "select pg_terminate_backend(pid) from pg_stat_activity "
    "where datname = current_database() and pid <> pg_backend_pid()"
)


async def takes_no_writes(api) -> bool:
    answer = await api.get("/readyz")
    return answer.status_code == 503 and "takes no writes" in answer.json()["detail"]


async def works(api) -> bool:
    return (await api.get("/readyz")).status_code == 200


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
async def test_a_database_whose_transactions_are_isolated_more_by_default_refuses_no_call(
    empty_database, project, level
):
    """There, what waits for a row that another call changes fails when it gets it."""
    name = urlsplit(empty_database).path[1:]
    await execute(empty_database, f"alter database {name} set default_transaction_isolation = '{level}'")
    with serving(settings(empty_database)) as running:
        async with client(running.url) as api:
            await make_users(api, project)
            lock = (await acquire(api, project)).json()
            other = await asyncpg.connect(empty_database)
            try:
                await other.execute("begin; update locks set note = 'changed'")
                release = asyncio.create_task(api.delete(f"/locks/{lock['id']}"))
                await blocked(empty_database)
                await other.execute("commit")
                assert (await release).status_code == 204
            finally:
                await other.close()


# Two roles.

OPERATING = (ROOT / "docs" / "operating.md").read_text()


async def test_the_lines_of_the_manual_make_two_roles_of_which_one_serves_and_creates_nothing(server, tmp_path):
    first, second = re.findall(r"```sql\n(.*?)```", OPERATING.partition("## Two roles")[2], re.S)[:2]
    mark = uuid.uuid4().hex[:8]
    names = re.compile(r"\bbotfarm(?=_owner|_service|\b)")
    make, grant = ([line for line in names.sub(f"bf{mark}", text).split("\n") if line] for text in (first, second))
    for line in make:
        await execute(server, line)
    try:
        database = urlunsplit(urlsplit(server)._replace(path=f"/bf{mark}"))
        await execute(database, "revoke create on schema public from public", "select 1")
        owner, service = (as_role(database, f"bf{mark}_{name}") for name in ("owner", "service"))
        for line in grant:
            await execute(owner, line)
        assert command("migrate", env={"DATABASE_URL": owner}).returncode == 0
        await serves_all(service, tmp_path)
        await execute(owner, "drop table sealing_keys", "delete from _yoyo_migration where migration_id > '0007'")
        refused(
            service, "permission denied for schema public", "Let the schema's owner run `python botfarm.py migrate`"
        )
    finally:
        await execute(server, f"drop database bf{mark} with (force)")
        for name in ("owner", "service"):
            await execute(server, f"drop role bf{mark}_{name}")


async def test_the_rights_that_a_start_looks_for_are_enough(role, empty_database, tmp_path):
    listed = re.findall(r"\('(\w+)','\{.*?\}','\{(.*?)\}'\)", re.sub(r"\s", "", farm.database.SQL["list_lacks"]))
    grants = [f"grant {rights} on {name} to {role}" for name, rights in [*listed, ("clients", "all")]]  # (the commands)
    await execute(empty_database, "revoke create on schema public from public", *grants)
    await serves_all(as_role(empty_database, role), tmp_path)


async def serves_all(url: str, folder: Path) -> None:
    """Each kind of call and of command that changes something, and the jobs beside them."""
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await execute(url, "create table mine (id int)")
    scopes = "users:read users:write locks admin"
    added = command("client", "add", "ci", "--scope", scopes, env={"DATABASE_URL": url})
    assert added.returncode == 0, added.stderr
    configured = farm.settings.Settings(
        database_url=farm.settings.Secret(url),
        keys=farm.settings.Secret(KEY),
        signing_keys=farm.settings.Secret(KEY),
        auth="on",
    )
    made = json.loads(added.stdout)
    with serving(configured) as running:
        async with client(running.url) as api:
            account = (made["client_id"], made["client_secret"])
            token = await api.post("/token", data={"grant_type": "client_credentials"}, auth=account)
            api.headers["Authorization"] = f"Bearer {token.json()['access_token']}"
            project = str(uuid.uuid4())
            (user,) = await make_users(api, project)
            lines = [{"login": f"i{n}", "password": "p", "project_id": project, "env": "stage"} for n in range(1001)]
            body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
            sent = await api.post("/users/import", content=body, headers={"Content-Type": "application/x-ndjson"})
            assert sent.json() == {"created": 1001, "updated": 0, "unchanged": 0}
            calls = [
                api.patch(f"/users/{user['id']}", json={"domain": "canary"}),
                api.post(f"/users/{user['id']}/quarantine", json={"reason": "x"}),
                api.delete(f"/users/{user['id']}/quarantine"),
                api.post("/locks", json={"project_id": project, "wait": 5}, headers={"Idempotency-Key": project}),
                api.delete("/locks", params={"holder": "nobody"}),
                api.delete(f"/users/{user['id']}/lock"),
                api.get("/metrics"),
                api.get("/readyz"),
                api.delete(f"/users/{user['id']}", params={"force": "true"}),
            ]
            for call in calls:
                answer = await call
                assert answer.status_code < 300, answer.text
    assert command("client", "remove", "ci", env={"DATABASE_URL": url}).returncode == 0


@pytest.mark.parametrize(
    ("taken", "lack"),
    [
        ("update on locks", "the right to update in locks"),
        ("update on sealing_keys", "the right to update in sealing_keys"),
        ("select on users", "the right to select in users"),
        ("select on _yoyo_migration", "_yoyo_migration"),
    ],
)
async def test_a_right_that_is_taken_is_a_503_that_says_so_and_named_at_a_start(role, empty_database, taken, lack):
    await execute(empty_database, f"grant all on all tables in schema public to {role}")
    url = as_role(empty_database, role)
    with serving(farm.settings.Settings(database_url=farm.settings.Secret(url))) as running:
        async with client(running.url) as api:
            assert (await api.get("/readyz")).status_code == 200
            await execute(empty_database, f"revoke {taken} from {role}")
            told = await api.get("/readyz")
            assert slug(told) == "database-unavailable"
            assert lack in told.json()["detail"]
            assert told.headers["retry-after"]
            if "users" in taken:
                call = await api.get("/users")
                assert slug(call) == "database-unavailable"
                assert "permission denied for table users" in call.json()["detail"]
    refused(url, lack.rpartition(" ")[2], role if "locks" in taken else "", "docs/operating.md")


# Errors of a start.


async def test_ordinary_faults_of_an_address_are_told_in_a_line(role, bare_database, server):
    gone = urlunsplit(urlsplit(server)._replace(path="/no_such_database"))
    refused(gone, 'database "no_such_database" does not exist. Create it')
    refused(as_role(bare_database, "no_such_role"), "no_such_role", "Check user and password in DATABASE_URL")
    await execute(bare_database, "revoke create on schema public from public")
    refused(as_role(bare_database, role), "permission denied for schema public", "let this user own the schema")
    await execute(bare_database, f"revoke connect on database {urlsplit(bare_database).path[1:]} from public")
    refused(as_role(bare_database, role), "permission denied for database")
    refused(as_role(server, "botfarm", options="-c search_path=nowhere"), "There is no schema nowhere: create it")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgresql://u:hidden@no-such-host.invalid/d", "no such host: no-such-host.invalid"),
        ("postgresql://u:hidden@127.0.0.1:1/d", "ConnectionRefusedError: 127.0.0.1:1"),
        ("postgresql:///d?host=/no/such/folder&user=u&password=hidden", "/no/such/folder"),
        ("postgresql://u:hidden@127.0.0.1:1,no-such-host.invalid/d", "no-such-host.invalid"),
        ("postgresql://u:hidden@a..b/d", "its host is no name of a host"),
        ("postgresql://u:hidden@127.0.0.1:99999/d", "127.0.0.1:99999: connect(): port must be 0-65535. Check its host"),
        ("postgresql://u:hidden@,/d", "DATABASE_URL is not understood: ,, port 5432"),
        ("postgresql:///d?host=::1&user=u&password=hidden", "DATABASE_URL is not understood: ::1"),
    ],
)
def test_where_nobody_is_the_place_is_named_and_no_password(url, told):
    run = command("migrate", env={"DATABASE_URL": url})
    assert run.returncode == 1
    assert told in run.stderr
    assert run.stderr.count("\n") == 1
    assert "hidden" not in run.stderr


@pytest.mark.parametrize(
    ("code", "message", "status", "told"),
    [
        ("28P01", 'password authentication failed for user "u"', 3, "Check user and password in DATABASE_URL"),
        (
            "28000",
            'no pg_hba.conf entry for user "u", database "d", no encryption',
            3,
            "sslmode=require",
        ),
        ("53300", "sorry, too many clients already", 1, "sorry, too many clients already"),
        ("53100", "could not write: No space left on device", 3, "Make room there"),
        ("57P03", "the database system is shutting down", 1, "the database system is shutting down"),
        ("08P01", "unsupported startup parameter in options: search_path", 3, "alter role NAME set search_path"),
    ],
)
def test_what_a_server_says_at_the_door_is_told_in_a_line(code, message, status, told):
    """A door that says what a server says, since no test can have each of these servers."""
    with door(f"SFATAL\0C{code}\0M{message}\0\0".encode()) as port:
        url = f"postgresql://u:hidden@127.0.0.1:{port}/d?sslmode=disable"
        words = ["serve"] if status == 3 else ["migrate"]
        run = command(*words, env={"DATABASE_URL": url})
    assert run.returncode == status
    assert run.stderr.count("\n") == 1
    assert told in run.stderr
    assert message in run.stderr
    assert "hidden" not in run.stderr


@contextmanager
def door(fault: bytes) -> Iterator[int]:
    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = listener.accept()
                with caller:
                    caller.recv(1000)
                    caller.sendall(b"E" + struct.pack("!i", len(fault) + 4) + fault)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def test_a_server_that_is_too_old_is_refused(empty_database):
    with tempfile.TemporaryFile() as output, open(os.devnull) as nothing:
        changes = {"farm.migrations.OLDEST": 99}
        env = environment({"DATABASE_URL": empty_database})
        assert ready.fork(["serve"], env, nothing, output, output, changes=changes).wait(20) == 3
        assert re.fullmatch(r"The server is PostgreSQL \d\d, and BotFarm needs 99 or newer\.\n", ready.read(output))


# The URL.


def with_query(url: str, **more: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}{urlencode(more, quote_via=quote)}"


async def test_a_url_as_managed_services_print_it_serves_with_one_warning(empty_database):
    url = with_query(empty_database, connect_timeout="10", channel_binding="require", sslmode="prefer", keepalives="1")
    port = free_port()
    with process(env={"DATABASE_URL": url, "BOTFARM_PORT": str(port), "BOTFARM_WORKERS": "2"}) as running:
        await asyncio.to_thread(wait_ready, f"http://127.0.0.1:{port}")
        lines = [line for line in ready.read(running.stdout).splitlines() if "passed over" in line]
    assert len(lines) == 1
    assert "channel_binding, keepalives passed over" in lines[0]


# All that libpq documents, with a value that asks for something.
LIBPQ = {
    **dict.fromkeys(("application_name", "fallback_application_name", "krbsrvname", "passfile"), "x"),
    **dict.fromkeys(("connect_timeout", "keepalives", "keepalives_idle", "keepalives_interval"), "7"),
    **dict.fromkeys(("keepalives_count", "tcp_user_timeout", "sslsni", "sslcompression", "gssdelegation"), "1"),
    **{"channel_binding": "require", "gssencmode": "disable", "sslmode": "allow", "load_balance_hosts": "random"},
    **{"target_session_attrs": "any", "client_encoding": "UTF8", "options": "-c work_mem=1MB", "gsslib": "gssapi"},
    **{"sslcertmode": "allow", "sslkeylogfile": "x", "sslpassword": "x", "ssl_min_protocol_version": "TLSv1.2"},
    **{"ssl_max_protocol_version": "TLSv1.3", "sslnegotiation": "postgres"},
}
REFUSED = {
    **{
        "gssencmode": "require",
        "target_session_attrs": "standby",
        "client_encoding": "LATIN1",
        "replication": "database",
    },
    **{"require_auth": "none", "requirepeer": "x", "hostaddr": "127.0.0.1", "sslcrldir": "x", "service": "none_such"},
    **{"min_protocol_version": "3.2", "max_protocol_version": "3.2", "scram_client_key": "x", "scram_server_key": "x"},
    **{"oauth_issuer": "x", "oauth_client_id": "x", "oauth_client_secret": "x", "oauth_scope": "x", "requiressl": "1"},
    **{"sslrootcert": "/no/such.crt", "sslcert": "/no/such.crt", "sslkey": "/no/such.key", "sslcrl": "/no/such.crl"},
    **{"connect_timeout": "soon", "sslmode": "perhaps", "sslnegotiation": "rarely", "port": "x", "no_such_word": "1"},
}


@pytest.mark.parametrize(("name", "value"), LIBPQ.items())
def test_a_parameter_of_libpq_is_honoured_or_passed_over(empty_database, name, value):
    assert farm.migrations.migrate(with_query(empty_database, **{name: value})) == []


@pytest.mark.parametrize(("name", "value"), REFUSED.items())
def test_a_parameter_that_cannot_be_honoured_is_refused_by_name(empty_database, name, value):
    with pytest.raises(farm.migrations.SchemaError, match=name) as fault:
        farm.migrations.migrate(with_query(empty_database, **{name: value}))
    assert "\n" not in str(fault.value)
    assert "%2F" not in str(fault.value)


@pytest.mark.parametrize("options", ["search_path=own", "-c", "-c work_mem", "-x", "'"])
def test_options_that_are_none_are_told_with_what_to_write(empty_database, options):
    refused(with_query(empty_database, options=options), "DATABASE_URL", "?options=-c%20search_path%3DNAME")


def test_all_of_libpq_is_known():
    ours = {"host", "port", "user", "password", "dbname"}
    known = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}
    assert known - LIBPQ.keys() - REFUSED.keys() - ours - {"authtype", "servicefile"} == set()


async def test_parameters_are_honoured(bare_database, tmp_path, monkeypatch):
    await execute(bare_database, "create schema own")
    file = tmp_path / "services"
    file.write_text("[mine]\noptions=-c search_path=own\napplication_name=50%\n")
    for url in (
        with_query(bare_database, service="mine", servicefile=str(file)),
        with_query(bare_database, application_name="50%", options="-c search_path=own"),
        with_query(bare_database, application_name="50%") + "&options=-c+search_path%3Down",
    ):
        async with farm.database.open_pool(url, 1, "force_custom_plan", 5) as pool:
            row = await pool.fetchrow("select current_schema(), current_setting('application_name')")
            assert tuple(row or ()) == ("own", "50%")


def test_an_address_needs_no_home_folder(monkeypatch):
    """As in a container that runs as a uid without a passwd entry."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert read_address("postgresql://u@h:5432/d").place == "h:5432"


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("postgresql://[::1]:5433/d", "[::1]:5433"),
        ("postgresql://h1:5433,h2/d", "h1,h2, port 5433,5432"),
        ("postgresql://u@h:5433/d?host=/run/pg", "/run/pg, port 5433"),
        ("postgresql:///d?port=5433", "its local socket, port 5433"),
    ],
)
def test_messages_tell_the_place_so_that_hosts_and_ports_are_told_apart(url, place, monkeypatch):
    monkeypatch.delenv("PGHOST", raising=False)
    assert read_address(url).place == place


@pytest.mark.parametrize("mode", ["verify-ca", "verify-full"])
def test_a_message_about_a_certificate_speaks_of_the_certificate(mode, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "broken.crt").write_text("no certificate")
    url = f"postgresql://u:p@127.0.0.1:1/d?sslmode={mode}"
    with pytest.raises(farm.migrations.SchemaError, match=r"root certificate file .* sslrootcert=FILE"):
        farm.migrations.migrate(url)
    with pytest.raises(farm.migrations.SchemaError, match=r"TLS with 127.0.0.1:1 fails: .* certificates"):
        farm.migrations.migrate(f"{url}&sslrootcert={tmp_path / 'broken.crt'}")
    with pytest.raises(farm.migrations.SchemaError, match="sslrootcert=system goes with sslmode=verify-full"):
        farm.migrations.migrate("postgresql://u:p@127.0.0.1:1/d?sslrootcert=system&sslmode=require")


def certificate(folder: Path, name: str) -> Path:
    """A certificate for one host, signed by itself; its key lies beside it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject, now = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]), datetime.now(UTC)
    unsigned = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
    unsigned = unsigned.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    names = x509.SubjectAlternativeName([x509.DNSName(name)])
    file = folder / f"{name}.crt"
    file.write_bytes(unsigned.add_extension(names, False).sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    clear = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.with_suffix(".key").write_bytes(clear)
    return file


class Tls(Wire):
    """A database that speaks TLS, as managed ones do."""

    def __init__(self, url: str, file: Path) -> None:
        super().__init__(url)
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.load_cert_chain(file, file.with_suffix(".key"))
        self.encrypted = 0

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(8) == struct.pack("!ii", 8, 80877103)  # SSLRequest
        writer.write(b"S")
        await writer.start_tls(self.context)
        self.encrypted += 1
        await super()._handle(reader, writer)


async def test_over_tls_a_database_is_served_from_where_its_certificate_is_known_and_names_it(empty_database, tmp_path):
    own, other = certificate(tmp_path, "localhost"), certificate(tmp_path, "other.test")
    wire = Tls(empty_database, own)
    async with wire.open() as url:
        named = url.replace("127.0.0.1", "localhost")
        full = {"sslmode": "verify-full", "sslrootcert": str(own)}
        async with replicas(with_query(named, **full), tmp_path, {}) as (replica,):
            assert (await ask(replica.port, "GET", "/users")).status == 200
        assert wire.encrypted > 2
        for place, query, told in (
            (url, full, "Write a host that it names in DATABASE_URL"),
            (named, full | {"sslrootcert": str(other)}, "Name its authority's by sslrootcert=FILE in DATABASE_URL"),
            (named, {"sslrootcert": "system"}, "Name its authority's by sslrootcert=FILE in DATABASE_URL"),
        ):
            said = await asyncio.to_thread(refused, with_query(place, **query))
            assert "The certificate of the database at" in said
            assert f". {told}.\n" in said
            assert ".." not in said


# What a database can hold, and what it keeps.


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII", "EUC_JP"])
def test_a_database_that_does_not_hold_every_character_is_refused(server, encoding):
    with fresh_database(server, f"template0 encoding '{encoding}' locale 'C'") as url:
        refused(url, f"has the encoding {encoding}, and BotFarm needs UTF8: create database")


async def test_a_role_that_prefers_another_encoding_stores_every_character(role, bare_database):
    await execute(
        bare_database, f"grant create on schema public to {role}", f"alter role {role} set client_encoding = 'LATIN1'"
    )
    with serving(farm.settings.Settings(database_url=farm.settings.Secret(as_role(bare_database, role)))) as running:
        async with client(running.url) as api:
            (user,) = await make_users(api, str(uuid.uuid4()), labels={"city": "日本"})
            assert (await api.get(f"/users/{user['id']}")).json()["labels"] == {"city": "日本"}
    await execute(bare_database, f"drop owned by {role}")


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_database_that_may_lose_commits_is_warned_of_once(empty_database, workers):
    name = urlsplit(empty_database).path[1:]
    await execute(empty_database, f"alter database {name} set synchronous_commit = off")
    port = free_port()
    env = {
        "DATABASE_URL": empty_database,
        "BOTFARM_PORT": str(port),
        "BOTFARM_WORKERS": workers,
    }
    with process(env=env) as running:
        await asyncio.to_thread(wait_ready, f"http://127.0.0.1:{port}")
        lines = [line for line in ready.read(running.stdout).splitlines() if "synchronous_commit off" in line]
    assert len(lines) == 1
    assert "may lose locks" in lines[0]


# Outages, bugs and what is not there.


@pytest.mark.parametrize(
    "statement",
    ["select $1::uuid, $2::int", "select $1::int", "select no_such_function($1::uuid)", "select $1::uuid from"],
)
async def test_a_bug_of_ours_is_no_outage(service, api, monkeypatch, caplog, statement):
    monkeypatch.setitem(farm.database.SQL, "get_user", statement)
    answer = await api.get(f"/users/{uuid.uuid4()}", headers={"X-Request-Id": "bug-7"})
    assert slug(answer) == "internal-error"
    assert answer.json()["request_id"] == "bug-7"
    assert [record for record in caplog.records if record.exc_info and "bug-7" in record.getMessage()]


async def test_a_full_disk_of_the_service_is_no_outage_of_the_database(service, api, project, monkeypatch):
    async def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(service.farm.passwords, "store", full)
    body = {"login": "a", "password": "p", "project_id": project, "env": "stage"}
    assert slug(await api.post("/users", json=body)) == "internal-error"


@pytest.mark.parametrize(
    ("change", "gone"), [("drop table history", "history"), ("alter table history drop column ended_by", "ended_by")]
)
async def test_a_part_of_the_schema_that_goes_is_a_503_that_says_so(empty_database, change, gone):
    with serving(settings(empty_database)) as running:
        async with client(running.url) as api:
            (user,) = await make_users(api, str(uuid.uuid4()))
            await execute(empty_database, change)
            for path in ("/readyz", f"/users/{user['id']}/history"):
                answer = await api.get(path)
                assert slug(answer) == "database-unavailable"
                assert answer.headers["retry-after"]
                assert gone in answer.json()["detail"]
                assert "The database lacks" in answer.json()["detail"]
