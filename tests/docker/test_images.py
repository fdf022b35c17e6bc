"""What can be held of the images without building them."""

from __future__ import annotations

import fnmatch
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.eval.harness_model import write_model
from tests.train.ranks import free_port

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


def test_what_deepspeed_needs_beside_a_gpu_is_locked():
    """Its metadata depend on the machine that builds it; where the set is locked there is no GPU."""
    assert "DS_ACCELERATOR=cuda" in "".join(stages()["cuda-packages"])
    assert "nvidia-ml-py" in locked("cuda.txt")


def test_both_images_have_the_same_torch():
    cuda = locked("cuda.txt")
    for package in FROM_PYTORCH:
        assert locked("torch-cpu.txt")[package] == f"{cuda[package]}+cpu"
    assert not any(name.startswith("nvidia") for name in locked("cpu.txt"))


def blocks(name: str) -> dict[str, str]:
    """The lines of each package of a locked set, with its hashes."""
    text = (DOCKER / "locks" / f"{name}.txt").read_text()
    found = re.split(r"(?m)^(?=[A-Za-z0-9])", text)
    return {block.partition("==")[0]: block for block in found if "==" in block.partition("\n")[0]}


@pytest.mark.parametrize("name", ["cuda", "deepspeed", "cpu", "build", "torch-cpu"])
def test_every_locked_package_has_its_hashes(name):
    packages = blocks(name).values()
    assert packages and all("--hash=sha256:" in block for block in packages)
    text = (DOCKER / "locks" / f"{name}.txt").read_text()
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


def test_only_what_is_overridden_may_not_fit():
    check = runpy.run_path(str(DOCKER / "check.py"))
    allowed = check["overridden"]((DOCKER / "locks" / "overrides.txt").read_text())
    assert allowed == {"pillow"}
    fits_not = "gradio 6.31.0 has requirement {}<13.0,>=8.0, but you have {} 13.0.0."
    missing = "gradio 6.31.0 requires pillow, which is not installed."
    said = [fits_not.format("pillow", "pillow"), fits_not.format("numpy", "numpy"), missing]
    assert check["broken"]("\n".join(said), allowed) == said[1:]


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Iterator[Path]:
    """A virtual environment with what the CPU image has and nothing else: 5 GB, gone afterwards.

    torch is PyPI's, as in the CUDA set: the image's own index may be out of reach.
    """
    folder = tmp_path_factory.mktemp("image")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("flamingo", "train", "eval"):  # links stay links, as COPY leaves them
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    words = ["-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(folder), str(source)]
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    locks = folder / "locked.txt"
    from_cuda = [text for name, text in blocks("cuda").items() if re.match("torch|nvidia|cuda|triton", name)]
    locks.write_text("".join([*blocks("cpu").values(), *from_cuda]))
    # The sets are locked for the images' Python; another one is asked where that is not here.
    python = next(filter(runs, ["python3.12", sys.executable]))
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True, env=without_ours())
    pip = [folder / "venv/bin/python", "-m", "pip", "install", "--quiet", "--no-deps"]
    for given in (["--require-hashes", "--requirement", locks], list(folder.glob("*.whl"))):
        done = subprocess.run([*pip, *given], capture_output=True, text=True, env=without_ours())
        assert done.returncode == 0, done.stderr[-2000:]
    yield folder / "venv"
    shutil.rmtree(folder)


def runs(python: str) -> bool:
    try:
        return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0
    except OSError:
        return False


def without_ours() -> dict[str, str]:
    """The environment, but for what would let the packages of the tests in."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}


@pytest.mark.slow  # it installs 5 GB
def test_the_locked_set_is_whole_and_runs_the_entrypoint(image, tmp_path):
    def says(*words: str) -> str:
        done = subprocess.run(
            [image / "bin" / words[0], *words[1:]],
            cwd=tmp_path,
            env=without_ours(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    says("python", str(DOCKER / "check.py"), str(DOCKER / "locks" / "overrides.txt"))
    told = says("flamingo", "--help")
    assert "train" in told and "demo" in told
    where = "import flamingo.cli, flamingo.train, flamingo.eval; print(flamingo.cli.__file__)"
    assert says("python", "-c", where).startswith(str(image))
    assert "not here" in says("python", "-c", "try:\n import pytest\nexcept ImportError:\n print('not here')")


@pytest.mark.slow  # it installs 5 GB
def test_its_demo_is_well_and_once_ended_ill(image, tmp_path):
    write_model(tmp_path / "model")
    port = str(free_port())
    page = {"FLAMINGO_HEALTH_URL": f"http://127.0.0.1:{port}/"}
    check = [image / "bin/python", DOCKER / "healthcheck.py"]

    def well() -> bool:
        return subprocess.run(check, env={**without_ours(), **page}, capture_output=True).returncode == 0

    words = [image / "bin/flamingo", "demo", tmp_path / "model", "--port", port]
    with (tmp_path / "said").open("w") as said:
        demo = subprocess.Popen(words, cwd=tmp_path, env=without_ours(), stdout=said, stderr=said)
    try:
        until = time.monotonic() + 120
        while not well():
            assert demo.poll() is None and time.monotonic() < until, (tmp_path / "said").read_text()
            time.sleep(1)
    finally:
        demo.terminate()
        demo.wait(30)
    assert not well()
