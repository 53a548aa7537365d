"""ByteDropout has dropout's distribution."""

from __future__ import annotations

import pytest
import torch

from fedlp.models.dropout import ByteDropout


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_zeroes_a_fraction_and_scales_the_rest(p: float, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    inputs = torch.ones(5, 7, 30, 31).contiguous(memory_format=layout).requires_grad_()
    outputs = ByteDropout(p)(inputs)
    assert outputs.is_contiguous(memory_format=layout)
    dropped = outputs == 0
    torch.testing.assert_close(outputs, torch.where(dropped, 0.0, 1 / (1 - p)))
    assert float(dropped.float().mean()) == pytest.approx(p, abs=0.02)
    outputs.sum().backward()
    assert torch.equal(inputs.grad, outputs.detach())


def test_draws_come_from_the_seed_and_only_in_training() -> None:
    layer, inputs = ByteDropout(0.5), torch.ones(3, 11)
    torch.manual_seed(4)
    first = layer(inputs)
    assert not torch.equal(first, layer(inputs))
    torch.manual_seed(4)
    assert torch.equal(first, layer(inputs))
    assert torch.equal(layer.eval()(inputs), inputs)


@pytest.mark.parametrize("p", [-0.25, 1.0, 0.3])
def test_refuses_what_a_byte_cannot_decide(p: float) -> None:
    with pytest.raises(ValueError, match="multiple of 1/256"):
        ByteDropout(p)
