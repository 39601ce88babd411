"""Over ``torch.distributed``: losses with negatives from all ranks, and retrieval from documents on all ranks."""

from couplings.distributed.collectives import gather as gather
from couplings.distributed.contrastive import contrastive as contrastive
from couplings.distributed.retrieval import maxsim_topk as maxsim_topk
