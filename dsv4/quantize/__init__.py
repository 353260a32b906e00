"""Number formats applied to whole models: recipes, calibration, conversion of checkpoints."""
