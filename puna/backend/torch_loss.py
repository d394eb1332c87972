"""The loss of a head on torch, without the logits of all rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from puna.backend.kernels import torch_calls

Head = Callable[[torch.Tensor], torch.Tensor]


def head_loss(
    head: Head,
    variables: Sequence[Any],
    x_ND: torch.Tensor,
    labels_N: torch.Tensor,
    weights_N: torch.Tensor,
    rows: int,
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `BackendOps.head_loss`."""
    weights_N = weights_N.to(torch.float32)
    used = weights_N.detach().nonzero()[:, 0]
    labels_N, weights_N = labels_N.long()[used], weights_N[used]
    trained = [v.value for v in variables if v.trainable]
    if training and torch.is_grad_enabled() and (x_ND.requires_grad or trained):
        # What is gathered here, autograd puts back where it was.
        return _Loss.apply(head, labels_N, weights_N, rows, x_ND[used], *trained)
    loss = right = x_ND.new_zeros((), dtype=torch.float32)
    for start in range(0, len(used), rows):
        some = slice(start, start + rows)
        logits_RV = head(x_ND[used[some]]).float()
        more, more_right = _cross_entropy(logits_RV, labels_N[some], weights_N[some])
        loss, right = loss + more, right + more_right
    return loss, right


class _Loss(torch.autograd.Function):
    """The gradients are made with the loss, whose logits need not be computed twice so."""

    @staticmethod
    def forward(ctx: Any, head: Head, labels_N, weights_N, rows: int, x_ND, *trained):
        # Two tensors: one has gradients, and the other none.
        loss, right = (x_ND.new_zeros((), dtype=torch.float32) for _ in range(2))
        dx_ND = torch.zeros_like(x_ND) if ctx.needs_input_grad[4] else None
        changes: list[torch.Tensor | None] = [None] * len(trained)
        for start in range(0, x_ND.shape[0], rows):
            some = slice(start, start + rows)
            x_RD = x_ND[some].detach().requires_grad_(dx_ND is not None)
            wanted = [*trained] if dx_ND is None else [x_RD, *trained]
            with torch.enable_grad():
                logits_RV = head(x_RD)
            d_RV = logits_RV.detach().float()
            more, more_right = _cross_entropy(d_RV, labels_N[some], weights_N[some], into=True)
            loss, right = loss + more, right + more_right
            found = torch.autograd.grad(
                logits_RV, wanted, d_RV.to(logits_RV.dtype), allow_unused=True
            )
            if dx_ND is not None:
                dx_ND[some] = found[0]
                found = found[1:]
            for i, change in enumerate(found):
                if change is not None:
                    old = changes[i]
                    changes[i] = change if old is None else old.add_(change)
            del logits_RV, d_RV  # or there are those of two pieces at a time
        ctx.found = (dx_ND, *changes)
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx: Any, *by: torch.Tensor):
        found, ctx.found = ctx.found, None
        return (None,) * 4 + tuple(
            None if change is None else (change.float() * by[0]).to(change.dtype)
            for change in found
        )


def _cross_entropy(
    logits_RV: torch.Tensor, labels_R: torch.Tensor, weights_R: torch.Tensor, into: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sums of losses and of right guesses.

    With `into`, logits become their gradient; else they may be lost.
    """
    label_R = logits_RV.gather(1, labels_R[:, None])[:, 0]
    if (done := torch_calls.cross_entropy(logits_RV, labels_R, weights_R, into)) is not None:
        losses_R, highest_R = done
        return losses_R.sum(), ((label_R >= highest_R) * weights_R).sum()
    highest_R = logits_RV.max(dim=-1).values
    right = ((label_R >= highest_R) * weights_R).sum()
    total_R = torch.logsumexp(logits_RV, dim=-1)
    loss = ((total_R - label_R) * weights_R).sum()
    if into:
        logits_RV.sub_(total_R[:, None]).exp_().mul_(weights_R[:, None])
        logits_RV.scatter_add_(1, labels_R[:, None], -weights_R[:, None])
    return loss, right
