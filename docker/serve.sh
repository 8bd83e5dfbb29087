#!/bin/sh
# Serve over HTTP on all addresses, which `prefixfleet serve` does only with an API key: the first start makes one that opens every customer, in
# PREFIXFLEET_HOME/first-api-key, readable by the service's user alone.
set -eu
umask 077
if [ -z "${PREFIXFLEET_API_KEYS:-}" ] && [ ! -e "$PREFIXFLEET_HOME/keys.json" ]; then
    prefixfleet keys create --all-customers --note "made by the first start" >"$PREFIXFLEET_HOME/first-api-key"
fi
exec prefixfleet serve ${FLEET:+"$FLEET"} --host 0.0.0.0 --port "${PORT:-8000}"
