"""A training step replayed: the peak of its memory on one GPU, and what it consists of. See docs/planning.md."""

from __future__ import annotations

from collections import Counter

from .memory_layer import head_tape, layer_tape
from .memory_model import FLOAT32, Step, parameters_of, resident_bytes
from .memory_tape import Ledger, Saved, Storage, Tape

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "communication", "temporary")


def predict(step: Step) -> Ledger:
    """
    Replay a step that is not the first, so that the optimizer's states are there.

    Returns:
        The ledger: `peak_total` bytes, `peak` by part (of `PARTS`), and `peak_phase`, where in the step that was.
    """
    ledger = Ledger()
    resident = resident_bytes(step)
    kept = (
        ("weights", "optimizer", "gradients") if step.accumulates and step.shards is None else ("weights", "optimizer")
    )
    for part in kept:
        if not step.cpu_offload:
            ledger.add(part, resident.get(part, 0))
    if step.replicas > 1 and step.shards is None:
        # DistributedDataParallel reduces gradients in buckets of its own.
        ledger.add("communication", resident["gradients"])
    # Cosines and sines, one table for all layers and rows.
    ledger.add("activations", 2 * step.sequence * step.config.head_size * step.precision.compute)
    if step.masked:
        ledger.add("activations", step.batch * step.sequence**2)  # (B, 1, S, S) bool
    groups = _Sharded(step, ledger) if step.shards is not None else _Whole(step, ledger)
    _Replay(step, ledger, groups).run()
    return ledger


class _Whole:
    """Parameter groups without FSDP2: nothing is gathered, and gradients stay where the backward makes them."""

    gradient_part = "gradients"

    def __init__(self, step: Step, ledger: Ledger):
        self.step, self.ledger = step, ledger
        self.trained: Counter[str] = Counter()  # elements that this GPU holds of a group
        for parameter in parameters_of(step):
            self.trained[parameter.group] += parameter.shard(step.shards) * parameter.trained

    def before_forward(self, group: str) -> None: ...

    def after_forward(self, group: str) -> None: ...

    def before_backward(self, group: str, following: str) -> None: ...

    def after_backward(self, group: str, gradients: int) -> None:
        if self.step.accumulates:  # added to those that are there
            self.ledger.add("gradients", -gradients)

    def finish(self) -> None: ...


class _Sharded(_Whole):
    """
    Parameter groups of FSDP2 (torch.distributed.fsdp.fully_shard), as `sharding.shard_model` makes them.

    Forward: a group is gathered into one buffer, and copied out of it into weights; the buffer is freed when the next
    group's has come. Backward: while a group computes, the next one's buffer is filled already; its gradients are copied
    into the float32 input of the reduce-scatter, which is freed after the next group's backward. Over one rank nothing is
    gathered into a buffer.
    """

    gradient_part = "communication"

    def __init__(self, step: Step, ledger: Ledger):
        super().__init__(step, ledger)
        self.shards = step.shards or 1
        self.weights: Counter[str] = Counter()  # bytes of a gathered group
        self.casts: Counter[str] = Counter()  # bytes of this GPU's shards that are cast to be sent
        for parameter in parameters_of(step):
            shard = parameter.shard(step.shards) * step.precision.compute
            self.weights[parameter.group] += shard * self.shards
            if parameter.trained and step.precision.compute != FLOAT32:
                self.casts[parameter.group] += shard
        self.buffers: dict[str, int] = {}  # all-gather outputs that are alive
        self.reduced = 0  # reduce-scatter input that is alive

        if step.accumulates:
            # The Trainer reduces in a step's last micro-batch only; until then every GPU keeps all gradients, in float32.
            ledger.add("communication", sum(self.trained.values()) * self.shards * FLOAT32)

    def before_forward(self, group: str) -> None:
        self._fill_buffer(group)
        for earlier in [name for name in self.buffers if name != group]:
            self._free_buffer(earlier)
        self.ledger.add("communication", self.weights[group])

    def after_forward(self, group: str) -> None:
        # The head's backward follows its forward, and the last norm is the root's: neither is freed.
        if group not in ("norm", "head"):
            self.ledger.add("communication", -self.weights[group])

    def before_backward(self, group: str, following: str) -> None:
        if group not in ("norm", "head"):
            self._fill_buffer(group)
            self.ledger.add("communication", self.weights[group])
        for name in list(self.buffers):
            self._free_buffer(name)
        self._fill_buffer(following)

    def after_backward(self, group: str, gradients: int) -> None:
        ledger = self.ledger
        ledger.add("communication", -self.weights[group])
        ledger.add("communication", -self.reduced)
        self.reduced = self.trained[group] * self.shards * FLOAT32
        ledger.add("communication", self.reduced)
        ledger.add("communication", -gradients)
        shard = 0 if self.step.cpu_offload else self.trained[group] * FLOAT32
        ledger.add("gradients", shard)
        if self.step.accumulates:
            ledger.add("communication", -self.trained[group] * self.shards * FLOAT32)

    def finish(self) -> None:
        for name in list(self.buffers):
            self._free_buffer(name)
        self.ledger.add("communication", -self.reduced)

    def _fill_buffer(self, group: str) -> None:
        if group and group not in self.buffers and self.shards > 1:
            self.buffers[group] = self.weights[group]
            self.ledger.add("communication", self.casts[group])
            self.ledger.add("communication", self.weights[group])
            self.ledger.add("communication", -self.casts[group])

    def _free_buffer(self, group: str) -> None:
        self.ledger.add("communication", -self.buffers.pop(group))


class _Replay:
    """Forward, loss and backward of a step, in the order in which torch runs them."""

    def __init__(self, step: Step, ledger: Ledger, groups: _Whole):
        self.step, self.ledger, self.groups = step, ledger, groups
        part = groups.gradient_part
        first, other = layer_tape(step, part, first=True), layer_tape(step, part)
        self.layers = [first, *[other] * (step.config.num_hidden_layers - 1)]
        self.head = head_tape(step, part)
        self.inputs: list[Storage] = []
        self.saved: list[Saved] = []

    def run(self) -> None:
        hidden = self._layers()
        self.ledger.phase = "loss"
        self.groups.before_forward("norm")
        self.groups.before_forward("head")
        tensors = {"y": hidden}
        saved = self.head.forward(self.ledger, tensors, ("loss",), save=True)
        if self.step.gradient_checkpointing:
            self.ledger.add("activations", -sum(tape.cast_weights for tape in self.layers))
        gradients = {"loss": tensors.pop("loss")}
        last = f"layers.{len(self.layers) - 1}"
        self.groups.before_backward("head", last)
        self.head.backward(self.ledger, saved, gradients)
        self._reduce("head", self.head)
        self._backward_layers(gradients["y"])
        self.ledger.phase = "optimizer"
        self.groups.finish()

    def _layers(self) -> Storage:
        recompute, ledger = self.step.gradient_checkpointing, self.ledger
        ledger.phase = "forward"
        self.groups.before_forward("embed")
        hidden = Storage(ledger, "activations", self.layers[0].sizes["x"])
        self.groups.after_forward("embed")
        for layer, tape in enumerate(self.layers):
            self.groups.before_forward(f"layers.{layer}")
            if recompute:
                self.inputs.append(hidden.hold())
            tensors = {"x": hidden}
            if recompute:
                # Else they are kept for the backward, with all the rest.
                ledger.add("activations", tape.cast_weights)
            self.saved.append(tape.forward(ledger, tensors, ("y",), save=not recompute))
            hidden = tensors["y"]
            self.groups.after_forward(f"layers.{layer}")
        return hidden

    def _backward_layers(self, gradient: Storage) -> None:
        for layer, tape in reversed(list(enumerate(self.layers))):
            self.ledger.phase = f"backward of layer {layer}"
            group = f"layers.{layer}"
            self.groups.before_backward(group, f"layers.{layer - 1}" if layer else "embed")
            gradients = {"y": gradient}
            saved = self.saved.pop()
            if self.step.gradient_checkpointing:
                tape.recomputed_backward(self.ledger, {"x": self.inputs.pop()}, gradients)
            else:
                tape.backward(self.ledger, saved, gradients)
            self._reduce(group, tape)
            gradient = gradients["x"]
        self.ledger.phase = "backward of the embedding"
        if self.groups.trained["embed"]:
            made = self.head.gradient_bytes * self.step.config.vocab_size * self.step.config.hidden_size
            self.ledger.add(self.groups.gradient_part, made)
            self.groups.after_backward("embed", made)
        gradient.release()

    def _reduce(self, group: str, tape: Tape) -> None:
        self.groups.after_backward(group, sum(op.parameter_gradients for op in tape.ops))
