"""The pytest plugin: what its fixtures give, and when a user is free again, with and without xdist."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from xml.etree import ElementTree

import httpx
import pytest
from conftest import PACKAGE, long_chapter, serving, settings, until
from gate import PYTHON, around, create, ends, gate, held, history, outcomes, restartable, seconds_until_free, users

long_chapter("lets runs of pytest end in all ways for a minute")

XDIST = ["-p", "xdist.plugin", "-n", "2"]
each_way = pytest.mark.parametrize("way", [[], XDIST], ids=["plain", "xdist"])
SLEEPS = """
import os, time

def test_sleeps(bot):
    open("ready.new", "w").write(str(os.getpid()))
    os.rename("ready.new", "ready")
    time.sleep(60)
"""


@pytest.fixture
def suite(service, project, tmp_path):
    """Starts pytest in a folder of its own."""

    def start(source, *words, url=service.url, ttl=2, by=(), **env):
        (tmp_path / "pytest.ini").write_text(f"[pytest]\nbotfarm_project = {project}\nbotfarm_wait = 5\n")
        (tmp_path / "test_it.py").write_text(source)
        inherited = {name: value for name, value in around(url, **env).items() if not name.startswith("PYTEST_")}
        env = inherited | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        options = ["-p", "botfarm_client.pytest_plugin", "-p", "no:cacheprovider", f"--botfarm-ttl={ttl}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        return subprocess.Popen([*by, PYTHON, "-m", "pytest", *options, *words], env=env, cwd=tmp_path, **pipes)

    return start


@pytest.fixture
def run(suite):
    """Runs pytest to its end: its exit status and what it tells."""

    def to_the_end(*words, **options):
        started = suite(*words, **options)
        try:
            told, _ = started.communicate(timeout=60)
        finally:
            started.kill()
        return started.returncode, told

    return to_the_end


@contextmanager
def asleep(suite, tmp_path, *words, source=SLEEPS, **options):
    """pytest in the midst of a test that has a user, and the process that it runs in."""
    started = suite(source, *words, **options)
    try:
        until(lambda: (tmp_path / "ready").exists() or started.poll() is not None, 30)
        assert started.poll() is None, started.stdout.read()
        started.worker = int((tmp_path / "ready").read_text())
        yield started
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.communicate()


# ---- Fixtures ----------------------------------------------------------------------------------------------

SHOP = """
import pytest

@pytest.fixture(scope="session")
def bot_filter():
    return {"env": "stage", "labels": {"shop": "1"}, "note": "run 7"}

@pytest.mark.bot(labels={"role": "admin"})
def test_a_marker_says_what_the_user_has_to_be(bot):
    assert (bot.login, bot.password, bot.labels) == ("admin", "pw", {"shop": "1", "role": "admin"})

def test_a_set_comes_together(bots):
    seller, *buyers = bots.set({"labels": {"role": "admin"}}, {"labels": {"role": "buyer"}, "count": 2})
    assert seller.login == "admin"
    assert {buyer.labels["role"] for buyer in buyers} == {"buyer"}
    assert len({lock.user_id for lock in (seller, *buyers)}) == 3
    assert {lock.data["note"] for lock in (seller, *buyers)} == {"run 7"}

def test_of_a_set_no_part_is_this_very_user(bots):
    bots.set({"user_id": "x"})

def test_more_are_made_as_wanted(bot, bots):
    assert bots(labels={"role": "buyer"}).user_id != bot.user_id

def test_fails(worker_bot):
    assert worker_bot.password == "wrong"

@pytest.mark.bot(labels={"role": "nobody"})
def test_nobody(bot):
    pass

@pytest.mark.bot(colour="red")
def test_unknown(bot):
    pass

@pytest.mark.bot({"role": "admin"})
def test_nameless(bot):
    pass

@pytest.mark.bot(labels="role=admin")
def test_labels(bot):
    pass

@pytest.mark.bot(wait="5")
def test_wait(bot):
    pass

def test_of_a_set_each_part_has_names(bots):
    bots.set("admin")
"""


@each_way
def test_the_fixtures_give_users_and_the_reports_name_them(service, project, run, tmp_path, way):
    create(service.url, project, login="admin", password="pw", labels={"shop": "1", "role": "admin"})
    for name in ("b1", "b2", "b3", "b4"):
        create(service.url, project, login=name, password="pw", labels={"shop": "1", "role": "buyer"})
    create(service.url, project, login="other", labels={"shop": "2", "role": "buyer"})
    status, told = run(SHOP, "--junitxml=report.xml", *way, *(["--dist", "loadfile"] if way else []))
    assert status == 1, told
    assert "3 failed, 3 passed, 5 errors" in told
    assert re.search(r"^_+ test_fails as (admin|b\d) _+$", told, re.M)
    assert "botfarm: No user at all matches" in told
    assert "botfarm: a bot has no colour: it can be asked for by project_id, env," in told
    assert "botfarm: a bot has no {'role': 'admin'}: it can be asked for by project_id, env," in told
    assert "botfarm: a bot has no user_id: it can be asked for by project_id, env, domain, labels, count" in told
    assert """botfarm: labels of a bot are 'role=admin': they have to be a dict as {"role": "admin"}""" in told
    assert "botfarm: wait of a bot is '5': it has to be a number of seconds" in told
    assert """botfarm: a bot is asked for by 'admin': it has to be a dict as {"env": "stage"}""" in told
    assert "botfarm_client/" not in told  # no traceback shows our own lines
    report = ElementTree.parse(tmp_path / "report.xml").getroot()
    logins = {case.get("name"): [tag.get("value") for tag in case.iter("property")] for case in report.iter("testcase")}
    assert logins["test_a_marker_says_what_the_user_has_to_be"] == ["admin"]
    assert logins["test_a_set_comes_together"][0] == "admin"
    assert [len(logins[name]) for name in ("test_a_set_comes_together", "test_fails", "test_nobody")] == [3, 1, 0]
    assert held(service.url, project) == []


def locks(url, project):
    """All that there were."""
    return [lock for user in users(url, project).values() for lock in history(url, user)]


def holders(url, project):
    return {lock["holder"] for lock in locks(url, project)}


@each_way
def test_all_of_a_run_has_one_holder(service, project, run, way):
    create(service.url, project, count=2)
    source = "def test_a(bot): pass\ndef test_b(bot): pass\n"
    assert run(source, *way)[0] == 0
    (holder,) = holders(service.url, project)
    assert re.fullmatch(r"pytest/[0-9a-f]{32}", holder)
    assert run(source, *way, BOTFARM_HOLDER="ci-4711")[0] == 0
    assert holders(service.url, project) == {holder, "ci-4711"}
    assert [lock["ended_by"] for lock in locks(service.url, project)] == ["released"] * 4


def test_a_test_that_runs_again_gets_another_user(service, project, run, tmp_path):
    """As pytest-rerunfailures does it. The other one comes free later than the first, which would be picked again."""
    _, other = create(service.url, project, count=2)
    httpx.put(f"{service.url}/users/{other['id']}/lock").raise_for_status()
    (tmp_path / "conftest.py").write_text("""
import os, urllib.request
from _pytest.runner import runtestprotocol

def pytest_runtest_protocol(item, nextitem):
    for _ in range(2):
        item._initrequest()
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        urllib.request.urlopen(urllib.request.Request(os.environ["OTHER"], method="DELETE"))
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    return True
""")
    source = "logins = []\ndef test_it(bot):\n    logins.append(bot.login)\n    assert not logins, logins\n"
    status, told = run(source, OTHER=f"{service.url}/users/{other['id']}/lock")
    assert status == 1
    assert "AssertionError: ['bot-0', 'bot-1']" in told
    assert re.search(r"^_+ test_it as bot-1 _+$", told, re.M)  # the last one alone
    assert held(service.url, project) == []


def test_a_suite_that_borrows_nothing_calls_nobody(service, run):
    with gate(service.url) as way:
        assert run("def test_it(): pass\n", url=way.url)[0] == 0
        assert way.sent == []
    assert run("def test_it(): pass\n", url="")[0] == 0
    status, told = run("def test_it(bot): pass\n", "--override-ini=botfarm_project=", url=service.url)
    assert status == 1
    assert "botfarm: no project is named: set --botfarm-project, or the ini key botfarm_project" in told
    status, told = run("def test_it(bot): pass\n", url="")
    assert status == 1
    assert "botfarm: no BotFarm is named: set BOTFARM_URL, --botfarm-url, or the ini key botfarm_url" in told


LOGS_IN = """
import pytest

@pytest.fixture
def account(bot, bot_session):
    if callable(bot_session):
        open("logins", "a").write(f"{bot.login} ")
        bot_session = bot_session({"sid": bot.login}, ttl=3600)
    return bot_session["sid"] == bot.login

@pytest.mark.parametrize("n", range(8))
def test_it(account, n):
    assert account
"""


@each_way
def test_a_test_is_logged_in_by_the_session_of_one_before(service, project, run, tmp_path, way):
    create(service.url, project, count=4)
    for _ in range(2):
        status, told = run(LOGS_IN, *way)
        assert status == 0, told
    logins = (tmp_path / "logins").read_text().split()
    assert 1 <= len(logins) == len(set(logins)) <= (2 if way else 1)


def test_where_only_hashes_are_stored_each_test_logs_in_and_the_run_says_why(empty_database, project, run, tmp_path):
    with serving(settings(empty_database, keys=None)) as alone:
        create(alone.url, project)
        status, told = run(LOGS_IN, url=alone.url)
    assert (status, (tmp_path / "logins").read_text()) == (0, "bot-0 " * 8), told
    assert "UserWarning: botfarm: no session is kept. Hashes alone are stored here" in told


WENT = """
import pytest

pytestmark = pytest.mark.bot(labels={"first": "1"})

@pytest.fixture
def logged_in(bot):
    raise RuntimeError("no")

def test_1_passes(bot): pass
def test_2_fails(bot): assert 0
def test_3_fails_before(logged_in): pass
def test_4_is_skipped(bot): pytest.skip("not today")
@pytest.mark.xfail
def test_5_fails_as_expected(bot): assert 0
def test_6_tells_it_itself(bot): bot.release(outcome="bad-login")
def test_7_has_two(bot, bots):
    bots(labels={"second": "1"})
    assert 0
def test_8_is_stopped(bot): raise KeyboardInterrupt
"""


@each_way
def test_a_user_is_given_back_with_how_the_test_went(service, project, run, way):
    (user,) = create(service.url, project, labels={"first": "1"})
    (second,) = create(service.url, project, login="second", labels={"second": "1"})
    status, told = run(WENT, *way, *(["--dist", "loadfile"] if way else []))
    assert status == 2, told
    assert outcomes(service.url, user) == ["passed", "failed", "failed", None, None, "bad-login", "failed", None]
    assert outcomes(service.url, second) == ["failed"]


# ---- However it ends ---------------------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("words", [[], ["-x"]], ids=["to the end", "-x"])
def test_a_test_that_fails_gives_its_user_back(service, project, run, way, words):
    (user,) = create(service.url, project)
    assert run("def test_it(bot): assert 0\n", *way, *words, ttl=60)[0] in (1, 2)
    assert held(service.url, project) == []
    assert ends(service.url, user) == ["released"]


def to_group(run):
    os.killpg(run.pid, signal.SIGINT)


def to_controller(number):
    return lambda run: os.kill(run.pid, number)


def kill_worker(run):
    os.kill(run.worker, signal.SIGKILL)


END = {
    "SIGINT to the group": to_group,
    "SIGINT to the controller": to_controller(signal.SIGINT),
    "SIGTERM to the controller": to_controller(signal.SIGTERM),
    "kill -9 of the worker": kill_worker,
    "kill -9 of the controller": to_controller(signal.SIGKILL),
}


@pytest.mark.parametrize("end", END)
def test_a_plain_run_that_is_ended_frees_its_user(service, project, suite, tmp_path, end):
    """By its own hand where it has one left, else by the ttl."""
    (user,) = create(service.url, project)
    killed = "kill" in end
    with asleep(suite, tmp_path, ttl=2 if killed else 60) as run:
        END[end](run)
        assert seconds_until_free(service.url, project, 10) < (4 if killed else 10)
        run.wait(5)
    assert ends(service.url, user) == ["expired" if killed else "released"]


@pytest.mark.parametrize("end", END)
def test_a_run_of_xdist_that_is_ended_frees_its_user(service, project, suite, tmp_path, end):
    """Also where only workers are left, who notice and end 5 s later."""
    (user,) = create(service.url, project)
    with asleep(suite, tmp_path, *XDIST, ttl=60) as run:
        END[end](run)
        assert seconds_until_free(service.url, project, 20) < 15
        run.wait(20)
    assert ends(service.url, user) == ["released"]


def test_a_worker_that_no_sigint_reaches_stops_renewing_when_its_controller_is_gone(service, project, suite, tmp_path):
    """As behind `&` in a script. The signal is what ends it otherwise."""
    (user,) = create(service.url, project)
    ignoring = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"]
    with asleep(suite, tmp_path, *XDIST, ttl=2, by=ignoring) as run:
        os.kill(run.pid, signal.SIGKILL)
        assert seconds_until_free(service.url, project, 10) < 4  # no renewal came after those that were on their way
        until(lambda: not os.path.exists(f"/proc/{run.worker}"), 10)  # its test has failed, and nobody is told
    assert ends(service.url, user) == ["expired"]


@pytest.fixture(scope="session")
def timeouts(tmp_path_factory):
    """Where pytest-timeout is."""
    there = tmp_path_factory.mktemp("timeouts")
    pip = [PYTHON, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target"]
    subprocess.run([*pip, there, "pytest-timeout==2.4.0"], check=True, timeout=120)
    return there


@each_way
def test_a_test_that_pytest_timeout_ends_by_its_thread_frees_its_user(service, project, suite, tmp_path, timeouts, way):
    """It ends the process as a kill does, so the ttl frees it, or the controller of xdist at the end of the run."""
    (user,) = create(service.url, project)
    words = [*way, "-p", "pytest_timeout", "--timeout=1", "--timeout-method=thread"]
    with asleep(suite, tmp_path, *words, ttl=60 if way else 3, PYTHONPATH=f"{PACKAGE}:{timeouts}") as run:
        assert seconds_until_free(service.url, project, 20) < (15 if way else 6)
        assert run.wait(5) == 1
    assert ends(service.url, user) == ["released" if way else "expired"]


# ---- A lock that is lost -----------------------------------------------------------------------------------

LOST = """
import os, signal, time, urllib.request

def force(user_id):
    url = os.environ["BOTFARM_URL"] + f"/users/{user_id}/lock"
    urllib.request.urlopen(urllib.request.Request(url, method="DELETE"))

def test_is_cut_short(bot):
    force(bot.user_id)
    started = time.monotonic()
    try:
        time.sleep(30)
    finally:
        open("seconds", "w").write(str(time.monotonic() - started))

def test_is_cut_short_in_a_call_too(bot):
    import socket
    force(bot.user_id)
    a, b = socket.socketpair()
    a.recv(1)

def test_catches_all_there_is(bot):
    force(bot.user_id)
    try:
        time.sleep(30)
    except:
        pass

def test_goes_on_unhurt(bot):
    time.sleep(1)

def test_with_a_handler_of_its_own_fails_at_its_end(bot):
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    force(bot.user_id)
    time.sleep(1.2)
    signal.signal(signal.SIGUSR2, before)

def test_with_a_handler_of_its_own_fails_where_it_asks(bot):
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    force(bot.user_id)
    time.sleep(1.2)
    signal.signal(signal.SIGUSR2, before)
    bot.login
    open("not reached", "w")

def test_with_a_worker_bot(worker_bot):
    force(worker_bot.user_id)
    time.sleep(30)

def test_with_the_same_worker_bot(worker_bot):
    open("not reached", "w")

def test_without(): pass
"""


@each_way
def test_a_lost_lock_fails_the_test_at_once(service, project, run, tmp_path, way):
    create(service.url, project, count=2)
    words = [*way, "--dist", "loadfile"] if way else []
    status, told = run(LOST, *words, ttl=1)
    assert status == 1
    assert "6 failed, 2 passed, 1 error in" in told, told  # the error: a worker_bot that is lost is of no use any more
    assert told.count("botfarm: the lock on bot-") >= 6
    assert "_fail_for" not in told
    assert "forced at" in told
    assert float((tmp_path / "seconds").read_text()) < 5
    assert not (tmp_path / "not reached").exists()
    assert sorted(lock["ended_by"] for lock in locks(service.url, project)) == ["forced"] * 6 + ["released"]


@each_way
def test_a_network_that_is_away_for_20_s_fails_no_test(service, project, suite, tmp_path, way):
    (user,) = create(service.url, project)
    with gate(service.url) as opened:
        source = SLEEPS.replace("60", "32")
        with asleep(suite, tmp_path, *way, source=source, url=opened.url, ttl=30) as run:
            sent = len(opened.sent)
            until(lambda: len(opened.sent) > sent, 15)  # it has been renewed
            opened.silent = True
            time.sleep(20)
            opened.silent = False
            assert run.wait(60) == 0, run.stdout.read()
    assert ends(service.url, user) == ["released"]


@each_way
def test_a_restart_of_the_service_fails_no_test(empty_database, project, suite, tmp_path, way):
    with restartable(empty_database) as (url, restart):
        (user,) = create(url, project)
        with asleep(suite, tmp_path, *way, source=SLEEPS.replace("60", "12"), url=url, ttl=10) as run:
            restart(3.5)  # it would have been renewed meanwhile
            before = users(url, project)["bot-0"]["lock"]["expires_at"]
            until(lambda: users(url, project)["bot-0"]["lock"]["expires_at"] > before, 5)
            assert run.wait(30) == 0, run.stdout.read()
        assert ends(url, user) == ["released"]


@each_way
def test_a_test_that_slept_past_the_end_of_its_lock_fails_on_waking(service, project, suite, tmp_path, way):
    """As the machine does: here all processes of the run are stopped."""
    (user,) = create(service.url, project)
    with asleep(suite, tmp_path, *way, ttl=2) as run:
        os.killpg(run.pid, signal.SIGSTOP)
        time.sleep(3)
        os.killpg(run.pid, signal.SIGCONT)
        assert run.wait(5) == 1
        assert "botfarm: the lock on bot-0 was lost: " in run.stdout.read()
    assert ends(service.url, user) == ["expired"]


FORKS = """
import os, signal, time

def test_forks(bot):
    told, tells = os.pipe()
    pid = os.fork()
    while not pid:
        os.write(tells, b"!")  # it runs: Python drops signals that come while it forks
        time.sleep(0.05)
    os.read(told, 1)
    os.kill(pid, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM
    bot.check()
"""


def test_a_process_that_a_test_forks_ends_by_sigterm_as_ever(service, project, run):
    (user,) = create(service.url, project)
    status, told = run(FORKS)
    assert status == 0, told
    assert ends(service.url, user) == ["released"]


# As pytest-forked does it: each test in a process of its own, which tells how it went.
FORKED = """
import os
from _pytest.runner import runtestprotocol

def pytest_runtest_protocol(item, nextitem):
    pid = os.fork()
    if not pid:
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        open("told", "w").write(" ".join(report.outcome for report in reports))
        os._exit(0)
    os.waitpid(pid, 0)
    return True
"""


@each_way
def test_a_test_that_is_forked_keeps_its_user(service, project, run, tmp_path, way):
    (user,) = create(service.url, project)
    (tmp_path / "conftest.py").write_text(FORKED)
    run("import time\ndef test_it(bot): time.sleep(3)\n", *way, "-W", "ignore::DeprecationWarning")
    assert (tmp_path / "told").read_text() == "passed passed passed"
    assert ends(service.url, user) == ["released"]
