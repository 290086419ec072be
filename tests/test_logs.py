"""The log: one line for each change of a user or a lock, and none else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import pty
import random
import re
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import ready
from conftest import (
    KEY,
    ROOT,
    acquire,
    client,
    command,
    environment,
    execute,
    free_port,
    make_users,
    pass_time,
    serving,
    settings,
    slug,
    until,
    wait_ready,
)
from test_auth import caller, secure
from test_metrics import scraped, served

import farm.telemetry
from farm.database import SQL
from farm.telemetry import Entry, Journal

OPERATING = (ROOT / "docs/operating.md").read_text()
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


class Log:
    """A journal that writes to a file, and what stands in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = Journal(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND))

    def text(self) -> str:
        self.journal.flush(10)
        return self.path.read_text()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text().split("\n")[:-1]]

    def after(self, count: int) -> list[dict[str, Any]]:
        """What was written after the first lines, without what differs each time; the time is looked at."""
        lines = self.lines()[count:]
        for line in lines:
            told = datetime.fromisoformat(line.pop("time"))
            assert told.utcoffset().total_seconds() == 0
            assert abs((datetime.now(UTC) - told).total_seconds()) < 300
            assert line.pop("level") == "info"
            line.pop("request_id", None)
        return lines


@pytest.fixture
def log(service, database, tmp_path, monkeypatch):
    """The events of the shared service, where no lock that another test has left ends meanwhile."""
    asyncio.run(execute(database, "update locks set expires_at = expires_at + interval '1 hour'"))
    written = Log(tmp_path / "log")
    monkeypatch.setattr(service.farm.events, "journal", written.journal)
    return written


def of_lock(lock: dict[str, Any]) -> dict[str, Any]:
    """The members that every event of a lock has."""
    return {"holder": lock["holder"], "user_id": lock["user"]["id"], "lock": lock["id"][:8], "fence": lock["fence"]}


class Seen(dict):
    """The members of the events that the tests have seen, by event, for the table of docs/operating.md."""


SEEN = Seen()


def told(line: dict[str, Any], event: str, **members: Any) -> None:
    """Whether a line is this event, with these members and none else; durations are looked at, not compared."""
    durations = {name: line.pop(name) for name in list(line) if re.fullmatch("(acquire|wait|held)_seconds", name)}
    assert line == {"event": event} | members
    for name, value in durations.items():
        assert 0 <= value < 60, name
    SEEN.setdefault(event, set()).update(members, durations)


async def test_a_bad_login_of_a_user_that_is_quarantined_already_quarantines_nobody(api, project, log):
    (user,) = await make_users(api, project)
    for outcome in ("bad-login", "bad-login", None):
        lock = (await acquire(api, project)).json()
        if outcome:
            await api.delete(f"/locks/{lock['id']}", params={"outcome": outcome})
    await api.post(f"/users/{user['id']}/quarantine", json={"reason": "ada looks at it"})
    begin = len(log.lines())
    await api.delete(f"/locks/{lock['id']}?outcome=bad-login")
    (released,) = log.after(begin)
    told(released, "lock-released", **of_lock(lock), outcome="bad-login")


async def test_each_change_of_a_lock_is_one_line(api, project, log):
    await make_users(api, project, 2)
    begin = len(log.lines())
    first = (await acquire(api, project, holder="ci", ttl=60)).json()
    (acquired,) = log.after(begin)
    told(acquired, "lock-acquired", **of_lock(first), ttl_seconds=60, revealed=True)

    begin = len(log.lines())
    await api.patch(f"/locks/{first['id']}", json={"ttl": 90})
    (extended,) = log.after(begin)
    told(extended, "lock-extended", **of_lock(first), ttl_seconds=90)

    begin = len(log.lines())
    await api.delete(f"/locks/{first['id']}?cooldown=5&outcome=failed&quarantine=login page says: blocked")
    released, quarantined = log.after(begin)
    told(released, "lock-released", **of_lock(first), cooldown_seconds=5, outcome="failed")
    told(quarantined, "user-quarantined", user_id=first["user"]["id"], reason="login page says: blocked")

    second = (await acquire(api, project, holder="ci", key=(key := uuid.uuid4()))).json()
    begin = len(log.lines())
    await acquire(api, project, holder="ci", key=key)
    (repeated,) = log.after(begin)
    told(repeated, "lock-repeated", **of_lock(second), ttl_seconds=300, revealed=True)

    begin = len(log.lines())
    await api.delete(f"/users/{second['user']['id']}/lock")
    (forced,) = log.after(begin)
    told(forced, "lock-forced", **of_lock(second))

    third = (await acquire(api, project, holder="job-7")).json()
    begin = len(log.lines())
    await api.delete("/locks?holder=job-7")
    (released,) = log.after(begin)
    told(released, "lock-released", **of_lock(third))

    fourth = (await acquire(api, project, ttl=1)).json()
    begin = len(log.lines())
    fifth = (await acquire(api, project, wait=10)).json()
    expired, acquired = sorted(log.after(begin), key=lambda line: line["event"] != "lock-expired")
    assert 0.99 < expired["held_seconds"] < 1.1
    assert acquired["wait_seconds"] > 0.5
    told(expired, "lock-expired", **of_lock(fourth))
    told(acquired, "lock-acquired", **of_lock(fifth), ttl_seconds=300, revealed=True)

    begin = len(log.lines())
    await api.delete(f"/users/{fifth['user']['id']}?force=true")
    forced, deleted = log.after(begin)
    told(forced, "lock-forced", **of_lock(fifth))
    told(deleted, "user-deleted", user_id=fifth["user"]["id"])


async def test_a_session_or_a_code_that_comes_or_goes_is_one_line(api, project, log):
    await make_users(api, project, totp="JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP")
    lock = (await acquire(api, project, holder="ci")).json()
    path = f"/locks/{lock['id']}/session"
    begin = len(log.lines())
    await api.put(path, json={"sid": 1}, params={"ttl": 60})
    await api.get(path)
    await api.delete(path)
    await api.get(path)
    stored, read, deleted = log.after(begin)
    told(stored, "session-stored", **of_lock(lock), ttl_seconds=60)
    told(read, "session-told", **of_lock(lock))
    told(deleted, "session-deleted", **of_lock(lock))

    begin = len(log.lines())
    assert (await api.post(f"/locks/{lock['id']}/totp")).status_code == 200
    (code,) = log.after(begin)
    told(code, "code-told", **of_lock(lock))


async def test_each_change_of_a_user_is_one_line(api, project, log):
    begin = len(log.lines())
    user = (await make_users(api, project))[0]["id"]
    (created,) = log.after(begin)
    told(created, "user-created", user_id=user)

    begin = len(log.lines())
    changes = {"login": "new", "password": "new", "domain": "canary", "labels": {"role": "admin"}}
    await api.patch(f"/users/{user}", json=changes)
    await api.patch(f"/users/{user}", json=changes)
    await api.patch(f"/users/{user}", json={"labels": {}})
    changed, password, labels = log.after(begin)
    told(changed, "user-changed", user_id=user, changed=["login", "password", "domain", "labels"])
    told(password, "user-changed", user_id=user, changed=["password"])
    told(labels, "user-changed", user_id=user, changed=["labels"])

    begin = len(log.lines())
    await api.post(f"/users/{user}/quarantine", json={"reason": "broken"})
    await api.delete(f"/users/{user}/quarantine")
    quarantined, freed = log.after(begin)
    told(quarantined, "user-quarantined", user_id=user, reason="broken")
    told(freed, "user-freed", user_id=user)

    begin = len(log.lines())
    await api.post(f"/users/{user}/verify", json={"password": "new"})
    await api.get("/users/export")
    checked, exported = log.after(begin)
    told(checked, "password-checked", user_id=user, valid=True)
    told(exported, "users-exported")


async def test_an_import_is_one_line_with_its_counts(api, project, log):
    await make_users(api, project, 2)
    lines = [
        {"login": "bot-0", "project_id": project, "env": "stage"},
        {"login": "bot-1", "project_id": project, "env": "stage", "labels": {"role": "admin"}},
        {"login": "bot-2", "project_id": project, "env": "stage", "password": "x"},
    ]
    headers = {"Content-Type": "application/x-ndjson"}
    begin = len(log.lines())
    await api.post("/users/import", content="\n".join(map(json.dumps, lines)), headers=headers)
    (done,) = log.after(begin)
    told(done, "users-imported", created=1, updated=1, unchanged=1)
    begin = len(log.lines())
    refused = await api.post("/users/import", content=json.dumps(lines[2] | {"env": "no"}), headers=headers)
    assert refused.status_code == 422
    assert log.after(begin) == []


async def test_a_grant_without_its_password_says_so(empty_database, project, tmp_path):
    """Where hashes alone are stored: no line tells of a reveal, and none is counted."""
    written = Log(tmp_path / "log")
    with serving(settings(empty_database, keys=None)) as running:
        running.farm.events.journal = written.journal
        async with client(running.url) as api:
            await make_users(api, project)
            lock = (await acquire(api, project, key=(key := uuid.uuid4()))).json()
            assert (await acquire(api, project, key=key)).json() == lock
        shown = scraped(running.url)
    assert lock["user"]["password"] is None
    _, acquired, repeated = written.after(0)
    told(acquired, "lock-acquired", **of_lock(lock), ttl_seconds=300)
    told(repeated, "lock-repeated", **of_lock(lock), ttl_seconds=300)
    assert (shown["botfarm_acquires_total"], shown["botfarm_password_reveals_total"]) == (1, 0)


def test_commands_tell_what_they_have_done(empty_database, project):
    with serving(settings(empty_database)) as running:
        body = {"login": "ada", "password": "x", "project_id": project, "env": "stage"}
        assert httpx.post(f"{running.url}/users", json=body).status_code == 201
    keys = f"{KEY.replace('k1:A', 'k2:B')},{KEY}"
    env = {"DATABASE_URL": empty_database, "BOTFARM_KEYS": keys}
    for words, event in ((["reseal"], "passwords-resealed"), (["migrate", "--after-restore", "5"], "users-rested")):
        done = command(*words, env=env)
        assert done.returncode == 0, done.stderr
        (line,) = [json.loads(text) for text in done.stderr.splitlines() if text.startswith("{")]
        told({name: line[name] for name in line if name not in ("time", "level")}, event, count=1)


async def test_what_changes_nothing_is_no_line(api, project, log):
    user = (await make_users(api, project))[0]
    lock = (await acquire(api, project, holder="ci")).json()
    begin = len(log.lines())
    assert (await acquire(api, project)).status_code == 409
    assert (await acquire(api, project, wait=1)).status_code == 409
    assert (await acquire(api, str(uuid.uuid4()))).status_code == 404
    assert (await api.put(f"/users/{user['id']}/lock")).status_code == 409
    assert (await api.delete(f"/users/{user['id']}")).status_code == 409
    assert (await api.delete(f"/locks/{uuid.uuid4()}")).status_code == 404
    assert (await api.patch(f"/locks/{uuid.uuid4()}")).status_code == 404
    assert (await api.delete("/locks?holder=nobody-at-all")).json() == {"released": 0}
    assert (await api.patch(f"/users/{user['id']}", json={})).status_code == 200
    same = {"login": user["login"], "domain": "regular", "labels": {}}
    assert (await api.patch(f"/users/{user['id']}", json=same)).status_code == 200
    assert (await api.delete(f"/users/{user['id']}/quarantine")).status_code == 200
    assert (await api.patch(f"/users/{uuid.uuid4()}", json=same)).status_code == 404
    for path in ("/users", f"/users/{user['id']}", f"/locks/{lock['id']}", "/pools", "/livez", "/readyz", "/metrics"):
        assert (await api.get(path)).status_code == 200
    assert [line for line in log.after(begin) if line["event"] != "lock-expired"] == []  # of other tests' locks


async def test_the_log_tells_the_same_as_the_history_after_a_storm(service, api, database, project, log, long):
    """Acquires, waits, sets, renewals, releases, expiries, forced ends and callers that go away, all at once."""
    users = [user["id"] for user in await make_users(api, project, 12)]
    seconds, callers = (4, 40) if long else (1.5, 20)
    end = time.monotonic() + seconds

    async def one(number: int) -> None:
        dice = random.Random(number)
        while time.monotonic() < end:
            values = {"ttl": dice.choice([1, 30]), "wait": dice.choice([0, 0, 2]), "holder": f"storm-{number % 5}"}
            path, body = "/locks", values | {"project_id": project}
            if dice.random() < 0.2:
                path, body = "/locks/sets", values | {"users": [{"project_id": project, "count": 2}]}
            try:
                answer = await asyncio.wait_for(api.post(path, json=body), dice.choice([0.02, 5, 5]))
            except (TimeoutError, httpx.HTTPError):
                continue
            if answer.status_code != 201:
                continue
            body = answer.json()
            lock = (body.get("locks") or [body])[0]
            ways = [
                lambda id=lock["id"]: api.delete(f"/locks/{id}"),
                lambda id=lock["id"]: api.patch(f"/locks/{id}", json={"ttl": 1}),
                lambda: api.delete(f"/users/{dice.choice(users)}/lock"),
                lambda: api.delete(f"/locks?holder=storm-{number % 5}"),
            ]
            await dice.choice(ways)()

    await asyncio.gather(*(one(number) for number in range(callers)))
    await api.delete("/locks?holder=storm-0")
    for user in users:
        await api.put(f"/users/{user}/lock")
    for user in users[:6]:
        await api.delete(f"/users/{user}/lock")
    for user in users[6:]:
        await pass_time(database, user)
    of_project = f"user_id in (select id from users where project_id = '{project}')"
    while await execute(database, f"select from locks where lock_id is not null and {of_project}"):
        await asyncio.sleep(0.02)  # until what has expired is swept
    await asyncio.sleep(0.3)  # and told
    rows = await execute(database, f"select * from history where {of_project}")
    kept = Counter((str(r["user_id"]), r["fence"], f"lock-{r['ended_by']}", r["holder"]) for r in rows)
    lines = [line for line in log.lines() if line.get("user_id") in users]  # locks of other tests expire meanwhile
    ends = [line for line in lines if line["event"] in ("lock-released", "lock-expired", "lock-forced")]
    assert Counter((e["user_id"], e["fence"], e["event"], e["holder"]) for e in ends) == kept
    begun = [(line["user_id"], line["fence"]) for line in lines if line["event"] == "lock-acquired"]
    assert Counter(begun) == Counter((str(r["user_id"]), r["fence"]) for r in rows)
    assert {"lock-released", "lock-expired", "lock-forced"} == {key[2] for key in kept}
    held = {(str(r["user_id"]), r["fence"]): (r["ended_at"] - r["acquired_at"]).total_seconds() for r in rows}
    assert all(abs(e["held_seconds"] - held[e["user_id"], e["fence"]]) < 1e-3 for e in ends)


async def test_a_request_has_an_id_and_a_trace(api, project, log):
    await make_users(api, project)
    sent = {"X-Request-Id": "job-7/step:3", "traceparent": PARENT}
    answer = await api.post("/locks", json={"project_id": project}, headers=sent)
    assert {name: answer.headers[name] for name in sent} == sent
    line = log.lines()[-1]
    assert (line["event"], line["request_id"], line["trace_id"]) == ("lock-acquired", "job-7/step:3", TRACE)
    refusals = await asyncio.gather(
        *(api.post("/locks", json={"project_id": project}, headers=sent if n % 2 else {}) for n in range(20))
    )
    for number, refused in enumerate(refusals):  # they share one reply
        assert slug(refused) == "pool-exhausted"
        assert ("x-request-id" in refused.headers, "traceparent" in refused.headers) == (bool(number % 2),) * 2
    lost = await api.get("/nowhere", headers=sent)
    assert (lost.status_code, lost.headers["x-request-id"]) == (404, "job-7/step:3")


async def test_a_line_has_the_client_that_called(empty_database, project, tmp_path):
    written = Log(tmp_path / "log")
    with serving(secure(empty_database)) as running:
        running.database, running.farm.events.journal = empty_database, written.journal
        async with caller(running, "users:write locks") as api:
            await make_users(api, project)
            lock = (await acquire(api, project)).json()
            await api.delete(f"/locks/{lock['id']}")
            who = api.who.id
    lines = written.lines()
    assert [line["event"] for line in lines] == ["user-created", "lock-acquired", "lock-released"]
    assert {line["client"] for line in lines} == {who}


@pytest.mark.parametrize(
    "sent",
    [
        {"X-Request-Id": "x" * 129},
        {"X-Request-Id": ""},
        {"X-Request-Id": 'a"b'},
        {"X-Request-Id": "a b"},
        {"X-Request-Id": b"\xc3\xa9"},
        {"traceparent": PARENT.upper()},
        {"traceparent": PARENT + "-x"},
        {"traceparent": f"ff-{TRACE}-b7ad6b7169203331-01"},
        {"traceparent": f"00-{'0' * 32}-b7ad6b7169203331-01"},
        {"traceparent": f"00-{TRACE}-{'0' * 16}-01"},
    ],
)
async def test_an_id_that_is_not_well_formed_is_not_taken(api, project, log, sent):
    answer = await api.post(
        "/users", json={"login": "a", "password": "b", "project_id": project, "env": "stage"}, headers=sent
    )
    assert answer.status_code == 201
    assert not {"x-request-id", "traceparent"} & set(answer.headers)
    (line,) = log.lines()
    assert re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]+", line["request_id"])
    assert "trace_id" not in line


async def test_an_unforeseen_error_is_one_line_with_its_request_id(api, service, log, monkeypatch):
    monkeypatch.setattr(farm.telemetry, "JOURNAL", log.journal)
    handler = farm.telemetry.LogHandler()
    logging.getLogger().addHandler(handler)
    try:
        monkeypatch.setitem(SQL, "get_user", "select 1 / 0 where $1::uuid is not null")
        sent = {"X-Request-Id": "mine", "traceparent": PARENT}
        answer = await api.get(f"/users/{uuid.uuid4()}", headers=sent)
    finally:
        logging.getLogger().removeHandler(handler)
    assert (answer.status_code, answer.json()["request_id"]) == (500, "mine")
    (line,) = log.lines()
    assert (line["level"], line["event"], line["request_id"], line["trace_id"]) == ("error", "message", "mine", TRACE)
    assert "DivisionByZeroError" in line["traceback"]
    assert "\n" in line["traceback"]


HOSTILE = ['"},{"event":"x', "\u2028\u2029\u202e", "\\u0000\\n", "'; drop table users --", "%s%d{x}", "🦆" * 200]


async def test_a_hostile_holder_breaks_no_line(api, project, log):
    await make_users(api, project)
    for holder in HOSTILE:
        lock = (await acquire(api, project, holder=holder)).json()
        await api.delete(f"/locks/{lock['id']}")
        assert (await acquire(api, project, holder=holder + "\n")).status_code == 422
    lines = log.lines()
    assert [line["holder"] for line in lines if line["event"] == "lock-acquired"] == HOSTILE
    assert len(lines) == 1 + 2 * len(HOSTILE)


def test_lines_are_readable_on_a_terminal_and_cannot_move_its_cursor():
    inner, outer = pty.openpty()
    try:
        journal = Journal(outer)
        now = datetime(2026, 11, 23, 12, 34, 56, 789, UTC)
        journal.write(Entry(now, "info", "lock-acquired", "r-1", holder="\x1b[2J\x9b1m\u202eevil\nline"))
        journal.write(Entry(now, "info", "lock-released", holder="two words", held_seconds=1.5))
        journal.flush(5)
        text = os.read(inner, 4096).decode()
    finally:
        os.close(inner)
        os.close(outer)
    assert text.splitlines() == [
        r"12:34:56.000789 info    lock-acquired request_id=r-1 holder=\x1b[2J\x9b1m\u202eevil\nline",
        '12:34:56.000789 info    lock-released holder="two words" held_seconds=1.5',
    ]


def test_what_nobody_reads_is_lost_in_the_end_and_told(monkeypatch):
    monkeypatch.setattr(Journal, "LIMIT", 2000)
    reading, writing = os.pipe()
    journal = Journal(writing)
    events = farm.telemetry.Events(journal)
    begin = time.monotonic()
    for number in range(5000):
        events.log("user-created", farm.telemetry.NOWHERE, user_id=uuid.UUID(int=number))
    assert time.monotonic() - begin < 5, "nobody waits for the reader"
    events.count_losses()
    events.count_losses()
    lost = events.registry.get_sample_value("botfarm_log_lines_lost_total")
    assert lost > 1000
    data, told = b"", 0
    while told < lost or data.count(b'"user-created"') < 5000 - lost or not data.endswith(b"\n"):
        data += os.read(reading, 1 << 16)
        told = sum(int(count) for count in re.findall(rb'"event":"log-lost","count":(\d+)', data))
    lines = [json.loads(line) for line in data.splitlines()]
    assert told == lost
    assert len([line for line in lines if line["event"] == "user-created"]) == 5000 - lost
    os.close(reading)
    events.log("user-created", farm.telemetry.NOWHERE, user_id=uuid.UUID(int=1))  # the reader is gone
    journal.flush(5)
    events.count_losses()
    assert events.registry.get_sample_value("botfarm_log_lines_lost_total") == lost + 1
    os.close(writing)


def entry(message: str) -> Entry:
    return Entry(datetime.now(UTC), "info", "message", message=message)


def test_lines_go_out_whole_in_pieces_that_a_pipe_takes_at_once():
    """So that workers who share a pipe break no line of another; a socket keeps the pieces apart."""
    reading, writing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with reading, writing:
        reading.settimeout(5)
        journal = Journal(writing.fileno())
        for number in range(100):
            journal.write(entry("x" * (5000 if number % 10 == 5 else 50 * number)))
        pieces: list[bytes] = []
        while b"".join(pieces).count(b"\n") < 100:
            pieces.append(reading.recv(1 << 16))
    assert all(piece.endswith(b"\n") for piece in pieces)
    assert all(len(piece) <= select.PIPE_BUF or piece.count(b"\n") == 1 for piece in pieces)
    assert len(pieces) < 100, "short ones go together"


def test_a_line_that_a_full_disk_tears_spoils_no_other(tmp_path):
    """The disk is full where files may not grow: half of the first line finds room."""
    lines = (
        "import resource",
        "from datetime import UTC, datetime",
        "from farm.telemetry import Entry, JOURNAL",
        "for size in (100, -1):",
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))",
        "    JOURNAL.write(Entry(datetime.now(UTC), 'info', 'message', message=str(size) * 50))",
        "    JOURNAL.flush()",
    )
    with open(tmp_path / "log", "w") as log:
        subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, stderr=log, timeout=20, check=True)
    torn, *whole = (tmp_path / "log").read_text().splitlines()
    lost, second = map(json.loads, whole)
    assert len(torn) == 100
    assert (lost["event"], lost["count"], second["message"]) == ("log-lost", 1, "-1" * 50)


def test_standard_error_that_was_made_non_blocking_loses_no_line():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # as a program that shares standard error may leave it
    journal = Journal(writing)
    sent = [f"{number} {'x' * (number % 700)}" for number in range(3000)] + ["y" * 100_000]
    for message in sent:
        journal.write(entry(message))
    time.sleep(0.3)  # the pipe is full
    data = b""
    while data.count(b"\n") < len(sent) and select.select([reading], [], [], 5)[0]:
        data += os.read(reading, 1 << 16)
    assert [json.loads(line)["message"] for line in data.splitlines()] == sent
    assert journal.lost == 0
    os.close(reading)
    os.close(writing)


def test_the_end_waits_for_the_log_but_a_second_at_most():
    reading, writing = os.pipe()
    journal = Journal(writing)
    journal.write(entry("short"))
    begin = time.monotonic()
    journal.flush()
    assert time.monotonic() - begin < Journal.PAUSE, "nobody waits for more lines"
    assert os.read(reading, 4096).count(b"\n") == 1
    for _ in range(100):
        journal.write(entry("x" * 1000))
    begin = time.monotonic()
    journal.flush()
    assert 1 <= time.monotonic() - begin < 4
    os.close(reading)
    os.close(writing)


@contextlib.contextmanager
def running(stderr: Any, **env: str) -> Any:
    """`python botfarm.py serve` with its standard error apart."""
    port = free_port()
    env = environment({"BOTFARM_KEYS": KEY} | env)
    with open(os.devnull, "r+") as nothing:
        process = ready.fork(["serve", "--port", str(port)], env, nothing, nothing, stderr)
    try:
        wait_ready(f"http://127.0.0.1:{port}")
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", process=process)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)


def test_what_is_told_when_python_has_ended_already_holds_nothing_up():
    """As asyncio does of a task that was given up: no thread runs any more then that could write it."""
    lines = (
        "from farm.telemetry import tell",
        "class Late: __del__ = lambda self, tell=tell: tell('late', 1)",
        "late = Late()",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, timeout=20, check=True)


async def test_nobody_waits_for_a_slow_reader_and_all_is_there_at_the_end(empty_database, project):
    reading, writing = os.pipe()
    with running(writing, DATABASE_URL=empty_database) as service:
        os.close(writing)
        async with client(service.url) as api:
            await make_users(api, project, 20)
            begin = time.monotonic()
            for _ in range(12):  # far more than the 64 KiB that a pipe holds
                locks = [a.json() for a in await asyncio.gather(*(acquire(api, project) for _ in range(20)))]
                await asyncio.gather(*(api.delete(f"/locks/{lock['id']}") for lock in locks))
            assert time.monotonic() - begin < 60
            assert scraped(service.url)["botfarm_log_lines_lost_total"] == 0
        reader = asyncio.create_task(asyncio.to_thread(lambda: b"".join(iter(lambda: os.read(reading, 1 << 16), b""))))
        await asyncio.sleep(0.01)
        service.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(service.process.wait, 20)
    lines = [json.loads(line) for line in (await reader).splitlines()]
    os.close(reading)
    if "fsync" in lines[0].get("message", ""):  # which is off in the tests' own server
        del lines[0]
    assert Counter(line["event"] for line in lines) == {
        "user-created": 20, "lock-acquired": 240, "lock-released": 240,
    }  # fmt: skip


async def test_two_workers_share_a_pipe_and_neither_breaks_a_line_of_the_other(empty_database, project, tmp_path, long):
    callers = 20 if long else 6
    reading, writing = os.pipe()
    with running(writing, DATABASE_URL=empty_database, BOTFARM_WORKERS="2", TMPDIR=str(tmp_path)) as service:
        os.close(writing)
        both = "botfarm_database_connections_limit{pool=other}"
        await asyncio.to_thread(until, lambda: scraped(service.url)[both] == 16, 20)
        holder = "x" * 200

        async def cycles() -> None:
            for _ in range(5):  # connections of their own, so that both workers get some
                async with client(service.url) as api:
                    for _ in range(10):
                        lock = (await acquire(api, project, holder=holder)).json()
                        await api.delete(f"/locks/{lock['id']}")

        async with client(service.url) as api:
            await make_users(api, project, 40)
        rounds = 0
        while rounds < 10 and (rounds == 0 or min(served(tmp_path)) < 50):
            await asyncio.gather(*(cycles() for _ in range(callers)))
            rounds += 1
        # Only now, so that both have written to a full pipe; and little at a time, so that they take turns.
        reader = asyncio.create_task(asyncio.to_thread(lambda: b"".join(iter(lambda: os.read(reading, 1 << 12), b""))))
        await asyncio.sleep(0.1)
    lines = [json.loads(line) for line in (await reader).splitlines()]
    os.close(reading)
    counted = Counter(line["event"] for line in lines)
    assert counted["lock-acquired"] == counted["lock-released"] == 50 * callers * rounds
    assert len({line["request_id"].partition("-")[0] for line in lines if "request_id" in line}) == 2


async def test_quiet_tells_of_warnings_and_errors_alone(server, empty_database, project, tmp_path):
    name = empty_database.rpartition("/")[2].partition("?")[0]
    with (
        (tmp_path / "log").open("w") as file,
        running(file, DATABASE_URL=empty_database, BOTFARM_LOG="quiet") as service,
    ):
        async with client(service.url) as api:
            await make_users(api, project)
            await acquire(api, project)
            await execute(server, f"alter database {name} with allow_connections false")
            await execute(server, f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'")
            try:
                assert (await acquire(api, project, holder="x")).status_code == 503
            finally:
                await execute(server, f"alter database {name} with allow_connections true")
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {line["event"] for line in lines} == {"message"}
    assert {line["level"] for line in lines} <= {"warning", "error"}
    (told,) = [line for line in lines if line["message"].startswith("The database does not answer")]
    assert told["request_id"]


async def test_no_secret_is_in_any_line(empty_database, project, tmp_path):
    """Passwords, whole lock ids, keys and the database's address, over changes, refusals and errors."""
    canary = f"canary-{uuid.uuid4().hex}"
    url = empty_database + ("&" if "?" in empty_database else "?") + f"application_name={canary}-url"
    user = {"login": "ada", "password": canary, "project_id": project, "env": "stage"}
    path = tmp_path / "log"
    with path.open("w") as file, running(file, DATABASE_URL=url, BOTFARM_WORKERS="2") as service:
        async with client(service.url) as api:
            created = (await api.post("/users", json=user)).json()
            await api.post("/users", json=user)
            await api.post("/users", json=user | {"env": "no"})
            await api.post("/users", content=json.dumps(user)[:-5])
            await api.post("/users/import", content=json.dumps(user | {"password": canary + "2"}),
                           headers={"Content-Type": "application/x-ndjson"})  # fmt: skip
            await api.patch(f"/users/{created['id']}", json={"password": canary + "3"})
            await api.post(f"/users/{created['id']}/verify", json={"password": canary})
            lock = (await acquire(api, project)).json()
            assert lock["user"]["password"] == canary + "3"
            await api.patch(f"/locks/{lock['id']}")
            await api.delete(f"/locks/{lock['id']}?quarantine=x")
            fails = "create function fails() returns trigger language plpgsql as 'begin perform 1 / 0; end'"
            on_locks = "create trigger fails before update on locks execute function fails()"
            await execute(empty_database, fails, on_locks)
            assert (await api.patch(f"/locks/{lock['id']}", json={"ttl": 5})).status_code == 500
            assert (await acquire(api, project)).status_code == 500
            await execute(empty_database, "drop trigger fails on locks")
    text = path.read_text()
    assert '"revealed":true' in text
    assert '"traceback"' in text
    for line in text.splitlines():
        json.loads(line)
    assert lock["id"][:8] in text
    for secret in (canary, lock["id"], KEY.partition(":")[2], empty_database):
        assert secret not in text


def test_the_table_of_events_lists_each_with_its_members():
    """As the tests above have seen them."""
    assert len(SEEN) > 5, "run the whole file"
    rows = re.findall(r"^\| `((?:lock|session|code|users?|passwords?)-[a-z]+)` \|(.*?)\|", OPERATING, re.M)
    assert {event: set(re.findall(r"`([a-z_]+)`", members)) for event, members in rows} == SEEN
