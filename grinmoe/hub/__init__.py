"""Checkpoints to and from the Hub: release checks, push, pull and model cards."""

from .card import CARD_NAME, CardOverrides, card_for
from .card_facts import CardFacts, Evaluation, metric_name
from .checks import ReleaseError
from .download import pull
from .errors import HubError
from .isolated_load import load_elsewhere
from .publish import PushOptions, push
from .release import ReleaseOptions

__all__ = [
    "CARD_NAME",
    "CardFacts",
    "CardOverrides",
    "Evaluation",
    "HubError",
    "PushOptions",
    "ReleaseError",
    "ReleaseOptions",
    "card_for",
    "load_elsewhere",
    "metric_name",
    "pull",
    "push",
]
