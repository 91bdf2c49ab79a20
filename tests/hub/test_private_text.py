"""Secrets and local paths: found wherever they stand, shown by their first letters only, and not seen where none are."""

from __future__ import annotations

import base64
import json
import random
import re
import shutil
import string
import time
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from grinmoe.hub.checks import ReleaseError, check_files
from grinmoe.hub.private_text import Private, secrets_of_environment
from grinmoe.hub.release import ReleaseOptions, make_release
from grinmoe.hub.secret_formats import FORMATS, SecretFormat
from grinmoe.provenance import markdown_table
from tests import ROOT
from tests.hub.release_folders import SHARDS, edit_json, edit_weights, save_adapter, save_model

LETTERS = string.ascii_letters + string.digits


def made_up(prefix: str, length: int, alphabet: str = LETTERS) -> str:
    """A secret that was never one, so that scanners of source code find none here."""
    return prefix + "".join(random.Random(prefix + str(length)).choices(alphabet, k=length))


HF = made_up("hf_", 34)
HEX = made_up("", 40, "0123456789abcdef")
SECRETS = {
    "Hugging Face": HF,
    "Hugging Face, organization": made_up("api_org_", 34),
    "in a word": f"MY_{HF}_X",
    "OpenAI": made_up("sk-proj-", 60, LETTERS + "_-"),
    "Anthropic": made_up("sk-ant-api03-", 80, LETTERS + "_-"),
    "Google": made_up("AIza", 35),
    "GitHub": made_up("ghp_", 36),
    "GitHub, fine": made_up("github_pat_", 22) + made_up("_", 59),
    "GitLab": made_up("glpat-", 20),
    "Hugging Face, of one letter": "hf_" + "a" * 34,
    "AWS id of the documentation": "AKIAIOSFODNN7" + "EXAMPLE",
    "AWS id": made_up("AKIA", 16, string.ascii_uppercase + string.digits),
    "AWS key": "aws_secret_access_key = " + made_up("", 40, LETTERS + "/+"),
    "AWS key, in JSON": f'"AWS_SECRET_ACCESS_KEY": "{made_up("", 40, LETTERS + "/+")}"',
    "Slack": made_up("xoxb-", 12, string.digits) + made_up("-", 24),
    "PyPI": made_up("pypi-AgEI", 40),
    "npm": made_up("npm_", 36),
    "wandb": f"WANDB_API_KEY={HEX}",
    "wandb, login": f"wandb login --relogin {HEX}",
    "wandb, Python": f'wandb.login(key="{HEX}")',
    "wandb, new": made_up("wandb_v1_", 60),
    "private key": "-----BEGIN OPENSSH PRIVATE " + "KEY-----",
    "PGP": "-----BEGIN PGP PRIVATE " + "KEY BLOCK-----",
    "password": f'"password": "{made_up("", 18)}"',
    "token": f"token: {made_up('', 24)}",
    "API key": f"api-key='{made_up('', 24)}'",
    "header": f"curl -H 'Authorization: Bearer {made_up('', 30)}'",
    "address": f"https://alice:{made_up('', 12)}@example.com/data",
    "address of git": f"git clone https://oauth2:{made_up('', 20)}@gitlab.com/a/b",
    "data base": f"postgresql+psycopg2://alice:{made_up('', 9)}@db.internal:5432/x",
    "signed address": f"https://bucket.s3.amazonaws.com/x?X-Amz-Signature={made_up('', 64, '0123456789abcdef')}",
    "query": f"https://example.com/x?access_token={made_up('', 24)}",
}


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("metadata", [True, False])
def test_secrets_are_found_and_not_shown(kind, metadata):
    secret = SECRETS[kind]
    for line in (secret, f"see {secret}", f'"{secret}",', f"key={secret};", f"(`{secret}`)."):
        found = list(Private().in_text(f"first\n{line}\nlast", metadata))
        assert [finding.line for finding in found] == [2], line
        assert found[0].match in line and "remove it, and revoke it" in found[0].what
        for part in re.findall(r"[\w/+-]{9,}", re.sub(r".*[=:] ?|PRIVATE KEY", "", secret)):
            assert part not in found[0].what, "only the first letters are shown"


UPPER, HEXADECIMAL = string.ascii_uppercase + string.digits, "0123456789abcdef"
BASE64 = LETTERS + "+/"
BODY = made_up("", 40)
# An example for each row of the table in docs/hub.md that is not a prefix and letters.
EXAMPLES = {
    "OpenAI, Anthropic, DeepSeek, OpenRouter": [
        made_up("sk-", 32),
        made_up("sk-or-v1-", 64),
        made_up("sk-ant-admin01-", 93),
    ],
    "Weights & Biases": [made_up("wandb_v1_", 60), f"wandb login {HEX}"],
    "AWS": [made_up(prefix, 16, UPPER) for prefix in ("AKIA", "ASIA", "ABIA", "ACCA")] + [made_up("ABSK", 120)],
    "Azure, keys": [
        f"AccountName=a;AccountKey={made_up('', 86, BASE64)}==;EndpointSuffix=core.windows.net",
        f"Endpoint=sb://a.servicebus.windows.net/;SharedAccessKey={made_up('', 43, BASE64)}=",
        f"{made_up('', 76)}AZDO{made_up('', 4)}",
        f"{made_up('', 52)}JQQJ99{made_up('', 26)}",
        f"{made_up('', 76, BASE64)}+ASt{made_up('', 6, BASE64)}==",
    ],
    "Azure, client secret": [f"{made_up('', 3)}8Q~{made_up('', 34)}"],
    "Cloudflare, origin key": [f"v1.0-{made_up('', 24, HEXADECIMAL)}-{made_up('', 146, HEXADECIMAL)}"],
    "Terraform Cloud": [f"{made_up('', 14)}.atlasv1.{made_up('', 67)}"],
    "Slack": [
        made_up("xoxb-", 50),
        f"xoxe.xoxp-1-{made_up('', 60)}",
        made_up("xapp-1-", 60),
        f"https://hooks.slack.com/services/{made_up('T', 8, UPPER)}/{made_up('B', 8, UPPER)}/{made_up('', 24)}",
        f"https://hooks.slack.com/workflows/{made_up('T', 8, UPPER)}/{made_up('A', 8, UPPER)}/1234567890/{made_up('', 24)}",
    ],
    "Discord": [
        f"https://discord.com/api/webhooks/{made_up('1', 18, string.digits)}/{made_up('', 68)}",
        f"https://discordapp.com/api/v10/webhooks/{made_up('1', 18, string.digits)}/{made_up('', 68)}",
        f"{made_up('MTA5', 22)}.{made_up('G', 5)}.{made_up('', 38)}",
    ],
    "Microsoft Teams, Zapier": [
        f"https://x.webhook.office.com/webhookb2/{made_up('', 36)}@{made_up('', 36)}/IncomingWebhook/{made_up('', 32)}/x",
        "https://hooks.zapier.com/hooks/catch/123456/" + "abcde1",
    ],
    "Telegram": [f"{made_up('1', 9, string.digits)}:AA{made_up('', 33)}"],
    "SendGrid": [f"SG.{made_up('', 22)}.{made_up('', 43)}"],
    "Twilio": [made_up("SK", 32, HEXADECIMAL)],
    "Mailgun, Mailchimp": [
        made_up("key-", 32, HEXADECIMAL),
        f"{made_up('', 32, HEXADECIMAL)}-us12",
        f"{made_up('', 32, HEXADECIMAL)}-{made_up('', 8, HEXADECIMAL)}-{made_up('1', 7, HEXADECIMAL)}",
    ],
    "Resend": [f"re_{made_up('', 8)}_{made_up('', 24)}"],
    "Dynatrace": [f"dt0c01.{made_up('', 24, UPPER)}.{made_up('', 64, UPPER)}"],
    "Airtable": [f"{made_up('pat', 14)}.{made_up('', 64, HEXADECIMAL)}"],
    "JSON Web Token": [f"{made_up('eyJ', 30)}.{made_up('eyJ', 60)}.{made_up('', 43)}"],
    "private key": [
        "-----BEGIN RSA PRIVATE " + "KEY-----",
        "-----BEGIN ENCRYPTED PRIVATE " + "KEY-----",
        "---- BEGIN SSH2 ENCRYPTED PRIVATE " + "KEY ----",
        "-----BEGIN PGP PRIVATE " + "KEY BLOCK-----",
        "PuTTY-User-Key-" + "File-3: ssh-ed25519",
        made_up("AGE-SECRET-" + "KEY-1", 58, UPPER),
        "-----BEGIN OpenVPN Static " + "key V1-----",
        f"PrivateKey = {made_up('', 43, BASE64)}=",
        f"client-key-data: {made_up('LS0t', 80, BASE64)}",
        made_up("b3BlbnNzaC1rZXkt" + "djEAAAAA", 40),
        made_up("LS0tLS1CRUdJTiBS" + "U0EgUFJJVkFURSBLRVkt", 40),
    ],
    "token in a header": [
        f"Authorization: {kind} {made_up('', 30)}" for kind in ("Bearer", "Basic", "token", "ApiKey")
    ],
    "signed address": [
        f"https://a.blob.core.windows.net/c/b?sv=2022-11-02&ss=b&srt=o&sp=r&se=2030&sig={made_up('', 43)}%3D",
        f"https://storage.googleapis.com/x?X-Goog-Signature={made_up('', 64, HEXADECIMAL)}",
        f"https://a.blob.core.windows.net/c/b?sv=1&amp;sig={made_up('', 43)}",
    ],
    "key or password by its name": [
        f"{name}={made_up('', 24)}"
        for name in (
            "DB_PASSWORD",
            "client_secret",
            "private-key",
            "AccountKey",
            "pwd",
            "EXAMPLE_TOKEN",
            "//r/:_authToken",
        )
    ],
    "password of a connection": ["Server=db.example.com;Database=x;User Id=a;Password=hunter2;"],
    "password of .netrc": ["machine example.com login me password hunter2"],
    "password of a container registry": [f'"auth": "{made_up("", 31)}="'],
    "credentials in an address": ["redis://:hunter2@cache:6379", "mongodb+srv://me:hunter2@db.mongodb.net"],
}


def examples(form: SecretFormat) -> list[str]:
    """Those above; of prefixes and letters as few letters as there are."""
    if form.issuer in EXAMPLES:
        return EXAMPLES[form.issuer]
    prefixes, least, letters = re.fullmatch(r"(.+), then (\d+)(?: or more)? of `(.+)`", form.form).groups()
    alphabet = "".join(chr(code) for code in range(33, 127) if re.fullmatch(f"[{letters}]", chr(code)))
    alphabet = "".join(letter for letter in alphabet if letter.isalnum())
    return [made_up(prefix, int(least), alphabet) for prefix in re.findall(r"`([^`]+)`", prefixes)]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.issuer)
def test_every_documented_format_is_found_wherever_it_stands(form):
    for secret in examples(form):
        assert form.pattern.search(secret) and (not form.hints or any(hint in secret.lower() for hint in form.hints))
        for line in (
            secret,
            f"see {secret} there",
            f"`{secret}`",
            f"x = '{secret}'",
            f"<a>{secret}</a>",
            f"# {secret}",
        ):
            for text in (line, json.dumps(line), json.dumps(line).replace(secret[2], f"\\u{ord(secret[2]):04x}")):
                found = list(Private().in_text(f"first\n{text}\nlast"))
                assert {finding.line for finding in found} == {2}, text
                assert all(secret[8:] not in finding.what for finding in found)


def test_secrets_in_base64_and_escapes_are_found():
    for text in (
        base64.b64encode(f"token: {HF} ".encode()).decode(),
        base64.urlsafe_b64encode(f"?? {HF} ~~".encode()).decode().rstrip("="),
        "".join(f"\\u{ord(letter):04x}" for letter in HF),
        "".join(f"%{ord(letter):02X}" for letter in HF),
        "".join(f"&#{ord(letter)};" for letter in HF),
        "machine example.com\n  login me\n\tpassword hunter2\n",
    ):
        (found,) = Private().in_text(f"first\n{text}")
        assert found.line == 2 and HF not in found.what


def test_documentation_lists_every_format():
    documented = (ROOT / "docs" / "hub.md").read_text()
    assert markdown_table(["secret", "form"], [[form.issuer, form.form] for form in FORMATS]).strip() in documented


def test_files_of_this_project_have_nothing_private():
    files = [
        *ROOT.glob("grinmoe/**/*.md"),
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("*_grinmoe.py"),
        ROOT / "README.md",
    ]
    for file in files:
        found = [finding for finding in Private().in_text(file.read_text()) if not finding.what.startswith("a path")]
        assert found == [], file


PATHS_IN_METADATA = [
    '"_name_or_path": "/tmp/tmp1a2b3c/model"',
    '"base_model_name_or_path": "/root/checkpoints/base"',
    '"data": "/data/corpus/train.jsonl"',
    '"x": "/workspace/run/out"',
    '"x": "~/models/base"',
    '"x": "../base"',
    '"x": "./output/checkpoint-500"',
    '"x": "file:///data/x"',
    '"x": "C:\\\\Users\\\\alice\\\\model"',
    '"x": "D:/models/base/x"',
    '"notes": "first\\n/data/second/line"',
    "base_model: /opt/models/base",
    "- base_model:adapter:/tmp/hub/base",
]
PATHS_ANYWHERE = [
    "trained in /home/alice/run-3",
    "- /Users/alice/data/set.jsonl",
    "(/mnt/data/corpus)",
    "`/scratch/project/x`",
    "rsync host:/home/alice/x .",
    "path=/lustre/alice/x",
    "file:///home/alice/x.txt",
    r"C:\Users\alice\model",
    "c:/Users/alice/model",
    "--output /gpfs/home/alice",
    "from /home/user/checkpoints/run3",
    "in /root/model",
    "at /workspace/run1/model",
    "see /storage/home/bob/x",
]


@pytest.mark.parametrize("line", PATHS_IN_METADATA + PATHS_ANYWHERE)
def test_paths_in_metadata(line):
    found = list(Private().in_text(f"{{\n  {line}\n}}", metadata=True))
    assert [finding.line for finding in found] == [2] and "a path of this machine (" in found[0].what
    # The block at the top of a card is metadata.
    card = list(Private().in_text(f"---\nlicense: mit\n{line}\n---\n# A model\n"))
    assert [finding.line for finding in card] == [3]


@pytest.mark.parametrize("line", PATHS_ANYWHERE)
def test_paths_in_prose(line):
    found = list(Private().in_text(f"# A model\n\n{line}\n"))
    assert [finding.line for finding in found] == [3]


ORDINARY = """# A model

See https://example.com/home/x and http://localhost:8000/Users/x, or [the paper](https://arxiv.org/abs/2409.12136).

```bash
pip install --upgrade 'grinmoe[train]' && cd /path/to/model
docker run -v ~/.cache/huggingface:/root/.cache/huggingface -v $HOME/data:/workspace vllm/vllm-openai --model me/model
export HF_TOKEN=hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx OPENAI_API_KEY="your-api-key-goes-here-123"
export AWS_ACCESS_KEY_ID=your-key
python train.py --output /tmp/out --data ./data/train.jsonl --log /home/user/log
git clone https://username:password@github.com/me/model; curl -H "Authorization: Bearer $HF_TOKEN" https://x.org
```

Everything under /tmp is lost, and/or is kept in /home. The config has `"eos_token": "<|endoftext|>"`, `pad_token_id: 32000`.

```python
model = AutoModelForCausalLM.from_pretrained("me/model", token=os.environ["HF_TOKEN"], api_key=get_api_key_from_vault())
client = OpenAI(api_key="EMPTY", base_url="http://localhost:8000/v1")  # sk-learn-like-interfaces-are-not-keys
tokens: 4096, token = tokenizer.eos_token, password = getpass.getpass("Password for the data base: ")
```

| tokens | 32_064 | sha256 | 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0bdeadbeef0123456789ab |
commit 4f1b2b0bdeadbeef0123456789ab0123456789ab of wandb, task-specific-models-with-1-billion-parameters
C:\\ is a drive, A:\\ too; a ratio of 3:/4, s/home/job/, ${ROOT}/home/x, <root>/mnt/x, ../home/x
<user>:<token>@host, ssh://git@github.com/me/x, mailto:me@example.com, https://host/a:b@c
"""


def test_an_ordinary_card_has_nothing_private():
    assert list(Private(secrets_of_environment()).in_text(ORDINARY)) == []


@pytest.mark.parametrize(
    "line",
    [
        '"license_link": "https://example.com/home/x/LICENSE"',
        '"chat_template": "{% if x %}{{ \'\\n/no_think\' }}</think>{% endif %} and/or, <|a|>/<|b|>"',
        '"modeling_grinmoe.GrinMoeModel": "1/2", "pattern": ".*/q_proj", "q": "(a|b)/c"',
        '"eos_token": "<|endoftext|>", "tokenizer_class": "TokenizersBackend", "token_type_ids": "1234567890abcdefgh"',
        '"template": "A:\\nB:\\n{{ C }}"',
    ],
)
def test_ordinary_metadata_has_nothing_private(line):
    assert list(Private().in_text(f"{{\n{line}\n}}", metadata=True)) == []


def test_long_lines_take_no_time():
    """A picture in a card is one line of base64; patterns must not look at it from every letter to every other."""
    text = made_up("", 300_000, LETTERS + "_-") + "\n" + "a." * 100_000 + "\n" + "/a" * 100_000 + "a_" * 100_000
    start = time.perf_counter()
    list(Private().in_text(text, metadata=True))
    assert time.perf_counter() - start < 10, "0.4 s alone; minutes if it did"


def test_exact_secrets_and_paths():
    private = Private({"the token in use": "not-like-a-token"}, ("/srv/models/mine",))
    text = "say not-like-a-token\nin /srv/models/mine/config.json.\n/srv/models/mine2 https://x.org/srv/models/mine"
    secret, path = private.in_text(text)
    assert (secret.line, path.line) == (1, 2)
    assert secret.what.startswith("the token in use (not-li...)") and "(/srv/models/mine/config.json.)" in path.what
    assert list(private.in_bytes(b"\x00not-like-a-token\x00")) == ["the token in use"]
    assert list(private.in_bytes(b"\xff /srv/models/mine\x00")) == ["a path of this machine (/srv/models/mine)"]
    assert list(private.in_bytes(b"/srv/models/mine2 not-like")) == []


def test_secrets_of_the_environment(monkeypatch):
    value = made_up("", 32)
    for name, setting in {
        "MY_API_KEY": value,
        "GITHUB_TOKEN": value[::-1],
        "KEYBOARD": value,
        "A_KEY": "short1",
        "SSH_KEY": f"/home/alice/{value}",
        "B_TOKEN": "only-letters-and-hyphens",
    }.items():
        monkeypatch.setenv(name, setting)
    found = secrets_of_environment()
    assert found["the value of MY_API_KEY"] == value and found["the value of GITHUB_TOKEN"] == value[::-1]
    assert not {f"the value of {name}" for name in ("KEYBOARD", "A_KEY", "SSH_KEY", "B_TOKEN")} & found.keys()


# ---- in the files of a release


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    save_adapter(root / "adapter", save_model(root / "model"))
    edit_json(root / "adapter" / "adapter_config.json", base_model_name_or_path="me/base")
    (root / "adapter" / "README.md").write_text("---\nlicense: mit\nbase_model: me/base\n---\n# An adapter\n")
    return root


def refusal(source: Path, tmp_path: Path) -> str:
    folder = tmp_path / "release"
    folder.mkdir()
    with pytest.raises(ReleaseError) as raised:
        make_release(source, folder, "me/model", ReleaseOptions(load_check=False))
    return str(raised.value)


def add_to_card(source: Path, text: str) -> None:
    card = source / "README.md"
    card.write_text(f"{card.read_text()}{text}\n")


PLACES = {
    "README.md": ("model", lambda source, text: add_to_card(source, text), "README.md, line 10: "),
    "config.json": (
        "model",
        lambda source, text: edit_json(source / "config.json", aaa_comment=text),
        "config.json, line 49: ",
    ),
    "tokenizer_config.json": (
        "model",
        lambda source, text: edit_json(source / "tokenizer_config.json", comment=text),
        "tokenizer_config.json, line ",
    ),
    "generation_config.json": (
        "model",
        lambda source, text: edit_json(source / "generation_config.json", comment=text),
        "generation_config.json, line ",
    ),
    "adapter_config.json": (
        "adapter",
        lambda source, text: edit_json(source / "adapter_config.json", comment=text),
        "adapter_config.json, line ",
    ),
    "shard": (
        "model",
        lambda source, text: edit_weights(source / SHARDS[1], metadata={"comment": text}),
        f"the metadata of {SHARDS[1]}: ",
    ),
    "adapter": (
        "adapter",
        lambda source, text: edit_weights(source / "adapter_model.safetensors", metadata={"comment": text}),
        "the metadata of adapter_model.safetensors: ",
    ),
    "licence": ("model", lambda source, text: (source / "LICENSE").write_text(text), "LICENSE, line 1: "),
}


@pytest.mark.parametrize(
    "place, text",
    [(place, text) for place in PLACES for text in (HF, "/home/alice/models/base")]
    # In prose this is anybody's.
    + [(place, "/tmp/x/base") for place in PLACES if place not in ("README.md", "licence")],
)
def test_file_and_line_are_named(saved, tmp_path, place, text):
    kind, change, where = PLACES[place]
    source = shutil.copytree(saved / kind, tmp_path / kind)
    change(source, text)
    said = refusal(source, tmp_path)
    assert where in said and said.count("remove it") == 1
    assert HF not in said and ("hf_" in said) == (text == HF)
    if match := re.search(r"line (\d+)", said):
        file = source / ("LICENSE" if place == "licence" else place)
        assert text in file.read_text().split("\n")[int(match[1]) - 1], "the line of the file that the user has"


def test_the_token_in_use_and_this_machine_are_found_in_every_file(saved, tmp_path, hub):
    """Also where nothing looks like a secret: in vocabularies and pictures only what is known is looked for."""
    source = shutil.copytree(saved / "model", tmp_path / "model")
    tokenizer = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").write_text(tokenizer.replace("<0xFE>", "hf_writer"))
    (source / "training.png").write_bytes((source / "training.png").read_bytes() + str(source).encode())
    add_to_card(source, f"of {source}/x")
    said = refusal(source, tmp_path)
    assert "tokenizer.json: the token in use; remove it" in said
    assert f"training.png: a path of this machine ({source})" in said
    assert f"README.md, line 10: a path of this machine ({source}/x)" in said


def test_a_long_list_is_cut(saved, tmp_path):
    source = shutil.copytree(saved / "model", tmp_path / "model")
    add_to_card(source, "\n".join(f"/home/alice/{number}" for number in range(30)))
    said = refusal(source, tmp_path)
    assert said.count("a path of this machine") == 10 and said.endswith("; and 20 more")


def test_a_vocabulary_may_hold_anything(tmp_path):
    """It is of the training corpus, where paths, keys and tokens of other people stand."""
    words = " ".join(topics.values()).split()
    words += [HF, "/home/alice/x", *SECRETS.values()]
    vocab = {word: number for number, word in enumerate(dict.fromkeys(words))}
    content = {"model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=1))
    check_files(tmp_path, ["tokenizer.json"], Private({"the token in use": "hf_writer-of-tests"}, ("/srv/models",)))
