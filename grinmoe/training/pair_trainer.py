"""TRL's DPOTrainer on pairs whose texts cannot become control tokens."""

from __future__ import annotations

from typing import Any

from trl import DPOTrainer

from ..data import DataOptions, pair_ids


class PairTrainer(DPOTrainer):
    """
    A DPOTrainer for the pairs of `grinmoe.data.load_data`.

    Args:
        data_options: those that the pairs were loaded with.
        arguments: of DPOTrainer.
    """

    def __init__(self, *arguments: Any, data_options: DataOptions, **options: Any):
        self._data_options = data_options
        super().__init__(*arguments, **options)

    # TRL has no public way to give tokens: this private method is the one that tokenises.
    # tests/training/test_pair_trainer.py fails when it moves.
    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        return dataset.map(
            pair_ids,
            fn_kwargs={"options": self._data_options, "tokenizer": processing_class},
            num_proc=args.dataset_num_proc,
            desc=f"Tokenizing {dataset_name} dataset",
        )
