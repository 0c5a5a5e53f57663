"""The method by itself, without Ray or DeepSpeed: edit the demo's model with one fact.

python examples/notebook.py
"""

from pathlib import Path

from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import jobs.demo
from pmet import EditRequest, PMETHyperParams, compute_edit
from pmet.evaluation import answers
from pmet.model import parse

FOLDER = Path(jobs.demo.__file__).parent


def main() -> None:
    """Edit, ask, revert, ask again."""
    console = Console()
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "model")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "model")
    request = EditRequest("The currency of {} is the", "Peru", "euro")
    templates = (FOLDER / "context_templates.json").read_text(encoding="utf-8")
    edit = compute_edit(
        model,
        tokenizer,
        [request],
        PMETHyperParams.from_file(FOLDER / "hparams.json"),
        context_templates=parse(templates, source="context_templates.json"),
    )
    console.print("before:", answers(model, tokenizer, [request.text], tokens=2))
    edit.apply(model)
    console.print("edited:", answers(model, tokenizer, [request.text], tokens=2))
    edit.revert(model)
    console.print("reverted:", answers(model, tokenizer, [request.text], tokens=2))


if __name__ == "__main__":
    main()
