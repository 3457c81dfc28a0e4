"""Checkpoints of a training run: float32 masters and optimizer state, whole parameters by name.

Written and read through DeepSpeed's access to full parameters, so that a checkpoint knows nothing
of ranks or ZeRO stages: a run resumes on any number of ranks, and no pickle is read. Each rank
writes the parameters whose number is its own modulo the ranks; rank 0 adds what the run had logged
and, last, ``checkpoint.json``. A folder is complete when all the files that it names are there.

With one optimizer for all parameters, its step counter is one number.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fpo_core.errors import FPOError
from fpo_core.training.job import LOG_FILES, TrainingJob

META_FILE = "checkpoint.json"
MASTER = "master"  # beside the optimizer's own names: exp_avg, exp_avg_sq, square_avg


class Checkpoint(NamedTuple):
    """What a checkpoint says of itself."""

    step: int  # optimizer steps done; the order of the data follows from it
    ranks: int  # that wrote it, and so its number of state files
    version: str  # of the policy that the run is to make
    made_from: dict[str, Any]  # what that version follows from: the run's settings and inputs

    @property
    def files(self) -> tuple[str, ...]:
        """The files of a complete one."""
        states = (_state_file(rank, self.ranks) for rank in range(self.ranks))
        return (*states, *LOG_FILES, META_FILE)


def folder_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def is_complete(folder: Path) -> bool:
    """Whether all files of a checkpoint are there; each is renamed into its place when written."""
    try:
        return all((folder / name).is_file() for name in read_meta(folder).files)
    except FPOError:
        return False


def read_meta(folder: Path) -> Checkpoint:
    """A checkpoint's ``checkpoint.json``.

    Raises:
        FPOError: it is missing or not one.
    """
    path = folder / META_FILE
    try:
        return Checkpoint(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise FPOError(f"checkpoint {folder.name}: {META_FILE} cannot be read ({error})") from error


def check_same_run(meta: Checkpoint, job: TrainingJob) -> None:
    """Refuse a checkpoint that is of another run.

    Raises:
        FPOError: naming what differs, with both values.
    """
    if meta.version == job.version:
        return
    nothing = "nothing"
    names = sorted(meta.made_from.keys() | job.made_from.keys())
    pairs = ((n, meta.made_from.get(n, nothing), job.made_from.get(n, nothing)) for n in names)
    told = "; ".join(f"{name}: {old} there, {new} here" for name, old, new in pairs if old != new)
    raise FPOError(
        f"checkpoint {folder_name(meta.step)} is of the policy {meta.version}, this run makes "
        f"{job.version}: {told or 'another schema version'}"
    )


def save_checkpoint(engine: Any, folder: Path, meta: Checkpoint, rank: int, output: Path) -> None:
    """Write this rank's part; all ranks have to call it at the same step.

    Args:
        engine: the DeepSpeed engine.
        folder: the checkpoint's.
        meta: what it says of itself.
        rank: this rank.
        output: where the run's logs are; they are kept with rank 0's part.

    Raises:
        OSError: the disk cannot take it (SafetensorError where that library says it).
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    mine: dict[str, Tensor] = {}
    for number, (name, parameter) in enumerate(_parameters(engine)):
        for key in (MASTER, *_state_names(engine)):
            value = _full(engine, parameter, key)
            if number % meta.ranks == rank:
                mine[f"{key}.{name}"] = value.detach().to("cpu", torch.float32).contiguous()
    counters = {"optimizer_steps": str(_optimizer_steps(engine))}
    with _renamed(folder / _state_file(rank, meta.ranks)) as partial:
        save_file(mine, partial, metadata=counters)
    if rank == 0:
        for name in LOG_FILES:
            with _renamed(folder / name) as partial:
                shutil.copyfile(output / name, partial)
        with _renamed(folder / META_FILE) as partial:
            partial.write_text(json.dumps(meta._asdict()))


@contextmanager
def _renamed(file: Path) -> Iterator[Path]:
    """A name to write under; the file gets its own when it is whole, and none when that fails."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        yield partial
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)


def begin_logs(output: Path, resume: Path | None) -> None:
    """Put the run's logs in place: as the checkpoint to go on from has them, else empty."""
    for name in LOG_FILES:
        saved = resume / name if resume else None
        with _renamed(output / name) as partial:  # who follows them sees a whole one
            partial.write_bytes(saved.read_bytes() if saved and saved.is_file() else b"")


def load_checkpoint(engine: Any, folder: Path) -> int:
    """Put a checkpoint's state into an engine of the same model and optimizer, on any ranks.

    Returns:
        The step to go on after.

    Raises:
        FPOError: files missing, or of another model or optimizer.
    """
    from safetensors import SafetensorError, safe_open

    meta = read_meta(folder)
    places: dict[str, Any] = {}
    try:
        files = [
            safe_open(folder / _state_file(rank, meta.ranks), "pt") for rank in range(meta.ranks)
        ]
        for file in files:
            places |= dict.fromkeys(file.keys(), file)
        steps = float(files[0].metadata()["optimizer_steps"])
    except (OSError, SafetensorError) as error:
        raise FPOError(f"checkpoint {folder.name} is incomplete or damaged: {error}") from error
    keys = (MASTER, *_state_names(engine))
    wanted = {f"{key}.{name}" for name, _ in _parameters(engine) for key in keys}
    if wanted != set(places):
        odd = sorted(wanted ^ set(places))
        raise FPOError(
            f"checkpoint {folder.name} is of another model or optimizer: {len(odd)} tensors "
            f"differ, {odd[0]} the first"
        )
    _make_states(engine)
    for name, parameter in _parameters(engine):
        for key in (MASTER, *_state_names(engine)):
            full = f"{key}.{name}"
            _set_full(engine, parameter, key, places[full].get_tensor(full))
    _set_optimizer_steps(engine, steps)
    return meta.step


def full_masters(engine: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The policy's weights by name on the CPU, on rank 0; empty elsewhere. A collective."""
    first = torch.distributed.get_rank() == 0
    state = {}
    for name, parameter in _parameters(engine):
        value = _full(engine, parameter, MASTER)
        if first:
            state[name] = value.detach().to("cpu", dtype)
    return state


def _state_file(rank: int, ranks: int) -> str:
    return f"state-{rank:05d}-of-{ranks:05d}.safetensors"


def _parameters(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """The policy's parameters by name, in an order that every rank has."""
    return engine.module.model.named_parameters()


def _base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """torch's optimizer, under whatever ZeRO puts around it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _state_names(engine: Any) -> tuple[str, ...]:
    """What the optimizer keeps a parameter, beside its step counter."""
    base = _base_optimizer(engine)
    return ("square_avg",) if isinstance(base, torch.optim.RMSprop) else ("exp_avg", "exp_avg_sq")


def _is_partitioned(engine: Any) -> bool:
    """Whether masters and optimizer state are DeepSpeed's flat partitions, not the parameters'."""
    return engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled()


def _flat_masters(engine: Any) -> list[Tensor]:
    """The tensors that the base optimizer updates."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [p for group in _base_optimizer(engine).param_groups for p in group["params"]]


def _full(engine: Any, parameter: Tensor, key: str) -> Tensor:
    """The whole master, or the whole of one of its optimizer states; a collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not _is_partitioned(engine):
        return parameter if key == MASTER else _base_optimizer(engine).state[parameter][key]
    if key == MASTER:
        value = safe_get_full_fp32_param(parameter)
    else:
        value = safe_get_full_optimizer_state(parameter, key)
    assert value is not None
    return value


@torch.no_grad()
def _set_full(engine: Any, parameter: Tensor, key: str, value: Tensor) -> None:
    """Put a whole master or optimizer state back, on every rank; a collective."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    value = value.to(parameter.device)
    if not _is_partitioned(engine):
        target = parameter if key == MASTER else _base_optimizer(engine).state[parameter][key]
        target.copy_(value)
    elif engine.zero_optimization_stage() == 3:
        _set_partition(engine, parameter, key, value)
    elif key == MASTER:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)
    if key == MASTER and _is_partitioned(engine):
        # The copy that the model computes with is another one.
        with GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)


def _set_partition(engine: Any, parameter: Tensor, key: str, value: Tensor) -> None:
    """This rank's part under ZeRO-3, the last rank's padded.

    DeepSpeed's own ``safe_set_full_...`` fails where a parameter does not divide by the ranks.
    """
    part, _ = engine.optimizer._get_fp32_opt_state_partition(
        parameter, release_swap_buffers=False, optim_state_key=None if key == MASTER else key
    )
    start = torch.distributed.get_rank() * part.numel()
    mine = value.flatten()[start : start + part.numel()]
    part[: mine.numel()].copy_(mine)


def _make_states(engine: Any) -> None:
    """Optimizer states of zeros, as the first step makes them where there are none."""
    base = _base_optimizer(engine)
    for master in _flat_masters(engine):
        on_device = master.device if base.defaults.get("fused") else "cpu"
        state = base.state[master]
        state["step"] = torch.zeros((), dtype=torch.float32, device=on_device)
        for name in _state_names(engine):
            state[name] = torch.zeros_like(master)
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()


def _optimizer_steps(engine: Any) -> float:
    counters = [state["step"] for state in _base_optimizer(engine).state.values()]
    return float(counters[0])


def _set_optimizer_steps(engine: Any, steps: float) -> None:
    for state in _base_optimizer(engine).state.values():
        state["step"].fill_(steps)
