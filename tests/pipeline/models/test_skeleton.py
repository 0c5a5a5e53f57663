"""A skeleton equals the model that transformers opens, except for its parameters' values."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.skeleton import skeleton_with_buffers
from tests.parity.test_families import VARIANTS, build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_family(variant, dtype, tmp_path):
    build(variant).to(dtype).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    checkpoint = Checkpoint.open(tmp_path)
    model, places = skeleton_with_buffers(checkpoint, dtype)
    buffers, expected = dict(model.named_buffers()), dict(whole.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in expected.items():
        assert buffers[name].dtype == buffer.dtype
        assert torch.equal(buffers[name], buffer)
    assert not any(module.training for module in model.modules())
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert list(names.values()) == [name for name, _ in whole.named_parameters()]
    for parameter, stored in places.items():
        assert parameter.is_meta
        assert parameter.dtype == dtype
        assert stored is not None
        assert torch.equal(checkpoint.read(stored), whole.get_parameter(names[parameter]))
