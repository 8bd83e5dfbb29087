"""Make an ensemble of registered versions, evaluate it as any candidate, and register it as one version. No Prefect: it is a command of its own."""

import dataclasses
import logging
import time
from pathlib import Path

from flows import jobs
from flows import work as works
from flows.work import Outcome, Work
from pipeline.errors import ConfigError, PrefixFleetError
from pipeline.files import digest_of


def run_ensemble(work: Work, versions: list[int], average: str, logger: logging.Logger) -> Outcome:
    """The whole of it for the one customer of `work`.

    Args:
        work: of one customer, whose data must be prepared.
        versions: of its registered model.
        average: `probabilities`, `log_probabilities` or `parameters`.
        logger: gets what the evaluating process prints.

    Raises:
        ConfigError: more than one customer; its data is not prepared; the versions were trained with other prompts than the fleet file says.
        PrefixError: the versions do not go together, see `pipeline.inference.ensemble.describe`.
        RegistryError: there is no such version.
    """
    from pipeline.inference.ensemble import describe, make_ensemble
    from pipeline.registry import lookup, register

    if len(work.customers) != 1:
        raise ConfigError("an ensemble is of one customer and task. Name it as ID/TASK.")
    key = work.customers[0].key
    with works.alone(work):
        if key in work.errors:
            return works.outcome(work)
        member = work.members.get(key)
        if member is None:
            raise ConfigError(f"customer {key}: its data is not prepared. `prefixfleet prepare` does it.")
        found = [lookup(key, version=version) for version in versions]
        folders = [one.prefix_dir for one in found]
        config = describe(folders, [f"version {one.version}" for one in found], average)
        now = dataclasses.asdict(member.prompt)
        if config["prompt"] != now:
            differing = [f"{name}: {config['prompt'].get(name)!r}" for name in now if config["prompt"].get(name) != now[name]]
            raise ConfigError(
                f"customer {key}: these versions were trained with another prompt ({', '.join(differing)}) than the fleet file has now, so its "
                "test inputs are not theirs. Set prompt: to what it was, or train anew."
            )
        config["lineage"].setdefault("counts", work.cards[key]["counts"])  # imported versions know of no rows
        digest = config["digest"]
        evaluation = dataclasses.replace(
            member.evaluation, num_beams=config["generation"]["num_beams"], max_new_tokens=config["generation"]["max_new_tokens"]
        )
        evaluate_digest = digest_of([digest, member.evaluate_digest, member.data_fingerprint])
        made = dataclasses.replace(
            member,
            train_digest=digest,
            evaluate_digest=evaluate_digest,
            prefix_dir=str(work.home.prefix(key, digest)),
            evaluation_dir=str(work.home.evaluation(key, evaluate_digest)),
            evaluation=evaluation,
        )
        if not jobs.is_trained(made):
            make_ensemble(folders, config, Path(made.prefix_dir))
        work.members[key] = made
        work.due[key] = ("evaluate", "register")
        work.versions.pop(key, None)
        with work.timed("evaluate"):
            for planned in work.plan():
                # Beside the customer's own job, whose checkpoint may be needed yet.
                name = f"{planned.job.name}-ensemble"
                folder = work.home.job(name)
                planned = jobs.PlannedJob(
                    dataclasses.replace(planned.job, name=name, folder=str(folder)), planned.launch, folder / "job.yaml"
                )
                crash: BaseException | None = None
                try:
                    works.run_job(planned, "evaluate", logger)
                except PrefixFleetError as error:
                    crash = error
                work.finished(planned, [made], "evaluate", crash)
        with work.timed("register"):
            for ready in work.ready_to_register():
                start = time.monotonic()
                try:
                    # No receipt as for a trained prefix: it would make the next run register that one again, and take the alias back.
                    version = register(Path(ready.prefix_dir), Path(ready.evaluation_dir))
                    work.registered(key, works.Registered(version.version, version.alias, time.monotonic() - start))
                except PrefixFleetError as error:
                    work.fail(key, "register", error)
        return works.outcome(work)
