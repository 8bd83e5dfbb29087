"""A customer whose data holds a word that stands nowhere else, and where that word is found."""

import json
from pathlib import Path

import sqlalchemy
from mlflow import MlflowClient

from pipeline.keys import CustomerKey
from pipeline.registry import lookup, promote, register

# Stands in everything that is made of the customer's data, and in nothing else.
SECRET = "zyxsecretzyx"


def with_secret(made: tuple[Path, Path]) -> tuple[Path, Path]:
    prefix_dir, evaluation_dir = made
    prefix = json.loads((prefix_dir / "prefix.json").read_text())
    prefix["prefix"]["init_text"] = f"words of the customer {SECRET}"
    prefix["lineage"]["code_version"] = f"tagged {SECRET}"
    (prefix_dir / "prefix.json").write_text(json.dumps(prefix))
    (evaluation_dir / "report.html").write_text(f"<p>{SECRET}</p>")
    (evaluation_dir / "generations.jsonl").write_text(json.dumps({"input": f"in {SECRET}"}) + "\n")
    return made


def registered(make, customer: str) -> None:
    """Versions of two tasks, one of them deleted in MLflow, a failed training's run, files in the cache; a neighbour whose name begins alike."""
    register(*with_secret(make(customer=customer, seed=1)))
    register(*with_secret(make(customer=customer, seed=2, decision="keep")))
    register(*with_secret(make(customer=customer, task="menu")))
    client = MlflowClient()
    register(*with_secret(make(customer=customer, seed=3)))
    client.delete_model_version(f"prefixfleet.{customer}", "3")  # hidden is not gone
    promote(CustomerKey(customer), 1)
    experiment = client.get_experiment_by_name("prefixfleet").experiment_id
    run = client.create_run(experiment, tags={"prefixfleet.customer": customer, "note": SECRET})
    client.log_text(run.info.run_id, SECRET, "evaluation/report.html")
    client.log_param(run.info.run_id, "text", SECRET)
    client.delete_run(run.info.run_id)
    sweep = client.create_run(experiment, tags={"prefixfleet.customer": customer, "prefixfleet.sweep": "digest"})
    child = client.create_run(experiment, tags={"mlflow.parentRunId": sweep.info.run_id})
    client.log_param(child.info.run_id, "init", SECRET)
    lookup(customer)
    register(*make(customer=f"{customer}-too"))


def files_with(word: str, *roots: Path) -> list[str]:
    return [
        str(f) for root in roots for f in root.rglob("*") if f.is_file() and (word.encode() in f.read_bytes() or word in f.name)
    ]


def rows_with(word: str, uri: str) -> list[str]:
    """The tables of a database in which any column of any row holds `word`."""
    engine = sqlalchemy.create_engine(uri)
    with engine.connect() as connection:
        tables = sqlalchemy.inspect(engine).get_table_names()
        found = [
            name
            for name in tables
            if any(word in str(row) for row in connection.execute(sqlalchemy.text(f'SELECT * FROM "{name}"')))
        ]
    engine.dispose()
    return found
