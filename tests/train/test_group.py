"""Every launcher's environment gives the same answer; what contradicts itself is refused."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from unittest import mock

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from flamingo.train.group import (
    Member,
    SharedError,
    announce,
    check_alike,
    check_device,
    hosts,
    member,
    restarted,
)
from tests.train.ranks import free_port

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "gpu[003-004,7]",
}


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def test_torchrun_and_deepspeed_say_it_themselves():
    assert member(TORCHRUN) == Member(5, 1, 8, "node1", 29500, "torchrun")
    alone = {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "0"}
    assert member(alone) == member(TORCHRUN)
    restarts = {**alone, "TORCHELASTIC_USE_AGENT_STORE": "False", "TORCHELASTIC_MAX_RESTARTS": "3"}
    assert member(restarts) == member(TORCHRUN)
    deepspeed = {**without(TORCHRUN, "TORCHELASTIC_RUN_ID", "LOCAL_RANK"), "CROSS_RANK": "1"}
    assert member(deepspeed, local_rank=1) == Member(5, 1, 8, "node1", 29500, "deepspeed")


def test_under_srun_it_follows_from_the_variables_of_the_step():
    found = member(SRUN)
    assert found == Member(9, 1, 16, "gpu003", found.master_port, "srun")
    assert 12000 <= found.master_port < 32000
    part = {**SRUN, "SLURM_STEP_NODELIST": "gpu[004,7]", "SLURM_STEP_NUM_TASKS": "10"}
    assert member(part).master_addr == "gpu004" and member(part).world == 10
    chosen = {**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    assert member(chosen)[3:5] == ("10.0.0.1", 4000)


def test_all_tasks_of_a_step_meet_at_one_port_and_two_steps_do_not():
    ports = {member({**SRUN, "SLURM_PROCID": str(task)}).master_port for task in range(16)}
    assert len(ports) == 1
    assert member({**SRUN, "SLURM_STEP_ID": "1"}).master_port not in ports
    assert member({**SRUN, "SLURM_JOB_ID": "123457"}).master_port not in ports


def test_the_launcher_that_is_nearest_counts_when_torchrun_runs_under_srun():
    assert member({**SRUN, **TORCHRUN}) == member(TORCHRUN)
    assert member({**SRUN, **TORCHRUN, "WORLD_SIZE": "16"}).rank == 5  # elastic ranks are its own


def test_without_a_launcher_a_process_is_alone():
    assert member({}) == Member(0, 0, 1, "127.0.0.1", 0, "alone")
    assert member({}, local_rank=0).world == 1
    assert member({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}).world == 1  # salloc's shell


@pytest.mark.parametrize(
    ("environ", "local_rank", "words"),
    [
        (without(TORCHRUN, "WORLD_SIZE"), None, "WORLD_SIZE is not set"),
        (without(TORCHRUN, "RANK"), None, "RANK is not set"),
        (without(TORCHRUN, "LOCAL_RANK"), None, "without LOCAL_RANK"),
        (without(TORCHRUN, "MASTER_ADDR", "MASTER_PORT"), None, "without MASTER_ADDR and MASTER_PORT"),
        ({**TORCHRUN, "RANK": "8"}, None, "rank 8 of 8"),
        ({**TORCHRUN, "RANK": "five"}, None, "RANK='five' is not a number"),
        ({**TORCHRUN, "RANK": "-1"}, None, "RANK='-1'"),
        (TORCHRUN, 2, "--local_rank=2 contradicts LOCAL_RANK=1"),
        ({}, 1, "--local_rank=1, but RANK"),
        (
            {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"},
            None,
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        ),
        (without(SRUN, "SLURM_STEP_ID"), None, "not started by srun"),
        ({**SRUN, "SLURM_PROCID": "16"}, None, "rank 16 of 16"),
        ({**SRUN, "SLURM_JOB_NODELIST": "gpu[3-"}, None, "list of nodes"),
        ({**SRUN, "MASTER_PORT": "http"}, None, "MASTER_PORT='http'"),
        (
            {**SRUN, **without(TORCHRUN, "TORCHELASTIC_RUN_ID"), "WORLD_SIZE": "16"},
            None,
            "RANK=5 contradicts SLURM_PROCID=9",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(environ, local_rank, words):
    with pytest.raises(ValueError) as error:
        member(environ, local_rank)
    assert words in str(error.value)


def test_a_gpu_that_is_not_there_is_named_with_the_settings_to_change():
    check_device(member(TORCHRUN), gpus=2)
    with pytest.raises(ValueError, match=r"local rank 1 has no GPU: this process sees 1 \(from torchrun\)"):
        check_device(member(TORCHRUN), gpus=1)
    with pytest.raises(ValueError, match="--gpus-per-node"):
        check_device(member(SRUN), gpus=1)


def test_it_is_announced_to_torch_distributed():
    environ: dict[str, str] = {}
    announce(member(SRUN), environ)
    again = member({**SRUN, **environ})  # what the process's own children will read
    assert again[:5] == member(SRUN)[:5]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "0"}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, True),
        ({"SLURM_RESTART_COUNT": "2", "TORCHELASTIC_RESTART_COUNT": "0"}, True),
    ],
)
def test_a_restart_is_told_by_torchrun_or_slurm(environ, expected):
    assert restarted(environ) is expected


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("login1", ["login1"]),
        ("node[003-005,7]", ["node003", "node004", "node005", "node7"]),
        ("a,b[1-2],c-3", ["a", "b1", "b2", "c-3"]),
        ("rack[0-1]n[8-9]", ["rack0n8", "rack0n9", "rack1n8", "rack1n9"]),
        ("n[098-101].site", ["n098.site", "n099.site", "n100.site", "n101.site"]),
    ],
)
def test_a_list_of_nodes_is_written_out(nodes, expected):
    assert hosts(nodes) == expected


@pytest.mark.parametrize("nodes", ["", "node[3-1]", "node[a-b]", "node[1-2", "node[]"])
def test_what_is_no_list_of_nodes_is_refused(nodes):
    with pytest.raises(ValueError):
        hosts(nodes)


def told(sees: Sequence[bool]) -> list[str]:
    """What ranks say that see a GPU or none."""
    store = HashStore()

    def one(rank: int) -> str:
        try:
            check_alike(Member(rank, 0, len(sees), "", 0, "torchrun"), sees[rank], store)
        except SharedError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(sees)) as pool:
        return list(pool.map(one, range(len(sees))))


def test_a_rank_without_a_gpu_among_others_is_named_by_all():
    assert told([True] * 3) == told([False] * 3) == [""] * 3
    (said,) = set(told([True, True, False, True]))
    assert said.startswith("ranks that see no GPU, while others do: 2 (") and "nvidia-smi" in said
    (said,) = set(told([False] * 9 + [True]))
    assert said.count("(") == 5 + 1 and " and 4 more" in said


def test_the_rank_that_holds_the_store_leaves_it_when_the_others_have_read_why():
    """With rank 0's process the store ends: the others would read that a connection was closed."""
    store, events = HashStore(), []

    class Slow:
        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        def get(self, key: str) -> bytes:
            time.sleep(0.5)
            events.append("another has read")
            return store.get(key)

    def one(rank: int) -> None:
        with pytest.raises(SharedError, match="see no GPU"):
            check_alike(Member(rank, 0, 2, "", 0, "torchrun"), rank == 0, Slow() if rank else store)
        events.extend(["rank 0 leaves"] * (rank == 0))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(2)))
    assert events == ["another has read", "rank 0 leaves"]


def join(rank: int, port: int, answers: Queue) -> None:
    from flamingo.train import engine

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with mock.patch("torch.cuda.is_available", return_value=rank == 1):
        try:
            engine.join_group(60)
        except ValueError as error:
            answers.put(str(error))


def test_ranks_that_cannot_meet_end_before_they_wait_for_each_other():
    fork, port = multiprocessing.get_context("fork"), free_port()
    answers = fork.Queue()
    ranks = [fork.Process(target=join, args=(rank, port, answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    (said,) = {answers.get(timeout=60) for _ in ranks}
    assert "see no GPU, while others do: 0 (" in said
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
