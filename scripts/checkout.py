"""Imported before `cbl`: makes it this checkout's, whatever is installed. So edits count, and results/ is at hand."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
