"""What pages show at a glance: one look at the database a second, for all who look on.

A *look* is what get_overview.sql finds for callers who may see the same projects. Those who come while it is taken wait
for it, and it counts for a second. A *view* is what they get of it: everything, or one project; it is made and encoded
once, however many ask. A look is *split* where it has the first locks and the latest ends of each project, and not only
of all. With 5,000 locks that takes twice as long, so with over MANY it is done only where projects are asked for.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import time
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
from cachetools import TLRUCache, TTLCache
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


def takes_gzip(accepted: str | None) -> bool:
    """Whether an Accept-Encoding names it, and not with a weight of nothing (RFC 9110 section 12.5.3)."""
    return bool(re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", accepted or ""))


class Look:
    """What was found for callers who may see the same projects."""

    LOCKS, ENDS = 200, 50

    def __init__(self, pools: list[GlancedPool], row: asyncpg.Record, is_split: bool, seconds: float) -> None:
        self.is_split = is_split
        self.seconds = seconds  # that it took
        self._pools = [pool for pool in pools if pool.total]
        self._locks = [GlancedLock(*lock) for lock in row["locks"]]
        self._ended = [(project_id, GlancedEnd(*end)) for project_id, *end in row["ended"]]
        self._views: dict[uuid.UUID | None, View] = {}

    def view(self, project_id: uuid.UUID | None) -> View:
        """Of everything, or of one project."""
        if project_id not in self._views:
            pools = [pool for pool in self._pools if project_id in (None, pool.project_id)]
            held = [lock for lock in self._locks if project_id in (None, lock.project_id)]
            ended = [end for project, end in self._ended if project_id in (None, project)]
            locks = GlancedLocks(sum(pool.locked for pool in pools), held[: self.LOCKS])
            self._views[project_id] = View.of(Overview(pools, locks, ended[: self.ENDS]))
        return self._views[project_id]


COUNTED = 100_000  # users that one look counts; a million takes ten of them, each of 15 ms for it
KEPT = 60  # seconds after which it is forgotten what was looked at: totals, and that projects were


def still_known(totals: dict[int, int]) -> list[int]:
    """The pools that are not counted this time: all but those whose turn it is."""
    counted = 0
    for place, users in enumerate(totals.values()):
        counted += users
        if place and counted > COUNTED:
            return list(totals)[place:]
    return []


class Glances:
    """Answers GET /overview."""

    MANY = 1000  # locks

    def __init__(self, pool: Connections, desk: Desk) -> None:
        self._pool = pool
        self._desk = desk
        # The users of each pool, those that were counted longest ago first.
        self._totals: TTLCache[Projects, dict[int, int]] = TTLCache(1000, KEPT)
        self._locked = 0  # users, in the last look
        self._since = datetime.now(UTC) - timedelta(seconds=time.monotonic())  # what the desk's clock began at
        # Where a look takes long it counts for four times as long, so that no page keeps the database busy.
        self._looks: TLRUCache[Projects, Look] = TLRUCache(
            1000, ttu=lambda _, look, now: now + max(1, 4 * look.seconds), timer=time.monotonic
        )
        self._split: TTLCache[Projects, bool] = TTLCache(1000, KEPT)  # of whom views of projects are asked for
        self._look = Coalescer(self._take, 10_000)

    async def view(self, projects: tuple[uuid.UUID, ...] | None, project_id: uuid.UUID | None) -> View:
        """What a caller who is limited to these projects sees, of all or of one of them."""
        key = None if projects is None else frozenset(projects)
        if project_id is not None:
            self._split[key] = True
        return (self._taken(key) or await self._look(key)).view(project_id)

    def _taken(self, projects: Projects) -> Look | None:
        """The last look, where it still counts and has what is asked for."""
        look = self._looks.get(projects)
        return look if look and look.is_split >= (projects in self._split) else None

    async def _take(self, asked: list[Projects]) -> list[Look]:
        looks = {projects: self._taken(projects) or await self._read(projects) for projects in set(asked)}
        return [looks[projects] for projects in asked]

    async def _read(self, projects: Projects) -> Look:
        now, totals = time.monotonic(), self._totals.get(projects, {})
        is_split = self._locked <= self.MANY or projects in self._split
        row = await self._pool.fetchrow(SQL["get_overview"], projects, still_known(totals), is_split)
        assert row
        counted = {pool_id: total for pool_id, _, _, _, total, *_ in row["pools"] if total is not None}
        self._totals[projects] = totals = {id: totals[id] for id in totals if id not in counted} | counted
        waits = self._desk.longest_waits()
        pools = [self._glanced(pool, totals, waits) for pool in row["pools"]]
        self._locked = sum(pool.locked for pool in pools)
        look = self._looks[projects] = Look(pools, row, is_split, time.monotonic() - now)
        return look

    def _glanced(self, found: Any, totals: dict[int, int], waits: dict[frozenset[Wish], float]) -> GlancedPool:
        """A pool with what else is known of it. Who is neither locked nor resting nor quarantined is free."""
        id, project_id, env, domain, _, locked, resting, quarantined, failing, next_free_at = found
        total = max(totals[id], locked + resting + quarantined)
        free = total - locked - resting - quarantined
        wish = Wish(None, project_id, env, domain)
        arrived = [since for pools, since in waits.items() if any(wish.meets(other) for other in pools)]
        return GlancedPool(
            project_id, env, domain, total, free, locked, resting, quarantined, failing, self._desk.waiting(wish),
            longest_wait_since=self._since + timedelta(seconds=min(arrived)) if arrived else None,
            next_free_at=None if free else next_free_at,
        )  # fmt: skip
