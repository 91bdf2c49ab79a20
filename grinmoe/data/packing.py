"""Samples of tokens to rows: kept by themselves, packed several to a row, or cut; and rows to a batch.

In a packed row the positions begin again at 0 with every sample. The model keeps such samples apart (each sees itself
alone), whatever the attention implementation, and with padding or without.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

NO_LOSS = -100  # the label that torch's cross entropy leaves out


class Samples:
    """Token ids and labels of many samples, 4 bytes each."""

    def __init__(self):
        self.input_ids, self.labels = array("i"), array("i")
        self.ends = array("q")

    def append(self, input_ids: Sequence[int], labels: Sequence[int]) -> None:
        """Add a sample. Its first label becomes -100: within a row nothing of the sample comes before it."""
        assert len(input_ids) == len(labels) > 0
        self.input_ids.extend(input_ids)
        self.labels.append(NO_LOSS)
        self.labels.extend(labels[1:])
        self.ends.append(len(self.input_ids))

    def __len__(self) -> int:
        return len(self.ends)

    def span(self, index: int) -> tuple[int, int]:
        """Where a sample begins and ends among all tokens."""
        return (self.ends[index - 1] if index else 0), self.ends[index]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """
    Put samples into rows by best-fit decreasing: the longest first, each into the row that it fills best.

    The way of "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830), section 3. Nothing is cut.

    Args:
        lengths: of the samples, none above `capacity`.
        capacity: tokens of a row.

    Returns:
        For each row the indices of its samples, ascending; the rows by their first sample.
    """
    rows: list[list[int]] = []
    rows_with_space: dict[int, deque[int]] = defaultdict(deque)
    spaces: list[int] = []  # sorted, those for which there is a row
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"sample {index} has {length} tokens and a row {capacity}; truncate or drop it first")
        at = bisect_left(spaces, length)
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = rows_with_space[space].popleft()
            if not rows_with_space[space]:
                spaces.pop(at)
        rows[row].append(index)
        space -= length
        if space > 0:
            if not rows_with_space[space]:
                insort(spaces, space)
            rows_with_space[space].append(row)
    return sorted(sorted(row) for row in rows)


def packed(samples: Samples, capacity: int) -> Iterator[list[tuple[int, int]]]:
    """Rows of whole samples: the spans (begin, end) of each."""
    lengths = [end - begin for begin, end in map(samples.span, range(len(samples)))]
    for row in best_fit(lengths, capacity):
        yield [samples.span(index) for index in row]


def wrapped(samples: Samples, capacity: int) -> Iterator[list[tuple[int, int]]]:
    """Rows of exactly `capacity` tokens, but for the last: samples one after the other, cut where a row is full."""
    borders = sorted({0, *samples.ends, *range(0, len(samples.input_ids), capacity)})
    for _, row in groupby(pairwise(borders), key=lambda span: span[0] // capacity):
        yield list(row)


def arrow_table(samples: Samples, rows: Iterator[list[tuple[int, int]]] | None) -> Any:
    """
    A pyarrow table with a row for each of `rows`, or for each sample where it is None.

    Columns `input_ids`, `labels` and, for rows of several samples, `position_ids`: lists of int32.
    """
    import pyarrow

    if rows is None:
        offsets = array("q", [0, *samples.ends])
        columns = {"input_ids": samples.input_ids, "labels": samples.labels}
    else:
        offsets = array("q", [0])
        columns = {name: array("i") for name in ("input_ids", "labels", "position_ids")}
        for row in rows:
            for begin, end in row:
                columns["input_ids"].extend(samples.input_ids[begin:end])
                # Where a sample was cut, what comes before its second part is in another row.
                columns["labels"].append(NO_LOSS)
                columns["labels"].extend(samples.labels[begin + 1 : end])
                columns["position_ids"].extend(range(end - begin))
            offsets.append(len(columns["input_ids"]))

    def lists(values: array) -> Any:
        int64, int32 = pyarrow.array(offsets, pyarrow.int64()), pyarrow.array(values, pyarrow.int32())
        return pyarrow.LargeListArray.from_arrays(int64, int32)

    return pyarrow.table({name: lists(values) for name, values in columns.items()})


@dataclass
class RowCollator:
    """
    Rows of sft and pretrain to a batch: filled up on the right to the longest, never cut.

    Gives (B, S) int64 `input_ids`, `labels` (-100 where there is no loss), `attention_mask` (0 for padding), and
    `position_ids` where the rows have them. It serves `Trainer` as `data_collator`, and TRL's SFTTrainer.

    Args:
        pad_token_id: what padding consists of. It has no loss and no sample sees it.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        fillings = {"input_ids": self.pad_token_id, "labels": NO_LOSS, "position_ids": 0, "attention_mask": 0}
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        return {
            name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=filling)
            for name, filling in fillings.items()
            if name in rows[0]
        }
