"""What is measured on: shapes, the default ones of a machine, and the inputs of one."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simreg.recipe.errors import UserError

DTYPES = ("float32", "bfloat16", "float16", "float64")
VOCABULARY = 32_000
_SHAPE = re.compile(r"(?:(\d+)x)?(\d+)x(\d+)", re.ASCII)


@dataclass(frozen=True)
class Shape:
    """One problem: rows of tokens, compared within the row or within chunks of it."""

    batch: int
    length: int
    """Tokens of a row."""
    dim: int
    dtype: str
    chunk: int | None = None
    """Tokens are compared within chunks of so many, a divisor of `length`; None: the whole row."""

    @property
    def row(self) -> int:
        """How many tokens are compared with each other."""
        return self.chunk or self.length

    @property
    def rows(self) -> int:
        """How many such groups of tokens there are."""
        return self.batch * self.length // self.row

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.torch_dtype.itemsize

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the embeddings, the input that counts."""
        return self.batch * self.length * self.dim * self.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of that name."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def __str__(self) -> str:
        chunk = "" if self.chunk is None else f", chunks of {self.chunk:,}"
        return f"batch {self.batch:,}, L {self.length:,}{chunk}, d {self.dim:,}, {self.dtype}"


def default_sizes(device: torch.device) -> tuple[list[str], int, str]:
    """Shapes, tokens of a batch and dtype that suit the machine.

    A few minutes on two CPU cores; on CUDA a sweep of the length at d = 768, and wider models
    at the lengths that they are trained with.
    """
    if device.type != "cuda":
        return ["256x512", "1024x512", "4096x512"], 4096, "float32"
    sweep = [f"{2**k}x768" for k in range(9, 16)]
    return [*sweep, "4096x2048", "8192x4096"], 65_536, "bfloat16"


def shapes(
    sizes: Sequence[str], tokens: int, dtypes: Sequence[str], chunks: Sequence[int | None]
) -> list[Shape]:
    """All combinations, each once, in the order of the lengths.

    Args:
        sizes: ``LxD`` (as many rows as make up `tokens`, at least one) or ``BxLxD``.
        tokens: of a batch.
        dtypes: names among `DTYPES`.
        chunks: chunk sizes; None and those that are not below a length mean whole rows.
    """
    if tokens < 1:
        raise UserError(f"--tokens: expected a positive number, got {tokens}")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise UserError(f"--dtypes: expected any of {', '.join(DTYPES)}, got {dtype!r}")
    every = (
        shape
        for size in sizes
        for dtype in dtypes
        for shape in _chunked(_parse(size, tokens, dtype), chunks)
    )
    return list(dict.fromkeys(every))


def _parse(size: str, tokens: int, dtype: str) -> Shape:
    match = _SHAPE.fullmatch(size)
    numbers = [int(n) for n in match.groups() if n is not None] if match else [0]
    if min(numbers) < 1:
        raise UserError(
            f"--shapes: expected LENGTHxDIM or BATCHxLENGTHxDIM, such as 4096x512, got {size!r}"
        )
    *batch, length, dim = numbers
    return Shape(batch[0] if batch else max(1, tokens // length), length, dim, dtype)


def _chunked(shape: Shape, chunks: Sequence[int | None]) -> Iterator[Shape]:
    for chunk in chunks:
        if chunk is None or chunk >= shape.length:
            yield shape
        elif chunk < 2:
            raise UserError(f"--chunks: expected 0 (whole rows), or 2 or more, got {chunk}")
        elif shape.length % chunk:
            raise UserError(f"--chunks: {chunk} does not divide the length {shape.length}")
        else:
            yield replace(shape, chunk=chunk)


def inputs(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random embeddings ``[B, L, d]`` that require a gradient, and labels ``[B, L]``.

    The labels have the long-tailed frequencies of text (1 / rank), so that few tokens have very
    many positives and many have none.
    """
    size = (shape.batch, shape.length)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(*size, shape.dim, generator=generator, device=device)
    frequency = 1 / torch.arange(1, VOCABULARY + 1)
    labels = torch.multinomial(
        frequency,
        shape.batch * shape.length,
        replacement=True,
        generator=torch.Generator().manual_seed(0),
    )
    return hidden.to(shape.torch_dtype).requires_grad_(), labels.view(size).to(device)


def rows(hidden: Tensor, labels: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """The inputs with each chunk a row of its own, for peers that know no chunks."""
    size = (shape.rows, shape.row)
    return hidden.view(*size, shape.dim), labels.view(size)
