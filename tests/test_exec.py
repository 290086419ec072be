"""`botfarm exec` and the commands beside it, as processes against the real service."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from botfarm_client import Farm
from conftest import free_port, long_chapter, serving, settings, until
from gate import (
    PYTHON,
    around,
    create,
    ends,
    force,
    gate,
    held,
    history,
    outcomes,
    restartable,
    seconds_until_free,
    users,
)

from farm.settings import Secret

long_chapter("waits for the ends of processes for a minute")

BOTFARM = [PYTHON, "-m", "botfarm_client.command"]
# The same with its times a fourteenth: half a second to TERM, a third of one to KILL.
HASTY = "import botfarm_client.run as r, botfarm_client.command as c; r.TERM_AFTER, r.KILL_AFTER = 0.5, 0.35; c.main()"


def botfarm(url, *words, **env):
    """`botfarm …` to its end."""
    return subprocess.run([*BOTFARM, *words], env=around(url, **env), capture_output=True, text=True, timeout=60)


@contextmanager
def running(url, *words, hasty=False):
    """`botfarm exec … -- sh -c SCRIPT` in the midst of it, once the script has said that it is ready, its pid first."""
    start = [PYTHON, "-c", HASTY] if hasty else BOTFARM
    with tempfile.TemporaryFile("w+") as told:
        started = subprocess.Popen(
            [*start, "exec", *words],
            env=around(url),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=told,
            text=True,
        )
        try:
            started.child = int(started.stdout.readline())
            yield started
        finally:
            started.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.child, signal.SIGKILL)
            started.communicate()


def filters(project, *more):
    return ["--project", project, *more, "--", "sh", "-c"]


# ---- What the command gets ---------------------------------------------------------------------------------


def test_a_command_gets_a_user_and_gives_it_back(service, project):
    (user,) = create(service.url, project, labels={"role": "admin", "x.y": "1"}, login="ada", password="pä$ 'w")
    secrets = {
        "BOTFARM_CLIENT_SECRET": "s1",
        "BOTFARM_ID_TOKEN": "s2",
        "BOTFARM_TOKEN": "s3",
        "BOTFARM_LABEL_OLD": "s4",
    }
    done = botfarm(service.url, "exec", *filters(project, "--holder", "me"), "env", BOTFARM_CLIENT_ID="ci", **secrets)
    assert (done.returncode, done.stderr) == (0, "")
    told = dict(line.split("=", 1) for line in done.stdout.splitlines() if line.startswith("BOTFARM_"))
    assert uuid.UUID(told.pop("BOTFARM_LOCK_ID"))
    assert told == {
        "BOTFARM_URL": service.url,
        "BOTFARM_CLIENT_ID": "ci",
        "BOTFARM_USER_LOGIN": "ada",
        "BOTFARM_USER_PASSWORD": "pä$ 'w",
        "BOTFARM_USER_ID": user["id"],
        "BOTFARM_LOCK_FENCE": "1",
        "BOTFARM_LABEL_ROLE": "admin",
        "BOTFARM_LABEL_X_Y": "1",
    }
    assert ends(service.url, user) == ["released"]


def test_of_labels_that_come_to_one_name_the_first_is_told_and_that_is_said(service, project):
    create(service.url, project, labels={"x.y": "dot", "x-y": "dash", "role": "small", "Role": "large"})
    done = botfarm(service.url, "exec", *filters(project), "echo $BOTFARM_LABEL_X_Y $BOTFARM_LABEL_ROLE")
    assert done.stdout == "dash large\n"
    lines = "botfarm: the label {} of bot-0 is not told: another one comes to BOTFARM_LABEL_{}, too\n"
    assert done.stderr == lines.format("role", "ROLE") + lines.format("x.y", "X_Y")


def test_several_users_are_numbered(service, project):
    create(service.url, project, count=3)
    show = "echo $BOTFARM_USER_1_LOGIN/$BOTFARM_USER_1_PASSWORD $BOTFARM_USER_2_LOGIN$BOTFARM_USER_LOGIN"
    done = botfarm(service.url, "exec", *filters(project, "--count", "2"), show)
    assert re.fullmatch(r"bot-(\d)/pw-\1 bot-(?!\1)\d\n", done.stdout)
    wishes = json.dumps([{"project_id": project, "count": 2}])
    done = botfarm(service.url, "exec", "--set", wishes, "--", "sh", "-c", show)
    assert re.fullmatch(r"bot-(\d)/pw-\1 bot-(?!\1)\d\n", done.stdout)
    assert botfarm(service.url, "exec", "--wait", "0", "--count", "4", *filters(project), "true").returncode == 65
    assert held(service.url, project) == []


def test_the_lock_goes_to_a_file_instead_of_the_password_to_the_environment(service, project, tmp_path):
    create(service.url, project)
    path = tmp_path / "lock.json"
    script = f"stat -c %a {path}; cat {path}; env | grep -c pw-0"
    done = botfarm(service.url, "exec", *filters(project, "--file", str(path)), script)
    mode, lock, passwords = re.fullmatch(r"(\d+)\n({.*})(\d)\n", done.stdout).groups()
    assert (mode, passwords) == ("600", "0")
    assert json.loads(lock)["user"]["password"] == "pw-0"
    assert list(tmp_path.iterdir()) == []  # neither it nor what it was made of
    (tmp_path / "folder").mkdir()
    for nowhere in ("no/lock", "folder"):
        done = botfarm(service.url, "exec", *filters(project, "--file", str(tmp_path / nowhere)), "echo ran")
        assert (done.returncode, done.stdout) == (78, "")
    assert held(service.url, project) == []
    keeping = ["--file", str(path), "--keep-on-failure", "30m"]
    assert botfarm(service.url, "exec", *filters(project, *keeping), "exit 3").returncode == 3
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_command_that_is_run_has_its_own_group_and_our_session_and_files(service, project, tmp_path):
    create(service.url, project)
    script = "import os; print(os.getpgid(0) == os.getpid(), os.getsid(0)); os.write(int(os.environ['FD']), b'kept')"
    with open(tmp_path / "inherited", "wb") as file:
        words = [*BOTFARM, "exec", "--project", project, "--", sys.executable, "-c", script]
        env = around(service.url, FD=str(file.fileno()))
        done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, pass_fds=[file.fileno()], check=True)
    assert done.stdout == f"True {os.getsid(0)}\n"
    assert (tmp_path / "inherited").read_bytes() == b"kept"


# ---- How it ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["--project", "{project}", "--", "sh", "-c", "exit 7"], 7, ""),
        (["--project", "{project}", "--", "sh", "-c", "kill -9 $$"], 137, ""),
        (["--project", "{project}", "--", "no-such-command"], 127, "no-such-command: No such file"),
        (["--project", "{project}", "--", "no-such-\udcff"], 127, r"no-such-\udcff: No such file"),
        (["--project", "{project}", "--", "/"], 126, "/: Permission denied"),
        (["--project", "{project}"], 64, "write it behind --"),
        (["--project", "{project}", "--", ""], 64, "write it behind --"),
        (["--", "true"], 64, "name the project"),
        (["--project", "{project}", "--user", "{project}", "--", "true"], 64, "name the project"),
        (["--project", "{project}", "--label", "role", "--", "true"], 64, "write KEY=VALUE"),
        (["--project", "{project}", "--colour", "red", "--", "true"], 64, "unrecognized arguments: --colour red"),
        (["--project", "{project}", "--env", "moon", "--", "true"], 64, "moon"),
        (["--project", "{project}", "--label", "a=b", "--label", "a=c", "--", "true"], 64, "a --label is there twice"),
        (["--project", "{project}", "-E", "256", "--", "true"], 64, "write 0 to 255"),
        (["--set", "[]", "--", "true"], 64, "no list of wishes"),
        (["--set", '[{{"project_id":', "--", "true"], 64, "it is no JSON"),
        (["--set", '[{{"project_id": "{project}", "colour": "red"}}]', "--", "true"], 64, "users[0].colour"),
        (["--user", "ü b", "--", "true"], 64, "There is nothing at"),
        (["--user", "\udcff", "--", "true"], 64, "There is nothing at"),
        (["--project", "{project}", "--label", "role=nobody", "--", "true"], 65, "No user at all matches"),
        (["--user", "{project}", "--", "true"], 65, "user"),
        (["--project", "{project}", "--url", "botfarm", "--", "true"], 78, "is no URL of BotFarm"),
        (["--project", "{project}", "--url", "http://me:pw@botfarm", "--", "true"], 78, "'http://…@botfarm' is no URL"),
        (["--project", "{project}", "--url", "me:pw@botfarm", "--", "true"], 78, "'…@botfarm' is no URL"),
    ],
)
def test_the_exit_status_tells_what_happened(service, project, words, status, told):
    create(service.url, project)
    done = botfarm(service.url, "exec", *(word.format(project=project) for word in words))
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert "usage: botfarm [-h]" not in done.stderr  # but that of exec
    assert held(service.url, project) == []


def test_how_it_went_is_told_of_a_command_that_ran_to_its_end(service, project):
    (user,) = create(service.url, project)
    for script in ("true", "exit 7", "kill -9 $$"):
        botfarm(service.url, "exec", *filters(project), script)
    botfarm(service.url, "exec", "--project", project, "--", "no-such-command")
    with running(service.url, *filters(project), "echo $$; exec sleep 60") as run:
        run.send_signal(signal.SIGTERM)
        run.wait(5)
    assert outcomes(service.url, user) == ["passed", "failed", "failed", None, None]


def test_one_that_is_logged_in_is_preferred(service, project):
    create(service.url, project, count=4)
    with Farm(service.url).user(project) as bot:
        bot.session.put({})
    words = filters(project, "--prefer", "session")
    assert botfarm(service.url, "exec", *words, "echo $BOTFARM_USER_LOGIN").stdout == f"{bot.name}\n"
    wishes = json.dumps([{"project_id": project}])
    done = botfarm(service.url, "exec", "--set", wishes, "--prefer", "session", "--", "true")
    assert (done.returncode, "goes with none of the others" in done.stderr) == (64, True)


def test_none_free_in_time_has_a_status_that_can_be_chosen(service, project):
    create(service.url, project)
    with running(service.url, *filters(project), "echo $$; sleep 60"):
        asked = filters(project, "--wait", "0")
        assert botfarm(service.url, "exec", *asked, "true").returncode == 75
        assert botfarm(service.url, "exec", "-E", "3", *asked, "true").returncode == 3
        assert botfarm(service.url, "acquire", "--project", project, "--wait", "0").returncode == 75


def test_a_service_that_is_not_there_is_told_of_after_a_while(project):
    url = f"http://127.0.0.1:{free_port()}"
    done = botfarm(url, "exec", *filters(project, "--wait", "0"), "true")
    assert done.returncode == 69
    assert f"BotFarm at {url} can't be reached: " in done.stderr


def test_who_is_not_known_is_not_allowed(empty_database, project):
    secured = {"auth": "on", "signing_keys": Secret(f"s1:{'B' * 43}=")}
    with serving(settings(empty_database, **secured)) as guarded:
        done = botfarm(guarded.url, "exec", *filters(project), "true")
        assert (done.returncode, "set BOTFARM_CLIENT_ID" in done.stderr) == (77, True)
        known = {"BOTFARM_CLIENT_ID": str(uuid.uuid4()), "BOTFARM_CLIENT_SECRET": "much secret"}
        done = botfarm(guarded.url, "exec", *filters(project), "true", **known)
        assert (done.returncode, "invalid_client" in done.stderr, "much" in done.stderr) == (77, True, False)


def test_a_command_behind_one_that_takes_none_is_refused_and_takes_no_user(service, project):
    (user,) = create(service.url, project)
    done = botfarm(service.url, "acquire", "--project", project, "--", "pytest")
    assert (done.returncode, done.stdout) == (64, "")
    assert re.search("unrecognized arguments: .*pytest", done.stderr)
    assert history(service.url, user) == []


def test_without_a_url_it_says_how_to_set_one(project):
    done = botfarm("", "exec", "--project", project, "--", "true")
    assert (done.returncode, done.stderr) == (78, "botfarm: no BotFarm is named: set BOTFARM_URL to its URL\n")


def test_a_standard_error_that_nobody_reads_changes_nothing(service, project):
    made = {user["login"]: user for user in create(service.url, project, count=2)}
    reads, writes = os.pipe()
    os.close(reads)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": writes, "text": True}
    start = [*BOTFARM, "exec", "--count", "2"]
    nobody = subprocess.run(
        [*start, *filters(project, "--label", "a=b"), "true"], env=around(service.url), stderr=writes
    )
    assert nobody.returncode == 65
    words = [*start, *filters(project), "echo $BOTFARM_USER_1_LOGIN; read line"]
    with subprocess.Popen(words, env=around(service.url), **pipes) as run:
        force(service.url, made[run.stdout.readline().strip()])
        run.communicate("\n", timeout=20)
    os.close(writes)
    assert run.returncode == 124
    assert held(service.url, project) == []


def test_who_waits_gets_the_user_of_who_ends(service, project):
    (user,) = create(service.url, project)
    with running(service.url, *filters(project), "echo $$; sleep 0.5") as first:
        assert botfarm(service.url, "exec", *filters(project, "--ttl", "1"), "sleep 1.2").returncode == 0
        assert first.wait(10) == 0
    assert ends(service.url, user) == ["released", "released"]


# ---- Signals -----------------------------------------------------------------------------------------------

COUNTS = "trap 'echo caught {0}; heard=1' {0}; echo $$; until [ $heard ]; do sleep 0.05; done; sleep 0.3; exit 5"


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "QUIT"])
def test_a_signal_is_handed_on_unchanged_and_once(service, project, name):
    (user,) = create(service.url, project)
    with running(service.url, *filters(project), COUNTS.format(name)) as run:
        run.send_signal(getattr(signal, f"SIG{name}"))
        assert run.stdout.read() == f"caught {name}\n"
        assert run.wait(10) == 5
    assert ends(service.url, user) == ["released"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_a_signal_ends_is_told_as_a_shell_does(service, project, number):
    (user,) = create(service.url, project)
    with running(service.url, *filters(project), "echo $$; exec sleep 60") as run:
        run.send_signal(number)
        assert run.wait(3) == 128 + number
    assert ends(service.url, user) == ["released"]


def test_a_command_that_stays_is_sent_term_and_then_kill_with_its_group(service, project):
    create(service.url, project)
    script = (
        "trap 'echo no' INT TERM; (trap '' INT TERM; exec sleep 60) & sleep 0.3; echo $$; while :; do sleep 0.1; done"
    )
    with running(service.url, *filters(project), script) as run:
        started = time.monotonic()
        run.send_signal(signal.SIGINT)
        assert run.wait(20) == 137
        assert time.monotonic() - started >= 12
        assert run.stdout.read() == "no\nno\n"  # at its end, so nothing of the group has the pipe open
        assert held(service.url, project) == []


def test_what_a_stopped_command_leaves_behind_ends_before_its_user_is_free(service, project):
    create(service.url, project)
    script = "(trap '' TERM; exec sleep 60) & trap 'exit 3' TERM; sleep 0.3; echo $$; wait"
    with running(service.url, *filters(project), script) as run:
        started = time.monotonic()
        run.send_signal(signal.SIGTERM)
        assert run.wait(5) == 3
        assert run.stdout.read() == ""
        assert time.monotonic() - started < 3
        assert held(service.url, project) == []


def test_who_is_stopped_while_it_waits_takes_no_user(service, project):
    (user,) = create(service.url, project)
    with running(service.url, *filters(project), "echo $$; sleep 60") as first:
        words = [*BOTFARM, "exec", "--project", project, "--", "true"]
        waiting = subprocess.Popen(words, env=around(service.url), stderr=subprocess.PIPE, text=True)
        pools = f"{service.url}/pools?project_id={project}"
        until(lambda: httpx.get(pools).json()["items"][0]["waiting"] == 1, 10)
        waiting.send_signal(signal.SIGTERM)
        assert waiting.communicate(timeout=5) == (None, "")
        assert waiting.returncode == 143
        first.send_signal(signal.SIGTERM)
        first.wait(5)
    assert ends(service.url, user) == ["released"]


def test_a_kill_frees_the_user_within_its_ttl(service, project):
    (user,) = create(service.url, project)
    with running(service.url, *filters(project, "--ttl", "2"), "echo $$; sleep 60") as run:
        run.kill()
        assert seconds_until_free(service.url, project, 5) <= 2.2
    assert ends(service.url, user) == ["expired"]


# ---- A lock that is lost -----------------------------------------------------------------------------------


def test_a_command_whose_lock_is_lost_is_ended(service, project):
    (user,) = create(service.url, project)
    script = "(trap '' TERM; exec sleep 60) & trap 'echo told; exit 0' TERM; sleep 0.3; echo $$; wait"
    with running(service.url, *filters(project, "--ttl", "1"), script, hasty=True) as run:
        force(service.url, user)
        assert run.wait(5) == 124
        assert run.stdout.read() == "told\n"
    assert ends(service.url, user) == ["forced"]


def test_a_lock_that_turns_out_to_have_ended_makes_no_green_run(service, project):
    (user,) = create(service.url, project)
    with running(service.url, *filters(project), "echo $$; sleep 0.5") as run:
        force(service.url, user)
        assert run.wait(5) == 124
    assert ends(service.url, user) == ["forced"]


def test_a_network_that_is_away_for_20_s_ends_no_command(service, project):
    (user,) = create(service.url, project)
    with gate(service.url) as way, running(way.url, *filters(project, "--ttl", "30"), "echo $$; sleep 32") as run:
        until(lambda: len(way.sent) > 1, 15)  # it has been renewed
        way.silent = True
        time.sleep(20)
        way.silent = False
        assert run.wait(60) == 0
    assert ends(service.url, user) == ["released"]


def test_a_restart_of_the_service_ends_no_command(empty_database, project):
    with restartable(empty_database) as (url, restart):
        (user,) = create(url, project)
        with running(url, *filters(project, "--ttl", "10"), "echo $$; read line") as run:
            restart(3.5)  # it would have been renewed meanwhile
            before = users(url, project)["bot-0"]["lock"]["expires_at"]
            until(lambda: users(url, project)["bot-0"]["lock"]["expires_at"] > before, 5)
            run.communicate("\n", timeout=20)
            assert run.returncode == 0
        assert ends(url, user) == ["released"]


def test_a_command_that_slept_past_the_end_of_its_lock_is_ended(service, project):
    """As the machine does: here both process groups are stopped."""
    (user,) = create(service.url, project)
    with running(service.url, *filters(project, "--ttl", "2"), "echo $$; sleep 60") as run:
        os.killpg(run.child, signal.SIGSTOP)
        run.send_signal(signal.SIGSTOP)
        time.sleep(3)
        run.send_signal(signal.SIGCONT)
        os.killpg(run.child, signal.SIGCONT)
        assert run.wait(3) == 124
    assert ends(service.url, user) == ["expired"]


# ---- A person looks ----------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed; CI installs it")
def test_the_user_of_a_command_that_failed_is_kept_for_a_person(service, project):
    (user,) = create(service.url, project)
    keeping = ["--holder", "ci-4711", "--note", "https://ci.example/4711", "--keep-on-failure", "30m"]
    done = botfarm(f"{service.url}/", "exec", *filters(project, *keeping), "exit 3", "secret")
    assert done.returncode == 3
    assert botfarm(service.url, "release", "--holder", "ci-4711").stderr == "botfarm: 0 given back\n"
    until_when = users(service.url, project)["bot-0"]["lock"]["expires_at"]
    assert f"bot-0 is kept until {until_when}" in done.stderr
    assert datetime.fromisoformat(until_when) > datetime.now(UTC) + timedelta(minutes=29)
    get, end = re.findall(r"^curl .*", done.stderr, re.M)
    assert json.loads(subprocess.check_output(get, shell=True))["user"]["password"] == "pw-0"
    subprocess.check_output(end, shell=True)
    (lock,) = history(service.url, user)
    assert lock | {"holder": "kept/ci-4711", "note": "https://ci.example/4711: sh ended with 3"} == lock
    assert (lock["ended_by"], lock["outcome"]) == ("released", "failed")


def test_no_user_is_kept_of_a_command_that_succeeds_or_is_stopped(service, project):
    create(service.url, project)
    keeping = filters(project, "--keep-on-failure", "30m")
    assert botfarm(service.url, "exec", *keeping, "true").stderr == ""
    with running(service.url, *keeping, "echo $$; exec sleep 60") as run:
        run.send_signal(signal.SIGTERM)
        assert run.wait(5) == 143
    assert held(service.url, project) == []


# ---- The terminal ------------------------------------------------------------------------------------------

# A person's part: a terminal in which something is started; each text is typed once the one before it has been seen.
PERSON = r"""
import contextlib, json, os, pty, signal, sys
pid, fd = pty.fork()
if not pid:
    os.execvp(sys.argv[2], sys.argv[2:])
signal.alarm(30)
for seen, typed in json.loads(sys.argv[1]):
    text = b""
    while seen.encode() not in text:
        text += os.read(fd, 1000)
        sys.stdout.write(text.decode())
    os.write(fd, typed.encode())
with contextlib.suppress(OSError):  # its end
    while True:
        sys.stdout.write(os.read(fd, 1000).decode())
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
BASH = ["bash", "--norc", "--noediting", "-i"]
ASKS = """sh -c 'read line; echo "rea"dy; read line; echo "<$line>"'"""  # so that what is typed is not what is seen


def person(url, steps, words):
    """What was seen, and last of all the exit status."""
    env = around(url, PS1="PROMPT> ")
    command = [sys.executable, "-c", PERSON, json.dumps(steps), *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("line", ["{}", "sh -c {quoted}'; :'", "{} | cat"], ids=["alone", "in a script", "in a pipe"])
def test_ctrl_z_brings_the_shell_back_and_fg_the_command(service, project, line):
    """Also where the shell's job is more than our process. The command has had the terminal before."""
    (user,) = create(service.url, project)
    asks = f"{shlex.join([*BOTFARM, 'exec', '--project', project])} -- {ASKS}"
    typed = line.format(asks, quoted=shlex.quote(asks))
    steps = [
        ("PROMPT> ", f"{typed}\nbegin\n"),
        ("ready", "\x1a"),
        ("Stopped", "fg\n"),
        ("exec", "go on\n"),
        ("<go on>", ""),
    ]
    person(service.url, [*steps, ("PROMPT> ", "exit\n")], BASH)
    assert ends(service.url, user) == ["released"]


def test_ctrl_z_does_nothing_where_no_shell_would_look_after_it(service, project):
    create(service.url, project)
    words = [*BOTFARM, "exec", *filters(project), 'echo ready; read line; echo "<$line>"']
    assert person(service.url, [("ready", "\x1ago on\n"), ("<go on>", "")], words)[-1] == "0"


def test_ctrl_c_reaches_a_command_that_has_the_terminal_alone(service, project):
    (user,) = create(service.url, project)
    words = [*BOTFARM, "exec", *filters(project), COUNTS.format("INT")]
    told = person(service.url, [("\n", "\x03")], words)
    assert [told[-1], "".join(told).count("caught INT")] == ["5", 1]
    assert ends(service.url, user) == ["released"]


def test_the_terminal_is_left_to_a_pager_that_reads_what_a_command_writes(service, project):
    create(service.url, project)
    typed = shlex.join([*BOTFARM, "exec", "--project", project, "--", "sh", "-c", "echo page; sleep 60"])
    pager = """sh -c 'read page; echo "$page"r; read line </dev/tty; echo "<$line>"'"""
    steps = [("PROMPT> ", f"{typed} | {pager}\n"), ("pager", "next\n"), ("<next>", "\x03"), ("PROMPT> ", "exit\n")]
    person(service.url, steps, BASH)
    assert held(service.url, project) == []


# ---- By hand -----------------------------------------------------------------------------------------------


def test_a_lock_is_acquired_renewed_looked_at_and_given_back_by_hand(service, project):
    (user,) = create(service.url, project)
    lock = json.loads(botfarm(service.url, "acquire", "--user", user["id"], "--ttl", "2m", "--holder", "me").stdout)
    assert (lock["user"]["password"], lock["ttl"], lock["holder"]) == ("pw-0", 120, "me")
    renewed = botfarm(service.url, "renew", lock["id"], "--ttl", "180", "--holder", "ada", "--note", "looks at it")
    renewed = json.loads(renewed.stdout)
    assert (renewed["ttl"], renewed["holder"], renewed["note"]) == (180, "ada", "looks at it")
    assert json.loads(botfarm(service.url, "status", lock["id"]).stdout)["user"] == {
        name: value for name, value in lock["user"].items() if name != "password"
    }
    done = botfarm(service.url, "release", "--quarantine", "is broken", "--outcome", "bad-login", lock["id"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert users(service.url, project)["bot-0"]["quarantine"] == "is broken"
    assert outcomes(service.url, user) == ["bad-login"]
    for name in ("renew", "status", "release"):
        done = botfarm(service.url, name, lock["id"])
        assert (done.returncode, done.stdout) == (124, "")
        assert "has ended" in done.stderr
    assert botfarm(service.url, "status").returncode == 64
    assert botfarm(service.url, "release", "--holder", "\udcff").returncode == 64


@pytest.mark.parametrize("words", [["--quarantine", "is broken"], ["--cooldown", "0"], ["--outcome", "failed"]])
def test_what_is_told_of_one_lock_goes_with_no_holder(service, project, words):
    create(service.url, project)
    Farm(service.url, holder="job 7").acquire(project, heartbeat=False)
    done = botfarm(service.url, "release", "--holder", "job 7", *words)
    assert (done.returncode, done.stdout) == (64, "")
    assert "--cooldown, --quarantine and --outcome go with a lock, not with --holder" in done.stderr
    assert held(service.url, project) == ["bot-0"]


NOWHERE = {"a full disk": ">/dev/full", "a reader that has gone": "| true", "none at all": ">&-"}


@pytest.mark.parametrize("where", NOWHERE)
def test_a_lock_that_nobody_is_told_of_is_given_back(service, project, where):
    (user,) = create(service.url, project)
    script = f"set -o pipefail; {shlex.join([*BOTFARM, 'acquire', '--project', project])} {NOWHERE[where]}"
    done = subprocess.run(["bash", "-c", script], env=around(service.url), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (78, ""), done.stderr
    assert re.fullmatch(r"botfarm: standard output can't be written: [A-Z][a-z ]+\n", done.stderr)
    assert ends(service.url, user) == ["released"]


def test_a_lock_is_printed_whatever_the_encoding_of_the_output(service, project):
    create(service.url, project, login="zoë", password="pä$€")
    told = botfarm(service.url, "acquire", "--project", project, PYTHONIOENCODING="ascii").stdout
    assert (json.loads(told)["user"]["login"], json.loads(told)["user"]["password"]) == ("zoë", "pä$€")
