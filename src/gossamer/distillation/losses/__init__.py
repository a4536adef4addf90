"""Losses of distillation: pure functions, and a class twin for each that holds its settings and can follow a schedule."""

from gossamer.distillation.losses.dense import channelwise_loss, regression_kd_loss
from gossamer.distillation.losses.features import (
    attention_map,
    attention_transfer_loss,
    fitnet_loss,
    rkd_loss,
    similarity_preserving_loss,
)
from gossamer.distillation.losses.logits import (
    dist_loss,
    dkd_loss,
    kd_loss,
    nkd_loss,
    standardize_logits,
)
from gossamer.distillation.losses.teacherless import self_distillation_loss
from gossamer.distillation.losses.twins import (
    DIST,
    DKD,
    FEATURE_LOSSES,
    KD,
    LOSSES,
    NKD,
    RKD,
    AttentionTransfer,
    Channelwise,
    Combined,
    FeatureLoss,
    FitNet,
    OutputLoss,
    RegressionKD,
    SelfDistillation,
    SimilarityPreserving,
)

__all__ = [
    "DIST",
    "DKD",
    "FEATURE_LOSSES",
    "KD",
    "LOSSES",
    "NKD",
    "RKD",
    "AttentionTransfer",
    "Channelwise",
    "Combined",
    "FeatureLoss",
    "FitNet",
    "OutputLoss",
    "RegressionKD",
    "SelfDistillation",
    "SimilarityPreserving",
    "attention_map",
    "attention_transfer_loss",
    "channelwise_loss",
    "dist_loss",
    "dkd_loss",
    "fitnet_loss",
    "kd_loss",
    "nkd_loss",
    "regression_kd_loss",
    "rkd_loss",
    "self_distillation_loss",
    "similarity_preserving_loss",
    "standardize_logits",
]
