#!/bin/sh
# Run by the image of PostgreSQL when its data has just been made, as the superuser: make roles and databases.
set -eu
MLFLOW_DB_PASSWORD=$(cat /run/secrets/mlflow_db)
PREFECT_DB_PASSWORD=$(cat /run/secrets/prefect_db)
export MLFLOW_DB_PASSWORD PREFECT_DB_PASSWORD
psql --username postgres --dbname postgres --no-psqlrc --quiet --file /opt/init.sql
