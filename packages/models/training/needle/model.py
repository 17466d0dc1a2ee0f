"""The decoder: Qwen3's layers with the weights of all layers stacked.

Stacking lets the optimizer treat each kind of matrix in one batched operation. Two regions of a
layer are compiled, on flat tensors of a constant number of tokens, so that one compilation serves
every sequence length; attention between them runs eagerly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from config import VOCABULARY, ModelConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension in fp32."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2), the layout of Hugging Face checkpoints."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _attention_inputs(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    head_dim: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    h = rms_norm(x, norm, eps).to(dtype)
    q, k, v = (F.linear(h, w.to(dtype)).view(len(x), -1, head_dim) for w in (wq, wk, wv))
    q = _rotate(rms_norm(q, q_norm, eps), cos, sin).to(dtype)
    k = _rotate(rms_norm(k, k_norm, eps), cos, sin).to(dtype)
    return q, k, v


def _after_attention(
    x: Tensor,
    attended: Tensor,
    wo: Tensor,
    norm: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    x = x + F.linear(attended, wo.to(dtype)).float()
    h = rms_norm(x, norm, eps).to(dtype)
    h = F.silu(F.linear(h, w_gate.to(dtype))) * F.linear(h, w_up.to(dtype))
    return x + F.linear(h, w_down.to(dtype)).float()


def _logits(x: Tensor, norm: Tensor, head: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return F.linear(rms_norm(x, norm, eps).to(dtype), head.to(dtype)).float()


def _loss(
    x: Tensor,
    targets: Tensor,
    weights: Tensor,
    answers: Tensor,
    starts: Tensor,
    tasks: Tensor,
    norm: Tensor,
    head: Tensor,
    eps: float,
    dtype: torch.dtype,
    task_count: int,
) -> tuple[Tensor, Tensor]:
    """Return the weighted loss and, per task, what `answer_statistics` names."""
    logits = _logits(x, norm, head, eps, dtype)
    losses = F.cross_entropy(logits, targets, reduction="none")
    right = (logits.argmax(-1) == targets).float()
    answers, starts = answers.float(), starts.float()
    rows = torch.stack(
        (answers, answers * right, starts, starts * right, answers * losses), dim=1
    ).detach()
    statistics = torch.zeros(task_count, 5, device=x.device).index_add(0, tasks, rows)
    return (losses * weights).sum(), statistics


class NeedleDecoder(nn.Module):
    """A byte-level decoder that a Qwen3 checkpoint can hold.

    Parameters
    ----------
    config
        Shape of the model.
    block
        Tokens that the compiled regions take at once; the number of tokens of every call is a
        multiple of it, or smaller.
    compute_dtype
        Type of matrix products and attention; weights and residuals stay fp32.
    compiled
        Whether to compile the regions around attention.
    """

    def __init__(
        self,
        config: ModelConfig,
        block: int,
        compute_dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.block, self.compute_dtype = config, block, compute_dtype
        c = config
        q_width, kv_width = c.heads * c.head_dim, c.kv_heads * c.head_dim
        shapes = {
            "q_proj": (q_width, c.width),
            "k_proj": (kv_width, c.width),
            "v_proj": (kv_width, c.width),
            "o_proj": (c.width, q_width),
            "gate_proj": (c.mlp_width, c.width),
            "up_proj": (c.mlp_width, c.width),
            "down_proj": (c.width, c.mlp_width),
        }
        self.embedding = nn.Parameter(torch.randn(VOCABULARY, c.width) * 0.5)
        self.head = nn.Parameter(torch.randn(VOCABULARY, c.width) * 0.02)
        self.final_norm = nn.Parameter(torch.ones(c.width))
        # Layers begin as the identity: what writes to the residual stream is zero.
        self.matrices = nn.ParameterDict(
            {
                name: nn.Parameter(
                    torch.zeros(c.layers, *shape)
                    if name in ("o_proj", "down_proj")
                    else torch.randn(c.layers, *shape) * c.width**-0.5
                )
                for name, shape in shapes.items()
            }
        )
        self.norms = nn.ParameterDict(
            {
                name: nn.Parameter(
                    torch.ones(c.layers, c.head_dim if "_norm" in name else c.width)
                )
                for name in LAYER_NORMS
            }
        )
        frequencies = c.rope_base ** (
            -torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim
        )
        angles = torch.outer(torch.arange(c.max_positions, dtype=torch.float64), frequencies)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        self._rotary: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        wrap: Callable = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self._attention_inputs = wrap(_attention_inputs)
        self._after_attention = wrap(_after_attention)
        self._loss = wrap(_loss)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the last layer's residual stream.

        Parameters
        ----------
        tokens : [batch, length]
            Token ids.

        Returns
        -------
        Tensor : [batch * length, width]
            Before the final norm.
        """
        c, eps, dtype = self.config, self.config.norm_eps, self.compute_dtype
        batch, length = tokens.shape
        x = F.embedding(tokens.reshape(-1), self.embedding)
        rotary = self._rotary_tables(batch, length)
        matrices = {name: weights.unbind(0) for name, weights in self.matrices.items()}
        norms = {name: weights.unbind(0) for name, weights in self.norms.items()}
        for i in range(c.layers):
            q, k, v = self._by_block(
                self._attention_inputs,
                (x, *rotary),
                norms["input_layernorm"][i],
                *(matrices[name][i] for name in ("q_proj", "k_proj", "v_proj")),
                norms["q_norm"][i],
                norms["k_norm"][i],
                c.head_dim,
                eps,
                dtype,
            )
            q, k, v = (t.view(batch, length, -1, c.head_dim).transpose(1, 2) for t in (q, k, v))
            with _fast_attention(x.device):
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            attended = attended.transpose(1, 2).reshape(batch * length, -1)
            (x,) = self._by_block(
                self._after_attention,
                (x, attended),
                matrices["o_proj"][i],
                norms["post_attention_layernorm"][i],
                *(matrices[name][i] for name in ("gate_proj", "up_proj", "down_proj")),
                eps,
                dtype,
            )
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of the next byte for some rows of `hidden`'s result."""
        return _logits(
            hidden, self.final_norm, self.head, self.config.norm_eps, self.compute_dtype
        )

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        weights: Tensor,
        answers: Tensor,
        starts: Tensor,
        tasks: Tensor,
        task_count: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the answer statistics of a micro-batch.

        Parameters
        ----------
        tokens : [batch, length]
            Inputs.
        targets, weights, answers, starts, tasks : [batch * length]
            Next bytes, their weight in the loss, whether they belong to an answer, whether they
            begin a value (both as 0 or 1), and the index of their task.
        task_count
            Number of tasks.

        Returns
        -------
        loss : scalar
            Weighted sum of cross entropies.
        statistics : [task_count, 5]
            Answer bytes, right answer bytes, first bytes, right first bytes, summed answer loss.
        """
        losses, statistics = self._by_block(
            self._loss,
            (self.hidden(tokens), targets, weights, answers, starts, tasks),
            self.final_norm,
            self.head,
            self.config.norm_eps,
            self.compute_dtype,
            task_count,
            join=lambda parts: torch.stack(list(parts)).sum(0),
        )
        return losses, statistics

    def _by_block(
        self,
        region: Callable,
        tensors: Sequence[Tensor],
        *others: object,
        join: Callable[[Sequence[Tensor]], Tensor] = torch.cat,
    ) -> tuple[Tensor, ...]:
        """Apply a region to one block of tokens after the other."""
        if len(tensors[0]) <= self.block:
            result = region(*tensors, *others)
            return result if isinstance(result, tuple) else (result,)
        blocks = zip(*(tensor.split(self.block) for tensor in tensors), strict=True)
        results = [region(*block, *others) for block in blocks]
        if not isinstance(results[0], tuple):
            return (join(results),)
        return tuple(join(parts) for parts in zip(*results, strict=True))

    def _rotary_tables(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        if (batch, length) not in self._rotary:
            self._rotary[batch, length] = (
                self.cos[:length].repeat(batch, 1),
                self.sin[:length].repeat(batch, 1),
            )
        return self._rotary[batch, length]


def _fast_attention(device: torch.device) -> contextlib.AbstractContextManager:
    """Choose cuDNN on a GPU: 1.6 times the speed of PyTorch's flash attention here."""
    if device.type == "cuda":
        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
    return contextlib.nullcontext()
