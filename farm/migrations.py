"""The schema: which migrations there are, and bringing a database up to date.

yoyo applies the files of `migrations/`, over psycopg. Importing the two takes 0.1 s and 10 MB, so only a run that has
something to do does it.
"""

from __future__ import annotations

import contextlib
import glob
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from urllib.parse import parse_qsl, urlsplit

import asyncpg

from farm import VERSION, embedded
from farm.addresses import (
    EMPTY,
    RIGHTS,
    Address,
    SchemaError,
    Unreachable,
    connect,
    explained,
    read_address,
    run_apart,
    warn_once,
)
from farm.database import SQL, Connections, sql_folder
from farm.settings import Settings, log

FOLDER = sql_folder("migrations")
MIGRATIONS = sorted(file.name.removesuffix(".sql") for file in FOLDER.iterdir() if ".rollback." not in file.name)


# ---- What there is -----------------------------------------------------------------------------------------

OLDEST = 14  # of PostgreSQL


def _for_libpq(address: Address, connection: Any) -> dict[str, Any]:
    """Where asyncpg got to by this URL, and as whom. libpq itself would read the URL otherwise here and there."""
    place, found = connection._addr, connection._params
    settings = dict(found.server_settings or {})  # all that asyncpg does not know
    asked = dict(parse_qsl(urlsplit(address.url).query))
    kept = {name: value for name, value in asked.items() if name not in settings}
    host, port = place.split("/.s.PGSQL.") if isinstance(place, str) else place
    options = [settings.pop("options", "")]
    options += [re.sub(r"([\\\s])", r"\\\1", f"-c{name}={value}") for name, value in settings.items()]
    login = {"user": found.user, "password": found.password, "dbname": found.database}
    return kept | login | {"host": host, "port": port, "options": " ".join(options)}


async def applied_migrations(database: asyncpg.Connection | Connections) -> list[str]:
    try:
        return sorted(row["migration_id"] for row in await database.fetch(SQL["list_migrations"], timeout=3))
    except asyncpg.UndefinedTableError:
        return []


async def _look(url: str, serves: bool) -> tuple[list[str], dict[str, Any]]:
    """By the service's own driver, because most starts find nothing to do."""
    connection = await connect(url, statement_cache_size=0)
    try:
        _check_server(cast("asyncpg.Record", await connection.fetchrow(SQL["get_server"])), serves)
        applied = await applied_migrations(connection)
        _check_known(applied)
        if applied == MIGRATIONS and (lacks := await connection.fetch(SQL["list_lacks"])):
            raise SchemaError(f"The database lacks {lacks[0]['lack']}. {RIGHTS}")
    finally:
        await connection.close(timeout=2)
    return applied, _for_libpq(read_address(url), connection)


def _check_server(server: asyncpg.Record, serves: bool) -> None:
    """SchemaError where it can't be used. To those who serve it is told what may lose locks."""
    if server["version"] // 10000 < OLDEST:
        raise SchemaError(
            f"The server is PostgreSQL {server['version'] // 10000}, and BotFarm needs {OLDEST} or newer."
        )
    if server["encoding"] != "UTF8":
        raise SchemaError(
            f"The database {server['name']!r} has the encoding {server['encoding']}, and BotFarm needs UTF8: "
            "create database NAME template template0 encoding 'UTF8'."
        )
    if server["schema"] is None:
        raise SchemaError(f"There is no schema {server['path']}: create it, or name another one as search_path.")
    if serves and server["careless"]:
        warn_once(
            f"PostgreSQL's {' and '.join(server['careless'])} off: a crash of the database may lose locks that were "
            "answered, and their users are then given to others. Switch on for this user and database."
        )


def _check_known(applied: list[str]) -> None:
    if unknown := set(applied).difference(MIGRATIONS):
        if MIGRATIONS[0] not in applied:
            raise SchemaError(f"Another program keeps its migrations in _yoyo_migration ({max(unknown)!r}). {EMPTY}")
        raise SchemaError(
            f"The database has the migration {max(unknown)!r}, which BotFarm {VERSION} does not know: it was set up "
            "by a newer version. Run that version, or take its migrations back with its `migrate --rollback`."
        )


def look(url: str, serves: bool = False) -> tuple[list[str], dict[str, Any]]:
    """The migrations that the database has, and its address as libpq wants it."""
    place = read_address(url).place
    try:
        return run_apart(_look(url, serves))
    except SchemaError:
        raise
    except Exception as fault:
        raise (explained(fault, place) or fault) from None


# ---- A run -------------------------------------------------------------------------------------------------


# By UTF-8, as asyncpg talks: from a database without an encoding psycopg would else read bytes, and yoyo fail.
# Without PGHOSTADDR, which asyncpg does not read.
PSYCOPG = {"prepare_threshold": None, "connect_timeout": 10, "client_encoding": "utf8", "hostaddr": ""}


def open_backend(address: dict[str, Any]) -> Any:
    """yoyo's own backend, but with all of a run in one transaction.

    yoyo's own lock is a row that a killed process leaves behind. Here one transaction holds `lock table`, the
    migrations and their marks: a run that is killed anywhere leaves nothing, and several take turns.
    """
    from psycopg import errors
    from yoyo import internalmigrations
    from yoyo.backends.core.postgresql import PostgresqlPsycopgBackend
    from yoyo.connections import DatabaseURI

    made_just_now = (errors.UniqueViolation, errors.DuplicateObject, errors.DuplicateTable)

    class Backend(PostgresqlPsycopgBackend):
        def copy(self) -> Backend:
            """Itself, so that yoyo's transactions are savepoints in ours."""
            return self

        def __exit__(self, *exception: object) -> None:
            """Kept open for the next migration."""

        def ensure_internal_schema_updated(self) -> None:
            """Done once, in `exclusive`."""

        @contextmanager
        def exclusive(self) -> Iterator[None]:
            """One transaction that no other run shares. What waits for a table holds up all who come after it."""
            with contextlib.suppress(*made_just_now), self.transaction():
                self.execute("set local lock_timeout = '2s'")
                self.execute("create table if not exists botfarm_migrating (only_one boolean primary key)")
            with self.transaction():
                self.execute("set local lock_timeout = '2s'; set local statement_timeout = 0")  # no limit of calls
                self.execute("lock table botfarm_migrating in exclusive mode")
                internalmigrations.upgrade(self)
                yield

        def log_migration(self, migration: Any, operation: str) -> None:
            """None: its look-ups of the user and of the host fail or wait in containers."""

    return Backend(DatabaseURI("postgresql", None, None, None, None, None, PSYCOPG | address), "_yoyo_migration")


MIGRATING = 600  # seconds for which a migration tries to get the tables


def migrate(url: str, rollback: bool = False, serves: bool = False) -> list[str]:
    """Apply what is missing, or take the last migration back. Returns the names of those that ran, in order.

    SchemaError when the database has migrations that this version does not know: it was set up by a newer one.
    """
    applied, address = look(url, serves)
    if applied == MIGRATIONS and not rollback:
        return []
    from psycopg import Error, errors

    end = time.monotonic() + MIGRATING
    while time.monotonic() < end:
        try:
            backend = open_backend(address)
            with contextlib.closing(backend.connection), backend.exclusive():
                return _run_migrations(backend, rollback)
        except (errors.LockNotAvailable, errors.DeadlockDetected):
            log.warning("The migration waits for others that migrate or use the tables (a backup?), calls go on.")
            time.sleep(3)
        except Error as fault:
            raise (_explained(fault, f"{address['host']}, port {address['port']}") or fault) from None
    raise SchemaError(f"Others have used this database's tables for {MIGRATING} seconds; migrate when they are done.")


def _explained(fault: Any, place: str) -> SchemaError | None:
    if fault.sqlstate is None:  # libpq's own: no connection, or none any more
        return Unreachable(f"The database cannot be reached: {place}: {str(fault).splitlines()[0]}")
    return explained(fault, place)


def _run_migrations(backend: Any, rollback: bool) -> list[str]:
    from yoyo import read_migrations

    _check_known([row[0] for row in backend.execute("select migration_id from _yoyo_migration").fetchall()])
    known = read_migrations(glob.escape(str(FOLDER)))  # it takes a pattern
    if not rollback:
        chosen = backend.to_apply(known)
        backend.apply_migrations(chosen)
    else:
        chosen = backend.to_rollback(known)[:1]
        backend.rollback_migrations(chosen)
    return [migration.id for migration in chosen]


# ---- The database of a service or a command ----------------------------------------------------------------


@contextmanager
def prepared(settings: Settings) -> Iterator[str]:
    """The URL of a database whose schema is up to date: the given one, else an embedded one that we start."""
    with contextlib.ExitStack() as owned:
        if settings.database_url:
            url = settings.database_url.reveal()
        else:
            server = embedded.start(settings.home)
            owned.callback(server.stop)
            url = server.dsn
        _patiently(url)
        yield url


def _patiently(url: str) -> None:
    """Migrate; a database that starts up gets 30 s."""
    end, told = time.monotonic() + 30, ""
    while True:
        try:
            migrate(url, serves=True)
            return
        except Unreachable as fault:
            if time.monotonic() > end:
                raise
            if str(fault) != told:
                log.warning("Waiting for the database: %s", told := str(fault))
            time.sleep(1)
