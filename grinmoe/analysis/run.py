"""`grinmoe analyze`: how a checkpoint routes texts. One report: a page that works offline, its pictures, and the data.

Shapes: B rows of a batch, S sequence, T = B * S tokens, L layers, E experts, K experts per token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..checkpoint_grinmoe import official_shapes
from ..files import require_packages
from ..loading import load_for_use
from ..outputs import check_output, check_replaceable, folder_when_whole
from ..provenance import environment
from ..tokenization import encode_with_offsets
from .options import AnalyzeOptions
from .report import PAGE, SUMMARY, write_report
from .statistics import RoutingAnalysis, RoutingCounts, SentenceRouting, count_routing, route_sentence
from .texts import Content, checked_content, first_piece, first_sentence, token_rows

# Enough for the demo's model to be quick and for a large one to be busy; the logits of all layers of a batch are kept.
_BATCH_TOKENS = 4096
_LONGEST_ROW = 512
# More cannot be told apart in a picture.
_LONGEST_SENTENCE, _LONGEST_DEFAULT_SENTENCE = 128, 32


def run_analyze(options: AnalyzeOptions, command: str = "grinmoe analyze") -> RoutingAnalysis:
    """
    The command: read the texts, route them, and write the report's folder, which appears when it is complete.

    Args:
        options: what to analyze.
        command: as typed, for the report.

    Raises:
        ValueError: a wrong option, a file that is not there, empty or no UTF-8, an output that is not empty, or a
            checkpoint that cannot be used (see GrinMoeForCausalLM.from_pretrained).
        OSError: there is no such model, or the output cannot be written.
        ImportError: a package that the report needs is not installed.
    """
    require_packages("analysis", "matplotlib", "pyarrow")
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    files = [Path(file).expanduser() for file in options.text]
    for file in files:
        first_piece(file)
    target = check_output(options.output)
    check_replaceable(target)
    with folder_when_whole(target) as folder:
        analysis = analyze(options, files, console, command)
        write_report(analysis, folder)
    output = Path(options.output)
    console.print(f"report: {output / PAGE}\ndata:   {output / SUMMARY} and the Parquet files beside it")
    return analysis


def analyze(options: AnalyzeOptions, files: list[Path], console: Console, command: str) -> RoutingAnalysis:
    """Load the model and count. Memory does not grow with the texts."""

    def tokens_of(both: tuple[RoutingCounts, RoutingCounts]) -> int:
        return both[0].tokens + both[1].tokens

    start = time.perf_counter()
    model, tokenizer = load_for_use(options.model, options.dtype, options.device, needs_head=False)
    config = model.config
    max_length = _row_length(options.max_length, config.max_position_embeddings)
    sentence = _sentence_of(options, files[0], model, tokenizer)
    loaded = time.perf_counter()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeElapsedColumn(),
    )
    halves = []
    with Progress(*columns, console=console) as progress:
        for file in files:
            task = progress.add_task(_as_text(file.stem), total=options.max_tokens)
            rows = token_rows(file, tokenizer, max_length, options.max_tokens)
            both = _no_counts(config), _no_counts(config)
            before = 0
            for batch in _batches(rows):
                counted = _count_batch(model, batch, before)
                before += len(batch)
                both = both[0] + counted[0], both[1] + counted[1]
                progress.advance(task, sum(map(len, batch)))
            if tokens_of(both) == 0:
                raise ValueError(
                    f"--text {file} gives this checkpoint's tokenizer no token; give a file with words in it"
                )
            halves.append(both)
            progress.update(task, total=tokens_of(both))  # of a text that was shorter
    seconds = time.perf_counter() - loaded
    tokens = sum(map(tokens_of, halves))
    names = [_as_text(file.stem) for file in files]
    facts = {
        "model": _as_text(options.model),
        "shape": _shape(model),
        "mask": f"router_jitter_noise eps = {config.router_jitter_noise:g}, estimator {config.router_estimator}",
        "texts": "; ".join(f"{name}: {tokens_of(both):,} tokens" for name, both in zip(names, halves)),
        "rows": f"up to {max_length} tokens; {options.max_tokens:,} tokens of each domain at most",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "time": f"{loaded - start:.1f} s to load, {seconds:.1f} s for {tokens:,} tokens ({tokens / seconds:,.0f} tokens/s)",
        **{name: value for name, value in environment(_as_text(command)).items() if value is not None},
    }
    return RoutingAnalysis(names, halves, sentence, config.router_jitter_noise, facts)


def _as_text(argument: str) -> str:
    """Without what was typed and is no UTF-8: it came as characters that no tokenizer takes and no file can hold."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _row_length(asked: int | None, most: int) -> int:
    if asked is not None and asked > most:
        raise ValueError(f"--max-length {asked} is more than the model was made for; give {most} or less")
    return min(_LONGEST_ROW, most) if asked is None else asked


def _no_counts(config: Any) -> RoutingCounts:
    return RoutingCounts.of_nothing(config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok)


def _batches(rows: Iterator[list[int]]) -> Iterator[list[list[int]]]:
    """Rows together, padded to the longest no more than `_BATCH_TOKENS` tokens; two rows if there are."""
    batch: list[list[int]] = []
    for row in rows:
        if len(batch) > 1 and max(map(len, [*batch, row])) * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.inference_mode()
def _routing(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits (L, T, E) and selected experts (L, T, K), on the CPU, where they are checked and counted."""
    output = model(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        output_router_logits=True,
        use_cache=False,
        logits_to_keep=1,
    )
    return tuple(
        torch.stack([layer.cpu() for layer in part]) for part in (output.router_logits, output.selected_experts)
    )  # type: ignore[return-value]


def _count_batch(model: Any, batch: list[list[int]], before: int) -> tuple[RoutingCounts, RoutingCounts]:
    """Counts of the batch's even rows and of its odd ones; `before` is how many rows the batches before it had."""
    longest = max(map(len, batch))
    # What stands in the padding does not matter: nothing sees it, and it is not counted.
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
    logits, experts = _routing(model, ids, mask)
    is_odd = (torch.arange(before, before + len(batch)) % 2 == 1)[:, None]
    config = model.config
    of_half = [
        count_routing(
            logits, experts, (mask.bool() & half).flatten(), config.router_jitter_noise, config.router_estimator
        )
        for half in (~is_odd, is_odd)
    ]
    return of_half[0], of_half[1]


def _sentence_of(options: AnalyzeOptions, file: Path, model: Any, tokenizer: Any) -> SentenceRouting:
    """The sentence asked for; or the first one, cut to what a picture can show."""
    most = _LONGEST_SENTENCE if options.sentence is not None else _LONGEST_DEFAULT_SENTENCE
    most = min(most, model.config.max_position_embeddings)
    content: Content
    if options.sentence is not None:
        content = _as_text(options.sentence)
    else:
        content = checked_content(first_piece(file), tokenizer, file)
        content = first_sentence(content) if isinstance(content, str) else content
    text, ids, spans = encode_with_offsets(
        tokenizer, content, max_tokens=None if options.sentence is not None else most + 1
    )
    if options.sentence is not None and len(ids) > most:
        raise ValueError(f"--sentence has {len(ids)} tokens, more than can be shown; give {most} or fewer")
    if not ids:
        raise ValueError(
            "the sentence to be shown gives this checkpoint's tokenizer no token; give another with --sentence"
        )
    if len(ids) > most:
        text = text[: spans[most - 1][1]]
    ids, spans = ids[:most], spans[:most]
    tokens = _shown_tokens(text, tokenizer.convert_ids_to_tokens(ids), spans)
    input_ids = torch.tensor([ids])
    logits, experts = _routing(model, input_ids, torch.ones_like(input_ids))
    return route_sentence(
        text, tokens, logits, experts, model.config.router_jitter_noise, model.config.router_estimator
    )


def _shown_tokens(text: str, names: list[str], spans: list[tuple[int, int]]) -> list[str]:
    """Each token's own text; the vocabulary's name where it has none (special) or shares a letter with another (bytes)."""
    before = [(0, 0), *spans[:-1]]
    after = [*spans[1:], (len(text), len(text))]
    return [
        text[begin:end] if begin < end and begin >= left[1] and (right[0] >= end or right[0] == right[1]) else name
        for name, left, (begin, end), right in zip(names, before, spans, after)
    ]


def _shape(model: Any) -> str:
    config = model.config
    # Of the checkpoint: quantised weights are packed, and an adapter has some of its own.
    shapes = official_shapes(config)
    tied = math.prod(shapes["lm_head.weight"]) if config.tie_word_embeddings else 0
    parameters = sum(map(math.prod, shapes.values())) - tied
    return (
        f"{config.num_hidden_layers} layers of {config.num_local_experts} experts, top-{config.num_experts_per_tok}; "
        f"{parameters:,} parameters"
    )
