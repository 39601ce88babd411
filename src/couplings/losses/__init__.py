"""Losses built on the operators."""

from couplings.losses.contrastive import cached_backward as cached_backward
from couplings.losses.contrastive import clip_loss as clip_loss
from couplings.losses.contrastive import collapse_guard as collapse_guard
from couplings.losses.contrastive import cosine_target_loss as cosine_target_loss
from couplings.losses.contrastive import info_nce_loss as info_nce_loss
from couplings.losses.contrastive import n_pairs_loss as n_pairs_loss
from couplings.losses.contrastive import nt_xent_loss as nt_xent_loss
from couplings.losses.contrastive import sigmoid_loss as sigmoid_loss
from couplings.losses.contrastive import triplet_loss as triplet_loss
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
