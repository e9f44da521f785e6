#!/usr/bin/env bash
# A run on several machines of a SLURM cluster: sbatch scripts/slurm.sh photos/ --out runs/a --n-clusters 20
#
# One torchrun a node starts one process a GPU. The images, RUN and the cache of decoded images have to be on a disk that
# all nodes see (set DEEPCLUSTER_CACHE for the last, or let every node keep its own on a local disk: also right).
# Two minutes before the time is over SLURM sends SIGTERM to this script, which passes it on: every process stops after
# the same step, the run is saved, and the job is queued again and goes on with --resume. Nothing else queues it again:
# a process that dies is started again by torchrun, up to three times; a run that stops itself stays stopped.
#SBATCH --job-name=deepcluster
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
set -euo pipefail

run= previous=
for word in "$@"; do
    [[ $previous == --out || $previous == --resume ]] && run=$word
    previous=$word
done
[[ -n $run ]] || { echo "usage: sbatch $0 SOURCE --out RUN [options of deepcluster fit]" >&2; exit 2; }
if [[ ${SLURM_RESTART_COUNT:-0} -gt 0 && -f $run/config.json ]]; then
    set -- --resume "$run"
fi

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / ${SLURM_GPUS_ON_NODE:-1}))
srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint="$head:29500" \
    --max-restarts=3 -m deepcluster fit "$@" &
step=$! stopped= status=0
trap 'stopped=1; kill -TERM "$step"' TERM
wait "$step" || status=$?
if [[ -n $stopped ]]; then # that wait ended with the signal; this one ends when the run is saved
    wait "$step" || status=$?
    [[ ! -f $run/report.html ]] && scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
