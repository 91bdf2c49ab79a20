"""The operations of a decoder layer and of the language head with its loss, as they run in training: tapes to replay.

Where each comes from: attention_grinmoe.py, block_grinmoe.py, modeling_grinmoe.py; Transformers' `grouped_mm` experts as
dispatch_grinmoe.py calls them, `sdpa` attention and `ForCausalLMLoss`; PEFT's LoRA on linears; expert_lora.py and
quantization_grinmoe.py for the experts.
What torch keeps for a backward follows from its derivative formulas: a product keeps its input only where its weight is
trained, a pointwise product its factors, a sum nothing.

Shapes: B batch, S sequence, T = B * S tokens, H hidden size, I expert width, E experts, K experts per token, N = T * K
choices, V vocabulary, R rank.
"""

from __future__ import annotations

from .memory_model import FLOAT32, Step, casts_weights, lora_targets, trained_bytes
from .memory_tape import Op, Tape

INT64, BOOL = 8, 1


def layer_tape(step: Step, gradient_part: str, first: bool = False) -> Tape:
    """One decoder layer, from "x" to "y", both (B, S, H); the `first` one gets its input from the embedding."""
    return _Layer(step, gradient_part).tape(first)


def head_tape(step: Step, gradient_part: str) -> Tape:
    """From the last layer's "y" to "loss": final norm, language head, cross entropy in float32."""
    ops = _Operations(step, gradient_part)
    config, tokens, compute = step.config, step.tokens, step.precision.compute
    hidden = tokens * config.hidden_size
    ops.make("y", hidden * step.precision.norm)
    ops.norm("y", "normed", step.precision.norm)
    source = ops.cast("normed", hidden, step.precision.norm, compute)
    ops.product("lm_head", source, "logits", config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
    scores = ops.cast("logits", tokens * config.vocab_size, compute, FLOAT32)
    ops.make("log_probs", tokens * config.vocab_size * FLOAT32)
    ops.add(Op("log_softmax", (scores,), ("log_probs",), saves=("log_probs",)))
    ops.make("loss", FLOAT32)
    ops.make("targets", tokens * INT64)
    ops.add(Op("nll_loss", ("log_probs",), ("loss",), saves=("log_probs", "targets")))
    return Tape(ops.ops, ops.sizes, "logits", gradient_part, ops.gradient_bytes)


class _Operations:
    """Operations that are put together one by one, with the bytes of what they make."""

    def __init__(self, step: Step, gradient_part: str):
        self.step, self.config = step, step.config
        self.ops: list[Op] = []
        self.sizes: dict[str, int] = {}
        self.gradient_sizes: dict[str, int] = {}  # where they differ
        self.cast_weights = 0  # bytes of the copies that autocast makes
        # FSDP2 computes gradients as it does the rest, and makes them float32 when it reduces them.
        sharded = gradient_part == "communication"
        self.gradient_bytes = step.precision.compute if sharded else trained_bytes(step)
        self.targets = {} if step.trains_all else lora_targets(step.config, step.adapters)

    def add(self, op: Op) -> None:
        self.ops.append(op)

    def make(self, name: str, size: int) -> None:
        self.sizes[name] = size

    def cast(self, name: str, numel: int, source: int, target: int, suffix: str = "_cast") -> str:
        """Another precision, where it is another. Returns the name of the result."""
        if source == target:
            return name
        self.make(name + suffix, numel * target)
        self.add(Op("cast", (name,), (name + suffix,)))
        return name + suffix

    def norm(self, name: str, output: str, element: int) -> None:
        """LayerNorm keeps its input (`element` bytes each, cast), and every token's mean and deviation in float32."""
        tokens, hidden = self.step.tokens, self.config.hidden_size
        name = self.cast(name, tokens * hidden, element, self.step.precision.norm, "_of_norm")
        self.make(output, tokens * hidden * self.step.precision.norm)
        self.make(output + "_statistics", 2 * tokens * FLOAT32)
        trained = 2 * hidden * self.gradient_bytes if self.step.trains_all else 0
        self.add(Op("layer_norm", (name,), (output,), (name, output + "_statistics"), parameter_gradients=trained))

    def product(
        self, name: str, source: str, output: str, inputs: int, outputs: int, bias: bool, element: int = 0
    ) -> None:
        """A linear layer that is trained, frozen, or in 4 bits, without LoRA; `source` in the compute precision, before
        it was cast of `element` bytes.
        """
        step = self.step
        in_nf4 = step.method == "qlora" and name != "lm_head"
        # bitsandbytes' linear returns the precision that its input came in.
        self.make(output, step.tokens * outputs * (element if in_nf4 and element else step.precision.compute))
        trained = (inputs * outputs + outputs * bias) * self.gradient_bytes if step.trains_all else 0
        saves: tuple[str, ...] = (source,) if step.trains_all else ()
        if casts_weights(step):
            self.make(f"{name}_weight", inputs * outputs * step.precision.compute)
            saves = (source, f"{name}_weight")
            self.cast_weights += inputs * outputs * step.precision.compute
        self.add(
            Op(
                name,
                (source,),
                (output,),
                saves=saves,
                parameter_gradients=trained,
                gathers=inputs * outputs * step.precision.compute if in_nf4 else 0,
            )
        )


class _Layer(_Operations):
    """A decoder layer's operations, in the order of its forward."""

    def __init__(self, step: Step, gradient_part: str):
        super().__init__(step, gradient_part)
        self.gradient_part = gradient_part
        self.tokens, self.hidden = step.tokens, step.config.hidden_size
        self.choices = step.tokens * step.config.num_experts_per_tok
        self.compute, self.norm_bytes = step.precision.compute, step.precision.norm
        self.held: tuple[str, ...] = ()  # what the experts' functions hold until they return

    def tape(self, first: bool) -> Tape:
        numel = self.tokens * self.hidden
        # The embedding is in the compute precision; under autocast the experts' float32 sum makes the stream float32.
        # FSDP2 casts a layer's input back.
        element = self.compute if first else self.norm_bytes
        self.make("x", numel * element)
        stream = "x"
        if self.step.shards is not None:
            stream, element = self.cast("x", numel, element, self.compute, "_of_layer"), self.compute
        self.norm(stream, "a", element)
        self._attention()
        self.make("h", numel * element)
        # `constants` of these are what the calling functions still hold.
        self.add(
            Op(
                "residual",
                (stream, "attention"),
                ("h",),
                constants=("a", "q_rotated", "k_rotated", "v"),
                passes_gradient=True,
            )
        )
        self.norm("h", "b", element)
        self._router()
        self._experts()
        self.make("y", numel * self.norm_bytes)
        self.add(Op("residual", ("h", "moe"), ("y",), constants=("b", "attention"), passes_gradient=True))
        return Tape(
            self.ops,
            self.sizes,
            "activations",
            self.gradient_part,
            self.gradient_bytes,
            self.gradient_sizes,
            self.cast_weights,
        )

    def linear(self, name: str, source: str, output: str, inputs: int, outputs: int, element: int) -> int:
        """A linear layer of attention, with PEFT's LoRA where it is adapted: y = W x + s B (A x). Returns y's precision.

        Args:
            element: bytes of one of `source`.
        """
        numel, bias = self.tokens * inputs, self.config.attention_bias
        in_nf4 = self.step.method == "qlora"
        cast = self.cast(source, numel, element, self.compute, f"_of_{name}")
        result = element if in_nf4 else self.compute
        if name not in self.targets:
            self.product(name, cast, output, inputs, outputs, bias, element)
            return result
        base = f"{output}_base"
        self.product(name, cast, base, inputs, outputs, bias, element)
        autocast = self.step.precision.autocast
        factor_bytes = self.compute if autocast else FLOAT32
        if in_nf4:
            self.make(f"{output}_clone", self.tokens * outputs * result)  # PEFT's, of what bitsandbytes returns
            self.add(Op("clone", (base,), (f"{output}_clone",)))
            base = f"{output}_clone"
        if not (in_nf4 and autocast):
            # PEFT brings the input to the factors' float32, and autocast casts it back.
            source, element = self.cast(source, numel, element, FLOAT32, f"_wide_{name}"), FLOAT32
        low_input = self.cast(source, numel, element, factor_bytes, f"_low_{name}")
        rank, gradients = self.step.adapters.rank, self.gradient_bytes
        low, delta, scaled = f"{output}_low", f"{output}_delta", f"{output}_scaled"
        self.make(low, self.tokens * rank * factor_bytes)
        self.add(Op("lora_A", (low_input,), (low,), (low_input,), parameter_gradients=rank * inputs * gradients))
        self.make(delta, self.tokens * outputs * factor_bytes)
        self.add(Op("lora_B", (low,), (delta,), (low,), parameter_gradients=rank * outputs * gradients))
        self.make(scaled, self.tokens * outputs * factor_bytes)
        self.add(Op("scale", (delta,), (scaled,)))
        self.make(output, self.tokens * outputs * result)
        self.add(Op("add", (base, scaled), (output,), passes_gradient=True))
        return result

    def _attention(self) -> None:
        config, compute, tokens = self.config, self.compute, self.tokens
        queries, keys = config.num_attention_heads * config.head_size, config.num_key_value_heads * config.head_size
        for name, outputs in (("q", queries), ("k", keys), ("v", keys)):
            element = self.linear(f"{name}_proj", "a", name, self.hidden, outputs, self.norm_bytes)
        for name, outputs in (("q", queries), ("k", keys)):
            size = tokens * outputs * element
            self.make(f"{name}_rotated", size)
            # Of the backward: the gradient times the sine, its halves swapped.
            self.add(Op("rope", (name,), (f"{name}_rotated",), scratch=size + size // 2))
        query = self.cast("q_rotated", tokens * queries, element, compute)
        key = self.cast("k_rotated", tokens * keys, element, compute)
        value = self.cast("v", tokens * keys, element, compute)
        kept: tuple[str, ...] = ()
        if self.step.masked:
            # With a mask, sdpa gets repeated keys and values, and the mask in the precision of the scores.
            for name, source in (("k_repeated", key), ("v_repeated", value)):
                self.make(name, tokens * queries * compute)
                self.add(Op("repeat_kv", (source,), (name,)))
            key, value = "k_repeated", "v_repeated"
            self.make("mask", self.step.batch * self.step.sequence**2 * compute)
            kept = ("mask",)
        self.make("o", tokens * queries * compute)
        self.make("log_sum_exp", tokens * config.num_attention_heads * FLOAT32)
        saves = (query, key, value, "o", "log_sum_exp", *kept)
        self.add(Op("sdpa", (query, key, value), ("o",), saves))
        self.linear("o_proj", "o", "attention", queries, self.hidden, compute)

    def _router(self) -> None:
        """Jitter, router logits and SparseMixer's choices: (T, E) tensors, few but for many experts."""
        config, tokens = self.config, self.tokens
        experts, top_k = config.num_local_experts, config.num_experts_per_tok
        numel = tokens * self.hidden
        source = "b"
        if config.input_jitter_noise:
            self.make("jitter", numel * self.norm_bytes)
            self.make("j", numel * self.norm_bytes)
            self.add(Op("jitter", ("b",), ("j",), saves=("jitter",)))
            source = "j"
        self.expert_input = source
        cast = self.cast(source, numel, self.norm_bytes, self.compute, "_of_router")
        trained = experts * self.hidden * self.gradient_bytes if self.step.trains_all else 0
        self.make("router_logits", tokens * experts * self.compute)
        saves: tuple[str, ...] = (cast,) if self.step.trains_all else ()
        self.add(Op("router", (cast,), ("router_logits",), saves, parameter_gradients=trained))
        self.make("probs", top_k * tokens * experts * self.compute)
        self.make("selected", tokens * top_k * INT64)
        self.make("chosen_probs", 2 * tokens * top_k * self.compute)
        self.make("routing_weights", tokens * top_k * self.compute)
        saves = ("probs", "selected", "chosen_probs")
        self.add(Op("sparsemixer", ("router_logits",), ("routing_weights",), saves))

    def _experts(self) -> None:
        """The library's grouped products; those of expert_lora.py; or the loop over experts in 4 bits."""
        config, choices, compute = self.config, self.choices, self.compute
        width = config.intermediate_size
        self.loop = self.step.method == "qlora"
        self.by_library = not self.loop and "gate_up_proj" not in self.targets
        rows = self._rows()
        self._expert_product("gate_up_proj", rows, "gate_up", self.hidden, 2 * width)
        for half in ("gate", "up", "silu", "activation"):
            self.make_of_choices(half, choices * width * compute)
        if self.loop and "down_proj" not in self.targets:
            # Nothing keeps it: it is one expert's at a time.
            self.make("activation", choices * width * compute // config.num_local_experts)
        self.add(Op("chunk", ("gate_up",), ("gate", "up"), view=True))
        self.add(Op("silu", ("gate",), ("silu",), saves=("gate",)))
        self.add(Op("multiply", ("silu", "up"), ("activation",), saves=("silu", "up")))
        self._expert_product("down_proj", "activation", "down_rows", width, self.hidden)
        self._combine()

    def make_of_choices(self, name: str, size: int) -> None:
        """All choices' rows; the loop makes their gradients for one expert after the other, of even shares here."""
        self.make(name, size)
        if self.loop:
            self.gradient_sizes[name] = size // self.config.num_local_experts

    def _rows(self) -> str:
        """Each choice's input, sorted by expert."""
        numel, choices, compute = self.tokens * self.hidden, self.choices, self.compute
        self.make("token_of_row", choices * INT64)
        source = self.cast(self.expert_input, numel, self.norm_bytes, compute, "_of_experts")
        self.held = ("rows", source, self.expert_input)
        if not self.loop and not self.by_library:
            # A row of zeros more, for choices that are served elsewhere.
            self.make("padded", numel * compute)
            self.add(Op("cat", (source,), ("padded",), passes_gradient=True))
            source, self.held = "padded", (*self.held, "padded")
        self.make("rows", choices * self.hidden * compute)
        self.add(Op("gather", (source,), ("rows",), ("token_of_row",)))
        return "rows"

    def _combine(self) -> None:
        """Weight each choice's output, bring it back to its token, sum over the token's choices."""
        size = self.choices * self.hidden * self.compute
        self.make("weighted", size)
        self.make("unsorted", size)
        down = "down_rows"
        if not self.by_library:
            # The loop joins its experts' outputs; expert_lora.py masks those that are served elsewhere.
            down = "down"
            self.make(down, size)
            self.add(Op("join", ("down_rows",), ("down",), passes_gradient=self.loop))
            if self.loop and "down_proj" not in self.targets:
                self.held = (*self.held, "down_rows")
        saves = (down, "routing_weights")
        # The routing weights' gradient is a product of the output's size, summed.
        self.add(Op("weigh", (down, "routing_weights"), ("weighted",), saves, scratch=size))
        self.make("row_of_choice", self.choices * INT64)
        self.add(Op("unsort", ("weighted",), ("unsorted",), ("row_of_choice",)))
        numel = self.tokens * self.hidden
        total = "total" if self.by_library and self.norm_bytes != self.compute else "moe"
        self.make(total, numel * self.norm_bytes)
        self.add(Op("sum", ("unsorted",), (total,), constants=self.held))
        if total != "moe":
            # The library's function returns the precision that its input came in; dispatch_grinmoe.py the block's.
            self.make("moe", numel * self.norm_bytes)
            self.add(Op("cast", (self.cast(total, numel, self.norm_bytes, self.compute),), ("moe",)))

    def _expert_product(self, name: str, source: str, output: str, inputs: int, outputs: int) -> None:
        """A fused weight's product with the rows of each expert, and the LoRA term on it."""
        step, experts, choices = self.step, self.config.num_local_experts, self.choices
        adapted = name in self.targets
        size = choices * outputs * self.compute
        base = output + "_base" if adapted else output
        # The loop has one expert's terms at a time.
        term = size // experts if self.loop else size
        self.make(base, term if adapted else size)
        trained = experts * inputs * outputs * self.gradient_bytes if step.trains_all else 0
        # One expert at a time is dequantised, in the forward and again in the backward.
        one_expert = inputs * outputs * self.compute if self.loop else 0
        saves: tuple[str, ...] = (source,) if step.trains_all else ()
        cast = 0
        if casts_weights(step):
            # A copy for the products; its gradient is cast to the weight's.
            cast = experts * inputs * outputs * self.compute
            self.make(f"{name}_weight", cast)
            saves = (source, f"{name}_weight")
        self.add(Op(name, (source,), (base,), saves, scratch=cast, parameter_gradients=trained, gathers=one_expert))
        if not adapted:
            return
        rank = step.adapters.rank
        low, delta = f"{output}_low", f"{output}_delta"
        of_a, of_b = experts * rank * inputs, experts * rank * outputs
        self.make(low, choices * rank * self.compute)
        self.make(delta, term)
        # The factors in the compute precision: A, and B with its scale.
        self.make(f"{output}_A", of_a * self.compute)
        self.make(f"{output}_B", of_b * self.compute)
        trained_a = of_a // (experts if step.adapters.shared_a else 1) * self.gradient_bytes
        self.add(Op("lora_A", (source,), (low,), (source, f"{output}_A"), parameter_gradients=trained_a))
        trained_b = of_b * self.gradient_bytes
        self.add(Op("lora_B", (low,), (delta,), (low, f"{output}_B"), parameter_gradients=trained_b))
        self.make_of_choices(output, size)
        self.add(Op("add", (base, delta), (output,), passes_gradient=True))
