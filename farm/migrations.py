"""The schema: which migrations there are, and bringing a database up to date.

yoyo applies the files of `migrations/`, over psycopg. Importing the two takes 0.1 s and 10 MB, so only a
run that has something to do does it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import asyncpg

from farm import VERSION, embedded
from farm.database import SQL, sql_folder
from farm.settings import Settings, log

FOLDER = sql_folder("migrations")
MIGRATIONS = sorted(file.name.removesuffix(".sql") for file in FOLDER.iterdir() if ".rollback." not in file.name)


class SchemaError(Exception):
    """The database's schema does not fit this version of BotFarm, or its address leads nowhere."""


class Unreachable(SchemaError):
    """The database does not serve, or not yet."""


# ---- The address -------------------------------------------------------------------------------------------
# The service reads DATABASE_URL by asyncpg, a migration by libpq. They differ in what they know, and in what counts
# where a thing is said twice; but both have to come to one database.

PLACE = re.compile(r"(/.*|[^:\[]*)(?::(\d+))?|\[(.+)\](?::(\d+))?")  # a folder or host, or an IPv6 address
SOCKETS = "/run/postgresql,/var/run/postgresql,/tmp,localhost"


def libpq_parameters(url: str) -> dict[str, Any]:
    """What asyncpg reads in a URL (and it has read this one), as libpq wants it."""
    parts = urlsplit(url)
    asked = dict(parse_qsl(parts.query))
    login, _, place = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    host, port = _places(place or asked.get("host") or _default_hosts(asked))
    named = {
        "user": unquote(user) or asked.get("user"),
        "password": unquote(password) or asked.get("password"),
        "host": unquote(host) if place else host,
        "port": port if place else asked.get("port", port),
        "dbname": unquote(parts.path[1:]) if parts.path else asked.get("dbname", asked.get("database")),
    }
    return _with_settings(asked | {name: value or "" for name, value in named.items()})


def _default_hosts(asked: dict[str, str]) -> str:
    """Where asyncpg looks; empty where libpq is told elsewhere."""
    return "" if "service" in asked or {"PGHOST", "PGSERVICE"} & os.environ.keys() else SOCKETS


def _places(hosts: str) -> tuple[str, str]:
    """Hosts and ports of a list, each comma-separated again."""
    found = [match.groups("") for match in map(PLACE.fullmatch, hosts.split(",")) if match]
    ports = [first or second for _, first, _, second in found]
    told = ",".join(port or "5432" for port in ports) if any(ports) else ""
    return ",".join(name or address for name, _, address, _ in found), told


def _with_settings(parameters: dict[str, str]) -> dict[str, str]:
    """asyncpg takes what it does not know for a setting of the session; libpq wants that among the `options`."""
    from psycopg.pq import Conninfo

    known = {option.keyword.decode() for option in Conninfo.get_defaults()}
    settings = {name: value for name, value in parameters.items() if name not in known | {"database"}}
    given = [re.sub(r"([\\\s])", r"\\\1", f"-c{name}={value}") for name, value in settings.items()]
    options = " ".join([parameters.get("options", ""), *given]).strip()
    kept = {name: value for name, value in parameters.items() if name in known}
    return {name: value for name, value in (kept | {"options": options}).items() if value}


# ---- A run -------------------------------------------------------------------------------------------------


def _log_data(migration: Any, operation: str) -> dict[str, Any]:
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


def open_backend(url: str) -> Any:
    """yoyo's own backend, but with all of a run in one transaction.

    yoyo's own lock is a row that a killed process leaves behind, and it marks a migration as applied in a
    second transaction. Here one transaction holds `lock table`, the migrations and their marks, so a run
    that is killed anywhere leaves nothing, and several that start at once go one after the other.
    """
    from psycopg import errors
    from yoyo import internalmigrations
    from yoyo.backends.core.postgresql import PostgresqlPsycopgBackend
    from yoyo.connections import DatabaseURI

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
            """One transaction that no other run shares."""
            with contextlib.suppress(errors.UniqueViolation, errors.DuplicateObject):  # another made it just now
                self.execute("create table if not exists botfarm_migrating (only_one boolean primary key)")
            with self.transaction():
                self.execute("lock table botfarm_migrating in exclusive mode")
                self.execute("set local lock_timeout = '2s'")  # what waits for a table holds up all who come after it
                internalmigrations.upgrade(self)
                yield

        def get_log_data(self, migration: Any = None, operation: str = "apply") -> dict[str, Any]:
            return _log_data(migration, operation)

    own = {"prepare_threshold": None, "target_session_attrs": "read-write", "connect_timeout": "10"}
    address = own | libpq_parameters(url)
    return Backend(DatabaseURI("postgresql", None, None, None, None, None, address), "_yoyo_migration")


MIGRATING = 600  # seconds for which a migration tries to get the tables


def migrate(url: str, rollback: bool = False) -> list[str]:
    """Apply what is missing, or take the last migration back. Returns the names of those that ran, in order.

    SchemaError when the database has migrations that this version does not know: it was set up by a newer one.
    """
    if applied(url) == MIGRATIONS and not rollback:
        return []
    from psycopg import OperationalError, errors

    end = time.monotonic() + MIGRATING
    while time.monotonic() < end:
        try:
            backend = open_backend(url)
            with contextlib.closing(backend.connection), backend.exclusive():
                return _run_migrations(backend, rollback)
        except (errors.LockNotAvailable, errors.DeadlockDetected):
            log.warning("The migration waits for others that use the tables (a backup?), and lets calls through.")
            time.sleep(3)
        except OperationalError as fault:
            raise Unreachable(f"The database cannot be reached: {fault}") from None
    raise SchemaError(f"Others have used this database's tables for {MIGRATING} seconds; migrate when they are done.")


UNREADABLE_URL = (
    "DATABASE_URL is not readable: write what is special in its password as %2F (/), %23 (#), %3F (?), %40 (@)."
)


def applied(url: str) -> list[str]:
    """The migrations that the database has, by the service's own driver: most starts find nothing to do."""

    async def ask() -> list[str]:
        connection = await asyncpg.connect(url, timeout=10, statement_cache_size=0)
        try:
            return sorted([row["migration_id"] for row in await connection.fetch(SQL["list_migrations"])])
        except asyncpg.UndefinedTableError:
            return []
        finally:
            await connection.close(timeout=5)

    try:
        with ThreadPoolExecutor(1) as thread:  # because we may be in an event loop
            return thread.submit(asyncio.run, ask()).result()
    except ValueError:  # its message shows a part of the URL, maybe of the password
        raise SchemaError(UNREADABLE_URL) from None
    except (OSError, asyncpg.CannotConnectNowError) as fault:
        raise Unreachable(f"The database cannot be reached: {type(fault).__name__}: {fault}") from None


def _run_migrations(backend: Any, rollback: bool) -> list[str]:
    from yoyo import read_migrations

    check_schema(row[0] for row in backend.execute("select migration_id from _yoyo_migration").fetchall())
    known = read_migrations(str(FOLDER))
    if not rollback:
        chosen = backend.to_apply(known)
        backend.apply_migrations(chosen)
    else:
        chosen = backend.to_rollback(known)[:1]
        backend.rollback_migrations(chosen)
    return [migration.id for migration in chosen]


def check_schema(applied: Iterable[str]) -> None:
    """SchemaError when the database knows migrations that we don't."""
    if unknown := sorted(set(applied) - set(MIGRATIONS)):
        raise SchemaError(
            f"The database has the migration {unknown[-1]!r}, which BotFarm {VERSION} does not know: it was set up "
            "by a newer version. Run that version, or take its migrations back with its `migrate --rollback`."
        )


# ---- The database of a service or a command ----------------------------------------------------------------


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
    """Migrate; a database that starts up gets 30 s."""
    end = time.monotonic() + 30
    while True:
        try:
            migrate(url)
            return
        except Unreachable as fault:
            if time.monotonic() > end:
                raise
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
