"""Waiting: who gets whom when calls wait.

An acquiring call is an `Ask`: a list of wishes, all or none. One that finds nobody free, or before which others wait,
takes a place at the `Desk`. There is one desk a replica. It looks for free users five times a second, and whenever it
hears that some may have come free; `match` decides who gets whom, and sql/acquire_users.sql hands them out. A call
that has no time to wait stays for one look.

Desks tell each other who has waited for long, so that nobody starves behind a busier replica. To the others such a
call is `foreign`: it is matched like their own, and so keeps its place, but is served where it waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, cast

import asyncpg
import msgspec
from msgspec import Struct

from farm.addresses import SchemaError, connect
from farm.database import DATABASE_FAULTS, NO_CONNECTION, SQL, Busy, Connections, column, columns, new_id
from farm.problems import Overloaded, ShuttingDown
from farm.settings import jittered, log
from farm.telemetry import NOWHERE, Cause, Events
from farm.words import Wish, Wishes

POLL = 0.2  # seconds between two looks while somebody waits
EXCHANGE = 0.5  # seconds between two exchanges with the other replicas
GOSSIP = 2  # seconds that such an exchange may take: calls that have no time wait for it, and then for their own look
BEAT = 5  # seconds between two heartbeats of the connection that hears of other replicas
HEAD_START = 0.5  # seconds by which one who waits here may overtake one who waits at another replica
PATIENCE = 3.0  # seconds after which a waiting set goes before those who came later
LOOK = 500  # distinct wishes that one look serves
GROUPS = 200  # calls that one statement serves: it compares each with each
CROWD = 20_000  # calls that may wait; each holds 24 KB and a connection
SLOW = 0.005  # seconds from which a look is worth knowing how many users have the labels that are wished for
BREADTH = 200  # free users that one look lists for a wish; at least as many as a set may have


class Ask(Struct, eq=False, kw_only=True):
    """One acquiring call: a user for each of its wishes, all or none. A set has more than one."""

    wishes: Wishes
    holder: str = ""
    note: str = ""
    ttl: int = 0
    wait: int = 0
    cause: Cause = NOWHERE
    key: uuid.UUID | None = None  # the idempotency key as it is stored
    sent_key: uuid.UUID | None = None  # and as it was sent
    client: uuid.UUID | None = None  # whose the lock will be; null: authentication is off
    prefers_session: bool = False  # a user that is logged in already; who waits gets whoever comes free
    home: Wish | None = None  # the pool of the very user that is wished for, where that is known
    foreign: bool = False  # waits at another replica, and only holds its place here
    arrived: float = msgspec.field(default_factory=time.monotonic)
    lock_ids: list[uuid.UUID] = []  # of the statement that serves it now, or did so last
    answer: Any = None  # the future of its rows, once it has a place at the desk
    leaving: bool = False  # it has no time left, or is not answered any more; a grant that is on its way comes
    told: bool = False  # the other replicas know of it

    def pools(self) -> frozenset[Wish]:
        """Where it looks for users."""
        return frozenset(self.home or Wish(None, wish.project_id, wish.env, wish.domain) for wish in self.wishes)

    def seconds(self) -> float:
        """Since it came, in microseconds and cheaper than by round()."""
        return int((time.monotonic() - self.arrived) * 1e6) / 1e6


async def find_keyed(hot: Connections, keys: list[uuid.UUID]) -> list[list[asyncpg.Record]]:
    """What each idempotency key has bound: nothing, or a row for each lock, in the order they were asked for."""
    bound: dict[uuid.UUID, list[asyncpg.Record]] = {key: [] for key in keys}
    for row in await hot.fetch(SQL["get_keyed_locks"], list(bound)):
        bound[row["key"]].append(row)
    return [bound[key] for key in keys]


def fitting_of(wishes: list[Wish], rows: Iterable[asyncpg.Record]) -> dict[Wish, list[uuid.UUID]]:
    """The users that a statement has found for wishes; nothing for a wish that nobody fits."""
    fitting: defaultdict[Wish, list[uuid.UUID]] = defaultdict(list)
    for row in rows:
        fitting[wishes[row["filter"] - 1]].append(row["id"])
    return fitting


# ---- Who gets whom -----------------------------------------------------------------------------------------
# A bipartite matching of wishes and free users, in the order of arrival. To give each the first user that is left
# would not do: a set that asks for anybody and for an admin needs the only admin for its second wish.

Place = tuple[Ask, int]  # a call, and which of its wishes
Fitting = Mapping[Wish, Sequence[uuid.UUID]]  # the free users for each wish


class Seats:
    """Which user is for whom, as far as it is decided. A place that has a user keeps one, but maybe another one."""

    def __init__(self, fitting: Fitting) -> None:
        self.fitting = fitting
        self.taken: dict[uuid.UUID, Place] = {}
        # What a search finds out, later ones need not: else each of thousands who wait for the same would.
        self._full: set[uuid.UUID] = set()  # users from whom no way leads to a free one
        self._hopeless: set[Wish] = set()  # wishes that nobody is left for
        self._vain: set[Wishes] = set()  # sets that too few are left for

    def seat_each(self, ask: Ask) -> bool:
        """Users for as many of its wishes as can have one; whether all have."""
        found = [self._find(ask, number) for number in range(len(ask.wishes))]
        return all(found)

    def seat_whole(self, ask: Ask) -> bool:
        """Users for all wishes of a set, or for none."""
        if ask.wishes in self._vain:
            return False
        before = dict(self.taken)
        if all(self._find(ask, number, keeps=False) for number in range(len(ask.wishes))):
            return True
        self.taken = before
        self._vain.add(ask.wishes)
        return False

    def _find(self, ask: Ask, number: int, keeps: bool = True) -> bool:
        """A user for one place, where need be by moving others (augmenting paths, Kuhn 1955)."""
        if ask.wishes[number] in self._hopeless:
            return False
        came: dict[uuid.UUID, uuid.UUID | None] = {}
        frontier: deque[tuple[uuid.UUID | None, Place]] = deque([(None, (ask, number))])
        while frontier:
            previous, place = frontier.popleft()
            for user in self.fitting.get(place[0].wishes[place[1]], ()):
                if user in came or user in self._full:
                    continue
                came[user] = previous
                if user not in self.taken:
                    self._move(user, came, (ask, number))
                    return True
                frontier.append((user, self.taken[user]))
        if keeps:
            self._full |= came.keys()
            self._hopeless.add(ask.wishes[number])
        return False

    def _move(self, user: uuid.UUID, came: dict[uuid.UUID, uuid.UUID | None], place: Place) -> None:
        while (previous := came[user]) is not None:
            self.taken[user] = self.taken[previous]
            user = previous
        self.taken[user] = place


def match(asks: Iterable[Ask], fitting: Fitting, now: float) -> dict[Ask, list[uuid.UUID]]:
    """Who gets whom: first come first served, all or none; nobody waits behind one whom nothing fits.

    A set that is not complete leaves its users to those behind it, until it has waited for PATIENCE; then they
    are kept for it, so that it does not starve behind single acquires.
    """
    seats, complete = Seats(fitting), []
    for ask in asks:
        keeps = len(ask.wishes) == 1 or now - ask.arrived >= PATIENCE
        if seats.seat_each(ask) if keeps else seats.seat_whole(ask):
            complete.append(ask)
    users = {place: user for user, place in seats.taken.items()}
    return {ask: [users[ask, number] for number in range(len(ask.wishes))] for ask in complete if not ask.foreign}


# ---- What is remembered ------------------------------------------------------------------------------------


class Unanswered:
    """Locks that nobody was told of, and that somebody has to give back.

    They may have been granted by a statement whose reply was lost, and which may still be running, or be on its way: so
    each is looked for LOOKS times. There is none while the database does not answer, however long that lasts.
    """

    LOOKS = 30  # about one a second
    PAGE = 500  # locks that are looked for at once

    def __init__(self) -> None:
        self._looks: dict[uuid.UUID, int] = {}  # how many are left for each

    def add(self, lock_ids: Iterable[uuid.UUID]) -> None:
        self._looks |= dict.fromkeys(lock_ids, self.LOOKS)

    @contextlib.contextmanager
    def unless_answered(self, asks: Iterable[Ask]) -> Iterator[None]:
        """Around a statement that grants: where its outcome is not known, nobody will be told of its locks.

        Those of an idempotency key stay, because a repeat finds them.
        """
        try:
            yield
        except DATABASE_FAULTS as fault:
            if not isinstance(fault, Busy):  # then nothing was sent
                self.add(id for ask in asks if ask.key is None for id in ask.lock_ids)
            raise

    async def give_back(self, release: Callable[[uuid.UUID], Awaitable[bool]]) -> bool:
        """Release them; those that are not found are kept for the next time, and whether there are some is the answer.

        Two may run at once.
        """
        ids = list(self._looks)
        for first in range(0, len(ids), self.PAGE):
            page = ids[first : first + self.PAGE]
            for id, found in zip(page, await asyncio.gather(*map(release, page)), strict=True):
                left = self._looks.pop(id, 0) - 1
                if left > 0 and not found:
                    self._looks[id] = left
        return bool(self._looks)


# ---- The desk ----------------------------------------------------------------------------------------------


class Told(Struct):
    """One who waits, as the replicas tell each other: for how many seconds, and for what."""

    age: float
    wishes: Wishes
    home: Wish | None = None


def _users_wanted(kinds: Mapping[Wishes, int]) -> int:
    return sum(len(kind) * count for kind, count in kinds.items())


def _groups(chosen: dict[Ask, list[uuid.UUID]]) -> list[list[Any]]:
    """As acquire_users.sql takes them."""
    rows = [
        (number, user, lock_id, ask.holder, ask.ttl, ask.key, ask.client, wish.domain, wish.labels, ask.note)
        for number, (ask, users) in enumerate(chosen.items())
        for user, lock_id, wish in zip(users, ask.lock_ids, ask.wishes, strict=True)
    ]
    return [column(list(values)) for values in zip(*rows, strict=True)]


class Desk:
    """Those who wait at this replica, and what it knows of those who wait at others."""

    def __init__(
        self, hot: Connections, events: Events, unanswered: Unanswered, rare: MutableMapping[Wish, bool],
        count: Callable[[Wishes], asyncio.Future[Any]],
    ) -> None:  # fmt: skip
        self.hot = hot
        self.events = events
        self.unanswered = unanswered
        self.rare = rare  # where few users have the labels of a wish, a look begins with these
        self.count = count  # those who match a wish: what it finds it writes into `rare`
        self.replica = uuid.uuid4()
        self.queue: dict[Ask, None] = {}  # those who came first stand first
        self.foreign: list[Ask] = []
        self._foreign_projects: set[uuid.UUID | None] = set()
        # Counts of the queue, so that nobody walks over thousands who wait for the same: how many want what (their
        # kind), in which projects, and in which pools (without those who have no time to wait).
        self._kinds: Counter[Wishes] = Counter()
        self._projects: Counter[uuid.UUID | None] = Counter()
        self._pools: Counter[frozenset[Wish]] = Counter()
        self._taking: set[Ask] = set()  # a statement that serves them is running
        self._woken = asyncio.Event()
        self._news: asyncio.Queue[str] = asyncio.Queue(1)
        self._others_wait_until = 0.0
        self._polls_at = self._exchanges_at = 0.0
        self.stopping = asyncio.Event()

    # ---- For calls -----------------------------------------------------------------------------------------

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

    def longest_waits(self) -> dict[frozenset[Wish], float]:
        """Pools, and when who waits longest for users of any of them came, by the monotonic clock."""
        came: dict[frozenset[Wish], float] = {}
        for ask in self.queue:
            if len(came) == len(self._pools):
                break
            if ask.wait:
                came.setdefault(ask.pools(), ask.arrived)
        return came

    def crowd(self) -> list[tuple[list[Wish], int]]:
        """Who waits here: pools, and how many calls wait for users of any of them."""
        return [(list(pools), count) for pools, count in self._pools.items()]

    def join(self, ask: Ask) -> None:
        """Take a place in the queue; `ask.answer` will be its rows, none for one that has no time to wait."""
        ask.answer = asyncio.get_running_loop().create_future()
        if self.stopping.is_set() or len(self.queue) >= CROWD:
            crowd = f"{CROWD} calls wait for users here already; try again in a moment."
            ask.answer.set_exception(ShuttingDown() if self.stopping.is_set() else Overloaded(crowd))
            return
        if ask.wait and not self._pools:
            self._tell("waiting")
        self.queue[ask] = None
        self._count(ask, 1)
        self._woken.set()

    def _count(self, ask: Ask, change: int) -> None:
        pools = ask.pools()
        counts: list[tuple[Counter[Any], Any]] = [(self._kinds, ask.wishes)]
        counts += [(self._projects, pool.project_id) for pool in pools]
        counts += [(self._pools, pools)] if ask.wait else []
        for counter, item in counts:
            counter[item] += change
            if not counter[item]:
                del counter[item]

    def turn_away(self, ask: Ask) -> None:
        """Answer it with no rows. A grant that is on its way counts, where somebody still reads the answer."""
        ask.leaving = True
        if ask not in self._taking:
            self._answer(ask, [])

    def _answer(self, ask: Ask, rows: list[asyncpg.Record], refusal: Exception | None = None) -> None:
        """By rows, or by why there are none. The first answer counts."""
        if ask in self.queue:
            del self.queue[ask]
            self._count(ask, -1)
            if ask.told:  # they need not keep a place for it any more
                self._exchanges_at = 0
                self._woken.set()
        if ask.answer.done():
            return
        if refusal:
            ask.answer.set_exception(refusal)
        else:
            ask.answer.set_result(rows)

    def close(self) -> None:
        """Answer everybody: the service stops. Grants that are on their way are still told, and there are no more."""
        self.stopping.set()
        for ask in [ask for ask in self.queue if ask not in self._taking]:
            self._answer(ask, [], ShuttingDown())

    # ---- News of users that may have come free -------------------------------------------------------------

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
        if what == "waiting":  # told anew with each exchange
            self._others_wait_until = time.monotonic() + 4 * EXCHANGE
        self._woken.set()

    async def announce(self) -> None:
        """Send news, at most every 10 ms, in a statement of its own (for ever)."""
        while True:
            news = await self._news.get()
            with contextlib.suppress(asyncpg.PostgresError, *DATABASE_FAULTS):  # the others look by themselves
                await self.hot.execute(SQL["notify"], news)
            await asyncio.sleep(0.01)

    # ---- Looks ---------------------------------------------------------------------------------------------

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
                    self._answer(ask, [], fault)
                await asyncio.sleep(POLL)

    async def _rest(self) -> None:
        due = min(self._polls_at, self._exchanges_at) if self.queue else self._exchanges_at
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(due - time.monotonic(), 0)):
                await self._woken.wait()
        self._woken.clear()

    async def _look(self) -> None:
        began = time.monotonic()
        if began >= self._exchanges_at:
            with contextlib.suppress(*DATABASE_FAULTS):  # what the others told last still counts
                async with asyncio.timeout(GOSSIP):
                    await self._exchange()
                    await self._find_deleted()
        if not self.queue:
            return
        hasty = [ask for ask in self.queue if not ask.wait]
        is_poll = began >= self._polls_at
        if is_poll:
            await self._find_repeats(list(self.queue))
        for _ in range(20):
            if not await self._serve():
                break
        if self.foreign and any(ask in self.queue for ask in hasty):
            await self._exchange()  # who waited elsewhere may have been served meanwhile
            await self._serve()
        for ask in hasty:
            self._answer(ask, [])
        if is_poll:  # more seldom where a look takes long
            ended = time.monotonic()
            self._polls_at = ended + max(jittered(POLL), 5 * (ended - began))

    async def _serve(self) -> bool:
        """Hand out what is free. False when there was nothing to hand out.

        The calls themselves are looked at only when somebody is free: thousands may wait for the same.
        """
        elsewhere = Counter(ask.wishes for ask in self.foreign)
        kinds = self._kinds + elsewhere
        # What sets and those who wait elsewhere keep must not hide the free users behind it.
        sets = {kind: count for kind, count in self._kinds.items() if len(kind) > 1}
        most = min(_users_wanted(kinds), BREADTH + _users_wanted(elsewhere) + _users_wanted(sets))
        fitting = await self._find_free(list(dict.fromkeys(wish for kind in kinds for wish in kind)), most)
        if not fitting:
            return False
        asks = sorted([*self.queue, *self.foreign], key=lambda ask: ask.arrived)
        groups = list(match(asks, fitting, time.monotonic()).items())
        for first in range(0, len(groups), GROUPS):  # some may have left while others were served
            await self._take({ask: users for ask, users in groups[first : first + GROUPS] if ask in self.queue})
        return bool(groups)

    async def _find_free(self, wishes: list[Wish], most: int) -> Fitting:
        """Users that are free, so many at the most for each wish."""
        fitting: dict[Wish, list[uuid.UUID]] = {}
        for first in range(0, len(wishes), LOOK):
            page = wishes[first : first + LOOK]
            began, rare = time.monotonic(), [self.rare.get(wish, False) for wish in page]
            rows = await self.hot.fetch(SQL["find_free"], *columns(page, Wish), rare, most)
            if time.monotonic() - began > SLOW:
                self._mark(wish for wish in page if wish.labels and wish not in self.rare)
            fitting |= fitting_of(page, rows)
        return fitting

    def _mark(self, wishes: Iterable[Wish]) -> None:
        """Find out which of them are rare: one in 100,000 users made each look of its project take 170 ms."""
        for wish in wishes:
            self.rare[wish] = False  # until it is counted, and not again with each look, which costs less
            with contextlib.suppress(Busy):
                self.count((wish,)).add_done_callback(asyncio.Future.exception)

    async def _take(self, chosen: dict[Ask, list[uuid.UUID]]) -> None:
        if not chosen:
            return
        self._taking = set(chosen)
        try:
            for ask, granted in (await self.hand_out(chosen)).items():
                self._answer(ask, granted)
            await self._find_repeats([ask for ask in chosen if ask in self.queue])
        except DATABASE_FAULTS as fault:
            for ask in [ask for ask in chosen if ask.leaving]:  # it has waited long enough to ask for nothing more
                self._answer(ask, [], fault)
            raise
        finally:
            self._taking = set()
            self._dismiss(chosen)

    async def hand_out(self, chosen: dict[Ask, list[uuid.UUID]]) -> dict[Ask, list[asyncpg.Record]]:
        """The rows of those who got the users that were chosen for them."""
        for ask, users in chosen.items():
            ask.lock_ids = [new_id() for _ in users]
        self.events.batched("acquire_users", len(chosen))
        with self.unanswered.unless_answered(chosen):
            rows = {row["lock_id"]: row for row in await self.hot.fetch(SQL["acquire_users"], *_groups(chosen))}
        asked = {id: ask for ask in chosen for id in ask.lock_ids}
        granted: dict[Ask, list[asyncpg.Record]] = {}
        for id, ask in asked.items():
            if row := rows.get(id):
                self.events.acquired(row, ask.cause, ask.seconds(), waited=ask in self.queue and ask.wait > 0)
                granted.setdefault(ask, []).append(row)
        return granted

    def _dismiss(self, chosen: Iterable[Ask]) -> None:
        """Those who wanted to go, or have to, and had to wait for the outcome."""
        for ask in chosen:
            if self.stopping.is_set():
                self._answer(ask, [], ShuttingDown())
            elif ask.leaving:
                self._answer(ask, [])

    async def _find_repeats(self, asks: list[Ask]) -> None:
        """Idempotency keys that another call has bound meanwhile: the handler finds their locks."""
        keyed = [ask for ask in asks if ask.key]
        if keyed:
            bound = await find_keyed(self.hot, [cast("uuid.UUID", ask.key) for ask in keyed])
            for ask, rows in zip(keyed, bound, strict=True):
                if rows:
                    self._answer(ask, [])

    async def _find_deleted(self) -> None:
        """Users that somebody waits for and that are gone: the handler says so."""
        asked = {ask: ask.wishes[0].user_id for ask in self.queue if ask.wishes[0].user_id}
        if asked:
            existing = {row["id"] for row in await self.hot.fetch(SQL["list_existing"], list(set(asked.values())))}
            for ask in [ask for ask, user_id in asked.items() if user_id not in existing]:
                self._answer(ask, [])

    # ---- Other replicas ------------------------------------------------------------------------------------

    async def _exchange(self) -> None:
        """Tell the other replicas who has waited here for long, and learn it of them."""
        now = time.monotonic()
        self._exchanges_at = now + jittered(EXCHANGE)
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
        if self._pools:
            self._tell("waiting")

    def _long_waiting(self, now: float) -> list[Told]:
        """The longest waiting of each kind, as the others need it."""
        heads: dict[Wishes, Ask] = {}
        wanted = min(len(self._kinds), 100)
        for ask in self.queue:
            if ask.wait and now - ask.arrived > HEAD_START / 2:
                heads.setdefault(ask.wishes, ask)
            if len(heads) == wanted:  # long before the end, where thousands wait for the same
                break
        for ask in heads.values():
            ask.told = True
        return [Told(now - ask.arrived, ask.wishes, ask.home) for ask in heads.values()]


async def listen(desk: Desk, url: str) -> None:
    """Hear what other replicas tell (for ever). A connection that died without a word is noticed by its heartbeat."""
    while True:
        try:
            connection = await connect(url, "BOTFARM_LISTEN_URL")
            try:
                await connection.add_listener("botfarm", lambda *news: desk.hear(news[-1]))
                while await connection.fetchval(SQL["can_write"], timeout=3):
                    await asyncio.sleep(jittered(BEAT))
            finally:
                connection.terminate()
        except (SchemaError, UnicodeError, *NO_CONNECTION) as fault:  # the second: a host that is none
            desk.events.database_failed("No news of other replicas, polls go on", fault)
        await asyncio.sleep(jittered(BEAT))
