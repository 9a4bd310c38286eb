"""Initial weights: from the checkpoint of another run, or pretrained."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config import JobConfig, TorchvisionModelConfig
from pipeline.errors import JobError
from pipeline.models.freezing import last_layer_names
from pipeline.models.torchvision import load_pretrained
from pipeline.redaction import redact, resolve_env
from pipeline.runs.checkpoints.checkpoint import find_checkpoint
from pipeline.runs.run import open_run, parse_run_ref

MAX_LISTED = 4

OPTIONAL_BUFFER_SUFFIX = ".num_batches_tracked"
"""Buffers that the oldest published weights lack; nothing is computed from them here."""


@dataclass(frozen=True)
class InitialWeights:
    """Weights from which training starts.

    state_dict: tensors on the CPU by name.
    digest: SHA-256 of their names, types, shapes and bytes.
    name: their source, for messages.
    where: the job's key that names them.
    new_head: whether they were trained for other classes: a last layer that does not fit is left untrained.
    """

    state_dict: Mapping[str, Tensor]
    digest: str
    name: str
    where: str
    new_head: bool = False


def find_initial_weights(job: JobConfig, storage_url: str) -> InitialWeights | None:
    """Return the weights from which a job starts, or None for random initialization.

    Reading them runs no code: they are read as safetensors, or from a .pth file with `weights_only=True`.

    Parameters
    ----------
    storage_url: folder of runs in which `model.init_from` is looked up if it is a name.

    Raises
    ------
    InputError: there is no such run, checkpoint, file or download, or it is damaged.
    """
    config = job.model
    weights_named = isinstance(config, TorchvisionModelConfig) and config.weights is not None
    if config.init_from is not None:
        if weights_named:
            raise JobError(
                "init_from and weights both set the initial weights", where="model", fix="leave one of them out"
            )
        run_name, which = parse_run_ref(resolve_env(config.init_from, "model.init_from"))
        checkpoint = find_checkpoint(open_run(run_name, storage_url), which)
        weights = checkpoint.load_weights()
        name = f"{redact(run_name)} at step {checkpoint.step}"
        return InitialWeights(weights, compute_weights_digest(weights), name, f"model.init_from: {config.init_from}")
    if isinstance(config, TorchvisionModelConfig) and weights_named:
        weights, name = load_pretrained(config)
        return InitialWeights(
            weights, compute_weights_digest(weights), name, f"model.weights: {config.weights}", new_head=True
        )
    return None


def load_matching_weights(model: nn.Module, initial_weights: InitialWeights, *, strict: bool) -> list[str]:
    """Copy initial weights into a model, in place.

    Parameters
    ----------
    strict: false copies the tensors that match by name and shape and leaves the others unchanged.

    Returns
    -------
    The mismatches, as text; always empty if `strict`.

    Raises
    ------
    JobError: something does not match, and `strict`; or nothing matches.
    """
    model_state, initial_state = model.state_dict(), initial_weights.state_dict
    shapes = {  # theirs and the model's
        name: (tuple(initial_state[name].shape), tuple(model_state[name].shape))
        for name in model_state
        if name in initial_state
    }
    differ = [name for name, (theirs, ours) in shapes.items() if theirs != ours]
    missing = [name for name in model_state if name not in initial_state]
    if initial_weights.new_head:
        head = set(last_layer_names(model))
        differ = [name for name in differ if name not in head]
        missing = [name for name in missing if name not in head and not name.endswith(OPTIONAL_BUFFER_SUFFIX)]
    mismatches = _format_lists(
        {
            "missing there": missing,
            "not in this model": [name for name in initial_state if name not in model_state],
            "of another shape": [f"{name} {shapes[name][0]}, in this model {shapes[name][1]}" for name in differ],
        }
    )
    matching = [name for name, (theirs, ours) in shapes.items() if theirs == ours]
    if not matching:
        raise JobError(
            f"no tensor of {initial_weights.name} fits this model: {'; '.join(mismatches)}",
            where=initial_weights.where,
            fix="name a run of the same model",
        )
    if mismatches and strict:
        raise JobError(
            f"{initial_weights.name} does not fit this model: {'; '.join(mismatches)}",
            where=initial_weights.where,
            fix="model.strict: false uses only what fits",
        )
    with torch.no_grad():
        for name in matching:
            model_state[name].copy_(initial_state[name])
    return mismatches


def compute_weights_digest(state_dict: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of CPU tensors, ordered by name."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _format_lists(names_by_problem: Mapping[str, Iterable[str]]) -> list[str]:
    """Return `missing there: a, b, ... (7 in all)` for each list that is not empty."""
    lines = []
    for problem, iterable in names_by_problem.items():
        names = list(iterable)
        rest = f", ... ({len(names)} in all)" if len(names) > MAX_LISTED else ""
        if names:
            lines.append(f"{problem}: {', '.join(names[:MAX_LISTED])}{rest}")
    return lines
