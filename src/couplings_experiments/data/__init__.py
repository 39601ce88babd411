"""Image classification sets: scikit-learn's digits by default, MNIST, Fashion-MNIST and CIFAR from a folder."""

from couplings_experiments.data.sets import DATASETS, Dataset, Split, load

__all__ = ["DATASETS", "Dataset", "Split", "load"]
