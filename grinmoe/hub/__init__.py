"""Checkpoints to and from the Hub: release checks, push, pull and model cards."""

from .card import card_for
from .card_facts import CardFacts, Evaluation, metric_name
from .checks import ReleaseError
from .download import pull, run_pull
from .errors import HubError
from .isolated_load import load_elsewhere, logits_without_the_package
from .options import CardOverrides, PullOptions, PushOptions, ReleaseOptions
from .publish import push
from .readme import CARD_NAME
