from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import socket
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import asyncpg
import yoyo
from yoyo.backends.base import DatabaseBackend

from farm import VERSION, embedded
from farm.database import HERE
from farm.settings import Settings, log


class _Cursor:
    """The little of a DB-API cursor that yoyo uses."""

    description = None

    def __init__(self, connection: _Connection) -> None:
        self.connection = connection
        self.rows: deque[tuple[Any, ...]] = deque()

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> None:
        self.rows = deque(tuple(row) for row in self.connection.run(sql, parameters))

    def fetchone(self) -> tuple[Any, ...] | None:
        return self.rows.popleft() if self.rows else None

    def fetchall(self) -> list[tuple[Any, ...]]:
        return list(self.rows)

    def close(self) -> None:
        self.rows.clear()


class SchemaError(Exception):
    """The database's schema does not fit this version of BotFarm, or its address leads nowhere."""


UNREADABLE_URL = "{} is not readable: write what is special in its password as %2F (/), %23 (#), %3F (?), %40 (@)."


class _Connection:
    """A blocking connection over asyncpg, with an event loop of its own."""

    def __init__(self, url: str) -> None:
        self.runner = asyncio.Runner()
        try:
            self.wire = self.runner.run(asyncpg.connect(url, timeout=10, statement_cache_size=0))
        except ValueError:  # its message shows a part of the URL, maybe of the password
            raise SchemaError(UNREADABLE_URL.format("DATABASE_URL")) from None

    def run(self, sql: str, parameters: Sequence[Any]) -> Sequence[Any]:
        if parameters:
            numbers = iter(range(1, len(parameters) + 1))
            sql = re.sub(r"%s", lambda _: f"${next(numbers)}", sql)
            return self.runner.run(self.wire.fetch(sql, *parameters))
        if sql.lstrip()[:6].lower() == "select":
            return self.runner.run(self.wire.fetch(sql))
        self.runner.run(self.wire.execute(sql))
        return ()

    def cursor(self) -> _Cursor:
        return _Cursor(self)

    def commit(self) -> None:
        """yoyo's transactions are told in SQL, see MigrationBackend."""

    rollback = commit

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.runner.run(self.wire.close(timeout=5))
        self.runner.close()


class _Driver:
    paramstyle = "format"
    DatabaseError = asyncpg.PostgresError


class MigrationBackend(DatabaseBackend):
    """yoyo over asyncpg, with all of a run in one transaction.

    yoyo's own lock is a row that a killed process leaves behind, and it marks a migration as applied in a
    second transaction. Here one transaction holds `lock table`, the migrations and their marks, so a run
    that is killed anywhere leaves nothing, and several that start at once go one after the other.
    """

    list_tables_sql = "SELECT table_name FROM information_schema.tables WHERE table_schema = current_schema()"
    driver = _Driver  # pyright: ignore

    def __init__(self, url: str) -> None:
        self._connection = _Connection(url)
        self.migration_table = "_yoyo_migration"
        self.has_transactional_ddl = True
        self.DatabaseError = asyncpg.PostgresError

    def __exit__(self, *exception: object) -> None:
        """Kept open for the next migration: see copy()."""

    def copy(self) -> MigrationBackend:
        return self

    def list_tables(self, **_: Any) -> list[str]:
        return [row[0] for row in self.execute(self.list_tables_sql).fetchall()]

    def commit(self) -> None:
        self.execute("commit")
        self._in_transaction = False

    def rollback(self) -> None:
        self.execute("rollback")
        self._in_transaction = False

    def ensure_internal_schema_updated(self) -> None:
        """Done once, at the start of `exclusive`."""

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """One transaction that no other run shares."""
        with self.transaction():
            self.execute("create table if not exists botfarm_migrating (only_one boolean primary key)")
            self.execute("lock table botfarm_migrating in exclusive mode")
            self.execute("set local lock_timeout = '2s'")  # what waits for a table holds up all who come after it
            if yoyo.internalmigrations.needs_upgrading(self):  # pyright: ignore[reportAttributeAccessIssue]
                yoyo.internalmigrations.upgrade(self)  # pyright: ignore[reportAttributeAccessIssue]
            yield

    def get_log_data(self, migration: Any = None, operation: str = "apply") -> dict[str, Any]:
        """As yoyo's, without its look-ups of the user and the host, which fail or wait in containers."""
        return {
            "id": str(uuid.uuid4()),
            "migration_id": migration.id if migration else None,
            "migration_hash": migration.hash if migration else None,
            "username": str(os.getuid()),
            "hostname": socket.gethostname(),
            "created_at_utc": datetime.now(UTC).replace(tzinfo=None),
            "operation": operation,
        }


MIGRATIONS = yoyo.read_migrations(str(HERE / "migrations"))


MIGRATING = 600  # seconds for which a migration tries to get the tables


def migrate(url: str, rollback: bool = False) -> list[str]:
    """Apply what is missing, or take the last migration back. Returns the names of those that ran, in order.

    SchemaError when the database has migrations that this version does not know: it was set up by a newer one.
    """
    end = time.monotonic() + MIGRATING
    for attempt in itertools.count(1):
        backend = MigrationBackend(url)
        try:
            with backend.exclusive():
                return _run_migrations(backend, rollback)
        except (asyncpg.UniqueViolationError, asyncpg.DuplicateTableError):
            pause = 0.05 * attempt  # several first starts at once: the others wait for the first
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
            log.warning("The migration waits for others that use the tables (a backup?), and lets calls through.")
            pause = 3
        finally:
            backend.connection.close()
        if time.monotonic() > end:
            break
        time.sleep(pause)
    raise SchemaError(f"Others have used this database's tables for {MIGRATING} seconds; migrate when they are done.")


def _run_migrations(backend: MigrationBackend, rollback: bool) -> list[str]:
    check_schema(row[0] for row in backend.execute("select migration_id from _yoyo_migration").fetchall())
    if not rollback:
        chosen = backend.to_apply(MIGRATIONS)
        backend.apply_migrations(chosen)
    else:
        chosen = backend.to_rollback(MIGRATIONS)[:1]
        backend.rollback_migrations(chosen)
    return [migration.id for migration in chosen]


def check_schema(applied: Iterable[str]) -> None:
    """SchemaError when the database knows migrations that we don't."""
    unknown = sorted(set(applied) - {migration.id for migration in MIGRATIONS})
    if unknown:
        raise SchemaError(
            f"The database has the migration {unknown[-1]!r}, which BotFarm {VERSION} does not know: it was set up "
            "by a newer version. Run that version, or take its migrations back with its `migrate --rollback`."
        )


@contextmanager
def prepared(settings: Settings) -> Iterator[str]:
    """The URL of a database whose schema is up to date: the given one, else an embedded one that we start."""
    if settings.database_url:
        url = settings.database_url.reveal()
        _patiently(url)
        yield url
        return
    server = embedded.start(settings.home)
    try:
        _patiently(server.dsn)
        yield server.dsn
    finally:
        server.stop()


def _patiently(url: str) -> None:
    """Migrate, in a thread because we may be in an event loop; a database that starts up gets 30 s."""
    end = time.monotonic() + 30
    while True:
        try:
            with ThreadPoolExecutor(1) as thread:
                thread.submit(migrate, url).result()
            return
        except (OSError, asyncpg.CannotConnectNowError) as fault:
            if time.monotonic() > end:
                raise SchemaError(f"The database cannot be reached: {type(fault).__name__}: {fault}") from None
            log.warning("Waiting for the database: %s", fault)
            time.sleep(1)


@contextmanager
def database(settings: Settings) -> Iterator[str]:
    """The database for a command: the given one, else the embedded one, started if it does not run."""
    if settings.database_url:
        yield settings.database_url.reveal()
    else:
        with embedded.database(settings.home) as url:
            yield url
