import gzip
import json
import lzma
import sysconfig
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from simreg.recipe import sources
from simreg.recipe.errors import UserError
from simreg.recipe.files import LocalFile
from simreg.recipe.sources import STDLIB, HubDataset, in_pieces, interleave, resolve

# what naive readers break: line separators, carriage returns, a BOM character inside, 4-byte UTF-8
DOCUMENTS = ["plain\ntext", "a\u2028b\u0085c\r\nd\x0b", "é ﬀ 𝒳 \ufeff!", "", "x" * 5000, "last"]
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": partial(lzma.compress, preset=0),
    ".zst": zstandard.ZstdCompressor().compress,
}


def jsonl(texts: list[str], field: str = "text") -> bytes:
    lines = [json.dumps({field: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    return "\n".join(lines).encode()


def parquet(texts: list, field: str = "text", **before: list) -> bytes:
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"other": list(range(len(texts))), **before, field: texts})
    pyarrow.parquet.write_table(table, sink, row_group_size=4)
    return sink.getvalue().to_pybytes()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def error_of(path: Path, field: str = "text") -> str:
    with pytest.raises(UserError) as caught:
        list(LocalFile(path, field).read())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize(("suffix", "encode"), [(".jsonl", jsonl), (".parquet", parquet)])
def test_records_come_back_unchanged(tmp_path, suffix, encode, compression):
    path = write(tmp_path / f"a{suffix}{compression}", PACK[compression](encode(DOCUMENTS, "body")))
    assert list(LocalFile(path, "body").read()) == DOCUMENTS


@pytest.mark.parametrize("compression", PACK)
def test_text_comes_back_unchanged(tmp_path, compression):
    text = "".join(DOCUMENTS)
    path = write(tmp_path / f"a.txt{compression}", PACK[compression](text.encode()))
    assert list(LocalFile(path).read()) == [text]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_long_text_is_cut_at_blank_lines(tmp_path, end):
    paragraphs = [f"paragraph {i} é{end}" * 200 + end for i in range(200)]
    path = write(tmp_path / "a.txt", "".join(paragraphs).encode())
    pieces = list(LocalFile(path).read())
    assert "".join(pieces) == "".join(paragraphs)
    assert all(piece.endswith(2 * end) and 65536 <= len(piece) < 131072 for piece in pieces[:-1])
    assert len(pieces) > 4
    assert list(LocalFile(path, whole=True).read()) == ["".join(paragraphs)]


@pytest.mark.parametrize("filler", ["line\n", "no break "])
def test_text_without_blank_lines_is_cut_all_the_same(tmp_path, filler):
    text = filler * 60_000
    pieces = list(LocalFile(write(tmp_path / "a.txt", text.encode())).read())
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 131072
    assert filler == "no break " or all(piece.endswith("\n") for piece in pieces)


@pytest.mark.parametrize("compression", ["", ".xz"])
def test_a_text_file_that_is_alone_is_many_documents(tmp_path, compression):
    text = "".join(f"paragraph {i} é " * 20 + "\n\n" for i in range(2000))
    path = write(tmp_path / f"a.txt{compression}", PACK[compression](text.encode()))
    (alone,) = in_pieces(resolve(str(path), "text"))
    pieces = list(alone.read())
    assert "".join(pieces) == text
    assert 150 < len(pieces) <= 257
    assert alone.key == LocalFile(path).key
    assert len(list(resolve(str(path), "text")[0].read())) < 20
    short = write(tmp_path / "b.txt", b"a few words\n" * 300)
    assert len(list(in_pieces(resolve(str(short), "text"))[0].read())) == 3


def test_a_few_text_files_are_many_documents_altogether(tmp_path, monkeypatch):
    texts = ["".join(f"note {n} {i} \n\n" for i in range(400 * n)) for n in range(1, 7)]
    for n, text in enumerate(texts):
        write(tmp_path / f"{n}.{'md' if n % 2 else 'txt'}", text.encode())
    everything = f"{tmp_path}/*"
    found = in_pieces(resolve(everything, "text"))
    pieces = [list(source.read()) for source in found]
    assert sorted("".join(own) for own in pieces) == sorted(texts)
    total = sum(map(len, texts))
    assert total / 2049 < sum(map(len, pieces)) < total / 1024 + 6  # of a Ki characters at least
    assert sorted(interleave(resolve(everything, "text"))) == sorted(texts)
    write(tmp_path / "more.jsonl", b'{"text": "x"}\n')
    assert sorted(interleave(in_pieces(resolve(everything, "text")))) == sorted([*texts, "x"])
    long = "".join(f"{i} word\n\n" for i in range(60_000))
    for n in range(3):
        write(tmp_path / f"long{n}.txt", long.encode())
    parts = sum(len(list(s.read())) for s in in_pieces(resolve(f"{tmp_path}/long*", "text")))
    assert 128 < parts <= 256 + 3
    monkeypatch.setattr(sources, "_PIECES", 1)  # as of large files
    for source in in_pieces(resolve(f"{tmp_path}/long*", "text")):
        assert list(source.read()) == list(LocalFile(source.path).read())


def test_byte_order_mark_and_blank_lines_are_skipped(tmp_path):
    bom = b"\xef\xbb\xbf"
    assert list(LocalFile(write(tmp_path / "a.txt", bom + b"hi")).read()) == ["hi"]
    path = write(tmp_path / "a.jsonl", bom + b'{"text": "a"}\n\n  \n{"text": "b"}\n')
    assert list(LocalFile(path).read()) == ["a", "b"]


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_members_are_joined_and_padding_skipped(tmp_path, compression):
    pack = PACK[compression]
    padding = b"" if compression == ".zst" else bytes(8)
    data = pack(jsonl(["a"]) + b"\n") + padding + pack(jsonl(["b" * 100_000])) + padding
    path = write(tmp_path / f"a.jsonl{compression}", data)
    assert list(LocalFile(path).read()) == ["a", "b" * 100_000]


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_file_is_an_error(tmp_path, compression, keep):
    noise = "".join(chr(97 + (i * i * 7919 >> 5) % 26) for i in range(60_000))
    data = PACK[compression](jsonl([noise] * 3))
    path = write(tmp_path / f"a.jsonl{compression}", data[: int(len(data) * keep)])
    assert str(path) in error_of(path)


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_damaged_file_is_an_error(tmp_path, compression):
    data = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(jsonl(["abc"] * 500)))
    if compression != ".zst":
        data = bytearray(PACK[compression](jsonl(["abc"] * 500)))
    data[-3] ^= 0xFF  # in the checksum or footer
    assert "damaged" in error_of(write(tmp_path / f"a.jsonl{compression}", bytes(data)))
    assert "damaged" in error_of(
        write(tmp_path / f"b.jsonl{compression}", b"not compressed at all")
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": 3}', "must be a string, not int"),
        (b'{"text": null}', "must be a string, not NoneType"),
        (b'{"title": "t", "body": "b"}', "no field 'text' (found: 'title', 'body')"),
        (b'["text"]', "expected an object"),
        (b'{"text": "a"', "not a JSON object"),
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
        (rb'{"text": "ab\ud800"}', "character 2"),
    ],
)
def test_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", jsonl(["fine"]) + b"\n\n" + line + b"\n")
    assert error_of(path).startswith(f"{path}:3: ")
    assert message in error_of(path)


@pytest.mark.parametrize("at", [0, 5, 16_383, 16_384, 40_000])
def test_invalid_utf8_in_text_names_the_byte(tmp_path, at):
    path = write(tmp_path / "a.txt", b"a" * at + b"\xc3(" + b"b" * 50)
    assert f"invalid UTF-8 at byte {at};" in error_of(path)
    path.write_bytes(b"a" * at + b"\xc3")  # ends within a character
    assert f"invalid UTF-8 at byte {at};" in error_of(path)


def test_bad_parquet_is_named(tmp_path):
    assert "no field 'text' (found: 'other', 'body')" in error_of(
        write(tmp_path / "a.parquet", parquet(["x"], "body"))
    )
    assert "row 2: the field 'text' must be a string, not NoneType" in error_of(
        write(tmp_path / "b.parquet", parquet(["x", None]))
    )
    assert "must be a string, not int" in error_of(write(tmp_path / "c.parquet", parquet([1])))
    whole = parquet(["some text"] * 100)
    assert "not a whole parquet file" in error_of(write(tmp_path / "d.parquet", whole[:-20]))
    assert str(tmp_path) in error_of(write(tmp_path / "e.parquet", b""))


def test_what_names_no_file_is_an_error(tmp_path):
    write(tmp_path / "notes.doc", b"x")
    for spec, message in {
        f"{tmp_path}/*.jsonl": "no file matches",
        f"{tmp_path}/absent.txt": "absent.txt': check data.source (simreg compare --data, simreg",
        "owner/name": "hf:owner/name",
        str(tmp_path): "is a folder",
        f"{tmp_path}/notes.*": "cannot tell the format",
        "hf:": "names no dataset",
    }.items():
        with pytest.raises(UserError) as caught:
            resolve(spec, "text")
        assert message in str(caught.value)
    for spec in ("nope/*.txt", "nope/a.txt"):
        with pytest.raises(UserError, match=r"check data\.source \(.*\)$"):
            resolve(spec, "text")
    for name in ("a.txt", "b.jsonl.xz", "c.jsonl.xz"):
        write(tmp_path / name, b"")
    with pytest.raises(UserError, match=r"for example '.*/\*\.jsonl\.xz'"):
        resolve(str(tmp_path), "text")
    with pytest.raises(UserError, match=r"data\.source names nothing"):
        resolve([], "text")
    with pytest.raises(UserError, match=r"there is no file 'absent': check --text$"):
        resolve("absent", "text", setting="--text")


def test_a_link_to_itself_is_named(tmp_path):
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    with pytest.raises(UserError, match=r"loop.txt"):
        resolve(str(tmp_path / "loop.txt"), "text")
    with pytest.raises(UserError, match=r"cannot read .*loop.txt"):
        resolve(str(tmp_path / "*.txt"), "text")


def test_sources_depend_on_content_not_on_names_or_order(tmp_path):
    (tmp_path / "deep").mkdir()
    a = write(tmp_path / "a.jsonl", jsonl(["a"]))
    b = write(tmp_path / "deep" / "b.jsonl", jsonl(["b"]))
    first = resolve([str(a), str(b)], "text")
    # overlapping patterns give a file once
    again = resolve([f"{tmp_path}/**/*.jsonl", str(b)], "text")
    assert [s.key for s in first] == [s.key for s in again]
    c, d = a.rename(tmp_path / "c.jsonl"), b.rename(tmp_path / "0.jsonl")
    assert [s.key for s in resolve([str(d), str(c)], "text")] == [s.key for s in first]
    c.write_bytes(jsonl(["A"]))
    assert [s.key for s in resolve([str(d), str(c)], "text")] != [s.key for s in first]


@pytest.mark.parametrize(("files", "tolerance"), [(3, 0.03), (150, 0.05)])
def test_every_prefix_is_a_fair_mixture(tmp_path, files, tolerance):
    """Text of three kinds, 1 : 2 : 7, compressed differently; more files than are open at once."""
    kinds = {"a": (1, ".jsonl.xz"), "b": (2, ".jsonl"), "c": (7, ".jsonl.gz")}
    for kind, (share, suffix) in kinds.items():
        for part in range(files // 3):
            texts = [f"{kind}{part}.{i} " * 20 for i in range(share * 1500 // files)]
            data = PACK[suffix.removeprefix(".jsonl")](jsonl(texts))
            write(tmp_path / f"{kind}{part}{suffix}", data)
    texts = list(interleave(resolve(f"{tmp_path}/*", "text")))
    total = {kind: sum(text[0] == kind for text in texts) for kind in kinds}
    assert sum(total.values()) == sum(s * 1500 // files * (files // 3) for s, _ in kinds.values())
    for part in (0.25, 0.5, 0.75):
        prefix = texts[: int(len(texts) * part)]
        for kind in kinds:
            share = sum(text[0] == kind for text in prefix) / total[kind]
            assert share == pytest.approx(part, abs=tolerance), (kind, part)


def test_a_mixture_is_of_text_whatever_else_the_records_hold(tmp_path):
    texts = [f"{i * i} is more than {i} " * 20 for i in range(1200)]
    write(tmp_path / "plain.jsonl", jsonl(texts))
    rich = [json.dumps({"text": f"R{text}", "meta": "m" * 1000}) for text in texts]
    write(tmp_path / "rich.jsonl.gz", PACK[".gz"]("\n".join(rich).encode()))
    escaped = [json.dumps({"text": "\u0434" * (len(text) // 2)}) for text in texts]
    write(tmp_path / "escaped.jsonl", "\n".join(escaped).encode())
    found = [text[0] for text in interleave(resolve(f"{tmp_path}/*", "text"))]
    half = found[: len(found) // 2]
    for begin in ("R", "\u0434"):
        assert half.count(begin) == pytest.approx(len(texts) / 2, rel=0.08)


def test_files_of_one_dataset_weigh_what_they_hold(tmp_path):
    a = write(tmp_path / "a.jsonl", jsonl(["some text " * 90] * 50))
    b = write(tmp_path / "b.jsonl", jsonl([("text " * 20 + "\n") * 8] * 50))
    assert [LocalFile(path).weight for path in (a, b)] == [p.stat().st_size for p in (a, b)]


def test_weight_of_compressed_files_estimates_their_text(tmp_path):
    texts = [f"{i * i} and {i} " * 50 for i in range(12_000)]
    size = len(jsonl(texts))
    assert size > 2 * (1 << 22)  # longer than what is looked at
    for compression in PACK:
        path = write(tmp_path / f"a.jsonl{compression}", PACK[compression](jsonl(texts)))
        assert LocalFile(path).weight == pytest.approx(size, rel=0.2)


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_weight_counts_all_members_of_a_compressed_file(tmp_path, compression):
    tiny, large = jsonl(["a"]) + b"\n", jsonl([f"{i * i} and {i} " * 50 for i in range(300)])
    data = PACK[compression](tiny) + PACK[compression](large)
    if compression == ".zst":  # as parallel compressors begin their files
        data = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + data
    path = write(tmp_path / f"a.jsonl{compression}", data)
    assert LocalFile(path).weight == len(tiny) + len(large)
    assert len(list(LocalFile(path).read())) == 301


def test_weight_of_parquet_is_that_of_its_text_whatever_stands_before_it(tmp_path):
    texts = [f"{i * i} and {i} " * 50 for i in range(300)]
    meta = [{"a": i, "b": i, "c": i} for i in range(300)]
    flat = LocalFile(write(tmp_path / "flat.parquet", parquet(texts)))
    nested = LocalFile(write(tmp_path / "nested.parquet", parquet(texts, meta=meta)))
    assert nested.weight == flat.weight > sum(map(len, texts))  # pages have headers


def test_standard_library_is_the_running_interpreters():
    root = Path(sysconfig.get_path("stdlib"))
    files = resolve(STDLIB, "text")
    names = [str(source.path.relative_to(root)) for source in files]
    assert {"argparse.py", "json/decoder.py", "typing.py"} <= set(names)
    assert not [
        n for n in names if {"test", "tests", "idlelib", "site-packages"} & set(Path(n).parts)
    ]
    by_name = dict(zip(names, files, strict=True))
    for name in ("argparse.py", "typing.py"):
        assert list(by_name[name].read()) == [(root / name).read_text(encoding="utf-8")]
    assert sum(source.weight for source in files) > 5_000_000


def test_standard_library_without_source_text(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="no source text"):
        resolve(STDLIB, "text")


@pytest.fixture
def hub(monkeypatch):
    """The Hub's answer about revisions; the dataset itself is a local folder."""
    import huggingface_hub

    answer = SimpleNamespace(sha="abc")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name: answer)
    return answer


def test_hub_dataset_is_streamed(tmp_path, hub):
    write(tmp_path / "train.jsonl", jsonl(DOCUMENTS, "body"))
    write(tmp_path / "validation.jsonl", jsonl(["held out"], "body"))
    (train,) = resolve(f"hf:{tmp_path}", "body")
    (held_out,) = resolve(f"hf:{tmp_path}", "body", split="validation")
    assert list(train.read()) == DOCUMENTS
    assert list(held_out.read()) == ["held out"]
    assert train.key != held_out.key
    hub.sha = "def"
    assert resolve(f"hf:{tmp_path}", "body")[0].key != train.key
    with pytest.raises(UserError, match="record 1: no field 'text'"):
        list(resolve(f"hf:{tmp_path}", "text")[0].read())
    with pytest.raises(UserError, match=r"cannot read the test split .*Bad split"):
        list(resolve(f"hf:{tmp_path}", "body", split="test")[0].read())


def test_hub_dataset_spec():
    assert HubDataset.parse("hf:o/n:c", "text", "train") == HubDataset("o/n", "c", "train", "text")


def test_hub_failures_are_explained(monkeypatch):
    import huggingface_hub

    def fail(self, name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(UserError, match=r"dataset owner/name, config en \(.*no route to host"):
        resolve("hf:owner/name:en", "text")


def test_a_split_of_the_hub_is_the_same_at_whatever_commit():
    train, test = (HubDataset.parse("hf:owner/name", "text", split) for split in ("train", "test"))
    again = HubDataset.parse("hf:owner/name", "content", "test")  # no network is asked
    assert sources.shared([test], [train, again]) is test
    assert sources.shared([test], [train]) is None


def test_what_is_still_there_of_several_sources(tmp_path):
    there = tmp_path / "b.txt"
    there.write_text("text")
    found = sources.still_there([str(tmp_path / "gone.txt"), str(there), "hf:owner/name"])
    assert [source.title for source in found] == [str(there), "hf:owner/name:None:train"]


def test_a_file_and_a_link_to_it_count_once(tmp_path):
    file, link = tmp_path / "a.txt", tmp_path / "link.txt"
    file.write_text("text")
    link.symlink_to(file)
    assert len(sources.resolve([str(file), str(link)], "text")) == 1


def test_a_file_that_is_read_in_another_way_is_another_source(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text('{"text": "one"}\n')
    keys = {sources.LocalFile(tmp_path / name).key for name in ("a.txt", "a.jsonl")}
    assert len(keys) == 2
