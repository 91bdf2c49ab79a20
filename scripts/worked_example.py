"""From plain text to a model that prefers the right answer, in three commands and some minutes on two cores.

    python scripts/worked_example.py --output worked-example

1. `grinmoe pretrain` trains the demo's model on the documentation of Python, which becomes the base;
2. `grinmoe sft` fine-tunes it by QLoRA on the question-answer pairs of chatterbot-corpus;
3. `grinmoe dpo` trains that adapter on pairs of the same corpus: the true answer, and another question's.

(The demo's own checkpoint would not do as the base: it has seen the pairs.) What is measured is on questions that no step
has seen, before and after. An interrupted example goes on where it was. Writes report.md, report.json and report.png into
the output folder; the project's own dated ones are in docs/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

RECIPES = Path(os.path.relpath(Path(__file__).parent.parent / "recipes"))
HELD_OUT_TEXT = 0.02
QUESTIONS = ("What are you?", "Tell me a joke.", "What is the moon?")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A worked example of pretrain, sft with QLoRA, and dpo, on real text.",
        epilog="example: python scripts/worked_example.py --output worked-example",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder, or one to go on in")
    parser.add_argument("--rows", type=int, default=4000, metavar="N", help="documents of text for the base")
    parser.add_argument("--epochs", type=float, default=None, metavar="N", help="of every step (default: the recipes')")
    run(parser.parse_args())


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole example; returns what report.json holds."""
    from grinmoe.provenance import environment

    output = Path(arguments.output)
    started = time.perf_counter()
    files = prepare(output, arguments.rows)
    epochs = [] if arguments.epochs is None else ["--num_train_epochs", str(arguments.epochs)]
    steps: dict[str, Any] = {}
    steps["pretrain"] = train(
        "pretrain",
        ["--model_config", files["config"], "--tokenizer", files["tokenizer"], *epochs],
        files["text"],
        files["text-held-out"],
        output / "pretrain",
    )
    base = ["--model", output / "pretrain" / "model"]
    steps["sft"] = train("sft", [*base, *epochs], files["chat"], files["chat-held-out"], output / "sft")
    adapter = ["--adapter", output / "sft" / "adapter"]
    data = files["preference"], files["preference-held-out"]
    steps["dpo"] = train("dpo", [*base, *adapter, *epochs], *data, output / "dpo")
    result = {
        "environment": environment(shlex.join(["python", *sys.argv])),
        "seconds": round(time.perf_counter() - started),
        "steps": steps,
        **measure(output, files),
    }
    write_report(output, result)
    return result


def prepare(output: Path, rows: int) -> dict[str, Path]:
    """Texts, chats, pairs and the tokenizer, all from installed packages."""
    from grinmoe.demo import DemoSettings, demo_config, installed_documentation, load_corpus, texts, write_examples
    from grinmoe.tokenization import build_tokenizer

    folder = output / "data"
    files = write_examples(folder)
    documents = installed_documentation(())[:rows]
    for name, held_out in (("text", False), ("text-held-out", True)):
        part = [document.text for document in documents if document.is_held_out(HELD_OUT_TEXT) == held_out]
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in part), encoding="utf-8")
    files["tokenizer"] = files["config"] = output / "tokenizer"
    if not (output / "tokenizer").is_dir():
        settings = DemoSettings()
        words = [*texts(load_corpus().train), *(document.text for document in documents)]
        tokenizer = build_tokenizer(words, settings.vocab_size, model_max_length=2 * settings.row_length)
        tokenizer.save_pretrained(output / "tokenizer")
        demo_config(settings, tokenizer).save_pretrained(output / "tokenizer")
    return files


def train(task: str, flags: list[Any], data: Path, held_out: Path, folder: Path) -> dict[str, Any]:
    """One command, as it would be typed."""
    from grinmoe.training import METRICS_NAME, read_recipe
    from grinmoe.training import train as run_training

    given = ["--config", RECIPES / f"example_{task}.yaml", *flags]
    given += ["--train_data", data, "--eval_data", held_out, "--output_dir", folder]
    command = ["grinmoe", task, *map(str, given)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    result = run_training(read_recipe(task, command[2:]), shlex.join(command))
    if result.model is None:
        raise SystemExit(0)  # a signal; the next start goes on
    history = json.loads((folder / METRICS_NAME).read_text(encoding="utf-8"))
    return {"command": shlex.join(command), "optimizer_steps": result.step, **result.metrics, "history": history}


def measure(output: Path, files: dict[str, Path]) -> dict[str, Any]:
    """Loss of held-out answers by the three models, computed here and not by a trainer, and what they say."""
    import torch

    from grinmoe import GrinMoeForCausalLM, load_tokenizer
    from grinmoe.adapters import load_adapter, quantization_config
    from grinmoe.serving import Chat, ChatOptions

    tokenizer = load_tokenizer(output / "tokenizer")
    chats = [json.loads(line)["messages"] for line in files["chat-held-out"].read_text(encoding="utf-8").splitlines()]
    answer_loss: dict[str, float] = {}
    answers: dict[str, dict[str, str]] = {}
    for name in ("pretrain", "sft", "dpo"):
        quantised = quantization_config("nf4", torch.float32)
        model = GrinMoeForCausalLM.from_pretrained(output / "pretrain" / "model", quantization_config=quantised)
        if name != "pretrain":
            model = load_adapter(model, output / name / "adapter")
        model.eval()
        answer_loss[name] = float(torch.cat([answer_losses(model, tokenizer, chat) for chat in chats]).mean())
        options = ChatOptions(max_new_tokens=24, temperature=0)
        answers[name] = {question: Chat(model, tokenizer, options).answer(question) for question in QUESTIONS}
    return {"held_out_chats": len(chats), "answer_loss": answer_loss, "answers": answers}


def answer_losses(model: Any, tokenizer: Any, chat: list[dict[str, str]], length: int = 128) -> Any:
    """Cross entropy of each token of the assistant's messages, their end marks included."""
    import torch

    row = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    ids, target = torch.tensor(row["input_ids"][:length]), torch.tensor(row["assistant_masks"][:length]).bool()
    with torch.inference_mode():
        logits = model(ids[None]).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[target[1:]]


def write_report(output: Path, result: dict[str, Any]) -> None:
    from grinmoe.files import atomic_write_text
    from grinmoe.provenance import markdown_table

    atomic_write_text(output / "report.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    plot(result, output / "report.png")
    facts, steps = result["environment"], result["steps"]
    names = {"pretrain": "base (in 4 bits)", "sft": "after SFT", "dpo": "after SFT and DPO"}
    loss = result["answer_loss"]
    rewards = [e["eval_rewards/accuracies"] for e in steps["dpo"]["history"] if "eval_rewards/accuracies" in e]
    dpo_loss = [e["eval_loss"] for e in steps["dpo"]["history"] if "eval_loss" in e]
    table = markdown_table(
        ["on held-out questions", "before", "after"],
        [
            ["SFT: loss of an answer's token", f"{loss['pretrain']:.3f}", f"{loss['sft']:.3f}"],
            ["DPO: loss", f"{dpo_loss[0]:.3f}", f"{dpo_loss[-1]:.3f}"],
            ["DPO: reward accuracy", f"{100 * rewards[0]:.1f} %", f"{100 * rewards[-1]:.1f} %"],
            ["DPO: loss of an answer's token", f"{loss['sft']:.3f}", f"{loss['dpo']:.3f}"],
        ],
    )
    speed = markdown_table(
        ["command", "optimizer steps", "seconds", "tokens/s", "peak GiB"],
        [
            [task, step["optimizer_steps"], step["seconds"], step.get("tokens_per_s", "-"), step["peak_gib"]]
            for task, step in steps.items()
        ],
    )
    said = markdown_table(
        ["question", *names.values()],
        [[q, *(result["answers"][name][q].replace("|", "/").replace("\n", " ") for name in names)] for q in QUESTIONS],
    )
    commands = "\n".join(step["command"] for step in steps.values())
    text = f"""# Worked example: pretrain, SFT with QLoRA, DPO

{facts["date"]}, commit {facts["commit"]}, {facts["cpu"]} with {facts["cores"]} cores ({facts["torch_threads"]} threads of
torch), torch {facts["torch"]}, transformers {facts["transformers"]}, Python {facts["python"]}.
Command: `{facts["command"]}`, {result["seconds"]} seconds.

{table}

{result["held_out_chats"]} conversations of questions that no step has trained on. The loss of a token is over the answers
and their end marks, from the base in 4 bits on, and computed apart from the trainers. The reward accuracy is TRL's: the
share of pairs whose true answer has gained more, against the model before DPO, than another question's answer. Before the
first step all rewards are 0 and no pair is decided; a model that learns nothing would come to 50 %.

![losses and accuracies](report.png)

{speed}

What they say, greedily:

{said}

The commands:

```
{commands}
```
"""
    atomic_write_text(output / "report.md", text)
    print(f"\n{table}\n\nreport: {output / 'report.md'}")


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 4, figsize=(18, 4.2), layout="constrained")
    titles = {"pretrain": "1. Pretraining: loss", "sft": "2. SFT: loss of the answers", "dpo": "3. DPO: loss"}
    for axes, (task, title) in zip(panels, titles.items()):
        history = result["steps"][task]["history"]
        for name, label, color in (("loss", "training", "#4c72b0"), ("eval_loss", "held out", "#c44e52")):
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            if points:
                axes.plot(*zip(*points), label=label, color=color, marker="o" if name != "loss" else None, markersize=3)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel("step")
        axes.legend(frameon=False)
    axes = panels[3]
    history = result["steps"]["dpo"]["history"]
    for name, label, color in (
        ("rewards/accuracies", "training", "#4c72b0"),
        ("eval_rewards/accuracies", "held out", "#c44e52"),
    ):
        points = [(entry["step"], 100 * entry[name]) for entry in history if name in entry and entry["step"] > 1]
        axes.plot(
            *zip(*points), label=label, color=color, marker="o" if name.startswith("eval") else None, markersize=3
        )
    axes.axhline(50, color="0.4", linewidth=0.8, linestyle=":")
    axes.set(ylim=(0, 100), xlabel="step", ylabel="%")
    axes.set_title("DPO: reward accuracy", loc="left", fontweight="bold")
    axes.legend(frameon=False)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
