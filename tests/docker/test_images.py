"""What can be held of the images without building them."""

from __future__ import annotations

import fnmatch
import http.server
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import threading
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
INSTRUCTIONS = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", DOCKERFILE)).splitlines()
EXTRAS = {  # as in docker/lock.sh
    "cuda": ["train", "wandb", "eval", "milvus", "adapters", "remote", "tables"],
    "cpu": ["eval", "demo"],
}
FROM_PYTORCH = {"torch", "torchvision"}  # of the CPU image, from PyTorch's own index


def stages() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in filter(None, INSTRUCTIONS):
        if line.startswith("FROM "):
            found[line.split()[-1]] = []
        if found:
            list(found.values())[-1].append(line)
    return found


@pytest.mark.parametrize("tool, name", [("hadolint", "Dockerfile"), ("shellcheck", "lock.sh")])
def test_linters_find_nothing(tool, name):
    linter = Path(sys.executable).with_name(tool)
    if not linter.exists():
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run([linter, DOCKER / name], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_base_image_is_pinned_by_digest():
    bases = re.findall(r"(?m)^FROM (\S+)", DOCKERFILE)
    assert len(bases) == 5 and all(re.fullmatch(r"\S+:\S+@sha256:[0-9a-f]{64}", base) for base in bases)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_an_image_runs_flamingo_as_a_numeric_user_and_tells_how_it_is(name):
    stage = stages()[name]
    users = [line.split()[1] for line in stage if line.startswith("USER ")]
    assert users == ["1000:1000"]
    assert 'ENTRYPOINT ["flamingo"]' in stage and any(line.startswith("HEALTHCHECK ") for line in stage)
    assert any("org.opencontainers.image.licenses" in line for line in stage)
    after = stage[stage.index("USER 1000:1000") :]
    assert not any(line.startswith(("RUN", "COPY")) for line in after)


def test_nothing_is_fetched_by_add_and_no_secret_is_kept():
    assert not [line for line in INSTRUCTIONS if line.startswith("ADD ")]
    kept = [line for line in INSTRUCTIONS if line.startswith(("ARG", "ENV"))]
    assert not re.search(r"(?i)token|password|secret|credential", "\n".join(kept))


def test_packages_are_installed_with_hashes_or_without_an_index():
    for line in INSTRUCTIONS:
        for command in line.split("&&"):
            if "pip install" in command:
                assert "--require-hashes" in command or "--no-index" in command, command


def test_what_is_copied_is_there_and_let_in():
    for line in INSTRUCTIONS:
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
                assert let_in(source), source


# -- .dockerignore ----------------------------------------------------------------------------


def let_in(path: str) -> bool:
    """Whether Docker sends a path: the last pattern that fits it, or a folder above it, decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        again, pattern = pattern.startswith("!"), pattern.lstrip("!")
        above = [path, *(str(p) for p in Path(path).parents if str(p) != ".")]
        if any(_fits(part, pattern) for part in above):
            kept = again
    return kept


def _fits(path: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return any(fnmatch.fnmatchcase(part, pattern[3:]) for part in Path(path).parts)
    pieces, parts = pattern.split("/"), path.split("/")
    return len(pieces) == len(parts) and all(map(fnmatch.fnmatchcase, parts, pieces))


def test_all_that_is_built_is_sent():
    listed = subprocess.run(["git", "ls-files", "flamingo", "train", "eval"], cwd=ROOT, capture_output=True)
    files = listed.stdout.decode().split() or ["flamingo/cli.py", "train/recipes/quickstart.yaml"]
    assert all(map(let_in, files))
    assert all(map(let_in, ("setup.cfg", "pyproject.toml", "docker/locks/cpu.txt", "flamingo/train")))


@pytest.mark.parametrize(
    "path",
    [
        ".git/config", ".venv/bin/python", "runs/mine/model/model.safetensors", "data/backbones/x.json",
        "flamingo/__pycache__/cli.cpython-312.pyc", "flamingo/.env", ".env", "id_rsa", "tests/conftest.py",
        "docs/index.md", "docker/Dockerfile",
    ],
)  # fmt: skip
def test_data_history_and_secrets_stay_out(path):
    assert not let_in(path)


# -- locks ------------------------------------------------------------------------------------


def locked(name: str) -> dict[str, str]:
    return dict(
        re.findall(r"(?m)^([A-Za-z0-9._-]+)(?:\[\S+\])?==(\S+)", (DOCKER / "locks" / name).read_text())
    )


@pytest.mark.parametrize("name", EXTRAS)
def test_a_locked_set_has_all_that_setup_cfg_asks_for(name):
    """Run docker/lock.sh after a change of setup.cfg."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = [config["options"]["install_requires"]]
    lines += [config["options.extras_require"][extra] for extra in EXTRAS[name]]
    found = locked(f"{name}.txt") | (locked("deepspeed.txt") if name == "cuda" else {})
    found = {canonicalize_name(key): value for key, value in found.items()}
    wanted = [Requirement(line) for block in lines for line in block.splitlines() if line and line[0] != "#"]
    for requirement in wanted:
        package = canonicalize_name(requirement.name)
        if name == "cpu" and package in FROM_PYTORCH:
            continue
        assert package in found, package
        assert requirement.specifier.contains(found[package], prereleases=True), (requirement, found[package])


def test_both_images_have_the_same_torch():
    cuda = locked("cuda.txt")
    for package in FROM_PYTORCH:
        assert locked("torch-cpu.txt")[package] == f"{cuda[package]}+cpu"
    assert not any(name.startswith("nvidia") for name in locked("cpu.txt"))


@pytest.mark.parametrize("name", ["cuda", "deepspeed", "cpu", "build", "torch-cpu"])
def test_every_locked_package_has_its_hashes(name):
    text = (DOCKER / "locks" / f"{name}.txt").read_text()
    packages = re.split(r"(?m)^(?=[A-Za-z0-9])", text)
    packages = [block for block in packages if "==" in block.partition("\n")[0]]
    assert packages and all("--hash=sha256:" in block for block in packages)
    assert set(re.findall(r"https?://([^/\s]+)", text)) <= {"download.pytorch.org"}


@pytest.mark.slow  # it fetches every file, 3 GB for CUDA
@pytest.mark.parametrize("name", ["cuda", "deepspeed", "cpu", "build"])
def test_the_hashes_are_those_of_the_package_index(name):
    words = ["install", "--dry-run", "--no-deps", "--ignore-installed", "--require-hashes", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, "--requirement", str(DOCKER / "locks" / f"{name}.txt")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


# -- compose and Kubernetes -------------------------------------------------------------------


def compose() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def test_compose_builds_stages_that_are_there_and_reserves_gpus_for_training():
    services = compose()["services"]
    assert set(services) == {"demo", "train", "node0", "node1"}
    for name, service in services.items():
        assert service["build"]["target"] in stages()
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


# -- the health check and the entry point ------------------------------------------------------


def health(url: str | None = None, **others: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, **others, **({"FLAMINGO_HEALTH_URL": url} if url else {})}
    return subprocess.run(
        [sys.executable, DOCKER / "healthcheck.py"], env=given, capture_output=True, text=True, timeout=30
    )


def test_a_page_that_answers_is_well_and_one_that_does_not_is_ill():
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(500 if self.path == "/broken" else 200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert health(f"{address}/").returncode == 0
        broken = health(f"{address}/broken")
        assert broken.returncode == 1 and "500" in broken.stdout
        # A proxy of the environment would look for the page elsewhere.
        assert health(f"{address}/", http_proxy="http://127.0.0.1:9", no_proxy="").returncode == 0
        server.shutdown()
    gone = health(f"{address}/")
    assert gone.returncode == 1 and "refused" in gone.stdout


def test_what_does_not_speak_http_is_ill():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        ill = health(f"http://127.0.0.1:{server.getsockname()[1]}/")
    assert ill.returncode == 1 and "mail" in ill.stdout and not ill.stderr


def test_the_port_of_the_page_is_read_from_the_demos_own_command(tmp_path):
    healthcheck = runpy.run_path(str(DOCKER / "healthcheck.py"))
    command = tmp_path / "cmdline"
    for words, demo, page in [
        (["python", "/opt/flamingo/bin/flamingo", "demo", "/model", "--port", "9000"], True, "9000"),
        (["/sbin/docker-init", "--", "flamingo", "demo", "/model", "--port=9001"], True, "9001"),
        (["python", "/opt/flamingo/bin/flamingo", "demo", "/model"], True, "7860"),
        (["python", "/opt/flamingo/bin/flamingo", "train", "recipe.yaml"], False, "7860"),
    ]:
        command.write_bytes(b"\0".join(map(str.encode, words)) + b"\0")
        assert healthcheck["is_demo"](command) is demo
        assert healthcheck["port_of"](command) == f"http://127.0.0.1:{page}/"
    assert not healthcheck["is_demo"](tmp_path / "none")


def test_a_container_that_trains_is_well_without_a_page():
    assert health().returncode == 0


@pytest.mark.slow  # a virtual environment of its own
def test_the_wheel_runs_as_the_entrypoint_does(tmp_path):
    source = tmp_path / "source"
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source)
    for name in ("flamingo", "train", "eval"):  # links stay links, as COPY leaves them
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    words = ["-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", venv], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([venv / "bin/python", "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    packages = Path(next(p for p in sys.path if p.endswith("site-packages")))
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    done = subprocess.run(
        [venv / "bin/flamingo", "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "train" in done.stdout, done.stderr
    where = "import flamingo.cli, flamingo.train, flamingo.eval; print(flamingo.cli.__file__)"
    done = subprocess.run(
        [venv / "bin/python", "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith(str(venv)), done.stdout + done.stderr
