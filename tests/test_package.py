"""BotFarm as it is installed: from a wheel, or as one file that carries all that it needs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, free_port, wait_ready
from packaging.requirements import Requirement

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PARTS = dict(re.findall(r"^## (.*)\n\n((?:(?!## ).*\n)*)", (ROOT / "requirements.txt").read_text(), re.M))
EXAMPLE = "11111111-1111-4111-8111-111111111111"


def test_a_wheel_holds_all_of_the_program(tmp_path):
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*wheel, str(ROOT)], check=True, timeout=120)
    (file,) = tmp_path.glob("botfarm-*.whl")
    with zipfile.ZipFile(file) as packed:
        held = {name: packed.read(name) for name in packed.namelist() if ".dist-info/" not in name}
    there = {"botfarm.py": ROOT / "botfarm.py"}
    there |= {
        f"farm/{path.name}": path for path in ROOT.glob("farm/*.*") if path.suffix in (".py", ".html", ".css", ".js")
    }
    for folder in ("sql", "migrations"):
        there |= {f"farm/{folder}/{path.name}": path for path in ROOT.glob(f"{folder}/*.sql")}
    assert held == {name: path.read_bytes() for name, path in there.items()}


def asked(part: str) -> dict[str, Requirement]:
    """What requirements.txt asks for in a part, by name."""
    lines = re.findall(r"^# (?!via ).*\n([a-z0-9].*) \\$", PARTS[part], re.M)
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


@pytest.mark.parametrize(
    ("part", "bounds"),
    [
        ("The service", PROJECT["dependencies"]),
        ("The embedded database", PROJECT["optional-dependencies"]["embedded"]),
    ],
)
def test_what_is_tested_is_within_the_bounds_of_what_a_wheel_asks_for(part, bounds):
    pins, wanted = asked(part), {bound.name: bound for bound in map(Requirement, bounds)}
    assert wanted.keys() == pins.keys() - {"psutil"}  # the embedded database's own need
    for name, bound in wanted.items():
        (version,) = pins[name].specifier
        assert bound.specifier.contains(version.version)
        assert bound.extras == pins[name].extras


# -- One file --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["embedded", "without-database"])
def pyz(request, long):
    """botfarm.pyz alone in a folder that nobody can write to."""
    if not long:
        pytest.skip("installs all that BotFarm needs, into one file: with --long")
    with tempfile.TemporaryDirectory(prefix="bf-") as folder:
        os.chmod(folder, 0o755)
        alone = Path(folder, "alone")
        alone.mkdir()
        options = ["--without-database"] if request.param == "without-database" else []
        subprocess.run([sys.executable, ".ci/pyz", alone / "botfarm.pyz", *options], cwd=ROOT, check=True, timeout=600)
        alone.chmod(0o555)
        yield alone / "botfarm.pyz"
        alone.chmod(0o755)


@pytest.fixture
def run(pyz, empty_database):
    """Start the file, by a Python that has nothing else, with a database."""
    env = {"PATH": os.environ["PATH"], "SHIV_ROOT": str(pyz.parent.parent / "unpacked")}
    env |= {"BOTFARM_HOME": str(pyz.parent.parent / "home")}
    if not has_database(pyz):
        env["DATABASE_URL"] = empty_database

    def start(*words, more=None, **options):
        python = getattr(sys, "_base_executable", sys.executable)
        options |= {"stdout": subprocess.PIPE, "text": True, "cwd": pyz.parent, "env": env | (more or {})}
        return subprocess.Popen([python, "-I", pyz.name, *words], **options)

    return start


def has_database(pyz):
    with zipfile.ZipFile(pyz) as packed:
        return any("/bin/initdb" in name for name in packed.namelist())


def done(run, *words, text=None, more=None):
    """What a command prints."""
    started = run(*words, more=more, stdin=subprocess.PIPE)
    output, _ = started.communicate(text, timeout=120)
    assert started.returncode == 0, words
    return output


@contextlib.contextmanager
def serving(run, *words, more=None):
    port = free_port()
    with run("--port", str(port), *words, more=more) as started:
        try:
            wait_ready(f"http://127.0.0.1:{port}", 60)
            yield f"http://127.0.0.1:{port}"
        finally:
            started.terminate()
    assert started.returncode == 0


def test_a_line_of_the_documentation_builds_the_one_file():
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    assert re.search(r"^\.venv/bin/python \.ci/pyz$", "\n".join(page.read_text() for page in pages), re.M)


def test_a_lock_lives_in_the_one_file(run):
    """With two workers, which are new processes that have to find all that was unpacked."""
    key = done(run, "keygen").strip()
    with serving(run, "--workers", "2", more={"BOTFARM_KEYS": key}) as url:
        assert json.loads(done(run, "check", "--url", url)) == {"status": "ok"}
        line = json.dumps({"login": "a", "password": "p", "project_id": EXAMPLE, "env": "stage"})
        assert json.loads(done(run, "import", "-", "--url", url, text=line))["created"] == 1
        assert json.loads(done(run, "export", "--url", url))["login"] == "a"
        lock = httpx.post(f"{url}/locks", json={"project_id": EXAMPLE, "wait": 1}).json()
        assert lock["user"]["password"] == "p"
        at = f"{url}/locks/{lock['id']}"
        assert httpx.patch(at, json={"ttl": 60}).json()["ttl"] == 60
        assert (httpx.delete(at).status_code, httpx.get(at).status_code) == (204, 404)
        for asset in re.findall(r'(?:href|src)="(/[^"]+)"', httpx.get(f"{url}/docs").text):
            assert httpx.get(f"{url}{asset}").status_code == 200
    assert done(run, "migrate") == "nothing to do\n"
    keys = f"{done(run, 'keygen').strip()},{key}"
    assert "1 secrets are now sealed" in done(run, "reseal", more={"BOTFARM_KEYS": keys})
    made = json.loads(done(run, "client", "add", "ci", "--scope", "locks"))
    assert json.loads(done(run, "client", "list"))["client_id"] == made["client_id"]
    assert "/locks" in json.loads(done(run, "openapi"))["paths"]


def test_the_one_file_tells_what_it_lacks(pyz, run):
    lost = run("--help", more={"SHIV_ROOT": "/dev/null/unpacked"}, stderr=subprocess.PIPE)
    output, error = lost.communicate(timeout=60)
    assert (lost.returncode, output) == (1, "")
    assert "set SHIV_ROOT to a folder that can be written" in error
    assert "Traceback" not in error
    if not has_database(pyz):
        lost = run("serve", more={"DATABASE_URL": ""}, stderr=subprocess.PIPE)
        _, error = lost.communicate(timeout=60)
        assert lost.returncode == 3
        assert "DATABASE_URL" in error
