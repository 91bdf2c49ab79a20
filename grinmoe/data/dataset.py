"""Training data for `grinmoe sft`, `dpo` and `pretrain`: from rows of text to rows of tokens, and how many became what.

Every process reads the data by itself and gets the same rows in the same order: nothing is drawn, cached or shared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, pairwise, takewhile
from typing import TYPE_CHECKING, Any

from ..files import require_packages
from ..tokenization import control_token_in, encode_chat, encode_chat_with_mask, encode_text
from .formats import (
    FORMATS,
    Columns,
    Message,
    Preference,
    check_columns,
    check_row_loss,
    checked_messages,
    checked_preference,
    checked_text,
    checked_turns,
    common_length,
    continued,
    format_of,
    masked_messages,
    whole_texts_prompt,
    without_fields,
    without_weights,
)
from .packing import NO_LOSS, Samples, arrow_table, packed, wrapped
from .sources import PlacedRow, is_local, read_rows

if TYPE_CHECKING:
    from datasets import Dataset

# Token ids and labels of one sample.
Sample = tuple[list[int], list[int]]
# The formats that a task trains on; where a row could be several, the first one is meant.
TASK_FORMATS = {
    "sft": ("messages", "prompt-completion", "text"),
    "dpo": ("preference",),
    "pretrain": ("text", "messages", "prompt-completion"),
}


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DataOptions:
    """What to train on, and what becomes of it. Wrong values are a `ValueError` that names the option."""

    train_data: str = field(
        metadata={"help": "a .json, .jsonl or .parquet file, a folder of them, or a data set of the Hub"}
    )
    eval_data: str | None = _option(None, "the same for evaluation")
    eval_share: float = _option(0.0, "without eval_data: share of the training rows to hold out, by a hash of the row")
    train_split: str = _option("train", "split of a Hub data set to train on")
    eval_split: str | None = _option(
        None, "split of a Hub data set to evaluate on: of eval_data (there validation by default), or of train_data"
    )
    data_config: str | None = _option(None, "configuration (subset) of a Hub data set")
    data_revision: str | None = _option(None, "branch, tag or commit of a Hub data set")
    data_format: str = _option("auto", f"auto (by the columns), {', '.join(FORMATS)}")
    messages_column: str | None = _option(None, "column with a list of messages (role, content) (default: messages)")
    prompt_column: str | None = _option(None, "column with the prompt, a text or messages (default: prompt)")
    completion_column: str | None = _option(
        None, "column with the completion, a text or messages (default: completion)"
    )
    text_column: str | None = _option(None, "column with plain text (default: text)")
    chosen_column: str | None = _option(None, "column with the better answer, a text or messages (default: chosen)")
    rejected_column: str | None = _option(None, "column with the worse answer, a text or messages (default: rejected)")
    ignore_fields: str | None = _option(
        None, "columns and fields of messages to leave out, separated by commas, where a row would be refused for them"
    )
    max_length: int = _option(2048, "longest row, in tokens")
    too_long: str = _option("truncate", "what to do with a longer sample: truncate its end, or drop it")
    packing: bool | None = _option(
        None, "several samples to a row that do not see each other; by default for pretrain only. Not for dpo"
    )
    loss_on: str = _option(
        "assistant", "assistant: the assistant's messages, or the completion, or all of a text; all: every token"
    )
    control_tokens_in_texts: bool | None = _option(
        None,
        "whether <|end|> in texts that are not messages is the token; by default it is the letters of it, with a warning",
    )
    max_rows: int | None = _option(None, "read no more than this many rows of each data set, for a trial")

    def __post_init__(self):
        for name, allowed in {
            "data_format": ("auto", *FORMATS),
            "too_long": ("truncate", "drop"),
            "loss_on": ("assistant", "all"),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose {', '.join(allowed)}")
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"eval_share={self.eval_share} is no share of the rows; give a number from 0 to below 1")
        if self.max_length < 2:
            raise ValueError(f"max_length={self.max_length}: a row needs 2 tokens to have one that is predicted")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows={self.max_rows}: give 1 or more, or leave it out")
        if self.eval_share > 0 and (self.eval_data is not None or self.eval_split is not None):
            raise ValueError("eval_share holds out training rows; give it, or eval_data and eval_split, not both")
        if self.eval_split is not None and is_local(self.eval_data or self.train_data):
            raise ValueError(
                f"eval_split={self.eval_split!r}: files have no splits; give the evaluation's file as eval_data"
            )

    @property
    def columns(self) -> Columns:
        """The columns' names."""
        return Columns(**self._named)

    @property
    def named_columns(self) -> frozenset[str]:
        """The columns that an option names, by its usual name or another."""
        return frozenset(self._named.values())

    @property
    def _named(self) -> dict[str, str]:
        given = {one.name: getattr(self, f"{one.name}_column") for one in dataclasses.fields(Columns)}
        return {name: column for name, column in given.items() if column is not None}


@dataclass
class Counts:
    """What became of the rows of one part. For dpo a token counts once per answer that it is read with."""

    rows_read: int = 0
    rows_empty: int = 0
    rows_dropped_too_long: int = 0
    rows_truncated: int = 0
    rows_without_target: int = 0
    rows_identical: int = 0
    rows_with_letters: int = 0
    samples: int = 0
    rows: int = 0
    tokens: int = 0
    target_tokens: int = 0

    def summary(self) -> str:
        """One line: what is there, and everything that was left out or shortened."""
        parts = [
            f"{self.samples} samples of {self.rows_read} rows, {self.tokens} tokens, {self.target_tokens} of them targets"
        ]
        if self.rows != self.samples:
            parts.append(f"in {self.rows} packed rows")
        for count, what in (
            (self.rows_truncated, "truncated to max_length"),
            (self.rows_dropped_too_long, "dropped for being too long"),
            (self.rows_without_target, "dropped without a target token"),
            (self.rows_empty, "empty"),
            (self.rows_identical, "with the same answer chosen and rejected"),
            (self.rows_with_letters, "with the text of a control token, encoded as letters"),
        ):
            if count:
                parts.append(f"{count} {what}")
        return "; ".join(parts)


@dataclass(frozen=True)
class DataReport:
    """What became of the data."""

    task: str
    data_format: str
    max_length: int
    train: Counts
    evaluation: Counts | None

    def summary(self) -> str:
        """A line for training and one for evaluation."""
        lines = [f"training data ({self.data_format}, at most {self.max_length} tokens): {self.train.summary()}"]
        if self.evaluation is not None:
            lines.append(f"evaluation data: {self.evaluation.summary()}")
        return "\n".join(lines)


@dataclass(frozen=True)
class PreparedData:
    """Rows to train and to evaluate on.

    sft and pretrain: `input_ids` and `labels` (int32 lists of one length; -100 where there is no loss) and, packed,
    `position_ids`, which begin again at 0 with every sample. They go to `RowCollator`. dpo: `prompt`, `chosen` and
    `rejected`, texts or messages, which [`pair_ids`] tokenises.
    """

    train: Dataset
    evaluation: Dataset | None
    report: DataReport


def load_data(task: str, options: DataOptions, tokenizer: Any, vocab_size: int) -> PreparedData:
    """
    Read, check, tokenise and pack.

    Args:
        task: sft, dpo or pretrain.
        options: see [`DataOptions`].
        tokenizer: of `grinmoe.load_tokenizer`; with a chat template where the data are messages.
        vocab_size: rows of the model's embedding.

    Raises:
        ValueError: anything wrong with the options, the files or a row, which is named; a tokenizer with more ids than the
            model has; or nothing left to train or to evaluate on.
        ImportError: `datasets` is not installed.
    """
    require_packages("train", "datasets")
    import datasets

    if task not in TASK_FORMATS:
        raise ValueError(f"task={task!r} is unknown; choose {', '.join(TASK_FORMATS)}")
    if task == "dpo" and options.packing:
        raise ValueError("packing=True: preference pairs are not packed; leave it out")
    if options.data_format not in ("auto", *TASK_FORMATS[task]):
        raise ValueError(
            f"data_format={options.data_format!r} is not for {task}, which trains on {', '.join(TASK_FORMATS[task])}"
        )
    if (largest := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {largest} and the model {vocab_size} embeddings: they do not belong together; "
            "load the tokenizer of the model's own folder"
        )
    encoder = _Encoder(task, options, tokenizer)

    def prepared(part: str) -> tuple[Dataset, Counts, str]:
        rows = _Rows(options, part, TASK_FORMATS[task])
        table, counts = (_preference_table if task == "dpo" else _token_table)(rows, encoder)
        if not counts.samples:
            raise rows.nothing_left(counts)
        return datasets.Dataset(table), counts, rows.data_format

    def told(part: str) -> tuple[Dataset, Counts, str]:
        encoder.first_letters = ""
        found = prepared(part)
        if encoder.first_letters:
            warnings.warn(
                f"{found[1].rows_with_letters} rows for {part} hold the text of a control token, encoded as letters; "
                f"the first is {encoder.first_letters}. Where texts are chats in the template's form, set "
                "control_tokens_in_texts=True, or write them as messages; False says that letters are meant",
                stacklevel=3,
            )
        return found

    train, train_counts, data_format = told("training")
    evaluation, eval_counts = None, None
    if options.eval_data or options.eval_split or options.eval_share:
        evaluation, eval_counts, _ = told("evaluation")
    report = DataReport(task, data_format, options.max_length, train_counts, eval_counts)
    return PreparedData(train, evaluation, report)


class _Rows:
    """The rows of one part, with their places: read anew by every iteration. Knows their format after the first."""

    def __init__(self, options: DataOptions, part: str, formats: Sequence[str]):
        self.options, self.part, self.formats = options, part, formats
        self.source, self.split = options.train_data, options.train_split
        if part == "evaluation" and options.eval_data is not None:
            self.source, self.split = options.eval_data, options.eval_split or "validation"
        elif part == "evaluation" and options.eval_split is not None:
            self.split = options.eval_split
        self.data_format = ""

    def __iter__(self) -> Iterator[PlacedRow]:
        options, columns = self.options, self.options.columns
        rows = read_rows(self.source, self.split, options.data_config, options.data_revision)
        ignored = {name.strip() for name in (options.ignore_fields or "").split(",")} - {""}
        for place, row in islice(rows, options.max_rows):
            row = without_fields(row, ignored) if ignored else row
            self.data_format = format_of(
                place, row, columns, options.data_format, self.formats, self.data_format, options.named_columns
            )
            check_columns(place, row, columns, self.data_format)
            check_row_loss(place, row, columns, self.data_format)
            wants_held_out = self.part == "evaluation"
            if not options.eval_share or held_out(_question_of(row, columns), options.eval_share) == wants_held_out:
                yield place, row
        if not self.data_format:
            raise ValueError(f"{self.source} has no rows")

    def nothing_left(self, counts: Counts) -> ValueError:
        """What to raise where no row is left."""
        remedy = ""
        if counts.rows_read == 0:
            remedy = (
                f"eval_share={self.options.eval_share} of so few rows leaves none for it; choose another, or more rows"
            )
        elif counts.rows_without_target:
            remedy = (
                "all labels are masked: no token of any row has a loss. Check the roles (a conversation needs a message of "
                "the assistant), loss_on, and whether max_length cuts the answers off"
            )
        elif counts.rows_dropped_too_long:
            remedy = f"raise max_length={self.options.max_length}, or set too_long to truncate"
        elif counts.rows_empty:
            remedy = f"their columns are empty ({', '.join(self.options.columns.of_format(self.data_format))})"
        return ValueError(f"nothing is left for {self.part} of {self.source}: {counts.summary()}; {remedy}")


def held_out(text: str, share: float) -> bool:
    """Whether a text is in the held-out part. A hash decides, so the part does not depend on order, seed or machine."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _question_of(row: dict[str, Any], columns: Columns) -> str:
    """What the row asks, as JSON: one question with two answers stays in one part."""
    names = (columns.prompt, columns.messages, columns.chosen, columns.text)
    value = next((row[name] for name in names if row.get(name) is not None), None)
    chosen, rejected = row.get(columns.chosen), row.get(columns.rejected)
    if row.get(columns.prompt) is None and isinstance(chosen, str) and isinstance(rejected, str):
        # Up to the line of the answers, since their own beginnings may be alike, too.
        prompt = whole_texts_prompt(chosen, rejected)
        value = prompt.rpartition("\n")[0] or prompt
    if isinstance(value, list):
        # Without the turns' metadata, which differs where the question is the same.
        turns = [
            {key: turn[key] for key in ("role", "content") if key in turn} if isinstance(turn, dict) else turn
            for turn in value
        ]
        asked = takewhile(lambda turn: not isinstance(turn, dict) or turn.get("role") != "assistant", turns)
        value = list(asked) or turns
    return json.dumps(value, sort_keys=True, default=str)


class _Encoder:
    """Rows to tokens, as one task wants them."""

    def __init__(self, task: str, options: DataOptions, tokenizer: Any):
        self.task, self.options, self.tokenizer = task, options, tokenizer
        packing = task == "pretrain" if options.packing is None else options.packing
        # In pretraining with packing a document goes on in the next row; otherwise one token more tells what is too long.
        self.is_cut = packing and task == "pretrain"
        self.wanted = None if self.is_cut else options.max_length + 1
        # Every token of pretraining is a target.
        self.only_answers = task == "sft" and options.loss_on == "assistant"
        # Place and token of the first text that looks like a control token and is not one.
        self.first_letters = ""
        self.has_marks = bool(re.search(r"\{%[-+]?\s*generation\b", tokenizer.chat_template or ""))

    def count_letters(self, place: str, row: dict[str, Any], data_format: str, counts: Counts) -> None:
        """Count a row whose plain text holds the text of a control token: it may be a chat in the template's form."""
        if self.options.control_tokens_in_texts is not None:
            return
        columns = self.options.columns
        texts = [row.get(name) for name in {columns.prompt: 0} | dict.fromkeys(columns.of_format(data_format))]
        end = self.tokenizer.eos_token or ""
        for text in texts:
            if isinstance(text, str) and (token := control_token_in(self.tokenizer, text.removesuffix(end))):
                counts.rows_with_letters += 1
                self.first_letters = self.first_letters or f"{token!r} in {place}"
                return

    def sample(self, data_format: str, place: str, row: dict[str, Any]) -> Sample | None:
        """Token ids and labels of a row; None where it is empty."""
        columns = self.options.columns
        if data_format == "messages":
            messages = checked_messages(row[columns.messages], columns.messages, place)
            where = f"{place}: {columns.messages!r}"
            return None if messages is None else self._conversation(messages, place, where)
        if data_format == "text":
            text = checked_text(row[columns.text], columns.text, place)
            if text is None:
                return None
            ids = self.text_ids(text, place)
            return ids, ids
        prompt = checked_turns(row[columns.prompt], columns.prompt, place)
        completion = checked_turns(row[columns.completion], columns.completion, place)
        if prompt is None or completion is None:
            return None
        if isinstance(prompt, list) and isinstance(completion, list):
            where = f"{place}: {columns.prompt!r} and {columns.completion!r}"
            messages = continued(prompt, completion, f"{place}: {columns.completion!r}")
            return self._conversation(messages, place, where, asked=len(prompt))
        if isinstance(prompt, list) or isinstance(completion, list):
            raise ValueError(
                f"{place}: {columns.prompt!r} and {columns.completion!r} must be both texts or both messages"
            )
        ids = self.text_ids(prompt + completion, place)
        # Not the prompt's own length: tokens may merge across the border, and then the answer begins with the merged one.
        begins = common_length(self.ids(prompt, place), ids) if self.only_answers else 0
        return ids, [NO_LOSS] * begins + ids[begins:]

    def _conversation(self, messages: list[Message], place: str, where: str, asked: int = 0) -> Sample:
        """Token ids and labels; the first `asked` messages are a prompt, which has no loss where only answers have one."""
        has_loss = [True] * len(messages)
        if self.only_answers:
            has_loss = [i >= asked and message["role"] == "assistant" for i, message in enumerate(messages)]
        masked = masked_messages(messages, has_loss, where)
        messages = without_weights(messages)
        if not self.only_answers and not masked:
            ids = self._chat_ids(messages, place)
            return ids, ids
        if self.tokenizer.chat_template and not self.has_marks:
            what = "loss_on='assistant'" if self.only_answers else f"{place}: a message of weight 0"
            raise ValueError(
                f"{what} needs a chat template that marks what the assistant says ({{% generation %}}); "
                "grinmoe.load_tokenizer gives the family's own one such marks, and loss_on='all' needs none without weights"
            )
        with _placed(place):
            # The spans of weights are counted in the whole conversation.
            ids, is_said = encode_chat_with_mask(self.tokenizer, messages, None if masked else self.wanted)
        is_target = list(is_said) if self.only_answers else [1] * len(ids)
        if self.only_answers and asked:
            prompt = self._chat_ids(messages[:asked], place, add_generation_prompt=True)
            begins = common_length(prompt, ids)
            is_target[:begins] = [0] * begins
        for begin, end in self._said_spans(messages, is_said, place, masked):
            is_target[begin:end] = [0] * (end - begin)
        return ids, [token if target else NO_LOSS for token, target in zip(ids, is_target, strict=True)]

    @staticmethod
    def _said_spans(
        messages: list[Message], is_said: list[int], place: str, wanted: list[int]
    ) -> list[tuple[int, int]]:
        """Where the tokens of some of the assistant's messages begin and end."""
        if not wanted:
            return []
        edges = [i for i, (one, other) in enumerate(pairwise([0, *is_said, 0])) if one != other]
        speaking = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(edges) != 2 * len(speaking):
            raise ValueError(
                f"{place}: the chat template marks {len(edges) // 2} texts, and the assistant has {len(speaking)} messages: "
                "a weight of 0 has no tokens that are known to be its own; correct its {% generation %} marks"
            )
        spans = dict(zip(speaking, zip(edges[::2], edges[1::2], strict=True), strict=True))
        return [spans[i] for i in wanted]

    def _chat_ids(self, messages: list[Message], place: str, add_generation_prompt: bool = False) -> list[int]:
        with _placed(place):
            return encode_chat(self.tokenizer, messages, add_generation_prompt, self.wanted)

    def text_ids(self, text: str, place: str) -> list[int]:
        """Token ids of a text that ends here."""
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ValueError("the tokenizer has no end-of-text token, which ends every text; set its eos_token")
        return [*self.ids(text.removesuffix(self.tokenizer.eos_token), place), end]

    def ids(self, text: str, place: str) -> list[int]:
        """Token ids of a text."""
        with _placed(place):
            return encode_text(self.tokenizer, text, bool(self.options.control_tokens_in_texts), self.wanted)

    def answers(self, pair: Preference, place: str) -> list[Sample]:
        """Prompt with the chosen answer, and with the rejected one, as DPOTrainer will get them."""
        begins, whole = self.pair(pair, place)
        return [(ids, [NO_LOSS] * begins + ids[begins:]) for ids in whole]

    def pair(self, pair: Preference, place: str) -> tuple[int, list[list[int]]]:
        """How many ids are the prompt's, and the ids of the prompt with the chosen answer and with the rejected one."""
        both = (pair.chosen, pair.rejected)
        if isinstance(pair.prompt, str):
            prompt = self.ids(pair.prompt, place)
            whole = [self.text_ids(pair.prompt + str(answer), place) for answer in both]
        else:
            prompt = self._chat_ids(pair.prompt, place, add_generation_prompt=True)
            whole = [self._chat_ids([*pair.prompt, *answer], place) for answer in both]
        return min(common_length(prompt, ids) for ids in whole), whole


def pair_ids(row: dict[str, Any], options: DataOptions, tokenizer: Any) -> dict[str, list[int]]:
    """
    Tokenise a pair of `load_data`, as TRL's DPOTrainer wants its rows.

    TRL's own way takes `<|end|>` in a text for the token; here control tokens come from the chat template alone.

    Args:
        row: `prompt`, `chosen` and `rejected`, all texts or all messages.
        options: those that the row was loaded with.
        tokenizer: the one that it was loaded with.

    Returns:
        `prompt_ids`, `chosen_ids` and `rejected_ids`; prompt and answer together have at most `max_length` ids.
    """
    pair = Preference(row["prompt"], row["chosen"], row["rejected"])
    begins, (chosen, rejected) = _Encoder("dpo", options, tokenizer).pair(pair, "a pair of the training data")
    end = options.max_length
    return {"prompt_ids": chosen[:begins], "chosen_ids": chosen[begins:end], "rejected_ids": rejected[begins:end]}


@contextmanager
def _placed(place: str) -> Iterator[None]:
    """Name the place of a row in the errors of the tokenizer."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _fitting(samples: list[Sample] | None, options: DataOptions, is_cut: bool, counts: Counts) -> list[Sample] | None:
    """The samples of one row, no longer than `max_length`; None where the row is left out. Counts what became of it.

    `is_cut`: whether packing cuts long samples.
    """
    counts.rows_read += 1
    if samples is None:
        counts.rows_empty += 1
        return None
    if not is_cut and any(len(ids) > options.max_length for ids, _ in samples):
        if options.too_long == "drop":
            counts.rows_dropped_too_long += 1
            return None
        counts.rows_truncated += 1
        samples = [(ids[: options.max_length], labels[: options.max_length]) for ids, labels in samples]
    if any(all(label == NO_LOSS for label in labels[1:]) for _, labels in samples):
        counts.rows_without_target += 1
        return None
    return samples


def _token_table(rows: _Rows, encoder: _Encoder) -> tuple[Any, Counts]:
    """Table of token rows for sft and pretrain."""
    options, counts, samples = encoder.options, Counts(), Samples()
    packing = encoder.task == "pretrain" if options.packing is None else options.packing
    is_cut = encoder.is_cut
    for place, row in rows:
        encoder.count_letters(place, row, rows.data_format, counts)
        sample = encoder.sample(rows.data_format, place, row)
        for ids, labels in _fitting(sample and [sample], options, is_cut, counts) or ():
            samples.append(ids, labels)
    pack = wrapped if is_cut else packed
    table = arrow_table(samples, pack(samples, options.max_length) if packing else None)
    counts.samples, counts.rows, counts.tokens = len(samples), table.num_rows, len(samples.input_ids)
    counts.target_tokens = int((table["labels"].combine_chunks().values.to_numpy() != NO_LOSS).sum())
    return table, counts


def _preference_table(rows: _Rows, encoder: _Encoder) -> tuple[Any, Counts]:
    """Table of pairs for dpo. What DPOTrainer would drop without a word is dropped here, and counted."""
    import pyarrow

    counts = Counts()
    pairs: list[dict[str, Any]] = []
    for place, row in rows:
        encoder.count_letters(place, row, rows.data_format, counts)
        pair = checked_preference(row, encoder.options.columns, place)
        both = None if pair is None else encoder.answers(pair, place)
        answers = _fitting(both, encoder.options, False, counts)
        if pair is None or answers is None:
            continue
        if answers[0] == answers[1]:
            counts.rows_identical += 1
            continue
        counts.tokens += sum(len(ids) for ids, _ in answers)
        counts.target_tokens += sum(label != NO_LOSS for _, labels in answers for label in labels)
        pairs.append(dataclasses.asdict(pair))
        if isinstance(pairs[0]["prompt"], str) != isinstance(pair.prompt, str):
            raise ValueError(f"{place}: earlier pairs were {'texts' if isinstance(pair.prompt, list) else 'messages'}")
    counts.samples = counts.rows = len(pairs)
    return pyarrow.Table.from_pylist(pairs), counts
