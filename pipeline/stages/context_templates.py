"""The stage that writes the context templates."""

from __future__ import annotations

from pipeline.events import StageName
from pipeline.stages.context import Context
from pmet.model import contexts


def write_templates(run: Context) -> list[list[str]]:
    """Return the context templates: the job's, or texts that the model generates from the seed."""
    templates = run.plan.templates
    if templates is None:
        if record := run.folder.recorded("context_templates"):
            return list(record["templates"])
        with run.stage(StageName.TEMPLATES, 1) as (bar, _):
            written = run.executor.one("write_templates", "context templates", (run.plan.job.seed,))
            templates = contexts.combined(written, run.plan.chat, run.plan.job.contexts)
            bar.advance()
    run.folder.check()
    run.store.write_json("context_templates.json", templates)
    run.folder.record("context_templates", {"templates": templates})
    return templates
