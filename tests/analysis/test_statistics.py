"""Statistics of routing against an enumeration, and texts cut into rows: what `grinmoe analyze` is made of."""

from __future__ import annotations

import json
import math
from itertools import chain

import pytest
import torch

import grinmoe.analysis.run
from grinmoe.analysis.report import write_report
from grinmoe.analysis.run import _batches, _count_batch, _routing, _shown_tokens
from grinmoe.analysis.statistics import RoutingAnalysis, RoutingCounts, count_routing, route_sentence, similarity_of
from grinmoe.analysis.texts import first_piece, first_sentence, read_pieces, token_rows
from grinmoe.tokenization import load_tokenizer
from tests.small_chat import chats, write_rows

EPS = 0.1


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
    even, odd = _count_batch(model, rows, 0)
    alone = [_count_batch(model, [row], 0)[0] for row in rows]
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
    # Expert 0 is in every pair, so that the loads leave no choice.
    uneven = with_choices((0, 1), (1, 0), (2, 0)).pair_lift[0][[0, 0, 1], [1, 2, 2]]
    torch.testing.assert_close(uneven[:2], torch.ones(2, dtype=torch.float64), atol=0.01, rtol=0)
    assert uneven[2].isnan(), "no token is expected"


def test_choices_that_know_nothing_of_each_other_have_a_lift_of_1():
    """Drawn by weights 8, 4, 2, 1 as a pair w_e w_f; and twice as many of one pair are seen as such."""
    weights = [8, 4, 2, 1]
    pairs = [(e, f) for e in range(4) for f in range(e) for _ in range(2 * weights[e] * weights[f])]
    lift = with_choices(*pairs, num_experts=4).pair_lift[0]
    off_diagonal = ~torch.eye(4, dtype=torch.bool)
    torch.testing.assert_close(lift[off_diagonal], torch.ones(12, dtype=torch.float64), atol=1e-4, rtol=0)
    more = with_choices(*pairs, *[(3, 2)] * 12, num_experts=4).pair_lift[0]
    assert more[2, 3] == more[3, 2] > 1.5 > 1 > more[0, 3]


def test_tokens_that_share_a_letter_are_shown_by_name():
    """A byte-level token of a space and a letter's first bytes, and the one with the others."""
    spans, names = [(0, 1), (1, 3), (2, 3), (3, 5), (5, 5)], ["a", "Ġx", "yz", "bc", "<s>"]
    assert _shown_tokens("a ébc", names, spans) == ["a", "Ġx", "yz", "bc", "<s>"]
    assert _shown_tokens("ab cd", ["A", "B"], [(0, 2), (2, 5)]) == ["ab", " cd"]
    assert _shown_tokens("éa", ["<0xC3>", "<0xA9>", "a"], [(0, 1), (0, 1), (1, 2)]) == ["<0xC3>", "<0xA9>", "a"]


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
    assert found.within[0].item() == pytest.approx(1)
    assert found.within[1:].isnan().all(), "a domain of one row has no halves"
    two = with_choices((0,), (0,), (1,), num_experts=3)  # deviations 1, 0, -1 of 3 beside the first's 2, -1, -1 of 12
    (r,) = similarity_of([(first, nothing), (two, nothing)]).deviation[0, 1:].tolist()
    assert similarity_of([(first, two)]).within.item() == pytest.approx(2 * r / (1 + r))
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


def test_task_set_row_whose_tools_would_be_left_out_is_refused_and_a_weight_is_read(tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "weight": 0}]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": messages}), encoding="utf-8")
    ((_, read),) = read_pieces(file)
    assert [message["content"] for message in read] == ["Hi", "Ho"]
    file.write_text(json.dumps({"messages": messages, "tools": [{"type": "function"}]}), encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: the column 'tools' is .*the chat template would not get it"):
        list(read_pieces(file))


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


def test_completion_that_is_a_whole_conversation_has_the_prompt_once(tmp_path):
    messages = chats()[0]["messages"]
    file = write_rows(tmp_path / "tasks.jsonl", [{"prompt": messages[:1], "completion": messages}])
    assert list(read_pieces(file)) == [(True, messages)]


def test_batches_hold_all_rows_in_order_and_no_more_tokens_than_allowed(monkeypatch):
    monkeypatch.setattr(grinmoe.analysis.run, "_BATCH_TOKENS", 12)
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


@pytest.mark.parametrize("suffix, kind", [(".jsonl", list), (".txt", str)])
def test_task_sets_are_told_by_their_suffix(tmp_path, suffix, kind):
    assert isinstance(first_piece(write_rows(tmp_path / f"chats{suffix}", chats())), kind)


@pytest.mark.parametrize("top_k", [1, 3])
def test_reports_of_other_numbers_of_experts_per_token(routed, tmp_path, top_k):
    logits, experts, valid = routed(top_k)
    counts = count_routing(logits, experts, valid, EPS)
    tokens = ["</script>", "<!--", "$x$\n", "日\u2028", "&lt;|end|>"]
    sentence = route_sentence("", tokens, logits[:, :5], experts[:, :5], EPS)
    nothing = RoutingCounts.of_nothing(2, 5, top_k)
    analysis = RoutingAnalysis(
        ["one", "two"], [(counts, nothing), (counts, counts)], sentence, EPS, {"model": "m", "shape": ""}
    )
    write_report(analysis, tmp_path)
    assert (tmp_path / "pairs.parquet").exists() == (tmp_path / "coactivation.png").exists() == (top_k > 1)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ("top-1), so no two experts" in page) == (top_k == 1)
    data = page.split('id="sentence">')[1].split("</script>")[0]
    assert not set("<>&") & set(data), "a token cannot end the script"
    assert json.loads(data)["tokens"] == tokens
