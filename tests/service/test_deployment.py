"""What runs the service elsewhere says nothing that the service does not know. No image is built here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import click
import pytest
import trustme
import yaml
from click.testing import CliRunner

from loopsway.cli.commands import loopsway
from loopsway.service import Settings, read_settings
from loopsway.service.checks import check_exposure
from serving import Served, running, without_model

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "service" / "deployment"
SERVE = ["serve", "--config", "/etc/loopsway/serve.toml"]


def parsed(command: list[str]) -> click.Context:
    """A command of Loopsway's with its arguments; raises a UsageError for what it does not know."""
    name, *arguments = command
    return loopsway.commands[name].make_context(name, arguments)


def dockerfile() -> list[tuple[str, str]]:
    """Instructions and their arguments."""
    text = re.sub(r"^#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", "")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(instruction, " ".join(argument.split())) for instruction, argument in lines]


def stage(name: str) -> list[tuple[str, str]]:
    """A stage's instructions, after those of the stage that it begins with."""
    stages: dict[str, list[tuple[str, str]]] = {}
    for instruction, argument in dockerfile():
        if instruction == "FROM":
            base, _, own = argument.partition(" AS ")
            stages[own] = list(stages.get(base, []))
        stages[own].append((instruction, argument))
    return stages[name]


def values(instructions: list[tuple[str, str]], instruction: str) -> list[str]:
    return [argument for name, argument in instructions if name == instruction]


def variables(assignments: list[str]) -> dict[str, str]:
    return dict(each.split("=", 1) for line in assignments for each in line.split())


def manifest() -> dict[str, Any]:
    documents = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
    return {document["kind"]: document for document in documents}


def health_commands() -> Iterator[list[str]]:
    (check,) = values(dockerfile(), "HEALTHCHECK")
    yield check.partition("CMD ")[2].split()
    (container,) = manifest()["Deployment"]["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        yield container[probe]["exec"]["command"]


def test_the_example_settings_can_be_served_and_need_no_flag() -> None:
    settings = read_settings(file=FOLDER / "serve.toml")
    assert settings.tls is not None
    assert (settings.insecure_bind, len(settings.tokens), settings.port) == (False, 1, 50051)
    check_exposure(settings)


def test_each_metric_and_label_of_the_dashboard_exists(serve: Callable[..., Served]) -> None:
    families = list(serve(model=False).server.metrics.registry.collect())
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    known = {family.name + suffix for family in families for suffix in suffixes.get(family.type, ())}
    dashboard = json.loads((FOLDER / "dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [each["definition"] for each in dashboard["templating"]["list"] if "definition" in each]
    named = {name for each in expressions for name in re.findall(r"\b(?:loopsway|process)_\w+", each)}
    assert named <= known
    ours = {name for name in known if name.startswith("loopsway_") and not name.endswith(("_sum", "_count"))}
    assert ours - named == set(), "each metric is in a panel"
    labels = {name for each in expressions for name in re.findall(r"(\w+)=?[=~!]", each)}
    labels |= {name for each in expressions for by in re.findall(r"by \(([^)]*)\)", each) for name in by.split(", ")}
    assert labels == {"index", "method", "code", "part", "outcome", "job", "instance", "le", "version"}
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)


def test_the_manifest_runs_as_nobody_and_fits_the_settings() -> None:
    pod = manifest()["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert not pod["enableServiceLinks"], "LOOPSWAY_PORT would be no port"
    assert container["securityContext"]["readOnlyRootFilesystem"]
    leaving = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert leaving > 0, "a server that ends refuses calls that still come"
    assert pod["terminationGracePeriodSeconds"] > leaving + Settings().grace_s
    config = container["args"][2]
    assert {Path(config).parent.as_posix(), "/data"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert parsed(container["args"]).params["config"] == Path(config)
    settings = tomllib.loads((FOLDER / "serve.toml").read_text())
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": settings["port"], "metrics": settings["metrics_port"]}
    assert {port["name"]: port["port"] for port in manifest()["Service"]["spec"]["ports"]} == ports
    for command in health_commands():
        assert command[:4] == ["loopsway", "health", "--server", f"localhost:{settings['port']}"]
        assert settings["tls"]["certificate"] in command


def test_a_server_with_tls_is_healthy_by_its_own_certificate(index_path: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("loopsway", "localhost")
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    certificate.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    settings = Settings(indices=[without_model(index_path)], host="localhost", port=0, grace_s=0,
                        tls={"certificate": certificate, "key": key})  # fmt: skip
    with running(settings) as (_, port):
        for command in health_commands():
            arguments = [
                each.replace(":50051", f":{port}").replace("/etc/loopsway/tls/tls.crt", str(certificate))
                for each in command[1:]
            ]
            result = CliRunner().invoke(loopsway, arguments)
            assert (result.exit_code, result.output) == (0, "SERVING\n"), result.output


def test_the_image_is_made_of_what_is_here_in_the_tested_versions() -> None:
    instructions = dockerfile()
    copied = [argument for argument in values(instructions, "COPY") if "--from" not in argument]
    assert [name for each in copied for name in each.split()[:-1] if not (ROOT / name).exists()] == []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installs = [argument for argument in values(instructions, "RUN") if "pip install" in argument]
    for install in installs:
        assert "-c constraints.txt" in install
        (named,) = re.findall(r"'\.\[(.*)\]'", install)
        assert set(named.split(",")) <= extras.keys()
        assert not {"cpu", "gpu"} <= set(named.split(",")), "both install faiss/"
    assert len(installs) == 2


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_image_runs_as_the_manifests_user_with_a_home_that_can_be_written_to(target: str) -> None:
    instructions = stage(target)
    pod = manifest()["Deployment"]["spec"]["template"]["spec"]
    security = pod["securityContext"]
    user = values(instructions, "USER")[-1]
    assert user == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert int(user.split(":")[0]) > 0
    environment = variables(values(instructions, "ENV"))
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    (container,) = pod["containers"]
    empty = [each["mountPath"] for each in container["volumeMounts"] if "emptyDir" in volumes[each["name"]]]
    assert environment["HOME"] in empty, "Numba and Triton keep there what they compile"
    assert Path(environment["LOOPSWAY_CACHE"]).is_relative_to(environment["HOME"])
    entry, command = (json.loads(*values(instructions, name)) for name in ("ENTRYPOINT", "CMD"))
    assert (entry, command) == (["loopsway"], SERVE)
    assert parsed(command).params["config"] == Path(SERVE[-1])


def test_the_unit_starts_what_it_has_checked() -> None:
    unit = ConfigParser(strict=False, interpolation=None, delimiters=["="])
    unit.optionxform = str  # pyright: ignore[reportAttributeAccessIssue]
    unit.read(FOLDER / "loopsway.service")
    service = unit["Service"]
    start, check = (service[key].split() for key in ("ExecStart", "ExecStartPre"))
    assert start[0] == "/opt/loopsway/bin/loopsway"
    assert start[1:] == SERVE
    assert check == [*start, "--check-config"]
    assert parsed(check[1:]).params["check_config"]
    assert service["DynamicUser"] == "yes"
    environment = variables([service["Environment"]])
    assert environment["HOME"] == f"/var/lib/{service['StateDirectory']}"
    assert environment["LOOPSWAY_CACHE"] == f"/var/cache/{service['CacheDirectory']}"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_no_fault_with_the_unit(tmp_path: Path) -> None:
    copy = tmp_path / "loopsway.service"
    copy.write_text((FOLDER / "loopsway.service").read_text().replace("/opt/loopsway/bin/loopsway", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
