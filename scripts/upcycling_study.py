"""Does training an upcycled model beat continued training of its dense model, at equal tokens?

    python scripts/upcycling_study.py --output docs/results/$(date -I)-upcycling

A small Llama is trained on the documentation of the installed packages. From there on it is trained further as it is, and as
GRIN-MoEs that `grinmoe upcycle` makes of it, on the same batches in the same order with the same learning rate, which is
tuned for none of them. Writes upcycling.md, .json and .png. About a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="new folder")
    parser.add_argument("--dense-steps", type=int, default=400, metavar="N", help="of the dense model (default: 400)")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="of each continued training (default: 200)")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="orders of the data (default: 2)")
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"--output {arguments.output} is there already; give a new folder")
    study(arguments.output, arguments.dense_steps, arguments.steps, arguments.seeds)


# Label -> options of the upcycling; None is the dense model as it is.
ARMS = {
    "dense, trained on": None,
    "SparseMixer-v2": {},
    "SparseMixer-v2, half of the neurons anew": {"reinit": 0.5},
    "togo": {"estimator": "sparsemixer_togo"},
    "togo, half of the neurons anew": {"estimator": "sparsemixer_togo", "reinit": 0.5},
    "top-k, renormalised": {"estimator": "topk_renormalized"},
    "top-k, renormalised, half of the neurons anew": {"estimator": "topk_renormalized", "reinit": 0.5},
}
EXPERTS, TOP_K = 8, 2


def study(output: Path, dense_steps: int, steps: int, seeds: int) -> None:
    import torch
    from rich.console import Console
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from grinmoe.provenance import environment
    from grinmoe.research import CompareSettings, prepare_corpus

    console, settings = Console(soft_wrap=True), CompareSettings(held_out_rows=128)
    sizes = {
        name: getattr(settings, name)
        for name in "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads".split()
    }
    runs: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch:
        facts = prepare_corpus(Path(scratch), settings, None, console)
        corpus = load_file(Path(scratch, "corpus.safetensors"))
        set_seed(0)
        config = LlamaConfig(
            **sizes,
            intermediate_size=2 * settings.intermediate_size,
            max_position_embeddings=settings.row_length,
            initializer_range=settings.initializer_range,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        dense = LlamaForCausalLM(config)
        held_out = train(dense, corpus, settings, dense_steps, settings.learning_rate, 0, Path(scratch))
        console.print(f"dense, {dense_steps} steps: held-out loss {held_out[-1][1]:.4f}")
        dense.save_pretrained(Path(scratch, "dense"))
        for seed in range(1, seeds + 1):
            for label, options in ARMS.items():
                model = start_of(Path(scratch), options, settings)
                curve = train(model, corpus, settings, steps, settings.learning_rate / 3, seed, Path(scratch))
                runs.append({"arm": label, "seed": seed, "held_out": curve, "parameters": model.num_parameters()})
                console.print(f"seed {seed}, {label}: held-out loss {curve[-1][1]:.4f}")
    output.mkdir(parents=True)
    result = {
        "environment": environment(shlex.join(["python", *sys.argv])),
        "corpus": facts,
        "dense": {"steps": dense_steps, "held_out": held_out, "parameters": sum(p.numel() for p in dense.parameters())},
        "steps": steps,
        "tokens_per_step": settings.tokens_per_step,
        "learning_rate": settings.learning_rate / 3,
        "experts": EXPERTS,
        "top_k": TOP_K,
        "runs": runs,
        "torch_threads": torch.get_num_threads(),
    }
    (output / "upcycling.json").write_text(json.dumps(result, indent=1) + "\n")
    (output / "upcycling.md").write_text(report(result))
    picture(result, output / "upcycling.png")
    console.print(f"written: {output / 'upcycling.md'}")


def start_of(scratch: Path, options: dict | None, settings):
    """The model that an arm starts from."""
    import shutil

    from transformers import LlamaForCausalLM

    from grinmoe import GrinMoeForCausalLM
    from grinmoe.conversion import UpcycleOptions, upcycle_checkpoint

    if options is None:
        return LlamaForCausalLM.from_pretrained(scratch / "dense")
    upcycle_checkpoint(
        UpcycleOptions(str(scratch / "dense"), EXPERTS, TOP_K, str(scratch / "sparse"), compare=False, **options)
    )
    balance = {"router_aux_loss_coef": settings.router_aux_loss_coef, "router_aux_loss_scope": "global"}
    model = GrinMoeForCausalLM.from_pretrained(scratch / "sparse", **balance)
    shutil.rmtree(scratch / "sparse")
    return model


def train(model, corpus, settings, steps: int, learning_rate: float, seed: int, scratch: Path) -> list[list[float]]:
    """Train; returns [step, held-out loss] pairs, step 0 first. The loss is cross entropy alone, in evaluation mode."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

    set_seed(seed)
    rows = [{"input_ids": row, "labels": row} for row in corpus["train"].long()]
    held_out = corpus["held_out"].long()
    curve: list[list[float]] = []

    def measure(step: int) -> None:
        model.eval()
        losses = []
        with torch.no_grad():
            for batch in held_out.split(16):
                logits = model(input_ids=batch).logits[:, :-1].flatten(0, 1)
                losses.append(torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten()).item() * len(batch))
        curve.append([step, sum(losses) / len(held_out)])
        model.train()

    class Measure(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % max(1, steps // 4) == 0:
                measure(state.global_step)

    arguments = TrainingArguments(
        output_dir=str(scratch / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=settings.micro_batch_size * settings.accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.01,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        seed=seed,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Measure()])
    trainer.remove_callback(PrinterCallback)
    measure(0)
    trainer.train()
    return curve


def summary(result: dict) -> list[tuple[str, float, float, float]]:
    """Label, mean held-out loss at the start and at the end, and mean difference to the dense arm of the same seed."""
    ends = {(run["arm"], run["seed"]): run["held_out"] for run in result["runs"]}
    seeds = sorted({seed for _, seed in ends})
    rows = []
    for label in ARMS:
        differences = [ends[label, seed][-1][1] - ends["dense, trained on", seed][-1][1] for seed in seeds]
        start = statistics.mean(ends[label, seed][0][1] for seed in seeds)
        end = statistics.mean(ends[label, seed][-1][1] for seed in seeds)
        rows.append((label, start, end, statistics.mean(differences)))
    return rows


def report(result: dict) -> str:
    from grinmoe.provenance import markdown_table

    rows = summary(result)
    best = min(rows[1:], key=lambda row: row[2])
    verdict = (
        f"{best[0]} ends {-best[3]:.4f} below the dense model that is trained on"
        if best[3] < 0
        else f"None ends below the dense model that is trained on; {best[0]} comes nearest, {best[3]:.4f} above"
    )
    table = markdown_table(
        ["arm", "held-out loss at the start", "at the end", "over the dense arm's"],
        [[label, f"{start:.4f}", f"{end:.4f}", f"{difference:+.4f}"] for label, start, end, difference in rows],
    )
    parameters = max(run["parameters"] for run in result["runs"])
    facts = markdown_table(["", ""], [[key, value] for key, value in result["environment"].items()])
    return (
        f"# Upcycling against continued dense training\n\n{verdict}, at equal tokens.\n\n{table}\n\n"
        f"A Llama of {result['dense']['parameters']:,} parameters, {result['dense']['steps']} steps of "
        f"{result['tokens_per_step']:,} tokens on {result['corpus']['source']}; then {result['steps']} steps more at a "
        f"learning rate of {result['learning_rate']:.0e}, as it is or with {result['experts']} experts, "
        f"top-{result['top_k']} ({parameters:,} parameters; twice the feed-forward's work for a token). Means of "
        f"{len({run['seed'] for run in result['runs']})} orders of the data; nats per token. One learning rate for all, "
        f"tuned for none.\n\n![held-out loss over steps](upcycling.png)\n\n## Measured on\n\n{facts}\n"
    )


def picture(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for label in ARMS:
        curves = [run["held_out"] for run in result["runs"] if run["arm"] == label]
        steps = [step for step, _ in curves[0]]
        means = [statistics.mean(curve[i][1] for curve in curves) for i in range(len(steps))]
        style = {"color": "black", "linewidth": 2.5} if ARMS[label] is None else {"linewidth": 1.5}
        style["linestyle"] = "--" if "anew" in label else "-"
        axes.plot(steps, means, marker="o", markersize=3, label=label, **style)
    ends = [row[2] for row in summary(result)]
    first = result["runs"][0]["held_out"][0][1]
    axes.set_ylim(min(ends) - 0.02, max(first, *ends) + 0.25)  # what begins anew begins far above
    axes.set(xlabel="steps after upcycling", ylabel="held-out loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
