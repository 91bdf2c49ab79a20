"""Files that are no data, or would take all time and memory: refused by name, or read right."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grinmoe.data import DataOptions, load_data, read_rows, sources
from grinmoe.tokenization import build_tokenizer
from tests.small_chat import words

CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(words(), 384)


@pytest.fixture
def load(tmp_path, tokenizer):
    def load(content: bytes | str, task: str = "sft", name: str = "rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_data(task, DataOptions(str(path)), tokenizer, len(tokenizer))

    return load


def rows_of(path) -> list:
    return list(read_rows(str(path), "train"))


def test_fifo_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    for path in (tmp_path / "rows.jsonl", tmp_path):
        with pytest.raises(ValueError, match="is a FIFO, not a file"):
            rows_of(path)


def test_fifo_that_takes_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "rows.jsonl")
    monkeypatch.setattr(sources, "_check_readable", lambda *_, **__: None)
    with pytest.raises(ValueError, match="is not a file"):
        rows_of(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_device_is_refused(tmp_path, device):
    (tmp_path / "rows.jsonl").symlink_to(device)
    for path in (device, tmp_path / "rows.jsonl", tmp_path):
        with pytest.raises(ValueError, match="is a device, not a file"):
            rows_of(path)


def test_socket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("rows.jsonl")
        with pytest.raises(ValueError, match="is a socket, not a file"):
            rows_of(tmp_path / "rows.jsonl")


def test_link_that_leads_nowhere_or_to_itself_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(ValueError, match="is a link that leads nowhere"):
        rows_of(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "rows.jsonl").symlink_to("rows.jsonl")
    for path in (tmp_path / "rows.jsonl", tmp_path):
        with pytest.raises(ValueError, match="is a link that leads nowhere|does not exist"):
            rows_of(path)


def test_folder_linked_into_itself_is_read_once(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(rows_of(tmp_path)) == 1


def test_file_that_vanishes_is_named(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    rows = read_rows(str(tmp_path), "train")
    next(rows)
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(ValueError, match=r"b\.jsonl cannot be read: No such file"):
        list(rows)


def test_file_that_grows_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')
    rows = read_rows(str(path), "train")
    next(rows)
    path.write_text('{"text": "a"}\n' * 2)
    with pytest.raises(ValueError, match=r"rows\.jsonl was changed while it was read"):
        list(rows)


def test_row_and_array_beyond_the_limit_are_refused_with_file_and_line(load, monkeypatch):
    monkeypatch.setattr(sources, "LARGEST_ROW", 100)
    monkeypatch.setattr(sources, "LARGEST_ARRAY", 200)
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: it is longer than 100 bytes"):
        load('{"text": "a"}\n{"text": "' + "a" * 100 + '"}\n')
    with pytest.raises(ValueError, match=r"rows\.json is one array of more than 200 bytes"):
        load('[{"text": "' + "a" * 200 + '"}]', name="rows.json")


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "a", "x": ' + "[" * 100 + "]" * 100 + "}", "more than 64 levels"),
        ('{"text": "a", "x": ' + '{"a":' * 100 + "1" + "}" * 101, "more than 64 levels"),
        ('{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "more than 64 levels"),
        ('{"text": "a", "x": ' + "[" * 100_000, "more than 64 levels|not JSON"),
        ('{"text": "a", "x": ' + "1" * 5000 + "}", "4300 digits"),
        ('{"text": "a", "text": "b"}', "the key 'text' twice"),
        ('{"messages": [{"role": "user", "role": "system", "content": "a"}]}', "the key 'role' twice"),
        ("\x00" * 10, "not JSON"),
        ('{"text": "a\x00"}', "not JSON"),
        ("\ufeff" + CHAT, "not JSON"),
        ("[1]", "an object with named columns, not"),
        ("null", "an object with named columns, not"),
        ("NaN", "an object with named columns, not"),
        ('"text"', "an object with named columns, not"),
        ("1" * 400, "an object with named columns, not"),
    ],
)
def test_line_is_refused_with_file_and_line(load, line, message):
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: .*({message})"):
        load(CHAT + "\n" + line + "\n")


@pytest.mark.parametrize(
    "value", ["1", "1.5", "true", "[]", '["a"]', "[[]]", '{"a": 1}', "NaN", "-Infinity", "1" * 400, '[{"role": 1}]']
)
@pytest.mark.parametrize(
    "task, row",
    [
        ("sft", '{"messages": VALUE}'),
        ("sft", '{"messages": [VALUE]}'),
        ("sft", '{"messages": [{"role": VALUE, "content": "a"}]}'),
        ("sft", '{"messages": [{"role": "assistant", "content": VALUE}]}'),
        ("sft", '{"messages": [{"role": "assistant", "content": [{"type": "text", "text": VALUE}]}]}'),
        ("sft", '{"messages": [{"role": "assistant", "content": [{"type": VALUE, "text": "a"}]}]}'),
        ("sft", '{"messages": [{"role": "assistant", "content": "a", "weight": VALUE}]}'),
        ("sft", '{"prompt": VALUE, "completion": "a"}'),
        ("sft", '{"prompt": "a", "completion": VALUE}'),
        ("sft", '{"text": VALUE}'),
        ("dpo", '{"prompt": VALUE, "chosen": "a", "rejected": "b"}'),
        ("dpo", '{"prompt": "a", "chosen": VALUE, "rejected": "b"}'),
        ("dpo", '{"chosen": VALUE, "rejected": VALUE}'),
    ],
)
def test_field_of_another_type_is_refused_with_file_and_line(load, task, row, value):
    if "weight" in row and value in ("1", "true", "[]"):
        pytest.skip("says what happens anyway, or nothing")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: |nothing is left for training of"):
        load(row.replace("VALUE", value) + "\n", task)


NAMES = st.sampled_from(
    "messages prompt completion text chosen rejected role content weight type tools label x".split()
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    row=st.dictionaries(NAMES, JSON_VALUES, max_size=4) | JSON_VALUES, task=st.sampled_from(["sft", "dpo", "pretrain"])
)
def test_any_json_is_read_or_refused_with_file_and_line(load, row, task):
    try:
        load(json.dumps(row) + "\n", task)
    except ValueError as error:
        message = str(error)
    else:
        return
    assert any(
        place in message for place in ("rows.jsonl, line 1: ", "rows.jsonl, row ", "nothing is left", "has no rows")
    )


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "[" * 100_000 + "]" * 100_000, '[{"text": ' + "[" * 999 + "]" * 999 + "}]"]
)
def test_deep_array_is_refused(load, content):
    with pytest.raises(ValueError, match=r"rows\.json, line 1: .*(more than 64 levels|not JSON)"):
        load(content, name="rows.json")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_other_encodings_are_refused(load, encoding):
    with pytest.raises(ValueError, match=r"rows\.jsonl.*(not UTF-8|not JSON)"):
        load('{"text": "é"}\n'.encode(encoding))


def test_byte_order_mark_carriage_returns_and_escaped_nul_are_read(load):
    data = load(b"\xef\xbb\xbf" + b'{"text": "a"}\r\n\r\n{"text": "b\\u0000c"}\r\n')
    assert data.report.train.samples == 2


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.zst"])
def test_compressed_file_is_refused(load, name):
    with pytest.raises(ValueError, match="compressed files are not read"):
        load(b"\x1f\x8b", name=name)


def test_gzip_under_another_name_is_refused(load):
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: not UTF-8"):
        load(b"\x1f\x8b\x08" + b"\x00" * 20)


def test_a_million_empty_messages_are_refused_with_file_and_line(load):
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: 'messages' has 1000000 messages"):
        load('{"messages": [' + ",".join(['{"role":"user","content":""}'] * 10**6) + "]}\n")


def test_many_blank_lines_are_read_over(load):
    assert load("\n" * 10**6 + CHAT).report.train.samples == 1


def test_parquet_that_is_cut_or_holds_invalid_text_is_refused(tmp_path, load):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    bad = pyarrow.StringArray.from_buffers(
        1, pyarrow.array([0, 1], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xff")
    )
    parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"bad\.parquet cannot be read as Parquet behind row 0"):
        rows_of(tmp_path / "bad.parquet")
    parquet.write_table(pyarrow.table({"text": ["a" * 100] * 1000}), tmp_path / "whole.parquet")
    data = (tmp_path / "whole.parquet").read_bytes()
    for size in (1, 4, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match=r"cut\.parquet cannot be read as Parquet"):
            load(data[:size], name="cut.parquet")


@pytest.mark.integration
def test_parquet_whose_cells_repeat_one_large_text_is_read_in_bounded_memory(tmp_path):
    """A file of 2 KB: by its dictionary, 256 cells of 20 MB each; in a list, one row of 40 GB."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    options = {"compression": "zstd", "store_schema": False, "dictionary_pagesize_limit": 2**30}

    def repeated(times: int):
        return pyarrow.DictionaryArray.from_arrays(
            pyarrow.array([0] * times, "int32"), pyarrow.array(["a" * 20_000_000])
        )

    parquet.write_table(pyarrow.table({"text": repeated(256)}), tmp_path / "flat.parquet", **options)
    turns = pyarrow.StructArray.from_arrays([pyarrow.array(["user"] * 2000), repeated(2000)], ["role", "content"])
    lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, 2000], "int32"), turns)
    parquet.write_table(pyarrow.table({"messages": lists}), tmp_path / "nested.parquet", **options)
    code = (
        "import resource, sys; from itertools import islice; from grinmoe.data import read_rows\n"
        "list(islice(read_rows('flat.parquet', 'train'), 3))\n"
        "try:\n    list(read_rows('nested.parquet', 'train'))\n"
        "except ValueError as error:\n    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30)),
    )
    assert done.returncode == 0, done.stderr[-500:]
    said, megabytes = done.stdout.splitlines()
    assert "nested.parquet, row 1: it is longer than 268,435,456 bytes" in said
    assert int(megabytes) < 4000


def test_parquet_with_repeated_texts_in_lists_is_read_as_it_was_written(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    chat = [
        {"role": "user", "content": "Hi " * 9000},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "é"},
    ]
    rows = [{"messages": chat[: 1 + number % 3], "id": f"{number}"} for number in range(600)] + [
        {"messages": None, "id": "x"}
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [row for _, row in rows_of(tmp_path / "rows.parquet")] == rows
