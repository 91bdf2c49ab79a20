"""A README.md that the Trainer or TRL wrote becomes a card of ours, and its account of the training is kept."""

from __future__ import annotations

import re

import pytest

from grinmoe import GrinMoeConfig
from grinmoe.hub.card import card_for


@pytest.fixture
def model_folder(tmp_path):
    GrinMoeConfig(num_hidden_layers=3).save_pretrained(tmp_path)
    return tmp_path


TRL_CARD = """---
library_name: transformers
tags:
- generated_from_trainer
licence: license
---

# Model Card for None

This model is a fine-tuned version of [None](https://huggingface.co/None).
It has been trained using [TRL](https://github.com/huggingface/trl).

## Quick start

```python
# no heading
generator = pipeline("text-generation", model="None")
```

## Training procedure

This model was trained with SFT.

### Framework versions

- TRL: 1.16.0

## Citations

```bibtex
@software{trl}
```
"""
TRAINER_CARD = """---
tags:
- generated_from_trainer
---

<!-- This model card has been generated automatically according to the information the Trainer had access to. You
should probably proofread and complete it, then remove this comment. -->

# run

This model is a fine-tuned version of [me/base](https://huggingface.co/me/base) on an unknown dataset.

## Intended uses & limitations

More information needed

## Training procedure

### Training hyperparameters

The following hyperparameters were used during training:
- learning_rate: 5e-05

### Training results

| Loss |
|------|
| 1.0  |
"""


@pytest.mark.parametrize(
    "generated, kept, dropped",
    [
        (
            TRL_CARD,
            [
                "It has been trained using [TRL]",
                "#### Training procedure\n\nThis model was trained with SFT.",
                "- TRL: 1.16.0",
            ],
            ["None", "# no heading", "@software{trl}"],
        ),
        (
            TRAINER_CARD,
            ["fine-tuned version of [me/base]", "#### Training hyperparameters\n\nThe following", "| 1.0  |"],
            ["More information needed", "proofread", "Intended uses & limitations"],
        ),
    ],
    ids=["TRL", "Trainer"],
)
def test_a_card_that_a_trainer_wrote_becomes_ours_and_keeps_its_account(model_folder, generated, kept, dropped):
    (model_folder / "README.md").write_text(generated)
    text = card_for(model_folder, "me/pirate").text
    assert "## Uses" in text and "### Training procedure\n\n" in text and "was not recorded" not in text
    assert all(part in text for part in kept), text
    assert not any(part in text for part in dropped)


def test_the_comment_taken_away_makes_it_somebodys_own(model_folder):
    own = re.sub(r"<!--.*?-->\n", "", TRAINER_CARD, flags=re.DOTALL)
    (model_folder / "README.md").write_text(own)
    assert "## Uses" not in card_for(model_folder, "me/pirate").text
