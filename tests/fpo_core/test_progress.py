"""Progress in a terminal and elsewhere; telemetry off by default."""

import os
import pty
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fpo_core import progress
from fpo_core.progress import Progress, human_rate
from fpo_core.quiet import set_quiet_defaults

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.1, "10.0 s/step"), (2.5, "2.5 steps/s"), (1234.5, "1,234 steps/s"), (0, "0.0 steps/s")],
)
def test_rates_are_readable(rate, text):
    assert human_rate(rate, "step") == text


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that a test moves."""
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    """What progress logs, whatever else listens to logging in this process."""
    found: list[str] = []
    monkeypatch.setattr(
        progress, "log", SimpleNamespace(info=lambda *given: found.append(given[0] % given[1:]))
    )
    return found


def test_lines_say_how_far_how_fast_and_how_long(clock, lines):
    with Progress("train", total=10, unit="step") as bar:
        clock[0] += 30  # start-up does not count in the rate
        bar.advance(1)
        for _ in range(4):
            clock[0] += 5
            bar.advance(1, "loss 0.5")
    assert lines[-1] == "train: 4 of 10 steps (40 %), 5.0 s/step loss 0.5, about 30 s left"


def test_work_of_unknown_length_has_no_estimate(clock, lines):
    with Progress("read", total=None, unit="pair") as bar:
        bar.advance(10)
        clock[0] += 20
        bar.advance(10)
    assert lines == ["read: 20 pairs, 2.0 s/pair"]


def test_a_terminal_gets_a_bar_with_rate_and_time_left():
    """A real pseudo-terminal."""
    code = (
        "import time\nfrom fpo_core.progress import Progress\n"
        "with Progress('train', total=3, unit='step') as bar:\n"
        "    for _ in range(3):\n        time.sleep(0.3); bar.advance(1, 'loss 0.69')\n"
    )
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=follower, cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(follower)
    shown = b""
    while True:
        try:
            block = os.read(leader, 4096)
        except OSError:
            break
        if not block:
            break
        shown += block
    assert process.wait() == 0
    text = shown.decode()
    assert "train" in text
    assert "steps/s loss 0.69" in text
    assert "left" in text


def test_telemetry_is_off_unless_the_user_turned_it_on(monkeypatch):
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    monkeypatch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "true")
    set_quiet_defaults()
    assert os.environ["DO_NOT_TRACK"] == "1"
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "true"


def test_importing_the_flow_turns_telemetry_off():
    code = (
        "import flows.pipeline, os; from prefect.settings import get_current_settings as s;"
        "print(os.environ['DO_NOT_TRACK'], os.environ['HF_HUB_DISABLE_TELEMETRY'],"
        " s().server.analytics_enabled)"
    )
    quiet = ("DO_NOT_TRACK", "PREFECT_SERVER_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY")
    env = {name: value for name, value in os.environ.items() if name not in quiet}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["1", "1", "False"]
