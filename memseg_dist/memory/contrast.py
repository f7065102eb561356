"""Contrast of a few queries with every row of a memory that is spread over the ranks.

    contrast = Contrast(bank)                                      # the same call on every rank
    losses = contrast(queries, classes, weights, temperature=0.07) # collective: every slot calls

Queries travel, rows stay: four exchanges of a few floats per query and channel, whatever the
number of rows. Value and gradient equal those of one process that holds all rows.

A query is told from others as of several classes (a mixture: of two). Its rows are scored once for
all of them, and its gradient is one weighted sum of rows, so a query costs two products with the
memory. What only a class's own rows need is taken of those alone: they are contiguous.

Shape letters: Q queries of all ranks, M of this rank, K classes of each query, L rows of the
longest of these classes held here, T rows held here, D channels; J = K + 1 groups of rows: those of
each class, and all others.
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

    def __call__(
        self,
        queries_MD: Tensor,
        classes_MK: np.ndarray,
        weights_MK: np.ndarray,
        temperature: float,
    ) -> Tensor:
        """sum_k w_k NCE_{c_k}(q) of each query, of any length, its classes c and weights w >= 0:
        [M].

        NCE is Eq. 4 of RCA, 0 for a class without rows. The gradient flows to the queries.
        Collective, for any number of queries, none included.
        """
        rows = self.bank.rows
        unit_MD = F.normalize(queries_MD.to(rows.dtype), dim=1)
        weights = torch.from_numpy(weights_MK).to(rows.device, rows.dtype, non_blocking=True)
        scale_T = 1 / (self.lengths * temperature)
        return _RowContrast.apply(unit_MD, classes_MK, weights, self.bank, scale_T)


class _RowContrast(torch.autograd.Function):
    """For each query q of class c, with s_j = q . m_j / (|m_j| temperature) over the set rows j:

        loss = mean over rows p of class c of softplus(log sum_{j not of class c} exp s_j - s_p)

    which is -log(exp s_p / (exp s_p + sum_j exp s_j)), Eq. 4 of RCA. 0 if the class has no row.
    """

    @staticmethod
    def forward(
        ctx,
        queries_MD: Tensor,
        classes_MK: np.ndarray,
        weights_MK: Tensor,
        bank: ShardedRows,
        scale_T: Tensor,
    ) -> Tensor:
        """queries: unit; scale turns a product with a raw row into s."""
        first, num_own = 0, len(queries_MD)
        queries_QD, classes_QK, weights_QK = queries_MD, classes_MK, weights_MK
        if bank.table == "sharded" and dist.size() > 1:
            counts = dist.all_gather(torch.tensor([num_own])).flatten().tolist()
            first = sum(counts[: dist.rank()])
            classes_QK = dist.all_gather_ragged(torch.from_numpy(classes_MK), counts).numpy()
            queries_QX = torch.cat([queries_MD, weights_MK], dim=1)
            queries_QX = dist.all_gather_ragged(queries_QX, counts)
            queries_QD, weights_QK = queries_QX.split([queries_MD.shape[1], weights_MK.shape[1]], 1)
        parts = [
            _loss_and_gradient(queries_QD[c], classes_QK[c], weights_QK[c], bank, scale_T)
            for c in _chunks(len(queries_QD), bank)
        ]
        loss_Q, gradient_QD = (torch.cat(part) for part in zip(*parts))
        ctx.save_for_backward(gradient_QD[first : first + num_own])
        return loss_Q[first : first + num_own]

    @staticmethod
    def backward(ctx, grad_M: Tensor):  # type: ignore[override]
        (gradient_MD,) = ctx.saved_tensors
        return grad_M[:, None] * gradient_MD, None, None, None, None


def _loss_and_gradient(
    query_QD: Tensor, classes_QK: np.ndarray, weight_QK: Tensor, bank: ShardedRows, scale_T: Tensor
) -> tuple[Tensor, Tensor]:
    """[Q] and [Q, D]. An unset row has the score -inf; so has one more column than there are rows,
    where the indices of a class's rows go that has fewer than L.
    """
    is_sharded = bank.table == "sharded"
    score_QT = (query_QD @ bank.rows.T).mul_(scale_T).masked_fill_(~bank.is_set, -torch.inf)
    score_QT = F.pad(score_QT, (0, 1), value=-torch.inf)
    index_QKL, is_rival_QKJ = _own_rows(classes_QK, bank), _rivals(classes_QK, bank)
    index_QX = index_QKL.flatten(1)
    own_QKL = score_QT.gather(1, index_QX).view_as(index_QKL)
    score_QT.scatter_(1, index_QX, -torch.inf)  # leaves the rows of no class of the query

    local_QJ = torch.cat([own_QKL.logsumexp(dim=2), score_QT.logsumexp(dim=1, keepdim=True)], dim=1)
    whole_QJ = dist.all_gather(local_QJ).logsumexp(dim=0) if is_sharded else local_QJ
    negatives_QK = _log_sum_exp(whole_QJ[:, None], is_rival_QKJ, dim=2)
    is_row_QKL = own_QKL > -torch.inf
    gap_QKL = torch.where(is_row_QKL, negatives_QK[:, :, None] - own_QKL, -torch.inf)
    slope_QKL = gap_QKL.sigmoid()
    terms = F.softplus(gap_QKL, threshold=30), slope_QKL, is_row_QKL.to(slope_QKL.dtype)
    sums_QK3 = torch.stack([term.sum(dim=2) for term in terms], dim=2)
    if is_sharded:
        sums_QK3 = dist.all_reduce_sum(sums_QK3)
    loss_QK, sigma_QK, count_QK = sums_QK3.unbind(dim=2)
    share_QK = weight_QK / count_QK.clamp_min(1)

    # d loss / d s_j = sum_k share_k (sigma_k exp(s_j - negatives_k) [j not of c_k] - slope_kj)
    push_QK = torch.where(sigma_QK > 0, (share_QK * sigma_QK).log() - negatives_QK, -torch.inf)
    push_QJ = _log_sum_exp(push_QK[:, :, None], is_rival_QKJ, dim=1)
    by_score_QT = score_QT.add_(push_QJ[:, -1:]).exp_()
    by_own_QKL = (own_QKL + push_QJ[:, :-1, None]).exp() - share_QK[:, :, None] * slope_QKL
    by_score_QT.scatter_add_(1, index_QX, by_own_QKL.flatten(1))
    gradient_QD = by_score_QT[:, :-1].mul(scale_T) @ bank.rows
    if is_sharded:
        gradient_QD = dist.all_reduce_sum(gradient_QD)
    return (share_QK * loss_QK).sum(dim=1), gradient_QD


def _own_rows(classes_QK: np.ndarray, bank: ShardedRows) -> Tensor:
    """int64 [Q, K, L]: where the rows of each class lie here, then T; all T if they do not."""
    starts, num_rows = bank.layout.starts, len(bank.rows)
    bounds = np.stack([starts[classes_QK], starts[classes_QK + 1]]) - bank.start
    bounds = np.where((bounds[0] >= 0) & (bounds[1] <= num_rows), bounds, num_rows)
    first_QK, stop_QK = bank.put(bounds)
    longest = max(1, int((bounds[1] - bounds[0]).max(initial=0)))
    index_QKL = first_QK[:, :, None] + torch.arange(longest, device=first_QK.device)
    return torch.where(index_QKL < stop_QK[:, :, None], index_QKL, num_rows)


def _rivals(classes_QK: np.ndarray, bank: ShardedRows) -> Tensor:
    """bool [Q, K, J]: which groups of rows are negatives of the query as of its k-th class. A class
    that a query has twice is one group.
    """
    is_same_QKK = classes_QK[:, :, None] == classes_QK[:, None, :]
    is_again_QK = np.tril(is_same_QKK, -1).any(axis=2)
    is_other_QKK = ~is_same_QKK & ~is_again_QK[:, None, :]
    return bank.put(np.pad(is_other_QKK, ((0, 0), (0, 0), (0, 1)), constant_values=True))


def _log_sum_exp(values: Tensor, is_counted: Tensor, dim: int) -> Tensor:
    return torch.where(is_counted, values, -torch.inf).logsumexp(dim=dim)


def _chunks(num_queries: int, bank: ShardedRows) -> list[slice]:
    """Runs of queries whose scores fit, the same on every rank; one, of nothing, where there is no
    query.
    """
    most_rows = int(np.diff(bank.layout.starts[bank.bounds]).max())
    size = max(1, SCORES_PER_CHUNK // max(most_rows, 1))
    return [slice(first, first + size) for first in range(0, max(num_queries, 1), size)]
