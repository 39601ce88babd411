"""Losses built on the operators."""

from couplings.losses.knn import knn_loss as knn_loss
from couplings.losses.knn import knn_predict as knn_predict
