"""Requests to a judge, and asking the scripted one."""

from fpo_core.bench.model import JudgeRequest
from fpo_core.judge import Judge
from fpo_core.recipe.judge import JudgeSettings


def request(text: str, key: str | None = None, **changed) -> JudgeRequest:
    values = {"max_tokens": 20, "temperature": 0.0, **changed}
    return JudgeRequest(key or text, (("system", "Judge."), ("user", text)), **values)


def several(count: int) -> list[JudgeRequest]:
    return [request(f"question {number}") for number in range(count)]


def settings_for(server, **changed) -> JudgeSettings:
    values = {"model": "m", "base_url": server.url, "key_env": None, "retries": 1, **changed}
    return JudgeSettings(**values)


def ask(server, cache, requests, **changed):
    return Judge(settings_for(server, **changed), cache).ask(requests)
