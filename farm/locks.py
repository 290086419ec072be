from __future__ import annotations

import asyncio
import contextlib
import itertools
import platform
import secrets
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeVar, cast, get_args

import asyncpg
import msgspec
from litestar import Request, Response
from msgspec import Struct
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric as MetricFamily

from farm import VERSION
from farm.clients import Gate
from farm.database import DATABASE_FAULTS, SQL, Busy, Coalescer, Connections, columns, new_id
from farm.passwords import KeyFault, Passwords
from farm.problems import (
    FieldError,
    Invalid,
    LockEnded,
    LockNotHeld,
    NoMatchingUser,
    PoolExhausted,
    Problem,
    Refused,
    ShuttingDown,
    Unauthenticated,
    UserUnavailable,
    no_lock,
    no_user,
    shown,
    user_locked,
)
from farm.settings import Settings, log
from farm.telemetry import NO_STORE, NOWHERE, Cause, Events, Snapshot, Tally, cause_of, header, reply
from farm.waiting import Ask, Desk, match
from farm.words import AcquireLock, Lock, LockSet, SetPart, UserState, Wish, Wishes, caller_of, lock_of


class Release(Struct):
    lock_id: uuid.UUID
    cooldown: int = 0
    quarantine: str | None = None
    client: uuid.UUID | None = None  # whose lock it has to be; null: anybody's
    cause: Cause = NOWHERE


class Renewal(Struct):
    lock_id: uuid.UUID
    ttl: int | None
    client: uuid.UUID | None = None  # whose lock it has to be; null: anybody's
    cause: Cause = NOWHERE


class Refusal(Struct):
    """Why a wish gets no user, and how many are free all the same (their rows are locked in this moment)."""

    matching: int
    free: int
    response: Refused


# A release may commit a moment after a claim has passed its place; look back this far for such stragglers.
STRAGGLERS = timedelta(milliseconds=20)


COSTLY = 10_000  # users from which counts are worth keeping for a moment


SLOW_LOOK = 0.005  # seconds from which it is worth knowing how many have the labels


RARE = 1000  # users up to which a look begins with those who have the labels


class Farm:
    """What the handlers share: settings, the two pools, the passwords and the coalesced statements.

    Locks have connections of their own (`hot`), so that no import, list or export stands before them.
    """

    def __init__(
        self,
        settings: Settings,
        hot: Connections,
        pool: Connections,
        passwords: Passwords,
        events: Events,
        gate: Gate | None = None,
    ) -> None:
        self.settings = settings
        self.gate = gate
        self.hot = hot
        self.pool = pool
        self.passwords = passwords
        self.events = events
        self.acquire = Coalescer(self._acquire, settings.batch, partial(events.batched, "acquire_locks"))
        self.release = Coalescer(self._release, settings.batch, partial(events.batched, "release_locks"))
        self.extend = Coalescer(self._extend, settings.batch, partial(events.batched, "extend_locks"))
        self.keyed = Coalescer(self.find_keyed, settings.batch, partial(events.batched, "get_keyed_locks"))
        self.refusal = Coalescer(self._refusals, settings.batch, partial(events.batched, "count_matching"))
        self.desk = Desk(self)
        # What was refused last, and refusals whose counts took long to gather, with the time they last.
        self.exhausted: dict[Wishes, None] = {}
        self._costly: dict[Wishes, tuple[float, Refusal]] = {}
        self._rare: dict[Wish, tuple[bool, float]] = {}  # whether few users have the labels, and until when that lasts
        # Locks that may have been granted by a statement whose reply was lost, and until when the sweep tries to
        # give them back: the statement may still be running.
        self._unanswered: dict[uuid.UUID, float] = {}
        self._found_later: dict[uuid.UUID, float] = {}
        self._cursors: dict[Wish, dict[int, datetime]] = {}
        self.census = Census(pool, events)
        self.imports = asyncio.Semaphore(2)
        self.stopping = False
        self._spawned: set[asyncio.Task[None]] = set()

    async def claim(self, ask: Ask) -> list[asyncpg.Record] | None:
        """The rows of the users that it got, maybe none; None when it has to wait for the desk's answer."""
        ask.answer = None
        if len(ask.wishes) == 1:
            return await self.acquire(ask)
        self.desk.join(ask)
        return None

    async def give_back(self, rows: list[asyncpg.Record], cause: Cause) -> None:
        """Release what was granted to a caller that can't have it; where that fails, the sweep does it."""
        try:
            await asyncio.gather(*(self.release(Release(row["lock_id"], cause=cause)) for row in rows))
        except DATABASE_FAULTS:
            self.lose([row["lock_id"] for row in rows])

    def lose(self, lock_ids: Iterable[uuid.UUID]) -> None:
        """Remember locks that nobody was told of, for the sweep."""
        self._unanswered |= dict.fromkeys(lock_ids, time.monotonic() + 30)

    async def find_lost(self) -> None:
        """Give back the locks that nobody was told of."""
        now = time.monotonic()
        while lost := list(itertools.islice(self._unanswered, 500)):
            freed = await asyncio.gather(*(self.release(Release(lock_id)) for lock_id in lost))
            kept = {id: self._unanswered.pop(id) for id in lost}
            self._found_later |= {
                id: kept[id] for id, found in zip(lost, freed, strict=True) if not found and kept[id] > now
            }
        self._unanswered, self._found_later = self._found_later, {}

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something after the reply."""
        task = asyncio.create_task(work)
        self._spawned.add(task)
        task.add_done_callback(self._spawned.discard)

    async def settle(self) -> None:
        """Give back what is to be given back; two seconds at most."""
        with contextlib.suppress(*DATABASE_FAULTS):
            async with asyncio.timeout(2):
                await asyncio.gather(*self._spawned, self.find_lost())

    def stop(self) -> None:
        """The service ends: nobody is granted anything any more, and those who wait are told."""
        self.stopping = True
        self.desk.close()

    async def _acquire(self, asks: list[Ask]) -> list[list[asyncpg.Record] | None]:
        """The row of each that got a user, none for those that did not, None for those that wait at the desk.

        Everything up to the next batch happens at once, so that nobody who comes later is served before those
        who begin to wait now.
        """
        waiting = {ask for ask in asks if self.desk.crowded(ask)}
        granted = await self._claim_for([ask for ask in asks if ask not in waiting])
        waiting |= {ask for ask in asks if ask.wait and ask not in granted}
        for ask in sorted(waiting, key=lambda ask: ask.arrived):
            self.desk.join(ask)
        return [None if ask.answer else granted.get(ask, []) for ask in asks]

    async def _claim_for(self, asks: list[Ask]) -> dict[Ask, list[asyncpg.Record]]:
        """Rows of those that got a user. Where wishes overlap, one may find only users that another one took."""
        granted: dict[Ask, list[asyncpg.Record]] = {}
        while left := [ask for ask in asks if ask not in granted]:
            for ask in left:
                ask.lock_ids = [new_id()]
            try:
                rows = {row["lock_id"]: row for row in await self._claim(left)}
            except Exception:
                if not granted:
                    raise
                break  # those who got a user are told so; the others find out why they did not
            granted |= {ask: [rows[ask.lock_ids[0]]] for ask in left if ask.lock_ids[0] in rows}
            if not rows:
                break
        return granted

    async def _claim(self, asks: list[Ask]) -> list[asyncpg.Record]:
        wanted = Counter(ask.wishes[0] for ask in asks)
        wishes = {wish: ordinal for ordinal, wish in enumerate(wanted, 1)}
        try:
            rows = await self.hot.fetch(
                SQL["acquire_locks"],
                *columns(wishes, Wish),
                list(wanted.values()),
                *self._cursor_columns(wishes),
                [wishes[ask.wishes[0]] for ask in asks],
                [ask.lock_ids[0] for ask in asks],
                [ask.holder for ask in asks],
                [ask.ttl for ask in asks],
                [ask.key for ask in asks],
                [ask.client for ask in asks],
            )
        except Busy:
            raise
        except DATABASE_FAULTS:
            self.lose([ask.lock_ids[0] for ask in asks if ask.key is None])
            raise
        asked = {ask.lock_ids[0]: ask for ask in asks}
        self.granted(rows, asked)
        self._advance(rows, asked)
        return rows

    def granted(self, rows: Iterable[asyncpg.Record], asks: Mapping[uuid.UUID, Ask], by_desk: bool = False) -> None:
        """Tell of the locks that a statement has granted."""
        now = time.monotonic()
        for row in rows:
            ask = asks[row["lock_id"]]
            seconds = int((now - ask.arrived) * 1e6) / 1e6  # cheaper than round()
            self.events.acquired(row, ask.cause, seconds, waited=by_desk and ask.wait > 0)

    def _cursor_columns(self, wishes: dict[Wish, int]) -> tuple[list[int], list[int], list[datetime]]:
        known = [(o, p, since) for wish, o in wishes.items() for p, since in self._cursors.get(wish, {}).items()]
        return [row[0] for row in known], [row[1] for row in known], [row[2] for row in known]

    def _advance(self, rows: list[asyncpg.Record], asks: Mapping[uuid.UUID, Ask]) -> None:
        """Begin the next search where this one ended: see acquire_locks.sql."""
        if len(self._cursors) > 10_000:
            self._cursors.clear()
        ends: dict[tuple[Wish, int], datetime] = {}
        for row in rows:
            place = asks[row["lock_id"]].wishes[0], row["pool_id"]
            ends[place] = max(row["since"], ends.get(place, row["since"]))
        for (wish, pool_id), end in ends.items():
            if wish.user_id is None:
                self._cursors.setdefault(wish, {})[pool_id] = end - STRAGGLERS

    async def _release(self, releases: list[Release]) -> list[bool]:
        """Whether each was held. A lock that is released twice at once is held for the first one only."""
        once: dict[tuple[uuid.UUID, uuid.UUID | None], Release] = {}
        for release in releases:
            once.setdefault((release.lock_id, release.client), release)
        rows = await self.hot.fetch(SQL["release_locks"], *columns(_by_lock_id(once.values()), Release))
        freed = {id(once[row["lock_id"], row["client"]]) for row in rows}
        for row in rows:
            release = once[row["lock_id"], row["client"]]
            self.events.ended("released", row, release.cause, release.cooldown)
            if release.quarantine is not None:
                self.events.quarantined(row["user_id"], release.quarantine, release.cause)
        if freed:
            self.desk.freed()
        return [id(release) in freed for release in releases]

    async def _extend(self, renewals: list[Renewal]) -> list[asyncpg.Record | None]:
        """Rows of those that are held. Of several renewals of one lock at once, the last one counts."""
        last = {(renewal.lock_id, renewal.client): renewal for renewal in renewals}
        rows = await self.hot.fetch(SQL["extend_locks"], *columns(_by_lock_id(last.values()), Renewal))
        extended = {row["lock_id"]: row for row in rows}
        for row in rows:
            renewal = last.get((row["lock_id"], row["client_id"])) or last[row["lock_id"], None]
            self.events.extended(row, renewal.cause)
        found = [extended.get(renewal.lock_id) for renewal in renewals]
        pairs = zip(renewals, found, strict=True)
        return [row if row and renewal.client in (None, row["client_id"]) else None for renewal, row in pairs]

    async def find_keyed(self, keys: list[uuid.UUID]) -> list[list[asyncpg.Record]]:
        """What each idempotency key has bound: nothing, or a row for each lock."""
        bound: dict[uuid.UUID, list[asyncpg.Record]] = {key: [] for key in keys}  # in the order they were asked for
        for row in await self.hot.fetch(SQL["get_keyed_locks"], list(bound)):
            bound[row["key"]].append(row)
        return [bound[key] for key in keys]

    async def _refusals(self, asked: list[Wishes]) -> list[Refusal]:
        """Why there is no user.

        Those who are refused in one moment share the counts and the reply (0.18 -> 1.2 of the cycle rate). Counts of
        many users are kept for four times as long as they took, so a hammered pool of a million is not counted for
        ever.
        """
        began = time.monotonic()
        kept = {wishes: self._costly[wishes] for wishes in asked if wishes in self._costly}
        refusals = {wishes: refusal for wishes, (until, refusal) in kept.items() if until > began}
        singles = [wishes[0] for wishes in dict.fromkeys(asked) if wishes not in refusals and len(wishes) == 1]
        if singles:
            rows = await self.pool.fetch(SQL["count_matching"], *columns(singles, Wish))
            took = time.monotonic() - began
            for row in rows:
                wish = singles[row["filter"] - 1]
                refusals[(wish,)] = Refusal(row["matching"], row["free"], _refused(self, wish, row).response())
                self._remember((wish,), refusals[(wish,)], took)
        for wishes in dict.fromkeys(asked):
            if wishes not in refusals:
                refusals[wishes] = await self._set_refusal(wishes)
        return [refusals[wishes] for wishes in asked]

    def are_rare(self, wishes: Sequence[Wish]) -> list[bool]:
        """For each wish whether few users have its labels, as far as that is known."""
        return [self._rare.get(wish, (False, 0))[0] for wish in wishes]

    def learn(self, wishes: Iterable[Wish], seconds: float) -> None:
        """Count the users with the labels of wishes that took long to look after.

        Where few have them they are found by their labels from then on, and not among all that are free: a call
        that waited for a label of one in 100,000 users made all others of its project take 170 ms.
        """
        now = time.monotonic()
        if len(self._rare) > 10_000:
            self._rare.clear()
        for wish in wishes:
            is_rare, until = self._rare.get(wish, (False, 0))
            if wish.labels and now >= until and (is_rare or seconds > SLOW_LOOK):
                self._rare[wish] = is_rare, now + 60
                self.spawn(self._learn(wish))

    async def _learn(self, wish: Wish) -> None:
        with contextlib.suppress(*DATABASE_FAULTS):
            self._rare[wish] = (await self.refusal((wish,))).matching <= RARE, time.monotonic() + 60

    async def _set_refusal(self, wishes: Wishes) -> Refusal:
        began = time.monotonic()
        distinct = list(dict.fromkeys(wishes))
        fitting: dict[Wish, list[uuid.UUID]] = {wish: [] for wish in distinct}
        rare = self.are_rare(distinct)
        for row in await self.pool.fetch(SQL["find_matching"], *columns(distinct, Wish), rare, len(wishes)):
            fitting[distinct[row["filter"] - 1]].append(row["id"])
        counts = await self.pool.fetchrow(SQL["count_set"], *columns(distinct, Wish))
        enough = bool(match([Ask(wishes=list(wishes))], fitting, 0))
        refused = _set_refused(self, wishes, cast("asyncpg.Record", counts), enough)
        refusal = Refusal(cast("asyncpg.Record", counts)["matching"], 0, refused.response())
        self._remember(wishes, refusal, time.monotonic() - began)
        return refusal

    def _remember(self, wishes: Wishes, refusal: Refusal, took: float) -> None:
        if len(self.exhausted) + len(self._costly) > 10_000:
            self.exhausted.clear()
            self._costly.clear()
        self._costly.pop(wishes, None)
        self.exhausted.pop(wishes, None)
        if refusal.matching >= COSTLY:
            self._costly[wishes] = time.monotonic() + 4 * took, refusal
        elif not refusal.free and len(wishes) == 1:  # a set is asked for at the desk, which costs no count
            self.exhausted[wishes] = None


L = TypeVar("L", Release, Renewal)


def _by_lock_id(items: Iterable[L]) -> list[L]:
    return sorted(items, key=lambda item: item.lock_id)


def pool_of(row: asyncpg.Record) -> Wish:
    return Wish(None, row["project_id"], row["env"], row["domain"])


def _with_passwords(farm: Farm, rows: list[asyncpg.Record], cause: Cause) -> list[Lock]:
    """The locks as only the reply that grants them tells them. KeyFault where a password does not open."""
    passwords = [farm.passwords.reveal(row["user_id"], row["secret"]) for row in rows]
    for row, password in zip(rows, passwords, strict=True):
        if password is not None:
            farm.events.revealed(row, cause)
    return [lock_of(row, password) for row, password in zip(rows, passwords, strict=True)]


def granted(farm: Farm, rows: list[asyncpg.Record], cause: Cause) -> Response[bytes]:
    return reply(_with_passwords(farm, rows, cause)[0], 201, NO_STORE)


def granted_set(farm: Farm, rows: list[asyncpg.Record], cause: Cause) -> Response[bytes]:
    return reply(LockSet(_with_passwords(farm, rows, cause)), 201, NO_STORE)


def _idempotency_key(request: Request, client: uuid.UUID | None) -> uuid.UUID | None:
    """The key as it is stored: that of a client is derived from both, so that two clients never share one."""
    text = header(request, b"idempotency-key")
    if text is None:
        return None
    if len([name for name, _ in request.scope["headers"] if name == b"idempotency-key"]) > 1:
        raise Invalid([FieldError("Idempotency-Key", "is given twice")])
    try:
        key = msgspec.convert(text, uuid.UUID)
    except msgspec.ValidationError:
        raise Invalid([FieldError("Idempotency-Key", f"{shown(text)} is not a UUID")]) from None
    return uuid.uuid5(client, str(key)) if client else key


Grant = Callable[["Farm", list[asyncpg.Record], Cause], Response[bytes]]


async def acquire(farm: Farm, request: Request, ask: Ask, grant: Grant) -> Response[bytes]:
    """Claim users; where there are none, find out why, and try again if some are free after all."""
    if farm.stopping:
        raise ShuttingDown
    ask.client = caller_of(request).client
    ask.cause = cause_of(request)
    ask.key = _idempotency_key(request, ask.client)
    wishes = tuple(ask.wishes)
    if wishes in farm.exhausted and not ask.wait and not (refusal := await farm.refusal(wishes)).free:
        return (ask.key and await _repeat(farm, request, ask, grant)) or refusal.response
    for attempt in itertools.count():
        rows = await farm.claim(ask)
        if rows is None:
            rows = await _in_turn(farm, request, ask)
            if rows and farm.gate and not farm.gate.still(ask.client):  # it was removed while it waited
                await farm.give_back(rows, ask.cause)
                raise Unauthenticated("The client of the token is gone")
        if rows and not ask.key and request.scope["state"].get(GONE):
            await farm.give_back(rows, ask.cause)
            return LockEnded("The caller went away before the reply.").response()
        if rows:
            return await _grant(farm, ask, rows, grant)
        if ask.key and (repeated := await _repeat(farm, request, ask, grant)):
            return repeated
        refusal = await farm.refusal(wishes)
        if not refusal.free or attempt == 4 or ask.wait:
            return refusal.response
        await asyncio.sleep(0.01 * attempt)  # free, but somebody has its row locked in this moment
    raise AssertionError


async def _in_turn(farm: Farm, request: Request, ask: Ask) -> list[asyncpg.Record]:
    """Wait for the answer of the desk. A caller that goes away loses its place.

    What is granted in that very moment is given back at once, unless a key lets a repeat find it. uvicorn tells
    of a closed connection only when asked: https://asgi.readthedocs.io/en/latest/specs/www.html#disconnect
    """
    gone = asyncio.ensure_future(request.receive())
    hopeless = asyncio.ensure_future(_is_hopeless(farm, ask)) if ask.wait else None
    first = asyncio.FIRST_COMPLETED
    try:
        if hopeless is None:
            await asyncio.wait((ask.answer, gone), return_when=first)
        else:
            end = ask.arrived + ask.wait
            left = max(end - time.monotonic(), 0)
            done, _ = await asyncio.wait((ask.answer, gone, hopeless), timeout=left, return_when=first)
            if done == {hopeless} and not hopeless.result():
                await asyncio.wait((ask.answer, gone), timeout=max(end - time.monotonic(), 0), return_when=first)
        rows = await farm.desk.leave(ask)
        for _ in range(2):  # let a closing that has arrived be noticed before the reply goes out
            await asyncio.sleep(0)
        if ask.wait and not rows:
            farm.events.waited("gone" if gone.done() else "refused", time.monotonic() - ask.arrived)
        if gone.done() and rows and not ask.key:
            await farm.give_back(rows, ask.cause)
            return []
        return rows
    finally:
        gone.cancel()
        if hopeless:
            hopeless.cancel()
        farm.desk.abandon(ask)


GONE = "botfarm-gone"  # in the state of a request: its caller has closed the connection


async def _is_hopeless(farm: Farm, ask: Ask) -> bool:
    """Whether there are no such users at all, so that waiting would not help."""
    with contextlib.suppress(*DATABASE_FAULTS):  # then it waits, as long as it has time to
        return (await farm.refusal(tuple(ask.wishes))).response.status_code == 404
    return False


async def _grant(farm: Farm, ask: Ask, rows: list[asyncpg.Record], grant: Grant) -> Response[bytes]:
    try:
        return grant(farm, rows, ask.cause)
    except KeyFault:
        if ask.key is None:  # with a key, a repeat at another replica finds the lock
            await farm.give_back(rows, ask.cause)
        raise


async def _repeat(farm: Farm, request: Request, ask: Ask, grant: Grant) -> Response[bytes] | None:
    """The locks that the key has bound, or that one has ended; None for a key that is not bound."""
    rows = await farm.keyed(cast("uuid.UUID", ask.key))
    if not rows:
        return None
    if all(row["lock_id"] is not None for row in rows):
        return grant(farm, rows, ask.cause)
    ends = await farm.pool.fetch(SQL["get_lock_ends"], [row["bound_id"] for row in rows], ask.client)
    ended_at = min((row["ended_at"] for row in ends), default=None)
    key = _idempotency_key(request, None)
    detail = f"The lock of the idempotency key {key} has ended: use a new key for a new lock."
    return LockEnded(detail, ended_at=ended_at).response()


def _refused(farm: Farm, wish: Wish, counts: asyncpg.Record) -> Problem:
    if wish.user_id:
        return _user_refusal(wish, counts)
    if not counts["matching"]:
        return NoMatchingUser(f"No user at all matches {wish}: create one, or ask for less.")
    return _exhausted(str(wish), counts, farm.desk.waiting(wish))


def _set_refused(farm: Farm, wishes: Wishes, counts: asyncpg.Record, enough: bool) -> Problem:
    asked = "; ".join(f"{count} of {wish}" for wish, count in Counter(wishes).items())
    if not enough:
        return NoMatchingUser(f"There are not enough users for this set ({asked}): create some, or ask for less.")
    return _exhausted(f"this set ({asked})", counts, max(farm.desk.waiting(wish) for wish in wishes))


def _exhausted(asked: str, counts: asyncpg.Record, waiting: int) -> PoolExhausted:
    members = {name: counts[name] for name in ("matching", "locked", "resting", "quarantined", "next_free_at")}
    detail = (
        f"{counts['matching']} users match {asked}, but too few are free: {counts['locked']} locked, "
        f"{counts['resting']} resting, {counts['quarantined']} quarantined. Try again, wait, or add users."
    )
    return PoolExhausted(detail, **members, waiting=waiting)


def _user_refusal(wish: Wish, counts: asyncpg.Record) -> Problem:
    id, state = cast("uuid.UUID", wish.user_id), counts["state"]
    if state is None:
        return no_user(id)
    if state == "quarantined":
        detail = f"The user {id} is quarantined: {counts['quarantine']}."
        return UserUnavailable(detail, state=state, reason=counts["quarantine"])
    if state == "resting":
        detail = f"The user {id} is resting until {counts['ready_at']:%Y-%m-%dT%H:%M:%S.%fZ}."
        return UserUnavailable(detail, state=state, available_at=counts["ready_at"])
    if state == "free":
        detail = f"Other calls want or change the user {id} in this moment; try again."
        return UserUnavailable(detail, headers={"Retry-After": "1"}, state=state, available_at=counts["ready_at"])
    return user_locked(id, counts)


def wish_of(body: AcquireLock | SetPart) -> Wish:
    labels = msgspec.json.encode(body.labels, order="sorted").decode() if body.labels else None
    return Wish(None, body.project_id, body.env, body.domain, labels)


async def not_held(farm: Farm, id: uuid.UUID, owner: uuid.UUID | None) -> LockNotHeld:
    ends = await farm.pool.fetch(SQL["get_lock_ends"], [id], owner)
    if not ends:
        return no_lock(id)
    end = ends[0]
    detail = f"The lock {id} has ended ({end['ended_by']} at {end['ended_at']:%Y-%m-%dT%H:%M:%S.%fZ})."
    return LockNotHeld(detail, ended_at=end["ended_at"], ended_by=end["ended_by"])


class Census:
    """How many users of each pool are in which state: read when asked for, and kept for a second.

    Where counting takes long it is kept for four times as long, so that no scraper keeps the database busy.
    """

    def __init__(self, pool: Connections, events: Events) -> None:
        self._pool = pool
        self._events = events
        self._turn = asyncio.Lock()
        self._until = 0.0
        self._rows: list[asyncpg.Record] = []

    async def rows(self) -> list[asyncpg.Record]:
        """As list_pools.sql gives them; none where the database does not answer."""
        async with self._turn:
            began = time.monotonic()
            if began >= self._until:
                try:
                    self._rows = await self._pool.fetch(SQL["list_pools"], None, None, timeout=5)
                except (asyncpg.UndefinedTableError, *DATABASE_FAULTS) as fault:
                    self._rows = []
                    self._events.database_failed("No counts of users for a scrape", fault)
                ended = time.monotonic()
                self._until = ended + max(1, 4 * (ended - began))
            return self._rows


class Scrape:
    """What GET /metrics shows, as prometheus_client collects it."""

    def __init__(self, tally: Tally, pools: list[asyncpg.Record], workers: list[Snapshot]) -> None:
        self.tally = tally
        self.pools = pools
        self.workers = workers

    def collect(self) -> Iterator[MetricFamily]:
        yield from self.tally.families()
        yield self._users()
        yield self._waiting()
        yield from self._connections()
        build = GaugeMetricFamily("botfarm_build_info", "Versions.", labels=["version", "python_version"])
        build.add_metric([VERSION, platform.python_version()], 1)
        yield build

    def _users(self) -> MetricFamily:
        users = GaugeMetricFamily(
            "botfarm_users", "Users of a pool in a state.", labels=["project_id", "env", "domain", "state"]
        )
        for row in self.pools:
            for state in get_args(UserState):
                users.add_metric([str(row["project_id"]), row["env"], row["domain"], state], row[state])
        return users

    def _waiting(self) -> MetricFamily:
        waiting = GaugeMetricFamily(
            "botfarm_waiting_calls", "Calls that wait for users of a pool; one that fits several counts in each.",
            labels=["project_id", "env", "domain"],
        )  # fmt: skip
        crowds: dict[uuid.UUID | None, list[tuple[list[Wish], int]]] = {}
        for wishes, count in (crowd for worker in self.workers for crowd in worker.waiting):
            for project_id in {wish.project_id for wish in wishes}:
                crowds.setdefault(project_id, []).append((wishes, count))
        for row in self.pools:
            pool = pool_of(row)
            here = crowds.get(pool.project_id, ())
            count = sum(count for wishes, count in here if any(pool.meets(wish) for wish in wishes))
            waiting.add_metric([str(pool.project_id), row["env"], row["domain"]], count)
        return waiting

    def _connections(self) -> Iterator[MetricFamily]:
        found = GaugeMetricFamily("botfarm_database_connections", "Open connections.", labels=["pool", "state"])
        limit = GaugeMetricFamily("botfarm_database_connections_limit", "Most connections.", labels=["pool"])
        queue = GaugeMetricFamily(
            "botfarm_database_connection_waiting_calls", "Calls that wait for a connection.", labels=["pool"]
        )
        for pool in ("locks", "other"):
            every = [worker.connections[pool] for worker in self.workers]
            busy, idle, most, waiting = (sum(column) for column in zip(*every, strict=True))
            found.add_metric([pool, "busy"], busy)
            found.add_metric([pool, "idle"], idle)
            limit.add_metric([pool], most)
            queue.add_metric([pool], waiting)
        yield from (found, limit, queue)


def snapshot(farm: Farm) -> Snapshot:
    """What this worker has at this moment."""
    return Snapshot(farm.desk.crowd(), {"locks": farm.hot.gauges(), "other": farm.pool.gauges()})


async def publish(farm: Farm) -> None:
    """Tell the other workers what there is here."""
    farm.events.count_losses()
    try:
        farm.events.tally.publish(snapshot(farm))
    except OSError as fault:
        log.warning("The other workers cannot be told what there is here: %s", fault)


async def sweep(farm: Farm) -> None:
    """Record expired locks, and give back those whose grant was never answered."""
    while True:
        due = await farm.hot.fetch(SQL["sweep_locks"], 500)
        expired = [row for row in due if row["is_over"]]
        for row in expired:
            farm.events.ended("expired", row)
        if expired:
            farm.desk.freed()
        if len(due) < 500:
            break
    await farm.find_lost()


async def prune(farm: Farm) -> None:
    """Forget what is older than BOTFARM_HISTORY_DAYS, 1,000 rows at a time with pauses."""
    for statement in ("prune_history", "prune_keys"):
        while await farm.pool.execute(SQL[statement], farm.settings.history_days, 1000) == "DELETE 1000":
            await asyncio.sleep(0.05)
    if farm.gate:
        await farm.pool.execute(SQL["prune_token_requests"])


async def repeat(task: Callable[[Farm], Awaitable[None]], farm: Farm, seconds: float) -> None:
    """Run a task for ever, at jittered intervals; what fails is tried again at the next one."""
    while True:
        await asyncio.sleep(seconds * (0.75 + secrets.randbelow(500) / 1000))
        try:
            await task(farm)
        except DATABASE_FAULTS as fault:
            farm.events.database_failed(f"{task.__name__} waits for the database", fault)
        except Exception:
            log.exception("%s failed; it goes on", task.__name__)
