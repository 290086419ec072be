"""Locks: the statements that grant, renew and end them, shared by the calls that arrive together; refusals and why.

A call that acquires has an `Ask`. Its users are claimed by one statement, which it shares with others; where nobody is
free it waits at the desk (farm/waiting.py) or is told why not. All of it answers with rows of the database, from which
`granted` makes the locks of the reply, the passwords with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta
from functools import partial
from operator import attrgetter
from typing import Any, cast

import asyncpg
from cachetools import LRUCache, TLRUCache, TTLCache
from litestar import Request
from msgspec import Struct

from farm import problems
from farm.clients import Gate
from farm.database import DATABASE_FAULTS, SQL, Coalescer, Connections, column, columns, new_id
from farm.passwords import KeyFault, Passwords
from farm.settings import Settings
from farm.telemetry import NOWHERE, Cause, Events
from farm.waiting import Ask, Desk, Unanswered, find_keyed, fitting_of, match
from farm.words import Lock, Wish, Wishes

# In the state of a request, by farm/server.py: its caller has closed the connection; or, where it sends nothing any
# more, who can tell whether it is there.
GONE, ANSWERS = "botfarm-gone", "botfarm-answers"
STRAGGLERS = timedelta(milliseconds=20)  # a release may commit that much later than a claim has passed its place
COSTLY = 10_000  # users from which counts are worth keeping for a moment
FEW = 1000  # users up to which a look for labels begins with those who have them
KEPT = 10_000  # wishes of which something is remembered
# In one order everywhere, so that two statements can't wait for each other. (By `int`, because that is compared in C.)
BY_LOCK = attrgetter("lock_id.int")


class Release(Struct):
    lock_id: uuid.UUID
    cooldown: int = 0
    quarantine: str | None = None
    client: uuid.UUID | None = None  # whose lock it has to be; null: anybody's
    outcome: str | None = None
    cause: Cause = NOWHERE


class Renewal(Struct):
    """What it leaves null stays as it is."""

    lock_id: uuid.UUID
    ttl: int | None = None
    client: uuid.UUID | None = None  # whose lock it has to be; null: anybody's
    holder: str | None = None
    note: str | None = None
    cause: Cause = NOWHERE

    def after(self, earlier: Renewal) -> Renewal:
        """Both in one: what it leaves as it is, is as the earlier one wanted it."""
        pairs = ((getattr(self, name), getattr(earlier, name)) for name in self.__struct_fields__)
        return Renewal(*(mine if mine is not None else theirs for mine, theirs in pairs))


class Refusal(Struct):
    """Why a wish gets no user, and how many are free all the same (their rows are locked in this moment)."""

    matching: int
    free: int
    problem: problems.Problem


def _too_few_free(asked: str, counts: asyncpg.Record, waiting: int) -> problems.PoolExhausted:
    members = {name: counts[name] for name in ("matching", "locked", "resting", "quarantined", "next_free_at")}
    detail = (
        f"{counts['matching']} users match {asked}, but too few are free: {counts['locked']} locked, "
        f"{counts['resting']} resting, {counts['quarantined']} quarantined. Try again, wait, or add users."
    )
    return problems.PoolExhausted(detail, **members, waiting=waiting)


def why_not_this(id: uuid.UUID, counts: asyncpg.Record) -> problems.Problem:
    state = counts["state"]
    if state is None:
        return problems.UserNotFound.of(id)
    if state == "quarantined":
        detail = f"The user {id} is quarantined: {counts['quarantine']}."
        return problems.UserUnavailable(detail, state=state, reason=counts["quarantine"])
    if state == "resting":
        detail = f"The user {id} is resting until {counts['ready_at']:%Y-%m-%dT%H:%M:%S.%fZ}."
        return problems.UserUnavailable(detail, state=state, available_at=counts["ready_at"])
    return problems.UserLocked.of(id, counts) if state == "locked" else problems.UserLocked.contended(id)


class Locks:
    """The locks of this worker's callers.

    They have connections of their own (`hot`), so that no import, list or export stands before them.
    """

    def __init__(
        self, settings: Settings, hot: Connections, pool: Connections, passwords: Passwords, events: Events,
        gate: Gate | None = None,
    ) -> None:  # fmt: skip
        self.hot = hot
        self.pool = pool
        self.passwords = passwords
        self.events = events
        self.gate = gate
        self.bad_logins = settings.bad_logins

        def shared(run: Any, statement: str) -> Coalescer[Any, Any]:
            return Coalescer(run, settings.batch, partial(events.batched, statement))

        self.claim = shared(self._claim_or_wait, "acquire_locks")
        self.claim_with_session = Coalescer(self._claim_with_sessions, settings.batch)
        self.release = shared(self._release, "release_locks")
        self.extend = shared(self._extend, "extend_locks")
        self.keyed = shared(partial(find_keyed, hot), "get_keyed_locks")
        self.refusal = shared(self._refusals, "count_matching")
        self.unanswered = Unanswered()
        # Whether few users have the labels of a wish: counted anew after a while, as imports may bring many.
        self.rare: TTLCache[Wish, bool] = TTLCache(KEPT, 600)
        self.desk = Desk(hot, events, self.unanswered, self.rare, self.refusal)
        # What was refused last: who asks for it again is refused by a count alone (refusals to cycles: 0.18 -> 1.2).
        self._exhausted: LRUCache[Wishes, None] = LRUCache(KEPT)
        # Counts of many users, and how long they took: kept for four times as long, or a hammered pool of a
        # million would be counted for ever.
        self._costly: TLRUCache[Wishes, tuple[Refusal, float]] = TLRUCache(
            KEPT, ttu=lambda _, counted, now: now + 4 * counted[1], timer=time.monotonic
        )
        # Where the last search ended, by pool: while an old snapshot keeps dead versions alive, a search that began at
        # the same end each time would walk over all of them (3,135 -> 402 cycles/s in 24 s).
        self._cursors: LRUCache[Wish, dict[int, datetime]] = LRUCache(KEPT)

    # ---- Acquire -------------------------------------------------------------------------------------------

    async def acquire(self, request: Request, ask: Ask) -> list[Lock] | problems.Problem:
        """The locks of the users that it got, or why it got none."""
        if self.desk.stopping.is_set():
            raise problems.ShuttingDown
        try:
            return await self._acquire(request, ask)
        except asyncio.CancelledError:  # the server stops, and has waited for it as long as it may
            ask.leaving = True
            if ask.key is None:
                self.unanswered.add(ask.lock_ids)
            raise

    async def _acquire(self, request: Request, ask: Ask) -> list[Lock] | problems.Problem:
        """Claim users; where there are none, find out why, and try again if some are free after all."""
        if ask.wait and (repeated := await self._repeated(ask)):  # else it would wait for a turn to be told
            return repeated
        if not ask.wait and ask.wishes in self._exhausted and not (refusal := await self.refusal(ask.wishes)).free:
            return await self._repeated(ask) or refusal.problem
        attempts = 0
        while not (rows := await self._claim(request, ask)):
            if repeated := await self._repeated(ask):
                return repeated
            refusal = await self.refusal(ask.wishes)
            attempts += 1
            goes_on = refusal.free
            if ask.wait:  # it was ended too early where the first such user came in this moment
                goes_on = ask.seconds() < ask.wait and refusal.problem.status_code != 404
            if not goes_on or attempts == 5 or GONE in request.scope["state"]:
                return refusal.problem
            await asyncio.sleep(0.01 * (attempts - 1))  # free, but somebody has its row locked in this moment
        return await self._granted(request, ask, rows)

    async def _claim(self, request: Request, ask: Ask) -> list[asyncpg.Record]:
        """The rows of the users that it got, maybe none."""
        ask.answer, ask.leaving = None, False
        if ask.prefers_session and not self.desk.crowded(ask) and (rows := await self.claim_with_session(ask)):
            return rows
        if len(ask.wishes) == 1:
            rows = await self.claim(ask)
            if rows is not None:
                return rows
        else:
            self.desk.join(ask)
        return await self._wait(request, ask)

    async def _wait(self, request: Request, ask: Ask) -> list[asyncpg.Record]:
        """Wait for the answer of the desk. A caller that goes away loses its place.

        uvicorn tells of a closed connection only when asked:
        https://asgi.readthedocs.io/en/latest/specs/www.html#disconnect
        """
        gone = asyncio.ensure_future(request.receive())
        hopeless = asyncio.ensure_future(self._end_if_hopeless(ask))
        left = max(ask.wait - ask.seconds(), 0) if ask.wait else None
        try:
            await asyncio.wait((ask.answer, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            self.desk.turn_away(ask)
            rows = await ask.answer
            for _ in range(2):  # let a closing that has arrived be noticed before the reply goes out
                await asyncio.sleep(0)
            if ask.wait and not rows:
                self.events.waited("gone" if gone.done() else "refused", ask.seconds())
            if gone.done():
                request.scope["state"][GONE] = True
            return rows
        finally:
            gone.cancel()
            hopeless.cancel()
            self.desk.turn_away(ask)

    async def _end_if_hopeless(self, ask: Ask) -> None:
        """End a wait that would not help: there are no such users at all."""
        with contextlib.suppress(*DATABASE_FAULTS):  # then it waits, as long as it has time to
            if ask.wait and (await self.refusal(ask.wishes)).problem.status_code == 404:
                self.desk.turn_away(ask)

    async def _granted(self, request: Request, ask: Ask, rows: list[asyncpg.Record]) -> list[Lock] | problems.Problem:
        """The locks for the reply; given back where the caller can't have them any more.

        With an idempotency key they stay: a repeat, maybe at another replica, finds them.
        """
        if self.gate and not self.gate.still(ask.client):  # it was removed while it waited
            await self._give_back(rows, ask.cause)
            raise problems.Unauthenticated("The client of the token is gone")
        state = request.scope["state"]
        if ask.key is None and ((ANSWERS in state and not await state[ANSWERS]()) or GONE in state):
            await self._give_back(rows, ask.cause)
            return problems.LockEnded("The caller went away before the reply.")
        try:
            return self._with_passwords(rows)
        except KeyFault:
            if ask.key is None:
                await self._give_back(rows, ask.cause)
            raise

    def _with_passwords(self, rows: list[asyncpg.Record]) -> list[Lock]:
        """The locks as only the reply that grants them tells them. KeyFault where a password does not open."""
        locks = [Lock.of(row, self.passwords.reveal(row["user_id"], row["secret"])) for row in rows]
        self.events.revealed(sum(lock.user.password is not None for lock in locks))
        return locks

    async def _repeated(self, ask: Ask) -> list[Lock] | problems.Problem | None:
        """The locks that the idempotency key has bound, or that one has ended; None for a key that is not bound."""
        if ask.key is None or not (rows := await self.keyed(ask.key)):
            return None
        if all(row["lock_id"] is not None for row in rows):
            locks = self._with_passwords(rows)
            for row in rows:
                self.events.repeated(row, ask.cause)
            return locks
        ends = await self.pool.fetch(SQL["get_lock_ends"], [row["bound_id"] for row in rows], ask.client)
        ended_at = min((row["ended_at"] for row in ends), default=None)
        detail = f"The lock of the idempotency key {ask.sent_key} has ended: use a new key for a new lock."
        return problems.LockEnded(detail, ended_at=ended_at)

    async def _give_back(self, rows: list[asyncpg.Record], cause: Cause) -> None:
        """Release what was granted to a caller that can't have it; where that fails, the sweep does it."""
        try:
            await asyncio.gather(*(self.release(Release(row["lock_id"], cause=cause)) for row in rows))
        except DATABASE_FAULTS:
            self.unanswered.add(row["lock_id"] for row in rows)

    async def settle(self) -> None:
        """Give back what is to be given back, at the end; a second at most."""
        with contextlib.suppress(*DATABASE_FAULTS):
            async with asyncio.timeout(1):
                while await self.find_lost():  # a statement that grants one may still be running
                    await asyncio.sleep(0.1)

    async def find_lost(self) -> bool:
        """Give back the locks that nobody was told of. Whether some are still looked for."""
        return await self.unanswered.give_back(lambda id: self.release(Release(id)))

    # ---- The statements that calls share -------------------------------------------------------------------

    async def _claim_or_wait(self, asks: list[Ask]) -> list[list[asyncpg.Record] | None]:
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
        while left := [ask for ask in asks if ask not in granted and not ask.leaving]:
            for ask in left:
                ask.lock_ids = [new_id()]
            try:
                rows = {row["lock_id"]: row for row in await self._acquire_locks(left)}
            except Exception:
                if not granted:
                    raise
                break  # those who got a user are told so; the others find out why they did not
            granted |= {ask: [rows[ask.lock_ids[0]]] for ask in left if ask.lock_ids[0] in rows}
            if not rows:
                break
        return granted

    async def _claim_with_sessions(self, asks: list[Ask]) -> list[list[asyncpg.Record]]:
        """The row of each that got a user with a live session, none for the others."""
        granted: dict[Ask, list[asyncpg.Record]] = {}
        for _ in range(5):  # another replica may take those that were found
            left = [ask for ask in asks if ask not in granted]
            try:
                fitting = await self._find_with_sessions(left) if left else {}
                if not (chosen := match([ask for ask in left if not ask.leaving], fitting, 0)):
                    break
                granted |= await self.desk.hand_out(chosen)
            except Exception:
                if not granted:
                    raise
                break  # as in `_claim_for`
        return [granted.get(ask, []) for ask in asks]

    async def _find_with_sessions(self, asks: list[Ask]) -> dict[Wish, list[uuid.UUID]]:
        wishes = list(dict.fromkeys(ask.wishes[0] for ask in asks))
        return fitting_of(wishes, await self.hot.fetch(SQL["find_with_sessions"], *columns(wishes, Wish), len(asks)))

    async def _acquire_locks(self, asks: list[Ask]) -> list[asyncpg.Record]:
        wanted = Counter(ask.wishes[0] for ask in asks)
        wishes = {wish: ordinal for ordinal, wish in enumerate(wanted, 1)}
        with self.unanswered.unless_answered(asks):
            rows = await self.hot.fetch(
                SQL["acquire_locks"],
                *columns(wishes, Wish),
                list(wanted.values()),
                *self._cursor_columns(wishes),
                [wishes[ask.wishes[0]] for ask in asks],
                [ask.lock_ids[0] for ask in asks],
                [ask.holder for ask in asks],
                [ask.ttl for ask in asks],
                column([ask.key for ask in asks]),
                column([ask.client for ask in asks]),
                [ask.note for ask in asks],
            )
        asked = {ask.lock_ids[0]: ask for ask in asks}
        for row in rows:
            ask = asked[row["lock_id"]]
            self.events.acquired(row, ask.cause, ask.seconds(), waited=False)
        self._advance(rows, asked)
        return rows

    def _cursor_columns(self, wishes: dict[Wish, int]) -> tuple[list[int], list[int], list[datetime]]:
        known = [(o, p, since) for wish, o in wishes.items() for p, since in self._cursors.get(wish, {}).items()]
        return [row[0] for row in known], [row[1] for row in known], [row[2] for row in known]

    def _advance(self, rows: list[asyncpg.Record], asks: Mapping[uuid.UUID, Ask]) -> None:
        """Begin the next search where this one ended: see acquire_locks.sql."""
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
        asked = columns(sorted(once.values(), key=BY_LOCK), Release)
        rows = await self.hot.fetch(SQL["release_locks"], *asked, self.bad_logins)
        freed = {id(once[row["lock_id"], row["client"]]) for row in rows}
        for row in rows:
            release = once[row["lock_id"], row["client"]]
            self.events.ended("released", row, release.cause, release.cooldown, release.outcome)
            if row["quarantined"]:
                self.events.log("user-quarantined", release.cause, user_id=row["user_id"], reason=row["quarantined"])
        if freed:
            self.desk.freed()
        return [id(release) in freed for release in releases]

    async def _extend(self, renewals: list[Renewal]) -> list[asyncpg.Record | None]:
        """Rows of those that are held. Several renewals of one lock by one client at once are made as one."""
        merged: dict[tuple[uuid.UUID, uuid.UUID | None], Renewal] = {}
        for renewal in renewals:
            place = renewal.lock_id, renewal.client
            if (earlier := merged.setdefault(place, renewal)) is not renewal:
                merged[place] = renewal.after(earlier)
        extended: dict[tuple[uuid.UUID, uuid.UUID | None], asyncpg.Record] = {}
        left = sorted(merged.values(), key=BY_LOCK)
        while left:  # a statement changes a row once, so two clients of one lock have one each
            turn = {renewal.lock_id: renewal for renewal in left}
            for row in await self.hot.fetch(SQL["extend_locks"], *columns(turn.values(), Renewal)):
                renewal = turn[row["lock_id"]]
                self.events.extended(row, renewal.cause)
                extended[renewal.lock_id, renewal.client] = row
            left = [renewal for renewal in left if renewal is not turn[renewal.lock_id]]
        return [extended.get((renewal.lock_id, renewal.client)) for renewal in renewals]

    async def sweep(self) -> None:
        """Record expired locks, and give back those whose grant was never answered."""
        while True:
            due = await self.hot.fetch(SQL["sweep_locks"], 500)
            expired = [row for row in due if row["is_over"]]
            for row in expired:
                self.events.ended("expired", row)
            if expired:
                self.desk.freed()
            if len(due) < 500:
                break
        await self.find_lost()

    async def not_held(self, id: uuid.UUID, owner: uuid.UUID | None) -> problems.LockNotHeld:
        """What became of a lock that is not held."""
        ends = await self.pool.fetch(SQL["get_lock_ends"], [id], owner)
        return problems.LockNotHeld.of(id, ends[0] if ends else None)

    # ---- Why there is no user ------------------------------------------------------------------------------

    async def _refusals(self, asked: list[Wishes]) -> list[Refusal]:
        """Those who are refused in one moment share the counts and the problem."""
        began = time.monotonic()
        refusals = {wishes: known[0] for wishes in asked if (known := self._costly.get(wishes))}
        singles = [wishes[0] for wishes in dict.fromkeys(asked) if wishes not in refusals and len(wishes) == 1]
        if singles:
            rows = await self.pool.fetch(SQL["count_matching"], *columns(singles, Wish))
            for row in rows:
                wish = singles[row["filter"] - 1]
                refusals[(wish,)] = Refusal(row["matching"], row["free"], self._why_not(wish, row))
                self._remember((wish,), refusals[(wish,)], time.monotonic() - began)
                if wish in self.rare:
                    self.rare[wish] = row["matching"] <= FEW
        for wishes in dict.fromkeys(asked):
            if wishes not in refusals:
                refusals[wishes] = await self._set_refusal(wishes)
        return [refusals[wishes] for wishes in asked]

    async def _set_refusal(self, wishes: Wishes) -> Refusal:
        began = time.monotonic()
        distinct = list(dict.fromkeys(wishes))
        rare = [self.rare.get(wish, False) for wish in distinct]
        rows = await self.pool.fetch(SQL["find_matching"], *columns(distinct, Wish), rare, len(wishes))
        counts = cast("asyncpg.Record", await self.pool.fetchrow(SQL["count_set"], *columns(distinct, Wish)))
        enough = bool(match([Ask(wishes=wishes)], fitting_of(distinct, rows), 0))
        refusal = Refusal(counts["matching"], 0, self._why_no_set(wishes, counts, enough))
        self._remember(wishes, refusal, time.monotonic() - began)
        return refusal

    def _remember(self, wishes: Wishes, refusal: Refusal, took: float) -> None:
        self._exhausted.pop(wishes, None)
        if refusal.matching >= COSTLY:
            self._costly[wishes] = refusal, took
        elif not refusal.free and len(wishes) == 1:  # a set is asked for at the desk, which costs no count
            self._exhausted[wishes] = None

    def _why_not(self, wish: Wish, counts: asyncpg.Record) -> problems.Problem:
        if wish.user_id:
            return why_not_this(wish.user_id, counts)
        if not counts["matching"]:
            return problems.NoMatchingUser(f"No user at all matches {wish}: create one, or ask for less.")
        return _too_few_free(str(wish), counts, self.desk.waiting(wish))

    def _why_no_set(self, wishes: Wishes, counts: asyncpg.Record, enough: bool) -> problems.Problem:
        asked = "; ".join(f"{count} of {wish}" for wish, count in Counter(wishes).items())
        if not enough:
            detail = f"There are not enough users for this set ({asked}): create some, or ask for less."
            return problems.NoMatchingUser(detail)
        return _too_few_free(f"this set ({asked})", counts, max(self.desk.waiting(wish) for wish in wishes))
