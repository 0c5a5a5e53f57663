"""Facts that the golden models know."""

from __future__ import annotations

import json
from dataclasses import replace

from pmet.request import EditRequest
from tests.conftest import GOLDEN, Golden


def with_true_objects(golden: Golden) -> list[EditRequest]:
    """The requests of a golden model, with the objects that its corpus gives."""
    texts = json.loads((GOLDEN / "corpus.json").read_text())
    objects = {
        request.text: text.removeprefix(request.text).strip(" .")
        for request in golden.requests
        for text in texts
        if text.startswith(request.text)
    }
    return [replace(request, target_true=objects[request.text]) for request in golden.requests]
