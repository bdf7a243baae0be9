"""``python -m pipeline`` is ``prism``."""

from pipeline.cli import main

main()
