"""Stage ``sae``: train a sparse autoencoder where none is published -> the ``sae`` artifact."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from fpo_core.models.load import inference_device, load_model, load_tokenizer, prepare_cpu
from fpo_core.sae.source import CONFIG_FILE, QUALITY_FILE, WEIGHTS_FILE
from storage.errors import StoreError
from storage.writer import ArtifactWriter
from tasks.announce import announce
from tasks.run import Outcome, PipelineRun, Work

log = logging.getLogger("fpo.stage")


@task(name="sae", task_run_name="sae", cache_policy=NO_CACHE)
def sae(run: PipelineRun) -> Outcome:
    """Collect activations, train with sae-lens, measure on held-out text."""
    return announce(run.bring_about("sae", lambda writer: _train(run, writer)))


class TrainingSaver:
    """Keeps the newest state of an SAE's training with the artifact in the making.

    Args:
        writer: of the artifact.
        minutes: from one state to the next; 0: every step.
    """

    def __init__(self, writer: ArtifactWriter, minutes: float) -> None:
        self._checkpoints = writer.checkpoints()
        self._scratch = writer.scratch() / "training"
        self._seconds = 60 * minutes
        self._last = time.monotonic()

    def newest(self) -> Path | None:
        """The folder of the state to go on from."""
        saved = self._checkpoints.newest()
        return saved and saved.folder

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._last >= self._seconds

    def save(self, trainer: Any) -> None:
        """Keep the state of the trainer; one that cannot be kept is said."""
        from fpo_core.sae.train_state import save_training

        self._last = time.monotonic()
        try:
            files = save_training(trainer, self._scratch)
            self._checkpoints.put(f"step-{trainer.n_training_steps:08d}", files)
            self._checkpoints.keep(1)
        except (OSError, StoreError) as error:
            log.warning("the SAE's training could not be saved, and goes on: %s", error)


def _train(run: PipelineRun, writer: ArtifactWriter) -> Work:
    from fpo_core.data.text import Documents, token_windows
    from fpo_core.sae.coder import load_coder
    from fpo_core.sae.collect import SKIP_POSITIONS, collect_activations
    from fpo_core.sae.quality import sae_quality
    from fpo_core.sae.train import check_enough, train_sae

    settings, hookpoint = run.recipe.sae.train, run.recipe.sae.hookpoint
    assert settings is not None
    prepare_cpu(run.recipe.resources.threads)
    run.record_date()
    # A warm start keeps the tokenizer.
    chat = run.chat_format(load_tokenizer(run.base_folder()))
    windows = token_windows(
        settings.text,
        Documents(chat, run.recipe.data.system),
        length=settings.context_length,
        max_tokens=settings.max_tokens,
        resolved=run.plan.resolved,
    )
    heldout = max(1, int(len(windows) * settings.heldout_share))
    check_enough((len(windows) - heldout) * (settings.context_length - SKIP_POSITIONS), settings)
    device = inference_device()
    model = load_model(
        run.reference_folder(), dtype="float32", attention=run.recipe.model.attention, device=device
    )
    scratch = writer.scratch()
    activations = collect_activations(model, windows[:-heldout], hookpoint, scratch / "activations")
    metadata = {
        "model_name": run.recipe.model.source,
        "hook_name": f"blocks.{hookpoint.layer}.hook_{hookpoint.site}",  # sae-lens' words
        "context_size": settings.context_length,
        "prepend_bos": bool(chat.bos),
        "skipped_positions": SKIP_POSITIONS,
        "training_tokens": len(activations),
    }
    train_sae(
        activations, settings, metadata, scratch / "sae", device=device,
        saver=TrainingSaver(writer, run.recipe.resources.checkpoint_minutes),
    )  # fmt: skip
    coder = load_coder(scratch / "sae").to(device)
    quality = sae_quality(model, coder, hookpoint, windows[-heldout:])
    log.info("quality on %d held-out tokens: %s", quality["tokens"], json.dumps(quality))
    (scratch / "sae" / QUALITY_FILE).write_text(json.dumps(quality, indent=2) + "\n")
    for name in (CONFIG_FILE, WEIGHTS_FILE, QUALITY_FILE):
        writer.put_file(f"sae/{name}", scratch / "sae" / name)
    return Work({"quality": quality}, windows.numel())
