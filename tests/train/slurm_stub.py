"""Programs with the names of Slurm's: srun starts its tasks here, scontrol writes down what it was told."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SRUN = """\
#!/bin/bash
# Options first, as one word each; then the command, once per task. The highest status is the step's.
while [[ $1 == --* ]]; do echo "$1" >>"$STUB/srun-options"; shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS="$STUB_TASKS" SLURM_NTASKS="$STUB_TASKS"
pids=()
for ((task = 0; task < STUB_TASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    pids+=($!)
done
echo "${pids[@]}" >"$STUB/pids"
highest=0
for pid in "${pids[@]}"; do
    wait "$pid"; status=$?
    ((status > highest)) && highest=$status
done
exit "$highest"
"""
SCONTROL = """\
#!/bin/bash
echo "$*" >>"$STUB/scontrol"
[[ $1 == show ]] && echo localhost
exit 0
"""


def install(folder: Path, tasks: int, programs: dict[str, str] | None = None) -> dict[str, str]:
    """Put the stubs, `python` and other programs into a folder; the environment of a batch script."""
    python = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    torchrun = f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    every = {"srun": SRUN, "scontrol": SCONTROL, "python": python, "torchrun": torchrun, **(programs or {})}
    (folder / "bin").mkdir(parents=True)
    for name, text in every.items():
        path = folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "STUB": str(folder),
        "STUB_TASKS": str(tasks),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_PROCID": "0",  # a batch script has these two, too
        "SLURM_NTASKS": str(tasks),
    }
