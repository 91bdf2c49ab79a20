"""The right tokenizer class, however a checkpoint is loaded; a wrong one, or one of another model, is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    TokenizersBackend,
)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

import grinmoe
from grinmoe import GrinMoeConfig, GrinMoeForCausalLM, TokenizerError, load_tokenizer
from grinmoe.checkpoint_grinmoe import add_remote_code
from grinmoe.tokenization import build_tokenizer, chat_template, check_tokenizer
from grinmoe.tokenization.template import with_marks
from tests import ROOT
from tests.remote_code.test_remote_code import run_without_package
from tests.tokenization.test_chat_template import RELEASED

TEXT = ["Hello there, how are you today?", "The quick brown fox jumps.", "two  spaces\nand lines"] * 20
STRINGS = [
    "Hello",
    " Hello",
    "<|user|>\nHello<|end|>\n<|assistant|>\n",
    "x</s> y",
    "a<|end|> b",
    "Zoë 😀\t",
    "<s>Hello",
    "",
]

SHARED = ROOT.parent / "shared" / "tokenizer"
with_the_real_tokenizer = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the family's own tokenizer (1.8 MB, and its vectors) is not kept in this repository"
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TEXT, vocab_size=400)


def as_released(folder: Path, tokenizer_files: Path, vocab_size: int) -> Path:
    """A folder as the released one: LlamaTokenizer named, the template inside the config, no generation marks."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(tokenizer_files / "tokenizer.json", folder / "tokenizer.json")
    settings = json.loads((tokenizer_files / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "LlamaTokenizer", "chat_template": RELEASED}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = {
        "model_type": "grinmoe",
        "architectures": ["GRIN-MoE"],
        "vocab_size": vocab_size,
        "auto_map": {"AutoConfig": "configuration_grinmoe.GRINMoEConfig"},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """A checkpoint's small files as we write them."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(folder)
    GrinMoeConfig(vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def released(saved, tokenizer, tmp_path_factory):
    return as_released(tmp_path_factory.mktemp("released"), saved, len(tokenizer))


def ids(tokenizer) -> list[list[int]]:
    return [tokenizer(text).input_ids for text in STRINGS]


class TestAutoTokenizer:
    def test_is_right_for_a_checkpoint_that_we_wrote_and_for_the_released_one(self, tokenizer, saved, released):
        for folder in (saved, released):
            loaded = AutoTokenizer.from_pretrained(folder)
            assert type(loaded) is TokenizersBackend
            assert ids(loaded) == ids(tokenizer)

    def test_the_table_that_decides_is_where_it_was(self, tokenizer, released, monkeypatch):
        """If this fails the library has changed: look for its new table, or take our entry away if it is not needed."""
        assert TOKENIZER_MAPPING_NAMES["grinmoe"] == "TokenizersBackend"
        monkeypatch.delitem(TOKENIZER_MAPPING_NAMES, "grinmoe")
        loaded = AutoTokenizer.from_pretrained(released)
        assert isinstance(loaded, LlamaTokenizer), "without our entry the released checkpoint is read by this class"
        assert ids(loaded) != ids(tokenizer)

    def test_a_checkpoint_that_we_wrote_does_not_need_the_table(self, tokenizer, saved, monkeypatch):
        monkeypatch.delitem(TOKENIZER_MAPPING_NAMES, "grinmoe")
        assert ids(AutoTokenizer.from_pretrained(saved)) == ids(tokenizer)

    @pytest.mark.integration
    def test_is_right_without_the_package_too(self, tokenizer, saved, released, tmp_path):
        """The checkpoint's own configuration file makes the entry: with our files over a released snapshot."""
        folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in (saved, released)]
        for folder in folders:
            add_remote_code(folder)
        script = """
            import json
            from transformers import AutoTokenizer
            folders, strings = sys.argv[1:3], json.loads(sys.argv[3])
            loaded = [AutoTokenizer.from_pretrained(folder, trust_remote_code=True) for folder in folders]
            print(json.dumps([[tokenizer(text).input_ids for text in strings] for tokenizer in loaded]))
        """
        found = run_without_package(script, tmp_path, *map(str, folders), json.dumps(STRINGS))
        assert found == [ids(tokenizer)] * 2

    def test_saving_and_loading_again_changes_nothing(self, saved, released, tmp_path):
        for folder in (saved, released):
            AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
            again, before = (json.loads((f / "tokenizer.json").read_text()) for f in (tmp_path, saved))
            assert again == before
            assert (
                json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
            )


class TestLoadTokenizer:
    def test_always_gives_the_right_class(self, tokenizer, saved, released):
        for folder in (saved, str(released)):
            loaded = load_tokenizer(folder)
            assert type(loaded) is TokenizersBackend and ids(loaded) == ids(tokenizer)

    def test_the_released_template_becomes_the_one_with_marks(self, released):
        assert load_tokenizer(released).chat_template == chat_template()

    @pytest.mark.parametrize(
        "own",
        [RELEASED.replace("<|end|>\n", "<|end|>"), "{% if tools %}{{ tools }}{% endif %}" + RELEASED],
        ids=["renders otherwise", "can do more"],
    )
    def test_a_template_of_ones_own_is_kept(self, released, tmp_path, own):
        folder = shutil.copytree(released, tmp_path / "own")
        (folder / "chat_template.jinja").write_text(own)
        assert load_tokenizer(folder).chat_template == own

    def test_several_templates_stay_several(self, released):
        tokenizer = load_tokenizer(released)
        tokenizer.chat_template = {"default": RELEASED, "rag": "{{ documents }}"}
        assert with_marks(tokenizer.chat_template) == {"default": chat_template(), "rag": "{{ documents }}"}
        assert load_tokenizer(released, chat_template=RELEASED).chat_template == RELEASED, "as it was asked for"

    def test_arguments_of_from_pretrained_are_passed_on(self, saved, tmp_path):
        shutil.copytree(saved, tmp_path / "inner")
        assert load_tokenizer(tmp_path, subfolder="inner", padding_side="right").padding_side == "right"

    def test_a_tokenizer_of_another_family_is_loaded_as_it_is(self, tiny_tokenizer_folder):
        assert load_tokenizer(tiny_tokenizer_folder)("aaa").input_ids

    @pytest.mark.parametrize("content", ['{"version":', '{"version": "1.0"}', ""], ids=["cut", "another file", "empty"])
    def test_a_broken_file(self, saved, tmp_path, content):
        folder = shutil.copytree(saved, tmp_path / "broken")
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(TokenizerError, match=r"no tokenizer can be loaded from .*broken'; put tokenizer\.json"):
            load_tokenizer(folder)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(TokenizerError, match="put tokenizer.json .* there"):
            load_tokenizer(tmp_path)
        with pytest.raises(TokenizerError, match="check the name of the folder or Hub repository"):
            load_tokenizer(tmp_path / "nowhere")

    def test_ids_beyond_the_models_vocabulary(self, saved, tokenizer, tmp_path):
        folder = shutil.copytree(saved, tmp_path / "other")
        GrinMoeConfig(vocab_size=len(tokenizer) - 1).save_pretrained(folder)
        last = len(tokenizer) - 1
        says = rf"ids up to {last} \('<\|user\|>'\), the model's vocab_size is {last}; take the model's own"
        with pytest.raises(TokenizerError, match=says):
            load_tokenizer(folder)

    def test_a_file_that_the_wrong_class_has_saved(self, released, tmp_path, monkeypatch):
        """What happens to people: load by AutoTokenizer without us, fine-tune, save. The ids are wrong for good."""
        monkeypatch.delitem(TOKENIZER_MAPPING_NAMES, "grinmoe")
        AutoTokenizer.from_pretrained(released).save_pretrained(tmp_path)
        monkeypatch.undo()
        with pytest.raises(
            TokenizerError,
            match=r"is not the family's any more \(another tokenizer class rewrites it .* grinmoe tokenizer build",
        ):
            load_tokenizer(tmp_path)


def changed(saved: Path, folder: Path, change) -> Path:
    """A copy of the folder with a change made to the content of its tokenizer.json."""
    shutil.copytree(saved, folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


class TestCheckTokenizer:
    @pytest.mark.parametrize(
        "wrong_class, options",
        [
            (LlamaTokenizer, {}),
            (LlamaTokenizer, {"legacy": True}),
            (LlamaTokenizer, {"add_prefix_space": False}),
            (GPT2Tokenizer, {}),
            (GemmaTokenizer, {}),
        ],
        ids=["Llama", "Llama legacy", "Llama without space", "GPT2", "Gemma"],
    )
    def test_a_wrong_class_is_named(self, released, wrong_class, options):
        wrong = wrong_class.from_pretrained(released, **options)
        says = f"is a {wrong_class.__name__}, which does not do what its tokenizer.json says: .*grinmoe.load_tokenizer"
        with pytest.raises(TokenizerError, match=says):
            check_tokenizer(wrong)

    @pytest.mark.parametrize(
        "change",
        [
            lambda content: content.update(normalizer=None),
            lambda content: content.update(normalizer=content["normalizer"]["normalizers"][0]),
            lambda content: content.update(normalizer=content["normalizer"]["normalizers"][1]),
            lambda content: content.update(
                normalizer=None,
                pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False},
            ),
            lambda content: content["model"].update(merges=[]),
            lambda content: content["model"].update(byte_fallback=False),
            lambda content: content.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
                }
            ),
        ],
        ids=["no normaliser", "space in front only", "spaces only", "Metaspace", "no merges", "no bytes", "BOS"],
    )
    def test_a_lost_rule_is_found_by_what_it_does(self, saved, tmp_path, change):
        folder = changed(saved, tmp_path / "lost", change)
        with pytest.raises(TokenizerError, match="is not the family's any more .*grinmoe tokenizer build"):
            load_tokenizer(folder)
        assert load_tokenizer(folder, check=False)("Hello").input_ids is not None

    @pytest.mark.parametrize("end", [None, "</s>"])
    def test_another_end_of_text(self, saved, tmp_path, end):
        folder = shutil.copytree(saved, tmp_path / "end")
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": end}))
        with pytest.raises(TokenizerError, match=rf"eos_token is {end!r}, the family's is '<\|endoftext\|>'"):
            load_tokenizer(folder)

    def test_a_tokenizer_of_another_kind_needs_the_tokens_that_its_template_writes_and_no_rule(
        self, tiny_tokenizer_folder
    ):
        other = load_tokenizer(tiny_tokenizer_folder)
        other.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
        other.chat_template = "<|user|>{{ messages[0]['content'] }}<|assistant|>"
        check_tokenizer(other)
        other.chat_template += "<|end|>"
        with pytest.raises(TokenizerError, match=r"lacks the special tokens <\|end\|>"):
            check_tokenizer(other)

    def test_missing_special_tokens_are_listed(self, saved, tmp_path):
        folder = shutil.copytree(saved, tmp_path / "fewer")
        text = (folder / "tokenizer.json").read_text()
        for gone, other in (("<|end|>", "<|fin|>"), ("<|system|>", "<|sys|>")):
            text = text.replace(gone, other)
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(TokenizerError, match=r"lacks the special tokens <\|system\|>, <\|end\|>, which its chats"):
            load_tokenizer(folder)

    def test_a_special_token_that_is_taken_apart(self, saved, tmp_path):
        folder = shutil.copytree(saved, tmp_path / "apart")
        content = json.loads((folder / "tokenizer.json").read_text())
        content["model"]["vocab"]["<|end|>"] = len(content["model"]["vocab"])
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|end|>"]
        backend = Tokenizer.from_str(json.dumps(content))
        loaded = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
        with pytest.raises(TokenizerError, match=r"takes <\|end\|> apart, into"):
            check_tokenizer(loaded)


@with_the_real_tokenizer
class TestTheFamilysOwn:
    @pytest.fixture(scope="class")
    def vectors(self):
        content = json.loads((SHARED / "vectors" / "expected_transformers_4.44.2.json").read_text(encoding="utf-8"))
        return {
            text: expected for text, expected in content.items() if isinstance(expected, list) and text != "TPL_ids"
        }

    @pytest.fixture(scope="class")
    def release(self, tmp_path_factory):
        return as_released(tmp_path_factory.mktemp("real"), SHARED / "grinmoe", 32064)

    @pytest.fixture(scope="class")
    def written(self, release, tmp_path_factory):
        """A checkpoint that we wrote: a small model of the real vocabulary, with the tokenizer of the released files."""
        folder = tmp_path_factory.mktemp("written")
        config = GrinMoeConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            num_local_experts=2,
            vocab_size=32064,
        )
        GrinMoeForCausalLM(config).save_pretrained(folder)
        load_tokenizer(release).save_pretrained(folder)
        return folder

    def test_vectors_by_the_loader_on_the_released_files(self, release, vectors):
        loaded = load_tokenizer(release)
        assert len(vectors) == 14 and {text: loaded(text).input_ids for text in vectors} == vectors

    def test_vectors_by_auto_tokenizer(self, written, release, vectors):
        for folder in (written, release):
            loaded = AutoTokenizer.from_pretrained(folder)
            assert {text: loaded(text).input_ids for text in vectors} == vectors

    def test_vectors_by_auto_tokenizer_without_the_package(self, written, vectors, tmp_path):
        script = """
            import json
            from transformers import AutoTokenizer
            tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
            print(json.dumps({text: tokenizer(text).input_ids for text in json.loads(sys.argv[2])}))
        """
        assert run_without_package(script, tmp_path, str(written), json.dumps(list(vectors))) == vectors

    def test_template_and_decoding(self, written):
        expected = json.loads((SHARED / "vectors" / "expected_transformers_4.44.2.json").read_text(encoding="utf-8"))
        loaded = AutoTokenizer.from_pretrained(written)
        messages = [
            {"role": "system", "content": "You are a helpful AI assistant."},
            {"role": "user", "content": " Hi\n"},
            {"role": "assistant", "content": "Yo"},
        ]
        for key, generate in (("TPL_gen", True), ("TPL_nogen", False)):
            rendered = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
            assert rendered == expected[key]
        encoded = loaded.apply_chat_template(messages, add_generation_prompt=True)
        assert encoded["input_ids"] == expected["TPL_ids"]
        assert loaded.decode(loaded("<|user|>\nHello<|end|>\n<|assistant|>\n").input_ids) == expected["dec"]
        assert loaded.decode(loaded("Hello  world \n x").input_ids) == expected["dec2"]


def test_the_package_exports_the_loader():
    assert grinmoe.load_tokenizer is load_tokenizer and "load_tokenizer" in grinmoe.__all__


def test_a_library_without_the_table_is_said(monkeypatch, caplog):
    """It must not stop the model from loading; but the trap is open again, so it is said."""
    from grinmoe import configuration_grinmoe

    monkeypatch.delattr("transformers.models.auto.tokenization_auto.TOKENIZER_MAPPING_NAMES")
    monkeypatch.setattr(configuration_grinmoe.logger, "propagate", True)
    configuration_grinmoe._register_tokenizer_class()
    assert "load tokenizers with grinmoe.load_tokenizer" in caplog.text
