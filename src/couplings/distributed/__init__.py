"""Cross-similarity losses over ``torch.distributed``: negatives from all ranks, gradients of the joined batch."""

from couplings.distributed.collectives import gather as gather
from couplings.distributed.contrastive import contrastive as contrastive
