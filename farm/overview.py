"""What pages show at a glance: one look at the database a second, for all who look on.

A *look* is what get_overview.sql finds for callers who may see the same projects. Those who come while it is taken wait
for it, and it counts for a second. A *view* is what they get of it: everything, or one project; it is made and encoded
once, however many ask.
"""

from __future__ import annotations

import gzip
import hashlib
import time
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
from cachetools import TLRUCache
from msgspec import Struct

from farm.database import SQL, Coalescer, Connections
from farm.waiting import Desk
from farm.words import GlancedEnd, GlancedLock, GlancedLocks, GlancedPool, Overview, Wish

Projects = frozenset[uuid.UUID] | None  # what a caller is limited to; null: all


class View(Struct):
    """A reply to many, its name, and packed: 500 pages would else be sent 30 MB a second of a farm of 300 pools."""

    etag: str
    body: bytes
    packed: bytes

    @classmethod
    def of(cls, overview: Overview) -> View:
        body = msgspec.json.encode(overview)
        name = hashlib.blake2b(body, digest_size=16).hexdigest()
        return cls(f'W/"{name}"', body, gzip.compress(body, 1, mtime=0))

    def is_known(self, sent: str | None) -> bool:
        """Whether who sent this If-None-Match has it (RFC 9110 section 13.1.2)."""
        known = [name.strip().removeprefix("W/") for name in (sent or "").split(",")]
        return self.etag.removeprefix("W/") in known or known == ["*"]


class Look:
    """What was found for callers who may see the same projects."""

    LOCKS, ENDS = 200, 50

    def __init__(self, pools: dict[int, GlancedPool], row: asyncpg.Record) -> None:
        self._pools = [pool for pool in pools.values() if pool.total]
        self._locks = [(pools[pool_id], lock) for pool_id, *lock in row["locks"]]
        self._ended = [(project_id, GlancedEnd(*end)) for project_id, *end in row["ended"]]
        self._views: dict[uuid.UUID | None, View] = {}

    def view(self, project_id: uuid.UUID | None) -> View:
        """Of everything, or of one project. All that have no pool share one, so nobody fills the memory with views."""
        pools = [pool for pool in self._pools if project_id in (None, pool.project_id)]
        key = project_id if pools else uuid.UUID(int=0)
        if key not in self._views:
            held = [(pool, lock) for pool, lock in self._locks if project_id in (None, pool.project_id)]
            items = [GlancedLock.of(pool, *lock) for pool, lock in held[: self.LOCKS]]
            ended = [end for project, end in self._ended if project_id in (None, project)]
            locks = GlancedLocks(sum(pool.locked for pool in pools), items)
            self._views[key] = View.of(Overview(pools, locks, ended[: self.ENDS]))
        return self._views[key]


class Total(Struct):
    """The users of a pool, as they were counted."""

    project_id: uuid.UUID
    users: int
    counted_at: float


class Glances:
    """Answers GET /overview."""

    COUNTED = 100_000  # users that one look counts; a million takes ten of them, each of 15 ms for it
    KEPT = 60  # seconds after which totals that nobody looked at are forgotten

    def __init__(self, pool: Connections, desk: Desk) -> None:
        self._pool = pool
        self._desk = desk
        self._totals: dict[int, Total] = {}
        self._looked_at = 0.0
        self._since = datetime.now(UTC) - timedelta(seconds=time.monotonic())  # what the desk's clock began at
        # Where a look takes long it counts for four times as long, so that no page keeps the database busy.
        self._looks: TLRUCache[Projects, tuple[Look, float]] = TLRUCache(
            1000, ttu=lambda _, taken, now: now + max(1, 4 * taken[1]), timer=time.monotonic
        )
        self._look = Coalescer(self._take, 10_000)

    async def view(self, projects: tuple[uuid.UUID, ...] | None, project_id: uuid.UUID | None) -> View:
        """What a caller who is limited to these projects sees, of all or of one of them."""
        key = None if projects is None else frozenset(projects)
        taken = self._looks.get(key)
        return (taken[0] if taken else await self._look(key)).view(project_id)

    async def _take(self, asked: list[Projects]) -> list[Look]:
        taken = {}
        for projects in set(asked):
            began = time.monotonic()
            taken[projects] = self._looks.get(projects) or (await self._read(projects), time.monotonic() - began)
            self._looks.setdefault(projects, taken[projects])
        return [taken[projects][0] for projects in asked]

    async def _read(self, projects: Projects) -> Look:
        now = time.monotonic()
        if now > self._looked_at + self.KEPT:
            self._totals.clear()
        self._looked_at = now
        limit = None if projects is None else list(projects)
        row = await self._pool.fetchrow(SQL["get_overview"], limit, self._still_known(projects))
        assert row
        for pool in row["pools"]:
            pool_id, project_id, _, _, total, *_ = pool
            if total is not None:
                self._totals[pool_id] = Total(project_id, total, now)
        waits = self._desk.longest_waits()
        pools = {pool[0]: self._glanced(pool, waits) for pool in row["pools"]}
        return Look(pools, row)

    def _still_known(self, projects: Projects) -> list[int]:
        """The pools that are not counted this time: all but those whose turn it is."""
        known = [id for id, total in self._totals.items() if projects is None or total.project_id in projects]
        known.sort(key=lambda id: self._totals[id].counted_at)
        counted = 0
        for place, id in enumerate(known):
            counted += self._totals[id].users
            if place and counted > self.COUNTED:
                return known[place:]
        return []

    def _glanced(self, found: Any, waits: dict[frozenset[Wish], float]) -> GlancedPool:
        """A pool with what else is known of it. Who is neither locked nor resting nor quarantined is free."""
        id, project_id, env, domain, _, locked, resting, quarantined, next_free_at = found
        total = max(self._totals[id].users, locked + resting + quarantined)
        free = total - locked - resting - quarantined
        wish = Wish(None, project_id, env, domain)
        arrived = [since for pools, since in waits.items() if any(wish.meets(other) for other in pools)]
        return GlancedPool(
            project_id, env, domain, total, free, locked, resting, quarantined, self._desk.waiting(wish),
            longest_wait_since=self._since + timedelta(seconds=min(arrived)) if arrived else None,
            next_free_at=None if free else next_free_at,
        )  # fmt: skip
