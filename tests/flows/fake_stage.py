"""Stands in for `accelerate launch -m MODULE JOB` in tests: writes the folders that a stage writes, in milliseconds, or misbehaves on demand.

Arguments: module, job file. `FAKE_STAGE` says how, as `stage:what` separated by commas:
`train:fail=ID` one customer fails, `train:kill-once` and `train:kill` die by SIGKILL, `train:pause-once` stops at
a checkpoint, `train:wait` waits for ever,
`train:hang` too, with a grandchild.
`train:slow` takes a third of a second for each customer. A line for each stage that a customer is through goes to the file that `FAKE_LOG` names.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
from safetensors.numpy import save_file

from pipeline.files import file_digest, whole_folder, write_json
from pipeline.process import RESUME, exit_with_parent
from pipeline.progress import Progress
from pipeline.training.job import Job, JobCustomer, read_job
from pipeline.training.results import write_result


def write_prefix(job: Job, customer: JobCustomer) -> None:
    with whole_folder(Path(customer.prefix_dir)) as folder:
        seed = int(hashlib.sha256(customer.train_digest.encode()).hexdigest()[:8], 16)
        values = numpy.random.default_rng(seed).normal(size=(2, 3, 4)).astype(numpy.float32)
        save_file({"decoder.self.0.key": values, "decoder.self.0.value": values}, folder / "prefix.safetensors")
        card = json.loads((Path(customer.prepared) / "card.json").read_text())
        write_json(
            folder / "prefix.json",
            {
                "format": 1,
                "customer": customer.customer,
                "task": customer.task,
                "digest": customer.train_digest,
                "weights_sha256": file_digest(folder / "prefix.safetensors"),
                "prefix": {
                    "length": 3,
                    "layers": "all",
                    "reparam": "none",
                    "init": "text",
                    "init_text": None,
                    "sites": {},
                    "placement": "prefix",
                    "parameters": 48,
                },
                "prompt": {key: value for key, value in card["prompt"].items() if key != "chat"},
                "chat": card["prompt"]["chat"],
                "base": {
                    "id": job.base.id,
                    "path": job.base.path,
                    "revision": None,
                    "digest": job.base.digest,
                    "model_type": "llama",
                    "is_encoder_decoder": False,
                    "tokenizer_digest": card["tokenizer_digest"],
                },
                "training": {"steps": 1, "best_step": 1, "best_dev_loss": 1.5, "history": [], "seconds": 0.1},
                "lineage": {
                    "data_fingerprint": card["train_fingerprint"],
                    "config_digest": customer.config_digest,
                    "seed": 0,
                    "code_version": "0.1.0",
                    "parent": None,
                    "counts": card["counts"],
                },
                "run_id": None,
            },
        )


def write_evaluation(customer: JobCustomer, points: float = 40.0) -> None:
    with whole_folder(Path(customer.evaluation_dir)) as folder:
        scores = {
            who: {metric: {"score": score, "low": score - 1, "high": score + 1} for metric in customer.evaluation.metrics}
            for who, score in (("base", 5.0), ("prefix", points))
        }
        named = {"format": 1, "customer": customer.customer, "task": customer.task, "digest": customer.evaluate_digest}
        settings = {"num_beams": 1, "max_new_tokens": 8, "bootstrap_resamples": 100, "seed": 0}
        rest = {"prefix_digest": customer.train_digest, "records": 1, "settings": settings, "signatures": {}, "seconds": 0.1}
        write_json(folder / "metrics.json", {**named, **rest, "scores": scores})
        promoted = (customer.evaluation.gate.min_score or 0.0) <= 40.0
        decision, reason = ("promote", "40 is more than 5") if promoted else ("reject", "40 is too little")
        write_json(folder / "decision.json", {"format": 1, "decision": decision, "reasons": [reason], "gate": {}})
        for name in ("report.html", "report.md"):
            (folder / name).write_text("<p>report</p>")
        record = {"input": "a", "references": ["b"], "base": "c", "prefix": "d", "fields": {}}
        (folder / "generations.jsonl").write_text(json.dumps(record) + "\n")


def misbehave(what: str, job: Job) -> None:
    marker = Path(job.folder) / "killed"
    if what == "kill" or (what == "kill-once" and not marker.exists()):
        print("about to allocate too much", flush=True)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "pause-once" and not marker.exists():
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        sys.exit(RESUME)
    if what == "wait":
        time.sleep(600)
    if what == "hang":
        # A rank that neither watches its parent nor shares our session, as torchrun's.
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        print("hanging", flush=True)
        time.sleep(600)


def main() -> None:
    exit_with_parent()
    stage = "train" if sys.argv[1] == "pipeline.training" else "evaluate"
    job = read_job(Path(sys.argv[2]))
    asked = dict(item.split(":", 1) for item in os.environ.get("FAKE_STAGE", "").split(",") if item)
    what = asked.get(stage, "")
    with Progress(stage, len(job.customers), "steps") as progress:
        misbehave(what, job)
        for customer in job.customers:
            started = time.monotonic()
            print(f"{stage} works on {customer.customer}", flush=True)
            if what == "slow":
                time.sleep(0.3)
            if what == f"fail={customer.customer}":
                write_result(job, customer, "train" if stage == "train" else "eval", started, "the loss is NaN")
                continue
            if stage == "train":
                write_prefix(job, customer)
            else:
                write_evaluation(customer)
            if log := os.environ.get("FAKE_LOG"):
                with open(log, "a", encoding="utf-8") as file:
                    file.write(f"{stage} {customer.customer}\n")
            write_result(job, customer, "train" if stage == "train" else "eval", started)
            progress.update(1, customer=customer.customer, loss=1.5)


if __name__ == "__main__":
    main()
