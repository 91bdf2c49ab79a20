"""`grinmoe analyze`: its statistics against an enumeration, its report's files, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

import grinmoe.analyze
import grinmoe.routing_report
from grinmoe.analyze import AnalyzeOptions, _batches, _count_batch, _routing, run_analyze
from grinmoe.data_formats import SUFFIXES
from grinmoe.domain_text import first_piece, first_sentence, read_pieces, token_rows
from grinmoe.routing_analysis import RoutingAnalysis, RoutingCounts, count_routing, route_sentence, similarity_of
from grinmoe.routing_report import write_report
from grinmoe.tokenization import load_tokenizer
from tests.small_chat import chats, write_rows
from tests.test_cli import run_main

EPS = 0.1
# Markup and a closing script tag, which the page must show and not obey.
SENTENCE = "What is </script><b>red</b> & blue?"
CHROMIUM = shutil.which("chromium")


@pytest.fixture
def routed(tiny_model):
    """Factory: router logits (L, T, E) and experts (L, T, K) of a tiny model for three rows, the last one half padding."""

    def make(top_k: int, **overrides):
        fields = {"num_local_experts": 5, "num_experts_per_tok": top_k, "router_jitter_noise": EPS}
        model = tiny_model(initializer_range=0.3, **fields, **overrides)
        mask = torch.ones(3, 12, dtype=torch.long)
        mask[2, 6:] = 0
        ids = torch.randint(0, 90, (3, 12), generator=torch.Generator().manual_seed(1))
        return *_routing(model, ids, mask), mask.flatten().bool()

    return make


def by_enumeration(logits: list[float], top_k: int) -> list[tuple[int, float, int]]:
    """Expert, weight and number of kept experts of each choice of one token, in plain Python."""
    left, choices = set(range(len(logits))), []
    for _ in range(top_k):
        best = max(left, key=lambda e: logits[e])
        top = logits[best]
        kept = [e for e in left if (top - logits[e]) <= 2 * EPS * max(abs(logits[e]), top)]
        choices.append((best, 1 / sum(math.exp(logits[e] - top) for e in kept), len(kept)))
        left.remove(best)
    return choices


# --- statistics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_counts_are_those_of_an_enumeration_without_padding(routed, top_k):
    logits, experts, valid = routed(top_k)
    counts = count_routing(logits, experts, valid, EPS)
    num_layers, _, num_experts = logits.shape
    assert counts.tokens == valid.sum() == 30
    for layer in range(num_layers):
        choices = torch.zeros(top_k, num_experts)
        weights = torch.zeros(top_k, num_experts)
        kept = torch.zeros(top_k, num_experts)
        pairs = torch.zeros(num_experts, num_experts)
        entropy, near_ties = 0.0, 0
        for row in logits[layer, valid].tolist():
            of_token = by_enumeration(row, top_k)
            for k, (expert, weight, num_kept) in enumerate(of_token):
                choices[k, expert] += 1
                weights[k, expert] += weight
                kept[k, num_kept - 1] += 1
                for other, _, _ in of_token:
                    pairs[expert, other] += 1
            near_ties += of_token[-1][2] > 1
            total = sum(map(math.exp, row))
            entropy -= sum(math.exp(z) / total * math.log(math.exp(z) / total) for z in row)
        assert torch.equal(counts.choices[layer], choices.long())
        assert torch.equal(counts.kept[layer], kept.long())
        assert torch.equal(counts.pairs[layer], pairs.long())
        torch.testing.assert_close(counts.weights[layer].float(), weights, rtol=1e-5, atol=1e-5)
        assert counts.entropy[layer].item() == pytest.approx(entropy, rel=1e-5)
        assert counts.near_tie_share[layer].item() == pytest.approx(near_ties / 30)
    assert (counts.kept[:, 0, 1:].sum() > 0) == (counts.kept_experts[:, 0] > 1).any(), (
        "the mask keeps several somewhere"
    )


def test_the_figures_are_what_their_names_say(routed):
    logits, experts, valid = routed(2)
    counts = count_routing(logits, experts, valid, EPS)
    load = torch.stack([torch.bincount(layer[valid].flatten(), minlength=5) for layer in experts])
    assert torch.equal(counts.tokens_per_expert, load)
    assert torch.equal(counts.pairs.diagonal(dim1=1, dim2=2), load)
    share = load.double() / 60
    torch.testing.assert_close(counts.load_share, share)
    torch.testing.assert_close(counts.max_over_mean_load, load.amax(1) / load.double().mean(1))
    torch.testing.assert_close(counts.load_entropy, torch.distributions.Categorical(probs=share).entropy())
    probs = logits[:, valid].double().softmax(-1)
    torch.testing.assert_close(
        counts.router_entropy, torch.distributions.Categorical(probs=probs).entropy().mean(1), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(counts.balance_loss, 5 * (load / 30 * probs.mean(1)).sum(1), rtol=1e-5, atol=1e-6)
    assert counts.kept_experts.shape == counts.mean_weights.shape == (2, 2)
    assert (counts.kept_experts >= 1).all() and (counts.kept_experts[:, 1] <= 4).all()


@pytest.mark.parametrize(
    "logits, top_k, is_near_tie",
    [
        ([10.0, 9.9, 9.75, 1.0], 2, True),  # third within 2 % of the second
        ([10.0, 9.9, 9.5, 1.0], 2, False),  # only the first two are close, and both are chosen
        ([10.0, 9.9, 9.5, 1.0], 1, True),
        ([10.0, 9.9, 9.5, 9.4], 3, True),
        ([10.0, 9.9, 9.5, 9.4], 4, False),  # no expert is left
        ([0.0, -1.0, -1.01, -5.0], 2, True),  # -1 and -1.01: gap over the larger magnitude
    ],
)
def test_a_near_tie_is_a_rival_of_the_last_choice_within_the_mask(logits, top_k, is_near_tie):
    router_logits = torch.tensor([[logits]])
    experts = router_logits.topk(top_k).indices
    counts = count_routing(router_logits, experts, torch.tensor([True]), jitter_eps=0.01)
    assert counts.near_tie_share.item() == is_near_tie


def test_counts_of_parts_add_up_to_those_of_the_whole(routed):
    logits, experts, valid = routed(2)
    whole = count_routing(logits, experts, valid, EPS)
    first = torch.arange(len(valid)) < 7
    parts = [count_routing(logits, experts, valid & part, EPS) for part in (first, ~first)]
    added = parts[0] + parts[1] + RoutingCounts.of_nothing(2, 5, 2)
    for name in ("tokens", "choices", "kept", "pairs"):
        assert torch.equal(torch.as_tensor(getattr(added, name)), torch.as_tensor(getattr(whole, name)))
    for name in ("weights", "entropy", "probs"):
        torch.testing.assert_close(getattr(added, name), getattr(whole, name), rtol=1e-5, atol=1e-6)


def test_other_rows_and_their_padding_change_nothing(tiny_model):
    model = tiny_model(initializer_range=0.3, router_jitter_noise=EPS)
    rows = [[5, 9, 2, 44, 17, 3, 8], [7, 7], [80, 2, 33]]
    even, odd = _count_batch(model, rows)
    alone = [_count_batch(model, [row])[0] for row in rows]
    for half, expected in ((even, alone[0] + alone[2]), (odd, alone[1])):
        assert half.tokens == expected.tokens
        assert torch.equal(half.choices, expected.choices) and torch.equal(half.kept, expected.kept)


def test_half_precision_logits_and_other_estimators_have_the_models_own_weights(routed):
    logits, experts, valid = routed(2, router_estimator="topk")
    counts = count_routing(logits, experts, valid, EPS, "topk")
    expected = logits.softmax(-1).gather(-1, experts)[:, valid].double().mean(1)
    torch.testing.assert_close(counts.mean_weights, expected, rtol=1e-5, atol=1e-6)
    rounded = logits.bfloat16()
    counts = count_routing(rounded, rounded.topk(2).indices, valid, EPS)
    assert counts.choices.sum() == 2 * 2 * 30 and (counts.mean_weights <= 1).all()


def test_logits_that_are_no_numbers_are_an_error(routed):
    logits, experts, valid = routed(2)
    logits = logits.clone()
    logits[1, 3, 2] = math.nan
    with pytest.raises(ValueError, match="1 of .* tokens have router logits that are NaN"):
        count_routing(logits, experts, valid, EPS)


def with_choices(*experts_of_tokens: tuple[int, ...], num_experts: int = 3) -> RoutingCounts:
    """Counts of one layer whose tokens chose these."""
    experts = torch.tensor([experts_of_tokens])
    logits = torch.zeros(1, len(experts_of_tokens), num_experts)
    for k in range(experts.shape[-1]):
        logits.scatter_(-1, experts[..., k : k + 1], 10.0 - k)
    return count_routing(logits, experts, torch.ones(len(experts_of_tokens), dtype=torch.bool), 0.01)


def test_the_lift_of_a_pair_is_1_where_choices_are_as_the_loads_have_it():
    even = with_choices((0, 1), (1, 2), (2, 0))
    off_diagonal = ~torch.eye(3, dtype=torch.bool)
    torch.testing.assert_close(even.pair_lift[0][off_diagonal], torch.ones(6, dtype=torch.float64))
    assert even.pair_lift[0].diagonal().isnan().all()
    # Loads 3, 2, 1 of 6: products 6, 3, 2 of 11 for three pairs; seen are 2, 1 and 0.
    uneven = with_choices((0, 1), (1, 0), (2, 0))
    expected = torch.tensor([2 / (3 * 6 / 11), 1 / (3 * 3 / 11), 0.0], dtype=torch.float64)
    torch.testing.assert_close(uneven.pair_lift[0][[0, 0, 1], [1, 2, 2]], expected)


def test_top_1_has_no_pairs():
    counts = with_choices((0,), (1,), (1,))
    assert counts.pair_lift.isnan().all()
    assert torch.equal(counts.pairs[0], torch.diag(torch.tensor([1, 2, 0])))


def test_similarity_compares_directions_of_loads_and_of_what_is_preferred():
    nothing = RoutingCounts.of_nothing(1, 3, 1)
    first = with_choices((0,), (0,), (1,), (2,))
    opposite = with_choices((1,), (1,), (2,), (2,), num_experts=3)
    found = similarity_of([(first, first), (first, nothing), (opposite, nothing)])
    torch.testing.assert_close(found.whole[0], torch.tensor([1, 1, 4 / math.sqrt(6 * 8)], dtype=torch.float64))
    torch.testing.assert_close(found.deviation[0], torch.tensor([1, 1, -1], dtype=torch.float64))
    torch.testing.assert_close(found.per_layer[0], found.whole)
    assert found.halves[0].item() == pytest.approx(1)
    assert found.halves[1:].isnan().all(), "a domain of one row has no halves"
    even = with_choices((0,), (1,), (2,))
    assert similarity_of([(even, even), (first, first)]).deviation[0].isnan().all()


def joined(lists) -> list:
    return list(chain.from_iterable(lists))


# --- texts --------------------------------------------------------------------------------------------------------------


def test_a_text_is_read_in_pieces_that_lose_no_letter(tmp_path):
    text = "aé" * 60_000 + "\n" + "Grüße, 世界! " * 4000 + "\n\nthe end"
    file = tmp_path / "long.txt"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    pieces = list(read_pieces(file))
    assert "".join(piece for _, piece in pieces) == text
    assert [begins for begins, _ in pieces] == [True] + [False] * (len(pieces) - 1)
    assert len(pieces) > 2


def test_rows_are_the_beginning_of_a_text_cut_to_length(chat_model, tmp_path):
    tokenizer = load_tokenizer(chat_model)
    file = tmp_path / "text.txt"
    file.write_text("What is a red stone? " * 40, encoding="utf-8")
    ids = tokenizer("What is a red stone? " * 40).input_ids
    rows = list(token_rows(file, tokenizer, max_length=16, max_tokens=100))
    assert [len(row) for row in rows] == [16] * 6 + [4]
    assert joined(rows) == ids[:100]
    assert joined(token_rows(file, tokenizer, 16, 10**6)) == ids


def test_documents_of_a_task_set_do_not_share_a_row(chat_model, tmp_path):
    tokenizer = load_tokenizer(chat_model)
    rows = [{"text": "red house"}, {"text": None}, {"prompt": "What is red?", "completion": " A stone."}, chats()[0]]
    file = write_rows(tmp_path / "tasks.jsonl", rows)
    template = tokenizer.apply_chat_template(chats()[0]["messages"], tokenize=False)
    expected = [tokenizer(text).input_ids for text in ("red house", "What is red? A stone.", template)]
    assert list(token_rows(file, tokenizer, max_length=64, max_tokens=1000)) == expected
    budget = len(expected[0]) + 1
    assert list(token_rows(file, tokenizer, 64, budget)) == [expected[0], expected[1][:1]]


def test_batches_hold_all_rows_in_order_and_no_more_tokens_than_allowed(monkeypatch):
    monkeypatch.setattr(grinmoe.analyze, "_BATCH_TOKENS", 12)
    rows = [[1] * length for length in (3, 4, 5, 2, 20, 1)]
    batches = list(_batches(iter(rows)))
    assert joined(batches) == rows
    assert [list(map(len, batch)) for batch in batches] == [[3, 4], [5, 2], [20, 1]]


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("  It is red. It is blue.", "It is red."),
        ("What is 3.5?\nNo.", "What is 3.5?"),
        ("A title\n\nThe text.", "A title"),
        ("no end", "no end"),
    ],
)
def test_the_first_sentence(text, sentence):
    assert first_sentence(text) == sentence


# --- the report ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[Path]:
    """Two domains: chats, and a text under a name that is markup."""
    folder = tmp_path_factory.mktemp("texts")
    plain = folder / "a <b> & $c$ $d$.txt"
    plain.write_text("The river is blue, and the house is white. " * 120, encoding="utf-8")
    return [write_rows(folder / "chats.jsonl", chats()), plain]


@pytest.fixture(scope="module")
def report(chat_model, texts, tmp_path_factory) -> Path:
    """The folder that the command makes."""
    folder = tmp_path_factory.mktemp("reports") / "deep" / "report"
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
    assert report.stat().st_mode & 0o055 == 0o055 & ~grinmoe.analyze._umask()
    assert [path.name for path in report.parent.iterdir()] == ["report"], "nothing temporary is left"


def test_the_page_needs_nothing_from_outside_and_obeys_no_text(report):
    page = Page(report / "report.html")
    assert page.references and all(reference.startswith("data:") for reference in page.references)
    assert page.tags.count("img") == 6
    assert page.tags.count("script") == 2 and "b" not in page.tags
    content = (report / "report.html").read_text(encoding="utf-8")
    assert "://" not in content and "@import" not in content and "url(" not in content
    assert "a <b> & $c$ $d$" in "".join(page.texts)
    for fact in ("2 layers of 4 experts, top-2", "torch", "transformers", "grinmoe"):
        assert fact in "".join(page.texts)


def test_a_token_cannot_end_the_script():
    tokens = ["</script>", "<!--", "&lt;", "\u2028"]
    written = str(grinmoe.routing_report._for_script(tokens))
    assert not set("<>&") & set(written)
    assert json.loads(written) == tokens


def test_json_and_parquet_hold_the_same_counts(report):
    summary = json.loads((report / "routing.json").read_text(encoding="utf-8"))
    experts, kept, pairs = (
        pyarrow.parquet.read_table(report / f"{name}.parquet").to_pylist() for name in ("experts", "kept", "pairs")
    )
    assert list(summary["domains"]) == ["chats", "a <b> & $c$ $d$"]
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
    chat = grinmoe.analyze.load_chat(str(chat_model), grinmoe.analyze.ChatOptions(device="cpu"))
    ids = chat.tokenizer(SENTENCE, return_tensors="pt").input_ids
    with torch.no_grad():
        output = chat.model(ids, output_router_logits=True)
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


@pytest.mark.parametrize("top_k", [1, 3])
def test_reports_of_other_numbers_of_experts_per_token(routed, tmp_path, top_k):
    logits, experts, valid = routed(top_k)
    counts = count_routing(logits, experts, valid, EPS)
    tokens = ["▁a", "\n", "$x$", "日", "<|end|>"]
    sentence = route_sentence("", tokens, logits[:, :5], experts[:, :5], EPS)
    nothing = RoutingCounts.of_nothing(2, 5, top_k)
    analysis = RoutingAnalysis(
        ["one", "two"], [(counts, nothing), (counts, counts)], sentence, EPS, {"model": "m", "shape": ""}
    )
    write_report(analysis, tmp_path)
    assert (tmp_path / "pairs.parquet").exists() == (tmp_path / "coactivation.png").exists() == (top_k > 1)
    assert ("top-1), so no two experts" in (tmp_path / "report.html").read_text(encoding="utf-8")) == (top_k == 1)


# --- what goes wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["draw_pictures", "write_tables", "page_of"])
def test_a_report_that_fails_half_way_leaves_nothing(chat_model, texts, tmp_path, monkeypatch, capsys, step):
    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(grinmoe.routing_report, step, full)
    if step != "draw_pictures":
        monkeypatch.setattr(grinmoe.routing_report, "draw_pictures", lambda *arguments: [])
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
    from grinmoe.lora import lora_config

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


def test_task_sets_are_told_by_their_suffix(texts):
    assert texts[0].suffix in SUFFIXES and isinstance(first_piece(texts[0]), list)
    assert isinstance(first_piece(texts[1]), str)


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
