"""The compose file and the jobs of Kubernetes, as documents."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"


def compose() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def test_compose_builds_stages_that_are_there_and_reserves_gpus_for_training():
    services = compose()["services"]
    assert set(services) == {"demo", "train", "node0", "node1"}
    for name, service in services.items():
        assert re.search(
            rf"(?m)^FROM .* AS {service['build']['target']}$", (DOCKER / "Dockerfile").read_text()
        )
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).resolve().exists()
        assert service["profiles"], name
    for name in ("train", "node0", "node1"):
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"] and services[name]["shm_size"]


def test_the_demo_is_for_this_machine_and_cannot_write():
    demo = compose()["services"]["demo"]
    assert all(port.startswith("127.0.0.1:") for port in demo["ports"])
    assert demo["read_only"] and demo["cap_drop"] == ["ALL"]
    assert demo["volumes"][0]["read_only"]


def test_a_folder_that_is_missing_is_an_error_and_not_made_by_root():
    """The short form of a volume also takes a relative path such as runs/x for the name of a volume."""
    for name, service in compose()["services"].items():
        for volume in service["volumes"]:
            assert volume["type"] == "bind" and volume["bind"] == {"create_host_path": False}, name


def test_compose_is_taken_by_docker_itself():
    """By Docker's own client, where it is installed: it reads the file without an engine."""
    clients = [["docker", "compose"], ["docker-compose"]]
    found = [
        c
        for c in clients
        if shutil.which(c[0]) and not subprocess.run([*c, "version"], capture_output=True).returncode
    ]
    if not found:
        pytest.skip("no docker with compose is installed")
    words = [*found[0], "--file", str(DOCKER / "compose.yaml")]
    words += ["--profile", "demo", "--profile", "train", "--profile", "two-nodes", "config", "--quiet"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_both_nodes_of_the_example_meet_at_the_first():
    services = compose()["services"]
    node0, node1 = services["node0"], services["node1"]
    assert node0["command"] == node1["command"] and node0["entrypoint"] == node1["entrypoint"] == ["torchrun"]
    given = torchrun_takes([re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in node0["command"]])
    assert (given.nnodes, given.rdzv_endpoint) == ("2", f"{node0['hostname']}:29500")
    assert 60 <= given.shutdown_timeout < 300  # stop_grace_period
    for node in (node0, node1):
        assert node["environment"]["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
        assert node["stop_grace_period"] == "5m"


def torchrun_takes(words: list[str]) -> Any:
    """What torchrun makes of its arguments; it must start the trainer, which must take the rest."""
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words)
    assert given.module and given.training_script == "flamingo.train"
    assert given.training_script_args == ["recipe.yaml", "--resume"]
    return given


def replicas_of(name: str) -> dict[str, Any]:
    job = yaml.safe_load((DOCKER / "kubernetes" / f"{name}.yaml").read_text())
    return job["spec"].get("pytorchReplicaSpecs") or job["spec"]["mpiReplicaSpecs"]


def test_the_kubernetes_job_of_torchrun_leaves_time_for_a_checkpoint():
    pod = replicas_of("pytorchjob")["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    given = torchrun_takes(container["args"])
    assert given.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in container["env"]


@pytest.mark.parametrize("replica", ["Launcher", "Worker"])
def test_the_scripts_of_the_mpi_job_are_sound_and_meet_at_one_port(replica):
    (container,) = replicas_of("mpijob")[replica]["template"]["spec"]["containers"]
    assert container["command"] == ["/bin/sh", "-c"]
    (script,) = container["args"]
    linter = Path(sys.executable).with_name("shellcheck")
    checker = [linter, "--shell=sh", "-"] if linter.exists() else ["sh", "-n"]
    done = subprocess.run(checker, input=script, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert ("'Port 2222'" if replica == "Launcher" else "-p 2222") in script


@pytest.mark.parametrize("name", ["pytorchjob", "mpijob"])
def test_a_kubernetes_job_asks_for_gpus_without_root(name):
    replicas = replicas_of(name)
    worker = replicas["Worker"]
    assert worker["replicas"] == 2
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        mounts = {mount["name"] for c in pod["containers"] for mount in c.get("volumeMounts", [])}
        assert mounts <= {volume["name"] for volume in pod["volumes"]}
    (container,) = worker["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    said = " ".join(str(word) for r in replicas.values() for c in r["template"]["spec"]["containers"]
                    for word in [*c["command"], *c["args"]])  # fmt: skip
    assert "flamingo.train" in said
