"""Tiny bases and customers for tests of mixed training, and the plain loop that it is compared with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    get_linear_schedule_with_warmup,
)

from pipeline.data import Record
from pipeline.prefix import FrozenBase, PrefixBank
from pipeline.prefix.base import attach
from pipeline.prefix.direct import Direct
from pipeline.prefix.embedding import EmbeddingOnly, random_embeddings
from pipeline.prefix.initialise import chosen_sites, from_random
from pipeline.prefix.mlp import Reparameterised
from pipeline.training.job import JobTraining
from pipeline.training.mixed import Mixed, Report
from pipeline.training.resident import Resident

VOCABULARY = 50
SETTINGS = JobTraining(
    max_steps=12, batch_size=3, gradient_accumulation_steps=1, lr=0.05, schedule="linear", warmup_steps=0, weight_decay=0.0,
    max_grad_norm=1.0, eval_every=4, early_stopping=None, seed=0,
)  # fmt: skip


def llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128,
        )
    )  # fmt: skip


def mixtral() -> Any:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, num_local_experts=4, num_experts_per_tok=2, sliding_window=None,
        )
    )  # fmt: skip


def olmo2() -> Any:
    """Its norms are over all heads together, so transformers' plan leaves its heads whole; and its head is its embeddings."""
    return Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, eos_token_id=0, pad_token_id=1,
        )
    )  # fmt: skip


def t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=1,
            pad_token_id=1,
        )
    )


def attached(make: Callable[[], Any] = llama, seed: int = 0) -> FrozenBase:
    torch.manual_seed(seed)
    model = make()
    if make is mixtral:
        model.set_experts_implementation("eager")  # grouped products know no float64
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # larger than transformers makes them: a random base otherwise hardly looks at a prefix
            parameter.mul_(5.0)
    return attach(model.double())


def records(seed: int, count: int, longest: int = 24) -> list[Record]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(most: int) -> list[int]:
        n = int(torch.randint(1, most, (), generator=generator))
        return torch.randint(2, VOCABULARY, (n,), generator=generator).tolist()

    return [Record(tokens(longest), [*tokens(longest // 2), 0], "", [""]) for _ in range(count)]


@dataclass
class Wanted:
    """A customer to be trained; a new `Resident` each time it is asked for."""

    seed: int
    length: int = 3
    kind: str = "direct"
    infix: bool = False
    rows: int = 11
    longest: int = 24
    settings: JobTraining = SETTINGS

    def method(self, base: FrozenBase) -> nn.Module:
        sites = chosen_sites(base, "all", 1 if self.kind == "top" else "all")
        if self.kind == "embedding":
            return EmbeddingOnly(base, random_embeddings(base, self.length, self.seed)).double()
        if self.kind == "mlp":
            return Reparameterised(sites, self.length, 32, 16, self.seed, base.device, None).double()
        return Direct(from_random(sites, self.length, self.seed), base.device).double()

    def resident(self, base: FrozenBase) -> Resident:
        train, dev = records(self.seed, self.rows, self.longest), records(self.seed + 1000, 4, self.longest)
        return Resident(self.method(base), self.infix, train, dev, self.settings)


def trained(
    base: FrozenBase, residents: list[Resident], slots: int, budget: int = 100, cpu: bool = True
) -> tuple[list[Resident], list[str | None]]:
    """Train residents through `slots` slots, in their order, as a job does; what became of them, and why some failed."""
    mixed = Mixed(base, slots, 6, 1, budget, Accelerator(cpu=cpu))
    waiting = list(enumerate(residents))
    seats: dict[int, int] = {}
    failed: list[str | None] = [None] * len(residents)

    def give_up(report: Report) -> None:
        for slot, reason in report.failed.items():
            failed[seats[slot]] = reason
            mixed.leave(slot)

    while True:
        while waiting and (slot := mixed.free_slot()) is not None:
            seats[slot], mixed.residents[slot] = waiting.pop(0)
        if any(resident.needs_dev_loss for _, resident in mixed.seated):
            give_up(mixed.judge())
            for slot, resident in mixed.seated:
                if resident.finished:
                    mixed.leave(slot)
            continue
        if not mixed.seated:
            return residents, failed
        give_up(mixed.step())


def by_hand(base: FrozenBase, wanted: Wanted) -> tuple[dict[str, torch.Tensor], float, list[float]]:
    """Final keys and values, their dev loss and all gradient norms of a plain loop, one row at a time."""
    s, method = wanted.settings, wanted.method(base)
    train, dev = records(wanted.seed, wanted.rows, wanted.longest), records(wanted.seed + 1000, 4, wanted.longest)
    optimizer = torch.optim.AdamW(method.parameters(), lr=s.lr, weight_decay=s.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, s.warmup_steps, s.max_steps)
    generator = torch.Generator().manual_seed(s.seed)
    order: list[int] = []
    norms = []

    def loss_of(row: Record, bank: PrefixBank) -> torch.Tensor:
        with base.prefixes(bank, torch.zeros(1, dtype=torch.int64)):
            if base.is_encoder_decoder:
                decoder = torch.tensor([[1, *row.target_ids[:-1]]])
                logits = base.model(input_ids=torch.tensor([row.prompt_ids]), decoder_input_ids=decoder).logits[0]
            else:
                base.prompts_end_at(torch.tensor([len(row.prompt_ids) - 1]))
                logits = base.model(input_ids=torch.tensor([row.prompt_ids + row.target_ids])).logits[0]
                logits = logits[len(row.prompt_ids) - 1 : -1]
            return -logits.log_softmax(-1)[range(len(row.target_ids)), row.target_ids].sum()

    for _ in range(s.max_steps):
        size = s.batch_size * s.gradient_accumulation_steps
        while len(order) < size:
            order += torch.randperm(len(train), generator=generator).tolist()
        rows, order = [train[i] for i in order[:size]], order[size:]
        optimizer.zero_grad()
        bank = PrefixBank.of(base.sites, [method()], [wanted.infix])
        # One backward pass for all: Llama's norms compute in float32 whatever the model's type, and embeddings are trained through them.
        (sum(loss_of(row, bank) for row in rows) / sum(len(r.target_ids) for r in rows)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(method.parameters(), s.max_grad_norm)))
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        bank = PrefixBank.of(base.sites, [method()], [wanted.infix])
        dev_loss = float(sum(loss_of(row, bank) for row in dev)) / sum(len(r.target_ids) for r in dev)
        return {name: tensor.detach() for name, tensor in method().items()}, dev_loss, norms


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[site] - b[site]).detach().abs().max()) for site in a)


def final(resident: Resident) -> dict[str, torch.Tensor]:
    return {site: tensor.detach() for site, tensor in resident.flat().items()}
