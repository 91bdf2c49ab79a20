"""A training step as a tape of operations, replayed to find what is alive when memory peaks. Nothing is computed.

An operation says which tensors it reads and makes, which of them autograd keeps for its backward, and what its backward
allocates. `Tape.forward` and `Tape.backward` walk such a list as autograd does and book every tensor in a `Ledger`, which
remembers the peak. The memory model (`memory_model.py`) writes the operations of a decoder layer down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Op:
    """
    One operation. Tensors are named; two names of one storage are one name here, so views need no operation.

    Attributes:
        name: what a reader calls it.
        inputs: tensors that it reads and passes a gradient to.
        outputs: tensors that it makes.
        saves: tensors that autograd keeps until its backward, inputs and outputs or others (made here, without gradient).
        constants: tensors that are held until then without a gradient's passing: what Python's locals refer to.
        view: its outputs are parts of its first input's storage.
        passes_gradient: its backward hands the gradient on as it is (a sum, a residual connection).
        scratch: bytes that its backward needs beside the gradients.
        parameter_gradients: bytes of parameter gradients that its backward makes.
        gathers: bytes of weights that exist only while it runs, in forward and backward (dequantised ones).
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    saves: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    view: bool = False
    passes_gradient: bool = False
    scratch: int = 0
    parameter_gradients: int = 0
    gathers: int = 0


@dataclass
class Ledger:
    """Bytes that are alive, by part, and what they were when their sum was largest."""

    alive: Counter[str] = field(default_factory=Counter)
    peak: dict[str, int] = field(default_factory=dict)
    peak_total: int = 0
    peak_phase: str = ""
    phase: str = ""

    def add(self, part: str, size: int) -> None:
        """Allocate (or with a negative `size` free) bytes of a part."""
        self.alive[part] += size
        total = sum(self.alive.values())
        if total > self.peak_total:
            self.peak_total, self.peak, self.peak_phase = total, dict(self.alive), self.phase


class Storage:
    """An allocation that is freed when nothing refers to it any more."""

    def __init__(self, ledger: Ledger, part: str, size: int):
        self.ledger, self.part, self.size, self.references = ledger, part, size, 1
        ledger.add(part, size)

    def hold(self) -> Storage:
        self.references += 1
        return self

    def release(self) -> None:
        self.references -= 1
        if self.references == 0:
            self.ledger.add(self.part, -self.size)


class Tape:
    """Operations in order, with the bytes of every tensor, booked under one part of the ledger.

    Args:
        ops: in the order of the forward.
        sizes: bytes of every tensor; a gradient is as large as its tensor, but for those in `gradient_sizes`.
        cast_weights: bytes of weights in another precision that are made in the forward, and kept until all of it is done.
        part: part of the ledger that tensors and gradients belong to.
        gradient_part: part that parameter gradients belong to.
        gradient_bytes: of an element of a parameter's gradient, as the backward makes it.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        sizes: dict[str, int],
        part: str,
        gradient_part: str = "gradients",
        gradient_bytes: int = 4,
        gradient_sizes: dict[str, int] | None = None,
        cast_weights: int = 0,
    ):
        self.ops, self.sizes, self.part = ops, sizes, part
        self.gradient_part, self.gradient_bytes = gradient_part, gradient_bytes
        self.gradient_sizes = sizes | (gradient_sizes or {})
        self.cast_weights = cast_weights
        # Backward reads nothing of the forward in the operations from here on.
        self.first_without_saves = 1 + max((i for i, op in enumerate(ops) if op.saves), default=-1)

    def forward(self, ledger: Ledger, tensors: dict[str, Storage], outputs: Sequence[str], save: bool) -> Saved:
        """
        Run forward. `tensors` holds the inputs, whose references are taken over, and receives the `outputs`.

        Args:
            save: keep for the backward what it needs; without, as the forward of a checkpoint runs.

        Returns:
            What the backward takes.
        """
        remaining = self._uses(outputs)
        saved = [self._forward(ledger, op, tensors, remaining) for op in self.ops]
        if not save:
            _release(saved)
        return saved

    def _uses(self, outputs: Sequence[str] = ()) -> Counter[str]:
        uses = Counter(name for op in self.ops for name in (*op.inputs, *op.constants))
        uses.update(outputs)
        return uses

    def _forward(self, ledger: Ledger, op: Op, tensors: dict[str, Storage], remaining: Counter[str]) -> list[Storage]:
        ledger.add("temporary", op.gathers)
        for name in op.outputs:
            tensors[name] = tensors[op.inputs[0]].hold() if op.view else Storage(ledger, self.part, self.sizes[name])
        kept = self._kept(ledger, op, tensors)
        ledger.add("temporary", -op.gathers)
        remaining.subtract((*op.inputs, *op.constants))
        for name in {*op.inputs, *op.constants, *op.outputs}:
            if remaining[name] == 0 and name in tensors:
                tensors.pop(name).release()
        return kept

    def _kept(self, ledger: Ledger, op: Op, tensors: dict[str, Storage]) -> list[Storage]:
        return [
            tensors[name].hold() if name in tensors else Storage(ledger, self.part, self.sizes[name])
            for name in op.saves
        ]

    def backward(self, ledger: Ledger, saved: Saved, gradients: dict[str, Storage]) -> None:
        """Run backward. `gradients` holds those of the outputs, which are used up, and receives those of the inputs."""
        self._backward(ledger, self.ops, saved, gradients)

    def recomputed_backward(self, ledger: Ledger, tensors: dict[str, Storage], gradients: dict[str, Storage]) -> None:
        """Run the backward of a checkpointed forward, of which `tensors` has the inputs.

        It is recomputed when the backward first asks for something that was kept, and not before.
        """
        *recomputed, last = self.ops[: self.first_without_saves]
        rest = self.ops[self.first_without_saves :]
        self._backward(ledger, rest, [[] for _ in rest], gradients)
        remaining = self._uses()
        saved = [self._forward(ledger, op, tensors, remaining) for op in recomputed]
        # It stops as soon as the last thing to be kept is there.
        saved.append(self._kept(ledger, last, tensors))
        _release([list(tensors.values())])
        self._backward(ledger, [*recomputed, last], saved, gradients)

    def _backward(self, ledger: Ledger, ops: Sequence[Op], saved: Saved, gradients: dict[str, Storage]) -> None:
        for op, kept in zip(reversed(ops), reversed(saved)):
            incoming = [gradients.pop(name) for name in op.outputs]
            ledger.add("temporary", op.gathers)
            ledger.add(self.part, op.scratch)
            ledger.add(self.gradient_part, op.parameter_gradients)
            for name in op.inputs:
                made = (
                    incoming[0].hold() if op.passes_gradient else Storage(ledger, self.part, self.gradient_sizes[name])
                )
                gradients[name] = self._sum(ledger, gradients.get(name), made)
            ledger.add("temporary", -op.gathers)
            ledger.add(self.part, -op.scratch)
            for storage in (*kept, *incoming):
                storage.release()

    def _sum(self, ledger: Ledger, earlier: Storage | None, made: Storage) -> Storage:
        """Autograd adds in place where nobody else holds the earlier gradient."""
        if earlier is None:
            return made
        if earlier.references == 1:
            made.release()
            return earlier
        total = Storage(ledger, self.part, earlier.size)
        earlier.release()
        made.release()
        return total


def _release(saved: Saved) -> None:
    for kept in saved:
        for storage in kept:
            storage.release()


# For each operation, what it kept.
Saved = list[list[Storage]]
