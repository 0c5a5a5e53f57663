"""The stage that publishes the edited checkpoint."""

from __future__ import annotations

import torch

from pipeline.events import StageName
from pipeline.models import Checkpoint, ModelSource, digest_of_files, model_on_node, publish
from pipeline.run_folder import CARD, MODEL, OF_EDITED, PUBLISHED
from pipeline.stages.context import Context
from pipeline.zero import LayerReport
from pmet.delta import checked, saved_delta


def publish_model(run: Context, reports: list[LayerReport]) -> None:
    """Write the edited checkpoint to ``model/``: the base's files with the edited tensors.

    Without reports, the base's files are written unchanged.
    """
    plan = run.plan
    if run.folder.recorded(PUBLISHED):
        return
    layers = plan.hparams.layers if reports else ()
    by_tensor: dict[str, tuple[LayerReport, int | None]] = {}
    for layer, report in zip(layers, reports, strict=True):
        stored = plan.stored[layer]
        if not stored.parts:
            by_tensor[stored.name] = (report, None)
        for expert, part in enumerate(stored.parts):
            by_tensor[part.name] = (report, expert)

    def edited(name: str, base: torch.Tensor) -> torch.Tensor:
        report, expert = by_tensor[name]
        with run.store.local_copy(report.file) as path:
            return checked(name, base, saved_delta(path, report.parameter, expert))

    run.folder.forget(*OF_EDITED)
    digests: dict[str, str] = {}
    base = plan.checkpoint
    if not base.folder.is_dir():
        # The store may have been opened days ago, and another run may have freed this disk.
        base = Checkpoint.open(model_on_node(plan.base.folder, plan.base.digest))
    run.folder.clear_model(base.files())
    # A few files hold nearly all bytes.
    sizes = {name: base.megabytes(name) for name in base.files()}
    with run.stage(StageName.PUBLISH, sum(sizes.values())) as (bar, _):

        def on_file(name: str) -> None:
            run.folder.check()
            if name != CARD:
                digests[f"{MODEL}/{name}"] = run.store.sha256(f"{MODEL}/{name}")
            bar.advance(sizes[name])
            bar.note(f"{len(digests)} of {len(sizes)} files")

        publish(base, by_tensor, edited, run.store, MODEL, on_file=on_file)
    run.folder.record(PUBLISHED, {"files": digests})


def published_model(run: Context) -> ModelSource:
    """The edited checkpoint, for the workers."""
    record = run.folder.recorded(PUBLISHED)
    assert record is not None, "it has been published"
    files = {n.removeprefix(f"{MODEL}/"): digest for n, digest in record["files"].items()}
    return ModelSource(run.store.join(MODEL), run.plan.base.on_gpu, digest=digest_of_files(files))
