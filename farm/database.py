"""The database: its statements, the connections, and statements that calls share.

A statement is a file of `sql/` and is named as that is: `SQL["get_user"]`. There are two pools of connections, one for
locks and one for everything else, so that no list stands before a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import os
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import asyncpg
from msgspec import Struct

from farm.addresses import read_address


def sql_folder(name: str) -> Traversable:
    """`sql` or `migrations`: an installed package holds them, in a checkout they lie beside it. Never an empty one."""
    inside = importlib.resources.files("farm") / name
    folder = inside if inside.is_dir() else Path(__file__).resolve().parent.parent / name
    if not folder.is_dir() or not any(file.name.endswith(".sql") for file in folder.iterdir()):
        raise FileNotFoundError(f"There are no SQL files in {folder}: BotFarm is not installed as a whole.")
    return folder


SQL = {file.name.removesuffix(".sql"): file.read_text(encoding="utf-8") for file in sql_folder("sql").iterdir()}

# ---- Connections -------------------------------------------------------------------------------------------


class Busy(Exception):
    """Too many calls wait for the database, or none gets a connection: nothing was sent."""


class Lost(Exception):
    """The connection ended under a call: what it sent may have been done."""


# The schema, or a right in it, is not there: `migrate` or the database's owner help.
SCHEMA_FAULTS = (
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.InvalidSchemaNameError,
    asyncpg.InsufficientPrivilegeError,
)

# What is raised when the database is away, restarting, too busy, or cuts us off (a pooler tells of a login late), and
# when it lacks something. All else is a bug of ours: a wrong argument is asyncpg's InterfaceError, too.
DATABASE_FAULTS = (
    Busy,
    Lost,
    ConnectionError,
    TimeoutError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.PostgresSystemError,
    asyncpg.TransactionRollbackError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCachedStatementError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.ObjectNotInPrerequisiteStateError,
    asyncpg.ReadOnlySQLTransactionError,
    *SCHEMA_FAULTS,
)

# Signs that a server is no longer the one that takes writes. (The last: a standby cancels what reads old rows.)
DEMOTED = (
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.SerializationError,
)


async def _keep(connection: asyncpg.Connection) -> None:
    """No reset on the return of a connection: we keep no session state (87 -> 59 us a query)."""


async def _learn_types(connection: asyncpg.Connection) -> None:
    """Behind a PgBouncer, in one transaction: get_types.sql says why."""
    async with connection.transaction():
        await connection.fetch(SQL["get_types"])


NO_CONNECTION = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)


def _is_broken(connection: Any, fault: asyncpg.InterfaceError) -> bool:
    """Whether it is the connection that fails, and not what it was asked.

    One that the server ends between two statements seems to be busy with another one: we give each to one call alone.
    """
    with contextlib.suppress(asyncpg.InterfaceError):  # raised where the pool has given it up
        return connection.is_closed() or any(sign in str(fault) for sign in ("is cancelling", "another operation"))
    return True


class Connections:
    """A pool of connections whose callers are told within seconds when there is none for them."""

    PATIENCE = 3  # seconds to wait for a connection
    STATEMENT = 6  # seconds for a statement; with a connection to wait for and to give back, ten for a call
    CROWD = 500  # so many may wait for one

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._waiting = 0
        self.kin = [self]  # all pools of the same server: what one learns of it counts for all

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[asyncpg.Connection]:
        if self._waiting >= self.CROWD:
            raise Busy(f"{self._waiting} calls wait for a database connection already")
        self._waiting += 1
        try:
            connection = await self._pool.acquire(timeout=self.PATIENCE)
        except NO_CONNECTION as fault:  # told apart, because nothing was sent
            raise Busy(f"there is no database connection: {type(fault).__name__}: {fault}") from fault
        finally:
            self._waiting -= 1
        try:
            yield cast("asyncpg.Connection", connection)
        except DEMOTED:
            await self.look_anew()
            raise
        except asyncpg.InterfaceError as fault:
            if _is_broken(connection, fault):
                raise Lost(f"the connection ended: {fault}") from fault
            raise
        finally:  # bounded, because it waits for a cancelled statement, which a frozen server never ends
            with contextlib.suppress(*NO_CONNECTION):  # one that can't be given back the pool has ended
                await self._pool.release(connection, timeout=1)

    async def look_anew(self) -> None:
        """Use no connection that there is once more: new ones look for the server that takes writes."""
        for each in self.kin:
            await each._pool.expire_connections()

    def gauges(self) -> tuple[int, int, int, int]:
        """Connections that work, that are idle, that may be opened in all, and calls that wait for one."""
        size, idle = self._pool.get_size(), self._pool.get_idle_size()
        return size - idle, idle, self._pool.get_max_size(), self._waiting

    async def fetch(self, sql: str, *args: Any, timeout: float | None = None) -> list[asyncpg.Record]:  # noqa: ASYNC109
        for _ in range(5):
            with contextlib.suppress(asyncpg.DeadlockDetectedError):  # rolled back whole, so safe to repeat
                async with self.acquire() as connection:
                    return await connection.fetch(sql, *args, timeout=timeout)
        raise Busy("too many calls change the same rows")

    async def fetchrow(self, sql: str, *args: Any) -> asyncpg.Record | None:
        return next(iter(await self.fetch(sql, *args)), None)

    async def fetchval(self, sql: str, *args: Any) -> Any:
        row = await self.fetchrow(sql, *args)
        return row[0] if row else None

    async def execute(self, sql: str, *args: Any) -> str:
        async with self.acquire() as connection:
            return await connection.execute(sql, *args)


@asynccontextmanager
async def open_pool(
    url: str, size: int, plans: str, seconds: float = Connections.STATEMENT, pooler: str = "off"
) -> AsyncIterator[Connections]:
    """Connections whose statements are planned in the given way: force_generic_plan once, force_custom_plan each time.

    The statements of the hot path take arrays, which PostgreSQL would plan anew each time (database CPU
    60 -> 41 us a request); lists and filters want a plan that knows which filters are set.
    """
    address = read_address(url)
    # Statements here read rows anew that others have changed meanwhile; at other levels they would fail.
    tuning = {"plan_cache_mode": plans, "jit": "off", "default_transaction_isolation": "read committed"}
    if "application_name=" not in address.url:
        tuning["application_name"] = "botfarm"
    if plans == "force_generic_plan":  # a plan made while a table was small must not scan it when it has grown
        tuning |= {"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"}
    options: dict[str, Any] = {"server_settings": tuning, "target_session_attrs": "read-write"}
    if pooler == "on":  # PgBouncer knows no prepared statements (before 1.21) and refuses unknown start-up parameters
        options = {"statement_cache_size": 0, "init": _learn_types}
    pool = await asyncpg.create_pool(
        address.url, min_size=1, max_size=size, command_timeout=seconds, timeout=address.seconds, reset=_keep, **options
    )
    try:
        yield Connections(pool)
    finally:
        try:
            await asyncio.wait_for(pool.close(), 0.5)
        except TimeoutError:
            pool.terminate()


# ---- Statements that calls share ---------------------------------------------------------------------------

BACKLOG = 5000  # calls that may wait for a statement
T = TypeVar("T")
R = TypeVar("R")


class Coalescer(Generic[T, R]):
    """Calls `run` with the items that have gathered, at most `limit` at once; `run` answers in their order.

    One statement runs at a time (two gave nothing). With a limit of one nothing is gathered: each call has a statement
    of its own, at once, as in a service that shares none.
    """

    def __init__(
        self, run: Callable[[list[T]], Awaitable[Sequence[R]]], limit: int, tell: Callable[[int], None] = lambda _: None
    ) -> None:
        self._run = run
        self._limit = limit
        self._tell = tell  # hears the size of each batch
        self._gathered: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, item: T) -> asyncio.Future[R]:
        """The result to come. Busy where too many wait already."""
        if len(self._gathered) >= BACKLOG:
            raise Busy(f"{len(self._gathered)} calls wait for the database already")
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._gathered.append((item, future))
        if self._limit == 1 or not self._tasks:
            self._tasks.add(asyncio.create_task(self._drain()))
        return future

    async def _drain(self) -> None:
        try:
            while self._gathered:
                count = min(len(self._gathered), self._limit)
                self._tell(count)
                await self._serve([self._gathered.popleft() for _ in range(count)])
        finally:
            self._tasks.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    async def _serve(self, batch: list[tuple[T, asyncio.Future[R]]]) -> None:
        """One statement for all; where it fails for a reason that may be one call's alone, one for each."""
        try:
            for (_, future), result in zip(batch, await self._run([item for item, _ in batch]), strict=True):
                if not future.done():
                    future.set_result(result)
        except Exception as error:
            if len(batch) > 1 and not isinstance(error, DATABASE_FAULTS):
                for one in batch:
                    await self._serve([one])
            else:
                if isinstance(error, (TimeoutError, Busy)):  # those behind have waited as long
                    batch += self._gathered
                    self._gathered.clear()
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)


# ---- What statements take ----------------------------------------------------------------------------------


def new_id() -> uuid.UUID:
    """A UUID of version 7 (RFC 9562): a millisecond, then 74 random bits.

    The time keeps the indexes of what is written together together; it decides nothing.
    """
    bits = time.time_ns() // 1_000_000 << 80 | int.from_bytes(os.urandom(10), "big")
    return uuid.UUID(int=bits & ~(0xF << 76) & ~(0x3 << 62) | 0x7 << 76 | 0x2 << 62)


def column(values: list[Any]) -> list[Any]:
    """Values as unnest() takes them beside others. It fills up with nulls, so of nothing but nulls none is sent.

    Most columns of most calls are such, and asyncpg asks of each null whether it is a list.
    """
    return values if any(values) or values.count(None) < len(values) else []


def columns(items: Iterable[Struct], kind: type[Struct]) -> list[list[Any]]:
    """A column for each field of the items but their cause."""
    kept = list(items)
    return [column([getattr(item, name) for item in kept]) for name in kind.__struct_fields__ if name != "cause"]
