"""What a judge answered is kept: damage, a second run, a killed one, the cost of the rest."""

import json
import signal
import subprocess
import sys
import threading

import pytest

from fpo_core.judge import Judge, estimate_cost
from fpo_core.recipe.judge import JudgePrice, JudgeSettings
from storage.judgments import Judgments
from storage.local import LocalBackend
from tests.fpo_core.judging import ask, request, settings_for, several
from tests.judge_server import judging, say


@pytest.fixture
def cache(tmp_path):
    return Judgments(LocalBackend(tmp_path / "store"))


DAMAGED = {
    "cut off": lambda entry: entry[:-10],
    "another text": lambda entry: entry.replace(b"first", b"forst"),
    "another question's": lambda entry: entry.replace(b"question 0", b"question 1"),
    "another format": lambda entry: entry.replace(b'"format":1', b'"format":0'),
    "no JSON": lambda _: b"\xff\x00",
    "empty": lambda _: b"",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_judgment_is_asked_again_and_mended(cache, tmp_path, case, caplog):
    with judging(lambda _: say("first")) as server:
        ask(server, cache, several(1))
        (path,) = tmp_path.rglob("*.json")
        entry = path.read_bytes()
        assert json.loads(entry)["answer"]["served_model"] == "judge-0613"
        changed = DAMAGED[case](entry)
        assert changed != entry
        path.write_bytes(changed)
        server.script = lambda _: say("second")
        assert ask(server, cache, several(1)).replies["question 0"].text == "second"
        assert "1 damaged judgments are asked again" in caplog.text
        assert ask(server, cache, several(1)).replies["question 0"].text == "second"
    assert len(server.asked) == 2


def test_of_two_runs_that_ask_the_same_the_first_to_answer_stands(cache):
    settings = []

    def script(asked):
        if asked.before:
            return say("inner")
        # While the outer run waits for this answer, another one asks and is answered.
        Judge(settings[0], cache).ask(several(1))
        return say("outer")

    with judging(script) as server:
        settings.append(settings_for(server))
        judged = ask(server, cache, several(1))
    assert judged.replies["question 0"].text == "inner"


CHILD = """
import sys
from pathlib import Path
from fpo_core.judge import Judge
from fpo_core.recipe.judge import JudgeSettings
from storage.judgments import Judgments
from storage.local import LocalBackend
from tests.fpo_core.judging import several

settings = JudgeSettings(model="m", base_url=sys.argv[1], key_env=None, concurrency=4)
judge = Judge(settings, Judgments(LocalBackend(Path(sys.argv[2]))))
judge.ask(several(40), lambda count: print(count, flush=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_asks_nothing_again_that_was_answered(cache, tmp_path, number):
    ended = threading.Event()
    answered = []

    def script(asked):
        if not ended.is_set() and len(answered) >= 17:
            ended.wait(60)
            return say("too late")
        answered.append(asked.text)
        return say(f"about {asked.text}")

    with judging(script) as server:
        command = [sys.executable, "-c", CHILD, server.url, str(tmp_path / "store")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            settled = 0
            while settled < len(answered) or len(answered) < 17:
                settled += int(child.stdout.readline())
            child.send_signal(number)
            assert child.wait(60) != 0
        first = list(answered)
        ended.set()
        judged = ask(server, cache, several(40), concurrency=4)
    assert judged.counts[:4] == (40, len(first), 40 - len(first), 0)
    texts = [asked.text for asked in server.asked]
    assert all(texts.count(text) == 1 for text in first)
    assert len(texts) <= 44  # those in flight when it ended
    assert {reply.text for reply in judged.replies.values()} == {
        f"about {one.key}" for one in several(40)
    }


def test_the_cost_is_estimated_before_anything_is_asked(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "encodings"))
    with judging(lambda _: say("ok")) as server:
        ask(server, cache, [request("known")], model="gpt-4")
        settings = settings_for(server, model="gpt-4", price=JudgePrice(prompt=10, reply=30))
        requests = [request("known"), request("x" * 401, "a"), request("x" * 401, "b")]
        estimate = estimate_cost(settings, requests, cache)
        assert len(server.asked) == 1
    # 401 characters are 101 tokens, "Judge." 2; 4 for each message, 3 for the reply's start.
    assert estimate == (3, 1, 114, 20, "4 characters a token", pytest.approx(0.00174))
    assert not (tmp_path / "encodings").exists()
    assert estimate_cost(JudgeSettings(model="gpt-4"), requests, cache).usd is None
