"""Rows of chats, prompts, texts and preferences, read, checked and packed into batches."""

from .dataset import DataOptions, PreparedData, held_out, load_data, pair_ids
from .formats import Columns, Message, check_columns, checked_messages, checked_text, checked_turns, continued
from .packing import RowCollator
from .sources import SUFFIXES, read_rows
