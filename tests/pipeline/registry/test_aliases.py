"""Aliases and lineage: who answers, who nearly did, who did before; what moves them and what a death between two moves leaves."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.errors import RegistryError
from pipeline.files import read_json
from pipeline.home import Home
from pipeline.keys import CustomerKey
from pipeline.registry import diff, history, promote, register, rollback

ACME = CustomerKey("acme")


def held(name: str = "prefixfleet.acme") -> dict[str, int]:
    return {alias: int(version) for alias, version in MlflowClient().get_registered_model(name).aliases.items()}


def test_the_gate_moves_champion_previous_and_challenger(home: Home, make, customer: str) -> None:
    name, key = f"prefixfleet.{customer}", CustomerKey(customer)
    expected = [
        (("promote", 40.0), "champion", {"champion": 1}),
        (("keep", 41.0), "challenger", {"champion": 1, "challenger": 2}),
        (("reject", 1.0), None, {"champion": 1, "challenger": 2}),
        (("keep", 42.0), "challenger", {"champion": 1, "challenger": 4}),
        (("promote", 43.0), "champion", {"champion": 5, "previous": 1}),
    ]
    for seed, ((decision, bleu), alias, aliases) in enumerate(expected):
        assert (register(*make(customer=customer, seed=seed, decision=decision, bleu=bleu)).alias, held(name)) == (alias, aliases)
    assert promote(key, 4).previous == 5 and held(name) == {"champion": 4, "previous": 5}
    assert rollback(key).champion == 5 and held(name) == {"champion": 5, "previous": 4}
    assert rollback(key, 1).before == 5 and held(name) == {"champion": 1, "previous": 5}
    assert [(row.version, row.aliases) for row in history(key)] == [
        (5, ("previous",)), (4, ()), (3, ()), (2, ()), (1, ("champion",)),
    ]  # fmt: skip


def test_registering_the_same_again_moves_nothing(sqlite: Home, make) -> None:
    first, second = make(seed=1), make(seed=2, decision="keep")
    register(*first)
    register(*second)
    for folders, alias in ((first, "champion"), (second, "challenger"), (first, "champion")):
        assert register(*folders).alias == alias and held() == {"champion": 1, "challenger": 2}


def test_promote_takes_the_challenger_and_refuses_what_the_gate_rejected(sqlite: Home, make) -> None:
    register(*make(seed=1))
    with pytest.raises(RegistryError, match=r"there is no challenger .*Versions are: 1 \(promote\)"):
        promote(ACME)
    register(*make(seed=2, decision="keep"))
    register(*make(seed=3, decision="reject", bleu=1.0))
    assert (promote(ACME).champion, held()) == (2, {"champion": 2, "previous": 1})
    with pytest.raises(RegistryError, match=r"the gate rejected version 3 \(bleu is 1.0\)"):
        promote(ACME, 3)
    assert promote(ACME, 3, force=True).before == 2 and held() == {"champion": 3, "previous": 2}
    with pytest.raises(RegistryError, match="no prefix is registered"):
        promote(CustomerKey("nobody"))
    with pytest.raises(RegistryError, match="version 3 is champion already"):
        rollback(ACME, 3)


def test_a_damaged_version_becomes_no_champion(sqlite: Home, make) -> None:
    register(*make(seed=1))
    register(*make(seed=2, decision="keep"))
    for file in (sqlite.root / "mlartifacts").rglob("prefix.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(RegistryError, match="is not what was registered"):
        promote(ACME)
    assert held() == {"champion": 1, "challenger": 2}


def _force(key: CustomerKey) -> None:
    promote(key, 2, force=True)


def _die_moving(what: Callable[..., object], key: CustomerKey, step: int) -> None:
    calls = []

    def dying(real: Callable[..., None]) -> Callable[..., None]:
        def killed(self: MlflowClient, *arguments: Any) -> None:
            calls.append(1)
            if len(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, *arguments)

        return killed

    for name in ("set_model_version_tag", "set_registered_model_alias", "delete_registered_model_alias"):
        setattr(MlflowClient, name, dying(getattr(MlflowClient, name)))
    what(key)


def test_a_promotion_that_dies_between_two_aliases_is_repeated_and_a_rollback_loses_nothing(
    sqlite: Home, make, in_child: Callable[..., Any]
) -> None:
    for seed, decision in enumerate(("promote", "promote", "keep")):
        register(*make(seed=seed, decision=decision))
    assert held() == {"champion": 2, "previous": 1, "challenger": 3}
    assert in_child(_die_moving, promote, ACME, 3).wait() == -signal.SIGKILL
    assert held() == {"champion": 2, "previous": 2, "challenger": 3}  # nobody answers but a champion, and the challenger is known
    with pytest.raises(
        RegistryError, match=r"a promotion was interrupted .* version 2 still is. Promote again, or name the version"
    ):
        rollback(ACME)
    assert in_child(_die_moving, promote, ACME, 4).wait() == -signal.SIGKILL
    assert held() == {"champion": 3, "previous": 2, "challenger": 3}
    assert promote(ACME).previous == 2 and held() == {"champion": 3, "previous": 2}
    assert in_child(_die_moving, rollback, ACME, 3).wait() == -signal.SIGKILL
    assert held() == {"champion": 2, "previous": 2}  # gone back already
    assert rollback(ACME).before == 3 and held() == {"champion": 2, "previous": 3}  # the same call finishes
    assert rollback(ACME).champion == 3 and held() == {"champion": 3, "previous": 2}


class _Killed(BaseException):
    pass


WRITES = ("set_model_version_tag", "set_registered_model_alias", "delete_registered_model_alias")
MOVES: list[tuple[str, dict[str, int], Callable[..., object], dict[str, int]]] = [
    (
        "the gate",
        {"champion": 1, "previous": 3, "challenger": 2},
        lambda made: register(*made[4]),
        {"champion": 4, "previous": 1},
    ),
    ("another", {"champion": 1, "challenger": 3}, lambda _: promote(ACME, 2), {"champion": 2, "previous": 1}),
    ("far back", {"champion": 3, "previous": 2}, lambda _: rollback(ACME, 1), {"champion": 1, "previous": 3}),
    (
        "back to challenger",
        {"champion": 3, "previous": 1, "challenger": 1},
        lambda _: rollback(ACME),
        {"champion": 1, "previous": 3},
    ),
]


def test_whatever_moves_aliases_finishes_what_its_like_began_wherever_that_died(
    sqlite: Home, make, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, name = MlflowClient(), "prefixfleet.acme"
    made = {seed: make(seed=seed) for seed in (1, 2, 3, 4)}
    for seed in made:
        register(*made[seed])
    for what, before, move, after in MOVES:
        for step in range(1, 9):
            for alias in held():
                client.delete_registered_model_alias(name, alias)
            for version in (1, 2, 3, 4):
                client.set_model_version_tag(name, str(version), "prefixfleet.promoted", "")
            for alias, version in before.items():
                client.set_registered_model_alias(name, alias, str(version))
            client.set_model_version_tag(
                name, str(before["champion"]), "prefixfleet.promoted", "2026-11-01T00:00:00+00:00 by the gate"
            )
            calls: list[str] = []

            def dying(real: Callable[..., Any], calls: list[str] = calls, step: int = step) -> Callable[..., Any]:
                def call(self: MlflowClient, *arguments: Any) -> Any:
                    calls.append("")
                    if len(calls) == step:
                        raise _Killed
                    return real(self, *arguments)

                return call

            with monkeypatch.context() as patch:
                for one in WRITES:
                    patch.setattr(MlflowClient, one, dying(getattr(MlflowClient, one)))
                try:
                    move(made)
                except _Killed:
                    pass
                else:
                    assert held() == after and step > 3, what
                    break
            move(made)
            assert held() == after, (what, step)
        else:
            pytest.fail(f"{what} never came to its end")


def test_a_rollback_passes_no_version_that_the_gate_rejected_and_leaves_no_champion_that_is_challenger(
    sqlite: Home, make
) -> None:
    for seed, decision in enumerate(("promote", "reject", "keep")):
        register(*make(seed=seed, decision=decision))
    with pytest.raises(
        RegistryError, match=r"rejected version 2 .* never was champion.* promote --customer acme --version 2 --force"
    ):
        rollback(ACME, 2)
    assert rollback(ACME, 3).champion == 3 and held() == {"champion": 3, "previous": 1}
    promote(ACME, 2, force=True)
    rollback(ACME)
    assert rollback(ACME, 2).champion == 2  # it was champion before, for somebody had forced it


def test_a_forced_promotion_that_dies_opens_no_way_round_the_gate(sqlite: Home, make, in_child: Callable[..., Any]) -> None:
    for seed, decision in enumerate(("promote", "reject")):
        register(*make(seed=seed, decision=decision))
    assert in_child(_die_moving, _force, ACME, 2).wait() == -signal.SIGKILL  # all is noted, but the champion is still the old one
    assert held() == {"champion": 1, "previous": 1}
    with pytest.raises(RegistryError, match=r"rejected version 2 .* never was champion"):
        rollback(ACME, 2)
    assert in_child(_die_moving, _force, ACME, 3).wait() == -signal.SIGKILL  # it is champion, but not noted
    assert held() == {"champion": 2, "previous": 1} and history(ACME)[0].promoted == ""
    assert promote(ACME, 2, force=True).previous == 1 and history(ACME)[0].promoted.endswith("by hand")
    assert rollback(ACME).champion == 1 and rollback(ACME).champion == 2  # it was, for somebody had forced it


def test_versions_say_what_they_started_from_and_who_was_champion(sqlite: Home, make) -> None:
    parent = make(seed=1)
    register(*parent)
    lineage = read_json(parent[0] / "prefix.json", 1)
    started = {**lineage["lineage"], "parent": lineage["weights_sha256"]}
    register(*make(seed=2, decision="keep"))
    register(*make(seed=3, lineage=started))
    assert [(row.version, row.parent_version, row.champion_before) for row in history(ACME)] == [
        (3, 1, 1),
        (2, None, 1),
        (1, None, None),
    ]


def test_diff_tells_settings_data_and_scores(sqlite: Home, make) -> None:
    old = make(seed=1)
    lineage = read_json(old[0] / "prefix.json", 1)["lineage"]
    register(*old)
    changed = {"training": {"max_steps": 900, "lr": 0.005, "steps": 850, "best_dev_loss": 1.25, "history": []}}
    register(
        *make(
            seed=2, bleu=45.0, lineage={**lineage, "seed": 2, "data_fingerprint": "ab" * 32, "counts": {"train": 900}}, **changed
        )
    )
    found = diff(ACME, "previous", "champion")
    assert (found.old, found.new) == (1, 2)
    assert found.settings == [("training.max_steps", 400, 900), ("seed", 1, 2)]
    assert found.data == [("fingerprint", lineage["data_fingerprint"], "ab" * 32), ("counts.train", 300, 900)]
    assert found.outcomes == [("steps", 200, 850)]
    assert found.scores == [("bleu", 41.5, 45.0), ("rougeL", 60.0, 60.0), ("base bleu", 3.25, 3.25), ("base rougeL", 20.0, 20.0)]
    same = diff(ACME, 2, 2)
    assert (same.settings, same.data, same.outcomes) == ([], [], [])
