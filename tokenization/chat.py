"""Encode chats and texts of others: control tokens come from the chat template alone.

A tokenizer finds its added tokens wherever their text stands, so `<|end|><|assistant|>` in a user's message would end the
user's turn. Here the text of a message never becomes a control token: `<|end|>` in it is encoded as the letters that it is
written with. Messages and texts without such text get the ids that `apply_chat_template` and the tokenizer give them.

How: marks are put around every text and into every control token in it, the template is rendered, and a copy of the
tokenizer encodes the result. The copy differs in one thing: its normaliser begins by deleting the marks. Added tokens are
looked for before that, and no mark is part of one.
"""

from __future__ import annotations

import copy
import re
import secrets
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers
from transformers.utils.chat_template_utils import render_jinja_template

from .loading import LONGEST_ADDED_TOKEN, TokenizerError
from .long_text import Encoded, LongTexts
from .sources import FIRST_TOKENS

# Fields of messages and of their parts that templates compare with names. No text of others is read from them.
_NAMES = ("role", "type")
_ROLES = ("system", "user", "assistant", "developer", "tool", "function")
# With one of these a template can make a control token of a text that holds none.
_REWRITES = re.compile(
    r"(?:\||\.)\s*(?:lower|upper|casefold|capitalize|title|swapcase|replace|translate|join|format|reverse|striptags|escape|e"
    r"|indent)\b"
)
_SHORT = 2**16  # characters: the tokenizer takes them at once
_MADE_BY_TEMPLATE = (
    "the chat template makes control tokens of a text that holds a part of one; remove it from the message, or correct the "
    "template"
)
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # as MARKS


def encode_chat(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    add_generation_prompt: bool = False,
    max_tokens: int | None = None,
) -> list[int]:
    """
    Encode a conversation with the tokenizer's chat template.

    Args:
        tokenizer: a fast tokenizer of Transformers with a chat template.
        messages: each with `role` and `content`, as the template wants them.
        add_generation_prompt: whether the template opens the assistant's next message.
        max_tokens: how many ids are wanted; those of a long conversation are not all computed then.

    Returns:
        Token ids. Control tokens (see `control_tokens`) stand only where the template writes them. Messages without the text
        of a control token have the ids of `apply_chat_template`.

    Raises:
        ValueError: the tokenizer has no chat template, the template fails on the conversation, a text is not valid Unicode
            (half of a surrogate pair), a role would become a control token, or the conversation is longer than the tokenizer
            can take (see `encode_text`).
    """
    return _encoded_chat(tokenizer, messages, add_generation_prompt, False, max_tokens).ids


def encode_chat_with_mask(
    tokenizer: Any, messages: Sequence[dict[str, Any]], max_tokens: int | None = None
) -> tuple[list[int], list[int]]:
    """
    Encode a conversation as `encode_chat` does, and say which tokens the assistant says.

    Returns:
        Token ids, and for each 1 where it has a character between the template's `{% generation %}` marks, else 0.

    Raises:
        ValueError: as of `encode_chat`.
    """
    found = _encoded_chat(tokenizer, messages, False, True, max_tokens)
    return found.ids, _mask(found.offsets, found.spans)


def encode_with_offsets(
    tokenizer: Any, content: str | Sequence[dict[str, Any]], max_tokens: int | None = None
) -> tuple[str, list[int], list[tuple[int, int]]]:
    """
    Encode a text as `encode_text` does, or a conversation as `encode_chat` does, and say where each token stands.

    Returns:
        The text, or the rendered conversation; token ids; and for each the characters (begin, end) that it stands for. The
        letters of a control token all have its characters.

    Raises:
        ValueError: as of `encode_text` and `encode_chat`.
    """
    if isinstance(content, str):
        found = _encoded_text(tokenizer, content, max_tokens, True)
    else:
        found = _encoded_chat(tokenizer, content, False, False, max_tokens)
    if found.marker is None:
        return found.text, found.ids, found.offsets
    marks = found.marker.places(found.text)
    offsets = [(begin - bisect_left(marks, begin), end - bisect_left(marks, end)) for begin, end in found.offsets]
    return found.marker.removed_from(found.text), found.ids, offsets


def encode_text(
    tokenizer: Any,
    text: str,
    with_control_tokens: bool = False,
    max_tokens: int | None = None,
    add_special_tokens: bool = True,
) -> list[int]:
    """
    Encode a plain text, with the tokens that the tokenizer puts around texts (this family's puts none).

    Args:
        tokenizer: a fast tokenizer of Transformers.
        text: may end in a part of a word; nothing is stripped.
        with_control_tokens: whether `<|end|>` in the text is the token, as the tokenizer gives it when it is called.
        max_tokens: how many ids are wanted; those of a long text are not all computed then.
        add_special_tokens: whether the tokens that the tokenizer puts around texts belong to it.

    Returns:
        Token ids, as the tokenizer gives them when it is called, but without `with_control_tokens` no control token comes
        from the text.

    Raises:
        ValueError: the text is not valid Unicode, or it has more than `LONGEST_WHOLE_TEXT` characters that can only be
            encoded at once.
    """
    check_unicode(text)
    rules = _rules(tokenizer)
    if with_control_tokens or (rules.pattern(False).search(text) is None and not rules.is_normalized):
        if len(text) > _SHORT:
            return rules.copy("").ids(text, max_tokens, add_special_tokens)
        return tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"][:max_tokens]
    return _encoded_text(tokenizer, text, max_tokens, add_special_tokens).ids


def _encoded_text(tokenizer: Any, text: str, max_tokens: int | None, add_special_tokens: bool) -> _Encoded:
    check_unicode(text)
    rules = _rules(tokenizer)
    marker = rules.marker([text])
    return rules.marked(marker.text(text, False), marker, max_tokens, add_special_tokens)


def control_tokens(tokenizer: Any) -> list[str]:
    """
    The tokens that no text of a message becomes.

    They are the added tokens with `special: true`, those that the tokenizer names (eos_token and the like), and the family's
    `<unk>`, `<s>` and `</s>`. Other added tokens are vocabulary: they are shown in answers, so texts may hold them. In
    messages of others than the assistant, those that the chat template writes are control tokens too.
    """
    return sorted(_rules(tokenizer).control)


def control_token_in(tokenizer: Any, content: str | Sequence[dict[str, Any]]) -> str | None:
    """The text of a control token that a plain text or the messages of a conversation hold, or None."""
    rules = _rules(tokenizer)
    messages = [{"content": content}] if isinstance(content, str) else content
    for message in messages:
        pattern = rules.pattern(message.get("role") == "assistant")
        for text in _texts(message):
            if (match := pattern.search(text)) is not None:
                return match[0]
    return None


class ChatStrings:
    """
    Chats as strings, for a library that joins rendered chats with other texts before it has them encoded.

    `render` puts a secret around the control tokens that the template writes. `encode` takes these for tokens and all others
    for letters. A string without others has the ids that the tokenizer gives it.

    Args:
        tokenizer: a fast tokenizer of Transformers.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        # No text can know it, and so none passes for the template's.
        self._secret = f"\U0001fffe{secrets.token_hex(8)}\U0001fffe"
        self._signed = re.compile(f"{self._secret}(.*?){self._secret}", re.DOTALL)

    def render(self, messages: Sequence[dict[str, Any]], render: Callable[[Sequence[dict[str, Any]]], str]) -> str:
        """
        Render a conversation, with the template's control tokens signed.

        Args:
            messages: the conversation.
            render: renders messages in the tokenizer's chat template.

        Raises:
            ValueError: a role or a part of a text would become a control token, or a text is not valid Unicode.
        """
        rules = _rules(self._tokenizer)
        risk = rules.risk(messages)
        plain = None if risk == "token" else render(messages)
        if plain is not None and not risk and not rules.has_open_forms:
            return self._sign(plain, rules.written(plain, []))
        marker = rules.marker([rules.template or "", *_texts(messages)])
        marked = render(marker.messages(messages))
        written = rules.written(marked, marker.regions(marked))
        if plain is None or marker.removed_from(marked) == plain:
            return marker.removed_from(self._sign(marked, written))
        plainly_written = rules.written(plain, [])
        if [match[0] for match in plainly_written] != [match[0] for match in written]:
            raise ValueError(_MADE_BY_TEMPLATE)
        return self._sign(plain, plainly_written)

    def _sign(self, text: str, written: list[re.Match]) -> str:
        parts, end = [], 0
        for match in written:
            parts += [text[end : match.start()], self._secret, match[0], self._secret]
            end = match.end()
        return "".join([*parts, text[end:]])

    def unsigned(self, text: str) -> str:
        """The text as the template wrote it."""
        return text.replace(self._secret, "")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """
        Encode a text that holds rendered conversations, or none.

        Raises:
            ValueError: as of `encode_text`.
        """
        check_unicode(text)
        rules = _rules(self._tokenizer)
        parts = self._signed.split(text)  # texts at even places, the template's tokens at odd ones
        texts = parts[::2]
        if not rules.is_normalized and not rules.risk([{"content": one} for one in texts]):
            return encode_text(self._tokenizer, "".join(parts), True, add_special_tokens=add_special_tokens)
        marker = rules.marker(texts)
        marked = "".join(part if place % 2 else marker.text(part, False) for place, part in enumerate(parts))
        return rules.marked(marked, marker, None, add_special_tokens).ids


def check_unicode(text: str) -> None:
    """Raise ValueError for a text with half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half of a surrogate pair ({text[error.start]!r} at character {error.start}), which stands for no "
            "character; remove it, or read the text with errors='replace'"
        ) from error


def _encoded_chat(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    add_generation_prompt: bool,
    with_spans: bool,
    max_tokens: int | None,
) -> _Encoded:
    rules = _rules(tokenizer)
    template = rules.template
    if template is None:
        raise ValueError("messages need a chat template and the tokenizer has none; set its chat_template")
    if not messages:
        raise ValueError("the conversation is empty; it needs at least one message")

    def render(chat: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        return _rendered(tokenizer, template, chat, add_generation_prompt, with_spans)

    def encoded_plain(text: str, spans: list[tuple[int, int]]) -> _Encoded:
        found = rules.plain(tokenizer, text, max_tokens)
        return _Encoded(text, found.ids, found.offsets, spans)

    risk = rules.risk(messages)
    plain = None if risk == "token" else render(messages)
    if plain is not None and not risk and not rules.has_open_forms:
        return encoded_plain(*plain)
    marker = rules.marker([template, *_texts(messages)])
    text, spans = render(marker.messages(messages))
    found = rules.marked(text, marker, max_tokens, False, spans)
    if plain is None or marker.removed_from(text) == plain[0]:
        return found
    # The template looks at what the marks have changed. No text holds a whole control token, so its own choice counts.
    plainly = encoded_plain(*plain)
    if rules.controls(plainly.ids) != rules.controls(found.ids):
        raise ValueError(_MADE_BY_TEMPLATE)
    return plainly


def _rendered(
    tokenizer: Any, template: str, messages: Sequence[dict[str, Any]], add_generation_prompt: bool, with_spans: bool
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation in the template, and where the assistant's text begins and ends."""
    try:
        rendered: Any = render_jinja_template(
            conversations=[list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=with_spans,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # a template is a program: what it raises is open
        raise ValueError(
            f"the tokenizer's chat template refuses the conversation: {str(error) or type(error).__name__}"
        ) from error
    (text,), spans = rendered
    check_unicode(text)
    return text, spans[0] if with_spans else []


def _mask(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for every token with a character inside of a span; spans and tokens are in order."""
    mask, span = [0] * len(offsets), 0
    for place, (begin, end) in enumerate(offsets):
        while span < len(spans) and begin >= spans[span][1]:
            span += 1
        if span == len(spans):
            break
        mask[place] = int(end > spans[span][0])
    return mask


@dataclass(frozen=True)
class _Encoded:
    """A text with its ids, the characters of each, where the assistant's texts are, and the marks that are in it."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    spans: Sequence[tuple[int, int]] = ()
    marker: _Marker | None = None


class _Marker:
    """Puts marks into texts. They are characters that none of the texts holds."""

    def __init__(self, marks: str, rules: _Rules):
        self.marks = marks
        self.begin, self.inside, self.end = list(marks)
        self.rules = rules
        self._all = re.compile(f"[{marks}]")

    def text(self, text: str, of_assistant: bool) -> str:
        """A text with a mark in front and behind, inside of its outer whitespace, and one in each control token."""
        stripped = text.strip()
        if not stripped:
            return text
        begin = text.index(stripped)
        broken = self.rules.pattern(of_assistant).sub(self._broken, stripped)
        return f"{text[:begin]}{self.begin}{broken}{self.end}{text[begin + len(stripped) :]}"

    def _broken(self, match: re.Match) -> str:
        token = match[0]
        return f"{token[:1]}{self.inside}{token[1:]}" if len(token) > 1 else f"{self.inside}{token}"

    def messages(self, messages: Sequence[dict[str, Any]]) -> list[Any]:
        return [self._value(message, message.get("role") == "assistant") for message in messages]

    def _value(self, value: Any, of_assistant: bool) -> Any:
        if isinstance(value, str):
            return self.text(value, of_assistant)
        if isinstance(value, dict):
            return {key: one if key in _NAMES else self._value(one, of_assistant) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self._value(one, of_assistant) for one in value]
        return value

    def places(self, text: str) -> list[int]:
        """Where the marks stand."""
        return [match.start() for match in self._all.finditer(text)]

    def is_in(self, text: str) -> bool:
        return self._all.search(text) is not None

    def removed_from(self, text: str) -> str:
        return self._all.sub("", text)

    def regions(self, text: str) -> list[tuple[int, int]]:
        """Where texts of messages stand; empty where the template has cut texts into pieces."""
        places = [(match.start(), match[0]) for match in self._all.finditer(text) if match[0] != self.inside]
        begins, ends = places[::2], places[1::2]
        is_whole = len(begins) == len(ends) and all(
            begin[1] == self.begin and end[1] == self.end for begin, end in zip(begins, ends, strict=True)
        )
        return [(begin[0], end[0]) for begin, end in zip(begins, ends, strict=True)] if is_whole else []


class _Rules:
    """What a tokenizer's control tokens are, and the copies that encode texts with marks."""

    def __init__(self, tokenizer: Any):
        self.template = _template(tokenizer)
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._copies: dict[str, LongTexts] = {}
        self._without_added_tokens: Tokenizer | None = None
        added = tokenizer.added_tokens_decoder
        if any(len(token.content) > LONGEST_ADDED_TOKEN for token in added.values()):
            raise TokenizerError(
                f"the tokenizer has an added token of more than {LONGEST_ADDED_TOKEN} characters; take the original files"
            )
        named = {*tokenizer.all_special_tokens, *FIRST_TOKENS}
        self.control = {token.content for token in added.values() if token.special or token.content in named} - {""}
        # A user must not write what the template writes, whatever its flags; in an answer it may be what the model said.
        written = {
            token.content for token in added.values() if token.content and token.content in (self.template or "")
        }
        self._patterns = {True: _any_of(self.control), False: _any_of(self.control | written)}
        # Tokens with a meaning of their own, which are not the name of a role.
        self._own = written | {token for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
        self._beginnings = {token[:length] for token in self.control | written for length in range(1, len(token))}
        self._endings = {token[-length:] for token in self.control | written for length in range(1, len(token))}
        self._lengths = sorted({len(part) for part in self._beginnings})
        # Whether a token is looked for behind the normaliser, which can make it of other letters.
        self.is_normalized = any(token.normalized for token in added.values() if token.content in self.control)
        unknown = tokenizer.unk_token
        # Letters that the vocabulary lacks become the unknown token, and should.
        self.checked_ids = {
            number for number, token in added.items() if token.content in self.control and token.content != unknown
        }
        self.has_open_forms = self.is_normalized or _REWRITES.search(self.template or "") is not None

    def pattern(self, of_assistant: bool) -> re.Pattern[str]:
        """Finds control tokens in a text, the longest first, as the tokenizer does."""
        return self._patterns[of_assistant]

    def risk(self, messages: Sequence[dict[str, Any]]) -> str:
        """
        What the texts hold: a control token ("token"), a part of one at an edge ("part"), or neither ("").

        A part could join with the template's text.

        Raises:
            ValueError: a role that templates would make a control token of, as they do with `'<|' + role + '|>'`.
        """
        risk = ""
        for message in messages:
            role = message.get("role")
            if isinstance(role, str) and role not in _ROLES:
                self._check_role(role)
            pattern = self._patterns[role == "assistant"]
            for text in _texts(message):
                if pattern.search(text) is not None:
                    return "token"
                risk = risk or ("part" if self._has_part_at_edge(text.strip()) else "")
        return risk

    def _has_part_at_edge(self, text: str) -> bool:
        return any(text[:length] in self._endings or text[-length:] in self._beginnings for length in self._lengths)

    def controls(self, ids: Iterable[int]) -> list[int]:
        """The control tokens among some ids."""
        return [token for token in ids if token in self.checked_ids]

    def _check_role(self, role: str) -> None:
        is_named = f"'{role}'" in str(self.template) or f'"{role}"' in str(self.template)
        is_part = self._has_part_at_edge(role) or any(role in token for token in self._own)
        if self._patterns[False].search(role) or (role and is_part and not is_named):
            raise ValueError(
                f"the role {role!r} is a control token or a part of one; give one of {', '.join(_ROLES)}, or a role that "
                "the chat template names"
            )

    def marker(self, texts: Iterable[str]) -> _Marker:
        """
        A marker whose marks are in none of the texts.

        Raises:
            ValueError: the texts hold nearly all characters that can be marks.
        """
        used = set().union(*texts)
        marks = "".join([character for character in _NONCHARACTERS if character not in used][:3])
        if len(marks) < 3:
            raise ValueError(
                "the texts hold nearly all of the noncharacters U+FDD0 to U+FDEF, and three of them are needed to mark "
                "control tokens; remove them"
            )
        return _Marker(marks, self)

    def plain(self, tokenizer: Any, text: str, max_tokens: int | None) -> Encoded:
        """A text that the template has written, encoded as the tokenizer does."""
        if len(text) > _SHORT:
            return self.copy("").encode(text, max_tokens, False)
        encoding = tokenizer(text, add_special_tokens=False, verbose=False).encodings[0]
        if max_tokens is not None and len(encoding) > max_tokens:
            encoding.truncate(max_tokens)
        return Encoded(encoding.ids, encoding.offsets, [])

    def written(self, text: str, regions: Sequence[tuple[int, int]]) -> list[re.Match]:
        """The control tokens in a rendered text, without those that the template made of texts (in `regions`)."""
        starts = [begin for begin, _ in regions]

        def is_of_text(begin: int) -> bool:
            region = bisect_right(starts, begin) - 1
            # What an assistant says may be a token: the marks have left it whole.
            return region >= 0 and begin < regions[region][1]

        found = self._patterns[False].finditer(text)
        return [match for match in found if match[0] not in self.control or not is_of_text(match.start())]

    def marked(
        self,
        text: str,
        marker: _Marker,
        max_tokens: int | None,
        add_special_tokens: bool,
        spans: Sequence[tuple[int, int]] = (),
    ) -> _Encoded:
        """
        Encode a text with marks, and take every control token apart that was made of text.

        Marks prevent them, but for tokens that are looked for behind the normaliser (`normalized: true`) and templates that
        rewrite texts.
        """
        encoded = self.copy(marker.marks).encode(text, max_tokens, add_special_tokens)
        regions = marker.regions(text)
        starts = [begin for begin, _ in regions]
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for token, (begin, end), name in zip(encoded.ids, encoded.offsets, encoded.tokens, strict=True):
            letters = [token]
            if token in self.checked_ids:
                region = bisect_right(starts, begin) - 1
                source = text[begin:end]
                if (region >= 0 and begin < regions[region][1]) or marker.is_in(source):
                    letters = self.letters(marker.removed_from(source), name)
            ids += letters
            offsets += [(begin, end)] * len(letters)
        return _Encoded(text, ids[:max_tokens], offsets[:max_tokens], spans, marker)

    def copy(self, marks: str) -> LongTexts:
        """A copy of the tokenizer that deletes these marks."""
        if marks in self._copies:
            return self._copies[marks]
        tokenizer = self._new_copy()
        if marks:
            without_marks = normalizers.Replace(Regex(f"[{marks}]"), "")
            original = tokenizer.normalizer
            tokenizer.normalizer = (
                without_marks if original is None else normalizers.Sequence([without_marks, original])
            )
        found = LongTexts(tokenizer)
        if marks in ("", "".join(_NONCHARACTERS[:3])):
            self._copies[marks] = found
        return found

    def letters(self, text: str, token: str) -> list[int]:
        """
        The ids of a text that the tokenizer takes for a control token.

        Raises:
            ValueError: its vocabulary makes the token of the letters, too.
        """
        if self._without_added_tokens is None:
            self._without_added_tokens = self._new_copy()
            self._without_added_tokens.encode_special_tokens = True
        ids = self._without_added_tokens.encode(text, add_special_tokens=False).ids
        if self.controls(ids):
            raise ValueError(
                f"the tokenizer makes the control token {token!r} of the text {text!r}; remove it from the message"
            )
        return ids

    def _new_copy(self) -> Tokenizer:
        tokenizer = copy.deepcopy(self._backend)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=lambda token: (-len(token), token)))) or "(?!)")


def _texts(value: Any) -> Iterator[str]:
    """All texts of messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            if key not in _NAMES:
                yield from _texts(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def _template(tokenizer: Any) -> str | None:
    return tokenizer.get_chat_template() if tokenizer.chat_template else None


_RULES: weakref.WeakKeyDictionary[Any, tuple[Any, _Rules]] = weakref.WeakKeyDictionary()


def _rules(tokenizer: Any) -> _Rules:
    """The rules of a tokenizer, made once and again when it has changed."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise TokenizerError(
            f"the tokenizer is a {type(tokenizer).__name__} without a tokenizer.json behind it; load it with "
            "grinmoe.load_tokenizer"
        )
    state = (len(tokenizer), tokenizer.chat_template, tuple(tokenizer.special_tokens_map.items()))
    known = _RULES.get(tokenizer)
    if known is None or known[0] != state:
        known = state, _Rules(tokenizer)
        _RULES[tokenizer] = known
    return known[1]
