"""Running a model: full sequence, prefill, one step at a time, sampling, text."""
