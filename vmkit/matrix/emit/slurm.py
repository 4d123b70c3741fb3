"""A matrix as a Slurm array, and a job behind it that merges the results. Pure.

The facts are of sbatch(1): an array's tasks have SLURM_ARRAY_TASK_ID, %A and %a stand for array and task in names of
output files, and SLURM_RESTART_COUNT counts how often Slurm has put the task into its queue again.
"""

import shlex

from vmkit.matrix.emit.batch import Batch

_SCRIPT = """\
#!/bin/sh
# Runs {file} as a Slurm array of {count} {tasks}, and merges the results when all have ended.
# `vmkit matrix emit slurm` wrote this file. What follows the script's name goes to sbatch, such as --partition=NAME.
# Every node needs vmkit on its PATH, and sees these paths.
set -eu
results={results}
mkdir -p "$results/slurm"
array=$(sbatch --parsable --job-name={name} --array=0-{last} --requeue --open-mode=append --ntasks=1 \\
    --cpus-per-task={cpus} --mem={memory_mib}M --time={limit_minutes} --output={results_pattern}/slurm/%A_%a.log \\
    "$@" <<'CELL'
#!/bin/sh
status=0
vmkit matrix run {file} {choice} --to {results} || status=$?
case $status in
0 | 1 | 64 | 124) exit $status ;; # all passed, a test failed, the matrix is wrong, the time was over
esac
# The machine or the node failed, or vmkit was killed. Slurm runs this task again, at most {retries} times.
if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {retries} ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit $status
CELL
)
# The cluster's name may follow the number.
array=${{array%%;*}}
merge=$(sbatch --parsable --job-name={name}-merge --dependency="afterany:$array" --ntasks=1 --time=30 \\
    --output={results_pattern}/slurm/merge.log "$@" <<'MERGE'
#!/bin/sh
exec vmkit matrix merge {results} --to {merged}
MERGE
)
echo "job $array runs the {tasks}; job ${{merge%%;*}} merges them into $results/merged"
"""


def render_slurm(batch: Batch) -> str:
    """Returns a script for sh(1) that submits both jobs and prints their numbers."""
    return _SCRIPT.format(
        file=shlex.quote(batch.file),
        results=shlex.quote(batch.results),
        # sbatch reads patterns in the name of an output file.
        results_pattern=shlex.quote(batch.results.replace("%", "%%")),
        merged=shlex.quote(f"{batch.results}/merged"),
        name=batch.name,
        count=batch.count,
        tasks="shards" if batch.is_sharded else "cells",
        last=batch.count - 1,
        choice=shlex.join(batch.shard_words) if batch.is_sharded else '--cell "$SLURM_ARRAY_TASK_ID"',
        cpus=batch.cpus,
        memory_mib=batch.memory_mib,
        limit_minutes=-(-batch.limit_s // 60),
        retries=batch.retries,
    )
