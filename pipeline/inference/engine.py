"""A loaded base and prefixes from folders: answers and losses for batches in which every row belongs to another customer.

In: prompts as token ids, a slot for each (slot 0: no prefix). Out: texts. Knows nothing of MLflow or of how a prefix was trained.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.data.prompt import encode_prompt, load_tokenizer
from pipeline.errors import BaseModelError, PrefixError, StorageError
from pipeline.files import digest_of
from pipeline.inference.choose import averaged
from pipeline.inference.decoder import Decoder, prefix_dtype
from pipeline.inference.ensemble import load_members
from pipeline.inference.request import BASE_ALONE, Decoding, Loaded, Members, Request, seed_of
from pipeline.prefix import FrozenBase, PrefixBank, load_base
from pipeline.prefix.store import require
from pipeline.training.batches import pack, row_losses, summed_losses, target_logits
from pipeline.training.job import JobBase, JobPrompt

# Of `generate` and `losses`, which are given everything at once: prompt and answer tokens of all rows together, and rows (a beam is a row).
TOKENS_PER_BATCH = 8192
ROWS_PER_BATCH = 256


@dataclass(frozen=True)
class _Row:
    """A prompt and a target to judge."""

    prompt_ids: list[int]
    target_ids: list[int]


class PrefixEngine:
    """A loaded base and the prefixes that were added to it.

    Args:
        base: with the prefix hook attached.
        tokenizer: of the base.
        base_digest: what prefixes must have been trained on.
        quantization: of the base's weights.
    """

    def __init__(self, base: FrozenBase, tokenizer: Any, base_digest: str, quantization: str | None = None) -> None:
        self.base, self.tokenizer, self.base_digest, self.quantization = base, tokenizer, base_digest, quantization
        self._members: list[Members] = [BASE_ALONE]
        self._configs: list[dict[str, Any]] = [{}]
        self._slots: dict[str, int] = {}

    def load(self, prefix_dir: Path) -> tuple[Members, dict[str, Any]]:
        """Read a prefix folder, or an ensemble's, onto the base's device, and see that it fits.

        Returns:
            what stands before rows, and the content of prefix.json.

        Raises:
            BaseModelError: it was trained on another base.
            PrefixError: it is damaged.
            StorageError: its prefix.json does not say how it is prompted or answers.
        """
        members, config = load_members(prefix_dir)
        _check_answering(prefix_dir, config)
        if config["base"]["digest"] != self.base_digest:
            raise BaseModelError(
                f"{prefix_dir}: was trained on a base with digest {config['base']['digest'][:16]}, the loaded base has {self.base_digest[:16]}. "
                "Serve it with its own base, or train it anew."
            )
        for member in members.prefixes:
            # Tried in a bank of its own, so that a prefix that does not fit is refused here, and not in a batch with others.
            PrefixBank(self.base.sites, slots=1, length=member.length).put(0, member.prefix)
            if member.infix:
                self.base.check_infix()
        held = tuple(member.to(self.base.device, prefix_dtype(self.base)) for member in members.prefixes)
        return replace(members, prefixes=held), config

    @property
    def precision(self) -> str:
        """What the base computes in: `bfloat16`, `bfloat16 with int8 weights`."""
        return _precision(str(self.base.model.dtype).removeprefix("torch."), self.quantization)

    def other_precision(self, config: dict[str, Any]) -> str | None:
        """In what a prefix was judged, as its prefix.json says, if that is not what this base computes in: then its answers, and its scores, may be
        others.
        """
        judged = _precision(str(config["base"].get("dtype")), config["base"].get("quantization"))
        return None if judged == self.precision else judged

    def add(self, prefix_dir: Path) -> int:
        """Load a prefix folder, or an ensemble's, into a slot of its own; the same again gets the same slot.

        Raises:
            BaseModelError: it was trained on another base.
            PrefixError, StorageError: it is damaged.
        """
        members, config = self.load(prefix_dir)
        # The template and the place belong to a prefix as much as its weights: one adapter may have been imported twice.
        digest = digest_of(config)
        if digest not in self._slots:
            self._slots[digest] = len(self._members)
            self._members.append(members)
            self._configs.append(config)
        return self._slots[digest]

    def decoder(self, max_rows: int = ROWS_PER_BATCH, max_tokens: int = TOKENS_PER_BATCH) -> Decoder:
        """A decoding loop on this base."""
        return Decoder(self.base, self.tokenizer, max_rows=max_rows, max_tokens=max_tokens)

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
            finished: called with the places of prompts and their answers, as they are through.

        Returns:
            the answers without special tokens, in the order of the prompts.

        Raises:
            PrefixError: prefix and prompt leave no room for an answer within the positions of the base; or a prefix gives no numbers.
        """
        return self.decode(prompts, slots, Decoding(max_new_tokens, num_beams), finished)

    def decode(
        self,
        prompts: Sequence[list[int]],
        slots: Sequence[int],
        how: Decoding,
        finished: Callable[[list[int], list[str]], None] | None = None,
    ) -> list[str]:
        """As `generate`, with every setting of decoding. Of several prompts each draws with a seed of its own, see `seed_of`."""
        rooms = [
            self.room(self._members[slot].length, len(p), how.max_new_tokens) for p, slot in zip(prompts, slots, strict=True)
        ]
        decoder = self.decoder()
        through: list[int] = []

        requests: dict[int, Request] = {}
        # The longest first, so that running out of memory shows at once, and like lengths together.
        for i in sorted(range(len(prompts)), key=lambda i: (-rooms[i], -len(prompts[i]))):
            own = replace(how, max_new_tokens=rooms[i], seed=seed_of(how.seed, i))
            requests[i] = Request(prompts[i], self._members[slots[i]], own, on_end=functools.partial(through.append, i))
            decoder.submit(requests[i])
        while decoder.busy:
            decoder.step()
            if through:
                broken = next((requests[i] for i in through if requests[i].finish_reason == "error"), None)
                if broken is not None:
                    raise broken.cause or PrefixError(f"{broken.error}.")
                if finished is not None:
                    finished(list(through), [requests[i].text for i in through])
                through.clear()
        return [requests[i].text for i in range(len(prompts))]

    @torch.inference_mode()
    def losses(self, prompts: Sequence[list[int]], targets: Sequence[list[int]], slots: Sequence[int]) -> list[float]:
        """Cross-entropy in nats, summed over the tokens of each target behind its prompt and its slot's prefix.

        Raises:
            PrefixError: prefix, prompt and target pass the positions of the base.
        """
        rows = [_Row(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]
        for row, slot in zip(rows, slots, strict=True):
            own = 0 if self.base.is_encoder_decoder else len(row.prompt_ids)
            self.base.check_length(self._members[slot].length, own + len(row.target_ids))
        found = [0.0] * len(rows)
        alone = [i for i, slot in enumerate(slots) if len(self._members[slot].prefixes) == 1]
        for batch in pack([rows[i] for i in alone], TOKENS_PER_BATCH):
            places = [alone[i] for i in batch]
            bank, at = self._bank_for([self._members[slots[i]].prefixes[0] for i in places])
            with self.base.prefixes(bank, at):
                losses = row_losses(self.base, [rows[i] for i in places], self.tokenizer.pad_token_id)
            for i, loss in zip(places, losses.tolist(), strict=True):
                found[i] = loss
        for i in sorted(set(range(len(rows))) - set(alone)):
            members = self._members[slots[i]]
            bank, at = self._bank_for(members.prefixes)
            with self.base.prefixes(bank, at):
                # The same row behind each member.
                logits, wanted, _ = target_logits(self.base, [rows[i]] * len(members.prefixes), self.tokenizer.pad_token_id)
            length = len(rows[i].target_ids)
            scores = averaged(logits.view(len(members.prefixes), length, -1), members.average)
            found[i] = float(summed_losses(scores, wanted[:length], torch.zeros_like(wanted[:length]), 1))
        return found

    def _bank_for(self, prefixes: Sequence[Loaded]) -> tuple[PrefixBank, torch.Tensor]:
        """A bank with each of these prefixes once, and the slot of each."""
        distinct = list(dict.fromkeys(prefixes))
        bank = PrefixBank(self.base.sites, len(distinct), max(prefix.length for prefix in distinct), self.base.device)
        for slot, prefix in enumerate(distinct):
            if prefix.prefix:
                bank.put(slot, prefix.prefix, prefix.infix)
        return bank, torch.tensor([distinct.index(prefix) for prefix in prefixes], device=self.base.device)

    def longest_prompt(self, max_new_tokens: int) -> int | None:
        """The tokens that a prompt without prefix may have before an answer of `max_new_tokens`; None: any number."""
        limit = self.base.max_positions
        return limit if limit is None or self.base.is_encoder_decoder else limit - max_new_tokens

    def longest_answer(self, slot: int, prompt: int) -> int | None:
        """The tokens that an answer may have behind the prefix of a slot and a prompt of so many tokens; None: any number."""
        limit = self.base.max_positions
        if limit is None:
            return None
        return max(0, limit - self._members[slot].length - (0 if self.base.is_encoder_decoder else prompt))

    def answer(self, inputs: Sequence[str | list[dict[str, str]]], slot: int) -> list[str]:
        """Answer texts (or chats) of one customer, prompted and decoded as the prefix was when it was judged.

        Args:
            inputs: texts, or lists of chat messages.
            slot: what `add` returned.
        """
        config = self._configs[slot]
        prompt = JobPrompt(**config["prompt"])
        ids = [encode_prompt(self.tokenizer, prompt, config["chat"], text, self.base.is_encoder_decoder) for text in inputs]
        return self.generate(ids, [slot] * len(ids), **config["generation"])

    def room(self, prefix: int, prompt: int, max_new_tokens: int) -> int:
        """How many tokens an answer may have before prefix, prompt and answer pass the positions of the base.

        Raises:
            PrefixError: none.
        """
        before = 0 if self.base.is_encoder_decoder else prompt
        self.base.check_length(prefix, before + 1)
        if self.base.is_encoder_decoder:
            self.base.check_length(0, prompt)
        limit = self.base.max_positions
        return max_new_tokens if limit is None else min(max_new_tokens, limit - prefix - before)


def _precision(dtype: str, quantization: str | None) -> str:
    return f"{dtype} with {quantization} weights" if quantization else dtype


def _check_answering(prefix_dir: Path, config: dict[str, Any]) -> None:
    """Refuse a prefix.json without what `answer` and the service need of it.

    Raises:
        StorageError: something is missing or of another kind.
    """
    require(prefix_dir, config, "prompt", "chat", "generation", "generation.num_beams", "generation.max_new_tokens")
    known = {field.name: field for field in fields(JobPrompt)}
    needed = {name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING}
    asked = set(config["generation"]) - {"num_beams", "max_new_tokens"}
    wrong = sorted({*(set(config["prompt"]) - set(known)), *(needed - set(config["prompt"])), *asked})
    if wrong:
        raise StorageError(
            f"{prefix_dir / 'prefix.json'}: {', '.join(wrong)} is missing or unknown in its prompt or generation. It was damaged or "
            "changed, or written by a newer release: train or download it again, or upgrade."
        )


def load_engine(base: JobBase) -> PrefixEngine:
    """Load tokenizer and frozen base.

    Raises:
        BaseModelError: not found, or not the base that `base.digest` names.
    """
    frozen = load_base(base)
    tokenizer, _ = load_tokenizer(frozen.folder)
    return PrefixEngine(frozen, tokenizer, base.digest, base.quantization)
