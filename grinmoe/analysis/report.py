"""The files of `grinmoe analyze`: one HTML page that needs nothing else, the pictures, JSON and Parquet.

Shapes: D domains, L layers, T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import torch

from .figures import Picture, draw_pictures, expert_colours
from .statistics import RoutingAnalysis, RoutingCounts, similarity_of

PAGE, SUMMARY = "report.html", "routing.json"
_TEMPLATE = Path(__file__).with_name("report.html")
_PER_LAYER = (
    "max_over_mean_load",
    "load_entropy",
    "router_entropy",
    "balance_loss",
    "near_tie_share",
    "kept_experts",
    "mean_weights",
)


def write_report(analysis: RoutingAnalysis, folder: Path) -> None:
    """Write everything into `folder`, which exists: report.html, the PNGs, routing.json and the Parquet files."""
    pictures = draw_pictures(analysis, folder)
    summary = summary_of(analysis)
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_tables(analysis, folder)
    (folder / PAGE).write_text(page_of(analysis, summary["sentence"], pictures, folder), encoding="utf-8")


def summary_of(analysis: RoutingAnalysis) -> dict[str, Any]:
    """Content of routing.json; what cannot be computed (see the properties of [`RoutingCounts`]) is null."""
    counts = analysis.counts
    similarity = None
    if len(counts) > 1:
        found = similarity_of(analysis.halves)
        similarity = {name: _numbers(getattr(found, name)) for name in ("whole", "deviation", "per_layer", "within")}
    sentence = analysis.sentence
    return {
        "facts": analysis.facts,
        "domains": {name: _figures(of_domain) for name, of_domain in zip(analysis.domains, counts)},
        "all_domains": _figures(analysis.total),
        "similarity": similarity,
        "sentence": {
            "text": sentence.text,
            "tokens": sentence.tokens,
            "experts": sentence.experts.tolist(),
            "weights": _numbers(sentence.weights),
            "kept_experts": sentence.kept.tolist(),
            "probabilities": _numbers(sentence.probs, digits=4),
        },
    }


def _figures(counts: RoutingCounts) -> dict[str, Any]:
    return {
        "tokens": counts.tokens,
        "tokens_per_expert": counts.tokens_per_expert.tolist(),
        **{name: _numbers(getattr(counts, name)) for name in _PER_LAYER},
    }


def _numbers(values: torch.Tensor, digits: int = 6) -> Any:
    """Nested lists, None for NaN: JSON has no other word for it."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(one) for one in value]
        return None if math.isnan(value) else round(value, digits)

    return plain(values.tolist())


def write_tables(analysis: RoutingAnalysis, folder: Path) -> None:
    """
    Counts as Parquet, one row for every

    * domain, layer, choice and expert (experts.parquet): `tokens`, their `share` of the domain's, `mean_weight`;
    * domain, layer, choice and number of experts that the mask kept (kept.parquet): `tokens`;
    * domain, layer and pair of experts (pairs.parquet, for K = 2 or more): `tokens`, and `lift` as in `pair_lift`.

    Choices count from 1, layers and experts from 0.
    """
    import pyarrow
    import pyarrow.parquet

    tables: dict[str, list[pyarrow.Table]] = {"experts": [], "kept": [], "pairs": []}

    def add_rows(table: str, domain: str, columns: dict[str, torch.Tensor]) -> None:
        flat = {name: values.flatten().numpy() for name, values in columns.items()}
        # NaN becomes null.
        arrays = {name: pyarrow.array(values, from_pandas=True) for name, values in flat.items()}
        domains = pyarrow.repeat(domain, len(flat["tokens"]))
        tables[table].append(pyarrow.table({"domain": domains, **arrays}))

    for domain, counts in zip(analysis.domains, analysis.counts):
        layer, choice, expert = torch.meshgrid(*map(torch.arange, counts.choices.shape), indexing="ij")
        places = {"layer": layer, "choice": choice + 1}
        share, mean_weight = counts.choices.double() / counts.tokens, counts.weights / counts.choices
        chosen = {"expert": expert, "tokens": counts.choices, "share": share, "mean_weight": mean_weight}
        add_rows("experts", domain, places | chosen)
        add_rows("kept", domain, places | {"kept_experts": expert + 1, "tokens": counts.kept})
        if counts.top_k > 1:
            num_layers, num_experts = counts.pairs.shape[:2]
            first, second = torch.triu_indices(num_experts, num_experts, offset=1)
            pairs = {
                "layer": torch.arange(num_layers).repeat_interleave(len(first)),
                "tokens": counts.pairs[:, first, second],
                "expert": first.repeat(num_layers),
                "other_expert": second.repeat(num_layers),
                "lift": counts.pair_lift[:, first, second],
            }
            add_rows("pairs", domain, pairs)
    for name, parts in tables.items():
        if parts:
            pyarrow.parquet.write_table(pyarrow.concat_tables(parts), folder / f"{name}.parquet")


def page_of(analysis: RoutingAnalysis, sentence: dict[str, Any], pictures: list[Picture], folder: Path) -> str:
    """The page: pictures, style, script and the sentence's data are in it, and nothing is loaded from anywhere."""
    import jinja2

    counts = analysis.counts
    num_experts, top_k = counts[0].choices.shape[-1], counts[0].top_k
    rows = [(name, _overview(of_domain)) for name, of_domain in zip(analysis.domains, counts)]
    if len(rows) > 1:
        rows.append(("all together", _overview(analysis.total)))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        facts=analysis.facts,
        overview=rows,
        total=_layer_rows(analysis.total),
        domains=analysis.domains,
        num_experts=num_experts,
        top_k=top_k,
        threshold=f"{2 * analysis.jitter_eps:g}",
        pictures=[{**vars(picture), "data": _data_uri(folder / picture.file)} for picture in pictures],
        sentence=sentence | {"colours": expert_colours(num_experts)},
    )


def _overview(counts: RoutingCounts) -> dict[str, str]:
    """Means over layers, but for the busiest expert, which is that of the most uneven layer."""
    return {
        "tokens": f"{counts.tokens:,}",
        "busiest expert / mean load": f"{float(counts.max_over_mean_load.max()):.2f}",
        "effective experts": f"{float(counts.load_entropy.exp().mean()):.2f}",
        "router's entropy, nats": f"{float(counts.router_entropy.mean()):.3f}",
        "tokens at a near tie": f"{100 * float(counts.near_tie_share.mean()):.2f} %",
        "balance loss": f"{float(counts.balance_loss.mean()):.3f}",
        "mean routing weights": ", ".join(f"{weight:.3f}" for weight in counts.mean_weights.mean(0).tolist()),
    }


def _layer_rows(counts: RoutingCounts) -> list[dict[str, str]]:
    columns = {
        "busiest expert": counts.load_share.argmax(1).tolist(),
        "highest load / mean": [f"{value:.2f}" for value in counts.max_over_mean_load.tolist()],
        "least used expert": counts.load_share.argmin(1).tolist(),
        "lowest load / mean": [f"{v:.2f}" for v in (counts.load_share.amin(1) * counts.load_share.shape[1]).tolist()],
        "effective experts": [f"{value:.2f}" for value in counts.load_entropy.exp().tolist()],
        "near ties": [f"{100 * value:.2f} %" for value in counts.near_tie_share.tolist()],
        "experts kept, by choice": [", ".join(f"{v:.3f}" for v in row) for row in counts.kept_experts.tolist()],
        "mean weight, by choice": [", ".join(f"{v:.3f}" for v in row) for row in counts.mean_weights.tolist()],
    }
    return [dict(zip(columns, map(str, row))) for row in zip(*columns.values())]


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
