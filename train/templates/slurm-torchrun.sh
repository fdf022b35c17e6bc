#!/bin/bash
# Slurm with torchrun on each node (as flamingo.train.elastic, which tells what ended the ranks): a killed rank is restarted within the job, without the queue.
#     RUN=/shared/runs/mine sbatch slurm-torchrun.sh RECIPE.yaml key=value ...
# Copy it, set what your cluster wants below, and submit it again at will: it goes on where it was.
#SBATCH --job-name=flamingo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# USR1@300: five minutes before the end torchrun passes it on; the ranks finish their step and write
# a checkpoint. It must be longer than that takes; --shutdown-timeout is when torchrun kills them.
set -uo pipefail
: "${MAX_FAULTS:=3}" # hangs and killed ranks, after which a person should look

: "${RUN:?the run folder, on storage that all nodes share}"
: "${GPUS:=8}" "${MAX_RESTARTS:=3}"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or restarted ranks do not find each other (torch 2.14)
rm -f "$RUN/stopped.json" # the answer of an earlier turn

trap : TERM USR1 # this shell outlives them, to ask for the next turn
srun --kill-on-bad-exit=1 python -m flamingo.train.elastic \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$GPUS" --max-restarts="$MAX_RESTARTS" \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:$((20000 + SLURM_JOB_ID % 10000))" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=280 \
    -m flamingo.train "$@" run="$RUN" --resume
status=$?
# Ranks that were asked to stop end well, so that they are not started again: the run folder tells.
[[ -e "$RUN/stopped.json" ]] && status=75

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
