"""Migrations: up, down, up; several at once; killed; newer than we are."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import asyncpg
import pytest
from conftest import ROOT, command, execute

import farm.migrations

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
}


async def catalogue(url):
    return [tuple(row) for row in await execute(url, CATALOGUE) if row[0] != "botfarm_migrating"]


async def test_up_down_and_up_again_give_the_same_catalogue(empty_database):
    assert await asyncio.to_thread(farm.migrations.migrate, empty_database) == NAMES
    first = await catalogue(empty_database)
    assert await asyncio.to_thread(farm.migrations.migrate, empty_database) == []
    for name in reversed(NAMES):
        assert await asyncio.to_thread(farm.migrations.migrate, empty_database, rollback=True) == [name]
    assert await catalogue(empty_database) == []
    assert await asyncio.to_thread(farm.migrations.migrate, empty_database, rollback=True) == []
    assert await asyncio.to_thread(farm.migrations.migrate, empty_database) == NAMES
    assert await catalogue(empty_database) == first


def test_several_at_once_apply_each_migration_once(empty_database):
    with ThreadPoolExecutor(6) as threads:
        runs = list(threads.map(farm.migrations.migrate, [empty_database] * 6))
    assert sorted(runs) == [[]] * 5 + [NAMES]
    farm.migrations.migrate(empty_database, rollback=True)
    with ThreadPoolExecutor(6) as threads:
        runs = list(threads.map(farm.migrations.migrate, [empty_database] * 6))
    assert sorted(runs) == [[]] * 5 + [NAMES[-1:]]


async def test_a_migrator_killed_in_the_middle_leaves_nothing_and_blocks_nobody(empty_database):
    code = f"""
import sys, time; sys.path.insert(0, {str(ROOT)!r})
import botfarm
backend = farm.migrations.MigrationBackend({empty_database!r})
with backend.exclusive():
    backend.apply_migrations(backend.to_apply(farm.migrations.MIGRATIONS)[:2])
    print("half", flush=True)
    time.sleep(60)
"""
    half = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert half.stdout
    assert half.stdout.readline() == "half\n"
    half.kill()
    half.communicate()
    assert await asyncio.to_thread(farm.migrations.migrate, empty_database) == NAMES


async def test_a_migration_that_fails_changes_nothing(empty_database, tmp_path, monkeypatch):
    (tmp_path / "0001.bad.sql").write_text("create table half (id int);\n\nselect 1/0;\n")
    monkeypatch.setattr(farm.migrations, "MIGRATIONS", farm.migrations.yoyo.read_migrations(str(tmp_path)))
    with pytest.raises(asyncpg.DivisionByZeroError):
        await asyncio.to_thread(farm.migrations.migrate, empty_database)
    assert await catalogue(empty_database) == []


async def test_a_migration_beside_a_backup_holds_up_no_call_and_ends_after_it(empty_database):
    await asyncio.to_thread(farm.migrations.migrate, empty_database)
    for _ in NAMES[5:]:  # back to before the one that changes locks and history
        await asyncio.to_thread(farm.migrations.migrate, empty_database, rollback=True)
    backup = await asyncpg.connect(empty_database)
    try:
        await backup.execute("begin isolation level repeatable read; select from locks, history")
        migrating = asyncio.create_task(asyncio.to_thread(farm.migrations.migrate, empty_database))
        slowest, end = 0.0, time.monotonic() + 5
        while time.monotonic() < end:
            began = time.monotonic()
            await asyncio.wait_for(execute(empty_database, "select from locks, history"), 10)
            slowest = max(slowest, time.monotonic() - began)
            await asyncio.sleep(0.05)
        assert not migrating.done()
        assert 1 < slowest < 4, "it never waited for the tables" if slowest <= 1 else "calls stood behind it"
    finally:
        await backup.close()
    assert await migrating == NAMES[5:]


async def test_a_newer_schema_is_refused_with_a_clear_message(empty_database):
    await asyncio.to_thread(farm.migrations.migrate, empty_database)
    await execute(empty_database, "insert into _yoyo_migration values ('x', '0999.future', now())")
    env = {"DATABASE_URL": empty_database}
    for status, *words in ((1, "migrate"), (3, "serve", "--port", "1")):
        refused = command(*words, env=env)
        assert refused.returncode == status
        assert "0999.future" in refused.stderr
        assert "newer version" in refused.stderr
        assert "Traceback" not in refused.stderr


def test_the_command_tells_what_it_did(empty_database):
    env = {"DATABASE_URL": empty_database}
    assert command("migrate", env=env).stdout == "".join(f"applied: {name}\n" for name in NAMES)
    assert command("migrate", env=env).stdout == "nothing to do\n"
    assert command("migrate", "--rollback", env=env).stdout == f"taken back: {NAMES[-1]}\n"


def test_no_applied_migration_was_edited():
    found = {
        name: hashlib.sha256((ROOT / "migrations" / f"{name}.sql").read_bytes()).hexdigest()[:16] for name in NAMES
    }
    assert found == PINNED


def test_every_migration_can_be_taken_back():
    assert all((ROOT / "migrations" / f"{name}.rollback.sql").exists() for name in NAMES)
