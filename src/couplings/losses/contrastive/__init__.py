"""Cross-similarity losses on one tiled engine, and what shows, and prevents, that their embeddings collapse."""

from couplings.losses.contrastive.cached import cached_backward as cached_backward
from couplings.losses.contrastive.collapse import collapse_guard as collapse_guard
from couplings.losses.contrastive.cosine_target import cosine_target_loss as cosine_target_loss
from couplings.losses.contrastive.diagnostics import EmbeddingDiagnostics as EmbeddingDiagnostics
from couplings.losses.contrastive.diagnostics import diagnostics as diagnostics
from couplings.losses.contrastive.sigmoid import sigmoid_loss as sigmoid_loss
from couplings.losses.contrastive.softmax import clip_loss as clip_loss
from couplings.losses.contrastive.softmax import info_nce_loss as info_nce_loss
from couplings.losses.contrastive.softmax import n_pairs_loss as n_pairs_loss
from couplings.losses.contrastive.softmax import nt_xent_loss as nt_xent_loss
from couplings.losses.contrastive.triplet import triplet_loss as triplet_loss
