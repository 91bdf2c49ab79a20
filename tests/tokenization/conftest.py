"""The SentencePiece model that most of these tests begin with, and the tokenizer built from it."""

from __future__ import annotations

import pytest
from sentencepiece import SentencePieceProcessor

from grinmoe.tokenization.build import assemble_tokenizer
from grinmoe.tokenization.sources import read_vocabulary
from tests.tokenization.tokenizer_files import train


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(train())
    return path


@pytest.fixture(scope="module")
def processor(model_file):
    return SentencePieceProcessor(model_file=str(model_file))


@pytest.fixture(scope="module")
def built(model_file):
    return assemble_tokenizer(read_vocabulary(model_file))


@pytest.fixture
def saved(built, tmp_path):
    """The folder of the tokenizer built from SentencePiece."""
    built.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"
