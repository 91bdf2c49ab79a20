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
    (folder / PAGE).write_text(page_of(analysis, pictures, folder), encoding="utf-8")


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
    named = list(zip(analysis.domains, analysis.counts))
    experts = [_columns(name, ("layer", "choice", "expert"), counts.choices) for name, counts in named]
    for columns, (_, counts) in zip(experts, named):
        columns["share"] = [tokens / counts.tokens for tokens in columns["tokens"]]
        columns["mean_weight"] = _nan_to_none(counts.weights / counts.choices)
    kept = [_columns(name, ("layer", "choice", "kept_experts"), counts.kept) for name, counts in named]
    for columns in experts + kept:
        columns["choice"] = [choice + 1 for choice in columns["choice"]]
    for columns in kept:
        columns["kept_experts"] = [index + 1 for index in columns["kept_experts"]]
    _write_parquet(experts, folder / "experts.parquet")
    _write_parquet(kept, folder / "kept.parquet")
    if analysis.total.top_k > 1:
        pairs = []
        for name, counts in named:
            first, second = torch.triu_indices(counts.pairs.shape[1], counts.pairs.shape[2], offset=1)
            columns = _columns(name, ("layer", "expert"), counts.pairs[:, first, second])
            pair = columns.pop("expert")
            columns |= {"expert": first[pair].tolist(), "other_expert": second[pair].tolist()}
            columns["lift"] = _nan_to_none(counts.pair_lift[:, first, second])
            pairs.append(columns)
        _write_parquet(pairs, folder / "pairs.parquet")


def _columns(domain: str, names: tuple[str, ...], tokens: torch.Tensor) -> dict[str, list]:
    """A row for each element of `tokens`, whose axes have these names."""
    places = torch.cartesian_prod(*(torch.arange(length) for length in tokens.shape))
    columns = dict(zip(names, places.T.tolist()))
    return {"domain": [domain] * tokens.numel(), **columns, "tokens": tokens.flatten().tolist()}


def _nan_to_none(values: torch.Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.flatten().tolist()]


def _write_parquet(parts: list[dict[str, list]], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    joined = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    pyarrow.parquet.write_table(pyarrow.table(joined), path)


def page_of(analysis: RoutingAnalysis, pictures: list[Picture], folder: Path) -> str:
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
        sentence=_for_script(_sentence_data(analysis)),
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


def _sentence_data(analysis: RoutingAnalysis) -> dict[str, Any]:
    sentence = analysis.sentence
    return {
        "tokens": sentence.tokens,
        "experts": sentence.experts.tolist(),
        "weights": _numbers(sentence.weights),
        "kept": sentence.kept.tolist(),
        "probs": _numbers(sentence.probs, digits=4),
        "colours": expert_colours(sentence.probs.shape[-1]),
    }


def _for_script(value: Any) -> Any:
    """JSON within <script>, where `</` would end it: marked as safe for the template, with no `<`, `>` or `&` in it."""
    from markupsafe import Markup

    text = json.dumps(value, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
