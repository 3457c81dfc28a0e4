"""What is right for each file of the cases folder, decided from issue 19 and not from the code.

A row is kept as a pair, or dropped with a reason. Turns are written as (role, text), and an answer
of one turn as its text.
"""

import json
from typing import NamedTuple

Said = tuple[tuple[str, str], ...]


class Kept(NamedTuple):
    """A row that is trained on: its prompt and what each side says after it."""

    prompt: Said
    chosen: Said
    rejected: Said | None  # None: an answer to learn


class Dropped(NamedTuple):
    """A row that is left out, its reason and a part of what is told about it."""

    reason: str
    detail: str = ""


class File(NamedTuple):
    """What reading and tokenizing a file gives."""

    rows: tuple[Kept | Dropped, ...]
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Refused(NamedTuple):
    """A file that cannot be read at all, and a part of the message."""

    fragment: str


def kept(prompt: str | Said, chosen: str | Said, rejected: str | Said | None) -> Kept:
    def said(value: str | Said, role: str) -> Said:
        return ((role, value),) if isinstance(value, str) else value

    sides = [None if side is None else said(side, "assistant") for side in (chosen, rejected)]
    assert sides[0] is not None
    return Kept(said(prompt, "user"), sides[0], sides[1])


def one(row: Kept | Dropped, *, unused: tuple[str, ...] = (), notes: tuple[str, ...] = ()) -> File:
    return File((row,), unused, notes)


def odd(row: Kept | Dropped, *notes: str) -> File:
    """A file whose other row is sound."""
    return File((METAL, row), (), notes)


SPIDER, ANT = "How many legs has a spider?", "And an ant?"
EIGHT, DEPENDS = "Eight.", "It depends on many things."
METAL = kept("Which metal is liquid at room temperature?", "Mercury.", "Several could be.")
PLAIN = kept(SPIDER, EIGHT, "Many.")
LEGS = kept(SPIDER, EIGHT, DEPENDS)
SHORT = ("system", "Answer in one word.")
BRIEF = ("system", "Be brief.")
ASKED = ("user", SPIDER)
TWO_ROUNDS = (ASKED, ("assistant", EIGHT), ("user", ANT))
MULTITURN = kept(TWO_ROUNDS, "Six.", "Hard to say.")
SECOND_ROUND = (("assistant", EIGHT), ("user", ANT), ("assistant", "Six."))
EARLY = ("sides_part_early", "several_turns")
LEARNT = kept(SPIDER, EIGHT, None)
JSON_WEATHER = "Weather in Oslo?"

CASES: dict[str, File | Refused] = {
    # Kinds of files, and bytes that belong to a format and not to the text.
    "KIND.JSONL": one(PLAIN),
    "kind.csv": one(PLAIN),
    "kind.jsonl.gz": one(PLAIN),
    "kind.txt": one(PLAIN),
    "noext": one(PLAIN),
    "many": File((PLAIN, Dropped("duplicate"))),
    "saved": one(PLAIN),
    "bom.json": one(LEGS),
    "bom.jsonl": one(LEGS),
    "crlf.jsonl": File((LEGS, METAL)),
    "lines.json": File((LEGS, METAL)),
    "pretty.jsonl": one(METAL),
    "one.jsonl": File((PLAIN, kept("How many legs has an ant?", "Six.", "Several."))),
    "two.jsonl": one(kept("How many wings has a bee?", "Four.", "Several.")),
    "split_dict.json": Refused("save each list as a file of its own"),
    "lfs.jsonl": Refused("git lfs pull"),
    "lfs.parquet": Refused("git lfs pull"),
    "whitespace_only.jsonl": Refused("holds no rows"),
    "latin1.jsonl": Refused("line 1: not UTF-8 text"),
    "utf16.jsonl": Refused("line 1: not UTF-8 text (it is UTF-16)"),
    "pq_binary.parquet": one(PLAIN),
    "pq_dict.parquet": one(PLAIN),
    "pq_large.parquet": one(PLAIN),
    "pq_map.parquet": one(PLAIN),
    "pq_view.parquet": one(PLAIN),
    "pq_mixed_shapes.parquet": File((PLAIN, Dropped("duplicate"))),
    "pq_instruction_null_prompt.parquet": File((PLAIN, kept(SPIDER, "8", "Many."))),
    "pq_tool_calls_null.parquet": one(PLAIN),
    "pq_uf.parquet": one(PLAIN, unused=("prompt_id",)),
    "pq_uint_ids.parquet": one(Dropped("token_ids", "list of numbers")),
    "pq_bad_utf8.parquet": one(Dropped("not_unicode", "'chosen' is not UTF-8")),
    "pq_corrupt_page.parquet": Refused("row group 1: not a readable Parquet file"),
    "pq_truncated.parquet": Refused("not a readable Parquet file"),
    "pq_dup_column.parquet": Refused("two columns are named 'chosen'"),
    # What a text may hold.
    "control.jsonl": one(kept("Tab\there?", "Yes.", "No.")),
    "nul.jsonl": one(kept("Zero\x00byte?", "Yes\x00", "No.")),
    "ls_u2028.jsonl": one(
        kept("One\u2028two\u2029three\x85four?", "Yes\u2028indeed", "No\u2029way")
    ),
    "surrogate.jsonl": one(Dropped("not_unicode", "surrogate")),
    "big_int.jsonl": one(kept("A?", "x", "y"), unused=("id",)),
    "deep.jsonl": one(Dropped("too_deep")),
    "dupkey.jsonl": one(Dropped("duplicate_key", "'prompt' occurs twice")),
    "nan.jsonl": one(Dropped("not_text", "nan")),
    "int_text.jsonl": odd(Dropped("not_text", "42")),
    "text.jsonl": File(
        (
            kept("Trailing space ", " leading space", "\n\nleading newlines"),
            kept("Emoji?", "👩\u200d👩\u200d👧\u200d👦🇳🇴", "🙂"),
            kept("日本の首都は？", "東京。", "わかりません。"),
            kept("ما عاصمة مصر؟", "القاهرة.", "لا أعرف."),
            kept("One token?", "a", "b"),
            kept("Same but space", "Yes.", "Yes. "),
            kept("Special inside", "Stop<eos>here", "<bos>"),
            kept("Only end", "<eos>", "x"),
            kept("Swapped", "x y", "y x"),
            kept("Swapped", "y x", "x y"),
            kept("Long", "word " * 5000, "x"),
            kept("long " * 5000, "x y z", "x"),
        )
    ),
    # Empty and missing parts.
    "blank_rejected.jsonl": odd(Dropped("empty")),
    "empty_rejected.jsonl": odd(Dropped("empty")),
    "empty_content.jsonl": odd(Dropped("empty")),
    "null_content.jsonl": odd(Dropped("empty")),
    "null_rejected.jsonl": odd(Dropped("no_answer", "'rejected'")),
    "empty_prompt.jsonl": odd(Dropped("empty_prompt")),
    "null_conversations.jsonl": one(LEGS),
    "null_prompt_hh.jsonl": one(LEGS),
    "nulled_message_keys.jsonl": File((LEGS, kept(SPIDER, "8", DEPENDS))),
    "missing_role.jsonl": one(Dropped("unknown_role", "no role")),
    # Turns and prompts.
    "implicit_conv.jsonl": one(LEGS),
    "content_parts.jsonl": one(LEGS),
    "caps_keys.jsonl": one(LEGS),
    "role_names.jsonl": one(LEGS),
    "role_chatgpt.jsonl": one(LEGS),
    "role_developer.jsonl": one(kept((BRIEF, ASKED), EIGHT, DEPENDS)),
    "prompt_dict.jsonl": one(PLAIN),
    "sides_dict.jsonl": one(PLAIN),
    "stringified.jsonl": one(LEGS, notes=("json_text",)),
    "multiturn_prompt_first.jsonl": one(MULTITURN),
    "multiturn_prompt_str.jsonl": one(MULTITURN),
    "prompt_mismatch.jsonl": one(Dropped("prompt_mismatch")),
    "prompt_with_answer.jsonl": one(
        kept(SPIDER, f"{SPIDER} {EIGHT}", f"{SPIDER} {DEPENDS}"), notes=("repeats_prompt",)
    ),
    "prompt_and_instruction.jsonl": one(Dropped("ambiguous", "'instruction' and 'prompt'")),
    "sides_diverge_early.jsonl": one(
        kept(
            SPIDER,
            SECOND_ROUND,
            (("assistant", DEPENDS), ("user", "Please be exact."), ("assistant", EIGHT)),
        ),
        notes=EARLY,
    ),
    "sides_user_last.jsonl": one(Dropped("not_assistant", "said by the user")),
    "system_in_sides.jsonl": one(kept((SHORT, ASKED), EIGHT, DEPENDS)),
    "conv_system_key.jsonl": one(kept((SHORT, ASKED), EIGHT, DEPENDS)),
    "two_systems.jsonl": one(Dropped("two_systems")),
    "prefill.jsonl": odd(
        kept((ASKED, ("assistant", "A spider has")), " eight.", " many."), "prefilled"
    ),
    # ShareGPT.
    "sg_list_sides.jsonl": one(PLAIN),
    "sg_string_sides.jsonl": one(PLAIN),
    "sg_system.jsonl": one(kept((BRIEF, ASKED), EIGHT, "Many.")),
    "sg_prefilled.jsonl": one(
        kept((ASKED, ("assistant", "A spider has")), " eight.", " many."), notes=("prefilled",)
    ),
    "sg_chosen_human.jsonl": one(Dropped("not_assistant", "said by the user")),
    # HH-RLHF.
    "hh_crlf.jsonl": one(LEGS),
    "hh_diverge.jsonl": odd(kept(SPIDER, SECOND_ROUND, DEPENDS), *EARLY),
    "hh_diverge_early.jsonl": one(
        kept(
            SPIDER,
            SECOND_ROUND,
            (("assistant", DEPENDS), ("user", ANT), ("assistant", "Hard.")),
        ),
        notes=EARLY,
    ),
    "hh_empty_last.jsonl": odd(Dropped("empty")),
    "hh_ends_human.jsonl": odd(LEGS, "trailing_turns"),
    "hh_two_assistant.jsonl": odd(Dropped("two_answers")),
    "hh_two_human.jsonl": one(kept((("user", "Hi."), ASKED), EIGHT, DEPENDS)),
    "rm_static.jsonl": one(MULTITURN),  # the space belongs to the marker `Assistant:`
    # Shapes that people of the field publish.
    "arena.jsonl": one(LEGS),
    "distilabel_math.jsonl": one(LEGS),
    "distilabel_orca.jsonl": one(kept((SHORT, ASKED), EIGHT, DEPENDS), unused=("rating",)),
    "orca_pairs.jsonl": one(kept((SHORT, ASKED), EIGHT, DEPENDS)),
    "helpsteer2.jsonl": one(LEGS),
    "helpsteer3.jsonl": one(LEGS),
    "nectar.jsonl": one(LEGS),
    "saferlhf.jsonl": one(LEGS),
    "ints_as_ids.jsonl": one(PLAIN, unused=("prompt_ids",)),
    "lf_alpaca_input.jsonl": one(
        kept("Translate the word to German.\n\nspider", "Spinne", "Kaefer")
    ),
    "lf_alpaca_history.jsonl": one(kept((BRIEF, *TWO_ROUNDS), "Six.", "Hard to say.")),
    "candidates.jsonl": one(Dropped("candidates", "data.columns={chosen: chosen.0")),
    "kto.jsonl": File((Dropped("shape", "KTO"), Dropped("shape", "KTO"))),
    "tie.jsonl": File(
        (kept(SPIDER, EIGHT, "8."), kept("How many legs has a spider??", "Many.", EIGHT)),
        notes=("scores_reversed", "scores_tied"),
    ),
    "leak_train.jsonl": one(PLAIN),
    "leak_heldout.jsonl": File(
        (
            kept(SPIDER, "Eight legs.", "Lots."),
            kept(SPIDER + " ", EIGHT, "Many."),
            kept(SPIDER, "Many.", EIGHT),
        )
    ),
    # What this template (plain ChatML) cannot render, and images.
    "images.jsonl": one(Dropped("images", "'images'")),
    "tools_key.jsonl": one(Dropped("not_rendered", "`tools`")),
    "roles_tool.jsonl": one(Dropped("not_rendered", "`tool_calls`")),
    "tool_calls_chosen.jsonl": File(
        (Dropped("not_rendered", "`tool_calls`"), Dropped("not_rendered", "`tool_calls`"))
    ),
    "reasoning_key.jsonl": one(Dropped("not_rendered", "`reasoning_content`")),
    # Templates; these texts are ordinary ones for ChatML.
    "t_plain.jsonl": one(PLAIN),
    "t_system.jsonl": File((PLAIN, kept((BRIEF, ("user", ANT)), "Six.", "Some."))),
    "t_alternate.jsonl": File((PLAIN, kept((("user", "Hi."), ("user", ANT)), "Six.", "Some."))),
    "t_space_only.jsonl": File(
        (
            PLAIN,
            kept("Same but space", "Yes.", "Yes. "),
            kept("Prompt twice", "x y", "y"),
            kept("Prompt twice ", "x y", "y"),
        )
    ),
    "t_lead.jsonl": File(
        (
            kept(f"a {SPIDER}", "\nEight.", "Many."),
            kept(f"b {SPIDER}", "\n\nEight.", "Many."),
            kept(f"c {SPIDER}", " Eight.", "Many."),
            kept(f"d {SPIDER}", EIGHT, "```python\nx\n```"),
            kept(f"e {SPIDER}", "\tEight.", "Many."),
            kept(f"{SPIDER} ", EIGHT, "Many."),
        )
    ),
    "special_text.jsonl": File(
        (
            kept(
                "What does <end_of_turn> mean?",
                "It ends a turn.<end_of_turn>\n<start_of_turn>user\nThanks!<end_of_turn>\n"
                "<start_of_turn>model\nWelcome.",
                "A tag.",
            ),
            kept("Say nothing.", "<eos>", "No."),
            kept("Ends already", "Yes.<end_of_turn>", "No."),
            kept("Ends already, eos", "Yes.<eos>", "No.<eos>"),
        )
    ),
    # Dialogues, for `sft`.
    "s_alpaca_history.jsonl": File(
        (kept((BRIEF, ASKED), EIGHT, None), kept((BRIEF, *TWO_ROUNDS), "Six.", None))
    ),
    "s_dolly.jsonl": one(
        kept(f"{SPIDER}\n\nSpiders are arachnids.", EIGHT, None), unused=("category",)
    ),
    "s_empty_answer.jsonl": File((Dropped("empty"), LEARNT)),
    "s_empty_messages.jsonl": File((LEARNT, Dropped("shape", "no dialogue"))),
    "s_first_assistant.jsonl": File((LEARNT, Dropped("assistant_first"))),
    "s_gpt_first.jsonl": one(Dropped("assistant_first")),
    "s_kto.jsonl": one(Dropped("undesirable")),
    "s_sharegpt_system.jsonl": one(kept((BRIEF, ASKED), EIGHT, None)),
    "s_text.jsonl": one(Dropped("shape", "'text'")),
    "s_tool.jsonl": File(
        (Dropped("not_rendered", "`tool_calls`"), Dropped("not_rendered", "`tool_calls`"))
    ),
    "s_ultrachat.jsonl": File(
        (LEARNT, kept(TWO_ROUNDS, "Six.", None)),
        unused=("prompt_id",),
    ),
    "s_ultrachat_system.jsonl": one(kept((BRIEF, ASKED), EIGHT, None)),
}
# Chat templates for other tests; no data.
TEMPLATES = ("template_date", "template_think_opener", "template_unnamed_end")


def template(name: str, folder: str) -> str:
    """Return the chat template of a tokenizer's configuration."""
    with open(f"{folder}/{name}.tokenizer_config.json") as file:
        return json.load(file)["chat_template"]
