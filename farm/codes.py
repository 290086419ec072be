"""One-time codes (TOTP, RFC 6238): their secrets, and who is given which code.

A code is good for one step, of `period` seconds, and systems refuse its second use. So a step is spent in the database
before its code is told: each code is given out once, however many ask for it at how many replicas.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import math
import re
import time
import uuid
from typing import Any
from urllib.parse import parse_qsl

import asyncpg
import msgspec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.twofactor.totp import TOTP
from msgspec import UNSET, Struct, UnsetType

from farm.database import SQL, Connections
from farm.passwords import Passwords
from farm.problems import CodeSpent, Invalid, NoTotp, ShuttingDown

# ---- Secrets -----------------------------------------------------------------------------------------------

ALGORITHMS: dict[str, Any] = {"SHA1": hashes.SHA1, "SHA256": hashes.SHA256, "SHA512": hashes.SHA512}
SHORTEST = 10  # bytes of a secret
LONGEST = 2000  # characters of what it is written in


class Generator(Struct, frozen=True):
    """What makes codes. It is sealed; its period stands beside that, too, for the statements, and counts as it does."""

    secret: bytes
    algorithm: str = "SHA1"
    digits: int = 6
    period: int = 30

    def code(self, began: int) -> str:
        """The code of the step that began then."""
        algorithm = ALGORITHMS[self.algorithm]()
        totp = TOTP(self.secret, self.digits, algorithm, self.period, enforce_key_length=False)
        return totp.generate(began).decode()


def read_totp(text: str) -> Generator:
    """An otpauth URI, or a bare secret in base32. ValueError says what is wrong with it, and shows nothing of it."""
    if len(text) > LONGEST:
        raise ValueError(f"it has over {LONGEST} characters")
    if not text[:8].lower().startswith("otpauth:"):
        return Generator(_secret(text))
    beginning, _, query = text.partition("#")[0].partition("?")
    if not re.match("otpauth://totp(/|$)", beginning, re.IGNORECASE):
        raise ValueError("the URI must begin with otpauth://totp/")
    pairs = parse_qsl(query, keep_blank_values=True)
    given = dict(pairs)
    if len(given) < len(pairs):
        raise ValueError("a parameter of the URI is there twice")
    algorithm = given.get("algorithm", "SHA1").upper()
    if algorithm not in ALGORITHMS:
        raise ValueError(f"the algorithm must be one of {', '.join(ALGORITHMS)}")
    digits, period = _whole(given, "digits", 6, 6, 8), _whole(given, "period", 30, 15, 120)
    return Generator(_secret(given.get("secret", "")), algorithm, digits, period)


def _secret(text: str) -> bytes:
    """Base32, which may be small, spaced or without padding."""
    text = re.sub(r"\s", "", text).rstrip("=")
    try:
        secret = base64.b32decode(text + "=" * (-len(text) % 8), casefold=True)
    except ValueError:
        raise ValueError("the secret is not base32: A to Z and 2 to 7") from None
    if len(secret) < SHORTEST:
        raise ValueError(f"the secret must have {SHORTEST} bytes at least, which are 16 characters")
    return secret


def _whole(given: dict[str, str], name: str, default: int, least: int, most: int) -> int:
    text = given.get(name, str(default))
    if not re.fullmatch("[0-9]{1,3}", text) or not least <= int(text) <= most:
        raise ValueError(f"the {name} must be {least} to {most}")
    return int(text)


Columns = tuple[str | None, bytes | None, int | None]  # key id, sealed, period: as user_codes has them
NO_CODES: Columns = (None, None, None)


def sealed(passwords: Passwords, owner: uuid.UUID, generator: Generator) -> Columns:
    """NotSealed where there are no keys."""
    keyring = passwords.sealing()
    return keyring.first, keyring.seal_as("totp", owner, msgspec.json.encode(generator)), generator.period


def opened(passwords: Passwords, row: asyncpg.Record) -> Generator:
    """Of a row of user_codes."""
    text = passwords.sealing().open_as("totp", row["user_id"], row["key_id"], row["sealed"])
    return msgspec.structs.replace(msgspec.json.decode(text, type=Generator), period=row["period"])


def sealed_codes(passwords: Passwords, owner: uuid.UUID, totp: str | UnsetType | None) -> Columns:
    """Of what a caller sent. NotSealed where hashes alone are stored, whatever that is."""
    if totp is UNSET:
        return NO_CODES
    passwords.sealing()
    try:
        return NO_CODES if totp is None else sealed(passwords, owner, read_totp(totp))
    except ValueError as error:
        raise Invalid.field("totp", str(error)) from None


# ---- Who is given which --------------------------------------------------------------------------------------

SPARE = 5  # seconds before its end from which a code is not given any more: it would come too late


async def spend_code(
    pool: Connections, passwords: Passwords, stopping: asyncio.Event, lock_id: uuid.UUID, client: uuid.UUID | None
) -> tuple[asyncpg.Record, str] | None:
    """A row with the lock and the end of the code, and the code. None where the lock is not held, or not any more.

    Who comes when the present one is gone waits for the next: CodeSpent where others were quicker for a period and
    SPARE seconds, ShuttingDown where the service ends.
    """
    passwords.sealing()
    began = time.monotonic()
    while row := await pool.fetchrow(SQL["spend_code"], lock_id, client, SPARE):
        if row["period"] is None:
            raise NoTotp
        if row["given"]:
            return row, opened(passwords, row).code(row["began"])
        if row["wait_seconds"] > began + row["period"] + SPARE - time.monotonic():
            raise CodeSpent(headers={"Retry-After": str(math.ceil(row["wait_seconds"]))})
        await _pause(row["wait_seconds"], stopping)
    return None


async def _pause(seconds: float, stopping: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(seconds, 0.01)):
            await stopping.wait()
            raise ShuttingDown
