#!/bin/sh
# Make the secrets of the stack, one file each, readable by its owner alone. Those that are there stay as they are.
#
#   docker/make-secrets.sh [FOLDER]        default: docker/secrets
set -eu
folder=${1:-$(dirname "$0")/secrets}
umask 077
mkdir -p "$folder"
for name in postgres mlflow_db prefect_db mlflow_admin mlflow_flask s3_key s3_secret prefect; do
    file=$folder/$name
    [ -s "$file" ] && continue
    # 160 random bits in hex: nothing that a URL or a shell would have to quote.
    secret=$(od -An -N20 -tx1 /dev/urandom | tr -d ' \n')
    [ "$name" = prefect ] && secret=prefixfleet:$secret # Prefect wants user:password
    printf %s "$secret" >"$file.tmp"
    mv "$file.tmp" "$file"
done
