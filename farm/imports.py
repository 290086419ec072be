"""Imports and exports of users, as NDJSON or CSV. What is exported can be imported.

The lines of a file are staged in a temporary table as they arrive, 500 at a time, so that a file of any size takes
little memory. Where all of them are right, a few statements at the end apply them to the users, all or nothing.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import re
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import msgspec
from litestar.exceptions import ClientException
from msgspec import UNSET

from farm.bodies import UNKNOWN, UNREADABLE, UNTYPED, field_errors
from farm.codes import NO_CODES, Columns, Generator, opened, read_totp, sealed
from farm.database import DATABASE_FAULTS, SQL, Connections, new_id
from farm.passwords import Passwords
from farm.problems import BodyTooLarge, Forbidden, Invalid, LineError, LoginTaken, Overloaded, shown
from farm.settings import WORD, Settings
from farm.words import CSV, NDJSON, TELLING, Imported, ImportedUser, User, UserFilter, forbidden, only_tells

LONGEST_LINE = 64 * 1024
CHUNK = 500  # users that are staged at once

# ---- Lines to users ----------------------------------------------------------------------------------------

TOLD = frozenset(ImportedUser.__struct_fields__)
FIELDS = ("login", "password", "project_id", "env", "domain", "totp")
NEEDED = {"login", "project_id", "env"}
NAMES = (*FIELDS, *TELLING, "has_session", "has_totp")
Numbered = tuple[int, ImportedUser, Generator | None]  # the line that a user began on, the user, and its codes


class ImportFile:
    """Splits an import into lines, and reads these; what is wrong with them gathers in `errors`."""

    def __init__(self, settings: Settings, passwords: Passwords, projects: Sequence[uuid.UUID] | None) -> None:
        """`projects` are what the caller is limited to; None: all."""
        self.settings = settings
        self.passwords = passwords
        self.projects = projects
        self.errors: list[LineError] = []
        self._number = 0
        self._rest = b""

    def feed(self, part: bytes) -> Iterator[Numbered]:
        *whole, rest = (self._rest + part).split(b"\n")
        self._rest = rest[: LONGEST_LINE + 1]  # of a line that is too long, as much as tells so
        for line in whole:
            if len(self.errors) >= 100:  # of 20,000 bad lines in one part, all would hold the event loop for a second
                return
            self._number += 1
            line = self._first(line) if self._number == 1 else line
            if len(line) > LONGEST_LINE:
                self.fail(self._number, None, f"the line is over {LONGEST_LINE} bytes")
            elif numbered := self.parse(self._number, line):
                yield numbered

    def close(self) -> Iterator[Numbered]:
        """After the last part."""
        if self._rest:
            yield from self.feed(b"\n")

    def _first(self, line: bytes) -> bytes:
        """The first line, without the mark that Windows puts before UTF-8. Invalid where it is in UTF-16."""
        if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or re.match(rb"\x00[^\x00]|[^\x00]\x00", line):
            raise Invalid([LineError(1, None, "the file is in UTF-16; save it in UTF-8 (Excel: CSV UTF-8)")])
        return line.removeprefix(codecs.BOM_UTF8)

    def parse(self, number: int, line: bytes) -> Numbered | None:
        raise NotImplementedError

    def fail(self, line: int, field: str | None, message: str) -> None:
        self.errors.append(LineError(line, field, message))

    def check(self, number: int, values: Any) -> Numbered | None:
        """Of several faults in a line its unknown fields are told, else the first, so that 100 tell of many lines.

        NotSealed where it has codes and hashes alone are stored.
        """
        if isinstance(values, dict) and not values.keys() <= TOLD:  # most lines have nothing else
            values = {name: value for name, value in values.items() if not only_tells(name)}
        try:
            user = msgspec.convert(values, ImportedUser)
        except msgspec.ValidationError:
            faults = field_errors(values, ImportedUser, self.settings)
            for fault in [fault for fault in faults if fault.message == UNKNOWN] or faults[:1]:
                self.fail(number, fault.field, fault.message)
            return None
        if self.projects is not None and user.project_id not in self.projects:
            raise Forbidden.project(user.project_id, f"Line {number}: ")
        if fault := next(forbidden(self.settings, user), None):
            return self.fail(number, fault.field, fault.message)
        if user.totp is UNSET:
            return number, user, None
        self.passwords.sealing()
        try:
            return number, user, None if user.totp is None else read_totp(user.totp)
        except ValueError as error:
            return self.fail(number, "totp", str(error))


class NdjsonFile(ImportFile):
    """A JSON object a line; blank lines are passed over."""

    def parse(self, number: int, line: bytes) -> Numbered | None:
        if not line.strip():
            return None
        try:
            values = UNTYPED.decode(line)
        except UNREADABLE:
            way_out = "write one object a line, or send CSV as text/csv"
            return self.fail(number, None, f"the line is not JSON in UTF-8: {way_out}")
        return self.check(number, values)


# Not the csv module: it can't tell a label that is empty ("") from one that is not there, and takes a quote inside a
# cell, so that of `a, "b"` it would store a password with a blank and two quotes.
CELL = re.compile(r'(?:"([^"]*(?:""[^"]*)*)"|([^",\r\n]*))(?:(,)|\r?\n?\Z)')
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def cells_of(record: str) -> list[str | None]:
    """The cells of a record: None where nothing stands, "" where quotes stand around nothing."""
    cells: list[str | None] = []
    place, more = 0, True
    while more:
        if (found := CELL.match(record, place)) is None:
            told = "has a quote or a line end inside: write it in quotes, and its own quotes twice"
            raise ValueError(f"the cell in column {len(cells) + 1} {told}")
        quoted, plain, more = found.groups()
        cells.append((plain or None) if quoted is None else quoted.replace('""', '"'))
        place = found.end()
    return cells


def meant(name: str) -> str | None:
    """The column that a name means which differs from it by case, blanks and the like."""
    if len(name) > 100:  # the pattern of labels goes back and forth: over a line of 60 KB for two minutes
        return None
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    label = re.fullmatch(r"\W*label\s*\.\s*([^\s\ufeff]+)\W*", name, re.IGNORECASE)
    if label and re.match(WORD, label[1]):
        return f"label.{label[1]}"
    return next((field for field in NAMES if field.replace("_", "") == letters), None)


def separator_of(header: str) -> str | None:
    """What separates the names of a header, where it is not the comma."""
    counts = {word: sum(map(bool, map(meant, header.split(sign, 99)))) for sign, word in SEPARATORS.items()}
    return next((word for word, count in counts.items() if count > 1), None)


class CsvFile(ImportFile):
    """RFC 4180 with a header line. Empty cells of password, domain, totp and labels count as left out."""

    header: list[str] | None = None  # before it was read; empty: it is bad, and no line is looked at

    def __init__(self, settings: Settings, passwords: Passwords, projects: Sequence[uuid.UUID] | None) -> None:
        super().__init__(settings, passwords, projects)
        self._record = bytearray()  # one whose quotes are not closed yet, and the line it began on
        self._quotes = self._began = 0

    def parse(self, number: int, line: bytes) -> Numbered | None:
        if self.header == []:
            return None
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
        if not record.strip(b"\r\n"):
            return None
        header, self.header = self.header, self.header or []
        try:
            text = record.decode()
            if header is None and (word := separator_of(text)):
                return self.fail(number, None, f"the file is separated by {word}; save it with commas")
            cells = cells_of(text)
        except ValueError as error:
            return self.fail(number, None, f"the line is not CSV in UTF-8: {error}")
        return self._read_cells(number, header, cells) if header else self._read_header(number, cells)

    def _read_header(self, number: int, cells: list[str | None]) -> None:
        names = [cell or "" for cell in cells]
        missing = NEEDED.difference(names)
        is_header = len(NEEDED & set(map(meant, names[:100]))) > 1  # else a name may be a password
        before = set[str]()
        for column, name in enumerate(names, 1):
            if len(self.errors) >= 100:  # of 64 KiB of commas, all would hold the event loop for a quarter of a second
                break
            if only_tells(name) or name in FIELDS or (name.startswith("label.") and re.match(WORD, name[6:])):
                if name in before:
                    self.fail(number, name, f"the column {shown(name)} is there twice")
            elif is_header and (right := meant(name)):
                self.fail(number, right, f"column {column} is called {shown(name)}: write {right!r}")
                missing.discard(right)
            else:
                known = f"{', '.join(FIELDS)} or label.<key>"
                self.fail(number, None, f"column {column} is not one of {known}; is the header line missing?")
            before.add(name)
        for name in sorted(missing):
            self.fail(number, name, f"the column {name} is missing")
        self.header = [] if self.errors else names

    def _read_cells(self, number: int, header: list[str], cells: list[str | None]) -> Numbered | None:
        if len(cells) != len(header):
            return self.fail(number, None, f"the line has {len(cells)} columns, the header has {len(header)}")
        named = dict(zip(header, cells, strict=True))
        values: dict[str, Any] = {k: v or "" for k, v in named.items() if k in FIELDS and (v or k in ("login", "env"))}
        values["labels"] = {k[6:]: v for k, v in named.items() if k.startswith("label.") and v is not None}
        return self.check(number, values)


# ---- The body ----------------------------------------------------------------------------------------------


async def chunks(body: AsyncIterator[bytes], file: ImportFile) -> AsyncIterator[list[Numbered]]:
    """The users of a body, CHUNK at a time. After 100 errors the rest is read and dropped."""
    size, users, limit = 0, [], file.settings.max_import
    async for part in body:
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

TAKEN = "Other calls made, renamed or deleted users of this file meanwhile, and nothing was stored: send it again."


class Import:
    """One import: a temporary table in one transaction, filled chunk by chunk and applied at the end."""

    def __init__(self, connection: asyncpg.Connection, file: ImportFile) -> None:
        self.connection = connection
        self.passwords = file.passwords
        self.file = file
        self.kinds: Counter[str] = Counter()

    async def stage(self, users: list[Numbered]) -> None:
        """Compare with the users that are known, seal the passwords that are new, and keep both for `apply`."""
        keys = [(user.project_id, user.env, user.login) for _, user, _ in users]
        found = await self.connection.fetch(SQL["import_known"], *zip(*keys, strict=True))
        known = {row["ordinal"]: row for row in found}
        rows: list[tuple[Any, ...]] = []
        left = enumerate(users, 1)

        async def work() -> None:
            for place, numbered in left:
                if row := await self._row(*numbered, known.get(place)):
                    rows.append(row)

        # Each hash in a thread, so that as many are made at once: 200 users in 2.2 s instead of 4.3
        await asyncio.gather(*(work() for _ in range(self.passwords.THREADS)))
        await self.connection.copy_records_to_table("import_rows", schema_name="pg_temp", records=rows)

    async def _row(
        self, line: int, user: ImportedUser, codes: Generator | None, known: asyncpg.Record | None
    ) -> tuple[Any, ...] | None:
        """As import_stage.sql has its columns."""
        if known is None and user.password is None:
            return self.file.fail(line, "password", "a password is needed: this user is new")
        id = known["id"] if known else new_id()
        secret = await self._secret(id, user.password, known)
        stored = None if user.totp is UNSET else self._codes(id, codes, known)
        kind = "created"
        if known:
            same = known["domain"] == user.domain and msgspec.json.decode(known["labels"]) == user.labels
            kind = "unchanged" if same and secret is None and stored is None else "updated"
        self.kinds[kind] += 1
        labels = msgspec.json.encode(user.labels).decode()
        told = line, kind, id, user.project_id, user.env, user.domain, user.login, labels, secret
        return *told, stored is not None, *(stored or NO_CODES)

    async def _secret(self, id: uuid.UUID, password: str | None, known: asyncpg.Record | None) -> str | None:
        """What to store; None keeps what stands, without a password or where that is the same."""
        if password is None or (known and await self.passwords.verify(id, known["secret"], password, patient=True)):
            return None
        return await self.passwords.store(id, password, patient=True)

    def _codes(self, id: uuid.UUID, codes: Generator | None, known: asyncpg.Record | None) -> Columns | None:
        """What to store; None keeps what stands, where that is the same."""
        if codes == (opened(self.passwords, known) if known and known["sealed"] else None):
            return None
        return sealed(self.passwords, id, codes) if codes else NO_CODES

    async def check(self) -> None:
        """Invalid when the file has errors, logins that stand in it twice among them."""
        for row in await self.connection.fetch(SQL["import_duplicates"], timeout=600):
            message = f"{shown(row['login'])} stands in the lines {row['first']} and {row['line']}"
            self.file.fail(row["line"], "login", message)
        if self.file.errors:
            raise Invalid(sorted(self.file.errors, key=lambda error: error.line)[:100])

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

    CROWD = 20  # so many may wait for their turn

    def __init__(self, hot: Connections, pool: Connections) -> None:
        self._hot = hot
        self._pool = pool
        self._turns = asyncio.Semaphore(2)
        self._waiting = 0

    async def run(self, file: ImportFile, body: AsyncIterator[bytes]) -> Imported:
        async with self._turn(), self._pool.acquire() as connection:
            async with connection.transaction():
                await connection.execute(SQL["import_stage"])
                job = Import(connection, file)
                async for users in chunks(body, file):
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
        if self._waiting >= self.CROWD:
            raise Overloaded(f"{self._waiting} imports wait for their turn already; try again when some are done.")
        self._waiting += 1
        try:
            async with asyncio.timeout(30):
                await self._turns.acquire()
        except TimeoutError:
            raise Overloaded("Two imports are running already; try again when one is done.") from None
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._turns.release()


# ---- Users to lines ----------------------------------------------------------------------------------------


PAGE = 500  # users that are read at once
CSV_COLUMNS = ("login", "project_id", "env", "domain")  # and one for each label
AS_LINES = msgspec.json.Encoder().encode_lines


def wants_csv(accept: str) -> bool:
    """Whether an Accept header prefers CSV to NDJSON (RFC 9110 section 12.5.1)."""
    asked: dict[str, float] = {}
    for part in accept.lower().split(","):
        weight = re.search(r";\s*q=([01](?:\.\d*)?)\s*(?:;|$)", part)
        asked[part.partition(";")[0].strip()] = float(weight[1]) if weight else 1
    csv = next((asked[kind] for kind in (CSV, "text/*", "*/*") if kind in asked), 0)
    lines = next((asked[kind] for kind in (NDJSON, "application/*", "*/*") if kind in asked), 0)
    return csv > lines or (csv == lines > 0 and CSV in asked and NDJSON not in asked)


async def labels_of(
    pool: Connections, filters: UserFilter, projects: tuple[uuid.UUID, ...] | None, rows: list[asyncpg.Record]
) -> list[str]:
    """The labels that CSV has columns for: of `rows`, which were read before, and of the users behind them."""
    found = await pool.fetch(SQL["list_labels"], *filters.columns((), projects), timeout=600)
    keys = {row["key"] for row in found}.union(*(msgspec.json.decode(row["labels"]) for row in rows))
    if sum(len(key) + 7 for key in keys) > LONGEST_LINE - 100:
        text = f"these users have {len(keys)} labels, too many for the header of a CSV file"
        raise Invalid.field(None, f"{text}: filter, or ask for {NDJSON}")
    return sorted(keys)


async def exported(
    pool: Connections, filters: UserFilter, projects: tuple[uuid.UUID, ...] | None, rows: list[asyncpg.Record],
    labels: list[str] | None,
) -> AsyncIterator[bytes]:  # fmt: skip
    """A line for each user, page after page from `rows` on: CSV with these labels, or NDJSON for None."""
    if labels is not None:
        yield _csv_line([*CSV_COLUMNS, *(f"label.{key}" for key in labels)])
    while rows:
        yield AS_LINES(map(User.of, rows)) if labels is None else b"".join(_csv_of(row, labels) for row in rows)
        page = (rows[-1]["created_at"], rows[-1]["id"], PAGE)
        is_last = len(rows) < PAGE
        rows = [] if is_last else await pool.fetch(SQL["list_users"], *filters.columns(page, projects))


def _csv_of(row: asyncpg.Record, labels: list[str]) -> bytes:
    """No transaction holds the users still for a reader who may be slow: one that got a new label ends the stream."""
    own = msgspec.json.decode(row["labels"])
    if new := own.keys() - set(labels):
        raise ClientException(f"The label {new.pop()} came up during an export as CSV, which was cut off.")
    return _csv_line([*(str(row[name]) for name in CSV_COLUMNS), *(own.get(key) for key in labels)])


def _csv_line(cells: Sequence[str | None]) -> bytes:
    """RFC 4180. Nothing is put before = + - @: what is exported has to be what is imported."""
    return ",".join(map(_csv_cell, cells)).encode() + b"\r\n"


def _csv_cell(cell: str | None) -> str:
    if cell is None or re.fullmatch(r'[^",\s]+', cell):
        return cell or ""
    return '"{}"'.format(cell.replace('"', '""'))
