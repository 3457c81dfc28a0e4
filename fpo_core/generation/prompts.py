"""From questions to prompts, turn by turn: a later turn's prompt contains the earlier answers."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from fpo_core.bench.model import Question
from fpo_core.data.conversations.model import Message
from fpo_core.data.render import ChatFormat
from fpo_core.errors import FPOError
from fpo_core.generation.answers import Backend, Generated, Prompt, prompt_seed

log = logging.getLogger("fpo.stage")

NAMED_IN_ERROR = 3
SHOWN_IDS = 8


class Wanted(NamedTuple):
    """Which answers are wanted to each question."""

    temperatures: tuple[float, ...]
    samples: int  # at each temperature; at 0 they would all be the same: one
    seed: int
    own: Mapping[str, float] | None = None  # the one temperature of each question, by its id

    def each(self, question_id: str) -> Iterator[tuple[float, int]]:
        """Temperature and sample number of each answer to a question."""
        temperatures = self.temperatures if self.own is None else (self.own[question_id],)
        for temperature in temperatures:
            for sample in range(self.samples if temperature > 0 else 1):
                yield temperature, sample


def answer_questions(
    backend: Backend, questions: Sequence[Question], wanted: Wanted, chat: ChatFormat | None
) -> Iterator[Generated]:
    """Answer all turns of some questions, as the answers come.

    Args:
        backend: answers.
        questions: the questions.
        wanted: which answers to each.
        chat: chat template and tokenizer; None for an endpoint, which has its own.
    """
    said: dict[tuple[str, float, int], tuple[str, ...]] = {
        (question.id, *one): () for question in questions for one in wanted.each(question.id)
    }
    for turn in range(max((len(question.turns) for question in questions), default=0)):
        prompts = _prompts(questions, turn, said, wanted.seed, chat)
        for answer in backend.generate(prompts):
            key = answer.prompt.question_id, answer.prompt.temperature, answer.prompt.sample
            said[key] += (answer.text,)
            yield answer


def _prompts(
    questions: Sequence[Question],
    turn: int,
    said: dict[tuple[str, float, int], tuple[str, ...]],
    seed: int,
    chat: ChatFormat | None,
) -> list[Prompt]:
    asked = {question.id: question.turns for question in questions if turn < len(question.turns)}
    keys = [key for key in said if key[0] in asked]
    dialogues = [dialogue(asked[key[0]], said[key]) for key in keys]
    if chat is None:
        ids: list[list[int]] = [[] for _ in keys]
    else:
        ids = chat.ids([chat.prompt_text(messages) for messages in dialogues])
    return [
        Prompt(
            name, turn, temperature, sample,
            prompt_seed(seed, name, turn, temperature, sample), messages, row,
        )
        for (name, temperature, sample), messages, row in zip(keys, dialogues, ids, strict=True)
    ]  # fmt: skip


def dialogue(asked: Sequence[str], said: Sequence[str]) -> tuple[Message, ...]:
    """The conversation up to the question that follows the last answer."""
    messages: list[Message] = []
    for question, answer in zip(asked, said, strict=False):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return (*messages, {"role": "user", "content": asked[len(said)]})


def check_questions(questions: Sequence[Question]) -> None:
    """Refuse questions that cannot be told apart, or that ask nothing.

    Raises:
        FPOError: naming them.
    """
    if not questions:
        raise FPOError("there is no question to answer")
    counts = Counter(question.id for question in questions)
    _refuse([name for name, count in counts.items() if count > 1], "an id that occurs twice")
    silent = [q.id for q in questions if not q.turns or not all(t.strip() for t in q.turns)]
    _refuse(silent, "a turn without text")


def check_prompts(
    questions: Sequence[Question], chat: ChatFormat, max_new_tokens: int, context: int
) -> None:
    """Refuse prompts that the model cannot take, before it is loaded.

    Args:
        questions: the questions.
        chat: chat template and tokenizer.
        max_new_tokens: longest answer, which a later turn's prompt contains.
        context: tokens that the model can take.

    Raises:
        FPOError: naming the questions.
    """
    _check_bos(questions, chat)
    long, too_long = [], []
    for question in questions:
        first, last = (
            len(ids)
            for ids in chat.ids(
                [
                    _text(chat, question, dialogue(question.turns, ("a",) * turn))
                    for turn in (0, len(question.turns) - 1)
                ]
            )
        )
        if first >= context:
            too_long.append(question.id)
        elif last + (len(question.turns) - 1) * max_new_tokens >= context:
            long.append(question.id)
    _refuse(too_long, f"a prompt that fills the model's context of {context} tokens, which leaves "
            f"no room for an answer")  # fmt: skip
    _refuse(long, f"turns that with earlier answers of max_new_tokens={max_new_tokens} fill the "
            f"model's context of {context} tokens (lower max_new_tokens)")  # fmt: skip


def _check_bos(questions: Sequence[Question], chat: ChatFormat) -> None:
    """Exactly one BOS in front where the tokenizer writes one, never two."""
    texts = [_text(chat, question, dialogue(question.turns, ())) for question in questions]
    prompts, bos = chat.ids(texts), chat.tokenizer.bos_token_id
    log.info("first prompt: %d tokens, begins with %s", len(prompts[0]), prompts[0][:SHOWN_IDS])
    if bos is None:
        return
    bare = chat.tokenizer("a")["input_ids"]
    if bare[:1] == [bos]:
        _refuse(
            [q.id for q, ids in zip(questions, prompts, strict=True) if ids[:1] != [bos]],
            f"a prompt that does not begin with BOS ({bos}), which the tokenizer writes in front "
            f"of other text (take a chat template that writes it, data.template)",
        )
    _refuse(
        [q.id for q, ids in zip(questions, prompts, strict=True) if ids[:2] == [bos, bos]],
        f"a prompt with BOS ({bos}) twice in front (mend the chat template)",
    )


def _text(chat: ChatFormat, question: Question, messages: tuple[Message, ...]) -> str:
    try:
        return chat.prompt_text(messages)
    except FPOError as error:
        raise FPOError(f"question {question.id!r}: {error}") from error


def _refuse(names: Sequence[str], what: str) -> None:
    if not names:
        return
    more = f" and {len(names) - NAMED_IN_ERROR} more" if len(names) > NAMED_IN_ERROR else ""
    raise FPOError(f"questions with {what}: {', '.join(map(repr, names[:NAMED_IN_ERROR]))}{more}")
