"""Log-likelihoods of continuations: batched by tokens, logits only where they are needed."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

Pair = tuple[list[int], list[int]]
"""Token ids of a context (not empty) and of what follows it (not empty)."""
Answer = tuple[float, bool]
"""Log-likelihood of the continuation in nats; whether greedy decoding would produce it."""

CPU_TOKENS, DEVICE_TOKENS = 2048, 65_536
"""Tokens of a batch, padding included, to begin with; halved when memory runs out."""
_LOGITS = 1 << 28  # elements of a batch's logits, at most


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
        token before it. ValueError for an empty part of a pair.
        """
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
            advance(sum(len(groups[ids]) for ids in batch))
            queue = queue[len(batch) :]
        for i in long:
            parts = self(list(_parts(*pairs[i], self.max_length)))
            answers[i] = sum(part[0] for part in parts), all(part[1] for part in parts)
            advance(1)
        return answers

    def _rows(self, queue: list[tuple[int, ...]], wanted: dict[tuple[int, ...], int]) -> int:
        """How many of the queue fit into a batch."""
        rows, first = max(1, self.tokens // len(queue[0])), len(queue[0])
        start = first
        for row, ids in enumerate(queue[:rows]):
            start = min(start, len(ids) - wanted[ids])
            if row and (row + 1) * (first - start) * self.model.config.vocab_size > _LOGITS:
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

    White space at the end of the context goes over to the continuation.
    """
    kept = context.rstrip()
    whole = tokenizer(context + continuation, verbose=False)["input_ids"]
    ids = tokenizer(kept, verbose=False)["input_ids"]
    return ids, whole[len(ids) :]


def prefix_token(tokenizer: Any) -> Any:
    """What stands before the first token of a text: bos, else eos; None without either."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return bos if bos is not None else eos
