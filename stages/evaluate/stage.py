"""The two steps of evaluate as the pipeline calls them: Ray Train students, Ray Data validation."""

from stages.evaluate.train import train_students
from stages.evaluate.validate import read_results, validate_students

__all__ = ["read_results", "train_students", "validate_students"]
