"""GET /metrics: each thing that happens to a lock is counted once, and a scrape of any worker tells of all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from conftest import (
    KEY,
    ROOT,
    acquire,
    client,
    execute,
    free_port,
    make_users,
    pass_time,
    process,
    serving,
    settings,
    until,
    wait_ready,
)
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families
from test_auth import secure

from farm.database import SQL
from farm.telemetry import Snapshot, Workers

OPERATING = (ROOT / "docs/operating.md").read_text()


def parsed(text: str) -> dict[str, float]:
    """Every sample as Prometheus writes it, name{label="value"}, and its number."""
    return {
        sample.name + "".join(f"{{{k}={v}}}" for k, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(url: str) -> dict[str, float]:
    """A scrape on a connection of its own, so that several workers take turns."""
    answer = httpx.get(f"{url}/metrics", timeout=30)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/plain; version=1.0.0; charset=utf-8"
    return parsed(answer.text)


def of_pool(name: str, project: str, **labels: str) -> str:
    """The sample of a pool as `parsed` names it."""
    pool = {"project_id": project, "env": "stage", "domain": "regular"} | labels
    return name + "".join(f"{{{k}={v}}}" for k, v in sorted(pool.items()))


@pytest.fixture
def own(empty_database):
    """A service that no other test uses, so that its numbers are this test's alone."""
    with serving(settings(empty_database)) as running:
        yield running


def grown(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What was counted between two scrapes, without the shape of the histograms."""
    names = ("_total", "_count")
    return {k: v - before[k] for k, v in after.items() if v != before[k] and k.partition("{")[0].endswith(names)}


def count_users_anew(service: Any) -> None:
    """Forget the counts of users, which are else kept for a second."""
    service.farm.exporter._until = 0.0


async def test_each_thing_that_happens_to_a_lock_is_counted_once(own, project):
    async with client(own.url) as api:
        user = (await make_users(api, project))[0]["id"]
        before = scraped(own.url)
        first = (await acquire(api, project)).json()
        await api.patch(f"/locks/{first['id']}")
        assert (await acquire(api, project)).status_code == 409
        await api.delete(f"/locks/{first['id']}")
        assert (await api.delete(f"/locks/{first['id']}")).status_code == 404
        await acquire(api, project)
        await api.delete(f"/users/{user}/lock")
        await api.delete(f"/users/{user}/lock")
        assert (await api.get("/nowhere")).status_code == 404
        assert (await api.post("/locks", content="{")).status_code == 400
        counted = grown(before, scraped(own.url))
    batches = {name: counted.pop(name) for name in list(counted) if name.startswith("botfarm_batch_size")}
    assert counted == {
        "botfarm_acquires_total": 2,
        "botfarm_password_reveals_total": 2,
        "botfarm_releases_total": 1,
        "botfarm_extensions_total": 1,
        "botfarm_forced_releases_total": 1,
        "botfarm_refusals_total{reason=pool-exhausted}": 1,
        "botfarm_refusals_total{reason=lock-not-held}": 1,
        "botfarm_refusals_total{reason=not-found}": 1,
        "botfarm_refusals_total{reason=malformed-body}": 1,
        "botfarm_acquire_duration_seconds_count": 2,
        "botfarm_lock_held_duration_seconds_count": 2,
    }
    assert set(batches) == {
        f"botfarm_batch_size_count{{statement={name}}}"
        for name in ("acquire_locks", "release_locks", "extend_locks", "count_matching")
    }


async def test_every_reason_has_a_number_from_the_beginning(own):
    """So that the first of its kind can be seen to grow; a reason without one would be an error 500."""
    source = "".join(path.read_text() for path in (ROOT / "botfarm.py", *ROOT.glob("farm/*.py")))
    reasons = set(re.findall(r'TokenRefusal\(\s*"(\w+)"', source)) | {"pool-exhausted", "forbidden", "internal-error"}
    assert len(reasons) == 8
    shown = scraped(own.url)
    assert {shown[f"botfarm_refusals_total{{reason={reason}}}"] for reason in reasons} == {0}


async def test_refused_tokens_are_counted(empty_database):
    with serving(secure(empty_database)) as running:
        async with client(running.url) as api:
            assert (await api.post("/token", data={"grant_type": "client_credentials"})).status_code == 401
            assert (await api.get("/users")).status_code == 401
        shown = scraped(running.url)
    assert shown["botfarm_refusals_total{reason=invalid_client}"] == 1
    assert shown["botfarm_refusals_total{reason=unauthenticated}"] == 1


@pytest.mark.parametrize("taken_over_by", ["sweep", "acquire_locks", "acquire_users", "delete_user"])
async def test_an_expiry_is_counted_once_whoever_notices_it(own, empty_database, project, taken_over_by, monkeypatch):
    if taken_over_by != "sweep":
        monkeypatch.setitem(SQL, "sweep_locks", "select true as is_over where false and $1::int > 0")
    async with client(own.url) as api:
        user = (await make_users(api, project))[0]["id"]
        before = scraped(own.url)
        await acquire(api, project, ttl=1)
        if taken_over_by == "acquire_users":
            waiter = asyncio.create_task(acquire(api, project, wait=10))
            await asyncio.to_thread(until, lambda: own.farm.desk.queue, 5)
        await pass_time(empty_database, user, 1)
        if taken_over_by == "acquire_users":
            assert (await waiter).status_code == 201
        if taken_over_by == "acquire_locks":
            assert (await acquire(api, project)).status_code == 201
        if taken_over_by == "delete_user":
            assert (await api.delete(f"/users/{user}")).status_code == 204
        for _ in range(500):
            counted = grown(before, scraped(own.url))
            if "botfarm_expirations_total" in counted:
                break
            await asyncio.sleep(0.02)
        await asyncio.sleep(1.3 if taken_over_by == "sweep" else 0.2)  # another sweep later
        counted = grown(before, scraped(own.url))
    assert counted["botfarm_expirations_total"] == 1
    assert counted["botfarm_lock_held_duration_seconds_count"] == 1
    assert scraped(own.url)["botfarm_lock_held_duration_seconds_sum"] == pytest.approx(1, abs=0.01)


async def test_users_and_waiting_calls_are_told_by_pool(own, project):
    async with client(own.url) as api:
        users = await make_users(api, project, 4)
        for user in users[:2]:
            await api.put(f"/users/{user['id']}/lock")
        await api.post(f"/users/{users[2]['id']}/quarantine", json={"reason": "broken"})
        last = (await api.put(f"/users/{users[3]['id']}/lock")).json()
        await api.delete(f"/locks/{last['id']}?cooldown=600")
        calls = [asyncio.create_task(acquire(api, project, wait=20)) for _ in range(3)]
        calls.append(asyncio.create_task(acquire(api, project, env="stage", domain="regular", wait=20)))
        while (own.farm.desk.queue.keys() and len(own.farm.desk.queue) < 4) or not own.farm.desk.queue:
            await asyncio.sleep(0.01)
        shown = scraped(own.url)
        states = {s: shown[of_pool("botfarm_users", project, state=s)] for s in ("free", "locked", "resting")}
        assert states | {"quarantined": shown[of_pool("botfarm_users", project, state="quarantined")]} == {
            "free": 0, "locked": 2, "resting": 1, "quarantined": 1,
        }  # fmt: skip
        assert shown[of_pool("botfarm_waiting_calls", project)] == 4
        for user in users[:2]:
            await api.delete(f"/users/{user['id']}/lock")
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        for _ in range(500):
            shown = scraped(own.url)
            ended = [
                shown[f"botfarm_wait_duration_seconds_count{{outcome={o}}}"] for o in ("granted", "refused", "gone")
            ]
            if sum(ended) == 4:
                break
            await asyncio.sleep(0.01)
        # At least one is granted. One that leaves as it is granted gives its user back, and the next may get that.
        assert ended[0] in (1, 2, 3)
        assert ended == [ended[0], 0, 4 - ended[0]]
        count_users_anew(own)
        assert scraped(own.url)[of_pool("botfarm_waiting_calls", project)] == 0


async def test_scrapes_count_the_users_once_a_second_at_most(own, project, monkeypatch):
    async with client(own.url) as api:
        await make_users(api, project)
        asked = 0
        fetch = own.farm.pool.fetch

        async def counting(sql: str, *args: Any, **options: Any) -> Any:
            nonlocal asked
            asked += sql == SQL["list_pools"]
            return await fetch(sql, *args, **options)

        monkeypatch.setattr(own.farm.pool, "fetch", counting)
        began = time.monotonic()
        await asyncio.gather(*(api.get("/metrics") for _ in range(50)))
        assert 1 <= asked <= 1 + (time.monotonic() - began)


async def test_metrics_answer_while_the_database_is_away(own, project, server, empty_database):
    name = urlsplit(empty_database).path[1:]
    free = of_pool("botfarm_users", project, state="free")
    async with client(own.url) as api:
        await make_users(api, project)
        assert scraped(own.url)[free] == 1
        await execute(
            server,
            f"alter database {name} with allow_connections false",
            f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'",
        )
        try:
            count_users_anew(own)
            before = scraped(own.url)
            assert free not in before
            assert (await acquire(api, project)).status_code == 503
            shown = scraped(own.url)
            assert shown["botfarm_database_errors_total"] > before["botfarm_database_errors_total"] > 0
            assert shown["botfarm_refusals_total{reason=database-unavailable}"] == 1
        finally:
            await execute(server, f"alter database {name} with allow_connections true")
        end = time.monotonic() + 40  # PgBouncer tries again after 15 seconds
        while (shown := scraped(own.url)).get(free) != 1 and time.monotonic() < end:
            await asyncio.sleep(0.02)
        assert shown[free] == 1


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed; CI installs it"
)


@needs_promtool
async def test_promtool_finds_nothing_to_say(own, project):
    async with client(own.url) as api:
        await make_users(api, project)
        await acquire(api, project)
        await acquire(api, project)
        text = (await api.get("/metrics")).text
    assert "botfarm_users{" in text
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def workers_of(parent: int) -> list[psutil.Process]:
    """The processes that serve, which uvicorn has spawned."""
    found = []
    for child in psutil.Process(parent).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            found += [child] if "spawn_main" in " ".join(child.cmdline()) else []
    return found


def served(folder: Path) -> list[float]:
    """Acquires of each worker of a start whose temporary files are here."""
    files = [str(file) for file in folder.glob("botfarm-*/counter_*.db")]
    samples = [sample for file in files for family in MultiProcessCollector.merge([file]) for sample in family.samples]
    return [sample.value for sample in samples if sample.name == "botfarm_acquires_total"]


async def test_a_scrape_of_any_worker_tells_of_all_also_after_one_was_killed(empty_database, project, tmp_path, long):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = {"DATABASE_URL": empty_database, "BOTFARM_KEYS": KEY, "BOTFARM_WORKERS": "2", "TMPDIR": str(tmp_path)}
    with process("serve", "--port", str(port), env=env) as started:
        wait_ready(url)
        until(lambda: len(workers_of(started.pid)) == 2, 30)
        httpx.post(f"{url}/users", json={"login": "a", "password": "b", "project_id": project, "env": "stage"})

        def cycles(count: int) -> None:
            for _ in range(count):  # a connection each, so that both workers serve
                lock = httpx.post(f"{url}/locks", json={"project_id": project}, timeout=30).json()
                assert httpx.delete(f"{url}/locks/{lock['id']}", timeout=30).status_code == 204

        def counts() -> set[float]:
            """What ten scrapes say of the releases; a connection each, so that both workers answer."""
            texts = [httpx.get(f"{url}/metrics", timeout=30).text for _ in range(10)]
            return {float(line.split()[1]) for text in texts for line in text.splitlines() if line.startswith(name)}

        name = "botfarm_releases_total "

        done = 0
        while done < 400 and (len(served(tmp_path)) < 2 or min(served(tmp_path)) < 5):
            cycles(20)
            done += 20
        assert min(served(tmp_path)) >= 5, "both workers have served"
        assert counts() == {done}
        killed = workers_of(started.pid)[0]
        killed.send_signal(signal.SIGKILL)
        until(lambda: killed.pid not in [w.pid for w in workers_of(started.pid)], 30)
        until(lambda: len(workers_of(started.pid)) == 2, 30)
        for _ in range(100 if long else 3):
            with contextlib.suppress(httpx.HTTPError):  # of a connection that the killed one had
                assert counts() == {done}
        assert counts() == {done}
        cycles(20)
        assert counts() == {done + 20}
        # Gauges are those of the two that live.
        until(lambda: scraped(url)["botfarm_database_connections_limit{pool=other}"] == 16, 30)
    assert list(tmp_path.glob("botfarm-*")) == []


def test_what_a_worker_has_is_told_to_the_others_as_long_as_it_lives(tmp_path):
    mine, theirs = (Snapshot([], {"locks": (number, 2, 3, 4)}) for number in (0, 1))
    worker, other = Workers(str(tmp_path)), Workers(str(tmp_path))
    other._own = tmp_path / "7.json"
    worker.tell(mine)
    other.tell(theirs)
    assert (worker.others(), other.others()) == ([theirs], [mine])
    past = time.time() - 6
    os.utime(tmp_path / "7.json", (past, past))
    assert worker.others() == []


def test_a_worker_that_was_killed_as_it_began_breaks_no_scrape(tmp_path):
    (tmp_path / "counter_7.db").touch()
    assert list(Workers(str(tmp_path)).collect()) == []


async def test_those_who_wait_are_told_over_all_workers(empty_database, project):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = {"DATABASE_URL": empty_database, "BOTFARM_KEYS": KEY, "BOTFARM_WORKERS": "2"}
    with process("serve", "--port", str(port), env=env) as started:
        wait_ready(url)
        until(lambda: len(workers_of(started.pid)) == 2, 30)
        body = {"project_id": project, "wait": 30}
        httpx.post(f"{url}/users", json={"login": "a", "password": "b", "project_id": project, "env": "stage"})
        assert httpx.post(f"{url}/locks", json={"project_id": project}).status_code == 201

        async def wait() -> None:
            async with client(url) as one:
                await one.post("/locks", json=body)

        calls = [asyncio.create_task(wait()) for _ in range(12)]
        name = of_pool("botfarm_waiting_calls", project)
        seen: set[float] = set()
        for _ in range(100):
            seen = {(await asyncio.to_thread(scraped, url)).get(name, -1) for _ in range(6)}
            if seen == {12}:
                break
            await asyncio.sleep(0.05)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    assert seen == {12}


async def test_the_table_of_metrics_lists_every_one(service, api, project):
    await make_users(api, project)
    count_users_anew(service)
    text = (await api.get("/metrics")).text
    named = {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            {label for sample in family.samples for label in sample.labels if label != "le"},
        )
        for family in text_string_to_metric_families(text)
    }
    rows = re.findall(r"^\| `(botfarm_\w+)` \| (\w+) \|(.*?)\|", OPERATING, re.M)
    assert {name: (kind, set(re.findall(r"\w+", labels))) for name, kind, labels in rows} == named
