#!/usr/bin/env bash
# An array job whose tasks share the work: edit the three lines marked so, then: sbatch scripts/slurm/array.sh
# Tasks claim blocks of the cache, which all of them must see, so that some, or one, may run while others wait in the
# queue. One that runs out of time, is preempted, or loses its machine is queued again, and goes on from what is there.
#SBATCH --job-name=influence
#SBATCH --array=0-7
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=influence-%A_%a.log
#SBATCH --signal=B:TERM@120
# Edit these three, and what your machines want above:
environment="$HOME/venv"
settings="$HOME/experiment.toml"
command=(influence-pipeline run "$settings")
# For fixed shares, of which all must run at the same time: append
#   --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"

set -uo pipefail
most_tries=10

[[ -z "$environment" ]] || source "$environment/bin/activate" || exit 2
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

stopped= child=
trap 'stopped=yes; [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null' TERM
"${command[@]}" &
child=$!
wait "$child"
code=$?
while [[ -n "$stopped" ]] && kill -0 "$child" 2>/dev/null; do  # the signal ended the waiting, not the work
    wait "$child"
    code=$?
done

# 2: the request is wrong, and would be again. Everything else may go better next time.
if ((code != 0 && code != 2 && ${SLURM_RESTART_COUNT:-0} < most_tries)); then
    echo "exit code $code: queued again (${SLURM_RESTART_COUNT:-0} times before)"
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" && exit 0
fi
exit "$code"
