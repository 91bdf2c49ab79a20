"""Rows of training data: told apart by their columns, and checked one by one.

Every error names the place: the file and its line, or the data set and its row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from ..tokenization import check_unicode
from .sources import shown

# The template takes more than linear time for the marks of many answers.
MOST_MESSAGES = 10_000
FORMATS = ("messages", "prompt-completion", "text", "preference")

# What the fields of a row mean here. A field that changes what other tools learn from the row is honoured or refused. A
# field that is null or empty counts as absent: a Parquet file gives every row every field.
#
# Fields of a message: `role` and `content` are the text. These four say whether the message has a loss (OpenAI, Mistral and
# Together write weight, Axolotl train or training, ms-swift loss). The metadata is ignored, a speaker's name among it, which
# chat templates have no place for. Every other field is refused.
_LOSS_SWITCHES = ("weight", "train", "training", "loss")
_MESSAGE_METADATA = frozenset(
    "id uuid message_id turn_id turn_identifier parent_id openai_id index turn timestamp created created_at updated_at date "
    "time lang language model model_name source url rank toxic redacted hash hashed_ip header country state user_id "
    "name".split()
)
# Values that ask for what happens anyway.
_NEUTRAL = {"prefix": False}
_CHAT = ("messages", "prompt-completion", "preference")
# Columns of a row that are refused, in which formats and why. Every other column that the format does not read is metadata.
_REFUSED_COLUMNS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "system system_prompt system_message system_instruction tools functions tool_choice documents chat_template "
        "chat_template_kwargs",
        _CHAT,
        "the chat template would not get it; write it into the text or the messages",
    ),
    (
        "instruction input context history suffix",
        ("prompt-completion", "preference"),
        "it belongs to the prompt elsewhere; write it into the prompt",
    ),
    ("image images video videos audio audios objects", FORMATS, "only text is trained on"),
    (
        "input_ids attention_mask position_ids token_type_ids labels loss_mask completion_mask assistant_masks",
        FORMATS,
        "text is tokenised and masked here, and tokens that are given would be left out",
    ),
    (
        "margin ref_chosen_logps ref_rejected_logps",
        ("preference",),
        "the loss takes no margin and computes the reference itself",
    ),
)
# Columns that say how much a row counts, and columns that are false where it must not be learned, with the types that say
# so: KTO's label is a boolean, and a number in it is the id of a class.
_ROW_WEIGHTS = ("weight", "sample_weight", "example_weight", "loss_weight", "loss_scale")
_ROW_SWITCHES: dict[str, tuple[type, ...]] = {"label": (bool,), "train": (bool, int, float)}
# Formats of other tools (ShareGPT, Axolotl's segments, Alpaca). A row with one of these and a format of ours is ambiguous.
_OTHER_FORMATS = (("conversations",), ("conversation",), ("segments",), ("instruction", "output"))
# Columns that hold the prompt in many sets of pairs. Where a row has no prompt, it is in one of them and not in the answers.
_QUESTIONS = ("question", "query", "problem", "post")
_OF_SHAREGPT = (
    "is of ShareGPT's form, with from and value; write them as role and content, with the roles user, assistant and system "
    "for human, gpt and system"
)

Message = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """Names of the columns that a row may have."""

    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"
    text: str = "text"
    chosen: str = "chosen"
    rejected: str = "rejected"

    def of_format(self, data_format: str) -> tuple[str, ...]:
        """What a row of this format cannot do without."""
        return {
            "messages": (self.messages,),
            "prompt-completion": (self.prompt, self.completion),
            "text": (self.text,),
            "preference": (self.chosen, self.rejected),
        }[data_format]

    def read_by(self, data_format: str) -> tuple[str, ...]:
        """All columns that are read from a row of this format."""
        return (*self.of_format(data_format), *((self.prompt,) if data_format == "preference" else ()))


def is_absent(value: Any) -> bool:
    """Whether a field is null, empty (as JSON in a string too), or holds only such. (0 and false say something.)"""
    if isinstance(value, list):
        return all(one != {} and is_absent(one) for one in value)
    if isinstance(value, dict):
        return all(map(is_absent, value.values()))
    return value is None or value in ("", "[]", "{}", "null")


def without_fields(row: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A row without some of its columns and of its messages' fields."""

    def without(value: Any) -> Any:
        if isinstance(value, list):
            return [without(one) for one in value]
        return {key: one for key, one in value.items() if key not in names} if isinstance(value, dict) else value

    return {key: without(value) for key, value in row.items() if key not in names}


def format_of(
    place: str,
    row: dict[str, Any],
    columns: Columns,
    data_format: str,
    allowed: Sequence[str],
    found: str = "",
    named: Collection[str] = (),
) -> str:
    """
    The format of a row: `data_format`, or for `"auto"` the one of `allowed` whose columns the row has and not as null.

    Args:
        named: the columns that an option names.
        found: the format of earlier rows, if there were any.

    Raises:
        ValueError: the row has not the columns (the message names those that it has), or those of two formats.
    """
    choices = [data_format] if data_format != "auto" else [found] if found else list(allowed)
    present = [choice for choice in allowed if all(column in row for column in columns.of_format(choice))]
    filled = [one for one in present if all(row[column] is not None for column in columns.of_format(one))]
    if data_format == "auto":
        # An option that names a column means its format.
        meant = [one for one in filled if set(columns.of_format(one)) & set(named)]
        filled = meant or filled
        others = [] if meant or "preference" in allowed else [one for one in _OTHER_FORMATS if _has(row, one)]
        if len(filled) + len(others) > 1:
            names = ", ".join([*filled, *(" and ".join(one) for one in others)])
            raise ValueError(
                f"{place}: the row has the columns of several formats ({names}); say which to train on with data_format, "
                "or with the option of its column"
            )
    if not set(choices) & set(filled or present):
        wanted = "; or ".join(f"{' and '.join(columns.of_format(choice))} ({choice})" for choice in choices)
        there = [str(column) for column in row if row[column] is not None]
        other = [name for name, value in row.items() if isinstance(value, list) and value and _is_sharegpt(value[0])]
        raise ValueError(
            f"{place}: its columns are {', '.join(there) or 'none'}; needed: {wanted}. Name the columns with "
            "messages_column, prompt_column, completion_column, text_column, chosen_column or rejected_column"
            + "".join(f". {name!r} {_OF_SHAREGPT}" for name in other)
        )
    return next(choice for choice in choices if choice in (filled or present))


def _has(row: dict[str, Any], names: Iterable[str]) -> bool:
    return not any(is_absent(row.get(name)) for name in names)


def check_columns(place: str, row: dict[str, Any], columns: Columns, data_format: str) -> None:
    """
    Check the columns of a row that its format does not read.

    Raises:
        ValueError: one of them belongs to the text or the tokens elsewhere, and would be left out here.
    """
    for names, formats, reason in _REFUSED_COLUMNS:
        unread = set(names.split()).difference(columns.read_by(data_format)) if data_format in formats else set()
        for name in row:
            if name in unread and not is_absent(row[name]):
                raise ValueError(
                    f"{place}: the column {name!r} is {shown(row[name])}, and {reason}. Remove the column, or name it in "
                    "ignore_fields to train without it"
                )


def check_row_loss(place: str, row: dict[str, Any], columns: Columns, data_format: str) -> None:
    """
    Check that a row counts as much as every other.

    Raises:
        ValueError: a column says that it counts more or less, or that it must not be learned.
    """
    unread = {name: value for name, value in row.items() if name not in columns.read_by(data_format)}
    for name in _ROW_WEIGHTS:
        if not is_absent(unread.get(name)) and unread[name] != 1:
            raise ValueError(
                f"{place}: the column {name!r} is {shown(unread[name])}, and all rows count alike. Repeat or remove the "
                "row, or name the column in ignore_fields to train on it once"
            )
    switches = _ROW_SWITCHES if data_format in ("messages", "prompt-completion") else {}
    for name, kinds in switches.items():
        if isinstance(unread.get(name), kinds) and unread[name] == 0:
            raise ValueError(
                f"{place}: the column {name!r} is {unread[name]!r}, so the row must not be learned. Remove the row, or name "
                "the column in ignore_fields to train on it"
            )


def checked_text(value: Any, column: str, place: str) -> str | None:
    """A text that is not blank; None for a blank one or null.

    Raises:
        ValueError: it is not a string, or not valid Unicode.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{place}: {column!r} is a string, not {shown(value)}")
    _check_characters(value, f"{place}: {column!r}")
    return value if value.strip() else None


def _check_characters(text: str, where: str) -> None:
    try:
        check_unicode(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def checked_messages(value: Any, column: str, place: str) -> list[Message] | None:
    """
    Messages of `role`, `content` and, where they are said to have a loss or none, `weight` (1 or 0); None for null.

    Text parts are joined with nothing between them. The role `developer` becomes `system`, whose place it
    takes in OpenAI's API.

    Raises:
        ValueError: no list, an empty one, or a message without a role or a content that is text, or with a field that
            would change what is learned elsewhere.
    """
    if value is None:
        return None
    if not isinstance(value, list):
        raise ValueError(f'{place}: {column!r} is a list of {{"role": ..., "content": ...}}, not {shown(value)}')
    if not value:
        raise ValueError(f"{place}: {column!r} is an empty list; a conversation has at least one message")
    if len(value) > MOST_MESSAGES:
        raise ValueError(
            f"{place}: {column!r} has {len(value)} messages, and a conversation has at most {MOST_MESSAGES}; write several "
            "rows"
        )
    return [
        _checked_message(message, f"{place}: message {i} of {column!r}") for i, message in enumerate(value, start=1)
    ]


def _checked_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f'{where} is {shown(message)}; it must be {{"role": ..., "content": ...}}')
    if _is_sharegpt(message):
        raise ValueError(f"{where} {_OF_SHAREGPT}")
    for key, field in message.items():
        known = key in ("role", "content", *_LOSS_SWITCHES) or key in _MESSAGE_METADATA
        # Where the role or the content is missing, the error below says so.
        if (
            not known
            and {"role", "content"} <= set(message)
            and not is_absent(field)
            and field != _NEUTRAL.get(key, ...)
        ):
            raise ValueError(
                f"{where} has {key}; only role, content and weight are read: remove it, write it as content, or name it in "
                "ignore_fields to train without it"
            )
    content = message.get("content")
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        content = joined_parts(content, where)
    for key, text in (("role", message.get("role")), ("content", content)):
        if not isinstance(text, str):
            had = f"has the {key} {shown(text)}" if text is not None else f"has no {key}"
            raise ValueError(f"{where} {had}; it needs a string (its keys are {', '.join(map(str, message))})")
        _check_characters(text, f"{where}, {key}")
    role = "system" if message["role"] == "developer" else message["role"]
    weight = _weight(message, where)
    return {"role": role, "content": content} | ({} if weight is None else {"weight": weight})


def _is_sharegpt(message: Any) -> bool:
    return isinstance(message, dict) and {"from", "value"} <= set(message) and not {"role", "content"} <= set(message)


def joined_parts(parts: list[dict[str, Any]], where: str) -> str:
    """
    The text of a content that is a list of parts: one behind the other, nothing between.

    Raises:
        ValueError: a part is not text.
    """
    for number, part in enumerate(parts, start=1):
        others = [key for key in part if key not in ("type", "text") and not is_absent(part[key])]
        if part.get("type") != "text" or not isinstance(part.get("text"), str) or others:
            with_others = f" with {', '.join(others)}" if others else ""
            raise ValueError(
                f"{where} has a content part {number} of type {part.get('type')!r}{with_others}; "
                'only {"type": "text", "text": ...} is read: remove it, or write it as text'
            )
    return "".join(part["text"] for part in parts)


def _weight(message: dict[str, Any], where: str) -> int | None:
    """Whether a message has a loss: 1, 0, or None where it does not say."""
    said = {name: message[name] for name in _LOSS_SWITCHES if message.get(name) is not None}
    for name, value in said.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise ValueError(f"{where} has {name}={value!r}; a message has a loss or none: give 0 or 1")
    if len(set(said.values())) > 1:
        shown = " and ".join(f"{name}={value!r}" for name, value in said.items())
        raise ValueError(f"{where} has {shown}, which contradict each other; give one of them")
    return int(next(iter(said.values()))) if said else None


def masked_messages(messages: list[Message], has_loss: Sequence[bool], where: str, can_mask: bool = True) -> list[int]:
    """
    Indices of the assistant's messages whose weight of 0 takes their loss away.

    Args:
        messages: of [`checked_messages`].
        has_loss: for each message, whether its tokens have a loss where no weight says otherwise.
        where: names the messages in an error.
        can_mask: whether the loss can leave out a message of the assistant.

    Raises:
        ValueError: a weight that the loss cannot follow.
    """
    masked = []
    for index, (message, loss) in enumerate(zip(messages, has_loss, strict=True)):
        weight, role = message.get("weight"), message["role"]
        if weight is None or bool(weight) == loss:
            continue
        if weight == 0 and can_mask and role == "assistant":
            masked.append(index)
            continue
        if weight == 1:
            reason = "it has no loss: only answers of the assistant have one, and no message of a prompt"
        elif can_mask:
            reason = "every token has a loss here; only messages of the assistant can be left out"
        else:
            reason = "the preference loss compares whole answers"
        raise ValueError(
            f"{where}: message {index + 1}, of role {role!r}, has weight {weight}, but {reason}; remove the weight"
        )
    return masked


def without_weights(messages: list[Message]) -> list[Message]:
    """The messages with role and content alone."""
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def checked_turns(value: Any, column: str, place: str) -> str | list[Message] | None:
    """A text or messages, whichever it is; None for a blank text or null."""
    if isinstance(value, list):
        return checked_messages(value, column, place)
    return checked_text(value, column, place)


def continued(prompt: list[Message], answer: list[Message], where: str) -> list[Message]:
    """
    The conversation of a prompt and an answer to it.

    An answer that begins with all of the prompt's messages is the whole conversation, as many data sets have it: the
    prompt is taken once, with the weights of both copies.

    Raises:
        ValueError: the answer repeats the prompt in part, or begins with a question although one is open.
    """
    common = sum(1 for _ in takewhile(_is_same, zip(prompt, answer, strict=False)))
    if common == len(prompt) < len(answer):
        return [one | other for one, other in zip(prompt, answer, strict=False)] + answer[common:]
    role = answer[0]["role"]
    if common or role == "system" or role == prompt[-1]["role"] == "user":
        raise ValueError(
            f"{where} begins with {shown(answer[0]['content'])} of role {role!r}, behind a prompt that ends with role "
            f"{prompt[-1]['role']!r}; give the answer alone, or a whole conversation: all of the prompt's messages as they "
            "are, and the answer behind them"
        )
    return prompt + answer


def _is_same(pair: tuple[Message, Message]) -> bool:
    """Whether two messages say the same and have no weights that contradict."""
    one, other = pair
    return one | other == other | one


@dataclass(frozen=True)
class Preference:
    """A pair: all three texts, or all three lists of messages."""

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]


def checked_preference(row: dict[str, Any], columns: Columns, place: str) -> Preference | None:
    """
    The pair of a row, None where a part of it is empty.

    Answers in messages may be whole conversations. The prompt is then what both begin with, and all of it where the prompt
    is given as messages. Texts without a prompt column are whole, too.

    Raises:
        ValueError: texts and messages are mixed, whole conversations or texts have no common beginning, one answer repeats
            the prompt in messages and the other does not, or both repeat the prompt as text.
    """
    chosen = checked_turns(row[columns.chosen], columns.chosen, place)
    rejected = checked_turns(row[columns.rejected], columns.rejected, place)
    prompt = checked_turns(row.get(columns.prompt), columns.prompt, place)
    if chosen is None or rejected is None:
        return None
    if isinstance(chosen, str) != isinstance(rejected, str) or (isinstance(chosen, str) and isinstance(prompt, list)):
        raise ValueError(
            f"{place}: {columns.prompt!r}, {columns.chosen!r} and {columns.rejected!r} must be all texts or all messages"
        )
    if isinstance(chosen, str) and isinstance(rejected, str):
        if columns.prompt not in row:
            return _pair_of_whole_texts(row, chosen, rejected, columns, place)
        return None if prompt is None else _pair_of_texts(str(prompt), chosen, rejected, columns, place)
    assert isinstance(chosen, list) and isinstance(rejected, list)
    if isinstance(prompt, list):
        return _pair_of_messages(prompt, {columns.chosen: chosen, columns.rejected: rejected}, columns, place)
    whole = {columns.chosen: chosen, columns.rejected: rejected}
    chosen, rejected = without_weights(chosen), without_weights(rejected)
    common = common_length(chosen[:-1], rejected[:-1])
    if common == 0:
        raise ValueError(
            f"{place}: {columns.chosen!r} and {columns.rejected!r} do not begin with the same message, so they are no whole "
            f"conversations; give the prompt as messages in the column {columns.prompt!r}"
        )
    for name, messages in whole.items():
        has_loss = [place >= common for place in range(len(messages))]
        masked_messages(messages, has_loss, f"{place}: {name!r}", can_mask=False)
    return Preference(chosen[:common], chosen[common:], rejected[common:])


def _pair_of_messages(
    prompt: list[Message], answers: dict[str, list[Message]], columns: Columns, place: str
) -> Preference:
    """The pair of a prompt and two answers in messages, by their columns."""
    asked, whole, repeating = len(prompt), dict[str, list[Message]](), []
    for name, answer in answers.items():
        whole[name] = continued(prompt, answer, f"{place}: {name!r}")
        if len(whole[name]) == len(answer):
            repeating.append(name)
        has_loss = [i >= asked for i in range(len(whole[name]))]
        masked_messages(whole[name], has_loss, f"{place}: {columns.prompt!r} and {name!r}", can_mask=False)
    if len(repeating) == 1:
        (other,) = answers.keys() - repeating
        raise ValueError(
            f"{place}: {repeating[0]!r} repeats the messages of {columns.prompt!r}, and {other!r} not; give both as answers "
            "alone, or both as whole conversations"
        )
    chosen, rejected = (without_weights(messages[asked:]) for messages in whole.values())
    return Preference(without_weights(prompt), chosen, rejected)


def whole_texts_prompt(chosen: str, rejected: str) -> str:
    """What two whole texts begin with: cut before their first difference and a space, where TRL's `extract_prompt` cuts."""
    common = common_length(chosen, rejected)
    shorter = min(len(chosen), len(rejected))
    if common == shorter:
        common = shorter - 1  # something is left of both
    elif chosen[:common].endswith(" "):
        common -= 1
    return chosen[:common]


def _pair_of_whole_texts(row: dict[str, Any], chosen: str, rejected: str, columns: Columns, place: str) -> Preference:
    """The pair of two texts that begin with their prompt, as Anthropic/hh-rlhf has them."""
    asking = next((name for name in _QUESTIONS if isinstance(row.get(name), str) and row[name].strip()), None)
    if asking is not None:
        raise ValueError(
            f"{place}: the row has a {asking!r} and no {columns.prompt!r}; name the prompt's column with prompt_column, or "
            f"name {asking!r} in ignore_fields where the texts begin with the prompt"
        )
    prompt = whole_texts_prompt(chosen, rejected)
    if not prompt.strip():
        raise ValueError(
            f"{place}: the row has no {columns.prompt!r}, and its texts do not begin alike, so the prompt is not in them "
            f"({shown(chosen)}, {shown(rejected)}); name the prompt's column with prompt_column"
        )
    return Preference(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def _pair_of_texts(prompt: str, chosen: str, rejected: str, columns: Columns, place: str) -> Preference:
    """The pair of three texts. Answers to one or two words may well begin with them."""
    if len(prompt.split()) > 2 and chosen.startswith(prompt) and rejected.startswith(prompt):
        raise ValueError(
            f"{place}: {columns.chosen!r} and {columns.rejected!r} both begin with the {columns.prompt!r} {shown(prompt)}, "
            f"which would be read twice; cut it off them, or name {columns.prompt!r} in ignore_fields: without it, the "
            "common beginning of the texts is the prompt"
        )
    return Preference(prompt, chosen, rejected)


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many elements two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
