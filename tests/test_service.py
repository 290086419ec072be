"""The service as a whole: problems, health, settings, commands, documents."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from urllib.parse import urlsplit

import asyncpg
import msgspec
import pytest
from conftest import (
    KEY,
    ROOT,
    acquire,
    client,
    command,
    execute,
    free_port,
    fresh_database,
    make_users,
    process,
    serving,
    slug,
    until,
    wait_ready,
)
from conftest import settings as configured

import farm.check
import farm.clients
import farm.database
import farm.passwords
import farm.server
import farm.settings


@pytest.fixture(scope="module", autouse=True)
def doomed(server, template, tmp_path_factory):
    """A service whose workers do not start. uvicorn sees it after five seconds, so it begins before the first test."""
    folder = tmp_path_factory.mktemp("doomed")
    (folder / "sitecustomize.py").write_text(
        "import os, sys\nif 'multiprocessing.spawn' in str(sys.orig_argv): os._exit(3)  # as uvicorn does\n"
    )
    with fresh_database(server, template) as url:
        env = {"DATABASE_URL": url, "BOTFARM_KEYS": KEY, "PYTHONPATH": str(folder)}
        with process("--port", str(free_port()), "--workers", "2", env=env) as running:
            yield running


async def test_everything_that_goes_wrong_is_a_problem(api):
    assert slug(await api.get("/nowhere")) == "not-found"
    wrong = await api.put("/users")
    assert slug(wrong) == "method-not-allowed"
    assert wrong.headers["allow"] == "GET, HEAD, OPTIONS, POST"
    assert (await api.get("/users/import")).headers["allow"] == "OPTIONS, POST"
    json_type = {"Content-Type": "application/json"}
    assert slug(await api.post("/locks", content=b"{", headers=json_type)) == "malformed-body"
    assert slug(await api.post("/locks", content=b"[" * 100_000, headers=json_type)) in ("malformed-body", "invalid")
    assert slug(await api.post("/locks", content=b'{"x":' * 10_000, headers=json_type)) in ("malformed-body", "invalid")
    assert (
        slug(await api.post("/locks", content=b"a=b", headers={"Content-Type": "text/plain"}))
        == "unsupported-media-type"
    )
    assert slug(await api.post("/users", content=b" " * ((1 << 20) + 1), headers=json_type)) == "body-too-large"
    assert slug(await api.post("/locks", json={})) == "invalid"


async def test_a_body_without_an_announced_length_is_limited_too(api):
    async def endless():
        for _ in range(40):
            yield b" " * 65536

    answer = await api.post("/locks", content=endless(), headers={"Content-Type": "application/json"})
    assert slug(answer) == "body-too-large"


async def test_an_unforeseen_error_tells_only_its_id(api, project, service, monkeypatch, caplog):
    monkeypatch.setitem(farm.database.SQL, "get_user", "select 1 / 0 where $1::uuid is not null")
    answer = await api.get(f"/users/{uuid.uuid4()}")
    assert slug(answer) == "internal-error"
    assert answer.status_code == 500
    assert set(answer.json()) == {"type", "title", "status", "detail", "request_id"}
    assert "zero" not in answer.text
    assert answer.json()["request_id"] in caplog.text
    assert "DivisionByZeroError" in caplog.text


async def test_one_bad_call_in_a_batch_fails_alone(service):
    async def run(items):
        if "bad" in items:
            raise asyncpg.DataError("bad")
        return [item.upper() for item in items]

    coalescer = farm.database.Coalescer(run, 10)
    results = await asyncio.gather(*(coalescer(item) for item in ("a", "bad", "c")), return_exceptions=True)
    assert (results[0], results[2]) == ("A", "C")
    assert isinstance(results[1], asyncpg.DataError)


async def test_calls_that_arrive_while_a_statement_runs_share_the_next():
    batches = []

    async def run(items):
        batches.append(list(items))
        await asyncio.sleep(0.01)
        return items

    coalescer = farm.database.Coalescer(run, 3)
    await asyncio.gather(*(coalescer(number) for number in range(1, 3)))
    first = asyncio.ensure_future(coalescer(0))
    await asyncio.sleep(0.001)
    await asyncio.gather(first, *(coalescer(number) for number in range(1, 6)))
    assert batches == [[1, 2], [0], [1, 2, 3], [4, 5]]


async def test_with_a_batch_of_one_every_call_has_a_statement_of_its_own_at_once():
    batches, all_run = [], asyncio.Event()

    async def run(items):
        batches.append(items)
        if len(batches) == 3:
            all_run.set()
        await all_run.wait()
        return items

    coalescer = farm.database.Coalescer(run, 1)
    async with asyncio.timeout(5):
        assert await asyncio.gather(*(coalescer(number) for number in range(3))) == [0, 1, 2]
    assert batches == [[0], [1], [2]]


async def test_a_database_that_is_away_is_a_503_and_comes_back(server, empty_database, project):
    with serving(configured(empty_database)) as alone:
        async with client(alone.url) as api:
            await make_users(api, project)
            name = empty_database.rpartition("/")[2].partition("?")[0]
            away = f"{name}_away"
            cut = f"select pg_terminate_backend(pid) from pg_stat_activity where datname in ('{name}', '{away}')"
            await execute(server, f"alter database {name} allow_connections false", cut)
            assert slug(await acquire(api, project)) == "database-unavailable"
            refused = await api.get("/readyz")
            assert slug(refused) == "database-unavailable"
            assert refused.headers["retry-after"] == "1"
            assert (await api.get("/livez")).status_code == 200
            await execute(server, f"alter database {name} allow_connections true")
            for _ in range(30):  # behind a PgBouncer it takes as long as that waits between two logins
                if (back := await acquire(api, project)).status_code == 201:
                    break
                await asyncio.sleep(0.1)
            assert back.status_code == 201
            assert (await api.get("/readyz")).status_code == 200


async def test_a_missing_schema_is_not_ready(empty_database):
    with serving(configured(empty_database)) as alone:
        async with client(alone.url) as api:
            await execute(empty_database, "delete from _yoyo_migration where migration_id like '0003%'")
            assert "0003" in (await api.get("/readyz")).json()["detail"]
            await execute(empty_database, "drop table _yoyo_migration")
            assert (await api.get("/readyz")).status_code == 503


def test_all_bad_settings_are_told_in_one_message():
    env = {
        "DATABASE_URL": "mysql://x", "BOTFARM_PORT": "99999", "BOTFARM_ENVS": "a b", "BOTFARM_MAX_TTL": "x",
        "BOTFARM_KEYS": "k1:nope",
    }  # fmt: skip
    refused = command("serve", env=env)
    assert refused.returncode == 2
    for name in env:
        assert name in refused.stderr
    assert "Traceback" not in refused.stderr


def test_no_number_is_too_large_for_the_database():
    """A release with one was a 500."""
    names = [f"BOTFARM_{name}" for name in ("MAX_TTL", "MAX_WAIT", "BAD_LOGINS", "HISTORY_DAYS", "BATCH")]
    with pytest.raises(farm.settings.BadSettings) as told:
        farm.settings.Settings.load(dict.fromkeys(names, str(1 << 31)))
    assert [line.partition(":")[0] for line in str(told.value).splitlines()[1:]] == names


def test_flags_override_variables_and_secrets_come_from_files(tmp_path):
    assert "--port" in command("serve", "--help").stdout
    assert command("openapi", env={"BOTFARM_ENVS": "alpha"}).stdout.count("alpha") > 1
    (tmp_path / "keys").write_text(KEY + "\n")
    loaded = farm.settings.Settings.load({"BOTFARM_KEYS_FILE": str(tmp_path / "keys"), "BOTFARM_ENVS": "a, b"})
    assert loaded.keys
    assert loaded.keys.reveal() == KEY
    assert loaded.envs == ("a", "b")
    with pytest.raises(farm.settings.BadSettings, match="not both"):
        farm.settings.Settings.load({"BOTFARM_KEYS_FILE": "x", "BOTFARM_KEYS": KEY})
    assert command("serve", "--port", "0").returncode == 2


def test_commands_import_export_and_check_a_service(empty_database, project, tmp_path):
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"
    env = {"DATABASE_URL": empty_database, "BOTFARM_KEYS": KEY}
    assert command("check", "--url", url).returncode == 1
    with process("--port", port, "--workers", "2", env=env):
        wait_ready(url)
        assert command("check", "--port", port).returncode == 0
        file = tmp_path / "users.csv"
        file.write_text(f"login,password,project_id,env\na,p,{project},prod\nb,p,{project},prod\n")
        done = command("import", str(file), env={"BOTFARM_PORT": port})
        assert (done.returncode, json.loads(done.stdout)["created"]) == (0, 2)
        line = json.dumps({"login": "c", "project_id": project, "env": "moon", "password": "p"})
        refused = command("import", "-", "--url", url, text=line)
        assert refused.returncode == 1
        assert "line 1: env" in refused.stderr
        exported = command("export", env={"BOTFARM_PORT": port})
        assert [json.loads(text)["login"] for text in exported.stdout.splitlines()] == ["a", "b"]
    assert command("import", str(tmp_path / "none"), "--url", url).returncode == 1
    assert command("export", "--url", url).returncode == 1


def test_the_check_of_containers_imports_nothing_and_asks_no_proxy(service):
    url = urlsplit(service.url)
    env = {"BOTFARM_HOST": "0.0.0.0", "BOTFARM_PORT": str(url.port), "http_proxy": "http://127.0.0.1:9"}
    ready = python("-m", "farm.check", env=env)
    assert (ready.returncode, json.loads(ready.stdout)) == (0, {"status": "ok"})
    away = python("-m", "farm.check", env=env | {"BOTFARM_PORT": str(free_port())})
    assert (away.returncode, away.stdout) == (1, "")
    assert "does not answer: " in away.stderr
    loaded = python("-c", "import farm.check, sys; print(*sys.modules)").stdout.split()
    assert not {name.partition(".")[0] for name in loaded} & (LIBRARIES | {"asyncio", "click", "msgspec"})


@pytest.mark.parametrize("end", ["?project_id=", "/#", "?", "/x?y"])
def test_the_address_of_a_page_is_none_of_a_service(service, end, capfd):
    """Else the page would be there for the check, be the service ready or not."""
    assert farm.check.check(service.url + end) == 1
    assert f"{service.url}{end} does not answer: it is no address as http://127.0.0.1:8000" in capfd.readouterr().err


def test_what_checks_a_container_listens_where_the_service_does_if_nothing_is_set(capfd):
    defaults = farm.settings.Settings()
    assert f'"BOTFARM_HOST") or "{defaults.host}"' in (ROOT / "farm/check.py").read_text()
    assert f'"BOTFARM_PORT") or "{defaults.port}"' in (ROOT / "farm/check.py").read_text()
    assert farm.check.address("fd00::1", 80) == "http://[fd00::1]:80"
    assert farm.check.address("::", "80") == "http://[::1]:80"
    nowhere = f"127.0.0.1:{free_port()}"
    for url in (nowhere, "postgres://127.0.0.1", "http://", "http://127.0.0.1:http", "http://[::1"):
        assert farm.check.check(url) == 1
        assert f"{url} does not answer: " in capfd.readouterr().err


LIBRARIES = {"litestar", "uvicorn", "asyncpg", "psycopg", "yoyo", "httpx", "rich", "argon2", "cryptography", "jwt"}


def python(*arguments, env=None):
    """Python itself, in the folder of the service."""
    words = [sys.executable, *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT, env=os.environ | (env or {}))


def test_a_command_imports_what_it_needs_and_no_more():
    """Else `--help` takes half a second."""
    loaded = python("-c", "import farm.commands, sys; print(*sys.modules)").stdout.split()
    assert "click" in loaded
    assert not LIBRARIES & set(loaded)
    assert python("-X", "importtime", "botfarm.py", "--help").stderr.count("farm.") == 3  # commands, check, settings


@pytest.mark.parametrize("words", [["--nope"], ["nope"], ["import"], ["keygen", "x"], ["client", "add", "x"]])
def test_bad_flags_end_with_status_2(words):
    refused = command(*words)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "Usage: botfarm.py" in refused.stderr


def test_an_interrupted_command_ends_without_a_traceback():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with process("export", "--url", url) as exporting, silent.accept()[0]:
            exporting.send_signal(signal.SIGINT)
            output, _ = exporting.communicate(timeout=20)
    assert exporting.returncode == 130
    assert "Traceback" not in output


def test_a_second_ctrl_c_breaks_off_no_stop(empty_database):
    port = str(free_port())
    with process("--port", port, env={"DATABASE_URL": empty_database}) as stopping:
        wait_ready(f"http://127.0.0.1:{port}")
        for _ in range(2):
            stopping.send_signal(signal.SIGINT)
            time.sleep(0.05)
        output, _ = stopping.communicate(timeout=20)
    assert stopping.returncode == 0
    assert "Traceback" not in output


def test_the_help_of_a_new_client_names_all_scopes():
    assert f"some of {' '.join(farm.clients.SCOPES)}" in " ".join(command("client", "add", "--help").stdout.split())


def test_keygen_prints_a_key_that_works():
    assert farm.passwords.Keyring(command("keygen").stdout.strip())


def test_reseal_needs_a_key(empty_database):
    refused = command("reseal", env={"DATABASE_URL": empty_database})
    assert refused.returncode == 2
    assert "BOTFARM_KEYS" in refused.stderr


def test_every_statement_is_used_and_there():
    source = "".join(path.read_text() for path in (ROOT / "botfarm.py", *ROOT.glob("farm/*.py")))
    statements = set(farm.database.SQL)
    assert set(re.findall(r'SQL\["(\w+)"\]', source)) <= statements
    assert {name for name in statements if f'"{name}"' in source} == statements
    assert all(text.startswith("-- ") for text in farm.database.SQL.values())


async def test_the_openapi_document_declares_every_call(api):
    document = (await api.get("/docs/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    schemas = document["components"]["schemas"]
    assert set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document))) <= set(schemas)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["summary"]
            assert "422" in operation["responses"]
            assert "500" in operation["responses"]
            assert ("{id}" in path) == any(p["in"] == "path" for p in operation["parameters"])
    assert document["paths"]["/locks"]["post"]["responses"].keys() >= {
        "201",
        "400",
        "404",
        "409",
        "413",
        "415",
        "422",
        "503",
    }
    assert schemas["AcquireLock"]["properties"]["ttl"]["maximum"] == 86400
    assert schemas["Lock"]["properties"]["expires_at"] == {"type": "string", "format": "date-time"}
    assert json.loads(command("openapi").stdout) == document


async def test_the_pages_work_without_internet(api):
    """A browser takes no script and no style sheet of another type, for each reply says `nosniff`."""
    kinds = {"js": ("text/javascript", "application/javascript"), "css": ("text/css",)}
    for path in ("/", "/docs"):
        page = (await api.get(path)).text
        assert "//" not in re.sub(r"<!.*?>", "", page)
        for asset in re.findall(r'(?:href|src)="(/[^"]+)"', page):
            answer = await api.get(asset)
            assert answer.status_code == 200
            assert answer.headers["content-type"].partition(";")[0] in kinds.get(asset.rpartition(".")[2], "text/html")


@pytest.mark.parametrize(
    "name", ["%00", "swagger-ui.css%00", "swagger-ui.css/x", "swagger-ui.css%2Fx", "x" * 256, "%2e%2e"]
)
async def test_a_file_that_no_page_loads_is_not_found(api, name):
    answer = await api.get(f"/docs/assets/{name}")
    assert (answer.status_code, slug(answer)) == (404, "not-found")
    assert (await api.request("OPTIONS", "/docs/assets/x")).headers["Allow"] == "GET, HEAD, OPTIONS"


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed; CI installs it")


BANNER = """\
BotFarm serves at http://127.0.0.1:8000  (API: http://127.0.0.1:8000/docs)
create:  curl -X POST -H 'Content-Type: application/json' 'http://127.0.0.1:8000/users' -d \
'{"login": "bot-1", "password": "secret", "project_id": "11111111-1111-4111-8111-111111111111", "env": "stage"}'
acquire: curl -X POST -H 'Content-Type: application/json' 'http://127.0.0.1:8000/locks' -d \
'{"project_id": "11111111-1111-4111-8111-111111111111", "env": "stage", "holder": "me"}'
release: curl -X DELETE 'http://127.0.0.1:8000/locks?holder=me'"""


def test_the_banner_is_short_where_nothing_is_set():
    assert farm.server.banner(farm.settings.Settings()) == BANNER.replace("-d \\\n", "-d ")


@needs_curl
@pytest.mark.parametrize("allowed", [{}, {"envs": ("qa", "prod"), "domains": ("green", "blue"), "max_ttl": 60}])
def test_the_banner_has_lines_that_work(empty_database, allowed):
    lines = farm.server.banner(farm.settings.Settings(**allowed)).splitlines()[1:]
    with serving(configured(empty_database, **allowed)) as alone:
        for line, expected in zip(lines, ('"login":"bot-1"', '"password":"secret"', '{"released":1}'), strict=True):
            text = line.partition(": ")[2].strip().replace("http://127.0.0.1:8000", alone.url)
            done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=30)
            assert expected in done.stdout


@pytest.mark.parametrize(
    ("values", "sent"),
    [
        ([None, None], []),
        ([None, ""], [None, ""]),
        ([0, None], [0, None]),
        ([0, 0], [0, 0]),
        ([None, "x"], [None, "x"]),
    ],
)
def test_a_column_of_nothing_but_nulls_is_left_to_unnest(values, sent):
    assert farm.database.column(values) == sent


def test_new_ids_are_of_version_7_and_in_order():
    ids = [farm.database.new_id() for _ in range(100)]
    assert {(id.version, id.variant) for id in ids} == {(7, uuid.RFC_4122)}
    assert len(set(ids)) == 100
    assert ids[0].int >> 80 <= ids[-1].int >> 80
    assert msgspec.json.encode(ids[0])


def test_workers_that_are_told_to_stop_as_they_start_are_no_failure(empty_database, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        f"""
import os, signal, sys, time
if "multiprocessing.spawn" in str(sys.orig_argv):
    import uvicorn
    signal.signal(signal.SIGTERM, lambda *_: os._exit(3))  # as a start ends that is told to
    uvicorn.Server.run = lambda *_: (open("{tmp_path}/" + str(os.getpid()), "w"), time.sleep(60))
"""
    )
    env = {"DATABASE_URL": empty_database, "PYTHONPATH": str(tmp_path)}
    with process("--port", str(free_port()), "--workers", "2", env=env) as running:
        until(lambda: len(list(tmp_path.glob("[0-9]*"))) == 2, 30)
        running.terminate()
        assert running.wait(20) == 0


def test_workers_that_do_not_start_end_the_service_with_status_3(doomed):
    said, _ = doomed.communicate(timeout=30)
    assert doomed.returncode == 3
    assert "serves at" not in said
