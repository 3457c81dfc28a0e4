"""AlpacaEval 2 against the package alpaca-eval, on the real instructions where they are at hand."""

import json
import logging
import math
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from fpo_core.bench.alpaca_package import EVALUATOR
from fpo_core.bench.model import Answers, Reply
from fpo_core.errors import FPOError
from tests.fpo_core.alpaca import BENCH, answer, figures, judge_all, make_pack, reply

if find_spec("alpaca_eval") is None:
    pytest.skip("the extra eval is not installed", allow_module_level=True)


DATA = Path(__file__).parents[3] / "shared/data/alpaca_eval/text_davinci_003_outputs.json"


needs_data = pytest.mark.skipif(not DATA.is_file(), reason="no AlpacaEval data on this machine")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The 805 instructions, a policy's answers (some equal, some longer), and their pack."""
    rows = json.loads(DATA.read_text())
    pack = make_pack(tmp_path_factory.mktemp("pack"), rows)
    kept = np.random.default_rng(1).integers(0, 400, size=len(rows))
    texts = [
        row["output"] if n % 50 == 7 else row["output"][: kept[n]] + " word" * (n % 90)
        for n, row in enumerate(rows)
    ]
    return rows, pack, answer(pack, texts), texts


@pytest.fixture(scope="module")
def package_annotator():
    """The package's annotator with a completion function instead of an endpoint."""
    level = logging.getLogger().level
    from alpaca_eval.annotators import PairwiseAnnotator

    annotator = PairwiseAnnotator(annotators_config=EVALUATOR, caching_path=None)
    yield annotator
    logging.getLogger().setLevel(level)


def completions(prompts, replies, seen, **_):
    """As the package's decoder returns them, from our replies by the prompt's last message."""
    from alpaca_eval.utils import prompt_to_chatml

    found = []
    for prompt in prompts:
        messages = tuple((part["role"], part["content"]) for part in prompt_to_chatml(prompt))
        seen.append(messages)
        top = [{"token": t, "logprob": p} for t, p in replies[messages].top_logprobs[0]]
        found.append({"text": "m", "logprobs": {"content": [{"top_logprobs": top}]}})
    return {
        "completions_all": found,
        "price_per_example": [0.0] * len(found),
        "time_per_example": [0.0] * len(found),
    }


@pytest.fixture(scope="module")
def annotated(real, package_annotator):
    """The real instructions judged by the package and by us from the same replies."""
    rows, pack, answers, texts = real
    requests = BENCH.requests(pack, answers, None)
    replies = judge_all(requests, answers, BENCH.baseline(pack))
    # Three replies that say neither label.
    for request in requests[10:13]:
        replies[request.key] = Reply("The", "length", ((("The", -0.1),),))
    by_prompt = {request.messages: replies[request.key] for request in requests}
    seen = []
    package_annotator.annotators[EVALUATOR].fn_completions = partial(
        completions, replies=by_prompt, seen=seen
    )
    policy = [
        {"instruction": row["instruction"], "output": text, "generator": "policy"}
        for row, text in zip(rows, texts, strict=True)
    ]
    theirs = package_annotator.annotate_head2head(outputs_1=rows, outputs_2=policy)
    scored = BENCH.score(pack, answers, None, replies, resamples=20)
    return theirs, scored, requests, seen


@needs_data
def test_requests_are_the_packages_prompts(annotated):
    """The same messages in the same order of outputs, for all but equal outputs."""
    _, scored, requests, seen = annotated
    assert len(requests) == 805 - sum(row["status"] == "equal" for row in scored.verdicts)
    assert sorted(seen) == sorted(request.messages for request in requests)
    assert {(r.max_tokens, r.temperature, r.top_logprobs) for r in requests} == {(1, 1.0, 5)}
    assert len({request.key for request in requests}) == len(requests)


@needs_data
def test_preferences_and_win_rate_are_the_packages(annotated):
    from alpaca_eval.metrics import get_winrate

    theirs, scored, _, _ = annotated
    preferences = [row["preference"] for row in theirs]
    for own, other in zip(scored.verdicts, preferences, strict=True):
        if own["preference"] is None:
            assert own["status"] == "unparsable"
            assert other is None or math.isnan(other)
        else:
            assert own["preference"] == pytest.approx(other - 1, abs=1e-12)
    rate = figures(scored)["win_rate"]
    package = get_winrate([row for row in theirs if row["preference"] == row["preference"]])
    assert rate.value == pytest.approx(package["win_rate"])
    assert (rate.high - rate.low) / 2 == pytest.approx(1.959964 * package["standard_error"])
    assert (rate.judged, rate.asked) == (802, 805) == (package["n_total"], len(theirs))
    assert any("3 of 805 replies" in note for note in scored.notes)


def gamed_file(folder, count=805):
    """Rows as in the package's df_gamed.csv: two baselines, each with all instructions."""
    import pandas as pd

    rng = np.random.default_rng(4)
    difficulty = rng.normal(size=count)
    sides = [
        pd.DataFrame(
            {
                "index": np.arange(count),
                "model": name,
                "preference": np.clip(0.5 + 0.2 * rng.normal(size=count), 0, 1),
                "std_delta_len": sign * np.abs(rng.normal(size=count)),
                "instruction_difficulty": difficulty,
                "not_gamed_baseline": False,
            }
        )
        for name, sign in (("concise", 1), ("verbose", -1))
    ]
    path = Path(folder) / "df_gamed.csv"
    pd.concat(sides).to_csv(path, index=False)
    return path


def package_rate(monkeypatch, theirs, rule, gamed):
    """The package's own entry point, with the file that it would fetch."""
    import alpaca_eval.metrics.glm_winrate as glm
    import pandas as pd
    from sklearn import config_context

    monkeypatch.setattr(glm, "hf_hub_download", lambda **_: str(gamed))
    with config_context():
        return glm.get_length_controlled_winrate(
            pd.DataFrame(theirs), glm_name=rule, save_weights_dir=None
        )


@needs_data
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_length_controlled_win_rate_is_the_packages(monkeypatch, tmp_path, real, annotated):
    """With difficulties and without, on all instructions and on the first hundred."""
    _, pack, answers, _ = real
    theirs, scored, requests, _ = annotated
    replies = {
        request.key: _replied(row) for request, row in zip(requests, _asked(scored), strict=True)
    }
    gamed = gamed_file(tmp_path)
    full = pack._replace(files=pack.files | {"gamed": gamed})
    for used, rule, count in (
        (full, "length_controlled_v1", 805),
        (full, "length_controlled_v1", 100),
        (pack, "length_controlled_minimal", 805),
    ):
        scored = BENCH.score(used, answers, None, replies, limit=count, resamples=20)
        expected = package_rate(monkeypatch, theirs[:count], rule, gamed)
        own = figures(scored)["lc_win_rate"]
        assert own.value == pytest.approx(expected["length_controlled_winrate"], abs=1e-6)
        low, high = own.low or 0, own.high or 0
        assert low <= own.value <= high
        assert high - low > 1  # points
        # The judge likes the policy, and more so for its length.
        assert abs(own.value - figures(scored)["win_rate"].value) > 0.5
        assert own.value > 55
        assert ("no instruction difficulty" in own.label) == (used is pack)
        assert any("not the leaderboard's" in note for note in scored.notes)


def _asked(scored):
    return [row for row in scored.verdicts if row["status"] != "equal"]


def _replied(row):
    """A reply that leads to the verdict."""
    share = row["preference"]
    if share is None:
        return Reply("The", "length", ((("The", -0.1),),))
    first = share if row["policy_first"] else 1 - share
    return reply(math.log(first), math.log(1 - first))


# What the leaderboard's annotations say of one submission (results/NullModel of the repository
# tatsu-lab/alpaca_eval): instruction, log-probs of m and M, and the preference from 1 to 2.
PUBLISHED = [
    (0, -0.010449888, -4.6069846, 1.9900139974),
    (1, -0.7781773, -0.6152821, 1.4593660117),
    (188, -2.7725954, -0.065033935, 1.062528643),
    (470, -0.08665823, -2.4901311, 1.9170917441),
    (471, -0.06703134, -2.738029, 1.9352934356),
    (472, -1.6735201, -0.21023649, 1.8120343807),
    (804, -1.8554773, -0.17028898, 1.1564096714),
]


@needs_data
def test_published_annotations(real):
    """Order of outputs, label and normalisation, as on the leaderboard."""
    _, pack, _, _ = real
    answers = answer(pack, ["no baseline said this"] * 805)
    keys = {
        request.key.partition(":")[0]: request.key
        for request in BENCH.requests(pack, answers, None)
    }
    ids = [question.id for question in BENCH.questions(pack)]
    replies = {keys[ids[n]]: reply(first, second) for n, first, second, _ in PUBLISHED}
    verdicts = BENCH.score(pack, answers, None, replies, resamples=2).verdicts
    for n, _, _, preference in PUBLISHED:
        assert verdicts[n]["preference"] == pytest.approx(preference - 1, abs=1e-8)


@needs_data
def test_official_setting_has_no_note(tmp_path, real):
    rows, _, _, texts = real
    pack = make_pack(
        tmp_path, [row | {"generator": "gpt4_1106_preview"} for row in rows], gamed_file(tmp_path)
    )
    answers = answer(pack, texts)
    requests = BENCH.requests(pack, answers, None)
    replies = judge_all(requests, answers, BENCH.baseline(pack))
    scored = BENCH.score(pack, answers, None, replies, resamples=2)
    assert scored.notes == ()
    assert figures(scored)["lc_win_rate"].label == "Length-controlled win rate"
    # The same outputs as an opponent are not the benchmark's baseline.
    rival = Answers("dpo", BENCH.baseline(pack).turns)
    versus = BENCH.score(pack, answers, rival, replies, resamples=2)
    assert "the other side is not gpt4_1106_preview" in versus.notes[0]
    assert figures(versus)["win_rate"] == figures(scored)["win_rate"]


@needs_data
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index,preference\n0,1\n", "no column std_delta_len, instruction_difficulty"),
        ("index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n"
         "0,0.5,1.0,0.1,True\n", "has to be False in every row"),
        ("index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n"
         "0,0.5,1.0,0.1,False\n", "no difficulty for each of 6 instructions"),
        ("", "not a readable CSV file"),
    ],
)  # fmt: skip
def test_bad_gamed_file_is_told(tmp_path, real, text, message):
    _, pack, answers, _ = real
    path = tmp_path / "df_gamed.csv"
    path.write_text(text)
    pack = pack._replace(files=pack.files | {"gamed": path})
    replies = judge_all(BENCH.requests(pack, answers, None, 6), answers, BENCH.baseline(pack))
    with pytest.raises(FPOError, match=message):
        BENCH.score(pack, answers, None, replies, limit=6)
