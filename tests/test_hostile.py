"""Input that means harm: whatever is sent, the service answers as its OpenAPI document says, and goes on."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, client, make_users, serving, settings

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
EXAMPLE = "11111111-1111-4111-8111-111111111111"  # the project of tests/schemathesis.toml


def schemathesis(url: str, examples: int, *options: str) -> int:
    """Run all checks over the whole document; the number of requests that were made."""
    config = ["--no-color", "--config-file", str(ROOT / "tests" / "schemathesis.toml")]
    run = ["run", f"{url}/docs/openapi.json", "--generation-database", "none", "--max-examples", str(examples)]
    done = subprocess.run(
        [str(SCHEMATHESIS), *config, *run, *options], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) generated, \1 passed", done.stdout)
    assert found, done.stdout[-2000:]
    return int(found[1])


async def test_every_reply_is_as_the_openapi_document_says(empty_database, long, caplog):
    """schemathesis, with all its checks: 1,000 requests and more, and thousands with --long."""
    with serving(settings(empty_database, max_wait=1)) as alone:
        async with client(alone.url) as api:
            await make_users(api, EXAMPLE, 50)
        if long:
            assert schemathesis(alone.url, 250, "--seed", "2") > 4000
        else:
            assert schemathesis(alone.url, 20, "--seed", "1") > 1000
        assert httpx.get(f"{alone.url}/livez").status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("path", ["/", "/livez", "/users", "/users/export", "/pools", "/docs", "/docs/openapi.json"])
async def test_head_is_get_without_the_body(api, path):
    whole, head = await api.get(path), await api.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert head.headers.get("content-length") == whole.headers.get("content-length")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/users", "GET, HEAD, OPTIONS, POST"),
        ("/users/", "GET, HEAD, OPTIONS, POST"),
        (f"/users/{EXAMPLE}", "DELETE, GET, HEAD, OPTIONS, PATCH"),
        (f"/users/{EXAMPLE}/lock", "DELETE, OPTIONS, PUT"),
        ("/", "GET, HEAD, OPTIONS"),
    ],
)
async def test_options_and_405_name_all_methods_of_a_path(api, path, allowed):
    asked = await api.options(path)
    assert (asked.status_code, asked.headers["allow"]) == (204, allowed)
    assert (await api.request("PROPFIND", path)).headers["allow"] == allowed


@pytest.mark.parametrize("path", ["//", "//users", "//livez/", "///"])
def test_a_path_that_begins_with_two_slashes_is_no_page(service, path):
    assert raw(service.url, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())[9:12] == b"404"


async def test_a_whole_number_may_be_written_with_a_point(api, project):
    await make_users(api, project)
    lock = await api.post("/locks", content=f'{{"project_id": "{project}", "ttl": 60.0}}')
    assert (lock.status_code, lock.json()["ttl"]) == (201, 60)
    refused = await api.patch(f"/locks/{lock.json()['id']}", content='{"ttl": 60.5}')
    assert refused.json()["detail"] == "ttl: 60.5 is not allowed: Expected `int | null`, got `float`"
    for number in ("1e308", "-1.0", "1e999", "NaN", '"60"', "true"):
        assert (await api.patch(f"/locks/{lock.json()['id']}", content=f'{{"ttl": {number}}}')).status_code in (
            400,
            422,
        )


def raw(url: str, *parts: bytes, pause: float = 0, seconds: float = 10) -> bytes:
    """What comes back over a connection of its own, until the service closes it; b"" where it is reset."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        answer = b""
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            while part := connection.recv(65536):
                answer += part
        return answer
