"""Finding the bases of calibrated recipes: run a text through a model, and measure what an error in its cache costs."""

from kvfold.quality.calibrate.passages import calibration_passages
from kvfold.quality.calibrate.run import CalibrationReport, calibrate

__all__ = ["CalibrationReport", "calibrate", "calibration_passages"]
