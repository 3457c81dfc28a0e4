"""The SAEs' gate by itself: every SAE of a recipe, measured where it is to read."""

import logging
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fpo_core.errors import FPOError
from fpo_core.models.load import inference_device, load_model, prepare_cpu
from tasks.gate import is_only_told, measure_gate, sae_name
from tasks.offline import check_attached, sae_path
from tasks.run import PipelineRun
from tasks.tokenize import tokenize

if TYPE_CHECKING:
    from fpo_core.sae.coder import SparseCoder

log = logging.getLogger("fpo.stage")


class SaeCheck(NamedTuple):
    """What became of one SAE."""

    name: str
    verdict: Literal["fits", "refused", "told"]  # told: not in its place, and used all the same
    record: dict[str, Any]  # of ``fpo_core.sae.gate.gate_record``


def check_saes(run: PipelineRun, tokens: int | None) -> list[SaeCheck]:
    """Measure every SAE of a recipe on its pairs, which are tokenized when they are not there.

    Args:
        run: the pipeline run.
        tokens: to measure on; None: as the stage takes.

    Raises:
        FPOError: an SAE that is not trained yet, or whose width is not the model's.
    """
    recipe = run.recipe
    if recipe.sae.train is not None and run.missing("sae"):
        raise FPOError(
            f"the SAE of recipe {recipe.name!r} is not trained yet: run `fpo run --only sae` first"
        )
    if run.missing("tokenize"):
        log.info("no pairs in the store yet: making them, as `fpo run --only tokenize` does")
        with run.recorded(["tokenize"]):
            tokenize.fn(run)
    prepare_cpu(recipe.resources.threads)
    folder = run.reference_folder
    if recipe.sft is not None and run.missing("sft"):
        log.info("there is no warm start yet: measuring on the model that it starts from")
        folder = run.base_folder
    model = load_model(
        folder(), dtype=recipe.model.dtype, attention=recipe.model.attention,
        device=inference_device(),
    )  # fmt: skip
    return [_check(run, model, sae, tokens) for sae in range(len(recipe.hookpoints))]


def _check(run: PipelineRun, model: Any, sae: int, tokens: int | None) -> SaeCheck:
    coder, refusal = _coder(run, model, sae)
    coder = coder.to(str(model.device))
    record = measure_gate(run, model, coder, sae, sae_path(run, sae), tokens)
    if refusal:  # whatever the gate's setting says
        cause = f"{refusal}. By its figures, {record['cause'] or 'it would fit'}"
        return SaeCheck(sae_name(run, sae), "refused", {**record, "fits": False, "cause": cause})
    verdict = "fits" if record["fits"] else "told" if is_only_told(run, sae) else "refused"
    return SaeCheck(sae_name(run, sae), verdict, record)


def _coder(run: PipelineRun, model: Any, sae: int) -> tuple["SparseCoder", str]:
    """The SAE, and why it would not be attached; its figures say more than what it declares."""
    from fpo_core.sae.coder import load_coder

    coder = load_coder(sae_path(run, sae))
    try:
        check_attached(run, model, coder, sae)
    except FPOError as error:
        if coder.d_in != model.get_decoder().config.hidden_size:
            raise
        return coder, str(error)
    return coder, ""
