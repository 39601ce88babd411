"""Beam search: the ordinary one for decoding, the differentiable one inside training."""

from couplings.beam.decoder import Step
from couplings.beam.hard import Beams, beam_search
from couplings.beam.loss import sequence_loss, soft_beam_loss, teacher_forcing_loss
from couplings.beam.soft import SoftBeams, soft_beam_search

__all__ = [
    "Beams",
    "SoftBeams",
    "Step",
    "beam_search",
    "sequence_loss",
    "soft_beam_loss",
    "soft_beam_search",
    "teacher_forcing_loss",
]
