from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import asyncpg
import msgspec
from cachetools import LRUCache, TTLCache
from msgspec import Struct

from farm.database import DATABASE_FAULTS, SQL, Busy, Connections, columns, new_id
from farm.problems import ShuttingDown
from farm.settings import jittered, log
from farm.telemetry import NOWHERE, Cause, Events
from farm.words import Wish, Wishes

POLL = 0.2  # seconds between two looks while somebody waits
EXCHANGE = 0.5  # seconds between two exchanges with the other replicas while somebody waits, else twice that
HEAD_START = 0.5  # seconds by which one who waits here may overtake one who waits at another replica
PATIENCE = 3.0  # seconds after which a waiting set goes before those who came later
LOOK = 500  # distinct wishes that one look serves
GROUPS = 200  # calls that one statement serves: it compares each with each
BREADTH = 200  # free users that one look lists for a wish; at least as many as a set may have


class Ask(Struct, eq=False, kw_only=True):
    """One acquiring call: a user for each of its wishes, all or none. A set has more than one."""

    wishes: list[Wish]
    holder: str = ""
    ttl: int = 0
    wait: int = 0
    cause: Cause = NOWHERE
    key: uuid.UUID | None = None  # the idempotency key as it is stored
    sent_key: uuid.UUID | None = None  # and as it was sent
    client: uuid.UUID | None = None  # whose the lock will be; null: authentication is off
    home: Wish | None = None  # the pool of the very user that is wished for, where that is known
    foreign: bool = False  # waits at another replica, and only holds its place here
    arrived: float = msgspec.field(default_factory=time.monotonic)
    lock_ids: list[uuid.UUID] = []
    answer: Any = None  # the future of its rows
    leaving: bool = False
    told: bool = False  # the other replicas know of it

    def pools(self) -> frozenset[Wish]:
        """Where it looks for users."""
        return frozenset(self.home or Wish(None, wish.project_id, wish.env, wish.domain) for wish in self.wishes)


class Told(Struct):
    """One who waits, as the replicas tell each other: for how many seconds, and for what."""

    age: float
    wishes: list[Wish]
    home: Wish | None = None


def tell_granted(
    events: Events, rows: Iterable[asyncpg.Record], asks: Mapping[uuid.UUID, Ask], by_desk: bool = False
) -> None:
    """Tell of the locks that a statement has granted."""
    now = time.monotonic()
    for row in rows:
        ask = asks[row["lock_id"]]
        seconds = int((now - ask.arrived) * 1e6) / 1e6  # cheaper than round()
        events.acquired(row, ask.cause, seconds, waited=by_desk and ask.wait > 0)


Place = tuple[Ask, int]  # a call, and which of its wishes


class Seats:
    """Which user is for whom, as far as it is decided."""

    def __init__(self, fitting: Mapping[Wish, Sequence[uuid.UUID]]) -> None:
        self.fitting = fitting
        self.taken: dict[uuid.UUID, Place] = {}
        self.full: set[uuid.UUID] = set()  # users from whom a search found no way to a free one: none will

    def find(self, place: Place, keeps: bool = True) -> bool:
        """A user for a place; those who have one keep one, but maybe another one (augmenting paths, Kuhn 1955)."""
        came: dict[uuid.UUID, uuid.UUID | None] = {}
        frontier: deque[tuple[uuid.UUID | None, Place]] = deque([(None, place)])
        while frontier:
            previous, (ask, number) = frontier.popleft()
            for user in self.fitting[ask.wishes[number]]:
                if user in came or user in self.full:
                    continue
                came[user] = previous
                if user not in self.taken:
                    self._move(user, came, place)
                    return True
                frontier.append((user, self.taken[user]))
        if keeps:
            self.full |= came.keys()
        return False

    def _move(self, user: uuid.UUID, came: dict[uuid.UUID, uuid.UUID | None], place: Place) -> None:
        while (previous := came[user]) is not None:
            self.taken[user] = self.taken[previous]
            user = previous
        self.taken[user] = place


def match(asks: Iterable[Ask], fitting: Mapping[Wish, Sequence[uuid.UUID]], now: float) -> dict[Ask, list[uuid.UUID]]:
    """Who gets whom: first come first served, all or none; nobody waits behind one whom nothing fits.

    A set that is not complete leaves its users to those behind it, until it has waited for PATIENCE; then they
    are kept for it, so that it does not starve behind single acquires.
    """
    seats = Seats(fitting)
    hopeless: set[Wish] = set()  # a wish that found nothing once finds nothing later on
    vain: set[Wishes] = set()  # and so it is with a set
    served: dict[Ask, list[Any]] = {}
    for ask in asks:
        kind = tuple(ask.wishes)
        keeps = len(kind) == 1 or now - ask.arrived >= PATIENCE
        if not keeps and kind in vain:
            continue
        before = {} if keeps else dict(seats.taken)
        complete = True
        for number, wish in enumerate(kind):
            if wish not in hopeless and seats.find((ask, number), keeps):
                continue
            complete = False
            if not keeps:
                break
            hopeless.add(wish)
        if complete:
            served[ask] = [None] * len(kind)
        elif not keeps:
            seats.taken = before
            vain.add(kind)
    for user, (ask, number) in seats.taken.items():
        if ask in served:
            served[ask][number] = user
    return {ask: users for ask, users in served.items() if not ask.foreign}


class Unanswered:
    """Locks that nobody was told of, and that somebody has to give back.

    They may have been granted by a statement whose reply was lost, and which may still be running: so each is looked
    for until SEARCH seconds have passed.
    """

    SEARCH = 30

    def __init__(self) -> None:
        self._ends: dict[uuid.UUID, float] = {}

    def add(self, lock_ids: Iterable[uuid.UUID]) -> None:
        self._ends |= dict.fromkeys(lock_ids, time.monotonic() + self.SEARCH)

    async def give_back(self, release: Callable[[uuid.UUID], Awaitable[bool]]) -> None:
        """Release them; those that are not found are kept for the next time."""
        ids, now = list(self._ends), time.monotonic()
        for first in range(0, len(ids), 500):
            page = ids[first : first + 500]
            for id, found in zip(page, await asyncio.gather(*map(release, page)), strict=True):
                if found or self._ends[id] <= now:
                    del self._ends[id]


class Rarity:
    """Which labels few users have: those users are found by their labels, and not among all that are free.

    A call that waited for a label of one in 100,000 users made all others of its project take 170 ms.
    """

    SLOW = 0.005  # seconds from which a look is worth knowing how many have the labels
    FEW = 1000  # users up to which a look begins with those who have the labels

    def __init__(self, count: Callable[[Wish], Awaitable[int]]) -> None:
        self._count = count
        self._rare: LRUCache[Wish, bool] = LRUCache(10_000)
        self._counted: TTLCache[Wish, None] = TTLCache(10_000, 60)  # a count costs more than a look
        self._tasks: set[asyncio.Task[None]] = set()

    def of(self, wishes: Iterable[Wish]) -> list[bool]:
        """Whether few users have the labels of each, as far as that is known."""
        return [self._rare.get(wish, False) for wish in wishes]

    def learn(self, wishes: Iterable[Wish], seconds: float) -> None:
        """Count the users with the labels of wishes that it took so long to look after."""
        for wish in wishes:
            if wish.labels and seconds > self.SLOW and wish not in self._counted:
                self._counted[wish] = None
                task = asyncio.create_task(self._learn(wish))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _learn(self, wish: Wish) -> None:
        with contextlib.suppress(*DATABASE_FAULTS):
            self._rare[wish] = await self._count(wish) <= self.FEW


async def find_keyed(hot: Connections, keys: list[uuid.UUID]) -> list[list[asyncpg.Record]]:
    """What each idempotency key has bound: nothing, or a row for each lock, in the order they were asked for."""
    bound: dict[uuid.UUID, list[asyncpg.Record]] = {key: [] for key in keys}
    for row in await hot.fetch(SQL["get_keyed_locks"], list(bound)):
        bound[row["key"]].append(row)
    return [bound[key] for key in keys]


class Desk:
    """Those who wait at this replica, and what it knows of those who wait at others."""

    def __init__(self, hot: Connections, events: Events, unanswered: Unanswered, rarity: Rarity) -> None:
        self.hot = hot
        self.events = events
        self.unanswered = unanswered
        self.rarity = rarity
        self.replica = uuid.uuid4()
        self.queue: dict[Ask, None] = {}
        self.foreign: list[Ask] = []
        self._foreign_projects: set[uuid.UUID | None] = set()
        self._kinds: Counter[Wishes] = Counter()  # how many wait for the same
        self._pools: Counter[frozenset[Wish]] = Counter()  # and where, without those who have no time to wait
        self._projects: Counter[uuid.UUID | None] = Counter()
        self._taking: set[Ask] = set()
        self._woken = asyncio.Event()
        self._news: asyncio.Queue[str] = asyncio.Queue(1)
        self._others_wait_until = 0.0
        self._polls_at = self._exchanges_at = 0.0
        self._closed = False

    def crowded(self, ask: Ask) -> bool:
        """Whether somebody waits who may want the same users: then everybody takes turns."""
        if not self._projects and not self.foreign:
            return False
        waited_for = self._projects.keys() | self._foreign_projects
        projects = {pool.project_id for pool in ask.pools()}
        return None in waited_for or None in projects or bool(waited_for & projects)

    def waiting(self, pool: Wish) -> int:
        """How many calls wait here for users of this pool."""
        return sum(count for pools, count in self._pools.items() if any(pool.meets(other) for other in pools))

    def crowd(self) -> list[tuple[list[Wish], int]]:
        """Who waits here: pools, and how many calls wait for users of any of them."""
        return [(list(pools), count) for pools, count in self._pools.items()]

    def join(self, ask: Ask) -> None:
        """Take a place in the queue; `ask.answer` will be its rows, none for one that has no time to wait."""
        ask.answer = asyncio.get_running_loop().create_future()
        if self._closed:
            ask.answer.set_exception(ShuttingDown())
            return
        self.queue[ask] = None
        self._kinds[tuple(ask.wishes)] += 1
        self._projects.update(pool.project_id for pool in ask.pools())
        if ask.wait:
            self._pools[ask.pools()] += 1
        self._woken.set()
        if ask.wait and len(self.queue) == 1:
            self._tell("waiting")

    async def leave(self, ask: Ask) -> list[asyncpg.Record]:
        """Give up the place. A grant that is on its way counts."""
        if ask in self._taking:
            ask.leaving = True
            return await ask.answer
        self._forget(ask)
        return ask.answer.result() if ask.answer.done() else []

    def _forget(self, ask: Ask) -> None:
        if ask in self.queue:
            del self.queue[ask]
            if ask.told:  # they need not keep a place for it any more
                self._exchanges_at = 0
                self._woken.set()
            _take_out(self._kinds, tuple(ask.wishes))
            for pool in ask.pools():
                _take_out(self._projects, pool.project_id)
            if ask.wait:
                _take_out(self._pools, ask.pools())

    def abandon(self, ask: Ask) -> None:
        """Take out a call whose handler has failed."""
        ask.leaving = True
        if ask not in self._taking:
            self._forget(ask)

    def _answer(self, ask: Ask, rows: list[asyncpg.Record]) -> None:
        self._forget(ask)
        if not ask.answer.done():
            ask.answer.set_result(rows)

    def _refuse(self, ask: Ask, reason: Exception) -> None:
        self._forget(ask)
        if not ask.answer.done():
            ask.answer.set_exception(reason)

    def close(self) -> None:
        """Answer everybody: the service stops. Grants that are on their way are still told."""
        self._closed = True
        for ask in [ask for ask in self.queue if ask not in self._taking]:
            self._refuse(ask, ShuttingDown())

    def freed(self) -> None:
        """Users may have come free: look after those who wait here, and tell it to those who wait elsewhere."""
        if self.queue:
            self._woken.set()
        if self.foreign or time.monotonic() < self._others_wait_until:
            self._tell("freed")

    def _tell(self, what: str) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self._news.put_nowait(f"{what} {self.replica}")

    def hear(self, news: str) -> None:
        """What another replica told."""
        what, _, replica = news.partition(" ")
        if replica == str(self.replica):
            return
        if what == "waiting":
            now = time.monotonic()
            self._others_wait_until = now + 2
            self._exchanges_at = min(self._exchanges_at, now + EXCHANGE)
        self._woken.set()

    async def announce(self) -> None:
        """Send news, at most every 10 ms, in a statement of its own (for ever)."""
        while True:
            news = await self._news.get()
            with contextlib.suppress(asyncpg.PostgresError, *DATABASE_FAULTS):  # the others look by themselves
                await self.hot.execute(SQL["notify"], news)
            await asyncio.sleep(0.01)

    async def run(self) -> None:
        """Look after the queue (for ever)."""
        while True:
            await self._rest()
            try:
                await self._look()
            except Exception as fault:
                if not isinstance(fault, DATABASE_FAULTS):
                    log.exception("The desk failed; it goes on")
                for ask in [ask for ask in self.queue if not ask.wait]:
                    self._refuse(ask, fault)
                await asyncio.sleep(POLL)

    async def _rest(self) -> None:
        due = min(self._polls_at, self._exchanges_at) if self.queue else self._exchanges_at
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(due - time.monotonic(), 0)):
                await self._woken.wait()
        self._woken.clear()

    async def _look(self) -> None:
        now = time.monotonic()
        if now >= self._exchanges_at:
            self._exchanges_at = now + jittered(EXCHANGE)
            with contextlib.suppress(*DATABASE_FAULTS):  # what the others told last still counts
                await self._exchange(now)
                await self._find_deleted()
        if not self.queue:
            return
        newcomers = [ask for ask in self.queue if not ask.wait]
        if now >= self._polls_at:
            await self._find_repeats(list(self.queue))
        for _ in range(20):
            if not await self._serve():
                break
        if self.foreign and any(ask in self.queue for ask in newcomers):
            await self._exchange(time.monotonic())  # who waited elsewhere may have been served meanwhile
            await self._serve()
        for ask in newcomers:
            if ask in self.queue:
                self._answer(ask, [])
        if now >= self._polls_at:  # more seldom where a look takes long
            ended = time.monotonic()
            self._polls_at = ended + max(jittered(POLL), 5 * (ended - now))

    async def _serve(self) -> bool:
        """Hand out what is free. False when there was nothing to hand out.

        The calls themselves are looked at only when somebody is free: thousands may wait for the same.
        """
        kinds, present = dict(self._kinds), list(self.queue)
        wishes = list(dict.fromkeys(wish for kind in kinds for wish in kind))
        elsewhere = sum(len(ask.wishes) for ask in self.foreign)
        demand = sum(len(kind) * count for kind, count in kinds.items()) + elsewhere
        # What sets and those who wait elsewhere keep must not hide the free users behind it.
        kept = elsewhere + sum(len(kind) * count for kind, count in kinds.items() if len(kind) > 1)
        fitting: dict[Wish, list[uuid.UUID]] = {wish: [] for wish in wishes}
        rows = []
        for first in range(0, len(wishes), LOOK):
            page = wishes[first : first + LOOK]
            for row in await self._find_free(page, min(demand, BREADTH + kept)):
                fitting[page[row["filter"] - 1]].append(row["id"])
                rows.append(row)
        if not rows:
            return False
        self._fit_foreign(fitting, rows)
        here = [ask for ask in present if ask in self.queue]
        chosen = match(sorted([*here, *self.foreign], key=lambda ask: ask.arrived), fitting, time.monotonic())
        groups = list(chosen.items())
        for first in range(0, len(groups), GROUPS):  # some may have left while others were served
            await self._take({ask: users for ask, users in groups[first : first + GROUPS] if ask in self.queue})
        return bool(chosen)

    async def _find_free(self, wishes: list[Wish], most: int) -> list[asyncpg.Record]:
        began = time.monotonic()
        rows = await self.hot.fetch(SQL["find_free"], *columns(wishes, Wish), self.rarity.of(wishes), most)
        self.rarity.learn(wishes, time.monotonic() - began)
        return rows

    def _fit_foreign(self, fitting: dict[Wish, list[uuid.UUID]], rows: list[asyncpg.Record]) -> None:
        users = {row["id"]: (row, msgspec.json.decode(row["labels"])) for row in rows} if self.foreign else {}
        for wish in {wish for ask in self.foreign for wish in ask.wishes} - fitting.keys():
            fitting[wish] = [id for id, (row, labels) in users.items() if wish.fits(row, labels)]

    async def _take(self, chosen: dict[Ask, list[uuid.UUID]]) -> None:
        if not chosen:
            return
        for ask, users in chosen.items():
            ask.lock_ids = [new_id() for _ in users]
        self._taking = set(chosen)
        try:
            self.events.batched("acquire_users", len(chosen))
            rows = {row["lock_id"]: row for row in await self.hot.fetch(SQL["acquire_users"], *_groups(chosen))}
            tell_granted(self.events, rows.values(), {id: ask for ask in chosen for id in ask.lock_ids}, by_desk=True)
            for ask in chosen:
                if ask.lock_ids[0] in rows:
                    self._answer(ask, [rows[id] for id in ask.lock_ids])
            await self._find_repeats([ask for ask in chosen if ask in self.queue])
        except Busy:
            raise
        except DATABASE_FAULTS:
            lost = [ask for ask in chosen if ask.key is None and not ask.answer.done()]
            self.unanswered.add(id for ask in lost for id in ask.lock_ids)
            raise
        finally:
            self._taking = set()
            self._dismiss(chosen)

    def _dismiss(self, chosen: Iterable[Ask]) -> None:
        """Those who wanted to go, or have to, and had to wait for the outcome."""
        for ask in [ask for ask in chosen if ask in self.queue]:
            if self._closed:
                self._refuse(ask, ShuttingDown())
            elif ask.leaving:
                self._answer(ask, [])

    async def _find_repeats(self, asks: list[Ask]) -> None:
        """Idempotency keys that another call has bound meanwhile: the handler finds their locks."""
        keyed = [ask for ask in asks if ask.key]
        if keyed:
            bound = await find_keyed(self.hot, [cast("uuid.UUID", ask.key) for ask in keyed])
            for ask, rows in zip(keyed, bound, strict=True):
                if rows and ask in self.queue:
                    self._answer(ask, [])

    async def _find_deleted(self) -> None:
        """Users that somebody waits for and that are gone: the handler says so."""
        asked = [(ask, ask.wishes[0].user_id) for ask in self.queue if ask.wishes[0].user_id]
        if asked:
            rows = await self.hot.fetch(SQL["list_existing"], list({user_id for _, user_id in asked}))
            existing = {row["id"] for row in rows}
            for ask in [ask for ask, user_id in asked if user_id not in existing]:
                self._answer(ask, [])

    async def _exchange(self, now: float) -> None:
        """Tell the other replicas who has waited here for long, and learn it of them."""
        queue = self._long_waiting(now)
        rows = await self.hot.fetch(
            SQL["exchange_waiting"], self.replica, msgspec.json.encode(queue).decode() if queue else None
        )
        now = time.monotonic()
        self.foreign = [
            Ask(wishes=told.wishes, home=told.home, arrived=now - row["age"] - told.age + HEAD_START, foreign=True)
            for row in rows
            for told in msgspec.json.decode(row["queue"], type=list[Told])
        ]
        self._foreign_projects = {pool.project_id for ask in self.foreign for pool in ask.pools()}
        if any(ask.wait for ask in self.queue):
            self._tell("waiting")
        self._exchanges_at = now + jittered(EXCHANGE if self.queue or rows else 2 * EXCHANGE)

    def _long_waiting(self, now: float) -> list[Told]:
        """The longest waiting for each distinct list of wishes, as the others need it."""
        heads: dict[tuple[Wish, ...], Ask] = {}
        wanted = min(len(self._kinds), 100)
        for ask in self.queue:
            if ask.wait and now - ask.arrived > HEAD_START / 2:
                heads.setdefault(tuple(ask.wishes), ask)
            if len(heads) == wanted:
                break
        for ask in heads.values():
            ask.told = True
        return [Told(now - ask.arrived, ask.wishes, ask.home) for ask in heads.values()]


def _take_out(counter: Counter[Any], item: Any) -> None:
    """One less of an item; the last one leaves no trace."""
    counter[item] -= 1
    if not counter[item]:
        del counter[item]


def _groups(chosen: dict[Ask, list[uuid.UUID]]) -> list[list[Any]]:
    """As acquire_users.sql takes them."""
    rows = [
        (number, user, lock_id, ask.holder, ask.ttl, ask.key, ask.client, wish.domain, wish.labels)
        for number, (ask, users) in enumerate(chosen.items())
        for user, lock_id, wish in zip(users, ask.lock_ids, ask.wishes, strict=True)
    ]
    return [list(column) for column in zip(*rows, strict=True)]


async def listen(desk: Desk, url: str) -> None:
    """Hear what other replicas tell (for ever). A connection that died without a word is noticed by its heartbeat."""
    while True:
        try:
            connection = await asyncpg.connect(url, timeout=5)
            try:
                await connection.add_listener("botfarm", lambda *news: desk.hear(news[-1]))
                while True:
                    await asyncio.sleep(jittered(5))
                    await connection.fetchval("select 1", timeout=3)
            finally:
                connection.terminate()
        except (asyncpg.PostgresError, *DATABASE_FAULTS) as fault:
            desk.events.database_failed("No news of other replicas, polls go on", fault)
        await asyncio.sleep(jittered(5))
