"""What the numbers in metrics.json are called, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Meanings = Mapping[str, tuple[str, str]]  # by key: name, meaning

MEANINGS = {  # of metrics.json, in the order shown
    "top1": ("Top-1", "share of images whose likeliest class is right"),
    "top5": ("Top-5", "share of images whose class is among the five likeliest"),
    "balanced": ("Mean recall", "recall of each class, mean over classes"),
    "loss": ("Loss", "mean of -log of the probability given to the truth"),
    "ece": ("Calibration error", "how far confidence is from accuracy, mean over images"),
    "map": ("mAP50-95", "average precision, mean over classes and overlaps 0.5 to 0.95"),
    "map50": ("mAP50", "average precision at overlap 0.5"),
    "map75": ("mAP75", "average precision at overlap 0.75: boxes have to fit well"),
    "map_small": ("mAP small", "average precision on boxes below 32² pixels"),
    "map_medium": ("mAP medium", "average precision on boxes of 32² to 96² pixels"),
    "map_large": ("mAP large", "average precision on boxes above 96² pixels"),
    "ar_1": ("AR 1", "average recall with one detection per image and class"),
    "ar_10": ("AR 10", "average recall with ten"),
    "ar_100": ("AR 100", "average recall with a hundred"),
    "ar_small": ("AR small", "average recall on boxes below 32² pixels"),
    "ar_medium": ("AR medium", "average recall on boxes of 32² to 96² pixels"),
    "ar_large": ("AR large", "average recall on boxes above 96² pixels"),
    "precision": ("Precision", "share of detections that are right, at the best confidence"),
    "recall": ("Recall", "share of boxes that are found, at the best confidence"),
    "f1": ("F1", "harmonic mean of the two, highest at the best confidence"),
    "conf": ("Best confidence", "the confidence to cut at: here mean F1 is highest"),
}
SEVERAL = {  # of images that may have several classes, or none
    "map": ("mAP", "average precision of a class's scores over images, mean over classes"),
    "precision": ("Precision", "share of classes said at a score of a half that are right"),
    "recall": ("Recall", "share of images' classes that are said at a score of a half"),
    "f1": ("F1", "harmonic mean of the two"),
}


def has_several(metrics: Mapping[str, Any]) -> bool:
    """Tell whether images were scored that may have several classes."""
    return metrics.get("task") == "classify" and "top1" not in metrics


def meanings_of(metrics: Mapping[str, Any]) -> Meanings:
    """Return names and meanings of a run's numbers, in the order shown."""
    return MEANINGS | SEVERAL if has_several(metrics) else MEANINGS
