#!/bin/bash
# The entry of every pod of a training job: the first runs what the Prefect worker asks for, the others wait to be told by it (machine.sh) until the
# job is over, when Kubernetes ends them.
set -euo pipefail
if [ "${JOB_COMPLETION_INDEX:-0}" = 0 ]; then
    exec /opt/prefixfleet/docker/entrypoint.sh "$@"
fi
trap 'exit 0' TERM
while :; do
    sleep 3600 &
    wait $!
done
