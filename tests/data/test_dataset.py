"""Training data: what becomes of good rows, and that bad ones are named with their place and a remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grinmoe.data.dataset import DataOptions, load_data
from grinmoe.data.packing import NO_LOSS
from grinmoe.demo.chat_corpus import load_corpus, texts
from grinmoe.tokenization import build_tokenizer

VOCABULARY = 512


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(texts(load_corpus().train), vocab_size=VOCABULARY)


@pytest.fixture
def load(tmp_path, tokenizer):
    """`load_data` of rows, which are written to a file first; keywords are the options."""

    def load(task: str, rows, name: str = "rows.jsonl", **options):
        options = {"train_data": str(written(tmp_path / name, rows)), "max_length": 64, **options}
        return load_data(task, DataOptions(**options), tokenizer, VOCABULARY)

    return load


def written(path: Path, rows) -> Path:
    """Rows as the suffix says; text and bytes as they are."""
    if isinstance(rows, bytes):
        path.write_bytes(rows)
    elif isinstance(rows, str):
        path.write_text(rows, encoding="utf-8")
    elif path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def chats(number: int) -> list[dict]:
    return [{"messages": chat(f"Question {i}?", f"Answer {i}.")} for i in range(number)]


def target_text(row, tokenizer) -> str:
    return text_of([label for label in row["labels"] if label != NO_LOSS], tokenizer)


def text_of(ids: list[int], tokenizer) -> str:
    """Without the spaces that decoding puts behind special tokens."""
    return tokenizer.decode(ids).replace("|> ", "|>")


class TestTokens:
    """sft and pretrain: token ids, and what of them is a target."""

    def test_only_what_the_assistant_says_is_a_target(self, load, tokenizer):
        (row,) = load("sft", [{"messages": chat("Hello?", "Good day.", "And now?", "Good bye.")}]).train
        text = tokenizer.decode(row["input_ids"])
        assert "Hello?" in text and "And now?" in text
        assert target_text(row, tokenizer) == "Good day.<|end|>Good bye.<|end|>"
        assert all(label in (NO_LOSS, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))

    def test_all_tokens_but_the_first_are_targets_on_demand(self, load, tokenizer):
        (row,) = load("sft", [{"messages": chat("Hello?", "Good day.")}], loss_on="all").train
        assert row["labels"] == [NO_LOSS, *row["input_ids"][1:]]

    def test_of_prompt_and_completion_the_completion_and_its_end_are_targets(self, load, tokenizer):
        (row,) = load("sft", [{"prompt": "The sky is", "completion": " blue today"}]).train
        assert tokenizer.decode(row["input_ids"]) == "The sky is blue today<|endoftext|>"
        assert target_text(row, tokenizer).strip() == "blue today<|endoftext|>"
        assert row["input_ids"][-1] == row["labels"][-1] == tokenizer.eos_token_id

    def test_of_a_prompt_and_a_completion_in_messages_only_the_completion_is_a_target(self, load, tokenizer):
        turns = chat("Hello?", "Good day.", "And now?", "Good bye.")
        (row,) = load("sft", [{"prompt": turns[:3], "completion": turns[3:]}]).train
        assert target_text(row, tokenizer) == "Good bye.<|end|>"
        assert "Good day." in tokenizer.decode(row["input_ids"])

    def test_text_ends_with_one_end_of_text(self, load, tokenizer):
        rows = load("sft", [{"text": "Some words"}, {"text": "Some words<|endoftext|>"}]).train
        assert rows[0] == rows[1]
        assert rows[0]["input_ids"].count(tokenizer.eos_token_id) == 1
        assert rows[0]["labels"] == [NO_LOSS, *rows[0]["input_ids"][1:]]

    @pytest.mark.parametrize(
        "row", [{"text": "Some words"}, chats(1)[0], {"prompt": "The sky", "completion": " is blue"}]
    )
    def test_pretraining_learns_every_token_of_any_format(self, load, row):
        (row,) = load("pretrain", [row], packing=False).train
        assert row["labels"] == [NO_LOSS, *row["input_ids"][1:]]

    def test_documents_fill_rows_and_are_cut_where_a_row_ends(self, load, tokenizer):
        documents = ["One two three four five six seven.", "Eight nine.", "Ten eleven twelve thirteen fourteen."]
        data = load("pretrain", [{"text": text} for text in documents], max_length=16)
        rows = data.train["input_ids"]
        assert [len(row) for row in rows[:-1]] == [16] * (len(rows) - 1)
        assert text_of([token for row in rows for token in row], tokenizer) == "".join(
            f"{text}<|endoftext|>" for text in documents
        )
        for row in data.train:
            ends = [i + 1 for i, token in enumerate(row["input_ids"][:-1]) if token == tokenizer.eos_token_id]
            assert [i for i, position in enumerate(row["position_ids"]) if position == 0] == [0, *ends]
        assert (data.report.train.samples, data.report.train.rows) == (3, len(rows))
        assert data.report.train.rows_truncated == 0

    def test_packing_keeps_every_sample_whole_and_masked_as_alone(self, load):
        alone, packed = load("sft", chats(12)), load("sft", chats(12), packing=True)
        assert "position_ids" not in alone.train.column_names
        pieces = []
        for row in packed.train:
            assert len(row["input_ids"]) <= 64
            begins = [i for i, position in enumerate(row["position_ids"]) if position == 0]
            for begin, end in zip(begins, [*begins[1:], len(row["input_ids"])], strict=True):
                pieces.append({name: row[name][begin:end] for name in ("input_ids", "labels")})
        assert sorted(map(str, pieces)) == sorted(map(str, alone.train))
        counts = packed.report.train
        assert (counts.samples, counts.rows, counts.tokens) == (12, len(packed.train), alone.report.train.tokens)
        assert counts.rows < 12 and counts.target_tokens == alone.report.train.target_tokens


class TestPairs:
    """dpo: pairs of texts or of messages, checked as DPOTrainer will tokenise them."""

    @pytest.mark.parametrize("how", ["prompt", "whole conversations", "whole conversations, and the prompt as text"])
    def test_messages_are_split_into_prompt_and_answers(self, load, how):
        prompt, chosen, rejected = chat("Hello?"), chat("", "Good day.")[1:], chat("", "Go away.")[1:]
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        if how != "prompt":
            row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
        if how.endswith("text"):
            row["prompt"] = "Hello?"
        assert list(load("dpo", [row]).train) == [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]

    def test_trl_tokenises_them_to_the_tokens_that_were_counted(self, load, tiny_model, tokenizer, tmp_path):
        trl = pytest.importorskip("trl")
        long = " and so on" * 20
        rows = [
            {
                "prompt": chat("Hello?"),
                "chosen": chat("", "Good day.")[1:],
                "rejected": chat("", "Go away." + long)[1:],
            },
            {"prompt": chat("Hello?"), "chosen": chat("", long + "a")[1:], "rejected": chat("", long + "b")[1:]},
            {"prompt": chat(long), "chosen": chat("", "Yes.")[1:], "rejected": chat("", "No.")[1:]},
        ]
        data = load("dpo", rows, max_length=32)
        arguments = trl.DPOConfig(str(tmp_path), max_length=32, report_to=[], use_cpu=True, bf16=False)
        model = tiny_model(vocab_size=VOCABULARY)
        trainer = trl.DPOTrainer(
            model,
            ref_model=tiny_model(vocab_size=VOCABULARY),
            args=arguments,
            train_dataset=data.train,
            processing_class=tokenizer,
        )
        (row,) = trainer.train_dataset
        batch = trainer.data_collator([row])
        counts = data.report.train
        assert counts.tokens == batch["attention_mask"].sum() and counts.target_tokens == batch["completion_mask"].sum()
        assert (counts.samples, counts.rows_truncated, counts.rows_without_target, counts.rows_identical) == (
            1,
            3,
            1,
            1,
        )

    def test_a_prompt_that_fills_the_row_leaves_no_answer(self, load, tokenizer):
        row = {"prompt": chat("Hello?"), "chosen": chat("", "Yes.")[1:], "rejected": chat("", "No.")[1:]}
        length = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])
        assert load("dpo", [row], max_length=length + 1).report.train.target_tokens == 2
        with pytest.raises(ValueError, match="all labels are masked"):
            load("dpo", [row], max_length=length)

    def test_texts_stay_texts(self, load):
        row = {"prompt": "The sky is", "chosen": " blue", "rejected": " green"}
        assert list(load("dpo", [row]).train) == [row]

    @pytest.mark.parametrize(
        "row, message",
        [
            ({"chosen": "a", "rejected": "b"}, "texts need a 'prompt'"),
            ({"prompt": "p", "chosen": "a", "rejected": chat("b")}, "all texts or all messages"),
            ({"prompt": chat("p"), "chosen": "a", "rejected": "b"}, "all texts or all messages"),
            ({"chosen": chat("a", "b"), "rejected": chat("c", "d")}, "do not begin with the same message"),
            ({"prompt": "p", "chosen": "a", "rejected": "a"}, "1 with the same answer chosen and rejected"),
            ({"prompt": "p", "chosen": "a"}, "its columns are prompt, chosen; needed: chosen and rejected"),
        ],
    )
    def test_bad_pairs_are_refused(self, load, row, message):
        with pytest.raises(ValueError, match=message):
            load("dpo", [row])


class TestLength:
    LONG = [*chats(3), {"messages": chat("Hi", "word " * 100)}]

    def test_long_samples_are_truncated_and_counted(self, load):
        data = load("sft", self.LONG)
        assert max(map(len, data.train["input_ids"])) == 64 and len(data.train) == 4
        assert "; 1 truncated to max_length" in data.report.summary()

    def test_or_dropped_and_counted(self, load):
        data = load("sft", self.LONG, too_long="drop")
        assert len(data.train) == 3
        assert (
            "3 samples of 4 rows" in data.report.summary() and "1 dropped for being too long" in data.report.summary()
        )

    def test_a_sample_whose_answer_is_cut_off_has_no_target_and_is_dropped(self, load):
        data = load("sft", [*chats(3), {"messages": chat("word " * 100, "Hi")}])
        assert len(data.train) == 3
        assert (data.report.train.rows_truncated, data.report.train.rows_without_target) == (1, 1)

    def test_where_all_are_too_long_the_error_says_what_to_raise(self, load):
        with pytest.raises(ValueError, match="nothing is left for training.*raise max_length=4"):
            load("sft", chats(3), max_length=4, too_long="drop")


class TestParts:
    def test_a_share_is_held_out_by_what_is_asked_and_not_by_order(self, load):
        rows = chats(60) + [{"messages": chat(f"Question {i}?", "Another answer.")} for i in range(60)]
        data, turned = (load("sft", order, eval_share=0.3) for order in (rows, rows[::-1]))
        found = [{tuple(ids) for ids in part["input_ids"]} for part in (data.train, data.evaluation)]
        assert found == [{tuple(ids) for ids in part["input_ids"]} for part in (turned.train, turned.evaluation)]
        assert not found[0] & found[1] and len(found[0] | found[1]) == 120
        # Both answers to a question are in one part, so the parts have even numbers of rows.
        assert len(found[0]) % 2 == 0 and 0.15 < len(found[1]) / 120 < 0.45
        assert data.report.train.rows_read + data.report.evaluation.rows_read == 120

    def test_evaluation_may_have_a_file_of_its_own(self, load, tmp_path):
        held_out = written(tmp_path / "held-out.json", chats(2))
        data = load("sft", chats(5), eval_data=str(held_out))
        assert (len(data.train), len(data.evaluation)) == (5, 2)
        assert "\nevaluation data: 2 samples of 2 rows" in data.report.summary()

    def test_too_few_rows_for_a_share_are_refused(self, load):
        with pytest.raises(ValueError, match="nothing is left for evaluation.*eval_share=0.0001 of so few rows"):
            load("sft", chats(2), eval_share=0.0001)

    def test_the_same_file_gives_the_same_rows(self, load):
        first, second = (load("sft", chats(9), packing=True, eval_share=0.4) for _ in range(2))
        assert first.train.to_dict() == second.train.to_dict()
        assert first.evaluation.to_dict() == second.evaluation.to_dict()

    def test_max_rows_reads_the_first_ones(self, load):
        assert load("sft", chats(9), max_rows=4).train["input_ids"][:] == load("sft", chats(4)).train["input_ids"][:]


class TestFiles:
    @pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
    def test_json_json_lines_and_parquet_give_the_same_rows(self, load, name):
        assert list(load("sft", chats(5), name).train) == list(load("sft", chats(5)).train)

    def test_a_folder_is_all_its_files_in_the_order_of_their_names(self, load, tmp_path):
        folder = tmp_path / "folder"
        (folder / "b").mkdir(parents=True)
        rows = chats(4)
        written(folder / "b" / "1.parquet", rows[3:])
        written(folder / "a.jsonl", rows[:2])
        written(folder / "a2.json", rows[2:3])
        (folder / "notes.txt").write_text("no data")
        assert list(load("sft", rows, train_data=str(folder)).train) == list(load("sft", rows).train)

    def test_blank_lines_and_a_byte_order_mark_are_no_rows(self, load):
        lines = "\ufeff" + "\n\n".join(map(json.dumps, chats(2))) + "\n\n"
        assert list(load("sft", lines).train) == list(load("sft", chats(2)).train)

    def test_other_names_of_columns(self, load):
        renamed = [{"talk": row["messages"], "text": "unused"} for row in chats(2)]
        assert list(load("sft", renamed, messages_column="talk").train) == list(load("sft", chats(2)).train)

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("rows.jsonl", b"", "rows.jsonl is empty"),
            ("rows.jsonl", b"\n\n", "has no rows"),
            ("rows.json", b"[]", "has no rows"),
            ("rows.jsonl", b'{"text": "a b c"}\n{"text": "a', "rows.jsonl, line 2: not JSON .*column 10"),
            ("rows.json", b'[\n{"text": "a b c"},\n{"text": a}]', "rows.json, line 3: not JSON"),
            (
                "rows.jsonl",
                b'{"text": "a b c"}\n{"text": "\xe4"}',
                "line 2: not UTF-8 text .byte 0xe4 at 10.*convert",
            ),
            (
                "rows.jsonl",
                b'{"text": "a b c"}\n["a"]',
                r"line 2: a row is an object with named columns, not \['a'\]",
            ),
            ("rows.parquet", b"not parquet", "rows.parquet cannot be read as Parquet"),
            ("rows.csv", b"text\na", "has the suffix '.csv'; training data are .json, .jsonl, .parquet"),
        ],
    )
    def test_unreadable_files_are_named_with_the_line(self, load, name, content, message):
        with pytest.raises(ValueError, match=message):
            load("sft", content, name)

    @pytest.mark.parametrize("missing", ["missing.jsonl", "./missing", "/a/b/c", "~/missing"])
    def test_a_missing_file_is_not_looked_for_on_the_hub(self, load, missing):
        with pytest.raises(ValueError, match="does not exist; give a .json, .jsonl, .parquet file"):
            load("sft", chats(1), train_data=missing)

    def test_a_folder_without_data_is_refused(self, load, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="empty holds no .json"):
            load("sft", chats(1), train_data=str(tmp_path / "empty"))

    def test_a_data_set_of_the_hub_is_loaded_by_its_names(self, load, monkeypatch):
        import datasets

        calls = []

        def load_dataset(name, config, split, revision):
            calls.append((name, config, split, revision))
            return datasets.Dataset.from_list(chats({"train": 5, "test": 2, "validation": 3}[split]))

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        options = {"train_data": "owner/name", "data_config": "small", "data_revision": "v1"}
        data = load("sft", [], **options, eval_split="test")
        assert (len(data.train), len(data.evaluation)) == (5, 2)
        assert calls == [("owner/name", "small", "train", "v1"), ("owner/name", "small", "test", "v1")]
        assert list(data.train) == list(load("sft", chats(5)).train)
        assert len(load("sft", [], train_data="owner/name", eval_data="other").evaluation) == 3

    def test_a_data_set_that_the_hub_does_not_give_is_named(self, load, monkeypatch):
        import datasets

        def load_dataset(*args, **kwargs):
            raise datasets.exceptions.DatasetNotFoundError("no such thing")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(
            ValueError, match=r"'owner/name' \(data_config None, split 'train'.*check these names.*no such"
        ):
            load("sft", [], train_data="owner/name")


class TestRows:
    """Every bad row is named by file and line."""

    @pytest.mark.parametrize(
        "messages, message",
        [
            ([], "line 3: 'messages' is an empty list"),
            ("Hello", "line 3: 'messages' is a list of .*, not 'Hello'"),
            (["Hello"], "line 3: message 1 of 'messages' is 'Hello'"),
            ([{"role": "user"}], "line 3: message 1 of 'messages' has no content.*its keys are role"),
            (
                [{"role": "user", "content": ["x"]}],
                r"message 1 of 'messages' has the content \['x'\]; it needs a string",
            ),
            ([{"from": "human", "value": "x"}], "message 1 of 'messages' has no role.*its keys are from, value"),
            (
                [*chat("a"), {"role": "robot", "content": "x"}],
                "line 3: .*template refuses.*role robot.*knows system, user",
            ),
            ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "message 1 of 'messages' has tool_calls"),
        ],
    )
    def test_malformed_messages_are_refused(self, load, messages, message):
        with pytest.raises(ValueError, match=message):
            load("sft", [*chats(2), {"messages": messages}])

    def test_a_missing_column_is_named_with_those_that_are_there(self, load):
        with pytest.raises(
            ValueError, match="line 1: its columns are a, b; needed: messages .messages.; or prompt and"
        ):
            load("sft", [{"a": 1, "b": 2}])
        with pytest.raises(
            ValueError, match="line 1: its columns are text; needed: body .text.. Name the columns with"
        ):
            load("sft", [{"text": "x"}], data_format="text", text_column="body")
        with pytest.raises(ValueError, match="line 3: its columns are text; needed: messages"):
            load("sft", [*chats(2), {"text": "another format"}])

    def test_a_text_must_be_a_string(self, load):
        with pytest.raises(ValueError, match="line 1: 'text' is a string, not 5"):
            load("sft", [{"text": 5}])

    def test_a_prompt_and_a_completion_of_two_kinds_are_refused(self, load):
        with pytest.raises(ValueError, match="line 1: 'prompt' and 'completion' must be both texts or both messages"):
            load("sft", [{"prompt": chat("a"), "completion": "b"}])

    def test_empty_rows_are_left_out_and_counted(self, load):
        data = load("sft", [{"text": "Some words"}, {"text": "  "}, {"text": None}])
        assert len(data.train) == 1 and "2 empty" in data.report.summary()

    @pytest.mark.parametrize(
        "rows, message",
        [
            ([{"text": ""}, {"text": None}], "nothing is left.*2 empty; their columns are empty .text."),
            ([{"messages": chat("Only a question")}], "nothing is left.*all labels are masked"),
        ],
    )
    def test_where_no_row_is_left_the_error_says_why(self, load, rows, message):
        with pytest.raises(ValueError, match=message):
            load("sft", rows)


class TestTokenizer:
    def test_a_vocabulary_larger_than_the_models_is_refused_before_the_data_are_read(self, tokenizer):
        with pytest.raises(ValueError, match="ids up to 511 and the model 511 embeddings"):
            load_data("sft", DataOptions("missing.jsonl"), tokenizer, 511)

    @pytest.mark.parametrize(
        "template, message",
        [
            (None, "line 1: messages need a chat template"),
            ("{{ messages[0]['content'] }}", "marks what the assistant says.*loss_on='all' needs none"),
        ],
    )
    def test_a_template_that_cannot_serve_is_refused(self, tmp_path, template, message):
        tokenizer = build_tokenizer(["some text to learn"] * 3, vocab_size=400)
        tokenizer.chat_template = template
        file = written(tmp_path / "rows.jsonl", chats(1))
        with pytest.raises(ValueError, match=message):
            load_data("sft", DataOptions(str(file)), tokenizer, 400)


class TestOptions:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"data_format": "alpaca"}, "data_format='alpaca' is unknown; choose auto, messages, prompt-completion"),
            ({"too_long": "split"}, "too_long='split' is unknown; choose truncate, drop"),
            ({"loss_on": "user"}, "loss_on='user' is unknown; choose assistant, all"),
            ({"eval_share": 1.0}, "eval_share=1.0 is no share"),
            ({"max_length": 1}, "max_length=1: a row needs 2 tokens"),
            ({"max_rows": 0}, "max_rows=0"),
            ({"eval_share": 0.1, "eval_data": "x.jsonl"}, "not both"),
            ({"eval_split": "test"}, "eval_split='test': files have no splits"),
        ],
    )
    def test_wrong_values_are_named(self, options, message):
        with pytest.raises(ValueError, match=message):
            DataOptions("rows.jsonl", **options)

    @pytest.mark.parametrize(
        "task, options, message",
        [
            ("rlhf", {}, "task='rlhf' is unknown; choose sft, dpo, pretrain"),
            ("dpo", {"packing": True}, "preference pairs are not packed"),
            ("sft", {"data_format": "preference"}, "'preference' is not for sft, which trains on messages"),
            ("sft", {"data_config": "en"}, "data_config and data_revision are for data sets of the Hub"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, load, task, options, message):
        with pytest.raises(ValueError, match=message):
            load(task, chats(1), **options)

    def test_they_can_be_flags(self):
        from transformers import HfArgumentParser

        flags = ["--train_data", "rows.jsonl", "--packing", "true", "--eval_share", "0.1", "--max_rows", "5"]
        (options,) = HfArgumentParser(DataOptions).parse_args_into_dataclasses(flags)
        assert options == DataOptions("rows.jsonl", packing=True, eval_share=0.1, max_rows=5)
