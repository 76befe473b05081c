"""Training by `transformers.Trainer` of whatever parameters are trainable; it can be stopped and gone on with."""

from quadapt.methods import Run
from quadapt.train.loop import Trained, last_checkpoint, train, trainable_parameters
from quadapt.train.sign_sgd import TernaryAdamW
from quadapt.train.trainer import AdapterTrainer

__all__ = ["AdapterTrainer", "Run", "TernaryAdamW", "Trained", "last_checkpoint", "train", "trainable_parameters"]
