"""One entry, flamingo.train, under each launcher: the same steps as `flamingo train` takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.train.ranks import free_port

KEPT = ("step", "loss", "lr", "grad_norm", "samples", "tokens")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]


def start(command: Sequence[str], env: dict[str, str] | None = None) -> subprocess.Popen:
    env = {**(env or os.environ), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen) -> str:
    """All of them must end well; what they said."""
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return "\n".join(said)


def records(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{name: json.loads(line)[name] for name in KEPT} for line in lines]


def same(run: Path, other: Path) -> None:
    assert json.loads((run / "train.json").read_text())["ranks"] == 2
    assert records(run) == records(other)


@pytest.fixture
def job(world: Path, tmp_path: Path) -> list[str]:
    """What every launcher starts; its run folder is tmp_path/run."""
    return ["flamingo.train", str(world / "recipe.yaml"), f"run={tmp_path / 'run'}"]


def test_torchrun_starts_it(job, tmp_path, trained):
    finish(start([*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", *job]))
    same(tmp_path / "run", trained)


@pytest.mark.slow
def test_two_nodes_of_torchrun_start_it(job, tmp_path, trained):
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "two"]
    node = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--local-addr", "127.0.0.1", *meet]
    finish(*(start([*node, "-m", *job]) for _ in range(2)))
    same(tmp_path / "run", trained)


PDSH = """\
#!/bin/bash
# The command in a shell for each host, all of them this one; %n is a host's number.
while [[ $1 == -* ]]; do
    case $1 in -w) hosts=$2; shift 2 ;; -f) shift 2 ;; *) shift ;; esac
done
number=0 pids=() highest=0
for host in ${hosts//,/ }; do
    echo "$host" >>"$0.hosts"
    command=$*
    bash -c "${command//%n/$number}" &
    pids+=($!)
    number=$((number + 1))
done
for pid in "${pids[@]}"; do
    wait "$pid"; status=$?
    ((status > highest)) && highest=$status
done
exit "$highest"
"""


@pytest.mark.slow
def test_a_hostfile_starts_it_on_its_nodes(job, tmp_path, trained):
    """DeepSpeed reaches them by ssh and pdsh, of which there are stubs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("pdsh", PDSH), ("ssh", "#!/bin/bash\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "hostfile").write_text("node-a slots=1\nnode-b slots=1\n")
    where = ["--hostfile", str(tmp_path / "hostfile"), "--master_addr", "127.0.0.1"]
    port = ["--master_port", str(free_port())]
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    finish(start([*DEEPSPEED, *where, *port, "--module", *job, "optimizer.betas=[0.9, 0.999]"], env))
    assert (programs / "pdsh.hosts").read_text().split()[:2] == ["node-a", "node-b"]
    same(tmp_path / "run", trained)


@pytest.mark.slow
def test_two_nodes_of_deepspeed_start_it_each_by_hand(job, tmp_path, trained):
    hosts = tmp_path / "hostfile"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    common = [
        "--hostfile",
        str(hosts),
        "--no_ssh",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(free_port()),
    ]
    nodes = [[*DEEPSPEED, *common, "--node_rank", str(n), "--module", *job] for n in range(2)]
    finish(*map(start, nodes))
    same(tmp_path / "run", trained)


@pytest.mark.slow
def test_the_slurm_template_starts_it(job, tmp_path, trained, slurm):
    env = slurm(tmp_path / "slurm", tasks=2)
    template = Path(__file__).parents[2] / "train" / "templates" / "slurm.sh"
    finish(start(["bash", str(template), *job[1:]], env))
    same(tmp_path / "run", trained)


@pytest.fixture
def slurm():
    """install(folder, tasks): stubs of srun and scontrol; the environment of a batch script."""
    import importlib.util

    path = Path(__file__).parents[1] / "train" / "slurm_stub.py"
    spec = importlib.util.spec_from_file_location("slurm_stub", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.install


def test_ranks_that_contradict_each_other_are_one_message(job):
    env = {**os.environ, "RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = start([sys.executable, "-m", *job], env)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "error (rank 0): rank 2 of 2 ranks" in said and "Traceback" not in said
