"""Contrast of a few queries with every row of a memory that is spread over the ranks.

    contrast = Contrast(bank)                                # the same call on every rank
    losses = contrast(queries, class_ids, temperature=0.07)  # collective: every slot calls it

Queries travel, rows stay: three exchanges of a few floats per query and channel, whatever the
number of rows. Value and gradient equal those of one process that holds all rows.

Shape letters: E queries of all ranks, M of this rank, T rows held here, D channels, W ranks.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memseg_dist import dist
from memseg_dist.memory.rows import ShardedRows

SCORES_PER_CHUNK = 2**25
"""How many scores [queries, rows] a rank holds at once."""


class Contrast:
    """The contrast with the set rows of `bank`, whose lengths it keeps."""

    def __init__(self, bank: ShardedRows) -> None:
        assert len(bank.shape) == 1, f"rows of shape {bank.shape} are no vectors"
        self.bank = bank
        self.lengths = torch.ones(len(bank.rows), device=bank.rows.device)
        bank.add_read(self)

    def refresh(self, classes: np.ndarray, rows: Tensor | slice) -> None:
        length = self.bank.rows[rows].norm(dim=1).clamp_min(1e-12)
        self.lengths[rows] = length.to(self.lengths.dtype)

    def __call__(self, queries_MD: Tensor, classes_M: np.ndarray, temperature: float) -> Tensor:
        """NCE_c(q) of Eq. 4 of RCA for each query [M, D] and its class, of any length: [M].

        0 for a class without rows. The gradient flows to the queries. Collective, for any number of
        queries, none included.
        """
        bank = self.bank
        return _RowContrast.apply(
            F.normalize(queries_MD.to(bank.rows.dtype), dim=1),
            torch.from_numpy(np.asarray(classes_M, dtype=np.int64)),
            bank.rows,
            self.lengths,
            bank.classes,
            bank.is_set,
            temperature,
            bank.table == "sharded",
        )


class _RowContrast(torch.autograd.Function):
    """For each query q of class c, with s_j = q . m_j / (|m_j| temperature) over the set rows j:

        loss = mean over rows p of class c of softplus(log sum_{j not of class c} exp s_j - s_p)

    which is -log(exp s_p / (exp s_p + sum_j exp s_j)), Eq. 4 of RCA. 0 if the class has no row.
    """

    @staticmethod
    def forward(
        ctx,
        queries_MD: Tensor,
        classes_M: Tensor,
        rows_TD: Tensor,
        lengths_T: Tensor,
        row_classes_T: Tensor,
        is_set_T: Tensor,
        temperature: float,
        is_sharded: bool,
    ) -> Tensor:
        """queries: unit, on the device; classes: on the host; lengths: |m_j|."""
        device = queries_MD.device
        num_own, first = len(queries_MD), 0
        queries_ED, classes_E = queries_MD, classes_M
        if is_sharded and dist.size() > 1:
            counts = dist.all_gather(torch.tensor([num_own])).flatten().tolist()
            first = sum(counts[: dist.rank()])
            classes_E = dist.all_gather_ragged(classes_M, counts)
            queries_ED = dist.all_gather_ragged(queries_MD, counts)
        shard = _Shard(rows_TD, 1 / (lengths_T * temperature), row_classes_T, is_set_T)
        class_E = classes_E.to(device, non_blocking=True)
        chunks = _chunks(len(queries_ED), len(rows_TD))

        parts = [shard.negatives(queries_ED[c], class_E[c]) for c in chunks]
        local_E = torch.cat([part[0] for part in parts])
        negative_ED = torch.cat([part[1] for part in parts])
        lse_E = torch.logsumexp(dist.all_gather(local_E), dim=0) if is_sharded else local_E
        weight_E = torch.where(local_E == -torch.inf, 0.0, torch.exp(local_E - lse_E))
        negative_ED = negative_ED * weight_E[:, None]

        sums = torch.cat([shard.positives(queries_ED[c], class_E[c], lse_E[c]) for c in chunks])
        total = torch.cat([sums, negative_ED], dim=1)
        if is_sharded:
            total = dist.all_reduce_sum(total)
        own = total[first : first + num_own]
        dim = rows_TD.shape[1]
        loss_M, sigma_M, count_M = own[:, :3].unbind(dim=1)
        positive_MD, negative_MD = own[:, 3:].split(dim, dim=1)
        count_M = count_M.clamp_min(1)
        gradient_MD = (sigma_M[:, None] * negative_MD - positive_MD) / count_M[:, None]
        ctx.save_for_backward(gradient_MD)
        return loss_M / count_M

    @staticmethod
    def backward(ctx, grad_M: Tensor):  # type: ignore[override]
        (gradient_MD,) = ctx.saved_tensors
        return grad_M[:, None] * gradient_MD, None, None, None, None, None, None, None


class _Shard:
    """The rows of this rank; `scale` [T] turns a product with a raw row into s."""

    def __init__(self, rows_TD: Tensor, scale_T: Tensor, class_T: Tensor, is_set_T: Tensor) -> None:
        self.rows_TD, self.scale_T, self.class_T = rows_TD, scale_T, class_T
        self.is_set_T = is_set_T

    def negatives(self, query_ED: Tensor, class_E: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sum-exp of s over other classes [E], and its gradient by the query [E, D]."""
        score_ET = self._scores(query_ED)
        is_negative_ET = (self.class_T != class_E[:, None]) & self.is_set_T
        score_ET = score_ET.masked_fill_(~is_negative_ET, -torch.inf)
        if score_ET.shape[1] == 0:
            return query_ED.new_full((len(query_ED),), -torch.inf), torch.zeros_like(query_ED)
        lse_E = torch.logsumexp(score_ET, dim=1)
        shift_E = torch.where(lse_E == -torch.inf, 0.0, lse_E)
        share_ET = score_ET.sub_(shift_E[:, None]).exp_().mul_(self.scale_T)
        return lse_E, share_ET @ self.rows_TD

    def positives(self, query_ED: Tensor, class_E: Tensor, lse_E: Tensor) -> Tensor:
        """[E, 3 + D]: sums over own-class rows of softplus, its slope, 1, and slope * ds / dq."""
        score_ET = self._scores(query_ED)
        is_positive_ET = (self.class_T == class_E[:, None]) & self.is_set_T
        gap_ET = torch.where(is_positive_ET, lse_E[:, None] - score_ET, -torch.inf)
        slope_ET = torch.sigmoid(gap_ET)
        sums_E3 = torch.stack(
            [
                F.softplus(gap_ET, threshold=30).sum(dim=1),
                slope_ET.sum(dim=1),
                is_positive_ET.sum(dim=1).to(gap_ET.dtype),
            ],
            dim=1,
        )
        return torch.cat([sums_E3, (slope_ET * self.scale_T) @ self.rows_TD], dim=1)

    def _scores(self, query_ED: Tensor) -> Tensor:
        return (query_ED @ self.rows_TD.T).mul_(self.scale_T)


def _chunks(num_queries: int, num_rows: int) -> list[slice]:
    """Runs of queries whose scores fit; one, of nothing, where there is no query."""
    size = max(1, SCORES_PER_CHUNK // max(num_rows, 1))
    return [slice(first, first + size) for first in range(0, max(num_queries, 1), size)]
