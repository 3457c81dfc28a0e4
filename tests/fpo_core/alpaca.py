"""AlpacaEval packs of a few outputs, and a judge's replies to them."""

import hashlib
import json
import math
from pathlib import Path

from fpo_core.bench.alpaca_eval import AlpacaEval
from fpo_core.bench.model import Answers, Reply
from fpo_core.bench.pack import Pack

BENCH = AlpacaEval()


def make_pack(folder, rows, gamed=None, **files):
    """A pack whose questions and baseline are one file."""
    path = Path(folder) / "outputs.json"
    path.write_text(json.dumps(rows))
    files = {"questions": path, "baseline": path, **files}
    if gamed is not None:
        files["gamed"] = gamed
    return Pack("alpaca", "alpaca_eval", Path(folder), files, "digest")


def outputs(texts, generator="gpt4_1106_preview"):
    return [
        {"instruction": f"Question {n}?", "output": text, "generator": generator, "dataset": "own"}
        for n, text in enumerate(texts)
    ]


def answer(pack, texts, model="policy"):
    ids = [question.id for question in BENCH.questions(pack)]
    return Answers(model, {name: (text,) for name, text in zip(ids, texts, strict=True)})


def reply(first, second=None):
    """A judge's reply with log-probs of m and M."""
    top = [("m", first)] if second is None else [("m", first), ("M", second), ("The", -9.0)]
    return Reply("m", "length", (tuple(top),))


def judge_all(requests, answers, rival):
    """A judge who likes the policy, and long outputs; log-probs by request key."""
    replies = {}
    for request in requests:
        name, _, order = request.key.partition(":")
        longer = len(answers.turns[name][0]) - len(rival.turns[name][0])
        noise = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32 - 0.5
        logit = 0.7 + math.tanh(longer / 200) + 3 * noise
        if order == "baseline-first":
            logit = -logit
        replies[request.key] = reply(-math.log1p(math.exp(-logit)), -math.log1p(math.exp(logit)))
    return replies


def figures(scored):
    return {score.name: score for score in scored.scores}
