"""Training what the ``learned`` retention method reads: KVzip's scores, foretold token by token."""

from kvfold.quality.train_retention.collect import training_passages
from kvfold.quality.train_retention.run import HeadFit, LayerFit, TrainingReport, train_retention

__all__ = ["HeadFit", "LayerFit", "TrainingReport", "train_retention", "training_passages"]
