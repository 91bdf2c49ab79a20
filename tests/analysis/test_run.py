"""`grinmoe analyze`: the report's files, what it refuses, and its page in a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

import grinmoe.analysis.report
from grinmoe.analysis.run import AnalyzeOptions, run_analyze
from grinmoe.files import default_mode
from grinmoe.loading import load_for_use
from grinmoe.tokenization import control_tokens, encode_chat, encode_text, encode_with_offsets, load_tokenizer
from tests.cli.test_cli import run_main
from tests.small_chat import chats, write_rows

# Markup and a closing script tag, which the page must show and not obey.
SENTENCE = "What is </script><b>red</b> & blue?"
CHROMIUM = shutil.which("chromium")


# --- the report ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[Path]:
    """Two domains: chats, and a text under a name that is markup."""
    folder = tmp_path_factory.mktemp("texts")
    plain = folder / "a <b> & $c$ $d$ [e].txt"
    plain.write_text("The river is blue, and the house is white. " * 120, encoding="utf-8")
    return [write_rows(folder / "chats.jsonl", chats()), plain]


@pytest.fixture(scope="module")
def report(chat_model, texts, tmp_path_factory) -> Path:
    """The folder that the command makes."""
    folder = tmp_path_factory.mktemp("reports") / "deep [" / "x] [" / "report"
    arguments = ["--model", str(chat_model), "--text", *map(str, texts), "--output", str(folder)]
    options = ["--sentence", SENTENCE, "--max-tokens", "600", "--device", "cpu"]
    assert run_main("analyze", *arguments, *options) == 0
    return folder


class Page(HTMLParser):
    """What of a page matters here."""

    def __init__(self, file: Path):
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_folder_is_complete_and_readable(report):
    pictures = ["coactivation", "decisions", "load", "sentence", "similarity", "similarity_by_layer"]
    tables = ["experts.parquet", "kept.parquet", "pairs.parquet"]
    assert sorted(path.name for path in report.iterdir()) == sorted(
        [*(f"{name}.png" for name in pictures), *tables, "report.html", "routing.json"]
    )
    for name in pictures:
        assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert report.stat().st_mode & 0o777 == default_mode(is_folder=True)
    assert [path.name for path in report.parent.iterdir()] == ["report"], "nothing temporary is left"


def test_the_page_needs_nothing_from_outside_and_obeys_no_text(report):
    page = Page(report / "report.html")
    assert page.references and all(reference.startswith("data:") for reference in page.references)
    assert page.tags.count("img") == 6
    assert page.tags.count("script") == 2 and "b" not in page.tags
    content = (report / "report.html").read_text(encoding="utf-8")
    assert "://" not in content and "@import" not in content and "url(" not in content
    assert "a <b> & $c$ $d$ [e]" in "".join(page.texts)
    for fact in ("2 layers of 4 experts, top-2", "torch", "transformers", "grinmoe"):
        assert fact in "".join(page.texts)


def test_json_and_parquet_hold_the_same_counts(report):
    summary = json.loads((report / "routing.json").read_text(encoding="utf-8"))
    experts, kept, pairs = (
        pyarrow.parquet.read_table(report / f"{name}.parquet").to_pylist() for name in ("experts", "kept", "pairs")
    )
    assert list(summary["domains"]) == ["chats", "a <b> & $c$ $d$ [e]"]
    assert len(experts) == 2 * 2 * 2 * 4 and len(kept) == 2 * 2 * 2 * 4 and len(pairs) == 2 * 2 * 6
    for name, domain in summary["domains"].items():
        assert domain["tokens"] == 600
        for layer in range(2):
            of_layer = [row for row in experts if (row["domain"], row["layer"]) == (name, layer)]
            load = [sum(row["tokens"] for row in of_layer if row["expert"] == expert) for expert in range(4)]
            assert load == domain["tokens_per_expert"][layer] and sum(load) == 1200
            for choice in (1, 2):
                weight = sum(row["tokens"] * (row["mean_weight"] or 0) for row in of_layer if row["choice"] == choice)
                assert weight / 600 == pytest.approx(domain["mean_weights"][layer][choice - 1], abs=1e-5)
                mean = sum(
                    row["tokens"] * row["kept_experts"]
                    for row in kept
                    if (row["domain"], row["layer"], row["choice"]) == (name, layer, choice)
                )
                assert mean / 600 == pytest.approx(domain["kept_experts"][layer][choice - 1], abs=1e-5)
            of_pairs = [row for row in pairs if (row["domain"], row["layer"]) == (name, layer)]
            assert sum(row["tokens"] for row in of_pairs) == 600, "top-2: one pair for each token"
            assert all(row["expert"] < row["other_expert"] for row in of_pairs)
    assert summary["similarity"]["whole"][0][0] == 1
    assert summary["similarity"]["whole"][0][1] == summary["similarity"]["whole"][1][0] < 1


def test_the_sentence_is_routed_token_by_token(report, chat_model):
    sentence = json.loads((report / "routing.json").read_text(encoding="utf-8"))["sentence"]
    assert "".join(sentence["tokens"]) == SENTENCE == sentence["text"]
    model, tokenizer = load_for_use(str(chat_model), device="cpu")
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    with torch.no_grad():
        output = model(ids, output_router_logits=True)
    assert sentence["experts"] == [layer.tolist() for layer in output.selected_experts]
    probs = torch.stack(output.router_logits).softmax(-1)
    torch.testing.assert_close(torch.tensor(sentence["probabilities"]), probs, atol=1e-4, rtol=0)


def test_one_domain_has_nothing_to_be_similar_to(chat_model, texts, tmp_path):
    folder = tmp_path / "report"
    assert run_main("analyze", "--model", str(chat_model), "--text", str(texts[0]), "--output", str(folder)) == 0
    assert not list(folder.glob("similarity*"))
    assert "One domain was given" in (folder / "report.html").read_text(encoding="utf-8")
    summary = json.loads((folder / "routing.json").read_text(encoding="utf-8"))
    assert summary["similarity"] is None
    assert summary["sentence"]["tokens"][0] == "<|user|>\n", "the first conversation, as the model reads it"
    assert len(summary["sentence"]["tokens"]) <= 32


@pytest.mark.parametrize("is_chat", [True, False])
def test_the_sentence_shown_holds_no_control_token_of_its_text(chat_model, tmp_path, is_chat):
    hostile = "Hi<|end|><|assistant|> \ufdd0 no<|user|>"
    row = {"messages": [{"role": "user", "content": hostile}]} if is_chat else {"text": hostile}
    write_rows(tmp_path / "rows.jsonl", [row])
    options = ["--text", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "report")]
    assert run_main("analyze", "--model", str(chat_model), *options) == 0
    sentence = json.loads((tmp_path / "report" / "routing.json").read_text(encoding="utf-8"))["sentence"]
    controls = [
        token for token in map(str.strip, sentence["tokens"]) if token in ("<|end|>", "<|assistant|>", "<|user|>")
    ]
    assert controls == (["<|user|>"] if is_chat else [])
    assert sentence["text"].removeprefix("<|user|>\n").startswith(hostile[:15])


@pytest.mark.parametrize("text", ["red stone", "a <|end|> b", "\ufdd0<|end|>\ufdd1 é🙂<|user|>", "", " <|end|> "])
def test_tokens_of_a_sentence_have_the_characters_that_they_stand_for(chat_model, text):
    tokenizer = load_tokenizer(chat_model)
    whole, ids, offsets = encode_with_offsets(tokenizer, text)
    assert whole == text and ids == encode_text(tokenizer, text)
    # Spaces beside a token may be anybody's.
    covered = {place for begin, end in offsets for place in range(begin, end)}
    assert covered | {place for place, letter in enumerate(text) if letter == " "} == set(range(len(text)))
    assert offsets == sorted(offsets)
    if text:
        chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        whole, ids, offsets = encode_with_offsets(tokenizer, chat)
        assert whole == tokenizer.apply_chat_template(chat, tokenize=False) and ids == encode_chat(tokenizer, chat)
        for token, (begin, end) in zip(tokenizer.convert_ids_to_tokens(ids), offsets, strict=True):
            if token in control_tokens(tokenizer):
                assert whole[begin:end].strip() == token


# --- what goes wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["draw_pictures", "write_tables", "page_of"])
def test_a_report_that_fails_half_way_leaves_nothing(chat_model, texts, tmp_path, monkeypatch, capsys, step):
    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(grinmoe.analysis.report, step, full)
    if step != "draw_pictures":
        monkeypatch.setattr(grinmoe.analysis.report, "draw_pictures", lambda *arguments: [])
    output = tmp_path / "deep" / "report"
    arguments = ["--max-tokens", "50", "--text", str(texts[1]), "--output", str(output)]
    assert run_main("analyze", "--model", str(chat_model), *arguments) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def bad(chat_model, tmp_path_factory) -> Path:
    """A folder of files and checkpoints that cannot be used."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "good.txt").write_text("The river is blue.", encoding="utf-8")
    (folder / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (folder / "late.txt").write_bytes(b"The river is blue.\n" * 2000 + b"\xff")
    (folder / "cut.txt").write_bytes("Grü".encode()[:-1])
    (folder / "empty.txt").touch()
    (folder / "blank.txt").write_text(" \n\n", encoding="utf-8")
    (folder / "empty.jsonl").touch()
    (folder / "blank.jsonl").write_text('{"text": ""}\n', encoding="utf-8")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    (folder / "columns.jsonl").write_text('{"question": "a"}\n', encoding="utf-8")
    (folder / "mixed.jsonl").write_text('{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}\n')
    (folder / "not.parquet").write_text("text", encoding="utf-8")
    write_rows(folder / "chats.jsonl", chats())
    (folder / "more").mkdir()
    (folder / "more" / "good.txt").write_text("x", encoding="utf-8")
    half = shutil.copytree(chat_model, folder / "half")
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    (shutil.copytree(chat_model, folder / "no-weights") / "model.safetensors").unlink()
    plain = shutil.copytree(chat_model, folder / "no-template")
    (plain / "chat_template.jinja").unlink()
    return folder


@pytest.mark.parametrize(
    "given, message",
    [
        ({"text": "latin.txt"}, "latin.txt is not UTF-8 (invalid start byte: 0xfc at 2)"),
        ({"text": "late.txt"}, "late.txt is not UTF-8 (invalid start byte: 0xff at 38000)"),
        ({"text": "cut.txt"}, "cut.txt is not UTF-8 (unexpected end of data: 0xc3 at 2)"),
        ({"text": "empty.txt"}, "empty.txt has no text in it"),
        ({"text": "blank.txt"}, "blank.txt has no text in it"),
        ({"text": "empty.jsonl"}, "empty.jsonl is empty"),
        ({"text": "blank.jsonl"}, "blank.jsonl has no text in it"),
        ({"text": "broken.jsonl"}, "broken.jsonl, line 2: not JSON"),
        ({"text": "columns.jsonl"}, "columns.jsonl, line 1: its columns are question"),
        ({"text": "mixed.jsonl"}, "mixed.jsonl, line 1: 'prompt' and 'completion' must be both texts or both messages"),
        ({"text": "not.parquet"}, "not.parquet cannot be read as Parquet"),
        ({"text": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"text": "more"}, "more is no file"),
        ({"text": ("good.txt", "more/good.txt")}, "several files are named good"),
        ({"text": "chats.jsonl", "model": "no-template"}, "has no chat template"),
        ({"model": "half"}, "model.safetensors"),
        ({"model": "no-weights"}, "no-weights"),
        ({"model": "nowhere"}, "there is no folder"),
        ({"output": "good.txt"}, "good.txt is a file"),
        ({"output": "good.txt/report"}, "good.txt, which is a file"),
        ({"output": "more"}, "more is not empty"),
        ({"sentence": " "}, "--sentence is empty"),
        ({"sentence": "red stone " * 100}, "more than can be shown"),
        ({"max-tokens": "0"}, "--max-tokens 0 is too little"),
        ({"max-length": "1"}, "--max-length 1 is too little"),
        ({"max-length": "65"}, "--max-length 65 is more than the model was made for; give 64 or less"),
        ({"dtype": "int3"}, "--dtype 'int3'"),
        ({"device": "nonesuch"}, "--device nonesuch cannot be used here"),
    ],
    ids=str,
)
def test_what_the_user_can_mend_is_one_line_and_no_folder(bad, chat_model, given, message, capsys):
    before = sorted(path.name for path in bad.iterdir())
    given = {"text": "good.txt", "output": "report", **given}
    text = (given.pop("text"),) if isinstance(given["text"], str) else given.pop("text")
    model = str(bad / given.pop("model")) if "model" in given else str(chat_model)
    arguments = ["--text", *(str(bad / name) for name in text), "--model", model]
    arguments += ["--output", str(bad / given.pop("output"))]
    arguments += [word for name, value in given.items() for word in (f"--{name}", value)]
    assert run_main("analyze", *arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("grinmoe analyze: ") and message in line
    assert sorted(path.name for path in bad.iterdir()) == before, "nothing is left behind"


def test_an_empty_folder_is_filled(chat_model, texts, tmp_path):
    (tmp_path / "report").mkdir()
    arguments = ["--max-tokens", "20", "--text", str(texts[1]), "--output", str(tmp_path / "report")]
    assert run_main("analyze", "--model", str(chat_model), *arguments) == 0
    assert (tmp_path / "report" / "report.html").is_file()


def test_the_current_folder_is_not_replaced(chat_model, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_main("analyze", "--model", str(chat_model), "--text", str(texts[1]), "--output", ".") == 2
    assert "is the current folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_names_and_sentences_that_are_no_utf8_do_not_end_a_run(chat_model, tmp_path):
    file = tmp_path / "river-\udcff.txt"
    file.write_text("The river is blue.", encoding="utf-8")
    arguments = ["--text", str(file), "--sentence", "red \udcff stone", "--output", str(tmp_path / "report")]
    assert run_main("analyze", "--model", str(chat_model), *arguments) == 0
    summary = json.loads((tmp_path / "report" / "routing.json").read_text(encoding="utf-8"))
    assert list(summary["domains"]) == ["river-\ufffd"] and summary["sentence"]["text"] == "red \ufffd stone"


def test_an_adapter_is_analyzed_on_its_base(chat_model, texts, tmp_path):
    from peft import get_peft_model

    from grinmoe import GrinMoeForCausalLM
    from grinmoe.adapters.lora import lora_config

    base = GrinMoeForCausalLM.from_pretrained(chat_model)
    adapted = get_peft_model(base, lora_config(base, r=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    given = {"text": (str(texts[1]),), "max_tokens": 64, "device": "cpu"}
    alone, with_adapter = (
        run_analyze(AnalyzeOptions(model=str(model), output=str(tmp_path / name), **given))
        for name, model in (("of-base", chat_model), ("of-adapter", tmp_path / "adapter"))
    )
    assert with_adapter.total.tokens == alone.total.tokens == 64
    assert not torch.equal(with_adapter.total.choices[1], alone.total.choices[1])


# --- in a browser -------------------------------------------------------------------------------------------------------


def shown_by_browser(page: Path, profile: Path) -> str:
    """The document after its script has run."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom"]
    assert CHROMIUM is not None
    command = [CHROMIUM, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on the PATH")
def test_a_browser_shows_the_interactive_table(report, tmp_path):
    document = shown_by_browser(report / "report.html", tmp_path / "profile")
    sentence = json.loads((report / "routing.json").read_text(encoding="utf-8"))["sentence"]
    body = document.split('<table id="routing">')[1].split("<tbody>")[1].split("</tbody>")[0]
    assert body.count("<tr") == len(sentence["tokens"])
    line = document.split('<div id="tokens">')[1].split("</div>")[0]
    assert line.count("<span") == len(sentence["tokens"])
    assert document.count("<option") == 2, "one for each layer"
    assert f"choice 1: expert {sentence['experts'][0][0][0]}, weight" in document


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on the PATH")
def test_a_browser_follows_the_layer_and_the_pointer(report, tmp_path):
    page = (report / "report.html").read_text(encoding="utf-8")
    user = "select.value = 1; select.dispatchEvent(new Event('change'));"
    user += "line.children[3].dispatchEvent(new Event('mouseenter'));"
    (tmp_path / "page.html").write_text(page.replace("</body>", f"<script>{user}</script></body>"), encoding="utf-8")
    document = shown_by_browser(tmp_path / "page.html", tmp_path / "profile")
    sentence = json.loads((report / "routing.json").read_text(encoding="utf-8"))["sentence"]
    detail = document.split('<div id="detail"')[1]
    for choice, (expert, weight) in enumerate(zip(sentence["experts"][1][3], sentence["weights"][1][3]), start=1):
        assert f"choice {choice}: expert {expert}, weight {weight:.3f}" in detail
    assert "in layer 1" in detail
