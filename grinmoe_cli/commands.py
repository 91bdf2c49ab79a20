"""All commands: what each is called, says and runs. Its flags are the fields of its options dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """
    One command.

    Attributes:
        name: as typed after `grinmoe`; "tokenizer build" is an action of the group `tokenizer`.
        room: folder of `grinmoe/` that has it.
        options: dataclass in the room's `options.py`, and a name of its face.
        run: function of the face. It takes the options; an int that it returns is the exit code, anything else is 0.
        help: in the list of commands.
        description: above the list of flags.
        example: below it, without "grinmoe" and the command's name.
        is_recorded: `run` also takes `command`, the command line as typed, for the record beside its result.
        takes_settings: unknown flags are settings of a recipe.
    """

    name: str
    room: str
    options: str
    run: str
    help: str
    description: str
    example: str
    is_recorded: bool = False
    takes_settings: bool = False

    def parser(self) -> dict[str, Any]:
        """What `add_parser` takes."""
        return {
            "help": self.help,
            "description": self.description,
            "epilog": f"example: grinmoe {self.name} {self.example}",
            "allow_abbrev": not self.takes_settings,
        }


def _training(task: str, purpose: str, description: str, recipe: str) -> Command:
    return Command(
        task,
        "training",
        "RecipeOptions",
        "run_recipe",
        purpose,
        f"{description} Settings come from a YAML file, and from flags, which win: --key value for every key that a file "
        "may have. Most are those of Transformers' TrainingArguments; --options lists all. SIGTERM and Ctrl-C end a run "
        "with a checkpoint; the same command goes on from it, and after any other end.",
        f"--config recipes/{recipe} --learning_rate 1e-4 --output_dir runs/{task}",
        takes_settings=True,
    )


# What `add_parser` takes of a command whose actions are the commands.
GROUPS = {
    "tokenizer": {
        "help": "build the family's tokenizer from a source, or verify one",
        "description": "Build a tokenizer of the family, or hold one against strings and their ids.",
        "epilog": "example: grinmoe tokenizer build --source tokenizer.model --output tokenizer",
    }
}

COMMANDS = (
    Command(
        "demo",
        "demo",
        "DemoOptions",
        "run_demo",
        "train a small GRIN MoE on real text, save it, load it elsewhere and talk to it",
        "Train a small GRIN MoE from scratch on the question-answer pairs of chatterbot-corpus, evaluate it, save it with "
        "its code, load it in a process without this package, and chat with it. About 2 minutes on 2 cores.",
        "--output demo-output",
    ),
    _training(
        "sft",
        "fine-tune on chats, prompts with answers, or text",
        "Supervised fine-tuning: the loss is over the assistant's text (or the completion, or all).",
        "sft_qlora.yaml",
    ),
    _training(
        "dpo",
        "train on preferences: a chosen and a rejected answer to each prompt",
        "Direct preference optimisation with TRL's DPOTrainer.",
        "dpo_qlora.yaml",
    ),
    _training(
        "pretrain",
        "train on plain text, from scratch or on from a checkpoint",
        "Texts are joined and cut into rows of max_length; attention does not cross from one text into another.",
        "pretrain_small.yaml",
    ),
    Command(
        "merge",
        "adapters",
        "MergeOptions",
        "run_merge",
        "put an adapter into the weights of its base model",
        "Merge a LoRA adapter into its base and save the result in the released layout, with code and tokenizer. The "
        "folder appears when it is complete; base and adapter stay as they are.",
        "--adapter runs/sft/adapter --output merged",
    ),
    Command(
        "upcycle",
        "conversion",
        "UpcycleOptions",
        "run_upcycle",
        "make a GRIN-MoE of a dense checkpoint, whose feed-forward every expert copies",
        "Make a GRIN-MoE of a dense checkpoint (Llama, Mistral or Phi-3 layout): every expert copies its feed-forward, w2 "
        "is scaled so that the result begins where the dense model is, and the router is new. Train it then (grinmoe "
        "pretrain, sft). Shard by shard; the folder appears when it is complete.",
        "--model HuggingFaceTB/SmolLM2-360M --experts 8 --top-k 2 --output smol-moe",
    ),
    Command(
        "plan",
        "planning",
        "PlanOptions",
        "run_plan",
        "what fits: memory of a GPU, recipe and a bound on speed for a fine-tuning",
        "Predict from config.json what a fine-tuning takes of each GPU, whether it fits, which recipe is for it, and what "
        "would fit instead. No weights are read. Exit code 0 whether it fits or not.",
        "--model microsoft/GRIN-MoE --method qlora --gpus 1 --gpu-memory-gib 80 --seq-length 2048 --batch-size 1",
    ),
    Command(
        "compare",
        "research",
        "CompareOptions",
        "run_compare",
        "train small models with every estimator of the router's gradient, and compare them",
        "Train small models from the same weights, on the same batches in the same order, with every estimator, two kinds "
        "of balance and a dense twin; write a table, a figure and all numbers. Complete runs are kept: an interrupted "
        "comparison goes on. About an hour on 2 cores; on a GPU models and data are larger.",
        "--output comparison --seeds 1 --steps 60 --arms topk v2 togo",
        is_recorded=True,
    ),
    Command(
        "generate",
        "serving",
        "GenerateOptions",
        "run_generate",
        "chat with a checkpoint",
        "Chat with a GRIN-MoE checkpoint, answers streamed. Without --prompt a conversation on the terminal: /reset forgets "
        "it, /quit (or end of input) ends it.",
        '--model demo-output/model --prompt "What is AI?"',
    ),
    Command(
        "serve",
        "serving",
        "ServeOptions",
        "run_serve",
        "serve a checkpoint to OpenAI clients",
        "Serve a GRIN-MoE checkpoint over HTTP with OpenAI's API (chat completions and completions, also streamed), many "
        "requests at a time. The line that says it is ready names the address. Ctrl-C or SIGTERM ends it.",
        "--model demo-output/model --port 8000",
    ),
    Command(
        "evaluate",
        "evaluation",
        "EvaluateOptions",
        "run_evaluate",
        "scores by lm-eval, with those of the paper beside them",
        "Run tasks of lm-eval on a checkpoint and write a table, with the paper's scores where a task is of its Table 2, "
        "and evaluations.json for the model card. Complete tasks are kept: an interrupted evaluation goes on. Tasks: names "
        "of the paper's suite (mmlu, arc_c, gsm8k, ...; paper is all of it), other names of lm-eval, or files of JSON "
        "lines, which need no network.",
        "--model microsoft/GRIN-MoE --tasks arc_c gsm8k --output evaluation",
        is_recorded=True,
    ),
    Command(
        "export",
        "conversion",
        "ExportOptions",
        "run_export",
        "write a checkpoint for other programs, or of another model, dtype or shard size",
        "Convert a checkpoint, shard by shard: to phimoe, which Transformers' own class, vLLM and SGLang load without code "
        "(a model with RMSNorm and top-k gating: to mixtral); to safetensors, a GRIN-MoE of another dtype or shard size, "
        "also from a phimoe (Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE) or a Mixtral; or to gguf, by llama.cpp's converter. "
        "The folder appears when it is complete.",
        "--model demo-output/model --to phimoe --output demo-phimoe",
    ),
    Command(
        "analyze",
        "analysis",
        "AnalyzeOptions",
        "run_analyze",
        "report how a checkpoint routes texts to its experts",
        "Route texts and report what the routers do: load of the experts, similarity of domains, near ties, experts chosen "
        "together, and a sentence token by token. The folder gets report.html, which works offline, its pictures, and the "
        "data as JSON and Parquet; it appears when it is complete.",
        "--model demo-output/model --text talk.jsonl manual.txt --output routing",
        is_recorded=True,
    ),
    Command(
        "tokenizer build",
        "tokenization",
        "BuildOptions",
        "run_build",
        "make a tokenizer folder of a tokenizer.model, a GGUF or a tokenizer.json",
        "Take vocabulary and merges from a SentencePiece BPE model, a GGUF or a tokenizer.json (also one whose normaliser "
        "was lost when another class saved it), put the family's normalisation, special tokens and chat template on, and "
        "write a tokenizer that loads with TokenizersBackend and AutoTokenizer.",
        "--source tokenizer.model --output tokenizer",
    ),
    Command(
        "tokenizer verify",
        "tokenization",
        "VerifyOptions",
        "run_verify",
        "compare a tokenizer with strings and their ids",
        "Compare what a tokenizer gives with vectors: a JSON object from string to ids, or llama.cpp's *.inp and *.out. "
        "Prints each difference with the place where it begins. Exit code 0 if all agree, 1 if not.",
        "--tokenizer tokenizer --vectors ids.json",
    ),
    Command(
        "push",
        "hub",
        "PushOptions",
        "push",
        "publish a checkpoint or an adapter on the Hub, checked before",
        "Assemble what belongs to a release (weights, config, code, tokenizer, card), check it (loads without this package, "
        "same logits; no pickles, secrets, local paths or training state), show it, and publish it in one commit. An "
        "interrupted push goes on where it was. The token is that of `hf auth login` or HF_TOKEN.",
        "--model demo-output/model --repo my-grin-moe --private --dry-run",
    ),
    Command(
        "pull",
        "hub",
        "PullOptions",
        "run_pull",
        "download a checkpoint from the Hub, whole and checked",
        "Download a repository of the Hub into a folder, without pickles, and check that the weights are those of its "
        "config. The folder appears when it is complete; an interrupted pull goes on where it was.",
        "--repo microsoft/GRIN-MoE --output GRIN-MoE",
    ),
)
