#!/bin/bash
# Slurm with pyxis and enroot: as slurm.sh, each process in a container.
#     IMAGE=/images/flamingo.sqsh sbatch slurm-pyxis.sh RECIPE.yaml key=value ...
# Copy it, set what your cluster wants below, and submit it again at will: it goes on where it was.
#SBATCH --job-name=flamingo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# USR1@300: five minutes before the end the ranks finish their step and write a checkpoint. It must
# be longer than a step and a checkpoint take. Tasks see all GPUs of their node (no --gpus-per-task).
set -uo pipefail
: "${MAX_FAULTS:=3}" # hangs and killed ranks, after which a person should look

: "${IMAGE:?the image: a .sqsh file that enroot made, or REGISTRY#NAME:TAG}"
: "${MOUNTS:=$PWD:$PWD}" # shards, backbones and the run folder, as HOST:CONTAINER,...

trap : TERM USR1 # this shell outlives them, to ask for the next turn
# No shell between srun and python: the signal goes to the task itself.
srun --kill-on-bad-exit=1 \
    --container-image="$IMAGE" --container-mounts="$MOUNTS" --container-workdir="$PWD" \
    python -m flamingo.train "$@" --resume
status=$?

# The same in all templates: 75 asked to stop, 70 a rank hung, above 128 killed by a signal.
counter="flamingo-${SLURM_JOB_ID}.faults"
faults=$(cat "$counter" 2>/dev/null || echo 0)
if ((status == 75)); then
    rm -f "$counter"
    echo "stopped with a checkpoint: the job goes back into the queue"
elif ((status == 70 || status > 128)) && ((faults < MAX_FAULTS)); then
    echo $((faults + 1)) >"$counter"
    echo "status $status, fault $((faults + 1)) of $MAX_FAULTS: the job goes back into the queue"
else
    rm -f "$counter"
    exit "$status"
fi
scontrol requeue "$SLURM_JOB_ID"
