"""The pytest plugin: `bot` for a test, with its `bot_session`, `worker_bot` for a worker, `bots` for more, and
`bot_filter` to be overridden.

What a run borrows has one holder. Fixtures give back what they took; what is left when all workers are gone, of one
that crashed say, the controller gives back in one call; and what nobody is left to give back ends by its short ttl.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import uuid
from typing import Any, Generator, Iterator, Sequence

import pytest

from botfarm_client.errors import BotfarmError, LockLost, Misconfigured, NoneFree
from botfarm_client.farm import TTL, WAIT, Farm, Lock

SETTINGS = {
    "url": "URL of BotFarm; else BOTFARM_URL",
    "project": "UUID of the project whose users are borrowed",
    "env": "their env",
    "ttl": f"seconds that a lock lasts unless it is renewed ({TTL})",
    "wait": f"seconds to wait for a user to come free ({WAIT})",
    "holder": "who asks; else BOTFARM_HOLDER, else pytest/ and the id of the run",
}
FILTERS = ("project_id", "env", "domain", "labels", "user_id", "ttl", "wait", "note", "prefer")
MARKER = "bot(labels=…, env=…): what the user of the fixture bot has to be; also project_id, domain, user_id, ttl, wait"
PROPERTY = "botfarm_login"
ALARM: signal.Signals | None = getattr(signal, "SIGUSR2", None)  # what the main thread is told of a lost lock by


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("botfarm", "test accounts from BotFarm")
    for name, text in SETTINGS.items():
        group.addoption(f"--botfarm-{name}", help=text)
        parser.addini(f"botfarm_{name}", text)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)
    config.pluginmanager.register(Borrowed(config), "botfarm-borrowed")


class Borrowed:
    """What this process has borrowed, and what becomes of it."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._worker: dict[str, Any] | None = getattr(config, "workerinput", None)  # of xdist
        self._run: str = self._worker["testrunuid"] if self._worker else _name_run(config)
        self._farm: Farm | None = None
        self._pid, self._parent = os.getpid(), os.getppid()
        self._borrows = False  # whether this run, with its workers, may have borrowed anything
        self._watched: pytest.Item | None = None  # a test that can be cut short now
        self._failed = False  # whether the test that runs has failed for a lost lock already
        self._outcome: str | None = None  # of the test that runs; none of one that is skipped, or stopped from outside
        self._mine: list[Lock] = []  # of the test that runs
        self._before: dict[str, set[str]] = {}  # test -> users of its runs before
        self._told: set[str] = set()  # ids of lost locks that a test has failed for
        self.worker_bot: Lock | None = None

    def setting(self, name: str) -> str | None:
        variable = {"url": "BOTFARM_URL", "holder": "BOTFARM_HOLDER"}.get(name, "")
        given = self._config.getoption(f"botfarm_{name}") or os.environ.get(variable)
        return given or self._config.getini(f"botfarm_{name}") or None

    @property
    def farm(self) -> Farm:
        if self._farm is None:
            url = self.setting("url")
            if not url:
                raise Misconfigured("no BotFarm is named: set BOTFARM_URL, --botfarm-url, or the ini key botfarm_url")
            self._farm = Farm(url, holder=self.setting("holder") or f"pytest/{self._run}")
        return self._farm

    # ---- Borrowing

    def wish(self, *wishes: dict[str, Any]) -> dict[str, Any]:
        """Filters and terms as `Farm.acquire` takes them. A later wish counts before an earlier one; labels add up."""
        whole: dict[str, Any] = {"project_id": self.setting("project"), "env": self.setting("env")}
        whole.update(ttl=self._number("ttl", TTL), wait=self._number("wait", WAIT))
        for wish in wishes:
            _check(wish, FILTERS)
            labels = {**(whole.get("labels") or {}), **(wish.get("labels") or {})}
            whole.update(wish, labels=labels or None)
        if whole.get("user_id"):
            whole.update(project_id=None, env=None, domain=None, labels=None, prefer=None)
        return whole

    def _number(self, name: str, default: int) -> int:
        given = self.setting(name) or str(default)
        if not given.isdigit():
            raise Misconfigured(f"botfarm_{name} is {given!r}: it has to be a number of seconds")
        return int(given)

    def take(self, item: pytest.Item | None, *wishes: dict[str, Any]) -> Lock:
        """One user. For a test that runs again it is another one than before, where there is one."""
        with self.plainly():
            wish = self.wish(*wishes)
            if not (wish["project_id"] or wish.get("user_id")):
                raise Misconfigured("no project is named: set --botfarm-project, or the ini key botfarm_project")
            lock = self.farm.acquire(**wish, heartbeat=False)
            worn: list[Lock] = []
            with contextlib.suppress(NoneFree):
                while item and lock.user_id in self._before.get(item.nodeid, ()):
                    worn.append(lock)
                    lock = self.farm.acquire(**{**wish, "wait": 0}, heartbeat=False)
            for other in worn:
                if other is not lock:
                    other.release()
        return self._keep(item, lock)

    def take_set(self, item: pytest.Item, base: dict[str, Any], wishes: Sequence[dict[str, Any]]) -> list[Lock]:
        with self.plainly():
            users = []
            for wish in wishes:
                _check(wish, (*FILTERS[:4], "count"))
                count = wish.get("count", 1)
                whole = self.wish(base, {name: value for name, value in wish.items() if name != "count"})
                users.append({**{name: whole[name] for name in FILTERS[:4] if whole.get(name)}, "count": count})
            whole = self.wish(base)
            terms: dict[str, Any] = {name: whole.get(name) for name in ("ttl", "wait", "note")}
            locks = self.farm.acquire_set(users, **terms, heartbeat=False)
        return [self._keep(item, lock) for lock in locks]

    def _keep(self, item: pytest.Item | None, lock: Lock) -> Lock:
        lock.keep(self._alarm, self._goes_on)
        if item:
            self._mine.append(lock)
            item.user_properties.append((PROPERTY, lock.name))
        return lock

    def _goes_on(self) -> bool:
        """In the heartbeat. xdist ends a worker that is left alone by SIGINT, which behind `&` is ignored.

        A process that a worker forks for a test (pytest-forked) has the worker for its parent.
        """
        return not self._worker or os.getppid() in (self._parent, self._pid)

    @contextlib.contextmanager
    def plainly(self) -> Iterator[None]:
        """What BotFarm refuses is told in its own words, without a traceback of ours."""
        self._borrows = True
        try:
            yield
        except BotfarmError as fault:
            raise pytest.fail.Exception(f"botfarm: {fault}", pytrace=False) from None

    def give_back(self, item: pytest.Item) -> None:
        locks, self._mine = self._mine, []
        for lock in locks:
            with contextlib.suppress(BotfarmError):  # then it ends by its ttl
                lock.release(outcome=self._outcome)
            self._before.setdefault(item.nodeid, set()).add(lock.user_id)
        self._fail_for(locks)

    def take_for_worker(self, *wishes: dict[str, Any]) -> Iterator[Lock]:
        lock = self.worker_bot = self.take(None, *wishes)
        yield lock
        self.worker_bot = None
        with contextlib.suppress(BotfarmError):
            lock.release()
        if lock.id not in self._told:
            self._failed = False
            self._fail_for([lock])

    # ---- A lock that is lost

    def _alarm(self, lock: Lock) -> None:
        """In the heartbeat: tell the main thread, unless somebody else listens to that signal."""
        if ALARM is not None and signal.getsignal(ALARM) == self._alarmed:
            signal.pthread_kill(threading.main_thread().ident or 0, ALARM)

    def _alarmed(self, number: int, frame: Any) -> None:
        __tracebackhide__ = True
        if self._watched:
            self._fail_for(self._used_by(self._watched), here=True)

    def _used_by(self, item: pytest.Item) -> list[Lock]:
        shared = self.worker_bot if "worker_bot" in getattr(item, "fixturenames", ()) else None
        return [*self._mine, *([shared] if shared else [])]

    def _fail_for(self, locks: list[Lock], here: bool = False) -> None:
        """Once for each run of a test. `here`: the traceback shows where it was cut short."""
        __tracebackhide__ = True
        lost = [lock for lock in locks if lock.lost]
        if lost and not self._failed:
            self._watched, self._failed = None, True
            self._told.update(lock.id for lock in lost)
            pytest.fail("botfarm: " + "; ".join(str(lock.lost) for lock in lost), pytrace=here)

    @contextlib.contextmanager
    def _watching(self, item: pytest.Item) -> Iterator[None]:
        """The innermost of all that is around a test's set-up and its call, so that what is raised here is its failure.

        Where the signal is taken, a lost lock is found out at the end of either, or where the test asks for the login.
        """
        self._fail_for(self._used_by(item))
        self._watched = item if threading.current_thread() is threading.main_thread() else None
        try:
            yield
        except LockLost:
            self._failed = True
            raise
        finally:
            self._watched = None
        self._failed = False  # else what failed it was caught on its way here, by the test or by an event loop
        self._fail_for(self._used_by(item))

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        self._failed, self._outcome = False, None
        item.user_properties[:] = [known for known in item.user_properties if known[0] != PROPERTY]
        try:
            with self._watching(item):
                return (yield)
        finally:
            if self.worker_bot in self._used_by(item):
                item.user_properties.append((PROPERTY, self.worker_bot.name))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Before the fixtures end, so that the users of a test are given back with what became of it."""
        report = yield
        if report.failed or (report.passed and report.when == "call"):
            self._outcome = report.outcome
        return report

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        with self._watching(item):
            return (yield)

    # ---- The run

    def pytest_sessionstart(self) -> None:
        if self.setting("url") and threading.current_thread() is threading.main_thread():
            for number, handler in ((signal.SIGTERM, self._terminated), (ALARM, self._alarmed)):
                if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                    signal.signal(number, handler)

    def _terminated(self, number: int, frame: Any) -> None:
        """As for Ctrl-C: fixtures end, and the run's users are given back. The next one is the end."""
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != self._pid:  # a process that a test has forked
            os.kill(os.getpid(), number)
            return
        pytest.exit("terminated", returncode=128 + number)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The login in a failure's header line. Last of all: who prints a line for each test is done with its place."""
        logins = list(dict.fromkeys(str(value) for name, value in report.user_properties if name == PROPERTY))
        if logins:
            self._borrows = True
            file, line, domain = report.location
            if report.failed and not self._worker:
                report.location = (file, line, f"{domain} as {', '.join(logins)}")

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object, error: object) -> None:
        self._borrows = self._borrows or bool(error)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, exitstatus: int) -> Generator[None, object, object]:
        """After all others, so after all workers: give back what is left, in one call."""
        try:
            return (yield)
        finally:
            cut_short = exitstatus not in (0, 1, 5)  # then workers may not have told what they did
            if not self._worker and self.setting("url") and (self._borrows or cut_short):
                try:
                    self.farm.release_holder(self.farm.holder)
                except BotfarmError as fault:
                    print(f"botfarm: what {self.farm.holder} has ends by its ttl: {fault}", file=sys.stderr)
            if signal.getsignal(signal.SIGTERM) == self._terminated:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _check(wish: dict[str, Any], known: Sequence[str]) -> None:
    """One that is misspelt must not widen what is asked for. What is not looked at here the service checks."""
    if not isinstance(wish, dict):
        raise Misconfigured(f'a bot is asked for by {wish!r}: it has to be a dict as {{"env": "stage"}}')
    unknown = sorted(set(wish) - set(known))
    if unknown:
        raise Misconfigured(f"a bot has no {', '.join(unknown)}: it can be asked for by {', '.join(known)}")
    if not isinstance(wish.get("labels") or {}, dict):
        raise Misconfigured(f'labels of a bot are {wish["labels"]!r}: they have to be a dict as {{"role": "admin"}}')
    if not isinstance(wish.get("wait", 0), int):
        raise Misconfigured(f"wait of a bot is {wish['wait']!r}: it has to be a number of seconds")


def _name_run(config: pytest.Config) -> str:
    """xdist is given the name before it makes one, so that the controller knows it, too."""
    run = getattr(config.option, "testrunuid", None) or uuid.uuid4().hex
    if hasattr(config.option, "testrunuid"):
        config.option.testrunuid = run
    return run


# ---- Fixtures


class Bots:
    """More users: `bots(labels={"role": "admin"})` for one, `bots.set({"count": 2}, {…})` for all or none."""

    def __init__(self, borrowed: Borrowed, item: pytest.Item, base: dict[str, Any]) -> None:
        self._borrowed, self._item, self._base = borrowed, item, base

    def __call__(self, **wish: Any) -> Lock:
        return self._borrowed.take(self._item, self._base, wish)

    def set(self, *wishes: dict[str, Any]) -> list[Lock]:
        """Together. A wish has project_id, env, domain, labels and count; the locks come in the order asked."""
        return self._borrowed.take_set(self._item, self._base, wishes)


def _borrowed(request: pytest.FixtureRequest) -> Any:
    return request.config.pluginmanager.get_plugin("botfarm-borrowed")


@pytest.fixture(scope="session")
def bot_filter() -> dict[str, Any]:
    """What all users of these tests have to be: override it, as {"env": "stage", "labels": {…}}."""
    return {}


@pytest.fixture
def bots(request: pytest.FixtureRequest, bot_filter: dict[str, Any]) -> Iterator[Bots]:
    """More users for a test, given back at its end."""
    borrowed = _borrowed(request)
    yield Bots(borrowed, request.node, bot_filter)
    borrowed.give_back(request.node)


@pytest.fixture
def bot(request: pytest.FixtureRequest, bots: Bots, bot_filter: dict[str, Any]) -> Lock:
    """A user for this test alone, as the marker `bot` wants it: its login, password, labels. `bots` gives it back."""
    wishes: list[dict[str, Any]] = [{"prefer": "session"}] if "bot_session" in request.fixturenames else []
    for mark in reversed(list(request.node.iter_markers("bot"))):
        wishes += [dict.fromkeys(map(str, mark.args)), mark.kwargs]  # what has no name is refused
    return _borrowed(request).take(request.node, bot_filter, *wishes)


@pytest.fixture
def bot_session(request: pytest.FixtureRequest, bot: Lock) -> Any:
    """The session that is kept with `bot`; where there is none, a callable that keeps the one it is given.

    session = bot_session(log_in(bot)) if callable(bot_session) else bot_session
    """

    borrowed = _borrowed(request)

    def keep(session: Any, ttl: int | None = None) -> Any:
        with borrowed.plainly():
            bot.session.put(session, ttl)
        return session

    with borrowed.plainly():
        stored = bot.session.get()
    return keep if stored is None else stored


@pytest.fixture(scope="session")
def worker_bot(request: pytest.FixtureRequest, bot_filter: dict[str, Any]) -> Iterator[Lock]:
    """A user for all tests of this worker, for what is dear to set up."""
    yield from _borrowed(request).take_for_worker(bot_filter)
