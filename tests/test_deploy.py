"""The images and the compose file, as far as they can be checked without a Docker daemon and a registry."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from credence.cli import serve_file
from credence.cli.main import app

ROOT = Path(__file__).parents[1]
IMAGES = ("Dockerfile", "Dockerfile.cpu")
COMPOSE = ROOT / "deploy" / "compose.yaml"


def instructions(name: str) -> list[tuple[str, str]]:
    """(keyword, rest) of every instruction of a Dockerfile, lines joined."""
    lines = (ROOT / name).read_text().replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(None, 1)[1].strip()) for line in lines if line and not line.startswith("#")]


def environment(name: str) -> dict[str, str]:
    """The ENV instructions of a Dockerfile."""
    words = [word for keyword, rest in instructions(name) if keyword == "ENV" for word in rest.split()]
    return dict(word.split("=", 1) for word in words)


@pytest.mark.parametrize("name", IMAGES)
def test_every_package_of_pyproject_is_copied(name: str) -> None:
    """A folder that is forgotten is found here and not by the first user."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()
    copied = {source for keyword, rest in instructions(name) if keyword == "COPY" for source in rest.split()[:-1]}
    assert set(packages) <= copied, sorted(set(packages) - copied)
    assert all((ROOT / source).exists() for source in copied)


@pytest.mark.parametrize("name", IMAGES)
def test_images_run_as_nobody_and_write_under_tmp_only(name: str) -> None:
    steps = instructions(name)
    users = [rest for keyword, rest in steps if keyword == "USER"]
    assert users == ["10001:10001"] and steps.index(("USER", "10001:10001")) < [k for k, _ in steps].index("ENTRYPOINT")
    written = environment(name)
    for variable in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "TRITON_CACHE_DIR"):
        assert written[variable].startswith("/tmp"), variable
    labels = [word for keyword, rest in steps if keyword == "LABEL" for word in re.findall(r"(\S+)=\"", rest)]
    assert {
        f"org.opencontainers.image.{key}" for key in ("title", "description", "licenses", "version", "revision")
    } == set(labels)


@pytest.mark.parametrize("name", IMAGES)
def test_the_health_check_is_a_program_that_asks_livez(name: str) -> None:
    [check] = [rest for keyword, rest in instructions(name) if keyword == "HEALTHCHECK"]
    command = json.loads(check[check.index("[") :])
    assert command[0].startswith("python") and "/livez" in command[2]
    compile(command[2], name, "exec")


def compose() -> Any:
    return yaml.safe_load(COMPOSE.read_text())


def test_the_compose_file_keeps_to_the_specification() -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="needs the package compose-spec (requirements/dev.txt)")
    document = compose_spec.PyCompose.from_yaml(yaml.safe_dump(compose()))
    assert sorted(document.service_names()) == ["credence", "grafana", "prometheus"]


def test_docker_reads_the_compose_file() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode != 0:
        pytest.skip("needs docker with its compose plugin")
    result = subprocess.run([docker, "compose", "-f", COMPOSE, "config", "--quiet"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("service", ["credence", "prometheus", "grafana"])
def test_services_are_confined_and_watched(service: str) -> None:
    settings = compose()["services"][service]
    assert settings["read_only"] is True and settings["cap_drop"] == ["ALL"]
    assert settings["security_opt"] == ["no-new-privileges:true"]
    assert settings["healthcheck"]["test"][0] == "CMD" and any(place.startswith("/tmp") for place in settings["tmpfs"])
    assert all(port.startswith("127.0.0.1:") for port in settings["ports"]), "nothing is open to the network by itself"
    assert ":latest" not in settings["image"]


def test_the_server_has_time_to_drain_and_room_for_statistics() -> None:
    server = compose()["services"]["credence"]
    assert int(server["stop_grace_period"].removesuffix("s")) > 30 and server["shm_size"] == "1gb"
    assert "exec" in server["tmpfs"][0], "compiled kernels are loaded from it"
    assert (ROOT / "deploy" / server["build"]["context"] / server["build"]["dockerfile"]).exists()


def test_every_file_that_is_mounted_exists() -> None:
    if not (ROOT / "deploy" / "prometheus").exists():
        pytest.skip("deploy/prometheus and deploy/grafana are not in this checkout")
    for settings in compose()["services"].values():
        for volume in settings["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / "deploy" / source).exists(), source


def test_the_servers_configuration_is_one() -> None:
    import typer

    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    values = serve_file.read(command.make_context("serve", ["base"]), ROOT / "deploy" / "serve.yaml")
    assert values["base"].startswith("/models/") and values["adapter"] == ["triage=/adapters/triage"]
