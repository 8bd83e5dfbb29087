"""Answer a batch in which every row belongs to another customer, on one frozen base.

In: prompts as token ids, a slot for each (slot 0: no prefix). Out: texts. Knows nothing of MLflow or of how a prefix was trained.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from pipeline.data.prompt import encode_prompt, load_tokenizer
from pipeline.errors import BaseModelError
from pipeline.files import digest_of
from pipeline.prefix import FrozenBase, Prefix, PrefixBank, is_infix, load_base, load_prefix
from pipeline.training.batches import left_padded, pack, right_padded, row_losses
from pipeline.training.job import JobBase, JobPrompt

TOKENS_PER_BATCH = 8192  # prompt and answer tokens of all rows together
ROWS_PER_BATCH = 64


@dataclass(frozen=True)
class _Row:
    """A prompt and a target to judge."""

    prompt_ids: list[int]
    target_ids: list[int]


class PrefixEngine:
    """A loaded base and the prefixes that were added to it."""

    def __init__(self, base: FrozenBase, tokenizer: Any, base_digest: str) -> None:
        self.base, self.tokenizer, self._base_digest = base, tokenizer, base_digest
        self._prefixes: list[Prefix] = []
        self._configs: list[dict[str, Any]] = []
        self._slots: dict[str, int] = {}
        self._bank: PrefixBank | None = None

    def add(self, prefix_dir: Path) -> int:
        """Load a prefix folder into a slot of its own; the same prefix again gets the same slot.

        Raises:
            BaseModelError: it was trained on another base.
            PrefixError: it is damaged.
        """
        prefix, config = load_prefix(prefix_dir)
        if config["base"]["digest"] != self._base_digest:
            raise BaseModelError(
                f"{prefix_dir}: was trained on a base with digest {config['base']['digest'][:16]}, the loaded base has {self._base_digest[:16]}. "
                "Serve it with its own base, or train it anew."
            )
        # The template and the place belong to a prefix as much as its weights: one adapter may have been imported twice.
        digest = digest_of(config)
        if digest not in self._slots:
            # Tried in a bank of its own, so that a prefix that does not fit is refused here, and not in a batch with others.
            PrefixBank(self.base.sites, slots=1, length=_length(prefix)).put(0, prefix)
            self._prefixes.append(prefix)
            self._bank = None  # built for all at once, when it is needed
            self._configs.append(config)
            self._slots[digest] = len(self._prefixes)
        return self._slots[digest]

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[list[int]],
        slots: Sequence[int],
        *,
        max_new_tokens: int,
        num_beams: int = 1,
        finished: Callable[[list[int], list[str]], None] | None = None,
    ) -> list[str]:
        """Greedy (or beam) search for each prompt behind its slot's prefix.

        Args:
            prompts: token ids, as `pipeline.data.prompt.encode_prompt` makes them.
            slots: the slot of each prompt; 0 for the base without prefix.
            max_new_tokens: the longest answer in tokens; shorter where the positions of the base end before.
            finished: called after every batch with the places of its prompts and their answers.

        Returns:
            the answers without special tokens, in the order of the prompts.

        Raises:
            PrefixError: prefix and prompt leave no room for an answer within the positions of the base.
        """
        bank = self._filled_bank()
        lengths = bank.shifts.tolist()
        texts = [""] * len(prompts)
        for batch, longest in _batches(
            prompts, [self._room(lengths[s], len(p), max_new_tokens) for p, s in zip(prompts, slots, strict=True)], num_beams
        ):
            ids = [prompts[i] for i in batch]
            pad = self._pad
            tokens, mask = (right_padded if self.base.is_encoder_decoder else left_padded)(ids, pad, self.base.device)
            config = GenerationConfig(
                max_new_tokens=longest,
                num_beams=num_beams,
                do_sample=False,
                pad_token_id=pad,
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self._stop_tokens(),
                decoder_start_token_id=getattr(self.base.model.generation_config, "decoder_start_token_id", None),
            )
            with self.base.prefixes(bank, torch.tensor([slots[i] for i in batch], device=self.base.device)):
                # Padding stands in front of prompts, so all end in the same column.
                self.base.prompts_end_at(torch.full((len(batch),), tokens.shape[1] - 1, device=self.base.device))
                out = self.base.model.generate(tokens, attention_mask=mask, generation_config=config)
            if not self.base.is_encoder_decoder:
                out = out[:, tokens.shape[1] :]
            answers = [text.strip() for text in self.tokenizer.batch_decode(out, skip_special_tokens=True)]
            for i, text in zip(batch, answers, strict=True):
                texts[i] = text
            if finished is not None:
                finished(batch, answers)
        return texts

    @torch.inference_mode()
    def losses(self, prompts: Sequence[list[int]], targets: Sequence[list[int]], slots: Sequence[int]) -> list[float]:
        """Cross-entropy in nats, summed over the tokens of each target behind its prompt and its slot's prefix.

        Raises:
            PrefixError: prefix, prompt and target pass the positions of the base.
        """
        bank = self._filled_bank()
        lengths = bank.shifts.tolist()
        rows = [_Row(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]
        for row, slot in zip(rows, slots, strict=True):
            own = 0 if self.base.is_encoder_decoder else len(row.prompt_ids)
            self.base.check_length(lengths[slot], own + len(row.target_ids))
        found = [0.0] * len(rows)
        for batch in pack(rows, TOKENS_PER_BATCH):
            with self.base.prefixes(bank, torch.tensor([slots[i] for i in batch], device=self.base.device)):
                losses = row_losses(self.base, [rows[i] for i in batch], self._pad)
            for i, loss in zip(batch, losses.tolist(), strict=True):
                found[i] = loss
        return found

    def longest_prompt(self, max_new_tokens: int) -> int | None:
        """The tokens that a prompt without prefix may have before an answer of `max_new_tokens`; None: any number."""
        limit = self.base.max_positions
        return limit if limit is None or self.base.is_encoder_decoder else limit - max_new_tokens

    def longest_answer(self, slot: int, prompt: int) -> int | None:
        """The tokens that an answer may have behind the prefix of a slot and a prompt of so many tokens; None: any number."""
        limit = self.base.max_positions
        if limit is None:
            return None
        length = 0 if slot == 0 else _length(self._prefixes[slot - 1])
        return max(0, limit - length - (0 if self.base.is_encoder_decoder else prompt))

    def answer(self, inputs: Sequence[str | list[dict[str, str]]], slot: int) -> list[str]:
        """Answer texts (or chats) of one customer, prompted and decoded as the prefix was when it was judged.

        Args:
            inputs: texts, or lists of chat messages.
            slot: what `add` returned.
        """
        config = self._configs[slot - 1]
        prompt = JobPrompt(**config["prompt"])
        ids = [encode_prompt(self.tokenizer, prompt, config["chat"], text, self.base.is_encoder_decoder) for text in inputs]
        return self.generate(ids, [slot] * len(ids), **config["generation"])

    def _filled_bank(self) -> PrefixBank:
        if self._bank is None:
            length = max((_length(prefix) for prefix in self._prefixes), default=0)
            self._bank = PrefixBank(self.base.sites, slots=len(self._prefixes) + 1, length=length, device=self.base.device)
            for slot, prefix in enumerate(self._prefixes, start=1):
                self._bank.put(slot, prefix, is_infix(self._configs[slot - 1]))
        return self._bank

    def _room(self, prefix: int, prompt: int, max_new_tokens: int) -> int:
        """How many tokens an answer may have before prefix, prompt and answer pass the positions of the base."""
        before = 0 if self.base.is_encoder_decoder else prompt
        self.base.check_length(prefix, before + 1)
        limit = self.base.max_positions
        return max_new_tokens if limit is None else min(max_new_tokens, limit - prefix - before)

    @property
    def _pad(self) -> int:
        return self.tokenizer.pad_token_id

    def _stop_tokens(self) -> list[int]:
        # Chat models often end a turn with another token than the tokenizer's EOS.
        stop = self.base.model.generation_config.eos_token_id
        named = stop if isinstance(stop, list) else [stop]
        return sorted({t for t in [*named, self.tokenizer.eos_token_id] if t is not None})


def _length(prefix: Prefix) -> int:
    return next(iter(prefix.values()))[0].shape[1]


def _batches(prompts: Sequence[list[int]], rooms: Sequence[int], num_beams: int) -> list[tuple[list[int], int]]:
    """Indices of prompts that share a batch, and the longest answer of that batch.

    Like lengths come together, longest first, so that running out of memory shows at once; batches are cut by rows and tokens. Prompts with
    room for answers of different lengths never share a batch: nobody's answer is cut short by a neighbour.
    """
    batches: list[tuple[list[int], int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: (-rooms[i], -len(prompts[i]))):
        batch, room = batches[-1] if batches else ([], -1)
        tokens = (len(batch) + 1) * num_beams * (len(prompts[batch[0]]) + room) if batch else 0
        if room != rooms[i] or len(batch) >= ROWS_PER_BATCH or tokens > TOKENS_PER_BATCH:
            batch, room = [], rooms[i]
            batches.append((batch, room))
        batch.append(i)
    return batches


def load_engine(base: JobBase) -> PrefixEngine:
    """Load tokenizer and frozen base.

    Raises:
        BaseModelError: not found, or not the base that `base.digest` names.
    """
    frozen = load_base(base)
    tokenizer, _ = load_tokenizer(frozen.folder)
    return PrefixEngine(frozen, tokenizer, base.digest)
