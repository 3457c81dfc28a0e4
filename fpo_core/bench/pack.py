"""A benchmark's pack: a folder with its questions, baseline answers, judge prompts and rules.

A pack says in ``pack.yaml`` what its files are; a folder that has none, and has the files of an
original by their own names, is taken as it is. All that can be wrong with the files is told when
the pack is read, before a model generates or a judge is paid.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BeforeValidator, Field, ValidationError

from fpo_core.bench import contents, prompts
from fpo_core.errors import FPOError
from fpo_core.models.source import cache_folder
from fpo_core.recipe.base import Settings
from fpo_core.validation import explain

PACK_FILE = "pack.yaml"
Kind = Literal["alpaca_eval", "arena_hard", "mt_bench", "ifeval"]
KINDS: tuple[str, ...] = get_args(Kind)
_READERS = {
    "alpaca_eval": (contents.alpaca_question, contents.alpaca_answer),
    "arena_hard": (contents.arena_question, contents.arena_answer),
    "mt_bench": (contents.mt_bench_question, contents.mt_bench_answer),
    "ifeval": (contents.ifeval_question, None),
}
# What files a pack of a kind has: the first it must have, the others it may.
ROLES = {
    "alpaca_eval": (("questions",), ("baseline", "gamed")),
    "arena_hard": (("questions",), ("baseline", "judge")),
    "mt_bench": (("questions",), ("references", "judge")),
    "ifeval": (("questions",), ("punkt_tab",)),
}


class Pack(NamedTuple):
    """A pack that was read and checked."""

    name: str  # such as "arena-hard-v0.1"
    kind: str  # "alpaca_eval", "arena_hard", "mt_bench" or "ifeval"
    folder: Path
    files: dict[str, Path]  # by role: "questions", "baseline", "references", "judge", …
    digest: str  # sha256 over the contents of all files


class PackFile(Settings):
    """One file of a pack."""

    path: str = Field(min_length=1, description="in the pack's folder")
    url: str | None = Field(default=None, pattern="^https?://", description="where it came from")
    sha256: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="of its content; checked when read"
    )


class PackSettings(Settings):
    """What ``pack.yaml`` says."""

    name: str = Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$", description="shown with its scores")
    kind: Kind = Field(description="whose rules are used")
    files: dict[
        str,
        Annotated[
            PackFile,
            BeforeValidator(lambda value: {"path": value} if isinstance(value, str) else value),
        ],
    ] = Field(description="by role: a file's name, or its path, url and sha256")
    licence: str = Field(default="", description="of the files")
    notes: str = Field(default="", description="for a reader")


class Layout(NamedTuple):
    """How an original names its files."""

    name: str
    kind: Kind
    files: dict[str, str]  # by role
    optional: tuple[str, ...] = ()  # roles that may be absent


_FASTCHAT = "fastchat/llm_judge/data"
LAYOUTS = (
    Layout(
        "arena-hard-v0.1", "arena_hard",
        {"questions": "question.jsonl", "baseline": "gpt-4-0314.jsonl",
         "judge": "judge_config.yaml"}, ("judge",),
    ),
    Layout(  # a checkout of arena-hard-auto
        "arena-hard-v0.1", "arena_hard",
        {"questions": "data/arena-hard-v0.1/question.jsonl",
         "baseline": "data/arena-hard-v0.1/model_answer/gpt-4-0314.jsonl",
         "judge": "config/judge_config.yaml"}, ("judge",),
    ),
    Layout(
        "mt-bench", "mt_bench",
        {"questions": "question.jsonl", "references": "reference_answer_gpt-4.jsonl",
         "judge": "judge_prompts.jsonl"},
    ),
    Layout(  # a checkout of FastChat
        "mt-bench", "mt_bench",
        {"questions": f"{_FASTCHAT}/mt_bench/question.jsonl",
         "references": f"{_FASTCHAT}/mt_bench/reference_answer/gpt-4.jsonl",
         "judge": f"{_FASTCHAT}/judge_prompts.jsonl"},
    ),
    Layout("ifeval", "ifeval", {"questions": "input_data.jsonl"}),
    Layout(  # a checkout of google-research
        "ifeval", "ifeval", {"questions": "instruction_following_eval/data/input_data.jsonl"}
    ),
    Layout(
        "alpaca-eval", "alpaca_eval",
        {"questions": "alpaca_eval_gpt4_baseline.json",
         "baseline": "alpaca_eval_gpt4_baseline.json"},
    ),
    Layout(
        "alpaca-eval", "alpaca_eval",
        {"questions": "text_davinci_003_outputs.json", "baseline": "text_davinci_003_outputs.json"},
    ),
)  # fmt: skip


def packs_folder() -> Path:
    """Where pulled packs are: ``packs`` in ``FPO_CACHE``, or in ``~/.cache/fpo``."""
    return cache_folder() / "packs"


def load_pack(source: str | Path) -> Pack:
    """Read a pack and check all of its files.

    Args:
        source: a folder, written with a slash or as a ``Path``, or the name of a pulled pack.

    Raises:
        FPOError: no such pack; a file missing, outside the folder, or not as pinned; a row that
            cannot be read; ids that are missing, come twice or do not match.
    """
    folder = _pack_folder(source)
    settings = read_settings(folder)
    required, optional = ROLES[settings.kind]
    given = list(settings.files)
    unknown = [role for role in given if role not in (*required, *optional)]
    missing = [role for role in required if role not in given]
    if unknown or missing:
        raise FPOError(
            f"{folder / PACK_FILE}: files: {_listed('no file', missing)}"
            f"{_listed('unknown role', unknown)}a pack of kind {settings.kind} has "
            f"{', '.join((*required, *optional))}"
        )
    files = {role: _inside(folder, role, file) for role, file in settings.files.items()}
    digests = {role: sha256_of(file) for role, file in files.items()}
    for role, file in settings.files.items():
        if file.sha256 not in (None, digests[role]):
            raise FPOError(
                f"{files[role]}: its sha256 is {digests[role]}, {PACK_FILE} pins {file.sha256}. "
                f"Get the file of that version again, or write the new sha256 into {PACK_FILE}; "
                f"scores of the two versions do not compare"
            )
    _check_contents(settings.kind, files)
    joined = json.dumps(digests, sort_keys=True)
    digest = hashlib.sha256(joined.encode()).hexdigest()
    return Pack(settings.name, settings.kind, folder, files, digest)


def read_settings(folder: Path) -> PackSettings:
    """A folder's ``pack.yaml``, or what a known layout would have in it."""
    file = folder / PACK_FILE
    if not file.is_file():
        return _recognised(folder)
    try:
        return PackSettings.model_validate(prompts.read_yaml(file))
    except ValidationError as error:
        raise FPOError(
            f"{file}: {explain(error, PackSettings)}. Its keys are "
            f"{', '.join(PackSettings.model_fields)}; a file has {', '.join(PackFile.model_fields)}"
        ) from error


def sha256_of(file: Path) -> str:
    """Of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _pack_folder(source: str | Path) -> Path:
    if isinstance(source, str) and "/" not in source and source not in ("", ".", ".."):
        folder = packs_folder() / source
        if not (folder / PACK_FILE).is_file():
            half = " completely" if folder.is_dir() else ""
            raise FPOError(
                f"the pack {source!r} was not pulled{half}: `fpo bench pull {source}` gets it "
                f"(`fpo bench list` names those there are). A folder is written with a slash: "
                f"./{source}"
            )
        return folder
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise FPOError(f"pack {str(source)!r}: no such folder")
    return folder


def _recognised(folder: Path) -> PackSettings:
    """What the folder of an original has, told by its files' names."""
    found = [layout for layout in LAYOUTS if not _absent(folder, layout)]
    if not found:
        close = [
            f"{layout.kind} lacks {', '.join(_absent(folder, layout))}"
            for layout in LAYOUTS
            if any((folder / path).is_file() for path in layout.files.values())
        ]
        raise FPOError(
            f"pack {str(folder)!r}: no {PACK_FILE}, and not the files of an original by their "
            f"names{' (' + '; '.join(close) + ')' if close else ''}. Write a {PACK_FILE}: "
            f"docs/benchmarks.md has an example"
        )
    kinds = sorted({layout.kind for layout in found})
    if len(kinds) > 1:
        raise FPOError(
            f"pack {str(folder)!r}: has the files of {' and '.join(kinds)}; give each a folder of "
            f"its own, or write a {PACK_FILE}"
        )
    chosen = found[0]
    files = {
        role: PackFile(path=path)
        for role, path in chosen.files.items()
        if (folder / path).is_file()
    }
    return PackSettings(name=chosen.name, kind=chosen.kind, files=files)


def _absent(folder: Path, layout: Layout) -> list[str]:
    return [
        path
        for role, path in layout.files.items()
        if role not in layout.optional and not (folder / path).is_file()
    ]


def _inside(folder: Path, role: str, file: PackFile) -> Path:
    """The file of a role, which has to be in the pack's folder and no link out of it."""
    path = folder / file.path
    if Path(file.path).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise FPOError(
            f"{folder / PACK_FILE}: files.{role}: {file.path!r} is not in the pack's folder; copy "
            f"the file into it"
        )
    if not path.is_file():
        source = f", it came from {file.url}" if file.url else ""
        raise FPOError(f"{path}: the pack's {role}, and not there{source}. Put it there")
    return path


def _check_contents(kind: str, files: dict[str, Path]) -> None:
    """Read every row, and hold the ids of the files to each other."""
    question, answer = _READERS[kind]
    items = contents.read_items(files["questions"], question)
    if answer and "baseline" in files:
        answers = contents.read_items(files["baseline"], answer)
        contents.join_strictly(items, answers, str(files["baseline"]))
    wanted = [item.id for item in items.values() if item.label in contents.REFERENCE_CATEGORIES]
    if kind == "mt_bench" and wanted and "references" not in files:
        raise FPOError(
            f"{files['questions']}: {len(wanted)} questions need a reference answer (maths, "
            f"reasoning, coding), and the pack has no file of the role references"
        )
    if "references" in files:
        references = contents.read_items(files["references"], contents.mt_bench_answer)
        contents.join_strictly(wanted, references, str(files["references"]), allowed=items)
    if "judge" in files and kind == "arena_hard":
        prompts.read_arena_judge(files["judge"])
    if "judge" in files and kind == "mt_bench":
        prompts.read_mt_bench_prompts(files["judge"])


def _listed(what: str, names: list[Any]) -> str:
    return f"{what} {', '.join(map(repr, names))}; " if names else ""
