#!/bin/sh
# Put back what docker/backup.sh made. Everything that is stored now is replaced; the servers are stopped meanwhile, and started again.
#
#   docker/restore.sh /backups/2026-11-23T03-00-00Z                            containers of docker/compose.yaml, which must be up
#   STACK=.prefixfleet-stack docker/restore.sh /backups/2026-11-23T03-00-00Z   processes of docker/stack-local.sh
set -eu
from=$(cd "${1:?usage: docker/restore.sh BACKUP}" && pwd)
if ! (cd "$from" && sha256sum --check --quiet SHA256SUMS); then
    echo "error: $from is no whole backup; nothing was changed. Take another." >&2
    exit 1
fi
# shellcheck source=docker/targets.sh
. "$(dirname "$0")/targets.sh"
servers stop
for name in $databases; do
    database psql --username postgres --dbname postgres --quiet --command "DROP DATABASE IF EXISTS $name WITH (FORCE)"
    database createdb --username postgres --owner "$(owner_of "$name")" "$name"
    database pg_restore --username postgres --exit-on-error --no-owner --role "$(owner_of "$name")" --dbname "$name" <"$from/$name.dump"
    database psql --username postgres --dbname postgres --quiet --command "REVOKE CONNECT ON DATABASE $name FROM PUBLIC"
done
bucket load "$from/bucket"
unpack_home <"$from/home.tar.gz"
servers start
echo "restored $from"
