"""Ranking metrics and robust statistics as losses: built on soft ranks, quantiles and top-k masks."""

from couplings.losses.ranking.correlation import kendall_loss as kendall_loss
from couplings.losses.ranking.correlation import spearman_loss as spearman_loss
from couplings.losses.ranking.retrieval import average_precision_loss as average_precision_loss
from couplings.losses.ranking.retrieval import ndcg_loss as ndcg_loss
from couplings.losses.ranking.retrieval import recall_at_k_loss as recall_at_k_loss
from couplings.losses.ranking.robust import least_quantile_loss as least_quantile_loss
from couplings.losses.ranking.robust import trimmed_loss as trimmed_loss
from couplings.losses.ranking.topk import topk_loss as topk_loss
