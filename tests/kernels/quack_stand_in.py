"""What QuACK documents of the three products that `grinmoe_quack` calls, in plain torch, for machines where it cannot run.

Strict where QuACK is: int32 indices and bounds, operands of one dtype, one unit stride, other strides of whole 16 bytes.
Rows that no group covers are NaN, as QuACK leaves them uninitialised. Calls are recorded, to be held against its signatures.
"""

from __future__ import annotations

from itertools import pairwise

import torch


class StandIn:
    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple, dict]] = []

    def gemm(
        self,
        A,
        B,
        out=None,
        *,
        cu_seqlens_m=None,
        cu_seqlens_k=None,
        A_idx=None,
        concat_layout=None,
        tuned=True,
    ):
        given = {"cu_seqlens_m": cu_seqlens_m, "cu_seqlens_k": cu_seqlens_k, "A_idx": A_idx, "tuned": tuned}
        self._record("gemm", (A, B), given | {"out": out, "concat_layout": concat_layout})
        if cu_seqlens_m is not None:
            product = _over_rows(A, B, cu_seqlens_m, A_idx, concat_layout).to(A.dtype)
            assert out is None
            return product
        result = torch.empty(len(cu_seqlens_k) - 1, A.shape[0], B.shape[1], dtype=A.dtype) if out is None else out
        columns = A if A_idx is None else A[:, A_idx.long().clamp(0, A.shape[1] - 1)]
        for group, (start, end) in enumerate(pairwise(cu_seqlens_k.tolist())):
            # Nothing is summed for an empty group, and zeros are written.
            product = columns[:, start:end].float() @ B[start:end].float()
            if concat_layout == ("out",):
                product = in_halves(product, _strided_dim(result[group]))
            result[group] = product
        return result

    def gemm_gated(
        self, A, B, *, activation, cu_seqlens_m, A_idx=None, store_preact=True, concat_layout=None, tuned=True
    ):
        given = {"activation": activation, "cu_seqlens_m": cu_seqlens_m, "A_idx": A_idx, "store_preact": store_preact}
        self._record("gemm_gated", (A, B), given | {"concat_layout": concat_layout, "tuned": tuned})
        assert activation == "swiglu"
        pre_activation = _over_rows(A, B, cu_seqlens_m, A_idx, concat_layout)
        gate, up = pre_activation[:, ::2], pre_activation[:, 1::2]
        activation = (torch.nn.functional.silu(gate) * up).to(A.dtype)
        return pre_activation.to(A.dtype) if store_preact else None, activation

    def gemm_dgated(
        self,
        A,
        B,
        PreAct,
        *,
        activation,
        colvec_scale,
        colvec_reduce,
        cu_seqlens_m,
        A_idx=None,
        dynamic_scheduler=True,
        tuned=True,
        config=None,
    ):
        given = {"colvec_scale": colvec_scale, "colvec_reduce": colvec_reduce, "dynamic_scheduler": dynamic_scheduler}
        given |= {
            "activation": activation,
            "cu_seqlens_m": cu_seqlens_m,
            "A_idx": A_idx,
            "tuned": tuned,
            "config": config,
        }
        self._record("gemm_dgated", (A, B, PreAct), given)
        assert activation == "swiglu" and colvec_reduce and colvec_scale.dtype == torch.float32
        gate, up = PreAct.float()[:, ::2], PreAct.float()[:, 1::2]
        upstream = _over_rows(A, B, cu_seqlens_m, A_idx, None)
        sigmoid = gate.sigmoid()
        result = gate * sigmoid * up
        reduced = (upstream * result).sum(1)
        scale = colvec_scale[:, None]
        upstream = upstream * scale
        grads = upstream * up * sigmoid * (1 + gate * (1 - sigmoid)), upstream * gate * sigmoid
        return torch.stack(grads, dim=-1).flatten(1).to(A.dtype), (result * scale).to(A.dtype), reduced

    def _record(self, name, operands, given) -> None:
        given = {key: value for key, value in given.items() if value is not None}
        self.calls.append((name, operands, given))
        for index in (given.get("cu_seqlens_m"), given.get("cu_seqlens_k"), given.get("A_idx")):
            assert index is None or (index.dtype == torch.int32 and index.is_contiguous())
        assert len({tensor.dtype for tensor in operands}) == 1
        for tensor in (*operands, *([given["out"]] if "out" in given else [])):
            strides = sorted(tensor.stride())
            assert strides[0] == 1 and all(stride * tensor.element_size() % 16 == 0 for stride in strides[1:])


def in_turns(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """[first half; second half] along a dimension to first, second, first, second and so on."""
    order = torch.arange(tensor.shape[dim]).view(2, -1).t().flatten()
    return tensor.index_select(dim, order)


def in_halves(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The inverse of `in_turns`."""
    order = torch.arange(tensor.shape[dim]).view(-1, 2).t().flatten()
    return tensor.index_select(dim, order)


def _strided_dim(tensor: torch.Tensor) -> int:
    """Of the last two dimensions the one that is not contiguous, to which `concat_layout` applies."""
    return -2 if tensor.stride(-1) == 1 else -1


def _over_rows(A, B, bounds, A_idx, concat_layout) -> torch.Tensor:
    """Group by group, in float32; NaN in rows of no group."""
    assert concat_layout in (None, ("B",))
    if concat_layout == ("B",):
        B = in_turns(B, _strided_dim(B))
    rows = A if A_idx is None else A[A_idx.long()]
    product = torch.full((rows.shape[0], B.shape[-1]), float("nan"))
    for group, (start, end) in enumerate(pairwise(bounds.tolist())):
        product[start:end] = rows[start:end].float() @ B[group].float()
    return product
