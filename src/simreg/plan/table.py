"""How plans look: units, names of settings, and the table of docs/plan.md."""

from collections.abc import Iterator

from simreg.plan.advice import options, within
from simreg.plan.costs import Job, Setting, Shares
from simreg.plan.models import find

CLUSTERS = (  # GPUs, the model trained on them, tensor parallelism
    (1, "llama-130m", 1),
    (8, "llama-1b", 1),
    (64, "llama-8b", 1),
    (512, "llama-70b", 8),
    (4096, "llama-405b", 8),
)
CONTEXTS = (2_048, 8_192, 32_768, 131_072, 1_048_576)
TOKENS = 8192
"""Of a row on a rank, where there are ranks enough: the rest goes to context parallelism."""


def grid(*, bound: float, tflops: float, link: float) -> Iterator[str]:
    """The table, in Markdown: whole rows, and the setting of "out" that keeps to the bound.

    Of the final layer and two within, as `simreg train` has it.
    """
    yield (
        "| GPUs | model | context | tp | cp | FLOPs | memory | received | time "
        f"| within {percent(bound)} of time |"
    )
    yield "|---:|---|---:|---:|---:|---:|---:|---:|---:|---|"
    for gpus, model, tp in CLUSTERS:
        for length in CONTEXTS:
            cp = max(1, min(length // TOKENS, gpus // tp))
            rows = max(1, TOKENS // length)
            job = Job(find(model), length=length, rows=rows, gpus=gpus, tp=tp, cp=cp, within=2)
            every = options(job, "out", tflops=tflops, link=link)
            whole, best = every[0], within(every, bound)
            advised = "nothing" if best is None else name(job, best.setting, variant=False)
            if best is not None and best is not whole:
                advised += f": {percent(best.shares.time)}"
            parts = " | ".join(percent(share) for share in whole.shares)
            yield f"| {gpus:,} | {model} | {count(length)} | {tp} | {cp} | {parts} | {advised} |"


def name(job: Job, setting: Setting, *, variant: bool = True) -> str:
    """Of a setting: `out, chunks of 1,024, shared by TP`."""
    parts = [setting.variant] if variant else []
    scope = "whole documents" if job.document else "whole rows"
    chunked = setting.chunk is not None and setting.chunk < job.context
    parts.append(f"chunks of {setting.chunk:,}" if chunked else scope)
    if job.tp > 1:
        parts.append("shared by TP" if setting.split else "repeated by TP")
    return ", ".join(parts)


def columns() -> str:
    """The head of lines that end with `cells`."""
    fields = ("FLOPs", "memory", "received", "time")
    return f"  {'setting':<44}" + "".join(f"{field:>10}" for field in fields)


def cells(shares: Shares) -> str:
    """The shares, each ten characters wide."""
    return "".join(f"{percent(share):>10}" for share in shares)


def percent(share: float) -> str:
    """`0.52 %`: two significant digits, and all before the point."""
    value = 100 * share
    if value >= 9.95 or value == 0:
        return f"{value:,.0f} %"
    if value < 0.0095:
        return "< 0.01 %"
    return f"{value:.1f} %" if value >= 0.995 else f"{value:.2f} %"


def count(tokens: int) -> str:
    """`8k`, `1M`: of tokens in powers of two."""
    return f"{tokens // 2**20}M" if tokens % 2**20 == 0 else f"{tokens // 2**10}k"


def si(number: float) -> str:
    """`8.03 G`: three significant digits and a decimal prefix."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 999.5:
            return f"{number:.3g} {prefix}".rstrip()
        number /= 1000
    return f"{number:.3g} E" if number < 999.5 else f"{number:,.0f} E"


def size(number: float) -> str:
    """`1.5 GiB`, of bytes."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} PiB" if number < 999.5 else f"{number:,.0f} PiB"
