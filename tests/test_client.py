"""clients/python: what it needs, and `Farm` and `Lock` against the real service, with the network that there is."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from datetime import datetime, timedelta

import botfarm_client.farm
import pytest
from botfarm_client import Farm, LockLost, Misconfigured, NoMatch, NoneFree, NotAllowed, Refused, Unreachable
from conftest import PACKAGE, command, fresh_database, serving, settings, until
from gate import PYTHON, around, create, ends, force, gate, held, history, outcomes, users

import farm.clients
import farm.settings

SOURCES = sorted((PACKAGE / "botfarm_client").glob("*.py"))


def python(script, url="", **env):
    """What a script that uses the package prints."""
    done = subprocess.run([PYTHON, "-c", script], env=around(url, **env), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- The package -------------------------------------------------------------------------------------------


def test_the_package_keeps_to_the_grammar_of_python_3_8():
    """And to its library: `.ci/run` asks vermin."""
    for path in SOURCES:
        ast.parse(path.read_text(), feature_version=(3, 8))


def test_its_parts_keep_to_the_bounds_of_the_house():
    lines = {path.name: path.read_text().count("\n") for path in SOURCES}
    assert max(lines.values()) <= 400, lines
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    assert max((node.end_lineno or 0) - node.lineno + 1 for node in functions) <= 40


def test_importing_it_loads_nothing_of_http():
    """So it takes 19 ms over bare Python, with coverage looking on."""
    loaded = python(
        "import sys; before = {*sys.modules}; import botfarm_client; print(*{*sys.modules} - before)"
    ).split()
    assert "botfarm_client.farm" in loaded
    assert not {"http.client", "ssl", "urllib.request", "json", "asyncio", "socket", "botfarm_client.run"} & {*loaded}


def test_its_wheel_installs_offline_brings_nothing_and_is_found(tmp_path, service, project, long):
    """By pytest, of its own accord; and its command runs."""
    if not long:
        pytest.skip("builds and installs a wheel: with --long")
    create(service.url, project)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = ["wheel", "--no-index", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(PACKAGE)]
    subprocess.run([*pip, *build], check=True, timeout=120)
    (wheel,) = tmp_path.glob("botfarm_client-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        held_by_it = {name for name in packed.namelist() if ".dist-info/" not in name}
        (metadata,) = (packed.read(name).decode() for name in packed.namelist() if name.endswith("/METADATA"))
    assert held_by_it == {f"botfarm_client/{name}" for name in ["py.typed", *(path.name for path in SOURCES)]}
    assert "Requires-Dist" not in metadata
    assert "Requires-Python: >=3.8" in metadata
    subprocess.run([*pip, "install", "--no-index", "--target", str(tmp_path / "there"), str(wheel)], check=True)
    env = around(service.url, PYTHONPATH=str(tmp_path / "there"))
    (tmp_path / "test_it.py").write_text("def test_it(bot):\n    assert bot.password == 'pw-0'\n")
    words = ["--botfarm-project", project, "-p", "no:cacheprovider", str(tmp_path / "test_it.py")]
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", *words], env=env, cwd=tmp_path, timeout=60)
    assert run.returncode == 0
    told = subprocess.run(
        [tmp_path / "there/bin/botfarm", "--help"], env=env, capture_output=True, text=True, check=True
    )
    assert "{exec,acquire,renew,release,status}" in told.stdout or "exec" in told.stdout


# ---- Borrowing ---------------------------------------------------------------------------------------------


@pytest.fixture
def borrow(service):
    return Farm(service.url, holder="test")


def test_a_user_is_borrowed_for_a_block_and_given_back(service, project, borrow):
    (user,) = create(service.url, project, labels={"role": "admin"})
    with borrow.user(project, env="stage", labels={"role": "admin"}) as bot:
        assert (bot.login, bot.password, bot.user_id, bot.fence) == ("bot-0", "pw-0", user["id"], 1)
        assert bot.labels == {"role": "admin"}
        assert users(service.url, project)["bot-0"]["lock"]["holder"] == "test"
        assert "pw-0" not in repr(bot) + str(vars(bot).keys())
    assert ends(service.url, user) == ["released"]


def test_a_block_that_fails_gives_its_user_back_too(service, project, borrow):
    create(service.url, project)
    with pytest.raises(ZeroDivisionError), borrow.user(project):
        raise ZeroDivisionError
    assert held(service.url, project) == []


def test_a_release_that_is_refused_can_be_said_again(service, project, borrow):
    create(service.url, project)
    lock = borrow.acquire(project)
    with pytest.raises(Refused, match="bad_login"):
        lock.release(outcome="bad_login")
    assert lock.release(outcome="bad-login")
    assert held(service.url, project) == []


def test_one_user_and_a_set_are_asked_for_by_name_and_number(service, project, borrow):
    (user, *_) = create(service.url, project, count=3)
    with borrow.user(user_id=user["id"]) as bot:
        assert bot.login == "bot-0"
    locks = borrow.acquire_set([{"project_id": project, "count": 2}, {"project_id": project, "env": "stage"}])
    assert sorted(lock.login for lock in locks) == ["bot-0", "bot-1", "bot-2"]
    assert borrow.release_holder("test", project) == 3


def test_what_is_refused_has_a_class_of_its_own(service, project, borrow):
    (user,) = create(service.url, project)
    with pytest.raises(NoMatch, match="No user at all matches"):
        borrow.acquire(project, labels={"role": "nobody"})
    with pytest.raises(Refused, match="env"):
        borrow.acquire(project, env="moon")
    with pytest.raises(Misconfigured, match="user_id names one user"):
        borrow.acquire(project, user_id=user["id"])
    with borrow.user(project) as bot:
        with pytest.raises(NoneFree, match="1 locked"):
            borrow.acquire(project, wait=0)
        with pytest.raises(NoneFree):
            borrow.acquire(user_id=user["id"], wait=0)
    with pytest.raises(LockLost, match="has ended"):
        borrow.renew(bot.id)
    with pytest.raises(Misconfigured, match="is no URL"):
        Farm("ftp://botfarm").acquire(project)


def test_a_lock_is_renewed_before_its_end_for_as_long_as_it_is_used(service, project, borrow):
    create(service.url, project)
    with borrow.user(project, ttl=1) as bot:
        first = users(service.url, project)["bot-0"]["lock"]
        until(lambda: users(service.url, project)["bot-0"]["lock"]["expires_at"] > first["expires_at"], 5)
        time.sleep(1)  # more than all of its time
        bot.check()
        assert users(service.url, project)["bot-0"]["lock"]["fence"] == first["fence"]


def test_a_lock_that_was_renewed_by_hand_for_a_shorter_time_is_renewed_sooner(service, project, borrow):
    create(service.url, project)
    with borrow.user(project, ttl=60) as bot:
        bot.renew(3)
        first = borrow.status(bot.id)["expires_at"]
        until(lambda: borrow.status(bot.id)["expires_at"] > first, 5)


def test_a_lock_that_was_waited_for_longer_than_it_lasts_has_its_time_before_it(service, project, borrow):
    """Its time runs from the grant, and the client can't know when that was."""
    create(service.url, project)
    before = borrow.acquire(project, ttl=1, heartbeat=False)
    lock = borrow.acquire(project, ttl=1, wait=20, heartbeat=False)
    told = borrow.status(lock.id)
    assert before.fence < lock.fence
    assert datetime.fromisoformat(told["expires_at"]) - datetime.fromisoformat(told["acquired_at"]) > timedelta(
        seconds=1
    )
    lock.check()
    assert lock.release()


def test_a_lock_that_is_ended_from_outside_is_lost_and_says_by_what(service, project, borrow):
    (user,) = create(service.url, project)
    told = []
    lock = borrow.acquire(project, ttl=1, heartbeat=False)
    lock.keep(told.append)
    force(service.url, user)
    until(lambda: told, 5)
    with pytest.raises(LockLost, match=r"the lock on bot-0 was lost: .*forced"):
        _ = lock.password
    assert lock.lost.ended_by == "forced"
    assert lock.release() is False
    with pytest.raises(LockLost), borrow.user(project, ttl=60):
        force(service.url, user)


def test_a_machine_that_slept_past_the_end_of_a_lock_knows_it_at_once(service, project, borrow, monkeypatch):
    """By the clock that runs on meanwhile; Linux has one of that name."""
    create(service.url, project)
    assert abs(botfarm_client.farm.clock() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 1
    lock = borrow.acquire(project, ttl=60)
    later = botfarm_client.farm.clock() + 61
    monkeypatch.setattr(botfarm_client.farm, "clock", lambda: later)
    with pytest.raises(LockLost, match="not renewed within its 60 s"):
        lock.check()
    monkeypatch.undo()
    assert borrow.release_holder("test", project) == 1


def test_who_slept_past_the_end_of_a_lock_is_told_before_any_call(service, project, monkeypatch):
    """As the network may not be there yet."""
    create(service.url, project)
    with gate(service.url) as way:
        lock, told = Farm(way.url).acquire(project, ttl=60, heartbeat=False), []
        later, asked = botfarm_client.farm.clock() + 61, len(way.sent)
        monkeypatch.setattr(botfarm_client.farm, "clock", lambda: later)
        lock.keep(told.append)
        until(lambda: told, 5)
        assert len(way.sent) == asked


FORKED = """
import os, time
from botfarm_client import Farm
farm = Farm()
lock = farm.acquire(os.environ["PROJECT"], ttl=1)
pid = os.fork()
if not pid:
    time.sleep(1.5)  # nothing renews it here, and it is not lost all the same
    lock.check()
    os._exit(0 if lock.release() else 1)
assert os.waitpid(pid, 0)[1] == 0
lock.check()
print(farm.status(lock.id)["fence"], lock.release())
"""


def test_a_forked_process_neither_loses_nor_gives_back_its_parents_lock(service, project):
    create(service.url, project)
    assert python(FORKED, service.url, PROJECT=project) == "1 True\n"


# ---- More than a password ----------------------------------------------------------------------------------


def test_a_session_is_kept_for_the_next_holder_who_is_preferred_for_it(service, project, borrow):
    create(service.url, project, count=4)
    with borrow.user(project) as first:
        assert first.session.get() is None
        first.session.put({"cookies": ["ü"]}, ttl=3600)
    with pytest.raises(LockLost):
        first.session.put("a former holder's")
    with borrow.user(project, prefer="session") as bot:
        assert bot.login == first.name
        assert bot.session.get() == {"cookies": ["ü"]}
        bot.session.delete()
        assert bot.session.get() is None
        with pytest.raises(Refused, match="262144 bytes") as caught:
            bot.session.put("x" * 300_000)
        assert caught.value.slug == "body-too-large"
        with pytest.raises(Refused, match="ttl"):
            bot.session.put("worth nothing", ttl=0)


def test_a_one_time_code_is_asked_for(service, project, borrow):
    create(
        service.url, project, labels={"factors": "2"}, totp="otpauth://totp/x?secret=JBSWY3DPEHPK3PXPJBSWY3DP&digits=8"
    )
    create(service.url, project, login="other", labels={"factors": "1"})
    with borrow.user(project, labels={"factors": "2"}) as bot:
        assert len(bot.totp()) == 8
    with borrow.user(project, labels={"factors": "1"}) as bot, pytest.raises(Refused) as caught:
        bot.totp()
    assert caught.value.slug == "no-totp"


def test_the_history_has_how_it_went_and_for_whom_and_why(service, project, borrow):
    (user,) = create(service.url, project)
    for outcome in ("passed", "failed", None, "bad-login"):
        with borrow.user(project, note="nightly 4711") as bot:
            bot.release(outcome=outcome)
    with borrow.user(project, note="nightly 4711") as bot:
        bot.renew(1800, holder="ada", note="basket is empty")
        assert (bot.ttl, bot.data["holder"], bot.data["note"]) == (1800, "ada", "basket is empty")
        assert borrow.release_holder("test", project) == 0
    assert outcomes(service.url, user) == ["passed", "failed", None, "bad-login", None]
    told = [(lock["holder"], lock["note"]) for lock in history(service.url, user)]
    assert told == [("test", "nightly 4711")] * 4 + [("ada", "basket is empty")]


def test_where_only_hashes_are_stored_it_goes_on_without_sessions_and_says_so(empty_database, project):
    with serving(settings(empty_database, keys=None)) as alone:
        create(alone.url, project)
        with Farm(alone.url).user(project, prefer="session") as bot:
            with pytest.warns(UserWarning, match=r"no session is kept.*BOTFARM_KEYS"):
                assert bot.session.get() is None
            with pytest.warns(UserWarning, match="no session is kept"):
                bot.session.put({})
            with pytest.raises(Refused, match="BOTFARM_KEYS"):
                bot.totp()


# ---- The network -------------------------------------------------------------------------------------------


@pytest.fixture
def way(service):
    with gate(service.url) as opened:
        yield opened


BUSY = b'{"type": "urn:botfarm:database-unavailable", "detail": "The database does not answer.", "status": 503}'
AWAY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: %d\r\n\r\n%s" % (len(BUSY), BUSY)
STRANGE = b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nnot found"


@pytest.mark.parametrize("says", [b"", AWAY, STRANGE], ids=["reset", "503", "404 of a proxy"])
def test_a_service_that_is_away_for_less_than_a_ttl_costs_no_lock(service, project, way, says):
    (user,) = create(service.url, project)
    lock = Farm(way.url).acquire(project, ttl=3)
    way.says, tries = says, len(way.sent)
    until(lambda: len(way.sent) >= tries + 2, 5)
    way.says = None
    before = users(service.url, project)["bot-0"]["lock"]["expires_at"]
    until(lambda: users(service.url, project)["bot-0"]["lock"]["expires_at"] > before, 5)
    assert lock.release()
    assert ends(service.url, user) == ["released"]


def test_a_service_that_is_away_for_longer_than_a_ttl_costs_the_lock(service, project, way):
    create(service.url, project)
    lock = Farm(way.url).acquire(project, ttl=1, heartbeat=False)
    told = []
    lock.keep(lambda lost: told.append(time.monotonic()))
    started, way.says = time.monotonic(), b""
    until(lambda: told, 10)
    assert told[0] - started < 5
    with pytest.raises(LockLost, match=r"not renewed within its 1 s: BotFarm at .* can't be reached"):
        lock.check()


def test_a_lock_that_runs_out_while_the_service_does_not_hear_of_its_release_was_not_lost(service, project, way):
    (user,) = create(service.url, project)
    lock = Farm(way.url).acquire(project, ttl=1)
    way.says = b""
    threading.Timer(1.5, setattr, (way, "says", None)).start()
    assert lock.release()
    assert lock.release(), "as it had been given back"
    assert ends(service.url, user) == ["expired"]


def test_a_renewal_that_is_answered_as_by_another_service_costs_the_lock_and_is_told(service, project, way):
    create(service.url, project)
    lock, told = Farm(way.url).acquire(project, ttl=1, heartbeat=False), []
    lock.keep(told.append)
    way.says = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    until(lambda: told, 5)
    with pytest.raises(LockLost, match=r"not renewed within its 1 s: KeyError"):
        lock.check()


def test_a_token_that_has_ended_makes_no_loss_known_later(service, project, way):
    """The service is silent, also to who asks for a token."""
    create(service.url, project)
    there, told = Farm(way.url, client_id="ci", client_secret="secret"), []
    lock = there.acquire(project, ttl=1, heartbeat=False)
    there.wire._token = ("has ended", time.monotonic())
    way.silent = True
    lock.keep(told.append)
    until(lambda: told, 5)


def test_a_reply_that_is_lost_costs_no_user(service, project, way):
    (user,) = create(service.url, project)
    way.loses = 1
    with Farm(way.url).user(project) as bot:
        assert bot.password == "pw-0"
        way.loses = 1  # that of the release
    assert ends(service.url, user) == ["released"]
    assert [request.split(b" ")[0] for request in way.sent] == [b"POST", b"POST", b"DELETE", b"DELETE"]


def test_a_lock_that_ended_before_its_reply_came_is_asked_for_anew(service, project, way):
    (user,) = create(service.url, project)
    way.late = [1.3]
    lock = Farm(way.url).acquire(project, ttl=1, wait=5)
    lock.check()
    assert lock.release()
    assert ends(service.url, user) == ["expired", "released"]


def test_who_asks_goes_on_while_the_service_is_away(service, project, way):
    create(service.url, project)
    way.says = AWAY

    def open_later():
        until(lambda: len(way.sent) >= 2, 10)
        way.says = None

    threading.Thread(target=open_later).start()
    with Farm(way.url).user(project, wait=5) as bot:
        assert bot.login == "bot-0"
    way.says = b""
    started = time.monotonic()
    with pytest.raises(Unreachable, match="can't be reached"):
        botfarm_client.farm.persist(lambda: Farm(way.url).wire.call("GET", "/livez"), 1)
    assert 1 <= time.monotonic() - started < 5


def test_who_waits_goes_on_however_often_the_service_restarts_meanwhile(service, project, way, monkeypatch):
    """Here it is away for longer than an acquire is patient, but each time for less."""
    monkeypatch.setattr(botfarm_client.farm, "PATIENCE", 1)
    monkeypatch.setattr(botfarm_client.farm, "THERE", 1)
    create(service.url, project)
    holding = Farm(service.url).acquire(project)
    waits = threading.Thread(target=lambda: Farm(way.url).acquire(project, wait=20).release())
    waits.start()
    for times in (1, 2):
        until(lambda asked=times: len(way.sent) == asked, 5)
        time.sleep(1.2)
        way.cut()
    until(lambda: len(way.sent) == 3, 5)
    holding.release()
    waits.join(10)
    assert way.sent[-1].startswith(b"DELETE /locks/")
    assert held(service.url, project) == []


def test_a_url_may_have_a_path_and_end_in_slashes_or_a_line(service, project, way):
    create(service.url, project)
    for end in ("/", "//\n"):
        with Farm(f" {service.url}{end}").user(project) as bot:
            assert bot.password == "pw-0"
    way.says = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    Farm(f"{way.url}/farm/").status("ü/ ?x")
    assert way.sent[0].startswith(b"GET /farm/locks/%C3%BC/%20?x HTTP/1.1")


@pytest.mark.parametrize("url", ["http://bot..farm", "http://ферма.example", "http://botfarm/ü"])
def test_a_url_that_can_not_be_called_is_told_of_at_once(url):
    with pytest.raises(Misconfigured, match=f"{url}, or the proxy before it, is no address"):
        Farm(url).status("x")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_a_service_is_known_by_its_certificate(project, tmp_path):
    """One of an unknown maker is not spoken to; SSL_CERT_FILE makes it known. Also at an address of IPv6."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-nodes", "-newkey", "rsa:2048", "-days", "2", "-subj", "/CN=botfarm"]
    make += ["-addext", "subjectAltName=IP:::1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True)
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)

        def answer():
            for _ in range(2):
                with contextlib.suppress(ssl.SSLError), context.wrap_socket(listener.accept()[0], True) as caller:
                    caller.recv(65536)
                    caller.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

        threading.Thread(target=answer, daemon=True).start()
        url = f"https://[::1]:{listener.getsockname()[1]}"
        with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
            Farm(url).wire.call("GET", "/readyz")
        script = "from botfarm_client import Farm; print(Farm().status('x'))"
        assert python(script, url, SSL_CERT_FILE=str(certificate)) == "{}\n"


def test_a_proxy_of_the_environment_is_used(service, way):
    way.says = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    script = "from botfarm_client import Farm; print(Farm('http://botfarm.example').status('x'))"
    assert python(script, http_proxy=way.url) == "{}\n"
    assert way.sent[0].startswith(b"GET http://botfarm.example/locks/x HTTP/1.1\r\n")


def test_a_proxy_that_is_none_is_told_of_without_its_password(service):
    script = "from botfarm_client import Farm; Farm().status('x')"
    env = around("http://botfarm.example", http_proxy="http:/me:secret@proxy")
    done = subprocess.run([PYTHON, "-c", script], env=env, capture_output=True, text=True, check=False, timeout=60)
    assert "Misconfigured: http://botfarm.example, or the proxy before it, is no address" in done.stderr
    assert "secret" not in done.stderr


def test_a_service_that_sends_callers_on_is_told_of_and_not_followed(way):
    way.says = b"HTTP/1.1 301 Moved\r\nLocation: https://elsewhere.example\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(Misconfigured, match=r"https://elsewhere\.example"):
        Farm(way.url).status("x")
    assert len(way.sent) == 1


# ---- Who calls ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(server):
    """The URL of a service with authentication, its database's, and a client of it."""
    secured = {"auth": "on", "signing_keys": farm.settings.Secret("s1:" + "B" * 43 + "=")}
    with fresh_database(server) as url, serving(settings(url, **secured)) as running:
        made = command("client", "add", "ci", "--scope", "users:write locks", env={"DATABASE_URL": url})
        yield running.url, json.loads(made.stdout)


def test_a_client_is_known_by_its_secret(guarded, project):
    url, who = guarded
    known = {name: who[name] for name in ("client_id", "client_secret")}
    with gate(url) as way:
        farm_there = Farm(way.url, id_token="not used beside a secret", **known)
        body = {"login": "ada", "password": "pw", "project_id": project, "env": "stage"}
        farm_there.wire.call("POST", "/users", body)
        with farm_there.user(project) as bot:
            assert bot.password == "pw"
        calls = [request.split(b" HTTP")[0] for request in way.sent]
        assert calls[:3] == [b"POST /users", b"POST /token", b"POST /users"]
        assert calls.count(b"POST /token") == 1
        assert b"not+used" not in b"".join(way.sent)
        farm_there.wire._token = ("a token that has ended", time.monotonic() + 60)
        with farm_there.user(project) as bot:
            assert bot.password == "pw"
    assert b"POST /token" in [request.split(b" HTTP")[0] for request in way.sent[len(calls) :]]


def test_a_lock_is_renewed_for_longer_than_a_token_is_valid(guarded, project, monkeypatch):
    """Whether the client knows its token's end, or is told of it. The end is a whole second: 2 are one at least."""
    monkeypatch.setattr(farm.clients.Gate, "LIFE", 2)
    monkeypatch.setattr(farm.clients.Gate, "LEEWAY", 0)
    monkeypatch.setattr(farm.clients.Gate, "CHECKED", 0)
    url, who = guarded
    known = {name: who[name] for name in ("client_id", "client_secret")}
    with gate(url) as way:
        farm_there = Farm(way.url, **known)
        farm_there.wire.call("POST", "/users", {"login": "b", "password": "p", "project_id": project, "env": "stage"})
        with farm_there.user(project, ttl=3) as bot:
            tokens = len([request for request in way.sent if request.startswith(b"POST /token")])
            time.sleep(3.5)
            farm_there.wire._token = (farm_there.wire._token[0], time.monotonic() + 60)
            time.sleep(3.5)
            bot.check()
    assert len([request for request in way.sent if request.startswith(b"POST /token")]) >= tokens + 2


def test_who_is_not_known_is_told_what_to_set(guarded, project):
    url, who = guarded
    with pytest.raises(NotAllowed, match="set BOTFARM_CLIENT_ID and BOTFARM_CLIENT_SECRET"):
        Farm(url).acquire(project)
    with pytest.raises(NotAllowed, match="invalid_client") as caught:
        Farm(url, client_id=who["client_id"], client_secret="guessed").acquire(project)
    assert "guessed" not in str(caught.value)
    with pytest.raises(Misconfigured, match="set BOTFARM_CLIENT_ID, too"):
        Farm(url, client_secret="guessed").acquire(project)


def test_an_id_token_is_exchanged(guarded, project):
    url, _ = guarded
    with gate(url) as way, pytest.raises(NotAllowed, match="gives no token"):
        Farm(way.url, id_token="of.an.issuer").acquire(project)  # this service trusts none
    form = way.sent[1].partition(b"\r\n\r\n")[2]
    assert b"grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Atoken-exchange" in form
    assert b"subject_token=of.an.issuer&subject_token_type=urn%3Aietf%3Aparams%3Aoauth%3Atoken-type%3Ajwt" in form


def test_a_service_without_authentication_is_sent_no_secret(service, project, way):
    create(service.url, project)
    for known in ({"client_id": "ci", "client_secret": "much secret"}, {"id_token": "much secret"}):
        with Farm(way.url, **known).user(project):
            pass
    assert b"secret" not in b"".join(way.sent)
    assert b"/token" not in b"".join(way.sent)


TRACED = """
import json, os, signal, socket, time
from botfarm_client import Farm

URL, AWAY = os.environ["BOTFARM_URL"], "http://127.0.0.1:1"
WHO, SHORT = json.loads(os.environ["WHO"]), {"ttl": 60, "wait": 0}

def with_a_token(url):
    farm = Farm(url, **WHO)
    farm.wire._token = (WHO["id_token"], time.monotonic() + 60)
    return farm

def test_no_url():
    os.environ.pop("BOTFARM_URL")
    Farm(**WHO)

def test_a_url_that_is_none():
    Farm("botfarm", **WHO).acquire()

def test_no_client():
    Farm(URL, **{**WHO, "client_id": None}).acquire()

def test_refused():
    Farm(URL, **WHO).acquire("x")

def test_away():
    with_a_token(AWAY).acquire("x", **SHORT)

def test_away_when_asked_for_a_token():
    Farm(AWAY, **WHO).wire._fetch_token()

def test_cut_short():
    def stop(*_): raise AssertionError("too late")
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with_a_token(f"http://127.0.0.1:{silent.getsockname()[1]}").acquire("x")
"""


@pytest.mark.parametrize("style", ["auto", "short"])
def test_no_secret_is_in_a_traceback_that_shows_variables(guarded, tmp_path, style):
    url, who = guarded
    (tmp_path / "test_it.py").write_text(TRACED)
    secrets = {"client_secret": "the-secret", "id_token": "the-token"}
    env = around(url, WHO=json.dumps({"client_id": who["client_id"], **secrets}), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    words = ["-l", f"--tb={style}", "-p", "no:cacheprovider", "test_it.py"]
    pipes = {"stdout": subprocess.PIPE, "text": True, "timeout": 60}
    done = subprocess.run([PYTHON, "-m", "pytest", *words], env=env, cwd=tmp_path, check=False, **pipes)
    assert "7 failed" in done.stdout
    assert re.findall(r".*the-secret.*|.*the-token.*", done.stdout) == []
