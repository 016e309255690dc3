"""Log-likelihoods of continuations: batched by tokens, logits only where they are needed."""

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simreg.recipe import assemble, hub
from simreg.recipe.errors import UserError

Pair = tuple[list[int], list[int]]
"""Token ids of a context (not empty) and of what follows it (not empty)."""
Answer = tuple[float, bool]
"""Log-likelihood of the continuation in nats; whether greedy decoding would produce it."""

CPU_TOKENS, DEVICE_TOKENS = 2048, 65_536
"""Tokens of a batch, padding included, to begin with; halved when memory runs out."""
_LOGITS = 1 << 28  # elements of a batch's logits, at most


def load(
    folder: Path, row: int | None, *, bf16: bool, name: str | None = None
) -> tuple["Scorer", Any]:
    """The model in a folder, ready to score, and its tokenizer; UserError, which calls the model
    `name`, if they can't be loaded.

    It uses the positions that it has, not more than `row`, which it was trained with.
    """
    tokenizer = hub.tokenizer(folder)
    model = hub.load(folder, name)
    if prefix_token(tokenizer) is None:
        raise UserError(f"the tokenizer in {folder} has no bos or eos token: add one to it")
    model.to(assemble.device()).train(False)  # type: ignore[arg-type]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", 0)
    longest = int(positions or 2048)
    return Scorer(model, max_length=min(longest, row or longest), bf16=bf16), tokenizer


class Scorer:
    """Scores pairs by a causal model.

    Args:
        model: in evaluation mode, on its device.
        max_length: positions the model may use; a longer context is cut from the left.
        bf16: run under bfloat16 autocast; the log-softmax is in float32 either way.
    """

    def __init__(self, model: PreTrainedModel, *, max_length: int, bf16: bool = False) -> None:
        self.model, self.max_length, self.bf16 = model, max_length, bf16
        self.tokens = CPU_TOKENS if model.device.type == "cpu" else DEVICE_TOKENS
        self._may_select = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(
        self, pairs: Sequence[Pair], advance: Callable[[int], None] = lambda count: None
    ) -> list[Answer]:
        """An answer for each pair, in their order; `advance` is told how many more are done.

        Pairs that differ in their last token only (as "yes" and "no") share a forward pass. A
        continuation of more than `max_length` tokens is scored in parts of so many, each after the
        token before it.

        Raises:
            ValueError: an empty part of a pair.
            UserError: tokens that the model has not, or a score that is NaN.
        """
        self._check(pairs)
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        long = []
        for i, (context, continuation) in enumerate(pairs):
            if not context or not continuation:
                raise ValueError(
                    f"a context of {len(context)} and a continuation of {len(continuation)} "
                    "tokens: expected 1 or more"
                )
            if len(continuation) > self.max_length:
                long.append(i)
                continue
            groups[tuple((context + continuation)[-(self.max_length + 1) : -1])].append(i)
        answers: list[Answer] = [(0.0, False)] * len(pairs)
        wanted = {ids: max(len(pairs[i][1]) for i in group) for ids, group in groups.items()}
        queue = sorted(groups, key=len, reverse=True)  # the largest batch comes first
        while queue:
            batch = queue[: self._rows(queue, wanted)]
            try:
                scored = list(self._batch(batch, wanted))
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.tokens = len(batch) * len(batch[0]) // 2
                torch.cuda.empty_cache()
                continue
            for ids, logits in scored:
                for i in groups[ids]:
                    answers[i] = _answer(logits, pairs[i][1])
                    if math.isnan(answers[i][0]):  # it would make the first choice the likeliest
                        raise UserError(
                            f"{self.model.name_or_path}: its log-likelihoods are NaN: the weights "
                            "hold NaN, or its activations overflow"
                        )
            advance(sum(len(groups[ids]) for ids in batch))
            queue = queue[len(batch) :]
        for i in long:
            parts = self(list(_parts(*pairs[i], self.max_length)))
            answers[i] = sum(part[0] for part in parts), all(part[1] for part in parts)
            advance(1)
        return answers

    def _check(self, pairs: Sequence[Pair]) -> None:
        largest = max((max(part, default=0) for pair in pairs for part in pair), default=0)
        embeddings: Any = self.model.get_input_embeddings()
        if largest >= (known := len(embeddings.weight)):
            raise UserError(
                f"{self.model.name_or_path}: the text has token {largest}, its vocabulary only "
                f"{known}: its tokenizer is that of another model, or has had tokens added"
            )

    def _rows(self, queue: list[tuple[int, ...]], wanted: dict[tuple[int, ...], int]) -> int:
        """How many of the queue fit into a batch."""
        rows, first = max(1, self.tokens // len(queue[0])), len(queue[0])
        start = first
        for row, ids in enumerate(queue[:rows]):
            start = min(start, len(ids) - wanted[ids])
            vocabulary = self.model.config.get_text_config().vocab_size
            if row and (row + 1) * (first - start) * vocabulary > _LOGITS:
                return row
        return min(rows, len(queue))

    def _batch(
        self, batch: list[tuple[int, ...]], wanted: dict[tuple[int, ...], int]
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Each input of the batch with its last logits [wanted, vocabulary], float32."""
        device, longest = self.model.device, len(batch[0])
        # Padding stands on the right, where no earlier position attends to it.
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        start = min(len(tokens) - wanted[tokens] for tokens in batch)
        keep: dict[str, Any] = {}
        if self._may_select:
            keep["logits_to_keep"] = torch.arange(start, longest, device=device)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, self.bf16):
            logits = self.model(input_ids=ids.to(device), use_cache=False, **keep).logits
        logits = logits[:, start - longest :]
        for row, tokens in enumerate(batch):
            end = len(tokens) - start
            yield tokens, logits[row, end - wanted[tokens] : end].float()


def _parts(context: list[int], continuation: list[int], length: int) -> Iterator[Pair]:
    for start in range(0, len(continuation), length):
        yield context + continuation[:start], continuation[start : start + length]


def _answer(logits: Tensor, continuation: list[int]) -> Answer:
    targets = torch.tensor(continuation, device=logits.device)
    logits = logits[-len(targets) :]
    chosen = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
    return float(chosen.sum()), bool((logits.argmax(1) == targets).all())


def encode_pair(tokenizer: Any, context: str, continuation: str) -> Pair:
    """Token ids of both, split where the context alone ends (as lm-evaluation-harness does).

    White space at the end of the context goes over to the continuation. Tokens that the tokenizer
    puts before a text (bos) stand before the context; what it puts after one (eos) is left out,
    and a special token's name in the text is text.
    """

    def encode(text: str, special: bool = False) -> list[int]:
        options = {"add_special_tokens": special, "split_special_tokens": True}
        return list(tokenizer(text, verbose=False, **options)["input_ids"])

    kept = context.rstrip()
    ids, whole, marked = encode(kept), encode(context + continuation), encode(kept, special=True)
    ends = range(len(marked) - len(ids) + 1)
    first = next((i for i in ends if marked[i : i + len(ids)] == ids), 0) if ids else 1
    return marked[:first] + ids, whole[len(ids) :]


def prefix_token(tokenizer: Any) -> Any:
    """What stands before the first token of a text: bos, else eos; None without either."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return bos if bos is not None else eos
