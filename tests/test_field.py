"""What people meet in the field: files, bodies and calls as they really are."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import re
import sys
import tempfile
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import asyncpg
import httpx
import hypothesis
import jwt
import pytest
import ready
from conftest import acquire, command, environment, examples, make_users, raw, serving, settings, slug
from hypothesis import strategies as st
from litestar.exceptions import ClientException

import farm.database
import farm.settings
import farm.waiting
from farm.commands import main
from farm.imports import exported, labels_of
from farm.locks import why_not_this
from farm.words import FIRST_PLACE, UserFilter

PROJECT = "11111111-1111-4111-8111-111111111111"

# ---- Files ---------------------------------------------------------------------------------------------------

EXPORTED = {"Accept": "text/csv"}
CSV, NDJSON = {"Content-Type": "text/csv"}, {"Content-Type": "application/x-ndjson"}
FORMATS = pytest.mark.parametrize(("accept", "sent"), [({}, NDJSON), (EXPORTED, CSV)], ids=["NDJSON", "CSV"])


async def export(api, project, accept=EXPORTED):
    answer = await api.get("/users/export", params={"project_id": project}, headers=accept)
    assert answer.status_code == 200
    return answer


async def send(api, content, headers=CSV):
    return await api.post("/users/import", content=content, headers=headers)


async def told(api, content, headers=CSV):
    """Line, field and message of each error of an import."""
    answer = await send(api, content, headers)
    assert slug(answer) == "invalid", answer.text
    return [(error["line"], error["field"], error["message"]) for error in answer.json()["errors"]]


@FORMATS
async def test_an_export_is_an_import_that_changes_nothing(api, project, accept, sent):
    users = await make_users(api, project, 4, labels={"role": "admin", "empty": ""}, domain="canary")
    await api.put(f"/users/{users[1]['id']}/lock", json={"holder": "somebody"})
    await api.post(f"/users/{users[2]['id']}/quarantine", json={"reason": 'a, "reason"'})
    lock = (await api.put(f"/users/{users[3]['id']}/lock")).json()
    await api.delete(f"/locks/{lock['id']}?cooldown=600")
    before = (await api.get("/users", params={"project_id": project})).json()
    exported = await export(api, project, accept)
    assert exported.headers["vary"] == "Accept"
    answer = await send(api, exported.content, {"Content-Type": exported.headers["content-type"]})
    assert (answer.status_code, answer.json()) == (200, {"created": 0, "updated": 0, "unchanged": 4})
    assert exported.headers["content-type"].partition(";")[0] == sent["Content-Type"]
    assert (await api.get("/users", params={"project_id": project})).json() == before
    granted = (await acquire(api, project)).json()["user"]
    assert (granted["login"], granted["password"]) == ("bot-0", "pw-0")


@pytest.fixture(scope="module")
def http(service):
    with httpx.Client(base_url=service.url, timeout=30) as opened:
        yield opened


PLAIN = st.text(st.characters(exclude_categories=("Cc", "Cs")) | st.sampled_from("=+-@,;\"' \u2028\ufeff"), max_size=12)
USERS = st.dictionaries(
    PLAIN.filter(bool),
    st.dictionaries(st.from_regex(r"[A-Za-z0-9_.-]{1,5}", fullmatch=True), PLAIN, max_size=3),
    max_size=4,
)


@FORMATS
@hypothesis.settings(max_examples=examples(100), deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(users=USERS)
def test_whatever_logins_and_labels_are_an_export_is_an_import(http, accept, sent, users):
    project = str(uuid.uuid4())
    made = [{"login": login, "labels": labels} for login, labels in users.items()]
    lines = "\n".join(json.dumps(user | {"password": "p", "project_id": project, "env": "prod"}) for user in made)
    assert http.post("/users/import", content=lines, headers=NDJSON).json()["created"] == len(made)
    exported = http.get("/users/export", params={"project_id": project}, headers=accept).content
    answer = http.post("/users/import", content=exported, headers=sent)
    assert answer.json() == {"created": 0, "updated": 0, "unchanged": len(made)}
    if accept == EXPORTED:  # and so it is for others who read CSV
        header, *rows = csv.reader(io.StringIO(exported.decode(), newline=""))
        assert [row[0] for row in rows] == list(users)
        assert header[:4] == ["login", "project_id", "env", "domain"]


@FORMATS
async def test_an_export_is_refused_by_line_where_its_users_are_not_known(api, project, accept, sent):
    await make_users(api, project, 2)
    exported = (await export(api, project, accept)).text.replace(project, str(uuid.uuid4()))
    missing = "a password is needed: this user is new"
    first = 2 if sent == CSV else 1
    assert await told(api, exported, sent) == [(first, "password", missing), (first + 1, "password", missing)]


async def test_fields_that_only_tell_are_passed_over_and_all_others_are_not(api, project):
    user = {"login": "a", "password": "p", "project_id": project, "env": "prod"}
    telling = dict.fromkeys(
        ("id", "created_at", "state", "locktime", "lock", "quarantine", "available_at", "has_totp"), 5
    )
    assert (await send(api, json.dumps(user | telling), NDJSON)).json()["created"] == 1
    named = ",".join([*user, *telling])
    assert (await send(api, f"{named}\n{','.join(user.values())}{',5' * 8}\n")).json()["unchanged"] == 1
    for name in ("ids", "has", "State", "fence"):
        assert await told(api, json.dumps(user | {name: 5}), NDJSON) == [(1, name, "unknown field")]
        assert (await told(api, f"{','.join([*user, name])}\n"))[0][0] == 1
    refused = await api.post("/users", json=user | {"id": str(uuid.uuid4())})
    assert [error["field"] for error in refused.json()["errors"]] == ["id"]


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "application/x-ndjson"),
        ("*/*", "application/x-ndjson"),
        ("application/json", "application/x-ndjson"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "application/x-ndjson"),
        ("application/x-ndjson, text/csv", "application/x-ndjson"),
        ("text/csv;q=0.5, application/x-ndjson", "application/x-ndjson"),
        ("text/csv;q=0", "application/x-ndjson"),
        ("text/csv;q=0.5, */*;q=0.8", "application/x-ndjson"),
        ("Text/CSV", "text/csv"),
        ("text/csv; charset=utf-8; header=present", "text/csv"),
        ("text/csv, */*", "text/csv"),
        ("text/*", "text/csv"),
        ("application/x-ndjson;q=0.5, text/csv;q=0.51", "text/csv"),
        ("application/x-ndjson; q=0, */*; q=0.1", "text/csv"),
    ],
)
async def test_the_accept_header_says_which_form_an_export_has(api, project, accept, expected):
    exported = await export(api, project, {"Accept": accept})
    assert exported.headers["content-type"].partition(";")[0] == expected
    head = await api.head("/users/export", headers={"Accept": accept})
    assert (head.content, head.headers["content-type"]) == (b"", exported.headers["content-type"])


async def test_csv_has_a_column_for_each_label_of_the_users_that_fit_and_no_other(api, project):
    await make_users(api, project, login="a", labels={"z": "=1+1", "b": 'say "hi", you'})
    await make_users(api, project, login="b", labels={"empty": ""})
    await make_users(api, project, login="c", env="prod", labels={"other": "x"})
    answer = await api.get("/users/export", params={"project_id": project, "env": "stage"}, headers=EXPORTED)
    assert answer.text.split("\r\n") == [
        "login,project_id,env,domain,label.b,label.empty,label.z",
        f'a,{project},stage,regular,"say ""hi"", you",,=1+1',
        f'b,{project},stage,regular,,"",',
        "",
    ]


async def test_a_label_that_comes_up_during_an_export_as_csv_is_not_lost_without_a_word(api, project, database):
    """The header is written by then, so the stream ends before its end."""
    lines = [{"login": f"u{n}", "password": "p", "project_id": project, "env": "prod"} for n in range(501)]
    assert (await send(api, "\n".join(map(json.dumps, lines)), NDJSON)).json()["created"] == 501
    last = (await api.get("/users", params={"project_id": project, "login": "u500"})).json()["items"][0]
    filters = UserFilter(uuid.UUID(project), *[None] * 5, [], None)
    async with farm.database.open_pool(database, 1, "auto", 10) as pool:
        rows = await pool.fetch(farm.database.SQL["list_users"], *filters.columns((*FIRST_PLACE, 500), None))
        parts = exported(pool, filters, None, rows, await labels_of(pool, filters, None, rows))
        assert (await anext(parts)).startswith(b"login,")
        assert (await anext(parts)).count(b"\n") == 500
        await api.patch(f"/users/{last['id']}", json={"labels": {"new": "1"}})
        with pytest.raises(ClientException, match="The label new came up"):
            await anext(parts)


def test_more_labels_than_a_header_can_hold_are_told_before_anything_is_sent(empty_database, project):
    users = [
        {"login": f"u{n}", "password": "p", "project_id": project, "env": "prod",
         "labels": {f"{'k' * 58}{n * 32 + m:05}": "" for m in range(32)}}
        for n in range(30)
    ]  # fmt: skip
    with serving(settings(empty_database)) as alone:
        made = httpx.post(f"{alone.url}/users/import", content="\n".join(map(json.dumps, users)), headers=NDJSON)
        assert made.json()["created"] == 30
        answer = httpx.get(f"{alone.url}/users/export", headers=EXPORTED)
    assert slug(answer) == "invalid"
    assert "960 labels, too many" in answer.json()["detail"]


async def test_over_http_1_0_an_export_ends_with_the_connection(api, project, service):
    """There are no chunks there (RFC 9112, section 6.1): whoever reads one would take their lengths for lines."""
    await make_users(api, project, count=3)
    for method, lines in (("GET", 3), ("HEAD", 0)):
        path = f"/users/export?project_id={project}"
        reply = await asyncio.to_thread(raw, service.url, f"{method} {path} HTTP/1.0\r\n\r\n".encode())
        head, _, body = reply.partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        assert [json.loads(line)["login"] for line in body.splitlines()] == [f"bot-{n}" for n in range(lines)]
    sized = await asyncio.to_thread(raw, service.url, b"GET /livez HTTP/1.0\r\n\r\n")
    assert b"content-length: 15" in sized


async def test_the_api_document_tells_both_forms_of_an_export(api):
    paths = (await api.get("/docs/openapi.json")).json()["paths"]
    content = paths["/users/export"]["get"]["responses"]["200"]["content"]
    assert list(content) == ["application/x-ndjson", "text/csv"]


@pytest.mark.parametrize("media", ["application/x-ndjson", "text/csv"])
def test_the_command_export_passes_bytes_through_as_they_are(empty_database, project, media):
    """U+2028 and its like end lines for Python, and for nobody else."""
    texts = ("a\u2028b", "\u2029", "\u00a0x\u3000", '"\\', "\U0001f600")
    made = [{"login": f"{n}{text}", "labels": {"text": text}} for n, text in enumerate(texts)]
    lines = "\n".join(json.dumps(user | {"password": "p", "project_id": project, "env": "prod"}) for user in made)
    with serving(settings(empty_database)) as alone:
        created = command("import", "-", "--url", alone.url, text=lines)
        answer = httpx.get(f"{alone.url}/users/export", headers={"Accept": media})
        written = command("export", "--url", alone.url, "--type", media)
        assert written.stdout.encode() == answer.content
        again = command("import", "-", "--type", media, "--url", alone.url, text=written.stdout)
    assert json.loads(created.stdout) == {"created": 5, "updated": 0, "unchanged": 0}
    assert json.loads(again.stdout) == {"created": 0, "updated": 0, "unchanged": 5}


@pytest.mark.parametrize(
    "name",
    [
        "my users.csv",
        "-dash.csv",
        "~/home.csv",
        "~x.csv",
        "USERS.CSV",
        os.fsdecode(b"\xe9t\xe9.csv"),
        "a\nb.csv",
        "./-",
    ],
)
def test_the_command_import_takes_names_of_files_as_people_write_them(
    tmp_path, monkeypatch, capsys, service, project, name
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path(name.removeprefix("~/")).write_text(f"login,password,project_id,env\nada,p,{project},stage")
    assert main(["import", "--url", service.url, "--type", "text/csv", "--", name]) == 0
    assert json.loads(capsys.readouterr().out)["created"] == 1


@pytest.mark.parametrize("name", ["USERS.CSV", "users.csv"])
def test_the_ending_of_a_file_says_that_it_is_csv(tmp_path, capsys, service, project, name):
    (tmp_path / name).write_text(f"login,password,project_id,env\nada,p,{project},stage")
    assert main(["import", "--url", service.url, str(tmp_path / name)]) == 0
    assert json.loads(capsys.readouterr().out)["created"] == 1


@pytest.mark.parametrize("name", [".", "none.csv", "~/none.csv", "", os.fsdecode(b"\xff"), "none\nb.csv"])
def test_a_file_that_can_not_be_read_is_told_in_one_line(tmp_path, monkeypatch, capsys, name):
    """Before the service is asked for anything: here is none."""
    monkeypatch.chdir(tmp_path)
    assert main(["import", "--url", "http://127.0.0.1:1", "--", name]) == 1
    written = capsys.readouterr()
    assert (written.out, written.err.count("\n")) == ("", 1)
    assert "directory" in written.err


def run(*arguments, **files):
    """A command with such files for its standard input, output and errors; its status and its errors."""
    with tempfile.TemporaryFile() as errors, open(os.devnull, "r+b") as nothing:
        kept = [files.get(name, nothing) for name in ("stdin", "stdout")]
        status = ready.fork(arguments, environment(None), *kept, errors).wait(30)
        return status, ready.read(errors)


async def test_an_export_into_a_pipe_that_closes_or_a_disk_that_is_full_is_told_in_one_line(api, project, service):
    await make_users(api, project)
    ours, theirs = os.pipe()
    os.close(ours)
    status, errors = await asyncio.to_thread(run, "export", "--url", service.url, stdout=theirs)
    os.close(theirs)
    assert (status, errors) == (1, "Error: Standard output was closed before the end of the export.\n")
    with open("/dev/full", "wb") as full:
        status, errors = await asyncio.to_thread(run, "export", "--url", service.url, stdout=full)
    assert (status, errors) == (1, "[Errno 28] No space left on device\n")


def test_standard_input_and_output_that_are_closed_are_told_in_one_line(monkeypatch, capsys, service):
    """As `<&-` and `>&-` close them."""
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["import", "--url", service.url, "-"]) == 1
    assert capsys.readouterr().err == "Error: Standard input is closed.\n"
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["export", "--url", service.url]) == 1
    assert capsys.readouterr().err == "Error: Standard output is closed.\n"


@pytest.mark.parametrize(
    "url", ["http://h:x", "http://[::1", os.fsdecode(b"http://\xff"), "http://a..b", "ftp://h", "http://", "", "h?x=1"]
)
def test_what_is_no_address_of_a_service_is_told_in_a_line(url, capsys):
    for words in (["export"], ["import", "-"]):
        assert main([*words, "--url", url]) == 2
        assert f"Error: Invalid value for '--url': {url!r} is not an address" in capsys.readouterr().err


def test_a_service_that_does_not_answer_is_named_and_no_password(capsys):
    assert main(["export", "--url", "http://u:hidden@127.0.0.1:1"]) == 1
    told = "http://127.0.0.1:1 does not answer: [Errno 111] Connection refused."
    assert capsys.readouterr().err == f"{told} Is the service there? --url names another one.\n"
    assert main(["check", "--url", "http://u:hidden@127.0.0.1:1"]) == 1
    assert capsys.readouterr().err == f"{told.rstrip('.')}\n"


def test_a_service_that_gives_no_token_is_named_and_no_password(monkeypatch, capsys, service):
    monkeypatch.setenv("BOTFARM_CLIENT_ID", str(uuid.uuid4()))
    monkeypatch.setenv("BOTFARM_CLIENT_SECRET", "x")
    assert main(["export", "--url", service.url.replace("//", "//u:hidden@")]) == 2
    assert capsys.readouterr().err.startswith(f"BOTFARM_CLIENT_ID: no token of {service.url}: 404 ")


@pytest.mark.parametrize("body", ['{"title": "no route"}', "[]", "null", "<html>"])
def test_what_a_proxy_answers_is_shown_as_it_is(body, capsys):
    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(502)
            self.send_header("Content-Type", "application/problem+json")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *words: object) -> None:
            """None."""

    with HTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        thread = threading.Thread(target=proxy.handle_request)
        thread.start()
        assert main(["export", "--url", f"http://127.0.0.1:{proxy.server_port}"]) == 1
        thread.join(5)
    assert capsys.readouterr().err == f"502: {body}\n"


@pytest.mark.parametrize("secret", [None, "", os.fsdecode(b"\xff"), "s3cret\n"])
def test_half_a_client_and_one_that_is_no_text_are_told(monkeypatch, capsys, service, secret):
    monkeypatch.setenv("BOTFARM_CLIENT_ID", str(uuid.uuid4()))
    if secret is not None:
        monkeypatch.setenv("BOTFARM_CLIENT_SECRET", secret)
    assert main(["export", "--url", service.url]) == 2
    told = "BOTFARM_CLIENT_ID and BOTFARM_CLIENT_SECRET: set both, to what `client add` has printed\n"
    assert capsys.readouterr().err == told


HEADER = "login,password,project_id,env"


@pytest.mark.parametrize(
    ("header", "field", "told_name"),
    [
        ("project_id,env,login, password", "password", '" password"'),
        ("project_id,env,login,password ", "password", '"password "'),
        ("project_id,env,Login,password", "login", '"Login"'),
        ("Project ID,env,login,password", "project_id", '"Project ID"'),
        ("project-id,env,login,password", "project_id", '"project-id"'),
        ("project_id,ENV,login,password", "env", '"ENV"'),
        ("project_id,env,\u00a0login,password", "login", '"\\u00a0login"'),
        ("project_id,env,login,\ufeffpassword", "password", '"\\ufeffpassword"'),
        ("project_id,env,login,password,Created_At", "created_at", '"Created_At"'),
        ("project_id,env,login,password,HAS_SESSION", "has_session", '"HAS_SESSION"'),
        ("project_id,env,login,password, label.role", "label.role", '" label.role"'),
        ("project_id,env,login,password,label.role ", "label.role", '"label.role "'),
        ("project_id,env,login,password,Label. role", "label.role", '"Label. role"'),
        ('project_id,env,login," password"', "password", '" password"'),
    ],
)
async def test_a_csv_header_that_differs_by_blanks_or_case_is_told_the_right_name(api, header, field, told_name):
    column = next(n for n, name in enumerate(header.split(","), 1) if json.dumps(name.strip('"')) == told_name)
    message = f"column {column} is called {told_name}: write {field!r}"
    assert await told(api, f"{header}\nnothing,of,this,is,told\n".encode()) == [(1, field, message)]


async def test_a_label_keeps_its_case_and_values_keep_their_blanks(api, project):
    text = f"{HEADER},label.Role,label.role\n ada , secret\t,{project},stage, a,b \n"
    assert (await send(api, text)).json()["created"] == 1
    granted = (await acquire(api, project)).json()["user"]
    assert granted["login"] == " ada "
    assert granted["password"] == " secret\t"
    assert granted["labels"] == {"Role": " a", "role": "b "}


@pytest.mark.parametrize(("sign", "word"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
@pytest.mark.parametrize("quote", ["", '"'])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
async def test_a_csv_with_another_separator_is_told_as_just_that(api, sign, word, quote, mark):
    header = sign.join(f"{quote}{name}{quote}" for name in HEADER.split(","))
    message = f"the file is separated by {word}; save it with commas"
    assert await told(api, f"{mark}{header}\r\na{sign}b{sign}c{sign}d\r\n".encode()) == [(1, None, message)]


@pytest.mark.parametrize("text", [f"{HEADER}\n", '[\n  {"login": "ada"}\n]', '{"login": "a"}{"login": "b"}'])
async def test_what_is_not_json_by_lines_is_told_what_is_read(api, text):
    answer = await api.post("/users/import", content=text, headers=NDJSON)
    assert slug(answer) == "invalid"
    told = "the line is not JSON in UTF-8: write one object a line, or send CSV as text/csv"
    assert answer.json()["errors"][0] == {"line": 1, "field": None, "message": told}


@pytest.mark.parametrize("headers", [CSV, NDJSON], ids=["CSV", "NDJSON"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
async def test_a_file_in_utf_16_is_told_as_just_that(api, project, headers, encoding):
    text = f"{HEADER}\n" if headers == CSV else '{"login": "a"}\n'
    message = "the file is in UTF-16; save it in UTF-8 (Excel: CSV UTF-8)"
    assert await told(api, (text * 200).encode(encoding), headers) == [(1, None, message)]


async def test_the_mark_of_windows_before_utf_8_is_passed_over(api, project):
    user = {"login": "a", "password": "p", "project_id": project, "env": "prod"}
    assert (await send(api, f"\ufeff{HEADER}\na,p,{project},prod".encode())).json()["created"] == 1
    quoted = ",".join(f'"{name}"' for name in HEADER.split(","))
    assert (await send(api, f"\ufeff{quoted}\na,p,{project},prod".encode())).json()["unchanged"] == 1
    assert (await send(api, f"\ufeff{json.dumps(user)}".encode(), NDJSON)).json()["unchanged"] == 1


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('a, "p",{project},stage', "the cell in column 2 has a quote or a line end inside"),
        ('a,p"q"r,{project},stage', "the cell in column 2 has a quote or a line end inside"),
        ('"a" ,p,{project},stage', "the cell in column 1 has a quote or a line end inside"),
        ("a,p\rb,{project},stage", "the cell in column 2 has a quote or a line end inside"),
        ("a,p,{project}", "the line has 3 columns, the header has 4"),
        ("a,p,{project},stage,", "the line has 5 columns, the header has 4"),
        ("a,p,q,{project},stage", "the line has 5 columns, the header has 4"),
        ("  ", "the line has 1 columns, the header has 4"),
        ('a,"p,{project},stage', "a quote is not closed"),
        (f'a,"{"p" * 70_000},stage', "the line is over 65536 bytes"),
        ('a,"p' + 40_000 * "\n" + "," * 40_000, "is a quote not closed?"),
    ],
)
async def test_a_csv_line_that_is_not_what_it_seems_is_refused_and_not_guessed(api, project, line, fault):
    text = f"{HEADER}\r\n\r\n\r\n{line.replace('{project}', project)}\r\n\r\n"
    (error,) = await told(api, text.encode())
    assert error[:2] == (4, None)
    assert fault in error[2]


async def test_a_column_twice_is_told_once_and_an_empty_line_is_none(api, project):
    assert await told(api, f"{HEADER},env\na") == [(1, "env", 'the column "env" is there twice')]
    assert await told(api, f"{HEADER},label.a,label.a\na") == [(1, "label.a", 'the column "label.a" is there twice')]
    text = f"\r\n\n{HEADER}\n\n\r\na,p,{project},prod\n\n"
    assert (await send(api, text)).json() == {"created": 1, "updated": 0, "unchanged": 0}


CHARSETS = ["iso-8859-1", '"utf-16"', "windows-1252", "utf-8-sig", "", "x" * 100]


@pytest.mark.parametrize("charset", CHARSETS)
@pytest.mark.parametrize(
    "form", ["; charset={}", ";CHARSET={} ; x=y", "; x=y; charset={}", "; charset=utf-8; charset={}"]
)
async def test_a_charset_that_is_not_utf_8_is_refused_for_every_body(api, project, charset, form):
    (user,) = await make_users(api, project)
    calls = [
        ("POST", "/users", "application/json", "{}"),
        ("PATCH", f"/users/{user['id']}", "application/json", '{"domain": "canary"}'),
        ("POST", "/locks", "application/json", json.dumps({"project_id": project})),
        ("PUT", f"/users/{user['id']}/lock", "application/json", "{}"),
        ("DELETE", f"/users/{user['id']}", "application/json", "{}"),
        ("POST", "/users/import", "application/x-ndjson", ""),
        ("POST", "/users/import", "text/csv", f"{HEADER}\na,p,{project},prod"),
    ]
    for method, path, media, body in calls:
        headers = {"Content-Type": media + form.format(charset)}
        answer = await api.request(method, path, content=body, headers=headers)
        assert slug(answer) == "unsupported-media-type", (method, path, answer.text)
        assert "UTF-8" in answer.json()["detail"]
    assert (await api.get(f"/users/{user['id']}")).json() == user


@pytest.mark.parametrize("charset", ["utf-8", "UTF8", '"utf-8"', "us-ascii", "Utf-8; x=y", "utf-8''"[:5]])
async def test_utf_8_by_any_of_its_names_is_taken(api, project, charset):
    user = {"login": "日", "password": "p", "project_id": project, "env": "prod"}
    for path, media in (("/users", "application/json"), ("/users/import", "application/x-ndjson")):
        headers = {"Content-Type": f"{media}; charset={charset}"}
        answer = await api.post(path, content=json.dumps(user).encode(), headers=headers)
        assert answer.status_code in (200, 201), answer.text
    text = f"{HEADER}\n日,p,{project},prod".encode()
    assert (await send(api, text, {"Content-Type": f"text/csv;charset={charset}"})).json()["unchanged"] == 1


async def test_a_content_type_of_60_000_semicolons_holds_up_nobody(api, project):
    begin = time.process_time()  # the service is of this process
    answer = await api.post("/locks", content=b"{}", headers={"Content-Type": 'text/x; "' + ";" * 60_000})
    assert slug(answer) == "unsupported-media-type"
    assert len(answer.text) < 500
    assert time.process_time() - begin < 1


def test_a_form_for_a_token_in_another_charset_is_refused_in_the_form_of_tokens(empty_database):
    keys = farm.settings.Secret("s1:" + "C" * 43 + "=")
    with serving(settings(empty_database, auth="on", signing_keys=keys)) as secured:
        for charset, status in (("iso-8859-1", 415), ("utf-8", 401), ('"UTF-8"', 401)):
            headers = {"Content-Type": f"application/x-www-form-urlencoded; charset={charset}"}
            form = b"grant_type=client_credentials&client_id=x&client_secret=y"
            answer = httpx.post(f"{secured.url}/token", content=form, headers=headers)
            assert answer.status_code == status
            assert answer.json()["error"] == {415: "invalid_request", 401: "invalid_client"}[status]


# ---- Small things --------------------------------------------------------------------------------------------


async def test_a_user_is_told_by_the_statement_that_made_it(api, project, database):
    """Somebody else deletes each at once, and changes others: what comes back is what was made."""
    other = await asyncpg.connect(database)
    done = asyncio.Event()

    async def delete():
        while not done.is_set():
            where = f"project_id = '{project}'"
            await other.execute(f"delete from locks where user_id in (select id from users where {where})")
            await other.execute(f"delete from users where {where}")

    deleting = asyncio.create_task(delete())
    body = {"password": "p", "project_id": project, "env": "prod", "labels": {"a": "b"}}
    for round in range(10):
        made = [api.post("/users", json=body | {"login": f"u{n}-{round}"}) for n in range(20)]
        for answer in await asyncio.gather(*made):
            assert answer.status_code == 201, answer.text
            user = answer.json()
            assert (user["state"], user["lock"], user["locktime"], user["quarantine"]) == ("free", None, None, None)
    done.set()
    await deleting
    await other.close()
    user = (await make_users(api, project))[0]
    assert (await api.get(f"/users/{user['id']}")).json() == user


def test_a_token_that_is_refused_for_its_time_says_so(empty_database):
    signing = "s1:" + "C" * 43 + "="
    key, now = farm.settings.parse_keys(signing)["s1"], int(time.time())
    claims = {"iss": "botfarm", "aud": "botfarm", "sub": str(uuid.uuid4()), "jti": "x", "scope": "locks"}
    times = {
        "has expired": {"iat": now - 700, "exp": now - 60},
        "is not valid yet": {"iat": now + 60, "exp": now + 600},
        "is not valid yet: ": {"iat": now, "exp": now + 600, "nbf": now + 60},
        "is not valid here": {"iat": now, "exp": now + 600, "aud": "other"},
    }
    configured = settings(empty_database, auth="on", signing_keys=farm.settings.Secret(signing))
    with serving(configured) as secured:
        for said, changes in times.items():
            token = jwt.encode(claims | changes, key, "HS256", headers={"kid": "s1"})
            answer = httpx.get(f"{secured.url}/users", headers={"Authorization": f"Bearer {token}"})
            assert slug(answer) == "unauthenticated"
            assert said in answer.json()["detail"]
            assert said in answer.headers["www-authenticate"]


def assert_contended(answer):
    """The answer of a call whose user others take in this very moment."""
    assert slug(answer) == "user-locked"
    assert answer.headers["retry-after"] == "1"
    assert (answer.json()["holder"], answer.json()["expires_at"]) == (None, None)
    assert "try again" in answer.json()["detail"]


@pytest.mark.parametrize("before", ["never locked", "free again", "locked"])
async def test_a_user_that_others_take_in_this_very_moment_is_locked_and_worth_another_try(
    api, project, database, before
):
    (user,) = await make_users(api, project)
    path = f"/users/{user['id']}/lock"
    if before != "never locked":
        lock = (await api.put(path, json={"holder": "somebody"})).json()
    if before == "free again":
        await api.delete(f"/locks/{lock['id']}")
    other = await asyncpg.connect(database)
    async with other.transaction():
        await other.execute(f"select from locks where user_id = '{user['id']}' for update")
        refused = [await api.put(path), await api.put(path, json={"wait": 1}), await api.delete(path)]
    await other.close()
    if before == "locked":
        assert {slug(answer) for answer in refused} == {"user-locked"}
        assert refused[0].json()["holder"] == "somebody"
    else:
        assert_contended(refused[0])
        assert_contended(refused[1])
    assert_contended(refused[2])
    assert (await api.delete(path)).status_code == 204
    assert (await api.put(path)).status_code == 201


GATE = "select pg_advisory_xact_lock(10012)"  # where a statement waits when it has its snapshot


async def test_a_user_that_was_released_in_this_very_moment_does_not_rest(api, project, database):
    """Its states are those of the beginning of the statement that counts, and the release came after that."""
    (user,) = await make_users(api, project)
    lock = (await api.put(f"/users/{user['id']}/lock")).json()
    gate, other = await asyncpg.connect(database), await asyncpg.connect(database)
    sql = farm.database.SQL["count_matching"].replace("$1::uuid[]", f"array['{user['id']}']::uuid[]")
    sql = re.sub(r"\$[2-5]::(\w+)\[\]", r"array[null]::\1[]", sql)
    async with gate.transaction():
        await gate.execute(GATE)
        # Sent together, so that the count has the clock of the gate and a snapshot from after it.
        counting = asyncio.create_task(other.execute(f"{GATE}; create temporary table counted as {sql}"))
        await asyncio.sleep(0.2)
        assert (await api.delete(f"/locks/{lock['id']}")).status_code == 204
    await counting
    (row,) = await other.fetch("select * from counted")
    assert (row["state"], row["free"]) == ("free", 1)
    answer = why_not_this(uuid.UUID(user["id"]), row)
    assert (answer.slug, answer.headers["Retry-After"]) == ("user-locked", "1")
    await gate.close()
    await other.close()


async def test_a_force_ends_the_lock_of_whoever_took_it_while_the_statement_ran(api, project, database, service):
    """Its snapshot has the lock before: that was released, and taken by another, until the row is reached."""
    (user,) = await make_users(api, project)
    path = f"/users/{user['id']}/lock"
    first = (await api.put(path, json={"holder": "first"})).json()
    gate, other = await asyncpg.connect(database), await asyncpg.connect(database)
    sql = farm.database.SQL["force_release"].replace("with", f"with gate as materialized ({GATE}),", 1)
    sql = sql.replace("where user_id = $1::uuid", "where user_id = $1::uuid and exists (select from gate)", 1)
    async with gate.transaction():
        await gate.execute(GATE)
        forcing = asyncio.create_task(other.fetchrow(sql, uuid.UUID(user["id"])))
        await asyncio.sleep(0.2)
        assert not forcing.done()
        assert (await api.delete(f"/locks/{first['id']}")).status_code == 204
        second = (await api.put(path, json={"holder": "second"})).json()
    row = await forcing
    assert (row["is_reached"], str(row["lock_id"]), row["holder"]) == (True, second["id"], "second")
    assert (await api.get(f"/users/{user['id']}")).json()["state"] == "free"
    history = (await api.get(f"/users/{user['id']}/history")).json()["items"]
    assert [(entry["holder"], entry["ended_by"]) for entry in history] == [("second", "forced"), ("first", "released")]
    await gate.close()
    await other.close()


@pytest.mark.parametrize("way", ["any", "by id", "set", "deleted"])
async def test_a_repeat_of_a_key_whose_lock_has_ended_is_told_at_once_though_it_would_wait(
    api, project, way, monkeypatch
):
    """Also where the user is held by another now, or gone: a new call would wait, this one for the desk's next look."""
    monkeypatch.setattr(farm.waiting, "POLL", 5)
    (user,) = await make_users(api, project)
    key = {"Idempotency-Key": str(uuid.uuid4())}
    by_id = ("PUT", f"/users/{user['id']}/lock", {"wait": 20})
    method, path, body = {
        "any": ("POST", "/locks", {"project_id": project, "wait": 20}), "by id": by_id, "deleted": by_id,
        "set": ("POST", "/locks/sets", {"users": [{"project_id": project}], "wait": 20}),
    }[way]  # fmt: skip
    granted = await api.request(method, path, json=body, headers=key)
    lock = granted.json()["locks"][0] if way == "set" else granted.json()
    repeated = await api.request(method, path, json=body, headers=key)
    assert repeated.json() == granted.json()
    await api.delete(f"/locks/{lock['id']}")
    if way == "deleted":
        assert (await api.delete(f"/users/{user['id']}")).status_code == 204
    else:
        assert (await acquire(api, project)).status_code == 201
    for _ in range(3):
        began = time.monotonic()
        answer = await api.request(method, path, json=body, headers=key)
        assert time.monotonic() - began < 4
        assert slug(answer) == "lock-ended"
    if way == "deleted":
        assert slug(await api.request(method, path, json=body)) == "user-not-found"


@pytest.mark.parametrize(
    ("method", "path", "body", "fields"),
    [
        ("POST", "/users", {"login": "", "password": "", "env": "x", "domain": "y", "project_id": 1, "labels": 1},
         ["login", "project_id", "labels", "password", "env", "domain"]),
        ("PATCH", "/users/{id}", {"login": "", "domain": "y", "labels": 1}, ["login", "labels", "domain"]),
        ("POST", "/locks", {"project_id": "z", "env": "x", "domain": "y", "ttl": 0, "wait": 10**6, "shoe": 1},
         ["shoe", "project_id", "ttl", "env", "domain", "wait"]),
        ("PUT", "/users/{id}/lock", {"ttl": 10**6, "wait": -1, "holder": "\n"}, ["wait", "holder", "ttl"]),
        ("POST", "/locks/sets", {"ttl": 0, "users": [{"env": "x", "domain": "y", "project_id": PROJECT}, {"env": 5}]},
         ["ttl", "users[0].env", "users[0].domain", "users[1].project_id", "users[1].env"]),
        ("POST", "/locks/sets", {"users": [7, {"project_id": PROJECT, "shoe": 1}]}, ["users[0]", "users[1].shoe"]),
        ("POST", "/locks/sets", {"holder": 5, "users": [{"env": "x", "project_id": PROJECT, "count": 1}]},
         ["holder", "users[0].env"]),
    ],
)  # fmt: skip
async def test_a_body_with_several_bad_values_names_them_all(api, project, method, path, body, fields):
    (user,) = await make_users(api, project)
    answer = await api.request(method, path.replace("{id}", user["id"]), json=body)
    assert slug(answer) == "invalid"
    assert sorted(error["field"] for error in answer.json()["errors"]) == sorted(fields)
