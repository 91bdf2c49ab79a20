"""The chat template renders what the released one renders, marks what the assistant says, and refuses what it cannot say."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import grinmoe.tokenization.template as template
from grinmoe.tokenization import build_tokenizer, chat_template, template_difference

RELEASED = (Path(template.__file__).parent / "released_chat_template.jinja").read_text(encoding="utf-8")
TEXT = ["Hello there, how are you today?", "two  spaces\nand lines", "Yes. No. Good question!"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TEXT, vocab_size=400)


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation of these contents, user and assistant in turn."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.mark.parametrize(
    "messages, generate, expected",
    [
        (
            chat("Hi", "Hello.", "Bye", system="Be brief."),
            True,
            "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello.<|end|>\n"
            "<|user|>\nBye<|end|>\n<|assistant|>\n",
        ),
        (chat("Hi", "Hello."), False, "<|user|>\nHi<|end|>\n<|assistant|>\nHello.<|end|>\n<|endoftext|>"),
        (chat("Hi", system=""), True, "<|user|>\nHi<|end|>\n<|assistant|>\n"),
    ],
    ids=["multi-turn", "complete", "empty system"],
)
def test_rendered(tokenizer, messages, generate, expected):
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate) == expected


messages_of_any_kind = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant"]),
            "content": st.text(alphabet=" \n\t\r\xa0ab{}%'\"<|end>😀", max_size=12) | st.just("<|end|>"),
        }
    ),
    min_size=1,
    max_size=5,
)


@settings(deadline=None, max_examples=200)
@given(messages=messages_of_any_kind, generate=st.booleans())
def test_byte_equal_to_the_released_template(tokenizer, messages, generate):
    ours, released = (
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate, chat_template=template)
        for template in (chat_template(), RELEASED)
    )
    assert ours == released


def marked(tokenizer, messages) -> list[list[int]]:
    """The runs of ids that the assistant mask marks."""
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    runs: list[list[int]] = [[]]
    for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        if mask:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def what_the_assistant_says(tokenizer, content: str) -> list[int]:
    """Ids of an answer and its end. (Whitespace in front belongs to the token that opens the answer.)"""
    return [*tokenizer(content.lstrip()).input_ids, tokenizer.convert_tokens_to_ids("<|end|>")]


class TestAssistantMask:
    @pytest.mark.parametrize("turns", [1, 2, 5])
    def test_marks_exactly_the_assistants_tokens(self, tokenizer, turns):
        answers = [f"Good question {turn}!" for turn in range(turns)]
        contents = [text for answer in answers for text in ("Hello there, <|end|> how?", answer)]
        messages = chat(*contents, system="Say yes.")
        assert marked(tokenizer, messages) == [what_the_assistant_says(tokenizer, answer) for answer in answers]

    @pytest.mark.parametrize("answer", ["", "  ", " Yes", "\n\nYes\n", "😀 yes", "{{ yes }}", "Yes.\n\n\nNo."])
    def test_no_token_of_the_frame_is_marked_whatever_the_answer_begins_with(self, tokenizer, answer):
        """The tokenizer counts whitespace behind <|assistant|> to that token, which must stay unmarked."""
        assert marked(tokenizer, chat("Hi", answer, "So?", "No.")) == [
            what_the_assistant_says(tokenizer, text) for text in (answer, "No.")
        ]

    def test_a_truncated_chat_keeps_what_is_left_of_the_mask(self, tokenizer):
        messages = chat("Hi", "Good question!")
        whole = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        cut = tokenizer.apply_chat_template(
            messages,
            return_dict=True,
            return_assistant_tokens_mask=True,
            truncation=True,
            max_length=8,
        )
        assert cut["input_ids"] == whole["input_ids"][:8]
        assert cut["assistant_masks"] == whole["assistant_masks"][:8] and 1 in cut["assistant_masks"]

    def test_a_question_alone_marks_nothing(self, tokenizer):
        assert marked(tokenizer, chat("Hi")) == []


def test_trl_trains_on_the_assistants_tokens_alone(tokenizer, tiny_model, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    messages = chat("Hello", " Good question!", "So?", "Yes.", system="Be brief.")
    arguments = SFTConfig(
        str(tmp_path), assistant_only_loss=True, report_to="none", use_cpu=True, bf16=False, dataloader_pin_memory=False
    )
    trainer = SFTTrainer(
        tiny_model(vocab_size=400),
        args=arguments,
        train_dataset=Dataset.from_list([{"messages": messages}] * 2),
        processing_class=tokenizer,
    )
    labels = next(iter(trainer.get_train_dataloader()))["labels"][0]
    expected = [token for answer in ("Good question!", "Yes.") for token in what_the_assistant_says(tokenizer, answer)]
    assert labels[labels != -100].tolist() == expected


@pytest.mark.parametrize(
    "message, says",
    [
        (
            {"role": "tool", "content": "x"},
            "message 2 has the role tool; this chat template knows system, user and assis",
        ),
        ({"content": "x"}, "message 2 has the role "),
        (
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
            r"message 2 \(user\) .* not a string; join its text",
        ),
        ({"role": "assistant", "content": None}, r"message 2 \(assistant\) .* not a string"),
        ({"role": "assistant"}, r"message 2 \(assistant\) .* not a string"),
        ({"role": "user", "content": 3}, r"message 2 \(user\) .* not a string"),
    ],
    ids=["role", "no role", "parts", "None", "no content", "number"],
)
def test_what_it_cannot_say_is_refused_with_a_remedy(tokenizer, message, says):
    with pytest.raises(jinja2.TemplateError, match=says):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}, message], tokenize=False)


def test_the_marks_are_spelled_as_programs_look_for_them():
    """Some strip or search them letter by letter; without them any Jinja renders the template, whatever it trims."""
    text = chat_template()
    assert text.count("{% generation %}") == text.count("{% endgeneration %}") == 1
    for mark in ("{% generation %}", "{% endgeneration %}"):
        text = text.replace(mark, "")
    messages = chat("Hi", " Hello.", "Bye", "", system="Be brief.")
    expected = jinja2.Environment().from_string(RELEASED).render(messages=messages, eos_token="<|endoftext|>")
    for trim, lstrip in itertools.product((True, False), repeat=2):
        environment = jinja2.Environment(trim_blocks=trim, lstrip_blocks=lstrip)
        assert environment.from_string(text).render(messages=messages, eos_token="<|endoftext|>") == expected


class TestTemplateDifference:
    def with_template(self, tokenizer, template: str):
        other = build_tokenizer(TEXT, vocab_size=400)
        other.chat_template = template
        return other

    def test_none_for_what_renders_alike(self, tokenizer):
        assert template_difference(tokenizer) is None
        assert template_difference(self.with_template(tokenizer, RELEASED)) is None

    @pytest.mark.parametrize(
        "change, says",
        [
            (("<|end|>\n", "<|end|>"), "it renders"),
            (("eos_token", "bos_token"), "it renders"),
            (("'system' and message['content']", "'system'"), "it renders"),
            (("message['content']", "message['text']"), "it fails on"),
            (("{{ eos_token }}", "{{ raise_exception('no') }}"), r"it fails on .*\(no\)"),
        ],
    )
    def test_the_first_difference_is_told(self, tokenizer, change, says):
        changed = RELEASED.replace(*change)
        assert changed != RELEASED
        difference = template_difference(self.with_template(tokenizer, changed))
        assert difference is not None and re.search(says, difference)
