"""Training what the ``learned`` retention method reads: KVzip's scores, predicted token by token."""

from kvfold.quality.train_retention.collect import training_passages
from kvfold.quality.train_retention.run import (
    LEAST_R2,
    HeadFit,
    LayerFit,
    TrainingReport,
    check_trainable,
    train_retention,
)

__all__ = [
    "LEAST_R2",
    "HeadFit",
    "LayerFit",
    "TrainingReport",
    "check_trainable",
    "train_retention",
    "training_passages",
]
