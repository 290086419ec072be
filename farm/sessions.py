"""Sessions: what a test needs to be logged in already, kept with a user for its next holder.

Each statement compares the lock. Where that is not held nothing is done, and the answer is None or False.
"""

from __future__ import annotations

import hashlib
import uuid
from email.utils import format_datetime

from farm.database import SQL, Connections
from farm.passwords import Passwords
from farm.problems import NoSession
from farm.telemetry import Cause, Events

LONGEST = 256 * 1024  # bytes


class Sessions:
    """NotSealed where hashes alone are stored."""

    def __init__(self, pool: Connections, passwords: Passwords, events: Events) -> None:
        self._pool = pool
        self._passwords = passwords
        self._events = events

    async def put(self, lock_id: uuid.UUID, client: uuid.UUID | None, session: bytes, ttl: int, cause: Cause) -> bool:
        keyring = self._passwords.sealing()
        held = await self._pool.fetchrow(SQL["get_lock"], lock_id, client)
        if held:
            sealed = keyring.seal_as("session", held["user_id"], session)
            held = await self._pool.fetchrow(SQL["put_session"], lock_id, client, ttl, keyring.first, sealed)
        if held:
            self._events.log("session-stored", cause, held, ttl_seconds=ttl)
        return held is not None

    async def get(
        self, lock_id: uuid.UUID, client: uuid.UUID | None, cause: Cause
    ) -> tuple[bytes, dict[str, str]] | None:
        """It, byte for byte, and the headers that tell of it."""
        keyring = self._passwords.sealing()
        row = await self._pool.fetchrow(SQL["get_session"], lock_id, client)
        if row is None:
            return None
        if row["sealed"] is None:
            raise NoSession
        session = keyring.open_as("session", row["user_id"], row["key_id"], row["sealed"])
        self._events.log("session-told", cause, row)
        return session, {
            "ETag": f'"{hashlib.sha256(session).hexdigest()[:32]}"',
            "Last-Modified": format_datetime(row["stored_at"], usegmt=True),
            "Expires": format_datetime(row["session_until"], usegmt=True),
        }

    async def delete(self, lock_id: uuid.UUID, client: uuid.UUID | None, cause: Cause) -> bool:
        """Also when there is none."""
        self._passwords.sealing()
        held = await self._pool.fetchrow(SQL["delete_session"], lock_id, client)
        if held:
            self._events.log("session-deleted", cause, held)
        return held is not None
