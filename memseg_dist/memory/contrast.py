"""Contrast of a few queries with every row of a memory that is spread over the ranks.

    contrast = Contrast(bank)                                      # the same call on every rank
    losses = contrast(queries, classes, weights, temperature=0.07) # collective: every slot calls

Queries travel, rows stay: four exchanges of a few floats per query and channel, whatever the
number of rows. Value and gradient equal those of one process that holds all rows: on CPU bit by
bit, for there the queries of one slot meet the rows of one class at a time, in products and sums
whose shape and order know no rank, and the classes' parts of a gradient are added as whole numbers
(with channels in multiples of 16: rows that start elsewhere than at 64 bytes may round otherwise).
On CUDA all queries meet all rows of a rank at once.

A query is told from others as of several classes (a mixture: of two). Its rows are scored once for
all of them, and its gradient is one weighted sum of rows, so a query costs two products with the
memory. What only a class's own rows need is taken of those alone: they are contiguous.

Shape letters: Q queries of all ranks, M of this rank, K classes of each query, L rows of the
longest of these classes, T rows held here, D channels; J = K + 1 groups of rows: those of each
class, and all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

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
        scaled_MD = F.normalize(queries_MD.to(rows.dtype), dim=1) / temperature
        weights = torch.from_numpy(weights_MK).to(rows.device, rows.dtype, non_blocking=True)
        return _RowContrast.apply(scaled_MD, classes_MK, weights, self.bank, 1 / self.lengths)


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
        """queries: unit, over the temperature; scale turns raw rows into unit ones."""
        counts = [len(queries_MD)]
        queries_QD, classes_QK, weights_QK = queries_MD, classes_MK, weights_MK
        if bank.table == "sharded" and dist.size() > 1:
            counts = dist.all_gather(torch.tensor(counts)).flatten().tolist()
            classes_QK = dist.all_gather_ragged(torch.from_numpy(classes_MK), counts).numpy()
            queries_QX = torch.cat([queries_MD, weights_MK], dim=1)
            queries_QX = dist.all_gather_ragged(queries_QX, counts)
            widths = [queries_MD.shape[1], weights_MK.shape[1]]
            # copies: products round by how their operands lie in memory, too
            queries_QD, weights_QK = (
                part.clone(memory_format=torch.contiguous_format)
                for part in queries_QX.split(widths, dim=1)
            )
        parts = [
            _loss_and_gradient(queries_QD[c], classes_QK[c], weights_QK[c], bank, scale_T)
            for c in _chunks(counts, bank)
        ]
        loss_Q, gradient_QD = (torch.cat(part) for part in zip(*parts))
        own = dist.rank() if len(counts) > 1 else 0
        ctx.save_for_backward(gradient_QD.split(counts)[own])
        return loss_Q.split(counts)[own]

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
    is_sharded, pieces = bank.table == "sharded", _pieces(bank)
    score_QT = query_QD.new_full((len(query_QD), len(bank.rows) + 1), -torch.inf)
    for piece in pieces:
        # not `out=`: a product rounds by how its result lies in memory
        score_QT[:, piece] = query_QD @ bank.rows[piece].T
    score_QT[:, :-1].mul_(scale_T).masked_fill_(~bank.is_set, -torch.inf)
    index_QKL, is_rival_QKJ = _own_rows(classes_QK, bank), _rivals(classes_QK, bank)
    index_QX = index_QKL.flatten(1)
    own_QKL = score_QT.gather(1, index_QX).view_as(index_QKL)
    score_QT.scatter_(1, index_QX, -torch.inf)  # leaves the rows of no class of the query

    whole_QJ = _log_sums(own_QKL, [score_QT[:, piece] for piece in pieces], bank)
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
    for piece in pieces:
        score_QT[:, piece].add_(push_QJ[:, -1:]).exp_()
    by_own_QKL = (own_QKL + push_QJ[:, :-1, None]).exp() - share_QK[:, :, None] * slope_QKL
    by_score_QT = score_QT.scatter_add_(1, index_QX, by_own_QKL.flatten(1))
    parts = [by_score_QT[:, p].mul(scale_T[p]) @ bank.rows[p] for p in pieces]
    if _is_in_order(bank):
        # rows count as unit vectors: for each class, pushes and pulls sum to its weight at most
        bound_Q1 = 2 * weight_QK.sum(dim=1, keepdim=True)
        gradient_QD = _sum_of_whole_numbers(parts, bound_Q1, like=query_QD, is_sharded=is_sharded)
    else:
        gradient_QD = dist.all_reduce_sum(parts[0]) if is_sharded else parts[0]
    return (share_QK * loss_QK).sum(dim=1), gradient_QD


def _log_sums(own_QKL: Tensor, others: Sequence[Tensor], bank: ShardedRows) -> Tensor:
    """[Q, J] over the rows of all ranks. others: per piece the scores [Q, ...] of the rows of no
    class of the query. Collective.
    """
    num_classes = own_QKL.shape[1]
    found = [own_QKL.logsumexp(dim=2).T, *(score.logsumexp(dim=1)[None] for score in others)]
    sizes = [num_classes + count for count in _num_pieces(bank)]
    local_XQ = torch.cat(found)
    whole_XQ = dist.all_gather_ragged(local_XQ, sizes) if len(sizes) > 1 else local_XQ
    parts = whole_XQ.split(sizes)
    own_WKQ = torch.stack([part[:num_classes] for part in parts])
    others_XQ = torch.cat([part[num_classes:] for part in parts])
    return torch.cat([own_WKQ.logsumexp(dim=0), others_XQ.logsumexp(dim=0, keepdim=True)]).T


def _sum_of_whole_numbers(
    parts: Sequence[Tensor], bound_Q1: Tensor, *, like: Tensor, is_sharded: bool
) -> Tensor:
    """The sum over all parts [Q, D] of all ranks, the same in any order: in units of 2^-60 of the
    bound on the sum of their magnitudes. A float of 2^-36 of the bound is still taken whole.
    """
    unit_Q1 = bound_Q1.double().clamp_min(torch.finfo(torch.float32).tiny) * 2**-60
    total_QD = torch.zeros_like(like, dtype=torch.int64)
    for part in parts:
        total_QD += (part / unit_Q1).long()
    if is_sharded:
        total_QD = dist.all_reduce_sum(total_QD)
    return (total_QD * unit_Q1).to(like.dtype)


def _own_rows(classes_QK: np.ndarray, bank: ShardedRows) -> Tensor:
    """int64 [Q, K, L]: where the rows of each class lie here, then T; all T if they do not."""
    starts, num_rows = bank.layout.starts, len(bank.rows)
    longest = max(1, int(bank.layout.counts[classes_QK].max(initial=0)))
    bounds = np.stack([starts[classes_QK], starts[classes_QK + 1]]) - bank.start
    bounds = np.where((bounds[0] >= 0) & (bounds[1] <= num_rows), bounds, num_rows)
    first_QK, stop_QK = bank.put(bounds)
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


def _is_in_order(bank: ShardedRows) -> bool:
    return bank.rows.device.type == "cpu"


def _pieces(bank: ShardedRows) -> list[slice]:
    """The rows held here that are taken at once: all of them, or in order those of each class."""
    if not _is_in_order(bank):
        return [slice(0, len(bank.rows))]
    starts = bank.layout.starts[bank.owned.start : bank.owned.stop + 1] - bank.start
    return [slice(low, high) for low, high in pairwise(starts) if low < high]


def _num_pieces(bank: ShardedRows) -> list[int]:
    """Of each rank."""
    spans = pairwise(bank.bounds)
    if not _is_in_order(bank):
        return [1 for _ in spans]
    return [int(np.count_nonzero(bank.layout.counts[low:high])) for low, high in spans]


def _chunks(counts: Sequence[int], bank: ShardedRows) -> Iterator[slice]:
    """Runs of queries whose scores fit, the same on every rank, of the `counts` queries that each
    rank asks: in order of one rank's alone; otherwise of all together.
    """
    most_rows = len(bank.layout)
    if not _is_in_order(bank):
        counts, most_rows = [sum(counts)], int(np.diff(bank.layout.starts[bank.bounds]).max())
    size = max(1, SCORES_PER_CHUNK // max(most_rows, 1))
    for first, count in zip(accumulate(counts, initial=0), counts):
        for start in range(first, first + max(count, 1), size):
            yield slice(start, min(start + size, first + count))
