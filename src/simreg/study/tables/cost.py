"""What the loss costs: of a training step, and by itself beside its peers."""

from typing import Any

from simreg.study.tables import markdown
from simreg.study.tables.request import Request

_DEFAULT_VARIANT = "out"


def step(request: Request) -> str:
    """A row for each record of benchmarks/step.py."""
    head = [
        "model",
        "machine",
        "batch",
        "push",
        "layers with the loss",
        "step without (s)",
        "with (s)",
        "ratio [quartiles]",
        "pairs",
    ]
    return markdown.table(head, [_step(source.content) for source in request.sources], left=2)


def _step(record: dict[str, Any]) -> list[str]:
    config = record["config"]
    return [
        config["model"]["preset"],
        markdown.machine(record["machine"]),
        f"{config['train']['batch_rows']} × {config['data']['seq_len']}",
        f"{config['simreg'].get('push', 0):g}",
        str(1 + len(config["simreg"].get("depths", []))),  # the final one, and those within
        f"{record['base_s']:.3f}",
        f"{record['arm_s']:.3f}",
        markdown.step_time(record),
        str(record["n"]),
    ]


def loss(request: Request) -> str:
    """Contenders × shapes of a record of the loss alone: time, over bare products, memory."""
    found = request.source.content
    shapes = list(dict.fromkeys(map(_shape, found["records"])))
    by_name: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    skipped: dict[str, dict[str, None]] = {}
    for record in found["records"]:
        if record["skipped"] is not None:
            skipped.setdefault(record["skipped"], {})[_name(record)] = None
        else:
            by_name.setdefault(_name(record), {})[_shape(record)] = record
    rows = [
        [name, *(_cell(records.get(shape)) for shape in shapes)]
        for name, records in by_name.items()
    ]
    drawn = markdown.table(["forward + backward", *map(_title, shapes)], rows)
    memory = found.get("memory")  # at a long row, of benchmarks/loss.py
    notes = [
        "Milliseconds, over bare matrix products of the textbook count, MiB beyond the inputs "
        f"(gradient included); {markdown.machine(found['machine'])}.",
        *([_long_row(memory)] if memory else []),
        *(f"Not run: {', '.join(names)}: {why}." for why, names in skipped.items()),
    ]
    return markdown.with_notes(drawn, notes)


def _long_row(memory: dict[str, Any]) -> str:
    taken = _mib(memory["peak_extra_bytes"])
    return f"At L = {memory['length']:,}, d = {memory['dim']}, {memory['name']} takes {taken}."


def _shape(record: dict[str, Any]) -> tuple[Any, ...]:
    keys = ("batch", "length", "dim", "dtype", "chunk")
    return tuple(record[key] for key in keys)


def _title(shape: tuple[Any, ...]) -> str:
    batch, length, dim, dtype, chunk = shape
    chunks = f", chunks of {chunk}" if chunk else ""
    return f"{batch} × {length}, d = {dim}, {dtype}{chunks}"


def _name(record: dict[str, Any]) -> str:
    plain = record["variant"] in (None, _DEFAULT_VARIANT)
    return record["name"] if plain else f"{record['name']} ({record['variant']})"


def _cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return markdown.NONE
    ratio, peak = record["over_bare"], record["peak_extra_bytes"]
    return ", ".join(
        [
            f"{1e3 * record['median_s']:.1f} ms",
            markdown.NONE if ratio is None else f"× {ratio:.2f}",
            markdown.NONE if peak is None else _mib(peak),
        ]
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
