#!/bin/bash
# Run a command in one of the pods of this job: `machine.sh INDEX COMMAND`, a `launch.launcher` for fleet files.
#
# Standard input, output and exit status are those of the command, so that it ends with us. The pod's name holds random letters; it is found by the
# labels that Kubernetes gives the pods of an indexed job.
set -euo pipefail
index=$1 command=$2
if [ "$index" = "${JOB_COMPLETION_INDEX:-0}" ]; then
    exec bash -c "$command"
fi
job=${JOB_NAME:-${HOSTNAME%-*}}
for _ in $(seq "${POD_SECONDS:-600}"); do
    pod=$(kubectl get pods --selector "batch.kubernetes.io/job-name=$job,batch.kubernetes.io/job-completion-index=$index" \
        --field-selector status.phase=Running --output name)
    if [ -n "$pod" ]; then
        exec kubectl exec --stdin "$pod" --container prefect-job -- /opt/prefixfleet/docker/entrypoint.sh bash -c "$command"
    fi
    sleep 1
done
echo "error: no pod $index of job $job runs after ${POD_SECONDS:-600} s. Are there enough nodes with free GPUs? kubectl describe job $job" >&2
exit 1
