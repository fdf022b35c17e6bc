"""The Slurm templates: what they start, and when a job goes back into the queue."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from flamingo.train.elastic import cause

FOLDER = Path(__file__).parents[2] / "train" / "templates"
TEMPLATES = sorted(FOLDER.glob("*.sh"))
RANK = """\
#!/bin/bash
echo "$SLURM_PROCID $*" >>"$STUB/ranks"
exit "${STUB_STATUS:-0}"
"""


def stub():
    """tests/ is no package, so the file is read as it stands."""
    spec = importlib.util.spec_from_file_location("slurm_stub", Path(__file__).with_name("slurm_stub.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def job(tmp_path: Path):
    """job(template, status) -> status of the script, as sbatch would have it, with two tasks."""
    env = stub().install(tmp_path, 2, {"python": RANK})
    env |= {"IMAGE": "flamingo.sqsh", "RUN": str(tmp_path / "run")}

    def submit(template: Path, status: int = 0, **more: str) -> subprocess.CompletedProcess:
        command = ["bash", str(template), "recipe.yaml", "steps=7"]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env={**env, "STUB_STATUS": str(status), **more},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return submit


def told(tmp_path: Path) -> list[str]:
    path = tmp_path / "scontrol"
    return [line for line in path.read_text().splitlines() if "requeue" in line] if path.exists() else []


def test_there_are_templates_for_bare_slurm_for_containers_and_for_torchrun():
    assert [path.name for path in TEMPLATES] == ["slurm-pyxis.sh", "slurm-torchrun.sh", "slurm.sh"]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_the_shell_is_clean(template):
    subprocess.run(["bash", "-n", str(template)], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed (extra dev)")
    done = subprocess.run([str(shellcheck), str(template)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_a_run_that_ends_well_is_over(template, job, tmp_path):
    done = job(template)
    assert done.returncode == 0, done.stderr
    assert told(tmp_path) == []
    ranks = (tmp_path / "ranks").read_text().splitlines()
    assert sorted(line[0] for line in ranks) == ["0", "1"]
    for line in ranks:
        assert "-m flamingo.train recipe.yaml steps=7" in line and line.endswith(" --resume")
        assert ("-m flamingo.train.elastic" in line) == ("torchrun" in template.name)
    assert "--kill-on-bad-exit=1" in (tmp_path / "srun-options").read_text()


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_slurm_is_told_to_warn_and_to_take_the_job_back(template):
    lines = template.read_text().splitlines()
    for line in ("--signal=USR1@300", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {line}" in lines
    # sbatch stops reading them at the first command
    assert not [line for line in lines[lines.index("set -uo pipefail") :] if line.startswith("#SBATCH")]


@pytest.mark.parametrize("name", ["slurm.sh", "slurm-pyxis.sh"])
def test_a_run_that_was_asked_to_stop_goes_back_every_time(name, job, tmp_path):
    for _ in range(5):
        assert job(FOLDER / name, 75).returncode == 0
    assert told(tmp_path) == ["requeue 4711"] * 5


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
@pytest.mark.parametrize("status", [70, 137])
def test_a_hang_and_a_killed_rank_go_back_until_a_person_should_look(template, status, job, tmp_path):
    statuses = [job(template, status, MAX_FAULTS="2").returncode for _ in range(3)]
    assert statuses == [0, 0, status]
    assert told(tmp_path) == ["requeue 4711"] * 2
    assert not list(tmp_path.glob("*.faults"))  # a new submission counts from the beginning


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("sys.exit(1)", 1),
        ("sys.exit(70)", 70),
        ("os.kill(os.getpid(), 9)", 137),
        ("", 0),
        # torchrun ends the other rank by SIGTERM, which says nothing of what happened
        ("sys.exit(1) if os.environ['RANK'] == '0' else time.sleep(60)", 1),
        ("os.kill(os.getpid(), 15)", 143),
    ],
)
def test_the_status_of_torchrun_is_that_of_its_ranks(end, status, tmp_path):
    (tmp_path / "rank.py").write_text(f"import os, sys, time\n{end}\n")
    torchrun = [sys.executable, "-m", "flamingo.train.elastic", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, str(tmp_path / "rank.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr


def test_what_torchrun_did_to_the_other_ranks_is_not_what_happened():
    def failed(*codes_and_seconds):
        return [mock.Mock(exitcode=code, timestamp=100 + seconds) for code, seconds in codes_and_seconds]

    assert cause(failed((-9, 31), (1, 0))) == 1  # a rank that waited in a collective does not hear SIGTERM
    assert cause(failed((1, 0), (-9, 0))) == cause(failed((1, 2), (-9, 0))) == 137
    assert cause(failed((1, 1), (70, 0), (-15, 1))) == 70
    assert cause(failed((-15, 0), (-15, 0))) == 143


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_an_error_of_the_user_does_not_go_back(template, job, tmp_path):
    assert job(template, 1).returncode == 1
    assert told(tmp_path) == []


def test_under_torchrun_the_run_folder_says_that_it_was_asked_to_stop(job, tmp_path):
    template = FOLDER / "slurm-torchrun.sh"
    answers = RANK.replace("exit", 'echo {} >"$RUN/stopped.json"\nexit')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stopped.json").touch()  # of an earlier turn
    assert job(template, 1).returncode == 1
    (tmp_path / "bin" / "python").write_text(answers)
    assert job(template, 1).returncode == 0
    assert told(tmp_path) == ["requeue 4711"]


def test_a_container_gets_its_image_and_no_shell_between(job, tmp_path):
    template = FOLDER / "slurm-pyxis.sh"
    assert job(template).returncode == 0
    options = (tmp_path / "srun-options").read_text().splitlines()
    assert "--container-image=flamingo.sqsh" in options
    assert f"--container-mounts={tmp_path}:{tmp_path}" in options
    without = job(template, IMAGE="")
    assert without.returncode != 0 and "IMAGE" in without.stderr


def test_a_signal_to_the_batch_script_itself_does_not_lose_the_next_turn(job, tmp_path):
    slow = RANK.replace("exit", "sleep 1\nexit").replace(":-0", ":-75")
    (tmp_path / "bin" / "python").write_text(slow)
    env = {**os.environ, "STUB": str(tmp_path), "STUB_TASKS": "2", "SLURM_JOB_ID": "4711"}
    env["PATH"] = f"{tmp_path / 'bin'}:{env['PATH']}"
    script = subprocess.Popen(["bash", str(FOLDER / "slurm.sh"), "recipe.yaml"], cwd=tmp_path, env=env)
    while not (tmp_path / "ranks").exists():
        time.sleep(0.02)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        script.send_signal(number)
    assert script.wait(60) == 0
    assert told(tmp_path) == ["requeue 4711"]


def test_the_templates_are_part_of_the_package():
    settings = (FOLDER.parents[1] / "setup.cfg").read_text()
    assert "flamingo.train = recipes/*.yaml, templates/*.sh" in settings
    assert shutil.which("bash")
