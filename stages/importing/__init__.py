"""Import: labelled images in the usual formats → image shards."""

from stages.importing.run import ImportReport, SplitReport, import_dataset

__all__ = ["ImportReport", "SplitReport", "import_dataset"]
