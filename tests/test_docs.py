"""README.md and docs/: every command is run somewhere, every table says what the program does, every link leads on.

The tables of metrics, of log events and of the limits are looked at beside what they tell of: in test_metrics.py,
test_logs.py and test_hostile.py.
"""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import botfarm_client.command
import botfarm_client.pytest_plugin
import pytest
import yaml
from botfarm_client import Farm
from conftest import (
    KEY,
    PACKAGE,
    ROOT,
    acquire,
    command,
    free_port,
    fresh_database,
    make_users,
    process,
    serving,
    wait_ready,
)
from conftest import settings as configured
from gate import create, held

from farm.clients import SCOPES
from farm.problems import Problem
from farm.settings import SECRET_SETTINGS, Settings

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
README, CALLS, OPERATING = PAGES["README.md"], PAGES["docs/calls.md"], PAGES["docs/operating.md"]
every_page = pytest.mark.parametrize("name", PAGES)
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed; CI installs it")


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def table(text: str, head: str) -> list[list[str]]:
    """The cells of each row below the head of a table."""
    rows = re.search(rf"^\| {re.escape(head)}.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M)
    assert rows, head
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in rows[1].splitlines()]


# The pages themselves


def test_the_readme_is_a_front_page():
    assert len(README.splitlines()) <= 180


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text: str) -> list[str]:
    """Those that lead to a file or a heading of the project."""
    return [link for link in re.findall(r"\]\(([^)]+)\)", without_blocks(text)) if not re.match(r"https?:", link)]


@every_page
def test_every_link_leads_to_a_file_and_a_heading(name):
    for link in links(PAGES[name]):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.resolve().is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_every_page_and_picture_is_found_from_the_readme():
    known, new = set(), {"README.md"}
    while new:
        known |= new
        places = [(ROOT / page).parent / link.partition("#")[0] for page in new for link in links(PAGES[page])]
        found = {place.resolve() for place in places}
        names = {path.relative_to(ROOT).as_posix() for path in found if path.is_file()}
        new = (names & PAGES.keys()) - known
        known |= names
    assert {path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*")} <= known


# Commands in them. Each block of shell lines is here, by its page and heading, with what runs it.

RUN_BY = {
    ("README.md", "Run it", 0): (".ci/run", "start=$(grep -m1 -- 'python botfarm.py$' README.md)"),
    ("README.md", "Run it", 1): (".ci/run", "command=$(grep -m1 -- '-m pytest' README.md)"),
    ("README.md", "The first minute", 0): ("tests/test_docs.py", CURL := "def test_the_curl_lines_work("),
    ("docs/calls.md", "`POST /users/import`", 0): ("tests/test_docs.py", CURL),
    ("docs/calls.md", "`GET /users/export`", 0): ("tests/test_docs.py", CURL),
    ("docs/calls.md", "`POST /locks/sets`", 0): ("tests/test_docs.py", CURL),
    ("docs/calls.md", "Retries", 0): ("tests/test_docs.py", CURL),
    ("docs/clients.md", "Two minutes to a green test", 0): (
        "tests/test_docs.py",
        CLIENTS := "def test_the_lines_about_clients",
    ),
    ("docs/clients.md", "Any command: `botfarm exec`", 0): ("tests/test_docs.py", CLIENTS),
    ("docs/clients.md", "Any command: `botfarm exec`", 1): ("tests/test_docs.py", CLIENTS),
    ("docs/clients.md", "In CI", 0): ("tests/test_docs.py", CLIENTS),
    ("docs/sessions.md", "Sessions", 0): ("tests/test_docs.py", CURL),
    ("docs/waiting.md", "Waiting and sets", 0): ("tests/test_docs.py", CURL),
    ("docs/waiting.md", "Sets", 0): ("tests/test_docs.py", CURL),
    ("docs/security.md", "Authentication", 0): (
        "tests/test_auth.py",
        TOKEN := "def test_the_lines_about_authentication",
    ),
    ("docs/security.md", "Authentication", 1): ("tests/test_auth.py", TOKEN),
    ("docs/operating.md", "The embedded database", 0): ("tests/test_containers.py", r'r"^sed -i .* requirements.txt$"'),
    ("docs/operating.md", "The embedded database", 1): (
        "tests/test_docs.py",
        "def test_the_lines_that_move_an_embedded",
    ),
    ("docs/operating.md", "Docker", 0): (".ci/containers", 'lines_of("Docker")'),
    ("docs/operating.md", "Kubernetes", 0): (".ci/containers", 'lines_of("Kubernetes")'),
    ("docs/operating.md", "One file to deploy", 0): ("tests/test_package.py", '".ci/pyz"'),
    ("docs/operating.md", "Backups and restores", 0): ("tests/test_locks.py", 'command("migrate", "--after-restore"'),
    ("docs/performance.md", "Measure it", 0): (".ci/run", ".venv/bin/python tests/load/bench.py --short"),
    ("docs/performance.md", "The figures", 0): (".ci/run", ".venv/bin/python tests/load/bench.py --short"),
    ("docs/development.md", "Tests", 0): (".ci/run", ".venv/bin/python -m pytest -q"),
    ("docs/development.md", "Tests", 1): (".ci/run", "# The whole check"),
    ("docs/development.md", "Requirements", 0): (".ci/run", ".venv/bin/python .ci/requirements --check"),
}


def blocks(name: str) -> dict[tuple[str, str, int], str]:
    """The blocks of shell lines of a page, by page, heading and number below it."""
    found: dict[tuple[str, str, int], str] = {}
    heading, number = "", 0
    for new, block in re.findall(r"^#+ ([^\n]*)$|^```sh\n(.*?)^```$", PAGES[name], re.M | re.S):
        if new:
            heading, number = new, 0
        else:
            found[name, heading, number] = block
            number += 1
    return found


def test_every_command_is_run_by_a_test_or_by_ci():
    assert {place for name in PAGES for place in blocks(name)} == RUN_BY.keys()
    for place, (file, text) in RUN_BY.items():
        lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith('    ("')]
        assert any(text in line for line in lines), place


def test_no_secret_that_a_command_writes_is_one_git_add_away_from_a_commit():
    """Keys, dumps. (docs/clients.md is for other folders.)"""
    lines = "\n".join(block for name in PAGES.keys() - {"docs/clients.md"} for block in blocks(name).values())
    written = set(re.findall(r" > ([\w.]+)\)?$", lines, re.M))
    assert "signing.keys" in written
    assert written <= set((ROOT / ".gitignore").read_text().splitlines())


@every_page
def test_no_command_hides_in_a_block_of_another_kind(name):
    """Blocks are commands, which are run, JSON and files, which are read, or SQL, which test_field_database.py runs."""
    fences = re.findall(r"^```.*$", PAGES[name], re.M)
    more = {"docs/operating.md": {"```sql"}, "docs/clients.md": {"```ini", "```python", "```yaml", "```groovy"}}
    more["docs/sessions.md"] = {"```python"}
    assert set(fences[::2]) <= {"```sh", "```json"} | more.get(name, set())
    assert set(fences[1::2]) <= {"```"}


def test_the_files_that_clients_are_shown_can_be_read():
    """The YAML by its makers' schemas, too: in `.ci/run`."""
    read = {"python": ast.parse, "yaml": yaml.safe_load, "ini": configparser.ConfigParser().read_string}
    pages = PAGES["docs/clients.md"] + PAGES["docs/sessions.md"]
    found = re.findall(r"^```(python|yaml|ini)\n(.*?)^```$", pages, re.M | re.S)
    assert {kind for kind, _ in found} == read.keys()
    for kind, text in found:
        read[kind](text)


def shell(script: str, **options: Any) -> str:
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_curl
@pytest.mark.parametrize("name", ["README.md", "docs/calls.md", "docs/sessions.md", "docs/waiting.md"])
def test_the_curl_lines_work(empty_database, name):
    """Those of the README's first minute, then those of the page."""
    first = blocks("README.md")["README.md", "The first minute", 0]
    rest = [] if name == "README.md" else blocks(name).values()
    outputs = []
    with serving(configured(empty_database)) as alone:
        for block in [first, *rest]:
            assert "http://127.0.0.1:8000" in block
            outputs.append(shell(block.replace("http://127.0.0.1:8000", alone.url), timeout=60))
    assert '"password":"correct horse"' in outputs[0]
    assert '{"released":1}' in outputs[0]
    assert all(outputs), "each block prints what it got"
    assert all(json.loads(line) for line in "".join(outputs).splitlines() if line[:1] in "{["), "a reply a line"
    assert all(output.endswith("\n") for output in outputs), "the prompt is on a line of its own"
    assert "urn:botfarm:" not in "".join(outputs), "nothing is refused"


@needs_curl
def test_the_lines_about_clients_work(empty_database, tmp_path):
    """From `pip install`, here without an index, to a green test; then the others. A clone has options for pytest."""
    (clone := tmp_path / "clone").mkdir()
    (clone / "clients").symlink_to(ROOT / "clients")
    (clone / "pytest.ini").write_text("[pytest]\naddopts = --of-the-clone\n")
    there = {"PIP_TARGET": str(tmp_path / "there"), "PYTHONPATH": str(tmp_path / "there"), "HOME": str(tmp_path)}
    there |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    there["TMPDIR"] = str(tmp_path)
    there["PATH"] = f"{tmp_path / 'there/bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    lines = "\n".join(blocks("docs/clients.md").values())
    with serving(configured(empty_database)) as alone:
        script = lines.replace("http://127.0.0.1:8000", alone.url)
        told = shell(script, cwd=clone, env=there, timeout=120)
    assert "1 passed" in told
    assert "\ngrace is ours\n" in told
    assert "\ntests run as grace\n" in told


@pytest.mark.parametrize("name", ["GitHub Actions", "GitLab CI", "Jenkins"])
def test_what_the_recipes_for_ci_let_a_shell_run_works(empty_database, project, tmp_path, name):
    """The step, which is one process, and what always runs. All else in them is their makers': there is no linter of
    Jenkins' to be had, so its braces are counted."""
    (recipe,) = re.findall(rf"^{name}:\n\n```\w+\n(.*?)^```$", PAGES["docs/clients.md"], re.M | re.S)
    step, sweep = re.findall(r"(?:exec )?botfarm (?:exec|release) [^'\n]+", recipe)
    assert recipe.index("BOTFARM_HOLDER") < recipe.index(step)
    assert [recipe.count(mark) for mark in "{(["] == [recipe.count(mark) for mark in "})]"]
    tests = 'echo "$* as $BOTFARM_USER_LOGIN, under $PPID"'
    tools = {"make": tests, "npm": tests, "botfarm": 'exec python -m botfarm_client.command "$@"'}
    for tool, does in tools.items():
        (tmp_path / tool).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / tool).chmod(0o755)
    env = {"BOTFARM_PROJECT": project, "BOTFARM_HOLDER": "job 7", "PYTHONPATH": str(PACKAGE)}
    env["PATH"] = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    with serving(configured(empty_database)) as alone:
        env["BOTFARM_URL"] = alone.url
        create(alone.url, project)
        with subprocess.Popen(["sh", "-c", step], env=env, stdout=subprocess.PIPE, text=True) as run:
            assert run.communicate(timeout=60)[0] == f"test as bot-0, under {run.pid}\n"
        Farm(alone.url, holder="job 7").acquire(project, heartbeat=False)
        assert held(alone.url, project) == ["bot-0"]
        subprocess.run(["sh", "-c", sweep], env=env, check=True, timeout=60)
        assert held(alone.url, project) == []


def test_what_is_on_no_registry_is_not_installed_by_its_name():
    """It could be a stranger's there."""
    pages = [ROOT / "docs/clients.md", *ROOT.glob("clients/*/README.md")]
    lines = [line for page in pages for line in re.findall(r"^.*\b(?:pip|npm) install .*$", page.read_text(), re.M)]
    assert len(lines) >= 9
    assert [line for line in lines if re.search(r" (botfarm-|robotframework-botfarm|@botfarm/)", line)] == []


def test_the_tables_about_clients_have_all_that_there_is():
    """Options of `botfarm exec`, its exit statuses, the plugin's settings and fixtures."""
    page = PAGES["docs/clients.md"]
    told = {word for cells in table(page, "option | meaning") for word in re.findall(r"`(-{1,2}[\w-]+)`", cells[0])}
    (run,) = (action.choices["exec"] for action in botfarm_client.command.parser()._actions if action.choices)
    assert told == {action.option_strings[-1] for action in run._actions} - {"--help"}
    statuses = {int(number) for cells in table(page, "exit status | when") for number in re.findall(r"\d+", cells[0])}
    kinds = botfarm_client.BotfarmError.__subclasses__()
    assert statuses == {kind.exit_status for kind in kinds} | {126, 127}
    settings = [[cell.strip("`") for cell in cells] for cells in table(page, "ini key | option")]
    assert [(ini, option) for ini, option, *_ in settings] == [
        (f"botfarm_{name}", f"--botfarm-{name}") for name in botfarm_client.pytest_plugin.SETTINGS
    ]
    fixtures = {cells[0].strip("`") for cells in table(page, "fixture | what it gives")}
    assert all(hasattr(botfarm_client.pytest_plugin, name) for name in fixtures)
    assert len(fixtures) == 5


def test_the_lines_that_move_an_embedded_database_to_a_server_work(server):
    """While the service runs; what arrives there is whole, and its key opens it."""
    lines = blocks("docs/operating.md")["docs/operating.md", "The embedded database", 1]
    lines = lines.replace(".venv/bin/python", sys.executable).replace("psql", '"$PG/pginstall18/bin/psql"')
    with tempfile.TemporaryDirectory(prefix="bf-") as folder, fresh_database(server) as url:
        os.chmod(folder, 0o755)  # so that PostgreSQL's user can reach it
        port = str(free_port())
        with process("--port", port, env={"BOTFARM_HOME": f"{folder}/.botfarm"}):
            wait_ready(f"http://127.0.0.1:{port}")
            user = {"login": "ada", "password": "correct horse", "project_id": "2" * 32, "env": "stage"}
            imported = command("import", "-", "--url", f"http://127.0.0.1:{port}", text=json.dumps(user))
            assert imported.returncode == 0, imported.stderr
            shell(lines, cwd=folder, env={"PATH": os.environ["PATH"], "DATABASE_URL": url}, timeout=60)
        old = Path(folder, ".botfarm", "keys").read_text().strip()
        resealed = command("reseal", env={"DATABASE_URL": url, "BOTFARM_KEYS": f"{KEY},{old}"})
        assert resealed.stdout.startswith("1 secrets are now sealed"), resealed.stderr


# Tables, beside the program


def test_the_table_of_settings_has_each_with_its_default():
    for field, variable in Settings.variables().items():
        default = Settings.__struct_defaults__[Settings.__struct_fields__.index(field)]
        shown = ",".join(default) if isinstance(default, tuple) else str(default)
        (row,) = re.findall(rf"^\| `{variable}` \| (.*?) \|", OPERATING, re.M)
        assert shown in row.replace("none", "None").replace("`", ""), variable
    told = {cells[0].strip("`") for cells in table(OPERATING, "variable | default")}
    assert told == set(Settings.variables().values())
    for field in SECRET_SETTINGS:
        assert f"`{Settings.variables()[field]}_FILE`" in OPERATING


# Runs the program once for all its pages of help, as each start takes its time.
HELP = """
import contextlib, io, json, runpy, sys
told = {}
for words in json.loads(sys.argv[1]):
    sys.argv = ["botfarm.py", *words.split(), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_path("botfarm.py", run_name="__main__")
    told[words] = out.getvalue()
json.dump(told, sys.stdout)
"""


def names_in(text: str) -> set[str]:
    """The commands that a page of help lists."""
    return set(re.findall(r"^ {2,4}([a-z]+) {2,}\S", text, re.M))


def test_the_table_of_commands_has_each_with_its_flags():
    rows = {command.strip("`"): set(re.findall(r"`(--[a-z-]+)`", flags))
            for command, _, flags in table(OPERATING, "command | what it does")}  # fmt: skip
    pages = json.dumps(["", "client", *rows])
    done = subprocess.run([sys.executable, "-c", HELP, pages], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert names_in(told[""]) == {name.partition(" ")[0] for name in rows}
    assert {f"client {name}" for name in names_in(told["client"])} == {name for name in rows if " " in name}
    of_settings = {f"--{name.replace('_', '-')}" for name in Settings.__struct_fields__ if name not in SECRET_SETTINGS}
    for name, flags in rows.items():
        taken = set(re.findall(r"^\s+(?:-\w, )?(--[a-z-]+)", told[name], re.M)) - {"--help"}
        assert taken == (of_settings if name == "serve" else flags), name


def test_the_table_of_scopes_has_each():
    assert [cells[0].strip("`") for cells in table(PAGES["docs/security.md"], "scope | allows")] == list(SCOPES)


def problems() -> set[tuple[str, str]]:
    """Status and slug of all that can be refused."""
    found, new = set(), [Problem]
    while new:
        kind = new.pop()
        found.add((str(kind.status_code), kind.slug))
        new += kind.__subclasses__()
    return found


def test_the_table_of_problems_has_each_with_its_status():
    rows = [(cells[0], cells[1].strip("`")) for cells in table(CALLS, "status | slug")]
    assert len(rows) == len(set(rows))
    assert set(rows) == problems()


@every_page
def test_each_status_that_is_told_of_a_problem_is_its_own(name):
    text = re.sub(r"\s+", " ", without_blocks(PAGES[name]))
    assert set(re.findall(r"\b([45]\d\d) `([a-z-]+)`", text)) <= problems()


def test_the_way_through_the_rooms_names_all_of_them():
    rows = table(PAGES["docs/development.md"], "floor | room")
    rooms = [ROOT / cells[1].strip("`") for cells in rows]
    assert set(rooms) == {ROOT / "botfarm.py", *ROOT.glob("farm/*.py")} - {ROOT / "farm/__init__.py"}
    floors = [int(cells[0]) for cells in rows]
    assert floors == sorted(floors, reverse=True)


# docs/calls.md, beside the OpenAPI document

REFUSED_BY_FORM = {400, 401, 403, 413, 415, 422, 431, 500, 503}  # docs/calls.md tells of them once for all calls


@cache
def document() -> dict[str, Any]:
    """With the ids in paths named as the page names them."""
    told = json.loads(command("openapi", env={"BOTFARM_AUTH": "on", "BOTFARM_SIGNING_KEYS": KEY}).stdout)
    told["paths"] = {re.sub(r"\{\w+\}", "{id}", path): operations for path, operations in told["paths"].items()}
    return told


def calls() -> dict[str, dict[str, Any]]:
    """`POST /locks` and what the document says of it."""
    paths = document()["paths"].items()
    return {f"{method.upper()} {path}": told for path, operations in paths for method, told in operations.items()}


def section(name: str) -> str:
    """What the page says of a call."""
    found = re.search(rf"^### `{re.escape(name)}`\n(.*?)(?=^##|\Z)", CALLS, re.M | re.S)
    assert found, name
    return found[1]


DESCRIBED = re.findall(r"^### `(.*)`$", CALLS, re.M)
every_call = pytest.mark.parametrize("name", DESCRIBED)


def test_every_call_is_described():
    told = [re.sub(r"`", "", cells[0]) for cells in table(CALLS, "call | what it does")]
    assert set(told) == set(calls())
    assert set(DESCRIBED) == {name for name in told if re.search(" /(users|locks|pools|overview)", name)}
    for name in set(told) - set(DESCRIBED):
        assert f"`{name}`" in CALLS.partition("## Service")[2], name


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """The struct that a schema means, also where it may be left out."""
    if "$ref" in schema:
        return document()["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    choices = [choice for choice in schema.get("oneOf", schema.get("anyOf", [])) if choice.get("type") != "null"]
    return resolved(choices[0]) if choices else schema


def told_fields(name: str, head: str) -> dict[str, list[str]]:
    text = section(name)
    return {cells[0].strip("`"): cells[1:] for cells in table(text, head)} if f"| {head}" in text else {}


def is_told(schema: dict[str, Any], required: bool, value: str, default: str) -> None:
    """A row says the limits of a value, and its default or that it is needed."""
    given = schema.get("default")
    schema = resolved(schema)
    for limit in ("minLength", "maxLength", "minimum", "maximum", "minItems", "maxItems", "maxProperties"):
        assert limit not in schema or re.search(rf"\b{schema[limit]}\b", value), (limit, value)
    shown = "" if given in (None, []) else json.dumps(given)
    assert default.strip("`") == ("needed" if required else shown)


def test_the_scope_of_each_call_is_told():
    told = {cells[0].strip("`"): cells[2].strip("`|").split() for cells in table(CALLS, "call | what it does")}
    for name, operation in calls().items():
        assert told[name] == [scope for way in operation["security"] for scopes in way.values() for scope in scopes], (
            name
        )


async def test_the_example_of_a_problem_is_what_a_full_pool_answers(api, project):
    await make_users(api, project, 2, env="stage")
    for _ in range(2):
        assert (await acquire(api, project, env="stage")).status_code == 201
    refused = (await acquire(api, project, env="stage")).json()
    (text,) = re.findall(r"^```json\n(.*?)^```$", CALLS.partition("## Users")[0], re.M | re.S)
    example = json.loads(text)
    example["detail"] = example["detail"].replace("22222222-2222-4222-8222-222222222222", project)
    assert example | {"next_free_at": refused["next_free_at"]} == refused


@every_call
def test_the_body_of_a_call_is_that_of_the_program(name):
    body = calls()[name].get("requestBody", {}).get("content", {}).get("application/json")
    schema = {"properties": {}} | (resolved(body["schema"]) if body else {})
    rows = told_fields(name, "field | value")
    assert rows.keys() == schema["properties"].keys()
    for field, (value, default, _) in rows.items():
        is_told(schema["properties"][field], field in schema.get("required", []), value, default)


@every_call
def test_the_query_of_a_call_is_that_of_the_program(name):
    parameters = {p["name"]: p for p in calls()[name].get("parameters", []) if p["in"] == "query"}
    rows = told_fields(name, "parameter | value")
    assert rows.keys() == parameters.keys()
    for field, (value, default, _) in rows.items():
        is_told(parameters[field]["schema"], bool(parameters[field].get("required")), value, default)


@every_call
def test_only_calls_that_acquire_take_a_key(name):
    keyed = any(p["in"] == "header" for p in calls()[name].get("parameters", []))
    assert ("Header: `Idempotency-Key`" in section(name)) == keyed


@every_call
def test_the_answers_of_a_call_are_those_of_the_program(name):
    statuses = {int(status) for status in calls()[name]["responses"]}
    text = re.sub(r"\s+", " ", section(name))
    assert {int(status) for status in re.findall(r"Answer: (\d+)", text)} == {s for s in statuses if s < 300}
    assert all(f" {status}, " in text for status in statuses if 300 <= status < 400)
    told = re.search(r"Problems: (.*)", text)
    refused = {int(status) for status in re.findall(r"(\d+) `", told[1])} if told else set()
    assert refused - REFUSED_BY_FORM == {status for status in statuses if status >= 400} - REFUSED_BY_FORM
    assert refused <= statuses


def looks_like(example: Any, schema: dict[str, Any]) -> None:
    """An example has what the program answers, by name and kind, at every depth."""
    schema = resolved(schema)
    if isinstance(example, list):
        for item in example:
            looks_like(item, schema["items"])
    if isinstance(example, dict) and "properties" in schema:
        assert set(schema["required"]) <= example.keys() <= schema["properties"].keys()
        for key, value in example.items():
            looks_like(value, schema["properties"][key])


@every_call
def test_the_example_of_an_answer_is_one(name):
    examples = re.findall(r"^```json\n(.*?)^```$", section(name), re.M | re.S)
    for example in examples:
        (answer,) = (told for status, told in calls()[name]["responses"].items() if int(status) < 300)
        looks_like(json.loads(example), answer["content"]["application/json"]["schema"])


def test_there_is_an_example_of_each_kind_of_answer():
    for name in ("POST /users", "POST /users/import", "GET /users/{id}/history", "GET /pools", "POST /locks"):
        assert "```json" in section(name)
