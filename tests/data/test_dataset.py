"""Training data: what becomes of good rows, and that bad ones are named with their place and a remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grinmoe.data.dataset import DataOptions, load_data
from grinmoe.data.formats import Columns
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


def said(content, **fields) -> dict:
    """A message of the assistant with further fields."""
    return {"role": "assistant", "content": content, **fields}


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

    def test_completion_that_is_a_whole_conversation_has_the_prompt_once(self, load):
        turns = chat("Hello?", "Good day.", "And now?", "Good bye.")
        expected = list(load("sft", [{"prompt": turns[:3], "completion": turns[3:]}]).train)
        assert list(load("sft", [{"prompt": turns[:3], "completion": turns}]).train) == expected
        assert list(load("pretrain", [{"prompt": turns[:3], "completion": turns}]).train) == list(
            load("pretrain", [{"messages": turns}]).train
        )

    @pytest.mark.parametrize(
        "prompt, completion",
        [
            (chat("Hello?"), chat("Hello? ", "Good day.")),
            (chat("Hello?", "Good"), chat("Hello?", "Good day.")),
            (chat("Hello?", "Good day."), chat("Hello?", "Good day.")),
            ([{"role": "system", "content": "Be brief."}, *chat("Hello?")], chat("Hello?", "Good day.")),
            (chat("Hello?"), [{"role": "system", "content": "Be brief."}, *chat("Hello?", "Good day.")]),
        ],
        ids=["other spaces", "other answer", "no answer", "prompt has a system", "completion has a system"],
    )
    def test_completion_that_repeats_the_prompt_in_part_is_refused(self, load, prompt, completion):
        with pytest.raises(ValueError, match="line 1: 'completion' begins with .*all of the prompt's messages"):
            load("sft", [{"prompt": prompt, "completion": completion}])

    def test_completion_may_begin_with_a_question_after_an_answer(self, load):
        turns = chat("Hello?", "Good day.", "And now?", "Good bye.")
        assert len(load("sft", [{"prompt": turns[:2], "completion": turns[2:]}]).train) == 1

    def test_weights_of_a_repeated_prompt_are_checked_in_both_copies(self, load):
        weighted = [*chat("Hello?"), said("Good day.", weight=1), *chat("And now?")]
        plain = [{key: turn[key] for key in ("role", "content")} for turn in weighted]
        for prompt, copy in ((plain, weighted), (weighted, plain)):
            with pytest.raises(ValueError, match="line 1: .*message 2, of role 'assistant', has weight 1"):
                load("sft", [{"prompt": prompt, "completion": [*copy, said("Good bye.")]}])
            with pytest.raises(ValueError, match="line 1: .*message 2, of role 'assistant', has weight 1"):
                load("dpo", [{"prompt": prompt, "chosen": [*copy, said("a")], "rejected": [*copy, said("b")]}])

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

    @pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]], ids=["no system", "system"])
    def test_prompt_in_messages_before_whole_conversations_is_taken_once(self, load, system):
        """As UltraFeedback has it, with the prompt as messages."""
        prompt, chosen, rejected = [*system, *chat("Hello?")], [said("Good day.")], [said("Go away.")]
        row = {"prompt": prompt, "chosen": prompt + chosen, "rejected": prompt + rejected}
        assert list(load("dpo", [row]).train) == [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]

    @pytest.mark.parametrize(
        "row, message",
        [
            (
                {"chosen": [*chat("Hello?"), said("a")], "rejected": [said("b")]},
                "'chosen' repeats .*and 'rejected' not",
            ),
            (
                {"chosen": [said("a")], "rejected": [*chat("Hello?"), said("b")]},
                "'rejected' repeats .*and 'chosen' not",
            ),
            ({"chosen": chat("Other?", "a"), "rejected": chat("Other?", "b")}, "'chosen' begins with .*role 'user'"),
            ({"chosen": chat("Hello?"), "rejected": chat("Hello?")}, "'chosen' begins with .*role 'user'"),
            (
                {"chosen": [said("a")], "rejected": [{"role": "system", "content": "S"}, *chat("Hello?", "b")]},
                "'rejected' begins with .*role 'system'",
            ),
        ],
        ids=["rejected alone", "chosen alone", "another question", "no answer", "another system"],
    )
    def test_answers_that_disagree_about_the_prompt_are_refused(self, load, row, message):
        good = {"prompt": chat("Hello?"), "chosen": [said("a")], "rejected": [said("b")]}
        with pytest.raises(ValueError, match=f"line 2: .*{message}"):
            load("dpo", [good, {"prompt": chat("Hello?"), **row}])

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

    @pytest.mark.parametrize(
        "chosen, rejected, prompt",
        [
            ("\n\nHuman: Hi\n\nAssistant: Yes.", "\n\nHuman: Hi\n\nAssistant: No.", "\n\nHuman: Hi\n\nAssistant:"),
            ("Q: What? A: Yesterday", "Q: What? A: Yes, sir", "Q: What? A: Yes"),
            ("Q: What? A: Yes", "Q: What? A: Yes, sir", "Q: What? A: Ye"),
        ],
        ids=["space", "within a word", "one goes on"],
    )
    def test_texts_without_a_prompt_column_are_cut_where_trl_cuts_them(self, load, chosen, rejected, prompt):
        """As Anthropic/hh-rlhf has them."""
        trl = pytest.importorskip("trl")
        row = {"chosen": chosen, "rejected": rejected}
        (pair,) = load("dpo", [row]).train
        assert pair["prompt"] == prompt and pair["prompt"] + pair["chosen"] == chosen
        assert pair == trl.extract_prompt(row)

    def test_texts_that_repeat_their_prompt_are_read_without_its_column(self, load):
        row = {"prompt": "The sky is ", "chosen": "The sky is blue", "rejected": "The sky is green"}
        (pair,) = load("dpo", [row], ignore_fields="prompt").train
        assert pair == {"prompt": "The sky is", "chosen": " blue", "rejected": " green"}

    def test_answers_may_begin_with_a_greeting_that_is_the_prompt(self, load):
        row = {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi."}
        assert list(load("dpo", [row]).train) == [row]

    def test_texts_with_one_question_are_held_out_together(self, load):
        rows = [
            {
                "chosen": f"\n\nHuman: Q{i // 2}\n\nAssistant: {i} a",
                "rejected": f"\n\nHuman: Q{i // 2}\n\nAssistant: {i} b",
            }
            for i in range(40)
        ]
        data = load("dpo", rows, eval_share=0.3)
        assert len(data.evaluation) % 2 == len(data.train) % 2 == 0

    def test_texts_stay_texts(self, load):
        row = {"prompt": "The sky is", "chosen": " blue", "rejected": " green"}
        assert list(load("dpo", [row]).train) == [row]

    @pytest.mark.parametrize(
        "row, message",
        [
            ({"chosen": "a", "rejected": "b"}, "texts do not begin alike.*prompt_column"),
            ({"chosen": "\n\na", "rejected": "\n\nb"}, "texts do not begin alike"),
            ({"question": "q", "chosen": "The a", "rejected": "The b"}, "'question'.*prompt_column"),
            (
                {"prompt": "The sky is", "chosen": "The sky is a", "rejected": "The sky is b"},
                "both begin with .*ignore_fields",
            ),
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

    def test_metadata_of_messages_does_not_part_one_question(self, load):
        rows = [
            {"messages": [{**turn, "id": str(i)} for turn in chat(f"Question {i // 2}?", f"A {i}.")]} for i in range(40)
        ]
        data = load("sft", rows, eval_share=0.3)
        assert len(data.evaluation) % 2 == len(data.train) % 2 == 0
        plain = [{"messages": chat(f"Question {i // 2}?", f"A {i}.")} for i in range(40)]
        assert list(load("sft", plain, eval_share=0.3).train) == list(data.train)

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

    def test_array_behind_blank_lines_is_read(self, load):
        rows = "\ufeff\n  \n" + json.dumps(chats(2), indent=1)
        assert list(load("sft", rows, "rows.json").train) == list(load("sft", chats(2)).train)
        with pytest.raises(ValueError, match="rows.json, line 4: not JSON"):
            load("sft", '\n\n[{"text": "a b c"},\n{"text": a}]', "rows.json")

    @pytest.fixture
    def folder(self, tmp_path):
        """Factory: a folder of files by their contents."""

        def folder(**files) -> Path:
            for name, rows in files.items():
                file = tmp_path / "folder" / name
                file.parent.mkdir(parents=True, exist_ok=True)
                written(file, rows)
            return tmp_path / "folder"

        return folder

    @pytest.mark.parametrize(
        "name",
        (
            "dataset_infos.json dataset_info.json state.json a/dataset_dict.json README.json .ipynb_checkpoints/rows.jsonl "
            "._rows.jsonl"
        ).split(),
    )
    def test_metadata_and_hidden_files_of_a_folder_are_not_read(self, load, folder, name):
        path = folder(**{"rows.jsonl": chats(2), name: [{"default": {"splits": {}}}]})
        assert list(load("sft", [], train_data=str(path)).train) == list(load("sft", chats(2)).train)

    def test_folder_of_save_to_disk_is_refused_with_the_remedy(self, load, tmp_path):
        from datasets import Dataset, DatasetDict

        Dataset.from_list(chats(2)).save_to_disk(tmp_path / "one")
        DatasetDict({"train": Dataset.from_list(chats(2))}).save_to_disk(tmp_path / "several")
        for path in (tmp_path / "one", tmp_path / "several", next((tmp_path / "one").glob("*.arrow"))):
            with pytest.raises(ValueError, match="save_to_disk.*load_from_disk.*to_parquet"):
                load("sft", [], train_data=str(path))

    def test_compressed_files_of_a_folder_are_refused(self, load, folder):
        with pytest.raises(ValueError, match="more.jsonl.gz is compressed.*unpack"):
            load("sft", [], train_data=str(folder(**{"rows.jsonl": chats(2), "more.jsonl.gz": b"x"})))

    @pytest.mark.parametrize(
        "one, other",
        [
            ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
            ("train.jsonl", "validation.jsonl"),
            ("train/0.jsonl", "dev/0.jsonl"),
            ("train_sft.jsonl", "eval_sft.jsonl"),
            ("Training.jsonl", "val0.jsonl"),
            ("chats.jsonl", "held-out.jsonl"),
            ("validation.jsonl", "test.jsonl"),
        ],
    )
    def test_folder_of_several_splits_is_refused_and_one_split_of_it_read(self, load, folder, one, other):
        path = folder(**{one: chats(3), other: chats(2)})
        first, second = sorted((one, other))
        with pytest.raises(ValueError, match=f"folder holds several splits.*{first}.*{second}.*eval_data"):
            load("sft", [], train_data=str(path))
        assert len(load("sft", [], train_data=str(path / one), eval_data=str(path / other)).evaluation) == 2

    @pytest.mark.parametrize(
        "names", [("train-0.jsonl", "train-1.jsonl", "more.jsonl"), ("latest.jsonl", "contest.jsonl")]
    )
    def test_folder_of_one_split_is_read_whole(self, load, folder, names):
        path = folder(**dict.fromkeys(names, chats(2)))
        assert len(load("sft", [], train_data=str(path)).train) == 2 * len(names)

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
            (
                [{"from": "human", "value": "x"}],
                "message 1 of 'messages' is of ShareGPT's form.*from and value.*role and content",
            ),
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

    def test_rows_of_sharegpt_are_refused_with_what_they_must_become(self, load):
        rows = [{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}]
        with pytest.raises(
            ValueError, match="line 1: its columns are conv.*'conversations' is of ShareGPT's form.*role"
        ):
            load("sft", rows)

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


class TestFields:
    """Fields of a row that other tools know: honoured, refused by name and place, or ignored as metadata."""

    def weighted(self, **fields) -> list[dict]:
        return [*chat("Hello?", "Good day."), {"role": "user", "content": "Now?"}, said("Good bye.", **fields)]

    @pytest.mark.parametrize(
        "fields",
        [
            {"weight": 0},
            {"weight": 0.0},
            {"train": False},
            {"training": False},
            {"loss": False},
            {"weight": 0, "train": False},
        ],
        ids=str,
    )
    def test_message_with_weight_0_has_no_target_and_stays_in_the_context(self, load, tokenizer, fields):
        rows = [{"messages": [*chat("Hello?"), said("Wrong.", **fields), *chat("Now?", "Good bye.")]}]
        (row,) = load("sft", rows).train
        assert target_text(row, tokenizer) == "Good bye.<|end|>"
        (plain,) = load("sft", [{"messages": chat("Hello?", "Wrong.", "Now?", "Good bye.")}]).train
        assert row["input_ids"] == plain["input_ids"]
        masked = [i for i, (a, b) in enumerate(zip(row["labels"], plain["labels"], strict=True)) if a != b]
        assert text_of([row["input_ids"][i] for i in masked], tokenizer) == "Wrong.<|end|>"

    @pytest.mark.parametrize(
        "fields", [{"weight": 1}, {"weight": 1.0}, {"train": True}, {"weight": None}, {"loss": True}, {}], ids=str
    )
    def test_message_with_weight_1_or_null_is_a_target_as_without(self, load, tokenizer, fields):
        (row,) = load("sft", [{"messages": self.weighted(**fields)}]).train
        assert target_text(row, tokenizer) == "Good day.<|end|>Good bye.<|end|>"

    @pytest.mark.parametrize("task, options", [("sft", {"loss_on": "all"}), ("pretrain", {"packing": False})])
    def test_weight_0_masks_the_message_where_every_token_is_a_target(self, load, tokenizer, task, options):
        (row,) = load(task, [{"messages": [*chat("Hello?"), said("Wrong.", weight=0)]}], **options).train
        masked = [t for t, label in zip(row["input_ids"][1:], row["labels"][1:], strict=True) if label == NO_LOSS]
        assert text_of(masked, tokenizer) == "Wrong.<|end|>"

    def test_weight_0_masks_messages_of_a_completion(self, load, tokenizer):
        completion = [said("Wrong.", weight=0), *chat("Now?", "Good bye.")]
        (row,) = load("sft", [{"prompt": chat("Hello?"), "completion": completion}]).train
        assert target_text(row, tokenizer) == "Good bye.<|end|>"

    def test_row_whose_messages_all_have_weight_0_is_counted_and_dropped(self, load):
        data = load("sft", [*chats(2), {"messages": [*chat("Hello?"), said("Wrong.", weight=0)]}])
        assert (len(data.train), data.report.train.rows_without_target) == (2, 1)
        assert "1 dropped without a target token" in data.report.summary()
        with pytest.raises(ValueError, match="all labels are masked"):
            load("sft", [{"messages": [*chat("Hello?"), said("Wrong.", weight=0)]}])

    @pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
    def test_fields_that_are_null_are_absent_and_weights_are_kept_in_every_file(self, load, tokenizer, suffix):
        """Parquet gives every message every field."""
        rows = [
            {"messages": [*chat("Hello?"), said("Wrong.", weight=0), *chat("Now?", "Good bye.")], "tools": None},
            {"messages": chat("Who?", "Me."), "tools": []},
        ]
        data = load("sft", rows, f"rows.{suffix}")
        assert [target_text(row, tokenizer) for row in data.train] == ["Good bye.<|end|>", "Me.<|end|>"]

    def test_weights_of_a_hub_data_set_are_kept(self, load, tokenizer, monkeypatch):
        import datasets

        rows = [{"messages": [*chat("Hello?"), said("Wrong.", weight=0), *chat("Now?", "Good bye.")]}]
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list(rows))
        (row,) = load("sft", [], train_data="owner/name").train
        assert target_text(row, tokenizer) == "Good bye.<|end|>"

    @pytest.mark.parametrize(
        "message, error",
        [
            (said("x", weight=0.5), "message 2 of 'messages' has weight=0.5; .* 0 or 1"),
            (said("x", weight="0"), "has weight='0'"),
            (said("x", train="no"), "has train='no'"),
            (said("x", weight=0, train=True), "has weight=0 and train=True"),
            (
                {"role": "user", "content": "x", "weight": 1},
                "message 2, of role 'user', has weight 1, but it has no loss",
            ),
            (said("x", train_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}]), "has train_detail"),
            (said("x", mask=True), "has mask"),
            (said("x", loss_scale=0.1), "has loss_scale"),
            (said("x", eot=False), "has eot"),
            (said("x", prefix=True), "has prefix"),
            (said("x", reasoning_content="hm"), "has reasoning_content"),
            (said("x", thinking="hm"), "has thinking"),
            (said("x", refusal="No."), "has refusal"),
            (said("x", function_call={"name": "f"}), "has function_call"),
            (said("x", images=["a.png"]), "has images"),
            (said("x", anything_else=False), "has anything_else"),
            (said("x", value="y"), "has value"),
            (said([{"type": "image_url", "image_url": {"url": "u"}}]), "content part 1 of type 'image_url'"),
            (said([{"type": "text", "text": "x"}, {"type": "thinking"}]), "content part 2 of type 'thinking'"),
            ({"role": "tool", "content": "x", "tool_call_id": "1"}, "has tool_call_id"),
            ({"role": "gpt", "content": "x"}, "template refuses.*role gpt"),
        ],
        ids=str,
    )
    def test_message_field_that_changes_what_is_learned_is_refused_with_its_line(self, load, message, error):
        with pytest.raises(ValueError, match=f"line 3: .*{error}"):
            load("sft", [*chats(2), {"messages": [*chat("Hello?"), message]}])

    def test_weight_that_no_loss_can_follow_is_refused(self, load):
        question = [{"role": "user", "content": "x", "weight": 0}, said("y")]
        assert len(load("sft", [{"messages": question}]).train) == 1, "a question has no loss anyway"
        with pytest.raises(
            ValueError, match="line 1: 'messages': message 1, of role 'user', has weight 0, but every token"
        ):
            load("sft", [{"messages": question}], loss_on="all")
        prompt = [*chat("Hello?"), said("Good day.", weight=1), *chat("Now?")]
        with pytest.raises(
            ValueError, match="line 1: 'prompt' and .*message 2, of role 'assistant', has weight 1, .*prompt"
        ):
            load("sft", [{"prompt": prompt, "completion": [said("Good bye.")]}])

    def test_messages_metadata_text_parts_and_developer_are_read_as_text(self, load):
        parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day.", "image_url": None}]
        row = {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": "Hello?", "id": "7", "timestamp": 1.5, "tool_calls": [], "refusal": None},
                said(parts, model="other", prefix=False),
            ]
        }
        expected = {"messages": [{"role": "system", "content": "Be brief."}, *chat("Hello?", "Good day.")]}
        assert list(load("sft", [row]).train) == list(load("sft", [expected]).train)

    @pytest.mark.parametrize(
        "row",
        [
            {**chats(1)[0], "tools": [{"type": "function"}]},
            {**chats(1)[0], "functions": [{"name": "f"}]},
            {**chats(1)[0], "documents": [{"text": "x"}]},
            {**chats(1)[0], "system": "Be brief."},
            {**chats(1)[0], "chat_template_kwargs": {"thinking": True}},
            {**chats(1)[0], "weight": 0.5},
            {**chats(1)[0], "weight": 0},
            {**chats(1)[0], "label": False},
            {**chats(1)[0], "train": False},
            {**chats(1)[0], "train": 0},
            {**chats(1)[0], "images": ["a.png"]},
            {**chats(1)[0], "labels": [1, 2]},
            {**chats(1)[0], "input_ids": [1, 2]},
            {"prompt": "Sky", "completion": " blue", "label": False},
            {"prompt": "Sky", "completion": " blue", "history": [["a", "b"]]},
            {"prompt": "Sky", "completion": " blue", "system": "Be brief."},
            {"prompt": "Sky", "completion": " blue", "suffix": "."},
            {"text": "Some words", "sample_weight": 2.0},
            {"text": "Some words", "attention_mask": [1, 0]},
        ],
        ids=lambda row: " ".join(row),
    )
    def test_column_that_changes_what_is_learned_is_refused_with_its_line(self, load, row):
        column = list(row)[-1]
        good = {name: row[name] for name in list(row)[:-1]}
        with pytest.raises(ValueError, match=f"line 2: .*{column}.*ignore_fields"):
            load("sft", [good, row])
        assert len(load("sft", [good, row], ignore_fields=column).train) == 2

    @pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
    def test_columns_that_are_empty_neutral_or_metadata_change_nothing(self, load, suffix):
        extra = {"id": "7", "source": "x", "score": 0.1, "weight": 1.0, "tools": None, "system": "", "prompt": "Q"}
        rows = [{**row, **extra} for row in chats(2)]
        assert list(load("sft", rows, f"rows.{suffix}").train) == list(load("sft", chats(2)).train)

    def test_fields_that_hold_only_nulls_or_empty_json_are_absent(self, load):
        """As data sets have them whose tools are JSON in a string, or whose structs have all fields."""
        row = chats(1)[0]
        row["messages"][1] |= {"function_call": {"name": None, "arguments": None}, "tool_calls": "[]"}
        extra = {"tools": "[]", "functions": "null", "images": [{"path": None, "bytes": None}], "documents": [None]}
        assert list(load("sft", [{**row, **extra}]).train) == list(load("sft", chats(1)).train)

    def test_messages_metadata_of_known_data_sets_is_ignored(self, load):
        """WildChat's and OpenAI's fields, and a speaker's name, which the chat template has no place for."""
        wild = {
            "country": "Germany", "state": "Hesse", "hashed_ip": "0f", "header": {"accept-language": "de"},
            "turn_identifier": 7, "language": "German", "toxic": False, "redacted": False, "timestamp": "2023",
            "openai_id": "x", "id": 1, "uuid": "u", "model": "m", "name": "Ann",
        }  # fmt: skip
        messages = [{**message, **wild} for message in chats(1)[0]["messages"]]
        assert list(load("sft", [{"messages": messages}]).train) == list(load("sft", chats(1)).train)

    @pytest.mark.parametrize("label", [0, 1, 7, 0.0, "no"])
    def test_label_that_is_a_class_changes_nothing(self, load, label):
        rows = [{**row, "label": label} for row in chats(2)]
        assert list(load("sft", rows).train) == list(load("sft", chats(2)).train)
        row = {"prompt": "Sky", "completion": " blue"}
        assert list(load("sft", [{**row, "label": label}]).train) == list(load("sft", [row]).train)

    def test_content_without_parts_is_refused(self, load):
        with pytest.raises(
            ValueError, match=r"line 1: message 2 of 'messages' has the content \[\]; it needs a string"
        ):
            load("sft", [{"messages": [*chat("Hello?"), said([])]}])

    def test_input_of_a_renamed_prompt_is_refused(self, load):
        """Alpaca's rows have their question in two columns."""
        row = {"instruction": "Translate.", "input": "Hello", "output": "Hallo"}
        with pytest.raises(ValueError, match="line 1: .*input"):
            load("sft", [row], prompt_column="instruction", completion_column="output")
        row["input"] = ""
        assert len(load("sft", [row], prompt_column="instruction", completion_column="output").train) == 1

    @pytest.mark.parametrize(
        "row, message",
        [
            ({**chats(1)[0], "prompt": "a", "completion": "b"}, "messages, prompt-completion"),
            ({**chats(1)[0], "text": "a"}, "messages, text"),
            ({**chats(1)[0], "conversations": [{"from": "human", "value": "x"}]}, "messages, conversations"),
            ({"text": "a", "instruction": "b", "output": "c"}, "text, instruction and output"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_row_of_two_formats_needs_data_format(self, load, row, message):
        with pytest.raises(ValueError, match=f"line 1: .*{message}.*data_format"):
            load("sft", [row])
        data_format = message.split(",")[0]
        only = {name: row[name] for name in (data_format,)}
        assert list(load("sft", [row], data_format=data_format).train) == list(load("sft", [only]).train)

    def test_row_of_two_formats_is_of_the_one_whose_column_is_named_even_by_its_usual_name(self, load):
        row = {"text": "a text", "instruction": "b", "output": "c"}
        assert list(load("sft", [row], text_column="text").train) == list(load("sft", [{"text": "a text"}]).train)
        row = {**chats(1)[0], "text": "a text"}
        assert list(load("sft", [row], messages_column="messages").train) == list(load("sft", chats(1)).train)
        with pytest.raises(ValueError, match="line 1: .*messages, text.*data_format"):
            load("sft", [row], messages_column="messages", text_column="text")

    def test_row_of_two_formats_of_which_one_is_null_is_of_the_other(self, load):
        """As the files of a folder or a Parquet file with several kinds of rows have it."""
        rows = [{"messages": None, "text": "Some words"}, {"messages": None, "text": "Others"}]
        assert list(load("sft", rows, "rows.parquet").train) == list(
            load("sft", [{"text": r["text"]} for r in rows]).train
        )

    @pytest.mark.parametrize(
        "row, error",
        [
            (
                {"prompt": chat("Q"), "chosen": [said("a", weight=0)], "rejected": [said("b")]},
                "'chosen'.* weight 0, but",
            ),
            ({"prompt": chat("Q"), "chosen": [said("a")], "rejected": [said("b", weight=0)]}, "'rejected'.* weight 0"),
            ({"prompt": chat("Q"), "chosen": [said("a")], "rejected": [said("b", thinking="c")]}, "has thinking"),
            ({"prompt": "Q", "chosen": "a", "rejected": "b", "ref_chosen_logps": -1.0}, "ref_chosen_logps"),
            ({"prompt": "Q", "chosen": "a", "rejected": "b", "margin": 0.5}, "margin"),
            ({"prompt": "Q", "chosen": "a", "rejected": "b", "system": "Be brief."}, "system"),
            ({"prompt": "Q", "chosen": "a", "rejected": "b", "images": ["a.png"]}, "images"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_pair_field_that_changes_what_is_learned_is_refused(self, load, row, error):
        with pytest.raises(ValueError, match=f"line 1: .*{error}"):
            load("dpo", [row])

    def test_pair_with_weights_that_hold_anyway_and_scores_is_the_plain_pair(self, load):
        question = [{"role": "user", "content": "Q"}, said("So?", weight=0), {"role": "user", "content": "Yes"}]
        row = {
            "chosen": [*question, said("a", weight=1)],
            "rejected": [*question, said("b")],
            "score_chosen": 5.0,
            "score_rejected": 1.0,
        }
        plain = chat("Q", "So?", "Yes")
        expected = {"prompt": plain, "chosen": [said("a")], "rejected": [said("b")]}
        assert list(load("dpo", [row]).train) == [expected]

    def test_template_without_marks_cannot_follow_a_weight(self, tmp_path):
        tokenizer = build_tokenizer(["some text to learn"] * 3, vocab_size=400)
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        file = written(tmp_path / "rows.jsonl", [{"messages": [*chat("Hello?"), said("Wrong.", weight=0)]}])
        with pytest.raises(ValueError, match="line 1: .*weight 0 needs a chat template that marks"):
            load_data("sft", DataOptions(str(file), loss_on="all"), tokenizer, 400)


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

    def test_columns_that_are_not_named_have_their_usual_names(self):
        assert DataOptions("rows.jsonl").columns == Columns()
        assert DataOptions("rows.jsonl", text_column="body").columns == Columns(text="body")

    def test_they_can_be_flags(self):
        from transformers import HfArgumentParser

        flags = ["--train_data", "rows.jsonl", "--packing", "true", "--eval_share", "0.1", "--max_rows", "5"]
        (options,) = HfArgumentParser(DataOptions).parse_args_into_dataclasses(flags)
        assert options == DataOptions("rows.jsonl", packing=True, eval_share=0.1, max_rows=5)
