"""Chatting with a checkpoint: streamed, in the checkpoint's chat form, the conversation kept."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import grinmoe.generation_grinmoe as generation
from grinmoe import GrinMoeForCausalLM
from grinmoe.loading import load_for_use
from grinmoe.serving import Chat, ChatOptions, GenerateOptions, run_generate
from tests.small_chat import save_talking_model

TEXT = ["Hello there, how are you today?", "What is a mixture of experts?", "I am fine, thank you."] * 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model with a tokenizer that has a chat template. Its text is nonsense, but the same every time."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_talking_model(folder, TEXT, vocab_size=320, seed=1)
    return folder


def load_chat(model: str, options: ChatOptions) -> Chat:
    return Chat(*load_for_use(model, options.dtype, options.device), options)


@pytest.fixture
def chat(checkpoint) -> Chat:
    return load_chat(str(checkpoint), ChatOptions(max_new_tokens=6, temperature=0, device="cpu"))


@pytest.fixture
def headless(checkpoint, tmp_path):
    """The network alone, as a saved `GrinMoeModel` is."""
    folder = shutil.copytree(checkpoint, tmp_path / "headless")
    GrinMoeForCausalLM.from_pretrained(folder).model.save_pretrained(folder)
    return folder


def test_load_for_use_without_a_language_head_is_refused_by_name(headless):
    with pytest.raises(ValueError, match="lacks lm_head.weight"):
        load_for_use(str(headless), device="cpu")
    assert load_for_use(str(headless), device="cpu", needs_head=False)[0].lm_head is not None
    with pytest.raises(ValueError, match="lacks lm_head.weight"):
        run_generate(GenerateOptions(model=str(headless), prompt="Hello", device="cpu"))


def test_load_for_use_without_the_bias_of_the_head_is_refused_by_name(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "biasless")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks lm_head.bias.*set lm_head_bias to false"):
        load_for_use(str(folder), device="cpu")


def test_load_for_use_with_a_head_tied_to_the_embedding_is_loaded(checkpoint, tmp_path):
    model = GrinMoeForCausalLM.from_pretrained(checkpoint)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    folder = shutil.copytree(checkpoint, tmp_path / "tied")
    model.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    found, _ = load_for_use(str(folder), device="cpu")
    assert torch.equal(found.lm_head.weight, model.model.embed_tokens.weight)


def by_hand(chat: Chat, text: str, max_new_tokens: int = 6) -> str:
    """Greedy answer to `text`, token by token, without cache and without `generate`."""
    ids = chat.tokenizer(text, return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(max_new_tokens):
        with torch.no_grad():
            next_id = chat.model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, next_id.reshape(1, 1)], dim=1)
        if next_id == chat.model.config.eos_token_id:
            break
    return chat.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def test_layers_may_be_spread_over_all_devices(checkpoint, chat):
    """`--device auto`; of what there is, a CPU at least."""
    spread = load_chat(str(checkpoint), ChatOptions(max_new_tokens=6, temperature=0, device="auto"))
    if not torch.accelerator.is_available():
        assert spread.answer("Hello") == chat.answer("Hello")
    assert all(not parameter.is_meta for parameter in spread.model.parameters())


def test_the_answer_is_streamed_in_chat_form(chat, capsys):
    answer = chat.answer("How are you?")
    assert answer == by_hand(chat, "<|user|>\nHow are you?<|end|>\n<|assistant|>\n")
    assert capsys.readouterr().out.strip() == answer


def test_a_second_message_is_answered_in_the_light_of_the_first(chat):
    first = chat.answer("Hello")
    second = chat.answer("Why?")
    so_far = f"<|user|>\nHello<|end|>\n<|assistant|>\n{first}<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n"
    assert second == by_hand(chat, so_far)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


def test_reset_keeps_the_system_message_alone(checkpoint):
    chat = load_chat(str(checkpoint), ChatOptions(max_new_tokens=2, system="Be brief.", device="cpu"))
    chat.answer("Hello")
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(chat, checkpoint, prompt):
    with pytest.raises(ValueError, match="the prompt is empty"):
        chat.answer(prompt)
    with pytest.raises(ValueError, match="the prompt is empty"):
        run_generate(GenerateOptions(model=str(checkpoint), prompt=prompt))
    assert chat.messages == []


def test_a_prompt_beyond_the_trained_length_warns_and_is_not_cut(chat, caplog):
    prompt = "How are you? " * 20
    # The library warns once per process and message, whichever test came before.
    generation.logger.warning_once.__func__.cache_clear()
    answer = chat.answer(prompt)
    assert "max_position_embeddings=64. Nothing is cut off" in caplog.text
    assert answer == by_hand(chat, f"<|user|>\n{prompt}<|end|>\n<|assistant|>\n")


def test_without_a_chat_template_the_prompt_is_continued(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    chat = load_chat(str(folder), ChatOptions(max_new_tokens=6, temperature=0, device="cpu"))
    assert chat.answer("Hello there") == by_hand(chat, "Hello there")
    with pytest.raises(ValueError, match="--system needs a tokenizer with a chat template"):
        load_chat(str(folder), ChatOptions(system="Be brief.", device="cpu"))


def test_the_generation_config_decides_where_nothing_is_asked(checkpoint, tmp_path):
    """A checkpoint that samples by itself: temperature None samples, 0 does not."""
    folder = shutil.copytree(checkpoint, tmp_path / "sampling")
    model = GrinMoeForCausalLM.from_pretrained(folder)
    model.generation_config.do_sample = True
    model.generation_config.save_pretrained(folder)

    def answers(**options) -> set[str]:
        seeds = range(6)
        chats = [
            load_chat(str(folder), ChatOptions(max_new_tokens=6, seed=seed, device="cpu", **options)) for seed in seeds
        ]
        return {chat.answer("Hello") for chat in chats}

    assert len(answers()) > 1
    assert len(answers(temperature=0)) == 1


def test_the_same_seed_samples_the_same_answers(checkpoint):
    options = ChatOptions(max_new_tokens=8, temperature=1.5, seed=3, device="cpu")
    runs = []
    for _ in range(2):
        chat = load_chat(str(checkpoint), options)
        runs.append([chat.answer("Hello"), chat.answer("Hello")])
    assert runs[0] == runs[1]


def test_a_conversation_on_standard_input(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\n/reset\nHello\n/quit\nnever read\n"))
    run_generate(GenerateOptions(model=str(checkpoint), max_new_tokens=6, temperature=0, device="cpu"))
    answers = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(answers) % 2 == 0 and answers[: len(answers) // 2] == answers[len(answers) // 2 :]


def test_the_end_of_standard_input_ends_the_conversation(checkpoint, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    run_generate(GenerateOptions(model=str(checkpoint), device="cpu"))


def test_a_device_that_is_not_there_is_named(checkpoint):
    with pytest.raises(ValueError, match="--device abacus cannot be used here"):
        load_chat(str(checkpoint), ChatOptions(device="abacus"))


def test_a_folder_without_a_tokenizer_says_what_is_missing_before_weights_are_read(checkpoint, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    with pytest.raises(ValueError, match=r"no tokenizer can be loaded from .*; put tokenizer\.json"):
        load_chat(str(folder), ChatOptions(device="cpu"))


def test_no_model_at_all_is_not_the_current_folder(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    with pytest.raises(ValueError, match="--model is empty"):
        load_chat("", ChatOptions(device="cpu"))


def test_bytes_that_are_no_text_are_answered_too(checkpoint, monkeypatch, capsys):
    piped = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", piped)
    run_generate(GenerateOptions(model=str(checkpoint), max_new_tokens=6, temperature=0, device="cpu"))
    assert capsys.readouterr().out.strip()


def test_a_checkpoint_of_another_architecture_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "other")
    config_file = folder / "config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "model_type": "mixtral"}))
    with pytest.raises(ValueError, match="mixtral"):
        load_chat(str(folder), ChatOptions(device="cpu"))


class TestAdapters:
    @pytest.fixture(scope="class")
    def adapter(self, checkpoint, tmp_path_factory):
        from peft import get_peft_model

        from grinmoe.adapters.lora import lora_config

        folder = tmp_path_factory.mktemp("adapter")
        base = GrinMoeForCausalLM.from_pretrained(checkpoint)
        torch.manual_seed(2)
        model = get_peft_model(base, lora_config(base, r=4, init_lora_weights=False))
        model.save_pretrained(folder)
        return folder

    def test_an_adapter_s_folder_answers_as_its_base_with_it(self, adapter, checkpoint, chat):
        from grinmoe.adapters.merge import merge_adapter

        options = ChatOptions(max_new_tokens=6, temperature=0, device="cpu")
        answer = load_chat(str(adapter), options).answer("Hello")
        merged = merge_adapter(adapter, adapter / "merged", base=checkpoint)
        assert answer == load_chat(str(merged), options).answer("Hello") != chat.answer("Hello")

    def test_a_base_that_is_gone_is_named(self, adapter, tmp_path):
        moved = shutil.copytree(adapter, tmp_path / "adapter")
        config = json.loads((moved / "adapter_config.json").read_text())
        (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/nowhere/base"}))
        with pytest.raises(ValueError, match="names /nowhere/base as its base, which is not there"):
            load_chat(str(moved), ChatOptions())
