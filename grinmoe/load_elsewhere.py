"""Load a checkpoint in a process that cannot import the package, compare logits and answer prompts.

Run by `grinmoe demo` as a script, never imported: `python -P load_elsewhere.py CHECKPOINT EXCHANGE`. EXCHANGE holds
expected.safetensors (input_ids, logits) and request.json (prompts, max_new_tokens); answer.json is written there.
"""

import json
import sys
from pathlib import Path

sys.modules["grinmoe"] = None  # type: ignore[assignment]  # even if it is installed here, importing it is an error

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, logging  # noqa: E402


def main(checkpoint: str, exchange: Path) -> None:
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True).eval()
    # It reads the config, which is remote code too: without the flag it would ask on the terminal.
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    expected = load_file(exchange / "expected.safetensors")
    request = json.loads((exchange / "request.json").read_text(encoding="utf-8"))
    answers = {}
    with torch.inference_mode():
        logits = model(expected["input_ids"][None]).logits
        print("logits", "equal" if torch.equal(logits, expected["logits"]) else "differ")
        for prompt in request["prompts"]:
            print(f"\n> {prompt}")
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            inputs = tokenizer(text, return_tensors="pt")
            sequence = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=request["max_new_tokens"],
                do_sample=False,
                streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            )[0]
            answers[prompt] = tokenizer.decode(sequence[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print()
    answer = {
        "logits_difference": (logits - expected["logits"]).abs().max().item(),
        "answers": answers,
        "model_module": type(model).__module__,
    }
    (exchange / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit(130)
