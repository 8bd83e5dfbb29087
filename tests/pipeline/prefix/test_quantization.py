"""A base in 8 or 4 bit: loaded, frozen, and a prefix trained on it, through bitsandbytes on the CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.errors import BaseModelError
from pipeline.inference import load_engine
from pipeline.prefix import FrozenBase, load_base, load_prefix
from pipeline.prefix import base as prefix_base
from pipeline.training.job import Job
from pipeline.training.run import run_job

MakeJob = Callable[..., tuple[Job, Path]]
CPU = torch.device("cpu")


@pytest.mark.parametrize(("quantization", "kind"), [("int8", "Linear8bitLt"), ("int4", "Linear4bit")])
def test_a_quantised_base_trains_a_prefix_and_stays_as_it_is(
    make_job: MakeJob, loaded: list[tuple[FrozenBase, str]], quantization: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    job, _ = make_job(max_steps=30, eval_every=10, lr=0.1, quantization=quantization, mixing={"slots": 1})
    caplog.clear()
    assert run_job(job) == 0
    ((base, before),) = loaded  # the very base that was trained on
    assert type(base.model.model.layers[0].self_attn.q_proj).__name__ == kind
    assert base.digest() == before
    folder = Path(job.customers[0].prefix_dir)
    _, config = load_prefix(folder)
    dev = [entry["dev_loss"] for entry in config["training"]["history"] if "dev_loss" in entry]
    assert min(dev) < dev[0] - 0.1
    assert config["base"]["quantization"] == quantization
    engine = load_engine(job.base)
    assert engine.generate([[5, 6, 7]], [engine.add(folder)], max_new_tokens=4)
    assert engine.base.digest() == before
    assert "MatMul8bitLt" not in caplog.text  # said at every product, unless it is silenced


def test_without_the_extra_the_error_names_it(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_base.importlib.util, "find_spec", lambda name: None)
    job, _ = make_job(quantization="int8")
    with pytest.raises(BaseModelError, match=r"prefixfleet\[quantization\]"):
        load_base(job.base, CPU)
