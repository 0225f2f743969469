"""Linear layers by oneDNN: the same products and gradients, where that gains, and only within the block."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from unfed.models import kernels
from unfed.models.generate import inference

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch comes without oneDNN"
)


@pytest.fixture
def kernel(monkeypatch):
    """oneDNN on any processor; the shapes of the products that ran in it."""
    ran = []

    def pointwise(x, weight, *rest):
        ran.append((tuple(x.shape), tuple(weight.shape)))
        return torch.ops.mkldnn._linear_pointwise(x, weight, *rest)

    monkeypatch.setattr(kernels, "_pointwise", lambda: pointwise)
    return ran


def layer(rows=192, columns=576, **given):
    torch.manual_seed(0)
    return nn.Linear(columns, rows, **given)


@pytest.mark.parametrize("bias", [True, False])
def test_products_are_the_same(kernel, bias):
    own, x = layer(bias=bias), torch.randn(2, 7, 576)
    want = own(x)
    with torch.no_grad(), kernels.fast_linears(own):
        found = own(x)
    assert kernel == [((2, 7, 576), (192, 576))]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def test_gradients_are_the_same(kernel):
    own, x = layer(), torch.randn(1, 20, 576, requires_grad=True)
    inputs = (x, own.weight, own.bias)
    want = torch.autograd.grad(own(x).square().sum(), inputs)
    with torch.no_grad(), kernels.fast_linears(own), torch.enable_grad():
        found = torch.autograd.grad(own(x).square().sum(), inputs)
    for a, b in zip(found, want, strict=True):
        assert a.layout == torch.strided
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-5)
    assert not kernel  # it has no backward pass


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("own", "x"),
    [
        (layer(), torch.ones(7, 576)),
        (layer(16, 16), torch.ones(64, 16)),
        (layer(dtype=torch.float64), torch.ones(64, 576, dtype=torch.float64)),
        (layer(dtype=torch.bfloat16), torch.ones(64, 576, dtype=torch.bfloat16)),
        (Scaled(576, 192), torch.ones(64, 576)),
    ],
    ids=["few rows", "few values", "double", "half", "another class"],
)
def test_what_gains_nothing_stays(kernel, own, x):
    want = own(x)
    with torch.no_grad(), kernels.fast_linears(own):
        assert torch.equal(own(x), want)
    assert not kernel


def test_under_autocast_torch_decides(kernel):
    with torch.no_grad(), kernels.fast_linears(own := layer()), torch.autocast("cpu", torch.bfloat16):
        assert own(torch.ones(64, 576)).dtype == torch.bfloat16
    assert not kernel


def test_blocks_nest_and_leave_nothing(kernel):
    model = nn.Sequential(layer(), layer(576, 192))
    with torch.no_grad(), kernels.fast_linears(model):
        with kernels.fast_linears(model):
            pass
        model(torch.ones(8, 576))
    assert len(kernel) == 2
    with pytest.raises(RuntimeError), kernels.fast_linears(model):
        model(torch.ones(8, 5))
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_processor_without_avx512_keeps_torchs_choice(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with kernels.fast_linears(own := layer()):
        assert "forward" not in vars(own)


def test_a_model_with_an_adapter_says_the_same(kernel):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4
    )
    model = get_peft_model(
        AutoModelForCausalLM.from_config(config), LoraConfig(target_modules="all-linear", init_lora_weights=False)
    ).eval()
    ids = torch.randint(0, 300, (2, 9))
    with torch.no_grad():
        want = model(input_ids=ids).logits
    with inference(model):
        found = model(input_ids=ids).logits
    assert len(kernel) == 8  # seven projections of the block, and the head
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


def test_freed_memory_goes_back_where_the_kernels_run(kernel, monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "_trim", lambda: asked.append)
    kernels.give_back()
    monkeypatch.setattr(kernels, "_pointwise", lambda: None)
    kernels.give_back()
    assert asked == [0]
