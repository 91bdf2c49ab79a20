"""`grinmoe demo`: the whole job at small size, and the texts that every installation has."""

from .chat_corpus import load_corpus, texts, write_examples
from .demo import DemoSettings, demo_config, run_demo
from .docstring_corpus import Document, documents_of_file, installed_documentation
from .options import DemoOptions
