"""The router's mask that narrows while the Trainer trains."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from grinmoe.modeling_grinmoe import GrinMoeRouter
from grinmoe.training.jitter_schedule import NarrowingMask


@pytest.fixture
def train(tmp_path):
    generator = torch.Generator().manual_seed(7)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 90, (16, 8), generator=generator)]

    def run(model, *callbacks, resume=None, folder="run", **options):
        arguments = TrainingArguments(
            str(tmp_path / folder),
            per_device_train_batch_size=4,
            max_steps=4,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **{"save_strategy": "no", **options},
        )
        Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks)).train(resume_from_checkpoint=resume)
        return model

    return run


class Widths(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append({router.jitter_eps for router in model.modules() if isinstance(router, GrinMoeRouter)})


@pytest.mark.parametrize("until, expected", [(1.0, [0.5, 0.4282, 0.255, 0.0818]), (0.5, [0.5, 0.255, 0.01, 0.01])])
def test_all_routers_go_from_the_first_width_to_the_configs(tiny_model, train, until, expected):
    widths = Widths()
    model = train(tiny_model(), NarrowingMask(0.5, until), widths)
    assert [width for step in widths.seen for width in step] == pytest.approx(expected, abs=1e-4)
    assert all(m.jitter_eps == 0.01 for m in model.modules() if isinstance(m, GrinMoeRouter))
    assert model.config.router_jitter_noise == 0.01


def test_a_resumed_training_goes_on_exactly(tiny_model, train, tmp_path):
    straight = train(tiny_model(), NarrowingMask(0.5))
    train(tiny_model(), NarrowingMask(0.5), folder="half", save_strategy="steps", save_steps=2)
    checkpoint = str(tmp_path / "half" / "checkpoint-2")
    resumed = train(tiny_model(seed=5), NarrowingMask(0.5), resume=checkpoint, folder="half")
    plain = train(tiny_model())
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(straight.parameters(), plain.parameters(), strict=True))


def test_an_interrupted_training_leaves_no_wide_end(tiny_model, train):
    """The same callback in the next training still knows the config's width."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model, mask = tiny_model(), NarrowingMask(0.5)
    with pytest.raises(KeyboardInterrupt):
        train(model, mask, Stop())
    train(model, mask)
    assert all(m.jitter_eps == 0.01 for m in model.modules() if isinstance(m, GrinMoeRouter))


@pytest.mark.parametrize(
    "options, message", [({"start": 0}, "start=0"), ({"until": 0}, "until=0"), ({"until": 1.5}, "until=1.5")]
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        NarrowingMask(**options)


def test_models_and_widths_that_do_not_fit_are_named(tiny_model, train):
    with pytest.raises(ValueError, match="start=0.005 is narrower than router_jitter_noise=0.01"):
        train(tiny_model(), NarrowingMask(0.005))
    with pytest.raises(ValueError, match="Linear has no router"):
        NarrowingMask().on_train_begin(None, None, None, model=torch.nn.Linear(2, 2))
