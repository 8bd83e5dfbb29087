"""The decoding loop, the only one in the house: rows of many customers in one batch, joining and leaving at every step (continuous batching).

In: requests (`pipeline.inference.request`). Out: their tokens and texts, as they come. A step takes waiting requests in, as far as there is room, and
runs their prompts through the base (prefill); then it runs the base once for one more token of every running row. Each row stands behind its own
prefix by the number of its slot in a bank; a prefix is in the bank once, however many rows it has. What a row gets does not depend on its neighbours.
Knows nothing of customers, files, the registry, threads or HTTP.
"""

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, LogitsProcessorList

from pipeline.inference.beams import BeamSearch
from pipeline.inference.cache import RowCache
from pipeline.inference.choose import averaged, draw, logprob_of
from pipeline.inference.request import FinishReason, Loaded, Request
from pipeline.inference.text import TextStream
from pipeline.prefix import FrozenBase, PrefixBank
from pipeline.training.batches import left_padded, right_padded

# Prompt tokens of one prefill, padding included, so that running rows do not wait long.
PREFILL_TOKENS = 4096


@dataclass(eq=False)
class _Lane:
    """A running request.

    Attributes:
        slots: of its members in the bank.
        rows: its rows in the cache, all beams of the first member first.
        columns: the most that a row of it may come to have.
        stopped: whether a stop string is complete.
        processors: what the base's own generation_config.json does to scores, or None.
    """

    request: Request
    slots: list[int]
    columns: int
    stream: TextStream
    rows: list[int] = field(default_factory=list)
    stopped: bool = False
    beams: BeamSearch | None = None
    numbers: random.Random | None = None
    processors: LogitsProcessorList | None = None

    @property
    def beam_count(self) -> int:
        """Rows of each member."""
        return self.request.decoding.num_beams

    @property
    def simple(self) -> bool:
        """Whether its scores are the logits of one row."""
        return len(self.rows) == 1 and self.processors is None


class Decoder:
    """Requests under way on one base.

    Args:
        base: with the prefix hook attached.
        tokenizer: of the base.
        max_rows: rows of a batch; a request of `n` beams and `m` members takes `n * m`.
        max_tokens: columns of the cache of all rows together, as far as running requests may come.

    Attributes:
        steps: forward passes over running rows so far.
        prefills: forward passes over prompts so far.
        row_steps: rows of all those steps together.
        failures: requests that could not begin.
    """

    def __init__(self, base: FrozenBase, tokenizer: Any, *, max_rows: int, max_tokens: int) -> None:
        self.base, self.tokenizer, self.max_rows, self.max_tokens = base, tokenizer, max_rows, max_tokens
        self.ends = _end_tokens(base, tokenizer)
        self.steps = self.prefills = self.row_steps = self.failures = 0
        self._waiting: deque[Request] = deque()
        self._cancelled: list[Request] = []
        self._guard = threading.Lock()  # of these two
        self._settings: dict[int, GenerationConfig] = {}
        self._own_processors: bool | None = None
        self._reset()

    def _reset(self) -> None:
        self._lanes: list[_Lane] = []
        self._owners: list[tuple[_Lane, int]] = []  # of each row of the cache: its lane, and which of the lane's rows it is
        self._next: list[int] = []  # the last token of each row, which the next step reads
        self._cache = RowCache()
        self._cross = RowCache()  # of encoder-decoders: keys and values of the prompt
        self._bank = self._empty_bank()
        self._in_bank: dict[Loaded, tuple[int, int]] = {}  # slot, and how many lanes use it
        self._row_slots: torch.Tensor | None = None

    def submit(self, request: Request) -> None:
        """Queue a request. From any thread.

        Raises:
            PrefixError: prompt, prefix and answer pass the positions of the base.
        """
        if self.base.is_encoder_decoder:
            self.base.check_length(0, len(request.prompt_ids))
        for member in request.members.prefixes:
            own = 0 if self.base.is_encoder_decoder else len(request.prompt_ids)
            self.base.check_length(member.length, own + request.decoding.max_new_tokens)
        with self._guard:
            self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Nobody waits for this answer any more: its rows are free before the next step. From any thread."""
        with self._guard:
            self._cancelled.append(request)

    def _let_go(self) -> None:
        with self._guard:
            gone, self._cancelled = set(self._cancelled), []
            queued = [request for request in self._waiting if request in gone]
            for request in queued:
                self._waiting.remove(request)
        for lane in [lane for lane in self._lanes if lane.request in gone]:
            self._close(lane, "cancelled")
        for request in queued:
            _end(request, "", "", "cancelled")

    @property
    def waiting(self) -> int:
        """Requests that no row has yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have rows."""
        return len(self._lanes)

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self._owners)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._lanes or self._waiting)

    @property
    def cache_bytes(self) -> int:
        """What keys and values of rows take now, buffers included; prefixes apart."""
        return self._cache.bytes + self._cross.bytes

    @torch.inference_mode()
    def step(self) -> None:
        """Let cancelled requests go, take in waiting ones if there is room, and decode one more token for every row."""
        if self._cancelled:
            self._let_go()
        admitted = self._admitted()
        if admitted:
            self._prefill(admitted)
        if self._lanes:
            self._decode()

    def fail(self, error: str, waiting: bool = False) -> None:
        """End whatever runs with an error in words, and start anew: after an exception in `step`, of which nobody knows whose fault it is.

        Args:
            error: in words.
            waiting: also what has not begun.
        """
        failed = [lane.request for lane in self._lanes]
        self._reset()
        while waiting and self._waiting:
            failed.append(self._waiting.popleft())
        for request in failed:
            if request.finish_reason is None:
                request.error = error
                _end(request, "", request.text, "error")

    # Taking in

    def _admitted(self) -> list[_Lane]:
        """The first of the waiting requests, as many as there is room for and as fit in one prefill."""
        lanes: list[_Lane] = []
        rows, columns = self.rows, max((lane.columns for lane in self._lanes), default=0)
        prompts, longest = 0, 0
        while self._waiting:
            request = self._waiting[0]
            own = len(request.prompt_ids) + request.decoding.max_new_tokens
            if (self._lanes or lanes) and not self._shares:
                break
            rows, columns = rows + request.rows, max(columns, own)
            prompts, longest = prompts + len(request.members.prefixes), max(longest, len(request.prompt_ids))
            if (self._lanes or lanes) and (rows > self.max_rows or rows * columns > self.max_tokens):
                break
            if lanes and prompts * longest > PREFILL_TOKENS:
                break
            self._waiting.popleft()
            try:
                lanes.append(self._lane(request, own))
            except Exception as error:
                self._refuse(request, error)
        return lanes

    def _refuse(self, request: Request, cause: Exception) -> None:
        """End a request that could not begin."""
        self.failures += 1
        request.error, request.cause = "the service failed when this was to begin", cause
        _end(request, "", "", "error")

    @property
    def _shares(self) -> bool:
        """Whether rows come out the same in company: LLM.int8 keeps the columns that are large in any row of a batch in 16 bit."""
        return not getattr(self.base.model, "is_loaded_in_8bit", False)

    def _lane(self, request: Request, columns: int) -> _Lane:
        how = request.decoding
        stream = TextStream(self.tokenizer, how.stop, request.on_text is not None and how.num_beams == 1)
        lane = _Lane(request, [], columns, stream, processors=self._processors(request))
        if how.num_beams > 1:
            settings = self._settings_for(how.num_beams)
            penalty = settings.length_penalty if how.length_penalty is None else how.length_penalty
            early = settings.early_stopping if how.early_stopping is None else how.early_stopping
            lane.beams = BeamSearch(how.num_beams, how.max_new_tokens, self.ends, penalty, early, stream.stops)
        elif how.temperature > 0:
            lane.numbers = random.Random(how.seed % 2**64)  # which takes the absolute value of a negative one
        return lane

    def _settings_for(self, num_beams: int) -> GenerationConfig:
        """What `generate` of transformers would make of the base's generation_config.json for a search."""
        if num_beams not in self._settings:
            model = self.base.model
            own = GenerationConfig(
                num_beams=num_beams,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.ends,
            )
            settings, _ = model._prepare_generation_config(own)
            model._prepare_special_tokens(settings, device=self.base.device)
            self._settings[num_beams] = settings
        return self._settings[num_beams]

    def _processors(self, request: Request) -> LogitsProcessorList | None:
        """The base's own: no repeated n-grams, forced first tokens and the like. Made for each request, for they know its lengths."""
        if self._own_processors is False:
            return None
        settings = self._settings_for(request.decoding.num_beams)
        start = 1 if self.base.is_encoder_decoder else len(request.prompt_ids)
        settings.max_length = start + request.decoding.max_new_tokens
        prompt = torch.tensor([list(request.prompt_ids)], device=self.base.device)
        made = self.base.model._get_logits_processor(
            settings,
            input_ids_seq_length=start,
            encoder_input_ids=prompt if self.base.is_encoder_decoder else None,
            device=self.base.device,
            model_kwargs={},
        )
        self._own_processors = bool(made)
        return made or None

    def _prefill(self, lanes: Sequence[_Lane]) -> None:
        """Run the prompts through the base, let their rows join, and choose everybody's first token.

        Where that fails, whoever it is that cannot begin ends with an error, and nobody else.
        """
        ids = [list(lane.request.prompt_ids) for lane in lanes for _ in lane.request.members.prefixes]
        try:
            self._place(lanes)
            slots = [slot for lane in lanes for slot in lane.slots]
            prefilled, cross, logits = self._run_prompts(ids, torch.tensor(slots, device=self.base.device))
            begun = True
        except Exception as error:
            # Nothing of them has joined those that run.
            for lane in lanes:
                lane.slots.clear()
            self._count_users()
            if len(lanes) == 1:
                self._refuse(lanes[0].request, error)
                return
            begun = False
        if not begun:
            # One by one: the others can begin, also where memory did not suffice for all at once. Not above, where the error holds that memory.
            rest = deque(lanes)
            try:
                while rest:
                    self._prefill([rest.popleft()])
            finally:
                with self._guard:  # whatever else goes wrong, those that had no turn yet wait again
                    self._waiting.extendleft(lane.request for lane in reversed(rest))
            return
        self.prefills += 1
        self._lanes += lanes  # whatever goes wrong from here on is theirs too
        sources: list[int] = []
        first, at = self.rows, 0
        for lane in lanes:
            for member in range(len(lane.slots)):
                # Beams begin alike: a member's are one row of the prefill, and rows of their own from then on.
                for beam in range(lane.beam_count):
                    lane.rows.append(len(self._owners))
                    self._owners.append((lane, member * lane.beam_count + beam))
                    sources.append(at)
                at += 1
        lengths = [len(ids[source]) for source in sources]
        self._cache.join(prefilled, sources, [1] * len(sources) if self.base.is_encoder_decoder else lengths)
        if cross is not None:
            self._cross.join(cross, sources, lengths, padded_behind=True)
        self._next += [0] * len(sources)
        self._row_slots = None
        self._choose(lanes, logits if len(sources) == len(ids) else logits[torch.tensor(sources, device=logits.device)], first)

    def _run_prompts(self, ids: list[list[int]], slots: torch.Tensor) -> tuple[DynamicCache, DynamicCache | None, torch.Tensor]:
        """Keys and values of the decoder, those of cross-attention (encoder-decoders), and the logits of the first token [B, vocabulary]."""
        base = self.base
        pad = self.tokenizer.pad_token_id
        with base.prefixes(self._bank, slots):
            if base.is_encoder_decoder:
                tokens, mask = right_padded(ids, pad, base.device)
                start = torch.full((len(ids), 1), self._start_token, device=base.device)
                both = EncoderDecoderCache(DynamicCache(), DynamicCache())
                out = base.model(
                    input_ids=tokens, attention_mask=mask, decoder_input_ids=start, past_key_values=both, use_cache=True
                )
                return both.self_attention_cache, both.cross_attention_cache, out.logits[:, -1].float()
            tokens, mask = left_padded(ids, pad, base.device)
            length = tokens.shape[1]
            cache = DynamicCache()
            # Padding stands in front of prompts, so all end in the same column.
            base.prompts_end_at(torch.full((len(ids),), length - 1, device=base.device))
            base.logits_only_at(torch.arange(len(ids), device=base.device) * length + length - 1)
            out = base.model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
            return cache, None, out.logits[0].float()

    @property
    def _start_token(self) -> int:
        start = self._settings_for(1).decoder_start_token_id
        return int(self.tokenizer.bos_token_id if start is None else start)

    def _place(self, lanes: Sequence[_Lane]) -> None:
        """Put the prefixes of new lanes into the bank, each once."""
        wanted = {member: None for lane in lanes for member in lane.request.members.prefixes if member.prefix}
        used = {*self._in_bank, *wanted}
        length = max((member.length for member in used), default=0)
        slots = len(self._bank.shifts)
        # Anew if something is too large, or if most of every row's columns would be for nobody.
        needed = len(used) + 1
        if length > self._bank.length or 2 * length < self._bank.length or not needed <= slots <= max(2, 2 * needed):
            # By doubling, but no further than there can be prefixes.
            slots = max(needed, min(2 * slots, self.max_rows + 1)) if needed > slots else min(slots, 2 * needed)
            bank = PrefixBank(self.base.sites, slots, length, self.base.device, self._bank_dtype())
            for member, (slot, _) in self._in_bank.items():
                bank.put(slot, member.prefix, member.infix)
            self._bank = bank  # when it is whole: running rows read it
        free = iter(sorted(set(range(1, len(self._bank.shifts))) - {slot for slot, _ in self._in_bank.values()}))
        for member in wanted:
            if member not in self._in_bank:
                slot = next(free)
                self._bank.put(slot, member.prefix, member.infix)
                self._in_bank[member] = (slot, 0)
        for lane in lanes:
            for member in lane.request.members.prefixes:
                if not member.prefix:
                    lane.slots.append(0)
                    continue
                slot, users = self._in_bank[member]
                self._in_bank[member] = (slot, users + 1)
                lane.slots.append(slot)

    def bank_bytes(self, prefixes: Sequence[Loaded]) -> int:
        """What the bank takes at most when rows of all these prefixes run: a place for each, as wide as the longest, and as many spare ones."""
        column = sum(2 * site.heads * site.head_dim for site in self.base.sites.values()) * self._bank_dtype().itemsize
        distinct = set(prefixes)
        return (min(2 * len(distinct), self.max_rows) + 1) * max(prefix.length for prefix in distinct) * column

    def _empty_bank(self) -> PrefixBank:
        return PrefixBank(self.base.sites, 1, 0, self.base.device, prefix_dtype(self.base))

    def _count_users(self) -> None:
        """Free the places in the bank that no running lane uses."""
        users = Counter(member for lane in self._lanes for member in lane.request.members.prefixes)
        self._in_bank = {member: (slot, users[member]) for member, (slot, _) in self._in_bank.items() if users[member]}

    def _bank_dtype(self) -> torch.dtype:
        return next(iter(self._bank.tensors.values())).dtype

    # One step

    def _decode(self) -> None:
        """One forward pass for all rows."""
        base, device = self.base, self.base.device
        cache, rows = self._cache, len(self._owners)
        cache.make_room()
        if self._row_slots is None:
            self._row_slots = torch.tensor([lane.slots[i // lane.beam_count] for lane, i in self._owners], device=device)
        lengths = torch.tensor(cache.lengths, device=device)
        width = cache.width
        tokens = torch.tensor(self._next, device=device)[:, None]
        mask = _ending(lengths + 1, width + 1)
        with base.prefixes(self._bank, self._row_slots):
            if base.is_encoder_decoder:
                cross = self._cross
                # Whose content nobody asks for any more: keys and values of it are in the cache.
                hidden = torch.zeros(1, 1, 1, device=device, dtype=base.model.dtype).expand(
                    rows, cross.width, base.model.config.get_text_config().hidden_size
                )
                base.rows_start_at(width - lengths)
                out = base.model(
                    attention_mask=_ending(torch.tensor(cross.lengths, device=device), cross.width),
                    encoder_outputs=(hidden,),
                    decoder_input_ids=tokens,
                    decoder_attention_mask=mask,
                    past_key_values=EncoderDecoderCache(cache, cross),
                    use_cache=True,
                )
            else:
                if self._bank.has_infix:
                    prompts = torch.tensor([len(lane.request.prompt_ids) for lane, _ in self._owners], device=device)
                    base.prompts_end_at(width - lengths + prompts - 1)
                out = base.model(
                    input_ids=tokens, attention_mask=mask, position_ids=lengths[:, None], past_key_values=cache, use_cache=True
                )
        cache.advance()
        self.steps += 1
        self.row_steps += rows
        self._choose(list(self._lanes), out.logits[:, -1].float(), 0)

    def _choose(self, lanes: Sequence[_Lane], logits: torch.Tensor, first: int) -> None:
        """Choose the next token of each lane. `logits` is [rows, vocabulary], its first row that of the cache's row `first`."""
        single = [lane for lane in lanes if lane.beams is None]
        sources: list[int] = []
        targets: list[int] = []
        done: list[tuple[_Lane, FinishReason]] = []
        if single:
            scores = self._scores_of_single(single, logits, first)
            best, tokens_of = scores.max(-1)
            tokens: list[int] = tokens_of.tolist()
            broken = best.isnan().tolist()
            drawing = [i for i, lane in enumerate(single) if lane.numbers is not None and not broken[i]]
            if drawing:
                hows = [single[i].request.decoding for i in drawing]
                numbers = [single[i].numbers.random() for i in drawing]  # type: ignore[union-attr]  # see above
                chosen = scores if len(drawing) == len(single) else scores[torch.tensor(drawing, device=scores.device)]
                for i, token in zip(drawing, draw(chosen, hows, numbers), strict=True):
                    tokens[i] = token
            for i, lane in enumerate(single):
                if broken[i]:
                    lane.request.error = (
                        "the base gives no numbers behind this prefix: it is damaged, or was trained with too high a rate"
                    )
                    done.append((lane, "error"))
                    continue
                reason = self._push(lane, tokens[i], scores[i])
                if reason is not None:
                    done.append((lane, reason))
                for row in lane.rows:
                    self._next[row] = tokens[i]
        for lane in lanes:
            if lane.beams is None:
                continue
            rows = torch.tensor(lane.rows, device=logits.device) - first
            scores = self._averaged(lane, logits[rows]).log_softmax(-1)
            if lane.processors is not None:
                scores = lane.processors(self._ids_of(lane), cast(torch.FloatTensor, scores))
            if bool(scores.isnan().any()):
                lane.request.error = (
                    "the base gives no numbers behind this prefix: it is damaged, or was trained with too high a rate"
                )
                done.append((lane, "error"))
                continue
            parents, new = lane.beams.step(scores)
            if lane.beams.done:
                done.append((lane, "stop"))
                continue
            beams = lane.beams.num_beams
            for at in range(0, len(lane.rows), beams):
                sources += [lane.rows[at + parent] for parent in parents]
                targets += lane.rows[at : at + beams]
                for i, token in enumerate(new):
                    self._next[lane.rows[at + i]] = token
        if sources:
            self._cache.copy(sources, targets)  # what cross-attention sees is the same for all beams
        for lane, reason in done:
            self._close(lane, reason)

    def _scores_of_single(self, lanes: Sequence[_Lane], logits: torch.Tensor, first: int) -> torch.Tensor:
        """Scores [lanes, vocabulary] of lanes without beams."""
        simple = [lane for lane in lanes if lane.simple]
        if len(simple) == len(lanes):
            rows = [lane.rows[0] - first for lane in lanes]
            same = len(rows) == len(logits) and rows == list(range(len(rows)))
            return logits if same else logits[torch.tensor(rows, device=logits.device)]
        each = []
        for lane in lanes:
            scores = self._averaged(lane, logits[torch.tensor(lane.rows, device=logits.device) - first])
            each.append(
                scores if lane.processors is None else lane.processors(self._ids_of(lane), cast(torch.FloatTensor, scores))
            )
        return torch.cat(each)

    @staticmethod
    def _averaged(lane: _Lane, logits: torch.Tensor) -> torch.Tensor:
        """From [members * beams, vocabulary] to [beams, vocabulary]."""
        members = lane.request.members
        if len(members.prefixes) == 1:
            return logits
        return averaged(logits.view(len(members.prefixes), -1, logits.shape[-1]), members.average)

    def _ids_of(self, lane: _Lane) -> torch.LongTensor:
        """What processors see: the sequence so far of each beam, as transformers would have it."""
        front = [self._start_token] if self.base.is_encoder_decoder else list(lane.request.prompt_ids)
        tails: Sequence[Sequence[int]] = [lane.request.tokens] if lane.beams is None else lane.beams.beams
        return cast(torch.LongTensor, torch.tensor([[*front, *tail] for tail in tails], device=self.base.device))

    def _push(self, lane: _Lane, token: int, scores: torch.Tensor) -> FinishReason | None:
        """Add a token to a lane without beams; why the answer ends with it, if it does."""
        request = lane.request
        if token in self.ends:
            return "stop"
        request.tokens.append(token)
        if request.first_token_at is None:
            request.first_token_at = time.monotonic()
        if request.decoding.top_logprobs is not None:
            request.logprobs.append(logprob_of(scores, token, request.decoding.top_logprobs))
        piece, lane.stopped = lane.stream.add(token)
        if piece:
            request.text += piece
            if request.on_text is not None:
                request.on_text(piece)
        if lane.stopped:
            return "stop"
        return "length" if len(request.tokens) >= request.decoding.max_new_tokens else None

    def _close(self, lane: _Lane, reason: FinishReason) -> None:
        """A lane ends: its rows and its place in the bank are free again, and who asked is told."""
        request = lane.request
        self._lanes.remove(lane)
        for row in sorted(lane.rows, reverse=True):
            last = self._cache.leave(row)
            if self.base.is_encoder_decoder:
                self._cross.leave(row)
            owner, i = self._owners[row] = self._owners[last]
            owner.rows[i] = row
            self._next[row] = self._next[last]
            self._owners.pop()
            self._next.pop()
        self._row_slots = None
        for member in request.members.prefixes:
            if member.prefix:
                slot, users = self._in_bank[member]
                self._in_bank[member] = (slot, users - 1)
                if users == 1:
                    del self._in_bank[member]
        if not self._in_bank:
            self._bank = self._empty_bank()  # or its memory would be kept for nobody
        if lane.beams is not None and reason == "stop":
            best = list(lane.beams.best)
            ended = bool(best) and best[-1] in self.ends
            request.tokens = best[:-1] if ended else best
            reason = "stop" if ended or lane.stream.stops(best) else "length"
            for token in request.tokens:
                lane.stopped = lane.stopped or lane.stream.add(token)[1]
        last_piece, text = lane.stream.finish(lane.stopped)
        _end(request, last_piece, text, reason)


def _end(request: Request, piece: str, text: str, reason: FinishReason) -> None:
    request.text, request.finish_reason = text, reason
    if piece and request.on_text is not None:
        request.on_text(piece)
    if request.on_end is not None:
        request.on_end()


def _ending(lengths: torch.Tensor, width: int) -> torch.Tensor:
    """The attention mask [B, width] of rows that end in the last column."""
    return (torch.arange(width, device=lengths.device)[None, :] >= (width - lengths)[:, None]).long()


def _end_tokens(base: FrozenBase, tokenizer: Any) -> list[int]:
    # Chat models often end a turn with another token than the tokenizer's EOS.
    stop = base.model.generation_config.eos_token_id
    named = stop if isinstance(stop, list) else [stop]
    return sorted({token for token in [*named, tokenizer.eos_token_id] if token is not None})


def prefix_dtype(base: FrozenBase) -> torch.dtype:
    """What the base computes keys and values in; prefixes are rounded to it once instead of at every step."""
    return base.model.dtype if base.model.dtype.is_floating_point else torch.float32
