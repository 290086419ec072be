"""`Farm` and `Lock`: acquiring, the heartbeat, giving back."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import uuid
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Iterator, TypeVar

from botfarm_client.errors import BotfarmError, LockLost, Misconfigured, Refused, Unreachable

if TYPE_CHECKING:
    from botfarm_client.wire import Wire

__tracebackhide__ = True  # by pytest: with -l it would show passwords and the client's secret
TTL, WAIT = 60, 300  # seconds
CALL = 10.0  # seconds for the reply to a call that does not wait
CODE = 135.0  # seconds for a one-time code: the longest period, 5 s, and the reply
PATIENCE = 30.0  # seconds for which an acquire asks a service that is away; fewer where it does not wait
THERE = 20.0  # seconds after which a call that is cut off, by a restart or a proxy's limit, had reached the service
T = TypeVar("T")

# The clock that runs on while the machine sleeps, as a lock's time does.
_CLOCK: int | None = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))


def clock() -> float:
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


def persist(attempt: Callable[[], T], patience: float) -> T:
    """Try until the service answers, for so many seconds after the first failure, or after the last that took THERE."""
    end = None
    while True:
        began = clock()
        try:
            return attempt()
        except Unreachable as fault:
            if end is None or clock() > began + THERE:
                end = clock() + patience
            left = end - clock()
            if left <= 0:
                raise
            time.sleep(min(fault.retry_after or 0.5, left))


class Farm:
    """A BotFarm service. What is not given is read from BOTFARM_URL, BOTFARM_CLIENT_ID and so on."""

    def __init__(
        self,
        url: str | None = None,
        *,
        client_id: str | None = None,
        client_secret: str | None = None,
        id_token: str | None = None,
        holder: str | None = None,
    ) -> None:
        self.url = (url or os.environ.get("BOTFARM_URL", "")).strip().rstrip("/")
        if not self.url:
            raise Misconfigured("no BotFarm is named: set BOTFARM_URL to its URL")
        self.holder = holder or os.environ.get("BOTFARM_HOLDER") or _whereabouts()
        given = {"client_id": client_id, "client_secret": client_secret, "id_token": id_token}
        self._credentials = {k: v or os.environ.get(f"BOTFARM_{k.upper()}", "") for k, v in given.items()}
        self._wire: Wire | None = None

    @property
    def wire(self) -> Wire:
        if self._wire is None:
            from botfarm_client.wire import Wire

            self._wire = Wire(self.url, self._credentials)
        return self._wire

    def acquire(
        self,
        project_id: str | None = None,
        env: str | None = None,
        domain: str | None = None,
        labels: dict[str, str] | None = None,
        *,
        user_id: str | None = None,
        ttl: int = TTL,
        wait: int = WAIT,
        holder: str | None = None,
        note: str | None = None,
        prefer: str | None = None,
        heartbeat: bool = True,
    ) -> Lock:
        """Lock a free user that fits, or the very user of `user_id`; wait up to `wait` seconds for it."""
        body = {"ttl": ttl, "wait": wait, "holder": holder or self.holder, "note": note, "prefer": prefer}
        if user_id:
            if project_id or env or domain or labels:
                raise Misconfigured("user_id names one user: it goes with no project_id, env, domain or labels")
            asked = Asked("PUT", f"/users/{user_id}/lock", body)
        else:
            filters = {"project_id": project_id, "env": env, "domain": domain, "labels": labels}
            asked = Asked("POST", "/locks", {**filters, **body})
        return self._grant(asked, heartbeat)[0]

    def acquire_set(
        self,
        users: list[dict[str, Any]],
        *,
        ttl: int = TTL,
        wait: int = WAIT,
        holder: str | None = None,
        note: str | None = None,
        heartbeat: bool = True,
    ) -> list[Lock]:
        """Lock several users together, all or none: [{"project_id": …, "labels": …, "count": 2}, …]."""
        body = {"users": users, "ttl": ttl, "wait": wait, "holder": holder or self.holder, "note": note}
        return self._grant(Asked("POST", "/locks/sets", body), heartbeat)

    @contextlib.contextmanager
    def user(self, *args: Any, **options: Any) -> Iterator[Lock]:
        """A user for the body of a `with`, as `acquire` takes it. A lock that was lost meanwhile is a LockLost."""
        lock = self.acquire(*args, **options)
        try:
            yield lock
        except BaseException:
            with contextlib.suppress(BotfarmError):
                lock.release()
            raise
        with contextlib.suppress(Unreachable):  # then it ends by its ttl
            if not lock.release():
                lock.check()

    def renew(self, lock_id: str, ttl: int | None = None, *, holder: str | None = None, note: str | None = None) -> Any:
        """The lock now ends `ttl` seconds from now; what is left out stays. Another holder: it is handed over."""
        terms = _given({"ttl": ttl, "holder": holder, "note": note})
        return persist(lambda: self.wire.call("PATCH", f"/locks/{lock_id}", terms), CALL)

    def release(
        self, lock_id: str, *, cooldown: int = 0, quarantine: str | None = None, outcome: str | None = None
    ) -> None:
        """Give a user back. LockLost where its lock had ended before.

        `outcome` is "passed", "failed", or "bad-login" where the account itself did not work.
        """
        from urllib.parse import urlencode

        query = urlencode(_given({"cooldown": cooldown or None, "quarantine": quarantine, "outcome": outcome}))
        tries: list[int] = []

        def attempt() -> None:
            tries.append(1)
            self.wire.call("DELETE", f"/locks/{lock_id}?{query}".rstrip("?"))

        try:
            persist(attempt, CALL)
        except LockLost as lost:
            if lost.ended_by != "released" or len(tries) == 1:
                raise  # else it was us, and the reply to that was lost

    def status(self, lock_id: str) -> Any:
        """The lock as the service has it. LockLost where it has ended."""
        return persist(lambda: self.wire.call("GET", f"/locks/{lock_id}"), CALL)

    def release_holder(self, holder: str, project_id: str | None = None) -> int:
        """Give everything back that the holder has; how many users that were."""
        from urllib.parse import urlencode

        query = urlencode(_given({"holder": holder, "project_id": project_id}), errors="surrogateescape")
        return persist(lambda: self.wire.call("DELETE", f"/locks?{query}"), CALL)["released"]

    def _grant(self, asked: Asked, heartbeat: bool) -> list[Lock]:
        """The locks, with most of their time before them.

        Their time may have begun when the request was sent. So what came late, because it waited or because a reply
        was lost on the way, is renewed before it is used; and where it has ended by then, it is asked for anew.
        """
        end = clock() + asked.wait
        while True:
            sent, asked, locks = clock(), asked.anew(), []
            try:
                reply = persist(partial(asked.send, self.wire, end), min(PATIENCE, asked.wait + 3))
                locks = [Lock(self, granted, sent, asked) for granted in reply.get("locks", [reply])]
                if clock() > sent + locks[0].ttl / 3:
                    for lock in locks:
                        lock.renew()
            except LockLost:
                for lock in locks:
                    with contextlib.suppress(BotfarmError):
                        lock.release()
                if clock() > end:
                    raise
                continue
            if heartbeat:
                for lock in locks:
                    lock.keep()
            return locks


class Asked:
    """One request for locks, under the key by which a repeat of it gets the same ones."""

    def __init__(self, method: str, path: str, body: dict[str, Any]) -> None:
        self.method, self.path, self.body = method, path, _given(body)
        self.wait: int = body["wait"]
        self.key = str(uuid.uuid4())

    def anew(self) -> Asked:
        return Asked(self.method, self.path, self.body)

    def send(self, wire: Wire, end: float) -> Any:
        left = min(self.wait, max(0, math.ceil(end - clock())))
        return wire.call(self.method, self.path, {**self.body, "wait": left}, self.key, left + CALL)


class Session:
    """What a test needs to be logged in already: any JSON of up to 256 KiB, kept with the user for its next holder.

    A deployment of hashes keeps none. There is never one there, nothing is stored, and a warning says so.
    """

    def __init__(self, lock: Lock) -> None:
        self._lock = lock

    def get(self) -> Any:
        """None where there is none."""
        return self._call("GET")

    def put(self, session: Any, ttl: int | None = None) -> None:
        """Worth something for `ttl` seconds; a day if left out."""
        self._call("PUT", "" if ttl is None else f"?ttl={ttl}", session)

    def delete(self) -> None:
        self._call("DELETE")

    def _call(self, method: str, query: str = "", session: Any = None) -> Any:
        try:
            return self._lock.call(method, f"/session{query}", session)
        except Refused as refused:
            if refused.slug == "not-sealed":
                warnings.warn(f"botfarm: no session is kept. {refused}", stacklevel=3)
            elif refused.slug != "no-session":
                raise
            return None


class Lock:
    """The right to use one user alone. `repr` shows no password, so that no traceback does.

    In a process that was forked meanwhile it is only to be looked at: the lock is its parent's.
    """

    def __init__(self, farm: Farm, granted: dict[str, Any], sent: float, asked: Asked) -> None:
        self.data, self.asked = granted, asked
        self.id: str = granted["id"]
        self.fence: int = granted["fence"]
        self.ttl: int = granted["ttl"]
        self.lost: LockLost | None = None
        self.session = Session(self)
        self._farm, self._pid = farm, os.getpid()
        self._deadline = sent + self.ttl
        self._over = threading.Event()  # nothing is renewed any more
        self._given_back = False
        self._on_lost: Callable[[Lock], Any] | None = None

    def __repr__(self) -> str:
        return f"<Lock {self.id} on {self.name}>"

    @property
    def name(self) -> str:
        """The login, also of a lock that was lost: for messages."""
        return self.data["user"]["login"]

    @property
    def login(self) -> str:
        self.check()
        return self.name

    @property
    def password(self) -> str | None:
        """None where the deployment stores only hashes."""
        self.check()
        return self.data["user"]["password"]

    @property
    def user_id(self) -> str:
        return self.data["user"]["id"]

    @property
    def labels(self) -> dict[str, str]:
        return self.data["user"]["labels"]

    def check(self) -> None:
        """LockLost if the lock has ended, as far as is known here."""
        if os.getpid() != self._pid:
            return
        if not self.lost and not self._over.is_set() and clock() >= self._deadline:
            self._lose(LockLost(f"it was not renewed within its {self.ttl} s"))
        if self.lost:
            raise self.lost

    def totp(self) -> str:
        """A one-time code, given to nobody else. After one it is a period until the next: 30 s with most systems."""
        return self.call("POST", "/totp", timeout=CODE)["code"]

    def call(self, method: str, path: str, body: Any = None, timeout: float = CALL) -> Any:
        """What belongs to the holder alone."""

        def attempt() -> Any:
            self.check()
            return self._farm.wire.call(method, f"/locks/{self.id}{path}", body, timeout=timeout)

        return persist(attempt, CALL)

    def renew(self, ttl: int | None = None, *, holder: str | None = None, note: str | None = None) -> None:
        """Once, by hand: the heartbeat does it anyway. Another holder: it is handed over."""
        persist(lambda: self._renew(ttl=ttl, holder=holder, note=note), CALL)

    def keep(self, on_lost: Callable[[Lock], Any] | None = None, wanted: Callable[[], bool] = lambda: True) -> None:
        """Renew it from now on, in a thread, every third of its ttl, if it is `wanted`. `on_lost` is called there."""
        self._on_lost, self._wanted = on_lost, wanted
        threading.Thread(target=self._beat, name=f"botfarm {self.id}", daemon=True).start()

    def release(self, *, cooldown: int = 0, quarantine: str | None = None, outcome: str | None = None) -> bool:
        """Give the user back, as `Farm.release` does; False where the lock had been lost before."""
        if os.getpid() != self._pid or self._given_back:
            return True
        if not self.lost:
            in_time = clock() < self._deadline
            self._over.set()
            try:
                self._farm.release(self.id, cooldown=cooldown, quarantine=quarantine, outcome=outcome)
            except LockLost as lost:
                if lost.ended_by != "expired" or not in_time:  # else it ended while a service was away that was told
                    self._lose(lost)
            self._given_back = not self.lost
        return not self.lost

    def _renew(self, timeout: float = CALL, **terms: Any) -> None:
        sent = clock()
        told = self._farm.wire.call("PATCH", f"/locks/{self.id}", _given(terms), timeout=timeout)
        self.data = {**self.data, **{name: told[name] for name in ("ttl", "expires_at", "holder", "note")}}
        self.ttl = told["ttl"]
        self._deadline = sent + self.ttl

    def _beat(self) -> None:
        """Look at the clock each second: a wait stands still while the machine sleeps, and the lock's time does not.

        Whatever goes wrong, that it is lost is told once its time is over: nothing is asked any more then.
        """
        again, why = 0.0, ""  # when what failed is tried once more
        while not self._over.wait(max(0.0, min(self._due(again) - clock(), 1.0))):
            if clock() < self._due(again):
                continue
            left = self._deadline - clock()
            try:
                if left <= 0:
                    raise LockLost(f"it was not renewed within its {self.ttl} s{why}")
                if not self._wanted():
                    raise BotfarmError("nobody wants it any more")
                self._renew(timeout=max(1.0, min(left, CALL)))
                why = ""
            except LockLost as lost:
                return self._end(lost)
            except Exception as fault:  # also a reply that is none
                wanted = getattr(fault, "retry_after", None) or 1.0
                again = clock() + max(0.1, min(wanted, (self._deadline - clock()) / 2))
                why = f": {fault if isinstance(fault, BotfarmError) else repr(fault)}"
        return None

    def _due(self, again: float) -> float:
        """When it is to be renewed: anew each time, as that may be done by hand, too."""
        return max(again, self._deadline - self.ttl * 2 / 3)

    def _end(self, why: LockLost) -> None:
        """In the heartbeat. While the lock is being given back it may learn of that first."""
        if not self._over.is_set():
            self._lose(why)
            if self._on_lost:
                self._on_lost(self)

    def _lose(self, why: LockLost) -> None:
        self.lost = LockLost(f"the lock on {self.name} was lost: {why}")
        self.lost.ended_by = why.ended_by
        self._over.set()


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _whereabouts() -> str:
    import socket

    return f"{socket.gethostname()}/{os.getpid()}"
