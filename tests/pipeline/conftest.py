"""A tiny base on disk, prepared data and job files, as the stages before would have left them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from pipeline.base import resolve_base
from pipeline.config import Customer, DataSettings, PrefixSettings
from pipeline.data import prepare
from pipeline.files import digest_of
from pipeline.training.job import (
    Job,
    JobBase,
    JobCustomer,
    JobEvaluation,
    JobGate,
    JobMixing,
    JobPrefix,
    JobPrompt,
    JobTraining,
    write_job,
)

WORDS = [f"w{i}" for i in range(40)] + ["colour", ":", "red", "blue", "green", "say", "it", "is", "bright", "dark", "calm"]


def save_tokenizer(folder: Path) -> int:
    """A word-level tokenizer; returns the size of its vocabulary."""
    vocabulary = {word: i for i, word in enumerate(["<eos>", "<pad>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>").save_pretrained(
        folder
    )
    return len(vocabulary)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 30,000 parameters."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=save_tokenizer(folder), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, eos_token_id=0, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 of about the same size."""
    folder = tmp_path_factory.mktemp("encoder-decoder")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=save_tokenizer(folder), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, eos_token_id=0, pad_token_id=1,
        decoder_start_token_id=1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def rows(seed: int, count: int = 60) -> list[dict[str, str]]:
    """Pairs whose target follows from the input, in a way that depends on the seed."""
    tones = ["bright", "dark", "calm"]
    colours = ["red", "blue", "green"]
    return [
        {
            "input": f"colour : {colours[i % 3]} w{i % 40} w{(7 * i + i // 40) % 40}",
            "target": f"it is {tones[(i + seed) % 3]} w{i % 40}",
        }
        for i in range(count)
    ]


@pytest.fixture
def make_job(tiny_base: Path, tmp_path: Path) -> Callable[..., tuple[Job, Path]]:
    """Prepare data for customers `c0`, `c1`, … and write a job for them; keyword arguments change the training settings."""
    return job_maker(tiny_base, tmp_path)


def job_maker(tiny_base: Path, tmp_path: Path) -> Callable[..., tuple[Job, Path]]:
    """What makes jobs below `tmp_path`; see `make_job`."""

    def make(
        customers: int = 1,
        name: str = "job",
        init: str = "text",
        length: int = 3,
        base: Path = tiny_base,
        prefix: dict[str, Any] | None = None,
        quantization: str | None = None,
        mixing: dict[str, Any] | None = None,
        **training: Any,
    ) -> tuple[Job, Path]:
        info = resolve_base(str(base))
        listed = []
        for i in range(customers):
            source = tmp_path / f"c{i}.jsonl"
            source.write_text("".join(json.dumps(row) + "\n" for row in rows(i)))
            customer = Customer(id=f"c{i}", data=DataSettings(path=str(source)))
            prepared = prepare(customer, info, tmp_path / "prepared" / f"c{i}" / "default")
            settings = {
                "max_steps": 12, "batch_size": 6, "gradient_accumulation_steps": 1, "lr": 0.02,
                "schedule": "linear", "warmup_steps": 0, "weight_decay": 0.0,
                "max_grad_norm": 1.0, "eval_every": 4, "early_stopping": None, "seed": 0, **training,
            }  # fmt: skip
            wanted = PrefixSettings(**{"length": length, "init": init, **(prefix or {})}).model_dump(mode="json")
            digest = digest_of([i, settings, wanted, prepared.card["fingerprint"]])
            listed.append(
                JobCustomer(
                    customer=f"c{i}",
                    task="default",
                    prepared=str(prepared.folder),
                    data_fingerprint=prepared.card["fingerprint"],
                    train_digest=digest,
                    config_digest=digest_of(settings),
                    evaluate_digest=digest_of([digest, "evaluate"]),
                    prefix_dir=str(tmp_path / name / "prefixes" / f"c{i}" / digest[:16]),
                    evaluation_dir=str(tmp_path / name / "evaluations" / f"c{i}" / digest[:16]),
                    prompt=JobPrompt("{input}\n", True, "none", 40, 16),
                    prefix=JobPrefix(**wanted),
                    training=JobTraining(**settings),
                    champion_dir=None,
                    evaluation=JobEvaluation(
                        "default", ["bleu"], JobGate("bleu", 0.0, None, 0.0, None, None), 1, 16, 100, [], False, None, 3
                    ),
                )
            )
        job_base = JobBase(str(base), str(base), None, info.digest, "float32", quantization, "auto")
        wanted_mixing = {
            "slots": 32,
            "max_tokens_per_micro_batch": 4096,
            "gradient_checkpointing": False,
            "checkpoint_every_seconds": 60.0,
        }
        job = Job(3, name, str(tmp_path / name), "test", job_base, JobMixing(**{**wanted_mixing, **(mixing or {})}), listed)
        path = tmp_path / name / "job.yaml"
        write_job(path, job)
        return job, path

    return make
