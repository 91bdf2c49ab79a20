"""`grinmoe compare`: train small models that differ in the router's estimator only, and report what comes out.

Every arm of a seed starts from the same weights and sees the same batches in the same order. A run writes its result when
it is complete, so that an interrupted comparison goes on where it was; `comparison_report.py` makes table and figure.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from ..configuration_grinmoe import GrinMoeConfig, read_json_object
from ..demo import Document, documents_of_file, installed_documentation
from ..files import atomic_file, atomic_write_text
from ..modeling_grinmoe import GrinMoeForCausalLM
from ..outputs import check_folder
from ..provenance import environment
from ..tokenization import build_tokenizer
from ..training import NarrowingMask
from .options import CompareOptions


class RunsFailedError(RuntimeError):
    """Some runs of a comparison failed; the message says which and why."""


@dataclass(frozen=True)
class CompareSettings:
    """Sizes of one comparison. The defaults are for two CPU cores: a minute and a half a run on one of them."""

    steps: int = 400
    seeds: int = 3
    vocab_size: int = 1024
    row_length: int = 128
    micro_batch_size: int = 4
    accumulation: int = 4  # makes local and global balance differ on one device
    held_out_rows: int = 256
    evaluations: int = 8
    learning_rate: float = 3e-3
    warmup_share: float = 0.05
    hidden_size: int = 128
    intermediate_size: int = 128
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.01
    initializer_range: float = 0.05
    bf16: bool = False
    packages: tuple[str, ...] = ("torch", "numpy")  # whose documentation is read, beside Python's own

    def __post_init__(self):
        for name in ("steps", "seeds"):
            most = 1000 if name == "seeds" else 10**9
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"--{name} {getattr(self, name)} cannot be compared; give 1 to {most}")

    @property
    def tokens_per_step(self) -> int:
        return self.micro_batch_size * self.accumulation * self.row_length


# A model of 62 M parameters, 18 M active, on 25 M tokens: the installed documentation some six times.
_GPU_SIZES: dict[str, Any] = {
    "steps": 1500,
    "vocab_size": 8192,
    "row_length": 512,
    "micro_batch_size": 8,
    "evaluations": 12,
    "learning_rate": 1e-3,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 16,
    "initializer_range": 0.03,
    "bf16": True,
    "packages": ("torch", "numpy", "transformers"),
}


@dataclass(frozen=True)
class Arm:
    """One way to train: a label for people, fields of the config, and the width that the mask starts from, if another.

    Without an estimator the model is dense.
    """

    label: str
    estimator: str | None
    eps: float = 0.01
    scope: str = "global"
    mask_from: float | None = None


ARMS: dict[str, Arm] = {
    "dense": Arm("dense, equal active parameters", None),
    "topk-local": Arm("GShard top-k, local balance", "topk", scope="local"),
    "topk": Arm("GShard top-k", "topk"),
    "v2": Arm("SparseMixer-v2", "sparsemixer_v2"),
    "printed": Arm("v2 as printed", "sparsemixer_v2_printed"),
    "star": Arm("v2*", "sparsemixer_v2_star"),
    "togo": Arm("togo", "sparsemixer_togo"),
    "joint": Arm("joint", "sparsemixer_joint"),
    "unscaled": Arm("unscaled", "sparsemixer_unscaled"),
    "v2-wide": Arm("v2, mask 0.1", "sparsemixer_v2", 0.1),
    "togo-wide": Arm("togo, mask 0.1", "sparsemixer_togo", 0.1),
    "joint-wide": Arm("joint, mask 0.1", "sparsemixer_joint", 0.1),
    "unscaled-wide": Arm("unscaled, mask 0.1", "sparsemixer_unscaled", 0.1),
    "centred-wide": Arm("togo with a baseline, mask 0.1", "sparsemixer_centred", 0.1),
    "v2-narrowing": Arm("v2, mask from 0.1 to 0.01", "sparsemixer_v2", mask_from=0.1),
    "v2-narrowing-far": Arm("v2, mask from 0.5 to 0.01", "sparsemixer_v2", mask_from=0.5),
    "unscaled-narrowing-far": Arm("unscaled, mask from 0.5 to 0.01", "sparsemixer_unscaled", mask_from=0.5),
}


def run_comparison(
    output: str | os.PathLike,
    settings: CompareSettings,
    arms: list[str] | None = None,
    text: str | os.PathLike | None = None,
    workers: int | None = None,
    command: str = "grinmoe compare",
) -> Path:
    """
    Train every arm with every seed, and write `comparison.json`, `comparison.md` and `comparison.png` into `output`.

    Args:
        output: folder, new or that of an earlier comparison with the same settings, whose complete runs are kept.
        settings: sizes; `seeds` runs per arm.
        arms: names of `ARMS`; None for all.
        text: a UTF-8 file to train on; None for the documentation of the installed packages.
        workers: how many runs at a time; None for one per CPU core, or four on a GPU, which such models do not fill.
        command: how to repeat it, for the result's record.

    Returns:
        Path of `comparison.md`.

    Raises:
        ValueError: an unknown arm, a text too short, or `output` has runs of other settings.
        RunsFailedError: a run failed; the complete ones are kept.
    """
    from .comparison_report import write_report

    names = list(ARMS) if arms is None else arms
    if unknown := [name for name in names if name not in ARMS]:
        raise ValueError(f"--arms {' '.join(unknown)} unknown; choose from {' '.join(ARMS)}")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers} trains nothing; give 1 or more")
    if text is not None and not Path(text).is_file():
        raise ValueError(f"--text {text} is not a file; give one with UTF-8 text")
    folder = _checked_output(output)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=True)
    corpus = prepare_corpus(folder, settings, None if text is None else Path(text), console)
    facts = {"settings": asdict(settings), "corpus": corpus}
    _check_same(folder, facts)
    todo = [
        (name, seed) for seed in range(settings.seeds) for name in names if not _run_file(folder, name, seed).exists()
    ]
    _train_all(folder, settings, todo, workers, console)
    runs = [_read_run(_run_file(folder, name, seed)) for name in names for seed in range(settings.seeds)]
    facts["environment"] = environment(command)
    return write_report(folder, facts, runs, {name: ARMS[name].label for name in names})


def run_compare(options: CompareOptions, command: str) -> None:
    """`grinmoe compare`. Raises SystemExit with a message where runs failed."""
    given = {name: value for name in ("seeds", "steps") if (value := getattr(options, name)) is not None}
    settings = CompareSettings(**{**(_GPU_SIZES if torch.cuda.is_available() else {}), **given})
    arms = None if options.arms is None else list(options.arms)
    try:
        report = run_comparison(options.output, settings, arms, options.text, options.workers, command)
    except RunsFailedError as error:
        raise SystemExit(f"grinmoe compare: {error}") from error
    print(f"table and figure: {report}")


def _checked_output(output: str | os.PathLike) -> Path:
    """The absolute path of a folder that is new, empty or a comparison's."""
    folder = check_folder(output)
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    # Of a start that was killed while it read the text: an empty folder for runs, and perhaps the rows.
    begun = {name for name in present if name.startswith(".corpus-")} | {"runs", "corpus.safetensors"}
    if "corpus.json" not in present and (
        not present <= begun or any(folder.glob("runs/*")) or present == {"corpus.safetensors"}
    ):
        raise ValueError(f"--output {output} holds something that is not a comparison; give a new folder")
    return folder


def _read_run(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); remove it to train that run again") from error


def _check_same(folder: Path, facts: dict[str, Any]) -> None:
    """Runs of one folder are comparable: same settings (but for the number of seeds), same text."""
    record = folder / "settings.json"
    facts = json.loads(json.dumps(facts))
    comparable = {**facts, "settings": {**facts["settings"], "seeds": None}}
    earlier = read_json_object(record, remedy="give a new --output") if record.exists() else comparable
    if earlier != comparable and any((folder / "runs").iterdir()):
        different = [
            f"{part}.{key}"
            for part, values in comparable.items()
            for key, value in values.items()
            if value != earlier.get(part, {}).get(key)
        ]
        raise ValueError(
            f"--output {folder} holds runs with other settings ({', '.join(different)}); give a new folder, or the "
            "settings of those runs"
        )
    atomic_write_text(record, json.dumps(comparable, indent=2) + "\n")


def _run_file(folder: Path, name: str, seed: int) -> Path:
    return folder / "runs" / f"{name}-seed{seed}.json"


def _train_all(
    folder: Path, settings: CompareSettings, todo: list[tuple[str, int]], workers: int | None, console: Console
) -> None:
    workers = workers or (4 if torch.cuda.is_available() else os.cpu_count() or 1)
    tracked = partial(track, description=f"{len(todo)} runs, {workers} at a time", total=len(todo), console=console)
    if workers == 1:
        for name, seed in tracked(todo):
            run_arm(folder, settings, name, seed)
        return
    failures = []
    # One thread each: small models gain nothing from more.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker) as pool:
        jobs = {pool.submit(run_arm, folder, settings, name, seed): (name, seed) for name, seed in todo}
        for job in tracked(as_completed(jobs)):
            if error := job.exception():
                name, seed = jobs[job]
                failures.append(f"{name} with seed {seed}: {type(error).__name__}: {error}")
    if failures:
        raise RunsFailedError(
            f"{len(failures)} of {len(todo)} runs failed, the others are kept; run again to repeat them. "
            + "; ".join(failures)
        )


def _start_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A killed comparison would else leave its workers behind, each with a run that nobody waits for."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def prepare_corpus(folder: Path, settings: CompareSettings, text: Path | None, console: Console) -> dict[str, Any]:
    """
    Tokenize the text once for all runs, into `corpus.safetensors`: `train` and `held_out` (rows, L) int32 ids, and
    `held_out_domain` (rows, L) int32.

    Documents follow each other in a row, separated by the end-of-text token; attention goes across.
    """
    record, tensors = folder / "corpus.json", folder / "corpus.safetensors"
    wanted = {
        "text": None if text is None else str(text),
        "vocab_size": settings.vocab_size,
        "row_length": settings.row_length,
        "packages": list(settings.packages),
    }
    if record.exists() and tensors.exists():
        facts = read_json_object(record, remedy="give a new --output")
        if facts.get("wanted") == wanted:
            return facts
    console.print("Reading text and training a tokenizer on it")
    documents = installed_documentation(settings.packages) if text is None else documents_of_file(text)
    train = [document for document in documents if not document.is_held_out(0.05)]
    held_out = [document for document in documents if document.is_held_out(0.05)]
    tokenizer = build_tokenizer((document.text for document in train), settings.vocab_size, model_max_length=10**9)
    domains = sorted({document.domain for document in documents})
    train_ids, _ = _rows(train, tokenizer, settings.row_length, domains)
    held_out_ids, held_out_domain = _rows(held_out, tokenizer, settings.row_length, domains)
    rows_per_step = settings.micro_batch_size * settings.accumulation
    if len(train_ids) < rows_per_step or not len(held_out_ids):
        raise ValueError(
            f"the text makes {len(train_ids)} rows of {settings.row_length} tokens to train on and {len(held_out_ids)} "
            f"held out, a step takes {rows_per_step}; give a longer text"
        )
    # Spread over all held-out text, whatever its order.
    keep = torch.linspace(0, len(held_out_ids) - 1, min(len(held_out_ids), settings.held_out_rows)).long()
    rows = {"train": train_ids, "held_out": held_out_ids[keep], "held_out_domain": held_out_domain[keep]}
    with atomic_file(tensors) as partial:
        save_file(rows, partial)
    facts = {
        "wanted": wanted,
        "source": "documentation of the installed packages" if text is None else text.name,
        "domains": domains,
        "train_tokens": train_ids.numel(),
        "held_out_tokens": len(keep) * settings.row_length,
        "characters": sum(len(document.text) for document in documents),
        "bytes_per_token": round(sum(len(d.text.encode()) for d in train) / train_ids.numel(), 3),
    }
    atomic_write_text(record, json.dumps(facts, indent=2) + "\n")
    return facts


def _rows(documents: list[Document], tokenizer, length: int, domains: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, L) int32 ids and domains; the rest that does not fill a row is left out."""
    ids: list[int] = []
    domain: list[int] = []
    encoded = tokenizer([document.text for document in documents]).input_ids if documents else []
    for document, tokens in zip(documents, encoded, strict=True):
        ids += [*tokens, tokenizer.eos_token_id]
        domain += [domains.index(document.domain)] * (len(tokens) + 1)
    whole = len(ids) // length * length
    return tuple(torch.tensor(part[:whole], dtype=torch.int32).view(-1, length) for part in (ids, domain))  # type: ignore[return-value]


def build_config(settings: CompareSettings, arm: Arm) -> GrinMoeConfig:
    """The arm's model. The dense one has one expert as wide as all that a token uses."""
    fields = {
        name: getattr(settings, name)
        for name in (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "num_local_experts num_experts_per_tok router_aux_loss_coef initializer_range"
        ).split()
    }
    fields |= {"max_position_embeddings": settings.row_length, "sliding_window": None, "use_cache": False}
    if arm.estimator is None:
        fields |= {
            "num_local_experts": 1,
            "num_experts_per_tok": 1,
            "intermediate_size": settings.intermediate_size * settings.num_experts_per_tok,
            "router_aux_loss_coef": 0.0,
        }
    else:
        fields |= {
            "router_estimator": arm.estimator,
            "router_jitter_noise": arm.eps,
            "router_aux_loss_scope": arm.scope,
        }
    return GrinMoeConfig(**fields, eos_token_id=None, bos_token_id=None)


def run_arm(folder: Path, settings: CompareSettings, name: str, seed: int) -> None:
    """Train one arm with one seed and write its result."""
    arm = ARMS[name]
    corpus = load_file(folder / "corpus.safetensors")
    rows = {part: [{"input_ids": row, "labels": row} for row in corpus[part].long()] for part in ("train", "held_out")}
    set_seed(seed)
    model = GrinMoeForCausalLM(build_config(settings, arm))
    scratch = folder / "runs" / f".{name}-seed{seed}"
    trainer = Trainer(
        model=model,
        args=_arguments(settings, seed, scratch),
        train_dataset=rows["train"],
        eval_dataset=rows["held_out"],
        callbacks=None if arm.mask_from is None else [NarrowingMask(arm.mask_from)],
    )
    trainer.remove_callback(PrinterCallback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    shutil.rmtree(scratch, ignore_errors=True)
    log = trainer.state.log_history
    result = {
        "arm": name,
        "seed": seed,
        "held_out": [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry],
        "train": [(entry["step"], entry["loss"]) for entry in log if "loss" in entry],
        "seconds": seconds,
        "tokens_per_s": settings.steps * settings.tokens_per_step / seconds,
        "environment": environment(f"run of {name} with seed {seed}"),
        "parameters": model.num_parameters(),
    }
    if arm.estimator is not None:
        result["routing"] = routing_report(model, corpus["held_out"], corpus["held_out_domain"])
    atomic_write_text(_run_file(folder, name, seed), json.dumps(result, indent=1) + "\n")


def _arguments(settings: CompareSettings, seed: int, scratch: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(scratch),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.micro_batch_size,
        per_device_eval_batch_size=4 * settings.micro_batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(settings.warmup_share * settings.steps)),
        weight_decay=0.01,
        logging_steps=max(1, settings.steps // 60),
        eval_strategy="steps",
        eval_steps=max(1, settings.steps // settings.evaluations),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=settings.bf16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        seed=seed,
        prediction_loss_only=True,
    )


@torch.no_grad()
def routing_report(model: GrinMoeForCausalLM, rows: torch.Tensor, domain: torch.Tensor) -> dict[str, list[Any]]:
    """
    How the trained model routes held-out text, per layer.

    Returns:
        `load` (L, E) share of choices of each expert; `token_information` and `domain_information` (L,): how much of the
        entropy of the first choice the token, or the text's domain, explains (mutual information over entropy, 0 to 1).
    """
    model.eval()
    device = next(model.parameters()).device
    chosen = []
    for batch in rows.long().split(32):
        output = model(input_ids=batch.to(device), output_router_logits=True)
        chosen.append(torch.stack(output.selected_experts).cpu())
    experts = torch.cat(chosen, dim=1)  # (L, T, K)
    num_experts = model.config.num_local_experts
    load = torch.stack([torch.bincount(layer.flatten(), minlength=num_experts) for layer in experts]).double()
    first = experts[..., 0]
    return {
        "load": (load / load.sum(-1, keepdim=True)).tolist(),
        "token_information": [explained_entropy(layer, rows.flatten().long()) for layer in first],
        "domain_information": [explained_entropy(layer, domain.flatten().long()) for layer in first],
    }


def explained_entropy(target: torch.Tensor, given: torch.Tensor) -> float:
    """I(target; given) / H(target) of two equally long lists of non-negative integers; 0 where the target is constant."""
    joint = torch.zeros(int(target.max()) + 1, int(given.max()) + 1, dtype=torch.float64)
    joint.index_put_((target, given), torch.ones(len(target), dtype=torch.float64), accumulate=True)
    joint /= joint.sum()

    def entropy(p: torch.Tensor) -> float:
        return float(-torch.special.xlogy(p, p).sum())

    whole = entropy(joint.sum(1))
    return 0.0 if whole == 0 else (whole + entropy(joint.sum(0)) - entropy(joint)) / whole
