"""GRIN-MoE for Hugging Face Transformers.

Importing this package registers the model: from then on `AutoModelForCausalLM.from_pretrained` loads GRIN-MoE
checkpoints, the released one included, without `trust_remote_code`, and `AutoTokenizer` gives their tokenizers the right
class.
"""

from importlib.metadata import PackageNotFoundError, version

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from . import kernels as kernels  # registers them
from .balance_grinmoe import load_balancing_loss
from .checkpoint_grinmoe import CheckpointError, CheckpointFileError
from .configuration_grinmoe import GRINMoEConfig, GrinMoeConfig
from .modeling_grinmoe import (
    GRINMoEForCausalLM,
    GrinMoeForCausalLM,
    GrinMoeForSequenceClassification,
    GrinMoeModel,
    GrinMoePreTrainedModel,
)
from .routing_grinmoe import RoutingNoise, sparsemixer
from .tokenization import TokenizerError, load_tokenizer

try:
    __version__ = version("grinmoe")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

# exist_ok: a second import under another name must not fail.
AutoConfig.register(GrinMoeConfig.model_type, GrinMoeConfig, exist_ok=True)
AutoModel.register(GrinMoeConfig, GrinMoeModel, exist_ok=True)
AutoModelForCausalLM.register(GrinMoeConfig, GrinMoeForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(GrinMoeConfig, GrinMoeForSequenceClassification, exist_ok=True)

__all__ = [
    "CheckpointError",
    "CheckpointFileError",
    "GRINMoEConfig",
    "GRINMoEForCausalLM",
    "GrinMoeConfig",
    "GrinMoeForCausalLM",
    "GrinMoeForSequenceClassification",
    "GrinMoeModel",
    "GrinMoePreTrainedModel",
    "RoutingNoise",
    "TokenizerError",
    "__version__",
    "load_balancing_loss",
    "load_tokenizer",
    "sparsemixer",
]
