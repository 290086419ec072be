"""What people meet in the field: processes and connections as they really are."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from conftest import (
    KEY,
    ROOT,
    acquire,
    client,
    command,
    connect,
    environment,
    execute,
    free_port,
    long_chapter,
    make_users,
    process,
    raw,
    serving,
    settings,
    slug,
    until,
    wait_ready,
)
from test_metrics import scraped

import farm.check
import farm.database
import farm.imports
import farm.locks
import farm.passwords
import farm.server
import farm.settings
import farm.telemetry
import farm.waiting
import farm.words
from farm import embedded
from farm.waiting import Ask

long_chapter("starts and ends services for a minute")

# ---- Processes -----------------------------------------------------------------------------------------------


def below(pid):
    """A process and all that it has started."""
    shown = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in (line.split() for line in shown.splitlines())}
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def commands_of(pids):
    return [words for pid in pids if any(words := embedded._command(pid))]  # nothing of a zombie


@pytest.fixture
def folder():
    """Short, for the socket, and open for the user that PostgreSQL runs as."""
    with tempfile.TemporaryDirectory(prefix="bf-", dir="/tmp") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_nothing_of_a_start_outlives_a_kill_of_its_parent_and_the_next_one_works(workers, folder):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = {"BOTFARM_HOME": str(folder / "home"), "BOTFARM_PORT": str(port), "BOTFARM_WORKERS": workers}
    with process(env=env) as running:
        wait_ready(url)
        started = below(running.pid)
        assert (
            len([words for words in commands_of(started) if "spawn_main" in " ".join(words)])
            == {"1": 0, "2": 2}[workers]
        )
        running.kill()
        running.wait(5)
        until(lambda: not commands_of(started), 20)
    with process(env=env):
        wait_ready(url)


def test_a_kill_of_any_other_process_of_a_start_stops_no_service(folder):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = {"BOTFARM_HOME": str(folder / "home"), "BOTFARM_PORT": str(port), "BOTFARM_WORKERS": "2"}
    with process(env=env) as running:
        wait_ready(url)
        for pid in below(running.pid)[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_ready(url)
        assert running.poll() is None


async def test_a_worker_that_cannot_start_again_ends_no_other(empty_database):
    """As while the database is away. Here its keys seem to be others for a while."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = {"DATABASE_URL": empty_database, "BOTFARM_PORT": str(port), "BOTFARM_WORKERS": "2", "BOTFARM_KEYS": KEY}
    with process(env=env) as running:
        wait_ready(url)
        both = "botfarm_database_connections_limit{pool=other}"
        until(lambda: scraped(url)[both] == 16, 20)  # the one that is killed may be the only one ready till now
        first = workers_of(running)
        ((proof,),) = await execute(empty_database, "select proof from sealing_keys")
        await execute(empty_database, "update sealing_keys set proof = '$aes-256-gcm$k2$AAAA'")
        os.kill(min(first), signal.SIGKILL)
        later = set()
        until(lambda: later.update(workers_of(running) - first) or len(later) > 1, 20)
        assert httpx.get(f"{url}/livez").status_code == 200
        await execute(empty_database, f"update sealing_keys set proof = '{proof}'")
        assert running.poll() is None


def workers_of(running):
    return {pid for pid in below(running.pid) if "spawn_main" in " ".join(embedded._command(pid))}


def test_workers_that_have_no_turn_for_seconds_as_they_start_go_on(empty_database):
    """As on a machine that is busy or was frozen: they were killed, and those that came after them, too."""
    port = free_port()
    with process(env={"DATABASE_URL": empty_database, "BOTFARM_PORT": str(port), "BOTFARM_WORKERS": "2"}) as running:
        until(lambda: len(workers_of(running)) == 2, 20)
        first = workers_of(running)
        for pid in first:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(7)  # uvicorn waits 5 s for a sign of life, if it is not told otherwise
        for pid in first:
            os.kill(pid, signal.SIGCONT)
        wait_ready(f"http://127.0.0.1:{port}")
        assert workers_of(running) == first


def test_a_worker_that_ends_while_it_is_asked_for_a_sign_of_life_is_followed_by_another_at_once(empty_database):
    port = free_port()
    with process(env={"DATABASE_URL": empty_database, "BOTFARM_PORT": str(port), "BOTFARM_WORKERS": "2"}) as running:
        wait_ready(f"http://127.0.0.1:{port}")
        first = workers_of(running)
        os.kill(min(first), signal.SIGSTOP)
        time.sleep(1.5)  # each is asked twice a second
        os.kill(min(first), signal.SIGKILL)
        until(lambda: workers_of(running) - first, 20)  # and not after 30 s


def test_workers_that_stop_leave_nobody_at_the_port(empty_database):
    """The process that started them held it open as long as one of them had a call: who came was accepted and reset."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with process(env={"DATABASE_URL": empty_database, "BOTFARM_PORT": str(port), "BOTFARM_WORKERS": "2"}) as running:
        wait_ready(url)
        with connect(url) as held:
            held.sendall(b"POST /users HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            time.sleep(0.2)
            running.terminate()
            until(lambda: is_refused(port), farm.server.GRACE - 1)
            assert running.poll() is None


def is_refused(port):
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return True
    return False


def test_nothing_of_a_command_outlives_its_kill(folder):
    env = {"BOTFARM_HOME": str(folder / "home")}
    with process("client", "list", env=env) as running:
        until(lambda: any("postgres" in words[0] for words in commands_of(below(running.pid)[1:])), 20)
        started = below(running.pid)
        running.kill()
        running.wait(5)
        until(lambda: not commands_of(started), 20)
    assert command("client", "list", env=env).returncode == 0


def test_a_worker_ends_with_its_parent_even_where_it_does_nothing_else(bare_database):
    """One that begins, and one that does not get on because the database is away."""
    env = {"DATABASE_URL": bare_database, "BOTFARM_PORT": str(free_port()), "BOTFARM_WORKERS": "2"}
    with process(env=env) as running:
        until(lambda: len(below(running.pid)) > 2, 20)
        started = below(running.pid)
        running.kill()
        running.wait(5)
        until(lambda: not commands_of(started), 20)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_address_that_is_taken_ends_the_start_with_status_3(workers, empty_database):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused = command("--port", port, "--workers", workers, env={"DATABASE_URL": empty_database})
    assert refused.returncode == 3
    assert "ddress already in use" in refused.stderr
    assert port in refused.stderr
    assert "Traceback" not in refused.stderr


needs_ipv6 = pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="this machine has no IPv6")


@needs_ipv6
@pytest.mark.parametrize(("host", "workers"), [("::1", "1"), ("[::1]", "2"), ("::", "1"), ("0:0:0:0:0:0:0:0", "2")])
def test_addresses_of_ipv6_are_written_and_read_right(host, workers, empty_database):
    port = str(free_port())
    env = {"DATABASE_URL": empty_database, "BOTFARM_HOST": host, "BOTFARM_PORT": port, "http_proxy": "http://[::1]:9"}
    with process("--workers", workers, env=env) as running:
        until(lambda: command("check", env=env).returncode == 0, 30)
        url = f"http://[::1]:{port}"
        for written in (f"{url}/", f"[::1]:{port}"):
            assert command("check", "--url", written, env=env).returncode == 0
            assert command("export", "--url", written, env=env).returncode == 0
        running.terminate()
        said, _ = running.communicate(timeout=20)
    assert f"BotFarm serves at {url}  (API: {url}/docs)" in said
    assert f"'{url}/locks'" in said  # in quotes: some shells read the brackets as a pattern


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:80"), ("0:0::0", "http://[::1]:80"), ("[fd00::1]", "http://[fd00::1]:80"),
        ("fe80::1%eth0", "http://[fe80::1%25eth0]:80"), ("example.org", "http://example.org:80"),
    ],
)  # fmt: skip
def test_a_service_is_named_as_it_is_reached(host, url):
    assert farm.check.address(host, 80) == url


def test_what_calls_a_service_asks_no_proxy(service, project, tmp_path):
    file = tmp_path / "USERS.CSV"
    file.write_text(f"login,password,project_id,env\na,p,{project},prod\n")
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    for words in (["import", str(file)], ["export"], ["check"]):
        done = command(*words, "--url", f"{service.url}/", env=proxies)
        assert (done.returncode, done.stderr) == (0, "")
    refused = command("export", "--url", service.url, env={"SSL_CERT_FILE": str(tmp_path / "none")})
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "SSL_CERT_FILE" in refused.stderr


GOOD = "k1:" + "B" * 43 + "="
DAMAGED = {
    "missing": None,
    "empty": b"",
    "blank": b" \r\n",
    "zeros": bytes(64),
    "half a key": GOOD[:20].encode(),
    "not UTF-8": b"\xff\xfes3cret",
    "UTF-16": GOOD.encode("utf-16"),
    "a folder": "a folder",
}


def put(path, content):
    """A file with this content, or a folder, or nothing."""
    if content == "a folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_file_of_a_secret_that_is_damaged_is_told_by_its_name(content, tmp_path):
    put(tmp_path / "secret", content)
    for variable in ("BOTFARM_KEYS", "BOTFARM_SIGNING_KEYS", "DATABASE_URL", "BOTFARM_LISTEN_URL"):
        refused = command("migrate", env={f"{variable}_FILE": str(tmp_path / "secret")})
        first, line = refused.stderr.splitlines()
        assert (refused.returncode, first) == (2, "Bad settings:")
        assert line.startswith(f"{variable}_FILE: {tmp_path / 'secret'}: ")
        assert "s3cret" not in line
        assert "BBB" not in line


@pytest.mark.parametrize("form", ["{}", "{}\n", "{}\r\n", "\ufeff{}", "\ufeff {}\r\n\r\n"])
def test_a_file_of_a_secret_may_come_from_any_editor(form, tmp_path):
    (tmp_path / "keys").write_text(form.format(GOOD), encoding="utf-8", newline="")
    loaded = farm.settings.Settings.load({"BOTFARM_KEYS_FILE": str(tmp_path / "keys")})
    assert loaded.keys
    assert loaded.keys.reveal() == GOOD


def test_a_setting_that_is_not_text_is_told_by_its_name():
    variables = farm.settings.Settings.variables().values()
    with pytest.raises(farm.settings.BadSettings) as told:
        farm.settings.Settings.load(dict.fromkeys(variables, os.fsdecode(b"\xff")))
    assert str(told.value).splitlines()[1:] == [f"{variable}: it is not text in UTF-8" for variable in variables]


def test_the_home_of_nobody_is_told_as_just_that():
    refused = command("migrate", env={"BOTFARM_KEYS_FILE": "~nobody-at-all/keys"})
    assert refused.stderr.splitlines()[1:] == [
        "BOTFARM_KEYS_FILE: ~nobody-at-all/keys: it cannot be read (there is no such home folder)"
    ]


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 64, "http://127.0.0.1", "127.0.0.1:80"])
def test_a_host_to_listen_on_that_is_none_is_told_by_its_name(host):
    refused = command(env={"BOTFARM_HOST": host, "DATABASE_URL": "postgresql://127.0.0.1:1/none"})
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr.startswith(f"BOTFARM_HOST: {host!r} is not an address to listen on: ")


def test_paths_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "keys").write_text(GOOD)
    loaded = farm.settings.Settings.load({"BOTFARM_KEYS_FILE": "~/keys", "BOTFARM_HOME": "~/farm"})
    assert (loaded.home, loaded.keys is None) == (tmp_path / "farm", False)


@pytest.fixture(scope="module")
def old_home():
    """A home with a database: to make one takes most of the time of its tests."""
    with tempfile.TemporaryDirectory(prefix="bf-", dir="/tmp") as name:
        os.chmod(name, 0o755)
        embedded.start(Path(name) / "home").stop()
        yield Path(name) / "home"


def test_damaged_keys_are_told_by_their_file_and_left_as_they_are(old_home):
    env = {"BOTFARM_HOME": str(old_home), "BOTFARM_PORT": str(free_port())}
    keys = embedded.settle_home(old_home) / "keys"
    for content in [content for content in DAMAGED.values() if content is not None]:
        put(keys, content)
        refused = command(env=env)
        assert refused.returncode == 3
        (told,) = [line for line in refused.stderr.splitlines() if not line.startswith("{")]
        assert told.startswith(f"{keys}: ")
        assert "put it back from a backup" in told
        assert keys.is_dir() if content == "a folder" else keys.read_bytes() == content
        keys.rmdir() if content == "a folder" else keys.unlink()


def damage(how, home):
    """Something about a home that no start can mend."""
    data = home / "data"
    if how == "a file":
        home.write_text("")
    elif how == "half":
        (data / "base").mkdir(parents=True)
    elif how == "a file as data":
        home.mkdir()
        data.write_text("")
    else:
        data.mkdir(parents=True)
        (data / "PG_VERSION").write_bytes(how)
    if os.geteuid() == 0 and home.is_dir():
        for path in (home, *home.rglob("*")):
            os.chown(path, embedded._user(Path("/nowhere")).pw_uid, -1)


@pytest.mark.parametrize("how", ["a file", "half", "a file as data", b"", b"\xff\n", b"12\n", b"nonsense\n"])
def test_a_home_that_is_none_is_told_by_its_name(how, folder):
    home = folder / "home"
    damage(how, home)
    for words, status in (([], 3), (["migrate"], 1)):
        refused = command(*words, env={"BOTFARM_HOME": str(home), "BOTFARM_PORT": str(free_port())})
        assert refused.returncode == status
        (told,) = refused.stderr.splitlines()
        assert str(home if how == "a file" else home / "data") in told
        assert "Set BOTFARM_HOME to another folder" in told


CLIENT_COMMANDS = ["client add ci --scope locks", "client list", "client rotate ci", "client remove ci"]


@pytest.mark.parametrize("words", CLIENT_COMMANDS)
def test_each_command_about_clients_looks_in_the_home_that_it_is_told(words, folder):
    """Else it made a database of its own beside that of the service, and the client in it."""
    home = folder / "home"
    damage("a file", home)
    refused = command(*words.split(), "--home", str(home))
    assert refused.returncode == 1
    assert str(home) in refused.stderr


def test_a_service_that_runs_is_told_of_whatever_its_lock_file_holds(old_home):
    running = embedded.start(old_home)
    try:
        (old_home / "service.lock").write_bytes(b"\xff\xfe\x00")
        refused = command(env={"BOTFARM_HOME": str(old_home)})
    finally:
        running.stop()
    assert (refused.returncode, refused.stderr.count("\n")) == (3, 1)
    assert f"is using {old_home}" in refused.stderr


@pytest.mark.parametrize("keyed", [False, True], ids=["", "with a key"])
@pytest.mark.parametrize("wait", [0, 20], ids=["at once", "waiting"])
@pytest.mark.parametrize("what", ["any user", "this very user", "a set"])
async def test_a_grant_that_nobody_is_told_of_at_the_stop_is_given_back(what, wait, keyed, api, database, project):
    """The server gives up a handler whose statement is on its way. With a key the lock stays, for the repeat."""
    users = await make_users(api, project, 2)
    wish = farm.words.Wish(None, uuid.UUID(project))
    wishes = {
        "any user": (wish,),
        "this very user": (farm.words.Wish(uuid.UUID(users[0]["id"])),),
        "a set": (wish,) * 2,
    }
    sent, over, answered = asyncio.Event(), asyncio.Event(), asyncio.Event()
    async with farm.database.open_pool(database, 4, "force_generic_plan", 10) as pool:
        own = farm.locks.Locks(settings(database), pool, pool, cast("Any", None), farm.telemetry.Events(None))
        fetch = pool.fetch

        async def slow(sql, *args, **options):
            if sql in (farm.database.SQL["acquire_locks"], farm.database.SQL["acquire_users"]):
                sent.set()
                await over.wait()
                rows = await fetch(sql, *args, **options)
                answered.set()
                return rows
            return await fetch(sql, *args, **options)

        pool.fetch = slow
        desk = asyncio.create_task(own.desk.run())
        request = cast("Any", SimpleNamespace(receive=asyncio.Event().wait, scope={"state": {}}))
        key = uuid.uuid4() if keyed else None
        call = asyncio.create_task(own.acquire(request, Ask(wishes=wishes[what], ttl=60, wait=wait, key=key)))
        await sent.wait()
        own.desk.close()
        call.cancel()
        await asyncio.wait([call])
        asyncio.get_running_loop().call_later(0.1, over.set)
        await own.settle()
        await answered.wait()  # of those with a key, which nobody waits for
        desk.cancel()
    states = [(await api.get(f"/users/{user['id']}")).json()["state"] for user in users]
    ended = [(await api.get(f"/users/{user['id']}/history")).json()["items"] for user in users]
    count = len(wishes[what])
    assert sorted(states) == ["free"] * (2 - count * keyed) + ["locked"] * count * keyed
    assert len([item for items in ended for item in items]) == count


async def test_who_is_given_up_while_a_session_is_looked_for_gets_nobody(api, database, project):
    """The statement that grants is not on its way yet."""
    (user,) = await make_users(api, project)
    lock = (await acquire(api, project)).json()
    assert (await api.put(f"/locks/{lock['id']}/session", json={})).status_code == 204
    await api.delete(f"/locks/{lock['id']}")
    sent, over = asyncio.Event(), asyncio.Event()
    async with farm.database.open_pool(database, 4, "force_generic_plan", 10) as pool:
        own = farm.locks.Locks(settings(database), pool, pool, cast("Any", None), farm.telemetry.Events(None))
        find = own._find_with_sessions

        async def slow(asks):
            sent.set()
            await over.wait()
            return await find(asks)

        own._find_with_sessions = slow
        ask = Ask(wishes=(farm.words.Wish(None, uuid.UUID(project)),), ttl=60, prefers_session=True)
        call = asyncio.create_task(own.acquire(cast("Any", None), ask))
        await sent.wait()
        own.desk.close()
        call.cancel()
        await asyncio.wait([call])
        over.set()
        await own.settle()
        await asyncio.sleep(0.2)
    assert (await api.get(f"/users/{user['id']}")).json()["state"] == "free"


async def test_what_waits_for_a_hash_has_a_bound_and_a_503_behind_it(empty_database, project, monkeypatch):
    assert farm.passwords.Passwords.CROWD * 0.015 / farm.passwords.Passwords.THREADS < 1
    monkeypatch.setattr(farm.passwords.Passwords, "CROWD", 10)
    with serving(settings(empty_database, keys=None)) as hashing:
        async with client(hashing.url) as api:
            (user,) = await make_users(api, project)
            check = {"json": {"password": "pw-0"}}
            answers = await asyncio.gather(*(api.post(f"/users/{user['id']}/verify", **check) for _ in range(60)))
            refused = [answer for answer in answers if answer.status_code != 200]
            assert refused
            assert {slug(answer) for answer in refused} == {"overloaded"}
            assert {(answer.status_code, answer.headers["retry-after"]) for answer in refused} == {(503, "1")}
            assert (await api.post(f"/users/{user['id']}/verify", **check)).json() == {"valid": True}


async def test_a_crowd_of_checks_refuses_no_import_and_an_import_refuses_no_check(empty_database, project, monkeypatch):
    monkeypatch.setattr(farm.passwords.Passwords, "CROWD", 8)
    lines = [{"login": f"b{n}", "password": "p", "project_id": project, "env": "stage"} for n in range(60)]
    upload = {"content": "\n".join(map(json.dumps, lines)), "headers": {"Content-Type": "application/x-ndjson"}}
    with serving(settings(empty_database, keys=None)) as hashing:
        async with client(hashing.url) as api:
            (user,) = await make_users(api, project)
            imported = asyncio.create_task(api.post("/users/import", **upload))
            answers = []
            while not imported.done():
                checks = (api.post(f"/users/{user['id']}/verify", json={"password": "pw-0"}) for _ in range(4))
                answers += await asyncio.gather(*checks)
            assert (await imported).json() == {"created": 60, "updated": 0, "unchanged": 0}
            assert {answer.status_code for answer in answers} == {200}


async def test_too_many_who_wait_for_a_user_or_for_an_import_are_told_so(api, service, project, monkeypatch):
    await make_users(api, project)
    await acquire(api, project)
    monkeypatch.setattr(farm.waiting, "CROWD", len(service.farm.desk.queue))
    refused = await acquire(api, project, wait=5)
    assert (refused.status_code, slug(refused), refused.headers["retry-after"]) == (503, "overloaded", "1")
    monkeypatch.setattr(farm.imports.Imports, "CROWD", 0)
    refused = await api.post("/users/import", content="", headers={"Content-Type": "application/x-ndjson"})
    assert (refused.status_code, slug(refused)) == (503, "overloaded")


async def test_scrapes_that_come_while_one_is_made_share_the_next(api, service, monkeypatch):
    made = []
    monkeypatch.setattr(
        farm.telemetry, "generate_latest", lambda scrape: made.append(1) or b"" or time.sleep(0.1) or b"x"
    )
    answers = await asyncio.gather(*(api.get("/metrics") for _ in range(50)))
    assert {answer.text for answer in answers} == {"x"}
    assert len(made) <= 4


READERS = {
    "who is gone": "| head -c 0",
    "who reads a line": "| head -n 1",
    "a full disk": "> /dev/full",
    "nobody": ">&-",
    "nobody at all": ">&- 2>&- <&-",
}


@pytest.mark.parametrize(
    ("reader", "workers"), [*((reader, "1") for reader in READERS.values()), (READERS["nobody at all"], "2")]
)
def test_a_start_does_not_depend_on_who_reads_its_output(reader, workers, empty_database, tmp_path):
    port = free_port()
    env = {"DATABASE_URL": empty_database, "BOTFARM_PORT": str(port), "BOTFARM_WORKERS": workers}
    line = (
        f'({sys.executable} botfarm.py & echo $! > "{tmp_path}/pid"; wait $!; echo $? > "{tmp_path}/status") {reader}'
    )
    with subprocess.Popen(["bash", "-c", line], env=environment(env), cwd=ROOT, stderr=subprocess.DEVNULL) as shell:
        try:
            wait_ready(f"http://127.0.0.1:{port}")
            assert httpx.get(f"http://127.0.0.1:{port}/pools").json() == {"items": []}
        finally:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
            shell.wait(20)
    if reader != READERS["nobody at all"]:
        assert (tmp_path / "status").read_text() == "0\n"


@pytest.mark.parametrize(("words", "status"), [(["migrate"], 2), (["nope"], 2), (["client", "remove", "x"], 1)])
def test_the_exit_status_does_not_depend_on_who_reads_the_output(words, status, empty_database):
    env = {"DATABASE_URL": empty_database} | ({"BOTFARM_PORT": "none"} if status == 2 else {})
    line = [sys.executable, "botfarm.py", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, env=environment(env), cwd=ROOT, stdout=full, stderr=full, check=False)
    assert done.returncode == status


@pytest.mark.parametrize("words", [["keygen"], ["client", "add", "ci", "--scope", "locks"]])
def test_what_is_told_this_once_and_finds_no_room_is_not_done(words, empty_database):
    env = environment({"DATABASE_URL": empty_database, "PYTHONUNBUFFERED": ""})
    line = [sys.executable, "botfarm.py", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, env=env, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "[Errno 28] No space left on device\n")


# ---- Connections ---------------------------------------------------------------------------------------------

JSON = b"Host: x\r\nContent-Type: application/json\r\n"


def half_closed(url, text):
    """A connection whose caller has sent all that it ever will."""
    connection = connect(url)
    connection.settimeout(10)
    connection.sendall(text)
    connection.shutdown(socket.SHUT_WR)
    return connection


def rest_of(connection):
    """All that comes until the other side closes."""
    with connection, connection.makefile("rb") as file:
        return file.read()


def replies_in(answer):
    """Status and body of each reply."""
    with io.BytesIO(answer) as stream:
        source: Any = SimpleNamespace(makefile=lambda _: stream)
        found = []
        while stream.tell() < len(answer):
            reply = http.client.HTTPResponse(source)
            reply.close = lambda: None  # the next one stands behind it
            reply.begin()
            found.append((reply.status, stream.read(reply.length)))
        return found


def acquiring(project, version="1.1", key=None, **values):
    body = json.dumps({"project_id": project} | values).encode()
    keyed = f"Idempotency-Key: {key}\r\n" if key else ""
    head = f"POST /locks HTTP/{version}\r\n{keyed}Content-Length: {len(body)}\r\n".encode()
    return head + JSON + b"\r\n" + body


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_caller_that_sends_no_more_is_answered(version, api, service, project):
    await make_users(api, project)
    page = f"GET /pools HTTP/{version}\r\nHost: x\r\n\r\n".encode()
    for text, statuses in ((acquiring(project, version), [201]), (page, [200]), (page * 3, [200] * 3)):
        statuses = statuses[:1] if version == "1.0" else statuses
        answer = await asyncio.to_thread(lambda text=text: rest_of(half_closed(service.url, text)))
        assert [status for status, _ in replies_in(answer)] == statuses
    assert answer.count(b"connection: close") == 1


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("seconds", [0, 0.2, 0.7])
async def test_a_caller_that_sends_no_more_and_waits_is_answered_in_its_turn(version, seconds, api, service, project):
    """Also where others stand behind it on its connection, and whatever was written to see if it is there."""
    (user,) = await make_users(api, project)
    lock = (await acquire(api, project)).json()
    behind = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" if version == "1.1" else b""
    connection = half_closed(service.url, acquiring(project, version, wait=20) + behind)
    await asyncio.to_thread(until, lambda: waiters(service, project), 5)
    await asyncio.sleep(seconds)
    await api.delete(f"/locks/{lock['id']}")
    (status, body), *others = replies_in(await asyncio.to_thread(rest_of, connection))
    assert (status, json.loads(body)["user"]["id"]) == (201, user["id"])
    assert others == ([(200, b'{"status":"ok"}')] if behind else [])
    assert (await api.get(f"/users/{user['id']}")).json()["state"] == "locked"


async def test_a_caller_that_sends_no_more_and_waits_in_vain_is_told_so(api, service, project):
    await make_users(api, project)
    await acquire(api, project)
    answer = await asyncio.to_thread(lambda: rest_of(half_closed(service.url, acquiring(project, wait=1))))
    ((status, body),) = replies_in(answer)
    assert (status, json.loads(body)["type"]) == (409, "urn:botfarm:pool-exhausted")


def waiters(service, project):
    return [ask for ask in list(service.farm.desk.queue) if str(ask.wishes[0].project_id) == project]


@pytest.mark.parametrize("how", ["at once", "in two steps", "after a while"])
async def test_a_waiter_that_is_gone_is_given_nobody_however_it_went(how, api, service, project):
    (user,) = await make_users(api, project)
    lock = (await acquire(api, project)).json()
    with connect(service.url) as connection:
        connection.sendall(acquiring(project, wait=20))
        await asyncio.to_thread(until, lambda: waiters(service, project), 5)
        if how != "at once":
            connection.shutdown(socket.SHUT_WR)
            await asyncio.sleep(0.3 if how == "after a while" else 0)
    if how == "after a while":  # it was there, and is asked again only with the grant
        await api.delete(f"/locks/{lock['id']}")
    else:
        await asyncio.to_thread(until, lambda: not waiters(service, project), 1.5)
        await api.delete(f"/locks/{lock['id']}")
        fences = [item["fence"] for item in (await api.get(f"/users/{user['id']}/history")).json()["items"]]
        assert fences == [1]
    end = time.monotonic() + 1.5
    while (await api.get(f"/users/{user['id']}")).json()["state"] != "free" or waiters(service, project):
        assert time.monotonic() < end, "the user is lost"
        await asyncio.sleep(0.02)


async def test_a_caller_that_goes_before_its_reply_leaves_no_user_locked(api, service, project, monkeypatch):
    """Without a wait: its closing arrives while the statement runs. With a key the lock stays, for the repeat."""
    (user,) = await make_users(api, project)
    fetch, sent = service.farm.hot.fetch, threading.Event()

    async def slow(sql, *args, **options):
        if sql == farm.database.SQL["acquire_locks"]:
            sent.set()
            await asyncio.sleep(0.2)
        return await fetch(sql, *args, **options)

    monkeypatch.setattr(service.farm.hot, "fetch", slow)
    for key, ends in ((None, ["released"]), (uuid.uuid4(), [None, "released"])):
        sent.clear()
        with connect(service.url) as connection:
            connection.sendall(acquiring(project, key=key))
            assert await asyncio.to_thread(sent.wait, 5)
        end, history = time.monotonic() + 1.7, []
        while [item["ended_by"] for item in history] != ends:
            assert time.monotonic() < end, history
            await asyncio.sleep(0.02)
            history = (await api.get(f"/users/{user['id']}/history")).json()["items"]


BIG = b"Content-Length: 99999999\r\n"
NEXT = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /locks HTTP/1.1\r\n" + JSON + BIG, 413),
        (b"POST /users/import HTTP/1.1\r\nContent-Type: text/plain\r\nContent-Length: 9\r\n", 415),
        (b"POST /locks HTTP/1.1\r\nContent-Type: text/plain\r\nContent-Length: 9\r\n", 415),
        (b"POST /locks HTTP/1.1\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n", 415),
        (b"POST /nothing HTTP/1.1\r\n" + JSON + b"Content-Length: 9\r\n", 404),
        (b"POST /nothing HTTP/1.1\r\n" + JSON + b"Transfer-Encoding: chunked\r\n", 404),
        (b"PATCH /locks HTTP/1.1\r\n" + JSON + b"Content-Length: 9\r\n", 405),
        (b"POST /locks?a=b HTTP/1.1\r\n" + JSON + b"Content-Length: 9\r\n", 422),
        (b"HEAD /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n", 200),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n", 200),
    ],
    ids=lambda value: value.split()[0].decode() + str(value.split()[1]) if isinstance(value, bytes) else str(value),
)
@pytest.mark.parametrize("expects", [b"", b"Expect: 100-continue\r\n"], ids=["sends", "expects"])
async def test_a_reply_before_the_end_of_the_body_ends_the_connection(head, status, expects, service):
    """Whatever is sent next would be taken for that body. It is refused without "100 Continue", too."""
    begin = time.monotonic()
    answer = await asyncio.to_thread(raw, service.url, head + expects + b"\r\n", NEXT, pause=0.3)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"\r\nconnection: close\r\n" in answer
    assert time.monotonic() - begin < 5


async def test_with_authentication_it_does_too(empty_database):
    keys = farm.settings.Secret(KEY)
    with serving(settings(empty_database, auth="on", signing_keys=keys)) as guarded:
        head = b"POST /users/import HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n" + BIG + b"\r\n"
        answer = await asyncio.to_thread(raw, guarded.url, head)
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"\r\nconnection: close\r\n" in answer


@pytest.mark.parametrize("call", [b"/nothing", b"/locks", b"/users/import"])
async def test_a_caller_that_still_sends_when_it_is_refused_reads_why(call, service):
    """Its connection is not reset under it, though it sends much more than anybody has room for."""
    head = b"POST " + call + b" HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 33554432\r\n\r\n"

    def send():
        with connect(service.url) as connection:
            connection.settimeout(10)
            connection.sendall(head)
            for _ in range(32):
                connection.sendall(b" " * 1048576)
            return rest_of(connection)

    answer = await asyncio.to_thread(send)
    assert answer[9:12] in (b"404", b"415", b"413")
    assert b"\r\nconnection: close\r\n" in answer


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"Content-Length: 2\r\n\r\n{}", 422),
        (b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 422),
        (b"Content-Length: 1\r\n\r\n{", 400),
        (b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}", 422),
        (b"Expect: a miracle\r\nContent-Length: 2\r\n\r\n{}", 422),
    ],
)
@pytest.mark.parametrize("pause", [0, 0.1])
async def test_after_a_refused_body_the_connection_serves_on(body, status, pause, service):
    head, blank, sent = (b"POST /locks HTTP/1.1\r\n" + JSON + body).partition(b"\r\n\r\n")
    answer = await asyncio.to_thread(raw, service.url, head + blank, sent, NEXT, pause=pause)
    answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert [status for status, _ in replies_in(answer)] == [status, 200]


WISH = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"


@pytest.mark.parametrize("pause", [0, 0.1])
@pytest.mark.parametrize(
    "body", [b"Content-Length: 2\r\n\r\n{}", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"]
)
async def test_who_wishes_for_another_protocol_is_answered_in_this_one(body, pause, service):
    """As the client that comes with Java does with the first request of each connection."""
    head, blank, sent = (b"POST /locks HTTP/1.1\r\n" + WISH + JSON + body).partition(b"\r\n\r\n")
    page = b"GET /pools HTTP/1.1\r\nHost: x\r\n" + WISH.replace(b"h2c", b"websocket") + b"\r\n"
    answer = await asyncio.to_thread(raw, service.url, head + blank, sent, page, page + NEXT, pause=pause)
    assert [status for status, _ in replies_in(answer)] == [422, 200, 200, 200]


async def test_thousands_of_such_wishes_in_one_packet_are_answered(service):
    """One by one: in calls within calls the 500th broke the connection, with a traceback of 300 KB in the log."""
    page = b"GET /livez HTTP/1.1\r\nHost: x\r\n" + WISH + b"\r\n"
    answer = await asyncio.to_thread(raw, service.url, page * 2000 + NEXT)
    assert [status for status, _ in replies_in(answer)] == [200] * 2001


@pytest.mark.parametrize("wish", [b"", WISH])
async def test_a_tunnel_is_refused(service, wish):
    for place in (b"x:80", b"http://x/users"):
        head = b"CONNECT " + place + b" HTTP/1.1\r\nHost: x\r\n" + wish + b"\r\n"
        answer = await asyncio.to_thread(raw, service.url, head, NEXT)
        assert [status for status, _ in replies_in(answer)] == [400]


async def test_who_expects_to_be_asked_for_its_body_is_asked_and_only_over_http_1_1(service):
    head = b"POST /locks HTTP/1.1\r\n" + JSON + b"Connection: close\r\n"
    head += b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    with connect(service.url) as connection:
        connection.settimeout(10)
        connection.sendall(head)
        assert await asyncio.to_thread(connection.recv, 99) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"{}")
        assert (await asyncio.to_thread(rest_of, connection)).startswith(b"HTTP/1.1 422 ")
    answer = await asyncio.to_thread(raw, service.url, head.replace(b"HTTP/1.1", b"HTTP/1.0") + b"{}")
    assert answer.startswith(b"HTTP/1.1 422 ")
