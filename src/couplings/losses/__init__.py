"""Losses built on the operators."""

from couplings.losses.distillation import distillation_loss as distillation_loss
from couplings.losses.knn import knn_loss as knn_loss
from couplings.losses.knn import knn_predict as knn_predict
from couplings.losses.matching import matching_loss as matching_loss
from couplings.losses.ranking import average_precision_loss as average_precision_loss
from couplings.losses.ranking import kendall_loss as kendall_loss
from couplings.losses.ranking import least_quantile_loss as least_quantile_loss
from couplings.losses.ranking import ndcg_loss as ndcg_loss
from couplings.losses.ranking import recall_at_k_loss as recall_at_k_loss
from couplings.losses.ranking import spearman_loss as spearman_loss
from couplings.losses.ranking import topk_loss as topk_loss
from couplings.losses.ranking import trimmed_loss as trimmed_loss
