"""Rows of a training file as conversations, and the tokens of each with what the model is to learn of it marked."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from worker.failures import ConfigFailure
from worker.prompts import Renderer

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, str]
Row = Mapping[str, Any]


class LeftOut(Exception):
    """A row that nothing can be learned from; the words say why, the same ones for every row of its kind."""


@dataclass(frozen=True)
class Sample:
    """One row as tokens. `spans`: first and past-last index of each stretch that is learned, never index 0."""

    number: int
    """Its place in the dataset, counted from 1."""
    ids: array[int]
    spans: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """How many of its tokens are learned."""
        return sum(end - start for start, end in self.spans)


# --- rows as messages ------------------------------------------------------------------------------------------------


def messages(row: Row) -> list[Message]:
    """The conversation of a row, by the fields it has; LeftOut when it has none that are known, or no reply."""
    for needed, read in _FORMS:
        if all(row.get(name) is not None for name in needed):
            found = read(row)
            break
    else:
        raise LeftOut(f"no known fields: {' or '.join(' + '.join(needed) for needed, _ in _FORMS)}")
    if not any(message["role"] == "assistant" for message in found):
        raise LeftOut("no turn of the assistant")
    return found


def _of_messages(row: Row) -> list[Message]:
    return _checked(row["messages"])


def _of_prompt(row: Row) -> list[Message]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _pair(prompt, completion)
    return _checked([*_listed(prompt), *_listed(completion)])


def _of_question(row: Row) -> list[Message]:
    return _pair(str(row["question"]), str(row["answer"]))


def _of_instruction(row: Row) -> list[Message]:
    asked = [str(row["instruction"]), str(row.get("input") or "")]
    return _pair("\n\n".join(filter(None, asked)), str(row["output"]))


_FORMS: tuple[tuple[tuple[str, ...], Callable[[Row], list[Message]]], ...] = (
    (("messages",), _of_messages),
    (("prompt", "completion"), _of_prompt),
    (("question", "answer"), _of_question),
    (("instruction", "output"), _of_instruction),
)


def _pair(asked: str, answered: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _checked(given: Any) -> list[Message]:
    """Messages with a role and text each; LeftOut for anything else, such as images or tool calls."""
    found = []
    for message in _listed(given):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise LeftOut(f"a message without one of the roles {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise LeftOut("a message whose content is not text")
        found.append({"role": str(message["role"]), "content": message["content"]})
    if not found:
        raise LeftOut("no messages")
    return found


# --- messages as tokens ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """Turns conversations into samples, with the template that the model is asked with."""

    renderer: Renderer
    end_ids: frozenset[int]
    """Tokens that end a completion of this model."""
    max_length: int

    def encode(self, number: int, row: Row) -> Sample:
        """The row's tokens and what is learned of them: each reply of the assistant, to the token that ends it.

        The mask comes from the template itself: rendered up to a turn as the model is asked for it, and with the turn.
        Replies are tokenized by themselves, as the model makes them. Raises LeftOut; nothing is ever cut short.
        """
        ids: list[int] = []
        spans = []
        for text, is_reply in self._pieces(messages(row)):
            piece = self._ids(text, first=not ids)
            learned = self._to_end(piece) if is_reply else 0
            if learned:
                spans.append((len(ids), len(ids) + learned))
            ids += piece
        if not spans:
            raise LeftOut("nothing to learn: every reply is empty")
        if len(ids) > self.max_length:
            raise LeftOut(f"more than {self.max_length} tokens")
        self._refuse_double_bos(ids, number)
        return Sample(number, array("i", ids), tuple(spans))

    def _pieces(self, chat: Sequence[Message]) -> list[tuple[str, bool]]:
        """The conversation's text cut where replies begin and end; joined, it is what the template writes."""
        if self.renderer.plain:
            return self._plain_pieces(chat)
        pieces: list[tuple[str, bool]] = []
        text = ""
        for index, message in enumerate(chat):
            if message["role"] != "assistant" or not message["content"].strip():
                continue
            if index == 0:
                raise LeftOut("the assistant speaks first")
            asked = self._text(chat[:index])
            told = self._text(chat[: index + 1], add_generation_prompt=False)
            if not (asked.startswith(text) and told.startswith(asked)):
                raise LeftOut("the template writes earlier turns another way once there are later ones")
            pieces += [(asked[len(text) :], False), (told[len(asked) :], True)]
            text = told
        return pieces

    def _text(self, chat: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The template's text; LeftOut for a conversation that it refuses, as some do with a system message."""
        try:
            return self.renderer.text(chat, add_generation_prompt)
        except ConfigFailure as refusal:
            raise LeftOut(refusal.message.rstrip(".")) from refusal

    def _plain_pieces(self, chat: Sequence[Message]) -> list[tuple[str, bool]]:
        if [message["role"] for message in chat] != ["user", "assistant"]:
            raise LeftOut("without a template only one question with one reply can be learned")
        if not chat[0]["content"]:
            raise LeftOut("an empty question")
        return [(chat[0]["content"], False), (chat[1]["content"], True)]

    def _ids(self, text: str, *, first: bool) -> list[int]:
        """Tokens of a piece. Without a template the tokenizer adds what it adds to a text, and we the end."""
        tokenizer = self.renderer.tokenizer
        if not self.renderer.plain:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if first:
            return list(tokenizer(text)["input_ids"])
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    def _to_end(self, piece: list[int]) -> int:
        """How many tokens of a reply are learned: up to its end token; what the template writes after it is not."""
        last = max((index for index, token in enumerate(piece) if token in self.end_ids), default=None)
        if last is None:
            raise ConfigFailure(
                "The template closes a reply with no end-of-sequence token of this model, so a model trained with it "
                "would never stop. Nothing was trained.",
                "Use the template the model was made with: --set chat_template=FILE.jinja",
            )
        return last + 1

    def _refuse_double_bos(self, ids: list[int], number: int) -> None:
        bos = self.renderer.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise ConfigFailure(
                f"Row {number} begins with {self.renderer.tokenizer.bos_token} twice. Nothing was trained.",
                "Write it in one place: leave it out of the messages or the template.",
            )


def shown(sample: Sample, tokenizer: Any, most: int = 1500) -> str:
    """The sample as the model sees it, what is learned between 【 and 】; the middle of a long one is left out."""
    text, at = "", 0
    for start, end in sample.spans:
        text += f"{_decoded(tokenizer, sample.ids[at:start])}【{_decoded(tokenizer, sample.ids[start:end])}】"
        at = end
    text += _decoded(tokenizer, sample.ids[at:])
    if len(text) > most:
        text = f"{text[: most // 2]} … {text[-most // 2 :]}"
    return f"row {sample.number}: {len(sample)} tokens, {sample.targets} of them learned\n{text}"


def _decoded(tokenizer: Any, ids: array[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
