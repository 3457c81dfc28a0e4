"""The judge's client against a scripted server: retries, errors and keys."""

import logging
import socket
import sys
import traceback

import pytest

from fpo_core.errors import FPOError
from fpo_core.judge import Judge, check_judge
from fpo_core.judge.client import MOST_IN_A_ROW
from fpo_core.recipe.judge import JudgeSettings
from storage.judgments import Judgments
from storage.local import LocalBackend
from tests.fpo_core.judging import ask, request, settings_for, several
from tests.judge_server import cut_off, fail, garbage, judging, say


@pytest.fixture
def cache(tmp_path):
    return Judgments(LocalBackend(tmp_path / "store"))


KEY = "sk-madeup-Zq7vW2kPb9-tail"


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


def test_one_bad_request_is_told_and_counted(cache, caplog):
    def script(asked):
        return fail(400, "context too long") if asked.text == "question 1" else say("ok")

    with judging(script) as server:
        judged = ask(server, cache, several(4))
    assert judged.failures == {"question 1": "status 400: context too long"}
    assert judged.counts[:4] == (4, 0, 3, 1)
    assert len(server.asked) == 4
    assert "1 of 4 requests got no answer; the first, question 1: status 400" in caplog.text


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
