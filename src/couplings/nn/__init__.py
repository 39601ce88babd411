"""Thin ``torch.nn.Module`` forms of the operators: settings in the constructor, tensors in the call."""

from couplings.nn.attention import TopKAttention
from couplings.nn.contrastive import (
    CLIPLoss,
    CosineTargetLoss,
    InfoNCELoss,
    NPairsLoss,
    NTXentLoss,
    SigmoidLoss,
    TripletLoss,
)
from couplings.nn.matching import DustbinMatching, GumbelSinkhorn, MatchingLoss, SinkhornNormalize
from couplings.nn.ordering import SoftPermutation, SoftQuantile, SoftRank, SoftSort
from couplings.nn.ranking import (
    AveragePrecisionLoss,
    KendallLoss,
    LeastQuantileLoss,
    NDCGLoss,
    RecallAtKLoss,
    SpearmanLoss,
    TopKLoss,
    TrimmedLoss,
)
from couplings.nn.selection import SoftTopK, SoftTopKMask
from couplings.nn.similarity import MaxSim

__all__ = [
    "AveragePrecisionLoss",
    "CLIPLoss",
    "CosineTargetLoss",
    "DustbinMatching",
    "GumbelSinkhorn",
    "InfoNCELoss",
    "KendallLoss",
    "LeastQuantileLoss",
    "MatchingLoss",
    "MaxSim",
    "NDCGLoss",
    "NPairsLoss",
    "NTXentLoss",
    "RecallAtKLoss",
    "SigmoidLoss",
    "SinkhornNormalize",
    "SoftPermutation",
    "SoftQuantile",
    "SoftRank",
    "SoftSort",
    "SoftTopK",
    "SoftTopKMask",
    "SpearmanLoss",
    "TopKAttention",
    "TopKLoss",
    "TrimmedLoss",
    "TripletLoss",
]
