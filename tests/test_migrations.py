"""Migrations: up, down, up; several at once; killed; newer than we are."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import select
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from urllib.parse import quote, urlsplit

import asyncpg
import psycopg
import pytest
from conftest import ROOT, command, execute, free_port, until

import farm.migrations
import farm.settings

CATALOGUE = """
    select table_name, column_name, data_type, is_nullable, column_default
    from information_schema.columns where table_schema = 'public' and table_name not like '%yoyo%'
    union all
    select tablename, indexname, indexdef, '', '' from pg_indexes
    where schemaname = 'public' and tablename not like '%yoyo%'
    union all
    select conrelid::regclass::text, conname, pg_get_constraintdef(oid), '', '' from pg_constraint
    where connamespace = 'public'::regnamespace and conrelid::regclass::text not like '%yoyo%'
    order by 1, 2, 3
"""
NAMES = sorted(path.stem for path in (ROOT / "migrations").glob("*.sql") if "rollback" not in path.name)

# An applied migration is never edited: yoyo does not notice, so this does.
PINNED = {
    "0001.users": "ca4699b5d3744f9c",
    "0002.locks": "6a30c653fdebed71",
    "0003.sealing_keys": "38d46f2e16a30db6",
    "0004.due_locks": "0983d9475ca964e9",
    "0005.waiting": "c82483f5f30da5d1",
    "0006.clients": "ad455bd3c765e5d1",
    "0007.labels": "db2f46fd2035485a",
    "0008.free_users": "7dd649367414832c",
    "0009.glances": "4b3fd1879bca05d4",
    "0010.more_than_a_password": "f718458ab637bb2f",
}


async def catalogue(url):
    return [tuple(row) for row in await execute(url, CATALOGUE) if row[0] != "botfarm_migrating"]


async def test_up_down_and_up_again_give_the_same_catalogue(bare_database):
    assert await asyncio.to_thread(farm.migrations.migrate, bare_database) == NAMES
    first = await catalogue(bare_database)
    assert await asyncio.to_thread(farm.migrations.migrate, bare_database) == []
    for name in reversed(NAMES):
        assert await asyncio.to_thread(farm.migrations.migrate, bare_database, rollback=True) == [name]
    assert await catalogue(bare_database) == []
    assert await asyncio.to_thread(farm.migrations.migrate, bare_database, rollback=True) == []
    assert await asyncio.to_thread(farm.migrations.migrate, bare_database) == NAMES
    assert await catalogue(bare_database) == first


def test_several_at_once_apply_each_migration_once(bare_database):
    with ThreadPoolExecutor(8) as threads:
        runs = list(threads.map(farm.migrations.migrate, [bare_database] * 8))
    assert sorted(runs) == [[]] * 7 + [NAMES]
    farm.migrations.migrate(bare_database, rollback=True)
    with ThreadPoolExecutor(8) as threads:
        runs = list(threads.map(farm.migrations.migrate, [bare_database] * 8))
    assert sorted(runs) == [[]] * 7 + [NAMES[-1:]]


async def test_a_migrator_killed_in_the_middle_leaves_nothing_and_blocks_nobody(bare_database):
    code = f"""
import sys, time; sys.path.insert(0, {str(ROOT)!r})
import farm.migrations, yoyo
backend = farm.migrations.open_backend(farm.migrations.look({bare_database!r})[1])
with backend.exclusive():
    backend.apply_migrations(backend.to_apply(yoyo.read_migrations({str(ROOT / "migrations")!r}))[:2])
    print("half", flush=True)
    time.sleep(60)
"""
    half = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert half.stdout
    assert half.stdout.readline() == "half\n"
    half.kill()
    half.communicate()
    assert await asyncio.to_thread(farm.migrations.migrate, bare_database) == NAMES


async def test_a_migration_that_fails_changes_nothing(bare_database, tmp_path, monkeypatch):
    (tmp_path / "0001.bad.sql").write_text("create table half (id int);\n\nselect 1/0;\n")
    monkeypatch.setattr(farm.migrations, "FOLDER", tmp_path)
    with pytest.raises(psycopg.errors.DivisionByZero):
        await asyncio.to_thread(farm.migrations.migrate, bare_database)
    assert await catalogue(bare_database) == []


async def test_a_migration_may_take_longer_than_a_call(bare_database, tmp_path, monkeypatch):
    """As that of large tables, where the database's owner has set a limit for statements."""
    name = urlsplit(bare_database).path[1:]
    await execute(bare_database, f"alter database {name} set statement_timeout = '1s'")
    (tmp_path / "0001.slow.sql").write_text("select pg_sleep(1.2);\n")
    monkeypatch.setattr(farm.migrations, "FOLDER", tmp_path)
    assert await asyncio.to_thread(farm.migrations.migrate, bare_database) == ["0001.slow"]


async def test_a_table_of_somebody_else_is_told_at_once(bare_database):
    """It is no other start that makes the same tables."""
    await execute(bare_database, "create table pools (id int)")
    with pytest.raises(farm.migrations.SchemaError, match='"pools" already exists'):
        await asyncio.to_thread(farm.migrations.migrate, bare_database)


@pytest.fixture
def short_pauses(monkeypatch):
    """Where a migration sleeps it does so for a quarter of the time."""
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: time.sleep(seconds / 4))
    monkeypatch.setattr(farm.migrations, "time", clock)


async def test_a_migration_beside_a_backup_holds_up_no_call_and_ends_after_it(bare_database, short_pauses):
    await asyncio.to_thread(farm.migrations.migrate, bare_database)
    for _ in NAMES[5:]:  # back to before the one that changes locks and history
        await asyncio.to_thread(farm.migrations.migrate, bare_database, rollback=True)
    backup = await asyncpg.connect(bare_database)
    try:
        await backup.execute("begin isolation level repeatable read; select from locks, history")
        migrating = asyncio.create_task(asyncio.to_thread(farm.migrations.migrate, bare_database))
        slowest, end = 0.0, time.monotonic() + 10
        while slowest <= 1 and time.monotonic() < end:
            began = time.monotonic()
            await asyncio.wait_for(execute(bare_database, "select from locks, history"), 10)
            slowest = max(slowest, time.monotonic() - began)
            await asyncio.sleep(0.05)
        await asyncio.wait_for(execute(bare_database, "select from locks, history"), 4)
        assert not migrating.done()
        assert 1 < slowest < 4, "it never waited for the tables" if slowest <= 1 else "calls stood behind it"
    finally:
        await backup.close()
    assert await migrating == NAMES[5:]


MORE = "0010.more_than_a_password"
# What a replica of the version before it does, with its own columns alone.
OLD_CYCLE = """
    with taken as (
        update locks
        set fence = fence + 1, lock_id = gen_random_uuid(), holder = 'old', ttl = 60, acquired_at = clock_timestamp(),
            expires_at = clock_timestamp() + interval '1 minute'
        where user_id = (
            select user_id from locks where lock_id is null order by ready_at limit 1 for update skip locked
        )
        returning *
    )
    insert into history (lock_id, user_id, client_id, fence, holder, acquired_at, ended_at, ended_by)
    select lock_id, user_id, client_id, fence, holder, acquired_at, acquired_at, 'released' from taken
    returning user_id
"""
OLD_RELEASE = "update locks set lock_id = null, ready_at = clock_timestamp() where user_id = $1"


async def test_a_database_of_the_version_before_migrates_under_load_and_back_with_its_data(bare_database, short_pauses):
    """Replicas of that version go on meanwhile, and after it."""
    await asyncio.to_thread(farm.migrations.migrate, bare_database)
    while (await asyncio.to_thread(farm.migrations.migrate, bare_database, rollback=True))[0] != MORE:
        pass
    users = (
        "insert into users (id, project_id, env, domain, login, secret) select gen_random_uuid(), gen_random_uuid(),"
    )
    users += " 'stage', 'regular', n, '$argon2id$' from generate_series(1, 50000) n"
    await execute(bare_database, users, "insert into locks (user_id, pool_id) select id, 1 from users", "select 1")
    many = "insert into history select gen_random_uuid(), user_id, n, 'h', now(), now(), 'released', null"
    await execute(bare_database, f"{many} from locks cross join generate_series(1000001, 1000003) n", "select 1")
    slowest, done, cycles = 0.0, False, 0

    async def load():
        nonlocal slowest, cycles
        connection = await asyncpg.connect(bare_database)
        while not done:
            begun = time.monotonic()
            with contextlib.suppress(asyncpg.DeadlockDetectedError):  # which a replica tries again
                user = await connection.fetchval(OLD_CYCLE)
                await connection.execute(OLD_RELEASE, user)
            slowest, cycles = max(slowest, time.monotonic() - begun), cycles + 1
        await connection.close()

    loads = [asyncio.create_task(load()) for _ in range(4)]
    facts = "select count(*), count(distinct note), count(outcome) from history where fence > 1000000"
    for _ in range(2):
        await asyncio.sleep(0.3)
        applied = await asyncio.to_thread(farm.migrations.migrate, bare_database)
        assert applied[0] == MORE
        assert tuple((await execute(bare_database, facts))[0]) == (150_000, 1, 0)
        before = cycles
        while cycles < before + 20:
            await asyncio.sleep(0.05)
        store = (
            "insert into user_sessions select user_id, 'k1', sha256('') || sha256(''), now(), now() from locks limit 9"
        )
        codes = "insert into user_codes select id, 'k1', sha256('') || sha256(''), 30 from users limit 9"
        notes = "update locks set note = 'n', bad_logins = 2, last_outcome = 'failed', session_until = now()"
        await execute(bare_database, store, codes, f"{notes} where fence = 0 and lock_id is null", "select 1")
        for _ in applied:
            await asyncio.to_thread(farm.migrations.migrate, bare_database, rollback=True)
    done = True
    await asyncio.gather(*loads)
    assert (
        tuple((await execute(bare_database, "select count(*), count(distinct user_id) from locks"))[0]) == (50_000,) * 2
    )
    assert (await execute(bare_database, "select count(*) from history where fence > 1000000"))[0][0] == 150_000
    assert slowest < 4, "calls stood behind the migration"


async def test_a_newer_schema_is_refused_with_a_clear_message(bare_database):
    await asyncio.to_thread(farm.migrations.migrate, bare_database)
    await execute(bare_database, "insert into _yoyo_migration values ('x', '0999.future', now())")
    env = {"DATABASE_URL": bare_database}
    for status, *words in ((1, "migrate"), (3, "serve", "--port", "1")):
        refused = command(*words, env=env)
        assert refused.returncode == status
        assert "0999.future" in refused.stderr
        assert "newer version" in refused.stderr
        assert "Traceback" not in refused.stderr


def test_the_command_tells_what_it_did(bare_database):
    env = {"DATABASE_URL": bare_database}
    assert command("migrate", env=env).stdout == "".join(f"applied: {name}\n" for name in NAMES)
    assert command("migrate", env=env).stdout == "nothing to do\n"
    assert command("migrate", "--rollback", env=env).stdout == f"taken back: {NAMES[-1]}\n"


def test_no_applied_migration_was_edited():
    found = {
        name: hashlib.sha256((ROOT / "migrations" / f"{name}.sql").read_bytes()).hexdigest()[:16] for name in NAMES
    }
    assert found == PINNED


def test_the_folder_of_a_checkout_may_have_any_name(bare_database, tmp_path, monkeypatch):
    """yoyo takes it for a pattern: none was found, and a service without tables was started."""
    folder = tmp_path / "job [7] *"
    shutil.copytree(ROOT / "migrations", folder)
    monkeypatch.setattr(farm.migrations, "FOLDER", folder)
    assert farm.migrations.migrate(bare_database) == NAMES


def test_every_migration_can_be_taken_back():
    assert all((ROOT / "migrations" / f"{name}.rollback.sql").exists() for name in NAMES)


def test_a_start_that_has_nothing_to_migrate_does_not_import_what_would(bare_database):
    """yoyo and psycopg take longer than most commands, and memory in each worker."""
    code = "import sys, farm.migrations as m; print(m.migrate(sys.argv[1]), {'yoyo', 'psycopg'} & {*sys.modules})"
    words = [sys.executable, "-c", code, bare_database]
    run = partial(subprocess.run, words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert NAMES[0] in run().stdout
    assert run().stdout == "[] set()\n"


@pytest.mark.parametrize("inside", [True, False])
def test_sql_is_found_inside_an_installed_package_and_beside_it_in_a_checkout(tmp_path, inside):
    install(tmp_path, tmp_path / "farm" if inside else tmp_path, ("sql", "migrations"))
    assert imported(tmp_path).stdout.split() == [str(len(list(ROOT.glob("sql/*.sql")))), *NAMES]


@pytest.mark.parametrize("folder", ["sql", "migrations"])
@pytest.mark.parametrize("is_there", [True, False])
def test_without_any_sql_nothing_starts(tmp_path, folder, is_there):
    install(tmp_path, tmp_path, {"sql", "migrations"} - {folder})
    if is_there:
        (tmp_path / folder).mkdir()
    refused = imported(tmp_path)
    assert refused.returncode
    assert f"There are no SQL files in {tmp_path / folder}" in refused.stderr


def install(folder, sql, names):
    shutil.copytree(ROOT / "farm", folder / "farm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in names:
        shutil.copytree(ROOT / name, sql / name)


def imported(folder):
    code = "import farm.migrations as m, farm.database as d; print(len(d.SQL), *m.MIGRATIONS)"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "spelling",
    [
        "postgresql://{user}:{password}@{host}:{port}/{dbname}",
        "postgres://x:{password}@h.invalid:{port}/x?application_name=x&host={host}&user={user}&dbname={dbname}",
        "postgres://{user}:x@{host}:1/{dbname}?sslmode=prefer&port={port}&password={password}",
        "postgresql://?user={user}&password={password}&database={dbname}&host={host}&port={port}",
        "postgresql://{user}:{password}@?dbname={dbname}&host=127.0.0.1,{host}&port=1,{port}",
        "postgresql://{user}:{password}@127.0.0.1:1,{host}:{port}/{dbname}?target_session_attrs=any",
        "postgresql://",
    ],
)
async def test_a_migration_goes_where_the_service_goes(bare_database, spelling, monkeypatch):
    _, real = await asyncio.to_thread(farm.migrations.look, bare_database)
    for variable, name in (("HOST", "host"), ("PORT", "port"), ("USER", "user"), ("DATABASE", "dbname")):
        monkeypatch.setenv(f"PG{variable}", str(real[name]) if spelling == "postgresql://" else "7")
    monkeypatch.setenv("PGPASSWORD", real["password"] or "")
    monkeypatch.setenv("PGHOSTADDR", "127.0.0.9")
    url = spelling.format_map({name: quote(str(value or ""), safe="") for name, value in real.items()})
    _, address = await asyncio.to_thread(farm.migrations.look, url)
    backend = await asyncio.to_thread(farm.migrations.open_backend, address)
    ask = "select current_user, current_database(), pg_postmaster_start_time()"
    with contextlib.closing(backend.connection):
        assert backend.execute(ask).fetchall() == [tuple(row) for row in await execute(bare_database, ask)]


async def test_settings_in_the_address_count_for_a_migration(bare_database):
    sign = "&" if "?" in bare_database else "?"
    url = f"{bare_database}{sign}search_path=a%5Cb,%20public&work_mem=1MB&options=-c%20geqo%3Doff"
    ask = "select current_setting('search_path'), current_setting('work_mem'), current_setting('geqo')"
    _, address = await asyncio.to_thread(farm.migrations.look, url)
    backend = await asyncio.to_thread(farm.migrations.open_backend, address)
    with contextlib.closing(backend.connection):
        assert backend.execute(ask).fetchall() == [(r"a\b, public", "1MB", "off")]
    assert [tuple(row) for row in await execute(url, ask)] == [(r"a\b, public", "1MB", "off")]


def test_a_database_that_starts_up_is_waited_for(bare_database, short_pauses, caplog):
    """First nobody listens, then PostgreSQL says that it is not ready."""
    port = free_port()
    farm.migrations.migrate(bare_database)
    _, real = farm.migrations.look(bare_database)
    url = f"postgresql://botfarm@127.0.0.1:{port}/{real['dbname']}?sslmode=disable"
    starting = threading.Thread(target=start_up, args=(port, real, caplog))
    starting.start()
    configured = farm.settings.Settings(database_url=farm.settings.Secret(url))
    with farm.migrations.prepared(configured) as ready:
        assert ready == url
    starting.join(10)
    reasons = [record.getMessage() for record in caplog.records if "Waiting for the database" in record.getMessage()]
    assert "ConnectionRefused" in reasons[0]
    assert "the database system is starting up" in reasons[1]


def start_up(port, real, caplog):
    """A server that comes late, refuses the first connection as PostgreSQL does, and hands on the second."""
    until(lambda: caplog.records, 5)
    fault = b"SFATAL\0C57P03\0Mthe database system is starting up\0\0"
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.settimeout(20)
        refused, _ = listener.accept()
        with refused:
            refused.recv(1000)
            refused.sendall(b"E" + struct.pack("!i", len(fault) + 4) + fault)
        served, _ = listener.accept()
    path = real["host"].startswith("/")
    behind = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
    with served, behind:
        behind.connect(f"{real['host']}/.s.PGSQL.{real['port']}" if path else (real["host"], int(real["port"])))
        while True:
            for one in select.select([served, behind], [], [])[0]:
                data = one.recv(65536)
                if not data:
                    return
                (behind if one is served else served).sendall(data)


@pytest.mark.parametrize("password", ["p/ss", "p#ss", "p?ss", "[ss"])
def test_a_password_that_breaks_the_address_is_not_told(password):
    with pytest.raises(farm.migrations.SchemaError, match="DATABASE_URL is not readable") as refused:
        farm.migrations.migrate(f"postgresql://u:{password}@h.invalid/d")
    assert "ss" not in str(refused.value).replace("password", "")
    assert password not in str(refused.value)
