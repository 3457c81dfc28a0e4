"""Stage ``sae``: train a sparse autoencoder where none is published -> the ``sae`` artifact."""

import json
import logging

from prefect import task
from prefect.cache_policies import NO_CACHE

from fpo_core.models.load import inference_device, load_model, load_tokenizer, prepare_cpu
from fpo_core.sae.source import CONFIG_FILE, WEIGHTS_FILE
from storage.writer import ArtifactWriter
from tasks.announce import announce
from tasks.run import Outcome, PipelineRun, Work

log = logging.getLogger("fpo.stage")


@task(name="sae", task_run_name="sae", cache_policy=NO_CACHE)
def sae(run: PipelineRun) -> Outcome:
    """Collect activations, train with sae-lens, measure on held-out text."""
    return announce(run.bring_about("sae", lambda writer: _train(run, writer)))


def _train(run: PipelineRun, writer: ArtifactWriter) -> Work:
    from fpo_core.data.text import token_windows
    from fpo_core.sae.coder import load_coder
    from fpo_core.sae.collect import SKIP_POSITIONS, collect_activations
    from fpo_core.sae.quality import sae_quality
    from fpo_core.sae.train import train_sae

    settings, layer = run.recipe.sae.train, run.recipe.sae.layer
    assert settings is not None
    prepare_cpu(run.recipe.resources.threads)
    folder = run.reference_folder()
    device = inference_device()
    model = load_model(folder, dtype="float32", attention=run.recipe.model.attention, device=device)
    windows = token_windows(
        settings.text, load_tokenizer(folder),
        length=settings.context_length, max_tokens=settings.max_tokens,
        hub=run.plan.hub,
    )  # fmt: skip
    heldout = max(1, int(len(windows) * settings.heldout_share))
    scratch = writer.scratch()
    activations = collect_activations(model, windows[:-heldout], layer, scratch / "activations")
    metadata = {
        "model_name": run.recipe.model.source,
        "hook_name": f"blocks.{layer}.hook_resid_post",
        "context_size": settings.context_length,
        "prepend_bos": False,
        "skipped_positions": SKIP_POSITIONS,
        "training_tokens": len(activations),
    }
    train_sae(activations, settings, metadata, scratch / "sae")
    quality = sae_quality(model, load_coder(scratch / "sae").to(device), layer, windows[-heldout:])
    log.info("quality on %d held-out tokens: %s", quality["tokens"], json.dumps(quality))
    (scratch / "sae" / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    for name in (CONFIG_FILE, WEIGHTS_FILE, "quality.json"):
        writer.put_file(f"sae/{name}", scratch / "sae" / name)
    return Work({"quality": quality}, windows.numel())
