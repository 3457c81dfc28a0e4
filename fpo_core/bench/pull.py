"""Packs that are known by name, and getting them from where their authors publish them.

The project ships none of the texts. A file comes from a fixed commit and is held to its sha256;
where no one could be checked here, ``sha256`` is None and the pack's notes say so: what is pulled
is then pinned in the pack's own ``pack.yaml``, so that it cannot change from there on.
"""

import errno
import os
import shutil
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import yaml

from fpo_core.bench.pack import (
    PACK_FILE,
    Pack,
    PackFile,
    PackSettings,
    load_pack,
    packs_folder,
    read_settings,
    sha256_of,
)
from fpo_core.errors import FPOError, UsageError

TIMEOUT = 60.0  # seconds without a byte
_BLOCK = 1 << 20
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
_GITHUB = "https://raw.githubusercontent.com"
_ARENA = f"{_GITHUB}/lmarena/arena-hard-auto/196f6b826783b3da7310e361a805fa36f0be83f3"
# The last commit known to hold v0.1's judge_config.yaml; later ones keep the prompts in code.
_ARENA_JUDGE = f"{_GITHUB}/lmarena/arena-hard-auto/7f1b7f5dd6ce53e1f8530220ceb452b7019a8056"
_FASTCHAT = (
    f"{_GITHUB}/lm-sys/FastChat/587d5cfa1609a43d192cedb8441cac3c17db105d/fastchat/llm_judge/data"
)
_GOOGLE = f"{_GITHUB}/google-research/google-research/041338718b4e8151372fd63677104c65b73a0a4e"
_ALPACA = f"{_GITHUB}/tatsu-lab/alpaca_eval/2a8a6f3a4d535a3d11e5c3c8e74d1841d19fe693/results"
_ALPACA_HUB = (
    "https://huggingface.co/datasets/tatsu-lab/alpaca_eval/resolve/"
    "2edc6fad8be6b14ea7230aabfd08188da6b8b814"
)
_NLTK = f"{_GITHUB}/nltk/nltk_data/4f15a3d89eefe9748ec1c05be495d91289197155/packages"
_DAVINCI = PackFile(
    path="text_davinci_003_outputs.json",
    url=f"{_ALPACA}/text_davinci_003/model_outputs.json",
    sha256="af0bc112f08c88bf589bbfe6fc1036806d0a0f6fec9c4d5a4db860f5afe73b4b",
)

KNOWN_PACKS = {
    pack.name: pack
    for pack in (
        PackSettings(
            name="alpaca-eval-1", kind="alpaca_eval",
            files={"questions": _DAVINCI, "baseline": _DAVINCI},
            licence="CC BY-NC 4.0 (evaluation only)",
            notes="the 805 instructions, against text_davinci_003 as in AlpacaEval 1",
        ),
        PackSettings(
            name="alpaca-eval-2", kind="alpaca_eval",
            files={
                "questions": _DAVINCI,
                "baseline": PackFile(
                    path="alpaca_eval_gpt4_baseline.json",
                    url=f"{_ALPACA_HUB}/alpaca_eval_gpt4_baseline.json",
                    sha256="83db546b872ddebee8965fd05fa48461ee3c32bc695c62fb57f2d214ff741ec4",
                ),
                "gamed": PackFile(
                    path="df_gamed.csv", url=f"{_ALPACA_HUB}/df_gamed.csv",
                    sha256="97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d",
                ),
            },
            licence="CC BY-NC 4.0 (evaluation only)",
            notes="against gpt4_1106_preview, with what length control is fitted with; the sha256 "
            "of the baseline and of df_gamed.csv are those that others published",
        ),
        PackSettings(
            name="arena-hard-v0.1", kind="arena_hard",
            files={
                "questions": PackFile(
                    path="question.jsonl", url=f"{_ARENA}/data/arena-hard-v0.1/question.jsonl",
                    sha256="2650242d2883f22b2abd498f273b6a7e02253cce533f5c91a858e1d44aa3002f",
                ),
                "baseline": PackFile(
                    path="gpt-4-0314.jsonl",
                    url=f"{_ARENA}/data/arena-hard-v0.1/model_answer/gpt-4-0314.jsonl",
                    sha256="0f6abc84de4600fde987d9db70f838f4ecdbd27a2f1f4058c12aa322a6f791b2",
                ),
                "judge": PackFile(
                    path="judge_config.yaml", url=f"{_ARENA_JUDGE}/config/judge_config.yaml"
                ),
            },
            licence="Apache-2.0",
            notes="500 questions against gpt-4-0314; the judge's configuration is fixed by its "
            "commit, and not pinned: no copy of it could be checked",
        ),
        PackSettings(
            name="ifeval", kind="ifeval",
            files={
                "questions": PackFile(
                    path="input_data.jsonl",
                    url=f"{_GOOGLE}/instruction_following_eval/data/input_data.jsonl",
                    sha256="67ffeee0fcb87c317c5b08a2de85557b4a7e96ada6178aa645b4954fe4b53d49",
                ),
                "punkt_tab": PackFile(
                    path="nltk_data/tokenizers/punkt_tab.zip",
                    url=f"{_NLTK}/tokenizers/punkt_tab.zip",
                    sha256="e57f64187974277726a3417ca6f181ec5403676c717672eef6a748a7b20e0106",
                ),
            },
            licence="Apache-2.0",
            notes="541 prompts; needs no judge",
        ),
        PackSettings(
            name="mt-bench", kind="mt_bench",
            files={
                "questions": PackFile(
                    path="question.jsonl", url=f"{_FASTCHAT}/mt_bench/question.jsonl",
                    sha256="119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
                ),
                "references": PackFile(
                    path="reference_answer_gpt-4.jsonl",
                    url=f"{_FASTCHAT}/mt_bench/reference_answer/gpt-4.jsonl",
                    sha256="f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
                ),
                "judge": PackFile(
                    path="judge_prompts.jsonl", url=f"{_FASTCHAT}/judge_prompts.jsonl",
                    sha256="fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
                ),
            },
            licence="Apache-2.0",
            notes="80 questions of two turns; some of the published reference answers are wrong",
        ),
    )
}  # fmt: skip


class Pulled(NamedTuple):
    """What a pull did."""

    pack: Pack
    fetched: tuple[str, ...]  # names of the files that were fetched
    kept: tuple[str, ...]  # of those that were there


def known_pack(name: str) -> PackSettings:
    """A pack of the table.

    Raises:
        UsageError: there is none by that name.
    """
    if name not in KNOWN_PACKS:
        raise UsageError(
            f"no pack {name!r} is known; there are {', '.join(KNOWN_PACKS)}. A folder of your own "
            f"needs no pull: give its path"
        )
    return KNOWN_PACKS[name]


def is_pulled(name: str) -> bool:
    """Whether a pack of that name is in the folder of pulled packs."""
    return (packs_folder() / name / PACK_FILE).is_file()


def pull_pack(known: PackSettings, tell: Callable[[str], None] = lambda _: None) -> Pulled:
    """Fetch a pack's files into the folder of pulled packs, and check them as ``load_pack`` does.

    A file that is there as pinned is kept, so that a pull which was interrupted, or whose files
    were put there by hand, goes on. ``pack.yaml`` is written last.

    Args:
        known: of ``KNOWN_PACKS``.
        tell: called with a line before each file is fetched.

    Raises:
        FPOError: a source cannot be reached, or what it sends is not what is pinned.
    """
    folder = packs_folder() / known.name
    folder.mkdir(parents=True, exist_ok=True)
    files = _pinned(known, folder)
    fetched = []
    for name, file in files.items():
        target = folder / name
        if target.is_file() and file.sha256 in (None, sha256_of(target)):
            continue
        tell(f"fetching {file.url}")
        _fetch(known.name, file, target)
        fetched.append(name)
    settings = known.model_dump(exclude_defaults=True)
    for entry in settings["files"].values():
        entry["sha256"] = sha256_of(folder / entry["path"])
    _write(folder / PACK_FILE, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    try:
        pack = load_pack(folder)
    except FPOError as error:
        (folder / PACK_FILE).unlink()
        raise FPOError(f"{error}. To have the file fetched again, remove it") from error
    return Pulled(pack, tuple(fetched), tuple(name for name in files if name not in fetched))


def _pinned(known: PackSettings, folder: Path) -> dict[str, PackFile]:
    """A pack's files by name; what the table does not pin, as an earlier pull pinned it."""
    before: dict[str, PackFile] = {}
    if (folder / PACK_FILE).is_file():
        before = {file.path: file for file in read_settings(folder).files.values()}
    return {
        file.path: file if file.sha256 else before.get(file.path, file)
        for file in known.files.values()
    }


def _fetch(pack: str, file: PackFile, target: Path) -> None:
    """One file, under its name only when it is whole and as pinned."""
    assert file.url is not None
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    by_hand = f"put it there as {target} by hand and run `fpo bench pull {pack}` again"
    try:
        with _http().open(file.url, timeout=TIMEOUT) as answer, partial.open("wb") as stream:
            shutil.copyfileobj(answer, stream, _BLOCK)
            expected = answer.headers.get("Content-Length")
        if expected is not None and partial.stat().st_size != int(expected):
            raise ConnectionError(f"broke off after {partial.stat().st_size} of {expected} bytes")
        found = sha256_of(partial)
        if file.sha256 not in (None, found):
            raise FPOError(
                f"{file.url}: what came has the sha256 {found}, pinned is {file.sha256}; it was "
                f"thrown away. The source has changed, or something on the way answers for it. "
                f"With a copy of the pinned version: {by_hand}"
            )
        partial.replace(target)
    except (OSError, ValueError, HTTPException) as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise
        said = f"{type(error).__name__}: {error}"
        raise FPOError(
            f"{file.url}: could not be fetched ({said}). Without a network: {by_hand}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _http() -> urllib.request.OpenerDirector:
    """Opens http and https, through the environment's proxies; no file:, ftp: or data:."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):  # fmt: skip
        opener.add_handler(handler())
    return opener


def _write(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
