"""The reader of JSON that others have written: what it takes, and what it refuses by name."""

import json
import os
import threading

import pytest

from grinmoe.configuration_grinmoe import MAX_JSON_BYTES, read_json_object


class OurError(Exception):
    pass


BROKEN = {
    "an empty file": (b"", "it is not JSON"),
    "half a file": (b'{"a": 1', "it is not JSON"),
    "a list": (b"[]", "it holds a list, not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "a number": (b"3", "not a JSON object"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "BOM"),
    "another encoding": ('{"a": "ä"}'.encode("latin-1"), "it is not UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "it is not UTF-8"),
    "a zero byte": (b'{"a": 1}\0', "it is not JSON"),
    "NaN": (b'{"a": [NaN]}', "it holds NaN"),
    "Infinity": (b'{"a": -Infinity}', "it holds -Infinity"),
    "a number beyond floats": (b'{"a": 1e400}', "it holds the number 1e400"),
    "400 digits": (
        b'{"a": ' + b"7" * 400 + b"}",
        "it holds the integer 777777777777777777777777, which has more than 64",
    ),
    "5,000 digits": (b'{"a": ' + b"7" * 5000 + b"}", "more than 64 bits"),
    "10**30": (b'{"a": -' + str(10**30).encode() + b"}", "more than 64 bits"),
    "2**64": (b'{"a": 18446744073709551616}', "more than 64 bits"),
    "one key twice": (b'{"a": {"b": 1, "b": 1}}', "it names b twice"),
    "half a surrogate pair": (rb'{"a": ["\ud800"]}', "half of a surrogate pair"),
    "half a surrogate pair as a key": (rb'{"\udc00": 1}', "half of a surrogate pair"),
    "65 levels": (b'{"a":' * 65 + b"1" + b"}" * 65, "more than 64 levels"),
    "500 levels": (b'{"a":' + b"[" * 500 + b"]" * 500 + b"}", "more than 64 levels"),
    "100,000 levels": (b"[" * 100_000, "more than 64 levels"),
    "too much": (b'{"a": "' + b"x" * MAX_JSON_BYTES + b'"}', "it is larger than 16,777,216 bytes"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_read_json_object_broken_content_raises_the_error_class(tmp_path, fault):
    content, reason = BROKEN[fault]
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(OurError, match=f"x.json cannot be read: .*{reason}.*; do this") as raised:
        read_json_object(file, OurError, "do this")
    str(raised.value).encode()  # the message can be printed
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("kind", ["missing", "a folder", "a FIFO", "a device", "a link to nowhere", "a link to itself"])
def test_read_json_object_of_no_regular_file_raises_the_error_class(tmp_path, kind):
    file = tmp_path / "x.json"
    {
        "missing": lambda: None,
        "a folder": file.mkdir,
        "a FIFO": lambda: os.mkfifo(file),
        "a device": lambda: file.symlink_to("/dev/zero"),
        "a link to nowhere": lambda: file.symlink_to(tmp_path / "nowhere"),
        "a link to itself": lambda: file.symlink_to(file),
    }[kind]()
    raised = []

    def read():
        try:
            read_json_object(file, OurError, "do this")
        except OurError as error:
            raised.append(str(error))

    reader = threading.Thread(target=read, daemon=True)  # a FIFO would block for ever
    reader.start()
    reader.join(timeout=30)
    assert raised and raised[0].startswith(f"{file} cannot be read: ") and raised[0].endswith("; do this")


def test_read_json_object_whole_file_returns_its_content(tmp_path):
    content = {"a": [1, -(2**63), 2**64 - 1, 1.5, True, None], "ü": {"😀": "😀"}}
    file, link = tmp_path / "x.json", tmp_path / "link.json"
    link.symlink_to(file)  # as the Hub's cache has them
    for ascii_only in (True, False):
        file.write_text(json.dumps(content, ensure_ascii=ascii_only), encoding="utf-8")
        assert read_json_object(link) == content
    file.write_bytes(b'{"a":' * 64 + b"1" + b"}" * 64)
    read_json_object(file)


def test_read_json_object_allow_nan_returns_numbers(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"a": float("nan"), "b": float("-inf")}))
    content = read_json_object(tmp_path / "x.json", allow_nan=True)
    assert content["a"] != content["a"] and content["b"] == float("-inf")
