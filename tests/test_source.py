"""What the source itself promises: no SQL is built from input, and no rule that would tell so is switched off."""

from __future__ import annotations

import ast
import re
import statistics
import tomllib

import pytest
from conftest import ROOT

SOURCES = [ROOT / "botfarm.py", *sorted(ROOT.glob("farm/*.py"))]
RUNS_SQL = {
    "fetch",
    "fetchrow",
    "fetchval",
    "fetchmany",
    "execute",
    "executemany",
    "prepare",
    "cursor",
    "copy_from_query",
    "copy_records_to_table",
}


def suspects(source: str) -> list[str]:
    """The calls that give a database anything but a text that stands in the source or in a file of sql/."""
    found: list[str] = []

    def look(node: ast.AST, function: ast.FunctionDef | ast.AsyncFunctionDef | None) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in RUNS_SQL:
            if not (node.args and is_constant(node.args[0], function)):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, (ast.Assign, ast.AugAssign)) and "SQL" in re.findall(r"\w+", ast.unparse(targets(node))):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        for child in ast.iter_child_nodes(node):
            look(child, function)

    look(ast.parse(source), None)
    return [line for line in found if not line.endswith(READS_THE_FILES)]


READS_THE_FILES = (
    "SQL = {file.name.removesuffix('.sql'): file.read_text(encoding='utf-8') for file in sql_folder('sql').iterdir()}"
)


def targets(node: ast.Assign | ast.AugAssign) -> ast.AST:
    return ast.Tuple(node.targets) if isinstance(node, ast.Assign) else node.target


def is_constant(argument: ast.expr, function: ast.FunctionDef | ast.AsyncFunctionDef | None) -> bool:
    """A literal, SQL[...], or what a function that is itself such a call was given as its `sql`."""
    if isinstance(argument, ast.Constant):
        return isinstance(argument.value, str)
    if isinstance(argument, ast.Subscript):
        return isinstance(argument.value, ast.Name) and argument.value.id == "SQL"
    passed_on = isinstance(argument, ast.Name) and argument.id == "sql"
    return passed_on and function is not None and function.name in RUNS_SQL and is_untouched(function)


def is_untouched(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether `sql` is a parameter that nothing in the function changes."""
    stores = [
        n for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == "sql" and isinstance(n.ctx, ast.Store)
    ]
    return not stores and "sql" in [argument.arg for argument in function.args.args]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_sql_is_built_from_input(path):
    assert suspects(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        'pool.fetch(f"select {name}")',
        'pool.fetchrow("select " + name)',
        'pool.fetchval("select %s" % name)',
        'pool.execute("select {}".format(name))',
        "pool.execute(text, 1)",
        'pool.execute(SQL["a"] + name)',
        'pool.execute(SQL["a"].replace("x", name))',
        "pool.execute(query=text)",
        "pool.cursor(text)",
        'SQL["a"] = f"select {name}"',
        "SQL = dict(a=name)",
        "SQL |= {}",
        "def other(sql): return pool.fetch(sql)",
        'def fetch(self, sql):\n    sql = f"{sql} limit 1"\n    return self.pool.fetch(sql)',
    ],
)
def test_sql_that_is_built_from_input_would_be_found(line):
    assert len(suspects(line)) == 1


def test_statements_build_no_sql_either():
    """`execute`, `format` and `query_to_xml` would run a text that a statement has put together."""
    for path in [*ROOT.glob("sql/*.sql"), *ROOT.glob("migrations/*.sql")]:
        code = re.sub(r"--.*", "", path.read_text())
        assert not re.search(r"\b(execute\s+(?!function|procedure)|format\s*\(|\w+_to_xml\w*\s*\()", code, re.I), path


def test_the_security_rules_of_ruff_look_at_the_service():
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "S" in rules["select"]
    # S101: assertions for the reader; S603, S607: the programs of PostgreSQL, started without a shell.
    assert {rule for rule in rules["ignore"] if rule.startswith("S")} == {"S101", "S603", "S607"}
    assert all(pattern.startswith(("tests/", ".ci/")) for pattern in rules["per-file-ignores"])
    for path in SOURCES:
        switched_off = re.findall(r"#\s*(?:ruff|noqa)\b.*", path.read_text())
        assert not [text for text in switched_off if not re.fullmatch(r"noqa: (ASYNC109|S104)", text.strip("# "))]


# The rooms of the house, lowest first: each imports only those before it.
ROOMS = [
    *("check", "embedded", "settings", "problems", "words", "bodies", "addresses", "database", "migrations"),
    *("passwords", "codes", "telemetry", "clients", "waiting", "overview", "locks", "imports", "calls"),
    *("openapi", "server", "commands"),
]


def imported_rooms(source: str) -> set[str]:
    """The rooms that a source names, wherever in it, also for types alone; `botfarm` counts as one."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in names]
        found |= {part[1] for part in parts if part[0] == "farm" and len(part) > 1} | {
            "botfarm" for part in parts if part[0] == "botfarm"
        }
    return found - {"VERSION"}


def runs_upward(room: str, source: str) -> set[str]:
    return imported_rooms(source) - set(ROOMS[: ROOMS.index(room)])


def test_each_room_imports_only_rooms_below_it():
    rooms = {path.stem: path.read_text() for path in ROOT.glob("farm/*.py") if path.stem != "__init__"}
    assert rooms.keys() == set(ROOMS)
    assert {room: upward for room, source in rooms.items() if (upward := runs_upward(room, source))} == {}
    assert imported_rooms((ROOT / "farm" / "__init__.py").read_text()) == set()


@pytest.mark.parametrize(
    "line",
    [
        "import botfarm",
        "from botfarm import app",
        "import farm.locks",
        "from farm import locks",
        "from farm.locks import Locks",
        "def late():\n    from farm.locks import Locks",
        "if TYPE_CHECKING:\n    from farm.locks import Locks",
        "from farm.waiting import Desk",
    ],
)
def test_an_import_that_runs_upward_would_be_found(line):
    assert runs_upward("waiting", line)
    assert not runs_upward("waiting", "import asyncio\nfrom farm import VERSION\nfrom farm.words import Wish")


def test_the_dashboard_keeps_to_its_bounds():
    """900 lines in all, of 120 characters; nothing that its policy forbids, and no text that becomes markup."""
    files = {path.name: path.read_text() for path in ROOT.glob("farm/dashboard.*")}
    assert files.keys() == {"dashboard.html", "dashboard.css", "dashboard.js"}
    lines = [line for text in files.values() for line in text.splitlines()]
    assert len(lines) <= 900
    assert max(map(len, lines)) <= 120
    unsafe = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write\b|\beval\b|new Function|\bstyle=|\bon\w+=|https?://(?!www\.w3)"
    assert [line for line in lines if re.search(unsafe, line)] == []


def functions_of(source: str) -> list[int]:
    """How many lines each function has."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [(node.end_lineno or 0) - node.lineno + 1 for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]


def test_the_house_keeps_to_its_bounds():
    """botfarm.py 900 lines, a room 600, a function 40, half of all functions 8 at the most."""
    lines = {path.name: path.read_text().count("\n") for path in SOURCES}
    assert lines.pop("botfarm.py") <= 900
    assert max(lines.values()) <= 600, lines
    sizes = [size for path in SOURCES for size in functions_of(path.read_text())]
    assert max(sizes) <= 40
    assert statistics.median(sizes) <= 8
