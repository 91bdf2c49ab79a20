"""Load a checkpoint in a process that cannot import the package, compare logits and answer prompts.

`isolated_load.py` runs this file as a script and never imports it: `python -P isolated_script.py CHECKPOINT EXCHANGE`.
EXCHANGE holds expected.safetensors (input_ids, logits) and request.json; the script writes answer.json there.
"""

import json
import sys
from pathlib import Path

sys.modules["grinmoe"] = None  # type: ignore[assignment]  # even if it is installed here, importing it is an error

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoTokenizer, TextStreamer, logging  # noqa: E402


def main(checkpoint: str, exchange: Path) -> None:
    logging.disable_progress_bar()
    request = json.loads((exchange / "request.json").read_text(encoding="utf-8"))
    expected = load_file(exchange / "expected.safetensors")
    model = load_model(checkpoint, request)
    answer = {"model_module": module_of(model), "answers": {}, "token_ids": []}
    with torch.inference_mode():
        output = model(expected["input_ids"][None])
        logits = output["logits"] if "logits" in output else output["last_hidden_state"]
        answer["logits_difference"] = (logits.float() - expected["logits"].float()).abs().max().item()
        print("logits", "equal" if torch.equal(logits, expected["logits"]) else "differ")
        if request["prompts"] or request["texts"]:
            # It reads the config, which is remote code too: without the flag it would ask on the terminal.
            tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
            answer["token_ids"] = [tokenizer(text).input_ids for text in request["texts"]]
            for prompt in request["prompts"]:
                answer["answers"][prompt] = reply(model, tokenizer, prompt, request["max_new_tokens"])
    (exchange / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def load_model(checkpoint, request):
    auto_class = getattr(transformers, request["auto_class"])
    model = auto_class.from_pretrained(request["base_model"] or checkpoint, trust_remote_code=True, dtype="auto").eval()
    if not request["base_model"]:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, checkpoint).eval()


def module_of(model):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__module__


def reply(model, tokenizer, prompt, max_new_tokens):
    print(f"\n> {prompt}")
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt")
    sequence = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )[0]
    return tokenizer.decode(sequence[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit(130)
