"""Reading and writing GRIN-MoE checkpoints: checked before they are read, replaced only when they are whole.

The format is sharded safetensors in the official layout (`layout_grinmoe.py`) with the flat code beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from .configuration_grinmoe import AUTO_MAP, GrinMoeConfig
from .layout_grinmoe import can_alias, fused_name, fused_shapes, official_shapes, official_state_dict, stale_weights
from .quantization_grinmoe import experts_are_quantized, is_bitsandbytes, packed_layout
from .upload_grinmoe import upload_checkpoint


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint that cannot be used: unreadable, incomplete, or not of this model.

    A RuntimeError as well, because that is what Transformers raises for tensors that do not fit.
    """


class CheckpointFileError(CheckpointError, OSError):
    """A file of the checkpoint is missing, truncated or of a refused kind. An OSError, as in Transformers."""


def read_shapes(folder: str | os.PathLike) -> dict[str, tuple[int, ...]] | None:
    """Shapes of all tensors of a local checkpoint, read from the shards' headers only.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and its shards.

    Returns:
        Shape by key, or None if the folder holds no weights at all.

    Raises:
        CheckpointFileError: only pickled weights are there; the index names a missing file; a shard is truncated or not
            safetensors; a shard lacks a tensor that the index promises.
    """
    folder = Path(folder)
    index_file, single_file = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if single_file.is_file():
        return _read_header(single_file)
    if not index_file.is_file():
        pickles = [name for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if (folder / name).is_file()]
        if pickles:
            raise CheckpointFileError(
                f"{folder} holds only pickled weights ({pickles[0]}), which can run code when they are loaded and are "
                "refused; convert them to safetensors first (safetensors.torch.save_file)"
            )
        return None
    try:
        weight_map = dict(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"])
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError, ValueError) as error:
        raise CheckpointFileError(f"{index_file} is not a safetensors index ({error!r}); download it again") from error
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in sorted(set(weight_map.values())):
        promised = {key for key, file in weight_map.items() if file == shard}
        if not (folder / shard).is_file():
            raise CheckpointFileError(
                f"{index_file} places {len(promised)} tensors in {shard}, which is not there; download that shard again"
            )
        header = _read_header(folder / shard)
        if absent := promised - header.keys():
            raise CheckpointFileError(
                f"{folder / shard} lacks {len(absent)} tensors that the index promises, {min(absent)} for one; the "
                "shard and the index are of different checkpoints: download both again"
            )
        shapes |= header
    return shapes


def check_weights(
    shapes: dict[str, tuple[int, ...]],
    config: GrinMoeConfig,
    folder: str | os.PathLike,
    head_keys: tuple[str, ...] = (),
) -> None:
    """`check_shapes`, or `check_quantized_shapes` where the config says so; another library's quantisation is let pass."""
    quantization_config = getattr(config, "quantization_config", None)
    if quantization_config is None:
        check_shapes(shapes, config, folder, head_keys)
    elif is_bitsandbytes(quantization_config):
        check_quantized_shapes(shapes, config, folder, head_keys)


def check_shapes(
    shapes: dict[str, tuple[int, ...]],
    config: GrinMoeConfig,
    folder: str | os.PathLike,
    head_keys: tuple[str, ...] = (),
) -> None:
    """
    Hold a checkpoint's tensors against the config.

    Args:
        shapes: by key, from `read_shapes`. Keys of a headless model may lack the `model.` prefix.
        config: what the checkpoint claims to be.
        folder: for the message.
        head_keys: prefixes of further heads whose tensors are not checked.

    Raises:
        CheckpointError: an unknown key, a tensor of the wrong shape, or a weight of the network that is not there.
    """
    official = official_shapes(config)
    fused = fused_shapes(config)
    expected = official | fused
    names = {key if key in expected else f"model.{key}" for key in shapes}
    for key, shape in shapes.items():
        name = key if key in expected else f"model.{key}"
        if name not in expected:
            if key.startswith(head_keys):
                continue
            raise CheckpointError(
                f"{folder} holds {key}, which is no weight of this config (num_hidden_layers={config.num_hidden_layers}, "
                f"num_local_experts={config.num_local_experts}, attention_bias={config.attention_bias}, "
                f"lm_head_bias={config.lm_head_bias}); the shards and config.json do not belong together"
            )
        if shape != expected[name]:
            raise CheckpointError(
                f"{folder} holds {key} with shape {shape}, config.json makes it {expected[name]}; use the config that "
                "the weights were saved with, or pass ignore_mismatched_sizes=True to initialise it anew"
            )
    missing = [key for key in official if key not in names and fused_name(key) not in names]
    if message := describe_missing(missing, head_prefixes=("lm_head.", *head_keys)):
        raise CheckpointError(f"{folder}: {message}")


def check_quantized_shapes(
    shapes: dict[str, tuple[int, ...]],
    config: GrinMoeConfig,
    folder: str | os.PathLike,
    head_keys: tuple[str, ...] = (),
) -> None:
    """
    The same for a checkpoint that was saved quantised, which `config.quantization_config` tells.

    The packed form of linears is bitsandbytes' own: of their tensors, only the presence of the weight is checked.
    """
    packed = {key: shape for key, (shape, _) in packed_layout(config, config.quantization_config).items()}
    dense = official_shapes(config)
    expected = {key: shape for key, shape in dense.items() if fused_name(key) == key}
    # Skipped experts are in there in full precision, under their fused names.
    expected |= {key: shape for key, shape in fused_shapes(config).items() if key not in packed} | packed
    names = {key if key in expected else f"model.{key}": shape for key, shape in shapes.items()}
    for name, shape in expected.items():
        if name in names and names[name] != shape and not name.endswith("_proj.weight"):
            raise CheckpointError(
                f"{folder} holds {name} with shape {names[name]}, config.json makes it {shape}; use the config that the "
                "weights were saved with"
            )
    if message := describe_missing(expected.keys() - names.keys(), head_prefixes=("lm_head.", *head_keys)):
        raise CheckpointError(f"{folder}: {message}")


def gather_sharded_weights(model: Any) -> dict[str, Any] | None:
    """
    All weights of a model that `torch.distributed.fsdp.fully_shard` has sharded, on the CPU of rank 0; collective.

    Returns:
        The full state dict on rank 0, an empty one elsewhere; None for a model that is not sharded, or whose sharding is
        the library's own (a `distributed_config`), which it gathers itself.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    if getattr(model.config, "distributed_config", None) is not None:
        return None
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def code_files() -> list[Path]:
    """The flat remote-code files beside this one, which travel with every checkpoint."""
    return sorted(Path(__file__).parent.glob("*_grinmoe.py"))


def add_remote_code(folder: str | os.PathLike) -> None:
    """Put the flat code into a checkpoint folder and point its config.json at it for every auto class."""
    folder = Path(folder)
    for file in code_files():
        shutil.copyfile(file, folder / file.name)
    config_file = folder / CONFIG_NAME
    content = json.loads(config_file.read_text(encoding="utf-8"))
    content["auto_map"] = AUTO_MAP
    config_file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def refuse_checkout(folder: str | os.PathLike) -> None:
    """Raise ValueError if `folder` is where this code lives: a checkpoint would overwrite or mix with the sources."""
    here = Path(__file__).resolve().parent
    if Path(folder).resolve() == here:
        raise ValueError(
            f"save_directory={os.fspath(folder)!r} is the folder of the model's source code; save to a folder of its own"
        )


# Without one of these a folder does not load. So they leave first and come last, and a process that is killed in between
# leaves no mixture of two checkpoints that would load.
_KEYSTONES = (CONFIG_NAME, "adapter_config.json")
WORKSPACE = ".saving-"


@contextlib.contextmanager
def replaced_when_whole(folder: str | os.PathLike) -> Iterator[Path]:
    """Write a checkpoint beside its final place; move it there only when all of it has been written.

    Yields an empty temporary folder inside `folder` (the same file system, so that moving is a rename). If the body or a
    move raises (a full disk, say), `folder` stays, or becomes again, what it was. Files of the new checkpoint replace
    their namesakes, shards of the previous one that are not among them are removed, other files stay. If the process is
    killed while files are moved, or a move can neither be done nor undone, what was moved aside is in the hidden folder
    `.saving-*`, and `folder` does not load; the next save that succeeds removes that.

    Raises:
        ValueError: `folder` is a file or a link that leads nowhere, or its name is empty.
    """
    if not os.fspath(folder):
        raise ValueError("save_directory is empty; give a folder ('.' is the current one)")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_directory={os.fspath(folder)!r} is a file; give a folder")
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"save_directory={os.fspath(folder)!r} is a link that leads nowhere; give a folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=WORKSPACE, dir=folder))
    staging, previous = workspace / "new", workspace / "previous"
    staging.mkdir()
    previous.mkdir()
    replaced = False
    try:
        yield staging
        _move_in(staging, folder, previous)
        replaced = True
        for leftover in folder.glob(f"{WORKSPACE}*"):
            shutil.rmtree(leftover, ignore_errors=True)
    finally:
        # A move that could not be undone either has left the only copy of an old file here.
        if replaced or not any(path.is_file() for path in previous.rglob("*")):
            shutil.rmtree(workspace, ignore_errors=True)
        with contextlib.suppress(OSError):  # up to the first one that holds something
            list(map(Path.rmdir, made))


def _move_in(staging: Path, folder: Path, previous: Path) -> None:
    """Move all files of `staging` into `folder`, and what they replace to `previous`; undone if a move fails."""
    entering = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
    entering.sort(key=lambda path: path.name in _KEYSTONES)
    names = {path.name for path in entering}
    stale = [Path(name) for name in stale_weights((path.name for path in folder.iterdir()), names)]
    leaving = [path for path in entering if (folder / path).exists()] + stale
    leaving.sort(key=lambda path: path.name not in _KEYSTONES)
    moves = [(folder / path, previous / path) for path in leaving]
    moves += [(staging / path, folder / path) for path in entering]
    with contextlib.ExitStack() as undo:
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            undo.callback(os.replace, target, source)
        undo.pop_all()


def _read_header(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
    except SafetensorError as error:
        raise CheckpointFileError(
            f"{file} ({file.stat().st_size} bytes) is truncated or not safetensors ({error}); download it again"
        ) from error


def describe_missing(missing_keys: Iterable[str], head_prefixes: tuple[str, ...]) -> str | None:
    """A message if weights of the network itself (not of a head) were not in the checkpoint, else None."""
    missing = [key for key in missing_keys if not key.startswith(head_prefixes)]
    if not missing:
        return None
    return (
        f"the checkpoint lacks {len(missing)} weights of the network, {', '.join(missing[:3])} first; they would start "
        "from random values. Complete the checkpoint, or pass output_loading_info=True to take the model as it is"
    )


def safetensors_only(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`from_pretrained` arguments that require safetensors: pickled weights can run code and are refused."""
    if kwargs.get("use_safetensors") is False:
        raise ValueError("use_safetensors=False asks for pickled weights, which are refused; leave it out")
    return {**kwargs, "use_safetensors": True}


class OfficialCheckpointMixin:
    """`from_pretrained` and `save_pretrained` of the GRIN-MoE models; goes before `PreTrainedModel`."""

    # Weights of heads: a checkpoint may lack them (a new head starts fresh), the network's own it may not.
    _head_prefixes = ("lm_head.", "score.")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to register: `save_pretrained` always writes the code files and the full `auto_map`.

        (The library's way copies the file of `type(model)`; once FSDP2 has wrapped the model that is a file of torch.)
        """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs,
    ):
        """
        As in Transformers, from a folder or a Hub id in the official layout, with these checks on top.

        A folder's shards are checked by their headers before anything is read. Only safetensors are loaded. A weight of
        the network itself that the checkpoint lacks is an error (a new head is not). `output_loading_info=True` leaves
        keys and shapes to the caller, `ignore_mismatched_sizes=True` leaves shapes.

        Raises:
            CheckpointError: (a ValueError) missing or truncated shard, pickled weights, unknown or missing key, tensor
                that does not fit the config.
            ValueError: config of another model_type.
        """
        checked = pretrained_model_name_or_path is not None and kwargs.get("gguf_file") is None
        if checked:
            kwargs = safetensors_only(kwargs)
        checked = checked and not kwargs.get("variant")
        tensors_checked = not (output_loading_info or ignore_mismatched_sizes)
        folder = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder") or "")
        is_local = folder.is_dir()
        if checked and is_local:
            cls._check_folder(folder, kwargs, tensors_checked)
        try:
            with experts_are_quantized():
                model, loading_info = super().from_pretrained(
                    pretrained_model_name_or_path,
                    *model_args,
                    output_loading_info=True,
                    ignore_mismatched_sizes=ignore_mismatched_sizes,
                    **kwargs,
                )
        except (SafetensorError, RuntimeError):
            if checked and not is_local:
                # What the library says names neither file nor remedy; if the checkpoint is at fault, this does.
                cls._check_download(str(pretrained_model_name_or_path), kwargs, tensors_checked)
            raise
        if output_loading_info:
            return model, loading_info
        if checked and not is_local:
            cls._check_download(str(pretrained_model_name_or_path), kwargs, tensors_checked)
        if message := describe_missing(loading_info["missing_keys"], cls._head_prefixes):
            raise CheckpointError(f"{pretrained_model_name_or_path}: {message}")
        return model

    @classmethod
    def _check_folder(cls, folder: Path, kwargs: dict[str, Any], tensors_checked: bool) -> None:
        """Raise CheckpointError unless the shards in `folder` are whole and, if asked, those of its config."""
        if kwargs.get("config") is None and not any((folder / name).is_file() for name in _KEYSTONES):
            # The library would go on with the default config, that of the released model.
            interrupted = next(folder.glob(f"{WORKSPACE}*"), None)
            remedy = (
                f"a save was interrupted, and its files are in {interrupted}" if interrupted else "give a checkpoint"
            )
            raise CheckpointFileError(f"{folder} holds no {CONFIG_NAME}; {remedy}")
        shapes = read_shapes(folder)
        if not shapes or not tensors_checked:
            return
        config = kwargs.get("config") or cls.config_class.from_pretrained(folder)
        check_weights(shapes, config, folder, head_keys=("score.",))

    @classmethod
    def _check_download(cls, repo_id: str, kwargs: dict[str, Any], tensors_checked: bool) -> None:
        """The same for what has been downloaded of a Hub repository."""
        where = {name: kwargs[name] for name in ("cache_dir", "revision") if kwargs.get(name) is not None}
        for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME):
            file = try_to_load_from_cache(repo_id, os.path.join(kwargs.get("subfolder") or "", name), **where)
            if isinstance(file, str):
                cls._check_folder(Path(file).parent, kwargs, tensors_checked)
                return

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        save_original_format: bool = True,
        **kwargs: Any,
    ) -> None:
        """
        Save in the official layout, with the flat code and a full `auto_map`, so that the folder loads on its own.

        Beyond Transformers: the folder's previous checkpoint is replaced only once the new one is completely written
        (a full disk leaves it whole), and no copy of the weights is made. With `push_to_hub=True` the folder's new files
        are uploaded when they are in place; `repo_id`, `private`, `token`, `commit_message`, `revision` and `create_pr` as
        in Transformers. Further arguments are passed on.

        A model that `fully_shard` has sharded is gathered to the first rank, so every rank must call this, with
        `is_main_process` as it is; where `state_dict` is given (as the Trainer does), nothing is gathered.

        Raises:
            ValueError: `save_directory` is the folder of this source code, or a file.
        """
        refuse_checkout(save_directory)
        if state_dict is None and not kwargs.get("distributed_checkpoint"):
            state_dict = gather_sharded_weights(self)
        kwargs |= {"is_main_process": is_main_process, "push_to_hub": push_to_hub, "max_shard_size": max_shard_size}
        if not is_main_process or kwargs.get("distributed_checkpoint"):
            kwargs |= {"state_dict": state_dict, "save_original_format": save_original_format}
            super().save_pretrained(save_directory, **kwargs)
            return
        hub_options = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs} if push_to_hub else {}
        kwargs["push_to_hub"] = False
        if "token" in hub_options:
            kwargs["token"] = hub_options["token"]
        adapter_only = getattr(self, "_hf_peft_config_loaded", False)
        if getattr(self, "hf_quantizer", None) is not None:
            save_original_format = False  # what is packed has no official layout
        if save_original_format and not adapter_only:
            weights = self.state_dict() if state_dict is None else state_dict
            if can_alias(weights):
                state_dict, save_original_format = official_state_dict(weights), False
        with replaced_when_whole(save_directory) as staging:
            super().save_pretrained(staging, state_dict=state_dict, save_original_format=save_original_format, **kwargs)
            if not adapter_only:
                add_remote_code(staging)
            _make_readable(staging)
            written = [path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()]
        if push_to_hub:
            # After the folder is whole, so that a failed upload costs no checkpoint.
            upload_checkpoint(Path(save_directory), written, self.model_tags or (), **hub_options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "5GB",
        tags: list[str] | str | None = None,
    ) -> CommitInfo:
        """
        Upload the model with its code, so that the repository loads on its own; arguments as in Transformers.

        Beyond Transformers: one commit, which also removes the shards of a former checkpoint that this one does not
        replace, and a card that is there is not written anew. (`grinmoe push` publishes a whole folder, with tokenizer and
        card, and checks it before.)
        """
        tags = [tags] if isinstance(tags, str) else tags or []
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size, token=token)
            written = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()]
            return upload_checkpoint(
                Path(folder),
                written,
                [*(self.model_tags or ()), *tags],
                repo_id=repo_id,
                private=private,
                token=token,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


def _make_readable(folder: Path) -> None:
    """Give the weights the permissions of the other files: safetensors writes them for their owner alone."""
    config = next(folder.glob("*config.json"))
    for weights in folder.glob("*.safetensors"):
        weights.chmod(config.stat().st_mode)


_HUB_OPTIONS = ("repo_id", "private", "token", "commit_message", "revision", "create_pr")


__all__ = [
    "CheckpointError",
    "CheckpointFileError",
    "OfficialCheckpointMixin",
    "read_shapes",
]
