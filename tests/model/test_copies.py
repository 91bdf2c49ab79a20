"""Models that are pickled, saved whole or copied, as DataLoader workers, `torch.save` and EMA do."""

import copy
import io
import pickle

import pytest
import torch
from peft import get_peft_model
from torch.utils.data import DataLoader, Dataset
from transformers import BitsAndBytesConfig

from grinmoe import GrinMoeForSequenceClassification
from grinmoe.adapters import lora_config
from grinmoe.quantization_grinmoe import quantize_model
from tests.tiny import tiny_config, tiny_model

IDS = torch.arange(8)[None]


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_whole,
    "deepcopy": copy.deepcopy,
}


def trained():
    model = tiny_model(router_aux_loss_coef=0.1, expert_dropout=0.1)
    model.gradient_checkpointing_enable()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return model


def quantized(**options):
    pytest.importorskip("bitsandbytes")
    return quantize_model(tiny_model(hidden_size=64, intermediate_size=64), BitsAndBytesConfig(**options))


MODELS = {
    "new": tiny_model,
    "trained": trained,
    "lora": lambda: get_peft_model(model := tiny_model(), lora_config(model, r=2)),
    "int8": lambda: quantized(load_in_8bit=True),
    "nf4": lambda: quantized(load_in_4bit=True),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=list(COPIES))
@pytest.mark.parametrize("build", MODELS.values(), ids=list(MODELS))
def test_copy_computes_and_records_the_same(build, duplicate):
    model = build().eval()
    model.register_forward_hook(_count)
    twin = duplicate(model)
    found, expected = (
        one(input_ids=IDS, output_router_logits=True, output_hidden_states=True) for one in (twin, model)
    )
    assert torch.equal(found.logits, expected.logits)
    assert len(found.router_logits) == len(found.selected_experts) == 2 and len(found.hidden_states) == 3
    assert twin.calls == 1, "hooks of the user stay"


def _count(module, inputs, output):
    module.calls = getattr(module, "calls", 0) + 1


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=list(COPIES))
def test_copy_of_a_classifier_computes_the_same(duplicate):
    torch.manual_seed(0)
    model = GrinMoeForSequenceClassification(tiny_config()).eval()
    assert torch.equal(duplicate(model)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=list(COPIES))
def test_copied_part_of_a_model_is_whole(duplicate):
    for part in (model := tiny_model().eval().model, model.layers[0], model.layers[0].block_sparse_moe.gate):
        twin = duplicate(part)
        for name, tensor in part.state_dict().items():
            assert torch.equal(twin.state_dict()[name], tensor)


def test_deepcopied_layer_that_joins_the_model_is_recorded():
    """Depth up-scaling. Without its hook the balance loss would leave the layer out."""
    model = tiny_model().eval()
    model.model.layers.append(copy.deepcopy(model.model.layers[1]))
    model.config.num_hidden_layers = 3
    assert len(model(IDS, output_router_logits=True, use_cache=False).router_logits) == 3


class Scored(Dataset):
    """Rows that a model computes, in the workers."""

    def __init__(self, model):
        self.model = model

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            return self.model(IDS + index).logits[0]


@pytest.mark.integration
def test_spawned_workers_hold_the_model():
    model = tiny_model().eval()
    rows = DataLoader(Scored(model), num_workers=1, multiprocessing_context="spawn")
    for index, row in enumerate(rows):
        torch.testing.assert_close(row[0], Scored(model)[index])
