"""Stage ``evaluate``: the policy on held-out pairs and prompts -> the ``evaluation`` artifact."""

import json
import logging
from typing import TYPE_CHECKING, Any

import polars as pl
from prefect import task
from prefect.cache_policies import NO_CACHE

from fpo_core.data.render import ChatFormat
from fpo_core.models.load import inference_device, load_model, load_tokenizer, prepare_cpu
from fpo_core.progress import Progress
from storage.writer import ArtifactWriter
from tasks.announce import announce
from tasks.bench_plan import evaluation_questions
from tasks.offline import attached_coder
from tasks.run import Outcome, PipelineRun, Work
from tasks.transfer import local_folder, local_shards

if TYPE_CHECKING:
    from fpo_core.evaluation.heldout import HeldoutScores
    from fpo_core.generation.answers import Generated
    from fpo_core.training.examples import Example

log = logging.getLogger("fpo.stage")

MOVED_FEATURES = 20
SHOWN_TOKENS = 6


@task(name="evaluate", task_run_name="evaluate", cache_policy=NO_CACHE)
def evaluate(run: PipelineRun) -> Outcome:
    """Measure the policy against the reference, with intervals, and sample answers."""
    return announce(run.bring_about("evaluate", lambda writer: _evaluate(run, writer)))


def _evaluate(run: PipelineRun, writer: ArtifactWriter) -> Work:
    from fpo_core.evaluation.audit import Groups, audit_table, group_table
    from fpo_core.evaluation.heldout import score_heldout
    from fpo_core.evaluation.metrics import answer_metrics, heldout_metrics, metric_record
    from fpo_core.evaluation.tables import read_answered
    from fpo_core.sae.coder import AttachedSae
    from fpo_core.training.examples import FeatureShards, read_examples
    from tasks.breakdown import heldout_metadata, with_metadata, write_breakdown

    settings = run.recipe.evaluation
    prepare_cpu(run.recipe.resources.threads)
    policy_folder = local_folder(run.artifact("train"), "model")
    options = {
        "dtype": run.recipe.model.dtype, "attention": run.recipe.model.attention,
        "device": inference_device(),
    }  # fmt: skip
    policy = load_model(policy_folder, **options)
    reference = load_model(run.reference_folder(), **options)
    tokenizer = load_tokenizer(policy_folder)
    coder = attached_coder(run, reference).to(options["device"])
    sae = AttachedSae(coder, run.recipe.sae.hookpoint)
    features = run.artifact("features")
    cache = FeatureShards(
        local_shards(features, "pooled"), (), sae.coder.d_sae, (), f"features ({sae.hookpoint})"
    )
    examples = read_examples(
        local_shards(run.artifact("tokenize")), local_shards(run.artifact("reference")), [cache],
        run.recipe.train.k, "heldout",
    )  # fmt: skip
    groups = Groups(run.recipe.train.group_features, sae.coder.d_sae)
    with Progress("held-out pairs", total=len(examples), unit="pair") as progress:
        scores = score_heldout(
            policy, reference, examples, sae, groups,
            k=run.recipe.train.k, tokens_per_batch=run.recipe.resources.tokens_per_batch,
            on_pairs=progress.advance,
        )  # fmt: skip
    metrics = heldout_metrics(scores, settings.bootstrap, settings.seed)
    answers = _answers(run, policy, reference, tokenizer, examples)
    if answers:
        answered = read_answered(pl.DataFrame(answers))
        metrics += answer_metrics(answered, settings.bootstrap, settings.seed)
    records = [metric_record(metric) for metric in metrics]
    audit = audit_table(scores.features)
    metadata = heldout_metadata(run.artifact("tokenize"), scores.pair_ids)
    write_breakdown(writer, scores, metadata, settings.bootstrap, settings.seed)
    scratch = writer.scratch()
    for name, frame in (
        ("pairs", with_metadata(_pair_frame(scores), metadata)),
        ("answers", pl.DataFrame(answers)),
        ("audit", audit),
        ("groups", group_table(groups, scores.groups)),
        ("features", _moved_features(run, audit, tokenizer)),
    ):
        path = scratch / f"{name}.parquet"
        frame.write_parquet(path)
        writer.put_file(f"{name}.parquet", path)
    writer.put_bytes("metrics.json", (json.dumps(records, indent=2) + "\n").encode())
    tokens = sum(example.ids.length for example in examples)
    summary = {record["key"]: record["policy"]["value"] for record in records}
    return Work({"heldout_pairs": len(examples), **summary}, 2 * tokens)


def _answers(
    run: PipelineRun, policy: Any, reference: Any, tokenizer: Any, examples: list["Example"]
) -> list[dict[str, Any]]:
    from fpo_core.generation.answers import Prompt, Sampling, prompt_seed
    from fpo_core.generation.transformers_backend import TransformersBackend, answer_budget

    settings = run.recipe.evaluation
    chat = run.chat_format(tokenizer)
    asked = _asked(run, chat, examples)
    if not asked:
        return []
    sampling = Sampling(settings.max_new_tokens, stop=chat.end_tokens())
    prompts = [
        Prompt(
            name, 0, settings.temperature, 0,
            prompt_seed(settings.seed, name, 0, settings.temperature, 0), (), ids,
        )
        for name, ids in asked
    ]  # fmt: skip
    rows = [
        {"pair_id": prompt.question_id, "prompt": chat.shown_prompt(list(prompt.ids))}
        for prompt in prompts
    ]
    with Progress("sampled answers", total=2 * len(prompts), unit="answer") as progress:
        for name, model in (("before", reference), ("after", policy)):
            budget = answer_budget(model, run.recipe.resources.generation_tokens)
            found = {}
            for one in TransformersBackend(model, tokenizer, sampling, budget).generate(prompts):
                found[one.prompt.question_id] = _answer(name, one, model)
                progress.advance(1)
            for row in rows:
                row |= found[row["pair_id"]]
    return rows


def _asked(
    run: PipelineRun, chat: ChatFormat, examples: list["Example"]
) -> list[tuple[str, list[int]]]:
    """What is answered, by pair or question id: token ids up to the opener of the answer."""
    from fpo_core.generation.prompts import dialogue

    questions = evaluation_questions(run.recipe)
    if questions is None:
        # A side that begins with another speaker has no prompt that an answer could follow.
        asked = [one for one in examples if all(0 not in r[:1] for r in one.ids.unscored)]
        chosen = asked[: run.recipe.evaluation.prompts]
        return [(example.ids.pair_id, list(example.ids.prompt)) for example in chosen]
    texts = [chat.prompt_text(dialogue(question.turns, ())) for question in questions]
    names = [question.id for question in questions]
    return list(zip(names, chat.ids(texts), strict=True))


def _answer(name: str, answer: "Generated", model: Any) -> dict[str, Any]:
    from fpo_core.generation.answers import END_OF_TURN
    from fpo_core.generation.entropy import mean_entropy

    # The end-of-turn token was sampled too: its distribution counts.
    entropy = mean_entropy(model, answer.prompt.ids, answer.answer_ids)
    return {
        name: answer.text,
        f"{name}_stop": answer.stop,
        f"{name}_tokens": answer.tokens - (answer.stop == END_OF_TURN),
        f"{name}_entropy": entropy,
    }


def _pair_frame(scores: "HeldoutScores") -> pl.DataFrame:
    columns: dict[str, Any] = {"pair_id": scores.pair_ids}
    for name, values in scores.by_pair().items():
        columns[f"{name}_chosen"], columns[f"{name}_rejected"] = values[:, 0], values[:, 1]
    return pl.DataFrame(columns)


def _moved_features(run: PipelineRun, audit: pl.DataFrame, tokenizer: Any) -> pl.DataFrame:
    """The features whose mean pooled activation moved most, on either side, and where they fire."""
    by_size = audit.sort(pl.col("change").abs(), "feature", descending=[True, False])
    moved = pl.concat(
        by_size.filter(pl.col("side") == side).head(MOVED_FEATURES)
        for side in ("chosen", "rejected")
    )
    tokens = firing_tokens(run, set(moved["feature"].to_list()))
    shown = [[tokenizer.decode([one]) for one in tokens[feature]] for feature in moved["feature"]]
    return moved.with_columns(tokens=pl.Series(shown, dtype=pl.List(pl.String)))


def firing_tokens(run: PipelineRun, features: set[int]) -> dict[int, list[int]]:
    """The tokens that each feature is most active on in the reference's cache, strongest first."""
    found = (
        run.artifact("features")
        .scan("tokens")
        .select("token_id", "indices", "values")
        .explode("indices", "values")
        .filter(pl.col("indices").is_in(features))
        .group_by("indices", "token_id")
        .agg(pl.col("values").max())
        .sort("values", "token_id", descending=[True, False])
        .group_by("indices", maintain_order=True)
        .agg(pl.col("token_id").head(SHOWN_TOKENS))
        .collect()
    )
    tokens = dict(zip(found["indices"].to_list(), found["token_id"].to_list(), strict=True))
    return {feature: tokens.get(feature, []) for feature in features}
