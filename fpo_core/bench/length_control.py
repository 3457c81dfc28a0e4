"""The length-controlled win rate of AlpacaEval 2 (Dubois et al., 2024): the package's GLM, offline.

The package fetches ``df_gamed.csv`` from the hub at each call: the difficulty of each of the 805
instructions, and the annotations of two baselines that game the length, by which the fit is
regularised. Here it is a file of the pack (role ``gamed``). Design matrix and fit are the package's
functions, so the value is the package's.

Its standard error is that of predictions under one fit, which are nearly constant: it says nothing
of the uncertainty in the fit (0.05 points with 805 judgments, 0 without instruction difficulty).
The interval here is a bootstrap over instructions that fits anew, without the penalty: with the one
that cross-validation chose, coefficients that it shrank to zero would stay there, and an even match
would have no interval at all.
"""

import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fpo_core.bench.alpaca_package import alpaca_metrics
from fpo_core.errors import FPOError

if TYPE_CHECKING:
    import pandas as pd

OFFICIAL = "length_controlled_v1"  # the leaderboard's formula
MINIMAL = "length_controlled_minimal"  # the package's, without instruction difficulty and gaming
FOLDS = 5  # of the package's cross-validation: fewer judgments cannot be fitted
NEWTON_STEPS = 50  # at most; some six are taken
RIDGE = 1e-4  # keeps a resample solvable whose judgments are all the same
_COLUMNS = ("index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")


class LengthControlled(NamedTuple):
    """A length-controlled win rate in percent."""

    rule: str  # the formula's name in the package
    value: float
    low: float
    high: float


class _Problem(NamedTuple):
    """What is fitted: training rows (gamed baselines first, then ours) and rows to predict."""

    train: "pd.DataFrame"
    test: "pd.DataFrame"
    weights: np.ndarray | None  # [train]


def length_controlled(
    preferences: np.ndarray,
    excess: np.ndarray,
    gamed: Path | None,
    resamples: int,
    seed: int,
) -> LengthControlled:
    """Fit the GLM and predict the win rate at equal lengths.

    Args:
        preferences: [N] the judge's for the policy in [0, 1]; NaN where there is no verdict.
        excess: [N] length of the baseline's output minus the policy's, in characters.
        gamed: the package's ``df_gamed.csv``, if row i is the official instruction i: then
            P(policy wins) = sigma(a tanh(excess/std) + b difficulty + c), regularised by the gamed
            baselines. Without it P = sigma(a tanh(excess/std) + c).
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        FPOError: a gamed file of another form.
        ValueError: fewer than ``FOLDS`` judgments, or the same difference of lengths everywhere.
    """
    if np.count_nonzero(~np.isnan(preferences)) < FOLDS:
        raise ValueError(f"fewer than {FOLDS} judgments")
    if len(set(excess.tolist())) == 1:
        raise ValueError("the lengths of both sides differ by the same everywhere")
    from sklearn import config_context

    _, glm = alpaca_metrics()
    # The package's fit switches a global setting on; sklearn 1.9 warns of how it is called.
    with config_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rule = MINIMAL if gamed is None else OFFICIAL
        problem = _problem(glm, rule, preferences, excess, gamed)
        known = problem.train["preference"].notna()
        model = glm.fit_LogisticRegressionCV(
            problem.train[known],
            "preference",
            sample_weight=None if problem.weights is None else problem.weights[known.to_numpy()],
            n_splits=FOLDS,
        )
        value = float(model.predict_proba(problem.test)[:, 1].mean() * 100)
    low, high = np.percentile(_resampled(problem, preferences, resamples, seed), [2.5, 97.5])
    # Shrinkage may have moved the value out.
    return LengthControlled(rule, value, min(float(low), value), max(float(high), value))


def _problem(
    glm: ModuleType, rule: str, preferences: np.ndarray, excess: np.ndarray, gamed: Path | None
) -> _Problem:
    """The design matrices of the package's ``_get_featurized_data``, from a local file."""
    import pandas as pd

    own = pd.DataFrame(
        {
            "preference": preferences,
            "index": np.arange(len(preferences)),
            "std_delta_len": excess / np.std(excess, ddof=1),
            "not_gamed_baseline": True,
        }
    )
    train, weights = own, None
    if gamed is not None:
        others, own["instruction_difficulty"] = _read_gamed(gamed, len(own))
        train = pd.concat([others, own])
        strength = glm.GLM_INFO[rule]["regularize_to_baseline_lambda"]
        ours = train["not_gamed_baseline"].to_numpy(dtype=float)
        weights = ours + strength * (1 - ours) / 2  # there are two gamed baselines
    matrix, test = glm.make_dmatrix_for_model(
        train, own.assign(std_delta_len=0.0), formula=glm.GLM_INFO[rule]["formula"]
    )
    return _Problem(matrix, test, weights)


def _read_gamed(path: Path, rows: int) -> tuple["pd.DataFrame", np.ndarray]:
    """The gamed baselines' rows, and the difficulty of the first instructions."""
    import pandas as pd

    advice = "it is df_gamed.csv of the AlpacaEval data set on the hub (tatsu-lab/alpaca_eval)"
    try:
        table = pd.read_csv(path)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise FPOError(f"{path}: not a readable CSV file ({error}); {advice}") from error
    missing = [column for column in _COLUMNS if column not in table]
    if missing:
        raise FPOError(f"{path}: no column {', '.join(missing)}; {advice}")
    if any(value is not False for value in table["not_gamed_baseline"].tolist()):
        raise FPOError(f"{path}: not_gamed_baseline has to be False in every row; {advice}")
    # As in the package: looked up by row number, where the first rows are in the official order.
    known = table.drop_duplicates("index")["instruction_difficulty"]
    difficulty = known.reindex(range(rows)).to_numpy(dtype=np.float64)
    if np.isnan(difficulty).any():
        raise FPOError(f"{path}: no difficulty for each of {rows} instructions; {advice}")
    return table.loc[:, list(_COLUMNS)], difficulty


def _resampled(problem: _Problem, preferences: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The win rate of fits without penalty, where an instruction weighs as often as it is drawn."""
    from scipy.special import expit

    design = problem.train.drop(columns="preference").to_numpy()
    targets = problem.train["preference"].fillna(0.5).to_numpy(dtype=np.float64)
    weights = np.ones(len(design)) if problem.weights is None else problem.weights
    others = np.ones(len(design) - len(preferences))  # the gamed baselines' rows come first
    test = problem.test.to_numpy()
    rates = []
    for counts in _draws(preferences, resamples, seed):
        fitted = maximum_likelihood(design, targets, weights * np.concatenate([others, counts]))
        rates.append(np.average(expit(test @ fitted), weights=counts) * 100)
    return np.array(rates)


def maximum_likelihood(design: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Logistic regression by Newton's method.

    Args:
        design: [N, D].
        targets: [N] in [0, 1].
        weights: [N] of the rows.

    Returns:
        Coefficients [D].
    """
    from scipy.special import expit

    fitted = np.zeros(design.shape[1])
    for _ in range(NEWTON_STEPS):
        shares = expit(design @ fitted)
        gradient = design.T @ (weights * (targets - shares)) - RIDGE * fitted
        curvature = (design.T * (weights * shares * (1 - shares))) @ design
        step = np.linalg.solve(curvature + RIDGE * np.eye(len(fitted)), gradient)
        fitted += step / max(1.0, np.abs(step).max())  # no leaps where it is flat
        if np.abs(step).max() < 1e-8:
            break
    return fitted


def _draws(preferences: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """How often each instruction is drawn [resamples, N]; those without a verdict stay out."""
    known = ~np.isnan(preferences)
    counts = np.zeros((resamples, len(preferences)))
    judged = int(known.sum())
    rng = np.random.default_rng(seed)
    counts[:, known] = rng.multinomial(judged, np.full(judged, 1 / judged), size=resamples)
    return counts
