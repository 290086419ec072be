"""Imports of users, as NDJSON or CSV, and exports as NDJSON.

The lines of a file are staged in a temporary table as they arrive, 500 at a time, so that a file of any size takes
little memory. Where all of them are right, a few statements at the end apply them to the users, all or nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import msgspec
from msgspec import UNSET

from farm.codes import NO_CODES, Columns, Timed, opened, read_totp, sealed
from farm.database import DATABASE_FAULTS, SQL, Connections, new_id
from farm.passwords import Passwords
from farm.problems import (
    BodyTooLarge,
    DatabaseUnavailable,
    Forbidden,
    Invalid,
    LineError,
    LoginTaken,
    MalformedBody,
    shown,
)
from farm.settings import WORD, Settings
from farm.words import UNREADABLE, Imported, ImportedUser, User, UserFilter, field_errors, forbidden

PAUSE = 30  # seconds that a body may take, and an import pause
SLOWEST = 16 * 1024  # bytes a second that an import has to bring, after its first PAUSE
LONGEST_LINE = 64 * 1024
CHUNK = 500  # users that are staged at once

# ---- Lines to users ----------------------------------------------------------------------------------------

FIELDS = ("login", "password", "project_id", "env", "domain", "totp")
Numbered = tuple[int, ImportedUser, Timed | None]  # the line that a user began on, the user, and its codes


class ImportFile:
    """Splits an import into lines, and reads these; what is wrong with them gathers in `errors`, the first 100."""

    def __init__(self, settings: Settings, projects: Sequence[uuid.UUID] | None = None) -> None:
        """`projects` are what the caller is limited to; None: all."""
        self.settings = settings
        self.projects = projects
        self.errors: list[LineError] = []
        self._number = 0
        self._rest = b""

    def feed(self, part: bytes) -> Iterator[Numbered]:
        *whole, rest = (self._rest + part).split(b"\n")
        self._rest = rest[: LONGEST_LINE + 1]  # of a line that is too long, as much as tells so
        for line in whole:
            self._number += 1
            if len(line) > LONGEST_LINE:
                self.fail(self._number, None, f"the line is over {LONGEST_LINE} bytes")
            elif numbered := self.parse(self._number, line):
                yield numbered

    def close(self) -> Iterator[Numbered]:
        """After the last part."""
        if self._rest:
            yield from self.feed(b"\n")

    def parse(self, number: int, line: bytes) -> Numbered | None:
        raise NotImplementedError

    def fail(self, line: int, field: str | None, message: str) -> None:
        self.errors.append(LineError(line, field, message))
        if len(self.errors) > 200:
            self.errors = self.first_errors()

    def first_errors(self) -> list[LineError]:
        return sorted(self.errors, key=lambda error: error.line)[:100]

    def check(self, number: int, values: Any) -> Numbered | None:
        """Of several faults in a line the first is told, so that the first 100 tell of as many lines."""
        try:
            user = msgspec.convert(values, ImportedUser)
        except msgspec.ValidationError as error:
            fault = field_errors(error, values, ImportedUser)[0]
            return self.fail(number, fault.field, fault.message)
        if self.projects is not None and user.project_id not in self.projects:
            raise Forbidden.project(user.project_id, f"Line {number}: ")
        for fault in forbidden(self.settings, user):
            return self.fail(number, fault.field, fault.message)
        try:
            return number, user, read_totp(user.totp) if user.totp else None
        except ValueError as error:
            return self.fail(number, "totp", str(error))


class NdjsonFile(ImportFile):
    """A JSON object a line; blank lines are passed over."""

    def parse(self, number: int, line: bytes) -> Numbered | None:
        if not line.strip():
            return None
        try:
            values = msgspec.json.decode(line)
        except UNREADABLE:
            return self.fail(number, None, "the line is not JSON in UTF-8")
        return self.check(number, values)


class CsvFile(ImportFile):
    """RFC 4180 with a header line. Empty cells of password, domain, totp and labels count as left out."""

    header: list[str] | None = None  # before it was read; empty: it is bad, and no line is looked at

    def __init__(self, settings: Settings, projects: Sequence[uuid.UUID] | None = None) -> None:
        super().__init__(settings, projects)
        self._record = bytearray()  # one whose quotes are not closed yet, and the line it began on
        self._quotes = self._began = 0

    def parse(self, number: int, line: bytes) -> Numbered | None:
        self._began = self._began or number
        self._record += line + b"\n"
        self._quotes += line.count(b'"')
        if self._quotes % 2 and len(self._record) <= LONGEST_LINE:
            return None
        began, record = self._began, bytes(self._record)
        self._began, self._record, self._quotes = 0, bytearray(), 0
        if len(record) > LONGEST_LINE + 1:
            return self.fail(began, None, f"the record is over {LONGEST_LINE} bytes; is a quote not closed?")
        return self._parse_record(began, record)

    def close(self) -> Iterator[Numbered]:
        yield from super().close()
        if self._record:
            self.fail(self._began, None, "a quote is not closed")
        elif self.header is None:
            self.fail(1, None, "the file is empty; a CSV file begins with a header line")

    def _parse_record(self, number: int, record: bytes) -> Numbered | None:
        header, self.header = self.header, self.header or []
        try:
            text = record.decode("utf-8-sig" if header is None else "utf-8")
            cells = next(csv.reader([text], strict=True))
        except (UnicodeError, csv.Error) as error:
            return self.fail(number, None, f"the line is not CSV in UTF-8: {error}")
        if header is None:
            return self._read_header([cell.strip() for cell in cells])
        return self._read_cells(number, header, cells) if cells and header else None

    def _read_header(self, names: list[str]) -> None:
        for column, name in enumerate(names, 1):  # by number: without a header, a name would be a password
            if name not in FIELDS and not (name.startswith("label.") and re.match(WORD, name[6:])):
                known = f"{', '.join(FIELDS)} or label.<key>"
                self.fail(1, None, f"column {column} is not one of {known}; is the header line missing?")
            elif name in names[: column - 1]:
                self.fail(1, name, f"the column {shown(name)} is there twice")
        for name in ("login", "project_id", "env"):
            if name not in names:
                self.fail(1, name, f"the column {name} is missing")
        self.header = [] if self.errors else names

    def _read_cells(self, number: int, header: list[str], cells: list[str]) -> Numbered | None:
        if len(cells) != len(header):
            return self.fail(number, None, f"the line has {len(cells)} columns, the header has {len(header)}")
        named = dict(zip(header, cells, strict=True))
        values: dict[str, Any] = {k: v for k, v in named.items() if k in FIELDS and (v or k in ("login", "env"))}
        values["labels"] = {k[6:]: v for k, v in named.items() if k.startswith("label.") and v}
        return self.check(number, values)


# ---- The body ----------------------------------------------------------------------------------------------


async def _parts(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The body as it arrives. One that pauses or drips holds a transaction and a turn, and is given up."""
    waited, size = 0.0, 0
    while True:
        begin = time.monotonic()
        try:
            async with asyncio.timeout(min(PAUSE, PAUSE + size / SLOWEST - waited)):
                part = await anext(stream, None)
        except TimeoutError:
            text = f"The import paused for {PAUSE} seconds, or brought under {SLOWEST} bytes a second"
            raise MalformedBody(f"{text}; nothing was stored.", headers={"Connection": "close"}) from None
        if part is None:
            return
        waited += time.monotonic() - begin
        size += len(part)
        yield part


async def chunks(body: AsyncIterator[bytes], file: ImportFile, limit: int) -> AsyncIterator[list[Numbered]]:
    """The users of a body, CHUNK at a time. After 100 errors the rest is read and dropped."""
    size, users = 0, []
    async for part in _parts(body):
        size += len(part)
        if size > limit:
            raise BodyTooLarge(f"The import is over BOTFARM_MAX_IMPORT, {limit} bytes: send it in parts.")
        if len(file.errors) >= 100:
            continue
        for user in file.feed(part):
            users.append(user)
            if len(users) == CHUNK:
                yield users
                users = []
    users += file.close()
    if users:
        yield users


# ---- Users to the database ---------------------------------------------------------------------------------

COLUMNS = (
    *("line", "kind", "id", "project_id", "env", "domain", "login", "labels", "secret"),
    *("has_codes", "code_key", "code_sealed", "code_period"),
)
TAKEN = "Other calls made, renamed or deleted users of this file meanwhile, and nothing was stored: send it again."


class Import:
    """One import: a temporary table in one transaction, filled chunk by chunk and applied at the end."""

    def __init__(self, connection: asyncpg.Connection, passwords: Passwords, file: ImportFile) -> None:
        self.connection = connection
        self.passwords = passwords
        self.file = file
        self.kinds: Counter[str] = Counter()

    async def stage(self, users: list[Numbered]) -> None:
        """Compare with the users that are known, seal the passwords that are new, and keep both for `apply`."""
        keys = [(user.project_id, user.env, user.login) for _, user, _ in users]
        found = await self.connection.fetch(SQL["import_known"], *zip(*keys, strict=True))
        known = {row["ordinal"]: row for row in found}
        rows = [await self._row(*numbered, known.get(place)) for place, numbered in enumerate(users, 1)]
        await self.connection.copy_records_to_table(
            "import_rows", schema_name="pg_temp", columns=COLUMNS, records=[row for row in rows if row]
        )

    async def _row(
        self, line: int, user: ImportedUser, timed: Timed | None, known: asyncpg.Record | None
    ) -> tuple[Any, ...] | None:
        if known is None and user.password is None:
            return self.file.fail(line, "password", "a password is needed: this user is new")
        id = known["id"] if known else new_id()
        secret = await self._secret(id, user.password, known)
        codes = self._codes(id, user, timed, known)
        kind = "created"
        if known:
            same = known["domain"] == user.domain and msgspec.json.decode(known["labels"]) == user.labels
            kind = "unchanged" if same and secret is None and codes is None else "updated"
        self.kinds[kind] += 1
        labels = msgspec.json.encode(user.labels).decode()
        place = user.project_id, user.env, user.domain, user.login
        return line, kind, id, *place, labels, secret, codes is not None, *(codes or NO_CODES)

    async def _secret(self, id: uuid.UUID, password: str | None, known: asyncpg.Record | None) -> str | None:
        """What to store; None keeps what stands, without a password or where that is the same."""
        if password is None or (known and await self.passwords.verify(id, known["secret"], password)):
            return None
        return await self.passwords.store(id, password)

    def _codes(
        self, id: uuid.UUID, user: ImportedUser, timed: Timed | None, known: asyncpg.Record | None
    ) -> Columns | None:
        """What to store; None keeps what stands, without a totp or where that is the same. NotSealed without keys."""
        if user.totp is UNSET:
            return None
        self.passwords.sealing()
        if timed == (opened(self.passwords, known) if known and known["sealed"] else None):
            return None
        return sealed(self.passwords, id, timed) if timed else NO_CODES

    async def check(self) -> None:
        """Invalid when the file has errors, logins that stand in it twice among them."""
        for row in await self.connection.fetch(SQL["import_duplicates"], timeout=600):
            message = f"{shown(row['login'])} stands in the lines {row['first']} and {row['line']}"
            self.file.fail(row["line"], "login", message)
        if self.file.errors:
            raise Invalid(self.file.first_errors())

    async def apply(self) -> Imported:
        """All or nothing. LoginTaken when others made, renamed or deleted users of the file since they were staged."""
        for _ in range(10):  # deadlocks with calls that change a few of them
            with contextlib.suppress(asyncpg.DeadlockDetectedError):
                async with self.connection.transaction():
                    await self._write()
                return Imported(*(self.kinds[kind] for kind in Imported.__struct_fields__))
        raise LoginTaken(TAKEN)

    async def _write(self) -> None:
        (known,) = await self.connection.fetch(SQL["import_update"], timeout=3600)
        if any(count != self.kinds[kind] for kind, count in known.items()):
            raise LoginTaken(TAKEN)
        try:
            await self.connection.execute(SQL["import_create"], timeout=3600)
        except asyncpg.UniqueViolationError:
            raise LoginTaken(TAKEN) from None
        await self.connection.execute(SQL["import_codes"], timeout=3600)
        await self.connection.execute(SQL["import_move"], timeout=3600)


class Imports:
    """Runs imports, two at a time, so that they leave connections to others."""

    def __init__(self, settings: Settings, hot: Connections, pool: Connections, passwords: Passwords) -> None:
        self._limit = settings.max_import
        self._hot = hot
        self._pool = pool
        self._passwords = passwords
        self._turns = asyncio.Semaphore(2)

    async def run(self, file: ImportFile, body: AsyncIterator[bytes]) -> Imported:
        async with self._turn(), self._pool.acquire() as connection:
            async with connection.transaction():
                await connection.execute(SQL["import_stage"])
                job = Import(connection, self._passwords, file)
                async for users in chunks(body, file, self._limit):
                    await job.stage(users)
                await job.check()
                if pools := await connection.fetch(SQL["import_pools"], timeout=600):
                    await self._hot.execute(SQL["make_pools"], *zip(*pools, strict=True))
                imported = await job.apply()
            if imported.created + imported.updated > 1000:
                with contextlib.suppress(asyncpg.PostgresError, *DATABASE_FAULTS):  # all is stored already
                    await connection.execute(SQL["import_analyze"], timeout=600)
        return imported

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """A third waits its turn, but not for ever."""
        try:
            async with asyncio.timeout(30):
                await self._turns.acquire()
        except TimeoutError:
            raise DatabaseUnavailable("Two imports are running already; try again when one is done.") from None
        try:
            yield
        finally:
            self._turns.release()


# ---- Users to lines ----------------------------------------------------------------------------------------


async def exported(
    pool: Connections, filters: UserFilter, projects: tuple[uuid.UUID, ...] | None, rows: list[asyncpg.Record]
) -> AsyncIterator[bytes]:
    """A line for each user, page after page from `rows` on."""
    while rows:
        yield b"".join(msgspec.json.encode(User.of(row)) + b"\n" for row in rows)
        page = (rows[-1]["created_at"], rows[-1]["id"], 500)
        rows = await pool.fetch(SQL["list_users"], *filters.columns(page, projects))
