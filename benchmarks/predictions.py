"""What a GPU's benchmarks are predicted to measure, written down beforehand, with the arithmetic. Nothing here is measured.

The numbers are computed below from the rates of the reference chip and from sizes; `docs/performance.md` has them in a table
that is `table()`, and `python -m benchmarks gpu` prints each beside what it measured. A measurement that misses its
prediction is to be explained before anything is changed.

T tokens, H hidden size, I expert width, E experts, K experts per token, N = T * K assignments.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.floors import STEP_OVER_FORWARD, block_flops, kept_at_least
from grinmoe.provenance import markdown_table

# One NVIDIA H200: a bfloat16 product of random data, and a copy, bytes read and written. Measured anew in every run.
TFLOPS, TB_PER_S = 790.0, 4.3
HIDDEN, WIDTH, EXPERTS, TOP_K, LAYERS = 4096, 6400, 16, 2, 32
# torch's grouped product: TFLOP/s at large groups, low and high; rows that it multiplies over rows that there are.
GROUPED_TFLOPS = (700.0, 760.0)
PADDING = {2048: 1.45, 8192: 1.109, 16384: 1.052, 32768: 1.028}
# QuACK's: TFLOP/s; clusters of 2 x 1 pad an expert's rows to 256 in two thirds of the products and to 64 in one.
QUACK_TFLOPS = (600.0, 700.0)
QUACK_PADDING = {8192: 1.094, 16384: 1.047, 32768: 1.023}
# Share of the copy rate that Transformers' operators around the products reach, high and low.
GLUE_RATES = (1.0, 0.6)
# Decoding: share of the copy rate that the kernels read at, low and high; launches of a layer and of the head in a CUDA
# graph, and seconds of each beyond what it reads.
READING, LAYER_LAUNCHES, LAUNCH_SECONDS = (0.8, 0.88), 30, 2.5e-6
# GB that a step must read at batch 1, 8 and 32, all layers.
STEP_GB = {1: 13.0, 8: 55.9, 32: 82.6}


@dataclass(frozen=True)
class Prediction:
    """
    Attributes:
        name: of the goal in `benchmarks.goals`.
        low, high: between which it is predicted to be.
        arithmetic: how, for people.
        measured: what was measured and in which file, once it was.
    """

    name: str
    low: float
    high: float
    arithmetic: str
    measured: str = "not yet"

    @property
    def text(self) -> str:
        low, high = number(self.low), number(self.high)
        return low if low == high else f"{low} to {high}"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}" if abs(value) < 0.995 else f"{value:.3g}"


def verdict(prediction: Prediction, measured: float | None) -> str:
    if measured is None:
        return "-"
    # Within what the shown digits tell apart.
    if float(number(measured).replace(",", "")) < float(number(prediction.low).replace(",", "")):
        return "below"
    return (
        "above" if float(number(measured).replace(",", "")) > float(number(prediction.high).replace(",", "")) else "yes"
    )


def gb_ms(gigabytes: float) -> float:
    """Milliseconds to move so many GB at the copy rate."""
    return gigabytes / TB_PER_S


def products_ms(tokens: int) -> float:
    """Milliseconds of a block's products, forward and backward, at the rate of a dense product."""
    return 1e3 * STEP_OVER_FORWARD * block_flops(tokens, HIDDEN, WIDTH, TOP_K) / (TFLOPS * 1e12)


def rows_gb(tokens: int) -> tuple[float, float]:
    """GB of one row for each token, (T, H), and of one activation for each assignment, (N, I), in bfloat16."""
    return 2e-9 * tokens * HIDDEN, 2e-9 * tokens * TOP_K * WIDTH


def our_glue_gb(tokens: int) -> float:
    """Five passes of T and N rows of H (gather, combine, two gathers and a combine back), SwiGLU 3 N I, its backward 6."""
    rows, activation = rows_gb(tokens)
    return 5 * (1 + TOP_K) * rows + (3 + 6) * activation


def quack_glue_gb(tokens: int) -> float:
    """Two combines of K rows into one, each (1 + K) passes of rows of H. Gathers and SwiGLU are in the products."""
    return 2 * (1 + TOP_K) * rows_gb(tokens)[0]


def their_glue_gb(tokens: int) -> float:
    """Transformers' grouped_mm: 28 passes over rows of H, forward and backward, and 18 over activations."""
    rows, activation = rows_gb(tokens)
    return 39 * rows + 18 * activation


def block_ms(tokens: int, tflops: float, glue_ms: float, padding: dict[int, float] = PADDING) -> float:
    return products_ms(tokens) * padding[tokens] * TFLOPS / tflops + glue_ms


def between(*values: float) -> tuple[float, float]:
    return min(values), max(values)


def block_predictions() -> list[Prediction]:
    found = []
    for tokens in (8192, 16384, 32768):
        _, activation = rows_gb(tokens)
        floor, glue = products_ms(tokens), gb_ms(our_glue_gb(tokens))
        ours = [block_ms(tokens, rate, glue) for rate in GROUPED_TFLOPS]
        for name, passes in (("dense", 18), ("dense with fused SwiGLU", 8)):
            dense = floor + gb_ms(passes * activation)
            found.append(
                Prediction(
                    f"G1 block over {name}, even load, {tokens} tokens",
                    *between(*(dense / one for one in ours)),
                    f"dense {floor:.2f} ms of products and {passes} passes over (T, 2I), {dense:.1f} ms; ours {floor:.2f} x "
                    f"{PADDING[tokens]} (rows padded to 256) x 790 / (700 to 760 TFLOP/s) and {our_glue_gb(tokens):.1f} GB "
                    f"of glue, {ours[1]:.1f} to {ours[0]:.1f} ms",
                )
            )
    for tokens in (8192, 16384, 32768):
        dense = products_ms(tokens) + gb_ms(18 * rows_gb(tokens)[1])
        glue = quack_glue_gb(tokens)
        ours = [block_ms(tokens, rate, gb_ms(glue), QUACK_PADDING) for rate in QUACK_TFLOPS]
        found.append(
            Prediction(
                f"G1 block over dense, even load, {tokens} tokens, grinmoe_quack",
                *between(*(dense / one for one in ours)),
                f"{products_ms(tokens):.2f} ms of products x {QUACK_PADDING[tokens]} (rows padded to 256, to 64 where they "
                f"are summed over) x 790 / (600 to 700 TFLOP/s) and {glue:.2f} GB of glue, {ours[1]:.1f} to "
                f"{ours[0]:.1f} ms; only where quack-kernels is installed",
            )
        )
    for tokens in (2048, 16384):
        glue, theirs = gb_ms(our_glue_gb(tokens)), their_glue_gb(tokens)
        ratios = [
            block_ms(tokens, rate, gb_ms(theirs) / share) / block_ms(tokens, rate, glue)
            for rate in GROUPED_TFLOPS
            for share in GLUE_RATES
        ]
        found.append(
            Prediction(
                f"G3 over Transformers' grouped_mm, even load, {tokens} tokens",
                *between(*ratios),
                f"the same products on both sides; glue {theirs:.1f} GB at 100 to 60 % of the copy rate against "
                f"{our_glue_gb(tokens):.1f} GB",
            )
        )
    weights_gb = 2e-9 * EXPERTS * 3 * HIDDEN * WIDTH
    fills = gb_ms(EXPERTS * 4 * weights_gb)
    ours = [block_ms(8192, rate, gb_ms(our_glue_gb(8192))) for rate in GROUPED_TFLOPS]
    eager = products_ms(8192) + gb_ms(their_glue_gb(8192)) + fills
    found.append(
        Prediction(
            "G3 over Transformers' eager, even load, 8192 tokens",
            *between(*(eager / one for one in ours)),
            f"its backward fills, and adds to, a tensor as large as all experts ({weights_gb:.1f} GB, moved 4 times) once "
            f"per expert: {fills:.0f} ms, and {products_ms(8192):.1f} ms of products",
        )
    )
    least = kept_at_least(32768, HIDDEN, WIDTH, TOP_K, 2)
    theirs_gib = 4.38
    found += [
        Prediction(
            "G4 kept over the least, even load, 32768 tokens",
            1.0,
            1.01,
            f"input and pre-activations, {least / 2**30:.2f} GiB; indices, counts and logits add under 1 %",
        ),
        Prediction(
            "G4 kept over Transformers' grouped_mm, even load, 32768 tokens",
            least / 2**30 / theirs_gib,
            least / 2**30 / theirs_gib * 1.02,
            f"{least / 2**30:.2f} GiB against {theirs_gib} GiB: it keeps gathered rows, both halves, activation and output",
        ),
    ]
    return found


def layer_predictions() -> list[Prediction]:
    tokens = 16384
    rows, activation = rows_gb(tokens)
    queries, keys = HIDDEN, 2048
    projections = 1e3 * STEP_OVER_FORWARD * 2.0 * tokens * HIDDEN * (2 * queries + keys) / (TFLOPS * 1e12)
    attention, glue = 3.6, gb_ms(40 * rows)
    shared = projections + attention + glue
    dense = shared + products_ms(tokens) + gb_ms(18 * activation)
    jitter = gb_ms(4 * rows)
    ours = [shared + jitter + block_ms(tokens, rate, gb_ms(our_glue_gb(tokens))) for rate in GROUPED_TFLOPS]
    return [
        Prediction(
            "G2 layer over dense, sdpa, 16384 tokens",
            *between(*(dense / one for one in ours)),
            f"the block as in G1; shared by both: projections {projections:.1f} ms, attention {attention} ms (about half of "
            f"the product's rate), norms, rotation and residuals {glue:.1f} ms; jitter adds {jitter:.2f} ms",
        )
    ]


def router_predictions() -> list[Prediction]:
    longest, operators = (6.0, 9.0), (150.0, 250.0)
    return [
        Prediction(
            "G5 router's launches, forward and backward", 2, 2, "one kernel each way; seed and stream are arguments"
        ),
        Prediction(
            "G5 router's longest launch, us",
            *longest,
            "1 MB of logits and 0.8 MB of results are 0.4 us of traffic; the rest is one wave of Philox and two softmaxes",
        ),
        Prediction(
            "G5 router over its operators, 32768 tokens",
            operators[0] / (2 * longest[1]),
            operators[1] / (2 * longest[0]),
            "49 operators of 3 to 5 us, 150 to 250 us, against two launches of 6 to 9 us; both without the host's time",
        ),
    ]


def experts_predictions() -> list[Prediction]:
    found = []
    expert_gb = 2e-9 * 3 * HIDDEN * WIDTH
    for tokens in (10, 32, 64):
        read = EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** tokens)
        floor = gb_ms(read * expert_gb)
        ours = [floor / share for share in READING]
        copies = gb_ms(3 * tokens * TOP_K * expert_gb)
        found += [
            Prediction(
                f"experts of the floor, {tokens} tokens",
                *READING,
                f"{read:.1f} of 16 experts, {read * expert_gb:.2f} GB, {1e3 * floor:.0f} us at the copy rate; the kernels "
                "read at 80 to 88 % of it",
            ),
            Prediction(
                f"experts over batched_mm, {tokens} tokens",
                *between(*(copies / one for one in ours)),
                f"it reads, writes and reads again the weights of {tokens * TOP_K} assignments, "
                f"{3 * tokens * TOP_K * expert_gb:.1f} GB",
            ),
            Prediction(
                f"experts over grouped_mm, {tokens} tokens",
                *between(read * expert_gb / 2.0 / ours[0], read * expert_gb / 0.9 / ours[1]),
                "tiles of 128 rows or more for a few: it reads the same weights at 0.9 to 2 TB/s",
            ),
        ]
    return found


def decode_predictions() -> list[Prediction]:
    found = []
    launches = 1e3 * LAYERS * LAYER_LAUNCHES * LAUNCH_SECONDS
    for batch, gigabytes in STEP_GB.items():
        step = [gb_ms(gigabytes) / share + launches for share in READING]
        found.append(
            Prediction(
                f"G6 decode, batch {batch}, tokens/s",
                *between(*(1e3 * batch / one for one in step)),
                f"{gigabytes} GB a step at 80 to 88 % of the copy rate, and 32 x 30 launches of 2.5 us in a CUDA graph: "
                f"{step[1]:.1f} to {step[0]:.1f} ms",
            )
        )
    return found


def training_predictions() -> list[Prediction]:
    return [
        Prediction(
            "LoRA on experts over PEFT's target_parameters",
            1.4,
            2.0,
            "PEFT adds B A to 2.5 GB of weights, multiplies with the sum, and forms the gradient of all of it: a third more "
            "products and some 20 GB; ours multiplies rows with A and B, rank 16",
        ),
        Prediction(
            "G11 qlora of 32 layers, peak in GB",
            26.5,
            29.0,
            "`grinmoe plan`: 21.4 GiB of weights, 1.8 of optimizer, 1.0 of activations, 0.7 of logits, and up to 1.7 that "
            "it allows for CUDA",
        ),
        Prediction(
            "qlora of 32 layers, tokens/s",
            3000,
            6500,
            "2048 tokens: 107 ms of products at 790 TFLOP/s (plan's bound, 19,139 tokens/s), 130 ms to unpack 42B weights "
            "three times, and 100 to 450 ms for some 30,000 launches from Python",
        ),
        Prediction(
            "G11 lora of 32 layers, peak in GB",
            88.0,
            93.0,
            "`grinmoe plan`: 78.9 GiB of weights in bfloat16, 3.5 of the rest, and up to 3.5 that it allows",
        ),
        Prediction(
            "lora of 32 layers, tokens/s",
            5000,
            9000,
            "2048 tokens are 256 rows an expert, so products take 1.45 x 107 ms, adapters 60 ms, and launches hide in part",
        ),
        Prediction(
            "whole step over dense, grinmoe_triton",
            0.72,
            0.80,
            "2 layers, 16k tokens: dense 63 ms of layers, 19 of head and loss, 4 of AdamW, 1 of casts; sparse 68, 19, and "
            "for 2.9B parameters 19 and 7",
        ),
        Prediction(
            "FSDP2 on one rank over none",
            0.82,
            0.95,
            "it casts and copies 2.9B float32 weights twice and their gradients once, 20 to 25 ms, where autocast takes 7 "
            "of 113 ms",
        ),
    ]


PREDICTIONS: dict[str, Prediction] = {
    prediction.name: prediction
    for prediction in [
        Prediction("kernels that are not right", 0, 0, "all are right in Triton's interpreter"),
        *block_predictions(),
        *router_predictions(),
        *experts_predictions(),
        *layer_predictions(),
        *decode_predictions(),
        *training_predictions(),
    ]
}


def table() -> str:
    """For docs/performance.md."""
    rows = [[one.name, one.text, one.arithmetic, one.measured] for one in PREDICTIONS.values()]
    return markdown_table(["what", "predicted", "arithmetic", "measured"], rows)


__all__ = ["PREDICTIONS", "Prediction", "table", "verdict"]
