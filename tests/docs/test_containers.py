"""Containers cannot be built here: their files are parsed, and their pins compared with the project's."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))


def pins(path: Path) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return {name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines if line)}


def instructions(path: Path) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) of a Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def ranges() -> dict[str, list[Requirement]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["train"], *project["optional-dependencies"]["gpu"]]
    found: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, wanted):
        found.setdefault(requirement.name.lower(), []).append(requirement)
    return found


def test_pins_of_the_gpu_image_are_the_projects():
    gpu, cpu, allowed = pins(DOCKER / "constraints-gpu.txt"), pins(ROOT / "constraints-cpu.txt"), ranges()
    assert {"torch", "vllm", "ray", "deepspeed", "transformers"} <= gpu.keys()
    for name, version in gpu.items():
        assert cpu.get(name, version) == version, f"{name}: {version} here, {cpu.get(name)} in constraints-cpu.txt"
        for requirement in allowed.get(name, []):
            assert requirement.specifier.contains(version), f"{name}=={version} is outside pyproject's {requirement}"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_copy_what_exists_pin_what_they_install_and_end_as_a_user(path: Path):
    found = instructions(path)
    base = next(rest for name, rest in found if name == "FROM")
    assert re.fullmatch(r"\S+:\d\S*", base), f"{base} is no pinned tag"
    for name, rest in found:
        if name == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest
        if name == "RUN" and "pip install" in rest:
            for command in re.findall(r"pip install ([^&]*)", rest):
                assert " -c " in f" {command}" or "==" in command, f"{command} installs what nothing pins"
        for version in re.findall(r"torch==([\d.]+)", rest):
            assert version == pins(ROOT / "constraints-cpu.txt")["torch"]
    users = [rest for name, rest in found if name == "USER"]
    assert users and users[-1].isdigit() and users[-1] != "0"
    assert dict(found)["ENTRYPOINT"].endswith('"opd"]')


def test_compose_file_names_what_exists():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    assert set(compose["services"]) == {"cpu", "gpu"}
    for name, service in compose["services"].items():
        assert service["build"]["dockerfile"] == f"docker/{name}.Dockerfile" and (ROOT / service["build"]["dockerfile"]).is_file()
        assert service["image"] == f"opd:{name}" and service["volumes"] and service["ipc"] == "host"
    assert compose["services"]["gpu"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_ray_cluster_runs_the_images_ray():
    cluster = yaml.safe_load((DOCKER / "raycluster.yaml").read_text())
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert cluster["spec"]["rayVersion"] == pins(DOCKER / "constraints-gpu.txt")["ray"]
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    for group in groups:
        [container] = group["template"]["spec"]["containers"]
        assert container["image"] == "opd:gpu" and container["resources"]["requests"] == container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in group["template"]["spec"]["volumes"]}
    gpus = [group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for group in groups]
    assert gpus == [None, "8", "8"] and groups[0]["rayStartParams"]["num-gpus"] == "0"


def test_what_was_not_verified_is_said():
    assert "No image was built" in (DOCKER / "README.md").read_text()
